"""What the phases of the check share: where they run, how they time, and results that are on disk at once."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


@frozen
class Place:
    """Where a phase runs, and whether it is a rehearsal at toy sizes."""

    device: torch.device
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, real: T, tiny: T) -> T:
        return tiny if self.tiny else real

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


class Results(dict):
    """Numbers by name. Each is written to a file as it comes, so that a phase that is killed keeps those it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self))
        new.replace(self.path)


def digits(number: float, count: int = 4) -> float:
    """A number of so many digits."""
    return float(f"{number:.{count}g}")


def seconds(place: Place, call: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> float:
    """The median of so many calls, the GPU's work included."""
    return timed(place, call, repeats, warmup)["s"]


def timed(place: Place, call: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> dict[str, float]:
    """{"s": median seconds, "host_share": of it until the host had asked for all work, "peak_gb"}."""
    for _ in range(warmup):
        call()
    place.wait()
    if place.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        asked = time.perf_counter()
        place.wait()
        whole = time.perf_counter() - start
        runs.append((whole, (asked - start) / whole))
    whole, host_share = sorted(runs)[len(runs) // 2]
    numbers = {"s": digits(whole), "host_share": digits(host_share, 2)}
    if place.on_gpu:
        numbers["peak_gb"] = digits(torch.cuda.max_memory_allocated() / 1e9)
    return numbers


def kernels(place: Place, call: Callable[[], Any]) -> dict[str, Any]:
    """Kernels of a call, the share of its time in which the GPU worked, and where that went; {} on a CPU."""
    if not place.on_gpu:
        return {}
    call()
    place.wait()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        call()
        place.wait()
        whole = time.perf_counter() - start
    on_gpu = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in on_gpu) / 1e6
    longest = sorted(profiled.key_averages(), key=lambda row: -row.self_device_time_total)[:8]
    return {
        "kernels": len(on_gpu),
        "gpu_busy": digits(min(1.0, busy / whole), 3),
        "longest": [
            f"{row.key[:60]} {row.self_device_time_total / 1e3:.1f} ms x{row.count}" for row in longest
        ],
    }


@contextmanager
def tf32(place: Place) -> Iterator[None]:
    """Matrix products of float32 may use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def failure(error: BaseException) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {str(error)[:400]}"}


def attempt(results: dict[str, Any], name: str, function: Callable[..., Any], *args: Any) -> Any:
    """results[name] = function(*args), or what went wrong: a peer that is missing must not cost the numbers that follow."""
    try:
        results[name] = function(*args)
    except Exception as error:
        results[name] = failure(error)
        # A GPU that has failed gives nothing that means anything.
        if "CUDA error" in str(error) or "illegal memory" in str(error):
            raise
    return results[name]
