"""Files that are written whole or not at all, locks, and checked reading of tables, arrays and HDF5
datasets.
"""

import csv
import errno
import fcntl
import glob
import hashlib
import io
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
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

PathLike = str | os.PathLike
_log = logging.getLogger(__name__)
# What torch.load and np.load raise, beside ValueError, for files that were cut off or damaged, or are
# something else.
READ_ERRORS = (
    *(OSError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, AssertionError, OverflowError),
    *(struct.error, zipfile.BadZipFile, tokenize.TokenError),
)
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of tables that are not read
_LONGEST_LINE = 2**24  # characters
_LINES_OF_A_ROW = 2000  # no report has so many; a quote that is not closed makes one row of all that follow
_LONGEST_CELL = 2**23  # Python's default is 131,072 characters, and reports of 200 kB are real
_READING = threading.Lock()  # around the limit of a cell, see `_long_cells`


def error_reason(error: Exception) -> str:
    """The first sentence of a reader's error; torch goes on with the advice to run what the file holds, which
    nobody must follow.
    """
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0] if lines else type(error).__name__


@contextmanager
def room_for(path: PathLike) -> Iterator[None]:
    """Where the block finds no room on the disk, an OSError that names the file: writers seldom do."""
    try:
        yield
    except Exception as e:
        # torch raises an error of its own beside that of the file; of libraries in Rust only the text has its
        # number, and numpy's has none.
        number = getattr(e, "errno", None) or getattr(e.__context__, "errno", None)
        if found := re.search(r"\(os error (\d+)\)", str(e)):
            number = int(found[1])
        elif re.search(r"\d requested and \d+ written", str(e)):
            number = errno.ENOSPC
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = f"cannot be written ({os.strerror(number)}); make room and call again"
        raise OSError(number, reason, os.fspath(path)) from e


@contextmanager
def atomic(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it replaces `path` when the block ends, or is removed when
    the block raises.

    Raises:
        OSError: as `room_for`.
    """
    path = Path(path)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since a rename is atomic only within one file system. The name begins with a dot and
        # that of the file, so that `remove_unfinished_file` knows whose it is.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        tmp = Path(name)
        try:
            yield tmp
            # On the disk before it gets its name: otherwise a crash of the machine could leave an empty file of
            # that name.
            with open(tmp, "rb") as f:
                os.fsync(f.fileno())
            # mkstemp makes files that only their owner may read.
            tmp.chmod(0o666 & ~_umask())
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def file_lock(path: PathLike, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """One process at a time may write to `path` while the block lasts. Removes what a killed process left
    unfinished beside it.

    The lock is `.NAME.lock` beside the path: an flock, which the system gives back when the process ends,
    also by kill -9, so that a dead process never blocks. NFS and Lustre share it between machines where their
    locks are on. Where a file system has no locks, a warning says so and the work goes on. The file names the
    process that holds the lock, and is removed at the end.

    Args:
        wait: until the other process is done, which a warning says.
        shared: several processes may hold a shared lock together, but none beside one that is not shared. Where this
            process may not write, it reads without a lock.
    Raises:
        ValueError: another process is writing to it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    try:
        handle = _acquire(lock, path, wait, shared)
    except OSError as e:
        # A place that is mounted read-only, or not ours to write: it is only read, and others cannot be kept away.
        if not shared or e.errno not in (errno.EROFS, errno.EACCES):
            raise
        handle = -1
    if handle < 0:
        yield
        return
    try:
        # Whoever holds the lock alone knows that no other process is writing these files.
        if not shared:
            remove_unfinished_file(path)
        yield
    finally:
        with suppress(OSError):  # of a file system without locks
            # The last of several shared holders removes the file: only it gets the exclusive lock.
            if not shared or _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                lock.unlink(missing_ok=True)
        os.close(handle)


def _acquire(lock: Path, path: Path, wait: bool, shared: bool) -> int:
    """Lock the file `lock`; returns its handle."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # First without waiting, to be able to say who is waited for.
            if not _flock(handle, kind | fcntl.LOCK_NB):
                owner = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
                holder = "another run is writing to it"
                if owner:
                    holder += f" ({owner})"
                if not wait:
                    os.close(handle)
                    raise ValueError(f"{path}: {holder}; wait until it ends")
                _log.warning("%s: %s; waiting until it ends", path, holder)
                _flock(handle, kind)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(handle)
                raise
            _log.warning(
                "%s: this file system has no locks (%s), so make sure that no other run writes there",
                path,
                e.strerror,
            )
            return handle
        # The holder before may have removed the file meanwhile. Then this is a lock on nothing, and others
        # lock a new file: try again.
        if lock.exists() and os.path.samestat(os.fstat(handle), os.stat(lock)):
            # Several shared holders would overwrite each other's names.
            if not shared:
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
            return handle
        os.close(handle)


def _flock(handle: int, kind: int) -> bool:
    """Whether the lock was acquired; without LOCK_NB it waits."""
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        return False
    return True


def check_text_name(path: PathLike) -> None:
    """Raise where a path holds bytes that are no UTF-8: it could not be printed, or written into a table or
    store.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{os.fspath(path)!a}: must be a name that can be written as text (UTF-8); give another"
        ) from e


