"""Retrieval of adapters for queries, and their weights, by the cosine between embeddings."""

from collections.abc import Sequence
from math import isfinite
from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from medvl.base import config

MOST = 2**16  # adapters of a query; every row has a place for each
_LENGTHS = (1e-15, 1e15)  # outside them float32 loses the squares, and so the direction
_CANCELLED = 1e-6  # a mean of unit vectors shorter than this is rounding
_NEAR = 1e-4  # more than rounding can change the product of two unit vectors


@frozen(kw_only=True)
class RetrieveConfig:
    """How many adapters a query gets, and their weights.

    Weights over the n adapters of a row, of similarity s: "uniform" 1/n, "softmax" exp(s / temperature) /
    sum, "similarity" s / sum, which passes over adapters with s <= 0. Similar adapters lie close: at
    temperature 0.2 softmax is nearly uniform, 0.02 favours the best.
    """

    k: int = 3  # at most; 0 = none, the bare model
    weighting: Literal["uniform", "softmax", "similarity"] = "uniform"
    temperature: float = 0.2  # of "softmax"
    threshold: float = -1.0  # cosine; a row whose best adapter is below it gets none; -1 = no threshold

    def __attrs_post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 0 <= self.k <= MOST:
            raise ValueError(f"RetrieveConfig: k must be a whole number of 0 to {MOST:,}, got {self.k!r}")
        if self.weighting not in ("uniform", "softmax", "similarity"):
            raise ValueError(
                "RetrieveConfig: weighting must be 'uniform', 'softmax' or 'similarity', got "
                f"{self.weighting!r}"
            )
        if not isfinite(self.temperature) or self.temperature <= 0:
            raise ValueError(
                f"RetrieveConfig: temperature must be finite and above 0, got {self.temperature}"
            )
        if not -1 <= self.threshold <= 1:
            raise ValueError(
                f"RetrieveConfig: threshold is a cosine and must be within -1..1, got {self.threshold}"
            )
        config.check_bounds(self, "RetrieveConfig", k=(0, 2**20), temperature=(0, 1e6))


@frozen(kw_only=True, eq=False)
class Retrieved:
    """The adapters of each row, the most similar first; where a row has fewer than k, the last places are
    empty.
    """

    indices: Tensor  # int64 [b, k], -1 where empty
    similarity: Tensor  # float32 [b, k], nan where empty
    weights: Tensor  # float32 [b, k], 0 where empty; a row sums to 1, or to 0 if it abstained
    abstained: Tensor  # bool [b], the row gets no adapter: below the threshold, none left, or k = 0


def adapter_vector(embeddings: Tensor) -> Tensor:
    """The vector [d] that stands for an adapter: the mean of its unit-normalised samples [m, d], of length 1
    again, float32.

    Samples are from the adapter's training split. Without the last step inner products would favour adapters
    with uniform samples.
    Raises:
        ValueError: another shape or dtype, a sample that is not finite or zero (names it), samples that
            cancel out.
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, section 4.
    """
    units = _normalise("adapter_vector", "embeddings", "m", embeddings)
    return _normalise_mean("adapter_vector", units.mean(0, keepdim=True))[0]


