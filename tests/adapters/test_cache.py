"""Adapters within a budget: the same bits as from a plain list, the least recently used out first, nothing that grows."""

import gc
import itertools
import random
import statistics
import threading
import tracemalloc
import weakref

import pytest
import torch
from attrs import evolve

from medvl.adapters.cache import (
    adapter_nbytes,
    cache_adapters,
    cache_fusions,
    cache_pool,
    group_rows,
    mix_adapters,
)
from medvl.adapters.retrieve import RetrieveConfig, Retrieved, retrieve_adapters
from medvl.hub.peft_files import read_adapter, write_adapter
from medvl.weights import lora
from medvl.weights.compose import compose_adapters, stack_adapters
from tests import tiny


def dense_weights(retrieved, p):
    """Weights [b, p] over a pool of p adapters, 0 where a row does not use one."""
    dense = retrieved.weights.new_zeros(len(retrieved.weights), p)
    return dense.scatter_add(1, retrieved.indices.clamp(min=0), retrieved.weights)


SIZES = {"up": (24, 16), "down": (16, 24)}  # out, in


def make(i, rank=2, sizes=SIZES):
    """Adapter i, the same each time."""
    gen = torch.Generator().manual_seed(1000 + i)
    factors = {
        m: {"a": torch.randn(rank, n, generator=gen), "b": torch.randn(o, rank, generator=gen)}
        for m, (o, n) in sizes.items()
    }
    return lora.Adapter(
        factors=factors,
        scale=dict.fromkeys(sizes, 0.5 + i),
        kinds=dict.fromkeys(sizes, "linear"),
        name=f"a{i}",
    )


ONE = 2 * (16 + 24) * 4 * 2  # bytes of make(i)


def watched(alive, fetched=None):
    """`make` that tells what it made and what of it still lives."""

    def fetch(i):
        adapter = make(i)
        alive.add(adapter)
        if fetched is not None:
            fetched.append(i)
        return adapter

    return fetch


def same(one, other):
    assert one.factors.keys() == other.factors.keys()
    assert (one.kinds, one.scale, one.name) == (other.kinds, other.scale, other.name)
    assert all(torch.equal(t, other.factors[m][k]) for m, f in one.factors.items() for k, t in f.items())
    assert one.gate.keys() == other.gate.keys()
    assert all(torch.equal(g, other.gate[m]) for m, g in one.gate.items())


def found(indices, weights):
    indices, weights = torch.tensor(indices), torch.tensor(weights)
    return Retrieved(indices=indices, similarity=weights, weights=weights, abstained=(indices < 0).all(1))


# What is held ---------------------------------------------------------------------------------------------------------------------------
def test_nbytes_counts_all_and_what_is_shared_once():
    adapter = make(0)
    assert adapter_nbytes(adapter) == ONE
    gate = torch.ones(3, 2)
    assert adapter_nbytes(evolve(adapter, gate=dict.fromkeys(SIZES, gate))) == ONE + 24
    assert (
        adapter_nbytes(evolve(adapter, full={"head.weight": torch.zeros(5, dtype=torch.float64)})) == ONE + 40
    )
    assert adapter_nbytes(lora.move_adapter(adapter, dtype=torch.bfloat16)) == ONE // 2
    pool = stack_adapters([make(0), make(1)])
    assert (
        adapter_nbytes(compose_adapters(pool, [[0.2, 0.8]] * 3)) == 2 * ONE + 3 * 4 * 4
    )  # both modules have one gate [3, 4]


def test_the_least_recently_used_goes_first():
    alive, fetched = weakref.WeakSet(), []
    get = cache_adapters(watched(alive, fetched), 3 * ONE)
    names = lambda: sorted(a.name for a in alive)
    assert [a.name for a in get([2, 0, 2, 1])] == ["a2", "a0", "a2", "a1"]
    assert fetched == [2, 0, 1]
    get([2])  # now 0 is the oldest
    get([3])
    assert names() == ["a1", "a2", "a3"]
    get([1, 4])  # 2 is older than 1, which this call asks for
    assert names() == ["a1", "a3", "a4"]
    get([5, 3])  # 3 is the oldest but asked for: 1 goes, though it comes after in the order of use
    assert names() == ["a3", "a4", "a5"]
    assert fetched == [2, 0, 1, 3, 4, 5]
    get([6, 7])  # 4, then 3: what a call finds there is older than what it fetches
    assert names() == ["a5", "a6", "a7"]
    get([])
    assert fetched == [2, 0, 1, 3, 4, 5, 6, 7]


