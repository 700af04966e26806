"""Stages of a record are trained one after the other: which parameters move, by which optimiser, in which
precision."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from medvl.base import processes
from medvl.base.tree import (
    Tree,
    count_values,
    flatten,
    map_leaves,
    match_names,
    merge_trees,
    split_tree,
    unflatten,
)
from medvl.hub import skeletons
from medvl.training import estimate, gradients, loop, states, trace
from medvl.training.determinism import deterministic
from medvl.training.muon import muon
from medvl.training.optim import Optimizer, Rate, adamw, routed, warmup_cosine, with_master
from medvl.training.record import Speed, Stage, TrainConfig, plan_steps
from medvl.weights import lazy, lora, shards
from medvl.weights.four_bit import eight_bit_moments

_HALF = (torch.bfloat16, torch.float16)


# One stage of any system ------------------------------------------------------------------------------


def train_stage(
    cfg: TrainConfig,
    stage: Stage,
    trained: Tree,
    grad: gradients.Grad,
    batch_at: Callable[[int], Any],
    folder: Path,
    *,
    model: Tree,
    validate: Callable[[states.State], dict[str, float]] | None = None,
    means: Tree | None = None,
    bound: Callable[[Tree], Tree] = lambda params: params,
    seed: int = 0,
    keyed: bool = False,
    same_processes: bool = False,
    rates: Mapping[str, float] = {},
    title: str = "",
    log: Callable[[str], None] = print,
) -> states.State:
    """Train what a stage names, or go on with it in `folder`; returns the state that its record keeps.

    Args:
        trained: the parameters of the stage, as `split_stage` gives them.
        grad: of the trained parameters.
        model: all parameters; what is kept must be like theirs.
        validate: state -> numbers, "score" among them: higher is better. Left out, the last state is kept.
        means: running means to go on from.
        bound: puts parameters back into their range after a step.
        keyed: see `make_optimizer`.
        same_processes, rates: see `loop.train_steps`.
    """
    optimizer = make_optimizer(cfg, stage, trained, seed, keyed=keyed)
    schedule = warmup_cosine(stage.steps, stage.warmup)  # the optimiser has its own; this one is shown
    # Moments exist for `trained` only; what is frozen is bound into `grad`.
    start = states.State(params=trained, opt=optimizer.init(trained), means=means or {})
    with deterministic(cfg.deterministic):
        state = loop.train_steps(
            loop.make_step(grad, optimizer, clip=cfg.clip, bound=bound, seed=seed),
            start,
            batch_at,
            steps=stage.steps,
            folder=folder,
            every=loop.Every(log=cfg.log, save=cfg.save, validate=cfg.validate),
            validate=validate,
            patience=cfg.patience,
            same_processes=same_processes,
            keep_last=cfg.keep_last,
            title=title or stage.name,
            rates={"samples_per_second": stage.batch or cfg.batch, **rates},
            tensorboard=cfg.tensorboard,
            lr=lambda i: stage.lr * schedule(i),
            log=log,
        )
    # Of shards every process goes on with the whole: it is read from the file.
    if (cfg.keep == "best" and validate) or cfg.shard:
        processes.wait_for_all()  # process 0 has written it
        keep = cfg.keep if validate else "last"
        state = states.read_trained(folder, keep, processes.choose_device(cfg.device), model=model)
    return state


def make_optimizer(
    cfg: TrainConfig, stage: Stage, trained: Tree, seed: int = 0, *, keyed: bool = False
) -> Optimizer:
    """AdamW as the record describes it, and Muon where a speed of the stage asks for it.

    16-bit weights are rounded, and moments kept, as the record says.

    Args:
        keyed: keep the state under the name of its optimiser even where there is only one. ct_clip's
            files have always been so, and those of language systems have not.
    Raises:
        ValueError: a speed matches no parameter.
    """
    speeds = _choose_speeds(stage, trained)

    def rate(name: str) -> Rate:
        return Rate(lr=speeds[name].lr, weight_decay=speeds[name].weight_decay)

    # Only 16-bit weights lose small steps and need a master or random rounding (see `optim`).
    low = any(leaf.dtype in _HALF for leaf in flatten(trained).values())
    schedule = warmup_cosine(stage.steps, stage.warmup)
    optimizer = adamw(
        rate,
        schedule,
        beta2=cfg.beta2,
        eps=cfg.eps,
        rounding="stochastic" if low and cfg.rounding == "stochastic" else "nearest",
        seed=seed,
        packing=eight_bit_moments() if cfg.moments == "8bit" else None,
    )
    if low and cfg.rounding == "master":
        optimizer = with_master(optimizer)
    if not (stage.has_muon or keyed):
        return optimizer
    return routed(lambda name: speeds[name].optimizer, {"adamw": optimizer, "muon": muon(rate, schedule)})


def _choose_speeds(stage: Stage, trained: Tree) -> dict[str, Speed]:
    """{parameter: its speed}; a later speed of the stage wins over an earlier one."""
    flat = flatten(trained)
    default = Speed(match=".*", lr=stage.lr, weight_decay=stage.weight_decay)
    chosen = dict.fromkeys(flat, default)
    for speed in stage.speeds:
        for name in match_names(list(flat), [speed.pattern]):
            # A vector that a matrices-only speed matches keeps what it had: Muon has no step for it.
            if flat[name].dim() > 1 or not speed.matrices_only:
                chosen[name] = speed
    return chosen


def check_trainable(stage: Stage, params: Tree) -> None:
    """Raise where a stage trains what does not exist or cannot be trained."""
    flat = flatten(params)
    try:
        trained, _ = split_tree(params, stage.train)
        speeds = _choose_speeds(stage, trained)
    except ValueError as e:
        raise ValueError(f"stage {stage.name}: {e}") from e
    for name in speeds:
        # The codes are whole numbers without a gradient; an adapter beside them is trained instead.
        if isinstance(flat[name], lazy.Quantized):
            raise ValueError(
                f"stage {stage.name}: {name} has 4 bits and cannot be trained; train lora/... or set "
                "model.quantize='none'"
            )
    for name, speed in speeds.items():
        if speed.optimizer == "muon" and flat[name].dtype != torch.float32:
            raise ValueError(
                f"stage {stage.name}: muon needs whole float32 weights, {name} is {flat[name].dtype}; "
                "model.dtype = 'float32', or train.added = 'float32' where it is beside the model"
            )


# Stages of a language system --------------------------------------------------------------------------


def init_trained_adapter(
    cfg: TrainConfig,
    record: lora.LoraConfig,
    skeleton: skeletons.Skeleton,
    gen: torch.Generator,
    device: str | torch.device = "cpu",
    *,
    place: str = "lora",
) -> lora.Adapter | None:
    """The adapter before its training, where a stage's pattern matches one of its names
    ("lora/MODULE/a"); None where none does.

    Args:
        place: of its factors in the tree of parameters.
    Raises:
        ValueError: a pattern is meant for an adapter, and the record makes none on this model; as
            `lora.init_lora`.
    """
    patterns = [re.compile(pattern) for pattern in cfg.patterns]

    def matched(names: Any) -> bool:
        return any(pattern.fullmatch(name) for pattern in patterns for name in names)

    possible = []
    for module in lora.adaptable_layers(skeleton):
        possible += [f"{place}/{module}/{factor}" for factor in ("a", "b", "router")]
    if not matched(possible):
        return None
    # Only now: making one draws numbers.
    adapter = lora.init_lora(record, skeleton, gen, device=device)
    # The record's targets may be fewer than the layers that could be adapted.
    return adapter if matched(flatten({place: adapter.factors})) else None


def cast_added(cfg: TrainConfig, added: Tree, dtype: torch.dtype) -> Tree:
    """What is trained beside the model, in the dtype that the record gives it.

    Args:
        dtype: of the model.
    """
    return map_leaves(lambda leaf: leaf.to(dtype), added) if cfg.added == "model" else added


def fit_stages(
    cfg: TrainConfig,
    params: Tree,
    loss_sum: gradients.LossSum,
    batches: Callable[[Stage], Callable[[int], Any]],
    folder: Path,
    *,
    cut: Callable[[Any, slice], Any],
    conversations: Callable[[Stage], int],
    validate: Callable[[Stage], Callable[[Tree], float] | None],
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Tree:
    """Train all stages one after the other, or go on with them, each in a folder of its own; returns all
    parameters, whole.

    Args:
        loss_sum: (all parameters, micro-batch) -> sum of the token losses, their number, Aux.
        batches: stage -> (i -> this process's share of batch i).
        conversations: stage -> how many its batches are drawn from.
        validate: stage -> (all parameters -> validation loss), or None: the last state is kept then.
    """
    _check_shares(cfg)
    # All are planned before the first is trained: a warm-up that is too long must not be found hours later.
    stages = [plan_steps(cfg, stage, conversations(stage)) for stage in cfg.stages]
    for i, stage in enumerate(stages):
        number, batch = conversations(stage), stage.batch or cfg.batch
        log(
            f"stage {stage.name}: {stage.steps:,} steps of {batch} conversations are "
            f"{stage.steps * batch / number:.3g} epochs of {number:,}"
        )
        params = shard_params(cfg, params)  # by this name, so that nothing here holds the whole
        params = fit_stage(
            cfg,
            stage,
            params,
            loss_sum,
            batches(stage),
            # The number keeps folders in the order of training.
            folder / f"{i}-{stage.name}",
            cut=cut,
            validate=validate(stage),
            seed=seed,
            log=log,
        )
    if not shards.any_sharded(params):
        return params
    # What no stage trained lies in parts still, and process 0 evaluates alone.
    device = processes.choose_device(cfg.device)
    # `gather_shards` gives whole tensors in main memory.
    return map_leaves(lambda leaf: leaf.to(device), shards.gather_shards(params))


def _check_shares(cfg: TrainConfig) -> None:
    """Raise where processes that gather each other's weights could get different numbers of micro-batches."""
    world = processes.world_size()
    # Of a multiple, micro-batches by tokens can always be halved until all have as many.
    if cfg.shard and cfg.tokens and cfg.batch % world:
        raise ValueError(
            f"train.shard with train.tokens: train.batch must be a multiple of the {world} processes, got "
            f"{cfg.batch}"
        )


def read_stages(
    cfg: TrainConfig, params: Tree, folder: Path, *, validated: Callable[[Stage], bool] = lambda stage: True
) -> Tree:
    """All parameters, with those that `fit_stages` trained and kept in `folder`.

    Args:
        validated: whether a stage is; one that is not has only its last state.
    Raises:
        ValueError: as `states.read_trained`.
    """
    device = processes.choose_device(cfg.device)
    for i, stage in enumerate(cfg.stages):
        keep = cfg.keep if validated(stage) else "last"
        state = states.read_trained(folder / f"{i}-{stage.name}", keep, device, model=params)
        params = merge_trees(params, state.params)
    return params


def fit_stage(
    cfg: TrainConfig,
    stage: Stage,
    params: Tree,
    loss_sum: gradients.LossSum,
    batch_at: Callable[[int], Any],
    folder: Path,
    *,
    cut: Callable[[Any, slice], Any],
    validate: Callable[[Tree], float] | None = None,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Tree:
    """Train what one stage names, or go on with it in `folder`; returns all parameters. As `fit_stages`."""
    # Frozen parameters are bound into the loss; state, gradients and files hold the trained ones only.
    trained, frozen = split_tree(params, stage.train)
    trained = shard_params(cfg, trained)
    log(
        f"stage {stage.name}: {stage.steps} steps train {count_values(trained):,} of "
        f"{count_values(params):,} parameters"
    )

    def score(state: states.State) -> dict[str, float]:
        assert validate is not None
        with gradients.autocast(state.params, cfg.precision):
            loss = validate(merge_trees(frozen, state.params))
        # The highest score is the best, so the loss counts with its sign turned.
        return {"score": -loss, "loss": loss}

    state = train_stage(
        cfg,
        stage,
        trained,
        make_gradient(cfg, lambda p, batch: loss_sum(merge_trees(frozen, p), batch), cut),
        batch_at,
        folder,
        model=params,
        validate=score if validate else None,
        seed=seed,
        log=log,
    )
    return merge_trees(frozen, state.params)


# Factors a and b of an adapter stay whole, as `shard_params` says; of several tasks each has its own.
_NO_ADAPTER = (r"(?!(\w+/)?lora/).*",)


def shard_params(cfg: TrainConfig, params: Tree, patterns: Sequence[str] = _NO_ADAPTER) -> Tree:
    """The parameters, with `shard` as this process's parts. Give `fit_stage` these, and no process holds
    whole what it trains a part of.

    An adapter stays whole: it is small, and a low-rank weight wants plain factors.
    """
    mesh = shards.process_mesh(processes.choose_device(cfg.device)) if cfg.shard else None
    return unflatten(_cut_matrices(params, mesh, patterns))


def _cut_matrices(params: Tree, mesh: Any, patterns: Sequence[str]) -> dict[str, Tensor]:
    cut = shards.sharder(mesh, patterns=patterns)
    return {name: cut(name, leaf) for name, leaf in flatten(params).items()}


def make_gradient(
    cfg: TrainConfig, loss_sum: gradients.LossSum, cut: Callable[[Any, slice], Any]
) -> gradients.Grad:
    """The gradient of the mean token loss of a batch by what `loss_sum` takes."""
    return gradients.token_value_and_grad(loss_sum, chunk=cfg.chunk, precision=cfg.precision, cut=cut)


# The memory and the time of a stage --------------------------------------------------------------------------------


def estimate_step(
    cfg: TrainConfig,
    stage: Stage,
    params: Tree,
    loss_sum: gradients.LossSum,
    cut: Callable[[Any, slice], Any],
    batch: Any,
    *,
    seed: int = 0,
    processes: int = 1,
) -> estimate.Step:
    """The memory and the work of a training step of one of so many processes, on parameters without storage
    (device "meta").

    With `shard` it holds its rows of what `shard_params` cuts, and a whole matrix only while that is used.

    Args:
        batch: of `estimate_rows(cfg, processes)` rows.
    """
    local, gather = shards_of_one(cfg, params, processes)
    trained, frozen = split_tree(local, stage.train)
    laps = estimate.Laps()

    def marked_loss(p: Tree, piece: Any) -> tuple[Tensor, Tensor | int, gradients.Aux]:
        laps.mark()
        return loss_sum(gather(merge_trees(frozen, p)), piece)

    grad = make_gradient(cfg, marked_loss, cut)
    memory = trace_step(cfg, stage, trained, frozen, grad, batch, laps.counter, seed=seed)
    share = -(-cfg.batch // processes)
    micro_batches = batch if isinstance(batch, list) else [batch]
    conversations = sum(_count_conversations(piece) for piece in micro_batches)
    number = len(batch) if isinstance(batch, list) else conversations / cfg.chunk
    # The share has as many times the conversations that were traced.
    times = share / conversations
    tokens = times * sum(piece["ids"].numel() for piece in micro_batches)
    return estimate.Step(memory=memory, work=laps.work(number * (times - 1)), samples=share, tokens=tokens)


def shards_of_one(
    cfg: TrainConfig, params: Tree, processes: int, patterns: Sequence[str] = _NO_ADAPTER
) -> tuple[Tree, Callable[[Tree], Tree]]:
    """(what one of so many processes holds of parameters on "meta"; what makes weights of it, in place of
    `shards.lazy_shards`)."""
    local = _cut_matrices(params, processes if cfg.shard and processes > 1 else None, patterns)
    rows = {name: len(leaf) for name, leaf in flatten(params).items() if leaf.shape != local[name].shape}

    def gather(tree: Tree) -> Tree:
        flat = flatten(tree)
        for name in rows.keys() & flat.keys():
            flat[name] = estimate.gathered(flat[name], rows[name])
        return unflatten(flat)

    return unflatten(local), gather


def _count_conversations(batch: gradients.Batch) -> int:
    if "segments" not in batch:
        return len(batch["ids"])
    count = 0
    for row in batch["segments"]:
        _, lengths = row[row > 0].unique(return_counts=True)
        # A conversation of one token is none: it only makes a full row one of several (`chat.fullest_batch`).
        count += int((lengths > 1).sum())
    return count


def trace_step(
    cfg: TrainConfig,
    stage: Stage,
    trained: Tree,
    frozen: Tree,
    grad: gradients.Grad,
    batch: Any,
    counter: trace.WorkCounter,
    *,
    seed: int = 0,
    keyed: bool = False,
) -> dict[str, int]:
    """{part: bytes} at the peak of a training step, on "meta"; `counter` counts its work.

    Args:
        keyed: see `make_optimizer`.
    """
    if stage.epochs:
        # The number of steps changes no byte.
        stage = evolve(stage, steps=max(1, stage.warmup), epochs=0.0)
    optimizer = make_optimizer(cfg, stage, trained, seed, keyed=keyed)
    state = states.State(params=trained, opt=optimizer.init(trained))
    step = loop.make_step(grad, optimizer, clip=cfg.clip, seed=seed)
    existing = {"frozen weights": frozen, "trained weights": trained, "optimiser": state.opt}
    return estimate.peak_of(lambda: step(state, batch), existing, counter)


def estimate_rows(cfg: TrainConfig, processes: int = 1) -> int:
    """Conversations that an estimate must see of a process's share: of two micro-batches and more the
    gradients are added up. By tokens it is the whole share."""
    if processes < 1 or cfg.batch < processes:
        raise ValueError(
            f"estimate: processes must lie in 1..train.batch, got {processes} and a batch of {cfg.batch}"
        )
    share = -(-cfg.batch // processes)
    return share if cfg.tokens else min(share, 2 * cfg.chunk)
