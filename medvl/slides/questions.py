"""Questions about whole slides: read files of the published formats, list the faults of their records."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from attrs import evolve, frozen

from medvl.base import files
from medvl.base.text import short
from medvl.evaluation import choices
from medvl.slides.question_formats import TAG, SlideConversation, inline_choice, open_records

_log = logging.getLogger(__name__)
DESCRIBE = "Write a report of this whole-slide image."
_PUBLISHED = {  # (first, last digits of the sha256) of published files
    ("70f6a918", "5cbd"): "SlideInstruct stage 1, captions, revision 975a7356",
    ("8dcd8a9b", "f8e5"): "SlideInstruct stage 2, questions, revision 975a7356",
    ("668d063d", "020b"): "SlideBench-VQA-TCGA, 1,494 questions, revision 975a7356",
    ("10b83c61", "9e0b"): "SlideBench-VQA-BCNB, revision 975a7356",
}


@frozen(kw_only=True)
class Fault:
    """A fault of a record."""

    row: int  # from 1
    text: str  # with the details behind a colon: `_summarise` counts what stands before it
    record: Any  # as read from the file


def read_slide_conversations(
    path: files.PathLike,
    kind: str = "auto",
    *,
    describe: str = DESCRIBE,
    faults: Literal["warn", "drop", "raise"] = "warn",
    file: BinaryIO | None = None,
) -> list[SlideConversation]:
    """The records of a file as conversations, in their order.

    Kinds, detected from the content unless given:
    - "captions": CSV slide_id, caption and optionally features_path. The question is `describe`.
    - "questions": JSON list of {slide_id, question, answer}, optionally with features_path and choices.
    - "benchmark": JSON {"samples": [{slide_id, question, choices: ["A) ...", ...], answer: "A", category,
      features_path}, ...]}.
    - "conversations": JSON list of {id, image: name or names, conversations: [{from, value}, ...]} of
      SlideChat and WSI-Bench, with all turns. Options stand in the text ("A. x B. y" or "A) x B) y") and
      stay there.
    - "slidebench": CSV ID, Slide, Question, A, B, ..., Answer with Tumor, Broad Category and Narrow Category
      (TCGA) or Task (BCNB). "None" and "NA" are options, an empty cell is none.
    - "wsi_vqa": JSON list of {Id, Question, Answer, Choice if closed}; the answer is the text of an option.

    Where the options have fields of their own, the user's text is "<image>\\nQuestion\\nA. x\\nB. y" and the
    answer's "B. y".

    Args:
        faults: what to do with records whose content is faulty (`audit_slide_conversations`): "warn" keeps
            them, "drop" leaves them out, both say how many; "raise" raises.
        file: that is open already.
    Raises:
        ValueError: with file and row: no such file, no known format, a record of another shape, roles out of
            order, keys and tags that are not supported and would change what is trained
            (`language.encoding.check_keys`).
    """
    if faults not in ("warn", "drop", "raise"):
        raise ValueError(
            f'read_slide_conversations: faults must be "warn", "drop" or "raise", got {faults!r}'
        )
    path = Path(path)
    records, parse = open_records(path, kind, describe, file)
    ids = Counter[str]()
    conversations: list[SlideConversation] = []
    all_faults: list[Fault] = []
    for row, record in enumerate(records, 1):
        conversation = evolve(parse(record, row, f"{path}, row {row}"), file=str(path))
        ids[conversation.id] += 1
        texts = _find_faults(conversation, record, repeated=ids[conversation.id] > 1)
        all_faults += [Fault(row=row, text=text, record=record) for text in texts]
        if not (texts and faults == "drop"):
            conversations.append(conversation)
    if all_faults:
        summary = f"{path}: {_summarise(all_faults)}"
        if faults == "raise":
            raise ValueError(f"{summary}; correct them or leave them out")
        _log.warning("%s; %s", summary, "they are left out" if faults == "drop" else "they are kept")
    if not conversations:
        which = " without a fault" if all_faults else ""
        raise ValueError(f"{path}: holds no record{which}")
    return conversations


def audit_slide_conversations(
    path: files.PathLike, kind: str = "auto"
) -> tuple[list[SlideConversation], list[Fault]]:
    """(the records that can be read, the faults of all records), both in the order of the file.

    Faults are: an empty question or answer, no slide, an id that an earlier record has, a missing option
    letter, an option without text, two options with one text, an answer that is not among the options or
    does not say which it is, another number of tags than of slides; and what `read_slide_conversations`
    raises for a record.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    records, parse = open_records(Path(path), kind, DESCRIBE)
    ids = Counter[str]()
    conversations: list[SlideConversation] = []
    faults: list[Fault] = []
    for row, record in enumerate(records, 1):
        try:
            # A fault has its row in a field of its own: the origin in messages is only this word.
            conversation = parse(record, row, "record")
        except ValueError as error:
            faults.append(Fault(row=row, text=str(error).removeprefix("record: "), record=record))
            continue
        ids[conversation.id] += 1
        texts = _find_faults(conversation, record, repeated=ids[conversation.id] > 1)
        faults += [Fault(row=row, text=text, record=record) for text in texts]
        conversations.append(conversation)
    return conversations, faults


