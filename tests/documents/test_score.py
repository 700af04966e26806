import math

import numpy as np
import pytest
import torch

from medvl.documents.fields import (
    Diagnosis,
    Fields,
    Lab,
    Medication,
    Patient,
    fields_to_json,
    read_answer,
)
from medvl.documents.quantities import holds_term, holds_value
from medvl.documents.score import (
    KINDS,
    compare_runs,
    count_fields,
    holds_substring,
    measure_coherence,
    score_page,
    score_results,
)
from medvl.evaluation.results import read_results, write_results
from medvl.phantoms.pages import PageConfig, draw_page
from tests.documents.adversarials import PAGES, TERMS, VALUES
from tests.documents.test_fields import PAGE

ANSWERS = (
    fields_to_json(PAGE),
    "Ms. Person has COPD. She takes Metformin 50 mg by mouth twice daily. HbA1c 8,4 % high.",
    '{"labs":[{"name":"HbA1c","value":"8.4","unit":"%"},{"name":"Sodium","value":"151","unit":"mmol/L"}]}',
    "",
)


def _seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def _totals(counts):
    return tuple(sum(getattr(c, name) for c in counts.values()) for name in ("right", "false", "missed"))


def test_sixty_adversarials_are_all_right_and_the_substring_rule_has_seventeen():
    wrong, by_substring = [], 0
    for kind, text, term, stated in TERMS:
        by_substring += holds_substring(text, term) == stated
        if holds_term(text, term, kind) != stated:
            wrong.append((text, term))
    for text, value, stated in VALUES:
        by_substring += holds_substring(text, value) == stated
        if holds_value(text, value) != stated:
            wrong.append((text, value))
    for gold, answer, expected in PAGES:
        score = score_page("1", gold, answer)
        # The rule knows nothing of what is false: it can only find everything or not.
        finds_all = all(found == total for found, total in (score.substring_terms, score.substring_values))
        by_substring += finds_all == (expected[1:] == (0, 0))
        if _totals(score.counts) != expected:
            wrong.append((answer, _totals(score.counts)))
    assert wrong == []
    assert len(TERMS) + len(VALUES) + len(PAGES) == 60
    assert by_substring == 17


def test_fields_of_an_answer_are_counted_by_kind():
    counts = count_fields(PAGE, read_answer(ANSWERS[1]))
    got = {kind: (c.right, c.false, c.missed, c.omitted, c.abbreviations) for kind, c in counts.items()}
    assert got == {
        "patient": (0, 0, 3, 3, 0),
        "diagnoses": (1, 0, 1, 1, 0),
        # Metformin: the dose is wrong, route and frequency are abbreviated on the page; no albuterol
        "medications": (4, 1, 7, 6, 2),
        "labs": (4, 0, 2, 2, 1),
        "vitals": (0, 0, 3, 3, 0),
        "procedures": (0, 0, 1, 1, 0),
    }


def test_a_page_read_perfectly_is_right_whatever_the_order_and_an_invented_entry_is_false():
    assert _totals(count_fields(PAGE, PAGE)) == (26, 0, 0)
    turned = Fields(
        patient=PAGE.patient, diagnoses=PAGE.diagnoses[::-1], medications=PAGE.medications[::-1],
        labs=PAGE.labs, vitals=PAGE.vitals, procedures=PAGE.procedures,
    )  # fmt: skip
    assert count_fields(PAGE, turned) == count_fields(PAGE, PAGE)
    more = Fields(labs=[*PAGE.labs, Lab("Sodium", "151", "mmol/L")])
    counts = count_fields(PAGE, more)["labs"]
    assert (counts.right, counts.false, counts.missed) == (6, 3, 0)
    # exchanged roles exchange false and missed
    counts = count_fields(more, PAGE)["labs"]
    assert (counts.right, counts.false, counts.missed, counts.omitted) == (6, 0, 3, 3)


def test_a_contradicting_unit_makes_the_value_wrong_and_a_missing_one_only_itself():
    gold = Fields(medications=[Medication("Digoxin", "125", "mcg")])
    for unit, expected in (("ug", (3, 0, 0)), ("mg", (1, 2, 2)), ("", (2, 0, 1))):
        assert (
            _totals(count_fields(gold, Fields(medications=[Medication("digoxin", "125", unit)]))) == expected
        )


def test_a_flag_that_says_normal_is_not_false_where_none_is_printed():
    gold = Fields(labs=[Lab("K", "4.1")])
    assert _totals(count_fields(gold, Fields(labs=[Lab("K", "4.1", flag="Normal")]))) == (2, 0, 0)
    assert _totals(count_fields(gold, Fields(labs=[Lab("K", "4.1", flag="H")]))) == (2, 1, 0)


