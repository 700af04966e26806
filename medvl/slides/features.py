"""Patch features of whole slides, as CLAM, TRIDENT, SlideChat and others write them."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
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
_PIECE = 2**16  # bytes of a file that `read_file_key` reads at each place


@frozen(kw_only=True)
class About:
    """What a file says of a slide; its patches are not read."""

    name: str
    rows: int
    dims: int  # 0: an empty slide whose file does not say
    dtype: np.dtype  # of the features: float16 or float32
    has_coords: bool
    patch_size: int | None  # level-0 pixels; None: unknown
    mpp: float | None  # micrometres per pixel
    magnification: float | None  # at which the patches were seen
    encoder: str  # "": unknown


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
    """Shapes and attributes of a file of patch features. Patches are not read; lines of a CSV are counted.

    Args:
        dims: how many columns of a CSV are features, where it does not say; not compared with what is found.
    Raises:
        ValueError: as `read_slide`, but for what only the values can show.
    """
    with open_source(path, dims) as source:
        return _about(Path(path), source)


def open_patches(path: PathLike, *, dims: int, keep: Callable[[int], bool]) -> tuple[About, Block | None]:
    """What a file says, and all its patches, if it is to be kept; the file is opened once.

    Args:
        keep: bytes -> whether so many are to be read.
    Returns:
        about, and features [n, d] with coordinates [n, 2] or None. The patches are None, too, where they are
        faulty: who reads them by `chunks` raises.
    """
    path = Path(path)
    with open_source(path, dims) as source:
        header = _about(path, source)
        if not keep(header.rows * header.dims * header.dtype.itemsize):
            return header, None
        try:
            blocks = list(_checked_blocks(path, source, max(1, source.rows), drop=False))
        except ValueError:
            return header, None
    if not blocks:
        return header, _no_patches(header, dims)
    return header, blocks[0]


def read_slide(path: PathLike, *, dims: int = 0, drop: bool = False) -> Slide:
    """All patches of a slide.

    HDF5 of CLAM, TRIDENT or Prov-GigaPath; PyTorch files with a tensor or a dict of them; NumPy; CSV with or
    without header, features first. [1, n, d] is [n, d]; float64 and bfloat16 become float32. No file is ever
    unpickled beyond plain tensors.

    Args:
        dims: the d that is wanted; 0 takes any. In a CSV, columns of numbers behind the first `dims` are kept
            out, at most 8 of them.
        drop: leave out patches with NaN or infinity, with a warning that counts them, instead of refusing the
            file.
    Returns:
        the slide; features are [0, d] where it has no patch. A patch size that the file does not say is the
        commonest distance of neighbours.
    Raises:
        ValueError: naming the file: not there, unknown or broken; Python objects (with how to convert them);
            the embedding of a whole slide; another d; coordinates that do not match or are no level-0 pixels;
            NaN or infinity, with the first such patch.
    """
    path = Path(path)
    with open_source(path, dims) as source:
        header = _about(path, source)
        _check_dims(path, header.dims, dims)
        # One block of all patches, so that none is copied a second time.
        blocks = list(_checked_blocks(path, source, max(1, source.rows), drop))
    features, coords = _no_patches(header, dims)
    if blocks:
        features, coords = blocks[0]
    patch_size = header.patch_size
    if patch_size is None and coords is not None:
        patch_size = patch_size_of(coords)
        if patch_size is not None:
            _log.warning(
                "%s: does not give its patch size; taken as %d level-0 pixels, the most common distance "
                "between neighbours",
                path,
                patch_size,
            )
    return Slide(
        name=header.name,
        features=features,
        coords=coords,
        patch_size=patch_size,
        mpp=header.mpp,
        magnification=header.magnification,
        encoder=header.encoder,
    )


def chunks(path: PathLike, size: int = 4096, *, dims: int = 0, drop: bool = False) -> Iterator[Block]:
    """The patches of a slide in file order, `size` at a time: (features [c, d], coords [c, 2] or None).

    Only these are read. An empty slide gives no chunk, and neither do `size` patches that all are dropped.
    Arguments and errors as `read_slide`.
    """
    # Not a generator itself: a wrong size raises here, and not at the first chunk.
    if size < 1:
        raise ValueError(f"chunks: size must be at least 1 patch, got {size}")
    return _read_chunks(Path(path), size, dims, drop)


def _read_chunks(path: Path, size: int, dims: int, drop: bool) -> Iterator[Block]:
    with open_source(path, dims) as source:
        _check_dims(path, source.dims, dims)
        yield from _checked_blocks(path, source, size, drop)


def count_bad(path: PathLike, *, dims: int = 0) -> tuple[int, int]:
    """(how many patches hold NaN or infinity, the first of them from 0; -1 for none)."""
    count, first, start = 0, -1, 0
    with open_source(path, dims) as source:
        for x, _ in source.blocks(4096):
            if not _all_finite(x):
                bad = _bad_rows(x)
                if first < 0:
                    first = start + int(bad[0])
                count += len(bad)
            start += len(x)
    return count, first


def _no_patches(header: About, dims: int) -> Block:
    """Features [0, d] and coordinates of a slide without patches."""
    features = np.zeros((0, header.dims or dims), header.dtype)
    coords = None
    if header.has_coords:
        coords = np.zeros((0, 2), np.int64)
    return features, coords


def _about(path: Path, source: Source) -> About:
    magnification = number_of(path, source.attrs, "target_magnification")
    if magnification is None:
        magnification = number_of(path, source.attrs, "magnification")
    return About(
        name=slide_name(path.name),
        rows=source.rows,
        dims=source.dims,
        dtype=source.dtype,
        has_coords=source.has_coords,
        patch_size=_written_patch_size(path, source.attrs),
        mpp=number_of(path, source.attrs, "mpp"),
        magnification=magnification,
        encoder=text_of(source.attrs, "encoder") or text_of(source.attrs, "extractor"),
    )


def _written_patch_size(path: Path, attrs: Mapping[str, Any]) -> int | None:
    """The side of a patch in level-0 pixels by attributes of TRIDENT, CLAM or STAMP; None if they lack it."""
    number = partial(number_of, path, attrs)
    size = number("patch_size_level0")
    if size is not None:
        if size < 1 or size % 1:
            raise ValueError(f"{path}: patch_size_level0 must be a whole number of pixels, got {size}")
        return int(size)
    # The side that was read at some level or magnification; its ratio to level 0 is in other attributes.
    read_size, downsample = number("patch_size"), number("downsample")
    if downsample is None and number("patch_level") == 0:
        downsample = 1.0
    level0, target = number("level0_magnification"), number("target_magnification")
    tile_um, mpp = number("tile_size_um"), number("mpp")
    if read_size and downsample:
        size = read_size * downsample
    elif read_size and level0 and target:
        size = read_size * level0 / target
    elif tile_um and mpp:
        size = tile_um / mpp
    if size is None:
        return None
    if not 1 <= size < 2**31:
        raise ValueError(
            f"{path}: a patch must have a side of 1 level-0 pixel or more, its attributes say {size:g}"
        )
    return round(size)


def _check_dims(path: PathLike, dims: int, required: int) -> None:
    """Refuse features of another width than is required; 0 is unknown, or any."""
    if not required or not dims or dims == required:
        return
    hint = "; another encoder?"
    if 2 * dims == required:  # old compressors were trained on features that stand twice
        hint = "; for a model that was trained on [x, x], write files of numpy.concatenate([x, x], 1)"
    raise ValueError(f"{path}: features must be {required} numbers per patch, got {dims}{hint}")


# Values -----------------------------------------------------------------------------------------------------
def _checked_blocks(path: Path, source: Source, size: int, drop: bool) -> Iterator[Block]:
    """The blocks of a file, coordinates as int64; patches with NaN or infinity raise, or are dropped."""
    start = dropped = zeros = 0
    for x, xy in source.blocks(size):
        zeros = _zeros_at_the_end(x, zeros)
        count = len(x)
        if xy is not None:
            xy = _pixels(path, xy, start)
        if not _all_finite(x):
            bad = _bad_rows(x)
            if not drop:
                raise ValueError(
                    f"{path}: patch {start + bad[0]} (from 0) holds NaN or infinity; `invoke slides pack "
                    "--drop` makes a store without such patches, with a warning"
                )
            x = np.delete(x, bad, 0)  # the coordinates below alike: row i is one patch in both
            if xy is not None:
                xy = np.delete(xy, bad, 0)
            dropped += len(bad)
        start += count  # of the rows in the file, so that numbers of patches are those of the file
        if len(x):
            yield x, xy
    if 0 < zeros < start:
        warn_once(
            f"{path}: the last {zeros} of {start} patches are all zeros and are taken as they are; were "
            "they padded, or was the writer killed?"
        )
    if dropped:
        _log.warning("%s: %d of %d patches hold NaN or infinity and are left out", path, dropped, start)


def _zeros_at_the_end(x: np.ndarray, before: int) -> int:
    """How many rows of zeros end what was read: `before` ended the blocks before this one."""
    if not len(x) or x[-1].any():
        return 0
    filled = np.flatnonzero(x.any(1))
    if not len(filled):  # the run of zeros goes on through this block
        return before + len(x)
    return len(x) - 1 - int(filled[-1])


def _all_finite(x: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, in one pass without a mask: minimum and maximum show both."""
    if not x.size:
        return True
    return bool(torch.stack(torch.from_numpy(x).aminmax()).isfinite().all())


