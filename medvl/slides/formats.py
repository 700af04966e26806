"""Files of patch features, opened to be read in blocks: HDF5, PyTorch, NumPy and CSV."""

import functools
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from medvl.slides.csv_features import detect_layout, read_csv_blocks

_log = logging.getLogger(__name__)

STORE = "medvl-slides"  # attribute "format" of a store of many slides (`pack`), which is not one slide
SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".npy", ".csv")
_KEYS = (  # names of the array of features; "feats" is STAMP's, "tile_embeds" Prov-GigaPath's
    "features",
    "feature",
    "feat",
    "feats",
    "embeddings",
    "tile_embeds",
)
_ATTRIBUTES = (  # the attributes that are read
    # TRIDENT
    "patch_size_level0",
    "level0_magnification",
    "target_magnification",
    "magnification",
    "mpp",
    "encoder",
    # CLAM; TRIDENT's patch_size is at the target magnification
    "patch_size",
    "patch_level",
    "downsample",
    # STAMP
    "unit",
    "tile_size_um",
    "extractor",
)
_MICROMETRES = (
    "um",
    "\u00b5m",  # micro sign
    "\u03bcm",  # Greek letter mu
    "micron",
    "microns",
    "micrometer",
    "micrometers",
    "micrometre",
    "micrometres",
)
_PIXELS = ("", "px", "pixel", "pixels")
_MAGIC = {b"\x89HDF\r\n\x1a\n": "h5", b"\x93NUMPY": "npy", b"PK\x03\x04": "pt", b"\x80": "pt"}  # first bytes
_LFS_POINTER = b"version https://git-lfs"
# A file of torch.save with other objects in it becomes one with its arrays, plain numbers and texts.
_CONVERT = (
    'python -c "import torch; x = torch.load({0!r}, weights_only=False); torch.save({{k: torch.as_tensor(v) '
    "if getattr(v, 'shape', ()) else v for k, v in x.items() if getattr(v, 'shape', ()) or type(v) in (str, "
    'int, float)}} if isinstance(x, dict) else torch.as_tensor(x), {0!r})"'
)
_CONVERT_NPY = "np.save({0!r}, np.load({0!r}, allow_pickle=True).item()['feature'])"

Block = tuple[np.ndarray, np.ndarray | None]  # features [c, d] and coordinates [c, 2], of any number type


@frozen(kw_only=True, eq=False)
class Source:
    """An open file of n patches. Only its shapes are checked yet."""

    rows: int
    dims: int  # 0: an empty file that does not say
    dtype: np.dtype  # float16 or float32
    has_coords: bool
    attrs: Mapping[str, Any]
    blocks: Callable[[int], Iterator[Block]]  # number of rows per block -> all blocks


@contextmanager
def open_source(path: PathLike, dims: int = 0) -> Iterator[Source]:
    """Open a file of patch features. Its first bytes decide on the format; only CSV goes by its suffix.

    Args:
        dims: number of features in a CSV that does not say it; ignored otherwise.
    Raises:
        ValueError: no such file, an unknown or broken one, one that holds Python objects, or arrays of other
            shapes or types.
    """
    path = Path(path)
    openers = {"h5": _open_h5, "npy": _open_npy, "pt": _open_pt, "csv": _open_csv}
    try:
        with openers[_detect_format(path)](path, dims) as source:
            yield source
    except (OSError, RuntimeError) as error:  # also from HDF5, while it is read
        raise ValueError(f"{path}: cannot be read, or is broken ({error})") from error


def _detect_format(path: Path) -> str:
    check_regular(path)
    if path.is_dir():
        raise ValueError(f"{path}: must be a file of patch features, found a folder")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(64)
    is_pointer = head.startswith(_LFS_POINTER)
    suffix = path.suffix.lower()
    for magic, kind in _MAGIC.items():
        if head.startswith(magic) and suffix != ".npz":  # an archive of NumPy begins like one of PyTorch
            return kind
    if suffix == ".csv" and head and not is_pointer:
        return "csv"
    if is_pointer:
        problem = "is a Git LFS pointer, the file itself was not fetched"
    elif not head:
        problem = "is empty"
    else:
        problem = f"starts with {head[:16]!r}"
    raise ValueError(
        f"{path}: {problem}; patch features are HDF5 (.h5), PyTorch (.pt), NumPy (.npy) or .csv files"
    )


