"""Original DINOv2 checkpoints: their weights by the names of published Hugging Face checkpoints, and their
config from their shapes.

Source of the names: github.com/facebookresearch/dinov2 and the checkpoints facebook/dinov2-* on the Hugging
Face hub.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# {name in the original: name in the published checkpoint}, outside of the blocks and inside one.
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
_QKV = ("query", "key", "value")  # in the order in which the original stacks them


def from_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An original DINOv2 state dict with the names of the published Hugging Face checkpoints (for
    `bind_weights`).

    Raises:
        ValueError: a key that is not DINOv2's.
    """
    published: dict[str, Tensor] = {}
    for key, tensor in state.items():
        # "blocks.3.mlp.fc1.weight" is block "3", stem "mlp.fc1", leaf ".weight".
        match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", key)
        block, stem, leaf = match.groups("") if match else ("", "", "")
        prefix = f"encoder.layer.{block}." if block else ""
        names = _BLOCK if block else _OUTER
        if block and stem == "attn.qkv":
            # The original keeps the three projections in one tensor.
            for projection, piece in zip(_QKV, tensor.chunk(3), strict=True):
                published[f"{prefix}attention.attention.{projection}{leaf}"] = piece.contiguous()
        elif stem in names:
            published[f"{prefix}{names[stem]}{leaf}"] = tensor
        else:
            raise ValueError(
                f"from_dinov2: {key!r} is not a key of an original DINOv2 checkpoint (like "
                "'blocks.0.attn.qkv.weight')"
            )
    return published


def dinov2_config(state: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """The config of an original DINOv2 checkpoint, from its shapes; DINOv2's heads are 64 wide."""
    if not {"pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"} <= state.keys():
        keys = ", ".join(list(state)[:6])
        raise ValueError(
            f"load: {path} must be an original DINOv2 checkpoint (pos_embed, blocks.0..., "
            f"patch_embed...), found {keys}"
        )
    width, channels, _, patch = state["patch_embed.proj.weight"].shape  # a convolution [out, in, p, p]
    if width % 64:
        raise ValueError(
            f"load: {path}: the width of a DINOv2 must be a multiple of 64 (its heads are 64 wide), "
            f"found {width}"
        )
    # The giant model has a gated feed-forward block; transformers computes its inner width from the ratio 4.
    swiglu = "blocks.0.mlp.w12.weight" in state
    mlp_ratio = 4 if swiglu else state["blocks.0.mlp.fc1.weight"].shape[0] // width
    # One position is the class token's; registers have none.
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    registers = 0
    if "register_tokens" in state:
        registers = state["register_tokens"].shape[1]
    blocks = [int(key.split(".")[1]) for key in state if key.startswith("blocks.")]
    depth = 1 + max(blocks)
    config = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * grid,
        "mlp_ratio": mlp_ratio,
        "use_swiglu_ffn": swiglu,
    }
    if registers:
        config["num_register_tokens"] = registers
    return config
