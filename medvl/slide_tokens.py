"""A frozen compressor's tokens of slides: computed from disk chunk by chunk, kept in files, found again by weights and features."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor
from tqdm import tqdm

from medvl import compressor, files, hub
from medvl.data import slide_store, slides
from medvl.data.slides import Block
from medvl.slots import CompressConfig, State
from medvl.tree import Tree

_log = logging.getLogger("medvl")
_PIECE = 2**16  # bytes


@frozen(kw_only=True, eq=False)
class Features:
    """Patch features of slides by name, of a folder of files or of a packed store."""

    names: tuple[str, ...]  # those that are there, as they were asked for
    missing: tuple[str, ...]
    dims: int  # width of the features
    patch_size: Callable[[str], int | None] = field(repr=False)
    chunks: Callable[[str, int], Iterator[Block]] = field(repr=False)
    key: Callable[[str], str] = field(repr=False)  # says what the content is: another key is another content


def open_features(where: files.PathLike, names: Sequence[str], *, dims: int = 0) -> Features:
    """The features of these slides; slides without features are told, not raised.

    Args:
        where: a folder with one file per slide (any format of `slides`), or a store that `slide_store.pack` made.
        names: slide ids or names of files; matched as `slides.match_slide` does.
    Raises:
        ValueError: no such folder or store; a name that several files match; widths that differ, or are not `dims`.
    """
    where, wanted = Path(where), list(dict.fromkeys(names))
    if where.is_file():
        of = slide_store.open_slides(where)
        index = slides.index_stems(of.names)
        found = {n: _one(n, index.get(slides.slide_name(n), [])) for n in wanted}
        there = {n: stem for n, stem in found.items() if stem}
        _same_width(where, {n: of.dims for n in (*there, *of.names[:1])}, dims)
        return Features(
            names=tuple(there),
            missing=tuple(n for n in wanted if n not in there),
            dims=of.dims,
            patch_size=lambda n: of.about(there[n]).patch_size,
            chunks=lambda n, size: of.chunks(there[n], size),
            key=lambda n: of.source(there[n])[1],
        )
    held = slides.feature_files(where)
    index = slides.index_stems(held)
    stems = {n: _one(n, index.get(slides.slide_name(n), [])) for n in wanted}
    paths = {n: _only(n, held[stem]) for n, stem in stems.items() if stem}
    widths = {n: slides.about_slide(p, dims=dims).dims for n, p in paths.items()}
    return _of_files(paths, tuple(n for n in wanted if n not in paths), _same_width(where, widths, dims), dims)


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
        width = slides.about_slide(written, dims=dims).dims
        found = _of_files({written: Path(written)}, (), _same_width(Path(written), {written: width}, dims), dims)
    elif Path(written).exists() or not (store or where):
        raise ValueError(f"{written}: no such file; a slide is a file of patch features, or STORE.h5::NAME")
    else:
        found = _renamed(_only_slide(store or where, name, written, dims), name, written)
    if next(found.chunks(written, 1), None) is None:
        raise ValueError(f"{written}: must hold patches, the slide has none; was tissue found on it?")
    return found


def _only_slide(where: files.PathLike, name: str, written: str, dims: int) -> Features:
    if not Path(where).exists():
        raise ValueError(f"{written}: no such file; and {where}, where a slide of that name could lie, is not there either")
    found = open_features(where, [name], dims=dims)
    if found.missing:
        known = slide_store.open_slides(where).names if Path(where).is_file() else slides.feature_files(where)
        raise ValueError(f"{written}: no such file, and no slide of that name in {where}{slides.near_names(name, known)}")
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


def _of_files(paths: Mapping[str, Path], missing: tuple[str, ...], width: int, dims: int) -> Features:
    return Features(
        names=tuple(paths),
        missing=missing,
        dims=width,
        patch_size=lambda n: _patch_size(paths[n], dims),
        chunks=lambda n, size: slides.chunks(paths[n], size, dims=dims),
        key=lambda n: _key(paths[n]),
    )


def whole(of: Features, name: str, most: int = 0) -> np.ndarray:
    """All patches of a slide [n, d], or `most` of them, evenly spread."""
    held = [x for x, _ in of.chunks(name, 65536)]
    x = np.concatenate(held) if held else np.zeros((0, of.dims), np.float32)
    return x[slides.sample_rows(len(x), most)] if most else x


def slide_tokens(
    cfg: CompressConfig, params: Tree, of: Features, folder: files.PathLike, *, chunk: int = 4096, names: Sequence[str] = ()
) -> dict[str, Tensor]:
    """{slide: tokens float32 [k, d]} of a frozen compressor, in the precision of 16 bits; each is computed once and kept.

    Args:
        folder: tokens lie in a folder of these weights, in a file for each content; other weights or features never find them.
        names: of which slides; all if left out.
    Raises:
        ValueError: a name that is not of `of`; features of another width, or not finite (names the slide); a file of tokens that is broken.
    """
    if unknown := [n for there in [set(of.names)] for n in names if n not in there]:
        raise ValueError(f"slide_tokens: every slide must have features, {len(unknown)} have none, the first is {unknown[0]}")
    home = Path(folder) / f"{cfg.kind}-{cfg.slots}-{_digest(cfg, params)}"
    out: dict[str, Tensor] = {}
    for name in tqdm(names or of.names, desc="slide tokens", leave=False, disable=None):
        path = home / f"{hashlib.sha256(of.key(name).encode()).hexdigest()[:20]}.npy"
        if not path.exists():
            with _told(name):
                found = compressor.compress_stream(cfg, params, partial(_patches, of, name, chunk))
            half = found.tokens.to("cpu", torch.float16)
            if not bool(half.isfinite().all()):
                raise ValueError(f"slide {name}: its tokens are beyond 16 bits; are the features normalised as the compressor's were?")
            files.write_array(path, half.numpy())
        held = files.read_array(path, (cfg.slots, cfg.dim), "remove it, the slide's tokens will be computed again")
        out[name] = torch.from_numpy(held).float()
    return out


def patch_weights(cfg: CompressConfig, params: Tree, of: Features, name: str, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray | None]:
    """(weights [n, k] of every patch in every slot, coordinates [n, 2] or None) of one slide; without patches, [0, k] and None.

    Raises:
        ValueError: features of another width, or not finite (names the slide).
    """
    weights, places = [np.zeros((0, cfg.slots), np.float32)], list[np.ndarray]()
    with _told(name):
        state = _end(cfg, params, partial(_patches, of, name, chunk)) if cfg.kind != "moe" else None  # its weights need no other patch
        for x, xy in of.chunks(name, chunk):
            weights.append(compressor.slot_weights(cfg, params, torch.from_numpy(x), state).cpu().numpy())
            places += [] if xy is None else [xy]
    return np.concatenate(weights), np.concatenate(places) if places else None


def _end(cfg: CompressConfig, params: Tree, chunks: Callable[[], Iterator[Tensor]]) -> State:
    """The state behind the last patch of the last pass."""
    state = compressor.begin(cfg, params)
    for turn in range(cfg.passes):
        state = compressor.begin(cfg, params, state) if turn else state
        for x in chunks():
            state = compressor.update(cfg, params, state, x)
    return state


def _patches(of: Features, name: str, chunk: int) -> Iterator[Tensor]:
    return (torch.from_numpy(x) for x, _ in of.chunks(name, chunk))


def _digest(cfg: CompressConfig, params: Mapping) -> str:
    return hashlib.sha256(f"{cfg} {hub.digest(dict(params))}".encode()).hexdigest()[:12]


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        raise ValueError(f"slide {name}: {e}") from e


def _key(path: Path) -> str:
    """Name, size and time, and what stands at three places: unpacked archives may give all their files one time."""
    with open(path, "rb") as f:
        stat, digest = os.fstat(f.fileno()), hashlib.sha256()
        for at in (0, stat.st_size // 2, stat.st_size - _PIECE):
            f.seek(max(0, at))
            digest.update(f.read(_PIECE))
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}"


def _patch_size(path: Path, dims: int) -> int | None:
    """As `slides.read_slide` says it, in the memory of one chunk."""
    if (said := slides.about_slide(path, dims=dims).patch_size) is not None:
        return said
    places = [xy for _, xy in slides.chunks(path, dims=dims) if xy is not None]
    size = slides.patch_size_of(np.concatenate(places)) if places else None
    if size is not None:
        _log.warning("%s: does not say its patch size; taken as %d level-0 pixels, the commonest distance of neighbours", path, size)
    return size


def _one(name: str, stems: Sequence[str]) -> str:
    if len(stems) > 1:
        raise ValueError(f"open_features: {name} must be one slide, {len(stems)} match: {', '.join(stems[:4])}; give the full name")
    return stems[0] if stems else ""


def _only(name: str, paths: Sequence[Path]) -> Path:
    if len(paths) > 1:
        raise ValueError(f"open_features: {name} must have one file, there are {', '.join(map(str, paths[:4]))}; remove all but one")
    return paths[0]


def _same_width(where: Path, widths: Mapping[str, int], dims: int) -> int:
    found = {w for w in widths.values() if w} | ({dims} if dims else set())
    if len(found) > 1:
        odd = {w: next(n for n, v in widths.items() if v == w) for w in sorted(found) if w in widths.values()}
        said = ", ".join(f"{n} has {w}" for w, n in odd.items())
        raise ValueError(f"{where}: all slides must have features of one width{f' ({dims} wanted)' if dims else ''}, {said}")
    return next(iter(found), dims)
