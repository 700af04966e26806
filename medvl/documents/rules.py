"""The fields of a page from its words, by rules: the baseline that a model has to beat.

Tables are found by the titles of their columns, sections by their headings, the patient by labels such as
"MRN:". Titles, headings and labels are those of medical_terms.toml, and its `keys`.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import define, evolve, field

from medvl.documents.fields import Fields, read_answer
from medvl.documents.quantities import BULLET, find_key, is_listed, medical_terms
from medvl.documents.words import Word, cells_of, join_words, lines_of

_SECTIONS = ("diagnoses", "medications", "labs", "vitals", "procedures", "text")
_COLUMNS = ("name", "dose", "unit", "route", "frequency", "value", "range", "low", "high", "flag")
_ABBREVIATED = ("routes", "frequencies", "labs", "vitals", "diagnoses")
_PATIENT = {"person": "name", "sex": "sex", "age": "age", "record": "record", "date": "date"}
_NOTICE = "SYNTHETIC"  # on every drawn page; it belongs to no section


@define
class _Table:
    """Rows below the titles of columns."""

    columns: list[str]
    starts: list[float]  # left edges of the columns
    end: float  # right edge of the last title
    bottom: float  # of the last row
    height: float
    section: str
    rows: list[dict[str, str]] = field(factory=list)
    ranges: list[Word] = field(factory=list)  # words of reference ranges
    is_open: bool = True


def extract_by_rules(words: Sequence[Word]) -> Fields:
    """The fields of a page, as far as its layout says what they are.

    Args:
        words: of one page, from `read_page`.
    Returns:
        fields as `read_answer` reads them of JSON. Values keep the reader's errors; abbreviations are repaired
        ("P0" is PO, "Sp02" SpO2).
    """
    lines = []
    for line in lines_of([repair_word(word) for word in words]):
        if not any(_NOTICE in word.text.upper() for word in line):
            lines.append(line)
    tables, rest = _read_tables(lines)
    tree: dict[str, Any] = {"patient": {}}
    for table in tables:
        tree.setdefault(table.section, []).extend(table.rows)
    rows = [cells_of(line) for line in rest]
    rows = _take_patient(rows, tree["patient"])
    for section, texts in _read_sections(rows):
        if section == "text":
            tree["text"] = " ".join([tree.get("text", ""), *texts]).strip()
        else:
            tree.setdefault(section, []).extend(_entries(section, texts))
    return evolve(read_answer(json.dumps(tree)), read_as="")


def repair_word(word: Word) -> Word:
    """A word with the digits of its abbreviations as letters, where these are known ones."""

    def known(match: re.Match[str]) -> str:
        for variant in (match[0].replace("0", "O"), match[0].replace("1", "l")):
            if variant != match[0] and any(is_listed(variant, kind) for kind in _ABBREVIATED):
                return variant
        return match[0]

    return evolve(word, text=re.sub(r"\w*[A-Za-z]\w*", known, word.text))


# Tables -----------------------------------------------------------------------------------------------------
def _read_tables(lines: Sequence[list[Word]]) -> tuple[list[_Table], list[list[Word]]]:
    """The tables of a page, and the words of each line that are in none."""
    tables = list[_Table]()
    rest = list[list[Word]]()
    for line in lines:
        used = set[int]()
        for table, places in _find_titles(line):
            for other in tables:
                other.is_open &= other.starts[0] > table.end or other.end < table.starts[0]
            tables.append(table)
            used |= places
        for table in tables:
            used |= _add_row(table, line, used)
        left = [word for i, word in enumerate(line) if i not in used]
        if left:
            rest.append(left)
    for table in tables:
        if not table.section:  # its titles do not tell, but its rows do
            vitals = [row for row in table.rows if is_listed(row.get("name", ""), "vitals")]
            table.section = "vitals" if 2 * len(vitals) > len(table.rows) else "labs"
    return tables, rest


def find_ranges(lines: Sequence[list[Word]]) -> list[Word]:
    """The words in columns of reference ranges: no value of a test is there."""
    tables, _ = _read_tables(lines)
    return [word for table in tables for word in table.ranges]


def _find_titles(line: Sequence[Word]) -> list[tuple[_Table, set[int]]]:
    """Tables whose titles stand in a line, with the places of these: two different titles or more in a row."""
    found = list[tuple[_Table, set[int]]]()
    columns, cells, places = list[str](), list[Word](), set[int]()
    i = 0
    while i <= len(line):
        length, column = _title_at(line, i)
        if length and column not in columns:
            columns.append(column)
            cells.append(join_words(line[i : i + length]))
            places |= set(range(i, i + length))
            i += length
            continue
        if len(columns) > 1:
            starts = [cell.box[0] for cell in cells]
            height = max(cell.height for cell in cells)
            bottom = max(cell.box[3] for cell in cells)
            section = _section_of_titles(columns, cells[0].text)
            table = _Table(columns, starts, cells[-1].box[2], bottom, height, section)
            found.append((table, places))
        columns, cells, places = [], [], set()
        i += 0 if length else 1
    return found


def _title_at(line: Sequence[Word], start: int) -> tuple[int, str]:
    """How many words from `start` are the title of a column, and which; the longest one."""
    for length in (3, 2, 1):
        words = line[start : start + length]
        text = " ".join(word.text for word in words)
        if len(words) == length and (column := find_key(text, _COLUMNS, "titles")):
            return length, "range" if column in ("low", "high") and "range" in text.casefold() else column
    return 0, ""


def _section_of_titles(columns: Sequence[str], first: str) -> str:
    """What a table holds, by its titles; "" where they do not tell."""
    if {"dose", "route", "frequency"} & {*columns}:
        return "medications"
    if {"range", "low", "high", "flag"} & {*columns}:
        return "labs"
    return "vitals" if find_key(first, ("vitals", "sign")) else ""


def _add_row(table: _Table, line: Sequence[Word], used: set[int]) -> set[int]:
    """Take the words of a line that are a row of the table; returns their places."""
    if not table.is_open:
        return set()
    cells: dict[str, list[Word]] = {}
    places = set[int]()
    last: Word | None = None
    for i, word in enumerate(line):
        x = word.centre[0]
        column = sum(x >= start - 0.5 * table.height for start in table.starts) - 1
        if i in used or column < 0:
            continue
        # Behind the last title only what follows on: further right stands another part of the page.
        if x > table.end and (last is None or word.box[0] - last.box[2] > 1.5 * table.height):
            continue
        cells.setdefault(table.columns[column], []).append(word)
        places.add(i)
        last = word
    if not cells:
        return set()
    words = [word for cell in cells.values() for word in cell]
    is_far = min(word.box[1] for word in words) - table.bottom > 5 * table.height
    # Running text goes on across the columns, without a gap before any of them.
    gaps = [b.box[0] - a.box[2] for a, b in itertools.pairwise(words)]
    is_text = len(gaps) > 3 and max(gaps) < 0.9 * table.height
    if is_far or is_text or _heading(join_words(words).text):
        table.is_open = False
        return set()
    # A stamp or a fold may have taken what names the row: the table goes on below it.
    if len(cells) < 2 or table.columns[0] not in cells:
        return set()
    table.bottom = max(word.box[3] for word in words)
    for title in ("range", "low", "high"):
        if title in cells:
            table.ranges += cells[title]
    table.rows.append(_split_name({column: join_words(cell).text for column, cell in cells.items()}))
    return places


def _split_name(row: dict[str, str]) -> dict[str, str]:
    """The unit out of a name such as "Glucose (mg/dL)"; `read_answer` takes values and ranges apart."""
    named = re.fullmatch(r"(.+?)\s*[(\[]([^()\[\]]+)[)\]]?", row.get("name", ""))
    if named and "unit" not in row and re.search(r"[/%]|^[a-zµμ]", named[2]):
        row |= {"name": named[1], "unit": named[2]}
    # A reader may lose the space of "5.49 10^12/L".
    return {column: re.sub(r"(?<=\d)(?=10\^)", " ", text) for column, text in row.items()}


# Patient ----------------------------------------------------------------------------------------------------
def _take_patient(rows: Sequence[list[Word]], patient: dict[str, str]) -> list[list[Word]]:
    """Read "Label: value" of the patient into `patient`; returns the cells that hold none."""
    rest = list[list[Word]]()
    waiting = list[tuple[str, Word]]()  # labels whose value was not in their cell
    for row in rows:
        others = list[Word]()
        for number, cell in enumerate(row):
            before, pairs = _labelled(cell.text)
            beside = row[number - 1] if number else None
            label = next((pair for pair in waiting if _takes(pair[1], cell, beside)), None)
            if before and label:
                patient.setdefault(label[0], before)
                waiting.remove(label)
            elif not pairs:
                others.append(cell)
            for key, value in pairs:
                if value:
                    patient.setdefault(key, value)
                else:
                    waiting.append((key, cell))
        if others:
            rest.append(others)
    return rest


def _labelled(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What stands before the first label of a text, and (field of the patient, value) of each."""
    labels = list(_label_pattern().finditer(text))
    ends = [match.start() for match in labels] + [len(text)]
    pairs = list[tuple[str, str]]()
    for match, end in zip(labels, ends[1:], strict=True):
        pairs.append((str(match.lastgroup), text[match.end() : end].strip(" ,;|")))
    return text[: ends[0]].strip(), pairs


