"""How far the answers of two forms of a model are apart, such as one with its adapter beside it and one merged."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from medvl.language import chat, system, vlm
from medvl.language.chat import Encoded
from medvl.language.system import LanguageModel, Params


@frozen(kw_only=True)
class Distance:
    """Logits of one form of a model against those of the form it was made from, over trained tokens."""

    largest: float  # difference of two logits
    # Root mean square of the differences over that between the adapter and none: how much of what was learned is
    # lost. 0 where nothing differs.
    lost: float
    same_token: float  # share of tokens of which the likeliest is the same
    n: int  # tokens


def answer_logits(model: LanguageModel, params: Params, data: Encoded, row: int) -> Tensor:
    """Logits float32 [t, v] for the t trained tokens of one conversation."""
    weights = system.model_weights(model, params)
    with torch.no_grad():
        inputs = chat.model_inputs(model.chat, weights, chat.make_batch(model.chat, data, [row]), params)
        labels = inputs.pop("labels")
        hidden = vlm.hidden_states(model.chat.skeleton, weights, **inputs)
        head, bias = vlm.language_head_names(model.chat.skeleton)
        # Each hidden state predicts the token behind it.
        before = (labels[:, 1:] != -100).to(hidden.device)
        logits = F.linear(hidden[:, :-1][before], weights[head], None if bias is None else weights[bias])
    return logits.float()


def compare(
    data: Encoded,
    form: tuple[LanguageModel, Params],
    original: tuple[LanguageModel, Params],
    without: tuple[LanguageModel, Params],
    rows: Sequence[int] | None = None,
) -> Distance:
    """The distance of a form of a model from the original.

    Args:
        without: the original without its adapter.
        rows: of the conversations; None = all.
    Raises:
        ValueError: no trained token.
    """
    largest, changed, learned, same, n = 0.0, 0.0, 0.0, 0, 0
    for row in range(len(data.samples)) if rows is None else rows:
        reference = answer_logits(*original, data, row)
        logits = answer_logits(*form, data, row)
        plain = answer_logits(*without, data, row)
        difference = logits - reference
        largest = max(largest, float(difference.abs().max()))
        changed += float(difference.square().sum())
        learned += float((reference - plain).square().sum())
        same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        n += len(reference)
    if not n:
        raise ValueError("compare: needs at least one trained token")
    lost = 0.0
    if changed:
        lost = math.sqrt(changed / learned) if learned else math.inf
    return Distance(largest=largest, lost=lost, same_token=same / n, n=n)
