"""What pages show of an answer, and what cannot be right in it."""

import subprocess
import sys

import pytest
from attrs import evolve

from medvl.documents.evidence import check_fields, drop_unverified
from medvl.documents.fields import Diagnosis, Fields, Lab, Medication, Patient, Vital, leaves
from medvl.documents.words import Word
from medvl.phantoms.pages import PageConfig, draw_page
from tests.documents.test_rules import words_of

FIRST = """Patient: Alma Yarrow     Age: 54
Metformin    500 mg    PO    BID
Digoxin      2.5 mg    PO    QD"""
SECOND = """Potassium    5.9    mmol/L    3.5-5.1    H
Sodium       139    mmol/L    135-145"""
ANSWER = Fields(
    kind="discharge summary",
    patient=Patient("Alma Yarrow", age="54"),
    medications=[
        Medication("Metformin", "500", "mg", "PO", "BID"),
        Medication("Digoxin", "2.5", "mg", "PO", "QD"),
    ],
    labs=[
        Lab("Potassium", "5.9", "mmol/L", "3.5", "5.1", "H"),
        Lab("Sodium", "139", "mmol/L", "135", "145"),
    ],
)
PAGES = [words_of(FIRST), words_of(SECOND)]


def statuses(fields, *texts):
    evidence = check_fields(fields, [words_of(text) for text in texts])
    return {value.path: value.status for value in evidence.values}


def warnings(*labs, text=""):
    return [(w.path, w.kind) for w in check_fields(Fields(labs=labs), [words_of(text)]).warnings]


def test_every_value_has_its_page_and_box():
    evidence = check_fields(ANSWER, PAGES)
    assert [value.path for value in evidence.values] == list(leaves(ANSWER))
    assert evidence.unverified == ()
    assert evidence.warnings == ()
    pages = {value.path: value.page for value in evidence.values}
    assert {pages[path] for path in pages if path.startswith("labs")} == {1}
    assert {pages[path] for path in pages if not path.startswith("labs")} == {0}
    value = next(value for value in evidence.values if value.path == "labs/0/value")
    assert value.box == (40 + 8 * 13, 40, 40 + 8 * 16, 52)
    assert value.score == 1


def test_a_number_of_another_row_or_page_is_not_verified():
    labs = [evolve(ANSWER.labs[0], value="139"), evolve(ANSWER.labs[1], value="500")]
    medications = [evolve(ANSWER.medications[0], dose="2.5"), evolve(ANSWER.medications[1], dose="5.9")]
    answer = evolve(ANSWER, labs=labs, medications=medications)
    evidence = check_fields(answer, PAGES)
    unverified = {value.path: value.status for value in evidence.values if not value.verified}
    assert unverified == {
        "labs/0/value": "elsewhere",
        "labs/1/value": "elsewhere",
        "medications/0/dose": "elsewhere",
        "medications/1/dose": "elsewhere",
    }
    # A right value keeps its place, though another row has claimed it first.
    answer = evolve(ANSWER, labs=[labs[0], ANSWER.labs[1]])
    assert check_fields(answer, PAGES).unverified == ("labs/0/value",)


@pytest.mark.parametrize("value", ["3.5", "5.1", "59", "5", "9", "5.91", "-5.9"])
def test_a_value_is_a_whole_quantity_of_its_row(value):
    answer = evolve(ANSWER, labs=[evolve(ANSWER.labs[0], value=value)])
    assert check_fields(answer, PAGES).unverified == ("labs/0/value",)


@pytest.mark.parametrize(
    ("value", "page", "status"),
    [
        ("0.5", "CRP <0.5 mg/L", "missing"),
        ("<0.5", "CRP <0.5 mg/L", "verified"),
        ("2.5", "CRP -2.5 mg/L", "missing"),
        ("-2.5", "CRP -2.5 mg/L", "verified"),
        ("10", "CRP lO mg/L", "similar"),
        ("8.4", "CRP 8,4 mg/L", "same"),
        ("8.40", "CRP 8.4 mg/L", "same"),
        ("1200", "CRP 1,200 mg/L", "same"),
        ("1.2", "CRP 1,200 mg/L", "missing"),
        ("1.200", "CRP 1,200 mg/L", "similar"),
        (">=60", "CRP \u2265 60 mg/L", "same"),
        ("60", "CRP \u2265 60 mg/L", "missing"),
        ("8.4", "CRP 9.1 mg/L\nK 8,4", "elsewhere"),
        ("58", "CRP 5 8 mg/L", "similar"),
        ("2", "CRP mg/L\n2. Sodium", "missing"),
    ],
)
def test_a_sign_a_minus_a_list_mark_or_a_letter_that_looks_alike(value, page, status):
    assert statuses(Fields(labs=[Lab("CRP", value)]), page)["labs/0/value"] == status


