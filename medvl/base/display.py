"""What running work shows: tqdm's bars in a terminal, nothing where output goes into a file; of several processes only the first's."""

import os
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

TIMING_KEYS = (
    "time",
    "seconds_per_step",
)  # keys of metrics.jsonl that a resumed run does not repeat to the bit
STEP_FORMAT = "{desc}: {n:,}/{total:,} ({percentage:.0f} %), {remaining} left{postfix}{bar:0}"  # a bar, of no width, has the line cut to fit


def progress_bar(items: Iterable[Any] | None, title: str, **settings: Any) -> Any:
    """tqdm as it is used everywhere: silent in a file, nothing in the first second, taken away at the end."""
    first = os.environ.get("RANK", "0") == "0"  # torchrun's; asked here, so that nothing heavy is imported
    # With a true `delay`, tqdm would leave the bar behind when something else is written in the first second.
    later = {"mininterval": 1.0, "delay": 1e-9}
    return tqdm(
        items, title, leave=False, dynamic_ncols=True, disable=None if first else True, **later, **settings
    )


def track(
    items: Iterable[Any], title: str, total: int | None = None, done: int = 0, show: bool = True
) -> Any:
    """The items, one after the other, and a bar that says how far that is.

    Args:
        total: number of items, where they have no length; with those done before.
    """
    return progress_bar(items, title, total=total, initial=done) if show else items


class Log:
    """Where the lines of a run go: to `say` (such as tqdm.write), and with the time into a file.

    Args:
        path: of the file, in a folder that exists; lines are added to what is there.
    """

    def __init__(self, say: Callable[[str], None], path: Path) -> None:
        self._say, self._path = say, path

    def __call__(self, text: str) -> None:
        """Say and keep a line."""
        self._say_now(text)
        self.keep(text)

    def update(self, text: str) -> None:
        """Keep a line that a bar shows as well; it is said where nobody watches that."""
        if not (sys.stderr.isatty() and sys.stdout.isatty()):
            self._say_now(text)
        self.keep(text)

    def _say_now(self, text: str) -> None:
        """Say a line; where output goes into a file, Python would keep some fifty of them back."""
        self._say(text)
        sys.stdout.flush()

    def keep(self, text: str) -> None:
        """Add a line to the file."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")
