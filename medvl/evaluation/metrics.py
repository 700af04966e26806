"""How good scores are: ranking and threshold metrics per finding, intervals that resample whole patients,
retrieval.

Scores and labels are `[n, c]`: n volumes, c findings. Each metric also takes `weights` `[n, r]` and then
gives `[r, c]`: r columns of weights are r samples at once, a bootstrap replicate being whole-number weights.
Without weights it gives `[c]`. All arithmetic is float64.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from attrs import frozen

from medvl.base.display import track

Array = np.ndarray
Statistics = Callable[[Array, Array, Array | None], dict[str, Array]]
Rule = Literal["youden", "f1", "corner"]

# Bootstrap replicates per pass: [n, 64] float64 stays near the cache, and memory does not grow with the
# number of replicates.
_REPLICATES = 64


@frozen(kw_only=True)
class Intervals:
    """A statistic of c findings and of their mean, with percentile bootstrap bounds.

    `undefined` counts the replicates in which a finding had no value (one class only); they are left out of
    its bounds. The mean is over the `averaged` findings that have a value in the full sample, within each
    replicate over those of them defined there.
    """

    value: Array  # [c]
    low: Array  # [c]
    high: Array  # [c]
    undefined: Array  # [c] int
    mean: float
    mean_low: float
    mean_high: float
    averaged: int


def checked(scores: Any, labels: Any, findings: Sequence[str] = ()) -> tuple[Array, Array]:
    """Scores as float64 and labels as bool, both [n, c].

    Raises:
        ValueError: not two dimensions, unequal shapes, no rows, a score not finite or a label not 0 or 1
            (names the column).
    """
    s = _array(scores)
    y = _array(labels)
    if s.ndim != 2 or s.shape != y.shape or not s.size:
        raise ValueError(
            f"metrics: scores and labels must both be [n, c] with n and c above 0, got {s.shape} and "
            f"{y.shape}"
        )
    if findings and len(findings) != s.shape[1]:
        raise ValueError(
            f"metrics: must have one name per column, got {len(findings)} names and {s.shape[1]} columns"
        )
    _check_values("finite score", s, ~np.isfinite(s), findings)
    _check_values("label of 0 or 1", y, (y != 0) & (y != 1), findings)
    return s, y.astype(bool)


def auroc(scores: Any, labels: Any, weights: Any = None) -> Array:
    """Area under the ROC curve, [c], or [r, c] with weights [n, r]; a tie counts one half; nan where one
    class is missing.

    Source: the Mann-Whitney form, Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747.
    """
    return _per_finding(_auroc, scores, labels, weights)


def average_precision(scores: Any, labels: Any, weights: Any = None) -> Array:
    """Area under the precision-recall curve: the sum of precision times step in recall, without
    interpolation, tied scores being one step.

    [c], or [r, c] with weights [n, r]; nan where one class is missing. Its chance level is the prevalence.
    """
    return _per_finding(_average_precision, scores, labels, weights)


def at_threshold(scores: Any, labels: Any, thresholds: Any, weights: Any = None) -> dict[str, Array]:
    """Metrics of the decision `score >= threshold` per finding: each [c], or [r, c] with weights [n, r].

    Args:
        thresholds: [c], chosen on other data than these; nan gives nan.
    Returns:
        accuracy; balanced_accuracy (mean of recall and specificity); precision, recall and f1 of the
        positive class; f1_weighted (the F1 of both classes weighted by their share, often published as plain
        "F1"). All nan where one class is missing; precision also where nothing was called positive.
    """
    s, y = checked(scores, labels)
    t = _array(thresholds)
    w = _weights(weights, len(s))
    if t.shape != (s.shape[1],):
        raise ValueError(f"at_threshold: thresholds must be [{s.shape[1]}], one per finding, got {t.shape}")
    # The confusion matrix of every finding in every replicate, each part [r, c]. One matrix product counts
    # all three indicators at once; the other parts follow from the totals.
    called = s >= t
    true_positive = called & y
    false_positive = called & ~y
    indicators = np.hstack([true_positive, false_positive, y]).astype(float)  # [n, 3 c]
    sums = w.T @ indicators  # [r, 3 c]
    tp, fp, pos = np.split(sums, 3, axis=1)
    total = w.sum(0)[:, None]  # [r, 1]
    neg = total - pos
    fn = pos - tp
    tn = neg - fp
    recall = ratio(tp, pos)
    specificity = ratio(tn, neg)
    f1_positive = ratio(2 * tp, 2 * tp + fp + fn)
    f1_negative = ratio(2 * tn, 2 * tn + fp + fn)
    f1_sum = pos * f1_positive + neg * f1_negative
    values = {
        "accuracy": ratio(tp + tn, total),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": ratio(tp, tp + fp),
        "recall": recall,
        "f1": f1_positive,
        "f1_weighted": ratio(f1_sum, total),
    }
    # A replicate without one of the classes has no value: accuracy alone would still give one, and the
    # metrics would then be means over different replicates.
    defined = (pos > 0) & (neg > 0) & ~np.isnan(t)
    for name, value in values.items():
        values[name] = np.where(defined, value, np.nan)
    if weights is None:  # without weights there is one row, of ones
        return {name: value[0] for name, value in values.items()}
    return values


def roc_curve(scores: Any, labels: Any) -> tuple[Array, Array, Array]:
    """(false positive rate, true positive rate, threshold) of one finding from scores and labels [n]; starts
    at (0, 0, inf).
    """
    # As a table of one finding.
    s, y = checked(_array(scores)[:, None], _array(labels)[:, None])
    thresholds, tp, fp = _steps(s[:, 0], y[:, 0])
    # With the lowest threshold everything is called positive, so the last counts are the totals.
    fpr = ratio(fp, fp[-1:])
    tpr = ratio(tp, tp[-1:])
    # The curve starts where nothing is called positive.
    fpr = np.r_[0.0, fpr]
    tpr = np.r_[0.0, tpr]
    thresholds = np.r_[np.inf, thresholds]
    return fpr, tpr, thresholds


def best_thresholds(scores: Any, labels: Any, rule: Rule = "youden") -> Array:
    """The threshold [c] of each finding that a rule likes best. Choose it on the validation split only,
    never on the data it is judged on.

    Args:
        rule: "youden" maximises recall + specificity - 1, "f1" the F1 of the positive class, "corner"
            minimises the distance of the ROC curve to (0, 1).
    Returns:
        halfway between the lowest score called positive and the next lower one; of equally good thresholds
        the highest; nan where one class is missing.
    """
    if rule not in ("youden", "f1", "corner"):
        raise ValueError(f"best_thresholds: rule must be 'youden', 'f1' or 'corner', got {rule!r}")
    s, y = checked(scores, labels)
    thresholds = []
    for finding_scores, finding_labels in zip(s.T, y.T, strict=True):
        thresholds.append(_best(finding_scores, finding_labels, rule))
    return np.array(thresholds)


def bootstrap(
    statistics: Statistics,
    scores: Any,
    labels: Any,
    groups: Sequence[Any],
    *,
    n: int = 1000,
    level: float = 0.95,
    gen: torch.Generator,
) -> dict[str, Intervals]:
    """Percentile intervals of statistics, resampling groups (patients) with replacement, each with all its
    rows.

    Args:
        statistics: `f(scores, labels, weights) -> {name: [c], or [r, c] with weights [n, r]}`, such as
            `lambda s, y, w: {"auroc": auroc(s, y, w)}`; all of them see the same replicates.
        groups: the group of each row, [n].
    Raises:
        ValueError: as `checked`; groups of another length, fewer than two groups, n below 1, level not
            between 0 and 1.
    """
    s, y = checked(scores, labels)
    rows, k = group_codes(groups)
    if len(rows) != len(s) or k < 2:
        raise ValueError(
            f"bootstrap: needs one group per row and two groups or more, got {len(rows)} groups ({k} "
            f"distinct), {len(s)} rows"
        )
    if n < 1 or not 0 < level < 1:
        raise ValueError(
            f"bootstrap: n must be 1 or more and level between 0 and 1, got n={n}, level={level}"
        )
    point = statistics(s, y, None)
    # A replicate is not a copy of the rows but a weight for each: all rows of a patient get the number of
    # times that the patient was drawn.
    blocks = []
    for start in track(range(0, n, _REPLICATES), "drawing replicates"):
        block_size = min(_REPLICATES, n - start)
        draws = torch.randint(k, (block_size, k), generator=gen).numpy()
        counts = [np.bincount(d, minlength=k) for d in draws]
        weights = np.stack(counts, 1).astype(np.float64)  # [k, r]: how often each group was drawn
        blocks.append(statistics(s, y, weights[rows]))
    intervals = {}
    for name, value in point.items():
        replicates = np.concatenate([part[name] for part in blocks])
        intervals[name] = _intervals(value, replicates, (1 - level) / 2)
    return intervals


def group_recall_at(
    similarity: Any, groups_q: Sequence[Any], groups_g: Sequence[Any], ks: Sequence[int]
) -> dict[int, float]:
    """Share of queries with a gallery row of their own group among the k most similar, e.g. any
    reconstruction of the query's scan.

    Args:
        similarity: [q, g]; where a wrong row ties with the best right one, the wrong row counts as first.
    Raises:
        ValueError: other shapes, similarities that are not finite, k not in 1..g, or a query whose group is
            not in the gallery.
    """
    sim = _array(similarity)
    q = len(groups_q)
    g = len(groups_g)
    if sim.ndim != 2 or sim.shape != (q, g) or not sim.size:
        raise ValueError(f"group_recall_at: similarity must be [q, g] = {(q, g)}, got {sim.shape}")
    if not np.isfinite(sim).all() or not ks or min(ks) < 1 or max(ks) > g:
        raise ValueError(
            f"group_recall_at: similarity must be finite and every k within 1..{g}, got k={list(ks)}"
        )
    # Queries and gallery are numbered together, so that one group has the same code in both.
    codes, _ = group_codes([*groups_q, *groups_g])
    query_codes = codes[:q]
    gallery_codes = codes[q:]
    same = query_codes[:, None] == gallery_codes[None, :]  # [q, g]
    lost = int((~same.any(1)).sum())
    if lost:
        raise ValueError(
            f"group_recall_at: every query's group must be in the gallery, {lost} of {q} are not"
        )
    best = np.where(same, sim, -np.inf).max(1, keepdims=True)  # [q, 1], of the right rows
    wrong_first = ~same & (sim >= best)
    ahead = wrong_first.sum(1)  # [q], wrong rows before the first right one
    recalls = {}
    for k in ks:
        is_recalled = ahead < k
        recalls[int(k)] = float(is_recalled.mean())
    return recalls


def _check_values(expected: str, table: Array, bad: Array, findings: Sequence[str]) -> None:
    """Raise where a value [n, c] is bad; names the first column with such, and its first row."""
    if not bad.any():
        return
    # Transposed: `argwhere` goes row by row, and the first column is wanted.
    column, row = np.argwhere(bad.T)[0].tolist()
    name = repr(findings[column]) if findings else str(column)
    number = bad[:, column].sum()
    raise ValueError(
        f"metrics: every value must be a {expected}, found {table[row, column]} in column {name}, "
        f"row {row} ({number} such)"
    )


def _array(x: Any) -> Array:
    """Any array or tensor as float64 on the CPU."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", torch.float64).numpy()  # numpy has no bfloat16, so torch converts
    return np.asarray(x, dtype=np.float64)


