"""A model and its experts: the adapters of a registry, found for a question, mixed per sample, and asked."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from attrs import evolve, field, frozen
from torch import Generator, Tensor

from medvl.adapters import cache, embed, embedders, registry, retrieve
from medvl.adapters.embedders import Embedder
from medvl.adapters.queries import Pictures
from medvl.adapters.retrieve import RetrieveConfig, Retrieved
from medvl.base import config, files
from medvl.hub.peft_files import read_adapter
from medvl.hub.skeletons import Skeleton
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
    """A base model, and the adapters of a registry as functions: they are read and moved when they are
    needed.
    """

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
    """An answer, and the adapters that gave it."""

    text: str
    # (name, similarity, weight), the most similar first; none: the bare model.
    adapters: tuple[tuple[str, float, float], ...]


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
    """The experts of a registry for a model that is already open; its embedder runs on the model's device.

    Args:
        base: name of the model; adapters that name another are a warning then.
        root: where the registry's relative paths start, instead of what it says.
    Raises:
        ValueError: as `registry.check_registry`. An adapter that does not fit the model raises when it is
            first used; `check_adapters` tries all of them at once.
    """
    listed = registry.read_registry(path, root)
    folder = registry.registry_root(path, listed)
    registry.check_registry(path, listed, str(base))
    pool = _open_pool(listed, folder, talks.skeleton, params, hold)
    vectors = registry.read_vectors(path, listed)
    embedder = None
    if listed.embedder:
        device = next(iter(params.values())).device  # of the model
        embedder = embedders.read_embedder(folder / listed.embedder, device=device)
    fuse = cache.cache_fusions(
        pool,
        int(hold.fused_gb * 1e9),
        rule=fusion.rule,
        # 0 stands for None in a record, since TOML has no null.
        rank=fusion.rank or None,
        density=fusion.density or None,
        seed=fusion.seed,
    )
    return Experts(
        chat=talks,
        params=params,
        names=tuple(record.name for record in listed.adapters),
        categories=tuple(record.category for record in listed.adapters),
        vectors=vectors,
        embedder=embedder,
        pool=pool,
        fuse=fuse,
    )


def _open_pool(
    listed: registry.Registry,
    folder: Path,
    skeleton: Skeleton,
    params: Mapping[str, Tensor],
    hold: HoldConfig,
) -> cache.Pools:
    """The adapters of a registry by their ids, read when they are needed and held within budgets.

    Two levels: read from disk to memory, moved from memory to the device of the weights.
    """
    device = next(iter(params.values())).device

    def read(i: int) -> lora.Adapter:
        record = listed.adapters[i]
        # Tables that peft saved untouched beside an adapter would keep it from being mixed with others.
        adapter = lora.without_copies(read_adapter(folder / record.path, skeleton), params)
        return evolve(adapter, name=record.name)

    on_host = cache.cache_adapters(read, int(hold.host_gb * 1e9))
    # On the CPU a second level would only count the same memory twice.
    if device.type == "cpu":
        return cache.cache_pool(on_host)

    def move(i: int) -> lora.Adapter:
        return lora.move_adapter(on_host([i])[0], device)

    return cache.cache_pool(cache.cache_adapters(move, int(hold.device_gb * 1e9)))


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
        base: hub name or folder of the model, if neither the registry nor its adapters say it (or it lies
            elsewhere now).
        root: where the registry's relative paths start, instead of what it says.
    Raises:
        ValueError: as `load_experts` and `loading.load_skeleton`; no base model named anywhere.
    """
    listed = registry.read_registry(path, root)
    registry.check_registry(path, listed, str(base))
    name = str(base) or registry.base_model(path, listed)
    if not name:
        raise ValueError(f"{path}: neither it nor its adapters say which model they are for; give base")
    # Before the model is read, which takes minutes.
    if listed.embedder:
        embedders.check_embedder(registry.registry_root(path, listed) / listed.embedder)
    model = ModelConfig(name=name, dtype=dtype, quantize=quantize)
    talks, params = chat.open_chat(model, cfg, chat.tokenizer_of(model, Path()), Generator(), device=device)
    return load_experts(talks, params, path, base=base, root=root, fusion=fusion, hold=hold)


