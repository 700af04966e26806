"""What is asked and said of drawn slides is what was drawn, letters and words tell nothing, and files are left alone."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from attrs import asdict, evolve

from medvl.base import files
from medvl.phantoms import slide_questions, slides
from tests.phantoms.test_slides import CFG, SMALL

CHANCE = {len(o): 1 / len(o) for o in ("AB", "ABC", "ABCD")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides")
    n = len(slide_questions.FAMILIES)
    assert slide_questions.draw_slides(CFG, path) == {
        "slides": 65,
        "captions": 120,
        "train": 60 * n,
        "valid": 2 * n,
        "test": 3 * n,
    }
    return path


def _lines(folder):
    return [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]


def _asked(cfg, split, n):
    truths = [slides.draw_truth(cfg, split, i) for i in range(n)]
    return [(t, q) for i, t in enumerate(truths) for q in slide_questions.draw_questions(cfg, split, i)]


def _naive_answer(t, family, question, options):
    """The rules once more, written out: the option that is right for a slide's truth."""
    tissues = {name for name, count in t.tissues.items() if count}
    share = t.tissues["necrosis"] / t.patches
    if family in ("tissue", "motif_there"):
        seen = tissues if family == "tissue" else {t.motif}
        return "Yes" if any(s in question for s in seen) else "No"
    if family == "present":
        return next(o for o in options if o.lower() in tissues)
    many = t.tissues["lymphocytes"] / t.patches > 0.07
    return {
        "dominant": max(t.tissues, key=t.tissues.get).capitalize(),
        "necrosis": "Under 5 percent"
        if share < 0.05
        else "5 to 15 percent"
        if share < 0.15
        else "Over 15 percent",
        "lymphocytes": "Dense" if many else "Sparse",
        "motif": t.motif.capitalize(),
        "class": t.tumour_class.capitalize(),
        "differential": t.tumour_class.capitalize(),
        "grade": f"Grade {1 + (share > 0.05) + (share > 0.15)}",
        "treatment": {"a": "Surgical resection", "s": "Radiotherapy", "m": "Checkpoint inhibitor"}.get(
            t.tumour_class[0]
        )
        if t.tumour_class != "small cell carcinoma"
        else "Platinum chemotherapy",
        "immune": "Inflamed" if many else "Immune desert",
        "outlook": "Favourable" if share < 0.05 else "Intermediate" if share < 0.15 else "Poor",
    }[family]


def test_answers_are_what_was_drawn():
    for truth, q in _asked(SMALL, "train", 60) + _asked(slides.SlideConfig(), "test", 8):
        right = q.options["ABCD".index(q.letter)]
        assert right == _naive_answer(truth, q.family, q.question, q.options), (truth, q)
        assert 2 <= len({*q.options}) == len(q.options) <= 4
        if q.family == "present":  # only one is right
            assert sum(o.lower() in truth.tissues for o in q.options) == 1
        assert {*slide_questions.FAMILIES[q.family].facts} <= asdict(truth).keys()


