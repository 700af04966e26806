"""Bundles of FHIR: valid for a peer and for our own value sets, and marked where pages do not show a value."""

import copy
import json
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pytest
from attrs import evolve

from medvl.documents.evidence import Evidence, check_fields, drop_unverified
from medvl.documents.fields import Diagnosis, Fields, Lab, Medication, Patient, Vital
from medvl.documents.quantities import medical_terms, parse_quantity
from medvl.phantoms.page_records import words as drawn_words
from medvl.phantoms.pages import PageConfig, draw_page
from medvl.serve.fhir import check_bundle, make_bundle
from tests.documents.test_rules import words_of

MADE = {
    "software": "medvl 0.1.0",
    "model": "runs/a@1",
    "made_at": datetime(2026, 11, 28, tzinfo=UTC),
    "request": "r-1",
}
TERMS = "http://terminology.hl7.org/CodeSystem/"


def bundle_of(fields, *pages, evidence=None):
    if evidence is None:
        evidence = check_fields(fields, [words_of(page) for page in pages])
    return make_bundle(fields, evidence, **MADE)


def resources(bundle, kind):
    return [entry["resource"] for entry in bundle["entry"] if entry["resource"]["resourceType"] == kind]


def observation(row, *pages):
    fields = Fields(**{"labs" if isinstance(row, Lab) else "vitals": [row]})
    (found,) = resources(bundle_of(fields, *pages), "Observation")
    return found


def dosage(medication):
    (statement,) = resources(bundle_of(Fields(medications=[medication])), "MedicationStatement")
    return statement["dosage"][0]


def validate(bundle):
    """Both the peer and our own value sets take it, as JSON."""
    module = pytest.importorskip("fhir.resources.R4B.bundle")
    text = json.dumps(bundle, allow_nan=False)
    read = module.Bundle.model_validate_json(text)
    assert len(read.entry) == len(bundle["entry"])
    check_bundle(json.loads(text))


def wrong_flag(lab):
    """Another flag than that of a value outside its range, or one for a value inside."""
    # 20 in "< 20" may be high: that flag would not be wrong for certain.
    inside = "L" if lab.value == lab.high and not lab.low else "H"
    return {"H": "L", "HH": "", "L": "N", "LL": "HH"}.get(lab.flag, inside)


def test_two_hundred_pages_are_valid_and_every_planted_flag_is_warned_of():
    gen = np.random.default_rng(0)
    planted = 0
    for number in range(200):
        page = draw_page(PageConfig(), "test", number, damage="clean")
        evidence = check_fields(page.fields, [page.texts])
        assert evidence.warnings == ()
        validate(bundle_of(page.fields, evidence=evidence))
        labs = list(page.fields.labs)
        flagged = [i for i in range(len(labs)) if gen.random() < 0.3]
        for i in flagged:
            labs[i] = evolve(labs[i], flag=wrong_flag(labs[i]))
        if not flagged:
            continue
        planted += len(flagged)
        answer = evolve(page.fields, labs=labs)
        evidence = check_fields(answer, [page.texts])
        assert [w.path for w in evidence.warnings if w.kind == "flag"] == [f"labs/{i}/flag" for i in flagged]
        tests = resources(bundle_of(answer, evidence=evidence), "Observation")[: len(labs)]
        notes = [test["note"][0]["text"] if "note" in test else "" for test in tests]
        assert [i for i, note in enumerate(notes) if "Warning: " in note] == flagged
    assert planted == 185


