"""SLAKE and OmniMedVQA: no question is lost, tables can be read, and what is wrong is said with its line."""

import csv
import json
from collections import Counter

import pytest
import torch
from attrs import evolve

from medvl.evaluation.vqa import Labelled, score_answers
from medvl.language.conversations import read_conversations
from medvl.language.vqa_rad import convert_vqa_rad
from medvl.language.vqa_sets import convert_omnimedvqa, convert_slake
from tests.tiny import drawn

SLAKE = {
    "img_id": 102,
    "img_name": "xmlab102/source.jpg",
    "question": "Does the picture \tcontain liver?",
    "answer": "No",
    "q_lang": "en",
    "location": "Lung",
    "modality": "CT",
    "answer_type": "CLOSED",
    "base_type": "vqa",
    "triple": ["vhead", "_", "_"],
    "qid": 11938,
    "content_type": "Organ",
}
OMNI = {
    "dataset": "Chest CT Scan",
    "question_id": "Chest CT Scan_0000",
    "question_type": "Disease Diagnosis",
    "question": "What is seen?",
    "gt_answer": "Adenocarcinoma",
    "image_path": "Images/a b/1.png",
    "option_A": "Normal",
    "option_B": "adenocarcinoma.",
    "option_C": "Large cell carcinoma",
    "option_D": "Both",
    "modality_type": "CT(Computed Tomography)",
}


