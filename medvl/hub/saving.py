"""Skeleton and params as a folder that transformers' from_pretrained reads."""

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
from medvl.hub.architectures import quiet
from medvl.hub.checkpoints import new_folder
from medvl.hub.skeletons import Skeleton
from medvl.hub.weight_names import published_state
from medvl.weights import four_bit
from medvl.weights.lazy import LowRank, dense


def save_skeleton(
    skeleton: Skeleton, params: Mapping[str, Tensor], folder: files.PathLike, *, shard_gb: float = 5.0
) -> None:
    """Write config.json and model.safetensors, with the names of published checkpoints, that transformers' from_pretrained reads.

    A generation_config.json that the checkpoint came with is written as it was.

    4-bit weights are written in the layout of bitsandbytes; sharded ones are gathered (every process must call this, process 0 writes). A
    model above `shard_gb` (10^9 bytes) is split into files with an index. The folder is there whole or not at all.
    Raises:
        ValueError: the folder exists and is not empty, params are not the skeleton's, or adapters are still on them.
    """
    if params.keys() != skeleton._names:
        raise ValueError(
            f"save: params must be the {len(skeleton._names)} weights of {skeleton.name}, got {len(params)}: {few(sorted(params))}"
        )
    if adapted := [n for n, w in params.items() if isinstance(w, LowRank)]:
        raise ValueError(
            f"save: adapters are on {few(adapted, 2)}; merge them (lora.merge_adapter) or write them apart (write_adapter)"
        )
    packed = {n: w for n, w in params.items() if isinstance(w, four_bit.FourBit)}
    if stacked := [n for n, w in packed.items() if w.dim() == 3]:
        raise ValueError(
            f"save: {few(stacked, 2)} are experts in 4 bits, for which no file has a place; write them out first "
            "(weights.dense), or save the model that was quantised"
        )
    plain = {
        n: w.packed if isinstance(w, four_bit.FourBit) else dense(w).detach().contiguous()
        for n, w in params.items()
    }
    state = published_state(skeleton.module, plain, packed)
    with new_folder(folder) as tmp, quiet():
        _save_config(skeleton.module, tmp, plain, packed)
        if skeleton.generation:
            text = json.dumps(skeleton.generation, indent=2, ensure_ascii=False) + "\n"
            files.write_text(tmp / "generation_config.json", text)
        split = split_torch_state_dict_into_shards(
            state, max_shard_size=int(shard_gb * 1e9), filename_pattern="model{suffix}.safetensors"
        )
        for file, names in split.filename_to_tensors.items():
            save_file({n: state[n] for n in names}, tmp / file, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            files.write_text(tmp / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def _save_config(
    module: Any, folder: Path, plain: Mapping[str, Tensor], packed: Mapping[str, four_bit.FourBit]
) -> None:
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = next((t.dtype for t in plain.values() if t.is_floating_point()), torch.float32)
    if packed:
        one = next(iter(packed.values()))
        whole = [
            n for n, m in module.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" not in packed
        ]
        config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": one.kind,
            "bnb_4bit_use_double_quant": one.nested is not None,
            "bnb_4bit_compute_dtype": str(one.dtype)[6:],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": whole,
        }
    config.save_pretrained(folder)
    if module.can_generate() and module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
