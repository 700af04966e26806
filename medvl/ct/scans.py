"""Read scans: the stored voxels in file order, the affine and the scale. No float copy, no reorientation, no
guess. NIfTI and the scans of RAD-ChestCT are read here, DICOM series by `dicom`.

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
from attrs import evolve, frozen
from isal import isal_zlib
from isal.igzip_lib import IsalError
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from medvl.base import files
from medvl.base.files import PathLike
from medvl.ct import dicom, names, radchest
from medvl.ct.dicom import Source
from medvl.ct.header import Header, Scan, ScanError

SUFFIXES = (".nii", ".nii.gz", ".npz")  # of scans, .npz of RAD-ChestCT
_QUIET = logging.Logger("quiet")  # nibabel logs what it also raises
_QUIET.addHandler(logging.NullHandler())

# Compressed bytes per inflate call. The output stays in the cache: 1.15x faster than inflating the file in
# one call.
CHUNK = 1 << 17
_MAX_RATIO = 1100  # deflate cannot shrink further than 1032:1
# NIfTI's unit codes of metres and micrometres, in mm. Code 2 is mm; 0 is unknown and read as mm.
_MM = {1: 1000.0, 3: 0.001}
_VOXEL_MM = (0.01, 50.0)  # what a voxel of a CT may measure; a wrong unit is a factor of 1000
_TOLERANCE = 0.01  # between lengths or angles that a header gives twice
_SAME_AXIS = math.cos(math.radians(5))
_DAMAGED: Any = (OSError, IsalError)
_MAX_AFTER = 1 << 20  # bytes; nothing belongs there, some programs pad


def read_scan(path: Source, series: str = "") -> Scan:
    """Read a NIfTI-1 or -2 single file (`.nii`, `.nii.gz`), any byte order, any real scalar type; or one series
    of DICOM slices in HU, see `dicom.open_series`.

    The affine follows nibabel's rule (sform, else qform, else pixdim alone), in mm whatever the unit in the
    header.

    Raises:
        ScanError: not a readable file, not NIfTI, no 3-D scalar volume of at least two slices, no usable
            affine or spacing, truncated, or damaged (gzip checksum); a series that is not one whole scan.
    """
    with open_scan(path, series) as (header, slices):
        return Scan(header=header, voxels=stack_slices(header, slices))


@contextmanager
def open_scan(path: Source, series: str = "") -> Iterator[tuple[Header, Iterator[np.ndarray]]]:
    """Open a scan: its header, and an iterator over its slices [x, y] in the order of the file's z axis.

    Slices are inflated as they are taken, so a volume that is used slice by slice is never whole in memory.
    The last slice comes only when the file's checksum is right.

    Raises:
        ScanError: as `read_scan`, on opening or while slices are taken.
    """
    if series or not isinstance(path, PathLike) or dicom.is_series(path):
        with dicom.open_series(path, series) as (header, slices):
            yield evolve(header, doubt=_find_contradiction(header.affine, None, np.ones(3))), slices
        return
    path = Path(path)
    try:
        files.check_regular(path)
    except ValueError as e:
        raise ScanError(str(e)) from e
    try:
        # Closed below: a `with` here would turn the caller's own OSError into a ScanError.
        f = open(path, "rb")  # noqa: SIM115
    except OSError as e:
        raise _read_error(path, e) from e
    with f:
        if path.suffix.lower() == ".npz":
            yield _open_npz(f, path)
        else:
            header, layout, chunks = _read_start(f, path)
            yield header, _iter_slices(header, layout, chunks, path)


def _open_npz(f: Any, path: Path) -> tuple[Header, Iterator[np.ndarray]]:
    """A scan of RAD-ChestCT, as `open_scan`."""
    try:
        voxels = radchest.read_npz(f)
    except ValueError as e:
        raise ScanError(f"{path}: {e}") from e
    z, y, x = voxels.shape
    header = Header(
        name=names.volume_name(path),
        shape=(x, y, z),
        dtype=voxels.dtype,
        affine=np.diag([-radchest.SPACING_MM] * 3 + [1.0]),  # to left, posterior, inferior
        spacing_mm=(radchest.SPACING_MM,) * 3,
        placed=True,
    )
    return header, (plane.T for plane in voxels)


def stack_slices(header: Header, slices: Iterator[np.ndarray]) -> np.ndarray:
    """All slices of `open_scan` as voxels [x, y, z], Fortran-ordered as in the file."""
    x, y, z = header.shape
    # [z, y, x] in C order is [x, y, z] in Fortran order: each slice is copied into one piece of memory.
    voxels = np.empty((z, y, x), header.dtype)
    for i, plane in enumerate(slices):
        voxels[i] = plane.T
    return voxels.T


def read_slice(path: PathLike, number: int | None) -> tuple[Header, np.ndarray]:
    """One slice of a scan as radiologists look at it, in the stored dtype and not scaled: [rows, columns].

    Slices are those of the file's third axis, counted from 0. An axial one is shown from the feet: the right of
    the patient on the left of the picture, anterior above; a coronal one with the right on the left, superior
    above; a sagittal one with anterior on the left, superior above. Voxels are pixels, also where their sides
    differ.

    Raises:
        ScanError: as `read_scan`; no slice of this number, or the header does not say which side is which.
    """
    with open_scan(path) as (header, slices):
        count = header.shape[2]
        if number is None or not 0 <= number < count:
            raise ScanError(f"{path}: has {count} slices, got page={number}; give one from 0 to {count - 1}")
        if header.doubt or not header.placed:
            doubt = header.doubt or "its header does not say where left and right are (no qform, no sform)"
            raise ScanError(f"{path}: {doubt}; a guess could mirror the patient")
        # To the last one, which comes only if the whole file is right.
        for i, taken in enumerate(slices):
            if i == number:
                plane = taken
    # Columns run to the left of the patient, or else to posterior; rows to posterior, or else to inferior.
    codes = aff2axcodes(header.affine)
    for axis in (0, 1):
        if codes[axis] in "RAS":
            plane = np.flip(plane, axis)
    first, second = ("RLAPSI".index(code) // 2 for code in codes[:2])
    return header, plane.T if first < second else plane


def straighten(header: Header, slices: Iterator[np.ndarray]) -> tuple[Header, Iterator[np.ndarray]]:
    """A scan of a tilted gantry on axes at right angles; any other as it is.

    Each slice is moved in its plane, linearly between voxels. Planes grow, so that nothing is cut off; where
    a slice does not reach they have its lowest value, which is air or padding.
    """
    x, y, z = header.affine[:3, :3].T
    normal = np.cross(x, y) / np.linalg.norm(np.cross(x, y))
    straight = normal * (z @ normal)
    if np.linalg.norm(z - straight) <= _TOLERANCE * np.linalg.norm(z):
        return header, slices
    # Voxels [2] from one slice to the next, and of the first and last from where the planes now begin.
    shift = np.array([z @ x / (x @ x), z @ y / (y @ y)])
    span = shift * (header.shape[2] - 1)
    start = np.minimum(span, 0)
    columns, rows = (int(n) for n in header.shape[:2] + np.ceil(abs(span)))
    affine = header.affine.copy()
    affine[:3, 2] = straight
    affine[:3, 3] += x * start[0] + y * start[1]
    header = evolve(
        header,
        shape=(columns, rows, header.shape[2]),
        affine=affine,
        spacing_mm=tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()),
        doubt=_find_contradiction(affine, None, np.ones(3)),
    )

    def moved() -> Iterator[np.ndarray]:
        from scipy.ndimage import affine_transform

        for i, plane in enumerate(slices):
            values = affine_transform(
                plane,
                np.ones(2),
                start - i * shift,
                (columns, rows),
                output=np.float64,
                order=1,
                mode="grid-constant",
                cval=float(plane.min()),
            )
            if plane.dtype.kind in "iu":
                values = values.round()
            yield values.astype(plane.dtype)

    return header, moved()


@frozen
class _Layout:
    """How the voxels lie in the file."""

    dtype: np.dtype  # in the file's byte order
    offset: int  # bytes, of the first voxel


def _read_start(f: Any, path: Path) -> tuple[Header, _Layout, Iterator[bytes]]:
    """The header, the layout of the voxels, and all inflated bytes of the file from its start, in chunks."""
    size = f.seek(0, io.SEEK_END)
    f.seek(0)
    # By its content, since a file may have lost or gained a `.gz` in its name.
    zipped = f.read(2) == b"\x1f\x8b"
    f.seek(0)
    chunks = _iter_chunks(f, zipped, path)
    head = b""
    while len(head) < 540:  # a NIfTI-2 header
        chunk = next(chunks, b"")
        if not chunk:
            break
        head += chunk
    header, layout = _parse_header(head, path)
    # A corrupt header can ask for any number of voxels: refuse before memory is allocated for them.
    need = layout.offset + math.prod(header.shape) * layout.dtype.itemsize
    most = size * _MAX_RATIO if zipped else size
    if need > most:
        raise ScanError(
            f"{path}: is truncated: its header asks for {need} bytes{' inflated' * zipped}, the file has "
            f"{size}"
        )
    return header, layout, itertools.chain([head], chunks)


def _iter_slices(
    header: Header, layout: _Layout, chunks: Iterator[bytes], path: Path
) -> Iterator[np.ndarray]:
    """Cut the bytes of the file into slices [x, y] of the native byte order."""
    x, y, z = header.shape
    buffer = memoryview(b"")  # inflated bytes that no slice has taken yet
    skip = layout.offset  # bytes before the first voxel that are still to come
    for i in range(z):
        # A new array each time: the caller may keep slices while it takes the next.
        plane = np.empty(y * x, layout.dtype)
        view = plane.data.cast("B")
        filled = 0
        while filled < len(view):
            if not buffer:
                buffer = memoryview(next(chunks, b""))
                if not buffer:
                    raise ScanError(f"{path}: is truncated: holds {i} of the {z} slices its header asks for")
                skipped = min(skip, len(buffer))
                buffer = buffer[skipped:]
                skip -= skipped
            piece = buffer[: len(view) - filled]
            view[filled : filled + len(piece)] = piece
            buffer = buffer[len(piece) :]
            filled += len(piece)
        # Before the last slice is given out, so that nobody has all slices of a damaged file.
        if i == z - 1:
            _read_to_end(len(buffer), chunks, path)
        if not plane.dtype.isnative:
            plane = plane.byteswap(inplace=True).view(header.dtype)
        yield plane.reshape(y, x).T


def _read_to_end(trailing: int, chunks: Iterator[bytes], path: Path) -> None:
    """Inflate what follows the voxels, after `trailing` bytes that were already read: the checksum comes
    last.

    The amount is limited, so that a file cannot keep us reading forever.
    """
    # The empty chunk first, so that bytes that were read with the last slice are counted, too.
    for chunk in itertools.chain([b""], chunks):
        trailing += len(chunk)
        if trailing > _MAX_AFTER:
            raise ScanError(f"{path}: is damaged, or not a scan: other data follow its voxels")


def _iter_chunks(f: Any, zipped: bool, path: Path) -> Iterator[bytes]:
    """The bytes of the file, inflated if it is gzip."""
    try:
        if zipped:
            yield from _inflate(f, path)
        else:
            while chunk := f.read(CHUNK):
                yield chunk
    except _DAMAGED as e:
        raise _read_error(path, e) from e


def _inflate(f: Any, path: Path) -> Iterator[bytes]:
    """Inflated chunks of a gzip file of one or more members; every member's checksum is verified."""
    # 31 is a gzip header and the largest window, as in zlib.
    inflater = isal_zlib.decompressobj(wbits=31)
    buffer = b""  # compressed bytes
    while buffer or (buffer := f.read(CHUNK)):
        if inflater.eof:  # between two members
            if not buffer.strip(b"\0"):
                buffer = b""  # gzip allows zero padding after the last member
                continue
            if not b"\x1f\x8b".startswith(buffer[:2]):
                raise ScanError(
                    f"{path}: is damaged: other bytes follow the gzip stream; copy the file again"
                )
            inflater = isal_zlib.decompressobj(wbits=31)
        chunk = inflater.decompress(buffer)
        if chunk:
            yield chunk
        buffer = inflater.unused_data
    if not inflater.eof:
        raise ScanError(f"{path}: is truncated: the gzip stream ends early; copy the file again")


