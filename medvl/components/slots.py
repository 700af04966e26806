"""The sums over patches of which every kind of `compress` is made: blocks of them, added up in any order.

Shapes: b slides, n patches, k slots, d width, h heads; g groups of r rows (heads and slots) with values of
width v. A group is what shares its values: attention has a group for each head, [g = h, r = k, v = d / h];
all others have one, where a perceiver's rows are heads and slots, [1, h k, d], and the other kinds' slots,
[1, k, d].
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

Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]  # patches -> scores, values

# Patches multiplied at once: few enough for float32 sums, and on a CPU for its cache.
_BLOCK = {"cpu": 1024}
_BLOCK_ELSEWHERE = 16384
_TINY = 1e-9  # what the reference adds to a slot's mass


@frozen(kw_only=True)
class CompressConfig:
    """How patches become tokens.

    `moe`: each patch goes to top_k slots, a slot is the weighted mean of its patches, transformed by an
        expert of its own.
    `soft_moe`: each slot is a softmax over all patches by cosine, transformed by its expert.
    `attention`: gated attention, heads x slots of them.
    `perceiver`: learned latents attend to the patches, once or several times.
    `mean`: every slot is the mean of all patches, transformed by its expert; the baseline of the others.
    """

    kind: Literal["moe", "soft_moe", "perceiver", "attention", "mean"] = "moe"
    dim: int = 1024
    slots: int = 16
    # Width inside the experts (moe, soft_moe, mean), the feed-forward (perceiver) or the gated scores
    # (attention).
    hidden: int = 512
    top_k: int = 2  # moe: slots of a patch
    # moe: standard deviation of the noise on the logits of the router; only where a generator is given.
    noise: float = 0.1
    dropout: float = 0.25  # only where a generator is given
    heads: int = 8  # perceiver, attention
    passes: int = 1  # perceiver: how often the latents look; a stream is read as often

    def __attrs_post_init__(self) -> None:
        smallest = min(self.dim, self.slots, self.hidden, self.heads, self.passes)
        if smallest < 1 or not 1 <= self.top_k <= self.slots:
            raise ValueError(f"CompressConfig: sizes must be positive and top_k lie in 1..slots, got {self}")
        if self.kind in ("perceiver", "attention") and self.dim % self.heads:
            raise ValueError(
                f"CompressConfig: dim must be a multiple of heads, got dim={self.dim}, heads={self.heads}"
            )
        if self.passes > 1 and self.kind != "perceiver":
            raise ValueError(
                f"CompressConfig: only a perceiver can have several passes, got passes={self.passes} and "
                f"kind {self.kind!r}"
            )
        if self.noise < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "CompressConfig: noise must be >= 0 and dropout lie in [0, 1), "
                f"got {self.noise}, {self.dropout}"
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
    """Sums over the patches of a slide so far, float64; g groups of r rows (heads and slots) with values of
    width v.
    """

    top: Tensor  # [b, g, r], the largest score, to which the next two are relative; 0 for moe
    weight: Tensor  # [b, g, r]
    total: Tensor  # [b, g, r, v]
    sums: dict[str, Tensor]  # "patches" [b]; moe: "chosen", "probability" [b, k], "lse", "lse2" [b]
    latents: Tensor | None = None  # perceiver: [b, k, d], who looks in this pass
    pass_index: int = 0  # perceiver: which pass


def empty_state(
    cfg: CompressConfig, p: Tree, b: int, latents: Tensor | None = None, pass_index: int = 0
) -> SlotState:
    """The state of `b` slides without patches."""
    k = cfg.slots
    groups, rows, width = 1, k, cfg.dim
    if cfg.kind == "attention":
        groups, width = cfg.heads, cfg.dim // cfg.heads
    if cfg.kind == "perceiver":
        rows = cfg.heads * k
        # The first pass starts from the learned latents, the same for every slide.
        if latents is None:
            latents = p["latents"].expand(b, -1, -1)

    # float64: a sum over a million patches in float32 would depend on their order.
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=compute_device(p))

    sums = {"patches": zeros(b)}
    top = zeros(b, groups, rows)
    if cfg.kind == "moe":
        sums |= {"chosen": zeros(b, k), "probability": zeros(b, k), "lse": zeros(b), "lse2": zeros(b)}
    else:
        top = top - math.inf  # no score yet
    return SlotState(
        top=top,
        weight=zeros(b, groups, rows),
        total=zeros(b, groups, rows, width),
        sums=sums,
        latents=latents,
        pass_index=pass_index,
    )


def block_buffer(p: Tree, b: int, n: int, d: int) -> Tensor:
    """Memory for a block of `block_sums`: allocating each anew takes as long as the products."""
    device = compute_device(p)
    return torch.empty(b, min(n, _block_size(device)), d, dtype=compute_dtype(p), device=device)


def _block_size(device: torch.device) -> int:
    return _BLOCK.get(device.type, _BLOCK_ELSEWHERE)


def block_sums(
    cfg: CompressConfig,
    p: Tree,
    score: Scorer,
    x: Tensor,
    mask: Tensor | None,
    buffer: Tensor | None = None,
) -> Iterator[tuple[SlotState, Tensor]]:
    """For each block of patches its sums, and the scores [b, n, g, r] that they were made from (moe: the
    weights).

    Without gradients blocks are converted in `buffer`, from `block_buffer`.
    """
    device, dtype = compute_device(p), compute_dtype(p)
    size = _block_size(device)
    if buffer is None and not torch.is_grad_enabled():
        buffer = block_buffer(p, *x.shape)
    for start in range(0, x.shape[1], size):
        block = x[:, start : start + size]
        keep = None if mask is None else mask[:, start : start + size].to(device)
        # What neither is converted nor masked needs no copy.
        usable = keep is None and (x.dtype, x.device) == (dtype, device)
        if buffer is None or usable:
            block = block.to(device, dtype)
        else:
            block = buffer[:, : block.shape[1]].copy_(block)
        # Masked before any arithmetic: 0 x NaN is NaN, in gradients too. In place only in the buffer.
        if keep is not None and buffer is None:
            block = block.masked_fill(~keep[..., None], 0.0)
        elif keep is not None:
            block = block.masked_fill_(~keep[..., None], 0.0)
        scores, values = score(block)
        yield _sum_block(cfg, scores, values, keep)


def _sum_block(
    cfg: CompressConfig, scores: Tensor, values: Tensor, keep: Tensor | None
) -> tuple[SlotState, Tensor]:
    """The sums of one block, and its scores (moe: weights); scores [b, n, g, r], values [b, n, g, v]."""
    b, n = scores.shape[:2]
    if keep is None:
        exists = scores.new_ones(b, n, 1)
        sums = {"patches": scores.new_full((b,), n)}
    else:
        exists = keep[..., None].to(scores.dtype)
        sums = {"patches": keep.sum(1)}
    if cfg.kind == "moe":
        logits = scores[:, :, 0]  # [b, n, k]
        lse = logits.logsumexp(-1) * exists[..., 0]
        probability = logits.softmax(-1) * exists
        # Which slots are chosen has no gradient; how much a patch counts in them has.
        chosen = _largest(logits.detach(), cfg.top_k) * exists
        sums["chosen"] = chosen.sum(1)
        sums["probability"] = probability.sum(1)
        sums["lse"] = lse.sum(1)
        sums["lse2"] = lse.square().sum(1)
        top = torch.zeros_like(scores[:, 0])
        weight = (probability * chosen)[:, :, None]
    else:
        if keep is not None:
            scores = scores.masked_fill(~keep[..., None, None], -math.inf)
        # Relative to the largest score, so that exp cannot overflow. It cancels out, hence no gradient.
        top = scores.detach().amax(1)
        weight = (scores - finite_top(top)[:, None]).exp()
    total = torch.einsum("bngr,bngv->bgrv", weight, values)
    state = SlotState(
        top=top.double(),
        weight=weight.sum(1).double(),
        total=total.double(),
        sums={name: t.double() for name, t in sums.items()},
    )
    # A softmax over patches is known only at the end; the router's weights are final.
    return state, weight if cfg.kind == "moe" else scores


def add_states(a: SlotState, b: SlotState) -> SlotState:
    """The sums of both; latents and pass are those of a.

    Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    top = torch.maximum(a.top, b.top)
    # Both become relative to the larger top; one without scores (-inf) has the factor 0.
    common = finite_top(top)
    factor_a = (a.top - common).exp()
    factor_b = (b.top - common).exp()
    return evolve(
        a,
        top=top,
        weight=a.weight * factor_a + b.weight * factor_b,
        total=a.total * factor_a[..., None] + b.total * factor_b[..., None],
        sums={name: t + b.sums[name] for name, t in a.sums.items()},
    )


