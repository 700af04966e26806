"""Files of four-bit whole numbers: checkpoints of AutoAWQ and of compressed-tensors are read, the latter written.

Both say in config.json, under quantization_config, how they are quantised; vLLM reads both.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from medvl.hub.checkpoints import Entry
from medvl.weights import int4

_SUFFIXES = {
    "awq": (".qweight", ".scales", ".qzeros", ".g_idx"),
    "compressed-tensors": (
        *(".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
    ),
}
_ADVICE = {
    "gptq": "; quantise the full-precision model anew (invoke quantize), or convert the file with gptqmodel "
    "or llm-compressor to compressed-tensors",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@frozen
class _Scheme:
    """What quantization_config says of some layers."""

    targets: tuple[str, ...]  # names of layers, regexes ("re:..."), or kinds of layers ("Linear")
    group: int  # -1: the whole row
    symmetric: bool


# Reading ----------------------------------------------------------------------------------------------------
def join_int4(entries: Mapping[str, Entry], config: Mapping[str, Any], name: str) -> dict[str, Entry]:
    """The entries of a checkpoint, with the tensors of each four-bit weight joined to one, read as an `Int4`.

    Args:
        config: its config.json; without a quantization_config of these two formats nothing is joined.
        name: of the checkpoint, for errors.
    Raises:
        ValueError: a method or setting that is not read, a tensor that is missing, or of another dtype or
            shape than the config says.
    """
    settings = _settings(config)
    method = settings.get("quant_method")
    if method in (None, "bitsandbytes"):
        return dict(entries)
    where = f"load: {name}: quantization_config"
    schemes, _ = _read_schemes(settings, where)
    plain: dict[str, Entry] = {}
    layers: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        layer, dot, suffix = key.rpartition(".")
        if dot + suffix in _SUFFIXES[method]:
            layers.setdefault(layer, {})[dot + suffix] = entry
        else:
            plain[key] = entry
    if not layers:
        raise ValueError(f"{where} says {method}, but no tensor is called {_SUFFIXES[method][0]}")
    join = _join_awq if method == "awq" else _join_compressed
    for layer, parts in layers.items():
        scheme = _scheme_of(layer, schemes)
        if scheme is None:
            raise ValueError(f"{where}: no config group has the layer {layer}, which the file has in 4 bits")
        plain[f"{layer}.weight"] = join(parts, scheme, f"load: {name}: {layer}")
    return plain


def int4_on_meta(config: Mapping[str, Any], module: Any) -> Callable[[str, Tensor], Tensor] | None:
    """(name, weight on meta) -> the weight as the checkpoint of this config has it, for estimates; None where
    the config names neither format.
    """
    settings = _settings(config)
    if settings.get("quant_method") not in _SUFFIXES:
        return None
    schemes, ignored = _read_schemes(settings, "quantization_config")
    linear = {n for n, part in module.named_modules() if isinstance(part, nn.Linear)}

    def convert(name: str, w: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        scheme = _scheme_of(layer, schemes)
        if layer not in linear or scheme is None or ignored(layer) or name == layer:
            return w
        _count_groups(w.shape[1], scheme, f"quantization_config: {layer}")
        codes, scale, zero = int4.round_to_codes(w, scheme.group, scheme.symmetric)
        return int4.int4_weight(codes, scale, zero, w.dtype)

    return convert


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config, which models with a vision tower may have in the config of their text."""
    text = config.get("text_config") or {}
    settings = config.get("quantization_config") or text.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"load: quantization_config must be a JSON object, found {str(settings)[:60]}")
    return settings


def _read_schemes(settings: dict[str, Any], where: str) -> tuple[list[_Scheme], Callable[[str], bool]]:
    """The schemes, and whether a layer is left out.

    Raises:
        ValueError: a method or a setting that is not read.
    """
    method = settings.get("quant_method")
    if method == "awq":
        version = settings.get("version", settings.get("format", "gemm"))
        needed = (
            ("bits", settings.get("bits", settings.get("w_bit")), 4),
            ("version", str(version).lower(), "gemm"),
            ("zero_point", settings.get("zero_point", True), True),
        )
        _check_settings(needed, where)
        group = _check_group(settings.get("group_size", settings.get("q_group_size")), where)
        skipped = [*(settings.get("modules_to_not_convert") or []), "lm_head"]
        return [_Scheme(("Linear",), group, symmetric=False)], lambda layer: any(s in layer for s in skipped)
    if method != "compressed-tensors":
        raise ValueError(
            f"{where}: quant_method must be bitsandbytes (4 bits), awq or compressed-tensors, found "
            f"{method!r}{_ADVICE.get(str(method), '; take the full-precision model')}"
        )
    try:
        schemes = [_read_group(group, settings, where) for group in settings["config_groups"].values()]
        ignore = settings.get("ignore") or []
        for pattern in [*ignore, *(target for scheme in schemes for target in scheme.targets)]:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except (AttributeError, KeyError, TypeError, re.error) as e:
        raise ValueError(f"{where}: config_groups and ignore cannot be read ({e!r})") from e
    if not schemes:
        raise ValueError(f"{where}: config_groups must say how layers are quantised, found none")
    return schemes, lambda layer: any(_matches(layer, pattern) for pattern in ignore)


