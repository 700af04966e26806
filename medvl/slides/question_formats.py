"""Published formats of questions about whole slides: each record of a file becomes a `SlideConversation`."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from attrs import evolve, field, frozen

from medvl.base import files
from medvl.base.text import short
from medvl.evaluation import choice_answers, choices
from medvl.language.messages import check_keys, check_order, check_other_tags

TAG = "<image>"
KINDS = ("captions", "questions", "benchmark", "conversations", "slidebench", "wsi_vqa")
_ROLES = {"human": "user", "gpt": "assistant"}
_COLUMNS = {  # of a CSV, by which its kind is detected
    "captions": ("slide_id", "caption"),
    "slidebench": ("ID", "Slide", "Question", "A", "B", "Answer"),
}
_KEYS = {  # of the first record of a JSON list, likewise
    "questions": ("slide_id", "question", "answer"),
    "conversations": ("conversations",),
    "wsi_vqa": ("Id", "Question", "Answer"),
}
_NOT_READ = {  # besides the keys that no conversation may have
    # Both would change what is trained, or how many slides the model sees, without a word.
    "images": 'slides are read from "image" (a name or a list of names), "slide_id" and "features_path"',
    **dict.fromkeys(("system", "history"), "every turn must be one of the conversation"),
}
_SUFFIX = re.compile(r"\.(csv|pt|pth|npy|npz|h5|hdf5|svs|tiff?|ndpi|mrxs)$", re.IGNORECASE)
_OPTION = re.compile(
    r"\s*\(?([A-Z])[).:]\s*(.*?)\s*", re.DOTALL
)  # "A) text", "(A) text", "A. text", "A: text"


@frozen(kw_only=True)
class SlideConversation:
    """A conversation about slides, or one question and its reference answer."""

    # The first message of the user starts with one "<image>\n" per slide; the last message is the answer.
    messages: tuple[dict[str, str], ...]
    slides: tuple[str, ...]  # features file or slide id, as written
    id: str = ""
    names: tuple[str, ...] = ()  # slide ids: without folder and suffix
    category: tuple[str, ...] = ()  # from broad to narrow
    task: str = ""  # tumour or task, where the file names one
    choices: dict[str, str] = field(
        factory=dict
    )  # options of the last question by letter; {}: an open question
    answer: str = ""  # letter where there are choices and it is clear, else the text of the answer
    row: int = 0  # record of the file, from 1
    extra: dict[str, Any] = field(factory=dict)  # other fields of the record
    file: str = ""

    @property
    def place(self) -> str:
        """File and row, for error messages."""
        return f"{self.file}, row {self.row}" if self.file else "this conversation"

    @property
    def items(self) -> tuple[str, ...]:
        """What the tags of the messages stand for, as `chat.Dialogue`."""
        return self.slides

    def until(self, stop: int) -> "SlideConversation":
        """The first `stop` messages, with the slides of that part."""
        messages = self.messages[:stop]
        # One tag stands for one slide, and all tags are in the first message of the user.
        tags = sum(message["content"].count(TAG) for message in messages)
        return evolve(self, messages=messages, slides=self.slides[:tags])


Parse = Callable[[Any, int, str], SlideConversation]  # (record, row from 1, origin for error messages)


# Files --------------------------------------------------------------------------------------------------
def open_records(
    path: Path, kind: str, describe: str, file: BinaryIO | None = None
) -> tuple[list[Any], Parse]:
    """(records of a file as read, the function that parses one of them).

    Args:
        kind: one of KINDS, or "auto" to detect it from the content.
        describe: the question of records of the kind "captions".
        file: that is open already.
    Raises:
        ValueError: no such file, an empty or unreadable one, none of the formats, or another than `kind`.
    """
    if kind not in ("auto", *KINDS):
        raise ValueError(f"{path}: kind must be auto or one of {', '.join(KINDS)}, got {kind!r}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    files.check_regular(path)
    records: Any
    with open(path, "rb") if file is None else nullcontext(file) as opened:
        is_table = _is_table(path, opened)
        records = files.read_csv(path, file=opened) if is_table else _read_json(path, opened)
    if isinstance(records, dict):
        records, kinds = records.get("samples"), ["benchmark"]
    else:
        kinds = _matching_kinds(records, _COLUMNS if is_table else _KEYS)
    if kind != "auto" and kind not in kinds:
        required = ", ".join((*_COLUMNS.get(kind, ()), *_KEYS.get(kind, ()))) or "samples"
        raise ValueError(
            f"{path}: a file of the kind {kind!r} must have {required}, got {short(kinds or records)}"
        )
    if not kinds or not isinstance(records, list) or not records:
        raise ValueError(
            f"{path}: none of the formats that are read ({', '.join(KINDS)}), got {short(records)}"
        )
    parsers: dict[str, Parse] = {
        "captions": partial(_parse_caption, describe),
        "questions": _parse_sample,
        "benchmark": _parse_sample,
        "conversations": _parse_conversation,
        "slidebench": _parse_slidebench,
        "wsi_vqa": _parse_wsi_vqa,
    }
    if kind == "auto":
        kind = kinds[0]
    parse = parsers[kind]

    def parse_checked(record: Any, row: int, origin: str) -> SlideConversation:
        if isinstance(record, dict):
            check_keys(record, origin, _NOT_READ)
        conversation = parse(record, row, origin)
        check_other_tags(conversation.messages, TAG, origin)
        return conversation

    return records, parse_checked


def _is_table(path: Path, file: BinaryIO) -> bool:
    """Whether a file is a CSV: JSON starts with a bracket or a brace."""
    first = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    if not first:
        raise ValueError(f"{path}: is empty; was it fetched whole?")
    return first not in (b"[", b"{")


def _read_json(path: Path, file: BinaryIO) -> Any:
    try:
        return json.loads(file.read().decode("utf-8-sig"))
    except ValueError as error:  # of the decoder and of the parser
        raise ValueError(
            f"{path}: neither JSON nor a CSV in UTF-8 ({error}); "
            "JSON must be one list, or one object with samples"
        ) from error


def _matching_kinds(records: Any, keys_by_kind: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The kinds whose keys the first record has."""
    if not isinstance(records, list) or not records:
        return []
    first = records[0]
    if not isinstance(first, dict):
        return []
    return [kind for kind, keys in keys_by_kind.items() if first.keys() >= {*keys}]


