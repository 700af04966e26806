"""One scan for a trained run of ct_clip: its volume, embedding and findings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from medvl.base import config, files
from medvl.base.tree import Tree
from medvl.ct import dicom, metadata_table, names, preprocess, reports
from medvl.ct.preprocess import CtConfig, Volume
from medvl.systems.ct_clip.model import Model
from medvl.systems.ct_clip.record import Config
from medvl.systems.ct_clip.run import load
from medvl.systems.ct_clip.score import finding_probabilities, place_batch


def look_at_scan(
    folder: Path,
    scan: files.PathLike,
    findings: Sequence[str] = (),
    metadata_csv: files.PathLike = "",
    settings: Sequence[str] = (),
    *,
    opened: tuple[Model, Tree] | None = None,
) -> dict[str, Any]:
    """Preprocess, embed and classify one scan with a trained run.

    Args:
        findings: to tell the probability of, in words; () = those of the run.
        metadata_csv: a table with the scan's row, by `VolumeName`.
        settings: of how this scan is read, `hu=...`, `spacing_from=...` and `tilt=...`; all else must be as the
            run was trained.
        opened: from `run.load`; None = it is loaded here.
    Returns:
        {"volume": ct.Volume, "embedding" [d] float32, "probability" {finding: p}, "threshold" {finding: from
        validation, where known}}.
    """
    folder = Path(folder)
    # Everything about the scan comes first: a file that cannot be read costs no loading of weights.
    cfg = _scan_settings(config.load_record(folder / "config.json", Config).ct, settings)
    row = None
    if metadata_csv:
        name = names.volume_name(dicom.split(scan)[0])
        row = metadata_table.read_metadata(metadata_csv, [name], preprocess.metadata_columns(cfg))[name]
    volume = preprocess.preprocess_scan(scan, cfg, row)
    ct_clip, params = opened or load(folder)
    embedding = place_batch(ct_clip, params, _batch_of_one(volume))
    # Of the run's own evaluation; a run that was not evaluated has none.
    thresholds_json = folder / "results" / "thresholds.json"
    thresholds = json.loads(thresholds_json.read_text()) if thresholds_json.exists() else {}
    # Not asked for any: those that the run was scored on, which thresholds.json lists.
    findings = tuple(findings) or tuple(thresholds) or ct_clip.cfg.evaluate.findings or reports.FINDINGS
    probabilities = finding_probabilities(ct_clip, params, embedding, findings)[0].tolist()
    return {
        "volume": volume,
        "embedding": embedding[0],
        "probability": dict(zip(findings, probabilities, strict=True)),
        "threshold": {finding: thresholds[finding] for finding in findings if finding in thresholds},
    }


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


def _batch_of_one(volume: Volume) -> dict[str, Tensor]:
    """The slices of a volume that hold something, as a batch [1, s, y, x] of `model.embed_volumes`."""
    first, stop = volume.occupied
    position_mm = (np.arange(first, stop) * volume.spacing_mm[0]).astype(np.float32)
    return {
        "slices": torch.from_numpy(volume.voxels[None, first:stop]),
        "mask": torch.ones(1, stop - first, dtype=torch.bool),
        "position_mm": torch.from_numpy(position_mm)[None],
    }
