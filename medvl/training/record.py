"""The record of training: stages, the speeds of their parameters, and the loop, alike in every system.

Systems differ in defaults only: a field made by `language_training` or `config.table(..., defaults=...)`
says them.
"""

from typing import Any, Literal

import attrs
from attrs import evolve, frozen

from medvl.base import config, files

# A name for `Speed.match`: the matrices inside layers, which Muon is made for. Embeddings, output layer
# and positions are matrices too, but each row of theirs is a vector of its own.
MATRICES = "matrices"
# A negative lookahead, since a regex has no "all but".
_INSIDE_LAYERS = r"(?!.*(embed_tokens|lm_head|pos_embed)\.).*"


@frozen(kw_only=True)
class Speed:
    """Another rate or optimiser for some of the parameters that a stage trains.

    `match` is a regex over their names, or "matrices": all that have two axes or more, but embeddings,
    the output layer and positions. "muon" moves only matrices among those that match, so a regex may name
    whole blocks.
    """

    match: str
    lr: float
    weight_decay: float
    optimizer: Literal["adamw", "muon"] = "adamw"

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, f"speeds {self.match}", lr=config.RATE, weight_decay=config.RATE)
        config.check_regexes([self.match], "speeds")

    @property
    def pattern(self) -> str:
        """The regex over parameter names."""
        return _INSIDE_LAYERS if self.match == MATRICES else self.match

    @property
    def matrices_only(self) -> bool:
        """Whether vectors that match keep the stage's own speed."""
        return self.optimizer == "muon" or self.match == MATRICES


@frozen(kw_only=True)
class Stage:
    """What is trained, how long and how fast; steps are optimiser steps.

    In a language system names start with "model/", "lora/" or what else the system has, and there is an
    adapter where a stage's pattern matches one of its names.
    """

    name: str  # also that of its folder
    steps: int = 0
    epochs: float = (
        0.0  # instead of steps: how often each sample is trained on; the data gives the number of steps
    )
    lr: float
    data: str = ""  # which of the system's data, where it has several
    batch: int = 0  # of a language system: conversations of a batch, 0 = train.batch
    weight_decay: float = 0.0
    warmup: int = 0  # steps
    train: tuple[str, ...] = ("lora/.*",)  # regexes over parameter names
    speeds: tuple[Speed, ...] = ()  # a later one wins over an earlier one

    def __attrs_post_init__(self) -> None:
        files.check_name(self.name, "stage")
        title = f"stage {self.name}"
        config.check_bounds(self, title, steps=config.COUNT if not self.epochs > 0 else config.COUNT_OR_NONE)
        config.check_bounds(
            self, title, lr=config.RATE, weight_decay=config.RATE, warmup=config.COUNT_OR_NONE
        )
        # With epochs the number of steps, and so whether the warm-up is shorter, is known when the data
        # is read.
        if self.warmup > self.steps and not self.epochs > 0:
            raise ValueError(f"{title}: warmup must lie within its {self.steps} steps, got {self.warmup}")
        if not self.train:
            raise ValueError(f"{title}: train must name parameters, such as lora/.* or .*")
        config.check_regexes(self.train, title)
        config.check_bounds(self, title, epochs=(0, 10**6), batch=(0, 2**20))
        if self.steps and self.epochs:
            raise ValueError(f"{title}: needs either steps or epochs, got {self.steps} and {self.epochs:g}")
        # The stage's own rate may be 0 where its speeds move something.
        if self.lr + sum(speed.lr for speed in self.speeds) <= 0:
            raise ValueError(f"{title}: lr must be above 0, got {self.lr:g}")

    @property
    def has_muon(self) -> bool:
        """Whether Muon moves some of its parameters."""
        return any(speed.optimizer == "muon" for speed in self.speeds)


