"""The record of unified: one model that understands images and draws them, trained in stages.

image -> CLIP's tower at a level of the task -> projector of the task -> in the place of placeholders -> language
model with the H-LoRA of the task -> an answer, or the codes of a picture -> VQ model -> the picture.
"""

import re
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from medvl.base import config
from medvl.base.text import few
from medvl.language.chat import ChatConfig, ModelConfig, check_no_ocr
from medvl.language.system import check_quantized
from medvl.phantoms.anatomy import AnatomyConfig
from medvl.systems.unified.codes import VqTraining
from medvl.training.record import TrainConfig, language_training
from medvl.weights.lora import LoraConfig

CLIP = "openai/clip-vit-large-patch14-336"
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@frozen(kw_only=True)
class TowerConfig:
    """CLIP's vision tower: a hub name or folder, or without a name a config that is built from scratch."""

    name: str = CLIP
    config: dict[str, Any] = field(factory=dict)  # of a clip_vision_model; goes with name = ""

    def __attrs_post_init__(self) -> None:
        if bool(self.name) == bool(self.config):
            raise ValueError(
                'tower must have either a name (hub or folder) or, with name = "", a config to build from scratch'
            )


@frozen(kw_only=True)
class TaskConfig:
    """What a task has of its own."""

    level: int  # of the tower's hidden states: 1 = of its first layer, -2 = of the last but one
    lora: LoraConfig
    # A plugin that it is trained further from, a folder or a name on the hub; its rows and token tables become the
    # run's. "" = from a new adapter and projector.
    start: str = ""

    def __attrs_post_init__(self) -> None:
        lora = self.lora
        if lora.rslora or lora.rank_pattern or lora.alpha_pattern:
            raise ValueError(
                "lora of a plugin has one rank and one scale, alpha / rank, for all layers: leave rslora, "
                "rank_pattern and alpha_pattern out"
            )


def _task(level: int, rank: int) -> Any:
    # Of M3, the smallest model that was published.
    lora = LoraConfig(rank=rank, alpha=2.0 * rank, experts=4, dropout=0.05, pattern="all-linear")
    return config.subrecord(TaskConfig(level=level, lora=lora))


@frozen(kw_only=True)
class Source:
    """Files of one kind of data. `{folder}`, `{name}` and `{split}` stand for data.folder, name and split."""

    name: str
    task: Literal["understand", "draw"]
    # Conversations (see `read_conversations`), or of drawings those of `read_drawings`.
    path: str = "{folder}/{name}/{split}.jsonl"
    root: str = ""  # where relative image names start; "" = the folder of the file
    splits: tuple[Split, ...] = SPLITS  # that are there
    stages: tuple[str, ...] = ()  # names of those that are trained on it; () = all
    share: float = 1.0  # of its training samples that stages with data = "mixed" see, drawn by the seed

    def __attrs_post_init__(self) -> None:
        config.check_patterns(self, f"data source {self.name}", path=("folder", "name", "split"), root=())
        config.check_bounds(self, f"data source {self.name}", share=config.SHARE)


@frozen(kw_only=True)
class DataConfig:
    """Where conversations and drawings are."""

    source: Literal["files", "phantoms"] = "files"
    folder: str = "data/unified"
    phantoms: AnatomyConfig = (
        AnatomyConfig()
    )  # drawn heads, in a folder of their own that {folder} stands for
    sources: tuple[Source, ...] = (
        Source(name="questions", task="understand", path="{folder}/{split}.jsonl"),
        Source(name="drawings", task="draw", path="{folder}/{split}_draw.jsonl"),
    )


@frozen(kw_only=True)
class EvaluateConfig:
    """Answers by greedy decoding; pictures drawn at a temperature, 0 = the likeliest code each time."""

    max_tokens: int = 64
    batch: int = 8
    drawings: int = 0  # of the test splits of all sources, drawn by the seed; 0 = all
    temperature: float = 0.0  # of pictures from an image
    # Of pictures from a text alone. Many are right, and the likeliest codes show only what all of them have.
    text_temperature: float = 1.0
    bootstrap: int = 1000

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "evaluate", max_tokens=(1, 2**20), batch=(1, 2**20), bootstrap=config.DRAWS)
        config.check_bounds(self, "evaluate", drawings=config.COUNT_OR_NONE)
        config.check_bounds(self, "evaluate", temperature=(0, 100), text_temperature=(0, 100))


