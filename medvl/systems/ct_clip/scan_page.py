"""What a run says of one scan as a page, with the slices that speak for its findings."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from medvl.base import files
from medvl.ct import ingest, preprocess
from medvl.evaluation import plots, report
from medvl.hub.checkpoints import new_folder

COLUMNS = ("Finding", "Probability", "Threshold", "Called", "Zero-shot", "Strongest slice, mm")
_DRAWN = 6  # findings at most
_PICTURES = 3  # slices of each
_HU = (-1000, 600)


def table(found: dict[str, Any]) -> list[list[Any]]:
    """A line for each finding of `look_at_scan`, see COLUMNS; the slice as its height above the lowest one."""
    lines = []
    for finding, probability in found["calibrated"].items():
        # Thresholds were fitted on the validation split: findings in the user's own words have none.
        threshold, called = math.nan, ""
        if finding in found["calibrated_threshold"]:
            threshold = found["calibrated_threshold"][finding]
            # As the test split was decided: calibrated, two different scores may round to one.
            is_called = found["probability"][finding] >= found["threshold"][finding]
            called = "yes" if is_called else "no"
        # Where slices were not asked for, none is the strongest.
        mm = math.nan
        if finding in found["slices"]:
            strongest = found["slices"][finding].argmax()
            mm = round(float(found["slice_mm"][strongest]))
        lines.append([finding, probability, threshold, called, found["probability"][finding], mm])
    return lines


def write_page(found: dict[str, Any], folder: files.PathLike) -> Path:
    """Write `report.html` (self-contained), `report.md`, `findings.csv`, `slices.csv` and figures into a new folder,
    all or nothing; returns the path of the HTML. The scan is not named.
    """
    volume, lines = found["volume"], table(found)
    # Findings that are called or were asked for in own words, which have no threshold, the surest first; the most
    # probable ones where there are none.
    ranked = sorted(lines, key=lambda line: (line[3] == "no", -line[1]))
    chosen = [line for line in ranked if line[3] != "no"]
    drawn = [line[0] for line in (chosen or ranked[:_PICTURES])[:_DRAWN]]
    profiles = {}
    for finding in drawn:
        points = zip(found["slice_mm"].tolist(), found["slices"][finding].tolist(), strict=True)
        profiles[finding] = {mm: (effect, math.nan, math.nan) for mm, effect in points}
    figures = {
        "The slices that speak most for each finding": _draw_slices(found, drawn),
        "How much each slice speaks for each finding": plots.lines(
            profiles, "height above the lowest slice, mm", "change of the logit"
        ),
    }
    uncalibrated = found["probability"].keys() - found["calibration"].lines.keys()
    spacing_mm = tuple(round(mm, 2) for mm in volume.source_spacing_mm)
    notes = (
        f"HU by {volume.hu_rule}; {volume.source_shape} voxels of {spacing_mm} mm.",
        "Probabilities are zero-shot ones after the run's calibration on its validation split. Without one: "
        f"{', '.join(sorted(uncalibrated)) or 'none'}. A slice speaks for a finding as "
        "far as it changes its zero-shot logit by itself; that is what the model goes by, not where the finding is.",
        "Slices are told by their height in mm above the lowest one that the model sees; pictures have the patient's "
        "right on the left.",
    )
    caption = f"Findings: {found['doubt']}" if found["doubt"] else "Findings"
    profile = np.stack([found["slice_mm"], *found["slices"].values()], 1).tolist()
    with new_folder(folder) as tmp:
        report.write_report(tmp, "One scan", (), figures, notes, [(caption, COLUMNS, lines)])
        for name, columns, rows in (
            ("findings.csv", COLUMNS, lines),
            ("slices.csv", ("mm", *found["slices"]), profile),
        ):
            files.write_csv(tmp / name, [dict(zip(columns, row, strict=True)) for row in rows], columns)
    return Path(folder) / "report.html"


def _draw_slices(found: dict[str, Any], findings: list[str]) -> bytes:
    """A line of slices for each finding, the strongest first; the patient's right on the left, the spine below."""
    voxels, _ = ingest.as_displayed(found["volume"])
    first = found["volume"].occupied[0]
    lines = []
    for finding in findings:
        chosen = np.argsort(-found["slices"][finding], kind="stable")[:_PICTURES]
        # Displayed from the head down, and counted from the feet up.
        grey = np.interp(preprocess.to_hu(voxels[::-1][first + chosen]), _HU, (0, 255)).astype(np.uint8)
        heights = ", ".join(f"{mm:.0f}" for mm in found["slice_mm"][chosen])
        lines.append((f"{finding}: {heights} mm", list(grey)))
    return plots.picture_grid(lines, ("strongest", "second", "third")[: len(found["slice_mm"])])
