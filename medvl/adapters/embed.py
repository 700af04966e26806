"""Queries of text and images as unit vectors, by which adapters are found: fitted here, from an encoder of
the hub, or given.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import torch
from attrs import evolve, field, frozen
from PIL import Image
from torch import Tensor, nn

from medvl.adapters import embed_local
from medvl.adapters.retrieve import query_vector
from medvl.base import config, files
from medvl.base.display import track
from medvl.components.text import pool_tokens
from medvl.hub import loading, skeletons, tokens
from medvl.hub.checkpoints import find_file, new_folder, open_weights, read_json, save_finite
from medvl.language.images import Picture, cap_pixels, check_window, open_image, to_rgb

# b queries, n texts or images of them, d width of a vector, e width behind a head
_FORMAT = "medvl embedder 1"
# Settings that change the vectors, and so belong to the name of an embedder.
_NAMED_SETTINGS = {
    "local": ("dims", "shares", "max_images", "max_pixels"),
    "text": ("instruction", "pool", "dims", "context"),
    "image_text": ("instruction", "dims", "context", "shares", "max_images", "max_pixels"),
}
Pictures = Sequence[Sequence[files.PathLike | bytes | Picture]]  # of each query


@frozen(kw_only=True)
class EmbedConfig:
    """How a query becomes a vector.

    "local" is fitted to texts and images (`fit_local`); "text" and "image_text" (CLIP, SigLIP) are encoders
    of the hub. Texts or images whose share is 0 are not used; a query with only one of them takes that alone.
    """

    kind: Literal["local", "text", "image_text"] = "local"
    name: str = ""  # folder or hub name of the encoder
    # Of encoders: before every text, such as "Represent the sentence for similar task retrieval: ".
    instruction: str = ""
    pool: Literal["first", "last", "mean", "max"] = "mean"  # of "text": the one the encoder was trained with
    # The first dims of a Matryoshka embedding, 0 = all; of "local": components of texts and of images at
    # most, 0 = 64.
    dims: int = 0
    context: int = 512  # tokens; an encoder with fewer positions takes as many as it has
    shares: tuple[float, float] = (0.7, 0.3)  # of text and of images
    max_images: int = 2  # the first images of a query are used, up to so many
    max_pixels: int = 100_000  # larger images are made smaller before they are encoded
    # (black, white): the greys of 16-bit and DICOM images that are shown as 0 and 255.
    window: tuple[float, ...] = ()
    batch: int = 32

    def __attrs_post_init__(self) -> None:
        if self.kind not in _NAMED_SETTINGS or self.pool not in ("first", "last", "mean", "max"):
            raise ValueError(
                f"EmbedConfig: kind must be one of {', '.join(_NAMED_SETTINGS)}, pool first, last, mean or "
                f"max, got {self}"
            )
        is_encoder = self.kind in ("text", "image_text")
        if is_encoder != bool(self.name) or (self.instruction and not is_encoder):
            raise ValueError(
                "EmbedConfig: 'text' and 'image_text' need a name, 'local' has none, only they have an "
                "instruction, "
                f"got {self}"
            )
        if self.dims < 0 or self.context < 3 or min(self.max_images, self.max_pixels, self.batch) < 1:
            raise ValueError(
                "EmbedConfig: dims must be >= 0, context >= 3, max_images, max_pixels and batch >= 1, "
                f"got {self}"
            )
        are_shares = len(self.shares) == 2 and all(isfinite(share) and share >= 0 for share in self.shares)
        if not are_shares or not any(self.shares):
            raise ValueError(f"EmbedConfig: shares must be two numbers >= 0, one above 0, got {self.shares}")
        config.check_bounds(
            self,
            "EmbedConfig",
            dims=config.WIDTH_OR_NONE,
            context=(3, 2**20),
            batch=(1, 2**20),
            shares=(0, 1e6),
        )
        config.check_bounds(self, "EmbedConfig", max_images=(1, 2**20), max_pixels=(1, 2**28))
        check_window(self.window, "EmbedConfig.window")


class NothingToEmbed(ValueError):
    """There are `rows` without anything that can be embedded."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        # Both arguments, so that the exception survives pickling; `__str__` shows the message alone.
        super().__init__(message, rows)
        self.rows = tuple(rows)

    def __str__(self) -> str:
        return str(self.args[0])


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


