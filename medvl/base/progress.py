"""Work in batches whose results are kept as they come: killed at any moment, the same call goes on and ends with the same lines."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medvl.base.display import track
from medvl.base.files import PathLike

Line = dict[str, Any]


def run_batches(
    path: PathLike,
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[Line]],
    *,
    title: str = "",
) -> list[Line]:
    """One line of results per row, from `path` as far as it goes, from `work` where it ends.

    A batch that was not kept whole is done again whole: what a model says may depend, in the last bit, on what else was in its batch.

    Args:
        path: JSON lines {"row": row, ...}; its folder is made. Its name must stand for all that decides the results.
        batches: rows, each once, in the order in which they are done.
        work: rows -> a line for each, of what JSON can hold.
    Raises:
        ValueError: the file holds other rows than these (says where), or `work` gave another number of lines.
    """
    path, wanted = Path(path), [row for batch in batches for row in batch]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines, size = read_finished_lines(path, wanted)
    done, ends = 0, 0
    for batch in batches:
        if ends + len(batch) > len(lines):
            break
        done, ends = done + 1, ends + len(batch)
    lines = lines[:ends]
    with open(path, "r+b" if path.exists() else "w+b") as f:
        f.truncate(size[ends])
        f.seek(0, os.SEEK_END)
        for batch in track(batches[done:], f"{title}, batch" if title else "batch"):
            new = list(work(batch))
            if len(new) != len(batch):
                raise ValueError(
                    f"run_batches: work must give a line for each of {len(batch)} rows, got {len(new)}"
                )
            new = [{"row": row} | line for row, line in zip(batch, new, strict=True)]
            f.write(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new).encode(
                    errors="backslashreplace"
                )
            )
            f.flush()
            os.fsync(f.fileno())
            lines += new
    return lines


def read_finished_lines(path: PathLike, wanted: Sequence[int]) -> tuple[list[Line], list[int]]:
    """(lines that are there whole, bytes before each of them and behind the last).

    Raises:
        ValueError: as `run_batches`.
    """
    path, lines, size = Path(path), list[Line](), [0]
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), 1):
        if not raw.endswith(b"\n"):
            break  # killed while it was written
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise ValueError(
                f"{path}, line {number}: not a line of results ({e}); remove the file to do it all again"
            ) from e
        if number > len(wanted) or not isinstance(line, dict) or line.get("row") != wanted[number - 1]:
            raise ValueError(
                f"{path}, line {number}: results of other rows or another order; remove the file to do it all again"
            )
        lines.append(line)
        size.append(size[-1] + len(raw))
    return lines, size
