"""peft's adapter_config.json: checked when it is read, its rules of names and strengths, made anew when an
adapter is written.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medvl.base.text import few
from medvl.weights import lora
from medvl.weights.lora import Adapter

# Embeddings and heads: peft writes them as a whole where the vocabulary was resized.
RESIZED = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)\.weight$")

# Settings that are read here, that do not touch the forward pass, or that matter only together with one that
# is refused.
_KNOWN = re.compile(
    "peft_type|r|lora_(alpha|dropout)|(rank|alpha|layers)_pattern|use_rslora|fan_in_fan_out|(target|exclude)_modules|"
    "layers_to_transform|modules_to_save|init_lora_weights|bias|task_type|auto_mapping|base_model_name_or_path|revision|"
    "inference_mode|peft_version|(eva|loftq|corda|lora_ga)_config|qalora_group_size|megatron_core"
)
# {setting: what it does that an `Adapter` does not hold}
_REFUSED = {
    "use_dora": "DoRA rescales the rows of the weight",
    "lora_bias": "B has a bias",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "layer_replication": "it makes new layers of copies",
    "target_parameters": "it adapts parameters that are not layers (fused experts)",
    "alora_invocation_tokens": "aLoRA acts only after certain tokens",
    "use_qalora": "QALoRA pools the input",
    "use_bdlora": "the factors of BD-LoRA are block-diagonal",
    "kasa_config": "KaSA truncates the base",
    "ensure_weight_tying": "one adapter serves two tied layers",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str) or _is_list_of_text(value)


def _are_ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_positive_integer, value.values()))


def _are_alphas(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_layers(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, int) for item in value)
    return isinstance(value, int)


# {setting: (test of its value, what the message says it must be)}
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_positive_integer, "a positive integer"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_fraction, "a number in [0, 1)"),
    "rank_pattern": (_are_ranks, "{regex: positive integer}"),
    "alpha_pattern": (_are_alphas, "{regex: number}"),
    "target_modules": (_is_text_or_list, "a regex or a list of names"),
    "exclude_modules": (_is_text_or_list, "a regex or a list of names"),
    "modules_to_save": (_is_list_of_text, "a list of names"),
    "layers_to_transform": (_are_layers, "layer numbers"),
    "layers_pattern": (_is_text_or_list, "a regex or a list of them"),
}


def check_adapter_config(config: dict[str, Any], path: Path) -> None:
    """Refuse what changes the forward pass or the base in a way that an `Adapter` does not hold, and
    whatever is not known.
    """

    def refuse(key: str, why: str) -> None:
        raise ValueError(f"read_adapter: {path}: {key} = {json.dumps(config.get(key))} cannot be read: {why}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "it must be LORA")
    if config.get("bias") not in (None, "none"):
        refuse("bias", "it trains biases of the base")
    # PiSSA, OLoRA and others subtract their start from the base. These only choose the first numbers.
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal")):
        refuse(
            "init_lora_weights",
            "it may change the base; save it as plain LoRA (peft's path_initial_model_for_weight_conversion)",
        )
    for key, value in config.items():
        # peft writes all its settings, most of them empty: those mean nothing, whatever they are called.
        unset = value is None or value is False or value in ("", [], {})
        if not unset and not _KNOWN.fullmatch(key):
            refuse(key, _REFUSED.get(key, "its effect is not known here"))
    for key, (is_valid, expected) in _TYPES.items():
        if config.get(key) is not None and not is_valid(config[key]):
            refuse(key, f"it must be {expected}")
    # Tried here: later, a broken one would fail without the name of its file.
    for key in (
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_pattern",
    ):
        for regex in _patterns(config, key):
            try:
                re.compile(regex)
            except re.error as e:
                refuse(key, f"{regex!r} is not a regular expression ({e})")


def is_saved_module(config: Mapping[str, Any], name: str) -> bool:
    """Whether `modules_to_save` names the module or parameter: then the file holds all of it."""
    modules = config.get("modules_to_save") or []
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules)


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """(rank, scale) that the config gives a module."""
    # 8 is peft's default of both. An alpha of 0 is a value, a rank of 0 is none.
    default_alpha = 8 if config.get("lora_alpha") is None else config["lora_alpha"]
    rank = _pattern_value(config, "rank_pattern", module, config.get("r") or 8)
    alpha = _pattern_value(config, "alpha_pattern", module, default_alpha)
    if config.get("use_rslora"):  # rank-stabilised: Kalajdzievski 2023, arXiv:2312.03732
        return rank, alpha / math.sqrt(rank)
    return rank, alpha / rank


def demanded_modules(
    config: dict[str, Any], layers: Mapping[str, str], names: Mapping[str, str]
) -> list[str]:
    """The layers of the model that must be in the file.

    A config speaks of the names of its time: those of the file say how an older name is made of a newer one,
    and a layer for which they do not is not demanded. Ends of names do not say which tower they were meant
    for: if the file has nothing of the vision tower, or nothing but it, the other side is not demanded.

    Args:
        layers: {module: kind} of the model.
        names: {module in the file: the model's}.
    """
    # "all-linear" is no regex: it is written out as the names that it stands for, without heads.
    targets = config.get("target_modules") or []
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = []
        for module, kind in layers.items():
            if kind != "embedding" and not re.search(r"(^|\.)(lm_head|score|classifier)$", module):
                targets.append(module)
        config = config | {"target_modules": targets}
    # Which towers the file is about: True for vision, False for language.
    sides = {bool(lora.VISION.search(module)) for module in names.values()}
    stems = {_differing_stems(old, new) for old, new in names.items()}
    demanded = []
    for module in layers:
        # The names that the module may have had when the file was written.
        dotted = f".{module}"  # stems begin with a dot, so they fit whole parts of a name only
        old_names = {old + dotted[len(new) :] for old, new in stems if dotted.startswith(f"{new}.")}
        named = [old[1:] for old in old_names if is_targeted(config, old[1:])]
        # A regex and a full name say which tower is meant; an end such as "q_proj" fits both.
        exact = isinstance(targets, str) or any(old in targets for old in named)
        if named and (exact or bool(lora.VISION.search(module)) in sides):
            demanded.append(module)
    return demanded


def is_targeted(config: Mapping[str, Any], name: str) -> bool:
    """peft's rule of which modules a config names."""
    if _names_module(config.get("exclude_modules") or [], name) or is_saved_module(config, name):
        return False
    if not _names_module(config.get("target_modules"), name):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or name in config["target_modules"]:
        return True
    # Only some layers: the number is behind one of the patterns, or the first number in the name.
    lists = config.get("layers_pattern") or []
    if isinstance(lists, str):
        lists = [lists]
    patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in lists] or [r".*?\.[^.]*\.(\d+)\."]
    layer = None
    for pattern in patterns:
        match = re.match(pattern, name)
        if match:
            layer = int(match[1])
            break
    return layer in ([layers] if isinstance(layers, int) else layers)


