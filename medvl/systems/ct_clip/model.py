"""ct_clip: CT volumes and reports in one space; findings named in words, never trained for, are read off by
comparison.

slices -> `encode_slices` (a ViT) -> `fuse` (a transformer over slices) -> centre, project, normalise ->
contrast <- the same of the report.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from torch import Tensor

from medvl.base import processes, transfer
from medvl.base.tree import Tree, flatten, map_leaves, merge_trees
from medvl.components import encode, fuse, layers, losses, text
from medvl.ct.preprocess import size_of
from medvl.hub import loading, skeletons, tokens
from medvl.systems.ct_clip.record import Config, ContrastConfig, WordsConfig
from medvl.training import gradients
from medvl.weights import shards

# What `train.shard` cuts: matrices of the Hugging Face encoders, but positions, of which they take rows. What is
# built here is small.
SHARDED = (r"(vit|text)/(?!.*position)\w+\..*",)


@frozen(kw_only=True, eq=False)
class Model:
    """Everything of a trained system that is not a weight."""

    cfg: Config
    vit: skeletons.Skeleton  # encodes slices
    text_encoder: skeletons.Skeleton | None  # a named one; None = the tower that `components.text` computes
    tokenizer: Any


def init_model(cfg: Config, folder: Path, texts: Sequence[str] = ()) -> tuple[Model, Tree]:
    """Skeletons, tokenizer and starting weights: a pure function of the record, of the named checkpoints and
    of `texts`.

    Args:
        folder: of the run; a tokenizer trained on `texts` is kept there and taken from there the next time.
    Returns:
        the model, and params {"vit", "fuse", "text", "project": {"image", "text"}, "contrast": {"log_scale"
        [], "bias" []}}.
    Raises:
        ValueError: sizes that do not fit each other.
    """
    gen = torch.Generator().manual_seed(cfg.seed)
    vit, vit_params = init_encoder(cfg, gen)
    tokenizer = _open_tokenizer(cfg, folder, texts)
    tower = cfg.words.tower
    if len(tokenizer) > tower.vocabulary:
        raise ValueError(
            f"words.tower.vocabulary must hold the tokenizer's {len(tokenizer)} tokens, found "
            f"{tower.vocabulary}"
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
    params |= _init_contrast(cfg, text_width, gen)
    return Model(cfg=cfg, vit=vit, text_encoder=text_encoder, tokenizer=tokenizer), params


def init_encoder(cfg: Config, gen: torch.Generator) -> tuple[skeletons.Skeleton, Tree]:
    """The slice encoder and its starting weights, the first draws from `gen`.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if cfg.vit.name:
        vit, params = loading.load_encoder(cfg.vit.name, "vision")
    else:
        vit, params = skeletons.init_skeleton(cfg.vit.config, gen)
    _check_widths(cfg, vit)
    return vit, params


def empty_model(cfg: Config) -> tuple[Model, Tree]:
    """The model without a tokenizer, and parameters without storage (device "meta"), for an estimate.

    Raises:
        ValueError: as `init_model`.
    """
    gen = torch.Generator().manual_seed(cfg.seed)
    vit, vit_params = _empty_encoder(cfg.vit.config or loading.encoder_config(cfg.vit.name, "vision"))
    _check_widths(cfg, vit)
    params: Tree = {"vit": vit_params, "fuse": fuse.init_fuse(cfg.fuse, gen)}
    text_encoder, text_width = None, cfg.words.tower.dim
    if cfg.words.encoder:
        text_encoder, params["text"] = _empty_encoder(loading.encoder_config(cfg.words.encoder, "text"))
        text_width = text_encoder.config["hidden_size"]
    else:
        params["text"] = text.init_text(cfg.words.tower, gen)
    params |= _init_contrast(cfg, text_width, gen)
    params = map_leaves(lambda leaf: leaf.to("meta"), params)
    return Model(cfg=cfg, vit=vit, text_encoder=text_encoder, tokenizer=None), params


def _empty_encoder(config: dict[str, Any]) -> tuple[skeletons.Skeleton, Tree]:
    encoder = skeletons.empty_skeleton(config)
    return encoder, {name: p.detach() for name, p in encoder.module.named_parameters()}


def _init_contrast(cfg: Config, text_width: int, gen: torch.Generator) -> Tree:
    return {
        "project": {
            "image": _init_projection(fuse.fused_width(cfg.fuse), cfg.contrast.dim, gen),
            "text": _init_projection(text_width, cfg.contrast.dim, gen),
        },
        "contrast": {
            "log_scale": torch.tensor(math.log(cfg.contrast.scale)),
            "bias": torch.tensor(cfg.contrast.bias),
        },
    }


