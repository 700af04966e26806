"""Where an answer came from, as numbers: attributions are the formulas, shares are exact."""

import math

import numpy as np
import pytest
import torch

from medvl.slides import relevance
from medvl.slides.relevance import TopPatch, patch_relevance, relevance_chunk, top_patches


def routing(n=50, k=6, seed=0):
    """Top-2 routing weights; the last slot has no mass."""
    rng = np.random.default_rng(seed)
    w = rng.random((n, k))
    w[:, -1] = 0
    return np.where(w >= np.sort(w, 1)[:, -2:-1], w, 0), rng.normal(size=k)


# Slots ----------------------------------------------------------------------------------------------------------------------------------
def test_occlusion_is_what_each_token_does(gen):
    x, slope = (torch.randn(5, 3, generator=gen, dtype=torch.float64) for _ in range(2))
    linear = lambda v: (v * slope).flatten(1).sum(-1)
    zero = relevance.occlusion_attribution(linear, x, torch.zeros(3), chunk=2)
    torch.testing.assert_close(zero, (slope * x).sum(-1))
    each = torch.randn(5, 3, generator=gen, dtype=torch.float64)
    crooked = lambda v: torch.tanh(v @ slope.T).flatten(1).logsumexp(-1)
    naive = []
    for i in range(5):
        without = x.clone()
        without[i] = each[i]
        naive.append(crooked(x[None])[0] - crooked(without[None])[0])
    for chunk in (1, 3, 16):
        torch.testing.assert_close(
            relevance.occlusion_attribution(crooked, x, each, chunk=chunk), torch.stack(naive)
        )


def test_attribution_refuses_what_it_cannot_read(gen):
    x = torch.randn(4, 3, generator=gen)
    with pytest.raises(ValueError, match=r"visual must be floats \[k, d\], got torch.int64 \[4\]"):
        relevance.occlusion_attribution(torch.sum, torch.arange(4), torch.zeros(4))
    with pytest.raises(
        ValueError, match=r"baseline must be \[3\] or \[4, 3\] and chunk >= 1, got \[4\] and 16"
    ):
        relevance.occlusion_attribution(lambda v: v.sum((1, 2)), x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"one number per variant, \[1\], got \[1, 4\]"):
        relevance.occlusion_attribution(lambda v: v.sum(-1), x, torch.zeros(3))


# Patches --------------------------------------------------------------------------------------------------------------------------------
def test_relevance_is_the_formula_and_shares_all_out():
    w, a = routing()
    naive = [sum(a[k] * w[j, k] / w[:, k].sum() for k in range(5)) for j in range(50)]
    r = patch_relevance(w, a)
    np.testing.assert_allclose(r, naive, rtol=1e-12)
    assert r.sum() == pytest.approx(a[:5].sum(), abs=1e-12)  # the slot without mass gives nothing
    np.testing.assert_allclose(patch_relevance(torch.tensor(w), torch.tensor(a)), r)
    np.testing.assert_allclose(
        patch_relevance(w * [1, 9, 1e-3, 1, 1e-310, 1], a), r, rtol=1e-6, atol=1e-6
    )  # only shares count
    padded = patch_relevance(np.vstack([w, np.zeros((3, 6))]), a)
    np.testing.assert_array_equal(padded, [*r, 0, 0, 0])
    assert patch_relevance(np.zeros((0, 6)), a).shape == (0,)


def test_relevance_by_chunks_is_that_of_the_whole(monkeypatch):
    w, a = routing(n=70000, k=4)
    whole, totals = patch_relevance(w, a[:4]), w.sum(0)
    pieces = [relevance_chunk(w[i : i + 30000], totals, a[:4]) for i in range(0, 70000, 30000)]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-9, atol=1e-18)
    assert whole.sum() == pytest.approx(a[:3].sum(), rel=1e-9)


def test_what_spoke_against_the_answer():
    w = np.array([[1.0, 1.0], [0.0, 1.0]])
    for sign, wanted in (("signed", [2.0, -1.0]), ("absolute", [4.0, 1.0]), ("positive", [3.0, 0.0])):
        np.testing.assert_array_equal(patch_relevance(w, [3.0, -2.0], sign=sign), wanted)


def test_relevance_refuses_what_is_none():
    w, a = routing()
    with pytest.raises(ValueError, match=r"patch_relevance: weights must be \[n, k\], got \[6\]"):
        patch_relevance(w[0], a)
    with pytest.raises(
        ValueError, match=r"weights must be \[n, k\], finite and >= 0, got \[50, 6\] with 1 wrong"
    ):
        patch_relevance(np.where(w == w.max(), -1, w), a)
    with pytest.raises(ValueError, match=r"must be finite \[6\], totals >= 0, got \[6\] and \[5\]"):
        patch_relevance(w, a[:5])
    with pytest.raises(ValueError, match=r"got \[6\] and \[6\], 0 and 1 of them wrong"):
        patch_relevance(w, [*a[:5], math.nan])  # also of a slot without mass
    with pytest.raises(ValueError, match="sign must be signed, absolute or positive, got 'abs'"):
        patch_relevance(w, a, sign="abs")


def test_percentiles_and_shares():
    np.testing.assert_array_equal(relevance.percentiles([3.0, 1.0, 3.0, 9.0]), [0.625, 0.25, 0.625, 1.0])
    assert relevance.mass_share([3.0, 1.0, -5.0, 0.0], np.array([True, False, True, True])) == 0.75
    assert math.isnan(relevance.mass_share([0.0, -1.0], np.array([True, True])))
    with pytest.raises(ValueError, match=r"chosen must be bool \[2\], got int64 \[2\]"):
        relevance.mass_share([0.0, 1.0], [0, 1])
    with pytest.raises(
        ValueError, match=r"relevance must be \[n\], finite, of at least one patch, got \[2\] with 1 wrong"
    ):
        relevance.percentiles([0.0, math.inf])


def test_top_patches():
    coords = np.arange(10).reshape(5, 2) * 10
    found = top_patches([1.0, 5.0, 2.0, 5.0, 0.0], coords, 3)
    assert [(p.rank, p.row, p.x, p.y, p.relevance) for p in found] == [
        (1, 1, 20, 30, 5.0),
        (2, 3, 60, 70, 5.0),
        (3, 2, 40, 50, 2.0),
    ]
    assert [p.percentile for p in found] == [0.9, 0.9, 0.6]
    assert top_patches([1.0, 2.0], None)[0] == TopPatch(
        rank=1, row=1, x=None, y=None, relevance=2.0, percentile=1.0
    )
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        top_patches([1.0], None, 0)
    with pytest.raises(ValueError, match=r"coords must be \[2, 2\]"):
        top_patches([1.0, 2.0], coords)
