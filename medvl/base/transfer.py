"""Copies to a GPU that the host does not wait for, and the memory that is free there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_CARD_OF_ESTIMATES = 80 * 10**9  # bytes of the GPU that "meta" stands for
_bytes_on_meta: Callable[[], int] = lambda: 0  # what an estimate counts as allocated there


def pin(batch: Any) -> Any:
    """A batch whose tensors lie in pinned memory, from which a GPU copies by itself; dicts, lists and tuples are
    searched for tensors, and all else is left as it is.
    """
    if isinstance(batch, Tensor):
        return batch.pin_memory() if batch.device.type == "cpu" and not batch.is_pinned() else batch
    if isinstance(batch, dict):
        return {key: pin(value) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(pin(value) for value in batch)
    return batch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the host goes on while a GPU copies it."""
    if device.type != "cuda":
        return tensor.to(device)
    # From memory that is not pinned a copy would be waited for, whatever `non_blocking` says.
    return pin(tensor).to(device, non_blocking=True)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU; None on a CPU. On "meta", where estimates are made, what
    `allocated_on_meta` leaves of a GPU of 80 GB.
    """
    if device.type == "meta":
        return max(0, _CARD_OF_ESTIMATES - _bytes_on_meta())
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has freed and holds back for its next allocations is free for us.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def allocated_on_meta(count: Callable[[], int]) -> Iterator[None]:
    """Inside the block `count` says how many bytes tensors on "meta" would take."""
    global _bytes_on_meta
    before, _bytes_on_meta = _bytes_on_meta, count
    try:
        yield
    finally:
        _bytes_on_meta = before


def index_device(device: torch.device) -> torch.device:
    """Where ids, masks and lengths belong beside tensors on `device`.

    Tensors on "meta" count memory without having any, but lengths and masks must be known.
    """
    return torch.device("cpu") if device.type == "meta" else device
