"""One series of CT slices out of a folder, a ZIP or a list of DICOM files: in order, in HU, slice by slice.

Order and spacing come from positions along the normal of the slices, never from file names or instance
numbers. Headers of all files are read and checked first; pixels are decoded as slices are taken. No name,
date or number of a patient is repeated anywhere.
"""

import itertools
import logging
import math
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from medvl.base import files
from medvl.base.dicom import BROKEN, MISSING, check_coded_shape, check_syntax, no_warnings
from medvl.base.files import PathLike
from medvl.ct import names
from medvl.ct.header import Header, ScanError

_log = logging.getLogger(__name__)
Source = PathLike | Sequence[PathLike]

AIR = -1024  # HU of padding: the lowest of scanners of 12 bits
NO_UID = "none"  # the series of images that name none
_TAGS = [
    *("SOPClassUID", "ImageType", "Modality", "PatientID", "SeriesInstanceUID", "NumberOfFrames"),
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
]
_ZIP = b"PK\3\4"  # what a ZIP that holds files begins with
_CT = "1.2.840.10008.5.1.4.1.1.2"  # CT Image Storage; its enhanced kinds have one number more
_PIXELS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")  # the tag of PixelData in both byte orders
_MOST_PIXELS = 2**24  # of a slice
_MOST_INFLATED = 2**34  # bytes in a ZIP; the longest CTs have 2 GB
_UNITS = ("HU", "HU_MOD", "US", "")  # RescaleType of what may be HU; "US" is unspecified (PS3.3, C.11.1.1.2)
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_DAMAGED: Any = (*BROKEN, zipfile.BadZipFile, zlib.error)
_SAME = 1e-3  # between mm of PixelSpacing, or components of unit vectors
_ORTHOGONAL = 0.01  # what printed cosines may lack of length 1 and right angles
_SAME_MM = 0.01  # closer slices lie at one place; positions are rounded to about this
_UNEVEN = 0.02  # of the distance of slices
_BESIDE_MM = 0.5  # how far a slice may lie beside the line through all of them


@frozen(kw_only=True, eq=False)
class _Slice:
    """What a header says of one slice; geometry in mm, along DICOM's axes (left, posterior, superior)."""

    where: str  # what errors about its file begin with
    open: Callable[[], Any]
    start: int  # bytes before the pixels
    data: Any  # pydicom's data set of `_TAGS`
    frame: int
    series: str
    patient: str  # compared, and never shown
    modality: str
    kind: tuple[str, ...]  # ImageType
    grey: bool
    limits: tuple[int, int]  # the lowest and highest value that its bits can store
    shape: tuple[int, int]  # rows, columns
    spacing: np.ndarray  # [2] between rows, between columns
    axes: np.ndarray  # [6] along a row, down a column
    position: np.ndarray  # [3] of the first pixel
    unit: str  # RescaleType
    scale: tuple[float, float] | None  # slope, intercept

    @property
    def height(self) -> float:
        """mm along the normal."""
        return float(self.position @ np.cross(self.axes[:3], self.axes[3:]))


def split(path: PathLike) -> tuple[Path, str]:
    """A path, and the series that its last part names where no file is called so: `folder/1.2.840...`."""
    path = Path(path)
    # A UID has two numbers or more: a folder called by a year alone is not taken for one where it is missing.
    is_uid = re.fullmatch(rf"\d+(\.\d+)+|{NO_UID}", path.name)
    if is_uid and not path.exists() and path.parent.exists():
        return path.parent, path.name
    return path, ""


def is_series(path: PathLike) -> bool:
    """Whether a path is one that `open_series` reads: a folder, or a file by its content. A damaged slice is one by
    its name.
    """
    path, _ = split(path)
    try:
        files.check_regular(path)
        if path.is_dir():
            return True
        with open(path, "rb") as f:
            head = f.read(132)
    except (OSError, ValueError):
        return False
    # numpy's .npz is a ZIP, too.
    is_archive = head.startswith(_ZIP) and path.suffix.lower() != ".npz"
    return is_archive or _begins_as_dicom(head) or _is_named_dicom(path.name)


