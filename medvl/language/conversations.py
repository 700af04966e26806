"""Files of conversations with images: JSON lines and JSON arrays in the shapes that are common, as messages."""

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from medvl.base import files
from medvl.base.text import short
from medvl.evaluation.answers import has_words
from medvl.language.messages import check_keys, check_order, check_other_tags, check_tags, is_empty

_log = logging.getLogger(__name__)
_SHAPES = {  # what tells a shape: the keys that it must have
    "query": {"query", "response"},
    "instruction": {"instruction", "output"},
    "conversations": {"conversations"},
    "conversatons": {"conversatons"},  # as LLaVA-Med's evaluation files spell it
    "messages": {"messages"},
}
_ROLES = {"human": "user", "gpt": "assistant"}
_IMAGES = 'images are read from "images" (a list of file names) or "image" (one)'
_NAMES_OF_IMAGES = (
    "image_path",
    "image_paths",
    "image_file",
    "image_files",
    "image_url",
    "image_urls",
    "img",
    "img_path",
)


@frozen(kw_only=True)
class Conversation:
    """One line of a file."""

    messages: tuple[dict[str, str], ...]
    images: tuple[Path, ...] = ()  # in the order of the tags
    id: str = ""
    line: int = 0  # from 1
    extra: dict[str, Any] = field(factory=dict)  # keys that are not read here
    file: str = ""

    @property
    def place(self) -> str:
        """Where it stands, as errors say it."""
        if self.file:
            return f"{self.file}, line {self.line}"
        return f"conversation {self.id}" if self.id else "this conversation"

    @property
    def items(self) -> tuple[Path, ...]:
        """What the tags of the messages stand for, as `chat.Dialogue`."""
        return self.images

    def until(self, stop: int) -> "Conversation":
        """The first `stop` messages, with the images of that part."""
        messages = self.messages[:stop]
        tags = sum(message["content"].count("<image>") for message in messages)
        return evolve(self, messages=messages, images=self.images[:tags])


