"""VQ models in files: taming's model.yaml with its last.ckpt, and a folder of safetensors with a record."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl.base import config, files
from medvl.base.text import few, short
from medvl.components.vq import VqConfig, vq_shapes
from medvl.hub.checkpoints import (
    Entry,
    entries_of,
    list_faults,
    new_folder,
    open_weights,
    read_finite,
    read_pickle,
    save_finite,
    shapes_of,
)

_KINDS = {"taming.models.vqgan.GumbelVQ": "gumbel", "taming.models.vqgan.VQModel": "vq"}
_USED = "quantize.used"
_NEEDED = ("n_embed", "embed_dim", "z_channels", "ch", "ch_mult", "resolution")
# What a yaml says that no architecture depends on: losses, schedules, names in logs, paths of its author.
_TRAINING = {
    *("lossconfig", "temperature_scheduler_config", "monitor", "image_key", "ckpt_path", "ignore_keys"),
    # Codes always have the shape [b, h, w] here, which is the sane one.
    *("sane_index_shape", "remap", "colorize_nlabels", "ddconfig", "dropout"),
    *("double_z", "resamp_with_conv", "give_pre_end"),  # looked at before
}


def read_vqgan(
    yaml_path: files.PathLike, ckpt_path: files.PathLike, *, device: str | torch.device = "cpu"
) -> tuple[VqConfig, dict[str, Tensor]]:
    """A VQ model as taming-transformers publishes it.

    Args:
        yaml_path: model.yaml; its losses, schedules and dropout, which only taming's training uses, are not read.
            `remap` says that some codes are used: the checkpoint knows which.
        ckpt_path: last.ckpt, a checkpoint of PyTorch Lightning, or .safetensors with the same names. Nothing in
            it is run, and objects of other libraries are not looked at; its `loss.` weights are left out.
    Returns:
        (record, float32 parameters) for `components.vq`.
    Raises:
        ValueError: the yaml is of another model or cannot be read; the checkpoint is none, cut off, of another
            model (lists names that are missing or unexpected, and other shapes) or not finite.
    """
    yaml_path, ckpt_path = Path(yaml_path), Path(ckpt_path)
    settings = _read_yaml(yaml_path)
    if not ckpt_path.is_file():
        raise ValueError(f"read_vqgan: {ckpt_path}: no such file")
    if ckpt_path.suffix == ".safetensors":
        entries = open_weights(ckpt_path, str(ckpt_path))
    else:
        entries = entries_of(read_pickle(ckpt_path, part="state_dict"))
    entries = {name: entry for name, entry in entries.items() if not name.startswith("loss.")}
    if settings.pop("remap"):
        # Where it is missing, that is found below.
        settings["used"] = entries[_USED].read().numel() if _USED in entries else 1
    try:
        cfg = config.structure(settings, VqConfig, source=str(yaml_path))
    except ValueError as e:
        raise ValueError(f"read_vqgan: {e}") from e
    return cfg, _read_params(cfg, entries, ckpt_path, f"{yaml_path} describes", device)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The fields of `VqConfig`, and "remap"."""
    import yaml

    files.check_regular(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as e:
        raise ValueError(f"read_vqgan: {path} is not readable YAML ({files.error_reason(e)})") from e
    model = _table_of(raw, "model")
    target = model.get("target")
    if not isinstance(target, str) or target not in _KINDS:
        raise ValueError(
            f"read_vqgan: {path}: model.target must be {' or '.join(_KINDS)}, found {short(target)}; other "
            "autoencoders have other layers"
        )
    params = _table_of(model, "params")
    layers = _table_of(params, "ddconfig")
    # A continuous autoencoder has mean and variance, and these switches drop the convolutions between levels and
    # the end of the decoder.
    for name, expected in (("double_z", False), ("resamp_with_conv", True), ("give_pre_end", False)):
        if layers.get(name, expected) is not expected:
            raise ValueError(f"read_vqgan: {path}: {name} must be {expected}, found {short(layers[name])}")
    named = {name: value for name, value in (params | layers).items() if name not in _TRAINING}
    missing = [name for name in _NEEDED if name not in named]
    if missing:
        raise ValueError(f"read_vqgan: {path}: must say {few(missing)}")
    # YAML 1.1 takes 1e-8 without a point for text.
    if isinstance(named.get("kl_weight"), str):
        named["kl_weight"] = float(named["kl_weight"])
    return named | {"kind": _KINDS[target], "remap": params.get("remap") is not None}


def _table_of(table: Any, name: str) -> dict[str, Any]:
    """A table inside another; empty where there is none."""
    inner = table.get(name) if isinstance(table, dict) else None
    return inner if isinstance(inner, dict) else {}


def _read_params(
    cfg: VqConfig, entries: Mapping[str, Entry], path: Path, expected: str, device: str | torch.device
) -> dict[str, Tensor]:
    """The parameters of a file, if they are those of `cfg`."""
    shapes = vq_shapes(cfg)
    if faults := list_faults(shapes_of(entries), shapes):
        raise ValueError(f"read_vqgan: {path} is not the model that {expected}: {faults}")
    params = {}
    for name in shapes:
        if name == _USED:
            params[name] = entries[name].read().to(device).long()
            if int(params[name].min()) < 0 or int(params[name].max()) >= cfg.n_embed:
                raise ValueError(f"read_vqgan: {path}: {name} must lie in 0..{cfg.n_embed - 1}")
        else:
            params[name] = read_finite(entries[name], name, path, torch.float32, device)
    return params


def write_vqgan(cfg: VqConfig, params: Mapping[str, Tensor], folder: files.PathLike) -> None:
    """Write a VQ model as a new folder, model.safetensors and vq.json, whole or not at all.

    Raises:
        ValueError: the folder is there and not empty; params are not those of `cfg`, or not finite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if shapes != vq_shapes(cfg):
        wrong = sorted(name for name, _ in shapes.items() ^ vq_shapes(cfg).items())
        raise ValueError(f"write_vqgan: params must be those of the record, not so {few(wrong)}")
    with new_folder(folder) as tmp:
        save_finite(params, tmp / "model.safetensors", "write_vqgan: parameters")
        files.write_text(tmp / "vq.json", json.dumps(config.unstructure(cfg), indent=2) + "\n")


def open_vqgan(
    folder: files.PathLike, *, device: str | torch.device = "cpu"
) -> tuple[VqConfig, dict[str, Tensor]]:
    """The VQ model of a folder that `write_vqgan` wrote.

    Raises:
        ValueError: no such folder, or its files are broken or do not fit each other.
    """
    cfg, path = read_vq_config(folder), Path(folder) / "model.safetensors"
    return cfg, _read_params(cfg, open_weights(path, str(path)), path, f"{folder}/vq.json describes", device)


def read_vq_config(folder: files.PathLike) -> VqConfig:
    """The record of `open_vqgan` alone; no weights are read.

    Raises:
        ValueError: as `open_vqgan`.
    """
    folder = Path(folder)
    if not (folder / "vq.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"open_vqgan: {folder} must hold vq.json and model.safetensors; `invoke vqgan convert` makes such a folder"
        )
    return config.load_record(folder / "vq.json", VqConfig)
