"""The record of slide_vqa: questions about whole slides of any number of patches, through a few tokens.

patch features -> frozen compressor -> k tokens -> projector -> in the place of placeholders -> language
model -> answer, and the map of where it came from.
"""

from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from medvl.base import config
from medvl.components.slots import CompressConfig
from medvl.language.chat import ChatConfig, ModelConfig, check_no_ocr
from medvl.language.system import check_quantized
from medvl.phantoms.slides import SlideConfig
from medvl.training.record import TrainConfig, language_training, refuse_settings, refuse_stage_batches
from medvl.weights.lora import LoraConfig


@frozen(kw_only=True)
class DataConfig:
    """Where slides, questions and labels are; `{folder}` stands for the folder.

    Questions are in any of the formats of `data/slide_questions`; features in any of `data/slides`, or a
    packed store.
    """

    source: Literal["files", "phantoms"] = "files"
    folder: str = "data/slides"
    phantoms: SlideConfig = SlideConfig()
    features: str = "{folder}/features"
    labels: str = "{folder}/labels.csv"  # of slides, for the pretraining of a compressor: columns slide, split, and the labels
    captions: str = "{folder}/captions.json"  # data "captions" of a stage
    questions: str = "{folder}/train.json"  # data "questions" of a stage
    valid: str = "{folder}/valid.json"
    test: str = "{folder}/test.csv"
    dims: int = 0  # of the features; 0 = as they are
    blind: bool = False  # a control: no slide is shown

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "data", dims=config.WIDTH_OR_NONE)
        inside: Any = dict.fromkeys(
            ("features", "labels", "captions", "questions", "valid", "test"), ("folder",)
        )
        config.check_patterns(self, "data", folder=(), **inside)


# A speed of the compressor's gate (moe): at the experts' rate it hardly moves, and what is rare stays a patch
# among thousands. Compressors without a gate leave it out.
GATE = "compressor/gate/.*"
_PRETRAINING: dict[str, Any] = {
    "batch": 8,
    "log": 50,
    "save": 200,
    "validate": 200,
    "valid": 0,
    "checkpoint": False,
    "stages": [
        {
            "name": "compressor",
            "steps": 1000,
            "lr": 1e-3,
            "weight_decay": 1e-4,
            "warmup": 50,
            "train": [".*"],
            "speeds": [{"match": GATE, "lr": 1e-2, "weight_decay": 1e-4}],
        }
    ],
}


def _check_pretraining(_record: Any, _field: Any, cfg: TrainConfig) -> None:
    where = "pretrain.train"
    if len(cfg.stages) != 1:
        raise ValueError(f"{where}.stages must hold one stage, got {len(cfg.stages)}")
    refuse_stage_batches(cfg, where)
    whole = "the slots are balanced over a whole batch of slides; leave it out"
    refuse_settings(cfg, where, whole, chunk=2)
    refuse_settings(
        cfg, where, "the compressor is small, and every process holds all of it; leave it out", shard=False
    )
    refuse_settings(cfg, where, "the compressor keeps all its activations; leave it out", checkpoint=False)
    refuse_settings(cfg, where, "all slides of the split valid are taken; leave it out", valid=0)
    refuse_settings(cfg, where, "is for language models; leave it out", logits=256, tokens=0, added="float32")
    refuse_settings(cfg, where, "train.device is that of the whole run; leave it out", device="auto")
    reason = "train.deterministic is that of the whole run; leave it out"
    refuse_settings(cfg, where, reason, deterministic=False)


@frozen(kw_only=True)
class PretrainConfig:
    """How a compressor learns what slides hold, from labels of whole slides; then it is frozen.

    `train` has one stage. It is kept in the folder "compressor", and its batch is of slides.
    """

    file: str = ""  # a trained one, in the reference's format; nothing is trained then
    labels: tuple[str, ...] = ()  # columns of data.labels
    # what reads the tokens: all of them, each in its place, or attention over them, as attention-MIL
    head: Literal["places", "attention"] = "places"
    most: int = 4096  # patches of a slide, evenly spread; 0 = all
    # weight of the balance of slots (moe); more of it and no slot is left free for what is rare
    aux: float = 0.01
    train: TrainConfig = config.table(
        config.structure(_PRETRAINING, TrainConfig), defaults=_PRETRAINING, check=_check_pretraining
    )

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "pretrain", most=config.COUNT_OR_NONE, aux=(0, 1e6))
        if len({*self.labels} - {"slide", "split"}) < len(self.labels):
            raise ValueError(
                "pretrain.labels: must be columns, each once and neither slide nor split, "
                f"got {', '.join(self.labels)}"
            )