def published_as(digest: str) -> str:
    """The published file with this sha256, "" if none. Compared by the first 8 and the last 4 digits."""
    return _PUBLISHED.get((digest[:8], digest[-4:]), "")


def _summarise(faults: Sequence[Fault]) -> str:
    # Without the details, so that faults of one kind are counted together.
    kinds = Counter(re.sub(r": .*", "", fault.text) for fault in faults)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    rows = sorted({fault.row for fault in faults})
    examples = ", ".join(map(str, rows[:5]))
    return f"{len(rows)} records are faulty ({counts}), such as row {examples}"


def _find_faults(conversation: SlideConversation, record: Any, repeated: bool) -> list[str]:
    """Faults in the content of a record; `repeated`: an earlier record has the same id."""
    faults = []
    if not conversation.slides or not all(slide.strip() for slide in conversation.slides):
        faults.append("no slide")
    if conversation.id and repeated:
        faults.append(f"an id that is there before: {conversation.id}")
    turns = []
    for message in conversation.messages:
        if message["role"] != "system":
            turns.append(message["content"].replace(TAG, "").strip())
    # The order was checked when the record was parsed: user and assistant take turns, the answer is last.
    questions, answers = turns[::2], turns[1::2]
    for question, answer in zip(questions, answers, strict=True):
        if not question:
            faults.append("an empty question")
        if not answer:
            faults.append("an empty answer")
    if "conversations" in record:
        # Counted as written, as the messages have one tag per slide whatever the file has. One tag may stand
        # for all slides.
        tags = sum(entry["value"].count(TAG) for entry in record["conversations"])
        if tags not in (1, len(conversation.slides)):
            faults.append(f"tags that are not as many as slides: {tags} and {len(conversation.slides)}")
        # The options of earlier turns stand in their text; those of the last turn are parsed already.
        for question, answer in zip(questions[:-1], answers[:-1], strict=True):
            faults += _option_faults(*inline_choice(question, answer))
    return [*faults, *_option_faults(conversation.choices, conversation.answer)]


def _option_faults(options: Mapping[str, str], answer: str) -> Iterator[str]:
    """Faults of the options of a question {letter: text}; none for an open question."""
    if not options:
        return
    last = max(options)
    absent = []
    for code in range(ord("A"), ord(last) + 1):
        if chr(code) not in options:
            absent.append(chr(code))
    texts, without_text = {}, []
    for letter, text in options.items():
        if text:
            texts[letter] = choices.comparable_text(text)
        else:
            without_text.append(letter)
    counts = Counter(texts.values())
    # Two options that mean the same: whichever is right, an answer by its text cannot be judged.
    same_text = [letter for letter, text in texts.items() if counts[text] > 1]
    if absent:
        yield f"an option letter that is missing: {', '.join(absent)}"
    if without_text:
        yield f"an option without text: {', '.join(without_text)}"
    if same_text:
        yield f"options with one text: {', '.join(same_text)}"
    if answer not in options:
        yield f"an answer that is not among the options, or says none of them clearly: {short(answer)}"
    if len(options) < 2:
        yield f"less than two options: {', '.join(options)}"
