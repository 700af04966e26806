"""The names of weights: those of published checkpoints, of older versions of transformers, and of the module, by transformers' own rules."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from medvl.base.text import few
from medvl.hub.checkpoints import Entry
from medvl.hub.skeletons import Skeleton
from medvl.weights import four_bit


def place_entries(module: Any, held: Mapping[str, Entry]) -> tuple[dict[str, Entry], list[str]]:
    """({parameter: where its values come from}, names that have no parameter), by transformers' own rules for old and split layouts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(module)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    meta, prefix = module.state_dict(), module.base_model_prefix
    known = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    plan: dict[str, Entry] = {}
    groups: dict[str, Any] = {}
    extra = []
    for key in sorted(held, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
        if name not in meta and key in meta:
            name, pattern = rename_source_key(key, [], [], prefix, meta)
        if name not in known:
            extra += [] if name in meta else [key]
        elif pattern is None:
            plan[name] = held[key]
        else:
            rule = groups.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            rule.add_tensor(name, key, pattern, held[key].read)
    for name, rule in groups.items():
        made: dict[str, Tensor] = {}
        for target in rule.target_patterns:
            one = name.replace(rule.target_patterns[0], target) if len(rule.target_patterns) > 1 else name
            plan[one] = _entry(made, rule, name, module, one)
    module._weight_conversions = [r for r in rules if r.was_used()]  # what `save` turns back
    return plan, extra


def _convert(rule: Any, name: str, module: Any) -> dict[str, Tensor]:
    made = rule.convert(name, model=module, config=module.config)
    return {k: t[0] if isinstance(t, list) else t for k, t in made.items()}


def _entry(made: dict[str, Tensor], rule: Any, name: str, module: Any, target: str) -> Entry:
    """One of the weights that a rule makes of its parts; all are made when the first is read."""

    def read() -> Tensor:
        if not made:
            made.update(_convert(rule, name, module))
        return made[target]

    return Entry(shape=(), dtype=torch.float32, read=read)


def current_names(skeleton: Skeleton, names: Iterable[str]) -> dict[str, str]:
    """{name: the skeleton's name} of those of `names` that are one of its weights, by today's names or, by transformers' rules, older ones.

    Left out is what the model does not have, or only as part of a weight (experts that are fused now). A tied weight has all its names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    module: Any = skeleton.module
    names, known = list(names), {n for n, _ in module.named_parameters(remove_duplicate=False)}
    if known.issuperset(names):
        return {n: n for n in names}
    rules = get_model_conversion_mapping(module)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    meta, found = module.state_dict(), {}
    for old in names:
        new, converted = rename_source_key(old, renamings, converters, module.base_model_prefix, meta)
        if new in known and converted is None:
            found[old] = new
        elif old in known:
            found[old] = old
    return found


def published_state(
    module: Any, plain: dict[str, Tensor], packed: Mapping[str, four_bit.FourBit]
) -> dict[str, Tensor]:
    """The state dict under the names of published checkpoints; each 4-bit weight with its scales."""
    from transformers.core_model_loading import revert_weight_conversion

    codes = {id(w.packed): n for n, w in packed.items()}
    state: dict[str, Tensor] = {}
    for name, t in revert_weight_conversion(module, plain).items():
        old = codes.pop(id(t), None)
        state |= (
            {name: t}
            if old is None
            else {name + suffix: part for suffix, part in four_bit.pack_weight(packed[old]).items()}
        )
    if codes:
        raise ValueError(
            f"save: {few(sorted(codes.values()))} are stored split or joined; they cannot be saved in 4 bits"
        )
    return state
