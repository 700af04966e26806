"""Conversations with images: messages to token ids of which only the answers are trained."""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any, Literal

import torch
from attrs import evolve, frozen
from torch import Tensor

from medvl.base.display import track
from medvl.base.text import short

_log = logging.getLogger(__name__)
_PAIRS = "pairs of a better and a worse answer are not trained here, and the worse one must not be taken for the better"
_TOOLS = "calls of tools are not trained here"
# Keys of other programs that change what is trained. Taken for remarks, they would leave a text that says something else.
_NOT_READ = {
    **dict.fromkeys(("videos", "video"), "videos are not read; give frames as images"),
    **dict.fromkeys(("audios", "audio"), "sound is not read"),
    "objects": "boxes and their names are not written into texts; write them as text yourself",
    **dict.fromkeys(
        ("rejected_response", "rejected_messages", "rejected_images", "rejected", "chosen"), _PAIRS
    ),
    **dict.fromkeys(
        ("preferred_output", "non_preferred_output", "positive_messages", "negative_messages", "kto_tag"),
        _PAIRS,
    ),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
    **dict.fromkeys(("loss", "loss_scale"), "every answer is trained alike"),
}
# Tags of other programs that stand for something else than themselves.
_OTHER_TAGS = re.compile(
    r"<(?:video|audio|bbox|ref-object|cot-process|ImageHere|image[ _]?\d+|img)>|<\|(?:image|video|audio)_\d+\|>|</img>"
)
IGNORE = -100  # label of a token that is not trained
Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
# Which answers of a conversation are trained: all, the last, or the last as it is behind the prompt of generation, whatever the template
# does with answers.
Turns = Literal["all", "last", "raw"]


@frozen(kw_only=True)
class Placeholder:
    """How an image stands in a sequence: the user's `tag` becomes `before`, then `token` once per visual token, then `after`.

    `token` may be any token that no text needs, e.g. Phi-3's "<|placeholder1|>": its embeddings are replaced.
    """

    tag: str = "<image>"
    token: str
    before: str = ""
    after: str = ""


QWEN_VL = Placeholder(token="<|image_pad|>", before="<|vision_start|>", after="<|vision_end|>")
INTERN_VL = Placeholder(token="<IMG_CONTEXT>", before="<img>", after="</img>")


def _template(before: str, after: str, end: str, system: str = "") -> str:
    """A Jinja chat template: `before` role `after` content `end`, with a system turn of its own where the messages have none."""
    first = (
        "{% if messages[0].role != 'system' %}{{ "
        + repr(f"{before}system{after}{system}{end}")
        + " }}{% endif %}"
        if system
        else ""
    )
    turns = f"{{% for m in messages %}}{{{{ {before!r} + m.role + {after!r} + m.content + {end!r} }}}}{{% endfor %}}"
    return (
        first
        + turns
        + "{% if add_generation_prompt %}{{ "
        + repr(f"{before}assistant{after}")
        + " }}{% endif %}"
    )


