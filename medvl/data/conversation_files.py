"""Files of conversations with images: JSON lines in the shapes that are common, as messages."""

import glob
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from medvl import files
from medvl.data.conversations import check_order, check_tags, short

_log = logging.getLogger(__name__)
_SHAPES = {"query": {"query", "response"}, "conversations": {"conversations"}, "messages": {"messages"}}
_ROLES = {"human": "user", "gpt": "assistant"}


@frozen(kw_only=True)
class Conversation:
    """One line of a file."""

    messages: tuple[dict[str, str], ...]
    images: tuple[Path, ...] = ()  # in the order of the tags
    id: str = ""
    line: int = 0  # from 1
    extra: dict[str, Any] = field(factory=dict)  # keys that are not read here


def read_conversations(
    path: files.PathLike, *, tag: str = "<image>", root: files.PathLike | None = None, max_images: int = 0
) -> list[Conversation]:
    """Conversations from JSON lines, each in one of three shapes, checked to the last line.

    {"query": text, "response": text}, {"conversations": [{"from": "user" or "human" ..., "value": text}, ...]} or
    {"messages": [{"role": "user" ..., "content": text}, ...]}, with "images" (a list; or "image", one name), "system", and "id" or
    "episode_id" where wanted. The user's texts hold one `tag` per image; images are taken from left to right.

    Args:
        root: where relative image paths start, so "./../x" is beside it; the file's own folder when None.
        max_images: `limit_images` of every conversation, one warning says of how many; 0 = no limit. Dropped images must be there too.
    Raises:
        ValueError: with file and line: no UTF-8, no JSON, another shape, wrong roles or order, no turn of the assistant, contents that are
            no strings, tags that do not match the images, an image that is not there; or the file is empty or absent.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    found, folder = list[Conversation](), path.parent if root is None else Path(root)
    for line, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw.decode("utf-8"))
        except ValueError as e:  # of both
            raise ValueError(f"{path}, line {line}: not a line of JSON in UTF-8 ({e})") from e
        found.append(_conversation(record, f"{path}, line {line}", line, tag, folder))
    if not found:
        raise ValueError(f"{path}: holds no conversation")
    kept = [limit_images(c, max_images, tag) for c in found]
    if dropped := [len(c.images) - len(s.images) for c, s in zip(found, kept, strict=True) if s is not c]:
        said = f"{sum(dropped)} images of {len(dropped)} of {len(found)} conversations are left out"
        _log.warning("%s: %s: a turn of the user may have %d, its last", path, said, max_images)
    return kept


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
        text = re.sub(re.escape(tag) + r"(\r?\n)?", "", message["content"], count=over) if over else message["content"]
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
                got = short(c.extra[key]) if key in c.extra else f"only {', '.join(c.extra) or 'what every line has'}"
                raise ValueError(f'{named[task]}, line {c.line}: "{key}" must {wanted}, got {got}')
            found.append(evolve(c, extra=c.extra | {"task": own}))
    return found


def _task_files(pattern: str) -> dict[str, Path]:
    """The files of a pattern with "{task}", once or more often, by task."""
    parts = pattern.split("{task}")
    same = re.compile(re.escape(parts[0]) + "([^/]+)" + r"\1".join(re.escape(part) for part in parts[1:]))
    hits = ((same.fullmatch(path), path) for path in glob.glob("*".join(glob.escape(part) for part in parts)))
    return {hit[1]: Path(path) for hit, path in hits if hit and Path(path).is_file()}


def _conversation(record: Any, where: str, line: int, tag: str, folder: Path) -> Conversation:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, one per line, got {short(record)}")
    rest = dict(record)
    messages = tuple(_messages(rest, where))
    check_order(messages, "assistant", where)
    named = [rest.pop(key) for key in ("images", "image") if key in rest]
    images = [named[0]] if named and isinstance(named[0], str) else named[0] if named else []
    if len(named) > 1 or not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError(f'{where}: "images" must be a list of file names (or "image" one), got {short(record.get("images"))}')
    check_tags(messages, tag, len(images), where)
    paths = tuple(folder / name for name in images)
    for name, file in zip(images, paths, strict=True):
        if not file.is_file():
            raise ValueError(f"{where}: image {name!r} is not there (relative names start from {folder}; give another root)")
    name = str(rest.pop("id" if "id" in rest else "episode_id", ""))
    return Conversation(messages=messages, images=paths, id=name, line=line, extra=rest)


def _messages(rest: dict[str, Any], where: str) -> Iterator[dict[str, str]]:
    """Takes the messages out of a record."""
    shapes = [keys for key, keys in _SHAPES.items() if key in rest]
    if len(shapes) != 1 or not shapes[0] <= rest.keys() or "history" in rest:
        raise ValueError(
            f'{where}: must have "messages", or "conversations", or "query" and "response" (and no "history": put it into messages), '
            f"found {', '.join(rest) or 'nothing'}"
        )
    if "system" in rest:
        yield {"role": "system", "content": rest.pop("system")}
    if "query" in rest:
        yield {"role": "user", "content": rest.pop("query")}
        yield {"role": "assistant", "content": rest.pop("response")}
        return
    key = "messages" if "messages" in rest else "conversations"
    role, content = ("role", "content") if key == "messages" else ("from", "value")
    turns = rest.pop(key)
    for i, turn in enumerate(turns if isinstance(turns, list) else [turns]):
        if not isinstance(turn, dict) or turn.keys() != {role, content}:
            raise ValueError(f'{where}: message {i} must be {{"{role}": text, "{content}": text}}, got {short(turn)}')
        name = str(turn[role])
        yield {"role": _ROLES.get(name, name), "content": turn[content]}