@pytest.mark.parametrize(
    "page",
    [
        "AST (U/L) 8 - 40",
        "AST 8-40 U/L",
        "AST 8 to 40",
        "AST (8 -40)",
        "AST < 40",
        "AST up to 40",
        "Test   Result   Reference   Flag\nALT    12       < 8         H\nAST    9        40          H",
        "Test   Result   Low   High\nAST    9        8     40",
        "Test   Low   High   Result\nAST    8     40     9",
    ],
)
def test_a_limit_of_its_range_is_no_value(page):
    """The limit itself is verified, and has its place."""
    evidence = check_fields(Fields(labs=[Lab("AST", "40", high="40")]), [words_of(page)])
    assert evidence.unverified == ("labs/0/value",)
    assert check_fields(Fields(labs=[Lab("AST", "40")]), [words_of(page)]).unverified == ("labs/0/value",)


@pytest.mark.parametrize(
    ("page", "place"),
    [
        ("AST 40 U/L 8 - 40", 4),
        ("AST (8-40) 40 U/L", 11),
        ("Test   Low   High   Result\nAST    8     40     40", 20),
    ],
)
def test_a_value_that_is_as_great_as_its_limit(page, place):
    evidence = check_fields(Fields(labs=[Lab("AST", "40", high="40")]), [words_of(page)])
    assert evidence.unverified == ()
    assert evidence.values[1].box[0] == 40 + 8 * place


def test_a_number_of_a_name_and_a_dash_before_a_value_make_no_range():
    assert set(statuses(Fields(labs=[Lab("B12", "300")]), "B12 - 300").values()) == {"verified"}
    assert set(statuses(Fields(vitals=[Vital("SpO2", "98")]), "SpO2 - 98 %").values()) == {"verified"}


def test_daily_is_once_daily():
    for frequency in ("once daily", "daily", "QD"):
        fields = Fields(medications=[Medication("Drug", frequency=frequency)])
        assert check_fields(fields, [words_of("Drug daily")]).unverified == ()


@pytest.mark.parametrize(
    "page", ["Drug 5 mg twice daily", "Drug 5 mg 3x daily", "Drug 5 mg three times daily"]
)
def test_daily_of_twice_daily_is_not_once_daily(page):
    for frequency in ("once daily", "daily", "QD", "once", "twice"):
        fields = Fields(medications=[Medication("Drug", "5", "mg", frequency=frequency)])
        assert statuses(fields, page)["medications/0/frequency"] == "missing"


def test_a_unit_that_is_not_behind_its_number_stands_elsewhere():
    fields = Fields(medications=[Medication("Drug", "5", "mg")])
    assert statuses(fields, "Drug 5 mL (of 10 mg)")["medications/0/unit"] == "elsewhere"


@pytest.mark.parametrize(
    ("section", "name", "page", "status"),
    [
        ("diagnoses", "Pneumonia", "No evidence of pneumonia. Gout.", "elsewhere"),
        ("diagnoses", "Pneumonia", "No fever. Pneumonia.", "verified"),
        ("diagnoses", "Pneumonia", "Fever: no          Pneumonia", "verified"),
        ("diagnoses", "Pneumonia", "Pneumonia: ruled out", "elsewhere"),
        ("diagnoses", "Pneumonia", "No pneumonia in May\nPneumonia", "verified"),
        ("diagnoses", "Diabetes", "Family history of diabetes", "elsewhere"),
        ("medications", "Penicillin", "Allergies: latex, penicillin", "elsewhere"),
        ("medications", "Penicillin", "Allergies: latex. Penicillin 500 mg", "verified"),
        ("diagnoses", "effusion", "no pneumonia or effusion", "elsewhere"),
        ("procedures", "ECG", "No ECG.", "elsewhere"),
        ("text", "Fracture.", "No fracture.", "elsewhere"),
        ("text", "No fracture.", "No fracture.", "verified"),
    ],
)
def test_what_is_denied_or_an_allergy_is_not_verified(section, name, page, status):
    rows = {
        "diagnoses": [Diagnosis(name)],
        "medications": [Medication(name)],
        "procedures": [name],
        "text": name,
    }
    assert list(statuses(Fields(**{section: rows[section]}), page).values()) == [status]


