"""Files of conversations in the shapes that other programs read: written, and converted from one to another.

| shape | read by | a record |
|---|---|---|
| llava | LLaVA, Qwen-VL | {"conversations": [{"from": "human", "value": "<image>..."}, ...], "image": a name or a list} |
| swift | LLaMA-Factory, ms-swift | {"messages": [{"role": "user", "content": "<image>..."}, ...], "images": names} |
| trl | TRL | "messages" whose contents are lists of {"type": "image"} and {"type": "text", "text": ...}; "images" |
| completion | TRL | the same as "prompt" and "completion" (one answer) |
| openai | OpenAI's API, vLLM | "messages" whose users' contents are lists with {"type": "image_url", "image_url": {"url": name}} |

All hold the same: messages, images in their places, an id and any other keys. Two texts beside each other in a
list are one text, and an image of every shape is the name of a file.
"""

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medvl.base import files
from medvl.base.text import short
from medvl.language.conversations import IMAGE_PARTS, Conversation, parse_conversation, read_records
from medvl.language.images import open_image
from medvl.language.messages import check_tags

SHAPES = ("llava", "swift", "trl", "completion", "openai")
_TAG = "<image>"
_LLAVA_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp|gif|bmp|tiff);base64,(.*)", re.DOTALL)


def write_conversations(path: files.PathLike, conversations: Sequence[Conversation], shape: str) -> None:
    """Write conversations in one of `SHAPES`, as JSON lines, or as one JSON array where the name ends in .json.

    Names of images are written relative to the file. Every record is parsed again before the file is there, so
    that `read_conversations` gives the same conversations.

    Raises:
        ValueError: an unknown shape; a conversation that the shape cannot hold (several answers in
            "completion", another key of a name that the shape uses), or that no file may hold
            (`read_conversations`).
    """
    path = Path(path)
    records = [format_record(conversation, shape, path.parent) for conversation in conversations]
    _write_records(path, records)


def convert_conversations(
    source: files.PathLike, target: files.PathLike, shape: str, *, root: files.PathLike | None = None
) -> int:
    """Write the conversations of a file in another of `SHAPES`; returns how many.

    Images that are data: URLs are written once each to `images` beside the target, named by their sha256.

    Args:
        source: in any shape that `read_conversations` reads.
        root: where relative names of the source's images start; its folder when None.
    Raises:
        ValueError: as `read_conversations` and `write_conversations`; a data: URL that is no image.
    """
    source = Path(source)
    target = Path(target)
    folder = source.parent if root is None else Path(root)
    records = list[dict[str, Any]]()
    for line, where, record in read_records(source):
        record = _write_data_urls(record, target.parent / "images", where)
        conversation = parse_conversation(record, where, line, _TAG, folder, str(source))
        converted = format_record(conversation, shape, target.parent)
        # A conversation has its id as text and under one name; a file keeps what it had.
        converted.pop("id", None)
        ids = {key: record[key] for key in ("id", "episode_id") if key in record}
        records.append(ids | converted)
    if not records:
        raise ValueError(f"{source}: holds no conversation")
    _write_records(target, records)
    return len(records)


def format_record(conversation: Conversation, shape: str, folder: files.PathLike) -> dict[str, Any]:
    """A conversation as the record of a shape.

    Args:
        folder: what names of images are relative to.
    Raises:
        ValueError: as `write_conversations`.
    """
    where = conversation.place
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    check_tags(conversation.messages, _TAG, len(conversation.images), where)
    # What is written is read again, with names that hold wherever the file will be.
    absolute = [str(image.absolute()) for image in conversation.images]
    written = json.loads(json.dumps(_format(conversation, shape, absolute)))
    again = parse_conversation(written, where, 0, _TAG, Path(), "")
    if _content(again) != _content(conversation):
        raise ValueError(
            f"{where}: cannot be written as {shape} without loss, it would be read as {short(_content(again))}"
        )
    relative = [_relative_name(image, Path(folder)) for image in conversation.images]
    return _format(conversation, shape, relative)


