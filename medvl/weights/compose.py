"""Several adapters as one: mixtures (exact, also per sample) and fusions (one set of factors, by a rule that says what it costs)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from attrs import field, frozen
from torch import Generator, Tensor

from medvl.weights.lora import Adapter, Factors

_OfFactors = Literal["cat", "linear", "average", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
_OfMatrices = Literal["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
Rule = Literal[_OfFactors, _OfMatrices]
_PRUNES = ("ties", "dare", "magnitude")


@frozen(kw_only=True, eq=False)
class Layout:
    """Who owns which columns of a module's factors; modules that the same adapters correct in the same way share one."""

    ranks: tuple[int, ...]  # of each adapter, 0 where it leaves the module alone
    scales: tuple[float, ...]
    owner: Tensor = field(repr=False)  # int64 [R], the adapter of each column
    scale: Tensor = field(repr=False)  # `scales` as a tensor [k] beside the factors


@frozen(kw_only=True, eq=False)
class Pool:
    """Adapters of one model side by side, made once by `stack_adapters`; composing reads it and never changes it."""

    names: tuple[str, ...]
    factors: Factors = field(repr=False)  # {module: {"a" [R, in], "b" [out, R]}}, R the sum of the ranks
    kinds: dict[str, str] = field(repr=False)
    layout: dict[str, int] = field(repr=False)  # module -> its place in `layouts`
    layouts: tuple[Layout, ...] = field(repr=False)
    alone: tuple[Adapter, ...] = field(
        default=(), repr=False
    )  # one adapter that is no plain correction, and nothing else

    def __len__(self) -> int:
        return len(self.names)


def stack_adapters(adapters: Sequence[Adapter]) -> Pool:
    """The factors of all adapters, concatenated along the rank per module; a copy, so the adapters themselves may go.

    Ranks, scales and the modules they correct may differ; a module that an adapter leaves alone has no columns of it.
    Raises:
        ValueError: no adapter; one that was made for another model; or, with others beside it, one with a router (H-LoRA), whole replaced
            tensors or a gate per sample (names it). Dropout is for training and is left behind.
    """
    if isinstance(adapters, Adapter) or not len(adapters):
        raise ValueError(f"stack_adapters: adapters must be a list of at least one, got {adapters}")
    names = tuple(a.name or f"adapter {i}" for i, a in enumerate(adapters))
    for name, adapter in zip(names, adapters, strict=True):
        if (why := _special(adapter)) and len(adapters) > 1:
            raise ValueError(
                f"stack_adapters: {name!r} has {why}; it cannot be composed with others, only used alone"
            )
        if why:
            return Pool(names=names, factors={}, kinds={}, layout={}, layouts=(), alone=(adapter,))
    factors: Factors = {}
    layout: dict[str, int] = {}
    seen: dict[Any, int] = {}
    layouts: list[Layout] = []
    for m in dict.fromkeys(m for a in adapters for m in a.factors):
        held = [(n, a) for n, a in zip(names, adapters, strict=True) if m in a.factors]
        _fit(m, held)
        each = [_plain(a, m) for _, a in held]
        a, b = torch.cat([a for a, _ in each]), torch.cat([b for _, b in each], 1)
        ranks = tuple(x.rank(m) if m in x.factors else 0 for x in adapters)
        scales = tuple(float(x.scale[m]) if m in x.factors else 0.0 for x in adapters)
        dtype = torch.promote_types(torch.float32, a.dtype)
        factors[m], layout[m] = (
            {"a": a, "b": b},
            seen.setdefault((ranks, scales, a.device, dtype), len(layouts)),
        )
        if layout[m] == len(layouts):
            owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(a.device)
            layouts.append(
                Layout(
                    ranks=ranks,
                    scales=scales,
                    owner=owner,
                    scale=torch.tensor(scales, dtype=dtype, device=a.device),
                )
            )
    kinds = {m: k for a in adapters for m, k in a.kinds.items() if m in a.factors}
    return Pool(names=names, factors=factors, kinds=kinds, layout=layout, layouts=tuple(layouts))