# Attributes ---------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=8192)  # a file is opened several times
def warn_once(message: str) -> None:
    """Log a warning about a file; the same message only once."""
    _log.warning(message)


def text_of(attrs: Mapping[str, Any], key: str) -> str:
    """An attribute as text; "" where it is missing or TRIDENT's "None"."""
    value = attrs.get(key, "")
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return "" if text == "None" else text


def number_of(path: Path, attrs: Mapping[str, Any], key: str) -> float | None:
    """An attribute as a number, None where it is missing; the mean of several, such as those of x and y.

    Raises:
        ValueError: it is no number, or several that differ by more than one percent.
    """
    words = text_of(attrs, key).strip("[]() ").replace(",", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path}: {key} must be a number, got {text_of(attrs, key)!r}") from error
    if not numbers:
        return None
    mean = sum(numbers) / len(numbers)
    if max(numbers) - min(numbers) > 0.01 * abs(mean):
        raise ValueError(
            f"{path}: {key} must be one number, or the same for x and y, got {text_of(attrs, key)}"
        )
    return mean


# Formats ------------------------------------------------------------------------------------------------
@contextmanager
def _open_h5(path: Path, _dims: int) -> Iterator[Source]:
    with h5py.File(path, "r", locking=False) as file:
        try:
            source = _inspect_h5(path, file)
        except (ValueError, *READ_ERRORS) as error:
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise  # one of our own messages
            raise ValueError(f"{path}: is a broken HDF5 file ({error})") from error
        yield source


def _inspect_h5(path: Path, file: h5py.File) -> Source:
    if file.attrs.get("format") == STORE:
        raise ValueError(
            f"{path}: is a packed store of {file['rows'].shape[0]} slides, not one slide; "
            f"`invoke ask --slide {path}::NAME` asks about one of them, data.features takes the whole store, "
            "and medvl.slides.pack.open_slides reads it"
        )
    names = list(file)
    features = open_dataset(file, _features_key(names, path), path)
    coords = open_dataset(file, "coords", path) if "coords" in names else None
    attrs = dict[str, Any]()
    for holder in (file, coords, features):  # attributes of the features override the others
        if holder is not None:
            attrs |= {key: holder.attrs[key] for key in _ATTRIBUTES if key in holder.attrs}
    unit = text_of(attrs, "unit").lower()
    if not unit and "tile_size_um" in attrs:  # STAMP before it wrote a unit
        unit = "um"
    if coords is None or unit in _PIXELS:
        return _make_source(path, features, coords, attrs)
    if unit not in _MICROMETRES:
        raise ValueError(f"{path}: the unit of coords must be px or um, got {unit!r}")
    mpp = number_of(path, attrs, "mpp")
    if not mpp or mpp < 0:
        warn_once(
            f"{path}: coords are in micrometres and the file does not say the slide's mpp, so level-0 pixels "
            "are unknown and the coords are left out; add an attribute mpp (micrometres per level-0 pixel) "
            "to the file to get maps with positions"
        )
        return _make_source(path, features, None, attrs)
    return _make_source(path, features, coords, attrs, mpp=mpp)


@contextmanager
def _open_npy(path: Path, _dims: int) -> Iterator[Source]:
    with open(path, "rb") as file:
        holds_objects = b"'descr': '|O'" in file.read(128)
    if holds_objects:
        raise ValueError(
            f"{path}: holds Python objects, which can run code when they are loaded, so they are not loaded; "
            "if you trust the file, write its array once as plain numbers, such as by "
            f"{_CONVERT_NPY.format(str(path))}"
        )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, *READ_ERRORS) as error:
        raise ValueError(f"{path}: is not a whole .npy file ({error})") from error
    yield _make_source(path, array, None, {})


@contextmanager
def _open_pt(path: Path, _dims: int) -> Iterator[Source]:
    content = _load_pt(path)
    if isinstance(content, torch.Tensor):
        content = {"features": content}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a tensor, or a dict with one, got {type(content).__name__}")
    tensors, attrs = {}, {}
    for key, value in content.items():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            tensors[key] = value.detach()
        elif key in _ATTRIBUTES and isinstance(value, str | int | float):
            attrs[key] = value
    check_tensor_storage(path, tensors)
    features = tensors[_features_key(tensors, path)]
    yield _make_source(path, features, tensors.get("coords"), attrs)


