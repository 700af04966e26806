"""Plain text as pages: wrapped into lines, cut into pages and drawn. No word is left out or clipped."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from attrs import field, frozen
from PIL import Image, ImageDraw, ImageFont

from medvl.base import config
from medvl.base.text import few, short

_INK = (20, 20, 20)
_FOOTER_INK = (110, 110, 110)


@frozen(kw_only=True)
class TextPageConfig:
    """The layout of a page of text; lengths in pixels. The default is a letter page at 100 dpi."""

    width: int = 850
    height: int = 1100
    margin: int = 60
    font: str = "DejaVuSans"  # a .ttf that matplotlib brings: DejaVuSans, DejaVuSerif, DejaVuSansMono
    font_size: int = 16
    line_height: int = 21

    def __attrs_post_init__(self) -> None:
        sides = (64, 2**14)
        config.check_bounds(self, "text page", width=sides, height=sides, margin=(0, 2**12))
        config.check_bounds(self, "text page", font_size=(6, 256), line_height=(6, 512))
        # The footer stands in the lower margin.
        if self.line_height < self.font_size or self.margin < 2 * self.font_size:
            raise ValueError(
                f"text page: line_height must be at least font_size and margin twice as much, got "
                f"{self.line_height}, {self.font_size} and {self.margin}"
            )
        if min(self.text_width, self.text_height) < 4 * self.line_height:
            raise ValueError(
                f"text page: four lines must fit between the margins, got {self.text_width} x "
                f"{self.text_height} pixels; make the margin or the font smaller"
            )

    @property
    def text_width(self) -> int:
        """Pixels of a line."""
        return self.width - 2 * self.margin

    @property
    def text_height(self) -> int:
        """Pixels of all lines of a page."""
        return self.height - 2 * self.margin


@frozen(kw_only=True)
class TextPage:
    """One page of a text.

    Attributes:
        image: uint8 [y, x, 3].
        lines: what can be read on it, from top to bottom, without the footer.
    """

    image: np.ndarray = field(repr=False)
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines)


@cache
def load_font(name: str = "DejaVuSans", size: int = 16) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib, so that pages look the same on every machine.

    Args:
        name: of the .ttf file, such as "DejaVuSans-Bold".
        size: in pixels.
    Raises:
        ValueError: matplotlib has no such font.
    """
    # Basic layout: the other one depends on a library that only some machines have.
    return ImageFont.truetype(str(_font_path(name)), size, layout_engine=ImageFont.Layout.BASIC)


def missing_characters(text: str, font: str = "DejaVuSans") -> list[str]:
    """Characters of a text that a font cannot draw, sorted; white space counts as drawn."""
    drawable = _drawable_characters(font)
    return sorted(char for char in set(text) if not char.isspace() and ord(char) not in drawable)


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
            *full_lines, line = _break_word(word, font, width)
            lines += full_lines
        lines.append(line)  # "" of an empty line
    return lines


def draw_text_pages(text: str, cfg: TextPageConfig = TextPageConfig()) -> list[TextPage]:
    """Draw a text onto as many white pages as it needs: `draw_text_page` of each of `page_lines`.

    Raises:
        ValueError: as `page_lines`.
    """
    pages = page_lines(text, cfg)
    numbered = enumerate(pages, 1)
    return [TextPage(image=draw_text_page(page, n, len(pages), cfg), lines=page) for n, page in numbered]


def page_lines(text: str, cfg: TextPageConfig = TextPageConfig()) -> list[tuple[str, ...]]:
    """The lines of each page of a text.

    The words of all pages one after the other are the words of the text; runs of empty lines become one.

    Raises:
        ValueError: a text without a word, or with characters that the font cannot draw.
    """
    if not text.strip():
        raise ValueError(f"page_lines: the text must hold a word, got {short(text)}")
    missing = missing_characters(text, cfg.font)
    if missing:
        codes = [f"U+{ord(char):04X}" for char in missing]
        raise ValueError(
            f"page_lines: {cfg.font} cannot draw {few(codes)}; replace them, or take another font"
        )
    lines = wrap_text(text, load_font(cfg.font, cfg.font_size), cfg.text_width)
    return [tuple(page) for page in paginate(lines, cfg.text_height // cfg.line_height)]


def draw_text_page(
    lines: Sequence[str], number: int, total: int, cfg: TextPageConfig = TextPageConfig()
) -> np.ndarray:
    """A white page, uint8 [y, x, 3], with lines as `page_lines` gives them.

    Args:
        number, total: which of how many pages it is. The footer says it, and that the page is synthetic.
    """
    picture = Image.new("RGB", (cfg.width, cfg.height), "white")
    draw = ImageDraw.Draw(picture)
    font = load_font(cfg.font, cfg.font_size)
    for i, line in enumerate(lines):
        draw.text((cfg.margin, cfg.margin + i * cfg.line_height), line, _INK, font)
    footer = f"SYNTHETIC PAGE {number} OF {total}"
    small = load_font(cfg.font, max(6, cfg.font_size * 3 // 4))
    left = (cfg.width - small.getlength(footer)) / 2
    draw.text((left, cfg.height - cfg.margin * 2 / 3), footer, _FOOTER_INK, small)
    return np.asarray(picture)


def paginate(lines: list[str], lines_per_page: int) -> list[list[str]]:
    """Cut lines into pages. Of empty lines in a row one is kept, and none at the top or the end of a page."""
    pages: list[list[str]] = [[]]
    for line in lines:
        page = pages[-1]
        if not line and (not page or not page[-1]):
            continue
        if len(page) == lines_per_page:
            page = []
            pages.append(page)
            if not line:
                continue
        page.append(line)
    for page in pages:
        if page and not page[-1]:
            page.pop()
    return [page for page in pages if page]


def _break_word(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word as pieces that fit into a line; one piece if the word does."""
    pieces = [""]
    for char in word:
        if pieces[-1] and font.getlength(pieces[-1] + char) > width:
            pieces.append("")
        pieces[-1] += char
    return pieces


@cache
def _font_path(name: str) -> Path:
    import matplotlib  # here: it takes a while to load, and most users of this module's callers draw nothing

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    path = folder / f"{name}.ttf"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("DejaVu*.ttf"))
        raise ValueError(f"font: must be one of {', '.join(names)}, got {name!r}")
    return path


@cache
def _drawable_characters(font: str) -> frozenset[int]:
    """Code points for which a font has a glyph."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_path(font))).get_charmap())