@frozen(kw_only=True)
class Config:
    """A unified experiment."""

    system: Literal["unified"]
    about: str = ""
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    chat: ChatConfig = ChatConfig()
    tower: TowerConfig = TowerConfig()
    codes: str = ""  # folder of the VQ model whose codes are drawn; "" = none, or the one that `vq` trains
    vq: VqTraining | None = None  # a VQ model that is trained first, on the pictures that are drawn
    understand: TaskConfig = _task(-2, 64)
    draw: TaskConfig = _task(1, 256)
    shared: LoraConfig | None = None  # one adapter, lora/..., for both tasks in place of theirs
    train: TrainConfig = language_training()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "experiment", seed=config.SEED)
        check_no_ocr(self.chat, "unified")
        check_quantized(self.model, self.train, "train understand/..., draw/... and rows/...")
        stages = [stage.name for stage in self.train.stages]
        for where, names in (
            ("train.stages", stages),
            ("data.sources", [source.name for source in self.data.sources]),
        ):
            if len({*names}) < len(names):
                raise ValueError(f"{where} must have names of their own, got {names}")
        for source in self.data.sources:
            if unknown := {*source.stages} - {*stages}:
                raise ValueError(
                    f"data source {source.name}: stages must be names of train.stages, found {few(sorted(unknown))}"
                )
        for stage in self.train.stages:
            if stage.data not in ("understand", "draw", "mixed"):
                raise ValueError(
                    f'stage {stage.name}: data must be "understand", "draw" or "mixed", got {stage.data!r}'
                )
            # Each process has its own mixture: one would gather the weights of a task while others gather another's.
            if stage.data == "mixed" and self.train.shard:
                raise ValueError(
                    f'stage {stage.name}: data = "mixed" needs whole weights on every process: train.shard = false'
                )
            missing = [task for task in stage_tasks(stage.data) if task not in self.tasks]
            if missing:
                raise ValueError(f"stage {stage.name}: data.sources must have one of task {missing[0]!r}")
        if ("draw" in self.tasks) != bool(self.codes or self.vq) or (self.codes and self.vq):
            raise ValueError(
                "to draw needs either codes (the folder of a VQ model) or vq (to train one), and what does not draw "
                f"neither; got codes {self.codes!r} and {'a' if self.vq else 'no'} table vq"
            )
        if self.shared and (self.understand.start or self.draw.start):
            raise ValueError("shared: plugins bring adapters of their own: leave shared or their start out")
        drawn = [stage for stage in self.train.stages if stage.data != "understand"]
        if (
            drawn
            and not self.draw.start
            and not any(re.fullmatch(pattern, "rows/head") for pattern in drawn[0].train)
        ):
            raise ValueError(
                f"stage {drawn[0].name}: must train the rows of the image codes (rows/.*): they start alike, and "
                "identical frozen rows give every code the same probability, so that the loss of 8,192 codes cannot "
                "fall below ln 8192 = 9.01"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that there is data for."""
        tasks = {source.task for source in self.data.sources}
        return tuple(task for task in ("understand", "draw") if task in tasks)

    def task(self, name: str) -> TaskConfig:
        """The record of a task."""
        return self.understand if name == "understand" else self.draw

    def adapter(self, task: str) -> tuple[str, LoraConfig]:
        """Where the adapter of a task is among the parameters, and its record."""
        return ("lora", self.shared) if self.shared else (f"{task}/lora", self.task(task).lora)


def stage_tasks(data: str) -> tuple[str, ...]:
    """The tasks of a stage's data."""
    return ("understand", "draw") if data == "mixed" else (data,)


def source_path(cfg: Config, source: Source, split: str) -> Path:
    """The file of a split of a source."""
    where, folder = f"data source {source.name}", data_folder(cfg)
    return Path(config.fill_pattern(source.path, where, folder=folder, name=source.name, split=split))


def data_folder(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; heads drawn by one record share one."""
    if cfg.data.source == "phantoms":
        return Path(cfg.data.folder) / f"anatomy-{config.record_digest(cfg.data.phantoms)}"
    return Path(cfg.data.folder)
