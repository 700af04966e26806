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

from medvl.documents.fields import Fields, Lab, Medication, Vital, leaves
from medvl.documents.locate import find_on_pages
from medvl.documents.page_search import PageText, Place, find_value, join_pages
from medvl.documents.quantities import find_quantities, normalise_flag, parse_quantity, same_unit
from medvl.documents.rules import extract_by_rules, repair_word
from medvl.documents.words import Box, Word

Status = Literal["verified", "same", "similar", "elsewhere", "missing"]
WarningKind = Literal[
    "flag", "range", "unit", "number", "patient", "empty", "unchecked", "repeat", "cut", "prose"
]
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
class LeftOut:
    """A value that `drop_unverified` has left out, without its text.

    Attributes:
        path: its entry as it is in what is left, and the name of the value ("labs/0/unit"); of an entry that is left
            out whole, as its name is not verified, the name of its list ("labs").
        status: of the value, or of the name of the entry; also "verified" of what says something else without another.
        page: where it stands, from 0.
    """

    path: str
    status: Status
    page: int | None = None


@frozen(kw_only=True)
class Evidence:
    """What pages show of an answer: a `Value` for each of its leaves, in their order."""

    values: tuple[Value, ...] = ()
    warnings: tuple[Contradiction, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

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
    values = _patient_by_labels(values, pages)
    if any(_is_unsure_text(value) for value in values):
        printed = join_pages(pages)
        for i, value in enumerate(values):
            if _is_unsure_text(value):
                values[i] = evolve(value, unshown=_unshown_numbers(value.text, printed))
    return Evidence(values=tuple(values), warnings=tuple(warnings))


def _patient_by_labels(values: Sequence[Value], pages: Sequence[Sequence[Word]]) -> list[Value]:
    """Values of the patient that stand on a page, but not behind the label of their kind, where a page has one.

    "Referred by: Dr. Weiss, Patient: Rohr" shows both names, and 28 of "Age: 82, Room 28" is a number: who a page is
    about its labels say.
    """
    if not any(value.verified and value.path.startswith("patient/") for value in values):
        return list(values)
    labelled = [extract_by_rules(words).patient for words in pages]
    checked = []
    for value in values:
        section, _, name = value.path.partition("/")
        if section == "patient" and value.verified:
            printed = [text for patient in labelled if (text := getattr(patient, name))]
            if printed and not any(_is_part_of(value.text, text, name) for text in printed):
                value = evolve(value, status="elsewhere")
        checked.append(value)
    return checked


def _is_part_of(answer: str, printed: str, name: str) -> bool:
    """Whether all words of a value of the patient are those behind its label, whatever their order."""
    words, others = ({*re.findall(r"\w+", text.casefold())} for text in (answer, printed))
    if name == "sex":  # "F", "female"
        return {word[0] for word in words} <= {word[0] for word in others}
    return words <= others


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
    """What is verified of an answer, and its evidence under the new paths, with what was left out.

    An entry of a list whose name is not verified goes as a whole. A number and its unit go together, a flag with its
    value, and both ends of a range. Warnings are those of what is left.
    """
    values = {value.path: value for value in evidence.values}
    moved: dict[str, str] = {}  # old path of a value that is kept: new one
    left_out = list[LeftOut]()

    def leave_out(old: str, path: str) -> None:
        left_out.append(LeftOut(path=path, status=values[old].status, page=values[old].page))

    def keep_part(record: Any, old: str, new: str) -> Any:
        stated = [name for name in asdict(record) if f"{old}/{name}" in values]
        unverified = {name for name in stated if not values[f"{old}/{name}"].verified}
        dropped = _with_dependants(record, unverified)
        for name in stated:
            if name in dropped:
                leave_out(f"{old}/{name}", f"{new}/{name}")
            else:
                moved[f"{old}/{name}"] = f"{new}/{name}"
        empty = type(record)()
        return evolve(record, **{name: getattr(empty, name) for name in dropped})

    kept: dict[str, Any] = {"patient": keep_part(fields.patient, "patient", "patient")}
    for section in ("diagnoses", "medications", "labs", "vitals", "procedures"):
        rows: list[Any] = []
        for i, entry in enumerate(getattr(fields, section)):
            old, new = f"{section}/{i}", f"{section}/{len(rows)}"
            name = old if section == "procedures" else f"{old}/name"
            if name not in values or not values[name].verified:
                stated = [path for path in values if path == name or path.startswith(f"{old}/")]
                for path in stated[:1]:  # the name, or what an entry without one begins with
                    leave_out(path, section)
            elif section == "procedures":
                moved[old] = new
                rows.append(entry)
            else:
                rows.append(keep_part(entry, old, new))
        kept[section] = rows
    if "text" in values and values["text"].verified:
        moved["text"] = "text"
    elif "text" in values:
        leave_out("text", "text")
        kept["text"] = ""
    fields = evolve(fields, **kept)
    gone = {value.path for value in left_out}
    return fields, Evidence(
        values=tuple(
            evolve(value, path=moved[value.path]) for value in evidence.values if value.path in moved
        ),
        warnings=tuple(warning for warning in _warnings(fields, {}) if warning.path not in gone),
        left_out=tuple(left_out),
    )


def _with_dependants(record: Any, unverified: set[str]) -> set[str]:
    """Names of the unverified values of a record, and of those that say something else without them."""
    dropped = set(unverified)
    number = "dose" if isinstance(record, Medication) else "value"
    if dropped & {number, "unit"}:
        dropped |= {number, "flag"}
    # Half of a range is another range, and a range is in the unit of its test.
    if dropped & {"low", "high", "unit"}:
        dropped |= {"low", "high"}
    has_range = isinstance(record, Lab) and (record.low or record.high) and "low" not in dropped
    if number in dropped and not has_range:
        dropped.add("unit")
    return dropped & set(asdict(record))


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
