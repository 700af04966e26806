"""Queries of text and images: what of them is used, their images opened."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medvl.adapters.embed_config import EmbedConfig
from medvl.base import files
from medvl.language.images import Picture, cap_pixels, check_window, open_image, to_rgb

Pictures = Sequence[Sequence[files.PathLike | bytes | Picture]]  # of each query


def check_queries(
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


def enumerate_pictures(pictures: Sequence[Sequence[Any]]) -> list[tuple[int, int, Any]]:
    """(row, place in it, picture) of all pictures."""
    return [
        (row, place, source) for row, images in enumerate(pictures) for place, source in enumerate(images)
    ]


def open_picture(where: str, cfg: EmbedConfig, row: int, place: int, source: Any) -> Image.Image:
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


def mean_per_row(vectors: Tensor, rows: Sequence[int], b: int) -> tuple[Tensor, Tensor]:
    """(mean of the vectors [n, d] of each of b rows, whether a row has one)."""
    index = torch.tensor(rows, dtype=torch.int64)
    count = torch.bincount(index, minlength=b)
    sums = torch.zeros(b, vectors.shape[1]).index_add(0, index, vectors)
    # clamp: rows without a vector are 0 / 1, and the flag says that they have none.
    return sums / count.clamp(min=1)[:, None], count > 0
