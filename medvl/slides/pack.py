"""Files of patch features into one store of slides; a run that was stopped goes on, slides can be added."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from medvl.base import files
from medvl.base.display import track
from medvl.base.files import PathLike
from medvl.base.text import few
from medvl.slides import features
from medvl.slides.features import About
from medvl.slides.formats import Block
from medvl.slides.names import slide_name
from medvl.slides.store import Slides, content_digest, make_room, open_slides, put_slide

_log = logging.getLogger(__name__)

_LONGEST_ENCODER = 64  # bytes, as much as `store` has room for


@frozen(kw_only=True)
class Packed:
    """Of one run: slides written, there before, patches written, left out, slides without a patch."""

    written: int
    skipped: int
    patches: int
    dropped: int
    empty: int


def pack(
    paths: Iterable[PathLike],
    target: PathLike,
    *,
    dims: int = 0,
    encoder: str = "",
    dtype: str = "float16",
    drop: bool = False,
    size: int = 4096,
    progress: bool = False,
) -> Packed:
    """Write files of patch features into one store.

    Run again to go on where a run was stopped, or with more files to add them. A slide whose file has another
    content than when it was packed is packed again, with a warning. A slide is in the store wholly or not at
    all. Adding slides for which there is no room copies the store (once for all of them). Slides that cannot
    be packed do not stop the others; one error at the end lists them all.

    Args:
        paths: files of patch features (`features.read_slide`), one per slide; `names.slide_name` says its
            name.
        dims, encoder: of all slides; 0 and "": what the store has, else what the files agree on. An encoder
            that is given also stands for files that do not say theirs.
        dtype: float16 or float32.
        drop: leave out patches with NaN or infinity.
        size: patches read at once.
    Raises:
        ValueError: no files, two of one name, files that do not agree, other settings than the store's,
            another run at work on it; or, at the end, all the slides that were refused: unreadable, another d
            or encoder, NaN, or values beyond float16.
    """
    sources = _sources_by_name(paths)
    if not sources or dtype not in ("float16", "float32") or size < 1:
        raise ValueError(
            f"pack: needs files, dtype float16 or float32 and size >= 1, got {len(sources)} files, "
            f"{dtype!r} and {size}"
        )
    target = Path(target)
    with files.file_lock(target):
        return _pack_sources(sources, target, dims, encoder, dtype, drop, size, progress)


def _pack_sources(
    sources: Mapping[str, Path],
    target: Path,
    dims: int,
    encoder: str,
    dtype: str,
    drop: bool,
    size: int,
    progress: bool,
) -> Packed:
    """As `pack`, of {slide: its file}; no other run writes to the store meanwhile."""
    old = _open_filled(target)
    changed, stored = list[str](), set[str]()
    if old is not None:
        changed = _changed_slides(old, sources, drop, size, progress)
        stored = {*old.names} - {*changed}
    todo = {name: path for name, path in sources.items() if name not in stored}
    # Everything is looked at before the first slide is written: room is made once for all of them.
    headers, faults = _inspect(todo, dims, progress)
    settings = _settings(target, old, headers, dims, encoder, dtype)
    faults |= _refused(headers, settings, vouched=bool(encoder))
    accepted = {name: header for name, header in headers.items() if name not in faults}
    written: dict[str, int] = {}
    if accepted:
        if old is None or _lacks_room(old, accepted, changed):
            rooms = {name: header.rows for name, header in accepted.items()}
            make_room(target, old, rooms, settings, progress)
        written, late_faults = _write_slides(target, accepted, todo, drop, size, progress)
        faults |= late_faults
    if old is None and not written:
        target.unlink(missing_ok=True)  # an empty store would bind the next run to these settings
    else:
        _warn_of_guesses(target, accepted)
    # Last: slides that can be packed are in the store, whatever the others are.
    if faults:
        counts = f"{len(written)} slides are packed now, {len(faults)} of {len(sources)} cannot be"
        raise ValueError(f"{target}: {counts}: {few(list(faults.values()), 5)}")
    return Packed(
        written=len(written),
        skipped=len(sources) - len(todo),
        patches=sum(written.values()),
        dropped=sum(headers[name].rows - count for name, count in written.items()),
        empty=sum(count == 0 for count in written.values()),
    )


def _sources_by_name(paths: Iterable[PathLike]) -> dict[str, Path]:
    sources: dict[str, Path] = {}
    for path in map(Path, paths):
        files.check_text_name(path)
        name = slide_name(path.name)
        # One file twice is no fault; two files of one slide are, as either could be meant.
        if sources.setdefault(name, path) != path:
            raise ValueError(
                f"pack: two files are called {name!r}: {sources[name]} and {path}; give one of them"
            )
    return sources


def _open_filled(target: Path) -> Slides | None:
    """The store that is there; None where nothing is done in it, so that its settings bind nobody."""
    if not target.exists():
        return None
    store = open_slides(target)
    if not store.names:
        return None
    return store


# What there is to do ----------------------------------------------------------------------------------------
def _changed_slides(
    old: Slides, sources: Mapping[str, Path], drop: bool, size: int, progress: bool
) -> list[str]:
    """The slides of a store whose files have another content now; a copied or touched file does not count."""
    changed = []
    for name in track(old.names, "comparing slides", show=progress):
        path = sources.get(name)
        if path is None or not path.is_file() or _is_same_file(old, name, path):
            continue
        if not _is_same_content(old, name, path, drop, size):
            changed.append(name)
    if changed:
        _log.warning(
            "%s: the files of %d slides have changed, they are packed again: %s",
            old.path,
            len(changed),
            few(changed, 3),
        )
    return changed


def _is_same_file(old: Slides, name: str, path: Path) -> bool:
    """Whether size, time and samples of the content are those of the packed file, without reading it all."""
    # Stores of earlier versions have no key: their slides are compared by content.
    key = old.source_key(name)
    return bool(key) and key == _file_key(path)


def _is_same_content(old: Slides, name: str, path: Path, drop: bool, size: int) -> bool:
    try:
        # Converted as it was for packing: the digest is of what lies in the store.
        chunks = features.chunks(path, size, dims=old.dims, drop=drop)
        converted = (_converted(name, x, xy, old.dtype) for x, xy in chunks)
        return content_digest(converted) == old.source(name)[1]
    except ValueError:  # packing will raise it again, with the name of the slide
        return False


def _file_key(path: Path) -> str:
    return hashlib.sha256(features.read_file_key(path).encode()).hexdigest()


def _inspect(paths: Mapping[str, Path], dims: int, progress: bool) -> tuple[dict[str, About], dict[str, str]]:
    """({slide: what its file says of it}, {slide: why its file cannot be read})."""
    headers, faults = dict[str, About](), dict[str, str]()
    for name, path in track(paths.items(), "opening features", show=progress):
        try:
            headers[name] = features.about_slide(path, dims=dims)
        except ValueError as e:
            faults[name] = str(e)
    return headers, faults


def _settings(
    target: Path, old: Slides | None, headers: Mapping[str, About], dims: int, encoder: str, dtype: str
) -> dict[str, Any]:
    """{dims, encoder, dtype} of the store: the old one's, what is asked for, or what the files agree on."""
    settings: dict[str, Any] = {"dims": dims, "encoder": encoder, "dtype": dtype}
    if old is not None:
        return _settings_of(target, old, settings)
    # 0 and "" are not said: what all files agree on, or an error that names the two camps.
    settings["dims"] = dims or _common(headers, "dims") or 0
    settings["encoder"] = encoder or _common(headers, "encoder") or ""
    if not settings["dims"]:
        raise ValueError(
            f"pack: no file says how many features a patch has ({len(headers)} were examined); give dims="
        )
    return settings


