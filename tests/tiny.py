"""Tiny random language and vision-language models in transformers' own architectures with a peer module; messages and pictures."""

import io
import json

import numpy as np
import torch
from PIL import Image, ImageDraw

from medvl.base import display
from medvl.hub import skeletons

TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
QWEN_TOKENS = {
    "image_token_id": 150,
    "video_token_id": 151,
    "vision_start_token_id": 152,
    "vision_end_token_id": 153,
}
CONFIGS = {
    "qwen2": {"model_type": "qwen2", **TEXT},
    "qwen3": {"model_type": "qwen3", **TEXT, "head_dim": 8, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", **TEXT, "sliding_window": 6},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 160,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "text_config": {"model_type": "qwen2_vl_text", **TEXT, "rope_parameters": ROPE},
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": ROPE},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {
            "model_type": "qwen3_vl_text",
            **TEXT,
            "head_dim": 8,
            "rope_parameters": ROPE | {"mrope_interleaved": True},
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_TOKENS,
    },
    "internvl": {
        "model_type": "internvl",
        "tie_word_embeddings": False,
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        "image_token_id": 150,
        "downsample_ratio": 0.5,
        "image_seq_length": 4,
    },
}
VLM = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


def model(kind, seed=0, std=0.15, head="language"):
    """(skeleton, params) with every weight random: transformers leaves some at 0 or 1."""
    gen = torch.Generator().manual_seed(seed)
    skeleton, params = skeletons.init_skeleton(CONFIGS[kind], gen, head=head)
    return skeleton, {
        n: torch.randn(t.shape, generator=gen) * std + ("norm" in n and t.dim() == 1)
        for n, t in params.items()
    }


def peer(skeleton, params):
    """A real transformers module with these weights."""
    module = type(skeleton.module)(skeleton.module.config).eval()
    module.load_state_dict({n: t.detach().clone() for n, t in params.items()}, strict=False)
    module.tie_weights()
    return module


def peer_tokens(skeleton, params, inputs, n, **kwargs):
    """The `n` tokens that transformers' greedy decoding puts behind each prompt."""
    with torch.no_grad():
        out = peer(skeleton, params).generate(
            **inputs, do_sample=False, max_new_tokens=n, pad_token_id=0, **kwargs
        )
    return out[:, inputs["input_ids"].shape[1] :]


def images(kind, counts, gen):
    """(model inputs, visual tokens of each sample) of images, `counts[b]` for sample b; sizes differ where the architecture allows it."""
    if kind == "internvl":
        return {"pixel_values": torch.randn(sum(counts), 3, 16, 16, generator=gen)}, [[4] * n for n in counts]
    grids, tokens = [], []
    for n in counts:
        sizes = [(2 * (1 + (i + n) % 3), 4) for i in range(n)]
        grids += [(1, *s) for s in sizes]
        tokens.append([h * w // 4 for h, w in sizes])
    grid = torch.tensor(grids)
    return {
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, generator=gen),
        "image_grid_thw": grid,
    }, tokens


def batch(kind, counts=(1, 2), side="left", seed=1):
    """Model inputs of samples with `counts[b]` images each, padded on `side`; the tokens of the first sample are fewer."""
    gen = torch.Generator().manual_seed(seed)
    inputs, tokens = images(kind, counts, gen) if kind in VLM else ({}, [[] for _ in counts])
    rows = []
    for i, of in enumerate(tokens):
        row = torch.randint(3, 140, (4 + 2 * i,), generator=gen).tolist()
        for n in of:
            row += [152, *[150] * n, 153] if kind in VLM else []
            row += torch.randint(3, 140, (3,), generator=gen).tolist()
        rows.append(row)
    longest = max(map(len, rows))
    pad = [[0] * (longest - len(r)) for r in rows]
    ids = torch.tensor([p + r if side == "left" else r + p for p, r in zip(pad, rows, strict=True)])
    keep = [
        [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
        for p, r in zip(pad, rows, strict=True)
    ]
    inputs |= {"input_ids": ids, "attention_mask": torch.tensor(keep)}
    if kind in VLM and kind != "internvl":
        inputs["mm_token_type_ids"] = (ids == 150).int()
    return inputs


def renamed(inputs):
    """A batch in the names of `vlm.model_inputs`."""
    names = {"input_ids": "ids", "attention_mask": "mask"}
    return {names.get(name, name): value for name, value in inputs.items()}


def sample(kind, inputs, b, counts):
    """The inputs of sample b alone, without its padding."""
    keep = inputs["attention_mask"][b].bool()
    one = {
        k: inputs[k][b : b + 1][:, keep]
        for k in ("input_ids", "attention_mask", "mm_token_type_ids")
        if k in inputs
    }
    if kind not in VLM or not counts[b]:
        return one
    before = sum(counts[:b])
    if kind == "internvl":
        return one | {"pixel_values": inputs["pixel_values"][before : before + counts[b]]}
    sizes = inputs["image_grid_thw"].prod(1)
    start, n = int(sizes[:before].sum()), int(sizes[before : before + counts[b]].sum())
    return one | {
        "pixel_values": inputs["pixel_values"][start : start + n],
        "image_grid_thw": inputs["image_grid_thw"][before : before + counts[b]],
    }


def turns(*texts, system=None):
    """Messages of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def drawn(size, mode="RGB", seed=0) -> Image.Image:
    """Noise, lines and text: what shows every difference in resampling."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    pen.line((0, 0, *size), fill=(255, 0, 0, 90), width=3)
    pen.text((2, 2), "HbA1c 8.4 %", fill=(0, 0, 0, 255))
    return (
        image
        if mode == "RGBA"
        else image.convert("RGB").convert(mode)
        if mode not in ("LA", "PA", "RGBa")
        else image.convert(mode)
    )


def saved(image, format, **kwargs) -> bytes:
    """The content of an image file."""
    held = io.BytesIO()
    image.save(held, format, **kwargs)
    return held.getvalue()


def without_clock(path):
    """The lines of a metrics.jsonl to the byte, but for the time and the pace, which another run cannot repeat."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    always = {"time", "seconds_per_step", "seconds_left", "memory_gb"}
    assert all(always <= line.keys() for line in lines)
    return "".join(
        json.dumps({k: v for k, v in line.items() if k not in display.TIMING_KEYS}) + "\n" for line in lines
    ).encode()
