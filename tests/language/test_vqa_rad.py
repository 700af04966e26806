"""VQA-RAD: the real file's counts, no case on two sides, and what is wrong is said."""

import json
import logging
import os
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from medvl.language.conversations import read_conversations, read_tasks
from medvl.language.vqa_rad import SPLITS, convert_vqa_rad, modality_of
from tests.tiny import drawn

ROW = {
    "qid": 0,
    "phrase_type": "freeform",
    "qid_linked_id": "a-b",
    "image_case_url": "https://example.org/case?id=0",
    "image_name": "s0.jpg",
    "image_organ": "CHEST",
    "question": "Is it big?",
    "question_type": "SIZE",
    "answer": "Yes",
    "answer_type": "CLOSED",
    "question_rephrase": None,
}


def questions(cases=12, each=3, **kwargs):
    """`each` questions of every case, one image a case, organs in turn."""
    organs = ("CHEST", "ABD", "HEAD")
    return [
        ROW
        | {
            "qid": i * each + j,
            "image_name": f"s{i}.jpg",
            "image_case_url": f"u{i}",
            "image_organ": organs[i % 3],
            "question": f"Why {j}?",
        }
        | {k: v(i, j) for k, v in kwargs.items()}
        for i in range(cases)
        for j in range(each)
    ]


@pytest.fixture
def convert(tmp_path):
    """Write rows and their images and convert them."""

    def call(rows, out="out", **options):
        (tmp_path / "images").mkdir(exist_ok=True)
        for i, name in enumerate(sorted({r["image_name"] for r in rows})):
            drawn((30 + i, 20), seed=i).save(tmp_path / "images" / name)
        (tmp_path / "vqa.json").write_text(json.dumps(rows))
        return convert_vqa_rad(tmp_path / "vqa.json", tmp_path / "images", tmp_path / out, **options)

    return call


def read(folder):
    return {
        name: read_conversations(folder / f"{name}.jsonl")
        for name in SPLITS
        if (folder / f"{name}.jsonl").exists()
    }


def of_images(found):
    return {name: {c.extra["episode_id"] for c in held} for name, held in found.items()}


def test_the_real_file(shared_data, tmp_path):
    source = shared_data / "medvqa" / "vqa_rad"
    counts = convert_vqa_rad(source / "vqa_rad_share.json", source / "images", tmp_path)
    assert counts == {
        "train": 992, "valid": 142, "test": 286, "images": 200, "cases": 200,
        "unknown": 0, "empty": 0, "repeated": 2, "contradicting": 0, "shared": 0,
    }  # fmt: skip
    found = read(tmp_path)
    tasks = {name: Counter(c.extra["task"] for c in held) for name, held in found.items()}
    assert tasks == {
        "train": {"abdomen": 319, "chest": 370, "head": 303},
        "valid": {"abdomen": 46, "chest": 51, "head": 45},
        "test": {"abdomen": 92, "chest": 110, "head": 84},
    }
    cases = {
        name: Counter(t for t, _ in {(c.extra["task"], c.extra["episode_id"]) for c in held})
        for name, held in found.items()
    }
    assert cases == {
        "train": {"abdomen": 46, "chest": 51, "head": 44},
        "valid": {"abdomen": 6, "chest": 7, "head": 6},
        "test": {"abdomen": 13, "chest": 14, "head": 13},
    }
    every = [c for held in found.values() for c in held]
    assert Counter(c.extra["family"] for c in every) == {"closed": 851, "open": 569}
    assert Counter(c.extra["category"] for c in every) == {
        "pres": 525, "pos": 208, "abn": 131, "size": 126, "other": 115, "modality": 105,
        "plane": 70, "attrib": 51, "organ": 38, "color": 37, "count": 14,
    }  # fmt: skip
    assert len({c.id for c in every}) == 1420
    of = {c.id: c for c in every}
    assert [m["content"] for m in of["0"].messages] == ["<image>\nAre regions of the brain infarcted?", "Yes"]
    assert of["0"].images[0].resolve() == (source / "images" / "synpic54610.jpg").resolve()
    assert sum(c.messages[1]["content"] in ("2", "4", "12") for c in every) >= 5  # numbers in the file
    assert not any("\t" in m["content"] for c in every for m in c.messages)


def test_the_real_files_modalities_and_published_split(shared_data, tmp_path):
    source = shared_data / "medvqa" / "vqa_rad"
    counts = convert_vqa_rad(
        source / "vqa_rad_share.json", source / "images", tmp_path / "m", group="modality"
    )
    assert [counts[k] for k in ("train", "valid", "test", "images", "unknown", "shared")] == [
        253,
        37,
        76,
        47,
        153,
        0,
    ]
    every = [c for held in read(tmp_path / "m").values() for c in held]
    assert Counter(t for t, _ in {(c.extra["task"], c.extra["episode_id"]) for c in every}) == {
        "ct": 13,
        "mri": 17,
        "xray": 17,
    }
    counts = convert_vqa_rad(
        source / "vqa_rad_share.json", source / "images", tmp_path / "p", split="published"
    )
    assert [counts[k] for k in ("train", "valid", "test", "shared")] == [1011, 122, 287, 125]
    found = of_images(read(tmp_path / "p"))
    assert not found["train"] & found["valid"]
    assert len(found["test"]) == 126
    assert len(found["test"] & (found["train"] | found["valid"])) == 125


