"""Contrastive losses between two sets of embeddings whose rows belong together, and the next-token loss of a
language model.

The next-token loss takes its logits in chunks: with a vocabulary of 150,000 one float32 row of them is 0.6
MB. The gradient by a plain head and by the hidden states is taken in the forward pass, where the logits are
at
hand. Any other head (a tensor subclass that answers F.linear: low rank, quantised, sharded) is projected
again chunk by chunk in the backward pass, and its parts get their gradients from autograd.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvl.base.transfer import index_device, to_device

IGNORE = -100  # label of a token that is not trained


def clip_loss(image: Tensor, text: Tensor, scale: Tensor | float, own: slice = slice(None)) -> Tensor:
    """Symmetric InfoNCE: mean cross-entropy of finding row i's partner among all rows, in both directions.

    Args:
        image, text: [b, d], L2-normalised; row i of one belongs to row i of the other.
        scale: multiplies the cosines (1 / temperature).
        own: the rows whose mean is taken, each still against all: logits [own, b] instead of [b, b].
    Raises:
        ValueError: shapes differ, or one row (the loss would be 0 whatever the embeddings are).
    Source: Radford et al. 2021, arXiv:2103.00020, fig. 3.
    """
    _check("clip_loss", image, text)
    target = torch.arange(len(image), device=image.device)[own]
    # Row an image, column a text; of all rows partners lie on the diagonal, and one product serves both ways.
    to_text = scale * image[own] @ text.T
    to_image = to_text.T if len(target) == len(image) else scale * text[own] @ image.T
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2


def siglip_loss(
    image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float, own: slice = slice(None)
) -> Tensor:
    """Sum over all pairs of -log sigmoid(+-(scale cos + bias)), divided by the rows: + for partners, - for
    all others.

    Args and errors as `clip_loss` (`own` are images, against all texts); start with scale = 10, bias = -10.
    Source: Zhai et al. 2023, arXiv:2303.15343, algorithm 1.
    """
    _check("siglip_loss", image, text)
    logits = scale * image[own] @ text.T + bias
    partner = torch.arange(len(image), device=logits.device)[own]
    sign = torch.full_like(logits, -1).scatter_(1, partner[:, None], 1)  # 1 for partners, else -1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def _check(name: str, image: Tensor, text: Tensor) -> None:
    if image.shape != text.shape or image.dim() != 2:
        raise ValueError(
            f"{name}: image and text must both be [b, d], got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if len(image) < 2:
        raise ValueError(
            f"{name}: needs at least 2 rows to contrast, got {len(image)}; "
            "raise the batch (train.batch), the chunk may stay small"
        )


# The next token --------------------
def token_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 256,
    reduction: Literal["sum", "none"] = "sum",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token at the trained positions only, without ever holding the logits of more
    than `chunk` of them.

    Position i predicts labels[:, i + 1]; the shift is made here. The softmax is taken in float32.

    Args:
        hidden: last hidden states [b, t, d], after the last norm.
        head: [v, d], trainable or frozen. It gets rows [n, d] of any samples, so it cannot differ by sample;
            one that is gathered from several processes must be gathered before (each process has its own
            number of chunks).
        labels: int64 [b, t], not shifted, IGNORE (-100) where not trained; labels[:, 0] has no position
            before it and is left out. Nothing waits for the device of `hidden` while they are on the CPU.
        bias: [v].
        chunk: tokens projected at once; chunk x v float32 logits are the memory this takes (and as many again
            in bfloat16).
        reduction: "sum", or "none" for the loss of every label.
    Returns:
        sum of the losses, float32 (float64 for such inputs), 0 where nothing is trained; with "none" [b, t],
            0 where not trained.
        number of trained tokens, int64. Divide one by the other only over a whole batch: a mean of the means
            of micro-batches would weigh a token of a short answer more than one of a long answer.
    Raises:
        ValueError: shapes, chunk or reduction are others; of labels on a CPU also those outside the vocabulary.
    Source: the fused linear cross-entropy of Hsu et al. 2024 (Liger), arXiv:2410.10989, in plain torch.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2] or labels.dtype != torch.int64:
        got = f"{list(hidden.shape)} and {labels.dtype} {list(labels.shape)}"
        raise ValueError(f"token_cross_entropy: hidden must be [b, t, d] and labels int64 [b, t], got {got}")
    if chunk < 1 or reduction not in ("sum", "none"):
        raise ValueError(
            f"token_cross_entropy: chunk must be >= 1 and reduction sum or none, got {chunk}, {reduction!r}"
        )
    keep = trained_mask(labels)
    targets = labels[keep]  # [n], n trained tokens
    bounds = _label_range(targets)
    # By place and not by mask, so that only labels need values. A token is predicted at the place before it.
    places = keep.flatten().nonzero()[:, 0]
    places, targets = to_device(places, hidden.device), to_device(targets, hidden.device)
    rows = hidden.flatten(0, 1)[places - 1]  # [n, d]
    count = torch.full((), len(targets), device=index_device(hidden.device))
    plain_head = type(head) in (Tensor, nn.Parameter)  # not isinstance: a lazy weight is a Tensor too
    if reduction == "sum" and plain_head and torch.is_grad_enabled():
        return _DenseLoss.apply(rows, head, bias, targets, chunk, bounds), count
    losses = _chunked_losses(rows, head, bias, targets, chunk, bounds)
    if reduction == "sum":
        return losses.sum(), count
    return losses.new_zeros(labels.numel()).index_copy(0, places, losses).view(labels.shape), count


def _chunked_losses(
    rows: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int,
    bounds: tuple[int, int] | None,
) -> Tensor:
    """The loss of each row [n], with the gradients of autograd: for any head."""

    def chunk_losses(x: Tensor, y: Tensor) -> Tensor:
        logits = _widen(F.linear(x, head, bias))
        _check_range(bounds, logits.shape[-1])
        return F.cross_entropy(logits, y, reduction="none")

    losses = []
    for x, y in zip(rows.split(chunk), targets.split(chunk), strict=True):
        # For a gradient only the rows of a chunk are kept, and its logits computed again.
        if torch.is_grad_enabled():
            losses.append(checkpoint(chunk_losses, x, y, use_reentrant=False))
        else:
            losses.append(chunk_losses(x, y))
    return torch.cat(losses)


def trained_mask(labels: Tensor) -> Tensor:
    """Where in [b, t] a token is trained: it has a label, and a token before it."""
    keep = labels != IGNORE
    keep[:, :1] = False
    return keep


def _widen(t: Tensor) -> Tensor:
    """At least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _label_range(targets: Tensor) -> tuple[int, int] | None:
    """The least and the greatest label; None where there are none, or where the host would wait for them."""
    if targets.device.type != "cpu" or not len(targets):
        return None
    return int(targets.min()), int(targets.max())