def test_sizes_count_not_numbers():
    alive = weakref.WeakSet()

    def fetch(i):
        adapter = make(i, rank=4 if i == 9 else 2)
        alive.add(adapter)
        return adapter

    get = cache_adapters(fetch, 4 * ONE)
    get([0, 1, 2, 3])
    get([9])  # as large as two
    assert sorted(a.name for a in alive) == ["a2", "a3", "a9"]
    get([4])
    assert sum(map(adapter_nbytes, alive)) == 4 * ONE


def test_what_a_caller_holds_stays_after_it_was_let_go():
    get = cache_adapters(make, ONE)
    mine = get([0])[0]
    get([1])
    same(mine, make(0))
    assert get([0])[0] is not mine


def test_levels_from_files_to_another_precision(tmp_path):
    folders = []
    for i in range(4):
        write_adapter(make(i), tmp_path / f"a{i}")
        folders.append(tmp_path / f"a{i}")
    read = []

    def fetch(i):
        read.append(i)
        return read_adapter(folders[i])

    host = cache_adapters(fetch, 4 * ONE)
    near = cache_adapters(lambda i: lora.move_adapter(host([i])[0], dtype=torch.bfloat16), ONE)  # two of them
    for ids in ([0, 1], [2, 3], [0, 1], [3, 1]):
        for i, adapter in zip(ids, near(ids), strict=True):
            assert torch.equal(adapter.factors["up"]["a"], make(i).factors["up"]["a"].bfloat16())
    assert read == [0, 1, 2, 3]


# The same as a plain list ---------------------------------------------------------------------------------------------------------------
def test_a_mixture_has_the_bits_of_composing_a_plain_list(gen):
    skeleton, params = tiny.model("qwen2")
    cfg = lora.LoraConfig(rank=4, pattern="all-linear")
    adapters = [lora.init_lora(cfg, skeleton, gen) for _ in range(6)]
    for f in (f for a in adapters for f in a.factors.values()):
        f["b"].normal_(std=0.3, generator=gen)
    pool = cache_pool(cache_adapters(adapters.__getitem__, 4 * adapter_nbytes(adapters[0])))
    ids = torch.randint(3, 140, (2, 9), generator=gen)
    vectors = torch.randn(6, 5, generator=gen)
    logits = lambda adapter: skeleton(lora.apply_lora(params, adapter), input_ids=ids).logits
    with torch.no_grad():
        for _ in range(3):
            got = retrieve_adapters(
                RetrieveConfig(k=2, weighting="softmax"), torch.randn(2, 5, generator=gen), vectors
            )
            some = got.indices.unique().tolist()
            mixed = mix_adapters(pool, got)
            want = compose_adapters([adapters[i] for i in some], dense_weights(got, 6)[:, some])
            assert all(torch.equal(g, want.gate[m]) for m, g in mixed.gate.items())
            assert torch.equal(logits(mixed), logits(want))
            whole = logits(compose_adapters(adapters, dense_weights(got, 6)))
            torch.testing.assert_close(logits(mixed), whole, rtol=0, atol=1e-5)
            assert (whole - skeleton(params, input_ids=ids).logits).abs().max() > 0.01


def test_rows_that_abstained_have_no_adapter():
    pool = cache_pool(cache_adapters(make, 4 * ONE))
    some = mix_adapters(pool, found([[3, 1], [-1, -1]], [[0.75, 0.25], [0.0, 0.0]]))
    same(some, compose_adapters([make(1), make(3)], [[0.25, 0.75], [0.0, 0.0]]))
    assert mix_adapters(pool, found([[-1, -1]], [[0.0, 0.0]])) is None
    assert mix_adapters(pool, found([[], []], [[], []])) is None


def test_rows_of_one_choice_are_one_group():
    got = found(
        [[3, 1], [-1, -1], [1, 3], [3, 1], [3, -1], [-1, -1]],
        [[0.75, 0.25], [0, 0], [0.25, 0.75], [0.25, 0.75], [1, 0], [0, 0]],
    )
    want = [([0, 2], [1, 3], [0.25, 0.75]), ([1, 5], [], []), ([3], [1, 3], [0.75, 0.25]), ([4], [3], [1.0])]
    assert group_rows(got) == want
    assert group_rows(found([[], []], [[], []])) == [([0, 1], [], [])]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rank": 1},
        {"rule": "cat"},
        {"rule": "ties", "density": 0.5, "majority_sign": "frequency"},
        {"rule": "average"},
    ],
)
def test_a_fusion_has_the_bits_of_composing_a_plain_list(how):
    fuse = cache_fusions(cache_pool(cache_adapters(make, 4 * ONE)), 10 * ONE, **how)
    want = compose_adapters([make(1), make(3)], [0.25, 0.75], mode="fusion", **({"rule": "svd"} | how))
    got = fuse([3, 1], [0.75, 0.25])
    same(got, want)
    assert fuse((1, 3), torch.tensor([0.25, 0.75])) is got
    assert fuse([1, 3], [0.75, 0.25]) is not got


