"""Fields of pages from their words, by rules."""

import pytest

from medvl.documents.fields import Diagnosis, Fields, Lab, Medication, Patient, Vital
from medvl.documents.rules import extract_by_rules
from medvl.documents.words import Word


def words_of(text, left=40, top=40):
    """The words of a page that is drawn as text in letters of 8 x 12 pixels, 20 from line to line."""
    words = []
    for number, line in enumerate(text.split("\n")):
        place = 0
        for word in line.split():
            place = line.index(word, place)
            x, y = left + 8 * place, top + 20 * number
            words.append(Word(word, (x, y, x + 8 * len(word), y + 12)))
            place += len(word)
    return words


def fields_of(text):
    return extract_by_rules(words_of(text))


def test_a_table_of_labs_by_its_titles():
    page = """
Laboratory results
Test              Result       Unit       Reference range    Flag
Potassium         5.9          mmol/L     3.5-5.1            H
eGFR              35           mL/min     > 60               L
Glucose (mg/dL)   95                      70 - 99
Red cells         5.49 10^12/L            4.00-5.50          N
"""
    assert fields_of(page).labs == (
        Lab("Potassium", "5.9", "mmol/L", "3.5", "5.1", "H"),
        Lab("eGFR", "35", "mL/min", "60", "", "L"),
        Lab("Glucose", "95", "mg/dL", "70", "99"),
        Lab("Red cells", "5.49", "10^12/L", "4.00", "5.50", "N"),
    )


def test_a_row_whose_name_is_lost_does_not_end_its_table():
    page = """
Drug         Dose     Route    Frequency
Metformin    500 mg   PO       BID
                      PO       QD
Digoxin      0.125 mg PO       QD PRN
"""
    assert fields_of(page).medications == (
        Medication("Metformin", "500", "mg", "PO", "BID"),
        Medication("Digoxin", "0.125", "mg", "PO", "QD", prn=True),
    )


@pytest.mark.parametrize("mark", ["", "- ", "1. "])
def test_a_list_of_medications(mark):
    page = f"""
Medications
{mark}Metformin 500 mg PO BID PRN
{mark}Insulin glargine 20units SC every
  evening
{mark}Hydrocortisone 2.5 % topical once daily
"""
    assert fields_of(page).medications == (
        Medication("Metformin", "500", "mg", "PO", "BID", prn=True),
        Medication("Insulin glargine", "20", "units", "SC", "every evening"),
        Medication("Hydrocortisone", "2.5", "%", "topical", "once daily"),
    )


def test_medications_in_one_line():
    page = "Orders\nMetformin 500 mg PO BID; Digoxin 0.125 mg\nPO QD"
    assert fields_of(page).medications == (
        Medication("Metformin", "500", "mg", "PO", "BID"),
        Medication("Digoxin", "0.125", "mg", "PO", "QD"),
    )


def test_vitals_diagnoses_procedures_and_text_under_their_headings():
    page = """
Vital signs
BP: 120/80 mmHg, HR: 72 bpm, Temp:
37.1 C
Diagnoses
Type 2 diabetes mellitus; COPD
Procedures
Hip replacement
Narrative
Admitted with chest pain. No fever
since the second day.


page 1 of 1
"""
    assert fields_of(page) == Fields(
        vitals=[Vital("BP", "120/80", "mmHg"), Vital("HR", "72", "bpm"), Vital("Temp", "37.1", "C")],
        diagnoses=[Diagnosis("Type 2 diabetes mellitus"), Diagnosis("COPD")],
        procedures=["Hip replacement"],
        text="Admitted with chest pain. No fever since the second day.",
    )


@pytest.mark.parametrize(
    "block",
    [
        "Name: Doe, Jane   MRN: 12-345   Sex: Female Age: 64 Date: 2 May 2024",
        "Patient name: Doe, Jane\nID:12-345      Gender: Female\nAge (years): 64   Date of visit:\n2 May 2024",
        "Patientname:Doe, Jane MRN: 12-345 Sex:Female Age(years): 64 Dateof service:2 May 2024",
        "Patient name: Doe, Jane  ID: 12-345 Sex: Female Age (years):\n64 Date: 2 May 2024",
        "Patient:        Record no.: 12-345\nDoe, Jane       Sex: Female\nAge: 64         Date: 2 May 2024",
    ],
)
def test_the_block_of_the_patient(block):
    assert fields_of(block).patient == Patient("Doe, Jane", "Female", "64", "12-345", "2 May 2024")


def test_sections_side_by_side():
    left = words_of("Diagnoses\nCOPD\nProcedures\nHip replacement\nThoracentesis")
    right = words_of(
        "Vital signs\nSign     Value    Units\nHR       72       bpm\nWt       81       kg", left=400
    )
    below = words_of("Tests\nTest        Result    Normal range\nSodium      141       135-145", top=180)
    fields = extract_by_rules([*left, *right, *below])
    assert [d.name for d in fields.diagnoses] == ["COPD"]
    assert fields.procedures == ("Hip replacement", "Thoracentesis")
    assert fields.vitals == (Vital("HR", "72", "bpm"), Vital("Wt", "81", "kg"))
    assert fields.labs == (Lab("Sodium", "141", "", "135", "145"),)


def test_digits_that_are_letters_are_repaired_in_abbreviations_only():
    page = """
Medications
Digoxin 0.125 mg P0 QD
Vitals
- Sp02: 100 %
"""
    fields = fields_of(page)
    assert fields.medications == (Medication("Digoxin", "0.125", "mg", "PO", "QD"),)
    assert fields.vitals == (Vital("SpO2", "100", "%"),)


def test_a_page_without_headings_or_words_has_no_fields():
    assert fields_of("A letter to nobody") == Fields()
    assert fields_of("SYNTHETIC - not a real patient") == Fields()
    assert extract_by_rules([]) == Fields()
