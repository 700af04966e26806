"""Micro-batches by rows, by tokens and packed: `python -m benches.token_batches [padding] [kernels] [seconds]`.

padding: tokens computed for each token of a conversation, 512 lengths of a log-normal distribution (mean 180, at most
2,048). kernels: of a gradient of `slide_vqa_qwen3_4b` for each trained token, on the device "meta", a batch of 32 short
questions (mean 90 tokens), micro-batches of 4 rows or of 4 x 512 tokens. seconds: of a gradient of a toy model on this
machine, in turns.
"""

import statistics
import sys
import time
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import evolve

from benches.gpu.models import QWEN3_4B
from medvl.base import config
from medvl.base.tree import merge_trees, split_tree
from medvl.components.slots import CompressConfig
from medvl.language import chat, system
from medvl.language.chat import Encoded
from medvl.language.conversations import Conversation
from medvl.language.encoding import IGNORE, Sample
from medvl.systems.slide_vqa import model as slide_vqa
from medvl.systems.slide_vqa.record import Config as SlideConfig
from medvl.systems.tune.record import Config as TuneConfig
from medvl.training import estimate, order, stages, trace

ROOT = Path(__file__).resolve().parents[1]
PLACEHOLDER = 151655
TOY = QWEN3_4B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class Words:
    """A tokenizer's place: of so many words, in which no text is written."""

    pad_token_id = eos_token_id = bos_token_id = 0

    def __init__(self, size: int = 151936) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, token: str) -> int:
        return PLACEHOLDER


def log_normal(mean: float, count: int, most: int, sigma: float = 0.9, least: int = 8) -> list[int]:
    """Lengths with a long tail."""
    gen = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=gen) * sigma - sigma**2 / 2).exp() * mean
    return lengths.round().clamp(least, most).long().tolist()


