"""What a drawn page says: fields drawn from the words, doses and ranges of `medical_words.toml`.

Values hang together only as far as is simple: a drug has its own doses and routes, a flag follows from the value and
its range. No field is that of a patient.
"""

import functools
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from attrs import evolve

from medvl.documents.fields import Diagnosis, Fields, Lab, Medication, Patient, Vital

KINDS = ("diagnosis", "radiology report", "prescription", "lab results", "discharge summary")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_Item = TypeVar("_Item")


@functools.cache
def words() -> dict[str, Any]:
    """The tables of `medical_words.toml`, which is installed beside this file."""
    text = Path(__file__).with_name("medical_words.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def pick(gen: np.random.Generator, items: Sequence[_Item]) -> _Item:
    """One of the items."""
    return items[int(gen.integers(len(items)))]


def sample(gen: np.random.Generator, items: Sequence[_Item], low: int, high: int) -> list[_Item]:
    """`low` to `high` different items, in any order."""
    count = int(gen.integers(low, high + 1))
    return [items[i] for i in gen.permutation(len(items))[:count]]


def draw_fields(kind: str, gen: np.random.Generator) -> Fields:
    """The fields of a page of one of `KINDS`. A page has either abbreviations (BID, COPD) or long forms."""
    short = bool(gen.random() < 0.6)
    patient = _draw_patient(gen)
    if kind == "radiology report":
        exam, text, impressions = _draw_radiology(gen)
        return Fields(kind, patient, impressions, procedures=(exam,), text=text)
    if kind == "prescription":
        return Fields(kind, patient, medications=_draw_medications(gen, 1, 5, short))
    if kind == "lab results":
        return Fields(kind, patient, labs=_draw_labs(gen, 7, 18, short))
    pairs = sample(gen, list(words()["diagnoses"].items()), 2, 5)
    diagnoses = tuple(
        Diagnosis(abbreviation if short and abbreviation else name) for name, abbreviation in pairs
    )
    names = sample(gen, list(words()["vitals"]), 3, 7)
    vitals = tuple(_draw_vital(gen, name, short) for name in names)
    if kind == "diagnosis":
        return Fields(kind, patient, diagnoses, _draw_medications(gen, 2, 7, short), vitals=vitals)
    assert kind == "discharge summary"
    return Fields(
        kind=kind,
        patient=patient,
        diagnoses=diagnoses,
        medications=_draw_medications(gen, 2, 6, short),
        labs=_draw_labs(gen, 2, 5, short),
        vitals=vitals,
        procedures=sample(gen, words()["procedures"]["names"], 1, 3),
        text=_draw_course(gen),
    )


def draw_grid_fields(kind: str, gen: np.random.Generator) -> Fields:
    """The few fields of a page of short words, of one of `KINDS` or a "line", whose text is all it says."""
    grid = words()["grid"]
    if kind == "line":
        return Fields(kind, text=_draw_line(gen))
    diagnoses = tuple(Diagnosis(name) for name in sample(gen, grid["diagnoses"], 1, 2))
    medication = Medication(
        name=pick(gen, grid["drugs"]),
        dose=pick(gen, grid["doses"]),
        unit=pick(gen, grid["units"]),
        frequency=pick(gen, grid["frequencies"]),
        prn=bool(gen.random() < 0.3),
    )
    if kind == "diagnosis":
        vital = _draw_vital(gen, pick(gen, grid["vitals"]), short=True)
        vital = evolve(vital, name=vital.name.upper(), unit="")
        return Fields(kind, diagnoses=diagnoses, medications=(medication,), vitals=(vital,))
    if kind == "radiology report":
        millimetres = int(gen.integers(2, 100))
        finding = pick(gen, grid["findings"])
        return Fields(kind, text=pick(gen, (f"NO {finding}", f"{finding} {millimetres}mm")))
    if kind == "prescription":
        return Fields(kind, medications=(medication,))
    names = sample(gen, grid["labs"], 1, 2)
    drawn = [_draw_lab(gen, name, short=True, normal=True) for name in names]
    labs = tuple(Lab(lab.name.upper(), lab.value, flag=lab.flag) for lab in drawn)
    if kind == "lab results":
        return Fields(kind, labs=labs)
    assert kind == "discharge summary"
    patient = Patient(sex=pick(gen, ("M", "F")), age=str(gen.integers(18, 96)))
    return Fields(kind, patient, diagnoses[:1], (medication,), labs[:1])


def lab_flag(value: str, test: dict[str, Any]) -> str:
    """LL, L, N, H or HH of a printed value.

    A value is far out (LL, HH) in the outer half of what is drawn beyond the normal range.

    Args:
        test: a table of [labs] in `medical_words.toml`.
    """
    far_low, low, high, far_high = _limits(test)
    number = float(value)
    if number < low:
        return "LL" if number < far_low else "L"
    if number > high:
        return "HH" if number > far_high else "H"
    return "N"


def _limits(test: dict[str, Any]) -> tuple[float, float, float, float]:
    """Where LL ends, the normal range, and where HH begins; an open end lies at infinity."""
    first, last = test["drawn"]
    low = float(test["normal"][0] or -math.inf)
    high = float(test["normal"][1] or math.inf)
    return (first + low) / 2, low, high, (high + last) / 2


def _draw_patient(gen: np.random.Generator) -> Patient:
    first, last = pick(gen, words()["people"]["first"]), pick(gen, words()["people"]["last"])
    year, month, day = int(gen.integers(2015, 2031)), int(gen.integers(1, 13)), int(gen.integers(1, 29))
    dates = (
        f"{year}-{month:02}-{day:02}",
        f"{month:02}/{day:02}/{year}",
        f"{day} {_MONTHS[month - 1]} {year}",
    )
    return Patient(
        name=pick(gen, (f"{first} {last}", f"{last}, {first}")),
        sex=pick(gen, ("M", "F", "Male", "Female")),
        age=str(gen.integers(18, 96)),
        record=f"{pick(gen, ('SYN-', 'T', ''))}{gen.integers(100_000, 1_000_000)}",
        date=pick(gen, dates),
    )


def _draw_medications(gen: np.random.Generator, low: int, high: int, short: bool) -> tuple[Medication, ...]:
    medications = []
    for name, drug in sample(gen, list(words()["drugs"].items()), low, high):
        route, frequency = pick(gen, drug["routes"]), pick(gen, drug["frequencies"])
        if not short:
            route, frequency = words()["routes"][route], words()["frequencies"][frequency]
        as_needed = drug.get("prn", False) and gen.random() < 0.6
        medication = Medication(name, pick(gen, drug["doses"]), drug["unit"], route, frequency, as_needed)
        medications.append(medication)
    return tuple(medications)


def _draw_labs(gen: np.random.Generator, low: int, high: int, short: bool) -> tuple[Lab, ...]:
    names = sample(gen, list(words()["labs"]), low, high)
    normal = bool(gen.random() < 0.4)  # some laboratories print the N of a normal value, too
    return tuple(_draw_lab(gen, name, short=short, normal=normal) for name in names)


def _draw_lab(gen: np.random.Generator, name: str, *, short: bool, normal: bool) -> Lab:
    """A test with a value: normal for one half, else low or high, and far out for two in five of these.

    Args:
        normal: print the flag N.
    """
    test = words()["labs"][name]
    first, last = test["drawn"]
    far_low, low, high, far_high = _limits(test)
    if gen.random() < 0.5:
        ends = (max(first, low), min(last, high))
    else:
        # Low and high, each with a near and a far part; a range that is open has one of them.
        sides = [(low, far_low, first)] if test["normal"][0] else []
        sides += [(high, far_high, last)] if test["normal"][1] else []
        limit, far, end = pick(gen, sides)
        ends = (limit, far) if gen.random() < 0.6 else (far, end)
    decimals = len((test["normal"][0] or test["normal"][1]).partition(".")[2])
    value = f"{gen.uniform(min(ends), max(ends)):.{decimals}f}"
    flag = lab_flag(value, test)
    if flag == "N" and not normal:
        flag = ""
    printed = test["short"] if short else name
    return Lab(printed, value, test["unit"], low=test["normal"][0], high=test["normal"][1], flag=flag)


def _draw_vital(gen: np.random.Generator, key: str, short: bool) -> Vital:
    sign = words()["vitals"][key]
    number = gen.uniform(*sign["drawn"])
    value = f"{number:.{sign['decimals']}f}"
    if "second" in sign:
        # The lower pressure of a pair stays well below the upper one.
        second = min(gen.uniform(*sign["second"]), number - 25)
        value = f"{value}/{second:.0f}"
    return Vital(sign["names"][0 if short else 1], value, sign["unit"])


def _draw_radiology(gen: np.random.Generator) -> tuple[str, str, tuple[Diagnosis, ...]]:
    """The exam, the text of the findings, and the impressions: what the text states, never what it denies."""
    exam, table = pick(gen, list(words()["radiology"].items()))
    positive = sample(gen, list(table["found"].items()), 1, 2)
    sentences = sample(gen, table["normal"], 2, 4)
    for _, sentence in positive:
        number = int(gen.integers(*table["drawn"]))
        sentences.append(sentence.format(n=number, x=f"{number / 10:.1f}"))
    text = " ".join(sentences[i] for i in gen.permutation(len(sentences)))
    return exam, text, tuple(Diagnosis(name) for name, _ in positive)


def _draw_course(gen: np.random.Generator) -> str:
    """The text of a stay in hospital."""
    course = words()["course"]
    sentences = sample(gen, course["admission"], 1, 1) + sample(gen, course["stay"], 1, 2)
    sentences += sample(gen, course["events"], 1, 3) + sample(gen, course["plan"], 1, 2)
    return " ".join(sentence.format(n=int(gen.integers(2, 15))) for sentence in sentences)


def _draw_line(gen: np.random.Generator) -> str:
    """One to three short words or numbers, at most 14 characters; some words are none, so that glyphs are read."""
    grid = words()["grid"]
    glyphs = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789./gmcL"
    line = ""
    for _ in range(int(gen.integers(1, 4))):
        noise = "".join(pick(gen, glyphs) for _ in range(int(gen.integers(2, 6))))
        dose = pick(gen, grid["doses"]) + pick(gen, grid["units"])
        word = pick(gen, (noise, noise, dose, pick(gen, grid["drugs"]), pick(gen, grid["diagnoses"])))
        if len(line) + len(word) < 14:
            line = f"{line} {word}".strip()
    return line
