"""Adapters as files: peft's folders. A key without a place is an error, and so is a layer without its keys."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl.base import files
from medvl.base.text import few
from medvl.hub import weight_names
from medvl.hub.checkpoints import (
    Entry,
    find_file,
    new_folder,
    open_weights,
    read_finite,
    read_json,
    save_finite,
)
from medvl.weights import lora
from medvl.weights.lora import Adapter, LoraConfig

PREFIX = "base_model.model."
_FACTOR = re.compile(  # the name of the adapter may stand in the key, as in a state dict saved as it is
    r"(?P<module>.+?)\.lora_(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
_RESIZED = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)\.weight$")
# Read here; or said nothing of the forward pass by, or only together with what is refused.
_KNOWN = re.compile(
    "peft_type|r|lora_(alpha|dropout)|(rank|alpha|layers)_pattern|use_rslora|fan_in_fan_out|(target|exclude)_modules|layers_to_transform|"
    "modules_to_save|init_lora_weights|bias|task_type|auto_mapping|base_model_name_or_path|revision|inference_mode|peft_version|"
    "(eva|loftq|corda|lora_ga)_config|qalora_group_size|megatron_core"
)
_REFUSED = {
    "use_dora": "DoRA rescales the rows of the weight",
    "lora_bias": "B has a bias",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "layer_replication": "it makes new layers of copies",
    "target_parameters": "it corrects parameters that are no layers (fused experts)",
    "alora_invocation_tokens": "aLoRA acts only behind certain tokens",
    "use_qalora": "QALoRA pools the input",
    "use_bdlora": "the factors of BD-LoRA are block-diagonal",
    "kasa_config": "KaSA truncates the base",
    "ensure_weight_tying": "one adapter serves two tied layers",
}


def read_adapter(
    name: files.PathLike,
    skeleton: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Adapter:
    """An adapter that peft saved. The keys of its file say which layers it corrects, its config says how strongly.

    Args:
        name: a folder with adapter_config.json and adapter_model.safetensors (or adapter_model.bin, read with weights_only), or a name on
            the Hugging Face hub, read from its cache and downloaded only if it is not there.
        skeleton: `skeletons.Skeleton` of the model it is for. With it, names of older versions of transformers become the skeleton's, shapes and
            kinds of layers are checked, and every layer that the config's target_modules name must be in the file; only where they are ends
            of names may the file lack the vision tower as a whole, or all but it. Without it names are taken as they are, `fan_in_fan_out`
            tells GPT-2's layers, and `apply_lora` finds what does not fit.
    Returns:
        adapter with factors in `dtype` on `device`; `full` holds what modules_to_save, a resized or an adapted embedding brought along.
    Raises:
        ValueError: nothing there, a broken file, a kind of adapter that `Adapter` cannot hold (named), keys without their pair, unexpected
            or missing, a rank or shape that does not fit, numbers that are not finite.
    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685; file format and rules of peft 0.21.
    """
    where = find_file(str(name), ("adapter_config.json",))
    config = read_json(where)
    _check_config(config, where)
    path = find_file(str(name), ("adapter_model.safetensors", "adapter_model.bin"))
    held = open_weights(path, str(name))
    pairs, whole, kinds = _sorted_out(held, config, path)
    names = {m: m for m in pairs}
    if skeleton is not None:
        own = lora.target_layers(LoraConfig(pattern=".*"), skeleton)
        names, whole = _renamed(skeleton, pairs, whole, held, config, path)
        for m, p in pairs.items():
            check_fit(
                skeleton,
                own,
                names[m],
                kinds[m],
                held[p["a"]].shape,
                held[p["b"]].shape,
                f"read_adapter: {path}",
            )
        if missing := [m for m in _demanded(config, own, names) if m not in names.values()]:
            raise ValueError(
                f"read_adapter: {path} lacks {few(missing)}, which target_modules in its config name; is it cut or for another model?"
            )
        kinds = {m: own[names[m]] for m in pairs}
    return Adapter(
        factors={
            names[m]: {k: read_finite(held[key], key, path, dtype, device) for k, key in p.items()}
            for m, p in pairs.items()
        },
        scale={names[m]: _strength(config, m)[1] for m in pairs},
        kinds={names[m]: kinds[m] for m in pairs},
        full={n: read_finite(held[key], key, path, dtype, device) for n, key in whole.items()},
        dropout=config.get("lora_dropout") or 0.0,
        name=Path(name).name if Path(name).is_dir() else str(name),
        config=config,
    )


def write_adapter(
    adapter: Adapter,
    folder: files.PathLike,
    *,
    base: str = "",
    task: str = "",
    targets: Iterable[str] | str | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` and `read_adapter` read; it is there whole or not at all.

    What the adapter's `config` says is kept where it still holds. A gate [r] is multiplied into B.

    Args:
        base: name or path of the base model; if left out, that of the adapter's config.
        task: of peft's task types; if left out, that of the adapter's config, else CAUSAL_LM.
        targets: target_modules to write, one regex or ends of names; they must name every layer of the adapter and, what cannot be seen
            here, no other layer of the model. If left out, the full names of the layers.
    Raises:
        ValueError: the folder exists and is not empty; a gate per sample, a router or numbers that are not finite; no layers; targets that
            miss a layer.
    """
    if not adapter.factors:
        raise ValueError(f"write_adapter: {adapter} must correct at least one layer")
    if routed := [m for m, f in adapter.factors.items() if "router" in f]:
        raise ValueError(
            f"write_adapter: {few(routed)} of {adapter} have routers (H-LoRA), which peft has no place for; use write_hlora"
        )
    state: dict[str, Tensor] = {}
    for m, f in adapter.factors.items():
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if adapter.kinds[m] == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        state |= {f"{PREFIX}{m}.{a}": f["a"], f"{PREFIX}{m}.{b}": folded(adapter, m, "write_adapter")}
    for n, t in adapter.full.items():
        module, _, leaf = n.rpartition(".")
        state[f"{PREFIX}{module}.base_layer.{leaf}" if module in adapter.factors else PREFIX + n] = t
    config = _config_of(
        adapter, base, task, targets if targets is None or isinstance(targets, str) else list(targets)
    )
    with new_folder(folder) as tmp:
        save_finite(state, tmp / "adapter_model.safetensors", f"write_adapter: {adapter}")
        (tmp / "adapter_config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True), encoding="utf-8"
        )


