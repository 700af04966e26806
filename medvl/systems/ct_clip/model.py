"""ct_clip: CT volumes and reports in one space; findings named in words, never trained for, are read off by comparison.

slices -> `encode_slices` (a ViT) -> `fuse` (a transformer over slices) -> centre, project, normalise -> contrast <- the same of the report.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Tensor

from medvl.base import config, processes
from medvl.base.tree import Tree, merge_trees
from medvl.components import encode, fuse, layers, losses, text
from medvl.components.encode import EncodeConfig
from medvl.components.fuse import FuseConfig
from medvl.components.text import TextConfig
from medvl.ct.preprocess import CtConfig, size_of
from medvl.hub import loading, skeletons, tokens
from medvl.phantoms.chest_case import PhantomConfig
from medvl.training import gradients
from medvl.training.record import TrainConfig, refuse_settings

SPLITS = ("train", "valid", "test")


@frozen(kw_only=True)
class DataConfig:
    """Where volumes, reports and labels are; `{split}` stands for train, valid and test, `{folder}` for the folder,
    `{ct}` for a digest of the CT settings."""

    source: Literal["files", "phantoms"] = "files"
    folder: str = "data/ct_rate"
    phantoms: PhantomConfig = PhantomConfig(patients=1, seed=0)
    store: str = (
        "{folder}/{split}.h5"  # made by `invoke preprocess`; phantoms are preprocessed by the run itself
    )
    stores: dict[str, str] = field(
        factory=dict
    )  # of single splits: {test = "{folder}/valid.h5"} where two share a store
    reports: str = "{folder}/{split}_reports.csv"
    labels: str = "{folder}/{split}_labels.csv"
    metadata: str = "{folder}/{split}_metadata.csv"
    # whose a volume is, where names are not CT-RATE's: a column of labels or metadata, or a regular expression as "(P[0-9]+)_"
    patient_column: str = ""
    patient_pattern: str = ""
    text: Literal["findings", "impression", "both", "either"] = (
        "both"  # both joined, or one of the two drawn for each training step
    )
    impressions: float = 0.5  # text = "either": how often it is the impression
    missing: Literal["error", "empty", "drop"] = "drop"  # reports without text
    sentences: int = 0  # show 1 to this many sentences of a report in a training step; 0 = all, in order
    draws: int = 1  # texts of a scan in a training step, each contrasted by itself; worth it where images cost more than texts
    shuffle: bool = (
        False  # give every training scan another scan's report: the control that must learn nothing
    )
    cache: str = "cache"  # slice features of frozen encoders
    workers: int = 2

    def __attrs_post_init__(self) -> None:
        config.check_bounds(
            self,
            "data",
            impressions=config.SHARE,
            sentences=config.COUNT_OR_NONE,
            draws=(1, 1024),
            workers=config.PROCESSES,
        )
        inside: Any = dict.fromkeys(("store", "reports", "labels", "metadata"), ("folder", "split", "ct"))
        config.check_patterns(self, "data", folder=(), cache=(), **inside)
        if unknown := sorted({*self.stores} - {*SPLITS}):
            raise ValueError(f"data.stores is for {', '.join(SPLITS)}, found {', '.join(unknown)}")
        for split, pattern in self.stores.items():
            config.fill_pattern(pattern, f"data.stores.{split}", **dict.fromkeys(inside["store"]))
        config.check_regexes([self.patient_pattern] if self.patient_pattern else [], "data.patient_pattern")
        if self.patient_column and self.patient_pattern:
            raise ValueError("data: give patient_column or patient_pattern, not both")


@frozen(kw_only=True)
class VitConfig:
    """The slice encoder: a hub name, folder or .pth file; or, without a name, a Hugging Face config built from scratch."""

    name: str = ""
    config: dict[str, Any] = field(factory=dict)
    whiten: bool = False  # start from a patch embedding whitened over training slices; only for encoders built from scratch


@frozen(kw_only=True)
class WordsConfig:
    """Tokenizer and text encoder; without names, byte-level BPE trained on the reports and CLIP's tower from scratch."""

    tokenizer: str = ""
    encoder: str = ""
    pool: Literal["first", "last", "mean"] = "first"  # of a named encoder
    tower: TextConfig = TextConfig()  # its context and (for BPE) vocabulary hold with a named encoder too


