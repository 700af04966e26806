"""Zero-shot scores from embeddings, and results from scores. Dims: n volumes, c findings, k prompts, d width."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medvl.ct import names
from medvl.evaluation import metrics, results

_log = logging.getLogger(__name__)


def zero_shot(image: Tensor, positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """Probability [n, c], float64, that a volume shows a finding rather than its denial.

    p = softmax(scale * (cos+, cos-))[0] = sigmoid(scale * (cos+ - cos-)), where a finding's prompts are averaged and normalised again.
    It grows with cos+ - cos-, so ranking metrics do not depend on `scale`; thresholds and calibration do. In float32 sure cases would
    all round to 1 and tie (from a logit of 17 on; float64: 37), hence float64.

    Args:
        image: [n, d], L2-normalised.
        positive, negative: [c, k, d], L2-normalised; the numbers of prompts may differ.
        scale: the trained logit scale, exp(parameter), above 0.
    Raises:
        ValueError: shapes that do not match, embeddings that are not normalised, prompts that cancel out, or a scale not above 0.
    """
    for name, x, dims in (("image", image, 2), ("positive", positive, 3), ("negative", negative, 3)):
        if x.ndim != dims or x.shape[-1] != image.shape[-1] or not x.numel():
            want = "[n, d]" if dims == 2 else "[c, k, d]"
            raise ValueError(
                f"zero_shot: {name} must be {want} with one d, got {tuple(x.shape)} beside image {tuple(image.shape)}"
            )
        if not ((norm := x.float().norm(dim=-1)) - 1).abs().max() < 1e-2:  # bfloat16 rounds by up to 4e-3
            raise ValueError(
                f"zero_shot: {name} must be L2-normalised, found norms from {norm.min():.3g} to {norm.max():.3g}"
            )
    if len(positive) != len(negative):
        raise ValueError(
            f"zero_shot: must have both prompts for each finding, got {len(positive)} positive and {len(negative)} negative"
        )
    if not 0 < float(scale) < math.inf:
        raise ValueError(
            f"zero_shot: scale must be above 0, the exponential of the trained parameter, got {float(scale)}"
        )
    image = image.double()
    return torch.sigmoid(float(scale) * (image @ _prototype(positive).T - image @ _prototype(negative).T))


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
) -> list[results.Result]:
    """AUROC and AUPRC of every finding and of their mean, with 95 % intervals that resample patients; with thresholds also the decisions.

    Args:
        scores, labels: [n, c].
        volumes: [n] names.
        patients: [n] whose volume each is, read from CT-RATE's names when left out: a patient's scans and reconstructions are drawn
            together.
        thresholds: [c] from `metrics.best_thresholds` on the VALIDATION split; None leaves out what needs one.
    Returns:
        one Result per metric and finding, then its "mean" over the findings that have a value; `n` counts volumes, `extra` holds positives,
        patients, threshold, replicates, replicates without a value, and for the mean how many findings it averages.
    Raises:
        ValueError: as `metrics.checked` (names the finding) and `metrics.bootstrap`; names or findings of another number or twice.
    """
    s, y = metrics.checked(scores, labels, findings)
    if len(findings) != s.shape[1] or len(set(volumes)) != len(s) or len(volumes) != len(s):
        raise ValueError(
            f"evaluate_findings: must have a name for each of {s.shape[1]} findings and each of {len(s)} volumes, no volume twice, "
            f"got {len(findings)} and {len(volumes)} ({len(set(volumes))} distinct)"
        )
    single = [f for f, share in zip(findings, y.mean(0), strict=True) if share in (0, 1)]
    if single:
        _log.warning(
            "%s: %d of %d findings have one class only and no value: %s",
            split,
            len(single),
            len(findings),
            ", ".join(single),
        )
    patients = list(patients) or names.patients_of(volumes)
    if len(patients) != len(s):
        raise ValueError(
            f"evaluate_findings: must have a patient for each of {len(s)} volumes, got {len(patients)}"
        )
    gen = torch.Generator().manual_seed(seed)
    intervals = metrics.bootstrap(_statistics(thresholds), s, y, patients, n=n_bootstrap, gen=gen)
    cuts = (
        [None] * len(findings)
        if thresholds is None
        else [None if math.isnan(t) else float(t) for t in thresholds]
    )
    common: dict[str, Any] = {
        "split": split,
        "n": len(s),
        "experiment": experiment,
        "commit": results.commit(),
        "device": results.device_name(),
    }
    rows = []
    for what, x in intervals.items():
        shared: dict[str, Any] = {"patients": len(set(patients)), "replicates": n_bootstrap}
        for j, finding in enumerate(findings):
            extra: dict[str, Any] = shared | {
                "positives": int(y[:, j].sum()),
                "threshold": cuts[j],
                "undefined": int(x.undefined[j]),
            }
            value, low, high = float(x.value[j]), float(x.low[j]), float(x.high[j])
            rows.append(
                results.Result(
                    what=what, subject=finding, value=value, low=low, high=high, extra=extra, **common
                )
            )
        extra = shared | {"findings": x.averaged}
        rows.append(
            results.Result(
                what=what,
                subject="mean",
                value=x.mean,
                low=x.mean_low,
                high=x.mean_high,
                extra=extra,
                **common,
            )
        )
    return rows


def _prototype(prompts: Tensor) -> Tensor:
    """[c, k, d] -> [c, d], the normalised mean."""
    mean = prompts.double().mean(1)
    norm = mean.norm(dim=-1, keepdim=True)
    if not norm.min() > 1e-4:
        raise ValueError(
            f"zero_shot: the prompts of finding {int(norm.argmin())} cancel out, their mean has norm {float(norm.min()):.1g}"
        )
    return mean / norm


def _statistics(thresholds: Any) -> metrics.Statistics:
    def f(s, y, w):
        ranking = {"auroc": metrics.auroc(s, y, w), "auprc": metrics.average_precision(s, y, w)}
        return ranking | ({} if thresholds is None else metrics.at_threshold(s, y, thresholds, w))

    return f
