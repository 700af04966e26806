"""H-LoRA adapters in HealthGPT's files. A key without a place is an error, and so is a layer without its
keys.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl.base import files
from medvl.base.text import few
from medvl.hub.checkpoints import ANY, Entry, Shape, list_faults, open_weights, read_finite, save_finite
from medvl.hub.peft_files import PREFIX, folded
from medvl.weights import lora
from medvl.weights.lora import Adapter, LoraConfig

# HealthGPT's names of the three tensors of a layer. Unlike peft's there is no name of the adapter in them.
_ROUTED = re.compile(r"(?P<module>.+)\.(?P<part>lora_route|lora_A|lora_B)\.weight")
# {HealthGPT's name: the name in `Adapter.factors`}
_PARTS = {"lora_route": "router", "lora_A": "a", "lora_B": "b"}


def read_hlora(
    path: files.PathLike,
    *,
    rank: int,
    alpha: float,
    experts: int = 4,
    skeleton: Any = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Adapter, dict[str, Tensor]]:
    """An H-LoRA adapter in HealthGPT's format, and the other tensors of its file.

    Args:
        path: a .bin (read with weights_only) or .safetensors file; it does not say how strong its
            corrections are.
        rank: of all experts together; each has rank / experts.
        alpha: the correction is alpha / (rank / experts) B diag(gates) A; of all published files, alpha = 2
            rank.
        skeleton: `skeletons.Skeleton` of the language model: then the file must correct each of its linear
            layers but the head, and only these.
    Returns:
        (adapter, other tensors): these by names without `base_model.model.`, such as the projector's, the
            embedding's and the head's weights; all in `dtype` on `device`.
    Raises:
        ValueError: no such file, a broken one, a layer with one or two of its three tensors, shapes that do
            not fit, layers missing or unexpected, numbers that are not finite.
    Source: Lin et al. 2025 (HealthGPT), arXiv:2502.09838, eq. 9; key names of its public code.
    """
    path = Path(path)
    entries = open_file(path, "read_hlora")
    if rank < 1 or experts < 1 or rank % experts:
        raise ValueError(
            f"read_hlora: experts must divide the rank of all of them together, got rank {rank} and "
            f"{experts} experts"
        )
    layers, others = _group_keys(entries, path)
    # All that can be told from names and shapes; the tensors come last.
    shapes: dict[str, Shape] = {}
    for module in layers:
        shapes |= _layer_shapes(module, (ANY, ANY), rank, experts)
    if skeleton is not None:
        shapes = hlora_shapes(skeleton, rank, experts)
    found = {key.removeprefix(PREFIX): entry.shape for key, entry in entries.items()}
    if faults := list_faults(found, shapes, dict.fromkeys(others, ())):
        base = "" if skeleton is None else f" for {skeleton.name}"
        raise ValueError(
            f"read_hlora: {path} must hold layers of rank {rank} and {experts} experts{base}: {faults}"
        )
    return read_entries(entries, path, rank, alpha, experts, dtype, device)


def hlora_shapes(skeleton: Any, rank: int, experts: int) -> dict[str, Shape]:
    """{name in a file, without peft's prefix: shape} for each linear layer of a model but the head."""
    shapes: dict[str, Shape] = {}
    for module in lora.target_layers(LoraConfig(pattern="all-linear"), skeleton):
        weight = skeleton.module.get_parameter(f"{module}.weight")
        shapes |= _layer_shapes(module, tuple(weight.shape), rank, experts)
    return shapes


def _layer_shapes(module: str, weight: Shape, rank: int, experts: int) -> dict[str, Shape]:
    """Of the three tensors of a layer whose weight is [out, in]."""
    out, into = weight
    return {
        f"{module}.lora_route.weight": (experts, into),
        f"{module}.lora_A.weight": (rank, into),
        f"{module}.lora_B.weight": (out, rank),
    }


def open_file(path: Path, caller: str) -> dict[str, Entry]:
    """The tensors of a .bin or .safetensors file; only shapes and dtypes are read."""
    if not path.is_file() or path.suffix not in (".bin", ".safetensors"):
        problem = "it has another name" if path.is_file() else "nothing is there"
        raise ValueError(f"{caller}: {path} must be a .bin or .safetensors file, {problem}")
    return open_weights(path, str(path))


def read_entries(
    entries: Mapping[str, Entry],
    path: Path,
    rank: int,
    alpha: float,
    experts: int,
    dtype: torch.dtype | None,
    device: Any,
) -> tuple[Adapter, dict[str, Tensor]]:
    """Adapter and rest of the tensors of a file, as `read_hlora`; their shapes are not checked."""
    layers, others = _group_keys(entries, path)

    def read(key: str) -> Tensor:
        return read_finite(entries[key], key, path, dtype, device)

    # `Adapter.scale` stands before B diag(gates) A, and each expert has rank / experts.
    adapter = Adapter(
        factors={module: {part: read(key) for part, key in keys.items()} for module, keys in layers.items()},
        scale=dict.fromkeys(layers, alpha / rank * experts),
        kinds=dict.fromkeys(layers, "linear"),
        name=path.stem,
    )
    return adapter, {name: read(key) for name, key in others.items()}


def _group_keys(entries: Mapping[str, Entry], path: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({module: {"router", "a" and "b": key}}, {name: key} of the other tensors), without peft's prefix."""
    # Whatever is no factor is a weight of another part of the model, such as the projector: HealthGPT keeps
    # all that it trains in one file.
    layers: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    unexpected = []
    for key in entries:
        name = key.removeprefix(PREFIX)
        match = _ROUTED.fullmatch(name)
        if match:
            layers.setdefault(match["module"], {})[_PARTS[match["part"]]] = key
        else:
            others[name] = key
        # A key of plain LoRA, such as lora_A.default.weight, is not a tensor "beside" the adapter.
        if not key.startswith(PREFIX) or (not match and ".lora_" in key):
            unexpected.append(key)
    if unexpected or not layers:
        problem = f"unexpected {few(unexpected)}" if unexpected else f"no layers, only {few(list(others))}"
        raise ValueError(
            f"read_hlora: {path} must hold {PREFIX}LAYER.lora_route|lora_A|lora_B.weight, found {problem}"
        )
    return layers, others


def write_hlora(
    adapter: Adapter, path: files.PathLike, other_tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write an H-LoRA adapter as one file in HealthGPT's format, whole or not at all; a file of that name is
    replaced.

    The format has no place for the scale: whoever reads the file must know rank and alpha = scale x rank /
    experts.

    Args:
        path: ends in .bin or .safetensors.
        other_tensors: what else to put into the file, as `read_hlora` gives it; the adapter's `full` tensors
            are put there too.
    Raises:
        ValueError: another ending; a layer that is not linear or has no router; ranks, numbers of experts or
            scales that differ; a gate per sample; numbers that are not finite.
    """
    path = Path(path)
    if path.suffix not in (".bin", ".safetensors"):
        raise ValueError(f"write_hlora: the file must end in .bin or .safetensors, got {path.name}")
    # All checks of shapes and settings come before the file is opened.
    state = _hlora_state(adapter, other_tensors or {})
    with files.atomic(path) as tmp:
        save_finite(state, tmp, f"write_hlora: {adapter}", pickled=path.suffix == ".bin")


def _hlora_state(adapter: Adapter, other_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file under HealthGPT's names."""
    unfit = []
    for module, factors in adapter.factors.items():
        if "router" not in factors or adapter.kinds[module] != "linear":
            unfit.append(module)
    if unfit or not adapter.factors:
        raise ValueError(
            f"write_hlora: every layer of {adapter} must be linear and have a router, not so {few(unfit)}; "
            "use write_adapter"
        )
    # The reader knows one rank, number of experts and scale for all layers.
    settings = set()
    for module, factors in adapter.factors.items():
        settings.add((len(factors["a"]), len(factors["router"]), adapter.scale[module]))
    if len(settings) > 1:
        raise ValueError(
            "write_hlora: layers must have one rank, number of experts and scale, "
            f"got {few(sorted(settings))}"
        )
    state: dict[str, Tensor] = {}
    for module, factors in adapter.factors.items():
        name = f"{PREFIX}{module}"
        state[f"{name}.lora_route.weight"] = factors["router"]
        state[f"{name}.lora_A.weight"] = factors["a"]
        # The format has no gate [r] beside the router's: it is multiplied into B.
        state[f"{name}.lora_B.weight"] = folded(adapter, module, "write_hlora")
    # Of a name in both, the given tensor counts.
    for name, tensor in {**adapter.full, **other_tensors}.items():
        state[PREFIX + name] = tensor
    return state
