"""How often a run opens each file."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COUNTS: list[
    Counter
] = []  # the audit hook of a process cannot be taken away; it counts into the last of these


def _count_open(event, args):
    if event == "open" and _COUNTS and isinstance(args[0], str | os.PathLike) and "w" not in str(args[1]):
        _COUNTS[-1][Path(args[0]).name] += 1


sys.addaudithook(_count_open)


@contextmanager
def count_openings() -> Iterator[Counter]:
    """{name of a file: how often it is opened for reading} while the block runs, by Python and not by HDF5."""
    _COUNTS.append(Counter())
    try:
        yield _COUNTS[-1]
    finally:
        _COUNTS.pop()
