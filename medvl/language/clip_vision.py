"""Images for CLIP's vision tower, and towers of as many layers as a level of features needs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from PIL import Image
from torch import Tensor

from medvl.hub.skeletons import Skeleton, empty_skeleton
from medvl.language import processor_config
from medvl.language.images import LARGEST, Picture, check_statistics, to_rgb


@frozen(kw_only=True)
class ClipImageConfig:
    """How an image becomes pixels. The defaults are those of openai/clip-vit-large-patch14-336."""

    size: int = 336  # pixels of a side
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of pixels in 0..1
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __attrs_post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"ClipImageConfig: size must be a whole number >= 1, got {self.size!r}")
        check_statistics("ClipImageConfig", "mean", self.mean)
        check_statistics("ClipImageConfig", "std", self.std)


def parse_clip_config(raw: Mapping[str, Any]) -> ClipImageConfig:
    """The record of a preprocessor_config.json of CLIP, as old and new versions of transformers write it.

    Raises:
        ValueError: a key is missing, or the sides of resizing and cropping differ.
    """
    where = "parse_clip_config"
    settings = processor_config.read_settings(where, raw)
    keys = ("size", "crop_size", "image_mean", "image_std")
    processor_config.check_none_missing(where, settings, [key for key in keys if key not in settings])
    sides = settings["size"], settings["crop_size"]
    # Old files say 336, newer ones {"shortest_edge": 336} and {"height": 336, "width": 336}.
    pixels = {n for side in sides for n in (side.values() if isinstance(side, Mapping) else [side])}
    if len(pixels) != 1:
        raise ValueError(f"{where}: size and crop_size must be one side, got {sides[0]!r} and {sides[1]!r}")
    return ClipImageConfig(
        size=pixels.pop(),
        mean=processor_config.parse_numbers(where, "image_mean", settings["image_mean"]),
        std=processor_config.parse_numbers(where, "image_std", settings["image_std"]),
    )


def dump_clip_config(cfg: ClipImageConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a record, as `parse_clip_config` and transformers read it."""
    return {
        **processor_config.FIXED_STEPS,
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "size": {"shortest_edge": cfg.size},
        "crop_size": {"height": cfg.size, "width": cfg.size},
        "image_mean": list(cfg.mean),
        "image_std": list(cfg.std),
    }


def square(cfg: ClipImageConfig, image: Picture) -> Image.Image:
    """The whole image in the middle of a square RGB image, on the mean colour of CLIP's pixels.

    Args:
        image: as of `images.to_rgb`; what is transparent becomes white.
    Raises:
        ValueError: as `to_rgb`; the square of a long strip has more than `images.LARGEST` pixels.
    Source: LLaVA's expand2square; the colour is (122, 116, 104), the means times 255 and truncated.
    """
    rgb = to_rgb(image, "square")
    side = max(rgb.size)
    if side * side > LARGEST:
        raise ValueError(
            f"square: the longer side must have at most {int(LARGEST**0.5)} pixels, got {rgb.width} x "
            f"{rgb.height}; make the image smaller"
        )
    red, green, blue = (int(mean * 255) for mean in cfg.mean)
    padded = Image.new("RGB", (side, side), (red, green, blue))
    # Of an odd difference, the smaller half is above or on the left.
    padded.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return padded


def clip_pixels(cfg: ClipImageConfig, images: Sequence[Picture]) -> Tensor:
    """Images as squares of `cfg.size` pixels, bicubic and normalised: float32 [n, 3, size, size]; n may be 0.

    Raises:
        ValueError: as `square`; says which image.
    Source: LLaVA's padding, then bit-equal to CLIPImageProcessorPil of transformers 5.24, whose crop takes
    nothing from a square.
    """
    out = torch.empty(len(images), 3, cfg.size, cfg.size)
    mean = torch.tensor(cfg.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(cfg.std, dtype=torch.float32)[:, None, None]
    for i, image in enumerate(images):
        try:
            padded = square(cfg, image)
        except ValueError as e:
            raise ValueError(f"clip_pixels: image {i}: {e}") from e
        resized = padded.resize((cfg.size, cfg.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        # One fused factor per channel would round otherwise.
        out[i].copy_(pixels).div_(255).sub_(mean).div_(std)
    return out


def tower_skeleton(config: Mapping[str, Any], level: int) -> Skeleton:
    """CLIP's vision tower cut behind the layer whose output is `hidden_states[level]` of the whole tower.

    Its `last_hidden_state` is these features: CLIP normalises only what it pools.

    Args:
        config: of a "clip_vision_model", or of a "clip" with its vision_config.
        level: 1 = the output of the first layer, -1 = of the last, -2 = of the one before it.
    Raises:
        ValueError: another architecture, or a level that the tower does not have.
    """
    kind = config.get("model_type")
    if kind == "clip":
        config = config["vision_config"]
    elif kind != "clip_vision_model":
        raise ValueError(f"tower_skeleton: model_type must be clip or clip_vision_model, got {kind!r}")
    whole = config.get("num_hidden_layers", 12)  # transformers' default
    layers = level if level >= 0 else whole + 1 + level
    if not 1 <= layers <= whole:
        raise ValueError(
            f"tower_skeleton: a tower of {whole} layers has the levels 1 to {whole} and -{whole} to -1, got "
            f"{level}"
        )
    return empty_skeleton({**config, "model_type": "clip_vision_model", "num_hidden_layers": layers})


def level_params(params: Mapping[str, Tensor], skeleton: Skeleton) -> dict[str, Tensor]:
    """The weights of a tower that a skeleton of fewer layers has: the same tensors, no copies."""
    names = [name for name, _ in skeleton.module.named_parameters()]
    # What is missing the skeleton says when it is called.
    return {name: params[name] for name in names if name in params}
