"""Files that are there whole or not at all, tables whose columns are checked, and arrays whose shape is."""

import csv
import errno
import fcntl
import glob
import hashlib
import itertools
import logging
import os
import platform
import re
import shutil
import stat
import struct
import tempfile
import threading
import tokenize
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

PathLike = str | os.PathLike
_log = logging.getLogger(__name__)
READ_ERRORS = (  # what torch.load and np.load raise, beside ValueError, for files that were cut off or damaged, or are something else
    *(OSError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, AssertionError, OverflowError),
    *(struct.error, zipfile.BadZipFile, tokenize.TokenError),
)
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of tables that are not read
_LONGEST_LINE = 2**24
_LINES_OF_A_ROW = 2000  # no report has so many; a quote that is not closed makes one row of all that follow
_LONGEST_CELL = 2**23  # Python's default is 131,072 characters, and reports of 200 kB are real
_READING = threading.Lock()


def error_reason(error: Exception) -> str:
    """The first sentence of what a reader of files says; torch goes on with the advice to run what the file holds, which nobody must."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0] if lines else type(error).__name__


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


@contextmanager
def file_lock(path: PathLike, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """One process at a time may write to `path` while the block lasts. Clears what a killed one left unfinished beside it.

    The lock is `.NAME.lock` beside the path: an flock, which the system gives back when the process ends, also by kill -9, so that a dead
    process never blocks. NFS and Lustre keep it between machines where their locks are on; where a file system knows no locks, a warning
    says so and the work goes on. The file says who holds it, and is removed at the end.

    Args:
        wait: until the other process is done, which a warning says.
        shared: any number of processes may be inside so, and none that is not.
    Raises:
        ValueError: another process is writing to it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    handle = _lock(lock, path, wait, shared)
    try:
        if not shared:
            remove_unfinished_file(path)
        yield
    finally:
        with suppress(OSError):  # of a file system without locks
            if not shared or _locked(
                handle, fcntl.LOCK_EX | fcntl.LOCK_NB
            ):  # else others are inside still, the last removes it
                lock.unlink(missing_ok=True)
        os.close(handle)


def _lock(lock: Path, path: Path, wait: bool, shared: bool) -> int:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _locked(handle, kind | fcntl.LOCK_NB):
                who = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
                holder = f"another run is writing to it{f' ({who})' if who else ''}"
                if not wait:
                    os.close(handle)
                    raise ValueError(f"{path}: {holder}; wait until it ends")
                _log.warning("%s: %s; waiting until it ends", path, holder)
                _locked(handle, kind)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(handle)
                raise
            _log.warning(
                "%s: this file system has no locks (%s), so see to it yourself that no other run writes there",
                path,
                e.strerror,
            )
            return handle
        # Who held it before may have removed the file: then this is a lock on nothing, and others lock a new file.
        if lock.exists() and os.path.samestat(os.fstat(handle), os.stat(lock)):
            if not shared:
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
            return handle
        os.close(handle)


def _locked(handle: int, kind: int) -> bool:
    """Whether the lock was given; without LOCK_NB it waits."""
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        return False
    return True


