"""Queries of text and images as unit vectors, by which adapters are found: fitted here, from an encoder of the hub, or given."""

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

# b queries, n texts or images of them, d width of a vector, e that behind a head
_FORMAT = "medvl embedder 1"
_MATTERS = {  # settings that change the vectors
    "local": ("dims", "shares", "max_images", "max_pixels"),
    "text": ("instruction", "pool", "dims", "context"),
    "image_text": ("instruction", "dims", "context", "shares", "max_images", "max_pixels"),
    "vectors": ("dims",),
}
Pictures = Sequence[Sequence[files.PathLike | bytes | Picture]]  # per query


@frozen(kw_only=True)
class EmbedConfig:
    """How a query becomes a vector.

    "local" is fitted to texts and images (`fit_local`), "text" and "image_text" (CLIP, SigLIP) are encoders of the hub, of "vectors" the
    caller brings the vectors. A side whose share is 0 is not looked at; a query with one side takes that alone.
    """

    kind: Literal["local", "text", "image_text", "vectors"] = "local"
    name: str = ""  # folder or hub name of the encoder; of "vectors", what made them
    instruction: str = (
        ""  # of encoders: before every text, such as "Represent the sentence for similar task retrieval: "
    )
    pool: Literal["first", "last", "mean", "max"] = "mean"  # of "text": the one the encoder was trained with
    dims: int = (
        0  # the first of a Matryoshka embedding, 0 = all; of "local": components per side at most, 0 = 64
    )
    context: int = 512  # tokens; an encoder with fewer positions takes as many as it has
    shares: tuple[float, float] = (0.7, 0.3)  # of text and of images
    max_images: int = 2  # the first images of a query that count
    max_pixels: int = 100_000  # larger images are made smaller before they are looked at
    window: tuple[
        float, ...
    ] = ()  # (black, white): the greys of 16-bit and DICOM images that are shown as 0 and 255
    batch: int = 32

    def __attrs_post_init__(self) -> None:
        if self.kind not in _MATTERS or self.pool not in ("first", "last", "mean", "max"):
            raise ValueError(
                f"EmbedConfig: kind must be one of {', '.join(_MATTERS)}, pool first, last, mean or max, got {self}"
            )
        encoder = self.kind in ("text", "image_text")
        if (
            (encoder and not self.name)
            or (self.kind == "local" and self.name)
            or (self.instruction and not encoder)
        ):
            raise ValueError(
                f"EmbedConfig: 'text' and 'image_text' need a name, 'local' has none, only they have an instruction, got {self}"
            )
        if self.dims < 0 or self.context < 3 or min(self.max_images, self.max_pixels, self.batch) < 1:
            raise ValueError(
                f"EmbedConfig: dims must be >= 0, context >= 3, max_images, max_pixels and batch >= 1, got {self}"
            )
        if (
            len(self.shares) != 2
            or not all(isfinite(s) and s >= 0 for s in self.shares)
            or not any(self.shares)
        ):
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

    def __init__(self, said: str, rows: Sequence[int]) -> None:
        super().__init__(said, rows)
        self.rows = tuple(rows)

    def __str__(self) -> str:
        return str(self.args[0])


@frozen(kw_only=True, eq=False)
class Embedder:
    """What `embed_queries` needs. `name` says what it is, by content: embedders of one name give the same vectors. Threads may share it."""

    cfg: EmbedConfig
    name: str = ""
    params: Mapping[str, Tensor] = field(factory=dict, repr=False)
    vocabulary: tuple[str, ...] = field(default=(), repr=False)  # of "local"
    head: Tensor | None = field(default=None, repr=False)  # [d, e], see `with_head`
    skeleton: skeletons.Skeleton | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)  # of "local": text to TF-IDF
    processor: Any = field(default=None, repr=False)  # of "image_text"


