"""tune: a language or vision-language model adapted to conversations, by LoRA, H-LoRA, QLoRA or as a whole.

images -> patches -> tower -> visual tokens in the place of placeholders -> language model -> the answers' tokens, which alone are trained.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from medvl import hub, intern_vl, lora, quant, qwen_vl, shards, tokens, train, vlm
from medvl.checkpoints import find, new_folder, read_json
from medvl.data import conversations
from medvl.data.conversations import Placeholder
from medvl.data.phantom_pictures import PictureConfig
from medvl.lora import LoraConfig
from medvl.tree import Tree, matching

_log = logging.getLogger("medvl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_CHAT = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TILES = ("<img>", "</img>", "<IMG_CONTEXT>")


@frozen(kw_only=True)
class ModelConfig:
    """The model: a hub name or folder; or, without a name, a Hugging Face config built from scratch with a tokenizer of its own."""

    name: str = ""
    config: dict[str, Any] = field(factory=dict)
    tokenizer: str = ""  # another than the model's own
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["none", "nf4", "fp4"] = "none"


@frozen(kw_only=True)
class DataConfig:
    """Where conversations are; `{split}` stands for train, valid and test, `{folder}` for the folder."""

    source: Literal["files", "phantoms"] = "files"
    folder: str = "data/conversations"
    phantoms: PictureConfig = PictureConfig()
    conversations: str = "{folder}/{split}.jsonl"
    root: str = ""  # where relative image names start; "" = the folder of the JSONL
    context: int = 2048  # tokens; a conversation whose answers do not fit is left out and counted
    template: str = ""  # "" = the tokenizer's own
    max_pixels: int = 0  # of an image; 0 = what the checkpoint says
    min_pixels: int = 0


@frozen(kw_only=True)
class Stage:
    """What is trained, how long and how fast. Names start with "model/" or "lora/"; without a stage that trains "lora/..." there is no
    adapter."""

    name: str
    steps: int
    lr: float
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


@frozen(kw_only=True)
class EvaluateConfig:
    """Answers to the last question of each test conversation, by greedy decoding."""

    max_tokens: int = 64
    batch: int = 8
    bootstrap: int = 1000


@frozen(kw_only=True)
class Config:
    """A tune experiment."""

    system: Literal["tune"]
    about: str = ""
    seed: int = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig(pattern="all-linear")
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    def __attrs_post_init__(self) -> None:
        if bool(self.model.name) == bool(self.model.config):
            raise ValueError("model must have either a name (hub or folder) or a config to build from scratch")
        if not self.train.stages:
            raise ValueError("train.stages must hold at least one stage")
        if any(stage.muon for stage in self.train.stages) and (self.train.shard or self.model.dtype != "float32"):
            raise ValueError("a stage's muon needs whole float32 weights: model.dtype = 'float32' and train.shard = false")
        if self.train.batch % self.train.chunk:
            raise ValueError(f"train.chunk must divide train.batch, got {self.train.chunk} and {self.train.batch}")
        if self.model.quantize != "none" and not self.adapted:
            raise ValueError(f"model.quantize {self.model.quantize!r} freezes the model; a stage must train lora/...")

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter."""
        return any(p.startswith(("lora/", "(lora", ".*")) for stage in self.train.stages for p in stage.train)


@frozen(kw_only=True, eq=False)
class Model:
    """Everything of a tuned model that is not a weight."""

    cfg: Config
    skeleton: hub.Skeleton
    tokenizer: Any
    adapter: lora.Adapter | None  # names, kinds and scales; the factors are in the params
    placeholder: Placeholder | None = None
    images: qwen_vl.ImageConfig | intern_vl.TileConfig | None = None


