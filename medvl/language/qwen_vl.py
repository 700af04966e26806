"""The image side of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: from an image to patches, from token ids to three-axis rotary positions."""

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

Grid = tuple[int, int, int]  # patches in time, height, width

_SIZES = {
    "patch": "patch_size",
    "merge": "merge_size",
    "temporal": "temporal_patch_size",
    "mean": "image_mean",
    "std": "image_std",
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
_READ = {*_SIZES.values(), "size", "min_pixels", "max_pixels", "image_processor_type"}
_IGNORED = {
    "processor_class",
    "feature_extractor_type",
    "default_to_square",
    "data_format",
    "input_data_format",
    "device",
}
_IGNORED |= {"return_tensors", "disable_grouping", "crop_size", "pad_size"}


@frozen(kw_only=True)
class ImageConfig:
    """How an image becomes patches. The defaults are the published preprocessor_config.json of Qwen2-VL and Qwen2.5-VL."""

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
        sizes = {k: getattr(self, k) for k in ("patch", "merge", "temporal", "min_pixels", "max_pixels")}
        if wrong := [f"{k}={v!r}" for k, v in sizes.items() if type(v) is not int or v < 1]:
            raise ValueError(f"ImageConfig: sizes must be whole numbers >= 1, got {', '.join(wrong)}")
        if self.max_pixels < max(self.min_pixels, (self.patch * self.merge) ** 2):
            raise ValueError(
                f"ImageConfig: max_pixels must be at least min_pixels and one visual token ({self.patch * self.merge} squared), "
                f"got min_pixels {self.min_pixels}, max_pixels {self.max_pixels}"
            )
        for k in ("mean", "std"):
            v = getattr(self, k)
            if len(v) != 3 or not all(
                isinstance(x, int | float) and math.isfinite(x) and (k == "mean" or x > 0) for x in v
            ):
                raise ValueError(
                    f"ImageConfig: {k} must be 3 finite numbers{' > 0' * (k == 'std')}, got {v!r}"
                )


def parse_image_config(raw: Mapping[str, Any]) -> ImageConfig:
    """The record of a preprocessor_config.json, or of the "image_processor" in a processor_config.json.

    Pixel bounds are read as min_pixels and max_pixels or as size {"shortest_edge", "longest_edge"} (both are numbers of pixels); where a
    file has both, the first count, as in transformers. Keys that are null are as if they were not there.
    Raises:
        ValueError: another model's file, a key missing, unknown or of the wrong type, or steps that `patchify_image` does not do.
    """
    raw = raw.get("image_processor", raw) if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping):
        raise ValueError(f"parse_image_config: must be a record of keys and values, got {type(raw).__name__}")
    given = {k: v for k, v in raw.items() if v is not None}
    if "Qwen" not in str(given.get("image_processor_type", "Qwen")):
        raise ValueError(
            f"parse_image_config: image_processor_type must be one of Qwen-VL's, got {given['image_processor_type']!r}"
        )
    if wrong := [f"{k}={given[k]!r}, not {v!r}" for k, v in _FIXED.items() if given.get(k, v) != v]:
        raise ValueError(f"parse_image_config: the image steps of Qwen-VL are fixed, got {'; '.join(wrong)}")
    size = given.get("size", {})
    edges = ("shortest_edge", "longest_edge", "min_pixels", "max_pixels")
    if not isinstance(size, Mapping) or size.keys() - set(edges):
        raise ValueError(f"parse_image_config: size must hold shortest_edge and longest_edge, got {size!r}")
    if unknown := sorted(given.keys() - _READ - _FIXED.keys() - _IGNORED):
        raise ValueError(
            f"parse_image_config: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_READ))}"
        )
    found: dict[str, Any] = {ours: given.get(theirs) for ours, theirs in _SIZES.items()}
    for k, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        found[k] = given.get(k, size.get(edge, size.get(k)))
    if missing := [_SIZES.get(k, k) for k, v in found.items() if v is None]:
        raise ValueError(
            f"parse_image_config: must have {', '.join(missing)}, got only {', '.join(sorted(given)) or 'an empty record'}"
        )
    for k in ("mean", "std"):
        if not isinstance(found[k], list | tuple):
            raise ValueError(f"parse_image_config: {_SIZES[k]} must be a list of 3 numbers, got {found[k]!r}")
        found[k] = tuple(found[k])
    return ImageConfig(**found)