def read_conversations(
    path: files.PathLike, *, tag: str = "<image>", root: files.PathLike | None = None, max_images: int = 0
) -> list[Conversation]:
    """Conversations from JSON lines, or from one JSON array of them, checked to the last.

    The shapes of a conversation: {"query": text, "response": text}, {"instruction": text, "input": text or nothing, "output": text},
    {"conversations": [{"from": "user" or "human" ..., "value": text}, ...]} or {"messages": [{"role": "user" ..., "content": text}, ...]},
    where a content may be OpenAI's list of {"type": "text"} and {"type": "image_url"} or {"type": "image"}; with "images" (a list; or
    "image", one name), "system", "history" (a list of [question, answer]; beside "query" and "instruction"), and "id" or "episode_id" where
    wanted. What is empty or null is as if it were not there. The user's texts hold one `tag` per image; images are taken from left to
    right.

    Args:
        root: where relative image paths start, so "./../x" is beside it; the file's own folder when None.
        max_images: `limit_images` of every conversation, one warning says of how many; 0 = no limit. Dropped images must be there too.
    Raises:
        ValueError: with file and line: no UTF-8, no JSON, another shape, wrong roles or order, no turn of the assistant, contents that are
            no strings, tags that do not match the images, an image that is not there, keys and tags that would change what is trained and
            are not read (videos, boxes, worse answers); or the file is empty or absent.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    folder = path.parent if root is None else Path(root)
    found = [
        _conversation(record, where, line, tag, folder, str(path)) for line, where, record in _records(path)
    ]
    if not found:
        raise ValueError(f"{path}: holds no conversation")
    kept = [limit_images(c, max_images, tag) for c in found]
    if dropped := [len(c.images) - len(s.images) for c, s in zip(found, kept, strict=True) if s is not c]:
        said = f"{sum(dropped)} images of {len(dropped)} of {len(found)} conversations are left out"
        _log.warning("%s: %s: a turn of the user may have %d, its last", path, said, max_images)
    return kept


def check_gold(conversations: Iterable[Conversation], *, every: bool = False) -> None:
    """Raise where the last answer, with which answers are to be compared, holds no word; with `every`, where any answer does not."""
    for c in conversations:
        answers = [m["content"] for m in c.messages if m["role"] == "assistant"]
        for answer in answers if every else answers[-1:]:
            if not has_words(answer):
                which = "each" if every else "the last"
                raise ValueError(
                    f"{c.place}: {which} answer must hold a word to be compared with, got {short(answer)}"
                )


def warn_of_one_file(pattern: str) -> None:
    """Warn where a pattern names one file for all splits: what is scored was then trained on."""
    if "{split}" not in pattern:
        _log.warning(
            "%s: is one file for all splits, so that what is scored was trained on; write {split} where their names differ",
            pattern,
        )


def _records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, place for errors, record) of every record of a file of JSON lines, or of one JSON array."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content.lstrip()[:1] == b"[":
        yield from _array_records(path, content)
        return
    for line, raw in enumerate(content.split(b"\n"), 1):
        if not raw.strip():
            continue
        where = f"{path}, line {line}"
        try:
            record = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{where}: not a line of JSON in UTF-8 ({e})") from e
        yield line, where, record


def _array_records(path: Path, content: bytes) -> Iterator[tuple[int, str, Any]]:
    """Records one after the other, so that each knows the line on which it begins."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({e})") from e
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted, number = text.index("[") + 1, 1, 0, 0

    def skip_blanks(at: int) -> int:
        hit = blank.match(text, at)
        return at if hit is None else hit.end()

    at = skip_blanks(at)
    while text[at : at + 1] != "]":
        line, counted, number = line + text.count("\n", counted, at), at, number + 1
        where = f"{path}, line {line}, record {number}"
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{where}: not JSON, or the array is cut off ({e})") from e
        yield line, where, record
        at = skip_blanks(at)
        if text[at : at + 1] == ",":
            at = skip_blanks(at + 1)
        elif text[at : at + 1] != "]":
            raise ValueError(f"{where}: a comma or ] must follow, got {short(text[at : at + 20])}")
    if text[at + 1 :].strip():
        raise ValueError(f"{path}: nothing may follow the array, got {short(text[at + 1 :].strip()[:40])}")


def limit_images(conversation: Conversation, most: int, tag: str = "<image>") -> Conversation:
    """At most `most` images in every turn of the user: its last ones, as LoraRetriever's MAX_NUM keeps them.

    The tag of a dropped image goes with it, and the line break behind the tag; no other text is touched.

    Args:
        most: 0 = no limit. A conversation within it is returned itself.
    Raises:
        ValueError: most < 0, or tags that do not match the images.
    """
    if most < 0:
        raise ValueError(f"limit_images: most must be at least 1 image, or 0 for no limit, got {most}")
    check_tags(conversation.messages, tag, len(conversation.images), "limit_images")
    counts = [m["content"].count(tag) for m in conversation.messages]
    if not most or max(counts) <= most:
        return conversation
    messages, images, start = list[dict[str, str]](), list[Path](), 0
    for message, count in zip(conversation.messages, counts, strict=True):
        over = max(0, count - most)
        images += conversation.images[start + over : start + count]
        text = (
            re.sub(re.escape(tag) + r"(\r?\n)?", "", message["content"], count=over)
            if over
            else message["content"]
        )
        messages.append({**message, "content": text})
        start += count
    return evolve(conversation, messages=tuple(messages), images=tuple(images))


