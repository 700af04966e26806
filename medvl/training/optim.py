"""Optimisers as pairs of functions, learning-rate schedules and gradient clipping.

16-bit weights lose steps smaller than half their spacing (at a rate of 1e-5 most of them), so either a float32 master takes the steps
(`with_master`) or weights are rounded up or down at random (`adamw(rounding="stochastic")`). Moments of 16-bit weights are float32: a
running mean that moves by 1 % a step stands still in bfloat16, whose numbers lie 0.4-0.8 % apart. `state_bytes` says what a choice costs.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Generator, Tensor
from torch.optim.adamw import adamw as _adamw

from medvl.base.tree import Tree, flatten, map_leaves, merge, unflatten
from medvl.weights.rounding import HALF, Packing, bunches, in_pieces, is_large


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
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    packing: Packing | None = None,
) -> Optimizer:
    """AdamW over a tree; bit-equal to `torch.optim.AdamW` with the same groups where parameters are float32.

    16-bit parameters are computed in float32, 2**24 values at a time, and rounded once. Shards (`DTensor`) are moved where they lie.

    Args:
        rate: parameter name -> Rate. Scalars and vectors (norms, biases, temperatures) are never decayed.
        schedule: optimiser step (from 0) -> factor on every lr.
        rounding: of bfloat16 parameters: "stochastic" goes up or down with the odds of the distance, so that small steps add up on
            average; a pure function of `seed`, the step and the parameter's name.
        packing: keeps both moments in 8 bits (`quant.eight_bit()`), the values of `torch.optim`'s arithmetic in between.
    State: 8 bytes a parameter, packed 2.03.
    Raises:
        ValueError: stochastic rounding of float16, 8-bit moments of shards.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; torch's functional kernel does the arithmetic. The defaults are CLIP's.
        Dettmers et al. 2022, arXiv:2110.02861 (8-bit moments); Zamirai et al. 2021, arXiv:2010.06192 (stochastic rounding).
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"adamw: rounding must be 'nearest' or 'stochastic', got {rounding!r}")

    def packs(t: Tensor) -> bool:
        return packing is not None and t.numel() >= packing.least

    def zeros(t: Tensor) -> Any:
        if not packs(t):
            return zero_moment(t)
        assert packing is not None
        blocks = -(-t.numel() // packing.block)
        codes = torch.zeros(t.shape, dtype=torch.uint8, device=t.device)
        return {"codes": codes, "scale": torch.zeros(blocks, device=t.device)}

    def init(params: Tree) -> Tree:
        flat = flatten(params)
        if rounding == "stochastic" and (wrong := [n for n, t in flat.items() if t.dtype == torch.float16]):
            raise ValueError(
                f"adamw: stochastic rounding is for bfloat16, {len(wrong)} parameters are float16, e.g. {wrong[0]}"
            )
        if packing is not None and (wrong := [n for n, t in flat.items() if _is_shard(t)]):
            raise ValueError(
                f"adamw: 8-bit moments need whole parameters, {len(wrong)} are sharded, e.g. {wrong[0]}; leave packing out"
            )
        return {key: unflatten({n: zeros(t) for n, t in flat.items()}) for key in ("mean", "square")}

    def kernel(
        p: list[Tensor], g: list[Tensor], mean: list[Tensor], square: list[Tensor], r: Rate, step: int
    ) -> None:
        _adamw(
            p,
            g,
            mean,
            square,
            [],
            [torch.tensor(float(step)) for _ in p],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=r.lr * schedule(step),
            weight_decay=r.weight_decay,
            eps=eps,
            maximize=False,
        )

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        flat, g = flatten(params), flatten(grads)
        mean, square = flatten(state["mean"]), flatten(state["square"])
        groups: dict[Rate, list[str]] = {}
        for name, t in flat.items():
            r = rate(name)
            r = r if t.dim() > 1 else Rate(lr=r.lr)
            if packs(t) or t.dtype in HALF or g[name].dtype != t.dtype or is_large(t):
                held = [
                    {k: m[f"{name}/{k}"] for k in ("codes", "scale")} if packs(t) else _local(m[name])
                    for m in (mean, square)
                ]
                gen = (
                    seeded(t.device, seed, step, name, _place(t))
                    if rounding == "stochastic" and t.dtype in HALF
                    else None
                )
                in_pieces(partial(kernel, r=r, step=step), _local(t), _local(g[name]), held, packing, gen)
            else:
                groups.setdefault(r, []).append(name)
        for r, names in groups.items():
            for few in bunches({n: flat[n].numel() for n in names}):
                p, of, m, v = ([_local(tree[n]) for n in few] for tree in (flat, g, mean, square))
                kernel(p, of, m, v, r, step)
        return params, state

    return Optimizer(init, update)


def with_master(optimizer: Optimizer) -> Optimizer:
    """The same optimiser on a float32 copy of every 16-bit parameter, kept in the state; the parameter is the copy, rounded.

    What `bound` in `train.make_step` does to a 16-bit parameter does not reach its copy.
    State: 4 bytes a parameter on top.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.
    """

    def init(params: Tree) -> Tree:
        master = unflatten({n: t.float() for n, t in flatten(params).items() if t.dtype in HALF})
        return {"master": master, "inner": optimizer.init(merge(params, master))}

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        held = state.get("master", {})
        moved, inner = optimizer.update(grads, state["inner"], merge(params, held), step)
        flat, low = flatten(moved), flatten(params)
        master = {n: flat[n] for n in flatten(held)}
        for n, t in master.items():
            _local(low[n]).copy_(_local(t))
        return merge(moved, unflatten({n: low[n] for n in master})), {
            "master": unflatten(master),
            "inner": inner,
        }

    return Optimizer(init, update)


def seeded(device: torch.device, *key: Any) -> Generator:
    """A generator whose draws are a function of `key` alone (numbers and names)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(
        int.from_bytes(digest, "big") >> 1
    )


def state_bytes(optimizer: Optimizer, params: Tree) -> int:
    """Bytes of the state that `optimizer` keeps for `params` on this process; computed without memory, `params` may be on meta.

    Per parameter: adamw 8, with 8-bit moments 2.03, `muon.muon` 4, `with_master` 4 more; for float64 twice as much.
    """
    meta = map_leaves(lambda t: torch.empty_like(t, device="meta"), params)
    return sum(_local(t).nbytes for t in flatten(optimizer.init(meta)).values())


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
    """(grads scaled so that their common L2 norm is at most `limit`, the norm before); `limit` 0 leaves them as they are.

    Of sharded gradients the norm is that of all shards together; every process must call it.
    """
    flat = flatten(grads)
    total = clip_all(flat, limit)
    return (unflatten(flat) if limit > 0 else grads), total


def clip_all(flat: dict[str, Tensor], limit: float) -> Tensor:
    """`clip_by_norm` inside a flat dict: each gradient is let go as soon as its scaled one is there. Returns the norm before."""
    mine = [_local(t) for t in flat.values()]
    norms = list(
        torch._foreach_norm(mine, 2, torch.float32)
        if any(t.dtype in HALF for t in mine)
        else torch._foreach_norm(mine)
    )
    if groups := {t.device_mesh.get_group() for t in flat.values() if _is_shard(t)}:  # type: ignore[attr-defined]
        own = (
            torch.stack([n for n, t in zip(norms, flat.values(), strict=True) if _is_shard(t)]).square().sum()
        )
        dist.all_reduce(own, group=groups.pop())
        norms = [own.sqrt(), *(n for n, t in zip(norms, flat.values(), strict=True) if not _is_shard(t))]
    total = torch.linalg.vector_norm(torch.stack(norms))
    del mine
    if limit > 0:
        factor = (limit / (total + 1e-6)).clamp(max=1.0)
        for n, t in flat.items():
            flat[n] = _shard_like(t, _local(t) * factor)
    return total


def zero_moment(t: Tensor) -> Tensor:
    """Where a moment of `t` starts; float32 or wider and in order, so that it can be walked in pieces."""
    dtype = torch.float32 if t.dtype in HALF else t.dtype
    return (
        torch.zeros_like(t, dtype=dtype)
        if _is_shard(t)
        else torch.zeros(t.shape, dtype=dtype, device=t.device)
    )


# Shards ---------------------------------------------------------------------------------------------------------------------------------
def _is_shard(t: Any) -> bool:
    return hasattr(t, "to_local")  # a DTensor, without importing it


def _local(t: Any) -> Tensor:
    return t.to_local() if _is_shard(t) else t


def _place(t: Any) -> list[int]:
    """Where in the mesh a shard lies; replicated parameters are alike on all processes and must stay so."""
    return list(t.device_mesh.get_coordinate()) if _is_shard(t) else []


def _shard_like(t: Any, own: Tensor) -> Tensor:
    if not _is_shard(t):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
    )
