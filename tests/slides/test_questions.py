"""Questions about slides: every published format as one record, and every faulty record named."""

import json
import logging
from collections import Counter

import pytest

from medvl.base import files
from medvl.slides.questions import DESCRIBE, audit_slide_conversations, published_as, read_slide_conversations

TCGA = """\ufeffID,Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer
0,TCGA-GV-A40G-01Z-00-DX1,BLCA,Diagnosis,Grading,"Which grade, please?",None,NA,High,,C
1,TCGA-GV-A40G-01Z-00-DX1,BLCA,Clinical,Risk Factors,Which?,x,y,z,w,A
"""
BCNB = "ID,Slide,Task,Question,A,B,C,D,Answer\n7,12,ER,Is ER there?,Positive,Negative,,,B\n"


def human(text, said, **rest):
    return {"id": rest.pop("id", "q"), "image": ["./BLCA/s.csv"], "conversations": turns(text, said)} | rest


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]


@pytest.fixture
def write(tmp_path):
    def call(content):
        path = tmp_path / "file"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return call


def texts(talk):
    return [m["content"] for m in talk.messages]


def test_slidebench(write, caplog):
    one, two = read_slide_conversations(write(TCGA))
    assert one.choices == {"A": "None", "B": "NA", "C": "High"}
    assert texts(one) == ["<image>\nWhich grade, please?\nA. None\nB. NA\nC. High", "C. High"]
    assert [m["role"] for m in one.messages] == ["user", "assistant"]
    assert (one.id, one.answer, one.category, one.task, one.row) == (
        "0",
        "C",
        ("Diagnosis", "Grading"),
        "BLCA",
        1,
    )
    assert one.slides == one.names == ("TCGA-GV-A40G-01Z-00-DX1",)
    assert (two.row, [*two.choices]) == (2, ["A", "B", "C", "D"])
    (er,) = read_slide_conversations(write(BCNB))
    assert (er.choices, er.answer, er.slides) == ({"A": "Positive", "B": "Negative"}, "B", ("12",))
    assert (er.category, er.task, er.extra) == (("ER",), "ER", {})
    assert not caplog.records


def test_conversations_keep_every_turn_and_have_the_slide_first(write):
    records = [
        human("What is it?\n<image>", "A tumor. "),
        human("<image>\nWhat is it?", "A tumor.", id=3, image="a/b.pt"),
        human(
            "x",
            "",
            id="m",
            image=["a.csv", "b.csv"],
            conversations=turns("Two <image> slides?", "Yes.", "Which? A. x B. y", "B: y "),
            n=1,
        ),
    ]
    one, two, three = read_slide_conversations(write(records))
    assert texts(one) == texts(two) == ["<image>\nWhat is it?", "A tumor."]
    assert (one.slides, one.names, one.choices, one.answer) == (("./BLCA/s.csv",), ("s",), {}, "A tumor.")
    assert (two.id, two.slides, two.names) == ("3", ("a/b.pt",), ("b",))
    assert texts(three) == ["<image>\n<image>\nTwo\nslides?", "Yes.", "Which? A. x B. y", "B: y"]
    assert (three.names, three.choices, three.answer, three.extra) == (
        ("a", "b"),
        {"A": "x", "B": "y"},
        "B",
        {"n": 1},
    )


