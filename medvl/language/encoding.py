"""Conversations with images: messages to token ids of which only the answers are trained."""

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from attrs import evolve, frozen
from torch import Tensor

from medvl.base.display import track
from medvl.hub.tokens import spaced_once
from medvl.language.messages import Message, check_order, check_tags
from medvl.language.templates import (
    ConversationFormat,
    Placeholder,
    Rendered,
    Span,
    Turns,
    answer_tail,
    render_conversation,
)

_log = logging.getLogger(__name__)
# The default of ignore_index in PyTorch's cross_entropy, and what transformers' losses expect.
IGNORE = -100  # label of a token that is not trained


@frozen(kw_only=True, eq=False)
class Sample:
    """One tokenised conversation.

    Labels are not shifted: labels[i] belongs to ids[i], and the loss compares it with the logits at i - 1.
    """

    ids: Tensor  # int64 [t]
    labels: Tensor  # int64 [t], IGNORE where not trained
    trained: tuple[Span, ...] = ()  # [start, stop) of every trained answer with its end tokens
    visual: tuple[Span, ...] = ()  # [start, stop) of every image's visual tokens
    stripped: int = 0  # trained answers whose white space at an end the template drops


class TooLong(ValueError):
    """The last trained or visual token of a sample, or the last token of a prompt, does not fit the context.

    Attributes:
        needed: tokens up to this one.
        context: tokens allowed.
    """

    def __init__(self, needed: int, context: int) -> None:
        super().__init__(needed, context)  # both in args: the error must survive pickling in a data loader
        self.needed = needed
        self.context = context

    def __str__(self) -> str:
        return (
            f"encode: answers and visual tokens must fit the context, need {self.needed} tokens, context is "
            f"{self.context}; make the images smaller, shorten the text or raise the context"
        )


def encode_conversation(
    tok: Any,
    messages: Sequence[Message],
    fmt: ConversationFormat = ConversationFormat(),
    *,
    visual: Sequence[int] = (),
    turns: Turns = "all",
) -> Sample:
    """Token ids of a conversation, and labels of every answer of the assistant with its end tokens.

    The text is cut where answers start and end, and the pieces are tokenised one by one. So the ids before an
    answer are those of `encode_prompt`, whatever characters the answer starts with. Only what follows the
    last end token is ever truncated.

    Args:
        tok: a fast Hugging Face tokenizer; one that puts a start token before texts gets exactly one here.
        messages: optional system, then user and assistant in turn, ending with assistant.
        visual: number of visual tokens of every image, in the order of the tags in the user's texts.
        turns: "all" answers are trained, or only the "last" one behind a history as the template writes it
            (see `templates.rewrites_history`), or the last one "raw": as it is behind the prompt of
            generation, for templates that open reasoning there and drop it from answers (DeepSeek-R1's).
    Returns:
        White space at the ends of an answer is left out where the template drops it (`Sample.stripped` counts
        such answers). White space that the template puts before an answer and not into the prompt belongs to
        the answer, because the model has to write it.
    Raises:
        TooLong: a trained or a visual token would be cut.
        ValueError: wrong roles or order, contents that are no strings, special tokens in a text, tags that do
            not match `visual`, or a template in which an answer does not follow the prompt that generation
            sees, or has no end token.
    """
    return _encode_messages(tokenizer_traits(tok, fmt), fmt, messages, visual, turns, "assistant")


def encode_prompt(
    tok: Any,
    messages: Sequence[Message],
    fmt: ConversationFormat = ConversationFormat(),
    *,
    visual: Sequence[int] = (),
    turns: Turns = "all",
    traits: "TokenizerTraits | None" = None,
) -> Sample:
    """Token ids that generation starts from: messages that end with the user's, and the header of the answer.

    No token is trained. The ids are the first ones of the whole conversation, encoded with the same `turns`.
    Arguments and errors as `encode_conversation`; a prompt longer than the context is always TooLong.

    Args:
        traits: of `tokenizer_traits(tok, fmt)`; trying them out anew for each of many prompts takes longer than the
            prompts do.
    """
    return _encode_messages(traits or tokenizer_traits(tok, fmt), fmt, messages, visual, turns, "user")


