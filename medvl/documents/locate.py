"""Where on a page each value of a record stands: the evidence for what a model or the rules say."""

import difflib
import re
import unicodedata
from collections.abc import Sequence

from attrs import frozen

from medvl.documents.fields import Fields, leaves
from medvl.documents.quantities import medical_terms
from medvl.documents.words import Box, Word, join_boxes, lines_of, part_of_box

_NEAR_MISS = 0.5  # score of a match that needs 0 to be O, 1 to be l or I, a point to be a comma
_LOOK_ALIKES = str.maketrans("0oO1lI|,", "ooollll.")
_LONG = 40  # letters: running text, of which a reader may have got a letter wrong
_RUN = 8  # letters that must be equal in a row to count for a long text
_SHARE = 0.8  # of a long text that must be on the page


@frozen
class Place:
    """Where a value stands.

    Attributes:
        score: of the least sure word; halved where letters were taken for others that look alike, and
            multiplied by the share that is there of a long text.
    """

    box: Box
    score: float


@frozen
class _Page:
    """The text of a page in reading order, with a space between words, and what each of its characters is part of."""

    text: str
    words: tuple[Word, ...]
    places: tuple[tuple[int, int], ...]  # of each character: word, and place in it
    lines: tuple[int, ...]  # of each word


@frozen
class _Match:
    """A place of a value: the characters from `start` to the one before `stop`."""

    start: int
    stop: int
    place: Place
    line: int
    is_near_miss: bool


def locate(fields: Fields, words: Sequence[Word]) -> dict[str, Box | None]:
    """The box of each value by path, as `fields.leaves`; None where it is not on the page.

    Args:
        words: of the page, from `read_page`.
    """
    places = find_places(fields, words)
    return {path: place.box if place else None for path, place in places.items()}


def find_places(fields: Fields, words: Sequence[Word]) -> dict[str, Place | None]:
    """As `locate`, with scores.

    A value is found at the boundaries of words and numbers ("5" is not in "25", "mg" not in "mg/dL"), in one word
    or over several. Of several places the one is taken that is nearest to the other values of the same record
    and not taken yet.
    """
    page = _read_words(words)
    values = leaves(fields)
    matches = {path: _find(page, path, value) for path, value in values.items()}
    places: dict[str, Place | None] = dict.fromkeys(matches)
    records: dict[str, list[str]] = {}
    for path in matches:
        records.setdefault(path.rpartition("/")[0], []).append(path)
    taken = set[int]()  # characters
    previous: _Match | None = None
    # Running text first: a diagnosis that it states stands elsewhere, too.
    for paths in sorted(records.values(), key=lambda paths: paths != ["text"]):
        anchor = _choose_anchor([_untaken(matches[path], taken) for path in paths], previous)
        if anchor is None:
            continue
        best = dict[str, _Match]()
        for path in paths:
            if free := _untaken(matches[path], taken):
                best[path] = min(free, key=lambda match: _distance(anchor, match))
                taken.update(range(best[path].start, best[path].stop))
        for path in best:
            # Equal values ("6.0 mg/dL, 6.0-8.3") in the order in which a page names them.
            equal = [other for other in best if values[other] == values[path]]
            ordered = sorted((best[other] for other in equal), key=lambda match: match.start)
            places[path] = ordered[equal.index(path)].place
        previous = anchor
    return places


def _untaken(matches: Sequence[_Match], taken: set[int]) -> list[_Match]:
    return [match for match in matches if not taken.intersection(range(match.start, match.stop))]


def _choose_anchor(record: Sequence[list[_Match]], previous: _Match | None) -> _Match | None:
    """Where a record stands: the match of its rarest value to which its other values are nearest; of equals the
    one that follows the record before."""
    values = [matches for matches in record if matches]
    if not values:
        return None
    rarest = min(values, key=lambda matches: (len(matches), matches[0].start - matches[0].stop))

    def cost(anchor: _Match) -> tuple[float, float]:
        nearest = [min(_distance(anchor, match) for match in matches) for matches in values]
        return round(sum(nearest), 1), _distance(previous, anchor) if previous else 0.0

    return min(rarest, key=cost)