@frozen(kw_only=True)
class TrainConfig:
    """The loop. The loss is that of `batch` samples; `chunk` of them are computed at a time, which only
    bounds memory.

    A language system's loss is the mean over all trained tokens of the batch.
    """

    stages: tuple[Stage, ...]
    batch: int = 16
    chunk: int = 2
    # Language systems: instead of `chunk`, at most so many tokens with padding are computed at a time; 0 = off.
    tokens: int = 0
    packing: bool = False  # with `tokens`: several conversations lie in one row, apart from each other
    logits: int = 256  # language systems: tokens whose logits exist at a time
    checkpoint: bool = True  # keep only the layers' inputs for the backward pass
    precision: Literal["float32", "bfloat16"] = "float32"  # "bfloat16" = mixed, by autocast
    # Language systems: dtype of what is trained beside the model, adapter and projector; "model" = the model's.
    # In a bfloat16 model float32 factors make every product of an adapter a float32 one.
    added: Literal["float32", "model"] = "float32"
    rounding: Literal["master", "stochastic", "nearest"] = "master"  # of 16-bit weights that are trained
    moments: Literal["float32", "8bit"] = "float32"
    shard: bool = False  # matrices that are trained lie in parts on all processes
    clip: float = 1.0  # upper bound of the gradient's norm, 0 = none
    # AdamW's defaults of torch; those of `optim.adamw` are CLIP's.
    beta2: float = 0.999  # of AdamW: how slowly the mean square of a gradient is forgotten
    eps: float = 1e-8  # of AdamW
    log: int = 10  # steps from one to the next; also of `save` and `validate`
    tensorboard: bool = False  # write what `metrics.jsonl` has for TensorBoard, too
    save: int = 100
    validate: int = 200
    valid: int = 256  # samples the validation loss is taken over, 0 = all
    patience: int = 0  # a stage ends after so many validations without a better score, 0 = never
    keep: Literal["best", "last"] = "best"  # by validation score
    keep_last: int = 1  # states on disk besides the best: the last one, or so many in `step-*.pt`
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # the same bits from every run on a GPU, too; slower

    def __attrs_post_init__(self) -> None:
        if not self.stages:
            raise ValueError("train.stages must hold at least one stage")
        if any(stage.has_muon for stage in self.stages) and self.shard:
            raise ValueError("a stage's muon needs whole weights: train.shard = false")
        if self.moments == "8bit" and self.shard:
            raise ValueError(
                "train.moments = '8bit' needs whole weights: train.shard = false, or moments = 'float32'"
            )
        size = (1, 2**20)
        every = config.COUNT_OR_NONE
        config.check_bounds(self, "train", batch=size, chunk=size, logits=size, clip=(0, 1e6), valid=every)
        config.check_bounds(self, "train", log=every, save=every, validate=every)
        # At beta2 = 1 the bias correction 1 - beta2**t would be 0.
        config.check_bounds(
            self, "train", beta2=(0, 0.999999), eps=(0, 1), patience=every, keep_last=(0, 1000)
        )
        config.check_bounds(self, "train", tokens=(0, 2**24))
        if self.packing and not self.tokens:
            raise ValueError(
                "train.packing fills micro-batches of train.tokens: set it to the number of tokens that fit the "
                "memory, such as 4096, got 0"
            )
        if self.patience and not self.validate:
            raise ValueError("train.patience counts validations: train.validate must be above 0, got 0")

    @property
    def patterns(self) -> tuple[str, ...]:
        """What all stages train, as regexes over parameter names."""
        return tuple(pattern for stage in self.stages for pattern in stage.train)


def language_training(default: Any = attrs.NOTHING) -> Any:
    """The field of a language system's record that holds a `TrainConfig`; its defaults are those of the
    class."""
    return config.table(default, upgrade=upgrade_training, check=_check_micro_batches)


def _check_micro_batches(_record: Any, _field: Any, cfg: TrainConfig | None) -> None:
    """Micro-batches are of one size: processes that gather each other's weights take as many steps."""
    # Micro-batches by tokens are dealt out so that every process has as many.
    if cfg is None or cfg.tokens:
        return
    for size in (cfg.batch, *(stage.batch for stage in cfg.stages)):
        if size % cfg.chunk:
            raise ValueError(f"train.chunk must divide train.batch, got {cfg.chunk} and {size}")


def upgrade_training(table: dict[str, Any]) -> dict[str, Any]:
    """A `train` table as it is written now, of one that was written when a stage's `muon = RATE` meant
    `speeds` of the matrices inside layers. What it trains, and how, is the same."""
    # What is no list of tables is refused later, with its place.
    if not isinstance(table.get("stages"), list):
        return table
    return table | {"stages": [_upgrade_stage(stage) for stage in table["stages"]]}


def _upgrade_stage(stage: Any) -> Any:
    if not isinstance(stage, dict) or "muon" not in stage:
        return stage
    stage = dict(stage)
    rate = stage.pop("muon")
    # 0 meant that AdamW moves everything. The decay was the stage's own.
    if rate == 0:
        return stage
    muon = {
        "match": MATRICES,
        "lr": rate,
        "weight_decay": stage.get("weight_decay", 0.0),
        "optimizer": "muon",
    }
    speeds = stage.get("speeds", [])
    # What is no list is left for the check of the record, which says where it stands.
    return stage | {"speeds": [muon, *speeds] if isinstance(speeds, list | tuple) else speeds}


def refuse_settings(cfg: TrainConfig, table: str, reason: str, **defaults: Any) -> None:
    """Raise where a setting that a system has no use for differs from its default there."""
    for name, default in defaults.items():
        if getattr(cfg, name) != default:
            raise ValueError(f"{table}.{name} = {getattr(cfg, name)!r}: {reason}")


def stage_training(cfg: TrainConfig, stage: Stage) -> TrainConfig:
    """The loop of a stage, with its own size of batch where it has one."""
    return evolve(cfg, batch=stage.batch) if stage.batch else cfg


def refuse_stage_batches(cfg: TrainConfig, where: str) -> None:
    """Raise where a stage has a size of batch of its own, in a system that knows one for all."""
    if own := [stage.name for stage in cfg.stages if stage.batch]:
        raise ValueError(f"{where}: stage {own[0]}: batch is for language systems; set {where}.batch")


def training_tables(cfg: Any) -> list[TrainConfig]:
    """The tables of a system's record that train something; most have one, `train`."""
    tables = [getattr(cfg, field.name) for field in attrs.fields(type(cfg))]
    return [table for table in tables if isinstance(table, TrainConfig)]


def plan_steps(cfg: TrainConfig, stage: Stage, samples: int) -> Stage:
    """The stage in steps, where its record gives epochs; of so many samples.

    Raises:
        ValueError: its warm-up is longer.
    """
    if not stage.epochs:
        return stage
    return evolve(stage, steps=max(1, round(stage.epochs * samples / (stage.batch or cfg.batch))), epochs=0.0)
