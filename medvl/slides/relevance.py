"""Where an answer came from, as numbers: how much each slot moved it, and the share of every patch in that."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

Sign = Literal["signed", "absolute", "positive"]


# Slots ----------------------------------------------------------------------------------------------------------------------------------
def gradient_attribution(
    score: Callable[[Tensor], Tensor], visual: Tensor, *, signed: bool = False
) -> Tensor:
    """How much each visual token moved an answer: gradient times input.

    Forward and gradient run inside this one call, and no parameter is touched. It goes through whatever `train.value_and_grad` does.

    Args:
        score: visual [k, d] -> a number, as the log-likelihood of the answer.
        visual: visual tokens [k, d], as they enter the language model.
        signed: keep the sign (positive = raised the score) instead of taking its absolute value.
    Returns:
        [k], float32 or wider: sum over d of gradient * input, which to first order is by how much the score drops when the token is 0.
    Raises:
        ValueError: visual is not [k, d] of floats, the score is no single number or does not depend on the visual tokens.
    Source: Shrikumar et al. 2016, arXiv:1605.01713, section 3.3.
    """
    _check_visual("gradient_attribution", visual)
    leaf = visual.detach().requires_grad_()
    with torch.enable_grad():
        value = score(leaf)
    if value.numel() != 1:
        raise ValueError(f"gradient_attribution: score must give one number, got {list(value.shape)}")
    (slope,) = (
        torch.autograd.grad(value, [leaf], torch.ones_like(value), allow_unused=True)
        if value.requires_grad
        else (None,)
    )
    if slope is None:
        raise ValueError(
            "gradient_attribution: the score must depend on the visual tokens, got one that does not; is it under no_grad?"
        )
    wide = torch.promote_types(visual.dtype, torch.float32)
    product = (slope.to(wide) * leaf.detach().to(wide)).sum(-1)
    return product if signed else product.abs()


@torch.no_grad()
def occlusion_attribution(
    score: Callable[[Tensor], Tensor], visual: Tensor, baseline: Tensor, *, chunk: int = 16
) -> Tensor:
    """By how much an answer's score drops when one visual token is replaced by a baseline token. Exact, for k + 1 forward passes.

    Args:
        score: visual tokens [b, k, d] -> [b], as the log-likelihood of the answer for each.
        visual: [k, d].
        baseline: [d] or [k, d], as zeros or the mean token of many slides.
        chunk: variants that are scored at once.
    Returns:
        [k]; positive where the token raised the score.
    Raises:
        ValueError: visual or baseline have another shape, chunk < 1, or score gives not one number per variant.
    Source: Zeiler and Fergus 2014, arXiv:1311.2901, section 4.2.
    """
    _check_visual("occlusion_attribution", visual)
    if baseline.shape not in (visual.shape, visual.shape[1:]) or chunk < 1:
        allowed = f"[{visual.shape[1]}] or {list(visual.shape)}"
        raise ValueError(
            f"occlusion_attribution: baseline must be {allowed} and chunk >= 1, got {list(baseline.shape)} and {chunk}"
        )
    whole, parts = _scored(score, visual[None]), []
    for at in torch.arange(len(visual), device=visual.device).split(chunk):
        chosen = at[:, None] == torch.arange(len(visual), device=visual.device)
        parts.append(_scored(score, torch.where(chosen[..., None], baseline.to(visual), visual)))
    return whole - torch.cat(parts)


def attention_attribution(attentions: Sequence[Tensor], rows: Any, slots: Any) -> Tensor:
    """Attention that an answer paid to each visual token: the mean over layers, heads and the answer's positions.

    Args:
        attentions: one [h, t, t] per layer (of one sample): from position (row) to position (column), rows summing to 1.
        rows: int [m], positions that predict the answer: each lies one before a token of the answer.
        slots: int [k], positions of the visual tokens.
    Returns:
        [k], at least 0, not normalised: the rest of 1 went to other tokens.
    Raises:
        ValueError: no layer or row, a layer of another shape, or positions outside of 0..t-1.
    """
    t = attentions[0].shape[-1] if len(attentions) else 0
    at, to = (torch.as_tensor(i).long().flatten() for i in (rows, slots))
    if not t or any(a.dim() != 3 or a.shape[1:] != (t, t) for a in attentions):
        raise ValueError(
            f"attention_attribution: needs layers of [h, t, t], got {[list(a.shape) for a in attentions]}"
        )
    if not len(at) or not len(to) or min(at.min(), to.min()) < 0 or max(at.max(), to.max()) >= t:
        raise ValueError(
            f"attention_attribution: rows and slots must be positions in 0..{t - 1}, got {at.tolist()} and {to.tolist()}"
        )
    return torch.stack(
        [a[:, at.to(a.device)][..., to.to(a.device)].double().mean((0, 1)).cpu() for a in attentions]
    ).mean(0)


def _check_visual(where: str, visual: Tensor) -> None:
    if visual.dim() != 2 or not visual.is_floating_point() or not visual.numel():
        raise ValueError(f"{where}: visual must be floats [k, d], got {visual.dtype} {list(visual.shape)}")


def _scored(score: Callable[[Tensor], Tensor], variants: Tensor) -> Tensor:
    values = score(variants)
    if values.shape != variants.shape[:1]:
        raise ValueError(
            f"occlusion_attribution: score must give one number per variant, [{len(variants)}], got {list(values.shape)}"
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


# Patches --------------------------------------------------------------------------------------------------------------------------------
def patch_relevance(weights: Any, slots: Any, *, sign: Sign = "signed") -> np.ndarray:
    """Share of every patch in the relevance of the slots: r_j = sum_k a_k w_jk / W_k, where W_k = sum_j w_jk.

    Exact where a slot is a weighted mean of its patches: the r_j sum to the sum of a_k over the slots with mass. A slot without mass
    gives nothing to any patch.

    Args:
        weights: routing weights [n, k] >= 0, 0 for padding.
        slots: relevance of the slots [k].
        sign: what a slot with a_k < 0 (one that spoke against the answer) counts: "signed" a_k, "absolute" -a_k, "positive" 0. It is
            decided per slot, before patches are shared out, so that a patch of two slots keeps what one of them brought.
    Returns:
        [n], float64.
    Raises:
        ValueError: weights are not [n, k] or below 0, slots are not [k], anything is nan or infinite, or another sign.
    """
    whole = weights if isinstance(weights, Tensor) else np.asarray(weights)
    if whole.ndim != 2:
        raise ValueError(f"patch_relevance: weights must be [n, k], got {list(whole.shape)}")
    pieces = [whole[i : i + 65536] for i in range(0, len(whole), 65536)]  # in float64 only piece by piece
    totals = sum((as_routing_weights("patch_relevance", p).sum(0) for p in pieces), np.zeros(whole.shape[1]))
    return np.concatenate([np.zeros(0), *(relevance_chunk(p, totals, slots, sign=sign) for p in pieces)])


def relevance_chunk(weights: Any, totals: Any, slots: Any, *, sign: Sign = "signed") -> np.ndarray:
    """`patch_relevance` of some patches of a slide [m, k], given the totals W_k [k] over all its patches. Arguments and errors as there."""
    w = as_routing_weights("relevance_chunk", weights)
    mass, a = (np.asarray(_host(v), float) for v in (totals, slots))
    if (
        not (mass.shape == a.shape == w.shape[1:])
        or not np.isfinite(mass).all()
        or (mass < 0).any()
        or not np.isfinite(a).all()
    ):
        raise ValueError(
            f"relevance_chunk: totals and slots must be finite [{w.shape[1]}], totals >= 0, got {list(mass.shape)} and {list(a.shape)}, "
            f"{(~np.isfinite(mass) | (mass < 0)).sum()} and {(~np.isfinite(a)).sum()} of them wrong"
        )
    if sign not in ("signed", "absolute", "positive"):
        raise ValueError(f"relevance_chunk: sign must be signed, absolute or positive, got {sign!r}")
    a = np.abs(a) if sign == "absolute" else np.maximum(a, 0) if sign == "positive" else a
    return (
        np.divide(w, mass, out=np.zeros_like(w), where=mass > 0) @ a
    )  # divided first: 1 / a tiny mass may be infinite


def percentiles(relevance: Any) -> np.ndarray:
    """Rank of each patch / n, in (0, 1]; equal patches share the mean of their ranks. [n] -> [n]."""
    from scipy.stats import rankdata

    r = as_relevance("percentiles", relevance)
    return rankdata(r) / len(r)


def mass_share(relevance: Any, chosen: Any) -> float:
    """Share of the positive relevance [n] that the chosen patches (bool [n]) hold; nan where no patch has any.

    Raises:
        ValueError: relevance is not [n] and finite, or chosen is not bool [n].
    """
    r, c = as_relevance("mass_share", relevance), np.asarray(_host(chosen))
    if c.shape != r.shape or c.dtype != bool:
        raise ValueError(f"mass_share: chosen must be bool [{len(r)}], got {c.dtype} {list(c.shape)}")
    positive = np.maximum(r, 0)
    total = float(positive.sum())
    return float(positive[c].sum()) / total if total else math.nan


@frozen(kw_only=True)
class TopPatch:
    """One of the most relevant patches: rank from 1, row in the slide's features, corner in level-0 pixels (None: no coordinates)."""

    rank: int
    row: int
    x: int | None
    y: int | None
    relevance: float
    percentile: float