def open_embedder(cfg: EmbedConfig, *, device: str | torch.device = "cpu") -> Embedder:
    """An embedder with an encoder of the hub, its weights float32 on `device`; or one of vectors, which needs nothing.

    Further layers that sentence-transformers keeps beside an encoder (Dense) are not read; give one of them as a head.
    Raises:
        ValueError: kind "local" (fit or read one), an encoder of another kind, whatever `loading.load_skeleton` and the tokenizer say.
    """
    if cfg.kind == "local":
        raise ValueError(
            "open_embedder: kind 'local' is fitted to texts and images: use fit_local, or read_embedder of a saved one"
        )
    if cfg.kind == "vectors":
        return _named(Embedder(cfg=cfg))
    about = read_json(find_file(cfg.name, ("config.json",)))
    model, both = about.get("model_type"), cfg.kind == "image_text"
    if both and model not in ("clip", "siglip"):
        raise ValueError(
            f"open_embedder: kind 'image_text' needs a clip or siglip model, {cfg.name} is a {model}"
        )
    if not both and ("vision_config" in about or about.get("is_encoder_decoder") or model == "t5"):
        raise ValueError(
            f"open_embedder: kind 'text' needs an encoder or decoder of text alone, {cfg.name} is a {model}"
        )
    skeleton, params = loading.load_skeleton(cfg.name, device=device)
    processor = tokens.image_processor(cfg.name) if both and cfg.shares[1] else None
    return _named(
        Embedder(
            cfg=cfg,
            params=params,
            skeleton=skeleton,
            tokenizer=tokens.tokenizer(cfg.name),
            processor=processor,
        )
    )


def with_head(embedder: Embedder, head: Tensor | None) -> Embedder:
    """The embedder with a linear map [d, e] behind it, such as a trained one: vectors are multiplied by it and normalised again.

    Raises:
        ValueError: not a finite floating point matrix.
    """
    if head is not None and (
        head.dim() != 2 or not head.numel() or not head.is_floating_point() or not bool(head.isfinite().all())
    ):
        raise ValueError(
            f"with_head: head must be finite floating point [d, e], got {head.dtype} {list(head.shape)}"
        )
    return _named(evolve(embedder, head=None if head is None else head.detach().float().cpu().clone()))


@torch.no_grad()
def embed_queries(embedder: Embedder, texts: Sequence[str], images: Pictures = ()) -> Tensor:
    """The vectors of queries, float32 [b, d] of length 1 on the CPU; what else is in the batch changes them by no more than rounding.

    Args:
        texts: [b]; `<image>` tags are taken out. A blank one takes no share, nor does one without a word that "local" knows.
        images: [b] sequences, empty ones too, of paths, contents of files or pictures; () = no images. Several: the mean of their vectors.
    Raises:
        Nothing: a row with neither text nor image to embed (a ValueError; its `rows` are all of them).
        ValueError: kind "vectors"; images for "text" with a share above 0, or for "local" that was fitted without; an image that cannot be
            read; dims above the width, a head of another one.
    """
    cfg = embedder.cfg
    if cfg.kind == "vectors":
        raise ValueError("embed: the vectors of kind 'vectors' are the caller's own: use embed_vectors")
    words, pictures = _queries("embed", cfg, texts, images)
    if seen := [i for i, row in enumerate(pictures) if row]:
        if cfg.kind == "text":
            advice = "set shares = [1, 0] to leave images out, or use kind 'image_text'"
            raise ValueError(
                f"embed: kind 'text' takes no images, but row {seen[0]} has {len(pictures[seen[0]])}; {advice}"
            )
        if cfg.kind == "local" and "image.components" not in embedder.params:
            raise ValueError(
                f"embed: row {seen[0]} has images, but {embedder.name} was fitted without any; fit it again, with images"
            )
    local = cfg.kind == "local"
    if local:
        text, has_text = embed_local.text_directions(embedder.tokenizer, embedder.params, words)
    else:
        text, has_text = _encoded_texts(embedder, words)
    image, has_image = (
        (_local_images if local else _encoded_images)(embedder, pictures)
        if seen
        else (text, torch.zeros_like(has_text))
    )
    if len(bad := (~(has_text | has_image)).nonzero()):
        i = int(bad[0])
        unknown = (
            "of which no word is known"
            if words[i] and local
            else "without words"
            if cfg.shares[0]
            else "whose share is 0"
        )
        said = f"embed: row {i} has nothing to embed: a text {unknown} ({texts[i][:60]!r}) and {len(pictures[i])} images that count"
        raise NothingToEmbed(said, bad[:, 0].tolist())
    if local:
        text, image = embed_local.side_by_side(embedder.params, text, image, bool(seen))
    alone = torch.where(has_text[:, None], text, image)
    return _headed(
        embedder,
        query_vector(alone, image, cfg.shares, has_image=has_image) if seen else query_vector(alone, None),
    )


