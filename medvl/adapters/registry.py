"""A registry of adapters: which there are, for which base model, and the vector that says what each is for."""

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
_LONGEST = 2**20  # numbers of a vector; embeddings have thousands


@frozen(kw_only=True)
class AdapterRecord:
    """One adapter. Paths are relative to the registry's root."""

    name: str
    path: str  # folder in peft's format
    vector: str  # .npy [d], the mean of sample embeddings; raw sums of unit vectors are read too; "" = named when it is written
    description: str = ""
    category: str = ""
    samples: int = 0  # how many samples the vector is the mean of, 0 = not known
    embedder: str = ""  # what embedded them, "" = not known


@frozen(kw_only=True)
class Registry:
    """What a registry's file says."""

    adapters: tuple[AdapterRecord, ...] = ()
    base: str = ""  # the model all were trained on (a folder relative to the root, or a hub name), "" = as their adapter_config.json say
    embedder: str = (
        ""  # folder of what made the vectors (`embed.read_embedder`), "" = only the vectors are there
    )
    root: str = ""  # where relative paths start, relative to the folder of this file; "" = there

    def __attrs_post_init__(self) -> None:
        names = [r.name for r in self.adapters]
        if twice := sorted((n, k) for n, k in Counter(names).items() if k > 1):
            raise ValueError(f"the name {twice[0][0]!r} is there {twice[0][1]} times; names must differ")
        if bad := [n for n in names if not n.strip()]:
            raise ValueError(f"every adapter needs a name, got {bad[0]!r}")


def read_registry(path: files.PathLike, root: files.PathLike = "") -> Registry:
    """The registry in a `.toml` or `.json` file, of our own records or of LoraRetriever's (a list of {lora_name, lora_path, embedding_path,
    description}).

    Args:
        root: where relative paths start, instead of what the file says; LoraRetriever's lists lie in `config/` and start at the project.
    Raises:
        ConfigError: unreadable, an unknown key, a wrong type, a name that is there twice; names the file and the place.
    """
    path, raw = Path(path), config.read_plain(path)
    if isinstance(raw, list):
        raw = {"adapters": [_ours(r) for r in raw]}
    registry = config.structure(raw, Registry, str(path))
    return evolve(registry, root=os.path.relpath(root, path.parent)) if str(root) else registry


def registry_root(path: files.PathLike, registry: Registry) -> Path:
    """The folder where the relative paths of a registry start."""
    return Path(path).parent / registry.root


def read_vectors(path: files.PathLike, registry: Registry) -> Tensor:
    """The adapters' vectors, float32 [p, d], each of length 1.

    Only means are kept in these files; a mean of few samples may still tell about them.
    Raises:
        ValueError: a file that is missing or no vector, vectors of different sizes or embedders, one that is zero or not finite.
    """
    rows: list[np.ndarray] = []
    for r in registry.adapters:
        file = registry_root(path, registry) / r.vector
        try:
            held = files.open_array(file)
        except ValueError as e:
            raise ValueError(f"{path}: {r.name}: {e}{_start(path, registry)}") from e
        row = _unit(held, f"{path}: {r.name}: {file}")
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"{path}: {r.name} has {len(row)} numbers, {registry.adapters[0].name} {len(rows[0])}; one embedder made all?"
            )
        rows.append(row)
    made = sorted({r.embedder for r in registry.adapters} - {""})
    if len(made) > 1:
        raise ValueError(f"{path}: vectors of different embedders cannot be compared, got {', '.join(made)}")
    if not rows:
        raise ValueError(f"{path}: the registry has no adapter; `invoke adapters add` adds one")
    return torch.from_numpy(np.stack(rows))


def check_registry_files(path: files.PathLike, registry: Registry) -> dict[str, str]:
    """See that every adapter's folder and vector are there; returns {adapter: the base model it names}.

    Raises:
        ValueError: what is missing, with the adapter's name.
    """
    read_vectors(path, registry)
    return {r.name: _base(path, registry, r) for r in registry.adapters}


def check_registry(path: files.PathLike, registry: Registry, base: str = "") -> None:
    """See that every adapter's folder and vector are there, and that all are of one base model.

    Args:
        base: the model that they will be put on, if it is known. Models are called by many names (of a hub, of folders, of copies in four
            bits), so adapters that name another than this or than `registry.base` are a warning: names and shapes of their layers are
            checked when they are read.
    Raises:
        ValueError: what is missing, with the adapter's name; adapters that name different models, and nothing says which is meant.
    """
    bases = check_registry_files(path, registry)
    wanted = base or registry.base
    if not wanted and len({_plain(b) for b in bases.values() if b}) > 1:
        named = ", ".join(f"{n} of {b}" for n, b in bases.items())
        raise ValueError(
            f"{path}: adapters of different models: {named}; give base, if these are names of one"
        )
    if wanted and (
        others := [
            n for n, b in bases.items() if b and _plain(b) not in {_plain(wanted), _plain(registry.base)}
        ]
    ):
        _log.warning(
            "%s: taken for adapters of %s, but trained on another model by name: %s",
            path,
            wanted,
            _named(others, bases),
        )


def _named(names: Sequence[str], bases: Mapping[str, str]) -> str:
    return ", ".join(f"{n} on {bases[n]}" for n in names[:6]) + (
        f" and {len(names) - 6} more" if len(names) > 6 else ""
    )


