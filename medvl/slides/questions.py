"""Questions about whole slides, in the formats they are published in, as one kind of record; what is wrong in a file is named."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from attrs import evolve, field, frozen

from medvl.base import files
from medvl.evaluation import choices
from medvl.language.encoding import check_keys, check_order, check_other_tags, short

_log = logging.getLogger(__name__)
TAG = "<image>"
DESCRIBE = "Write a report of this whole-slide image."
KINDS = ("captions", "questions", "benchmark", "conversations", "slidebench", "wsi_vqa")
_ROLES = {"human": "user", "gpt": "assistant"}
_COLUMNS = {
    "captions": ("slide_id", "caption"),
    "slidebench": ("ID", "Slide", "Question", "A", "B", "Answer"),
}
_KEYS = {
    "questions": ("slide_id", "question", "answer"),
    "conversations": ("conversations",),
    "wsi_vqa": ("Id", "Question", "Answer"),
}
_NOT_READ = {  # beside those of every conversation
    "images": 'slides are read from "image" (a name or a list of names), "slide_id" and "features_path"',
    **dict.fromkeys(("system", "history"), "every turn must be one of the conversation"),
}
_SUFFIX = re.compile(r"\.(csv|pt|pth|npy|npz|h5|hdf5|svs|tiff?|ndpi|mrxs)$", re.IGNORECASE)
_PUBLISHED = {  # the first and last digits of the sha256
    ("70f6a918", "5cbd"): "SlideInstruct stage 1, captions, revision 975a7356",
    ("8dcd8a9b", "f8e5"): "SlideInstruct stage 2, questions, revision 975a7356",
    ("668d063d", "020b"): "SlideBench-VQA-TCGA, 1,494 questions, revision 975a7356",
    ("10b83c61", "9e0b"): "SlideBench-VQA-BCNB, revision 975a7356",
}


@frozen(kw_only=True)
class SlideConversation:
    """A conversation about slides, or a question and its written answer."""

    messages: tuple[
        dict[str, str], ...
    ]  # the first of the user starts with one "<image>\n" per slide; the last is the answer
    slides: tuple[str, ...]  # features file or slide id, as written
    id: str = ""
    names: tuple[str, ...] = ()  # slide ids: without folder and suffix
    category: tuple[str, ...] = ()  # from broad to narrow
    task: str = ""  # tumour or task, where the file names one
    choices: dict[str, str] = field(factory=dict)  # options of the last question by letter; {} = an open one
    answer: str = ""  # letter where there are choices and it is clear, else the answer's text
    row: int = 0  # record of the file, from 1
    extra: dict[str, Any] = field(factory=dict)  # what is not read here
    file: str = ""

    @property
    def place(self) -> str:
        """Where it stands, as errors say it."""
        return f"{self.file}, row {self.row}" if self.file else "this conversation"


@frozen(kw_only=True)
class Fault:
    """What is wrong with a record."""

    row: int  # from 1
    what: str
    record: Any  # as read from the file


def read_slide_conversations(
    path: files.PathLike,
    kind: str = "auto",
    *,
    describe: str = DESCRIBE,
    faults: Literal["warn", "drop", "raise"] = "warn",
) -> list[SlideConversation]:
    """The records of a file as conversations, in their order.

    Kinds, told by content unless given:
    - "captions": CSV slide_id, caption, and features_path if wanted. The question is `describe`.
    - "questions": JSON list of {slide_id, question, answer}, features_path and choices if wanted.
    - "benchmark": JSON {"samples": [{slide_id, question, choices: ["A) ...", ...], answer: "A", category, features_path}, ...]}.
    - "conversations": JSON list of {id, image: name or names, conversations: [{from, value}, ...]} as SlideChat and WSI-Bench have them,
      with all turns. Options stand in the text ("A. x B. y" or "A) x B) y") and stay there.
    - "slidebench": CSV ID, Slide, Question, A, B, ..., Answer with Tumor, Broad Category and Narrow Category (TCGA) or Task (BCNB). "None"
      and "NA" are options, an empty cell is none.
    - "wsi_vqa": JSON list of {Id, Question, Answer, Choice if closed}; the answer is the text of an option.

    Where options have a place of their own, the user's text is "<image>\\nQuestion\\nA. x\\nB. y" and the answer's "B. y".

    Args:
        faults: what to do with the records that `check_slide_conversations` names for their content: "warn" keeps them and says how many, "drop"
            leaves them out and says how many, "raise" raises.
    Raises:
        ValueError: with file and row: no such file, no known format, a record of another shape, roles out of order, keys and tags that
            would change what is trained and are not read (`conversations.check_keys`).
    """
    if faults not in ("warn", "drop", "raise"):
        raise ValueError(
            f'read_slide_conversations: faults must be "warn", "drop" or "raise", got {faults!r}'
        )
    path, seen, talks, wrong = Path(path), Counter[str](), list[SlideConversation](), list[Fault]()
    for row, record, make in _records(path, kind, describe):
        talk = evolve(make(record, row, f"{path}, row {row}"), file=str(path))
        found = [Fault(row=row, what=what, record=record) for what in _faults(talk, record, seen)]
        wrong += found
        if not (found and faults == "drop"):
            talks.append(talk)
    if wrong:
        counts = ", ".join(
            f"{n} x {what}" for what, n in Counter(re.sub(r": .*", "", f.what) for f in wrong).most_common()
        )
        rows = sorted({f.row for f in wrong})
        said = (
            f"{path}: {len(rows)} records are faulty ({counts}), such as row {', '.join(map(str, rows[:5]))}"
        )
        if faults == "raise":
            raise ValueError(f"{said}; correct them or leave them out")
        _log.warning("%s; %s", said, "they are left out" if faults == "drop" else "they are kept")
    if not talks:
        raise ValueError(f"{path}: holds no record" + (" without a fault" if wrong else ""))
    return talks


def check_slide_conversations(path: files.PathLike, kind: str = "auto") -> list[Fault]:
    """What is wrong with each record, in their order; [] if all is well. Nothing is left out or corrected.

    Named are: an empty question or answer, no slide, an id that is there before, an option letter that is missing, an option without text,
    two options with one text, an answer that is not among the options or does not say which it is, a number of tags that is not that of
    the slides; and what `read_slide_conversations` would raise.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    return audit_slide_conversations(path, kind)[1]


