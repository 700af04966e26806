"""Files of patch features as they are in the wild, opened so that they can be read in pieces: HDF5, PyTorch, NumPy and CSV."""

import csv
import functools
import itertools
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from attrs import frozen

from medvl.base.files import (
    READ_ERRORS,
    PathLike,
    check_regular,
    check_tensor_storage,
    check_uncompressed,
    error_reason,
    open_dataset,
)

_log = logging.getLogger(__name__)

STORE = "medvl-slides"  # attribute "format" of a store of many slides (`slide_store`), which is not one slide
SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".npy", ".csv")
_KEYS = (
    "features",
    "feature",
    "feat",
    "feats",
    "embeddings",
    "tile_embeds",
)  # "feats" is STAMP's, the last Prov-GigaPath's
_ATTRS = (  # all that is looked at
    *(
        "patch_size_level0",
        "level0_magnification",
        "target_magnification",
        "magnification",
        "mpp",
        "encoder",
    ),  # TRIDENT
    *("patch_size", "patch_level", "downsample"),  # CLAM; TRIDENT's patch_size is at the target magnification
    *("unit", "tile_size_um", "extractor"),  # STAMP
)
_MICROMETRES = (
    "um",
    "\u00b5m",
    "\u03bcm",
    "micron",
    "microns",
    "micrometer",
    "micrometers",
    "micrometre",
    "micrometres",
)
_PIXELS = ("", "px", "pixel", "pixels")
_WIDTHS = (
    384,
    512,
    768,
    1024,
    1280,
    1536,
    2048,
    2560,
    3072,
    4608,
)  # of encoders in use; only to tell features from columns behind them
_LONGEST = 2**21  # characters of a line: some 50 times that of the widest encoder
_TRAILING = 8  # columns that may stand behind the features of a CSV, unless they are text
_LOOKED_AT = 8  # lines of a CSV, to tell its layout
_CONVERT = (  # a tensor or array, or of a dict its arrays, plain numbers and texts
    "python -c \"import torch; x = torch.load({0!r}, weights_only=False); torch.save({{k: torch.as_tensor(v) if getattr(v, 'shape', ()) "
    "else v for k, v in x.items() if getattr(v, 'shape', ()) or type(v) in (str, int, float)}} if isinstance(x, dict) "
    'else torch.as_tensor(x), {0!r})"'
)
_CONVERT_NPY = "np.save({0!r}, np.load({0!r}, allow_pickle=True).item()['feature'])"

Block = tuple[np.ndarray, np.ndarray | None]


@frozen(kw_only=True, eq=False)
class Source:
    """An open file of n patches; nothing is checked yet but the shapes."""

    rows: int
    dims: int  # 0: an empty file that does not say
    dtype: np.dtype  # float16 or float32
    has_coords: bool
    attrs: Mapping[str, Any]
    blocks: Callable[
        [int], Iterator[Block]
    ]  # of so many rows: features [c, d] and coordinates [c, 2], of any number type


@contextmanager
def open_source(path: PathLike, dims: int = 0) -> Iterator[Source]:
    """Open a file of patch features. What it is, is told by its first bytes; only CSV, which has no mark, by its suffix.

    Args:
        dims: how many columns of a CSV are features, where it does not say; else without effect.
    Raises:
        ValueError: no such file, an unknown or broken one, one that holds Python objects, or arrays of other shapes or types.
    """
    path = Path(path)
    try:
        with _OPEN[_kind(path)](path, dims) as source:
            yield source
    except (OSError, RuntimeError) as e:  # also from HDF5, while it is read
        raise ValueError(f"{path}: cannot be read, or is broken ({e})") from e