def test_a_fusion_that_draws_is_the_same_whenever_it_is_made():
    pool = cache_pool(cache_adapters(make, 4 * ONE))
    how = {"rule": "dare_linear", "density": 0.5, "seed": 7}
    one, other = cache_fusions(pool, ONE, **how), cache_fusions(pool, ONE, **how)
    one([0, 2], [0.5, 0.5])
    same(one([1, 3], [0.5, 0.5]), other([1, 3], [0.5, 0.5]))
    same(one([0, 2], [0.5, 0.5]), other([0, 2], [0.5, 0.5]))
    changed = cache_fusions(pool, ONE, **how | {"seed": 8})([0, 2], [0.5, 0.5])
    assert not torch.equal(changed.factors["up"]["a"], one([0, 2], [0.5, 0.5]).factors["up"]["a"])


def test_fused_adapters_have_a_budget_of_their_own():
    made = []
    stack = cache_pool(cache_adapters(make, 4 * ONE))

    def pool(ids):
        made.append(tuple(ids))
        return stack(ids)

    fuse = cache_fusions(pool, 2 * ONE)  # of rank 2: as large as the adapters
    for ids in ([0, 1], [1, 2], [0, 1], [2, 3], [0, 1], [1, 2]):
        fuse(ids, [0.5, 0.5])
    assert made == [(0, 1), (1, 2), (2, 3), (1, 2)]


def test_a_batch_with_the_last_adapters_copies_nothing():
    alive, fetched = weakref.WeakSet(), []
    pool = cache_pool(cache_adapters(watched(alive, fetched), 2 * ONE))
    first = mix_adapters(pool, found([[0, 1]], [[0.5, 0.5]]))
    again = mix_adapters(pool, found([[1, 0], [0, 1]], [[0.75, 0.25], [1.0, 0.0]]))
    assert all(again.factors[m][k] is t for m, f in first.factors.items() for k, t in f.items())
    held = weakref.ref(first.factors["up"]["a"])
    del first, again
    gc.collect()
    assert held() is not None
    pool([0, 2])
    assert held() is None
    assert fetched == [0, 1, 2]


def test_a_stack_carries_no_gradient():
    grown = make(0)
    grown.factors["up"]["a"].requires_grad_()
    pool = cache_pool(lambda ids: [grown])
    assert not mix_adapters(pool, found([[0]], [[1.0]])).factors["up"]["a"].requires_grad
    assert (
        not cache_fusions(lambda ids: stack_adapters([grown]), ONE)([0], [0.5])
        .factors["up"]["a"]
        .requires_grad
    )


# Long runs ------------------------------------------------------------------------------------------------------------------------------
def test_nothing_grows_over_two_thousand_requests():
    alive, most, traced = weakref.WeakSet(), 0, []
    get = cache_adapters(watched(alive), 5 * ONE)
    pool = cache_pool(get)
    fuse = cache_fusions(pool, 4 * ONE, rule="cat", rank=None)
    draw = random.Random(0)
    tracemalloc.start()
    try:
        for request in range(2000):
            ids = draw.sample(range(40), 3)
            weights = [draw.random() for _ in ids]
            mix_adapters(pool, found([ids], [weights]))
            if request % 4 == 0:
                fuse(ids[:2], weights[:2])
            most = max(most, sum(map(adapter_nbytes, alive)))
            if request % 250 == 249:
                gc.collect()
                traced.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert most == 5 * ONE
    # What is kept per request grows in every quarter of a thousand; what Python itself keeps (caches, tables that double) in a few of them.
    assert statistics.median(after - before for before, after in itertools.pairwise(traced)) < 250 * 16
    tensors = sum(type(t) is torch.Tensor for t in gc.get_objects())
    for _ in range(50):
        mix_adapters(pool, found([draw.sample(range(40), 3)], [[0.5, 0.3, 0.2]]))
    gc.collect()
    assert sum(type(t) is torch.Tensor for t in gc.get_objects()) <= tensors + 10