def finite_top(top: Tensor) -> Tensor:
    """0 where there is no score yet: -inf - -inf would be NaN."""
    return top.masked_fill(top == -math.inf, 0.0)


def _largest(logits: Tensor, top_k: int) -> Tensor:
    """1 at the top_k largest of each row, the first of equal ones (topk takes any of them, and is slower)."""
    chosen = torch.zeros_like(logits)
    for _ in range(top_k):
        i = logits.argmax(-1, keepdim=True)
        chosen = chosen.scatter(-1, i, 1.0)
        logits = logits.scatter(-1, i, -math.inf)
    return chosen


def make_scorer(cfg: CompressConfig, p: Tree, state: SlotState, gen: Generator | None) -> Scorer:
    """The function from patches [b, n, d] to scores [b, n, g, r] and values [b, n, g, v]."""
    if cfg.kind == "attention":

        def score_gated(x: Tensor) -> tuple[Tensor, Tensor]:
            signal = layers.linear(p["tanh"], x).tanh()
            gate = layers.linear(p["sigmoid"], x).sigmoid()
            gated = dropout(signal * gate, cfg.dropout, gen)
            scores = layers.linear(p["score"], gated)  # [b, n, h k]
            scores_by_head = scores.unflatten(-1, (cfg.heads, cfg.slots))
            values_by_head = x.unflatten(-1, (cfg.heads, -1))
            return scores_by_head, values_by_head

        return score_gated
    if cfg.kind == "perceiver":
        layer = p["layers"][str(state.pass_index)]
        queries = _folded_queries(cfg, layer, state)

        def score_by_latents(x: Tensor) -> tuple[Tensor, Tensor]:
            x = layers.norm(layer["patches"], x)
            scores = x @ queries.mT
            return scores[:, :, None], x[:, :, None]

        return score_by_latents
    if cfg.kind == "mean":

        def score_equally(x: Tensor) -> tuple[Tensor, Tensor]:
            # The softmax of equal scores over patches is the mean.
            b, n, _ = x.shape
            return x.new_zeros(b, n, 1, cfg.slots), x[:, :, None]

        return score_equally
    if cfg.kind == "soft_moe":
        mu = p["scale"] * F.normalize(p["mu"], dim=-1, eps=1e-6)

        def score_by_cosine(x: Tensor) -> tuple[Tensor, Tensor]:
            cosines = F.normalize(x, dim=-1, eps=1e-6) @ mu.T  # times the scale, which is in mu
            return cosines[:, :, None], x[:, :, None]

        return score_by_cosine

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = layers.linear(p["gate"], x)
        if gen is not None and cfg.noise:
            # Drawn where the generator lies, which may be another device.
            noise = torch.randn(logits.shape, generator=gen, device=gen.device)
            logits = logits + cfg.noise * noise.to(logits)
        return logits[:, :, None], x[:, :, None]

    return route


