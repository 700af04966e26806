"""Patches of a slide to 16 tokens: by kind, with its gradient, beside the reference's loop over slots, and as a stream."""

import pytest
import torch
import torch.nn.functional as F

from medvl.base.tree import flatten, map_leaves
from medvl.components.compress import CompressConfig, compress, compress_stream, init_compress, reference_aux

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
B, N, D = (8, 16_384, 1024) if CUDA else (2, 4096, 512)
KINDS = ["moe", "soft_moe", "attention", "perceiver"]


def case(kind):
    cfg, gen = CompressConfig(kind=kind, dim=D), torch.Generator().manual_seed(0)
    params = map_leaves(lambda t: t.to(DEVICE), init_compress(cfg, gen))
    return cfg, params, torch.randn(B, N, D, generator=gen).to(DEVICE)


def loop(cfg, p, x):
    """The reference's way, of one slide: a weighted mean and an expert for one slot after another."""
    value, index = F.linear(x, p["gate"]["weight"], p["gate"]["bias"]).softmax(-1).topk(cfg.top_k, -1)
    tokens = []
    for i in range(cfg.slots):
        w = (value * (index == i)).sum(-1)
        c = (w[:, None] * x).sum(0) / (w.sum() + 1e-9)
        one = lambda name, z, i=i: F.linear(z, p["experts"][name]["weight"][i], p["experts"][name]["bias"][i])
        norm = p["experts"]["norm"]
        tokens.append(
            c
            + F.layer_norm(one("down", F.gelu(one("up", c))), (cfg.dim,), norm["weight"][i], norm["bias"][i])
        )
    return torch.stack(tokens)


@pytest.mark.parametrize("kind", KINDS)
def bench_compress(measure, kind):
    cfg, params, x = case(kind)
    mask = torch.arange(N, device=DEVICE) < torch.linspace(N // 2, N, B, device=DEVICE)[:, None]
    with torch.no_grad():
        measure(compress, cfg, params, x, mask, rounds=5, b=B, n=N, d=D, k=16)


@pytest.mark.parametrize("who", ["ours", "loop"])
def bench_slots(measure, who):
    """The same tokens without padding, slide by slide."""
    cfg, params, x = case("moe")
    ours = lambda x: compress(cfg, params, x[None]).tokens[0]
    call = {"ours": ours, "loop": lambda x: loop(cfg, params, x)}[who]
    with torch.no_grad():
        measure(lambda: [call(slide) for slide in x], rounds=5, b=B, n=N, d=D, k=16)


def bench_gradient(measure):
    cfg, params, x = case("moe")
    leaves = {n: t.requires_grad_() for n, t in flatten(params).items()}

    def step():
        out = compress(cfg, params, x)
        return torch.autograd.grad(
            out.tokens.square().mean() + 0.1 * reference_aux(out.aux), list(leaves.values())
        )

    measure(step, rounds=5, b=B, n=N, d=D, k=16)


@pytest.mark.parametrize("kind", KINDS)
def bench_stream(measure, kind):
    """16-bit features in chunks of 4,096."""
    cfg, params, x = case(kind)
    chunks = x.flatten(0, 1).half().split(4096)
    measure(compress_stream, cfg, params, chunks, rounds=5, n=B * N, d=D, k=16)