def read_tasks(
    pattern: files.PathLike,
    split: str,
    *,
    key: str = "task",
    tag: str = "<image>",
    root: files.PathLike | None = None,
    max_images: int = 0,
) -> list[Conversation]:
    """Conversations of several tasks, each with its task in `extra["task"]`.

    Args:
        pattern: path with "{split}" where files differ by split. With "{task}" ("data/{task}/{split}.jsonl") every task has a file: what
            stands there, within one name, is the task, and tasks come in sorted order. Without, it is one file, its lines say their task.
        key: what lines call it; in files of one task a line needs none, but must not name another.
        tag, root, max_images: as `read_conversations`.
    Raises:
        ValueError: no such file; with file and line, a task that is missing, no text, or another than the file's; and as
            `read_conversations`.
    """
    name = str(pattern).replace("{split}", split)
    named = _task_files(name) if "{task}" in name else {"": Path(name)}
    if not named:
        raise ValueError(f"{name}: no file is called so, whatever the task")
    found = list[Conversation]()
    for task in sorted(named):
        for c in read_conversations(named[task], tag=tag, root=root, max_images=max_images):
            own = c.extra.get(key, task)
            if not isinstance(own, str) or not own.strip() or (task and own != task):
                wanted = f'be "{task}" like the file\'s, or not be there' if task else "be there and be text"
                got = (
                    short(c.extra[key])
                    if key in c.extra
                    else f"only {', '.join(c.extra) or 'what every line has'}"
                )
                raise ValueError(f'{named[task]}, line {c.line}: "{key}" must {wanted}, got {got}')
            found.append(evolve(c, extra=c.extra | {"task": own}))
    return found


def task_paths(pattern: str) -> dict[str, list[Path]]:
    """What is there under the names of a pattern with "{task}", by the task that stands there, in natural order ("v2" before "v10").

    "{task}" may stand in it more than once, for the same text, and "*" for any text; both within one name.
    """
    parts = re.split(r"(\{task\}|\*)", pattern)
    regex, known = "", False
    for part in parts:
        if part == "{task}":
            regex, known = regex + (r"(?P=task)" if known else "(?P<task>[^/]+)"), True
        else:
            regex += "[^/]*" if part == "*" else re.escape(part)
    found: dict[str, list[Path]] = {}
    for path in glob.glob("".join("*" if part in ("{task}", "*") else glob.escape(part) for part in parts)):
        if hit := re.fullmatch(regex, path):
            found.setdefault(hit["task"], []).append(Path(path))
    return {task: sorted(found[task], key=_natural) for task in sorted(found)}


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(number or 0), text) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def _task_files(pattern: str) -> dict[str, Path]:
    """The file of each task."""
    files_of = {task: [p for p in paths if p.is_file()] for task, paths in task_paths(pattern).items()}
    if several := [task for task, paths in files_of.items() if len(paths) > 1]:
        raise ValueError(
            f"{pattern}: task {several[0]} must have one file, found {', '.join(map(str, files_of[several[0]][:4]))}"
        )
    return {task: paths[0] for task, paths in files_of.items() if paths}


def _conversation(record: Any, where: str, line: int, tag: str, folder: Path, file: str) -> Conversation:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, one per line, got {short(record)}")
    rest = dict(record)
    check_keys(rest, where, dict.fromkeys(_NAMES_OF_IMAGES, _IMAGES))
    turns, inner = _messages(rest, where, tag)
    messages = tuple(turns)
    check_order(messages, "assistant", where)
    check_other_tags(messages, tag, where)
    images = _image_names(rest, where)
    if inner and images:
        raise ValueError(f'{where}: images must be in the messages or in "images", not in both')
    images = inner or images
    check_tags(messages, tag, len(images), where)
    paths = tuple(folder / name for name in images)
    for name, path in zip(images, paths, strict=True):
        if not os.path.isfile(path):  # and not path.is_file(), which raises for a name that is too long
            raise ValueError(
                f"{where}: image {name[:100]!r} is not there (relative names start from {folder}; give another root)"
            )
    name = str(rest.pop("id" if "id" in rest else "episode_id", ""))
    return Conversation(messages=messages, images=paths, id=name, line=line, extra=rest, file=file)