def query_vector(
    text: Tensor | None,
    image: Tensor | None,
    shares: tuple[float, float] = (0.7, 0.3),
    *,
    has_image: Tensor | None = None,
) -> Tensor:
    """Query vectors [b, d]: shares of the unit-normalised text and image, of length 1 again, float32.

    Args:
        text, image: [b, d] of one embedding space; with only one of them it is normalised. Several images of
            a query: their mean.
        shares: of text and of image; only their ratio matters.
        has_image: bool [b]; a row without an image takes its text alone, and what `image` holds there is
            ignored.
    Raises:
        ValueError: neither given, unequal shapes, a row that is not finite or zero, one that cancels out,
            shares that are not two numbers >= 0 with one above 0, has_image that is not bool [b] or leaves a
            row with nothing.
    """
    where = "query_vector"
    are_shares = len(shares) == 2 and all(isfinite(share) and share >= 0 for share in shares)
    if not are_shares or not any(shares):
        raise ValueError(f"{where}: shares must be two numbers >= 0, one above 0, got {shares}")
    if text is None and image is None:
        raise ValueError(f"{where}: must have text, image or both, got neither")
    if has_image is not None:
        _check_has_image(where, text, image, has_image)
    if text is None:
        assert image is not None
        return _normalise(where, "image", "b", image)
    if image is None:
        return _normalise(where, "text", "b", text)
    if text.shape != image.shape or text.device != image.device:
        raise ValueError(
            f"{where}: text and image must both be [b, d], got {_describe(text)} and {_describe(image)}"
        )
    text = _normalise(where, "text", "b", text)
    if has_image is not None:  # a row without an image takes its text twice
        image = torch.where(has_image[:, None].to(text.device), image.float(), text)
    image = _normalise(where, "image", "b", image)
    mean = (shares[0] * text + shares[1] * image) / sum(shares)
    return _normalise_mean(where, mean)


def _check_has_image(where: str, text: Tensor | None, image: Tensor | None, has_image: Tensor) -> None:
    """Check shape and type of `has_image`, and that every row has a text or an image."""
    vectors = image if text is None else text
    assert vectors is not None
    if has_image.dtype != torch.bool or has_image.shape != vectors.shape[:1]:
        raise ValueError(
            f"{where}: has_image must be bool [{len(vectors)}], got {has_image.dtype} {list(has_image.shape)}"
        )
    missing_images = image is None and bool(has_image.any())
    missing_texts = image is not None and text is None and bool((~has_image).any())
    if missing_images or missing_texts:
        raise ValueError(
            f"{where}: has_image must agree with what is given, got text {text is not None}, image "
            f"{image is not None}"
        )


@torch.no_grad()
def retrieve_adapters(
    cfg: RetrieveConfig, queries: Tensor, vectors: Tensor, *, exclude: Tensor | None = None
) -> Retrieved:
    """The cfg.k adapters most similar to each query by cosine, the most similar first, and their weights.

    Of equal vectors the one with the lower index comes first, whatever else is in the batch. A row may get
    fewer than k: where fewer are left after `exclude` or in the pool; one that gets none abstains. No
    gradient is taken.
    Args:
        queries: [b, d], of any length.
        vectors: [p, d], one per adapter, of any length; compared in float32.
        exclude: bool [p] or [b, p], true for adapters that must not be chosen, such as a row's own for a test
            out of its domain.
    Raises:
        ValueError: other shapes, dtypes or devices; a query or vector that is not finite or zero (names the
            row).
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, section 4; there the weights are uniform.
    """
    if vectors.dim() != 2 or not len(vectors) or queries.dim() != 2 or queries.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"retrieve: queries must be [b, d] and vectors [p, d], p >= 1, got {_describe(queries)} and "
            f"{_describe(vectors)}"
        )
    b, p = len(queries), len(vectors)
    if queries.device != vectors.device:
        raise ValueError(
            f"retrieve: queries and vectors must be on one device, got {queries.device} and {vectors.device}"
        )
    if exclude is not None and (exclude.dtype != torch.bool or exclude.shape not in ((p,), (b, p))):
        raise ValueError(
            f"retrieve: exclude must be bool [{p}] or [{b}, {p}], got {exclude.dtype} {list(exclude.shape)}"
        )
    units = _normalise("retrieve", "queries", "b", queries)
    # Vectors of adapters need not have length 1; the product is divided by their lengths instead.
    lengths = _checked_lengths("retrieve", "vectors", "p", vectors)
    # Similar adapters may differ by less than the spacing of bfloat16.
    with torch.autocast(queries.device.type, enabled=False):
        # Rounding can carry a cosine past 1.
        similarity = (units @ vectors.float().T).div_(lengths).clamp_(-1, 1)
    excluded = torch.zeros(1, p, dtype=torch.bool, device=queries.device)
    if exclude is not None:
        excluded = exclude.to(queries.device).view(-1, p)
    # A negative similarity would be a negative weight, and the sum could be 0.
    if cfg.weighting == "similarity":
        excluded = excluded | (similarity <= 0)

    # Every row has cfg.k places, also where fewer adapters are left.
    best, indices = _best(min(cfg.k, p), similarity, excluded, vectors)
    empty = cfg.k - best.shape[1]
    best = torch.nn.functional.pad(best, (0, empty), value=-torch.inf)
    indices = torch.nn.functional.pad(indices, (0, empty), value=-1)
    # Not `best < threshold`: with k = 0 there is no column to compare, and every row must abstain.
    abstained = ~(best[:, :1] >= cfg.threshold).any(1)
    chosen = best.isfinite() & ~abstained[:, None]
    return Retrieved(
        indices=indices.masked_fill(~chosen, -1),
        similarity=best.masked_fill(~chosen, torch.nan),
        weights=_weights(cfg, best, chosen),
        abstained=abstained,
    )


