"""Images of InternVL3 and InternVL2.5-MPO (of transformers, "-hf"): preprocessing to square tiles."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from einops import rearrange
from PIL import Image
from torch import Tensor

from medvl.language import processor_config
from medvl.language.images import Picture, check_statistics, to_rgb

# The last two of these only say whose file it is.
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
# crop_to_patches is false in the published files, yet InternVL's processor always tiles images: it is never
# read.
_IGNORED = processor_config.IGNORED_KEYS | {"crop_to_patches"}


@frozen(kw_only=True)
class TileConfig:
    """How an image becomes tiles. The defaults are the published preprocessor_config.json of InternVL3-hf and
    InternVL2.5-MPO-hf.
    """

    size: int = 448  # pixels of a tile's side
    most: int = 12  # tiles of an image, its thumbnail not counted
    least: int = 1
    thumbnail: bool = True  # the whole image as one more tile, behind the others, where there are several
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of pixels in 0..1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # Visual tokens of a tile: (size / patch x downsample_ratio) squared of the model, its image_seq_length.
    tokens: int = 256

    def __attrs_post_init__(self) -> None:
        names = ("size", "most", "least", "tokens")
        sizes = {name: getattr(self, name) for name in names}
        # type() and not isinstance: True is an int, and no size.
        wrong = [f"{name}={size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]
        if wrong:
            raise ValueError(f"TileConfig: sizes must be whole numbers >= 1, got {', '.join(wrong)}")
        if self.most < self.least:
            raise ValueError(
                f"TileConfig: most must be at least least, got most {self.most}, least {self.least}"
            )
        if type(self.thumbnail) is not bool:
            raise ValueError(f"TileConfig: thumbnail must be true or false, got {self.thumbnail!r}")
        check_statistics("TileConfig", "mean", self.mean)
        check_statistics("TileConfig", "std", self.std)


def parse_tile_config(raw: Mapping[str, Any]) -> TileConfig:
    """The record of a preprocessor_config.json, or of a processor_config.json with "image_processor" in it.

    Keys that are null are as if they were not there. Of what may be missing the defaults of transformers
    hold: min_patches 1, max_patches 12, image_seq_length 256 (older models have it in a processor_config.json
    of its own: join the two records with |).
    Raises:
        ValueError: another model's file, a key missing, unknown or of the wrong type, or steps that
            `tile_image` does not do.
    """
    where = "parse_tile_config"
    settings = processor_config.read_settings(where, raw)
    for key in ("image_seq_length", "processor_class"):  # of the outer record, where there is one
        if raw.get(key) is not None:
            settings[key] = raw[key]
    _check_settings(where, settings)
    mean = processor_config.parse_numbers(where, "image_mean", settings["image_mean"])
    std = processor_config.parse_numbers(where, "image_std", settings["image_std"])
    return TileConfig(
        size=settings["size"]["height"],
        most=settings.get("max_patches", 12),
        least=settings.get("min_patches", 1),
        mean=mean,
        std=std,
        tokens=settings.get("image_seq_length", 256),
    )


def _check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Check that a file is InternVL's, with the keys and steps that are known here."""
    classes = {"image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor"}
    for key, name in classes.items():
        # transformers' fast classes have the same name with "Fast" behind it.
        if not str(settings.get(key, name)).startswith(name):
            raise ValueError(f"{where}: {key} must be {name} as in InternVL's files, got {settings[key]!r}")
    processor_config.check_steps(where, "InternVL", settings)
    processor_config.check_known_keys(where, settings, _READ, _IGNORED)
    missing = [key for key in ("size", "image_mean", "image_std") if key not in settings]
    processor_config.check_none_missing(where, settings, missing)
    size = settings["size"]
    has_sides = isinstance(size, Mapping) and size.keys() == {"height", "width"}
    if not has_sides or size["height"] != size["width"]:
        raise ValueError(f"{where}: size must hold height and width, equal as tiles are square, got {size!r}")


