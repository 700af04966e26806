"""A registry of adapters: their names and folders, their base model, and the vector by which each is
retrieved.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict, evolve, frozen
from torch import Tensor

from medvl.base import config, files

_log = logging.getLogger("medvl")
_MAX_WIDTH = 2**20  # numbers of a vector; embeddings have thousands


@frozen(kw_only=True)
class AdapterRecord:
    """One adapter. Paths are relative to the registry's root."""

    name: str
    path: str  # folder in peft's format
    # .npy [d], the mean of sample embeddings; raw sums of unit vectors are read too. "" = named when it is
    # written.
    vector: str
    description: str = ""
    category: str = ""
    samples: int = 0  # how many samples the vector is the mean of, 0 = not known
    embedder: str = ""  # name of the embedder of the vector, "" = not known


@frozen(kw_only=True)
class Registry:
    """The content of a registry's file."""

    adapters: tuple[AdapterRecord, ...] = ()
    # The model all were trained on: a folder relative to the root, or a hub name. "" = as their
    # adapter_config.json say.
    base: str = ""
    # Folder of the embedder of the vectors (`embedders.read_embedder`). "" = only the vectors are there.
    embedder: str = ""
    root: str = ""  # where relative paths start, relative to the folder of this file; "" = there

    def __attrs_post_init__(self) -> None:
        counts = Counter(record.name for record in self.adapters)
        for name in sorted(counts):
            if counts[name] > 1:
                raise ValueError(f"the name {name!r} is there {counts[name]} times; names must differ")
        for record in self.adapters:
            if not record.name.strip():
                raise ValueError(f"every adapter needs a name, got {record.name!r}")


def read_registry(path: files.PathLike, root: files.PathLike = "") -> Registry:
    """The registry in a `.toml` or `.json` file, of our own records or of LoraRetriever's (a list of
    {lora_name, lora_path, embedding_path, description}).

    Args:
        root: where relative paths start, instead of what the file says; LoraRetriever's lists lie in
            `config/` and start at the project.
    Raises:
        ConfigError: unreadable, an unknown key, a wrong type, a name that is there twice; names the file and
            the place.
    """
    path = Path(path)
    raw = config.read_plain(path)
    # A bare list is how LoraRetriever writes its adapters.
    if isinstance(raw, list):
        raw = {"adapters": [_rename_keys(record) for record in raw]}
    registry = config.structure(raw, Registry, str(path))
    if not str(root):
        return registry
    # Relative, so that a registry may be moved together with its adapters.
    return evolve(registry, root=os.path.relpath(root, path.parent))


def registry_root(path: files.PathLike, registry: Registry) -> Path:
    """The folder where the relative paths of a registry start."""
    return Path(path).parent / registry.root


def read_vectors(path: files.PathLike, registry: Registry) -> Tensor:
    """The adapters' vectors, float32 [p, d], each of length 1.

    Only means are kept in these files; a mean of few samples may still tell about them.
    Raises:
        ValueError: a file that is missing or no vector, vectors of different sizes or embedders, one that is
            zero or not finite.
    """
    rows: list[np.ndarray] = []
    for record in registry.adapters:
        file = registry_root(path, registry) / record.vector
        try:
            array = files.open_array(file)
        except ValueError as e:
            raise ValueError(f"{path}: {record.name}: {e}{_root_advice(path, registry)}") from e
        row = _unit_vector(array, f"{path}: {record.name}: {file}")
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"{path}: {record.name} has {len(row)} numbers, {registry.adapters[0].name} {len(rows[0])}; "
                "were they made by one embedder?"
            )
        rows.append(row)
    embedders = sorted({record.embedder for record in registry.adapters} - {""})
    if len(embedders) > 1:
        raise ValueError(
            f"{path}: vectors of different embedders cannot be compared, got {', '.join(embedders)}"
        )
    if not rows:
        raise ValueError(f"{path}: the registry has no adapter; `invoke adapters add` adds one")
    return torch.from_numpy(np.stack(rows))


def check_registry_files(path: files.PathLike, registry: Registry) -> dict[str, str]:
    """Check that every adapter's folder and vector are there; returns {adapter: the base model it names}.

    Raises:
        ValueError: what is missing, with the adapter's name.
    """
    # Read, not only looked for: widths and embedders must agree too.
    read_vectors(path, registry)
    return {record.name: _named_base(path, registry, record) for record in registry.adapters}


