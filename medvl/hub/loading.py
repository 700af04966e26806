"""Checkpoints as skeletons and params.

Every tensor of a checkpoint is matched to its parameter and checked before any is read; then one is read at
a time.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve
from torch import Tensor

from medvl.base import files
from medvl.base.display import track
from medvl.base.text import few
from medvl.hub import clip, int4_files
from medvl.hub.architectures import check_head, find_architecture
from medvl.hub.checkpoints import (
    Entry,
    entries_of,
    find_file,
    find_optional_file,
    list_faults,
    open_weights,
    read_json,
    release_memory,
)
from medvl.hub.dinov2 import dinov2_config, from_dinov2
from medvl.hub.skeletons import Params, Skeleton, build_weightless, make_skeleton
from medvl.hub.weight_names import place_entries
from medvl.weights import four_bit

WeightTransform = Callable[[str, Tensor], Tensor]  # (name, weight) -> weight

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

# Keys of a checkpoint that the plain encoder does not have: task heads, poolers, the temperature of a
# contrastive pair.
_TASK_HEADS = re.compile(
    r"(^|\.)(pooler|classifier|head|lm_head|cls|qa_outputs|score|visual_projection|text_projection|logit_scale)(\.|$)"
)

# Only masked pre-training reads it.
_UNUSED = re.compile(r"(^|\.)mask_token$")

# Constants that old versions of transformers wrote into the file; the module makes them anew.
_BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias)$")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_skeleton(
    name: files.PathLike,
    *,
    part: Literal["", "text", "vision"] = "",
    head: Literal["", "language"] = "",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    transform: WeightTransform | None = None,
) -> tuple[Skeleton, Params]:
    """An architecture and its weights; one weight at a time is read, cast, moved and given to `transform`.

    Args:
        name: a folder with config.json and model.safetensors (or shards with their index, or
            pytorch_model.bin); a name on the Hugging Face hub, read from its cache and downloaded only if it
            is not there; or a file of the original DINOv2 (`dinov2_vitb14_pretrain.pth`) or CLIP.
        part: the tower to take from a checkpoint that holds two (CLIP).
        head: "" takes the plain encoder or decoder, "language" the model that predicts tokens, with its
            vision tower if it has one.
        transform: (name, weight) -> what to keep of it, such as `four_bit.quantizer(cfg)`: then the whole
            model is never held in `dtype`.
    Returns:
        skeleton and params {module name: tensor}, detached, of `dtype` on `device`. Pickled files are read
        with weights_only=True. Task heads and poolers are left out; a missing `mask_token` is zeros (only
        pre-training reads it). 4-bit weights that transformers and bitsandbytes wrote come as
        `four_bit.FourBit`, those of AutoAWQ and compressed-tensors as `int4.Int4`.
    Raises:
        ValueError: nothing there (says what was looked for, and where), a broken file, keys missing,
            unexpected or of another shape.
    """
    if part not in ("", "text", "vision"):
        raise ValueError(f"load: part must be '', 'text' or 'vision', got {part!r}")
    check_head(head)
    path = Path(name)
    if path.is_file():
        config, state = _read_original(path, part)
        _warn_of_positions(config, path.stem)
        return bind_weights(config, state, name=path.stem, dtype=dtype, device=device)

    config = read_json(find_file(str(name), ("config.json",)))
    entries = open_weights(find_file(str(name), _WEIGHT_FILES), str(name))
    if part:
        if not isinstance(config.get(f"{part}_config"), dict):
            raise ValueError(
                f"load: {name} has no {part} tower (its config.json has no {part}_config); leave part empty"
            )
        config = _tower_config(config, part)
        entries = {key: entry for key, entry in entries.items() if key.startswith(f"{part}_model.")}
    skeleton, params = _bind_entries(config, entries, str(name), head, dtype, torch.device(device), transform)
    _warn_of_positions(config, str(name))

    # Only a language model generates, and only its checkpoint says how.
    if head:
        generation = find_optional_file(str(name), "generation_config.json")
        if generation is not None:
            skeleton = evolve(skeleton, generation=_read_generation(generation))
    return skeleton, params


def load_encoder(name: files.PathLike, tower: Literal["text", "vision"]) -> tuple[Skeleton, Params]:
    """An encoder as `load_skeleton` gives it; the named tower of a checkpoint that holds two (CLIP,
    SigLIP).
    """
    # Of a file, whose contents tell, the part is not taken where there is but one.
    if Path(name).is_file() or f"{tower}_config" in read_json(find_file(str(name), ("config.json",))):
        return load_skeleton(name, part=tower)
    return load_skeleton(name)


def encoder_config(name: files.PathLike, tower: Literal["text", "vision"]) -> dict[str, Any]:
    """The config of what `load_encoder` loads; no weights are read, unless an original file has only those."""
    if Path(name).is_file():
        return _read_original(Path(name), tower)[0]
    config = read_json(find_file(str(name), ("config.json",)))
    if f"{tower}_config" in config:
        return _tower_config(config, tower)
    return config


def _read_original(path: Path, tower: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, weights) of a file of DINOv2, or of a tower of CLIP; they have no config of Hugging Face's, so it is
    computed from the shapes.
    """
    state = {key: entry.read() for key, entry in open_weights(path, str(path)).items()}
    if not any(key.startswith("visual.") or key.endswith("token_embedding.weight") for key in state):
        return dinov2_config(state, str(path)), from_dinov2(state)
    if not tower:
        raise ValueError(f"load: {path} is a CLIP, of two towers; take one with part='text' or part='vision'")
    settings = path.with_name(clip.SETTINGS)
    weights = clip.from_clip(state, tower)
    try:
        described = read_json(settings)["model_cfg"] if settings.is_file() else {}
        return clip.clip_config(weights, tower, str(path), described), weights
    except (LookupError, AttributeError, TypeError, ZeroDivisionError) as e:
        raise ValueError(f"load: {settings} is not as open_clip writes it ({type(e).__name__}: {e})") from e


