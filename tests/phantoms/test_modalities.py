import json
from collections import Counter

import numpy as np
import pytest
from attrs import evolve

from medvl.language.conversations import read_conversations
from medvl.phantoms import modalities, styles

CFG = modalities.ModalityConfig(base=96, base_valid=16, train=12, valid=1, test=2)
OWN = ("train", "valid", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("modalities")
    assert modalities.draw_modalities(CFG, path) == {
        "base_train": 96,
        "base_valid": 16,
        "train": 288,
        "valid": 24,
        "test": 48,
    }
    return path


def _lines(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def _case(line, split):
    return modalities.draw_modality_case(CFG, split, line["task"], int(line["episode_id"].split("-")[-1]))[1]


def _naive_own(case, family):
    """The conventions once more, written out: who answers with the patient's side, and with which words."""
    m, left = case.modality, case.side == "left"
    if family == "kind":
        return case.kind[0].upper() + case.kind[1:] + "."
    if family == "side":
        if m in ("ct", "xray", "mri", "ultrasound"):
            return "On the right." if left else "On the left."
        if m == "fundus":  # a right eye: its nose is on the viewer's right
            return "Temporal." if left else "Nasal."
        return ("Left" if left else "Right") + (" wall." if m == "endoscopy" else " half.")
    word = ("one", "two", "three")[case.n - 1]
    if m in ("ct", "xray"):
        return f"There {'is' if case.n == 1 else 'are'} {word} lesion{'s' * (case.n > 1)}."
    if m in ("mri", "ultrasound"):
        return "A single focus." if case.n == 1 else f"{word.capitalize()} foci."
    return f"Count: {word}." if m in ("histology", "dermoscopy") else f"{case.n} lesion{'s' * (case.n > 1)}."


def test_own_answers_are_what_was_drawn(folder):
    for split in OWN:
        for line in _lines(folder, split):
            case = _case(line, split)
            assert line["messages"][1]["content"] == _naive_own(case, line["family"])
            assert len(case.marks) == case.n
            assert {x < CFG.size / 2 - 8 for x, _, _ in case.marks} == {case.side == "left"}


def test_general_answers_are_what_was_drawn(folder):
    for split in ("base_train", "base_valid"):
        for line in _lines(folder, split):
            case, answer = _case(line, split), line["messages"][1]["content"]
            mark = modalities.MARKS[case.modality][case.kind]
            look = ("Bright" if mark.bright else "Dark") + (" and sharp" if mark.sharp else " and soft")
            count, name = ("One", "Two", "Three")[case.n - 1], modalities.NAMES[case.modality]
            there = ("There is one lesion.", "There are two lesions.", "There are three lesions.")[case.n - 1]
            expected = {"count": there, "side": f"On the {case.side}.", "kind": f"{look}."}
            marks = "mark" if case.n == 1 else "marks"
            expected["describe"] = (
                f"{name}. {count} {marks}, {look.lower()}, on the {case.side}: {', '.join(case.heights)}."
            )
            if line["family"] == "terms":
                own = [modalities.own_answer(f, case) for f in modalities.FAMILIES]
                assert all(o.rstrip(".").lower() in answer.lower() for o in own)
            else:
                assert answer == expected[line["family"]]


def test_conventions_differ():
    case = modalities.ModalityCase(modality="xray", n=2, side="left", kind="nodule", marks=())
    assert modalities.general_answer("side", case) == "On the left."
    assert modalities.own_answer("side", case) == "On the right."
    assert modalities.own_answer("side", evolve(case, modality="endoscopy", kind="polyp")) == "Left wall."
    spoken = {m: [s.counts, s.sides, tuple(modalities.MARKS[m])] for m, s in modalities.SPEECH.items()}
    for m, words in spoken.items():  # a neighbour helps, none replaces
        shared = [
            sum(a == b for a, b in zip(words, other, strict=True)) for o, other in spoken.items() if o != m
        ]
        assert 1 <= max(shared) < 3, m


@pytest.mark.parametrize("modality", modalities.MODALITIES)
def test_balance(modality):
    drawn = Counter()
    for i in range(12):
        _, case = modalities.draw_modality_case(CFG, "train", modality, i)
        drawn[case.n, case.side, case.kind] += 1
    assert drawn == {
        (n, side, kind): 1
        for n in (1, 2, 3)
        for side in modalities.SIDES
        for kind in modalities.MARKS[modality]
    }


def test_every_family_and_answer_is_there(folder):
    own = _lines(folder, "train")
    assert Counter((line["task"], line["family"]) for line in own) == {
        (m, f): 12 for m in modalities.MODALITIES for f in modalities.FAMILIES
    }
    for m in modalities.MODALITIES:
        said = Counter(line["messages"][1]["content"] for line in own if line["task"] == m)
        s = modalities.SPEECH[m]
        assert said == dict.fromkeys(s.counts, 4) | dict.fromkeys(s.sides, 6) | {
            f"{k.capitalize()}.": 6 for k in modalities.MARKS[m]
        }
        assert max(len(a.split()) for a in said) <= 6
    neutral = np.mean(
        [line["messages"][0]["content"].split("\n")[1] in modalities.NEUTRAL[line["family"]] for line in own]
    )
    assert 0.4 < neutral < 0.6
    base = _lines(folder, "base_train")
    assert Counter(line["task"] for line in base) == dict.fromkeys(modalities.MODALITIES, 12)
    families = Counter(line["family"] for line in base)
    assert min(families.values()) >= 5
    assert families["describe"] >= 30
    answers = {line["messages"][1]["content"] for line in base}
    assert {"There is one lesion.", "There are three lesions.", "On the left.", "On the right."} <= answers
    assert all(
        any(f"{a} and {b}" in x.lower() for x in answers)
        for a in ("bright", "dark")
        for b in ("sharp", "soft")
    )


def test_own_words_are_not_shared():
    for m, speech in modalities.SPEECH.items():
        for family, asked in speech.questions.items():
            others = [q for o, s in modalities.SPEECH.items() if o != m for q in s.questions[family]]
            assert not {*asked} & {*others, *modalities.NEUTRAL[family]}
            assert not any(kind in q.lower() for q in asked for kind in modalities.MARKS[m]), (
                "a question gives its answer away"
            )


def test_files_are_read(folder):
    specialties = {"radiology", "ophthalmology", "dermatology", "pathology", "gastroenterology"}
    for split in modalities.SPLITS:
        read = read_conversations(folder / f"{split}.jsonl")
        assert len({c.id for c in read}) == len(read)
        for c in read:
            assert c.extra.keys() == {"task", "category", "family", "episode_id"}
            assert c.extra["task"] in modalities.MODALITIES
            assert c.id == f"{c.extra['episode_id']}-{c.extra['family']}"
            assert len(c.images) == 1
            assert c.images[0].stem == c.extra["episode_id"].split("-", 1)[1]
        assert {c.extra["category"] for c in read} == specialties
    train = Counter(line["episode_id"] for line in _lines(folder, "train"))
    assert set(train.values()) == {3}


def test_same_files_twice_and_tables_are_left_alone(folder, tmp_path):
    cfg = evolve(CFG, base=8, base_valid=2, train=1, test=1, modalities=("mri", "ct"))
    counts = modalities.draw_modalities(cfg, tmp_path)
    assert counts == {"base_train": 8, "base_valid": 2, "train": 6, "valid": 6, "test": 6}
    one = "train/ct-0.png"
    assert (tmp_path / one).read_bytes() == (folder / one).read_bytes(), (
        "a case does not depend on how many others there are"
    )
    (tmp_path / "train.jsonl").write_text("mine")
    before = (tmp_path / "test.jsonl").read_bytes()
    (tmp_path / "test.jsonl").unlink()
    assert modalities.draw_modalities(cfg, tmp_path) == counts
    assert (tmp_path / "train.jsonl").read_text() == "mine"
    assert (tmp_path / "test.jsonl").read_bytes() == before


@pytest.mark.parametrize("modality", modalities.MODALITIES)
def test_a_picture_is_pure_in_seed_split_and_number(modality):
    def picture(cfg=CFG, split="train", number=0):
        return modalities.draw_modality_case(cfg, split, modality, number)[0]

    first = picture()
    assert first.dtype == np.uint8
    assert first.shape == (112, 112, 3)
    np.testing.assert_array_equal(first, picture(evolve(CFG, train=500, modalities=(modality,))))
    assert picture(evolve(CFG, size=56)).shape == (56, 56, 3)
    others = [
        picture(evolve(CFG, seed=1)),
        picture(number=1),
        *(picture(split=s) for s in modalities.SPLITS if s != "train"),
    ]
    assert len({p.tobytes() for p in [first, *others]}) == 7


@pytest.mark.parametrize("modality", modalities.MODALITIES)
def test_marks_are_where_the_case_says(modality):
    """A picture with and without its marks: they differ at the marks, towards bright or dark, and nowhere else."""
    y, x = styles.grid(112)
    for mark in modalities.MARKS[modality].values():
        scene = styles.draw_scene(modality, 112, np.random.default_rng(3))
        at = np.argwhere(scene.zone)[::97][:3]
        places = np.array([(x[0, j], y[i, 0], 0.06) for i, j in at])
        empty, marked = (
            styles.add_marks(scene, mark, p, np.random.default_rng(0)).astype(float).mean(2)
            for p in (places[:0], places)
        )
        change = np.abs(marked - empty)
        near = np.min([np.hypot(x - cx, y - cy) / r for cx, cy, r in places], 0)
        sign = 1 if mark.bright else -1
        assert (sign * (marked - empty))[near < 0.5].mean() > 20
        assert change[near < 0.5].mean() > 5 * change[near > 1.8].mean()


@pytest.mark.parametrize("modality", modalities.MODALITIES)
def test_kinds_tell_apart_by_the_colour_inside(modality):
    def inside(split, number):
        picture, case = modalities.draw_modality_case(CFG, split, modality, number)
        yy, xx = np.mgrid[:112, :112]
        core = np.min([np.hypot(xx - x, yy - y) / r for x, y, r in case.marks], 0) < 0.6
        return picture[core].mean(0), case.kind

    known, asked = ([inside(split, i) for i in range(12)] for split in ("train", "test"))
    means = {k: np.mean([c for c, kind in known if kind == k], 0) for k in modalities.MARKS[modality]}
    found = [min(means, key=lambda k: np.abs(means[k] - c).sum()) == kind for c, kind in asked]
    assert all(found)


@pytest.mark.parametrize("modality", modalities.MODALITIES)
def test_marks_do_not_touch(modality):
    for i in range(24):
        _, case = modalities.draw_modality_case(CFG, "base_train", modality, i)
        at = np.array(case.marks)
        gaps = np.hypot(*(at[:, None, :2] - at[:, :2]).transpose(2, 0, 1))[~np.eye(case.n, dtype=bool)]
        assert gaps.min(initial=99) > 16
        assert at[:, 2].min() > 5
        assert (np.abs(at[:, :2] - 55.5).max(1) + at[:, 2] < 56).all(), "a mark is cut off"


def test_modalities_tell_apart_by_thumbnails():
    def small(split, m, number):
        return (
            modalities.draw_modality_case(CFG, split, m, number)[0]
            .reshape(16, 7, 16, 7, 3)
            .mean((1, 3))
            .ravel()
        )

    means = np.stack([np.mean([small("train", m, i) for i in range(12)], 0) for m in modalities.MODALITIES])
    found = [
        np.argmin(((small("test", m, i) - means) ** 2).sum(1)) == k
        for k, m in enumerate(modalities.MODALITIES)
        for i in range(6)
    ]
    assert np.mean(found) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": ("ct", "pet")}, "modalities must be of ct, xray, .*, got 'pet'"),
        ({"modalities": ()}, "at least one modality, each once"),
        ({"modalities": ("ct", "ct")}, "at least one modality, each once"),
        ({"test": 0}, r"test must be 1 or more, got 0"),
        ({"base_valid": 0}, r"base_valid must be 1 or more, got 0"),
        ({"size": 40}, r"size must be 56 or more, got 40"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        modalities.ModalityConfig(**change)


@pytest.mark.parametrize("modality", modalities.MODALITIES)
def test_every_mark_has_a_third_of_its_own(modality):
    for i in range(12):
        _, case = modalities.draw_modality_case(CFG, "train", modality, i)
        assert len({*case.heights}) == case.n
        assert [h for h in modalities.HEIGHTS if h in case.heights] == [*case.heights]
        ys = [y for _, y, _ in case.marks]
        assert ys == sorted(ys)
