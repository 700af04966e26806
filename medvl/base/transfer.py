"""Copies to a GPU that the host does not wait for, and the memory that is free there."""

from typing import Any

import torch
from torch import Tensor

_FREE_IN_ESTIMATES = 70 * 2**30


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
    """Bytes that can still be allocated on a GPU; None on a CPU. On "meta", where estimates are made, those of a
    GPU of 80 GB.
    """
    if device.type == "meta":
        return _FREE_IN_ESTIMATES
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has freed and holds back for its next allocations is free for us.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def index_device(device: torch.device) -> torch.device:
    """Where ids, masks and lengths belong beside tensors on `device`.

    Tensors on "meta" count memory without having any, but lengths and masks must be known.
    """
    return torch.device("cpu") if device.type == "meta" else device
