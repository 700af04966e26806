"""The estimate of memory against a measured peak: `python benches/estimate_memory.py [lora] [qlora] [full]`.

A random model in the shape of Qwen2.5-0.5B (0.49 billion parameters, vocabulary 151,936), one training step of 2 micro-batches of 2 x 512
tokens in a process of its own. On CPU the peak is that of resident memory above what the process held before it made the weights.
"""

import gc
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from medvl.base import config, processes
from medvl.base.tree import merge_trees, split_tree
from medvl.language import chat, system
from medvl.systems.tune import run as tune_run
from medvl.systems.tune.record import Config
from medvl.training import loop, stages, states

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
VARIANTS = {
    "lora": {"train": ["lora/.*"]},
    "qlora": {"train": ["lora/.*"], "quantize": "nf4"},
    "full": {"train": ["model/.*"], "rounding": "stochastic"},
}


class Words:
    """A tokenizer's place: the model needs its size, a step needs no words."""

    pad_token_id = eos_token_id = bos_token_id = 0

    def __len__(self) -> int:
        return 151936


SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def experiment(variant: str, change: dict | None = None) -> Config:
    how = VARIANTS[variant]
    stage = {"name": variant, "steps": 2, "lr": 1e-4, "train": how["train"]}
    raw = {
        "system": "tune",
        "model": {"config": MODEL | (change or {}), "quantize": how.get("quantize", "none")},
        "data": {"folder": "nowhere"},
        "chat": {"context": 512},
        "lora": {"rank": 16, "pattern": "all-linear"},
        "train": {"batch": 4, "chunk": 2, "rounding": how.get("rounding", "master"), "stages": [stage]},
    }
    return config.structure(raw, Config, "bench")


def measured(variant: str) -> dict:
    """Take two real steps and look at the high water."""
    _steps(experiment(variant, SMALL))  # what is imported and set up once counts before
    gc.collect()
    return _steps(experiment(variant))


def _steps(cfg: Config) -> dict:
    stage = cfg.train.stages[0]
    before = status("VmRSS")
    model, params = system.init_model(cfg, Path("nowhere"), device=processes.choose_device())
    trained, frozen = split_tree(params, stage.train)
    del params
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the high water starts again: making random weights took more
    loss = system.loss_function(model)
    optimizer = stages.make_optimizer(cfg.train, stage, trained)
    step = loop.make_step(
        stages.make_gradient(
            cfg.train, lambda p, b: loss(merge_trees(frozen, p), b), partial(chat.micro_batch, model.chat)
        ),
        optimizer,
        clip=1.0,
        seed=0,
    )
    state = states.State(params=trained, opt=optimizer.init(trained))
    del trained
    for _ in range(2):
        state, _ = step(state, chat.fullest_batch(model.chat, [], 4))
    return {
        "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM") - before
    }


def status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    chat.tokenizer_of = lambda *_, **__: Words()
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(sys.argv[2])))
        sys.exit()
    done = {}
    for variant in sys.argv[1:] or VARIANTS:
        (step,) = tune_run.memory(experiment(variant), Path("nowhere")).values()
        parts = step.memory
        env = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
            "MALLOC_TRIM_THRESHOLD_": str(2**20),
        }  # freed memory goes back at once
        run = subprocess.run(
            [sys.executable, __file__, "--measure", variant],
            check=True,
            capture_output=True,
            text=True,
            env=env,
        )
        real, total = json.loads(run.stdout.strip().splitlines()[-1])["peak"], sum(parts.values())
        done[variant] = {"estimated": total, "measured": real, "ratio": total / real}
        told = ", ".join(f"{part} {n / 1e9:.2f}" for part, n in sorted(parts.items(), key=lambda p: -p[1]))
        print(
            f"{variant:6s} estimated {total / 1e9:.2f} GB ({told}), measured {real / 1e9:.2f} GB: {total / real:.3f}"
        )
    print(json.dumps(done))
