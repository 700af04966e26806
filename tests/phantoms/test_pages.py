"""Drawn medical pages: fields and boxes that are printed, layouts that fit, splits that share nothing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from PIL import Image

import medvl
from medvl.documents.fields import Diagnosis, Fields, Medication, Patient, leaves, read_answer
from medvl.language.conversations import read_conversations
from medvl.phantoms import page_damage, page_layout, page_records, pages
from medvl.phantoms.pages import DAMAGES, KINDS, PageConfig, draw_page

LETTER = PageConfig(dpi=72)
GRID = PageConfig(style="grid", lines=0.2)
CASES = [(LETTER, kind) for kind in KINDS] + [(GRID, kind) for kind in (*KINDS, "line")]


def name_of(case):
    return f"{case.style}" if isinstance(case, PageConfig) else case


def pieces_of(page):
    return [(word.text, word.box) for word in page.texts]


def largest_overlap(boxes):
    """Of all pairs of boxes, the most pixels that two share both across and down; negative where all are apart."""
    left, top, right, bottom = np.array(boxes).T
    width = np.minimum.outer(right, right) - np.maximum.outer(left, left)
    height = np.minimum.outer(bottom, bottom) - np.maximum.outer(top, top)
    shared = np.minimum(width, height)
    np.fill_diagonal(shared, -1)
    return shared.max()


@pytest.mark.parametrize(("cfg", "kind"), CASES, ids=name_of)
def test_all_that_is_printed_has_room_and_ink(cfg, kind):
    for number in range(5):
        page = draw_page(cfg, "train", number, kind=kind, damage="clean")
        grey = page.image.min(2)
        height, width = grey.shape
        paper = grey.max()
        for text, (left, top, right, bottom) in pieces_of(page):
            assert 0 <= left < right <= width, text
            assert 0 <= top < bottom <= height, text
        for path, (left, top, right, bottom) in page.boxes.items():
            ink = grey[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            assert ink.min() < paper - 60, path
        assert largest_overlap([box for _, box in pieces_of(page)]) < 1
        assert largest_overlap([*page.boxes.values()]) < 1


@pytest.mark.parametrize(("cfg", "kind"), CASES, ids=name_of)
def test_every_field_is_printed_and_has_a_box(cfg, kind):
    for number in range(5):
        page = draw_page(cfg, "train", number, kind=kind, damage="clean")
        values = leaves(page.fields)
        assert page.boxes.keys() == values.keys()
        printed = " ".join(text for text, _ in pieces_of(page))
        assert "SYNTHETIC" in printed
        assert page.fields.kind == page.kind == kind
        for path, value in values.items():
            # As needed is printed in words or as an abbreviation.
            options = ("PRN", "as needed") if path.endswith("/prn") else (value,)
            assert any(option in printed for option in options), path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("cfg", [LETTER, GRID], ids=name_of)
def test_damage_keeps_fields_and_the_page_in_the_picture(cfg, damage):
    for number in range(4):
        clean = draw_page(cfg, "valid", number, damage="clean")
        page = draw_page(cfg, "valid", number, damage=damage)
        assert page.image.dtype == np.uint8
        height, width, channels = page.image.shape
        assert channels == 3
        assert page.fields == clean.fields
        assert page.boxes.keys() == clean.boxes.keys()
        if damage != "clean":
            assert page.image.shape != clean.image.shape or (page.image != clean.image).mean() > 0.5
        if cfg.style == "grid":
            assert (height, width) == ((2 if page.kind == "line" else 7) * 28, 16 * 28)
        for left, top, right, bottom in [*page.boxes.values(), *(box for _, box in pieces_of(page))]:
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


@pytest.mark.parametrize("damage", ["scan", "photo"])
@pytest.mark.parametrize("small", [True, False])
def test_boxes_move_with_the_ink(damage, small):
    """The bounds of a black square on a white page, seen in the picture, are those of its moved box."""
    square = (500, 160, 540, 190)
    for seed in range(4):
        image = Image.new("L", (700, 900), 255)
        image.paste(0, square)
        gen = np.random.default_rng(seed)
        picture, matrix = page_damage.damage_page(image, [], damage, small=small, gen=gen)
        left, top, right, bottom = page_damage.move_box(matrix, square)
        grey = np.asarray(picture.convert("L")).astype(float)
        # A desk may be as dark as the square, so only its surroundings are looked at.
        y0, x0 = int(top) - 12, int(left) - 12
        near = grey[y0 : int(bottom) + 12, x0 : int(right) + 12]
        rows, columns = np.nonzero(near < near.max() / 2)
        seen = (columns.min() + x0, rows.min() + y0, columns.max() + 1 + x0, rows.max() + 1 + y0)
        np.testing.assert_allclose(seen, (left, top, right, bottom), atol=2)
        moved = np.abs(np.array(seen) - square).max()
        assert moved < 6 if small else moved > 0


def test_a_page_has_the_same_bits_in_every_process():
    code = (
        "import hashlib, json; from medvl.phantoms.pages import PageConfig, draw_page\n"
        "for style in ('letter', 'grid'):\n"
        "    for damage in ('clean', 'scan', 'photo'):\n"
        "        page = draw_page(PageConfig(style=style, dpi=72), 'test', 3, damage=damage)\n"
        "        print(hashlib.sha256(page.image.tobytes()).hexdigest(), json.dumps(page.boxes))\n"
    )
    outputs = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(medvl.__file__).parents[1])}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1]
    assert len({*outputs[0].splitlines()}) == 6


def test_a_page_does_not_depend_on_the_number_of_pages():
    few, many = (draw_page(PageConfig(dpi=72, train=n), "train", 4) for n in (5, 500))
    assert np.array_equal(few.image, many.image)
    other = draw_page(PageConfig(dpi=72, seed=1), "train", 4)
    assert other.fields != few.fields


def test_splits_share_no_patient_and_no_line():
    """Of a small alphabet, texts repeat within a split, but never in another, whatever the seeds."""
    seen = {}
    for seed in (0, 1):
        for split in ("train", "valid", "test", "bench"):
            cfg = PageConfig(style="grid", lines=1.0, seed=seed)
            texts = {draw_page(cfg, split, i, damage="clean").fields.text for i in range(60)}
            seen.setdefault(split, set()).update(texts)
    for one, other in combinations(seen, 2):
        assert not seen[one] & seen[other]
    patients = {}
    for split in ("train", "valid", "test"):
        drawn = [draw_page(LETTER, split, i, damage="clean").fields.patient for i in range(10)]
        patients[split] = {(p.name, p.record) for p in drawn}
        assert len(patients[split]) == 10
    assert len(set.union(*patients.values())) == 30


def test_bench_pages_are_fixed_and_have_the_terms_they_are_scored_by():
    for drawn in (pages.standard_pages(), pages.suite_pages()):
        assert [page.kind for page in drawn] == list(KINDS)
        values = [value for page in drawn for value in leaves(page.fields).values()]
        assert {"BID", "PRN", "COPD", "CKD", "PO", "mg", "H", "L"} <= {*values}
        assert {"HH", "LL"} & {*values}
    first, second = (f() for f in (pages.standard_pages, pages.suite_pages))
    assert not {p.fields.patient for p in first} & {p.fields.patient for p in second}
    again = pages.standard_pages()
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("value", "flag"),
    [("135", "N"), ("145", "N"), ("134", "L"), ("124", "LL"), ("146", "H"), ("155", "H"), ("156", "HH")],
)
def test_flags_follow_from_value_and_range(value, flag):
    sodium = page_records.words()["labs"]["Sodium"]
    assert (sodium["normal"], sodium["drawn"]) == (["135", "145"], [115, 165])
    assert page_records.lab_flag(value, sodium) == flag


def test_an_open_range_has_flags_on_one_side_only():
    test = {"normal": ["", "5.0"], "drawn": [0.2, 280.0]}
    flags = [page_records.lab_flag(value, test) for value in ("0.0", "5.0", "5.1", "143")]
    assert flags == ["N", "N", "H", "HH"]


def test_drawn_labs_and_drugs_are_those_of_the_words():
    tables = page_records.words()
    by_name = {n: t for name, t in tables["labs"].items() for n in (name, t["short"])}
    flags = set()
    for seed in range(40):
        gen = np.random.default_rng(seed)
        for lab in page_records.draw_fields("lab results", gen).labs:
            test = by_name[lab.name]
            assert [lab.unit, lab.low, lab.high] == [test["unit"], *test["normal"]]
            assert test["drawn"][0] - 0.5 <= float(lab.value) <= test["drawn"][1] + 0.5
            assert lab.flag == page_records.lab_flag(lab.value, test) or lab.flag == ""
            flags.add(lab.flag)
        for medication in page_records.draw_fields("prescription", gen).medications:
            drug = tables["drugs"][medication.name]
            assert medication.dose in drug["doses"]
            assert medication.unit == drug["unit"]
            assert not medication.prn or drug["prn"]
    assert flags == {"", "N", "H", "HH", "L", "LL"}


def test_words_fit_together():
    """Every drug names routes and frequencies that have a long form, every range lies inside what is drawn."""
    tables = page_records.words()
    assert len(tables["drugs"]) >= 60
    assert len(tables["labs"]) >= 40
    assert len(tables["diagnoses"]) >= 50
    assert all(len(prompts) >= 10 for prompts in tables["prompts"].values())
    for drug in tables["drugs"].values():
        assert {*drug["routes"]} <= tables["routes"].keys()
        assert {*drug["frequencies"]} <= tables["frequencies"].keys()
    for test in tables["labs"].values():
        low, high = test["normal"]
        first, last = test["drawn"]
        assert first < float(low or high) <= float(high or low) < last
    assert {*tables["titles"]} == {*KINDS}


def test_long_lists_get_smaller_and_then_shorter_but_are_never_cut():
    rows = [
        Medication("Hydrochlorothiazide", str(i), "mg", "by mouth", "three times daily", True)
        for i in range(80)
    ]
    text = "Symptoms improved over several days. " * 12
    fields = Fields("discharge summary", Patient("Vera Yarrow"), [Diagnosis("Gout")] * 9, rows, text=text)
    for seed in range(3):
        look = page_layout.draw_look("discharge summary", np.random.default_rng(seed))
        printed, sheet = page_layout.lay_out(fields, look, 1.0)
        assert 10 < len(printed.medications) < 80
        assert printed.medications == tuple(rows[: len(printed.medications)])
        assert evolve(printed, medications=fields.medications) == fields
        width, height = sheet.size
        for piece in sheet.pieces:
            left, top, right, bottom = piece.box()
            assert left >= look.margin - 1
            assert right <= width - look.margin + 1
            assert top >= look.margin - 1
            assert bottom <= height - look.margin + 2


def test_layouts_of_a_kind_differ():
    for kind in KINDS:
        looks = {page_layout.draw_look(kind, np.random.default_rng(seed)).title for seed in range(30)}
        assert len(looks) >= 3
        places = set()
        for number in range(10):
            page = draw_page(LETTER, "train", number, kind=kind, damage="clean")
            places.add(tuple(round(x) for x in page.boxes["patient/name"][:2]))
        assert len(places) >= 8


def test_wrapping_keeps_together_what_no_space_parts():
    spans = [("aa", ""), (" ", ""), ("500", "dose"), ("mg", "unit"), (" ", ""), ("b", "")]
    assert page_layout.wrap(spans, 6, len) == [
        [("aa", "")],
        [("500", "dose"), ("mg", "unit")],
        [("b", "")],
    ]
    assert page_layout.wrap(spans, 80, len) == [spans]


def test_tables_of_pages(tmp_path):
    cfg = PageConfig(train=20, valid=3, test=3, dpi=72, damages=("clean",))
    assert pages.draw_pages(cfg, tmp_path) == {"train": 20, "valid": 3, "test": 3}
    digests = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.rglob("*") if p.is_file()}
    conversations = read_conversations(tmp_path / "train.jsonl")
    prompts = set()
    for number, conversation in enumerate(conversations):
        page = draw_page(cfg, "train", number)
        question, answer = conversation.messages
        prompts.add(question["content"].removeprefix("<image>\n"))
        (picture,) = conversation.images
        assert np.array_equal(np.asarray(Image.open(picture)), page.image)
        assert read_answer(answer["content"]) == page.fields
        extra = conversation.extra
        assert (extra["kind"], extra["damage"], extra["document"]) == (page.kind, "clean", f"train-{number}")
        assert read_answer(json.dumps(extra["fields"])) == page.fields
        assert {path: tuple(box) for path, box in extra["boxes"].items()} == page.boxes
    assert len(prompts) > 5
    pages.draw_pages(cfg, tmp_path)
    assert digests == {
        p: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.rglob("*") if p.is_file()
    }


def test_the_answer_of_a_line_is_its_text(tmp_path):
    cfg = PageConfig(style="grid", lines=1.0, train=30, valid=1, test=1)
    pages.draw_pages(cfg, tmp_path)
    conversations = read_conversations(tmp_path / "train.jsonl")
    answers = [c.messages[1]["content"] for c in conversations]
    assert all(1 < len(answer) <= 14 for answer in answers)
    assert len({*answers}) > 25
    printed = [word.text for word in draw_page(cfg, "train", 0).texts]
    assert printed == [*answers[0].split(), "SYNTHETIC"]


def test_as_many_pages_as_asked_for_are_a_line_and_all_forms_are_among_the_others():
    cfg = PageConfig(style="grid", lines=0.7)
    drawn = [draw_page(cfg, "train", i, damage="clean") for i in range(300)]
    kinds = Counter(page.kind for page in drawn)
    assert 180 < kinds["line"] < 240
    assert all(kinds[kind] > 5 for kind in KINDS)
    heights = {page.kind: page.image.shape[0] for page in drawn}
    assert heights["line"] == 2 * 28  # the line and the notice
    assert heights["prescription"] == 7 * 28


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "poster"}, "style must be of letter, grid, each once, got poster"),
        ({"kinds": ("line",)}, "kinds must be of diagnosis, .*, got line"),
        ({"lines": 0.5}, "PageConfig.lines is of style 'grid', got style 'letter'"),
        ({"kinds": ()}, "kinds must be of .*, got none"),
        ({"damages": ("clean", "clean")}, "damages must be .*, each once, got clean, clean"),
        ({"style": "grid", "rows": 3}, "PageConfig.rows must be 5 or more, got 3"),
        ({"dpi": 20}, "PageConfig.dpi must be 72 or more"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PageConfig(**settings)


@pytest.mark.parametrize("wrong", [{"kind": "line"}, {"damage": "torn"}, {"split": "all"}])
def test_a_page_that_there_is_not_is_refused(wrong):
    ((setting, name),) = wrong.items()
    with pytest.raises(ValueError, match=f"{setting} must be of .*, got {name}"):
        draw_page(LETTER, number=0, **{"split": "train"} | wrong)


def test_a_wheel_has_the_words(tmp_path):
    root = Path(medvl.__file__).parents[1]
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "medvl", tmp_path / "medvl", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    run = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / run.stdout.splitlines()[-1]) as wheel:
        assert "medvl/phantoms/medical_words.toml" in wheel.namelist()
