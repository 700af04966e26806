"""Queries of text and images as unit vectors, by which adapters are found.

In shapes b are queries, d the width of a vector, e its width behind a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medvl.adapters import embed_encoder, embed_local
from medvl.adapters.embed_config import EmbedConfig
from medvl.adapters.embedders import Embedder
from medvl.adapters.queries import Pictures, check_queries, enumerate_pictures, mean_per_row, open_picture
from medvl.adapters.retrieve import query_vector
from medvl.base.display import track


class NothingToEmbed(ValueError):
    """There are `rows` without anything that can be embedded."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        # Both arguments, so that the exception survives pickling; `__str__` shows the message alone.
        super().__init__(message, rows)
        self.rows = tuple(rows)

    def __str__(self) -> str:
        return str(self.args[0])


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
    words, pictures = check_queries("embed", cfg, texts, images)
    with_images = any(pictures)
    if with_images:
        _check_takes_images(embedder, pictures)
    if cfg.kind == "local":
        text, has_text = embed_local.text_directions(embedder.tokenizer, embedder.params, words)
    else:
        text, has_text = embed_encoder.encode_texts(embedder, words)
    # Stand-ins until there are images; `has_image` says that no row takes them.
    image = text
    has_image = torch.zeros_like(has_text)
    if with_images and cfg.kind == "local":
        image, has_image = _local_images(embedder, pictures)
    elif with_images:
        image, has_image = embed_encoder.encode_images(embedder, pictures)
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


def _local_images(embedder: Embedder, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
    """(vectors of images float32 [b, d], whether a row has one) by the fitted features."""
    sources = enumerate_pictures(pictures)
    # A generator: one picture is in memory at a time.
    opened = (open_picture("embed", embedder.cfg, *source) for source in track(sources, "embedding images"))
    directions, has_direction = embed_local.image_directions(embedder.params, opened)
    flags = has_direction.tolist()
    # A picture like the mean of all has no direction, and does not count in its row's mean.
    rows = [row for (row, _, _), flag in zip(sources, flags, strict=True) if flag]
    return mean_per_row(directions[has_direction], rows, len(pictures))


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
