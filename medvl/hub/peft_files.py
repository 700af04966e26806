"""Adapters as peft's folders. A key of the file that fits nowhere is an error, and so is a layer without its
keys.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
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
from medvl.hub.peft_config import (
    RESIZED,
    adapter_config,
    check_adapter_config,
    demanded_modules,
    is_saved_module,
    rank_and_scale,
)
from medvl.weights import lora
from medvl.weights.lora import Adapter, LoraConfig

PREFIX = "base_model.model."

# The name of the adapter may stand in the key, as in a state dict saved directly.
_FACTOR = re.compile(
    r"(?P<module>.+?)\.lora_(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
# What peft puts into the names of weights that it keeps as a whole.
_WRAPPER = re.compile(r"\.base_layer(?=\.weight$)|\.modules_to_save\.[^.]+(?=\.)")


def read_adapter(
    name: files.PathLike,
    skeleton: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Adapter:
    """An adapter that peft saved. The keys of its file say which layers it corrects, its config says how
    strongly.

    Args:
        name: a folder with adapter_config.json and adapter_model.safetensors (or adapter_model.bin, read
            with weights_only), or a name on the Hugging Face hub, read from its cache and downloaded only if
            it is not there.
        skeleton: `skeletons.Skeleton` of the model it is for. With it, names of older versions of
            transformers become the skeleton's, shapes and kinds of layers are checked, and every layer that
            the config's target_modules name must be in the file; only where they are ends of names may the
            file lack the vision tower as a whole, or all but it. Without it names are taken unchanged,
            `fan_in_fan_out` tells GPT-2's layers, and `apply_lora` finds what does not fit.
    Returns:
        adapter with factors in `dtype` on `device`; `full` holds modules_to_save and resized or adapted
        embeddings.
    Raises:
        ValueError: nothing there, a broken file, a kind of adapter that `Adapter` cannot hold (named), keys
            without their pair, unexpected or missing, a rank or shape that does not fit, numbers that are
            not finite.
    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685; file format and rules of peft 0.21.
    """
    config_path = find_file(str(name), ("adapter_config.json",))
    config = read_json(config_path)
    check_adapter_config(config, config_path)
    path = find_file(str(name), ("adapter_model.safetensors", "adapter_model.bin"))
    entries = open_weights(path, str(name))
    # Everything is checked by names, shapes and dtypes, before a tensor is read.
    pairs, full, kinds = _group_keys(entries, config, path)
    _check_pairs(pairs, entries, config, path)
    # {module in the file: the model's}
    names = {module: module for module in pairs}
    if skeleton is not None:
        names, full, kinds = _fit_to_skeleton(skeleton, pairs, full, kinds, entries, config, path)

    # All keys fit: only now the tensors are read.
    factors: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    for module, pair in pairs.items():
        name_in_model = names[module]
        factors[name_in_model] = {
            part: read_finite(entries[key], key, path, dtype, device) for part, key in pair.items()
        }
        # Patterns of the config were written for the names in the file.
        _, scales[name_in_model] = rank_and_scale(config, module)
    return Adapter(
        factors=factors,
        scale=scales,
        kinds={names[module]: kinds[module] for module in pairs},
        full={param: read_finite(entries[key], key, path, dtype, device) for param, key in full.items()},
        dropout=config.get("lora_dropout") or 0.0,
        name=Path(name).name if Path(name).is_dir() else str(name),
        config=config,
    )


def _fit_to_skeleton(
    skeleton: Any,
    pairs: Mapping[str, Mapping[str, str]],
    full: dict[str, str],
    kinds: Mapping[str, str],
    entries: Mapping[str, Entry],
    config: dict[str, Any],
    path: Path,
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """({module in the file: the model's}, {parameter of the model: key}, {module in the file: kind}).

    Raises:
        ValueError: a name or shape that the model does not have, or a layer missing that the config names.
    """
    layers = lora.target_layers(LoraConfig(pattern=".*"), skeleton)
    names, full = _current_names(skeleton, pairs, full, entries, config, path)
    for module, pair in pairs.items():
        a, b = entries[pair["a"]].shape, entries[pair["b"]].shape
        check_fit(skeleton, layers, names[module], kinds[module], a, b, f"read_adapter: {path}")
    present = set(names.values())
    missing = [module for module in demanded_modules(config, layers, names) if module not in present]
    if missing:
        raise ValueError(
            f"read_adapter: {path} lacks {few(missing)}, which target_modules in its config name; is it "
            "truncated, or for another model?"
        )
    # The model says of every layer what it is; the config has one `fan_in_fan_out` for all.
    return names, full, {module: layers[names[module]] for module in pairs}


def write_adapter(
    adapter: Adapter,
    folder: files.PathLike,
    *,
    base: str = "",
    task: str = "",
    targets: Iterable[str] | str | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` and `read_adapter` read; it is there whole or not
    at all.

    The settings of the adapter's `config` stay where they still hold. A gate [r] is multiplied into B.

    Args:
        base: name or path of the base model; if left out, that of the adapter's config.
        task: of peft's task types; if left out, that of the adapter's config, else CAUSAL_LM.
        targets: target_modules to write, one regex or ends of names; they must name every layer of the
            adapter and no other layer of the model (which cannot be checked here). If left out, the full
            names of the layers.
    Raises:
        ValueError: the folder exists and is not empty; a gate per sample, a router or numbers that are not
            finite; no layers; targets that miss a layer.
    """
    if not adapter.factors:
        raise ValueError(f"write_adapter: {adapter} must adapt at least one layer")
    routed = [module for module, factors in adapter.factors.items() if "router" in factors]
    if routed:
        raise ValueError(
            f"write_adapter: {few(routed)} of {adapter} have routers (H-LoRA), which peft has no "
            "place for; write_hlora writes HealthGPT's format, which RUN/adapter has"
        )
    state: dict[str, Tensor] = {}
    for module, factors in adapter.factors.items():
        # peft keeps the factors of an embedding as bare parameters, those of other layers as linear layers.
        a, b = "lora_A.weight", "lora_B.weight"
        if adapter.kinds[module] == "embedding":
            a, b = "lora_embedding_A", "lora_embedding_B"
        state[f"{PREFIX}{module}.{a}"] = factors["a"]
        state[f"{PREFIX}{module}.{b}"] = folded(adapter, module, "write_adapter")
    for name, tensor in adapter.full.items():
        module, _, leaf = name.rpartition(".")
        if module in adapter.factors:  # peft wraps the layer that it corrects
            name = f"{module}.base_layer.{leaf}"
        state[PREFIX + name] = tensor
    if targets is not None and not isinstance(targets, str):  # any iterable; JSON wants a list
        targets = list(targets)
    config = adapter_config(adapter, base, task, targets)
    with new_folder(folder) as tmp:
        save_finite(state, tmp / "adapter_model.safetensors", f"write_adapter: {adapter}")
        text = json.dumps(config, indent=2, sort_keys=True)
        (tmp / "adapter_config.json").write_text(text, encoding="utf-8")


def check_fit(
    skeleton: Any,
    layers: Mapping[str, str],
    module: str,
    kind: str,
    a: tuple[int, ...],
    b: tuple[int, ...],
    context: str,
) -> None:
    """The factors A [r, in] and B [out, r] must suit the module: its kind and its shape.

    Args:
        layers: {module: kind} of the model.
        kind: what the file takes the module for.
    """
    if module not in layers or (kind == "embedding") != (layers[module] == "embedding"):
        actual = layers.get(module, "no layer that LoRA can adapt")
        raise ValueError(
            f"{context}: {module} has factors of kind {kind}, but is {actual} in {skeleton.name}"
        )
    shape = tuple(skeleton.module.get_parameter(f"{module}.weight").shape)
    # Only a linear layer stores its weight as [out, in].
    corrected = (b[0], a[1]) if layers[module] == "linear" else (a[1], b[0])
    if corrected != shape:
        raise ValueError(
            f"{context}: {module} has A {list(a)} and B {list(b)}, but its weight is {list(shape)} in "
            f"{skeleton.name}"
        )


def folded(adapter: Adapter, module: str, caller: str) -> Tensor:
    """B with the module's gate multiplied in."""
    b, gate = adapter.factors[module]["b"], adapter.gate.get(module)
    if gate is None:
        return b
    # [b, r]: each sample has its own.
    if gate.dim() > 1:
        raise ValueError(
            f"{caller}: {module} of {adapter} differs by sample (gate {list(gate.shape)}); "
            "a file holds one adapter, give a gate [r]"
        )
    return b * gate.to(b)


def _group_keys(
    entries: Mapping[str, Entry], config: dict[str, Any], path: Path
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """({module: {"a": key, "b": key}}, {parameter replaced as a whole: key}, {module: kind}) of all keys of
    the file.
    """
    pairs: dict[str, dict[str, str]] = {}
    full: dict[str, str] = {}
    kinds: dict[str, str] = {}
    unexpected = []
    for key in entries:
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match:
            module, part = match["module"], match["linear"] or match["embedding"]
            kind = "linear"
            if match["embedding"]:
                kind = "embedding"
            elif config.get("fan_in_fan_out"):  # peft's word for GPT-2's layers, whose weight is [in, out]
                kind = "conv1d"
            # Two adapters in one file would meet here: their names in the keys were dropped.
            first = pairs.setdefault(module, {}).setdefault(part.lower(), key)
            if first != key or kinds.setdefault(module, kind) != kind:
                raise ValueError(
                    f"read_adapter: {path}: {key} is one too many beside {few([*pairs[module].values()])}; "
                    "a file holds one adapter"
                )
            continue
        # No factor: a weight that replaces the model's, for one of three reasons.
        param = _WRAPPER.sub("", name)
        replaces_weight = param != name or RESIZED.search(name) or is_saved_module(config, name)
        if ".lora_" in name or not replaces_weight or full.setdefault(param, key) != key:
            unexpected.append(key)
    if unexpected:
        raise ValueError(f"read_adapter: {path}: unexpected {few(unexpected)}")
    if not pairs:
        raise ValueError(f"read_adapter: {path} holds no LoRA factors")
    return pairs, full, kinds


def _check_pairs(
    pairs: Mapping[str, Mapping[str, str]],
    entries: Mapping[str, Entry],
    config: dict[str, Any],
    path: Path,
) -> None:
    """Every module must have A [r, in] and B [out, r] with the rank of the config."""
    for module, pair in pairs.items():
        if pair.keys() != {"a", "b"}:
            missing_factor = "B" if "a" in pair else "A"
            raise ValueError(
                f"read_adapter: {path}: {next(iter(pair.values()))} has no lora_{missing_factor} beside it"
            )
        a, b = entries[pair["a"]].shape, entries[pair["b"]].shape
        rank, _ = rank_and_scale(config, module)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise ValueError(
                f"read_adapter: {path}: {pair['a']} must be [r, in] and its B [out, r] with the rank {rank} "
                f"of the config, got {list(a)} and {list(b)}"
            )


def _current_names(
    skeleton: Any,
    pairs: Mapping[str, Any],
    full: dict[str, str],
    entries: Mapping[str, Entry],
    config: dict[str, Any],
    path: Path,
) -> tuple[dict[str, str], dict[str, str]]:
    """({module in the file: the skeleton's}, {parameter of the skeleton: key}); of tied weights, the name
    that params have.
    """
    # The rules for names are about weights, so every module is looked up by its weight.
    weights_of_pairs = [f"{module}.weight" for module in pairs]
    old_names = dict.fromkeys([*weights_of_pairs, *full])
    current = weight_names.current_names(skeleton, old_names)
    lost = [name for name in old_names if name not in current]
    if lost:
        # A few from all over the model, not its first ones, which may all be of one tower.
        weights = [name for name, _ in skeleton.module.named_parameters()]
        examples = weights[:: max(1, len(weights) // 4)]
        raise ValueError(
            f"read_adapter: {path}: {skeleton.name} has no {few(lost)}, under no name of older versions "
            f"either; its weights look like {few(examples, 4)}"
        )
    if len(set(current.values())) < len(current):
        twice = sorted(name for name, count in Counter(current.values()).items() if count > 1)
        raise ValueError(
            f"read_adapter: {path}: {few(twice)} is there twice, under an older and a newer name; the file "
            "must hold one adapter"
        )
    modules = {module: current[f"{module}.weight"].removesuffix(".weight") for module in pairs}
    return modules, _current_params(skeleton, full, current, entries, config, path)


def _current_params(
    skeleton: Any,
    full: Mapping[str, str],
    current: Mapping[str, str],
    entries: Mapping[str, Entry],
    config: dict[str, Any],
    path: Path,
) -> dict[str, str]:
    """{parameter of the skeleton: key} of the weights that the adapter replaces as a whole.

    Args:
        full: {name in the file: key}.
        current: {name in the file: the skeleton's}.
    """
    # Of tied weights torch lists the first name alone unless it is told to repeat them.
    every_name = dict(skeleton.module.named_parameters(remove_duplicate=False))
    first_name = {id(p): name for name, p in skeleton.module.named_parameters()}
    params: dict[str, str] = {}
    for old, key in full.items():
        p = every_name[current[old]]
        param = first_name[id(p)]
        tied = [name for name, weight in every_name.items() if weight is p]
        if entries[key].shape != p.shape:
            raise ValueError(
                f"read_adapter: {path}: {key} must be {list(p.shape)} as in {skeleton.name}, "
                f"got {list(entries[key].shape)}"
            )
        # peft unties what it saves: the other layer would keep the old weight, which one weight cannot do.
        if len(tied) > 1 and is_saved_module(config, old):
            raise ValueError(
                f"read_adapter: {path}: {key} replaces one of {few(tied)}, which are one weight in "
                f"{skeleton.name}; load the model with tie_word_embeddings = false"
            )
        # The file may hold a tied weight under both names; it is then read once.
        if param in params and not torch.equal(entries[params[param]].read(), entries[key].read()):
            raise ValueError(
                f"read_adapter: {path}: {params[param]} and {key} differ, but are one weight in "
                f"{skeleton.name}"
            )
        params.setdefault(param, key)
    return params
