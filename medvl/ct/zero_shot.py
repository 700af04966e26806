"""Zero-shot scores from embeddings, and results from scores.

Dims: n volumes, c findings, k prompts, d width.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medvl.ct import names
from medvl.evaluation import calibration, metrics, results

_log = logging.getLogger(__name__)


def zero_shot(image: Tensor, positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """Probability [n, c], float64, that a volume shows a finding rather than its denial.

    p = softmax(scale * (cos+, cos-))[0] = sigmoid(scale * (cos+ - cos-)), where a finding's prompts are
    averaged and normalised again. It grows with cos+ - cos-, so ranking metrics do not depend on `scale`;
    thresholds and calibration do. It is float64 because in float32 all sure cases would round to 1 and tie
    (from a logit of 17 on; float64: 37).

    Arguments and errors as `zero_shot_logits`.
    """
    return torch.sigmoid(zero_shot_logits(image, positive, negative, scale))


def zero_shot_logits(image: Tensor, positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """The logits [n, c], float64, of `zero_shot`, which no sure case is too sure for.

    Args:
        image: [n, d], L2-normalised.
        positive, negative: [c, k, d], L2-normalised; the numbers of prompts may differ.
        scale: the trained logit scale, exp(parameter), above 0.
    Raises:
        ValueError: shapes that do not match, embeddings that are not normalised, prompts that cancel out, or
            a scale not above 0.
    """
    for name, x, shape in (
        ("image", image, "[n, d]"),
        ("positive", positive, "[c, k, d]"),
        ("negative", negative, "[c, k, d]"),
    ):
        if x.ndim != len(shape.split(",")) or x.shape[-1] != image.shape[-1] or not x.numel():
            raise ValueError(
                f"zero_shot: {name} must be {shape} with one d, got {tuple(x.shape)} beside image "
                f"{tuple(image.shape)}"
            )
        norm = x.float().norm(dim=-1)
        if not (norm - 1).abs().max() < 1e-2:  # bfloat16 rounds by up to 4e-3
            raise ValueError(
                f"zero_shot: {name} must be L2-normalised, found norms from {norm.min():.3g} to "
                f"{norm.max():.3g}"
            )
    if len(positive) != len(negative):
        raise ValueError(
            f"zero_shot: must have both prompts for each finding, got {len(positive)} positive and "
            f"{len(negative)} negative"
        )
    if not 0 < float(scale) < math.inf:
        raise ValueError(
            f"zero_shot: scale must be above 0, the exponential of the trained parameter, got {float(scale)}"
        )
    image = image.double()
    difference = image @ _prototype(positive).T - image @ _prototype(negative).T
    return float(scale) * difference


def evaluate_findings(
    scores: Any,
    labels: Any,
    volumes: Sequence[str],
    findings: Sequence[str],
    thresholds: Any = None,
    *,
    experiment: str,
    split: str,
    n_bootstrap: int = 1000,
    seed: int = 0,
    patients: Sequence[str] = (),
    calibrated: Any = None,
) -> list[results.Result]:
    """AUROC and AUPRC of every finding and of their mean; with thresholds also the metrics of decisions.

    All come with 95 % intervals that resample patients.

    Args:
        scores, labels: [n, c].
        volumes: [n] names.
        thresholds: [c] from `metrics.best_thresholds` on the VALIDATION split; None leaves out what needs
            one.
        patients: [n] the patient of each volume, read from CT-RATE's names when left out: a patient's scans
            and reconstructions are resampled together.
        calibrated: the scores after `calibration.calibrate`, to tell the errors of both as probabilities.
    Returns:
        one Result per metric and finding, then its "mean" over the findings that have a value. `n` counts
        volumes; `extra` holds positives, patients, threshold, replicates, replicates without a value, and for
        the mean how many findings it averages.
    Raises:
        ValueError: as `metrics.checked` (names the finding) and `metrics.bootstrap`; names or findings of
            another number or twice.
    """
    s, y = metrics.checked(scores, labels, findings)
    if len(findings) != s.shape[1] or len(set(volumes)) != len(s) or len(volumes) != len(s):
        raise ValueError(
            f"evaluate_findings: must have a name for each of {s.shape[1]} findings and each of {len(s)} "
            f"volumes, no volume twice, got {len(findings)} and {len(volumes)} ({len(set(volumes))} distinct)"
        )
    _warn_of_one_class(y, findings, split)
    patients = list(patients) or names.patients_of(volumes)
    if len(patients) != len(s):
        raise ValueError(
            f"evaluate_findings: must have a patient for each of {len(s)} volumes, got {len(patients)}"
        )
    # Patients and not volumes are resampled: those of one patient are alike.
    gen = torch.Generator().manual_seed(seed)
    intervals = metrics.bootstrap(
        _statistics(thresholds, s, calibrated), s, y, patients, n=n_bootstrap, gen=gen
    )
    cuts: list[float | None] = [None] * len(findings)
    if thresholds is not None:
        cuts = [None if math.isnan(t) else float(t) for t in thresholds]  # JSON has no NaN
    common: dict[str, Any] = {
        "split": split,
        "n": len(s),
        "experiment": experiment,
        "commit": results.commit(),
        "device": results.device_name(),
    }
    shared: dict[str, Any] = {"patients": len(set(patients)), "replicates": n_bootstrap}
    return _result_rows(intervals, y, findings, cuts, shared, common)


def _warn_of_one_class(labels: Any, findings: Sequence[str], split: str) -> None:
    """Ranking needs both classes: a finding of one class has no value, and the mean leaves it out."""
    prevalence = labels.mean(0)
    one_class = [f for f, share in zip(findings, prevalence, strict=True) if share in (0, 1)]
    if one_class:
        _log.warning(
            "%s: %d of %d findings have one class only and no value: %s",
            split,
            len(one_class),
            len(findings),
            ", ".join(one_class),
        )


def _result_rows(
    intervals: Mapping[str, Any],
    labels: Any,
    findings: Sequence[str],
    cuts: Sequence[float | None],
    shared: dict[str, Any],
    common: dict[str, Any],
) -> list[results.Result]:
    """Rows of each metric: one per finding, then their mean. `shared` goes into `extra`, `common` beside it."""
    rows = []
    for metric, x in intervals.items():
        for j, finding in enumerate(findings):
            value, low, high = float(x.value[j]), float(x.low[j]), float(x.high[j])
            extra: dict[str, Any] = shared | {
                "positives": int(labels[:, j].sum()),
                "threshold": cuts[j],
                "undefined": int(x.undefined[j]),
            }
            row: dict[str, Any] = {
                "subject": finding,
                "value": value,
                "low": low,
                "high": high,
                "extra": extra,
            }
            rows.append(results.Result(what=metric, **row, **common))
        extra = shared | {"findings": x.averaged}
        row = {"subject": "mean", "value": x.mean, "low": x.mean_low, "high": x.mean_high, "extra": extra}
        rows.append(results.Result(what=metric, **row, **common))
    return rows


def _prototype(prompts: Tensor) -> Tensor:
    """The normalised mean [c, d] of the prompts [c, k, d] of each finding."""
    # Embeddings are averaged before the comparison, as in CLIP's ensembles, not probabilities after it.
    mean = prompts.double().mean(1)
    norm = mean.norm(dim=-1, keepdim=True)
    # Of opposite prompts nothing but rounding is left, which has a direction, too. `not >` also refuses NaN.
    if not norm.min() > 1e-4:
        raise ValueError(
            f"zero_shot: the prompts of finding {int(norm.argmin())} cancel out, their mean has norm "
            f"{float(norm.min()):.1g}"
        )
    return mean / norm


def _statistics(thresholds: Any, uncalibrated: Any, calibrated: Any) -> metrics.Statistics:
    """What the bootstrap computes on each weighting of the patients."""

    def statistics(scores, labels, weights):
        values = {
            "auroc": metrics.auroc(scores, labels, weights),
            "auprc": metrics.average_precision(scores, labels, weights),
        }
        if thresholds is not None:
            values |= metrics.at_threshold(scores, labels, thresholds, weights)
        if calibrated is not None:
            for kind, probabilities in (("zero_shot", uncalibrated), ("calibrated", calibrated)):
                errors = calibration.errors(probabilities, labels, weights)
                values |= {f"{name}_{kind}": value for name, value in errors.items()}
        return values

    return statistics
