"""Hugging Face architectures as skeletons whose weights are values, and checkpoints. Only `hub` and `tokens` import transformers."""

import copy
import hashlib
import inspect
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvl.base import files, tree
from medvl.base.config import DEPTHS, WIDTH, WIDTH_OR_NONE
from medvl.base.display import track
from medvl.hub.checkpoints import (
    Entry,
    entries_of,
    few,
    find,
    find_if_there,
    give_back,
    new_folder,
    open_weights,
    read_json,
    read_pickle,
)
from medvl.hub.dinov2 import config_of
from medvl.hub.dinov2 import from_dinov2 as from_dinov2
from medvl.hub.dinov2 import to_dinov2 as to_dinov2
from medvl.weights import four_bit
from medvl.weights.lazy import LowRank, dense, leaves

Params = dict[str, Tensor]  # flat: {module name: tensor}
Each = Callable[[str, Tensor], Tensor]  # (name, weight) -> weight

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Keys a checkpoint may have that the plain encoder does not: heads of a task, poolers, the temperature of a contrastive pair.
_HEADS = re.compile(
    r"(^|\.)(pooler|classifier|head|lm_head|cls|qa_outputs|score|visual_projection|text_projection|logit_scale)(\.|$)"
)
_UNUSED = re.compile(r"(^|\.)mask_token$")  # only masked pre-training reads it
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias)$"
)  # old files hold these constants
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
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@frozen(kw_only=True, eq=False)
class Skeleton:
    """An architecture without weights: `skeleton(params, *args, **kwargs)` is the module's forward pass with these weights.

    `module` has its parameters on the meta device and real buffers, in evaluation mode (no dropout, no stochastic depth).
    It is never run itself: a call binds `params` to a copy of it, one for each thread, so any number of threads may
    share a skeleton. The copy is made by a thread's first call and goes with the thread; it holds no weights.
    `params` must have exactly the names of the module's parameters (ValueError); each may be any kind of weight,
    see `weights`.
    """

    module: nn.Module = field(repr=False)
    name: str
    config: dict[str, Any] = field(repr=False)
    generation: dict[str, Any] = field(
        factory=dict, repr=False
    )  # the checkpoint's generation_config.json, as it was
    _names: frozenset[str] = field(init=False, repr=False)
    _buffers: tuple[str, ...] = field(init=False, repr=False)
    _layers: tuple[nn.Module, ...] = field(init=False, repr=False)
    _tied: bool = field(init=False, repr=False)
    _original: "_Bound" = field(init=False, repr=False)
    _copies: "_OfThread" = field(init=False, repr=False, factory=lambda: _OfThread())

    @_names.default
    def _its_names(self) -> frozenset[str]:
        return frozenset(n for n, _ in self.module.named_parameters())

    @_buffers.default
    def _its_buffers(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.module.named_buffers())

    @_layers.default
    def _its_layers(self) -> tuple[nn.Module, ...]:
        return tuple(m for m in self.module.modules() if hasattr(m, "gradient_checkpointing"))

    @_tied.default
    def _if_tied(self) -> bool:
        return len(list(self.module.named_parameters(remove_duplicate=False))) > len(self._names)

    @_original.default
    def _wrapped_module(self) -> "_Bound":
        return _Bound(self.module)

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return self.run(params, lambda module: module(*args, **kwargs))

    def run(self, params: Mapping[str, Tensor], function: Callable[[nn.Module], Any]) -> Any:
        """`function(module)` while `params` are bound to the module: for several calls with the same weights.

        Raises:
            ValueError: params are not the skeleton's, or the module checkpoints its activations itself.
        """
        if params.keys() != self._names:
            missing, extra = sorted(self._names - params.keys()), sorted(params.keys() - self._names)
            raise ValueError(
                f"{self.name}: params must be exactly its {len(self._names)} weights; missing {few(missing)}, unknown {few(extra)}"
            )
        if any(
            m.gradient_checkpointing and getattr(m, "_gradient_checkpointing_func", None) is not _recompute
            for m in self._layers
        ):
            raise ValueError(
                f"{self.name}: gradient checkpointing inside the module would recompute with other weights; "
                "turn it off and use checkpointed(skeleton)"
            )
        device = next(iter(params.values())).device
        # The buffers of a call are those of `module`, whatever an earlier call of this thread may have left in its copy.
        bound = {f"module.{n}": self.module.get_buffer(n).to(device) for n in self._buffers}
        bound |= {f"module.{n}": w for n, w in params.items()}
        return torch.func.functional_call(self._copy(), bound, (function,), tie_weights=self._tied)

    def _copy(self) -> "_Bound":
        """This thread's copy of the module."""
        if torch.compiler.is_compiling():  # a trace binds nothing when it runs, and cannot copy
            return self._original
        if self._copies.bound is None:
            # The parameters hold nothing and are replaced in every call, so that the copy may name the same ones:
            # copying them would be counted as memory by `estimate`, which runs a skeleton without storage.
            shared = {id(parameter): parameter for parameter in self.module.parameters()}
            self._copies.bound = copy.deepcopy(self._original, shared)
        return self._copies.bound