def embed_vectors(embedder: Embedder, vectors: Tensor) -> Tensor:
    """The caller's own vectors [b, d] of kind "vectors": the first `dims` of each, of length 1, behind the head if there is one.

    Raises:
        ValueError: another kind, not floating point [b, d], a row that is not finite or zero, dims above d, a head of another width.
    """
    if embedder.cfg.kind != "vectors":
        raise ValueError(f"embed_vectors: only for kind 'vectors', got {embedder.cfg.kind!r}; use embed")
    if vectors.dim() != 2 or not vectors.numel() or not vectors.is_floating_point():
        raise ValueError(
            f"embed_vectors: vectors must be floating point [b, d], got {vectors.dtype} {list(vectors.shape)}"
        )
    return _headed(embedder, _first("embed_vectors", embedder.cfg, vectors.detach().cpu()))


def fit_local(cfg: EmbedConfig, texts: Sequence[str], images: Pictures = ()) -> Embedder:
    """An embedder that needs no encoder, fitted to the queries of training splits: words for texts, colours and edges for images.

    Texts: TF-IDF of words and pairs of words (sublinear), truncated SVD. Images: histogram, thumbnail, edge energy and spectrum,
    standardised, PCA. Each has its own coordinates, [text, image], so cosines of the two never mix. The same input gives the same embedder.
    Args:
        texts, images: as in `embed_queries`.
    Raises:
        ValueError: another kind, nothing to fit to, images that are all the same.
    Source: Deerwester et al. 1990, latent semantic analysis; scikit-learn's TfidfVectorizer, TruncatedSVD and PCA.
    """
    if cfg.kind != "local":
        raise ValueError(f"fit_local: only for kind 'local', got {cfg.kind!r}; use open_embedder")
    words, pictures = _queries("fit_local", cfg, texts, images)
    k = cfg.dims or 64
    vocabulary, params = embed_local.fit_texts(k, [w for w in words if w])
    each = [(i, j, p) for i, row in enumerate(pictures) for j, p in enumerate(row)]
    looks = [
        embed_local.image_features(_opened("fit_local", cfg, *one)) for one in track(each, "reading images")
    ]
    params |= embed_local.fit_images(k, np.stack(looks)) if looks else {}
    if not params:
        raise ValueError(
            f"fit_local: the texts must have words of two letters or more, or there must be images, got {len(texts)} rows"
        )
    return _named(
        Embedder(
            cfg=cfg,
            params=params,
            vocabulary=vocabulary,
            tokenizer=embed_local.vectorizer_of(vocabulary, params),
        )
    )


