"""Patch features of slides by name, and tokens that a frozen compressor makes of them."""

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
from medvl.base.cache import CacheFolder, compute_missing
from medvl.base.display import track
from medvl.base.tree import Tree
from medvl.components import compress
from medvl.components.slots import CompressConfig, SlotState
from medvl.hub import skeletons
from medvl.slides import features as patch_files
from medvl.slides import opened
from medvl.slides.features import Block
from medvl.slides.names import Match, feature_files, find_slides, is_case, near_names
from medvl.slides.store import Slides

_log = logging.getLogger("medvl")


@frozen(kw_only=True, eq=False)
class Features:
    """Patch features of slides by name, of a folder of files or of a packed store."""

    names: tuple[str, ...]  # slides that have features, as they were asked for
    missing: tuple[str, ...]
    near: str = ""  # names that are near the first missing one, in words
    dims: int  # width of the features
    encoder: str  # that the files say; "" where none does
    patch_size: Callable[[str], int | None] = field(repr=False)
    chunks: Callable[[str, int], Iterator[Block]] = field(repr=False)
    key: Callable[[str], str] = field(repr=False)  # says what the content is: another key is another content


@frozen(kw_only=True)
class _Reader:
    """How the features of one slide are read from where they lie: a file, or a name in a store."""

    patch_size: Callable[[Any], int | None]
    chunks: Callable[[Any, int], Iterator[Block]]
    key: Callable[[Any], str]


def open_features(source: files.PathLike, names: Sequence[str], *, dims: int = 0) -> Features:
    """The features of these slides. Slides without features are listed, not raised.

    Args:
        source: a folder with one file per slide (any format of `formats`), or a store that `pack.pack` made.
        names: slides, cases or names of files; matched as `names.find_slides` does. A case of several slides
            is one bag of all their patches.
    Raises:
        ValueError: no such folder or store; a name that several files match; widths that differ, or are not
            `dims`; two encoders.
    """
    source = Path(source)
    names = list(dict.fromkeys(names))  # each once, in their order
    by_stem: Mapping[str, Sequence[Any]]
    # {slide, as errors call it: its width}, and likewise of encoders: checked to be one below.
    widths, encoders = dict[str, int](), dict[str, str]()
    if source.is_file():
        store = opened.open_store(source)
        by_stem = {name: [name] for name in store.names}
        matches = _check_clear(find_slides(names, by_stem))
        matched = [name for name in names if matches[name].places]
        first = store.names[:1]  # the store has its width and encoder, also where no slide is asked for
        widths = dict.fromkeys([*matched, *first], store.dims)
        encoders = dict.fromkeys(first, store.encoder)
        reader = _store_reader(store)
    else:
        by_stem = feature_files(source)
        matches = _check_clear(find_slides(names, by_stem, source))
        for label, header in _read_headers(matches, dims).items():
            widths[label] = header.dims
            encoders[label] = header.encoder
        reader = _file_reader(dims)
    places = {name: match.places for name, match in matches.items() if match.places}
    _warn_of_cases(source, places)
    missing = tuple(name for name in names if name not in places)
    width = _check_width(source, widths, dims)
    encoder = _check_encoder(source, encoders)
    features = _open_places(places, missing, width, encoder, reader)
    if missing:
        # Only here, as the search compares the name with every file.
        features = evolve(features, near=near_names(missing[0], by_stem))
    return features


def _read_headers(matches: Mapping[str, Match], dims: int) -> dict[str, patch_files.About]:
    """{what an error calls the features: what their file says}; a case of several slides has several."""
    paths = {}
    for name, match in matches.items():
        if len(match.places) == 1:
            paths[name] = match.places[0]
            continue
        for path in match.places:
            paths[f"{name} ({path})"] = path
    headers = {}
    for label, path in track(paths.items(), "opening features"):
        headers[label] = opened.about_file(path, dims)
    return headers


def _warn_of_cases(source: Path, places: Mapping[str, Sequence[Any]]) -> None:
    cases = [name for name, several in places.items() if len(several) > 1]
    if cases:
        _log.warning(
            "%s: %d cases have several slides, which are taken as one bag each, such as %s",
            source,
            len(cases),
            cases[0],
        )


def _check_clear(matches: dict[str, Match]) -> dict[str, Match]:
    """Refuse a name that could be several slides, or one slide with several files."""
    for name, match in matches.items():
        if match.clear:
            continue
        # Two remedies: a longer name tells several slides apart, but not several files of one slide.
        if len(match.stems) > 1 and not is_case(name):
            raise ValueError(
                f"open_features: {name} must be one slide, {len(match.stems)} match: "
                f"{', '.join(match.stems[:4])}; give the full name"
            )
        several = ", ".join(map(str, match.places[:4]))
        raise ValueError(
            f"open_features: {name} must have one file, there are {several}; write the path in the "
            "questions, let data.features be the folder of one kind, or remove all but one"
        )
    return matches