# Records with fields for question and answer ------------------------------------------------------------
def _parse_caption(describe: str, record: Any, row: int, origin: str) -> SlideConversation:
    # A caption is the answer to one and the same question about every slide.
    record = {**record, "question": describe, "answer": record["caption"]}
    texts = _texts(record, ("slide_id", "question", "answer"), origin)
    return _single_question(
        texts["slide_id"],
        texts["question"],
        {},
        texts["answer"],
        row=row,
        origin=origin,
        **_common_fields(record, ("caption",)),
    )


def _parse_sample(record: Any, row: int, origin: str) -> SlideConversation:
    texts = _texts(record, ("slide_id", "question", "answer"), origin)
    options = _sample_options(record, origin)
    category = record.get("category") or ()
    if not isinstance(category, list | tuple):
        category = (category,)
    return _single_question(
        texts["slide_id"],
        texts["question"],
        options,
        texts["answer"],
        row=row,
        origin=origin,
        category=tuple(map(str, category)),
        **_common_fields(record, ("choices", "category")),
    )


def _sample_options(record: Mapping[str, Any], origin: str) -> dict[str, str]:
    """{letter: text} of "choices". Unless all texts have a letter of their own, they become A, B, ..."""
    written = record.get("choices") or []
    if isinstance(written, dict):
        written = [f"{letter}) {option}" for letter, option in written.items()]
    if not isinstance(written, list) or not all(isinstance(option, str) for option in written):
        raise ValueError(f'{origin}: "choices" must be a list of texts, got {short(written)}')
    for key in ("options", "Choice", "Choices", "Options"):
        if record.get(key):
            raise ValueError(
                f'{origin}: options must be called "choices", found {key!r}; '
                "the question would be an open one without them"
            )
    options = {}
    for option in written:
        match = _OPTION.fullmatch(option)
        if match:
            options[match[1]] = match[2]
    # "T. rubrum" looks like an option T: only where every text has a letter of its own are these letters.
    if len(options) != len(written):
        return _letter_options([option.strip() for option in written])
    return options


def _parse_slidebench(record: Any, row: int, origin: str) -> SlideConversation:
    options = {}
    for key, text in record.items():
        # A table has as many columns as its longest question has options; the others have empty cells.
        if re.fullmatch("[A-Z]", key) and text.strip():
            options[key] = text.strip()
    levels = [key for key in ("Broad Category", "Narrow Category", "Task") if key in record]
    task = record.get("Task", record.get("Tumor", ""))
    used = {"ID", "Slide", "Question", "Answer", "Tumor", *levels}
    used |= {key for key in record if len(key) == 1}  # the options
    return _single_question(
        record["Slide"].strip(),
        record["Question"],
        options,
        record["Answer"],
        row=row,
        origin=origin,
        id=record["ID"].strip(),
        category=tuple(record[key].strip() for key in levels),
        task=task.strip(),
        extra=_without_keys(record, used),
    )


def _parse_wsi_vqa(record: Any, row: int, origin: str) -> SlideConversation:
    texts = _texts(record, ("Id", "Question", "Answer"), origin)
    written = record.get("Choice") or []
    if not isinstance(written, list):
        raise ValueError(f'{origin}: "Choice" must be a list of options, got {short(written)}')
    options = _letter_options([str(option).strip() for option in written])
    # The answer is the text of an option; it becomes a letter where exactly one option has this text.
    text = choices.comparable_text(texts["Answer"])
    letters = [letter for letter, option in options.items() if choices.comparable_text(option) == text]
    answer = texts["Answer"]
    if len(letters) == 1:
        answer = letters[0]
    extra = _without_keys(record, ("Id", "Question", "Answer", "Choice"))
    return _single_question(
        texts["Id"], texts["Question"], options, answer, row=row, origin=origin, extra=extra
    )