def upgrade_pretraining(table: dict[str, Any]) -> dict[str, Any]:
    """A `pretrain` table as it is written now, of one from when it held steps and rates itself. What it
    trains, and how, is the same.

    Raises:
        ValueError: a table has both.
    """
    of_stage = ("steps", "lr", "weight_decay", "warmup")
    of_loop = ("batch", "log", "save", "validate")
    old = {*of_stage, *of_loop, "router_lr"} & table.keys()
    if not old:
        return table
    if "train" in table:
        raise ValueError(
            f"pretrain.{min(old)} is a setting of older records; with pretrain.train, give steps and rates "
            "as pretrain.train.stages.0.*, and batch and similar settings as pretrain.train.*"
        )
    stage: dict[str, Any] = {name: table[name] for name in of_stage if name in table}
    (default,) = _PRETRAINING["stages"]
    (gate,) = default["speeds"]
    gate_speed = {"lr": table.get("router_lr", gate["lr"])}
    # Older records had one weight decay, and the gate took it like all else.
    gate_speed["weight_decay"] = table.get("weight_decay", gate["weight_decay"])
    stage["speeds"] = [gate | gate_speed]
    train = {name: table[name] for name in of_loop if name in table} | {"stages": [stage]}
    return {name: value for name, value in table.items() if name not in old} | {"train": train}


@frozen(kw_only=True)
class EvaluateConfig:
    """Multiple choice by the letter that is written, or by the likeliest; open questions by BLEU and ROUGE-L."""

    by: Literal["text", "likelihood"] = "text"
    max_tokens: int = 64
    batch: int = 16
    bootstrap: int = 1000
    shuffled: bool = (
        False  # a control: ask everything again about another slide; what is right then was not seen
    )

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "evaluate", max_tokens=(1, 2**20), batch=(1, 2**20), bootstrap=config.DRAWS)


@frozen(kw_only=True)
class Config:
    """A slide_vqa experiment."""

    system: Literal["slide_vqa"]
    about: str = ""
    seed: int = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()
    compress: CompressConfig = CompressConfig()
    pretrain: PretrainConfig = config.table(PretrainConfig(), upgrade=upgrade_pretraining)
    hidden: int = 2048  # width inside the projector
    projector: str = ""  # a trained one, in the reference's format
    cold: bool = (
        False  # let questions be trained although no stage before trains captions and no projector is given
    )
    lora: LoraConfig = config.subrecord(LoraConfig(pattern="all-linear"))
    train: TrainConfig = language_training()
    evaluate: EvaluateConfig = field(default=EvaluateConfig())

    def __attrs_post_init__(self) -> None:
        if bool(self.pretrain.file) == bool(self.pretrain.labels):
            raise ValueError(
                "pretrain needs either a file (a trained compressor) or labels (columns to train one on)"
            )
        if self.pretrain.file and self.compress.kind != "moe":
            raise ValueError(
                f"pretrain.file is always of kind moe, got compress.kind {self.compress.kind!r}; train that "
                "one on labels"
            )
        config.check_bounds(self, "experiment", seed=config.SEED, hidden=config.WIDTH)
        check_no_ocr(self.chat, "slide_vqa")
        if wrong := [s.name for s in self.train.stages if s.data not in ("captions", "questions")]:
            raise ValueError(f'stage {wrong[0]}: data must be "captions" or "questions"')
        first = next((i for i, s in enumerate(self.train.stages) if s.data == "questions"), None)
        # Captions align the projector before the language model moves, as in the two stages of LLaVA (Liu et
        # al. 2023, arXiv:2304.08485).
        warm = first is None or self.projector or any(s.data == "captions" for s in self.train.stages[:first])
        if not warm and not self.cold:
            raise ValueError(
                "questions would be trained with a projector that has seen no captions: put a stage with "
                'data = "captions" before, give projector, or set cold = true'
            )
        check_quantized(self.model, self.train, "train projector/... and lora/...")


def data_folder(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; slides drawn by one record share one."""
    if cfg.data.source == "phantoms":
        return Path(cfg.data.folder) / f"slides-{config.record_digest(cfg.data.phantoms)}"
    return Path(cfg.data.folder)


def data_path(cfg: Config, name: str) -> Path:
    """Where a file of the data is: "features", "labels", "captions", "questions", "valid" or "test"."""
    pattern = getattr(cfg.data, name)
    return Path(config.fill_pattern(pattern, f"data.{name}", folder=data_folder(cfg)))
