"""Chat templates: how messages become the text of a conversation, and where in this text the answers stand."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from attrs import evolve, field, frozen

from medvl.base.text import short
from medvl.language.messages import Message, check_order

# Which answers of a conversation are trained: all; the last; or the last one "raw", which is put behind the
# generation prompt as it is, whatever the template does with answers.
Turns = Literal["all", "last", "raw"]
Span = tuple[int, int]  # [start, stop)


@frozen(kw_only=True)
class Placeholder:
    """How an image stands in a text: the user's `tag` becomes `before`, `token` once per visual token, and
    `after`.

    `token` may be any token that no text needs, e.g. Phi-3's "<|placeholder1|>": its embeddings are replaced.
    """

    tag: str = "<image>"
    token: str
    before: str = ""
    after: str = ""
    # The texts before and behind an image each begin with the space that sentencepiece puts before a text, also
    # where a special token follows: as LLaVA's tokenizer_image_token with a slow tokenizer.
    spaced: bool = False


# As the published chat templates and processors of the two families write an image.
QWEN_VL = Placeholder(token="<|image_pad|>", before="<|vision_start|>", after="<|vision_end|>")
INTERN_VL = Placeholder(token="<IMG_CONTEXT>", before="<img>", after="</img>")


def _make_template(before: str, after: str, end: str, system: str = "") -> str:
    """A Jinja chat template: every message is `before`, its role, `after`, its content and `end`.

    Args:
        system: content of the system turn of conversations that have none.
    """
    # repr quotes the pieces: Python's and Jinja's literals agree on quotes and on \n.
    turns = f"{{% for m in messages %}}{{{{ {before!r} + m.role + {after!r} + m.content + {end!r} }}}}{{% endfor %}}"
    generation_header = repr(f"{before}assistant{after}")
    template = turns + "{% if add_generation_prompt %}{{ " + generation_header + " }}{% endif %}"
    if not system:
        return template
    # What such templates do by themselves: a conversation without a system turn gets the model's default one.
    system_turn = repr(f"{before}system{after}{system}{end}")
    return "{% if messages[0].role != 'system' %}{{ " + system_turn + " }}{% endif %}" + template


TEMPLATES = {
    "chatml": _make_template("<|im_start|>", "\n", "<|im_end|>\n"),
    "qwen2": _make_template(
        "<|im_start|>",
        "\n",
        "<|im_end|>\n",
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "phi3": _make_template("<|", "|>\n", "<|end|>\n", "You are a helpful AI assistant."),
    "phi4": _make_template(
        "<|im_start|>",
        "<|im_sep|>\n",
        "<|im_end|>\n",
        "You are a medieval knight and must provide explanations to modern people.",
    ),
}
"""Named templates. "chatml" is that of Qwen3's instruct models without thinking; the others are those
HealthGPT was trained with. Its phi4 took the system turn from Phi-4's model card: give a system message to
have another."""
# Images in these templates, with the ids of HealthGPT, whose slow tokenizer of Phi-3 writes spaces. A spare token
# of each vocabulary stands where it has a number outside of it.
PLACEHOLDERS = {
    "phi3": Placeholder(token="<|placeholder1|>", spaced=True),
    "phi4": Placeholder(token="<|dummy_0|>"),
    "qwen2": Placeholder(token="<|image_pad|>"),
}


@frozen(kw_only=True, eq=False)
class ConversationFormat:
    """How conversations become token ids: chat template, placeholder of images, and the longest sequence."""

    template: str | None = None  # a name in `TEMPLATES` or a Jinja chat template; None = the tokenizer's own
    options: Mapping[str, Any] = field(factory=dict)  # variables of the template: {"enable_thinking": False}
    # Special tokens that answers may hold, such as those of image codes. Other texts must not hold any.
    allow: Collection[str] = ()
    # The special token behind the last answer where the template puts nothing there (GLM-4.5: "<|user|>").
    end: str = ""
    placeholder: Placeholder | None = None  # None = texts only
    context: int | None = None  # longest sequence in tokens; None = no limit

    @property
    def description(self) -> str:
        """What errors call the template."""
        if not self.template:
            return "the tokenizer's chat template"
        if self.template in TEMPLATES:
            return f"the template {self.template!r}"
        return "the given template"


@frozen(kw_only=True)
class Rendered:
    """The text of a conversation."""

    text: str
    answers: tuple[Span, ...]  # where the trained answers stand, in characters
    stripped: int = 0  # trained answers whose white space at an end the template drops


def render_conversation(
    tok: Any, fmt: ConversationFormat, messages: Sequence[Message], turns: Turns
) -> Rendered:
    """Write a conversation as text. Each trained answer stands right behind the prompt that generation sees.

    Raises:
        ValueError: the template does not take the messages, or writes an answer in another way than behind
            its prompt.
    """
    plain = _plain_messages(messages)
    last = len(plain) - 1
    ends_with_answer = plain[last]["role"] == "assistant"
    # The rendered answer is not looked at: a template that takes the reasoning out of answers would change
    # it.
    if turns == "raw" and ends_with_answer:
        prompt = _apply_template(tok, fmt, plain[:last], generation=True)
        answer = plain[last]["content"]
        text = prompt + answer + answer_tail(tok, fmt, plain[:last])
        return Rendered(text=text, answers=((len(prompt), len(prompt) + len(answer)),))

    text = _apply_template(tok, fmt, plain, generation=not ends_with_answer)
    trained = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
    if turns != "all":  # earlier answers are part of the prompt
        trained = [i for i in trained if i == last]
    spans = list[Span]()
    stripped = 0
    for i in trained:
        content = plain[i]["content"]
        # Rendered as generation will render it, and not searched for in the text: the words of an answer may
        # stand in a question too.
        prompt = _apply_template(tok, fmt, plain[:i], generation=True)
        span = _find_answer(text, prompt, content)
        if span is None:
            raise ValueError(_misplaced_answer(fmt, len(spans) + 1, text, prompt))
        spans.append(span)
        # Only white space can be missing here, all else was refused above.
        stripped += not text[slice(*span)].endswith(content)

    # Only where the template closes the turn with nothing but white space; what it writes there otherwise
    # stays.
    if fmt.end and trained and trained[-1] == last:
        stop = spans[-1][1]
        if not text[stop:].strip():
            text = text[:stop] + fmt.end
    _check_rendered_tags(fmt, plain, text)
    return Rendered(text=text, answers=tuple(spans), stripped=stripped)


def answer_tail(tok: Any, fmt: ConversationFormat, prompt: Sequence[Message]) -> str:
    """The text that the template puts behind an answer to this prompt; `fmt.end` where it puts nothing there.

    Raises:
        ValueError: the template drops the answer.
    """
    mark = "the answer"
    messages = [*_plain_messages(prompt), {"role": "assistant", "content": mark}]
    # The last one: the mark may stand in a question or a system turn as well.
    before, _, tail = _apply_template(tok, fmt, messages, generation=False).rpartition(mark)
    if not before:
        raise ValueError(f"encode: {fmt.description} drops the answer {mark!r}")
    if tail.strip():
        return tail
    return fmt.end


def rewrites_history(
    tok: Any, messages: Sequence[Message], fmt: ConversationFormat = ConversationFormat()
) -> bool:
    """Whether the template writes an earlier answer in another way than behind its own prompt.

    Templates of reasoning models do: a prompt opens or skips the reasoning, and of earlier answers the
    reasoning is left out. Such a conversation is trained as one sample per answer, by
    `encode_conversation(tok, messages[:i], turns="last")`, whose ids are those that generation sees.
    """
    last_role = "assistant"
    if messages:
        last_role = messages[-1]["role"]
    check_order(messages, last_role, "encode")
    plain = _plain_messages(messages)
    earlier = [i for i, message in enumerate(plain[:-1]) if message["role"] == "assistant"]
    if not earlier:
        return False
    text = _apply_template(tok, fmt, plain, generation=last_role == "user")
    # All prompts are rendered before any is compared: a template that refuses one of them is an error.
    prompts = [_apply_template(tok, fmt, plain[:i], generation=True) for i in earlier]
    for i, prompt in zip(earlier, prompts, strict=True):
        if _find_answer(text, prompt, plain[i]["content"]) is None:
            return True
    return False


def writes_date(
    tok: Any, messages: Sequence[Message], fmt: ConversationFormat = ConversationFormat()
) -> bool:
    """Whether the template writes today's date into a conversation (Llama 3.2's does): its ids change every
    day.
    """
    mark = "the date of today"
    # A macro of this name hides the function of transformers that returns the date.
    macro = f"{{% macro strftime_now(form) %}}{mark}{{% endmacro %}}"
    dated = evolve(fmt, template=macro + _jinja_template(tok, fmt.template))
    return mark in _apply_template(tok, dated, _plain_messages(messages), generation=False)


def template_text(tok: Any, fmt: ConversationFormat = ConversationFormat()) -> str:
    """The Jinja chat template that conversations are encoded with; it falls back to the values of
    `fmt.options`.

    Raises:
        ValueError: there is no template, or an option is not a JSON value.
    """
    jinja = _jinja_template(tok, fmt.template)
    defaults = ""
    for name, value in fmt.options.items():
        # Only where it is not defined, so that callers of apply_chat_template can still choose another value.
        defaults += (
            f"{{% if {name} is not defined %}}{{% set {name} = {_jinja_literal(value)} %}}{{% endif %}}"
        )
    return defaults + jinja


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    # No other keys: templates look for some, such as reasoning_content and tool_calls, and would write them.
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _apply_template(
    tok: Any, fmt: ConversationFormat, messages: list[dict[str, str]], *, generation: bool
) -> str:
    """The text of messages, with the header of an answer behind it if `generation`."""
    import jinja2  # comes with torch

    template = _jinja_template(tok, fmt.template)
    # What expressions of a template raise, beside Jinja's own errors.
    expression_errors = (
        TypeError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
        MemoryError,
    )
    try:
        return tok.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation, **fmt.options
        )
    except (jinja2.TemplateError, *expression_errors) as e:
        reason = str(e) or type(e).__name__
        raise ValueError(f"encode: {fmt.description} does not take these messages: {reason}") from e


def _jinja_template(tok: Any, template: str | None) -> str:
    """The Jinja text of a template by name, of a given one, or of the tokenizer's own."""
    default = getattr(tok, "chat_template", None)
    if isinstance(default, dict):
        # Command R and Hermes have several templates by name; all but this one are for calls of tools.
        default = default.get("default")
    jinja = TEMPLATES.get(template or "", template or default)
    if not isinstance(jinja, str | None):
        raise ValueError(
            f"encode: the tokenizer's chat template must be text, got {short(jinja)}; name another "
            "(chat.template)"
        )
    # Without a brace it is a misspelt name: Jinja would take it for a template that always writes these
    # letters.
    if not jinja or (template and "{" not in jinja):
        problem = "the tokenizer has none"
        if template:
            problem = f"got {template!r}"
        raise ValueError(
            f"encode: needs a chat template, {problem}; give one of {', '.join(TEMPLATES)} or a Jinja "
            "template"
        )
    return jinja


