"""What a trained ct_clip says of volumes: zero-shot scores of findings, retrieval of volumes by report, and
the report of a run.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor

from medvl.base import config, files, store
from medvl.base.tree import Tree
from medvl.ct import ingest, names, protocols, retrieval, zero_shot
from medvl.evaluation import calibration, metrics, plots, report
from medvl.evaluation.results import Result
from medvl.systems.ct_clip import data
from medvl.systems.ct_clip.common_space import finding_probabilities, place_texts, place_volumes
from medvl.systems.ct_clip.model import Model
from medvl.systems.ct_clip.record import Config
from medvl.systems.ct_clip.slice_effects import AVERAGE, average_slices

_log = logging.getLogger("medvl")
_AVERAGED = 64  # validation volumes of which the average slices are kept
_SHOWN = 9  # volumes of the report's contact sheet


@frozen(kw_only=True, eq=False)
class SplitScores:
    """Zero-shot scores of the labelled volumes of a split."""

    names: tuple[str, ...]
    findings: tuple[str, ...]
    labels: np.ndarray = field(repr=False)  # [n, c]
    scores: np.ndarray = field(repr=False)  # [n, c], probabilities
    embeddings: Tensor = field(repr=False)  # [n, d], of the volumes


# Scores -----------------------------------------------------------------------------------------------------
def score_split(ct_clip: Model, params: Tree, split: str, volumes: store.Store | None = None) -> SplitScores:
    """Scores of a split's labelled volumes, or of their scans where `evaluate.level` says so.

    Args:
        volumes: their slice features, where these were computed before; None reads the split's store.
    """
    if volumes is None:
        volumes = data.open_volumes(ct_clip.cfg, split)
    labelled = data.label_volumes(ct_clip.cfg, split, volumes)
    embeddings = place_volumes(ct_clip, params, volumes, labelled.names)
    scores = finding_probabilities(ct_clip, params, embeddings, labelled.findings)
    result = SplitScores(
        names=labelled.names,
        findings=labelled.findings,
        labels=labelled.labels,
        scores=scores.numpy(),
        embeddings=embeddings,
    )
    return _mean_over_scans(result) if ct_clip.cfg.evaluate.level == "scan" else result


def _mean_over_scans(split: SplitScores) -> SplitScores:
    """One row for each scan, under the name of its first reconstruction, which all have its labels."""
    codes, _ = metrics.group_codes([names.scan_of(name) for name in split.names])
    _, first, sizes = np.unique(codes, return_index=True, return_counts=True)
    differing = int((split.labels != split.labels[first][codes]).any(1).sum())
    if differing:
        raise ValueError(
            "evaluate.level: reconstructions of a scan must have the same labels, "
            f"{differing} of {len(codes)} volumes have others; 'volume' scores each"
        )
    share = np.eye(len(first))[codes] / sizes  # [n, scans]
    embeddings = torch.from_numpy(share.T).float() @ split.embeddings
    return evolve(
        split,
        names=tuple(split.names[i] for i in first),
        labels=split.labels[first],
        scores=share.T @ split.scores,
        embeddings=torch.nn.functional.normalize(embeddings, dim=1),
    )


def mean_auroc(ct_clip: Model, params: Tree, volumes: store.Store) -> float:
    """The validation score of training: AUROC on the validation split, the mean over findings with both
    classes.
    """
    valid = score_split(ct_clip, params, "valid", volumes)
    return float(np.nanmean(metrics.auroc(valid.scores, valid.labels)))


# The report -------------------------------------------------------------------------------------------------
def assess(ct_clip: Model, params: Tree, folder: Path, experiment: str) -> tuple[list[Result], Path]:
    """Score the test split with thresholds from the validation split; writes results, scores, plots and the
    report into `folder`.
    """
    cfg = ct_clip.cfg
    data.check_test_set(cfg)
    # Thresholds are chosen here and applied to the test split, which must not take part in any choice.
    valid = score_split(ct_clip, params, "valid")
    test = score_split(ct_clip, params, "test")
    thresholds = metrics.best_thresholds(valid.scores, valid.labels, cfg.evaluate.rule)
    fitted = calibration.fit_calibration(cfg.evaluate.calibration, valid.scores, valid.labels, valid.findings)
    calibrated = calibration.calibrate(fitted, test.scores, test.findings)
    scored = (test.scores, test.labels, test.names, test.findings)
    options: dict[str, Any] = {
        "experiment": experiment,
        "split": "test",
        "n_bootstrap": cfg.evaluate.bootstrap,
        "seed": cfg.seed,
        "patients": data.patients_of(cfg, "test", test.names),
    }
    rows = zero_shot.evaluate_findings(*scored, thresholds, **options, calibrated=calibrated)
    if cfg.evaluate.protocol == "ctclip":
        rows += protocols.evaluate_ctclip(*scored, **options)
    rows += _retrieval(ct_clip, params, test, experiment)
    _write_scores(folder / "scores_valid.csv", valid)
    _write_scores(folder / "scores_test.csv", test)
    # What `look_at_scan` needs beside the weights.
    threshold_of_finding = dict(zip(test.findings, thresholds.tolist(), strict=True))
    files.write_text(folder / "thresholds.json", json.dumps(threshold_of_finding, indent=1) + "\n")
    files.write_text(folder / "calibration.json", json.dumps(config.unstructure(fitted), indent=1) + "\n")
    average = average_slices(ct_clip, params, data.open_volumes(cfg, "valid"), valid.names[:_AVERAGED])
    files.write_array(folder / AVERAGE, average.numpy().astype(np.float16))
    sheet = _write_sheet(ct_clip, test, folder)
    # Earlier stages have curves of their own, in their folders.
    last_stage = f"{len(cfg.train.stages) - 1}-{cfg.train.stages[-1].name}"
    figures = {
        "AUROC with 95 % intervals": plots.intervals([row for row in rows if row.what == "auroc"]),
        "ROC curves of the test split": plots.roc(test.scores, test.labels, test.findings),
        "Probabilities against what is observed, before and after calibration": plots.reliability(
            {"zero-shot": test.scores, "calibrated": calibrated}, test.labels, test.findings
        ),
        **plots.training_curves(folder.parent / last_stage / "metrics.jsonl"),
        "Middle slices of nine test volumes as the model sees them": sheet,
    }
    page = report.write_report(
        folder, f"{experiment}: zero-shot findings", rows, figures, _notes(cfg, valid, test)
    )
    return rows, page


def _notes(cfg: Config, valid: SplitScores, test: SplitScores) -> list[str]:
    left_out = f", without those of {cfg.evaluate.exclude}" if cfg.evaluate.exclude else ""
    notes = [
        f"Zero-shot with the prompt set {cfg.evaluate.prompts!r}; thresholds by {cfg.evaluate.rule!r} on the "
        f"validation split ({len(valid.names)} {cfg.evaluate.level}s). Labels were not trained on; validation "
        f"labels chose checkpoint, thresholds and calibration ({cfg.evaluate.calibration}). Scores and thresholds are zero-shot "
        "probabilities; calibration is a rising function of them, which changes no ranking and no decision.",
        f"Protocol: {cfg.evaluate.protocol or 'all findings of the label table'}; {len(test.names)} "
        f"{cfg.evaluate.level}s{left_out}.",
    ]
    if cfg.evaluate.protocol == "ctclip":
        notes.append(
            "Thresholds of the metrics called ctclip were chosen on the evaluated set, as CT-CLIP does: these metrics "
            "are too high, and comparable with its published numbers only."
        )
    return notes


def _write_scores(path: Path, split: SplitScores) -> None:
    table: list[dict[str, Any]] = []
    for name, scores in zip(split.names, split.scores.tolist(), strict=True):
        table.append({"VolumeName": name} | dict(zip(split.findings, scores, strict=True)))
    files.write_csv(path, table, ["VolumeName", *split.findings])


def _write_sheet(ct_clip: Model, test: SplitScores, folder: Path) -> bytes:
    """Write middle slices of some test volumes to volumes.png; returns the PNG."""
    path = folder / "volumes.png"
    chosen = test.names[:_SHOWN]
    # Names of volumes may say who a patient is: a report shows their row in the scores instead, unless it is
    # asked for names.
    labels = [f"row {row} of scores_test.csv" for row in range(1, len(chosen) + 1)]
    if ct_clip.cfg.evaluate.names:
        labels = list(chosen)
    ingest.contact_sheet(data.open_volumes(ct_clip.cfg, "test"), path, chosen, labels=labels)
    return path.read_bytes()


def _retrieval(ct_clip: Model, params: Tree, test: SplitScores, experiment: str) -> list[Result]:
    """Rows of `retrieval` over the test split."""
    cfg = ct_clip.cfg
    text_of_scan: dict[str, str] = {}
    path = data.data_path(cfg, "reports", "test")
    # Test sets of others may have no reports.
    if cfg.data.test and not path.exists():
        _log.warning("%s: no such file, so reports are not searched", path)
    else:
        # One query for each scan: its reconstructions share the report.
        scored = {names.scan_of(name) for name in test.names}
        pairs_of_split = data.pair_reports(cfg, "test", data.open_volumes(cfg, "test"))
        for scan, text_of_part in zip(pairs_of_split.scans, pairs_of_split.texts, strict=True):
            if scan in scored:
                text_of_scan[scan] = " ".join(text_of_part.values())
    texts = torch.empty(0)
    if text_of_scan:
        texts = place_texts(ct_clip, params, list(text_of_scan.values()))
    return retrieval.evaluate_retrieval(
        test.embeddings, test.names, test.labels, text_of_scan, texts, experiment=experiment, split="test"
    )
