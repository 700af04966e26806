"""Files that are there whole or not at all, tables whose columns are checked, and arrays whose shape is."""

import csv
import os
import re
import shutil
import struct
import tempfile
import tokenize
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PathLike = str | os.PathLike
BROKEN = (  # what torch.load and np.load raise, beside ValueError, for files that were cut off or damaged, or are something else
    *(OSError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, AssertionError, OverflowError),
    *(struct.error, zipfile.BadZipFile, tokenize.TokenError),
)


@contextmanager
def atomic(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it replaces `path` when the block ends well and is removed when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    tmp = Path(name)
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        tmp.chmod(0o666 & ~_umask())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def remove_unfinished(folder: PathLike) -> None:
    """Remove what was being written anywhere in a folder when that was killed; nobody may be writing there."""
    for left in sorted(Path(folder).rglob(".*.tmp"), reverse=True):  # what lies in a folder before the folder
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def check_name(name: str, what: str) -> str:
    """The name, which must be good as the name of one file or folder, so that nothing is written beside the folder it belongs to.

    A name that starts with a dot is refused too: what is being written is called so, and swept away after a kill.

    Args:
        what: whose name it is, for the message, such as "adapter".
    Raises:
        ValueError: an empty name, one of more than 200 bytes, "." or "..", or one with a slash, a backslash or a control character.
    """
    too_long = len(name.encode("utf-8", "replace")) > 200  # file systems allow 255, and an ending is added
    if not name.strip() or name.startswith(".") or too_long or re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", name):
        raise ValueError(
            f"{what} {name[:80]!r}: the name becomes that of a file, so it must be of 1 to 200 bytes, without / and \\ and control "
            "characters, and not start with a dot"
        )
    return name


def write_text(path: PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def read_csv(path: PathLike, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV with a header line, as dicts of strings.

    Raises:
        ValueError: no such file, not UTF-8 text, no rows, a missing or repeated column, or a row with more or fewer cells than the
            header; says which line.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f, strict=True)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError as e:
        raise ValueError(f"{path}: no such file") from e
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a readable UTF-8 CSV ({e})") from e
    missing = [c for c in columns if c not in header]
    if missing:
        raise ValueError(
            f"{path}: must have the column {', '.join(map(repr, missing))}, found {', '.join(map(repr, header)) or 'an empty file'}"
        )
    repeated = sorted({c for c in header if header.count(c) > 1})
    if repeated:
        raise ValueError(f"{path}: the column {', '.join(map(repr, repeated))} is there more than once")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: must have {len(header)} cells like the header, found {len(row)}")
    if not rows:
        raise ValueError(f"{path}: has a header and no rows")
    return [dict(zip(header, row, strict=True)) for _, row in rows]


def write_csv(path: PathLike, rows: Iterable[dict], columns: Iterable[str]) -> None:
    """Write dict rows atomically; every row must have exactly these columns."""
    with atomic(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_array(path: PathLike, array: np.ndarray) -> None:
    """Write a .npy atomically."""
    with atomic(path) as tmp, open(tmp, "wb") as f:
        np.save(f, array, allow_pickle=False)


def open_array(path: PathLike) -> np.ndarray:
    """The array of a .npy, mapped: nothing is read or allocated before the sizes that the file claims were held against its length.

    Raises:
        ValueError: no such file, no .npy, one of Python objects, or one that is cut off.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, *BROKEN) as e:
        raise ValueError(f"{path}: not a whole .npy of numbers ({e})") from e
    if not isinstance(held, np.ndarray):
        raise ValueError(f"{path}: not a .npy of numbers (it is an archive of arrays)")
    return held


def read_array(path: PathLike, shape: tuple[int, ...], remedy: str) -> np.ndarray:
    """The numbers of a .npy.

    Raises:
        ValueError: the file is broken, or has another shape; ends with the remedy.
    """
    try:
        held = open_array(path)
    except ValueError as e:
        raise ValueError(f"{path}: must hold an array {list(shape)} and is broken ({e}); {remedy}") from e
    if held.shape != shape:
        raise ValueError(f"{path}: must hold an array {list(shape)}, found {list(held.shape)}; {remedy}")
    return np.array(held)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
