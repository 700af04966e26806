"""Images of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: preprocessing to patches, rotary positions on three axes."""

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

Grid = tuple[int, int, int]  # patches in time, height, width
# An image or video: visual tokens in time, height and width, and positions from one time to the next.
_Item = tuple[int, int, int, Any]

# Fields of `ImageConfig` and their keys in preprocessor_config.json.
_KEYS = {
    "patch": "patch_size",
    "merge": "merge_size",
    "temporal": "temporal_patch_size",
    "mean": "image_mean",
    "std": "image_std",
}
_READ = {*_KEYS.values(), "size", "min_pixels", "max_pixels", "image_processor_type"}
_IGNORED = processor_config.IGNORED_KEYS | {"processor_class"}


@frozen(kw_only=True)
class ImageConfig:
    """How an image becomes patches. The defaults are the published preprocessor_config.json of Qwen2-VL and
    Qwen2.5-VL.
    """

    patch: int = 14  # pixels; Qwen3-VL 16
    merge: int = 2  # patches that become one visual token, per axis
    temporal: int = 2  # frames per patch; a still image is repeated
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of pixels in 0..1; Qwen3-VL 0.5
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)  # Qwen3-VL 0.5
    min_pixels: int = 3136  # after resizing: 4 visual tokens; Qwen3-VL 65536
    max_pixels: int = (
        12_845_056  # 16384 visual tokens; Qwen3-VL 16777216. A letter page at 100 dpi needs 1170
    )

    def __attrs_post_init__(self) -> None:
        names = ("patch", "merge", "temporal", "min_pixels", "max_pixels")
        wrong = [name for name in names if not _is_positive_int(getattr(self, name))]
        if wrong:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            raise ValueError(f"ImageConfig: sizes must be whole numbers >= 1, got {values}")
        if self.max_pixels < max(self.min_pixels, (self.patch * self.merge) ** 2):
            raise ValueError(
                "ImageConfig: max_pixels must be at least min_pixels and one visual token "
                f"({self.patch * self.merge} squared), got min_pixels {self.min_pixels}, max_pixels "
                f"{self.max_pixels}"
            )
        check_statistics("ImageConfig", "mean", self.mean)
        check_statistics("ImageConfig", "std", self.std)


def _is_positive_int(value: Any) -> bool:
    return type(value) is int and value >= 1  # a bool is no size


def parse_image_config(raw: Mapping[str, Any]) -> ImageConfig:
    """The record of a preprocessor_config.json, or of the "image_processor" in a processor_config.json.

    Pixel bounds are read as min_pixels and max_pixels or as size {"shortest_edge", "longest_edge"} (both are
    numbers of pixels); where a file has both, the first count, as in transformers. Keys that are null are as
    if they were not there.
    Raises:
        ValueError: another model's file, a key missing, unknown or of the wrong type, or steps that
            `patchify_image` does not do.
    """
    where = "parse_image_config"
    settings = processor_config.read_settings(where, raw)
    # Files spell the class in several ways, such as Qwen2VLImageProcessor and Qwen2VLImageProcessorFast.
    if "Qwen" not in str(settings.get("image_processor_type", "Qwen")):
        raise ValueError(
            "parse_image_config: image_processor_type must be one of Qwen-VL's, "
            f"got {settings['image_processor_type']!r}"
        )
    processor_config.check_steps(where, "Qwen-VL", settings)
    size = settings.get("size", {})
    if not isinstance(size, Mapping) or size.keys() - {
        "shortest_edge",
        "longest_edge",
        "min_pixels",
        "max_pixels",
    }:
        raise ValueError(f"parse_image_config: size must hold shortest_edge and longest_edge, got {size!r}")
    processor_config.check_known_keys(where, settings, _READ, _IGNORED)
    values: dict[str, Any] = {name: settings.get(key) for name, key in _KEYS.items()}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        # The bounds have moved between versions of transformers; "edge" is a misleading name of theirs for an
        # area.
        values[key] = settings.get(key, size.get(edge, size.get(key)))
    missing = [_KEYS.get(name, name) for name, value in values.items() if value is None]
    processor_config.check_none_missing(where, settings, missing)
    for name in ("mean", "std"):
        values[name] = processor_config.parse_numbers(where, _KEYS[name], values[name])
    return ImageConfig(**values)


