import tomllib
from decimal import Decimal
from importlib.resources import files

import pytest

from medvl.documents.quantities import (
    find_quantities,
    find_terms,
    holds_term,
    holds_value,
    is_denied,
    normalise_flag,
    normalise_unit,
    numbers_in,
    parse_quantity,
    same_flag,
    same_term,
    same_unit,
    same_value,
)


@pytest.mark.parametrize(
    ("text", "sign", "numbers", "join", "unit"),
    [
        ("8.40 %", "", ["8.4"], "", "%"),
        ("8,4%", "", ["8.4"], "", "%"),
        ("1,200", "", ["1200"], "", ""),
        ("0,125", "", ["0.125"], "", ""),
        ("1.234,5", "", ["1234.5"], "", ""),
        ("1,234.5", "", ["1234.5"], "", ""),
        ("12,34", "", ["12.34"], "", ""),
        ("1,234,567", "", ["1234567"], "", ""),
        ("≥ 60", ">=", ["60"], "", ""),
        ("less than 0.01 ng/mL", "<", ["0.01"], "", "mcg/l"),
        ("\u22122.5", "", ["-2.5"], "", ""),
        ("120 / 80 mm Hg", "", ["120", "80"], "/", "mmhg"),
        ("5\u201310 mg", "", ["5", "10"], "-", "mg"),
        ("250 mg/5 mL", "", ["250"], "", "mg/5ml"),
        ("7.2 × 10⁹/L", "", ["7.2"], "", "10^9/l"),
        ("7.2x10*9/L", "", ["7.2"], "", "10^9/l"),
        ("7.2 K/µL", "", ["7.2"], "", "10^9/l"),
        ("60 mL/min/1.73 m²", "", ["60"], "", "ml/min/1.73m2"),
        ("72 beats per minute", "", ["72"], "", "/min"),
        ("2024-01-31", "", [], "date", "2024-01-31"),
        (".5 mg", "", ["0.5"], "", "mg"),
        ("1\u202f000 mg", "", ["1000"], "", "mg"),
        ("1 000 mg", "", ["1000"], "", "mg"),
        ("-5 to -2", "", ["-5", "-2"], "-", ""),
        ("12.0-16.0 g/dL", "", ["12", "16"], "-", "g/dl"),
    ],
)
def test_a_number_is_found_with_its_sign_and_unit(text, sign, numbers, join, unit):
    (got,) = find_quantities(f"Value: {text}, stable.")
    assert (got.sign, got.join, got.unit) == (sign, join, unit)
    assert list(got.numbers) == [Decimal(number) for number in numbers]
    assert parse_quantity(text) == got


def test_digits_within_names_and_numbers_are_none():
    assert find_quantities("HbA1c, T4, SpO2, COVID-19, L4-5, WBC (10^9/L), Q6H") == []
    assert parse_quantity("5 of 10") is None
    assert parse_quantity("negative") is None
    assert parse_quantity("2 sachets").unit == "sachets"


def test_numbers_that_stand_beside_each_other_stay_apart():
    assert [q.numbers for q in find_quantities("2 500 mg tablets")] == [(2,), (500,)]
    assert [q.numbers for q in find_quantities("Glucose 92, 143")] == [(92,), (143,)]


def test_no_part_of_a_number_is_found_in_it(gen):
    """Every run of digits and points within a number that is not the number itself."""
    for whole in ("11.2", "120/80", "1250", "3.125", "5-10", "1,200"):
        assert holds_value(f"Creatinine {whole} mg/dL", f"{whole} mg/dL")
        for start in range(len(whole)):
            for end in range(start + 1, len(whole) + 1):
                part = whole[start:end].strip(".,/-")
                if part and part != whole:
                    assert not holds_value(f"Creatinine {whole} mg/dL", f"{part} mg/dL"), (whole, part)


def test_units_are_equal_only_where_they_are_one_size():
    for row in (
        ("ug", "mcg", "\u00b5g", "\u03bcg", "micrograms"),
        ("mg/dL", "MG/DL", "mg per dL", "mg / dl"),
        ("10^9/L", "x10^9/L", "x10⁹/L", "10^3/uL", "K/µL", "x109/L", "×10*9/l"),
        ("U/L", "IU/L", "units/L"),
        ("mmHg", "mm Hg"),
        ("mL/min/1.73m2", "mL/min/1.73 m²", "mL/min/1.73 m^2"),
        ("ng/mL", "µg/L"),
        ("bpm", "/min", "beats/min"),
        ("mL", "cc"),
        ("tab", "tablets"),
    ):
        assert len({normalise_unit(unit) for unit in row}) == 1, row
    for a, b in (
        ("mg", "mcg"),
        ("mg/dL", "mg/L"),
        ("mmol/L", "mg/dL"),
        ("10^9/L", "10^12/L"),
        ("g", "kg"),
        ("mU/L", "U/L"),
    ):
        assert not same_unit(a, b)
    assert same_unit("mEq/L", "mmol/L", "Na")
    assert same_unit("mmol/L", "mEq/L", "potassium")
    assert not same_unit("mEq/L", "mmol/L", "Calcium")
    assert not same_unit("mEq/L", "mmol/L")


def test_values_are_numbers_with_their_units():
    assert same_value("8.4", "8.40 %", "%")
    assert same_value("500", "500", "mg")  # a unit that is missing contradicts nothing
    assert not same_value("500", "500", "mg", "mcg")
    assert not same_value(">60", "60")
    assert same_value("Negative", "negative")
    assert not same_value("Negative", "5")
    assert not same_value("2024-01-31", "2024-01-30")


