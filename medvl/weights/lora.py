"""Adapters: low-rank corrections of the weights of a model (LoRA), and the same with a gate per token (H-LoRA)."""

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
VISION = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|vision_embed_tokens|multi_modal_projector|mm_projector)(\.|$)"
)
_HEAD = re.compile(r"(^|\.)(lm_head|score|classifier|head)$")


@frozen(kw_only=True)
class LoraConfig:
    """Which layers an adapter corrects, and how. Names and meaning as in peft."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0
    # Names of layers, or ends of names; layers of a vision tower or projector only if `vision`. Or one regex in `pattern` for full names.
    targets: tuple[str, ...] = ()
    pattern: str = field(
        default="", metadata={"unless": "targets"}
    )  # "all-linear": every linear layer but the head
    vision: bool = False
    exclude: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(factory=dict)  # regex for the end of a name -> rank
    alpha_pattern: dict[str, float] = field(factory=dict)
    experts: int = 0  # n > 0: H-LoRA, n experts of rank / n each, mixed per token by a router
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __attrs_post_init__(self) -> None:
        if isinstance(self.targets, str) or isinstance(self.exclude, str):
            raise ValueError(
                f"LoraConfig: targets and exclude are tuples of names, got {self.targets!r} and {self.exclude!r}"
            )
        ranks = [self.rank, *self.rank_pattern.values()]
        if min(ranks) < 1 or not 0 <= self.dropout < 1 or self.experts < 0:
            raise ValueError(
                f"LoraConfig: ranks must be positive, dropout in [0, 1), experts not negative, got {self}"
            )
        config.check_bounds(self, "LoraConfig", rank=config.WIDTH, alpha=(0, 1e6), experts=(0, 1024))
        if max(ranks) > config.WIDTH[1] or not all(
            0 <= alpha <= 1e6 for alpha in self.alpha_pattern.values()
        ):
            raise ValueError(
                f"LoraConfig: rank_pattern and alpha_pattern need ranks and alphas as above, got {self}"
            )
        if self.experts and any(r % self.experts for r in ranks):
            raise ValueError(f"LoraConfig: {self.experts} experts must divide the rank, got {ranks}")
        if bool(self.targets) == bool(self.pattern):
            raise ValueError(
                "LoraConfig: give either targets (names) or pattern (one regex, or 'all-linear')"
            )
        for regex in (self.pattern, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(regex)
            except re.error as e:
                raise ValueError(f"LoraConfig: {regex!r} is not a regular expression: {e}") from e


@frozen(kw_only=True, eq=False)
class Adapter:
    """Low-rank factors for layers of one model, as values; `apply_lora` puts them on params, `evolve(adapter, factors=...)` trains them.

    The correction of module m is `scale[m] * b diag(gate[m]) a`. A gate [b, r] has a row for each sample of the batch that will come.
    """

    factors: Factors
    scale: dict[str, float]
    kinds: dict[str, str]  # module -> "linear", "embedding" or "conv1d"
    gate: dict[str, Tensor] = field(factory=dict)
    full: dict[str, Tensor] = field(
        factory=dict
    )  # parameters that the adapter replaces as a whole (peft's modules_to_save)
    dropout: float = 0.0
    name: str = ""
    config: dict[str, Any] = field(factory=dict)  # the adapter_config.json it came from

    def rank(self, module: str) -> int:
        return len(self.factors[module]["a"])

    def __repr__(self) -> str:
        ranks = sorted({len(f["a"]) for f in self.factors.values()})
        return f"Adapter({self.name or 'unnamed'}: {len(self.factors)} layers, ranks {ranks}{', gated' if self.gate else ''})"


def target_layers(cfg: LoraConfig, skeleton: Any) -> dict[str, str]:
    """{module: kind} of the layers that `cfg` names, in the order of the model.

    Args:
        skeleton: `skeletons.Skeleton`; only names, types and shapes of its module are read.
    Raises:
        ValueError: a target that no layer has, or nothing left of it outside the vision tower (says what there is).
    """
    kinds = adaptable_layers(skeleton)
    excluded = {n for n in kinds if any(_ends(n, e) for e in cfg.exclude)}
    if cfg.pattern:
        linear = {
            n
            for n, k in kinds.items()
            if k != "embedding" and not _HEAD.search(n) and (cfg.vision or not VISION.search(n))
        }
        hit = linear if cfg.pattern == "all-linear" else {n for n in kinds if re.fullmatch(cfg.pattern, n)}
    else:
        hit = set()
        for t in cfg.targets:
            found = {n for n in kinds if _ends(n, t)}
            kept = {n for n in found if cfg.vision or not VISION.search(n)}
            if not kept:
                why = (
                    f"only layers of the vision tower ({sorted(found)[0]}...) end in it; set vision=True"
                    if found
                    else "no layer ends in it"
                )
                raise ValueError(f"lora: target {t!r}: {why}; there are {_ends_of(kinds)}")
            hit |= kept
    if not hit - excluded:
        raise ValueError(f"lora: {cfg.pattern or cfg.targets} names no layer; there are {_ends_of(kinds)}")
    return {n: k for n, k in kinds.items() if n in hit - excluded}


def adaptable_layers(skeleton: Any) -> dict[str, str]:
    """{module: kind} of every layer that an adapter can be on, in the order of the model."""
    return {n: k for n, m in skeleton.module.named_modules() if (k := _kind(m))}


def init_lora(
    cfg: LoraConfig, skeleton: Any, gen: Generator, *, device: str | torch.device = "cpu"
) -> Adapter:
    """A new adapter, float32: it changes nothing yet (B, or an embedding's A, is zero).

    A warning says how much of a mixture model "all-linear" leaves alone: the experts of a layer are one parameter, no linear layers.
    Raises:
        ValueError: as `target_layers`.
    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685, initialised as peft does; router of H-LoRA as its A.
    """
    factors: Factors = {}
    kinds, scale = target_layers(cfg, skeleton), {}
    experts = {
        n: p.numel() for n, p in skeleton.module.named_parameters() if p.dim() == 3 and EXPERTS.search(n)
    }
    if experts and cfg.pattern == "all-linear":
        warnings.warn(
            f"lora: all-linear corrects no experts: {next(iter(experts))} and {len(experts) - 1} more hold "
            f"{sum(experts.values()):,} numbers as parameters without a layer, which stay as they are",
            stacklevel=2,
        )
    for name, kind in kinds.items():
        shape = skeleton.module.get_parameter(f"{name}.weight").shape
        out, into = (shape[0], shape[1]) if kind == "linear" else (shape[1], shape[0])
        if cfg.experts and kind == "embedding":
            raise ValueError(
                f"lora: {name} is an embedding, which has no hidden state to route by; experts need linear layers"
            )
        r = _first(cfg.rank_pattern, name, cfg.rank)
        alpha = _first(cfg.alpha_pattern, name, cfg.alpha)
        if kind == "embedding":
            made = {"a": torch.zeros(r, into), "b": torch.randn(out, r, generator=gen)}
        else:
            a = torch.randn(r, into, generator=gen) / r if cfg.init == "gaussian" else _kaiming(r, into, gen)
            made = {"a": a, "b": torch.zeros(out, r)}
        if cfg.experts:
            made["router"] = _kaiming(cfg.experts, into, gen)
        factors[name] = {k: t.to(device) for k, t in made.items()}
        scale[name] = alpha / (math.sqrt(r) if cfg.rslora else r) * max(1, cfg.experts)
    return Adapter(factors=factors, scale=scale, kinds=kinds, dropout=cfg.dropout)


def apply_lora(
    params: Mapping[str, Tensor], adapter: Adapter, *, rows: Tensor | None = None, train: bool = False
) -> dict[str, Tensor]:
    """The params with the adapter on them; nothing is copied and nothing of the base is changed.

    Args:
        params: of any kind of weights, 4-bit, sharded or adapted ones among them.
        rows: int64 [visual tokens], the sample each belongs to (`vlm.visual_rows(ids, token)`): needed when the adapter has a gate per
            sample and corrects layers of a vision tower.
        train: the adapter's dropout is on.
    Raises:
        ValueError: a layer that the params do not have, factors that do not fit, or `rows` missing.
    """
    done = dict(params)
    for where, t in adapter.full.items():
        if where not in params or params[where].shape != t.shape:
            held = list(params[where].shape) if where in params else "nothing"
            raise ValueError(
                f"apply_lora: {adapter} replaces {where} {list(t.shape)}, the model has {held} there"
            )
        done[where] = t.to(params[where].device)
    for name, f in adapter.factors.items():
        where, gate = _parameter(params, name), adapter.gate.get(name)
        seen = VISION.search(name) is not None and gate is not None and gate.dim() == 2
        if seen and rows is None:
            raise ValueError(
                f"apply_lora: {name} sees images and its weights differ by sample; give rows=vlm.visual_rows(ids, image token)"
            )
        try:
            done[where] = low_rank(
                done[where],
                f["a"],
                f["b"],
                scale=adapter.scale[name],
                gate=gate,
                router=f.get("router"),
                rows=rows if seen else None,
                kind=adapter.kinds[name],
                dropout=adapter.dropout if train else 0.0,
            )
        except ValueError as e:
            raise ValueError(
                f"apply_lora: {name} of {adapter}: {e}; was the adapter made for another model?"
            ) from e
    return done


def without_copies(adapter: Adapter, params: Mapping[str, Tensor]) -> Adapter:
    """The adapter without whole tensors that are the base's own, up to the rounding of the base's dtype.

    peft saves the token table or the head untouched beside an adapter that corrects it. An adapter that replaces
    nothing can be mixed with others.
    """
    changed = {}
    for name, tensor in adapter.full.items():
        base = params.get(name)
        same = base is not None and not isinstance(base, Lazy) and base.shape == tensor.shape
        if base is None or not same or not torch.equal(tensor.to(base.device, base.dtype), base):
            changed[name] = tensor
    return evolve(adapter, full=changed)


@frozen(kw_only=True, eq=False)
class Merged:
    """Plain weights with an adapter added in, and what that changed."""

    params: dict[str, Tensor] = field(repr=False)
    change: dict[str, float]  # |s B A| / |W| of each module (Frobenius norms)
    lost: dict[
        str, float
    ]  # |rounded - exact| / |s B A|: how much of the correction the dtype of the result rounds away


def merge_adapter(
    params: Mapping[str, Tensor],
    adapter: Adapter,
    *,
    dtype: torch.dtype | None = None,
    also_head: bool = False,
) -> Merged:
    """Add an adapter into its weights, for export: 4-bit weights are written out, the sum is rounded to `dtype` (default: the weight's).

    Args:
        also_head: let an embedding that is tied to the head take its correction along; unmerged, the head does not see it.
    Raises:
        ValueError: a gate per sample or token cannot be merged, the adapter does not fit, or it corrects one of two tied layers: the head
            (untie them first), or an embedding that may be tied to it.
    """
    sharing = [m for m in adapter.factors if f"{m}.weight" not in params]
    if sharing:
        raise ValueError(
            f"merge_adapter: {sharing[0]} has the weight {_parameter(params, sharing[0])} of another layer, which its adapter does not correct; "
            "give them a weight each (skeleton, params = hub.untie(skeleton, params)), or keep the adapter apart"
        )
    tied = (
        [m for m, k in adapter.kinds.items() if k == "embedding"]
        if "lm_head.weight" not in params and not also_head
        else []
    )
    if tied:
        raise ValueError(
            f"merge_adapter: {tied[0]} may be tied to the head, which its adapter does not correct; give them a weight each (hub.untie), "
            "keep the adapter apart, or say also_head=True"
        )
    merged, change, lost = dict(apply_lora(params, adapter)), {}, {}
    for name in adapter.factors:
        where = _parameter(params, name)
        base = dense(params[where]).float()
        w = merged[where]
        try:
            exact = dense(low_rank_over(w, base))
        except ValueError as e:
            raise ValueError(
                f"merge_adapter: {name}: {e}; keep the adapter apart, or compose it with one weight vector"
            ) from e
        out = exact.to(dtype or params[where].dtype)
        merged[where] = out
        size = (exact - base).norm().clamp(min=1e-30)
        change[name] = float(size / base.norm().clamp(min=1e-30))
        lost[name] = float((out.float() - exact).norm() / size)
    return Merged(params=merged, change=change, lost=lost)


def low_rank_over(w: Tensor, base: Tensor) -> Tensor:
    """The same correction over another base."""
    assert isinstance(w, Lazy)
    held: dict[str, Any] = {k: v for k, v in w.__dict__.items() if k != "base"}
    return low_rank(base, **held)


def count_adapter(adapter: Adapter, params: Mapping[str, Tensor]) -> tuple[int, int, float]:
    """(numbers to train, numbers of the model without them, their share of the sum in percent)."""
    own = sum(t.numel() for f in adapter.factors.values() for t in f.values()) + sum(
        t.numel() for t in adapter.full.values()
    )
    base = sum(w.numel() for w in params.values())
    return own, base, 100 * own / max(1, own + base)


def move_adapter(
    adapter: Adapter, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Adapter:
    """The adapter elsewhere or in another precision.

    Raises:
        ValueError: a dtype that is no float.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"lora.move_adapter: factors are floats, got {dtype}")
    move = lambda held: {k: t.to(device=device, dtype=dtype) for k, t in held.items()}
    factors = {m: move(f) for m, f in adapter.factors.items()}
    return evolve(adapter, factors=factors, gate=move(adapter.gate), full=move(adapter.full))


def _parameter(params: Mapping[str, Tensor], module: str) -> str:
    """The name of the module's weight; a tied head has its embedding's."""
    if (name := f"{module}.weight") in params:
        return name
    shared = [n for n in params if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings)\.weight$", n)]
    if module.rpartition(".")[2] == "lm_head" and len(shared) == 1:
        return shared[0]
    raise ValueError(
        f"apply_lora: the model has no weight {name}; its weights look like {', '.join(list(params)[:: max(1, len(params) // 4)][:4])}"
    )


def _kind(m: nn.Module) -> str:
    if isinstance(m, nn.Linear):
        return "linear"
    if isinstance(m, nn.Embedding):
        return "embedding"
    return "conv1d" if type(m).__name__ == "Conv1D" and hasattr(m, "nf") else ""


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _ends_of(kinds: Iterable[str]) -> str:
    return ", ".join(sorted({n.rpartition(".")[2] for n in kinds}))


def _first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _kaiming(rows: int, columns: int, gen: Generator) -> Tensor:
    """Uniform in +-1 / sqrt(columns): kaiming_uniform with a = sqrt(5)."""
    return (torch.rand(rows, columns, generator=gen) * 2 - 1) / math.sqrt(columns)
