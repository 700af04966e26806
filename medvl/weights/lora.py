"""Adapters: low-rank corrections of the weights of a model (LoRA), and the same with a gate per token
(H-LoRA).
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from torch import Generator, Tensor, nn

from medvl.base import config
from medvl.weights.lazy import EXPERTS, Lazy, dense, low_rank

Factors = dict[str, dict[str, Tensor]]  # {module: {"a" [r, in], "b" [out, r], with experts "router" [n, in]}}
# Names of modules that see images, over the model families that are supported.
VISION = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|vision_embed_tokens|multi_modal_projector|mm_projector)(\.|$)"
)
_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)\.weight$")  # of token embeddings
_HEAD = re.compile(r"(^|\.)(lm_head|score|classifier|head)$")


@frozen(kw_only=True)
class LoraConfig:
    """Which layers an adapter corrects, and how. Names and meaning as in peft."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0
    # Names of layers, or ends of names; layers of a vision tower or projector only if `vision`. Or one regex
    # in `pattern` for full names.
    targets: tuple[str, ...] = ()
    # "all-linear" is every linear layer but the head.
    pattern: str = field(default="", metadata={"unless": "targets"})
    vision: bool = False
    exclude: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(factory=dict)  # regex for the end of a name -> rank
    alpha_pattern: dict[str, float] = field(factory=dict)
    experts: int = 0  # n > 0: H-LoRA, n experts of rank / n each, mixed per token by a router
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __attrs_post_init__(self) -> None:
        if isinstance(self.targets, str) or isinstance(self.exclude, str):
            raise ValueError(
                f"LoraConfig: targets and exclude are tuples of names, got {self.targets!r} and "
                f"{self.exclude!r}"
            )
        ranks = [self.rank, *self.rank_pattern.values()]
        if min(ranks) < 1 or not 0 <= self.dropout < 1 or self.experts < 0:
            raise ValueError(
                f"LoraConfig: ranks must be positive, dropout in [0, 1), experts not negative, got {self}"
            )
        config.check_bounds(self, "LoraConfig", rank=config.WIDTH, alpha=(0, 1e6), experts=(0, 1024))
        alphas_in_bounds = all(0 <= alpha <= 1e6 for alpha in self.alpha_pattern.values())
        if max(ranks) > config.WIDTH[1] or not alphas_in_bounds:
            raise ValueError(
                f"LoraConfig: rank_pattern and alpha_pattern need ranks and alphas as above, got {self}"
            )
        # The ranks of a layer are divided evenly among its experts.
        if self.experts and any(r % self.experts for r in ranks):
            raise ValueError(f"LoraConfig: {self.experts} experts must divide the rank, got {ranks}")
        if bool(self.targets) == bool(self.pattern):
            raise ValueError(
                "LoraConfig: give either targets (names) or pattern (one regex, or 'all-linear')"
            )
        # Compiled here only to fail early: a typing error should not show after a model was loaded.
        for regex in (self.pattern, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(regex)
            except re.error as e:
                raise ValueError(f"LoraConfig: {regex!r} is not a regular expression: {e}") from e


@frozen(kw_only=True, eq=False)
class Adapter:
    """Low-rank factors for layers of one model, as values; `apply_lora` puts them on params, `evolve(adapter,
    factors=...)` trains them.

    The correction of module m is `scale[m] * b diag(gate[m]) a`. A gate [b, r] has a row for each sample of
    the batch that will come.
    """

    factors: Factors
    scale: dict[str, float]
    kinds: dict[str, str]  # module -> "linear", "embedding" or "conv1d"
    gate: dict[str, Tensor] = field(factory=dict)
    # Parameters that the adapter replaces as a whole (peft's modules_to_save).
    full: dict[str, Tensor] = field(factory=dict)
    dropout: float = 0.0
    name: str = ""
    config: dict[str, Any] = field(factory=dict)  # the adapter_config.json it came from

    def rank(self, module: str) -> int:
        return len(self.factors[module]["a"])

    def __repr__(self) -> str:
        ranks = sorted({len(f["a"]) for f in self.factors.values()})
        gated = ", gated" if self.gate else ""
        return f"Adapter({self.name or 'unnamed'}: {len(self.factors)} layers, ranks {ranks}{gated})"


def target_layers(cfg: LoraConfig, skeleton: Any) -> dict[str, str]:
    """{module: kind} of the layers that `cfg` names, in the order of the model.

    Args:
        skeleton: `skeletons.Skeleton`; only names, types and shapes of its module are read.
    Raises:
        ValueError: a target that no layer has, or nothing left of it outside the vision tower (says what
            there is).
    """
    kinds = adaptable_layers(skeleton)
    if cfg.pattern == "all-linear":
        # As peft's "all-linear": the head is linear too, but its adapter would be as wide as the vocabulary.
        layers = {n for n, kind in kinds.items() if kind != "embedding" and not _HEAD.search(n)}
        layers = _without_vision(cfg, layers)
    elif cfg.pattern:
        layers = {n for n in kinds if re.fullmatch(cfg.pattern, n)}
    else:
        layers = set()
        for target in cfg.targets:
            layers |= _layers_of_target(cfg, target, kinds)
    for end in cfg.exclude:
        layers -= {n for n in layers if _is_end(n, end)}
    if not layers:
        raise ValueError(f"lora: {cfg.pattern or cfg.targets} names no layer; there are {_last_names(kinds)}")
    return {n: kind for n, kind in kinds.items() if n in layers}


def _layers_of_target(cfg: LoraConfig, target: str, kinds: Mapping[str, str]) -> set[str]:
    # Each target must name a layer: with one misspelt name of four a smaller adapter would be trained.
    matches = {n for n in kinds if _is_end(n, target)}
    layers = _without_vision(cfg, matches)
    if layers:
        return layers
    if matches:
        why = f"only layers of the vision tower ({sorted(matches)[0]}...) end in it; set vision=True"
    else:
        why = "no layer ends in it"
    raise ValueError(f"lora: target {target!r}: {why}; there are {_last_names(kinds)}")


def _without_vision(cfg: LoraConfig, layers: set[str]) -> set[str]:
    if cfg.vision:
        return layers
    return {n for n in layers if not VISION.search(n)}


def adaptable_layers(skeleton: Any) -> dict[str, str]:
    """{module: kind} of every layer that an adapter can be on, in the order of the model."""
    kinds = {}
    for name, module in skeleton.module.named_modules():
        kind = _layer_kind(module)
        if kind:
            kinds[name] = kind
    return kinds


def init_lora(
    cfg: LoraConfig, skeleton: Any, gen: Generator, *, device: str | torch.device = "cpu"
) -> Adapter:
    """A new adapter, float32: it changes nothing yet (B, or an embedding's A, is zero).

    A warning says how much of a mixture model "all-linear" leaves alone: the experts of a layer are one
    parameter, no linear layers.
    Raises:
        ValueError: as `target_layers`.
    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685, initialised as peft does; router of H-LoRA as its A.
    """
    kinds = target_layers(cfg, skeleton)
    if cfg.pattern == "all-linear":
        _warn_of_experts(skeleton)
    factors: Factors = {}
    scale: dict[str, float] = {}
    for name, kind in kinds.items():
        shape = skeleton.module.get_parameter(f"{name}.weight").shape
        # Tables and GPT-2's Conv1D lie as [in, out].
        width_out, width_in = (shape[0], shape[1]) if kind == "linear" else (shape[1], shape[0])
        if cfg.experts and kind == "embedding":
            raise ValueError(
                f"lora: {name} is an embedding, which has no hidden state to route by; "
                "experts need linear layers"
            )
        rank = _pattern_value(cfg.rank_pattern, name, cfg.rank)
        alpha = _pattern_value(cfg.alpha_pattern, name, cfg.alpha)
        # One factor is zero, so that the product is. The order of draws must stay: A or B, then the router.
        if kind == "embedding":
            a = torch.zeros(rank, width_in)
            b = torch.randn(width_out, rank, generator=gen)
        elif cfg.init == "gaussian":
            a = torch.randn(rank, width_in, generator=gen) / rank
            b = torch.zeros(width_out, rank)
        else:
            a = _kaiming(rank, width_in, gen)
            b = torch.zeros(width_out, rank)
        factors[name] = {"a": a.to(device), "b": b.to(device)}
        if cfg.experts:
            factors[name]["router"] = _kaiming(cfg.experts, width_in, gen).to(device)
        # Alpha counts against the ranks of one expert, rank / n, so the scale of all ranks is n times larger.
        divisor = math.sqrt(rank) if cfg.rslora else rank
        scale[name] = alpha / divisor * max(1, cfg.experts)
    return Adapter(factors=factors, scale=scale, kinds=kinds, dropout=cfg.dropout)


def _warn_of_experts(skeleton: Any) -> None:
    sizes = {}
    for name, p in skeleton.module.named_parameters():
        if p.dim() == 3 and EXPERTS.search(name):
            sizes[name] = p.numel()
    if sizes:
        warnings.warn(
            f"lora: all-linear does not adapt experts: {next(iter(sizes))} and {len(sizes) - 1} more hold "
            f"{sum(sizes.values()):,} numbers as parameters outside of layers, which stay as they are",
            stacklevel=3,
        )


def apply_lora(
    params: Mapping[str, Tensor], adapter: Adapter, *, rows: Tensor | None = None, train: bool = False
) -> dict[str, Tensor]:
    """The params with the adapter on them; nothing is copied and nothing of the base is changed.

    Args:
        params: of any kind of weights, 4-bit, sharded or adapted ones among them.
        rows: int64 [visual tokens], the sample each belongs to (`vlm.visual_rows(ids, token)`): needed when
            the adapter has a gate per sample and corrects layers of a vision tower.
        train: the adapter's dropout is on.
    Raises:
        ValueError: a layer that the params do not have, factors that do not fit, or `rows` missing.
    """
    # The layers' corrections come after the replaced tensors: one may lie over the other.
    adapted = dict(params)
    for name, replacement in adapter.full.items():
        present = list(params[name].shape) if name in params else "nothing"
        if present != list(replacement.shape):
            raise ValueError(
                f"apply_lora: {adapter} replaces {name} {list(replacement.shape)}, "
                f"the model has {present} there"
            )
        adapted[name] = replacement.to(params[name].device)
    for module, factors in adapter.factors.items():
        name = _weight_name(params, module)
        gate = adapter.gate.get(module)
        per_sample = gate is not None and gate.dim() == 2
        # The rows that a vision tower sees are patches of several samples, so a gate per sample must be told
        # whose they are.
        needs_rows = per_sample and VISION.search(module) is not None
        if needs_rows and rows is None:
            raise ValueError(
                f"apply_lora: {module} sees images and its weights differ by sample; "
                "give rows=vlm.visual_rows(ids, image token)"
            )
        try:
            adapted[name] = low_rank(
                adapted[name],
                factors["a"],
                factors["b"],
                scale=adapter.scale[module],
                gate=gate,
                router=factors.get("router"),
                rows=rows if needs_rows else None,
                kind=adapter.kinds[module],
                dropout=adapter.dropout if train else 0.0,
            )
        except ValueError as e:
            raise ValueError(
                f"apply_lora: {module} of {adapter}: {e}; was the adapter made for another model?"
            ) from e
    return adapted


def without_copies(adapter: Adapter, params: Mapping[str, Tensor]) -> Adapter:
    """The adapter without whole tensors that are the base's own, up to the rounding of the base's dtype.

    peft saves the token table or the head untouched beside an adapter that corrects it. An adapter that
    replaces nothing can be mixed with others.
    """
    replaced = {}
    for name, tensor in adapter.full.items():
        if not _is_copy(tensor, params.get(name)):
            replaced[name] = tensor
    return evolve(adapter, full=replaced)


def _is_copy(tensor: Tensor, base: Tensor | None) -> bool:
    # What a 4-bit base was before it was rounded is not known, so a tensor over it counts as another one.
    if base is None or isinstance(base, Lazy) or base.shape != tensor.shape:
        return False
    return torch.equal(tensor.to(base.device, base.dtype), base)


@frozen(kw_only=True, eq=False)
class Merged:
    """Plain weights with an adapter added in, and what that changed."""

    params: dict[str, Tensor] = field(repr=False)
    change: dict[str, float]  # |s B A| / |W| of each module (Frobenius norms)
    # |rounded - exact| / |s B A|: the share of the correction that the dtype of the result rounds away.
    lost: dict[str, float]


def merge_adapter(
    params: Mapping[str, Tensor],
    adapter: Adapter,
    *,
    dtype: torch.dtype | None = None,
    also_head: bool = False,
) -> Merged:
    """Add an adapter into its weights, for export: 4-bit weights are written out, the sum is rounded to
    `dtype` (default: the weight's).

    Args:
        also_head: let an embedding that is tied to the head take its correction along; unmerged, the head
            does not see it.
    Raises:
        ValueError: a gate per sample or token cannot be merged, the adapter does not fit, or it corrects one
            of two tied layers: the head (untie them first), or an embedding that may be tied to it.
    """
    # A module without a weight of its own uses that of another layer, which would change too.
    sharing = [module for module in adapter.factors if f"{module}.weight" not in params]
    if sharing:
        raise ValueError(
            f"merge_adapter: {sharing[0]} has the weight {_weight_name(params, sharing[0])} of another "
            "layer, which its adapter does not adapt; untie them first (skeleton, params = "
            "skeletons.untie(skeleton, params)), or keep the adapter separate"
        )
    # Whether an embedding is tied shows only in the missing weight of the head.
    may_be_tied = "lm_head.weight" not in params and not also_head
    embeddings = [module for module, kind in adapter.kinds.items() if kind == "embedding"]
    if may_be_tied and embeddings:
        raise ValueError(
            f"merge_adapter: {embeddings[0]} may be tied to the head, which its adapter does not adapt; "
            "untie them first (skeletons.untie), keep the adapter separate, or set also_head=True"
        )
    merged = dict(apply_lora(params, adapter))
    change: dict[str, float] = {}
    lost: dict[str, float] = {}
    for module in adapter.factors:
        name = _weight_name(params, module)
        # The sum is made in float32 over the written-out base, and then rounded once.
        base = dense(params[name]).float()
        try:
            exact = dense(_over_base(merged[name], base))
        except ValueError as e:
            raise ValueError(
                f"merge_adapter: {module}: {e}; keep the adapter separate, or compose it with one weight "
                "vector"
            ) from e
        rounded = exact.to(dtype or params[name].dtype)
        merged[name] = rounded
        correction = (exact - base).norm().clamp(min=1e-30)  # no division by 0 below
        change[module] = float(correction / base.norm().clamp(min=1e-30))
        lost[module] = float((rounded.float() - exact).norm() / correction)
    return Merged(params=merged, change=change, lost=lost)


def _over_base(w: Tensor, base: Tensor) -> Tensor:
    """The same correction over another base."""
    assert isinstance(w, Lazy)  # `apply_lora` put it there
    attributes: dict[str, Any] = dict(w.__dict__)
    del attributes["base"]
    return low_rank(base, **attributes)


def count_adapter(adapter: Adapter, params: Mapping[str, Tensor]) -> tuple[int, int, float]:
    """(numbers to train, numbers of the model without them, their share of the sum in percent)."""
    trained = sum(t.numel() for t in adapter.full.values())
    for factors in adapter.factors.values():
        trained += sum(t.numel() for t in factors.values())
    base = sum(w.numel() for w in params.values())
    return trained, base, 100 * trained / max(1, trained + base)


def move_adapter(
    adapter: Adapter, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Adapter:
    """The adapter elsewhere or in another precision.

    Raises:
        ValueError: a dtype that is no float.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"lora.move_adapter: factors are floats, got {dtype}")

    def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}

    factors = {module: move(f) for module, f in adapter.factors.items()}
    return evolve(adapter, factors=factors, gate=move(adapter.gate), full=move(adapter.full))


def _weight_name(params: Mapping[str, Tensor], module: str) -> str:
    """The name of a module's weight; a tied head has its embedding's."""
    name = f"{module}.weight"
    if name in params:
        return name
    tables = [n for n in params if _TABLE.search(n)]
    if module.rpartition(".")[2] == "lm_head" and len(tables) == 1:
        return tables[0]
    # Four names from all over the model show what its weights are called.
    step = max(1, len(params) // 4)
    examples = ", ".join(list(params)[::step][:4])
    raise ValueError(f"apply_lora: the model has no weight {name}; its weights look like {examples}")


def _layer_kind(module: nn.Module) -> str:
    """ "linear", "embedding" or "conv1d"; "" for what no adapter can be on."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    # By name, as only hub imports transformers.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    return ""


def _is_end(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _last_names(layers: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers}))


def _pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, as peft has it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _kaiming(rows: int, columns: int, gen: Generator) -> Tensor:
    """Uniform in +-1 / sqrt(columns): kaiming_uniform with a = sqrt(5)."""
    uniform = torch.rand(rows, columns, generator=gen) * 2 - 1
    return uniform / math.sqrt(columns)