def test_a_result_that_is_denied_is_not_its_opposite():
    assert statuses(Fields(labs=[Lab("HCV", "detected")]), "HCV not detected")["labs/0/value"] == "missing"
    assert (
        statuses(Fields(labs=[Lab("HCV", "not detected")]), "HCV not detected")["labs/0/value"] == "verified"
    )


def test_values_of_a_row_that_no_page_names_are_of_another_one():
    fields = Fields(labs=[Lab("Sodium", "4.1", "mmol/L")])
    assert set(statuses(fields, "Potassium 4.1 mmol/L").values()) == {"missing", "elsewhere"}


def test_a_point_before_a_number_is_part_of_it():
    for dose, status in (("25", "missing"), (".25", "verified"), ("0.25", "same")):
        fields = Fields(medications=[Medication("Digoxin", dose, "mg")])
        assert statuses(fields, "Digoxin .25 mg")["medications/0/dose"] == status
    fields = Fields(medications=[Medication("Digoxin", ".25", "mg")])
    assert statuses(fields, "Digoxin 1.25 mg")["medications/0/dose"] == "missing"


def test_doses_of_two_rows_of_one_drug_are_not_exchanged():
    page = "Metformin 500 mg QAM\nMetformin 1000 mg QPM"
    rows = [Medication("Metformin", "500", "mg", "", "QPM")]
    found = statuses(Fields(medications=rows), page)
    assert "elsewhere" in (found["medications/0/dose"], found["medications/0/frequency"])


def test_a_row_that_is_stated_twice_leaves_the_first_its_values():
    labs = [Lab("Hgb", "15.4", "g/dL"), Lab("Hgb", "15.4", "g/dL"), Lab("Na", "139")]
    evidence = check_fields(
        Fields(labs=labs, procedures=["ECG", "ECG"]), [words_of("Hgb 15.4 g/dL\nNa 139\nECG")]
    )
    assert evidence.unverified == ("labs/1/name", "labs/1/value", "labs/1/unit", "procedures/1")
    assert [(w.path, w.kind) for w in evidence.warnings] == [
        ("labs/1/name", "repeat"),
        ("procedures/1", "repeat"),
    ]
    twice = check_fields(Fields(labs=labs), [words_of("Hgb 15.4 g/dL"), words_of("Hgb 15.4 g/dL\nNa 139")])
    assert (twice.unverified, twice.warnings) == ((), ())


def test_wrapped_and_running_entries_belong_to_the_name_before_them():
    text = "Tamsulosin 0.4 mg once daily; Baclofen\n10 mg three times daily; Digoxin 25 mg\nonce weekly"
    rows = [
        Medication("Tamsulosin", "0.4", "mg"),
        Medication("Baclofen", "10", "mg"),
        Medication("Digoxin", "25", "mg"),
    ]
    assert set(statuses(Fields(medications=rows), text).values()) == {"verified"}
    rows[0] = evolve(rows[0], dose="25")
    found = statuses(Fields(medications=rows), text)
    assert [path for path in found if found[path] != "verified"] == ["medications/0/dose"]


@pytest.mark.parametrize(
    ("answer", "page"),
    [
        (Lab("ALT", "41"), "ALT   23   U/L\nAST   41   U/L"),
        (Lab("BUN", "70"), "BUN   23   mg/dL\neGFR  70   mL/min"),
        (Medication("Baclofen", "25"), "Baclofen 10 mg PO TID; Digoxin 25 mg PO QD"),
        (Medication("Baclofen", "25"), "1. Baclofen 10 mg\n2. Digoxin 25 mg"),
    ],
)
def test_the_number_of_a_row_that_the_answer_leaves_out(answer, page):
    section = "labs" if isinstance(answer, Lab) else "medications"
    found = statuses(Fields(**{section: [answer]}), page)
    assert [status for path, status in found.items() if not path.endswith("/name")] == ["elsewhere"]


def test_what_is_wrapped_is_of_the_row():
    fields = Fields(
        medications=[Medication("Insulin", "24", "units", "SC", "QHS"), Medication("Baclofen", "10", "mg")]
    )
    assert set(statuses(fields, "Insulin 24 units\nSC QHS\nBaclofen\n10 mg").values()) == {"verified"}


