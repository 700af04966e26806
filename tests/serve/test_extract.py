"""A page becomes fields with evidence, through the whole service with a real reader: only the model's answer is written."""

import io
import json
import signal
import subprocess
import sys

import pytest
from PIL import Image

from medvl.documents.fields import Fields, Lab, Medication, Patient, fields_to_json, leaves, read_answer
from medvl.documents.words import Word, overlap
from medvl.serve import extract, pages
from medvl.serve.fhir import check_bundle
from medvl.serve.interface import Refused
from medvl.serve.pages import check_answers, merge_fields
from tests.serve import scripted, toy_service

pytest.importorskip("rapidocr")


@pytest.fixture(scope="module")
def service():
    with toy_service.running(
        opener="tests.serve.scripted:Scripted", readers=("medvl.serve.pages:open_reader",)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def answers(service):
    """What the service says of the page: as it is, strictly, as FHIR, and without its words being read."""
    with toy_service.client(service) as client:

        def ask(**data):
            answer = client.post("/extract", files={"file": scripted.page_png()}, data=data)
            assert answer.status_code == 200, answer.text
            return answer.json()

        wishes = {
            "plain": {},
            "strict": {"strict": "true"},
            "fhir": {"format": "fhir"},
            "blind": {"evidence": "false"},
        }
        return {name: ask(**wish) for name, wish in wishes.items()}


def test_values_have_their_boxes_and_wrong_ones_none(answers):
    """Of the answer's values all stand on the page, but for two that were written into it and a unit."""
    page, plain = scripted.page(), answers["plain"]
    by_path = {value["path"]: value for value in plain["values"]}
    assert by_path.keys() == leaves(scripted.answered_fields()).keys()
    assert by_path["labs/0/value"]["text"] == "7777"
    for path in ("labs/0/value", "labs/1/name"):
        assert by_path[path]["status"] == "missing"
        assert by_path[path]["box"] is None
        assert path in plain["unverified"]
    right = [path for path in by_path if leaves(page.fields).get(path) == by_path[path]["text"]]
    verified = [path for path in right if by_path[path]["verified"]]
    # Values of the two damaged rows may be marked, too; a reader may miss one.
    assert len(verified) >= 0.85 * len(right)
    good = [
        path
        for path in verified
        if path in page.boxes and overlap(tuple(by_path[path]["box"]), page.boxes[path]) > 0.4
    ]
    assert len(good) >= 0.9 * len([path for path in verified if path in page.boxes])
    assert plain["seconds"]["read"] > 0
    assert plain["pages"][0]["finish_reason"] == "stop"


def test_strict_leaves_out_what_no_page_shows(answers):
    strict = answers["strict"]
    assert "7777" not in json.dumps(strict["fields"])
    assert scripted.HTML not in json.dumps(strict["fields"])
    assert strict["unverified"] == []
    assert len(strict["values"]) < len(answers["plain"]["values"])
    left_out = {value["path"]: value["status"] for value in strict["left_out"]}
    assert left_out["labs/0/value"] == "missing"
    assert left_out["labs"] == "missing"  # the second row, whose name was written into it
    assert answers["plain"]["left_out"] == []


def test_without_evidence_nothing_is_verified(answers):
    blind = answers["blind"]
    assert blind["fields"] == answers["plain"]["fields"]
    assert {value["status"] for value in blind["values"]} == {"unchecked"}
    assert blind["unverified"] == [value["path"] for value in blind["values"]]
    assert "read" not in blind["seconds"]


def test_fhir_is_valid_and_marks_what_is_not_verified(answers):
    bundle = answers["fhir"]
    check_bundle(bundle)
    peer = pytest.importorskip("fhir.resources.R4B.bundle")
    peer.Bundle.model_validate(bundle)
    observations = [e["resource"] for e in bundle["entry"] if e["resource"]["resourceType"] == "Observation"]
    assert len(observations) == len(scripted.answered_fields().labs) + len(scripted.answered_fields().vitals)
    wrong = observations[0]
    assert wrong["valueQuantity"]["value"] == 7777
    assert wrong["meta"]["security"][0]["code"] == "UNCERTREL"
    assert not all("meta" in observation for observation in observations)
    (outcome,) = [
        e["resource"] for e in bundle["entry"] if e["resource"]["resourceType"] == "OperationOutcome"
    ]
    assert outcome["issue"][0]["details"]["text"] == answers["plain"]["disclaimer"]


def test_a_client_that_accepts_fhir_gets_it(service):
    accept = {"accept": "application/fhir+json, application/json;q=0.5"}
    with toy_service.client(service) as client:
        answer = client.post("/extract", files={"file": scripted.page_png()}, headers=accept)
        assert answer.headers["content-type"] == "application/fhir+json"
        assert answer.json()["resourceType"] == "Bundle"
        plain = client.post(
            "/extract", files={"file": scripted.page_png()}, headers=accept, data={"format": "json"}
        )
        assert plain.headers["content-type"] == "application/json"


def test_pages_of_a_pdf_are_one_document(service):
    """Three pages: each is asked about, and values say on which page they stand."""
    image = Image.open(io.BytesIO(scripted.page_png()))
    blank = Image.new("RGB", image.size, "white")
    file = io.BytesIO()
    blank.save(file, "PDF", save_all=True, append_images=[image, blank], resolution=150)
    with toy_service.client(service) as client:
        answer = client.post("/extract", files={"file": file.getvalue()}, data={"pages": "1,2"}).json()
    assert [(page["file"], page["page"]) for page in answer["pages"]] == [(0, 1), (0, 2)]
    one = len(scripted.answered_fields().labs)
    assert len(answer["fields"]["labs"]) == 2 * one
    first = [value for value in answer["values"] if value["verified"] and value["path"].startswith("labs/")]
    assert {value["page"] for value in first} == {0}


def test_a_schema_of_the_client_has_evidence_too(service):
    schema = {"type": "object", "properties": {"labs": {"type": "array", "items": {}}}}
    with toy_service.client(service) as client:
        answer = client.post(
            "/extract", files={"file": scripted.page_png()}, data={"schema": json.dumps(schema)}
        ).json()
    assert answer["fields"] is None
    assert answer["pages"][0]["answer"]["labs"][0]["value"] == "7777"
    by_path = {value["path"]: value for value in answer["values"]}
    assert by_path["0/labs/0/value"]["status"] == "missing"
    others = [
        value for path, value in by_path.items() if path.endswith("/value") and path != "0/labs/0/value"
    ]
    assert sum(value["status"] == "printed" for value in others) >= 0.8 * len(others)
    # That a value is printed somewhere does not verify it: nothing says what it is of.
    assert answer["unverified"] == [value["path"] for value in answer["values"]]


def test_fields_of_pages_are_joined():
    a = Fields(
        kind="lab results", patient=Patient(name="Doe, Jane", age="50"), labs=[Lab("K", "4.0")], text="x"
    )
    b = Fields(
        kind="prescription",
        patient=Patient(name="jane doe", sex="F"),
        medications=[Medication("M")],
        text="y",
    )
    joined = merge_fields([a, b, read_answer("")])
    assert joined.kind == "lab results"
    assert joined.patient == Patient(name="Doe, Jane", age="50", sex="F")
    assert (joined.labs, joined.medications, joined.text) == (a.labs, b.medications, "x\ny")


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (Patient(name="Jane Doe", record="17"), False),
        (Patient(record="4 7-1 1", age="60"), False),
        (Patient(name="Jane Roe", sex="F"), True),
        (Patient(record="4712", sex="F"), True),
        (Patient(), False),
    ],
)
def test_pages_of_two_patients_are_not_made_one(other, differs):
    """Nothing of another patient is taken for the first one's, and a warning says which page it is."""
    first = Fields(patient=Patient(name="Doe, Jane", record="" if other.record == "17" else "4711"))
    answers = [fields_to_json(page) for page in (first, Fields(patient=other, labs=[Lab("K", "4.0")]))]
    checked = check_answers(answers, None, False)
    found = [warning.message for warning in checked.warnings if warning.kind == "patient"]
    assert found == ["page 1 of the document names another patient: send each document by itself"] * differs
    assert checked.fields.patient.sex == ""
    assert checked.fields.patient.age == ("60" if other.age else "")


