"""The loop: optimiser steps that survive a kill, with validation, checkpoints and a journal."""

import logging
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from medvl.base import display, files, processes
from medvl.base.tree import Tree, flatten, unflatten
from medvl.training import states
from medvl.training.gradients import Batch, Grad
from medvl.training.interrupt import Interrupt, Stopped
from medvl.training.journal import Pace, open_journal
from medvl.training.optim import Optimizer, clip_gradients, seeded
from medvl.training.order import prefetch
from medvl.training.states import State

_log = logging.getLogger("medvl")
Step = Callable[[State, Any], tuple[State, Batch]]  # (state, batch) -> (next state, metrics: {name: number})


def make_step(
    grad: Grad,
    optimizer: Optimizer,
    *,
    clip: float = 0.0,
    follow: float = 0.05,
    bound: Callable[[Tree], Tree] = lambda p: p,
    seed: int | None = None,
) -> Step:
    """One optimiser step, `(state, batch) -> (state, metrics)`; the state that goes in must not be used
    again, as an optimiser may write into its tensors.

    The metrics are "loss", "grad_norm" (before it is clipped) and those that the loss gives in `Aux`.

    Args:
        clip: upper bound of the gradients' common norm, 0 = none.
        follow: how far the running means (`State.means`) move to the means of the batch that the loss gives
            (`Aux.means`); further in the first steps.
        bound: puts parameters back into their range after the update.
        seed: torch's default generator is seeded with (seed, step, process) while the gradient is taken
            and put back afterwards, so that dropout (`weights.lazy`) draws the same masks when a run is
            resumed; left out, the generator is left alone.
    """

    def step(state: State, batch: Any) -> tuple[State, Batch]:
        with _seeded_draws(seed, state) as generators:
            loss, aux, grads = grad(state.params, batch)
            # Once true it stays: with another number of processes the steps to come would draw otherwise.
            drawn = state.drawn or generators.used()
        flat = flatten(grads)
        del grads  # each is let go as soon as its clipped one is there
        # Also without clipping: the norm is logged, and `_check_finite` looks at it.
        norm = clip_gradients(flat, clip)
        params, opt = optimizer.update(unflatten(flat), state.opt, state.params, state.step)
        means = _follow_means(state, aux.means, follow)
        moved = evolve(state, params=bound(params), opt=opt, means=means, step=state.step + 1, drawn=drawn)
        return moved, {"loss": loss, "grad_norm": norm} | aux.metrics

    return step


class NotFinite(FloatingPointError):
    """The loss, the gradient's norm or a trained number is not finite.

    Attributes:
        reason: which of them, and what it is.
        step: at which step, from 1.
    """

    def __init__(self, reason: str, step: int, last_good: str) -> None:
        super().__init__(
            f"fit: {reason} at step {step}; {last_good}. The same command meets the same step again: "
            "lower lr, or look at the data"
        )
        self.reason, self.step = reason, step


@frozen(kw_only=True)
class Every:
    """How often something is done, in optimiser steps; 0 = only at the end."""

    log: int = 10
    # Saving costs time, and a kill loses the steps since the last save.
    save: int = 100
    validate: int = 0


