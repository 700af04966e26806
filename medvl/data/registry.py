"""A registry of adapters: which there are, for which base model, and the vector that says what each is for."""

import hashlib
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

_LONGEST = 2**20  # numbers of a vector; embeddings have thousands


@frozen(kw_only=True)
class Record:
    """One adapter. Paths are relative to the registry's file."""

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
            held = files.open_array(file)
        except ValueError as e:
            raise ValueError(f"{path}: {r.name}: {e}") from e
        row = _unit(held, f"{path}: {r.name}: {file}")
        if rows and len(row) != len(rows[0]):
            raise ValueError(f"{path}: {r.name} has {len(row)} numbers, {registry.adapters[0].name} {len(rows[0])}; one embedder made all?")
        rows.append(row)
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
        ValueError: as `extend`. Nothing is changed then.
    """
    old = read_registry(path) if Path(path).exists() else Registry()
    return extend(path, old, [(record, vector)])


def extend(path: files.PathLike, registry: Registry, new: Sequence[tuple[Record, Tensor | np.ndarray | Sequence[float]]]) -> Registry:
    """Write the registry with more adapters and their vectors: the vectors first, then the registry, so that a kill leaves the old one.

    Args:
        registry: as it is so far.
        new: records and vectors [d]. A record without a `vector` gets a file named by the adapter and the vector's content
            (`vectors/ct-1a2b3c4d.npy`), so that registries in one folder leave each other's vectors alone.
    Raises:
        ValueError: a name that is taken or cannot be the name of a file, an adapter's folder that is no adapter, a vector that does not
            fit the others or would be written outside the registry's folder. Nothing is changed then.
    """
    path = Path(path)
    size = len(vectors(path, registry)[0]) if registry.adapters else 0
    rows: dict[str, np.ndarray] = {}
    records = [*registry.adapters]
    for record, vector in new:
        files.check_name(record.name, f"{path}: the adapter")
        row = _unit(vector, f"{path}: {record.name}: the vector")
        size = size or len(row)
        if len(row) != size:
            raise ValueError(f"{path}: {record.name} has a vector of {len(row)} numbers, the others {size}")
        if not (path.parent / record.path / "adapter_config.json").is_file():
            raise ValueError(f"{path}: {record.name}: {path.parent / record.path} holds no adapter_config.json")
        if not record.vector:
            record = evolve(record, vector=f"vectors/{record.name}-{hashlib.sha256(row.tobytes()).hexdigest()[:8]}.npy")
        if not _inside(path.parent, record.vector):
            raise ValueError(f"{path}: {record.name}: its vector must lie in the registry's folder, got {record.vector!r}")
        rows[record.vector] = row
        records.append(record)
    try:
        made = evolve(registry, adapters=tuple(records))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    for file, row in rows.items():
        files.write_array(path.parent / file, row)
    write_registry(path, made)
    return made


def _unit(vector: Tensor | np.ndarray | Sequence[float], where: str) -> np.ndarray:
    """The vector as float32 [d] of length 1; one kept as a single row [1, d] is read too."""
    row = np.atleast_1d(np.asarray(vector))
    if row.dtype.kind not in "fiu" or not row.size or row.size != row.shape[-1] or row.size > _LONGEST:
        raise ValueError(f"{where} must hold one vector [d] of at most {_LONGEST:,} numbers, got {row.dtype} {list(row.shape)}")
    wide = row.astype(np.float64).reshape(-1)
    length = np.linalg.norm(wide)
    if not (np.isfinite(length) and length > 0):
        raise ValueError(
            f"{where} must hold one finite vector [d] that is not zero, got {row.dtype} {list(row.shape)} of length {length:g}"
        )
    return (wide / length).astype(np.float32)


def _inside(folder: Path, name: str) -> bool:
    """Whether a relative name leads to a file below the folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


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
