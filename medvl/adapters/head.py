"""Training what adapters are retrieved by: samples of one task are drawn together, samples of others
apart."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import isfinite
from typing import Literal

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from medvl.adapters.retrieve import adapter_recall, adapter_vector
from medvl.base import config
from medvl.base.tree import Tree, map_leaves
from medvl.training import gradients, loop, states
from medvl.training.optim import Rate, adamw, seeded, warmup_cosine

Encode = Callable[[Tree, Tensor], Tensor]  # (params, rows int64 [b]) -> [b, e]


@frozen(kw_only=True)
class RetrieverConfig:
    """How a head behind an embedder is made, how long and how fast it is trained, and on what batches."""

    kind: Literal["none", "contrast", "whiten"] = (
        "contrast"  # "whiten": `whiten_tasks`, which takes `shrink` and nothing else
    )
    shrink: float = 0.1
    steps: int = 1000
    lr: float = 3e-3  # its highest; falls along a half cosine
    weight_decay: float = 0.0  # of a head towards the embedder itself, of an encoder's matrices towards 0
    temperature: float = 0.05
    negatives: int = 16  # samples of other tasks against every anchor
    batch: int = 64  # anchors
    dims: int = 0  # width of a head's output; 0 = as wide as the vectors
    every: int = 50  # steps from one validation to the next, where tasks are held out
    chunk: int = 0  # samples encoded at a time, for the memory of a large encoder; 0 = all of a batch
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        least = {"steps": 0, "negatives": 1, "batch": 1, "dims": 0, "every": 1, "chunk": 0, "seed": 0}
        for name, low in least.items():
            # bool is a kind of int to Python, and True would pass for 1.
            if isinstance(v := getattr(self, name), bool) or not isinstance(v, int) or v < low:
                raise ValueError(f"RetrieverConfig: {name} must be a whole number >= {low}, got {v!r}")
        if self.kind not in ("none", "contrast", "whiten") or not isfinite(self.shrink) or self.shrink <= 0:
            raise ValueError(
                "RetrieverConfig: kind must be none, contrast or whiten and shrink > 0, got "
                f"{self.kind!r}, {self.shrink}"
            )
        if not isfinite(self.temperature) or self.temperature <= 0:
            raise ValueError(
                f"RetrieverConfig: temperature must be finite and above 0, got {self.temperature}"
            )
        if not (isfinite(self.lr) and self.lr > 0 and isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(
                f"RetrieverConfig: needs lr > 0 and weight_decay >= 0, got {self.lr} and {self.weight_decay}"
            )
        config.check_bounds(
            self,
            "RetrieverConfig",
            steps=config.COUNT_OR_NONE,
            every=config.COUNT,
            batch=(1, 2**20),
            chunk=(0, 2**20),
        )
        config.check_bounds(
            self, "RetrieverConfig", negatives=(1, 2**20), dims=config.WIDTH_OR_NONE, seed=config.SEED
        )
        config.check_bounds(
            self,
            "RetrieverConfig",
            lr=config.RATE,
            weight_decay=(0, 1e6),
            shrink=(0, 1e6),
            temperature=(0, 1e6),
        )


@frozen(kw_only=True, eq=False)
class Pairs:
    """A batch as places in the list of samples, int64."""

    anchors: Tensor  # [b]
    positives: Tensor  # [b], of the anchor's task, never the anchor itself
    negatives: Tensor  # [b, p], of other tasks


def head_of(cfg: RetrieverConfig, vectors: Tensor, tasks: Sequence[Hashable]) -> Tensor | None:
    """The head [d, e] of cfg.kind; args and errors as `train_retriever` and `whiten_tasks`."""
    if cfg.kind == "whiten":
        return whiten_tasks(vectors, tasks, cfg.shrink)
    return train_retriever(cfg, vectors, tasks) if cfg.kind == "contrast" and cfg.steps else None


def task_contrast(anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean over rows of -log(exp(s+ / g) / (exp(s+ / g) + sum_j exp(s-_j / g))), s the cosine to the
    anchor, g the temperature; [].

    Args:
        anchor, positive: [b, d], of any length.
        negatives: [b, p, d], each row's own.
    Raises:
        ValueError: other shapes, no row or no negative, a temperature that is not finite and above 0.
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, section 4; the paper prints the ratio, the
        loss is its -log.
    """
    b, d = anchor.shape if anchor.dim() == 2 else (0, 0)
    if (
        not b
        or positive.shape != (b, d)
        or negatives.dim() != 3
        or negatives.shape != (b, max(1, negatives.shape[1]), d)
    ):
        got = f"{list(anchor.shape)}, {list(positive.shape)} and {list(negatives.shape)}"
        raise ValueError(
            "task_contrast: anchor and positive must be [b, d] and negatives [b, p, d], b and p above "
            f"0, got {got}"
        )
    if not isfinite(temperature) or temperature <= 0:
        raise ValueError(f"task_contrast: temperature must be finite and above 0, got {temperature}")
    # The positive is class 0 of 1 + p, so the loss is a cross entropy with target 0 in each row.
    others = torch.cat([positive[:, None], negatives], 1)
    cosines = torch.einsum("bd,bpd->bp", F.normalize(anchor, dim=-1), F.normalize(others, dim=-1))
    return F.cross_entropy(cosines / temperature, torch.zeros(b, dtype=torch.int64, device=anchor.device))