def audit_slide_conversations(
    path: files.PathLike, kind: str = "auto"
) -> tuple[list[SlideConversation], list[Fault]]:
    """(the records that can be read, what is wrong with each record) as `read_slide_conversations` and `check_slide_conversations` say."""
    path, seen, talks, found = Path(path), Counter[str](), list[SlideConversation](), list[Fault]()
    for row, record, make in _records(path, kind, DESCRIBE):
        try:
            talk = make(record, row, "record")
            whats = _faults(talk, record, seen)
            talks.append(talk)
        except ValueError as e:
            whats = [str(e).removeprefix("record: ")]
        found += [Fault(row=row, what=what, record=record) for what in whats]
    return talks, found


def published_as(digest: str) -> str:
    """Which published file has this sha256, "" if none that is known. Told by its first 8 and last 4 digits."""
    return _PUBLISHED.get((digest[:8], digest[-4:]), "")


# Files ----------------------------------------------------------------------------------------------------------------------------------
_Make = Callable[[Any, int, str], SlideConversation]


def _records(path: Path, kind: str, describe: str) -> Iterator[tuple[int, Any, _Make]]:
    if kind not in ("auto", *KINDS):
        raise ValueError(f"{path}: kind must be auto or one of {', '.join(KINDS)}, got {kind!r}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    files.check_regular(path)
    with open(path, "rb") as f:
        head = f.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if not head:
        raise ValueError(f"{path}: is empty; was it fetched whole?")
    table = head not in (b"[", b"{")
    records: Any = files.read_csv(path) if table else _json(path)
    if isinstance(records, dict):
        records, found = records.get("samples"), ["benchmark"]
    else:
        first = records[0] if isinstance(records, list) and records else None
        known = _COLUMNS if table else _KEYS
        found = [k for k, keys in known.items() if isinstance(first, dict) and first.keys() >= {*keys}]
    if kind != "auto" and kind not in found:
        wanted = ", ".join((*_COLUMNS.get(kind, ()), *_KEYS.get(kind, ()))) or "samples"
        raise ValueError(
            f"{path}: a file of the kind {kind!r} must have {wanted}, got {short(found or records)}"
        )
    if not found or not isinstance(records, list) or not records:
        raise ValueError(
            f"{path}: none of the formats that are read ({', '.join(KINDS)}), got {short(records)}"
        )
    make = {
        "captions": lambda r, i, where: _simple(
            {**r, "question": describe, "answer": r["caption"]}, i, where, ("caption",)
        ),
        "questions": _sample,
        "benchmark": _sample,
        "conversations": _conversation,
        "slidebench": _slidebench,
        "wsi_vqa": _wsi_vqa,
    }[found[0] if kind == "auto" else kind]

    def checked(record: Any, row: int, where: str) -> SlideConversation:
        if isinstance(record, dict):
            check_keys(record, where, _NOT_READ)
        talk = make(record, row, where)
        check_other_tags(talk.messages, TAG, where)
        return talk

    yield from ((i, record, checked) for i, record in enumerate(records, 1))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as e:  # of both
        raise ValueError(
            f"{path}: neither JSON nor a CSV in UTF-8 ({e}); JSON must be one list, or one object with samples"
        ) from e


# Records --------------------------------------------------------------------------------------------------------------------------------
def _simple(record: Any, row: int, where: str, skip: tuple[str, ...] = ()) -> SlideConversation:
    text = _texts(record, ("slide_id", "question", "answer"), where)
    return _asked(
        text["slide_id"], text["question"], {}, text["answer"], row=row, where=where, **_rest(record, skip)
    )


def _sample(record: Any, row: int, where: str) -> SlideConversation:
    text = _texts(record, ("slide_id", "question", "answer"), where)
    given = record.get("choices") or []
    if isinstance(given, dict):
        given = [f"{letter}) {option}" for letter, option in given.items()]
    if not isinstance(given, list) or not all(isinstance(c, str) for c in given):
        raise ValueError(f'{where}: "choices" must be a list of texts, got {short(given)}')
    if wrong := [k for k in ("options", "Choice", "Choices", "Options") if record.get(k)]:
        raise ValueError(
            f'{where}: options must be called "choices", found {wrong[0]!r}; the question would be an open one without them'
        )
    marked = [re.fullmatch(r"\s*\(?([A-Z])[).:]\s*(.*?)\s*", c, re.DOTALL) for c in given]
    options = {m[1]: m[2] for m in marked if m}
    if len(options) != len(given):  # not all with a letter, or one twice
        options = {chr(ord("A") + i): c.strip() for i, c in enumerate(given)}
    rest = _rest(record, ("choices", "category"))
    category = record.get("category") or ()
    return _asked(
        text["slide_id"],
        text["question"],
        options,
        text["answer"],
        row=row,
        where=where,
        category=tuple(map(str, category)) if isinstance(category, list | tuple) else (str(category),),
        **rest,
    )


def _slidebench(record: Any, row: int, where: str) -> SlideConversation:
    options = {k: v.strip() for k, v in record.items() if re.fullmatch("[A-Z]", k) and v.strip()}
    levels = [k for k in ("Broad Category", "Narrow Category", "Task") if k in record]
    task = next((record[k] for k in ("Task", "Tumor") if k in record), "")
    read = {"ID", "Slide", "Question", "Answer", "Tumor", *levels, *(k for k in record if len(k) == 1)}
    return _asked(
        record["Slide"].strip(),
        record["Question"],
        options,
        record["Answer"],
        row=row,
        where=where,
        id=record["ID"].strip(),
        category=tuple(record[k].strip() for k in levels),
        task=task.strip(),
        extra={k: v for k, v in record.items() if k not in read},
    )


def _wsi_vqa(record: Any, row: int, where: str) -> SlideConversation:
    text = _texts(record, ("Id", "Question", "Answer"), where)
    given = record.get("Choice") or []
    if not isinstance(given, list):
        raise ValueError(f'{where}: "Choice" must be a list of options, got {short(given)}')
    options = {chr(ord("A") + i): str(c).strip() for i, c in enumerate(given)}
    same = [
        letter
        for letter, option in options.items()
        if choices.comparable_text(option) == choices.comparable_text(text["Answer"])
    ]
    answer = same[0] if len(same) == 1 else text["Answer"]
    extra = {k: v for k, v in record.items() if k not in ("Id", "Question", "Answer", "Choice")}
    return _asked(text["Id"], text["Question"], options, answer, row=row, where=where, extra=extra)


def _conversation(record: Any, row: int, where: str) -> SlideConversation:
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and t.keys() >= {"from", "value"} for t in turns
    ):
        raise ValueError(
            f'{where}: must have "conversations": [{{"from": who, "value": text}}, ...], got {short(record)}'
        )
    images = record.get("image") or []
    slides = (
        (images,) if isinstance(images, str) else tuple(images) if isinstance(images, list) else (images,)
    )
    if not all(isinstance(s, str) for s in slides):
        raise ValueError(f'{where}: "image" must be a name or a list of names, got {short(images)}')
    for turn in turns:
        check_keys(turn, where, _NOT_READ)
    messages = [{"role": _ROLES.get(str(t["from"]), str(t["from"])), "content": t["value"]} for t in turns]
    check_order(messages, "assistant", where)
    for m in messages:
        if m["role"] == "user":  # the slides come first, wherever the tag stood
            m["content"] = (
                re.sub(rf"\s*{TAG}\s*", "\n", m["content"]).strip()
                if TAG in m["content"]
                else m["content"].strip()
            )
        elif TAG in m["content"]:
            raise ValueError(
                f"{where}: only the user's texts may hold {TAG}, found it in one of the {m['role']}"
            )
        m["content"] = m["content"].strip()
    options, answer = _inline(messages[-2]["content"], messages[-1]["content"])
    first = next(m for m in messages if m["role"] == "user")
    first["content"] = f"{TAG}\n" * len(slides) + first["content"]
    extra = {k: v for k, v in record.items() if k not in ("id", "image", "conversations")}
    return SlideConversation(
        id=str(record.get("id", "")),
        slides=slides,
        names=tuple(map(_name, slides)),
        messages=tuple(messages),
        choices=options,
        answer=answer,
        row=row,
        extra=extra,
    )


