"""Probabilities that mean what they say: scores calibrated on the validation split, and how far probabilities
are from what is observed. Scores and labels are `[n, c]` as in `metrics`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from attrs import field, frozen

from medvl.evaluation import metrics

_log = logging.getLogger("medvl")
Array = np.ndarray
Kind = Literal["platt", "temperature", "none"]
_BINS = 10  # of the expected calibration error, of equal width


@frozen(kw_only=True)
class Calibration:
    """calibrated = sigmoid(scale * logit(score) + bias): rising, so that no ranking or decision changes.

    A finding without a line stays as it is scored.
    """

    kind: Kind = "none"
    lines: dict[str, tuple[float, float]] = field(factory=dict)  # {finding: (scale, bias)}

    def __attrs_post_init__(self) -> None:
        for finding, line in self.lines.items():
            if not (line[0] > 0 and np.isfinite(line).all()):
                raise ValueError(
                    f"calibration of {finding}: scale must be above 0 and the bias finite, got {line}"
                )

    def apply(self, of_finding: Mapping[str, float]) -> dict[str, float]:
        """{finding: a probability or a threshold of it}, calibrated."""
        row = [*of_finding.values()]
        calibrated = calibrate(self, [row], [*of_finding])[0].tolist()
        return dict(zip(of_finding, calibrated, strict=True))


def fit_calibration(kind: Kind, scores: Any, labels: Any, findings: Sequence[str]) -> Calibration:
    """A scale and a bias for each finding ("platt"), or one scale for all ("temperature").

    A finding of one class only cannot be fitted: it gets no line, and a warning names it.

    Args:
        scores: probabilities of the VALIDATION split.
    """
    s, y = metrics.checked(scores, labels, findings)
    both = [0 < share < 1 for share in y.mean(0)]
    left_out = [finding for finding, usable in zip(findings, both, strict=True) if not usable]
    if left_out and kind != "none":
        _log.warning("calibration: one class only, stays uncalibrated: %s", ", ".join(left_out))
    lines = {}
    if kind == "temperature" and any(both):
        line = fit_line(s[:, both].ravel(), y[:, both].ravel(), with_bias=False)
        lines = {finding: line for finding, usable in zip(findings, both, strict=True) if usable}
    elif kind == "platt":
        lines = {findings[j]: fit_line(s[:, j], y[:, j]) for j in np.flatnonzero(both).tolist()}
    return Calibration(kind=kind, lines=lines)


def fit_line(scores: Array, labels: Array, with_bias: bool = True) -> tuple[float, float]:
    """Scale and bias on the logits of scores [n] that make labels [n] most likely.

    Raises:
        ValueError: one class only.
    Source: Platt 1999, "Probabilistic outputs for support vector machines", with his targets, which keep
        findings that the scores separate from certainty; without a bias Guo et al. 2017, arXiv:1706.04599.
    """
    from scipy.optimize import minimize  # here: half a second to import
    from scipy.special import expit, logit

    positives, n = int(labels.sum()), len(labels)
    if positives in (0, n):
        raise ValueError(
            f"calibration: labels must have both classes, found {positives} positives of {n}; give more volumes"
        )
    target = np.where(labels, (positives + 1) / (positives + 2), 1 / (n - positives + 2))
    # Scores that were rounded to 0 or 1 have infinite logits.
    x = logit(scores.astype(float)).clip(-750, 40)

    def loss(line: Array) -> tuple[float, Array]:
        z = line[0] * x + line[1]
        error = expit(z) - target
        gradient = np.array([(error * x).mean(), error.mean()])
        return float((np.logaddexp(0, z) - target * z).mean()), gradient

    # At a scale of 0 all scores would be one, and near it the ranking would be lost to rounding.
    bounds = [(0.01, 1000), (None, None) if with_bias else (0, 0)]
    options = {"ftol": 1e-15, "gtol": 1e-10}
    found = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return float(found.x[0]), float(found.x[1])


def calibrate(calibration: Calibration, scores: Any, findings: Sequence[str]) -> Array:
    """Scores [n, c] calibrated, float64; in the same order as before within each finding."""
    from scipy.special import expit, logit

    calibrated = np.array(scores, np.float64)
    for j, finding in enumerate(findings):
        if finding in calibration.lines:
            scale, bias = calibration.lines[finding]
            calibrated[:, j] = expit(scale * logit(calibrated[:, j]) + bias)
    return calibrated


def errors(scores: Any, labels: Any, weights: Any = None) -> dict[str, Array]:
    """{"ece", "brier"}, each [c], or [r, c] with weights [n, r].

    The expected calibration error is the distance of score and share of positives over ten bins of equal
    width, weighed by how many are in them. By chance alone it is above 0, the more so in small or resampled
    sets; the Brier score, the mean squared error, is not.

    Raises:
        ValueError: as `metrics.checked`; scores that are no probabilities.
    Source: Naeini et al. 2015 ("Obtaining well calibrated probabilities using Bayesian binning"), of the
        positive class.
    """
    s, y = metrics.checked(scores, labels)
    if s.min() < 0 or s.max() > 1:
        raise ValueError(f"calibration: scores must lie in 0..1, found {s.min():g} to {s.max():g}")
    w = np.ones((len(s), 1)) if weights is None else np.asarray(weights, float)
    in_bin = np.minimum(s * _BINS, _BINS - 1).astype(int) == np.arange(_BINS)[:, None, None]  # [bin, n, c]
    gaps = np.abs(np.tensordot(in_bin * (s - y), w, (1, 0))).sum(0)  # [c, r]
    values = {"ece": gaps.T, "brier": w.T @ (s - y) ** 2}
    means = {name: value / w.sum(0)[:, None] for name, value in values.items()}
    return {name: mean[0] for name, mean in means.items()} if weights is None else means