@frozen(kw_only=True)
class ContrastConfig:
    """What is compared, and how."""

    loss: Literal["clip", "siglip"] = "clip"
    dim: int = 512
    # of a tower's rows, over the batch (running values when not training): without `centre` all volumes start nearly parallel,
    # with `standardise` rare directions count as much as frequent ones
    normalise: Literal["none", "centre", "standardise"] = "centre"
    scale: float = 1 / 0.07
    scale_max: float = 100.0
    bias: float = -10.0  # siglip only

    def __attrs_post_init__(self) -> None:
        config.check_bounds(
            self, "contrast", dim=config.WIDTH, scale=(1e-3, 1e6), scale_max=(1e-3, 1e6), bias=(-1e6, 1e6)
        )
        if self.scale > self.scale_max:
            raise ValueError(
                f"contrast.scale must not be above contrast.scale_max, got {self.scale:g} and {self.scale_max:g}"
            )


@frozen(kw_only=True)
class EvaluateConfig:
    """Zero-shot findings on the test split, thresholds from the validation split."""

    findings: tuple[str, ...] = ()  # () = all columns of the label table
    prompts: Literal["reference", "ctclip", "ensemble"] = "ensemble"
    rule: Literal["youden", "f1", "corner"] = "youden"
    bootstrap: int = 1000
    batch: int = 8
    names: bool = False  # write volume names, which may say who a patient is, below the scans of the report; else their row in the scores

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "evaluate", bootstrap=config.DRAWS, batch=(1, 2**20))


# What a table `train` leaves out. The optimiser's numbers are CLIP's; the batch is what the loss contrasts.
_TRAINING = {
    "batch": 128,
    "chunk": 4,
    "checkpoint": False,
    "beta2": 0.98,
    "eps": 1e-6,
    "valid": 0,
    "stages": {"weight_decay": 0.2, "train": [".*"]},
}


def _check_training(_record: Any, _field: Any, cfg: TrainConfig) -> None:
    whole = "the contrastive gradient needs whole weights; leave it out"
    refuse_settings(cfg, "train", whole, shard=False)
    refuse_settings(cfg, "train", "encode.checkpoint says it in ct_clip; leave it out", checkpoint=False)
    refuse_settings(cfg, "train", "ct_clip is validated on all volumes; leave it out", valid=0)
    refuse_settings(cfg, "train", "is for language systems; leave it out", logits=256)
    for stage in cfg.stages:
        if stage.data:
            raise ValueError(f"stage {stage.name}: ct_clip has one kind of data, got data = {stage.data!r}")


@frozen(kw_only=True)
class Config:
    """A ct_clip experiment."""

    system: Literal["ct_clip"]
    about: str = ""
    seed: int = 0
    data: DataConfig = DataConfig()
    ct: CtConfig = CtConfig()
    vit: VitConfig = VitConfig()
    encode: EncodeConfig = EncodeConfig()
    fuse: FuseConfig = FuseConfig()
    words: WordsConfig = WordsConfig()
    contrast: ContrastConfig = ContrastConfig()
    train: TrainConfig = config.table(defaults=_TRAINING, check=_check_training)
    evaluate: EvaluateConfig = EvaluateConfig()

    def __attrs_post_init__(self) -> None:
        if bool(self.vit.name) == bool(self.vit.config):
            raise ValueError(
                "vit must have either a name (hub, folder or .pth) or a config to build from scratch"
            )
        config.check_bounds(self, "experiment", seed=config.SEED)
        patch = self.vit.config.get("patch_size")
        if (
            isinstance(patch, int) and patch > 0
        ):  # with a name it is known, and asked again, when the encoder is loaded
            encode.check_slice_size(self.encode, size_of(self.ct)[1:], patch)
        if self.vit.whiten and self.vit.name:
            raise ValueError(
                f"vit.whiten is for encoders built from scratch; the weights of {self.vit.name!r} would be lost"
            )


@frozen(kw_only=True, eq=False)
class Model:
    """Everything of a trained system that is not a weight."""

    cfg: Config
    vit: skeletons.Skeleton  # encodes slices
    text_encoder: skeletons.Skeleton | None  # a named one; None = the tower that `components.text` computes
    tokenizer: Any


