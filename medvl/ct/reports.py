"""Radiology reports and labels in CT-RATE's tables, prompts for findings, and splits by patient."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from medvl.base import files
from medvl.ct import names

Text = Literal["findings", "impression", "both"]
Missing = Literal["error", "empty", "drop"]
Templates = tuple[tuple[str, str], ...]

# The 18 abnormalities of CT-RATE, in the order of its label file.
FINDINGS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

# Named sets of (positive, negative) templates: {} is the finding as written, {lower} the same within a
# sentence. "reference" is CheXzero's pair, "ctclip" that of CT-CLIP's zero-shot script; "ensemble" varies how
# reports state and deny a finding.
PROMPTS: dict[str, Templates] = {
    "reference": (("{}", "no {}"),),
    "ctclip": (("{} is present.", "{} is not present."),),
    "ensemble": (
        ("{}.", "No {lower}."),
        ("There is {lower}.", "There is no {lower}."),
        ("{} is present.", "{} is not present."),
        ("{} is seen.", "{} is not seen."),
        ("{} is observed.", "No {lower} is observed."),
        ("Findings are consistent with {lower}.", "Findings are not consistent with {lower}."),
        ("The chest CT shows {lower}.", "The chest CT shows no {lower}."),
    ),
}
_log = logging.getLogger(__name__)
_COLUMNS = {
    "findings": ("Findings_EN",),
    "impression": ("Impressions_EN",),
    "both": ("Findings_EN", "Impressions_EN"),
}
# What databases, data frames and people write where there is no text.
_ABSENT = {
    "",
    "nan",
    "none",
    "null",
    "n/a",
    "na",
    "n.a",
    "not given",
    "not available",
    "not applicable",
    "-",
    "--",
}
_BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # tables that passed through a join hold 0.0 and 1.0
_REMEDIES = {"empty": "they are kept with an empty text", "drop": "they are left out"}


def read_reports(
    path: files.PathLike, text: Text = "impression", missing: Missing = "error"
) -> dict[str, str]:
    """Read {volume name: report text} from a CSV with VolumeName, Findings_EN and Impressions_EN, in file
    order.

    Args:
        text: which part; "both" joins findings and impression with a space, or is the one of them that has
            text.
        missing: what to do with a report without text (empty, NaN, None, N/A, "Not given."): refuse the file,
            keep it as "", or leave it out; the number of such rows is logged as a warning.
    Raises:
        ValueError: unreadable table, a volume listed twice, no text left, or a missing text under "error".
    """
    if text not in _COLUMNS or missing not in ("error", "empty", "drop"):
        raise ValueError(
            f"read_reports: text must be one of {', '.join(_COLUMNS)} and missing error, empty or drop, "
            f"got {text!r}, {missing!r}"
        )
    columns = _COLUMNS[text]
    rows = files.read_csv(path, ("VolumeName", *columns))
    texts = []
    for row in rows:
        # "both" of a row that has one part is this part alone.
        present = [row[column].strip() for column in columns if not is_absent(row[column])]
        texts.append(" ".join(present))
    absent = [i for i, t in enumerate(texts) if not t]
    # Row 1 of the file is the header, and people count from 1.
    if absent and missing == "error":
        raise ValueError(
            f"{path}: every row must have a text in {' or '.join(columns)}, {len(absent)} of {len(rows)} "
            f"have none, the first is row {absent[0] + 2}; fill them, or set missing to 'empty' or 'drop'"
        )
    if len(absent) == len(rows):
        raise ValueError(f"{path}: none of the {len(rows)} rows has a text in {' or '.join(columns)}")
    if absent:
        remedy = _REMEDIES[missing]
        _log.warning("%s: %d of %d reports have no %s text; %s", path, len(absent), len(rows), text, remedy)
    volumes = check_volumes(path, rows)
    return {v: t for v, t in zip(volumes, texts, strict=True) if t or missing == "empty"}


def read_labels(
    path: files.PathLike, findings: Sequence[str] = (), patient: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """Read a CSV with VolumeName and one column of 0 and 1 per finding.

    Args:
        findings: which columns, in which order; all but VolumeName and `patient` when empty.
        patient: a column with the patient of each volume, which is no label; it may be absent.
    Returns:
        volume names [n], findings [c], labels int8 [n, c].
    Raises:
        ValueError: unreadable table, a missing column, a volume listed twice, or a value other than 0, 1, 0.0
            or 1.0 (names the column).
    """
    rows = files.read_csv(path, ("VolumeName", *findings))
    columns = tuple(findings)
    if not columns:
        columns = tuple(c for c in rows[0] if c not in ("VolumeName", patient))
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(
            f"{path}: needs one or more label columns, each once, got "
            f"{', '.join(columns) or 'only VolumeName'}"
        )
    volumes, labels = parse_labels(path, rows, columns)
    return volumes, columns, labels


def parse_labels(
    path: files.PathLike, rows: list[dict[str, str]], columns: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Volume names and the labels in these columns, from the rows of a table."""
    # Cell by cell, so that the message can name the wrong one.
    labels = np.empty((len(rows), len(columns)), dtype=np.int8)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            value = row[column].strip()
            if value not in _BINARY:
                raise ValueError(
                    f"{path}: labels must be 0 or 1, found {value!r} in column {column!r}, row {i + 2}"
                )
            labels[i, j] = _BINARY[value]
    return check_volumes(path, rows), labels