def test_terms_are_the_same_or_abbreviations():
    for kind, a, b, how in (
        ("frequencies", "BID", "b.i.d.", "same"),
        ("frequencies", "BID", "twice daily", "abbreviation"),
        ("frequencies", "Q6H", "every 6 hours", "abbreviation"),
        ("frequencies", "Q4-6H", "every 4 to 6 hours", "abbreviation"),
        ("frequencies", "BID", "TID", ""),
        ("frequencies", "Q6H", "Q8H", ""),
        ("diagnoses", "Acute MI", "acute myocardial infarction", "abbreviation"),
        ("diagnoses", "COPD", "Chronic obstructive pulmonary disease (COPD)", "abbreviation"),
        ("diagnoses", "Pneumonia (right)", "Pneumonia (left)", ""),
        ("diagnoses", "DM", "T2DM", ""),
        ("routes", "p.o.", "by mouth", "abbreviation"),
        ("labs", "Mg", "magnesium", "abbreviation"),
        ("labs", "Vitamin B12", "Vitamin B1", ""),
    ):
        assert same_term(a, b, kind) == how, (a, b)
        assert same_term(b, a, kind) == how, (b, a)
    assert same_term("", "", "labs") == ""
    assert not holds_term("No answer - none.", "-", "diagnoses")
    # a name within another name
    assert not holds_term("HbA1c 8.4 %", "Hemoglobin", "labs")
    assert not holds_term("Hemoglobin A1c 8.4 %", "Hemoglobin", "labs")
    assert not holds_term("T2DM", "DM", "diagnoses")
    # ... which of a diagnosis states the shorter one
    assert holds_term("Community-acquired pneumonia", "pneumonia", "diagnoses")
    assert holds_term("Follow-up of diabetes mellitus", "diabetes", "diagnoses")
    assert holds_term("Three times per day", "TID", "frequencies")


def test_flags_have_long_forms():
    for flag, forms in {
        "H": ("H", "h", "High", "(H)", "↑"),
        "LL": ("LL", "critical low"),
        "N": ("WNL", "Normal"),
    }.items():
        assert {normalise_flag(form) for form in forms} == {flag}
    assert same_flag("H", "high") == "abbreviation"
    assert same_flag("H", "H") == "same"
    assert same_flag("H", "HH") == ""


@pytest.mark.parametrize(
    ("text", "term", "stated"),
    [
        ("No evidence of pneumonia.", "pneumonia", False),
        ("No fever. Pneumonia.", "pneumonia", True),
        ("Denies fever but has pneumonia", "pneumonia", True),
        ("No fever, has pneumonia", "pneumonia", True),
        ("Does not have pneumonia", "pneumonia", False),
        ("Pneumonia is not seen", "pneumonia", False),
        ("Pneumonia: no", "pneumonia", False),
        ("Pneumonia, no effusion", "pneumonia", True),
        ("Pneumonia, no effusion", "effusion", False),
        ("Pneumonia present, effusion absent", "pneumonia", True),
        ("Pneumonia present, effusion absent", "effusion", False),
        ("Negative for DVT and PE", "pulmonary embolism", False),
        ("Pneumonia has been excluded", "pneumonia", False),
        ("no h/o DM", "DM", False),
        ("no pneumonia or pleural effusion", "pleural effusion", False),
        ("no pneumonia; pleural effusion", "pleural effusion", True),
        ("Nonsmoker with asthma", "asthma", True),
        ("As usual, Ms. Doe walks", "multiple sclerosis", False),
        ("Pneumonia not only on the left", "pneumonia", True),
    ],
)
def test_denied_findings_are_not_stated(text, term, stated):
    assert holds_term(text, term, "diagnoses") == stated


def test_entries_that_deny():
    assert all(
        map(is_denied, ("No pneumonia", "denies chest pain", "Pneumonia: ruled out", "DVT (excluded)"))
    )
    assert not any(
        map(is_denied, ("Pneumonia", "Nodule", "Non-small cell lung cancer", "Normal pressure hydrocephalus"))
    )


def test_terms_of_a_text_are_listed_as_it_writes_them():
    text = "COPD and type 2 diabetes mellitus as before, no MI; 5 mg, ms"
    assert find_terms(text, "diagnoses") == ["COPD", "type 2 diabetes mellitus"]


def test_numbers_are_counted_one_by_one():
    text = "1. Ibuprofen 400 mg every 6 hours\n2. BP 120/80, eGFR >60, 5-10 mg on 2024-01-31 (B12)"
    assert [str(number) for number in numbers_in(text)] == ["400", "120", "80", "60", "5", "10", "2024-01-31"]


def test_every_abbreviation_that_a_drawn_page_uses_is_known():
    words = tomllib.loads((files("medvl.phantoms") / "medical_words.toml").read_text(encoding="utf-8"))
    for kind in ("frequencies", "routes", "diagnoses"):
        for a, b in words[kind].items():
            assert not b or same_term(a, b, kind) == "abbreviation", (a, b)
    for name, lab in words["labs"].items():
        assert same_term(name, lab["short"], "labs") == "abbreviation", name
    for vital in words["vitals"].values():
        assert same_term(*vital["names"], "vitals") == "abbreviation", vital
    units = [row["unit"] for kind in ("drugs", "labs", "vitals") for row in words[kind].values()]
    for unit in filter(None, units):
        assert [q.unit for q in find_quantities(f"5 {unit}")] == [normalise_unit(unit)]
