"""What a trained ct_clip says of volumes: zero-shot scores of findings, retrieval of volumes by report, and
the report of a run.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor

from medvl.base import config, files, processes, store
from medvl.base.display import track
from medvl.base.tree import Tree
from medvl.ct import ingest, names, pairs, protocols, reports, retrieval, zero_shot
from medvl.evaluation import calibration, metrics, plots, report
from medvl.evaluation.results import Result
from medvl.hub import tokens
from medvl.systems.ct_clip import data, model, slice_features
from medvl.systems.ct_clip.model import Model
from medvl.training import gradients
from medvl.training.order import prefetch

_log = logging.getLogger("medvl")
_TEXTS = 64  # texts that are embedded at a time
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


# Embeddings in the common space -----------------------------------------------------------------------------
def place_volumes(ct_clip: Model, params: Tree, volumes: store.Store, volume_names: Sequence[str]) -> Tensor:
    """Volumes in the common space of volumes and texts, [n, d] float32 on the CPU; each is encoded once.

    Processes that train together must all call it: each encodes its share, and all get the rows of all.
    """
    size = ct_clip.cfg.evaluate.batch
    starts = range(0, len(volume_names), size)
    share = list(processes.share_batches(len(starts)))
    spans = [slice(starts[number], starts[number] + size) for number, _ in share]

    def read(i: int) -> dict[str, Tensor]:
        return pairs.read_slices(volumes, volume_names[spans[i]])

    device = params["project"]["image"]["weight"].device
    rows = torch.zeros(len(volume_names), ct_clip.cfg.contrast.dim)
    batches = prefetch(read, 0, len(spans), device)
    for i, batch in track(batches, "embedding volumes, batch", total=len(spans)):
        placed = place_batch(ct_clip, params, batch)
        _, counts = share[i]
        if counts:
            rows[spans[i]] = placed
    # A row is zero in all processes but one, so that the sum is that row.
    return processes.sum_over_processes(rows)


def place_batch(ct_clip: Model, params: Tree, batch: dict[str, Tensor]) -> Tensor:
    """A batch of slices (see `model.embed_volumes`) in the common space, [b, d] float32 on the CPU."""
    with torch.no_grad(), gradients.autocast(params, ct_clip.cfg.train.precision):
        rows = model.embed_volumes(ct_clip, params, batch)
    statistics = params["running"].get("image", {})
    return model.place(params, "image", rows, statistics).detach().cpu()


def place_texts(ct_clip: Model, params: Tree, texts: Sequence[str]) -> Tensor:
    """Texts in the common space, [n, d] float32 on the CPU."""
    statistics = params["running"].get("text", {})
    rows = []
    for start in range(0, len(texts), _TEXTS):
        ids, mask = tokens.tokenize(
            ct_clip.tokenizer, texts[start : start + _TEXTS], ct_clip.cfg.words.tower.context
        )
        # The model takes k texts of each volume; here k is 1.
        batch = {"ids": ids[:, None], "words": mask[:, None]}
        with torch.no_grad(), gradients.autocast(params, ct_clip.cfg.train.precision):
            embedded = model.embed_texts(ct_clip, params, batch)[:, 0]
        rows.append(model.place(params, "text", embedded, statistics).detach().cpu())
    return torch.cat(rows)


# Scores -----------------------------------------------------------------------------------------------------
def finding_probabilities(
    ct_clip: Model, params: Tree, embeddings: Tensor, findings: Sequence[str]
) -> Tensor:
    """Zero-shot probability [n, c] of each finding for volumes in the common space [n, d]."""
    return torch.sigmoid(finding_logits(ct_clip, params, embeddings, findings))


def finding_logits(ct_clip: Model, params: Tree, embeddings: Tensor, findings: Sequence[str]) -> Tensor:
    """Zero-shot logit [n, c] of each finding for volumes in the common space [n, d], float64.

    That of a finding which the protocol merges from others is the highest of theirs.
    """
    merged = protocols.PROTOCOLS[ct_clip.cfg.evaluate.protocol]
    parts = {finding: merged.get(finding, (finding,)) for finding in findings}
    asked = list(dict.fromkeys(sum(parts.values(), ())))
    present: list[str] = []
    absent: list[str] = []
    for finding in asked:
        sentences, negations = reports.prompts_for(finding, ct_clip.cfg.evaluate.prompts)
        present += sentences
        absent += negations
    # All prompts of all findings are embedded as one list [c * k], and become [c, k, d].
    prompts_of_finding = (len(asked), -1)
    positive = place_texts(ct_clip, params, present).unflatten(0, prompts_of_finding)
    negative = place_texts(ct_clip, params, absent).unflatten(0, prompts_of_finding)
    scale = params["contrast"]["log_scale"].exp().cpu()
    logits = zero_shot.zero_shot_logits(embeddings, positive, negative, scale)
    return torch.from_numpy(protocols.merge_parts(parts, asked, logits.numpy()))


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
    # Thresholds are chosen here and applied to the test split, which must not take part in any choice.
    valid = score_split(ct_clip, params, "valid")
    test = score_split(ct_clip, params, "test")
    thresholds = metrics.best_thresholds(valid.scores, valid.labels, cfg.evaluate.rule)
    kind = cfg.evaluate.calibration
    fitted = calibration.fit_calibration(kind, valid.scores, valid.labels, valid.findings)
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
    threshold_of_finding = dict(zip(test.findings, thresholds.tolist(), strict=True))
    files.write_text(folder / "thresholds.json", json.dumps(threshold_of_finding, indent=1) + "\n")
    files.write_text(folder / "calibration.json", json.dumps(config.unstructure(fitted), indent=1) + "\n")
    average = slice_features.average_slices(
        ct_clip, params, data.open_volumes(cfg, "valid"), valid.names[:_AVERAGED]
    )
    files.write_array(folder / slice_features.AVERAGE, average.numpy().astype(np.float16))
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
    notes = [
        f"Zero-shot with the prompt set {cfg.evaluate.prompts!r}; thresholds by {cfg.evaluate.rule!r} on the "
        f"validation split ({len(valid.names)} {cfg.evaluate.level}s). Labels were not trained on; validation "
        f"labels chose checkpoint, thresholds and calibration ({kind}). Scores and thresholds are zero-shot "
        "probabilities; calibration is a rising function of them, which changes no ranking and no decision.",
        f"Protocol: {cfg.evaluate.protocol or 'all findings of the label table'}; {len(test.names)} "
        f"{cfg.evaluate.level}s, without those of {cfg.evaluate.exclude or 'no list'}.",
    ]
    if cfg.evaluate.protocol == "ctclip":
        notes.append(
            "Thresholds of the metrics called ctclip were chosen on the evaluated set, as CT-CLIP does: they are too "
            "high, and comparable with its published numbers only."
        )
    return rows, report.write_report(folder, f"{experiment}: zero-shot findings", rows, figures, notes)


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