def used_adapters(retrieved: Retrieved) -> tuple[Tensor, Tensor]:
    """(ids int64 [n], weights [b, n]): the adapters that any row uses, ascending, and the weights over only
    these.

    A pool of adapters[i] for i in ids gives what the whole pool would. n = 0 where every row abstained: run
    the bare model.
    """
    # Ascending, by `unique`, which `searchsorted` below needs.
    ids = retrieved.indices[retrieved.indices >= 0].unique()
    weights = retrieved.weights.new_zeros(len(retrieved.weights), len(ids))
    if not len(ids):
        return ids, weights
    # Empty places take any adapter: they add a weight of 0.
    indices = retrieved.indices.clamp(min=0)
    places = torch.searchsorted(ids, indices).clamp(max=len(ids) - 1)
    # Added: several empty places of a row may fall on one adapter.
    return ids, weights.scatter_add(1, places, retrieved.weights)


def adapter_recall(results: Retrieved | Tensor, truth: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """{k: share of rows whose right adapter is among their k best}; a row that abstained missed it.

    Args:
        results: from `retrieve_adapters`, or similarities [b, p], of which equal ones count in the order of
            their index.
        truth: int64 [b], the right adapter of each row.
    Raises:
        ValueError: no row, other shapes, similarities that are not finite, a truth below 0 or, of
            similarities, not below p, k below 1 or more than there are.
    """
    table = results.indices if isinstance(results, Retrieved) else results
    if table.dim() != 2 or not table.numel() or truth.shape != table.shape[:1] or truth.is_floating_point():
        raise ValueError(
            "adapter_recall: must have [b, k] with b, k >= 1 and truth int64 [b], "
            f"got {list(table.shape)} and {_describe(truth)}"
        )
    if not len(ks) or min(ks) < 1 or max(ks) > table.shape[1]:
        raise ValueError(f"adapter_recall: every k must be within 1..{table.shape[1]}, got {list(ks)}")
    truth = truth.to(table.device)
    limit = None  # of the right adapter; `Retrieved` does not say how many there are
    if not isinstance(results, Retrieved):
        limit = table.shape[1]
    if bool((truth < 0).any()) or (limit is not None and bool((truth >= limit).any())):
        last = "" if limit is None else limit - 1
        raise ValueError(
            f"adapter_recall: truth must be the index of an adapter, 0..{last}, got {truth.tolist()}"
        )
    if isinstance(results, Retrieved):
        hits = table == truth[:, None]
        # [b, k]; an empty place is -1 and never equals a truth.
        return {int(k): float(hits[:, :k].any(1).double().mean()) for k in ks}
    finite = table.isfinite()
    if not bool(finite.all()):
        row = int((~finite).any(1).nonzero()[0])
        raise ValueError(f"adapter_recall: similarities must be finite, row {row} has others")
    # The rank of the right adapter: how many are more similar, or equally similar and of a lower index.
    right = table.gather(1, truth[:, None])
    # Ties count as `retrieve_adapters` would order them.
    has_lower_index = torch.arange(table.shape[1], device=table.device) < truth[:, None]
    rank = ((table > right) | ((table == right) & has_lower_index)).sum(1)
    return {int(k): float((rank < k).double().mean()) for k in ks}


def _best(k: int, similarity: Tensor, excluded: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(similarity, index) [b, k] of the k best, -inf where excluded; [b, fewer] where no row has k.

    A matrix product may round equal columns differently, by their place in it. So of all adapters that come
    near a row's k best, equal ones get the product of the first of them; then a stable sort over these
    candidates keeps their order.
    """
    nothing = similarity[:, :0], similarity.new_zeros(len(similarity), 0, dtype=torch.int64)
    if k == 0:
        return nothing
    remaining = similarity.masked_fill(excluded, -torch.inf)
    kth = remaining.topk(k).values[:, -1:]
    # Candidates of any row [n], so that one sort serves all rows; usually far fewer than p.
    candidates = ((remaining >= kth - _NEAR) & ~excluded).any(0).nonzero()[:, 0]
    if not len(candidates):
        return nothing
    # `first` [n]: of each candidate, the first candidate with an equal vector.
    group = torch.unique(vectors[candidates], dim=0, return_inverse=True)[1]
    place = torch.arange(len(candidates), device=candidates.device)
    first_of_group = torch.full_like(place, len(candidates)).scatter_reduce(0, group, place, "amin")
    first = first_of_group[group]
    shared = similarity[:, candidates[first]].masked_fill(excluded[:, candidates], -torch.inf)
    best, order = shared.sort(dim=1, descending=True, stable=True)
    return best[:, :k], candidates[order[:, :k]]


def _weights(cfg: RetrieveConfig, similarity: Tensor, chosen: Tensor) -> Tensor:
    """Weights float32 [b, k] that sum to 1 over the chosen adapters of a row."""
    # In float64, so that a row's float32 weights sum to 1 up to their own rounding.
    s = similarity.double().masked_fill(~chosen, 0.0)
    if cfg.weighting == "uniform":
        raw = torch.ones_like(s)
    elif cfg.weighting == "softmax":
        # Minus the largest, as exp of a similarity over a small temperature overflows.
        raw = ((s - s[:, :1]) / cfg.temperature).exp()  # the first is the largest
    else:
        raw = s
    raw = torch.where(chosen, raw, 0.0)
    total = raw.sum(1, keepdim=True).clamp(min=torch.finfo(raw.dtype).tiny)  # 0 where a row abstains
    return (raw / total).float()


def _checked_lengths(where: str, name: str, rows: str, x: Tensor) -> Tensor:
    """Length of each row of x [rows, d], float32 [rows].

    Raises:
        ValueError: beginning with `where`, for rows that are not finite or of which float32 loses the
            squares.
    """
    if x.dim() != 2 or not x.is_floating_point() or not x.numel():
        raise ValueError(
            f"{where}: {name} must be floating point [{rows}, d], {rows} and d above 0, got {_describe(x)}"
        )
    lengths = torch.linalg.vector_norm(x.float(), dim=1)
    shortest, longest = _LENGTHS
    wrong = (~((lengths >= shortest) & (lengths <= longest))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{where}: every row of {name} must be finite and of a length within {shortest}..{longest}, "
            f"row {row} has length {float(lengths[row])} ({len(wrong)} such)"
        )
    return lengths


def _normalise(where: str, name: str, rows: str, x: Tensor) -> Tensor:
    """The rows of x [rows, d] with length 1, float32."""
    lengths = _checked_lengths(where, name, rows, x)
    return x.float() / lengths[:, None]


def _normalise_mean(where: str, x: Tensor) -> Tensor:
    """Means of unit vectors [b, d] with length 1 again."""
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    cancelled = (lengths[:, 0] < _CANCELLED).nonzero()
    if len(cancelled):
        row = int(cancelled[0])
        raise ValueError(
            f"{where}: unit vectors must not cancel out, the mean of row {row} has length "
            f"{float(lengths[row]):.1e}"
        )
    return x / lengths


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
