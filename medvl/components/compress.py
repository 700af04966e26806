"""From the features of a slide's patches to a few tokens: a whole batch at once with gradients, or a slide of
any size chunk by chunk.

Every kind is a sum over patches, so both ways are the same sums (`slots`): blocks of patches are added up one
after another, and so are those of chunks, processes or slides. Shapes: b slides, n patches in, k slots
(tokens out), d width. The kinds, of patches x_j:

- moe: P = softmax over slots of the router's logits, w_jk = P_jk in the top_k slots of patch j (the first of
  equal ones; not renormalised), W_k = sum_j w_jk, c_k = sum_j w_jk x_j / (W_k + 1e-9),
  token_k = c_k + norm_k(down_k gelu(up_k c_k)).
- soft_moe: the same experts on c_k = sum_j softmax_j(scale cos(x_j, mu_k)) x_j.
- mean: the same experts on the mean of all x_j.
- attention: softmax_j of score(tanh(V x_j) sigmoid(U x_j)) for each slot and head; a head pools its d / heads
  columns of x.
- perceiver: pre-norm cross-attention and feed-forward; latents see the patches and each other.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from einops import rearrange
from torch import Generator, Tensor

from medvl.base.tree import Tree
from medvl.components import layers, slots
from medvl.components.slots import CompressConfig, SlotState


@frozen(kw_only=True, eq=False)
class Compressed:
    """The tokens of a slide and how patches were assigned to them; without the axis b where the slide was
    streamed.
    """

    tokens: Tensor  # [b, k, d]
    # [b, k], sum of `routing` over the patches. moe: W_k; else the share of attention on patches: 1, 0
    # without patches.
    mass: Tensor
    count: Tensor  # int64 [b, k], patches that reach the slot
    # moe: "balance", "importance", "entropy", "z_loss", "z_reference", scalars over all patches of the batch.
    aux: dict[str, Tensor]
    # [b, n, k], weight of each patch in each slot, 0 where masked; routing / mass is its share.
    routing: Tensor | None = None


def init_compress(cfg: CompressConfig, gen: Generator) -> Tree:
    """Parameters of `compress`, float32 on CPU.

    moe {"gate", "experts"}, soft_moe {"mu" [k, d], "scale" [], "experts"}, mean {"experts"}, experts {"up",
    "down", "norm"} with weights [k, out, in]; attention {"tanh", "sigmoid", "score"}; perceiver {"latents"
    [k, d], "layers" {"0"..}, "norm"}.
    """
    d, k, h = cfg.dim, cfg.slots, cfg.hidden
    if cfg.kind == "attention":
        return {
            "tanh": _init_linear(d, h, gen),
            "sigmoid": _init_linear(d, h, gen),
            "score": _init_linear(h, cfg.heads * k, gen),
        }
    if cfg.kind == "perceiver":
        # The layers are drawn before the latents: another order would be another initialisation of the same
        # seed.
        stack = {str(i): _init_layer(cfg, gen) for i in range(cfg.passes)}
        latents = torch.randn(k, d, generator=gen)
        return {"latents": latents, "layers": stack, "norm": layers.init_norm(d)}
    experts = {
        "up": {"weight": torch.randn(k, h, d, generator=gen) * d**-0.5, "bias": torch.zeros(k, h)},
        "down": {"weight": torch.randn(k, d, h, generator=gen) * h**-0.5, "bias": torch.zeros(k, d)},
        "norm": {"weight": torch.ones(k, d), "bias": torch.zeros(k, d)},
    }
    if cfg.kind == "mean":
        return {"experts": experts}
    if cfg.kind == "soft_moe":
        return {"mu": torch.randn(k, d, generator=gen), "scale": torch.ones(()), "experts": experts}
    return {"gate": layers.init_linear(d, k, gen), "experts": experts}


def _init_linear(width_in: int, width_out: int, gen: Generator, bias: bool = True) -> Tree:
    return layers.init_linear(width_in, width_out, gen, std=width_in**-0.5, bias=bias)


def _init_layer(cfg: CompressConfig, gen: Generator) -> Tree:
    """One cross-attention and feed-forward of a perceiver."""
    d, h = cfg.dim, cfg.hidden
    layer = {name: _init_linear(d, d, gen, bias=False) for name in ("q", "k", "v", "out")}
    layer |= {name: layers.init_norm(d) for name in ("patches", "latents", "norm")}
    layer["up"] = _init_linear(d, h, gen, bias=False)
    layer["down"] = _init_linear(h, d, gen, bias=False)
    return layer


# A batch at once --------------------
def compress(
    cfg: CompressConfig,
    params: Tree,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    gen: Generator | None = None,
    routing: bool = False,
) -> Compressed:
    """Compress the patches of each slide to k tokens.

    Computed in float32 (float64 if a parameter is), also under autocast: 16-bit logits would send patches to
    other slots. The module's docstring has the formulas.

    Args:
        params: from `init_compress`.
        x: patch features [b, n, d] of any floating point dtype; their order does not matter.
        mask: bool [b, n], true where a patch exists; what stands elsewhere, NaN too, changes nothing and gets
            no gradient. None: all exist.
        gen: draws the router's noise and the dropout of training; None: neither.
        routing: return the weight of each patch in each slot.
    Returns:
        A slot that no patch reaches has mass 0, and as token what its expert makes of c_k = 0; so has every
        slot of a slide without patches. For attention such a token is 0, for a perceiver the latents see only
        each other. More slots than patches is no special case. Nothing of this is NaN, nor are gradients.
    Raises:
        ValueError: x or mask has another shape or dtype.
    Source: router and experts of TC-SSA, arXiv:2603.01143; dispatch of soft MoE, Puigcerver et al. 2024,
        arXiv:2308.00951, section 2.1; gated attention, Ilse et al. 2018, arXiv:1802.04712, eq. 9; Flamingo's
        resampler, Alayrac et al. 2022, arXiv:2204.14198.
    """
    _check("compress", cfg, x, mask, "[b, n, {}]")
    p = slots.widen(params)
    n = x.shape[1]
    if not n:  # one that does not exist, so that every parameter has a gradient: 0
        x = F.pad(x, (0, 0, 0, 1))
        mask = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    state = slots.empty_state(cfg, p, len(x))
    with torch.autocast(state.total.device.type, enabled=False):
        # One pass over all patches; a perceiver may take several, each with the latents of the one before.
        for pass_index in range(cfg.passes):
            last = pass_index == cfg.passes - 1
            score = slots.make_scorer(cfg, p, state, gen)
            scores: list[Tensor] = []
            for block, block_scores in slots.block_sums(cfg, p, score, x, mask):
                state = slots.add_states(state, block)
                if routing and last:
                    scores.append(block_scores)
            if not last:
                latents = slots.update_latents(cfg, p, state, gen)
                state = slots.empty_state(cfg, p, len(x), latents, pass_index + 1)
        compressed = _finish(cfg, p, state, gen)
        if not routing:
            return compressed
        # Scores become weights only now, when the sums over all patches are known.
        final = slots.with_latents(cfg, p, state)
        shares = slots.slot_shares(cfg, torch.cat(scores, 1), final)
        return evolve(compressed, routing=shares[:, :n])


def reference_aux(aux: dict[str, Tensor]) -> Tensor:
    """The auxiliary loss as the reference adds it up (before its factor 0.1): k sum_i P_i f_i + 0.5 entropy +
    1e-4 z_reference.
    """
    return aux["balance"] + 0.5 * aux["entropy"] + 1e-4 * aux["z_reference"]


# A stream --------------------
@torch.no_grad()
def begin_state(cfg: CompressConfig, params: Tree, after: SlotState | None = None) -> SlotState:
    """The state before the first patch; `after`: the state at the end of a perceiver's last pass, which its
    next one builds on.

    Streaming gives what `compress` gives without `gen`, whatever the chunks, their order and who adds up what
    first (to the rounding of float32 products of up to 1024 patches; sums are float64). It takes no
    gradients.

    Raises:
        ValueError: there is no pass after that of `after`.
    """
    p = slots.widen(params)
    if after is None:
        return slots.empty_state(cfg, p, 1)
    if after.pass_index + 1 >= cfg.passes:
        raise ValueError(
            f"begin_state: the state must not be of the last pass, got pass {after.pass_index + 1} of "
            f"{cfg.passes}; finalize it"
        )
    with torch.autocast(after.total.device.type, enabled=False):
        latents = slots.update_latents(cfg, p, after, None)
        return slots.empty_state(cfg, p, 1, latents, after.pass_index + 1)


@torch.no_grad()
def update_state(
    cfg: CompressConfig, params: Tree, state: SlotState, x: Tensor, mask: Tensor | None = None
) -> SlotState:
    """The state after the patches x [c, d] too; mask bool [c], true where a patch exists. x may lie on
    another device than the weights.

    Raises:
        ValueError: x or mask has another shape or dtype, or a patch that exists is not finite.
    """
    return _add_chunk(cfg, slots.widen(params), state, x, mask)


def _add_chunk(
    cfg: CompressConfig,
    p: Tree,
    state: SlotState,
    x: Tensor,
    mask: Tensor | None = None,
    buffer: Tensor | None = None,
) -> SlotState:
    _check("update_state", cfg, x, mask, "[c, {}]")
    batch_mask = None if mask is None else mask[None]
    with torch.autocast(state.total.device.type, enabled=False):
        score = slots.make_scorer(cfg, p, state, None)
        for block, _ in slots.block_sums(cfg, p, score, x[None], batch_mask, buffer):
            state = slots.add_states(state, block)
    # The sums are looked at, not every patch: one value that is not finite makes them so.
    if not (state.total.isfinite().all() and state.weight.isfinite().all()):
        finite = x.isfinite().all(-1)
        if mask is not None:
            finite |= ~mask
        rows = (~finite).nonzero()[:3, 0].tolist()
        place = f"rows {rows} of the chunk" if rows else "sums"
        raise ValueError(f"update_state: patches must be finite, got NaN or infinity in {place}")
    return state


@torch.no_grad()
def merge_states(a: SlotState, b: SlotState) -> SlotState:
    """The state of the patches of both: of chunks, of processes, or of several slides of one case, which
    become one bag.

    Raises:
        ValueError: states of other kinds or sizes, or of passes whose latents differ: merge after the first
            pass, then begin the next.
    """
    if a.total.shape != b.total.shape or a.sums.keys() != b.sums.keys() or a.pass_index != b.pass_index:
        got = f"{list(a.total.shape)} in pass {a.pass_index + 1} and {list(b.total.shape)} in pass {b.pass_index + 1}"
        raise ValueError(f"merge_states: both states must come from one config and pass, got {got}")
    if a.latents is not None and b.latents is not None and not torch.equal(a.latents, b.latents):
        raise ValueError(
            "merge_states: the latents of both states must be the same; "
            "merge all states of a pass before the next begins"
        )
    return slots.add_states(a, b)


@torch.no_grad()
def finalize_state(cfg: CompressConfig, params: Tree, state: SlotState) -> Compressed:
    """Tokens [k, d], mass and count [k] and aux of one slide or case.

    Raises:
        ValueError: the state is not of the last pass.
    """
    if state.pass_index != cfg.passes - 1:
        raise ValueError(
            f"finalize_state: the state must be of the last pass, got pass {state.pass_index + 1} of "
            f"{cfg.passes}; begin_state(cfg, params, state) starts the next"
        )
    with torch.autocast(state.total.device.type, enabled=False):
        compressed = _finish(cfg, slots.widen(params), state, None)
    return evolve(compressed, tokens=compressed.tokens[0], mass=compressed.mass[0], count=compressed.count[0])


@torch.no_grad()
def compress_stream(
    cfg: CompressConfig, params: Tree, chunks: Iterable[Tensor] | Callable[[], Iterable[Tensor]]
) -> Compressed:
    """`finalize_state` of all chunks [c, d]; memory is that of one chunk.

    Args:
        chunks: for a perceiver with several passes, what can be read several times: a list, or a function
            that opens the stream anew.
    Raises:
        ValueError: as `update_state`; an iterator for several passes.
    """
    if cfg.passes > 1 and isinstance(chunks, Iterator):
        raise ValueError(
            f"compress_stream: {cfg.passes} passes need chunks that can be read again, got an iterator; "
            "give a function"
        )
    p = slots.widen(params)  # once for all chunks
    state = begin_state(cfg, p)
    # A block is never longer than the device's block size, whatever is asked for here.
    buffer = slots.block_buffer(p, 1, 2**20, cfg.dim)
    for pass_index in range(cfg.passes):
        if pass_index:
            state = begin_state(cfg, p, state)
        for x in chunks() if callable(chunks) else chunks:
            state = _add_chunk(cfg, p, state, x, buffer=buffer)
    return finalize_state(cfg, params, state)


@torch.no_grad()
def slot_weights(cfg: CompressConfig, params: Tree, x: Tensor, state: SlotState | None = None) -> Tensor:
    """Weight of each patch [c, d] in each slot, [c, k]: the rows of `compress`'s routing, so their sum over a
    slide is its mass.

    A patch's share in token k is weight / mass. Other kinds than moe compare a patch with all others and need
    the slide's last `state`.

    Raises:
        ValueError: another shape; no state, or not of the last pass, where one is needed.
    """
    _check("slot_weights", cfg, x, None, "[c, {}]")
    p = slots.widen(params)
    if cfg.kind == "moe":
        state = slots.empty_state(cfg, p, 1)
    if state is None or state.pass_index != cfg.passes - 1:
        got = "none" if state is None else f"that of pass {state.pass_index + 1} of {cfg.passes}"
        raise ValueError(
            f"slot_weights: {cfg.kind} needs the state of the slide at the end of its last pass, got {got}"
        )
    # Scores are compared with the sums of the whole slide, so this chunk may be any part of it.
    weights: list[Tensor] = []
    with torch.autocast(state.total.device.type, enabled=False):
        final = slots.with_latents(cfg, p, state)
        score = slots.make_scorer(cfg, p, state, None)
        for _, scores in slots.block_sums(cfg, p, score, x[None], None):
            weights.append(slots.slot_shares(cfg, scores, final)[0])
    if not weights:
        return final.weight.new_zeros(0, cfg.slots, dtype=slots.compute_dtype(p))
    return torch.cat(weights)


# Tokens --------------------
def _finish(cfg: CompressConfig, p: Tree, state: SlotState, gen: Generator | None) -> Compressed:
    """Tokens, mass, count and losses from the sums over all patches."""
    if cfg.kind == "perceiver":
        latents = slots.update_latents(cfg, p, state, gen)
        tokens = layers.norm(p["norm"], latents)
    elif cfg.kind == "attention":
        means = slots.slot_means(cfg, p, state)
        tokens = rearrange(means, "b h k v -> b k (h v)")
    else:
        means = slots.slot_means(cfg, p, state)[:, 0]  # [b, k, d]; these kinds have one group
        tokens = _experts(cfg, p["experts"], means, gen)
    aux: dict[str, Tensor] = {}
    if cfg.kind == "moe":
        count = state.sums["chosen"]
        mass = state.weight[:, 0]
        aux = {name: t.to(tokens.dtype) for name, t in _router_losses(state.sums).items()}
    else:
        # Every patch reaches every slot.
        count = state.sums["patches"][:, None].expand(-1, cfg.slots)
        mass = _attention_on_patches(cfg, p, state)
    return Compressed(tokens=tokens, mass=mass.to(tokens.dtype), count=count.long(), aux=aux)


def _attention_on_patches(cfg: CompressConfig, p: Tree, state: SlotState) -> Tensor:
    """The share [b, k] of attention on patches, the mean over heads; a perceiver's latents take what
    remains.
    """
    final = slots.with_latents(cfg, p, state)
    weight = final.weight.masked_fill(final.weight == 0, 1.0)
    # `state` is relative to the largest score of patches, `final` to that of patches and latents.
    patch_weight = state.weight * (state.top - slots.finite_top(final.top)).exp()
    share = patch_weight / weight
    return share.view(len(share), -1, cfg.slots).mean(1)


def _experts(cfg: CompressConfig, p: Tree, c: Tensor, gen: Generator | None) -> Tensor:
    """c_k + norm_k(down_k gelu(up_k c_k)), every slot its own."""

    def linear_per_slot(w: Tree, x: Tensor) -> Tensor:
        return torch.einsum("bki,koi->bko", x, w["weight"]) + w["bias"]

    hidden = F.gelu(linear_per_slot(p["up"], c))
    hidden = slots.dropout(hidden, cfg.dropout, gen)
    change = linear_per_slot(p["down"], hidden)
    normed = F.layer_norm(change, change.shape[-1:])
    return c + normed * p["norm"]["weight"] + p["norm"]["bias"]


def _router_losses(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of the router over all patches that exist; all 0 without any.

    P_i is the mean probability of slot i, f_i the mean number of choices of it. "balance": k sum_i P_i f_i,
    top_k if uniform (Fedus et al. 2022, arXiv:2101.03961, eq. 4; f as in Mixtral). "importance": squared
    coefficient of variation of P (Shazeer et al. 2017, arXiv:1701.06538, eq. 6). "entropy": 1 - H(P) / ln k,
    0 if uniform, 1 if collapsed. "z_loss": mean of squared logsumexp (Zoph et al. 2022, arXiv:2202.08906, eq.
    5); "z_reference": the square of its mean.
    """
    s = {name: t.sum(0) for name, t in sums.items()}  # over slides
    k = len(s["chosen"])
    n = s["patches"].clamp(min=1)
    mean = s["probability"] / n  # P [k]
    has_patches = (s["patches"] > 0).to(mean.dtype)
    log_k = math.log(k) * has_patches  # 0 without patches, and so is the entropy's loss
    log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()  # of 0 it would be -inf
    entropy = -(mean * log_mean).sum()
    return {
        "balance": k * (mean * s["chosen"] / n).sum(),
        "importance": mean.var(unbiased=False) * k**2,  # their mean is 1 / k
        "entropy": (log_k - entropy) / max(math.log(k), 1e-30),  # of one slot 0 / 1e-30
        "z_loss": s["lse2"] / n,
        "z_reference": (s["lse"] / n).square(),
    }


def _check(caller: str, cfg: CompressConfig, x: Tensor, mask: Tensor | None, shape: str) -> None:
    axes = shape.count(",") + 1  # `shape` is text such as "[b, n, {}]"
    if x.dim() != axes or x.shape[-1] != cfg.dim or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}; set compress.dim to the features' width"
        raise ValueError(f"{caller}: x must be floating point {shape.format(cfg.dim)}, got {got}")
    if mask is None:
        return
    if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(
            f"{caller}: mask must be bool {list(x.shape[:-1])} like x, got {mask.dtype} {list(mask.shape)}"
        )