def _check_widths(cfg: Config, vit: skeletons.Skeleton) -> None:
    encode.check_slice_size(cfg.encode, size_of(cfg.ct)[1:], encode.patch_size(vit))
    encoded = encode.embedding_width(cfg.encode, vit)
    expected = cfg.fuse.inputs or cfg.fuse.dim
    if encoded != expected:
        raise ValueError(
            f"fuse.dim must be the width of the slice encoder, {encoded}, found {expected}; set "
            f"fuse.dim={encoded} (and fuse.heads), or fuse.inputs={encoded} to project it to fuse.dim"
        )


def _init_projection(width: int, dim: int, gen: torch.Generator) -> Tree:
    return layers.init_linear(width, dim, gen, std=width**-0.5, bias=False)


def _open_tokenizer(cfg: Config, folder: Path, texts: Sequence[str]) -> Any:
    """The named tokenizer, or byte-level BPE that is trained on `texts` once and kept in the run's folder."""
    name = cfg.words.tokenizer or cfg.words.encoder
    if not cfg.words.tokenizer and Path(name).is_file():
        raise ValueError(f"words.tokenizer must name a tokenizer, such as CLIP's: {name} holds weights alone")
    if name:
        return tokens.tokenizer(name)
    path = folder / "tokenizer"
    if not path.exists() and not texts:
        raise ValueError(f"{path}: the run has no tokenizer yet; train it first")
    # One process trains and writes it, all others read the same file.
    if processes.rank() == 0 and not path.exists():
        tokens.train_bpe(texts, cfg.words.tower.vocabulary, path)
    processes.wait_for_all()
    return tokens.tokenizer(path)


def _check_text_encoder(cfg: WordsConfig, encoder: skeletons.Skeleton, params: Tree) -> int:
    """The width of a named text encoder's rows.

    Raises:
        ValueError: the context is longer than its positions, or `pool` takes a token that does not see the
            text.
    """
    positions = getattr(encoder.module.config, "max_position_embeddings", cfg.tower.context)
    if cfg.tower.context > positions:
        raise ValueError(
            f"words.tower.context must be at most the {positions} positions of {cfg.encoder}, got "
            f"{cfg.tower.context}"
        )
    # Two texts that differ in their second token: a causal encoder gives both the same first row, whatever
    # the report says.
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


