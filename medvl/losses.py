"""Contrastive losses between two sets of embeddings whose rows belong together."""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE: mean cross-entropy of finding row i's partner among all rows, in both directions.

    Args:
        image, text: [b, d], L2-normalised; row i of one belongs to row i of the other.
        scale: multiplies the cosines (1 / temperature).
    Raises:
        ValueError: shapes differ, or one row (the loss would be 0 whatever the embeddings are).
    Source: Radford et al. 2021, arXiv:2103.00020, fig. 3.
    """
    _check("clip_loss", image, text)
    logits = scale * image @ text.T
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Sum over all pairs of -log sigmoid(+-(scale cos + bias)), divided by the rows: + for partners, - for all others.

    Args and errors as `clip_loss`; start with scale = 10, bias = -10.
    Source: Zhai et al. 2023, arXiv:2303.15343, algorithm 1.
    """
    _check("siglip_loss", image, text)
    logits = scale * image @ text.T + bias
    sign = 2 * torch.eye(len(image), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def _check(name: str, image: Tensor, text: Tensor) -> None:
    if image.shape != text.shape or image.dim() != 2:
        raise ValueError(f"{name}: image and text must both be [b, d], got {tuple(image.shape)} and {tuple(text.shape)}")
    if len(image) < 2:
        raise ValueError(
            f"{name}: needs at least 2 rows to contrast, got {len(image)}; raise the batch (train.batch), the chunk may stay small"
        )
