"""Which findings are scored, and how, under the names by which results are published.

Source: Hamamci et al. 2024, arXiv:2403.17834, and its code (CT-CLIP); "ctrate16" is that of fVLM and HLIP.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import evolve

from medvl.base import files
from medvl.ct import reports, zero_shot
from medvl.evaluation import metrics
from medvl.evaluation.results import Result

Parts = Mapping[str, tuple[str, ...]]

_CALCIFICATIONS = ("Arterial wall calcification", "Coronary artery wall calcification")


def _without(*left_out: str) -> dict[str, tuple[str, ...]]:
    return {finding: (finding,) for finding in reports.FINDINGS if finding not in left_out}


# {protocol: {finding: its parts}}. A finding is present where one of its parts is, and its score is the highest of
# theirs, each asked for with its own prompts.
PROTOCOLS: dict[str, Parts] = {
    "": {},
    "ctrate18": _without(),
    "ctrate16": _without("Medical material", "Lymphadenopathy"),
    "radchest16": _without(*_CALCIFICATIONS, "Mosaic attenuation pattern")
    | {"Calcification": _CALCIFICATIONS},
    "ctclip": _without(),
}
# The abnormalities of RAD-ChestCT that count as each finding of "radchest16", in its order. Those of medical
# material were never published: these are the devices.
_ABNORMALITIES = (
    "catheter_or_port|chest_tube|clip|gi_tube|hardware|pacemaker_or_defib|stent|tracheal_tube cardiomegaly "
    "pericardial_effusion hernia lymphadenopathy emphysema atelectasis nodule|nodulegr1cm opacity fibrosis "
    "pleural_effusion bronchial_wall_thickening consolidation bronchiectasis septal_thickening calcification"
)


def merge_parts(parts: Parts, columns: Sequence[str], values: np.ndarray) -> np.ndarray:
    """The largest value [n, c] of each finding's parts, from the values [n, m] of the columns."""
    merged = []
    for members in parts.values():
        chosen = [columns.index(member) for member in members]
        merged.append(values[:, chosen].max(1))
    return np.stack(merged, 1)


def read_labels(path: files.PathLike, protocol: str) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """Volumes [n], findings [c] and labels [n, c] of a protocol, from a label table of CT-RATE or RAD-ChestCT.

    Raises:
        ValueError: a finding has no column; as `reports.read_labels`.
    """
    rows = files.read_csv(path)
    if "NoteAcc_DEID" in rows[0]:
        rows = _merge_locations(rows)
    parts = PROTOCOLS[protocol]
    # A merged finding may have a column of its own.
    parts = {finding: (finding,) if finding in rows[0] else parts[finding] for finding in parts}
    columns = sum(parts.values(), ())
    missing = [column for column in ("VolumeName", *columns) if column not in rows[0]]
    if missing:
        raise ValueError(
            f"{path}: the protocol {protocol} of {len(parts)} findings needs the columns {', '.join(missing)}; "
            f"found {len(rows[0])}: {', '.join(rows[0])}"
        )
    volumes, labels = reports.parse_labels(path, rows, columns)
    return volumes, tuple(parts), merge_parts(parts, columns, labels)


def _merge_locations(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of RAD-ChestCT, a column for each abnormality*location, as rows of `VolumeName` and findings."""
    columns_of = {}
    for finding, abnormalities in zip(PROTOCOLS["radchest16"], _ABNORMALITIES.split(), strict=True):
        columns = [column for column in rows[0] if column.split("*")[0] in abnormalities.split("|")]
        if columns:
            columns_of[finding] = columns
    merged = []
    for row in rows:
        # "1" where any location has it; what is no label is larger still, and refused with the labels.
        labels = {finding: max(row[c].strip() for c in columns) for finding, columns in columns_of.items()}
        merged.append({"VolumeName": row["NoteAcc_DEID"], **labels})
    return merged


def ctclip_thresholds(scores: Any, labels: Any) -> np.ndarray:
    """CT-CLIP's threshold [c] of each finding, chosen on the labels that it is judged by: of 100 from 0 to 1 the one
    nearest to the corner of the ROC curve, the last of equals; nan where one class is missing.
    """
    s, y = metrics.checked(scores, labels)
    steps = np.linspace(0, 1, 100)
    called = s[:, None] > steps[:, None]  # [n, 100, c]
    tpr = metrics.ratio((called & y[:, None]).sum(0), y.sum(0))  # [100, c]
    fpr = metrics.ratio((called & ~y[:, None]).sum(0), (~y).sum(0))
    distance = np.sqrt((1 - tpr) ** 2 + fpr**2)
    last = len(steps) - 1 - distance[::-1].argmin(0)
    return np.where(np.isnan(distance[0]), np.nan, steps[last])


def evaluate_ctclip(
    scores: Any, labels: Any, volumes: Sequence[str], findings: Sequence[str], **options: Any
) -> list[Result]:
    """`zero_shot.evaluate_findings` with CT-CLIP's thresholds: rows "ctclip_f1_weighted", "ctclip_accuracy" and
    "ctclip_precision", which are too high, since the thresholds were chosen on the evaluated set.
    """
    # CT-CLIP calls what is above the threshold, we call what is equal too.
    thresholds = np.nextafter(ctclip_thresholds(scores, labels), np.inf)
    rows = zero_shot.evaluate_findings(scores, labels, volumes, findings, thresholds, **options)
    published = ("f1_weighted", "accuracy", "precision")
    return [evolve(row, what=f"ctclip_{row.what}") for row in rows if row.what in published]
