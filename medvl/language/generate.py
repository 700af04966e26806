"""Generation of answers: batched, token by token, greedy or sampled, over allowed tokens, streamed as text.

In shapes b are the rows of the batch, v the vocabulary.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from medvl.base.text import few
from medvl.hub.skeletons import Skeleton
from medvl.language import sampling, token_steps, vlm
from medvl.language.cached_forward import check_not_checkpointed, left_padded
from medvl.language.sampling import Allowed, Gens, Sampling
from medvl.language.token_steps import Step, TokenBatch
from medvl.weights import lazy

_PARTIAL = "\ufffd"  # stands for bytes that are no complete character (yet) in the text of a tokenizer


@frozen(kw_only=True)
class Generated:
    """The answers, one per row."""

    ids: tuple[tuple[int, ...], ...]  # without the end token; the tokens of a stop string are among them
    texts: tuple[str, ...]  # without special tokens and what a stop string cuts; () without a tokenizer
    reasons: tuple[str, ...]  # "end", "stop" or "length"
    prompt_tokens: tuple[int, ...]


def generate(
    cfg: Sampling,
    skeleton: Skeleton,
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    *,
    tok: Any = None,
    allowed: Allowed | None = None,
    on_token: Callable[[int, str], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    gen: Gens | None = None,
) -> Generated:
    """Continue the prompts of a batch.

    A row's answer depends neither on padding nor on the other rows, up to rounding: row i samples from the
    i-th generator that `gen` starts, so it is the same in any batch in which it is row i; with generators of
    its own it is the same in any batch.

    Args:
        params: weights of `skeleton`, of any kind (see `medvl.weights`); of a kind that differs from sample
            to sample, those for the rows of this batch.
        inputs: a batch as of `vlm.model_inputs`, padded on either side; images are encoded once, with the
            prompt.
        tok: tokenizer; needed for texts, stop strings and `on_token`.
        allowed: (step, ids generated so far [b, step]) -> bool mask [v] or [b, v] of the tokens that may
            come; a mask shorter than the vocabulary forbids the other tokens. `allow_only` and
            `allow_in_phases` make some. The mask of a row that is done has no effect, and what stands behind
            its end among the ids has no meaning. On a GPU it is also asked for the step behind the last one.
        on_token: (row, piece of text), called whenever more of a row's text is certain: complete characters,
            nothing of a stop string. The pieces of a row joined are its text. An exception in it ends the
            call.
        on_step: (step, from 0), called when the host has read the tokens of a step, as for timing.
        gen: a generator, or one for every row, on any device; of cfg.seed if left out. Used only with
            temperature > 0.
    Raises:
        ValueError: as `vlm.model_inputs`; no token allowed; a prompt too long; a mask, tokenizer or stop
            string that cannot be used; a skeleton that is checkpointed.
        FloatingPointError: logits that are not finite.
    """
    _check_text_options(cfg, tok, on_token)
    check_not_checkpointed(skeleton)
    # The last column must be the last token of every row: behind it the new tokens are put.
    device = next(iter(params.values())).device
    call = vlm.model_inputs(skeleton, left_padded(inputs), device)
    count, vocabulary = _check_size(cfg, skeleton, call)
    # All numbers in advance: how many a row uses does not change those of the other rows.
    draws = sampling.draw_uniform(cfg, gen, count, call["attention_mask"].device)
    answers = [Answer() for _ in range(count)]
    unread = deque[Step]()  # steps whose tokens the host has not read yet
    batch = token_steps.start_batch(cfg, call, draws, vocabulary=vocabulary, allowed=allowed)

    def add_step(step: Step) -> None:
        _add_step(cfg, tok, answers, step, allowed, on_token)
        if on_step is not None:
            on_step(step.number)

    def write(model: nn.Module) -> list[int]:
        return _write_until_rows_end(cfg, model, batch, answers, unread, add_step)

    with torch.no_grad():
        places = skeleton.run(params, write)
        while places:
            # Only these rows are computed from here on, with their own weights.
            index = torch.tensor(places, device=draws.device)
            params = lazy.per_row(params, index, len(batch.rows))
            token_steps.keep_rows(batch, places, index)
            places = skeleton.run(params, write)
    texts: tuple[str, ...] = ()
    if tok is not None:
        texts = tuple(answer.text for answer in answers)
    return Generated(
        ids=tuple(tuple(answer.ids) for answer in answers),
        texts=texts,
        reasons=tuple(answer.reason for answer in answers),
        prompt_tokens=tuple(call["attention_mask"].sum(1).tolist()),
    )


@define
class Answer:
    """The answer of a row while it is generated; `add_token` adds to it."""

    ids: list[int] = field(factory=list)
    text: str = ""  # as far as it is certain
    reason: str = ""  # why the row is done, "" while it is not
    # So far the text of tokens is known, so that not all of them are decoded for each new one: that of the first
    # `_decoded` tokens; the last `_decoded - _anchor` of them are decoded again, before the new ones.
    _known: str = ""
    _decoded: int = 0
    _anchor: int = 0


def _write_until_rows_end(
    cfg: Sampling,
    model: nn.Module,
    batch: TokenBatch,
    answers: Sequence[Answer],
    unread: deque[Step],
    add_step: Callable[[Step], None],
) -> list[int]:
    """Write tokens until half of the batch's rows are done; return the places of the others in the batch."""
    while True:
        unread.append(token_steps.write_tokens(cfg, model, batch))
        # A GPU has this step to work at while the host reads the one before. Where that was the last of a
        # row, this one is dropped.
        late = 1 if batch.draws.is_cuda and batch.step < cfg.max_tokens else 0
        while len(unread) > late:
            add_step(unread.popleft())
        places = [place for place, row in enumerate(batch.rows) if not answers[row].reason]
        if not places or (2 * len(places) <= len(batch.rows) and token_steps.can_keep_rows(batch)):
            return places


