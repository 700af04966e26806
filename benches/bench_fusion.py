"""Fusion of slices: with and without the padding that real volumes have."""

import pytest
import torch

from medvl.components.fuse import FuseConfig, fuse, init_fuse


@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
def bench_fuse(measure, pool):
    cfg, gen = FuseConfig(dim=384, depth=4, heads=6, pool=pool), torch.Generator().manual_seed(0)
    params = init_fuse(cfg, gen)
    z = torch.randn(8, 160, 384, generator=gen)
    mask = torch.arange(160) < torch.linspace(48, 160, 8)[:, None]
    position_mm = torch.arange(160.0).expand(8, -1) * 3
    with torch.no_grad():
        measure(fuse, cfg, params, z, mask, position_mm, rounds=10, b=8, s=160, d=384, depth=4)