def draw_pairs(tasks: Sequence[Hashable], step: int, seed: int, batch: int, p: int) -> Pairs:
    """The batch of a step: a pure function of (seed, step).

    An anchor's task is drawn first, so that a task of many samples counts no more than one of few; then
    anchor and positive among its samples, and p samples among those of all other tasks, with replacement.
    Args:
        tasks: the task of each of n samples.
    Raises:
        ValueError: fewer than two tasks, a task with one sample (names it), batch or p below 1.
    """
    if min(batch, p) < 1:
        raise ValueError(f"draw_pairs: batch and p must be at least 1, got {batch} and {p}")
    names, codes = _codes(tasks)
    _check_tasks("draw_pairs", names, codes)
    return _drawn(codes, torch.arange(len(codes)), step, seed, batch, p)


def train_retriever(
    cfg: RetrieverConfig, vectors: Tensor, tasks: Sequence[Hashable], held: Sequence[Hashable] = ()
) -> Tensor:
    """A linear map [d, e] over an embedder's frozen vectors, after which `vectors @ head` of one task lie
    together.

    It starts as the identity (its first e columns), so that the untrained retriever is the embedder, and
    weight decay pulls it back there. Both adapters' samples and queries go through it:
    `adapter_vector(samples @ head)`, `retrieve(cfg, queries @ head, ...)`.
    Args:
        vectors: [n, d], of any length, one per sample.
        tasks: the task of each sample, of two samples at least.
        held: tasks among them that are not trained on; what finds these best is returned, see `fit_encoder`.
    Raises:
        ValueError: vectors that are not floating point [n, d], finite and other than zero (names the
            row), dims above d, and as `fit_encoder`.
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, section 4, which trains the whole
        embedder; that is `fit_encoder`.
    """
    wide, d = _vectors("train_retriever", vectors, tasks), vectors.shape[1]
    if cfg.dims > d:
        raise ValueError(
            f"train_retriever: dims must be within 0..{d}, the width of the vectors, got {cfg.dims}"
        )
    # Where e < d the first e coordinates are kept.
    start = torch.eye(d, cfg.dims or d, dtype=wide.dtype, device=wide.device)

    def encode(params: Tree, rows: Tensor) -> Tensor:
        # `moved` is the difference from the start, so that weight decay pulls to the embedder, not to 0.
        return wide[rows.to(wide.device)] @ (start + params["moved"])

    return start + fit_encoder(cfg, encode, {"moved": torch.zeros_like(start)}, tasks, held)["moved"]


