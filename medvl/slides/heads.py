"""Classification heads to pretrain a slide compressor: one per label, on the visual tokens of a slide."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medvl.base.tree import Tree
from medvl.components import layers


def init_heads(
    dim: int, classes: Mapping[str, int], gen: Generator, *, slots: int = 0, hidden: int = 128
) -> Tree:
    """Parameters of `label_logits`, float32 on CPU: {label: {"out"}}.

    With attention a label also has "tanh", "sigmoid" and "score".

    Args:
        dim: width d of a token.
        classes: {label: number of classes}, two or more each.
        slots: k: a linear layer over all k tokens side by side, for slots that have roles of their own.
            0: gated attention over the tokens, whatever their order.
        hidden: width of the attention.
    Raises:
        ValueError: no label, or one with fewer than two classes.
    """
    if not classes or min(classes.values()) < 2:
        raise ValueError(f"init_heads: needs labels of two classes or more, got {dict(classes)}")
    # Labels in their order, too: the generator goes on from one to the next.
    heads: Tree = {}
    for label, count in classes.items():
        if slots:
            # A slot keeps its role from slide to slide, so that each may have weights of its own.
            heads[label] = {"out": _init_linear(slots * dim, count, gen)}
            continue
        # The layers are drawn in this order: another one would give other weights for the same seed.
        heads[label] = {
            "tanh": _init_linear(dim, hidden, gen),
            "sigmoid": _init_linear(dim, hidden, gen),
            "score": _init_linear(hidden, 1, gen),
            "out": _init_linear(dim, count, gen),
        }
    return heads


def label_logits(params: Tree, tokens: Tensor) -> dict[str, Tensor]:
    """Logits {label: [b, classes]} of slides from their tokens [b, k, d].

    Raises:
        ValueError: tokens have another shape.
    Source: Ilse et al. 2018, arXiv:1802.04712, equation 9, over tokens instead of patches.
    """
    logits = {}
    for label, head in params.items():
        _check_tokens(head, tokens)
        if _is_side_by_side(head):
            logits[label] = layers.linear(head["out"], tokens.flatten(1))
            continue
        tanh = torch.tanh(layers.linear(head["tanh"], tokens))
        gate = torch.sigmoid(layers.linear(head["sigmoid"], tokens))
        scores = layers.linear(head["score"], tanh * gate)
        attention = scores.softmax(1)  # [b, k, 1], over the tokens
        pooled = (attention * tokens).sum(1)  # [b, d]
        logits[label] = layers.linear(head["out"], pooled)
    return logits


def label_loss(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(cross-entropy averaged over labels, {label: accuracy}).

    A label that no slide of the batch has counts 0.

    Args:
        logits: {label: [b, classes]}.
        labels: {label: int64 [b]}, -1 where a slide has no such label. Labels without logits are ignored.
    Raises:
        ValueError: a label is missing or has another shape.
    """
    losses, accuracies = [], {}
    for label, x in logits.items():
        _check_label(label, labels, len(x))
        target = labels[label]
        labelled = target >= 0
        count = labelled.sum().clamp(min=1)  # no division by 0 where no slide of the batch has the label
        # The loss is taken of all slides and then selected, as cross_entropy of no slide would be NaN.
        loss = F.cross_entropy(x, target.clamp(min=0), reduction="none")
        losses.append(loss[labelled].sum() / count)
        accuracies[label] = (x.argmax(1) == target)[labelled].float().sum() / count
    return torch.stack(losses).mean(), accuracies


def classes_of(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> dict[str, list[str]]:
    """{column: its classes, sorted} of the rows of a table. An empty cell is no class.

    Raises:
        ValueError: a column with fewer than two classes (names it).
    """
    classes = {}
    for column in columns:
        cells = {row[column] for row in rows}
        classes[column] = sorted(cells - {""})
    for column, names in classes.items():
        if len(names) < 2:
            raise ValueError(f"classes_of: column {column!r} must have two classes or more, found {names}")
    return classes


def _init_linear(inputs: int, outputs: int, gen: Generator) -> Tree:
    # Outputs have about the variance of the inputs, whatever their number.
    return layers.init_linear(inputs, outputs, gen, std=inputs**-0.5)


def _is_side_by_side(head: Tree) -> bool:
    return "score" not in head


def _check_tokens(head: Tree, tokens: Tensor) -> None:
    width = head["out"]["weight"].shape[1]  # k d side by side, d with attention
    if _is_side_by_side(head):
        fits = tokens.dim() == 3 and tokens.shape[1] * tokens.shape[2] == width
        expected = f"[b, k, d] with k d = {width}"
    else:
        fits = tokens.dim() == 3 and tokens.shape[2] == width
        expected = f"[b, k, {width}]"
    if not fits:
        raise ValueError(f"label_logits: tokens must be {expected}, got {list(tokens.shape)}")


def _check_label(label: str, labels: Mapping[str, Tensor], slides: int) -> None:
    if label not in labels:
        actual = f"only {', '.join(labels) or 'none'}"
    elif labels[label].shape != (slides,):
        actual = f"{list(labels[label].shape)}"
    else:
        return
    raise ValueError(f"label_loss: label {label!r} must be [{slides}], a class for each slide, got {actual}")