def encode_fitting(
    tok: Any,
    conversations: Sequence[Sequence[Message]],
    fmt: ConversationFormat = ConversationFormat(),
    *,
    visual: Sequence[Sequence[int]] | None = None,
    turns: Sequence[Turns] = (),
    names: Sequence[str] = (),
) -> tuple[list[Sample], list[tuple[int, TooLong]]]:
    """Samples of the conversations that fit, in order, and (index, error) of those that are too long.

    A warning says how many are too long, and how many answers lose white space.

    Args:
        visual: as for `encode_conversation`, one sequence per conversation.
        turns: as for `encode_conversation`, one per conversation; "all" for all of them if left out.
        names: what errors call each conversation, such as its file and line; "conversation 3" if left out.
    Raises:
        ValueError: as `encode_conversation`, with the name; or no conversation fits.
    """
    total = len(conversations)
    for argument, rows in (("visual", visual), ("turns", turns or None), ("names", names or None)):
        if rows is not None and len(rows) != total:
            raise ValueError(
                f"encode_fitting: {argument} must have one row per conversation, got {len(rows)} for {total}"
            )
    visual = visual or [()] * total
    turns = turns or ["all"] * total
    # Tried out once for all conversations.
    traits = tokenizer_traits(tok, fmt)
    samples = list[Sample]()
    refused = list[tuple[int, TooLong]]()
    for i, messages in enumerate(track(conversations, "encoding conversations")):
        try:
            samples.append(_encode_messages(traits, fmt, messages, visual[i], turns[i], "assistant"))
        except TooLong as e:
            refused.append((i, e))
        except ValueError as e:
            name = f"conversation {i}"
            if names:
                name = names[i]
            raise ValueError(f"{name}: {e}") from e

    if refused:
        longest = max(error.needed for _, error in refused)
        # The longest says how far the context would have to be raised.
        summary = (
            f"{len(refused)} of {total} conversations do not fit the context of {fmt.context} tokens "
            f"(the longest needs {longest})"
        )
        if not samples:
            # Nothing to train on is a wrong setting; a few that do not fit are left out with a warning.
            raise ValueError(f"encode_fitting: {summary}; make the images smaller or raise the context")
        _log.warning("%s and are left out", summary)
    stripped = sum(sample.stripped for sample in samples)
    if stripped:
        _log.warning(
            "%d answers lose white space at their ends, because %s drops it", stripped, fmt.description
        )
    return samples, refused


def end_ids(tok: Any, fmt: ConversationFormat = ConversationFormat()) -> tuple[int, ...]:
    """The id of the token that ends an answer: the first behind one in the template, or `fmt.end`; () for
    neither.
    """
    traits = tokenizer_traits(tok, fmt)
    tail = answer_tail(tok, fmt, [{"role": "user", "content": "a question"}])
    # Of several only the first ends the answer; the next may open the following turn.
    endings = _leading_special_tokens(traits, tail)
    return tuple(tok.convert_tokens_to_ids([*endings[:1]]))


def collate_samples(
    samples: Sequence[Sample],
    pad_id: int,
    *,
    side: Literal["right", "left"] = "right",
    multiple_of: int = 1,
) -> dict[str, Tensor]:
    """Pad samples to one length.

    Args:
        pad_id: any id; `mask` tells padding from tokens.
        side: where padding goes: right for training, left for generation (new tokens must follow the last
            one).
        multiple_of: the length t is rounded up to a multiple of this.
    Returns:
        "ids" int64 [b, t], "mask" bool [b, t], "labels" int64 [b, t] (not shifted, IGNORE at padding),
        "visual" bool [b, t], true at visual tokens (Qwen's `mm_token_type_ids` as integers).
    """
    if not samples or side not in ("right", "left") or multiple_of < 1:
        raise ValueError(
            f"collate_samples: needs samples, side right or left and multiple_of >= 1, got {len(samples)} "
            f"samples, {side!r}, {multiple_of}"
        )
    longest = max(len(sample.ids) for sample in samples)
    length = -(-longest // multiple_of) * multiple_of
    shape = (len(samples), length)
    ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.bool)
    visual = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        start = 0
        if side == "left":
            start = length - len(sample.ids)
        columns = slice(start, start + len(sample.ids))
        ids[row, columns] = sample.ids
        labels[row, columns] = sample.labels
        mask[row, columns] = True
        for first, stop in sample.visual:
            visual[row, start + first : start + stop] = True
    return {"ids": ids, "mask": mask, "labels": labels, "visual": visual}


