"""slide_vqa: questions about whole slides of any number of patches, through a few tokens.

patch features -> frozen compressor -> k tokens -> projector -> in the place of placeholders -> language model -> answer, and its map.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from torch import Generator, Tensor

from medvl.base import config
from medvl.base.tree import Tree
from medvl.components.project import ProjectConfig, init_project, project
from medvl.components.slots import CompressConfig
from medvl.hub import skeletons
from medvl.language import chat, encoding, vlm
from medvl.language.chat import Chat, ChatConfig, ModelConfig
from medvl.language.encoding import Sample
from medvl.language.templates import QWEN_VL
from medvl.phantoms.slides import SlideConfig
from medvl.slides.question_formats import SlideConversation
from medvl.slides.reference_files import read_compressor, read_projector
from medvl.training import gradients
from medvl.training.record import TrainConfig, language_training, refuse_settings
from medvl.training.stages import check_trainable, init_trained_adapter
from medvl.weights import lora, shards
from medvl.weights.lora import LoraConfig


@frozen(kw_only=True)
class DataConfig:
    """Where slides, questions and labels are; `{folder}` stands for the folder.

    Questions are in any of the formats of `data/slide_questions`; features in any of `data/slides`, or a packed store.
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


# A speed of the compressor's gate (moe): at the experts' rate it hardly moves, and what is rare stays a patch among
# thousands. Compressors without a gate leave it out.
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
    whole = "the slots are balanced over a whole batch of slides; leave it out"
    refuse_settings(cfg, where, whole, chunk=2)
    refuse_settings(
        cfg, where, "the compressor is small and lies whole everywhere; leave it out", shard=False
    )
    refuse_settings(cfg, where, "the compressor keeps all its activations; leave it out", checkpoint=False)
    refuse_settings(cfg, where, "all slides of the split valid are taken; leave it out", valid=0)
    refuse_settings(cfg, where, "is for language models; leave it out", logits=256)
    refuse_settings(cfg, where, "train.device says it for the whole run; leave it out", device="auto")


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
    """A `pretrain` table as it is written now, of one from when it held steps and rates itself. What it trains, and
    how, is the same.

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
            f"pretrain.{min(old)} is a setting of older records; beside pretrain.train write steps and rates as "
            "pretrain.train.stages.0.*, batch and the like as pretrain.train.*"
        )
    stage: dict[str, Any] = {name: table[name] for name in of_stage if name in table}
    (default,) = _PRETRAINING["stages"]
    (gate,) = default["speeds"]
    gate_speed = {"lr": table.get("router_lr", gate["lr"])}
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
                f"pretrain.file is always of kind moe, got compress.kind {self.compress.kind!r}; train that one on labels"
            )
        config.check_bounds(self, "experiment", seed=config.SEED, hidden=config.WIDTH)
        if wrong := [s.name for s in self.train.stages if s.data not in ("captions", "questions")]:
            raise ValueError(f'stage {wrong[0]}: data must be "captions" or "questions"')
        first = next((i for i, s in enumerate(self.train.stages) if s.data == "questions"), None)
        warm = first is None or self.projector or any(s.data == "captions" for s in self.train.stages[:first])
        if not warm and not self.cold:
            raise ValueError(
                'questions are trained on a projector that captions have not: put a stage with data = "captions" before, give projector, '
                "or set cold = true"
            )
        if self.model.quantize != "none" and any(p.startswith("model/") for p in self.train.patterns):
            raise ValueError(
                f"model.quantize {self.model.quantize!r} freezes the model; train projector/... and lora/..."
            )


def folder_of(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; slides drawn by one record share one."""
    drawn = cfg.data.source == "phantoms"
    return (
        Path(cfg.data.folder) / f"slides-{config.record_digest(cfg.data.phantoms)}"
        if drawn
        else Path(cfg.data.folder)
    )


def path(cfg: Config, what: str) -> Path:
    """Where a file of the data is."""
    return Path(config.fill_pattern(getattr(cfg.data, what), f"data.{what}", folder=folder_of(cfg)))