def check_adapters(experts: Experts) -> None:
    """Read every adapter once and see that it fits the model.

    Raises:
        ValueError: the first that does not, with its name.
    """
    # One at a time: all together may be above the budget.
    for i, name in enumerate(experts.names):
        try:
            experts.pool([i])
        except ValueError as e:
            raise ValueError(f"adapter {name!r}: {e}") from e


def embed_questions(experts: Experts, texts: Sequence[str], images: Pictures) -> Tensor:
    """The vectors by which adapters are retrieved: embeddings of questions with their images, float32 [b, d].

    A row is nan where there is nothing to embed: no word that the embedder knows and no image that is used.
    The bare model answers such questions, and a warning counts them.

    Args:
        images: a sequence for each of the texts.
    Raises:
        ValueError: the registry has no embedder; an image that cannot be read; as `embed.embed_queries`.
    """
    if experts.embedder is None:
        raise ValueError(
            "the registry has vectors but no embedder, so a question has none; `invoke adapters build` "
            "fits one"
        )
    rows = list(range(len(texts)))  # that can be embedded
    # nan marks rows without a vector; `choose_adapters` makes them abstain.
    queries = torch.full((len(texts), experts.vectors.shape[1]), torch.nan)
    try:
        vectors = embed.embed_queries(experts.embedder, texts, images)
    # Which rows have nothing shows only when they are embedded; the exception names all of them at once.
    except embed.NothingToEmbed as e:
        rows = [row for row in rows if row not in e.rows]
        _log.warning(
            "%d of %d questions have no word that the embedder knows and no image: the bare model answers "
            "them",
            len(e.rows),
            len(texts),
        )
        if not rows:
            return queries
        some_texts = [texts[row] for row in rows]
        some_images = [images[row] for row in rows]
        vectors = embed.embed_queries(experts.embedder, some_texts, some_images)
    if vectors.shape[1] != queries.shape[1]:
        raise ValueError(
            f"the registry's vectors have {queries.shape[1]} numbers, those of its embedder "
            f"{vectors.shape[1]}; build it again"
        )
    return queries.index_copy(0, torch.tensor(rows), vectors)


