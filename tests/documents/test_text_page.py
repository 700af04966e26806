"""Texts on pages: every word is on some page, within its margins, and pages are the same in every process."""

import csv
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from medvl.documents.text_page import (
    LINE_HEIGHT,
    LINES,
    MARGIN,
    draw_text_page,
    load_font,
    missing_characters,
    page_lines,
    wrap_text,
)

NOTE = (
    "CHIEF COMPLAINT:  Shortness of breath.\n\n\n\nPLAN:\t1. Lasix 40 mg IV.\r\n2. BNP 8.4 µg/mL ≥ 3\n" * 40
)


def test_every_word_is_on_some_page_in_order():
    pages = page_lines(NOTE)
    assert [word for page in pages for line in page for word in line.split()] == NOTE.split()
    assert len(pages) > 1
    # Pages begin and end with text, and of empty lines in a row one is left.
    texts = ["a", *["b"] * (LINES - 1), "", "c", "", "", "d", ""]
    assert page_lines("\n".join(["", *texts])) == [tuple(texts[:LINES]), ("c", "", "d")]
    last_is_empty = ["b"] * (LINES - 1) + ["", "c"]
    assert page_lines("\n".join(last_is_empty)) == [("b",) * (LINES - 1), ("c",)]


def test_a_page_shows_its_lines_and_leaves_the_margins_white():
    pages = page_lines(NOTE)
    images = [draw_text_page(lines, n, len(pages)) for n, lines in enumerate(pages, 1)]
    for image, lines in zip(images, pages, strict=True):
        assert image.shape == (1100, 850, 3)
        assert image.dtype == np.uint8
        dark = image.min(-1) < 250
        assert not dark[:, :MARGIN].any()
        assert not dark[:, -MARGIN:].any()
        assert not dark[:MARGIN].any()
        # A line of text is drawn in its place, an empty one is not.
        for i, line in enumerate(lines):
            top = MARGIN + i * LINE_HEIGHT
            assert dark[top : top + LINE_HEIGHT].any() == bool(line)
        assert dark[-MARGIN:].any()  # the footer
    assert len({image.tobytes() for image in images}) == len(pages)


def test_no_line_is_wider_than_asked_and_long_words_are_broken():
    font = load_font(size=12)
    long = "pneumonoultramicroscopic" * 9
    lines = wrap_text(f"a {long} b c\n\nd", font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join("".join(lines).split()) == f"a{long}bcd"
    assert lines[0] == "a"
    assert lines[-2:] == ["", "d"]
    assert wrap_text("  one \t two ", font, 100) == ["one two"]


def test_pages_are_the_same_in_another_process():
    code = (
        "import hashlib; from medvl.documents.text_page import draw_text_page, page_lines;"
        "print(hashlib.sha256(draw_text_page(page_lines('Lasix 40 mg ' * 900)[0], 1, 2).tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    image = draw_text_page(page_lines("Lasix 40 mg " * 900)[0], 1, 2)
    assert hashlib.sha256(image.tobytes()).hexdigest() == run.stdout.strip()


def test_what_cannot_be_drawn_is_refused():
    assert missing_characters("a µ ≥ \n\t") == []
    assert missing_characters("a漢\0") == ["\0", "漢"]
    with pytest.raises(ValueError, match=r"DejaVuSans cannot draw U\+0000, U\+6F22; replace"):
        page_lines("a\0 漢")
    with pytest.raises(ValueError, match="must hold a word"):
        page_lines(" \n ")


def test_real_notes(shared_data):
    with open(shared_data / "docs/MTS-Dialog-TrainingSet.csv", newline="", encoding="utf-8") as f:
        notes = [row["section_text"] for row in csv.DictReader(f)]
    for note in notes[::40]:
        shown = "".join(line for page in page_lines(note) for line in page)
        assert "".join(shown.split()) == "".join(note.split())
