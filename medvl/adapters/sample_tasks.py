"""The tasks of samples, as numbers and checked."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def number_tasks(tasks: Sequence[Hashable]) -> tuple[list[Hashable], Tensor]:
    """(the tasks in order of appearance, the place of each sample's among them int64 [n])."""
    place: dict[Hashable, int] = {}
    # Elements of a tensor are objects of their own, and would each be another key.
    values = tasks.tolist() if isinstance(tasks, Tensor) else tasks
    numbers = [place.setdefault(task, len(place)) for task in values]
    return list(place), torch.tensor(numbers, dtype=torch.int64)


def check_tasks(where: str, names: list[Hashable], numbers: Tensor, rows: Tensor | None = None) -> None:
    """Check that every task has two samples, and that there are two tasks.

    Args:
        where: what errors begin with.
        names, numbers: from `number_tasks`.
        rows: samples among which there must be two tasks; all, if left out.
    Raises:
        ValueError: it is not so.
    """
    count = len(names)
    if rows is not None:
        count = len(numbers[rows].unique())
    if count < 2:
        raise ValueError(f"{where}: needs at least two tasks to tell apart, got {count}")
    sizes = torch.bincount(numbers).tolist()
    single = [name for name, size in zip(names, sizes, strict=True) if size < 2]
    if single:
        raise ValueError(
            f"{where}: every task must have two samples or more, {single[0]!r} has one ({len(single)} such)"
        )
