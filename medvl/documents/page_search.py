"""Where values stand in the text of pages: letter by letter, in another spelling, or with letters that look alike."""

import bisect
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from attrs import field, frozen

from medvl.documents.quantities import (
    EVERY_HOURS,
    is_denied_between,
    medical_terms,
    parse_quantity,
    same_number,
    same_unit,
)
from medvl.documents.rules import find_ranges
from medvl.documents.words import Box, Word, join_boxes, lines_of, part_of_box

Spelling = Literal["exact", "same", "similar"]
_NEAR_MISS = 0.5  # score of a match that needs 0 to be O, 1 to be l or I, a point to be a comma
_NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")
_LOOK_ALIKES = str.maketrans("0o1li|,", "oollll.")  # of folded text
_LONG = 40  # letters: running text, of which a reader may have got a letter wrong
_RUN = 8  # letters that must be equal in a row to count for a long text
_SHARE = 0.8  # of a long text that must be on the page
_PAGE_GAP = 100  # lines between two pages: what stands on another page is far away


@frozen
class Place:
    """Where a value stands.

    Attributes:
        box: in pixels of its page; of a text that goes on on the next page, its part on the first.
        score: of the least sure word; halved where letters were taken for others that look alike, and
            multiplied by the share that is there of a long text.
        page: number of the page, from 0.
        spelling: "exact": every letter of it is there, whatever the case and the spaces; "same": another spelling of
            the same number, unit or listed term (8,4 for 8.4, ug for mcg, BID for twice daily); else "similar".
        is_with_name: a value of a medication, test or vital sign stands with the name of that, age and sex with
            the patient; a diagnosis or drug is not denied there; True for others.
        behind: the 20 letters that follow on the page, in lower case.
    """

    box: Box
    score: float
    page: int = 0
    spelling: Spelling = "exact"
    is_with_name: bool = True
    behind: str = field(default="", repr=False)


@frozen
class PageText:
    """The text of pages in reading order, with a space between words, and what each of its characters is part of."""

    text: str
    alike: str  # the text without spaces, and one letter for those that look alike
    positions: tuple[int, ...]  # in the text, of each letter
    words: tuple[Word, ...]
    places: tuple[tuple[int, int], ...]  # of each character: word, and place in it
    lines: tuple[int, ...]  # of each word
    numbers: tuple[int, ...]  # of the page of each word
    quantities: frozenset[str]  # numbers as they are printed
    units: frozenset[str]  # words that may be units
    ranges: frozenset[int]  # words in columns of reference ranges


@frozen
class Match:
    """A place of a value: the characters from `start` to the one before `stop`."""

    start: int
    stop: int
    place: Place
    line: int


def join_pages(pages: Sequence[Sequence[Word]]) -> PageText:
    """The words of pages, line by line, as one text."""
    text = ""
    ordered, places = list[Word](), list[tuple[int, int]]()
    lines, numbers = list[int](), list[int]()
    ranges = set[int]()
    number = 0  # of the line
    for page, words in enumerate(pages):
        printed = lines_of(words)
        limits = set(map(id, find_ranges(printed)))
        for line in printed:
            for word in line:
                if id(word) in limits:
                    ranges.add(len(ordered))
                text += _fold(word.text) + " "
                places += [(len(ordered), place) for place in range(len(word.text) + 1)]
                ordered.append(word)
                lines.append(number)
                numbers.append(page)
            number += 1
        number += _PAGE_GAP
    return PageText(
        text=text,
        alike=text.replace(" ", "").translate(_LOOK_ALIKES),
        positions=tuple(i for i, letter in enumerate(text) if letter != " "),
        words=tuple(ordered),
        places=tuple(places),
        lines=tuple(lines),
        numbers=tuple(numbers),
        quantities=frozenset(re.findall(r"(?:[<>]=?|[≤≥~])? ?(?:(?<!\S)\.)?\d(?:[\d.,/]*\d)?", text)),
        units=frozenset(re.sub(r"^[\d.,]+|[.,;:()\[\]]+", "", word) for word in text.split()),
        ranges=frozenset(ranges),
    )


def _fold(text: str) -> str:
    """Text without case and in one spelling; each letter stays one character, so that places stay."""
    folded = [unicodedata.normalize("NFKC", letter).casefold() for letter in text]
    pairs = zip(text, folded, strict=True)
    joined = "".join(new if len(new) == 1 else letter for letter, new in pairs)
    return joined.translate(dict.fromkeys(map(ord, "‐‑‒–—−"), "-"))


