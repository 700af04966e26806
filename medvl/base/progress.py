"""Work in batches whose results are written as they come: killed at any moment, the same call goes on and
ends with the same lines.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medvl.base.display import track
from medvl.base.files import PathLike, room_for

Line = dict[str, Any]


def run_batches(
    path: PathLike,
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[Line]],
    *,
    title: str = "",
) -> list[Line]:
    """One line of results per row: from `path` as far as the file goes, from `work` for all later rows.

    A batch that was not written whole is computed again: a model's answer may depend, in the last bit, on
    what else was in its batch.

    Args:
        path: JSON lines {"row": row, ...}; its folder is made. Its name must stand for all that decides the
            results.
        batches: rows, each once, in the order in which they are computed.
        work: rows -> a line for each, of what JSON can hold.
        title: of the progress bar.
    Raises:
        ValueError: the file holds other rows than these (says where), or `work` gave another number of lines.
    """
    path = Path(path)
    rows = [row for batch in batches for row in batch]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines, offsets = read_finished_lines(path, rows)
    # Rows and number of the batches that were written whole; the one after them may be there in part.
    finished, batch_count = 0, 0
    for batch in batches:
        if finished + len(batch) > len(lines):
            break
        finished += len(batch)
        batch_count += 1
    lines = lines[:finished]
    # Not "a": what follows the last whole batch is cut off first.
    mode = "r+b" if path.exists() else "w+b"
    with room_for(path), open(path, mode) as file:
        # Cut off the last batch if it is not whole, and whatever was left of a line when the process was
        # killed.
        file.truncate(offsets[finished])
        file.seek(0, os.SEEK_END)
        for batch in track(batches[batch_count:], f"{title}, batch" if title else "batch"):
            results = list(work(batch))
            if len(results) != len(batch):
                raise ValueError(
                    f"run_batches: work must give a line for each of {len(batch)} rows, got {len(results)}"
                )
            batch_lines = [{"row": row} | line for row, line in zip(batch, results, strict=True)]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in batch_lines)
            # Lone surrogates, which a JSON file of questions may hold, are no UTF-8.
            file.write(text.encode(errors="backslashreplace"))
            # On the disk before the next batch starts, so that a crash of the machine costs one batch.
            file.flush()
            os.fsync(file.fileno())
            lines += batch_lines
    return lines


def read_finished_lines(path: PathLike, rows: Sequence[int]) -> tuple[list[Line], list[int]]:
    """Read the lines that were written whole.

    Returns:
        (lines, offsets): the offset in bytes of each line, and that of the end of the last one.
    Raises:
        ValueError: as `run_batches`.
    """
    path = Path(path)
    lines: list[Line] = []
    offsets = [0]
    content = path.read_bytes() if path.exists() else b""
    for number, raw in enumerate(content.splitlines(keepends=True), 1):
        if not raw.endswith(b"\n"):
            break  # the process was killed while it wrote this line
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise ValueError(
                f"{path}, line {number}: not a line of results ({e}); remove the file to start again"
            ) from e
        # Another data set or order under the same name: going on would mix the results of two.
        if number > len(rows) or not isinstance(line, dict) or line.get("row") != rows[number - 1]:
            raise ValueError(
                f"{path}, line {number}: results of other rows, or in another order; remove the file to "
                "start again"
            )
        lines.append(line)
        offsets.append(offsets[-1] + len(raw))
    return lines, offsets
