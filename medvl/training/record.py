"""The record of training: stages, and the loop that trains them."""

from typing import Any, Literal

from attrs import frozen

from medvl.base import config, files


@frozen(kw_only=True)
class Stage:
    """What is trained, how long and how fast. Names start with "model/", "lora/" or what else the system has; there is an adapter where a
    stage's pattern matches one of its names."""

    name: str
    steps: int = 0
    epochs: float = 0.0  # instead of steps: how often each conversation is trained on; how many steps that is, the data says
    lr: float
    data: str = ""  # which of the system's data, where it has several
    weight_decay: float = 0.0
    warmup: int = 0
    muon: float = 0.0  # rate of Muon for the matrices inside layers, 0 = AdamW moves them too; worth it for models from scratch
    train: tuple[str, ...] = ("lora/.*",)

    def __attrs_post_init__(self) -> None:
        check_stage(self)
        config.check_bounds(self, f"stage {self.name}", epochs=(0, 10**6))
        if self.steps and self.epochs:
            raise ValueError(
                f"stage {self.name}: needs either steps or epochs, got {self.steps} and {self.epochs:g}"
            )
        config.check_bounds(self, f"stage {self.name}", muon=config.RATE)
        if self.lr + self.muon <= 0:
            raise ValueError(f"stage {self.name}: lr must be above 0, got {self.lr:g}")


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
        if self.moments == "8bit" and self.shard:
            raise ValueError(
                "train.moments = '8bit' needs whole weights: train.shard = false, or moments = 'float32'"
            )
        config.check_bounds(
            self,
            "train",
            batch=(1, 2**20),
            chunk=(1, 2**20),
            logits=(1, 2**20),
            clip=(0, 1e6),
            valid=config.COUNT_OR_NONE,
        )
        config.check_bounds(
            self, "train", log=config.COUNT_OR_NONE, save=config.COUNT_OR_NONE, validate=config.COUNT_OR_NONE
        )
        if self.batch % self.chunk:
            raise ValueError(f"train.chunk must divide train.batch, got {self.chunk} and {self.batch}")

    @property
    def patterns(self) -> tuple[str, ...]:
        """What all stages train, as regexes over parameter names."""
        return tuple(p for stage in self.stages for p in stage.train)


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
    config.check_bounds(stage, where, steps=config.COUNT_OR_NONE if in_epochs else config.COUNT)
    config.check_bounds(stage, where, lr=config.RATE, weight_decay=config.RATE, warmup=config.COUNT_OR_NONE)
    if stage.warmup > stage.steps and not in_epochs:
        raise ValueError(f"{where}: warmup must lie within its {stage.steps} steps, got {stage.warmup}")
    if not stage.train:
        raise ValueError(f"{where}: train must name parameters, such as lora/.* or .*")
    config.check_regexes(stage.train, where)
