"""Several adapters as one: mixtures (exact, also per sample) and fusions (one set of factors, by a rule that
says what it costs).

The rules of a fusion, per module, over the adapters j that have it; w_j is the weight of an adapter, s_j its
scale in the module, c_j = w_j s_j and R the sum of the ranks:

- "cat": the exact sum, of rank R. With weights [b, k] it is the mixture.
- "svd": the nearest of rank `rank` (default: the largest rank of all). From two QR and the SVD of an R x R
  core in float64; the full matrix is not formed. The energy kept is 1 - `fusion_error` squared.
- "linear": A = sum sign(c_j) sqrt|c_j| A_j, B = sum sqrt|c_j| B_j. The product has the cross terms B_i A_j,
  so it is the sum of one adapter only; and as the sign is on A alone, two adapters with weights 1 and -1 give
  (B_1 + B_2)(A_1 - A_2), not their difference.
- "average": A = sum w_j A_j and B = sum w_j B_j (sqrt(s_j) on both): cross terms, and w_j squared on each
  adapter's product with itself.
- "ties": A and B apart keep their share `density` of largest values, elect a sign for each place before
  weighting; what agrees is weighted and averaged.
- "dare_linear", "dare_ties": values are dropped at random (kept: `density`) and the remaining ones divided by
  it, then as linear or ties.
- "magnitude_prune": the share `density` of largest values is kept, then as linear.
- "..._svd": the same on the full matrices s_j B_j A_j with weights w_j, then an SVD. Forms k dense matrices
  of one module at a time and takes a dense SVD: seconds for each wide module.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from attrs import field, frozen
from torch import Generator, Tensor

from medvl.weights.lora import Adapter, Factors

_OfFactors = Literal["cat", "linear", "average", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
_OfMatrices = Literal["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
Rule = Literal[_OfFactors, _OfMatrices]
_PRUNES = ("ties", "dare", "magnitude")  # starts of the rules that keep only a share of the values


@frozen(kw_only=True, eq=False)
class Layout:
    """Which adapter each column of a module's factors belongs to; modules with the same ranks and scales
    share one.
    """

    ranks: tuple[int, ...]  # of each adapter, 0 where it leaves the module alone
    scales: tuple[float, ...]
    owner: Tensor = field(repr=False)  # int64 [R], the adapter of each column
    scale: Tensor = field(repr=False)  # `scales` as a tensor [k] beside the factors


@frozen(kw_only=True, eq=False)
class Pool:
    """Adapters of one model side by side, made once by `stack_adapters`; composing reads it and never changes
    it.
    """

    names: tuple[str, ...]
    factors: Factors = field(repr=False)  # {module: {"a" [R, in], "b" [out, R]}}, R the sum of the ranks
    kinds: dict[str, str] = field(repr=False)
    layout: dict[str, int] = field(repr=False)  # module -> its place in `layouts`
    layouts: tuple[Layout, ...] = field(repr=False)
    # One adapter that is no plain correction, and then nothing else.
    alone: tuple[Adapter, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.names)


def stack_adapters(adapters: Sequence[Adapter]) -> Pool:
    """The factors of all adapters, concatenated along the rank per module; a copy, so the adapters themselves
    may go.

    Ranks, scales and the modules they correct may differ; a module that an adapter leaves alone has no
    columns of it.
    Raises:
        ValueError: no adapter; one that was made for another model; or, with others beside it, one with a
            router (H-LoRA), whole replaced tensors or a gate per sample (names it). Dropout is for training
            and is left behind.
    """
    if isinstance(adapters, Adapter) or not len(adapters):
        raise ValueError(f"stack_adapters: adapters must be a list of at least one, got {adapters}")
    names = tuple(a.name or f"adapter {i}" for i, a in enumerate(adapters))
    for name, adapter in zip(names, adapters, strict=True):
        special = _special_part(adapter)
        if special and len(adapters) > 1:
            raise ValueError(
                f"stack_adapters: {name!r} has {special}; it cannot be composed with others, only used alone"
            )
        if special:
            return Pool(names=names, factors={}, kinds={}, layout={}, layouts=(), alone=(adapter,))
    factors: Factors = {}
    layout: dict[str, int] = {}
    layouts: list[Layout] = []
    places: dict[Any, int] = {}  # what a layout depends on -> its place in `layouts`
    # A dict as an ordered set: fusions that draw at random go through the modules in this order.
    modules: dict[str, None] = {}
    for adapter in adapters:
        modules |= dict.fromkeys(adapter.factors)
    for module in modules:
        factors[module] = _stack_factors(module, names, adapters)
        # An adapter without the module has rank 0, so no column belongs to it and its scale is not used.
        ranks, scales = [], []
        for adapter in adapters:
            present = module in adapter.factors
            ranks.append(adapter.rank(module) if present else 0)
            scales.append(float(adapter.scale[module]) if present else 0.0)
        # Gates are made in float32 at least, also over 16-bit factors.
        a = factors[module]["a"]
        dtype = torch.promote_types(torch.float32, a.dtype)
        key = (tuple(ranks), tuple(scales), a.device, dtype)
        if key not in places:
            places[key] = len(layouts)
            scale = torch.tensor(scales, dtype=dtype, device=a.device)
            layouts.append(_layout(tuple(ranks), tuple(scales), scale))
        layout[module] = places[key]
    kinds: dict[str, str] = {}
    for adapter in adapters:
        for module, kind in adapter.kinds.items():
            if module in adapter.factors:
                kinds[module] = kind
    return Pool(names=names, factors=factors, kinds=kinds, layout=layout, layouts=tuple(layouts))


def _stack_factors(module: str, names: Sequence[str], adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """{"a" [R, in], "b" [out, R]} of one module, from all adapters that have it."""
    owners = []
    for name, adapter in zip(names, adapters, strict=True):
        if module in adapter.factors:
            owners.append((name, adapter))
    _check_factors(module, owners)
    rows, columns = [], []
    for _, adapter in owners:
        a, b = _plain_factors(adapter, module)
        rows.append(a)
        columns.append(b)
    return {"a": torch.cat(rows), "b": torch.cat(columns, 1)}


def _layout(ranks: tuple[int, ...], scales: tuple[float, ...], scale: Tensor) -> Layout:
    # Ranks (2, 0, 3) give the owners 0 0 2 2 2.
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(scale.device)
    return Layout(ranks=ranks, scales=scales, owner=owner, scale=scale)


def select_adapters(pool: Pool, chosen: Sequence[int]) -> Pool:
    """The pool of only these adapters, in this order: a mixture pays for the ranks that it holds, also where
    a weight is 0.

    Raises:
        ValueError: none chosen, one twice, or one that the pool does not have.
    """
    k = len(pool)
    chosen = [int(j) for j in chosen]
    in_range = all(0 <= j < k for j in chosen)
    if not chosen or len({*chosen}) < len(chosen) or not in_range:
        raise ValueError(
            f"select_adapters: choose some of the {k} adapters 0..{k - 1}, each once, got {chosen}"
        )
    if pool.alone:
        return pool
    layouts: list[Layout] = []
    columns: list[Tensor] = []  # of each layout, the columns that stay
    for layout in pool.layouts:
        ranks = tuple(layout.ranks[j] for j in chosen)
        scales = tuple(layout.scales[j] for j in chosen)
        layouts.append(_layout(ranks, scales, layout.scale[chosen]))
        # Adapter j has the columns from ends[j] - ranks[j] to ends[j].
        ends = list(itertools.accumulate(layout.ranks))
        stay: list[int] = []
        for j in chosen:
            stay += range(ends[j] - layout.ranks[j], ends[j])
        columns.append(torch.tensor(stay, device=layout.owner.device, dtype=torch.int64))
    # A module that none of the chosen adapters corrects is left out: its factors would be empty.
    modules = {module: i for module, i in pool.layout.items() if sum(layouts[i].ranks)}
    factors: Factors = {}
    for module, i in modules.items():
        a, b = pool.factors[module]["a"], pool.factors[module]["b"]
        factors[module] = {"a": a[columns[i]], "b": b[:, columns[i]]}
    return Pool(
        names=tuple(pool.names[j] for j in chosen),
        factors=factors,
        kinds={module: pool.kinds[module] for module in modules},
        layout=modules,
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
    """One adapter that stands for the sum over adapters j of `w_j s_j B_j A_j`, with s_j = `scale` of adapter
    j in the module.

    A mixture is exact. It has the factors of all adapters (not copied from a `Pool`) and a gate [R] or [b,
    R], so composing for a new batch makes gates and nothing else; the gradient reaches `weights`. A module
    that an adapter leaves alone gets nothing from it.

    A fusion has plain factors without a gate, of weights [k]; the module's docstring has the rules.

    Args:
        adapters: a `Pool` when composing more than once; `select_adapters` takes some of many.
        weights: [k], or [b, k] with a row for each sample of the batch that will come; any finite numbers,
            not normalised here.
        density: in (0, 1]; "ties", "dare" and "magnitude_prune" need it.
        majority_sign: of the sum of values, or of the count of signs ("ties").
        gen: "dare" draws from it: A of each adapter, then B, module after module in the pool's order (or the
            matrices, "..._svd").
    Raises:
        ValueError: weights that do not fit or are not finite, an option that the rule does not have or lacks,
            ranks that differ (all but cat and svd), adapters that do not fit each other.
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, mixture and average; the other rules as peft's
        `add_weighted_adapter`, for rslora and rank patterns as its formulas say, and for k = 1 too: there
        peft takes "linear" whatever was asked.
    """
    pool = _as_pool(adapters)
    fusion = _Fusion(rule=rule, rank=rank, density=density, sign=majority_sign, gen=gen)
    w = _check_weights(pool, weights)
    _check_options(mode, fusion, w)
    if pool.alone:
        return _adapter_alone(pool, w, rule)
    scale = dict.fromkeys(pool.factors, 1.0)  # the adapters' scales are in the gates or the fused factors
    kinds = dict(pool.kinds)
    name = "+".join(pool.names)
    if mode == "fusion" and w.dim() == 1:
        fused = {module: _fuse_module(pool, module, w, fusion) for module in pool.factors}
        return Adapter(factors=fused, scale=scale, kinds=kinds, name=name)
    gates = _layout_gates(pool, w)
    return Adapter(
        factors={module: dict(factors) for module, factors in pool.factors.items()},
        scale=scale,
        kinds=kinds,
        gate={module: gates[i] for module, i in pool.layout.items()},
        name=name,
    )


def _as_pool(adapters: Sequence[Adapter] | Pool) -> Pool:
    return adapters if isinstance(adapters, Pool) else stack_adapters(adapters)


def _adapter_alone(pool: Pool, w: Tensor, rule: str) -> Adapter:
    """The one adapter of a pool as it is: a router, replaced tensors or a gate per sample has no weight."""
    if rule != "cat" or not bool((w == 1).all()):
        raise ValueError(
            f"compose_adapters: {pool.names[0]!r} has {_special_part(pool.alone[0])}; "
            f"it is used alone with weight 1, got {w.tolist()}, rule {rule!r}"
        )
    return pool.alone[0]


def _layout_gates(pool: Pool, w: Tensor) -> list[Tensor]:
    """A gate [R] or [b, R] for each layout: a model has hundreds of modules, but few layouts."""
    gates = []
    for layout in pool.layouts:
        by_adapter = w.to(layout.scale) * layout.scale  # [k] or [b, k]
        # Each column takes the weight of its adapter; the gradient goes back to `w`.
        gates.append(by_adapter.index_select(-1, layout.owner))
    return gates


def fusion_error(
    adapters: Sequence[Adapter] | Pool, weights: Sequence[float] | Tensor, adapter: Adapter
) -> dict[str, float]:
    """{module: |D - E| / |E|}, how far (Frobenius) the correction D of `adapter` is from the exact sum E =
    sum_j w_j s_j B_j A_j.

    From QR cores of the factors in float64; no full matrix is formed. Where E is 0: 0 if D is too, else
    infinite. For rule "svd" the energy kept is 1 - error squared.
    Raises:
        ValueError: weights per sample, an `adapter` that is no plain correction, or one of a module that the
            adapters do not have.
    """
    pool = _as_pool(adapters)
    w = _check_weights(pool, weights)
    if w.dim() == 2:
        raise ValueError(f"fusion_error: weights must be one vector [{len(pool)}], got {list(w.shape)}")
    special = _special_part(adapter)
    if special or pool.alone:
        special = special or _special_part(pool.alone[0])
        raise ValueError(f"fusion_error: {adapter} must be a plain adapter, it has {special}")
    extra = sorted(adapter.factors.keys() - pool.factors.keys())
    if extra:
        raise ValueError(
            f"fusion_error: {adapter} adapts {extra[0]}, which none of {', '.join(pool.names)} does"
        )
    errors = {}
    for module, factors in pool.factors.items():
        layout = pool.layouts[pool.layout[module]]
        # The norm of B A is that of a core [R, R], however wide the layer is.
        a = factors["a"].double()
        b = factors["b"].double() * _column_weights(layout, w)
        _, exact_core, _ = _qr_core(b, a)
        exact = exact_core.norm()
        if module in adapter.factors:
            # D - E is one product: the factors of D beside those of E, with the sign on B.
            fused_a, fused_b = _plain_factors(adapter, module)
            b = torch.cat([b, fused_b.to(a) * -adapter.scale[module]], 1)
            a = torch.cat([a, fused_a.to(a)])
        _, difference_core, _ = _qr_core(b, a)
        difference = difference_core.norm()
        if exact > 0:
            errors[module] = float(difference / exact)
        elif difference == 0:
            errors[module] = 0.0
        else:
            errors[module] = float("inf")
    return errors


@frozen(kw_only=True)
class _Fusion:
    """The options of a fusion, as `compose_adapters` has them."""

    rule: str
    rank: int | None
    density: float | None
    sign: str
    gen: Generator | None


def _fuse_module(pool: Pool, module: str, weights: Tensor, fusion: _Fusion) -> dict[str, Tensor]:
    """The factors of one module, by the rule."""
    rule = fusion.rule
    layout = pool.layouts[pool.layout[module]]
    a, b = pool.factors[module]["a"], pool.factors[module]["b"]
    # The default is the largest rank of the pool, the same for all modules.
    rank = fusion.rank or max(max(pool_layout.ranks) for pool_layout in pool.layouts)
    if rule == "cat":
        wide = torch.promote_types(torch.float32, a.dtype)
        fused_a = a * _column_weights(layout, weights)[:, None].to(wide)
        fused_b = b
    elif rule == "svd":
        weighted_b = b.double() * _column_weights(layout, weights)
        q, core, p = _qr_core(weighted_b, a.double())
        # Q and P are orthonormal, so the SVD of the small core is that of the whole product.
        core_a, core_b = _truncated_svd(core, rank)
        fused_a = core_a @ p.T
        fused_b = q @ core_b
    else:
        members = _fused_members(layout, a, b, weights)
        if rule.endswith("_svd"):
            fused_a, fused_b = _fuse_matrices(members, rank, fusion)
        else:
            _check_equal_ranks(pool, module, layout, rule)
            fused_a, fused_b = _fuse_factors(members, fusion)
    return {"a": fused_a.to(a.dtype).contiguous(), "b": fused_b.to(b.dtype).contiguous()}


@frozen(kw_only=True, eq=False)
class _Members:
    """The m adapters that have a module."""

    a: tuple[Tensor, ...]  # [r, in] each
    b: tuple[Tensor, ...]  # [out, r] each
    # Both [m] in float64: they are worked with as they are and rounded once, to the precision of the sums.
    weights: Tensor
    scales: Tensor
    sum_dtype: torch.dtype  # at least float32


def _fused_members(layout: Layout, a: Tensor, b: Tensor, weights: Tensor) -> _Members:
    indices = [j for j, rank in enumerate(layout.ranks) if rank]
    ranks = [layout.ranks[j] for j in indices]
    scales = torch.tensor(layout.scales, dtype=torch.float64, device=a.device)
    return _Members(
        a=a.split(ranks),
        b=b.split(ranks, 1),
        weights=weights.to(a.device, torch.float64)[indices],
        scales=scales[indices],
        sum_dtype=torch.promote_types(torch.float32, a.dtype),
    )


def _truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) with B A the nearest matrix of this rank."""
    u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
    return v[:rank], u[:, :rank] * singular[:rank]


