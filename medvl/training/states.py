"""Training states: what a step changes, how it is written so that a run can go on, how trained weights
are read back."""

import logging
import math
import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from medvl.base import files, processes
from medvl.base.tree import Tree, flatten, map_leaves
from medvl.weights import shards

_log = logging.getLogger("medvl")
_TREES = ("params", "opt", "means")


@frozen(kw_only=True)
class State:
    """All that a step changes."""

    params: Tree  # only what this stage trains
    opt: Tree
    means: Tree = field(factory=dict)  # running means of Aux.means
    step: int = 0
    best: float = -float("inf")  # highest validation score so far
    drawn: bool = (
        False  # whether steps drew from torch's default generator, each process for its share of the batch
    )
    processes: int = 0  # how many trained it when it was saved; 0 = not known
    # that `loop.train_steps` was asked for, or at which it ended early; 0 = not known
    steps: int = 0
    stale: int = 0  # validations since the best one; counted where a run may end early


def save_state(path: files.PathLike, state: State) -> None:
    """Write a state atomically; `read_state` reads it back without unpickling code.

    Process 0 writes. Shards are gathered for it, one at a time, so with these every process must call.
    """
    trees = shards.gather_shards({name: getattr(state, name) for name in _TREES})
    if processes.rank() != 0:
        return
    # Plain tensors and numbers only: they are read with weights_only, which runs no code of the file.
    content: dict[str, Any] = {name: trees.get(name, {}) for name in _TREES}
    content |= {
        "step": state.step,
        "best": state.best,
        "drawn": state.drawn,
        "processes": processes.world_size(),
        "steps": state.steps,
    }
    # Only where it is counted, so that files of other runs stay as they were.
    if state.stale:
        content["stale"] = state.stale
    # An open file: to a path torch does not say that the disk is full.
    with files.atomic(path) as tmp, open(tmp, "wb") as file:
        torch.save(content, file)


def read_state(path: files.PathLike, device: str | torch.device = "cpu", *, mapped: bool = False) -> State:
    """The state that `save_state` wrote, of whole tensors; `mapped` leaves them in the file until they
    are used.

    Raises:
        ValueError: not there, cut short, or not such a file.
    """
    try:
        raw = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
        _check_fields(raw)
        return State(**raw)
    except FileNotFoundError as e:
        raise ValueError(f"{path}: no such checkpoint; train first, or name a run folder that has one") from e
    except (pickle.UnpicklingError, ValueError, *files.READ_ERRORS) as e:
        raise ValueError(
            f"{path}: not a whole checkpoint of medvl ({files.error_reason(e)}); remove the folder "
            f"{Path(path).parent} to train its stage again"
        ) from e


def _check_fields(raw: Any) -> None:
    """Raise where the content of a file is not what `save_state` writes."""
    kinds: dict[str, Any] = dict.fromkeys(_TREES, dict)
    kinds |= {"step": int, "best": (float, int), "drawn": bool, "processes": int, "steps": int, "stale": int}
    if not isinstance(raw, dict):
        raise ValueError(f"found {type(raw).__name__}")
    # Fields that came later may be missing: `State` has their defaults. Unknown ones are refused.
    if not {"params", "opt"} <= raw.keys() <= kinds.keys():
        raise ValueError(f"found {', '.join(map(str, raw))}")
    for name, value in raw.items():
        if not isinstance(value, kinds[name]):
            raise ValueError(f"{name} must not be {type(value).__name__}")
    for name, leaf in flatten({name: raw[name] for name in _TREES if name in raw}).items():
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{name} must be a tensor, found {type(leaf).__name__}")