def adapter_config(adapter: Adapter, base: str, task: str, targets: list[str] | str | None) -> dict[str, Any]:
    """The adapter_config.json of an adapter: the one it came with, with what no longer holds made anew.

    Args:
        base, task, targets: as `write_adapter`.
    Raises:
        ValueError: targets that miss a layer, or a scale that is not finite.
    """
    old, modules = adapter.config, list(adapter.factors)
    config = {"init_lora_weights": True, "lora_bias": False, "use_dora": False, **old}
    # The config's own rank, alpha and patterns stay where they still give what the adapter has.
    unchanged = bool(old)
    for module in modules:
        if old and rank_and_scale(old, module) != (adapter.rank(module), adapter.scale[module]):
            unchanged = False
            break
    if not unchanged:
        config |= _strength_settings(adapter)
    config |= {
        "peft_type": "LORA",
        "task_type": task or old.get("task_type", "CAUSAL_LM"),
        "base_model_name_or_path": base or old.get("base_model_name_or_path"),
        "target_modules": sorted(modules) if targets is None else targets,
        "modules_to_save": _modules_to_save(adapter) or None,
        "lora_dropout": adapter.dropout,
        "fan_in_fan_out": "conv1d" in adapter.kinds.values(),
        "bias": "none",
        "inference_mode": True,
        # The targets are full names now, or the caller's: nothing else may narrow them.
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }
    missed = [m for m in modules if not is_targeted(config, m)]
    if missed:
        raise ValueError(
            f"write_adapter: targets must name every layer of {adapter}, {json.dumps(targets)} "
            f"misses {few(missed)}"
        )
    return config