@functools.cache
def _label_pattern() -> re.Pattern[str]:
    """A label with its colon, as a group of the name of its field."""
    terms = medical_terms()
    groups = []
    for key, name in _PATIENT.items():
        labels = {key, *terms["keys"][key], *terms["labels"].get(key, ())}
        # A reader may lose the space of "Patient name:".
        longest_first = sorted(labels, key=len, reverse=True)
        words = [re.sub("[ _]", "[ .]*", label) for label in longest_first]
        groups.append(f"(?P<{name}>{'|'.join(words)})")
    return re.compile(rf"\b(?:{'|'.join(groups)})[.#]?(?: ?\([a-z]+\))? ?: *", re.IGNORECASE)


def _takes(label: Word, cell: Word, beside: Word | None) -> bool:
    """Whether a cell is the value of a label: right beside it, or on the next line at its left edge or as the first
    cell."""
    if beside is label:
        return True
    is_next = 0 < cell.centre[1] - label.centre[1] < 2.5 * label.height
    is_wrapped = beside is None and cell.box[0] < label.box[0]
    return is_next and (is_wrapped or abs(cell.box[0] - label.box[0]) < label.height)


# Sections ---------------------------------------------------------------------------------------------------
def _read_sections(rows: Sequence[Sequence[Word]]) -> Iterator[tuple[str, list[str]]]:
    """(section, its lines) below each heading."""
    headings = list[tuple[str, Word, list[Word]]]()  # section, heading, cells
    for row in rows:
        current: tuple[str, Word, list[Word]] | None = None
        for cell in row:
            match = re.match(r"([A-Za-z /]{2,40}?)\s*:\s*(.*)", cell.text)
            section = _heading(cell.text) or (_heading(match[1]) if match else "")
            if section and (not match or not is_listed(match[1], "vitals")):
                headings.append((section, cell, []))
                if match and match[2]:
                    headings[-1][2].append(Word(match[2], cell.box, cell.score))
                current = None
                continue
            above = [heading for heading in headings if _is_under(heading, cell)]
            current = above[-1] if above else current
            if current:
                current[2].append(cell)
    for section, _, cells in headings:
        yield section, [join_words(line).text for line in lines_of(cells)]