def whiten_tasks(vectors: Tensor, tasks: Sequence[Hashable], shrink: float = 0.1) -> Tensor:
    """A head [d, d] in closed form: directions count the less, the more samples of one task differ along
    them.

    The inverse square root of the covariance within tasks; `vectors @ head` as of `train_retriever`, with
    which it is to be compared.
    Args:
        vectors, tasks: as in `train_retriever`.
        shrink: of the covariance towards a multiple of the identity, in parts of its mean variance; large
            = the embedder itself.
    Raises:
        ValueError: shrink that is not finite and above 0, fewer than two tasks, a task with one sample,
            samples that do not differ within any task, vectors as `train_retriever` refuses them.
    Source: Hatch et al. 2006, Within-class covariance normalization for SVM-based speaker recognition,
        section 3.
    """
    if not isfinite(shrink) or shrink <= 0:
        raise ValueError(f"whiten_tasks: shrink must be finite and above 0, got {shrink}")
    x, (names, codes) = _vectors("whiten_tasks", vectors, tasks), _codes(tasks)
    _check_tasks("whiten_tasks", names, codes)
    # In float64: the variances of directions that matter may lie far below the largest.
    x = F.normalize(x.double(), dim=1)
    at = codes.to(x.device)
    means = (
        torch.zeros(len(names), x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, at, x)
        / torch.bincount(at)[:, None]
    )
    # [n, d]: what differs between samples of one task should not count when tasks are told apart.
    within = x - means[at]
    covariance = within.T @ within / len(x)
    variance, axes = torch.linalg.eigh(covariance)
    if (mean := float(variance.mean())) <= 1e-12:
        raise ValueError(
            "whiten_tasks: samples of a task must differ, within every task they are all the same"
        )
    # clamp: rounding makes eigenvalues of 0 slightly negative. With fewer samples than d many are 0, and
    # only `shrink` keeps their gain finite.
    gain = (variance.clamp(min=0) + shrink * mean).rsqrt()
    # The scale is free, as cosines are taken behind it: the mean square of the gains is made 1.
    head = (axes * (gain / gain.square().mean().sqrt())) @ axes.T
    return head.to(torch.promote_types(vectors.dtype, torch.float32))


def fit_encoder(
    cfg: RetrieverConfig,
    encode: Encode,
    params: Tree,
    tasks: Sequence[Hashable],
    held: Sequence[Hashable] = (),
) -> Tree:
    """The parameters after training by `task_contrast`: a whole encoder's, an adapter's over a frozen
    one, a head's.

    Args:
        encode: (params, rows int64 [b]) -> [b, e], the embeddings of the samples at these places; a row's
            must not depend on the others. For adapters it applies them itself, so that the gradient
            reaches them.
        params: what is trained; what is frozen `encode` holds itself. They are left as they were.
        tasks: the task of each sample, of two samples at least.
        held: tasks that are not trained on. Every `cfg.every` steps recall@1 of their samples among all
            tasks is taken (`task_recall`), and the earliest best is returned, which may be `params`. Left
            out, the last parameters are.
    Raises:
        ValueError: fewer than two tasks to train on, a task with one sample (names it), a held-out task
            that no sample has, embeddings that are not [b, e].
        FloatingPointError: the loss is not finite.
    Source: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, section 4.
    """
    names, codes = _codes(tasks)
    if missing := [t for t in held if t not in names]:
        raise ValueError(
            f"fit_encoder: every task held out must be among tasks, {missing[0]!r} is not "
            f"({len(missing)} such)"
        )
    is_held_out = torch.isin(codes, torch.tensor([names.index(t) for t in held], dtype=torch.int64))
    rows = (~is_held_out).nonzero()[:, 0]
    _check_tasks("fit_encoder", names, codes, rows)
    optimizer = adamw(
        lambda name: Rate(lr=cfg.lr, weight_decay=cfg.weight_decay), warmup_cosine(cfg.steps, 0)
    )
    start = map_leaves(lambda leaf: leaf.detach().clone(), params)  # steps reuse what they are given
    best, best_recall = start, -1.0

    def validate(state: states.State) -> dict[str, float]:
        nonlocal best, best_recall
        embeddings = _embed_all(cfg, encode, state.params, len(codes))
        recall = _recall(embeddings, codes, is_held_out, [1])[1]
        # Above, not equal: the earliest of equally good ones is kept.
        if recall > best_recall:
            # A copy: the next step reuses the buffers of this state.
            best, best_recall = map_leaves(torch.clone, state.params), recall
        return {"score": recall}

    state = states.State(params=start, opt=optimizer.init(start))
    if len(held):
        validate(state)  # what is there before the training may be the best
    try:
        state = loop.train_steps(
            loop.make_step(partial(_grad, cfg, encode), optimizer),
            state,
            lambda i: _drawn(codes, rows, i, cfg.seed, cfg.batch, cfg.negatives),
            steps=cfg.steps,
            # Nothing is written, so a stop loses the training.
            folder=None,
            every=loop.Every(log=0, save=0, validate=cfg.every),
            validate=validate if len(held) else None,
            title="retriever",
        )
    except loop.NotFinite as e:
        raise FloatingPointError(f"fit_encoder: {e.reason} at step {e.step}; lower lr, now {cfg.lr}") from e
    return best if len(held) else state.params