def test_the_simple_formats(write):
    (caption,) = read_slide_conversations(write("slide_id,caption,features_path\ns1,Two nodes.,f/s1.pt\n"))
    assert texts(caption) == [f"<image>\n{DESCRIBE}", "Two nodes."]
    assert (caption.slides, caption.names, caption.answer) == (("f/s1.pt",), ("s1",), "Two nodes.")
    (other,) = read_slide_conversations(write("slide_id,caption\ns1,Two nodes.\n"), describe="What?")
    assert (texts(other)[0], other.slides) == ("<image>\nWhat?", ("s1",))
    (question,) = read_slide_conversations(
        write([{"slide_id": "s1", "question": "What?", "answer": "A node", "features_path": "f.npy", "k": 1}])
    )
    assert texts(question) == ["<image>\nWhat?", "A node"]
    assert (question.slides, question.extra) == (("f.npy",), {"k": 1})
    sample = {
        "slide_id": "s1",
        "question": "Which?",
        "choices": ["A) x", "B) y"],
        "answer": "B",
        "category": "Grading",
    }
    (bench,) = read_slide_conversations(write({"samples": [sample]}))
    assert texts(bench) == ["<image>\nWhich?\nA. x\nB. y", "B. y"]
    assert (bench.choices, bench.answer, bench.category) == ({"A": "x", "B": "y"}, "B", ("Grading",))
    (plain,) = read_slide_conversations(
        write(
            {
                "samples": [
                    sample | {"choices": ["x", "y"], "answer": "y", "category": ["Diagnosis", "Grading"]}
                ]
            }
        )
    )
    assert (plain.choices, plain.answer, plain.category) == (
        {"A": "x", "B": "y"},
        "B",
        ("Diagnosis", "Grading"),
    )


@pytest.mark.parametrize("given", [["A) x", "B) y"], ["x", "y"], {"A": "x", "B": "y"}])
def test_a_plain_list_with_choices_is_no_open_question(write, given):
    question = {"slide_id": "s1", "question": "Which?", "answer": "y"}
    closed, open_ = read_slide_conversations(write([question | {"choices": given}, question]))
    assert (closed.choices, closed.answer, texts(closed)[0]) == (
        {"A": "x", "B": "y"},
        "B",
        "<image>\nWhich?\nA. x\nB. y",
    )
    assert (open_.choices, open_.answer) == ({}, "y")
    with pytest.raises(ValueError, match=r"row 1: options must be called \"choices\", found 'options'"):
        read_slide_conversations(write([question | {"options": given}]))


def test_wsi_vqa(write):
    records = [
        {
            "Id": "TCGA-PL-A8LZ",
            "Question": "Which?",
            "Choice": ["grade 1", "grade 2", "grade 3"],
            "Answer": "Grade 3.",
        },
        {"Id": "TCGA-PL-A8LZ", "Question": "What?", "Answer": "A lobular carcinoma."},
    ]
    closed, free = read_slide_conversations(write(records))
    assert texts(closed) == ["<image>\nWhich?\nA. grade 1\nB. grade 2\nC. grade 3", "C. grade 3"]
    assert (closed.answer, closed.slides, closed.id) == ("C", ("TCGA-PL-A8LZ",), "")
    assert (texts(free), free.choices) == (["<image>\nWhat?", "A lobular carcinoma."], {})


FAULTS = [
    (human("Which? A. x B. y D. w", "A. x"), "an option letter that is missing: C"),
    (human("Which? A. x B. C. z", "A. x"), "an option without text: B"),
    (human("Which? A. x B. X.", "A"), "options with one text: A, B"),
    (
        human("Which? A. x B. y", "C. z"),
        'an answer that is not among the options, or says none of them clearly: "C. z"',
    ),
    (
        human("Which? A. x B. y", "A. y"),
        'an answer that is not among the options, or says none of them clearly: "A. y"',
    ),
    (human("What?", " "), "an empty answer"),
    (human("<image>", "x"), "an empty question"),
    (human("What?", "x", image=[]), "no slide"),
    (human("What?", "x", image=[""]), "no slide"),
    (human("<image><image>What?", "x"), "tags that are not as many as slides: 2 and 1"),
    (
        human("", "", conversations=turns("Which? A. x B. y", "Z", "Why?", "So")),
        "an answer that is not among the options, or says none of them",
    ),
    (human("What?", "x", id="first"), "an id that is there before: first"),
]


