"""The reference's files of its slide compressor and projector. A key without a place is an error, and so is a missing one."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl.base import files
from medvl.base.tree import Tree
from medvl.components.compress import CompressConfig
from medvl.components.project import ProjectConfig
from medvl.hub.checkpoints import Entry, entries_of, few, open_weights, read_finite, save_finite

_WRAP, _PREFIX = "model_state_dict", "compressor."
_WEIGHTS_ALONE = (
    "python -c \"import torch; x = torch.load({0!r}, weights_only=False, map_location='cpu'); "
    "torch.save(x.get('model_state_dict', x.get('state_dict', x)), {1!r})\""
)
_EXPERT = {0: "up", 3: "down", 4: "norm"}  # 1 and 2 are the GELU and the dropout
_KEY = re.compile(r"gate\.(weight|bias)|experts\.(0|[1-9]\d*)\.net\.[034]\.(weight|bias)")
_PROJECT = {"proj.0": "up", "proj.2": "down"}


def read_compressor(
    path: files.PathLike,
    *,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[CompressConfig, Tree, dict[str, Tensor]]:
    """A compressor of kind moe in the reference's format; nothing in the file is run.

    Args:
        path: `moe_compressor.pt` (.pt, .pth, .bin or .safetensors) with `gate.weight`, `gate.bias` and
            `experts.{i}.net.{0,3,4}.{weight,bias}`, or a checkpoint of its pretraining, where these are in `model_state_dict` and begin
            with `compressor.`.
        top_k: slots of a patch, which the file does not say.
    Returns:
        (config with dim, slots and hidden as in the file, params in `dtype` on `device`, rest): rest are the other tensors of a checkpoint
        of pretraining as they are, such as its classifier's.
    Raises:
        ValueError: no such file or a broken one, a key missing or unexpected, shapes that do not fit, numbers that are not finite, top_k
            beyond the slots.
    Source: key names of the public code of TC-SSA, arXiv:2603.01143.
    """
    path = Path(path)
    held, rest = _open(path, "read_compressor"), {}
    if any(k.startswith(_PREFIX) for k in held):
        rest = {k: e for k, e in held.items() if not k.startswith(_PREFIX)}
        held = {k.removeprefix(_PREFIX): e for k, e in held.items() if k.startswith(_PREFIX)}
    cfg = _inferred(held, path, top_k)
    shapes = _shapes(cfg)
    missing, extra = [k for k in shapes if k not in held], [k for k in held if k not in shapes]
    if missing or extra:
        raise ValueError(
            f"read_compressor: {path} must hold {cfg.slots} experts: missing {few(missing)}, unexpected {few(extra)}"
        )
    _check_shapes("read_compressor", path, held, shapes)
    get = lambda key: read_finite(held[key], key, path, dtype, device)
    experts = {
        name: {
            kind: torch.stack([get(f"experts.{i}.net.{j}.{kind}") for i in range(cfg.slots)])
            for kind in ("weight", "bias")
        }
        for j, name in _EXPERT.items()
    }
    params = {"gate": {kind: get(f"gate.{kind}") for kind in ("weight", "bias")}, "experts": experts}
    return cfg, params, {k: e.read() for k, e in rest.items()}


def write_compressor(params: Tree, path: files.PathLike, *, rest: Mapping[str, Tensor] | None = None) -> None:
    """Write a compressor of kind moe in the reference's format, whole or not at all; a file of that name is replaced.

    Args:
        path: ends in .pt, .pth, .bin or .safetensors.
        rest: write a checkpoint of pretraining: these tensors and the compressor in `model_state_dict`; not as .safetensors.
    Raises:
        ValueError: another ending; params of another kind; a name of `rest` that begins with `compressor.`; numbers that are not finite.
    """
    path = Path(path)
    _check_ending("write_compressor", path, nested=rest is not None)
    if params.keys() != {"gate", "experts"} or params["experts"].keys() != set(_EXPERT.values()):
        raise ValueError(
            f"write_compressor: params must be those of kind moe, gate and experts, got {few(list(params))}"
        )
    state = {f"gate.{kind}": t for kind, t in params["gate"].items()}
    for i in range(len(params["gate"]["weight"])):
        state |= {
            f"experts.{i}.net.{j}.{kind}": t[i]
            for j, name in _EXPERT.items()
            for kind, t in params["experts"][name].items()
        }
    if wrong := [n for n in rest or {} if n.startswith(_PREFIX)]:
        raise ValueError(
            f"write_compressor: names of the rest must not begin with {_PREFIX}, got {few(wrong)}"
        )
    if rest is not None:
        state = {_PREFIX + n: t for n, t in state.items()} | dict(rest)
    _save("write_compressor", state, path, nested=rest is not None)


def read_projector(
    path: files.PathLike, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[ProjectConfig, Tree]:
    """A projector in the reference's format (`projector.pt`: `proj.0`, `proj.2`), with its widths.

    Raises:
        ValueError: as `read_compressor`.
    """
    path = Path(path)
    held = _open(path, "read_projector")
    keys = [f"{old}.{kind}" for old in _PROJECT for kind in ("weight", "bias")]
    missing, extra = [k for k in keys if k not in held], [k for k in held if k not in keys]
    if missing or extra:
        raise ValueError(
            f"read_projector: {path} must hold proj.0 and proj.2: missing {few(missing)}, unexpected {few(extra)}"
        )
    up, down = (held[f"{old}.weight"].shape for old in _PROJECT)
    if not len(up) == len(down) == 2:
        raise ValueError(
            f"read_projector: {path}: proj.0.weight and proj.2.weight must be [out, in], got {list(up)} and {list(down)}"
        )
    cfg = ProjectConfig(inputs=up[1], hidden=up[0], outputs=down[0])
    shapes = {
        "proj.0.weight": up,
        "proj.0.bias": up[:1],
        "proj.2.weight": (cfg.outputs, cfg.hidden),
        "proj.2.bias": down[:1],
    }
    _check_shapes("read_projector", path, held, shapes)
    get = lambda key: read_finite(held[key], key, path, dtype, device)
    return cfg, {
        new: {kind: get(f"{old}.{kind}") for kind in ("weight", "bias")} for old, new in _PROJECT.items()
    }


def write_projector(params: Tree, path: files.PathLike) -> None:
    """Write a projector in the reference's format, whole or not at all; a file of that name is replaced.

    Raises:
        ValueError: another ending than .pt, .pth, .bin or .safetensors; other params; numbers that are not finite.
    """
    path = Path(path)
    _check_ending("write_projector", path, nested=False)
    if params.keys() != set(_PROJECT.values()):
        raise ValueError(f"write_projector: params must have up and down, got {few(list(params))}")
    state = {f"{old}.{kind}": t for old, new in _PROJECT.items() for kind, t in params[new].items()}
    _save("write_projector", state, path, nested=False)


def _inferred(held: Mapping[str, Entry], path: Path, top_k: int) -> CompressConfig:
    if extra := [k for k in held if not _KEY.fullmatch(k)]:
        raise ValueError(f"read_compressor: {path}: unexpected {few(extra)}")
    if missing := [k for k in ("gate.weight", "experts.0.net.0.weight") if k not in held]:
        raise ValueError(f"read_compressor: {path}: missing {few(missing)}")
    gate, up = held["gate.weight"].shape, held["experts.0.net.0.weight"].shape
    if not len(gate) == len(up) == 2:
        raise ValueError(
            f"read_compressor: {path}: gate.weight must be [slots, dim], the first expert's [hidden, dim], got {gate} and {up}"
        )
    try:
        return CompressConfig(kind="moe", dim=gate[1], slots=gate[0], hidden=up[0], top_k=top_k)
    except ValueError as e:
        raise ValueError(f"read_compressor: {path}: {e}") from e


def _shapes(cfg: CompressConfig) -> dict[str, tuple[int, ...]]:
    d, h = cfg.dim, cfg.hidden
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (cfg.slots, d), "gate.bias": (cfg.slots,)}
    one = {
        "0.weight": (h, d),
        "0.bias": (h,),
        "3.weight": (d, h),
        "3.bias": (d,),
        "4.weight": (d,),
        "4.bias": (d,),
    }
    return shapes | {f"experts.{i}.net.{k}": s for i in range(cfg.slots) for k, s in one.items()}


def _check_shapes(
    where: str, path: Path, held: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for k, shape in shapes.items():
        if held[k].shape != shape:
            raise ValueError(f"{where}: {path}: {k} must be {list(shape)}, got {list(held[k].shape)}")


def _open(path: Path, where: str) -> dict[str, Entry]:
    _check_ending(where, path, nested=False)
    if not path.is_file():
        raise ValueError(f"{where}: {path}: no such file")
    if path.suffix == ".safetensors":
        return _unwrapped(open_weights(path, str(path)))
    files.check_stored(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, ValueError, *files.BROKEN) as e:
        if isinstance(e, pickle.UnpicklingError) and "numpy" in str(e):
            alone = _WEIGHTS_ALONE.format(str(path), f"{path.with_suffix('')}_weights.pt")
            raise ValueError(
                f"{where}: {path} holds NumPy numbers beside its weights, such as metrics; they can run code when they are loaded, and so "
                f"are not. If you trust the file, write its weights alone once: {alone}"
            ) from e
        raise ValueError(
            f"{where}: {path} is not a file of plain tensors, or broken ({files.reason(e)})"
        ) from e
    if isinstance(state, dict) and isinstance(state.get(_WRAP), dict):
        state = state[_WRAP]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()
    ):
        raise ValueError(f"{where}: {path} must hold a dict of tensors, by itself or as {_WRAP}")
    files.check_own_numbers(path, state)
    return _unwrapped(entries_of(state))


def _unwrapped(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Names without what DistributedDataParallel and torch.compile put before all of them."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if entries and all(name.startswith(prefix) for name in entries):
            entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    return entries


def _check_ending(where: str, path: Path, nested: bool) -> None:
    endings = (".pt", ".pth", ".bin") if nested else (".pt", ".pth", ".bin", ".safetensors")
    if path.suffix not in endings:
        raise ValueError(f"{where}: the file must end in {', '.join(endings)}, got {path.name}")


def _save(where: str, state: Mapping[str, Tensor], path: Path, nested: bool) -> None:
    with files.atomic(path) as tmp:
        save_finite(state, tmp, where, pickled=path.suffix != ".safetensors")
        if nested:
            torch.save({_WRAP: torch.load(tmp, weights_only=True)}, tmp)
