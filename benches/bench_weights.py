"""Every kind of weight in one language model: a prompt's forward pass, 16 greedy tokens, a training step.

On a CPU the model is a small Qwen3. On a GPU there are two with random weights in bf16: of the size of Qwen3-4B, and of Qwen2-VL-2B, where
every sample has an image and adapters correct the vision tower, too. Adapters are on all linear layers but the head.
"""

from functools import cache

import pytest
import torch
from attrs import evolve

from benches.gpu.models import QWEN3_4B
from medvl.base.tree import count_values
from medvl.hub import skeletons
from medvl.language import generate, vlm
from medvl.language.sampling import Sampling
from medvl.training import gradients, loop, optim, states
from medvl.weights import compose, four_bit, int4, lora

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, PRECISION = ("cuda", torch.bfloat16, "bfloat16") if CUDA else ("cpu", torch.float32, "float32")
B, T, RANK, NEW = (8, 512, 16, 16) if CUDA else (4, 32, 8, 16)
ROUNDS = 10 if CUDA else 3
GRID = (1, 32, 32)  # patches of an image of 448 x 448 pixels: 256 visual tokens
SMALL = {
    "model_type": "qwen3",
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
QWEN2_VL_2B = {  # config.json of huggingface.co/Qwen/Qwen2-VL-2B-Instruct
    "model_type": "qwen2_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_vl_text",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "hidden_size": 1536,
    },
}
MODELS = {"qwen3_4b": QWEN3_4B, "qwen2_vl_2b": QWEN2_VL_2B} if CUDA else {"small": SMALL}
VARIANTS = ("dense", "nf4", "int4", "lora", "lora_nf4", "hlora", "mixture_3", "mixture_8", "fusion_8")


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


@cache
def model(kind):
    """(skeleton, params, a prompt batch with labels of the last quarter)."""
    skeleton, gen = skeletons.empty_skeleton(MODELS[kind], head="language"), seeded(0, DEVICE)
    params = {}
    for n, p in skeleton.module.named_parameters():
        t = torch.empty(p.shape, dtype=DTYPE, device=DEVICE)
        params[n] = (
            t.fill_(1) if p.dim() == 1 and n.endswith("weight") else t.normal_(std=0.02, generator=gen)
        )
    ids = torch.randint(1000, (B, T), generator=seeded(1))
    batch = {}
    if token := skeleton.config.get("image_token_id"):
        n = GRID[1] * GRID[2] // 4
        ids[:, 4 : 4 + n] = token
        side = skeleton.config["vision_config"]["patch_size"]
        pixels = torch.randn(B * GRID[1] * GRID[2], 3 * 2 * side * side, generator=seeded(2))
        batch = {
            "pixel_values": pixels.to(DEVICE, DTYPE),
            "image_grid_thw": torch.tensor([GRID] * B, device=DEVICE),
        }
    labels = ids.clone()
    labels[:, : -T // 4] = -100
    return skeleton, params, {"ids": ids.to(DEVICE), "labels": labels.to(DEVICE)} | batch


def config(kind, experts=0):
    return lora.LoraConfig(rank=RANK, pattern="all-linear", vision="vl" in kind, experts=experts)


def adapters(kind, k, experts=0):
    """Adapters that change something; on a GPU as wide as the model, as they are served."""
    made = [
        lora.init_lora(config(kind, experts), model(kind)[0], seeded(3 + j), device=DEVICE) for j in range(k)
    ]
    for j, a in enumerate(made):
        for f in a.factors.values():
            f["b"].normal_(std=0.02, generator=seeded(100 + j, DEVICE))
    return [lora.move_adapter(a, dtype=DTYPE) for a in made]


@cache
def quantised(kind):
    return four_bit.quantize(model(kind)[1])


@cache
def int4_params(kind):
    return int4.quantize(model(kind)[1])


def variant(kind, name):
    """The params of a variant."""
    skeleton, params, batch = model(kind)
    k = int(name.rpartition("_")[2]) if name.startswith(("mixture", "fusion")) else 1
    if name in ("dense", "nf4", "int4"):
        return {"dense": lambda: params, "nf4": lambda: quantised(kind), "int4": lambda: int4_params(kind)}[
            name
        ]()
    made = adapters(kind, k, experts=4 if name == "hlora" else 0)
    if name.startswith("mixture"):
        adapter = compose.compose_adapters(made, torch.randn(B, k, generator=seeded(4)).to(DEVICE))
    elif name.startswith("fusion"):
        adapter = compose.compose_adapters(made, [1 / k] * k, mode="fusion", rule="svd", rank=RANK)
    else:
        adapter = made[0]
    token = skeleton.config.get("image_token_id")
    return lora.apply_lora(
        quantised(kind) if "nf4" in name else params,
        adapter,
        rows=None if token is None else vlm.visual_rows(batch["ids"], token),
    )


def prompt(kind):
    return {k: t for k, t in model(kind)[2].items() if k != "labels"}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", MODELS)
def bench_forward(measure, kind, name):
    """Hidden states of a batch of prompts, without the head."""
    skeleton, params = model(kind)[0], variant(kind, name)
    with torch.no_grad():
        hidden = measure(
            lambda: vlm.hidden_states(skeleton, params, **prompt(kind)),
            rounds=ROUNDS,
            kind=kind,
            b=B,
            t=T,
            r=RANK,
        )
    assert hidden.isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", MODELS)
def bench_generate(measure, benchmark, kind, name):
    """The prompt and 16 tokens of every row; extra_info has the tokens of all rows per second."""
    skeleton, params, how = model(kind)[0], variant(kind, name), Sampling(max_tokens=NEW)
    made = measure(
        lambda: generate.generate(how, skeleton, params, prompt(kind)),
        rounds=ROUNDS,
        kind=kind,
        b=B,
        t=T,
        r=RANK,
        new=NEW,
    )
    assert [len(ids) for ids in made.ids] == [NEW] * B
    if benchmark.enabled:
        benchmark.extra_info["tokens_per_s"] = round(B * NEW / benchmark.stats.stats.median, 1)


@pytest.mark.parametrize("name", ["lora", "lora_nf4", "hlora"])
@pytest.mark.parametrize("kind", MODELS)
def bench_step(measure, kind, name):
    """Gradient and AdamW of a float32 adapter, the last quarter of the tokens trained; on a GPU layers are checkpointed."""
    skeleton, params, batch = model(kind)
    base, lean = (
        quantised(kind) if "nf4" in name else params,
        skeletons.checkpointed(skeleton) if CUDA else skeleton,
    )
    adapter = lora.init_lora(config(kind, 4 if name == "hlora" else 0), skeleton, seeded(5), device=DEVICE)

    def loss(factors, batch):
        now = lora.apply_lora(base, evolve(adapter, factors=factors))
        return *vlm.answer_loss(lean, now, batch), gradients.Aux()

    optimizer = optim.adamw(lambda _: optim.Rate(lr=1e-4))
    step = loop.make_step(
        gradients.token_value_and_grad(loss, chunk=B, precision=PRECISION), optimizer, clip=1.0
    )
    state = states.State(params=adapter.factors, opt=optimizer.init(adapter.factors))
    shape = {"kind": kind, "b": B, "t": T, "r": RANK, "parameters": count_values(adapter.factors)}
    metrics = measure(lambda: step(state, batch)[1], rounds=ROUNDS, **shape)
    assert metrics["grad_norm"] > 0
