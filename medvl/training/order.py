"""Which samples make up batch i: pure functions of (seed, i), so resuming needs no loader state."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch


def batch_indices(
    groups: Sequence[str], size: int, seed: int, *, rank: int = 0, world: int = 1
) -> Callable[[int], list[int]]:
    """i -> sample indices of a process's share of batch i, a pure function of (seed, i).

    A batch has at most one sample per group (group = scan: its reconstructions share one report and would be false negatives). Every epoch
    visits each group once, in a new order, with one member drawn at random; the ragged tail is dropped.

    Args:
        groups: group of every sample, e.g. `scan_of(name)`.
        size: of the batch, over all `world` processes.
    Raises:
        ValueError: fewer groups than `size`, or a batch smaller than the number of processes.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    every, per = list(members.values()), len(members) // size
    if not per:
        raise ValueError(
            f"batches: a batch of {size} needs as many different groups (scans), found {len(members)}; lower the batch size"
        )
    if size < world:
        raise ValueError(
            f"batches: a batch must hold a sample for each process, got {size} for {world} processes; raise the batch size"
        )

    @lru_cache(2)  # prefetching may be an epoch ahead
    def drawn(epoch: int) -> tuple[list[int], list[float]]:
        gen = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(every), generator=gen)
        return order.tolist(), torch.rand(len(every), generator=gen).tolist()

    def at(i: int) -> list[int]:
        epoch, k = divmod(i, per)
        order, pick = drawn(epoch)
        mine = order[k * size + rank * size // world : k * size + (rank + 1) * size // world]
        return [every[g][int(pick[g] * len(every[g]))] for g in mine]

    return at


def derangement(items: Iterable[str], seed: int) -> dict[str, str]:
    """{item: another of the items}: each is given once, and none to itself. For controls that show a sample what belongs to another.

    The items follow each other around a circle, in an order drawn by the seed.
    Raises:
        ValueError: fewer than two different items.
    """
    names = sorted({*items})
    if len(names) < 2:
        raise ValueError(f"derangement: needs two different items or more, got {len(names)}")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    following = order[1:] + order[:1]
    return {names[i]: names[other] for i, other in zip(order, following, strict=True)}


def prefetch(batch_at: Callable[[int], Any], start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(i, batch_at(i)) for i from start to stop, the next batch made in a thread while the caller computes."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch_at, start) if start < stop else None
        for i in range(start, stop):
            assert ahead is not None
            batch = ahead.result()
            ahead = pool.submit(batch_at, i + 1) if i + 1 < stop else None
            yield i, batch
