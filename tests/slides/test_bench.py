"""Scores of SlideBench: the published percentages from their counts, baselines, and overlap of words equal to the peers'."""

import csv
import json
import math
import random

import pytest

from medvl.evaluation import results
from medvl.slides.bench import (
    ChoiceAnswer,
    OpenAnswer,
    _common_length,
    bleu,
    extract_choice,
    rouge_l,
    score_choices,
    score_open_answers,
    score_texts,
    write_benchmark,
)

TCGA = {  # SlideChat's right answers and questions, arXiv 2410.11761, table 5
    "Microscopy": {
        "Architecture": (613, 696),
        "Tumor": (489, 562),
        "Cytomorphology": (529, 601),
        "Changes": (553, 633),
    },
    "Diagnosis": {
        "Detection": (470, 581),
        "Classification": (405, 532),
        "Staging": (459, 671),
        "Grading": (411, 601),
        "Differential": (432, 586),
    },
    "Clinical": {
        "Treatment": (498, 597),
        "Biomarkers": (447, 502),
        "Risk": (542, 591),
        "Prognosis": (505, 674),
    },
}
BCNB = {  # table 6, with the number of options
    "Tumor type": (954, 1058, 3),
    "ER": (831, 1058, 2),
    "PR": (728, 1058, 2),
    "HER2": (761, 1058, 2),
    "HER2 expression": (265, 1058, 4),
    "Grading": (214, 926, 3),
    "Subtype": (185, 1058, 4),
}


def table(size=4, text="option"):
    return {letter: f"{text} {letter.lower()}{letter.lower()}" for letter in "ABCD"[:size]}


def row(right, i=0, size=4, **kwargs):
    gold = "ABCD"[i % size]
    chosen = gold if right else "ABCD"[(i + 1) % size]
    return ChoiceAnswer(
        **({"slide": f"s{i % 50}", "options": table(size), "gold": gold, "chosen": chosen} | kwargs)
    )


def value(found, what, subject):
    (hit,) = [r for r in found if (r.what, r.subject) == (what, subject)]
    return hit.value


def test_published_percentages_of_slidebench_tcga(gen):
    rows = [
        row(i < hits, i, broad=b, narrow=k)
        for b, parts in TCGA.items()
        for k, (hits, n) in parts.items()
        for i in range(n)
    ]
    assert len(rows) == 7827
    found = score_choices(rows, split="test", n=50, gen=gen)
    percent = {b: 100 * value(found, "accuracy", b) for b in ("overall", *TCGA)}
    wanted = {"overall": 81.17, "Microscopy": 87.64, "Diagnosis": 73.27, "Clinical": 84.26}
    assert percent == pytest.approx(wanted, abs=0.0055)
    assert value(found, "accuracy", "Diagnosis / Grading") == 411 / 601
    assert value(found, "macro_accuracy", "broad") == pytest.approx(
        (2184 / 2492 + 2177 / 2971 + 1992 / 2364) / 3, abs=1e-12
    )
    shares = [hits / n for parts in TCGA.values() for hits, n in parts.values()]
    assert value(found, "macro_accuracy", "narrow") == pytest.approx(sum(shares) / 13, abs=1e-12)
    assert value(found, "random", "overall") == pytest.approx(0.25)
    assert {r.n for r in found if r.subject == "overall"} == {7827}
    assert all(r.low <= r.value <= r.high for r in found if r.what in ("accuracy", "macro_accuracy"))


def test_published_percentages_of_slidebench_bcnb(gen):
    rows = [
        row(i < hits, i, size, broad=task, slide=str(i))
        for task, (hits, n, size) in BCNB.items()
        for i in range(n)
    ]
    found = score_choices(rows, n=20, gen=gen)
    assert len(rows) == 7274
    assert 100 * value(found, "accuracy", "overall") == pytest.approx(54.14, abs=0.005)
    assert 100 * value(found, "macro_accuracy", "broad") == pytest.approx(53.59, abs=0.005)
    assert 100 * value(found, "random", "overall") == pytest.approx(38.2, abs=0.05)
    assert not [r for r in found if " / " in r.subject or r.subject == "narrow"]


