"""Files of pictures that are asked for: a text, often with an image, and the picture that should come out.

The picture is a file, or the codes of a VQ model as text, "<start_index><idx_5>...<end_index>".
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from attrs import evolve, field, frozen

from medvl.base import files
from medvl.base.text import short
from medvl.language.conversations import Conversation, parse_conversation, read_records

_CONVERSATIONS = {"messages", "conversations", "conversatons", "query", "instruction"}  # a key of each shape
_CODES = re.compile(r"<start_index>((?:<idx_\d+>)*)<end_index>", re.ASCII)


@frozen(kw_only=True)
class Drawing:
    """One line of a file."""

    question: Conversation  # one turn of the user, with its image or none
    target: Path | None = None  # the picture that should come out, or
    codes: tuple[int, ...] = field(default=(), repr=False)  # its codes, row by row


def read_drawings(
    path: files.PathLike, *, number: int = 1024, codebook: int = 8192, root: files.PathLike | None = None
) -> list[Drawing]:
    """Drawings from JSON lines or one JSON array, checked to the last.

    The shapes of a record: {"text": text, "image": file name or nothing, "target": file name or codes as
    text}, or a conversation of `read_conversations` whose one answer is codes as text or a file name
    (VL-Health's form). Other keys are kept in `question.extra`.

    Args:
        number: codes of a picture.
        codebook: codes that there are.
        root: as `read_conversations`.
    Raises:
        ValueError: with file and line, as `read_conversations`; more than one turn, a target that is not
            there, another number of codes, a code outside of the codebook.
    """
    path = Path(path)
    folder = path.parent if root is None else Path(root)
    drawings = list[Drawing]()
    for where, question, target in _read_lines(path, folder):
        if target.startswith("<"):
            codes = _parse_codes(target, where, number=number, codebook=codebook)
            drawings.append(Drawing(question=question, codes=codes))
        elif os.path.isfile(folder / target):
            drawings.append(Drawing(question=question, target=folder / target))
        else:
            raise ValueError(
                f"{where}: the target must be codes or a file that is there (relative names start from {folder}), "
                f"got {short(target)}"
            )
    return drawings


def read_texts(path: files.PathLike) -> list[Conversation]:
    """What pictures are to be drawn of: lines as those of `read_drawings`, whose target may be missing.

    Raises:
        ValueError: as `read_drawings`.
    """
    path = Path(path)
    return [question for _, question, _ in _read_lines(path, path.parent, target="to be drawn")]


def _read_lines(
    path: Path, folder: Path, target: str | None = None
) -> Iterator[tuple[str, Conversation, str]]:
    """(place for errors, question, target as written) of every line; `target` is that of lines without one."""
    line = 0
    for line, where, record in read_records(path):
        if isinstance(record, dict) and ("target" in record or not _CONVERSATIONS & record.keys()):
            record = _as_query(record if target is None else {"target": target} | record, where)
        conversation = parse_conversation(record, where, line, "<image>", folder, str(path))
        *asked, answer = conversation.messages
        if [message["role"] for message in asked if message["role"] != "system"] != ["user"]:
            raise ValueError(f"{where}: must have one question and the picture as its answer, got more turns")
        yield where, evolve(conversation, messages=tuple(asked)), answer["content"].strip()
    if not line:
        raise ValueError(f"{path}: holds no drawing")


def _parse_codes(text: str, where: str, *, number: int, codebook: int) -> tuple[int, ...]:
    """The codes of a text that holds nothing else."""
    whole = _CODES.fullmatch(text)
    if not whole:
        raise ValueError(
            f"{where}: codes must be <start_index>, {number} times <idx_K>, <end_index>, got {short(text)}"
        )
    codes = tuple(int(code) for code in re.findall(r"\d+", whole[1]))
    if len(codes) != number or max(codes) >= codebook:
        raise ValueError(
            f"{where}: a picture must have {number} codes of 0 to {codebook - 1}, got {len(codes)} codes up to "
            f"{max(codes, default='none')}; were they made by another VQ model?"
        )
    return codes


def _as_query(record: dict, where: str) -> dict:
    """A record of "text" and "target" as one of "query" and "response"."""
    text, target = texts = [record.pop(key, None) for key in ("text", "target")]
    if not all(isinstance(value, str) and value.strip() for value in texts):
        raise ValueError(f'{where}: "text" and "target" must be texts, got {short(text)} and {short(target)}')
    if record.get("image") and "<image>" not in text:
        text = f"<image>\n{text}"
    return record | {"query": text, "response": target}