def top_patches(relevance: Any, coords: Any, k: int = 15) -> list[TopPatch]:
    """The k (or all n) most relevant patches, best first, equal ones in the order of their rows.

    Raises:
        ValueError: relevance is not [n], coords are not [n, 2] or None, or k < 1.
    """
    r = as_relevance("top_patches", relevance)
    at = None if coords is None else as_coords("top_patches", coords, len(r))
    if k < 1:
        raise ValueError(f"top_patches: k must be >= 1, got {k}")
    share = percentiles(r)
    best = np.argsort(-r, kind="stable")[:k].tolist()
    corner = [(None, None) if at is None else (round(at[j, 0]), round(at[j, 1])) for j in best]
    rows = zip(best, corner, strict=True)
    return [
        TopPatch(rank=i, row=j, x=x, y=y, relevance=float(r[j]), percentile=float(share[j]))
        for i, (j, (x, y)) in enumerate(rows, 1)
    ]


def _host(values: Any) -> Any:
    return (
        values.detach().cpu().double().numpy()
        if isinstance(values, Tensor) and values.is_floating_point()
        else values
    )


def as_routing_weights(where: str, weights: Any) -> np.ndarray:
    """float64 [n, k], finite and >= 0; `where` is who says what is wrong."""
    w = np.asarray(_host(weights), float)
    if w.ndim != 2 or not np.isfinite(w).all() or (w < 0).any():
        wrong = int((~np.isfinite(w) | (w < 0)).sum())
        raise ValueError(
            f"{where}: weights must be [n, k], finite and >= 0, got {list(w.shape)} with {wrong} wrong values"
        )
    return w


def as_relevance(where: str, relevance: Any) -> np.ndarray:
    """float64 [n], finite, n > 0."""
    r = np.asarray(_host(relevance), float)
    if r.ndim != 1 or not len(r) or not np.isfinite(r).all():
        wrong = int((~np.isfinite(r)).sum())
        raise ValueError(
            f"{where}: relevance must be [n], finite, of at least one patch, got {list(r.shape)} with {wrong} wrong values"
        )
    return r


def as_coords(where: str, coords: Any, n: int) -> np.ndarray:
    """float64 [n, 2], finite."""
    at = np.asarray(_host(coords), float)
    if at.shape != (n, 2) or not np.isfinite(at).all():
        raise ValueError(
            f"{where}: coords must be [{n}, 2] (x, y) in level-0 pixels, finite, or None, got {list(at.shape)}"
        )
    return at
