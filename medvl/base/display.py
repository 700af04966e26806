"""Progress bars in a terminal, nothing where output goes into a file; only the first of several processes
shows any.
"""

import os
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medvl.base.files import room_for

# Of metrics.jsonl; a resumed run does not repeat them to the bit.
TIMING_KEYS = ("time", "seconds_per_step", "seconds_left", "memory_gb", "samples_per_second", "mfu")
# A bar of no width makes tqdm cut the line to fit the terminal.
STEP_FORMAT = "{desc}: {n:,}/{total:,} ({percentage:.0f} %), {remaining} left{postfix}{bar:0}"


def progress_bar(items: Iterable[Any] | None, title: str, **settings: Any) -> Any:
    """A tqdm bar: silent where output goes into a file, not shown in the first second, removed at the end."""
    # torchrun sets RANK. Reading it here avoids importing torch.
    first_process = os.environ.get("RANK", "0") == "0"
    return tqdm(
        items,
        title,
        leave=False,
        dynamic_ncols=True,
        # None: shown in a terminal, not in a file.
        disable=None if first_process else True,
        mininterval=1.0,
        # With a `delay` of a second, tqdm would leave the bar behind when something else is written in that
        # time.
        delay=1e-9,
        **settings,
    )


def track(
    items: Iterable[Any], title: str, total: int | None = None, initial: int = 0, show: bool = True
) -> Any:
    """The items, one after the other, with a progress bar.

    Args:
        total: number of items, where they have no length; with those done before.
        initial: number of items that were done before.
        show: without a bar if false.
    """
    return progress_bar(items, title, total=total, initial=initial) if show else items


class Log:
    """Writes the lines of a run: to `say` (such as tqdm.write), and with the time into a file.

    Args:
        say: prints a line.
        path: of the file, in a folder that exists; lines are added to what is there.
    """

    def __init__(self, say: Callable[[str], None], path: Path) -> None:
        self._say, self._path = say, path

    def __call__(self, text: str) -> None:
        """Print a line and add it to the file."""
        self._say_now(text)
        self.keep(text)

    def update(self, text: str) -> None:
        """Add a line that a bar shows as well; it is printed only where no terminal shows the bar."""
        if not (sys.stderr.isatty() and sys.stdout.isatty()):
            self._say_now(text)
        self.keep(text)

    def _say_now(self, text: str) -> None:
        """Print a line at once: where output goes into a file, Python would hold some fifty of them back."""
        self._say(text)
        sys.stdout.flush()

    def keep(self, text: str) -> None:
        """Add a line to the file."""
        # Opened for each line, so that a killed run has all of them.
        with room_for(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")
