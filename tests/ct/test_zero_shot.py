"""Zero-shot scores against the pairwise softmax, and the results of a set of scores."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medvl.ct import zero_shot
from medvl.evaluation import metrics, results


def _embeddings(gen, c=3, k=4, n=5, d=16):
    def unit(*shape):
        return F.normalize(torch.randn(*shape, d, generator=gen), dim=-1)

    return unit(n), unit(c, k), unit(c, k)


def test_zero_shot_is_the_softmax_over_each_pair(gen):
    image, positive, negative = _embeddings(gen)
    for i, p in enumerate(zero_shot.zero_shot(image, positive, negative, 14.3)):
        for j in range(3):
            pair = torch.stack([F.normalize(t[j].mean(0), dim=0) for t in (positive, negative)])
            assert p[j] == pytest.approx(float((14.3 * pair @ image[i]).softmax(0)[0]), abs=1e-6)


def test_zero_shot_keeps_order_whatever_the_scale(gen):
    image, positive, negative = _embeddings(gen, n=40, d=256)
    a, b = (
        zero_shot.zero_shot(image, positive, negative, 1.0),
        zero_shot.zero_shot(image, positive, negative, torch.tensor(100.0)),
    )
    assert b.max() > 1 - 1e-9  # float32 would call this 1
    assert torch.equal(a.argsort(0), b.argsort(0))
    assert (b - 0.5).abs().mean() > 2 * (a - 0.5).abs().mean()
    assert zero_shot.zero_shot(image, positive, positive, 5.0).eq(0.5).all()
    torch.testing.assert_close(
        zero_shot.zero_shot(image, negative, positive, 5.0),
        1 - zero_shot.zero_shot(image, positive, negative, 5.0),
    )


def test_zero_shot_refuses_what_it_cannot_score(gen):
    image, positive, negative = _embeddings(gen)
    with pytest.raises(ValueError, match=r"positive must be L2-normalised, found norms from 2 to 2"):
        zero_shot.zero_shot(image, positive * 2, negative, 1.0)
    with pytest.raises(ValueError, match="image must be L2-normalised, found norms from nan"):
        zero_shot.zero_shot(image * math.nan, positive, negative, 1.0)
    with pytest.raises(ValueError, match=r"negative must be \[c, k, d\]"):
        zero_shot.zero_shot(image, positive, negative[..., :8], 1.0)
    with pytest.raises(ValueError, match="3 positive and 2 negative"):
        zero_shot.zero_shot(image, positive, negative[:2], 1.0)
    with pytest.raises(ValueError, match="scale must be above 0"):
        zero_shot.zero_shot(image, positive, negative, 0.0)
    sign = torch.tensor([1.0, -1.0, 1.0])[:, None]
    opposed = torch.stack([positive[:, 0], sign * positive[:, 0]], 1)
    with pytest.raises(ValueError, match="finding 1 cancel out"):
        zero_shot.zero_shot(image, opposed, negative, 1.0)


def _scored(n=120, seed=0):
    rng = np.random.default_rng(seed)
    volumes = [f"valid_{i // 4}_{'ab'[i // 2 % 2]}_{i % 2 + 1}.nii.gz" for i in range(n)]
    labels = np.repeat(rng.random((n // 2, 3)) < [0.3, 0.5, 0.7], 2, 0).astype(int)
    return rng.normal(size=(n, 3)) + labels, labels, volumes, ("A", "B", "C")


def _by_key(rows):
    return {(r.what, r.subject): r for r in rows}


def test_results_are_the_metrics_with_patient_intervals():
    scores, labels, volumes, findings = _scored()
    thresholds = metrics.best_thresholds(*_scored(seed=1)[:2])
    rows = _by_key(
        zero_shot.evaluate_findings(
            scores, labels, volumes, findings, thresholds, experiment="e-1", split="test", n_bootstrap=70
        )
    )
    whats = ["auroc", "auprc", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "f1_weighted"]
    assert list(rows) == [(w, s) for w in whats for s in (*findings, "mean")]
    expected = {"auroc": metrics.auroc(scores, labels), "auprc": metrics.average_precision(scores, labels)}
    expected |= metrics.at_threshold(scores, labels, thresholds)
    for what, values in expected.items():
        assert [rows[what, f].value for f in findings] == pytest.approx(list(values), abs=1e-12)
        assert rows[what, "mean"].value == pytest.approx(values.mean(), abs=1e-12)
    patients = metrics.bootstrap(
        lambda s, y, w: {"auroc": metrics.auroc(s, y, w)},
        scores,
        labels,
        [v.split("_")[1] for v in volumes],
        n=70,
        gen=torch.Generator().manual_seed(0),
    )["auroc"]
    assert [rows["auroc", f].low for f in findings] == patients.low.tolist()
    row = rows["f1", "B"]
    assert (row.n, row.experiment, row.split) == (120, "e-1", "test")
    assert row.extra == {
        "patients": 30,
        "replicates": 70,
        "positives": labels[:, 1].sum(),
        "threshold": thresholds[1],
        "undefined": 0,
    }
    assert row.device
    assert rows["f1", "mean"].extra["findings"] == 3


def test_a_finding_with_one_class_is_nan_and_said(caplog, tmp_path):
    scores, labels, volumes, findings = _scored()
    labels[:, 1] = 0
    with caplog.at_level(logging.WARNING):
        found = zero_shot.evaluate_findings(
            scores, labels, volumes, findings, [0.5, np.nan, 0.5], experiment="e", split="val", n_bootstrap=5
        )
    rows = _by_key(found)
    assert "1 of 3 findings have one class only and no value: B" in caplog.text
    assert all(math.isnan(v) for (_, f), r in rows.items() if f == "B" for v in (r.value, r.low, r.high))
    assert rows["auroc", "mean"].value == pytest.approx(
        (rows["auroc", "A"].value + rows["auroc", "C"].value) / 2
    )
    assert (rows["auroc", "mean"].extra["findings"], rows["auroc", "B"].extra["undefined"]) == (2, 5)
    results.write_results(tmp_path / "r.jsonl", found)
    assert results.read_results(tmp_path / "r.jsonl")[1].extra["threshold"] is None


def test_without_thresholds_only_what_ranks():
    rows = zero_shot.evaluate_findings(*_scored(), experiment="e", split="val", n_bootstrap=3)
    assert {r.what for r in rows} == {"auroc", "auprc"}


def test_evaluation_refuses_what_does_not_match():
    scores, labels, volumes, findings = _scored()
    keys = {"experiment": "e", "split": "val", "n_bootstrap": 3}
    with pytest.raises(ValueError, match="119 distinct"):
        zero_shot.evaluate_findings(scores, labels, volumes[:-1] + volumes[:1], findings, **keys)
    with pytest.raises(ValueError, match="2 names and 3 columns"):
        zero_shot.evaluate_findings(scores, labels, volumes, findings[:2], **keys)
    scores[4, 2] = np.nan
    with pytest.raises(ValueError, match="in column 'C', row 4"):
        zero_shot.evaluate_findings(scores, labels, volumes, findings, **keys)
