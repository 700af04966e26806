"""Published sizes of the models that are measured and estimated, with random weights: nothing comes from the hub."""

from typing import Any

import torch
from torch import Generator, Tensor

from benches.gpu.measure import Place
from medvl.hub import skeletons
from tests.gpu import cases

_DINOV2 = {
    "model_type": "dinov2_with_registers",
    "image_size": 518,
    "patch_size": 14,
    "num_register_tokens": 4,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
QWEN3_4B = {  # config.json of huggingface.co/Qwen/Qwen3-4B-Instruct-2507
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}
_QWEN_VISION = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0}
# Named as in experiments/*.toml.
PUBLISHED: dict[str, dict[str, Any]] = {
    "facebook/dinov2-with-registers-small": _DINOV2 | {"hidden_size": 384, "num_attention_heads": 6},
    "facebook/dinov2-with-registers-base": _DINOV2 | {"hidden_size": 768, "num_attention_heads": 12},
    "facebook/dinov2-with-registers-large": _DINOV2
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "facebook/dinov2-with-registers-giant": _DINOV2
    | {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
    "Qwen/Qwen3-4B-Instruct-2507": QWEN3_4B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": QWEN25_7B | {"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION
        | {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "Qwen/Qwen2-VL-7B-Instruct": {
        "model_type": "qwen2_vl",
        "text_config": QWEN25_7B | {"model_type": "qwen2_vl_text", "rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION
        | {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
    },
    # Qwen2.5-1.5B with a head of its own (2.09 billion weights in all), InternViT-300M, tiles of 448 pixels.
    "OpenGVLab/InternVL3-2B-hf": {
        "model_type": "internvl",
        "image_token_id": 151667,
        "tie_word_embeddings": False,
        "text_config": QWEN25_7B
        | {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151674,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "attention_bias": True,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
    },
}
# Linear layers that LoRA is put on.
LINEAR = r".*\.(q|k|v|o|gate|up|down)_proj"


def language_model(place: Place, config: dict[str, Any]) -> skeletons.Skeleton:
    """A decoder of this size, or of toy size; its buffers lie on the device."""
    if place.tiny:
        config = {"model_type": config["model_type"], **cases.TEXT, "tie_word_embeddings": False}
    return on_device(place, skeletons.empty_skeleton(config, head="language"))


def on_device(place: Place, skeleton: skeletons.Skeleton) -> skeletons.Skeleton:
    return skeletons.make_skeleton(skeleton.module, skeleton.name, place.device)


def random_weights(place: Place, skeleton: skeletons.Skeleton, transform: Any = None) -> dict[str, Tensor]:
    """Weights in bfloat16, drawn on the device one at a time and given to `transform`."""
    gen = Generator(place.device).manual_seed(0)
    weights = {}
    for name, parameter in skeleton.module.named_parameters():
        if "norm" in name:
            weight = torch.ones(parameter.shape, device=place.device, dtype=torch.bfloat16)
        else:
            weight = torch.randn(parameter.shape, device=place.device, dtype=torch.bfloat16, generator=gen)
            weight *= 0.02
        weights[name] = transform(name, weight) if transform else weight
    return weights


def peer_module(skeleton: skeletons.Skeleton) -> Any:
    """transformers' own module of the same size, its parameters on meta, the skeleton's buffers."""
    with torch.device("meta"):
        module = type(skeleton.module)(skeleton.module.config).eval()
    for theirs, ours in zip(module.modules(), skeleton.module.modules(), strict=True):
        for name, buffer in ours._buffers.items():
            theirs._buffers[name] = buffer
    return module


def text_batch(place: Place, rows: int, tokens: int) -> dict[str, Tensor]:
    """A batch of trained text on the CPU, as data comes."""
    ids = torch.randint(5, 400, (rows, tokens), generator=Generator().manual_seed(1))
    return {
        "ids": ids,
        "labels": ids.clone(),
        "mask": torch.ones_like(ids, dtype=torch.bool),
        "visual": torch.zeros_like(ids, dtype=torch.bool),
        "images": torch.zeros(rows, dtype=torch.int64),
    }
