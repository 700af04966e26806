"""One HDF5 file with the patch features of many slides, made to be streamed; what was packed survives a killed writer.

Layout, readable with plain h5py: datasets `features` [n, d] and `coords` [n, 2], contiguous, with the patches of all slides behind each
other; dataset `rows`, one per slide, with where its patches start, how many there are, what is known of it and, last, `done`; file
attributes `format`, `version`, `settings` (JSON). As in `data.store` the file is created whole with its room reserved (sparse), so a
writer needs no HDF5: it writes the patches, then the row, waits for the disk, and sets the one byte `done` last. POSIX only.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from attrs import field, frozen

from medvl.base import files
from medvl.base.display import track
from medvl.base.files import PathLike
from medvl.base.text import few
from medvl.slides import features as slides
from medvl.slides.features import About, Slide
from medvl.slides.formats import STORE, Block
from medvl.slides.names import slide_name

_log = logging.getLogger(__name__)

VERSION = 1
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
    ("key", "S64"),  # SHA-256 of `slides.file_key` of the source; stores of before have none
)


@frozen(kw_only=True, eq=False)
class Slides:
    """A store as it was when opened; `names` are the slides that were done then, in file order.

    Holds no open file: it may be pickled, forked and used by threads. Every read opens the file anew and checks that it is the same.
    """

    path: Path
    dims: int
    dtype: np.dtype
    encoder: str  # "" unknown
    names: tuple[str, ...]
    _table: np.ndarray = field(alias="table", repr=False)
    _index: dict[str, int] = field(alias="index", repr=False)  # every name that has room
    _offsets: dict[str, int] = field(alias="offsets", repr=False)  # of the datasets in the file, bytes
    _identity: tuple[int, int] = field(alias="identity", repr=False)

    def about(self, name: str) -> About:
        """What is known of a slide; raises ValueError where it is not in the store."""
        row = _row(self, name)
        return About(
            name=name,
            rows=int(row["count"]),
            dims=self.dims,
            dtype=self.dtype,
            has_coords=bool(row["has_coords"]),
            patch_size=None if row["patch_size"] < 0 else int(row["patch_size"]),
            mpp=None if np.isnan(row["mpp"]) else float(row["mpp"]),
            magnification=None if np.isnan(row["magnification"]) else float(row["magnification"]),
            encoder=self.encoder,
        )

    def source(self, name: str) -> tuple[str, str]:
        """(name of the file a slide was read from, SHA-256 of its content here)."""
        row = _row(self, name)
        return row["source"].decode(), row["digest"].decode()

    def chunks(self, name: str, size: int = 4096) -> Iterator[Block]:
        """The patches of a slide, `size` at a time, as `slides.chunks`; every chunk is a fresh array."""
        if size < 1:
            raise ValueError(f"chunks: size must be at least 1 patch, got {size}")
        row = _row(self, name)

        def run() -> Iterator[Block]:
            with _same(self) as f:
                for i in range(0, int(row["count"]), size):
                    yield _patches(self, f, row, i, min(size, int(row["count"]) - i))

        return run()

    def read(self, name: str) -> Slide:
        """All patches of a slide.

        Raises:
            ValueError: no such slide, or the file was replaced (by `pack`, to make room) or cut off since it was opened.
        """
        about, row = self.about(name), _row(self, name)
        with _same(self) as f:
            features, coords = _patches(self, f, row, 0, about.rows)
        known = {k: getattr(about, k) for k in ("patch_size", "mpp", "magnification", "encoder")}
        return Slide(name=name, features=features, coords=coords, **known)


@frozen(kw_only=True)
class Packed:
    """Of one run: slides written, slides that were there before, patches written and left out, slides without a patch."""

    done: int
    skipped: int
    patches: int
    dropped: int
    empty: int


def open_slides(path: PathLike) -> Slides:
    """Open a store of slides for reading, also while another process packs into it.

    Raises:
        ValueError: no such file, not a store of slides, cut off, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with h5py.File(path, "r", locking=False) as f:
            found = f.attrs.get("format"), f.attrs.get("version")
            if found != (STORE, VERSION):
                raise ValueError(
                    f"{path}: must be a store of format {STORE} and version {VERSION}, found {found[0]} and {found[1]}"
                )
            arrays = {k: files.open_dataset(f, k, path) for k in ("features", "coords", "rows")}
            offsets = {k: array.id.get_offset() for k, array in arrays.items()}
            if None in offsets.values():
                raise ValueError(
                    f"{path}: must be a store that `invoke slides pack` wrote, its arrays do not lie in one piece"
                )
            table, settings = arrays["rows"][()], json.loads(f.attrs["settings"])
            patches, dims = arrays["features"].shape
            dtype, encoder = arrays["features"].dtype, settings["encoder"]
            ends = table["start"] + table["room"]
            if arrays["coords"].shape != (patches, 2) or arrays["coords"].dtype != np.dtype("<i8"):
                raise ValueError(
                    f"{path}: coords must be [{patches}, 2] of int64, found {arrays['coords'].shape} {arrays['coords'].dtype}"
                )
            if (
                (table["start"] < 0).any()
                or (table["count"] < 0).any()
                or (table["count"] > table["room"]).any()
                or (ends > patches).any()
            ):
                raise ValueError(f"{path}: names patches beyond the {patches} that it holds; pack it again")
            names = [n.decode() for n in table["name"]]
    except (OSError, LookupError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: is not a whole store ({e})") from e
    stat = os.stat(path)
    return Slides(
        path=path,
        dims=dims,
        dtype=dtype,
        encoder=encoder,
        names=tuple(n for n, done in zip(names, table["done"], strict=True) if done),
        table=table,
        index={n: i for i, n in enumerate(names)},
        offsets=offsets,
        identity=(stat.st_ino, stat.st_size),
    )


def _row(store: Slides, name: str) -> Any:
    i = store._index.get(name, -1)
    if i < 0 or not store._table["done"][i]:
        what = (
            "is not written (yet)"
            if i >= 0
            else f"is not there; it has {len(store.names)} slides, such as {few(store.names, 3)}"
        )
        raise ValueError(f"{store.path}: {name!r} {what}")
    return store._table[i]


@contextmanager
def _same(store: Slides) -> Iterator[BinaryIO]:
    """The store's file, opened; refuses another one that has taken its place, where patches lie elsewhere."""
    try:
        with open(store.path, "rb", buffering=0) as f:
            stat = os.fstat(f.fileno())
            if (stat.st_ino, stat.st_size) != store._identity:
                raise ValueError(f"{store.path}: was replaced since it was opened; open it again")
            yield f
    except OSError as e:
        raise ValueError(f"{store.path}: cannot be read ({e.strerror})") from e


def _patches(store: Slides, f: BinaryIO, row: Any, i: int, n: int) -> Block:
    at = int(row["start"]) + i
    x = _array(
        f, store._offsets["features"] + at * store.dims * store.dtype.itemsize, (n, store.dims), store.dtype
    )
    return x, _array(f, store._offsets["coords"] + at * 16, (n, 2), np.dtype("<i8")) if row[
        "has_coords"
    ] else None


def _array(f: BinaryIO, offset: int, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    out = np.empty(shape, dtype)
    view, at = memoryview(out.reshape(-1).view(np.uint8)), 0  # type: ignore[arg-type]
    while at < len(view):
        got = os.preadv(f.fileno(), [view[at:]], offset + at)
        if not got:
            raise ValueError(f"{f.name}: is cut off")
        at += got
    return out


# Packing --------------------------------------------------------------------------------------------------------------------------------
def pack(
    paths: Iterable[PathLike],
    out: PathLike,
    *,
    dims: int = 0,
    encoder: str = "",
    dtype: str = "float16",
    drop: bool = False,
    size: int = 4096,
    progress: bool = False,
) -> Packed:
    """Write files of patch features into one store; run again to go on where a run was stopped, or with more files to add them.

    A slide whose file has another content than when it was packed is packed again, which is said. A slide is in the store wholly or not
    at all. Adding slides for which there is no room copies the store (once for all of them).
    Slides that cannot be packed do not stop the others; one error at the end tells them all.

    Args:
        paths: files of patch features (`slides.read_slide`), one per slide; the slide is called as `names.slide_name` says.
        dims, encoder: of all slides; 0 and "": what the store has, else what the files agree on. An encoder that is given also stands for
            files that do not say theirs.
        dtype: float16 or float32.
        drop: leave out patches with NaN or infinity.
        size: patches read at once.
    Raises:
        ValueError: no files, two of one name, files that do not agree, other settings than the store's, another run at work on it; or, at
            the end, all the slides that were refused: unreadable, another d or encoder, NaN, or values beyond float16.
    """
    jobs: dict[str, Path] = {}
    for path in map(Path, paths):
        files.check_text_name(path)
        if jobs.setdefault(slide_name(path.name), path) != path:
            name = slide_name(path.name)
            raise ValueError(
                f"pack: two files are called {name!r}: {jobs[name]} and {path}; give one of them"
            )
    if not jobs or dtype not in ("float16", "float32") or size < 1:
        raise ValueError(
            f"pack: needs files, dtype float16 or float32 and size >= 1, got {len(jobs)} files, {dtype!r} and {size}"
        )
    out = Path(out)
    with files.file_lock(out):
        old = open_slides(out) if out.exists() else None
        old = old if old and old.names else None  # one in which nothing is done binds nobody to its settings
        changed = [] if old is None else _changed(old, jobs, drop, size, progress)
        todo = {n: p for n, p in jobs.items() if old is None or n not in old.names or n in changed}
        known, faults = _look(todo, dims, progress)
        settings = _settings(out, old, known, dims, encoder, dtype)
        faults |= _refused(known, settings, vouched=bool(encoder))
        room = {n: a for n, a in known.items() if n not in faults}
        if room and (
            old is None
            or any(
                n not in old._index or n in changed or old._table["room"][old._index[n]] < a.rows
                for n, a in room.items()
            )
        ):
            _make_room(out, old, room, settings, progress)
        written: list[tuple[int, int]] = []
        for name in track(room, "packing slides", show=progress):
            try:
                written.append(_write(out, name, todo[name], known[name], drop, size))
            except ValueError as e:
                faults[name] = str(e)
        if old is None and not written:
            out.unlink(missing_ok=True)  # an empty store would bind the next run to these settings
        else:
            _say_guesses(out, room)
    if faults:
        said = f"{len(written)} slides are packed now, {len(faults)} of {len(jobs)} cannot be"
        raise ValueError(f"{out}: {said}: {few(list(faults.values()), 5)}")
    return Packed(
        done=len(written),
        skipped=len(jobs) - len(todo),
        patches=sum(n for n, _ in written),
        dropped=sum(lost for _, lost in written),
        empty=sum(not n for n, _ in written),
    )


def _changed(old: Slides, jobs: Mapping[str, Path], drop: bool, size: int, progress: bool) -> list[str]:
    """The slides of a store whose files hold something else now; a file that was only copied or touched does not."""
    changed = []
    for name in track(old.names, "comparing slides", show=progress):
        path = jobs.get(name)
        if path is None or not path.is_file() or _same_file(old, name, path):
            continue
        try:
            patches = slides.chunks(path, size, dims=old.dims, drop=drop)
            same = (
                content_digest(_fitting(name, x, xy, old.dtype) for x, xy in patches) == old.source(name)[1]
            )
        except ValueError:  # it is told with its reason when it is packed
            same = False
        if not same:
            changed.append(name)
    if changed:
        _log.warning(
            "%s: the files of %d slides have changed, they are packed again: %s",
            old.path,
            len(changed),
            few(changed, 3),
        )
    return changed


def _same_file(old: Slides, name: str, path: Path) -> bool:
    row = _row(old, name)
    return "key" in row.dtype.names and row["key"].decode() == _file_key(path)


def _file_key(path: Path) -> str:
    return hashlib.sha256(slides.file_key(path).encode()).hexdigest()


def content_digest(chunks: Iterable[Block]) -> str:
    """SHA-256 of features and then coordinates, as a store keeps it of each slide."""
    digest, places = hashlib.sha256(), [np.zeros((0, 2), "<i8")]
    for x, xy in chunks:
        digest.update(np.ascontiguousarray(x))  # type: ignore[arg-type]
        places += [] if xy is None else [xy]
    digest.update(np.ascontiguousarray(np.concatenate(places)))  # type: ignore[arg-type]
    return digest.hexdigest()


def _look(paths: Mapping[str, Path], dims: int, progress: bool) -> tuple[dict[str, About], dict[str, str]]:
    known, faults = dict[str, About](), dict[str, str]()
    for name, path in track(paths.items(), "opening features", show=progress):
        try:
            known[name] = slides.about_slide(path, dims=dims)
        except ValueError as e:
            faults[name] = str(e)
    return known, faults


def _say_guesses(out: Path, packed: Mapping[str, About]) -> None:
    store = open_slides(out)
    guessed = [
        n
        for n, a in packed.items()
        if n in store.names and a.patch_size is None and store.about(n).patch_size is not None
    ]
    if guessed:
        said = "%s: the patch size of %d slides (%s) was not said; it is the commonest distance of neighbours"
        _log.warning(said, out, len(guessed), few(guessed, 3))


def _settings(
    out: Path, old: Slides | None, known: Mapping[str, About], dims: int, encoder: str, dtype: str
) -> dict[str, Any]:
    """{dims, encoder, dtype} of the store: the old one's, what is asked for, or what the files agree on."""
    asked = {"dims": dims, "encoder": encoder, "dtype": dtype}
    if old is not None:
        settings = {"dims": old.dims, "encoder": old.encoder, "dtype": str(old.dtype)}
        if wrong := [
            f"{k} {asked[k]!r}, it has {settings[k]!r}" for k in asked if asked[k] and asked[k] != settings[k]
        ]:
            raise ValueError(
                f"{out}: was made with other settings: {'; '.join(wrong)}. Use these, or another file"
            )
        return settings
    for key in ("dims", "encoder"):
        found = Counter(getattr(a, key) for a in known.values() if getattr(a, key))
        if not asked[key] and len(found) > 1:
            example = {v: next(n for n, a in known.items() if getattr(a, key) == v) for v in found}
            said = ", ".join(f"{v} ({count}, such as {example[v]})" for v, count in found.most_common())
            raise ValueError(
                f"pack: all slides must have the same {key}, found {said}; say {key}= to refuse the others"
            )
        asked[key] = asked[key] or next(iter(found), asked[key])
    if not asked["dims"]:
        raise ValueError(
            f"pack: no file says how many features a patch has ({len(known)} were looked at); say dims="
        )
    return asked


def _refused(known: Mapping[str, About], settings: Mapping[str, Any], vouched: bool) -> dict[str, str]:
    faults = {}
    for name, about in known.items():
        ours = settings["encoder"]
        if about.dims not in (0, settings["dims"]):
            faults[name] = f"{name} has {about.dims} features per patch, the store {settings['dims']}"
        elif about.encoder not in ("", ours):
            faults[name] = f"{name} is of the encoder {about.encoder!r}, the store's is {ours or 'unknown'!r}"
        elif len(about.encoder.encode()) > 64:
            faults[name] = f"{name}: the name of an encoder may have 64 bytes, got {about.encoder!r}"
        elif not about.encoder and ours and not vouched and about.rows:
            faults[name] = (
                f"{name} does not say its encoder, the store's is {ours!r}; if it is that, say encoder={ours!r}"
            )
    return faults


def _make_room(
    out: Path, old: Slides | None, new: Mapping[str, About], settings: Mapping[str, Any], progress: bool
) -> None:
    """Create the store, or a larger one with all that is done in it but `new`, and room for these, in the old one's place."""
    kept = [] if old is None else [old._table[old._index[n]] for n in old.names if n not in new]
    names = [*(r["name"].decode() for r in kept), *new]
    rows = np.zeros(
        len(names),
        [("name", f"S{max((len(n.encode()) for n in names), default=1)}"), *_FIELDS, ("done", "u1")],
    )
    rows["name"] = [n.encode() for n in names]
    rows["room"] = [*(r["count"] for r in kept), *(a.rows for a in new.values())]
    rows["start"] = np.cumsum(rows["room"]) - rows["room"]
    n = max(1, int(rows["room"].sum()))
    with files.atomic(out) as tmp:
        with h5py.File(tmp, "w", locking=False) as f:
            f.attrs.update({"format": STORE, "version": VERSION, "settings": json.dumps(dict(settings))})
            f.create_dataset("rows", data=rows)
            _reserve(f, "coords", (n, 2), np.dtype("<i8"))
            _reserve(f, "features", (n, settings["dims"]), np.dtype(settings["dtype"]).newbyteorder("<"))
        if old is None:
            return
        place = open_slides(tmp)
        for name in track([n for n in old.names if n not in new], "copying slides", show=progress):
            row = old._table[old._index[name]]
            known = ("has_coords", "patch_size", "mpp", "magnification", "encoder", "source", "key")
            facts = {k: row[k] for k in known if k in row.dtype.names}
            _put(
                place, name, old.chunks(name), facts, lambda f: f.flush()
            )  # `atomic` waits for the disk, once


def _reserve(f: h5py.File, name: str, shape: tuple[int, int], dtype: np.dtype) -> None:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # the offset is fixed now
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # and nothing is written there
    plan.set_obj_track_times(False)
    h5py.h5d.create(
        f.id, name.encode(), h5py.h5t.py_create(dtype, logical=True), h5py.h5s.create_simple(shape), plan
    )


def _write(out: Path, name: str, path: Path, about: About, drop: bool, size: int) -> tuple[int, int]:
    """Pack one file; (patches written, patches left out)."""
    place = open_slides(out)
    facts = {
        "has_coords": about.has_coords,
        "patch_size": -1 if about.patch_size is None else about.patch_size,
        "mpp": np.nan if about.mpp is None else about.mpp,
        "magnification": np.nan if about.magnification is None else about.magnification,
        "encoder": about.encoder.encode(),
        "source": path.name.encode(),
        "key": _file_key(path).encode(),
    }
    chunks = slides.chunks(path, size, dims=place.dims, drop=drop)
    count = _put(place, name, (_fitting(name, x, xy, place.dtype) for x, xy in chunks), facts, _sync)
    return count, about.rows - count


def _fitting(name: str, x: np.ndarray, xy: np.ndarray | None, dtype: np.dtype) -> Block:
    with np.errstate(over="ignore"):
        y = x.astype(dtype, copy=False)
    if x.dtype != dtype and not np.isfinite(y).all():
        raise ValueError(
            f"{name}: holds {float(np.abs(x).max()):.6g}, {dtype} ends at {np.finfo(dtype).max}; pack with dtype='float32'"
        )
    return y, xy


def _put(
    place: Slides,
    name: str,
    chunks: Iterable[Block],
    facts: Mapping[str, Any],
    sync: Callable[[BinaryIO], None],
) -> int:
    """Write patches and row of a slide that has room, then its flag; returns how many patches."""
    i, width = place._index[name], place.dims * place.dtype.itemsize
    row, digest, places, count = place._table[i : i + 1].copy(), hashlib.sha256(), [], 0
    with open(place.path, "r+b") as f:
        for x, xy in chunks:
            if count + len(x) > row["room"][0]:
                raise ValueError(
                    f"{place.path}: {name!r} has room for {row['room'][0]} patches and got more; did its file change?"
                )
            f.seek(place._offsets["features"] + (int(row["start"][0]) + count) * width)
            f.write(np.ascontiguousarray(x))  # type: ignore[arg-type]
            digest.update(np.ascontiguousarray(x))  # type: ignore[arg-type]
            places += [] if xy is None else [xy]
            count += len(x)
        coords = np.concatenate([np.zeros((0, 2), "<i8"), *places])
        f.seek(place._offsets["coords"] + int(row["start"][0]) * 16)
        f.write(coords)  # type: ignore[arg-type]
        digest.update(coords)  # type: ignore[arg-type]
        if facts["patch_size"] < 0 and (guess := slides.patch_size_of(coords)) is not None:
            facts = {**facts, "patch_size": guess}
        for key, value in {**facts, "count": count, "digest": digest.hexdigest().encode()}.items():
            if key in (row.dtype.names or ()):  # a store of before has no "key"
                row[key] = value
        at = place._offsets["rows"] + i * row.itemsize
        f.seek(at)
        f.write(row.tobytes())
        sync(f)  # the flag must not reach the disk before what it vouches for
        f.seek(at + row.itemsize - 1)
        f.write(b"\1")
        sync(f)
    return count


def _sync(f: BinaryIO) -> None:
    f.flush()
    os.fsync(f.fileno())
