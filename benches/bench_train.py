"""The losses, their gradient by caching against the whole batch at once, and a whole training step."""

import pytest
import torch
import torch.nn.functional as F

from medvl.base.tree import count_values
from medvl.components.fuse import FuseConfig, fuse, init_fuse
from medvl.components.losses import clip_loss, siglip_loss
from medvl.components.text import TextConfig, encode_text, init_text
from medvl.training import gradients, loop, optim, states

FUSE = FuseConfig(dim=192, depth=2, heads=3)
TEXT = TextConfig(vocabulary=1000, context=64, dim=128, depth=2, heads=2)
B, S = 32, 32


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def bench_loss(measure, loss):
    """Forward and gradient at a batch of 1024 embeddings of 512."""
    gen = torch.Generator().manual_seed(0)
    rows = {k: F.normalize(torch.randn(1024, 512, generator=gen), dim=-1) for k in ("image", "text")}
    of = {
        "clip": lambda p: clip_loss(p["image"], p["text"], 14.3),
        "siglip": lambda p: siglip_loss(p["image"], p["text"], 10.0, -10.0),
    }[loss]
    measure(
        gradients.value_and_grad(lambda p, _: (of(p), gradients.Aux())), rows, None, rounds=10, b=1024, d=512
    )


def _pieces():
    gen = torch.Generator().manual_seed(0)
    params = {
        "fuse": init_fuse(FUSE, gen),
        "text": init_text(TEXT, gen),
        "project": torch.randn(192, 128, generator=gen) * 0.07,
    }
    batch = {
        "z": torch.randn(B, S, 192, generator=gen),
        "mask": torch.ones(B, S, dtype=torch.bool),
        "mm": torch.arange(float(S)).expand(B, -1) * 3,
        "ids": torch.randint(1000, (B, 64), generator=gen),
        "words": torch.ones(B, 64, dtype=torch.bool),
    }
    return params, batch


def _embed(p, b):
    return {
        "image": fuse(FUSE, p["fuse"], b["z"], b["mask"], b["mm"]),
        "text": encode_text(TEXT, p["text"], b["ids"], b["words"]),
    }


def _contrast(p, rows):
    return clip_loss(
        F.normalize(rows["image"] @ p["project"], dim=-1), F.normalize(rows["text"], dim=-1), 14.3
    ), gradients.Aux()


@pytest.mark.parametrize("chunk", [B, 8])
def bench_step(measure, chunk):
    """A step of AdamW on cached features: the whole batch at once, and in chunks of 8 with the same gradient."""
    params, batch = _pieces()
    optimizer = optim.adamw(lambda _: optim.Rate(lr=1e-4, weight_decay=0.2))
    step = loop.make_step(
        gradients.cached_value_and_grad(_embed, _contrast, chunk=chunk), optimizer, clip=1.0
    )
    state = states.State(params=params, opt=optimizer.init(params))
    measure(lambda: step(state, batch)[1], rounds=5, b=B, s=S, chunk=chunk, parameters=count_values(params))
