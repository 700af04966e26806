"""Hugging Face architectures as skeletons whose weights are values: built without weights, or with random
ones, and called.
"""

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
from medvl.hub.vision_attention import stack_windows
from medvl.weights.lazy import leaves

Params = dict[str, Tensor]  # flat: {module name: tensor}


@frozen(kw_only=True, eq=False)
class Skeleton:
    """An architecture without weights: `skeleton(params, *args, **kwargs)` is the module's forward pass with
    these weights.

    `module` has its parameters on the meta device and real buffers, in evaluation mode (no dropout, no
    stochastic depth). It is never run itself: a call binds `params` to a copy of it, one for each thread, so
    any number of threads may share a skeleton. The copy is made by a thread's first call and goes with the
    thread; it holds no weights. `params` must have exactly the names of the module's parameters
    (ValueError); each may be any kind of weight, see `weights`.
    """

    module: nn.Module = field(repr=False)
    name: str
    config: dict[str, Any] = field(repr=False)
    # the checkpoint's generation_config.json, unchanged
    generation: dict[str, Any] = field(factory=dict, repr=False)
    # Computed once: walking through all modules in every call would cost time.
    _names: frozenset[str] = field(init=False, repr=False)
    _buffers: tuple[str, ...] = field(init=False, repr=False)
    _layers: tuple[nn.Module, ...] = field(init=False, repr=False)
    _tied: bool = field(init=False, repr=False)
    _original: "_Bound" = field(init=False, repr=False)
    _copies: "_ThreadCopy" = field(init=False, repr=False, factory=lambda: _ThreadCopy())

    @_names.default
    def _parameter_names(self) -> frozenset[str]:
        return frozenset(n for n, _ in self.module.named_parameters())

    @_buffers.default
    def _buffer_names(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.module.named_buffers())

    @_layers.default
    def _checkpointable_layers(self) -> tuple[nn.Module, ...]:
        return tuple(m for m in self.module.modules() if hasattr(m, "gradient_checkpointing"))

    @_tied.default
    def _has_tied_weights(self) -> bool:
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
        self._check_call(params)
        device = next(iter(params.values())).device
        # functional_call replaces parameters and buffers by name, runs the module, and puts the old back.
        # Buffers are those of `module`, whatever an earlier call of this thread may have left in its copy.
        bound = self._buffers_on(device)
        for name, weight in params.items():
            bound[f"module.{name}"] = weight
        return torch.func.functional_call(self._copy(), bound, (function,), tie_weights=self._tied)

    def _buffers_on(self, device: torch.device) -> dict[str, Tensor]:
        """The buffers by the names of `_Bound`, copied to a device by a thread's first call there."""
        if device not in self._copies.buffers:
            buffers = {}
            for name in self._buffers:
                buffers[f"module.{name}"] = self.module.get_buffer(name).to(device)
            self._copies.buffers[device] = buffers
        return {**self._copies.buffers[device]}

    def _check_call(self, params: Mapping[str, Tensor]) -> None:
        if params.keys() != self._names:
            missing = sorted(self._names - params.keys())
            unknown = sorted(params.keys() - self._names)
            raise ValueError(
                f"{self.name}: params must be exactly its {len(self._names)} weights; "
                f"missing {few(missing)}, unknown {few(unknown)}"
            )
        for layer in self._layers:
            recompute = getattr(layer, "_gradient_checkpointing_func", None)
            if layer.gradient_checkpointing and recompute is not _recompute:
                raise ValueError(
                    f"{self.name}: gradient checkpointing inside the module would recompute with other "
                    "weights; turn it off and use checkpointed(skeleton)"
                )

    def _copy(self) -> "_Bound":
        """This thread's copy of the module."""
        # torch.compile binds nothing while it traces, and cannot copy a module.
        if torch.compiler.is_compiling():
            return self._original
        if self._copies.bound is None:
            # The parameters hold nothing and are replaced in every call, so the copy may name the same ones:
            # copying them would be counted as memory by `estimate`, which runs a skeleton without storage.
            shared = {id(parameter): parameter for parameter in self.module.parameters()}
            self._copies.bound = copy.deepcopy(self._original, shared)
        return self._copies.bound


