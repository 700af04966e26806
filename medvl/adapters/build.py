"""A registry made from adapters and samples of what each was trained on."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator

from medvl.adapters import embed, embedders, head, registry, retrieve
from medvl.adapters.embed_config import EmbedConfig
from medvl.adapters.embedders import Embedder
from medvl.adapters.registry import AdapterRecord, Registry
from medvl.adapters.retriever_config import RetrieverConfig
from medvl.base import config, files
from medvl.language.conversations import Conversation

_log = logging.getLogger("medvl")


def build_registry(
    path: Path,
    paths: Mapping[str, str],
    samples: Mapping[str, Sequence[Conversation]],
    cfg: EmbedConfig,
    *,
    base: str = "",
    categories: Mapping[str, str] | None = None,
    num_samples: int = 20,
    retriever: RetrieverConfig = RetrieverConfig(kind="none"),
    seed: int = 0,
    device: str | torch.device = "cpu",
    log: Callable[[str], None] = print,
) -> Path:
    """Write the registry of adapters: the vector of each is the mean embedding of some samples of what it was
    trained on.

    Args:
        path: of the registry's file to write.
        paths: {adapter: its folder, relative to the registry's}.
        samples: {adapter: conversations of its training split}.
        cfg: the embedder; "local" is fitted on these samples, anything else is opened.
        base: hub name or folder of the model that all adapters were trained on.
        categories: {adapter: its group of similar adapters}.
        num_samples: so many of an adapter's samples, drawn at random, are embedded.
        retriever: the map on the embeddings that brings samples of one adapter together.
        device: where an encoder embeds the samples.
    Raises:
        ValueError: an adapter without samples, or none at all; as `registry.add_adapters`.
    """
    _check_adapters(path, list(paths), samples)
    # A seed for each adapter, so that lists of one length are not all drawn at the same places.
    chosen = {name: draw_samples(samples[name], num_samples, seed + i) for i, name in enumerate(paths)}
    texts, images, names = [], [], []  # one of each for every sample
    for name, conversations in chosen.items():
        for conversation in conversations:
            text, pictures = query_of(conversation)
            texts.append(text)
            images.append(pictures)
            names.append(name)

    embedder, vectors = _embed_chosen(cfg, retriever, texts, images, names, device)
    # Before the registry, which must never name an embedder that is not there.
    folder = _save_embedder(embedder, path.parent)
    records = []
    for name, adapter_folder in paths.items():
        rows = [i for i, row_name in enumerate(names) if row_name == name]
        vector = retrieve.adapter_vector(vectors[rows])
        record = AdapterRecord(
            name=name,
            path=adapter_folder,
            # `add_adapters` names the file by what is in it.
            vector="",
            category=(categories or {}).get(name, ""),
            samples=len(chosen[name]),
            embedder=embedder.name,
        )
        records.append((record, vector))
    registry.add_adapters(path, Registry(base=base, embedder=folder), records)
    log(f"registry of {len(paths)} adapters: {path}; vectors by {embedder.name}")
    return path


def _check_adapters(path: Path, names: Sequence[str], samples: Mapping[str, Sequence[Conversation]]) -> None:
    missing = [name for name in names if not samples.get(name)]
    if missing:
        raise ValueError(
            f"{path}: no samples for {', '.join(missing)}; every adapter needs some of what it was trained on"
        )
    # A name becomes part of a file's name; a wrong one is refused before anything is embedded.
    for name in names:
        files.check_name(name, f"{path}: the adapter")


def _embed_chosen(
    cfg: EmbedConfig,
    retriever: RetrieverConfig,
    texts: Sequence[str],
    images: Sequence[tuple[Path, ...]],
    names: Sequence[str],
    device: str | torch.device,
) -> tuple[Embedder, torch.Tensor]:
    """The embedder, with its trained head where there is one, and the vectors [n, d] of the samples."""
    # Fitted on the samples of all adapters, so that their vectors lie in one space.
    if cfg.kind == "local":
        embedder = embedders.fit_local(cfg, texts, images)
    else:
        embedder = embedders.open_embedder(cfg, device=device)
    vectors = embed.embed_queries(embedder, texts, images)
    trained_head = head.head_of(retriever, vectors, names)
    if trained_head is not None:
        embedder = embedders.with_head(embedder, trained_head)
        # Questions will come through the head, so the adapters' vectors must, too.
        vectors = embed.embed_queries(embedder, texts, images)
    return embedder, vectors


def _save_embedder(embedder: Embedder, parent: Path) -> str:
    """Write the embedder into a folder below `parent`, if it is not there yet; returns the folder's name."""
    # Named by its content: one that a killed run has left is found again, and that of another registry stays.
    name = f"embedder-{config.record_digest(embedder.name)}"
    if not (parent / name).exists():
        embedders.save_embedder(embedder, parent / name)
    return name


def embed_samples(
    embedder: Embedder, samples: Sequence[Conversation], num_samples: int = 20, seed: int = 0
) -> tuple[torch.Tensor, int]:
    """(vector [d] of an adapter that was trained on these samples, how many were embedded)."""
    chosen = draw_samples(samples, num_samples, seed)
    texts, images = [], []
    for conversation in chosen:
        text, pictures = query_of(conversation)
        texts.append(text)
        images.append(pictures)
    vectors = embed.embed_queries(embedder, texts, images)
    return retrieve.adapter_vector(vectors), len(chosen)


def draw_samples(samples: Sequence[Conversation], num_samples: int, seed: int) -> list[Conversation]:
    """So many of the samples at random, in their order; all of them where there are no more."""
    gen = Generator().manual_seed(seed)
    chosen = torch.randperm(len(samples), generator=gen)[:num_samples]
    # Sorted, so that the order of the drawing does not show in what is embedded.
    return [samples[i] for i in sorted(chosen.tolist())]


def query_of(conversation: Conversation) -> tuple[str, tuple[Path, ...]]:
    """What is embedded of a conversation: the user's first text, and its images."""
    first = next(message["content"] for message in conversation.messages if message["role"] == "user")
    # Images of later turns belong to other questions.
    images = conversation.images[: first.count("<image>")]
    return first, images


def category_of(name: str, samples: Sequence[Conversation], key: str = "category") -> str:
    """The category that an adapter's samples say, the commonest of them; "" where none says any."""
    counts = Counter(str(sample.extra[key]) for sample in samples if sample.extra.get(key))
    if not counts:
        return ""
    commonest, _ = counts.most_common(1)[0]
    if len(counts) > 1:
        _log.warning(
            "%s: its samples have %d categories, the most common one is used: %s",
            name,
            len(counts),
            commonest,
        )
    return commonest
