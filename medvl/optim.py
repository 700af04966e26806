"""Optimisers as pairs of functions, learning-rate schedules and gradient clipping."""

import math
from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor
from torch.optim.adamw import adamw as _adamw

from medvl.tree import Tree, flatten, unflatten


@frozen
class Optimizer:
    """`init(params) -> state` and `update(grads, state, params, step) -> (params, state)`; update reuses the buffers it is given."""

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree, int], tuple[Tree, Tree]]


@frozen(kw_only=True)
class Rate:
    """How fast one group of parameters moves."""

    lr: float
    weight_decay: float = 0.0


def adamw(
    rate: Callable[[str], Rate],
    schedule: Callable[[int], float] = lambda step: 1.0,
    *,
    beta1: float = 0.9,
    beta2: float = 0.98,
    eps: float = 1e-6,
) -> Optimizer:
    """AdamW over a tree; bit-equal to `torch.optim.AdamW` with the same groups.

    Args:
        rate: parameter name -> Rate. Scalars and vectors (norms, biases, temperatures) are never decayed.
        schedule: optimiser step (from 0) -> factor on every lr.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; torch's functional kernel does the arithmetic. The defaults are CLIP's.
    """

    def init(params: Tree) -> Tree:
        flat = flatten(params)
        return {
            "mean": unflatten({n: torch.zeros_like(t) for n, t in flat.items()}),
            "square": unflatten({n: torch.zeros_like(t) for n, t in flat.items()}),
        }

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        flat, g = flatten(params), flatten(grads)
        mean, square = flatten(state["mean"]), flatten(state["square"])
        groups: dict[Rate, list[str]] = {}
        for name, t in flat.items():
            r = rate(name)
            groups.setdefault(r if t.dim() > 1 else Rate(lr=r.lr), []).append(name)
        for r, names in groups.items():
            _adamw(
                [flat[n] for n in names],
                [g[n] for n in names],
                [mean[n] for n in names],
                [square[n] for n in names],
                [],
                [torch.tensor(float(step)) for _ in names],
                foreach=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=r.lr * schedule(step),
                weight_decay=r.weight_decay,
                eps=eps,
                maximize=False,
            )
        return params, state

    return Optimizer(init, update)


def warmup_cosine(steps: int, warmup: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor on the rate, counted in optimiser steps: linear from 1 / warmup to 1, then a half cosine down to `floor` at the last step."""
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup_cosine: warm-up must lie within the {steps} steps, got {warmup}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


def clip_by_norm(grads: Tree, limit: float) -> tuple[Tree, Tensor]:
    """(grads scaled so that their common L2 norm is at most `limit`, the norm before); `limit` 0 leaves them as they are."""
    flat = flatten(grads)
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(flat.values()))))
    if limit <= 0:
        return grads, total
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    return unflatten(dict(zip(flat, torch._foreach_mul(list(flat.values()), factor), strict=True))), total