def _parse_header(head: bytes, path: Path) -> tuple[Header, _Layout]:
    raw = _raw_header(head, path)
    shape = _read_shape(raw, path)
    dtype = _read_dtype(raw, path)
    offset = float(raw["vox_offset"])
    if not (np.isfinite(offset) and offset >= len(raw.binaryblock)):
        raise ScanError(
            f"{path}: its voxels must start after the header of {len(raw.binaryblock)} bytes, "
            f"found vox_offset {offset:g}"
        )
    if raw["sform_code"] <= 0:
        # The spacing comes from pixdim; nibabel's check_fix below would silently replace a bad one.
        _check_spacing(raw["pixdim"][1:4], path)
    has_form = bool(raw["sform_code"] > 0 or raw["qform_code"] > 0)
    pixdim = np.asarray(raw["pixdim"][1:4], np.float64)
    to_mm = _MM.get(int(raw["xyzt_units"]) & 7, 1.0)
    qform = None
    try:
        raw.check_fix(logger=_QUIET)
        affine = _scale_affine(raw.get_best_affine(), to_mm)
        if raw["qform_code"] > 0:
            qform = _scale_affine(raw.get_qform(), to_mm)
    except HeaderDataError as e:
        raise ScanError(f"{path}: is not usable NIfTI: {e}") from e
    spacing = _spacing_of(affine, path)
    # A slope of 0 means "no scale" in NIfTI; some programs write NaN.
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    scaled = bool(np.isfinite(slope) and slope != 0)
    if scaled and not np.isfinite(intercept):
        raise ScanError(f"{path}: has scl_slope {slope} with scl_inter {intercept}; both must be finite")
    if not scaled:
        slope, intercept = 1.0, 0.0
    header = Header(
        name=names.volume_name(path),
        shape=shape,
        dtype=dtype.newbyteorder("="),
        affine=affine,
        spacing_mm=tuple(spacing.tolist()),
        slope=slope,
        intercept=intercept,
        scaled=scaled,
        placed=has_form and not _is_identity(affine),
        doubt=_find_contradiction(affine, qform, pixdim * to_mm),
    )
    return header, _Layout(dtype, int(offset))


