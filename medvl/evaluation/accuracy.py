"""Numbers from right and wrong answers that come in groups (the questions of a case, the steps of an
episode).

Dims: n rows (answers), k groups. Rows of one group are not independent, so intervals and tests treat a group
as one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen

from medvl.evaluation import metrics
from medvl.evaluation.results import Result

Array = np.ndarray


@frozen(kw_only=True)
class Accuracy:
    """A share of right rows with its 95 % interval; nan bounds with one group, which says nothing of
    others.
    """

    value: float
    low: float
    high: float
    n: int  # rows
    groups: int


@frozen(kw_only=True)
class Difference:
    """How much more often a is right than b, of the same rows, with its 95 % interval and two-sided p; nan
    bounds with one group.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int  # rows
    groups: int


def accuracy(right: Any, groups: Sequence[Any], *, n: int = 1000, gen: torch.Generator) -> Accuracy:
    """Share of right rows, with a percentile bootstrap that draws whole groups.

    Args:
        right: bool [n].
        groups: [n] of anything hashable, the group of each row; `range(n)` where every row stands for itself.
        n: replicates.
    Returns:
        the same to the last bit whatever the order of the rows.
    Raises:
        ValueError: no rows, values that are not right or wrong, groups of another number, n below 1.
    """
    sums, sizes = _group_totals(_check_flags("accuracy", right, groups), groups)
    value, low, high = bootstrap_share(sums, sizes, n, gen)
    return Accuracy(value=value, low=low, high=high, n=int(sizes.sum()), groups=len(sizes))


def episode_accuracy(right: Any, groups: Sequence[Any], *, n: int = 1000, gen: torch.Generator) -> Accuracy:
    """Share of groups (episodes, cases) of which every row is right; args and errors as `accuracy`. The
    record's `n` is its groups.
    """
    sums, sizes = _group_totals(_check_flags("episode_accuracy", right, groups), groups)
    # Each group is now one row and stands for itself.
    return accuracy(sums == sizes, range(len(sizes)), n=n, gen=gen)


def accuracy_by_category(
    right: Any, categories: Sequence[str], groups: Sequence[Any], *, n: int = 1000, gen: torch.Generator
) -> dict[str, Accuracy]:
    """The accuracy of each category, in the order of the alphabet; args and errors as `accuracy`.

    A category's record depends only on its own rows and on `gen`, of which one number is taken: all
    categories draw from that.

    Raises:
        ValueError: also a row without a category ("" or None), or categories of another number.
    """
    flags = _check_flags("accuracy_by_category", right, groups)
    fault = ""
    unnamed = sum(c is None or c == "" for c in categories)
    if len(categories) != len(flags):
        fault = f"{len(categories)} categories"
    elif unnamed:
        fault = f"{unnamed} without"
    if fault:
        raise ValueError(
            f"accuracy_by_category: each of {len(flags)} rows must have a category, got {fault}; "
            "leave such rows out or name them"
        )
    codes, _ = metrics.group_codes(groups)
    # Every category starts from the same seed: adding one does not change the intervals of the others.
    seed = int(torch.randint(2**62, (), generator=gen))
    rows: dict[str, list[int]] = {}
    for i, category in enumerate(categories):
        rows.setdefault(str(category), []).append(i)
    accuracies = {}
    for category in sorted(rows):
        part = rows[category]
        own_gen = torch.Generator().manual_seed(seed)
        accuracies[category] = accuracy(flags[part], codes[part].tolist(), n=n, gen=own_gen)
    return accuracies


def paired_difference(
    right_a: Any, right_b: Any, groups: Sequence[Any], *, n: int = 1000, gen: torch.Generator
) -> Difference:
    """Accuracy of a minus that of b on the same rows: the interval by bootstrap of whole groups, p by exact
    sign flips of whole groups.

    Under the null hypothesis a and b may change places in every group. That has 2^k outcomes; as a group's
    difference is a whole number, their distribution is computed by convolution, so p is exact and does not
    depend on `gen`. With one row per group it is McNemar's exact test. With one group, or where a and b are
    right on the same rows, p is 1.

    Args:
        right_a, right_b: bool [n]; groups and n as `accuracy`.
    Raises:
        ValueError: as `accuracy`; right_a and right_b of different lengths.
    Source: McNemar 1947, doi:10.1007/BF02295996; Fisher's randomisation test.
    """
    a = _check_flags("paired_difference", right_a, groups)
    b = _check_flags("paired_difference", right_b, groups)
    # Of each row 1, 0 or -1. numpy does not subtract bools.
    sums, sizes = _group_totals(a.astype(np.int64) - b, groups)
    value, low, high = bootstrap_share(sums, sizes, n, gen)
    return Difference(
        difference=value, low=low, high=high, p=_sign_flip_p(sums), n=int(sizes.sum()), groups=len(sizes)
    )


