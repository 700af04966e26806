"""What a row of a metadata table (DICOM's attributes, CT-RATE's columns) says of its scan."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from medvl.base import files
from medvl.base.files import PathLike
from medvl.ct import names

RESCALE = ("RescaleSlope", "RescaleIntercept")
SPACING = ("XYSpacing", "ZSpacing")
ORIENTATION = "ImageOrientationPatient"
_TO_RAS = np.array(
    [-1.0, -1.0, 1.0]
)  # DICOM counts to the left and to posterior, NIfTI to the right and to anterior
_TOLERANCE = 0.01


def read_metadata(
    path: PathLike, scans: Iterable[str], columns: Iterable[str] = ()
) -> dict[str, dict[str, str]]:
    """The rows of a metadata table by volume name.

    Args:
        scans: volume names, at least one of which must have a row.
        columns: what the table must have beside `VolumeName`.
    Raises:
        ValueError: as `files.read_csv`; two rows of one name, a row for none of the scans, or a missing column.
    """
    rows: dict[str, dict[str, str]] = {}
    for row in files.read_csv(path, ["VolumeName"]):
        name = names.volume_name(row["VolumeName"])
        if name in rows:
            raise ValueError(f"{path}: has two rows for {name!r}")
        rows[name] = row
    scans = list(scans)
    if not rows.keys() & set(scans):
        raise ValueError(
            f"{path}: has a row for none of the {len(scans)} scans; it names {next(iter(rows))!r}, they {scans[0]!r}"
        )
    present = next(iter(rows.values()))
    missing = [column for column in columns if column not in present]
    if missing:
        remedy = "; where stored values are HU, set hu='none'" if set(missing) & set(RESCALE) else ""
        raise ValueError(
            f"{path}: must have the column {', '.join(map(repr, missing))} to say how its scans are read, found "
            f"{', '.join(map(repr, present))}{remedy}"
        )
    return rows


def rescale(row: Mapping[str, str]) -> tuple[float, float]:
    """(slope, intercept), raw values to HU. Raises ValueError where one is not one number; so do the other functions here."""
    for column in RESCALE:
        if len(set(_bare(row.get(column, "")).split(","))) > 1:  # "-1024,5" is no list
            raise ValueError(
                f"its metadata row must have one number in {column!r}, with a point, found {row[column]!r}"
            )
    return _number(row, RESCALE[0]), _number(row, RESCALE[1])


def spacing_mm(row: Mapping[str, str]) -> tuple[float, float, float]:
    """Along the file's axes x, y, z. DICOM's PixelSpacing is (between rows, between columns), that is (y, x)."""
    spacing = (_number(row, SPACING[0], 1), _number(row, SPACING[0], 0), _number(row, SPACING[1]))
    if min(spacing) <= 0:
        raise ValueError(f"the metadata's spacing must be positive, found {spacing} mm")
    return spacing


def directions(row: Mapping[str, str]) -> np.ndarray | None:
    """Unit vectors [3, 3] in its columns: where the file's axes x, y, z grow to, as (right, anterior, superior).

    ImageOrientationPatient says where x and y grow to. Slices are taken to be stacked along the normal of both, which is how they are
    sorted when a series becomes a volume, as long as that normal is superior: otherwise the stack may be mirrored or sheared.

    Returns:
        None where the row does not have it.
    Raises:
        ValueError: not two unit vectors at right angles, or a normal that is not superior.
    Source: DICOM PS3.3, C.7.6.2.1.1.
    """
    text = _bare(row.get(ORIENTATION, ""))
    if not text:
        return None
    try:
        cosines = np.array([float(part) for part in re.split(r"[,\\\s]+", text.strip())]).reshape(2, 3)
    except ValueError as e:
        raise ValueError(f"its metadata row must have six numbers in {ORIENTATION!r}, found {text!r}") from e
    x, y = cosines * _TO_RAS
    lengths = np.linalg.norm(cosines, axis=1)
    if not (np.abs(lengths - 1) <= _TOLERANCE).all() or abs(x @ y) > _TOLERANCE:
        raise ValueError(
            f"its metadata row must have two unit vectors at right angles in {ORIENTATION!r}, found {text!r}"
        )
    normal = np.cross(x, y)
    if np.abs(normal[:2]).max() > _TOLERANCE or normal[2] < 0:
        raise ValueError(
            f"{ORIENTATION} {text!r} makes the normal of the slices grow to {np.round(normal, 3).tolist()} (right, anterior, superior) and "
            "not to superior: whether the file stacks them that way cannot be known, it could come out mirrored or sheared; write the "
            "affine into the header (qform or sform)"
        )
    return np.stack([x, y, normal], 1)


def _bare(cell: object) -> str:
    """A cell without the brackets and quotes of a printed list: "['0.7', '0.7']" -> "0.7, 0.7"."""
    return re.sub(r"""[][()'"]""", "", str(cell)).strip()


def _number(row: Mapping[str, str], column: str, at: int = 0) -> float:
    """A number of the row; a list "[0.34, 0.36]" gives its entry `at`."""
    parts = _bare(row.get(column, "")).split(",")
    try:
        value = float(parts[at if len(parts) > 1 else 0])
    except (ValueError, IndexError):
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(
            f"its metadata row must have a number in {column!r}, found {row.get(column, '(no such column)')!r}"
        )
    return value