@torch.no_grad()
def embed_queries(embedder: Embedder, texts: Sequence[str], images: Pictures = ()) -> Tensor:
    """The vectors of queries, float32 [b, d] of length 1 on the CPU; they depend on the batch by no more than
    rounding.

    Args:
        texts: [b]; `<image>` tags are taken out. A blank text takes no share, nor does one without a word
            that "local" knows.
        images: [b] sequences, empty ones too, of paths, contents of files or pictures; () = no images.
            Several: the mean of their vectors.
    Raises:
        NothingToEmbed: rows with neither text nor image to embed (a ValueError; its `rows` are all of them).
        ValueError: images for "text" with a share above 0, or for "local" that was fitted without; an image
            that cannot be read; dims above the width, a head of another width.
    """
    cfg = embedder.cfg
    words, pictures = _check_queries("embed", cfg, texts, images)
    with_images = any(pictures)
    if with_images:
        _check_takes_images(embedder, pictures)
    if cfg.kind == "local":
        text, has_text = embed_local.text_directions(embedder.tokenizer, embedder.params, words)
    else:
        text, has_text = _encode_texts(embedder, words)
    # Stand-ins until there are images; `has_image` says that no row takes them.
    image = text
    has_image = torch.zeros_like(has_text)
    if with_images and cfg.kind == "local":
        image, has_image = _local_images(embedder, pictures)
    elif with_images:
        image, has_image = _encode_images(embedder, pictures)
    empty = (~(has_text | has_image)).nonzero()
    if len(empty):
        _raise_nothing(cfg, texts, words, pictures, empty[:, 0].tolist())

    if cfg.kind == "local":
        # Coordinates [text, image], so that the cosine of a text and an image is 0.
        text, image = embed_local.side_by_side(embedder.params, text, image, with_images)
    # A row without a text takes its image as its text too, so that it takes the image alone.
    text_or_image = torch.where(has_text[:, None], text, image)
    if not with_images:
        return _apply_head(embedder, query_vector(text_or_image, None))
    return _apply_head(embedder, query_vector(text_or_image, image, cfg.shares, has_image=has_image))


def _check_takes_images(embedder: Embedder, pictures: Sequence[Sequence[Any]]) -> None:
    row = next(i for i, images in enumerate(pictures) if images)
    if embedder.cfg.kind == "text":
        raise ValueError(
            f"embed: kind 'text' takes no images, but row {row} has {len(pictures[row])}; "
            "set shares = [1, 0] to leave images out, or use kind 'image_text'"
        )
    if embedder.cfg.kind == "local" and "image.components" not in embedder.params:
        raise ValueError(
            f"embed: row {row} has images, but {embedder.name} was fitted without any; fit it again, with "
            "images"
        )


def _raise_nothing(
    cfg: EmbedConfig,
    texts: Sequence[str],
    words: Sequence[str],
    pictures: Sequence[Sequence[Any]],
    rows: list[int],
) -> None:
    """Raise for rows without anything to embed; the message describes the first of them."""
    row = rows[0]
    if words[row] and cfg.kind == "local":
        problem = "of which no word is known"
    elif cfg.shares[0]:
        problem = "without words"
    else:
        problem = "whose share is 0"
    message = (
        f"embed: row {row} has nothing to embed: a text {problem} ({texts[row][:60]!r}) "
        f"and {len(pictures[row])} images that count"
    )
    raise NothingToEmbed(message, rows)


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
    words, pictures = _check_queries("fit_local", cfg, texts, images)
    components = cfg.dims or 64
    vocabulary, params = embed_local.fit_texts(components, [text for text in words if text])
    features = []
    for row, place, source in track(_enumerate_pictures(pictures), "reading images"):
        features.append(embed_local.image_features(_open_picture("fit_local", cfg, row, place, source)))
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


# Queries ----------------------------------------------------------------------------------------------------
def _check_queries(
    where: str, cfg: EmbedConfig, texts: Sequence[str], images: Pictures
) -> tuple[list[str], list[list[Any]]]:
    """(texts without tags, the images that are used) of each row; nothing where the share is 0."""
    # A single string is a sequence of texts to Python, one for each letter.
    if isinstance(texts, str) or not len(texts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{where}: texts must be a list of at least one text, got {type(texts).__name__} of {len(texts)}"
        )
    # Likewise a row that is one image instead of a list of images.
    one_image = str | bytes | Path | Image.Image | np.ndarray | Tensor
    if len(images) not in (0, len(texts)) or any(isinstance(row, one_image) for row in images):
        raise ValueError(
            f"{where}: images must be a list of images for each of the {len(texts)} texts, got "
            f"{len(images)} items"
        )
    words = [""] * len(texts)
    pictures: list[list[Any]] = [[] for _ in texts]
    if cfg.shares[0]:
        # The tag goes with the line break that templates put after it.
        words = [re.sub("<image>\n?", "", text).strip() for text in texts]
    if cfg.shares[1] and len(images):
        pictures = [list(row)[: cfg.max_images] for row in images]
    return words, pictures


def _enumerate_pictures(pictures: Sequence[Sequence[Any]]) -> list[tuple[int, int, Any]]:
    """(row, place in it, picture) of all pictures."""
    return [
        (row, place, source) for row, images in enumerate(pictures) for place, source in enumerate(images)
    ]


