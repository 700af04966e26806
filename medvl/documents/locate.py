"""Where on a page each value of a record stands: the evidence for what a model or the rules say."""

import math
from collections.abc import Collection, Mapping, Sequence

from attrs import define, evolve, field

from medvl.documents.fields import Fields, leaves
from medvl.documents.page_search import Match, PageText, Place, find_value, is_denied_at, join_pages
from medvl.documents.quantities import find_key, is_listed
from medvl.documents.words import Box, Word

# Distances: of places that are as near, the exact one.
_PENALTIES = {"exact": 0.0, "same": 1.0, "similar": 3.0}
_WRAPPED = 3  # lines below its name on which a value may stand
_HEADER = 6  # lines from a patient's name or number to age and sex
_LABELS = ("dose", "unit", "route", "frequency", "value", "range", "low", "high", "flag")  # not of a name
_NAMED = ("medications/", "labs/", "vitals/")  # records whose values stand beside their name


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

    A value is found letter by letter or in another spelling of the same (`Place.spelling`), at the boundaries of
    words and numbers ("5" is not in "25", "mg" not in "mg/dL"), in one word or over several; the value of a test
    and a dose is a whole quantity ("5" is not in "<5" or "5-10"). Of several places the one is taken that is
    nearest to the other values of the same record and not taken yet. What stands with a name goes to its record
    before others may take it.
    """
    text = join_pages(pages)
    values = leaves(fields)
    matches = {path: find_value(text, path, value) for path, value in values.items()}
    for path in matches:
        stated = [match for match in matches[path] if not is_denied_at(text, path, match)]
        matches[path] = stated or matches[path]
    search = _Search(text, values, matches)
    search.settle_all()
    # The values of a name before those that another one may claim.
    for record in search.anchors:
        for path in search.records[record]:
            search.take(path, only_with_name=True)
    for record, paths in search.records.items():
        if record not in search.anchors:
            search.settle(record)
        for path in paths:
            search.take(path)
    return {path: search.place(path) for path in values}


@define
class _Search:
    """Where the values of an answer stand, as far as it is known."""

    text: PageText
    values: Mapping[str, str]
    matches: Mapping[str, list[Match]]
    records: dict[str, list[str]] = field(factory=dict)  # paths of each record
    anchors: dict[str, Match] = field(factory=dict)  # where a record stands: its name, if that was found
    chosen: dict[str, Match] = field(factory=dict)
    taken: set[int] = field(factory=set)  # characters

    def __attrs_post_init__(self) -> None:
        for path in self.values:
            self.records.setdefault(_record_of(path), []).append(path)

    def settle_all(self) -> None:
        """Choose where each record stands, and take the values of those without names."""
        nameless = list[str]()
        # Running text first: a diagnosis that it states stands elsewhere, too.
        for record, paths in sorted(self.records.items(), key=lambda item: item[1] != ["text"]):
            names = self.matches.get(f"{record}/name", [])
            # Also a row that the answer states more often than the page must not take the values of the first.
            if record.startswith(_NAMED) and not _untaken(names, self.taken):
                nameless.append(record)
                continue
            self.settle(record)
            if record in self.anchors and not record.startswith(_NAMED):
                # Long ones first: the 21 of a date is no age.
                for path in sorted(paths, key=lambda path: -len(self.values[path])):
                    self.take(path, only_with_name=True)
        # An entry that is made up must not take the values of a line that has a name.
        lines = {anchor.line for record, anchor in self.anchors.items() if record.startswith(_NAMED)}
        for record in nameless:
            self.settle(record, lines)

    def settle(self, record: str, lines: Collection[int] = ()) -> None:
        """Choose where a record stands, on none of some lines, and take the value there."""
        free = {}
        for path in self.records[record]:
            left = _untaken(self.matches[path], self.taken)
            free[path] = [match for match in left if match.line not in lines]
        path, anchor = _choose_anchor(free, next(reversed(self.anchors.values()), None))
        if anchor is not None:
            self.anchors[record] = anchor
            self.take(path)

    def take(self, path: str, only_with_name: bool = False) -> None:
        """Choose the match of a value, if it has none: the nearest that no other value has taken."""
        free = [] if path in self.chosen else _untaken(self.matches[path], self.taken)
        if only_with_name:
            with_name = [match for match in free if _is_with_name(self.text, path, match, self.anchors)]
            free = _best_spelled(with_name)
        if free:
            anchor = self.anchors[_record_of(path)]
            self.chosen[path] = min(free, key=lambda match: _distance(anchor, match))
            self.taken.update(range(self.chosen[path].start, self.chosen[path].stop))

    def place(self, path: str) -> Place | None:
        """The place of a value."""
        if path not in self.chosen:
            return None
        match = self.chosen[path]
        is_with_name = _is_with_name(self.text, path, match, self.anchors)
        # The number of a row that no page names is of another one.
        name = f"{_record_of(path)}/name"
        if path.startswith(_NAMED) and name in self.values and name not in self.chosen:
            is_with_name = False
        return evolve(match.place, is_with_name=is_with_name)


def _record_of(path: str) -> str:
    return path.rpartition("/")[0]


def _is_with_name(text: PageText, path: str, match: Match, anchors: Mapping[str, Match]) -> bool:
    """Whether a value stands on the line of its record's name or wrapped below, and no other name between them.

    Names in another column of the page, left of this one or right of the value, are not between. Age and sex of a
    patient stand near the other values of it.
    """
    record, _, name = path.rpartition("/")
    if is_denied_at(text, path, match):
        return False
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


def _begins_entry(text: PageText, number: int, name: Match) -> bool:
    """Whether a word below a name stands at its left edge, with a capital (pH, eGFR), and is neither a label ("Dose:")
    nor a value (PO, BID)."""
    word = text.words[number]
    if text.lines[number] == name.line or abs(word.box[0] - name.place.box[0]) > _height(name):
        return False
    letters = word.text.strip(".,;:()")
    is_value = any(is_listed(letters, kind) for kind in ("routes", "frequencies"))
    return letters[:2].casefold() != letters[:2] and not is_value and not find_key(letters, _LABELS, "titles")


def _untaken(matches: Sequence[Match], taken: set[int]) -> list[Match]:
    return [match for match in matches if not taken.intersection(range(match.start, match.stop))]


def _best_spelled(matches: list[Match]) -> list[Match]:
    """The exact ones of some matches, or else those in another spelling, or else all."""
    for spelling in _PENALTIES:
        if best := [match for match in matches if match.place.spelling == spelling]:
            return best
    return []


def _choose_anchor(record: Mapping[str, list[Match]], previous: Match | None) -> tuple[str, Match | None]:
    """Where a record stands, with the path of the value there: the match of its name, or else of its rarest value,
    to which its other values are nearest; of equals the one that follows the record before."""
    values = {path: matches for path, matches in record.items() if matches}
    if not values:
        return "", None
    names = [path for path in values if path.startswith(_NAMED) and path.endswith("/name")]
    rarest = min(
        names or values, key=lambda path: (len(values[path]), values[path][0].start - values[path][0].stop)
    )

    def cost(anchor: Match) -> tuple[float, float]:
        nearest = [min(_distance(anchor, match) for match in matches) for matches in values.values()]
        return round(sum(nearest), 1), _distance(previous, anchor) if previous else 0.0

    return rarest, min(values[rarest], key=cost)


def _distance(anchor: Match, match: Match) -> float:
    """How far a match is from another: the rows of a table and the words of a line hold together, however wide,
    and what belongs to a name stands behind it."""
    across = (match.place.box[0] - anchor.place.box[0]) / _height(anchor)
    down = match.line - anchor.line
    penalty = _PENALTIES[match.place.spelling]
    if down == 0:
        return penalty + (0.05 * across if across >= 0 else 1 - 0.1 * across)
    return penalty + abs(across) / 4 + (6 * down if down > 0 else 2 - 6 * down)


def _height(match: Match) -> float:
    return max(1.0, match.place.box[3] - match.place.box[1])