def test_values_below_their_names():
    """Names as titles of columns, and values with labels on lines of their own."""
    text = "BP        HR    RR    Temp\n120/80    72    16    37.2"
    rows = [Vital("BP", "120/80"), Vital("HR", "72"), Vital("RR", "16"), Vital("Temp", "37.2")]
    assert set(statuses(Fields(vitals=rows), text).values()) == {"verified"}
    rows[1:3] = [Vital("HR", "16"), Vital("RR", "72")]
    found = statuses(Fields(vitals=rows), text)
    assert [path for path in found if found[path] == "elsewhere"] == ["vitals/1/value", "vitals/2/value"]
    text = "Metformin\nDose: 500 mg\nRoute: PO\nFrequency: BID\nDigoxin\nDose: 0.25 mg"
    rows = [Medication("Metformin", "500", "mg", "PO", "BID"), Medication("Digoxin", "0.25", "mg")]
    assert set(statuses(Fields(medications=rows), text).values()) == {"verified"}


def test_two_columns_do_not_stand_between():
    text = "Diagnoses            HR        72\nGout                 Weight\nHeparin 5000 units   126.7 kg"
    fields = Fields(
        medications=[Medication("Heparin", "5000", "units")],
        vitals=[Vital("HR", "72"), Vital("Weight", "126.7", "kg")],
    )
    assert set(statuses(fields, text).values()) == {"verified"}


def test_abbreviations_are_read_as_the_rules_read_them():
    fields = Fields(medications=[Medication("Digoxin", route="PO")], vitals=[Vital("SpO2", "98")])
    assert set(statuses(fields, "Digoxin P0\nSp02 98").values()) == {"verified"}


@pytest.mark.parametrize(
    ("row", "page", "other"),
    [
        (Lab("Ferritin", "8", unit="ng/mL"), "Ferritin 8 \u00b5g/L", "unit"),
        (Lab("WBC", "8", unit="10^9/L"), "WBC 8 x10\u2079/L", "unit"),
        (Lab("WBC", "8", unit="K/uL"), "WBC 8 (10^9/L)", "unit"),
        (Lab("WBC", "8", flag="H"), "WBC 8 high", "flag"),
        (Lab("Hemoglobin", "8"), "Hgb 8", "name"),
        (Medication("Drug", frequency="twice daily"), "Drug BID", "frequency"),
        (Medication("Drug", frequency="Q6H"), "Drug every 6 hours", "frequency"),
        (Medication("Drug", "25", "mcg"), "Drug 25\u00b5g", "unit"),
        (Medication("Drug", route="PO"), "Drug by mouth", "route"),
    ],
)
def test_other_spellings_of_the_same_are_verified(row, page, other):
    section = "labs" if isinstance(row, Lab) else "medications"
    evidence = check_fields(Fields(**{section: [row]}), [words_of(page)])
    found = {value.path: value.status for value in evidence.values}
    assert found.pop(f"{section}/0/{other}") == "same"
    assert set(found.values()) == {"verified"}
    assert evidence.unverified == ()
    assert evidence.warnings == ()


def test_an_age_is_no_number_of_somewhere_else():
    fields = Fields(patient=Patient("Alma Yarrow", age="21", date="2017-04-21"))
    assert statuses(fields, "Alma Yarrow 2017-04-21")["patient/age"] == "missing"
    far = "Alma Yarrow 2017-04-21" + "\n." * 12 + "\n21 mm"
    assert statuses(fields, far)["patient/age"] == "elsewhere"
    assert statuses(fields, "Alma Yarrow, 21-year-old")["patient/age"] == "verified"


def test_numbers_of_running_text_that_no_page_shows_are_named():
    text = "Observed on telemetry for 11 days. Wound check in 4 days, and again in 9 days."
    page = text.replace("4 days", "4\ndays")
    assert check_fields(Fields(text=text), [words_of(page)]).unverified == ()
    answer = Fields(
        text=text.replace("11", "4"), procedures=["Stent of 3 mm"], diagnoses=[Diagnosis("Nodule of 12 mm")]
    )
    values = {value.path: value for value in check_fields(answer, [words_of(page)]).values}
    assert values["text"].status == "similar"
    assert values["text"].unshown == ("4",)  # stands elsewhere on the page, and not on telemetry
    assert values["procedures/0"].unshown == ("3",)
    assert values["diagnoses/0/name"].unshown == ("12",)
    gone = {value.path: value for value in check_fields(answer, [[]]).values}
    assert gone["text"].unshown == ("4", "4", "9")
    assert gone["text"].page is None


