"""Texts on pages: every word is on some page, within its margins, and pages are the same in every process."""

import csv
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from medvl.documents import text_page
from medvl.documents.text_page import TextPageConfig, draw_text_pages, missing_characters, paginate, wrap_text

NOTE = (
    "CHIEF COMPLAINT:  Shortness of breath.\n\n\n\nPLAN:\t1. Lasix 40 mg IV.\r\n2. BNP 8.4 µg/mL ≥ 3\n" * 40
)
SMALL = TextPageConfig(width=200, height=200, margin=24, font_size=10, line_height=13)


def words(text):
    return text.split()


def test_every_word_is_on_some_page_in_order():
    for cfg in (
        TextPageConfig(),
        SMALL,
        TextPageConfig(font="DejaVuSansMono", font_size=30, line_height=40, margin=70),
    ):
        pages = draw_text_pages(NOTE, cfg)
        assert [word for page in pages for word in words(page.text)] == words(NOTE)
        assert len(pages) > 1


def test_a_page_shows_its_lines_and_leaves_the_margins_white():
    pages = draw_text_pages(NOTE, SMALL)
    for page in pages:
        assert page.image.shape == (200, 200, 3)
        assert page.image.dtype == np.uint8
        dark = page.image.min(-1) < 250
        left = SMALL.margin
        assert not dark[:, :left].any()
        assert not dark[:, 200 - left :].any()
        assert not dark[:left].any()
        # A line of text is drawn in its place, an empty one is not.
        for i, line in enumerate(page.lines):
            top = left + i * SMALL.line_height
            assert dark[top : top + SMALL.line_height].any() == bool(line)
        assert dark[200 - left :].any()  # the footer
    assert len({page.image.tobytes() for page in pages}) == len(pages)


def test_no_line_is_wider_than_asked_and_long_words_are_broken():
    font = text_page.load_font(size=12)
    long = "pneumonoultramicroscopic" * 9
    lines = wrap_text(f"a {long} b c\n\nd", font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join("".join(lines).split()) == f"a{long}bcd"
    assert lines[0] == "a"
    assert lines[-2:] == ["", "d"]
    assert wrap_text("  one \t two ", font, 100) == ["one two"]


def test_pages_begin_and_end_with_text():
    assert paginate(["", "a", "", "", "b", "", "c", ""], 2) == [["a"], ["b"], ["c"]]
    assert paginate(["a", "b", "", "c"], 2) == [["a", "b"], ["c"]]
    assert paginate(["", ""], 2) == []


def test_pages_are_the_same_in_another_process():
    code = (
        "import hashlib; from medvl.documents.text_page import draw_text_pages as d;"
        "print(hashlib.sha256(b''.join(p.image.tobytes() for p in d('Lasix 40 mg ' * 900))).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    images = b"".join(page.image.tobytes() for page in draw_text_pages("Lasix 40 mg " * 900))
    assert hashlib.sha256(images).hexdigest() == other


def test_what_cannot_be_drawn_is_refused():
    assert missing_characters("a µ ≥ \n\t") == []
    assert missing_characters("a漢\0") == ["\0", "漢"]
    with pytest.raises(ValueError, match=r"DejaVuSans cannot draw U\+0000, U\+6F22; replace"):
        draw_text_pages("a\0 漢")
    with pytest.raises(ValueError, match="must hold a word"):
        draw_text_pages(" \n ")
    with pytest.raises(ValueError, match=r"one of DejaVuSans, .*got 'Arial'"):
        draw_text_pages("a", TextPageConfig(font="Arial"))
    with pytest.raises(ValueError, match="four lines must fit"):
        TextPageConfig(width=100, height=200)
    with pytest.raises(ValueError, match="line_height must be at least font_size"):
        TextPageConfig(line_height=8)


def test_real_notes(shared_data):
    with open(shared_data / "docs/MTS-Dialog-TrainingSet.csv", newline="", encoding="utf-8") as f:
        notes = [row["section_text"] for row in csv.DictReader(f)]
    for note in notes[::40]:
        pages = draw_text_pages(note, SMALL)
        shown = "".join(word for page in pages for word in words(page.text))
        assert shown == "".join(words(note))