def dump_image_config(cfg: ImageConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a record, as `parse_image_config` and transformers read it."""
    raw: dict[str, Any] = {"image_processor_type": "Qwen2VLImageProcessor"}
    for name, key in _KEYS.items():
        value = getattr(cfg, name)
        raw[key] = list(value) if isinstance(value, tuple) else value
    raw["size"] = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
    return raw | processor_config.FIXED_STEPS


def smart_resize(cfg: ImageConfig, height: int, width: int) -> tuple[int, int]:
    """The (height, width) in pixels an image is resized to: multiples of patch x merge, within the bounds,
    nearly the same shape.

    Raises:
        ValueError: a side below 1, or one more than 200 times the other.
    Source: equal to `smart_resize` of transformers' Qwen2VLImageProcessor.
    """
    if min(height, width) < 1:
        raise ValueError(f"smart_resize: height and width must be positive, got {height} x {width}")
    # The limit of Qwen's own code (MAX_RATIO).
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"smart_resize: the longer side must be at most 200 times the shorter, got {height} x {width}; "
            "crop or tile it"
        )
    unit = cfg.patch * cfg.merge
    # A side below half a unit becomes 0; the area is then below min_pixels, and the image grows.
    h = round(height / unit) * unit
    w = round(width / unit) * unit
    if h * w > cfg.max_pixels:
        shrink = math.sqrt(height * width / cfg.max_pixels)
        # Down, to stay within the bound, where the lower bound below goes up; a long strip keeps one unit.
        h = max(unit, math.floor(height / shrink / unit) * unit)
        w = max(unit, math.floor(width / shrink / unit) * unit)
    elif h * w < cfg.min_pixels:
        grow = math.sqrt(cfg.min_pixels / (height * width))
        h = math.ceil(height * grow / unit) * unit
        w = math.ceil(width * grow / unit) * unit
    return h, w


def patchify_image(cfg: ImageConfig, image: Picture) -> tuple[Tensor, Grid]:
    """Resize and normalise one image and cut it into patches.

    Args:
        image: a PIL image of any mode (what is transparent becomes white), or uint8 [y, x, 3], array or
            tensor. A PIL image is taken as it lies; its EXIF orientation is honoured by `images.open_image`.
    Returns:
        patches float32 [p, 3 x temporal x patch x patch] on CPU, columns in that order; rows go by visual
        token (left to right, top to bottom), and in it by patch. And the grid (1, h, w) with p = h w.
    Raises:
        ValueError: greys of more than 8 bits (no window is right for all), arrays of another type or shape,
            broken images, and as `smart_resize`.
    Source: bit-equal to Qwen2VLImageProcessorPil of transformers 5.23 (5.17 drops transparency) with the same
        Pillow (13.0 resizes a little differently from 12).
    """
    rgb = to_rgb(image, "patchify")
    grid = _patch_grid(cfg, rgb)
    out = torch.empty(grid[1] * grid[2], 3 * cfg.temporal * cfg.patch**2)
    _write_patches(cfg, rgb, out)
    return out, grid


def patchify_images(cfg: ImageConfig, images: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """`patchify_image` of several images, one after another: pixel_values [sum p, ...] and image_grid_thw
    int64 [n, 3]; n may be 0.

    Raises:
        ValueError: as `patchify_image`; says which image.
    """
    rgbs = list[Image.Image]()
    grids = list[Grid]()
    for i, image in enumerate(images):
        try:
            rgb = to_rgb(image, "patchify")
            grids.append(_patch_grid(cfg, rgb))
            rgbs.append(rgb)
        except ValueError as e:
            raise ValueError(f"patchify_images: image {i}: {e}") from e
    counts = [h * w for _, h, w in grids]
    out = torch.empty(sum(counts), 3 * cfg.temporal * cfg.patch**2)
    start = 0
    for rgb, count in zip(rgbs, counts, strict=True):
        _write_patches(cfg, rgb, out[start : start + count])
        start += count
    return out, torch.tensor(grids, dtype=torch.int64).view(-1, 3)


def _patch_grid(cfg: ImageConfig, rgb: Image.Image) -> Grid:
    h, w = smart_resize(cfg, rgb.height, rgb.width)
    return 1, h // cfg.patch, w // cfg.patch


def _write_patches(cfg: ImageConfig, rgb: Image.Image, out: Tensor) -> None:
    """Write the patches of an image into out [p, 3 x temporal x patch x patch]."""
    h, w = smart_resize(cfg, rgb.height, rgb.width)
    if rgb.size != (w, h):
        rgb = rgb.resize((w, h), Image.Resampling.BICUBIC)
    unit = cfg.patch * cfg.merge
    mean = torch.tensor(cfg.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(cfg.std, dtype=torch.float32)[:, None, None]
    # A view of the output: [rows of visual tokens, patches of a row, 3, temporal, patch x patch].
    rows = out.view(h // unit, -1, 3, cfg.temporal, cfg.patch**2)
    bands = torch.from_numpy(np.array(rgb)).split(unit)
    # A row of visual tokens at a time stays in the processor's cache.
    for row, band in zip(rows, bands, strict=True):
        # The patches of one visual token (my mx) lie side by side: the model merges them by a reshape. The
        # axis of time is 1 here and is expanded, as a still image is repeated.
        patches = rearrange(
            band,
            "(my py) (gx mx px) c -> (gx my mx) c 1 (py px)",
            my=cfg.merge,
            mx=cfg.merge,
            py=cfg.patch,
            px=cfg.patch,
        )
        row.copy_(patches.float().div_(255).sub_(mean).div_(std).expand_as(row))


def count_image_tokens(cfg: ImageConfig, grid: Sequence[int] | Tensor) -> int:
    """How many tokens an image (or video) of a grid (t, h, w) takes in the language model: t h w / merge
    squared.

    Raises:
        ValueError: h or w is no positive multiple of merge.
    """
    t, h, w = _token_grid("count_image_tokens", "grid", [int(x) for x in grid], cfg.merge)
    return t * h * w


def token_types(ids: Tensor, image_token: int, video_token: int | None = None) -> Tensor:
    """What transformers calls mm_token_type_ids: 1 at image tokens, 2 at video tokens, 0 elsewhere; int64 [b,
    t] like `ids`.

    Without them transformers' models use one-axis positions, some of them without a word.
    Raises:
        ValueError: ids are not whole numbers [b, t].
    """
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"token_types: ids must be whole numbers [b, t], got {ids.dtype} {list(ids.shape)}")
    types = (ids == image_token).long()
    return types if video_token is None else types + 2 * (ids == video_token)


def mrope(
    ids: Tensor,
    mask: Tensor,
    grid: Tensor | None,
    *,
    image_token: int,
    merge: int = 2,
    video_token: int | None = None,
    video_grid: Tensor | None = None,
    seconds: Sequence[float] | Tensor | None = None,
    tokens_per_second: float = 1,
) -> tuple[Tensor, Tensor]:
    """Rotary positions on three axes (time, height, width) of a batch of texts with images.

    Args:
        ids: [b, t]; every image is a run of `image_token`, as many as `count_image_tokens` says. Images may
            touch: the grids part them.
        mask: bool [b, t], false at padding (on either side), whose positions are 0.
        grid: [n, 3] (t, h, w) in patches of all images, row by row; None where there is none.
        video_grid: the same for videos; for Qwen3-VL a row (1, h, w) for every frame, between which its
            timestamps stand.
        seconds: time from one temporal patch of a video to the next [number of videos], 1 if None; with
            `tokens_per_second` of the config this is Qwen2.5-VL (transformers 5.17 cut them to whole
            seconds). Qwen2-VL and Qwen3-VL have neither.
    Returns:
        position_ids int64 [3, b, t] and delta int64 [b, 1].
    Raises:
        ValueError: wrong shapes, or images and grids that do not fit; says in which row.
    Source: Wang et al. 2024, arXiv:2409.12191, section 2.1; equal to transformers' `get_rope_index`, which
    fails where images touch.
    """
    types = token_types(ids, image_token, video_token).cpu()
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mrope: mask must be bool {list(ids.shape)} like ids, got {mask.dtype} {list(mask.shape)}; "
            "use mask.bool()"
        )
    images = [(t, h, w, 1.0) for t, h, w in _token_grids("grid", grid, merge)]
    videos = _timed_videos(_token_grids("video_grid", video_grid, merge), seconds, tokens_per_second)
    # What no row has used yet, by type of token; the next at the end, from where taking is cheap.
    remaining = {1: images[::-1], 2: videos[::-1]}
    # On the CPU: the loops below would wait for the device at every image.
    exists = mask.cpu()
    positions = torch.zeros(3, *ids.shape, dtype=torch.int64)
    deltas = list[int]()
    for i in range(len(ids)):
        row = _row_positions(types[i, exists[i]], remaining, i)
        positions[:, i, exists[i]] = row
        deltas.append(_delta(row))
    # Images without tokens: ids that were truncated, or grids of another batch.
    if remaining[1] or remaining[2]:
        counts = (types * exists).gt(0).sum(1).tolist()
        raise ValueError(
            f"mrope: after the last row, {len(ids) - 1}, {len(remaining[1])} of {len(images)} images and "
            f"{len(remaining[2])} of {len(videos)} videos have found no tokens; tokens per row: {counts}. "
            "Were ids truncated?"
        )
    return positions.to(ids.device), torch.tensor(deltas, dtype=torch.int64, device=ids.device).view(-1, 1)


def _delta(positions: Tensor) -> int:
    """What transformers calls rope_deltas, of the positions [3, t] of a row.

    An image takes fewer positions than tokens, so that the position of a new token is the number of tokens
    plus this.
    """
    if not positions.numel():
        return 0
    return int(positions.max()) + 1 - positions.shape[1]


def _timed_videos(
    grids: Sequence[Grid], seconds: Sequence[float] | Tensor | None, tokens_per_second: float
) -> list[_Item]:
    """Grids of visual tokens with the positions from one time to the next."""
    if seconds is None:
        seconds = [1] * len(grids)
    if len(seconds) != len(grids):
        raise ValueError(
            f"mrope: seconds must have one number for each of the {len(grids)} videos, got {len(seconds)}"
        )
    videos = list[_Item]()
    for (t, h, w), interval in zip(grids, seconds, strict=True):
        videos.append((t, h, w, tokens_per_second * interval))
    return videos


def _row_positions(types: Tensor, remaining: dict[int, list[_Item]], row: int) -> Tensor:
    """Positions [3, t] of one row without padding; takes its images and videos from `remaining`."""
    pieces = [torch.zeros(3, 0, dtype=torch.int64)]
    token = 0  # of the row
    position = 0  # the next one that is free
    kinds, counts = torch.unique_consecutive(types, return_counts=True)
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        if kind == 0:  # text
            pieces.append(torch.arange(position, position + count).expand(3, -1))
            token += count
            position += count
            continue
        name = ("image", "video")[kind - 1]
        while count:  # images may touch, so that one run of tokens is several images
            if not remaining[kind]:
                raise ValueError(
                    f"mrope: row {row} has {count} {name} tokens from its token {token} on for which there "
                    f"is no {name} grid left"
                )
            t, h, w, interval = remaining[kind].pop()
            size = t * h * w
            if size > count:
                raise ValueError(
                    f"mrope: row {row}: the {name} at its token {token} must have {t} x {h} x {w} = {size} "
                    f"tokens by its grid, found {count}; never truncate visual tokens"
                )
            # Cut to whole positions after the product, so that the error does not add up over a video.
            time = (torch.arange(t) * interval).long()
            axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
            pieces.append(torch.stack(axes).view(3, -1) + position)
            token += size
            # Not h x w: the text goes on behind the longer side of the image (section 2.1 of the paper).
            position += max(h, w)
            count -= size
    return torch.cat(pieces, 1)


def _token_grids(name: str, grid: Tensor | None, merge: int) -> list[Grid]:
    if grid is None:
        return []
    if grid.dim() != 2 or grid.shape[1] != 3 or grid.is_floating_point():
        raise ValueError(f"mrope: {name} must be whole numbers [n, 3], got {grid.dtype} {list(grid.shape)}")
    return [_token_grid("mrope", f"{name} row {i}", sizes, merge) for i, sizes in enumerate(grid.tolist())]


def _token_grid(where: str, name: str, sizes: Sequence[int], merge: int) -> Grid:
    """A grid of patches as a grid of visual tokens."""
    if len(sizes) != 3 or min(sizes) < 1 or sizes[1] % merge or sizes[2] % merge:
        raise ValueError(
            f"{where}: {name} must be (t, h, w) >= 1 with h and w multiples of {merge}, got {tuple(sizes)}"
        )
    return sizes[0], sizes[1] // merge, sizes[2] // merge
