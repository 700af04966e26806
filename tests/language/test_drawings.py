"""Files of pictures that are asked for: both forms are read alike, and every fault is said with its line."""

import json

import pytest

from medvl.language.drawings import read_drawings
from tests.tiny import drawn

FOUR = "<start_index><idx_5><idx_0><idx_7><idx_7><end_index>"


def write_codes(codes):
    return f"<start_index>{''.join(f'<idx_{code}>' for code in codes)}<end_index>"


@pytest.fixture
def read(tmp_path):
    """Write records and read them as drawings of 4 codes out of 8."""
    for name in ("in.png", "out.png"):
        drawn((8, 8)).save(tmp_path / name)

    def call(*records, **options):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "d.jsonl").write_text(text)
        return read_drawings(tmp_path / "d.jsonl", **{"number": 4, "codebook": 8} | options)

    return call


def test_both_forms(read, tmp_path):
    asked = {"image": "in.png", "text": "Reconstruct the image.", "id": "a", "task": "x"}
    turns = [
        {"from": "human", "value": "<image>\nReconstruct the image."},
        {"from": "gpt", "value": FOUR},
    ]
    found = read(
        asked | {"target": "out.png"},
        asked | {"target": FOUR},
        {"id": "a", "task": "x", "image": "in.png", "conversations": turns},
        {"text": "A CT of a head.", "target": "out.png"},
    )
    assert [d.target for d in found] == [tmp_path / "out.png", None, None, tmp_path / "out.png"]
    assert [d.codes for d in found] == [(), (5, 0, 7, 7), (5, 0, 7, 7), ()]
    for d in found[:3]:
        assert d.question.messages == ({"role": "user", "content": "<image>\nReconstruct the image."},)
        assert (d.question.images, d.question.id) == ((tmp_path / "in.png",), "a")
        assert d.question.extra == {"task": "x"}
    assert found[3].question.messages == ({"role": "user", "content": "A CT of a head."},)
    assert found[3].question.images == ()
    assert [d.question.line for d in found] == [1, 2, 3, 4]


def test_codes_come_in_their_order(read):
    (d,) = read({"text": "Draw.", "target": write_codes(range(1024))}, number=1024, codebook=8192)
    assert d.codes == (*range(1024),)


def test_a_folder_of_their_own(read, tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"relative names start from .*sub"):
        read({"text": "Draw.", "target": "out.png"}, root=tmp_path / "sub")
    drawn((8, 8)).save(tmp_path / "sub" / "out.png")
    (d,) = read({"text": "Draw.", "target": "out.png"}, root=tmp_path / "sub")
    assert d.target == tmp_path / "sub" / "out.png"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "Draw.", "target": "no.png"}, r"line 1: the target must be codes or a file that is there"),
        ({"text": "Draw.", "target": FOUR, "image": "no.png"}, r"line 1: image 'no.png' does not exist"),
        (
            {"text": "Draw.", "target": write_codes([1] * 3)},
            r"must have 4 codes of 0 to 7, got 3 codes up to 1",
        ),
        ({"text": "Draw.", "target": write_codes([1, 2, 3, 8])}, r"got 4 codes up to 8; were they made by"),
        ({"text": "Draw.", "target": write_codes([])}, r"got 0 codes up to none"),
        (
            {"text": "Draw.", "target": "<start_index><idx_1>"},
            r"codes must be <start_index>, 4 times <idx_K>",
        ),
        ({"text": "Draw.", "target": FOUR.replace("7", "-1")}, r"codes must be <start_index>"),
        ({"text": "Draw.", "target": FOUR.replace("><", "> <")}, r"codes must be <start_index>"),
        ({"text": "", "target": FOUR}, r'"text" and "target" must be texts, got "" and "<start_index>'),
        ({"text": "Draw.", "target": None}, r'"text" and "target" must be texts, got "Draw." and null'),
        ({"text": "<image> <image>", "target": FOUR, "image": "in.png"}, r"got 2 tags and 1 images"),
        ({"text": "<image> Draw.", "target": FOUR}, r"got 1 tags and 0 images"),
        (["no"], r"must be a JSON object, one per line"),
    ],
)
def test_errors(read, record, text):
    with pytest.raises(ValueError, match=text):
        read(record)


def test_one_code_too_few_of_a_whole_picture(read):
    with pytest.raises(
        ValueError, match="line 2: a picture must have 1024 codes of 0 to 8191, got 1023 codes"
    ):
        read(
            {"text": "Draw.", "target": write_codes([8191] * 1024)},
            {"text": "Draw.", "target": write_codes([0] * 1023)},
            number=1024,
            codebook=8192,
        )


def test_no_file_and_more_turns(read, tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: no such file"):
        read_drawings(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"d.jsonl: holds no drawing"):
        read()
    with pytest.raises(ValueError, match="line 1: must have one question and the picture as its answer"):
        read({"history": [["a", "b"]], "query": "Draw.", "response": FOUR})