@pytest.mark.parametrize("seed", range(4))
def test_every_case_is_on_one_side(convert, tmp_path, seed):
    """Images 0 and 12 share a case, 3 and 12 too by another address of 12: the three are one."""
    rows = questions(60)
    rows += [
        ROW | {"qid": f"x{i}", "image_name": "s12.jpg", "image_case_url": u}
        for i, u in enumerate(("u0", "u3"))
    ]
    counts = convert(rows, seed=seed)
    found = read(tmp_path / "out")
    images = of_images(found)
    assert sum(counts[name] for name in SPLITS) == len(rows) == sum(map(len, found.values()))
    assert (counts["images"], counts["cases"]) == (60, 58)
    assert sum(map(len, images.values())) == 60
    assert len({name for name in SPLITS for i in ("s0", "s3", "s12") if i in images[name]}) == 1
    whole = defaultdict(Counter)
    for name, held in found.items():
        for task, image in {(c.extra["task"], c.extra["episode_id"]) for c in held}:
            whole[name][task] += image not in ("s3", "s12")
    assert whole["test"] == {"chest": 4, "abdomen": 4, "head": 4}  # 0.2 of 18, 20 and 20
    assert whole["valid"] == {"chest": 2, "abdomen": 2, "head": 2}


def test_the_seed_decides_and_the_order_of_the_file_does_not(convert, tmp_path):
    rows = questions(30)
    convert(rows, "a", seed=1)
    convert(rows, "b", seed=1)
    convert(rows[::-1], "c", seed=1)
    convert(rows, "d", seed=2)
    texts = {out: [(tmp_path / out / f"{name}.jsonl").read_text() for name in SPLITS] for out in "abd"}
    assert texts["a"] == texts["b"] != texts["d"]
    assert (
        of_images(read(tmp_path / "a")) == of_images(read(tmp_path / "c")) != of_images(read(tmp_path / "d"))
    )


def test_a_line(convert, tmp_path):
    dirty = {
        "qid": "7",
        "question": " What\tis \u00b5? ",
        "answer": 2,
        "answer_type": "open ",
        "question_type": "PRSE, pos",
    }
    rows = questions(9)
    rows[0] = rows[0] | dirty
    convert(rows)
    line = next(c for held in read(tmp_path / "out").values() for c in held if c.id == "7")
    assert line.messages == (
        {"role": "user", "content": "<image>\nWhat is \u00b5?"},
        {"role": "assistant", "content": "2"},
    )
    assert line.extra == {"task": "chest", "category": "pres", "family": "open", "episode_id": "s0"}
    texts = "".join((tmp_path / "out" / f"{name}.jsonl").read_text() for name in SPLITS)
    assert '"images": ["../images/s0.jpg"]' in texts
    one = (tmp_path / "out" / "test.jsonl").read_text().splitlines()[0]
    assert list(json.loads(one)) == ["id", "images", "messages", "task", "category", "family", "episode_id"]
    assert {c.extra["task"] for c in read_tasks(tmp_path / "out" / "{split}.jsonl", "train")} == {
        "chest",
        "abdomen",
        "head",
    }


def test_repeats_are_kept_counted_and_said(convert, tmp_path, caplog):
    rows = questions(
        12, question=lambda i, j: ("Is it big?", "is it  big", "Is it small?")[j] if i < 3 else f"Why {j}?"
    )
    rows[1] |= {"answer": "No"}  # of s0; that of s1 only in another case
    rows[4] |= {"answer": "yes."}
    with caplog.at_level(logging.WARNING):
        counts = convert(rows)
    assert (counts["repeated"], counts["contradicting"]) == (3, 1)
    assert sum(counts[name] for name in SPLITS) == 36
    assert len(caplog.messages) == 1
    assert (
        "vqa.json: 1 questions are asked again about the same image and answered differently; all are kept"
        in caplog.messages[0]
    )


def test_questions_without_a_text_or_an_answer_are_left_out(convert, caplog):
    rows = questions(12)
    rows[0] |= {"answer": "NULL"}
    rows[1] |= {"question": " "}
    rows[3] |= {"question": None}
    rows[4] |= {"answer": float("nan")}
    rows[2] |= {"image_case_url": "NULL"}
    rows[5] |= {"image_case_url": "NULL"}  # no address in common
    with caplog.at_level(logging.WARNING):
        counts = convert(rows)
    assert (counts["empty"], counts["cases"], sum(counts[name] for name in SPLITS)) == (4, 12, 32)
    assert ["4 questions have no text or no answer" in m for m in caplog.messages] == [True]


