"""What answers cost: seconds to the first token and for each further one, and the memory of the process."""

import gc
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from attrs import frozen

from medvl.hub import checkpoints
from medvl.language import chat, system
from medvl.language.chat import Encoded
from medvl.language.sampling import Sampling
from medvl.language.system import LanguageModel, Params

T = TypeVar("T")
_STATUS = Path("/proc/self/status")


# Time -------------------------------------------------------------------------------------------------------
@frozen(kw_only=True)
class Timing:
    """One answer, computed alone or with others."""

    rows: tuple[int, ...]  # numbers of the prompts
    prompt_tokens: int  # of all rows
    new_tokens: int  # of all rows
    first_token_s: float  # from the open image file to the first token
    latency_s: float  # to the last one
    answers: tuple[str, ...]

    @property
    def seconds_per_token(self) -> float:
        """Between two tokens of a row, nan where there is only one."""
        steps = self.new_tokens // len(self.rows) - 1
        return (self.latency_s - self.first_token_s) / steps if steps else math.nan


def time_answers(
    model: LanguageModel, params: Params, prompts: Encoded, rows: Sequence[int], new_tokens: int
) -> Timing:
    """Answer prompts as one batch by greedy decoding and take the time, preprocessing of images included.

    Args:
        new_tokens: of each answer, exactly: with fewer tokens a model would only seem faster.
    """
    weights = system.model_weights(model, params)
    own = chat.sampling_of(model.chat, new_tokens)
    sampling = Sampling(
        max_tokens=new_tokens,
        min_tokens=new_tokens,
        end=own.end,
        repetition_penalty=own.repetition_penalty,
    )
    read: list[float] = []  # seconds at which the tokens of each step were read
    start = time.perf_counter()
    batch = chat.make_batch(model.chat, prompts, rows, side="left")
    generated = chat.generate_answers(
        model.chat,
        weights,
        batch,
        sampling,
        params=params,
        on_step=lambda step: read.append(time.perf_counter()),
    )
    return Timing(
        rows=tuple(rows),
        prompt_tokens=sum(generated.prompt_tokens),
        new_tokens=sum(len(ids) for ids in generated.ids),
        first_token_s=read[0] - start,
        latency_s=read[-1] - start,
        answers=generated.texts,
    )


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Number, mean, least, median and most of some seconds; p90 from 10 values on and p99 from 100 on, as fewer
    do not say what the slowest tenth or hundredth are.
    """
    numbers = np.asarray(values, dtype=float)
    found: dict[str, float | int] = {
        "n": len(numbers),
        "mean": float(numbers.mean()),
        "min": float(numbers.min()),
        "p50": float(np.median(numbers)),
        "max": float(numbers.max()),
    }
    for percent, least in ((90, 10), (99, 100)):
        if len(numbers) >= least:
            found[f"p{percent}"] = float(np.percentile(numbers, percent))
    return found


def timed(make: Callable[[], T]) -> tuple[T, float]:
    """What `make` returns, and the seconds it took, work of the GPU included."""
    start = time.perf_counter()
    made = make()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made, time.perf_counter() - start


# Memory -----------------------------------------------------------------------------------------------------
def memory_now(device: torch.device) -> dict[str, int]:
    """Bytes in use: "resident" of this process, and on a GPU also "allocated" and "reserved" by torch, and "device"
    by all programs.
    """
    found = {"resident": _status("VmRSS")}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["allocated"] = torch.cuda.memory_allocated(device)
        found["reserved"] = torch.cuda.memory_reserved(device)
        found["device"] = total - free
    return found


def memory_peak(device: torch.device) -> dict[str, int]:
    """The most bytes in use since `start_peak`."""
    found = {"resident": _status("VmHWM")}
    if device.type == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated(device)
        found["reserved"] = torch.cuda.max_memory_reserved(device)
    return found


def start_peak(device: torch.device) -> bool:
    """Let `memory_peak` begin anew; whether it could for "resident", which else is since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # containers may forbid it
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    checkpoints.release_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _status(key: str) -> int:
    """A number of bytes that Linux gives for this process; elsewhere the most it ever held."""
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Files ------------------------------------------------------------------------------------------------------
def file_sizes(folder: Path) -> dict[str, int]:
    """{file: bytes} of a folder, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def forget_files(folder: Path) -> bool:
    """Ask the system to drop what it keeps of files in memory, so that the next reading is from the disk; whether it
    takes such wishes.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
