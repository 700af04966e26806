"""Plain text as pages: wrapped into lines, cut into pages and drawn. No word is left out or clipped."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medvl.base.text import few, short

# A letter page at 100 dpi; lengths in pixels.
WIDTH, HEIGHT, MARGIN = 850, 1100, 60
FONT, FONT_SIZE, LINE_HEIGHT = "DejaVuSans", 16, 21
LINES = (HEIGHT - 2 * MARGIN) // LINE_HEIGHT  # of a page


@lru_cache(256)
def load_font(name: str = FONT, size: float = FONT_SIZE) -> ImageFont.FreeTypeFont:
    """A font of matplotlib's own folder ("DejaVuSans-Bold"), so that pages look the same on every machine; `size` in
    pixels.
    """
    # Basic layout: the other one depends on a library that only some machines have.
    return ImageFont.truetype(_font_path(name), size, layout_engine=ImageFont.Layout.BASIC)


def missing_characters(text: str) -> list[str]:
    """Characters of a text that the font of these pages cannot draw, sorted; white space counts as drawn."""
    return sorted(char for char in set(text) if not char.isspace() and ord(char) not in _drawable())


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of a text, none wider than `width` pixels. Line breaks of the text are kept, runs of other
    white space become one space, and a word that is wider than a line is broken between two characters.
    """
    lines = list[str]()
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            line = ""
            for char in word:
                if line and font.getlength(line + char) > width:
                    lines.append(line)
                    line = ""
                line += char
        lines.append(line)  # "" of an empty line
    return lines


def page_lines(text: str) -> list[tuple[str, ...]]:
    """The lines of each page of a text.

    The words of all pages one after the other are the words of the text; of empty lines in a row one is kept, and
    none at the top or the end of a page.

    Raises:
        ValueError: a text without a word, or with characters that the font cannot draw.
    """
    if not text.strip():
        raise ValueError(f"page_lines: the text must hold a word, got {short(text)}")
    if missing := missing_characters(text):
        codes = few([f"U+{ord(char):04X}" for char in missing])
        raise ValueError(f"page_lines: {FONT} cannot draw {codes}; replace them")
    pages: list[list[str]] = [[]]
    for line in wrap_text(text, load_font(), WIDTH - 2 * MARGIN):
        if len(pages[-1]) == LINES:
            pages.append([])
        if line or (pages[-1] and pages[-1][-1]):
            pages[-1].append(line)
    # A page whose only line is empty has none, as its first line is a text.
    return [tuple(page if page[-1] else page[:-1]) for page in pages if page]


def draw_text_page(lines: Sequence[str], number: int, total: int) -> np.ndarray:
    """A white page, uint8 [y, x, 3], with lines as `page_lines` gives them.

    Args:
        number, total: which of how many pages it is. The footer says it, and that the page is synthetic.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + i * LINE_HEIGHT), line, (20, 20, 20), load_font())
    footer, small = f"SYNTHETIC PAGE {number} OF {total}", load_font(FONT, FONT_SIZE * 3 // 4)
    left = (WIDTH - small.getlength(footer)) / 2
    draw.text((left, HEIGHT - MARGIN * 2 / 3), footer, (110, 110, 110), small)
    return np.asarray(picture)


def _font_path(name: str) -> Path:
    import matplotlib  # here: it takes a while to load, and most users of this module's callers draw nothing

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


@lru_cache
def _drawable() -> frozenset[int]:
    """Code points for which the font has a glyph."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_path(FONT))).get_charmap())
