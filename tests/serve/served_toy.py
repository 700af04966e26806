"""A tiny language model with adapters, opened in any process, for tests of the service."""

import functools

import torch
from PIL import Image

from medvl.adapters import cache
from medvl.hub import tokens
from medvl.language import chat
from medvl.language.chat import ChatConfig, ModelConfig
from medvl.serve import engine, models
from medvl.serve.interface import Request
from medvl.weights import lora
from tests import tiny

TEXTS = ["glucose 98 mg/dL metformin 500 mg PO BID the quick brown fox jumps over the lazy dog"]
ADAPTERS = ("liver", "lung", "skin")
# What requests name: nothing, an adapter, a mixture.
KINDS = ("", *ADAPTERS, {"liver": 0.5, "lung": 0.5}, {"lung": 0.3, "skin": 0.9}, "base")


@functools.cache
def tokenizer():
    tok = tokens.train_bpe(TEXTS, 300, lower=True)
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tok.add_special_tokens({"additional_special_tokens": special})
    tok.chat_template = chat.TEMPLATES["chatml"]
    return tok


def open_toy(kind="qwen2_5_vl", max_tokens=32):
    """A model with random weights large enough that its answers differ, and three adapters that change them."""
    gen = torch.Generator().manual_seed(0)
    model = ModelConfig(config=tiny.CONFIGS[kind], dtype="float32")
    opened, weights = chat.open_chat(model, ChatConfig(), tokenizer(), gen)
    weights = {name: w * 8 if w.dim() > 1 else w for name, w in weights.items()}
    cfg = lora.LoraConfig(rank=4, targets=("q_proj", "v_proj", "down_proj"))
    adapters = []
    for name in ADAPTERS:
        adapter = lora.init_lora(cfg, opened.skeleton, gen)
        for factors in adapter.factors.values():
            factors["b"].normal_(std=0.3, generator=gen)
        adapters.append(models.evolve(adapter, name=name))
    mixer = models._Mixer(weights, ADAPTERS, cache.cache_pool(lambda ids: [adapters[i] for i in ids]))
    return models.Served(
        name="toy",
        chat=opened,
        params={"model": weights},
        max_tokens=max_tokens,
        adapters=ADAPTERS,
        default=(),
        weights=mixer.weights,
    )


def open_service(post, emit, rows=8, threads=1):
    torch.set_num_threads(threads)
    return engine.EngineService(post, emit, open_toy(), engine.EngineConfig(rows=rows, context=400))


def requests(count, rng, max_tokens=(5, 40)):
    """Requests of all kinds: some with an image, each with an adapter, some drawn by chance."""
    words = TEXTS[0].split()
    made = []
    for number in range(count):
        images = ()
        if number % 3 == 0:
            size = rng.randint(8, 40), rng.randint(8, 40)
            images = (Image.new("RGB", size, (number % 256, 5 * number % 256, 9)),)
        text = "<image>\n" * len(images) + " ".join(rng.choices(words, k=rng.randint(1, 15)))
        made.append(
            Request(
                id=str(number),
                messages=({"role": "user", "content": text},),
                images=images,
                adapter=KINDS[number % len(KINDS)],
                max_tokens=rng.randint(*max_tokens),
                temperature=0.7 if number % 5 == 0 else 0.0,
                seed=number,
            )
        )
    return made


def open_slow_service(post, emit, rows):
    """A service that takes a tenth of a second for each token."""
    import time

    service = open_service(post, emit, rows)
    work = service.engine._add_tokens

    def slowly(*arguments):
        time.sleep(0.1)
        work(*arguments)

    service.engine._add_tokens = slowly
    return service