def _number(v: Any) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)


def _count(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool) and v > 0


def _words(v: Any) -> bool:
    return isinstance(v, list) and all(isinstance(t, str) for t in v)


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_count, "a positive integer"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (lambda v: _number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "rank_pattern": (
        lambda v: isinstance(v, dict) and all(map(_count, v.values())),
        "{regex: positive integer}",
    ),
    "alpha_pattern": (lambda v: isinstance(v, dict) and all(map(_number, v.values())), "{regex: number}"),
    "target_modules": (lambda v: isinstance(v, str) or _words(v), "a regex or a list of names"),
    "exclude_modules": (lambda v: isinstance(v, str) or _words(v), "a regex or a list of names"),
    "modules_to_save": (_words, "a list of names"),
    "layers_to_transform": (
        lambda v: isinstance(v, int) or (isinstance(v, list) and all(isinstance(i, int) for i in v)),
        "layer numbers",
    ),
    "layers_pattern": (lambda v: isinstance(v, str) or _words(v), "a regex or a list of them"),
}


def _check_config(config: dict[str, Any], where: Path) -> None:
    """Refuse what changes the forward pass or the base in a way that an `Adapter` does not hold, and whatever is not known."""

    def refuse(key: str, why: str) -> None:
        raise ValueError(
            f"read_adapter: {where}: {key} = {json.dumps(config.get(key))} cannot be read: {why}"
        )

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "it must be LORA")
    if config.get("bias") not in (None, "none"):
        refuse("bias", "it trains biases of the base")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal")):
        refuse(
            "init_lora_weights",
            "it may change the base; save it as plain LoRA (peft's path_initial_model_for_weight_conversion)",
        )
    for key, value in config.items():
        if not _KNOWN.fullmatch(key) and not (value is None or value is False or value in ("", [], {})):
            refuse(key, _REFUSED.get(key, "what it does is not known here"))
    for key, (good, what) in _TYPES.items():
        if config.get(key) is not None and not good(config[key]):
            refuse(key, f"it must be {what}")
    for key in (
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_pattern",
    ):
        value = config.get(key) or []
        names = key in ("target_modules", "exclude_modules") and not isinstance(value, str)
        for regex in [value] if isinstance(value, str) else [] if names else value:
            try:
                re.compile(regex)
            except re.error as e:
                refuse(key, f"{regex!r} is not a regular expression ({e})")


