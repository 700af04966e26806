"""Whether the pages show what an answer says: the place of each value, and what contradicts itself.

Nothing here reads an image: words come from `read_page`, or from a PDF's own text.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from attrs import asdict, evolve, field, frozen

from medvl.documents.fields import Fields, Lab, Vital, leaves
from medvl.documents.locate import find_on_pages
from medvl.documents.page_search import PageText, Place, find_value, join_pages
from medvl.documents.quantities import find_quantities, normalise_flag, parse_quantity, same_unit
from medvl.documents.rules import repair_word
from medvl.documents.words import Box, Word

Status = Literal["verified", "same", "similar", "elsewhere", "missing"]
WarningKind = Literal["flag", "range", "unit", "number", "patient", "empty", "repeat"]
_FREE_TEXTS = ("text", "procedures/", "diagnoses/")


@frozen(kw_only=True)
class Value:
    """The evidence for one value of an answer.

    Attributes:
        path: as in `fields.leaves`.
        status: "verified" = it stands on a page letter by letter and, if it is of a medication, test or vital sign,
            with that name; "same" = so, in another spelling of the same number, unit or listed term (8,4 for 8.4, ug
            for mcg, BID for twice daily), and is verified, too; "elsewhere" = not with its name, a unit not
            behind its number, a diagnosis or drug only where it is denied or an allergy; "similar" = only
            letters that look alike (O for 0, l for 1), or the most of a long text; "missing" = on no page. A
            reader's error makes a right value similar or missing: unverified means "look at the page".
        page: number of the page, from 0; None where it is missing.
        box: left, top, right, bottom in pixels of the page.
        score: from 0 to 1, of the reader's least sure word, halved where only similar.
        unshown: numbers of a running text that is not verified which do not stand on a page between the same words.
    """

    path: str
    text: str = field(repr=False)
    status: Status
    page: int | None = None
    box: Box | None = None
    score: float = 0.0
    unshown: tuple[str, ...] = field(default=(), repr=False)

    @property
    def verified(self) -> bool:
        return self.status in ("verified", "same")


@frozen(kw_only=True)
class Contradiction:
    """What cannot be right together, on the page or in the answer. The message holds no value."""

    path: str
    kind: WarningKind
    message: str


@frozen(kw_only=True)
class Evidence:
    """What pages show of an answer: a `Value` for each of its leaves, in their order."""

    values: tuple[Value, ...] = ()
    warnings: tuple[Contradiction, ...] = ()

    @property
    def unverified(self) -> tuple[str, ...]:
        """Paths of the values that a person must look at."""
        return tuple(value.path for value in self.values if not value.verified)


def check_fields(fields: Fields, pages: Sequence[Sequence[Word]]) -> Evidence:
    """Seek every value of an answer on its pages, and compare values with their ranges, flags and units.

    Args:
        pages: the words of each page, from `read_page`. The values of a record are sought on the page of its name.
    """
    texts = leaves(fields)
    pages = [[repair_word(word) for word in words] for words in pages]
    places = find_on_pages(fields, pages)
    values = [_value(path, text, places[path]) for path, text in texts.items()]
    warnings = _warnings(fields, places)
    warnings += _repeats(values)
    other_units = [warning.path for warning in warnings if warning.kind == "unit"]
    for i, value in enumerate(values):
        if value.path in other_units and value.verified:
            values[i] = evolve(value, status="elsewhere")
    if any(_is_unsure_text(value) for value in values):
        printed = join_pages(pages)
        for i, value in enumerate(values):
            if _is_unsure_text(value):
                values[i] = evolve(value, unshown=_unshown_numbers(value.text, printed))
    return Evidence(values=tuple(values), warnings=tuple(warnings))


def _value(path: str, text: str, place: Place | None) -> Value:
    if place is None:
        return Value(path=path, text=text, status="missing")
    found: dict[str, Status] = {"exact": "verified", "same": "same", "similar": "similar"}
    status = found[place.spelling]
    if status != "similar" and not place.is_with_name:
        status = "elsewhere"
    return Value(path=path, text=text, status=status, page=place.page, box=place.box, score=place.score)


def _is_unsure_text(value: Value) -> bool:
    return not value.verified and value.path.startswith(_FREE_TEXTS)


def _unshown_numbers(text: str, printed: PageText) -> tuple[str, ...]:
    """Numbers of a text which no page shows between the word before and the word behind."""
    words = text.split()
    stated = Counter[str]()
    unshown = []
    for i, word in enumerate(words):
        if re.search(r"\d", word):
            phrase = " ".join(words[max(0, i - 1) : i + 2])
            stated[phrase] += 1
            matches = find_value(printed, "text", phrase)
            # As often as the text states it.
            if sum(match.place.spelling == "exact" for match in matches) < stated[phrase]:
                unshown.append(word.strip(".,;:()"))
    return tuple(unshown)


# Without the unverified -------------------------------------------------------------------------------------
def drop_unverified(fields: Fields, evidence: Evidence) -> tuple[Fields, Evidence]:
    """What is verified of an answer, and its evidence under the new paths.

    An entry of a list whose name is not verified goes as a whole, another value alone. Warnings of what is left stay:
    they are about the answer as it was.
    """
    status = {value.path: value.verified for value in evidence.values}
    kept: dict[str, Any] = {"text": fields.text if status.get("text") else ""}
    moved: dict[str, str] = {}  # old path of an entry: new one
    kept["patient"] = _verified_part(fields.patient, "patient", status)
    for name in ("diagnoses", "medications", "labs", "vitals", "procedures"):
        kept[name] = []
        for i, entry in enumerate(getattr(fields, name)):
            path = f"{name}/{i}"
            if status.get(path if name == "procedures" else f"{path}/name"):
                moved[path] = f"{name}/{len(kept[name])}"
                kept[name].append(_verified_part(entry, path, status))
    return evolve(fields, **kept), Evidence(
        values=_move([value for value in evidence.values if value.verified], moved),
        warnings=_move(evidence.warnings, moved),
    )


def _verified_part(record: Any, path: str, status: Mapping[str, bool]) -> Any:
    """A record without its unverified values."""
    if isinstance(record, str):
        return record
    empty = type(record)()
    unverified = [name for name in asdict(record) if not status.get(f"{path}/{name}")]
    return evolve(record, **{name: getattr(empty, name) for name in unverified})


def _move(items: Sequence[Any], moved: Mapping[str, str]) -> tuple[Any, ...]:
    """Items under their new paths; without those of entries that are gone."""
    rows = []
    for item in items:
        entry = re.match(r"\w+/\d+", item.path)
        if entry is None:  # of the patient or the text
            rows.append(item)
        elif entry[0] in moved:
            rows.append(evolve(item, path=moved[entry[0]] + item.path[entry.end() :]))
    return tuple(rows)


def _repeats(values: Sequence[Value]) -> Iterator[Contradiction]:
    """Warnings of entries that the answer states more often than the pages."""
    verified = {(_list_of(value), value.text) for value in values if value.verified}
    for value in values:
        is_name = value.path.endswith("/name") or value.path.startswith("procedures/")
        if is_name and value.status == "missing" and (_list_of(value), value.text) in verified:
            message = "it is stated more often than the pages show it"
            yield Contradiction(path=value.path, kind="repeat", message=message)


def _list_of(value: Value) -> str:
    return value.path.partition("/")[0]


# Contradictions ---------------------------------------------------------------------------------------------
def _warnings(fields: Fields, places: Mapping[str, Place | None]) -> list[Contradiction]:
    warnings = list[Contradiction]()

    def warn(path: str, kind: WarningKind, message: str) -> None:
        warnings.append(Contradiction(path=path, kind=kind, message=message))

    for i, medication in enumerate(fields.medications):
        path = f"medications/{i}"
        if medication.dose and parse_quantity(medication.dose) is None:
            warn(f"{path}/dose", "number", "the dose is no number")
        if _has_other_unit(medication.dose, medication.unit, medication.name, places.get(f"{path}/dose")):
            warn(f"{path}/unit", "unit", "the page prints another unit behind the dose")
    measured: list[tuple[str, Lab | Vital]] = [(f"labs/{i}", lab) for i, lab in enumerate(fields.labs)]
    measured += [(f"vitals/{i}", vital) for i, vital in enumerate(fields.vitals)]
    for path, row in measured:
        is_number_due = row.unit or (isinstance(row, Lab) and (row.low or row.high))
        if row.value and is_number_due and parse_quantity(row.value) is None:
            warn(f"{path}/value", "number", "the value is no number, but it has a unit or a range")
        if _has_other_unit(row.value, row.unit, row.name, places.get(f"{path}/value")):
            warn(f"{path}/unit", "unit", "the page prints another unit behind the value")
        if isinstance(row, Lab):
            limits = _limits(row)
            if limits and limits[0] > limits[1]:
                warn(f"{path}/low", "range", "the lower end of the range is above its upper end")
            elif message := _flag_error(row, limits):
                warn(f"{path}/flag", "flag", message)
    return warnings


def _has_other_unit(value: str, unit: str, name: str, place: Place | None) -> bool:
    """Whether a unit that the list knows stands right behind the value and is not the stated one."""
    if not unit or place is None or place.spelling == "similar" or not place.is_with_name:
        return False
    quantities = find_quantities(f"{value} {place.behind.rpartition(' ')[0]}")
    printed = quantities[0].unit if quantities else ""
    # "5.9 H" has a flag and no unit.
    return printed not in ("", "h", "l") and not same_unit(printed, unit, name)


def _limits(lab: Lab) -> tuple[float | Decimal, float | Decimal] | None:
    """The ends of a range; None where there is none, or an end is no plain number."""
    ends = list[float | Decimal]()
    for text, sign, default in ((lab.low, ">", -math.inf), (lab.high, "<", math.inf)):
        quantity = parse_quantity(text) if text else None
        if not text:
            ends.append(default)
        elif quantity is None or len(quantity.numbers) != 1 or quantity.sign.strip("=") not in ("", sign):
            return None
        else:
            ends.append(quantity.numbers[0])
    return (ends[0], ends[1]) if lab.low or lab.high else None


def _flag_error(lab: Lab, limits: tuple[float | Decimal, float | Decimal] | None) -> str:
    """What is wrong with a flag; "" where it fits, or where value and range do not decide."""
    allowed = {"N": "N", "H": "H", "HH": "H", "L": "L", "LL": "L", "A": "HL"}.get(normalise_flag(lab.flag))
    if not lab.flag:
        allowed = "N"
    value = parse_quantity(lab.value, lab.unit)
    if limits is None or value is None or len(value.numbers) != 1 or value.sign == "~" or allowed is None:
        return ""
    if lab.unit and not same_unit(value.unit, lab.unit, lab.name):
        return ""
    possible = _possible_sides(value.numbers[0], value.sign, *limits)
    if set(allowed) & possible:
        return ""
    side = {"H": "above", "L": "below", "N": "inside", "HN": "not below", "LN": "not above", "HL": "outside"}
    where = side["".join(sorted(possible))]
    if not lab.flag:
        return f"the value is {where} its printed range and has no flag"
    return f"the value is {where} its printed range, and its flag says otherwise"


def _possible_sides(number: Any, sign: str, low: Any, high: Any) -> set[str]:
    """Where a value may lie: L below the range, N inside, H above. "<5" is any value below 5.

    A value at the only end of a range is on either side: "<5" and "up to 5" are both written for it.
    """
    least = -math.inf if sign.startswith("<") else number
    most = math.inf if sign.startswith(">") else number
    sides = set[str]()
    if least < low or (number == low and high == math.inf and not sign):
        sides.add("L")
    if most > high or (number == high and low == -math.inf and not sign):
        sides.add("H")
    first, last = max(least, low), min(most, high)
    if first < last or (first == last and sign not in ("<", ">")):
        sides.add("N")
    return sides
