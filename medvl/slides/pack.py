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

_LONGEST_ENCODER = 64  # bytes, as a store has room for


@frozen(kw_only=True)
class Packed:
    """Of one run: slides written, there before, patches written, left out, slides without a patch."""

    done: int
    skipped: int
    patches: int
    dropped: int
    empty: int


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
    out = Path(out)
    with files.file_lock(out):
        old = _open_filled(out)
        changed = [] if old is None else _changed_slides(old, sources, drop, size, progress)
        stored = set() if old is None else {*old.names} - {*changed}
        todo = {name: path for name, path in sources.items() if name not in stored}
        known, faults = _inspect(todo, dims, progress)
        settings = _settings(out, old, known, dims, encoder, dtype)
        faults |= _refused(known, settings, vouched=bool(encoder))
        accepted = {name: about for name, about in known.items() if name not in faults}
        if accepted and (old is None or _lacks_room(old, accepted, changed)):
            rooms = {name: about.rows for name, about in accepted.items()}
            make_room(out, old, rooms, settings, progress)
        written = {}
        store = open_slides(out) if accepted else None
        for name in track(accepted, "packing slides", show=progress):
            assert store is not None
            try:
                written[name] = _pack_slide(store, name, todo[name], known[name], drop, size)
            except ValueError as e:
                faults[name] = str(e)
        if old is None and not written:
            out.unlink(missing_ok=True)  # an empty store would bind the next run to these settings
        else:
            _warn_of_guesses(out, accepted)
    if faults:
        counts = f"{len(written)} slides are packed now, {len(faults)} of {len(sources)} cannot be"
        raise ValueError(f"{out}: {counts}: {few(list(faults.values()), 5)}")
    return Packed(
        done=len(written),
        skipped=len(sources) - len(todo),
        patches=sum(written.values()),
        dropped=sum(known[name].rows - count for name, count in written.items()),
        empty=sum(count == 0 for count in written.values()),
    )


def _sources_by_name(paths: Iterable[PathLike]) -> dict[str, Path]:
    sources: dict[str, Path] = {}
    for path in map(Path, paths):
        files.check_text_name(path)
        name = slide_name(path.name)
        if sources.setdefault(name, path) != path:
            raise ValueError(
                f"pack: two files are called {name!r}: {sources[name]} and {path}; give one of them"
            )
    return sources


def _open_filled(out: Path) -> Slides | None:
    """The store that is there; None where nothing is done in it, so that its settings bind nobody."""
    if not out.exists():
        return None
    store = open_slides(out)
    return store if store.names else None


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
    key = old.source_key(name)
    return bool(key) and key == _file_key(path)


def _is_same_content(old: Slides, name: str, path: Path, drop: bool, size: int) -> bool:
    try:
        chunks = features.chunks(path, size, dims=old.dims, drop=drop)
        converted = (_converted(name, x, xy, old.dtype) for x, xy in chunks)
        return content_digest(converted) == old.source(name)[1]
    except ValueError:  # packing will raise it again, with the name of the slide
        return False


def _file_key(path: Path) -> str:
    return hashlib.sha256(features.file_key(path).encode()).hexdigest()


def _inspect(paths: Mapping[str, Path], dims: int, progress: bool) -> tuple[dict[str, About], dict[str, str]]:
    """({slide: what its file says of it}, {slide: why its file cannot be read})."""
    known, faults = dict[str, About](), dict[str, str]()
    for name, path in track(paths.items(), "opening features", show=progress):
        try:
            known[name] = features.about_slide(path, dims=dims)
        except ValueError as e:
            faults[name] = str(e)
    return known, faults


def _settings(
    out: Path, old: Slides | None, known: Mapping[str, About], dims: int, encoder: str, dtype: str
) -> dict[str, Any]:
    """{dims, encoder, dtype} of the store: the old one's, what is asked for, or what the files agree on."""
    settings: dict[str, Any] = {"dims": dims, "encoder": encoder, "dtype": dtype}
    if old is not None:
        return _settings_of(out, old, settings)
    settings["dims"] = dims or _common(known, "dims") or 0
    settings["encoder"] = encoder or _common(known, "encoder") or ""
    if not settings["dims"]:
        raise ValueError(
            f"pack: no file says how many features a patch has ({len(known)} were looked at); say dims="
        )
    return settings


