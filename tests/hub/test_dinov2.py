"""dinov2: the original checkpoints, against the network written down plainly."""

import pytest
import torch
import torch.nn.functional as F

from medvl.hub import dinov2, loading
from medvl.hub.dinov2 import dinov2_config


def original(swiglu=False, registers=0, d=128, depth=2, grid=4):
    """A random state dict with the names and shapes of the original DINOv2 checkpoints."""
    shapes = {
        "cls_token": (1, 1, d),
        "mask_token": (1, d),
        "pos_embed": (1, grid**2 + 1, d),
        "patch_embed.proj.weight": (d, 3, 14, 14),
    }
    shapes |= {"patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,)}
    shapes |= {"register_tokens": (1, registers, d)} if registers else {}
    hidden = (int(4 * d * 2 / 3) + 7) // 8 * 8
    mlp = {"w12": (2 * hidden, d), "w3": (d, hidden)} if swiglu else {"fc1": (4 * d, d), "fc2": (d, 4 * d)}
    for i in range(depth):
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d)} | {f"mlp.{k}": s for k, s in mlp.items()}
        shapes |= {
            f"blocks.{i}.{n}.{leaf}": s[: 2 - (leaf == "bias")]
            for n, s in linear.items()
            for leaf in ("weight", "bias")
        }
        shapes |= {f"blocks.{i}.{n}.{leaf}": (d,) for n in ("norm1", "norm2") for leaf in ("weight", "bias")}
        shapes |= {f"blocks.{i}.ls{k}.gamma": (d,) for k in (1, 2)}
    gen = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=gen) * 0.2 for n, s in shapes.items()}


def naive_dinov2(p, x):
    """Oquab et al. 2023, arXiv:2304.07193; registers of Darcet et al. 2023, arXiv:2309.16588. x [b, 3, y, x] of the trained size."""
    d = p["norm.weight"].numel()

    def norm(z, name):
        return F.layer_norm(z, (d,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def linear(z, name):
        return z @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    z = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=14).flatten(2).mT
    z = torch.cat([p["cls_token"].expand(len(z), 1, d), z], 1) + p["pos_embed"]
    if "register_tokens" in p:
        z = torch.cat([z[:, :1], p["register_tokens"].expand(len(z), -1, -1), z[:, 1:]], 1)
    for i in range(2):
        b = f"blocks.{i}."
        q, k, v = (
            linear(norm(z, b + "norm1"), b + "attn.qkv")
            .unflatten(-1, (3, d // 64, 64))
            .permute(2, 0, 3, 1, 4)
        )
        heads = (q @ k.mT / 8).softmax(-1) @ v
        z = z + p[b + "ls1.gamma"] * linear(heads.transpose(1, 2).flatten(2), b + "attn.proj")
        h = norm(z, b + "norm2")
        if b + "mlp.w12.weight" in p:
            gate, up = linear(h, b + "mlp.w12").chunk(2, -1)
            h = linear(F.silu(gate) * up, b + "mlp.w3")
        else:
            h = linear(F.gelu(linear(h, b + "mlp.fc1")), b + "mlp.fc2")
        z = z + p[b + "ls2.gamma"] * h
    return norm(z, "norm")


@pytest.mark.parametrize(("swiglu", "registers"), [(False, 0), (False, 4), (True, 0), (True, 4)])
def test_original_dinov2(tmp_path, swiglu, registers):
    state = original(swiglu, registers)
    torch.save(state, tmp_path / "dinov2_vitx14_pretrain.pth")
    skeleton, params = loading.load_skeleton(tmp_path / "dinov2_vitx14_pretrain.pth")
    assert skeleton.name == "dinov2_vitx14_pretrain"
    assert (skeleton.config["image_size"], skeleton.config["num_attention_heads"]) == (56, 2)
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            skeleton(params, x).last_hidden_state, naive_dinov2(state, x), rtol=1e-4, atol=1e-4
        )


def test_original_dinov2_of_published_shapes():
    """facebookresearch/dinov2: ViT-S/14 has 12 blocks of 384 (176 keys with registers), ViT-g/14 40 of 1536 and a SwiGLU of 4096."""
    with torch.device("meta"):
        small = {k: torch.empty(v.shape) for k, v in original(registers=4, d=384, depth=12, grid=37).items()}
        giant = {k: torch.empty(v.shape) for k, v in original(swiglu=True, d=192, depth=3).items()}
    assert len(small) == 176
    config = dinov2_config(small, "x")
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == (
        "dinov2_with_registers",
        384,
        12,
    )
    assert (config["num_attention_heads"], config["image_size"], config["num_register_tokens"]) == (6, 518, 4)
    assert dinov2_config(giant, "x")["use_swiglu_ffn"]


def test_original_dinov2_refuses_other_keys():
    with pytest.raises(ValueError, match=r"'blocks.0.attn.rel_pos' is not a key of an original DINOv2"):
        dinov2.from_dinov2({"blocks.0.attn.rel_pos": torch.zeros(1)})
    state = {k: v[:100] if k == "patch_embed.proj.weight" else v for k, v in original().items()}
    with pytest.raises(ValueError, match=r"multiple of 64 .* found 100"):
        dinov2_config(state, "x")