def is_zip(path: PathLike) -> bool:
    """Whether a file begins as a ZIP. `zipfile.is_zipfile` looks at the end, which a file that was cut has lost."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as f:
        return f.read(len(_ZIP)) == _ZIP


def source_files(path: PathLike) -> list[Path]:
    """The files among which a scan is: all below a folder, else the file itself. None is opened."""
    path, _ = split(path)
    return sorted(files.files_below(path)) if path.is_dir() else [path]


def series_files(path: PathLike) -> list[Path]:
    """The files of the series that a path ends in; of any other path `source_files`.

    Raises:
        ScanError: a file that cannot be read.
    """
    folder, series = split(path)
    if not series or not folder.is_dir():
        return source_files(folder)
    with _open_files(folder) as (_, openers):
        slices = _read_headers(openers)
    # A file of several frames is that of several slices.
    return [*dict.fromkeys(Path(s.where) for s in slices if s.series == series)]


def list_series(source: Source) -> dict[str, int]:
    """{SeriesInstanceUID: images, localisers included}.

    Raises:
        ScanError: a file that cannot be read.
    """
    with _open_files(source) as (_, openers):
        return dict(Counter(s.series for s in _read_headers(openers)))


@contextmanager
def open_series(source: Source, series: str = "") -> Iterator[tuple[Header, Iterator[np.ndarray]]]:
    """Open a scan of DICOM files: its header, and an iterator over its slices [x, y] in HU along their normal.

    Args:
        source: a folder and all below it, a ZIP (nothing is unpacked to disk), a file of several frames, or a
            list of files. Files that are not DICOM are passed over.
        series: its SeriesInstanceUID, where there are several; `NO_UID` for images without one. A path that
            ends in it, `folder/1.2.840...`, says the same.
    Raises:
        ScanError: what is wrong, in one sentence; on opening, or while slices are taken.
    Source: DICOM PS3.3, C.7.6.2 (geometry), C.7.5.1.1.2 (padding), C.7.6.16 (several frames).
    """
    if isinstance(source, PathLike):
        source, named = split(source)
        series = series or named
    with _open_files(source) as (where, openers):
        slices = _choose(where, _read_headers(openers), series)
        slices, affine = _in_order(where, slices)
        rows, columns = slices[0].shape
        dtype = _dtype_of(slices)
        header = Header(
            name=names.volume_name(where),
            shape=(columns, rows, len(slices)),
            dtype=dtype,
            affine=affine,
            spacing_mm=tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()),
            # Without a scale values may be raw, which only their distribution can tell.
            scaled=all(s.scale for s in slices),
            placed=True,
        )
        yield header, (plane.T for plane in _planes(slices, dtype))


def _begins_as_dicom(head: bytes) -> bool:
    # Without a preamble (PS3.10, 7.1) a file begins with an element of group 2 or 8.
    return head[128:132] == b"DICM" or (head[:2] in (b"\2\0", b"\x08\0") and head[3:4] == b"\0")


def _is_named_dicom(name: str) -> bool:
    # Names that begin with "._" are those of macOS, which keeps other things there.
    return not name.startswith("._") and name.lower().endswith((".dcm", ".ima"))


# Files ------------------------------------------------------------------------------------------------------
@contextmanager
def _open_files(source: Source) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """What errors begin with, and {name: what opens it} of all files of a scan."""
    if isinstance(source, PathLike) and is_zip(source):
        try:
            archive = zipfile.ZipFile(source)
        except _DAMAGED as e:
            raise ScanError(f"{source}: is a damaged ZIP ({e}); copy it again") from e
        with archive:
            members = _check_members(str(source), archive.infolist())
            # Read as a stream: of a member no more is inflated than is needed.
            yield str(source), {f"{source}: {m.filename}": partial(archive.open, m) for m in members}
        return
    try:
        paths = source_files(source) if isinstance(source, PathLike) else [Path(path) for path in source]
    except ValueError as e:  # a folder below that cannot be read
        raise ScanError(str(e)) from e
    where = source if isinstance(source, PathLike) else paths[0].parent if paths else "the list"
    yield str(where), {str(path): partial(_open_regular, path) for path in paths}


def _open_regular(path: Path) -> Any:
    files.check_regular(path)
    return open(path, "rb")


def _check_members(where: str, members: Sequence[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The files of an archive, none of which leads out of it or is more than it can be."""
    for member in members:
        if re.search(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)", member.filename):
            raise ScanError(f"{where}: holds a path that leads out of it; take it from a safe source")
        if stat.S_ISLNK(member.external_attr >> 16) or member.flag_bits & 1:
            raise ScanError(
                f"{where}: must hold plain files, found a link or an encrypted file; pack it again"
            )
        if member.compress_type not in _PACKED:
            raise ScanError(f"{where}: is compressed in a way that is not read (Deflate64?); pack it again")
    if len({member.filename for member in members}) < len(members):
        raise ScanError(f"{where}: must name each file once; pack it again")
    total = sum(member.file_size for member in members)
    if total > _MOST_INFLATED:
        raise ScanError(
            f"{where}: must hold at most {_MOST_INFLATED >> 30} GiB, holds {total / 2**30:.1f} GiB; give the "
            "slices of one series"
        )
    return [member for member in members if not member.is_dir()]