TEMPLATES = {
    "chatml": _template("<|im_start|>", "\n", "<|im_end|>\n"),
    "qwen2": _template(
        "<|im_start|>",
        "\n",
        "<|im_end|>\n",
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "phi3": _template("<|", "|>\n", "<|end|>\n", "You are a helpful AI assistant."),
    "phi4": _template(
        "<|im_start|>",
        "<|im_sep|>\n",
        "<|im_end|>\n",
        "You are a medieval knight and must provide explanations to modern people.",
    ),
}
"""Named templates. "chatml" is that of Qwen3's instruct models without thinking; the others are those HealthGPT was trained with (its phi4
took the system turn from Phi-4's model card: give a system message to have another)."""


@frozen(kw_only=True, eq=False)
class Sample:
    """One tokenised conversation. `labels` are not shifted: labels[i] belongs to ids[i], the loss compares it with the logits at i - 1."""

    ids: Tensor  # int64 [t]
    labels: Tensor  # int64 [t], IGNORE where not trained
    trained: tuple[tuple[int, int], ...] = ()  # [start, stop) of every answer with its end tokens
    visual: tuple[tuple[int, int], ...] = ()  # [start, stop) of every image's visual tokens
    stripped: int = 0  # trained answers whose white space at an end the template drops


class TooLong(ValueError):
    """A sample's last trained or visual token (a prompt's last token) lies past the context: `needed` tokens, `context` allowed."""

    def __init__(self, needed: int, context: int) -> None:
        super().__init__(needed, context)  # both in args: it must survive pickling in a data loader
        self.needed, self.context = needed, context

    def __str__(self) -> str:
        return (
            f"encode: answers and visual tokens must fit the context, need {self.needed} tokens, context is {self.context}; "
            "make the images smaller, shorten the text or raise the context"
        )


def encode_conversation(
    tok: Any,
    messages: Sequence[Message],
    *,
    placeholder: Placeholder | None = None,
    visual: Sequence[int] = (),
    context: int | None = None,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    end: str = "",
    turns: Turns = "all",
) -> Sample:
    """Token ids of a conversation, and labels of every assistant turn: its answer and end tokens, nothing else.

    The text is cut where answers start and end and the pieces are tokenised one by one, so the ids before an answer are those of
    `encode_prompt`, whatever characters the answer starts with. Only what follows the last end token is ever truncated.

    Args:
        tok: a fast Hugging Face tokenizer; one that puts a start token before texts gets exactly one here.
        messages: optional system, then user and assistant in turn, ending with assistant.
        visual: number of visual tokens of every image, in the order of the tags in the user's texts.
        context: longest sequence, in tokens.
        template: a name in `TEMPLATES` or a Jinja chat template; the tokenizer's own when None.
        options: variables of the template, such as {"enable_thinking": False}.
        allow: special tokens that answers may hold, such as those of image codes; elsewhere special tokens in a text are refused.
        end: the special token to put behind the last answer where the template puts nothing there (GLM-4.5: "<|user|>").
        turns: "all" answers are trained, or only the "last" one, behind a history as the template writes it (see `rewrites_history`); or
            the last one "raw": put as it is behind the prompt of generation, for templates that open reasoning there and drop it from
            answers (DeepSeek-R1's).
    Returns:
        An answer's white space at its ends is left out where the template drops it (`Sample.stripped` counts such answers), and white
        space that the template puts before an answer and not into the prompt belongs to the answer, because the model has to write it.
    Raises:
        TooLong: a trained or a visual token would be cut.
        ValueError: wrong roles or order, contents that are no strings, special tokens in a text, tags that do not match `visual`, or a
            template in which an answer does not follow the prompt that generation sees, or has no end token.
    """
    how = _How(
        placeholder=placeholder,
        context=context,
        template=template,
        options=options or {},
        allow=allow,
        end=end,
        turns=turns,
    )
    return _encode(_look(tok), how, messages, visual, "assistant")


def encode_prompt(
    tok: Any,
    messages: Sequence[Message],
    *,
    placeholder: Placeholder | None = None,
    visual: Sequence[int] = (),
    context: int | None = None,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    end: str = "",
    turns: Turns = "all",
) -> Sample:
    """What generation starts from: messages that end with the user's, and the header of the answer; no token is trained.

    Args and errors as `encode_conversation`; a prompt longer than `context` is always TooLong. The ids are the first ones of the whole conversation's,
    encoded with the same `turns`.
    """
    how = _How(
        placeholder=placeholder,
        context=context,
        template=template,
        options=options or {},
        allow=allow,
        end=end,
        turns=turns,
    )
    return _encode(_look(tok), how, messages, visual, "user")


def encode_conversations(
    tok: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    placeholder: Placeholder | None = None,
    visual: Sequence[Sequence[int]] | None = None,
    context: int | None = None,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    end: str = "",
    turns: Sequence[Turns] = (),
    names: Sequence[str] = (),
) -> tuple[list[Sample], list[tuple[int, TooLong]]]:
    """Samples of the conversations that fit, in order, and (index, reason) of those that are too long; a warning says how many.

    Args:
        visual: as for `encode_conversation`, one sequence per conversation.
        turns: as for `encode_conversation`, one per conversation; "all" for each if left out.
        names: what errors call each conversation, such as its file and line; "conversation 3" if left out.
    Raises:
        ValueError: as `encode_conversation`, with the name; or no conversation fits.
    """
    n = len(conversations)
    for what, given in (("visual", visual), ("turns", turns or None), ("names", names or None)):
        if given is not None and len(given) != n:
            raise ValueError(
                f"encode_conversations: {what} must have one row per conversation, got {len(given)} for {n}"
            )
    visual = visual or [()] * n
    turns = turns or ["all"] * n
    how = _How(
        placeholder=placeholder,
        context=context,
        template=template,
        options=options or {},
        allow=allow,
        end=end,
        turns="all",
    )
    kit, samples, refused = _look(tok), list[Sample](), list[tuple[int, TooLong]]()
    for i, messages in enumerate(track(conversations, "encoding conversations")):
        try:
            samples.append(_encode(kit, evolve(how, turns=turns[i]), messages, visual[i], "assistant"))
        except TooLong as e:
            refused.append((i, e))
        except ValueError as e:
            name = names[i] if names else f"conversation {i}"
            raise ValueError(f"{name}: {e}") from e
    if refused:
        longest = max(e.needed for _, e in refused)
        count = f"{len(refused)} of {n} conversations do not fit the context of {context} tokens (the longest needs {longest})"
        if not samples:
            raise ValueError(f"encode_conversations: {count}; make the images smaller or raise the context")
        _log.warning("%s and are left out", count)
    stripped = sum(s.stripped for s in samples)
    if stripped:
        _log.warning("%d answers lose white space at their ends, because %s drops it", stripped, how.name)
    return samples, refused


def rewrites_history(
    tok: Any,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> bool:
    """Whether the template writes an earlier answer in another way than behind its own prompt.

    Templates of reasoning models do: a prompt opens or skips the reasoning, and of earlier answers the reasoning is left out. Such a
    conversation is trained as one sample per answer: `encode_conversation(messages[:i], turns="last")`, whose ids are those that generation sees.
    """
    check_order(messages, messages[-1]["role"] if messages else "assistant", "encode")
    how = _How(
        placeholder=None,
        context=None,
        template=template,
        options=options or {},
        allow=(),
        end="",
        turns="all",
    )
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    earlier = [i for i, m in enumerate(plain[:-1]) if m["role"] == "assistant"]
    if not earlier:
        return False
    text = _apply(tok, how, plain, plain[-1]["role"] == "user")
    prompts = [_apply(tok, how, plain[:i], True) for i in earlier]
    return any(
        _span(text, prompt, plain[i]["content"]) is None for i, prompt in zip(earlier, prompts, strict=True)
    )


def writes_date(
    tok: Any,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> bool:
    """Whether the template writes today's date into a conversation (Llama 3.2's does): its ids are others tomorrow."""
    mark = "the date of today"
    # A macro of this name hides the function of transformers that tells the date.
    dated = f"{{% macro strftime_now(form) %}}{mark}{{% endmacro %}}{_template_of(tok, template)}"
    how = _How(
        placeholder=None, context=None, template=dated, options=options or {}, allow=(), end="", turns="all"
    )
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    return mark in _apply(tok, how, plain, False)


def template_text(tok: Any, template: str | None = None, options: Mapping[str, Any] | None = None) -> str:
    """The Jinja chat template that conversations are encoded with, where the `options` are what it falls back to.

    Raises:
        ValueError: there is none, or an option is nothing that JSON has.
    """
    jinja = _template_of(tok, template)
    defaults = [
        f"{{% if {k} is not defined %}}{{% set {k} = {_literal(v)} %}}{{% endif %}}"
        for k, v in (options or {}).items()
    ]
    return "".join(defaults) + jinja


def end_ids(
    tok: Any, *, template: str | None = None, options: Mapping[str, Any] | None = None, end: str = ""
) -> tuple[int, ...]:
    """The id of the token that ends an answer: the first that the template puts behind one, or `end`; () where there is neither."""
    kit = _look(tok)
    how = _How(
        placeholder=None,
        context=None,
        template=template,
        options=options or {},
        allow=(),
        end=end,
        turns="last",
    )
    messages = [{"role": "user", "content": "a question"}]
    found = _endings(kit, _tail(tok, how, messages[:1]))
    return tuple(tok.convert_tokens_to_ids([*found[:1]]))


def collate_samples(
    samples: Sequence[Sample], pad_id: int, *, side: Literal["right", "left"] = "right", multiple_of: int = 1
) -> dict[str, Tensor]:
    """Samples as rows of one length.

    Args:
        pad_id: any id; `mask` tells padding from tokens.
        side: where padding goes: right for training, left for generation (new tokens must follow the last one).
        multiple_of: the length is rounded up to a multiple of this.
    Returns:
        "ids" int64 [b, t], "mask" bool [b, t], "labels" int64 [b, t] (not shifted, IGNORE at padding), "visual" bool [b, t], true at visual
        tokens (Qwen's `mm_token_type_ids` as integers).
    """
    if not samples or side not in ("right", "left") or multiple_of < 1:
        raise ValueError(
            f"collate_samples: needs samples, side right or left and multiple_of >= 1, got {len(samples)} samples, {side!r}, {multiple_of}"
        )
    length = -(-max(len(s.ids) for s in samples) // multiple_of) * multiple_of
    out = {
        "ids": torch.full((len(samples), length), pad_id),
        "mask": torch.zeros(len(samples), length, dtype=torch.bool),
        "labels": torch.full((len(samples), length), IGNORE),
        "visual": torch.zeros(len(samples), length, dtype=torch.bool),
    }
    for row, s in enumerate(samples):
        start = 0 if side == "right" else length - len(s.ids)
        span = slice(start, start + len(s.ids))
        out["ids"][row, span], out["labels"][row, span], out["mask"][row, span] = s.ids, s.labels, True
        for a, b in s.visual:
            out["visual"][row, start + a : start + b] = True
    return out


def show_sample(tok: Any, sample: Sample, marks: tuple[str, str] = ("«", "»")) -> str:
    """A sample as text for people: trained tokens between `marks`, visual tokens as "<|image_pad|> x 256", counts in the last line.

    Args:
        marks: such as ("\\033[32m", "\\033[0m") for green on a terminal.
    """
    trained, visual = (sample.labels != IGNORE).tolist(), [False] * len(sample.ids)
    for a, b in sample.visual:
        visual[a:b] = [True] * (b - a)
    starts = {a for span in (*sample.trained, *sample.visual) for a in span if a < len(visual)} | {0}
    starts |= {
        i for i in range(1, len(visual)) if trained[i] != trained[i - 1]
    }  # what the labels say, should the spans differ
    edges, parts = [*sorted(starts), len(visual)], []
    for a, b in pairwise(edges):
        ids = sample.ids[a:b].tolist()
        text = (
            f"{tok.convert_ids_to_tokens(ids[0])} x {b - a}"
            if visual[a]
            else tok.decode(ids, clean_up_tokenization_spaces=False)
        )
        parts.append(f"{marks[0]}{text}{marks[1]}" if trained[a] else text)
    counts = f"{len(trained)} tokens, {sum(visual)} visual in {len(sample.visual)} images"
    return "".join(parts) + f"\n[{counts}, {sum(trained)} trained in {len(sample.trained)} turns]"


# Tokens ---------------------------------------------------------------------------------------------------------------------------------
@frozen(kw_only=True, eq=False)
class _Kit:
    """What has to be known of a tokenizer."""

    tok: Any
    special: frozenset[int]
    marks: re.Pattern[str]  # any of its special tokens
    start: tuple[int, ...]  # what it puts before every text
    anchor: str = ""  # a special token to put before a piece that does not start the text, "" where it makes no difference
    spaces: bool = False  # it puts a space before every piece behind a special token


@frozen(kw_only=True, eq=False)
class _How:
    """The options of `encode_conversation`."""

    placeholder: Placeholder | None
    context: int | None
    template: str | None
    options: Mapping[str, Any]
    allow: Collection[str]
    end: str
    turns: Turns

    @property
    def name(self) -> str:
        given = f"the template {self.template!r}" if self.template in TEMPLATES else "the given template"
        return given if self.template else "the tokenizer's chat template"


def _look(tok: Any) -> _Kit:
    added = tok.added_tokens_decoder
    named = {tok.bos_token_id, tok.eos_token_id, tok.pad_token_id} - {None}
    special = frozenset({i for i, t in added.items() if t.special} - {tok.unk_token_id} | named)
    start = (tok.bos_token_id,) if tok("")["input_ids"][:1] == [tok.bos_token_id] else ()
    marks = sorted((added[i].rstrip, i) for i in special if i in added)
    if not marks:
        raise ValueError("encode: the tokenizer has no special token, so answers could not end")
    swallows, anchor = marks[0][0], added[marks[0][1]].content
    names = sorted(tok.convert_ids_to_tokens(sorted(special)), key=len, reverse=True)
    kit = _Kit(tok=tok, special=special, marks=re.compile("|".join(map(re.escape, names))), start=start)
    if _ids(kit, f"{anchor}a")[1:] == _ids(kit, "a"):
        return evolve(kit, spaces=_ids(kit, "\na")[len(_ids(kit, "\n")) :] != _ids(kit, "a"))
    if swallows:  # it would eat the white space that answers start with
        raise ValueError(
            "encode: the tokenizer starts texts with a space, and all its special tokens swallow the space behind them"
        )
    return evolve(kit, anchor=anchor)


def _ids(kit: _Kit, text: str, *, first: bool = False) -> list[int]:
    """Ids of a piece of text as they are in the middle of a text, or at its start (sentencepiece puts a space before the first word)."""
    anchor = "" if first else kit.anchor
    ids = (
        kit.tok(anchor + text, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]
        if text
        else []
    )
    return ids[1:] if anchor and text else ids


def _encode(kit: _Kit, how: _How, messages: Sequence[Message], visual: Sequence[int], last: str) -> Sample:
    check_order(messages, last, "encode")
    pad = _check_visual(kit, how.placeholder, visual)
    _check_tokens(kit, how)
    _check_texts(kit, how, messages, visual, pad)
    text, answers, stripped = _render(kit.tok, how, messages)
    closing = _endings(kit, text[answers[-1][1] :]) if answers and last == "assistant" else ()
    ids = [] if kit.start and text.startswith(kit.tok.bos_token) else [*kit.start]
    trained, runs, counts = list[tuple[int, int]](), list[tuple[int, int]](), iter(visual)
    at = begin = 0
    for start, stop in [*answers, (len(text), len(text))]:
        piece, found = _plain(kit, how.placeholder, text[at:start], pad, counts, first=not at)
        if at:
            # What the template puts behind every answer; the header of the next turn, which may follow at once, is not trained.
            pairs = zip(_endings(kit, text[at:start]), closing, strict=False)
            same = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
            trained.append((begin, len(ids) + _end(kit, how, piece, same)))
        runs += [(len(ids) + a, len(ids) + b) for a, b in found]
        ids += piece
        if kit.spaces and stop > start and ids[-1] not in kit.special:
            raise ValueError(
                f"encode: a tokenizer with a space before every piece needs answers behind a special token, not so {how.name}"
            )
        begin, at = len(ids), stop
        ids += _ids(kit, text[start:stop])
    if last == "user":  # what was answered before is part of the prompt
        trained = []
    needed = max((b for _, b in (*trained, *runs)), default=0) if trained else len(ids)
    if how.context is not None and needed > how.context:
        raise TooLong(needed, how.context)
    whole = torch.tensor(ids[: how.context])
    labels = torch.full_like(whole, IGNORE)
    for a, b in trained:
        labels[a:b] = whole[a:b]
    return Sample(ids=whole, labels=labels, trained=tuple(trained), visual=tuple(runs), stripped=stripped)


def _plain(
    kit: _Kit, holder: Placeholder | None, text: str, pad: int, counts: Iterator[int], *, first: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of what lies between answers, and where its visual tokens are."""
    parts, ids, runs = text.split(holder.tag) if holder else [text], list[int](), list[tuple[int, int]]()
    for k, part in enumerate(parts):
        if holder and k:
            runs.append((len(ids), len(ids) + next(counts)))
            ids += [pad] * (runs[-1][1] - runs[-1][0])
            part = holder.after + part
        if holder and k < len(parts) - 1:
            part += holder.before
        ids += _ids(kit, part, first=first and not k)
    return ids, runs


def _endings(kit: _Kit, text: str) -> tuple[str, ...]:
    """The special tokens that stand one right behind the other where an answer ends (templates may put white space before them)."""
    found, at = list[str](), len(text) - len(text.lstrip())
    while hit := kit.marks.match(text, at):
        found.append(hit[0])
        at = hit.end()
    return tuple(found)


def _end(kit: _Kit, how: _How, ids: Sequence[int], tokens: int) -> int:
    """How many of the ids after an answer belong to its end, of so many special tokens, at least one."""
    k = next((i for i, t in enumerate(ids) if t in kit.special), None)
    if k is None or kit.tok.decode(list(ids[:k])).strip():
        raise ValueError(
            f"encode: {how.name} must end every answer with a special token, after an answer stands {kit.tok.decode(ids[:8])!r}; "
            'where it puts nothing there, name one as the end (chat.end = "<|user|>" for GLM-4.5)'
        )
    return k + max(1, tokens)


def _render(tok: Any, how: _How, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], int]:
    """The conversation as text, where in it the trained answers are, and how many of them the template strips.

    Each answer stands right behind the prompt that generation sees.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    if how.turns == "raw" and plain[-1]["role"] == "assistant":
        prompt, answer = _apply(tok, how, plain[:-1], True), plain[-1]["content"]
        text = prompt + answer + _tail(tok, how, plain[:-1])
        return text, [(len(prompt), len(prompt) + len(answer))], 0
    text, spans = _apply(tok, how, plain, plain[-1]["role"] == "user"), list[tuple[int, int]]()
    answers = [i for i, m in enumerate(plain) if m["role"] == "assistant"]
    if how.turns != "all":  # what was answered before is part of the prompt
        answers = [i for i in answers if i == len(plain) - 1]
    stripped = 0
    for i in answers:
        content = plain[i]["content"]
        prompt = _apply(tok, how, plain[:i], True)
        span = _span(text, prompt, content)
        if span is None:
            same = next(
                (k for k, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(prompt)
            )
            near = slice(max(same - 20, 0), same + 40)
            raise ValueError(
                f"encode: {how.name} must put answer {len(spans) + 1} unchanged behind the prompt of generation, but where the prompt "
                f'has {prompt[near]!r} the conversation has {text[near]!r}; set chat.template to another ("chatml", or Jinja text), or '
                "chat.options to what the template takes ({enable_thinking = false} for a thinking model), or put answers as they are "
                'behind the prompt (chat.answers = "raw")'
            )
        spans.append(span)
        stripped += not text[slice(*span)].endswith(content)
    if how.end and answers and answers[-1] == len(plain) - 1 and not text[spans[-1][1] :].strip():
        text = text[: spans[-1][1]] + how.end
    if how.placeholder and text.count(how.placeholder.tag) != (
        n := sum(m["content"].count(how.placeholder.tag) for m in plain)
    ):
        raise ValueError(
            f"encode: {how.name} must keep the {n} tags {how.placeholder.tag!r} as they are, its text is {short(text)}"
        )
    return text, spans, stripped


def _tail(tok: Any, how: _How, prompt: list[dict[str, str]]) -> str:
    """What the template, or else `end`, puts behind an answer to this prompt."""
    mark = "the answer"
    before, _, tail = _apply(tok, how, [*prompt, {"role": "assistant", "content": mark}], False).rpartition(
        mark
    )
    if not before:
        raise ValueError(f"encode: {how.name} drops the answer {mark!r}")
    return tail if tail.strip() else how.end


def _span(text: str, prompt: str, content: str) -> tuple[int, int] | None:
    """Where in a rendered conversation the answer `content` stands behind its prompt; None where it does not.

    White space at the ends of an answer may be dropped. White space before it that is not in the prompt is taken as part of the answer:
    the model has to write it (GLM-4.5's answers begin with a line break).
    """
    if not text.startswith(prompt):
        return None
    start, inner = len(prompt), content.strip()
    for answer in (content, inner):
        if text.startswith(answer, start):
            return start, start + len(answer)
    first = start + len(text[start:]) - len(text[start:].lstrip())
    return (start, first + len(inner)) if text.startswith(inner, first) else None


def _apply(tok: Any, how: _How, messages: list[dict[str, str]], answer: bool) -> str:
    import jinja2  # comes with torch

    template = _template_of(tok, how.template)
    of_expressions = (TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)
    try:
        return tok.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answer, **how.options
        )
    except (jinja2.TemplateError, *of_expressions) as e:
        raise ValueError(
            f"encode: {how.name} does not take these messages: {str(e) or type(e).__name__}"
        ) from e


def _template_of(tok: Any, template: str | None) -> str:
    """The Jinja text of a template by name, of one that is given, or of the tokenizer's own."""
    own = getattr(tok, "chat_template", None)
    if isinstance(
        own, dict
    ):  # several by name, as Command R and Hermes have them; the others are for calls of tools
        own = own.get("default")
    jinja = TEMPLATES.get(template or "", template or own)
    if not isinstance(jinja, str | None):
        raise ValueError(
            f"encode: the tokenizer's chat template must be text, got {short(jinja)}; name another (chat.template)"
        )
    if not jinja or (template and "{" not in jinja):
        found = f"got {template!r}" if template else "the tokenizer has none"
        raise ValueError(
            f"encode: needs a chat template, {found}; give one of {', '.join(TEMPLATES)} or a Jinja template"
        )
    return jinja


def _literal(value: Any) -> str:
    """A value of JSON as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if not isinstance(value, str | bool | int | float):
        raise ValueError(f"encode: options of a template must be values of JSON, got {value!r}")
    # json.dumps would write characters outside ASCII as \\u escapes, which Jinja reads too, and true and false as Jinja does
    return json.dumps(value)


def check_order(messages: Sequence[Message], last: str, where: str) -> None:
    """Raise unless roles and contents are those of a conversation that ends with the role `last`."""
    for i, m in enumerate(messages):
        if (
            not isinstance(m, Mapping)
            or not isinstance(m.get("content"), str)
            or not isinstance(m.get("role"), str)
        ):
            raise ValueError(
                f'{where}: message {i} must be {{"role": text, "content": text}}, got {short(m)}'
            )
        if hit := re.search("[\ud800-\udfff]", m["content"]):
            raise ValueError(
                f"{where}: message {i} must be text that can be written as UTF-8, it holds {hit[0]!a}, half a character"
            )
    roles = [m["role"] for m in messages]
    if "assistant" not in roles and last == "assistant":
        raise ValueError(f"{where}: needs a turn of the assistant, got {' '.join(roles) or 'no messages'}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or turns[-1] != last:
        raise ValueError(
            f"{where}: roles must be user and assistant in turn after an optional system, ending with {last}, got {' '.join(roles)}"
        )


def _check_visual(kit: _Kit, holder: Placeholder | None, visual: Sequence[int]) -> int:
    """The id of the token that stands for images."""
    if holder is None:
        if visual:
            raise ValueError(
                f"encode: {len(visual)} images were given and no placeholder; give one, such as QWEN_VL"
            )
        return -1
    if any(n < 1 for n in visual):
        raise ValueError(f"encode: every image must have at least one visual token, got {list(visual)}")
    ids = _ids(kit, holder.token)
    if len(ids) != 1:
        raise ValueError(
            f"encode: the placeholder {holder.token!r} must be one token of the tokenizer, it is {len(ids)}; add it or take another"
        )
    return ids[0]


def _check_tokens(kit: _Kit, how: _How) -> None:
    """Raise where what answers may hold or end with is no token of the tokenizer, or the one that stands for images."""
    wanted = [*how.allow, *([how.end] if how.end else [])]
    for token in wanted:
        ids = _ids(kit, token)
        if len(ids) != 1 or (token == how.end and ids[0] not in kit.special):
            raise ValueError(
                f"encode: {token!r} must be a special token of the tokenizer, to be allowed in answers or to end them; "
                f"it is {len(ids)} tokens"
            )
        if how.placeholder and token == how.placeholder.token:
            raise ValueError(f"encode: {token!r} stands for images, answers must not hold it")


def _check_texts(kit: _Kit, how: _How, messages: Sequence[Message], visual: Sequence[int], pad: int) -> None:
    """Raise where a text holds what only the template may write."""
    tag = how.placeholder.tag if how.placeholder else None
    for i, m in enumerate(messages):
        parts = m["content"].split(tag) if tag else [m["content"]]
        held = {
            kit.tok.convert_ids_to_tokens(t)
            for part in parts
            for t in _ids(kit, part)
            if t in kit.special or t == pad
        }
        if held := held - {*how.allow} if m["role"] == "assistant" else held:
            found = ", ".join(sorted(held))
            raise ValueError(
                f"encode: message {i} ({m['role']}) must not hold special tokens of the tokenizer, found {found}; rewrite them"
            )
    if tag:
        check_tags(messages, tag, len(visual), "encode")


def check_tags(messages: Sequence[Message], tag: str, images: int, where: str) -> None:
    """Raise unless the user's texts hold one tag per image, and no other text holds any."""
    for m in messages:
        if m["role"] != "user" and tag in m["content"]:
            raise ValueError(
                f"{where}: only the user's texts may hold the tag {tag!r}, found it in one of the {m['role']}"
            )
    if (n := sum(m["content"].count(tag) for m in messages)) != images:
        raise ValueError(f"{where}: every tag {tag!r} needs its image, got {n} tags and {images} images")


def check_other_tags(messages: Iterable[Message], tag: str, where: str) -> None:
    """Raise where a text holds a tag of other programs, which stands there for something else than its letters."""
    for message in messages:
        if hit := _OTHER_TAGS.search(message["content"].replace(tag, "")):
            raise ValueError(
                f"{where}: the tag {hit[0]} of the {message['role']} stands for something that is not read, and would be trained as "
                f"these letters; images are {tag}, and boxes are written as text"
            )


def check_keys(record: Mapping[str, Any], where: str, also: Mapping[str, str]) -> None:
    """Raise where a key changes what is trained in other programs and is not read here.

    Args:
        also: more such keys, of one kind of file, and why they are not read.
    """
    for key, why in {**_NOT_READ, **also}.items():
        if not is_empty(record.get(key)):
            raise ValueError(f'{where}: must not have "{key}": {why}')
    if isinstance(record.get("label"), bool):
        raise ValueError(
            f'{where}: must not have "label": {json.dumps(record["label"])}: by KTO it says whether the answer is a good one, and every '
            "answer is trained as a good one here; take out the bad ones, and the key"
        )


def is_empty(value: Any) -> bool:
    """Whether a value of a record says as little as if it were not there."""
    return value is None or (isinstance(value, str | list | dict) and not value)