def _add_step(
    cfg: Sampling,
    tok: Any,
    answers: Sequence[Answer],
    step: Step,
    allowed: Allowed | None,
    on_token: Callable[[int, str], None] | None,
) -> None:
    """Add the tokens of a step to the answers of the rows that are not done, and stream their texts."""
    for row, token in zip(step.rows, step.read(), strict=True):
        answer = answers[row]
        if answer.reason:
            continue
        sampling.check_token(token, row, step.number, allowed)
        streamed = len(answer.text)
        is_last = step.number + 1 == cfg.max_tokens
        add_token(cfg, tok, answer, token, is_last=is_last, stream=on_token is not None)
        piece = answer.text[streamed:]
        if on_token is not None and piece:
            on_token(row, piece)


def add_token(cfg: Sampling, tok: Any, answer: Answer, token: int, *, is_last: bool, stream: bool) -> None:
    """Add a token to an answer, and its text where it is needed at this step."""
    if token in cfg.end:
        answer.reason = "end"
    else:
        answer.ids.append(token)
        if is_last:
            answer.reason = "length"
    # Without stop strings and streaming the text is needed at the end only.
    if tok is not None and (answer.reason or cfg.stop or stream):
        # At the end all tokens at once, as whoever decodes an answer does.
        text = _decode(tok, answer.ids) if answer.reason else _decode_new(tok, answer)
        answer.text, answer.reason = _certain_text(cfg, text, answer.text, answer.reason)


# Text -------------------------------------------------------------------------------------------------------
def _decode(tok: Any, ids: Sequence[int]) -> str:
    # Cleaning up would remove spaces that a caller has seen.
    return tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _decode_new(tok: Any, answer: Answer) -> str:
    """The text of all tokens of an answer, of which only the last ones are decoded.

    The new tokens are decoded behind some known ones, never alone: a character may span tokens, and sentencepiece
    drops the first space of a text.
    """
    known = _decode(tok, answer.ids[answer._anchor : answer._decoded])
    window = _decode(tok, answer.ids[answer._anchor :])
    if not window.startswith(known):  # the new tokens change what is before them
        return _decode(tok, answer.ids)
    text = answer._known + window[len(known) :]
    if not text.endswith(_PARTIAL):
        answer._known, answer._anchor, answer._decoded = text, answer._decoded, len(answer.ids)
    return text


def _certain_text(cfg: Sampling, text: str, before: str, reason: str) -> tuple[str, str]:
    """The text of tokens as far as later tokens cannot change it, and the reason why the row is done (or "").

    Args:
        text: of all tokens so far.
        before: the certain text of the tokens before.
        reason: why the row is done without regard to stop strings, or "".
    """
    cuts = [text.index(stop) for stop in cfg.stop if stop in text]
    if cuts:
        text = text[: min(cuts)]
        reason = "stop"
    elif not reason:
        text = text.rstrip(_PARTIAL)  # the next token may complete the character
        # What may become a stop string is held back until the next tokens tell.
        text = text[: len(text) - _started_stop(cfg, text)]
    if not text.startswith(before):
        # Not an error yet: a tokenizer may rewrite its last characters once more, and the text is certain
        # later.
        if not reason:
            return before, ""
        raise ValueError(
            f"generate: the tokenizer turned {before[-20:]!r} into {text[-20:]!r}: its texts cannot be "
            "told in pieces"
        )
    return text, reason


def _started_stop(cfg: Sampling, text: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = 0
    for stop in cfg.stop:
        # The whole string is not among them: it has been cut off already.
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return longest


def _check_text_options(cfg: Sampling, tok: Any, on_token: Any) -> None:
    if tok is None and (cfg.stop or on_token is not None):
        raise ValueError(
            "generate: stop strings and on_token need a tokenizer (tok=tokens.tokenizer(...)), "
            f"got stop {cfg.stop} and tok None"
        )
    if tok is None:
        return
    special = sorted(set(cfg.stop) & set(tok.all_special_tokens))
    if special:
        ids = tok.convert_tokens_to_ids(special)
        raise ValueError(f"generate: {few(special)} are tokens, not text; give their ids {ids} as end")


def check_length(cfg: Sampling, skeleton: Skeleton, longest: int) -> None:
    """Check that a prompt of `longest` tokens and its answer fit the positions of the model.

    Raises:
        ValueError: they do not.
    """
    config: Any = skeleton.module.config
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    positions = getattr(config, "max_position_embeddings", None) or longest + cfg.max_tokens
    # With scaled rotary positions some configs give the length before the scaling (Qwen2.5 with YaRN), others
    # that behind it (Llama 3.1): the larger is allowed.
    positions = int(positions * max(1.0, rope.get("factor") or 1.0))
    if longest + cfg.max_tokens > positions:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and max_tokens {cfg.max_tokens} are more than the "
            f"{positions} "
            f"positions of {skeleton.name}"
        )


def _check_size(cfg: Sampling, skeleton: Skeleton, call: dict[str, Any]) -> tuple[int, int]:
    """(rows, size of the vocabulary) of a batch, after a check that it and cfg.end fit the model."""
    module: Any = skeleton.module
    rows, longest = call["attention_mask"].shape
    # Rows of the head, which may be more than the tokenizer's tokens: logits have this width.
    vocabulary = module.get_output_embeddings().weight.shape[0]
    check_length(cfg, skeleton, longest)
    outside = [token for token in cfg.end if token >= vocabulary]
    if outside:
        raise ValueError(f"generate: end ids must be below the vocabulary's {vocabulary}, got {outside}")
    return rows, vocabulary