def read_trained(
    folder: Path, keep: Literal["best", "last"], device: str | torch.device, *, model: Tree
) -> State:
    """The state that a finished run kept, without the optimiser's moments.

    Args:
        keep: "best", the state with the highest validation score; where a run is not validated there is
            only "last".
        model: the parameters that the trained ones belong to.
    Raises:
        ValueError: not trained to its end; the file is missing or broken; it holds parameters that the
            model has not, or of other shapes.
    """
    last, path = folder / "last.pt", folder / f"{keep}.pt"
    # `last.pt` alone says whether the run was finished: `best.pt` exists from the first better score on.
    if last.exists() or not path.exists():
        _check_ended(folder, last, path)
    else:
        _log.warning(
            "%s: is missing, so it is unknown whether the run was trained to its end; %s is used", last, path
        )
    # Mapped: of a large file only what is used is read, and moments are not.
    state = read_state(path, mapped=True)
    trained = flatten(state.params)
    expected = {name: leaf for name, leaf in flatten(model).items() if name in trained}
    _check_same(path, state.params, expected, "parameters differ from the model")

    def copy(leaf: Tensor) -> Tensor:
        return leaf.to(device, copy=True)  # a mapped tensor would lie in the file for as long as it lives

    return evolve(state, params=map_leaves(copy, state.params), means=map_leaves(copy, state.means), opt={})


def _check_ended(folder: Path, last: Path, path: Path) -> None:
    """Raise where a run is not trained to its end, or has lost the state at `path`."""
    end = read_state(last, mapped=True)
    if end.step < end.steps:
        raise ValueError(
            f"{folder}: is at step {end.step} of {end.steps}; the command that trains it continues from there"
        )
    if path.exists():
        return
    # -inf: no validation was better than none, as when all scores were nan.
    if math.isinf(end.best):
        raise ValueError(
            f"{folder}: no validation has given a number, so there is no best state; the last one is "
            f'{last}; train.keep = "last" takes it'
        )
    raise ValueError(
        f"{path}: is missing, so the state that was to be kept is lost; restore it, or train the run again"
    )


def _check_same(path: Path, tree: Tree, expected: Tree, fault: str) -> None:
    """Raise where the tensors of a file have other names or shapes than those they stand for."""
    in_file, in_model = _shapes(tree), _shapes(expected)
    wrong = sorted(name for name in {*in_file, *in_model} if in_file.get(name) != in_model.get(name))
    if wrong:
        name = wrong[0]
        both = f"{in_file.get(name, 'absent')} in the file, {in_model.get(name, 'absent')} in the model"
        raise ValueError(f"{path}: {len(wrong)} {fault}, e.g. {name}: {both}")


def _shapes(tree: Tree) -> dict[str, str]:
    return {name: str(tuple(leaf.shape)) for name, leaf in flatten(tree).items()}


def resume_state(folder: Path, state: State) -> State:
    """The state of `folder/last.pt` where there is one, checked against the names and shapes of `state`,
    which is returned otherwise.

    What is sharded in `state` is sharded again, over whatever number of processes there is now; each
    reads its own part.
    """
    path = folder / "last.pt"
    if not path.exists():
        return state
    device = next(iter(flatten(state.params).values())).device
    sharded = shards.any_sharded(state.params)
    # Mapped where sharded: of the file each process reads only its own rows.
    saved = read_state(path, "cpu" if sharded else device, mapped=sharded)
    if not is_finite(saved):
        raise ValueError(
            f"{path}: holds numbers that are not finite, so training cannot continue from it; remove it to "
            "train again"
        )
    # Another model or optimiser under the same record: it has changed, or the library has.
    _check_same(path, saved.params, state.params, "parameters differ from the model")
    _check_same(path, saved.opt, state.opt, "optimiser moments differ from this stage's")
    if not sharded:
        return saved
    return evolve(
        saved,
        params=shards.place_like(saved.params, state.params),
        opt=shards.place_like(saved.opt, state.opt),
        # A mapped tensor would keep the file open for as long as it lives.
        means=map_leaves(lambda leaf: leaf.to(device, copy=True), saved.means),
    )


def is_finite(state: State) -> bool:
    """Whether every number of a state that lies on this process is finite."""
    for leaf in flatten({name: getattr(state, name) for name in _TREES}).values():
        local = leaf.to_local() if shards.is_shard(leaf) else leaf
        # Codes of packed moments are whole numbers, which are always finite.
        if isinstance(local, Tensor) and local.is_floating_point() and not bool(local.isfinite().all()):
            return False
    return True