def _is_under(heading: tuple[str, Word, list[Word]], cell: Word) -> bool:
    """Whether a cell begins at the left edge of a heading and follows on its last line."""
    _, title, cells = heading
    above = cells[-1] if cells else title
    gap = cell.box[1] - above.box[3]
    return abs(cell.box[0] - title.box[0]) < 2 * title.height and gap < 2.5 * title.height


def _entries(section: str, texts: Sequence[str]) -> list[Any]:
    """The entries of a section: marked by numbers or bullets, parted by semicolons or commas, or one a line."""
    is_marked = any(BULLET.match(text) for text in texts)
    if section == "vitals" and not is_marked:
        return [" ".join(texts)]  # "BP: 120/80 mmHg, HR: 72 bpm", wherever the line breaks
    entries = list[str]()
    for text in texts:
        # A line that goes on with the entry above has no mark, or a small letter: "every 6 hours".
        is_first = bool(BULLET.match(text)) if is_marked else not text[0].islower()
        if is_first or not entries:
            entries.append(BULLET.sub("", text))
        else:
            entries[-1] += f" {text}"
    if any(";" in entry for entry in entries):
        entries = " ".join(entries).split(";")
    return list(filter(None, (entry.strip(" .") for entry in entries)))


def _heading(text: str) -> str:
    """The section that a text is the heading of; "" if it is none."""
    return find_key(text, _SECTIONS, "headings")
