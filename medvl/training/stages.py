"""Stages that train a language model, or what is put on it: what moves and how fast, in which precision, and the memory it takes."""

import re
from collections.abc import Callable
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
from medvl.training import estimate, gradients, loop, states
from medvl.training.muon import muon
from medvl.training.optim import Optimizer, Rate, adamw, routed, warmup_cosine, with_master
from medvl.training.record import Stage, TrainConfig
from medvl.weights import four_bit, lora, shards
from medvl.weights.four_bit import eight_bit_moments


def init_trained_adapter(
    cfg: TrainConfig,
    record: lora.LoraConfig,
    skeleton: skeletons.Skeleton,
    gen: torch.Generator,
    device: str | torch.device = "cpu",
) -> lora.Adapter | None:
    """The adapter before its training, where a stage's pattern matches one of its names ("lora/MODULE/a"); None where none does.

    Raises:
        ValueError: a pattern is meant for an adapter, and the record makes none on this model; as `lora.init_lora`.
    """
    chosen = [re.compile(p) for p in cfg.patterns]
    matched = lambda names: any(p.fullmatch(n) for p in chosen for n in names)
    possible = [
        f"lora/{module}/{factor}"
        for module in lora.adaptable_layers(skeleton)
        for factor in ("a", "b", "router")
    ]
    if not matched(possible):
        return None
    adapter = lora.init_lora(record, skeleton, gen, device=device)
    return adapter if matched(flatten({"lora": adapter.factors})) else None


def check_trainable(stage: Stage, params: Tree) -> None:
    """Raise where a stage trains what does not exist or is frozen for good."""
    flat = flatten(params)
    try:
        hit = match_names(list(flat), stage.train)
    except ValueError as e:
        raise ValueError(f"stage {stage.name}: {e}") from e
    if frozen_ := [n for n in hit if isinstance(flat[n], four_bit.FourBit)]:
        raise ValueError(
            f"stage {stage.name}: {frozen_[0]} has 4 bits and cannot be trained; train lora/... or set model.quantize='none'"
        )
    if stage.muon and (low := [n for n in hit if flat[n].dtype != torch.float32]):
        raise ValueError(
            f"stage {stage.name}: muon needs whole float32 weights, {low[0]} is {flat[low[0]].dtype}; model.dtype = 'float32'"
        )


def plan_steps(cfg: TrainConfig, stage: Stage, conversations: int) -> Stage:
    """The stage in steps, where its record gives epochs; with so many conversations that fit the context.

    Raises:
        ValueError: its warm-up is longer.
    """
    if not stage.epochs:
        return stage
    return evolve(stage, steps=max(1, round(stage.epochs * conversations / cfg.batch)), epochs=0.0)


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
    """Train all stages one after the other, or go on with them, each in a folder of its own; returns all parameters, whole.

    Args:
        loss_sum: (all parameters, micro-batch) -> sum of the token losses, their number, Aux.
        batches: stage -> (i -> this process's share of batch i).
        conversations: stage -> how many its batches are drawn from.
        validate: stage -> (all parameters -> validation loss), or None: the last state is kept then.
    """
    stages = [
        plan_steps(cfg, stage, conversations(stage)) for stage in cfg.stages
    ]  # all, before the first is trained
    for i, stage in enumerate(stages):
        epochs = stage.steps * cfg.batch / conversations(stage)
        log(
            f"stage {stage.name}: {stage.steps:,} steps of {cfg.batch} conversations are {epochs:.3g} epochs of {conversations(stage):,}"
        )
        how: Any = {"cut": cut, "validate": validate(stage), "seed": seed, "log": log}
        params = shard_params(cfg, params)  # by this name, so that nothing here holds the whole
        params = fit_stage(cfg, stage, params, loss_sum, batches(stage), folder / f"{i}-{stage.name}", **how)
    if not shards.any_sharded(params):
        return params
    device = processes.choose_device(
        cfg.device
    )  # what no stage trained lies in parts still, and process 0 evaluates alone
    return map_leaves(lambda t: t.to(device), shards.gather_shards(params))


def read_stages(
    cfg: TrainConfig, params: Tree, folder: Path, *, validated: Callable[[Stage], bool] = lambda stage: True
) -> Tree:
    """All parameters, with those that `fit_stages` trained and kept in `folder`.

    Args:
        validated: whether a stage is; one that is not has only its last state.
    Raises:
        ValueError: as `states.read_trained`.
    """
    for i, stage in enumerate(cfg.stages):
        keep = cfg.keep if validated(stage) else "last"
        state = states.read_trained(
            folder / f"{i}-{stage.name}", keep, processes.choose_device(cfg.device), model=params
        )
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
    """Train what the stage names, or go on with it in `folder`; returns all parameters. As `fit_stages`, for one."""
    trained, frozen_ = split_tree(params, stage.train)
    device = processes.choose_device(cfg.device)
    trained = shard_params(cfg, trained)
    log(
        f"stage {stage.name}: {stage.steps} steps train {count_values(trained):,} of {count_values(params):,} parameters"
    )
    optimizer = make_optimizer(cfg, stage, trained, seed)
    schedule = warmup_cosine(stage.steps, stage.warmup)
    step = loop.make_step(
        make_gradient(cfg, lambda p, b: loss_sum(merge_trees(frozen_, p), b), cut),
        optimizer,
        clip=cfg.clip,
        seed=seed,
    )

    def scored(state: states.State) -> dict[str, float]:
        assert validate is not None
        loss = validate(merge_trees(frozen_, state.params))
        return {"score": -loss, "loss": loss}

    state = loop.train_steps(
        step,
        states.State(params=trained, opt=optimizer.init(trained)),
        batch_at,
        steps=stage.steps,
        folder=folder,
        every=loop.Every(log=cfg.log, save=cfg.save, validate=cfg.validate),
        validate=scored if validate else None,
        title=stage.name,
        lr=lambda i: stage.lr * schedule(i),
        log=log,
    )
    if (cfg.keep == "best" and validate) or cfg.shard:
        processes.wait_for_all()  # process 0 has written it
        state = states.read_trained(folder, cfg.keep if validate else "last", device, model=params)
        return merge_trees(frozen_, state.params)
    return merge_trees(frozen_, state.params)