class _Bound(nn.Module):
    """A module and a function that runs it, so that weights can be bound to the module while the function runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.module)


class _OfThread(threading.local):
    """What each thread has for itself of a skeleton. A copy of the skeleton starts without."""

    bound: _Bound | None = None

    def __reduce__(self) -> Any:
        return _OfThread, ()


def checkpointed(skeleton: Skeleton) -> Skeleton:
    """The same skeleton whose layers keep only their inputs for the backward pass and compute the rest again.

    A layer takes the weights that were bound to it during the forward pass along, so the gradient is right wherever it is taken, also after
    the call has returned. Of use under training only; do not give it a cache.
    Raises:
        ValueError: the architecture has no layers that transformers can checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    module: Any = copy.deepcopy(skeleton.module)
    layers: list[Any] = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {id(k) for m in layers for k in m.modules() if k is not m}
    layers = [m for m in layers if id(m) not in inner]
    if not layers:
        raise ValueError(f"checkpointed: {skeleton.name} has no layers that can be checkpointed")
    for layer in layers:
        layer.gradient_checkpointing = layer.training = (
            True  # of the layer alone: what is inside stays in evaluation mode
        )
        layer._gradient_checkpointing_func = _recompute
    return evolve(skeleton, module=module)


def _recompute(run: Any, *args: Any) -> Any:
    layer = run.args[0] if run.args else run.func.__self__
    weights = {
        f"module.{n}": t for n, t in layer.named_parameters()
    }  # those of this call, not what the skeleton holds later
    again = lambda *a: torch.func.functional_call(_Bound(layer), weights, (lambda _: run(*a),))
    return checkpoint(again, *args, use_reentrant=False)


def load(
    name: files.PathLike,
    *,
    part: Literal["", "text", "vision"] = "",
    head: Literal["", "language"] = "",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    each: Each | None = None,
) -> tuple[Skeleton, Params]:
    """An architecture and its weights; one weight at a time is read, cast, moved and given to `each`.

    Args:
        name: a folder with config.json and model.safetensors (or shards with their index, or pytorch_model.bin); a name on the Hugging Face
            hub, read from its cache and downloaded only if it is not there; or an original DINOv2 file (`dinov2_vitb14_pretrain.pth`).
        part: of a checkpoint that holds two towers (CLIP), the one to take.
        head: "" takes the plain encoder or decoder, "language" the model that predicts tokens, with its vision tower if it has one.
        each: (name, weight) -> what to keep of it, such as `quant.quantizer(cfg)`: then the whole model is never held in `dtype`.
    Returns:
        skeleton and params {module name: tensor}, detached, of `dtype` on `device`. Pickled files are read with weights_only=True.
        Left out are task heads and poolers; a `mask_token` that is missing is zeros (only pre-training reads it). 4-bit weights that
        transformers and bitsandbytes wrote come as `quant.FourBit`.
    Raises:
        ValueError: nothing there (says what was looked for, and where), a broken file, keys missing, unexpected or of another shape.
    """
    if part not in ("", "text", "vision"):
        raise ValueError(f"load: part must be '', 'text' or 'vision', got {part!r}")
    _check_head(head)
    path = Path(name)
    if path.is_file():
        state = read_pickle(path)
        config = config_of(state, str(path))
        _say_positions(config, path.stem)
        return bind(config, from_dinov2(state), name=path.stem, dtype=dtype, device=device)
    config = read_json(find(str(name), ("config.json",)))
    held = open_weights(find(str(name), _WEIGHTS), str(name))
    if part:
        if not isinstance(config.get(f"{part}_config"), dict):
            raise ValueError(
                f"load: {name} has no {part} tower (its config.json has no {part}_config); leave part empty"
            )
        config = {"model_type": f"{config.get('model_type')}_{part}_model"} | config[f"{part}_config"]
        held = {k: e for k, e in held.items() if k.startswith(f"{part}_model.")}
    skeleton, params = _bind(config, held, str(name), head, dtype, torch.device(device), each)
    _say_positions(config, str(name))
    generation = find_if_there(str(name), "generation_config.json") if head else None
    if generation is not None:
        skeleton = evolve(skeleton, generation=_read_generation(generation))
    return skeleton, params