def _single_question(
    slide: str,
    question: str,
    options: Mapping[str, str],
    answer: str,
    *,
    origin: str,
    path: str = "",
    **fields: Any,
) -> SlideConversation:
    """A conversation of one question about one slide.

    Args:
        path: of the features; "" where the slide's name stands for them.
        fields: other fields of the conversation.
    """
    question, answer = question.strip(), answer.strip()
    if TAG in question or TAG in answer:
        raise ValueError(
            f"{origin}: question and answer must not hold {TAG}, got {short(question + ' ' + answer)}"
        )
    path = path or slide
    slides: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    if path:  # a record without a slide is a fault, which the reader of the file reports
        slides = (path,)
        names = (_slide_id(slide or path),)
    prompt = question
    if options:
        prompt = choices.format_question(question, options)
    # The answer is trained as "B. text", whichever of the two the file has.
    letter = find_letter(answer, options)
    reply = answer
    if letter:
        reply = f"{letter}. {options[letter]}"
    messages = (
        {"role": "user", "content": f"{TAG}\n" * len(slides) + prompt},
        {"role": "assistant", "content": reply},
    )
    return SlideConversation(
        slides=slides,
        names=names,
        messages=messages,
        choices=dict(options),
        answer=letter or answer,
        **fields,
    )


def find_letter(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the option that an answer is or chooses; "" where there is none."""
    if answer in options:
        return answer
    if not options:
        return ""
    return choice_answers.extract_letter(answer, options)


def _letter_options(texts: list[str]) -> dict[str, str]:
    return {chr(ord("A") + i): text for i, text in enumerate(texts)}


def _texts(record: Any, keys: tuple[str, ...], origin: str) -> dict[str, str]:
    """The values of keys that must be there, as texts."""
    texts = {}
    for key in keys:
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, str | int | float):  # slide ids and answers may be plain numbers
            raise ValueError(
                f"{origin}: must be an object with the texts {', '.join(keys)}, got {short(record)}"
            )
        texts[key] = str(value).strip()
    return texts


def _common_fields(record: Mapping[str, Any], used: tuple[str, ...]) -> dict[str, Any]:
    """The optional fields of captions, questions and benchmarks; `used` are keys that the caller has read."""
    used = ("slide_id", "question", "answer", "features_path", "id", *used)
    return {
        "id": str(record.get("id", "")),
        "path": str(record.get("features_path") or "").strip(),
        "extra": _without_keys(record, used),
    }


def _without_keys(record: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


def _slide_id(slide: str) -> str:
    return _SUFFIX.sub("", PurePosixPath(slide.replace("\\", "/")).name)


# Records with several turns -----------------------------------------------------------------------------
def _parse_conversation(record: Any, row: int, origin: str) -> SlideConversation:
    entries = _turns(record, origin)
    slides = _slide_paths(record, origin)
    messages = []
    for entry in entries:
        check_keys(entry, origin, _NOT_READ)
        sender = str(entry["from"])
        messages.append({"role": _ROLES.get(sender, sender), "content": entry["value"]})
    check_order(messages, "assistant", origin)
    for message in messages:
        message["content"] = _without_tags(message, origin)
    # Only the last answer is scored; the turns before it are part of what is asked.
    options, answer = inline_choice(messages[-2]["content"], messages[-1]["content"])
    # The slides come first, wherever the tag stood.
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = f"{TAG}\n" * len(slides) + first["content"]
    return SlideConversation(
        id=str(record.get("id", "")),
        slides=slides,
        names=tuple(map(_slide_id, slides)),
        messages=tuple(messages),
        choices=options,
        answer=answer,
        row=row,
        extra=_without_keys(record, ("id", "image", "conversations")),
    )


def inline_choice(question: str, answer: str) -> tuple[dict[str, str], str]:
    """(the options in the text of a question, the letter of its answer or the answer's text)."""
    options = choices.split_options(question)[1]
    return options, find_letter(answer, options) or answer


def _turns(record: Any, origin: str) -> list[dict[str, Any]]:
    turns: Any = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        raise ValueError(
            f'{origin}: must have "conversations": [{{"from": who, "value": text}}, ...], got {short(record)}'
        )
    return turns


def _is_turn(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() >= {"from", "value"}


def _slide_paths(record: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    images = record.get("image") or []
    paths = tuple(images) if isinstance(images, list) else (images,)
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f'{origin}: "image" must be a name or a list of names, got {short(images)}')
    return paths


def _without_tags(message: Mapping[str, str], origin: str) -> str:
    content = message["content"]
    if TAG in content:
        if message["role"] != "user":
            raise ValueError(
                f"{origin}: only the user's texts may hold {TAG}, found it in one of the {message['role']}"
            )
        content = re.sub(rf"\s*{TAG}\s*", "\n", content)  # what stood before and after it stays apart
    return content.strip()