def test_a_lab_with_its_unit_range_and_flag():
    page = "Potassium 5.9 mmol/L 3.5-5.1 H"
    found = observation(Lab("Potassium", "5.9", "mmol/L", "3.5", "5.1", "H"), page)
    unit = {"unit": "mmol/L", "system": "http://unitsofmeasure.org", "code": "mmol/L"}
    subject = found.pop("subject")
    assert subject["reference"].startswith("urn:uuid:")
    assert found == {
        "resourceType": "Observation",
        "status": "preliminary",
        "category": [{"coding": [{"system": f"{TERMS}observation-category", "code": "laboratory"}]}],
        "code": {"text": "Potassium"},
        "valueQuantity": {"value": 5.9} | unit,
        "interpretation": [
            {"coding": [{"system": f"{TERMS}v3-ObservationInterpretation", "code": "H"}], "text": "H"}
        ],
        "referenceRange": [{"low": {"value": 3.5} | unit, "high": {"value": 5.1} | unit}],
    }


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        ("<0.5", "", {"valueQuantity": {"value": 0.5, "comparator": "<"}}),
        (">= 60", "", {"valueQuantity": {"value": 60, "comparator": ">="}}),
        (
            "8,4",
            "%",
            {
                "valueQuantity": {
                    "value": 8.4,
                    "unit": "%",
                    "system": "http://unitsofmeasure.org",
                    "code": "%",
                }
            },
        ),
        ("1,200", "cells", {"valueQuantity": {"value": 1200, "unit": "cells"}}),
        ("0-2", "", {"valueRange": {"low": {"value": 0}, "high": {"value": 2}}}),
        ("negative", "", {"valueString": "negative"}),
        ("~5", "", {"valueString": "~5"}),
        ("1/80", "", {"valueString": "1/80"}),
        ("2020-01-02", "", {"valueString": "2020-01-02"}),
        ("8.4 %", "mg/dL", {"valueString": "8.4 %"}),
        ("12345678901234567890", "", {"valueString": "12345678901234567890"}),
        (
            "",
            "mg",
            {"dataAbsentReason": {"coding": [{"system": f"{TERMS}data-absent-reason", "code": "unknown"}]}},
        ),
    ],
)
def test_values_of_every_kind(value, unit, expected):
    found = observation(Lab("Test", value, unit))
    assert {
        key: found[key] for key in found if key.startswith(("value", "dataAbsent", "component"))
    } == expected


def test_a_blood_pressure_has_two_components():
    found = observation(Vital("BP", "120/80", "mmHg"), "BP 120/80 mmHg")
    assert [part["code"]["text"] for part in found["component"]] == [
        "Systolic blood pressure",
        "Diastolic blood pressure",
    ]
    assert [part["valueQuantity"]["value"] for part in found["component"]] == [120, 80]
    assert found["component"][0]["valueQuantity"]["code"] == "mm[Hg]"
    assert found["category"][0]["coding"][0]["code"] == "vital-signs"
    assert not any(key.startswith("value") for key in found)


def test_a_range_of_one_end_and_one_that_is_no_number():
    assert observation(Lab("CRP", "3", "mg/L", "", "5.0"))["referenceRange"][0].keys() == {"high"}
    assert observation(Lab("CRP", "3", "", "", "see note"))["referenceRange"] == [{"text": "see note"}]
    flags = observation(Lab("CRP", "3", flag="see note"))["interpretation"]
    assert flags == [{"text": "see note"}]


def test_units_that_are_not_certain_have_no_code():
    for unit in ("units", "tablets", "mg/5 mL", "K/uL", "IU"):
        assert dosage(Medication("Insulin", "10", unit))["doseAndRate"] == [
            {"doseQuantity": {"value": 10, "unit": unit}}
        ]
    quantity = dosage(Medication("Folic acid", "400", "µg"))["doseAndRate"][0]["doseQuantity"]
    assert (quantity["unit"], quantity["code"]) == ("µg", "ug")


def test_units_of_drawn_pages_have_codes():
    rows = [*drawn_words()["labs"].values(), *drawn_words()["vitals"].values()]
    for unit in sorted({row["unit"] for row in rows} - {""}):
        assert "code" in observation(Lab("Test", "1", unit))["valueQuantity"], unit


def test_one_size_has_one_code():
    """Units that medical_terms.toml holds for the same never have codes of different size."""
    sizes = {"ug/mL": "mg/L", "ug/L": "ng/mL", "ng/L": "pg/mL", "10*3/uL": "10*9/L", "10*6/uL": "10*12/L"}
    sizes |= {"u[IU]/mL": "m[IU]/L"}
    for row in medical_terms()["same_units"]:
        codes = {observation(Lab("Test", "1", unit))["valueQuantity"].get("code") for unit in row} - {None}
        assert len({sizes.get(code, code) for code in codes} - {sizes.get(c) for c in codes}) <= 1, row


