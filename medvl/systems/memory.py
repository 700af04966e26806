"""Whether the stages of a record fit the GPU, asked before anything is trained."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from medvl.base import processes
from medvl.systems.system import System
from medvl.training.record import training_tables

_log = logging.getLogger("medvl")
_REMEDY = (
    "train fewer parameters (in a language system an adapter: train = ['lora/.*'], model.quantize = 'nf4'), "
    "keep less beside the weights (train.moments = '8bit', train.rounding = 'stochastic'), cut them over "
    "several processes (train.shard = true), or use a larger GPU; `invoke estimate` shows what needs how much"
)


@frozen(kw_only=True)
class Card:
    """A GPU and its memory in bytes."""

    name: str
    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.name} has {self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"


def fullest_card(cfg: Any) -> Card | None:
    """Of the GPUs that all processes train on, the one with the least free memory; None without a GPU.

    Every process must call it.
    """
    devices = [processes.choose_device(table.device) for table in training_tables(cfg)]
    gpus = [device for device in devices if device.type == "cuda"]
    sizes = torch.zeros(processes.world_size(), 2, dtype=torch.int64)  # (free, total) by rank
    if gpus:
        sizes[processes.rank()] = torch.tensor(torch.cuda.mem_get_info(gpus[0]))
    cards = []
    for rank, (free, total) in enumerate(processes.sum_over_processes(sizes).tolist()):
        if total:
            name = f"the GPU of process {rank}" if len(sizes) > 1 else str(gpus[0])
            cards.append(Card(name=name, free=free, total=total))
    return min(cards, key=lambda card: card.free, default=None)


def check_memory(
    system: System, cfg: Any, card: Card | None, number_of_processes: int = 1, data: Any = None
) -> None:
    """Refuse stages that cannot fit the free memory of a GPU, and warn of those that may not.

    Does nothing without a GPU, and for systems without an estimate.

    Args:
        card: from `fullest_card`.
        data: from the system's `prepare`.
    Raises:
        ValueError: weights, gradients and optimiser alone are larger.
    """
    if card is None or system.memory is None or not system.trains(cfg):
        return
    read = {} if data is None else {"data": data}
    # Not the run's folder: an estimate writes the tokenizer of a model that is built from scratch.
    with tempfile.TemporaryDirectory() as folder:
        steps = system.memory(cfg, Path(folder), number_of_processes, **read)
    for stage, step in steps.items():
        parts = step.memory
        peak = sum(parts.values())
        # Activations are those of the longest conversations, which need not meet in one batch. Certain is
        # what is kept all the time, and a gradient for each number that is trained.
        least = parts.get("trained weights", 0)
        for part, size in parts.items():
            if part != "activations and gradients":
                least += size
        if least > card.free:
            raise ValueError(
                f"stage {stage}: weights, gradients and optimiser need {least / 1e9:.1f} GB on each GPU, and "
                f"{card}; {_REMEDY}"
            )
        # A tenth for what a step's kernels and the allocator need besides.
        if peak * 1.1 > card.free:
            _log.warning(
                "stage %s: a step may need %.1f GB and a tenth more, and %s; if it runs out of memory, "
                "lower train.chunk, or %s",
                stage,
                peak / 1e9,
                card,
                _REMEDY,
            )