def _settings_of(out: Path, old: Slides, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a store; refuses others that are asked for."""
    settings = {"dims": old.dims, "encoder": old.encoder, "dtype": str(old.dtype)}
    different = []
    for key, value in asked.items():
        if value and value != settings[key]:
            different.append(f"{key} {value!r}, it has {settings[key]!r}")
    if different:
        raise ValueError(
            f"{out}: was made with other settings: {'; '.join(different)}. Use these, or another file"
        )
    return settings


def _common(known: Mapping[str, About], key: str) -> Any:
    """The value that all files that say it agree on; None where no file does."""
    counts, examples = Counter[Any](), dict[Any, str]()
    for name, about in known.items():
        value = getattr(about, key)
        if value:
            counts[value] += 1
            examples.setdefault(value, name)
    if len(counts) > 1:
        values = [f"{value} ({count}, such as {examples[value]})" for value, count in counts.most_common()]
        raise ValueError(
            f"pack: all slides must have the same {key}, found {', '.join(values)}; say {key}= to refuse "
            "the others"
        )
    return next(iter(counts), None)


def _refused(known: Mapping[str, About], settings: Mapping[str, Any], vouched: bool) -> dict[str, str]:
    """{slide: why it does not belong into a store of these settings}.

    Args:
        vouched: the caller says the encoder of files that do not say theirs.
    """
    dims, encoder = settings["dims"], settings["encoder"]
    faults = {}
    for name, about in known.items():
        if about.dims not in (0, dims):
            faults[name] = f"{name} has {about.dims} features per patch, the store {dims}"
        elif about.encoder not in ("", encoder):
            faults[name] = (
                f"{name} is of the encoder {about.encoder!r}, the store's is {encoder or 'unknown'!r}"
            )
        elif len(about.encoder.encode()) > _LONGEST_ENCODER:
            faults[name] = f"{name}: the name of an encoder may have 64 bytes, got {about.encoder!r}"
        elif not about.encoder and encoder and not vouched and about.rows:
            faults[name] = (
                f"{name} does not say its encoder, the store's is {encoder!r}; if it is that, say "
                f"encoder={encoder!r}"
            )
    return faults


def _lacks_room(old: Slides, accepted: Mapping[str, About], changed: list[str]) -> bool:
    """Whether some slide has no room, or not enough; a changed one needs new room, as its row is done."""
    return any(name in changed or old.room(name) < about.rows for name, about in accepted.items())


# Writing ----------------------------------------------------------------------------------------------------
def _pack_slide(store: Slides, name: str, path: Path, about: About, drop: bool, size: int) -> int:
    """Pack one file; returns how many patches were written."""
    facts = {
        "has_coords": about.has_coords,
        "patch_size": -1 if about.patch_size is None else about.patch_size,
        "mpp": np.nan if about.mpp is None else about.mpp,
        "magnification": np.nan if about.magnification is None else about.magnification,
        "encoder": about.encoder.encode(),
        "source": path.name.encode(),
        "key": _file_key(path).encode(),
    }
    chunks = features.chunks(path, size, dims=store.dims, drop=drop)
    converted = (_converted(name, x, xy, store.dtype) for x, xy in chunks)
    return put_slide(store, name, converted, facts)


def _converted(name: str, x: np.ndarray, xy: np.ndarray | None, dtype: np.dtype) -> Block:
    """A chunk with features in the store's dtype; refuses values that it cannot hold."""
    with np.errstate(over="ignore"):
        y = x.astype(dtype, copy=False)
    if x.dtype != dtype and not np.isfinite(y).all():
        largest, limit = float(np.abs(x).max()), np.finfo(dtype).max
        raise ValueError(f"{name}: holds {largest:.6g}, {dtype} ends at {limit}; pack with dtype='float32'")
    return y, xy


def _warn_of_guesses(out: Path, packed: Mapping[str, About]) -> None:
    store = open_slides(out)
    stored = set(store.names)
    guessed = []
    for name, about in packed.items():
        if name in stored and about.patch_size is None and store.about(name).patch_size is not None:
            guessed.append(name)
    if guessed:
        _log.warning(
            "%s: the patch size of %d slides (%s) was not said; it is the commonest distance of neighbours",
            out,
            len(guessed),
            few(guessed, 3),
        )