@pytest.mark.parametrize(("record", "what"), FAULTS, ids=[what[:40] for _, what in FAULTS])
def test_a_fault_is_named_and_nothing_is_lost(write, caplog, record, what):
    if "<image>" not in record["conversations"][0]["value"]:
        record = json.loads(json.dumps(record))
        record["conversations"][0]["value"] += "\n<image>"
    fine = human("What?\n<image>", "A. thing", id="first")
    path = write([fine, record])
    (fault,) = audit_slide_conversations(path)[1]
    assert (fault.row, fault.record) == (2, record)
    assert fault.text.startswith(what)
    with caplog.at_level(logging.WARNING):
        assert len(read_slide_conversations(path)) == 2
    assert "1 records are faulty (1 x " in caplog.text
    assert "row 2; they are kept" in caplog.text
    assert [t.row for t in read_slide_conversations(path, faults="drop")] == [1]
    with pytest.raises(ValueError, match=r"1 records are faulty .* row 2; correct"):
        read_slide_conversations(path, faults="raise")


def test_faults_of_tables_and_structure(write):
    wrong = TCGA.replace("w,A", "w,E").replace("High,,C", ",,B")
    assert [(f.row, f.text[:12]) for f in audit_slide_conversations(write(wrong))[1]] == [(2, "an answer th")]
    gap = TCGA.replace("NA,High,,C", ",High,w,C")
    assert [f.text for f in audit_slide_conversations(write(gap))[1]] == [
        "an option letter that is missing: B"
    ]
    assert read_slide_conversations(write(gap))[0].choices == {"A": "None", "C": "High", "D": "w"}
    assert [f.text for f in audit_slide_conversations(write(TCGA.replace("\n1,", "\n0,")))[1]] == [
        "an id that is there before: 0"
    ]
    broken = [human("What?\n<image>", "x"), {"id": "b", "conversations": "no"}]
    assert [(f.row, f.text[:25]) for f in audit_slide_conversations(write(broken))[1]] == [
        (2, 'must have "conversations"')
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([human("What?", "x"), 5], 'row 2: must have "conversations"'),
        ([{"conversations": [{"from": "human"}]}], 'row 1: must have "conversations"'),
        ([human("What?", "x", conversations=turns("What?"))], "row 1: needs a turn of the assistant"),
        (
            [human("What?", "x", conversations=turns("a", "b", "c"))],
            "row 1: roles must be user and assistant in turn",
        ),
        ([human("What?", 5)], "row 1: message 1 must be"),
        ([human("What?", "<image>")], "row 1: only the user's texts may hold <image>"),
        ([human("What?", "x", image=5)], 'row 1: "image" must be a name or a list of names, got 5'),
        (
            [{"slide_id": "s", "question": "q<image>", "answer": "a"}],
            "row 1: question and answer must not hold <image>",
        ),
        (
            [{"slide_id": "s", "question": "q", "answer": "a"}, {"slide_id": "s"}],
            "row 2: must be an object with the texts slide_id",
        ),
        (
            {"samples": [{"slide_id": "s", "question": "q", "answer": "a", "choices": "A"}]},
            'row 1: "choices" must be a list of texts',
        ),
        ([{"Id": "s", "Question": "q", "Answer": "a", "Choice": "A"}], 'row 1: "Choice" must be a list'),
        ({"sample": []}, "none of the formats that are read"),
        ([], "none of the formats that are read"),
        ("a,b\n1,2\n", "none of the formats that are read"),
        ("[1,", "neither JSON nor a CSV"),
        ('{"a": 1}\n{"a": 1}', "JSON must be one list"),
    ],
)
def test_what_cannot_be_read_is_said(write, content, message):
    with pytest.raises(ValueError, match=f"file.*{message}"):
        read_slide_conversations(write(content))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            human("Grade?", "High", rejected_response="Low"),
            'must not have "rejected_response": pairs of a better and a worse answer',
        ),
        (human("Grade?", "High", videos=["a.mp4"]), 'must not have "videos": videos are not read'),
        (human("Grade?", "High", label=False), 'must not have "label": false: in KTO'),
        (
            human("Grade?", "High", system="Answer in German."),
            'must not have "system": every turn must be one of the conversation',
        ),
        (human("Grade?", "High", images=["t.csv"]), 'must not have "images": slides are read from "image"'),
        (
            human("Where is <bbox>?", "Here"),
            "the tag <bbox> of the user stands for something that is not read",
        ),
        (
            {
                "image": "s.csv",
                "conversations": [
                    {"from": "human", "value": "?"},
                    {"from": "gpt", "value": "!", "loss": True},
                ],
            },
            '"loss"',
        ),
        (
            {"slide_id": "s", "question": "Grade?", "answer": "High", "rejected": "Low"},
            'must not have "rejected"',
        ),
        (
            {"Id": "s", "Question": "Grade?", "Answer": "High", "objects": {"bbox": [[1, 2, 3, 4]]}},
            'must not have "objects"',
        ),
    ],
)
def test_keys_and_tags_that_are_not_honoured(write, record, message):
    good = {"id": "g", "label": "pT2", "videos": [], "rejected": None, "remark": "x"}
    plain = "conversations" not in record
    first = (
        {k: "s" for k in record if k not in ("rejected", "objects")}
        if plain
        else human("<image>Grade?", "High")
    )
    path = write([good | first, record])
    with pytest.raises(ValueError, match=f"file, row 2: .*{message}"):
        read_slide_conversations(path)
    assert [fault.row for fault in audit_slide_conversations(path)[1] if message in fault.text] == [2]


