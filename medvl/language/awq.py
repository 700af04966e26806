"""Activation-aware quantisation (AWQ): columns of weights that large activations meet are made larger before they
are rounded, and what comes before the layer is divided by the same factors.

`find_scales` looks for the factors on calibration conversations, one decoder layer at a time; `fold_scales` and
`awq_quantizer` apply them to one weight at a time. Vision towers and heads are left out.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from medvl.base.display import track
from medvl.hub.skeletons import Skeleton
from medvl.language import vlm
from medvl.language.chat import Chat, Encoded, make_batch, model_inputs
from medvl.weights import int4
from medvl.weights.lazy import Lazy

_CLIP_ROWS = 512  # tokens on which ranges of values are compared
_CLIP_STEPS = 10  # a range shrinks by a twentieth per step, to 0.55 of itself
_FOLD_ERROR = 1e-3  # of the outputs of a layer in float32


@frozen
class _Group:
    """Linear layers with one input, what makes the input, and the module whose change of outputs is measured."""

    layers: tuple[str, ...]
    before: str
    inside: str


_GROUPS = (
    _Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    _Group(("self_attn.qkv_proj",), "input_layernorm", "self_attn"),
    _Group(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj"),
    _Group(("self_attn.o_proj",), "self_attn.qkv_proj", "self_attn.o_proj"),
    _Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    _Group(("mlp.gate_up_proj",), "post_attention_layernorm", "mlp"),
    _Group(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj"),
    _Group(("mlp.down_proj",), "mlp.gate_up_proj", "mlp.down_proj"),
)
_UNCLIPPED = ("q_proj", "k_proj", "qkv_proj")  # queries and keys, whose products grow with their errors

Weights = dict[str, Tensor]
Fold = Callable[[str, Tensor], Tensor]
Call = tuple[Any, Any]  # arguments of a module by position and by name


@frozen(kw_only=True)
class AwqConfig:
    """How weights become `Int4` by what they are multiplied with."""

    rounding: int4.Int4Config = int4.Int4Config()
    # Candidates of the ratio r: 0, 1 / ratios, 2 / ratios... With 1 all weights are rounded to nearest.
    ratios: int = 20
    clip: bool = False  # also shrink the ranges of groups, where outputs then change less

    def __attrs_post_init__(self) -> None:
        if self.ratios < 1:
            raise ValueError(f"AwqConfig: ratios must be at least 1, got {self.ratios}")


@frozen(kw_only=True, eq=False)
class Scale:
    """Factors of the inputs that some linear layers share."""

    layers: tuple[str, ...]  # names of their weights, whose columns are multiplied
    before: str  # weight of the norm before them, or of the linear layer whose last rows make their inputs
    factors: Tensor = field(repr=False)  # float32 [in]
    ratio: float
    error: float  # mean square of the change of outputs
    rounding_error: float  # the same by rounding alone


@frozen(kw_only=True, eq=False)
class Scales:
    """What `find_scales` found."""

    groups: tuple[Scale, ...]
    clips: dict[str, Tensor] = field(repr=False)  # {weight: greatest magnitude [out, groups] after folding}


@frozen(kw_only=True, eq=False)
class _Record:
    """What one decoder layer was given, and gave, for all conversations; on the CPU."""

    outputs: list[Any]
    calls: dict[str, list[Call]]  # of modules inside it; "" is the layer, for the first conversation only
    magnitudes: Weights  # {linear layer: mean magnitude [in] of each input}
    rows: Weights  # {linear layer: some of its inputs [tokens, in]}


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


# Quantising -------------------------------------------------------------------------------------------------
def quantize_awq(
    chat: Chat,
    params: Mapping[str, Tensor],
    data: Encoded,
    cfg: AwqConfig = AwqConfig(),
    *,
    device: torch.device | None = None,
) -> tuple[Weights, Scales]:
    """The params with every matrix of the decoder as an `Int4`, and the factors that were found for them.

    Args:
        params: in full precision, on any device.
        data: calibration conversations, from `encode_conversations`; all their tokens count. 128 are usual.
        device: where layers are run, one at a time; the params' own if left out.
    Raises:
        ValueError: as `find_scales` and `int4.quantize_matrix`.
    Source: Lin et al. 2023 (AWQ), arXiv:2306.00978; public code of AutoAWQ, `awq/quantize/quantizer.py`.
    """
    scales = find_scales(chat, params, data, cfg, device=device)
    convert = awq_quantizer(scales, cfg)
    return {name: convert(name, w) for name, w in params.items()}, scales


def awq_quantizer(scales: Scales, cfg: AwqConfig = AwqConfig()) -> Fold:
    """(name, weight) -> the folded weight, as `Int4` where it is a matrix of the decoder; also a `transform` of
    `loading.load_skeleton`.
    """
    fold, convert = fold_scales(scales), int4.quantizer(cfg.rounding)

    def convert_folded(name: str, w: Tensor) -> Tensor:
        w = fold(name, w)
        if name in scales.clips:
            w = _clip(w.float(), scales.clips[name].to(w.device)).to(w.dtype)
        return convert(name, w)

    return convert_folded


def fold_scales(scales: Scales) -> Fold:
    """(name, weight) -> the weight with the factors in it; the outputs of the model stay the same."""
    columns: Weights = {}
    rows: Weights = {}
    for group in scales.groups:
        columns.update(dict.fromkeys(group.layers, group.factors))
        rows[group.before] = group.factors
        # A linear layer's bias is part of what the next layer gets.
        rows[group.before.removesuffix("weight") + "bias"] = group.factors

    def fold(name: str, w: Tensor) -> Tensor:
        if name not in columns and name not in rows:
            return w
        folded = w.float()
        if name in columns:
            folded = folded * columns[name].to(w.device)
        if name in rows:
            factors = rows[name].to(w.device)
            if w.dim() == 2:
                factors = factors[:, None]
            # A fused layer makes other outputs first: queries and keys before values, gates before what they gate.
            first = len(w) - len(factors)
            folded = torch.cat([folded[:first], folded[first:] / factors])
        return folded.to(w.dtype)

    return fold


# Calibration ------------------------------------------------------------------------------------------------
@torch.no_grad()
def find_scales(
    chat: Chat,
    params: Mapping[str, Tensor],
    data: Encoded,
    cfg: AwqConfig = AwqConfig(),
    *,
    device: torch.device | None = None,
) -> Scales:
    """The factors of every group of linear layers of the decoder.

    For each ratio r the factors are `x^r / w^(1 - r)`, with x the mean magnitude of an input and w that of its
    column relative to its group; ratio 0 stands for no factors, so that rounding is among the candidates. The
    one is taken with which the outputs of attention, MLP or layer change least. Inputs and outputs of one
    layer are kept at a time, on the CPU, and the weights of one layer on the device.

    Args: as of `quantize_awq`.
    Raises:
        ValueError: no conversations; none with an image for a model that sees; weights that are quantised or
            adapted already; layers of other names; norms that do not take the factors.
    """
    _check_calibration(chat, params, data, cfg)
    device = device or next(iter(params.values())).device
    prefix = _layers_prefix(chat)
    # The first weights say to which device buffers go, so those outside the layers come first.
    inside = {n: w for n, w in params.items() if n.startswith(prefix)}
    outside = {n: w.to(device) for n, w in params.items() if n not in inside}
    calls = _decoder_calls(chat, outside | inside, data)
    # A copy of the module, which holds no weights: the hooks must not be on the chat's own.
    skeleton = evolve(chat.skeleton, module=copy.deepcopy(chat.skeleton.module))
    layers: Any = skeleton.module.get_submodule(prefix[:-1])

    groups: list[Scale] = []
    clips: Weights = {}
    outputs: list[Any] = []
    for number, layer in enumerate(track(layers, "searching scales, layer")):
        place = f"{prefix}{number}."
        weights = {n.removeprefix(place): w.to(device) for n, w in inside.items() if n.startswith(place)}
        kinds = [group for group in _GROUPS if _is_in(group, weights)]
        if not kinds:
            raise ValueError(
                f"awq: {chat.skeleton.name} has none of the layers q_proj, qkv_proj, gate_proj..."
            )
        loaded = outside | inside | {place + n: w for n, w in weights.items()}
        record = _run_layer(skeleton, loaded, number, calls, outputs, kinds)
        found = [_search(kind, layer, weights, record, cfg) for kind in kinds]
        fold = fold_scales(Scales(groups=tuple(found), clips={}))
        _check_folding(layer, weights, record, fold, chat.skeleton.name)
        if cfg.clip:
            folded = {n: fold(n, w) for n, w in weights.items()}
            clips |= {place + n: t for n, t in _find_clips(folded, record, found, cfg).items()}
        for scale in found:
            names = tuple(place + n for n in scale.layers)
            groups.append(evolve(scale, layers=names, before=place + scale.before))
        outputs = record.outputs
    return Scales(groups=tuple(groups), clips=clips)


def _check_calibration(chat: Chat, params: Mapping[str, Tensor], data: Encoded, cfg: AwqConfig) -> None:
    if not data.samples:
        raise ValueError("awq: there must be calibration conversations, found none that fit into the context")
    if chat.vision is not None and chat.vision.embed is not None:
        raise ValueError(
            f"awq: {chat.skeleton.name} gets its visual tokens from a part that is not in its params; take "
            "int4.quantize, which needs no activations"
        )
    if chat.vision is not None and not any(c.items for c in data.conversations):
        raise ValueError(
            f"awq: calibration conversations of {chat.skeleton.name} must show images, whose activations differ "
            f"from those of text; none of {len(data.conversations)} does"
        )
    convert = int4.quantizer(cfg.rounding)
    for name, w in params.items():
        if isinstance(w, Lazy):
            raise ValueError(f"awq: {name} must be a plain tensor in full precision, got {w!r}")
        # Costs nothing on meta, and raises where groups do not divide rows.
        convert(name, w.to("meta"))


def _layers_prefix(chat: Chat) -> str:
    """The beginning of the names of all weights of decoder layers."""
    module: Any = chat.skeleton.module
    layers = getattr(module.get_decoder(), "layers", None)
    for name, part in module.named_modules():
        if part is layers:
            return f"{name}."
    raise ValueError(f"awq: {chat.skeleton.name} has no list of decoder layers")


def _is_in(group: _Group, weights: Weights) -> bool:
    """Whether a decoder layer has these linear layers, and what comes before can take their factors."""
    if not all(f"{name}.weight" in weights for name in (*group.layers, group.before)):
        return False
    width = weights[f"{group.layers[0]}.weight"].shape[1]
    made = len(weights[f"{group.before}.weight"])
    # Where several heads of queries share one of values (GQA), it has no factors of its own.
    if group.before == "self_attn.v_proj":
        return made == width
    return group.before != "self_attn.qkv_proj" or made == 3 * width


# Running layers ---------------------------------------------------------------------------------------------
def _decoder_calls(chat: Chat, params: Weights, data: Encoded) -> list[Call]:
    """What the decoder is called with for each conversation, on the CPU; images are behind the vision tower."""
    calls: list[Call] = []

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(_moved((args, kwargs), "cpu"))
        raise _Stop

    module: Any = copy.deepcopy(chat.skeleton.module)
    module.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    skeleton = evolve(chat.skeleton, module=module)
    for row in track(range(len(data.samples)), "reading calibration conversations"):
        # One conversation a batch: without padding, every position counts.
        inputs = model_inputs(chat, params, make_batch(chat, data, [row]))
        inputs.pop("labels", None)
        with suppress(_Stop):
            vlm.hidden_states(skeleton, params, **inputs)
    return calls


def _run_layer(
    skeleton: Skeleton,
    params: Weights,
    number: int,
    calls: list[Call],
    outputs: list[Any],
    kinds: Sequence[_Group],
) -> _Record:
    """Run one decoder layer on all conversations.

    The decoder's own code runs up to it, as it may change what lies between layers (Qwen3-VL adds features of
    images there); in the place of the layers before stand the outputs of the last of them.

    Args:
        calls: of the decoder.
        outputs: of the layer before.
    """
    device = next(iter(params.values())).device
    record = _Record(outputs=[], calls={}, magnitudes={}, rows={})
    rows = -(-_CLIP_ROWS // len(calls))

    def keep_call(name: str, module: Any, args: Any, kwargs: Any) -> None:
        kept = record.calls.setdefault(name, [])
        if name or not kept:
            kept.append(_moved((args, kwargs), "cpu"))

    def keep_inputs(name: str, module: Any, args: Any) -> None:
        x = args[0].flatten(0, -2).float()
        magnitude = x.abs().sum(0).cpu()
        record.magnitudes[name] = record.magnitudes.get(name, 0) + magnitude
        some = x[:: max(1, len(x) // rows)][:rows].cpu()
        record.rows[name] = torch.cat([record.rows.get(name, some[:0]), some])

    def stop(module: Any, args: Any, output: Any) -> None:
        record.outputs.append(_moved(output, "cpu"))
        raise _Stop

    def run(module: Any) -> None:
        decoder = module.get_decoder()
        layer = decoder.layers[number]
        handles = [layer.register_forward_hook(stop)]
        for name in {"", *(group.inside for group in kinds)}:
            part = layer.get_submodule(name)
            handles.append(part.register_forward_pre_hook(partial(keep_call, name), with_kwargs=True))
        for group in kinds:
            part = layer.get_submodule(group.layers[0])
            handles.append(part.register_forward_pre_hook(partial(keep_inputs, group.layers[0])))
        for i, call in enumerate(calls):
            for before in decoder.layers[:number]:
                before.forward = partial(_stand_in, outputs[i], device)
            args, kwargs = _moved(call, device)
            with suppress(_Stop):
                decoder(*args, **kwargs)
        for handle in handles:
            handle.remove()

    skeleton.run(params, run)
    tokens = sum(_first(output).shape[:-1].numel() for output in record.outputs)
    return evolve(record, magnitudes={n: t / tokens for n, t in record.magnitudes.items()})


def _stand_in(output: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    return _moved(output, device)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _moved(tree: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """Arguments or results with their tensors on a device, those of floats in `dtype`."""
    if isinstance(tree, Tensor):
        return tree.to(device, dtype if tree.is_floating_point() else None)
    if isinstance(tree, dict):
        return {name: _moved(part, device, dtype) for name, part in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_moved(part, device, dtype) for part in tree)
    return tree


def _output(module: nn.Module, weights: Weights, call: Call) -> Tensor:
    """What a module answers to a recorded call, with other weights."""
    args, kwargs = _moved(call, next(iter(weights.values())).device)
    return _first(torch.func.functional_call(module, weights, args, kwargs)).float()


# Searching --------------------------------------------------------------------------------------------------
def _search(group: _Group, layer: nn.Module, weights: Weights, record: _Record, cfg: AwqConfig) -> Scale:
    """The factors of one group with which the outputs change least."""
    prefix = f"{group.inside}."
    module, calls = layer.get_submodule(group.inside), record.calls[group.inside]
    own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    names = tuple(f"{name}.weight" for name in group.layers)
    linear = {name.removeprefix(prefix): weights[name] for name in names}
    w = _relative_magnitude(list(linear.values()), cfg.rounding.group)
    x = record.magnitudes[group.layers[0]].to(w.device)
    outputs = [_output(module, own, call).cpu() for call in calls]
    values = sum(output.numel() for output in outputs)

    best, errors = torch.ones_like(x), list[float]()
    for step in range(cfg.ratios):
        factors = torch.ones_like(x) if step == 0 else _factors(x, w, step / cfg.ratios)
        changed = own | {name: _rounded(t, factors, cfg) for name, t in linear.items()}
        squares = 0.0
        for call, output in zip(calls, outputs, strict=True):
            change = _output(module, changed, call) - output.to(x.device)
            squares += float(change.square().sum())
        if not errors or squares / values < min(errors):
            best = factors
        errors.append(squares / values)
    return Scale(
        layers=names,
        before=f"{group.before}.weight",
        factors=best.cpu(),
        ratio=errors.index(min(errors)) / cfg.ratios,
        error=min(errors),
        rounding_error=errors[0],
    )


def _relative_magnitude(weights: Sequence[Tensor], group: int) -> Tensor:
    """Mean magnitude [in] of the columns of some weights, each value relative to the greatest of its group."""
    w = torch.cat([t.float().abs() for t in weights])
    grouped = w.unflatten(-1, (-1, group if group > 0 else w.shape[-1]))
    return (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).flatten(-2).mean(0)


def _factors(x: Tensor, w: Tensor, ratio: float) -> Tensor:
    """`x^r / w^(1 - r)` [in], centred on 1 and finite; the small numbers are AutoAWQ's."""
    factors = (x.pow(ratio) / (w.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
    factors = factors / (factors.max() * factors.min()).sqrt()
    return torch.where(factors.isfinite(), factors, 1)


def _rounded(w: Tensor, factors: Tensor, cfg: AwqConfig) -> Tensor:
    """What a weight becomes by multiplying its columns, rounding, and dividing the inputs."""
    rounded: Any = int4.quantize_matrix((w.float() * factors).to(w.dtype), cfg.rounding)
    return (rounded.dense_as(torch.float32) / factors).to(w.dtype)


def _check_folding(layer: nn.Module, weights: Weights, record: _Record, fold: Fold, name: str) -> None:
    """Raise where the factors, before any rounding, change what the layer answers to the first conversation."""
    call = _moved(record.calls[""][0], "cpu", torch.float32)
    wide = {n: w.float().cpu() for n, w in weights.items()}
    before = _output(layer, wide, call)
    after = _output(layer, {n: fold(n, w) for n, w in wide.items()}, call)
    change = float((after - before).norm() / before.norm())
    if not change < _FOLD_ERROR:
        raise ValueError(
            f"awq: factors in the norms of {name} change the outputs of its layers by {change:.1%}, and must "
            "not; its norms are of another kind. Take int4.quantize, which rounds without factors"
        )


# Ranges -----------------------------------------------------------------------------------------------------
def _find_clips(folded: Weights, record: _Record, found: list[Scale], cfg: AwqConfig) -> Weights:
    """{weight: greatest magnitude [out, groups]} of the folded weights of a layer."""
    clips = {}
    for scale in found:
        x = record.rows[scale.layers[0].removesuffix(".weight")] / scale.factors
        for name in scale.layers:
            if not any(part in name for part in _UNCLIPPED):
                w = folded[name]
                # Some rows at a time: products of all rows, tokens and groups would be large.
                parts = [_find_clip(rows, x.to(w.device), cfg.rounding) for rows in w.split(256)]
                clips[name] = torch.cat(parts).cpu()
    return clips


def _find_clip(w: Tensor, x: Tensor, cfg: int4.Int4Config) -> Tensor:
    """The greatest magnitude [out, groups] with which each group's part of the outputs changes least.

    Args:
        w: [out, in].
        x: [tokens, in].
    """
    shape = (-1, cfg.group if cfg.group > 0 else w.shape[-1])
    inputs = x.unflatten(-1, shape)  # [tokens, groups, group]
    greatest = w.float().unflatten(-1, shape).abs().amax(-1)  # [out, groups]
    outputs = torch.einsum("tgi,ogi->tog", inputs, w.float().unflatten(-1, shape))
    best, least = greatest, torch.full_like(greatest, torch.inf)
    for step in range(_CLIP_STEPS):
        bound = greatest * (1 - step / 20)
        rounded: Any = int4.quantize_matrix(_clip(w.float(), bound).to(w.dtype), cfg)
        values = rounded.dense_as(torch.float32).unflatten(-1, shape)
        error = (torch.einsum("tgi,ogi->tog", inputs, values) - outputs).square().mean(0)
        best = torch.where(error < least, bound, best)
        least = torch.minimum(error, least)
    return best


def _clip(w: Tensor, greatest: Tensor) -> Tensor:
    """`w` [out, in] with no value of a group above its `greatest` [out, groups] in magnitude."""
    bound = greatest.unsqueeze(-1)
    grouped = w.unflatten(-1, (greatest.shape[-1], -1))
    return torch.minimum(torch.maximum(grouped, -bound), bound).flatten(-2)
