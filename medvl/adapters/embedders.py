"""Embedders: fitted to texts and images, opened from an encoder of the hub, saved and read.

In shapes d is the width of a vector, e its width behind a head.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor

from medvl.adapters import embed_local
from medvl.adapters.embed_config import NAMED_SETTINGS, EmbedConfig
from medvl.adapters.queries import Pictures, check_queries, enumerate_pictures, open_picture
from medvl.base import config, files
from medvl.base.display import track
from medvl.hub import loading, skeletons, tokens
from medvl.hub.checkpoints import find_file, new_folder, open_weights, read_json, save_finite

_FORMAT = "medvl embedder 1"


@frozen(kw_only=True, eq=False)
class Embedder:
    """What `embed_queries` needs; threads may share it.

    The name is made of the content: embedders of one name give the same vectors.
    """

    cfg: EmbedConfig
    name: str = ""
    params: Mapping[str, Tensor] = field(factory=dict, repr=False)
    vocabulary: tuple[str, ...] = field(default=(), repr=False)  # of "local"
    head: Tensor | None = field(default=None, repr=False)  # [d, e], see `with_head`
    skeleton: skeletons.Skeleton | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)  # of "local": text to TF-IDF
    processor: Any = field(default=None, repr=False)  # of "image_text"


def open_embedder(cfg: EmbedConfig, *, device: str | torch.device = "cpu") -> Embedder:
    """An embedder with an encoder of the hub, its weights float32 on `device`.

    Further layers that sentence-transformers stores beside an encoder (Dense) are not read; give one of them
    as a head.

    Raises:
        ValueError: kind "local" (fit or read one), an encoder of another kind, whatever `load_skeleton` and
            the tokenizer raise.
    """
    if cfg.kind == "local":
        raise ValueError(
            "open_embedder: kind 'local' is fitted to texts and images: use fit_local, or read_embedder of "
            "a saved one"
        )
    encoder_config = read_json(find_file(cfg.name, ("config.json",)))
    model_type = encoder_config.get("model_type")
    with_images = cfg.kind == "image_text"
    if with_images and model_type not in ("clip", "siglip"):
        raise ValueError(
            f"open_embedder: kind 'image_text' needs a clip or siglip model, {cfg.name} is a {model_type}"
        )
    is_text_only = "vision_config" not in encoder_config
    is_one_stack = not encoder_config.get("is_encoder_decoder") and model_type != "t5"
    if not with_images and not (is_text_only and is_one_stack):
        raise ValueError(
            f"open_embedder: kind 'text' needs an encoder or decoder of text alone, {cfg.name} is a "
            f"{model_type}"
        )
    skeleton, params = loading.load_skeleton(cfg.name, device=device)
    processor = None
    # Where images have no share the encoder's image processor is never needed.
    if with_images and cfg.shares[1]:
        processor = tokens.image_processor(cfg.name)
    embedder = Embedder(
        cfg=cfg,
        params=params,
        skeleton=skeleton,
        tokenizer=tokens.tokenizer(cfg.name),
        processor=processor,
    )
    return _named(embedder)


def fit_local(cfg: EmbedConfig, texts: Sequence[str], images: Pictures = ()) -> Embedder:
    """An embedder that needs no encoder, fitted to the queries of training splits: words for texts, colours
    and edges for images.

    Texts: TF-IDF of words and pairs of words (sublinear), truncated SVD. Images: histogram, thumbnail, edge
    energy and spectrum, standardised, PCA. Each has its own coordinates, [text, image], so cosines of the two
    never mix. The same input gives the same embedder.
    Args:
        texts, images: as in `embed_queries`.
    Raises:
        ValueError: another kind, nothing to fit to, images that are all the same.
    Source: Deerwester et al. 1990, latent semantic analysis; scikit-learn's TfidfVectorizer, TruncatedSVD and
    PCA.
    """
    if cfg.kind != "local":
        raise ValueError(f"fit_local: only for kind 'local', got {cfg.kind!r}; use open_embedder")
    words, pictures = check_queries("fit_local", cfg, texts, images)
    components = cfg.dims or 64
    vocabulary, params = embed_local.fit_texts(components, [text for text in words if text])
    features = []
    for row, place, source in track(enumerate_pictures(pictures), "reading images"):
        features.append(embed_local.image_features(open_picture("fit_local", cfg, row, place, source)))
    if features:
        params |= embed_local.fit_images(components, np.stack(features))
    if not params:
        raise ValueError(
            "fit_local: the texts must have words of two letters or more, or there must be images, "
            f"got {len(texts)} rows"
        )
    embedder = Embedder(
        cfg=cfg,
        params=params,
        vocabulary=vocabulary,
        tokenizer=embed_local.vectorizer_of(vocabulary, params),
    )
    return _named(embedder)


def with_head(embedder: Embedder, head: Tensor | None) -> Embedder:
    """The embedder with a linear map [d, e] behind it, such as a trained one.

    Vectors are multiplied by it and normalised again.

    Raises:
        ValueError: not a finite floating point matrix.
    """
    if head is None:
        return _named(evolve(embedder, head=None))
    is_matrix = head.dim() == 2 and head.numel() and head.is_floating_point()
    if not is_matrix or not bool(head.isfinite().all()):
        raise ValueError(
            f"with_head: head must be finite floating point [d, e], got {head.dtype} {list(head.shape)}"
        )
    # On the CPU in float32, where all vectors are; a copy, since the name is made of its content.
    return _named(evolve(embedder, head=head.detach().float().cpu().clone()))


def save_embedder(embedder: Embedder, folder: files.PathLike) -> None:
    """Write embedder.json and embedder.safetensors; of an encoder its name and a digest, not its weights.

    The folder is written as a whole or not at all.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    state = dict[str, Tensor]()
    if embedder.cfg.kind == "local":
        # An encoder's weights stay where they are: its name finds them, and the digest tells a change.
        state = dict(embedder.params)
    if embedder.head is not None:
        state["head"] = embedder.head
    record = {
        "format": _FORMAT,
        "name": embedder.name,
        "cfg": config.unstructure(embedder.cfg),
        "vocabulary": embedder.vocabulary,
    }
    with new_folder(folder) as tmp:
        save_finite(state, tmp / "embedder.safetensors", "save_embedder")
        files.write_text(tmp / "embedder.json", json.dumps(record, ensure_ascii=False) + "\n")


