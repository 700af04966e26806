"""A skeleton and its params as a folder that transformers' from_pretrained reads."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from medvl.base import files
from medvl.base.text import few
from medvl.hub import int4_files
from medvl.hub.architectures import quiet
from medvl.hub.checkpoints import new_folder
from medvl.hub.skeletons import Skeleton
from medvl.hub.weight_names import published_state
from medvl.weights import four_bit, int4
from medvl.weights.lazy import LowRank, Quantized, dense


def save_skeleton(
    skeleton: Skeleton, params: Mapping[str, Tensor], folder: files.PathLike, *, shard_gb: float = 5.0
) -> None:
    """Write config.json and model.safetensors, with the names of published checkpoints, that transformers'
    from_pretrained reads.

    A generation_config.json that the checkpoint came with is written unchanged. NF4 and FP4 weights are written in
    the layout of bitsandbytes, `Int4` in that of compressed-tensors; sharded ones are gathered (every process must call this, process 0 writes). A
    model above `shard_gb` (10^9 bytes) is split into files with an index. The folder is there whole or not
    at all.

    Raises:
        ValueError: the folder exists and is not empty, params are not the skeleton's, or adapters are still
            on them.
    """
    _check_params(skeleton, params)
    # `published_state` takes plain tensors: a 4-bit weight goes in as its codes, its scales are added there.
    packed = {}
    plain = {}
    for name, weight in params.items():
        if isinstance(weight, Quantized):
            packed[name] = weight
            plain[name] = weight.packed
        else:
            plain[name] = dense(weight).detach().contiguous()
    state = published_state(skeleton.module, plain, packed)

    with new_folder(folder) as tmp, quiet():
        _write_config(skeleton.module, tmp, plain, packed)
        if skeleton.generation:
            text = json.dumps(skeleton.generation, indent=2, ensure_ascii=False) + "\n"
            files.write_text(tmp / "generation_config.json", text)
        shards = split_torch_state_dict_into_shards(
            state, max_shard_size=int(shard_gb * 1e9), filename_pattern="model{suffix}.safetensors"
        )
        for file, names in shards.filename_to_tensors.items():
            save_file({n: state[n] for n in names}, tmp / file, {"format": "pt"})
        # Last, so that an index never names files that are not there.
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            files.write_text(tmp / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def _check_params(skeleton: Skeleton, params: Mapping[str, Tensor]) -> None:
    """Refuse params that no checkpoint has a place for."""
    if params.keys() != skeleton._names:
        raise ValueError(
            f"save: params must be the {len(skeleton._names)} weights of {skeleton.name}, "
            f"got {len(params)}: {few(sorted(params))}"
        )
    # Merging changes the weights for good, so it is not done silently.
    adapted = [n for n, w in params.items() if isinstance(w, LowRank)]
    if adapted:
        raise ValueError(
            f"save: adapters are on {few(adapted, 2)}; merge them (lora.merge_adapter) or save them "
            "separately (write_adapter)"
        )
    kinds = {type(w) for w in params.values() if isinstance(w, Quantized)}
    if len(kinds) > 1:
        raise ValueError(
            "save: params are of two 4-bit kinds, FourBit and Int4, which no file format can hold"
        )
    stacked = [n for n, w in params.items() if isinstance(w, Quantized) and w.dim() == 3]
    if stacked:
        raise ValueError(
            f"save: {few(stacked, 2)} are experts in 4 bits, which no file format can hold; dequantise them "
            "first (lazy.dense), or save the model that was quantised"
        )


def _write_config(module: Any, folder: Path, plain: Mapping[str, Tensor], packed: Mapping[str, Any]) -> None:
    """Write config.json, and generation_config.json where the module has one."""
    # A copy: the skeleton goes on living with its own config.
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    # from_pretrained takes the dtype from here. 4-bit codes are integers and do not count.
    config.dtype = next((t.dtype for t in plain.values() if t.is_floating_point()), torch.float32)
    if packed:
        # One quantised weight stands for all: they come from one `QuantConfig`.
        weight = next(iter(packed.values()))
        # transformers quantises every linear layer that the config does not exempt by name.
        not_quantised = []
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear) and f"{name}.weight" not in packed:
                not_quantised.append(name)
        if isinstance(weight, int4.Int4):
            settings = int4_files.quantization_config(packed, not_quantised)
        else:
            settings = _bitsandbytes_config(weight, not_quantised)
        config.quantization_config = settings
    config.save_pretrained(folder)
    if module.can_generate() and module.generation_config is not None:
        module.generation_config.save_pretrained(folder)


def _bitsandbytes_config(weight: four_bit.FourBit, not_quantised: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": weight.kind,
        "bnb_4bit_use_double_quant": weight.nested is not None,
        "bnb_4bit_compute_dtype": str(weight.dtype)[6:],
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": not_quantised,
    }
