"""tune: a language or vision-language model adapted to conversations, by LoRA, H-LoRA, QLoRA or as a whole.

images -> patches -> vision encoder -> visual tokens in the place of placeholders -> language model -> the
tokens of the answers, which alone are trained.
"""

from typing import Any, Literal

from attrs import frozen

from medvl.base import config
from medvl.language.chat import ChatConfig, ModelConfig
from medvl.language.system import check_quantized
from medvl.phantoms.pictures import PictureConfig
from medvl.training.record import TrainConfig, language_training
from medvl.weights.lora import LoraConfig


@frozen(kw_only=True)
class DataConfig:
    """Where conversations are; `{split}` stands for train, valid and test, `{folder}` for the folder."""

    source: Literal["files", "phantoms"] = "files"
    folder: str = "data/conversations"
    phantoms: PictureConfig = PictureConfig()
    conversations: str = "{folder}/{split}.jsonl"
    root: str = ""  # where relative image names start; "" = the folder of the JSONL

    def __attrs_post_init__(self) -> None:
        config.check_patterns(self, "data", folder=(), root=(), conversations=("folder", "split"))

    @property
    def drawn(self) -> PictureConfig | None:
        """What is drawn, None where files are read."""
        return self.phantoms if self.source == "phantoms" else None


@frozen(kw_only=True)
class EvaluateConfig:
    """Answers to the last question of each test conversation, by greedy decoding."""

    max_tokens: int = 64
    batch: int = 8
    bootstrap: int = 1000

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "evaluate", max_tokens=(1, 2**20), batch=(1, 2**20), bootstrap=config.DRAWS)


@frozen(kw_only=True)
class Config:
    """A tune experiment."""

    system: Literal["tune"]
    about: str = ""
    seed: int = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()  # a conversation longer than its context is left out and counted
    # All linear layers, as in QLoRA: with fewer of them LoRA stays behind full fine-tuning (Dettmers et al.
    # 2023, arXiv:2305.14314).
    lora: LoraConfig = config.subrecord(LoraConfig(pattern="all-linear"))
    train: TrainConfig = language_training()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __attrs_post_init__(self) -> None:
        check_tuning(self)


def check_tuning(cfg: Any) -> None:
    """Check what the parts of a record demand of each other, before a model is loaded; `stages.check_trainable` asks
    the loaded weights themselves.

    Raises:
        ValueError: a seed that is none; muon for weights that are not float32; stages that train quantised weights.
    """
    config.check_bounds(cfg, "experiment", seed=config.SEED)
    if any(stage.has_muon for stage in cfg.train.stages) and cfg.model.dtype != "float32":
        raise ValueError("a stage's muon needs whole float32 weights: model.dtype = 'float32'")
    check_quantized(cfg.model, cfg.train, "a stage must train lora/...")
