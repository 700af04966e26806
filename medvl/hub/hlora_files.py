"""H-LoRA adapters in HealthGPT's files. A key without a place is an error, and so is a layer without its keys."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl.base import files
from medvl.base.text import few
from medvl.hub.checkpoints import Entry, open_weights, read_finite, save_finite
from medvl.hub.peft_files import PREFIX, check_fit, folded
from medvl.weights import lora
from medvl.weights.lora import Adapter, LoraConfig

_ROUTED = re.compile(r"(?P<module>.+)\.(?P<part>lora_route|lora_A|lora_B)\.weight")
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
        path: a .bin (read with weights_only) or .safetensors file; it does not say how strong its corrections are.
        rank: of all experts together; each has rank / experts.
        alpha: the correction is alpha / (rank / experts) B diag(gates) A; of all published files, alpha = 2 rank.
        skeleton: `skeletons.Skeleton` of the language model: then the file must correct each of its linear layers but the head, and only these.
    Returns:
        (adapter, rest): rest by names without `base_model.model.`, such as the projector's, the embedding's and the head's weights; all
        in `dtype` on `device`.
    Raises:
        ValueError: no such file, a broken one, a layer with one or two of its three tensors, shapes that do not fit, layers missing or
            unexpected, numbers that are not finite.
    Source: Lin et al. 2025 (HealthGPT), arXiv:2502.09838, eq. 9; key names of its public code.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (".bin", ".safetensors"):
        raise ValueError(
            f"read_hlora: {path} must be a .bin or .safetensors file, {'it has another name' if path.is_file() else 'nothing is there'}"
        )
    if rank < 1 or experts < 1 or rank % experts:
        raise ValueError(
            f"read_hlora: experts must divide the rank of all of them together, got rank {rank} and {experts} experts"
        )
    return _routed(open_weights(path, str(path)), path, rank, alpha, experts, skeleton, dtype, device)


def _routed(
    held: Mapping[str, Entry],
    path: Path,
    rank: int,
    alpha: float,
    experts: int,
    skeleton: Any,
    dtype: torch.dtype,
    device: Any,
) -> tuple[Adapter, dict[str, Tensor]]:
    layers: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key in held:
        if hit := _ROUTED.fullmatch(key.removeprefix(PREFIX)):
            layers.setdefault(hit["module"], {})[_PARTS[hit["part"]]] = key
        else:
            others[key.removeprefix(PREFIX)] = key
    odd = [k for k in held if not k.startswith(PREFIX) or (k in others.values() and ".lora_" in k)]
    if odd or not layers:
        what = f"unexpected {few(odd)}" if odd else f"no layers, only {few(list(others))}"
        raise ValueError(
            f"read_hlora: {path} must hold {PREFIX}LAYER.lora_route|lora_A|lora_B.weight, found {what}"
        )
    own = {} if skeleton is None else lora.target_layers(LoraConfig(pattern="all-linear"), skeleton)
    if skeleton is not None and own.keys() != layers.keys():
        missing, extra = [m for m in own if m not in layers], [m for m in layers if m not in own]
        raise ValueError(
            f"read_hlora: {path} is not for {skeleton.name}: missing {few(missing)}, unexpected {few(extra)}"
        )
    for m, keys in layers.items():
        if lacks := [name for name, part in _PARTS.items() if part not in keys]:
            raise ValueError(f"read_hlora: {path}: {m} lacks {few(lacks)}")
        a, b, router = (held[keys[k]].shape for k in ("a", "b", "router"))
        if not len(a) == len(b) == 2 or a[0] != rank or b[1] != rank or router != (experts, a[1]):
            raise ValueError(
                f"read_hlora: {path}: {m} must have lora_A [{rank}, in], lora_B [out, {rank}] and lora_route [{experts}, in], "
                f"got {list(a)}, {list(b)} and {list(router)}"
            )
        if skeleton is not None:
            check_fit(skeleton, own, m, "linear", a, b, f"read_hlora: {path}")
    adapter = Adapter(
        factors={
            m: {k: read_finite(held[key], key, path, dtype, device) for k, key in keys.items()}
            for m, keys in layers.items()
        },
        scale=dict.fromkeys(layers, alpha / rank * experts),
        kinds=dict.fromkeys(layers, "linear"),
        name=path.stem,
    )
    return adapter, {n: read_finite(held[key], key, path, dtype, device) for n, key in others.items()}


def write_hlora(adapter: Adapter, path: files.PathLike, rest: Mapping[str, Tensor] | None = None) -> None:
    """Write an H-LoRA adapter as one file in HealthGPT's format, whole or not at all; a file of that name is replaced.

    The format has no place for the scale: whoever reads the file must know rank and alpha = scale x rank / experts.

    Args:
        path: ends in .bin or .safetensors.
        rest: other tensors to put into the file, as `read_hlora` gives them; the adapter's `full` ones are put there too.
    Raises:
        ValueError: another ending; a layer that is not linear or has no router; ranks, numbers of experts or scales that differ; a gate
            per sample; numbers that are not finite.
    """
    path = Path(path)
    if path.suffix not in (".bin", ".safetensors"):
        raise ValueError(f"write_hlora: the file must end in .bin or .safetensors, got {path.name}")
    state = _hlora_state(adapter, rest or {})
    with files.atomic(path) as tmp:
        save_finite(state, tmp, f"write_hlora: {adapter}", pickled=path.suffix == ".bin")


def _hlora_state(adapter: Adapter, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = [m for m, f in adapter.factors.items() if "router" not in f or adapter.kinds[m] != "linear"]
    if plain or not adapter.factors:
        raise ValueError(
            f"write_hlora: every layer of {adapter} must be linear and have a router, not so {few(plain)}; use write_adapter"
        )
    alike = {(len(f["a"]), len(f["router"]), adapter.scale[m]) for m, f in adapter.factors.items()}
    if len(alike) > 1:
        raise ValueError(
            f"write_hlora: layers must have one rank, number of experts and scale, got {few(sorted(alike))}"
        )
    state: dict[str, Tensor] = {}
    for m, f in adapter.factors.items():
        parts = {"lora_route": f["router"], "lora_A": f["a"], "lora_B": folded(adapter, m, "write_hlora")}
        state |= {f"{PREFIX}{m}.{name}.weight": t for name, t in parts.items()}
    return state | {PREFIX + n: t for n, t in {**adapter.full, **rest}.items()}