def _open_places(
    places: Mapping[str, Sequence[Any]], missing: tuple[str, ...], width: int, encoder: str, reader: _Reader
) -> Features:
    """Features of {name: where they lie}.

    Several places are read as one slide without coordinates and patch size, which are of each slide alone.
    """

    def chunks(name: str, size: int) -> Iterator[Block]:
        has_coords = len(places[name]) == 1
        for place in places[name]:
            for x, xy in reader.chunks(place, size):
                if has_coords:
                    yield x, xy
                else:
                    yield x, None

    def patch_size(name: str) -> int | None:
        if len(places[name]) > 1:
            return None
        return reader.patch_size(places[name][0])

    def key(name: str) -> str:
        return " ".join(reader.key(place) for place in places[name])

    return Features(
        names=tuple(places),
        missing=missing,
        dims=width,
        encoder=encoder,
        patch_size=patch_size,
        chunks=chunks,
        key=key,
    )


def _store_reader(store: Slides) -> _Reader:
    # A store has a digest of the content; of a file, which may be large, size, time and samples stand for it.
    return _Reader(
        patch_size=lambda name: store.about(name).patch_size,
        chunks=store.chunks,
        key=lambda name: store.source(name)[1],
    )


def _file_reader(dims: int) -> _Reader:
    return _Reader(
        patch_size=lambda path: _patch_size(path, dims),
        chunks=lambda path, size: opened.file_chunks(path, size, dims=dims),
        key=opened.remembered_file_key,
    )


def _patch_size(path: Path, dims: int) -> int | None:
    """As `features.read_slide` says it, in the memory of one chunk."""
    size = opened.about_file(path, dims).patch_size
    if size is not None:
        return size
    # The file does not say it: all coordinates are read, but never all features at once.
    coords = [xy for _, xy in opened.file_chunks(path, dims=dims) if xy is not None]
    if not coords:
        return None
    size = patch_files.patch_size_of(np.concatenate(coords))
    if size is not None:
        _log.warning(
            "%s: does not give its patch size; taken as %d level-0 pixels, the most common distance between "
            "neighbours",
            path,
            size,
        )
    return size


def _check_width(source: Path, widths: Mapping[str, int], dims: int) -> int:
    """The width that all slides have and that is wanted, of {slide: width or 0}; 0 where nothing says one."""
    examples: dict[
        int, str
    ] = {}  # {width: the first slide that has it}; an empty slide may not say its width
    for name, width in widths.items():
        if width:
            examples.setdefault(width, name)
    allowed = {dims} if dims else set()
    if len(examples.keys() | allowed) > 1:
        listed = ", ".join(f"{examples[width]} has {width}" for width in sorted(examples))
        required = f" ({dims} wanted)" if dims else ""
        raise ValueError(f"{source}: all slides must have features of one width{required}, {listed}")
    return next(iter(examples), dims)


def _check_encoder(source: Path, encoders: Mapping[str, str]) -> str:
    """The encoder of all files that say one: two encoders of one width would mix unnoticed."""
    examples: dict[str, str] = {}
    for name, encoder in encoders.items():
        if encoder:
            examples.setdefault(encoder, name)
    if len(examples) > 1:
        listed = ", ".join(f"{name} is of {encoder!r}" for encoder, name in list(examples.items())[:4])
        raise ValueError(f"{source}: all slides must be of one encoder, {listed}")
    return next(iter(examples), "")


def open_slide(slide: files.PathLike, source: files.PathLike = "", *, dims: int = 0) -> Features:
    """The features of one slide, under the name as it is written.

    Args:
        slide: a file of patch features; `STORE::NAME`, a slide of a packed store; or the name of a slide in
            `source`.
        source: a folder of feature files or a packed store.
    Raises:
        ValueError: no such file or slide (with near names), several of the name, as `features.about_slide`;
            another width than `dims`; no patch.
    """
    written = str(slide)
    store, _, name = written.rpartition("::")
    # In this order: a file that exists is meant, even if its name holds "::".
    if Path(written).is_file():
        path = Path(written)
        header = opened.about_file(path, dims)
        width = _check_width(path, {written: header.dims}, dims)
        features = _open_places({written: [path]}, (), width, header.encoder, _file_reader(dims))
    elif Path(written).exists() or not (store or source):
        raise ValueError(f"{written}: no such file; a slide is a file of patch features, or STORE.h5::NAME")
    else:
        features = _only_slide(store or source, name, written, dims)
        features = _renamed(features, name, written)
    # One patch is read: an empty slide would otherwise be answered from a compressor that has seen nothing.
    if next(features.chunks(written, 1), None) is None:
        raise ValueError(f"{written}: must hold patches, the slide has none; was tissue found on it?")
    return features


def _only_slide(source: files.PathLike, name: str, written: str, dims: int) -> Features:
    if not Path(source).exists():
        raise ValueError(
            f"{written}: no such file; and {source}, where a slide of that name could lie, is not there "
            "either"
        )
    features = open_features(source, [name], dims=dims)
    if features.missing:
        raise ValueError(f"{written}: no such file, and no slide of that name in {source}{features.near}")
    return features


