"""The sums over patches of which every kind of `compress` is made: blocks of them, added up in any order.

Shapes: b slides, n patches, k slots, d width, h heads; g groups of r rows (heads and slots) with values of width v.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from einops import rearrange
from torch import Generator, Tensor

from medvl.base import config
from medvl.base.tree import Tree, flatten, map_leaves
from medvl.components import layers

Read = Callable[[Tensor], tuple[Tensor, Tensor]]

_BLOCK = {
    "cpu": 1024
}  # patches multiplied at once, 16384 elsewhere: few enough for float32 sums, and on a CPU for its cache
_TINY = 1e-9  # what the reference adds to a slot's mass


@frozen(kw_only=True)
class CompressConfig:
    """`moe`: each patch goes to top_k slots, a slot is the weighted mean of its patches, seen by an expert of its own.
    `soft_moe`: each slot is a softmax over all patches by cosine, seen by its expert. `attention`: gated attention, heads x slots of them.
    `perceiver`: learned latents that look at the patches, once or several times. `mean`: every slot is the mean of all patches, seen by its
    expert; what others are measured against."""

    kind: Literal["moe", "soft_moe", "perceiver", "attention", "mean"] = "moe"
    dim: int = 1024
    slots: int = 16
    hidden: int = 512  # width inside the experts (moe, soft_moe, mean), the feed-forward (perceiver) or the gated scores (attention)
    top_k: int = 2  # moe: slots of a patch
    noise: float = 0.1  # moe: standard deviation of what is added to the logits of the router; only where a generator is given
    dropout: float = 0.25  # only where a generator is given
    heads: int = 8  # perceiver, attention
    passes: int = 1  # perceiver: how often the latents look; a stream is read as often

    def __attrs_post_init__(self) -> None:
        if (
            min(self.dim, self.slots, self.hidden, self.heads, self.passes) < 1
            or not 1 <= self.top_k <= self.slots
        ):
            raise ValueError(f"CompressConfig: sizes must be positive and top_k lie in 1..slots, got {self}")
        if self.kind in ("perceiver", "attention") and self.dim % self.heads:
            raise ValueError(
                f"CompressConfig: dim must be a multiple of heads, got dim={self.dim}, heads={self.heads}"
            )
        if self.passes > 1 and self.kind != "perceiver":
            raise ValueError(
                f"CompressConfig: only a perceiver looks several times, got passes={self.passes} and kind {self.kind!r}"
            )
        if self.noise < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"CompressConfig: noise must be >= 0 and dropout lie in [0, 1), got {self.noise}, {self.dropout}"
            )
        config.check_bounds(
            self,
            "CompressConfig",
            dim=config.WIDTH,
            hidden=config.WIDTH,
            slots=(1, 2**14),
            heads=config.DEPTHS,
        )
        config.check_bounds(self, "CompressConfig", passes=config.DEPTHS, noise=(0, 100))


@frozen(kw_only=True, eq=False)
class SlotState:
    """Sums over the patches of a slide so far, float64; g groups of r rows (heads and slots) with values of width v."""

    top: Tensor  # [b, g, r], the largest score, to which the next two are relative; 0 for moe
    weight: Tensor  # [b, g, r]
    total: Tensor  # [b, g, r, v]
    sums: dict[str, Tensor]  # "patches" [b]; moe: "chosen", "probability" [b, k], "lse", "lse2" [b]
    latents: Tensor | None = None  # perceiver: [b, k, d], who looks in this pass
    turn: int = 0  # perceiver: which pass


def empty_state(
    cfg: CompressConfig, p: Tree, b: int, latents: Tensor | None = None, turn: int = 0
) -> SlotState:
    """No patches yet."""
    k, d = cfg.slots, cfg.dim
    groups, rows, width = {
        "attention": (cfg.heads, k, d // cfg.heads),
        "perceiver": (1, cfg.heads * k, d),
    }.get(cfg.kind, (1, k, d))
    if cfg.kind == "perceiver" and latents is None:
        latents = p["latents"].expand(b, -1, -1)
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=compute_device(p))
    sums = {"patches": zeros(b)}
    if cfg.kind == "moe":
        sums |= {"chosen": zeros(b, k), "probability": zeros(b, k), "lse": zeros(b), "lse2": zeros(b)}
    top = zeros(b, groups, rows) if cfg.kind == "moe" else zeros(b, groups, rows) - math.inf
    total = zeros(b, groups, rows, width)
    return SlotState(
        top=top, weight=zeros(b, groups, rows), total=total, sums=sums, latents=latents, turn=turn
    )


def block_buffer(p: Tree, b: int, n: int, d: int) -> Tensor:
    """Memory for a block of `block_sums`: fresh pages for each would take as long as the products."""
    device = compute_device(p)
    return torch.empty(b, min(n, _BLOCK.get(device.type, 16384)), d, dtype=compute_dtype(p), device=device)


def block_sums(
    cfg: CompressConfig, p: Tree, read: Read, x: Tensor, mask: Tensor | None, held: Tensor | None = None
) -> Iterator[tuple[SlotState, Tensor]]:
    """The sums of each block of patches, and the scores [b, n, g, r] that they were made from (moe: the weights).

    Without gradients blocks are widened in `held`, from `block_buffer`.
    """
    device, dtype = compute_device(p), compute_dtype(p)
    if held is None and not torch.is_grad_enabled():
        held = block_buffer(p, *x.shape)
    for i in range(0, x.shape[1], size := _BLOCK.get(device.type, 16384)):
        block, keep = x[:, i : i + size], None if mask is None else mask[:, i : i + size].to(device)
        if held is None or (keep is None and (x.dtype, x.device) == (dtype, device)):
            block = block.to(device, dtype)
        else:
            block = held[:, : block.shape[1]].copy_(block)
        if keep is not None:  # before any arithmetic: 0 x NaN is NaN, in gradients too
            block = (
                block.masked_fill(~keep[..., None], 0.0)
                if held is None
                else block.masked_fill_(~keep[..., None], 0.0)
            )
        yield _part(cfg, *read(block), keep)


def _part(
    cfg: CompressConfig, scores: Tensor, values: Tensor, keep: Tensor | None
) -> tuple[SlotState, Tensor]:
    b, n = scores.shape[:2]
    sums = {"patches": scores.new_full((b,), n) if keep is None else keep.sum(1)}
    if cfg.kind == "moe":
        logits, exists = (
            scores[:, :, 0],
            scores.new_ones(b, n, 1) if keep is None else keep[..., None].to(scores.dtype),
        )
        lse, probability = logits.logsumexp(-1) * exists[..., 0], logits.softmax(-1) * exists
        chosen = _largest(logits.detach(), cfg.top_k) * exists
        sums |= {
            "chosen": chosen.sum(1),
            "probability": probability.sum(1),
            "lse": lse.sum(1),
            "lse2": lse.square().sum(1),
        }
        top, weight = torch.zeros_like(scores[:, 0]), (probability * chosen)[:, :, None]
    else:
        scores = scores if keep is None else scores.masked_fill(~keep[..., None, None], -math.inf)
        top = scores.detach().amax(1)
        weight = (scores - finite_top(top)[:, None]).exp()
    total = torch.einsum("bngr,bngv->bgrv", weight, values)
    part = SlotState(
        top=top.double(),
        weight=weight.sum(1).double(),
        total=total.double(),
        sums={n: t.double() for n, t in sums.items()},
    )
    return part, weight if cfg.kind == "moe" else scores


def add_states(a: SlotState, b: SlotState) -> SlotState:
    """The sums of both; latents and pass are those of a.

    Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    top = torch.maximum(a.top, b.top)
    old, new = ((s.top - finite_top(top)).exp() for s in (a, b))
    return evolve(
        a,
        top=top,
        weight=a.weight * old + b.weight * new,
        total=a.total * old[..., None] + b.total * new[..., None],
        sums={n: t + b.sums[n] for n, t in a.sums.items()},
    )