def dump_tile_config(cfg: TileConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a record, as `parse_tile_config` and transformers read it."""
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        # True says what is done here also to an image processor that is called alone, without InternVL's
        # processor.
        "crop_to_patches": True,
        "size": {"height": cfg.size, "width": cfg.size},
        "min_patches": cfg.least,
        "max_patches": cfg.most,
        "image_mean": list(cfg.mean),
        "image_std": list(cfg.std),
        "image_seq_length": cfg.tokens,
        **processor_config.FIXED_STEPS,
    }


def tile_grid(cfg: TileConfig, height: int, width: int) -> tuple[int, int]:
    """The (columns, rows) of tiles an image of height x width pixels is cut into, its thumbnail not counted.

    Of all grids of `least` to `most` tiles, the one nearest to the image in width / height; of equally near
    ones, the largest that the image fills more than half (in pixels), else the smallest.
    Raises:
        ValueError: a side below 1.
    Source: Chen et al. 2024, arXiv:2404.16821, section 3.2; equal to `get_optimal_tiled_canvas` of
    transformers' GotOcr2ImageProcessor.
    """
    if min(height, width) < 1:
        raise ValueError(f"tile_grid: height and width must be positive, got {height} x {width}")
    grids = list[tuple[int, int]]()
    for columns in range(1, cfg.most + 1):
        for rows in range(1, cfg.most // columns + 1):
            if columns * rows >= cfg.least:
                grids.append((columns, rows))
    # Differences of the ratios themselves, as published, and not of their logarithms: an image and the same
    # image turned by 90 degrees may so get grids of different fineness.
    distances = [abs(width / height - columns / rows) for columns, rows in grids]
    nearest = min(distances)
    ties = [grid for grid, distance in zip(grids, distances, strict=True) if distance == nearest]
    # Ties are mostly grids of one ratio (1 x 1, 2 x 2, 3 x 3): the number of tiles decides among them.
    ties.sort(key=math.prod)
    # More than half of the grid's pixels must be there, so that a small image is not blown up to many tiles.
    filled = [grid for grid in ties if width * height > 0.5 * cfg.size**2 * math.prod(grid)]
    if filled:
        return filled[-1]
    return ties[0]


def tile_image(cfg: TileConfig, image: Picture) -> Tensor:
    """Resize one image to its grid of tiles (which changes its shape a little), cut it and normalise.

    Args:
        image: a PIL image of any mode (what is transparent becomes white), or uint8 [y, x, 3], array or
            tensor. A PIL image is taken as it lies; its EXIF orientation is honoured by `images.open_image`.
    Returns:
        tiles float32 [n, 3, size, size] on CPU, left to right, top to bottom; where there are several the
        thumbnail is the last.
    Raises:
        ValueError: greys of more than 8 bits (no window is right for all), arrays of another type or shape,
            broken or empty images.
    Source: bit-equal to GotOcr2ImageProcessorPil of transformers 5.23 with crop_to_patches (5.17 drops
    transparency) with the same Pillow.
    """
    rgb = to_rgb(image, "tile")
    out = torch.empty(_count_tiles(cfg, rgb), 3, cfg.size, cfg.size)
    _write_tiles(cfg, rgb, out)
    return out


def tile_images(cfg: TileConfig, images: Sequence[Picture]) -> tuple[Tensor, list[int]]:
    """`tile_image` of several images, one after another: pixel_values [sum n, 3, size, size] and the tiles of
    each image; may be none.

    Raises:
        ValueError: as `tile_image`; says which image.
    """
    rgbs = list[Image.Image]()
    counts = list[int]()
    for i, image in enumerate(images):
        try:
            rgb = to_rgb(image, "tile")
            counts.append(_count_tiles(cfg, rgb))
            rgbs.append(rgb)
        except ValueError as e:
            raise ValueError(f"tile_images: image {i}: {e}") from e
    # All counts are known before any pixel is resized: one allocation for the batch, and no torch.cat, which
    # would hold all pixels twice.
    out = torch.empty(sum(counts), 3, cfg.size, cfg.size)
    start = 0
    for rgb, count in zip(rgbs, counts, strict=True):
        _write_tiles(cfg, rgb, out[start : start + count])
        start += count
    return out, counts


def count_tile_tokens(cfg: TileConfig, tiles: int) -> int:
    """How many tokens `<IMG_CONTEXT>` an image of so many tiles, thumbnail counted, takes between its `<img>`
    and `</img>`.

    Raises:
        ValueError: tiles is no whole number >= 1.
    """
    if type(tiles) is not int or tiles < 1:
        raise ValueError(f"count_tile_tokens: tiles must be a whole number >= 1, got {tiles!r}")
    return tiles * cfg.tokens


def _count_tiles(cfg: TileConfig, rgb: Image.Image) -> int:
    """Tiles of an image, its thumbnail counted."""
    tiles = math.prod(tile_grid(cfg, rgb.height, rgb.width))
    if cfg.thumbnail and tiles > 1:
        return tiles + 1
    return tiles


def _write_tiles(cfg: TileConfig, rgb: Image.Image, out: Tensor) -> None:
    """Write the tiles of an image, and its thumbnail where there is room for one, into out [n, 3, size,
    size].
    """
    columns, rows = tile_grid(cfg, rgb.height, rgb.width)
    tiles = columns * rows
    _write_grid(cfg, rgb, columns, rows, out[:tiles])
    # The thumbnail is the whole image on a grid of 1 x 1, so it is squeezed to a square.
    if len(out) > tiles:
        _write_grid(cfg, rgb, 1, 1, out[tiles:])


def _write_grid(cfg: TileConfig, rgb: Image.Image, columns: int, rows: int, out: Tensor) -> None:
    resized = rgb.resize((columns * cfg.size, rows * cfg.size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized))
    # Row by row of the grid, the order in which the model was trained to read tiles.
    out.copy_(rearrange(pixels, "(r y) (c x) rgb -> (r c) rgb y x", r=rows, c=columns))
    mean = torch.tensor(cfg.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(cfg.std, dtype=torch.float32)[:, None, None]
    # One fused factor per channel would round otherwise, and not be bit-equal to transformers.
    out.div_(255).sub_(mean).div_(std)