def check_text_name(path: PathLike) -> None:
    """Raise where a path holds bytes that are no UTF-8: it could not be printed, or kept in a table or store."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{os.fspath(path)!a}: must be a name that can be written as text (UTF-8); give another"
        ) from e


def check_writable(path: PathLike, *, folder: bool = False) -> None:
    """Raise where a file (or, so asked, files in a folder) cannot be written: before long work and not after it. Leaves nothing behind.

    Raises:
        ValueError: a folder where a file must be or the other way round, a device, something that lies under a file, a place where
            nothing can be written, or a name that cannot be written as text.
    """
    path = Path(path)
    check_text_name(path)
    try:
        kind = "folder" if path.is_dir() else "file" if path.is_file() else "device" if path.exists() else ""
        if kind and kind != ("folder" if folder else "file"):
            raise ValueError(
                f"{path}: must be a {'folder' if folder else 'file'} to write, and is a {kind}; give another name"
            )
        if kind == "file" and not os.access(path, os.W_OK):
            raise ValueError(f"{path}: is there and may not be written to; give another name")
        above = path if kind == "folder" else path.parent
        while not os.path.lexists(above) and above != above.parent:
            above = above.parent
        if not above.is_dir():
            raise ValueError(f"{path}: cannot be written, because {above} is no folder; give another place")
        with tempfile.TemporaryFile(dir=above):
            pass
        if len(os.fsencode(path.name)) > 230:  # of 255, and what is being written has a longer name
            raise ValueError(f"{path}: the name is too long")
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({e.strerror}); give another place") from e


def remove_unfinished_file(path: PathLike) -> None:
    """Remove what was being written to one path when that was killed; nobody may be writing it."""
    for left in Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*.tmp"):
        left.unlink()


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
    if (
        not name.strip()
        or name.startswith(".")
        or too_long
        or re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", name)
    ):
        raise ValueError(
            f"{what} {name[:80]!r}: the name becomes that of a file, so it must be of 1 to 200 bytes, without / and \\ and control "
            "characters, and not start with a dot"
        )
    return name


def write_text(path: PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def files_below(folder: PathLike) -> list[Path]:
    """Every file in a folder and all below it, links followed.

    Raises:
        ValueError: a folder that cannot be read, or links that lead in a circle.
    """
    folder, found, above = Path(folder), list[Path](), dict[str, set[str]]()

    def refuse(e: OSError) -> None:
        raise ValueError(
            f"{e.filename}: cannot be read ({e.strerror}); what lies in it would be left out"
        ) from e

    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        path_to_here = above.pop(where, set()) | {real}
        for name in folders:
            below = os.path.join(where, name)
            if os.path.realpath(below) in path_to_here:
                raise ValueError(f"{below}: is a link to a folder that it lies in; remove it")
            above[below] = path_to_here
        found += [Path(where, name) for name in names]
    return found


def check_regular(path: PathLike) -> None:
    """Refuse a path that is there and is neither file nor folder: a pipe is waited for, a device read, without end."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # whoever opens it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise ValueError(f"{path}: must be a file, found {kind}")


