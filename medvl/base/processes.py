"""The processes that train together: join them, who this is, wait for all, leave in order. One process needs none of it."""

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False  # of the whole process, its threads too


def join_processes(**how: Any) -> None:
    """Meet the other processes that torchrun started, over NCCL where there are GPUs and over gloo where not; alone, nothing.

    What was joined is left when the interpreter exits. Joined twice is joined once.

    Args:
        how: for `torch.distributed.init_process_group`, where torchrun's variables are not to be asked (init_method, rank, world_size).
    """
    if dist.is_initialized() or not (how or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        return
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # They may wait long for each other: process 0 draws data for an hour, or waits for another run's features. Who dies is noticed by
    # torchrun, which ends the others.
    dist.init_process_group(
        **{"backend": "nccl" if torch.cuda.is_available() else "gloo", "timeout": timedelta(days=1)} | how
    )
    atexit.register(_leave)


def _leave() -> None:
    if not dist.is_initialized():
        return
    gloo = dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if gloo:  # its threads may be waiting for the interpreter to drop their last tensors; one that still waits when it ends aborts
        time.sleep(0.3)


@contextmanager
def single_process() -> Iterator[None]:
    """This process works for itself while the block lasts: there is one, and nothing is shared with the others or waits for them.

    For what process 0 does while the others wait or are gone: it may train and evaluate with the functions that share where they can.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Number of processes that train together."""
    joined = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if joined else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if world_size() > 1 else 0


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def choose_device(wanted: str = "auto") -> torch.device:
    """Where to compute: "auto" is this process's GPU if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device 'cuda' was asked for and torch finds no GPU; set train.device to 'auto' or 'cpu'"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank() % torch.cuda.device_count())


def gather_rows(t: Tensor) -> Tensor:
    """The rows of all processes, in their order: [n ...] of each, of the same shape -> [world * n ...]; without gradients."""
    if world_size() == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)