def test_what_is_invalid_or_missing_is_wrong_and_counted(gen):
    options = table()
    rows = [
        extract_choice("A. option aa", options, "A", slide="1"),
        extract_choice("I cannot tell", options, "A", slide="1"),
        extract_choice(None, options, "A", slide="2"),
        extract_choice("A", options, "A", slide="2", missing=True),
        extract_choice("B", options, "E: none", slide="3", id="x"),
        extract_choice("none", options, "", slide="3"),
    ]
    assert [(r.chosen, r.gold, r.missing) for r in rows] == [
        ("A", "A", False),
        *[("", "A", False)] * 2,
        ("", "A", True),
        ("B", "", False),
        ("", "", False),
    ]
    found = score_choices(rows, n=20, gen=gen)
    got = {r.what: r.value for r in found if r.subject == "overall"}
    wanted = {
        "accuracy": 1 / 6,
        "invalid": 3,
        "missing": 1,
        "without_gold": 2,
        "best_letter": 4 / 6,
        "majority": 4 / 6,
        "random": 1 / 4,
    }
    assert got == wanted | {"balanced_accuracy": 1 / 4}


def test_balanced_accuracy_and_baselines(gen):
    """One who always says Positive is right in 8 of 10, and balanced 1/2: whatever the letter of Positive is."""
    options = [{"A": "Positive", "B": "Negative"}, {"A": "negative.", "B": "positive"}]
    positive = lambda i: "AB"[i % 2]
    rows = [
        ChoiceAnswer(
            slide=str(i),
            options=options[i % 2],
            gold=positive(i) if i < 8 else positive(i + 1),
            chosen=positive(i),
            broad="ER",
        )
        for i in range(10)
    ]
    found = score_choices(rows, n=20, gen=gen)
    got = {r.what: r for r in found if r.subject == "ER"}
    assert (got["accuracy"].value, got["balanced_accuracy"].value, got["majority"].value) == (0.8, 0.5, 0.8)
    assert got["balanced_accuracy"].extra == {"by": "text", "classes": 2}
    assert (got["best_letter"].value, got["best_letter"].extra) == (0.5, {"letter": "A"})
    more = [*rows, *[row(i < 3, i, broad="other", options=table(text=f"t{i}")) for i in range(4)]]
    found = score_choices(more, n=20, gen=gen)
    by_letter = next(r for r in found if (r.what, r.subject) == ("balanced_accuracy", "other"))
    assert (by_letter.value, by_letter.extra["by"]) == (0.75, "letter")
    assert math.isnan(value(found, "majority", "other"))
    assert math.isnan(value(found, "majority", "overall"))
    two = [*rows, *[row(True, 0, broad="T") for _ in range(5)]]
    assert value(score_choices(two, n=20, gen=gen), "majority", "overall") == 13 / 15


def test_the_order_of_rows_does_not_matter_and_slides_are_drawn_whole(gen):
    rows = [row(i % 3 > 0, i, broad="AB"[i % 2], narrow=f"n{i % 4}", slide=f"s{i // 10}") for i in range(120)]
    mixed = random.Random(1).sample(rows, len(rows))
    seeded = lambda: gen.manual_seed(3)
    for a, b in zip(
        score_choices(rows, n=100, gen=seeded()), score_choices(mixed, n=100, gen=seeded()), strict=True
    ):
        assert (a.what, a.subject, a.n, a.extra) == (b.what, b.subject, b.n, b.extra)
        assert [a.value, a.low, a.high] == pytest.approx([b.value, b.low, b.high], abs=0, nan_ok=True)
    alike = [
        row(i < 60, i, broad="AB"[i % 2], slide=f"s{i // 60}") for i in range(120)
    ]  # one slide all right, one all wrong
    for r in score_choices(alike, n=200, gen=seeded()):
        if "accuracy" in r.what and r.what != "balanced_accuracy":
            assert (r.low, r.high, r.extra["groups"]) == (0, 1, 2)
    for r in score_choices(alike[:60], n=5, gen=seeded()):
        assert math.isnan(r.low)


def test_slides_of_one_case_are_drawn_together(gen):
    named = lambda i: f"TCGA-AB-{i // 60:04d}-01Z-00-DX{i // 10 % 6}"
    rows = [
        row(i < 60, i, broad="AB"[i % 2], slide=named(i)) for i in range(120)
    ]  # twelve slides of two patients
    for r in score_choices(rows, n=200, gen=gen):
        if "accuracy" in r.what and r.what != "balanced_accuracy":
            assert (r.low, r.high, r.extra["groups"]) == (0, 1, 2)


