"""Language models that are served: opened from a run, a model's folder or a registry, with adapters by name."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from attrs import define, evolve, field, frozen
from torch import Generator, Tensor

from medvl.adapters import cache, experts
from medvl.adapters.experts import Experts
from medvl.adapters.retrieve import RetrieveConfig
from medvl.base import files, processes
from medvl.base.tree import Tree
from medvl.language import chat, system
from medvl.language.chat import Chat, ChatConfig, ModelConfig
from medvl.language.conversations import Conversation
from medvl.serve.interface import Refused
from medvl.serve.settings import LANGUAGE_SYSTEMS
from medvl.systems import run
from medvl.weights import compose, lazy, lora

Mixture = tuple[tuple[str, float], ...]  # (adapter, weight)
Weights = Mapping[str, Tensor]
_SAMPLED = 4096  # values of a tensor that tell it from others
_MANY = 16  # adapters that lie side by side on the device, although no row may use some of them


@frozen(kw_only=True, eq=False)
class Served:
    """A language model and what its adapters make of it."""

    name: str  # as clients call it
    chat: Chat
    params: Tree = field(repr=False)  # of the system, where `Vision.embed` uses some
    max_tokens: int  # of an answer, where the request says nothing
    adapters: tuple[str, ...]  # by name
    default: Mixture  # what answers where a request names none
    weights: Callable[[Sequence[Mixture]], Weights]  # of a batch, a mixture for each of its rows
    choose: Callable[[Conversation], Mixture] | None = None  # as a registry chooses for a question


def open_served(place: str, registry: str = "") -> Served:
    """Open what is to be served.

    Args:
        place: folder of a run of tune, document or adapters; folder or hub name of a model; "" with a registry.
        registry: of adapters for the model, .toml or .json.
    Raises:
        ValueError: nothing of the kind; as the loading of a run, a model or a registry.
    """
    if registry:
        opened = experts.open_experts(registry, base=place, device=processes.choose_device("auto"))
        return _with_experts(opened, Path(registry).stem, RetrieveConfig())
    folder = Path(place)
    if (folder / "config.json").is_file() and (name := system_name(folder)):
        return _open_run(folder, name)
    model = ModelConfig(name=place)
    device = processes.choose_device("auto")
    opened_chat, weights = chat.open_chat(
        model, ChatConfig(), chat.tokenizer_of(model, Path()), Generator(), device=device
    )
    return _without_adapters(folder.name, opened_chat, {"model": weights}, weights)


def system_name(folder: Path) -> str:
    """The system that a run is of; "" where the folder is no run (a model's config.json names none)."""
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(record.get("system", "")) if isinstance(record, dict) else ""


def _open_run(folder: Path, name: str) -> Served:
    if name not in LANGUAGE_SYSTEMS:
        raise ValueError(f"{folder}: a run of {name} is no language model that answers conversations")
    found = run.find_system(name)
    with files.file_lock(folder, shared=True):  # not while it is trained
        model, params = found.load(folder)
    max_tokens = getattr(model.cfg.evaluate, "max_tokens", 256)
    if name == "adapters":
        from medvl.systems.adapters.record import gather

        return _with_experts(gather(model, params), folder.name, model.cfg.retrieve, max_tokens)
    base = system.model_weights(evolve(model, adapter=None), params)
    if model.adapter is None:
        return _without_adapters(folder.name, model.chat, params, base, max_tokens)
    adapter = evolve(model.adapter, factors=params["lora"], dropout=0.0, name=folder.name)
    if compose.stack_adapters([adapter]).alone:
        # It has a router or whole tensors and cannot be mixed with others or left out: it answers always.
        whole = lora.apply_lora(base, adapter)
        return _without_adapters(folder.name, model.chat, params, whole, max_tokens)
    mixer = _Mixer(base, (folder.name,), cache.cache_pool(lambda ids: [adapter for _ in ids]))
    return Served(
        name=folder.name,
        chat=model.chat,
        params=params,
        max_tokens=max_tokens,
        adapters=(folder.name,),
        default=((folder.name, 1.0),),
        weights=mixer.weights,
    )


def _without_adapters(
    name: str, opened: Chat, params: Tree, weights: Weights, max_tokens: int = 1024
) -> Served:
    return Served(
        name=name,
        chat=opened,
        params=params,
        max_tokens=max_tokens,
        adapters=(),
        default=(),
        weights=lambda mixtures: weights,
    )


def _with_experts(opened: Experts, name: str, retrieve: RetrieveConfig, max_tokens: int = 256) -> Served:
    mixer = _Mixer(opened.params, opened.names, opened.pool)

    def choose(conversation: Conversation) -> Mixture:
        question = next(m["content"] for m in reversed(conversation.messages) if m["role"] == "user")
        vectors = experts.embed_questions(
            opened, [question.replace("<image>", "").strip()], [conversation.images]
        )
        chosen = experts.choose_adapters("mixture", retrieve, vectors, opened.vectors)
        pairs = zip(chosen.indices[0].tolist(), chosen.weights[0].tolist(), strict=True)
        return tuple((opened.names[i], weight) for i, weight in pairs if i >= 0)

    return Served(
        name=name,
        chat=opened.chat,
        params={"model": opened.params},
        max_tokens=max_tokens,
        adapters=opened.names,
        default=(),
        weights=mixer.weights,
        choose=choose if opened.embedder is not None else None,
    )


def find_revision(served: Served) -> str:
    """12 hex digits of the weights that answer where a request names no adapter.

    Of each tensor some thousand values are taken: training changes them all, and to read all of a large model takes
    minutes.
    """
    content = hashlib.sha256()
    for name, weight in sorted(served.weights([served.default]).items()):
        for part in lazy.leaves(weight):
            values = part.detach().reshape(-1)
            sample = values[:: max(1, len(values) // _SAMPLED)].cpu().contiguous()
            content.update(f"{name} {list(part.shape)} {part.dtype} ".encode())
            content.update(sample.view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:12]


def _listed(names: Sequence[str]) -> str:
    return f"are {', '.join(names)}" if names else "are none with this model"


def find_mixture(served: Served, adapter: str | Mapping[str, float], conversation: Conversation) -> Mixture:
    """The adapters that a request asks for.

    Raises:
        Refused: a name that there is not, weights that are no numbers, "auto" without a registry that can choose.
    """
    if isinstance(adapter, str):
        if adapter in ("", served.name):
            return served.default
        if adapter == "base":
            return ()
        if adapter == "auto":
            if served.choose is None:
                raise Refused(400, "adapter 'auto' needs a registry with an embedder; name an adapter")
            return served.choose(conversation)
        adapter = {adapter: 1.0}
    unknown = [name for name in adapter if name not in served.adapters]
    if unknown:
        raise Refused(400, f"adapter: there {_listed(served.adapters)}, got another name")
    weights = [float(weight) for weight in adapter.values()]
    if not all(abs(weight) <= 100 for weight in weights):  # nan is not, either
        raise Refused(400, "adapter: weights must be finite numbers from -100 to 100")
    return tuple(zip(adapter, weights, strict=True))


@define
class _Mixer:
    """The weights of batches whose rows have mixtures of their own.

    Adapters stay side by side on the device once a row has used them: a stack for each new batch would copy their
    factors again and again, and a gate of 0 costs little.
    """

    base: Weights
    names: tuple[str, ...]
    pool: cache.Pools
    held: frozenset[str] = frozenset()

    def weights(self, mixtures: Sequence[Mixture]) -> Weights:
        """For a batch with a row for each mixture; the same adapter in all rows needs no gate per row."""
        used = frozenset(name for mixture in mixtures for name, _ in mixture)
        if not used:
            return self.base
        held = self.held | used
        self.held = held if len(held) <= max(_MANY, len(used)) else used
        names = [name for name in self.names if name in self.held]
        rows = torch.zeros(len(mixtures), len(names), dtype=torch.float64)
        for row, mixture in enumerate(mixtures):
            for name, weight in mixture:
                rows[row, names.index(name)] += weight
        stack = self.pool([self.names.index(name) for name in names])
        gates = rows[0] if len({*mixtures}) == 1 else rows
        adapter = compose.compose_adapters(stack, gates)
        # Rows of several mixtures are those of a batch in flight: their images were seen with their prompts.
        return lora.apply_lora(self.base, adapter if gates.dim() == 1 else _without_vision(adapter))


def _without_vision(adapter: lora.Adapter) -> lora.Adapter:
    """An adapter that leaves the layers alone that see images."""
    modules = [module for module in adapter.factors if not lora.VISION.search(module)]
    return evolve(
        adapter,
        factors={module: adapter.factors[module] for module in modules},
        gate={module: adapter.gate[module] for module in modules},
    )