def _read_generation(path: Path) -> dict[str, Any]:
    """A generation_config.json, in which what is used of it is what it must be."""
    raw = read_json(path)
    ends = raw.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (type(end) is not int or end < 0):
            raise ValueError(
                f"load: {path}: eos_token_id must be a token or a list of tokens, found {json.dumps(end)[:60]}"
            )
    penalty = raw.get("repetition_penalty")
    if penalty is not None and (type(penalty) not in (int, float) or not 0 < penalty < math.inf):
        raise ValueError(
            f"load: {path}: repetition_penalty must be a number above 0, found {json.dumps(penalty)[:60]}"
        )
    return raw


def _say_positions(config: Mapping[str, Any], name: str) -> None:
    """Warn of the one place where transformers' DINOv2 is not that of its authors; with registers both do the same."""
    if config.get("model_type") == "dinov2" and config.get("image_size") == 518:
        warnings.warn(
            f"load: {name} was trained at 518 px; at other sizes transformers stretches its position embedding without the offset of 0.1 "
            "of the original code, and features differ from the DINOv2 hub's by about 2e-2. Models with registers do not differ",
            stacklevel=3,
        )


def load_encoder(name: files.PathLike, tower: Literal["text", "vision"]) -> tuple[Skeleton, Params]:
    """An encoder as `load` gives it; of a checkpoint that holds two (CLIP, SigLIP) the named one."""
    config = {} if Path(name).is_file() else read_json(find(str(name), ("config.json",)))
    return load(name, part=tower if f"{tower}_config" in config else "")


def bind(
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    *,
    name: str = "",
    head: Literal["", "language"] = "",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Skeleton, Params]:
    """Skeleton and params of a config dict and a state dict with the names of published checkpoints; transformers maps the names.

    Raises:
        ValueError: as `load`.
    """
    return _bind(
        config, entries_of(state), name or str(config["model_type"]), head, dtype, torch.device(device), None
    )


def init_skeleton(
    config: dict[str, Any], gen: Generator, *, head: Literal["", "language"] = ""
) -> tuple[Skeleton, Params]:
    """An architecture with transformers' own random initialisation, float32 on CPU, a pure function of `gen`.

    Args:
        config: such as {"model_type": "dinov2", "hidden_size": 96, ...}; what is left out has transformers' default.
        head: as in `load`.
    Raises:
        ValueError: unknown model_type or key, a value of the wrong type, sizes that no model can have, or more weights than this machine
            has memory for; before anything is allocated.
    """
    kind, cfg = _architecture(config, head)
    known = {*type(cfg)().to_dict(), *cfg.attribute_map, "model_type"}
    if unknown := sorted(config.keys() - known):
        has = ", ".join(sorted(k for k in known if not k.startswith("_")))
        raise ValueError(
            f"init_skeleton: a {config['model_type']} config has no {', '.join(unknown)}; it has {has}"
        )
    seed = int(torch.randint(2**62, (), generator=gen))
    _check_memory(_numbers_of_layers(cfg.to_dict()), config["model_type"])
    _check_memory(sum(p.numel() for p in _weightless(kind, cfg).parameters()), config["model_type"])
    with _building, torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        module = _built(kind, cfg)
    return _split(module, str(config["model_type"]), "cpu")


def empty_skeleton(config: dict[str, Any], *, head: Literal["", "language"] = "") -> Skeleton:
    """The architecture alone, of any size, in no time: what `load` binds weights to."""
    kind, cfg = _architecture(config, head)
    return _skeleton(_weightless(kind, cfg), str(config["model_type"]))


def untie(skeleton: Skeleton, params: Mapping[str, Tensor]) -> tuple[Skeleton, Params]:
    """The same language model whose head has a weight of its own, not that of the token table.

    So one of the two can be corrected alone, as an adapter on `lm_head` does, and merged or saved. The head's weight is a
    copy of the token table, the others are the params that were given.
    Raises:
        ValueError: no two layers share a weight.
    """
    first = {id(p): n for n, p in skeleton.module.named_parameters()}
    source = {n: first[id(p)] for n, p in skeleton.module.named_parameters(remove_duplicate=False)}
    if not skeleton._tied:
        raise ValueError(f"untie: no two layers of {skeleton.name} share a weight")
    config = copy.deepcopy(skeleton.config)
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    untied = empty_skeleton(config, head="language")
    if missing := sorted(n for n in untied._names if n not in source):
        raise ValueError(
            f"untie: {skeleton.name} without shared weights needs {few(missing)}, which it does not have"
        )
    untied.module._weight_conversions = getattr(skeleton.module, "_weight_conversions", [])  # type: ignore[assignment]
    weights = {
        n: params[n] if n == source[n] else params[source[n]].clone()
        for n, _ in untied.module.named_parameters()
    }
    return evolve(untied, name=skeleton.name), weights