def find_value(page: PageText, path: str, value: str) -> list[Match]:
    """All places of a value, also in another spelling and with letters that look alike.

    Args:
        path: of the value in `fields.leaves`, on which it depends what means the same.
    """
    texts = [value]
    if path.endswith("/prn"):
        # Printed in one of its forms.
        texts = next(row for row in medical_terms()["frequencies"] if "PRN" in row)
    elif path == "patient/age":
        texts = [value, f"{value}-year-old", f"{value}-year"]
    matches = dict[tuple[int, int], Match]()
    for text in [*texts, *_other_spellings(page, path, value)]:
        spelling: Spelling = "exact" if text in texts else "same"
        for span, is_alike in _spans(page, _fold(text)).items():
            if path.endswith(("/value", "/dose", "/age")) and not _is_whole(page, *span):
                continue
            if path.endswith("/value") and page.places[span[0]][0] in page.ranges:
                continue
            if path.endswith("/frequency") and _is_counted(page.text, *span):
                continue
            if path.endswith("/value") and _NOT.search(page.text, max(0, span[0] - 20), span[0]):
                continue
            known = matches.get(span)
            if known is None or known.place.spelling == "similar":
                near_miss = _match(page, [span], "similar", _NEAR_MISS)
                matches[span] = near_miss if is_alike else _match(page, [span], spelling, 1.0)
    if not matches and len(value) >= _LONG:
        # Most of it may be on the page, maybe with another column between its lines.
        runs = _common_runs(page, _fold(value))
        share = sum(stop - start for start, stop in runs) / len(value)
        return [_match(page, runs, "similar", share)] if share >= _SHARE else []
    places = list(matches.values())
    if path.endswith("/name") and any(match.place.spelling == "exact" for match in places):
        return [match for match in places if match.place.spelling != "same"]  # the B12 of "Vitamin B12"
    return places


def is_denied_at(page: PageText, path: str, match: Match) -> bool:
    """Whether the words beside a diagnosis, drug, procedure or text on its line deny it ("no pneumonia") or name it as
    an allergy."""
    is_name = path.startswith(("diagnoses/", "medications/")) and path.endswith("/name")
    if not is_name and not path.startswith("procedures/") and path != "text":
        return False
    first, last = page.places[match.start][0], page.places[match.stop - 1][0]
    start, stop = first, last + 1
    while start > 0 and _is_beside(page, start - 1):
        start -= 1
    while stop < len(page.words) and _is_beside(page, stop - 1):
        stop += 1
    before = " ".join(word.text for word in page.words[start:first])
    after = " ".join(word.text for word in page.words[last + 1 : stop])
    is_allergy = re.search(r"\b(?:allerg|intoleran)[^.;]*$", before, re.IGNORECASE)
    return bool(is_allergy) or is_denied_between(before, after)


def _is_beside(page: PageText, number: int) -> bool:
    """Whether the next word follows on the same line, without the gap of another column."""
    word, other = page.words[number : number + 2]
    gap = other.box[0] - word.box[2]
    return page.lines[number] == page.lines[number + 1] and gap < 1.5 * word.height


def _other_spellings(page: PageText, path: str, value: str) -> list[str]:
    """What pages print that means the same as a value by the rules of `quantities`."""
    section, name = path.split("/")[0], path.rpartition("/")[2]
    kinds = {"sex": "sexes", "route": "routes", "frequency": "frequencies", "flag": "flags", "name": section}
    if name in ("value", "dose", "low", "high", "age"):
        wanted = parse_quantity(value)
        if wanted is None or wanted.join == "date":
            return []
        numbers = [(text, parse_quantity(text)) for text in page.quantities]
        return [text for text, number in numbers if number and same_number(number, wanted)]
    if name == "unit":
        return [text for text in page.units if same_unit(text, value)]
    hours = EVERY_HOURS.fullmatch(value)
    if hours and not hours[2]:
        return [f"q{hours[1]}h", f"every {hours[1]} hours"]
    for row in medical_terms().get(kinds.get(name, ""), ()):
        if value.casefold() in [term.casefold() for term in row]:
            return list(row)
    return []


_COUNTED = re.compile(r"(?:twice|thrice|times|other|alternate|[2-9] ?x) (?:a |per )?$")
_NOT = re.compile(r"\b(?:not|non|no) $")


def _is_counted(text: str, start: int, stop: int) -> bool:
    """Whether a frequency is part of another one: the "daily" of "twice daily", the "once" of "once daily"."""
    counts = re.match(r"once|twice|thrice|\d+ ?x|\w+ times", text[start:stop])
    if (
        counts
        and counts.end() == stop - start
        and re.match(r" (?:a|per|daily|weekly|monthly)\b", text[stop : stop + 9])
    ):
        return True
    return bool(_COUNTED.search(text, max(0, start - 20), start))