def task_recall(embeddings: Tensor, tasks: Sequence[Hashable], ks: Sequence[int] = (1,)) -> dict[int, float]:
    """{k: share of samples whose task is among the k whose adapter vectors are nearest}, each sample left
    out of its own task's vector.

    Args:
        embeddings: [n, d], of any length.
        tasks: the task of each sample.
    Raises:
        ValueError: fewer than two tasks, a task with one sample (names it), embeddings that
            `adapter_vector` refuses, k out of range.
    """
    names, codes = _codes(tasks)
    if embeddings.dim() != 2 or len(embeddings) != len(codes):
        raise ValueError(
            f"task_recall: embeddings must be [n, d] and tasks [n], got {list(embeddings.shape)} and "
            f"{len(codes)}"
        )
    _check_tasks("task_recall", names, codes)
    return _recall(embeddings, codes, torch.ones_like(codes, dtype=torch.bool), ks)


def _grad(
    cfg: RetrieverConfig, encode: Encode, params: Tree, pairs: Pairs
) -> tuple[Tensor, gradients.Aux, Tree]:
    """Each sample of a batch is encoded once, however often it was drawn."""
    b, p = pairs.negatives.shape
    # `place` [2 b + b p] leads from each drawn sample to its row among the different ones.
    rows, place = torch.cat([pairs.anchors, pairs.positives, pairs.negatives.flatten()]).unique(
        return_inverse=True
    )

    def embed(params: Tree, batch: gradients.Batch) -> gradients.Batch:
        return {"z": _encoded(encode, params, batch["rows"])}

    def contrast(params: Tree, found: gradients.Batch) -> tuple[Tensor, gradients.Aux]:
        anchor, positive, negatives = found["z"][place.to(found["z"].device)].split([b, b, b * p])
        return task_contrast(
            anchor, positive, negatives.unflatten(0, (b, p)), cfg.temperature
        ), gradients.Aux()

    # `rows` alone goes through chunks; the drawn pairs are put together from all embeddings at once.
    return gradients.cached_value_and_grad(embed, contrast, chunk=cfg.chunk or len(rows))(
        params, {"rows": rows}
    )


def _encoded(encode: Encode, params: Tree, rows: Tensor) -> Tensor:
    z = encode(params, rows)
    if z.dim() != 2 or len(z) != len(rows):
        raise ValueError(
            f"fit_encoder: encode must give [b, e], here [{len(rows)}, e], got {list(z.shape)}; pool "
            "the tokens"
        )
    return z


@torch.no_grad()
def _embed_all(cfg: RetrieverConfig, encode: Encode, params: Tree, n: int) -> Tensor:
    return torch.cat(
        [_encoded(encode, params, rows).float() for rows in torch.arange(n).split(cfg.chunk or n)]
    )