def _fuse_matrices(members: _Members, rank: int, fusion: _Fusion) -> tuple[Tensor, Tensor]:
    """A and B of the rules "..._svd": from the full matrices s_j B_j A_j."""
    wide = members.sum_dtype
    matrices = []
    for a, b, scale in zip(members.a, members.b, members.scales, strict=True):
        product = b.to(wide) @ a.to(wide)
        matrices.append(product * scale.to(wide))
    combined = _combine(matrices, members.weights.to(wide), fusion)
    return _truncated_svd(combined, rank)


def _fuse_factors(members: _Members, fusion: _Fusion) -> tuple[Tensor, Tensor]:
    """A and B of the rules that combine all A_j and all B_j apart."""
    w, s = members.weights, members.scales
    # Half of the weight goes to A and half to B; the sign goes to A alone.
    if fusion.rule == "average":
        root = w * s.abs().sqrt()
        sign = s.sign()
    else:
        weight = w * s
        root = weight.abs().sqrt()
        sign = weight.sign()
    wide = members.sum_dtype
    fused_a = _combine(members.a, (root * sign).to(wide), fusion)
    fused_b = _combine(members.b, root.to(wide), fusion)
    return fused_a, fused_b


def _check_equal_ranks(pool: Pool, module: str, layout: Layout, rule: str) -> None:
    owners = [(name, rank) for name, rank in zip(pool.names, layout.ranks, strict=True) if rank]
    if len({rank for _, rank in owners}) > 1:
        named = ", ".join(f"{name!r} {rank}" for name, rank in owners)
        raise ValueError(
            f"compose_adapters: {rule!r} needs equal ranks, {module} has {named}; 'cat' and 'svd' take any"
        )