def _folded_queries(cfg: CompressConfig, layer: Tree, state: SlotState) -> Tensor:
    """Queries with the key projection folded in, [b, (h k), d]: q W_k x costs heads x slots products of width
    d a patch, not d of them.

    The value projection likewise waits until patches are summed up.
    """
    assert state.latents is not None
    latents = layers.norm(layer["latents"], state.latents)
    q = rearrange(layers.linear(layer["q"], latents), "b k (h e) -> b h k e", h=cfg.heads)
    keys = rearrange(layer["k"]["weight"], "(h e) d -> h e d", h=cfg.heads)
    scaled = torch.einsum("bhke,hed->bhkd", q, keys) * q.shape[-1] ** -0.5
    return scaled.flatten(1, 2)


def with_latents(cfg: CompressConfig, p: Tree, state: SlotState) -> SlotState:
    """The state with what a perceiver's latents attend to beside the patches: the latents themselves."""
    if cfg.kind != "perceiver":
        return state
    assert state.latents is not None
    layer = p["layers"][str(state.pass_index)]
    latents = layers.norm(layer["latents"], state.latents)
    scores = latents @ _folded_queries(cfg, layer, state).mT
    sums, _ = _sum_block(cfg, scores[:, :, None], latents[:, :, None], None)
    return add_states(state, sums)


