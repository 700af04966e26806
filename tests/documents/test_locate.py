"""The places of values among the words of a page."""

import pytest

from medvl.documents.fields import Diagnosis, Fields, Lab, Medication, Patient
from medvl.documents.locate import find_places, locate
from medvl.documents.words import Word
from tests.documents.test_rules import words_of

X, Y, WIDTH, HEIGHT, LINE = 40, 40, 8, 12, 20  # of `words_of`


def box(line, start, length):
    left, top = X + WIDTH * start, Y + LINE * line
    return (left, top, left + WIDTH * length, top + HEIGHT)


def test_values_are_parts_of_words_and_several_words():
    page = words_of("Insulin glargine 25mg PO BID as needed")
    fields = Fields(medications=[Medication("Insulin glargine", "25", "mg", "PO", "BID", prn=True)])
    assert locate(fields, page) == {
        "medications/0/name": box(0, 0, 16),
        "medications/0/dose": box(0, 17, 2),
        "medications/0/unit": box(0, 19, 2),
        "medications/0/route": box(0, 22, 2),
        "medications/0/frequency": box(0, 25, 3),
        "medications/0/prn": box(0, 29, 9),
    }


@pytest.mark.parametrize(
    ("value", "page"),
    [
        ("5", "25 5.9 0.5 5,1 5/5 B5 5"),
        ("1.2", "11.2 1.25 1.2.3 1.2"),
        ("mg", "mg/dL kmg mgs mg"),
        ("L", "mg/L x-L L4 L"),
        ("4.0", "4.05 14.0 -4.0-5.6"),
        ("DM", "admitted DMX T2DM-1 (DM)"),
        ("345", "T-345 345"),
    ],
)
def test_a_value_is_found_at_the_boundaries_of_words_and_numbers_only(value, page):
    (place,) = locate(Fields(procedures=[value]), words_of(page)).values()
    assert place is not None
    last = page.split()[-1]
    start = len(page) - len(last) + last.index(value)
    assert place == box(0, start, len(value))
    (missing,) = locate(Fields(procedures=[value]), words_of(page[: -len(last)])).values()
    assert missing is None


def test_repeated_values_are_those_of_their_row():
    page = words_of(
        "ALT       6       U/L     6-40    L\nAST       40      U/L     6-40    H\nLipase    6       U/L     40-160  L"
    )
    rows = [
        *(Lab("ALT", "6", "U/L", "6", "40", "L"), Lab("AST", "40", "U/L", "6", "40", "H")),
        Lab("Lipase", "6", "U/L", "40", "160", "L"),
    ]
    boxes = locate(Fields(labs=rows), page)
    for i in range(3):
        for name, start in {"name": 0, "value": 10, "unit": 18, "low": 26, "flag": 34}.items():
            assert boxes[f"labs/{i}/{name}"][:2] == (X + WIDTH * start, Y + LINE * i)
    # Whatever the order of the records.
    swapped = locate(Fields(labs=rows[::-1]), page)
    assert swapped["labs/0/value"] == boxes["labs/2/value"]


def test_letters_that_look_alike_are_near_misses_with_half_the_score():
    page = [
        Word("P0", (0, 0, 20, 10), 0.9),
        Word("8,4", (30, 0, 60, 10), 0.8),
        Word("IV", (70, 0, 90, 10), 1.0),
    ]
    places = find_places(Fields(procedures=["PO", "8.4", "IV"]), page)
    assert [place.score for place in places.values()] == [0.45, 0.4, 1.0]


def test_an_exact_match_elsewhere_does_not_hide_a_near_miss_in_the_row():
    page = words_of("Digoxin     P0    QD\nLosartan    PO    QD")
    fields = Fields(medications=[Medication("Digoxin", route="PO"), Medication("Losartan", route="PO")])
    boxes = locate(fields, page)
    assert boxes["medications/0/route"] == box(0, 12, 2)
    assert boxes["medications/1/route"] == box(1, 12, 2)


def test_running_text_is_found_with_an_error_and_over_lines():
    text = "Admitted with chest pain. Required oxygen for 11 days. No fever since then."
    page = words_of("Admitted with chest pain. Required\noxvgen for 11 days. No fever since\nthen.")
    place = find_places(Fields(text=text), page)["text"]
    assert place.box == (X, Y, X + WIDTH * 34, Y + 2 * LINE + HEIGHT)
    assert 0.8 <= place.score < 1


def test_what_is_not_there_has_no_place():
    fields = Fields(patient=Patient(name="Jane Doe"), diagnoses=[Diagnosis("COPD")])
    assert set(locate(fields, words_of("MRN: 123")).values()) == {None}
    assert set(locate(fields, []).values()) == {None}
    assert locate(Fields(), words_of("MRN: 123")) == {}


def test_two_records_never_share_a_place():
    boxes = locate(Fields(procedures=["ECG", "ECG"]), words_of("ECG\nX-ray\nECG"))
    assert set(boxes.values()) == {box(0, 0, 3), box(2, 0, 3)}
    boxes = locate(Fields(procedures=["ECG", "ECG"]), words_of("ECG"))
    assert sorted(boxes.values(), key=str) == [box(0, 0, 3), None]
