"""Phases: training steps of language models, whole, by LoRA and in 4 bits, beside peft and bitsandbytes."""

from functools import partial
from typing import Any

import torch
from attrs import evolve
from torch import Generator, Tensor

from benches.gpu.measure import Place, Results, attempt, digits, kernels, seconds, tf32, timed
from benches.gpu.models import (
    LINEAR,
    QWEN3_4B,
    QWEN25_7B,
    language_model,
    peer_module,
    random_weights,
    text_batch,
)
from medvl.base.tree import Tree
from medvl.hub import skeletons
from medvl.language import vlm
from medvl.training import gradients, loop, optim, states
from medvl.weights import four_bit, lazy, lora


def train_4b(place: Place, results: Results) -> None:
    """Steps of Qwen3-4B in bfloat16: LoRA, H-LoRA (goal: 1.02 of LoRA), and whole with float32 masters."""
    tokens = place.size(2048, 24)
    skeleton = language_model(place, QWEN3_4B)
    params = random_weights(place, skeleton)
    batch = text_batch(place, 1, tokens)
    results["tokens"] = tokens
    for name, experts in (("LoRA r16", 0), ("H-LoRA r16 of 4", 4)):
        cfg = lora.LoraConfig(rank=16, alpha=32.0, pattern=LINEAR, experts=experts)
        adapter = lora.init_lora(cfg, skeleton, Generator().manual_seed(0), device=place.device)
        for dtype in (torch.float32, torch.bfloat16):
            typed = lora.move_adapter(adapter, dtype=dtype)
            grad = adapter_gradient(place, skeleton, params, typed)
            label = f"{name}, factors {str(dtype)[6:]}"
            attempt(results, label, _speed, place, tokens, partial(grad, typed.factors, batch))
    ratio = results["H-LoRA r16 of 4, factors float32"]["s"] / results["LoRA r16, factors float32"]["s"]
    results["H-LoRA / LoRA"] = digits(ratio)
    attempt(results, "whole, float32 masters", _whole, place, skeleton, params, batch, tokens)


def adapter_gradient(place: Place, skeleton: skeletons.Skeleton, params: Tree, adapter: lora.Adapter) -> Any:
    """(factors, batch) -> gradient by the factors, checkpointed, as tune computes it."""
    recomputed = skeletons.checkpointed(skeleton)

    def loss_sum(p: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, gradients.Aux]:
        weights = lora.apply_lora(params, evolve(adapter, factors=p["lora"]), train=True)
        inputs = {name: batch[name].to(place.device) for name in ("ids", "labels", "mask")}
        return (*vlm.answer_loss(recomputed, weights, inputs), gradients.Aux())

    grad = gradients.token_value_and_grad(loss_sum, chunk=1)
    return lambda factors, batch: grad({"lora": factors}, batch)


def _speed(place: Place, tokens: int, call: Any) -> dict[str, float]:
    numbers = timed(place, call, repeats=2)
    return numbers | {"tokens/s": digits(tokens / numbers["s"])}


def _whole(place: Place, skeleton: skeletons.Skeleton, params: Tree, batch: Any, tokens: int) -> dict:
    recomputed = skeletons.checkpointed(skeleton)

    def loss_sum(p: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, gradients.Aux]:
        inputs = {name: batch[name].to(place.device) for name in ("ids", "labels", "mask")}
        return (*vlm.answer_loss(recomputed, p["model"], inputs), gradients.Aux())

    grad = gradients.token_value_and_grad(loss_sum, chunk=1)
    tree = {"model": params}
    optimizer = optim.with_master(optim.adamw(lambda name: optim.Rate(lr=1e-5)))
    step = loop.make_step(grad, optimizer, clip=1.0)
    latest = {"state": states.State(params=tree, opt=optimizer.init(tree))}

    def once() -> None:
        latest["state"], _ = step(latest["state"], batch)

    of_gradient = seconds(place, lambda: grad(tree, batch), repeats=1)
    numbers = _speed(place, tokens, once)
    return numbers | {
        "gradient s": digits(of_gradient),
        "optimiser s": digits(numbers["s"] - of_gradient, 3),
    }


def qlora_7b(place: Place, results: Results) -> None:
    """Training tokens a second of a 7B in NF4 with LoRA of rank 64, beside peft with bitsandbytes."""
    tokens, rank = place.size((4096, 64), (24, 8))
    skeleton = language_model(place, QWEN25_7B)
    params = random_weights(place, skeleton, four_bit.quantizer())
    results["tokens"], results["weights GB"] = tokens, digits(lazy.nbytes(params) / 1e9)
    batch = text_batch(place, 1, tokens)

    def variant(dropout: float, dtype: torch.dtype) -> Any:
        cfg = lora.LoraConfig(rank=rank, alpha=2.0 * rank, dropout=dropout, pattern=LINEAR)
        adapter = lora.init_lora(cfg, skeleton, Generator().manual_seed(0), device=place.device)
        adapter = lora.move_adapter(adapter, dtype=dtype)
        grad = adapter_gradient(place, skeleton, params, adapter)
        return lambda: grad(adapter.factors, batch)

    plain = variant(0.05, torch.float32)
    attempt(results, "factors float32", _speed, place, tokens, plain)
    with tf32(place):
        attempt(results, "factors float32, TF32", _speed, place, tokens, plain)
    low = variant(0.05, torch.bfloat16)
    attempt(results, "factors bfloat16", _speed, place, tokens, low)
    undropped = variant(0.0, torch.bfloat16)
    attempt(results, "factors bfloat16, no dropout", _speed, place, tokens, undropped)
    attempt(results, "peft + bitsandbytes", _peft, place, skeleton, params, rank, batch)
    attempt(results, "profile", kernels, place, low)


def _peft(place: Place, skeleton: skeletons.Skeleton, params: Tree, rank: int, batch: Any) -> dict:
    """The same weights in transformers' module: bitsandbytes' layers, peft's LoRA, their checkpointing, autocast."""
    from peft import LoraConfig, get_peft_model

    module = peer_module(skeleton)
    _put_weights(place, module, params)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.enable_input_require_grads()
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    cfg = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=targets)
    model = get_peft_model(module, cfg)
    model.train()
    inputs = {
        "input_ids": batch["ids"].to(place.device),
        "attention_mask": batch["mask"].long().to(place.device),
        "labels": batch["labels"].to(place.device),
    }

    def once() -> None:
        with torch.autocast(place.device.type, torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    return _speed(place, batch["ids"].shape[1], once)


def _put_weights(place: Place, module: Any, params: Tree) -> None:
    import bitsandbytes as bnb

    for name, layer in list(module.named_modules()):
        weight = params.get(f"{name}.weight")
        if not isinstance(layer, torch.nn.Linear) or not isinstance(weight, four_bit.FourBit):
            continue
        has_bias = layer.bias is not None
        packed = bnb.nn.Linear4bit(
            *(layer.in_features, layer.out_features, has_bias, torch.bfloat16),
            quant_type="nf4",
            device="meta",
        )
        parts = four_bit.pack_weight(weight)
        state = {key[1:]: part for key, part in parts.items() if key}
        packed.weight = bnb.nn.Params4bit.from_prequantized(
            parts[""], state, device=place.device, module=packed
        )
        parent, _, key = name.rpartition(".")
        setattr(module.get_submodule(parent), key, packed)
    for name, weight in params.items():
        if not isinstance(weight, four_bit.FourBit):
            owner, _, key = name.rpartition(".")
            parameter = torch.nn.Parameter(weight, requires_grad=False)
            module.get_submodule(owner)._parameters[key] = parameter
    module.tie_weights()
