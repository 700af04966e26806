"""Original DINOv2 checkpoints: their names, as published Hugging Face checkpoints have them and back, and their config from their shapes.

Source of the names: github.com/facebookresearch/dinov2 and the checkpoints facebook/dinov2-* on the Hugging Face hub.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_OUTER = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls2.gamma": "layer_scale2.lambda1",
}
_QKV = ("query", "key", "value")
_BACK = {v: k for k, v in (_OUTER | _BLOCK).items()}
# Names inside the transformers module where they differ from those of the published checkpoints.
_MODULE = {f"attention.{p}_proj": f"attention.attention.{q}" for p, q in zip("qkv", _QKV, strict=True)}
_MODULE |= {"attention.o_proj": "attention.output.dense", "mlp.down_proj": "mlp.weights_out"}


def from_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An original DINOv2 state dict with the names of the published Hugging Face checkpoints (for `bind`).

    Raises:
        ValueError: a key that is not DINOv2's.
    """
    out: dict[str, Tensor] = {}
    for key, t in state.items():
        block, stem, leaf = _parse(key, r"blocks\.(\d+)\.")
        prefix = f"encoder.layer.{block}." if block else ""
        if block and stem == "attn.qkv":
            out |= {
                f"{prefix}attention.attention.{q}{leaf}": p.contiguous()
                for q, p in zip(_QKV, t.chunk(3), strict=True)
            }
        elif stem in (names := _BLOCK if block else _OUTER):
            out[f"{prefix}{names[stem]}{leaf}"] = t
        else:
            raise ValueError(
                f"from_dinov2: {key!r} is no key of an original DINOv2 checkpoint (like 'blocks.0.attn.qkv.weight')"
            )
    return out


def to_dinov2(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_dinov2`; takes the names of the published checkpoints or of the module (the params of a skeleton).

    Raises:
        ValueError: a key that is not DINOv2's.
    """
    out: dict[str, Tensor] = {}
    rows: dict[
        str, dict[str, Tensor]
    ] = {}  # pieces that the original keeps in one tensor, {key: {piece: tensor}}
    for key, t in params.items():
        block, stem, leaf = _parse(key, r"encoder\.layer\.(\d+)\.")
        prefix = f"blocks.{block}." if block else ""
        stem = _MODULE.get(stem, stem) if block else stem
        if stem.startswith("attention.attention."):
            rows.setdefault(f"{prefix}attn.qkv{leaf}", {})[stem.rpartition(".")[2]] = t
        elif stem in ("mlp.gate_proj", "mlp.up_proj"):
            rows.setdefault(f"{prefix}mlp.w12{leaf}", {})[stem] = t
        elif stem in _BACK:
            out[f"{prefix}{_BACK[stem]}{leaf}"] = t
        else:
            raise ValueError(
                f"to_dinov2: {key!r} is no key of a Hugging Face DINOv2 (like 'encoder.layer.0.norm1.weight')"
            )
    for key, parts in rows.items():
        order = _QKV if "qkv" in key else ("mlp.gate_proj", "mlp.up_proj")
        if lost := [p for p in order if p not in parts]:
            raise ValueError(f"to_dinov2: {key} needs {', '.join(order)}, but there is no {', '.join(lost)}")
        out[key] = torch.cat([parts[p] for p in order])
    return out


def _parse(key: str, block: str) -> tuple[str, str, str]:
    hit = re.fullmatch(rf"(?:{block})?(.+?)(\.weight|\.bias)?", key)
    assert hit
    return hit[1] or "", hit[2], hit[3] or ""


def dinov2_config(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The config of an original DINOv2 checkpoint, from its shapes; DINOv2's heads are 64 wide."""
    if not {"pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"} <= state.keys():
        found = ", ".join(list(state)[:6])
        raise ValueError(
            f"load: {where} must be an original DINOv2 checkpoint (pos_embed, blocks.0..., patch_embed...), found {found}"
        )
    width, channels, _, patch = state["patch_embed.proj.weight"].shape
    swiglu = "blocks.0.mlp.w12.weight" in state
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    if width % 64:
        raise ValueError(
            f"load: {where}: the width of a DINOv2 must be a multiple of 64 (its heads are 64 wide), found {width}"
        )
    return {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "num_attention_heads": width // 64,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * round((state["pos_embed"].shape[1] - 1) ** 0.5),
        "mlp_ratio": 4 if swiglu else state["blocks.0.mlp.fc1.weight"].shape[0] // width,
        "use_swiglu_ffn": swiglu,
    } | ({"num_register_tokens": registers} if registers else {})