def _bad_rows(x: np.ndarray) -> np.ndarray:
    return np.flatnonzero(~np.isfinite(x).all(1))


def _pixels(path: Path, xy: np.ndarray, start: int) -> np.ndarray:
    """Coordinates as int64; refuses fractions, which are in another unit. `start`: the first patch."""
    if xy.dtype.kind not in "iu":
        is_whole = np.isfinite(xy) & (xy == np.round(xy))
        wrong = np.flatnonzero(~is_whole.all(1))
        if len(wrong):
            raise ValueError(
                f"{path}: coords must be whole level-0 pixels, got {xy[wrong[0]].tolist()} for patch "
                f"{start + wrong[0]} (from 0); what unit is that?"
            )
    return xy.astype(np.int64)


# Patches ----------------------------------------------------------------------------------------------------
def patch_size_of(coords: np.ndarray) -> int | None:
    """The side of a patch in level-0 pixels from coordinates [n, 2]: the commonest distance of neighbours.

    Neighbours are in one row or column. On one regular grid this is the smallest positive gap; where every
    piece of tissue has a grid of its own (CLAM) the smallest gap would be the distance of two grids. Where
    patches overlap it is the step between them, less than a patch. None for less than two patches.
    """
    gaps = np.concatenate([_gaps(coords[:, 0], coords[:, 1]), _gaps(coords[:, 1], coords[:, 0])])
    if len(gaps):
        values, counts = np.unique(gaps, return_counts=True)
        return int(values[counts.argmax()])  # the smallest of equally common ones
    # No two patches share a row or a column.
    gaps = np.concatenate([np.diff(np.unique(coords[:, 0])), np.diff(np.unique(coords[:, 1]))])
    return int(gaps.min()) if len(gaps) else None


