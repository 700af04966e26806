"""Optimisers as pairs of functions, learning-rate schedules and gradient clipping."""

import math
from collections.abc import Callable, Mapping

import torch
from attrs import frozen
from torch import Tensor
from torch.optim.adamw import adamw as _adamw

from medvl.tree import Tree, flatten, map_leaves, merge, unflatten


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


def muon(
    rate: Callable[[str], Rate], schedule: Callable[[int], float] = lambda step: 1.0, *, momentum: float = 0.95, iterations: int = 5
) -> Optimizer:
    """Momentum whose step on every matrix has all singular values near 1, so that no direction of the input waits for another.

    Args:
        rate: parameter name -> Rate; lr is the size of a step per singular value (0.02-0.05), about ten times AdamW's.
        schedule: optimiser step (from 0) -> factor on every lr.
        iterations: of the polynomial that brings singular values between 0.7 and 1.2.
    Made for weight matrices inside a network; a convolution's weight is the matrix [out, the rest]. Norms, biases, embeddings and the last
    layer belong to AdamW: see `routed`.
    Raises:
        ValueError: a parameter is no matrix.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon: Nesterov momentum, steps of tall matrices times sqrt(rows / columns).
    """

    def init(params: Tree) -> Tree:
        wrong = [n for n, t in flatten(params).items() if t.dim() < 2]
        if wrong:
            raise ValueError(f"muon: needs matrices, {len(wrong)} parameters are none, e.g. {wrong[0]}; leave them to adamw")
        return {"mean": map_leaves(torch.zeros_like, params)}

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        g, mean = flatten(grads), flatten(state["mean"])
        for name, t in flatten(params).items():
            r = rate(name)
            m = mean[name].mul_(momentum).add_(g[name])
            turn = orthogonal(torch.add(g[name], m, alpha=momentum).flatten(1), iterations)
            lr = r.lr * schedule(step)
            t.mul_(1 - lr * r.weight_decay).add_(turn.view_as(t), alpha=-lr * max(1.0, turn.shape[0] / turn.shape[1]) ** 0.5)
        return params, state

    return Optimizer(init, update)


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of the matrix U S V^T [n, m]: an odd polynomial, applied again and again, drives singular values to 0.7-1.2.

    Runs in bfloat16 on a GPU, where that is enough and fast, and in the matrix's own precision elsewhere.
    Source: Jordan et al. 2024, coefficients 3.4445, -4.7750, 2.0315.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def routed(choose: Callable[[str], str], optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """Several optimisers over one tree: `choose` says by name which of them moves a parameter."""

    def parts(tree: Tree) -> dict[str, Tree]:
        found: dict[str, dict[str, Tensor]] = {key: {} for key in optimizers}
        for name, t in flatten(tree).items():
            found[choose(name)][name] = t
        return {key: unflatten(flat) for key, flat in found.items() if flat}

    def init(params: Tree) -> Tree:
        return {key: optimizers[key].init(part) for key, part in parts(params).items()}

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        g, moved, states = parts(grads), [], {}
        for key, part in parts(params).items():
            done, states[key] = optimizers[key].update(g[key], state[key], part, step)
            moved.append(done)
        return merge(*moved), states

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
