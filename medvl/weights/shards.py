"""Parameters in parts, one on each process: cut, used as weights, gathered. For training models that one
device cannot hold.

A sharded leaf is a `torch.distributed.tensor.DTensor` whose rows lie on the processes.
`gradients.value_and_grad` gives its gradient in the same parts, `optim.adamw` moves each part where it lies,
`states.save_state` writes whole tensors. With one process nothing is cut.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medvl.base.tree import Tree, flatten, map_leaves, match_names, unflatten
from medvl.weights import lazy


def process_mesh(device: str | torch.device = "cpu") -> Any:
    """The device mesh [processes] of `torch.distributed`; None with one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(torch.device(device).type, (dist.get_world_size(),))


def shard_params(params: Tree, mesh: Any, *, patterns: Sequence[str] = (".*",), least: int = 2**14) -> Tree:
    """The leaves to train: matrices as shards, the rest as it is. Every process must hold the same params.

    Args:
        mesh: from `process_mesh`; None leaves all whole.
        patterns: regexes over names; what none matches in full stays whole, as must a matrix that no linear
            layer or lookup uses.
        least: values; a smaller matrix stays whole, and its gradient is averaged like any.
    Raises:
        ValueError: a pattern that matches nothing, or nothing to cut.
    """
    flat = flatten(params)
    match_names(flat, patterns)  # raises where a pattern matches nothing
    cut = sharder(mesh, patterns=patterns, least=least)
    leaves = {name: cut(name, t) for name, t in flat.items()}
    # With patterns that match only norms nothing would be saved, silently.
    if mesh is not None and not any_sharded(leaves):
        raise ValueError(
            f"shard_params: none of {len(flat)} parameters is a plain matrix of at least {least} values "
            "that a pattern matches"
        )
    return unflatten(leaves)


def sharder(
    mesh: Any, *, patterns: Sequence[str] = (".*",), least: int = 2**14
) -> Callable[[str, Tensor], Tensor]:
    """(name, weight) -> what `shard_params` makes of it; given to `loading.load_skeleton` as `transform`, no
    process ever holds the whole model.

    Args:
        mesh: or a number of processes, for an estimate: of what would be cut, a plain tensor without values
            and with a process's rows.
    """
    # Compiled once: the function is called for every tensor of a model.
    compiled = [re.compile(pattern) for pattern in patterns]

    def cut(name: str, t: Tensor) -> Tensor:
        # A lazy weight has no memory to cut, and integers are not trained.
        plain = not isinstance(t, lazy.Lazy) and not is_shard(t) and t.is_floating_point()
        if mesh is None or not plain or t.dim() != 2 or t.numel() < least:
            return t
        if not any(pattern.fullmatch(name) for pattern in compiled):
            return t
        if isinstance(mesh, int):
            # DTensor gives the first processes the larger parts: n / processes rows, rounded up.
            return t.new_empty(-(-len(t) // mesh), t.shape[1])
        from torch.distributed.tensor import Shard

        return _cut(t, mesh, [Shard(0)])

    return cut


def lazy_shards(leaves: Tree) -> Tree:
    """What a skeleton is called with: shards as weights that are gathered when used and whose gradient comes
    back in parts.
    """
    return map_leaves(lambda t: lazy.sharded(t) if is_shard(t) else t, leaves)


def gather_shards(leaves: Tree) -> Tree:
    """Whole tensors: shards as CPU tensors on process 0 and left out on the others, all other leaves as they
    are.

    Every process must call it.
    """
    if not any_sharded(leaves):
        return leaves
    gathered = {}
    # `_gather` is collective, so all processes go through the leaves in the same order.
    for name, t in flatten(leaves).items():
        tensor = _gather(t) if is_shard(t) else t
        if tensor is not None:
            gathered[name] = tensor
    return unflatten(gathered)


def place_like(tree: Tree, template: Tree) -> Tree:
    """Whole tensors of any device, moved and cut as those of `template`; both have the same names."""
    flat = flatten(tree)
    placed = {}
    for name, t in flatten(template).items():
        if is_shard(t):
            placed[name] = _cut(flat[name], t.device_mesh, t.placements)
        else:
            # A copy also where nothing moves: training updates parameters in place.
            placed[name] = flat[name].to(t.device, copy=True)
    return unflatten(placed)


def is_shard(t: Any) -> bool:
    """Whether a leaf lies in parts on several processes."""
    return hasattr(t, "to_local")


def any_sharded(tree: Tree) -> bool:
    """Whether any leaf does."""
    return any(is_shard(t) for t in flatten(tree).values())


def _cut(t: Tensor, mesh: Any, placements: Any) -> Tensor:
    """This process's part of a tensor that all processes hold."""
    # Imported late: torch.distributed.tensor takes long to import, and one process never needs it.
    from torch.distributed.tensor import DTensor, distribute_tensor

    t = t.detach().contiguous()
    # src_data_rank=None: every process cuts its own copy, nothing is sent.
    distributed = distribute_tensor(t, mesh, placements, src_data_rank=None)
    # A copy, as the part is a view: it would keep the memory of the whole tensor.
    part = distributed.to_local().to(mesh.device_type, copy=True)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=t.shape, stride=t.stride())


def _gather(t: Any) -> Tensor | None:
    full = t.full_tensor()
    # One copy in the host's memory: the processes of a machine share it.
    return full.cpu() if dist.get_rank() == 0 else None
