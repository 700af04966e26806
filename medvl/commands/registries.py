"""`invoke adapters`: a registry of adapters built from folders, added to, listed, and one of it shown."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from attrs import asdict

from medvl.adapters import build, embed, registry
from medvl.adapters.embed import EmbedConfig
from medvl.adapters.registry import AdapterRecord
from medvl.base import config, files
from medvl.base.display import track
from medvl.evaluation import results
from medvl.hub.checkpoints import find_file, read_json
from medvl.hub.peft_files import read_adapter
from medvl.language.conversations import Conversation, read_conversations, read_tasks, task_paths
from medvl.weights.lora import Adapter

_log = logging.getLogger("medvl")
ACTIONS = ("build", "add", "list", "show")


def manage_registry(
    action: str,
    registry_file: str,
    *,
    path: str = "",
    samples: str = "",
    name: str = "",
    vector: str = "",
    description: str = "",
    category: str = "",
    embedder: str = "",
    base: str = "",
    root: str = "",
    overrides: Sequence[str] = (),
) -> None:
    """Do what `action` says with a registry, and print the result.

    Args:
        path: of one adapter's folder; to build, with {task}, e.g. "adapters/{task}/v0-*/checkpoint-*".
        samples: conversations that an adapter was trained on; to build, a file for each {task}, or one whose
            lines say their task.
        vector: a .npy [d] instead of samples.
        base: hub name or folder of the model that all were trained on.
        root: where the registry's relative paths start, instead of what it says.
    Raises:
        ValueError: an unknown action, a missing or superfluous argument, and what the registry refuses.
    """
    file = Path(registry_file)
    if action not in ACTIONS:
        raise ValueError(f"adapters: the action must be one of {', '.join(ACTIONS)}, got {action!r}")
    if action in ("build", "add"):
        files.check_writable(file)
    if action == "build":
        _build(file, path, samples, embedder, base, overrides)
    elif action == "add":
        _add(file, root, path, samples, name, vector, description, category)
    if action == "show":
        print(_describe_adapter(file, root, name))
    else:
        print(_describe_registry(file, root, base))


def _build(
    file: Path, pattern: str, samples: str, embedder: str, base: str, overrides: Sequence[str]
) -> None:
    if file.exists():
        raise ValueError(f"adapters build: {file} is there; remove it, or add to it")
    if "{task}" not in pattern or not samples:
        raise ValueError(
            f"adapters build: needs path with {{task}} in it, e.g. 'adapters/{{task}}', and samples, got "
            f"{pattern!r}, {samples!r}"
        )
    folders = _adapter_folders(pattern)
    settings = config.override({"name": embedder, "kind": _kind(embedder)}, tuple(overrides), "build")
    cfg = config.structure(settings, EmbedConfig, "build")
    conversations = _samples_of_tasks(samples, list(folders))
    if base and Path(base).is_dir():
        base = os.path.relpath(base, file.parent)
    build.build_registry(
        file,
        {name: os.path.relpath(folder, file.parent) for name, folder in folders.items()},
        conversations,
        cfg,
        base=base,
        categories={name: build.category_of(name, conversations[name]) for name in folders},
    )


def _adapter_folders(pattern: str) -> dict[str, Path]:
    """{task: the folder of its adapter}; tasks without an adapter are left out with a warning."""
    folders_of_task = task_paths(pattern.rstrip("/"))
    adapters = {}
    for name, folders in folders_of_task.items():
        checkpoints = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
        if len(checkpoints) > 1:  # sorted by number
            _log.warning(
                "%s: %d folders match, the last one is taken: %s", name, len(checkpoints), checkpoints[-1]
            )
        if checkpoints:
            adapters[name] = checkpoints[-1]
    if not adapters:
        raise ValueError(f"adapters build: no folder {pattern} with an adapter_config.json")
    left_out = sorted(folders_of_task.keys() - adapters.keys())
    if left_out:
        _log.warning("adapters build: left out, there is no adapter_config.json: %s", ", ".join(left_out))
    return adapters


def _samples_of_tasks(samples: str, names: Sequence[str]) -> dict[str, list[Conversation]]:
    """{task: its conversations}, from a file for each {task}, or from one file whose lines say their task."""
    if "{task}" in samples:
        paths = {name: config.fill_pattern(samples, "adapters build: samples", task=name) for name in names}
        return {name: read_conversations(path) for name, path in paths.items()}
    conversations = read_tasks(samples, "")
    return {name: [c for c in conversations if c.extra["task"] == name] for name in names}


def _kind(embedder: str) -> str:
    """The kind of an encoder by its config: one with two towers, or of text alone."""
    if not embedder:
        return "local"
    two_towers = "vision_config" in read_json(find_file(embedder, ("config.json",)))
    return "image_text" if two_towers else "text"


def _add(
    file: Path, root: str, folder: str, samples: str, name: str, vector: str, description: str, category: str
) -> None:
    if not name or not folder or bool(samples) == bool(vector):
        raise ValueError(
            "adapters add: needs name, path (the adapter's folder), and either samples (JSONL) or vector "
            "(.npy)"
        )
    files.check_name(name, "adapters add: the adapter")
    known = registry.read_registry(file, root) if file.exists() else registry.Registry()
    if name in {adapter.name for adapter in known.adapters}:
        raise ValueError(f"adapters add: {file} has an adapter {name!r} already; give another name")
    place = registry.registry_root(file, known)
    if vector:
        mean, count, embedder_name = files.open_array(vector), 0, ""
    elif not known.embedder:
        raise ValueError(
            f"adapters add: {file} has no embedder, so samples cannot be embedded; give vector, or build "
            "the registry"
        )
    else:
        embedder = embed.read_embedder(place / known.embedder)
        conversations = read_conversations(samples)
        category = category or build.category_of(name, conversations)
        tensor, count = build.embed_samples(embedder, conversations)
        mean, embedder_name = tensor.numpy(), embedder.name
    record = AdapterRecord(
        name=name,
        path=os.path.relpath(folder, place),
        description=description,
        category=category,
        vector="",
        samples=count,
        embedder=embedder_name,
    )
    registry.add_adapter(file, record, mean, root)


def _describe_registry(file: Path, root: str, base: str) -> str:
    """A table of all adapters, below the names of base model and embedder."""
    known = registry.read_registry(file, root)
    registry.check_registry(file, known, base)
    place = registry.registry_root(file, known)
    rows = []
    for record in track(known.adapters, "reading adapters"):
        adapter = read_adapter(place / record.path)
        ranks = "/".join(str(rank) for rank in _ranks(adapter))
        num_layers = len(adapter.factors)
        rows.append((record.name, record.category, ranks, num_layers, record.samples, record.description))
    embedders = [record.embedder for record in known.adapters if record.embedder]
    embedder = embedders[0] if embedders else "an embedder that is not named"
    base = base or registry.base_model(file, known) or "not named"
    table = results.markdown_table(("Adapter", "Category", "Rank", "Layers", "Samples", "Description"), rows)
    return f"base model {base}, vectors by {embedder}\n{table}"


def _describe_adapter(file: Path, root: str, name: str) -> str:
    """What is known of one adapter, and the five most like it."""
    known = registry.read_registry(file, root)
    records = {record.name: record for record in known.adapters}
    if name not in records:
        raise ValueError(f"adapters show: no adapter {name!r} in {file}; there are {', '.join(records)}")
    adapter = read_adapter(registry.registry_root(file, known) / records[name].path)
    lines = [f"{key}: {value}" for key, value in asdict(records[name]).items() if value not in ("", 0)]
    numbers = sum(t.numel() for factors in adapter.factors.values() for t in factors.values())
    lines.append(f"layers: {len(adapter.factors)}, ranks {_ranks(adapter)}, {numbers:,} numbers")

    vectors = registry.read_vectors(file, known)
    cosines = vectors @ vectors[list(records).index(name)]
    others = [(n, float(cosine)) for n, cosine in zip(records, cosines, strict=True) if n != name]
    others.sort(key=lambda row: -row[1])
    return "\n".join(lines) + "\n\n" + results.markdown_table(("Most like it", "Cosine"), others[:5])


def _ranks(adapter: Adapter) -> list[int]:
    return sorted({adapter.rank(module) for module in adapter.factors})