def to_results(
    records: Mapping[str, Accuracy | Difference], *, split: str, metric: str = "", experiment: str = ""
) -> list[Result]:
    """A row for each {subject: record}; the metric is "accuracy" or "accuracy_difference" unless
    one is given; `extra` holds groups, and p.
    """
    rows = []
    for subject, record in records.items():
        extra: dict[str, Any] = {"groups": record.groups}
        if isinstance(record, Accuracy):
            name, value = "accuracy", record.value
        else:
            name, value = "accuracy_difference", record.difference
            extra["p"] = record.p
        rows.append(
            Result(
                what=metric or name,
                subject=subject,
                split=split,
                value=value,
                low=record.low,
                high=record.high,
                n=record.n,
                experiment=experiment,
                extra=extra,
            )
        )
    return rows


def _check_flags(caller: str, right: Any, groups: Sequence[Any]) -> Array:
    """Right or wrong as bool [n]."""
    flags = right.detach().cpu().numpy() if isinstance(right, torch.Tensor) else np.asarray(right)
    if flags.ndim != 1 or not len(flags) or len(groups) != len(flags):
        raise ValueError(
            f"{caller}: must have one or more rows and a group for each, "
            f"got right {list(flags.shape)} and {len(groups)} groups"
        )
    if flags.dtype.kind not in "biuf" or not np.isin(flags, (0, 1)).all():
        values = ", ".join(sorted({str(v) for v in flags.tolist()})[:4])
        raise ValueError(f"{caller}: every row must be right (true) or wrong (false), got {values}")
    return flags.astype(bool)


def _group_totals(values: Array, groups: Sequence[Any]) -> tuple[Array, Array]:
    """(sum, rows) of each group, int64 [k]; sorted, so that the order of rows and groups does not change
    what is drawn from them.
    """
    codes, k = metrics.group_codes(groups)
    sizes = np.bincount(codes, minlength=k)
    # bincount with weights would give floats; the sign-flip test needs exact whole numbers.
    sums = np.zeros(k, dtype=np.int64)
    np.add.at(sums, codes, values)
    order = np.lexsort((sums, sizes))
    return sums[order], sizes[order]


def bootstrap_share(sums: Array, sizes: Array, n: int, gen: torch.Generator) -> tuple[float, float, float]:
    """The mean over rows from sum and rows of each group [k]: (mean, low, high) of the 95 % interval when
    groups are drawn, nan bounds with one group.
    """
    if n < 1:
        raise ValueError(f"accuracy: the replicates n must be 1 or more, got {n}")
    if len(sizes) < 2:
        return float(sums.sum() / sizes.sum()), float("nan"), float("nan")

    def share(table: Array, _: Array, weights: Array | None) -> dict[str, Array]:
        # A share of rows, not a mean over groups: a large group counts as often as it has rows.
        if weights is None:
            total = table.sum(0)  # [sum, rows]
            return {"": total[:1] / total[1:]}
        total = weights.T @ table  # [r, 2]
        return {"": total[:, :1] / total[:, 1:]}

    # `bootstrap` draws rows by group; here a group is a row, and there are no labels.
    table = np.stack([sums, sizes], 1)
    no_labels = np.zeros_like(table)
    interval = metrics.bootstrap(share, table, no_labels, range(len(table)), n=n, gen=gen)[""]
    return float(interval.value[0]), float(interval.low[0]), float(interval.high[0])


def _sign_flip_p(sums: Array) -> float:
    """P(|sum of +-d| >= |sum of d|) where every sign is as likely.

    The c groups of equal |d| = m add m (2 Binomial(c, 1/2) - c); these distributions are convolved.
    """
    from scipy.stats import binom  # here: half a second to import

    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    # Start: the sum of no groups is 0 for certain. Groups with d = 0 change nothing and are left out.
    probabilities, reach = np.ones(1), 0  # of the sums -reach .. reach
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        wider = np.zeros(2 * (reach + size * count) + 1)
        for positive, p in enumerate(binom.pmf(np.arange(count + 1), count, 0.5)):
            # `positive` of the groups have a plus: their sum is size * (2 * positive - count), which lies
            # 2 * size * positive above the least one.
            shift = 2 * size * positive
            wider[shift : shift + len(probabilities)] += p * probabilities
        probabilities, reach = wider, reach + size * count
    as_far = np.abs(np.arange(-reach, reach + 1)) >= abs(int(sums.sum()))
    return min(1.0, float(probabilities[as_far].sum()))  # rounding may pass 1
