"""Calibration: scikit-learn says the same, and no ranking changes."""

import json

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from medvl.base import config
from medvl.evaluation import metrics
from medvl.evaluation.calibration import Calibration, calibrate, errors, fit_calibration, fit_line

FINDINGS = ("a", "b", "c")


@pytest.fixture
def drawn():
    """Scores [400, 3] that rank well and are too sure, and labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    labels = rng.random((400, 3)) < expit(x - [0, 1, 2])
    return expit(3 * x + 1), labels


def as_logistic_regression(scores, targets):
    """LogisticRegression without penalty; a soft target is a row of each class with its weight."""
    x = np.tile(logit(scores), 2)[:, None]
    y = np.repeat([1, 0], len(scores))
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
    model.fit(x, y, sample_weight=np.r_[targets, 1 - targets])
    return model.coef_[0, 0], model.intercept_[0]


def test_a_line_is_that_of_logistic_regression(drawn):
    scores, labels = drawn
    for s, y in zip(scores.T, labels.T, strict=True):
        targets = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))
        np.testing.assert_allclose(fit_line(s, y), as_logistic_regression(s, targets), rtol=1e-5)


def test_platt_is_that_of_scikit_learn(drawn):
    """CalibratedClassifierCV(method="sigmoid") on a classifier whose decision is the logit of the score."""
    scores, labels = drawn
    x, y = logit(scores[:, :1]), labels[:, 0]
    classifier = LogisticRegression().fit(x, y)
    classifier.coef_[:], classifier.intercept_[:] = 1, 0
    theirs = CalibratedClassifierCV(FrozenEstimator(classifier), method="sigmoid").fit(x, y)
    ours = calibrate(fit_calibration("platt", scores, labels, FINDINGS), scores, FINDINGS)
    np.testing.assert_allclose(ours[:, 0], theirs.predict_proba(x)[:, 1], atol=1e-4)


def test_one_temperature_is_the_best_of_all(drawn):
    scores, labels = drawn
    fitted = fit_calibration("temperature", scores, labels, FINDINGS)
    assert len(set(fitted.lines.values())) == 1
    (scale, bias), _, _ = fitted.lines.values()
    assert bias == 0
    n, k = labels.size, labels.sum()
    targets = np.where(labels, (k + 1) / (k + 2), 1 / (n - k + 2))

    def loss(t):
        return -(
            targets * np.log(expit(t * logit(scores))) + (1 - targets) * np.log(expit(-t * logit(scores)))
        ).mean()

    assert loss(scale) < min(loss(scale - 1e-3), loss(scale + 1e-3))


@pytest.mark.parametrize("kind", ["platt", "temperature"])
def test_no_ranking_changes(kind, drawn):
    scores, labels = drawn
    # Scores near 0 and 1, ties among them, and a finding that the scores separate without an error.
    scores[:20, 0] = np.repeat(expit(np.linspace(20, 36, 10)), 2)
    scores[20:40, 0] = expit(np.linspace(-600, -30, 20))
    labels[:, 2] = scores[:, 2] > 0.6
    fitted = fit_calibration(kind, scores, labels, FINDINGS)
    after = calibrate(fitted, scores, FINDINGS)
    for metric in (metrics.auroc, metrics.average_precision):
        assert metric(scores, labels).tolist() == metric(after, labels).tolist()
    for before, now in zip(scores.T, after.T, strict=True):
        order = np.argsort(before, kind="stable")
        assert order.tolist() == np.argsort(now, kind="stable").tolist()
        # No two scores became one.
        assert len(np.unique(before)) == len(np.unique(now))
    # Nor does a decision: thresholds go through the same function.
    thresholds = metrics.best_thresholds(scores, labels)
    moved = calibrate(fitted, thresholds[None], FINDINGS)[0]
    assert ((scores >= thresholds) == (after >= moved)).all()


def test_scores_that_rank_the_wrong_way_round_keep_their_order(drawn):
    scores, labels = drawn
    (scale, _), *_ = fit_calibration("platt", 1 - scores, labels, FINDINGS).lines.values()
    assert scale == 0.01


def test_errors_are_those_of_a_loop_and_smaller_after(drawn):
    scores, labels = drawn
    found = errors(scores, labels)
    for j in range(3):
        gap = 0.0
        for low in np.arange(10) / 10:
            chosen = (scores[:, j] >= low) & ((scores[:, j] < low + 0.1) | (low == 0.9))
            if chosen.any():
                gap += chosen.mean() * abs(scores[chosen, j].mean() - labels[chosen, j].mean())
        assert found["ece"][j] == pytest.approx(gap, abs=1e-9)
        assert found["brier"][j] == pytest.approx(brier_score_loss(labels[:, j], scores[:, j]))
    after = errors(calibrate(fit_calibration("platt", scores, labels, FINDINGS), scores, FINDINGS), labels)
    assert (after["ece"] < found["ece"]).all()
    assert (after["brier"] < found["brier"]).all()


def test_weights_are_copies_of_rows(drawn):
    scores, labels = drawn
    rows = torch.randint(400, (2, 400)).numpy()
    weights = np.stack([np.bincount(r, minlength=400) for r in rows], 1)
    found = errors(scores, labels, weights)
    for i, r in enumerate(rows):
        for name, value in errors(scores[r], labels[r]).items():
            np.testing.assert_allclose(found[name][i], value)


def test_a_finding_of_one_class_stays_as_it_is_and_is_named(drawn, caplog):
    scores, labels = drawn
    labels[:, 1] = False
    fitted = fit_calibration("platt", scores, labels, FINDINGS)
    assert list(fitted.lines) == ["a", "c"]
    assert "one class only, stays uncalibrated: b" in caplog.text
    assert (calibrate(fitted, scores, FINDINGS)[:, 1] == scores[:, 1]).all()
    with pytest.raises(ValueError, match="must have both classes, found 0 positives of 400"):
        fit_line(scores[:, 1], labels[:, 1])


def test_none_changes_nothing(drawn):
    scores, labels = drawn
    fitted = fit_calibration("none", scores, labels, FINDINGS)
    assert (calibrate(fitted, scores, FINDINGS) == scores).all()


def test_a_file_is_read_strictly(drawn, tmp_path):
    fitted = fit_calibration("platt", *drawn, FINDINGS)
    path = tmp_path / "calibration.json"
    plain = config.unstructure(fitted)
    path.write_text(json.dumps(plain))
    assert config.load_record(path, Calibration) == fitted
    for change in ({"lines": {"a": [0.0, 1.0]}}, {"lines": {"a": [1.0]}}, {"kind": "isotonic"}, {"more": 1}):
        path.write_text(json.dumps(plain | change))
        with pytest.raises(config.ConfigError):
            config.load_record(path, Calibration)


def test_scores_that_are_no_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"scores must lie in 0..1, found -1 to 2"):
        errors([[-1.0], [2.0]], [[0], [1]])
