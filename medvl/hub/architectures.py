"""From a config to the transformers class it describes; sizes that no model can have are refused before anything is built."""

import inspect
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from medvl.base.config import DEPTHS, WIDTH, WIDTH_OR_NONE

_KERNELS = re.compile(r"_?(attn|experts)_implementation(_internal)?")

# Bounds of the sizes in a model's config; what is above them is a slip of the keyboard, not a model.
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

_MOST_PATCHES = 2**18

_SIZES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_DEPTH_NAMES, DEPTHS),
    **dict.fromkeys(_WIDTH_NAMES, WIDTH),
    **dict.fromkeys((*_HEAD_NAMES, "num_key_value_heads"), (1, 4096)),
    "head_dim": (0, 2**14),
    **dict.fromkeys(
        ("patch_size", "image_size", "temporal_patch_size", "spatial_merge_size", "num_channels"), WIDTH
    ),
    **dict.fromkeys(("intermediate_size", "vocab_size"), (1, 2**22)),
    **dict.fromkeys(("out_hidden_size", "projection_dim"), WIDTH_OR_NONE),
    "mlp_ratio": (0, 256),
    "num_labels": (0, 2**20),  # transformers makes a name for each
    "max_position_embeddings": (-1, 2**27),
    **dict.fromkeys(("n_positions", "num_position_embeddings"), (1, 2**20)),
}

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

_OWN_KERNELS = ("eager", "sdpa", "grouped_mm", "batched_mm")


def find_architecture(config: dict[str, Any], head: str = "") -> tuple[Any, Any]:
    """(transformers class, its config) that a config dict describes; never code from the checkpoint."""
    check_head(head)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
    )

    tables: Any = (
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING) if head else (MODEL_MAPPING,)
    )
    kind = str(config.get("model_type"))
    table = next((t for t in tables if kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in t), None)
    if table is None:
        own = "; it needs code of its own, which is never run" if "auto_map" in config else ""
        what = (
            "a language model that transformers has (qwen2, qwen3, phi3, qwen2_5_vl...)"
            if head
            else "an encoder that transformers has"
        )
        raise ValueError(
            f"config: model_type must be {what}{'' if head else ' (dinov2, dinov3_vit, vit, bert...)'}, found {kind!r}{own}"
        )
    config = _without_kernels(
        {k: v for k, v in config.items() if k != "quantization_config"}
    )  # 4-bit weights have keys of their own
    for part, where in _parts(config):
        _check_bounds(part, where)
    try:
        with quiet():
            cfg = CONFIG_MAPPING[kind].from_dict(config)
    except (StrictDataclassError, *_UNBUILT) as e:
        raise ValueError(f"config: not a {kind}: {' '.join(str(e).split())}") from e
    for part, where in _parts(cfg.to_dict()):
        _check_fit(part, where)
    return table[type(cfg)], cfg


def _parts(config: Mapping[str, Any], where: str = "config") -> Iterator[tuple[Mapping[str, Any], str]]:
    """(config, its name): a model's and those of its towers inside it."""
    yield config, where
    for name, part in config.items():
        if isinstance(part, dict) and name.endswith("_config"):
            yield from _parts(part, f"{where}.{name}")


def _check_bounds(config: Mapping[str, Any], where: str) -> None:
    """Raise where a size lies outside of its bounds. Before transformers sees it: it makes a list of as many layers."""
    for name, (low, high) in _SIZES.items():
        value = config.get(name)
        for size in value if isinstance(value, list | tuple) else (value,):
            if isinstance(size, int | float) and not low <= size <= high:
                raise ValueError(f"{where}.{name} must be from {low} to {high}, got {size}")


def _check_fit(config: Mapping[str, Any], where: str) -> None:
    """Raise where sizes do not fit each other."""
    width, heads = _first_of(config, _WIDTH_NAMES), _first_of(config, _HEAD_NAMES)
    groups = _first_of(config, ("num_key_value_heads",))
    if heads and groups and heads[1] % groups[1]:
        raise ValueError(
            f"{where}: num_key_value_heads must divide {heads[0]}, got {groups[1]} and {heads[1]}"
        )
    if width and heads:
        head = config.get("head_dim") or width[1] // heads[1]
        if head < 1:
            raise ValueError(f"{where}: {heads[0]} must be at most {width[0]}, got {heads[1]} and {width[1]}")
        if where.endswith("vision_config") and width[1] % heads[1]:
            raise ValueError(f"{where}: {heads[0]} must divide {width[0]}, got {heads[1]} and {width[1]}")
        _check_rope(config, head, where)
    _check_patches(config, where)


