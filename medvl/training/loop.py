"""The loop: gradients inside one binding, exact large batches from small chunks, steps that survive a kill."""

import json
import logging
import math
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from attrs import evolve, field, frozen
from torch import Tensor
from tqdm import tqdm

from medvl.base import config, display, files, processes
from medvl.base.tree import Tree, flatten, map_leaves, unflatten
from medvl.training.optim import Optimizer, clip_all, seeded
from medvl.training.order import prefetch
from medvl.weights import shards

_log = logging.getLogger("medvl")
Batch = dict[str, Tensor]
Loss = Callable[[Tree, Any], tuple[Tensor, "Aux"]]
Grad = Callable[[Tree, Any], tuple[Tensor, "Aux", Tree]]
LossSum = Callable[[Tree, Any], tuple[Tensor, Tensor | int, "Aux"]]


@frozen(kw_only=True)
class Aux:
    """What a loss tells besides its value: numbers to log, and batch means that the state follows with running means."""

    metrics: dict[str, Tensor] = field(factory=dict)
    means: Tree = field(factory=dict)


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
    steps: int = 0  # that `fit` was asked for; 0 = not known


def check_stage(stage: Any) -> None:
    """Raise where the record of a stage shows that it cannot run.

    Args:
        stage: with a name (also that of its folder), steps, warmup, lr, weight_decay, and regexes in `train`.
    """
    files.check_name(stage.name, "stage")
    where = f"stage {stage.name}"
    in_epochs = (
        getattr(stage, "epochs", 0) > 0
    )  # then the data says how many steps that is, and this is asked again
    config.within(stage, where, steps=config.COUNT_OR_NONE if in_epochs else config.COUNT)
    config.within(stage, where, lr=config.RATE, weight_decay=config.RATE, warmup=config.COUNT_OR_NONE)
    if stage.warmup > stage.steps and not in_epochs:
        raise ValueError(f"{where}: warmup must lie within its {stage.steps} steps, got {stage.warmup}")
    if not stage.train:
        raise ValueError(f"{where}: train must name parameters, such as lora/.* or .*")
    config.check_regexes(stage.train, where)