def select_adapters(pool: Pool, chosen: Sequence[int]) -> Pool:
    """The pool of only these adapters, in this order: a mixture pays for the ranks that it holds, also where a weight is 0.

    Raises:
        ValueError: none chosen, one twice, or one that the pool does not have.
    """
    chosen, k = [int(j) for j in chosen], len(pool)
    if not chosen or len({*chosen}) < len(chosen) or not all(0 <= j < k for j in chosen):
        raise ValueError(
            f"select_adapters: choose some of the {k} adapters 0..{k - 1}, each once, got {chosen}"
        )
    names = tuple(pool.names[j] for j in chosen)
    if pool.alone:
        return pool
    layouts, columns = [], []
    for l in pool.layouts:
        starts = [sum(l.ranks[:j]) for j in range(k)]
        ranks, scales = tuple(l.ranks[j] for j in chosen), tuple(l.scales[j] for j in chosen)
        owner = torch.arange(len(chosen)).repeat_interleave(torch.tensor(ranks)).to(l.owner.device)
        layouts.append(Layout(ranks=ranks, scales=scales, owner=owner, scale=l.scale[chosen]))
        columns.append(
            torch.tensor(
                [c for j in chosen for c in range(starts[j], starts[j] + l.ranks[j])], device=l.owner.device
            )
        )
    held = {m: i for m, i in pool.layout.items() if sum(layouts[i].ranks)}
    factors = {
        m: {"a": pool.factors[m]["a"][columns[i]], "b": pool.factors[m]["b"][:, columns[i]]}
        for m, i in held.items()
    }
    return Pool(
        names=names,
        factors=factors,
        kinds={m: pool.kinds[m] for m in held},
        layout=held,
        layouts=tuple(layouts),
    )


def compose_adapters(
    adapters: Sequence[Adapter] | Pool,
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    *,
    mode: Literal["mixture", "fusion"] = "mixture",
    rule: Rule = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] = "total",
    gen: Generator | None = None,
) -> Adapter:
    """One adapter that stands for the sum over adapters j of `w_j s_j B_j A_j`, with s_j = `scale` of adapter j in the module.

    A mixture is exact. It has the factors of all adapters (not copied from a `Pool`) and a gate [R] or [b, R], so composing for a new batch
    makes gates and nothing else; the gradient reaches `weights`. A module that an adapter leaves alone gets nothing from it.

    A fusion has plain factors without a gate, of weights [k]. Per module, over the adapters that have it, with c_j = w_j s_j:

    - "cat": the exact sum, of rank R. With weights [b, k] it is the mixture.
    - "svd": the nearest of rank `rank` (default: the largest rank of all). From two QR and the SVD of an R x R core in float64; the full
      matrix is not formed. The energy kept is 1 - `fusion_error` squared.
    - "linear": A = sum sign(c_j) sqrt|c_j| A_j, B = sum sqrt|c_j| B_j. The product has the cross terms B_i A_j, so it is the sum of one
      adapter only; and as the sign is on A alone, two adapters with weights 1 and -1 give (B_1 + B_2)(A_1 - A_2), not their difference.
    - "average": A = sum w_j A_j and B = sum w_j B_j (sqrt(s_j) on both): cross terms, and w_j squared on the adapters' own.
    - "ties": A and B apart keep their share `density` of largest values, elect a sign for each place before weighting; what agrees is
      weighted and averaged.
    - "dare_linear", "dare_ties": values are dropped at random (kept: `density`) and the rest divided by it, then as linear or ties.
    - "magnitude_prune": the share `density` of largest values is kept, then as linear.
    - "..._svd": the same on the full matrices s_j B_j A_j with weights w_j, then an SVD. Forms k dense matrices of one module at a time and
      takes a dense SVD: seconds for each wide module.

    Args:
        adapters: a `Pool` when composing more than once; `select_adapters` takes some of many.
        weights: [k], or [b, k] with a row for each sample of the batch that will come; any finite numbers, not normalised here.
        density: in (0, 1]; "ties", "dare" and "magnitude_prune" need it.
        majority_sign: of the sum of values, or of the count of signs ("ties").
        gen: "dare" draws from it: A of each adapter, then B, module after module in the pool's order (or the matrices, "..._svd").
    Raises:
        ValueError: weights that do not fit or are not finite, an option that the rule does not have or lacks, ranks that differ (all but
            cat and svd), adapters that do not fit each other.
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, mixture and average; the other rules as peft's `add_weighted_adapter`, for
        rslora and rank patterns as its formulas say, and for k = 1 too: there peft takes "linear" whatever was asked.
    """
    pool = adapters if isinstance(adapters, Pool) else stack_adapters(adapters)
    how = _How(rule=rule, rank=rank, density=density, sign=majority_sign, gen=gen)
    w = _weights(pool, weights)
    _check(mode, how, w)
    if pool.alone:
        if rule != "cat" or not bool((w == 1).all()):
            raise ValueError(
                f"compose_adapters: {pool.names[0]!r} has {_special(pool.alone[0])}; it is used alone with weight 1, "
                f"got {w.tolist()}, rule {rule!r}"
            )
        return pool.alone[0]
    scale, name = dict.fromkeys(pool.factors, 1.0), "+".join(pool.names)
    if mode == "mixture" or w.dim() == 2:
        gates = [(w.to(l.scale) * l.scale).index_select(-1, l.owner) for l in pool.layouts]
        factors = {m: dict(f) for m, f in pool.factors.items()}
        return Adapter(
            factors=factors,
            scale=scale,
            kinds=dict(pool.kinds),
            gate={m: gates[i] for m, i in pool.layout.items()},
            name=name,
        )
    fused = {m: _fuse(pool, m, w, how) for m in pool.factors}
    return Adapter(factors=fused, scale=scale, kinds=dict(pool.kinds), name=name)


