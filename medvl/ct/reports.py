"""Radiology reports and labels in CT-RATE's tables, prompts for findings, and splits that keep patients whole."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from medvl.base import files
from medvl.ct import names

Text = Literal["findings", "impression", "both"]
Missing = Literal["error", "empty", "drop"]
Templates = tuple[tuple[str, str], ...]

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
"""The 18 abnormalities of CT-RATE, in the order of its label file."""

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
"""Named sets of (positive, negative) templates: {} is the finding as written, {lower} the same within a sentence.

"reference" is CheXzero's pair, "ctclip" that of CT-CLIP's zero-shot script; "ensemble" varies how reports state and deny a finding."""

_log = logging.getLogger(__name__)
_COLUMNS = {
    "findings": ("Findings_EN",),
    "impression": ("Impressions_EN",),
    "both": ("Findings_EN", "Impressions_EN"),
}
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


def read_reports(
    path: files.PathLike, text: Text = "impression", missing: Missing = "error"
) -> dict[str, str]:
    """Volume name -> report text, from a CSV with VolumeName, Findings_EN and Impressions_EN, in file order.

    Args:
        text: which part; "both" joins findings and impression with a space and takes the one there is where the other is missing.
        missing: what to do with a report without text (empty, NaN, None, N/A, "Not given."): refuse the file, keep it as "", or leave it
            out; the number of such rows is logged as a warning.
    Raises:
        ValueError: unreadable table, a volume listed twice, no text left, or a missing text under "error".
    """
    if text not in _COLUMNS or missing not in ("error", "empty", "drop"):
        raise ValueError(
            f"read_reports: text must be one of {', '.join(_COLUMNS)} and missing error, empty or drop, got {text!r}, {missing!r}"
        )
    rows = files.read_csv(path, ("VolumeName", *_COLUMNS[text]))
    texts = [" ".join(row[c].strip() for c in _COLUMNS[text] if not _is_absent(row[c])) for row in rows]
    absent = [i for i, t in enumerate(texts) if not t]
    if absent and missing == "error":
        raise ValueError(
            f"{path}: every row must have a text in {' or '.join(_COLUMNS[text])}, {len(absent)} of {len(rows)} have none, "
            f"the first is row {absent[0] + 2}; fill them, or set missing to 'empty' or 'drop'"
        )
    if len(absent) == len(rows):
        raise ValueError(f"{path}: none of the {len(rows)} rows has a text in {' or '.join(_COLUMNS[text])}")
    if absent:
        _log.warning(
            "%s: %d of %d reports have no %s text; %s", path, len(absent), len(rows), text, _DONE[missing]
        )
    volumes = _volumes(path, rows)
    return {v: t for v, t in zip(volumes, texts, strict=True) if t or missing == "empty"}


def read_labels(
    path: files.PathLike, findings: Sequence[str] = (), patient: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """(volume names, findings, int8 labels [n, c]) from a CSV with VolumeName and one column of 0 and 1 per finding.

    Args:
        findings: which columns, in which order; all but VolumeName and `patient` when empty.
        patient: a column that says whose volume it is, which is no label; it may be absent.
    Raises:
        ValueError: unreadable table, a missing column, a volume listed twice, or a value other than 0, 1, 0.0 or 1.0 (names the column).
    """
    rows = files.read_csv(path, ("VolumeName", *findings))
    columns = tuple(findings) or tuple(c for c in rows[0] if c not in ("VolumeName", patient))
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(
            f"{path}: needs one or more label columns, each once, got {', '.join(columns) or 'only VolumeName'}"
        )
    labels = np.empty((len(rows), len(columns)), dtype=np.int8)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if (value := row[column].strip()) not in _BINARY:
                raise ValueError(
                    f"{path}: labels must be 0 or 1, found {value!r} in column {column!r}, row {i + 2}"
                )
            labels[i, j] = _BINARY[value]
    return _volumes(path, rows), columns, labels


def prompts_for(finding: str, prompts: str = "ensemble") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(positive, negative) prompts of a finding under one of the sets in `PROMPTS`."""
    if prompts not in PROMPTS or not finding.strip():
        raise ValueError(
            f"prompts_for: needs a finding and a set of {', '.join(PROMPTS)}, got {finding!r}, {prompts!r}"
        )
    lower = finding if finding[1:2].isupper() else finding[0].lower() + finding[1:]  # not COPD
    positive, negative = zip(*PROMPTS[prompts], strict=True)
    return tuple(t.format(finding, lower=lower) for t in positive), tuple(
        t.format(finding, lower=lower) for t in negative
    )