def train_steps(
    step: Step,
    state: State,
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    folder: files.PathLike | None,
    every: Every = Every(),
    validate: Callable[[State], dict[str, float]] | None = None,
    patience: int = 0,
    same_processes: bool = False,
    keep_last: int = 1,
    title: str = "training",
    rates: Mapping[str, float] = {},
    tensorboard: bool = False,
    lr: Callable[[int], float] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> State:
    """Train to `steps`, or go on from `folder/last.pt` to the same bits that an undisturbed run ends with.

    Writes `metrics.jsonl` (a line per logged step; all but the keys of `display.TIMING_KEYS` are the same
    after a stop), `last.pt`, and `best.pt` (the state with the highest `score` that `validate` gave, without
    the optimiser's part). Where validations stop giving a better score, training may end before `steps`
    (`patience`); that, too, is the same after a stop, because the count of them is part of the state.

    On SIGTERM or Ctrl-C, in whichever process, the state is saved and `Stopped` is raised; the same call goes
    on from there. A second Ctrl-C ends at once. Shards are saved whole, so that any number of processes can
    go on, except where steps draw (dropout, noise), which would be another result, or with `same_processes`.

    Args:
        state: where training starts if the folder has no `last.pt`; its names and shapes are those that the
            file must have.
        steps: the number of the last step, counted over all calls, not from here.
        batch_at: step -> batch; a pure function, so that nothing about the data needs saving.
        folder: None for a training of seconds: nothing is read or written, and a stop loses it.
        validate: state -> numbers, "score" among them: higher is better.
        patience: how many validations in a row may give no better score before training ends, 0 = any number.
        same_processes: refuse to go on with another number of processes, which would change the last bits.
        keep_last: with 2 or more, so many states are kept in `step-*.pt`, one of each save.
        title: what the lines that are shown begin with.
        rates: {name: what a step has of it}, to be written and shown per second, as `display.TIMING_KEYS`.
        tensorboard: write the numbers of `metrics.jsonl` for TensorBoard, too.
        lr: step (from 0) -> its learning rate, to be shown.
        log: takes the lines that are shown: step of steps, seconds a step (without saving and
            validation), time left (with them), rates, learning rate, numbers of the step, memory (the peak of
            this process). With a `display.Log` they replace each other in a terminal.
    Raises:
        NotFinite: the loss, the gradient's norm or a trained number is not finite, in whichever process;
            nothing of it is saved, and the last good state stays on disk.
    """
    last = None if folder is None else Path(folder) / "last.pt"
    state = _first_state(last, state, steps)
    # A run that ended early is not prolonged when it is started again.
    if _is_out_of_patience(state, patience):
        return state
    _check_processes(last, state, steps, same_processes)
    # `read_trained` tells a finished run by step and steps in the file.
    state = evolve(state, steps=steps)
    journal: Callable[[dict[str, Any]], None] = lambda line: None
    if last is not None:
        # Lines past the step of the state that was read are dropped. A run that has ended adds no file of events.
        with_events = tensorboard and state.step < steps
        journal = open_journal(last.with_name("metrics.jsonl"), state.step, with_events)
    start = state.step
    watched: Tensor | None = None
    with (
        Interrupt() as stop,
        # smoothing=0: time left by the mean over the whole run, so that validations and saves count in it.
        display.progress_bar(
            None, title, total=steps, initial=start, bar_format=display.STEP_FORMAT, smoothing=0
        ) as bar,
    ):
        pace = Pace(title, start, steps, bar, log)
        # The next batch is read while this one is computed. i is the step from 0, which makes `state.step`
        # i + 1: the number of steps that are done.
        for i, batch in prefetch(batch_at, start, steps, _device_of(state)):
            state, metrics = step(state, batch)
            pace.count_step()
            device = metrics["loss"].device
            watched = _watch(watched, metrics, i + 1)
            # All processes stop at the same step, whichever of them was signalled.
            halt = _in_any(stop.number > 0)
            due = _what_is_due(state.step, steps, every, validates=validate is not None)
            if not (due or halt):
                continue
            # Reading all weights costs time, so they are looked at only before they are written.
            will_save = halt or "save" in due or "validate" in due
            _check_finite(watched, state if will_save else None, last, start)
            line = {"step": state.step} | {name: float(v) for name, v in metrics.items()}
            if lr:
                # Of the step that was just taken, whose number is i from 0.
                line["lr"] = lr(i)
            line |= pace.read_clock(device, rates)  # after float(), which waits for the device
            if "validate" in due:
                assert validate is not None
                scores = validate(state)
                # A validation may take minutes: a signal in it is not left until the next step.
                halt = _in_any(stop.number > 0)
                line |= {f"valid_{name}": score for name, score in scores.items()}
                # A better state is on disk before the line that tells of it, and before `last.pt` passes it.
                state = _follow_best(state, scores["score"], last, patience)
            ended = _is_out_of_patience(state, patience)
            if ended:
                # `last.pt` will say that this is the end, or the run would seem unfinished.
                state = evolve(state, steps=state.step)
            if "log" in due or "validate" in due:
                journal(line)
                pace.show(line, stays="validate" in due or state.step == steps)
            # Not at every validation: a run resumed from an older state validates again, with the same score.
            if last is not None and ("save" in due or halt or ended):
                states.save_state(last, state)
                _keep_states(last, state.step, keep_last)
            if halt:
                # Also at the last step: what comes after it, another stage or the evaluation, is not begun.
                _log.warning(
                    "stopped at step %d of %d; the same command goes on from %s",
                    state.step,
                    steps,
                    last or "its start",
                )
                # As a shell reports a process that a signal ended: SIGTERM where another one was signalled.
                raise Stopped(128 + (stop.number or signal.SIGTERM))
            if ended:
                log(
                    f"{title}: ends at step {state.step} of {steps}, {state.stale} validations gave no "
                    "better score"
                )
                break
            pace.go_on()
    return state


def _first_state(last: Path | None, state: State, steps: int) -> State:
    """The state that training begins from: that of the file, where there is one that can be trained on."""
    if last is not None:
        state = states.resume_state(last.parent, state)
    if state.step > steps:
        raise ValueError(
            f"{last}: is at step {state.step}, past the {steps} asked for; remove it to train anew"
        )
    return state


def _device_of(state: State) -> torch.device:
    return next(iter(flatten(state.params).values())).device


def _what_is_due(step: int, steps: int, every: Every, *, validates: bool) -> set[str]:
    """What is to be done after a step: "log", "save", "validate"; all of it after the last one."""
    intervals = {"log": every.log, "save": every.save}
    if validates:
        intervals["validate"] = every.validate
    return {name for name, n in intervals.items() if step == steps or (n > 0 and step % n == 0)}


def _follow_best(state: State, score: float, last: Path | None, patience: int) -> State:
    """The state after a validation. It is written to `best.pt` where no score was higher."""
    # Processes may differ in the last bits of a score, and all must decide alike what is best.
    score = _of_first_process(score)
    if score > state.best:
        state = evolve(state, best=score, stale=0)
        if last is not None:
            # Nothing is trained on from it, so the optimiser's part, often two thirds of a state, is left out.
            states.save_state(last.with_name("best.pt"), evolve(state, opt={}))
    # Without patience nothing is counted, so that the files of such runs hold no count.
    elif patience:
        state = evolve(state, stale=state.stale + 1)
    return state


def _is_out_of_patience(state: State, patience: int) -> bool:
    return patience > 0 and state.stale >= patience


def _keep_states(last: Path, step: int, number: int) -> None:
    """Keep the state that was just written as one of the latest `number`, and let older ones go."""
    if number < 2 or processes.rank() != 0:
        return
    # Leading zeros, so that names sort by step.
    path = last.with_name(f"step-{step:09d}.pt")
    # A copy of the file: to gather shards a second time, every process would be needed.
    with files.atomic(path) as tmp:
        shutil.copyfile(last, tmp)
    for old in sorted(last.parent.glob("step-*.pt"))[:-number]:
        old.unlink()


def _check_processes(path: Path | None, state: State, steps: int, must_be_same: bool) -> None:
    """Refuse to go on with another number of processes where the result would then be something else."""
    # 0: written before the number of processes was saved.
    same = state.processes in (0, processes.world_size())
    if (state.drawn or must_be_same) and not same and state.step < steps:
        reason = "each adds up its share of a batch by itself"
        if state.drawn:
            reason = "each draws (dropout, noise) for its share of a batch"
        raise ValueError(
            f"{path}: was trained by {state.processes} processes, now there are {processes.world_size()}; "
            f"{reason}, so the result would change: start {state.processes}, or remove the file to train anew"
        )


# Numbers that are not finite --------------------------------------------------------------------------


def _watch(watched: Tensor | None, metrics: Batch, step: int) -> Tensor:
    """(loss, norm of the gradient, step), a tensor [3]: those of this step, or of the first step at which
    they were not finite.

    Stays on the device: a look at each step would wait for it.

    Args:
        watched: what the call of the step before gave, None at the first.
    """
    loss = metrics["loss"].double()
    # A step without a norm in its metrics is watched by its loss alone.
    norm = metrics.get("grad_norm", loss).double()
    new = torch.stack([loss, norm, torch.full_like(loss, step)])
    if watched is None:
        return new
    # The first bad numbers stay, as later losses say nothing about the cause.
    return torch.where(watched.isfinite().all(), new, watched)


def _check_finite(watched: Tensor, state: State | None, last: Path | None, start: int) -> None:
    """Raise, in all processes alike, where the loss, the gradient or (where it is about to be saved) the
    state is not finite.

    The loss of a step is that of the weights before it: it may be finite where the gradient, and so every
    weight after it, is not.
    """
    loss, norm, step = watched.tolist()
    reason = ""
    if not math.isfinite(loss):
        reason = f"the loss is {loss:g}"
    elif not math.isfinite(norm):
        reason = f"the norm of the gradient is {norm:g} (loss {loss:g})"
    elif state is not None and not states.is_finite(state):
        reason = "trained numbers are not finite after the update"
    # All processes ask here, or those without a fault would wait for the one that raised.
    if not _in_any(bool(reason)):
        return
    reason = reason or "loss or gradient of another process is not finite"
    last_good = "no state was saved yet"
    # A start behind step 0 was read from the file.
    if last is not None and (start or last.exists()):
        last_good = f"the last good state is {last}"
    raise NotFinite(reason, int(step), last_good)


# Random draws -----------------------------------------------------------------------------------------


class _Generators:
    """Torch's default generators of the CPU and of a GPU, to see whether something was drawn from them
    since."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._states()

    def _states(self) -> list[Tensor]:
        now = [torch.get_rng_state()]
        if self._device.type == "cuda":
            now.append(torch.cuda.get_rng_state(self._device))
        return now

    def used(self) -> bool:
        """Whether something was drawn since this object was made."""
        pairs = zip(self._before, self._states(), strict=True)
        return not all(torch.equal(before, now) for before, now in pairs)


@contextmanager
def _seeded_draws(seed: int | None, state: State) -> Iterator[_Generators]:
    """Torch's default generator as a function of (seed, step, process) while the block lasts; with seed None
    it is left alone. What is given says whether the block drew from it.
    """
    device = next(iter(flatten(state.params).values())).device
    if seed is None:
        yield _Generators(device)
        return
    # By process, so that each draws masks of its own for its rows.
    key = seeded(torch.device("cpu"), seed, state.step, processes.rank()).initial_seed()
    # fork_rng puts the generators back. Only those of the CPU and of this GPU are seeded: `torch.manual_seed`
    # would seed those of every GPU.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(key)
        yield _Generators(device)


def _follow_means(state: State, new: Tree, follow: float) -> Tree:
    """The running means after a step. The first steps count more, so that the start leaves no trace."""
    # Up to step 1 / follow this is the plain mean of all batches so far.
    rate = max(follow, 1 / (state.step + 1))
    old = flatten(state.means)
    means = {}
    for name, batch_mean in flatten(new).items():
        means[name] = torch.lerp(old.get(name, batch_mean), batch_mean, rate)
    return unflatten(means)


# What processes agree on ------------------------------------------------------------------------------


def _in_any(flag: bool) -> bool:
    """Whether the flag is up in any process; they must all ask."""
    return bool(processes.sum_over_processes(torch.tensor(int(flag))))


def _of_first_process(number: float) -> float:
    """The number that process 0 has, so that all decide alike; they must all ask."""
    first = number if processes.rank() == 0 else 0.0
    return float(processes.sum_over_processes(torch.tensor(first, dtype=torch.float64)))
