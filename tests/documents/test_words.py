"""Words of pages as lines, cells and text."""

import math

import pytest

from medvl.documents.words import Word, cells_of, lines_of, overlap, part_of_box, words_as_text

PAGE = [
    *[("Test", 50, 100), ("Result", 200, 100), ("Unit", 320, 100)],
    *[("Serum", 50, 130), ("potassium", 110, 130), ("5.9", 262, 130), ("mmol/L", 380, 130)],
    *[("HbA1c", 50, 160), ("8.4", 262, 160), ("%", 380, 160)],
]


def page(tilt=0.0, bend=0.0):
    """The words of PAGE, 10 pixels a letter and 20 high, turned by `tilt` degrees around the corner."""
    words = []
    for text, left, top in PAGE:
        slope = math.tan(math.radians(tilt + bend * top))
        x = left + 5 * len(text)
        top += slope * x
        words.append(Word(text, (left, top, left + 10 * len(text), top + 20)))
    return words


@pytest.mark.parametrize(("tilt", "bend"), [(-5, 0), (-2, 0), (0, 0), (1, 0), (5, 0), (-1, 0.02), (2, -0.02)])
def test_lines_are_those_of_the_page_however_it_lies(tilt, bend):
    words = page(tilt, bend)
    texts = [[word.text for word in line] for line in lines_of(words[::-1])]
    expected = [["Test", "Result", "Unit"], ["Serum", "potassium", "5.9", "mmol/L"], ["HbA1c", "8.4", "%"]]
    assert texts == expected


def test_words_with_a_space_between_them_are_one_cell():
    line = lines_of(page())[1]
    assert [(cell.text, cell.box) for cell in cells_of(line)] == [
        ("Serum potassium", (50, 130, 200, 150)),
        ("5.9", (262, 130, 292, 150)),
        ("mmol/L", (380, 130, 440, 150)),
    ]


def test_text_has_a_line_for_each_line_and_two_spaces_between_cells():
    expected = "Test  Result  Unit\nSerum potassium  5.9  mmol/L\nHbA1c  8.4  %"
    assert words_as_text(page()) == expected
    assert words_as_text([]) == ""


def test_a_cell_is_as_sure_as_its_least_sure_word():
    a, b = Word("blood", (0, 0, 50, 20), 0.9), Word("pressure", (55, 0, 130, 20), 0.4)
    assert [cell.score for cell in cells_of([a, b])] == [0.4]


def test_part_of_box_is_that_of_the_characters():
    assert part_of_box(Word("500mg", (10, 0, 60, 20)), 3, 5) == (40, 0, 60, 20)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),
    ],
)
def test_overlap(a, b, expected):
    assert overlap(a, b) == pytest.approx(expected)
