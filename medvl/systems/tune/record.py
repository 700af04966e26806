"""tune: a language or vision-language model adapted to conversations, by LoRA, H-LoRA, QLoRA or as a whole.

images -> patches -> tower -> visual tokens in the place of placeholders -> language model -> the answers' tokens, which alone are trained.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from attrs import evolve, frozen
from torch import Generator, Tensor

from medvl.base import config
from medvl.base.tree import Tree
from medvl.hub import skeletons
from medvl.language.chat import Chat, ChatConfig, ModelConfig, loss_sum, open_chat, tokenizer_of
from medvl.phantoms.pictures import PictureConfig
from medvl.training import gradients
from medvl.training.record import TrainConfig
from medvl.training.stages import check_trainable, init_trained_adapter
from medvl.weights import lora, shards
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
    chat: ChatConfig = (
        ChatConfig()
    )  # a conversation whose answers do not fit its context is left out and counted
    lora: LoraConfig = config.subrecord(LoraConfig(pattern="all-linear"))
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "experiment", seed=config.SEED)
        if any(stage.muon for stage in self.train.stages) and self.model.dtype != "float32":
            raise ValueError("a stage's muon needs whole float32 weights: model.dtype = 'float32'")
        if self.model.quantize != "none" and all(p.startswith("model/") for p in self.train.patterns):
            raise ValueError(
                f"model.quantize {self.model.quantize!r} freezes the model; a stage must train lora/..."
            )


@frozen(kw_only=True, eq=False)
class Model:
    """Everything of a tuned model that is not a weight."""

    cfg: Config
    chat: Chat
    adapter: lora.Adapter | None  # names, kinds and scales; the factors are in the params


def init(
    cfg: Config, folder: Path, texts: Sequence[str] = (), *, device: torch.device = torch.device("cpu")
) -> tuple[Model, Tree]:
    """The model and starting weights {"model": {name: weight}, "lora": factors}.

    Args:
        folder: of the run; a tokenizer trained on `texts` is kept there and taken from there the next time.
        device: where the weights are; "meta" makes none, for an estimate.
    """
    gen = Generator().manual_seed(cfg.seed)
    tok = tokenizer_of(cfg.model, folder, texts)
    chat, params = open_chat(cfg.model, cfg.chat, tok, gen, device=device, shard=cfg.train.shard)
    adapter = init_trained_adapter(cfg.train, cfg.lora, chat.skeleton, gen, device)
    tree: Tree = {"model": params} | ({"lora": adapter.factors} if adapter else {})
    for stage in cfg.train.stages:
        check_trainable(stage, tree)
    return Model(cfg=cfg, chat=chat, adapter=adapter), tree


def weights_of(model: Model, params: Tree, *, train: bool = False) -> dict[str, Tensor]:
    """The weights that the skeleton is called with: shards to be gathered, the adapter on them."""
    base = shards.lazy_shards(params["model"])
    if model.adapter is None:
        return base
    return lora.apply_lora(base, evolve(model.adapter, factors=params["lora"]), train=train)


def loss_of(model: Model) -> Callable[[Tree, dict[str, Tensor]], tuple[Tensor, Tensor, gradients.Aux]]:
    """(all parameters, batch) -> sum of the losses of its trained tokens, and their number."""
    cfg = model.cfg.train
    skeleton = skeletons.checkpointed(model.chat.skeleton) if cfg.checkpoint else model.chat.skeleton
    return lambda p, batch: (
        *loss_sum(model.chat, skeleton, weights_of(model, p, train=True), batch, logits=cfg.logits),
        gradients.Aux(),
    )