def _inline(asked: str, said: str) -> tuple[dict[str, str], str]:
    """The options in a question, and the letter of its written answer or the answer's text."""
    options = choices.split_options(asked)[1]
    return options, _letter(said, options) or said


def _asked(
    slide: str, question: str, options: Mapping[str, str], answer: str, *, where: str, **rest: Any
) -> SlideConversation:
    """A record whose question, options and answer have places of their own."""
    question, answer = question.strip(), answer.strip()
    if TAG in question or TAG in answer:
        raise ValueError(
            f"{where}: question and answer must not hold {TAG}, got {short(question + ' ' + answer)}"
        )
    letter = _letter(answer, options)
    path = rest.pop("path", "") or slide
    slides = (path,) if path else ()
    messages = (
        {
            "role": "user",
            "content": f"{TAG}\n" * len(slides)
            + (choices.format_question(question, options) if options else question),
        },
        {"role": "assistant", "content": f"{letter}. {options[letter]}" if letter else answer},
    )
    names = (_name(slide or path),) if slides else ()
    return SlideConversation(
        slides=slides, names=names, messages=messages, choices=dict(options), answer=letter or answer, **rest
    )


def _letter(answer: str, options: Mapping[str, str]) -> str:
    return answer if answer in options else choices.extract_letter(answer, options) if options else ""