def _weights(weights: Any, n: int) -> Array:
    """Weights [n, r]; without any, one column in which every row counts once."""
    if weights is None:
        return np.ones((n, 1))
    w = _array(weights)
    is_valid = np.isfinite(w) & (w >= 0)
    if w.ndim != 2 or len(w) != n or not is_valid.all():
        raise ValueError(f"metrics: weights must be [{n}, r], finite and 0 or more, got {w.shape}")
    return w


def _per_finding(f: Callable[[Array, Array, Array], Array], scores: Any, labels: Any, weights: Any) -> Array:
    """`f(scores [n], labels [n], weights [n, r]) -> [r]` for every finding: [c], or [r, c] with weights."""
    s, y = checked(scores, labels)
    w = _weights(weights, len(s))
    columns = []
    for finding_scores, finding_labels in zip(s.T, y.T, strict=True):
        columns.append(f(finding_scores, finding_labels, w))
    values = np.stack(columns, -1)  # [r, c]
    if weights is None:  # there is one row then, of weights that are all 1
        return values[0]
    return values


def _auroc(s: Array, y: Array, w: Array) -> Array:
    """Weight of (positive above negative) pairs over that of all pairs: one cumulative sum over the sorted
    negatives.
    """
    pos = _sorted(s, y)
    neg = _sorted(s, ~y)
    pos_scores = s[pos]
    neg_scores = s[neg]
    below = _cumulative(w[neg])  # [number of negatives + 1, r]
    # For each positive: how many negatives score lower, and how many lower or the same.
    low = np.searchsorted(neg_scores, pos_scores, "left")
    high = np.searchsorted(neg_scores, pos_scores, "right")
    wins = below[low]
    if (low != high).any():  # without ties the second lookup is spared
        wins = (wins + below[high]) / 2
    pairs_won = np.einsum("kr,kr->r", w[pos], wins)
    all_pairs = w[pos].sum(0) * below[-1]
    return ratio(pairs_won, all_pairs)


