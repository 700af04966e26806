"""Whether the stages of a record fit the GPU, asked before anything is trained."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from medvl.base import processes
from medvl.systems.system import System
from medvl.training.record import training_tables

_log = logging.getLogger("medvl")
_REMEDY = (
    "train fewer parameters (in a language system an adapter: train = ['lora/.*'], model.quantize = 'nf4'), "
    "keep less beside the weights (train.moments = '8bit', train.rounding = 'stochastic'), cut them over "
    "several processes (train.shard = true), or use a larger GPU; `invoke estimate` shows what needs how much"
)


def check_memory(system: System, cfg: Any, number_of_processes: int = 1) -> None:
    """Refuse stages that cannot fit the free memory of this process's GPU, and warn of those that may not.

    Does nothing on a CPU, and for systems without an estimate.

    Raises:
        ValueError: weights, gradients and optimiser alone are larger.
    """
    if system.memory is None or not system.trains(cfg):
        return
    devices = [processes.choose_device(table.device) for table in training_tables(cfg)]
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return
    free, total = torch.cuda.mem_get_info(gpus[0])
    card = f"{gpus[0]} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    # Not the run's folder: an estimate writes the tokenizer of a model that is built from scratch.
    with tempfile.TemporaryDirectory() as folder:
        steps = system.memory(cfg, Path(folder), number_of_processes)
    for stage, step in steps.items():
        parts = step.memory
        peak = sum(parts.values())
        # Activations are those of the longest conversations, which need not meet in one batch. Certain is
        # what is kept all the time, and a gradient for each number that is trained.
        least = parts.get("trained weights", 0)
        for part, size in parts.items():
            if part != "activations and gradients":
                least += size
        if least > free:
            raise ValueError(
                f"stage {stage}: weights, gradients and optimiser need {least / 1e9:.1f} GB on each GPU, and "
                f"{card}; {_REMEDY}"
            )
        # A tenth for what a step's kernels and the allocator need besides.
        if peak * 1.1 > free:
            _log.warning(
                "stage %s: a step may need %.1f GB and a tenth more, and %s; if it runs out of memory, "
                "lower train.chunk, or %s",
                stage,
                peak / 1e9,
                card,
                _REMEDY,
            )
