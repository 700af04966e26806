"""One HDF5 file of equally shaped arrays, found by name. A killed writer leaves each array whole or absent.

Layout (`rows` says how it is written): dataset `arrays` [n, *shape]; dataset `rows` [n], whose fields are
`name`, `content` (a digest of the array; stores of earlier versions lack it), the caller's fields and, last,
`done`.

Machines must not write into one file over a network. For them a store is a folder: `index.h5` has room for
all names, and each process that writes has a file of the same names beside it, a shard.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from medvl.base import files, rows
from medvl.base.config import differences
from medvl.base.files import PathLike
from medvl.base.rows import Rows

_KIND = rows.Kind(format="medvl-store", version=1, noun="arrays")
_OWN = ("name", "content", "done")  # fields of a row that are not the caller's
_INDEX = "index.h5"  # in a folder of shards


@frozen(kw_only=True, eq=False)
class Store:
    """A store as it was when opened; `names` are the arrays that were done then, in file order.

    It may be pickled, forked and used by threads, as `rows.Rows`.
    """

    path: Path
    settings: dict[str, Any]
    shape: tuple[int, ...]  # of one array
    dtype: np.dtype
    names: tuple[str, ...]
    fields: tuple[str, ...]  # of a row, those that are the caller's
    _rows: Rows = field(alias="rows", repr=False)
    _shards: dict[str, Rows] = field(alias="shards", factory=dict, repr=False)  # which of them has a name

    def read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """The array of `name`, or its entries first:stop along the first axis; a fresh copy.

        Raises:
            ValueError: no such name, not written yet, or the file was replaced since `open_store`.
        """
        first, stop, _ = slice(first, stop).indices(self.shape[0])
        entry = prod(self.shape[1:])
        holder = self._holder(name)
        holder.record(name)  # refuses what is not there
        start = (holder.index[name] * self.shape[0] + first) * entry
        return holder.read("arrays", start, (max(0, stop - first), *self.shape[1:]))

    def row(self, name: str) -> dict[str, Any]:
        """The caller's fields of `name`: str, int, float or tuples of them.

        Raises:
            ValueError: no such name, or not written yet.
        """
        record = self._holder(name).record(name)
        return {key: _plain(record[key]) for key in self.fields}

    def content(self, name: str) -> str:
        """Digest of the array of `name`, 32 hex digits.

        What was made from the array keeps it, to know when the array became another. It is in the row; for a
        store of an earlier version it is computed from the array, which raises like `read`.
        """
        if "content" not in (self._rows.table.dtype.names or ()):
            return _digest(self.read(name))
        return self._holder(name).record(name)["content"].decode()

    def _holder(self, name: str) -> Rows:
        return self._shards.get(name, self._rows)


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
        fields: of a row, as for a numpy structured dtype: ("slope", "f8"), ("rule", "S16"), ("spacing_mm",
            "f8", 3).
    Raises:
        ValueError: the file exists, no names, repeated names, or a field called name, content or done.
    """
    if Path(path).exists():
        raise ValueError(f"{path}: exists already; open it, or remove it first")
    caller = np.dtype([_little(f) for f in fields])
    table = _empty_table(path, names, caller)
    with files.atomic(path) as tmp:
        _write_empty(tmp, table, tuple(shape), np.dtype(dtype).newbyteorder("<"), settings)


def grow(path: PathLike, names: Iterable[str]) -> None:
    """Make room for the names that a store lacks: a copy with more room is put in the old file's place.

    Nobody may write to the store meanwhile; readers that have it open are told to open it again.
    """
    path = main_file(path)
    old = open_store(path)
    index = old._rows.index
    added = sorted(set(names) - set(index))
    if not added:
        return
    with files.atomic(path) as tmp:
        new = _write_like(old, tmp, [*index, *added])
        size = prod(old.shape)
        for name in old.names:
            record = _record(new, name, old.content(name), old.row(name))
            span = index[name] * size, new._rows.index[name] * size, size
            rows.copy_row(old._rows, new._rows, name, record, {"arrays": span})


def open_store(path: PathLike, expect: Mapping[str, Any] | None = None) -> Store:
    """Open a store for reading, also while others write to it.

    Args:
        expect: the settings it must have been made with; None takes any.
    Raises:
        ValueError: no such file, not a store, truncated, another version, or other settings (all differences
            are listed).
    """
    opened, shards = rows.open_rows(main_file(path), _KIND, ["arrays"]), dict[str, Rows]()
    if expect is not None:
        wanted = json.loads(json.dumps(expect))
        different = differences(wanted, opened.settings)
        if different:
            raise ValueError(
                f"{path}: was made with other settings (wanted / found): {'; '.join(different)}. "
                "Use these settings, or another file"
            )
    if Path(path).is_dir():
        for file in sorted(Path(path).glob("*.h5")):
            shard = open_store(file, expect=opened.settings)
            # A name that two hold, since the first worker was lost before it could say so, counts once.
            shards |= dict.fromkeys(shard.names, shard._rows)
        opened = evolve(opened, names=tuple(name for name in opened.index if name in shards))
    arrays = opened.datasets["arrays"]
    return Store(
        path=Path(path),
        settings=opened.settings,
        shape=arrays.shape[1:],
        dtype=arrays.dtype,
        names=opened.names,
        fields=_fields(opened.table.dtype),
        rows=opened,
        shards=shards,
    )