def test_an_answer_that_states_nothing_is_warned_of():
    words = [Word(text, (0, 0, 9, 9)) for text in ["Glucose", "98", "mg/dL", "70", "99", "N"]]
    answers = ["{}", fields_to_json(Fields(text="x")), "{}", "{}"]
    checked = check_answers(answers, [words, words, words[:2], words], False)
    assert [warning.message for warning in checked.warnings] == [
        "the answer states nothing of page 0, which shows 6 words",
        "the answer states nothing of page 3, which shows 6 words",
    ]
    assert len(check_answers(answers, None, False).warnings) == 3


@pytest.mark.parametrize(
    ("answer", "tree"),
    [
        ('{"a": [1, 2]}', {"a": [1, 2]}),
        ("[" * 60 + "]" * 60, ...),
        ("[" * 65 + "]" * 65, None),
        ('{"a":' * 5000, None),
        ("[" * 3000 + "]" * 3000, None),
        ('{"a": NaN}', None),
        ('{"a": Infinity}', None),
        ("Jane", None),
    ],
)
def test_answers_of_an_own_schema_that_cannot_be_told_are_none(answer, tree):
    found = extract._parse(extract.Page(file=0, number=0, width=1, height=1, answer=answer))
    assert (found is not None) if tree is ... else found == tree


def test_halves_of_characters_are_replaced():
    """An escape of half a UTF-16 pair is valid JSON, and no response can be written with it."""
    text = r'{"a": "\ud83d\ude00 \ud83d x \ude00", "b": "' + "\ud83d" + '"}'
    assert json.loads(extract._without_halves(text)) == {"a": "😀 \ufffd x \ufffd", "b": "?"}


def test_answers_that_take_too_long_to_compare_are_unchecked(service):
    """The process that compares them ends at its time limit, here by a kill in the middle; fields come without evidence."""
    calls = service.backend.checker.call
    tries = []

    async def slow(call, function, **arguments):
        tries.append(arguments["pages"] is None)
        if arguments["pages"] is not None:
            raise Refused(502, "the process has ended")
        return await calls(call, function, **arguments)

    service.backend.checker.call = slow
    try:
        with toy_service.client(service) as client:
            answer = client.post("/extract", files={"file": scripted.page_png()}).json()
    finally:
        service.backend.checker.call = calls
    assert tries == [False, False, True]
    assert {value["status"] for value in answer["values"]} == {"unchecked"}
    assert [warning["kind"] for warning in answer["warnings"]] == ["unchecked"]
    assert answer["unverified"] == [value["path"] for value in answer["values"]]


def test_a_check_ends_its_process_at_its_time_limit():
    """SIGALRM, which nobody handles: also where the time is spent in C."""
    code = "from medvl.serve import pages; import time; pages._in_time(1, lambda: time.sleep(60))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGALRM
    assert pages._in_time(5, lambda: 7) == 7