def _combine(tensors: Sequence[Tensor], weights: Tensor, fusion: _Fusion) -> Tensor:
    """The weighted sum over adapters of tensors of one shape, pruned and with signs elected where the rule
    does so.
    """
    t = torch.stack(list(tensors))  # [k, ...]
    # Pruning comes before the weights, as in peft: the largest values are those of each adapter by itself.
    if "dare" in fusion.rule:
        t = torch.stack([_drop_values(x, fusion) for x in t])
    elif fusion.rule.startswith(_PRUNES):
        t = torch.stack([_keep_largest(x, fusion) for x in t])
    num_value_axes = t.dim() - 1
    by_adapter = weights.view(-1, *[1] * num_value_axes)  # [k, 1, ...]
    weighted = t * by_adapter
    if "ties" not in fusion.rule:
        return weighted.sum(0)
    votes = t if fusion.sign == "total" else t.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    # A pruned value is 0, has the sign 0 and never agrees, so it does not count in the mean.
    agree = t.sign() == elected
    num_agree = agree.sum(0).clamp(min=1)
    return (weighted * agree).sum(0) / num_agree


def _keep_largest(x: Tensor, fusion: _Fusion) -> Tensor:
    assert fusion.density is not None
    flat = x.flatten()
    num_kept = int(fusion.density * x.numel())
    keep = flat.abs().topk(num_kept).indices
    pruned = torch.zeros_like(flat).index_copy(0, keep, flat[keep])
    return pruned.view(x.shape)


