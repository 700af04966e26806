"""Which samples make up batch i: pure functions of (seed, i), so resuming needs no loader state."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

from medvl.base import transfer


def batch_indices(
    groups: Sequence[str], size: int, seed: int, *, rank: int = 0, world: int = 1
) -> Callable[[int], list[int]]:
    """i -> sample indices of a process's share of batch i, a pure function of (seed, i).

    A batch has at most one sample per group (group = scan: its reconstructions share one report and would
    be false negatives). Every epoch visits each group once, in a new order, with one member drawn at
    random; the ragged tail is dropped.

    Args:
        groups: group of every sample, e.g. `scan_of(name)`.
        size: of the batch, over all `world` processes.
    Raises:
        ValueError: fewer groups than `size`, or a batch smaller than the number of processes.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    samples = list(members.values())  # of each group
    batches_per_epoch = len(members) // size
    if not batches_per_epoch:
        raise ValueError(
            f"batches: a batch of {size} needs as many different samples (or groups of them, such as scans), found "
            f"{len(members)}; lower the batch size"
        )
    if size < world:
        raise ValueError(
            f"batches: a batch must hold a sample for each process, got {size} for {world} processes; raise "
            "the batch size"
        )

    @lru_cache(2)  # prefetching may be an epoch ahead
    def draw_epoch(epoch: int) -> tuple[list[int], list[float]]:
        # A prime far above any number of epochs: seed 1 at epoch 0 must not be seed 0 at epoch 1.
        gen = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(samples), generator=gen)
        # One draw per group and epoch, alike in all processes, says which member of the group is shown.
        return order.tolist(), torch.rand(len(samples), generator=gen).tolist()

    def indices_of(i: int) -> list[int]:
        epoch, k = divmod(i, batches_per_epoch)
        order, pick = draw_epoch(epoch)
        # Shares of processes differ by one sample where `size` is no multiple of `world`.
        first, stop = rank * size // world, (rank + 1) * size // world
        share = order[k * size + first : k * size + stop]
        return [samples[group][int(pick[group] * len(samples[group]))] for group in share]

    return indices_of


def derangement(items: Iterable[str], seed: int) -> dict[str, str]:
    """{item: another of the items}: each is assigned once, and none to itself. For controls that show a
    sample what belongs to another.

    The items follow each other around a circle, in an order drawn by the seed.
    Raises:
        ValueError: fewer than two different items.
    """
    names = sorted({*items})
    if len(names) < 2:
        raise ValueError(f"derangement: needs two different items or more, got {len(names)}")
    # One cycle through all items, so none can follow itself.
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    following = order[1:] + order[:1]
    return {names[i]: names[j] for i, j in zip(order, following, strict=True)}


MicroBatch = list[tuple[int, ...]]  # rows, each of one sample or of several that are packed


def split_by_tokens(
    samples: Iterable[int],
    lengths: Sequence[int],
    bound: int,
    *,
    packing: bool = False,
    multiple_of: int = 1,
) -> list[MicroBatch]:
    """Samples as micro-batches of at most `bound` tokens, padding included; those with the longest come first.

    The order of the samples makes no difference. A sample longer than the bound is a micro-batch of its own.

    Args:
        lengths: tokens of every sample, by its number.
        packing: a row holds several samples, by first-fit decreasing; else one.
        multiple_of: micro-batches are halved until their number is a multiple of this, as far as there are
            samples for it.
    """
    # Equal lengths by number, so that the result is a function of the set.
    remaining = sorted(samples, key=lambda i: (-lengths[i], i))
    micro_batches: list[MicroBatch] = []
    while remaining:
        longest = lengths[remaining[0]]
        # As many rows as the longest sample allows, and no longer ones: attention pays for a row's square.
        count = max(1, bound // longest)
        if packing:
            rows, remaining = _fill_rows(remaining, lengths, count, max(longest, bound // count))
        else:
            rows, remaining = [(i,) for i in remaining[:count]], remaining[count:]
        micro_batches.append(rows)
    return _halve_until(micro_batches, multiple_of)


def _fill_rows(
    samples: Sequence[int], lengths: Sequence[int], count: int, capacity: int
) -> tuple[MicroBatch, list[int]]:
    """(at most `count` rows of `capacity` tokens; samples that are left); the longest sample comes first."""
    rows: list[list[int]] = [[] for _ in range(count)]
    free = [capacity] * count
    most = capacity  # that is free in any row
    left = []
    for i in samples:
        length = lengths[i]
        if length > most:
            left.append(i)
            continue
        row = next(row for row in range(count) if free[row] >= length)
        rows[row].append(i)
        free[row] -= length
        most = max(free)
    return [tuple(row) for row in rows if row], left


def _halve_until(micro_batches: list[MicroBatch], multiple_of: int) -> list[MicroBatch]:
    """Halve the micro-batches of the most samples until their number is a multiple of `multiple_of`, or each
    is one sample."""
    result = list(micro_batches)
    while len(result) % multiple_of:
        sizes = [sum(map(len, rows)) for rows in result]
        most = sizes.index(max(sizes))
        if sizes[most] == 1:
            break
        rows = result[most]
        # Of a single row the samples in it are halved.
        if len(rows) > 1:
            halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        else:
            (row,) = rows
            halves = [[row[: len(row) // 2]], [row[len(row) // 2 :]]]
        result[most : most + 1] = halves
    return result


def prefetch(
    batch_at: Callable[[int], Any], start: int, stop: int, device: torch.device | None = None
) -> Iterator[tuple[int, Any]]:
    """(i, batch_at(i)) for i from start to stop, the next batch made in a thread while the caller
    computes.

    Args:
        device: where batches will be used; for a GPU they are put into pinned memory (`transfer.pin`).
    """
    make = batch_at
    if device is not None and device.type == "cuda":
        make = lambda i: transfer.pin(batch_at(i))
    # One worker: batches are made in their order, and only one is ahead in memory.
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, start) if start < stop else None
        for i in range(start, stop):
            assert ahead is not None
            batch = ahead.result()
            ahead = pool.submit(make, i + 1) if i + 1 < stop else None
            yield i, batch