def choose_adapters(
    mode: Mode,
    cfg: RetrieveConfig,
    queries: Tensor,
    vectors: Tensor,
    *,
    own: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Retrieved:
    """Which adapters each query gets in a mode: none, the best, the cfg.k best with their weights, or its
    own.

    Args:
        queries: from `embed_questions`; a row of nan abstains.
        own: int64 [b], each row's own adapter, -1 where it has none (which then abstains): mode "oracle"
            takes it.
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
        has_own = own >= 0
        return Retrieved(
            # Any negative number means none; -1 is how `Retrieved` marks an empty place.
            indices=own[:, None].clamp(min=-1),
            # Nothing was compared.
            similarity=torch.nan * torch.ones(len(own), 1),
            weights=has_own[:, None].float(),
            abstained=~has_own,
        )
    # k = 0 retrieves nothing, so all rows abstain and the bare model answers.
    k = {"bare": 0, "selection": 1}.get(mode, cfg.k)
    is_empty = queries.isnan().any(1, keepdim=True)
    # An empty row needs some vector to be compared; all adapters are excluded for it, so that it abstains.
    queries = queries.masked_fill(is_empty, 1.0)
    excluded = is_empty if exclude is None else is_empty | exclude
    return retrieve.retrieve_adapters(
        evolve(cfg, k=k), queries, vectors, exclude=excluded.expand(len(queries), len(vectors))
    )


def answer_prompts(
    experts: Experts, data: Encoded, rows: Sequence[int], chosen: Retrieved, mode: Mode, max_tokens: int
) -> list[str]:
    """Greedy answers to the prompts `rows` of `data`, each with the adapters that were chosen for it.

    All modes but "fusion" run the whole batch in one pass, whatever mixtures its rows have; "fusion" runs a
    pass for each set of adapters and weights in it.

    Args:
        chosen: from `choose_adapters`, for these rows in their order.
    Raises:
        ValueError: rows and `chosen` differ in number; as `generate.generate`.
    """
    if len(chosen.indices) != len(rows):
        raise ValueError(
            f"answer_prompts: adapters must be chosen for each of {len(rows)} rows, got {len(chosen.indices)}"
        )
    if mode != "fusion":
        # A row that abstained has gates of 0 in the mixture, so one pass serves all rows.
        mixture = cache.mix_adapters(experts.pool, chosen)
        return _answer_with(experts, data, rows, mixture, max_tokens)
    answers = [""] * len(rows)
    for places, ids, weights in cache.group_rows(chosen):
        fused = None
        if ids:
            fused = experts.fuse(ids, weights)
        texts = _answer_with(experts, data, [rows[place] for place in places], fused, max_tokens)
        for place, text in zip(places, texts, strict=True):
            answers[place] = text
    return answers


def check_mode(mode: str, own: str, names: Sequence[str]) -> None:
    """Raise where a question cannot be asked in this mode of adapters of these names."""
    choices = ", ".join(names)
    if mode not in MODES:
        raise ValueError(f"ask: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if own and own not in names:
        raise ValueError(f"ask: no adapter {own!r}; there are {choices}")
    if mode == "oracle" and not own:
        raise ValueError(f"ask: mode oracle needs the name of an adapter; there are {choices}")


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
        ValueError: the registry has no embedder, an unknown `own`, an image that cannot be read, and as
            `answer_prompts`.
    """
    check_mode(mode, own, experts.names)
    conversation = chat.make_question(experts.chat, question, images)
    if mode in ("bare", "oracle"):  # these need no vector, nor an embedder
        # Any vector that is not 0: its similarities are not used.
        query = torch.ones(1, experts.vectors.shape[1])
    else:
        query = embed_questions(experts, [question], [conversation.images])
    own_index = -1
    if own:
        own_index = experts.names.index(own)
    chosen = choose_adapters(mode, cfg, query, experts.vectors, own=torch.tensor([own_index]))
    prompts = chat.encode_conversations(experts.chat, [conversation], prompt=True)
    (text,) = answer_prompts(experts, prompts, [0], chosen, mode, max_tokens)
    adapters = []
    columns = (chosen.indices[0].tolist(), chosen.similarity[0].tolist(), chosen.weights[0].tolist())
    for i, similarity, weight in zip(*columns, strict=True):
        if i >= 0:
            adapters.append((experts.names[i], similarity, weight))
    return Answer(text=text, adapters=tuple(adapters))


def _answer_with(
    experts: Experts, data: Encoded, rows: Sequence[int], adapter: lora.Adapter | None, max_tokens: int
) -> list[str]:
    """Greedy answers of the model with one adapter, or of the bare model."""
    # Padded on the left, so that all rows go on generating from the last place.
    batch = chat.make_batch(experts.chat, data, rows, side="left")
    weights = experts.params
    if adapter is not None:
        sample_of_token = None  # which sample each visual token belongs to, for gates per sample
        image_token = experts.chat.skeleton.config.get("image_token_id")
        if image_token is not None:
            device = next(iter(weights.values())).device
            sample_of_token = vlm.visual_rows(batch["ids"], image_token).to(device)
        weights = lora.apply_lora(weights, adapter, rows=sample_of_token)
    sampling = chat.sampling_of(experts.chat, max_tokens)
    return list(chat.generate_answers(experts.chat, weights, batch, sampling).texts)