def conversations(lengths: Sequence[int], visual: int = 0) -> Encoded:
    """Samples of these lengths whose last third is trained, behind the tokens of a slide."""
    samples, talks = [], []
    for length in lengths:
        ids = torch.full((length,), 5)
        ids[:visual] = PLACEHOLDER
        labels = ids.clone()
        labels[: max(visual, length * 2 // 3)] = IGNORE
        spans = ((0, visual),) if visual else ()
        samples.append(Sample(ids=ids, labels=labels, visual=spans))
        talks.append(Conversation(messages=(), images=(Path("slide"),) if visual else ()))
    return Encoded(conversations=tuple(talks), samples=tuple(samples), refused=0)


def gradient_of(model, params):
    """(trained parameters, gradient function) of the last stage."""
    trained, frozen = split_tree(params, model.train.stages[-1].train)
    loss = system.loss_function(model)
    cut = partial(chat.micro_batch, model.chat)
    return trained, stages.make_gradient(model.train, lambda p, b: loss(merge_trees(frozen, p), b), cut)


def batch_of(model, data: Encoded, **settings):
    """The first batch."""
    train = evolve(model.train, **settings)
    batches = chat.training_batches(
        model.chat, data, train.batch, 0, tokens=train.tokens, packing=train.packing
    )
    return batches(0)


# What is computed -------------------------------------------------------------------------------------------
def show_padding() -> None:
    lengths = log_normal(180, 512, 2048)
    total = sum(lengths)
    print(f"512 conversations, mean {total / 512:.0f} tokens, longest {max(lengths)}")
    batch = order.batch_indices([str(i) for i in range(512)], 512, 0)(0)
    for rows in (2, 4, 8, 16):
        parts = [[(i,) for i in batch[k : k + rows]] for k in range(0, 512, rows)]
        show_parts(f"chunk = {rows}", parts, lengths, total)
    for tokens in (2048, 4096, 8192):
        for packing in (False, True):
            parts = order.split_by_tokens(batch, lengths, tokens, packing=packing)
            name = f"tokens = {tokens}" + ", packing" * packing
            show_parts(name, parts, lengths, total)


def show_parts(name: str, parts, lengths: Sequence[int], total: int) -> None:
    rows = [(len(part), max(sum(lengths[i] for i in row) for row in part)) for part in parts]
    computed = sum(n * longest for n, longest in rows)
    pairs = sum(n * longest**2 for n, longest in rows) / sum(length**2 for length in lengths)
    print(
        f"{name:24s} {computed / total:.3f} tokens computed for each of a conversation, {len(parts)} micro-batches, "
        f"pairs in attention x {pairs:.2f}"
    )


# Kernels ----------------------------------------------------------------------------------------------------
def slide_model():
    """slide_vqa_qwen3_4b on "meta"."""
    raw = tomllib.loads((ROOT / "experiments" / "slide_vqa_qwen3_4b.toml").read_text())
    raw["model"] = {"config": QWEN3_4B}
    cfg = config.structure(raw, SlideConfig, "bench")
    compress = CompressConfig(dim=cfg.data.dims, slots=cfg.compress.slots)
    return slide_vqa.init_model(cfg, Path("nowhere"), compress, device=torch.device("meta"))


def follow_values(grad, trained, batch) -> None:
    """The gradient, whose masks are looked at: on "meta" their values must be followed."""
    with estimate.Ledger():
        grad(trained, batch)


def show_kernels() -> None:
    chat.tokenizer_of = lambda *_, **__: Words()
    model, params = slide_model()
    lengths = log_normal(90, model.train.batch, 512, sigma=0.5, least=24)
    data = conversations(lengths, visual=model.cfg.compress.slots)
    trained_tokens = sum(int((sample.labels != IGNORE).sum()) for sample in data.samples)
    settings = {
        "chunk = 4": {"chunk": 4, "tokens": 0, "packing": False},
        "tokens = 2048": {"tokens": 2048, "packing": False},
        "tokens = 2048, packing": {"tokens": 2048, "packing": True},
    }
    gpu = trace.GPUS["h100"]
    for name, change in settings.items():
        of_train = evolve(model, train=evolve(model.train, **change))
        trained, grad = gradient_of(of_train, params)
        batch = batch_of(of_train, data)
        work = trace.count_work(partial(follow_values, grad, trained, batch))
        parts = len(batch) if isinstance(batch, list) else model.train.batch // 4
        print(
            f"{name:24s} {parts} micro-batches, {work.kernels:,.0f} kernels, {work.kernels / trained_tokens:.0f} for each "
            f"of {trained_tokens} trained tokens, {work.flops / 1e12:.1f} TFLOP, {work.seconds(gpu):.2f} s on an H100 "
            "(estimated)"
        )


# Seconds ----------------------------------------------------------------------------------------------------
def show_seconds(rounds: int = 5) -> None:
    chat.tokenizer_of = lambda *_, **__: Words(512)
    stage = {"name": "whole", "steps": 1, "lr": 1e-3, "train": ["model/.*"]}
    raw = {
        "system": "tune",
        "model": {"config": TOY, "dtype": "float32"},
        "data": {"folder": "nowhere"},
        "train": {"batch": 32, "chunk": 4, "stages": [stage]},
    }
    model, params = system.init_model(config.structure(raw, TuneConfig, "bench"), Path("nowhere"))
    data = conversations(log_normal(90, 32, 512))
    trained, grad = gradient_of(model, params)
    batches = {
        "chunk = 4": batch_of(model, data),
        "tokens = 2048": batch_of(model, data, tokens=2048),
        "tokens = 2048, packing": batch_of(model, data, tokens=2048, packing=True),
    }
    seconds = {name: [] for name in batches}
    for i in range(rounds + 1):
        for name, batch in batches.items():
            start = time.perf_counter()
            grad(trained, batch)
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    first = statistics.median(seconds["chunk = 4"])
    for name, times in seconds.items():
        print(
            f"{name:24s} {statistics.median(times):.3f} s a batch, x {statistics.median(times) / first:.2f}"
        )


if __name__ == "__main__":
    tables = {"padding": show_padding, "kernels": show_kernels, "seconds": show_seconds}
    for name in sys.argv[1:] or tables:
        tables[name]()