def _sorted_out(
    held: Mapping[str, Entry], config: dict[str, Any], path: Path
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """({module: {"a": key, "b": key}}, {parameter replaced as a whole: key}, {module: kind}), all keys of the file accounted for."""
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    kinds: dict[str, str] = {}
    unexpected = []
    for key in held:
        name = key.removeprefix(PREFIX)
        if hit := _FACTOR.fullmatch(name):
            m, part = hit["module"], hit["linear"] or hit["embedding"]
            kind = "embedding" if hit["embedding"] else "conv1d" if config.get("fan_in_fan_out") else "linear"
            first = pairs.setdefault(m, {}).setdefault(part.lower(), key)
            if first != key or kinds.setdefault(m, kind) != kind:
                raise ValueError(
                    f"read_adapter: {path}: {key} is one too many beside {few([*pairs[m].values()])}; a file holds one adapter"
                )
            continue
        plain = re.sub(r"\.base_layer(?=\.weight$)|\.modules_to_save\.[^.]+(?=\.)", "", name)
        known = ".lora_" not in name and (plain != name or _RESIZED.search(name) or _saved(config, name))
        if not known or whole.setdefault(plain, key) != key:
            unexpected.append(key)
    if unexpected or not pairs:
        raise ValueError(
            f"read_adapter: {path}: unexpected {few(unexpected)}"
            if unexpected
            else f"read_adapter: {path} holds no LoRA factors"
        )
    for m, p in pairs.items():
        if p.keys() != {"a", "b"}:
            raise ValueError(
                f"read_adapter: {path}: {next(iter(p.values()))} has no lora_{'B' if 'a' in p else 'A'} beside it"
            )
        a, b, rank = held[p["a"]].shape, held[p["b"]].shape, _strength(config, m)[0]
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise ValueError(
                f"read_adapter: {path}: {p['a']} must be [r, in] and its B [out, r] with the rank {rank} of the config, "
                f"got {list(a)} and {list(b)}"
            )
    return pairs, whole, kinds


def _saved(config: Mapping[str, Any], name: str) -> bool:
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.get("modules_to_save") or [])


