"""What running work shows: one line that is replaced in place in a terminal, a few plain lines where output goes into a file.

Of several processes only the first shows anything.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
QUICK = 1.0  # seconds; work that is done sooner shows nothing
CLOCK = ("time", "seconds_per_step")  # keys of metrics.jsonl that a resumed run does not repeat to the bit


class Progress:
    """How far one piece of work is: `Progress("chests drawn", 5515)`, and `advance` for each that is done.

    In a terminal the line is replaced several times a second, and taken away at the end. In a file there is a line a minute.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._done, self._before = title, total, done, done
        self._start = self._shown = time.monotonic()
        self._visible = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()

    def advance(self, n: int = 1) -> None:
        """Count n more as done, and show the line where it is time to."""
        self._done += n
        now = time.monotonic()
        pause = 0.2 if in_terminal() else 60.0
        if now - self._start < QUICK or now - self._shown < pause or not _is_first():
            return
        each = (now - self._start) / max(1, self._done - self._before)
        left = each * max(0, self._total - self._done)
        replace_line(f"{self._title}: {share(self._done, self._total)}, {pace(each)} each, {duration(left)} left")
        self._shown, self._visible = now, in_terminal()

    def clear(self) -> None:
        """Take the line away, so that another can be printed."""
        if self._visible:
            replace_line("")
            self._visible = False


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, one after the other; while they are worked on, `Progress` shows how far that is.

    Args:
        total: number of items, where they have no length.
    """
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    with Progress(title, total) as progress:
        for item in items:
            yield item
            progress.advance()


class Log:
    """Where the lines of a run go: to `say` (such as print), and with the time into a file.

    Args:
        path: of the file, in a folder that exists; lines are added to what is there.
    """

    def __init__(self, say: Callable[[str], None], path: Path) -> None:
        self._say, self._path = say, path

    def __call__(self, text: str) -> None:
        """A line that stays."""
        if in_terminal() and self._say is print:
            replace_line("")
        self._say(text)
        self._keep(text)

    def update(self, text: str) -> None:
        """A line that the next one replaces in a terminal; in a file, and in the log, it stays."""
        if in_terminal():
            replace_line(text)
        if not (in_terminal() and self._say is print and sys.stdout.isatty()):
            self._say(text)
        self._keep(text)

    def _keep(self, text: str) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")


def update(log: Callable[[str], None], text: str) -> None:
    """Give a line that the next replaces to whatever takes lines."""
    (log.update if isinstance(log, Log) else log)(text)


def in_terminal() -> bool:
    """Whether somebody watches."""
    return sys.stderr.isatty()


def replace_line(text: str) -> None:
    """Put a line in the place of the last one, cut to the terminal's width; "" takes it away. Into a file, it is a line like any."""
    if not in_terminal():
        if text:
            print(text, file=sys.stderr, flush=True)
        return
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r\x1b[K{text[:width]}")
    sys.stderr.flush()


def share(done: int, total: int) -> str:
    """`312 of 5,515 (6 %)`."""
    return f"{done:,} of {total:,} ({100 * done // max(1, total)} %)"


def pace(seconds: float) -> str:
    """`0.41 s`, or `12 ms` where it is short."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def duration(seconds: float) -> str:
    """`35 s`, `12 min`, `3 h 05 min`, `2 d 03 h`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun's; asked here, so that nothing heavy is imported
