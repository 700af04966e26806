"""Files of conversations with images: JSON lines and JSON arrays in the common formats, as messages."""

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from medvl.base import files
from medvl.base.text import short
from medvl.evaluation.answers import has_words
from medvl.language.messages import check_keys, check_order, check_other_tags, check_tags, is_empty

_log = logging.getLogger(__name__)
# The formats: of each the key that tells it, and the keys that it must have.
_FORMATS = {
    "query": {"query", "response"},
    "instruction": {"instruction", "output"},
    # ShareGPT's, as LLaVA has it.
    "conversations": {"conversations"},
    "conversatons": {"conversatons"},  # as LLaVA-Med's evaluation files spell it
    "messages": {"messages"},
}
IMAGE_PARTS = ("image", "image_url")  # types of the parts that are images
_ROLES = {"human": "user", "gpt": "assistant"}
_IMAGE_KEYS = 'images are read from "images" (a list of file names) or "image" (one)'
# Refused: ignored, they would train answers about images that the model does not see.
_OTHER_IMAGE_KEYS = (
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

    @property
    def options(self) -> dict[str, str]:
        """What a question lets choose from, by letter (A to Z), under the key "options"; else nothing."""
        options = self.extra.get("options")
        pairs = options.items() if isinstance(options, dict) else ()
        is_lettered = all(re.fullmatch("[A-Z]", letter) and isinstance(text, str) for letter, text in pairs)
        return dict(pairs) if is_lettered else {}

    def until(self, stop: int) -> "Conversation":
        """The first `stop` messages, with the images of that part."""
        messages = self.messages[:stop]
        # Images come in the order of the tags, so that those of the first messages are the first ones.
        tags = sum(message["content"].count("<image>") for message in messages)
        return evolve(self, messages=messages, images=self.images[:tags])


Reader = Callable[[str], Sequence[Conversation]]  # split -> its conversations


def read_conversations(
    path: files.PathLike, *, tag: str = "<image>", root: files.PathLike | None = None, max_images: int = 0
) -> list[Conversation]:
    """Conversations from JSON lines, or from one JSON array of them, checked to the last.

    The shapes of a conversation: {"query": text, "response": text}, {"instruction": text, "input": text or
    nothing, "output": text}, {"conversations": [{"from": "user" or "human" ..., "value": text}, ...]} or
    {"messages": [{"role": "user" ..., "content": text}, ...]}, where a content may be OpenAI's list of
    {"type": "text"} and {"type": "image_url"} or {"type": "image"}, or TRL's {"prompt": messages,
    "completion": [the answer]}; with "images" (a list; or "image", one
    name), "system", "history" (a list of [question, answer]; beside "query" and "instruction"), and "id" or
    "episode_id" where wanted. What is empty or null is as if it were not there. The user's texts hold one
    `tag` per image; images are taken from left to right.

    Args:
        root: where relative image paths start, so "./../x" is beside it; the file's own folder when None.
        max_images: `limit_images` of every conversation, one warning says of how many; 0 = no limit. Dropped
            images must be there too.
    Raises:
        ValueError: with file and line: no UTF-8, no JSON, another shape, wrong roles or order, no turn of the
            assistant, contents that are no strings, tags that do not match the images, an image that is not
            there, keys and tags that would change what is trained and are not read (videos, boxes, worse
            answers); or the file is empty or absent.
    """
    path = Path(path)
    folder = path.parent if root is None else Path(root)
    conversations = list[Conversation]()
    for line, where, record in read_records(path):
        conversations.append(parse_conversation(record, where, line, tag, folder, str(path)))
    if not conversations:
        raise ValueError(f"{path}: holds no conversation")
    limited = [limit_images(conversation, max_images, tag) for conversation in conversations]
    dropped = list[int]()  # images of each conversation that loses some
    for before, after in zip(conversations, limited, strict=True):
        if after is not before:
            dropped.append(len(before.images) - len(after.images))
    if dropped:
        counts = f"{sum(dropped)} images of {len(dropped)} of {len(conversations)} conversations are left out"
        _log.warning("%s: %s: a turn of the user keeps its last %d", path, counts, max_images)
    return limited


def check_gold(conversations: Iterable[Conversation], *, every: bool = False) -> None:
    """Check that the last answer, with which predictions are compared, holds a word; with `every`, all
    answers.

    Raises:
        ValueError: one does not.
    """
    for conversation in conversations:
        answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
        compared, name = answers[-1:], "the last"
        if every:
            compared, name = answers, "each"
        for answer in compared:
            if not has_words(answer):
                raise ValueError(
                    f"{conversation.place}: {name} answer must hold a word to be compared with, got "
                    f"{short(answer)}"
                )


def warn_of_one_file(pattern: str) -> None:
    """Warn where a pattern names one file for all splits: what is scored was then trained on."""
    if "{split}" not in pattern:
        _log.warning(
            "%s: is one file for all splits, so the test data are trained on; put {split} into its name",
            pattern,
        )


def read_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, place for errors, record) of every record of a file of JSON lines, or of one JSON array."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    # The byte order mark that Windows' editors write, which json does not take.
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    # Told by the content: arrays are called .json as well as .jsonl.
    if content.lstrip()[:1] == b"[":
        yield from _array_records(path, content)
        return
    # Split at line feeds only: str.splitlines would also split at separators that JSON texts may hold.
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
    """The records of a JSON array one after the other, so that errors name the line on which each begins."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({e})") from e
    decoder = json.JSONDecoder()
    line = 1
    counted = 0  # characters whose line breaks are in `line`
    number = 0
    position = _skip_blanks(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        number += 1
        where = f"{path}, line {line}, record {number}"
        try:
            # It reads one value and says where that ended; json.loads of the whole could only tell where it
            # failed.
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{where}: not JSON, or the array is cut off ({e})") from e
        yield line, where, record
        position = _skip_blanks(text, position)
        if text[position : position + 1] == ",":
            position = _skip_blanks(text, position + 1)
        elif text[position : position + 1] != "]":
            near = text[position : position + 20]
            raise ValueError(f"{where}: a comma or ] must follow, got {short(near)}")
    behind = text[position + 1 :].strip()
    if behind:
        raise ValueError(f"{path}: nothing may follow the array, got {short(behind[:40])}")


def _skip_blanks(text: str, position: int) -> int:
    """The position of the first character from `position` on that is no white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


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
    # The same object, by which `read_conversations` knows that nothing was dropped.
    if not most or max(counts) <= most:
        return conversation
    messages = list[dict[str, str]]()
    images = list[Path]()
    start = 0  # of the images of a message
    for message, count in zip(conversation.messages, counts, strict=True):
        surplus = max(0, count - most)
        images += conversation.images[start + surplus : start + count]
        text = message["content"]
        if surplus:  # re.sub takes a count of 0 for all
            text = re.sub(re.escape(tag) + r"(\r?\n)?", "", text, count=surplus)
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
        pattern: path with "{split}" where files differ by split. With "{task}" ("data/{task}/{split}.jsonl")
            every task has a file: what stands there, within one name, is the task, and tasks come in sorted
            order. Without, it is one file, its lines say their task.
        key: what lines call it; in files of one task a line needs none, but must not name another.
        tag, root, max_images: as `read_conversations`.
    Raises:
        ValueError: no such file; with file and line, a task that is missing, no text, or another than the
            file's; and as `read_conversations`.
    """
    # Not str.format, which would fail at any other brace in a path.
    name = str(pattern).replace("{split}", split)
    paths = {"": Path(name)}
    if "{task}" in name:
        paths = _task_files(name)
    if not paths:
        raise ValueError(f"{name}: no file has this name, for any task")
    conversations = list[Conversation]()
    for file_task in sorted(paths):
        path = paths[file_task]
        for conversation in read_conversations(path, tag=tag, root=root, max_images=max_images):
            task = conversation.extra.get(key, file_task)
            is_task = isinstance(task, str) and task.strip()
            if not is_task or (file_task and task != file_task):
                raise ValueError(_wrong_task(conversation, path, key, file_task))
            conversations.append(evolve(conversation, extra=conversation.extra | {"task": task}))
    return conversations


def _wrong_task(conversation: Conversation, path: Path, key: str, file_task: str) -> str:
    """The error of a conversation whose task is missing, is no text, or is not that of its file."""
    rule = "be there and be text"
    if file_task:
        rule = f'be "{file_task}" like the file\'s, or not be there'
    if key in conversation.extra:
        value = short(conversation.extra[key])
    else:
        value = f"only {', '.join(conversation.extra) or 'what every line has'}"
    return f'{path}, line {conversation.line}: "{key}" must {rule}, got {value}'


def task_paths(pattern: str) -> dict[str, list[Path]]:
    """What is there under the names of a pattern with "{task}", by the task that stands there, in natural
    order ("v2" before "v10").

    "{task}" may stand in it more than once, for the same text, and "*" for any text; both within one name.
    """
    regex = ""
    wildcards = ""  # the pattern of glob, which knows no names
    for piece in re.split(r"(\{task\}|\*)", pattern):
        if piece == "{task}":
            # Where the task stands a second time it must be the same text.
            regex += "(?P=task)" if "(?P<task>" in regex else "(?P<task>[^/]+)"
            wildcards += "*"
        elif piece == "*":
            regex += "[^/]*"
            wildcards += "*"
        else:
            regex += re.escape(piece)
            wildcards += glob.escape(piece)
    paths = dict[str, list[Path]]()
    for path in glob.glob(wildcards):
        hit = re.fullmatch(regex, path)
        if hit:
            paths.setdefault(hit["task"], []).append(Path(path))
    return {task: sorted(paths[task], key=_natural) for task in sorted(paths)}


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key by which numbers in names count as numbers."""
    return [(int(number or 0), text) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def _task_files(pattern: str) -> dict[str, Path]:
    """The one file of each task."""
    of_task = dict[str, Path]()
    for task, paths in task_paths(pattern).items():
        existing = [path for path in paths if path.is_file()]
        if len(existing) > 1:
            raise ValueError(
                f"{pattern}: task {task} must have one file, found {', '.join(map(str, existing[:4]))}"
            )
        if existing:
            of_task[task] = existing[0]
    return of_task


def parse_conversation(record: Any, where: str, line: int, tag: str, folder: Path, file: str) -> Conversation:
    """The conversation of one record, in any of the shapes of `read_conversations`; `where` begins errors."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, one per line, got {short(record)}")
    # A copy, as records belong to the caller. What is left at the end are the extras.
    remaining = dict(record)  # the helpers take out the keys that they read
    check_keys(remaining, where, dict.fromkeys(_OTHER_IMAGE_KEYS, _IMAGE_KEYS))
    messages, images_in_messages = _take_messages(remaining, where, tag)
    # Before the tags are looked for: it is what makes sure that contents are texts.
    check_order(messages, "assistant", where)
    check_other_tags(messages, tag, where)
    images = _take_images(remaining, where)
    if images_in_messages and images:
        raise ValueError(f'{where}: images must be in the messages or in "images", not in both')
    images = images_in_messages or images
    check_tags(messages, tag, len(images), where)
    # An absolute name replaces the folder (pathlib).
    paths = tuple(folder / name for name in images)
    for name, path in zip(images, paths, strict=True):
        if not os.path.isfile(path):  # and not path.is_file(), which raises for a name that is too long
            raise ValueError(
                f"{where}: image {name[:100]!r} does not exist (relative names start from {folder}; give "
                "another root)"
            )
    id_key = "id" if "id" in remaining else "episode_id"
    return Conversation(
        messages=tuple(messages),
        images=paths,
        id=str(remaining.pop(id_key, "")),
        line=line,
        extra=remaining,
        file=file,
    )


def _take_images(record: dict[str, Any], where: str) -> list[str]:
    """Take the names of images out of a record."""
    values = [record.pop(key, None) for key in ("images", "image")]
    values = [value for value in values if not is_empty(value)]
    images = []
    if values:
        images = values[0] if isinstance(values[0], list) else [values[0]]
    names = [_image_name(item) for item in images]
    if len(values) > 1 or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f'{where}: "images" must be a list of file names (or "image" one), got {short(values)}'
        )
    return names


def _image_name(item: Any) -> Any:
    """Data sets of the Hugging Face hub write an image as {"path": name, "bytes": null}."""
    if isinstance(item, dict) and "path" in item and is_empty(item.get("bytes")):
        return item["path"]
    return item


def _take_messages(record: dict[str, Any], where: str, tag: str) -> tuple[list[dict[str, str]], list[str]]:
    """Take the messages out of a record, and the images that are named inside them."""
    history = record.pop("history", None)
    formats = [keys for key, keys in _FORMATS.items() if key in record]
    # Only where nothing else is there: beside "messages" a "prompt" is often the first question again.
    if not formats and record.keys() >= {"prompt", "completion"}:
        record["messages"] = _join_completion(record.pop("prompt"), record.pop("completion"), where)
        formats = [_FORMATS["messages"]]
    # Only such records have a history: the others hold all turns already.
    is_pair = bool(formats) and len(formats[0]) == 2  # one question and its answer
    is_complete = len(formats) == 1 and formats[0] <= record.keys()
    if not is_complete or not (is_empty(history) or is_pair):
        keys = [*record]
        if history:
            keys.append("history")
        raise ValueError(
            f'{where}: must have "messages", or "conversations", or "query" and "response", or "instruction" '
            'and "output" (and "history" only beside the last two), or "prompt" and "completion", found '
            f"{', '.join(keys) or 'nothing'}"
        )
    system = record.pop("system", None)
    messages = list[dict[str, str]]()
    if not is_empty(system):
        messages.append({"role": "system", "content": system})
    if is_pair:
        return messages + _take_question_and_answer(record, history or [], where), []

    key = next(iter(formats[0]))
    role_key, content_key = "from", "value"
    if key == "messages":
        role_key, content_key = "role", "content"
    turns = record.pop(key)
    if not isinstance(turns, list):
        turns = [turns]
    images = list[str]()
    for i, turn in enumerate(turns):
        values = {}
        if isinstance(turn, dict):  # other keys are ignored where they are empty
            values = {k: v for k, v in turn.items() if k in (role_key, content_key) or not is_empty(v)}
        if values.keys() != {role_key, content_key}:
            raise ValueError(
                f'{where}: message {i} must be {{"{role_key}": text, "{content_key}": text}}, got '
                f"{short(turn)}"
            )
        content = values[content_key]
        if isinstance(content, list):
            content, names = _join_parts(content, f"{where}: message {i}", tag)
            images += names
        role = str(values[role_key])
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages, images


def _join_completion(prompt: Any, completion: Any, where: str) -> list[Any]:
    """The messages of TRL's prompt and completion, as far as the same tokens are trained in them here and
    there.
    """
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError(
            f'{where}: "prompt" and "completion" must be lists of messages, got {short(prompt)} and '
            f'{short(completion)}; texts are trained without a chat template there, here they are "query" '
            'and "response"'
        )
    roles = [message.get("role") for message in [*prompt, *completion] if isinstance(message, dict)]
    if "assistant" in roles[:-1] or len(completion) != 1:
        raise ValueError(
            f'{where}: "prompt" must have no answer and "completion" only one, got the roles '
            f"{' '.join(map(str, roles))}: only completions are trained there, every answer here; use one "
            'answer a line, or "messages"'
        )
    return [*prompt, *completion]


def _take_question_and_answer(record: dict[str, Any], history: Any, where: str) -> list[dict[str, str]]:
    """Take a question with its answer out of a record, behind those of the history."""
    if "query" in record:
        question = record.pop("query")
        answer = record.pop("response")
    else:
        question = record.pop("instruction")
        answer = record.pop("output")
        more = record.pop("input", None)
        if not is_empty(more):
            if not isinstance(more, str) or not isinstance(question, str):
                raise ValueError(
                    f'{where}: "instruction" and "input" must be texts, got {short(question)} and '
                    f"{short(more)}"
                )
            question = f"{question}\n{more}"  # as LLaMA-Factory joins them
    pairs = [history]
    if isinstance(history, list):
        pairs = [*history, [question, answer]]
    messages = list[dict[str, str]]()
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f'{where}: "history" must be a list of [question, answer], got {short(history)}')
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def _join_parts(parts: list[Any], where: str, tag: str) -> tuple[str, list[str]]:
    """(text, names of images) of OpenAI's list of parts; an image without a name is one of "images"."""
    if not parts:
        raise ValueError(f"{where} must be text, got an empty list of parts")
    text = ""
    names = list[str]()
    for part in parts:
        kind = None
        if isinstance(part, dict):
            kind = part.get("type")
        # Joined as they are: a line break between image and text is the data set's to write.
        if kind == "text" and isinstance(part.get("text"), str):
            # Its images are parts of their own, so that this tag cannot stand for one of them.
            if tag in part["text"] and any(
                p.get("type") in IMAGE_PARTS for p in parts if isinstance(p, dict)
            ):
                raise ValueError(
                    f"{where}: a text beside images must not hold {tag}, got {short(part['text'])}; write an "
                    'image as a part {"type": "image"} in its place, and the word in another way, such as '
                    "[image]"
                )
            text += part["text"]
        elif kind in IMAGE_PARTS:
            text += tag
            names += _image_of_part(part, where)
        else:
            raise ValueError(
                f'{where}: parts must be {{"type": "text", "text": ...}} or an image, got {short(part)}'
            )
    return text, names


def _image_of_part(part: dict[str, Any], where: str) -> list[str]:
    """The name of the image of a part; no name where the part has none."""
    values = [part.get(key) for key in ("image_url", "image", "path", "url")]
    values = [value for value in values if not is_empty(value)]
    if not values:
        return []
    name = values[0]
    if isinstance(name, dict):
        name = name.get("url")
    # Nothing is downloaded, so that a run needs no network and its images cannot change.
    if not isinstance(name, str) or re.match("(data|https?):", name):
        raise ValueError(
            f"{where}: an image must be the name of a file, got {short(name)}; write it to a file (`invoke "
            "conversations convert` does it with data: URLs)"
        )
    return [name.removeprefix("file://")]