def test_macro_interval_is_that_of_the_mean_over_one_category(gen):
    rows = [row(i % 3 > 0, i, broad="A", slide=f"s{i // 4}") for i in range(120)]
    found = {(r.what, r.subject): r for r in score_choices(rows, n=500, gen=gen)}
    micro, macro = found["accuracy", "A"], found["macro_accuracy", "broad"]
    assert (macro.value, macro.n) == (pytest.approx(micro.value), 120)
    assert [macro.low, macro.high] == pytest.approx([micro.low, micro.high], abs=0.02)


def test_files(tmp_path, gen):
    rows = [
        row(
            i % 3 > 0,
            i,
            broad="AB"[i % 2],
            narrow=f"n{i % 4}",
            options=table(text=f"t{i}"),
            said="x",
            id=str(i),
        )
        for i in range(40)
    ]
    found = [
        *score_choices(rows, split="test", experiment="e", n=20, gen=gen),
        *score_texts(["a b"], ["a b"], subject="open"),
    ]
    out = write_benchmark(
        tmp_path, rows, found, source={"file": "f.csv", "sha256": "ab"}, facts={"commit": "c"}
    )
    kept = json.loads((tmp_path / "benchmark_results.json").read_text())
    assert kept == json.loads(json.dumps(out))
    assert [*kept] == ["source", "commit", "metrics", "results", "predictions"]
    assert kept["metrics"]["overall"]["accuracy"] == value(found, "accuracy", "overall")
    assert kept["metrics"]["overall"]["majority"] is None
    assert kept["metrics"]["open"]["rouge_l"] == 1
    assert sum(p["right"] for p in kept["predictions"]) == round(40 * kept["metrics"]["overall"]["accuracy"])
    assert kept["predictions"][3] | {"options": 0} == {
        **{
            "right": False,
            "slide": "s3",
            "options": 0,
            "gold": "D",
            "chosen": "A",
            "broad": "B",
            "narrow": "n3",
            "missing": False,
        },
        **{"said": "x", "id": "3", "extra": {}},
    }
    with open(tmp_path / "benchmark_categories.csv", newline="") as f:
        lines = list(csv.DictReader(f))
    assert [(x["level"], x["category"], x["n"]) for x in lines] == [
        ("overall", "overall", "40"),
        *(("broad", b, "20") for b in "AB"),
        *(("narrow", n, "10") for n in ("A / n0", "A / n2", "B / n1", "B / n3")),
    ]
    assert float(lines[1]["accuracy"]) == value(found, "accuracy", "A")
    assert (lines[1]["majority"], float(lines[1]["low"]) <= float(lines[1]["accuracy"])) == ("", True)
    results.write_results(tmp_path / "r.jsonl", found)
    assert len(results.read_results(tmp_path / "r.jsonl")) == len(found)


def test_open_answers_are_scored_exactly_where_they_are_short(tmp_path, gen):
    said = [
        "Yes.",
        "No",
        "no",
        "",
        "The tumor is ductal carcinoma",
        "ductal carcinoma",
        "A long report of much tissue and fat.",
    ]
    gold = [
        "Yes",
        "Yes",
        "No",
        "Yes",
        "ductal carcinoma",
        "Ductal carcinoma.",
        "A long report of much tissue and of fat.",
    ]
    rows = [
        OpenAnswer(slide=f"s{i % 2}", question="q", gold=g, said=s, missing=not s, id=str(i))
        for i, (s, g) in enumerate(zip(said, gold, strict=True))
    ]
    found = score_open_answers(rows, n=20, gen=gen)
    assert (value(found, "accuracy", "yes or no"), value(found, "majority", "yes or no")) == (2 / 4, 3 / 4)
    assert value(found, "accuracy", "short answers") == 1 / 2
    assert value(found, "bleu_1", "") == bleu(said, gold)[0]
    assert {r.subject: r.n for r in found if r.what == "accuracy"} == {"yes or no": 4, "short answers": 2}
    out = write_benchmark(
        tmp_path, [], found, source={"file": "f.csv", "sha256": "ab"}, facts={}, written=rows
    )
    kept = json.loads((tmp_path / "benchmark_results.json").read_text())
    assert kept == json.loads(json.dumps(out))
    assert kept["predictions"] == []
    assert [p["right"] for p in kept["open_predictions"]] == [True, False, True, False, False, True, None]
    assert [p["said"] for p in kept["open_predictions"]] == said
    assert kept["open_predictions"][0]["question"] == "q"


