"""Hugging Face architectures as skeletons whose weights are values: built without weights, or with random ones, and called."""

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvl.base import tree
from medvl.base.display import track
from medvl.base.text import few
from medvl.hub.architectures import build_module, check_memory, count_layer_weights, find_architecture, quiet
from medvl.weights.lazy import leaves

Params = dict[str, Tensor]  # flat: {module name: tensor}


@frozen(kw_only=True, eq=False)
class Skeleton:
    """An architecture without weights: `skeleton(params, *args, **kwargs)` is the module's forward pass with these weights.

    `module` has its parameters on the meta device and real buffers, in evaluation mode (no dropout, no stochastic depth).
    It is never run itself: a call binds `params` to a copy of it, one for each thread, so any number of threads may
    share a skeleton. The copy is made by a thread's first call and goes with the thread; it holds no weights.
    `params` must have exactly the names of the module's parameters (ValueError); each may be any kind of weight,
    see `weights`.
    """

    module: nn.Module = field(repr=False)
    name: str
    config: dict[str, Any] = field(repr=False)
    generation: dict[str, Any] = field(
        factory=dict, repr=False
    )  # the checkpoint's generation_config.json, as it was
    _names: frozenset[str] = field(init=False, repr=False)
    _buffers: tuple[str, ...] = field(init=False, repr=False)
    _layers: tuple[nn.Module, ...] = field(init=False, repr=False)
    _tied: bool = field(init=False, repr=False)
    _original: "_Bound" = field(init=False, repr=False)
    _copies: "_OfThread" = field(init=False, repr=False, factory=lambda: _OfThread())

    @_names.default
    def _its_names(self) -> frozenset[str]:
        return frozenset(n for n, _ in self.module.named_parameters())

    @_buffers.default
    def _its_buffers(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.module.named_buffers())

    @_layers.default
    def _its_layers(self) -> tuple[nn.Module, ...]:
        return tuple(m for m in self.module.modules() if hasattr(m, "gradient_checkpointing"))

    @_tied.default
    def _if_tied(self) -> bool:
        return len(list(self.module.named_parameters(remove_duplicate=False))) > len(self._names)

    @_original.default
    def _wrapped_module(self) -> "_Bound":
        return _Bound(self.module)

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return self.run(params, lambda module: module(*args, **kwargs))

    def run(self, params: Mapping[str, Tensor], function: Callable[[nn.Module], Any]) -> Any:
        """`function(module)` while `params` are bound to the module: for several calls with the same weights.

        Raises:
            ValueError: params are not the skeleton's, or the module checkpoints its activations itself.
        """
        if params.keys() != self._names:
            missing, extra = sorted(self._names - params.keys()), sorted(params.keys() - self._names)
            raise ValueError(
                f"{self.name}: params must be exactly its {len(self._names)} weights; missing {few(missing)}, unknown {few(extra)}"
            )
        if any(
            m.gradient_checkpointing and getattr(m, "_gradient_checkpointing_func", None) is not _recompute
            for m in self._layers
        ):
            raise ValueError(
                f"{self.name}: gradient checkpointing inside the module would recompute with other weights; "
                "turn it off and use checkpointed(skeleton)"
            )
        device = next(iter(params.values())).device
        # The buffers of a call are those of `module`, whatever an earlier call of this thread may have left in its copy.
        bound = {f"module.{n}": self.module.get_buffer(n).to(device) for n in self._buffers}
        bound |= {f"module.{n}": w for n, w in params.items()}
        return torch.func.functional_call(self._copy(), bound, (function,), tie_weights=self._tied)

    def _copy(self) -> "_Bound":
        """This thread's copy of the module."""
        if torch.compiler.is_compiling():  # a trace binds nothing when it runs, and cannot copy
            return self._original
        if self._copies.bound is None:
            # The parameters hold nothing and are replaced in every call, so that the copy may name the same ones:
            # copying them would be counted as memory by `estimate`, which runs a skeleton without storage.
            shared = {id(parameter): parameter for parameter in self.module.parameters()}
            self._copies.bound = copy.deepcopy(self._original, shared)
        return self._copies.bound


class _Bound(nn.Module):
    """A module and a function that runs it, so that weights can be bound to the module while the function runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.module)


class _OfThread(threading.local):
    """What each thread has for itself of a skeleton. A copy of the skeleton starts without."""

    bound: _Bound | None = None

    def __reduce__(self) -> Any:
        return _OfThread, ()


def checkpointed(skeleton: Skeleton) -> Skeleton:
    """The same skeleton whose layers keep only their inputs for the backward pass and compute the rest again.

    A layer takes the weights that were bound to it during the forward pass along, so the gradient is right wherever it is taken, also after
    the call has returned. Of use under training only; do not give it a cache.
    Raises:
        ValueError: the architecture has no layers that transformers can checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    module: Any = copy.deepcopy(skeleton.module)
    layers: list[Any] = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {id(k) for m in layers for k in m.modules() if k is not m}
    layers = [m for m in layers if id(m) not in inner]
    if not layers:
        raise ValueError(f"checkpointed: {skeleton.name} has no layers that can be checkpointed")
    for layer in layers:
        layer.gradient_checkpointing = layer.training = (
            True  # of the layer alone: what is inside stays in evaluation mode
        )
        layer._gradient_checkpointing_func = _recompute
    return evolve(skeleton, module=module)


