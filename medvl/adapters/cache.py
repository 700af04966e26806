"""Adapters held within a budget of bytes, least recently used out first; and from what a batch retrieved to adapters for it."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from math import isfinite
from operator import index
from threading import Lock
from typing import Literal, TypeVar

import torch

from medvl.adapters import retrieve
from medvl.weights import compose, lazy
from medvl.weights.compose import Pool, Rule
from medvl.weights.lora import Adapter

Get = Callable[[Sequence[int]], list[Adapter]]  # ids -> their adapters
Pools = Callable[[Sequence[int]], Pool]  # ids -> these adapters side by side
_Key = TypeVar("_Key", bound=Hashable)


def adapter_nbytes(adapter: Adapter) -> int:
    """Bytes of memory that an adapter holds, its gates and whole tensors among them; what tensors share counts once."""
    held = {f"{m}/{k}": t for m, f in adapter.factors.items() for k, t in f.items()}
    return lazy.nbytes(
        held
        | {f"{m}/gate": t for m, t in adapter.gate.items()}
        | {f"{n}/full": t for n, t in adapter.full.items()}
    )


def cache_adapters(fetch: Callable[[int], Adapter], budget: int) -> Get:
    """A function ids -> adapters that keeps what it fetched, up to `budget`, and lets the least recently used go first.

    Levels are functions of each other, as from disk to memory to a GPU:

        host = cache_adapters(lambda i: read_adapter(folders[i], skeleton), 64 * 10**9)
        near = cache_adapters(lambda i: lora.move_adapter(host([i])[0], "cuda"), 8 * 10**9)

    Threads may share it: one fetches at a time, so none fetches what another already did. An adapter that was let go lives on while a
    caller still uses it.

    Args:
        fetch: id -> adapter; an id always means the same one. What it raises is raised, and nothing of it is kept.
        budget: bytes. Held are at most these, and one adapter more while it is fetched: its size is not known before.
    Returns:
        ids (whole numbers >= 0, any may be there twice) -> a list of adapters in their order. Nothing that one call asks for is let go
        for the rest of it.
    Raises:
        ValueError: a budget that is not positive; when called, an id below 0, or ids that together are above the budget (says by how much;
            what had been held may be gone then).
    """
    held = _kept(fetch, budget, "cache_adapters", lambda i: f"adapter {i}")

    def get(ids: Sequence[int]) -> list[Adapter]:
        ids = [index(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(
                f"cache_adapters: ids must be >= 0, got {ids}; -1 marks an empty place of `Retrieved`, see retrieve.used_adapters"
            )
        return held(ids)

    return get


def cache_pool(get: Get) -> Pools:
    """A function ids -> `stack_adapters(get(ids))` that keeps the last stack: a batch with the adapters of the one before copies nothing.

    A stack is a copy, so it takes memory beside the budget of `get`. No gradient reaches the adapters. Threads may share it.
    Raises:
        ValueError: when called, as `get` and `compose.stack_adapters`.
    """
    lock, last = Lock(), dict[tuple[int, ...], Pool]()

    def pool(ids: Sequence[int]) -> Pool:
        key = tuple(index(i) for i in ids)
        with lock, torch.no_grad():
            if key not in last:
                last.clear()  # before the next one is made, not after
                last[key] = compose.stack_adapters(get(key))
            return last[key]

    return pool


def mix_adapters(pool: Pools, retrieved: retrieve.Retrieved) -> Adapter | None:
    """One adapter for the whole batch, exact: each row has its own weights over the n adapters that any row uses (a gate [b, R]).

    A row that abstained has weights 0 and gets the bare model's answer.
    Args:
        pool: from `cache_pool`.
    Returns:
        None where no row uses an adapter: run the bare model.
    Raises:
        ValueError: as `pool` and `compose.compose_adapters`.
    """
    ids, shares = retrieve.used_adapters(retrieved)
    return compose.compose_adapters(pool(ids.tolist()), shares) if len(ids) else None


def group_rows(retrieved: retrieve.Retrieved) -> list[tuple[list[int], list[int], list[float]]]:
    """[(rows, ids, weights)]: the rows of a batch that have the same adapters with the same weights, by their first row.

    Ids are ascending, whatever their order by similarity. Rows that abstained are a group with no ids: run the bare model.
    """
    found: dict[tuple[tuple[int, float], ...], list[int]] = {}
    for row, (ids, shares) in enumerate(
        zip(retrieved.indices.tolist(), retrieved.weights.tolist(), strict=True)
    ):
        own = tuple(sorted((i, w) for i, w in zip(ids, shares, strict=True) if i >= 0))
        found.setdefault(own, []).append(row)
    return [(rows, [i for i, _ in own], [w for _, w in own]) for own, rows in found.items()]


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
    """A function (ids, weights) -> their fusion that keeps what it made, up to `budget` bytes, as `cache_adapters` does.

    The next question of an episode, with the adapters and weights of the last, takes the same fused adapter: what `group_rows` gives is what
    this takes. The order of ids does not matter. No gradient is taken.

    Args:
        pool: from `cache_pool`.
        rule, rank, density, majority_sign: of `compose.compose_adapters`.
        seed: what rules with "dare" draw from, anew for each fusion, so that it does not matter when or in which order they are made.
    Raises:
        ValueError: a budget that is not positive; when called, no id, another number of weights, a fusion above the budget, and as `pool`
            and `compose.compose_adapters`.
    """

    @torch.no_grad()
    def make(key: tuple[tuple[int, float], ...]) -> Adapter:
        stack = pool([i for i, _ in key])
        gen = torch.Generator().manual_seed(seed) if "dare" in rule else None
        how = {"rule": rule, "rank": rank, "density": density, "majority_sign": majority_sign}
        return compose.compose_adapters(stack, [w for _, w in key], mode="fusion", gen=gen, **how)  # type: ignore[arg-type]

    held = _kept(make, budget, "cache_fusions", lambda key: f"the fusion of adapters {[i for i, _ in key]}")

    def fuse(ids: Sequence[int], shares: Sequence[float]) -> Adapter:
        if not len(ids) or len(ids) != len(shares):
            raise ValueError(
                f"cache_fusions: needs ids and a weight for each, got {len(ids)} and {len(shares)}; without ids run the bare model"
            )
        return held([tuple(sorted((index(i), float(w)) for i, w in zip(ids, shares, strict=True)))])[0]

    return fuse


def _kept(
    make: Callable[[_Key], Adapter], budget: int, who: str, name: Callable[[_Key], str]
) -> Callable[[Sequence[_Key]], list[Adapter]]:
    if not (isfinite(budget) and budget > 0):
        raise ValueError(f"{who}: budget must be a positive number of bytes, got {budget}")
    lock, held = Lock(), OrderedDict[_Key, tuple[Adapter, int]]()  # the least recently used first

    def put(key: _Key, wanted: list[_Key]) -> None:
        made = make(key)
        size = adapter_nbytes(made)
        need = size + sum(held[k][1] for k in wanted if k in held)
        if need > budget:
            del made  # to say what all need, the rest are looked at one by one
            need += sum(adapter_nbytes(make(k)) for k in wanted[wanted.index(key) + 1 :] if k not in held)
            raise ValueError(
                f"{who}: {', '.join(map(name, wanted))} must fit together: need {need:,} bytes, the budget is {budget:,}; "
                f"set budget to {need:,} or more, or ask for fewer at once"
            )
        while size + sum(s for _, s in held.values()) > budget:
            held.popitem(last=False)
        held[key] = made, size

    def get(keys: Sequence[_Key]) -> list[Adapter]:
        wanted = list(dict.fromkeys(keys))
        with lock:
            for key in wanted:
                if key in held:
                    held.move_to_end(key)  # all of them before anything is let go
            for key in wanted:
                if key not in held:
                    put(key, wanted)
            return [held[key][0] for key in keys]

    return get