def _drop_values(x: Tensor, fusion: _Fusion) -> Tensor:
    assert fusion.density is not None
    assert fusion.gen is not None
    if fusion.density == 1:
        return x
    odds = torch.full(x.shape, fusion.density, dtype=x.dtype, device=fusion.gen.device)
    # Drawn where the generator lies, so that a seed gives the same on any device of the factors.
    keep = torch.bernoulli(odds, generator=fusion.gen)
    return x * keep.to(x.device) / fusion.density


def _qr_core(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q [out, R], C, P [in, R] with B A = Q C P^T and orthonormal columns of Q and P: norm and singular
    values are C's.
    """
    # B = Q left and A^T = P right, so B A = Q (left right^T) P^T.
    q, left = torch.linalg.qr(b)
    p, right = torch.linalg.qr(a.T)
    return q, left @ right.T, p


def _check_weights(pool: Pool, weights: Any) -> Tensor:
    k = len(pool)
    try:
        # A tensor stays what it is: a gradient may go back to it.
        w = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(
            f"compose_adapters: weights must be numbers [{k}] or [b, {k}], got {weights!r}: {e}"
        ) from e
    if w.dim() not in (1, 2) or w.shape[-1] != k or not len(w):
        raise ValueError(
            f"compose_adapters: weights must be [{k}] or [b, {k}] for {', '.join(pool.names)}, "
            f"got {list(w.shape)}"
        )
    if not bool(w.isfinite().all()):
        raise ValueError(f"compose_adapters: weights must be finite, got {w.tolist()}")
    return w


def _check_options(mode: str, fusion: _Fusion, w: Tensor) -> None:
    rule, sign, density = fusion.rule, fusion.sign, fusion.density
    prunes = rule.startswith(_PRUNES)
    rules = get_args(Rule)
    valid = mode in ("mixture", "fusion") and rule in rules and sign in ("total", "frequency")
    # The first fault is reported; each later check relies on the ones before it.
    fault = ""
    if not valid:
        fault = (
            f"mode mixture or fusion, rule one of {', '.join(rules)}, "
            f"majority_sign total or frequency; got {mode!r}, {rule!r}, {sign!r}"
        )
    elif mode == "mixture" and rule != "cat":
        fault = f"a mixture is exact and has no rule, got {rule!r}; set mode='fusion'"
    elif w.dim() == 2 and rule != "cat":
        fault = (
            f"rule {rule!r} makes one set of factors, of weights [{w.shape[1]}], got {list(w.shape)}; "
            "samples need a mixture"
        )
    elif fusion.rank is not None and (not rule.endswith("svd") or fusion.rank < 1):
        fault = f"rank must be at least 1 and belongs to svd rules, got {fusion.rank} for rule {rule!r}"
    elif prunes and (density is None or not 0 < density <= 1):
        fault = f"rule {rule!r} needs density in (0, 1], the share of values to keep, got {density}"
    elif not prunes and density is not None:
        fault = f"rule {rule!r} keeps all values and has no density, got {density}"
    elif "dare" in rule and fusion.gen is None:
        fault = f"rule {rule!r} draws at random: give gen=torch.Generator()"
    elif "dare" not in rule and fusion.gen is not None:
        fault = f"rule {rule!r} draws nothing: no gen"
    elif sign != "total" and "ties" not in rule:
        fault = f"rule {rule!r} elects no sign, got majority_sign={sign!r}"
    if fault:
        raise ValueError(f"compose_adapters: {fault}")


def _special_part(adapter: Adapter) -> str:
    """What keeps an adapter from being composed with others, or ""."""
    routed = [module for module, factors in adapter.factors.items() if "router" in factors]
    # A share per token cannot be added up with the gates of others.
    if routed:
        return f"a router per token (H-LoRA) on {routed[0]}"
    if adapter.full:
        return (
            f"whole tensors that it replaces ({next(iter(adapter.full))}; "
            "lora.without_copies leaves out those that are the base's own)"
        )
    if any(gate.dim() > 1 for gate in adapter.gate.values()):
        return "weights that differ by sample"
    return ""


def _check_factors(module: str, owners: list[tuple[str, Adapter]]) -> None:
    """Raise where the adapters of a module are not of one model.

    Args:
        owners: (name, adapter) of those that have the module.
    """
    layers = []  # (kind, out, in, device) of each adapter
    for name, adapter in owners:
        a, b = adapter.factors[module]["a"], adapter.factors[module]["b"]
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
            raise ValueError(
                f"stack_adapters: {name!r}, {module}: A must be [r, in] and B [out, r], "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        layers.append((adapter.kinds[module], b.shape[0], a.shape[1], a.device))
    first_name, _ = owners[0]
    for (name, _), layer in zip(owners, layers, strict=True):
        if layer != layers[0]:
            raise ValueError(
                f"stack_adapters: {module} is {_describe_layer(layers[0])} for {first_name!r} and "
                f"{_describe_layer(layer)} for {name!r}; "
                "adapters must be of the same base model and on one device"
            )


def _describe_layer(layer: tuple[str, int, int, torch.device]) -> str:
    kind, width_out, width_in, device = layer
    return f"{kind} {width_in} -> {width_out} on {device}"


def _plain_factors(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """A and B with a gate [r] folded in (what is composed may itself be a mixture); as precise as the
    gate.
    """
    a, b = adapter.factors[module]["a"], adapter.factors[module]["b"]
    gate = adapter.gate.get(module)
    if gate is None:
        return a, b
    # B takes the gate and with it its precision; A is widened along, so that both have one dtype.
    dtype = torch.promote_types(a.dtype, gate.dtype)
    return a.to(dtype), b * gate


def _column_weights(layout: Layout, weights: Tensor) -> Tensor:
    """w s of the adapter of each column, float64 [R]."""
    scales = torch.tensor(layout.scales, dtype=torch.float64, device=layout.owner.device)
    by_adapter = weights.to(scales) * scales
    return by_adapter[layout.owner]