def _load_pt(path: Path) -> Any:
    check_uncompressed(path)
    try:
        # Files of torch.save before version 1.6 are no archives and cannot be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        content = "Python objects, or nothing that torch.save wrote"
        if "numpy" in str(error):
            content = "a NumPy array pickled by torch.save"
        raise ValueError(
            f"{path}: holds {content}; it can run code when it is loaded, so it is not loaded. If you trust "
            f"the file, convert it once: {_CONVERT.format(str(path))}"
        ) from error
    except (ValueError, *READ_ERRORS) as error:
        raise ValueError(f"{path}: is not a whole file of torch.save ({error_reason(error)})") from error


@contextmanager
def _open_csv(path: Path, dims: int) -> Iterator[Source]:
    layout = detect_layout(path, dims)

    def blocks(size: int) -> Iterator[Block]:
        for features in read_csv_blocks(path, layout, size):
            yield features, None

    yield Source(
        rows=layout.rows,
        dims=layout.width,
        dtype=np.dtype("<f4"),
        has_coords=False,
        attrs={},
        blocks=blocks,
    )


# Arrays -------------------------------------------------------------------------------------------------
def _features_key(names: Iterable[str], path: Path) -> str:
    """Which of the arrays of a file holds the features."""
    names = list(names)
    for key in _KEYS:
        if key in names:
            return key
    present = ", ".join(map(repr, names[:6])) or "none"
    raise ValueError(f"{path}: must hold an array called {' or '.join(_KEYS)}, found {present}")


def _make_source(
    path: Path, features: Any, coords: Any, attrs: Mapping[str, Any], *, mpp: float = 0
) -> Source:
    """A source over arrays of HDF5, NumPy or PyTorch.

    Args:
        mpp: micrometres per level-0 pixel, where coordinates are in micrometres; 0: they are in pixels.
    """
    rows, dims = _features_shape(path, tuple(features.shape))
    kind = str(features.dtype).removeprefix("torch.")
    if kind not in ("float16", "bfloat16") and not kind.endswith(("float32", "float64", "f2", "f4", "f8")):
        raise ValueError(f"{path}: features must be floating point numbers, got {kind}")
    dtype = np.dtype("<f2" if kind in ("float16", ">f2") else "<f4")
    if coords is not None and not rows and len(coords.shape) < 2:
        coords = None  # an empty slide, written without the second axis
    if coords is not None and tuple(coords.shape) not in ((rows, 2), (1, rows, 2)):
        raise ValueError(
            f"{path}: coords must be [{rows}, 2], x and y of each patch, got {list(coords.shape)}"
        )

    def blocks(size: int) -> Iterator[Block]:
        for start in range(0, rows, size):
            xy = None
            if coords is not None:
                xy = _read_rows(coords, start, start + size, None)
                if mpp:
                    xy = np.rint(xy / mpp)
            yield _read_rows(features, start, start + size, dtype), xy

    return Source(
        rows=rows, dims=dims, dtype=dtype, has_coords=coords is not None, attrs=attrs, blocks=blocks
    )


def _features_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """(n, d) of features [n, d] or [1, n, d]."""
    if shape == (0,):  # what older TRIDENT wrote for a slide without tissue
        return 0, 0
    if len(shape) == 1:
        raise ValueError(
            f"{path}: holds one vector of {shape[0]} numbers, the embedding of a whole slide; needed are "
            "those of its patches, [n, d], which are in another folder (TRIDENT: features_ENCODER, not "
            "slide_features_ENCODER)"
        )
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or (shape[0] and not shape[1]):
        raise ValueError(f"{path}: features must be [n, d], or [1, n, d], got {list(shape)}")
    return shape[0], shape[1]


def _read_rows(array: Any, start: int, stop: int, dtype: np.dtype | None) -> np.ndarray:
    """Rows of an array [n, d] or [1, n, d], copied as `dtype` (None: as it is)."""
    rows = array[0, start:stop] if len(array.shape) == 3 else array[start:stop]
    if isinstance(rows, torch.Tensor):
        if rows.dtype == torch.bfloat16:  # NumPy has no such type
            rows = rows.float()
        rows = rows.numpy()
    # Numbers beyond float32 become infinite without a warning; the reader refuses the patch by its number.
    with np.errstate(over="ignore"):
        return np.array(rows, dtype)
