"""encode: transformers' own forward and naive formulas are the peers; hub only builds the tiny encoders."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from torch import Tensor

from medvl.components import encode
from medvl.components.encode import WINDOWS, EncodeConfig, chunk_size, embedding_width, encode_slices, windows
from medvl.hub import loading, saving, skeletons
from medvl.weights import lora

CPU = torch.device("cpu")
BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TINY = {
    "dinov2": {"model_type": "dinov2", **BASE},
    "giant": {"model_type": "dinov2", **BASE, "use_swiglu_ffn": True},
    "registers": {"model_type": "dinov2_with_registers", **BASE, "num_register_tokens": 4},
    "dinov3": {"model_type": "dinov3_vit", **BASE, "intermediate_size": 128, "num_register_tokens": 4},
    "vit": {"model_type": "vit", **BASE, "intermediate_size": 128},
    "clip": {"model_type": "clip_vision_model", **BASE, "intermediate_size": 128},
}
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)  # 9 of 15 slices


def vit_of(kind="dinov2"):
    skeleton, params = _built(kind)
    return skeleton, {n: t.clone() for n, t in params.items()}


@cache
def _built(kind):
    skeleton, params = skeletons.init_skeleton(TINY[kind], torch.Generator().manual_seed(0))
    gen = torch.Generator().manual_seed(1)
    return skeleton, {n: t + 0.2 * torch.randn(t.shape, generator=gen) for n, t in params.items()}


def volumes(px=32, dtype=torch.uint8):
    low, high = (0, 256) if dtype == torch.uint8 else (-1024, 2000)
    size = (px, px) if isinstance(px, int) else px
    return torch.randint(low, high, (3, 5, *size), generator=torch.Generator().manual_seed(2), dtype=dtype)


# Windows --------------------------------------------------------------------------------------------------------------------------------
def naive_window(hu, centre, size, mean, std):
    return (min(1.0, max(0.0, (hu - centre) / size + 0.5)) - mean) / std


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_fixed_windows_equal_the_formula(dtype):
    cfg = EncodeConfig()
    values = list(range(256)) if dtype == torch.uint8 else list(range(-1100, 3000, 16))
    hus = [v / 255 * 2000 - 1000 for v in values] if dtype == torch.uint8 else values
    want = [
        [naive_window(h, *w, m, s) for h in hus] for w, m, s in zip(WINDOWS, cfg.mean, cfg.std, strict=True)
    ]
    got = windows(cfg, torch.tensor(values, dtype=dtype).view(1, -1))
    assert got.shape == (3, 1, len(values))
    torch.testing.assert_close(got[:, 0], torch.tensor(want))


def test_uint8_and_int16_of_one_volume_agree():
    stored = volumes()
    hu = (stored.double() / 255 * 2000 - 1000).round().to(torch.int16)
    a, b = windows(EncodeConfig(), stored), windows(EncodeConfig(), hu)
    assert a.shape == b.shape == (3, 5, 3, 32, 32)
    assert (a - b).abs().max() < 0.5 / 400 / 0.224 * 1.01  # half a HU in the narrowest window


def test_known_tissues_stand_where_radiologists_put_them():
    cfg = EncodeConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    air, water, bone = windows(cfg, torch.tensor([[-1000, 0, 1000]], dtype=torch.int16))[:, 0].T
    torch.testing.assert_close(air, torch.tensor([350 / 1500, 0, 0]))
    torch.testing.assert_close(water, torch.tensor([1350 / 1500, 160 / 400, 500 / 1800]))
    torch.testing.assert_close(bone, torch.tensor([1, 1, 1500 / 1800]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_minmax_equals_the_formula(dtype):
    cfg = EncodeConfig(window="minmax")
    v = volumes(dtype=dtype)[0]
    v[1] = 7  # a constant slice has nothing to stretch
    got = windows(cfg, v)
    for s in (0, 1, 4):
        flat = v[s].double()
        unit = (flat - flat.min()) / (flat.max() - flat.min()) if s != 1 else torch.zeros(32, 32).double()
        for c in range(3):
            torch.testing.assert_close(
                got[s, c].double(), (unit - cfg.mean[c]) / cfg.std[c], rtol=1e-5, atol=1e-5
            )


def test_windows_refuse_other_dtypes():
    with pytest.raises(ValueError, match=r"uint8 or int16 \[..., y, x\], got torch.float32"):
        windows(EncodeConfig(), torch.zeros(2, 8, 8))


# Equality with transformers -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", TINY)
def test_equals_transformers_on_one_checkpoint(kind, tmp_path):
    from transformers import AutoModel

    saving.save_skeleton(*vit_of(kind), tmp_path / kind)
    peer = AutoModel.from_pretrained(tmp_path / kind).eval()
    skeleton, params = loading.load_skeleton(tmp_path / kind)
    for px in (32, 48) if kind != "clip" else (32,):
        v, cfg = volumes(px), EncodeConfig()
        how = {"interpolate_pos_encoding": True} if kind == "vit" and px != 32 else {}
        with torch.no_grad():
            got = encode_slices(cfg, params, v, MASK, vit=skeleton)
            out = peer(windows(cfg, v.flatten(0, 1)), **how)
        want = out.pooler_output if kind == "clip" else out.last_hidden_state[:, 0]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got[MASK], want.unflatten(0, (3, 5))[MASK], rtol=0, atol=1e-5)
        assert (got[~MASK] == 0).all()


@pytest.mark.parametrize("kind", ["dinov2", "registers"])
def test_pools(kind):
    skeleton, params = vit_of(kind)
    prefix = 1 + TINY[kind].get("num_register_tokens", 0)
    v = volumes()
    with torch.no_grad():
        tokens = skeleton(params, windows(EncodeConfig(), v[1])).last_hidden_state
        assert tokens.shape == (5, prefix + 16, 64)
        patches = tokens[:, prefix:]
        want = {"cls": tokens[:, 0], "mean": patches.mean(1), "max": patches.max(1).values}
        want["cls+mean"] = torch.cat([want["cls"], want["mean"]], 1)
        want["mean+max"] = torch.cat([want["mean"], want["max"]], 1)
        for pool, target in want.items():
            cfg = EncodeConfig(pool=pool)
            got = encode_slices(cfg, params, v, MASK, vit=skeleton)
            assert got.shape == (3, 5, embedding_width(cfg, skeleton))
            torch.testing.assert_close(got[1], target, rtol=1e-5, atol=1e-5)


def test_a_grid_pools_every_cell_by_itself():
    skeleton, params = vit_of()
    v = volumes()
    with torch.no_grad():
        patches = skeleton(params, windows(EncodeConfig(), v[1])).last_hidden_state[:, 1:].view(5, 4, 4, 64)
        for grid, step in ((2, 2), (4, 1)):
            cfg = EncodeConfig(pool="mean+max", grid=grid)
            cells = [
                patches[:, y : y + step, x : x + step].flatten(1, 2)
                for y in range(0, 4, step)
                for x in range(0, 4, step)
            ]
            want = torch.cat([torch.cat([c.mean(1), c.amax(1)], 1) for c in cells], 1)
            got = encode_slices(cfg, params, v, MASK, vit=skeleton)
            assert got.shape == (3, 5, embedding_width(cfg, skeleton))
            torch.testing.assert_close(got[1], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="grid 3 must divide the 4 x 4 patches"):
        encode_slices(EncodeConfig(pool="max", grid=3), params, v, MASK, vit=skeleton)
    with pytest.raises(ValueError, match="1 for a pool with the class token"):
        EncodeConfig(pool="cls+mean", grid=2)


def test_whitened_patches_are_white(gen):
    """Mean 0; variance v / (v + 1 % of the mean) and no correlation, so 1 where there is much of it; nothing else changes."""
    _, params = vit_of()
    name = next(n for n, t in params.items() if t.dim() == 4)
    smooth = torch.nn.functional.interpolate(
        torch.randn(400, 1, 8, 8, generator=gen), (32, 32), mode="bicubic"
    )[:, 0]
    slices = (
        (400 * smooth - 200 + 30 * torch.randn(400, 32, 32, generator=gen)).clamp(-1000, 1000).to(torch.int16)
    )
    new = encode.whiten(EncodeConfig(), params, slices)
    assert {n for n in params if not torch.equal(params[n], new[n])} == {name, name.replace("weight", "bias")}
    out = torch.nn.functional.conv2d(
        windows(EncodeConfig(), slices), new[name], new[name.replace("weight", "bias")], stride=8
    )
    rows = out.movedim(1, -1).flatten(0, 2).double()
    torch.testing.assert_close(rows.mean(0), torch.zeros(64).double(), atol=1e-4, rtol=0)
    cov = rows.T @ rows / len(rows)
    torch.testing.assert_close(cov, cov.diag().diag(), atol=1e-3, rtol=0)
    assert (cov.diag().diff() < 1e-6).all()
    assert cov[0, 0] == pytest.approx(1, abs=0.02)
    old = (
        torch.nn.functional.conv2d(windows(EncodeConfig(), slices), params[name], stride=8)
        .movedim(1, -1)
        .flatten(0, 2)
        .double()
    )
    assert torch.corrcoef(old.T).fill_diagonal_(0).abs().max() > 0.5  # the untrained encoder's are not
    with pytest.raises(ValueError, match="one patch embedding"):
        encode.whiten(EncodeConfig(), {"a": torch.zeros(2)}, slices)


def test_resize_is_bilinear_after_the_windows():
    skeleton, params = vit_of()
    cfg, v = EncodeConfig(resize=32), volumes((40, 56))
    small = F.interpolate(windows(cfg, v[1]), (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        want = skeleton(params, small).last_hidden_state[:, 0]
        torch.testing.assert_close(
            encode_slices(cfg, params, v, MASK, vit=skeleton)[1], want, rtol=1e-5, atol=1e-5
        )
        assert encode_slices(EncodeConfig(), params, v, MASK, vit=skeleton).shape == (
            3,
            5,
            64,
        )  # 40x56 are multiples of 8 as well


# Chunks, padding and gradients ----------------------------------------------------------------------------------------------------------
def counting(skeleton):
    seen = []

    def call(params, pixels, **kwargs):
        seen.append(len(pixels))
        return skeleton(params, pixels, **kwargs)

    class Counted(SimpleNamespace):
        __call__ = staticmethod(call)

    return Counted(module=skeleton.module, config=skeleton.config), seen


def test_chunks_and_padding_change_nothing(monkeypatch):
    skeleton, params = vit_of()
    counted, seen = counting(skeleton)
    v, cfg = volumes(), EncodeConfig(dtype="float64")
    with torch.no_grad():
        whole = encode_slices(cfg, params, v, MASK, vit=counted)
        assert seen == [9]
        monkeypatch.setattr("medvl.components.encode._LARGEST_ON_CPU", 2 * 17 * 256 * 8)
        parts = encode_slices(cfg, params, v, MASK, vit=counted)
        assert seen == [9, 2, 2, 2, 2, 1]
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
        junk = torch.where(MASK[..., None, None], v, 255 - v)
        longer = torch.cat([junk, torch.full_like(v, 9)], 1)
        padded = encode_slices(cfg, params, longer, F.pad(MASK, (0, 5)), vit=counted)
        torch.testing.assert_close(padded[:, :5], whole, rtol=1e-12, atol=1e-12)
        assert (padded[:, 5:] == 0).all()
        n = len(seen)
        nothing = encode_slices(cfg, params, v, torch.zeros_like(MASK), vit=counted)
        assert len(seen) == n
        assert torch.equal(nothing, torch.zeros(3, 5, 64).double())


def gradients(cfg, skeleton, params, v) -> dict[str, Tensor]:
    leaves = {n: t.double().requires_grad_() for n, t in params.items() if "mask_token" not in n}
    rest = {n: t.double() for n, t in params.items() if "mask_token" in n}
    out = encode_slices(cfg, leaves | rest, v, MASK, vit=skeleton)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return dict(zip(leaves, torch.autograd.grad((out * weight).sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_gradients_with_checkpoint_equal_those_without(kind, monkeypatch):
    skeleton, params = vit_of(kind)
    plain = EncodeConfig(dtype="float64")
    want = gradients(plain, skeleton, params, volumes())
    tokens = 1 + TINY[kind].get("num_register_tokens", 0) + 16
    hidden = TINY[kind].get("intermediate_size", 256)
    monkeypatch.setattr(
        "medvl.components.encode._LARGEST_ON_CPU", 4 * tokens * hidden * 8
    )  # chunks of 4, 4 and 1
    counted, seen = counting(skeleton)
    got = gradients(evolve(plain, checkpoint=True), counted, params, volumes())
    assert seen[:3] == [4, 4, 1]
    assert len(seen) == 6  # every chunk once more
    assert all(t.abs().max() > 0 for t in want.values())
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=1e-10, atol=1e-12)


def test_recomputation_binds_the_same_weights():
    """Two sets of weights through one skeleton before the gradient is taken: HF's own checkpointing would recompute with the wrong one."""
    skeleton, params = vit_of()
    cfg, v = EncodeConfig(dtype="float64"), volumes()
    sets = [{n: (t * s).double() for n, t in params.items()} for s in (1.0, 0.7)]

    def grads(cfg):
        leaves = [p["layernorm.weight"].requires_grad_() for p in sets]
        total = sum(encode_slices(cfg, p, v, MASK, vit=skeleton).square().sum() for p in sets)
        return torch.autograd.grad(total, leaves)

    for got, want in zip(grads(evolve(cfg, checkpoint=True)), grads(cfg), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_each_volume_has_its_own_mixture_of_adapters(kind, checkpoint, gen, monkeypatch):
    """Slices of several volumes are in one chunk and take the weights of their volume; two adapters, one on top of the other."""
    skeleton, params = vit_of(kind)
    cfg, v = EncodeConfig(dtype="float64", checkpoint=checkpoint), volumes()
    adapters, gates = [], []
    for _ in range(2):
        adapter = lora.init_lora(lora.LoraConfig(rank=4, pattern="all-linear", vision=True), skeleton, gen)
        for f in adapter.factors.values():
            f["b"].normal_(std=0.2, generator=gen)
        adapters.append(lora.move_adapter(adapter, dtype=torch.float64))
        gates.append(torch.rand(3, 4, generator=gen, dtype=torch.float64))

    def adapted(samples, leaf):
        """The params with the gates of these samples; the first gate of the first adapter is a leaf."""
        weights = {n: t.double() for n, t in params.items()}
        for adapter, gate in zip(adapters, (leaf, gates[1]), strict=True):
            mixed = evolve(adapter, gate={m: gate[samples] for m in adapter.factors})
            weights = lora.apply_lora(weights, mixed, rows=torch.arange(len(samples)))
        return weights

    monkeypatch.setattr(
        "medvl.components.encode._LARGEST_ON_CPU", 4 * 17 * 256 * 8
    )  # chunks of about 4 slices, over the ends of volumes
    leaf = gates[0].clone().requires_grad_()
    together = encode_slices(cfg, adapted([0, 1, 2], leaf), v, MASK, vit=skeleton)
    (grad,) = torch.autograd.grad(together.square().sum(), leaf)
    alone = gates[0].clone().requires_grad_()
    each = torch.cat(
        [
            encode_slices(cfg, adapted([i], alone), v[i : i + 1], MASK[i : i + 1], vit=skeleton)
            for i in range(3)
        ]
    )
    torch.testing.assert_close(together, each, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        grad, torch.autograd.grad(each.square().sum(), alone)[0], rtol=1e-9, atol=1e-12
    )
    assert grad.abs().min() > 0
    with pytest.raises(ValueError, match="has weights for 2 samples, the batch has 3"):
        encode_slices(cfg, adapted([0, 1], leaf), v, MASK, vit=skeleton)


def kept_bytes(cfg, skeleton, params, v) -> int:
    """Bytes that autograd holds for the gradient, the weights not counted."""
    blocks = {}

    def pack(t):
        blocks[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = {n: t.requires_grad_() for n, t in params.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = encode_slices(cfg, leaves, v, MASK, vit=skeleton)
    assert out.requires_grad
    for t in params.values():
        blocks.pop(t.untyped_storage().data_ptr(), None)
    return sum(blocks.values())


def test_the_estimate_of_what_a_gradient_keeps_is_true():
    skeleton, params = vit_of()
    v = volumes()
    plain = kept_bytes(EncodeConfig(), skeleton, params, v)
    estimate = 9 * 17 * 4 * 2 * (10 * 64 + 2 * 256)  # slices, tokens, bytes, blocks, values per token
    assert 0.75 < estimate / plain < 1.35
    assert kept_bytes(EncodeConfig(checkpoint=True), skeleton, params, v) < 0.05 * plain


def test_chunks_follow_the_budget():
    skeleton, _ = vit_of()
    small, large = (
        chunk_size(EncodeConfig(budget_mib=m), skeleton, (32, 32), torch.device("cuda")) for m in (64, 256)
    )
    assert large == pytest.approx(4 * small, rel=0.05)
    cfg = EncodeConfig(budget_mib=64)
    assert chunk_size(evolve(cfg, dtype="bfloat16"), skeleton, (32, 32), torch.device("cuda")) > 1.5 * small
    assert chunk_size(evolve(cfg, checkpoint=True), skeleton, (32, 32), torch.device("cuda")) < 0.6 * small
    assert chunk_size(cfg, skeleton, (32, 32), CPU) <= small
    assert chunk_size(EncodeConfig(budget_mib=1), skeleton, (3200, 3200), CPU) == 1


# Precision ------------------------------------------------------------------------------------------------------------------------------
def test_bfloat16_is_near_float32_and_autocast_works():
    skeleton, params = vit_of()
    v = volumes()
    leaf = {n: t.requires_grad_("mask_token" not in n) for n, t in params.items()}
    want = encode_slices(EncodeConfig(), leaf, v, MASK, vit=skeleton).detach()
    half = encode_slices(EncodeConfig(dtype="bfloat16"), leaf, v, MASK, vit=skeleton)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encode_slices(EncodeConfig(checkpoint=True), leaf, v, MASK, vit=skeleton)
    for got in (half, mixed):
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got[MASK], want[MASK], dim=-1).min() > 0.99
        assert not torch.equal(got, want)
        grad = torch.autograd.grad(got.square().sum(), leaf["encoder.layer.0.norm1.weight"])[0]
        assert grad.dtype == torch.float32
        assert grad.abs().max() > 0
    stored = {n: t.detach().bfloat16() for n, t in leaf.items()}
    assert torch.equal(encode_slices(EncodeConfig(dtype="bfloat16"), stored, v, MASK, vit=skeleton), half)


# Errors ---------------------------------------------------------------------------------------------------------------------------------
def test_errors():
    skeleton, params = vit_of()
    cfg, v = EncodeConfig(), volumes()
    for voxels, mask in ((v[0], MASK[0]), (v, MASK[:2]), (v, MASK.long())):
        with pytest.raises(ValueError, match=r"voxels must be \[b, s, y, x\] and mask bool \[b, s\], got"):
            encode_slices(cfg, params, voxels, mask, vit=skeleton)
    with pytest.raises(
        ValueError,
        match=r"multiples of the patch size 8, got 36x32; nearest are 32, 40: set EncodeConfig.resize",
    ):
        encode_slices(cfg, params, volumes((36, 32)), MASK, vit=skeleton)
    with pytest.raises(ValueError, match=r"got 60x60; nearest are 56, 64"):
        encode_slices(EncodeConfig(resize=60), params, v, MASK, vit=skeleton)
    with pytest.raises(ValueError, match="uint8 or int16"):
        encode_slices(cfg, params, v.float(), MASK, vit=skeleton)
    with pytest.raises(ValueError, match=r"mean and std must be 3 numbers, std positive"):
        EncodeConfig(std=(1.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="budget_mib must be 1 or more"):
        EncodeConfig(budget_mib=0)
