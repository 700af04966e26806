"""Tiny random text and image encoders in the real formats of the hub, with transformers' own modules beside them."""

import json

import numpy as np
import torch
import torch.nn.functional as F

from medvl.adapters import embedders
from medvl.adapters.embed_config import EmbedConfig
from medvl.hub import tokens
from tests import tiny

REPORTS = [
    "The heart is normal in size.",
    "No pleural effusion; the heart is normal.",
    "Nodule of 12 mm in the left upper lobe.",
    "Fundus",
]
PICTURES = [tiny.drawn((40 + 9 * i, 50), seed=i) for i in range(5)]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # of tokens.train_bpe


def write(folder, kind, std=0.2, **config):
    """A checkpoint with every weight random, and a tokenizer that learnt a few reports; returns transformers' own module."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * std)
    tokens.train_bpe(REPORTS * 4, 300, folder)
    model.save_pretrained(folder)
    return model


KINDS = ("bert", "roberta", "qwen3", "clip", "siglip")


def write_all(where, kinds=KINDS):
    """{kind: (folder, transformers' module)} of checkpoints in the folder `where`."""
    sides = {"vision_config": VISION, "text_config": TEXT | {"max_position_embeddings": 20} | ENDS}
    configs = {
        "bert": TEXT | {"max_position_embeddings": 64, "pad_token_id": 2},
        "roberta": TEXT | {"max_position_embeddings": 23, "pad_token_id": 2},
        "qwen3": tiny.TEXT | {"vocab_size": 300, "head_dim": 8} | ENDS,
        "clip": sides | {"projection_dim": 16},
        "siglip": sides | {"text_config": sides["text_config"] | {"projection_size": 32}},
    }
    size = {"height": 32, "width": 32}
    processors = {
        "clip": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": size,
        },
        "siglip": {"image_processor_type": "SiglipImageProcessor", "size": size},
    }
    made = {}
    for kind in kinds:
        made[kind] = (where / kind, write(where / kind, kind, **configs[kind]))
        if kind in processors:
            (where / kind / "preprocessor_config.json").write_text(json.dumps(processors[kind]))
    return made


def encoder(models, kind, **settings):
    which = "image_text" if kind in ("clip", "siglip") else "text"
    return embedders.open_embedder(EmbedConfig(kind=which, name=str(models[kind][0]), **settings))


def unit(x):
    return F.normalize(torch.as_tensor(np.asarray(x)).double(), dim=-1)


def close(ours, theirs, atol=2e-6):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)