def check_writable(path: PathLike, *, folder: bool = False) -> None:
    """Raise where a file cannot be written, to fail before long work and not after it. Leaves nothing behind.

    Args:
        folder: `path` is a folder, in which files will be written.
    Raises:
        ValueError: a folder where a file must be or the other way round, a device, something that lies under
            a file, a place where nothing can be written, or a name that cannot be written as text.
    """
    path = Path(path)
    check_text_name(path)
    expected = "folder" if folder else "file"
    try:
        kind = _path_kind(path)
        if kind not in ("", expected):
            raise ValueError(f"{path}: must be a {expected} to write, and is a {kind}; give another name")
        if kind == "file" and not os.access(path, os.W_OK):
            raise ValueError(f"{path}: exists and is not writable; give another name")
        # Folders that are missing will be made, in the nearest one that exists.
        parent = path if kind == "folder" else path.parent
        while not os.path.lexists(parent) and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            raise ValueError(
                f"{path}: cannot be written, because {parent} is not a folder; give another place"
            )
        # Tried out: permission bits do not tell of file systems that are mounted read-only.
        with tempfile.TemporaryFile(dir=parent):
            pass
        # File systems allow 255 bytes; the temporary file has a longer name.
        if len(os.fsencode(path.name)) > 230:
            raise ValueError(f"{path}: the name is too long")
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({e.strerror}); give another place") from e


def _path_kind(path: Path) -> str:
    """What a path is: "folder", "file" or "device"; "" where nothing is, or a link leads nowhere."""
    if path.is_dir():
        return "folder"
    if path.is_file():
        return "file"
    return "device" if path.exists() else ""