def _kind(path: Path) -> str:
    check_regular(path)
    if path.is_dir():
        raise ValueError(f"{path}: must be a file of patch features, found a folder")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as f:
        head = f.read(64)
    marks = {b"\x89HDF\r\n\x1a\n": "h5", b"\x93NUMPY": "npy", b"PK\x03\x04": "pt", b"\x80": "pt"}
    kind = next((kind for mark, kind in marks.items() if head.startswith(mark)), "")
    suffix = path.suffix.lower()
    if suffix == ".csv" and not kind and head and not head.startswith(b"version https://git-lfs"):
        return "csv"
    if not kind or suffix == ".npz":
        what = "is empty" if not head else f"starts with {head[:16]!r}"
        what = (
            "is a Git LFS pointer, the file itself was not fetched"
            if head.startswith(b"version https://git-lfs")
            else what
        )
        raise ValueError(
            f"{path}: {what}; patch features are HDF5 (.h5), PyTorch (.pt), NumPy (.npy) or .csv files"
        )
    return kind


# Arrays ---------------------------------------------------------------------------------------------------------------------------------
@contextmanager
def _open_h5(path: Path, _: int) -> Iterator[Source]:
    with h5py.File(path, "r", locking=False) as f:
        try:
            source = _inspect_h5(path, f)
        except (ValueError, *READ_ERRORS) as e:
            if isinstance(e, ValueError) and str(e).startswith(str(path)):
                raise
            raise ValueError(f"{path}: is a broken HDF5 file ({e})") from e
        yield source


def _inspect_h5(path: Path, f: h5py.File) -> Source:
    if f.attrs.get("format") == STORE:
        raise ValueError(
            f"{path}: is a packed store of {f['rows'].shape[0]} slides, not one slide; `invoke ask --slide {path}::NAME` asks about one "
            "of them, data.features takes the whole store, and slide_store.open_slides reads it"
        )
    names = dict.fromkeys(f)
    features = open_dataset(f, _key(names, path), path)
    coords = open_dataset(f, "coords", path) if "coords" in names else None
    attrs = dict[str, Any]()
    for holder in (f, coords, features):  # what the features say of themselves goes first
        if holder is not None:
            attrs |= {key: holder.attrs[key] for key in _ATTRS if key in holder.attrs}
    unit = text_of(attrs, "unit").lower() or ("um" if "tile_size_um" in attrs else "")
    if coords is None or unit in _PIXELS:
        return _arrays(path, features, coords, attrs)
    if unit not in _MICROMETRES:
        raise ValueError(f"{path}: the unit of coords must be px or um, got {unit!r}")
    mpp = number_of(path, attrs, "mpp")
    if not mpp or mpp < 0:
        warn_once(
            f"{path}: coords are in micrometres and the file does not say the slide's mpp, so that no level-0 pixels can be told: they are "
            "left out; give the file an attribute mpp (micrometres per level-0 pixel) to have maps in their places"
        )
        return _arrays(path, features, None, attrs)
    return _arrays(path, features, coords, attrs, mpp=mpp)


@functools.lru_cache(maxsize=8192)  # a file is opened several times
def warn_once(message: str) -> None:
    """Warn of a file; the same words are said once."""
    _log.warning(message)


def text_of(attrs: Mapping[str, Any], key: str) -> str:
    """An attribute as text, "" where it is not there or TRIDENT's "None"."""
    value = attrs.get(key, "")
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return "" if text == "None" else text


def number_of(path: Path, attrs: Mapping[str, Any], key: str) -> float | None:
    """An attribute as a number, None where it is not there; of several equal ones, as of x and y, their mean.

    Raises:
        ValueError: it is no number, or several that differ by more than a hundredth.
    """
    words = text_of(attrs, key).strip("[]() ").replace(",", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError as e:
        raise ValueError(f"{path}: {key} must be a number, got {text_of(attrs, key)!r}") from e
    if not numbers:
        return None
    mean = sum(numbers) / len(numbers)
    if max(numbers) - min(numbers) > 0.01 * abs(mean):
        raise ValueError(
            f"{path}: {key} must be one number, or the same for x and y, got {text_of(attrs, key)}"
        )
    return mean


@contextmanager
def _open_npy(path: Path, _: int) -> Iterator[Source]:
    with open(path, "rb") as f:
        if b"'descr': '|O'" in f.read(128):
            raise ValueError(
                f"{path}: holds Python objects, which can run code when they are loaded, and so are not; if you trust the file, write "
                f"its array once as plain numbers, such as by {_CONVERT_NPY.format(str(path))}"
            )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, *READ_ERRORS) as e:
        raise ValueError(f"{path}: is not a whole .npy file ({e})") from e
    yield _arrays(path, array, None, {})