def shard_params(cfg: TrainConfig, params: Tree) -> Tree:
    """The parameters, with `shard` as this process's parts. Give `fit_stage` these, and no process holds whole what it trains a part of.

    An adapter stays whole: it is small, and a low-rank weight wants plain factors.
    """
    return unflatten(
        _parts(params, shards.process_mesh(processes.choose_device(cfg.device)) if cfg.shard else None)
    )


def _parts(params: Tree, mesh: Any) -> dict[str, Tensor]:
    cut = shards.sharder(mesh, patterns=("(?!lora/).*",))
    return {n: cut(n, t) for n, t in flatten(params).items()}


def make_gradient(
    cfg: TrainConfig, loss_sum: gradients.LossSum, cut: Callable[[Any, slice], Any]
) -> gradients.Grad:
    """The gradient of the mean token loss of a batch by what `loss_sum` takes."""
    return gradients.token_value_and_grad(loss_sum, chunk=cfg.chunk, cut=cut, rows=lambda b: len(b["ids"]))


def make_optimizer(cfg: TrainConfig, stage: Stage, trained: Tree, seed: int = 0) -> Optimizer:
    """AdamW as the record wants it: the rounding of 16-bit weights, the precision of the moments, Muon for the matrices inside layers."""
    rate = Rate(lr=stage.lr, weight_decay=stage.weight_decay)
    low = any(t.dtype in (torch.bfloat16, torch.float16) for t in flatten(trained).values())
    made = adamw(
        lambda name: rate,
        warmup_cosine(stage.steps, stage.warmup),
        beta2=0.999,
        eps=1e-8,
        rounding="stochastic" if low and cfg.rounding == "stochastic" else "nearest",
        seed=seed,
        packing=eight_bit_moments() if cfg.moments == "8bit" else None,
    )
    made = with_master(made) if low and cfg.rounding == "master" else made
    if not stage.muon:
        return made
    inner = {
        n
        for n, t in flatten(trained).items()
        if t.dim() > 1 and not re.search(r"(embed_tokens|lm_head|pos_embed)\.", n)
    }
    turned = muon(
        lambda name: Rate(lr=stage.muon, weight_decay=stage.weight_decay),
        warmup_cosine(stage.steps, stage.warmup),
    )
    return routed(lambda n: "muon" if n in inner else "adamw", {"adamw": made, "muon": turned})


def estimate_memory(
    cfg: TrainConfig,
    stage: Stage,
    params: Tree,
    loss_sum: gradients.LossSum,
    cut: Callable[[Any, slice], Any],
    batch: Any,
    *,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, int]:
    """{part: bytes} of one of so many processes at the peak of a training step, on parameters without storage (device "meta").

    With `shard` it holds its rows of what `shard_params` cuts, and a whole matrix only while that is used.

    Args:
        batch: of `estimate_rows(cfg, processes)` rows.
    """
    if stage.epochs:
        stage = evolve(stage, steps=max(1, stage.warmup), epochs=0.0)  # their number changes no byte
    parts = _parts(params, processes if cfg.shard and processes > 1 else None)
    rows = {n: len(t) for n, t in flatten(params).items() if t.shape != parts[n].shape}
    whole = lambda p: unflatten(
        {n: estimate.gathered(t, rows[n]) if n in rows else t for n, t in flatten(p).items()}
    )
    trained, frozen_ = split_tree(unflatten(parts), stage.train)
    optimizer = make_optimizer(cfg, stage, trained, seed)
    grad = make_gradient(cfg, lambda p, b: loss_sum(whole(merge_trees(frozen_, p)), b), cut)
    state = states.State(params=trained, opt=optimizer.init(trained))
    step = loop.make_step(grad, optimizer, clip=cfg.clip, seed=seed)
    return estimate.peak_of(
        lambda: step(state, batch),
        {"frozen weights": frozen_, "trained weights": trained, "optimiser": state.opt},
    )


def estimate_rows(cfg: TrainConfig, processes: int = 1) -> int:
    """Conversations that an estimate must see of a process's share: of two micro-batches and more the gradients are added up."""
    if processes < 1 or cfg.batch < processes:
        raise ValueError(
            f"estimate: processes must lie in 1..train.batch, got {processes} and a batch of {cfg.batch}"
        )
    return min(-(-cfg.batch // processes), 2 * cfg.chunk)
