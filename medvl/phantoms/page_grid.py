"""Drawn pages whose glyphs stand in cells: what a small model that is trained from scratch can learn to read.

A cell is as large as a visual token (28 pixels for Qwen2.5-VL), so that each token holds one glyph at most.
"""

import numpy as np

from medvl.documents.fields import Fields
from medvl.documents.text_page import load_font
from medvl.phantoms import page_layout
from medvl.phantoms.page_layout import Piece, Span, join, spans_of
from medvl.phantoms.page_records import pick

CELL = 28  # pixels
_FONTS = ("DejaVuSansMono", "DejaVuSansMono-Bold")


def lay_out_grid(
    fields: Fields, rows: int, columns: int, gen: np.random.Generator
) -> tuple[Fields, list[list[Piece]]]:
    """The fields of a page as they are printed, and its words, a piece for each glyph.

    Lines begin at a drawn row and column. What does not fit loses the last row of its longest list. A strip below
    the last row, as high as a cell, has the notice.
    """
    lines = list[list[Span]]()
    for line in _lines(fields):
        lines += page_layout.wrap(line, columns, len)
    if len(lines) > rows:
        return lay_out_grid(page_layout.shorten(fields), rows, columns, gen)
    font = load_font(pick(gen, _FONTS), 0.78 * CELL)
    first = int(gen.integers(rows - len(lines) + 1))
    placed = []
    for row, line in enumerate(lines, first):
        free = columns - len(page_layout.text_of(line))
        assert free >= 0, "a word of the grid must fit into a line"
        column = int(gen.integers(min(2, free) + 1))
        placed += _place(line, row, column, font)
    notice = Piece(CELL // 4, (rows + 0.7) * CELL, "SYNTHETIC", load_font("DejaVuSans", CELL / 2))
    return fields, [*placed, [notice]]


def _place(line: list[Span], row: int, column: int, font: page_layout.Font) -> list[list[Piece]]:
    """The words of a line: a piece for each glyph, in the middle of its cell."""
    placed: list[list[Piece]] = [[]]
    for text, path in line:
        for glyph in text:
            if glyph == " ":
                placed.append([])
            else:
                x = round((column + 0.5) * CELL - font.getlength(glyph) / 2)
                marks = ((path, 0, 1),) if path else ()
                placed[-1].append(Piece(x, row * CELL + 20, glyph, font, marks))
            column += 1
    return placed


def _lines(fields: Fields) -> list[list[Span]]:
    """A line for each kind of field, after a label; free text has none."""
    lines = []
    patient = spans_of(fields.patient, "patient", "age", "sex")
    if patient:
        lines.append([("PT ", ""), *patient])
    diagnoses = [spans_of(d, f"diagnoses/{i}", "name") for i, d in enumerate(fields.diagnoses)]
    if diagnoses:
        lines.append([("DX ", ""), *join(diagnoses)])
    for i, medication in enumerate(fields.medications):
        path = f"medications/{i}"
        name, dose = spans_of(medication, path, "name"), spans_of(medication, path, "dose", "unit", gap="")
        frequency = page_layout.frequency_spans(medication, path)
        lines.append([("RX ", ""), *join([name, dose, frequency])])
    for i, lab in enumerate(fields.labs):
        lines.append([("LAB ", ""), *spans_of(lab, f"labs/{i}", "name", "value", "flag")])
    for i, vital in enumerate(fields.vitals):
        lines.append(spans_of(vital, f"vitals/{i}", "name", "value"))
    if fields.text:
        lines.append(join([[(word, "text")] for word in fields.text.split()]))
    return lines