def test_threads_share_one():
    alive, fetched, wrong, busy = weakref.WeakSet(), [], [], threading.Lock()
    inner = watched(alive, fetched)

    def fetch(i):
        if not busy.acquire(blocking=False):
            wrong.append(f"{i} is fetched while another is")
            return inner(i)
        made = inner(i)
        busy.release()
        return made

    get = cache_adapters(fetch, 4 * ONE)
    pool = cache_pool(get)
    fuse = cache_fusions(pool, 3 * ONE, rule="cat")

    def work(seed):
        draw = random.Random(seed)
        for _ in range(150):
            ids = sorted(draw.sample(range(12), 3))
            want = compose_adapters([make(i) for i in ids], [[0.5, 0.25, 0.25]])
            try:
                same(mix_adapters(pool, found([ids], [[0.5, 0.25, 0.25]])), want)
                same(
                    fuse(ids[:2], [0.5, 0.5]),
                    compose_adapters([make(i) for i in ids[:2]], [0.5, 0.5], mode="fusion"),
                )
                assert [a.name for a in get(ids)] == [f"a{i}" for i in ids]
            except Exception as e:
                wrong.append(repr(e))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert sum(map(adapter_nbytes, alive)) <= 4 * ONE


# Errors ---------------------------------------------------------------------------------------------------------------------------------
def test_a_call_above_the_budget_says_what_it_needs():
    alive, before = weakref.WeakSet(), []
    inner = watched(alive)
    get = cache_adapters(lambda i: (before.append(sum(map(adapter_nbytes, alive))), inner(i))[1], 2 * ONE)
    get([7, 8])
    text = rf"cache_adapters: adapter 7, adapter 1, adapter 2, adapter 3 must fit together: need {4 * ONE:,} bytes, the budget is {2 * ONE:,}; "
    with pytest.raises(ValueError, match=text + rf"set budget to {4 * ONE:,} or more"):
        get([7, 1, 2, 3])
    assert max(before) == 2 * ONE  # one at a time beside what is held
    gc.collect()
    assert sum(map(adapter_nbytes, alive)) <= 2 * ONE
    assert [a.name for a in get([1, 2])] == ["a1", "a2"]
    assert [a.name for a in cache_adapters(make, 4 * ONE)([7, 1, 2, 3])] == ["a7", "a1", "a2", "a3"]
    fuse = cache_fusions(cache_pool(get), ONE, rule="cat")
    with pytest.raises(
        ValueError,
        match=rf"cache_fusions: the fusion of adapters \[0, 4\] must fit together: need {2 * ONE:,} bytes",
    ):
        fuse([4, 0], [0.5, 0.5])


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_number_of_bytes(budget):
    with pytest.raises(ValueError, match="cache_adapters: budget must be a positive number of bytes, got"):
        cache_adapters(make, budget)
    with pytest.raises(ValueError, match="cache_fusions: budget must be a positive number of bytes, got"):
        cache_fusions(cache_pool(cache_adapters(make, ONE)), budget)


def test_errors():
    get = cache_adapters(make, 4 * ONE)
    with pytest.raises(
        ValueError,
        match=r"cache_adapters: ids must be >= 0, got \[3, -1\]; -1 marks an empty place of `Retrieved`",
    ):
        get(torch.tensor([3, -1]))
    fuse = cache_fusions(cache_pool(get), 4 * ONE)
    with pytest.raises(
        ValueError,
        match="cache_fusions: needs ids and a weight for each, got 0 and 0; without ids run the bare model",
    ):
        fuse([], [])
    with pytest.raises(ValueError, match="cache_fusions: needs ids and a weight for each, got 2 and 1"):
        fuse([0, 1], [1.0])
    with pytest.raises(ValueError, match="weights must be finite"):
        fuse([0, 1], [1.0, float("nan")])
    with pytest.raises(ValueError, match="'svdd'"):
        cache_fusions(cache_pool(get), ONE, rule="svdd")([0, 1], [0.5, 0.5])
    with pytest.raises(ValueError, match="needs density"):
        cache_fusions(cache_pool(get), ONE, rule="ties")([0, 1], [0.5, 0.5])


def test_what_fetching_raises_is_raised_and_what_was_there_stays():
    fetched = []

    def fetch(i):
        fetched.append(i)
        if i == 5:
            raise ValueError("adapter 5 is broken")
        return make(i)

    get = cache_adapters(fetch, 3 * ONE)
    get([0, 1])
    for _ in range(2):
        with pytest.raises(ValueError, match="adapter 5 is broken"):
            get([5])
    get([0, 1])
    assert fetched == [0, 1, 5, 5]