def _recompute(run: Any, *args: Any) -> Any:
    layer = run.args[0] if run.args else run.func.__self__
    weights = {
        f"module.{n}": t for n, t in layer.named_parameters()
    }  # those of this call, not what the skeleton holds later
    again = lambda *a: torch.func.functional_call(_Bound(layer), weights, (lambda _: run(*a),))
    return checkpoint(again, *args, use_reentrant=False)


def init_skeleton(
    config: dict[str, Any], gen: Generator, *, head: Literal["", "language"] = ""
) -> tuple[Skeleton, Params]:
    """An architecture with transformers' own random initialisation, float32 on CPU, a pure function of `gen`.

    Args:
        config: such as {"model_type": "dinov2", "hidden_size": 96, ...}; what is left out has transformers' default.
        head: as in `load`.
    Raises:
        ValueError: unknown model_type or key, a value of the wrong type, sizes that no model can have, or more weights than this machine
            has memory for; before anything is allocated.
    """
    kind, cfg = find_architecture(config, head)
    known = {*type(cfg)().to_dict(), *cfg.attribute_map, "model_type"}
    if unknown := sorted(config.keys() - known):
        has = ", ".join(sorted(k for k in known if not k.startswith("_")))
        raise ValueError(
            f"init_skeleton: a {config['model_type']} config has no {', '.join(unknown)}; it has {has}"
        )
    seed = int(torch.randint(2**62, (), generator=gen))
    check_memory(count_layer_weights(cfg.to_dict()), config["model_type"])
    check_memory(sum(p.numel() for p in build_weightless(kind, cfg).parameters()), config["model_type"])
    with _building, torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        module = build_module(kind, cfg)
    return _split(module, str(config["model_type"]), "cpu")


def empty_skeleton(config: dict[str, Any], *, head: Literal["", "language"] = "") -> Skeleton:
    """The architecture alone, of any size, in no time: what `load` binds weights to."""
    kind, cfg = find_architecture(config, head)
    return make_skeleton(build_weightless(kind, cfg), str(config["model_type"]))


def untie(skeleton: Skeleton, params: Mapping[str, Tensor]) -> tuple[Skeleton, Params]:
    """The same language model whose head has a weight of its own, not that of the token table.

    So one of the two can be corrected alone, as an adapter on `lm_head` does, and merged or saved. The head's weight is a
    copy of the token table, the others are the params that were given.
    Raises:
        ValueError: no two layers share a weight.
    """
    first = {id(p): n for n, p in skeleton.module.named_parameters()}
    source = {n: first[id(p)] for n, p in skeleton.module.named_parameters(remove_duplicate=False)}
    if not skeleton._tied:
        raise ValueError(f"untie: no two layers of {skeleton.name} share a weight")
    config = copy.deepcopy(skeleton.config)
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    untied = empty_skeleton(config, head="language")
    if missing := sorted(n for n in untied._names if n not in source):
        raise ValueError(
            f"untie: {skeleton.name} without shared weights needs {few(missing)}, which it does not have"
        )
    untied.module._weight_conversions = getattr(skeleton.module, "_weight_conversions", [])  # type: ignore[assignment]
    weights = {
        n: params[n] if n == source[n] else params[source[n]].clone()
        for n, _ in untied.module.named_parameters()
    }
    return evolve(untied, name=skeleton.name), weights


def weights_digest(params: tree.Tree) -> str:
    """Sixteen hex digits of the content of a tree of tensors: names, dtypes, shapes and bytes. Independent of order and device."""
    whole = hashlib.sha256()
    plain = {
        f"{n}{f' {i}' if i else ''}": t
        for n, w in tree.flatten(params).items()
        for i, t in enumerate(leaves(w))
    }
    for name, t in track(sorted(plain.items()), "hashing weights"):
        whole.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        whole.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


# Held while a module is built: what is patched, and the generator that is drawn from, are those of the whole process.
_building = threading.Lock()


def build_weightless(kind: Any, cfg: Any) -> Any:
    """The module with parameters on meta and real buffers: a parameter goes to meta when a module gets it, its memory never touched."""
    builder = threading.get_ident()

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # The method is that of the whole process: modules which other threads build meanwhile keep their parameters as they are.
        if threading.get_ident() == builder and param is not None and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
        register(self, name, param)

    with _building, torch.random.fork_rng(devices=[]), quiet():
        register = (
            nn.Module.register_parameter
        )  # read under the lock: before it, this may be another thread's patch, and would stay
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
        try:
            module = build_module(kind, cfg)
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
    module.tie_weights()
    return module


def _split(module: Any, name: str, device: str | torch.device) -> tuple[Skeleton, Params]:
    """Take the weights out of a module: what is left is on meta, tied weights stay tied."""
    params: Params = {}
    metas: dict[int, nn.Parameter] = {}
    where = {id(p): n for n, p in module.named_parameters()}
    for part in module.modules():
        for key, p in list(part._parameters.items()):
            if p is None:
                continue
            if id(p) not in metas:
                metas[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                params[where[id(p)]] = p.detach().to(device, copy=True)
            part._parameters[key] = metas[id(p)]
    return make_skeleton(module, name, torch.device(device)), params


def make_skeleton(module: Any, name: str, device: torch.device = torch.device("cpu")) -> Skeleton:
    for part in module.modules():
        for key, b in part._buffers.items():
            part._buffers[key] = b if b is None else b.to(device)
    return Skeleton(
        module=module, name=name, config=json.loads(json.dumps(module.config.to_dict(), default=str))
    )
