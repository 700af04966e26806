"""The compressor against the reference's formulas as a module, against naive softmaxes, and its streams against one shot."""

import math
import pickle
import subprocess
import sys
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from torch import nn

from medvl.base import tree
from medvl.components import slots
from medvl.components.compress import (
    CompressConfig,
    begin_state,
    compress,
    compress_stream,
    finalize_state,
    init_compress,
    merge_states,
    reference_aux,
    slot_weights,
    update_state,
)

D, K, H = 24, 6, 10
CONFIGS = {
    "moe": CompressConfig(dim=D, slots=K, hidden=H),
    "soft_moe": CompressConfig(kind="soft_moe", dim=D, slots=K, hidden=H),
    "mean": CompressConfig(kind="mean", dim=D, slots=K, hidden=H),
    "attention": CompressConfig(kind="attention", dim=D, slots=K, hidden=H, heads=4),
    "perceiver": CompressConfig(kind="perceiver", dim=D, slots=K, hidden=H, heads=4),
    "perceiver 2": CompressConfig(kind="perceiver", dim=D, slots=K, hidden=H, heads=4, passes=2),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)


def _case(kind, gen, dtype=torch.float64, scale=0.4):
    cfg = CONFIGS[kind]
    return cfg, tree.map_leaves(
        lambda t: (torch.randn(t.shape, generator=gen).double() * scale).to(dtype), init_compress(cfg, gen)
    )


def _patches(gen, *shape, dtype=torch.float64):
    """With a mean, as features have: else pooled tokens would all be near 0."""
    return torch.randn(*shape, generator=gen).to(dtype) + torch.linspace(-1, 1, shape[-1]).to(dtype)


