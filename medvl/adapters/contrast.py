"""Training by contrast: samples of one task are drawn together, samples of others apart.

In shapes b are anchors, p negatives of each, n samples, e the width of an embedding.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import isfinite

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from medvl.adapters.recall import recall_of_samples
from medvl.adapters.retriever_config import RetrieverConfig
from medvl.adapters.sample_tasks import check_tasks, number_tasks
from medvl.base.tree import Tree, map_leaves
from medvl.training import gradients, loop, states
from medvl.training.optim import Rate, adamw, seeded, warmup_cosine

Encode = Callable[[Tree, Tensor], Tensor]  # (params, rows int64 [b]) -> [b, e]


@frozen(kw_only=True, eq=False)
class Pairs:
    """A batch as places in the list of samples, int64."""

    anchors: Tensor  # [b]
    positives: Tensor  # [b], of the anchor's task, never the anchor itself
    negatives: Tensor  # [b, p], of other tasks


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
    is_batch = anchor.dim() == 2 and len(anchor) > 0 and positive.shape == anchor.shape
    has_negatives = negatives.dim() == 3 and negatives.shape[1] > 0 and negatives[:, 0].shape == anchor.shape
    if not is_batch or not has_negatives:
        got = f"{list(anchor.shape)}, {list(positive.shape)} and {list(negatives.shape)}"
        raise ValueError(
            "task_contrast: anchor and positive must be [b, d] and negatives [b, p, d], b and p above "
            f"0, got {got}"
        )
    if not isfinite(temperature) or temperature <= 0:
        raise ValueError(f"task_contrast: temperature must be finite and above 0, got {temperature}")
    # The positive is class 0 of 1 + p, so the loss is a cross entropy with target 0 in each row.
    candidates = torch.cat([positive[:, None], negatives], 1)
    cosines = torch.einsum("bd,bpd->bp", F.normalize(anchor, dim=-1), F.normalize(candidates, dim=-1))
    target = torch.zeros(len(anchor), dtype=torch.int64, device=anchor.device)
    return F.cross_entropy(cosines / temperature, target)


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
    names, numbers = number_tasks(tasks)
    check_tasks("draw_pairs", names, numbers)
    return _draw_among(numbers, torch.arange(len(numbers)), step, seed, batch, p)


def _draw_among(numbers: Tensor, rows: Tensor, step: int, seed: int, batch: int, p: int) -> Pairs:
    """`draw_pairs` among the samples at `rows`, of tasks as numbers."""
    gen = seeded(torch.device("cpu"), seed, step, "pairs")
    n = len(rows)
    by_task = rows[numbers[rows].argsort(stable=True)]  # the samples of a task side by side
    sizes = torch.unique(numbers[rows], return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes

    def draw_below(limits: Tensor) -> Tensor:
        # `randint` takes one limit for all, here each draw has its own. Float32 has 2**24 values below 1, too
        # few to reach many samples evenly.
        return (torch.rand(limits.shape, generator=gen, dtype=torch.float64) * limits).long()

    task = draw_below(torch.full((batch,), len(sizes)))
    size, start = sizes[task], starts[task]
    anchor = draw_below(size)
    # An offset of 1 to size - 1 around the circle of the task's samples: any of them but the anchor.
    positive = (anchor + 1 + draw_below(size - 1)) % size
    negative = draw_below((n - size)[:, None].expand(batch, p))
    negative += (negative >= start[:, None]) * size[:, None]  # past the samples of the anchor's own task
    return Pairs(
        anchors=by_task[start + anchor], positives=by_task[start + positive], negatives=by_task[negative]
    )


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
    names, numbers = number_tasks(tasks)
    is_held_out = _find_held_out(names, numbers, held)
    rows = (~is_held_out).nonzero()[:, 0]
    check_tasks("fit_encoder", names, numbers, rows)
    # A copy: steps reuse the tensors that they are given.
    start = map_leaves(lambda leaf: leaf.detach().clone(), params)
    if not len(held):
        return _train(cfg, encode, start, numbers, rows)
    best, best_recall = start, -1.0

    def validate(state: states.State) -> dict[str, float]:
        nonlocal best, best_recall
        embeddings = _embed_all(cfg, encode, state.params, len(numbers))
        recall = recall_of_samples(embeddings, numbers, is_held_out, [1])[1]
        # Above, not equal: the earliest of equally good ones is kept.
        if recall > best_recall:
            # A copy: the next step reuses the buffers of this state.
            best, best_recall = map_leaves(torch.clone, state.params), recall
        return {"score": recall}

    _train(cfg, encode, start, numbers, rows, validate)
    return best


def _find_held_out(names: list[Hashable], numbers: Tensor, held: Sequence[Hashable]) -> Tensor:
    """Which samples are of the tasks `held`, bool [n]."""
    missing = [task for task in held if task not in names]
    if missing:
        raise ValueError(
            f"fit_encoder: every task held out must be among tasks, {missing[0]!r} is not "
            f"({len(missing)} such)"
        )
    return torch.isin(numbers, torch.tensor([names.index(task) for task in held], dtype=torch.int64))


def _train(
    cfg: RetrieverConfig,
    encode: Encode,
    start: Tree,
    numbers: Tensor,
    rows: Tensor,
    validate: Callable[[states.State], dict[str, float]] | None = None,
) -> Tree:
    """The parameters after cfg.steps on pairs of the samples `rows`; `validate` also sees the start."""
    optimizer = adamw(
        lambda name: Rate(lr=cfg.lr, weight_decay=cfg.weight_decay), warmup_cosine(cfg.steps, 0)
    )
    state = states.State(params=start, opt=optimizer.init(start))
    if validate is not None:
        validate(state)  # what is there before the training may be the best
    try:
        state = loop.train_steps(
            loop.make_step(partial(_contrast_gradient, cfg, encode), optimizer),
            state,
            lambda i: _draw_among(numbers, rows, i, cfg.seed, cfg.batch, cfg.negatives),
            steps=cfg.steps,
            # Nothing is written, so a stop loses the training.
            folder=None,
            every=loop.Every(log=0, save=0, validate=cfg.every),
            validate=validate,
            title="retriever",
        )
    except loop.NotFinite as e:
        raise FloatingPointError(f"fit_encoder: {e.reason} at step {e.step}; lower lr, now {cfg.lr}") from e
    return state.params


def _contrast_gradient(
    cfg: RetrieverConfig, encode: Encode, params: Tree, pairs: Pairs
) -> tuple[Tensor, gradients.Aux, Tree]:
    """Loss and gradient of a batch; each sample is encoded once, however often it was drawn."""
    b, p = pairs.negatives.shape
    samples = torch.cat([pairs.anchors, pairs.positives, pairs.negatives.flatten()])
    # `place` [2 b + b p] leads from each drawn sample to its row among the different ones.
    rows, place = samples.unique(return_inverse=True)

    def embed(params: Tree, batch: gradients.Batch) -> gradients.Batch:
        return {"embeddings": _encode_rows(encode, params, batch["rows"])}

    def contrast(params: Tree, outputs: gradients.Batch) -> tuple[Tensor, gradients.Aux]:
        embeddings = outputs["embeddings"]
        anchor, positive, negatives = embeddings[place.to(embeddings.device)].split([b, b, b * p])
        loss = task_contrast(anchor, positive, negatives.unflatten(0, (b, p)), cfg.temperature)
        return loss, gradients.Aux()

    # `rows` alone goes through chunks; the drawn pairs are put together from all embeddings at once.
    gradient = gradients.cached_value_and_grad(embed, contrast, chunk=cfg.chunk or len(rows))
    return gradient(params, {"rows": rows})


def _encode_rows(encode: Encode, params: Tree, rows: Tensor) -> Tensor:
    embeddings = encode(params, rows)
    if embeddings.dim() != 2 or len(embeddings) != len(rows):
        raise ValueError(
            f"fit_encoder: encode must give [b, e], here [{len(rows)}, e], got {list(embeddings.shape)}; "
            "pool the tokens"
        )
    return embeddings


@torch.no_grad()
def _embed_all(cfg: RetrieverConfig, encode: Encode, params: Tree, n: int) -> Tensor:
    """The embeddings of all n samples, float32 [n, e]."""
    chunks = torch.arange(n).split(cfg.chunk or n)
    return torch.cat([_encode_rows(encode, params, rows).float() for rows in chunks])