def test_a_dosage_with_its_timing():
    found = dosage(Medication("Ibuprofen", "400-600", "mg", "PO", "every 6 hours", prn=True))
    mg = {"unit": "mg", "system": "http://unitsofmeasure.org", "code": "mg"}
    assert found == {
        "text": "400-600 mg PO every 6 hours as needed",
        "timing": {
            "code": {
                "coding": [{"system": f"{TERMS}v3-GTSAbbreviation", "code": "Q6H"}],
                "text": "every 6 hours",
            }
        },
        "asNeededBoolean": True,
        "route": {"text": "PO"},
        "doseAndRate": [{"doseRange": {"low": {"value": 400} | mg, "high": {"value": 600} | mg}}],
    }


@pytest.mark.parametrize(
    ("frequency", "code"),
    [
        *(
            ("BID", "BID"),
            ("twice daily", "BID"),
            ("b.i.d.", "BID"),
            ("QD", "QD"),
            ("Q4H", "Q4H"),
            ("QHS", "BED"),
        ),
        *(
            ("QOD", "QOD"),
            ("once weekly", "WK"),
            ("every morning", "AM"),
            ("TID", "TID"),
            ("4x daily", "QID"),
        ),
        *(
            ("Q12H", None),
            ("BID with meals", None),
            ("every evening", None),
            ("STAT", None),
            ("every 4-6 hours", None),
        ),
    ],
)
def test_frequencies_that_are_codes(frequency, code):
    coding = dosage(Medication("Drug", frequency=frequency))["timing"]["code"].get("coding", [{"code": None}])
    assert [entry["code"] for entry in coding] == [code]


def test_a_patient_is_what_the_page_says():
    page = "Alma Yarrow F 54 SYN-1 2020-01-02\nCOPD ECG"
    fields = Fields(
        kind="diagnosis",
        patient=Patient("Alma Yarrow", "F", "54", "SYN-1", "2020-01-02"),
        diagnoses=[Diagnosis("COPD")],
        procedures=["ECG"],
        text="COPD ECG",
    )
    bundle = bundle_of(fields, page)
    (patient,) = resources(bundle, "Patient")
    assert patient["name"] == [{"text": "Alma Yarrow"}]
    assert patient["gender"] == "female"
    assert patient["identifier"][0]["value"] == "SYN-1"
    assert {e["url"]: e["valueString"] for e in patient["extension"]} == {
        "urn:x-medvl:age": "54",
        "urn:x-medvl:page-date": "2020-01-02",
    }
    assert "birthDate" not in patient
    (condition,) = resources(bundle, "Condition")
    assert condition["verificationStatus"]["coding"][0]["code"] == "unconfirmed"
    assert condition["code"] == {"text": "COPD"}
    assert resources(bundle, "Procedure")[0]["code"] == {"text": "ECG"}
    (document,) = resources(bundle, "DocumentReference")
    assert document["type"] == {"text": "diagnosis"}
    validate(bundle)
    (other,) = resources(bundle_of(Fields(patient=Patient(sex="X"))), "Patient")
    assert "gender" not in other


def test_provenance_names_software_and_boxes():
    bundle = bundle_of(Fields(labs=[Lab("Potassium", "5.9")]), "Gout", "Potassium 5.9")
    (test,) = [e["fullUrl"] for e in bundle["entry"] if e["resource"]["resourceType"] == "Observation"]
    provenance = next(p for p in resources(bundle, "Provenance") if p["target"] == [{"reference": test}])
    assert provenance["agent"][0]["who"]["display"] == "medvl 0.1.0, model runs/a@1"
    parts = provenance["entity"][0]["extension"][1]["extension"]
    assert {part["url"]: next(v for k, v in part.items() if k != "url") for part in parts} == {
        "path": "labs/0/value",
        "status": "verified",
        "text": "5.9",
        "score": 1.0,
        "page": 2,
        "box": "120.0 40.0 144.0 52.0",
    }


@pytest.mark.parametrize("evidence", [None, Evidence()])
def test_what_is_not_verified_is_marked(evidence):
    fields = Fields(
        patient=Patient("Alma"),
        labs=[Lab("Potassium", "9.5"), Lab("Sodium", "139")],
        procedures=["ECG"],
        text="Fine.",
    )
    bundle = bundle_of(fields, "Potassium 5.9\nSodium 139", evidence=evidence)
    potassium, sodium = resources(bundle, "Observation")
    label = {"security": [{"system": f"{TERMS}v3-ObservationValue", "code": "UNCERTREL"}]}
    assert potassium["meta"] == label
    assert "value" in potassium["note"][0]["text"]
    assert ("meta" in sodium) == (evidence is not None)
    for kind in ("Patient", "Procedure", "DocumentReference"):
        assert resources(bundle, kind)[0]["meta"] == label
    validate(bundle)