def _rest(record: Mapping[str, Any], skip: tuple[str, ...]) -> dict[str, Any]:
    """The optional fields of the simple formats."""
    read = {"slide_id", "question", "answer", "features_path", "id", *skip}
    extra = {k: v for k, v in record.items() if k not in read}
    return {
        "id": str(record.get("id", "")),
        "path": str(record.get("features_path") or "").strip(),
        "extra": extra,
    }


def _texts(record: Any, keys: tuple[str, ...], where: str) -> dict[str, str]:
    if not isinstance(record, dict) or not all(isinstance(record.get(k), str | int | float) for k in keys):
        raise ValueError(f"{where}: must be an object with the texts {', '.join(keys)}, got {short(record)}")
    return {k: str(record[k]).strip() for k in keys}


def _name(slide: str) -> str:
    return _SUFFIX.sub("", PurePosixPath(slide.replace("\\", "/")).name)


# Faults ---------------------------------------------------------------------------------------------------------------------------------
def _faults(talk: SlideConversation, record: Any, seen: Counter[str]) -> list[str]:
    """What is wrong with the content of a record."""
    found = [] if talk.slides and all(s.strip() for s in talk.slides) else ["no slide"]
    if talk.id:
        seen[talk.id] += 1
        found += [f"an id that is there before: {talk.id}"] if seen[talk.id] > 1 else []
    turns = [m["content"].replace(TAG, "").strip() for m in talk.messages if m["role"] != "system"]
    for asked, said in zip(turns[::2], turns[1::2], strict=True):
        found += [f"an empty {what}" for what, text in (("question", asked), ("answer", said)) if not text]
    if "conversations" in record:
        pairs = [_inline(a, s) for a, s in zip(turns[:-2:2], turns[1:-2:2], strict=True)] + [
            (talk.choices, talk.answer)
        ]
        tags = sum(t["value"].count(TAG) for t in record["conversations"])
        found += (
            [f"tags that are not as many as slides: {tags} and {len(talk.slides)}"]
            if tags not in (1, len(talk.slides))
            else []
        )
    else:
        pairs = [(talk.choices, talk.answer)]
    return found + [what for options, answer in pairs if options for what in _option_faults(options, answer)]


def _option_faults(options: Mapping[str, str], answer: str) -> Iterator[str]:
    letters = [chr(i) for i in range(ord("A"), ord(max(options)) + 1)]
    plain = {k: choices.comparable_text(text) for k, text in options.items() if text}
    times = Counter(plain.values())
    for what, wrong in (
        ("an option letter that is missing", [k for k in letters if k not in options]),
        ("an option without text", [k for k, text in options.items() if not text]),
        ("options with one text", [k for k, text in plain.items() if times[text] > 1]),
        (
            "an answer that is not among the options, or says none of them clearly",
            [short(answer)] if answer not in options else [],
        ),
        ("less than two options", [*options] if len(options) < 2 else []),
    ):
        if wrong:
            yield f"{what}: {', '.join(wrong)}"
