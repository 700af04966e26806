"""`invoke adapters`: a registry of adapters built from folders, added to, listed, and one of it shown."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from attrs import asdict

from medvl.adapters import build, embedders, registry
from medvl.adapters.embed_config import EmbedConfig
from medvl.adapters.registry import AdapterRecord
from medvl.base import config, files, processes
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
    # Embedding samples takes minutes: that the registry cannot be written must be known before it.
    if action in ("build", "add"):
        files.check_writable(file)
    if action == "build":
        _build(file, path, samples, embedder, base, overrides)
    elif action == "add":
        _add(file, root, path, samples, name, vector, description, category)
    # A registry that was just built or added to is listed, which also checks that it can be read.
    if action == "show":
        print(_describe_adapter(file, root, name))
    else:
        print(_describe_registry(file, root, base))


def _build(
    file: Path, pattern: str, samples: str, embedder: str, base: str, overrides: Sequence[str]
) -> None:
    if file.exists():
        raise ValueError(f"adapters build: {file} exists; remove it, or add to it")
    if "{task}" not in pattern or not samples:
        raise ValueError(
            f"adapters build: needs path with {{task}} in it, e.g. 'adapters/{{task}}', and samples, got "
            f"{pattern!r}, {samples!r}"
        )
    folders = _adapter_folders(pattern)
    # --set comes last, so that it can also name another kind.
    settings = config.override({"name": embedder, "kind": _kind(embedder)}, tuple(overrides), "build")
    cfg = config.structure(settings, EmbedConfig, "build")
    conversations = _samples_of_tasks(samples, list(folders))
    # Paths from the registry's folder, so that it can be moved together with its adapters. A base that is no
    # folder here is a name of the hub.
    if base and Path(base).is_dir():
        base = os.path.relpath(base, file.parent)
    paths = {}
    categories = {}
    for name, folder in folders.items():
        paths[name] = os.path.relpath(folder, file.parent)
        categories[name] = build.category_of(name, conversations[name])
    device = processes.choose_device()
    build.build_registry(file, paths, conversations, cfg, base=base, categories=categories, device=device)


def _adapter_folders(pattern: str) -> dict[str, Path]:
    """{task: the folder of its adapter}; tasks without an adapter are left out with a warning."""
    folders_of_task = task_paths(pattern.rstrip("/"))
    adapters = {}
    for name, folders in folders_of_task.items():
        # A checkpoint that was being written when its training was killed lacks this file.
        checkpoints = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
        # They are sorted by the numbers in their names: the last one was trained longest.
        if len(checkpoints) > 1:
            _log.warning(
                "%s: %d folders match, the last one is used: %s", name, len(checkpoints), checkpoints[-1]
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
    samples_of_task: dict[str, list[Conversation]] = {name: [] for name in names}
    if "{task}" in samples:
        for name in names:
            path = config.fill_pattern(samples, "adapters build: samples", task=name)
            samples_of_task[name] = read_conversations(path)
        return samples_of_task
    for conversation in read_tasks(samples, ""):
        # The file may hold tasks that have no adapter.
        if conversation.extra["task"] in samples_of_task:
            samples_of_task[conversation.extra["task"]].append(conversation)
    return samples_of_task


def _kind(embedder: str) -> str:
    """The kind of an encoder by its config: one with two towers, or of text alone."""
    if not embedder:
        return "local"
    # Hugging Face's configs of image-text models hold one for each tower; a text encoder's has no such table.
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
    contents = registry.Registry()
    if file.exists():
        contents = registry.read_registry(file, root)
    if name in {adapter.name for adapter in contents.adapters}:
        raise ValueError(f"adapters add: {file} has an adapter {name!r} already; give another name")
    # The registry may say that its paths start elsewhere than in its own folder.
    root_folder = registry.registry_root(file, contents)
    # A vector is taken as it is: nobody can tell which embedder and how many samples it is of.
    if vector:
        mean, count, embedder_name = files.open_array(vector), 0, ""
    # Samples must be embedded as those of the other adapters were, or the distances would mean nothing.
    elif not contents.embedder:
        raise ValueError(
            f"adapters add: {file} has no embedder, so samples cannot be embedded; give vector, or build "
            "the registry"
        )
    else:
        embedder = embedders.read_embedder(root_folder / contents.embedder, device=processes.choose_device())
        conversations = read_conversations(samples)
        category = category or build.category_of(name, conversations)
        tensor, count = build.embed_samples(embedder, conversations)
        mean, embedder_name = tensor.numpy(), embedder.name
    record = AdapterRecord(
        name=name,
        path=os.path.relpath(folder, root_folder),
        description=description,
        category=category,
        vector="",
        samples=count,
        embedder=embedder_name,
    )
    registry.add_adapter(file, record, mean, root)


def _describe_registry(file: Path, root: str, base: str) -> str:
    """A table of all adapters, below the names of base model and embedder."""
    contents = registry.read_registry(file, root)
    registry.check_registry(file, contents, base)
    root_folder = registry.registry_root(file, contents)
    rows = []
    for record in track(contents.adapters, "reading adapters"):
        adapter = read_adapter(root_folder / record.path)
        # PEFT's rank_pattern gives layers ranks of their own: "8/16".
        ranks = "/".join(str(rank) for rank in _ranks(adapter))
        num_layers = len(adapter.factors)
        rows.append((record.name, record.category, ranks, num_layers, record.samples, record.description))
    # `check_registry` has seen that all that are named are the same.
    embedders = [record.embedder for record in contents.adapters if record.embedder]
    embedder = embedders[0] if embedders else "an embedder that is not named"
    base = base or registry.base_model(file, contents) or "not named"
    table = results.markdown_table(("Adapter", "Category", "Rank", "Layers", "Samples", "Description"), rows)
    return f"base model {base}, vectors by {embedder}\n{table}"


def _describe_adapter(file: Path, root: str, name: str) -> str:
    """What is known of one adapter, and the five most like it."""
    contents = registry.read_registry(file, root)
    records = {record.name: record for record in contents.adapters}
    if name not in records:
        raise ValueError(f"adapters show: no adapter {name!r} in {file}; there are {', '.join(records)}")
    adapter = read_adapter(registry.registry_root(file, contents) / records[name].path)
    lines = []
    for key, value in asdict(records[name]).items():
        # Empty fields were never set: they say nothing.
        if value not in ("", 0):
            lines.append(f"{key}: {value}")
    num_values = 0
    for factors in adapter.factors.values():
        num_values += sum(tensor.numel() for tensor in factors.values())
    lines.append(f"layers: {len(adapter.factors)}, ranks {_ranks(adapter)}, {num_values:,} numbers")

    # Rows are L2-normalised and in the order of the registry: the product is the cosine.
    vectors = registry.read_vectors(file, contents)
    cosines = vectors @ vectors[list(records).index(name)]
    neighbours = [(n, float(cosine)) for n, cosine in zip(records, cosines, strict=True) if n != name]
    neighbours.sort(key=lambda row: -row[1])
    return "\n".join(lines) + "\n\n" + results.markdown_table(("Most like it", "Cosine"), neighbours[:5])


def _ranks(adapter: Adapter) -> list[int]:
    return sorted({adapter.rank(module) for module in adapter.factors})