def test_what_was_left_out_is_told():
    """Of a dose, a value and a unit that no page shows, and of two whole entries."""
    fields = Fields(
        patient=Patient("Alma"),
        medications=[
            Medication("Cyanocobalamin", "100", "mcg", "IM", "QW"),
            Medication("Aspirin", "81", "mg"),
        ],
        labs=[
            Lab("Hgb", "7.4", "g/dL", "12", "16", "L"),
            Lab("Glu", "51", "mmol/L", "70", "99", "L"),
            Lab("Na", "139"),
        ],
        text="Not on the page.",
    )
    page = "Alma\nCyanocobalamin 1000 mcg IM QW\nHgb 11.4 g/dL 12-16 L\nGlu 51 mg/dL 70-99 L\nNa 139"
    left, evidence = drop_unverified(fields, check_fields(fields, [words_of(page)]))
    bundle = make_bundle(
        left, evidence, **MADE, disclaimer="Research use only.", notices=["an answer was cut"]
    )
    validate(bundle)
    (statement,) = resources(bundle, "MedicationStatement")
    hgb, glu, sodium = resources(bundle, "Observation")
    for resource, names in (
        (statement, "dose, unit"),
        (hgb, "value, flag"),
        (glu, "value, unit, low, high, flag"),
    ):
        assert resource["meta"]["security"][0]["code"] == "UNCERTREL"
        assert f"Left out, as no page shows it: {names}." in resource["note"][0]["text"]
    assert "meta" not in sodium
    assert statement["dosage"][0]["text"] == "[dose left out] IM QW"
    assert "doseAndRate" not in statement["dosage"][0]
    for resource in (hgb, glu):
        assert resource["dataAbsentReason"]["coding"][0]["code"] == "error"
        assert "interpretation" not in resource
    assert hgb["referenceRange"][0]["low"]["unit"] == "g/dL"
    assert "referenceRange" not in glu
    (outcome,) = resources(bundle, "OperationOutcome")
    assert [(issue["severity"], issue["code"], issue["details"]["text"]) for issue in outcome["issue"]] == [
        ("information", "informational", "Research use only."),
        ("warning", "incomplete", "an answer was cut"),
        ("warning", "incomplete", "left out of medications, as no page shows it: 1"),
        ("warning", "incomplete", "left out of text, as no page shows it: 1"),
    ]
    outcome["issue"][0]["severity"] = "fatal"
    with pytest.raises(ValueError, match=r"issue\[0\] must have a code"):
        check_bundle(bundle)


def test_the_same_request_gives_the_same_bundle():
    fields = Fields(labs=[Lab("Potassium", "5.9"), Lab("Potassium", "5.9")])
    bundle = bundle_of(fields, "Potassium 5.9")
    assert bundle == bundle_of(fields, "Potassium 5.9")
    other = make_bundle(fields, Evidence(), **MADE | {"request": "r-2"})
    urls = [{entry["fullUrl"] for entry in b["entry"]} for b in (bundle, other)]
    assert not urls[0] & urls[1]
    with pytest.raises(ValueError, match="time zone"):
        make_bundle(fields, Evidence(), **MADE | {"made_at": datetime(2026, 1, 1)})


def test_whatever_a_model_writes_becomes_a_bundle():
    gen = np.random.default_rng(0)
    letters = [
        *"0123456789.,<>-/~ %µHL()[]\x00\n\t\x1f",
        "\ud800",
        "mg",
        "mmol/L",
        "1e999",
        "٣",
        "²",
        "∞",
        "nan",
    ]
    for _ in range(60):

        def text():
            return "".join(gen.choice(letters, gen.integers(0, 8)))

        fields = Fields(
            kind=text(),
            patient=Patient(*(text() for _ in range(5))),
            diagnoses=[Diagnosis(text())],
            medications=[Medication(*(text() for _ in range(5)), prn=bool(gen.random() < 0.5))],
            labs=[Lab(*(text() for _ in range(6)))],
            vitals=[Vital("BP", text(), text())],
            procedures=[text(), text()],
            text=text(),
        )
        validate(bundle_of(fields, evidence=check_fields(fields, [words_of("12 mg 0.5\nBP 120/80")])))


