"""The image side of InternVL3 and InternVL2.5-MPO (as transformers has them, "-hf"): from an image to square tiles."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from einops import rearrange
from PIL import Image
from torch import Tensor

from medvl.language.images import Picture, to_rgb

_READ = {
    "size",
    "min_patches",
    "max_patches",
    "image_mean",
    "image_std",
    "image_seq_length",
    "image_processor_type",
    "processor_class",
}
_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
_FIXED |= {"do_center_crop": False, "do_pad": False}
# crop_to_patches is false in the published files, yet InternVL's processor always tiles images: what the file says never counts.
_IGNORED = {
    "crop_to_patches",
    "feature_extractor_type",
    "default_to_square",
    "data_format",
    "input_data_format",
    "device",
}
_IGNORED |= {"return_tensors", "disable_grouping", "crop_size", "pad_size"}


@frozen(kw_only=True)
class TileConfig:
    """How an image becomes tiles. The defaults are the published preprocessor_config.json of InternVL3-hf and InternVL2.5-MPO-hf."""

    size: int = 448  # pixels of a tile's side
    most: int = 12  # tiles of an image, its thumbnail not counted
    least: int = 1
    thumbnail: bool = True  # the whole image as one more tile, behind the others, where there are several
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of pixels in 0..1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    tokens: int = 256  # visual tokens of a tile: (size / patch x downsample_ratio) squared of the model, its image_seq_length

    def __attrs_post_init__(self) -> None:
        sizes = {k: getattr(self, k) for k in ("size", "most", "least", "tokens")}
        if wrong := [f"{k}={v!r}" for k, v in sizes.items() if type(v) is not int or v < 1]:
            raise ValueError(f"TileConfig: sizes must be whole numbers >= 1, got {', '.join(wrong)}")
        if self.most < self.least:
            raise ValueError(
                f"TileConfig: most must be at least least, got most {self.most}, least {self.least}"
            )
        if type(self.thumbnail) is not bool:
            raise ValueError(f"TileConfig: thumbnail must be true or false, got {self.thumbnail!r}")
        for k in ("mean", "std"):
            v = getattr(self, k)
            if len(v) != 3 or not all(
                isinstance(x, int | float) and math.isfinite(x) and (k == "mean" or x > 0) for x in v
            ):
                raise ValueError(
                    f"TileConfig: {k} must be 3 finite numbers{' > 0' * (k == 'std')}, got {v!r}"
                )


def parse_tile_config(raw: Mapping[str, Any]) -> TileConfig:
    """The record of a preprocessor_config.json, or of a processor_config.json with "image_processor" in it.

    Keys that are null are as if they were not there. Of what may be missing the defaults of transformers hold: min_patches 1, max_patches
    12, image_seq_length 256 (older models have it in a processor_config.json of its own: join the two records with |).
    Raises:
        ValueError: another model's file, a key missing, unknown or of the wrong type, or steps that `tile_image` does not do.
    """
    inner = raw.get("image_processor", raw) if isinstance(raw, Mapping) else raw
    if not isinstance(inner, Mapping):
        raise ValueError(
            f"parse_tile_config: must be a record of keys and values, got {type(inner).__name__}"
        )
    outer = [(k, raw.get(k)) for k in ("image_seq_length", "processor_class")]
    given = {k: v for k, v in [*inner.items(), *outer] if v is not None}
    for k, known in (
        ("image_processor_type", "GotOcr2ImageProcessor"),
        ("processor_class", "InternVLProcessor"),
    ):
        if not str(given.get(k, known)).startswith(known):
            raise ValueError(
                f"parse_tile_config: {k} must be {known} as in InternVL's files, got {given[k]!r}"
            )
    if wrong := [f"{k}={given[k]!r}, not {v!r}" for k, v in _FIXED.items() if given.get(k, v) != v]:
        raise ValueError(f"parse_tile_config: the image steps of InternVL are fixed, got {'; '.join(wrong)}")
    if unknown := sorted(given.keys() - _READ - _FIXED.keys() - _IGNORED):
        raise ValueError(
            f"parse_tile_config: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_READ))}"
        )
    if missing := [k for k in ("size", "image_mean", "image_std") if k not in given]:
        raise ValueError(
            f"parse_tile_config: must have {', '.join(missing)}, got only {', '.join(sorted(given)) or 'an empty record'}"
        )
    size = given["size"]
    if not isinstance(size, Mapping) or size.keys() != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(
            f"parse_tile_config: size must hold height and width, equal as tiles are square, got {size!r}"
        )
    for k in ("image_mean", "image_std"):
        if not isinstance(given[k], list | tuple):
            raise ValueError(f"parse_tile_config: {k} must be a list of 3 numbers, got {given[k]!r}")
    return TileConfig(
        size=size["height"],
        most=given.get("max_patches", 12),
        least=given.get("min_patches", 1),
        mean=tuple(given["image_mean"]),
        std=tuple(given["image_std"]),
        tokens=given.get("image_seq_length", 256),
    )


def dump_tile_config(cfg: TileConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a record, as `parse_tile_config` and transformers read it."""
    own = {"size": {"height": cfg.size, "width": cfg.size}, "min_patches": cfg.least, "max_patches": cfg.most}
    look = {"image_mean": list(cfg.mean), "image_std": list(cfg.std), "image_seq_length": cfg.tokens}
    return {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True} | own | look | _FIXED


