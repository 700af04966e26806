"""Patch features of whole slides, as CLAM, TRIDENT, SlideChat and others write them."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen

from medvl.base.files import PathLike
from medvl.slides.formats import Block, Source, number_of, open_source, text_of, warn_once
from medvl.slides.names import slide_name

_log = logging.getLogger(__name__)
_PIECE = 2**16  # bytes of a file that `file_key` reads at each place


@frozen(kw_only=True)
class About:
    """What a file says of a slide without its patches being read."""

    name: str
    rows: int
    dims: int  # 0: an empty slide whose file does not say
    dtype: np.dtype  # of the features: float16 or float32
    has_coords: bool
    patch_size: int | None  # level-0 pixels; None: not said
    mpp: float | None  # micrometres per pixel
    magnification: float | None  # at which the patches were seen
    encoder: str  # "": not said


@frozen(kw_only=True, eq=False)
class Slide:
    """The patches of one slide."""

    name: str
    features: np.ndarray  # float16 or float32 [n, d], all finite
    coords: np.ndarray | None  # int64 [n, 2], x and y of the upper left corner in level-0 pixels
    patch_size: int | None  # level-0 pixels
    mpp: float | None
    magnification: float | None
    encoder: str

    @property
    def dtype(self) -> np.dtype:
        return self.features.dtype


def about_slide(path: PathLike, *, dims: int = 0) -> About:
    """Shapes and attributes of a file of patch features; the patches are not read (the lines of a CSV are counted).

    Args:
        dims: how many columns of a CSV are features, where it does not say; not compared with what is found.
    Raises:
        ValueError: as `read_slide`, but for what only the values can show.
    """
    with open_source(path, dims) as source:
        return _about(Path(path), source)


def read_slide(path: PathLike, *, dims: int = 0, drop: bool = False) -> Slide:
    """All patches of a slide.

    HDF5 of CLAM, TRIDENT or Prov-GigaPath; PyTorch files with a tensor or a dict of them; NumPy; CSV with or without header, features
    first. [1, n, d] is [n, d]; float64 and bfloat16 become float32. No file is ever unpickled beyond plain tensors.

    Args:
        dims: the d that is wanted; 0 takes any. In a CSV, columns of numbers behind the first `dims` are kept out, at most 8 of them.
        drop: leave out patches with NaN or infinity, with a warning that counts them, instead of refusing the file.
    Returns:
        the slide; features are [0, d] where it has no patch. A patch size the file does not say is the commonest distance of neighbours.
    Raises:
        ValueError: naming the file: not there, unknown or broken; Python objects (with how to convert them); the embedding of a whole
            slide; another d; coordinates that do not match or are no level-0 pixels; NaN or infinity, with the first such patch.
    """
    path = Path(path)
    with open_source(path, dims) as source:
        about = _about(path, source)
        _check_dims(path, about.dims, dims)
        parts = list(_checked(path, source, max(1, source.rows), drop))
    features, coords = parts[0] if parts else empty(about, dims)
    size = about.patch_size
    if size is None and coords is not None and (size := patch_size_of(coords)) is not None:
        _log.warning(
            "%s: does not say its patch size; taken as %d level-0 pixels, the commonest distance of neighbours",
            path,
            size,
        )
    return Slide(
        name=about.name,
        features=features,
        coords=coords,
        patch_size=size,
        mpp=about.mpp,
        magnification=about.magnification,
        encoder=about.encoder,
    )


def chunks(path: PathLike, size: int = 4096, *, dims: int = 0, drop: bool = False) -> Iterator[Block]:
    """The patches of a slide in file order, `size` at a time: (features [c, d], coords [c, 2] or None); only these are read.

    An empty slide gives no chunk, and neither do `size` patches that all are dropped. Arguments and errors as `read_slide`.
    """
    if size < 1:
        raise ValueError(f"chunks: size must be at least 1 patch, got {size}")

    def run() -> Iterator[Block]:
        with open_source(path, dims) as source:
            _check_dims(path, source.dims, dims)
            yield from _checked(Path(path), source, size, drop)

    return run()


def count_bad(path: PathLike, *, dims: int = 0) -> tuple[int, int]:
    """(how many patches hold NaN or infinity, the first of them from 0; -1 for none)."""
    count, first, at = 0, -1, 0
    with open_source(path, dims) as source:
        for x, _ in source.blocks(4096):
            if not _finite(x):
                bad = _bad(x)
                first = at + int(bad[0]) if first < 0 else first
                count += len(bad)
            at += len(x)
    return count, first


def empty(about: About, dims: int = 0) -> Block:
    """The features [0, d] and coordinates of a slide without patches."""
    return np.zeros((0, about.dims or dims), about.dtype), np.zeros(
        (0, 2), np.int64
    ) if about.has_coords else None


def _about(path: Path, source: Source) -> About:
    magnification = number_of(path, source.attrs, "target_magnification")
    return About(
        name=slide_name(path.name),
        rows=source.rows,
        dims=source.dims,
        dtype=source.dtype,
        has_coords=source.has_coords,
        patch_size=_said_patch_size(path, source.attrs),
        mpp=number_of(path, source.attrs, "mpp"),
        magnification=number_of(path, source.attrs, "magnification")
        if magnification is None
        else magnification,
        encoder=text_of(source.attrs, "encoder") or text_of(source.attrs, "extractor"),
    )


def _said_patch_size(path: Path, attrs: Mapping[str, Any]) -> int | None:
    """The side of a patch in level-0 pixels by what TRIDENT, CLAM or STAMP writes of it, None where that is not enough."""
    number = partial(number_of, path, attrs)
    size = number("patch_size_level0")
    if size is not None and (size < 1 or size % 1):
        raise ValueError(f"{path}: patch_size_level0 must be a whole number of pixels, got {size}")
    if size is not None:
        return int(size)
    own, downsample = number("patch_size"), number("downsample")
    if downsample is None and number("patch_level") == 0:
        downsample = 1.0
    level0, target = number("level0_magnification"), number("target_magnification")
    tile, mpp = number("tile_size_um"), number("mpp")
    if own and downsample:
        size = own * downsample
    elif own and level0 and target:
        size = own * level0 / target
    elif tile and mpp:
        size = tile / mpp
    if size is None:
        return None
    if not 1 <= size < 2**31:
        raise ValueError(
            f"{path}: a patch must have a side of 1 level-0 pixel or more, its attributes say {size:g}"
        )
    return round(size)


def _check_dims(path: PathLike, found: int, wanted: int) -> None:
    if wanted and found and found != wanted:
        hint = (
            "; `doubled` makes [x, x] of them, for models that were trained on that"
            if 2 * found == wanted
            else "; another encoder?"
        )
        raise ValueError(f"{path}: features must be {wanted} numbers per patch, got {found}{hint}")


def _checked(path: Path, source: Source, size: int, drop: bool) -> Iterator[Block]:
    at = lost = zeros = 0
    for x, xy in source.blocks(size):
        zeros = _zeros_at_the_end(x, zeros)
        rows, xy = len(x), None if xy is None else _pixels(path, xy, at)
        if not _finite(x):
            bad = _bad(x)
            if not drop:
                raise ValueError(
                    f"{path}: patch {at + bad[0]} (from 0) holds NaN or infinity; `invoke slides pack --drop` makes a store without such "
                    "patches, with a warning"
                )
            x, xy = np.delete(x, bad, 0), None if xy is None else np.delete(xy, bad, 0)
            lost += len(bad)
        at += rows
        if len(x):
            yield x, xy
    if 0 < zeros < at:
        warn_once(
            f"{path}: the last {zeros} of {at} patches are all zeros and are taken as they are; were they padded, or was the writer killed?"
        )
    if lost:
        _log.warning("%s: %d of %d patches hold NaN or infinity and are left out", path, lost, at)


def _zeros_at_the_end(x: np.ndarray, before: int) -> int:
    """How many rows of zeros end the patches that were read, of which so many were there before this block."""
    if not len(x) or x[-1].any():
        return 0
    filled = np.flatnonzero(x.any(1))
    return len(x) - 1 - int(filled[-1]) if len(filled) else before + len(x)


def _finite(x: np.ndarray) -> bool:
    """One pass without a mask."""
    return not x.size or bool(torch.stack(torch.from_numpy(x).aminmax()).isfinite().all())


def _bad(x: np.ndarray) -> np.ndarray:
    return np.flatnonzero(~np.isfinite(x).all(1))


def _pixels(path: Path, xy: np.ndarray, at: int) -> np.ndarray:
    if xy.dtype.kind in "iu":
        return xy.astype(np.int64)
    wrong = np.flatnonzero(~(np.isfinite(xy) & (xy == np.round(xy))).all(1))
    if len(wrong):
        found = xy[wrong[0]].tolist()
        raise ValueError(
            f"{path}: coords must be whole level-0 pixels, got {found} for patch {at + wrong[0]} (from 0); what unit is that?"
        )
    return xy.astype(np.int64)


# Features -------------------------------------------------------------------------------------------------------------------------------
def patch_size_of(coords: np.ndarray) -> int | None:
    """The side of a patch in level-0 pixels, from its coordinates [n, 2]: the commonest distance between neighbours in a row or column.

    On one regular grid it is the smallest positive gap; where every piece of tissue has a grid of its own (CLAM) the smallest gap would
    be the distance of two grids. Where patches overlap it is the step between them, less than a patch. None for less than two patches.
    """
    gaps = [_gaps(coords[:, a], coords[:, 1 - a]) for a in (0, 1)]
    both = np.concatenate(gaps)
    if not len(both):  # no two patches share a row or a column
        both = np.concatenate([np.diff(np.unique(coords[:, a])) for a in (0, 1)])
        return int(both.min()) if len(both) else None
    values, counts = np.unique(both, return_counts=True)
    return int(values[counts.argmax()])  # the smallest of equally common ones


def _gaps(along: np.ndarray, line: np.ndarray) -> np.ndarray:
    order = np.lexsort((along, line))
    gaps, same = np.diff(along[order]), np.diff(line[order]) == 0
    return gaps[same & (gaps > 0)]


def doubled(features: np.ndarray) -> np.ndarray:
    """[x, x]: [n, d] to [n, 2 d], as TC-SSA fed 512 numbers to models of 1024. It adds no information; only for models trained on it."""
    return np.concatenate([features, features], -1)


def sample_rows(n: int, most: int) -> np.ndarray:
    """Which of n patches are taken when `most` are wanted: int64, evenly spread from the first to the last; all where n <= most.

    Source: SlideChat, np.linspace(0, n - 1, most, dtype=int).
    """
    if most < 1 or n < 0:
        raise ValueError(f"sample_rows: wants at least 1 of 0 or more patches, got most={most}, n={n}")
    return np.linspace(0, n - 1, most, dtype=np.int64) if n >= most else np.arange(n, dtype=np.int64)


def file_key(path: PathLike) -> str:
    """What tells a file from another content of that name: size and time, and what stands at three places, as unpacked archives may give
    all their files one time."""
    with open(path, "rb") as f:
        stat, digest = os.fstat(f.fileno()), hashlib.sha256()
        for at in (0, stat.st_size // 2, stat.st_size - _PIECE):
            f.seek(max(0, at))
            digest.update(f.read(_PIECE))
    return f"{Path(path).name} {stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}"
