"""Who a page is about, blacked out: names, dates, numbers and addresses found by rules among the words that OCR reads.

The page is read again afterwards, since a first reading misses some words. Nobody can promise that nothing is left:
rules know labels, titles and forms of numbers, OCR reads no handwriting, and no face, signature, bar code or rare
word that tells who somebody is. Research use only.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from attrs import field, frozen
from PIL import Image

from medvl.documents.quantities import medical_terms
from medvl.documents.read_page import read_page
from medvl.documents.words import Box, Word, join_boxes, lines_of, words_of_cells
from medvl.language.images import Picture, to_rgb

KINDS = ("name", "date", "record", "age", "phone", "mail", "address")
_MARGIN = 0.2  # of the height of a word, around it: boxes of OCR end with the ink that it saw
_LOOK_ALIKES = str.maketrans("0oO1lI|5S8B2Z", "ooollllssbbzz")
_NEAR = 0.83  # similarity of two spellings: one letter in six differs

# A digit, or a letter that OCR reads for one.
_D = r"[\dOolI|]"
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_CAPITAL = r"(?:[A-Z][\w'’-]+|[A-Z]\.)"
_KIN = "(?:wife|husband|son|daughter|mother|father|brother|sister|partner|widow)"
_NUMBERED = r"(?:DOB|D\.O\.B|MRN|NHS|SSN|[Hh]ospital [Nn]o|[Rr]ecord [Nn]o|[Bb]orn|aged)"
_PATTERNS = {
    "date": (
        rf"(?<![\d./-]){_D}{{4}} ?([-./]) ?{_D}{{1,2}} ?\1 ?{_D}{{1,2}}(?!\d)",
        rf"(?<![\d./-]){_D}{{1,2}} ?([-./]) ?{_D}{{1,2}} ?\1 ?(?:{_D}{{4}}|{_D}{{2}})(?!\d)",
        rf"(?i)(?<!\d){_D}{{1,2}}(?:st|nd|rd|th)?[ .,-]*{_MONTH}[ .,-]*{_D}{{2,4}}(?!\d)",
        rf"(?i)\b{_MONTH}[ .]*{_D}{{1,2}}(?:st|nd|rd|th)?[ .,]+{_D}{{4}}(?!\d)",
    ),
    "name": (
        rf"\b(?:Dr|Prof|Mr|Mrs|Ms|Miss|Sir|Nurse)\b\.? *{_CAPITAL}(?:,? {_CAPITAL}){{0,2}}",
        rf"{_CAPITAL}(?: {_CAPITAL}){{1,2}},? (?:M\.?D|D\.?O|R\.?N|NP|PA-C|PhD|FRC[A-Z]+|MRC[A-Z]+|MBBS)\b",
        rf"\b{_KIN},? {_CAPITAL}(?: {_CAPITAL})?",
        rf"{_CAPITAL},? {_CAPITAL}(?: {_CAPITAL})?(?=[,;(]? \(?{_NUMBERED}\b)",
    ),
    "record": (r"\b\d{3}-\d{2}-\d{4}\b", r"(?<![\w.,/-])[A-Z]{0,4}-?\d{6,12}(?!\w|[.,/]\d)"),
    "age": (
        r"(?i)\b(?:9\d|1[0-4]\d)(?:[ -]*(?:years?|yrs?)\b(?:[ -]*olds?\b)?|[ -]*(?:y/?o|y)\b)",
        r"(?i)\baged? *:? *(?:9\d|1[0-4]\d)\b",
    ),
    "phone": (r"(?<![\w.-])\+\d[\d ().-]{7,16}\d\b", r"(?<![\w.-])\(?\d{3}\)?[ .-] ?\d{3}[ .-]\d{4}\b"),
    "mail": (r"\S+ ?@ ?\S+\.[A-Za-z]{2,}", r"(?i)\b(?:https?://|www\.)\S+"),
    "address": (
        rf"(?<![\w./-])\d{{1,5}} (?:{_CAPITAL} ){{1,3}}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Way|Court|Blvd)\b\.?",
        r"\b[A-Z]{2} \d{5}(?:-\d{4})?\b",
    ),
}


@frozen
class Finding:
    """Something on a page that tells who it is about."""

    kind: str  # of `KINDS`
    words: tuple[Word, ...] = field(repr=False)

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def boxes(self) -> list[Box]:
        """Around its words, one box for each line."""
        boxes = list[Box]()
        for word in self.words:
            if boxes and boxes[-1][1] < word.centre[1] < boxes[-1][3] and word.box[0] > boxes[-1][0]:
                boxes[-1] = join_boxes((boxes[-1], word.box))
            else:
                boxes.append(word.box)
        return boxes


@frozen(kw_only=True)
class Redacted:
    """A page with what was found blacked out."""

    image: Image.Image
    found: tuple[Finding, ...]  # and blacked out
    left: tuple[Finding, ...]  # that the last reading found and that is not blacked out
    readings: int


def redact_page(
    image: Picture,
    known: Sequence[tuple[str, str]] = (),
    *,
    readings: int = 3,
    read: Callable[[Image.Image], list[Word]] = read_page,
) -> Redacted:
    """Black out what `find_private` finds, and read again until a reading finds nothing, or for `readings` times.

    The last reading only counts: what it finds is `left`. The picture has pixels and nothing else: no EXIF, no text.

    Args:
        image: any that `read_page` takes.
        known: (kind, text) of what is sought as well, of the header of a file for example.
        readings: at least 2.
    Raises:
        ValueError: as `read_page`; fewer readings.
    """
    if readings < 2:
        raise ValueError(f"redact_page: readings must be at least 2, got {readings}")
    page = Image.fromarray(np.array(to_rgb(image, "redact_page")))
    found = list[Finding]()
    for reading in range(1, readings + 1):
        mask = mask_of((page.height, page.width), found)
        # What was blacked out stands in its place again: a label whose value is gone would take what follows.
        words = [*read(page), *(word for finding in found for word in finding.words)]
        findings = [finding for finding in find_private(words, known) if not _is_in(mask, finding)]
        if not findings or reading == readings:
            break
        found += findings
        page = black_out(page, findings)
    return Redacted(image=page, found=tuple(found), left=tuple(findings), readings=reading)


def _is_in(mask: np.ndarray, finding: Finding) -> bool:
    """Whether all of a finding is black already."""
    corners = [[max(0, int(x)) for x in box] for box in finding.boxes]
    return all(mask[top:bottom, left:right].all() for left, top, right, bottom in corners)


def black_out(image: Image.Image, findings: Sequence[Finding]) -> Image.Image:
    """A copy of an RGB image, black where something was found and a little around it."""
    pixels = np.array(image)
    pixels[mask_of(pixels.shape[:2], findings)] = 0
    return Image.fromarray(pixels)


def mask_of(shape: tuple[int, ...], findings: Sequence[Finding]) -> np.ndarray:
    """Where findings and their margins are, bool [y, x]."""
    mask = np.zeros(shape, bool)
    for left, top, right, bottom in (box for finding in findings for box in finding.boxes):
        margin = max(2.0, _MARGIN * (bottom - top))
        rows = slice(max(0, int(top - margin)), int(bottom + margin) + 1)
        mask[rows, max(0, int(left - margin)) : int(right + margin) + 1] = True
    return mask


def find_private(words: Sequence[Word], known: Sequence[tuple[str, str]] = ()) -> list[Finding]:
    """What tells who a page is about, by rules: values of labels ("Patient:", "DOB:", "Phone:"), names with a title
    ("Dr. X", "X, MD"), dates, long numbers, ages over 89, addresses; and each name and number found or known
    wherever else it stands, also with a wrong letter.

    Args:
        words: of the page, from `read_page`.
        known: (kind, text) of what is sought as well.
    """
    lines = lines_of(words)
    found = [*_labelled_values(lines)]
    end = max((word.box[2] for word in words), default=0)
    for number, line in enumerate(lines):
        # A name or a date of running text may go on in the next line.
        if line[-1].box[2] > 0.8 * end:
            line = [word for part in lines[number : number + 2] for word in part]
        text = " ".join(word.text for word in line)
        for kind, patterns in _PATTERNS.items():
            for match in (match for pattern in patterns for match in re.finditer(pattern, text)):
                if any(letter.isdigit() for letter in match[0]) or kind in ("name", "mail"):
                    found.append(Finding(kind, tuple(_words_between(line, *match.span()))))
    sought = {*known, *((finding.kind, finding.text) for finding in found)}
    for kind, parts in _parts_of(sought).items():
        found += [Finding(kind, (word,)) for word in words if _is_part(word.text, parts)]
    return _without_repeats(found)


def _words_between(line: Sequence[Word], start: int, stop: int) -> list[Word]:
    """The words of a line that characters of its text belong to; there is one space between words."""
    words = list[Word]()
    position = 0
    for word in line:
        if position < stop and start < position + len(word.text):
            words.append(word)
        position += len(word.text) + 1
    return words


def _without_repeats(found: Sequence[Finding]) -> list[Finding]:
    """Without those whose words are all in another."""
    kept = list[Finding]()
    for finding in sorted(found, key=lambda finding: -len(finding.words)):
        if not any(set(finding.words) <= set(other.words) for other in kept):
            kept.append(finding)
    return kept


# Labels -----------------------------------------------------------------------------------------------------
def _labelled_values(lines: Sequence[Sequence[Word]]) -> Iterator[Finding]:
    """Values behind labels: in their cell, the next one, or the one below."""
    rows = [words_of_cells(line) for line in lines]
    for number, row in enumerate(rows):
        below = rows[number + 1] if number + 1 < len(rows) else []
        for place, cell in enumerate(row):
            text = " ".join(word.text for word in cell)
            labels = list(_label_pattern().finditer(text))
            for i, label in enumerate(labels):
                kind = str(label.lastgroup)
                end = labels[i + 1].start() if i + 1 < len(labels) else len(text)
                value = _trimmed(kind, _words_between(cell, label.end(), end), text[label.end() : end])
                under = [other for other in below if abs(other[0].box[0] - cell[0].box[0]) < cell[0].height]
                under = [other for other in under if not _has_label(other)]
                if not text[label.end() :].strip():
                    beside = [other for other in row[place + 1 : place + 2] if not _has_label(other)]
                    values = [_trimmed(kind, other) for other in [*beside, *under]]
                    value = next(filter(None, values), [])
                # A name may go on below its first word.
                elif kind == "name" and len(value) == 1 and under:
                    rest = [word for word in under[0][:2] if word.text[0].isupper()]
                    if rest:
                        yield Finding(kind, tuple(rest))
                if value:
                    yield Finding(kind, tuple(value))


def _has_label(cell: Sequence[Word]) -> bool:
    return bool(_label_pattern().match(" ".join(word.text for word in cell)))


def _trimmed(kind: str, value: Sequence[Word], text: str = "") -> list[Word]:
    """What of a value is of its kind: a name ends before a number, a date or a number has digits.

    Args:
        text: of the value, where its first word holds its label, too.
    """
    words = list(value)
    text = text or " ".join(word.text for word in words)
    if kind == "name":
        name = re.split(rf"[\d:]|\b{_NUMBERED}\b", text)[0].split()
        return words[: min(len(name), 5)] if any(len(word) > 2 for word in name) else []
    if kind == "age":
        number = re.match(r" *(\d+)", text)
        return words[:1] if number and 89 < int(number[1]) < 150 else []
    if kind in ("date", "record"):
        # A reader may part all letters of a number.
        is_spaced = all(len(word.text) == 1 for word in words)
        words = words[: 12 if is_spaced else 4 if kind == "date" else 2]
        while words and not re.search(r"\d", words[-1].text):
            words.pop()
    return words


@functools.cache
def _label_pattern() -> re.Pattern[str]:
    """A label with its colon, as a group of the name of its kind."""
    terms = medical_terms()
    patient = {"name": "person", "record": "record", "date": "date", "age": "age"}
    groups = []
    for kind in KINDS:
        key = patient.get(kind, "")
        labels = {*terms["private"].get(kind, ()), *terms["keys"].get(key, ()), *terms["labels"].get(key, ())}
        longest_first = sorted(labels | ({key} - {""}), key=len, reverse=True)
        spellings = [_spelling(label) for label in longest_first]
        groups.append(f"(?P<{kind}>{'|'.join(spellings)})")
    return re.compile(rf"\b(?:{'|'.join(groups)})[.#]?(?: ?\([a-z]+\))? ?[:;] *", re.IGNORECASE)


def _spelling(label: str) -> str:
    """The pattern of a label: a reader may lose the space of "Patient name", and part the letters of "ID"."""
    letters = [re.escape(letter) for letter in label]
    gap = " ?" if len(label) < 4 else ""
    return gap.join("[ .]*" if letter in (r"\ ", "_") else letter for letter in letters)


# Elsewhere on the page --------------------------------------------------------------------------------------
def _fold(text: str) -> str:
    """The letters and digits of a text in one spelling."""
    letters = "".join(letter for letter in text if letter.isalnum() or letter == "|")
    return letters.translate(_LOOK_ALIKES).casefold()


def _parts_of(sought: set[tuple[str, str]]) -> dict[str, set[str]]:
    """Words to look for everywhere: of names all but initials and titles, of records all with four digits."""
    parts: dict[str, set[str]] = {"name": set(), "record": set()}
    common = {_fold(word) for word in medical_terms()["private"]["common"]}
    for kind, text in sought:
        for word in re.split(r"[\s,;/^]+", text):
            is_number = sum(letter.isdigit() for letter in word) >= 4
            is_name = len(_fold(word)) > 2 and not re.search(r"\d", word) and _fold(word) not in common
            if (kind == "name" and is_name) or (kind == "record" and is_number):
                parts[kind].add(_fold(word))
    return parts


def _is_part(text: str, parts: set[str]) -> bool:
    """Whether a word on the page is one of the parts, holds one, or is one with a wrong letter."""
    word = _fold(text)
    for part in parts:
        if word == part or (len(part) > 4 and part in word):
            return True
        if min(len(word), len(part)) > 4 and difflib.SequenceMatcher(None, word, part).ratio() >= _NEAR:
            return True
    return False