def _tower_config(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """One tower of CLIP is a model of its own in transformers (clip_text_model), with the tower's config."""
    return {"model_type": f"{config.get('model_type')}_{tower}_model"} | config[f"{tower}_config"]


def bind_weights(
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    *,
    name: str = "",
    head: Literal["", "language"] = "",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Skeleton, Params]:
    """Skeleton and params of a config dict and a state dict with the names of published checkpoints;
    transformers maps the names.

    Raises:
        ValueError: as `load_skeleton`.
    """
    name = name or str(config["model_type"])
    return _bind_entries(config, entries_of(state), name, head, dtype, torch.device(device), None)


def _read_generation(path: Path) -> dict[str, Any]:
    """A generation_config.json; the settings that medvl reads are checked."""
    raw = read_json(path)
    # Checked here, where the file can be named: a wrong value would otherwise stop generation never or late.
    ends = raw.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        # `type` instead of isinstance: true is an int too.
        if end is not None and (type(end) is not int or end < 0):
            raise ValueError(
                f"load: {path}: eos_token_id must be a token or a list of tokens, found "
                f"{json.dumps(end)[:60]}"
            )
    penalty = raw.get("repetition_penalty")
    if penalty is not None and (type(penalty) not in (int, float) or not 0 < penalty < math.inf):
        raise ValueError(
            f"load: {path}: repetition_penalty must be a number above 0, found {json.dumps(penalty)[:60]}"
        )
    return raw


def _warn_of_positions(config: Mapping[str, Any], name: str) -> None:
    """Warn where transformers' DINOv2 differs from its authors' code. With registers both do the same."""
    if config.get("model_type") == "dinov2" and config.get("image_size") == 518:
        warnings.warn(
            f"load: {name} was trained at 518 px; at other sizes transformers stretches its position "
            "embedding without the offset of 0.1 of the original code, and features differ from the DINOv2 "
            "hub's by about 2e-2. Models with registers do not differ",
            stacklevel=3,
        )


def _bind_entries(
    config: dict[str, Any],
    entries: dict[str, Entry],
    name: str,
    head: str,
    dtype: torch.dtype,
    device: torch.device,
    transform: WeightTransform | None,
) -> tuple[Skeleton, Params]:
    """Match each checkpoint tensor to its parameter, check that all fit, and only then read them, one at a
    time.
    """
    # What can be told from headers comes first: a wrong checkpoint is refused before gigabytes are read.
    model_class, model_config = find_architecture(config, head)
    entries = _join_four_bit(int4_files.join_int4(entries, config, name))
    _check_dtypes(entries, name)
    module = build_weightless(model_class, model_config)
    placed, unplaced = place_entries(module, entries)
    _merge_tied(module, placed, name)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    _check_complete(shapes, placed, unplaced, f"load: {name} is no {model_class.__name__} of this config: ")

    params: Params = {}
    for param, shape in track(shapes.items(), "reading weights"):
        if param in placed:
            # The entry goes with its use: the parts of a fused weight are freed with the last of them.
            weight = _read_entry(placed.pop(param), param, name).to(device, dtype)
        else:  # a `mask_token`, the only weight that may be missing
            weight = torch.zeros(shape, dtype=dtype, device=device)
        # The shape of a weight that is made of several tensors of the file is known only now.
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"load: {name}: {param} must be {list(shape)}, the file's parts make {list(weight.shape)}"
            )
        if transform is None:
            params[param] = weight.detach()
        else:
            params[param] = transform(param, weight).detach()
            # Else the memory of all weights in `dtype` would stay with the process.
            del weight
            release_memory()
    return make_skeleton(module, name, device), params


