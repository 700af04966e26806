"""`invoke split`: a label table and others cut into parts by patient."""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvl.base import files
from medvl.ct import names, reports

_log = logging.getLogger("medvl")


def split_tables(
    labels: str,
    folder: str,
    sizes: str,
    seed: int,
    tables: Sequence[str] = (),
    patient: str = "",
    pattern: str = "",
    target: int = 0,
) -> None:
    """Cut a label table and others (reports, metadata) into parts by patient: `valid_reports.csv` ->
    `folder/{part}_reports.csv`.

    Everything is read and checked before anything is written, and no file that exists is replaced.

    Args:
        sizes: "part=size,...", volumes or shares.
        patient: a column of one of the tables that says whose volume it is.
        pattern: a regular expression that finds the patient in a volume's name, see `names.patients_of`.
        target: above 0, the rule of the reference with this target and not `sizes` and `seed`; its names of
            files, too, and a summary and copies of the tables beside them.
    Raises:
        ValueError: unusable tables or sizes, two tables that would be cut into one file, an output that
            exists.
    """
    files.check_writable(folder, folder=True)
    all_tables = (labels, *tables)
    volumes, finding_names, findings = reports.read_labels(labels, patient=patient)
    column = None
    if patient:
        column = reports.read_patients(all_tables, patient)
    patients = names.patients_of(volumes, pattern, column)
    if target:
        indices_of_part = reports.split_like_reference(patients, target)
    else:
        indices_of_part = reports.split_patients(volumes, findings, _parse_sizes(sizes), seed, patients)
    rows_of_table = {path: files.read_csv(path, ("VolumeName",)) for path in all_tables}
    outputs = _outputs_of_split(list(indices_of_part), all_tables, Path(folder), like_reference=target > 0)
    for path, rows in rows_of_table.items():
        _check_volumes(path, rows, {*volumes}, labels)

    # All checks have passed: from here on only a full disk can stop it half-way.
    for part, indices in indices_of_part.items():
        # Tables need not list the volumes in the order of the labels, nor list all of them.
        chosen = {volumes[i] for i in indices}
        for path, rows in rows_of_table.items():
            rows_of_part = [row for row in rows if _volume_of(row) in chosen]
            files.write_csv(outputs[part, path], rows_of_part, list(rows[0]))
        num_patients = len({patients[i] for i in indices})
        print(
            f"{part}: {len(indices)} volumes of {num_patients} patients, mean prevalence "
            f"{findings[indices].mean():.3f} (all: {findings.mean():.3f})"
        )
    prevalence = [findings[indices].mean(0) for indices in indices_of_part.values()]
    gap = np.ptp(prevalence, axis=0)
    print(f"largest difference in prevalence: {finding_names[gap.argmax()]}, {gap.max():.3f}")
    if target:
        for path in all_tables:
            with files.atomic(outputs["original", path]) as tmp:
                shutil.copyfile(path, tmp)
        summary = _summarise(patients, indices_of_part, target)
        files.write_text(outputs["summary", ""], json.dumps(summary, indent=2) + "\n")


def _summarise(
    patients: Sequence[str], indices_of_part: Mapping[str, np.ndarray], target: int
) -> dict[str, Any]:
    """What the reference writes beside the parts."""
    validation = {patients[i] for i in indices_of_part["valid"]}
    # CT-RATE's patients are numbers, in the order of which they are listed.
    numbers = [patient.rpartition("_")[2] for patient in validation]
    are_numbers = all(number.isdecimal() for number in numbers)
    return {
        "total_original_volumes": len(patients),
        "validation_volumes": len(indices_of_part["valid"]),
        "test_volumes": len(indices_of_part["test"]),
        "validation_patients": len(validation),
        "test_patients": len({*patients} - validation),
        "target_validation_size": target,
        "validation_patient_ids": sorted(map(int, numbers)) if are_numbers else sorted(validation),
    }


def _check_volumes(path: str, rows: Sequence[dict[str, str]], volumes: set[str], labels: str) -> None:
    """Raise where a table is about none of the labelled volumes, and warn of its rows about others."""
    listed = {_volume_of(row) for row in rows}
    unknown = len(listed - volumes)
    # No name in common is another data set, or names of another form; a few unknown ones are normal.
    if unknown == len(rows):
        raise ValueError(f"split: {path}: none of its {len(rows)} rows is about a volume of {labels}")
    if unknown:
        _log.warning(
            "%s: %d of %d rows are about volumes without labels and are in no part", path, unknown, len(rows)
        )


def _volume_of(row: dict[str, str]) -> str:
    return names.volume_name(row["VolumeName"].strip())


def _parse_sizes(text: str) -> dict[str, float]:
    """{part: size} from "part=size,part=size"."""
    items = text.split(",")
    sizes = {}
    for item in items:
        try:
            # Without exactly one "=" the unpacking is a ValueError, too.
            name, size = item.split("=")
            sizes[name.strip()] = float(size)
        except ValueError as e:
            raise ValueError(f"split: sizes must be name=number,name=number, got {text!r}") from e
    # A name becomes that of a file: with a slash it would leave the folder.
    valid = [name for name in sizes if re.fullmatch(r"\w[\w.-]*", name)]
    if len(valid) < len(items):
        raise ValueError(f"split: sizes must name each part once, in letters and digits, got {text!r}")
    return sizes


def _outputs_of_split(
    part_names: Sequence[str], tables: Sequence[str], folder: Path, like_reference: bool
) -> dict[tuple[str, str], Path]:
    """{(part, table): the file to write}; refuses what would overwrite a file, or be written twice.

    Like the reference: the part "valid" of reports and metadata is called "validation", a summary and a copy
    of each table are kept.
    """
    outputs: dict[tuple[str, str], Path] = {}
    for part in part_names:
        for number, table in enumerate(tables):
            # "valid_reports.csv" is called by the split it came from: that is replaced by the part's name.
            name = Path(table).name
            prefix = part
            # The first table is that of the labels.
            if like_reference and part == "valid" and number:
                prefix = "validation"
            path = folder / f"{prefix}_{name.partition('_')[2] or name}"
            if path in outputs.values():
                raise ValueError(
                    f"split: {' and '.join(tables)}: two of these would be cut into {path}; rename one of "
                    "them"
                )
            outputs[part, table] = path
    if like_reference:
        outputs["summary", ""] = folder / "split_summary.json"
        for table in tables:
            outputs["original", table] = folder / f"original_{Path(table).name}"
    for path in outputs.values():
        if path.exists():
            raise ValueError(
                f"split: {path} exists and is not replaced; name another folder with --out, or move it away"
            )
    return outputs
