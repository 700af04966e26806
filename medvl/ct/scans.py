"""Read NIfTI scans: the stored voxels in file order, the affine and the scale. No float copy, no reorientation, no guess.

x y z are the voxel axes as the file stores them; a `.gz` is told by its first bytes, not by its name.
"""

import io
import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from isal import isal_zlib
from isal.igzip_lib import IsalError
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from medvl.base import files
from medvl.base.files import PathLike
from medvl.ct import names

_QUIET = logging.Logger("quiet")  # nibabel logs what it also raises
_QUIET.addHandler(logging.NullHandler())

CHUNK = (
    1 << 17
)  # compressed bytes per inflate call; its output stays in the cache: 1.15x faster than inflating the file in one call
_MAX_RATIO = 1100  # deflate cannot shrink further than 1032:1
_MM = {
    1: 1000.0,
    3: 0.001,
}  # NIfTI's codes of metres and micrometres; 2 is mm, 0 says nothing and is read as mm
_VOXEL_MM = (0.01, 50.0)  # what a voxel of a CT may measure; a wrong unit is a factor of 1000
_TOLERANCE = 0.01  # of lengths and angles that a header gives twice
_SAME_AXIS = math.cos(math.radians(5))
_DAMAGED: Any = (OSError, IsalError)
_MAX_AFTER = 1 << 20  # bytes; nothing belongs there, some programs pad
FROM_DICOM = "DICOM is not read; `dcm2niix -z y -f %j -o OUT FOLDER` makes one .nii.gz of each series in a folder: take those of OUT"


class ScanError(ValueError):
    """A file that cannot be used as a scan; the message names the file, what must hold and what was found."""


@frozen(kw_only=True)
class Header:
    """What the first bytes of a scan say.

    scaled: scl_slope is usable (finite and not 0).
    placed: a qform or sform is set, and is not the identity that programs write for a scan whose place they do not know.
    doubt: what the header says against itself about lengths and axes, one sentence; "" where all agrees.
    """

    name: str
    shape: tuple[int, int, int]  # x y z
    dtype: np.dtype  # as stored, native byte order
    affine: (
        np.ndarray
    )  # [4, 4] float64: voxel index -> mm, to the patient's right, anterior, superior growing
    spacing_mm: tuple[float, float, float]  # x y z, the lengths of the affine's columns
    slope: float
    intercept: float
    scaled: bool
    placed: bool
    doubt: str


@frozen(kw_only=True, eq=False)
class Scan:
    """A scan in memory; `voxels` [x, y, z] is a Fortran-ordered view of the file's bytes, stored dtype, not scaled."""

    header: Header
    voxels: np.ndarray

    @property
    def name(self) -> str:
        return self.header.name


def read_scan(path: PathLike) -> Scan:
    """Read a NIfTI-1 or -2 single file (`.nii`, `.nii.gz`), any byte order, any real scalar type.

    The affine follows nibabel's rule (sform, else qform, else pixdim alone), in mm whatever the unit in the header.

    Raises:
        ScanError: not a readable file, not NIfTI, no 3-D scalar volume of at least two slices, no usable affine or spacing, truncated, or
            damaged (gzip checksum).
    """
    with open_scan(path) as (header, slices):
        return Scan(header=header, voxels=stack_slices(header, slices))


@contextmanager
def open_scan(path: PathLike) -> Iterator[tuple[Header, Iterator[np.ndarray]]]:
    """The header, and the slices [x, y] of a scan one by one, z growing as in the file, inflated as they are asked for.

    A volume that is used slice by slice never has to be in memory. The last slice comes only when the file's checksum is right.
    Raises `ScanError` like `read_scan`, here or while slices are taken.
    """
    path = Path(path)
    try:
        files.check_regular(path)
    except ValueError as e:
        raise ScanError(str(e)) from e
    try:
        f = open(path, "rb")  # noqa: SIM115 (closed below; the caller's own OSError must not pass for ours)
    except OSError as e:
        raise _broken(path, e) from e
    with f:
        header, stored, chunks = _start(f, path)
        yield header, _slices(header, stored, chunks, path)


