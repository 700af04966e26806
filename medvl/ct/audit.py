"""What scans are by their headers and first slices alone, and what preprocessing would refuse.

CT-RATE has two releases: v1 (`train/`, `valid/`) has blank headers and raw values, v2 (`train_fixed/`,
`valid_fixed/`) whole headers and HU.
"""

import hashlib
import io
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from medvl.base.display import track
from medvl.base.workers import worker_pool
from medvl.ct import names, preprocess, scans
from medvl.ct.header import Header, ScanError

COLUMNS = (
    *("name", "path", "release", "patient", "shape", "spacing_mm", "dtype", "header", "hu"),
    *("metadata", "report", "labels", "no_chest", "refused", "faults"),
)
# Volumes of v1 that other projects leave out (radfinder, HLIP): a degenerate affine, or an odd shape.
_BROKEN = re.compile("train_(1267_a_4|11755_a_[234]|3821_a_5|9792_a_[1-4])")
_FOLDERS = {"train": "v1", "valid": "v1", "train_fixed": "v2", "valid_fixed": "v2"}
_MOST_HEADERS = 1000  # read before work starts, in about a second
_STRAYS = 0.05  # a smaller share of the other release is left to the checks of each scan
_SLICES = 4  # read of each scan to see its scale


def check_one_release(source: object, paths: Sequence[Path]) -> None:
    """Refuse volumes of CT-RATE of which some are of v1 and some of v2, by their folders or else by the headers
    of up to 1,000: ValueError with counts and examples.
    """
    paths = [path for path in paths if names.is_ct_rate(names.volume_name(path))]
    # The folders first: they cost nothing.
    _refuse_two_releases(source, paths, map(_folder_release, paths), strays=0)
    sample = paths[:: len(paths) // _MOST_HEADERS + 1]
    _refuse_two_releases(source, sample, map(_read_release, sample), strays=_STRAYS)


def _refuse_two_releases(
    source: object, paths: Sequence[Path], releases: Iterable[str], strays: float
) -> None:
    """Raise where more than this share of the paths is of the rarer release."""
    paths_of: dict[str, list[Path]] = {"v1": [], "v2": [], "": []}
    for path, release in zip(paths, releases, strict=True):
        paths_of[release].append(path)
    v1, v2 = paths_of["v1"], paths_of["v2"]
    if min(len(v1), len(v2)) > strays * len(paths):
        raise ValueError(
            f"{source}: must hold one release of CT-RATE, found {len(v1)} volumes of v1 (blank headers, or in "
            f"train/ or valid/), e.g. {v1[0]}, and {len(v2)} of v2 (whole headers, or in *_fixed/), e.g. {v2[0]}; "
            "preprocess each release into a store of its own"
        )


def audit_scans(
    listed: Sequence[tuple[str, Path]],
    metadata: Mapping[str, Mapping[str, str]],
    named: Mapping[str, Collection[str]],
    workers: int = 1,
) -> list[dict[str, str]]:
    """A row of `COLUMNS` for each scan; only the start and the last bytes of each file are read.

    Args:
        listed: (name, path) of scans, see `ingest.list_scans`.
        metadata: {volume name: row of the metadata table}.
        named: the volumes in the tables "metadata", "report" and "labels" and in the list "no_chest", for
            those that are there.
    Returns:
        rows in the order of the scans. "refused" is why `preprocess_scan` would refuse a scan, "faults" that
        and all else that needs a look; rows are counted as in a CSV, from 2.
    """
    jobs = [(name, path, metadata.get(name)) for name, path in listed]
    with worker_pool(workers) as pool:
        rows = [*track(pool.map(_examine, jobs, chunksize=16), "headers", len(jobs))]
    headers = [row["header"] for row in rows if row["release"]]
    usual_header = max(("blank", "placed"), key=headers.count)
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 2):  # as the lines of a CSV are counted
        for column, members in named.items():
            row[column] = "yes" if row["name"] in members else "no"
        if row["metadata"] == "no":
            row["refused"] = "the metadata table has no row for it"
        faults = [row["refused"], row["faults"]]
        faults += [f"it has no {column}" for column in ("report", "labels") if row[column] == "no"]
        # By name, then by what was read of it.
        for key, what in ((row["name"], "name is that"), (row.pop("digest"), "first slice is that")):
            if key and first.setdefault(key, number) < number:
                faults.append(f"its {what} of row {first[key]}")
        if row["release"] and row["header"] not in ("", usual_header):
            faults.append(f"its header is {row['header']}, most are {usual_header}")
        if _BROKEN.fullmatch(row["name"]):
            faults.append("it is known to be broken in v1 of CT-RATE")
        row["faults"] = "; ".join(filter(None, faults))
    return rows


def _examine(job: tuple[str, Path, Mapping[str, str] | None]) -> dict[str, str]:
    """What the file of a scan says, and a digest of its first slice."""
    name, path, metadata = job
    row = dict.fromkeys((*COLUMNS, "digest"), "")
    row |= {"name": name, "path": str(path), "patient": names.patient_of(name)}
    try:
        with scans.open_scan(path) as (header, slices):
            row |= {"shape": _by_axis(header.shape), "dtype": str(header.dtype)}
            row["header"] = "placed" if header.placed else "blank"
            if names.is_ct_rate(name):
                row["release"] = _folder_release(path) or _header_release(header)
            if _is_cut(path, math.prod(header.shape) * header.dtype.itemsize):
                row["faults"] = "the last bytes of its gzip stream give another size: it is perhaps truncated"
            plane = next(slices)
            part = plane[::8, ::8]
            # A constant background is alike in many scans.
            if part.min() < part.max():
                row["digest"] = hashlib.sha256(f"{header.shape}".encode() + part.tobytes()).hexdigest()
            slices = itertools.chain([plane], itertools.islice(slices, _SLICES - 1))
            spacing, scale = preprocess.examine_scan(header, slices, metadata)
        row |= {"spacing_mm": _by_axis(spacing), "hu": scale.rule}
    except ScanError as e:
        # The page shows reasons without files, whose names may say who the patient is.
        row["refused"] = str(e)
        where, _, reason = str(e).partition(": ")
        if where.startswith(str(path.parent)) or where in (name, path.name):
            row["refused"] = reason
    return row


def _is_cut(path: Path, need: int) -> bool:
    """Whether a gzip file ends in another size (of what it holds, modulo 2 ** 32) than a header and `need`
    bytes of voxels.
    """
    if not path.is_file():
        return False  # a series of DICOM
    with open(path, "rb") as f:
        zipped = f.read(2) == b"\x1f\x8b"
        f.seek(-4, io.SEEK_END)
        return zipped and (int.from_bytes(f.read(), "little") - need) % 2**32 > 2**20


def _folder_release(path: Path) -> str:
    """The release of a volume of CT-RATE by the innermost of its folders that tells; "" where none does."""
    releases = [_FOLDERS[part] for part in path.parts[:-1] if part in _FOLDERS]
    return releases[-1] if releases else ""


def _header_release(header: Header) -> str:
    return "v2" if header.placed else "v1"


def _read_release(path: Path) -> str:
    """The release by the header; "" where it cannot be read, which the scan's own job tells."""
    try:
        with scans.open_scan(path) as (header, _):
            return _header_release(header)
    except ScanError:
        return ""


def _by_axis(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
