"""The fields of running text or of a list, by rules, in the shape of the JSON of a page."""

import itertools
import re
from typing import Any

from medvl.documents.quantities import (
    BULLET,
    EVERY_HOURS,
    find_key,
    find_terms,
    is_denied,
    is_listed,
    normalise_unit,
    quantity_matches,
    spell,
)

PATIENT = ("sex", "age", "record", "date")  # of a patient, beside the name
SECTIONS = ("kind", "patient", "diagnoses", "medications", "labs", "vitals", "procedures", "text")
# Of an entry of a section.
ENTRY = ("name", "dose", "unit", "route", "frequency", "prn", "value", "low", "high", "flag", "range")
_DOSES = ("mcg", "mg", "g", "meq", "u", "ml", "tablet", "capsule", "puff", "drop", "spray", "patch", "dose")
_FLAG = re.compile(r"[\s()\[\],]*(HH|LL|H|L|N|high|low|normal|critical(?:ly)? (?:high|low))\b")
_PARTS = re.compile(r";|\s+(?=(?:Sex|Gender|Age|MRN|ID|Date|Issued)\b[a-z ()]*:)")
_HEADER = re.compile(r"([A-Za-z][A-Za-z /.()]{1,30}?)[*\s]*(?::[*\s]*(.*)|$)")
# Not "10 years ago".
_AGE = re.compile(
    r"\b(\d{1,3})[ -]?(?:(?:years?|yrs?)[ -]old|y/?o|(?:years?|yrs?)(?=[ -](?:fe)?male))\b[ -]?"
    r"(male|female|man|woman|[MF]\b)?",
    re.IGNORECASE,
)
# A name does not reach over these: "He takes metformin 500 mg".
_VERBS = re.compile(
    r"^.*\b(?:takes?|taking|starts?|started|continued?|gives?|given|prescribed|includ(?:es?|ing)|with|on|is|was|of|the"
    r"|has|shows?|at)\s",
    re.IGNORECASE,
)


def section_of(key: str) -> str:
    """The field of `Fields` or of the patient that a key or a header means; "" if none."""
    name = find_key(key, (*SECTIONS, "person", *PATIENT))
    return "name" if name == "person" else name


def read_prose(text: str, section: str = "") -> dict[str, Any]:
    """What a text states, as a dict of sections: "diagnoses", "medications", "labs", "vitals", "procedures", and
    keys of the patient. "Name: value" lines and headers are read, numbers with their units behind a name, and
    without a header for them the listed diagnoses that are not denied. Entries of no section ("Test: HbA1c") are
    under "rows".

    Args:
        section: that the text is of, up to its first header.
    """
    tree: dict[str, Any] = {}
    row: dict[str, str] = {}  # the last entry, to which "Dose: 500 mg" belongs
    ends = False  # whether the section ends with its sentence: "Diagnoses: COPD, CKD. He takes ..."
    for line in re.split(r"\n|\.\s+(?=[A-Z])", BULLET.sub("• ", spell(text))):
        if ends and section != "text":
            section = ""
        ends = False
        for part in _PARTS.split(line):
            part = re.sub(r"\s*\|\s*", " ", part).strip(" *.•")  # a row of a table is a line
            header = _HEADER.match(part)
            name = section_of(header[1]) if header else ""
            field = find_key(header[1], ENTRY) if header and header[2] else ""
            in_list = section in ("medications", "labs", "vitals")
            if header and field and (not name or (name == "name" and in_list)):
                if field == "name":
                    row = {}
                    tree.setdefault(section if in_list else "rows", []).append(row)
                row[field] = header[2]
                continue
            if header and name:
                section, part = name, header[2] or ""
                ends = bool(part) and not part.endswith(",")
            if section in ("diagnoses", "procedures"):
                # What a bullet marks is one entry: "- Endoscopy and biopsy".
                entries = [part] if line.startswith("•") else re.split(r",\s| and ", part)
                entries = [entry for entry in entries if entry.strip(" ,")]
                tree.setdefault(section, []).extend(entry for entry in entries if not is_denied(entry))
            elif name in ("patient", "name", *PATIENT):
                tree.setdefault(name, re.split(r",\s*(?=\d)", part)[0])  # "Jane Doe, 54 F"
            elif section != "text":
                rows = _read_line(part, section)
                is_name = re.fullmatch(r"[A-Za-z][A-Za-z -]{2,40}", part) and not find_key(part, ENTRY)
                if section == "medications" and is_name and not rows and not find_terms(part, "frequencies"):
                    rows = [(section, {"name": part})]  # a drug without a dose
                for kind, row in rows:
                    tree.setdefault(kind, []).append(row)
    if "diagnoses" not in tree:
        tree["diagnoses"] = find_terms(text, "diagnoses")
    age = _AGE.search(text)
    if age:
        tree.setdefault("age", age[1])
        tree.setdefault("sex", age[2] or "")
    return tree


def _read_line(line: str, section: str) -> list[tuple[str, dict[str, str]]]:
    """(section, row) of each medication, lab and vital sign: a name, a number, and what stands behind it."""
    rows: list[tuple[str, dict[str, str]]] = []
    hours = [match.span() for match in EVERY_HOURS.finditer(line)]
    matches = []
    for match in quantity_matches(line):
        if not match["date"] and not any(start <= match.start() < end for start, end in hours):
            matches.append(match)
    start = 0
    for match, following in itertools.zip_longest(matches, matches[1:]):
        # No name is longer; without this bound an answer that loops takes minutes.
        before = line[max(start, match.start() - 80) : match.start()]
        before = re.split(r"[,(;]|\band\b", before)[-1]
        stated = re.search(r"\b(low|high|elevated)\b", before)  # "was low at 9.8"
        before = re.sub(r"(?:[\s:=*-]|\b(?:is|was|of|at|low|high|elevated)\b)+$", "", before)
        name = _VERBS.sub("", before).strip(" *-")
        if not re.search("[A-Za-z]{2}|^[A-Z]$", name) or name.casefold().startswith(("ref", "normal")):
            continue
        start = match.end()
        unit, end = match["unit"] or "", match.end()
        if unit in ("H", "L"):  # a flag, not hours or litres
            unit, end = "", match.start("unit")
        number = line[match.start() : match.start("unit") if unit else end].strip()
        behind = line[end : following.start() if following else len(line)]
        row = {"name": name, "value": number, "unit": unit}
        canonical = normalise_unit(unit)
        is_dose = canonical.split("/")[0] in _DOSES and not re.search(r"/(?:d?l|ul|ml|min)$", canonical)
        is_lab = is_listed(name, "labs")
        if is_listed(name, "vitals"):
            rows.append(("vitals", row))
        elif section != "labs" and (is_dose or (section == "medications" and not is_lab)):
            if following:  # the last part is the next name
                behind = "".join(re.split(r"(,|\band\b)", behind)[:-1])
            behind = re.split(r"[(]|\b(?:and|for|with|then)\b", behind)[0]
            rows.append(("medications", row | {"frequency": behind.strip(" ,")}))
        # In running text a length or a share ("a nodule of 12 mm") is no test.
        elif is_lab or "/" in canonical or (unit and section == "labs"):
            flag = _FLAG.match(behind) or stated
            if following and following["join"] in ("-", "to"):
                row |= {"low": following["first"], "high": following["second"]}
                flag = flag or _FLAG.match(line, following.end("second"))
            rows.append(("labs", row | {"flag": flag[1] if flag else ""}))
    return rows
