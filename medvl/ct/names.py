"""How volumes are called, and which scan and patient they belong to."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from medvl.base import files

# split_patient_scan_recon, such as "valid_1_a_1"
_CT_RATE = re.compile(r"(?P<scan>(?P<patient>.+_\d+)_[a-z]+)_\d+")
_log = logging.getLogger(__name__)


def volume_name(path: object) -> str:
    """The name of a volume: its file name without `.nii`, `.nii.gz`, `.npz`, `.zip` or `.dcm`."""
    name = PurePath(str(path)).name
    return re.sub(r"(\.nii(\.gz)?|\.npz|\.zip|\.dcm)$", "", name, flags=re.IGNORECASE)


def read_list(path: files.PathLike) -> tuple[str, ...]:
    """The volumes that a text file names, a name or path a line (as CT-RATE's `no_chest_valid.txt`).

    Raises:
        ValueError: no readable UTF-8 text, or no line.
    """
    files.check_regular(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not a readable list of volumes, one a line ({e})") from e
    volumes = [volume_name(line.strip()) for line in lines if line.strip()]
    if not volumes:
        raise ValueError(f"{path}: must name volumes, one a line, and is empty")
    return tuple(dict.fromkeys(volumes))


def is_ct_rate(name: str) -> bool:
    """Whether a volume is named as in CT-RATE: split_patient_scan_recon."""
    return _CT_RATE.fullmatch(name) is not None


def scan_of(name: str) -> str:
    """The scan of a volume. CT-RATE names are split_patient_scan_recon; any other name is its own scan."""
    match = _CT_RATE.fullmatch(name)
    return match["scan"] if match else name


def patient_of(name: str) -> str:
    """The patient of a volume ("valid_1_a_1" -> "valid_1"); a name of another form is its own patient."""
    match = _CT_RATE.fullmatch(name)
    return match["patient"] if match else name


def patients_of(
    volumes: Sequence[str], pattern: str = "", column: Mapping[str, str] | None = None
) -> list[str]:
    """The patient of every volume.

    Without a pattern or a column the names are read as CT-RATE's. Names of another form then count as one
    patient each, with a warning: several scans of one patient could fall into both parts of a split, and
    intervals would come out too narrow.

    Args:
        volumes: [n] names or file names.
        pattern: a regular expression that is searched in each name; the patient is its first group, or the
            whole match where it has none.
        column: {volume name: patient}, from a table.
    Raises:
        ValueError: pattern and column, an unusable pattern, a name that the pattern does not match, a volume
            without a patient in the column.
    """
    volumes = [volume_name(v) for v in volumes]
    if pattern and column is not None:
        raise ValueError("patients: give a column or a pattern, not both")
    # Every volume, or none: a patient made up for some would share nothing with its other scans.
    if column is not None:
        missing = [v for v in volumes if not column.get(v, "").strip()]
        if missing:
            raise ValueError(
                f"patients: every volume must have a patient, {len(missing)} of {len(volumes)} have none, "
                f"e.g. {missing[0]}"
            )
        return [column[v].strip() for v in volumes]
    if pattern:
        return _patients_by_pattern(volumes, pattern)
    # Without a rule: CT-RATE's form, and a warning where it does not fit.
    foreign = sum(not is_ct_rate(v) for v in volumes)
    if foreign:
        _log.warning(
            "%d of %d volumes are not named as in CT-RATE (split_patient_scan_recon), so each counts as a "
            "separate patient; if a patient has several volumes, give a column of patients or a pattern such "
            "as '(P[0-9]+)_'",
            foreign,
            len(volumes),
        )
    return [patient_of(v) for v in volumes]


def _patients_by_pattern(volumes: Sequence[str], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise ValueError(f"patients: {pattern!r} is not a regular expression ({e})") from e
    patients = []
    for volume in volumes:
        match = compiled.search(volume)
        patient = match[min(1, compiled.groups)] if match else ""  # group 0 is the whole match
        if not patient:
            raise ValueError(
                f"patients: the pattern {pattern!r} must find the patient in every name, it finds none in "
                f"{volume!r}"
            )
        patients.append(patient)
    return patients
