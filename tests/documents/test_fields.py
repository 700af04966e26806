import json

import pytest

from medvl.documents.fields import (
    Diagnosis,
    Fields,
    Lab,
    Medication,
    Patient,
    Vital,
    fields_to_json,
    leaves,
    read_answer,
)

PAGE = Fields(
    kind="discharge summary",
    patient=Patient(name="Test Person", sex="F", age="54"),
    diagnoses=[Diagnosis("COPD"), Diagnosis("Type 2 diabetes mellitus")],
    medications=[
        Medication("Metformin", "500", "mg", "PO", "BID"),
        Medication("Albuterol", "2", "puffs", "INH", "Q6H", prn=True),
    ],
    labs=[Lab("HbA1c", "8.4", "%", "4.0", "5.6", "H")],
    vitals=[Vital("BP", "120/80", "mmHg")],
    procedures=["Chest radiograph"],
    text="Stable at discharge.",
)


def test_json_of_a_page_reads_back():
    assert read_answer(fields_to_json(PAGE)) == PAGE
    assert read_answer(fields_to_json(PAGE)).read_as == "json"
    assert read_answer(fields_to_json(Fields())) == Fields()


def test_json_leaves_out_what_is_empty_and_keeps_its_order():
    page = Fields(labs=[Lab("WBC", "7.2", "x10⁹/L")], patient=Patient(age="54"))
    assert (
        fields_to_json(page)
        == '{"patient":{"age":"54"},"labs":[{"name":"WBC","value":"7.2","unit":"x10⁹/L"}]}'
    )
    assert list(json.loads(fields_to_json(PAGE))) == [
        *("kind", "patient", "diagnoses", "medications", "labs", "vitals", "procedures", "text")
    ]


def test_leaves_are_the_printed_values_by_path():
    got = leaves(PAGE)
    assert got["labs/0/value"] == "8.4"
    assert got["medications/1/prn"] == "PRN"
    assert "medications/0/prn" not in got
    assert got["procedures/0"] == "Chest radiograph"
    assert "kind" not in got
    assert all(isinstance(value, str) and value for value in got.values())
    # every leaf but the flag is in the JSON
    assert all(json.dumps(v, ensure_ascii=False) in fields_to_json(PAGE) for v in got.values() if v != "PRN")


@pytest.mark.parametrize("answer", ["", "  \n", "no json", "[1, 2]", "3", '"text"', "null", "{"])
def test_an_answer_of_any_shape_is_read(answer):
    got = read_answer(answer)
    assert got.read_as
    assert not got.labs