# Forward pass -----------------------------------------------------------------------------------------------
def move_batch(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on the device of the computation: copied once, for both passes of gradient caching.

    Slices stay where they are if they would fill a quarter of what is free on a GPU; each chunk is then copied
    when it is embedded.
    """
    if device.type == "cpu":
        return dict(batch)
    free = transfer.free_bytes(device)
    moved = {}
    for name, tensor in batch.items():
        fits = free is None or tensor.nbytes < free // 4
        moved[name] = transfer.to_device(tensor, device) if fits else tensor
    # The host must know which slices exist.
    return moved | {"mask_on_cpu": batch["mask"]}


def embed_volumes(model: Model, params: Tree, batch: Mapping[str, Tensor]) -> Tensor:
    """Rows [b, d] of the image tower, before normalisation and projection.

    Args:
        batch: "slices", voxels uint8 or int16 [b, s, y, x] or features [b, s, d]; "mask" bool and
            "position_mm" [b, s]; `move_batch` puts it on a GPU.
    """
    device = params["fuse"]["norm"]["weight"].device
    slices = transfer.to_device(batch["slices"], device)
    mask = transfer.to_device(batch["mask"], device)
    position_mm = transfer.to_device(batch["position_mm"], device)
    # Four axes are voxels; three are features of a frozen encoder from its cache.
    if slices.dim() == 4:
        existing = batch.get("mask_on_cpu", batch["mask"])
        features = encode_volumes(model, params["vit"], slices, existing)
    else:
        features = slices.float()  # the cache of a frozen encoder holds float16
    return fuse.fuse(model.cfg.fuse, params["fuse"], features, mask, position_mm)


def encode_volumes(model: Model, vit_params: Tree, slices: Tensor, mask: Tensor) -> Tensor:
    """`encode.encode_slices` with the settings of the device that the weights lie on."""
    device = next(iter(vit_params.values())).device
    settings = encoder_settings(model.cfg, device)
    # Weights are in the encoder's precision already; autocast would take norms and sums back to float32.
    plain = settings != model.cfg.encode
    with gradients.autocast(vit_params, "float32") if plain else nullcontext():
        return encode.encode_slices(settings, vit_params, slices, mask, vit=model.vit)


def encoder_settings(cfg: Config, device: torch.device) -> encode.EncodeConfig:
    """How slices are encoded on a device: on a GPU with train.precision = "bfloat16" in bfloat16 throughout.

    Autocast alone keeps the residual stream in float32, and twice the bytes of every sum and norm. A CPU gains
    nothing by it.
    """
    mixed = cfg.train.precision == "bfloat16" and cfg.encode.dtype == "float32"
    if device.type == "cpu" or not mixed:
        return cfg.encode
    return evolve(cfg.encode, dtype="bfloat16")


def embed_texts(model: Model, params: Tree, batch: Mapping[str, Tensor]) -> Tensor:
    """Rows [b, k, d] of the text tower, k texts of each volume, before normalisation and projection.

    Args:
        batch: "ids" and "words" (their mask), [b, k, t].
    """
    device = params["project"]["text"]["weight"].device
    # The text towers take [n, t]: the k texts of a volume are rows of their own until the end.
    ids = transfer.to_device(batch["ids"], device).flatten(0, 1)
    mask = transfer.to_device(batch["words"], device).flatten(0, 1)
    if model.text_encoder is not None:
        pool = model.cfg.words.pool
        rows = text.encode_text_with(params["text"], ids, mask, model=model.text_encoder, pool=pool)
    else:
        rows = text.encode_text(model.cfg.words.tower, params["text"], ids, mask)
    return rows.unflatten(0, batch["ids"].shape[:2])


def batch_statistics(cfg: ContrastConfig, rows: Tensor) -> Tree:
    """What `place` normalises rows [..., d] with: {"mean" [d]} and, to standardise, {"variance" [d]} over the
    batch.
    """
    if cfg.normalise == "none":
        return {}
    # bfloat16 has 8 bits: means and variances over a batch need float32.
    rows = rows.float().flatten(0, -2)
    statistics: Tree = {"mean": rows.mean(0)}
    if cfg.normalise == "standardise":
        statistics["variance"] = rows.var(0, correction=0)
    return statistics


def place(params: Tree, side: Literal["image", "text"], rows: Tensor, statistics: Tree) -> Tensor:
    """Rows [..., d] of a tower in the common space: normalised, projected, of L2 norm 1.

    Args:
        statistics: of the batch when training (`batch_statistics`), else the running ones,
            `params["running"][side]`.
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
    """The loss over {"image" [b, d], "text" [b, k, d]} of a whole batch, normalised over that batch; the mean
    over the k texts. With gather = "local" it is that of this process's rows.
    """
    own = slice(None) if cfg.gather == "global" else processes.own_rows(len(rows["image"]))
    statistics = {side: batch_statistics(cfg, tower) for side, tower in rows.items()}
    image = place(params, "image", rows["image"], statistics["image"])
    texts = place(params, "text", rows["text"], statistics["text"])
    scale = params["contrast"]["log_scale"].exp()
    # Each of the k texts makes a loss of its own against all volumes: texts of one volume are no negatives of
    # each other.
    loss_of_text = []
    for one_text in texts.unbind(1):
        if cfg.loss == "clip":
            loss_of_text.append(losses.clip_loss(image, one_text, scale, own))
        else:
            bias = params["contrast"]["bias"]
            loss_of_text.append(losses.siglip_loss(image, one_text, scale, bias, own))
    return torch.stack(loss_of_text).mean(), gradients.Aux(metrics={"scale": scale}, means=statistics)


def contrastive_gradient(
    model: Model,
    frozen: Tree,
    before_chunk: Callable[[], None] = lambda: None,
    gather: Callable[[Tree], Tree] = shards.lazy_shards,
) -> gradients.Grad:
    """The gradient of the loss over a batch by the parameters that are trained; `frozen` are all others.

    The loss compares all rows of a batch, which does not fit into memory with its activations: rows are
    embedded `train.chunk` at a time, and the gradient is put together from them.

    Args:
        before_chunk: is called when a chunk begins.
        gather: makes weights of shards.
    """
    cfg = model.cfg
    # Weights that were gathered are let go after each layer, and gathered again for its gradient.
    if cfg.train.shard:
        text_encoder = model.text_encoder and skeletons.checkpointed(model.text_encoder)
        model = evolve(model, vit=skeletons.checkpointed(model.vit), text_encoder=text_encoder)

    def embed(p: Tree, batch: gradients.Batch) -> gradients.Batch:
        before_chunk()
        merged = gather(merge_trees(frozen, p))
        return {"image": embed_volumes(model, merged, batch), "text": embed_texts(model, merged, batch)}

    def contrast(p: Tree, rows: gradients.Batch) -> tuple[Tensor, gradients.Aux]:
        return contrastive_loss(cfg.contrast, merge_trees(frozen, p), rows)

    gradient = gradients.cached_value_and_grad(
        embed,
        contrast,
        chunk=cfg.train.chunk,
        precision=cfg.train.precision,
        local=cfg.contrast.gather == "local",
    )

    def run(p: Tree, batch: gradients.Batch) -> tuple[Tensor, gradients.Aux, Tree]:
        device = next(iter(flatten(p).values())).device
        return gradient(p, move_batch(batch, device))

    return run


def bound_scale(cfg: ContrastConfig, params: Tree) -> Tree:
    """Trained leaves after a step, the logit scale at most `scale_max` (100 in CLIP)."""
    log_scale = params.get("contrast", {}).get("log_scale")
    if log_scale is None:  # a stage that does not train it
        return params
    bounded = log_scale.clamp(max=math.log(cfg.scale_max))
    return merge_trees(params, {"contrast": {"log_scale": bounded}})