class Stopped(SystemExit):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state; the exit status is that of a process the signal ended."""


def value_and_grad(loss: Loss, *, precision: str = "float32", reduce: bool = True) -> Grad:
    """`(params, batch) -> (loss, aux, gradient of the loss by every leaf of params)`.

    The only place that takes gradients, sets autocast (`precision="bfloat16"`) and averages over processes (`reduce`). A leaf that the
    loss does not touch gets zeros. Forward and gradient run inside one call, so that whatever binds weights during the forward pass
    (`torch.func.functional_call`) still binds them when checkpointed activations are computed again.

    Sharded leaves (`shards.shard`) get their part of the gradient, summed over processes where it arises: with reduce=False it stays that
    sum, while other leaves have this process's own gradient.
    """

    def run(params: Tree, batch: Any) -> tuple[Tensor, Aux, Tree]:
        leaves = {n: t.detach().requires_grad_() for n, t in flatten(params).items()}
        with torch.enable_grad(), autocast(params, precision):
            value, aux = loss(unflatten(leaves), batch)
        found = (
            torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            if value.requires_grad
            else ()
        )
        if leaves and not any(g is not None for g in found):
            raise ValueError(
                "value_and_grad: the loss depends on none of the parameters; put what uses them (apply_lora...) inside the loss"
            )
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True)]
        if reduce and processes.world() > 1:
            grads = _summed(grads, processes.world())
        aux = Aux(
            metrics={k: v.detach() for k, v in aux.metrics.items()},
            means=map_leaves(Tensor.detach, aux.means),
        )
        return value.detach(), aux, unflatten(dict(zip(leaves, grads, strict=True)))

    return run


def cached_value_and_grad(
    embed: Callable[[Tree, Batch], Batch], contrast: Loss, *, chunk: int, precision: str = "float32"
) -> Grad:
    """The gradient of `contrast(params, embed(params, batch))`, exact for the whole batch, with activations of `chunk` rows at a time.

    Embed all chunks without gradients, take the loss over the whole batch (of all processes) and its gradient by the embeddings, then
    embed each chunk again and pull that gradient through it: twice the forward passes, the memory of one chunk. A batch that is one
    chunk of one process goes straight through.

    Args:
        embed: rows of a batch -> {name: [rows, ...]}; a row's embedding must not depend on the other rows. Runs in `precision`.
        contrast: (params, {name: [all rows, ...]}) -> loss over the whole batch; runs in full precision.
    Source: Gao et al. 2021 (GradCache), arXiv:2101.06983, section 3.
    """

    def whole(p: Tree, batch: Batch) -> tuple[Tensor, Aux]:
        rows = embed(p, batch)
        with autocast(p, "float32"):
            return contrast(p, {k: _wide(t) for k, t in rows.items()})

    def head(p: Tree, _: None) -> tuple[Tensor, Aux]:
        return contrast(p["params"], p["rows"])

    def tail(p: Tree, piece: tuple[Batch, Batch]) -> tuple[Tensor, Aux]:
        rows, pull = embed(p, piece[0]), piece[1]
        return torch.stack([(rows[k].to(g.dtype) * g).sum() for k, g in pull.items()]).sum(), Aux()

    whole_grad = value_and_grad(whole, precision=precision, reduce=False)
    head_grad = value_and_grad(head, reduce=False)
    tail_grad = value_and_grad(tail, precision=precision, reduce=False)

    def run(params: Tree, batch: Batch) -> tuple[Tensor, Aux, Tree]:
        n = len(next(iter(batch.values())))
        if shards.any_sharded(params):
            raise ValueError(
                "cached_value_and_grad: needs whole parameters, got shards; leave small towers whole"
            )
        if n <= chunk and processes.world() == 1:
            return whole_grad(params, batch)
        spans = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
        with torch.no_grad(), autocast(params, precision):
            parts = [embed(params, _rows(batch, span)) for span in spans]
        rows = {k: processes.gather(_wide(torch.cat([part[k] for part in parts]))) for k in parts[0]}
        value, aux, grads = head_grad({"params": params, "rows": rows}, None)
        total = {k: torch.zeros_like(t) for k, t in flatten(params).items()}
        mine = slice(processes.rank() * n, (processes.rank() + 1) * n)
        for span in spans:
            pull = {k: g[mine][span] for k, g in grads["rows"].items()}
            for k, g in flatten(tail_grad(params, (_rows(batch, span), pull))[2]).items():
                total[k] += g
        if processes.world() > 1:
            for g in total.values():
                dist.all_reduce(g)
        return value, aux, unflatten({k: total[k] + g for k, g in flatten(grads["params"]).items()})

    return run


def token_value_and_grad(
    loss_sum: LossSum,
    *,
    chunk: int,
    precision: str = "float32",
    cut: Callable[[Any, slice], Any] | None = None,
    rows: Callable[[Any], int] | None = None,
) -> Grad:
    """The mean loss over all trained tokens of all micro-batches and processes, and its exact gradient, `chunk` rows at a time.

    A mean of the micro-batches' means would weigh a token more, the fewer tokens its micro-batch trains.

    Args:
        loss_sum: (params, micro-batch) -> sum of the token losses, count of trained tokens, Aux whose metrics and means are sums over
            these tokens, too. Metrics come out as means per token, with "tokens", the count.
        cut: (batch, span of rows) -> micro-batch; needed where a tensor's first axis is not the batch, such as an image's patches.
        rows: batch -> its number of rows; the length of "ids", else of its first tensor, if left out.
    16-bit gradients of several micro-batches are added up in float32. Where parameters are sharded, every process needs the same number
    of micro-batches, since each of them gathers weights.
    Raises:
        ValueError: no trained token in the whole batch; rows of unequal number and no `cut`; micro-batches of unequal number over shards.
    """
    if chunk < 1:
        raise ValueError(f"token_value_and_grad: chunk must be at least one row, got {chunk}")

    def counted(p: Tree, piece: Any) -> tuple[Tensor, Aux]:
        value, count, aux = loss_sum(p, piece)
        count = count if isinstance(count, Tensor) else torch.tensor(count, device=value.device)
        return value, evolve(aux, metrics=aux.metrics | {"tokens": count})

    grad = value_and_grad(counted, precision=precision, reduce=False)

    def run(params: Tree, batch: Any) -> tuple[Tensor, Aux, Tree]:
        n = rows(batch) if rows else len(batch["ids"] if "ids" in batch else next(iter(batch.values())))
        spans = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
        _same_number(params, len(spans))
        pieces = (
            batch if len(spans) == 1 else cut(batch, span) if cut else _equal_rows(batch, n, span)
            for span in spans
        )
        numbers, total = _added(grad, params, pieces, len(spans))
        if processes.world() > 1:
            for v in numbers.values():
                dist.all_reduce(v)
        count = float(numbers["metrics/tokens"])
        if not count:
            raise ValueError(
                f"token_value_and_grad: no token of the batch ({n} rows) is trained; see that the context holds the answers"
            )
        mean = unflatten({k: v if k == "metrics/tokens" else v / count for k, v in numbers.items()})
        names, sums = list(total), list(total.values())
        del total  # each sum is let go as soon as its mean is there
        grads = dict(zip(names, _summed(sums, count), strict=True))
        return mean["loss"], Aux(metrics=mean["metrics"], means=mean.get("means", {})), unflatten(grads)

    return run


def _added(
    grad: Grad, params: Tree, pieces: Iterable[Any], n: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(loss, metrics and means; gradients) of n pieces, added up."""
    numbers: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    for piece in pieces:
        value, aux, grads = grad(params, piece)
        new = flatten({"loss": value, "metrics": aux.metrics, "means": aux.means})
        numbers = {k: v.double() + numbers.get(k, 0.0) for k, v in new.items()}
        if n == 1:
            return numbers, flatten(grads)
        for k, g in flatten(grads).items():
            if k not in total:
                total[k] = torch.zeros_like(
                    g, dtype=torch.float32 if g.dtype in (torch.bfloat16, torch.float16) else g.dtype
                )
            total[k].add_(g)
        del grads, g  # before the next piece makes its own
    return numbers, total


