"""Which adapters a query gets, and their weights: cosine between its embedding and the mean embedding of each adapter."""

from collections.abc import Sequence
from math import isfinite
from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from medvl.base import config

MOST = 2**16  # adapters of a query; every row has a place for each
_LENGTHS = 1e-15, 1e15  # outside them float32 loses the squares, and so the direction
_CANCELLED = 1e-6  # what is left of unit vectors that cancel out is rounding
_NEAR = 1e-4  # further apart than rounding in a product of unit vectors can put equal ones


@frozen(kw_only=True)
class RetrieveConfig:
    """How many adapters a query gets, and their shares.

    Weights over the adapters a row gets, of similarity s: "uniform" 1/n, "softmax" exp(s / temperature) / sum, "similarity" s / sum, which
    passes over adapters with s <= 0. Similar adapters lie close: at temperature 0.2 softmax is nearly uniform, 0.02 favours the best.
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
                f"RetrieveConfig: weighting must be 'uniform', 'softmax' or 'similarity', got {self.weighting!r}"
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
    """The adapters of each row, the most similar first; where a row has fewer than k, the last places are empty."""

    indices: Tensor  # int64 [b, k], -1 where empty
    similarity: Tensor  # float32 [b, k], nan where empty
    weights: Tensor  # float32 [b, k], 0 where empty; a row sums to 1, or to 0 if it abstained
    abstained: Tensor  # bool [b], the row gets no adapter: below the threshold, none left, or k = 0


def adapter_vector(embeddings: Tensor) -> Tensor:
    """The vector [d] that stands for an adapter: the mean of its unit-normalised samples [m, d], of length 1 again, float32.

    Samples are from the adapter's training split. Without the last step inner products would favour adapters with uniform samples.
    Raises:
        ValueError: another shape or dtype, a sample that is not finite or zero (names it), samples that cancel out.
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, section 4.
    """
    unit = _unit("adapter_vector", "embeddings", "m", embeddings)
    return _mixed("adapter_vector", unit.mean(0, keepdim=True))[0]


def query_vector(
    text: Tensor | None,
    image: Tensor | None,
    shares: tuple[float, float] = (0.7, 0.3),
    *,
    has_image: Tensor | None = None,
) -> Tensor:
    """Query vectors [b, d]: shares of the unit-normalised text and image, of length 1 again, float32.

    Args:
        text, image: [b, d] of one embedding space; with only one of them it is normalised. Several images of a query: their mean.
        shares: of text and of image; only their ratio matters.
        has_image: bool [b]; a row without an image takes its text alone, and what `image` holds there is ignored.
    Raises:
        ValueError: neither given, unequal shapes, a row that is not finite or zero, one that cancels out, shares that are not two numbers
            >= 0 with one above 0, has_image that is not bool [b] or leaves a row with nothing.
    """
    who = "query_vector"
    if len(shares) != 2 or not all(isfinite(s) and s >= 0 for s in shares) or not any(shares):
        raise ValueError(f"{who}: shares must be two numbers >= 0, one above 0, got {shares}")
    given = text if text is not None else image
    if given is None:
        raise ValueError(f"{who}: must have text, image or both, got neither")
    if has_image is not None and (has_image.dtype != torch.bool or has_image.shape != given.shape[:1]):
        raise ValueError(
            f"{who}: has_image must be bool [{len(given)}], got {has_image.dtype} {list(has_image.shape)}"
        )
    if (
        has_image is not None
        and (image is None or text is None)
        and bool((has_image if image is None else ~has_image).any())
    ):
        raise ValueError(
            f"{who}: has_image must agree with what is given, got text {text is not None}, image {image is not None}"
        )
    if text is None or image is None:
        return _unit(who, "image" if text is None else "text", "b", given)
    if text.shape != image.shape or text.device != image.device:
        raise ValueError(f"{who}: text and image must both be [b, d], got {_about(text)} and {_about(image)}")
    words = _unit(who, "text", "b", text)
    if has_image is not None:
        image = torch.where(has_image[:, None].to(text.device), image.float(), words)
    return _mixed(who, (shares[0] * words + shares[1] * _unit(who, "image", "b", image)) / sum(shares))


@torch.no_grad()
def retrieve_adapters(
    cfg: RetrieveConfig, queries: Tensor, vectors: Tensor, *, exclude: Tensor | None = None
) -> Retrieved:
    """The cfg.k adapters most similar to each query by cosine, the most similar first, and their weights.

    Of equal vectors the one with the lower index comes first, whatever else is in the batch. A row may get fewer than k: where fewer are
    left after `exclude` or in the pool; one that gets none abstains. No gradient is taken.
    Args:
        queries: [b, d], of any length.
        vectors: [p, d], one per adapter, of any length; compared in float32.
        exclude: bool [p] or [b, p], true for adapters that must not be chosen, such as a row's own for a test out of its domain.
    Raises:
        ValueError: other shapes, dtypes or devices; a query or vector that is not finite or zero (names the row).
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, section 4; there the weights are uniform.
    """
    if vectors.dim() != 2 or not len(vectors) or queries.dim() != 2 or queries.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"retrieve: queries must be [b, d] and vectors [p, d], p >= 1, got {_about(queries)} and {_about(vectors)}"
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
    unit, lengths = _unit("retrieve", "queries", "b", queries), _lengths("retrieve", "vectors", "p", vectors)
    with torch.autocast(queries.device.type, enabled=False):
        similarity = (unit @ vectors.float().T).div_(lengths).clamp_(-1, 1)
    barred = (
        torch.zeros(1, p, dtype=torch.bool, device=queries.device)
        if exclude is None
        else exclude.to(queries.device).view(-1, p)
    )
    if cfg.weighting == "similarity":
        barred = barred | (similarity <= 0)
    found, indices = _best(min(cfg.k, p), similarity, barred, vectors)
    found = torch.nn.functional.pad(found, (0, cfg.k - found.shape[1]), value=-torch.inf)
    indices = torch.nn.functional.pad(indices, (0, cfg.k - indices.shape[1]), value=-1)
    abstained = ~(found[:, :1] >= cfg.threshold).any(1)
    chosen = found.isfinite() & ~abstained[:, None]
    return Retrieved(
        indices=indices.masked_fill(~chosen, -1),
        similarity=found.masked_fill(~chosen, torch.nan),
        weights=_shares(cfg, found, chosen),
        abstained=abstained,
    )


def mixture_weights(retrieved: Retrieved, p: int) -> Tensor:
    """Weights [b, p] over a pool of p adapters, 0 where a row does not use one: what `compose_adapters` takes.

    Raises:
        ValueError: an adapter that a pool of p does not have.
    """
    most = int(retrieved.indices.max()) if retrieved.indices.numel() else -1
    if p < 1 or most >= p:
        raise ValueError(
            f"mixture_weights: p must be the number of adapters retrieved from, at least {max(most + 1, 1)}, got {p}"
        )
    dense = retrieved.weights.new_zeros(len(retrieved.weights), p)
    return dense.scatter_add(1, retrieved.indices.clamp(min=0), retrieved.weights)  # what is empty adds 0


def used_adapters(retrieved: Retrieved) -> tuple[Tensor, Tensor]:
    """(ids int64 [n], weights [b, n]): the adapters that any row uses, ascending, and the weights over only these.

    A pool of adapters[i] for i in ids gives what the whole pool would. n = 0 where every row abstained: run the bare model.
    """
    ids, used = retrieved.indices[retrieved.indices >= 0].unique(), retrieved.indices.clamp(min=0)
    if not len(ids):
        return ids, retrieved.weights.new_zeros(len(retrieved.weights), 0)
    place = torch.searchsorted(ids, used).clamp(max=len(ids) - 1)
    return ids, retrieved.weights.new_zeros(len(used), len(ids)).scatter_add(1, place, retrieved.weights)


def adapter_recall(found: Retrieved | Tensor, truth: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """{k: share of rows whose right adapter is among their k best}; a row that abstained missed it.

    Args:
        found: what `retrieve_adapters` gave, or similarities [b, p], of which equal ones count in the order of their index.
        truth: int64 [b], the right adapter of each row.
    Raises:
        ValueError: no row, other shapes, similarities that are not finite, a truth below 0 or, of similarities, not below p, k below 1 or
            more than there are.
    """
    table = found.indices if isinstance(found, Retrieved) else found
    if table.dim() != 2 or not table.numel() or truth.shape != table.shape[:1] or truth.is_floating_point():
        raise ValueError(
            f"adapter_recall: must have [b, k] with b, k >= 1 and truth int64 [b], got {list(table.shape)} and {_about(truth)}"
        )
    if not len(ks) or min(ks) < 1 or max(ks) > table.shape[1]:
        raise ValueError(f"adapter_recall: every k must be within 1..{table.shape[1]}, got {list(ks)}")
    truth = truth.to(table.device)
    limit = table.shape[1] if isinstance(found, Tensor) else None
    if bool((truth < 0).any()) or (limit is not None and bool((truth >= limit).any())):
        raise ValueError(
            f"adapter_recall: truth must be the index of an adapter, 0..{'' if limit is None else limit - 1}, got {truth.tolist()}"
        )
    if isinstance(found, Retrieved):
        hits = table == truth[:, None]
        return {int(k): float(hits[:, :k].any(1).double().mean()) for k in ks}
    if not bool(table.isfinite().all()):
        raise ValueError(
            f"adapter_recall: similarities must be finite, row {int((~table.isfinite()).any(1).nonzero()[0])} has others"
        )
    right = table.gather(1, truth[:, None])
    before = torch.arange(table.shape[1], device=table.device) < truth[:, None]
    ahead = ((table > right) | ((table == right) & before)).sum(1)
    return {int(k): float((ahead < k).double().mean()) for k in ks}


def _best(k: int, similarity: Tensor, barred: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(similarity, index) [b, k] of the k best, -inf where barred; [b, fewer] where no row has k.

    A matrix product may round equal columns differently, by their place in it. So of all adapters that come near a row's k best, equal ones
    get the product of the first of them; then a stable sort over these few keeps their order.
    """
    if k == 0:
        return similarity[:, :0], similarity.new_zeros(len(similarity), 0, dtype=torch.int64)
    left = similarity.masked_fill(barred, -torch.inf)
    last = left.topk(k).values[:, -1:]
    few = ((left >= last - _NEAR) & ~barred).any(0).nonzero()[:, 0]
    if not len(few):
        return similarity[:, :0], similarity.new_zeros(len(similarity), 0, dtype=torch.int64)
    group = torch.unique(vectors[few], dim=0, return_inverse=True)[1]
    place = torch.arange(len(few), device=few.device)
    first = torch.full_like(place, len(few)).scatter_reduce(0, group, place, "amin")[group]
    shared = similarity[:, few[first]].masked_fill(barred[:, few], -torch.inf)
    found, order = shared.sort(dim=1, descending=True, stable=True)
    return found[:, :k], few[order[:, :k]]


