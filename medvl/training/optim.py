"""Optimisers as pairs of functions, learning-rate schedules and gradient clipping.

16-bit weights lose steps smaller than half their spacing (at a rate of 1e-5 most of them), so either a
float32 master takes the steps (`with_master`) or weights are rounded up or down at random
(`adamw(rounding="stochastic")`). Moments of 16-bit weights are float32: a running mean that moves by 1 %
a step stands still in bfloat16, whose numbers lie 0.4-0.8 % apart.
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

from medvl.base.tree import Tree, flatten, merge_trees, unflatten
from medvl.weights.rounding import HALF, Packing, group_by_size, is_large, run_in_pieces

# Where AdamW takes torch's fused kernel. Estimates on "meta" stand for a GPU; on the CPU the bits of earlier
# runs stay.
_FUSED = ("cuda", "meta")


@frozen
class Optimizer:
    """`init(params) -> state` and `update(grads, state, params, step) -> (params, state)`; update reuses
    the buffers it is given."""

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
    """AdamW over a tree; on the CPU bit-equal to `torch.optim.AdamW` with the same groups where parameters
    are float32. On a GPU torch's fused kernel makes a step in one pass.

    16-bit parameters are computed in float32, 2**24 values at a time, and rounded once. Shards
    (`DTensor`) are moved where they lie.

    Args:
        rate: parameter name -> Rate. Scalars and vectors (norms, biases, temperatures) are never decayed.
        schedule: optimiser step (from 0) -> factor on every lr.
        rounding: of bfloat16 parameters: "stochastic" goes up or down with the odds of the distance, so
            that small steps add up on average; a pure function of `seed`, the step and the parameter's name.
        packing: keeps both moments in 8 bits (`four_bit.eight_bit_moments()`), the values of
            `torch.optim`'s arithmetic in between.
    State: 8 bytes a parameter, packed 2.03.
    Raises:
        ValueError: stochastic rounding of float16, 8-bit moments of shards.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; torch's functional kernel does the arithmetic. The
        defaults are CLIP's. Dettmers et al. 2022, arXiv:2110.02861 (8-bit moments); Zamirai et al. 2021,
        arXiv:2010.06192 (stochastic rounding).
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"adamw: rounding must be 'nearest' or 'stochastic', got {rounding!r}")

    def packs(tensor: Tensor) -> bool:
        return packing is not None and tensor.numel() >= packing.least

    def init_moment(tensor: Tensor) -> Any:
        if not packs(tensor):
            return zero_moment(tensor)
        assert packing is not None
        # Rounded up: the last block may be part full.
        blocks = -(-tensor.numel() // packing.block)
        # With a scale of 0 every code stands for 0.
        codes = torch.zeros(tensor.shape, dtype=torch.uint8, device=tensor.device)
        return {"codes": codes, "scale": torch.zeros(blocks, device=tensor.device)}

    def init(params: Tree) -> Tree:
        flat = flatten(params)
        half = [name for name, tensor in flat.items() if tensor.dtype == torch.float16]
        if rounding == "stochastic" and half:
            raise ValueError(
                f"adamw: stochastic rounding is for bfloat16, {len(half)} parameters are float16, e.g. "
                f"{half[0]}"
            )
        sharded = [name for name, tensor in flat.items() if _is_shard(tensor)]
        if packing is not None and sharded:
            raise ValueError(
                f"adamw: 8-bit moments need whole parameters, {len(sharded)} are sharded, e.g. {sharded[0]}; "
                "leave packing out"
            )
        state = {}
        for key in ("mean", "square"):
            state[key] = unflatten({name: init_moment(tensor) for name, tensor in flat.items()})
        return state

    def kernel(
        p: list[Tensor], g: list[Tensor], mean: list[Tensor], square: list[Tensor], r: Rate, step: int
    ) -> None:
        fused = p[0].device.type in _FUSED
        _adamw(
            p,
            g,
            mean,
            square,
            [],
            # The kernel adds 1 before it corrects the bias, so it gets the number of steps before this one.
            # The fused one wants it on the device: filled there, as a copy would be waited for.
            list(torch.full((len(p),), float(step), device=p[0].device if fused else "cpu").unbind()),
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=r.lr * schedule(step),
            weight_decay=r.weight_decay,
            eps=eps,
            maximize=False,
        )

    def stored(moment: dict[str, Tensor], name: str, tensor: Tensor) -> Any:
        """A moment as `in_pieces` takes it: a tensor, or the codes and scales of one that is packed."""
        if packs(tensor):
            return {key: moment[f"{name}/{key}"] for key in ("codes", "scale")}
        return _local(moment[name])

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        flat, g = flatten(params), flatten(grads)
        mean, square = flatten(state["mean"]), flatten(state["square"])
        groups: dict[Rate, list[str]] = {}
        for name, tensor in flat.items():
            r = rate(name)
            # Decay is for matrices: a norm's gain or a temperature is a scale, which it would pull to 0.
            if tensor.dim() <= 1:
                r = Rate(lr=r.lr)
            # Alone, a piece at a time: what is rounded or packed, what is large, and what kernels of many
            # tensors refuse. The rest shares kernels.
            in_order = _local(tensor).is_contiguous()
            if in_order and not (packs(tensor) or tensor.dtype in HALF or is_large(tensor)):
                groups.setdefault(r, []).append(name)  # many small tensors share a kernel, below
                continue
            moments = [stored(mean, name, tensor), stored(square, name, tensor)]
            gen = None
            if rounding == "stochastic" and tensor.dtype in HALF:
                # By name and place, so that parameters, and shards of one, do not share their draws.
                gen = seeded(tensor.device, seed, step, name, _place(tensor))
            moved_by = partial(kernel, r=r, step=step)
            run_in_pieces(moved_by, _local(tensor), _local(g[name]), moments, packing, gen)
        for r, names in groups.items():
            # The kernel's scratch memory grows with what it is given at once: small tensors come in bunches.
            for bunch in group_by_size({name: flat[name].numel() for name in names}):
                p, d, m, v = ([_local(tree[name]) for name in bunch] for tree in (flat, g, mean, square))
                kernel(p, _as_parameters(d, p), m, v, r, step)
        return params, state

    return Optimizer(init, update)


def with_master(optimizer: Optimizer) -> Optimizer:
    """The same optimiser on a float32 copy of every 16-bit parameter, kept in the state; the parameter is
    the copy, rounded.

    What `bound` in `loop.make_step` does to a 16-bit parameter does not reach its copy.
    State: 4 bytes a parameter on top.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.
    """

    def init(params: Tree) -> Tree:
        # Only 16-bit parameters are copied; float32 ones the inner optimiser moves directly.
        copies = {name: tensor.float() for name, tensor in flatten(params).items() if tensor.dtype in HALF}
        master = unflatten(copies)
        return {"master": master, "inner": optimizer.init(merge_trees(params, master))}

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        # An empty tree is dropped where a state is flattened.
        before = state.get("master", {})
        moved, inner = optimizer.update(grads, state["inner"], merge_trees(params, before), step)
        flat, low = flatten(moved), flatten(params)
        master = {name: flat[name] for name in flatten(before)}
        if master:
            # In place: the tensors that the model holds stay the same ones.
            held = [_local(low[name]) for name in master]
            torch._foreach_copy_(held, [_local(tensor) for tensor in master.values()])
        rounded = unflatten({name: low[name] for name in master})
        return merge_trees(moved, rounded), {"master": unflatten(master), "inner": inner}

    return Optimizer(init, update)


def seeded(device: torch.device, *key: Any) -> Generator:
    """A generator whose draws are a function of `key` alone (numbers and names)."""
    # A hash spreads similar keys (steps 1 and 2) over all seeds; a sum of them would not.
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = Generator("cpu" if device.type == "meta" else device)
    # 63 bits: a seed that is not negative and within torch's signed 64 bits.
    return generator.manual_seed(int.from_bytes(digest, "big") >> 1)


def routed(choose: Callable[[str], str], optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """Several optimisers over one tree: `choose` says by name which of them moves a parameter."""

    def split_by_optimizer(tree: Tree) -> dict[str, Tree]:
        by_optimizer: dict[str, dict[str, Tensor]] = {key: {} for key in optimizers}
        for name, tensor in flatten(tree).items():
            by_optimizer[choose(name)][name] = tensor
        return {key: unflatten(flat) for key, flat in by_optimizer.items() if flat}

    def init(params: Tree) -> Tree:
        return {key: optimizers[key].init(part) for key, part in split_by_optimizer(params).items()}

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        own_grads = split_by_optimizer(grads)
        moved, states = [], {}
        for key, part in split_by_optimizer(params).items():
            part, states[key] = optimizers[key].update(own_grads[key], state[key], part, step)
            moved.append(part)
        return merge_trees(*moved), states

    return Optimizer(init, update)


def warmup_cosine(steps: int, warmup: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor on the rate, counted in optimiser steps: linear from 1 / warmup to 1, then a half cosine
    down to `floor` at the last step."""
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup_cosine: warm-up must lie within the {steps} steps, got {warmup}")

    def factor(step: int) -> float:
        # Never 0, or the first step would be lost.
        if step < warmup:
            return (step + 1) / warmup
        # `steps - 1`, so that the last step that is taken has the floor, not the one after it.
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def clip_gradients(flat: dict[str, Tensor], limit: float) -> Tensor:
    """Scale the gradients of a flat dict, in it, so that their common L2 norm is at most `limit` (0
    leaves them as they are); returns the norm before.

    Gradients are let go as soon as their scaled ones are there, a bunch at a time. Of sharded gradients the
    norm is that of all shards together; every process must call it.
    """
    local = [_local(grad) for grad in flat.values()]
    if any(grad.dtype in HALF for grad in local):
        # In float32: a sum of squares in 16 bits overflows (float16) or loses digits (bfloat16).
        norms = list(torch._foreach_norm(local, 2, torch.float32))
    else:
        norms = list(torch._foreach_norm(local))
    del local
    # Shards add their squares up over the processes; what every process holds whole is counted once.
    sharded = [_is_shard(grad) for grad in flat.values()]
    if any(sharded):
        (group, *_) = {grad.device_mesh.get_group() for grad in flat.values() if _is_shard(grad)}  # type: ignore[attr-defined]
        of_shards = [norm for norm, shard in zip(norms, sharded, strict=True) if shard]
        squares = torch.stack(of_shards).square().sum()
        dist.all_reduce(squares, group=group)
        norms = [squares.sqrt(), *(norm for norm, shard in zip(norms, sharded, strict=True) if not shard)]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if limit > 0:
        # 1e-6 as in `torch.nn.utils.clip_grad_norm_`.
        factor = (limit / (total + 1e-6)).clamp(max=1.0)
        for bunch in group_by_size({name: grad.numel() for name, grad in flat.items()}):
            scaled = torch._foreach_mul([_local(flat[name]) for name in bunch], factor)
            for name, grad in zip(bunch, scaled, strict=True):
                flat[name] = _shard_like(flat[name], grad)
    return total


def zero_moment(tensor: Tensor) -> Tensor:
    """Where a moment of a tensor starts; float32 or wider and in order, so that it can be walked in
    pieces."""
    dtype = torch.float32 if tensor.dtype in HALF else tensor.dtype
    if _is_shard(tensor):
        return torch.zeros_like(tensor, dtype=dtype)
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


def _as_parameters(grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """The gradients in the dtypes and strides of their parameters, as kernels of many tensors want them."""
    same = list(grads)
    others = []
    for i, (grad, parameter) in enumerate(zip(grads, params, strict=True)):
        if grad.dtype != parameter.dtype or grad.stride() != parameter.stride():
            others.append(i)
            same[i] = torch.empty_like(parameter)
    if others:
        torch._foreach_copy_([same[i] for i in others], [grads[i] for i in others])
    return same


# Shards -----------------------------------------------------------------------------------------------


def _is_shard(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, without importing it


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if _is_shard(tensor) else tensor


def _place(tensor: Any) -> list[int]:
    """Where in the mesh a shard lies; replicated parameters are alike on all processes and must stay so."""
    return list(tensor.device_mesh.get_coordinate()) if _is_shard(tensor) else []


def _shard_like(tensor: Any, local: Tensor) -> Tensor:
    if not _is_shard(tensor):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        # No check of shapes over processes: that would be a communication for each gradient.
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