def collate_packed(rows: Sequence[Sequence[Sample]], pad_id: int) -> dict[str, Tensor]:
    """Rows of several samples each, one behind the other, padded to one length on the right.

    Returns:
        as `collate_samples`, and "segments" int64 [b, t]: 1 for the tokens of a row's first sample, 2 for those
        of the second and so on, 0 at padding. No sample's first token is trained: before it stands another
        sample, which must not predict it.
    """
    batch = collate_samples([_join_samples(row) for row in rows], pad_id)
    batch["segments"] = torch.zeros_like(batch["ids"])
    for row, samples in enumerate(rows):
        lengths = torch.tensor([len(sample.ids) for sample in samples])
        numbers = torch.arange(1, len(samples) + 1).repeat_interleave(lengths)
        batch["segments"][row, : len(numbers)] = numbers
    return batch


def _join_samples(samples: Sequence[Sample]) -> Sample:
    """Samples one behind the other, as far as `collate_samples` looks at them."""
    visual = list[Span]()
    labels = list[Tensor]()
    length = 0
    for sample in samples:
        visual += [(length + start, length + stop) for start, stop in sample.visual]
        labels += [sample.labels.new_tensor([IGNORE]), sample.labels[1:]]
        length += len(sample.ids)
    ids = torch.cat([sample.ids for sample in samples])
    return Sample(ids=ids, labels=torch.cat(labels), visual=tuple(visual))


def show_sample(tok: Any, sample: Sample, marks: tuple[str, str] = ("«", "»")) -> str:
    """A sample as text for people: trained tokens between `marks`, visual tokens as "<|image_pad|> x 256".

    The last line counts tokens, images and answers.

    Args:
        marks: such as ("\\033[32m", "\\033[0m") for green on a terminal.
    """
    length = len(sample.ids)
    trained = (sample.labels != IGNORE).tolist()
    visual = [False] * length
    for start, stop in sample.visual:
        visual[start:stop] = [True] * (stop - start)

    # Runs of tokens that are shown alike. Labels decide what is trained, should the spans differ.
    edges = {0, length}
    for span in (*sample.trained, *sample.visual):
        # An edge at the end of the sample is there already; a span that was cut with the context may lie
        # behind it.
        edges.update(edge for edge in span if edge < length)
    edges.update(i for i in range(1, length) if trained[i] != trained[i - 1])

    texts = list[str]()
    for start, stop in pairwise(sorted(edges)):
        ids = sample.ids[start:stop].tolist()
        if visual[start]:
            text = f"{tok.convert_ids_to_tokens(ids[0])} x {stop - start}"
        else:
            text = tok.decode(ids, clean_up_tokenization_spaces=False)
        if trained[start]:
            text = f"{marks[0]}{text}{marks[1]}"
        texts.append(text)
    counts = f"{length} tokens, {sum(visual)} visual in {len(sample.visual)} images"
    return "".join(texts) + f"\n[{counts}, {sum(trained)} trained in {len(sample.trained)} turns]"


# Tokenizers -------------------------------------------------------------------------------------------------
@frozen(kw_only=True, eq=False)
class TokenizerTraits:
    """What has to be known of a tokenizer to tokenise a text in pieces."""

    tok: Any
    special: frozenset[int]  # ids of special tokens
    special_pattern: re.Pattern[str]  # matches any of its special tokens
    start: tuple[int, ...]  # ids before every text
    # A special token to put before a piece in the middle of a text; "" where it makes no difference.
    anchor: str = ""
    spaces: bool = False  # it puts a space before every piece behind a special token


