"""The fields of a medical page as records, as JSON, and as a model's answer states them.

Every value is the text that is printed on the page ("8.40", ">60", "120/80"); nothing is converted here.
"""

import json
from typing import Any

from attrs import asdict, field, fields_dict, frozen


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
    diagnoses: tuple[Diagnosis, ...] = field(default=(), converter=tuple)
    medications: tuple[Medication, ...] = field(default=(), converter=tuple)
    labs: tuple[Lab, ...] = field(default=(), converter=tuple)
    vitals: tuple[Vital, ...] = field(default=(), converter=tuple)
    procedures: tuple[str, ...] = field(default=(), converter=tuple)
    text: str = ""  # free text: findings, history, and what no other field takes
    read_as: str = field(default="", eq=False)  # "", "json", "fenced json", "repaired json", "prose", "empty"


def fields_to_json(fields: Fields) -> str:
    """The fields as compact JSON, what is empty left out; keys stand in the order of the records."""
    tree = asdict(fields)
    del tree["read_as"]
    return json.dumps(_without_empty(tree), ensure_ascii=False, separators=(",", ":"))


def leaves(fields: Fields) -> dict[str, str]:
    """The printed values of a page by path, empty ones left out.

    Paths are such as "patient/age", "labs/0/value", "procedures/1" and "text". A medication as needed has
    the leaf "medications/0/prn": "PRN". `kind` is not printed and has none.
    """
    tree = asdict(fields)
    del tree["read_as"], tree["kind"]
    return dict(_flatten(tree, ""))


def read_answer(text: str) -> Fields:
    """The fields that a model's answer states; never raises for what a model wrote.

    Args:
        text: JSON of `fields_to_json`.
    Returns:
        the fields; `read_as` says how they were read.
    """
    try:
        tree = json.loads(text)
    except ValueError:
        return Fields(text=text.strip(), read_as="prose" if text.strip() else "empty")
    if not isinstance(tree, dict):
        return Fields(text=text.strip(), read_as="prose")
    parts: dict[str, Any] = {name: tree[name] for name in ("kind", "procedures", "text") if name in tree}
    parts["patient"] = Patient(**tree.get("patient", {}))
    for name, record in _RECORDS.items():
        known = fields_dict(record)
        parts[name] = [record(**{k: v for k, v in row.items() if k in known}) for row in tree.get(name, ())]
    return Fields(**parts, read_as="json")


_RECORDS: dict[str, Any] = {"diagnoses": Diagnosis, "medications": Medication, "labs": Lab, "vitals": Vital}


def _without_empty(tree: Any) -> Any:
    """A tree of dicts and lists without "", False, {} and []."""
    if isinstance(tree, dict):
        parts = {key: _without_empty(value) for key, value in tree.items()}
        return {key: value for key, value in parts.items() if value}
    if isinstance(tree, list | tuple):
        return [_without_empty(value) for value in tree]
    return tree


def _flatten(tree: Any, path: str) -> list[tuple[str, str]]:
    """(path, value) of each leaf that is not empty, in order."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    elif not tree:
        return []
    else:
        return [(path, "PRN" if tree is True else tree)]
    pairs = []
    for key, value in items:
        pairs += _flatten(value, f"{path}/{key}" if path else str(key))
    return pairs