def save(
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
            f"save: adapters are on {few(adapted, 2)}; merge them (lora.merge) or write them apart (write_adapter)"
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
    state = _published(skeleton.module, plain, packed)
    with new_folder(folder) as tmp, _quiet():
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


def _published(
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
            else {name + suffix: part for suffix, part in four_bit.pack(packed[old]).items()}
        )
    if codes:
        raise ValueError(
            f"save: {few(sorted(codes.values()))} are stored split or joined; they cannot be saved in 4 bits"
        )
    return state


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


def digest(params: tree.Tree) -> str:
    """Sixteen hex digits of the content of a tree of tensors: names, dtypes, shapes and bytes. Independent of order and device."""
    whole = hashlib.sha256()
    plain = {
        f"{n}{f' {i}' if i else ''}": t
        for n, w in tree.flatten(params).items()
        for i, t in enumerate(leaves(w))
    }
    for name, t in track(sorted(plain.items()), "hashing weights"):
        whole.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        whole.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


# Architectures --------------------------------------------------------------------------------------------------------------------------
def _architecture(config: dict[str, Any], head: str = "") -> tuple[Any, Any]:
    """(transformers class, its config) that a config dict describes; never code from the checkpoint."""
    _check_head(head)
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
        with _quiet():
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


def _numbers_of_layers(config: Mapping[str, Any]) -> int:
    """How many numbers the matrices of the layers have at least, told by the sizes alone: building so many layers takes minutes."""
    total = 0
    for part, _ in _parts(config):
        sizes = [
            _first_of(part, names) for names in (_DEPTH_NAMES, _WIDTH_NAMES, ("intermediate_size", "n_inner"))
        ]
        total += math.prod(size[1] for size in sizes if size) if all(sizes) else 0
    return total


def _check_memory(numbers: int, name: str) -> None:
    """Refuse to draw more weights than there is memory for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * numbers > memory:
        raise ValueError(
            f"config: a {name} of these sizes has {4 * numbers / 1e9:,.1f} GB of float32 weights or more, "
            f"this machine {memory / 1e9:,.1f} GB of memory"
        )


def _check_head(head: str) -> None:
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


def _built(kind: Any, cfg: Any) -> Any:
    try:
        return kind._from_config(cfg, dtype=torch.float32, **_plain(kind)).eval()
    except _UNBUILT as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(
            f"config: no {cfg.model_type} can be built of these sizes ({type(e).__name__}: {reason})"
        ) from e


# Held while a module is built: what is patched, and the generator that is drawn from, are those of the whole process.
_building = threading.Lock()


def _weightless(kind: Any, cfg: Any) -> Any:
    """The module with parameters on meta and real buffers: a parameter goes to meta when a module gets it, its memory never touched."""
    builder = threading.get_ident()

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # The method is that of the whole process: modules which other threads build meanwhile keep their parameters as they are.
        if threading.get_ident() == builder and param is not None and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
        register(self, name, param)

    with _building, torch.random.fork_rng(devices=[]), _quiet():
        register = (
            nn.Module.register_parameter
        )  # read under the lock: before it, this may be another thread's patch, and would stay
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
        try:
            module = _built(kind, cfg)
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
    module.tie_weights()
    return module


def _bind(
    config: dict[str, Any],
    held: dict[str, Entry],
    name: str,
    head: str,
    dtype: torch.dtype,
    device: torch.device,
    each: Each | None,
) -> tuple[Skeleton, Params]:
    """Find each checkpoint tensor its parameter, see that all fit, and only then read them, one at a time."""
    kind, cfg = _architecture(config, head)
    held = _unpacked(held)
    wrong = [
        f"{k} ({str(e.dtype)[6:]})"
        for k, e in held.items()
        if e.dtype not in _FLOATS and not _BUFFERS.search(k)
    ]
    if wrong:
        raise ValueError(
            f"load: {name}: weights must be float16, bfloat16, float32, float64 or bitsandbytes' 4-bit, found {few(wrong)}; "
            "other quantised files are not read"
        )
    module = _weightless(kind, cfg)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    plan, extra = _plan(module, held)
    _join_tied(module, plan, name)
    missing = sorted(n for n in shapes.keys() - plan.keys() if not _UNUSED.search(n))
    extra = sorted(k for k in extra if not (_HEADS.search(k) or _UNUSED.search(k) or _BUFFERS.search(k)))
    misfit = sorted(
        f"{n} {list(e.shape)} instead of {list(shapes[n])}"
        for n, e in plan.items()
        if e.shape and e.shape != shapes[n]
    )
    if missing or extra or misfit:
        parts = (("missing", missing), ("unexpected", extra), ("of another shape", misfit))
        raise ValueError(
            f"load: {name} is no {kind.__name__} of this config: "
            + "; ".join(f"{w} {few(ks)}" for w, ks in parts if ks)
        )
    params: Params = {}
    for n, shape in track(shapes.items(), "reading weights"):
        t = (
            _read(plan.pop(n), n, name).to(device, dtype)
            if n in plan
            else torch.zeros(shape, dtype=dtype, device=device)
        )
        if tuple(t.shape) != shape:
            raise ValueError(
                f"load: {name}: {n} must be {list(shape)}, the file's parts make {list(t.shape)}"
            )
        params[n] = (each(n, t) if each else t).detach()
        del t
        if each:
            give_back()
    return _skeleton(module, name, device), params


def _read(entry: Entry, name: str, of: str) -> Tensor:
    try:
        return entry.read()
    except ValueError as e:
        raise ValueError(f"load: {of}: {name}: {e}") from e


def _plan(module: Any, held: Mapping[str, Entry]) -> tuple[dict[str, Entry], list[str]]:
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


def _join_tied(module: Any, plan: dict[str, Entry], name: str) -> None:
    """A tied weight may be in a file under either of its names, or under both."""
    first = {id(p): n for n, p in module.named_parameters()}
    for n, p in module.named_parameters(remove_duplicate=False):
        one = first[id(p)]
        if n == one or n not in plan:
            continue
        if one in plan and not torch.equal(plan[n].read(), plan[one].read()):
            raise ValueError(
                f"load: {name}: {n} and {one} are one weight by its config, but differ in the file"
            )
        plan.setdefault(one, plan[n])
        del plan[n]


def _unpacked(held: dict[str, Entry]) -> dict[str, Entry]:
    """The same entries, those of each 4-bit weight as one."""
    quantised = {k.partition(".quant_state.")[0] for k in held if ".quant_state.bitsandbytes__" in k}
    parts = {
        w: {k[len(w) :]: e for k, e in held.items() if k == w or k.startswith(f"{w}.")} for w in quantised
    }
    taken = {w + suffix for w, of in parts.items() for suffix in of}
    out = {k: e for k, e in held.items() if k not in taken}
    for w, of in parts.items():
        about = four_bit.header({k: e.read() for k, e in of.items() if k.startswith(".quant_state.")}, w)
        out[w] = Entry(
            shape=tuple(about["shape"]), dtype=getattr(torch, about["dtype"]), read=partial(_unpack, of)
        )
    return out


def _unpack(parts: dict[str, Entry]) -> Tensor:
    return four_bit.unpack({k: e.read() for k, e in parts.items()})


def _split(module: Any, name: str, device: str | torch.device) -> tuple[Skeleton, Params]:
    """Take the weights out of a module: what is left is on meta, tied weights stay tied."""
    params: Params = {}
    metas: dict[int, nn.Parameter] = {}
    where = {id(p): n for n, p in module.named_parameters()}
    for part in module.modules():
        for key, p in list(part._parameters.items()):
            if p is None:
                continue
            if id(p) not in metas:
                metas[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                params[where[id(p)]] = p.detach().to(device, copy=True)
            part._parameters[key] = metas[id(p)]
    return _skeleton(module, name, torch.device(device)), params


def _skeleton(module: Any, name: str, device: torch.device = torch.device("cpu")) -> Skeleton:
    for part in module.modules():
        for key, b in part._buffers.items():
            part._buffers[key] = b if b is None else b.to(device)
    return Skeleton(
        module=module, name=name, config=json.loads(json.dumps(module.config.to_dict(), default=str))
    )


@contextmanager
def _quiet() -> Iterator[None]:
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


def rename(skeleton: Skeleton, names: Iterable[str]) -> dict[str, str]:
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