def test_prose_states_what_the_page_says_also_if_no_list_has_it():
    gold = Fields(diagnoses=[Diagnosis("Pneumonia"), Diagnosis("COPD")])
    for answer, expected in (
        ("No fever, but pneumonia in the left lobe; COPD.", (2, 0, 0)),
        ("No pneumonia. COPD.", (1, 0, 1)),
        ("Diagnoses: COPD, right-sided pneumonia", (2, 1, 0)),
    ):
        assert _totals(score_page("1", gold, answer).counts) == expected


def test_names_of_people_have_no_order():
    gold = Fields(patient=Patient(name="Jane Doe", sex="F", age="54"))
    answer = Fields(patient=Patient(name="DOE, Jane", sex="female", age="54 years"))
    assert _totals(count_fields(gold, answer)) == (3, 0, 0)


@pytest.mark.parametrize(
    ("answer", "page", "numbers", "hallucinated"),
    [
        (ANSWERS[0], "", 9, ()),
        (ANSWERS[1], "", 2, ("50",)),
        (ANSWERS[2], "", 2, ("151",)),
        (ANSWERS[2], "Sodium 151 mmol/L", 2, ()),
        (ANSWERS[2], "Record 1510", 2, ("151",)),  # within another number
        (
            '{"labs":[{"name":"HbA1c","value":8.40}],"note":"give 20 mg"}',
            "",
            2,
            ("20",),
        ),  # under a key of its own
        ('{"medications":["Albuterol every 6 hours"]}', "", 0, ()),  # a frequency is a field, no number
        ("1. HbA1c 8.4 %\n2. BP 120/85", "", 3, ("85",)),
        ("Metformin 500 mg 2 times daily", "", 1, ()),
    ],
)
def test_numbers_that_no_page_shows_are_hallucinated(answer, page, numbers, hallucinated):
    score = score_page("1", PAGE, answer, page)
    assert (score.numbers, score.hallucinated) == (numbers, hallucinated)


def test_running_text_is_scored_by_its_words():
    gold = Fields(text="No mass. The lungs are clear.")
    cases = {
        "no mass; the lungs are clear": 1,
        "The lungs are clear. No mass.": 1,  # order does not count
        "The lungs are clear.": 2 * 4 / (4 + 6),
        "The the the the": 2 * 1 / (4 + 6),  # a word counts as often as it comes on the page
        "": 0,
    }
    for answer, expected in cases.items():
        rows = score_results([score_page("1", gold, answer)], split="test", gen=_seeded())
        (row,) = [row for row in rows if row.what == "text_word_f1"]
        assert row.value == pytest.approx(expected), answer
        assert row.n == 1
    # JSON has its text in a field; a page without text counts for nothing.
    answer = '{"text": "No mass. The lungs are clear."}'
    assert score_page("1", gold, answer).text_words == (6, 6, 6)
    assert score_page("1", PAGE, ANSWERS[0]).text_words == (3, 3, 3)
    assert score_page("1", Fields(labs=PAGE.labs), "Many words of no use.").text_words == (0, 0, 0)


def test_coherence_is_low_for_nothing_for_loops_and_for_no_words():
    page = "Metformin 500 mg twice daily. The patient is stable."
    good = measure_coherence("The patient takes Metformin 500 mg twice daily.", page, {"takes"})
    assert (good.empty, good.repeated, good.unknown, good.value) == (False, 0, 0, 1)
    assert measure_coherence(" \n", page).value == 0
    loop = measure_coherence("Metformin 500 mg twice daily. " * 40, page)
    assert loop.repeated == pytest.approx(1 - 5 / 189)  # 200 words have 189 runs of 12, 5 of them different
    assert loop.value < 0.05
    assert measure_coherence("mg " * 6, page).repeated == pytest.approx(3 / 4)
    assert measure_coherence("Metformin xqzt wrrgl patient", page).unknown == 0.5
    assert score_page("1", PAGE, ANSWERS[0]).coherence.value == 1


@pytest.mark.parametrize("number", range(5))
def test_the_fields_of_a_drawn_page_score_one(number):
    page = draw_page(PageConfig(), "test", number, damage="clean")
    text = "\n".join(word.text for word in page.texts)
    score = score_page("1", page.fields, fields_to_json(page.fields), text)
    counts = _totals(score.counts)
    assert counts[0] > 5
    assert counts[1:] == (0, 0)
    assert score.numbers > 0
    assert score.hallucinated == ()
    assert score.coherence.value == 1


def _scores(answers, documents=None):
    return [
        score_page(documents[i] if documents else str(i), PAGE, answer) for i, answer in enumerate(answers)
    ]