def _read_headers(openers: Mapping[str, Callable[[], Any]]) -> list[_Slice]:
    """Every slice of these files, in their order; blank files are passed over and told."""
    slices = []
    blank: list[str] = []
    with no_warnings():
        for name, opener in openers.items():
            try:
                slices += _read_header(name, opener, blank)
            except ScanError:
                raise
            except _DAMAGED as e:
                # Without the error of pydicom, which quotes what it cannot read of the patient.
                reason = getattr(e, "strerror", None) or "damaged, or no plain file; copy it again"
                raise ScanError(f"{name}: cannot be read ({reason})") from None
    # Without the first or the last slice a series looks whole.
    if slices and blank:
        _log.warning(
            "%s: is empty or blank, as are %d more; if they are slices, copy them again",
            *(blank[0], len(blank) - 1),
        )
    return slices


def _read_header(name: str, opener: Callable[[], Any], blank: list[str]) -> list[_Slice]:
    """The slices of a file; none where it holds no DICOM, or no picture. A blank file is added to `blank`."""
    with opener() as f:
        head = f.read(132)
        if not _begins_as_dicom(head):
            # A damaged slice must not be taken for a file that happens to lie there.
            if _is_named_dicom(name.rpartition("/")[2]):
                raise ScanError(f"{name}: is not DICOM, or damaged; copy it again")
            if not head.strip(b"\0"):
                blank.append(name)
            return []
        data = _parse_header(name, f)
        start, tag = f.tell(), f.read(4)
    kind = str(data.file_meta.get("MediaStorageSOPClassUID") or data.get("SOPClassUID") or "")
    # Only images of the class "CT Image Storage" need not say that they are CT.
    modality = str(data.get("Modality") or ("CT" if f"{kind}.".startswith(f"{_CT}.") else "none"))
    if "Rows" not in data:
        if modality == "CT" or not kind:
            raise ScanError(f"{name}: is a damaged DICOM file: its header ends early; copy it again")
        return []  # a report, a plan, a directory (DICOMDIR)
    if tag not in _PIXELS:
        raise ScanError(f"{name}: has no pixels (PixelData); send the images again")
    values = 2 ** int(data.BitsStored)
    lowest = -values // 2 if data.get("PixelRepresentation") else 0
    slices = []
    for frame, groups in enumerate(_groups_of_frames(name, data)):
        get = partial(_find, groups, data)
        slope, intercept = get("RescaleSlope"), get("RescaleIntercept")
        slices.append(
            _Slice(
                where=name,
                open=opener,
                start=start,
                data=data,
                frame=frame,
                series=str(data.get("SeriesInstanceUID") or NO_UID),
                patient=str(data.get("PatientID") or ""),
                modality=modality,
                kind=tuple(map(str, get("FrameType") or get("ImageType") or ())),
                grey="MONOCHROME" in str(data.get("PhotometricInterpretation")),
                limits=(lowest, lowest + values - 1),
                shape=(int(data.Rows), int(data.Columns)),
                spacing=_floats(get("PixelSpacing")),
                axes=_floats(get("ImageOrientationPatient")),
                position=_floats(get("ImagePositionPatient")),
                unit=str(get("RescaleType") or ""),
                scale=None if None in (slope, intercept) else (float(slope), float(intercept)),
            )
        )
    return slices