def _settings_of(target: Path, old: Slides, requested: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a store; refuses others that are asked for."""
    settings = {"dims": old.dims, "encoder": old.encoder, "dtype": str(old.dtype)}
    different = []  # all of them in one error
    for key, value in requested.items():
        if value and value != settings[key]:
            different.append(f"{key} {value!r}, it has {settings[key]!r}")
    if different:
        raise ValueError(
            f"{target}: was made with other settings: {'; '.join(different)}. Use these, or another file"
        )
    return settings


def _common(headers: Mapping[str, About], key: str) -> Any:
    """The value that all files that say it agree on; None where no file does."""
    # One example of each value, so that the error shows which files to look at.
    counts, examples = Counter[Any](), dict[Any, str]()
    for name, header in headers.items():
        value = getattr(header, key)
        if value:
            counts[value] += 1
            examples.setdefault(value, name)
    if len(counts) > 1:
        values = []
        for value, count in counts.most_common():
            values.append(f"{value} ({count}, such as {examples[value]})")
        raise ValueError(
            f"pack: all slides must have the same {key}, found {', '.join(values)}; give {key}= to refuse "
            "the others"
        )
    return next(iter(counts), None)


def _refused(headers: Mapping[str, About], settings: Mapping[str, Any], vouched: bool) -> dict[str, str]:
    """{slide: why it does not belong into a store of these settings}.

    Args:
        vouched: the caller says the encoder of files that do not say theirs.
    """
    dims, encoder = settings["dims"], settings["encoder"]
    faults = {}
    for name, header in headers.items():
        # 0 and "" are files that do not say it: an empty slide has no width.
        if header.dims not in (0, dims):
            faults[name] = f"{name} has {header.dims} features per patch, the store {dims}"
        elif header.encoder not in ("", encoder):
            faults[name] = (
                f"{name} is of the encoder {header.encoder!r}, the store's is {encoder or 'unknown'!r}"
            )
        elif len(header.encoder.encode()) > _LONGEST_ENCODER:
            faults[name] = f"{name}: the name of an encoder may have 64 bytes, got {header.encoder!r}"
        # Two encoders of one width would mix unnoticed: a file that says none is not taken on trust.
        elif not header.encoder and encoder and not vouched and header.rows:
            faults[name] = (
                f"{name} does not say its encoder, the store's is {encoder!r}; if that is right, give "
                f"encoder={encoder!r}"
            )
    return faults


def _lacks_room(old: Slides, accepted: Mapping[str, About], changed: list[str]) -> bool:
    """Whether some slide has no room, or not enough; a changed one needs new room, as its row is done."""
    return any(name in changed or old.room(name) < header.rows for name, header in accepted.items())


# Writing ----------------------------------------------------------------------------------------------------
def _write_slides(
    target: Path,
    accepted: Mapping[str, About],
    paths: Mapping[str, Path],
    drop: bool,
    size: int,
    progress: bool,
) -> tuple[dict[str, int], dict[str, str]]:
    """({slide: patches written}, {slide: why it could not be written})."""
    written, faults = dict[str, int](), dict[str, str]()
    store = open_slides(target)
    for name, header in track(accepted.items(), "packing slides", show=progress):
        try:
            written[name] = _pack_slide(store, name, paths[name], header, drop, size)
        except ValueError as error:  # only the values of a file show NaN, or numbers beyond float16
            faults[name] = str(error)
    return written, faults


def _pack_slide(store: Slides, name: str, path: Path, header: About, drop: bool, size: int) -> int:
    """Pack one file; returns how many patches were written."""
    # What is not known has a value of its own, as a record holds numbers only.
    facts = {
        "has_coords": header.has_coords,
        "patch_size": -1 if header.patch_size is None else header.patch_size,
        "mpp": np.nan if header.mpp is None else header.mpp,
        "magnification": np.nan if header.magnification is None else header.magnification,
        "encoder": header.encoder.encode(),
        "source": path.name.encode(),
        "key": _file_key(path).encode(),
    }
    chunks = features.chunks(path, size, dims=store.dims, drop=drop)
    converted = (_converted(name, x, xy, store.dtype) for x, xy in chunks)
    return put_slide(store, name, converted, facts)


def _converted(name: str, x: np.ndarray, xy: np.ndarray | None, dtype: np.dtype) -> Block:
    """A chunk with features in the store's dtype; refuses values that it cannot hold."""
    with np.errstate(over="ignore"):  # an overflow is refused below, with the number
        y = x.astype(dtype, copy=False)
    if x.dtype != dtype and not np.isfinite(y).all():
        largest, limit = float(np.abs(x).max()), np.finfo(dtype).max
        raise ValueError(f"{name}: holds {largest:.6g}, {dtype} ends at {limit}; pack with dtype='float32'")
    return y, xy


def _warn_of_guesses(target: Path, packed: Mapping[str, About]) -> None:
    # The store is opened again: the records that this run wrote are not in the one it was written to.
    store = open_slides(target)
    stored = set(store.names)
    guessed = []  # the file does not say it, and the store has one all the same
    for name, header in packed.items():
        if name in stored and header.patch_size is None and store.about(name).patch_size is not None:
            guessed.append(name)
    if guessed:
        _log.warning(
            "%s: the patch size of %d slides (%s) is not given in the files; the most common distance "
            "between neighbours is used",
            target,
            len(guessed),
            few(guessed, 3),
        )