def test_the_published_flag(convert, tmp_path, caplog):
    rows = questions(
        12,
        phrase_type=lambda i, j: (
            ("test_para" if j else "test_freeform") if (i, j) in ((0, 0), (0, 1), (1, 2)) else "para"
        ),
    )
    rows[2] |= {"phrase_type": "test_freeform"}  # all of s0 is tested
    with caplog.at_level(logging.WARNING):
        counts = convert(rows, split="published", valid=0)
    assert counts["test"] == 4
    assert counts["shared"] == 1
    found = read(tmp_path / "out")
    assert sorted(int(c.id) for c in found["test"]) == [0, 1, 2, 5]
    assert not (tmp_path / "out" / "valid.jsonl").exists()
    assert len(found["train"]) == 32
    assert "1 images are in test and also in train or valid" in caplog.messages[0]


SAID = {
    ("What modality is shown?", "FLAIR MRI"): "mri",
    ("What type of MRI is this?", "T2 weighted"): "mri",
    ("What modality was used?", "plain film"): "xray",
    ("What is the modality?", "CXR"): "xray",
    ("How was this image taken?", "X-ray"): "xray",
    ("What modality is used to take this image?", "Xray - plain film"): "xray",
    ("Is this an MRI or a CT scan?", "MRI"): "mri",
    ("Is this a CT scan?", "yes"): "ct",
    ("Is this a chest x-ray?", "Yes."): "xray",
    ("Was this image taken via MRI?", "yes"): "mri",
    ("Does this CT use IV contrast material?", "No"): "ct",
    ("Is the image an ultrasound", "yes"): "ultrasound",
    ("Does this CT have contrast or not?", "yes"): "ct",
    ("What type of imaging does this not represent?", "ultrasound"): "",
    ("Isn't this a CT?", "yes"): "",
    ("What is this?", "not a CT"): "",
    ("Is this a CT scan?", "no"): "",
    ("Is this a T1 weighted MRI?", "no"): "",
    ("Can CT be used to assess soft tissues?", "yes"): "",
    ("Is this a PET/CT?", "yes"): "",
    ("What was it?", "CT or MRI"): "",
    ("Was contrast used?", "yes"): "",
    ("How was this image taken?", "with contrast"): "",
    ("What was contrasted?", "the biliary tract, arctic"): "",
}


@pytest.mark.parametrize(("question", "answer"), SAID)
def test_what_says_a_modality(question, answer):
    assert modality_of(question, answer) == SAID[question, answer]


def test_tasks_by_modality(convert, tmp_path, caplog):
    """Of images in threes: CT, MRI, not said. One of the CT is said to be MRI too; a question of another type says nothing."""
    asked = lambda i, j: "What modality is it?" if not j else f"Why {j}?"
    answers = lambda i, j: "yes" if j else ("CT", "MRI", "with contrast")[i % 3]
    types = lambda i, j: "SIZE" if j else "PLANE, MODALITY"
    rows = questions(18, question=asked, answer=answers, question_type=types)
    rows[1] |= {"question_type": "MODALITY", "question": "Is this an MRI?"}
    rows[7] |= {"question": "What modality?", "answer": "CT"}
    with caplog.at_level(logging.WARNING):
        counts = convert(rows, group="modality")
    assert (counts["images"], counts["unknown"], sum(counts[name] for name in SPLITS)) == (11, 7, 33)
    assert "7 images are left out: no question says their modality, or several differ" in caplog.messages[0]
    every = [c for held in read(tmp_path / "out").values() for c in held]
    assert {(c.extra["episode_id"], c.extra["task"]) for c in every} == {
        (f"s{i}", ("ct", "mri")[i % 3]) for i in range(1, 18) if i % 3 < 2
    }
    with pytest.raises(
        ValueError, match=r'vqa.json: no question says the modality of its image; take group="organ"'
    ):
        convert(questions(6), group="modality")


def test_pictures_of_one_size(convert, tmp_path):
    convert(questions(12), size=25)
    for held in read(tmp_path / "out").values():
        for c in held:
            assert c.images[0] == tmp_path / "out" / "images" / f"{c.extra['episode_id']}.png"
            with (
                Image.open(c.images[0]) as got,
                Image.open(tmp_path / "images" / f"{c.extra['episode_id']}.jpg") as was,
            ):
                assert got.format == "PNG"
                want = (25, round(20 * 25 / was.width))
                assert got.size == want
                assert np.array_equal(
                    np.array(got), np.array(was.convert("RGB").resize(want, Image.Resampling.BICUBIC))
                )
    convert(questions(12), "large", size=1000)
    assert Image.open(tmp_path / "large" / "images" / "s0.png").size == (30, 20)  # never enlarged
    texts = "".join((tmp_path / "large" / f"{name}.jsonl").read_text() for name in SPLITS)
    assert '"images": ["images/s0.png"]' in texts