def finite_top(top: Tensor) -> Tensor:
    """Where there is no score yet, 0: -inf - -inf would be NaN."""
    return top.masked_fill(top == -math.inf, 0.0)


def _largest(logits: Tensor, top_k: int) -> Tensor:
    """1 at the top_k largest of each row, the first of equal ones (topk takes any of them, and is slower)."""
    found = torch.zeros_like(logits)
    for _ in range(top_k):
        i = logits.argmax(-1, keepdim=True)
        found, logits = found.scatter(-1, i, 1.0), logits.scatter(-1, i, -math.inf)
    return found


def make_scorer(cfg: CompressConfig, p: Tree, state: SlotState, gen: Generator | None) -> Read:
    """From patches [b, n, d] to scores [b, n, g, r] and values [b, n, g, v]."""
    if cfg.kind == "attention":

        def gated(x: Tensor) -> tuple[Tensor, Tensor]:
            a = layers.linear(p["tanh"], x).tanh() * layers.linear(p["sigmoid"], x).sigmoid()
            scores = layers.linear(p["score"], dropout(a, cfg.dropout, gen))
            return scores.unflatten(-1, (cfg.heads, cfg.slots)), x.unflatten(-1, (cfg.heads, -1))

        return gated
    if cfg.kind == "perceiver":
        layer = p["layers"][str(state.turn)]
        asks = _asks(cfg, layer, state)

        def looked(x: Tensor) -> tuple[Tensor, Tensor]:
            x = layers.norm(layer["patches"], x)
            return (x @ asks.mT)[:, :, None], x[:, :, None]

        return looked
    if cfg.kind == "mean":
        return lambda x: (x.new_zeros(*x.shape[:2], 1, cfg.slots), x[:, :, None])
    if cfg.kind == "soft_moe":
        mu = p["scale"] * F.normalize(p["mu"], dim=-1, eps=1e-6)
        return lambda x: ((F.normalize(x, dim=-1, eps=1e-6) @ mu.T)[:, :, None], x[:, :, None])

    def routed(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = layers.linear(p["gate"], x)
        if gen is not None and cfg.noise:
            logits = logits + cfg.noise * torch.randn(logits.shape, generator=gen, device=gen.device).to(
                logits
            )
        return logits[:, :, None], x[:, :, None]

    return routed


def _asks(cfg: CompressConfig, layer: Tree, state: SlotState) -> Tensor:
    """Queries with the key projection folded in, [b, (h k), d]: q W_k x costs heads x slots products of width d per patch instead of d.

    The value projection waits likewise until patches are summed up.
    """
    assert state.latents is not None
    q = rearrange(
        layers.linear(layer["q"], layers.norm(layer["latents"], state.latents)),
        "b k (h e) -> b h k e",
        h=cfg.heads,
    )
    keys = rearrange(layer["k"]["weight"], "(h e) d -> h e d", h=cfg.heads)
    return (torch.einsum("bhke,hed->bhkd", q, keys) * q.shape[-1] ** -0.5).flatten(1, 2)


def with_latents(cfg: CompressConfig, p: Tree, state: SlotState) -> SlotState:
    """The state with what is seen beside the patches: the latents themselves."""
    if cfg.kind != "perceiver":
        return state
    assert state.latents is not None
    layer = p["layers"][str(state.turn)]
    own = layers.norm(layer["latents"], state.latents)
    return add_states(
        state, _part(cfg, (own @ _asks(cfg, layer, state).mT)[:, :, None], own[:, :, None], None)[0]
    )


def update_latents(cfg: CompressConfig, p: Tree, state: SlotState, gen: Generator | None) -> Tensor:
    """The latents [b, k, d] after a pass."""
    assert state.latents is not None
    layer = p["layers"][str(state.turn)]
    seen = rearrange(slot_means(cfg, p, with_latents(cfg, p, state)), "b 1 (h k) d -> b h k d", h=cfg.heads)
    values = rearrange(layer["v"]["weight"], "(h e) d -> h e d", h=cfg.heads)
    seen = rearrange(torch.einsum("bhkd,hed->bhke", seen, values), "b h k e -> b k (h e)")
    z = state.latents + layers.linear(layer["out"], seen)
    return z + layers.linear(
        layer["down"],
        dropout(F.gelu(layers.linear(layer["up"], layers.norm(layer["norm"], z))), cfg.dropout, gen),
    )


def slot_means(cfg: CompressConfig, p: Tree, state: SlotState) -> Tensor:
    """What each row saw, [b, g, r, v]; 0 where nothing."""
    weight = state.weight + _TINY if cfg.kind == "moe" else state.weight.masked_fill(state.weight == 0, 1.0)
    return (state.total / weight[..., None]).to(compute_dtype(p))


def slot_shares(cfg: CompressConfig, raw: Tensor, closed: SlotState) -> Tensor:
    """Weights [b, n, k] from what `block_sums` gives, the mean over heads; `with_latents` has the sums over all patches."""
    if cfg.kind == "moe":
        return raw[:, :, 0]
    weight = closed.weight.masked_fill(closed.weight == 0, 1.0)
    share = (raw - finite_top(closed.top)[:, None]).exp() / weight[:, None]
    return share.flatten(2).unflatten(-1, (-1, cfg.slots)).mean(2).to(raw.dtype)


def dropout(x: Tensor, rate: float, gen: Generator | None) -> Tensor:
    """Dropout, where there is a generator."""
    if gen is None or not rate:
        return x
    return x * (torch.rand(x.shape, generator=gen, device=gen.device).to(x.device) >= rate) / (1 - rate)


def compute_dtype(p: Tree) -> torch.dtype:
    """In which all is computed: float32, float64 if a parameter is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in flatten(p).values()) else torch.float32


def compute_device(p: Tree) -> torch.device:
    """Where all is computed."""
    return next(iter(flatten(p).values())).device


def widen(p: Tree) -> Tree:
    """The parameters in that dtype."""
    dtype = compute_dtype(p)
    return map_leaves(lambda t: t.to(dtype), p)