def remove_unfinished_file(path: PathLike) -> None:
    """Remove temporary files and folders of one path that a killed process left; nobody may be writing it."""
    path = Path(path)
    # Escaped: a name with brackets is a pattern to glob.
    _remove(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def remove_unfinished(folder: PathLike) -> None:
    """Remove all temporary files and folders that a killed process left anywhere in a folder; nobody may be
    writing there.
    """
    _remove(Path(folder).rglob(".*.tmp"))


def _remove(paths: Iterable[Path]) -> None:
    # In reverse order, what lies in a temporary folder comes before that folder.
    for temporary in sorted(paths, reverse=True):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def check_name(name: str, noun: str) -> str:
    """The name, if it can be that of a file or folder: nothing may be written outside the folder it belongs
    to.

    A name that starts with a dot is refused too: temporary files are called so, and are removed after a kill.

    Args:
        noun: whose name it is, for the message, such as "adapter".
    Raises:
        ValueError: an empty name, one of more than 200 bytes, "." or "..", or one with a slash, a backslash
            or a control character.
    """
    too_long = len(name.encode("utf-8", "replace")) > 200  # file systems allow 255, and an ending is added
    forbidden = re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", name)
    if not name.strip() or name.startswith(".") or too_long or forbidden:
        raise ValueError(
            f"{noun} {name[:80]!r}: the name is used as a file name, so it must have 1 to 200 bytes, without "
            "/ and \\ and control characters, and must not start with a dot"
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
    files: list[Path] = []
    # Real paths of the folders above each folder that is still to be visited. A link back to one of them is a
    # circle; two links to one folder are not.
    ancestors: dict[str, set[str]] = {}

    # os.walk passes over what it cannot read, unless it is given this.
    def refuse(e: OSError) -> None:
        raise ValueError(
            f"{e.filename}: cannot be read ({e.strerror}); its contents would be left out"
        ) from e

    for current, folders, names in os.walk(Path(folder), onerror=refuse, followlinks=True):
        chain = ancestors.pop(current, set()) | {os.path.realpath(current)}
        for name in folders:
            below = os.path.join(current, name)
            if os.path.realpath(below) in chain:
                raise ValueError(f"{below}: is a link to a folder that contains it; remove it")
            ancestors[below] = chain
        files += [Path(current, name) for name in names]
    return files


def check_regular(path: PathLike) -> None:
    """Refuse a path that is there and is neither file nor folder: a pipe is waited for, a device read,
    without end.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # whoever opens it says why
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kind = "a device"
    if stat.S_ISFIFO(mode):
        kind = "a pipe"
    elif stat.S_ISSOCK(mode):
        kind = "a socket"
    raise ValueError(f"{path}: must be a file, found {kind}")


def read_csv(
    path: PathLike, columns: Iterable[str] = (), file: BinaryIO | None = None
) -> list[dict[str, str]]:
    """The rows of a CSV with a header line, as dicts of strings.

    Args:
        file: that is open already.
    Raises:
        ValueError: no such file, not UTF-8 text, other separators than commas, no rows, a missing or repeated
            column, a quote that is not closed, or a row with more or fewer cells than the header; says which
            line.
    """
    path = Path(path)
    check_regular(path)
    try:
        # All rows before any is returned: a fault in the last line is found before work on the first.
        with _long_cells():
            header, *rows = [*_csv_rows(path, file)] or [(1, [])]
    except FileNotFoundError as e:
        raise ValueError(f"{path}: no such file") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not a readable UTF-8 CSV ({e})") from e
    _, names = header
    # A table with other separators reads as one column whose name holds them all.
    if len(names) == 1:
        for mark, separator in SEPARATORS.items():
            if mark in names[0]:
                raise ValueError(
                    f"{path}: its cells are separated by {separator}; save the table with commas"
                )
    # Columns that nobody asks for may be there, under any name.
    missing = [column for column in columns if column not in names]
    if missing:
        present = ", ".join(map(repr, names)) or "an empty file"
        raise ValueError(f"{path}: must have the column {', '.join(map(repr, missing))}, found {present}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: the column {', '.join(map(repr, repeated))} is there more than once")
    # csv.DictReader would fill or drop cells without a word.
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}, line {line}: must have {len(names)} cells like the header, found {len(cells)}"
            )
    if not rows:
        raise ValueError(f"{path}: has a header and no rows")
    return [dict(zip(names, cells, strict=True)) for _, cells in rows]


@contextmanager
def _long_cells() -> Iterator[None]:
    """Python's limit is the whole process's: one table at a time raises it and puts it back."""
    with _READING:
        before = csv.field_size_limit(_LONGEST_CELL)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _csv_rows(path: Path, file: BinaryIO | None) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, cells) of each row that is not empty."""
    # Lines end in LF or CR LF. A CR alone is left in its line, where the reader refuses it outside quotes.
    with open(path, "rb") if file is None else nullcontext(file) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")
        reader = csv.reader(_csv_lines(text, path), strict=True)
        # By `next` and not by a loop over the reader, whose errors would not say in which line the row began.
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as e:
                advice = "is a quote not closed?"
                if "new-line" in str(e):
                    advice = "do lines end in CR alone? Save it with LF"
                raise ValueError(f"{path}, line {line}: not a readable CSV ({e}); {advice}") from e
            if row is None:
                text.detach()  # so that a file that was open stays open
                return
            if reader.line_num - line >= _LINES_OF_A_ROW:
                raise ValueError(
                    f"{path}, line {line}: this row would continue to line {reader.line_num}; is a quote not "
                    "closed?"
                )
            if row:
                yield line, row


def _csv_lines(f: TextIO, path: Path) -> Iterator[str]:
    """The lines of a table; raises where it is no text, before a file without line ends fills the memory."""
    # One character more than the limit is asked for, so that a line of exactly that length passes.
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
        # The csv module's default is CR LF.
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
    """The array of a .npy, memory-mapped: nothing is allocated before the size that the file claims was
    compared with its length.

    Raises:
        ValueError: no such file, no .npy, one of Python objects, or one that is cut off.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, *READ_ERRORS) as e:
        raise ValueError(f"{path}: not a whole .npy of numbers ({e})") from e
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: not a .npy of numbers (it is an archive of arrays)")
    return array


def read_array(path: PathLike, shape: tuple[int, ...], remedy: str) -> np.ndarray:
    """The numbers of a .npy of this shape.

    Raises:
        ValueError: the file is broken, or has another shape; ends with the remedy.
    """
    try:
        array = open_array(path)
    except ValueError as e:
        raise ValueError(f"{path}: must hold an array {list(shape)} and is broken ({e}); {remedy}") from e
    if array.shape != shape:
        raise ValueError(f"{path}: must hold an array {list(shape)}, found {list(array.shape)}; {remedy}")
    # A copy in memory, so that no file stays mapped.
    return np.array(array)


def check_uncompressed(path: PathLike) -> None:
    """Refuse a file of torch.save whose members unpack to more than the file is long: torch.save compresses
    nothing.
    """
    # torch.save before 1.6 wrote a plain pickle.
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as members:
            sizes = [m.file_size for m in members.infolist() if m.compress_type != zipfile.ZIP_STORED]
            scripted = any(name.endswith("/constants.pkl") for name in members.namelist())
    except (ValueError, *READ_ERRORS) as e:
        raise ValueError(f"{path}: is not a whole file of torch.save ({e})") from e
    if scripted:
        raise ValueError(
            f"{path}: is an archive of TorchScript with code, which is never run; if you trust it, write its "
            "weights alone: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW_FILE)"
        )
    if sizes:
        raise ValueError(
            f"{path}: must be uncompressed, as torch.save writes it; {len(sizes)} members are compressed and "
            f"unpack to {sum(sizes)} bytes"
        )


def check_tensor_storage(path: PathLike, tensors: Mapping[str, Any]) -> None:
    """Refuse tensors of a file of torch.save whose storage is smaller than they are: a stride of 0 repeats a
    few numbers without end.
    """
    for key, tensor in tensors.items():
        # Sparse and meta tensors have no storage of their size, so they count as too small.
        dense = str(tensor.layout) == "torch.strided" and not tensor.is_meta
        stored = tensor.untyped_storage().nbytes() if dense else 0
        if stored < tensor.numel() * tensor.element_size():
            raise ValueError(
                f"{path}: {key} must be {list(tensor.shape)} numbers of their own, the file holds {stored} "
                "bytes; write it again with tensor.contiguous()"
            )


def open_dataset(file: Any, name: str, path: PathLike) -> Any:
    """The dataset `name` of an open HDF5 file, which must lie in that file and be written in full. Nothing is
    read here.

    HDF5 follows links and external storage to any other file, and reads parts that were never written as
    zeros.

    Raises:
        ValueError: no dataset, a link, external storage or a virtual dataset; parts that were never written;
            a size that has nothing to do with what the file holds.
    """
    import h5py  # here: most users of this module read no HDF5

    key = name.encode()
    if not file.id.links.exists(key):
        present = ", ".join(map(repr, list(file)[:6])) or "none"
        raise ValueError(f"{path}: must hold a dataset {name!r}, found {present}")
    # A link could lead to any file that the user may read, which nobody expects of a downloaded file.
    if file.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise ValueError(
            f"{path}: {name!r} must be stored in this file, found a link; copy its target into the file"
        )
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{path}: {name!r} must be a dataset, found a {type(dataset).__name__.lower()}")
    properties = dataset.id.get_create_plist()
    if dataset.is_virtual or properties.get_external_count():
        raise ValueError(
            f"{path}: {name!r} must be stored in this file, found a dataset whose numbers are in other "
            "files; copy them into it"
        )
    stored = dataset.id.get_storage_size()
    # Chunks that were never written are missing from the file; a contiguous dataset has no storage then.
    if properties.get_layout() == h5py.h5d.CHUNKED:
        unit = "chunks"
        written = dataset.id.get_num_chunks()
        room = 1
        for length, step in zip(dataset.shape, dataset.chunks, strict=True):
            room *= -(-length // step)
    else:
        unit = "bytes"
        written = stored
        room = dataset.nbytes
    if written < room:
        raise ValueError(
            f"{path}: {name!r} has room for {room} {unit} and holds {written}; was its writer killed?"
        )
    # Compressed features take a half of their size, never a hundredth.
    if dataset.nbytes > max(2**26, 100 * stored):
        raise ValueError(
            f"{path}: {name!r} would unpack {stored} bytes to {dataset.nbytes}, so it cannot be real data; "
            "write it again"
        )
    return dataset