def read_csv(path: PathLike, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV with a header line, as dicts of strings.

    Raises:
        ValueError: no such file, not UTF-8 text, other separators than commas, no rows, a missing or repeated column, a quote that is
            not closed, or a row with more or fewer cells than the header; says which line.
    """
    path = Path(path)
    check_regular(path)
    try:
        with _long_cells():
            header, *rows = [*_csv_rows(path)] or [(1, [])]
    except FileNotFoundError as e:
        raise ValueError(f"{path}: no such file") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not a readable UTF-8 CSV ({e})") from e
    names = header[1]
    separator = next((name for mark, name in SEPARATORS.items() if len(names) == 1 and mark in names[0]), "")
    if separator:
        raise ValueError(f"{path}: its cells are separated by {separator}; save the table with commas")
    missing = [c for c in columns if c not in names]
    if missing:
        raise ValueError(
            f"{path}: must have the column {', '.join(map(repr, missing))}, found {', '.join(map(repr, names)) or 'an empty file'}"
        )
    repeated = sorted({c for c in names if names.count(c) > 1})
    if repeated:
        raise ValueError(f"{path}: the column {', '.join(map(repr, repeated))} is there more than once")
    for line, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{path}, line {line}: must have {len(names)} cells like the header, found {len(row)}"
            )
    if not rows:
        raise ValueError(f"{path}: has a header and no rows")
    return [dict(zip(names, row, strict=True)) for _, row in rows]


@contextmanager
def _long_cells() -> Iterator[None]:
    """Python's limit is the whole process's: one table at a time raises it and puts it back."""
    with _READING:
        before = csv.field_size_limit(_LONGEST_CELL)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, cells) of each row that is not empty."""
    # Lines end in LF or CR LF. A CR alone is left in its line, where the reader refuses it outside quotes.
    with open(path, newline="\n", encoding="utf-8-sig") as f:
        reader = csv.reader(_csv_lines(f, path), strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as e:
                why = (
                    "is a quote not closed?"
                    if "new-line" not in str(e)
                    else "do lines end in CR alone? Save it with LF"
                )
                raise ValueError(f"{path}, line {line}: not a readable CSV ({e}); {why}") from e
            if row is None:
                return
            if reader.line_num - line >= _LINES_OF_A_ROW:
                raise ValueError(
                    f"{path}, line {line}: this row would go on to line {reader.line_num}; is a quote not closed?"
                )
            if row:
                yield line, row


def _csv_lines(f: TextIO, path: Path) -> Iterator[str]:
    for number in itertools.count(1):
        line = f.readline(_LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > _LONGEST_LINE:
            raise ValueError(
                f"{path}, line {number}: has more than {_LONGEST_LINE:,} characters; is this a table?"
            )
        if "\0" in line:
            raise ValueError(f"{path}, line {number}: has a NUL byte; the file is damaged, or not UTF-8 text")
        yield line


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


def file_digest(path: PathLike) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def open_array(path: PathLike) -> np.ndarray:
    """The array of a .npy, mapped: nothing is read or allocated before the sizes that the file claims were held against its length.

    Raises:
        ValueError: no such file, no .npy, one of Python objects, or one that is cut off.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, *READ_ERRORS) as e:
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


def check_uncompressed(path: PathLike) -> None:
    """Refuse a file of torch.save whose members unpack to more than the file is long: torch.save compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as members:
            sizes = [m.file_size for m in members.infolist() if m.compress_type != zipfile.ZIP_STORED]
    except (ValueError, *READ_ERRORS) as e:
        raise ValueError(f"{path}: is not a whole file of torch.save ({e})") from e
    if sizes:
        raise ValueError(
            f"{path}: must be as torch.save writes it, {len(sizes)} members are compressed and unpack to {sum(sizes)} bytes"
        )


def check_tensor_storage(path: PathLike, tensors: Mapping[str, Any]) -> None:
    """Refuse tensors of a file of torch.save that hold fewer numbers than they have: a stride of 0 repeats a few without end."""
    for key, tensor in tensors.items():
        dense = str(tensor.layout) == "torch.strided" and not tensor.is_meta
        stored = tensor.untyped_storage().nbytes() if dense else 0
        if stored < tensor.numel() * tensor.element_size():
            raise ValueError(
                f"{path}: {key} must be {list(tensor.shape)} numbers of their own, the file holds {stored} bytes; "
                "write it again with tensor.contiguous()"
            )


def open_dataset(file: Any, name: str, path: PathLike) -> Any:
    """The dataset `name` of an open HDF5 file, all of it written and in that file.

    HDF5 follows links and external storage to any other file, and reads room that was never written as zeros. Nothing is read here.

    Raises:
        ValueError: no dataset, a link, external storage or a virtual dataset; parts that were never written; a size that has nothing to
            do with what the file holds.
    """
    import h5py

    key = name.encode()
    if not file.id.links.exists(key):
        raise ValueError(
            f"{path}: must hold a dataset {name!r}, found {', '.join(map(repr, list(file)[:6])) or 'none'}"
        )
    if file.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise ValueError(
            f"{path}: {name!r} must lie in this file, found a link; copy what it leads to into the file"
        )
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{path}: {name!r} must be a dataset, found a {type(found).__name__.lower()}")
    plan = found.id.get_create_plist()
    if found.is_virtual or plan.get_external_count():
        raise ValueError(
            f"{path}: {name!r} must lie in this file, found a dataset whose numbers lie in other files; copy them into it"
        )
    stored = found.id.get_storage_size()
    if plan.get_layout() == h5py.h5d.CHUNKED:
        room, written, unit = 1, found.id.get_num_chunks(), "chunks"
        for length, step in zip(found.shape, found.chunks, strict=True):
            room *= -(-length // step)
    else:
        room, written, unit = found.nbytes, stored, "bytes"
    if written < room:
        raise ValueError(
            f"{path}: {name!r} has room for {room} {unit} and holds {written}; was its writer killed?"
        )
    if found.nbytes > max(2**26, 100 * stored):  # compressed features are a half, never a hundredth
        raise ValueError(
            f"{path}: {name!r} would unpack {stored} bytes to {found.nbytes}; these are no measured numbers, write it again"
        )
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
