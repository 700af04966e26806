"""A model and its experts: adapters of a registry, found by their likeness to a question and its images, mixed per sample, and asked."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from attrs import evolve, field, frozen
from torch import Generator, Tensor

from medvl.adapters import cache, embed, registry, retrieve
from medvl.adapters.embed import Embedder
from medvl.adapters.retrieve import RetrieveConfig, Retrieved
from medvl.base import config, files
from medvl.hub.peft_files import read_adapter
from medvl.language import chat, vlm
from medvl.language.chat import Chat, ChatConfig, Encoded, ModelConfig
from medvl.weights import lora
from medvl.weights.compose import Rule

_log = logging.getLogger("medvl")
Mode = Literal["bare", "selection", "mixture", "fusion", "oracle"]
MODES: tuple[Mode, ...] = get_args(Mode)


@frozen(kw_only=True)
class FusionConfig:
    """How mode "fusion" makes one adapter of several; names as in `compose.compose_adapters`."""

    rule: Rule = "svd"
    rank: int = 0  # of "svd"; 0 = the largest of the adapters'
    density: float = 0.0  # of rules that prune
    seed: int = 0  # of rules that draw

    def __attrs_post_init__(self) -> None:
        config.check_bounds(
            self, "FusionConfig", rank=config.WIDTH_OR_NONE, density=config.SHARE, seed=config.SEED
        )


@frozen(kw_only=True)
class HoldConfig:
    """How much memory adapters may take (10^9 bytes); the least recently used go first."""

    host_gb: float = 16.0  # read from disk when they are needed
    device_gb: float = 4.0  # moved to a GPU when they are needed
    fused_gb: float = 2.0  # what mode "fusion" made

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "HoldConfig", host_gb=(0, 1e6), device_gb=(0, 1e6), fused_gb=(0, 1e6))


@frozen(kw_only=True, eq=False)
class Experts:
    """A base model, and the adapters of a registry as functions: they are read and moved when they are needed."""

    chat: Chat
    params: Mapping[str, Tensor] = field(repr=False)
    names: tuple[str, ...]
    categories: tuple[str, ...]
    vectors: Tensor = field(repr=False)  # float32 [p, d]
    embedder: Embedder | None = field(repr=False)  # None where the registry has only vectors
    pool: cache.Pools = field(repr=False)
    fuse: Callable[[Sequence[int], Sequence[float]], lora.Adapter] = field(repr=False)


@frozen(kw_only=True)
class Answer:
    """What was said, and who said it."""

    text: str
    adapters: tuple[
        tuple[str, float, float], ...
    ]  # (name, similarity, weight), the most similar first; none: the bare model


def load_experts(
    talks: Chat,
    params: Mapping[str, Tensor],
    path: files.PathLike,
    *,
    base: files.PathLike = "",
    root: files.PathLike = "",
    fusion: FusionConfig = FusionConfig(),
    hold: HoldConfig = HoldConfig(),
) -> Experts:
    """The experts of a registry for a model that is already there.

    Args:
        base: what the model is called; adapters that name another are a warning then.
        root: where the registry's relative paths start, instead of what it says.
    Raises:
        ValueError: as `registry.check_registry`; an adapter that does not fit the model says so when it is first used (`check_adapters`: at once).
    """
    held = registry.read_registry(path, root)
    folder = registry.registry_root(path, held)
    registry.check_registry(path, held, str(base))
    device = next(iter(params.values())).device

    def read(i: int) -> lora.Adapter:
        adapter = read_adapter(folder / held.adapters[i].path, talks.skeleton)
        return evolve(lora.without_copies(adapter, params), name=held.adapters[i].name)

    host = cache.cache_adapters(read, int(hold.host_gb * 1e9))
    near = (
        host
        if device.type == "cpu"
        else cache.cache_adapters(
            lambda i: lora.move_adapter(host([i])[0], device), int(hold.device_gb * 1e9)
        )
    )
    pool = cache.cache_pool(near)
    how = {"rank": fusion.rank or None, "density": fusion.density or None, "seed": fusion.seed}
    return Experts(
        chat=talks,
        params=params,
        names=tuple(r.name for r in held.adapters),
        categories=tuple(r.category for r in held.adapters),
        vectors=registry.read_vectors(path, held),
        embedder=embed.read_embedder(folder / held.embedder) if held.embedder else None,
        pool=pool,
        fuse=cache.cache_fusions(pool, int(hold.fused_gb * 1e9), rule=fusion.rule, **how),  # type: ignore[arg-type]
    )


def open_experts(
    path: files.PathLike,
    *,
    base: files.PathLike = "",
    root: files.PathLike = "",
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    quantize: Literal["none", "nf4", "fp4"] = "none",
    cfg: ChatConfig = ChatConfig(),
    fusion: FusionConfig = FusionConfig(),
    hold: HoldConfig = HoldConfig(),
    device: torch.device = torch.device("cpu"),
) -> Experts:
    """A registry and the model that its adapters were trained on.

    Args:
        base: hub name or folder of the model, if neither the registry nor its adapters say it (or it lies elsewhere now).
        root: where the registry's relative paths start, instead of what it says.
    Raises:
        ValueError: as `load_experts` and `loading.load_skeleton`; no base model named anywhere.
    """
    held = registry.read_registry(path, root)
    registry.check_registry(path, held, str(base))
    name = str(base) or registry.base_model(path, held)
    if not name:
        raise ValueError(f"{path}: neither it nor its adapters say which model they are for; give base")
    if held.embedder:
        embed.check_embedder(registry.registry_root(path, held) / held.embedder)
    model = ModelConfig(name=name, dtype=dtype, quantize=quantize)
    talks, params = chat.open_chat(model, cfg, chat.tokenizer_of(model, Path()), Generator(), device=device)
    return load_experts(talks, params, path, base=base, root=root, fusion=fusion, hold=hold)


def check_adapters(experts: Experts) -> None:
    """Read every adapter once and see that it fits the model.

    Raises:
        ValueError: the first that does not, with its name.
    """
    for i, name in enumerate(experts.names):
        try:
            experts.pool([i])
        except ValueError as e:
            raise ValueError(f"adapter {name!r}: {e}") from e


def embed_questions(experts: Experts, texts: Sequence[str], images: embed.Pictures) -> Tensor:
    """What adapters are found by: embeddings of questions with their images, float32 [b, d], nan where there is nothing to embed.

    The bare model answers what has no word that the embedder knows and no image that counts; a warning says of how many.

    Args:
        images: a sequence for each of the texts.
    Raises:
        ValueError: the registry has no embedder; an image that cannot be read; as `embed.embed_queries`.
    """
    if experts.embedder is None:
        raise ValueError(
            "the registry has vectors but no embedder, so a question has none; `invoke adapters build` fits one"
        )
    known = [*range(len(texts))]
    out = torch.full((len(texts), experts.vectors.shape[1]), torch.nan)
    try:
        vectors = embed.embed_queries(experts.embedder, texts, images)
    except embed.NothingToEmbed as e:
        known = [i for i in known if i not in e.rows]
        _log.warning(
            "%d of %d questions have no word that the embedder knows and no image: the bare model answers them",
            len(e.rows),
            len(texts),
        )
        if not known:
            return out
        vectors = embed.embed_queries(experts.embedder, [texts[i] for i in known], [images[i] for i in known])
    if vectors.shape[1] != out.shape[1]:
        raise ValueError(
            f"the registry's vectors have {out.shape[1]} numbers, those of its embedder {vectors.shape[1]}; build it again"
        )
    return out.index_copy(0, torch.tensor(known), vectors)


def choose_adapters(
    mode: Mode,
    cfg: RetrieveConfig,
    queries: Tensor,
    vectors: Tensor,
    *,
    own: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Retrieved:
    """Which adapters each query gets in a mode: none, the best, the cfg.k best with their weights, or its own.

    Args:
        queries: from `embed_questions`; a row of nan abstains.
        own: int64 [b], each row's own adapter, -1 where it has none (which then abstains): mode "oracle" takes it.
        exclude: as of `retrieve.retrieve_adapters`; it does not concern "oracle".
    Raises:
        ValueError: an unknown mode, "oracle" without `own`, and as `retrieve.retrieve_adapters`.
    """
    if mode not in MODES:
        raise ValueError(f"choose_adapters: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "oracle":
        if own is None or own.shape != queries.shape[:1] or bool((own >= len(vectors)).any()):
            raise ValueError(
                f"choose_adapters: mode oracle needs own [{len(queries)}] below {len(vectors)}, got {own}"
            )
        there = (own >= 0)[:, None]
        return Retrieved(
            indices=own[:, None].clamp(min=-1),
            similarity=torch.nan * torch.ones(len(own), 1),
            weights=there.float(),
            abstained=~there[:, 0],
        )
    k = {"bare": 0, "selection": 1}.get(mode, cfg.k)
    nothing = queries.isnan().any(1, keepdim=True)
    barred = nothing if exclude is None else nothing | exclude
    return retrieve.retrieve_adapters(
        evolve(cfg, k=k),
        queries.masked_fill(nothing, 1.0),
        vectors,
        exclude=barred.expand(len(queries), len(vectors)),
    )


def generate_answers(
    experts: Experts, data: Encoded, rows: Sequence[int], found: Retrieved, mode: Mode, max_tokens: int
) -> list[str]:
    """Greedy answers to the prompts `rows` of `data`, each with the adapters that were chosen for it.

    All modes but "fusion" run the whole batch in one pass, whatever mixtures its rows have; "fusion" runs a pass for each set of adapters
    and weights in it.
    Args:
        found: for these rows, in their order.
    Raises:
        ValueError: rows and `found` differ in number; as `generation.generate`.
    """
    if len(found.indices) != len(rows):
        raise ValueError(
            f"generate_answers: adapters must be chosen for each of {len(rows)} rows, got {len(found.indices)}"
        )
    if mode != "fusion":
        return _said(experts, data, rows, cache.mix_adapters(experts.pool, found), max_tokens)
    said = [""] * len(rows)
    for places, ids, weights in cache.group_rows(found):
        fused = experts.fuse(ids, weights) if ids else None
        for place, text in zip(
            places, _said(experts, data, [rows[i] for i in places], fused, max_tokens), strict=True
        ):
            said[place] = text
    return said


def check_mode(mode: str, own: str, names: Sequence[str]) -> None:
    """Raise where a question cannot be asked in this mode of adapters of these names."""
    there = ", ".join(names)
    if mode not in MODES:
        raise ValueError(f"ask: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if own and own not in names:
        raise ValueError(f"ask: no adapter {own!r}; there are {there}")
    if mode == "oracle" and not own:
        raise ValueError(f"ask: mode oracle needs the name of an adapter; there are {there}")


def ask_experts(
    experts: Experts,
    question: str,
    images: Sequence[files.PathLike] = (),
    *,
    mode: Mode = "mixture",
    cfg: RetrieveConfig = RetrieveConfig(),
    own: str = "",
    max_tokens: int = 256,
) -> Answer:
    """Ask about some images (or none); for research, not for diagnosis.

    Args:
        own: name of the adapter that mode "oracle" takes.
    Raises:
        ValueError: the registry has no embedder, an unknown `own`, an image that cannot be read, and as `generate_answers`.
    """
    check_mode(mode, own, experts.names)
    talk, blind = chat.make_question(experts.chat, question, images), mode in ("bare", "oracle")
    query = (
        torch.ones(1, experts.vectors.shape[1])
        if blind
        else embed_questions(experts, [question], [talk.images])
    )
    found = choose_adapters(
        mode, cfg, query, experts.vectors, own=torch.tensor([experts.names.index(own) if own else -1])
    )
    (text,) = generate_answers(
        experts, chat.encode_conversations(experts.chat, [talk], prompt=True), [0], found, mode, max_tokens
    )
    named = zip(
        found.indices[0].tolist(), found.similarity[0].tolist(), found.weights[0].tolist(), strict=True
    )
    return Answer(text=text, adapters=tuple((experts.names[i], s, w) for i, s, w in named if i >= 0))


def _said(
    experts: Experts, data: Encoded, rows: Sequence[int], adapter: lora.Adapter | None, max_tokens: int
) -> list[str]:
    batch = chat.make_batch(experts.chat, data, rows, side="left")
    weights = experts.params
    if adapter is not None:
        token = experts.chat.skeleton.config.get("image_token_id")
        device = next(iter(weights.values())).device
        whose = None if token is None else vlm.visual_rows(batch["ids"], token).to(device)
        weights = lora.apply_lora(weights, adapter, rows=whose)
    sampling = chat.sampling_of(experts.chat, max_tokens)
    return list(chat.generate_answers(experts.chat, weights, batch, sampling).texts)