def _format(conversation: Conversation, shape: str, names: list[str]) -> dict[str, Any]:
    """The record of a shape, with these names of images."""
    record: dict[str, Any] = {"id": conversation.id} if conversation.id else {}
    record |= _shaped(conversation, shape, names)
    taken = sorted(record.keys() & conversation.extra.keys())
    if taken:
        raise ValueError(
            f'{conversation.place}: the shape {shape} has its own "{taken[0]}"; rename the other key of that name'
        )
    return record | conversation.extra


def _content(conversation: Conversation) -> str:
    """All that a file must keep, comparable: as text, since nan is not equal to itself."""
    images = [os.path.realpath(image) for image in conversation.images]
    return json.dumps([conversation.messages, images, conversation.id, conversation.extra], sort_keys=True)


def _relative_name(image: Path, folder: Path) -> str:
    # The folder of an image is resolved and not the image: a link keeps its own name.
    path = image.parent.resolve() / image.name
    return Path(os.path.relpath(path, folder.resolve())).as_posix()


# The shapes -------------------------------------------------------------------------------------------------
def _shaped(conversation: Conversation, shape: str, names: list[str]) -> dict[str, Any]:
    """The messages and images of a conversation under the keys of a shape."""
    if shape == "llava":
        turns = [{"from": _LLAVA_ROLES[m["role"]], "value": m["content"]} for m in conversation.messages]
        images = {"image": names[0] if len(names) == 1 else names} if names else {}
        return {"conversations": turns} | images
    remaining = iter(names)
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        content: Any = message["content"]
        if shape == "openai" and _TAG in content:
            urls = [next(remaining) for _ in range(content.count(_TAG))]
            content = _parts(content, [{"type": "image_url", "image_url": {"url": url}} for url in urls])
        elif shape in ("trl", "completion"):
            # Lists also without images: columns of a data set hold values of one type.
            content = _parts(content, [{"type": "image"}] * content.count(_TAG))
        messages.append({"role": message["role"], "content": content})
    named = {"images": names} if names and shape != "openai" else {}
    if shape != "completion":
        return {"messages": messages} | named
    *prompt, answer = messages
    if any(message["role"] == "assistant" for message in prompt):
        raise ValueError(
            f"{conversation.place}: the shape completion takes one answer, got several, of which TRL would train "
            "only the last; use the shape trl"
        )
    return {"prompt": prompt, "completion": [answer]} | named


def _parts(text: str, images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A text as a list of parts, one of `images` in the place of each tag."""
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(_TAG)):
        parts += images[i - 1 : i] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    # A list of no parts is no content.
    return parts or [{"type": "text", "text": ""}]


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    text = "\n".join(texts) + "\n"
    if path.suffix == ".json":
        text = "[\n" + ",\n".join(texts) + "\n]\n"
    with files.atomic(path) as tmp:
        # Halves of characters, which JSON allows in other keys, become the escapes that they were.
        tmp.write_bytes(text.encode("utf-8", "backslashreplace"))


# Images inside of records -----------------------------------------------------------------------------------
def _write_data_urls(value: Any, folder: Path, where: str) -> Any:
    """A copy of a record in which names of files stand for the images that are data: URLs."""
    if isinstance(value, list):
        return [_write_data_urls(item, folder, where) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    url = value.get(kind) if kind in IMAGE_PARTS else None
    url = url.get("url") if isinstance(url, dict) else url
    if isinstance(url, str) and url.startswith("data:"):
        return {"type": "image", "image": str(_write_data_url(url, folder, where).resolve())}
    return {key: _write_data_urls(item, folder, where) for key, item in value.items()}


def _write_data_url(url: str, folder: Path, where: str) -> Path:
    """Write the image of a data: URL to a file named by its content, if it is not there."""
    match = _DATA_URL.fullmatch(url)
    if not match:
        raise ValueError(f"{where}: a data: URL must be an image in base64, got {short(url)}")
    try:
        content = base64.b64decode(match[2], validate=True)
    except binascii.Error as e:
        raise ValueError(f"{where}: a data: URL must be an image in base64, got {short(url)} ({e})") from e
    path = folder / f"{hashlib.sha256(content).hexdigest()}.{match[1]}"
    if not path.exists():
        try:
            open_image(content, full_range=True)
        except ValueError as e:
            raise ValueError(f"{where}: a data: URL is no whole image: {e}") from e
        with files.atomic(path) as tmp:
            tmp.write_bytes(content)
    return path
