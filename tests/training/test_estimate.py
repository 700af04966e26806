"""estimate: what is foretold without memory against what torch's allocator hands out."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from medvl.base import transfer
from medvl.components.losses import token_cross_entropy
from medvl.hub import skeletons
from medvl.training import estimate
from medvl.weights import four_bit, lazy
from tests import tiny


def handed_out(call):
    """The most bytes that torch's allocator had given at once during a call, above what there was before."""
    call()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    now = top = 0
    for e in prof.profiler.kineto_results.events():
        if e.name() == "[memory]":
            now += e.nbytes()
            top = max(top, now)
    return top


def test_what_is_alive_is_counted():
    w = torch.empty(1000, device="meta")

    def call():
        a = w + 1  # 4000
        b = a * 2  # 8000
        del a
        c = torch.cat([b, b])  # 12000
        del b
        return c[:10] + 1

    assert estimate.peak_of(call, {"weights": w}) == {"weights": 4000, "activations and gradients": 12000}


def test_views_and_what_is_known_count_once():
    w = torch.empty(100, 10, device="meta")
    assert estimate.peak_of(lambda: w.t().view(-1)[:5] if False else w[:5].t(), {"a": w, "b": w[1:]}) == {
        "b": 4000
    }


def test_what_is_alive_is_not_free():
    """Weights, and what a step makes until it goes."""
    meta = torch.device("meta")
    w = torch.empty(1000, device=meta)
    whole = transfer.free_bytes(meta)
    free = []

    def call():
        free.append(transfer.free_bytes(meta))
        a = w + 1
        free.append(transfer.free_bytes(meta))
        del a
        free.append(transfer.free_bytes(meta))

    estimate.peak_of(call, {"weights": w})
    assert [whole - rest for rest in free] == [4000, 8000, 4000]
    assert transfer.free_bytes(meta) == whole


def test_values_of_masks_are_followed():
    """A model that looks at a mask (is there padding? how many images?) finds what is in it."""
    keep, x = torch.tensor([[True, False, True]]), torch.empty(1, 3, 8, device="meta")

    def call():
        mask = keep.to("meta")
        if not mask.all():
            return x[keep.nonzero(as_tuple=True)] * int((mask.sum() + 1).item())
        raise AssertionError("the mask has a gap")

    assert estimate.peak_of(call, {"x": x})["x"] == 96
    with pytest.raises(
        ValueError, match=r"looks at the values of a tensor \[\] float32, which has none here"
    ):
        estimate.peak_of(lambda: x.sum().item(), {})


@pytest.mark.parametrize("kind", ["qwen3", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_training_step_is_foretold_to_a_tenth(kind, base):
    skeleton, params = tiny.model(kind)
    params = four_bit.quantize(params) if base == "nf4" else params
    x = tiny.batch(kind, side="right") | {"use_cache": False}
    x["input_ids"] = x["input_ids"].repeat(1, 1)
    head = next(n for n in ("lm_head.weight", "model.embed_tokens.weight") if n in params)
    names = [n for n in params if n.endswith("_proj.weight") and ".layers." in n]
    factors = {n: [torch.randn(8, params[n].shape[1]), torch.randn(params[n].shape[0], 8)] for n in names}

    def step(skel, p, f, inputs):
        leaves = {n: [t.detach().requires_grad_() for t in ab] for n, ab in f.items()}
        held = {**p, **{n: lazy.low_rank(p[n], *ab) for n, ab in leaves.items()}, head: lazy.passed(p[head])}
        hidden = skel(held, **inputs).logits
        loss, _ = token_cross_entropy(hidden, p[head], inputs["input_ids"], chunk=8)
        return torch.autograd.grad(loss, [t for ab in leaves.values() for t in ab], allow_unused=True)

    real = handed_out(lambda: step(skeleton, params, factors, x))
    meta = {n: w.to("meta") for n, w in params.items()}
    f = {n: [t.to("meta") for t in ab] for n, ab in factors.items()}
    seen = {
        k: t.to("meta") if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in x.items()
    }
    bare = skeletons.empty_skeleton(tiny.CONFIGS[kind], head="language")
    parts = estimate.peak_of(lambda: step(bare, meta, f, seen), {"weights": meta, "factors": f})
    assert parts["activations and gradients"] == pytest.approx(real, rel=0.1)
    assert parts["weights"] == lazy.nbytes(params)


def test_dropping_activations_is_seen():
    skeleton = skeletons.empty_skeleton(tiny.CONFIGS["qwen3"], head="language")
    meta = {
        n: torch.empty(p.shape, device="meta", requires_grad=True)
        for n, p in skeleton.module.named_parameters()
    }
    ids = torch.ones(8, 128, dtype=torch.int64)

    def peak(skel):
        call = lambda: torch.autograd.grad(
            skel(meta, input_ids=ids, use_cache=False).logits.sum(), list(meta.values()), allow_unused=True
        )
        return sum(estimate.peak_of(call, {"weights": meta}).values())

    assert peak(skeletons.checkpointed(skeleton)) < 0.7 * peak(skeleton)


def test_a_weight_in_four_bits_counts_its_bytes():
    q = four_bit.quantize_matrix(torch.empty(256, 128, device="meta"))
    assert lazy.nbytes({"q": q}) == lazy.nbytes({"q": four_bit.quantize_matrix(torch.randn(256, 128))})
    parts = estimate.peak_of(lambda: F.linear(torch.empty(2, 128, device="meta"), q), {"q": q})
    assert parts["q"] == lazy.nbytes({"q": q})


def test_a_matrix_in_parts_is_whole_while_it_is_used():
    part, x = torch.empty(50, 100, device="meta", requires_grad=True), torch.empty(3, 100, device="meta")

    def used():
        with torch.no_grad():
            return F.linear(F.linear(x, estimate.gathered(part, 100)), estimate.gathered(part, 100))

    small = 3 * 100 * 4
    assert estimate.peak_of(used, {"part": part, "x": x}) == {
        "part": 20_000,
        "x": small,
        "activations and gradients": 40_000 + 2 * small,
    }

    def gradient():
        y = F.linear(x, estimate.gathered(part, 100))  # x is frozen, so that no whole weight is kept for it
        return torch.autograd.grad(y, [part], torch.empty_like(y))

    parts = estimate.peak_of(gradient, {"part": part, "x": x})
    assert (
        parts["activations and gradients"] == 40_000 + 20_000 + 2 * small
    )  # of the whole gradient, and what is kept of it
    assert repr(estimate.gathered(part, 100)) == "_Part([100, 100], float32, 50 rows of it here)"
