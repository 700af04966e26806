"""One HDF5 file with the patch features of many slides, made to be streamed. Each slide is whole or absent.

Layout (`base.rows` says how it is written): datasets `features` [n, d] and `coords` [n, 2], with the patches
of all slides behind each other; dataset `rows`, one record for each slide: where its patches start, how many
there are, and what is known of it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen

from medvl.base import files, rows
from medvl.base.display import track
from medvl.base.files import PathLike
from medvl.base.rows import Rows
from medvl.slides.features import About, Slide, patch_size_of
from medvl.slides.formats import STORE, Block

_KIND = rows.Kind(format=STORE, version=1, noun="slides")
_FIELDS = (  # of a row, between its name and `done`
    ("start", "<i8"),
    ("room", "<i8"),
    ("count", "<i8"),  # patches; less than there is room for where some were dropped
    ("has_coords", "u1"),
    ("patch_size", "<i8"),  # level-0 pixels, -1 unknown
    ("mpp", "<f8"),  # NaN unknown, like the next
    ("magnification", "<f8"),
    ("encoder", "S64"),  # as the source says it
    ("source", "S255"),  # name of the file it was read from
    ("digest", "S64"),  # SHA-256 of features and coordinates as they lie here
    ("key", "S64"),  # SHA-256 of `features.read_file_key` of the source; stores of earlier versions have none
)


@frozen(kw_only=True, eq=False)
class Slides:
    """A store as it was when opened; `names` are the slides that were done then, in file order.

    It may be pickled, forked and used by threads, as `rows.Rows`.
    """

    path: Path
    dims: int
    dtype: np.dtype
    encoder: str  # "" unknown
    names: tuple[str, ...]
    _rows: Rows = field(alias="rows", repr=False)

    def about(self, name: str) -> About:
        """What is known of a slide; raises ValueError where it is not in the store."""
        record = self._rows.record(name)
        return About(
            name=name,
            rows=int(record["count"]),
            dims=self.dims,
            dtype=self.dtype,
            has_coords=bool(record["has_coords"]),
            patch_size=None if record["patch_size"] < 0 else int(record["patch_size"]),
            mpp=_number_or_none(record["mpp"]),
            magnification=_number_or_none(record["magnification"]),
            encoder=self.encoder,
        )

    def source(self, name: str) -> tuple[str, str]:
        """(name of the file a slide was read from, SHA-256 of its content here)."""
        record = self._rows.record(name)
        return record["source"].decode(), record["digest"].decode()

    def source_key(self, name: str) -> str:
        """SHA-256 of what `features.read_file_key` said of that file; "" in a store of an earlier version."""
        record = self._rows.record(name)
        if "key" not in (record.dtype.names or ()):
            return ""
        return record["key"].decode()

    def room(self, name: str) -> int:
        """How many patches there is room for under this name; -1 where it is not in the file."""
        i = self._rows.index.get(name)
        if i is None:
            return -1
        return int(self._rows.table["room"][i])

    def chunks(self, name: str, size: int = 4096) -> Iterator[Block]:
        """The patches of a slide, `size` at a time, as `features.chunks`; every chunk is a fresh array."""
        # Not a generator itself: a wrong size or name raises here, and not at the first chunk.
        if size < 1:
            raise ValueError(f"chunks: size must be at least 1 patch, got {size}")
        record = self._rows.record(name)
        count = int(record["count"])
        return (_patches(self, record, at, min(size, count - at)) for at in range(0, count, size))

    def read(self, name: str) -> Slide:
        """All patches of a slide.

        Raises:
            ValueError: no such slide, or the file was replaced (by `pack`, to make room) or truncated since
                it was opened.
        """
        header = self.about(name)
        features, coords = _patches(self, self._rows.record(name), 0, header.rows)
        return Slide(
            name=name,
            features=features,
            coords=coords,
            patch_size=header.patch_size,
            mpp=header.mpp,
            magnification=header.magnification,
            encoder=header.encoder,
        )


def _number_or_none(value: np.floating) -> float | None:
    return None if np.isnan(value) else float(value)


def open_slides(path: PathLike) -> Slides:
    """Open a store of slides for reading, also while another process packs into it.

    Raises:
        ValueError: no such file, not a store of slides, truncated, or of another version.
    """
    opened = rows.open_rows(path, _KIND, ["features", "coords"])
    features, coords = opened.datasets["features"], opened.datasets["coords"]
    patches, dims = features.shape
    if coords.shape != (patches, 2) or coords.dtype != np.dtype("<i8"):
        raise ValueError(
            f"{path}: coords must be [{patches}, 2] of int64, found {coords.shape} {coords.dtype}"
        )
    try:
        start, room, count = (opened.table[key] for key in ("start", "room", "count"))
        encoder = opened.settings["encoder"]
    except (LookupError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: is not a whole store ({e})") from e
    # A damaged table must not read the patches of another slide.
    beyond = (start < 0) | (count < 0) | (count > room) | (start + room > patches)
    if beyond.any():
        raise ValueError(f"{path}: names patches beyond the {patches} that it holds; pack it again")
    return Slides(
        path=opened.path,
        dims=dims,
        dtype=features.dtype,
        encoder=encoder,
        names=opened.names,
        rows=opened,
    )


def _patches(store: Slides, record: np.void, first: int, count: int) -> Block:
    """Patches first:first + count of a slide."""
    start = int(record["start"]) + first
    # Offsets are in numbers, not in patches: a patch has d features and two coordinates.
    x = store._rows.read("features", start * store.dims, (count, store.dims))
    xy = None
    if record["has_coords"]:
        xy = store._rows.read("coords", start * 2, (count, 2))
    return x, xy


def make_room(
    path: Path,
    old: Slides | None,
    new: Mapping[str, int],
    settings: Mapping[str, Any],
    progress: bool = False,
) -> None:
    """Create a store, or replace one by a copy with more room; nobody may write to it meanwhile.

    Args:
        old: what is done in it is copied, except `new`; None creates a store.
        new: {name: how many patches to reserve room for}.
        settings: dims, encoder and dtype of all slides.
    """
    copied: list[str] = []
    rooms: list[int] = []
    if old is not None:
        for name in old.names:
            if name not in new:
                copied.append(name)
                # Only what is used: room that was left over because patches were dropped is not copied.
                rooms.append(int(old._rows.record(name)["count"]))
    rooms += new.values()
    names = [name.encode() for name in (*copied, *new)]
    width = max((len(name) for name in names), default=1)
    table = np.zeros(len(names), [("name", f"S{width}"), *_FIELDS, ("done", "u1")])
    table["name"] = names
    table["room"] = rooms
    table["start"] = np.cumsum(table["room"]) - table["room"]  # behind each other, in this order
    patches = max(1, int(table["room"].sum()))  # the datasets are never empty, even if all slides are
    datasets = {
        "coords": ((patches, 2), np.dtype("<i8")),
        "features": ((patches, settings["dims"]), np.dtype(settings["dtype"]).newbyteorder("<")),
    }
    with files.atomic(path) as tmp:
        rows.create_rows(tmp, _KIND, settings, table, datasets)
        if old is not None:
            copy = open_slides(tmp)
            for name in track(copied, "copying slides", show=progress):
                _copy_slide(old, copy, name)


def _copy_slide(old: Slides, new: Slides, name: str) -> None:
    record = _reserved(new, name)
    source = old._rows.record(name)
    # A store of an earlier version has fewer fields; where the patches lie is each file's own.
    for key in {*(source.dtype.names or ())} - {"name", "start", "room", "done"}:
        record[key] = source[key]
    first, target, count = int(source["start"]), int(record["start"][0]), int(source["count"])
    # (where to read, where to write, how many), in numbers of the dataset
    spans = {"features": (first * old.dims, target * old.dims, count * old.dims)}
    if source["has_coords"]:
        spans["coords"] = (first * 2, target * 2, count * 2)
    rows.copy_row(old._rows, new._rows, name, record, spans)


def put_slide(store: Slides, name: str, chunks: Iterable[Block], facts: Mapping[str, Any]) -> int:
    """Write the patches and the record of a slide that has room.

    Args:
        chunks: (features [c, d] in the store's dtype, coordinates [c, 2] or None).
        facts: fields of the record that the patches do not tell. A patch size of -1 (unknown) becomes the
            commonest distance of neighbours.
    Returns:
        the number of patches.
    Raises:
        ValueError: more patches than there is room for; as `rows.row_writer`.
    """
    record = _reserved(store, name)
    start, room = int(record["start"][0]), int(record["room"][0])
    digest = hashlib.sha256()
    places = [np.zeros((0, 2), "<i8")]  # coordinates of the chunks, written at once behind the features
    count = 0
    with rows.row_writer(store._rows, name) as writer:
        for x, xy in chunks:
            if count + len(x) > room:
                raise ValueError(
                    f"{store.path}: {name!r} has room for {room} patches and got more; did its file change?"
                )
            writer.write("features", (start + count) * store.dims, x)
            digest.update(np.ascontiguousarray(x))  # type: ignore[arg-type]
            if xy is not None:
                places.append(xy)
            count += len(x)
        coords = np.concatenate(places)
        writer.write("coords", start * 2, coords)
        digest.update(coords)  # type: ignore[arg-type]
        values = {**facts, "count": count, "digest": digest.hexdigest().encode()}
        if values["patch_size"] < 0:
            guess = patch_size_of(coords)
            if guess is not None:
                values["patch_size"] = guess
        for key in record.dtype.names or ():
            if key in values:  # a store of an earlier version has no "key"
                record[key] = values[key]
        writer.finish(record)  # last: a slide without its record is not there
    return count


def _reserved(store: Slides, name: str) -> np.ndarray:
    """The record [1] of a name as room was made for it: where its patches go, and nothing else."""
    i = store._rows.index[name]
    return store._rows.table[i : i + 1].copy()


def content_digest(chunks: Iterable[Block]) -> str:
    """SHA-256 of features and then coordinates, as a store keeps it of each slide."""
    # In this order whatever the size of chunks, so that the digest does not depend on it.
    digest = hashlib.sha256()
    places = [np.zeros((0, 2), "<i8")]
    for x, xy in chunks:
        digest.update(np.ascontiguousarray(x))  # type: ignore[arg-type]
        if xy is not None:
            places.append(xy)
    digest.update(np.ascontiguousarray(np.concatenate(places)))  # type: ignore[arg-type]
    return digest.hexdigest()
