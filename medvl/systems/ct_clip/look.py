"""One scan for a trained run of ct_clip: its volume, embedding and findings."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from medvl.base import config, files
from medvl.base.tree import Tree
from medvl.ct import chest, dicom, metadata_table, names, preprocess, reports
from medvl.ct.preprocess import CtConfig, Volume
from medvl.evaluation import calibration
from medvl.hub import tokens
from medvl.systems.ct_clip.common_space import finding_probabilities, place_batch
from medvl.systems.ct_clip.model import Model
from medvl.systems.ct_clip.record import Config
from medvl.systems.ct_clip.run import load
from medvl.systems.ct_clip.slice_effects import AVERAGE, encode_batch, slice_effects

_log = logging.getLogger("medvl")


def look_at_scan(
    folder: Path,
    scan: files.PathLike,
    findings: Sequence[str] = (),
    metadata_csv: files.PathLike = "",
    settings: Sequence[str] = (),
    *,
    opened: tuple[Model, Tree] | None = None,
    slices: bool = True,
) -> dict[str, Any]:
    """Preprocess, embed and classify one scan with a trained run.

    Args:
        findings: to tell the probability of, in words; () = those of the run.
        metadata_csv, settings: as of `read_volume`.
        opened: from `run.load`; None = it is loaded here.
        slices: also tell which slices speak for each finding.
    Returns:
        {"volume": ct.Volume, "embedding" [d] float32, "probability" {finding: zero-shot}, "threshold" {finding:
        for it, from validation, where known}, "calibration" the run's, "calibrated" and "calibrated_threshold"
        probability and threshold after it, "slices" {finding: [s], see `slice_effects`}, "slice_mm" [s] height
        above the lowest slice, "doubt" why it is no chest CT, or ""}.
    """
    folder = Path(folder)
    # The scan comes first: a file that cannot be read costs no loading of weights.
    volume, doubt = read_volume(folder, scan, metadata_csv, settings)
    ct_clip, params = opened or load(folder)
    batch = encode_batch(ct_clip, params, batch_of_one(volume))
    embedding = place_batch(ct_clip, params, batch)
    results = folder / "results"
    thresholds, fitted = _read_choices(results)
    # Not asked for any: those that the run was scored on, which thresholds.json lists.
    own_words = tuple(dict.fromkeys(findings))
    _check_length(ct_clip, own_words)
    findings = own_words or tuple(thresholds) or ct_clip.cfg.evaluate.findings or reports.FINDINGS
    probabilities = finding_probabilities(ct_clip, params, embedding, findings)[0].tolist()
    probability = dict(zip(findings, probabilities, strict=True))
    # NaN is that of a finding of which the validation split had one class only.
    threshold = {f: thresholds[f] for f in findings if math.isfinite(thresholds.get(f, math.nan))}
    effects = {}
    if slices:
        average = _read_average(results / AVERAGE, volume, batch["slices"].shape[2])
        table = slice_effects(ct_clip, params, batch, findings, average)
        effects = dict(zip(findings, table.T.numpy(), strict=True))
    return {
        "volume": volume,
        "embedding": embedding[0],
        "probability": probability,
        "threshold": threshold,
        "calibration": fitted,
        "calibrated": fitted.apply(probability),
        "calibrated_threshold": fitted.apply(threshold),
        "slices": effects,
        "slice_mm": (batch["position_mm"][0] - batch["position_mm"][0, 0]).numpy(),
        "doubt": doubt,
    }


def _check_length(ct_clip: Model, findings: Sequence[str]) -> None:
    """Raise where a finding is so long that its prompts are cut off, and with them what denies it."""
    context = ct_clip.cfg.words.tower.context
    for finding in findings:
        present, absent = reports.prompts_for(finding, ct_clip.cfg.evaluate.prompts)
        if tokens.truncated(ct_clip.tokenizer, present + absent, context):
            raise ValueError(
                f"one scan: a finding with its prompts must have {context} tokens at most, the text length of the "
                f"run; {finding[:40]!r}... has more: say it in fewer words"
            )


def _read_choices(results: Path) -> tuple[dict[str, float], calibration.Calibration]:
    """Thresholds and calibration of the run's own evaluation; none of a run that was not evaluated."""
    thresholds, fitted = {}, calibration.Calibration()
    if (results / "thresholds.json").exists():
        thresholds = json.loads((results / "thresholds.json").read_text())
    if (results / "calibration.json").exists():
        fitted = config.load_record(results / "calibration.json", calibration.Calibration)
    return thresholds, fitted


def read_volume(
    folder: Path, scan: files.PathLike, metadata_csv: files.PathLike = "", settings: Sequence[str] = ()
) -> tuple[Volume, str]:
    """(a scan preprocessed as a run was trained, why it is no chest CT or ""); a doubt is warned of, too.

    Args:
        metadata_csv: a table with the scan's row, by `VolumeName`.
        settings: of how this scan is read, `hu=...`, `spacing_from=...` and `tilt=...`; all else must be as the
            run was trained.
    """
    cfg = _scan_settings(config.load_record(folder / "config.json", Config).ct, settings)
    row = None
    if metadata_csv:
        name = names.volume_name(dicom.split(scan)[0])
        row = metadata_table.read_metadata(metadata_csv, [name], preprocess.metadata_columns(cfg))[name]
    volume = preprocess.preprocess_scan(scan, cfg, row)
    doubt = chest.doubt_chest(volume)
    if doubt:
        _log.warning("%s: %s", volume.name, doubt)
    return volume, doubt


def embed_volume(opened: tuple[Model, Tree], volume: Volume) -> Tensor:
    """The embedding [d] of a volume, float32, L2-normalised."""
    return place_batch(*opened, batch_of_one(volume))[0]


def _read_average(path: Path, volume: Volume, width: int) -> Tensor | None:
    """The run's average slices at the heights of a volume's own; None where the run has none."""
    if not path.exists():
        _log.warning(
            "%s: is not there, so slices are only left out one by one, which tells less; `invoke evaluate` makes it",
            path,
        )
        return None
    rows = files.read_array(path, (len(volume.voxels), width), "evaluate the run again")
    return torch.from_numpy(rows[slice(*volume.occupied)].astype(np.float32))


def _scan_settings(trained_with: CtConfig, settings: Sequence[str]) -> CtConfig:
    raw = config.override(config.unstructure(trained_with), tuple(settings), "one scan")
    cfg = config.structure(raw, CtConfig, "one scan")
    # How a scan is read depends on its file; the grid and the values must be those that the network knows.
    if evolve(trained_with, hu=cfg.hu, spacing_from=cfg.spacing_from, tilt=cfg.tilt) != cfg:
        raise ValueError(
            "one scan: only hu, spacing_from and tilt may differ from what the run was trained with, got "
            f"{', '.join(settings)}"
        )
    return cfg


def batch_of_one(volume: Volume) -> dict[str, Tensor]:
    """The slices of a volume that hold something, as a batch [1, s, y, x] of `model.embed_volumes`."""
    first, stop = volume.occupied
    position_mm = (np.arange(first, stop) * volume.spacing_mm[0]).astype(np.float32)
    return {
        "slices": torch.from_numpy(volume.voxels[None, first:stop]),
        "mask": torch.ones(1, stop - first, dtype=torch.bool),
        "position_mm": torch.from_numpy(position_mm)[None],
    }
