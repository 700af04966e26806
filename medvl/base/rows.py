"""HDF5 files of rows with reserved room: a killed writer leaves each row whole or absent.

Layout, readable with plain h5py: contiguous datasets of numbers; the dataset `rows`, a compound table with
one record for each row, whose first field is `name` and whose last is `done`; file attributes `format`,
`version` and `settings` (JSON). Which numbers of a dataset belong to a row is for the kind of store to say:
arrays of one shape (`store`), or rows of different lengths (`slides.store`).

The file is created whole, with all its room reserved (sparse: room that is not written takes no disk), and
never changes its structure. So writers need neither HDF5 nor a lock between them: each writes to offsets that
are its row's alone, numbers and record first, then fsync, then the one byte `done`. POSIX only.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from attrs import field, frozen

from medvl.base import files
from medvl.base.files import PathLike

_COPY = 2**24  # bytes that `copy_row` holds at once


@frozen(kw_only=True)
class Kind:
    """A kind of store: what its files call themselves, and what messages call its rows."""

    format: str
    version: int
    noun: str


@frozen(kw_only=True)
class Dataset:
    """Where the numbers of a dataset lie in the file, without gaps."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype


class _Descriptor:
    """An open file. It is closed with the last reference to it, so no thread reads from a reused number."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when Python ends
        if hasattr(self, "number"):
            close(self.number)


class _Kept:
    """Holds the descriptor of a file that is read often. A pickled copy holds none."""

    def __init__(self) -> None:
        self.descriptor: _Descriptor | None = None

    def __reduce__(self) -> tuple:
        return _Kept, ()


@frozen(kw_only=True, eq=False)
class Rows:
    """A file of rows as it was when opened; `names` are the rows that were done then, in file order.

    It may be pickled, forked and used by threads. The file is opened at the first read and kept open; reads
    are `pread`, which has no position that threads or forked processes could move. Every read checks that the
    path still leads to the same file: another one that has taken its place has its rows elsewhere.
    """

    path: Path
    kind: Kind
    settings: dict[str, Any]
    names: tuple[str, ...]
    table: np.ndarray = field(repr=False)  # the records, done or not
    index: dict[str, int] = field(repr=False)  # every name that has room -> its record
    datasets: dict[str, Dataset] = field(repr=False)
    _identity: tuple[int, int] = field(alias="identity", repr=False)
    _kept: _Kept = field(factory=_Kept, alias="kept", repr=False)

    def record(self, name: str) -> np.void:
        """The record of a row that is done.

        One that was done when the file was opened is never written again, so it comes from memory, without
        a system call. That the file is still the same is checked where its numbers are read.

        Raises:
            ValueError: no such name, or not written yet.
        """
        i = self.index.get(name, -1)
        if i < 0:
            some = ", ".join(self.names[:3]) or "none yet"
            raise ValueError(
                f"{self.path}: has no {name!r}; it has {len(self.names)} {self.kind.noun}, such as {some}"
            )
        record = self.table[i]
        if not record["done"]:
            record = self.read("rows", i, (1,))[0]  # it may have been written since
        if not record["done"]:
            raise ValueError(f"{self.path}: {name!r} is not written (yet)")
        return record

    def read(self, dataset: str, first: int, shape: Sequence[int]) -> np.ndarray:
        """Numbers of a dataset from number `first` on, in this shape; a fresh copy.

        Raises:
            ValueError: the file was replaced or removed since it was opened, or is truncated.
        """
        place = self.datasets[dataset]
        array = np.empty(tuple(shape), place.dtype)
        at = place.offset + first * place.dtype.itemsize
        view = _bytes(array)
        descriptor = self._open()
        try:
            # A read may return less than it was asked for, at most 2 GiB at a time.
            while len(view):
                count = os.preadv(descriptor.number, [view], at)
                if not count:
                    raise ValueError(f"{self.path}: is truncated")
                view, at = view[count:], at + count
        except OSError as e:
            raise ValueError(f"{self.path}: cannot be read ({e.strerror})") from e
        return array

    def _open(self) -> _Descriptor:
        """The open file, the same as when its table was read.

        Raises:
            ValueError: the path leads to no file, or to another than when it was opened.
        """
        try:
            if _identity(os.stat(self.path)) != self._identity:
                self._kept.descriptor = None  # which would keep the disk of a file that is gone
                raise _replaced(self.path)
            descriptor = self._kept.descriptor
            if descriptor is None:
                descriptor = _Descriptor(self.path)
                if _identity(os.fstat(descriptor.number)) != self._identity:
                    raise _replaced(self.path)
                self._kept.descriptor = descriptor
            return descriptor
        except OSError as e:
            raise ValueError(f"{self.path}: cannot be read ({e.strerror})") from e


@frozen(kw_only=True)
class RowWriter:
    """Writes one row; `finish` makes it visible."""

    rows: Rows
    name: str
    _descriptor: int = field(alias="descriptor")
    _durable: bool = field(alias="durable")

    def write(self, dataset: str, first: int, values: np.ndarray) -> None:
        """Write numbers into a dataset from number `first` on."""
        place = self.rows.datasets[dataset]
        self._write_at(place.offset + first * place.dtype.itemsize, _bytes(np.ascontiguousarray(values)))

    def finish(self, record: np.ndarray) -> None:
        """Write the record [1], wait for the disk, and flag the row as done."""
        i, table = self.rows.index[self.name], self.rows.datasets["rows"]
        # `done` is a record's last byte. Written with the rest, it could reach the disk before the numbers.
        record["done"] = 0
        self.write("rows", i, record)
        self._sync()  # the flag must not reach the disk before what it vouches for
        self._write_at(table.offset + (i + 1) * table.dtype.itemsize - 1, memoryview(b"\1"))
        self._sync()

    def _write_at(self, offset: int, data: memoryview) -> None:
        try:
            while len(data):
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as e:
            raise _unwritable(self.rows.path, e) from e

    def _sync(self) -> None:
        if not self._durable:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as e:
            raise _unwritable(self.rows.path, e) from e


def create_rows(
    path: PathLike,
    kind: Kind,
    settings: Mapping[str, Any],
    table: np.ndarray,
    datasets: Mapping[str, tuple[tuple[int, ...], np.dtype]],
) -> None:
    """Write a file with a table of records, and room for datasets {name: (shape, dtype)} in this order.

    It is written in place: callers put it into a `files.atomic` path.
    """
    assert table.dtype.names is not None
    assert (table.dtype.names[0], table.dtype.names[-1]) == ("name", "done")
    with h5py.File(path, "w", locking=False) as f:
        f.attrs.update(
            {"format": kind.format, "version": kind.version, "settings": json.dumps(dict(settings))}
        )
        f.create_dataset("rows", data=table)
        for name, (shape, dtype) in datasets.items():
            _reserve(f, name, shape, dtype)


def _reserve(f: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # the offset is fixed now
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # and nothing is written there
    plan.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(f.id, name.encode(), h5py.h5t.py_create(dtype, logical=True), space, plan)


def open_rows(path: PathLike, kind: Kind, datasets: Sequence[str]) -> Rows:
    """Open a file for reading, also while others write to it.

    Raises:
        ValueError: no such file, another kind of file or version, truncated, or a dataset that is missing or
            not as `create_rows` writes it.
    """
    path = Path(path)
    files.check_regular(path)
    places = {}
    try:
        # Without HDF5's lock, which fails where a file system has none; the structure never changes.
        with h5py.File(path, "r", locking=False) as f:
            _check_format(f, path, kind)
            for name in (*datasets, "rows"):
                dataset = files.open_dataset(f, name, path)
                # Chunked or compressed datasets have none, so they are not of `create_rows`.
                offset = dataset.id.get_offset()
                if offset is None:
                    raise ValueError(
                        f"{path}: must be a store that medvl wrote; its arrays are not contiguous"
                    )
                places[name] = Dataset(offset=offset, shape=dataset.shape, dtype=dataset.dtype)
            table, settings = f["rows"][()], json.loads(f.attrs["settings"])
            # Of the file that is open here, which the path may not lead to any more.
            identity = _identity(os.fstat(f.id.get_vfd_handle()))
        names = [name.decode() for name in table["name"]]
        written = [name for name, flag in zip(names, table["done"], strict=True) if flag]
    except FileNotFoundError as e:
        raise ValueError(f"{path}: no such file") from e
    except (OSError, LookupError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: is not a whole store ({e})") from e
    return Rows(
        path=path,
        kind=kind,
        settings=settings,
        names=tuple(written),
        table=table,
        index={name: i for i, name in enumerate(names)},
        datasets=places,
        identity=identity,
    )


def _check_format(f: h5py.File, path: Path, kind: Kind) -> None:
    version = f.attrs.get("version")
    if f.attrs.get("format") != kind.format:
        raise ValueError(
            f"{path}: is an HDF5 file, but not a store of medvl (it lacks the attribute "
            f"format={kind.format!r})"
        )
    if version != kind.version:
        raise ValueError(
            f"{path}: is a store of version {version}, this medvl reads version {kind.version}; make it again"
        )


@contextmanager
def row_writer(rows: Rows, name: str, durable: bool = True) -> Iterator[RowWriter]:
    """Write the row of a name that has room. Any number of processes may write at once, each rows of its own.

    A row whose writer does not come to `finish` stays absent, and may be written again.

    Args:
        durable: wait for the disk, so that a power cut keeps the row; False where the caller waits for the
            whole file.
    Raises:
        ValueError: the row is written already, or the file was replaced since it was opened or cannot be
            written.
    """
    try:
        descriptor = os.open(rows.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise _unwritable(rows.path, e) from e
    # A descriptor of its own, for writing; closed when the block ends.
    try:
        if _identity(os.fstat(descriptor)) != rows._identity:
            raise _replaced(rows.path)
        # As the file has it now, not as it was when opened.
        if rows.read("rows", rows.index[name], (1,))["done"][0]:
            raise ValueError(f"{rows.path}: {name!r} is written already")
        yield RowWriter(rows=rows, name=name, descriptor=descriptor, durable=durable)
    finally:
        os.close(descriptor)


def copy_row(
    old: Rows, new: Rows, name: str, record: np.ndarray, spans: Mapping[str, tuple[int, int, int]]
) -> None:
    """Copy a row into a file that nobody else sees yet. `files.atomic` waits for the disk, once for all.

    Args:
        record: [1], what stands in the new file.
        spans: {dataset: (first number in the old file, first in the new one, how many)}.
    """
    with row_writer(new, name, durable=False) as writer:
        for dataset, (source, target, count) in spans.items():
            step = _COPY // new.datasets[dataset].dtype.itemsize
            for at in range(0, count, step):
                values = old.read(dataset, source + at, (min(step, count - at),))
                writer.write(dataset, target + at, values)
        writer.finish(record)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    # The size too: a new file may get the inode of the one it replaces. No time, since writers change it.
    return stat.st_ino, stat.st_size


def _unwritable(path: Path, e: OSError) -> ValueError:
    return ValueError(f"{path}: cannot be written ({e.strerror})")


def _replaced(path: Path) -> ValueError:
    return ValueError(f"{path}: was replaced since it was opened; open it again")


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