def _average_precision(s: Array, y: Array, w: Array) -> Array:
    """Mean over positives of the precision among all that score at least as high."""
    pos = _sorted(s, y)
    neg = _sorted(s, ~y)
    pos_scores = s[pos]
    neg_scores = s[neg]
    pos_weight = _cumulative(w[pos])  # [number of positives + 1, r]
    neg_weight = _cumulative(w[neg])
    # At the score of each positive, all rows from there up are called positive; "left" takes ties along.
    pos_below = np.searchsorted(pos_scores, pos_scores, "left")
    neg_below = np.searchsorted(neg_scores, pos_scores, "left")
    tp = pos_weight[-1] - pos_weight[pos_below]  # [number of positives, r]
    fp = neg_weight[-1] - neg_weight[neg_below]
    # Where both are 0 the positive has no weight either, so any finite number will do for its precision.
    called = np.maximum(tp + fp, np.finfo(float).tiny)
    precision = tp / called
    precision_sum = np.einsum("kr,kr->r", w[pos], precision)
    mean_precision = ratio(precision_sum, pos_weight[-1])
    # Without a negative the precision is 1 whatever the scores are: no value rather than a perfect one.
    return np.where(neg_weight[-1] > 0, mean_precision, np.nan)


def _sorted(s: Array, keep: Array) -> Array:
    """The numbers of the rows to keep, in rising order of their scores."""
    rows = np.flatnonzero(keep)
    order = np.argsort(s[rows])
    return rows[order]


