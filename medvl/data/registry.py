"""A registry of adapters: which there are, for which base model, and the vector that says what each is for."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict, evolve, frozen
from torch import Tensor

from medvl import config, files


@frozen(kw_only=True)
class Record:
    """One adapter. Paths are relative to the registry's file."""

    name: str
    path: str  # folder in peft's format
    vector: str  # .npy [d], the mean of sample embeddings; raw sums of unit vectors are read too
    description: str = ""
    category: str = ""
    samples: int = 0  # how many samples the vector is the mean of, 0 = not known
    embedder: str = ""  # what embedded them, "" = not known


@frozen(kw_only=True)
class Registry:
    """What a registry's file says."""

    adapters: tuple[Record, ...] = ()
    base: str = ""  # the model all were trained on (a folder relative to this file, or a hub name), "" = as their adapter_config.json say
    embedder: str = ""  # folder of what made the vectors (`embed.read_embedder`), "" = only the vectors are there

    def __attrs_post_init__(self) -> None:
        names = [r.name for r in self.adapters]
        if twice := sorted((n, k) for n, k in Counter(names).items() if k > 1):
            raise ValueError(f"the name {twice[0][0]!r} is there {twice[0][1]} times; names must differ")
        if bad := [n for n in names if not n.strip()]:
            raise ValueError(f"every adapter needs a name, got {bad[0]!r}")


def read_registry(path: files.PathLike) -> Registry:
    """The registry in a `.toml` or `.json` file, of our own records or of LoraRetriever's (a list of {lora_name, lora_path, embedding_path,
    description}).

    Raises:
        ConfigError: unreadable, an unknown key, a wrong type, a name that is there twice; names the file and the place.
    """
    path = Path(path)
    if path.suffix == ".json":
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise config.ConfigError(f"{path}: cannot be read as JSON ({e})") from e
        return config.structure({"adapters": [_ours(r) for r in raw]} if isinstance(raw, list) else raw, Registry, str(path))
    return config.load(path, Registry)


def vectors(path: files.PathLike, registry: Registry) -> Tensor:
    """The adapters' vectors, float32 [p, d], each of length 1.

    Only means are kept in these files; a mean of few samples may still tell about them.
    Raises:
        ValueError: a file that is missing or no vector, vectors of different sizes or embedders, one that is zero or not finite.
    """
    rows: list[np.ndarray] = []
    for r in registry.adapters:
        file = Path(path).parent / r.vector
        try:
            row = np.load(file, allow_pickle=False)
        except FileNotFoundError as e:
            raise ValueError(f"{path}: {r.name}: {file} is not there") from e
        except (ValueError, OSError, EOFError) as e:
            raise ValueError(f"{path}: {r.name}: {file} is not a .npy of numbers ({e})") from e
        row = row.reshape(-1) if row.ndim == 2 and len(row) == 1 else row
        if row.ndim != 1 or row.dtype.kind not in "fiu" or not np.isfinite(row).all() or not np.abs(row).max(initial=0) > 0:
            raise ValueError(
                f"{path}: {r.name}: {file} must hold one finite vector [d] that is not zero, got {row.dtype} {list(row.shape)}"
            )
        if rows and len(row) != len(rows[0]):
            raise ValueError(f"{path}: {r.name} has {len(row)} numbers, {registry.adapters[0].name} {len(rows[0])}; one embedder made all?")
        rows.append(row.astype(np.float32) / np.linalg.norm(row.astype(np.float64)).astype(np.float32))
    made = sorted({r.embedder for r in registry.adapters} - {""})
    if len(made) > 1:
        raise ValueError(f"{path}: vectors of different embedders cannot be compared, got {', '.join(made)}")
    if not rows:
        raise ValueError(f"{path}: the registry has no adapter; `invoke adapters add` adds one")
    return torch.from_numpy(np.stack(rows))


def check(path: files.PathLike, registry: Registry) -> None:
    """See that every adapter's folder and vector are there, and that all are of one base model.

    Raises:
        ValueError: what is missing or differs, with the adapter's name.
    """
    vectors(path, registry)
    bases = {r.name: _base(path, r) for r in registry.adapters}
    if not registry.base and len({*bases.values()} - {""}) > 1:
        raise ValueError(f"{path}: adapters of different models: " + ", ".join(f"{n} of {b}" for n, b in bases.items()))
    if wrong := [n for n, b in bases.items() if registry.base and b and b != registry.base]:
        raise ValueError(f"{path}: {wrong[0]} was trained on {bases[wrong[0]]}, the registry is of {registry.base}")


def base_of(path: files.PathLike, registry: Registry) -> str:
    """The base model: a folder, or a name on the hub; "" where nothing says it."""
    name = registry.base or next((b for r in registry.adapters if (b := _base(path, r))), "")
    return str(Path(path).parent / name) if name and (Path(path).parent / name).is_dir() else name


def _base(path: files.PathLike, record: Record) -> str:
    file = Path(path).parent / record.path / "adapter_config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: {record.name}: {file} cannot be read ({e})") from e


def add(path: files.PathLike, record: Record, vector: Tensor | np.ndarray | Sequence[float]) -> Registry:
    """The registry with one adapter more, its vector written beside it; the file is made if it is not there.

    Raises:
        ValueError: the name is taken, the adapter's folder is no adapter, or the vector does not fit the others. Nothing is changed then.
    """
    path = Path(path)
    old = read_registry(path) if path.exists() else Registry()
    row = np.asarray(vector, dtype=np.float32).reshape(-1)
    if not np.isfinite(row).all() or not np.abs(row).max(initial=0) > 0:
        raise ValueError(f"{path}: {record.name}: the vector must be finite and not zero, got {row.shape}")
    size = len(vectors(path, old)[0]) if old.adapters else len(row)
    if len(row) != size:
        raise ValueError(f"{path}: {record.name} has a vector of {len(row)} numbers, the others {size}")
    try:
        new = evolve(old, adapters=(*old.adapters, record))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    if not (path.parent / record.path / "adapter_config.json").is_file():
        raise ValueError(f"{path}: {record.name}: {path.parent / record.path} holds no adapter_config.json")
    files.write_array(path.parent / record.vector, row / np.linalg.norm(row))
    write_registry(path, new)
    return new


def write_registry(path: files.PathLike, registry: Registry) -> None:
    """Write it as TOML, or as JSON where the name ends in .json; whole or not at all."""
    if Path(path).suffix == ".json":
        files.write_text(path, json.dumps(config.unstructure(registry), indent=1, ensure_ascii=False) + "\n")
        return
    head = {"base": registry.base, "embedder": registry.embedder}
    lines = [f"{k} = {json.dumps(v)}\n" for k, v in head.items() if v]
    for r in registry.adapters:
        given = {k: v for k, v in asdict(r).items() if v not in ("", 0)}
        lines += ["\n[[adapters]]\n", *(f"{k} = {json.dumps(v)}\n" for k, v in given.items())]
    files.write_text(path, "".join(lines).lstrip("\n"))


def _ours(raw: Any) -> Any:
    """A record of LoraRetriever's list in our names."""
    names = {"lora_name": "name", "lora_path": "path", "embedding_path": "vector"}
    return {names.get(k, k): v for k, v in raw.items()} if isinstance(raw, dict) else raw
