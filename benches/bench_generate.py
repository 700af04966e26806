"""Greedy generation at batch 1, 8 and 32, beside transformers' own `generate` with the same weights.

On a GPU the model has the size of Qwen2.5-7B, random in bf16; on a CPU it is a Qwen3 of 166 MB in float32. The rows of a batch have
prompts of different lengths, padded on the left; none ends before its limit, so that both compute the same steps.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache

import pytest
import torch

from medvl.hub import skeletons
from medvl.language.generate import generate
from medvl.language.sampling import Sampling

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PROMPT, NEW, TURNS = (512, 128, 5) if CUDA else (64, 16, 3)
SMALL = {
    "model_type": "qwen3",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
QWEN2_5_7B = {  # config.json of huggingface.co/Qwen/Qwen2.5-7B-Instruct
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": False,
}
CONFIG = QWEN2_5_7B if CUDA else SMALL


@cache
def model() -> tuple[skeletons.Skeleton, skeletons.Params]:
    skeleton = skeletons.empty_skeleton(CONFIG, head="language")
    gen, params = torch.Generator(DEVICE).manual_seed(0), {}
    for name, parameter in skeleton.module.named_parameters():
        weight = torch.empty(parameter.shape, dtype=DTYPE, device=DEVICE)
        is_norm = "norm" in name and weight.dim() == 1
        params[name] = weight.fill_(1) if is_norm else weight.normal_(std=0.02, generator=gen)
    return skeleton, params


@cache
def peer() -> torch.nn.Module:
    """transformers' module, holding the same tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    params = model()[1]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG), dtype=DTYPE)
    module.load_state_dict(params, strict=False, assign=True)
    module.tie_weights()
    # Buffers are computed, not loaded.
    module.model.rotary_emb = type(module.model.rotary_emb)(module.config).to(DEVICE)
    return module.eval()


def prompts(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [b, t], mask [b, t]) of prompts between half of t and t tokens."""
    ids = torch.randint(3, 30000, (b, PROMPT), generator=torch.Generator().manual_seed(1))
    padding = torch.arange(b) * (PROMPT // 2) // b
    mask = torch.arange(PROMPT) >= padding[:, None]
    return ids.to(DEVICE), mask.long().to(DEVICE)


def callers(b: int) -> dict[str, Callable[[], list[list[int]]]]:
    """{who: a call that returns the new tokens of each row}."""
    ids, mask = prompts(b)
    skeleton, params = model()

    def medvl() -> list[list[int]]:
        answers = generate(Sampling(max_tokens=NEW), skeleton, params, {"ids": ids, "mask": mask})
        return [list(row) for row in answers.ids]

    def transformers() -> list[list[int]]:
        with torch.no_grad():
            rows = peer().generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=NEW,
                eos_token_id=None,
                pad_token_id=0,
            )
        return rows[:, PROMPT:].tolist()

    return {"medvl": medvl, "transformers": transformers}


@pytest.mark.parametrize("b", [1, 8, 32])
@pytest.mark.parametrize("who", ["medvl", "transformers"])
def bench_generate(measure, benchmark, who, b):
    """extra_info has the tokens of all rows per second; that of medvl also its time as a part of transformers', measured in turns."""
    calls = callers(b)
    rows = measure(calls[who], rounds=2, b=b, prompt=PROMPT, new=NEW)
    assert [len(row) for row in rows] == [NEW] * b
    if not CUDA:  # in bfloat16 another order of additions may choose another token
        assert rows == calls["transformers"]()
    if not benchmark.enabled:
        return
    benchmark.extra_info["tokens_per_s"] = round(b * NEW / benchmark.stats.stats.median, 1)
    if who == "medvl":
        benchmark.extra_info["time_of_transformers"] = round(time_in_turns(calls), 3)


def time_in_turns(calls: dict[str, Callable]) -> float:
    """The median time of medvl divided by that of transformers. On a CPU of the process alone: other programs do not count."""
    clock = time.perf_counter if CUDA else time.process_time
    seconds: dict[str, list[float]] = {who: [] for who in calls}
    for turn in range(TURNS):
        order = sorted(calls, reverse=bool(turn % 2))
        for who in order:
            start = clock()
            calls[who]()  # its tokens are on the host: nothing is left to wait for
            seconds[who].append(clock() - start)
    return statistics.median(seconds["medvl"]) / statistics.median(seconds["transformers"])