def tile_grid(cfg: TileConfig, height: int, width: int) -> tuple[int, int]:
    """The (columns, rows) of tiles an image of height x width pixels is cut into, its thumbnail not counted.

    Of all grids of `least` to `most` tiles, the one nearest to the image in width / height; of equally near ones, the largest that the
    image fills more than half (in pixels), else the smallest.
    Raises:
        ValueError: a side below 1.
    Source: Chen et al. 2024, arXiv:2404.16821, section 3.2; equal to `get_optimal_tiled_canvas` of transformers' GotOcr2ImageProcessor.
    """
    if min(height, width) < 1:
        raise ValueError(f"tile_grid: height and width must be positive, got {height} x {width}")
    grids = [
        (c, r) for c in range(1, cfg.most + 1) for r in range(1, cfg.most // c + 1) if c * r >= cfg.least
    ]
    off = [abs(width / height - c / r) for c, r in grids]
    nearest = min(off)
    ties = sorted((grid for grid, by in zip(grids, off, strict=True) if by == nearest), key=math.prod)
    filled = [grid for grid in ties if width * height > 0.5 * cfg.size**2 * math.prod(grid)]
    return (filled or ties[:1])[-1]


def tile_image(cfg: TileConfig, image: Picture) -> Tensor:
    """Resize one image to its grid of tiles (which changes its shape a little), cut it and normalise.

    Args:
        image: a PIL image of any mode (what is transparent becomes white), or uint8 [y, x, 3], array or tensor. A PIL image is taken as it
            lies; its EXIF orientation is honoured by `images.open_image`.
    Returns:
        tiles float32 [n, 3, size, size] on CPU, left to right, top to bottom; where there are several the thumbnail is the last.
    Raises:
        ValueError: greys of more than 8 bits (no window is right for all), arrays of another type or shape, broken or empty images.
    Source: bit-equal to GotOcr2ImageProcessorPil of transformers 5.23 with crop_to_patches (5.17 drops transparency) with the same Pillow.
    """
    rgb = to_rgb(image, "tile")
    out = _empty(cfg, _count(cfg, rgb))
    _fill(cfg, rgb, out)
    return out


def tile_images(cfg: TileConfig, images: Sequence[Picture]) -> tuple[Tensor, list[int]]:
    """`tile_image` of several images, one after another: pixel_values [sum n, 3, size, size] and the tiles of each image; may be none.

    Raises:
        ValueError: as `tile_image`; says which image.
    """
    rgbs, counts = [], []
    for i, image in enumerate(images):
        try:
            rgbs.append(to_rgb(image, "tile"))
            counts.append(_count(cfg, rgbs[-1]))
        except ValueError as e:
            raise ValueError(f"tile_images: image {i}: {e}") from e
    out = _empty(cfg, sum(counts))
    for rgb, part in zip(rgbs, out.split(counts) if counts else (), strict=True):
        _fill(cfg, rgb, part)
    return out, counts


def count_tile_tokens(cfg: TileConfig, tiles: int) -> int:
    """How many tokens `<IMG_CONTEXT>` an image of so many tiles, thumbnail counted, takes between its `<img>` and `</img>`.

    Raises:
        ValueError: tiles is no whole number >= 1.
    """
    if type(tiles) is not int or tiles < 1:
        raise ValueError(f"count_tile_tokens: tiles must be a whole number >= 1, got {tiles!r}")
    return tiles * cfg.tokens


def _count(cfg: TileConfig, rgb: Image.Image) -> int:
    n = math.prod(tile_grid(cfg, rgb.height, rgb.width))
    return n + (cfg.thumbnail and n > 1)


def _empty(cfg: TileConfig, n: int) -> Tensor:
    return torch.empty(n, 3, cfg.size, cfg.size)


def _fill(cfg: TileConfig, rgb: Image.Image, out: Tensor) -> None:
    columns, rows = tile_grid(cfg, rgb.height, rgb.width)
    _cut(cfg, rgb, columns, rows, out[: columns * rows])
    if len(out) > columns * rows:
        _cut(cfg, rgb, 1, 1, out[columns * rows :])


def _cut(cfg: TileConfig, rgb: Image.Image, columns: int, rows: int, out: Tensor) -> None:
    resized = rgb.resize((columns * cfg.size, rows * cfg.size), Image.Resampling.BICUBIC)
    out.copy_(
        rearrange(torch.from_numpy(np.array(resized)), "(r y) (c x) rgb -> (r c) rgb y x", r=rows, c=columns)
    )
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (cfg.mean, cfg.std))
    out.div_(255).sub_(mean).div_(std)