def init_model(cfg: Config, folder: Path, texts: Sequence[str] = ()) -> tuple[Model, Tree]:
    """Skeletons, tokenizer and starting weights: a pure function of the record, of the named checkpoints and of `texts`.

    Args:
        folder: of the run; a tokenizer trained on `texts` is kept there and taken from there the next time.
    Returns:
        the model, and params {"vit", "fuse", "text", "project": {"image", "text"}, "contrast": {"log_scale" [], "bias" []}}.
    Raises:
        ValueError: sizes that do not fit each other.
    """
    gen = torch.Generator().manual_seed(cfg.seed)
    if cfg.vit.name:
        vit, vit_params = loading.load_encoder(cfg.vit.name, "vision")
    else:
        vit, vit_params = skeletons.init_skeleton(cfg.vit.config, gen)
    _check_widths(cfg, vit)
    tokenizer = _open_tokenizer(cfg, folder, texts)
    tower = cfg.words.tower
    if len(tokenizer) > tower.vocabulary:
        raise ValueError(
            f"words.tower.vocabulary must hold the tokenizer's {len(tokenizer)} tokens, found {tower.vocabulary}"
        )

    # The order of these draws from `gen` decides the starting weights.
    params: Tree = {"vit": vit_params, "fuse": fuse.init_fuse(cfg.fuse, gen)}
    text_encoder = None
    if cfg.words.encoder:
        text_encoder, params["text"] = loading.load_encoder(cfg.words.encoder, "text")
        text_width = _check_text_encoder(cfg.words, text_encoder, params["text"])
    else:
        params["text"] = text.init_text(tower, gen)
        text_width = tower.dim
    params["project"] = {
        "image": _init_projection(fuse.fused_width(cfg.fuse), cfg.contrast.dim, gen),
        "text": _init_projection(text_width, cfg.contrast.dim, gen),
    }
    params["contrast"] = {
        "log_scale": torch.tensor(math.log(cfg.contrast.scale)),
        "bias": torch.tensor(cfg.contrast.bias),
    }
    return Model(cfg=cfg, vit=vit, text_encoder=text_encoder, tokenizer=tokenizer), params


def _check_widths(cfg: Config, vit: skeletons.Skeleton) -> None:
    encode.check_slice_size(cfg.encode, size_of(cfg.ct)[1:], encode.patch_size(vit))
    encoded = encode.embedding_width(cfg.encode, vit)
    expected = cfg.fuse.inputs or cfg.fuse.dim
    if encoded != expected:
        raise ValueError(
            f"fuse.dim must be the width of the slice encoder, {encoded}, found {expected}; set fuse.dim={encoded} "
            f"(and fuse.heads), or fuse.inputs={encoded} to project it to fuse.dim"
        )


def _init_projection(width: int, dim: int, gen: torch.Generator) -> Tree:
    return layers.init_linear(width, dim, gen, std=width**-0.5, bias=False)


def _open_tokenizer(cfg: Config, folder: Path, texts: Sequence[str]) -> Any:
    """The named tokenizer, or byte-level BPE that is trained on `texts` once and kept in the run's folder."""
    name = cfg.words.tokenizer or cfg.words.encoder
    if name:
        return tokens.tokenizer(name)
    path = folder / "tokenizer"
    if not path.exists() and not texts:
        raise ValueError(f"{path}: the run has no tokenizer yet; train it first")
    if processes.rank() == 0 and not path.exists():
        tokens.train_bpe(texts, cfg.words.tower.vocabulary, path)
    processes.wait_for_all()
    return tokens.tokenizer(path)