def _image_names(rest: dict[str, Any], where: str) -> list[str]:
    """Takes the images out of a record."""
    given = [value for key in ("images", "image") if not is_empty(value := rest.pop(key, None))]
    images = [given[0]] if given and not isinstance(given[0], list) else given[0] if given else []
    # Data sets of the Hugging Face hub write {"path": name, "bytes": null}.
    images = [
        item["path"] if isinstance(item, dict) and is_empty(item.get("bytes")) and "path" in item else item
        for item in images
    ]
    if len(given) > 1 or not all(isinstance(name, str) for name in images):
        raise ValueError(
            f'{where}: "images" must be a list of file names (or "image" one), got {short(given)}'
        )
    return images


def _messages(rest: dict[str, Any], where: str, tag: str) -> tuple[list[dict[str, str]], list[str]]:
    """Takes the messages out of a record, and the images that are named inside them."""
    history = rest.pop("history", None)
    shapes = [keys for key, keys in _SHAPES.items() if key in rest]
    plain = bool(shapes) and len(shapes[0]) == 2  # one question and its answer
    if len(shapes) != 1 or not shapes[0] <= rest.keys() or not (is_empty(history) or plain):
        raise ValueError(
            f'{where}: must have "messages", or "conversations", or "query" and "response", or "instruction" and "output" (and "history" '
            f"only beside the last two), found {', '.join([*rest, *(['history'] if history else [])]) or 'nothing'}"
        )
    system = rest.pop("system", None)
    messages = [] if is_empty(system) else [{"role": "system", "content": system}]
    if plain:
        return messages + _question_and_answer(rest, history or [], where), []
    key = next(iter(shapes[0]))
    role, content = ("role", "content") if key == "messages" else ("from", "value")
    turns = rest.pop(key)
    images = list[str]()
    for i, turn in enumerate(turns if isinstance(turns, list) else [turns]):
        own = (
            {k: v for k, v in turn.items() if k in (role, content) or not is_empty(v)}
            if isinstance(turn, dict)
            else {}
        )
        if own.keys() != {role, content}:
            raise ValueError(
                f'{where}: message {i} must be {{"{role}": text, "{content}": text}}, got {short(turn)}'
            )
        text = own[content]
        if isinstance(text, list):
            text, names = _joined(text, f"{where}: message {i}", tag)
            images += names
        name = str(own[role])
        messages.append({"role": _ROLES.get(name, name), "content": text})
    return messages, images


def _question_and_answer(rest: dict[str, Any], history: Any, where: str) -> list[dict[str, str]]:
    """Takes a question with its answer out of a record, behind those of the history."""
    if "query" in rest:
        question, answer = rest.pop("query"), rest.pop("response")
    else:
        question, answer = rest.pop("instruction"), rest.pop("output")
        if not is_empty(more := rest.pop("input", None)):
            if not isinstance(more, str) or not isinstance(question, str):
                raise ValueError(
                    f'{where}: "instruction" and "input" must be texts, got {short(question)} and {short(more)}'
                )
            question = f"{question}\n{more}"  # as LLaMA-Factory joins them
    messages = list[dict[str, str]]()
    for pair in [*history, [question, answer]] if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f'{where}: "history" must be a list of [question, answer], got {short(history)}')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _joined(parts: list[Any], where: str, tag: str) -> tuple[str, list[str]]:
    """(text, names of images) of OpenAI's list of parts; an image without a name is one of "images"."""
    if not parts:
        raise ValueError(f"{where} must be text, got an empty list of parts")
    texts, names = list[str](), list[str]()
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(tag)
            names += _image_of(part, where)
        else:
            raise ValueError(
                f'{where}: parts must be {{"type": "text", "text": ...}} or an image, got {short(part)}'
            )
    return "".join(texts), names


def _image_of(part: dict[str, Any], where: str) -> list[str]:
    """The name of the image of a part, none where it names none."""
    values = [value for key in ("image_url", "image", "path", "url") if not is_empty(value := part.get(key))]
    if not values:
        return []
    value = values[0].get("url") if isinstance(values[0], dict) else values[0]
    if not isinstance(value, str) or re.match("(data|https?):", value):
        raise ValueError(
            f"{where}: an image must be the name of a file, got {short(value)}; write it to a file"
        )
    return [value.removeprefix("file://")]