def read_embedder(folder: files.PathLike, *, device: str | torch.device = "cpu") -> Embedder:
    """What `save_embedder` wrote, exactly; an encoder is found again by its name.

    Raises:
        ValueError: not such a folder, broken, or the content is no longer what its name says (an encoder with
            other weights).
    """
    record, cfg = _read_settings(folder)
    entries = open_weights(find_file(str(folder), ("embedder.safetensors",)), str(folder))
    state = {name: entry.read() for name, entry in entries.items()}
    head = state.pop("head", None)
    if cfg.kind == "local":
        embedder = Embedder(cfg=cfg, params=state, vocabulary=tuple(record["vocabulary"]))
    else:
        embedder = open_embedder(cfg, device=device)
    try:
        if cfg.kind == "local":
            embed_local.check_fitted(embedder.vocabulary, state)
        # Names the embedder anew from its content, which the next check compares with what was written.
        embedder = with_head(embedder, head)
    except ValueError as e:
        raise ValueError(f"read_embedder: {folder}: {e}") from e
    if embedder.name != record["name"]:
        reason = "the file was changed"
        if cfg.kind != "local":
            reason = f"the file or the encoder {cfg.name} was changed"
        raise ValueError(
            f"read_embedder: {folder} must be {record['name']}, but its content is {embedder.name}: {reason}"
        )
    if cfg.kind == "local":
        # Last: what is not what its name says makes no vectorizer.
        return evolve(embedder, tokenizer=embed_local.vectorizer_of(embedder.vocabulary, state))
    return embedder


def check_embedder(folder: files.PathLike) -> None:
    """Raise where `read_embedder` will, as far as this can be told without reading weights.

    To be called before other long work.

    Raises:
        ValueError: not such a folder, broken, or its encoder is not there.
    """
    _, cfg = _read_settings(folder)
    find_file(str(folder), ("embedder.safetensors",))
    # An encoder is looked for by its config.json, which is small.
    if cfg.kind in ("text", "image_text"):
        find_file(cfg.name, ("config.json",))


def _read_settings(folder: files.PathLike) -> tuple[dict[str, Any], EmbedConfig]:
    """The record in embedder.json of a saved embedder, and the settings in it."""
    if not Path(folder).is_dir():
        raise ValueError(f"read_embedder: there is no folder {folder}")
    path = find_file(str(folder), ("embedder.json",))
    record = read_json(path)
    is_complete = {"name", "cfg"} <= record.keys() and isinstance(record.get("vocabulary"), list)
    if record.get("format") != _FORMAT or not is_complete:
        raise ValueError(
            f"read_embedder: {path} must be {_FORMAT!r} with name, cfg and vocabulary, found "
            f"{record.get('format')!r}"
        )
    return record, config.structure(record["cfg"], EmbedConfig, source=str(path))


def _named(embedder: Embedder) -> Embedder:
    """The embedder with its name: kind, encoder, and digests of settings and weights."""
    cfg = embedder.cfg
    # Batch size and the like change no vector, and so no name.
    settings = {name: value for name, value in attrs.asdict(cfg).items() if name in NAMED_SETTINGS[cfg.kind]}
    settings["vocabulary"] = embedder.vocabulary
    if cfg.window:  # without one, an embedder has the name it had before there were windows
        settings["window"] = cfg.window
    weights = {f"params.{name}": tensor for name, tensor in embedder.params.items()}
    if embedder.head is not None:
        weights["head"] = embedder.head
    name_parts: list[str] = [cfg.kind]
    if cfg.name:
        # The last part of a path only: a model folder that is moved keeps the embedder's name.
        name_parts.append(Path(cfg.name).name)
    name_parts += [config.record_digest(settings), skeletons.weights_digest(weights)]
    return evolve(embedder, name=":".join(name_parts))
