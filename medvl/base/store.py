"""One HDF5 file of equally shaped arrays, found by name. A killed writer leaves each array whole or absent.

Layout, readable with plain h5py: dataset `arrays` [n, *shape], contiguous; dataset `rows` [n], a compound of `name`, `content` (a digest
of the array; stores that were made before it was kept lack it), the caller's fields and, last, `done`; file attributes `format`,
`version`, `settings` (JSON). The file is created whole, with all its room reserved (sparse: unwritten arrays take no disk), and never
changes its structure. So writers need neither HDF5 nor locks: they `pwrite` to an offset that is theirs, the array and its row first, then
fsync, then the one byte `done`. POSIX only.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import h5py
import numpy as np
from attrs import field, frozen

from medvl.base import files
from medvl.base.config import differences
from medvl.base.files import PathLike, open_dataset

FORMAT, VERSION = "medvl-store", 1
_OWN = ("name", "content", "done")  # fields of a row that are not the caller's


@frozen(kw_only=True, eq=False)
class Store:
    """A store as it was when opened; `names` are the arrays that were done then, in file order.

    Holds no open file: it may be pickled, forked and used by threads. Every read opens the file anew and checks that it is still the same.
    """

    path: Path
    settings: dict[str, Any]
    shape: tuple[int, ...]  # of one array
    dtype: np.dtype
    names: tuple[str, ...]
    _index: dict[str, int] = field(alias="index", repr=False)  # every name that has room
    _offset: int = field(alias="offset", repr=False)  # of `arrays` in the file, bytes
    _rows_offset: int = field(alias="rows_offset", repr=False)
    _row_dtype: np.dtype = field(alias="row_dtype", repr=False)
    _identity: tuple[int, int] = field(alias="identity", repr=False)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the caller's fields of a row."""
        return _fields(self._row_dtype)

    def read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """The array of `name`, or its entries first:stop along the first axis; a fresh copy.

        Raises:
            ValueError: no such name, not written yet, or the file was replaced since `open_store`.
        """
        first, stop, _ = slice(first, stop).indices(self.shape[0])
        out = np.empty((max(0, stop - first), *self.shape[1:]), self.dtype)
        with _same(self) as f:
            _read_row(self, f, name)
            step = out.itemsize * int(np.prod(self.shape[1:]))
            _read_into(f, self._offset + (self._index[name] * self.shape[0] + first) * step, out)
        return out

    def row(self, name: str) -> dict[str, Any]:
        """The caller's fields of `name`: str, int, float or tuples of them; raises like `read`."""
        with _same(self) as f:
            return _read_row(self, f, name)

    def content(self, name: str) -> str:
        """Digest of the array of `name`, 32 hex digits: what was made from the array keeps it, to know when the array became another.

        It is in the row; of a store that was made before rows held it, it is computed from the array. Raises like `read`.
        """
        if "content" not in (self._row_dtype.names or ()):
            return _digest(self.read(name))
        with _same(self) as f:
            return _read_record(self, f, name)["content"][0].decode()


def create(
    path: PathLike,
    names: Sequence[str],
    shape: Sequence[int],
    dtype: Any,
    settings: Mapping[str, Any],
    fields: Sequence[tuple],
) -> None:
    """Create a store with room for `names`, atomically; nothing in it is done.

    Args:
        shape, dtype: of one array.
        settings: plain data saying how the arrays are made; `open_store(expect=...)` compares it.
        fields: of a row, as for a numpy structured dtype: ("slope", "f8"), ("rule", "S16"), ("spacing_mm", "f8", 3).
    Raises:
        ValueError: the file exists, no names, repeated names, or a field called name, content or done.
    """
    if Path(path).exists():
        raise ValueError(f"{path}: exists already; open it, or remove it first")
    row_dtype = _row_dtype(names, np.dtype([_little(f) for f in fields]), path)
    with files.atomic(path) as tmp:
        _write_empty(
            tmp, names, tuple(shape), np.dtype(dtype).newbyteorder("<"), json.dumps(settings), row_dtype
        )