def fusion_error(
    adapters: Sequence[Adapter] | Pool, weights: Sequence[float] | Tensor, adapter: Adapter
) -> dict[str, float]:
    """{module: |D - E| / |E|}, how far (Frobenius) the correction D of `adapter` is from the exact sum E = sum_j w_j s_j B_j A_j.

    From QR cores of the factors in float64; no full matrix is formed. Where E is 0: 0 if D is too, else infinite.
    For rule "svd" the energy kept is 1 - error squared.
    Raises:
        ValueError: weights per sample, an `adapter` that is no plain correction, or one of a module that the adapters do not have.
    """
    pool = adapters if isinstance(adapters, Pool) else stack_adapters(adapters)
    w = _weights(pool, weights)
    if w.dim() == 2:
        raise ValueError(f"fusion_error: weights must be one vector [{len(pool)}], got {list(w.shape)}")
    if (why := _special(adapter)) or pool.alone:
        raise ValueError(
            f"fusion_error: {adapter} must be a plain correction, it has {why or _special(pool.alone[0])}"
        )
    if extra := sorted(adapter.factors.keys() - pool.factors.keys()):
        raise ValueError(
            f"fusion_error: {adapter} corrects {extra[0]}, which none of {', '.join(pool.names)} does"
        )
    error = {}
    for m, f in pool.factors.items():
        l = pool.layouts[pool.layout[m]]
        b, a = f["b"].double() * _columns(l, w), f["a"].double()
        exact = _core(b, a)[1].norm()
        if m in adapter.factors:
            own_a, own_b = (t.to(a) for t in _plain(adapter, m))
            b, a = torch.cat([b, own_b * -adapter.scale[m]], 1), torch.cat([a, own_a])
        off = _core(b, a)[1].norm()
        error[m] = float(off / exact) if exact > 0 else 0.0 if off == 0 else float("inf")
    return error


@frozen(kw_only=True)
class _How:
    rule: str
    rank: int | None
    density: float | None
    sign: str
    gen: Generator | None