@pytest.fixture
def convert(tmp_path):
    """Write rows and their images, convert them, read the table."""
    for name in ("xmlab102/source.jpg", "Images/a b/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        drawn((20, 20)).save(tmp_path / "images" / name)

    def call(f, *rows, **options):
        (tmp_path / "in.json").write_text(json.dumps(rows))
        counts = f(tmp_path / "in.json", tmp_path / "images", tmp_path / "out" / "test.jsonl", **options)
        return counts, read_conversations(tmp_path / "out" / "test.jsonl")

    return call


def test_slake(convert, tmp_path):
    other = SLAKE | {"qid": 5, "q_lang": "zh", "question": "?", "answer": "CT", "answer_type": "OPEN"}
    counts, found = convert(
        convert_slake, SLAKE, other, SLAKE | {"qid": 6, "answer": "Lung", "answer_type": "OPEN"}
    )
    assert counts == {"closed": 1, "open": 1, "left_out": 1}
    asked = "<image>\nDoes the picture contain liver?"
    assert [m["content"] for c in found for m in c.messages] == [asked, "No", asked, "Lung"]
    assert found[0].images[0].samefile(tmp_path / "images" / "xmlab102" / "source.jpg")
    assert found[0].id == "11938"
    about = {key: found[0].extra[key] for key in ("task", "category", "family")}
    assert about == {"task": "CT", "category": "Organ", "family": "closed"}
    counts, found = convert(convert_slake, SLAKE, other, language="zh")
    assert counts == {"closed": 0, "open": 1, "left_out": 1}


def test_numbers_are_texts_of_options(convert):
    _, found = convert(convert_omnimedvqa, OMNI | {"option_A": 0, "option_B": ["x"], "gt_answer": 0})
    assert found[0].messages[-1]["content"] == "A. 0"
    assert found[0].options == {"A": "0", "C": OMNI["option_C"], "D": OMNI["option_D"]}


def test_omnimedvqa(convert, tmp_path):
    two = OMNI | {"gt_answer": "Normal", "question_id": "y", "option_C": None, "modality": "CT"}
    del two["option_B"], two["option_D"], two["modality_type"]
    counts, found = convert(convert_omnimedvqa, OMNI, two)
    assert counts == {"choice": 2}
    question = "<image>\nWhat is seen?\nA. Normal\nB. adenocarcinoma.\nC. Large cell carcinoma\nD. Both"
    assert [m["content"] for m in found[0].messages] == [question, "B. adenocarcinoma."]
    assert found[0].options == {letter: OMNI[f"option_{letter}"] for letter in "ABCD"}
    for other in (["x"], {"1": "x"}, {"A": 1}, None):  # what other files may have under this key
        assert evolve(found[0], extra={"options": other}).options == {}
    assert (found[0].extra["family"], found[0].extra["task"]) == ("choice", "CT(Computed Tomography)")
    assert [m["content"] for m in found[1].messages] == ["<image>\nWhat is seen?\nA. Normal", "A. Normal"]
    assert found[1].extra["task"] == "CT"
    assert found[0].images[0].samefile(tmp_path / "images" / "Images" / "a b" / "1.png")
    records = [Labelled(gold=c.messages[-1]["content"], options=c.options) for c in found]
    rows = score_answers(["Adenocarcinoma", "B"], records, [0, 1], split="all", gen=torch.Generator())
    assert rows[0].value == 0.5


@pytest.mark.parametrize(
    ("f", "change", "text"),
    [
        (convert_slake, {"img_name": "no.jpg"}, r"record 2: the image .*no.jpg is not there"),
        (
            convert_slake,
            {"answer_type": "MAYBE"},
            r"record 2: answer_type must be OPEN or CLOSED, got 'maybe'",
        ),
        (convert_slake, {"answer": " "}, r"record 2: must be an object with qid, .* none empty, got"),
        (convert_slake, {"answer": None}, r"record 2: must be an object with qid, .* none empty, got"),
        (convert_slake, {"question": ["?"]}, r"record 2: must be an object with qid, .* none empty, got"),
        (convert_slake, {"answer": "No\ud800"}, r"record 2: must be an object with qid, .* none empty, got"),
        (convert_slake, {}, r"record 2: must be a question of its own, found that of .*record 1 again"),
        (convert_omnimedvqa, {}, r"record 2: must be a question of its own, found that of .*record 1 again"),
        (
            convert_slake,
            {"question": "<image>?"},
            r"record 2: every tag '<image>' needs its image, got 2 tags",
        ),
        (convert_omnimedvqa, {"gt_answer": "Nothing"}, r'gt_answer must be one of .* got "Nothing"'),
        (convert_omnimedvqa, {"question_id": ""}, r"must be an object with question_id"),
    ],
)
def test_errors(convert, tmp_path, f, change, text):
    row = SLAKE if f is convert_slake else OMNI
    with pytest.raises(ValueError, match=text):
        convert(f, row, row | change)
    assert not (tmp_path / "out").exists()  # no half of a table


def test_other_files(convert, tmp_path):
    with pytest.raises(ValueError, match=r"in.json: must hold questions in 'English', found .*'left_out': 1"):
        convert(convert_slake, SLAKE, language="English")
    with pytest.raises(ValueError, match=r"in.json: must hold questions, found none"):
        convert(convert_omnimedvqa)
    (tmp_path / "file").touch()
    for f in (convert_slake, convert_omnimedvqa):
        with pytest.raises(ValueError, match="file is not a folder; give another place"):
            f(tmp_path / "in.json", tmp_path, tmp_path / "file" / "t.jsonl")
    with pytest.raises(ValueError, match=r"no.json: no such file"):
        convert_slake(tmp_path / "no.json", tmp_path, tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=r"record 1: must be an object with question_id"):
        convert(convert_omnimedvqa, "text")


def test_the_real_files_lose_no_record(shared_data, tmp_path):
    """SLAKE's own images are not there: empty files stand for them."""
    folder = shared_data / "medvqa"
    published = json.loads((folder / "slake_test.json").read_text())
    for row in published:
        image = tmp_path / row["img_name"]
        image.parent.mkdir(exist_ok=True)
        image.touch()
    counts = convert_slake(folder / "slake_test.json", tmp_path, tmp_path / "slake.jsonl")
    assert counts == {"closed": 416, "open": 645, "left_out": 1033}
    assert sum(counts.values()) == len(published)
    slake = read_conversations(tmp_path / "slake.jsonl")
    closed = [c for c in slake if c.extra["family"] == "closed"]
    with open(folder / "slake_test_close.csv", newline="") as f:
        table = [(r["img_name"], r["question"], r["answer"]) for r in csv.DictReader(f)]
    ours = [(str(c.images[0].relative_to(tmp_path)), *(m["content"] for m in c.messages)) for c in closed]
    assert Counter(ours) == Counter((i, f"<image>\n{' '.join(q.split())}", a) for i, q, a in table)

    rad = folder / "vqa_rad"
    convert_vqa_rad(rad / "vqa_rad_share.json", rad / "images", tmp_path, split="published", valid=0)
    tested = read_conversations(tmp_path / "test.jsonl")
    for found, n_closed, n_open in ((slake, 416, 645), (tested, 178, 109)):
        gold = [c.messages[-1]["content"] for c in found]
        records = [Labelled(gold=g, subjects=[c.extra["family"]]) for g, c in zip(gold, found, strict=True)]
        images = [c.extra["episode_id"] for c in found]
        rows = score_answers(gold, records, images, split="test", n=20, gen=torch.Generator())
        said = {(r.subject, r.what): r for r in rows}
        assert said["closed", "accuracy"].n == n_closed
        assert said["open", "accuracy"].n == n_open
        assert said["all", "accuracy"].n == n_closed + n_open == len(found)
        assert all(r.value == 1 for r in rows if r.what == "accuracy")