class _Bound(nn.Module):
    """A module and a function that runs it, so that weights can be bound to the module while the function
    runs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.module)


class _ThreadCopy(threading.local):
    """A thread's copy of a skeleton's module and, by device, of its buffers. Copied or pickled with its
    skeleton, it starts empty.
    """

    bound: _Bound | None = None

    def __init__(self) -> None:
        self.buffers: dict[torch.device, dict[str, Tensor]] = {}

    def __reduce__(self) -> Any:
        return _ThreadCopy, ()


def checkpointed(skeleton: Skeleton) -> Skeleton:
    """The same skeleton whose layers keep only their inputs for the backward pass and compute the rest again.

    A layer keeps the weights that were bound to it during the forward pass, so the gradient is right
    wherever it is taken, also after the call has returned. Of use under training only; do not give it a
    cache.

    Raises:
        ValueError: the architecture has no layers that transformers can checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    module: Any = copy.deepcopy(skeleton.module)  # the given skeleton stays without checkpoints
    layers: list[Any] = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    # A layer inside a layer is recomputed with the outer one.
    inner: set[int] = set()
    for layer in layers:
        inner.update(id(part) for part in layer.modules() if part is not layer)
    layers = [layer for layer in layers if id(layer) not in inner]
    if not layers:
        raise ValueError(f"checkpointed: {skeleton.name} has no layers that can be checkpointed")
    for layer in layers:
        # transformers checkpoints in training mode only. What is inside the layer stays in evaluation mode.
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = _recompute
    return evolve(skeleton, module=module)


def _recompute(run: Any, *args: Any) -> Any:
    """What a checkpointed layer calls in place of torch's `checkpoint`: the same, with this call's
    weights.
    """
    # transformers passes a partial, of the layer's bound method or with the layer as first argument.
    layer = run.args[0] if run.args else run.func.__self__
    # By the time of the recomputation the call is over and the layer holds other weights, or none.
    weights = {f"module.{n}": t for n, t in layer.named_parameters()}

    def forward(*inputs: Any) -> Any:
        return torch.func.functional_call(_Bound(layer), weights, (lambda _: run(*inputs),))

    return checkpoint(forward, *args, use_reentrant=False)


def init_skeleton(
    config: dict[str, Any], gen: Generator, *, head: Literal["", "language"] = ""
) -> tuple[Skeleton, Params]:
    """An architecture with transformers' own random initialisation, float32 on CPU, a pure function of `gen`.

    Args:
        config: such as {"model_type": "dinov2", "hidden_size": 96, ...}; what is left out has transformers'
            default.
        head: as in `load_skeleton`.
    Raises:
        ValueError: unknown model_type or key, a value of the wrong type, sizes that no model can have, or
            more weights than this machine has memory for; before anything is allocated.
    """
    model_class, model_config = find_architecture(config, head)
    # transformers keeps keys that it does not know, so a typing error would give the default without a word.
    settings = {*type(model_config)().to_dict(), *model_config.attribute_map, "model_type"}
    unknown = sorted(config.keys() - settings)
    if unknown:
        public = [name for name in settings if not name.startswith("_")]
        keys = ", ".join(sorted(public))
        raise ValueError(
            f"init_skeleton: a {config['model_type']} config has no {', '.join(unknown)}; it has {keys}"
        )
    # transformers draws from the global generator, so `gen` gives the seed for that.
    seed = int(torch.randint(2**62, (), generator=gen))
    # The layers are counted from the config first: building many of them takes minutes even without weights.
    check_memory(count_layer_weights(model_config.to_dict()), config["model_type"])
    weightless = build_weightless(model_class, model_config)
    check_memory(sum(p.numel() for p in weightless.parameters()), config["model_type"])
    # fork_rng puts the CPU's generator back: who calls this sees its own numbers unchanged. It alone is
    # seeded, as `torch.manual_seed` would seed those of all GPUs, too.
    with _BUILDING, torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        module = build_module(model_class, model_config)
    return _take_weights(module, str(config["model_type"]))


def empty_skeleton(config: dict[str, Any], *, head: Literal["", "language"] = "") -> Skeleton:
    """The architecture alone, of any size, without allocating weights: what `load_skeleton` binds weights
    to.
    """
    model_class, model_config = find_architecture(config, head)
    return make_skeleton(build_weightless(model_class, model_config), str(config["model_type"]))


