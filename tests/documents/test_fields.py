import json

import pytest
from attrs import evolve

from medvl.documents.fields import (
    Diagnosis,
    Fields,
    Lab,
    Medication,
    Patient,
    Vital,
    fields_to_json,
    json_leaves,
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


ODD = (
    *("", "  \n", "no json", "[1, 2]", "3", '"text"', "null", "{", "{}", "[]", "[" * 4000, "{]}[" * 50),
    *(
        '{"a":' * 4000,
        '{"labs": 5}',
        '{"labs":[[1],[null]]}',
        '{"labs":[{}]}',
        '{"patient":[1],"vitals":{"BP":{}}}',
    ),
)


@pytest.mark.parametrize("answer", ODD, ids=lambda answer: answer[:20])
def test_an_answer_of_any_shape_is_read(answer):
    assert read_answer(answer).read_as


def test_an_answer_that_is_cut_anywhere_states_nothing_that_the_whole_does_not():
    whole = fields_to_json(PAGE)
    values = set(leaves(PAGE).values())
    for end in range(1, len(whole)):
        got = read_answer(whole[:end])
        assert got.read_as in ("repaired json", "prose")
        if got.read_as == "repaired json":
            assert set(leaves(got).values()) <= values, whole[:end]
    assert read_answer(whole[:-1]) == PAGE


LABS = Fields(labs=[Lab("Na", "140", "mmol/L", "135", "145"), Lab("HbA1c", "8.4", "%", flag="H")])


@pytest.mark.parametrize(
    ("answer", "read_as"),
    [
        ('{"labs":[{"name":"Na","value":"140","unit":"mmol/L","low":"135","high":"145"},{"name":"HbA1c","value":"8.4","unit":"%","flag":"H"}]}', "json"),
        ('```json\n{"lab_results":[{"test":"Na","result":140,"units":"mmol/L","reference_range":"135 - 145"},{"test":"HbA1c","result":"8.4 % H"}]}\n```', "fenced json"),
        ("{'labResults': [{'Test': 'Na', 'Value': 140, 'Unit': 'mmol/L', 'Range': '(135-145)',}, {'Test': 'HbA1c', 'Value': '8.4 %', 'Flag': 'H', 'low': None}]}", "repaired json"),
        ('{"document":{"labs":{"Na":{"value":140,"unit":"mmol/L","ref_low":135,"ref_high":145},"HbA1c":"8.4 % (H)"}}}', "json"),
        ('{"labs":["Na 140 mmol/L (135-145)","HbA1c: 8.4 % H"]}', "json"),
        ('[{"test":"Na","value":"140 mmol/L","range":"135 to 145"},{"test":"HbA1c","value":8.4,"unit":"%","flag":"H"}]', "json"),
        ('{"labs":[{"name":"Na","value":140,"unit":"mmol/L","low":135,"high":145}],"labs":[{"name":"HbA1c","value":8.4,"unit":"%","flag":"H"}]}', "json"),
    ],
)  # fmt: skip
def test_json_as_models_write_it(answer, read_as):
    got = read_answer(answer)
    assert got == LABS
    assert got.read_as == read_as


def test_values_are_kept_as_they_are_written():
    assert read_answer('{"labs":[{"name":"K","value":4.10}]}').labs[0].value == "4.10"


def test_an_open_range_has_one_end():
    got = read_answer('{"labs":[{"test":"eGFR","range":"> 60"},{"test":"LDL","range":"<=3.0 mmol/L"}]}')
    assert got == Fields(labs=[Lab("eGFR", low="60"), Lab("LDL", high="3.0")])


def test_medications_are_taken_apart():
    got = read_answer(
        '{"meds":["Ibuprofen 400 mg PO q6h PRN",{"drug":"Morphine","dose":"2-4 mg","frequency":"IV every 4 hours as needed"}]}'
    )
    assert got.medications == (
        Medication("Ibuprofen", "400", "mg", "PO", "q6h", prn=True),
        Medication("Morphine", "2-4", "mg", "IV", "every 4 hours", prn=True),
    )


def test_nothing_is_dropped():
    """What no field takes, and denied diagnoses, are in the text."""
    got = read_answer(
        'Sure. {"diagnoses":["COPD","No pneumonia"],"nurse":"A. B.","labs":[{"name":"K","value":"4","who":"C"}]} Done.'
    )
    assert got.diagnoses == (Diagnosis("COPD"),)
    for text in ("Sure.", "Done.", "No pneumonia", "nurse: A. B.", "who: C"):
        assert text in got.text


PROSE = """The patient is a 54-year-old male with COPD and CKD. No pneumonia. He takes Metformin 500 mg PO BID and
Insulin glargine 10 units at bedtime, Ibuprofen 400 mg by mouth every 6 hours as needed. HbA1c is 8.4 % (H), sodium
140 mmol/L (135-145). BP 120/80 mmHg, HR 72 bpm. INR 1.1."""
LIST = """Patient: Test Person
Age: 54
MRN: 0123

**Diagnoses:**
- COPD
- No pneumonia

Medications:
1. Metformin 500 mg PO BID
2. Albuterol 2 puffs INH Q6H PRN
Labs:
| HbA1c | 8.4 | % | 4.0-5.6 | H |
- Hemoglobin: 11.2 g/dL L (12.0-16.0)
Vitals: BP 120/80 mmHg; HR 72 bpm
Procedures: Colonoscopy"""


def test_running_text_is_read():
    got = read_answer(PROSE.replace("\n", " "))
    assert got == Fields(
        patient=Patient(age="54", sex="male"),
        diagnoses=[Diagnosis("COPD"), Diagnosis("CKD")],
        medications=[
            Medication("Metformin", "500", "mg", "PO", "BID"),
            Medication("Insulin glargine", "10", "units", "", "at bedtime"),
            Medication("Ibuprofen", "400", "mg", "by mouth", "every 6 hours", prn=True),
        ],
        labs=[
            Lab("HbA1c", "8.4", "%", flag="H"),
            Lab("sodium", "140", "mmol/L", "135", "145"),
            Lab("INR", "1.1"),
        ],
        vitals=[Vital("BP", "120/80", "mmHg"), Vital("HR", "72", "bpm")],
        text=PROSE.replace("\n", " "),
    )
    assert got.read_as == "prose"


def test_a_list_is_read():
    assert read_answer(LIST) == Fields(
        patient=Patient(name="Test Person", age="54", record="0123"),
        diagnoses=[Diagnosis("COPD")],
        medications=[
            Medication("Metformin", "500", "mg", "PO", "BID"),
            Medication("Albuterol", "2", "puffs", "INH", "Q6H", prn=True),
        ],
        labs=[
            Lab("HbA1c", "8.4", "%", "4.0", "5.6", "H"),
            Lab("Hemoglobin", "11.2", "g/dL", "12.0", "16.0", "L"),
        ],
        vitals=[Vital("BP", "120/80", "mmHg"), Vital("HR", "72", "bpm")],
        procedures=["Colonoscopy"],
        text=LIST,
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "Drug: Metformin\nDose: 500 mg\nFrequency: BID\nRoute: PO\n\nTest: HbA1c\nResult: 8.4 % (H)\nReference: 4.0-5.6",
            Fields(
                medications=[Medication("Metformin", "500", "mg", "PO", "BID")],
                labs=[Lab("HbA1c", "8.4", "%", "4.0", "5.6", "H")],
            ),
        ),
        (
            "**Medications:**\n1. **Metformin**\n   - Dosage: 500 mg\n   - Frequency: BID\n2. Warfarin: 5 mg, PO, QD",
            Fields(
                medications=[Medication("Metformin", "500", "mg", "", "BID"), Medication("Warfarin", "5", "mg", "PO", "QD")]
            ),
        ),
        (
            "Medications include aspirin 81 mg daily, lisinopril 10 mg once daily for pain and atorvastatin 40 mg at bedtime.",
            Fields(
                medications=[
                    Medication("aspirin", "81", "mg", "", "daily"),
                    Medication("lisinopril", "10", "mg", "", "once daily"),
                    Medication("atorvastatin", "40", "mg", "", "at bedtime"),
                ]
            ),
        ),
        ("Hemoglobin was low at 9.8 g/dL.", Fields(labs=[Lab("Hemoglobin", "9.8", "g/dL", flag="low")])),
        (
            "### Impression\n1. Right lower lobe pneumonia.\n2. No effusion.\n\n### Findings\nA nodule of 12 mm.",
            Fields(diagnoses=[Diagnosis("Right lower lobe pneumonia")]),
        ),
        (
            "Name: Rosa Roe, 61 Sex: F Age (years): 61 MRN: 123456",
            Fields(patient=Patient(name="Rosa Roe", sex="F", age="61", record="123456")),
        ),
        ("Medications: None\nDiagnoses: none", Fields()),
        ("Procedures:\n- Endoscopy and biopsy", Fields(procedures=["Endoscopy and biopsy"])),
        ("MI 10 years ago.", Fields(diagnoses=[Diagnosis("MI")])),
        ("A 61 y/o woman with CKD", Fields(patient=Patient(age="61", sex="woman"), diagnoses=[Diagnosis("CKD")])),
        (
            "Diagnoses: COPD, CKD. She takes Metformin 500 mg PO BID.\nBP 120/80 mmHg",
            Fields(
                diagnoses=[Diagnosis("COPD"), Diagnosis("CKD")],
                medications=[Medication("Metformin", "500", "mg", "PO", "BID")],
                vitals=[Vital("BP", "120/80", "mmHg")],
            ),
        ),
    ],
)  # fmt: skip
def test_prose_as_models_write_it(answer, expected):
    assert read_answer(answer) == evolve(expected, text=answer)


def test_what_models_write_for_nothing_is_nothing():
    answer = '{"diagnoses":["None"],"medications":"N/A","labs":[{"name":"Na","value":"140","flag":"null","unit":null}]}'
    assert read_answer(answer) == Fields(labs=[Lab("Na", "140")])


def test_leaves_of_any_json_have_paths_of_their_own():
    tree = {"a/b": "x", "a": {"b": 8}, "c~": ["y", {"": 2.5}], "d": [None, True, " ", {}], "e": 0}
    assert json_leaves(tree) == {"a~1b": "x", "a/b": "8", "c~0/0": "y", "c~0/1/": "2.5", "e": "0"}
    assert json_leaves("x") == {"": "x"}
