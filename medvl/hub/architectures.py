"""From a config to the transformers class it describes; sizes that no model can have are refused before
anything is built.
"""

import inspect
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from medvl.base.config import DEPTHS, WIDTH, WIDTH_OR_NONE

# Settings that choose kernels, and the choices that run PyTorch's own.
_KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_TORCH_KERNELS = ("eager", "sdpa", "grouped_mm", "batched_mm")

# Families of models name one size differently.
_DEPTH_NAMES = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
)
_WIDTH_NAMES = ("hidden_size", "n_embd", "d_model", "embed_dim")
_HEAD_NAMES = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_IMAGE_NAMES = ("patch_size", "image_size", "temporal_patch_size", "spatial_merge_size", "num_channels")

# (least, greatest) value of each size. What lies beyond is a typing error, not a model.
_BOUNDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_DEPTH_NAMES, DEPTHS),
    **dict.fromkeys(_WIDTH_NAMES, WIDTH),
    **dict.fromkeys((*_HEAD_NAMES, "num_key_value_heads"), (1, 4096)),
    "head_dim": (0, 2**14),
    **dict.fromkeys(_IMAGE_NAMES, WIDTH),
    **dict.fromkeys(("intermediate_size", "vocab_size"), (1, 2**22)),
    **dict.fromkeys(("out_hidden_size", "projection_dim"), WIDTH_OR_NONE),
    "mlp_ratio": (0, 256),
    "num_labels": (0, 2**20),  # transformers makes a name for each
    "max_position_embeddings": (-1, 2**27),
    **dict.fromkeys(("n_positions", "num_position_embeddings"), (1, 2**20)),
}
_MAX_PATCHES = 2**18  # 512 x 512

# What transformers and torch raise for a config that describes no model.
_UNBUILT = (
    RuntimeError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    ImportError,
    MemoryError,
)


def find_architecture(config: dict[str, Any], head: str = "") -> tuple[Any, Any]:
    """(transformers class, its config) that a config dict describes; never code from the checkpoint.

    Args:
        head: "" for a plain encoder or decoder, "language" for a model that predicts tokens.
    Raises:
        ValueError: a model_type that transformers does not have, or sizes that no model can have.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
    )

    check_head(head)
    # Which class belongs to a config depends on the head: one model_type has several. Models with a vision
    # tower come first: some are in both tables, there without their tower.
    tables: Any = (MODEL_MAPPING,)
    if head:
        tables = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    model_type = str(config.get("model_type"))
    table = None
    if model_type in CONFIG_MAPPING:
        for candidate in tables:
            if CONFIG_MAPPING[model_type] in candidate:
                table = candidate
                break
    if table is None:
        expected = "an encoder that transformers has (dinov2, dinov3_vit, vit, bert...)"
        if head:
            expected = "a language model that transformers has (qwen2, qwen3, phi3, qwen2_5_vl...)"
        own_code = "; it needs code of its own, which is never run" if "auto_map" in config else ""
        raise ValueError(f"config: model_type must be {expected}, found {model_type!r}{own_code}")

    # 4-bit weights are told by their keys in the file; transformers would want bitsandbytes for the setting.
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    config = _without_kernels(config)
    # Bounds first: transformers makes lists as long as some of these numbers while it reads them.
    for part, config_name in _nested_configs(config):
        _check_bounds(part, config_name)
    try:
        with quiet():
            model_config = CONFIG_MAPPING[model_type].from_dict(config)
    except (StrictDataclassError, *_UNBUILT) as e:
        raise ValueError(f"config: not a {model_type}: {' '.join(str(e).split())}") from e
    # Again with transformers' defaults filled in.
    for part, config_name in _nested_configs(model_config.to_dict()):
        _check_fit(part, config_name)
    return table[type(model_config)], model_config


def check_head(head: str) -> None:
    if head not in ("", "language"):
        raise ValueError(f"hub: head must be '' (the plain encoder or decoder) or 'language', got {head!r}")


def build_module(model_class: Any, model_config: Any) -> Any:
    """The module in evaluation mode, with transformers' random weights.

    Raises:
        ValueError: transformers cannot build it.
    """
    # Poolers belong to tasks and are left out (see `loading`); only some classes have the switch.
    options = {}
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    try:
        return model_class._from_config(model_config, dtype=torch.float32, **options).eval()
    except _UNBUILT as e:
        reason = " ".join(str(e).split())[:300]  # messages can be pages long
        raise ValueError(
            f"config: no {model_config.model_type} can be built with these sizes ({type(e).__name__}: "
            f"{reason})"
        ) from e


def count_layer_weights(config: Mapping[str, Any]) -> int:
    """A lower bound of the weights in the layers, from the sizes in the config alone."""
    total = 0
    for part, _ in _nested_configs(config):
        depth = _first_size(part, _DEPTH_NAMES)
        width = _first_size(part, _WIDTH_NAMES)
        inner = _first_size(part, ("intermediate_size", "n_inner"))
        # One matrix of the feed-forward block per layer is enough for a lower bound.
        if depth and width and inner:
            total += math.prod((depth[1], width[1], inner[1]))
    return total


def check_memory(count: int, model_type: str) -> None:
    """Refuse to draw more float32 weights than this machine has memory for."""
    # Physical memory, not what is free: a refusal must not depend on what else is running.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * count > memory:
        raise ValueError(
            f"config: a {model_type} of these sizes has {4 * count / 1e9:,.1f} GB of float32 weights or "
            f"more, this machine {memory / 1e9:,.1f} GB of memory"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what matters of them is raised."""
    from transformers.utils import logging

    # Both settings belong to the whole process and are put back as they were.
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _without_kernels(config: dict[str, Any]) -> dict[str, Any]:
    """The config without a choice of kernels beyond PyTorch's own: transformers would fetch `owner/name`
    from the hub and run it.

    The choice does not change what the model computes, and a checkpoint may name a package that is not
    installed here.
    """
    plain = {}
    for key, value in config.items():
        if _KERNEL_KEYS.fullmatch(key) and value not in _TORCH_KERNELS:
            continue
        plain[key] = _without_kernels(value) if isinstance(value, dict) else value
    return plain