def check_registry(path: files.PathLike, registry: Registry, base: str = "") -> None:
    """Check that every adapter's folder and vector are there, and that all are of one base model.

    Models have many names (of a hub, of folders, of copies in four bits). So adapters that name another model
    than `base` or `registry.base` are a warning: names and shapes of their layers are checked when they are
    read.

    Args:
        base: the model that they will be put on, if it is known.
    Raises:
        ValueError: what is missing, with the adapter's name; adapters that name different models where
            neither `base` nor the registry names one.
    """
    bases = check_registry_files(path, registry)
    expected = base or registry.base
    if not expected:
        models = {_model_name(name) for name in bases.values() if name}
        if len(models) > 1:
            named = ", ".join(f"{adapter} of {name}" for adapter, name in bases.items())
            raise ValueError(
                f"{path}: adapters of different models: {named}; give base, if these are names of one"
            )
        return
    # The registry's own base counts as well, where `base` is a copy under another name.
    accepted = {_model_name(expected), _model_name(registry.base)}
    # An adapter that names no model may belong to any.
    others = [adapter for adapter, name in bases.items() if name and _model_name(name) not in accepted]
    if others:
        _log.warning(
            "%s: used as adapters of %s, but trained on a model of another name: %s",
            path,
            expected,
            _list_bases(others, bases),
        )


def _list_bases(adapters: Sequence[str], bases: Mapping[str, str]) -> str:
    """The first six adapters with their base models."""
    text = ", ".join(f"{adapter} on {bases[adapter]}" for adapter in adapters[:6])
    if len(adapters) > 6:
        text += f" and {len(adapters) - 6} more"
    return text


def _model_name(base: str) -> str:
    """A model's name without the owner or folder before it, and without the suffix of a copy in four bits."""
    name = base.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"-(?:unsloth-)?bnb-4bit$", "", name)


def base_model(path: files.PathLike, registry: Registry) -> str:
    """The base model: a folder, or a name on the hub; "" where nothing says it."""
    name = registry.base
    for record in registry.adapters:
        name = name or _named_base(path, registry, record)
    # A name such as owner/model may be a folder below the root, which then goes before the hub.
    folder = registry_root(path, registry) / name
    if name and folder.is_dir():
        return str(folder)
    return name


def _named_base(path: files.PathLike, registry: Registry, record: AdapterRecord) -> str:
    """The base model that an adapter's adapter_config.json names, or ""."""
    try:
        settings = config.read_settings(registry_root(path, registry) / record.path / "adapter_config.json")
    except ValueError as e:
        raise ValueError(f"{path}: {record.name}: {e}{_root_advice(path, registry)}") from e
    return str(settings.get("base_model_name_or_path") or "")


def _root_advice(path: files.PathLike, registry: Registry) -> str:
    root = registry_root(path, registry)
    return f"; relative paths start at {root}; give another root if that is wrong"


def add_adapter(
    path: files.PathLike,
    record: AdapterRecord,
    vector: Tensor | np.ndarray | Sequence[float],
    root: files.PathLike = "",
) -> Registry:
    """The registry with one adapter more, its vector written beside it; the file is made if it is not there.

    Of several processes that add at the same time each waits for the others, so that none is lost.

    Args:
        root: as of `read_registry`.
    Raises:
        ValueError: as `add_adapters`. Nothing is changed then.
    """
    # Read, extend and write under one lock, or the adapter of another process would be lost in between.
    with files.file_lock(path, wait=True):
        old = read_registry(path, root) if Path(path).exists() else Registry()
        if Path(path).exists() and isinstance(config.read_plain(path), list):
            _log.warning("%s: was a list of LoraRetriever, and is now written as a registry of medvl", path)
        return add_adapters(path, old, [(record, vector)])


