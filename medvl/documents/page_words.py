"""Document anchoring: the words of a conversation's pages in its prompt, as text that any language model reads."""

from collections.abc import Sequence
from typing import Any

from attrs import evolve

from medvl.base.display import track
from medvl.base.files import PathLike
from medvl.documents.read_page import read_page, read_page_once
from medvl.documents.words import words_as_text
from medvl.language.conversations import Conversation
from medvl.language.vision import open_item

_TAG = "<image>"
_FRAME = "[text of the image, read by OCR]\n{text}\n[end of the text]\n"


def add_page_words(
    conversations: Sequence[Conversation], folder: PathLike | None, window: tuple[float, ...] = ()
) -> list[Conversation]:
    """Conversations with the words of each image behind its tag; images without words stay as they are.

    Args:
        folder: where words are kept, so that each page is read once; None = nowhere.
        window: as `ChatConfig.window`.
    Raises:
        ValueError: with the place of the conversation: as `read_page` and `open_item`.
    """
    anchored = list[Conversation]()
    for conversation in track(conversations, "reading the words of images"):
        try:
            texts = [_text_of(item, folder, window) for item in conversation.images]
        except ValueError as e:
            raise ValueError(f"{conversation.place}: {e}") from e
        anchored.append(_anchor(conversation, texts))
    return anchored


def _text_of(item: Any, folder: PathLike | None, window: tuple[float, ...]) -> str:
    """The words of an image or its file, framed; "" where there are none."""
    image = open_item(item, window=window)
    words = read_page(image) if folder is None else read_page_once(image, folder)
    if not words:
        return ""
    # A page may show tags and special tokens as text; here they must not stand for images or turns.
    text = words_as_text(words).replace("<|", "< |").replace("|>", "| >").replace(_TAG, "< image >")
    return _FRAME.format(text=text)


def _anchor(conversation: Conversation, texts: Sequence[str]) -> Conversation:
    """A conversation with a text behind the tag of each of its images."""
    remaining = iter(texts)
    messages = list[dict[str, str]]()
    for message in conversation.messages:
        first, *others = message["content"].split(_TAG)
        content = first
        for other in others:
            text = next(remaining)
            content += f"{_TAG}\n{text}{other.lstrip(chr(10))}" if text else _TAG + other
        messages.append({**message, "content": content})
    return evolve(conversation, messages=tuple(messages))