def _jinja_literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_jinja_literal, value)) + "]"
    if isinstance(value, dict):
        items = [f"{_jinja_literal(str(key))}: {_jinja_literal(item)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if not isinstance(value, str | bool | int | float):
        raise ValueError(f"encode: options of a template must be values of JSON, got {value!r}")
    # json.dumps writes characters outside ASCII as \\u escapes, which Jinja reads too, and true and false as
    # Jinja does
    return json.dumps(value)


def _find_answer(text: str, prompt: str, content: str) -> Span | None:
    """Where in a rendered conversation the answer `content` stands behind its prompt; None where it does not.

    White space at the ends of an answer may be dropped. White space before it that is not in the prompt
    belongs to the answer: the model has to write it (GLM-4.5's answers begin with a line break).
    """
    if not text.startswith(prompt):
        return None
    start = len(prompt)
    stripped = content.strip()
    # Unchanged first: the stripped text is the beginning of one with a space behind it, which would be lost.
    for answer in (content, stripped):
        if text.startswith(answer, start):
            return start, start + len(answer)
    behind = text[start:]
    first = start + len(behind) - len(behind.lstrip())
    if text.startswith(stripped, first):
        return start, first + len(stripped)
    return None


def _misplaced_answer(fmt: ConversationFormat, number: int, text: str, prompt: str) -> str:
    """The error of a template that does not put answer `number` behind its prompt; quotes where the two
    differ.
    """
    differs = len(prompt)
    for i, (a, b) in enumerate(zip(text, prompt, strict=False)):
        if a != b:
            differs = i
            break
    # A little of what is still alike, to find the place in the template by.
    near = slice(max(differs - 20, 0), differs + 40)
    return (
        f"encode: {fmt.description} must put answer {number} unchanged after the generation prompt, but "
        f"where the prompt has {prompt[near]!r} the conversation has {text[near]!r}; set chat.template to "
        'another ("chatml", or Jinja text), or chat.options to what the template takes ({enable_thinking = '
        'false} for a thinking model), or put answers as they are after the prompt (chat.answers = "raw")'
    )


def _check_rendered_tags(fmt: ConversationFormat, messages: list[dict[str, str]], text: str) -> None:
    """Raise where the template drops or changes tags of images."""
    if fmt.placeholder is None:
        return
    tag = fmt.placeholder.tag
    count = sum(message["content"].count(tag) for message in messages)
    if text.count(tag) != count:
        raise ValueError(
            f"encode: {fmt.description} must keep the {count} tags {tag!r} as they are, its text is "
            f"{short(text)}"
        )