def _read_group(layers: dict[str, Any], settings: dict[str, Any], where: str) -> _Scheme:
    """One of the config_groups of compressed-tensors."""
    weights = layers["weights"]
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") == -1 else "group")
    needed = (
        ("format", layers.get("format") or settings.get("format"), "pack-quantized"),
        ("num_bits", weights.get("num_bits"), 4),
        ("type", weights.get("type", "int"), "int"),
        ("input_activations", layers.get("input_activations"), None),
    )
    _check_settings(needed, where)
    if weights.get("actorder") in ("group", "dynamic", True):
        raise ValueError(f"{where}: columns in the order of activations (actorder) are not read")
    if strategy not in ("group", "channel"):
        raise ValueError(f"{where}: strategy must be 'group' or 'channel', found {strategy!r}")
    group = -1 if strategy == "channel" else _check_group(weights.get("group_size"), where)
    return _Scheme(tuple(layers["targets"]), group, bool(weights.get("symmetric", True)))


def _check_settings(settings: Iterable[tuple[str, Any, Any]], where: str) -> None:
    """Raise where a setting (name, value, value that is read) has another value."""
    for key, found, needed in settings:
        if found != needed:
            raise ValueError(f"{where}: {key} must be {needed!r} to be read here, found {found!r}")


def _check_group(group: Any, where: str) -> int:
    if type(group) is not int or (group != -1 and group < 1):
        raise ValueError(f"{where}: group_size must be a number of values or -1, found {group!r}")
    return group


def _scheme_of(layer: str, schemes: list[_Scheme]) -> _Scheme | None:
    # A name says more than the kind of a layer.
    for scheme in schemes:
        if any(_matches(layer, target) for target in scheme.targets):
            return scheme
    return next((scheme for scheme in schemes if "Linear" in scheme.targets), None)