def broken(change):
    fields = Fields(
        patient=Patient("Alma"),
        labs=[Lab("Potassium", "<5.9", "mmol/L", flag="H")],
        medications=[Medication("Drug", frequency="BID")],
        diagnoses=[Diagnosis("COPD")],
    )
    bundle = copy.deepcopy(bundle_of(fields))
    entries = {entry["resource"]["resourceType"]: entry for entry in reversed(bundle["entry"])}
    change(bundle, entries, {kind: entry["resource"] for kind, entry in entries.items()})
    return bundle


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda b, e, r: b.update(type="document"), "type collection"),
        (
            lambda b, e, r: e["Condition"].update(fullUrl=e["Patient"]["fullUrl"]),
            "fullUrl must be a urn:uuid",
        ),
        (lambda b, e, r: e["Condition"].update(fullUrl="urn:uuid:1"), "fullUrl must be a urn:uuid"),
        (lambda b, e, r: r["Observation"].update(status="final"), r"resource.status must be preliminary"),
        (lambda b, e, r: r["Condition"].update(resourceType="Claim"), "resourceType must be one of"),
        (lambda b, e, r: r["Condition"].pop("subject"), "subject must refer"),
        (
            lambda b, e, r: r["Condition"].update(subject={"reference": e["Observation"]["fullUrl"]}),
            "subject must refer",
        ),
        (lambda b, e, r: r["Condition"].pop("verificationStatus"), "verificationStatus must be there"),
        (lambda b, e, r: r["Observation"].pop("category"), "category must be there"),
        (lambda b, e, r: r["Observation"].pop("valueQuantity"), "must have one value"),
        (lambda b, e, r: r["Observation"].update(valueString="5"), "must have one value"),
        (
            lambda b, e, r: r["Observation"]["valueQuantity"].update(code="mM"),
            "valueQuantity must have no code",
        ),
        (
            lambda b, e, r: r["Observation"]["valueQuantity"].update(comparator="~"),
            "comparator must be one of",
        ),
        (
            lambda b, e, r: r["Observation"]["interpretation"][0]["coding"][0].update(code="X"),
            r"interpretation\[0\].coding\[0\]",
        ),
        (
            lambda b, e, r: r["Observation"]["category"][0]["coding"][0].update(system="x"),
            r"category\[0\].coding\[0\]",
        ),
        (
            lambda b, e, r: r["Condition"]["verificationStatus"]["coding"][0].update(code="confirmed"),
            "condition-ver-status",
        ),
        (
            lambda b, e, r: r["MedicationStatement"]["dosage"][0]["timing"]["code"]["coding"][0].update(
                code="Q5H"
            ),
            "GTSAbb",
        ),
        (
            lambda b, e, r: r["Condition"]["code"].update(
                coding=[{"system": "http://snomed.info/sct", "code": "1"}]
            ),
            "code",
        ),
        (
            lambda b, e, r: r["Provenance"]["target"].append({"reference": "urn:uuid:none"}),
            r"target\[1\].reference",
        ),
        (lambda b, e, r: r["Provenance"]["agent"][0]["type"]["coding"][0].update(code="author"), "agent"),
        (lambda b, e, r: r["Patient"]["meta"]["security"][0].update(code="RELIABLE"), r"meta.security\[0\]"),
    ],
)
def test_our_value_sets_refuse_what_the_peer_takes(change, path):
    check_bundle(broken(lambda b, e, r: None))
    with pytest.raises(ValueError, match=path):
        check_bundle(broken(change))


def test_numbers_are_those_that_are_printed():
    for text in ("0.1", "8.40", "123456789.012345", "3.125", "1,234.5", "0.02"):
        value = observation(Lab("Test", text))["valueQuantity"]["value"]
        assert str(value).rstrip("0") == str(parse_quantity(text).numbers[0]).rstrip("0")


def test_no_torch():
    code = "import sys, medvl.serve.fhir; print({'torch', 'fhir', 'pydantic'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