def make_step(
    grad: Grad,
    optimizer: Optimizer,
    *,
    clip: float = 0.0,
    follow: float = 0.05,
    bound: Callable[[Tree], Tree] = lambda p: p,
    seed: int | None = None,
) -> Callable[[State, Any], tuple[State, Batch]]:
    """One optimiser step, `(state, batch) -> (state, metrics)`; the state that goes in must not be used again.

    Args:
        clip: upper bound of the gradients' common norm, 0 = none.
        follow: how far a running mean moves to the batch's mean (further in the first steps).
        bound: puts parameters back into their range after the update.
        seed: torch's default generator is seeded with (seed, step, process) while the gradient is taken and put back afterwards, so that
            dropout (`weights.low_rank`) draws the same masks when a run is resumed; left out, the generator is left alone.
    """

    def step(state: State, batch: Any) -> tuple[State, Batch]:
        with _drawing(seed, state) as generators:
            loss, aux, grads = grad(state.params, batch)
            drawn = state.drawn or generators.used()
        flat = flatten(grads)
        del grads  # each is let go as soon as its clipped one is there
        norm = clip_all(flat, clip)
        params, opt = optimizer.update(unflatten(flat), state.opt, state.params, state.step)
        rate = max(follow, 1 / (state.step + 1))
        old = flatten(state.means)
        means = unflatten(
            {k: torch.lerp(old.get(k, new), new, rate) for k, new in flatten(aux.means).items()}
        )
        moved = evolve(state, params=bound(params), opt=opt, means=means, step=state.step + 1, drawn=drawn)
        return moved, {"loss": loss, "grad_norm": norm} | aux.metrics

    return step