def main_file(path: PathLike) -> Path:
    """The file of a store that has room for all names: the store itself, or the index in a folder of shards."""
    index = Path(path) / _INDEX
    return index if index.is_file() else Path(path)


def begin_shards(path: PathLike) -> Path:
    """Make a folder for shards, or go on with one; returns where its index is, or is to be created.

    Raises:
        ValueError: something else is there, such as a store of one file.
    """
    index = Path(path) / _INDEX
    if not index.exists() and (Path(path).is_file() or any(Path(path).glob("[!.]*"))):
        raise ValueError(
            f"{path}: is not a folder of shards, and a cluster can only write to one; go on without a "
            "cluster, or give another name"
        )
    index.parent.mkdir(parents=True, exist_ok=True)
    files.remove_unfinished(index.parent)
    return index


def open_shard(path: PathLike) -> Store:
    """A new file in a folder of shards, for this process to `put` any of the store's names into."""
    index, file = open_store(main_file(path)), Path(path) / f"{uuid.uuid4().hex}.h5"
    with files.atomic(file) as tmp:
        _write_like(index, tmp, [*index._rows.index])
    return open_store(file)


def put(store: Store, name: str, array: np.ndarray, row: Mapping[str, Any]) -> None:
    """Write one array and its row. Any number of processes may do so at once, each for names of its own.

    Args:
        store: opened at any time since the store was made or has grown; what it costs does not depend on the
            number of rows.
    Raises:
        ValueError: no room for the name, already written, another shape or dtype, a row that is not exactly
            the store's fields, or a file that was replaced since `open_store`.
    """
    index = store._rows.index
    if name not in index:
        raise ValueError(f"{store.path}: has no room for {name!r}; `grow` makes some")
    if array.shape != store.shape or array.dtype != store.dtype:
        raise ValueError(
            f"{store.path}: {name!r} must be {store.shape} {store.dtype}, got {array.shape} {array.dtype}"
        )
    with rows.row_writer(store._rows, name) as writer:
        record = _record(store, name, _digest(array), row)
        writer.write("arrays", index[name] * array.size, array)
        writer.finish(record)


def _empty_table(path: PathLike, names: Sequence[str], caller: np.dtype) -> np.ndarray:
    """The table of a store in which nothing is done, with the caller's fields behind the store's own."""
    if not names or len(set(names)) != len(names) or "" in names:
        raise ValueError(
            f"{path}: a store needs names, each once and none empty; got {len(names)}, {len(set(names))} "
            "different"
        )
    if set(_OWN) & set(caller.names or ()):
        raise ValueError(f"{path}: the fields {', '.join(_OWN)} are reserved; name yours differently")
    encoded = [name.encode() for name in names]
    width = max(len(name) for name in encoded)
    fields = [_described(caller, name) for name in caller.names or ()]
    table = np.zeros(len(names), [("name", f"S{width}"), ("content", "S32"), *fields, ("done", "u1")])
    table["name"] = encoded
    return table


def _write_like(old: Store, tmp: Path, names: Sequence[str]) -> Store:
    """An empty store with room for `names`, of the shape, settings and fields of `old`."""
    dtype = old._rows.table.dtype
    caller = np.dtype([_described(dtype, name) for name in _fields(dtype)])
    _write_empty(tmp, _empty_table(old.path, names, caller), old.shape, old.dtype, old.settings)
    return open_store(tmp)


def _write_empty(
    tmp: Path, table: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, settings: Mapping[str, Any]
) -> None:
    rows.create_rows(tmp, _KIND, settings, table, {"arrays": ((len(table), *shape), dtype)})


def _record(store: Store, name: str, content: str, row: Mapping[str, Any]) -> np.ndarray:
    """The record [1] of an array; a text that does not fit is refused, not cut."""
    dtype = store._rows.table.dtype
    fields = set(store.fields)
    if set(row) != fields:
        raise ValueError(
            f"{store.path}: the row of {name!r} must have {', '.join(sorted(fields))}, got "
            f"{', '.join(sorted(row))}"
        )
    values: dict[str, Any] = {"name": name, **row}
    if "content" in (dtype.names or ()):
        values["content"] = content
    record = np.zeros(1, dtype)
    for key, value in values.items():
        if isinstance(value, str):
            value = value.encode()
        room = dtype[key].itemsize
        if isinstance(value, bytes) and len(value) > room:
            raise ValueError(
                f"{store.path}: {key} of {name!r} may have {room} bytes, got {len(value)}: {value.decode()!r}"
            )
        record[key] = value
    return record


def _fields(dtype: np.dtype) -> tuple[str, ...]:
    return tuple(name for name in dtype.names or () if name not in _OWN)


def _little(f: tuple) -> tuple:
    return (f[0], np.dtype(f[1]).newbyteorder("<"), *f[2:])


def _described(dtype: np.dtype, name: str) -> tuple:
    """A field as `np.dtype` takes it."""
    kind = dtype[name]
    return (name, kind.base, kind.shape) if kind.shape else (name, kind)


def _digest(array: np.ndarray) -> str:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return value.item()