def read_patients(tables: Sequence[files.PathLike], column: str) -> dict[str, str]:
    """{volume name: patient} from the first of these tables that has the column.

    Raises:
        ValueError: an unreadable table, a volume listed twice, or no table with that column (lists the columns there are).
    """
    seen: list[str] = []
    for path in tables:
        rows = files.read_csv(path, ("VolumeName",))
        if column in rows[0]:
            return dict(zip(_volumes(path, rows), (row[column] for row in rows), strict=True))
        seen += [f"{path} has {', '.join(rows[0])}"]
    raise ValueError(f"patients: a table must have the column {column!r}; {'; '.join(seen)}")


def split_patients(
    volumes: Sequence[str],
    labels: np.ndarray,
    sizes: Mapping[str, float],
    seed: int,
    patients: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Rows of each split, whole patients each, with close to equal prevalence of every finding and equal volumes per patient.

    Patients are placed one by one, those with much of something rare first; each goes where it leaves the shares of patients, volumes and
    positives of each finding nearest to the wanted ones, so common patients even out what rare ones upset.

    Args:
        volumes: [n] names.
        labels: [n, c] of 0 and 1.
        sizes: relative size of each split in volumes: {"train": 0.8, "val": 0.2} or {"val": 550, "test": 2489}.
        seed: order of patients that are alike.
        patients: [n] whose volume each is; as `names.patients_of` reads them from the names when left out.
    Returns:
        {split: ascending row numbers}; every row is in exactly one split.
    Raises:
        ValueError: shapes that do not match, no sizes or a size not above 0, too few patients to give each split one.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or len(labels) != len(volumes):
        raise ValueError(
            f"split_patients: labels must be [n, c] with one row per volume, got {labels.shape} for {len(volumes)} volumes"
        )
    patients = list(patients) or names.patients_of(volumes)
    if len(patients) != len(volumes):
        raise ValueError(
            f"split_patients: every volume must have a patient, got {len(patients)} for {len(volumes)} volumes"
        )
    number = {p: i for i, p in enumerate(dict.fromkeys(patients))}
    if not sizes or not all(0 < size < float("inf") for size in sizes.values()):
        raise ValueError(f"split_patients: needs a size above 0 for each split, got {dict(sizes)}")
    owner = np.array([number[p] for p in patients])
    features = np.concatenate(
        [np.ones((len(volumes), 1)), labels], 1
    )  # volumes and positives, then summed by patient
    burden = np.zeros((len(number), features.shape[1] + 1))
    np.add.at(burden, owner, np.pad(features, ((0, 0), (1, 0))))
    burden[:, 0] = 1  # and the patient itself
    share = np.array(list(sizes.values()), dtype=float)
    place = _place(burden / np.maximum(burden.sum(0), 1), share / share.sum(), np.random.default_rng(seed))
    rows = {split: np.flatnonzero(place[owner] == k) for k, split in enumerate(sizes)}
    if empty := [split for split, found in rows.items() if not len(found)]:
        raise ValueError(
            f"split_patients: {len(number)} patients are too few for {dict(sizes)}, none is left for {', '.join(empty)}"
        )
    return rows


def _is_absent(text: str) -> bool:
    """Whether a cell says that there is no text: empty, or what databases and data frames write for it."""
    return text.strip().casefold().rstrip(".") in _ABSENT


_DONE = {"empty": "they are kept with an empty text", "drop": "they are left out"}


def _volumes(path: files.PathLike, rows: list[dict[str, str]]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    for i, row in enumerate(rows, 2):  # row 1 is the header
        volume = names.volume_name(row["VolumeName"].strip())
        if not volume:
            raise ValueError(f"{path}: VolumeName is empty in row {i}")
        if volume in seen:
            raise ValueError(
                f"{path}: each volume must be there once, rows {seen[volume]} and {i} name the same one"
            )
        seen[volume] = i
    return tuple(seen)


def _place(burden: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The split [p] of each patient; `burden` [p, f] are its shares of each total."""
    order = rng.permutation(len(burden))
    order = order[np.argsort(-burden[order].max(1), kind="stable")]
    have = np.zeros((len(share), burden.shape[1]))  # share of each total that each split holds
    placed = np.zeros(burden.shape[1])
    place = np.empty(len(burden), dtype=np.int64)
    for p in order:
        placed += burden[p]
        off = have - share[:, None] * placed
        cost = ((2 * off + burden[p]) * burden[p]).sum(1)  # the growth of the squared deviation
        place[p] = k = int(np.argmin(cost))
        have[k] += burden[p]
    return place