def _nested_configs(
    config: Mapping[str, Any], config_name: str = "config"
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(config, its name) of a model and of the towers inside it."""
    yield config, config_name
    for name, part in config.items():
        if isinstance(part, dict) and name.endswith("_config"):
            yield from _nested_configs(part, f"{config_name}.{name}")


def _check_bounds(config: Mapping[str, Any], config_name: str) -> None:
    """Raise where a size is out of its bounds. Before transformers reads it, which makes a list of as many
    layers.
    """
    for name, (low, high) in _BOUNDS.items():
        value = config.get(name)
        # A size may be a list, such as height and width.
        for size in value if isinstance(value, list | tuple) else (value,):
            if isinstance(size, int | float) and not low <= size <= high:
                raise ValueError(f"{config_name}.{name} must be from {low} to {high}, got {size}")


def _check_fit(config: Mapping[str, Any], config_name: str) -> None:
    """Raise where sizes do not fit each other."""
    # Each is (the name of the setting in this config, its value), so that the message says what to change.
    width = _first_size(config, _WIDTH_NAMES)
    heads = _first_size(config, _HEAD_NAMES)
    groups = _first_size(config, ("num_key_value_heads",))
    # Grouped-query attention: heads share keys and values in groups of equal size.
    if heads and groups and heads[1] % groups[1]:
        raise ValueError(
            f"{config_name}: num_key_value_heads must divide {heads[0]}, got {groups[1]} and {heads[1]}"
        )
    if width and heads:
        head_width = config.get("head_dim") or width[1] // heads[1]
        if head_width < 1:
            raise ValueError(
                f"{config_name}: {heads[0]} must be at most {width[0]}, got {heads[1]} and {width[1]}"
            )
        # Vision towers cut their width into equal heads.
        if config_name.endswith("vision_config") and width[1] % heads[1]:
            raise ValueError(
                f"{config_name}: {heads[0]} must divide {width[0]}, got {heads[1]} and {width[1]}"
            )
        _check_rope(config, head_width, config_name)
    _check_patches(config, config_name)


def _check_rope(config: Mapping[str, Any], head_width: int, config_name: str) -> None:
    """Rotary positions turn pairs of a head's values; Qwen-VL's divide the pairs among three axes."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    # Phi and others rotate only the first values of a head.
    rotated = int(head_width * (rope.get("partial_rotary_factor") or 1))
    if rotated % 2:
        raise ValueError(
            f"{config_name}: heads must have an even number of values for rotary positions, got {rotated}"
        )
    if "mrope_section" not in rope:
        return
    sections = rope["mrope_section"]  # pairs for time, height and width
    three_numbers = isinstance(sections, list | tuple) and len(sections) == 3
    if three_numbers:
        three_numbers = all(isinstance(n, int) and n > 0 for n in sections)
    if not three_numbers or sum(sections) != rotated // 2:
        raise ValueError(
            f"{config_name}: mrope_section must be three numbers whose sum is {rotated // 2}, half of a "
            f"head, got {sections}"
        )


def _check_patches(config: Mapping[str, Any], config_name: str) -> None:
    """Raise where an image has no patch, or more than any model takes."""
    sides: list[list[int]] = []
    for name in ("image_size", "patch_size"):
        value = config.get(name)
        # The last two sizes are height and width: those of a video have the frames first.
        pair: list[Any] = list(value)[-2:] if isinstance(value, list | tuple) else [value, value]
        if not pair or not all(isinstance(n, int) for n in pair):
            return
        sides.append([pair[0], pair[-1]])
    (height, width), (patch_height, patch_width) = sides
    patches = (height // patch_height) * (width // patch_width)
    if not 1 <= patches <= _MAX_PATCHES:
        raise ValueError(
            f"{config_name}: image_size {config['image_size']} and patch_size {config['patch_size']} "
            f"must make 1 to {_MAX_PATCHES} patches, got {patches}"
        )


def _first_size(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, int] | None:
    """(name, value) of the first of the names that the config sets to a whole number."""
    for name in names:
        if isinstance(config.get(name), int):
            return name, config[name]
    return None