def _parse_header(name: str, f: Any) -> Any:
    """pydicom's data set of `_TAGS`; the file is left at the tag of its pixels."""
    try:
        from pydicom import dcmread
    except ImportError as e:
        raise ScanError(f"{name}: {MISSING}") from e
    f.seek(0)
    try:
        check_syntax(f, force=True)
    except ValueError as e:
        raise ScanError(f"{name}: {e}") from None
    f.seek(0)
    return dcmread(f, stop_before_pixels=True, force=True, specific_tags=_TAGS)


def _groups_of_frames(name: str, data: Any) -> list[list[Any]]:
    """The functional groups of each frame, its own before those of all; none in an image of one frame."""
    count = int(data.get("NumberOfFrames") or 1)
    own = data.get("PerFrameFunctionalGroupsSequence") or []
    if len(own) != count and (count > 1 or own):
        raise ScanError(
            f"{name}: has {count} frames and positions of {len(own)}, which only enhanced CT gives each frame; "
            "write single frames"
        )
    shared = data.get("SharedFunctionalGroupsSequence") or []
    return [[*own[i : i + 1], *shared[:1]] for i in range(count)]


def _find(groups: Sequence[Any], data: Any, keyword: str) -> Any:
    """An attribute of a frame: in a macro of its functional groups, else in the data set itself."""
    for element in itertools.chain.from_iterable(groups):
        if element.VR == "SQ" and element.value and keyword in element.value[0]:
            return element.value[0][keyword].value
    return data.get(keyword)


def _floats(values: Any) -> np.ndarray:
    return np.array([float(v) for v in values or ()])


# Slices -----------------------------------------------------------------------------------------------------
def _choose(where: str, slices: list[_Slice], series: str) -> list[_Slice]:
    """The slices of one CT series of one patient; localisers and images of another kind are set aside."""
    slices = [s for s in slices if series in ("", s.series)]
    kept = [s for s in slices if "LOCALIZER" not in s.kind]
    if not kept:
        found = f"only {len(slices)} localisers" if slices else f"no slices {series}".strip()
        raise ScanError(
            f"{where}: holds {found} in DICOM; a scan is one .nii or .nii.gz file, or a folder, a ZIP or a list "
            "of the slices of a series"
        )
    patients = {s.patient for s in kept} - {""}
    if len(patients) > 1:
        raise ScanError(f"{where}: must hold one patient, holds images of {len(patients)}; separate them")
    counts = Counter(s.series for s in kept)
    if len(counts) > 1:
        listed = ", ".join(f"{uid} ({count} images)" for uid, count in sorted(counts.items()))
        raise ScanError(
            f"{where}: holds {len(counts)} series; choose one by series=UID, or as {where}/UID: {listed}"
        )
    for s in kept:
        if s.modality != "CT":
            raise ScanError(
                f"{s.where}: must have Modality 'CT', found {s.modality[:16]!r}; only CT has Hounsfield units"
            )
    # A reformat or a picture of a report in a series is of another kind than its slices.
    kind, _ = Counter(s.kind[:3] for s in kept).most_common(1)[0]
    of_kind = [s for s in kept if s.kind[:3] == kind]
    if len(of_kind) < len(slices):
        _log.warning(
            "%s: set aside: %d localisers, %d images of another ImageType than %s",
            *(where, len(slices) - len(kept), len(kept) - len(of_kind), "\\".join(kind)),
        )
    return of_kind


