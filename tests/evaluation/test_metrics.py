"""Metrics against scikit-learn and against naive formulas; intervals against a loop that copies rows."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from medvl.evaluation import metrics

EXACT = {"rtol": 0, "atol": 1e-12}


def _data(n=300, c=5, ties=False, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random((n, c)) < np.linspace(0.1, 0.6, c)
    scores = rng.normal(size=(n, c)) + labels
    return (np.round(scores, 1) if ties else scores), labels.astype(np.int8), rng.integers(0, n // 3, n)


def _columns(f, scores, labels):
    return [f(labels[:, j], scores[:, j]) for j in range(scores.shape[1])]


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_metrics_are_scikit_learns(ties):
    scores, labels, _ = _data(ties=ties)
    np.testing.assert_allclose(
        metrics.auroc(scores, labels), _columns(sk.roc_auc_score, scores, labels), **EXACT
    )
    np.testing.assert_allclose(
        metrics.average_precision(scores, labels),
        _columns(sk.average_precision_score, scores, labels),
        **EXACT,
    )


def test_auroc_is_the_share_of_ordered_pairs():
    scores, labels, _ = _data(n=60, ties=True)
    for j, got in enumerate(metrics.auroc(scores, labels)):
        pos, neg = scores[labels[:, j] == 1, j], scores[labels[:, j] == 0, j]
        diff = pos[:, None] - neg[None]
        assert got == pytest.approx(((diff > 0) + (diff == 0) / 2).mean(), abs=1e-12)


def test_constant_scores_are_chance():
    labels = np.array([[0], [1], [1], [0], [0]])
    assert metrics.auroc(np.zeros((5, 1)), labels) == 0.5
    assert metrics.average_precision(np.zeros((5, 1)), labels) == pytest.approx(0.4)


@pytest.mark.parametrize("f", [metrics.auroc, metrics.average_precision])
def test_a_missing_class_is_nan_and_leaves_the_others(f):
    scores, labels, _ = _data(c=3)
    whole = f(scores, labels)
    labels[:, 0], labels[:, 2] = 0, 1
    got = f(scores, labels)
    assert np.isnan(got[[0, 2]]).all()
    assert got[1] == whole[1]


@pytest.mark.parametrize("ties", [False, True])
def test_whole_weights_are_repeated_rows(ties):
    scores, labels, _ = _data(n=80, ties=ties)
    weights = np.random.default_rng(1).integers(0, 4, (80, 6))
    thresholds = [0.5] * 5
    by_weight = {
        "auroc": metrics.auroc(scores, labels, weights),
        "ap": metrics.average_precision(scores, labels, weights),
    }
    by_weight |= metrics.at_threshold(scores, labels, thresholds, weights)
    for r in range(6):
        s, y = np.repeat(scores, weights[:, r], 0), np.repeat(labels, weights[:, r], 0)
        by_row = {"auroc": metrics.auroc(s, y), "ap": metrics.average_precision(s, y)} | metrics.at_threshold(
            s, y, thresholds
        )
        assert by_weight.keys() == by_row.keys()
        for name, value in by_row.items():
            np.testing.assert_allclose(by_weight[name][r], value, err_msg=name, **EXACT)


def test_threshold_metrics_are_scikit_learns():
    scores, labels, _ = _data(ties=True)
    thresholds = [0.2, 0.5, 0.5, 0.8, 1.0]
    called = (scores >= thresholds).astype(int)
    theirs = {
        "accuracy": sk.accuracy_score,
        "balanced_accuracy": sk.balanced_accuracy_score,
        "precision": sk.precision_score,
        "recall": sk.recall_score,
        "f1": sk.f1_score,
        "f1_weighted": lambda a, b: sk.f1_score(a, b, average="weighted"),
    }
    ours = metrics.at_threshold(scores, labels, thresholds)
    assert ours.keys() == theirs.keys()
    for name, f in theirs.items():
        np.testing.assert_allclose(
            ours[name], [f(labels[:, j], called[:, j]) for j in range(5)], err_msg=name, **EXACT
        )


def test_threshold_metrics_that_have_no_value_are_nan():
    scores, labels = np.array([[0.1] * 3, [0.9] * 3, [0.4] * 3]), np.array([[0, 0, 0], [0, 1, 1], [0, 1, 1]])
    out = metrics.at_threshold(scores, labels, [0.5, 2.0, np.nan])
    assert all(math.isnan(v[0]) and math.isnan(v[2]) for v in out.values())  # one class; no threshold
    assert math.isnan(out["precision"][1])  # nothing called positive
    assert (out["recall"][1], out["f1"][1], out["balanced_accuracy"][1]) == (0, 0, 0.5)


@pytest.mark.parametrize("ties", [False, True])
def test_roc_curve_is_scikit_learns(ties):
    scores, labels, _ = _data(ties=ties)
    theirs = sk.roc_curve(labels[:, 2], scores[:, 2], drop_intermediate=False)
    for ours, their in zip(metrics.roc_curve(scores[:, 2], labels[:, 2]), theirs, strict=True):
        np.testing.assert_allclose(ours, their, **EXACT)


@pytest.mark.parametrize("rule", ["youden", "f1", "corner"])
@pytest.mark.parametrize("ties", [False, True])
def test_best_thresholds_beat_every_other(rule, ties):
    scores, labels, _ = _data(n=120, ties=ties)

    def gain(thresholds):
        out = metrics.at_threshold(scores, labels, thresholds)
        specificity = 2 * out["balanced_accuracy"] - out["recall"]
        return {
            "youden": out["balanced_accuracy"],
            "f1": out["f1"],
            "corner": -np.hypot(1 - out["recall"], 1 - specificity),
        }[rule]

    best = metrics.best_thresholds(scores, labels, rule)
    tried = np.stack([gain(np.full(5, t)) for t in np.unique(scores)])
    np.testing.assert_allclose(gain(best), tried.max(0), **EXACT)
    assert not np.isin(best, scores).any()  # halfway between two scores, none sits on the edge


def test_best_threshold_edges():
    scores = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [4.0, 4.0, 0.0]])
    best = metrics.best_thresholds(scores, np.array([[0, 1, 0], [0, 1, 1], [1, 1, 0]]))
    assert best[0] == 3.0
    assert math.isnan(best[1])
    assert best[2] == 0.0  # one distinct score only: everything is called positive


def _statistics(scores, labels, weights):
    return {
        "auroc": metrics.auroc(scores, labels, weights),
        "ap": metrics.average_precision(scores, labels, weights),
    }


def test_bootstrap_is_a_loop_over_resampled_patients():
    scores, labels, groups = _data(n=150, ties=True)
    labels[:, 0] = 0
    labels[:3, 0] = 1  # a rare finding: some replicates have none
    n, k = 130, len(np.unique(groups))
    ours = metrics.bootstrap(_statistics, scores, labels, groups, n=n, gen=torch.Generator().manual_seed(3))
    gen, order, naive = torch.Generator().manual_seed(3), list(dict.fromkeys(groups.tolist())), []
    for size in (64, 64, 2):
        for draw in torch.randint(k, (size, k), generator=gen).tolist():
            rows = np.concatenate([np.flatnonzero(groups == order[g]) for g in draw])
            y, s = labels[rows], scores[rows]
            naive.append(
                [
                    sk.roc_auc_score(y[:, j], s[:, j]) if 0 < y[:, j].sum() < len(y) else np.nan
                    for j in range(5)
                ]
            )
    naive, got = np.array(naive), ours["auroc"]
    assert 0 < np.isnan(naive[:, 0]).sum() < n
    np.testing.assert_array_equal(got.undefined, np.isnan(naive).sum(0))
    np.testing.assert_allclose([got.low, got.high], np.nanquantile(naive, [0.025, 0.975], axis=0), **EXACT)
    np.testing.assert_allclose(
        [got.mean_low, got.mean_high], np.quantile(np.nanmean(naive, 1), [0.025, 0.975]), **EXACT
    )
    np.testing.assert_allclose(got.value, metrics.auroc(scores, labels), **EXACT)
    assert got.mean == pytest.approx(np.mean(got.value), abs=1e-12)
    assert got.averaged == 5


def test_bootstrap_depends_on_the_seed_alone_and_leaves_out_what_has_no_value():
    scores, labels, groups = _data()
    labels[:, 1] = 0
    a, b, c = (
        metrics.bootstrap(_statistics, scores, labels, groups, n=50, gen=torch.Generator().manual_seed(k))[
            "auroc"
        ]
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(a.low, b.low)
    assert not np.array_equal(a.low[0], c.low[0])
    assert np.isnan([a.value[1], a.low[1], a.high[1]]).all()
    assert (a.undefined[1], a.averaged) == (50, 4)
    assert a.mean == pytest.approx(np.nanmean(a.value))
    assert a.mean_low < a.mean < a.mean_high


def test_clustered_intervals_are_wider_than_those_of_rows():
    """Four copies of each row say no more than one: resampling rows halves the interval, resampling patients does not."""
    scores, labels, _ = _data(n=200, c=3)
    scores, labels, patients = np.repeat(scores, 4, 0), np.repeat(labels, 4, 0), np.repeat(np.arange(200), 4)

    def width(groups):
        out = metrics.bootstrap(
            _statistics, scores, labels, groups, n=300, gen=torch.Generator().manual_seed(0)
        )["auroc"]
        return (out.high - out.low).mean()

    assert width(patients) / width(np.arange(800)) == pytest.approx(2, rel=0.15)


def test_intervals_cover_the_truth():
    """Nominal 95 % over 120 samples of one normal shift, whose AUROC is Phi(1 / sqrt 2)."""
    truth, hits = 0.5 * (1 + math.erf(0.5)), 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        labels = np.repeat([[0], [1]], 60, 0)
        out = metrics.bootstrap(
            lambda s, y, w: {"auroc": metrics.auroc(s, y, w)},
            rng.normal(size=(120, 1)) + labels,
            labels,
            range(120),
            n=200,
            gen=torch.Generator().manual_seed(seed),
        )["auroc"]
        hits += int(out.low[0] <= truth <= out.high[0])
    assert 0.88 <= hits / 120 <= 0.99


def _naive_recall(similarity, groups_q, groups_g, k):
    hits = [
        any(groups_g[i] == g for i in np.argsort(-row)[:k])
        for row, g in zip(similarity, groups_q, strict=True)
    ]
    return sum(hits) / len(hits)


def test_recall_is_the_naive_count():
    rng = np.random.default_rng(0)
    groups_q, groups_g = [f"s{i}" for i in range(40)], [f"s{i % 40}" for i in range(90)]
    similarity = rng.normal(size=(40, 90)) + [[(a == b) * 1.0 for b in groups_g] for a in groups_q]
    got = metrics.group_recall_at(torch.tensor(similarity), groups_q, groups_g, (1, 5, 50))
    assert got == {k: _naive_recall(similarity, groups_q, groups_g, k) for k in (1, 5, 50)}
    assert got[1] < got[5] < got[50]


def test_recall_takes_any_recon_and_gives_no_credit_for_ties():
    groups = ["a", "a", "b", "b"]
    similarity = torch.tensor([[0.0, 1, 0.5, 0.2], [0, 1, 0.5, 0.2], [0, 1, 0.5, 0.2], [0, 1, 0.5, 0.2]])
    assert metrics.group_recall_at(similarity, groups, groups, (1, 2)) == {1: 0.5, 2: 1.0}
    assert metrics.group_recall_at(torch.ones(4, 4), groups, groups, (1, 2, 3)) == {1: 0, 2: 0, 3: 1}


def test_torch_of_any_precision_is_taken():
    scores, labels, _ = _data()
    s = torch.tensor(scores).bfloat16().requires_grad_()
    np.testing.assert_array_equal(
        metrics.auroc(s, torch.tensor(labels).bool()), metrics.auroc(s.detach().float().numpy(), labels)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_must_be_finite(value):
    scores, labels, _ = _data()
    scores[7, 2] = value
    with pytest.raises(ValueError, match=r"finite score, found (nan|inf) in column 2, row 7 \(1 such\)"):
        metrics.auroc(scores, labels)
    with pytest.raises(ValueError, match="in column 'C', row 7"):
        metrics.checked(scores, labels, "ABCDE")


def test_labels_must_be_zero_or_one():
    scores, labels, _ = _data()
    labels[3, 1] = -1
    with pytest.raises(ValueError, match=r"label of 0 or 1, found -1.0 in column 1, row 3"):
        metrics.average_precision(scores, labels)


def test_shapes_must_agree():
    scores, labels, groups = _data()
    gen = torch.Generator()
    with pytest.raises(ValueError, match=r"\[n, c\] .* got \(300, 5\) and \(300, 4\)"):
        metrics.auroc(scores, labels[:, :4])
    with pytest.raises(ValueError, match=r"got \(0, 5\)"):
        metrics.auroc(scores[:0], labels[:0])
    with pytest.raises(ValueError, match="2 names and 5 columns"):
        metrics.checked(scores, labels, "AB")
    with pytest.raises(ValueError, match=r"weights must be \[300, r\]"):
        metrics.auroc(scores, labels, np.ones(300))
    with pytest.raises(ValueError, match=r"thresholds must be \[5\]"):
        metrics.at_threshold(scores, labels, [0.5])
    with pytest.raises(ValueError, match="299 groups"):
        metrics.bootstrap(_statistics, scores, labels, groups[:-1], gen=gen)
    with pytest.raises(ValueError, match="1 distinct"):
        metrics.bootstrap(_statistics, scores, labels, ["p"] * 300, gen=gen)
    with pytest.raises(ValueError, match="n=0"):
        metrics.bootstrap(_statistics, scores, labels, groups, n=0, gen=gen)
    with pytest.raises(ValueError, match="rule must be"):
        metrics.best_thresholds(scores, labels, "best")  # type: ignore[arg-type]


def test_recall_refuses_what_it_cannot_count():
    similarity = np.eye(3)
    with pytest.raises(ValueError, match=r"must be \[q, g\] = \(3, 2\)"):
        metrics.group_recall_at(similarity, "abc", "ab", [1])
    with pytest.raises(ValueError, match="1 of 3 are not"):
        metrics.group_recall_at(similarity, "abc", "abb", [1])
    with pytest.raises(ValueError, match=r"within 1\.\.3"):
        metrics.group_recall_at(similarity, "abc", "abc", [4])
    with pytest.raises(ValueError, match="finite"):
        metrics.group_recall_at(similarity * np.nan, "abc", "abc", [1])