def prompts_for(finding: str, prompts: str = "ensemble") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The positive and the negative prompts of a finding, from one of the sets in `PROMPTS`."""
    if prompts not in PROMPTS or not finding.strip():
        raise ValueError(
            f"prompts_for: needs a finding and a set of {', '.join(PROMPTS)}, got {finding!r}, {prompts!r}"
        )
    # Within a sentence, as reports are written.
    lower = finding
    if not finding[1:2].isupper():  # an abbreviation such as COPD stays as it is
        lower = finding[0].lower() + finding[1:]
    positive = tuple(template.format(finding, lower=lower) for template, _ in PROMPTS[prompts])
    negative = tuple(template.format(finding, lower=lower) for _, template in PROMPTS[prompts])
    return positive, negative


def read_patients(tables: Sequence[files.PathLike], column: str) -> dict[str, str]:
    """Read {volume name: patient} from the first of these tables that has the column.

    Raises:
        ValueError: an unreadable table, a volume listed twice, or no table with that column (lists the
            columns there are).
    """
    present: list[str] = []
    for path in tables:
        rows = files.read_csv(path, ("VolumeName",))
        if column in rows[0]:
            patients = [row[column] for row in rows]
            return dict(zip(check_volumes(path, rows), patients, strict=True))
        present.append(f"{path} has {', '.join(rows[0])}")
    raise ValueError(f"patients: a table must have the column {column!r}; {'; '.join(present)}")


def split_patients(
    volumes: Sequence[str],
    labels: np.ndarray,
    sizes: Mapping[str, float],
    seed: int,
    patients: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Split volumes by patient, with nearly the same prevalence of every finding and volumes per patient in
    all splits.

    Patients are placed one by one, those with much of something rare first. Each goes where the shares of
    patients, volumes and positives of each finding come nearest to the requested ones, so common patients
    even out what rare ones upset.

    Args:
        volumes: [n] names.
        labels: [n, c] of 0 and 1.
        sizes: relative size of each split in volumes: {"train": 0.8, "val": 0.2}, {"val": 550, "test": 2489}.
        seed: order of patients that are alike.
        patients: [n] the patient of each volume; read from the names (`names.patients_of`) when left out.
    Returns:
        {split: ascending row numbers}; every row is in exactly one split.
    Raises:
        ValueError: shapes that do not match, no sizes or one not above 0, too few patients for the splits.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or len(labels) != len(volumes):
        raise ValueError(
            f"split_patients: labels must be [n, c] with one row per volume, got {labels.shape} for "
            f"{len(volumes)} volumes"
        )
    # All volumes of a patient go to one split, or the test would know patients from training.
    patients = list(patients) or names.patients_of(volumes)
    if len(patients) != len(volumes):
        raise ValueError(
            f"split_patients: every volume must have a patient, got {len(patients)} for {len(volumes)} "
            "volumes"
        )
    if not sizes or not all(0 < size < float("inf") for size in sizes.values()):
        raise ValueError(f"split_patients: needs a size above 0 for each split, got {dict(sizes)}")
    # Patients are numbered in the order of their first volume.
    number = {p: i for i, p in enumerate(dict.fromkeys(patients))}
    owner = np.array([number[p] for p in patients])  # [n], the patient's number of each volume
    # What a patient brings, each to be spread evenly: itself, its volumes, its positives of each finding.
    burden = np.zeros((len(number), labels.shape[1] + 2))
    burden[:, 0] = 1
    np.add.at(burden[:, 1], owner, 1)
    np.add.at(burden[:, 2:], owner, labels)
    burden /= np.maximum(burden.sum(0), 1)
    # Sizes are relative: 0.8 and 0.2 are the same as 400 and 100.
    share = np.array(list(sizes.values()), dtype=float)
    placement = _place_patients(burden, share / share.sum(), np.random.default_rng(seed))
    rows = {split: np.flatnonzero(placement[owner] == k) for k, split in enumerate(sizes)}
    empty = [split for split, members in rows.items() if not len(members)]
    if empty:
        raise ValueError(
            f"split_patients: {len(number)} patients are too few for {dict(sizes)}, none is left for "
            f"{', '.join(empty)}"
        )
    return rows


def split_like_reference(patients: Sequence[str], target: int) -> dict[str, np.ndarray]:
    """The validation and test volumes of the reference: patients with the fewest volumes first, in the order
    of the table, as long as validation has at most `target` + 50 volumes.

    Only to compare with published numbers: patients with one scan, who go to validation, have fewer findings.

    Args:
        patients: [n] the patient of each volume, in the order of the table.
    Source: peterhan91/clip_3d_ct, split_validation.py.
    """
    num_volumes = Counter(patients)
    chosen, total = set(), 0
    # Patients of equally many volumes stay in the order of the table.
    for patient, n in sorted(num_volumes.items(), key=lambda item: item[1]):
        # The second condition takes a patient of very many volumes where validation would stay too small.
        if total + n <= target + 50 or total < target - 100:
            chosen.add(patient)
            total += n
    is_chosen = np.array([patient in chosen for patient in patients])
    if is_chosen.all() or not is_chosen.any():
        raise ValueError(
            f"split: target {target} takes {total} of {len(patients)} volumes for validation; both parts "
            "must have some"
        )
    return {"valid": np.flatnonzero(is_chosen), "test": np.flatnonzero(~is_chosen)}


def is_absent(text: str) -> bool:
    """Whether a cell holds no text: it is empty, or says so (NaN, None, N/A, "Not given.")."""
    return text.strip().casefold().rstrip(".") in _ABSENT


def check_volumes(path: files.PathLike, rows: list[dict[str, str]]) -> tuple[str, ...]:
    """The volume names of a table; raises where one is there twice, or is missing."""
    row_of: dict[str, int] = {}
    for i, row in enumerate(rows, 2):  # row 1 is the header
        volume = names.volume_name(row["VolumeName"].strip())
        if not volume:
            raise ValueError(f"{path}: VolumeName is empty in row {i}")
        if volume in row_of:
            raise ValueError(
                f"{path}: each volume must be there once, rows {row_of[volume]} and {i} name the same one"
            )
        row_of[volume] = i
    return tuple(row_of)


def _place_patients(burden: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The split [p] of each patient.

    Args:
        burden: [p, f], a patient's share of each total.
        share: [k], what each split is to have of all totals.
    """
    # A random order for patients that are alike, then those with the largest share of anything first.
    order = rng.permutation(len(burden))
    order = order[np.argsort(-burden[order].max(1), kind="stable")]
    present = np.zeros((len(share), burden.shape[1]))  # share of each total in each split so far
    placed = np.zeros(burden.shape[1])
    placement = np.empty(len(burden), dtype=np.int64)
    for p in order:
        placed += burden[p]
        # The growth of the squared deviation from the requested shares, if the patient went to each split.
        deviation = present - share[:, None] * placed
        cost = ((2 * deviation + burden[p]) * burden[p]).sum(1)
        k = int(np.argmin(cost))
        placement[p] = k
        present[k] += burden[p]
    return placement