def grow(path: PathLike, names: Iterable[str]) -> None:
    """Make room for the names that a store lacks: a new file with all that is done copied, then put in the old one's place.

    Nobody may write to the store meanwhile; readers that have it open are told to open it again.
    """
    old = open_store(path)
    everything = [*old._index, *sorted(set(names) - set(old._index))]
    if len(everything) == len(old._index):
        return
    fields = np.dtype([_described(old._row_dtype, n) for n in _fields(old._row_dtype)])
    with files.atomic(path) as tmp:
        _write_empty(
            tmp,
            everything,
            old.shape,
            old.dtype,
            json.dumps(old.settings),
            _row_dtype(everything, fields, path),
        )
        new = open_store(tmp)
        with open(tmp, "r+b", buffering=0) as f:
            for name in old.names:
                record = _record(new._row_dtype, name, old.content(name), old.row(name), path)
                _put(f.fileno(), new, name, old.read(name), record, lambda _: None)


def open_store(path: PathLike, expect: Mapping[str, Any] | None = None) -> Store:
    """Open a store for reading, also while others write to it.

    Args:
        expect: the settings it must have been made with; None takes any.
    Raises:
        ValueError: no such file, not a store, truncated, another version, or other settings (all differences are listed).
    """
    path = Path(path)
    files.check_regular(path)
    try:
        with h5py.File(path, "r", locking=False) as f:
            _check_format(f, path)
            arrays, rows = (open_dataset(f, name, path) for name in ("arrays", "rows"))
            table, settings = rows[()], json.loads(f.attrs["settings"])
            places = {"offset": arrays.id.get_offset(), "rows_offset": rows.id.get_offset()}
            shape, dtype = arrays.shape[1:], arrays.dtype
    except FileNotFoundError as e:
        raise ValueError(f"{path}: no such file") from e
    except (OSError, KeyError) as e:
        raise ValueError(f"{path}: is not a whole store ({e})") from e
    if expect is not None and (found := differences(json.loads(json.dumps(expect)), settings)):
        raise ValueError(
            f"{path}: was made with other settings (wanted / found): {'; '.join(found)}. Use these settings, or another file"
        )
    names = [n.decode() for n in table["name"]]
    stat = os.stat(path)
    return Store(
        path=path,
        settings=settings,
        shape=shape,
        dtype=dtype,
        names=tuple(n for n, done in zip(names, table["done"], strict=True) if done),
        index={n: i for i, n in enumerate(names)},
        row_dtype=table.dtype,
        identity=(stat.st_ino, stat.st_size),
        **places,
    )


def put(store: Store, name: str, array: np.ndarray, row: Mapping[str, Any]) -> None:
    """Write one array and its row. Any number of processes may do so at once, each for names of its own.

    Args:
        store: opened at any time since the store was made or has grown; what it costs does not depend on the number of rows.
    Raises:
        ValueError: no room for the name, already written, another shape or dtype, a row that is not exactly the store's fields, or a
            file that was replaced since `open_store`.
    """
    if name not in store._index:
        raise ValueError(f"{store.path}: has no room for {name!r}; `grow` makes some")
    if array.shape != store.shape or array.dtype != store.dtype:
        raise ValueError(
            f"{store.path}: {name!r} must be {store.shape} {store.dtype}, got {array.shape} {array.dtype}"
        )
    with _same(store, "r+b") as f:
        if _stored_record(store, f, name)["done"][0]:  # as the file has it now, not as it was when opened
            raise ValueError(f"{store.path}: {name!r} is written already")
        record = _record(store._row_dtype, name, _digest(array), row, store.path)
        _put(f.fileno(), store, name, array, record, os.fsync)


def _put(
    fd: int, store: Store, name: str, array: np.ndarray, record: np.ndarray, sync: Callable[[int], None]
) -> None:
    at = store._rows_offset + store._index[name] * record.itemsize
    _write(fd, store._offset + store._index[name] * array.nbytes, np.ascontiguousarray(array))
    _write(fd, at, record)
    sync(fd)  # the flag must not reach the disk before what it vouches for
    _write(fd, at + record.itemsize - 1, np.ones(1, np.uint8))


def _little(f: tuple) -> tuple:
    return (f[0], np.dtype(f[1]).newbyteorder("<"), *f[2:])


def _described(dtype: np.dtype, name: str) -> tuple:
    kind = dtype[name]
    return (name, kind.base, kind.shape) if kind.shape else (name, kind)


def _fields(row_dtype: np.dtype) -> tuple[str, ...]:
    """The caller's: all but the store's own."""
    return tuple(name for name in row_dtype.names or () if name not in _OWN)


