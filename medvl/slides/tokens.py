"""A frozen compressor's tokens of slides: computed from disk chunk by chunk, kept in files, found again by weights and features."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor

from medvl.base import files
from medvl.base.display import track
from medvl.base.tree import Tree
from medvl.components import compress
from medvl.components.slots import CompressConfig, SlotState
from medvl.hub import skeletons
from medvl.slides import features as slides
from medvl.slides import names as slide_names
from medvl.slides import store as slide_store
from medvl.slides.features import Block

_log = logging.getLogger("medvl")


@frozen(kw_only=True, eq=False)
class Features:
    """Patch features of slides by name, of a folder of files or of a packed store."""

    names: tuple[str, ...]  # those that are there, as they were asked for
    missing: tuple[str, ...]
    near: str = ""  # names that are near the first missing one, in words
    dims: int  # width of the features
    encoder: str  # that the files say; "" where none does
    patch_size: Callable[[str], int | None] = field(repr=False)
    chunks: Callable[[str, int], Iterator[Block]] = field(repr=False)
    key: Callable[[str], str] = field(repr=False)  # says what the content is: another key is another content


def open_features(where: files.PathLike, names: Sequence[str], *, dims: int = 0) -> Features:
    """The features of these slides; slides without features are told, not raised.

    Args:
        where: a folder with one file per slide (any format of `slides`), or a store that `pack.pack` made.
        names: slide ids, cases or names of files; matched as `slide_names.find_slides` does. A case of several slides is one bag of all patches.
    Raises:
        ValueError: no such folder or store; a name that several files match; widths that differ, or are not `dims`; two encoders.
    """
    where, wanted = Path(where), list(dict.fromkeys(names))
    if where.is_file():
        store = slide_store.open_slides(where)
        known: Mapping[str, Sequence[Any]] = {name: [name] for name in store.names}
        matches = _clear(slide_names.find_slides(wanted, known))
        first = store.names[:1]  # its width is that of the store, also where no slide is asked for
        widths = {name: store.dims for name in (*[n for n in wanted if matches[n].places], *first)}
        encoders = {name: store.encoder for name in first}
        read: dict[str, Any] = {
            "patch_size": lambda stem: store.about(stem).patch_size,
            "chunks": store.chunks,
            "key": lambda stem: store.source(stem)[1],
        }
    else:
        known = slide_names.feature_files(where)
        matches = _clear(slide_names.find_slides(wanted, known, where))
        files_of = {_label(n, match, place): place for n, match in matches.items() for place in match.places}
        about = {
            label: slides.about_slide(place, dims=dims)
            for label, place in track(files_of.items(), "opening features")
        }
        widths = {label: a.dims for label, a in about.items()}
        encoders = {label: a.encoder for label, a in about.items()}
        read = _file_readers(dims)
    there = {name: match.places for name, match in matches.items() if match.places}
    if cases := [name for name, places in there.items() if len(places) > 1]:
        _log.warning(
            "%s: %d cases have several slides, which are taken as one bag each, such as %s",
            where,
            len(cases),
            cases[0],
        )
    missing = tuple(n for n in wanted if n not in there)
    found = _of_places(
        there,
        missing,
        _same_width(where, widths, dims),
        _same_encoder(where, encoders),
        **read,
    )
    return evolve(found, near=slide_names.near_names(missing[0], known) if missing else "")


def _label(name: str, match: slide_names.Match, place: Any) -> str:
    """What an error calls the features of a name, which are several for a case."""
    return name if len(match.places) == 1 else f"{name} ({place})"


def _clear(matches: dict[str, slide_names.Match]) -> dict[str, slide_names.Match]:
    """Refuse a name that could be several."""
    for name, match in matches.items():
        if match.clear:
            continue
        if len(match.stems) > 1 and not slide_names.is_case(name):
            raise ValueError(
                f"open_features: {name} must be one slide, {len(match.stems)} match: {', '.join(match.stems[:4])}; give the full name"
            )
        files_of = ", ".join(map(str, match.places[:4]))
        raise ValueError(
            f"open_features: {name} must have one file, there are {files_of}; write the path in the questions, let data.features be the "
            "folder of one kind, or remove all but one"
        )
    return matches


def _of_places(
    there: Mapping[str, Sequence[Any]],
    missing: tuple[str, ...],
    width: int,
    encoder: str,
    *,
    patch_size: Callable[[Any], int | None],
    chunks: Callable[[Any, int], Iterator[Block]],
    key: Callable[[Any], str],
) -> Features:
    """Features of {name: where they lie}; several places are read as one slide without coordinates, which are of each slide alone."""

    def read(name: str, size: int) -> Iterator[Block]:
        places = there[name]
        for place in places:
            for x, xy in chunks(place, size):
                yield x, xy if len(places) == 1 else None

    return Features(
        names=tuple(there),
        missing=missing,
        dims=width,
        encoder=encoder,
        patch_size=lambda name: patch_size(there[name][0]) if len(there[name]) == 1 else None,
        chunks=read,
        key=lambda name: " ".join(key(place) for place in there[name]),
    )


def _file_readers(dims: int) -> dict[str, Any]:
    return {
        "patch_size": lambda path: _patch_size(path, dims),
        "chunks": lambda path, size: slides.chunks(path, size, dims=dims),
        "key": slides.file_key,
    }


def open_slide(slide: files.PathLike, where: files.PathLike = "", *, dims: int = 0) -> Features:
    """The features of one slide, called as it is written.

    Args:
        slide: a file of patch features; `STORE::NAME`, a slide of a packed store; or the name of a slide in `where`.
        where: a folder of feature files or a packed store.
    Raises:
        ValueError: no such file or slide (with near names), several of the name, as `slides.about_slide`; another width than `dims`;
            no patch.
    """
    written = str(slide)
    store, _, name = written.rpartition("::")
    if Path(written).is_file():
        about = slides.about_slide(written, dims=dims)
        width = _same_width(Path(written), {written: about.dims}, dims)
        found = _of_places({written: [Path(written)]}, (), width, about.encoder, **_file_readers(dims))
    elif Path(written).exists() or not (store or where):
        raise ValueError(f"{written}: no such file; a slide is a file of patch features, or STORE.h5::NAME")
    else:
        found = _renamed(_only_slide(store or where, name, written, dims), name, written)
    if next(found.chunks(written, 1), None) is None:
        raise ValueError(f"{written}: must hold patches, the slide has none; was tissue found on it?")
    return found


def _only_slide(where: files.PathLike, name: str, written: str, dims: int) -> Features:
    if not Path(where).exists():
        raise ValueError(
            f"{written}: no such file; and {where}, where a slide of that name could lie, is not there either"
        )
    found = open_features(where, [name], dims=dims)
    if found.missing:
        raise ValueError(f"{written}: no such file, and no slide of that name in {where}{found.near}")
    return found


def _renamed(features: Features, name: str, written: str) -> Features:
    """The same slide, called as it was written."""
    return evolve(
        features,
        names=(written,),
        patch_size=lambda _: features.patch_size(name),
        chunks=lambda _, size: features.chunks(name, size),
        key=lambda _: features.key(name),
    )


def whole(of: Features, name: str, most: int = 0) -> np.ndarray:
    """All patches of a slide [n, d], or `most` of them, evenly spread."""
    held = [x for x, _ in of.chunks(name, 65536)]
    x = np.concatenate(held) if held else np.zeros((0, of.dims), np.float32)
    return x[slides.sample_rows(len(x), most)] if most else x


def slide_tokens(
    cfg: CompressConfig,
    params: Tree,
    of: Features,
    folder: files.PathLike,
    *,
    chunk: int = 4096,
    names: Sequence[str] = (),
) -> dict[str, Tensor]:
    """{slide: tokens float32 [k, d]} of a frozen compressor, in the precision of 16 bits; each is computed once and kept.

    Args:
        folder: tokens lie in a folder of these weights, in a file for each content; other weights or features never find them.
        names: of which slides; all if left out.
    Raises:
        ValueError: a name that is not of `of`; features of another width, or not finite (names the slide); a file of tokens that is broken.
    """
    if unknown := [n for there in [set(of.names)] for n in names if n not in there]:
        raise ValueError(
            f"slide_tokens: every slide must have features, {len(unknown)} have none, the first is {unknown[0]}"
        )
    home = Path(folder) / f"{cfg.kind}-{cfg.slots}-{_digest(cfg, params)}"
    out: dict[str, Tensor] = {}
    for name in track(names or of.names, "compressing slides"):
        path = home / f"{hashlib.sha256(of.key(name).encode()).hexdigest()[:20]}.npy"
        if not path.exists():
            with _told(name):
                found = compress.compress_stream(cfg, params, partial(_patches, of, name, chunk))
            half = found.tokens.to("cpu", torch.float16)
            if not bool(half.isfinite().all()):
                raise ValueError(
                    f"slide {name}: its tokens are beyond 16 bits; are the features normalised as the compressor's were?"
                )
            files.write_array(path, half.numpy())
        held = files.read_array(
            path, (cfg.slots, cfg.dim), "remove it, the slide's tokens will be computed again"
        )
        out[name] = torch.from_numpy(held).float()
    return out


def patch_weights(
    cfg: CompressConfig, params: Tree, of: Features, name: str, chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray | None]:
    """(weights [n, k] of every patch in every slot, coordinates [n, 2] or None) of one slide; without patches, [0, k] and None.

    Raises:
        ValueError: features of another width, or not finite (names the slide).
    """
    weights, places = [np.zeros((0, cfg.slots), np.float32)], list[np.ndarray]()
    with _told(name):
        state = (
            _end(cfg, params, partial(_patches, of, name, chunk)) if cfg.kind != "moe" else None
        )  # its weights need no other patch
        for x, xy in of.chunks(name, chunk):
            weights.append(compress.slot_weights(cfg, params, torch.from_numpy(x), state).cpu().numpy())
            places += [] if xy is None else [xy]
    return np.concatenate(weights), np.concatenate(places) if places else None


def _end(cfg: CompressConfig, params: Tree, chunks: Callable[[], Iterator[Tensor]]) -> SlotState:
    """The state behind the last patch of the last pass."""
    state = compress.begin_state(cfg, params)
    for turn in range(cfg.passes):
        state = compress.begin_state(cfg, params, state) if turn else state
        for x in chunks():
            state = compress.update_state(cfg, params, state, x)
    return state


def _patches(of: Features, name: str, chunk: int) -> Iterator[Tensor]:
    return (torch.from_numpy(x) for x, _ in of.chunks(name, chunk))


def _digest(cfg: CompressConfig, params: Mapping) -> str:
    return hashlib.sha256(f"{cfg} {skeletons.weights_digest(dict(params))}".encode()).hexdigest()[:12]


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        raise ValueError(f"slide {name}: {e}") from e


def _patch_size(path: Path, dims: int) -> int | None:
    """As `slides.read_slide` says it, in the memory of one chunk."""
    if (said := slides.about_slide(path, dims=dims).patch_size) is not None:
        return said
    places = [xy for _, xy in slides.chunks(path, dims=dims) if xy is not None]
    size = slides.patch_size_of(np.concatenate(places)) if places else None
    if size is not None:
        _log.warning(
            "%s: does not say its patch size; taken as %d level-0 pixels, the commonest distance of neighbours",
            path,
            size,
        )
    return size


def _same_width(where: Path, widths: Mapping[str, int], dims: int) -> int:
    found = {w for w in widths.values() if w} | ({dims} if dims else set())
    if len(found) > 1:
        odd = {w: next(n for n, v in widths.items() if v == w) for w in sorted(found) if w in widths.values()}
        said = ", ".join(f"{n} has {w}" for w, n in odd.items())
        raise ValueError(
            f"{where}: all slides must have features of one width{f' ({dims} wanted)' if dims else ''}, {said}"
        )
    return next(iter(found), dims)


def _same_encoder(where: Path, encoders: Mapping[str, str]) -> str:
    """The encoder that all files are of which say one; of one width two encoders would mix in silence."""
    first = dict[str, str]()
    for name, encoder in encoders.items():
        if encoder:
            first.setdefault(encoder, name)
    if len(first) > 1:
        said = ", ".join(f"{name} is of {encoder!r}" for encoder, name in list(first.items())[:4])
        raise ValueError(f"{where}: all slides must be of one encoder, {said}")
    return next(iter(first), "")