def _cumulative(w: Array) -> Array:
    """[n, r] -> [n + 1, r], sums of the first 0 to n rows. In blocks: numpy's cumsum along this axis takes
    five times as long.
    """
    n, r = w.shape
    # About sqrt(n) blocks of sqrt(n) rows: both loops below are then short.
    size = math.isqrt(n) + 1
    num_blocks = n // size + 1
    padded = np.zeros((1 + size * num_blocks, r))  # row 0 is the sum of no rows
    padded[1 : n + 1] = w
    blocks = padded[1:].reshape(-1, size, r)  # a view: the sums are written into `padded`
    # First within all blocks at once, then each block gets the total of those before it.
    for i in range(1, size):
        blocks[:, i] += blocks[:, i - 1]
    totals = blocks[:, -1]  # [number of blocks, r]
    blocks[1:] += np.cumsum(totals[:-1], 0)[:, None]
    return padded[: n + 1]


def ratio(a: Array, b: Array) -> Array:
    """a / b, nan where b is not above 0."""
    a, b = np.broadcast_arrays(a, b)
    quotient = np.full(a.shape, np.nan)
    # `where` skips the division instead of mending its result, so numpy has nothing to warn of.
    np.divide(a, b, out=quotient, where=b > 0)
    return quotient


def _steps(s: Array, y: Array) -> tuple[Array, Array, Array]:
    """Distinct scores from the highest down, and the true and false positives when calling positive from
    there up.
    """
    order = np.argsort(-s, kind="stable")
    falling = s[order]
    # A threshold cannot cut between equal scores: only the last row of each run of them is a step.
    changes = np.flatnonzero(np.diff(falling))
    last = np.r_[changes, len(s) - 1]
    positives = np.cumsum(y[order])
    tp = positives[last]
    fp = last + 1 - tp
    return falling[last], tp.astype(float), fp.astype(float)


