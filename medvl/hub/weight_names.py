"""The names of weights in published checkpoints, in those of older transformers, and in the module, by
transformers' own rules.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from medvl.base.text import few
from medvl.hub import int4_files
from medvl.hub.checkpoints import Entry
from medvl.hub.skeletons import Skeleton
from medvl.weights import four_bit, int4


def place_entries(module: Any, entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], list[str]]:
    """Match the tensors of a checkpoint to the parameters of a module.

    A parameter that the module keeps as one and the file in pieces (or the other way round) gets an entry
    that converts them when it is read. The rules that were used stay on the module: `save_skeleton` turns
    them back.

    Returns:
        ({parameter: its entry}, keys of the file that are no parameter).
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    rules, renamings, converters = _conversion_rules(module)
    converter_of: dict[str, Any] = {}
    for converter in converters:
        for pattern in converter.source_patterns:
            converter_of[pattern] = converter
    # The state dict has the buffers too, and keys that name one are no error.
    tensors, prefix = module.state_dict(), module.base_model_prefix
    params = {n for n, _ in module.named_parameters(remove_duplicate=False)}

    placed: dict[str, Entry] = {}
    conversions: dict[str, Any] = {}
    unplaced = []
    for key in sorted(entries, key=dot_natural_key):  # pieces are joined in the order of their numbers
        name, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:
            # A rule for old names met a name that is of today already.
            name, pattern = rename_source_key(key, [], [], prefix, tensors)
        if name not in params:
            if name not in tensors:  # what is left are buffers
                unplaced.append(key)
        elif pattern is None:
            placed[name] = entries[key]
        else:
            # A piece of a weight, or a weight that becomes several. The converter collects what it is given,
            # so every parameter needs one of its own.
            conversion = conversions.setdefault(name, copy.deepcopy(converter_of[pattern]))
            conversion.add_tensor(name, key, pattern, entries[key].read)

    for name, conversion in conversions.items():
        # The first target stands for all: the names of the others differ from it in this part only.
        converted: dict[str, Tensor] = {}  # shared by the parameters that one conversion makes
        targets = conversion.target_patterns
        for target in targets:
            param = name.replace(targets[0], target) if len(targets) > 1 else name
            placed[param] = _converted_entry(converted, conversion, name, module, param)
    module._weight_conversions = [rule for rule in rules if rule.was_used()]
    return placed, unplaced


def current_names(skeleton: Skeleton, names: Iterable[str]) -> dict[str, str]:
    """{name: the skeleton's name} of those of `names` that are one of its weights, by today's names or those
    of older transformers.

    Left out is what the model does not have, or only as part of a weight (experts that are fused now). A
    tied weight has all its names.
    """
    from transformers.core_model_loading import rename_source_key

    module: Any = skeleton.module
    names = list(names)
    params = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    # The usual case, and the rules could only mistake a name of today for an older one.
    if params.issuperset(names):
        return {n: n for n in names}
    _, renamings, converters = _conversion_rules(module)
    tensors = module.state_dict()
    current: dict[str, str] = {}
    for name in names:
        new, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, tensors)
        if new in params and pattern is None:
            current[name] = new
        elif name in params:
            current[name] = name
    return current


def published_state(module: Any, plain: dict[str, Tensor], packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict under the names of published checkpoints.

    Args:
        plain: every weight of the module; of a 4-bit weight its codes.
        packed: the 4-bit weights (`FourBit` or `Int4`), each of which is written with its scales.
    Raises:
        ValueError: a 4-bit weight that the published checkpoint stores split or joined.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # Names change, tensors that are not converted stay the same objects: codes are found again by identity.
    name_of_codes = {id(weight.packed): name for name, weight in packed.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in revert_weight_conversion(module, plain).items():
        param = name_of_codes.pop(id(tensor), None)
        if param is None:
            state[name] = tensor
        else:
            weight = packed[param]
            is_int4 = isinstance(weight, int4.Int4)
            parts = int4_files.pack_int4(weight) if is_int4 else four_bit.pack_weight(weight)
            for suffix, part in parts.items():
                state[name + suffix] = part
    # Codes that were not found again were split or joined by a conversion, which does not know 4 bits.
    if name_of_codes:
        raise ValueError(
            f"save: {few(sorted(name_of_codes.values()))} are stored split or joined; they cannot be "
            "saved in 4 bits"
        )
    return state


def _conversion_rules(module: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """transformers' rules for a module: (all, those that rename, those that split or join)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return rules, renamings, converters


def _converted_entry(
    converted: dict[str, Tensor], conversion: Any, name: str, module: Any, param: str
) -> Entry:
    """One of the weights that a conversion makes of its pieces; all are made when the first is read."""

    def read() -> Tensor:
        if not converted:
            for target, tensor in conversion.convert(name, model=module, config=module.config).items():
                converted[target] = tensor[0] if isinstance(tensor, list) else tensor
        return converted[param]

    return Entry(shape=(), dtype=torch.float32, read=read)
