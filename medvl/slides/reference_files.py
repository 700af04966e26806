"""Files of the reference implementation, TC-SSA, for its slide compressor and projector."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl.base import files
from medvl.base.text import few
from medvl.base.tree import Tree
from medvl.components.compress import CompressConfig
from medvl.components.project import ProjectConfig
from medvl.hub.checkpoints import (
    ANY,
    Entry,
    Shape,
    entries_of,
    list_faults,
    open_weights,
    read_finite,
    save_finite,
    shapes_of,
)

_STATE, _PREFIX = "model_state_dict", "compressor."  # where a checkpoint of pretraining holds the compressor
# A command for the user: it writes the weights of a checkpoint without the metrics that lie beside them.
_CONVERT = (
    "python -c \"import torch; x = torch.load({0!r}, weights_only=False, map_location='cpu'); "
    "torch.save(x.get('model_state_dict', x.get('state_dict', x)), {1!r})\""
)
_EXPERT = {0: "up", 3: "down", 4: "norm"}  # modules of an expert; 1 and 2 are the GELU and the dropout
_PROJECTOR = {"proj.0": "up", "proj.2": "down"}
_KINDS = ("weight", "bias")


def read_compressor(
    path: files.PathLike,
    *,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[CompressConfig, Tree, dict[str, Tensor]]:
    """Read a compressor of kind moe in the format of the reference. No code of the file is run.

    Args:
        path: `moe_compressor.pt` (.pt, .pth, .bin or .safetensors) with `gate.weight`, `gate.bias` and
            `experts.{i}.net.{0,3,4}.{weight,bias}`, or a checkpoint of pretraining, which has these in
            `model_state_dict` with the prefix `compressor.`.
        top_k: slots of a patch. The file does not say it.
    Returns:
        (config with dim, slots and hidden of the file, params in `dtype` on `device`, others): others are
        the other tensors of a checkpoint of pretraining as they are, such as those of its classifier.
    Raises:
        ValueError: no such file or a broken one, a missing or unexpected key, shapes that do not fit, numbers
            that are not finite, top_k greater than the number of slots.
    Source: key names of the public code of TC-SSA, arXiv:2603.01143.
    """
    path = Path(path)
    entries, others = _split_checkpoint(_open(path, "read_compressor"))
    # The shapes of two tensors give the config, and the config gives the shapes of all tensors.
    cfg = _infer_config(entries, path, top_k)
    shapes = _compressor_shapes(cfg)
    _check_tensors(f"read_compressor: {path} must hold {cfg.slots} experts", entries, shapes)

    read = _reader(entries, path, dtype, device)
    # The reference has one module per expert; here all experts are one tensor [slots, ...].
    experts: Tree = {}
    for module, name in _EXPERT.items():
        experts[name] = {}
        for kind in _KINDS:
            weights = [read(f"experts.{i}.net.{module}.{kind}") for i in range(cfg.slots)]
            experts[name][kind] = torch.stack(weights)
    gate = {kind: read(f"gate.{kind}") for kind in _KINDS}
    params = {"gate": gate, "experts": experts}
    return cfg, params, {key: entry.read() for key, entry in others.items()}


def write_compressor(
    params: Tree, path: files.PathLike, *, others: Mapping[str, Tensor] | None = None
) -> None:
    """Write a compressor of kind moe in the format of the reference, whole or not at all.

    An existing file is replaced.

    Args:
        path: ends in .pt, .pth, .bin or .safetensors.
        others: write a checkpoint of pretraining, with these tensors and the compressor in
            `model_state_dict`; not as .safetensors.
    Raises:
        ValueError: another ending; params of another kind; a name in `others` that begins with `compressor.`;
            numbers that are not finite.
    """
    path = Path(path)
    nested = others is not None
    _check_ending("write_compressor", path, nested=nested)
    if params.keys() != {"gate", "experts"} or params["experts"].keys() != set(_EXPERT.values()):
        raise ValueError(
            f"write_compressor: params must be those of kind moe, gate and experts, got {few(list(params))}"
        )
    state = {}
    for kind, tensor in params["gate"].items():
        state[f"gate.{kind}"] = tensor
    for i in range(len(params["gate"]["weight"])):
        for module, name in _EXPERT.items():
            for kind, tensor in params["experts"][name].items():
                state[f"experts.{i}.net.{module}.{kind}"] = tensor[i]
    if others is not None:
        wrong = [name for name in others if name.startswith(_PREFIX)]
        if wrong:
            raise ValueError(
                f"write_compressor: names of the rest must not begin with {_PREFIX}, got {few(wrong)}"
            )
        state = {_PREFIX + name: tensor for name, tensor in state.items()} | dict(others)
    with files.atomic(path) as temporary:
        save_finite(state, temporary, "write_compressor", pickled=path.suffix != ".safetensors")
        if nested:  # `save_finite` writes a plain dict of tensors, which is put one level down
            whole = {_STATE: torch.load(temporary, weights_only=True)}
            with open(temporary, "wb") as file:
                torch.save(whole, file)


def read_projector(
    path: files.PathLike, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[ProjectConfig, Tree]:
    """Read a projector in the format of the reference: (config with its widths, params).

    The file is `projector.pt` with `proj.0` and `proj.2`; every key must be known and none may be missing.

    Raises:
        ValueError: as `read_compressor`.
    """
    path = Path(path)
    entries = _open(path, "read_projector")
    message = f"read_projector: {path} must hold proj.0 and proj.2"
    _check_tensors(message, entries, _projector_shapes(ANY, ANY, ANY))
    # The weights of both layers give the config, and the shapes of all four tensors must follow from it.
    up, down = entries["proj.0.weight"].shape, entries["proj.2.weight"].shape
    cfg = ProjectConfig(inputs=up[1], hidden=up[0], outputs=down[0])
    _check_tensors(message, entries, _projector_shapes(cfg.inputs, cfg.hidden, cfg.outputs))
    read = _reader(entries, path, dtype, device)
    params = {}
    for module, name in _PROJECTOR.items():
        params[name] = {kind: read(f"{module}.{kind}") for kind in _KINDS}
    return cfg, params


def _projector_shapes(inputs: int, hidden: int, outputs: int) -> dict[str, Shape]:
    return {
        "proj.0.weight": (hidden, inputs),
        "proj.0.bias": (hidden,),
        "proj.2.weight": (outputs, hidden),
        "proj.2.bias": (outputs,),
    }


def _split_checkpoint(entries: dict[str, Entry]) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """(entries of the compressor without their prefix, all others)."""
    if not any(key.startswith(_PREFIX) for key in entries):
        return entries, {}
    compressor, others = {}, {}
    for key, entry in entries.items():
        if key.startswith(_PREFIX):
            compressor[key.removeprefix(_PREFIX)] = entry
        else:
            others[key] = entry
    return compressor, others


def _infer_config(entries: Mapping[str, Entry], path: Path, top_k: int) -> CompressConfig:
    missing = [key for key in ("gate.weight", "experts.0.net.0.weight") if key not in entries]
    if missing:
        raise ValueError(f"read_compressor: {path}: missing {few(missing)}; found {few([*entries])}")
    gate, up = entries["gate.weight"].shape, entries["experts.0.net.0.weight"].shape
    if not len(gate) == len(up) == 2:
        raise ValueError(
            f"read_compressor: {path}: gate.weight must be [slots, dim], the first expert's [hidden, dim], "
            f"got {gate} and {up}"
        )
    try:
        # Weights of a linear layer are [outputs, inputs].
        return CompressConfig(kind="moe", dim=gate[1], slots=gate[0], hidden=up[0], top_k=top_k)
    except ValueError as error:
        raise ValueError(f"read_compressor: {path}: {error}") from error


def _compressor_shapes(cfg: CompressConfig) -> dict[str, Shape]:
    """{key: shape} of a compressor of kind moe."""
    d, h = cfg.dim, cfg.hidden
    expert: dict[str, Shape] = {
        "0.weight": (h, d),
        "0.bias": (h,),
        "3.weight": (d, h),
        "3.bias": (d,),
        "4.weight": (d,),
        "4.bias": (d,),
    }
    shapes: dict[str, Shape] = {"gate.weight": (cfg.slots, d), "gate.bias": (cfg.slots,)}
    for i in range(cfg.slots):
        for key, shape in expert.items():
            shapes[f"experts.{i}.net.{key}"] = shape
    return shapes


def _check_tensors(message: str, entries: Mapping[str, Entry], shapes: Mapping[str, Shape]) -> None:
    if faults := list_faults(shapes_of(entries), shapes):
        raise ValueError(f"{message}: {faults}")


def _reader(
    entries: Mapping[str, Entry], path: Path, dtype: torch.dtype, device: str | torch.device
) -> Callable[[str], Tensor]:
    def read(key: str) -> Tensor:
        return read_finite(entries[key], key, path, dtype, device)

    return read


def _open(path: Path, caller: str) -> dict[str, Entry]:
    """The tensors of a file by their names, not yet read where the format allows it."""
    _check_ending(caller, path, nested=False)
    if not path.is_file():
        raise ValueError(f"{caller}: {path}: no such file")
    if path.suffix == ".safetensors":  # tensors only: nothing to unpickle, and no nested dict
        return _strip_wrappers(open_weights(path, str(path)))
    state = _load_tensors(path, caller)
    # A checkpoint of pretraining holds optimiser and step beside the weights.
    if isinstance(state, dict) and isinstance(state.get(_STATE), dict):
        state = state[_STATE]
    if not _is_state_dict(state):
        raise ValueError(f"{caller}: {path} must hold a dict of tensors, by itself or as {_STATE}")
    files.check_tensor_storage(path, state)
    return _strip_wrappers(entries_of(state))


def _load_tensors(path: Path, caller: str) -> Any:
    files.check_uncompressed(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, ValueError, *files.READ_ERRORS) as error:
        # The checkpoints of the reference hold metrics as NumPy numbers: say how to get the weights out.
        if isinstance(error, pickle.UnpicklingError) and "numpy" in str(error):
            command = _CONVERT.format(str(path), f"{path.with_suffix('')}_weights.pt")
            raise ValueError(
                f"{caller}: {path} holds NumPy numbers beside its weights, such as metrics; they can run "
                "code when they are loaded, so they are not loaded. If you trust the file, write its weights "
                f"alone once: {command}"
            ) from error
        raise ValueError(
            f"{caller}: {path} is not a file of plain tensors, or broken ({files.error_reason(error)})"
        ) from error


def _is_state_dict(state: Any) -> bool:
    if not isinstance(state, dict):
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())


def _strip_wrappers(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Remove the prefixes that DistributedDataParallel and torch.compile put before all names."""
    # They nest in both orders, so that "module." is looked for before and after "_orig_mod.".
    for prefix in ("module.", "_orig_mod.", "module."):
        if entries and all(name.startswith(prefix) for name in entries):
            entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    return entries


def _check_ending(caller: str, path: Path, nested: bool) -> None:
    endings = [".pt", ".pth", ".bin"]
    if not nested:
        endings.append(".safetensors")
    if path.suffix not in endings:
        raise ValueError(f"{caller}: the file must end in {', '.join(endings)}, got {path.name}")
