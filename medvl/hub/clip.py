"""CLIP as OpenAI (github.com/openai/CLIP) and open_clip publish it: a tower's weights and config as Hugging Face has
them.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medvl.base.text import few

SETTINGS = "open_clip_config.json"
# The weights of a tower, without its projection.
_TOWERS = {
    "vision": r"visual\.(?!proj$)(.+)",
    "text": r"(?:text\.(?!text_projection)|(?=transformer|token|positional|ln_final|cls_emb))(.+)",
}
# Parts of names there and in Hugging Face's CLIP, replaced in this order.
_NAMES = {
    "transformer.resblocks.": "encoder.layers.",
    "token_embedding.": "embeddings.token_embedding.",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.": "embeddings.patch_embedding.",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "ln_final.": "final_layer_norm.",
    "ln_": "layer_norm",
    "attn.": "self_attn.",
    "c_fc.": "fc1.",
    "c_proj.": "fc2.",
}


def from_clip(state: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """The weights of a tower, "text" or "vision", without its projection, by Hugging Face's names."""
    weights: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = re.fullmatch(_TOWERS[tower], key)
        if match is None or key.endswith("attn_mask"):  # which is computed
            continue
        name = match[1]
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        if ".in_proj_" not in name:
            weights[name] = tensor
            continue
        # The original keeps the three projections in one tensor. A damaged one may give fewer: binding misses them.
        for letter, piece in zip("qkv", tensor.chunk(3), strict=False):
            weights[name.replace("in_proj_", f"{letter}_proj.")] = piece
    return weights


def clip_config(
    weights: Mapping[str, Tensor], tower: str, path: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of a tower from `from_clip`, by its shapes and what they do not tell.

    Args:
        settings: model_cfg of open_clip_config.json; empty = there is none.
    Raises:
        ValueError: the tower is no transformer of CLIP's own, or not the one that the settings describe.
    """
    embed = f"embeddings.{'token' if tower == 'text' else 'patch'}_embedding.weight"
    mlp, position = "encoder.layers.0.mlp.fc1.weight", "embeddings.position_embedding.weight"
    dims = {embed: 2 if tower == "text" else 4, mlp: 2, position: 2}
    if any(name not in weights or weights[name].dim() != n for name, n in dims.items()):
        raise ValueError(
            f"load: {path}: its {tower} tower must be a transformer of CLIP's own, as those of ViT-B-32, and is "
            "another network; of a CLIP whose vision tower is a ResNet, such as RN50, only the text tower is read"
        )
    inner, width = weights[mlp].shape
    depth = sum(name.endswith("mlp.fc1.weight") for name in weights)
    own = settings.get(f"{tower}_cfg", {})
    _check_settings(own, depth, width, f"load: {path}: {SETTINGS} describes another {tower} tower")
    if not settings:
        advice = "quick_gelu is taken, as of OpenAI; most other CLIP have gelu"
        warnings.warn(f"load: {path} has no {SETTINGS} beside it: {advice}", stacklevel=4)
    config = {
        "model_type": f"clip_{tower}_model",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "hidden_act": "quick_gelu" if settings.get("quick_gelu", not settings) else "gelu",
    }
    rows, *_, patch = weights[embed].shape
    positions = len(weights[position])
    if tower == "text":
        return config | {
            # Left out, they are 8 in open_clip, and 64 wide in OpenAI's.
            "num_attention_heads": own.get("heads", 8 if own else width // 64),
            "vocab_size": rows,
            "max_position_embeddings": positions,
            # CLIP pools by the end token, the last of the vocabulary.
            "eos_token_id": rows - 1,
        }
    return config | {
        "num_attention_heads": width // own.get("head_width", 64),
        "patch_size": patch,
        # One position is the class token's.
        "image_size": patch * round((positions - 1) ** 0.5),
    }


def _check_settings(own: Mapping[str, Any], depth: int, width: int, message: str) -> None:
    """Raise where the settings of a tower are not those of its shapes, or ask for what is not read."""
    expected = {
        "layers": depth,
        "width": width,
        "act_kwargs": None,
        "norm_kwargs": None,
        "no_causal_mask": None,
    }
    wrong = [name for name, value in expected.items() if (own.get(name) or value) != value]
    if wrong:
        raise ValueError(f"{message}, by {few(wrong)}")