def _close(got, want, **tolerance):
    for name in ("tokens", "mass", "count"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert got.aux.keys() == want.aux.keys()
    for name, t in want.aux.items():
        torch.testing.assert_close(got.aux[name], t, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# The reference --------------------------------------------------------------------------------------------------------------------------
class Expert(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(d, hidden), nn.GELU(), nn.Dropout(0.25), nn.Linear(hidden, d), nn.LayerNorm(d)
        )

    def forward(self, c):
        return c + self.net(c)


class Reference(nn.Module):
    """One slide [n, d], slot by slot."""

    def __init__(self, d, slots, hidden, top_k=2):
        super().__init__()
        self.gate, self.experts, self.top_k = (
            nn.Linear(d, slots),
            nn.ModuleList(Expert(d, hidden) for _ in range(slots)),
            top_k,
        )

    def forward(self, x):
        logits = self.gate(x)
        p = logits.softmax(-1)
        value, index = p.topk(self.top_k, -1)
        tokens, mass, count = [], [], []
        for i, expert in enumerate(self.experts):
            w = (value * (index == i)).sum(-1)
            tokens.append(expert((w[:, None] * x).sum(0) / (w.sum() + 1e-9)))
            mass.append(w.sum())
            count.append((index == i).sum())
        k, mean, f = len(self.experts), p.mean(0), torch.stack(count).to(x) / len(x)
        entropy = 1 + (mean * mean.log()).sum() / math.log(k)
        aux = k * (mean * f).sum() + 0.5 * entropy + 1e-4 * logits.logsumexp(-1).mean() ** 2
        return torch.stack(tokens), torch.stack(mass), torch.stack(count), aux


def ours(module):
    """A module's state as params, by hand."""
    state, k = module.state_dict(), len(module.experts)
    names = {"up": 0, "down": 3, "norm": 4}
    experts = {
        n: {w: torch.stack([state[f"experts.{i}.net.{j}.{w}"] for i in range(k)]) for w in ("weight", "bias")}
        for n, j in names.items()
    }
    return {"gate": {w: state[f"gate.{w}"] for w in ("weight", "bias")}, "experts": experts}


def _reference(gen, dtype=torch.float64, **sizes):
    module = Reference(**{"d": D, "slots": K, "hidden": H} | sizes).to(dtype).eval()
    for p in module.parameters():
        p.data = (torch.randn(p.shape, generator=gen) * 0.4).to(dtype)
    return module


@pytest.mark.parametrize("n", [1, 2, 17, 5000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_moe_is_the_reference(n, dtype, tolerance, gen):
    module, x = _reference(gen, dtype), _patches(gen, n, D, dtype=dtype)
    tokens, mass, count, aux = module(x)
    got = compress(CONFIGS["moe"], ours(module), x[None])
    torch.testing.assert_close(got.tokens[0], tokens, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.mass[0], mass, atol=tolerance, rtol=tolerance)
    assert torch.equal(got.count[0], count)
    torch.testing.assert_close(reference_aux(got.aux), aux, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 17, 5000])
def test_float32_at_full_size_is_as_near_to_the_truth_as_the_reference(n, gen):
    """Relative to the largest: what is left is float32 rounding in the experts' products, the same in both."""
    sizes = {"d": 1024, "slots": 16, "hidden": 512}
    module, x = _reference(gen, torch.float32, **sizes), _patches(gen, n, 1024, dtype=torch.float32)
    for p in module.parameters():
        p.data *= (
            2.5 * p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0
        )  # so that products of this width are of size 1
    tokens, mass, count, _ = module(x)
    got = compress(CompressConfig(dim=1024, slots=16, hidden=512), ours(module), x[None])
    true_tokens, true_mass, true_count, _ = module.double()(x.double())
    assert torch.equal(got.count[0], count)
    assert torch.equal(count, true_count)
    for mine, theirs, truth in ((got.tokens[0], tokens, true_tokens), (got.mass[0], mass, true_mass)):
        top, away = truth.abs().max(), lambda a, b: (a.double() - b).abs().max()
        assert away(mine, truth) <= 1e-6 * top
        assert away(mine, theirs.double()) <= 1e-6 * top
        assert away(mine, truth) <= 1.5 * away(theirs, truth) + 1e-7 * top


@pytest.mark.parametrize("top_k", [1, 3, K])
def test_other_numbers_of_slots_per_patch(top_k, gen):
    module, x = _reference(gen, top_k=top_k), _patches(gen, 40, D)
    got = compress(evolve(CONFIGS["moe"], top_k=top_k), ours(module), x[None])
    torch.testing.assert_close(got.tokens[0], module(x)[0])
    torch.testing.assert_close(reference_aux(got.aux), module(x)[3])


def test_gradients_are_the_references(gen):
    module, x = _reference(gen), _patches(gen, 1500, D).requires_grad_()  # two blocks
    tokens, _, _, aux = module(x)
    weight = torch.randn(tokens.shape, generator=gen).double()
    want = torch.autograd.grad((tokens * weight).sum() + 3 * aux, [x, *module.parameters()])
    params = tree.map_leaves(lambda t: t.requires_grad_(), ours(module))
    got = compress(CONFIGS["moe"], params, x[None])
    flat = tree.flatten(params)
    grads = torch.autograd.grad(
        (got.tokens[0] * weight).sum() + 3 * reference_aux(got.aux), [x, *flat.values()]
    )
    torch.testing.assert_close(grads[0], want[0])
    found = tree.unflatten(dict(zip(flat, grads[1:], strict=True)))
    named = dict(zip((n for n, _ in module.named_parameters()), want[1:], strict=True))
    for name, g in named.items():
        part, *where, kind = name.split(".")
        there = (
            found["gate"][kind]
            if part == "gate"
            else found["experts"][{"0": "up", "3": "down", "4": "norm"}[where[2]]][kind][int(where[0])]
        )
        torch.testing.assert_close(there, g, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("sizes", "count"), [((1024, 16), 16_850_960), ((1024, 32), 33_701_920), ((512, 32), 16_859_168)]
)
def test_number_of_parameters(sizes, count, gen):
    assert tree.count_values(init_compress(CompressConfig(dim=sizes[0], slots=sizes[1]), gen)) == count


def test_balance_is_the_one_of_transformers(gen):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    module, x = _reference(gen), _patches(gen, 3, 30, D)
    mask = torch.arange(30) < torch.tensor([30, 11, 1])[:, None]
    logits = module.gate(x)
    got = compress(CONFIGS["moe"], ours(module), x, mask).aux
    want = load_balancing_loss_func((logits.flatten(0, 1),), K, 2, mask.long())
    torch.testing.assert_close(got["balance"], want.double(), atol=1e-6, rtol=1e-6)
    valid = logits[mask]
    lse, total = valid.logsumexp(-1), valid.softmax(-1).sum(0)
    share = total / len(valid)
    want = {
        "importance": (total.std(unbiased=False) / total.mean()) ** 2,
        "entropy": 1 - torch.special.entr(share).sum() / math.log(K),
        "z_loss": lse.square().mean(),
        "z_reference": lse.mean() ** 2,
    }
    for name, t in want.items():
        torch.testing.assert_close(got[name], t)
    torch.testing.assert_close(
        reference_aux(got), got["balance"] + 0.5 * want["entropy"] + 1e-4 * want["z_reference"]
    )


def test_uniform_and_collapsed_routers(gen):
    cfg, p = _case("moe", gen)
    p["gate"] = tree.map_leaves(torch.zeros_like, p["gate"])
    out = compress(cfg, p, _patches(gen, 2, 9, D), routing=True)
    assert out.count.tolist() == [[9, 9, 0, 0, 0, 0]] * 2  # the first of equal slots
    want = {"balance": 2.0, "importance": 0.0, "entropy": 0.0}
    assert {n: round(float(out.aux[n]), 12) for n in want} == want
    p["gate"]["bias"][3] = 60.0
    aux = compress(cfg, p, _patches(gen, 2, 9, D)).aux
    torch.testing.assert_close(
        torch.stack([aux[n] for n in ("importance", "entropy")]), torch.tensor([K - 1.0, 1.0]).double()
    )


def test_noise_and_dropout_need_a_generator(gen):
    cfg, p = _case("moe", gen)
    x, draw = _patches(gen, 1, 50, D), lambda: torch.Generator().manual_seed(4)
    plain = compress(cfg, p, x)
    assert torch.equal(plain.tokens, compress(cfg, p, x).tokens)
    assert torch.equal(compress(cfg, p, x, gen=draw()).tokens, compress(cfg, p, x, gen=draw()).tokens)
    still = evolve(cfg, noise=0.0, dropout=0.0)
    assert torch.equal(plain.tokens, compress(still, p, x, gen=draw()).tokens)
    noisy = compress(evolve(cfg, dropout=0.0), p, x, gen=draw())
    logits = x[0] @ p["gate"]["weight"].T + p["gate"]["bias"] + 0.1 * torch.randn(50, K, generator=draw())
    torch.testing.assert_close(
        noisy.aux["z_loss"], logits.logsumexp(-1).square().mean(), atol=1e-6, rtol=1e-6
    )


@kinds
def test_dropout_keeps_the_mean(kind, gen):
    cfg, p = _case(kind, gen)
    cfg, x = evolve(cfg, noise=0.0, dropout=0.5), _patches(gen, 1, 50, D)
    hidden = slots.dropout(torch.ones(400, 100), 0.5, gen)
    assert set(hidden.unique().tolist()) == {0.0, 2.0}
    assert abs(float(hidden.mean()) - 1) < 0.02
    assert not torch.allclose(compress(cfg, p, x, gen=gen).tokens, compress(cfg, p, x).tokens)
    assert torch.equal(compress(evolve(cfg, dropout=0.0), p, x, gen=gen).tokens, compress(cfg, p, x).tokens)


# The other kinds ------------------------------------------------------------------------------------------------------------------------
def _mlp(p, c):
    out = []
    for i in range(len(c)):
        h = F.gelu(p["up"]["weight"][i] @ c[i] + p["up"]["bias"][i])
        h = p["down"]["weight"][i] @ h + p["down"]["bias"][i]
        out.append(c[i] + F.layer_norm(h, h.shape, p["norm"]["weight"][i], p["norm"]["bias"][i]))
    return torch.stack(out)


def _soft_moe(cfg, p, x):
    cosine = x @ p["mu"].T / (x.norm(dim=-1)[:, None] * p["mu"].norm(dim=-1))
    dispatch = (p["scale"] * cosine).softmax(0)
    return _mlp(p["experts"], dispatch.T @ x), dispatch


def _mean(cfg, p, x):
    return _mlp(p["experts"], x.mean(0).expand(cfg.slots, -1)), torch.full(
        (len(x), cfg.slots), 1 / len(x), dtype=x.dtype
    )


def _attention(cfg, p, x):
    lin = lambda n, z: z @ p[n]["weight"].T + p[n]["bias"]
    scores = lin("score", torch.tanh(lin("tanh", x)) * torch.sigmoid(lin("sigmoid", x)))
    size, a = cfg.dim // cfg.heads, scores.softmax(0)
    tokens = [
        torch.cat([a[:, h * cfg.slots + i] @ x[:, h * size : (h + 1) * size] for h in range(cfg.heads)])
        for i in range(cfg.slots)
    ]
    return torch.stack(tokens), a.view(len(x), cfg.heads, cfg.slots).mean(1)


def _perceiver(cfg, p, x):
    norm = lambda q, z: F.layer_norm(z, z.shape[-1:], q["weight"], q["bias"])
    split = lambda z: z.view(len(z), cfg.heads, -1).transpose(0, 1)
    z = p["latents"]
    for layer in p["layers"].values():
        latents = norm(layer["latents"], z)
        seen = torch.cat([norm(layer["patches"], x), latents])
        q, k, v = (
            split(latents @ layer["q"]["weight"].T),
            split(seen @ layer["k"]["weight"].T),
            split(seen @ layer["v"]["weight"].T),
        )
        a = (q @ k.transpose(1, 2) / (cfg.dim // cfg.heads) ** 0.5).softmax(-1)
        z = z + (a @ v).transpose(0, 1).flatten(1) @ layer["out"]["weight"].T
        z = z + F.gelu(norm(layer["norm"], z) @ layer["up"]["weight"].T) @ layer["down"]["weight"].T
    return norm(p["norm"], z), a.mean(0)[:, : len(x)].T


NAIVE = {
    "soft_moe": _soft_moe,
    "mean": _mean,
    "attention": _attention,
    "perceiver": _perceiver,
    "perceiver 2": _perceiver,
}


@pytest.mark.parametrize("kind", NAIVE)
@pytest.mark.parametrize("n", [1, 3, 2500])
def test_softmax_kinds_are_the_formulas(kind, n, gen):
    cfg, p = _case(kind, gen)
    x = _patches(gen, n, D)
    tokens, weights = NAIVE[kind](cfg, p, x)
    got = compress(cfg, p, x[None], routing=True)
    torch.testing.assert_close(got.tokens[0], tokens)
    torch.testing.assert_close(got.routing[0], weights)
    torch.testing.assert_close(got.mass[0], weights.sum(0))
    assert (got.count == n).all()
    assert not got.aux


@pytest.mark.parametrize("kind", NAIVE)
def test_their_gradients_are_the_formulas(kind, gen):
    cfg, p = _case(kind, gen)
    p, x = tree.map_leaves(lambda t: t.requires_grad_(), p), _patches(gen, 1300, D).requires_grad_()
    leaves = [x, *tree.flatten(p).values()]
    want = torch.autograd.grad(NAIVE[kind](cfg, p, x)[0].square().sum(), leaves)
    got = torch.autograd.grad(compress(cfg, p, x[None]).tokens[0].square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@kinds
def test_large_scores_stay_finite(kind, gen):
    cfg, p = _case(kind, gen, torch.float32, scale=30.0)
    assert compress(cfg, p, 100 * _patches(gen, 1, 30, D, dtype=torch.float32)).tokens.isfinite().all()


# Padding and batches -------------------------------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("junk", [0.0, 1e3, torch.nan, torch.inf])
def test_masked_patches_change_nothing(kind, junk, gen):
    cfg, p = _case(kind, gen)
    p, x = tree.map_leaves(lambda t: t.requires_grad_(), p), _patches(gen, 2, 20, D)
    wide = torch.full((2, 33, D), junk, dtype=torch.float64)
    wide[:, 7:27] = x
    mask = torch.zeros(2, 33, dtype=torch.bool)
    mask[:, 7:27] = True
    x, wide = x.requires_grad_(), wide.requires_grad_()
    outs = compress(cfg, p, x, routing=True), compress(cfg, p, wide, mask, routing=True)
    _close(outs[1], outs[0])
    torch.testing.assert_close(outs[1].routing[:, 7:27], outs[0].routing)
    assert not outs[1].routing[~mask].any()
    leaves = [*tree.flatten(p).values()]
    loss = lambda o: (
        o.tokens.square().sum() + o.mass.square().sum() + sum(o.aux.values()) + o.routing.square().sum()
    )
    want, got = (
        torch.autograd.grad(loss(o), [v, *leaves], allow_unused=True)
        for o, v in zip(outs, (x, wide), strict=True)
    )
    torch.testing.assert_close(got[0][:, 7:27], want[0])
    assert not got[0][~mask].any()
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b)


@kinds
def test_a_batch_is_its_slides(kind, gen):
    cfg, p = _case(kind, gen)
    x, sizes = _patches(gen, 4, 1100, D), [1100, 1, 0, 40]
    out = compress(cfg, p, x, torch.arange(1100) < torch.tensor(sizes)[:, None])
    for i, n in enumerate(sizes):
        one = compress(cfg, p, x[i : i + 1, :n])
        torch.testing.assert_close(out.tokens[i], one.tokens[0])
        torch.testing.assert_close(out.mass[i], one.mass[0])
        assert torch.equal(out.count[i], one.count[0])
    every = compress(cfg, p, torch.cat([x[i, :n] for i, n in enumerate(sizes)])[None])
    assert out.aux.keys() == every.aux.keys()
    for name, t in every.aux.items():
        torch.testing.assert_close(out.aux[name], t)


@kinds
@pytest.mark.parametrize("n", [0, 1, 3])
def test_few_or_no_patches_are_defined(kind, n, gen):
    cfg, p = _case(kind, gen)
    p, x = tree.map_leaves(lambda t: t.requires_grad_(), p), _patches(gen, 2, n, D).requires_grad_()
    out = compress(cfg, p, x, routing=True)
    leaves = [x, *tree.flatten(p).values()]
    grads = torch.autograd.grad(out.tokens.sum() + sum(out.aux.values()) + out.mass.sum(), leaves)
    assert all(t.isfinite().all() for t in (out.tokens, out.mass, *out.aux.values(), *grads))
    assert out.routing.shape == (2, n, K)
    if n == 0:
        assert not out.mass.any()
        assert not out.count.any()
        assert not any(out.aux.values())
        zero = {
            "attention": lambda: torch.zeros(K, D).double(),
            "perceiver": lambda: _perceiver(cfg, p, x[0])[0],
            "perceiver 2": lambda: _perceiver(cfg, p, x[0])[0],
        }.get(kind, lambda: _mlp(p["experts"], torch.zeros(K, D).double()))
        torch.testing.assert_close(out.tokens, zero().expand(2, -1, -1))
        _close(finalize_state(cfg, p, _all(begin_state(cfg, p), cfg, p, [])), _first(out))


# Streams --------------------------------------------------------------------------------------------------------------------------------
def _first(out):
    return evolve(out, tokens=out.tokens[0], mass=out.mass[0], count=out.count[0])


def _all(state, cfg, p, chunks):
    """The state at the end of the last pass."""
    for turn in range(cfg.passes):
        state = begin_state(cfg, p, state) if turn else state
        for x in chunks:
            state = update_state(cfg, p, state, x)
    return state


@kinds
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_any_chunks_are_one_shot(kind, size, gen):
    cfg, p = _case(kind, gen, torch.float32)
    x = _patches(gen, {1: 60, 7: 500, 4096: 9000}[size], D, dtype=torch.float32)
    want = _first(compress(cfg, tree.map_leaves(lambda t: t.double(), p), x[None].double()))
    want = evolve(
        want,
        tokens=want.tokens.float(),
        mass=want.mass.float(),
        aux={n: t.float() for n, t in want.aux.items()},
    )
    _close(compress_stream(cfg, p, x.split(size)), want, atol=1e-5, rtol=1e-5)
    _close(_first(compress(cfg, p, x[None])), want, atol=1e-5, rtol=1e-5)


@kinds
def test_any_order_and_tree_of_merges(kind, gen):
    cfg, p = _case(kind, gen)
    x = _patches(gen, 300, D)
    x[:100] *= 8  # the largest scores lie in one part
    want = _first(compress(cfg, p, x[None]))
    parts = x[torch.randperm(300, generator=gen)].split([1, 40, 9, 100, 150])
    state = None
    for _ in range(cfg.passes):
        start = begin_state(cfg, p, state)
        leaves = [update_state(cfg, p, start, c) for c in parts]
        left = reduce(merge_states, leaves)
        state = merge_states(
            merge_states(leaves[3], merge_states(leaves[4], leaves[1])),
            merge_states(start, merge_states(leaves[2], leaves[0])),
        )
        for name in ("top", "weight", "total"):
            torch.testing.assert_close(getattr(state, name), getattr(left, name))
    _close(finalize_state(cfg, p, state), want)


@kinds
def test_masked_and_empty_chunks_are_no_chunks(kind, gen):
    cfg, p = _case(kind, gen)
    x, nothing = _patches(gen, 50, D), torch.full((9, D), torch.nan, dtype=torch.float64)
    state = None
    for _ in range(cfg.passes):
        state = update_state(cfg, p, begin_state(cfg, p, state), nothing, torch.zeros(9, dtype=torch.bool))
        state = update_state(cfg, p, state, torch.cat([x, nothing]), torch.arange(59) < 50)
        state = update_state(
            cfg, p, update_state(cfg, p, state, x[:0]), nothing, torch.zeros(9, dtype=torch.bool)
        )
    _close(finalize_state(cfg, p, state), _first(compress(cfg, p, x[None])))


@kinds
def test_half_precision_features(kind, gen):
    """What is lost is the features' rounding, nothing else; autocast changes nothing."""
    cfg, p = _case(kind, gen, torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        x = _patches(gen, 400, D, dtype=torch.float32).to(dtype)
        want = _first(compress(cfg, p, x[None].float()))
        _close(_first(compress(cfg, p, x[None])), want)
        with torch.autocast("cpu", torch.bfloat16):
            _close(_first(compress(cfg, p, x[None])), want, atol=1e-6, rtol=1e-6)
            _close(compress_stream(cfg, p, x.split(130)), want, atol=1e-5, rtol=1e-5)


@kinds
def test_shares_of_patches_when_streamed(kind, gen):
    cfg, p = _case(kind, gen)
    x = _patches(gen, 1200, D)
    out = compress(cfg, p, x[None], routing=True)
    torch.testing.assert_close(out.routing.sum(1), out.mass)
    state = _all(begin_state(cfg, p), cfg, p, x.split(500))
    got = torch.cat([slot_weights(cfg, p, c, state) for c in x.split(700)])
    torch.testing.assert_close(got, out.routing[0])
    if kind == "moe":
        assert torch.equal(slot_weights(cfg, p, x), got)
        centres = (got / finalize_state(cfg, p, state).mass).T @ x
        torch.testing.assert_close(_mlp(p["experts"], centres), out.tokens[0])


@pytest.mark.parametrize("kind", ["moe", "soft_moe"])
def test_slides_of_one_case_are_one_bag(kind, gen):
    cfg, p = _case(kind, gen)
    slides = _patches(gen, 30, D), _patches(gen, 700, D) + 1, _patches(gen, 0, D)
    case = reduce(merge_states, [update_state(cfg, p, begin_state(cfg, p), x) for x in slides])
    _close(finalize_state(cfg, p, case), _first(compress(cfg, p, torch.cat(slides)[None])))


OTHER = """
import pickle, sys
from medvl.components.compress import begin_state, update_state
cases = pickle.load(open(sys.argv[1], "rb"))
states = {kind: update_state(cfg, p, begin_state(cfg, p), x) for kind, (cfg, p, x) in cases.items()}
pickle.dump(states, open(sys.argv[2], "wb"))
"""


def test_two_processes_are_one(gen, tmp_path):
    cases = {
        kind: (*_case(kind, gen), _patches(gen, 300, D))
        for kind in ("moe", "soft_moe", "attention", "perceiver")
    }
    (tmp_path / "in").write_bytes(
        pickle.dumps({kind: (cfg, p, x[90:].clone()) for kind, (cfg, p, x) in cases.items()})
    )
    subprocess.run([sys.executable, "-c", OTHER, str(tmp_path / "in"), str(tmp_path / "out")], check=True)
    theirs = pickle.loads((tmp_path / "out").read_bytes())
    for kind, (cfg, p, x) in cases.items():
        here = update_state(cfg, p, begin_state(cfg, p), x[:90])
        _close(finalize_state(cfg, p, merge_states(here, theirs[kind])), _first(compress(cfg, p, x[None])))


def test_a_million_patches_lose_nothing(gen):
    """Sums are float64: 200 times the same 5,000 patches are the mean of them once."""
    cfg, p = _case("moe", gen, torch.float32)
    x = _patches(gen, 5000, D, dtype=torch.float32)
    state = once = update_state(cfg, p, begin_state(cfg, p), x)
    for _ in range(199):
        state = merge_states(state, once)
    want = finalize_state(cfg, p, once)
    got = finalize_state(cfg, p, state)
    torch.testing.assert_close(got.tokens, want.tokens, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.mass, want.mass * 200)
    assert int(got.count.sum()) == 2_000_000


# Errors ---------------------------------------------------------------------------------------------------------------------------------
def test_errors(gen):
    cfg, p = _case("moe", gen)
    x = _patches(gen, 2, 5, D)
    with pytest.raises(
        ValueError,
        match=r"compress: x must be floating point \[b, n, 24\], got .*\[2, 5, 8\]; set compress.dim",
    ):
        compress(cfg, p, x[..., :8])
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 5\] like x, got torch.float32"):
        compress(cfg, p, x, torch.ones(2, 5))
    with pytest.raises(
        ValueError, match=r"update_state: x must be floating point \[c, 24\], got torch.int64"
    ):
        update_state(cfg, p, begin_state(cfg, p), x[0].long())
    with pytest.raises(ValueError, match=r"update_state: x must be .* got torch.float32 \[0\]"):
        update_state(cfg, p, begin_state(cfg, p), torch.zeros(0))
    with pytest.raises(ValueError, match=r"slot_weights: x must be"):
        slot_weights(cfg, p, x)
    for wrong, message in [
        ({"top_k": 7}, "top_k lie in 1..slots"),
        ({"slots": 0}, "sizes must be positive"),
        ({"kind": "attention", "heads": 5}, "multiple of heads"),
        ({"passes": 2}, "only a perceiver"),
        ({"dropout": 1.0}, "dropout lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            evolve(cfg, **wrong)


@kinds
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_patches_that_are_not_finite_are_named(kind, bad, gen):
    cfg, p = _case(kind, gen, torch.float32)
    x = _patches(gen, 40, D, dtype=torch.float32)
    x[17, 3] = bad
    with pytest.raises(
        ValueError,
        match=r"update_state: patches must be finite, got NaN or infinity in rows \[17\] of the chunk",
    ):
        update_state(cfg, p, begin_state(cfg, p), x)
    assert finalize_state(cfg, p, _all(begin_state(cfg, p), cfg, p, [])).tokens.isfinite().all()


def test_states_that_do_not_fit(gen):
    cfg, p = _case("perceiver 2", gen)
    x = _patches(gen, 10, D)
    one = update_state(cfg, p, begin_state(cfg, p), x)
    with pytest.raises(
        ValueError,
        match=r"finalize_state: the state must be of the last pass, got pass 1 of 2; begin_state\(cfg, params, state\)",
    ):
        finalize_state(cfg, p, one)
    with pytest.raises(
        ValueError, match=r"slot_weights: perceiver needs the state .* got that of pass 1 of 2"
    ):
        slot_weights(cfg, p, x, one)
    with pytest.raises(ValueError, match="got none"):
        slot_weights(cfg, p, x)
    two = begin_state(cfg, p, one)
    with pytest.raises(
        ValueError, match=r"begin_state: the state must not be of the last pass, got pass 2 of 2"
    ):
        begin_state(cfg, p, two)
    with pytest.raises(ValueError, match="merge_states: both states must come from one config and pass"):
        merge_states(one, two)
    with pytest.raises(ValueError, match="merge_states: the latents of both states must be the same"):
        merge_states(two, begin_state(cfg, p, update_state(cfg, p, begin_state(cfg, p), x + 1)))
    with pytest.raises(ValueError, match="compress_stream: 2 passes need chunks that can be read again"):
        compress_stream(cfg, p, iter([x]))
    again = compress_stream(cfg, p, lambda: iter(x.split(3)))
    _close(again, _first(compress(cfg, p, x[None])))
    other, q = _case("moe", gen)
    with pytest.raises(ValueError, match="merge_states: both states"):
        merge_states(begin_state(other, q), begin_state(*_case("soft_moe", gen)))