def test_rows_are_the_naive_rates_with_intervals_by_document():
    answers = [*ANSWERS, ANSWERS[0], ANSWERS[1]]
    documents = ["a", "b", "c", "d", "e", "a"]
    scores = _scores(answers, documents)
    rows = score_results(scores, split="test", experiment="x", n=200, gen=_seeded())
    value = {(row.what, row.subject): row for row in rows}
    for kind in (*KINDS, "all"):
        kinds = KINDS if kind == "all" else (kind,)
        right, false, missed = np.sum([_totals({k: s.counts[k] for k in kinds}) for s in scores], 0)
        assert value["f1", kind].value == pytest.approx(2 * right / (2 * right + false + missed))
        assert value["precision", kind].value == pytest.approx(right / (right + false))
        assert value["recall", kind].value == pytest.approx(right / (right + missed))
    assert value["hallucinated_value_rate", ""].value == pytest.approx(3 / (9 + 2 + 2 + 9 + 2))
    assert value["coherence", "empty"].value == pytest.approx(1 / 6)
    # the bootstrap by hand: documents with all their pages
    groups = {d: [i for i, other in enumerate(documents) if other == d] for d in dict.fromkeys(documents)}
    drawn, gen = [], _seeded()
    for start in range(0, 200, 64):
        for draw in torch.randint(5, (min(64, 200 - start), 5), generator=gen).tolist():
            pages = [i for d in draw for i in list(groups.values())[d]]
            right, false, missed = np.sum([_totals(scores[i].counts) for i in pages], 0)
            drawn.append(2 * right / (2 * right + false + missed))
    row = value["f1", "all"]
    assert (row.low, row.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert (row.n, row.split, row.experiment) == (5, "test", "x")
    assert row.extra == {"pages": 6, "read_as": {"json": 3, "prose": 2, "empty": 1}}
    assert all(r.n for r in rows)


def test_rows_go_to_a_file_and_one_document_has_no_interval(tmp_path):
    rows = score_results(_scores([""]), split="test", gen=_seeded())
    write_results(tmp_path / "rows.jsonl", rows)
    assert [r.what for r in read_results(tmp_path / "rows.jsonl")] == [r.what for r in rows]
    value = {(row.what, row.subject): row for row in rows}
    assert value["recall", "all"].value == 0
    assert math.isnan(value["recall", "all"].low)
    # Nothing was stated, so there is no precision, and it rests on no document.
    assert math.isnan(value["precision", "all"].value)
    assert value["precision", "all"].n == 0
    assert value["omission_rate", ""].value == 1


def test_the_reference_rule_counts_terms_and_values_in_the_text():
    score = score_page("1", PAGE, ANSWERS[1])
    # COPD, Metformin, HbA1c; H is a letter of other words, and "PO" is not, nor is "BID"
    assert score.substring_terms == (4, 13)
    assert score.substring_values == (0, 4)
    assert score_page("1", PAGE, ANSWERS[0]).substring_values == (4, 4)


def test_runs_are_compared_on_the_same_documents():
    better = _scores([ANSWERS[0]] * 12)
    worse = _scores([ANSWERS[1]] * 12)
    rows = {row.subject: row for row in compare_runs(better, worse, split="test", n=500, gen=_seeded())}
    row = rows["all"]
    f1 = [2 * r / (2 * r + f + m) for r, f, m in (_totals(better[0].counts), _totals(worse[0].counts))]
    assert row.what == "f1_difference"
    assert row.value == pytest.approx(f1[0] - f1[1])
    assert row.n == 12
    assert row.extra["p"] < 0.01
    assert row.low == pytest.approx(row.value)  # all documents are alike
    turned = {r.subject: r for r in compare_runs(worse, better, split="test", n=500, gen=_seeded())}
    assert turned["all"].value == pytest.approx(-row.value)
    same = {r.subject: r for r in compare_runs(better, better, split="test", n=500, gen=_seeded())}
    assert (same["all"].value, same["all"].extra["p"]) == (0, 1)
    texts = [score_page(f"text {i}", Fields(text="No mass."), "No mass.") for i in range(3)]
    pair = compare_runs(better + texts, worse + texts, split="test", n=50, gen=_seeded())
    assert {row.subject: row.n for row in pair}["all"] == 12  # pages of text alone have no field


def test_five_documents_decide_nothing():
    rows = compare_runs(
        _scores([ANSWERS[0]] * 5), _scores([ANSWERS[3]] * 5), split="test", n=4000, gen=_seeded()
    )
    p = {row.subject: row.extra["p"] for row in rows}
    assert p["all"] > 0.05
    assert p["all"] == pytest.approx(2 / 32, abs=0.015)


def test_a_kind_that_no_page_has_is_no_difference():
    bare = [score_page(str(i), Fields(procedures=["Colonoscopy"]), "nothing") for i in range(8)]
    rows = {row.subject: row for row in compare_runs(bare, bare, split="test", n=50, gen=_seeded())}
    assert math.isnan(rows["labs"].value)
    assert math.isnan(rows["labs"].extra["p"])


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="score_results: must have the score of one page or more, got none"):
        score_results([], split="test", gen=_seeded())
    with pytest.raises(
        ValueError, match=r"compare_runs: .* same pages in the same order, got documents \['0'\]"
    ):
        compare_runs(_scores([""]), _scores(["", ""]), split="test", gen=_seeded())