def _gaps(along: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Positive distances of neighbours along one axis, of patches that share the other one, `line`."""
    order = np.lexsort((along, line))  # line by line, and along each line
    gaps = np.diff(along[order])
    same_line = np.diff(line[order]) == 0
    return gaps[same_line & (gaps > 0)]


def sample_rows(n: int, most: int) -> np.ndarray:
    """Which of n patches are taken when `most` are wanted: int64, evenly spread from the first to the last.

    All where n <= most. Source: SlideChat, np.linspace(0, n - 1, most, dtype=int).
    """
    if most < 1 or n < 0:
        raise ValueError(f"sample_rows: wants at least 1 of 0 or more patches, got most={most}, n={n}")
    if n < most:
        return np.arange(n, dtype=np.int64)
    return np.linspace(0, n - 1, most, dtype=np.int64)


def read_file_key(path: PathLike) -> str:
    """What tells a file from another content under its name: size, time, and the bytes at three places.

    Time and size do not suffice: unpacked archives may give all their files one time.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        stat = os.fstat(f.fileno())  # of the opened file: another may be put under its name meanwhile
        for start in (0, stat.st_size // 2, stat.st_size - _PIECE):
            f.seek(max(0, start))
            digest.update(f.read(_PIECE))
    return f"{Path(path).name} {stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}"
