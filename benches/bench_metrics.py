"""Intervals of 18 findings on a validation set the size of CT-RATE's, beside the loop over scikit-learn that they replace."""

import numpy as np
import pytest
import torch

from medvl.evaluation import metrics

VOLUMES, PATIENTS, FINDINGS, REPLICATES = 3039, 1304, 18, 1000


def _data():
    rng = np.random.default_rng(0)
    labels = rng.random((VOLUMES, FINDINGS)) < np.linspace(0.07, 0.45, FINDINGS)
    return rng.normal(size=labels.shape) + labels, labels, rng.integers(0, PATIENTS, VOLUMES)


def _auroc(scores, labels, weights):
    return {"auroc": metrics.auroc(scores, labels, weights)}


def _all(scores, labels, weights):
    ranking = _auroc(scores, labels, weights) | {"auprc": metrics.average_precision(scores, labels, weights)}
    return ranking | metrics.at_threshold(scores, labels, np.full(FINDINGS, 0.5), weights)


def bench_auroc(measure):
    scores, labels, _ = _data()
    measure(metrics.auroc, scores, labels, volumes=VOLUMES, findings=FINDINGS)


@pytest.mark.parametrize("statistics", [_auroc, _all], ids=["auroc", "all"])
def bench_bootstrap(measure, statistics):
    def run():
        return metrics.bootstrap(statistics, *_data(), n=REPLICATES, gen=torch.Generator().manual_seed(0))

    out = measure(run, rounds=3, volumes=VOLUMES, findings=FINDINGS, replicates=REPLICATES)["auroc"]
    assert (out.low < out.value).all()
    assert (out.value < out.high).all()


def bench_bootstrap_scikit_learn(measure):
    """The same AUROC intervals by drawing patients and calling roc_auc_score; 10 replicates, so times 100 for `bench_bootstrap`."""
    from sklearn.metrics import roc_auc_score

    scores, labels, patients = _data()
    rows = [np.flatnonzero(patients == p) for p in np.unique(patients)]

    def run():
        rng = np.random.default_rng(0)
        out = []
        for _ in range(10):
            drawn = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
            out.append([roc_auc_score(labels[drawn, j], scores[drawn, j]) for j in range(FINDINGS)])
        return np.quantile(out, [0.025, 0.975], axis=0)

    measure(run, rounds=3, volumes=VOLUMES, findings=FINDINGS, replicates=10)
