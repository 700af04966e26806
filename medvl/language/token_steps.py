"""The tokens of a batch, step by step: chosen from the model's logits, read by the host, put behind their rows.

In shapes b are the rows that are still computed, v the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor, nn

from medvl.language import cached_forward, sampling
from medvl.language.cached_forward import Decoding
from medvl.language.sampling import Allowed, Sampling


@frozen
class Step:
    """The tokens of one step."""

    number: int  # from 0
    rows: Sequence[int]  # which rows of the prompts the tokens are of
    read: Callable[[], list[int]]  # ids as of `sampling.choose_tokens`


@define
class TokenBatch:
    """What is known between two steps."""

    call: Mapping[str, Any]  # arguments of the model for the prompts, padded on the left
    vocabulary: int
    allowed: Allowed | None
    rows: Sequence[int]  # which rows of the prompts are computed
    row_index: Tensor  # the same on the device, int64 [b]
    draws: Tensor  # float64 [b, max_tokens]
    end: Tensor  # ids of end tokens, where they are forbidden at first
    used: Tensor | None  # bool [b, v], tokens that a row has; None where nothing asks for it
    generated: Tensor | None  # int64 [rows of the prompts, max_tokens]; None where nothing asks for it
    step: int = 0
    tokens: Tensor | None = None  # int64 [b], chosen in the step before
    decoding: Decoding | None = None  # None before the first step


def start_batch(
    cfg: Sampling, call: Mapping[str, Any], draws: Tensor, *, vocabulary: int, allowed: Allowed | None
) -> TokenBatch:
    """A batch before its first step.

    Args:
        call: arguments of the model for the prompts, padded on the left.
        draws: float64 [b, max_tokens], as of `sampling.draw_uniform`.
    """
    rows, device = len(draws), draws.device
    used = generated = None
    if cfg.repetition_penalty != 1:
        used = _prompt_tokens(call, vocabulary)
    if allowed is not None:
        generated = torch.zeros(rows, cfg.max_tokens, dtype=torch.int64, device=device)
    forbidden_at_first = cfg.end if cfg.min_tokens else ()
    return TokenBatch(
        call=call,
        vocabulary=vocabulary,
        allowed=allowed,
        rows=range(rows),
        row_index=torch.arange(rows, device=device),
        draws=draws,
        end=torch.tensor(forbidden_at_first, dtype=torch.int64, device=device),
        used=used,
        generated=generated,
    )


def write_tokens(cfg: Sampling, model: nn.Module, batch: TokenBatch) -> Step:
    """Write one more token of every row."""
    if batch.decoding is None:
        # The token of the last step has no step behind it.
        batch.decoding = cached_forward.start_decoding(model, batch.call, cfg.max_tokens - 1)
    else:
        assert batch.tokens is not None
        cached_forward.decode_tokens(model, batch.decoding, batch.tokens)
    logits = batch.decoding.logits
    if batch.used is not None:
        logits = sampling.penalise_repetition(cfg, logits, batch.used)
    if batch.step < cfg.min_tokens and cfg.end:
        logits = logits.index_fill(1, batch.end, -torch.inf)
    if batch.allowed is not None:
        logits = logits.masked_fill(~_allowed_tokens(batch), -torch.inf)
    chosen = sampling.choose_tokens(cfg, logits, batch.draws[:, batch.step])
    # Rows that are done may have a negative number in place of a token; any token will do for them.
    batch.tokens = chosen.clamp(min=0)
    if batch.used is not None:
        batch.used.scatter_(1, batch.tokens[:, None], True)
    if batch.generated is not None:
        batch.generated[:, batch.step].index_copy_(0, batch.row_index, batch.tokens)
    batch.step += 1
    return Step(batch.step - 1, batch.rows, _read_later(chosen))


def _allowed_tokens(batch: TokenBatch) -> Tensor:
    """The user's mask of the step, bool [v] or [b, v]."""
    assert batch.allowed is not None
    assert batch.generated is not None
    rows, device = len(batch.generated), batch.generated.device
    mask = batch.allowed(batch.step, batch.generated[:, : batch.step])
    mask = sampling.full_mask(mask, rows, batch.vocabulary, device)
    if mask.dim() == 1 or len(batch.rows) == rows:
        return mask
    return mask[batch.row_index]


def can_keep_rows(batch: TokenBatch) -> bool:
    return batch.decoding is not None and cached_forward.can_keep_rows(batch.decoding)


def keep_rows(batch: TokenBatch, places: Sequence[int], index: Tensor) -> None:
    """Go on with some rows.

    Args:
        places: of these rows among those of the batch.
        index: the same on the device.
    """
    assert batch.decoding is not None
    assert batch.tokens is not None
    cached_forward.keep_rows(batch.decoding, index)
    batch.rows = [batch.rows[place] for place in places]
    batch.row_index = batch.row_index[index]
    batch.draws = batch.draws[index]
    batch.tokens = batch.tokens[index]
    if batch.used is not None:
        batch.used = batch.used[index]


def _read_later(tokens: Tensor) -> Callable[[], list[int]]:
    """A function that returns the tokens as numbers.

    On a GPU it waits for the work up to here alone, not for what has been queued in between, so that the GPU
    works while the host reads.
    """
    if not tokens.is_cuda:
        return tokens.tolist
    # Without a wait: `copied` says when the numbers are there. Torch takes pinned memory for such a copy.
    numbers = tokens.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tokens.device))

    def read() -> list[int]:
        copied.synchronize()
        return numbers.tolist()

    return read


def _prompt_tokens(call: Mapping[str, Any], vocabulary: int) -> Tensor:
    """Which tokens each prompt has, bool [b, v]; none where the prompt is given as embeddings."""
    exists = call["attention_mask"].bool()
    # The last column takes what is no token of the vocabulary: padding, and a placeholder of images whose id
    # is beyond the head's rows (it cannot be chosen, and needs no penalty).
    used = torch.zeros(len(exists), vocabulary + 1, dtype=torch.bool, device=exists.device)
    ids = call.get("input_ids")
    if ids is not None:
        used.scatter_(1, ids.masked_fill(~exists, vocabulary).clamp(max=vocabulary), True)
    return used[:, :vocabulary]