def _patterns(config: Mapping[str, Any], key: str) -> list[str]:
    """The regular expressions of a setting. A list of targets holds names, and only a text is a regex."""
    value = config.get(key) or []
    if isinstance(value, str):
        return [value]
    if key in ("target_modules", "exclude_modules"):
        return []
    return list(value)


def _pattern_value(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the module."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _names_module(targets: str | list[str] | None, name: str) -> bool:
    """Whether a regex, or a list of ends of names, names the module."""
    if isinstance(targets, str):  # the whole name, unlike the patterns of rank and alpha
        return bool(re.fullmatch(targets, name))
    return any(name == end or name.endswith(f".{end}") for end in targets or [])


def _differing_stems(old: str, new: str) -> tuple[str, str]:
    """What two names have before the end that they share; each begins with a dot or is empty."""
    a, b = old.split("."), new.split(".")
    shared = 0
    # Compared from the end: versions of transformers differ in what stands in front.
    while shared < min(len(a), len(b)) and a[-1 - shared] == b[-1 - shared]:
        shared += 1
    # The empty first part puts a dot in front of a stem that is not empty.
    stem_a = a[: len(a) - shared]
    stem_b = b[: len(b) - shared]
    return ".".join(["", *stem_a]), ".".join(["", *stem_b])


def _modules_to_save(adapter: Adapter) -> list[str]:
    """The old entries that still name a tensor, and the modules of tensors that no entry names."""
    old = adapter.config
    entries = []
    for entry in old.get("modules_to_save") or []:
        if any(is_saved_module({"modules_to_save": [entry]}, name) for name in adapter.full):
            entries.append(entry)
    modules = set()
    for name in adapter.full:
        # A resized embedding is written without an entry, if peft wrote the adapter.
        if not (is_saved_module(old, name) or (old and RESIZED.search(name))):
            modules.add(name.rpartition(".")[0])
    return [*entries, *sorted(modules - set(adapter.factors))]


def _strength_settings(adapter: Adapter) -> dict[str, Any]:
    """The commonest rank and alpha, and the others by full name."""
    ranks = {m: adapter.rank(m) for m in adapter.factors}
    wrong = [m for m in ranks if not math.isfinite(adapter.scale[m])]
    if wrong:
        raise ValueError(f"write_adapter: the scale of {few(wrong)} of {adapter} must be finite")
    # peft stores alpha and divides by the rank; an `Adapter` holds the quotient.
    alphas = {m: _rounded(adapter.scale[m] * rank) for m, rank in ranks.items()}
    common_rank = Counter(ranks.values()).most_common(1)[0][0]
    common_alpha = Counter(alphas.values()).most_common(1)[0][0]
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for module in ranks:
        # Anchored: peft also accepts a pattern behind any prefix, where it could fit a second layer.
        pattern = f"^{re.escape(module)}"
        if ranks[module] != common_rank:
            rank_pattern[pattern] = ranks[module]
        if alphas[module] != common_alpha:
            alpha_pattern[pattern] = alphas[module]
    return {
        "r": common_rank,
        "lora_alpha": common_alpha,
        "use_rslora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _rounded(x: float) -> float:
    """A whole number where only the rounding of scale x rank keeps it from being one."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x
