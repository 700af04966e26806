import pytest
import torch
from attrs import evolve

from medvl.base.tree import map_leaves
from medvl.components import layers
from medvl.components.fuse import FuseConfig, fuse, fused_width, init_fuse

CFG = FuseConfig(dim=24, depth=2, heads=3)
POOLS = ["cls", "mean", "max", "mean+max", "attention"]


def _case(pool, gen, b=3, s=7):
    cfg = evolve(CFG, pool=pool)
    p = map_leaves(
        lambda t: torch.randn(t.shape, generator=gen, dtype=torch.float64) * 0.3, init_fuse(cfg, gen)
    )
    z = torch.randn(b, s, cfg.dim, generator=gen, dtype=torch.float64)
    mm = torch.arange(s).double()[None].expand(b, s) * 3.0
    return cfg, p, z, torch.ones(b, s, dtype=torch.bool), mm


def _naive_attention(q, k, v, keep):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v


def test_block_is_the_formula(gen):
    p = map_leaves(lambda t: t.double(), layers.init_block(12, 1, gen))
    x, keep = (
        torch.randn(2, 5, 12, generator=gen, dtype=torch.float64),
        torch.rand(2, 1, 1, 5, generator=gen) > 0.3,
    )
    keep[..., 0] = True
    h = layers.norm(p["norm1"], x)
    q, k, v = (
        t.view(2, 5, 3, 4).transpose(1, 2) for t in (h @ p["qkv"]["weight"].T + p["qkv"]["bias"]).chunk(3, -1)
    )
    y = (
        x
        + _naive_attention(q, k, v, keep).transpose(1, 2).reshape(2, 5, 12) @ p["out"]["weight"].T
        + p["out"]["bias"]
    )
    m = torch.nn.functional.gelu(layers.norm(p["norm2"], y) @ p["up"]["weight"].T + p["up"]["bias"])
    torch.testing.assert_close(
        layers.block(p, x, 3, keep=keep), y + m @ p["down"]["weight"].T + p["down"]["bias"]
    )


def test_causal_and_keep_hold_together(gen):
    qkv = torch.randn(1, 6, 24, generator=gen, dtype=torch.float64)
    keep = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    keep[..., 1] = False
    both = keep & torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(
        layers.attention(qkv, 2, keep=keep, causal=True), layers.attention(qkv, 2, keep=both)
    )
    assert not torch.equal(
        layers.attention(qkv, 2, keep=keep, causal=True), layers.attention(qkv, 2, causal=True)
    )


def test_rotary_dot_products_depend_on_distance_only(gen):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=gen, dtype=torch.float64)
    at = lambda x, mm: layers.rotate(x, layers.rotary(torch.tensor([[mm]]), 16))
    a = (at(q, 5.0) * at(k, 2.0)).sum()
    torch.testing.assert_close(a, (at(q, 103.0) * at(k, 100.0)).sum(), atol=1e-4, rtol=1e-4)
    assert (a - (at(q, 5.0) * at(k, 4.0)).sum()).abs() > 1e-3


@pytest.mark.parametrize("pool", POOLS)
def test_padding_changes_nothing(pool, gen):
    cfg, p, z, mask, mm = _case(pool, gen)
    want = fuse(cfg, p, z, mask, mm)
    junk = torch.full((3, 4, cfg.dim), 7.0, dtype=torch.float64)
    wide = fuse(
        cfg,
        p,
        torch.cat([junk, z, junk], 1),
        torch.nn.functional.pad(mask, (4, 4)),
        torch.nn.functional.pad(mm, (4, 4), value=1e4),
    )
    torch.testing.assert_close(wide, want)
    assert want.shape == (3, fused_width(cfg))


@pytest.mark.parametrize("pool", POOLS)
def test_order_of_slices_is_told_by_positions_only(pool, gen):
    cfg, p, z, mask, mm = _case(pool, gen)
    turn = torch.randperm(z.shape[1], generator=gen)
    want = fuse(cfg, p, z, mask, mm)
    torch.testing.assert_close(fuse(cfg, p, z[:, turn], mask, mm[:, turn]), want)
    torch.testing.assert_close(fuse(cfg, p, z, mask, mm + 400.0), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fuse(cfg, p, z[:, turn], mask, mm), want)


@pytest.mark.parametrize("pool", POOLS)
def test_samples_do_not_mix(pool, gen):
    cfg, p, z, mask, mm = _case(pool, gen)
    mask[1, 3:] = False
    whole = fuse(cfg, p, z, mask, mm)
    for i in range(3):
        torch.testing.assert_close(fuse(cfg, p, z[i : i + 1], mask[i : i + 1], mm[i : i + 1])[0], whole[i])


def test_inputs_are_projected_and_skip_shows_them_to_the_end(gen):
    plain, p, _, mask, mm = _case("mean+max", gen)
    mask[1, 4:] = False
    cfg = evolve(plain, inputs=10, skip=True)
    p = {
        "into": {
            "weight": torch.randn(24, 10, generator=gen).double(),
            "bias": torch.randn(24, generator=gen).double(),
        }
    } | p
    p["skip"] = {
        "weight": torch.rand(10, generator=gen).double(),
        "bias": torch.rand(10, generator=gen).double(),
    }
    assert init_fuse(cfg, gen).keys() == p.keys()
    z = torch.randn(3, 7, 10, generator=gen, dtype=torch.float64)
    got = fuse(cfg, p, z, mask, mm)
    assert got.shape == (3, fused_width(cfg)) == (3, 2 * 24 + 2 * 10)
    torch.testing.assert_close(got[:, :48], fuse(plain, p, layers.linear(p["into"], z), mask, mm))
    seen = torch.nn.functional.layer_norm(z, (10,), p["skip"]["weight"], p["skip"]["bias"])
    want = torch.stack([torch.cat([v[m].mean(0), v[m].amax(0)]) for v, m in zip(seen, mask, strict=True)])
    torch.testing.assert_close(got[:, 48:], want)
    with pytest.raises(ValueError, match=r"set fuse\.dim \(or fuse\.inputs\)"):
        fuse(cfg, p, z[..., :8], mask, mm)
    with pytest.raises(ValueError, match="skip needs pool"):
        FuseConfig(skip=True)


def test_wrong_shapes_name_the_setting(gen):
    cfg, p, z, mask, mm = _case("cls", gen)
    with pytest.raises(ValueError, match=r"set fuse\.dim"):
        fuse(cfg, p, z[..., :8], mask, mm)
    with pytest.raises(ValueError, match="position_mm"):
        fuse(cfg, p, z, mask, mm[:, :2])
    with pytest.raises(ValueError, match="multiple of 2 x heads"):
        FuseConfig(dim=30, heads=4)