def test_errors(tmp_path, gen):
    with pytest.raises(ValueError, match="score_choices: needs at least one answer"):
        score_choices([], gen=gen)
    with pytest.raises(ValueError, match="replicates n must be 1 or more"):
        score_choices([row(True)], n=0, gen=gen)
    for wrong in ({"gold": "E"}, {"chosen": "E"}, {"options": {}}):
        with pytest.raises(ValueError, match="ChoiceAnswer: gold and chosen must be letters of the options"):
            row(True, **wrong)
    with pytest.raises(ValueError, match="what is missing was not asked"):
        row(True, missing=True)
    for source, facts in (({}, {}), ({"sha256": "a"}, {"metrics": 1})):
        with pytest.raises(ValueError, match='source must have "sha256", and facts none of'):
            write_benchmark(tmp_path, [row(True)], [], source=source, facts=facts)
    for f in (bleu, rouge_l, score_texts):
        for said, gold in (([], []), (["a"], ["a", "b"]), ("a", "a")):
            with pytest.raises(ValueError, match="needs a written text for each that is said"):
                f(said, gold)


SAID = (
    "The tumor shows poorly differentiated cells, with necrosis and necrosis.",
    "Invasive ductal carcinoma, grade 2; no vascular invasion is seen in the slide",
    "",
    "Nests of cells",
)
GOLD = (
    "The tumor is composed of poorly differentiated cells with extensive necrosis.",
    "Invasive ductal carcinoma of grade 2. No lymph-vascular invasion is seen.",
    "Sheets of atypical squamous cells",
    "Nests and sheets of atypical cells with keratin pearls",
)


def test_bleu_by_hand():
    assert bleu(["the the the cat"], ["the cat the dog"], 2) == pytest.approx(
        (3 / 4, math.sqrt(3 / 4 * 1 / 3))
    )
    assert bleu(["the cat"], ["The  cat, sat here"], 2) == pytest.approx((math.exp(-1), math.exp(-1)))
    assert bleu(["a b c d e"], ["a b c d e"]) == (1, 1, 1, 1)
    assert bleu(["a b c d"], ["a b"], 1) == (0.5,)  # no reward for length
    assert bleu(["a b c", "x"], ["a b c", "y"], 2) == pytest.approx(
        (3 / 4, math.sqrt(3 / 4))
    )  # one division for all texts
    assert bleu(["a"], ["b"]) == bleu([""], ["b"]) == (0, 0, 0, 0)
    assert bleu(["a b"], ["a b"]) == (1, 1, 0, 0)


def test_rouge_l_by_hand():
    assert rouge_l(["a c b"], ["a b c d"]) == pytest.approx((2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4),))
    assert rouge_l(["a c b"], ["a b c d"], 1.2) == pytest.approx(
        (2.44 * (2 / 3) * (2 / 4) / (2 / 4 + 1.44 * 2 / 3),)
    )
    assert rouge_l(["", "a", "b"], ["a", "", "B."]) == (0, 0, 1)


def test_common_words_equal_the_plain_table():
    def plain(a, b):
        t = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                t[i + 1][j + 1] = t[i][j] + 1 if x == y else max(t[i][j + 1], t[i + 1][j])
        return t[-1][-1]

    draw = random.Random(0)
    for _ in range(300):
        a, b = ([draw.choice("vwxyz") for _ in range(draw.randrange(90))] for _ in range(2))
        assert _common_length(a, b) == plain(a, b)


def test_overlap_equals_the_peers():
    """Figures of sacrebleu 2.6.0 (tokenize "none" on the same words, no smoothing) and rouge-score 0.1.2 (no stemmer)."""
    assert bleu(SAID, GOLD) == pytest.approx(
        (0.503867880296749, 0.3973020219782847, 0.31420103459180476, 0.22111386875262667), abs=1e-14
    )
    assert rouge_l(SAID, GOLD) == pytest.approx((2 / 3, 0.8, 0, 0.5), abs=1e-14)
    rows = {r.what: r.value for r in score_texts(SAID, GOLD)}
    assert [*rows] == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    assert rows["rouge_l"] == pytest.approx((2 / 3 + 0.8 + 0.5) / 4)
