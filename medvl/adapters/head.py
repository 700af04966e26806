"""Linear heads behind an embedder: trained by contrast, or whitened in closed form.

In shapes n are samples, d is the width of their vectors, e that of a head's output.
"""

from collections.abc import Hashable, Sequence
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl.adapters.contrast import fit_encoder
from medvl.adapters.retriever_config import RetrieverConfig
from medvl.adapters.sample_tasks import check_tasks, number_tasks
from medvl.base.tree import Tree


def head_of(cfg: RetrieverConfig, vectors: Tensor, tasks: Sequence[Hashable]) -> Tensor | None:
    """The head [d, e] of cfg.kind; args and errors as `train_retriever` and `whiten_tasks`."""
    if cfg.kind == "whiten":
        return whiten_tasks(vectors, tasks, cfg.shrink)
    if cfg.kind == "contrast" and cfg.steps:
        return train_retriever(cfg, vectors, tasks)
    return None


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
    vectors = _check_vectors("train_retriever", vectors, tasks)
    d = vectors.shape[1]
    if cfg.dims > d:
        raise ValueError(
            f"train_retriever: dims must be within 0..{d}, the width of the vectors, got {cfg.dims}"
        )
    # Where e < d the first e coordinates are kept.
    start = torch.eye(d, cfg.dims or d, dtype=vectors.dtype, device=vectors.device)

    def encode(params: Tree, rows: Tensor) -> Tensor:
        # `moved` is the difference from the start, so that weight decay pulls to the embedder, not to 0.
        return vectors[rows.to(vectors.device)] @ (start + params["moved"])

    trained = fit_encoder(cfg, encode, {"moved": torch.zeros_like(start)}, tasks, held)
    return start + trained["moved"]


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
    wide = _check_vectors("whiten_tasks", vectors, tasks)
    names, numbers = number_tasks(tasks)
    check_tasks("whiten_tasks", names, numbers)
    # In float64: the variances of directions that matter may lie far below the largest.
    x = F.normalize(wide.double(), dim=1)
    numbers = numbers.to(x.device)
    sums = torch.zeros(len(names), x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, numbers, x)
    means = sums / torch.bincount(numbers)[:, None]
    # [n, d]: what differs between samples of one task should not count when tasks are told apart.
    within = x - means[numbers]
    covariance = within.T @ within / len(x)
    variance, axes = torch.linalg.eigh(covariance)
    mean = float(variance.mean())
    if mean <= 1e-12:
        raise ValueError(
            "whiten_tasks: samples of a task must differ, within every task they are all the same"
        )
    # clamp: rounding makes eigenvalues of 0 slightly negative. With fewer samples than d many are 0, and
    # only `shrink` keeps their gain finite.
    gain = (variance.clamp(min=0) + shrink * mean).rsqrt()
    # The scale is free, as cosines are taken behind it: the mean square of the gains is made 1.
    head = (axes * (gain / gain.square().mean().sqrt())) @ axes.T
    return head.to(torch.promote_types(vectors.dtype, torch.float32))


def _check_vectors(where: str, vectors: Tensor, tasks: Sequence[Hashable]) -> Tensor:
    """The vectors, at least float32, each finite and with a direction."""
    if vectors.dim() != 2 or not vectors.is_floating_point() or len(vectors) != len(tasks):
        got = f"{str(vectors.dtype).removeprefix('torch.')} {list(vectors.shape)} and {len(tasks)}"
        raise ValueError(f"{where}: vectors must be floating point [n, d] and tasks [n], got {got}")
    wide = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    is_good = wide.isfinite().all(1) & (wide != 0).any(1)
    bad = (~is_good).nonzero()
    if len(bad):
        raise ValueError(
            f"{where}: vectors must be finite and not zero, row {int(bad[0])} is not ({len(bad)} such)"
        )
    return wide
