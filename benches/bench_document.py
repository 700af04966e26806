"""One answer about a drawn page: the picture is opened and preprocessed, the prompt read, tokens generated.

Beside transformers' own processor and `generate` with the same weights. Qwen2.5-VL of random weights: on a GPU the decoder has the
width of the 3B model, on a CPU it is small.
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from PIL import Image

from medvl.base import config
from medvl.language import chat, system
from medvl.language.images import to_rgb
from medvl.language.sampling import Sampling
from medvl.systems.document import SYSTEM
from medvl.systems.document.record import Config

CUDA = torch.cuda.is_available()
NEW = 64 if CUDA else 16
PIXELS = 1280 * 28 * 28 if CUDA else 320 * 28 * 28
WIDTH, LAYERS = (2048, 12) if CUDA else (256, 4)
MODEL = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 0,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH // 64,
        "num_key_value_heads": WIDTH // 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
    },
    "vision_config": {
        "depth": LAYERS,
        "hidden_size": WIDTH // 2,
        "intermediate_size": WIDTH,
        "num_heads": WIDTH // 128,
        "out_hidden_size": WIDTH,
        "patch_size": 14,
        "fullatt_block_indexes": [LAYERS - 1],
    },
}
RECORD = {
    "system": "document",
    "model": {"config": MODEL, "dtype": "bfloat16" if CUDA else "float32"},
    "data": {"source": "pages", "pages": {"train": 4, "valid": 1, "test": 1, "damages": ["clean"]}},
    "chat": {"context": 4096, "max_pixels": PIXELS, "repetition_penalty": 1.0},
    "train": {"stages": [{"name": "none", "steps": 1, "lr": 1e-3, "train": ["model/.*"]}]},
}


@cache
def opened() -> tuple[system.LanguageModel, Any, chat.Encoded]:
    """(model, params, one prompt about a page)."""
    folder = Path(mkdtemp())
    raw = RECORD | {"data": RECORD["data"] | {"folder": str(folder)}}
    cfg = config.structure(raw, Config, "bench")
    read = SYSTEM.prepare(cfg, lambda line: None)
    texts = system.message_texts(read("train"))
    model, params = system.init_model(cfg, folder, texts, device=system.device_of(cfg.train))
    return model, params, chat.encode_conversations(model.chat, read("test"), prompt=True)


@cache
def peer() -> torch.nn.Module:
    """transformers' module, holding the same tensors."""
    from transformers import AutoModelForImageTextToText

    model, params, _ = opened()
    module = AutoModelForImageTextToText.from_config(
        model.chat.skeleton.module.config, dtype=model.chat.dtype
    )
    module.load_state_dict(params["model"], strict=False)
    module.tie_weights()
    return module.to(system.device_of(model.cfg.train)).eval()


def answer_of_peer() -> list[int]:
    """The new tokens by transformers, from the file of the page."""
    from transformers import Qwen2VLImageProcessorPil

    model, _, prompts = opened()
    device = system.device_of(model.cfg.train)
    (sample,), (conversation,) = prompts.samples, prompts.conversations
    size = {"shortest_edge": 56 * 56, "longest_edge": PIXELS}
    page = to_rgb(Image.open(conversation.items[0]), "bench")
    pixels = Qwen2VLImageProcessorPil(size=size)(images=[page], return_tensors="pt").to(device)
    ids = torch.as_tensor(sample.ids, device=device)[None]
    with torch.no_grad():
        row = peer().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == peer().config.image_token_id).int(),
            pixel_values=pixels["pixel_values"].to(model.chat.dtype),
            image_grid_thw=pixels["image_grid_thw"],
            do_sample=False,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
    return row[0, ids.shape[1] :].tolist()


def answer() -> list[int]:
    """The new tokens by medvl, from the file of the page."""
    model, params, prompts = opened()
    batch = chat.make_batch(model.chat, prompts, [0], side="left")
    weights = system.model_weights(model, params)
    answers = chat.generate_answers(model.chat, weights, batch, Sampling(max_tokens=NEW), params=params)
    return list(answers.ids[0])


def bench_page(measure):
    """extra_info has the time as a part of transformers', which fails where it grows."""
    _, _, prompts = opened()
    theirs = answer_of_peer()
    tokens = measure(answer, rounds=5, peer=answer_of_peer, prompt=len(prompts.samples[0].ids), new=NEW)
    assert len(tokens) == NEW
    if not CUDA:  # in bfloat16 another order of additions may choose another token
        assert tokens == theirs
