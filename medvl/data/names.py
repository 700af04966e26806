"""How a volume is called, and which scan and patient it belongs to."""

import re
from pathlib import PurePath

_CT_RATE = re.compile(r"(?P<scan>(?P<patient>.+_\d+)_[a-z]+)_\d+")


def volume_name(path: object) -> str:
    """The name of a volume: its file name without `.nii`, `.nii.gz` or `.npz` ("valid_1_a_1.nii.gz" -> "valid_1_a_1")."""
    name = PurePath(str(path)).name
    return re.sub(r"(\.nii(\.gz)?|\.npz)$", "", name, flags=re.IGNORECASE)


def scan_of(name: str) -> str:
    """The scan of a volume. CT-RATE names are split_patient_scan_recon; any other name is its own scan."""
    hit = _CT_RATE.fullmatch(name)
    return hit["scan"] if hit else name


def patient_of(name: str) -> str:
    """The patient of a volume ("valid_1_a_1" -> "valid_1"); any name not of CT-RATE's form is its own patient."""
    hit = _CT_RATE.fullmatch(name)
    return hit["patient"] if hit else name