def _best(s: Array, y: Array, rule: Rule) -> float:
    """The best threshold of one finding, from its scores and labels [n]."""
    if y.all() or not y.any():
        return float("nan")
    thresholds, tp, fp = _steps(s, y)
    tpr = tp / tp[-1]
    fpr = fp / fp[-1]
    if rule == "youden":
        gain = tpr - fpr
    elif rule == "f1":
        gain = 2 * tp / (tp + fp + tp[-1])
    else:
        gain = -np.hypot(1 - tpr, fpr)
    i = int(np.argmax(gain))  # the first of equals: the highest threshold
    if i + 1 == len(thresholds):
        return float(thresholds[i])
    # Halfway to the next lower score, so that new scores near the limit fall on the nearer side. Between
    # neighbouring floats the middle rounds to the lower one, which would call that score positive too.
    middle = (thresholds[i] + thresholds[i + 1]) / 2
    if middle > thresholds[i + 1]:
        return float(middle)
    return float(thresholds[i])


def _intervals(value: Array, replicates: Array, tail: float) -> Intervals:
    """Intervals from the value [c] of the sample and those [r, c] of its replicates.

    Args:
        tail: share of the replicates beyond each bound.
    """
    defined = ~np.isnan(value)
    bounds = [_bounds(column, tail) for column in replicates.T]
    low, high = np.array(bounds).T
    # The mean is taken within each replicate, so its interval knows how the findings vary together.
    means = _nanmean(replicates[:, defined])  # [r]
    mean_low, mean_high = _bounds(means, tail)
    (mean,) = _nanmean(value[None, defined])
    return Intervals(
        value=value,
        low=np.where(defined, low, np.nan),
        high=np.where(defined, high, np.nan),
        undefined=np.isnan(replicates).sum(0),
        mean=float(mean),
        mean_low=mean_low,
        mean_high=mean_high,
        averaged=int(defined.sum()),
    )


def _bounds(replicates: Array, tail: float) -> tuple[float, float]:
    """The two quantiles of those replicates that have a value."""
    defined = replicates[~np.isnan(replicates)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def _nanmean(x: Array) -> Array:
    """[r, c] -> [r]. Unlike numpy's it does not warn where a row holds only nan."""
    defined = ~np.isnan(x)
    return ratio(np.nansum(x, 1), defined.sum(1))


def group_codes(groups: Sequence[Any]) -> tuple[Array, int]:
    """(int64 [n], k): the groups as numbers 0 to k - 1, in order of first appearance."""
    # Plain numbers: two equal elements of a tensor would be two keys.
    if isinstance(groups, torch.Tensor | np.ndarray):
        groups = groups.tolist()
    codes = []
    code_of = dict[Any, int]()
    for group in groups:
        code = code_of.setdefault(group, len(code_of))
        codes.append(code)
    return np.array(codes, dtype=np.int64), len(code_of)
