"""Files of conversations with images: JSON lines in the shapes that are common, as messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import field, frozen

from medvl import files
from medvl.data.conversations import check_order, check_tags, short

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


def read_conversations(path: files.PathLike, *, tag: str = "<image>", root: files.PathLike | None = None) -> list[Conversation]:
    """Conversations from JSON lines, each in one of three shapes, checked to the last line.

    {"query": text, "response": text}, {"conversations": [{"from": "user" or "human" ..., "value": text}, ...]} or
    {"messages": [{"role": "user" ..., "content": text}, ...]}, with "images" (a list; or "image", one name), "system", and "id" or
    "episode_id" where wanted. The user's texts hold one `tag` per image; images are taken from left to right.

    Args:
        root: where relative image paths ("./../x" too) start; the file's own folder when None.
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
    return found


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