def test_letters_are_balanced():
    letters = Counter((q.family, len(q.options), q.letter) for _, q in _asked(SMALL, "train", 60))
    assert {n for _, n, _ in letters} == {2, 3, 4}
    assert letters == {(f, n, letter): 60 // n for f, n, _ in letters for letter in "ABCD"[:n]}


def test_questions_without_slides_are_guesses():
    """What is right most often of an option's text, learnt on 300 slides, answers others no better than chance."""
    right, shown = Counter(), Counter()
    for _, q in _asked(SMALL, "train", 300):
        right[q.family, q.options["ABCD".index(q.letter)]] += 1
        shown.update((q.family, o) for o in q.options)
    hits, chance = [], []
    for _, q in _asked(SMALL, "valid", 120):
        best = max(q.options, key=lambda o: right[q.family, o] / max(1, shown[q.family, o]))
        hits.append("ABCD"[q.options.index(best)] == q.letter)
        chance.append(CHANCE[len(q.options)])
    assert abs(np.mean(hits) - np.mean(chance)) < 0.04
    yes = [
        q.options["ABCD".index(q.letter)]
        for _, q in _asked(SMALL, "train", 300)
        if q.family in ("tissue", "motif_there")
    ]
    assert 0.44 < np.mean([a == "Yes" for a in yes]) < 0.56


def test_captions_say_what_was_drawn():
    for i in range(60):
        t = slides.draw_truth(SMALL, "train", i)
        two = slide_questions.draw_captions(SMALL, "train", i)
        assert len(two) == 2
        for asked, text in two:
            low = text.lower()
            assert asked.startswith("<image>\n")
            assert [c for c in slides.CLASSES if c in low] == [t.tumour_class]
            assert f"grade {t.grade}" in low
            assert {m for m in slides.MOTIFS if m in low} == {t.motif} - {"none"}
            assert {x for x in slides.OPTIONAL if x in low} == t.tissues.keys() & {*slides.OPTIONAL}
            assert t.dominant in low
            assert ("dense" in low or "many" in low) == (t.lymphocytes == "high")
            words = (("under 5", "hardly any"), ("5 to 15", "some necrosis"), ("over 15", "much necrosis"))
            assert [k + 1 for k, said in enumerate(words) if any(w in low for w in said)] == [t.grade]
    assert (
        len({text for i in range(60) for _, text in slide_questions.draw_captions(SMALL, "train", i)}) == 120
    )


def test_tables_have_their_shapes(folder):
    with open(folder / "test.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    asked = _asked(CFG, "test", 3)
    assert tuple(rows[0]) == slide_questions.COLUMNS
    for row, (truth, q) in zip(rows, asked, strict=True):
        assert [row[k] for k in "ABCD"] == [*q.options, "", ""][:4]
        assert (row["Slide"], row["Question"], row["Answer"]) == (truth.name, q.question, q.letter)
        assert row["Narrow Category"] == slide_questions.FAMILIES[q.family].narrow
        assert row["Tumor"] == slides.CLASSES[truth.tumour_class][0]
    assert {r["Broad Category"] for r in rows} == {"Microscopy", "Diagnosis", "Clinical"}
    assert Counter(r["Narrow Category"] for r in rows)["Rare Motifs"] == 6
    for name in ("train", "valid", "captions"):
        items = json.loads((folder / f"{name}.json").read_text())
        assert len({item["id"] for item in items}) == len(items)
        for item in items:
            assert (folder / item["image"][0]).is_file()
            human, gpt = item["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert human["value"].count("<image>") == 1
            if name != "captions":
                assert gpt["value"] in human["value"].split("\n")[2:]
    labels = files.read_csv(
        folder / "labels.csv", ["slide", "split", "class", "grade", "lymphocytes", "motif"]
    )
    lines = _lines(folder)
    assert len(labels) == len(lines) == 65
    for row, line in zip(labels, lines, strict=True):
        assert (row["slide"], row["split"], row["class"], row["motif"]) == tuple(
            line[k] for k in ("name", "split", "tumour_class", "motif")
        )
    assert [q["id"] for line in lines if line["split"] == "test" for q in line["questions"]] == [
        r["ID"] for r in rows
    ]
    assert lines[3]["motif_rows"] == slides.draw_slide(CFG, "train", 3).motif_rows.tolist()


def test_prompt_is_the_benchmark_script_s():
    assert slide_questions.question_prompt("Which?", ("Fat", "Mucus")) == "<image>\nWhich?\nA. Fat\nB. Mucus"


def test_same_files_twice_and_tables_are_left_alone(folder, tmp_path):
    cfg = evolve(CFG, train=2, valid=1, test=1)
    counts = slide_questions.draw_slides(cfg, tmp_path)
    one = "features/TCGA-TR-0001-01Z-00-DX1.h5"
    assert (tmp_path / one).read_bytes() == (folder / one).read_bytes(), (
        "a slide does not depend on how many others there are"
    )
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    assert before.keys() == {
        "train.json",
        "valid.json",
        "captions.json",
        "test.csv",
        "labels.csv",
        "truth.jsonl",
    }
    for name in before:
        (tmp_path / name).write_text("mine")
    (tmp_path / one).unlink()
    assert slide_questions.draw_slides(cfg, tmp_path) == counts
    assert {(tmp_path / name).read_text() for name in before} == {"mine"}
    assert not (tmp_path / one).exists(), "nothing is drawn where the last table is there"
    for name in before:
        (tmp_path / name).unlink()
    slide_questions.draw_slides(cfg, tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