def _spacing_of(affine: np.ndarray, path: Path) -> np.ndarray:
    """The lengths [3] in mm of the affine's columns, which must be usable."""
    if not np.isfinite(affine).all():
        raise ScanError(f"{path}: must have a finite affine, found {affine[:3].tolist()}")
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    _check_spacing(spacing, path)
    # Of columns scaled to length 1, so that the limit does not depend on the spacing.
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        raise ScanError(f"{path}: must have an affine that can be inverted, found {affine[:3].tolist()}")
    return spacing


def _scale_affine(affine: Any, to_mm: float) -> np.ndarray:
    affine = np.array(affine, np.float64)
    affine[:3] *= to_mm
    return affine


def _is_identity(affine: np.ndarray) -> bool:
    """Whether this is the affine that NIfTI or ITK programs write for an array of unknown position."""
    return np.array_equal(affine, np.eye(4)) or np.array_equal(affine, np.diag([-1.0, -1.0, 1.0, 1.0]))


def _find_contradiction(affine: np.ndarray, qform: np.ndarray | None, pixdim_mm: np.ndarray) -> str:
    """One sentence on what contradicts an affine, "" where nothing does.

    Checked are its own angles and lengths, then the qform, or without one the spacing in pixdim.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = (affine[:3, :3].T @ affine[:3, :3]) / np.outer(spacing, spacing)
    # The pair of axes that is farthest from a right angle.
    i, j = max(((0, 1), (0, 2), (1, 2)), key=lambda pair: abs(cosines[pair]))
    if abs(cosines[i, j]) > _TOLERANCE:
        degrees = math.degrees(math.acos(np.clip(cosines[i, j], -1, 1)))
        return (
            f"its affine is sheared: the axes {'xyz'[i]} and {'xyz'[j]} are at {degrees:.1f} degrees and "
            f"must be at 90 (a gantry tilted by {abs(90 - degrees):.1f} degrees?); tilt='shear' resamples it"
        )
    if spacing.min() < _VOXEL_MM[0] or spacing.max() > _VOXEL_MM[1]:
        return (
            f"its header makes voxels of {_format_mm(spacing)}, a CT's are between {_VOXEL_MM[0]:g} and "
            f"{_VOXEL_MM[1]:g} mm; are its unit (xyzt_units) and spacing right?"
        )
    if qform is not None:
        qform_spacing = np.linalg.norm(qform[:3, :3], axis=0)
        codes, qform_codes = _axis_codes(affine), _axis_codes(qform)
        # At 45 degrees rounding decides which axis is the closest, so codes may differ where directions
        # agree.
        agreement = (affine[:3, :3] * qform[:3, :3]).sum(0) / (spacing * qform_spacing)
        is_turned = codes != qform_codes and agreement.min() < _SAME_AXIS
        if _differ(spacing, qform_spacing) or is_turned:
            return (
                f"its header contradicts itself: sform {_format_mm(spacing)} along {codes}, qform "
                f"{_format_mm(qform_spacing)} along {qform_codes}; write the right one into both"
            )
        return ""
    never_set = np.array_equal(pixdim_mm, np.ones(3))
    if not never_set and (pixdim_mm > 0).all() and _differ(spacing, pixdim_mm):
        return (
            f"its header contradicts itself: sform {_format_mm(spacing)}, pixdim {_format_mm(pixdim_mm)}; "
            "write the right one into both"
        )
    return ""


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.abs(a - b) > _TOLERANCE * np.maximum(a, b)).any())


def _format_mm(lengths: np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in lengths) + " mm"


def _axis_codes(affine: np.ndarray) -> str:
    return "-".join(aff2axcodes(affine))


def _raw_header(head: bytes, path: Path) -> Any:
    """nibabel's header of the first bytes of a file, unchecked. Its size tells byte order and version."""
    if not head:
        raise ScanError(f"{path}: is empty")
    # The first field is the size of the header: read in the wrong byte order it is neither 348 nor 540.
    order: Any = "big"
    if int.from_bytes(head[:4], "little") in (348, 540):
        order = "little"
    size = int.from_bytes(head[:4], order)
    kind, magic = Nifti1Header, b"n+1"
    if size == 540:
        kind, magic = Nifti2Header, b"n+2"
    if size != kind.sizeof_hdr or len(head) < size:
        raise ScanError(
            f"{path}: is not NIfTI (must begin with a header of 348 or 540 bytes, begins with "
            f"{head[:4].hex(' ')})"
        )
    raw = kind(head[:size], order, check=False)
    if not bytes(raw["magic"]).startswith(magic):
        raise ScanError(
            f"{path}: must be NIfTI in one file (magic {magic.decode()}), found {bytes(raw['magic'])!r}; "
            ".hdr/.img pairs are not read"
        )
    return raw