def _open_picture(where: str, cfg: EmbedConfig, row: int, place: int, source: Any) -> Image.Image:
    """A picture as RGB with at most cfg.max_pixels."""
    where = f"{where}: image {place} of row {row}"
    if isinstance(source, str | bytes | Path):
        try:
            image = open_image(source, window=check_window(cfg.window, "EmbedConfig.window"), only_deep=True)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
    else:
        image = to_rgb(source, where)
    return cap_pixels(image, cfg.max_pixels)


def _first_dims(where: str, cfg: EmbedConfig, vectors: Tensor) -> Tensor:
    """The first cfg.dims of each row, of length 1."""
    if cfg.dims > vectors.shape[1]:
        raise ValueError(
            f"{where}: dims must be at most the width {vectors.shape[1]} of the embedding, got {cfg.dims}"
        )
    # A prefix of a Matryoshka embedding (Kusupati et al. 2022, arXiv:2205.13147) is an embedding once it has
    # length 1 again.
    return query_vector(vectors[:, : cfg.dims or None], None)


def _apply_head(embedder: Embedder, vectors: Tensor) -> Tensor:
    head = embedder.head
    if head is None:
        return vectors
    if head.shape[0] != vectors.shape[1]:
        raise ValueError(
            f"embed: the head must be [{vectors.shape[1]}, e] like the vectors, got {list(head.shape)}"
        )
    # The map changes lengths, and cosines are taken as products of unit vectors later.
    return query_vector(vectors @ head, None)


def _mean_per_row(vectors: Tensor, rows: Sequence[int], b: int) -> tuple[Tensor, Tensor]:
    """(mean of the vectors [n, d] of each of b rows, whether a row has one)."""
    index = torch.tensor(rows, dtype=torch.int64)
    count = torch.bincount(index, minlength=b)
    sums = torch.zeros(b, vectors.shape[1]).index_add(0, index, vectors)
    # clamp: rows without a vector are 0 / 1, and the flag says that they have none.
    return sums / count.clamp(min=1)[:, None], count > 0


