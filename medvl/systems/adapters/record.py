"""adapters: one model and many adapters; each question, with its images, gets those that are most like it.

text + images -> embedding -> nearest adapters and weights -> one pass over the batch, every row with its own
mixture -> answers.
"""

from pathlib import Path
from typing import Literal

import torch
from attrs import evolve, field, frozen
from torch import Generator

from medvl.adapters import experts, registry
from medvl.adapters.embed_config import EmbedConfig
from medvl.adapters.embedders import check_embedder
from medvl.adapters.experts import MODES, Experts, FusionConfig, HoldConfig, Mode
from medvl.adapters.retrieve import MOST, RetrieveConfig
from medvl.adapters.retriever_config import RetrieverConfig
from medvl.base import config
from medvl.base.tree import Tree
from medvl.language.chat import Chat, ChatConfig, ModelConfig, check_no_ocr, open_chat, tokenizer_of
from medvl.phantoms.modalities import ModalityConfig
from medvl.training.record import TrainConfig, language_training
from medvl.training.stages import cast_added, check_trainable
from medvl.weights import lora
from medvl.weights.lora import LoraConfig


@frozen(kw_only=True)
class DataConfig:
    """Where conversations are; `{folder}` stands for the folder, `{split}` for train, valid and test,
    `{task}`, if it is there, for the
    task: the adapter that a conversation belongs to. Without it each line says its task."""

    source: Literal["files", "phantoms", "vqa_rad"] = "files"
    folder: str = "data/adapters"
    conversations: str = "{folder}/{split}.jsonl"
    general: str = ""  # conversations that the base model is trained on, e.g. "{folder}/base_{split}.jsonl"; "" = those of all tasks
    root: str = ""  # where relative image names start; "" = the folder of the JSONL
    task: str = "task"  # key of a line
    category: str = "category"  # key of a line: a group of similar tasks, may be missing
    phantoms: ModalityConfig = ModalityConfig()
    vqa_rad: str = ""  # the folder of VQA-RAD as it is published
    group: Literal["organ", "modality"] = "organ"  # VQA-RAD's tasks

    def __attrs_post_init__(self) -> None:
        config.check_patterns(self, "data", folder=(), root=(), vqa_rad=(), general=("folder", "split"))
        config.check_patterns(self, "data", conversations=("folder", "split", "task"))


@frozen(kw_only=True)
class PoolConfig:
    """Where the adapters come from."""

    registry: str = (
        ""  # a registry that is there; "" = an adapter is trained for each task, and a registry made of them
    )
    root: str = ""  # where the registry's relative paths start; "" = as it says, or at its folder
    samples: int = 20  # training samples that an adapter's vector is the mean of
    hold: HoldConfig = HoldConfig()

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "pool", samples=config.COUNT)


@frozen(kw_only=True)
class EvaluateConfig:
    """Greedy answers to every turn of the assistant in the test conversations, in each mode, in and out of
    domain.

    Out of domain the adapter of a conversation's own task must not be chosen. "bare" and "oracle" are the
    same in both.
    """

    modes: tuple[Mode, ...] = MODES
    domains: tuple[Literal["in", "out"], ...] = ("in", "out")
    recall: tuple[int, ...] = (1, 3, 5)
    by_k: tuple[int, ...] = ()  # mixtures of so many adapters are scored, too
    history: Literal["given", "own"] = (
        "given"  # what stands before a later turn: the written answers, or the model's own
    )
    per: Literal["turn", "episode"] = (
        "turn"  # adapters are chosen for each question, or by the first of its episode
    )
    rule: Literal["strict", "tfidf"] = (
        "strict"  # "tfidf": that of the reference; it takes opposites for equal
    )
    max_tokens: int = 64
    batch: int = 8
    bootstrap: int = 1000
    limit: int = 0  # test conversations of each task, 0 = all

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "evaluate", max_tokens=(1, 2**20), batch=(1, 2**20), bootstrap=config.DRAWS)
        config.check_bounds(self, "evaluate", limit=config.COUNT_OR_NONE, recall=(1, 2**20), by_k=(1, MOST))
        if not self.modes or not self.domains:
            raise ValueError("evaluate needs modes and domains")