def _strength(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """(rank, scale) that the config gives a module."""

    def first(key: str, default: Any) -> Any:
        return next(
            (v for k, v in (config.get(key) or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default
        )

    rank = first("rank_pattern", config.get("r") or 8)
    alpha = first("alpha_pattern", 8 if config.get("lora_alpha") is None else config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _renamed(
    skeleton: Any,
    pairs: Mapping[str, Any],
    whole: dict[str, str],
    held: Mapping[str, Entry],
    config: dict[str, Any],
    path: Path,
) -> tuple[dict[str, str], dict[str, str]]:
    """({module in the file: the skeleton's}, {parameter of the skeleton: key}); of tied weights, the name that params have."""
    olds = dict.fromkeys([*(f"{m}.weight" for m in pairs), *whole])
    new = weight_names.current_names(skeleton, olds)
    if lost := [n for n in olds if n not in new]:
        own = [n for n, _ in skeleton.module.named_parameters()]
        raise ValueError(
            f"read_adapter: {path}: {skeleton.name} has no {few(lost)}, under no name of older versions either; "
            f"its weights look like {few(own[:: max(1, len(own) // 4)], 4)}"
        )
    names = {m: new[f"{m}.weight"].removesuffix(".weight") for m in pairs}
    if len(set(new.values())) < len(new):
        twice = sorted(n for n, k in Counter(new.values()).items() if k > 1)
        raise ValueError(
            f"read_adapter: {path}: {few(twice)} is there under an older and a newer name; the file must hold one adapter"
        )
    everywhere = dict(skeleton.module.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in skeleton.module.named_parameters()}
    out: dict[str, str] = {}
    for old, key in whole.items():
        p, one = everywhere[new[old]], first[id(everywhere[new[old]])]
        tied = [n for n, q in everywhere.items() if q is p]
        if held[key].shape != p.shape:
            raise ValueError(
                f"read_adapter: {path}: {key} must be {list(p.shape)} as in {skeleton.name}, got {list(held[key].shape)}"
            )
        if len(tied) > 1 and _saved(config, old):
            raise ValueError(
                f"read_adapter: {path}: {key} replaces one of {few(tied)}, which are one weight in {skeleton.name}; "
                "load the model with tie_word_embeddings = false"
            )
        if one in out and not torch.equal(held[out[one]].read(), held[key].read()):
            raise ValueError(
                f"read_adapter: {path}: {out[one]} and {key} differ, but are one weight in {skeleton.name}"
            )
        out.setdefault(one, key)
    return names, out


def check_fit(
    skeleton: Any,
    own: Mapping[str, str],
    module: str,
    kind: str,
    a: tuple[int, ...],
    b: tuple[int, ...],
    where: str,
) -> None:
    """The factors [r, in] and [out, r] must suit the module: its kind and its shape."""
    if module not in own or (kind == "embedding") != (own[module] == "embedding"):
        raise ValueError(
            f"{where}: {module} has factors of kind {kind}, but is {own.get(module, 'no layer that LoRA corrects')} in {skeleton.name}"
        )
    shape = tuple(skeleton.module.get_parameter(f"{module}.weight").shape)
    ends = (b[0], a[1]) if own[module] == "linear" else (a[1], b[0])
    if ends != shape:
        raise ValueError(
            f"{where}: {module} has A {list(a)} and B {list(b)}, but its weight is {list(shape)} in {skeleton.name}"
        )


def _demanded(config: dict[str, Any], own: Mapping[str, str], names: Mapping[str, str]) -> list[str]:
    """The layers of the model that must be in the file.

    A config speaks of the names of its time: those of the file say how an older name is made of a newer one, and a layer for which they do
    not is not demanded. Ends of names say nothing of where they were meant: if the file has nothing of the vision tower, or nothing but
    it, the other side is not demanded.
    """
    given = config.get("target_modules") or []
    if isinstance(given, str) and given.lower() == "all-linear":
        linear = [
            m
            for m, kind in own.items()
            if kind != "embedding" and not re.search(r"(^|\.)(lm_head|score|classifier)$", m)
        ]
        config, given = config | {"target_modules": linear}, linear
    sides = {bool(lora.VISION.search(m)) for m in names.values()}
    stems = {_stems(old, new) for old, new in names.items()}
    found = []
    for m in own:
        olds = {old + f".{m}"[len(new) :] for old, new in stems if f".{m}".startswith(f"{new}.")}
        hits = [old for old in (o[1:] for o in olds) if _targeted(config, old)]
        exact = isinstance(given, str) or any(old in given for old in hits)
        if hits and (exact or bool(lora.VISION.search(m)) in sides):
            found.append(m)
    return found


def _stems(old: str, new: str) -> tuple[str, str]:
    """What two names have before the end that they share; each begins with a dot or is empty."""
    a, b = old.split("."), new.split(".")
    same = next((i for i in range(min(len(a), len(b))) if a[-1 - i] != b[-1 - i]), min(len(a), len(b)))
    cut = lambda parts: "".join(f".{p}" for p in parts[: len(parts) - same])
    return cut(a), cut(b)


def _targeted(config: Mapping[str, Any], name: str) -> bool:
    """peft's rule of which modules a config names."""
    hits = lambda v: (
        bool(re.fullmatch(v, name))
        if isinstance(v, str)
        else any(name == e or name.endswith(f".{e}") for e in v or [])
    )
    if (
        hits(config.get("exclude_modules") or [])
        or _saved(config, name)
        or not hits(config.get("target_modules"))
    ):
        return False
    layers, lists = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == [] or name in config["target_modules"]:
        return True
    patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([lists] if isinstance(lists, str) else lists)] or [
        r".*?\.[^.]*\.(\d+)\."
    ]
    layer = next((int(hit[1]) for p in patterns if (hit := re.match(p, name))), None)
    return layer in ([layers] if isinstance(layers, int) else layers)


def _config_of(adapter: Adapter, base: str, task: str, named: list[str] | str | None) -> dict[str, Any]:
    """The adapter_config.json: that which the adapter came with, what no longer holds made anew."""
    old, modules = adapter.config, list(adapter.factors)
    config = {"init_lora_weights": True, "lora_bias": False, "use_dora": False, **old}
    if not old or any(_strength(old, m) != (adapter.rank(m), adapter.scale[m]) for m in modules):
        config |= _strengths(adapter)
    saved = {
        n.rpartition(".")[0] for n in adapter.full if not (_saved(old, n) or (old and _RESIZED.search(n)))
    } - set(modules)
    held = [
        s
        for s in old.get("modules_to_save") or []
        if any(_saved({"modules_to_save": [s]}, n) for n in adapter.full)
    ]
    config |= {
        "peft_type": "LORA",
        "task_type": task or old.get("task_type", "CAUSAL_LM"),
        "base_model_name_or_path": base or old.get("base_model_name_or_path"),
        "target_modules": sorted(modules) if named is None else named,
        "modules_to_save": [*held, *sorted(saved)] or None,
        "lora_dropout": adapter.dropout,
        "fan_in_fan_out": "conv1d" in adapter.kinds.values(),
        "bias": "none",
        "inference_mode": True,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }
    if missed := [m for m in modules if not _targeted(config, m)]:
        raise ValueError(
            f"write_adapter: targets must name every layer of {adapter}, {json.dumps(named)} misses {few(missed)}"
        )
    return config


def _strengths(adapter: Adapter) -> dict[str, Any]:
    """The commonest rank and alpha, and the others by full name."""
    ranks = {m: adapter.rank(m) for m in adapter.factors}
    if wrong := [m for m in ranks if not math.isfinite(adapter.scale[m])]:
        raise ValueError(f"write_adapter: the scale of {few(wrong)} of {adapter} must be finite")
    tidy = lambda x: round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x
    alphas = {m: tidy(adapter.scale[m] * r) for m, r in ranks.items()}
    (rank, _), (alpha, _) = (
        Counter(ranks.values()).most_common(1)[0],
        Counter(alphas.values()).most_common(1)[0],
    )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(m)}": r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(m)}": x for m, x in alphas.items() if x != alpha},
    }


def folded(adapter: Adapter, module: str, where: str) -> Tensor:
    """B with the module's gate multiplied in."""
    b, gate = adapter.factors[module]["b"], adapter.gate.get(module)
    if gate is not None and gate.dim() > 1:
        raise ValueError(
            f"{where}: {module} of {adapter} differs by sample (gate {list(gate.shape)}); a file holds one adapter, give a gate [r]"
        )
    return b if gate is None else b * gate.to(b)