def test_without_the_unverified_paths_are_those_of_what_is_left():
    answer = evolve(
        ANSWER,
        medications=[Medication("Aspirin", "81", "mg"), evolve(ANSWER.medications[0], dose="850", prn=True)],
        labs=[evolve(ANSWER.labs[1], flag="H", unit="mg/dL")],
        procedures=["ECG"],
        text="Not on the page at all.",
    )
    evidence = check_fields(answer, PAGES)
    fields, kept = drop_unverified(answer, evidence)
    expected = [evolve(ANSWER.medications[0], dose="", unit="")], [Lab("Sodium")]
    assert fields == Fields(
        kind="discharge summary", patient=ANSWER.patient, medications=expected[0], labs=expected[1]
    )
    assert {value.path for value in kept.values} == set(leaves(fields))
    assert kept.unverified == ()
    boxes = {value.path: value.box for value in evidence.values}
    moved = next(value for value in kept.values if value.path == "medications/0/name")
    assert moved.box == boxes["medications/1/name"]
    assert kept.warnings == ()
    assert [(value.path, value.status, value.page) for value in kept.left_out] == [
        ("medications", "missing", None),
        ("medications/0/dose", "missing", None),
        ("medications/0/unit", "verified", 0),
        ("medications/0/prn", "missing", None),
        ("labs/0/value", "verified", 1),
        ("labs/0/unit", "missing", None),
        ("labs/0/low", "verified", 1),
        ("labs/0/high", "verified", 1),
        ("labs/0/flag", "elsewhere", 1),  # the H of the page is potassium's
        ("procedures", "missing", None),
        ("text", "missing", None),
    ]
    same, complete = drop_unverified(ANSWER, check_fields(ANSWER, PAGES))
    assert same == ANSWER
    assert (complete.left_out, complete.warnings) == ((), ())


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"value": "9.5"}, Lab("Potassium", "", "mmol/L", "3.5", "5.1")),  # the unit is that of the range
        ({"value": "9.5", "low": "", "high": ""}, Lab("Potassium")),
        ({"unit": "mg/dL"}, Lab("Potassium")),
        ({"low": "3.7"}, Lab("Potassium", "5.9", "mmol/L", flag="H")),
        ({"flag": "L"}, Lab("Potassium", "5.9", "mmol/L", "3.5", "5.1")),
    ],
)
def test_what_says_something_else_without_the_unverified_goes_with_it(wrong, expected):
    answer = Fields(labs=[evolve(ANSWER.labs[0], **wrong)])
    fields, kept = drop_unverified(answer, check_fields(answer, PAGES))
    assert fields.labs == (expected,)
    gone = set(leaves(answer)) - set(leaves(fields))
    assert {value.path for value in kept.left_out} == gone
    assert not gone & {warning.path for warning in kept.warnings}


def test_warnings_of_what_is_left_stay():
    """A right flag that the answer does not state, and a wrong one of a row that is left out."""
    labs = [Lab("Chloride", "99", "mmol/L", "135", "145"), evolve(ANSWER.labs[0], flag="")]
    answer = Fields(labs=labs)
    evidence = check_fields(answer, PAGES)
    assert [w.path for w in evidence.warnings] == ["labs/0/flag", "labs/1/flag"]
    _, kept = drop_unverified(answer, evidence)
    assert [w.path for w in kept.warnings] == ["labs/0/flag"]
    assert [value.path for value in kept.left_out] == ["labs"]