def stack_slices(header: Header, slices: Iterator[np.ndarray]) -> np.ndarray:
    """All slices of `open_scan` as voxels [x, y, z], Fortran-ordered as in the file."""
    x, y, z = header.shape
    voxels = np.empty((z, y, x), header.dtype)
    for i, plane in enumerate(slices):
        voxels[i] = plane.T
    return voxels.T


def is_dicom(path: PathLike) -> bool:
    """Whether a file begins as DICOM files do (PS3.10, 7.1)."""
    try:
        files.check_regular(path)
        with open(path, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False


def read_header(path: PathLike) -> Header:
    """The header alone, from the first KBs of the file; raises `ScanError` like `read_scan`, but cannot see damaged voxels."""
    with open_scan(path) as (header, _):
        return header


@frozen
class _Stored:
    dtype: np.dtype  # in the file's byte order
    offset: int


def _start(f: Any, path: Path) -> tuple[Header, _Stored, Iterator[bytes]]:
    size = f.seek(0, io.SEEK_END)
    f.seek(0)
    zipped = f.read(2) == b"\x1f\x8b"
    f.seek(0)
    chunks = _chunks(f, zipped, path)
    head = b""
    while len(head) < 540 and (chunk := next(chunks, b"")):
        head += chunk
    header, stored = _parse(head, path)
    need = stored.offset + math.prod(header.shape) * stored.dtype.itemsize
    if need > size * (_MAX_RATIO if zipped else 1):
        raise ScanError(
            f"{path}: is truncated: its header asks for {need} bytes{' inflated' * zipped}, the file has {size}"
        )
    return header, stored, itertools.chain([head], chunks)


def _slices(header: Header, stored: _Stored, chunks: Iterator[bytes], path: Path) -> Iterator[np.ndarray]:
    x, y, z = header.shape
    rest = memoryview(b"")
    skip = stored.offset
    for i in range(z):
        plane = np.empty(y * x, stored.dtype)
        view, at = plane.data.cast("B"), 0
        while at < len(view):
            if not rest:
                rest = memoryview(next(chunks, b""))
                if not rest:
                    raise ScanError(f"{path}: is truncated: holds {i} of the {z} slices its header asks for")
                skipped = min(skip, len(rest))
                rest, skip = rest[skipped:], skip - skipped
            piece = rest[: len(view) - at]
            view[at : at + len(piece)] = piece
            rest, at = rest[len(piece) :], at + len(piece)
        if i == z - 1:
            _drain(len(rest), chunks, path)
        plane = plane if plane.dtype.isnative else plane.byteswap(inplace=True).view(header.dtype)
        yield plane.reshape(y, x).T


def _drain(after: int, chunks: Iterator[bytes], path: Path) -> None:
    """What follows the voxels, beside `after` bytes at hand, is inflated too, since the checksum is at the end; but not without end."""
    for chunk in itertools.chain([b""], chunks):
        after += len(chunk)
        if after > _MAX_AFTER:
            raise ScanError(f"{path}: is damaged, or no scan: other data follow its voxels")


def _chunks(f: Any, zipped: bool, path: Path) -> Iterator[bytes]:
    try:
        yield from _inflate(f, path) if zipped else iter(lambda: f.read(CHUNK), b"")
    except _DAMAGED as e:
        raise _broken(path, e) from e


def _inflate(f: Any, path: Path) -> Iterator[bytes]:
    """Inflated chunks of a gzip file of one or more members; every member's checksum is verified."""
    inflater, rest = isal_zlib.decompressobj(wbits=31), b""
    while rest or (rest := f.read(CHUNK)):
        if inflater.eof:
            if not rest.strip(b"\0"):
                rest = b""  # zero padding after the last member is allowed by gzip
                continue
            if not b"\x1f\x8b".startswith(rest[:2]):
                raise ScanError(
                    f"{path}: is damaged: other bytes follow the gzip stream; copy the file again"
                )
            inflater = isal_zlib.decompressobj(wbits=31)
        if out := inflater.decompress(rest):
            yield out
        rest = inflater.unused_data
    if not inflater.eof:
        raise ScanError(f"{path}: is truncated: the gzip stream ends early; copy the file again")


def _parse(head: bytes, path: Path) -> tuple[Header, _Stored]:
    raw = _raw_header(head, path)
    shape = _shape(raw, path)
    dtype, offset = _dtype(raw, path), float(raw["vox_offset"])
    if not (np.isfinite(offset) and offset >= len(raw.binaryblock)):
        raise ScanError(
            f"{path}: its voxels must start after the header of {len(raw.binaryblock)} bytes, found vox_offset {offset:g}"
        )
    if raw["sform_code"] <= 0:
        _positive(raw["pixdim"][1:4], path)  # before nibabel mends it
    placed = bool(raw["sform_code"] > 0 or raw["qform_code"] > 0)
    pixdim = np.asarray(raw["pixdim"][1:4], np.float64)
    to_mm = _MM.get(int(raw["xyzt_units"]) & 7, 1.0)
    try:
        raw.check_fix(logger=_QUIET)
        affine = _in_mm(raw.get_best_affine(), to_mm)
        qform = _in_mm(raw.get_qform(), to_mm) if raw["qform_code"] > 0 else None
    except HeaderDataError as e:
        raise ScanError(f"{path}: is not usable NIfTI: {e}") from e
    if not np.isfinite(affine).all():
        raise ScanError(f"{path}: must have a finite affine, found {affine[:3].tolist()}")
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    _positive(spacing, path)
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        raise ScanError(f"{path}: must have an affine that can be inverted, found {affine[:3].tolist()}")
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    scaled = bool(np.isfinite(slope) and slope != 0)
    if scaled and not np.isfinite(intercept):
        raise ScanError(f"{path}: has scl_slope {slope} with scl_inter {intercept}; both must be finite")
    header = Header(
        name=names.volume_name(path),
        shape=shape,
        dtype=dtype.newbyteorder("="),
        affine=affine,
        spacing_mm=tuple(spacing.tolist()),
        slope=slope if scaled else 1.0,
        intercept=intercept if scaled else 0.0,
        scaled=scaled,
        placed=placed and not _is_identity(affine),
        doubt=_doubt(affine, qform, pixdim * to_mm),
    )
    return header, _Stored(dtype, int(offset))


def _in_mm(affine: Any, to_mm: float) -> np.ndarray:
    affine = np.array(affine, np.float64)
    affine[:3] *= to_mm
    return affine


def _is_identity(affine: np.ndarray) -> bool:
    """Whether the affine is what NIfTI or ITK programs write for an array without a place: voxels of 1 mm, the first one at 0, 0, 0."""
    return np.array_equal(affine, np.eye(4)) or np.array_equal(affine, np.diag([-1.0, -1.0, 1.0, 1.0]))


def _doubt(affine: np.ndarray, qform: np.ndarray | None, pixdim_mm: np.ndarray) -> str:
    """What speaks against an affine: its own angles and lengths, a qform that says otherwise, or else other spacings in pixdim."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    angles = (affine[:3, :3].T @ affine[:3, :3]) / np.outer(spacing, spacing)
    i, j = max(((0, 1), (0, 2), (1, 2)), key=lambda pair: abs(angles[pair]))
    if abs(angles[i, j]) > _TOLERANCE:
        degrees = math.degrees(math.acos(np.clip(angles[i, j], -1, 1)))
        return (
            f"its affine is sheared: the axes {'xyz'[i]} and {'xyz'[j]} are at {degrees:.1f} degrees and must be at 90 (a tilted gantry?); "
            "resample it to right angles first (dcm2niix does so)"
        )
    if spacing.min() < _VOXEL_MM[0] or spacing.max() > _VOXEL_MM[1]:
        return (
            f"its header makes voxels of {_lengths(spacing)}, a CT's are between {_VOXEL_MM[0]:g} and {_VOXEL_MM[1]:g} mm; "
            "are its unit (xyzt_units) and spacing right?"
        )
    if qform is not None:
        other, codes = np.linalg.norm(qform[:3, :3], axis=0), (_axes(affine), _axes(qform))
        # at 45 degrees, rounding decides which axis is the closest
        cosines = (affine[:3, :3] * qform[:3, :3]).sum(0) / (spacing * other)
        turned = codes[0] != codes[1] and cosines.min() < _SAME_AXIS
        if _differ(spacing, other) or turned:
            return (
                f"its header says two things: sform {_lengths(spacing)} along {codes[0]}, qform {_lengths(other)} along {codes[1]}; "
                "write the right one into both"
            )
    elif not np.array_equal(pixdim_mm, np.ones(3)) and (pixdim_mm > 0).all() and _differ(spacing, pixdim_mm):
        return f"its header says two things: sform {_lengths(spacing)}, pixdim {_lengths(pixdim_mm)}; write the right one into both"
    return ""


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.abs(a - b) > _TOLERANCE * np.maximum(a, b)).any())


def _lengths(mm: np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in mm) + " mm"


def _axes(affine: np.ndarray) -> str:
    return "-".join(aff2axcodes(affine))


def _raw_header(head: bytes, path: Path) -> Any:
    if not head:
        raise ScanError(f"{path}: is empty")
    order: Any = "little" if int.from_bytes(head[:4], "little") in (348, 540) else "big"
    size = int.from_bytes(head[:4], order)
    kind, magic = (Nifti2Header, b"n+2") if size == 540 else (Nifti1Header, b"n+1")
    if head[128:132] == b"DICM":
        raise ScanError(f"{path}: is a DICOM file; {FROM_DICOM}")
    if size != kind.sizeof_hdr or len(head) < size:
        raise ScanError(
            f"{path}: is not NIfTI (must begin with a header of 348 or 540 bytes, begins with {head[:4].hex(' ')})"
        )
    raw = kind(head[:size], order, check=False)
    if not bytes(raw["magic"]).startswith(magic):
        found = bytes(raw["magic"])
        raise ScanError(
            f"{path}: must be NIfTI in one file (magic {magic.decode()}), found {found!r}; .hdr/.img pairs are not read"
        )
    return raw


def _shape(raw: Any, path: Path) -> tuple[int, int, int]:
    """x y z; trailing axes of length 1 are dropped."""
    rank = int(raw["dim"][0])
    dims = [int(d) for d in raw["dim"][1 : max(1, rank) + 1]] if 1 <= rank <= 7 else []
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if len(dims) != 3 or min(dims) < 2:
        found = dims or f"dim {raw['dim'].tolist()}"
        raise ScanError(
            f"{path}: must be one volume [x, y, z] of at least 2 voxels along each axis, found {found}"
        )
    return dims[0], dims[1], dims[2]


def _positive(spacing: np.ndarray, path: Path) -> None:
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ScanError(
            f"{path}: must have a positive voxel spacing in mm, found {np.asarray(spacing).tolist()}"
        )


def _dtype(raw: Any, path: Path) -> np.dtype:
    try:
        dtype = raw.get_data_dtype()
    except KeyError as e:
        raise ScanError(f"{path}: has the unknown data type {e}") from e
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        found = f"colours {dtype.names}" if dtype.names else dtype
        raise ScanError(f"{path}: must hold one real number of at most 64 bits per voxel, found {found}")
    return dtype


def _broken(path: Path, e: Exception) -> ScanError:
    if isinstance(e, IsADirectoryError):
        return ScanError(
            f"{path}: cannot be read ({e.strerror}); a scan is one .nii or .nii.gz file. If it holds DICOM: {FROM_DICOM}"
        )
    if isinstance(e, OSError) and e.errno is not None:
        return ScanError(f"{path}: cannot be read ({e.strerror})")
    return ScanError(f"{path}: is damaged: {e}; copy the file again")