def test_a_broken_picture_leaves_no_table(convert, tmp_path):
    convert(questions(12), "good")
    (tmp_path / "images" / "s5.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"open_image: .*s5.jpg"):
        convert_vqa_rad(tmp_path / "vqa.json", tmp_path / "images", tmp_path / "out", size=9)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_images_that_are_not_there_are_one_error(convert, tmp_path):
    convert(questions(12))
    for i in (1, 2, 4, 9):
        os.remove(tmp_path / "images" / f"s{i}.jpg")
    said = r"images: 4 of 12 images are not there: s1.jpg, s2.jpg, s4.jpg \.\.\.$"
    with pytest.raises(ValueError, match=said):
        convert_vqa_rad(tmp_path / "vqa.json", tmp_path / "images", tmp_path / "new")
    assert not (tmp_path / "new").exists()


WRONG = {
    "no dict": ([3], r"question 0: must be an object with qid, .*answer_type, got 3"),
    "a key": ([{k: v for k, v in ROW.items() if k != "answer"}], "question 0: must be an object with qid"),
    "organ": (
        [ROW | {"image_organ": "FOOT"}],
        "question 0: image_organ must be HEAD, CHEST, ABD, .*got 'FOOT'",
    ),
    "family": ([ROW, ROW | {"answer_type": "NULL"}], "question 1: .* answer_type OPEN or CLOSED.*'null'"),
    "phrase": (
        [ROW | {"phrase_type": "test"}],
        "question 0: .* phrase_type freeform or para or one of them after test_, .*'test'",
    ),
    "path": (
        [ROW | {"image_name": "../s.jpg"}],
        r"question 0: image_name must be the name of a file, got '../s.jpg'",
    ),
    "no image": ([ROW | {"image_name": ""}], "question 0: image_name must be"),
    "tag": (
        [ROW | {"question": "What is <image>?"}],
        "question 0: every tag '<image>' needs its image, got 1 tags and 0 images",
    ),
    "none": ([], r"must be a JSON list of questions, got \[\]"),
    "a dict": ({"a": 1}, r"must be a JSON list of questions, got \{"),
    "all empty": ([ROW | {"answer": ""}] * 2, "none of its 2 questions has a text and an answer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(tmp_path, name):
    rows, said = WRONG[name]
    (tmp_path / "vqa.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=said) as e:
        convert_vqa_rad(tmp_path / "vqa.json", tmp_path, tmp_path / "out")
    assert str(e.value).startswith(str(tmp_path / "vqa.json"))
    assert not (tmp_path / "out").exists()


def test_wrong_calls(convert, tmp_path):
    with pytest.raises(ValueError, match=r"vqa.json: no such file"):
        convert_vqa_rad(tmp_path / "vqa.json", tmp_path, tmp_path / "out")
    (tmp_path / "vqa.json").write_text("[")
    with pytest.raises(ValueError, match=r"vqa.json: cannot be read as JSON"):
        convert_vqa_rad(tmp_path / "vqa.json", tmp_path, tmp_path / "out")
    rows = questions(6)
    for options in ({"group": "case"}, {"split": "flag"}):
        with pytest.raises(
            ValueError,
            match=r'convert_vqa_rad: group is "organ" or "modality", split "case" or "published", got',
        ):
            convert(rows, **options)
    for options in ({"valid": -0.1}, {"valid": 0.5, "test": 0.5}, {"size": -1}):
        with pytest.raises(
            ValueError,
            match=r"convert_vqa_rad: valid and test must be shares >= 0 that leave some for train, size >= 0",
        ):
            convert(rows, **options)
    with pytest.raises(
        ValueError,
        match=r"convert_vqa_rad: abdomen has 2 cases, too few for train, valid, test; take smaller shares or none",
    ):
        convert(rows)
    counts = convert(rows, valid=0, test=0)
    assert [counts[name] for name in SPLITS] == [18, 0, 0]


def test_no_table_of_an_earlier_run_stays_beside_new_ones(convert, tmp_path):
    convert(questions(12))
    with pytest.raises(
        ValueError,
        match=r"out: valid.jsonl is of an earlier run and this one has no valid; remove it or use another folder",
    ):
        convert(questions(12), valid=0)


def test_two_images_of_one_name_are_refused(convert):
    rows = questions(12)
    rows[0] |= {"image_name": "s5.png"}
    with pytest.raises(ValueError, match=r"images: 2 images are called 's5'; rename all but one"):
        convert(rows)