def _recall(z: Tensor, codes: Tensor, asked: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Recall of the samples where `asked`, among all tasks."""
    unit = F.normalize(z.double(), dim=-1)
    vectors = torch.stack([adapter_vector(z[codes == t]) for t in range(int(codes.max()) + 1)]).double()
    similarity = unit @ vectors.T
    # Sums, since the cosine to a mean is that to the sum.
    total = torch.zeros_like(vectors).index_add_(0, codes.to(z.device), unit)
    own = (unit * F.normalize(total[codes] - unit, dim=-1)).sum(1)  # the mean without the sample itself
    similarity[torch.arange(len(codes)), codes] = own
    return adapter_recall(similarity[asked], codes[asked], ks)


def _drawn(codes: Tensor, rows: Tensor, step: int, seed: int, batch: int, p: int) -> Pairs:
    """`draw_pairs` among the samples at `rows`, of tasks as numbers."""
    gen, n = seeded(torch.device("cpu"), seed, step, "pairs"), len(rows)
    order = rows[codes[rows].argsort(stable=True)]  # the samples of a task side by side
    size = torch.unique(codes[rows], return_counts=True)[1]
    first = size.cumsum(0) - size

    def below(limit: Tensor) -> Tensor:
        # `randint` takes one limit for all, here each draw has its own. Float32 has 2**24 values below 1, too
        # few to reach many samples evenly.
        return (torch.rand(limit.shape, generator=gen, dtype=torch.float64) * limit).long()

    task = below(torch.full((batch,), len(size)))
    m, start = size[task], first[task]
    anchor = below(m)
    # An offset of 1 to m - 1 around the circle of the task's m samples: any of them but the anchor.
    positive = (anchor + 1 + below(m - 1)) % m
    other = below((n - m)[:, None].expand(batch, p))
    other += (other >= start[:, None]) * m[:, None]  # past the samples of the anchor's own task
    return Pairs(anchors=order[start + anchor], positives=order[start + positive], negatives=order[other])


def _vectors(who: str, vectors: Tensor, tasks: Sequence[Hashable]) -> Tensor:
    """The vectors, at least float32, each finite and with a direction."""
    if vectors.dim() != 2 or not vectors.is_floating_point() or len(vectors) != len(tasks):
        got = f"{str(vectors.dtype).removeprefix('torch.')} {list(vectors.shape)} and {len(tasks)}"
        raise ValueError(f"{who}: vectors must be floating point [n, d] and tasks [n], got {got}")
    wide = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    if len(bad := (~(wide.isfinite().all(1) & (wide != 0).any(1))).nonzero()):
        raise ValueError(
            f"{who}: vectors must be finite and not zero, row {int(bad[0])} is not ({len(bad)} such)"
        )
    return wide


def _codes(tasks: Sequence[Hashable]) -> tuple[list[Hashable], Tensor]:
    """(the tasks in order of appearance, the place of each sample's among them int64 [n])."""
    place: dict[Hashable, int] = {}
    # Elements of a tensor are objects of their own, and would each be another key.
    values = tasks.tolist() if isinstance(tasks, Tensor) else tasks
    codes = [place.setdefault(t, len(place)) for t in values]
    return list(place), torch.tensor(codes, dtype=torch.int64)


def _check_tasks(who: str, names: list[Hashable], codes: Tensor, rows: Tensor | None = None) -> None:
    """Every task has two samples, and there are two of those at `rows` (of all, if left out)."""
    n = len(codes[rows].unique()) if rows is not None else len(names)
    if n < 2:
        raise ValueError(f"{who}: needs at least two tasks to tell apart, got {n}")
    if few := [names[i] for i, m in enumerate(torch.bincount(codes).tolist()) if m < 2]:
        raise ValueError(
            f"{who}: every task must have two samples or more, {few[0]!r} has one ({len(few)} such)"
        )