def update_latents(cfg: CompressConfig, p: Tree, state: SlotState, gen: Generator | None) -> Tensor:
    """The latents [b, k, d] after a pass: attention and feed-forward, each added to its input."""
    assert state.latents is not None
    layer = p["layers"][str(state.pass_index)]
    # Means of normed patches, to which the value projection is applied once each instead of to every patch.
    means = slot_means(cfg, p, with_latents(cfg, p, state))
    means = rearrange(means, "b 1 (h k) d -> b h k d", h=cfg.heads)
    values = rearrange(layer["v"]["weight"], "(h e) d -> h e d", h=cfg.heads)
    attended = torch.einsum("bhkd,hed->bhke", means, values)
    attended = rearrange(attended, "b h k e -> b k (h e)")
    z = state.latents + layers.linear(layer["out"], attended)
    normed = layers.norm(layer["norm"], z)
    hidden = F.gelu(layers.linear(layer["up"], normed))
    hidden = dropout(hidden, cfg.dropout, gen)
    return z + layers.linear(layer["down"], hidden)


def slot_means(cfg: CompressConfig, p: Tree, state: SlotState) -> Tensor:
    """The weighted mean of the values in each row, [b, g, r, v]; 0 where there are none."""
    if cfg.kind == "moe":
        means = state.total / (state.weight + _TINY)[..., None]
    else:
        weight = state.weight.masked_fill(state.weight == 0, 1.0)
        means = state.total / weight[..., None]
    return means.to(compute_dtype(p))


def slot_shares(cfg: CompressConfig, scores: Tensor, final: SlotState) -> Tensor:
    """Weights [b, n, k] of patches in slots, the mean over heads.

    Args:
        scores: of `block_sums`.
        final: sums over all patches, from `with_latents`.
    """
    if cfg.kind == "moe":
        return scores[:, :, 0]
    weight = final.weight.masked_fill(final.weight == 0, 1.0)
    relative = scores - finite_top(final.top)[:, None]
    share = relative.exp() / weight[:, None]  # [b, n, g, r]
    # Groups and rows are heads and slots, in whatever way they are divided.
    by_head = share.flatten(2).unflatten(-1, (-1, cfg.slots))  # [b, n, h, k]
    return by_head.mean(2).to(scores.dtype)


def dropout(x: Tensor, rate: float, gen: Generator | None) -> Tensor:
    """Dropout, where there is a generator."""
    if gen is None or not rate:
        return x
    numbers = torch.rand(x.shape, generator=gen, device=gen.device)
    keep = numbers.to(x.device) >= rate
    return x * keep / (1 - rate)


def compute_dtype(p: Tree) -> torch.dtype:
    """The dtype of all arithmetic: float32, float64 if a parameter is."""
    wide = any(t.dtype == torch.float64 for t in flatten(p).values())
    return torch.float64 if wide else torch.float32


def compute_device(p: Tree) -> torch.device:
    """The device of all arithmetic."""
    return next(iter(flatten(p).values())).device


def widen(p: Tree) -> Tree:
    """The parameters in that dtype."""
    dtype = compute_dtype(p)
    return map_leaves(lambda t: t.to(dtype), p)
