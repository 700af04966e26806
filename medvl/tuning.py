"""Stages that train a language model, or what is put on it: what moves and how fast, in which precision, and the memory it takes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import frozen

from medvl import estimate, quant, shards, train
from medvl.muon import muon
from medvl.optim import Optimizer, Rate, adamw, routed, warmup_cosine, with_master
from medvl.quant import eight_bit
from medvl.tree import Tree, count, flatten, matching, merge, split


@frozen(kw_only=True)
class Stage:
    """What is trained, how long and how fast. Names start with "model/", "lora/" or what else the system has; without a stage that trains
    "lora/..." there is no adapter."""

    name: str
    steps: int
    lr: float
    data: str = ""  # which of the system's data, where it has several
    weight_decay: float = 0.0
    warmup: int = 0
    muon: float = 0.0  # rate of Muon for the matrices inside layers, 0 = AdamW moves them too; worth it for models from scratch
    train: tuple[str, ...] = ("lora/.*",)


@frozen(kw_only=True)
class TrainConfig:
    """The loop. The loss is the mean over all trained tokens of `batch` conversations; `chunk` of them are computed at a time."""

    stages: tuple[Stage, ...]
    batch: int = 16
    chunk: int = 2
    logits: int = 256  # tokens whose logits exist at a time
    checkpoint: bool = True  # keep only the layers' inputs for the backward pass
    rounding: Literal["master", "stochastic", "nearest"] = "master"  # of 16-bit weights that are trained
    moments: Literal["float32", "8bit"] = "float32"
    shard: bool = False  # matrices that are trained lie in parts on all processes
    clip: float = 1.0
    log: int = 10
    save: int = 100
    validate: int = 200
    valid: int = 256  # conversations the validation loss is taken over, 0 = all
    keep: Literal["best", "last"] = "best"  # by validation loss
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __attrs_post_init__(self) -> None:
        if not self.stages:
            raise ValueError("train.stages must hold at least one stage")
        if any(stage.muon for stage in self.stages) and self.shard:
            raise ValueError("a stage's muon needs whole weights: train.shard = false")
        if self.batch % self.chunk:
            raise ValueError(f"train.chunk must divide train.batch, got {self.chunk} and {self.batch}")

    @property
    def adapted(self) -> bool:
        """Whether a stage trains an adapter."""
        return any(p.startswith(("lora/", "(lora", ".*")) for stage in self.stages for p in stage.train)


def check_stage(stage: Stage, params: Tree) -> None:
    """Raise where a stage trains what does not exist or is frozen for good."""
    flat = flatten(params)
    try:
        hit = matching(list(flat), stage.train)
    except ValueError as e:
        raise ValueError(f"stage {stage.name}: {e}") from e
    if frozen_ := [n for n in hit if isinstance(flat[n], quant.FourBit)]:
        raise ValueError(f"stage {stage.name}: {frozen_[0]} has 4 bits and cannot be trained; train lora/... or set model.quantize='none'")
    if stage.muon and (low := [n for n in hit if flat[n].dtype != torch.float32]):
        raise ValueError(f"stage {stage.name}: muon needs whole float32 weights, {low[0]} is {flat[low[0]].dtype}; model.dtype = 'float32'")


def fit_stage(
    cfg: TrainConfig,
    stage: Stage,
    params: Tree,
    loss_sum: train.LossSum,
    batch_at: Callable[[int], Any],
    folder: Path,
    *,
    cut: Callable[[Any, slice], Any],
    validate: Callable[[Tree], float] | None = None,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Tree:
    """Train what the stage names, or go on with it in `folder`; returns all parameters.

    Args:
        loss_sum: (all parameters, micro-batch) -> sum of the token losses, their number, Aux.
        validate: all parameters -> validation loss; without it the last state is kept.
    """
    trained, frozen_ = split(params, stage.train)
    device = train.device(cfg.device)
    if cfg.shard:
        trained = shards.shard(trained, shards.mesh(device))
    log(f"stage {stage.name}: {stage.steps} steps train {count(trained):,} of {count(params):,} parameters")
    optimizer = optimizer_of(cfg, stage, trained, seed)
    step = train.make_step(gradient_of(cfg, lambda p, b: loss_sum(merge(frozen_, p), b), cut), optimizer, clip=cfg.clip, seed=seed)

    def scored(state: train.State) -> dict[str, float]:
        assert validate is not None
        loss = validate(merge(frozen_, state.params))
        return {"score": -loss, "loss": loss}

    state = train.fit(
        step,
        train.State(params=trained, opt=optimizer.init(trained)),
        batch_at,
        steps=stage.steps,
        folder=folder,
        every=train.Every(log=cfg.log, save=cfg.save, validate=cfg.validate),
        validate=scored if validate else None,
        log=lambda line: log("  " + "  ".join(f"{k} {v:.4g}" for k, v in line.items())),
    )
    if (cfg.keep == "best" and validate) or cfg.shard:
        train.meet()  # process 0 has written it
        state = train.read_state(folder / f"{cfg.keep if validate else 'last'}.pt", device)
    return merge(frozen_, state.params)


def read_stage(cfg: TrainConfig, params: Tree, folder: Path) -> Tree:
    """All parameters with those that `fit_stage` trained and kept in `folder`."""
    kept = cfg.keep if (folder / f"{cfg.keep}.pt").exists() else "last"  # a stage without validation has no best
    return merge(params, train.read_state(folder / f"{kept}.pt", train.device(cfg.device)).params)


def gradient_of(cfg: TrainConfig, loss_sum: train.LossSum, cut: Callable[[Any, slice], Any]) -> train.Grad:
    """The gradient of the mean token loss of a batch by what `loss_sum` takes."""
    return train.token_value_and_grad(loss_sum, chunk=cfg.chunk, cut=cut, rows=lambda b: len(b["ids"]))


def optimizer_of(cfg: TrainConfig, stage: Stage, trained: Tree, seed: int = 0) -> Optimizer:
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
        packing=eight_bit() if cfg.moments == "8bit" else None,
    )
    made = with_master(made) if low and cfg.rounding == "master" else made
    if not stage.muon:
        return made
    inner = {n for n, t in flatten(trained).items() if t.dim() > 1 and not re.search(r"(embed_tokens|lm_head|pos_embed)\.", n)}
    turned = muon(lambda name: Rate(lr=stage.muon, weight_decay=stage.weight_decay), warmup_cosine(stage.steps, stage.warmup))
    return routed(lambda n: "muon" if n in inner else "adamw", {"adamw": made, "muon": turned})


def memory_of(
    cfg: TrainConfig, stage: Stage, params: Tree, loss_sum: train.LossSum, cut: Callable[[Any, slice], Any], batch: Any, seed: int = 0
) -> dict[str, int]:
    """{part: bytes} at the peak of one training step, on parameters without storage (device "meta"). Shards count whole."""
    trained, frozen_ = split(params, stage.train)
    optimizer = optimizer_of(cfg, stage, trained, seed)
    grad = gradient_of(cfg, lambda p, b: loss_sum(merge(frozen_, p), b), cut)
    state = train.State(params=trained, opt=optimizer.init(trained))
    step = train.make_step(grad, optimizer, clip=cfg.clip, seed=seed)
    return estimate.peak_of(lambda: step(state, batch), {"frozen weights": frozen_, "trained weights": trained, "optimiser": state.opt})
