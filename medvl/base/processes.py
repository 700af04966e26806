"""Processes that train together: join and leave the group, rank and world size, barriers. A lone process
needs none of it.
"""

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

_single = False  # whether `single_process` is active; for the whole process, its threads too


def join_processes(**settings: Any) -> None:
    """Join the other processes that torchrun started; a lone process joins nothing.

    Tensors of the CPU go over gloo, those of a GPU over NCCL.

    The group is left when the interpreter exits. A second call does nothing.

    Args:
        settings: for `torch.distributed.init_process_group`, where torchrun's variables are not to be used
            (init_method, rank, world_size).
    """
    started_together = bool(settings) or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if dist.is_initialized() or not started_together:
        return
    # Before the group is made: NCCL uses the current device, which is GPU 0 unless it is set.
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(choose_device("cuda"))
    # They may wait long for each other: process 0 draws data for an hour, or waits for another run's
    # features. torch's own limits are 10 minutes for NCCL and 30 for gloo. torchrun notices a process that
    # dies, and ends the others.
    defaults = {
        "backend": "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        "timeout": timedelta(days=1),
    }
    dist.init_process_group(**(defaults | settings))
    atexit.register(_leave)


def _leave() -> None:
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    # gloo's threads may be waiting for the interpreter to drop their last tensors. A thread that still waits
    # when the interpreter ends aborts the process.
    time.sleep(0.3)


@contextmanager
def single_process() -> Iterator[None]:
    """Inside the block this process counts as the only one: nothing is shared with the others and nothing
    waits for them.

    For what process 0 does while the others wait or are gone: training and evaluation share their work
    wherever there are others.
    """
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before


def world_size() -> int:
    """Number of processes that train together."""
    # Some builds of torch have no distributed package.
    joined = dist.is_available() and dist.is_initialized() and not _single
    return dist.get_world_size() if joined else 1


def rank() -> int:
    """The number of this process, 0 .. world_size - 1."""
    return dist.get_rank() if world_size() > 1 else 0


def own_rows(total: int) -> slice:
    """This process's rows of so many that `gather_rows` gave."""
    share = total // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def wait_for_all() -> None:
    """Wait until all processes are here; up to a day, as `join_processes` says."""
    # No `dist.barrier`: with GPUs that is a kernel of NCCL, which keeps the GPU busy for as long as it waits,
    # and which NCCL aborts at its time limit.
    sum_over_processes(torch.zeros(1))


def sum_over_processes(t: Tensor) -> Tensor:
    """The sum of a CPU tensor over all processes, the same bits in each; they must all call.

    Without waiting for a GPU.
    """
    if world_size() == 1:
        return t
    # A group that was made outside medvl may be of NCCL alone, which takes no tensors of the CPU.
    takes_cpu = "cpu:" in dist.get_backend_config()
    total = t.to("cpu" if takes_cpu else "cuda", copy=True)
    dist.all_reduce(total)
    return total.cpu()


def share_batches(number: int) -> list[tuple[int, bool]]:
    """This process's share of so many batches: (which one, whether it counts).

    Every process gets as many, since weights that lie in parts are gathered by all at once. Where there are
    too few batches the last one is computed once more, and counts nothing.
    """
    share = []
    for first in range(0, number, world_size()):
        i = first + rank()
        share.append((min(i, number - 1), i < number))
    return share


def choose_device(name: str = "auto") -> torch.device:
    """The device to compute on: "auto" is this process's GPU if there is one.

    Raises:
        ValueError: "cuda" without a GPU, or none of "auto", "cpu" and "cuda".
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device 'cuda' was requested, but torch finds no GPU; set train.device to 'auto' or 'cpu'"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # torchrun numbers the processes of a machine. A process may also see one GPU alone, as job schedulers can
    # arrange it.
    number = int(os.environ.get("LOCAL_RANK", rank()))
    return torch.device("cuda", number % torch.cuda.device_count())


def gather_rows(t: Tensor) -> Tensor:
    """The rows of all processes, by rank: [n ...] of each, of the same shape -> [world * n ...]; without
    gradients.
    """
    if world_size() == 1:
        return t
    # NCCL needs contiguous memory, and rows are often a slice of something larger.
    gathered = [torch.empty_like(t) for _ in range(world_size())]
    dist.all_gather(gathered, t.contiguous())
    return torch.cat(gathered)
