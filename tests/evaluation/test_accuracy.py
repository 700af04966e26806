import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from medvl.evaluation.accuracy import (
    Accuracy,
    Difference,
    accuracy,
    accuracy_by_category,
    episode_accuracy,
    paired_difference,
    to_results,
)


def _rows(gen, k=12, most=4, share=0.6):
    """(right, groups): k groups of 1 to `most` rows, interleaved."""
    sizes = torch.randint(1, most + 1, (k,), generator=gen)
    groups = np.repeat([f"case {i}" for i in range(k)], sizes.numpy())
    order = torch.randperm(len(groups), generator=gen).numpy()
    return (torch.rand(len(groups), generator=gen) < share).numpy(), groups[order].tolist()


def _seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def _naive(values, groups, n, gen):
    """Bounds by drawing groups one by one, from the groups sorted by (rows, sum)."""
    held = {}
    for v, g in zip(values, groups, strict=True):
        held.setdefault(g, []).append(int(v))
    held = sorted(held.values(), key=lambda rows: (len(rows), sum(rows)))
    drawn = []
    for start in range(0, n, 64):  # as many at once as metrics.bootstrap draws
        for draw in torch.randint(len(held), (min(64, n - start), len(held)), generator=gen).tolist():
            drawn.append(np.mean([v for i in draw for v in held[i]]))
    return np.quantile(drawn, [0.025, 0.975])


def test_accuracy_is_the_naive_loop(gen):
    right, groups = _rows(gen)
    got = accuracy(right, groups, n=200, gen=_seeded())
    low, high = _naive(right, groups, 200, _seeded())
    assert got == Accuracy(
        value=pytest.approx(right.mean()),
        low=pytest.approx(low),
        high=pytest.approx(high),
        n=len(right),
        groups=len(set(groups)),
    )
    assert got.low < got.value < got.high
    for same in (right.tolist(), torch.tensor(right), right.astype(float)):
        assert accuracy(same, groups, n=200, gen=_seeded()) == got


def test_order_and_names_of_groups_do_not_matter(gen):
    right, groups = _rows(gen)
    other, _ = _rows(gen, k=40)
    other = other[: len(right)]
    order = torch.randperm(len(right), generator=gen).tolist()
    moved = [f"other {groups[i]}" for i in order]
    for f in (accuracy, episode_accuracy):
        assert f(right, groups, gen=_seeded()) == f(right[order], moved, gen=_seeded())
    assert paired_difference(right, other, groups, gen=_seeded()) == paired_difference(
        right[order], other[order], moved, gen=_seeded()
    )


def test_an_episode_is_right_when_all_its_rows_are(gen):
    right, groups = _rows(gen, most=3, share=0.8)
    whole = {g: all(r for r, h in zip(right, groups, strict=True) if h == g) for g in groups}
    got = episode_accuracy(right, groups, gen=_seeded())
    assert 0 < got.value < accuracy(right, groups, gen=_seeded()).value
    assert got == accuracy(list(whole.values()), range(len(whole)), gen=_seeded())
    assert got.n == got.groups == len(whole)
    assert episode_accuracy(right, range(len(right)), gen=_seeded()) == accuracy(
        right, range(len(right)), gen=_seeded()
    )


def test_intervals_cover(gen):
    """Rows of a group that agree: intervals that draw groups hold the truth as often as they say, those that draw rows do not."""
    held = {"groups": 0, "rows": 0}
    for _ in range(150):
        right = np.repeat((torch.rand(60, generator=gen) < 0.6).numpy(), 5)
        for name, groups in (("groups", np.repeat(np.arange(60), 5)), ("rows", np.arange(300))):
            got = accuracy(right, groups, n=200, gen=gen)
            held[name] += got.low <= 0.6 <= got.high
    assert 0.88 <= held["groups"] / 150 <= 0.99
    assert held["rows"] / 150 < 0.75