@frozen(kw_only=True)
class Config:
    """An adapters experiment."""

    system: Literal["adapters"]
    about: str = ""
    seed: int = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()
    # stages that make the base model, on general conversations; None = it is used as it is
    base: TrainConfig | None = language_training(None)
    lora: LoraConfig = config.subrecord(LoraConfig(pattern="all-linear", vision=True))
    train: TrainConfig | None = language_training(None)  # stages of each task's adapter
    pool: PoolConfig = PoolConfig()
    embed: EmbedConfig = EmbedConfig()
    retriever: RetrieverConfig = RetrieverConfig(
        kind="none"
    )  # a map on the embeddings that brings samples of a task together
    retrieve: RetrieveConfig = RetrieveConfig()
    fusion: FusionConfig = FusionConfig()
    evaluate: EvaluateConfig = field(default=EvaluateConfig())

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "experiment", seed=config.SEED)
        check_no_ocr(self.chat, "adapters")
        if bool(self.pool.registry) == bool(self.train):
            raise ValueError(
                "either pool.registry names existing adapters, or [train] says how each task's is trained"
            )
        if self.base is not None and any(p.startswith("lora/") for p in self.base.patterns):
            raise ValueError('base.stages train the model itself: names must start with "model/"')
        if self.train is not None and not all(p.startswith("lora/") for p in self.train.patterns):
            raise ValueError('train.stages train adapters: names must start with "lora/"')
        if self.base is not None and self.pool.registry:
            raise ValueError(
                "adapters of a registry belong to the model they were trained on: leave [base] out"
            )
        if self.evaluate.history == "own" and self.evaluate.per == "turn":
            raise ValueError(
                'evaluate.history = "own" goes with evaluate.per = "episode": later questions depend on the answers'
            )

    @property
    def trained(self) -> bool:
        """Whether there is anything to train; if not, it can be evaluated at once."""
        return self.base is not None or self.train is not None


@frozen(kw_only=True, eq=False)
class Model:
    """A base model, and the registry of its adapters."""

    cfg: Config
    chat: Chat
    registry: Path


def init(
    cfg: Config, folder: Path, texts: list[str], *, device: torch.device = torch.device("cpu")
) -> tuple[Model, Tree]:
    """The base model and its starting weights {"model": {name: weight}}.

    Args:
        folder: of the run; a tokenizer trained on `texts` is kept there and taken from there the next time.
    """
    if cfg.pool.registry:
        _check_registry(cfg)
    gen = Generator().manual_seed(cfg.seed)
    tok = tokenizer_of(cfg.model, folder, texts)
    chat, params = open_chat(cfg.model, cfg.chat, tok, gen, device=device)
    tree: Tree = {"model": params}
    # Here, before any conversation is encoded; stages of adapters are checked when one is made.
    for stage in cfg.base.stages if cfg.base else ():
        check_trainable(stage, tree)
    return Model(cfg=cfg, chat=chat, registry=registry_path(cfg, folder)), tree


def registry_path(cfg: Config, folder: Path) -> Path:
    """Where the registry is: the one that is named, or the run's own."""
    return Path(cfg.pool.registry) if cfg.pool.registry else folder / "registry.toml"


def _check_registry(cfg: Config) -> None:
    """Raise before a model is loaded where the registry lacks what evaluation needs."""
    path = cfg.pool.registry
    held = registry.read_registry(path, cfg.pool.root)
    registry.check_registry_files(path, held)
    if not held.embedder:
        raise ValueError(
            f"{path}: has vectors but no embedder, so questions have none; `invoke adapters build` fits one"
        )
    check_embedder(registry.registry_root(path, held) / held.embedder)


def gather(model: Model, params: Tree) -> Experts:
    """The model with the adapters of its registry.

    Raises:
        ValueError: as `experts.load_experts`.
    """
    cfg = model.cfg
    # With the model's name adapters may call it otherwise, as a folder or a 4-bit copy: that is a warning.
    place: dict[str, str] = {"base": cfg.model.name, "root": cfg.pool.root}
    return experts.load_experts(
        model.chat, params["model"], model.registry, **place, fusion=cfg.fusion, hold=cfg.pool.hold
    )


def new_adapter(cfg: Config, chat: Chat, number: int, device: torch.device) -> lora.Adapter:
    """The adapter of task `number` before its training."""
    assert cfg.train is not None
    # seed + 1, as the seed itself has drawn the model; + number, so that no two adapters start alike.
    adapter = lora.init_lora(
        cfg.lora, chat.skeleton, Generator().manual_seed(cfg.seed + 1 + number), device=device
    )
    adapter = evolve(adapter, factors=cast_added(cfg.train, adapter.factors, chat.dtype))
    for stage in cfg.train.stages:
        check_trainable(stage, {"lora": adapter.factors})
    return adapter
