import time

import pytest
import torch

from medvl.ct.names import patient_of, scan_of, volume_name
from medvl.training.order import batch_indices, derangement, prefetch, split_by_tokens

NAMES = [f"train_{p}_{s}_{r}" for p in range(9) for s in "ab" for r in (1, 2, 3)[: 1 + p % 3]]
GROUPS = [scan_of(n) for n in NAMES]


def test_no_batch_holds_two_reconstructions_of_a_scan():
    for i in range(40):
        batch = batch_indices(GROUPS, 6, 3)(i)
        assert len({GROUPS[j] for j in batch}) == 6


def test_an_epoch_visits_every_scan_once_and_all_volumes_come_up():
    per = len(set(GROUPS)) // 6
    epoch = [GROUPS[j] for i in range(per) for j in batch_indices(GROUPS, 6, 0)(i)]
    assert len(epoch) == len(set(epoch)) == per * 6
    assert {j for i in range(60) for j in batch_indices(GROUPS, 6, 0)(i)} == set(range(len(NAMES)))


def test_pure_in_seed_and_i():
    assert batch_indices(GROUPS, 6, 1)(17) == batch_indices(GROUPS, 6, 1)(17)
    assert batch_indices(GROUPS, 6, 1)(17) != batch_indices(GROUPS, 6, 2)(17)
    with pytest.raises(
        ValueError, match=r"as many different samples \(or groups of them, such as scans\), found 18"
    ):
        batch_indices(GROUPS, 19, 0)


def test_a_run_that_went_on_has_the_same_batches():
    """In any order, over epochs: what was asked before does not matter."""
    one, per = batch_indices(GROUPS, 6, 1), len(set(GROUPS)) // 6
    assert [one(i) for i in range(3 * per)] == [batch_indices(GROUPS, 6, 1)(i) for i in range(3 * per)]
    assert one(0) == batch_indices(GROUPS, 6, 1)(0)
    assert one(0) != one(per)


@pytest.mark.parametrize("world", [1, 2, 4, 6])
def test_shares_of_processes_are_the_batch(world):
    shares = [batch_indices(GROUPS, 6, 1, rank=r, world=world)(5) for r in range(world)]
    assert [j for share in shares for j in share] == batch_indices(GROUPS, 6, 1)(5)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(ValueError, match="a sample for each process, got 6 for 7"):
        batch_indices(GROUPS, 6, 1, world=7)


def test_prefetch_keeps_order_and_hands_errors_on():
    def at(i):
        time.sleep(0.001 * (i % 3))
        if i == 8:
            raise ValueError("volume 8 is gone")
        return i * i

    assert list(prefetch(at, 2, 6)) == [(i, i * i) for i in range(2, 6)]
    assert list(prefetch(at, 3, 3)) == []
    with pytest.raises(ValueError, match="volume 8"):
        list(prefetch(at, 6, 10))


def test_names():
    assert volume_name("/data/x/valid_1_a_1.nii.gz") == volume_name("valid_1_a_1") == "valid_1_a_1"
    assert (scan_of("train_12_b_3"), patient_of("train_12_b_3")) == ("train_12_b", "train_12")
    assert scan_of("liver.CT-7") == patient_of("liver.CT-7") == "liver.CT-7"


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_a_derangement_gives_every_item_to_another(n):
    items = [f"s{i}" for i in range(n)]
    for seed in range(20):
        other = derangement(items, seed)
        assert sorted(other) == sorted(other.values()) == sorted(items)
        assert all(item != given for item, given in other.items())
        assert other == derangement(reversed(items), seed)  # the order in which they come decides nothing
    assert n < 10 or derangement(items, 0) != derangement(items, 1)


def test_a_derangement_needs_two():
    with pytest.raises(ValueError, match="two different items or more, got 1"):
        derangement(["a", "a"], 0)


# Micro-batches by tokens ------------------------------------------------------------------------------------
LENGTHS = [3, 50, 7, 7, 20, 9, 31, 1, 12, 7, 100, 18]


def padded(rows, lengths=LENGTHS):
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("multiple_of", [1, 2, 3, 4])
@pytest.mark.parametrize("bound", [1, 50, 64, 1000])
def test_micro_batches_hold_every_sample_once_within_the_bound(packing, multiple_of, bound):
    samples = range(len(LENGTHS))
    parts = split_by_tokens(samples, LENGTHS, bound, packing=packing, multiple_of=multiple_of)
    assert sorted(i for rows in parts for row in rows for i in row) == [*samples]
    assert len(parts) % multiple_of == 0  # 12 samples are a multiple of each
    for rows in parts:
        assert all(rows)
        alone = sum(map(len, rows)) == 1
        assert padded(rows) <= bound or alone
        assert packing or all(len(row) == 1 for row in rows)
    for other in ([*samples][::-1], [5, 3, 0, 1, 11, 2, 10, 4, 6, 9, 8, 7]):
        assert split_by_tokens(other, LENGTHS, bound, packing=packing, multiple_of=multiple_of) == parts


def test_rows_are_sorted_by_length_or_filled_by_first_fit_decreasing():
    assert split_by_tokens(range(6), [5, 1, 9, 5, 1, 3], 10) == [[(2,)], [(0,), (3,)], [(5,), (1,), (4,)]]
    packed = split_by_tokens(range(6), [5, 1, 9, 5, 1, 3], 10, packing=True)
    assert packed == [[(2, 1)], [(0,), (3,)], [(5,), (4,)]]
    assert split_by_tokens(range(6), [5, 1, 9, 5, 1, 3], 24, packing=True) == [[(2, 5), (0, 3, 1, 4)]]


def test_processes_get_as_many_micro_batches_as_samples_allow():
    assert split_by_tokens([0, 1], [4, 4], 100, multiple_of=2) == [[(0,)], [(1,)]]
    assert split_by_tokens([0, 1], [4, 4], 100, packing=True, multiple_of=2) == [[(0,)], [(1,)]]
    # Three single samples cannot be two or four.
    assert len(split_by_tokens([0, 1, 2], [9, 9, 9], 1, multiple_of=2)) == 3


def test_packing_leaves_little_room():
    gen = torch.Generator().manual_seed(0)
    lengths = (180 * torch.randn(512, generator=gen).mul(0.9).exp()).clamp(8, 2048).int().tolist()
    total = sum(lengths)
    packed = split_by_tokens(range(512), lengths, 4096, packing=True)
    by_length = split_by_tokens(range(512), lengths, 4096)
    assert sum(padded(rows, lengths) for rows in packed) < 1.03 * total
    assert sum(padded(rows, lengths) for rows in by_length) < 1.15 * total
    assert len(packed) <= 1.06 * total / 4096 + 1
