"""The fields of a medical page as records, as JSON, and as a model's answer states them.

Every value is the text that is printed on the page ("8.40", ">60", "120/80"); nothing is converted here.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from attrs import asdict, evolve, field, fields_dict, frozen

from medvl.documents.loose_json import find_json
from medvl.documents.prose import ENTRY, PATIENT, read_prose, section_of
from medvl.documents.quantities import find_key, find_terms, is_denied, same_term, spell


def _as_tuple(rows: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(rows)


@frozen
class Patient:
    """Who the page is about. Pages that are drawn here name nobody real."""

    name: str = ""
    sex: str = ""
    age: str = ""
    record: str = ""  # the number of the medical record (MRN)
    date: str = ""  # of the page


@frozen
class Diagnosis:
    """A diagnosis that the page states; a denied one ("no pneumonia") is none."""

    name: str = ""


@frozen
class Medication:
    """One line of a prescription: "Metformin 500 mg PO BID"."""

    name: str = ""
    dose: str = ""  # the number: "500", "2.5", "5-10"
    unit: str = ""  # of the dose: "mg", "mg/5 mL", "tablets"
    route: str = ""  # "PO", "IV"
    frequency: str = ""  # "BID", "every 6 hours"
    prn: bool = False  # as needed


@frozen
class Lab:
    """One laboratory test with its reference range."""

    name: str = ""
    value: str = ""
    unit: str = ""  # of value, low and high
    low: str = ""  # lower end of the reference range
    high: str = ""
    flag: str = ""  # H, L, HH, LL, N


@frozen
class Vital:
    """One vital sign: "BP 120/80 mmHg"."""

    name: str = ""
    value: str = ""
    unit: str = ""


@frozen
class Fields:
    """What a page says. `read_as` tells how `read_answer` got them and takes no part in comparisons."""

    kind: str = ""  # "prescription", "lab results", ...; not printed as such
    patient: Patient = Patient()
    diagnoses: tuple[Diagnosis, ...] = field(default=(), converter=_as_tuple)
    medications: tuple[Medication, ...] = field(default=(), converter=_as_tuple)
    labs: tuple[Lab, ...] = field(default=(), converter=_as_tuple)
    vitals: tuple[Vital, ...] = field(default=(), converter=_as_tuple)
    procedures: tuple[str, ...] = field(default=(), converter=_as_tuple)
    text: str = ""  # free text: findings, history, and what no other field takes
    read_as: str = field(default="", eq=False)  # "", "json", "fenced json", "repaired json", "prose", "empty"


def fields_to_json(fields: Fields) -> str:
    """The fields as compact JSON, what is empty left out; keys stand in the order of the records."""
    return json.dumps(asdict(fields, filter=_is_stated), ensure_ascii=False, separators=(",", ":"))


def leaves(fields: Fields) -> dict[str, str]:
    """The printed values of a page by path, empty ones left out.

    Paths are such as "patient/age", "labs/0/value", "procedures/1" and "text". A medication as needed has
    the leaf "medications/0/prn": "PRN". `kind` is not printed and has none.
    """
    return dict(_flatten(asdict(evolve(fields, kind=""), filter=_is_stated), ""))


def json_leaves(tree: Any) -> dict[str, str]:
    """The texts and numbers of any JSON by path, as `leaves` has those of a page; true, false and null are not printed.

    In keys "/" is written ~1 and "~" is ~0, as in JSON pointers (RFC 6901).
    """
    found: dict[str, str] = {}
    todo: list[tuple[str, Any]] = [("", tree)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            # From the last on, as the last of the list is taken first.
            todo += reversed(
                [(f"{path}/{_escaped(str(key))}".removeprefix("/"), part) for key, part in items]
            )
        elif isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            found[path] = str(value)
    return found


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _is_stated(attribute: Any, value: Any) -> bool:
    return attribute.name != "read_as" and value not in ("", False, (), Patient())


def read_answer(text: str) -> Fields:
    """The fields that a model's answer states; never raises for what a model wrote.

    JSON is read as `find_json` does, with other usual key names (`keys` in medical_terms.toml) and values such
    as "500 mg" or "8.4 % H" taken apart; other answers by the rules of `read_prose`. Denied diagnoses ("no
    pneumonia") and what no field takes go to `text`.

    Returns:
        the fields; `read_as` is "json", "fenced json", "repaired json", "prose" or "empty".
    """
    if not text.strip():
        return Fields(read_as="empty")
    found = find_json(text)
    if found is None:
        tree = read_prose(text)
        for section, rows in _sections_of_rows(tree.pop("rows", [])).items():
            tree[section] = tree.get(section, []) + rows
        return _read_tree(tree, text.strip(), "prose")
    try:
        return _read_tree(*found)
    except RecursionError:  # a thousand brackets, which are valid JSON
        return Fields(text=text, read_as="prose")


_RECORDS: dict[str, Any] = {"diagnoses": Diagnosis, "medications": Medication, "labs": Lab, "vitals": Vital}


def _read_tree(tree: Any, around: str, read_as: str) -> Fields:
    """Fields from parsed JSON; `around` is what the answer says outside of it."""
    if isinstance(tree, list):
        tree = _sections_of_rows(tree)
    inner = next(iter(tree.values())) if len(tree) == 1 else None
    if isinstance(inner, dict) and not any(map(section_of, tree)):
        tree = inner  # {"document": {...}}
    patient: dict[str, str] = {}
    lists: dict[str, list[Any]] = {name: [] for name in (*_RECORDS, "procedures")}
    kind = ""
    rest = [around]
    for key, value in tree.items():
        name = section_of(key)
        if name == "patient" and isinstance(value, dict):
            known, unknown = _read_row(value, Patient)
            patient = known | patient
            rest += unknown
        elif name in ("patient", "name", *PATIENT):
            patient.setdefault("name" if name == "patient" else name, _as_text(value))
        elif name == "procedures":
            lists[name] += [_as_text(row.get("name", row)) for row in _as_rows(value, name)]
        elif name in _RECORDS:
            for row in _as_rows(value, name):
                known, unknown = _read_row(row, _RECORDS[name])
                rest += unknown
                if name == "diagnoses" and is_denied(known.get("name", "")):
                    rest.append(known["name"])
                elif any(known.values()):
                    lists[name].append(_split_values(_RECORDS[name](**known)))
        elif name == "kind":
            kind = _as_text(value)
        else:
            rest.append(_as_text(value) if name == "text" else f"{key}: {_as_text(value)}")
    text = "\n".join(filter(None, rest))
    return Fields(kind=kind, patient=Patient(**patient), text=text, read_as=read_as, **lists)


def _sections_of_rows(rows: list[Any]) -> dict[str, Any]:
    """A bare list of records by section: with a dose or frequency it is of medications, with a value of labs."""
    tree: dict[str, Any] = {}
    for row in rows:
        section = ""
        if isinstance(row, dict):
            keys = {find_key(key, ENTRY) for key in row}
            section = "labs" if "value" in keys else "medications" if keys - {"", "name"} else "diagnoses"
        tree.setdefault(section, []).append(row)
    return tree


def _as_rows(value: Any, section: str) -> list[dict[str, Any]]:
    """The entries of a section, each a dict: from a list, from {name: value}, or from one text."""
    if isinstance(value, dict):
        if any(find_key(key, _names(section)) for key in value):
            return [value]
        entries = value.items()
        return [{"name": name} | (row if isinstance(row, dict) else {"value": row}) for name, row in entries]
    rows: list[dict[str, Any]] = []
    for row in value if isinstance(value, list) else re.split(r"[;\n]", _as_text(value)):
        if isinstance(row, dict):
            rows.append(row)
        elif text := _as_text(row):
            # One text, "Metformin 500 mg PO BID", is read as prose is.
            is_list = section not in ("diagnoses", "procedures")
            rows += (read_prose(text, section).get(section) if is_list else None) or [{"name": text}]
    return rows


@functools.cache
def _names(section: str) -> tuple[str, ...]:
    return tuple(fields_dict(_RECORDS.get(section, Diagnosis)))


_LIMITS = re.compile(r"[\s(\[]*([<>]=?)?\s*(\d[\d.,]*)(?:\s?(?:-|to)\s?(\d[\d.,]*))?")


def _read_row(row: dict[str, Any], record: Any) -> tuple[dict[str, Any], list[str]]:
    """(values by field of the record, what no field takes)."""
    known: dict[str, Any] = {}
    rest = []
    names = tuple(fields_dict(record))
    for key, value in row.items():
        text = _as_text(value)
        name = find_key(key, names)
        limits = _LIMITS.match(spell(text)) if record is Lab and find_key(key, ("range",)) else None
        if record is Medication and find_key(key, ("value",)):
            name = "dose"
        if name == "prn":
            known[name] = text.casefold() not in ("", "no", "false", "0", "n")
        elif name and name not in known:
            known[name] = text
        elif limits and limits[3]:
            known |= {"low": limits[2], "high": limits[3]}
        elif limits and limits[1]:
            known["low" if ">" in limits[1] else "high"] = limits[2]
        elif text:
            rest.append(f"{key}: {text}")
    return known, rest


def _split_values(record: Any) -> Any:
    """Units and flags out of values ("8.4 % H"), route and "as needed" out of the frequency ("PO BID PRN")."""
    if isinstance(record, Medication):
        frequency, route = record.frequency, record.route
        listed = find_terms(frequency, "frequencies")
        needed = [term for term in listed if same_term(term, "PRN", "frequencies")]
        routes = find_terms(frequency, "routes")[:1] if not route else []
        for term in needed + routes:
            spaced = r"\.?".join(map(re.escape, term)).replace(r"\ ", r"\s+")
            frequency = re.sub(rf"\b{spaced}(?!\w)\.?", "", spell(frequency), flags=re.IGNORECASE)
        dose, unit, _ = _split_value(record.dose, record.unit)
        return evolve(
            record,
            dose=dose,
            unit=unit,
            route="".join(routes) or route,
            frequency=" ".join(frequency.split()).strip(" ,.()"),
            prn=record.prn or bool(needed),
        )
    if isinstance(record, Lab | Vital):
        value, unit, flag = _split_value(record.value, record.unit)
        record = evolve(record, value=value, unit=unit)
        if isinstance(record, Lab) and flag and not record.flag:
            record = evolve(record, flag=flag)
    return record


_VALUE = re.compile(
    r"([^A-Za-z\d]*\d[\d.,]*(?:\s?[/-]\s?\d[\d.,]*)?)\s?"
    r"((?:[x×*]\s?)?10\^\S+?|[^\d\s(].*?)??(?:\s?[\s(](HH|LL|H|L)\)?)?"
)


def _split_value(value: str, unit: str) -> tuple[str, str, str]:
    """(number, unit, flag) of a value such as "8.4 % H"; a value that is no number stays whole."""
    parts = _VALUE.fullmatch(value)
    if parts is None or (parts[2] and unit):
        return value, unit, ""
    return parts[1].strip(), parts[2] or unit, parts[3] or ""


def _as_text(value: Any) -> str:
    """Any part of JSON as one text."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_as_text(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    text = "" if value is None else str(value).strip()
    return "" if text.casefold() in _NOTHING else text


# What models write where a page says nothing.
_NOTHING = (
    "none",
    "n/a",
    "null",
    "unknown",
    *(f"not {x}" for x in ("available", "provided", "specified", "mentioned")),
)


def _flatten(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, value) of each leaf that is not empty, in order."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _flatten(value, f"{path}/{key}".lstrip("/"))
    elif tree:
        yield path, "PRN" if tree is True else tree