def _fuse(pool: Pool, module: str, weights: Tensor, how: _How) -> dict[str, Tensor]:
    l, a, b = pool.layouts[pool.layout[module]], pool.factors[module]["a"], pool.factors[module]["b"]
    held = [j for j, r in enumerate(l.ranks) if r]
    sizes = [l.ranks[j] for j in held]
    w, s = (
        weights.to(a.device, torch.float64)[held],
        torch.tensor(l.scales, dtype=torch.float64, device=a.device)[held],
    )
    wide = torch.promote_types(torch.float32, a.dtype)
    rank = how.rank or max(r for other in pool.layouts for r in other.ranks)
    if how.rule == "cat":
        made = a * _columns(l, weights)[:, None].to(wide), b
    elif how.rule == "svd":
        q, core, p = _core(b.double() * _columns(l, weights), a.double())
        u, size, v = torch.linalg.svd(core, full_matrices=False)
        made = v[:rank] @ p.T, q @ (u[:, :rank] * size[:rank])
    elif how.rule.endswith("_svd"):
        full = [
            (q.to(wide) @ p.to(wide)) * t.to(wide)
            for p, q, t in zip(a.split(sizes), b.split(sizes, 1), s, strict=True)
        ]
        u, size, v = torch.linalg.svd(_merge(full, w.to(wide), how), full_matrices=False)
        made = v[:rank], u[:, :rank] * size[:rank]
    elif len(set(sizes)) > 1:
        ranks = ", ".join(f"{pool.names[j]!r} {l.ranks[j]}" for j in held)
        raise ValueError(
            f"compose_adapters: {how.rule!r} needs equal ranks, {module} has {ranks}; 'cat' and 'svd' take any"
        )
    else:
        root, sign = (
            (w * s.abs().sqrt(), s.sign())
            if how.rule == "average"
            else ((w * s).abs().sqrt(), (w * s).sign())
        )
        made = (
            _merge(a.split(sizes), (root * sign).to(wide), how),
            _merge(b.split(sizes, 1), root.to(wide), how),
        )
    return {"a": made[0].to(a.dtype).contiguous(), "b": made[1].to(b.dtype).contiguous()}


