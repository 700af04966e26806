"""Numbers from right and wrong answers that come in groups (the questions of a case, the steps of an episode).

Dims: n rows (answers), k groups. Rows of one group are not independent, so intervals and tests treat a group as one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen

from medvl.evaluation import answers, metrics
from medvl.evaluation.results import Result

Array = np.ndarray


@frozen(kw_only=True)
class Accuracy:
    """A share of right rows with its 95 % interval; nan bounds with one group, which says nothing of others."""

    value: float
    low: float
    high: float
    n: int  # rows
    groups: int


@frozen(kw_only=True)
class Difference:
    """How much more often a is right than b, of the same rows, with its 95 % interval and two-sided p; nan bounds with one group."""

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
    sums, sizes = _totals("accuracy", right, groups)
    value, low, high = _share(sums, sizes, n, gen)
    return Accuracy(value=value, low=low, high=high, n=int(sizes.sum()), groups=len(sizes))


def episode_accuracy(right: Any, groups: Sequence[Any], *, n: int = 1000, gen: torch.Generator) -> Accuracy:
    """Share of groups (episodes, cases) of which every row is right; args and errors as `accuracy`. The record's `n` is its groups."""
    sums, sizes = _totals("episode_accuracy", right, groups)
    return accuracy(sums == sizes, range(len(sizes)), n=n, gen=gen)


def accuracy_by_category(
    right: Any, categories: Sequence[str], groups: Sequence[Any], *, n: int = 1000, gen: torch.Generator
) -> dict[str, Accuracy]:
    """The accuracy of each category, in the order of the alphabet; args and errors as `accuracy`.

    A category's record depends only on its own rows and on `gen`, of which one number is taken: all categories draw from that.

    Raises:
        ValueError: also a row without a category ("" or None), or categories of another number.
    """
    flags = _flags("accuracy_by_category", right, groups)
    if len(categories) != len(flags) or (bare := sum(c is None or c == "" for c in categories)):
        got = f"{len(categories)} categories" if len(categories) != len(flags) else f"{bare} without"
        raise ValueError(
            f"accuracy_by_category: each of {len(flags)} rows must have a category, got {got}; leave such rows out or name them"
        )
    codes, _ = metrics._codes(groups)
    seed = int(torch.randint(2**62, (), generator=gen))
    rows: dict[str, list[int]] = {}
    for i, c in enumerate(categories):
        rows.setdefault(str(c), []).append(i)
    return {
        c: accuracy(flags[rows[c]], codes[rows[c]].tolist(), n=n, gen=torch.Generator().manual_seed(seed))
        for c in sorted(rows)
    }


def paired_difference(
    right_a: Any, right_b: Any, groups: Sequence[Any], *, n: int = 1000, gen: torch.Generator
) -> Difference:
    """Accuracy of a minus that of b on the same rows: the interval by bootstrap of whole groups, p by exact sign flips of whole groups.

    Under the null hypothesis a and b may change places in every group. That has 2^k outcomes; as a group's difference is a whole number,
    their distribution is computed by convolution, so p is exact and does not depend on `gen`. With one row per group it is McNemar's
    exact test. With one group, or where a and b are right on the same rows, p is 1.

    Args:
        right_a, right_b: bool [n]; groups and n as `accuracy`.
    Raises:
        ValueError: as `accuracy`; right_a and right_b of different lengths.
    Source: McNemar 1947, doi:10.1007/BF02295996; Fisher's randomisation test.
    """
    a, b = _flags("paired_difference", right_a, groups), _flags("paired_difference", right_b, groups)
    sums, sizes = _per_group(a.astype(np.int64) - b, groups)
    value, low, high = _share(sums, sizes, n, gen)
    return Difference(
        difference=value, low=low, high=high, p=_flips(sums), n=int(sizes.sum()), groups=len(sizes)
    )


def tfidf_accuracy(
    said: Sequence[str | None],
    gold: Sequence[str],
    episodes: Sequence[Any],
    *,
    threshold: float = 0.6,
    skip: str = answers.SKIPPED_STEP,
    n: int = 1000,
    gen: torch.Generator,
) -> dict[str, Accuracy]:
    """{"step", "episode"} accuracy as FedMABench scores them, only for comparison: `answers.same_by_tfidf` accepts opposites.

    Args:
        episodes: the episode of each step, whose steps are drawn together.
        skip: steps with this written answer are left out (an episode of such steps alone too); "" leaves none out.
    Raises:
        ValueError: as `accuracy`; said, gold and episodes of different lengths, or every step is left out.
    """
    if not len(said) == len(gold) == len(episodes):
        raise ValueError(
            f"tfidf_accuracy: said, gold and episodes must have one length, got {len(said)}, {len(gold)}, {len(episodes)}"
        )
    kept = [i for i, g in enumerate(gold) if not skip or g != skip]
    if not kept:
        raise ValueError(
            f"tfidf_accuracy: needs a step that is not skipped, got {len(gold)} steps, all {skip!r}"
        )
    right, groups = (
        [answers.same_by_tfidf(said[i], gold[i], threshold) for i in kept],
        metrics._codes(episodes)[0][kept].tolist(),
    )
    return {
        "step": accuracy(right, groups, n=n, gen=gen),
        "episode": episode_accuracy(right, groups, n=n, gen=gen),
    }


