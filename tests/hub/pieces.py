"""Tiny encoders for the tests of hub, and threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 99,
}
TINY = {
    "dinov2": {"model_type": "dinov2", **VISION},
    "giant": {"model_type": "dinov2", **VISION, "use_swiglu_ffn": True},
    "registers": {"model_type": "dinov2_with_registers", **VISION, "num_register_tokens": 4},
    "dinov3": {"model_type": "dinov3_vit", **VISION, "intermediate_size": 96, "num_register_tokens": 4},
    "vit": {"model_type": "vit", **VISION, "intermediate_size": 96},
    "clip_vision": {"model_type": "clip_vision_model", **VISION, "intermediate_size": 96},
    "clip_text": {"model_type": "clip_text_model", **TEXT, "bos_token_id": 1, "eos_token_id": 2},
    "bert": {"model_type": "bert", **TEXT},
}


def model_of(kind):
    """transformers' own module with every parameter random (its initialisation leaves many at 0 or 1)."""
    from transformers import AutoConfig, AutoModel

    config = dict(TINY[kind])
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model


def inputs_of(kind, px=32):
    gen = torch.Generator().manual_seed(1)
    return (
        torch.randint(5, 90, (2, 9), generator=gen)
        if kind in ("clip_text", "bert")
        else torch.randn(2, 3, px, px, generator=gen)
    )


def in_threads(work, n=4):
    """What `work(i)` returns in each of n threads that start together."""
    ready = threading.Barrier(n)

    def start(i):
        ready.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))
