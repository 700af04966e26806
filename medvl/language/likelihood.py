"""The likelihoods of given answers.

In shapes b are the rows of the batch, o the options of a row, v the vocabulary, n the tokens of an option.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medvl.hub.skeletons import Skeleton
from medvl.language import cached_forward, vlm


def score_options(
    skeleton: Skeleton,
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    options: Sequence[Sequence[Sequence[int]]],
) -> tuple[Tensor, Tensor]:
    """How likely each of several answers is after its prompt. The prompt (with its images) is computed once.

    Args:
        inputs: a batch as of `vlm.model_inputs`.
        options: token ids of the answers of each row; rows may have different numbers of them.
    Returns:
        log-likelihoods float32 [b, o], summed over the tokens of an option, and their means per token; -inf
        where a row has fewer options.
    Raises:
        ValueError: as `vlm.model_inputs`; another number of rows, an option without tokens, ids outside the
            table.
    """
    cached_forward.check_not_checkpointed(skeleton)
    device = next(iter(params.values())).device
    call = vlm.model_inputs(skeleton, cached_forward.left_padded(inputs), device)
    _check_options(skeleton, options, rows=len(call["attention_mask"]))
    longest = max(len(option) for row in options for option in row)
    sums = list[Tensor]()
    means = list[Tensor]()

    def score_each(model: nn.Module) -> None:
        prompt = cached_forward.forward_prompt(model, call, longest - 1)
        # [b, 1, v]: what the prompt says of the first token of every option.
        first = prompt.logits[:, -1:].float().log_softmax(-1)
        # The k-th options of all rows are one batch; a row that has fewer takes part with an empty one.
        for k in range(max(map(len, options))):
            kth = [row[k] if k < len(row) else () for row in options]
            tokens, lengths = _pad_options(kth, device)
            exists = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
            log_probs = first
            if tokens.shape[1] > 1:
                later = cached_forward.continuation_log_probs(model, call, prompt, tokens, exists)
                log_probs = torch.cat([first, later], 1)
            # [b, n]; 0 behind the end of an option.
            of_tokens = log_probs.gather(2, tokens[..., None])[..., 0] * exists
            total = of_tokens.sum(1).masked_fill(lengths == 0, -torch.inf)
            sums.append(total)
            # The mean does not favour short options, as the sum does. Its clamp is for options that a row
            # does not have.
            means.append(total / lengths.clamp(min=1))

    with torch.no_grad():
        skeleton.run(params, score_each)
    return torch.stack(sums, 1), torch.stack(means, 1)


def _check_options(skeleton: Skeleton, options: Sequence[Sequence[Sequence[int]]], *, rows: int) -> None:
    if len(options) != rows or not all(row and all(row) for row in options):
        raise ValueError(
            f"score_options: each of {rows} rows needs options of at least one token, got {options}"
        )
    table = skeleton.module.get_input_embeddings()  # type: ignore[operator]
    ids = [token for row in options for option in row for token in option]
    if min(ids) < 0 or max(ids) >= len(table.weight):
        raise ValueError(
            f"score_options: ids must be from 0 to {len(table.weight) - 1}, got {min(ids)} to {max(ids)}"
        )


def _pad_options(options: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids int64 [b, n] with 0 behind them, how many there are of each [b])."""
    lengths = [len(option) for option in options]
    longest = max(lengths)
    padded = [list(option) + [0] * (longest - len(option)) for option in options]
    return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)