def _plain(base: str) -> str:
    """A model's name without what tells a hub's name from a folder's, and a copy in four bits from the model."""
    name = base.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"-(?:unsloth-)?bnb-4bit$", "", name)


def base_model(path: files.PathLike, registry: Registry) -> str:
    """The base model: a folder, or a name on the hub; "" where nothing says it."""
    name = registry.base or next((b for r in registry.adapters if (b := _base(path, registry, r))), "")
    return (
        str(registry_root(path, registry) / name)
        if name and (registry_root(path, registry) / name).is_dir()
        else name
    )


def _base(path: files.PathLike, registry: Registry, record: AdapterRecord) -> str:
    try:
        about = config.read_settings(registry_root(path, registry) / record.path / "adapter_config.json")
    except ValueError as e:
        raise ValueError(f"{path}: {record.name}: {e}{_start(path, registry)}") from e
    return str(about.get("base_model_name_or_path") or "")


def _start(path: files.PathLike, registry: Registry) -> str:
    return f"; relative paths start at {registry_root(path, registry)}, give another root where they do not"


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
    with files.file_lock(path, wait=True):
        old = read_registry(path, root) if Path(path).exists() else Registry()
        if Path(path).exists() and isinstance(config.read_plain(path), list):
            _log.warning(
                "%s: was a list of LoraRetriever's, and is written as a registry of medvl's now", path
            )
        return add_adapters(path, old, [(record, vector)])


def add_adapters(
    path: files.PathLike,
    registry: Registry,
    new: Sequence[tuple[AdapterRecord, Tensor | np.ndarray | Sequence[float]]],
) -> Registry:
    """Write the registry with more adapters and their vectors: the vectors first, then the registry, so that a kill leaves the old one.

    Args:
        registry: as it is so far.
        new: records and vectors [d]. A record without a `vector` gets a file named by the adapter and the vector's content
            (`vectors/ct-1a2b3c4d.npy`), so that registries in one folder leave each other's vectors alone.
    Raises:
        ValueError: a name that is taken or cannot be the name of a file, an adapter's folder that is no adapter, a vector that does not
            fit the others or would be written outside the registry's folder. Nothing is changed then.
    """
    path, place = Path(path), registry_root(path, registry)
    size = len(read_vectors(path, registry)[0]) if registry.adapters else 0
    rows: dict[str, np.ndarray] = {}
    records = [*registry.adapters]
    for record, vector in new:
        files.check_name(record.name, f"{path}: the adapter")
        row = _unit(vector, f"{path}: {record.name}: the vector")
        size = size or len(row)
        if len(row) != size:
            raise ValueError(f"{path}: {record.name} has a vector of {len(row)} numbers, the others {size}")
        if not (place / record.path / "adapter_config.json").is_file():
            raise ValueError(f"{path}: {record.name}: {place / record.path} holds no adapter_config.json")
        if not record.vector:
            record = evolve(
                record, vector=f"vectors/{record.name}-{hashlib.sha256(row.tobytes()).hexdigest()[:8]}.npy"
            )
        if Path(record.vector).is_absolute() or ".." in Path(record.vector).parts:
            raise ValueError(
                f"{path}: {record.name}: its vector must lie in the registry's root, got {record.vector!r}"
            )
        rows[record.vector] = row
        records.append(record)
    try:
        made = evolve(registry, adapters=tuple(records))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    for file, row in rows.items():
        files.write_array(place / file, row)
    write_registry(path, made)
    return made


def _unit(vector: Tensor | np.ndarray | Sequence[float], where: str) -> np.ndarray:
    """The vector as float32 [d] of length 1; one kept as a single row [1, d] is read too."""
    row = np.atleast_1d(np.asarray(vector))
    if row.dtype.kind not in "fiu" or not row.size or row.size != row.shape[-1] or row.size > _LONGEST:
        raise ValueError(
            f"{where} must hold one vector [d] of at most {_LONGEST:,} numbers, got {row.dtype} {list(row.shape)}"
        )
    wide = row.astype(np.float64).reshape(-1)
    length = np.linalg.norm(wide)
    if not (np.isfinite(length) and length > 0):
        raise ValueError(
            f"{where} must hold one finite vector [d] that is not zero, got {row.dtype} {list(row.shape)} of length {length:g}"
        )
    return (wide / length).astype(np.float32)


def write_registry(path: files.PathLike, registry: Registry) -> None:
    """Write it as TOML, or as JSON where the name ends in .json; whole or not at all."""
    if Path(path).suffix == ".json":
        files.write_text(path, json.dumps(config.unstructure(registry), indent=1, ensure_ascii=False) + "\n")
        return
    head = {"base": registry.base, "embedder": registry.embedder, "root": registry.root}
    lines = [f"{k} = {_toml(v)}\n" for k, v in head.items() if v]
    for r in registry.adapters:
        given = {k: v for k, v in asdict(r).items() if v not in ("", 0)}
        lines += ["\n[[adapters]]\n", *(f"{k} = {_toml(v)}\n" for k, v in given.items())]
    files.write_text(path, "".join(lines).lstrip("\n"))


def _toml(value: str | int) -> str:
    """TOML wants what JSON wants, but no pairs of surrogates, and DEL escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _ours(raw: Any) -> Any:
    """A record of LoraRetriever's list in our names."""
    names = {"lora_name": "name", "lora_path": "path", "embedding_path": "vector"}
    return {names.get(k, k): v for k, v in raw.items()} if isinstance(raw, dict) else raw