def test_one_row_per_group_is_mcnemar():
    for b, c in ((0, 0), (1, 0), (0, 5), (3, 9), (12, 12), (40, 17), (300, 210)):
        a_right = [True] * b + [False] * c + [True] * 7 + [False] * 4
        b_right = [False] * b + [True] * c + [True] * 7 + [False] * 4
        got = paired_difference(a_right, b_right, range(len(a_right)), n=50, gen=_seeded())
        want = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
        assert got.p == pytest.approx(want, rel=1e-9)
        assert got.difference == pytest.approx((b - c) / len(a_right))
        mirrored = paired_difference(b_right, a_right, range(len(a_right)), n=50, gen=_seeded())
        assert (mirrored.difference, mirrored.p) == (-got.difference, got.p)


def test_paired_by_group_is_every_flip(gen):
    """All 2^k ways in which a and b can change places in whole groups."""
    ps = []
    for _ in range(8):
        a, groups = _rows(gen, k=9, most=5)
        b = (torch.rand(len(a), generator=gen) < 0.35).numpy()
        sums = [
            sum(int(x) - int(y) for x, y, h in zip(a, b, groups, strict=True) if h == g)
            for g in sorted(set(groups))
        ]
        flips = [
            abs(sum(s * d for s, d in zip(signs, sums, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(sums))
        ]
        got = paired_difference(a, b, groups, n=300, gen=_seeded())
        ps.append(got.p)
        assert got.p == pytest.approx(np.mean([f >= abs(sum(sums)) for f in flips]), abs=1e-12)
        low, high = _naive(a.astype(int) - b.astype(int), groups, 300, _seeded())
        assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
        assert got.difference == pytest.approx(a.mean() - b.mean())
        assert (got.n, got.groups) == (len(a), 9)
    assert min(ps) < 0.1 < max(ps)


def test_p_is_fair_where_rows_of_a_group_agree(gen):
    """With no difference p < .1 comes as often as it says, while rows taken for groups call it far more often."""
    small = {"groups": 0, "rows": 0}
    for _ in range(300):
        a, b = (np.repeat((torch.rand(40, generator=gen) < 0.5).numpy(), 4) for _ in range(2))
        for name, groups in (("groups", np.repeat(np.arange(40), 4)), ("rows", np.arange(160))):
            small[name] += paired_difference(a, b, groups, n=1, gen=gen).p < 0.1
    assert small["groups"] / 300 < 0.13
    assert small["rows"] / 300 > 0.25


def test_many_groups_stay_quick_and_exact():
    d = np.repeat([1, 0, 0], 3000)
    got = paired_difference(d, 1 - d, np.arange(9000), n=2, gen=_seeded())
    assert got.p == pytest.approx(binomtest(3000, 9000, 0.5).pvalue, rel=1e-9)
    assert 0 < got.p < 1e-200


def test_one_group_has_no_interval():
    got = accuracy([True, False, True], ["a"] * 3, gen=_seeded())
    assert (got.value, got.n, got.groups) == (pytest.approx(2 / 3), 3, 1)
    assert math.isnan(got.low)
    assert math.isnan(got.high)
    assert math.isnan(episode_accuracy([True, True], "aa", gen=_seeded()).low)
    pair = paired_difference([True, True], [False, True], "aa", gen=_seeded())
    assert (pair.difference, pair.p) == (0.5, 1.0)
    assert math.isnan(pair.low)


def test_categories_stand_alone(gen):
    right, groups = _rows(gen, k=30)
    kinds = [("CT", "MR", "US")[int(g.split()[1]) % 3] for g in groups]
    got = accuracy_by_category(right, kinds, groups, gen=_seeded())
    assert list(got) == ["CT", "MR", "US"]
    assert sum(r.n for r in got.values()) == len(right)
    for kind, record in got.items():
        rows = [i for i, k in enumerate(kinds) if k == kind]
        alone = accuracy_by_category(
            right[rows], [kind] * len(rows), [groups[i] for i in rows], gen=_seeded()
        )
        assert alone == {kind: record}
        assert record.value == pytest.approx(right[rows].mean())
        assert record.low < record.value < record.high
    assert accuracy_by_category(right, kinds, groups, gen=_seeded(2)) != got
    order = torch.randperm(len(right), generator=gen).tolist()
    assert (
        accuracy_by_category(
            right[order], [kinds[i] for i in order], [groups[i] for i in order], gen=_seeded()
        )
        == got
    )


def test_a_category_of_one_group_does_not_stop_the_table():
    got = accuracy_by_category(
        [True, False, True, True], ["CT", "CT", "OCT", "OCT"], torch.tensor([0, 1, 2, 2]), gen=_seeded()
    )
    assert (got["OCT"].value, got["OCT"].n, got["OCT"].groups) == (1.0, 2, 1)
    assert math.isnan(got["OCT"].low)
    assert not math.isnan(got["CT"].low)


def test_results():
    right, groups = [True, False, True, True], [0, 0, 1, 2]
    records = {"all": accuracy(right, groups, gen=_seeded())} | accuracy_by_category(
        right, ["CT", "CT", "MR", "MR"], groups, gen=_seeded()
    )
    rows = to_results(records, split="test", experiment="tune-1")
    assert [(r.what, r.subject, r.split, r.n, r.experiment) for r in rows] == [
        ("accuracy", s, "test", n, "tune-1") for s, n in (("all", 4), ("CT", 2), ("MR", 2))
    ]
    assert [(r.value, r.extra) for r in rows] == [
        (0.75, {"groups": 3}),
        (0.5, {"groups": 1}),
        (1.0, {"groups": 2}),
    ]
    assert (rows[0].low, rows[0].high) == (records["all"].low, records["all"].high)
    pair = paired_difference(right, [False] * 4, groups, gen=_seeded())
    (row,) = to_results({"mixture - base": pair}, split="test")
    assert (row.what, row.value, row.low, row.extra) == (
        "accuracy_difference",
        0.75,
        pair.low,
        {"groups": 3, "p": pair.p},
    )
    assert isinstance(pair, Difference)
    assert pair.p == 0.25
    assert to_results({"a": pair}, split="test", metric="gain")[0].what == "gain"


def test_errors():
    def f(right, groups, n=10):
        return accuracy(right, groups, n=n, gen=_seeded())

    for right, groups in (([], []), ([True], ["a", "b"]), ([[True]], ["a"])):
        for g in (
            f,
            lambda r, h: episode_accuracy(r, h, gen=_seeded()),
            lambda r, h: accuracy_by_category(r, h, h, gen=_seeded()),
        ):
            with pytest.raises(
                ValueError, match="must have one or more rows and a group for each, got right"
            ):
                g(right, groups)
    for right, found in (
        ([0.5, 1.0], r"0\.5, 1\.0"),
        ([True, None], "None, True"),
        (["yes", "no"], "no, yes"),
        ([1.0, math.nan], "nan"),
    ):
        with pytest.raises(
            ValueError, match=rf"accuracy: every row must be right \(true\) or wrong \(false\), got .*{found}"
        ):
            f(right, ["a", "b"])
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        f([True, False], ["a", "b"], 0)
    with pytest.raises(ValueError, match=r"paired_difference: must have .* got right \[1\] and 2 groups"):
        paired_difference([True, True], [True], ["a", "b"], gen=_seeded())
    with pytest.raises(
        ValueError, match="accuracy_by_category: each of 3 rows must have a category, got 2 categories"
    ):
        accuracy_by_category([True] * 3, ["CT"] * 2, range(3), gen=_seeded())
    with pytest.raises(
        ValueError,
        match="accuracy_by_category: each of 3 rows must have a category, got 2 without; leave such rows out",
    ):
        accuracy_by_category([True] * 3, ["CT", "", None], range(3), gen=_seeded())
