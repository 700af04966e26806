"""Adapters in memory within a budget of bytes, and the adapters of a batch: a mixture or fusions."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from math import isfinite
from operator import index
from threading import Lock
from typing import Literal, TypeVar

import torch
from torch import Tensor

from medvl.adapters import retrieve
from medvl.weights import compose, lazy
from medvl.weights.compose import Pool, Rule
from medvl.weights.lora import Adapter

Get = Callable[[Sequence[int]], list[Adapter]]  # ids -> their adapters
Pools = Callable[[Sequence[int]], Pool]  # ids -> these adapters side by side
_Key = TypeVar("_Key", bound=Hashable)


def adapter_nbytes(adapter: Adapter) -> int:
    """Bytes of memory that an adapter holds, its gates and whole tensors among them; what tensors share
    counts once.
    """
    tensors = dict[str, Tensor]()
    for module, factors in adapter.factors.items():
        tensors |= {f"{module}/{name}": tensor for name, tensor in factors.items()}
    tensors |= {f"{module}/gate": tensor for module, tensor in adapter.gate.items()}
    tensors |= {f"{name}/full": tensor for name, tensor in adapter.full.items()}
    return lazy.nbytes(tensors)


def cache_adapters(fetch: Callable[[int], Adapter], budget: int) -> Get:
    """A function ids -> adapters that keeps what it fetched, up to `budget`, and lets the least recently used
    go first.

    Levels are functions of each other, as from disk to memory to a GPU:

        host = cache_adapters(lambda i: read_adapter(folders[i], skeleton), 64 * 10**9)
        near = cache_adapters(lambda i: lora.move_adapter(host([i])[0], "cuda"), 8 * 10**9)

    Threads may share it: one fetches at a time, so none fetches what another already did. An adapter that was
    let go lives on while a caller still uses it.

    Args:
        fetch: id -> adapter; an id always means the same one. What it raises is raised, and nothing of it is
            kept.
        budget: bytes. Held are at most these, and one adapter more while it is fetched: its size is not known
            before.
    Returns:
        ids (whole numbers >= 0, any may be there twice) -> a list of adapters in their order. Nothing that
        one call asks for is let go for the rest of it.
    Raises:
        ValueError: a budget that is not positive; when called, an id below 0, or ids that together are above
            the budget (says by how much; what had been held may be gone then).
    """
    cached = _cache_by_key(fetch, budget, "cache_adapters", lambda i: f"adapter {i}")

    def get(ids: Sequence[int]) -> list[Adapter]:
        # `index` takes integers of NumPy and torch too, and refuses a float, which would be another key.
        ids = [index(i) for i in ids]
        # Python would take -1 for the last adapter, and answer with it.
        if min(ids, default=0) < 0:
            raise ValueError(
                f"cache_adapters: ids must be >= 0, got {ids}; -1 marks an empty place of `Retrieved`, see "
                "retrieve.used_adapters"
            )
        return cached(ids)

    return get


def cache_pool(get: Get) -> Pools:
    """A function ids -> `stack_adapters(get(ids))` that keeps the last stack: a batch with the adapters of
    the one before copies nothing.

    A stack is a copy, so it takes memory beside the budget of `get`. No gradient reaches the adapters.
    Threads may share it.
    Raises:
        ValueError: when called, as `get` and `compose.stack_adapters`.
    """
    lock, last = Lock(), dict[tuple[int, ...], Pool]()

    def pool(ids: Sequence[int]) -> Pool:
        # In this order: the weights of a mixture belong to places in the stack.
        key = tuple(index(i) for i in ids)
        # Without no_grad a stack would keep the graph of the adapters it was copied from.
        with lock, torch.no_grad():
            if key not in last:
                last.clear()  # before the next one is made, not after
                last[key] = compose.stack_adapters(get(key))
            return last[key]

    return pool


def mix_adapters(pool: Pools, retrieved: retrieve.Retrieved) -> Adapter | None:
    """One adapter for the whole batch, exact: each row has its own weights over the n adapters that any row
    uses (a gate [b, R]).

    A row that abstained has weights 0 and gets the bare model's answer.
    Args:
        pool: from `cache_pool`.
    Returns:
        None where no row uses an adapter: run the bare model.
    Raises:
        ValueError: as `pool` and `compose.compose_adapters`.
    """
    ids, weights = retrieve.used_adapters(retrieved)
    if not len(ids):
        return None
    return compose.compose_adapters(pool(ids.tolist()), weights)


def group_rows(retrieved: retrieve.Retrieved) -> list[tuple[list[int], list[int], list[float]]]:
    """[(rows, ids, weights)]: the rows of a batch that have the same adapters with the same weights, by their
    first row.

    Ids are ascending, whatever their order by similarity. Rows that abstained are a group with no ids: run
    the bare model.
    """
    rows_of = dict[tuple[tuple[int, float], ...], list[int]]()
    indices = retrieved.indices.tolist()
    weights = retrieved.weights.tolist()
    for row, (row_ids, row_weights) in enumerate(zip(indices, weights, strict=True)):
        used = [(i, weight) for i, weight in zip(row_ids, row_weights, strict=True) if i >= 0]
        # Sorted by id: rows whose similarities put the same adapters in another order share a group.
        rows_of.setdefault(tuple(sorted(used)), []).append(row)
    return [(rows, [i for i, _ in used], [weight for _, weight in used]) for used, rows in rows_of.items()]


def cache_fusions(
    pool: Pools,
    budget: int,
    *,
    rule: Rule = "svd",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> Callable[[Sequence[int], Sequence[float]], Adapter]:
    """A function (ids, weights) -> their fusion that keeps what it made, up to `budget` bytes, as
    `cache_adapters` does.

    The next question of an episode, with the adapters and weights of the last, takes the same fused adapter:
    what `group_rows` gives is what this takes. The order of ids does not matter. No gradient is taken.

    Args:
        pool: from `cache_pool`.
        rule, rank, density, majority_sign: of `compose.compose_adapters`.
        seed: what rules with "dare" draw from, anew for each fusion, so that it does not matter when or in
            which order they are made.
    Raises:
        ValueError: a budget that is not positive; when called, no id, another number of weights, a fusion
            above the budget, and as `pool` and `compose.compose_adapters`.
    """

    @torch.no_grad()
    def make_fusion(key: tuple[tuple[int, float], ...]) -> Adapter:
        ids = [i for i, _ in key]
        weights = [weight for _, weight in key]
        gen = None
        if "dare" in rule:
            # A new generator each time: a fusion that was let go and is made again comes out the same.
            gen = torch.Generator().manual_seed(seed)
        return compose.compose_adapters(
            pool(ids),
            weights,
            mode="fusion",
            rule=rule,
            rank=rank,
            density=density,
            majority_sign=majority_sign,
            gen=gen,
        )

    def describe(key: tuple[tuple[int, float], ...]) -> str:
        return f"the fusion of adapters {[i for i, _ in key]}"

    cached = _cache_by_key(make_fusion, budget, "cache_fusions", describe)

    def fuse(ids: Sequence[int], weights: Sequence[float]) -> Adapter:
        if not len(ids) or len(ids) != len(weights):
            raise ValueError(
                f"cache_fusions: needs ids and a weight for each, got {len(ids)} and {len(weights)}; "
                "without ids run the bare model"
            )
        pairs = [(index(i), float(weight)) for i, weight in zip(ids, weights, strict=True)]
        return cached([tuple(sorted(pairs))])[0]

    return fuse


def _cache_by_key(
    make: Callable[[_Key], Adapter], budget: int, where: str, describe: Callable[[_Key], str]
) -> Callable[[Sequence[_Key]], list[Adapter]]:
    """A function keys -> adapters that stores what `make` returns, up to `budget` bytes.

    Args:
        where: what errors begin with.
        describe: what errors call the adapter of a key.
    """
    if not (isfinite(budget) and budget > 0):
        raise ValueError(f"{where}: budget must be a positive number of bytes, got {budget}")
    lock = Lock()
    stored = OrderedDict[_Key, tuple[Adapter, int]]()  # (adapter, its bytes), the least recently used first

    def add(key: _Key, requested: list[_Key]) -> None:
        adapter = make(key)
        size = adapter_nbytes(adapter)
        # What this call asks for must be in memory together, however much else is let go.
        needed = size + sum(stored[other][1] for other in requested if other in stored)
        if needed > budget:
            del adapter  # to say what all need, the others are made one by one
            for other in requested[requested.index(key) + 1 :]:
                if other not in stored:
                    needed += adapter_nbytes(make(other))
            raise ValueError(
                f"{where}: {', '.join(map(describe, requested))} must fit together: need {needed:,} bytes, "
                f"the budget is {budget:,}; set budget to {needed:,} or more, or ask for fewer at once"
            )
        # What was asked for is at the end and fits, so only what this call does not need is let go here.
        while size + sum(nbytes for _, nbytes in stored.values()) > budget:
            stored.popitem(last=False)
        stored[key] = adapter, size

    def get(keys: Sequence[_Key]) -> list[Adapter]:
        # Once each, in the order they were asked for.
        requested = list(dict.fromkeys(keys))
        # One lock around making, too: two threads that need one adapter read it once.
        with lock:
            for key in requested:
                if key in stored:
                    stored.move_to_end(key)  # all of them before anything is removed
            for key in requested:
                if key not in stored:
                    add(key, requested)
            return [stored[key][0] for key in keys]

    return get