def _check_dtypes(entries: Mapping[str, Entry], name: str) -> None:
    """Raise where a weight is of no plain float type: other quantised formats store codes under its name."""
    wrong = []
    for key, entry in entries.items():
        if entry.dtype not in _FLOATS and not _BUFFERS.search(key):
            wrong.append(f"{key} ({str(entry.dtype)[6:]})")
    if wrong:
        raise ValueError(
            f"load: {name}: weights must be float16, bfloat16, float32, float64 or bitsandbytes' 4-bit, "
            f"found {few(wrong)}; other quantised files are not read"
        )


def _check_complete(
    shapes: Mapping[str, tuple[int, ...]], placed: Mapping[str, Entry], unplaced: list[str], context: str
) -> None:
    """Raise one error that lists every parameter without a tensor, tensor without a parameter, and wrong
    shape.
    """
    present = {name: entry.shape for name, entry in placed.items()}
    for key in sorted(unplaced):
        if not (_TASK_HEADS.search(key) or _UNUSED.search(key) or _BUFFERS.search(key)):
            present[key] = ()
    needed = {name: shape for name, shape in shapes.items() if not _UNUSED.search(name)}
    # All faults at once: one at a time would cost a reader of a large checkpoint many tries.
    faults = list_faults(present, needed, optional=shapes)
    if faults:
        raise ValueError(context + faults)


def _read_entry(entry: Entry, param: str, name: str) -> Tensor:
    try:
        return entry.read()
    # 4-bit weights that the model keeps joined, such as those of experts, cannot be joined.
    except (ValueError, NotImplementedError) as e:
        raise ValueError(f"load: {name}: {param}: {e}") from e


def _merge_tied(module: Any, placed: dict[str, Entry], name: str) -> None:
    """Keep one entry of each tied weight, which a file may hold under either of its names or under both."""
    # torch names a shared parameter once unless it is told to repeat it; the first of its names is params'.
    first_name = {id(p): n for n, p in module.named_parameters()}
    for alias, p in module.named_parameters(remove_duplicate=False):
        first = first_name[id(p)]
        if alias == first or alias not in placed:
            continue
        # A file may hold both, and then they must agree: one of them could not be kept.
        if first in placed and not torch.equal(placed[alias].read(), placed[first].read()):
            raise ValueError(
                f"load: {name}: {alias} and {first} are one weight according to its config, but differ in "
                "the file"
            )
        placed.setdefault(first, placed[alias])
        del placed[alias]


def _join_four_bit(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The same entries, with the codes and scales of each 4-bit weight joined to one entry."""
    quantised = {k.partition(".quant_state.")[0] for k in entries if ".quant_state.bitsandbytes__" in k}
    # {weight: {suffix: entry}}; the codes are under the name of the weight itself, its suffix is "".
    pieces: dict[str, dict[str, Entry]] = {weight: {} for weight in quantised}
    plain: dict[str, Entry] = {}
    for key, entry in entries.items():
        weight = _weight_of(key, quantised)
        if weight is None:
            plain[key] = entry
        else:
            pieces[weight][key[len(weight) :]] = entry
    for weight, suffixes in pieces.items():
        # Only the header with shape and dtype is read now, a short text; the codes wait.
        states = {s: entry.read() for s, entry in suffixes.items() if s.startswith(".quant_state.")}
        header = four_bit.read_quant_header(states, weight)
        plain[weight] = Entry(
            shape=tuple(header["shape"]),
            dtype=getattr(torch, header["dtype"]),
            read=partial(_unpack_four_bit, suffixes),
        )
    return plain


def _weight_of(key: str, quantised: set[str]) -> str | None:
    """The 4-bit weight that a key belongs to: the key itself, or what one of its dots ends."""
    if key in quantised:
        return key
    for i, character in enumerate(key):
        if character == "." and key[:i] in quantised:
            return key[:i]
    return None


def _unpack_four_bit(pieces: dict[str, Entry]) -> Tensor:
    return four_bit.unpack_weight({suffix: entry.read() for suffix, entry in pieces.items()})