def _read_shape(raw: Any, path: Path) -> tuple[int, int, int]:
    """x y z; trailing axes of length 1 are dropped."""
    rank = int(raw["dim"][0])
    # A damaged header may give any rank; NIfTI has up to 7 axes.
    dims = []
    if 1 <= rank <= 7:
        dims = [int(d) for d in raw["dim"][1 : max(1, rank) + 1]]
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if len(dims) != 3 or min(dims) < 2:
        shape = dims or f"dim {raw['dim'].tolist()}"
        raise ScanError(
            f"{path}: must be one volume [x, y, z] of at least 2 voxels along each axis, found {shape}"
        )
    return dims[0], dims[1], dims[2]


def _check_spacing(spacing: np.ndarray, path: Path) -> None:
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ScanError(
            f"{path}: must have a positive voxel spacing in mm, found {np.asarray(spacing).tolist()}"
        )


def _read_dtype(raw: Any, path: Path) -> np.dtype:
    try:
        dtype = raw.get_data_dtype()
    except KeyError as e:
        raise ScanError(f"{path}: has the unknown data type {e}") from e
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        # Only the RGB types have named fields.
        kind = f"colours {dtype.names}" if dtype.names else dtype
        raise ScanError(f"{path}: must hold one real number of at most 64 bits per voxel, found {kind}")
    return dtype


def _read_error(path: Path, e: Exception) -> ScanError:
    if isinstance(e, OSError) and e.errno is not None:
        return ScanError(f"{path}: cannot be read ({e.strerror})")
    return ScanError(f"{path}: is damaged: {e}; copy the file again")