def add_adapters(
    path: files.PathLike,
    registry: Registry,
    new: Sequence[tuple[AdapterRecord, Tensor | np.ndarray | Sequence[float]]],
) -> Registry:
    """Write the registry with more adapters and their vectors: the vectors first, then the registry, so that
    a kill leaves the old one.

    Args:
        registry: as it is so far.
        new: records and vectors [d]. A record without a `vector` gets a file named by the adapter and the
            vector's content (`vectors/ct-1a2b3c4d.npy`), so that registries in one folder leave each other's
            vectors alone.
    Raises:
        ValueError: a name that is taken or cannot be the name of a file, an adapter's folder that is no
            adapter, a vector that does not fit the others or would be written outside the registry's folder.
            Nothing is changed then.
    """
    path = Path(path)
    root = registry_root(path, registry)
    width = 0  # of the vectors, 0 = not known yet
    if registry.adapters:
        width = len(read_vectors(path, registry)[0])
    rows: dict[str, np.ndarray] = {}  # of each file of a vector
    records = [*registry.adapters]
    for record, vector in new:
        files.check_name(record.name, f"{path}: the adapter")
        row = _unit_vector(vector, f"{path}: {record.name}: the vector")
        width = width or len(row)
        if len(row) != width:
            raise ValueError(f"{path}: {record.name} has a vector of {len(row)} numbers, the others {width}")
        if not (root / record.path / "adapter_config.json").is_file():
            raise ValueError(f"{path}: {record.name}: {root / record.path} holds no adapter_config.json")
        if not record.vector:
            # By content, so that no file is overwritten which another registry, or the old one, names.
            digest = hashlib.sha256(row.tobytes()).hexdigest()[:8]
            record = evolve(record, vector=f"vectors/{record.name}-{digest}.npy")
        file = Path(record.vector)
        # Such a path would write over files that are no part of the registry.
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(
                f"{path}: {record.name}: its vector must lie in the registry's root, got {record.vector!r}"
            )
        rows[record.vector] = row
        records.append(record)
    try:
        extended = evolve(registry, adapters=tuple(records))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    # Vectors go first: a kill in between leaves files that no registry names.
    for name, row in rows.items():
        files.write_array(root / name, row)
    write_registry(path, extended)
    return extended


def _unit_vector(vector: Tensor | np.ndarray | Sequence[float], where: str) -> np.ndarray:
    """The vector as float32 [d] of length 1; one that is stored as a single row [1, d] is read too."""
    row = np.atleast_1d(np.asarray(vector))
    is_vector = row.dtype.kind in "fiu" and row.size and row.size == row.shape[-1]
    if not is_vector or row.size > _MAX_WIDTH:
        raise ValueError(
            f"{where} must hold one vector [d] of at most {_MAX_WIDTH:,} numbers, got {row.dtype} "
            f"{list(row.shape)}"
        )
    # In float64: squares of float16 numbers above 255 overflow, and raw sums can be such.
    wide = row.astype(np.float64).reshape(-1)
    length = np.linalg.norm(wide)
    if not (np.isfinite(length) and length > 0):
        raise ValueError(
            f"{where} must hold one finite vector [d] that is not zero, got {row.dtype} {list(row.shape)} "
            f"of length {length:g}"
        )
    return (wide / length).astype(np.float32)


def write_registry(path: files.PathLike, registry: Registry) -> None:
    """Write a registry as TOML, or as JSON where the name ends in .json; as a whole or not at all."""
    if Path(path).suffix == ".json":
        text = json.dumps(config.unstructure(registry), indent=1, ensure_ascii=False) + "\n"
        files.write_text(path, text)
        return
    text = ""
    for key in ("base", "embedder", "root"):
        value = getattr(registry, key)
        if value:
            text += f"{key} = {_toml_value(value)}\n"
    for record in registry.adapters:
        text += "\n[[adapters]]\n"
        for key, value in asdict(record).items():
            # What has its default is left out, so that files stay short for whoever edits them.
            if value not in ("", 0):
                text += f"{key} = {_toml_value(value)}\n"
    files.write_text(path, text.lstrip("\n"))


def _toml_value(value: str | int) -> str:
    """A value as TOML writes it: as JSON, but without pairs of surrogates, and with DEL escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _rename_keys(record: Any) -> Any:
    """A record of LoraRetriever's list with medvl's keys."""
    if not isinstance(record, dict):
        return record
    # Keys that are medvl's already stay, and unknown ones are refused by `structure`.
    names = {"lora_name": "name", "lora_path": "path", "embedding_path": "vector"}
    return {names.get(key, key): value for key, value in record.items()}