def _check_rope(config: Mapping[str, Any], head: int, where: str) -> None:
    """Positions turn pairs of a head's values; those of Qwen-VL share them out to three axes."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    turned = int(head * (rope.get("partial_rotary_factor") or 1))
    if turned % 2:
        raise ValueError(
            f"{where}: heads must have an even number of values for rotary positions, got {turned}"
        )
    if "mrope_section" not in rope:
        return
    sections = rope["mrope_section"]
    whole = (
        isinstance(sections, list | tuple)
        and len(sections) == 3
        and all(isinstance(n, int) and n > 0 for n in sections)
    )
    if not whole or sum(sections) != turned // 2:
        raise ValueError(
            f"{where}: mrope_section must be three numbers whose sum is {turned // 2}, half of a head, got {sections}"
        )


def _check_patches(config: Mapping[str, Any], where: str) -> None:
    sides: list[list[int]] = []
    for name in ("image_size", "patch_size"):
        value = config.get(name)
        pair: list[Any] = list(value)[-2:] if isinstance(value, list | tuple) else [value, value]
        if not pair or not all(isinstance(n, int) for n in pair):
            return
        sides.append([pair[0], pair[-1]])
    (height, width), (rows, columns) = sides
    patches = (height // rows) * (width // columns)
    if not 1 <= patches <= _MOST_PATCHES:
        raise ValueError(
            f"{where}: image_size {config['image_size']} and patch_size {config['patch_size']} must make 1 to {_MOST_PATCHES} patches, "
            f"got {patches}"
        )


def _first_of(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, int] | None:
    """The first of the names that the config sets to a whole number, and that number."""
    return next(((n, config[n]) for n in names if isinstance(config.get(n), int)), None)


def count_layer_weights(config: Mapping[str, Any]) -> int:
    """How many numbers the matrices of the layers have at least, told by the sizes alone: building so many layers takes minutes."""
    total = 0
    for part, _ in _parts(config):
        sizes = [
            _first_of(part, names) for names in (_DEPTH_NAMES, _WIDTH_NAMES, ("intermediate_size", "n_inner"))
        ]
        total += math.prod(size[1] for size in sizes if size) if all(sizes) else 0
    return total


def check_memory(numbers: int, name: str) -> None:
    """Refuse to draw more weights than there is memory for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * numbers > memory:
        raise ValueError(
            f"config: a {name} of these sizes has {4 * numbers / 1e9:,.1f} GB of float32 weights or more, "
            f"this machine {memory / 1e9:,.1f} GB of memory"
        )


def check_head(head: str) -> None:
    if head not in ("", "language"):
        raise ValueError(f"hub: head must be '' (the plain encoder or decoder) or 'language', got {head!r}")


def _without_kernels(config: dict[str, Any]) -> dict[str, Any]:
    """The config without a choice of kernels beyond PyTorch's own: transformers would fetch `owner/name` from the hub and run it.

    The choice does not change what the model computes, and a checkpoint may name a package that is not installed here.
    """
    kept = {}
    for key, value in config.items():
        if _KERNELS.fullmatch(key) and value not in _OWN_KERNELS:
            continue
        kept[key] = _without_kernels(value) if isinstance(value, dict) else value
    return kept


def _plain(kind: Any) -> dict[str, bool]:
    return (
        {"add_pooling_layer": False}
        if "add_pooling_layer" in inspect.signature(kind.__init__).parameters
        else {}
    )


def build_module(kind: Any, cfg: Any) -> Any:
    try:
        return kind._from_config(cfg, dtype=torch.float32, **_plain(kind)).eval()
    except _UNBUILT as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(
            f"config: no {cfg.model_type} can be built of these sizes ({type(e).__name__}: {reason})"
        ) from e


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers: what matters of them is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