@pytest.mark.parametrize(
    ("value", "low", "high", "right", "wrong"),
    [
        ("5.9", "3.5", "5.1", ("H", "HH", "high", "A", "*"), ("", "L", "LL", "N", "low")),
        ("2.9", "3.5", "5.1", ("L", "LL", "A"), ("", "H", "N")),
        ("5.1", "3.5", "5.1", ("", "N"), ("H", "L", "HH", "A")),
        ("8,4", "3,5", "5,1", ("H",), ("", "N", "L")),
        ("<0.5", "0.5", "5", ("L",), ("", "H", "N")),
        ("<0.5", "", "5", ("", "N"), ("H", "A")),
        ("<9", "3.5", "5.1", ("", "N", "H", "L"), ()),
        ("<5.1", "3.5", "5.1", ("", "L", "N"), ("H", "HH")),
        (">60", "60", "", ("", "N"), ("L", "H")),
        (">=60", "", "60", ("", "H"), ("L",)),
        ("5", "", "5", ("", "N", "H"), ("L",)),  # "< 5" or "up to 5"
        ("6", "", "5", ("H",), ("", "N", "L")),
        ("40", "40", "", ("", "L"), ("H",)),
        ("1,200", "150", "400", ("HH",), ("", "L")),
        ("negative", "", "", ("", "H"), ()),
        ("3.5-5.0", "4", "5", ("", "H"), ()),
        ("~6", "3.5", "5.1", ("", "L"), ()),
        ("5.9", "low", "5.1", ("", "L"), ()),
        ("5.9", "", "", ("", "H", "L"), ()),
    ],
)
def test_flags_against_value_and_range(value, low, high, right, wrong):
    for flag in right:
        assert warnings(Lab("K", value, "", low, high, flag)) == []
    for flag in wrong:
        assert warnings(Lab("K", value, "", low, high, flag)) == [("labs/0/flag", "flag")]


def test_ranges_units_and_numbers_that_cannot_be():
    assert warnings(Lab("K", "4", "", "5.1", "3.5", "H")) == [("labs/0/low", "range")]
    assert warnings(Lab("K", "pending", "mmol/L")) == [("labs/0/value", "number")]
    page = "K 5.9 mmol/L H\nNa 139 mEq/L\nCa 8.4 H\nTemp 37.2 C"
    assert warnings(Lab("K", "5.9", "mg/dL", flag="H"), text=page) == [("labs/0/unit", "unit")]
    right = [
        Lab("K", "5.9", "mmol/l", flag="H"),
        Lab("Na", "139", "mmol/L"),
        Lab("Ca", "8.4", "mg/dL", flag="H"),
    ]
    assert warnings(*right, text=page) == []
    fields = Fields(medications=[Medication("Digoxin", "a little")], vitals=[Vital("Temp", "37.2", "F")])
    found = check_fields(fields, [words_of(page)]).warnings
    assert [(w.path, w.kind) for w in found] == [("medications/0/dose", "number"), ("vitals/0/unit", "unit")]


def test_what_is_written_about_evidence_holds_no_value():
    answer = evolve(ANSWER, text="Secretive 7391 words", labs=[evolve(ANSWER.labs[0], flag="L")])
    evidence = check_fields(answer, PAGES)
    assert evidence.warnings
    written = repr(evidence) + " ".join(w.message for w in evidence.warnings)
    assert not any(value in written for value in ("Yarrow", "Metformin", "5.9", "Secretive", "7391"))


@pytest.mark.parametrize("number", range(0, 60, 3))
def test_gold_fields_are_verified_on_their_pages_without_a_warning(number):
    page = draw_page(PageConfig(), "train", number, damage="clean")
    evidence = check_fields(page.fields, [page.texts])
    assert evidence.warnings == ()
    assert evidence.unverified == ()


def test_no_page_and_no_words():
    assert check_fields(Fields(), []).values == ()
    assert set(statuses(ANSWER).values()) == {"missing"}
    assert check_fields(ANSWER, [[], [Word("x", (0, 0, 5, 5))]]).unverified == tuple(leaves(ANSWER))


def test_no_torch():
    code = "import sys, medvl.documents.evidence; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("patient", "status"),
    [
        (Patient("Tom Rohr", "M", "82", "12345"), "verified"),
        (Patient("Anna Weiss", "F", "28", "98765"), "elsewhere"),
    ],
)
def test_a_patient_is_who_the_labels_say(patient, status):
    """The page shows other names and numbers, too: a doctor's, a room's, a telephone's."""
    page = """Referred by: Dr. Anna Weiss     Room 28     Tel 98765
Patient: Tom Rohr     Age: 82     Sex: M     MRN: 12345
F. Weiss"""
    assert statuses(Fields(patient=patient), page) == dict.fromkeys(leaves(Fields(patient=patient)), status)


def test_a_patient_of_a_page_without_labels_is_sought_everywhere():
    assert statuses(Fields(patient=Patient("Tom Rohr")), "Tom Rohr was seen today") == {
        "patient/name": "verified"
    }