def to_results(
    records: Mapping[str, Accuracy | Difference], *, split: str, what: str = "", experiment: str = ""
) -> list[Result]:
    """A row for each {subject: record}; `what` is "accuracy" or "accuracy_difference" unless given; `extra` holds groups, and p."""
    rows = []
    for subject, r in records.items():
        kind, value, extra = (
            ("accuracy", r.value, {})
            if isinstance(r, Accuracy)
            else ("accuracy_difference", r.difference, {"p": r.p})
        )
        common: dict[str, Any] = {"subject": subject, "split": split, "n": r.n, "experiment": experiment}
        rows.append(
            Result(
                what=what or kind,
                value=value,
                low=r.low,
                high=r.high,
                extra={"groups": r.groups} | extra,
                **common,
            )
        )
    return rows


def _flags(what: str, right: Any, groups: Sequence[Any]) -> Array:
    """Right or wrong as bool [n]."""
    flags = right.detach().cpu().numpy() if isinstance(right, torch.Tensor) else np.asarray(right)
    if flags.ndim != 1 or not len(flags) or len(groups) != len(flags):
        raise ValueError(
            f"{what}: must have one or more rows and a group for each, got right {list(flags.shape)} and {len(groups)} groups"
        )
    if flags.dtype.kind not in "biuf" or not np.isin(flags, (0, 1)).all():
        found = ", ".join(sorted({str(v) for v in flags.tolist()})[:4])
        raise ValueError(f"{what}: every row must be right (true) or wrong (false), got {found}")
    return flags.astype(bool)


def _totals(what: str, right: Any, groups: Sequence[Any]) -> tuple[Array, Array]:
    return _per_group(_flags(what, right, groups), groups)


def _per_group(values: Array, groups: Sequence[Any]) -> tuple[Array, Array]:
    """(sum, rows) of each group, int64 [k]; sorted, so that no order of rows or groups shows in what is drawn from them."""
    codes, k = metrics._codes(groups)
    sizes = np.bincount(codes, minlength=k)
    sums = np.zeros(k, dtype=np.int64)
    np.add.at(sums, codes, values)
    order = np.lexsort((sums, sizes))
    return sums[order], sizes[order]


def _share(sums: Array, sizes: Array, n: int, gen: torch.Generator) -> tuple[float, float, float]:
    """Sum over rows, and its bounds when groups are drawn."""
    if n < 1:
        raise ValueError(f"accuracy: the replicates n must be 1 or more, got {n}")
    if len(sizes) < 2:
        return float(sums.sum() / sizes.sum()), float("nan"), float("nan")

    def share(table: Array, _: Array, w: Array | None) -> dict[str, Array]:
        total = (np.ones((1, len(table))) if w is None else w.T) @ table
        ratio = total[:, :1] / total[:, 1:]
        return {"": ratio[0] if w is None else ratio}

    table = np.stack([sums, sizes], 1)  # a group is a row here
    found = metrics.bootstrap(share, table, np.zeros_like(table), range(len(table)), n=n, gen=gen)[""]
    return float(found.value[0]), float(found.low[0]), float(found.high[0])


def _flips(sums: Array) -> float:
    """P(|sum of +-d| >= |sum of d|), every sign as likely: groups of equal |d| = m make m (2 Binomial - c), which are convolved."""
    from scipy.stats import binom  # here: half a second to import

    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    dist, reach = np.ones(1), 0  # probabilities of -reach .. reach
    for m, c in zip(sizes.tolist(), counts.tolist(), strict=True):
        wider = np.zeros(2 * (reach + m * c) + 1)
        for j, p in enumerate(binom.pmf(np.arange(c + 1), c, 0.5)):
            wider[2 * m * j : 2 * m * j + len(dist)] += p * dist
        dist, reach = wider, reach + m * c
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(int(sums.sum()))
    return min(1.0, float(dist[far].sum()))