def _merge(tensors: Sequence[Tensor], weights: Tensor, how: _How) -> Tensor:
    """The weighted sum over adapters of tensors of one shape, pruned and with signs elected where the rule does so."""
    t = torch.stack(list(tensors))
    if "dare" in how.rule:
        t = torch.stack([_dropped(x, how) for x in t])
    elif how.rule.startswith(_PRUNES):
        t = torch.stack([_largest(x, how) for x in t])
    weighted = t * weights.view(-1, *[1] * (t.dim() - 1))
    if "ties" not in how.rule:
        return weighted.sum(0)
    votes = (t if how.sign == "total" else t.sign()).sum(0)
    agree = t.sign() == torch.where(votes >= 0, 1.0, -1.0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(x: Tensor, how: _How) -> Tensor:
    assert how.density is not None
    keep = x.abs().flatten().topk(int(how.density * x.numel())).indices
    return torch.zeros_like(x).flatten().index_copy(0, keep, x.flatten()[keep]).view(x.shape)


def _dropped(x: Tensor, how: _How) -> Tensor:
    assert how.density is not None
    assert how.gen is not None
    if how.density == 1:
        return x
    kept = torch.bernoulli(
        torch.full(x.shape, how.density, dtype=x.dtype, device=how.gen.device), generator=how.gen
    )
    return x * kept.to(x.device) / how.density


def _core(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q [out, R], C, P [in, R] with B A = Q C P^T and orthonormal columns of Q and P: norm and singular values are C's."""
    q, left = torch.linalg.qr(b)
    p, right = torch.linalg.qr(a.T)
    return q, left @ right.T, p


def _weights(pool: Pool, weights: Any) -> Tensor:
    k = len(pool)
    try:
        w = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(
            f"compose_adapters: weights must be numbers [{k}] or [b, {k}], got {weights!r}: {e}"
        ) from e
    if w.dim() not in (1, 2) or w.shape[-1] != k or not len(w):
        raise ValueError(
            f"compose_adapters: weights must be [{k}] or [b, {k}] for {', '.join(pool.names)}, got {list(w.shape)}"
        )
    if not bool(w.isfinite().all()):
        raise ValueError(f"compose_adapters: weights must be finite, got {w.tolist()}")
    return w


def _check(mode: str, how: _How, w: Tensor) -> None:
    prunes = how.rule.startswith(_PRUNES)
    bad: Callable[[str], ValueError] = lambda text: ValueError(f"compose_adapters: {text}")
    if (
        mode not in ("mixture", "fusion")
        or how.rule not in get_args(Rule)
        or how.sign not in ("total", "frequency")
    ):
        known = f"mode mixture or fusion, rule one of {', '.join(get_args(Rule))}, majority_sign total or frequency"
        raise bad(f"{known}; got {mode!r}, {how.rule!r}, {how.sign!r}")
    if mode == "mixture" and how.rule != "cat":
        raise bad(f"a mixture is exact and has no rule, got {how.rule!r}; set mode='fusion'")
    if w.dim() == 2 and how.rule != "cat":
        raise bad(
            f"rule {how.rule!r} makes one set of factors, of weights [{w.shape[1]}], got {list(w.shape)}; samples need a mixture"
        )
    if how.rank is not None and (not how.rule.endswith("svd") or how.rank < 1):
        raise bad(f"rank must be at least 1 and belongs to svd rules, got {how.rank} for rule {how.rule!r}")
    if prunes and (how.density is None or not 0 < how.density <= 1):
        raise bad(
            f"rule {how.rule!r} needs density in (0, 1], the share of values to keep, got {how.density}"
        )
    if not prunes and how.density is not None:
        raise bad(f"rule {how.rule!r} keeps all values and has no density, got {how.density}")
    if ("dare" in how.rule) != (how.gen is not None):
        raise bad(
            f"rule {how.rule!r} "
            + ("draws at random: give gen=torch.Generator()" if how.gen is None else "draws nothing: no gen")
        )
    if how.sign != "total" and "ties" not in how.rule:
        raise bad(f"rule {how.rule!r} elects no sign, got majority_sign={how.sign!r}")


def _special(a: Adapter) -> str:
    """What keeps an adapter from being composed with others, or ""."""
    if routed := [m for m, f in a.factors.items() if "router" in f]:
        return f"a router per token (H-LoRA) on {routed[0]}"
    if a.full:
        return f"whole tensors that it replaces ({next(iter(a.full))}; lora.without_copies leaves out those that are the base's own)"
    if any(g.dim() > 1 for g in a.gate.values()):
        return "weights that differ by sample"
    return ""


def _fit(module: str, held: list[tuple[str, Adapter]]) -> None:
    """The adapters of a module must be of one model."""
    for name, adapter in held:
        a, b = adapter.factors[module]["a"], adapter.factors[module]["b"]
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
            raise ValueError(
                f"stack_adapters: {name!r}, {module}: A must be [r, in] and B [out, r], got {list(a.shape)} and {list(b.shape)}"
            )
    about = [
        (adapter.kinds[module], f["b"].shape[0], f["a"].shape[1], f["a"].device)
        for _, adapter in held
        if (f := adapter.factors[module])
    ]
    for (name, _), is_ in zip(held, about, strict=True):
        if is_ != about[0]:
            one, other = (f"{k} {i} -> {o} on {d}" for k, o, i, d in (about[0], is_))
            raise ValueError(
                f"stack_adapters: {module} is {one} for {held[0][0]!r} and {other} for {name!r}; adapters must be of the same base model "
                "and on one device"
            )


def _plain(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """A and B with a gate [r] folded in (what is composed may itself be a mixture); as precise as the gate."""
    a, b, gate = adapter.factors[module]["a"], adapter.factors[module]["b"], adapter.gate.get(module)
    return (a, b) if gate is None else (a.to(torch.promote_types(a.dtype, gate.dtype)), b * gate)


def _columns(layout: Layout, weights: Tensor) -> Tensor:
    """w s of the adapter of each column, float64 [R]."""
    scales = torch.tensor(layout.scales, dtype=torch.float64, device=layout.owner.device)
    return (weights.to(scales) * scales)[layout.owner]