# Where no word or number goes on: a unit may stand right behind its number ("25mg").
_BEFORE = {
    True: re.compile(r"(?<![^\W_])(?<!\d[.,/:])(?<!\s\.)(?<![^\W\d_]-)"),
    False: re.compile(r"(?<![^\W\d_])(?<![^\W_][-/'])"),
}
_BEHIND = {True: re.compile(r"(?!\d|[.,/:]\d|-[^\W\d_])"), False: re.compile(r"(?![^\W_]|[-/'][^\W_])")}


def _spans(page: PageText, value: str) -> dict[tuple[int, int], bool]:
    """Where a value is on the pages as whole words and numbers, whatever the spaces between its letters; and whether
    only letters that look alike are there."""
    wanted = "".join(value.split()).translate(_LOOK_ALIKES)
    spans = dict[tuple[int, int], bool]()
    place = page.alike.find(wanted) if wanted else -1
    while place >= 0:
        start, stop = page.positions[place], page.positions[place + len(wanted) - 1] + 1
        first, last = page.text[start], page.text[stop - 1]
        before = not first.isalnum() or _BEFORE[first.isdigit()].match(page.text, start)
        behind = not last.isalnum() or _BEHIND[last.isdigit()].match(page.text, stop)
        is_cut = first == "." and page.text[start - 1 : start].isdigit()  # the ".25" of "1.25"
        if before and behind and not is_cut:
            printed = page.text[start:stop]
            is_same = "".join(printed.split()) == "".join(value.split())
            # "58" is not quite "5 8", which may be two numbers.
            spans[start, stop] = not is_same or _NUMBER.findall(printed) != _NUMBER.findall(value)
        place = page.alike.find(wanted, place + 1)
    return spans


def _common_runs(page: PageText, text: str) -> list[tuple[int, int]]:
    """Runs of a text that are on the pages in its order, at least `_RUN` letters each; linear in both lengths."""
    starts: dict[str, list[int]] = {}
    for i in range(len(page.text) - _RUN + 1):
        starts.setdefault(page.text[i : i + _RUN], []).append(i)
    runs = list[tuple[int, int]]()
    i = end = 0
    while i <= len(text) - _RUN:
        places = starts.get(text[i : i + _RUN], [])
        next_one = bisect.bisect_left(places, end)
        if next_one == len(places):
            i += 1
            continue
        start = end = places[next_one]
        while i < len(text) and end < len(page.text) and text[i] == page.text[end]:
            i, end = i + 1, end + 1
        runs.append((start, end))
    return runs


# The number of a range ends right before, the sign of a limit, or a minus.
_LIMIT_BEFORE = re.compile(r"(?:(?<![\w.,])(?<!\w-)\d[\d.,]*(?: ?- ?| to )|[<>≤≥~]=? ?|(?:^|\s)-|up to )$")
_LIMIT_BEHIND = re.compile(r" ?- ?\d| to \d")


def _is_whole(page: PageText, start: int, stop: int) -> bool:
    """Whether a number is no part of a range ("5-10", "5 to 10"), has no sign that is not its own ("<5"), and does not count the
    entries of a list ("2. Warfarin")."""
    text = page.text
    before, behind = text[max(0, start - 20) : start], text[stop : stop + 5]
    if not text[start].isdigit():
        return True
    if re.match(r"[.)] ?[^\W\d]", behind):
        word = page.places[start][0]
        is_first = word == 0 or page.lines[word - 1] < page.lines[word]
        gap = page.words[word].box[0] - page.words[word - 1].box[2]
        if is_first or gap > page.words[word].height:
            return False
    return not _LIMIT_BEFORE.search(before) and not _LIMIT_BEHIND.match(behind)


def _match(page: PageText, spans: Sequence[tuple[int, int]], spelling: Spelling, score: float) -> Match:
    """Characters as a match: the hull of the parts of their words, on the first of their pages."""
    ends: dict[int, tuple[int, int]] = {}  # of each word: first and last character
    for start, stop in spans:
        for i in range(start, stop):
            word, place = page.places[i]
            if page.text[i] != " ":
                first, _ = ends.get(word, (place, place))
                ends[word] = first, place
    head = next(iter(ends))
    on_page = {word: end for word, end in ends.items() if page.numbers[word] == page.numbers[head]}
    boxes = [part_of_box(page.words[word], first, last + 1) for word, (first, last) in on_page.items()]
    end = spans[-1][1]
    found = Place(
        box=join_boxes(boxes),
        score=score * min(page.words[word].score for word in ends),
        page=page.numbers[head],
        spelling=spelling,
        behind=page.text[end : end + 20],
    )
    return Match(spans[0][0], end, found, page.lines[head])