def tokenizer_traits(tok: Any, fmt: ConversationFormat = ConversationFormat()) -> TokenizerTraits:
    """Try out how a tokenizer treats the start of a text and the text behind a special token."""
    if fmt.placeholder is not None and fmt.placeholder.spaced:
        tok = spaced_once(tok)
    added = tok.added_tokens_decoder
    marked = {i for i, token in added.items() if token.special}
    named = {tok.bos_token_id, tok.eos_token_id, tok.pad_token_id} - {None}
    # The unknown token may come out of any text with a rare character; start, end and padding token control
    # the text even where the tokenizer does not mark them as special.
    special = frozenset((marked - {tok.unk_token_id}) | named)
    start: tuple[int, ...] = ()
    # By trial: the post-processor of a fast tokenizer decides, whatever its attributes say.
    if tok("")["input_ids"][:1] == [tok.bos_token_id]:
        start = (tok.bos_token_id,)
    # The anchor is the first special token that does not swallow the white space behind it, if there is one.
    candidates = sorted((added[i].rstrip, i) for i in special if i in added)
    if not candidates:
        raise ValueError("encode: the tokenizer has no special token, so answers could not end")
    swallows_space, anchor_id = candidates[0]
    anchor = added[anchor_id].content
    # Longer names first: a name may be the beginning of another.
    names = sorted(tok.convert_ids_to_tokens(sorted(special)), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)))
    traits = TokenizerTraits(tok=tok, special=special, special_pattern=pattern, start=start)

    word = _token_ids(traits, "a")
    if _token_ids(traits, f"{anchor}a")[1:] == word:
        # Behind a special token a word is what it is at the start of a text, so no anchor is needed.
        line_break = _token_ids(traits, "\n")
        # A word behind a line break that differs had a space put before it at the start of a text, and so
        # gets one at the start of every piece.
        behind_line_break = _token_ids(traits, "\na")[len(line_break) :]
        return evolve(traits, spaces=behind_line_break != word)
    if swallows_space:  # it would remove the white space that answers start with
        raise ValueError(
            "encode: the tokenizer starts texts with a space, and all its special tokens swallow the space "
            "behind them"
        )
    return evolve(traits, anchor=anchor)


def _token_ids(traits: TokenizerTraits, text: str, *, first: bool = False) -> list[int]:
    """Ids of a piece of text as they are in the middle of a text, or at its start if `first`.

    The two differ for sentencepiece, which puts a space before the first word.
    """
    if not text:
        return []
    anchor = ""
    if not first:
        anchor = traits.anchor
    # Explicit, since tokenizer.json may hold settings of truncation and padding. The start token is put once
    # for the whole text, by `_tokenize`.
    encoded = traits.tok(
        anchor + text, add_special_tokens=False, truncation=False, padding=False, verbose=False
    )
    ids = encoded["input_ids"]
    if anchor:
        return ids[1:]
    return ids


def _leading_special_tokens(traits: TokenizerTraits, text: str) -> tuple[str, ...]:
    """The special tokens, one right behind the other, that a text begins with; white space may stand before
    them.
    """
    tokens = list[str]()
    position = len(text) - len(text.lstrip())
    while hit := traits.special_pattern.match(text, position):
        tokens.append(hit[0])
        position = hit.end()
    return tuple(tokens)