def _renamed(features: Features, name: str, written: str) -> Features:
    """The same slide under the name as it was written."""
    return evolve(
        features,
        names=(written,),
        patch_size=lambda _: features.patch_size(name),
        chunks=lambda _, size: features.chunks(name, size),
        key=lambda _: features.key(name),
    )


def whole(features: Features, name: str, most: int = 0) -> np.ndarray:
    """All patches of a slide [n, d], or `most` of them, evenly spread."""
    chunks = [x for x, _ in features.chunks(name, 65536)]
    if not chunks:
        return np.zeros((0, features.dims), np.float32)
    x = np.concatenate(chunks)
    if not most:
        return x
    return x[patch_files.sample_rows(len(x), most)]


# Tokens -----------------------------------------------------------------------------------------------------
def slide_tokens(
    cfg: CompressConfig,
    params: Tree,
    features: Features,
    folder: files.PathLike,
    *,
    chunk: int = 4096,
    names: Sequence[str] = (),
    together: bool = False,
) -> dict[str, Tensor]:
    """{slide: tokens float32 [k, d]} of a frozen compressor, rounded to 16 bits; each is computed once.

    Args:
        folder: the cache. Tokens lie in a folder of these weights, in a file for each content, so that other
            weights or features never find them.
        chunk: patches read at once.
        names: of which slides; all if left out.
        together: all processes call this at once: each computes its share and reads the others'.
    Raises:
        ValueError: a name without features; features of another width, or not finite (names the slide); a
            file of tokens that is broken.
    """
    available = set(features.names)
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ValueError(
            f"slide_tokens: every slide must have features, {len(unknown)} have none, the first is "
            f"{unknown[0]}"
        )
    names = names or features.names
    keys = {name: features.key(name) for name in names}
    # The folder's name says kind, slots and weights; the remedy is part of the error of a broken file.
    cache = CacheFolder(
        folder=Path(folder) / f"{cfg.kind}-{cfg.slots}-{skeletons.weights_name(str(cfg), params)}",
        shape=(cfg.slots, cfg.dim),
        remedy="remove it, the slide's tokens will be computed again",
    )

    def compute(name: str) -> None:
        tokens = _compress_slide(cfg, params, features, name, chunk)
        cache.write(keys[name], tokens)

    def is_cached(name: str) -> bool:
        return cache.has(keys[name])

    compute_missing(names, is_cached, compute, "compressing slides", together=together)
    # All are read from the cache, also those just computed: tokens are the same in the first run and later.
    return {name: torch.from_numpy(cache.read(keys[name])).float() for name in names}


def _compress_slide(
    cfg: CompressConfig, params: Tree, features: Features, name: str, chunk: int
) -> np.ndarray:
    """Tokens float16 [k, d] of one slide."""
    with _slide_in_errors(name):
        compressed = compress.compress_stream(cfg, params, partial(_patches, features, name, chunk))
    tokens = compressed.tokens.to("cpu", torch.float16)
    # Numbers above 65,504 became infinite; in the cache they would spoil every later training.
    if not bool(tokens.isfinite().all()):
        raise ValueError(
            f"slide {name}: its tokens are beyond 16 bits; are the features normalised as the compressor's "
            "were?"
        )
    return tokens.numpy()


def patch_weights(
    cfg: CompressConfig, params: Tree, features: Features, name: str, chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray | None]:
    """(weights [n, k] of every patch in every slot, coordinates [n, 2] or None); [0, k] without patches.

    Raises:
        ValueError: features of another width, or not finite (names the slide).
    """
    weights = [np.zeros((0, cfg.slots), np.float32)]
    coords: list[np.ndarray] = []
    with _slide_in_errors(name):
        state = None  # the weights of "moe" need no other patch
        if cfg.kind != "moe":
            # Those of the other kinds depend on all patches: a pass before this one gathers what they need.
            state = _last_state(cfg, params, partial(_patches, features, name, chunk))
        for x, xy in features.chunks(name, chunk):
            chunk_weights = compress.slot_weights(cfg, params, torch.from_numpy(x), state)
            weights.append(chunk_weights.cpu().numpy())
            if xy is not None:
                coords.append(xy)
    if not coords:
        return np.concatenate(weights), None
    return np.concatenate(weights), np.concatenate(coords)


def _last_state(cfg: CompressConfig, params: Tree, chunks: Callable[[], Iterator[Tensor]]) -> SlotState:
    """The state after the last patch of the last pass."""
    state = compress.begin_state(cfg, params)
    for i in range(cfg.passes):
        if i:  # a later pass starts from what the one before it has found
            state = compress.begin_state(cfg, params, state)
        for x in chunks():
            state = compress.update_state(cfg, params, state, x)
    return state


def _patches(features: Features, name: str, chunk: int) -> Iterator[Tensor]:
    return (torch.from_numpy(x) for x, _ in features.chunks(name, chunk))


@contextmanager
def _slide_in_errors(name: str) -> Iterator[None]:
    # The compressor knows patches only, and not whose they are.
    try:
        yield
    except ValueError as e:
        raise ValueError(f"slide {name}: {e}") from e
