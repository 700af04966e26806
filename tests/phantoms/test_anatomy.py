"""Drawn heads: two looks of one anatomy, tables that say what was drawn, and a second run that changes nothing."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from attrs import evolve
from PIL import Image

from medvl.evaluation.pictures import ssim
from medvl.language.conversations import read_conversations
from medvl.language.drawings import read_drawings
from medvl.phantoms import anatomy

CFG = anatomy.AnatomyConfig(train=16, valid=1, test=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("anatomy")
    assert anatomy.draw_anatomy(CFG, path) == {"train": 16, "valid": 1, "test": 8}
    return path


def digests(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def said_of(case):
    return {
        "On which side is the lesion?": f"On the {case['side']}.",
        "What is the lesion?": f"A {case['kind']}.",
        "How large is the lesion?": f"It is {case['size']}.",
    }


def test_questions_say_what_was_drawn(folder):
    for split, count in (("train", 16), ("valid", 1), ("test", 8)):
        conversations = read_conversations(folder / f"{split}.jsonl")
        assert len(conversations) == count * 2 * (1 if split == "train" else 3)
        for c in conversations:
            number = c.extra["episode_id"].split("-")[1]
            said = said_of(anatomy.draw_case(CFG, split, int(number)))
            asked = {
                m["content"].removeprefix("<image>\n"): answer["content"]
                for m, answer in zip(c.messages[::2], c.messages[1::2], strict=True)
            }
            assert asked.items() <= said.items()
            assert len(asked) == (3 if split == "train" else 1)
            assert [m["content"].count("<image>") for m in c.messages[::2]] == [1, 0, 0][: len(asked)]
            assert [picture.name for picture in c.images] == [f"{number}-{c.extra['task']}.png"]
    answers = Counter(c.messages[-1]["content"] for c in read_conversations(folder / "test.jsonl"))
    assert len(answers) == 6
    assert set(answers.values()) == {8}  # of a question alone one can only guess


def test_questions_of_training_come_in_any_order(folder):
    first = Counter(c.messages[0]["content"] for c in read_conversations(folder / "train.jsonl"))
    assert len(first) == 3
    assert min(first.values()) > 4  # of 32


def test_pictures_to_draw(folder):
    drawings = read_drawings(folder / "train_draw.jsonl")
    changes = read_drawings(folder / "train_change.jsonl")
    assert len(drawings) == len(changes) == 16 * 2 * 2
    assert {d.question.extra["task"] for d in drawings} == {"reconstruction", "report"}
    assert {d.question.extra["task"] for d in changes} == {"transfer", "super_resolution"}
    for d in drawings + changes:
        extra, (message,) = d.question.extra, d.question.messages
        number, look, task = extra["episode_id"].split("-")[1], extra["look"], extra["task"]
        assert d.target == folder / "train" / f"{number}-{look}.png"
        inputs = {
            "transfer": [f"{number}-{'mr' if look == 'ct' else 'ct'}.png"],
            "super_resolution": [f"{number}-{look}-low.png"],
            "reconstruction": [f"{number}-{look}.png"],
            "report": [],
        }
        assert [p.name for p in d.question.images] == inputs[task]
        case = anatomy.draw_case(CFG, "train", int(number))
        assert {key: extra[key] for key in case} == case
        if task == "report":
            words = {anatomy.LOOKS[look], *case.values()}
            assert words <= set(message["content"].rstrip(".").split())
        else:
            assert message["content"].endswith("\n<image>")


def test_pictures_are_pure_in_seed_split_and_number(folder):
    for look, picture in anatomy.draw_pair(CFG, "train", 3).items():
        stored = np.asarray(Image.open(folder / "train" / f"3-{look}.png"))
        assert np.array_equal(stored, picture)
        low = np.asarray(Image.open(folder / "train" / f"3-{look}-low.png"))
        means = picture.reshape(16, 4, 16, 4, 3).astype(float).mean((1, 3))
        assert low.shape == (16, 16, 3)
        assert np.abs(low - means).max() <= 0.5
    assert anatomy.draw_case(CFG, "train", 3) == anatomy.draw_case(evolve(CFG, train=99), "train", 3)
    drawn = [
        anatomy.draw_pair(cfg, split, number)["ct"].tobytes()
        for cfg in (CFG, evolve(CFG, seed=1))
        for split in ("train", "test")
        for number in (0, 8)
    ]
    assert len(set(drawn)) == 8


def test_all_combinations_are_drawn_as_often():
    for split, start in (("train", 0), ("train", 8), ("test", 0)):
        cases = [tuple(anatomy.draw_case(CFG, split, start + i).values()) for i in range(8)]
        assert len(set(cases)) == 8


def without_mark(monkeypatch, number):
    """The same head with a mark of no size."""
    with monkeypatch.context() as patch:
        patch.setattr(anatomy, "SIZES", {"small": (-1, -1), "large": (-1, -1)})
        return anatomy.draw_pair(CFG, "train", number)


def test_the_mark_is_where_the_case_says_with_one_outline_in_both_looks(monkeypatch):
    _, x = np.mgrid[:64, :64]
    for number in range(16):
        case, outlines, bare = anatomy.draw_case(CFG, "train", number), [], without_mark(monkeypatch, number)
        for look, picture in anatomy.draw_pair(CFG, "train", number).items():
            change = picture[..., 0].astype(float) - bare[look][..., 0]
            mark = np.abs(change) > 40
            assert (change[mark].mean() > 0) == anatomy.MARKS[case["kind"]].bright
            assert (x[mark].max() < 32) == (case["side"] == "right")  # the patient's right
            assert (x[mark].min() > 31) == (case["side"] == "left")
            radius = np.sqrt(mark.sum() / np.pi)
            assert 2.6 < radius < 4.2 if case["size"] == "small" else 4.8 < radius < 7
            outlines.append(mark)
        assert (outlines[0] ^ outlines[1]).sum() < 0.2 * outlines[0].sum()


def test_looks_have_their_own_light_and_noise_and_a_copy_is_no_answer():
    for number in range(4):
        ct, mr = anatomy.draw_pair(CFG, "test", number).values()
        assert ssim(ct, mr) < 0.2
        corner = [picture[:6, :6, 0].astype(float) for picture in (ct, mr)]  # air: nothing but noise
        assert not np.array_equal(*corner)
        assert max(c.max() for c in corner) < 20


def test_a_second_run_leaves_what_is_there(folder):
    before = digests(folder)
    assert len(before) == 25 * 4 + 9
    anatomy.draw_anatomy(evolve(CFG, seed=5), folder)
    assert digests(folder) == before


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path):
    anatomy.draw_anatomy(CFG, tmp_path)
    lines = (tmp_path / "test.jsonl").read_text()
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "valid_draw.jsonl").unlink()
    for path in (tmp_path / "test").glob("1-*"):
        path.unlink()
    before = digests(tmp_path)
    anatomy.draw_anatomy(CFG, tmp_path)
    assert (tmp_path / "test.jsonl").read_text() == lines
    after = digests(tmp_path)
    assert len(after) == 109
    assert before.items() < after.items()
    assert all(json.loads(line)["images"] for line in lines.splitlines())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"size": 66}, "size must be a multiple of 4, got 66"), ({"train": 0}, "train"), ({"size": 16}, "size")],
)
def test_errors(wrong, text):
    with pytest.raises(ValueError, match=f"AnatomyConfig.*{text}"):
        anatomy.AnatomyConfig(**wrong)