@frozen(kw_only=True)
class Every:
    """How often, in optimiser steps; 0 = only at the end."""

    log: int = 10
    save: int = 100
    validate: int = 0


def fit(
    step: Callable[[State, Any], tuple[State, Batch]],
    state: State,
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    folder: files.PathLike,
    every: Every = Every(),
    validate: Callable[[State], dict[str, float]] | None = None,
    title: str = "training",
    lr: Callable[[int], float] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> State:
    """Train to `steps`, or go on from `folder/last.pt` to the same bits that an undisturbed run ends with.

    Writes `metrics.jsonl` (a line per logged step; all but the keys of `display.CLOCK` are the same after a stop),
    `last.pt`, and `best.pt` (the state with the highest `score` that `validate` gave).
    On SIGTERM or Ctrl-C, in whichever process, the state is saved and `Stopped` is raised; the same call goes on from there. A second
    Ctrl-C ends at once. Shards are saved whole, so that any number of processes can go on, except where steps draw (dropout, noise):
    that would be another result.

    Args:
        batch_at: step -> batch; a pure function, so that nothing about the data needs saving.
        validate: state -> numbers, "score" among them: higher is better.
        title: what the lines that are shown begin with.
        lr: step (from 0) -> its learning rate, to be shown.
        log: takes the lines that are shown: step of steps, seconds a step (without saving and validation), time left (with them), learning
            rate, numbers of the step, memory (the peak of this process). With a `display.Log` they replace each other in a terminal.
    Raises:
        FloatingPointError: the loss, the gradient's norm or a trained number is not finite, in whichever process; nothing of it is saved,
            and the last good state stays on disk.
    """
    folder = Path(folder)
    state = resume(folder, state)
    if state.step > steps:
        raise ValueError(
            f"{folder / 'last.pt'}: is at step {state.step}, past the {steps} asked for; remove it to train anew"
        )
    _check_processes(folder / "last.pt", state, steps)
    state = evolve(state, steps=steps)
    journal = _journal(folder / "metrics.jsonl", state.step)
    first = state.step
    seen: Tensor | None = (
        None  # loss, norm of the gradient and step: the latest, or the first that were not finite
    )
    with (
        _Interrupted() as stop,
        display.bar(None, title, total=steps, initial=first, bar_format=display.STEPS, smoothing=0) as bar,
    ):
        pace = _Pace(title, first, steps, bar, log)
        for i, batch in prefetch(batch_at, state.step, steps):
            state, metrics = step(state, batch)
            pace.step()
            seen = _watched(seen, metrics, i + 1)
            halt = _in_any(stop.number > 0, metrics["loss"].device)
            due = {
                k: state.step == steps or (n and state.step % n == 0)
                for k, n in (("log", every.log), ("save", every.save))
            }
            check = validate is not None and (
                state.step == steps or (every.validate and state.step % every.validate == 0)
            )
            if any(due.values()) or check or halt:
                _check_finite(
                    seen, state if due["save"] or check or halt else None, folder / "last.pt", first
                )
                line = {"step": state.step} | {k: float(v) for k, v in metrics.items()}
                line |= {"lr": lr(i)} if lr else {}
                line |= pace.look()  # behind float(), which waits for the device
            if check:
                assert validate is not None
                scores = validate(state)
                halt = _in_any(stop.number > 0, metrics["loss"].device)
                line |= {f"valid_{k}": v for k, v in scores.items()}
                if (score := _of_first(scores["score"], metrics["loss"].device)) > state.best:
                    state = evolve(state, best=score)
                    save(folder / "best.pt", state)
            if due["log"] or check:
                journal(line)
                pace.tell(line, metrics["loss"].device, stays=check or state.step == steps)
            if due["save"] or halt:
                save(folder / "last.pt", state)
            if any(due.values()) or check:
                pace.resume()
            if (
                halt
            ):  # also at the last step: what comes after it, another stage or the evaluation, is not begun
                _log.warning(
                    "stopped at step %d of %d; the same command goes on from %s",
                    state.step,
                    steps,
                    folder / "last.pt",
                )
                raise Stopped(128 + (stop.number or signal.SIGTERM))
    return state


def _check_processes(path: Path, state: State, steps: int) -> None:
    """Refuse to go on with another number of processes where what each of them draws for its share would then be something else."""
    same = state.processes in (0, processes.world())
    if state.drawn and not same and state.step < steps:
        raise ValueError(
            f"{path}: was trained by {state.processes} processes, now there are {processes.world()}; each draws (dropout, noise) for its "
            f"share of a batch, so the result would change: start {state.processes}, or remove the file to train anew"
        )


class _Pace:
    """How fast a run goes, and the line that says so. Its clock stands still while the state is validated and saved."""

    def __init__(self, title: str, step: int, steps: int, bar: tqdm, log: Callable[[str], None]) -> None:
        self._step, self._bar, self._log = step, bar, log
        self._line = partial(
            tqdm.format_meter, total=steps, initial=step, prefix=title, bar_format=display.STEPS
        )
        self._start = self._since = time.monotonic()
        self._since_step, self._seconds = step, 0.0

    def step(self) -> None:
        """Count a step."""
        self._step += 1
        self._bar.update()

    def look(self) -> dict[str, Any]:
        """The time, and the seconds of a step since the last look."""
        self._seconds = (time.monotonic() - self._since) / max(1, self._step - self._since_step)
        return {"time": f"{datetime.now():%Y-%m-%dT%H:%M:%S}", "seconds_per_step": round(self._seconds, 4)}

    def tell(self, line: dict[str, Any], device: torch.device, *, stays: bool) -> None:
        """Show the numbers of a step; `stays` where the next line does not replace them."""
        numbers = {k: v for k, v in line.items() if k != "step" and k not in display.CLOCK}
        shown = [f"{self._seconds:.3g} s/step"]  # a narrow terminal shows the first numbers only
        shown += [
            f"{k} {numbers.pop(k):{digits}}" for k, digits in (("lr", ".2g"), ("loss", ".3g")) if k in numbers
        ]
        shown.append(f"{_memory(device) / 1e9:.2f} GB")
        postfix = ", ".join(shown + [f"{k} {v:.4g}" for k, v in numbers.items()])
        self._bar.set_postfix_str(postfix)
        tell = self._log.update if isinstance(self._log, display.Log) and not stays else self._log
        tell(self._line(self._step, elapsed=time.monotonic() - self._start, postfix=postfix))

    def resume(self) -> None:
        """Let the clock of steps go on."""
        self._since, self._since_step = time.monotonic(), self._step


def _memory(device: torch.device) -> int:
    """Bytes that this process has held at its peak: on its GPU, or in main memory where it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _watched(seen: Tensor | None, metrics: Batch, step: int) -> Tensor:
    """Loss, norm of the gradient and step [3]; once they are not finite they stay. Stays on the device: a look at each step would wait."""
    loss = metrics["loss"].double()
    norm = metrics.get("grad_norm", loss).double()
    new = torch.stack([loss, norm, torch.full_like(loss, step)])
    return new if seen is None else torch.where(seen.isfinite().all(), new, seen)


def _check_finite(seen: Tensor, state: State | None, last: Path, first: int) -> None:
    """Raise, in all processes alike, where the loss, the gradient or (where it is about to be saved) the state is not finite.

    The loss of a step is that of the weights before it: it may be finite where the gradient, and so every weight after it, is not.
    """
    loss, norm, step = seen.tolist()
    told = (
        f"the loss is {loss:g}"
        if not math.isfinite(loss)
        else f"the norm of the gradient is {norm:g} (loss {loss:g})"
    )
    wrong = not (math.isfinite(loss) and math.isfinite(norm))
    if state is not None and not wrong:
        wrong = not _all_finite(state)
        told = "trained numbers are not finite after the update"
    if not _in_any(wrong, seen.device):
        return
    if not wrong:
        told = "loss or gradient of another process is not finite"
    there = f"the last good state is {last}" if first or last.exists() else "no state was saved yet"
    raise FloatingPointError(
        f"fit: {told} at step {step:.0f}; {there}. The same command meets the same step again: lower lr, or look at the data"
    )


def _all_finite(state: State) -> bool:
    leaves = flatten({"params": state.params, "opt": state.opt, "means": state.means}).values()
    own = [t.to_local() if shards.is_shard(t) else t for t in leaves]
    return all(bool(t.isfinite().all()) for t in own if isinstance(t, Tensor) and t.is_floating_point())


def save(path: files.PathLike, state: State) -> None:
    """Write a state atomically; `read_state` reads it back without unpickling code.

    Process 0 writes. Shards are gathered for it, one at a time, so with these every process must call.
    """
    trees = shards.gather({"params": state.params, "opt": state.opt, "means": state.means})
    if processes.rank() == 0:
        held = {k: trees.get(k, {}) for k in ("params", "opt", "means")}
        with files.atomic(path) as tmp:
            about = {
                "step": state.step,
                "best": state.best,
                "drawn": state.drawn,
                "processes": processes.world(),
                "steps": state.steps,
            }
            torch.save(held | about, tmp)


def read_state(path: files.PathLike, device: str | torch.device = "cpu", *, mapped: bool = False) -> State:
    """The state that `save` wrote, of whole tensors; `mapped` leaves them in the file until they are used.

    Raises:
        ValueError: not there, cut short, or not such a file.
    """
    try:
        raw = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
        _check_fields(raw)
        return State(**raw)
    except FileNotFoundError as e:
        raise ValueError(f"{path}: no such checkpoint; train first, or name a run folder that has one") from e
    except (pickle.UnpicklingError, ValueError, *files.BROKEN) as e:
        raise ValueError(
            f"{path}: not a whole checkpoint of medvl ({files.reason(e)}); remove the folder {Path(path).parent} to train its stage anew"
        ) from e


def _check_fields(raw: Any) -> None:
    """Raise where what a file holds is not what `save` writes."""
    kinds: dict[str, Any] = {
        "params": dict,
        "opt": dict,
        "means": dict,
        "step": int,
        "best": (float, int),
        "drawn": bool,
        "processes": int,
        "steps": int,
    }
    if not isinstance(raw, dict) or not {"params", "opt"} <= raw.keys() <= kinds.keys():
        raise ValueError(f"found {', '.join(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__}")
    if wrong := [k for k in raw if not isinstance(raw[k], kinds[k])]:
        raise ValueError(f"{wrong[0]} must not be {type(raw[wrong[0]]).__name__}")
    leaves = flatten({k: raw[k] for k in ("params", "opt", "means") if k in raw})
    if others := [n for n, t in leaves.items() if not isinstance(t, Tensor)]:
        raise ValueError(f"{others[0]} must be a tensor, found {type(leaves[others[0]]).__name__}")


def read_trained(
    folder: Path, keep: Literal["best", "last"], device: str | torch.device, *, model: Tree
) -> State:
    """The state that a finished run kept, without the optimiser's moments.

    Args:
        keep: "best", the state with the highest validation score; where a run is not validated there is only "last".
        model: the parameters that the trained ones belong to.
    Raises:
        ValueError: not trained to its end; the file is missing or broken; it holds parameters that the model has not, or of other shapes.
    """
    last, path = folder / "last.pt", folder / f"{keep}.pt"
    if last.exists() or not path.exists():
        ended = read_state(last, mapped=True)
        if ended.step < ended.steps:
            raise ValueError(
                f"{folder}: is at step {ended.step} of {ended.steps}; the command that trains it goes on from there"
            )
        if not path.exists() and math.isinf(ended.best):
            raise ValueError(
                f"{folder}: no validation has given a number, so there is no best state; the last one is "
                f'{last}; train.keep = "last" takes it'
            )
        if not path.exists():
            raise ValueError(
                f"{path}: is missing, so the state that was to be kept is lost; put it back, or train the run again"
            )
    elif path.exists():
        _log.warning(
            "%s: is missing, which would say whether the run was trained to its end; %s is taken", last, path
        )
    found = read_state(path, mapped=True)
    expected = {n: t for n, t in flatten(model).items() if n in flatten(found.params)}
    _check_same(path, found.params, expected, "parameters differ from the model")
    copied = lambda tree: map_leaves(lambda t: t.to(device, copy=True), tree)
    return evolve(found, params=copied(found.params), means=copied(found.means), opt={})


def _check_same(path: Path, found: Tree, expected: Tree, what: str) -> None:
    """Raise where the tensors of a file have other names or shapes than those they stand for."""
    in_file, in_model = (
        {n: str(tuple(t.shape)) for n, t in flatten(tree).items()} for tree in (found, expected)
    )
    if wrong := sorted(n for n in {*in_file, *in_model} if in_file.get(n) != in_model.get(n)):
        name = wrong[0]
        both = f"{in_file.get(name, 'absent')} in the file, {in_model.get(name, 'absent')} in the model"
        raise ValueError(f"{path}: {len(wrong)} {what}, e.g. {name}: {both}")


def resume(folder: Path, state: State) -> State:
    """The state of `folder/last.pt` where there is one, checked against the names and shapes of `state`, which is returned otherwise.

    What is sharded in `state` is sharded again, over whatever number of processes there is now; each reads its own part.
    """
    path = folder / "last.pt"
    if not path.exists():
        return state
    device, parted = next(iter(flatten(state.params).values())).device, shards.any_sharded(state.params)
    found = read_state(path, "cpu" if parted else device, mapped=parted)
    if not _all_finite(found):
        raise ValueError(
            f"{path}: holds numbers that are not finite, so that nothing can go on from it; remove it to train anew"
        )
    _check_same(path, found.params, state.params, "parameters differ from the model")
    _check_same(path, found.opt, state.opt, "optimiser moments differ from this stage's")
    if not parted:
        return found
    means = map_leaves(lambda t: t.to(device, copy=True), found.means)
    return evolve(
        found,
        params=shards.placed(found.params, state.params),
        opt=shards.placed(found.opt, state.opt),
        means=means,
    )


def _journal(path: Path, step: int) -> Callable[[dict[str, Any]], None]:
    """An appender to `path`, after dropping lines past `step` (written by a run that was killed before it saved) and broken ones.

    A last line that is broken is half a line of a killed run, whose step is run again. Others are told, and kept in a copy.
    """
    if processes.rank() != 0:
        return lambda line: None
    kept, broken = list[str](), list[int]()
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, raw in enumerate(lines, 1):
        try:
            if json.loads(raw)["step"] <= step:
                kept.append(raw.decode())
        except (ValueError, KeyError, TypeError, RecursionError):
            broken.append(number)
    if [number for number in broken if number < len(lines)]:
        copy = path.with_name("metrics.broken.jsonl")
        with files.atomic(copy) as tmp:
            shutil.copyfile(path, tmp)
        _log.warning(
            "%s: %d lines, the first line %d, hold no step and are left out; %s is a copy",
            path,
            len(broken),
            broken[0],
            copy,
        )
    files.write_text(path, "".join(t + "\n" for t in kept))

    def append(line: dict[str, Any]) -> None:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")

    return append


class _Interrupted:
    """The signal, SIGTERM or SIGINT (Ctrl-C), that came in while the block lasts; 0 if none did.

    The step at work is finished and saved. A second Ctrl-C ends the process at once, as it would without this block. Only the main thread
    can catch signals; elsewhere this does nothing.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def __enter__(self) -> "_Interrupted":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {n: signal.signal(n, self._note) for n in self._SIGNALS}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        if self.number and kind is None:  # it came in after the last step was saved
            raise Stopped(128 + self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.number and number == signal.SIGINT
        # torchrun passes a Ctrl-C on to processes that the terminal has told already: that is no second one.
        if again and not (processes.world() > 1 and time.monotonic() - self._since < 1):
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if number == signal.SIGINT:  # not by logging: a handler may come in the middle of another line
                os.write(
                    2,
                    b"\nstopping after this step, then saving; Ctrl-C again ends at once and loses what is not saved\n",
                )


def autocast(params: Tree, precision: str) -> torch.autocast:
    """Mixed precision on the device of `params`; does nothing unless `precision` is "bfloat16"."""
    device = next(iter(flatten(params).values())).device.type
    return torch.autocast(
        "cpu" if device == "meta" else device, torch.bfloat16, enabled=precision == "bfloat16"
    )


class _Generators:
    """Torch's default generators of the CPU and of a GPU, to see whether something was drawn from them since."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._states()

    def _states(self) -> list[Tensor]:
        gpu = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *gpu]

    def used(self) -> bool:
        return not all(
            torch.equal(before, now) for before, now in zip(self._before, self._states(), strict=True)
        )


@contextmanager
def _drawing(seed: int | None, state: State) -> Iterator[_Generators]:
    """Torch's default generator as a function of (seed, step, process) while the block lasts."""
    device = next(iter(flatten(state.params).values())).device
    if seed is None:
        yield _Generators(device)
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeded(torch.device("cpu"), seed, state.step, processes.rank()).initial_seed())
        yield _Generators(device)


def _summed(grads: list[Tensor], parts: float) -> list[Tensor]:
    """The gradients divided by `parts` and summed over processes; those of shards were summed where their weight was gathered."""
    for i, g in enumerate(grads):  # not in place: two leaves may have one gradient
        grads[i] = g / parts
        if processes.world() > 1 and not shards.is_shard(g):
            dist.all_reduce(grads[i])
    return grads


def _in_any(flag: bool, at: torch.device) -> bool:
    """Whether the flag is up in any process; they must all ask."""
    if processes.world() == 1:
        return flag
    up = torch.tensor(int(flag), device=at)
    dist.all_reduce(up)
    return bool(up)


def _of_first(number: float, at: torch.device) -> float:
    """The number that process 0 has, so that all decide alike."""
    if processes.world() == 1:
        return number
    first = torch.tensor(number, dtype=torch.float64, device=at)
    dist.broadcast(first, 0)
    return float(first)


def _same_number(params: Tree, n: int) -> None:
    if processes.world() == 1 or not shards.any_sharded(params):
        return
    each = processes.gather(torch.tensor([n], device=next(iter(flatten(params).values())).device)).tolist()
    if len(set(each)) > 1:
        raise ValueError(
            f"token_value_and_grad: with sharded parameters every process needs as many micro-batches, got {each}"
        )


def _equal_rows(batch: Batch, n: int, span: slice) -> Batch:
    if wrong := [f"{k} has {len(t)}" for k, t in batch.items() if len(t) != n]:
        raise ValueError(
            f"token_value_and_grad: every tensor must have the batch's {n} rows, {', '.join(wrong)}; say how to cut it with `cut`"
        )
    return _rows(batch, span)


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _rows(batch: Batch, span: slice) -> Batch:
    return {k: t[span] for k, t in batch.items()}