# Samples ----------------------------------------------------------------------------------------------------
def _encode_messages(
    traits: TokenizerTraits,
    fmt: ConversationFormat,
    messages: Sequence[Message],
    visual: Sequence[int],
    turns: Turns,
    last_role: str,
) -> Sample:
    check_order(messages, last_role, "encode")
    image_id = _image_token_id(traits, fmt.placeholder, visual)
    _check_special_tokens(traits, fmt)
    _check_texts(traits, fmt, messages, visual, image_id)
    rendered = render_conversation(traits.tok, fmt, messages, turns)
    is_prompt = last_role == "user"
    ids, trained, runs = _tokenize(traits, fmt, rendered, visual, image_id, is_prompt=is_prompt)
    if is_prompt:  # earlier answers are part of the prompt
        trained = []

    # Of a prompt every token counts: an answer cannot be generated behind a prompt that was cut.
    needed = len(ids)
    if trained:  # what follows the last end token may be cut
        # Visual tokens count although they are not trained: a run that is cut no longer fits its image.
        needed = max(stop for _, stop in (*trained, *runs))
    if fmt.context is not None and needed > fmt.context:
        raise TooLong(needed, fmt.context)
    fitting = torch.tensor(ids[: fmt.context])
    labels = torch.full_like(fitting, IGNORE)
    for start, stop in trained:
        labels[start:stop] = fitting[start:stop]
    return Sample(
        ids=fitting,
        labels=labels,
        trained=tuple(trained),
        visual=tuple(runs),
        stripped=rendered.stripped,
    )


def _tokenize(
    traits: TokenizerTraits,
    fmt: ConversationFormat,
    rendered: Rendered,
    visual: Sequence[int],
    image_id: int,
    *,
    is_prompt: bool,
) -> tuple[list[int], list[Span], list[Span]]:
    """(ids, spans of answers with their end tokens, spans of visual tokens) of a rendered conversation."""
    text = rendered.text
    # The special tokens behind the last answer. Behind earlier answers those end it that are the same; the
    # header of the next turn, which may follow at once, is not trained.
    closing: tuple[str, ...] = ()
    if rendered.answers and not is_prompt:
        closing = _leading_special_tokens(traits, text[rendered.answers[-1][1] :])

    ids = list(traits.start)
    if traits.start and text.startswith(traits.tok.bos_token):  # the template writes the start token itself
        ids = []
    trained = list[Span]()
    runs = list[Span]()
    counts = iter(visual)
    position = 0  # in the text, behind the last answer
    answer_start = 0  # in the ids, of the last answer
    # Pieces between answers and answers take turns; behind the last piece stands an empty answer.
    for start, stop in (*rendered.answers, (len(text), len(text))):
        between = text[position:start]
        piece, piece_runs = _tokenize_between(
            traits, fmt.placeholder, between, image_id, counts, first=position == 0
        )
        if position:
            shared = _common_prefix(_leading_special_tokens(traits, between), closing)
            trained.append((answer_start, len(ids) + _ending_length(traits, fmt, piece, shared)))
        # The spans of a piece count from its own beginning.
        runs += [(len(ids) + first, len(ids) + last) for first, last in piece_runs]
        ids += piece
        if traits.spaces and stop > start and ids[-1] not in traits.special:
            raise ValueError(
                "encode: a tokenizer with a space before every piece needs answers behind a special token, "
                f"not so {fmt.description}"
            )
        answer_start = len(ids)
        position = stop
        ids += _token_ids(traits, text[start:stop])
    return ids, trained, runs


def _tokenize_between(
    traits: TokenizerTraits,
    placeholder: Placeholder | None,
    text: str,
    image_id: int,
    counts: Iterator[int],
    *,
    first: bool,
) -> tuple[list[int], list[Span]]:
    """(ids, spans of visual tokens) of the text between two answers.

    Args:
        counts: visual tokens of the images that are still to come; those of this text are taken.
        first: whether the text is the beginning of the conversation.
    """
    if placeholder is None:
        return _token_ids(traits, text, first=first), []
    ids = list[int]()
    runs = list[Span]()
    # `before` and `after` are tokenised with the text beside them, as in a whole text; only the run of image
    # tokens between them, often hundreds, is put in as ids.
    pieces = text.split(placeholder.tag)
    for i, piece in enumerate(pieces):
        if i > 0:
            start = len(ids)
            ids += [image_id] * next(counts)
            runs.append((start, len(ids)))
            piece = placeholder.after + piece
        if i < len(pieces) - 1:
            piece += placeholder.before
        begins = first and i == 0
        # Not left to the tokenizer: a fast one puts no space before a special token or another space.
        if placeholder.spaced and (begins or i > 0):
            piece, begins = f" {piece}", False
        ids += _token_ids(traits, piece, first=begins)
    return ids, runs


