"""Optical character recognition: the words of a page with their boxes. Only this file imports rapidocr."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medvl.base.files import PathLike, write_text
from medvl.documents.words import Box, Word, join_boxes, lines_of, part_of_box, words_of_cells
from medvl.language.images import Picture, to_rgb

_MISSING = "reading pages needs rapidocr and onnxruntime; pip install 'medvl[ocr]'"
# To be changed with all that changes words or boxes: those that are kept are for one reader.
_READER = "PP-OCRv6 small, 1"
# The longer side of what is read: a letter page at 180 dpi. It bounds memory and time of any page.
_LONGEST = 2000
_LONGEST_FOUND = 1280
_STRIP = 20  # times as long as wide: shrunk to `_LONGEST`, no letter of a longer strip can be read
# The recogniser was trained on Chinese, too, and sometimes writes ASCII in its full width.
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def read_page(image: Picture) -> list[Word]:
    """The words of a page in reading order; none of an empty page.

    The same image gives the same words: the networks run on one thread of the CPU. Pages that stand upside
    down are not turned.

    Args:
        image: of any mode that `images.to_rgb` takes, or uint8 [y, x, 3]. An image whose longer side is above
            2,000 pixels is read at that size.
    Returns:
        words with boxes in pixels of `image`; the score is the mean probability of the characters.
    Raises:
        ValueError: rapidocr is not installed; an image that `to_rgb` refuses, or a strip that is more than 20
            times as long as wide.
    Source: PP-OCRv6 (small) as rapidocr ships it, Apache 2.0.
    """
    page = to_rgb(image, "read_page")
    if max(page.size) > _STRIP * min(page.size):
        raise ValueError(
            f"read_page: a page must be at most {_STRIP} times as long as wide, got {page.width} x "
            f"{page.height}; cut it into pages"
        )
    scale = max(1.0, max(page.size) / _LONGEST)
    if scale > 1:
        # Pillow's filter grows with the scale; the reader's own resizing would skip pixels.
        size = (max(1, round(page.width / scale)), max(1, round(page.height / scale)))
        page = page.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(page)[..., ::-1]  # OpenCV's order of the colours
    output = _reader()(np.ascontiguousarray(pixels), return_word_box=True)
    words = list[Word]()
    for number in range(len(output)):
        piece = Word(output.txts[number], _hull(output.boxes[number]), float(output.scores[number]))
        words += _words_of_piece(piece, output.word_results, number)
    grey = np.asarray(page.convert("L"), np.int16)
    tight = list[Word]()
    for line in lines_of(words):
        for cell in words_of_cells(line):
            tight += tighten_boxes(grey, cell)
    boxes = [(np.array(word.box) * scale).tolist() for word in tight]
    return [Word(word.text, tuple(box), word.score) for word, box in zip(tight, boxes, strict=True)]


def read_page_once(image: Picture, folder: PathLike) -> list[Word]:
    """As `read_page`; the words are kept in `folder`, and found there by the pixels of the page.

    Raises:
        ValueError: as `read_page`; the file of the words is broken.
    """
    page = to_rgb(image, "read_page")
    content = hashlib.sha256(f"{_READER} {page.size} ".encode() + page.tobytes())
    path = Path(folder) / f"{content.hexdigest()[:20]}.json"
    if not path.exists():
        words = read_page(page)
        write_text(path, json.dumps([[word.text, word.box, word.score] for word in words]))
        return words
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [
            Word(text, (left, top, right, bottom), score) for text, (left, top, right, bottom), score in rows
        ]
    except (ValueError, TypeError) as e:
        raise ValueError(
            f"{path}: must be the words of a page ({e}); remove it, the page will be read again"
        ) from e


def check_reader() -> None:
    """Raise a ValueError where pages cannot be read, because an extra is not installed."""
    _reader()


@functools.cache
def _reader() -> Any:
    """The networks, loaded once."""
    # From 1.29 on onnxruntime tells Microsoft of its models and machines unless this is set before it is loaded; pages of
    # patients are read where nothing may leave the house.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        from rapidocr import RapidOCR
    except ImportError as e:
        raise ValueError(_MISSING) from e
    threads = "EngineConfig.onnxruntime.{}_op_num_threads"
    return RapidOCR(
        params={
            "Global.log_level": "error",
            # It decides for each piece of text alone whether to turn it around; pages are upright here.
            "Global.use_cls": False,
            # Lines are found on the page at this size: as many as at 2,000 pixels, in half the time. Letters
            # are read at the full size.
            "Det.limit_type": "max",
            "Det.limit_side_len": _LONGEST_FOUND,
            threads.format("intra"): 1,
            threads.format("inter"): 1,
        }
    )


def _words_of_piece(piece: Word, word_results: Any, number: int) -> list[Word]:
    """The words of a piece of a line, with the boxes of the reader where it has one for each of them."""
    letters = "".join(piece.text.split())
    results = word_results[number] if number < len(word_results) else ()
    found = [result for result in results or () if result[2] is not None]
    if "".join(text for text, _, _ in found) == letters and found:
        return [Word(text.translate(_FULL_WIDTH), _hull(box), float(score)) for text, score, box in found]
    words = list[Word]()
    position = 0
    for text in piece.text.split():
        start = piece.text.index(text, position)
        position = start + len(text)
        box = part_of_box(piece, start, position)
        words.append(Word(text.translate(_FULL_WIDTH), box, piece.score))
    return words


def tighten_boxes(grey: np.ndarray, cell: Sequence[Word]) -> list[Word]:
    """Words of a cell with boxes that end with their ink; the reader's own are about twice as high.

    All get the height of the highest letter and the lowest descender among them, so that "once" is as high as
    "daily" beside it.

    Args:
        grey: the page, int16 [y, x].
    """
    sides = list[tuple[float, float]]()
    above = below = 0.0  # of the middle of a word
    for word in cell:
        left, top, right, bottom = (max(0, round(x)) for x in word.box)
        ink = _ink(grey[top:bottom, left:right])
        if ink is None:
            return list(cell)
        rows, columns = ink
        sides.append((left + columns[0], left + columns[1]))
        above = max(above, word.centre[1] - (top + rows[0]))
        below = max(below, top + rows[1] - word.centre[1])
    tight = list[Word]()
    for word, (start, stop) in zip(cell, sides, strict=True):
        box = (float(start), word.centre[1] - above, float(stop), word.centre[1] + below)
        tight.append(Word(word.text, box, word.score))
    return tight


def _ink(grey: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(first row, end), (first column, end) of the letters in a box; None where it shows none."""
    if not grey.size:
        return None
    contrast = np.abs(grey - np.median(grey))
    ink = contrast > max(20, 0.5 * contrast.max())
    # Letters end before the box does; what runs through it is a rule between columns.
    ink[:, ink.mean(0) > 0.9] = False
    amounts = ink.sum(1)
    quarter = len(amounts) // 4
    middle = amounts[quarter : len(amounts) - quarter]
    if not middle.any():
        return None
    # From the fullest row of the middle half up to a gap: the rules of a table lie beyond it, the dot of an i
    # does not.
    first = last = quarter + int(middle.argmax())
    gap = max(1, len(amounts) // 8)
    while amounts[max(0, first - gap) : first].any():
        first -= 1
    while amounts[last + 1 : last + 1 + gap].any():
        last += 1
    columns = np.flatnonzero(ink[first : last + 1].any(0))
    return (first, last + 1), (int(columns[0]), int(columns[-1]) + 1)


def _hull(corners: Any) -> Box:
    """The upright box around four corners."""
    return join_boxes((float(x), float(y), float(x), float(y)) for x, y in corners)