def test_a_column_that_is_not_honoured(write):
    with pytest.raises(ValueError, match='row 1: must not have "rejected_response"'):
        read_slide_conversations(write("slide_id,caption,rejected_response\ns,good,bad\n"))


def test_options_of_reading_are_checked(write):
    with pytest.raises(ValueError, match="kind must be auto or one of captions"):
        read_slide_conversations(write(TCGA), "csv")
    with pytest.raises(ValueError, match="kind 'captions' must have slide_id, caption"):
        read_slide_conversations(write(TCGA), "captions")
    with pytest.raises(ValueError, match="faults must be"):
        read_slide_conversations(write(TCGA), faults="keep")
    with pytest.raises(ValueError, match="no such file"):
        audit_slide_conversations("nowhere.json")
    assert len(read_slide_conversations(write(TCGA), "slidebench")) == 2


def test_digests(write):
    assert (
        files.file_digest(write("abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert published_as("668d063d" + "0" * 52 + "020b").startswith("SlideBench-VQA-TCGA")
    assert published_as("668d063d" + "0" * 52 + "020c") == ""
    assert published_as("8dcd8a9b" + "0" * 52 + "f8e5").startswith("SlideInstruct stage 2")


def test_the_real_training_example(shared_data):
    path = shared_data / "pathology" / "slidechat_train_data_example.json"
    assert audit_slide_conversations(path)[1] == []
    talks = read_slide_conversations(path)
    assert [t.names for t in talks] == [
        ("TCGA-A7-A0CJ-01Z-00-DX2",),
        ("TCGA-AR-A255-01Z-00-DX1",),
        ("TCGA-A7-A6VV-01Z-00-DX2",),
    ]
    assert all(texts(t)[0].startswith("<image>\n") and texts(t)[0].count("<image>") == 1 for t in talks)
    assert all(texts(t)[1] == texts(t)[1].strip() == t.answer and not t.choices for t in talks)


def test_real_wsi_bench(shared_data):
    folder = shared_data / "pathology" / "wsi_bench"
    found = {p.stem: read_slide_conversations(p, faults="warn") for p in sorted(folder.glob("*.json"))}
    assert {k: len(v) for k, v in found.items()} == {
        "1_Report_test": 208,
        "Diagnosis_choice_test": 413,
        "Histological_Typing_test": 208,
        "Molecular_Subtyping_choice_test": 48,
        "Staging_choice_test": 145,
    }
    for name, talks in found.items():
        assert all(bool(t.choices) == ("choice" in name) for t in talks), name
    golds = Counter(t.answer for t in found["Diagnosis_choice_test"])
    assert golds == {"C": 193, "B": 146, "D": 43, "A": 31}
    assert all(t.names[0].startswith("TCGA-") and "." in t.names[0] for t in found["1_Report_test"])
    assert sum(len(audit_slide_conversations(p)[1]) for p in folder.glob("*.json")) == 0