@frozen(kw_only=True, eq=False)
class Model:
    """Everything but the weights of language model, projector and adapter."""

    cfg: Config
    chat: Chat
    project: ProjectConfig
    compress: CompressConfig  # as the compressor is, where it came from a file
    compressor: Tree  # frozen
    adapter: lora.Adapter | None


@frozen(kw_only=True, eq=False)
class Encoded:
    """Conversations as token ids, with the slides they show."""

    talks: tuple[SlideConversation, ...]
    samples: tuple[Sample, ...]
    refused: int


def open_compressor(cfg: Config) -> tuple[CompressConfig, Tree]:
    """The trained compressor of `pretrain.file`; its sizes are the file's."""
    held, params, _ = read_compressor(cfg.pretrain.file, top_k=cfg.compress.top_k)
    return evolve(held, noise=cfg.compress.noise, dropout=cfg.compress.dropout), params


def init(
    cfg: Config,
    folder: Path,
    compressor: tuple[CompressConfig, Tree],
    texts: Sequence[str] = (),
    *,
    device: torch.device = torch.device("cpu"),
) -> tuple[Model, Tree]:
    """The model and starting weights {"model", "projector", "lora"}.

    Args:
        compressor: its record and frozen weights.
        texts: what a tokenizer is trained on, if the model has none.
        device: "meta" makes no weights, for an estimate.
    """
    gen = Generator().manual_seed(cfg.seed)
    tok = chat.tokenizer_of(cfg.model, folder, texts, lower=False)  # answers are letters
    talks, params = chat.open_chat(cfg.model, cfg.chat, tok, gen, device=device, shard=cfg.train.shard)
    talks = evolve(talks, vision=None)
    width = next(iter(_embedding(talks, params).values())).shape[1]
    sizes = ProjectConfig(inputs=compressor[0].dim, hidden=cfg.hidden, outputs=width)
    if cfg.projector:
        sizes, projector = read_projector(cfg.projector)
        if (sizes.inputs, sizes.outputs) != (compressor[0].dim, width):
            raise ValueError(
                f"{cfg.projector}: maps {sizes.inputs} to {sizes.outputs}; tokens have {compressor[0].dim}, the model {width}"
            )
    else:
        projector = init_project(sizes, gen)
    projector = {k: {n: t.to(device) for n, t in p.items()} for k, p in projector.items()}
    adapter = init_trained_adapter(cfg.train, cfg.lora, talks.skeleton, gen, device)
    tree: Tree = {"model": params, "projector": projector} | ({"lora": adapter.factors} if adapter else {})
    for stage in cfg.train.stages:
        check_trainable(stage, tree)
    made = Model(
        cfg=cfg, chat=talks, project=sizes, compress=compressor[0], compressor=compressor[1], adapter=adapter
    )
    return made, tree


def encode(model: Model, held: Sequence[SlideConversation], *, prompt: bool = False) -> Encoded:
    """Token ids of conversations, `slots` placeholders for each slide; those that do not fit the context are left out and counted."""
    held = [blinded(t) for t in held] if model.cfg.data.blind else list(held)
    fmt = evolve(chat.conversation_format(model.cfg.chat), placeholder=QWEN_VL)
    visual = [[model.compress.slots] * len(t.slides) for t in held]
    if prompt:
        samples = list[Sample]()
        for talk, counts in zip(held, visual, strict=True):
            try:
                samples.append(
                    encoding.encode_prompt(model.chat.tokenizer, talk.messages[:-1], fmt, visual=counts)
                )
            except ValueError as e:
                raise ValueError(f"{talk.place}: {e}") from e
        return Encoded(talks=tuple(held), samples=tuple(samples), refused=0)
    found, refused = encoding.encode_fitting(
        model.chat.tokenizer,
        [t.messages for t in held],
        evolve(fmt, context=model.cfg.chat.context),
        visual=visual,
        names=[t.place for t in held],
    )
    out = {i for i, _ in refused}
    return Encoded(
        talks=tuple(t for i, t in enumerate(held) if i not in out), samples=tuple(found), refused=len(refused)
    )