def _common_prefix(a: Sequence[str], b: Sequence[str]) -> int:
    """How many items two sequences have in common at their beginnings."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _ending_length(traits: TokenizerTraits, fmt: ConversationFormat, ids: Sequence[int], tokens: int) -> int:
    """How many of the ids behind an answer end it: white space and `tokens` special tokens, at least one.

    Raises:
        ValueError: there is no special token, or other text before it.
    """
    first = None
    for i, token in enumerate(ids):
        if token in traits.special:
            first = i
            break
    # White space between an answer and its end token (a line break in some templates) is trained with it,
    # because the model has to write it to get there.
    if first is None or traits.tok.decode(list(ids[:first])).strip():
        raise ValueError(
            f"encode: {fmt.description} must end every answer with a special token, after an answer it has "
            f"{traits.tok.decode(ids[:8])!r}; if it puts nothing there, name one as the end (chat.end = "
            '"<|user|>" for GLM-4.5)'
        )
    return first + max(1, tokens)


# Checks -----------------------------------------------------------------------------------------------------
def _image_token_id(traits: TokenizerTraits, placeholder: Placeholder | None, visual: Sequence[int]) -> int:
    """The id of the token that stands for images, -1 where there is no placeholder."""
    if placeholder is None:
        if visual:
            raise ValueError(
                f"encode: {len(visual)} images were given and no placeholder; give one, such as QWEN_VL"
            )
        return -1
    if any(count < 1 for count in visual):
        raise ValueError(f"encode: every image must have at least one visual token, got {list(visual)}")
    ids = _token_ids(traits, placeholder.token)
    if len(ids) != 1:
        raise ValueError(
            f"encode: the placeholder {placeholder.token!r} must be one token of the tokenizer, it is "
            f"{len(ids)}; add it or take another"
        )
    return ids[0]


def _check_special_tokens(traits: TokenizerTraits, fmt: ConversationFormat) -> None:
    """Raise where `fmt.allow` or `fmt.end` is no token of the tokenizer, or the one that stands for images."""
    tokens = [*fmt.allow]
    if fmt.end:
        tokens.append(fmt.end)
    for token in tokens:
        ids = _token_ids(traits, token)
        if len(ids) != 1 or (token == fmt.end and ids[0] not in traits.special):
            raise ValueError(
                f"encode: {token!r} must be a special token of the tokenizer, to be allowed in answers or to "
                f"end them; it is {len(ids)} tokens"
            )
        if fmt.placeholder and token == fmt.placeholder.token:
            raise ValueError(f"encode: {token!r} stands for images, answers must not hold it")


def _check_texts(
    traits: TokenizerTraits,
    fmt: ConversationFormat,
    messages: Sequence[Message],
    visual: Sequence[int],
    image_id: int,
) -> None:
    """Raise where a text holds special tokens, which only the template may write, or tags that do not match."""
    # Compared as ids: what the tokenizer makes of a text counts, not how it is spelt.
    reserved = traits.special | {image_id}
    for i, message in enumerate(messages):
        texts = [message["content"]]
        if fmt.placeholder:
            # Without the tags, which never reach the tokenizer: one may be a special token itself.
            texts = message["content"].split(fmt.placeholder.tag)
        used = set[int]()
        for text in texts:
            used.update(_token_ids(traits, text))
        names = set(map(traits.tok.convert_ids_to_tokens, used & reserved))
        if message["role"] == "assistant":
            # Only in answers: a user's text with control tokens could open a turn of its own.
            names -= set(fmt.allow)
        if names:
            raise ValueError(
                f"encode: message {i} ({message['role']}) must not hold special tokens of the tokenizer, "
                f"found {', '.join(sorted(names))}; rewrite them"
            )
    if fmt.placeholder:
        check_tags(messages, fmt.placeholder.tag, len(visual), "encode")