def untie(skeleton: Skeleton, params: Mapping[str, Tensor]) -> tuple[Skeleton, Params]:
    """The same language model whose head has a weight of its own, not that of the token table.

    So one of the two can be corrected alone, as an adapter on `lm_head` does, and merged or saved. The
    head's weight is a copy of the token table, the others are the given params.

    Raises:
        ValueError: no two layers share a weight.
    """
    if not skeleton._tied:
        raise ValueError(f"untie: no two layers of {skeleton.name} share a weight")
    first_name = {id(p): n for n, p in skeleton.module.named_parameters()}
    # {every name of a weight: the name that params have}
    source = {n: first_name[id(p)] for n, p in skeleton.module.named_parameters(remove_duplicate=False)}
    config = copy.deepcopy(skeleton.config)
    # Models with a vision tower keep the setting in the config of their language model, some in both.
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    untied = empty_skeleton(config, head="language")
    missing = sorted(n for n in untied._names if n not in source)
    if missing:
        raise ValueError(
            f"untie: {skeleton.name} without shared weights needs {few(missing)}, which it does not have"
        )
    # The rules that turned the checkpoint's names into these, for `save_skeleton`.
    untied.module._weight_conversions = getattr(skeleton.module, "_weight_conversions", [])  # type: ignore[assignment]
    weights = {}
    for name, _ in untied.module.named_parameters():
        weight = params[source[name]]
        weights[name] = weight if name == source[name] else weight.clone()
    return evolve(untied, name=skeleton.name), weights


def table_names(skeleton: Skeleton) -> dict[str, str]:
    """{"embed", "head"}: the names in params of a language model's token table and head; one name if tied."""
    module: Any = skeleton.module
    names = {id(p): name for name, p in module.named_parameters()}
    tables = {"embed": module.get_input_embeddings(), "head": module.get_output_embeddings()}
    return {part: names[id(layer.weight)] for part, layer in tables.items()}


def with_vocabulary(skeleton: Skeleton, size: int) -> Skeleton:
    """The same language model for a token table and a head of `size` rows, such as those of
    `extended.extend_tables`."""
    config = copy.deepcopy(skeleton.config)
    (config.get("text_config") or config)["vocab_size"] = size
    resized = empty_skeleton(config, head="language")
    # The rules that turned the checkpoint's names into these, for `save_skeleton`.
    resized.module._weight_conversions = getattr(skeleton.module, "_weight_conversions", [])  # type: ignore[assignment]
    return evolve(resized, name=skeleton.name, generation=skeleton.generation)


def weights_digest(params: tree.Tree) -> str:
    """Sixteen hex digits of the content of a tree of tensors: names, dtypes, shapes and bytes. Independent
    of order and device.
    """
    tensors = {}
    for name, weight in tree.flatten(params).items():
        for i, part in enumerate(leaves(weight)):  # the tensors of a lazy weight
            tensors[f"{name} {i}" if i else name] = part
    # Name, dtype and shape too: the same bytes can be another tensor.
    sha = hashlib.sha256()
    for name, tensor in track(sorted(tensors.items()), "hashing weights"):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def weights_name(settings: str, params: Mapping[str, Any]) -> str:
    """What a cache's folder is called after: weights, and the settings with which they are used."""
    text = f"{settings} {weights_digest(dict(params))}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Held while a module is built: the patched method and the random generator belong to the whole process.
_BUILDING = threading.Lock()


def build_weightless(model_class: Any, model_config: Any) -> Any:
    """The module with parameters on meta and real buffers: a parameter goes to meta when a module gets it,
    its memory is never touched.
    """
    builder = threading.get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # The patch acts on the whole process: modules that other threads build meanwhile keep their
        # parameters.
        if threading.get_ident() == builder and param is not None and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
            # transformers draws no numbers for it, which takes time on meta, too.
            param._is_hf_initialized = True  # type: ignore[attr-defined]
        register(self, name, param)

    with _BUILDING, torch.random.fork_rng(devices=[]), quiet():
        # Read under the lock: before it, this may be another thread's patch, which would then stay.
        register = nn.Module.register_parameter
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
        try:
            module = build_module(model_class, model_config)
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
    module.tie_weights()
    return module


def make_skeleton(module: Any, name: str, device: torch.device = torch.device("cpu")) -> Skeleton:
    """A skeleton of a module whose parameters are on meta; its buffers are moved to `device`."""
    for part in module.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = buffer.to(device)
    # Through JSON: dtypes and enumerations become text, so the config can be stored and compared.
    config = json.loads(json.dumps(module.config.to_dict(), default=str))
    stack_windows(module)
    return Skeleton(module=module, name=name, config=config)


def _take_weights(module: Any, name: str) -> tuple[Skeleton, Params]:
    """Move the weights out of a module: its parameters go to meta, and tied weights stay tied."""
    params: Params = {}
    on_meta: dict[int, nn.Parameter] = {}
    first_name = {id(p): n for n, p in module.named_parameters()}
    for part in module.modules():
        for key, p in list(part._parameters.items()):
            if p is None:
                continue
            if id(p) not in on_meta:  # of tied weights once: both places then get the same meta parameter
                on_meta[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                params[first_name[id(p)]] = p.detach().to("cpu", copy=True)
            part._parameters[key] = on_meta[id(p)]
    return make_skeleton(module, name), params
