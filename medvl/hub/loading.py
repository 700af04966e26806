"""Checkpoints as skeletons and params: every tensor finds its parameter before any is read, then one is read at a time."""

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
from medvl.hub.architectures import check_head, find_architecture
from medvl.hub.checkpoints import (
    Entry,
    entries_of,
    find_file,
    find_optional_file,
    open_weights,
    read_json,
    read_pickle,
    release_memory,
)
from medvl.hub.dinov2 import dinov2_config, from_dinov2
from medvl.hub.skeletons import Params, Skeleton, build_weightless, make_skeleton
from medvl.hub.weight_names import place_entries
from medvl.weights import four_bit

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

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_skeleton(
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
    check_head(head)
    path = Path(name)
    if path.is_file():
        state = read_pickle(path)
        config = dinov2_config(state, str(path))
        _say_positions(config, path.stem)
        return bind_weights(config, from_dinov2(state), name=path.stem, dtype=dtype, device=device)
    config = read_json(find_file(str(name), ("config.json",)))
    held = open_weights(find_file(str(name), _WEIGHTS), str(name))
    if part:
        if not isinstance(config.get(f"{part}_config"), dict):
            raise ValueError(
                f"load: {name} has no {part} tower (its config.json has no {part}_config); leave part empty"
            )
        config = {"model_type": f"{config.get('model_type')}_{part}_model"} | config[f"{part}_config"]
        held = {k: e for k, e in held.items() if k.startswith(f"{part}_model.")}
    skeleton, params = _bind(config, held, str(name), head, dtype, torch.device(device), each)
    _say_positions(config, str(name))
    generation = find_optional_file(str(name), "generation_config.json") if head else None
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
    config = {} if Path(name).is_file() else read_json(find_file(str(name), ("config.json",)))
    return load_skeleton(name, part=tower if f"{tower}_config" in config else "")


def bind_weights(
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
    kind, cfg = find_architecture(config, head)
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
    module = build_weightless(kind, cfg)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    plan, extra = place_entries(module, held)
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
            release_memory()
    return make_skeleton(module, name, device), params


def _read(entry: Entry, name: str, of: str) -> Tensor:
    try:
        return entry.read()
    except ValueError as e:
        raise ValueError(f"load: {of}: {name}: {e}") from e


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
        about = four_bit.read_quant_header(
            {k: e.read() for k, e in of.items() if k.startswith(".quant_state.")}, w
        )
        out[w] = Entry(
            shape=tuple(about["shape"]), dtype=getattr(torch, about["dtype"]), read=partial(_unpack, of)
        )
    return out


def _unpack(parts: dict[str, Entry]) -> Tensor:
    return four_bit.unpack_weight({k: e.read() for k, e in parts.items()})