def _shares(cfg: RetrieveConfig, similarity: Tensor, chosen: Tensor) -> Tensor:
    s = similarity.double().masked_fill(~chosen, 0.0)
    if cfg.weighting == "uniform":
        raw = torch.ones_like(s)
    elif cfg.weighting == "softmax":
        raw = ((s - s[:, :1]) / cfg.temperature).exp()  # the first is the largest
    else:
        raw = s
    raw = torch.where(chosen, raw, 0.0)
    return (raw / raw.sum(1, keepdim=True).clamp(min=torch.finfo(raw.dtype).tiny)).float()


def _lengths(who: str, what: str, rows: str, x: Tensor) -> Tensor:
    """Length of each row, float32 [rows]; finite, and far from what float32 cannot square."""
    if x.dim() != 2 or not x.is_floating_point() or not x.numel():
        raise ValueError(
            f"{who}: {what} must be floating point [{rows}, d], {rows} and d above 0, got {_about(x)}"
        )
    n = torch.linalg.vector_norm(x.float(), dim=1)
    if len(bad := (~((n >= _LENGTHS[0]) & (n <= _LENGTHS[1]))).nonzero()):
        i = int(bad[0])
        raise ValueError(
            f"{who}: every row of {what} must be finite and of a length within {_LENGTHS[0]}..{_LENGTHS[1]}, row {i} has length "
            f"{float(n[i])} ({len(bad)} such)"
        )
    return n


def _unit(who: str, what: str, rows: str, x: Tensor) -> Tensor:
    n = _lengths(who, what, rows, x)
    return x.float() / n[:, None]


def _mixed(who: str, x: Tensor) -> Tensor:
    n = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if len(bad := (n[:, 0] < _CANCELLED).nonzero()):
        raise ValueError(
            f"{who}: unit vectors must not cancel out, the mean of row {int(bad[0])} has length {float(n[bad[0]]):.1e}"
        )
    return x / n


def _about(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
