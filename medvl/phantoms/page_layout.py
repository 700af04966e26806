"""Where the fields of a drawn page are printed: fields and a look -> pieces of text with the boxes of their fields.

Lengths are pixels unless they are said to be points (1/72 inch).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import asdict, define, evolve, field, frozen
from PIL import Image, ImageDraw, ImageFont

from medvl.documents.fields import Fields, Lab, Medication
from medvl.documents.text_page import load_font
from medvl.documents.words import Box
from medvl.phantoms.page_records import pick, sample, words

Span = tuple[str, str]  # printed text, and the path of its field ("" for what is no field)
Font = ImageFont.FreeTypeFont
NOTICE = "SYNTHETIC - not a real patient, not for care"
_SMALLEST = 7.0  # points of body text; a page that needs less loses rows instead
# Columns of the tables, by the labels in the words. Tests are a table on every page.
_TABLES = {
    "medications": ("drug", "dose", "route", "frequency"),
    "vitals": ("vital", "value", "unit"),
    "labs": ("test", "value", "unit", "range", "flag"),
}
_SECTIONS = ("procedures", "text", "diagnoses", "medications", "vitals", "labs")
_RADIOLOGY = {"procedures": "exam", "diagnoses": "impression", "text": "findings"}  # how a report calls them


@frozen(kw_only=True)
class Look:
    """How a page looks: one of each of [looks] in `medical_words.toml`, where they are explained.

    Everything is drawn for each page, so that places and column names tell nothing.
    """

    paper: Sequence[int]
    margin: int
    family: str
    size: float
    align: float
    notice_on_top: bool
    patient_on_top: bool
    patient_columns: int
    columns: int
    rows: str
    ruled: str
    spread: bool
    unit_at: str
    gap: str
    order: Sequence[str]  # of sections
    labels: dict[str, str]  # one of each of [labels]
    title: str
    place: str


@frozen
class Piece:
    """Text printed in one go, from `x` on the baseline `y`; `marks` are (path, start, end) in its characters."""

    x: float
    y: float
    text: str
    font: Font
    marks: tuple[tuple[str, int, int], ...] = ()

    def box(self, start: int = 0, end: int | None = None) -> Box:
        """Of some of its characters: as wide as they are, as high as a capital and a descender."""
        left = self.x + self.font.getlength(self.text[:start])
        right = self.x + self.font.getlength(self.text[:end])
        _, top, _, bottom = self.font.getbbox("Hg", anchor="ls")
        return left, self.y + top, right, self.y + bottom


@define
class Sheet:
    """A page while it is laid out."""

    look: Look
    scale: float  # pixels of a point
    pieces: list[Piece] = field(factory=list)
    rules: list[Box] = field(factory=list)  # lines
    fits: bool = True  # nothing is wider than its place or lower than the page

    def font(self, style: str = "", size: float = 1.0) -> Font:
        """The page's font, "-Bold" or plain, in multiples of the size of body text."""
        return load_font(self.look.family + style, round(self.look.size * size * self.scale, 2))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        width, height = self.look.paper
        return round(width * self.scale), round(height * self.scale)

    @property
    def line(self) -> float:
        """From one baseline to the next."""
        return 1.45 * self.look.size * self.scale


def draw_look(kind: str, gen: np.random.Generator) -> Look:
    """The look of a page of this kind."""
    return Look(
        **{name: pick(gen, options) for name, options in words()["looks"].items()},
        order=sample(gen, _SECTIONS, len(_SECTIONS), len(_SECTIONS)),
        labels={name: pick(gen, options) for name, options in words()["labels"].items()},
        title=pick(gen, words()["titles"][kind]),
        place=pick(gen, words()["people"]["places"]),
    )


def lay_out(fields: Fields, look: Look, scale: float) -> tuple[Fields, Sheet]:
    """The sheet of a page, and the fields that are printed on it.

    What does not fit is set smaller, then in one column, and then loses the last row of its longest list: text is
    never cut off.
    """
    for columns in sorted({1, look.columns}, reverse=True):
        for size in np.arange(look.size, _SMALLEST - 0.1, -0.5):
            sheet = Sheet(evolve(look, columns=columns, size=float(size)), scale)
            _compose(sheet, fields)
            if sheet.fits:
                return fields, sheet
    return lay_out(shorten(fields), evolve(look, columns=1, size=_SMALLEST), scale)


def shorten(fields: Fields) -> Fields:
    """Without the last row of the longest list."""
    lists = {name: rows for name, rows in asdict(fields, recurse=False).items() if isinstance(rows, tuple)}
    name = max(lists, key=lambda name: len(lists[name]))
    assert lists[name], "a page of no lists must fit"
    shorter: dict[str, Any] = {name: lists[name][:-1]}
    return evolve(fields, **shorter)