def _in_order(where: str, slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """Slices in the order of their positions along their normal, and their affine [4, 4] in RAS+ mm."""
    for s in slices:
        _check_slice(s)
    for what, noun in (("shape", "size"), ("spacing", "PixelSpacing"), ("axes", "orientation")):
        values = np.array([getattr(s, what) for s in slices], float)
        usual = np.median(values, 0)
        differing = values[np.abs(values - usual).max(1) > _SAME]
        if len(differing):
            raise ScanError(
                f"{where}: all slices must have one {noun}, {len(differing)} of {len(slices)} differ: "
                f"{usual.tolist()} and {differing[0].tolist()}; give one scan"
            )
    # Else some would be HU and others raw, in one volume.
    num_scaled = sum(s.scale is not None for s in slices)
    if 0 < num_scaled < len(slices):
        raise ScanError(
            f"{where}: all slices or none must have RescaleSlope and RescaleIntercept, {num_scaled} of "
            f"{len(slices)} have them"
        )
    slices = _without_copies(where, sorted(slices, key=lambda s: s.height))
    if len(slices) < 2:
        raise ScanError(f"{where}: must have at least two slices, found {len(slices)}")
    heights = np.array([s.height for s in slices])
    _check_gaps(where, heights)
    positions = np.stack([s.position for s in slices])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    beside = np.abs(positions - positions[0] - np.arange(len(slices))[:, None] * step).max(1)
    if beside.max() > _BESIDE_MM + _UNEVEN * np.linalg.norm(step):
        raise ScanError(
            f"{where}: slices must lie on one line, the one at {heights[beside.argmax()]:.2f} mm lies "
            f"{beside.max():.1f} mm beside it; are these two scans?"
        )
    row, column = slices[0].axes[:3], slices[0].axes[3:]
    between_rows, between_columns = slices[0].spacing
    affine = np.eye(4)
    affine[:3] = np.stack([row * between_columns, column * between_rows, step, positions[0]], 1)
    return slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0  # no -0


def _check_slice(s: _Slice) -> None:
    """Raise where a slice does not say where it lies, or what its values are."""
    if (s.spacing.size, s.axes.size, s.position.size) != (2, 6, 3) or s.spacing.min() <= 0:
        raise ScanError(
            f"{s.where}: must have PixelSpacing, ImageOrientationPatient and ImagePositionPatient, which "
            "say where it lies"
        )
    if not s.grey or min(s.shape) < 2 or math.prod(s.shape) > _MOST_PIXELS:
        raise ScanError(f"{s.where}: must have 2 x 2 to {_MOST_PIXELS} grey pixels, has {s.shape}")
    row, column = s.axes[:3], s.axes[3:]
    products = np.array([row @ row - 1, column @ column - 1, row @ column])
    numbers = [*s.spacing, *s.axes, *s.position, *(s.scale or ())]
    if not np.isfinite(numbers).all() or np.abs(products).max() > _ORTHOGONAL:
        raise ScanError(
            f"{s.where}: must have finite numbers, and two unit vectors at right angles in "
            f"ImageOrientationPatient, found {s.axes.tolist()}"
        )
    if s.unit not in _UNITS or (s.scale and not s.scale[0]):
        raise ScanError(
            f"{s.where}: must have a scale to HU, found RescaleType {s.unit[:16]!r} and (RescaleSlope, "
            f"RescaleIntercept) {s.scale}; send the series in HU"
        )
    # pydicom takes the lowest bits, whatever the header says.
    stored = int(s.data.BitsStored)
    if int(s.data.get("HighBit", stored - 1)) != stored - 1:
        raise ScanError(
            f"{s.where}: must store its values in the lowest bits, found HighBit {s.data.HighBit} with "
            f"BitsStored {stored}; write it uncompressed with another program"
        )


def _without_copies(where: str, slices: list[_Slice]) -> list[_Slice]:
    kept = slices[:1]
    for s in slices[1:]:
        if s.height - kept[-1].height > _SAME_MM:
            kept.append(s)
        elif not np.equal(*_planes([kept[-1], s], np.dtype(np.float64))).all():
            raise ScanError(
                f"{where}: must have one slice at each place, has two with other pixels at {s.height:.2f} mm "
                "along the normal; are these two phases or reconstructions? give one"
            )
    if len(kept) < len(slices):
        _log.warning("%s: set aside: %d copies of slices", where, len(slices) - len(kept))
    return kept


def _check_gaps(where: str, heights: np.ndarray) -> None:
    """Raise where slices do not lie evenly; `heights` [z] in mm along the normal, rising."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    most = _SAME_MM + _UNEVEN * usual
    bad = np.flatnonzero(np.abs(gaps - usual) > most)
    if not bad.size:
        return
    between = ", ".join(f"{heights[i]:.2f} and {heights[i + 1]:.2f} mm" for i in bad[:3])
    between += f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    # A gap of two or three distances is where one or two slices were.
    steps = (gaps[bad] / usual).round()
    if (steps >= 2).all() and (np.abs(gaps[bad] - steps * usual) <= most * steps).all():
        count = int((steps - 1).sum())
        raise ScanError(
            f"{where}: {count} {'slice is' if count == 1 else 'slices are'} missing between {between} along the "
            f"normal (others lie {usual:.3g} mm apart); send the whole series"
        )
    raise ScanError(
        f"{where}: slices must lie evenly, found distances of {gaps.min():.3g} to {gaps.max():.3g} mm: most are "
        f"{usual:.3g} mm, others lie between {between} along the normal"
    )


# Pixels -----------------------------------------------------------------------------------------------------
def _dtype_of(slices: list[_Slice]) -> np.dtype:
    """int16 or int32 where these hold every HU that the stored bits can mean, else float32."""
    limits = [float(AIR)]
    for s in slices:
        slope, intercept = s.scale or (1.0, 0.0)
        if slope % 1 or intercept % 1:
            return np.dtype(np.float32)
        limits += [slope * stored + intercept for stored in s.limits]
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= min(limits) and max(limits) <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.float32)


def _planes(slices: Sequence[_Slice], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Slices [y, x] in HU."""
    image, of = None, None
    for s in slices:
        try:
            with no_warnings():
                # Once for all frames of a file.
                if s.data is not of:
                    image, of = _read_pixels(s), s.data
                plane = _decode(s, image, dtype)
        except _DAMAGED as e:
            reason = " ".join(str(e).split())  # errors of several decoders come on several lines
            raise ScanError(f"{s.where}: its pixels cannot be read: {reason}; copy it again") from e
        yield plane


def _read_pixels(s: _Slice) -> Any:
    """The data set of a file's pixels, with what a decoder needs of its header."""
    from pydicom import filereader, uid

    # The header is not parsed again, which would take as long as the pixels of a small slice.
    implicit, little = s.data.original_encoding
    with s.open() as f:
        f.seek(s.start)
        image = filereader.read_dataset(f, implicit, little)
    if "PixelData" not in image:
        raise ValueError("the file ends early")
    image.update({element.tag: element for element in s.data if element.VR != "SQ"})
    image.file_meta = s.data.file_meta
    known = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
    image.file_meta.setdefault("TransferSyntaxUID", known)
    return image


def _decode(s: _Slice, image: Any, dtype: np.dtype) -> np.ndarray:
    """One slice [y, x] in HU; padding is `AIR`."""
    from pydicom import pixels

    check_coded_shape(image, s.frame, (*s.shape, 1))
    stored = pixels.pixel_array(image, index=s.frame, raw=True)
    slope, intercept = s.scale or (1.0, 0.0)
    hu = stored.astype(dtype)
    if (slope, intercept) != (1.0, 0.0):
        # Whole numbers that overflow on the way come back, as the result fits.
        hu *= dtype.type(slope)
        hu += dtype.type(intercept)
    if image.get("PixelPaddingValue") is not None:
        ends = [image.PixelPaddingValue, image.get("PixelPaddingRangeLimit", image.PixelPaddingValue)]
        # As the pixels are stored: 63536 with a sign is -2000.
        low, high = np.sort(np.array(ends, np.int64).astype(stored.dtype))
        hu[(stored >= low) & (stored <= high)] = AIR
    return hu
