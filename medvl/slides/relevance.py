"""Attribution of an answer about a slide: to its visual tokens (slots), and from there to its patches."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

Sign = Literal["signed", "absolute", "positive"]
_CHUNK = 65536  # patches whose weights are converted to float64 at once


# Slots --------------------------------------------------------------------------------------------------
@torch.no_grad()
def occlusion_attribution(
    score: Callable[[Tensor], Tensor], visual: Tensor, baseline: Tensor, *, chunk: int = 16
) -> Tensor:
    """Drop of an answer's score when one visual token is replaced by a baseline; k + 1 forward passes.

    Args:
        score: visual tokens [b, k, d] -> [b], for example the log-likelihood of the answer.
        visual: [k, d].
        baseline: [d] or [k, d], for example zeros or the mean token of many slides.
        chunk: variants that are scored at once.
    Returns:
        [k]; positive where the token raised the score.
    Raises:
        ValueError: visual or baseline have another shape, chunk < 1, or score does not give one number per
            variant.
    Source: Zeiler and Fergus 2014, arXiv:1311.2901, section 4.2.
    """
    if visual.dim() != 2 or not visual.is_floating_point() or not visual.numel():
        raise ValueError(
            f"occlusion_attribution: visual must be floats [k, d], got {visual.dtype} {list(visual.shape)}"
        )
    if baseline.shape not in (visual.shape, visual.shape[1:]) or chunk < 1:
        allowed = f"[{visual.shape[1]}] or {list(visual.shape)}"
        raise ValueError(
            f"occlusion_attribution: baseline must be {allowed} and chunk >= 1, "
            f"got {list(baseline.shape)} and {chunk}"
        )
    # All variants that lack one token are scored, `chunk` of them at once, against all tokens together.
    tokens = torch.arange(len(visual), device=visual.device)
    complete = _scores(score, visual[None])
    occluded = []
    for replaced in tokens.split(chunk):
        is_replaced = (replaced[:, None] == tokens)[..., None]  # [variants, k, 1]
        occluded.append(_scores(score, torch.where(is_replaced, baseline.to(visual), visual)))
    return complete - torch.cat(occluded)


def _scores(score: Callable[[Tensor], Tensor], variants: Tensor) -> Tensor:
    values = score(variants)
    if values.shape != variants.shape[:1]:
        raise ValueError(
            f"occlusion_attribution: score must give one number per variant, [{len(variants)}], "
            f"got {list(values.shape)}"
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


# Patches ------------------------------------------------------------------------------------------------
def patch_relevance(weights: Any, slots: Any, *, sign: Sign = "signed") -> np.ndarray:
    """Share of each patch in the relevance of the slots: r_j = sum_k a_k w_jk / W_k, where W_k = sum_j w_jk.

    Exact where a slot is a weighted mean of its patches: the r_j sum to the sum of a_k over the slots with
    mass. A slot without mass contributes nothing.

    Args:
        weights: routing weights [n, k] >= 0, 0 for padding.
        slots: relevance a of the slots [k].
        sign: what a slot with a_k < 0, which lowered the score, counts: "signed" a_k, "absolute" -a_k,
            "positive" 0. This is decided per slot and not per patch: a patch that feeds two slots keeps what
            one of them contributed.
    Returns:
        [n], float64.
    Raises:
        ValueError: weights are not [n, k] or below 0, slots are not [k], a value is not finite, or another
            sign.
    """
    # A tensor stays one: it may be on a GPU or bfloat16, and is converted chunk by chunk.
    array = weights if isinstance(weights, Tensor) else np.asarray(weights)
    if array.ndim != 2:
        raise ValueError(f"patch_relevance: weights must be [n, k], got {list(array.shape)}")
    # A slide has up to a million patches; a float64 copy of all weights would take several GB.
    chunks = [array[i : i + _CHUNK] for i in range(0, len(array), _CHUNK)]
    totals = np.zeros(array.shape[1])
    for chunk in chunks:
        totals = totals + as_routing_weights("patch_relevance", chunk).sum(0)
    # A second pass: the share of a patch needs the total of its slots over all patches.
    relevance = [relevance_chunk(chunk, totals, slots, sign=sign) for chunk in chunks]
    return np.concatenate([np.zeros(0), *relevance])  # [0] where the slide has no patch


def relevance_chunk(weights: Any, totals: Any, slots: Any, *, sign: Sign = "signed") -> np.ndarray:
    """`patch_relevance` of m patches of a slide: from their weights [m, k] and the totals W_k [k] of all."""
    w = as_routing_weights("relevance_chunk", weights)
    mass = np.asarray(_to_numpy(totals), float)
    a = np.asarray(_to_numpy(slots), float)
    wrong_mass = ~np.isfinite(mass) | (mass < 0)
    wrong_slots = ~np.isfinite(a)
    if not (mass.shape == a.shape == w.shape[1:]) or wrong_mass.any() or wrong_slots.any():
        raise ValueError(
            f"relevance_chunk: totals and slots must be finite [{w.shape[1]}], totals >= 0, "
            f"got {list(mass.shape)} and {list(a.shape)}, "
            f"{wrong_mass.sum()} and {wrong_slots.sum()} of them wrong"
        )
    if sign not in ("signed", "absolute", "positive"):
        raise ValueError(f"relevance_chunk: sign must be signed, absolute or positive, got {sign!r}")
    if sign == "absolute":
        a = np.abs(a)
    elif sign == "positive":
        a = np.maximum(a, 0)
    # The weights are divided first: a / mass could overflow where the mass is tiny.
    shares = np.divide(w, mass, out=np.zeros_like(w), where=mass > 0)
    return shares @ a


def percentiles(relevance: Any) -> np.ndarray:
    """Rank of each patch divided by n, in (0, 1]; equal patches share their mean rank. [n] -> [n]."""
    from scipy.stats import rankdata

    r = as_relevance("percentiles", relevance)
    return rankdata(r) / len(r)


def mass_share(relevance: Any, chosen: Any) -> float:
    """Share of the positive relevance [n] in the chosen patches (bool [n]); NaN where no patch is positive.

    Raises:
        ValueError: relevance is not [n] and finite, or chosen is not bool [n].
    """
    r = as_relevance("mass_share", relevance)
    mask = np.asarray(_to_numpy(chosen))
    if mask.shape != r.shape or mask.dtype != bool:
        raise ValueError(f"mass_share: chosen must be bool [{len(r)}], got {mask.dtype} {list(mask.shape)}")
    positive = np.maximum(r, 0)
    total = float(positive.sum())
    if not total:
        return math.nan
    return float(positive[mask].sum()) / total


@frozen(kw_only=True)
class TopPatch:
    """One of the most relevant patches."""

    rank: int  # from 1
    row: int  # in the slide's features
    x: int | None  # upper left corner in level-0 pixels; None: no coordinates
    y: int | None
    relevance: float
    percentile: float


def top_patches(relevance: Any, coords: Any, k: int = 15) -> list[TopPatch]:
    """The k (or all n) most relevant patches, best first, equal ones in the order of their rows.

    Raises:
        ValueError: relevance is not [n], coords are not [n, 2] or None, or k < 1.
    """
    r = as_relevance("top_patches", relevance)
    xy = None if coords is None else as_coords("top_patches", coords, len(r))
    if k < 1:
        raise ValueError(f"top_patches: k must be >= 1, got {k}")
    percentile = percentiles(r)
    best_rows = np.argsort(-r, kind="stable")[:k].tolist()
    patches = []
    for rank, row in enumerate(best_rows, 1):
        x = y = None
        if xy is not None:
            x, y = round(xy[row, 0]), round(xy[row, 1])
        patch = TopPatch(
            rank=rank, row=row, x=x, y=y, relevance=float(r[row]), percentile=float(percentile[row])
        )
        patches.append(patch)
    return patches


# Arguments ----------------------------------------------------------------------------------------------
def as_routing_weights(caller: str, weights: Any) -> np.ndarray:
    """Weights as float64 [n, k], finite and >= 0; errors name the caller."""
    w = np.asarray(_to_numpy(weights), float)
    wrong = ~np.isfinite(w) | (w < 0)
    if w.ndim != 2 or wrong.any():
        raise ValueError(
            f"{caller}: weights must be [n, k], finite and >= 0, "
            f"got {list(w.shape)} with {wrong.sum()} wrong values"
        )
    return w


def as_relevance(caller: str, relevance: Any) -> np.ndarray:
    """Relevance as float64 [n], finite, n > 0; errors name the caller."""
    r = np.asarray(_to_numpy(relevance), float)
    wrong = ~np.isfinite(r)
    if r.ndim != 1 or not len(r) or wrong.any():
        raise ValueError(
            f"{caller}: relevance must be [n], finite, of at least one patch, "
            f"got {list(r.shape)} with {wrong.sum()} wrong values"
        )
    return r


def as_coords(caller: str, coords: Any, n: int) -> np.ndarray:
    """Coordinates as float64 [n, 2], finite; errors name the caller."""
    xy = np.asarray(_to_numpy(coords), float)
    if xy.shape != (n, 2) or not np.isfinite(xy).all():
        raise ValueError(
            f"{caller}: coords must be [{n}, 2] (x, y) in level-0 pixels, finite, or None, "
            f"got {list(xy.shape)}"
        )
    return xy


def _to_numpy(values: Any) -> Any:
    """Tensors of floats as float64 arrays (NumPy has no bfloat16); anything else as it is."""
    if isinstance(values, Tensor) and values.is_floating_point():
        return values.detach().cpu().double().numpy()
    return values