def _distance(anchor: _Match, match: _Match) -> float:
    """How far a match is from another: the rows of a table and the words of a line hold together, however wide,
    and what belongs to a name stands behind it."""
    height = max(1.0, anchor.place.box[3] - anchor.place.box[1])
    across = (match.place.box[0] - anchor.place.box[0]) / height
    down = match.line - anchor.line
    penalty = 3.0 if match.is_near_miss else 0.0
    if down == 0:
        return penalty + (0.05 * across if across >= 0 else 1 - 0.1 * across)
    return penalty + abs(across) / 4 + (6 * down if down > 0 else 2 - 6 * down)


# Matches ----------------------------------------------------------------------------------------------------
def _read_words(words: Sequence[Word]) -> _Page:
    text, ordered, places, lines = "", list[Word](), list[tuple[int, int]](), list[int]()
    for number, line in enumerate(lines_of(words)):
        for word in line:
            text += _fold(word.text) + " "
            places += [(len(ordered), place) for place in range(len(word.text) + 1)]
            ordered.append(word)
            lines.append(number)
    return _Page(text, tuple(ordered), tuple(places), tuple(lines))


def _fold(text: str) -> str:
    """Text without case and in one spelling; each letter stays one character, so that places stay."""
    folded = [unicodedata.normalize("NFKC", letter).casefold() for letter in text]
    pairs = zip(text, folded, strict=True)
    joined = "".join(new if len(new) == 1 else letter for letter, new in pairs)
    return joined.translate(dict.fromkeys(map(ord, "‐‑‒–—−"), "-"))


def _find(page: _Page, path: str, value: str) -> list[_Match]:
    """All places of a value, near misses among them."""
    texts = [value]
    if path.endswith("/prn"):
        # Printed in one of its forms.
        texts = next(row for row in medical_terms()["frequencies"] if "PRN" in row)
    matches = list[_Match]()
    for text in map(_fold, texts):
        alike = text.translate(_LOOK_ALIKES)
        scores = dict.fromkeys(_spans(alike, page.text.translate(_LOOK_ALIKES), page.text), _NEAR_MISS)
        scores |= dict.fromkeys(_spans(text, page.text, page.text), 1.0)
        found = [_match(page, [span], score, score < 1) for span, score in scores.items()]
        if not found and len(text) >= _LONG:
            # Most of it may be on the page, maybe with another column between its lines.
            matcher = difflib.SequenceMatcher(None, page.text, text, autojunk=False)
            runs = [(run.a, run.a + run.size) for run in matcher.get_matching_blocks() if run.size >= _RUN]
            share = sum(stop - start for start, stop in runs) / len(text)
            found = [_match(page, runs, share, False)] if share >= _SHARE else []
        matches += found
    return matches


# Where no word or number goes on: a unit may stand right behind its number ("25mg").
_BEFORE = {True: r"(?<![^\W_])(?<!\d[.,/:])(?<![^\W\d_]-)", False: r"(?<![^\W\d_])(?<![^\W_][-/'])"}
_BEHIND = {True: r"(?!\d|[.,/:]\d|-[^\W\d_])", False: r"(?![^\W_]|[-/'][^\W_])"}


def _spans(value: str, text: str, printed: str) -> list[tuple[int, int]]:
    """Where a value is in a text as whole words and numbers, whatever the spaces between its letters.

    Args:
        printed: the text before letters were replaced, which says what is a digit.
    """
    letters = "".join(value.split())
    if not letters:
        return []
    spans = []
    for match in re.finditer(f"(?=({' *'.join(map(re.escape, letters))}))", text):
        start, stop = match.span(1)
        first, last = printed[start], printed[stop - 1]
        before = re.compile(_BEFORE[first.isdigit()]).match(printed, start) or not first.isalnum()
        behind = re.compile(_BEHIND[last.isdigit()]).match(printed, stop) or not last.isalnum()
        if before and behind:
            spans.append((start, stop))
    return spans


def _match(page: _Page, spans: Sequence[tuple[int, int]], score: float, is_near_miss: bool) -> _Match:
    """Characters as a match: the hull of the parts of their words."""
    ends: dict[int, tuple[int, int]] = {}  # of each word: first and last character
    for start, stop in spans:
        for i in range(start, stop):
            word, place = page.places[i]
            if page.text[i] != " ":
                first, _ = ends.get(word, (place, place))
                ends[word] = first, place
    boxes = [part_of_box(page.words[word], first, last + 1) for word, (first, last) in ends.items()]
    least = min(page.words[word].score for word in ends)
    line = page.lines[next(iter(ends))]
    return _Match(spans[0][0], spans[-1][1], Place(join_boxes(boxes), score * least), line, is_near_miss)
