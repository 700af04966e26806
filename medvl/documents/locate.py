"""Where on a page each value of a record stands: the evidence for what a model or the rules say."""

import bisect
import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from attrs import evolve, field, frozen

from medvl.documents.fields import Fields, leaves
from medvl.documents.quantities import (
    EVERY_HOURS,
    find_key,
    is_listed,
    medical_terms,
    parse_quantity,
    same_number,
    same_unit,
)
from medvl.documents.words import Box, Word, join_boxes, lines_of, part_of_box

Spelling = Literal["exact", "same", "similar"]
_PENALTIES = {
    "exact": 0.0,
    "same": 1.0,
    "similar": 3.0,
}  # distances: of places that are as near, the exact one
_NEAR_MISS = 0.5  # score of a match that needs 0 to be O, 1 to be l or I, a point to be a comma
_LOOK_ALIKES = str.maketrans("0o1li|,", "oollll.")  # of folded text
_LONG = 40  # letters: running text, of which a reader may have got a letter wrong
_RUN = 8  # letters that must be equal in a row to count for a long text
_SHARE = 0.8  # of a long text that must be on the page
_PAGE_GAP = 100  # lines between two pages: what stands on another page is far away
_WRAPPED = 3  # lines below its name on which a value may stand
_HEADER = 6  # lines from a patient's name or number to age and sex
_LABELS = ("dose", "unit", "route", "frequency", "value", "range", "low", "high", "flag")  # not of a name
_NAMED = ("medications/", "labs/", "vitals/")  # records whose values stand beside their name


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
            the patient; True for others.
        behind: the 20 letters that follow on the page, in lower case.
    """

    box: Box
    score: float
    page: int = 0
    spelling: Spelling = "exact"
    is_with_name: bool = True
    behind: str = field(default="", repr=False)


@frozen
class _Pages:
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


@frozen
class _Match:
    """A place of a value: the characters from `start` to the one before `stop`."""

    start: int
    stop: int
    place: Place
    line: int


def locate(fields: Fields, words: Sequence[Word]) -> dict[str, Box | None]:
    """The box of each value by path, as `fields.leaves`; None where it is not on the page.

    Args:
        words: of the page, from `read_page`.
    """
    places = find_places(fields, words)
    return {path: place.box if place else None for path, place in places.items()}


def find_places(fields: Fields, words: Sequence[Word]) -> dict[str, Place | None]:
    """As `locate`, with scores."""
    return find_on_pages(fields, [words])


def find_on_pages(fields: Fields, pages: Sequence[Sequence[Word]]) -> dict[str, Place | None]:
    """As `find_places` on several pages.

    A value is found at the boundaries of words and numbers ("5" is not in "25", "mg" not in "mg/dL"), in one word
    or over several; the value of a test and a dose is a whole quantity ("5" is not in "<5" or "5-10"). Of several
    places the one is taken that is nearest to the other values of the same record and not taken yet. What stands
    with a name goes to its record before others may take it.
    """
    text = _read_words(pages)
    values = leaves(fields)
    matches = {path: _find(text, path, value) for path, value in values.items()}
    records: dict[str, list[str]] = {}
    for path in matches:
        records.setdefault(path.rpartition("/")[0], []).append(path)
    taken = set[int]()  # characters
    best = dict[str, _Match]()
    anchors = dict[str, _Match]()

    def take(path: str, record: str, only_with_name: bool = False) -> None:
        free = [] if path in best else _untaken(matches[path], taken)
        if only_with_name:
            free = _best_spelled([match for match in free if _is_with_name(text, path, match, anchors)])
        if free:
            best[path] = min(free, key=lambda match: _distance(anchors[record], match))
            taken.update(range(best[path].start, best[path].stop))

    def settle(record: str, lines: Collection[int] = ()) -> None:
        """Choose where a record stands, on none of some lines, and take the value there."""
        free = {}
        for path in records[record]:
            left = _untaken(matches[path], taken)
            free[path] = [match for match in left if match.line not in lines]
        path, anchor = _choose_anchor(free, next(reversed(anchors.values()), None))
        if anchor is not None:
            anchors[record] = anchor
            take(path, record)

    # Running text first: a diagnosis that it states stands elsewhere, too.
    nameless = list[str]()
    for record, paths in sorted(records.items(), key=lambda item: item[1] != ["text"]):
        if record.startswith(_NAMED) and not matches.get(f"{record}/name"):
            nameless.append(record)
            continue
        settle(record)
        if record in anchors and not record.startswith(_NAMED):
            # Long ones first: the 21 of a date is no age.
            for path in sorted(paths, key=lambda path: -len(values[path])):
                take(path, record, only_with_name=True)
    # An entry that is made up must not take the values of a line that has a name.
    lines = {anchor.line for record, anchor in anchors.items() if record.startswith(_NAMED)}
    for record in nameless:
        settle(record, lines)
    for record in anchors:
        for path in records[record]:
            take(path, record, only_with_name=True)
    for record, paths in records.items():
        if record not in anchors:
            settle(record)
        for path in paths:
            take(path, record)

    places: dict[str, Place | None] = dict.fromkeys(matches)
    for record in anchors:
        located = [path for path in records[record] if path in best]
        for path in located:
            # Equal values ("6.0 mg/dL, 6.0-8.3") in the order in which a page names them.
            equal = [other for other in located if values[other] == values[path]]
            ordered = sorted((best[other] for other in equal), key=lambda match: match.start)
            match = ordered[equal.index(path)]
            places[path] = evolve(match.place, is_with_name=_is_with_name(text, path, match, anchors))
    return places


def _is_with_name(text: _Pages, path: str, match: _Match, anchors: Mapping[str, _Match]) -> bool:
    """Whether a value stands on the line of its record's name or wrapped below, and no other name between them.

    Names in another column of the page, left of this one or right of the value, are not between. Age and sex of a
    patient stand near the other values of it.
    """
    record, _, name = path.rpartition("/")
    anchor = anchors[record]
    down = match.line - anchor.line
    if record == "patient" and name in ("age", "sex"):
        return abs(down) <= _HEADER
    if not record.startswith(_NAMED):
        return True
    if not 0 <= down <= _WRAPPED:
        return False
    first, last = sorted((anchor, match), key=lambda end: end.start)
    # What is wrapped to the left of its name is running text: names at the end of its lines are between, too.
    value = match.place.box
    slack = 2 * _height(anchor)
    is_running = value[0] < anchor.place.box[0] - slack
    left = min(anchor.place.box[0], value[0]) - slack
    right = math.inf if is_running else value[2]
    for other, between in anchors.items():
        is_between = first.start < between.start < last.start and left <= between.place.box[0] < right
        if is_between and other.startswith(_NAMED):
            return False
    # Nor an entry that the answer leaves out.
    if down == 0 and ";" in text.text[anchor.stop : match.start]:
        return False
    words = range(text.places[anchor.stop][0], text.places[match.start][0])
    return not any(_begins_entry(text, word, anchor) for word in words)


def _begins_entry(text: _Pages, number: int, name: _Match) -> bool:
    """Whether a word below a name stands at its left edge, with a capital (pH, eGFR), and is neither a label ("Dose:")
    nor a value (PO, BID)."""
    word = text.words[number]
    if text.lines[number] == name.line or abs(word.box[0] - name.place.box[0]) > _height(name):
        return False
    letters = word.text.strip(".,;:()")
    is_value = any(is_listed(letters, kind) for kind in ("routes", "frequencies"))
    return letters[:2].casefold() != letters[:2] and not is_value and not find_key(letters, _LABELS, "titles")


def _untaken(matches: Sequence[_Match], taken: set[int]) -> list[_Match]:
    return [match for match in matches if not taken.intersection(range(match.start, match.stop))]


def _best_spelled(matches: list[_Match]) -> list[_Match]:
    """The exact ones of some matches, or else those in another spelling, or else all."""
    for spelling in _PENALTIES:
        if best := [match for match in matches if match.place.spelling == spelling]:
            return best
    return []


def _choose_anchor(record: Mapping[str, list[_Match]], previous: _Match | None) -> tuple[str, _Match | None]:
    """Where a record stands, with the path of the value there: the match of its name, or else of its rarest value,
    to which its other values are nearest; of equals the one that follows the record before."""
    values = {path: matches for path, matches in record.items() if matches}
    if not values:
        return "", None
    names = [path for path in values if path.startswith(_NAMED) and path.endswith("/name")]
    rarest = min(
        names or values, key=lambda path: (len(values[path]), values[path][0].start - values[path][0].stop)
    )

    def cost(anchor: _Match) -> tuple[float, float]:
        nearest = [min(_distance(anchor, match) for match in matches) for matches in values.values()]
        return round(sum(nearest), 1), _distance(previous, anchor) if previous else 0.0

    return rarest, min(values[rarest], key=cost)


def _distance(anchor: _Match, match: _Match) -> float:
    """How far a match is from another: the rows of a table and the words of a line hold together, however wide,
    and what belongs to a name stands behind it."""
    across = (match.place.box[0] - anchor.place.box[0]) / _height(anchor)
    down = match.line - anchor.line
    penalty = _PENALTIES[match.place.spelling]
    if down == 0:
        return penalty + (0.05 * across if across >= 0 else 1 - 0.1 * across)
    return penalty + abs(across) / 4 + (6 * down if down > 0 else 2 - 6 * down)


def _height(match: _Match) -> float:
    return max(1.0, match.place.box[3] - match.place.box[1])


# Matches ----------------------------------------------------------------------------------------------------
def _read_words(pages: Sequence[Sequence[Word]]) -> _Pages:
    text = ""
    ordered, places = list[Word](), list[tuple[int, int]]()
    lines, numbers = list[int](), list[int]()
    number = 0  # of the line
    for page, words in enumerate(pages):
        for line in lines_of(words):
            for word in line:
                text += _fold(word.text) + " "
                places += [(len(ordered), place) for place in range(len(word.text) + 1)]
                ordered.append(word)
                lines.append(number)
                numbers.append(page)
            number += 1
        number += _PAGE_GAP
    return _Pages(
        text=text,
        alike=text.replace(" ", "").translate(_LOOK_ALIKES),
        positions=tuple(i for i, letter in enumerate(text) if letter != " "),
        words=tuple(ordered),
        places=tuple(places),
        lines=tuple(lines),
        numbers=tuple(numbers),
        quantities=frozenset(re.findall(r"(?:[<>]=?|[≤≥~])? ?\d(?:[\d.,/]*\d)?", text)),
        units=frozenset(re.sub(r"^[\d.,]+|[.,;:()\[\]]+", "", word) for word in text.split()),
    )


def _fold(text: str) -> str:
    """Text without case and in one spelling; each letter stays one character, so that places stay."""
    folded = [unicodedata.normalize("NFKC", letter).casefold() for letter in text]
    pairs = zip(text, folded, strict=True)
    joined = "".join(new if len(new) == 1 else letter for letter, new in pairs)
    return joined.translate(dict.fromkeys(map(ord, "‐‑‒–—−"), "-"))


def _find(page: _Pages, path: str, value: str) -> list[_Match]:
    """All places of a value, near misses among them."""
    texts = [value]
    if path.endswith("/prn"):
        # Printed in one of its forms.
        texts = next(row for row in medical_terms()["frequencies"] if "PRN" in row)
    elif path == "patient/age":
        texts = [value, f"{value}-year-old", f"{value}-year"]
    matches = dict[tuple[int, int], _Match]()
    for text in [*texts, *_other_spellings(page, path, value)]:
        spelling: Spelling = "exact" if text in texts else "same"
        for span, is_alike in _spans(page, _fold(text)).items():
            if path.endswith(("/value", "/dose", "/age")) and not _is_whole(page, *span):
                continue
            known = matches.get(span)
            if known is None or known.place.spelling == "similar":
                matches[span] = _match(page, [span], "similar" if is_alike else spelling)
    if not matches and len(value) >= _LONG:
        # Most of it may be on the page, maybe with another column between its lines.
        runs = _common_runs(page, _fold(value))
        share = sum(stop - start for start, stop in runs) / len(value)
        return [_match(page, runs, "similar", share)] if share >= _SHARE else []
    found = list(matches.values())
    if path.endswith("/name") and any(match.place.spelling == "exact" for match in found):
        return [match for match in found if match.place.spelling != "same"]  # the B12 of "Vitamin B12"
    return found


def _other_spellings(page: _Pages, path: str, value: str) -> list[str]:
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
    rows = medical_terms().get(kinds.get(name, ""), ())
    return [
        term for row in rows for term in row if any(value.casefold() == other.casefold() for other in row)
    ]


# Where no word or number goes on: a unit may stand right behind its number ("25mg").
_BEFORE = {
    True: re.compile(r"(?<![^\W_])(?<!\d[.,/:])(?<![^\W\d_]-)"),
    False: re.compile(r"(?<![^\W\d_])(?<![^\W_][-/'])"),
}
_BEHIND = {True: re.compile(r"(?!\d|[.,/:]\d|-[^\W\d_])"), False: re.compile(r"(?![^\W_]|[-/'][^\W_])")}


def _spans(page: _Pages, value: str) -> dict[tuple[int, int], bool]:
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
        if before and behind:
            printed = page.text[start:stop]
            is_same = "".join(printed.split()) == "".join(value.split())
            # "58" is not quite "5 8", which may be two numbers.
            spans[start, stop] = not is_same or _NUMBER.findall(printed) != _NUMBER.findall(value)
        place = page.alike.find(wanted, place + 1)
    return spans


def _common_runs(page: _Pages, text: str) -> list[tuple[int, int]]:
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


_NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")


def _is_whole(page: _Pages, start: int, stop: int) -> bool:
    """Whether a number is no part of a range ("5-10"), has no sign that is not its own ("<5"), and does not count the
    entries of a list ("2. Warfarin")."""
    text = page.text
    before, behind = text[max(0, start - 3) : start], text[stop : stop + 4]
    if not text[start].isdigit():
        return True
    if re.match(r"[.)] ?[^\W\d]", behind):
        word = page.places[start][0]
        is_first = word == 0 or page.lines[word - 1] < page.lines[word]
        gap = page.words[word].box[0] - page.words[word - 1].box[2]
        if is_first or gap > page.words[word].height:
            return False
    return not re.search(r"(?:[<>≤≥~]=? ?|(?:\d|(?:^|\s))-|\d - )$", before) and not re.match(
        r" ?- ?\d", behind
    )


def _match(page: _Pages, spans: Sequence[tuple[int, int]], spelling: Spelling, share: float = 1.0) -> _Match:
    """Characters as a match: the hull of the parts of their words, on the first of their pages.

    Args:
        share: of the text that is there.
    """
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
    if spelling == "similar" and share == 1:
        share = _NEAR_MISS
    end = spans[-1][1]
    found = Place(
        box=join_boxes(boxes),
        score=share * min(page.words[word].score for word in ends),
        page=page.numbers[head],
        spelling=spelling,
        behind=page.text[end : end + 20],
    )
    return _Match(spans[0][0], end, found, page.lines[head])
