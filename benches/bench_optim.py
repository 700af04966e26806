"""One optimiser step over 20 million parameters in matrices, by what the weights and the moments are kept in."""

import pytest
import torch

from medvl.base.tree import flatten
from medvl.training import optim
from medvl.weights.four_bit import eight_bit_moments

RATE = optim.Rate(lr=1e-5, weight_decay=0.1)
KINDS = {
    "float32": (torch.float32, lambda: optim.adamw(lambda _: RATE)),
    "float32 8-bit": (torch.float32, lambda: optim.adamw(lambda _: RATE, packing=eight_bit_moments())),
    "bfloat16 master": (torch.bfloat16, lambda: optim.with_master(optim.adamw(lambda _: RATE))),
    "bfloat16 stochastic": (torch.bfloat16, lambda: optim.adamw(lambda _: RATE, rounding="stochastic")),
    "bfloat16 stochastic 8-bit": (
        torch.bfloat16,
        lambda: optim.adamw(lambda _: RATE, rounding="stochastic", packing=eight_bit_moments()),
    ),
}


def _weights(dtype, n=20, d=1024):
    gen = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": (torch.randn(d, d, generator=gen) * 0.02).to(dtype) for i in range(n)}


@pytest.mark.parametrize("kind", KINDS)
def bench_update(measure, kind):
    """The peak is what a step needs on top of weights, gradients and state; `state_bytes` is the state's size per parameter."""
    dtype, make = KINDS[kind]
    params, optimizer = _weights(dtype), make()
    grads, state = {n: torch.full_like(t, 1e-3) for n, t in params.items()}, optimizer.init(params)
    n = sum(t.numel() for t in params.values())
    held = round(sum(t.nbytes for t in flatten(state).values()) / n, 2)
    measure(
        lambda: optimizer.update(grads, state, params, 3)[0].keys(), rounds=5, parameters=n, state_bytes=held
    )


def bench_clip(measure):
    """The gradients' common norm, and all of them scaled."""
    grads = _weights(torch.float32)
    measure(
        lambda: optim.clip_gradients(dict(grads), 0.1),
        rounds=5,
        parameters=sum(t.numel() for t in grads.values()),
    )