def paint(
    size: tuple[int, int], pieces: Sequence[Piece], rules: Sequence[Box], *, ink: int, paper: int
) -> Image.Image:
    """The picture of a page, grey text and lines on grey paper; mode L."""
    image = Image.new("L", size, paper)
    brush = ImageDraw.Draw(image)
    for rule in rules:
        brush.line(rule, fill=140, width=max(1, size[0] // 1000))
    for piece in pieces:
        brush.text((piece.x, piece.y), piece.text, fill=ink, font=piece.font, anchor="ls")
    return image


def wrap(spans: Sequence[Span], width: float, length: Callable[[str], float]) -> list[list[Span]]:
    """Lines of spans, broken only after a span that ends with a space; no line ends with one.

    Args:
        length: of a text, in the unit of `width`.
    """
    words_of_line = list[list[Span]]()  # spans that stay together
    for span in spans:
        if not words_of_line or words_of_line[-1][-1][0].endswith(" "):
            words_of_line.append([])
        words_of_line[-1].append(span)
    lines = list[list[Span]]()
    for word in words_of_line:
        if lines and length(text_of(lines[-1] + word).rstrip()) <= width:
            lines[-1] += word
        else:
            lines.append(word)
    for line in lines:
        text, path = line.pop()
        line += [(text.rstrip(), path)] if text.strip() else []
    return lines


def text_of(spans: Sequence[Span]) -> str:
    """The text of spans without their paths."""
    return "".join(text for text, _ in spans)


def join(cells: Sequence[Sequence[Span]], separator: str = " ") -> list[Span]:
    """Groups of spans as one line, empty groups left out."""
    line = list[Span]()
    for cell in cells:
        if cell:
            line += [(separator, ""), *cell] if line else cell
    return line


def spans_of(record: object, path: str, *names: str, gap: str = " ") -> list[Span]:
    """The spans of some values of a record; empty ones are left out."""
    values = [(str(getattr(record, name)), f"{path}/{name}") for name in names]
    return join([[value] for value in values if value[0]], gap)


def frequency_spans(medication: Medication, path: str) -> list[Span]:
    """How often a drug is taken, and whether as needed: abbreviated if the frequency is."""
    spans = spans_of(medication, path, "frequency")
    as_needed = "PRN" if medication.frequency.isupper() else "as needed"
    return join([spans, [(as_needed, f"{path}/prn")]]) if medication.prn else spans


def _compose(sheet: Sheet, fields: Fields) -> None:
    """Print all parts from top to bottom."""
    look = sheet.look
    left, width = look.margin * sheet.scale, (look.paper[0] - 2 * look.margin) * sheet.scale
    bottom = (look.paper[1] - look.margin) * sheet.scale
    y = look.margin * sheet.scale
    notice = [(NOTICE, "")]
    if look.notice_on_top:
        y = _print(sheet, left, y, width, notice, sheet.font("-Bold", 0.8))
    if look.patient_on_top:
        y = _patient(sheet, left, y, width, fields) + sheet.line / 2
    y = _print(sheet, left, y, width, [(look.place, "")], sheet.font(), look.align)
    y = _print(sheet, left, y, width, [(look.title, "")], sheet.font("-Bold", 1.5), look.align)
    if not look.patient_on_top:
        y = _patient(sheet, left, y + sheet.line / 2, width, fields)
    sections = [name for name in look.order if getattr(fields, name)]
    if look.columns == 2:
        # Running text and tables of tests need the whole width; the others stand side by side.
        narrow = [name for name in sections if name not in ("text", "labs")]
        sections = [name for name in sections if name in ("text", "labs")]
        half, middle = width / 2 - sheet.line, (len(narrow) + 1) // 2
        first = _print_sections(sheet, left, y, half, fields, narrow[:middle])
        second = _print_sections(sheet, left + width - half, y, half, fields, narrow[middle:])
        y = max(first, second)
    y = _print_sections(sheet, left, y, width, fields, sections)
    if not look.notice_on_top:
        y = max(y, bottom - sheet.line)
        y = _print(sheet, left, y, width, notice, sheet.font("-Bold", 0.8))
    sheet.fits &= y <= bottom + 1


def _print(
    sheet: Sheet,
    x: float,
    y: float,
    width: float,
    spans: Sequence[Span],
    font: Font | None = None,
    align: float = 0.0,
) -> float:
    """Print spans on as many lines as they need, from the top `y`; returns where the next line begins."""
    font = font or sheet.font()
    height = max(sheet.line, 1.3 * font.size)
    for line in wrap(spans, width, font.getlength):
        text, marks = "", []
        for part, path in line:
            if path:
                marks.append((path, len(text), len(text) + len(part)))
            text += part
        free = width - font.getlength(text)
        sheet.fits &= free >= 0
        sheet.pieces.append(
            Piece(round(x + align * free), round(y + 0.72 * height), text, font, tuple(marks))
        )
        y += height
    return y


def _patient(sheet: Sheet, x: float, y: float, width: float, fields: Fields) -> float:
    """The block of the patient: all on one line, or in columns, under a rule or in a frame."""
    labels = sheet.look.labels
    entries = []
    for name in ("name", "record", "sex", "age", "date"):
        value = spans_of(fields.patient, "patient", name)
        if value:
            entries.append([(f"{labels[name]}: ", ""), *value])
    pad = sheet.line / 3
    top, y = y, y + pad
    columns = sheet.look.patient_columns
    if columns == 0:
        y = _print(sheet, x + pad, y, width - 2 * pad, join(entries, "   "))
    else:
        step = (width - 2 * pad) / columns
        for start in range(0, len(entries), columns):
            row = enumerate(entries[start : start + columns])
            y = max(_print(sheet, x + pad + i * step, y, step - pad, entry) for i, entry in row)
    y += pad
    if sheet.look.ruled == "grid":
        sheet.rules += [(x, top, x, y), (x + width, top, x + width, y), (x, top, x + width, top)]
    sheet.rules.append((x, y, x + width, y))
    return y


def _print_sections(
    sheet: Sheet, x: float, y: float, width: float, fields: Fields, sections: Sequence[str]
) -> float:
    """Sections below each other, each with its heading."""
    look = sheet.look
    for name in sections:
        key = _RADIOLOGY[name] if fields.kind == "radiology report" else name
        y += sheet.line / 2
        y = _print(sheet, x, y, width, [(look.labels[key], "")], sheet.font("-Bold", 1.1))
        rows = _rows(fields, name, look)
        lines = [join(row) for row in rows]
        if name == "labs" or (look.rows == "table" and name in _TABLES):
            y = _print_table(sheet, x, y, width, _TABLES[name], rows)
        elif name == "text":
            y = _print(sheet, x, y, width, lines[0])
        elif look.rows == "line":
            y = _print(sheet, x, y, width, join(lines, "; "))
        else:
            for number, line in enumerate(lines, 1):
                sign = {"numbers": f"{number}. ", "bullets": "- "}.get(look.rows, "")
                y = _print(sheet, x, y, width, [(sign, ""), *line] if sign else line)
    return y


def _rows(fields: Fields, section: str, look: Look) -> list[list[list[Span]]]:
    """The cells of each row of a section; an empty cell has no spans."""
    if section == "text":
        return [[[(word, "text")] for word in fields.text.split()]]
    if section == "procedures":
        return [[[(name, f"procedures/{i}")]] for i, name in enumerate(fields.procedures)]
    rows = list[list[list[Span]]]()
    for i, record in enumerate(getattr(fields, section)):
        path = f"{section}/{i}"
        row = [spans_of(record, path, "name")]
        if section == "medications":
            dose = spans_of(record, path, "dose", "unit", gap=look.gap)
            row += [dose, spans_of(record, path, "route"), frequency_spans(record, path)]
        elif section == "vitals":
            row += [spans_of(record, path, "value"), spans_of(record, path, "unit")]
        elif section == "labs":
            row += _test_cells(row[0], record, path, look)
        rows.append(row)
    return rows


def _test_cells(name: list[Span], lab: Lab, path: str, look: Look) -> list[list[Span]]:
    """Value, unit, normal range and flag of a test; its unit may stand after the value or the name instead."""
    value, unit = spans_of(lab, path, "value"), spans_of(lab, path, "unit")
    if unit and look.unit_at == "name":
        name += [(" (", ""), *unit, (")", "")]
    elif look.unit_at == "value":
        value = join([value, unit])
    reference = spans_of(lab, path, "low", "high", gap=" - ")
    if reference and not (lab.low and lab.high):
        reference = [("> " if lab.low else "< ", ""), *reference]
    return [value, unit if look.unit_at == "column" else [], reference, spans_of(lab, path, "flag")]


def _print_table(
    sheet: Sheet, x: float, y: float, width: float, head: Sequence[str], rows: Sequence[Sequence[list[Span]]]
) -> float:
    """A table whose columns are as wide as what stands in them; empty columns are left out."""
    labels = sheet.look.labels
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
    titles = [[(labels[head[i]], "")] for i in filled]
    cells = [[row[i] for i in filled] for row in rows]
    bold, plain, pad = sheet.font("-Bold"), sheet.font(), sheet.line / 3
    widths = []
    for i, title in enumerate(titles):
        texts = [text_of(row[i]) for row in cells]
        widest = max([plain.getlength(text) for text in texts] + [bold.getlength(title[0][0])])
        widths.append(widest + 3 * pad)
    free = width - sum(widths)
    sheet.fits &= free >= 0
    if sheet.look.spread:
        widths = [w + free / len(widths) for w in widths]
    edges = [x + float(e) for e in np.cumsum([0, *widths])]
    top = y
    for line, font in [(titles, bold), *((row, plain) for row in cells)]:
        for i, cell in enumerate(line):
            if cell:
                _print(sheet, edges[i] + pad, y + pad / 2, widths[i], cell, font)
        y += sheet.line + pad
        if sheet.look.ruled != "none":
            sheet.rules.append((x, y, edges[-1], y))
    if sheet.look.ruled == "grid":
        sheet.rules.append((x, top, edges[-1], top))
        sheet.rules += [(edge, top, edge, y) for edge in edges]
    return y