def blinded(talk: SlideConversation) -> SlideConversation:
    """The conversation without its slides."""
    return evolve(
        talk,
        slides=(),
        messages=tuple(m | {"content": m["content"].replace("<image>\n", "")} for m in talk.messages),
    )


def collate(
    model: Model,
    data: Encoded,
    tokens: Mapping[str, Tensor],
    chosen: Sequence[int],
    side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """A batch of `loss_of`: ids, mask, labels, visual [b, t], images [b] (slides of each row), tokens [n, k, d] of them in their order."""
    tok = model.chat.tokenizer
    pad = tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id or 0
    batch = encoding.collate_samples([data.samples[i] for i in chosen], pad, side=side)
    shown = [tokens[s] for i in chosen for s in data.talks[i].slides]
    batch["images"] = torch.tensor([len(data.talks[i].slides) for i in chosen])
    empty = torch.zeros(0, model.compress.slots, model.compress.dim)
    return batch | {"tokens": torch.stack(shown) if shown else empty}


def cut(batch: Mapping[str, Tensor], span: slice) -> dict[str, Tensor]:
    """The rows of a batch in `span` with their slides, without columns that are padding in all of them."""
    rows = {k: batch[k][span] for k in ("ids", "mask", "labels", "visual", "images")}
    used = rows["mask"].any(0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    a, b = (int(batch["images"][:n].sum()) for n in (span.start, span.stop))
    return {k: t[:, first:last] if t.dim() > 1 else t for k, t in rows.items()} | {
        "tokens": batch["tokens"][a:b]
    }


def inputs_of(
    model: Model, params: Tree, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the language model is called with: the embedded text, projected slide tokens in their places; gradients reach the projector."""
    device = next(iter(weights.values())).device
    (name,) = _embedding(model.chat, weights)
    real = torch.device("cpu") if device.type == "meta" else device
    token = model.chat.tokenizer.convert_tokens_to_ids(QWEN_VL.token)
    visual = project(model.project, shards.lazy_shards(params["projector"]), batch["tokens"].to(device)).to(
        model.chat.dtype
    )
    counts = (batch["images"] * model.compress.slots).tolist()
    embeds = vlm.splice(batch["ids"].to(real), visual.flatten(0, 1), weights[name], token, counts=counts)
    return {"inputs_embeds": embeds, "mask": batch["mask"].to(real)}


def weights_of(model: Model, params: Tree, *, train: bool = False) -> dict[str, Tensor]:
    """The language model's weights: shards to be gathered, the adapter on them."""
    base = shards.lazy_shards(params["model"])
    if model.adapter is None:
        return base
    return lora.apply_lora(base, evolve(model.adapter, factors=params["lora"]), train=train)


def loss_of(model: Model) -> Callable[[Tree, dict[str, Tensor]], tuple[Tensor, Tensor, gradients.Aux]]:
    """(all parameters, batch) -> sum of the losses of its trained tokens, and their number."""
    cfg = model.cfg.train
    skeleton = skeletons.checkpointed(model.chat.skeleton) if cfg.checkpoint else model.chat.skeleton

    def loss(params: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, gradients.Aux]:
        weights = weights_of(model, params, train=True)
        inputs = inputs_of(model, params, weights, batch)
        labels = batch["labels"].to(inputs["mask"].device)
        return *vlm.answer_loss(
            skeleton, weights, inputs | {"labels": labels}, chunk=cfg.logits
        ), gradients.Aux()

    return loss


def _embedding(talks: Chat, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: weight} of the token table."""
    module: Any = talks.skeleton.module
    table = module.get_input_embeddings().weight
    name = next(n for n, p in module.named_parameters() if p is table)
    return {name: params[name]}