def _check_text_encoder(cfg: WordsConfig, encoder: skeletons.Skeleton, params: Tree) -> int:
    """The width of a named text encoder's rows.

    Raises:
        ValueError: the context is longer than its positions, or `pool` takes a token that does not see the text.
    """
    positions = getattr(encoder.module.config, "max_position_embeddings", cfg.tower.context)
    if cfg.tower.context > positions:
        raise ValueError(
            f"words.tower.context must be at most the {positions} positions of {cfg.encoder}, got {cfg.tower.context}"
        )
    # Two texts that differ in their second token: a causal encoder gives both the same first row, whatever the report says.
    ids = torch.tensor([[1, 2], [1, 3]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        rows = text.encode_text_with(params, ids, mask, model=encoder, pool=cfg.pool)
    if torch.equal(rows[0], rows[1]):
        raise ValueError(
            f"words.pool = {cfg.pool!r} takes a token of {cfg.encoder} that does not see the text behind it; "
            "set 'last' or 'mean'"
        )
    return rows.shape[1]


# Forward pass -----------------------------------------------------------------------------------------------------------------
def embed_volumes(model: Model, params: Tree, batch: Mapping[str, Tensor]) -> Tensor:
    """Rows [b, d] of the image tower, before normalisation and projection.

    Args:
        batch: "slices", voxels uint8 or int16 [b, s, y, x] or features [b, s, d]; "mask" bool and "position_mm" [b, s].
    """
    device = params["fuse"]["norm"]["weight"].device
    mask, slices = batch["mask"].to(device), batch["slices"]
    if slices.dim() == 4:
        features = encode.encode_slices(model.cfg.encode, params["vit"], slices, mask, vit=model.vit)
    else:
        features = slices.to(device).float()  # the cache of a frozen encoder holds float16
    return fuse.fuse(model.cfg.fuse, params["fuse"], features, mask, batch["position_mm"].to(device))


def embed_texts(model: Model, params: Tree, batch: Mapping[str, Tensor]) -> Tensor:
    """Rows [b, k, d] of the text tower, k texts of each volume, before normalisation and projection.

    Args:
        batch: "ids" and "words" (their mask), [b, k, t].
    """
    device = params["project"]["text"]["weight"].device
    ids = batch["ids"].to(device).flatten(0, 1)
    mask = batch["words"].to(device).flatten(0, 1)
    if model.text_encoder is not None:
        pool = model.cfg.words.pool
        rows = text.encode_text_with(params["text"], ids, mask, model=model.text_encoder, pool=pool)
    else:
        rows = text.encode_text(model.cfg.words.tower, params["text"], ids, mask)
    return rows.unflatten(0, batch["ids"].shape[:2])


def batch_statistics(cfg: ContrastConfig, rows: Tensor) -> Tree:
    """What `place` normalises rows [..., d] with: {"mean" [d]} and, to standardise, {"variance" [d]} over the batch."""
    if cfg.normalise == "none":
        return {}
    rows = rows.float().flatten(0, -2)
    statistics: Tree = {"mean": rows.mean(0)}
    if cfg.normalise == "standardise":
        statistics["variance"] = rows.var(0, correction=0)
    return statistics


def place(params: Tree, side: Literal["image", "text"], rows: Tensor, statistics: Tree) -> Tensor:
    """Rows [..., d] of a tower in the common space: normalised, projected, of L2 norm 1.

    Args:
        statistics: of the batch when training (`batch_statistics`), else the running ones, `params["running"][side]`.
    """
    rows = rows.float()
    if "mean" in statistics:
        rows = rows - statistics["mean"]
    if "variance" in statistics:
        rows = rows * torch.rsqrt(statistics["variance"] + 1e-5)
    return F.normalize(layers.linear(params["project"][side], rows), dim=-1)


def contrastive_loss(
    cfg: ContrastConfig, params: Tree, rows: Mapping[str, Tensor]
) -> tuple[Tensor, gradients.Aux]:
    """The loss over {"image" [b, d], "text" [b, k, d]} of a whole batch, normalised over that batch; the mean over the k texts."""
    statistics = {side: batch_statistics(cfg, tower) for side, tower in rows.items()}
    image = place(params, "image", rows["image"], statistics["image"])
    texts = place(params, "text", rows["text"], statistics["text"])
    scale = params["contrast"]["log_scale"].exp()
    loss_of_text = []
    for one_text in texts.unbind(1):
        if cfg.loss == "clip":
            loss_of_text.append(losses.clip_loss(image, one_text, scale))
        else:
            loss_of_text.append(losses.siglip_loss(image, one_text, scale, params["contrast"]["bias"]))
    return torch.stack(loss_of_text).mean(), gradients.Aux(metrics={"scale": scale}, means=statistics)


def bound_scale(cfg: ContrastConfig, params: Tree) -> Tree:
    """Trained leaves after a step, the logit scale at most `scale_max` (100 in CLIP)."""
    log_scale = params.get("contrast", {}).get("log_scale")
    if log_scale is None:  # a stage that does not train it
        return params
    bounded = log_scale.clamp(max=math.log(cfg.scale_max))
    return merge_trees(params, {"contrast": {"log_scale": bounded}})