def _row_dtype(names: Sequence[str], fields: np.dtype, path: PathLike) -> np.dtype:
    if not names or len(set(names)) != len(names) or "" in names:
        raise ValueError(
            f"{path}: a store needs names, each once and none empty; got {len(names)}, {len(set(names))} different"
        )
    if set(_OWN) & set(fields.names or ()):
        raise ValueError(f"{path}: the fields {', '.join(_OWN)} are the store's own; name yours otherwise")
    width = max(len(n.encode()) for n in names)
    return np.dtype(
        [
            ("name", f"S{width}"),
            ("content", "S32"),
            *(_described(fields, n) for n in fields.names or ()),
            ("done", "u1"),
        ]
    )


def _write_empty(
    tmp: Path,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    settings: str,
    row_dtype: np.dtype,
) -> None:
    rows = np.zeros(len(names), row_dtype)
    rows["name"] = [n.encode() for n in names]
    with h5py.File(tmp, "w", locking=False) as f:
        f.attrs.update({"format": FORMAT, "version": VERSION, "settings": settings})
        f.create_dataset("rows", data=rows)
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.CONTIGUOUS)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # the offset is fixed now
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # and nothing is written there
        plan.set_obj_track_times(False)
        space = h5py.h5s.create_simple((len(names), *shape))
        h5py.h5d.create(f.id, b"arrays", h5py.h5t.py_create(dtype, logical=True), space, plan)


def _check_format(f: h5py.File, path: Path) -> None:
    if f.attrs.get("format") != FORMAT:
        raise ValueError(
            f"{path}: is an HDF5 file, but not a store of medvl (it lacks the attribute format={FORMAT!r})"
        )
    if f.attrs.get("version") != VERSION:
        raise ValueError(
            f"{path}: is a store of version {f.attrs.get('version')}, this medvl reads version {VERSION}; make it again"
        )


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, digest_size=16
    ).hexdigest()


def _record(dtype: np.dtype, name: str, content: str, row: Mapping[str, Any], path: PathLike) -> np.ndarray:
    """[1] of `dtype`, not done; a text that does not fit is refused, not cut."""
    wanted = set(_fields(dtype))
    if set(row) != wanted:
        raise ValueError(
            f"{path}: the row of {name!r} must have {', '.join(sorted(wanted))}, got {', '.join(sorted(row))}"
        )
    record = np.zeros(1, dtype)
    own = {"name": name, "content": content} if "content" in (dtype.names or ()) else {"name": name}
    for key, value in {**own, **row}.items():
        value = value.encode() if isinstance(value, str) else value
        room = dtype[key].itemsize
        if isinstance(value, bytes) and len(value) > room:
            raise ValueError(
                f"{path}: {key} of {name!r} may have {room} bytes, got {len(value)}: {value.decode()!r}"
            )
        record[key] = value
    return record


@contextmanager
def _same(store: Store, mode: Literal["rb", "r+b"] = "rb") -> Iterator[BinaryIO]:
    """The store's file, opened; refuses another file that has taken its place, whose offsets are others."""
    try:
        with open(store.path, mode, buffering=0) as f:
            stat = os.fstat(f.fileno())
            if (stat.st_ino, stat.st_size) != store._identity:
                raise ValueError(f"{store.path}: was replaced since it was opened; open it again")
            yield f
    except OSError as e:
        raise ValueError(
            f"{store.path}: cannot be {'read' if mode == 'rb' else 'written'} ({e.strerror})"
        ) from e


def _read_row(store: Store, f: BinaryIO, name: str) -> dict[str, Any]:
    record = _read_record(store, f, name)
    return {key: _plain(record[key][0]) for key in _fields(record.dtype)}


def _read_record(store: Store, f: BinaryIO, name: str) -> np.ndarray:
    if name not in store._index:
        raise ValueError(
            f"{store.path}: has no {name!r}; it has {len(store.names)} arrays, such as {', '.join(store.names[:3]) or 'none yet'}"
        )
    record = _stored_record(store, f, name)
    if not record["done"][0]:
        raise ValueError(f"{store.path}: {name!r} is not written (yet)")
    return record


def _stored_record(store: Store, f: BinaryIO, name: str) -> np.ndarray:
    record = np.zeros(1, store._row_dtype)
    _read_into(f, store._rows_offset + store._index[name] * record.itemsize, record)
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value.tolist()) if isinstance(value, np.ndarray) else value.item()


def _read_into(f: BinaryIO, offset: int, out: np.ndarray) -> None:
    view, at = _bytes(out), 0
    f.seek(offset)
    while at < len(view):
        got = f.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise ValueError(f"{f.name}: is truncated")
        at += got


def _write(fd: int, offset: int, data: np.ndarray) -> None:
    view, at = _bytes(data), 0
    while at < len(view):
        at += os.pwrite(fd, view[at:], offset + at)


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
