"""The words that rapidocr reads on pages that are drawn here."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from medvl.documents import read_page as module
from medvl.documents.read_page import read_page
from medvl.documents.words import overlap, words_as_text

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
CELLS = {"Potassium": (30, 20), "5.9": (190, 20), "mmol/L": (260, 20), "Metformin 500 mg": (30, 60)}


@pytest.fixture(scope="module")
def drawn():
    """(image, box of each cell, as high as a capital and a descender)."""
    image = Image.new("RGB", (380, 110), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(FONT), 20)
    for text, place in CELLS.items():
        draw.text(place, text, font=font, fill="black")
    boxes = {}
    for text, (x, y) in CELLS.items():
        _, top, _, bottom = draw.textbbox((x, y), "Hg", font=font)
        boxes[text] = (x, top, x + font.getlength(text), bottom)
    return image, boxes


@pytest.fixture(scope="module")
def words(drawn):
    pytest.importorskip("rapidocr")
    return read_page(drawn[0])


def test_words_are_those_of_the_page(words):
    assert words_as_text(words) == "Potassium  5.9  mmol/L\nMetformin 500 mg"
    assert all(0.5 < word.score <= 1 for word in words)


def test_boxes_lie_on_the_words(words, drawn):
    boxes = {word.text: word.box for word in words}
    for text in ("Potassium", "5.9", "mmol/L"):
        assert overlap(boxes[text], drawn[1][text]) > 0.5


def test_an_array_of_the_same_page_gives_the_same_words(words, drawn):
    assert read_page(np.asarray(drawn[0])) == words


def test_a_large_page_is_read_smaller_and_its_boxes_are_its_own(words, drawn):
    large = read_page(drawn[0].resize((380 * 8, 110 * 8)))
    assert [word.text for word in large] == [word.text for word in words]
    for word, other in zip(words, large, strict=True):
        assert overlap(word.box, tuple(x / 8 for x in other.box)) > 0.5


def test_an_empty_page_has_no_words():
    pytest.importorskip("rapidocr")
    assert read_page(Image.new("L", (300, 200), 255)) == []
    assert read_page(Image.new("L", (1, 1))) == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (30, 9000)), "at most 20 times as long as wide, got 30 x 9000"),
        (Image.new("I;16", (30, 30)), "more than 8 bits"),
        ("page.png", "open_image reads files"),
    ],
)
def test_what_is_no_page_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_page(image)


def test_without_rapidocr_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    module._reader.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'medvl\[ocr\]'"):
        read_page(Image.new("L", (30, 30)))
    module._reader.cache_clear()


def test_a_piece_whose_words_have_no_boxes_is_parted_by_letters():
    piece = module.Word("BP 120/80", (0, 0, 90, 20), 0.9)
    parted = module._words_of_piece(piece, ((("BP", 1.0, None),),), 0)
    assert [(word.text, word.box, word.score) for word in parted] == [
        ("BP", (0, 0, 20, 20), 0.9),
        ("120/80", (30, 0, 90, 20), 0.9),
    ]
    piece = module.Word("Ｈ：", (0, 0, 20, 20), 0.9)
    assert [word.text for word in module._words_of_piece(piece, (), 0)] == ["H:"]


def test_boxes_end_with_the_ink_of_their_cell_and_not_with_the_rules_of_its_table():
    grey = np.full((60, 120), 240, np.int16)
    grey[[2, 40]] = 90  # rules above and below
    grey[:, [6, 79]] = 20  # and beside
    grey[15:25, 10:30] = 20  # "25"
    grey[12:28, 50:70] = 20  # "mg" goes lower
    cell = [module.Word("25", (5, 0, 40, 42)), module.Word("mg", (42, 0, 80, 42))]
    tight = module.tighten_boxes(grey, cell)
    assert [word.box for word in tight] == [(10, 12, 30, 28), (50, 12, 70, 28)]
    assert module.tighten_boxes(np.full_like(grey, 240), cell) == cell
    outside = [module.Word("x", (200, 0, 240, 42))]
    assert module.tighten_boxes(grey, outside) == outside
    rule_alone = [module.Word("-", (85, 0, 110, 42))]  # its ink is at the edges, none in the middle
    assert module.tighten_boxes(grey, rule_alone) == rule_alone


def test_a_page_is_read_once(tmp_path, monkeypatch):
    pages = []

    def read(page):
        pages.append(page)
        return [module.Word("8.4", (1.0, 2.0, 3.0, 4.5), 0.9)]

    monkeypatch.setattr(module, "read_page", read)
    page = Image.new("RGB", (30, 20), "white")
    words = module.read_page_once(page, tmp_path)
    assert module.read_page_once(np.asarray(page), tmp_path) == words == read(page)
    assert len(pages) == 2  # the first time, and the line above
    page.putpixel((3, 3), (0, 0, 0))
    module.read_page_once(page, tmp_path)
    module.read_page_once(page.resize((20, 30)), tmp_path)
    assert len(pages) == 4
    assert len(list(tmp_path.iterdir())) == 3
    for path in tmp_path.iterdir():
        path.write_text('[["8.4", [1, 2, 3]]]')
    with pytest.raises(ValueError, match="remove it, the page will be read again"):
        module.read_page_once(page, tmp_path)


def test_reading_writes_nothing_and_tells_nobody(tmp_path):
    """onnxruntime keeps a queue of events for its maker in the home folder, unless it is told not to."""
    code = (
        "import os; os.environ.pop('CI', None)\n"  # there it is silent anyway
        "from PIL import Image; from medvl.documents.read_page import read_page\n"
        "read_page(Image.new('RGB', (300, 200), 'white'))\n"
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **home}, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