def init(cfg: Config, folder: Path, texts: Sequence[str] = (), *, device: torch.device = torch.device("cpu")) -> tuple[Model, Tree]:
    """Skeleton, tokenizer and starting weights {"model": {name: weight}, "lora": factors}.

    Args:
        folder: of the run; a tokenizer trained on `texts` is kept there and taken from there the next time.
        device: where the weights are; "meta" makes none, for an estimate.
    """
    gen, dtype = torch.Generator().manual_seed(cfg.seed), DTYPES[cfg.model.dtype]
    tok = tokenizer_of(cfg, folder, texts)
    each = quantizer_of(cfg)
    if cfg.model.name and device.type != "meta":
        cut = shards.sharder(shards.mesh(device)) if cfg.train.shard else None
        skeleton, params = hub.load(cfg.model.name, head="language", dtype=dtype, device=device, each=each or cut)
    else:
        skeleton = hub.empty_skeleton(config_of(cfg, tok), head="language")
        if device.type == "meta":
            params = {n: torch.empty(p.shape, dtype=dtype, device="meta") for n, p in skeleton.module.named_parameters()}
        else:
            skeleton, params = hub.init_skeleton(skeleton.config, gen, head="language")
            params = {n: t.to(device, dtype) for n, t in params.items()}
        params = {n: each(n, t) if each else t for n, t in params.items()}
    adapter = lora.init_lora(cfg.lora, skeleton, gen, device=device) if cfg.adapted else None
    tree: Tree = {"model": params} | ({"lora": adapter.factors} if adapter else {})
    for stage in cfg.train.stages:
        check_stage(stage, tree)
    holder, images = _sight(cfg, skeleton)
    return Model(cfg=cfg, skeleton=skeleton, tokenizer=tok, adapter=adapter, placeholder=holder, images=images), tree


def check_stage(stage: Stage, params: Tree) -> None:
    """Raise where a stage trains what does not exist or is frozen for good."""
    flat = {f"model/{n}": t for n, t in params["model"].items()}
    names = [*flat, *(f"lora/{m}/{k}" for m, f in params.get("lora", {}).items() for k in f)]
    try:
        hit = matching(names, stage.train)
    except ValueError as e:
        raise ValueError(f"stage {stage.name}: {e}") from e
    if frozen_ := [n for n in hit if isinstance(flat.get(n), quant.FourBit)]:
        raise ValueError(f"stage {stage.name}: {frozen_[0]} has 4 bits and cannot be trained; train lora/... or set model.quantize='none'")


def config_of(cfg: Config, tok: Any) -> dict[str, Any]:
    """The Hugging Face config; of a model built from scratch with the tokenizer's size and ids."""
    if cfg.model.name:
        return read_json(find(cfg.model.name, ("config.json",)))
    raw = {**cfg.model.config}
    size = -(-len(tok) // 8) * 8
    if "text_config" in raw:
        raw["text_config"] = {**raw["text_config"], "vocab_size": size}
        if raw["model_type"] == "internvl":
            return raw | {"image_token_id": tok.convert_tokens_to_ids(conversations.INTERN_VL.token)}
        at = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 2, "vision_end_token_id": 3}
        return raw | {key: tok.convert_tokens_to_ids(_CHAT[i]) for key, i in at.items()}
    return raw | {"vocab_size": size}


def quantizer_of(cfg: Config) -> hub.Each | None:
    """What makes 4-bit weights while they are read."""
    if cfg.model.quantize == "none":
        return None
    return quant.quantizer(quant.QuantConfig(kind=cfg.model.quantize))


def weights_of(model: Model, params: Tree, *, train: bool = False) -> dict[str, Tensor]:
    """The weights that the skeleton is called with: shards to be gathered, the adapter on them."""
    base = shards.as_weights(params["model"])
    if model.adapter is None:
        return base
    return lora.apply_lora(base, evolve(model.adapter, factors=params["lora"]), train=train)