@contextmanager
def _open_pt(path: Path, _: int) -> Iterator[Source]:
    check_uncompressed(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        what = (
            "a NumPy array pickled by torch.save"
            if "numpy" in str(e)
            else "Python objects, or nothing that torch.save wrote"
        )
        raise ValueError(
            f"{path}: holds {what}; it can run code when it is loaded, and so is not. If you trust the file, convert it once: "
            f"{_CONVERT.format(str(path))}"
        ) from e
    except (ValueError, *READ_ERRORS) as e:
        raise ValueError(f"{path}: is not a whole file of torch.save ({error_reason(e)})") from e
    held = {"features": held} if isinstance(held, torch.Tensor) else held
    if not isinstance(held, dict):
        raise ValueError(f"{path}: must hold a tensor, or a dict with one, got {type(held).__name__}")
    tensors = {
        k: v.detach() for k, v in held.items() if isinstance(v, torch.Tensor) and v.layout == torch.strided
    }
    check_tensor_storage(path, tensors)
    key = _key(tensors, path)
    yield _arrays(
        path,
        tensors[key],
        tensors.get("coords"),
        {k: held[k] for k in _ATTRS if isinstance(held.get(k), str | int | float)},
    )


def _key(found: Mapping[str, Any], path: Path) -> str:
    key = next((k for k in _KEYS if k in found), None)
    if key is None:
        raise ValueError(
            f"{path}: must hold an array called {' or '.join(_KEYS)}, found {', '.join(map(repr, list(found)[:6])) or 'none'}"
        )
    return key


def _arrays(path: Path, features: Any, coords: Any, attrs: Mapping[str, Any], *, mpp: float = 0) -> Source:
    """Features and coordinates as they lie in a file; with `mpp` coordinates are micrometres and become level-0 pixels."""
    n, d = _shape(path, tuple(features.shape))
    kind = str(features.dtype).removeprefix("torch.")
    if kind not in ("float16", "bfloat16") and not kind.endswith(("float32", "float64", "f2", "f4", "f8")):
        raise ValueError(f"{path}: features must be floating point numbers, got {kind}")
    dtype = np.dtype("<f2" if kind in ("float16", ">f2") else "<f4")
    if coords is not None and not n:
        coords = None if len(coords.shape) < 2 else coords
    if coords is not None and tuple(coords.shape) not in ((n, 2), (1, n, 2)):
        raise ValueError(f"{path}: coords must be [{n}, 2], x and y of each patch, got {list(coords.shape)}")

    def blocks(size: int) -> Iterator[Block]:
        for i in range(0, n, size):
            at = None if coords is None else _part(coords, i, i + size, None)
            if at is not None and mpp:
                at = np.rint(at / mpp)
            yield _part(features, i, i + size, dtype), at

    return Source(rows=n, dims=d, dtype=dtype, has_coords=coords is not None, attrs=attrs, blocks=blocks)


def _shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    if shape == (0,):  # what older TRIDENT wrote for a slide without tissue
        return 0, 0
    if len(shape) == 1:
        raise ValueError(
            f"{path}: holds one vector of {shape[0]} numbers, the embedding of a whole slide; wanted are those of its patches, [n, d], "
            "which lie in another folder (TRIDENT: features_ENCODER, not slide_features_ENCODER)"
        )
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or (shape[0] and not shape[1]):
        raise ValueError(f"{path}: features must be [n, d], or [1, n, d], got {list(shape)}")
    return shape[0], shape[1]


def _part(array: Any, i: int, j: int, dtype: np.dtype | None) -> np.ndarray:
    part = array[0, i:j] if len(array.shape) == 3 else array[i:j]
    if isinstance(part, torch.Tensor):
        part = (part.float() if part.dtype == torch.bfloat16 else part).numpy()
    with np.errstate(
        over="ignore"
    ):  # what float32 cannot hold becomes infinite, which is refused with its row
        return np.array(part, dtype)


# CSV ------------------------------------------------------------------------------------------------------------------------------------
@contextmanager
def _open_csv(path: Path, dims: int) -> Iterator[Source]:
    stat = os.stat(path)
    table = _scan_csv(path, dims, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    columns = range(table.start, table.start + table.width)
    yield Source(
        rows=table.rows,
        dims=table.width,
        dtype=np.dtype("<f4"),
        has_coords=False,
        attrs={},
        blocks=lambda size: _csv_blocks(path, table.header, columns, table.rows, size),
    )


@frozen(kw_only=True)
class _Table:
    """What a CSV of features holds."""

    header: bool
    start: int  # first column of the features
    width: int
    rows: int


@functools.lru_cache(
    maxsize=8192
)  # a CSV has to be read whole to count its rows: once, not each time it is opened
def _scan_csv(path: Path, dims: int, _: tuple[int, int, int]) -> _Table:
    """Count the rows of a CSV and see which columns are features; the last argument changes with the file."""
    first_lines, n, counting = list[str](), 0, True
    for line in _lines(path):
        if n < _LOOKED_AT:
            first_lines.append(line)
        if n >= 2 and counting:
            counting = line[:16].replace('"', "").startswith((f"{n},", f"{n - 1},", f"{n + 1},"))
        n += 1
    try:
        rows = [*csv.reader(first_lines)]
    except csv.Error as e:
        raise ValueError(f"{path}: is not a readable CSV ({e})") from e
    first, second = [*rows, [], []][:2]
    indexed = counting and _is_index(first, second, n)
    header, start, width = _layout(path, dims, rows, indexed)
    if indexed:
        _log.warning(
            "%s: the first column counts the rows: it is an index and no feature, and is left out", path
        )
    return _Table(header=header, start=start, width=width, rows=max(0, n - header))


def _is_index(first: Sequence[str], second: Sequence[str], n: int) -> bool:
    """Whether a first column that counts lines is one that counts rows: 0, 1, 2, ... or 1, 2, 3, ... with or without a header above."""
    if len(first) < 2:
        return False
    wide = len(first) - 1 in _WIDTHS  # what one or two rows alone would not show
    if n == 1:
        return first[0] in ("0", "1") and wide
    above, below = first[0].strip(), second[0].strip()
    bare = (above, below) in (("0", "1"), ("1", "2")) and _counted(first) < 2
    headed = below in ("0", "1") and not _number(above)
    return bare or (headed and (n > 2 or wide or not above))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a CSV that are not empty, without the mark of UTF-8 in front; whatever the text behind the numbers is written in."""
    with open(path, encoding="latin-1") as f:
        for number in itertools.count(1):
            line = f.readline(_LONGEST)
            if not line:
                return
            if len(line) == _LONGEST:
                raise ValueError(
                    f"{path}: line {number} has {_LONGEST} characters or more; a line is one patch, is this a CSV of features?"
                )
            if (
                "\0" in line
            ):  # its cell would count as a text behind the features, and with it all that follow
                raise ValueError(f"{path}: line {number} has a NUL byte; the file is damaged")
            line = line.removeprefix("\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield line


def _csv_blocks(path: Path, header: bool, columns: range, n: int, size: int) -> Iterator[Block]:
    lines = itertools.islice(map(_filled, _lines(path)), int(header), None)
    for i in range(0, n, size):
        part = list(itertools.islice(lines, size))
        try:
            x = np.loadtxt(part, "<f4", None, ",", usecols=columns, ndmin=2, quotechar='"')
        except ValueError as e:
            row, why = _first_wrong(part, columns)
            raise ValueError(f"{path}: patch {i + row} (from 0): {why}") from e
        if len(x) != len(part):  # a quote that is not closed joins lines
            raise ValueError(
                f"{path}: patches {i} to {i + len(part) - 1} (from 0): {len(part)} lines are {len(x)} rows; an open quote?"
            )
        yield x, None


def _filled(line: str) -> str:
    """Empty cells, which is how pandas writes NaN, as nan."""
    return (
        re.sub(r"(^|,)(?=,|\s*$)", r"\1nan", line)
        if ",," in line or line[0] == "," or line.rstrip()[-1] == ","
        else line
    )


def _first_wrong(lines: Sequence[str], columns: range) -> tuple[int, str]:
    for row, cells in enumerate(csv.reader(lines)):
        if len(cells) < columns.stop:
            return row, f"must have {columns.stop} columns, found {len(cells)}; was the file cut off?"
        if (wrong := next((i for i in columns if not _number(cells[i])), None)) is not None:
            return row, f"column {wrong + 1} must be a number, found {cells[wrong]!r}"
    return 0, "cannot be read as numbers"


def _layout(path: Path, dims: int, rows: Sequence[Sequence[str]], indexed: bool) -> tuple[bool, int, int]:
    """(there is a header, the first column of the features, how many) by content of the first rows: a header counts its columns, or is
    all text."""
    first, second = [*rows, [], []][:2]
    start = int(indexed or (len(first) > 1 and not first[0] and first[1] == "0"))  # pandas' index
    names = first[start:]
    width = _counted(names)
    behind = names[width:]
    header = width > 1 and (width >= 8 or not behind or not _number(behind[0]))
    if not header and names and not any(map(_number, names)):
        header, width = True, _numbers(second[start:]) if second else len([c for c in names if c])
    elif not header:
        width = _numbers(names)
    if first and any(first) and not width:
        raise ValueError(
            f"{path}: the features must be the first columns, found {first[0]!r} in the first of {len(first)}"
        )
    near = dims or next((w for w in _WIDTHS if 0 < width - w <= _TRAILING), 0)
    more = width - near
    if not near or not 0 < more <= _TRAILING or (not dims and width in _WIDTHS):
        return header, start, width
    data = [row[start : start + width] for row in rows[header:]]
    if _whole(data, range(more)) and not _whole(data, range(near, width)):
        raise ValueError(
            f"{path}: has {width} columns of numbers, and the first {more} hold whole numbers such as "
            f"{', '.join(data[-1][:more])}: row numbers or places, no features; save the table without them"
        )
    if not dims:
        raise ValueError(
            f"{path}: has {width} columns of numbers; are {more} of them no features? Say dims={near} or dims={width}"
        )
    return header, start, dims


def _whole(data: Sequence[Sequence[str]], columns: range) -> bool:
    """Whether these columns hold whole numbers, not only zeros, in all rows."""
    cells = [row[i] for row in data for i in columns if i < len(row)]
    values = [float(cell) for cell in cells if _number(cell)]
    return len(values) == len(cells) and any(values) and all(value.is_integer() for value in values)


def _counted(names: Sequence[str]) -> int:
    """How many names in a row from the first are 0, 1, 2, ... or f0, f1, f2, ... (or f1, f2, ...)."""
    hit = re.fullmatch(r"(\D*)(0|1)", names[0].strip()) if names else None
    if hit is None or hit.groups() == ("", "1"):
        return 0
    wanted = (f"{hit[1]}{i}" for i in itertools.count(int(hit[2])))
    return sum(
        1
        for _ in itertools.takewhile(
            lambda pair: pair[0].strip() == pair[1], zip(names, wanted, strict=False)
        )
    )


def _numbers(cells: Sequence[str]) -> int:
    """How many cells from the first are numbers or empty; empty ones at the end are not counted."""
    row = list(itertools.takewhile(lambda c: not c.strip() or _number(c), cells))
    while row and not row[-1].strip():
        row.pop()
    return len(row)


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


_OPEN = {"h5": _open_h5, "npy": _open_npy, "pt": _open_pt, "csv": _open_csv}