def save_embedder(embedder: Embedder, folder: files.PathLike) -> None:
    """Write embedder.json and embedder.safetensors, whole or not at all; of an encoder the name and a digest, not the weights.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    state = dict(embedder.params) if embedder.cfg.kind == "local" else {}
    about = {
        "format": _FORMAT,
        "name": embedder.name,
        "cfg": config.unstructure(embedder.cfg),
        "vocabulary": embedder.vocabulary,
    }
    with new_folder(folder) as tmp:
        save_finite(
            state | ({} if embedder.head is None else {"head": embedder.head}),
            tmp / "embedder.safetensors",
            "save_embedder",
        )
        files.write_text(tmp / "embedder.json", json.dumps(about, ensure_ascii=False) + "\n")


def read_embedder(folder: files.PathLike, *, device: str | torch.device = "cpu") -> Embedder:
    """What `save_embedder` wrote, exactly; an encoder is found again by its name.

    Raises:
        ValueError: not such a folder, broken, or the content is no longer what its name says (an encoder with other weights).
    """
    raw, cfg = _about(folder)
    state = {
        n: entry.read()
        for n, entry in open_weights(find_file(str(folder), ("embedder.safetensors",)), str(folder)).items()
    }
    head = state.pop("head", None)
    made = (
        Embedder(cfg=cfg, params=state, vocabulary=tuple(raw["vocabulary"]))
        if cfg.kind == "local"
        else open_embedder(cfg, device=device)
    )
    try:
        if cfg.kind == "local":
            embed_local.check_fitted(made.vocabulary, state)
        made = with_head(made, head)
    except ValueError as e:
        raise ValueError(f"read_embedder: {folder}: {e}") from e
    if made.name != raw["name"]:
        what = (
            "the file was changed"
            if cfg.kind == "local"
            else f"the file or the encoder {cfg.name} was changed"
        )
        raise ValueError(
            f"read_embedder: {folder} must be {raw['name']}, but its content is {made.name}: {what}"
        )
    return (
        evolve(made, tokenizer=embed_local.vectorizer_of(made.vocabulary, state))
        if cfg.kind == "local"
        else made
    )


def check_embedder(folder: files.PathLike) -> None:
    """Raise where `read_embedder` will, as far as it can be told without reading weights: to be asked before other long work.

    Raises:
        ValueError: not such a folder, broken, or its encoder is not there.
    """
    _, cfg = _about(folder)
    find_file(str(folder), ("embedder.safetensors",))
    if cfg.kind in ("text", "image_text"):
        find_file(cfg.name, ("config.json",))


def _about(folder: files.PathLike) -> tuple[dict[str, Any], EmbedConfig]:
    """What embedder.json of a saved embedder says, and its settings."""
    if not Path(folder).is_dir():
        raise ValueError(f"read_embedder: there is no folder {folder}")
    path = find_file(str(folder), ("embedder.json",))
    raw = read_json(path)
    if (
        raw.get("format") != _FORMAT
        or not {"name", "cfg"} <= raw.keys()
        or not isinstance(raw.get("vocabulary"), list)
    ):
        raise ValueError(
            f"read_embedder: {path} must be {_FORMAT!r} with name, cfg and vocabulary, found {raw.get('format')!r}"
        )
    cfg = config.structure(raw["cfg"], EmbedConfig, where=str(path))
    return raw, cfg


# Queries --------------------------------------------------------------------------------------------------------------------------------
def _queries(
    who: str, cfg: EmbedConfig, texts: Sequence[str], images: Pictures
) -> tuple[list[str], list[list[Any]]]:
    """(texts without tags, the images that count) of each row; none of a side whose share is 0."""
    if isinstance(texts, str) or not len(texts) or not all(isinstance(t, str) for t in texts):
        raise ValueError(
            f"{who}: texts must be a list of at least one text, got {type(texts).__name__} of {len(texts)}"
        )
    if len(images) not in (0, len(texts)) or any(
        isinstance(row, str | bytes | Path | Image.Image | np.ndarray | Tensor) for row in images
    ):
        raise ValueError(
            f"{who}: images must be a list of images for each of the {len(texts)} texts, got {len(images)} items"
        )
    words = [re.sub("<image>\n?", "", t).strip() if cfg.shares[0] else "" for t in texts]
    return words, [list(row)[: cfg.max_images] if cfg.shares[1] else [] for row in images] or [
        [] for _ in texts
    ]


def _opened(who: str, cfg: EmbedConfig, row: int, place: int, source: Any) -> Image.Image:
    """An image as RGB with at most cfg.max_pixels."""
    where = f"{who}: image {place} of row {row}"
    if isinstance(source, str | bytes | Path):
        try:
            image = open_image(source, window=check_window(cfg.window, "EmbedConfig.window"), only_deep=True)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
    else:
        image = to_rgb(source, where)
    return cap_pixels(image, cfg.max_pixels)


def _first(who: str, cfg: EmbedConfig, x: Tensor) -> Tensor:
    """The first cfg.dims of each row, of length 1."""
    if cfg.dims > x.shape[1]:
        raise ValueError(
            f"{who}: dims must be at most the width {x.shape[1]} of the embedding, got {cfg.dims}"
        )
    return query_vector(x[:, : cfg.dims or None], None)


def _headed(embedder: Embedder, x: Tensor) -> Tensor:
    head = embedder.head
    if head is None:
        return x
    if head.shape[0] != x.shape[1]:
        raise ValueError(
            f"embed: the head must be [{x.shape[1]}, e] like the vectors, got {list(head.shape)}"
        )
    return query_vector(x @ head, None)


def _image_means(x: Tensor, rows: Sequence[int], b: int) -> tuple[Tensor, Tensor]:
    """(mean of the vectors [n, d] of each of b rows, whether a row has one)."""
    where = torch.tensor(rows, dtype=torch.int64)
    count = torch.bincount(where, minlength=b)
    return torch.zeros(b, x.shape[1]).index_add(0, where, x) / count.clamp(min=1)[:, None], count > 0


def _local_images(embedder: Embedder, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
    each = [(i, j, p) for i, row in enumerate(pictures) for j, p in enumerate(row)]
    opened = (_opened("embed", embedder.cfg, *one) for one in track(each, "embedding images"))
    unit, seen = embed_local.image_directions(embedder.params, opened)
    return _image_means(
        unit[seen], [i for (i, _, _), s in zip(each, seen.tolist(), strict=True) if s], len(pictures)
    )


def _named(embedder: Embedder) -> Embedder:
    cfg, head = embedder.cfg, embedder.head
    matters = {n: v for n, v in attrs.asdict(cfg).items() if n in _MATTERS[cfg.kind]} | {
        "vocabulary": embedder.vocabulary
    }
    if cfg.window:  # without one, an embedder has the name it had before there were windows
        matters["window"] = cfg.window
    weights = {f"params.{n}": t for n, t in embedder.params.items()} | (
        {} if head is None else {"head": head}
    )
    parts = [
        cfg.kind,
        *([Path(cfg.name).name] if cfg.name else []),
        config.record_digest(matters),
        skeletons.weights_digest(weights),
    ]
    return evolve(embedder, name=":".join(parts))


# Encoders of the hub --------------------------------------------------------------------------------------------------------------------
def _encoded_texts(embedder: Embedder, words: Sequence[str]) -> tuple[Tensor, Tensor]:
    cfg, skeleton = embedder.cfg, embedder.skeleton
    assert skeleton is not None
    there = [i for i, w in enumerate(words) if w]
    rows = _token_ids(embedder, [cfg.instruction + words[i] for i in there]) if there else []
    order = sorted(
        range(len(rows)), key=lambda i: len(rows[i])
    )  # texts of about one length together: little padding
    starts = track(range(0, len(order), cfg.batch), "embedding texts, batch")
    parts = [_encode(embedder, [rows[i] for i in order[at : at + cfg.batch]]).float().cpu() for at in starts]
    has = torch.zeros(len(words), dtype=torch.bool)
    has[there] = True
    if not parts:
        return torch.zeros(len(words), cfg.dims or 1), has
    found = _first("embed", cfg, torch.cat(parts))
    return torch.zeros(len(words), found.shape[1]).index_copy(0, torch.tensor(there)[order], found), has


def _encode(embedder: Embedder, rows: list[list[int]]) -> Tensor:
    """Token ids as vectors [n, d]; padded behind, which neither bidirectional nor causal encoders see."""
    cfg, skeleton, tok = embedder.cfg, embedder.skeleton, embedder.tokenizer
    assert skeleton is not None
    device, kind = next(iter(embedder.params.values())).device, skeleton.config["model_type"]
    # SigLIP reads the last place and was trained with padding up to it, which it sees
    longest = _positions(embedder) if kind == "siglip" else max(map(len, rows))
    pad = next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0)
    ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows], device=device)
    mask = (torch.arange(longest) < torch.tensor([len(r) for r in rows])[:, None]).to(device)
    seen = {} if kind == "siglip" else {"attention_mask": mask.long()}
    with torch.autocast(device.type, enabled=False):
        if cfg.kind == "image_text":
            return skeleton(
                embedder.params, input_ids=ids, pixel_values=_blank(skeleton, device), **seen
            ).text_embeds
        return pool_tokens(cfg.pool, skeleton(embedder.params, input_ids=ids, **seen).last_hidden_state, mask)


def _encoded_images(embedder: Embedder, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
    cfg, skeleton = embedder.cfg, embedder.skeleton
    assert skeleton is not None
    device, parts = next(iter(embedder.params.values())).device, []
    each = [(i, j, p) for i, row in enumerate(pictures) for j, p in enumerate(row)]
    word = torch.zeros(1, 1, dtype=torch.int64, device=device)  # the forward pass wants both sides
    for at in track(range(0, len(each), cfg.batch), "embedding images, batch"):
        opened = [_opened("embed", cfg, *one) for one in each[at : at + cfg.batch]]
        pixels = embedder.processor(images=opened, return_tensors="pt")["pixel_values"].to(device)
        with torch.autocast(device.type, enabled=False):
            parts.append(
                skeleton(embedder.params, input_ids=word, pixel_values=pixels).image_embeds.float().cpu()
            )
    return _image_means(_first("embed", cfg, torch.cat(parts)), [i for i, _, _ in each], len(pictures))


def _blank(skeleton: skeletons.Skeleton, device: torch.device) -> Tensor:
    vision = skeleton.config["vision_config"]
    return torch.zeros(1, vision["num_channels"], vision["image_size"], vision["image_size"], device=device)


def _token_ids(embedder: Embedder, texts: list[str]) -> list[list[int]]:
    """Token ids of texts; of one that is too long the tokenizer keeps its end token, if it sets one."""
    tok, most = embedder.tokenizer, min(embedder.cfg.context, _positions(embedder))
    rows = tok(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    if n := sum(len(r) > most for r in rows):
        warnings.warn(
            f"embed: {n} of {len(rows)} texts are longer than {most} tokens and were cut off", stacklevel=5
        )  # who called embed
        rows = [
            row if len(row) <= most else _cut_off(tok, text, most)
            for text, row in zip(texts, rows, strict=True)
        ]
    if empty := [t for t, r in zip(texts, rows, strict=True) if not r]:
        raise ValueError(
            f"embed: the tokenizer of {embedder.cfg.name} must give every text a token, it gives {empty[0][:60]!r} none"
        )
    return rows


def _cut_off(tok: Any, text: str, most: int) -> list[int]:
    """At most `most` token ids of a text. `truncation=True` would be a setting of the tokenizer, which other threads use meanwhile."""
    backend = tok.backend_tokenizer
    encoding = backend.encode(text, add_special_tokens=False)
    encoding.truncate(most - backend.num_special_tokens_to_add(False), direction=tok.truncation_side)
    return backend.post_process(encoding).ids


def _positions(embedder: Embedder) -> int:
    """The longest text the encoder and its tokenizer are made for."""
    assert embedder.skeleton is not None
    about, module = embedder.skeleton.config, embedder.skeleton.module
    about = about.get("text_config", about)
    known = [
        about.get("max_position_embeddings") or 10**9,
        int(min(embedder.tokenizer.model_max_length, 10**9)),
    ]
    for n, m in module.named_modules():  # RoBERTa and MPNet count positions from behind the padding id
        if (
            n.endswith("embeddings.position_embeddings")
            and isinstance(m, nn.Embedding)
            and m.padding_idx is not None
        ):
            known.append(m.num_embeddings - m.padding_idx - 1)
    return min(known)
