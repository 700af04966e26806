"""What a compressor is pretrained on: labels of whole slides, told from its tokens by one head for each label."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medvl.base.tree import Tree
from medvl.components import layers


def init_heads(
    dim: int, classes: Mapping[str, int], gen: Generator, *, slots: int = 0, hidden: int = 128
) -> Tree:
    """Parameters of `label_logits`, float32: {label: {"out"}} of all tokens side by side, or with "tanh", "sigmoid", "score" by attention.

    Args:
        classes: {label: how many classes it has}, two or more.
        slots: k: a head reads all k tokens, each in its place, which suits slots that have roles of their own; 0: gated attention over the
            tokens, whatever their order.
    Raises:
        ValueError: no label, or one with fewer than two classes.
    """
    if not classes or min(classes.values()) < 2:
        raise ValueError(f"init_heads: needs labels of two classes or more, got {dict(classes)}")
    linear = lambda i, o: layers.init_linear(i, o, gen, std=i**-0.5)
    if slots:
        return {name: {"out": linear(slots * dim, n)} for name, n in classes.items()}
    return {
        name: {
            "tanh": linear(dim, hidden),
            "sigmoid": linear(dim, hidden),
            "score": linear(hidden, 1),
            "out": linear(dim, n),
        }
        for name, n in classes.items()
    }


def label_logits(params: Tree, tokens: Tensor) -> dict[str, Tensor]:
    """Logits {label: [b, classes]} of slides from their tokens [b, k, d]: for each label a linear layer over all, or gated attention.

    Raises:
        ValueError: tokens have another shape.
    Source: Ilse et al. 2018, arXiv:1802.04712, equation 9, over tokens instead of patches.
    """
    out = {}
    for name, p in params.items():
        width, side_by_side = p["out"]["weight"].shape[1], "score" not in p
        if (
            tokens.dim() != 3
            or (tokens.shape[1] * tokens.shape[2] if side_by_side else tokens.shape[2]) != width
        ):
            want = f"[b, k, d] with k d = {width}" if side_by_side else f"[b, k, {width}]"
            raise ValueError(f"label_logits: tokens must be {want}, got {list(tokens.shape)}")
        if side_by_side:
            out[name] = layers.linear(p["out"], tokens.flatten(1))
            continue
        gate = torch.tanh(layers.linear(p["tanh"], tokens)) * torch.sigmoid(
            layers.linear(p["sigmoid"], tokens)
        )
        share = layers.linear(p["score"], gate).softmax(1)  # [b, k, 1]
        out[name] = layers.linear(p["out"], (share * tokens).sum(1))
    return out


def label_loss(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean over labels of their cross-entropy, {label: share that is right}); -1 where a slide has no such label.

    A label that no slide of the batch has counts 0.
    Args:
        labels: {label: int64 [b]}, others are not looked at.
    Raises:
        ValueError: a label is not there, or has another shape.
    """
    losses, right = [], {}
    for name, x in logits.items():
        if name not in labels or labels[name].shape != x.shape[:1]:
            got = f"{list(labels[name].shape)}" if name in labels else f"only {', '.join(labels) or 'none'}"
            raise ValueError(
                f"label_loss: label {name!r} must be [{len(x)}], a class for each slide, got {got}"
            )
        y = labels[name]
        known = y >= 0
        n = known.sum().clamp(min=1)
        losses.append(F.cross_entropy(x, y.clamp(min=0), reduction="none")[known].sum() / n)
        right[name] = (x.argmax(1) == y)[known].float().sum() / n
    return torch.stack(losses).mean(), right


def classes_of(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> dict[str, list[str]]:
    """{label: its classes in the order of the alphabet} of the columns of a table; an empty cell is no class.

    Raises:
        ValueError: a column with fewer than two classes (names it).
    """
    found = {c: sorted({r[c] for r in rows} - {""}) for c in columns}
    if single := [c for c, of in found.items() if len(of) < 2]:
        raise ValueError(
            f"classes_of: column {single[0]!r} must have two classes or more, found {found[single[0]]}"
        )
    return found
