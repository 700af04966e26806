"""Which samples make up batch i: pure functions of (seed, i), so resuming needs no loader state."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def batch_indices(groups: Sequence[str], size: int, seed: int, i: int) -> list[int]:
    """Sample indices of batch i, at most one per group (group = scan: its reconstructions share one report and would be false negatives).

    Every epoch visits each group once, in a new order, with one member drawn at random; the ragged tail is dropped.

    Args:
        groups: group of every sample, e.g. `scan_of(name)`.
    Raises:
        ValueError: fewer groups than `size`.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    per = len(members) // size
    if not per:
        raise ValueError(f"batch_indices: a batch of {size} needs as many different scans, found {len(members)}; lower the batch size")
    epoch, at = divmod(i, per)
    gen = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(members), generator=gen)
    pick = torch.rand(len(members), generator=gen)
    every = list(members.values())
    return [every[g][int(pick[g] * len(every[g]))] for g in order[at * size : (at + 1) * size].tolist()]


def prefetch(batch_at: Callable[[int], Any], start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(i, batch_at(i)) for i from start to stop, the next batch made in a thread while the caller computes."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch_at, start) if start < stop else None
        for i in range(start, stop):
            assert ahead is not None
            batch = ahead.result()
            ahead = pool.submit(batch_at, i + 1) if i + 1 < stop else None
            yield i, batch