def _matches(layer: str, pattern: str) -> bool:
    """Whether a pattern names a layer; files of older versions of transformers lack the first parts of names."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], layer) is not None
    return layer == pattern or layer.endswith(f".{pattern}")


def _join_compressed(parts: dict[str, Entry], scheme: _Scheme, where: str) -> Entry:
    """The entry of a weight of compressed-tensors' layout."""
    zero = () if scheme.symmetric else (".weight_zero_point",)
    _check_parts(parts, (".weight_packed", ".weight_scale", ".weight_shape", *zero), where)
    shape = parts[".weight_shape"].read().tolist()
    if parts[".weight_shape"].dtype not in (torch.int64, torch.int32) or len(shape) != 2:
        raise ValueError(f"{where}: weight_shape must be [out, in], found {shape}")
    out, width = shape
    groups = _count_groups(width, scheme, where)
    _check_tensor(parts, ".weight_packed", (out, -(-width // 8)), torch.int32, where)
    _check_scale(parts, ".weight_scale", (out, groups), width, scheme, where)
    if not scheme.symmetric:
        _check_tensor(parts, ".weight_zero_point", (-(-out // 8), groups), torch.int32, where)
    return Entry(
        shape=(out, width),
        dtype=parts[".weight_scale"].dtype,
        read=partial(_read_compressed, parts, out, width),
    )


def _read_compressed(parts: dict[str, Entry], out: int, width: int) -> Tensor:
    scale = parts[".weight_scale"].read()
    zero = None
    if ".weight_zero_point" in parts:
        # Packed along out: transposed, words lie along the last axis as anywhere.
        words = parts[".weight_zero_point"].read().t()
        zero = int4.unpack_codes(words, out).t().contiguous()
    packed = {"packed": parts[".weight_packed"].read(), "scale": scale, "zero": zero}
    return int4.Int4.like((out, width), scale.dtype, scale.device, **packed)


def _join_awq(parts: dict[str, Entry], scheme: _Scheme, where: str) -> Entry:
    """The entry of a weight of AutoAWQ's layout: [in, out / 8], transposed when it is read."""
    _check_parts(parts, (".qweight", ".scales", ".qzeros"), where)
    if len(parts[".qweight"].shape) != 2:
        raise ValueError(f"{where}: qweight must be [in, out / 8], found {list(parts['.qweight'].shape)}")
    width, words = parts[".qweight"].shape
    groups = _count_groups(width, scheme, where)
    _check_tensor(parts, ".qweight", (width, words), torch.int32, where)
    _check_scale(parts, ".scales", (groups, 8 * words), width, scheme, where)
    _check_tensor(parts, ".qzeros", (groups, words), torch.int32, where)
    return Entry(shape=(8 * words, width), dtype=parts[".scales"].dtype, read=partial(_read_awq, parts))


def _read_awq(parts: dict[str, Entry]) -> Tensor:
    codes = int4.unpack_awq(parts[".qweight"].read()).t()
    zero = int4.unpack_awq(parts[".qzeros"].read()).t().contiguous()
    scale = parts[".scales"].read().t().contiguous()
    return int4.int4_weight(codes, scale, zero, scale.dtype)


def _check_parts(parts: Mapping[str, Entry], needed: Collection[str], where: str) -> None:
    missing = [suffix[1:] for suffix in needed if suffix not in parts]
    if missing:
        raise ValueError(f"{where}: a 4-bit weight needs {', '.join(missing)}, which the file lacks")
    unexpected = sorted(suffix[1:] for suffix in parts if suffix not in needed)
    if unexpected:
        reason = "the config says that it is symmetric"
        if any("g_idx" in suffix for suffix in unexpected):
            reason = "columns in the order of activations (act-order) are not read; quantise it without"
        raise ValueError(f"{where}: found {', '.join(unexpected)}; {reason}")


def _count_groups(width: int, scheme: _Scheme, where: str) -> int:
    if scheme.group == -1:
        return 1
    if width % scheme.group:
        raise ValueError(f"{where}: groups of {scheme.group} must divide a row, the file has rows of {width}")
    return width // scheme.group


def _check_scale(
    parts: Mapping[str, Entry], suffix: str, shape: tuple[int, int], width: int, scheme: _Scheme, where: str
) -> None:
    entry = parts[suffix]
    axis = 1 if suffix == ".weight_scale" else 0  # of the groups
    groups = entry.shape[axis] if len(entry.shape) == 2 else 0
    if groups and groups != shape[axis] and width % groups == 0:
        says = "whole rows" if scheme.group == -1 else f"group_size {scheme.group}"
        raise ValueError(
            f"{where}: the config says {says}, but {suffix[1:]} {list(entry.shape)} has groups of "
            f"{width // groups}; correct quantization_config or take the file that belongs to it"
        )
    if entry.dtype not in _FLOATS:
        raise ValueError(f"{where}: {suffix[1:]} must hold floats, found {str(entry.dtype)[6:]}")
    _check_tensor(parts, suffix, shape, entry.dtype, where)


def _check_tensor(
    parts: Mapping[str, Entry], suffix: str, shape: tuple[int, int], dtype: torch.dtype, where: str
) -> None:
    entry = parts[suffix]
    if entry.shape != shape or entry.dtype != dtype:
        found = f"{str(entry.dtype)[6:]} {list(entry.shape)}"
        raise ValueError(f"{where}: {suffix[1:]} must be {str(dtype)[6:]} {list(shape)}, found {found}")


# Writing ----------------------------------------------------------------------------------------------------
def pack_int4(w: Any) -> dict[str, Tensor]:
    """The tensors of one weight as compressed-tensors stores them, {what follows "weight" in the name: tensor}."""
    tensors = {"_packed": w.packed, "_scale": w.scale, "_shape": torch.tensor(w.shape)}
    if w.zero is not None:
        tensors["_zero_point"] = int4.pack_codes(w.zero.t().contiguous()).t().contiguous()
    return tensors


def quantization_config(weights: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """The quantization_config of a model with these `Int4` weights.

    Args:
        ignore: linear layers that are not quantised.
    Raises:
        ValueError: weights of several group sizes, or with zero points and without.
    """
    sizes = {w.group for w in weights.values()}
    whole_rows = all(w.group == w.shape[-1] for w in weights.values())
    symmetric = {w.zero is None for w in weights.values()}
    if len(symmetric) > 1 or (len(sizes) > 1 and not whole_rows):
        raise ValueError(
            f"save: a file holds 4-bit weights of one kind, these have groups of {sorted(sizes)} values, "
            f"{sum(w.zero is None for w in weights.values())} of {len(weights)} symmetric"
        )
    size = None if whole_rows else sizes.pop()
    settings = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric.pop(),
        "strategy": "channel" if size is None else "group",
        "group_size": size,
    }
    layers = {"targets": ["Linear"], "weights": settings, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": layers},
        "ignore": sorted(ignore),
    }