def _check_range(bounds: tuple[int, int] | None, v: int) -> None:
    # The range comes from before the labels were moved; v is known late, as a head need only answer F.linear.
    if bounds is None:
        return
    low, high = bounds
    if low < 0 or high >= v:
        raise ValueError(
            f"token_cross_entropy: labels must be {IGNORE} or lie in 0..{v - 1}, found {low}..{high}: "
            "another tokenizer?"
        )


class _DenseLoss(torch.autograd.Function):
    """Sum of the losses; its gradient is made chunk by chunk in the forward pass, so no logits wait for the
    backward pass.

    For a frozen head 0.6 of the time that checkpointing takes (two products with the head, not three) and two
    thirds of its memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        bounds: tuple[int, int] | None,
    ) -> Tensor:
        _check_range(bounds, len(head))
        kind = "cpu" if rows.is_meta else rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        # Gradients are gathered over the chunks; None for what needs none.
        needs_rows, needs_head, needs_bias, *_ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_head = torch.zeros_like(head) if needs_head else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        total = _widen(rows.new_zeros(()))
        # Autocast is off and the casts are made here, once for all chunks: the head is the largest matrix.
        with torch.autocast(kind, enabled=False):
            w = head.to(dtype)
            b = bias if bias is None else bias.to(dtype)
            for i in range(0, len(rows), chunk):
                x = rows[i : i + chunk].to(dtype)
                y = targets[i : i + chunk, None]
                logits = _widen(F.linear(x, w, b))
                loss, grad_logits = _softmax_loss(logits, y)
                total += loss
                grad_logits = grad_logits.to(dtype)
                if grad_rows is not None:
                    grad_rows[i : i + chunk] = grad_logits @ w
                # addmm_ adds without a second matrix of the head's size, but only in one dtype.
                if grad_head is not None and grad_head.dtype == dtype:
                    grad_head.addmm_(grad_logits.T, x)
                elif grad_head is not None:
                    grad_head.add_(grad_logits.T @ x)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        ctx.save_for_backward(grad_rows, grad_head, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The loss is a scalar, so the chain rule is one factor. What is behind the bias has no gradient.
        grads = [g if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None


def _softmax_loss(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the losses, its gradient by the logits) of logits [n, v] and targets [n, 1]; in place."""
    z -= z.amax(1, keepdim=True)  # so that exp does not overflow
    target_logits = z.gather(1, y)
    total = z.exp_().sum(1, keepdim=True)
    # The gradient is softmax minus one-hot.
    z /= total
    z.scatter_add_(1, y, torch.full_like(target_logits, -1.0))
    return (total.log() - target_logits).sum(), z