def dump_image_config(cfg: ImageConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a record, as `parse_image_config` and transformers read it."""
    own = {
        theirs: list(v) if isinstance(v := getattr(cfg, ours), tuple) else v
        for ours, theirs in _SIZES.items()
    }
    size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
    return {"image_processor_type": "Qwen2VLImageProcessor"} | own | {"size": size} | _FIXED


def smart_resize(cfg: ImageConfig, height: int, width: int) -> tuple[int, int]:
    """The (height, width) in pixels an image is resized to: multiples of patch x merge, within the bounds, nearly the same shape.

    Raises:
        ValueError: a side below 1, or one more than 200 times the other.
    Source: equal to `smart_resize` of transformers' Qwen2VLImageProcessor.
    """
    if min(height, width) < 1:
        raise ValueError(f"smart_resize: height and width must be positive, got {height} x {width}")
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"smart_resize: the longer side must be at most 200 times the shorter, got {height} x {width}; crop or tile it"
        )
    unit = cfg.patch * cfg.merge
    h, w = round(height / unit) * unit, round(width / unit) * unit
    if h * w > cfg.max_pixels:
        shrink = math.sqrt(height * width / cfg.max_pixels)
        h, w = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif h * w < cfg.min_pixels:
        grow = math.sqrt(cfg.min_pixels / (height * width))
        h, w = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return h, w


def patchify_image(cfg: ImageConfig, image: Picture) -> tuple[Tensor, Grid]:
    """Resize and normalise one image and cut it into patches.

    Args:
        image: a PIL image of any mode (what is transparent becomes white), or uint8 [y, x, 3], array or tensor. A PIL image is taken as it
            lies; its EXIF orientation is honoured by `images.open_image`.
    Returns:
        patches float32 [p, 3 x temporal x patch x patch] on CPU, columns in that order; rows go by visual token (left to right, top to
        bottom), and in it by patch. And the grid (1, h, w) with p = h w.
    Raises:
        ValueError: greys of more than 8 bits (no window is right for all), arrays of another type or shape, broken images, and as
            `smart_resize`.
    Source: bit-equal to Qwen2VLImageProcessorPil of transformers 5.23 (5.17 drops transparency) with the same Pillow (13.0 resizes a
        little differently from 12).
    """
    rgb = to_rgb(image, "patchify")
    grid = _grid(cfg, rgb)
    out = torch.empty(grid[1] * grid[2], 3 * cfg.temporal * cfg.patch**2)
    _fill(cfg, rgb, out)
    return out, grid


def patchify_images(cfg: ImageConfig, images: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """`patchify_image` of several images, one after another: pixel_values [sum p, ...] and image_grid_thw int64 [n, 3]; n may be 0.

    Raises:
        ValueError: as `patchify_image`; says which image.
    """
    rgbs, grids = [], []
    for i, image in enumerate(images):
        try:
            rgbs.append(to_rgb(image, "patchify"))
            grids.append(_grid(cfg, rgbs[-1]))
        except ValueError as e:
            raise ValueError(f"patchify_images: image {i}: {e}") from e
    counts = [h * w for _, h, w in grids]
    out = torch.empty(sum(counts), 3 * cfg.temporal * cfg.patch**2)
    for rgb, part in zip(rgbs, out.split(counts) if counts else (), strict=True):
        _fill(cfg, rgb, part)
    return out, torch.tensor(grids, dtype=torch.int64).view(-1, 3)


def _grid(cfg: ImageConfig, rgb: Image.Image) -> Grid:
    h, w = smart_resize(cfg, rgb.height, rgb.width)
    return 1, h // cfg.patch, w // cfg.patch


def _fill(cfg: ImageConfig, rgb: Image.Image, out: Tensor) -> None:
    h, w = smart_resize(cfg, rgb.height, rgb.width)
    if rgb.size != (w, h):
        rgb = rgb.resize((w, h), Image.Resampling.BICUBIC)
    unit, names = cfg.patch * cfg.merge, {"my": cfg.merge, "mx": cfg.merge, "py": cfg.patch, "px": cfg.patch}
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (cfg.mean, cfg.std))
    rows = out.view(h // unit, -1, 3, cfg.temporal, cfg.patch**2)
    for row, band in zip(
        rows, torch.from_numpy(np.array(rgb)).split(unit), strict=True
    ):  # a row of tokens at a time stays in the cache
        patches = rearrange(band, "(my py) (gx mx px) c -> (gx my mx) c 1 (py px)", **names)
        row.copy_(patches.float().div_(255).sub_(mean).div_(std).expand_as(row))


def count_image_tokens(cfg: ImageConfig, grid: Sequence[int] | Tensor) -> int:
    """How many tokens an image (or video) of a grid (t, h, w) takes in the language model: t h w / merge squared.

    Raises:
        ValueError: h or w is no positive multiple of merge.
    """
    t, h, w = _block("count_image_tokens", "grid", [int(x) for x in grid], cfg.merge)
    return t * h * w


def token_types(ids: Tensor, image_token: int, video_token: int | None = None) -> Tensor:
    """What transformers calls mm_token_type_ids: 1 at image tokens, 2 at video tokens, 0 elsewhere; int64 [b, t] like `ids`.

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
        ids: [b, t]; every image is a run of `image_token`, as many as `count_image_tokens` says. Images may touch: the grids part them.
        mask: bool [b, t], false at padding (on either side), whose positions are 0.
        grid: [n, 3] (t, h, w) in patches of all images, row by row; None where there is none.
        video_grid: the same for videos; for Qwen3-VL a row (1, h, w) for every frame, between which its timestamps stand.
        seconds: time from one temporal patch of a video to the next [number of videos], 1 if None; with `tokens_per_second` of the
            config this is Qwen2.5-VL (transformers 5.17 cut them to whole seconds). Qwen2-VL and Qwen3-VL have neither.
    Returns:
        position_ids int64 [3, b, t] and delta int64 [b, 1], what `mrope_next` needs.
    Raises:
        ValueError: wrong shapes, or images and grids that do not fit; says in which row.
    Source: Wang et al. 2024, arXiv:2409.12191, section 2.1; equal to transformers' `get_rope_index`, which fails where images touch.
    """
    types = token_types(ids, image_token, video_token).cpu()
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mrope: mask must be bool {list(ids.shape)} like ids, got {mask.dtype} {list(mask.shape)}; use mask.bool()"
        )
    images, videos = _blocks("grid", grid, merge), _blocks("video_grid", video_grid, merge)
    seconds = [1] * len(videos) if seconds is None else seconds
    if len(seconds) != len(videos):
        raise ValueError(
            f"mrope: seconds must have one number for each of the {len(videos)} videos, got {len(seconds)}"
        )
    left = {
        1: [(*sizes, 1.0) for sizes in reversed(images)],
        2: [
            (*sizes, tokens_per_second * s) for sizes, s in reversed(list(zip(videos, seconds, strict=True)))
        ],
    }
    positions, deltas, kept = torch.zeros(3, *ids.shape, dtype=torch.int64), [], mask.cpu()
    for i in range(len(ids)):
        places = _places(types[i, kept[i]], left, i)
        positions[:, i, kept[i]] = places
        deltas.append(int(places.max()) + 1 - places.shape[1] if places.numel() else 0)
    if left[1] or left[2]:
        raise ValueError(
            f"mrope: after the last row, {len(ids) - 1}, {len(left[1])} of {len(images)} images and {len(left[2])} of {len(videos)} videos "
            f"have found no tokens; tokens per row: {(types * kept).gt(0).sum(1).tolist()}. Were ids truncated?"
        )
    return positions.to(ids.device), torch.tensor(deltas, dtype=torch.int64, device=ids.device).view(-1, 1)


def mrope_next(delta: Tensor, cached_length: int | Tensor) -> Tensor:
    """Positions int64 [3, b, 1] of the token that follows the cached ones.

    Args:
        delta: [b, 1], from `mrope`.
        cached_length: tokens of each row in the cache, padding not counted: a number or [b].
    Raises:
        ValueError: other shapes.
    """
    n = torch.as_tensor(cached_length, device=delta.device)
    if delta.dim() != 2 or delta.shape[1] != 1 or (n.dim() and n.shape != delta.shape[:1]):
        raise ValueError(
            f"mrope_next: delta must be [b, 1] and cached_length a number or [b], got {list(delta.shape)} and {list(n.shape)}"
        )
    return (delta + (n[:, None] if n.dim() else n)).expand(3, -1, -1)


def _places(types: Tensor, left: dict[int, list], row: int) -> Tensor:
    """Positions [3, t] of one row without padding; takes its images and videos from the ends of the lists in `left`."""
    parts, at, now = [torch.zeros(3, 0, dtype=torch.int64)], 0, 0
    kinds, counts = torch.unique_consecutive(types, return_counts=True)
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        if kind == 0:
            parts.append(torch.arange(now, now + count).expand(3, -1))
            at, now, count = at + count, now + count, 0
        while count:
            name = ("image", "video")[kind - 1]
            if not left[kind]:
                raise ValueError(
                    f"mrope: row {row} has {count} {name} tokens from its token {at} on for which there is no {name} grid left"
                )
            t, h, w, interval = left[kind].pop()
            if t * h * w > count:
                raise ValueError(
                    f"mrope: row {row}: the {name} at its token {at} must have {t} x {h} x {w} = {t * h * w} tokens by its grid, "
                    f"found {count}; never truncate visual tokens"
                )
            time = (torch.arange(t) * interval).long()
            parts.append(
                torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).view(3, -1)
                + now
            )
            at, now, count = at + t * h * w, now + max(h, w), count - t * h * w
    return torch.cat(parts, 1)


def _blocks(name: str, grid: Tensor | None, merge: int) -> list[Grid]:
    if grid is None:
        return []
    if grid.dim() != 2 or grid.shape[1] != 3 or grid.is_floating_point():
        raise ValueError(f"mrope: {name} must be whole numbers [n, 3], got {grid.dtype} {list(grid.shape)}")
    return [_block("mrope", f"{name} row {i}", sizes, merge) for i, sizes in enumerate(grid.tolist())]


def _block(where: str, name: str, sizes: Sequence[int], merge: int) -> Grid:
    """The grid in visual tokens."""
    if len(sizes) != 3 or min(sizes) < 1 or sizes[1] % merge or sizes[2] % merge:
        raise ValueError(
            f"{where}: {name} must be (t, h, w) >= 1 with h and w multiples of {merge}, got {tuple(sizes)}"
        )
    return sizes[0], sizes[1] // merge, sizes[2] // merge
