"""Checks of the messages of a conversation: roles and order, tags of images, keys and tags of other programs."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medvl.base.text import short

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

_PAIRS = "pairs of a better and a worse answer are not trained here, and the worse one must not be taken for the better"
_TOOLS = "tool calls are not trained here"
# Keys by which other programs change what is trained. Ignoring them would train a text that says something
# else.
_UNSUPPORTED_KEYS = {
    "videos": "videos are not read; give frames as images",
    "video": "videos are not read; give frames as images",
    "audios": "sound is not read",
    "audio": "sound is not read",
    "objects": "boxes and their names are not written into texts; write them as text yourself",
    # preference pairs of ms-swift, TRL, OpenAI and KTO
    "rejected_response": _PAIRS,
    "rejected_messages": _PAIRS,
    "rejected_images": _PAIRS,
    "rejected": _PAIRS,
    "chosen": _PAIRS,
    "preferred_output": _PAIRS,
    "non_preferred_output": _PAIRS,
    "positive_messages": _PAIRS,
    "negative_messages": _PAIRS,
    "kto_tag": _PAIRS,
    "tools": _TOOLS,
    "functions": _TOOLS,
    "tool_calls": _TOOLS,
    "function_call": _TOOLS,
    "loss": "every answer is trained alike",
    "loss_scale": "every answer is trained alike",
}
# Placeholders of other programs for images, videos, sound and boxes.
_UNSUPPORTED_TAGS = re.compile(
    r"<(?:video|audio|bbox|ref-object|cot-process|ImageHere|image[ _]?\d+|img)>|<\|(?:image|video|audio)_\d+\|>|</img>"
)
_NO_PLACEHOLDER = "where a text means the word and no image, write it in another way, such as [image]"
# json.loads lets an escape such as "\ud83d" through without its other half.
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a UTF-16 pair, which UTF-8 cannot encode


def check_order(messages: Sequence[Message], last: str, where: str) -> None:
    """Check roles and contents of a conversation: an optional system message, then user and assistant in
    turn.

    Args:
        last: the role of the last message, "user" or "assistant".
        where: what errors begin with.
    Raises:
        ValueError: wrong roles or order, a message of another form, a text that is not UTF-8.
    """
    for i, message in enumerate(messages):
        # Tested first: `message.get` of a string or a list would raise an AttributeError without a place.
        is_record = isinstance(message, Mapping)
        if (
            not is_record
            or not isinstance(message.get("content"), str)
            or not isinstance(message.get("role"), str)
        ):
            raise ValueError(
                f'{where}: message {i} must be {{"role": text, "content": text}}, got {short(message)}'
            )
        if hit := _SURROGATE.search(message["content"]):
            raise ValueError(
                f"{where}: message {i} must be text that can be written as UTF-8, it holds {hit[0]!a}, "
                "half a character"
            )
    roles = [message["role"] for message in messages]
    if "assistant" not in roles and last == "assistant":
        raise ValueError(f"{where}: needs a turn of the assistant, got {' '.join(roles) or 'no messages'}")
    turns = roles
    if roles[:1] == ["system"]:
        turns = roles[1:]
    alternating = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or turns != alternating or turns[-1] != last:
        raise ValueError(
            f"{where}: roles must be user and assistant in turn after an optional system, ending with "
            f"{last}, got {' '.join(roles)}"
        )


def check_tags(messages: Sequence[Message], tag: str, images: int, where: str) -> None:
    """Check that the user's texts hold one `tag` per image, and that no other text holds any.

    Raises:
        ValueError: beginning with `where`, if they do not.
    """
    for message in messages:
        if message["role"] != "user" and tag in message["content"]:
            raise ValueError(
                f"{where}: only the user's texts may hold the tag {tag!r}, found it in one of the "
                f"{message['role']}; {_NO_PLACEHOLDER}"
            )
    tags = sum(message["content"].count(tag) for message in messages)
    if tags != images:
        raise ValueError(
            f"{where}: every tag {tag!r} needs its image, got {tags} tags and {images} images; {_NO_PLACEHOLDER}"
        )


def check_other_tags(messages: Iterable[Message], tag: str, where: str) -> None:
    """Check that no text holds a placeholder of another program, which would be trained as its letters.

    Raises:
        ValueError: beginning with `where`, if one does.
    """
    for message in messages:
        # Our own tag may be one of those that are looked for, such as <img>.
        if hit := _UNSUPPORTED_TAGS.search(message["content"].replace(tag, "")):
            raise ValueError(
                f"{where}: the tag {hit[0]} of the {message['role']} stands for something that is not read "
                f"here, and would be trained as literal text; images are {tag}, and boxes are written as text"
            )


def check_keys(record: Mapping[str, Any], where: str, also: Mapping[str, str]) -> None:
    """Check that a record has no key that changes what is trained in other programs and is not supported
    here.

    Args:
        also: more such keys, of one kind of file, and why they are not supported.
    Raises:
        ValueError: beginning with `where`, if it has one.
    """
    for key, reason in {**_UNSUPPORTED_KEYS, **also}.items():
        if not is_empty(record.get(key)):
            raise ValueError(f'{where}: must not have "{key}": {reason}')
    # Only a boolean is KTO's: "label" is also a common name for a class, which is kept as an extra.
    if isinstance(record.get("label"), bool):
        raise ValueError(
            f'{where}: must not have "label": {json.dumps(record["label"])}: in KTO it says whether the '
            "answer is a good one, but here every answer is trained as a good one; remove the bad ones, and "
            "the key"
        )


def is_empty(value: Any) -> bool:
    """Whether a value of a record is null, or an empty text, list or object, which counts as a missing key."""
    return value is None or (isinstance(value, str | list | dict) and not value)
