"""Rounding at random: one of two neighbours, right on average."""

import math

import torch

from medvl.weights.rounding import round_stochastic

BF16 = torch.bfloat16


def test_stochastic_rounding_is_right_on_average_and_takes_neighbours(gen):
    x = torch.randn(50, generator=gen) * 10 ** torch.linspace(-30, 30, 50)
    near = x.bfloat16()
    up, down = ((near.view(torch.int16) + i).view(BF16).float() for i in (1, -1))
    rounds = torch.stack([round_stochastic(x, gen).float() for _ in range(4000)])
    assert ((rounds == near.float()) | (rounds == up) | (rounds == down)).all()
    gap = (up - near.float()).abs()
    assert ((rounds.mean(0) - x).abs() < 5 * gap / 2 / 4000**0.5).all()
    assert ((rounds.std(0) > 0.05 * gap).float().mean()) > 0.8
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, 2.0**-130])
    assert torch.equal(round_stochastic(exact, gen).view(torch.int16), exact.bfloat16().view(torch.int16))
    assert round_stochastic(torch.tensor([math.nan]), gen).isnan().all()
