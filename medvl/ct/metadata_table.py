"""Metadata tables of scans: the columns of CT-RATE, which are named as DICOM's attributes.

A row gives what a NIfTI header may have lost: the scale to Hounsfield units, the voxel spacing and the
orientation.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from medvl.base import files
from medvl.base.files import PathLike
from medvl.ct import names

RESCALE = ("RescaleSlope", "RescaleIntercept")
SPACING = ("XYSpacing", "ZSpacing")
ORIENTATION = "ImageOrientationPatient"
# DICOM's axes grow to the left and to posterior, NIfTI's to the right and to anterior.
_TO_RAS = np.array([-1.0, -1.0, 1.0])
_TOLERANCE = 0.01  # of direction cosines


def read_metadata(
    path: PathLike, scans: Iterable[str], columns: Iterable[str] = ()
) -> dict[str, dict[str, str]]:
    """Read the rows of a metadata table, by volume name.

    Args:
        scans: volume names, at least one of which must have a row.
        columns: what the table must have beside `VolumeName`.
    Raises:
        ValueError: as `files.read_csv`; two rows of one name, a row for none of the scans, or a missing
            column.
    """
    rows: dict[str, dict[str, str]] = {}
    for row in files.read_csv(path, ["VolumeName"]):
        name = names.volume_name(row["VolumeName"])
        if name in rows:
            raise ValueError(f"{path}: has two rows for {name!r}")
        rows[name] = row
    # No row for any scan is most likely another table; a few scans without one are rejected one by one.
    scans = list(scans)
    if not rows.keys() & set(scans):
        raise ValueError(
            f"{path}: has a row for none of the {len(scans)} scans; it names {next(iter(rows))!r}, they "
            f"{scans[0]!r}"
        )
    # All rows have the columns of the header.
    present = next(iter(rows.values()))
    missing = [column for column in columns if column not in present]
    if missing:
        remedy = ""
        if set(missing) & set(RESCALE):
            remedy = "; where stored values are HU, set hu='none'"
        raise ValueError(
            f"{path}: must have the column {', '.join(map(repr, missing))} to say how its scans are read, "
            f"found {', '.join(map(repr, present))}{remedy}"
        )
    return rows


def rescale(row: Mapping[str, str]) -> tuple[float, float]:
    """Slope and intercept from raw values to HU.

    Raises:
        ValueError: one of the two is not a single number; the message goes on after the scan's name.
    """
    for column in RESCALE:
        # "-1024,5" is a number with a decimal comma, not a list: its first part would be a wrong scale.
        entries = _strip_list(row.get(column, "")).split(",")
        if len(set(entries)) > 1:
            raise ValueError(
                f"its metadata row must have one number in {column!r}, with a point, found {row[column]!r}"
            )
    return _read_number(row, RESCALE[0]), _read_number(row, RESCALE[1])


def spacing_mm(row: Mapping[str, str]) -> tuple[float, float, float]:
    """Voxel spacing in mm along the file's axes x, y, z.

    Raises:
        ValueError: not positive numbers; the message goes on after the scan's name.
    """
    # DICOM's PixelSpacing is (between rows, between columns), that is (y, x).
    x = _read_number(row, SPACING[0], 1)
    y = _read_number(row, SPACING[0], 0)
    z = _read_number(row, SPACING[1])
    if min(x, y, z) <= 0:
        raise ValueError(f"the metadata's spacing must be positive, found {(x, y, z)} mm")
    return x, y, z


def directions(row: Mapping[str, str]) -> np.ndarray | None:
    """Directions of the file's axes in the patient: unit vectors [3, 3] in the columns x, y, z, in RAS+.

    ImageOrientationPatient gives those of x and y. Slices are assumed to be stacked along the normal of both,
    which is how they are sorted when a series becomes a volume. The normal must be superior: otherwise the
    stack may be mirrored or sheared.

    Returns:
        None where the row does not have the orientation.
    Raises:
        ValueError: not two unit vectors at right angles, or a normal that is not superior; the message goes
            on after the scan's name.
    Source: DICOM PS3.3, C.7.6.2.1.1.
    """
    text = _strip_list(row.get(ORIENTATION, ""))
    if not text:
        return None
    try:
        numbers = [float(part) for part in re.split(r"[,\\\s]+", text.strip())]
        cosines = np.array(numbers).reshape(2, 3)
    except ValueError as e:
        raise ValueError(f"its metadata row must have six numbers in {ORIENTATION!r}, found {text!r}") from e
    x, y = cosines * _TO_RAS
    # Printed cosines are rounded, so unit lengths and right angles hold within a tolerance only.
    lengths = np.linalg.norm(cosines, axis=1)
    if not (np.abs(lengths - 1) <= _TOLERANCE).all() or abs(x @ y) > _TOLERANCE:
        raise ValueError(
            f"its metadata row must have two unit vectors at right angles in {ORIENTATION!r}, found {text!r}"
        )
    normal = np.cross(x, y)
    if np.abs(normal[:2]).max() > _TOLERANCE or normal[2] < 0:
        raise ValueError(
            f"{ORIENTATION} {text!r} makes the normal of the slices point to {np.round(normal, 3).tolist()} "
            "(right, anterior, superior) and not to superior: the order of the slices in the file is then "
            "unknown, and the volume could come out mirrored or sheared; write the affine into the header "
            "(qform or sform)"
        )
    return np.stack([x, y, normal], 1)


def _strip_list(cell: object) -> str:
    """A cell without the brackets and quotes of a printed list: "['0.7', '0.7']" -> "0.7, 0.7"."""
    return re.sub(r"""[][()'"]""", "", str(cell)).strip()


def _read_number(row: Mapping[str, str], column: str, index: int = 0) -> float:
    """The number of a cell, or the entry `index` of a list such as "[0.34, 0.36]"."""
    entries = _strip_list(row.get(column, "")).split(",")
    # One number stands for both directions in the plane.
    if len(entries) == 1:
        index = 0
    try:
        value = float(entries[index])
    except (ValueError, IndexError):
        value = np.nan  # refused below, together with cells that say "nan" or "inf"
    if not np.isfinite(value):
        raise ValueError(
            f"its metadata row must have a number in {column!r}, found "
            f"{row.get(column, '(no such column)')!r}"
        )
    return value
