"""What a run says of itself: a line of `metrics.jsonl` per logged step, and the line that is shown."""

import importlib.util
import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medvl.base import display, files, processes

_log = logging.getLogger("medvl")


def open_journal(path: Path, step: int, tensorboard: bool = False) -> Callable[[dict[str, Any]], None]:
    """An appender to `path`, after dropping lines past `step` (written by a run that was killed before it
    saved) and broken ones.

    A last line that is broken is half a line of a killed run, whose step is run again. For others there
    is a warning and a copy of the file. Only process 0 writes. With `tensorboard` numbers are written beside
    the file for TensorBoard, too.
    """
    if processes.rank() != 0:
        return lambda line: None
    # As bytes: half a line may end within a character.
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept_lines, broken = list[str](), list[int]()
    for number, raw in enumerate(lines, 1):
        try:
            if json.loads(raw)["step"] <= step:
                kept_lines.append(raw.decode())
        except (ValueError, KeyError, TypeError, RecursionError):
            broken.append(number)
    # A broken last line is usual after a kill; anything else may be someone's data, so it is copied first.
    if any(number < len(lines) for number in broken):
        copy = path.with_name("metrics.broken.jsonl")
        with files.atomic(copy) as tmp:
            shutil.copyfile(path, tmp)
        _log.warning(
            "%s: %d lines, the first line %d, hold no step and are left out; %s is a copy",
            path,
            len(broken),
            broken[0],
            copy,
        )
    files.write_text(path, "".join(line + "\n" for line in kept_lines))

    writer: Any = None
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # What a run wrote behind this step before it was killed is not shown.
        writer = SummaryWriter(str(path.parent), purge_step=step + 1)

    # Opened for each line, so that whoever follows the file sees it at once.
    def append(line: dict[str, Any]) -> None:
        with files.room_for(path), open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        if writer:
            for name in line.keys() - {"step", "time"}:
                writer.add_scalar(name, line[name], line["step"])
            writer.flush()

    return append


def check_tensorboard() -> None:
    """Raise where nothing can write the events of `open_journal`."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("train.tensorboard = true needs tensorboard; pip install 'medvl[tensorboard]'")


class Pace:
    """How fast a run goes, and the line that shows it. Its clock stands still while the state is
    validated and saved.

    Args:
        step: where the run begins.
        bar: the progress bar of this process.
        log: takes the lines; with a `display.Log` they replace each other in a terminal.
    """

    def __init__(self, title: str, step: int, steps: int, bar: tqdm, log: Callable[[str], None]) -> None:
        self._step, self._bar, self._log = step, bar, log
        self._first, self._steps = step, steps
        self._line = partial(
            tqdm.format_meter, total=steps, initial=step, prefix=title, bar_format=display.STEP_FORMAT
        )
        self._start = self._since = time.monotonic()
        # Counted from the last `go_on`, so the pace is of training alone.
        self._since_step, self._seconds = step, 0.0

    def count_step(self) -> None:
        """Count a step."""
        self._step += 1
        self._bar.update()

    def read_clock(self, device: torch.device, rates: Mapping[str, float]) -> dict[str, Any]:
        """`display.TIMING_KEYS`: the pace is that since the clock went on, time left has validations in it.

        Args:
            rates: {name: what a step has of it}; it becomes that of a second.
        """
        now = time.monotonic()
        self._seconds = (now - self._since) / max(1, self._step - self._since_step)
        left = (now - self._start) / max(1, self._step - self._first) * (self._steps - self._step)
        return {
            "time": f"{datetime.now():%Y-%m-%dT%H:%M:%S}",
            "seconds_per_step": round(self._seconds, 4),
            "seconds_left": round(left),
            "memory_gb": round(_peak_memory(device) / 1e9, 3),
        } | {name: round(number / max(self._seconds, 1e-9), 4) for name, number in rates.items()}

    def show(self, line: dict[str, Any], *, stays: bool) -> None:
        """Show the numbers of a step; `stays` where the next line does not replace them."""
        # tqdm's format and the first fields show these already.
        numbers = {name: v for name, v in line.items() if name != "step" and name not in display.TIMING_KEYS}
        fields = [f"{self._seconds:.3g} s/step"]
        fields += [f"{name} {line[name]:.3g}" for name in ("samples_per_second", "mfu") if name in line]
        # Rate and loss first: a narrow terminal shows the first numbers only.
        for name, digits in (("lr", ".2g"), ("loss", ".3g")):
            if name in numbers:
                fields.append(f"{name} {numbers.pop(name):{digits}}")
        fields.append(f"{line['memory_gb']:.2f} GB")
        fields += [f"{name} {value:.4g}" for name, value in numbers.items()]
        postfix = ", ".join(fields)
        self._bar.set_postfix_str(postfix)
        show = self._log
        if isinstance(self._log, display.Log) and not stays:
            show = self._log.update
        show(self._line(self._step, elapsed=time.monotonic() - self._start, postfix=postfix))

    def go_on(self) -> None:
        """Let the clock of steps go on."""
        self._since, self._since_step = time.monotonic(), self._step


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: on its GPU, or in main memory where it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage gives bytes on macOS and KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