def _local_images(embedder: Embedder, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
    """(vectors of images float32 [b, d], whether a row has one) by the fitted features."""
    sources = _enumerate_pictures(pictures)
    # A generator: one picture is in memory at a time.
    opened = (_open_picture("embed", embedder.cfg, *source) for source in track(sources, "embedding images"))
    directions, has_direction = embed_local.image_directions(embedder.params, opened)
    flags = has_direction.tolist()
    # A picture like the mean of all has no direction, and does not count in its row's mean.
    rows = [row for (row, _, _), flag in zip(sources, flags, strict=True) if flag]
    return _mean_per_row(directions[has_direction], rows, len(pictures))


def _named(embedder: Embedder) -> Embedder:
    """The embedder with its name: kind, encoder, and digests of settings and weights."""
    cfg = embedder.cfg
    # Batch size and the like change no vector, and so no name.
    settings = {name: value for name, value in attrs.asdict(cfg).items() if name in _NAMED_SETTINGS[cfg.kind]}
    settings["vocabulary"] = embedder.vocabulary
    if cfg.window:  # without one, an embedder has the name it had before there were windows
        settings["window"] = cfg.window
    weights = {f"params.{name}": tensor for name, tensor in embedder.params.items()}
    if embedder.head is not None:
        weights["head"] = embedder.head
    parts: list[str] = [cfg.kind]
    if cfg.name:
        # The last part of a path only: a model folder that is moved keeps the embedder's name.
        parts.append(Path(cfg.name).name)
    parts += [config.record_digest(settings), skeletons.weights_digest(weights)]
    return evolve(embedder, name=":".join(parts))


# Encoders of the hub ----------------------------------------------------------------------------------------
def _encode_texts(embedder: Embedder, words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(vectors of texts float32 [b, d], whether a row has one)."""
    cfg = embedder.cfg
    with_text = [i for i, text in enumerate(words) if text]
    has_text = torch.zeros(len(words), dtype=torch.bool)
    has_text[with_text] = True
    if not with_text:
        # Width 1 is enough: it is broadcast against the images, which every row must then have.
        return torch.zeros(len(words), cfg.dims or 1), has_text
    rows = _token_ids(embedder, [cfg.instruction + words[i] for i in with_text])
    # Texts of about one length are encoded together: little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = list[Tensor]()
    for start in track(range(0, len(order), cfg.batch), "embedding texts, batch"):
        batch = [rows[i] for i in order[start : start + cfg.batch]]
        batches.append(_encode_token_ids(embedder, batch).float().cpu())
    vectors = _first_dims("embed", cfg, torch.cat(batches))
    # `index_copy` undoes the sorting by length and leaves rows without a text at 0.
    places = torch.tensor(with_text)[order]
    return torch.zeros(len(words), vectors.shape[1]).index_copy(0, places, vectors), has_text


def _encode_token_ids(embedder: Embedder, rows: list[list[int]]) -> Tensor:
    """Token ids as vectors [n, d]; padded behind, which neither bidirectional nor causal encoders see."""
    cfg, skeleton, tok = embedder.cfg, embedder.skeleton, embedder.tokenizer
    assert skeleton is not None
    device = next(iter(embedder.params.values())).device
    is_siglip = skeleton.config["model_type"] == "siglip"
    length = max(map(len, rows))
    if is_siglip:  # it reads the last place and was trained with padding up to it, which it sees
        length = _max_tokens(embedder)
    # Any id will do where a tokenizer has none to pad with: the mask hides it.
    pad = next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(length) < lengths[:, None]).to(device)
    arguments = {"input_ids": ids}
    if not is_siglip:
        arguments["attention_mask"] = mask.long()
    # The caller's autocast would make the vectors of one embedder differ from each other.
    with torch.autocast(device.type, enabled=False):
        if cfg.kind == "image_text":
            pixels = _blank_image(skeleton, device)  # the forward pass needs texts and images
            return skeleton(embedder.params, pixel_values=pixels, **arguments).text_embeds
        states = skeleton(embedder.params, **arguments).last_hidden_state
        return pool_tokens(cfg.pool, states, mask)


def _encode_images(embedder: Embedder, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
    """(vectors of images float32 [b, d], whether a row has one)."""
    cfg, skeleton = embedder.cfg, embedder.skeleton
    assert skeleton is not None
    device = next(iter(embedder.params.values())).device
    sources = _enumerate_pictures(pictures)
    word = torch.zeros(1, 1, dtype=torch.int64, device=device)  # the forward pass needs texts and images
    batches = list[Tensor]()
    for start in track(range(0, len(sources), cfg.batch), "embedding images, batch"):
        opened = [_open_picture("embed", cfg, *source) for source in sources[start : start + cfg.batch]]
        pixels = embedder.processor(images=opened, return_tensors="pt")["pixel_values"].to(device)
        with torch.autocast(device.type, enabled=False):
            output = skeleton(embedder.params, input_ids=word, pixel_values=pixels)
        batches.append(output.image_embeds.float().cpu())
    vectors = _first_dims("embed", cfg, torch.cat(batches))
    return _mean_per_row(vectors, [row for row, _, _ in sources], len(pictures))


def _blank_image(skeleton: skeletons.Skeleton, device: torch.device) -> Tensor:
    vision = skeleton.config["vision_config"]
    return torch.zeros(1, vision["num_channels"], vision["image_size"], vision["image_size"], device=device)


def _token_ids(embedder: Embedder, texts: list[str]) -> list[list[int]]:
    """Token ids of texts; of one that is too long the tokenizer keeps its end token, if it sets one."""
    tok = embedder.tokenizer
    limit = min(embedder.cfg.context, _max_tokens(embedder))
    # The tokenizer's own warning is silenced; ours below counts the texts.
    rows = tok(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    too_long = [i for i, row in enumerate(rows) if len(row) > limit]
    if too_long:
        warnings.warn(
            f"embed: {len(too_long)} of {len(rows)} texts are longer than {limit} tokens and were cut off",
            stacklevel=5,  # the caller of embed_queries
        )
        for i in too_long:
            rows[i] = _truncate(tok, texts[i], limit)
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(
                f"embed: the tokenizer of {embedder.cfg.name} must give every text a token, it gives "
                f"{text[:60]!r} none"
            )
    return rows


def _truncate(tok: Any, text: str, limit: int) -> list[int]:
    """At most `limit` token ids of a text.

    `truncation=True` would change a setting of the tokenizer, which other threads use meanwhile.
    """
    backend = tok.backend_tokenizer
    encoding = backend.encode(text, add_special_tokens=False)
    # Room is left for the special tokens that post_process adds, so that an end token survives.
    encoding.truncate(limit - backend.num_special_tokens_to_add(False), direction=tok.truncation_side)
    return backend.post_process(encoding).ids


def _max_tokens(embedder: Embedder) -> int:
    """The longest text, in tokens, that the encoder and its tokenizer are made for."""
    assert embedder.skeleton is not None
    settings = embedder.skeleton.config
    settings = settings.get("text_config", settings)
    limits = [
        settings.get("max_position_embeddings") or 10**9,
        # transformers gives 10**30 where a tokenizer has no limit.
        int(min(embedder.tokenizer.model_max_length, 10**9)),
    ]
    for name, module in embedder.skeleton.module.named_modules():
        is_table = name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            # RoBERTa and MPNet count positions from behind the padding id.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)