def loss_sum(model: Model, skeleton: hub.Skeleton, params: Tree, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, train.Aux]:
    """Sum of the losses of the trained tokens of a (micro-)batch, and their number."""
    device = next(iter(params["model"].values())).device
    real = torch.device("cpu") if device.type == "meta" else device  # an estimate counts, but must know lengths and masks
    inputs = {k: t.to(device if t.is_floating_point() else real) for k, t in batch.items() if k not in ("images", "visual")}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(DTYPES[model.cfg.model.dtype])
    weights = weights_of(model, params, train=True)
    return *vlm.answer_loss(skeleton, weights, inputs, chunk=model.cfg.train.logits), train.Aux()


def cut(batch: Mapping[str, Tensor], span: slice) -> dict[str, Tensor]:
    """The rows of a batch in `span` with their images, without columns that are padding in all of them."""
    rows = {k: batch[k][span] for k in ("ids", "mask", "labels", "visual", "images")}
    used = rows["mask"].any(0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    out = {k: t[:, first:last] if t.dim() > 1 else t for k, t in rows.items()}
    if "pixel_values" not in batch:
        return out
    if "image_grid_thw" not in batch:  # tiles, each of as many visual tokens
        seen = batch["visual"].sum(1)
        each = int(seen.sum()) // len(batch["pixel_values"])
        a, b = (int(seen[:n].sum()) // each for n in (span.start, span.stop))
        return out | ({"pixel_values": batch["pixel_values"][a:b]} if b > a else {})
    before, upto = (int(batch["images"][:n].sum()) for n in (span.start, span.stop))
    if upto == before:
        return out
    sizes = batch["image_grid_thw"].prod(1)
    a, b = int(sizes[:before].sum()), int(sizes[:upto].sum())
    return out | {"image_grid_thw": batch["image_grid_thw"][before:upto], "pixel_values": batch["pixel_values"][a:b]}


def tokenizer_of(cfg: Config, folder: Path, texts: Sequence[str]) -> Any:
    """The named tokenizer, or one trained on `texts` with the tokens of ChatML and of images."""
    if cfg.model.name or cfg.model.tokenizer:
        return tokens.tokenizer(cfg.model.tokenizer or cfg.model.name)
    kept = folder / "tokenizer"
    if not kept.exists() and not texts:
        raise ValueError(f"{kept}: the run has no tokenizer yet; train it first")
    if train.rank() == 0 and not kept.exists():
        tok = tokens.train_bpe(texts, 600)
        tok.add_special_tokens({"additional_special_tokens": [*_CHAT, *_TILES]})
        tok.chat_template = conversations.TEMPLATES["chatml"]
        with new_folder(kept) as tmp:
            tok.save_pretrained(tmp)
    train.meet()
    return tokens.tokenizer(kept)


def _sight(cfg: Config, skeleton: hub.Skeleton) -> tuple[Placeholder | None, qwen_vl.ImageConfig | intern_vl.TileConfig | None]:
    """How images come into the model, where it can see."""
    kind = skeleton.config["model_type"]
    if kind not in (*_QWEN_VL, "internvl"):
        return None, None
    vision = skeleton.config["vision_config"]
    raw = read_json(find(cfg.model.name, ("preprocessor_config.json", "processor_config.json"))) if cfg.model.name else None
    if kind == "internvl":
        tokens_of = {"tokens": skeleton.config["image_seq_length"]}
        side = vision["image_size"][0] if isinstance(vision["image_size"], list) else vision["image_size"]
        return conversations.INTERN_VL, evolve(intern_vl.tile_config(raw) if raw else intern_vl.TileConfig(size=side), **tokens_of)
    own = {"patch": vision["patch_size"], "merge": vision["spatial_merge_size"], "temporal": vision["temporal_patch_size"]}
    images = qwen_vl.image_config(raw) if raw else qwen_vl.ImageConfig(**own)
    if cfg.data.max_pixels:
        images = evolve(images, max_pixels=cfg.data.max_pixels)
    if cfg.data.min_pixels:
        images = evolve(images, min_pixels=cfg.data.min_pixels)
    return conversations.QWEN_VL, images
