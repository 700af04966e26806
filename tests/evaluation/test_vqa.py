"""Answers by one rule, and what is right without an image: a naive count of all other records."""

import numpy as np
import pytest
import torch

from medvl.evaluation.vqa import Labelled, is_right, score_answers

OPTIONS = {"A": "Lung", "B": "Heart.", "C": "heart"}


@pytest.mark.parametrize(
    ("answer", "gold", "options", "right"),
    [
        ("Yes, there is.", "yes", None, True),
        ("No", "yes", None, False),
        (None, "yes", None, False),
        ("A", "A. Lung", OPTIONS, True),
        ("The answer is lung", "A. Lung", OPTIONS, True),
        ("B", "A. Lung", OPTIONS, False),
        ("C", "B. Heart.", OPTIONS, True),  # the same text
        ("A or B", "A. Lung", OPTIONS, False),
        (None, "A. Lung", OPTIONS, False),
    ],
)
def test_when_an_answer_is_right(answer, gold, options, right):
    assert is_right(answer, gold, options) == right


def test_gold_must_be_an_answer():
    assert is_right("Kidney.", "kidney", OPTIONS)  # none of them
    assert not is_right("A", "kidney", OPTIONS)
    with pytest.raises(ValueError, match="gold must hold a word"):
        is_right("A", "...")


def score(answers, gold, families, groups, options=None, train=(), questions=None):
    options, questions = options or [None] * len(gold), questions or [f"{i}?" for i in range(len(gold))]
    records = [
        Labelled(gold=g, question=q, options=o, subjects=(f, ""))
        for g, q, o, f in zip(gold, questions, options, families, strict=True)
    ]
    rows = score_answers(
        answers, records, groups,
        train=train, split="test", experiment="x-1", n=50, gen=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return {(r.subject, r.what): r for r in rows}


def usual_naive(gold):
    """How often the most frequent answer of the others is right; of equally frequent ones any may be."""
    least, most = 0, 0
    for i, own in enumerate(gold):
        others = [*gold[:i], *gold[i + 1 :]]
        best = {g for g in others if others.count(g) == max(map(others.count, others))}
        least, most = least + (best == {own}), most + (own in best)
    return least / len(gold), most / len(gold)


@pytest.mark.parametrize("seed", range(12))
def test_no_record_is_lost_and_constants_are_those_of_a_naive_count(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 30))
    gold = rng.choice(["yes", "no", "lung", "t1"], n, p=[0.4, 0.35, 0.15, 0.1]).tolist()
    families = ["closed" if g in ("yes", "no") else "open" for g in gold]
    answers = [g if rng.random() < 0.5 else "other" for g in gold]
    rows = score(answers, gold, families, rng.integers(0, 5, n).tolist())
    for subject in {"all", *families}:
        of = [i for i, f in enumerate(families) if subject in ("all", f)]
        own = [gold[i] for i in of]
        ours = rows[subject, "accuracy"]
        assert (ours.n, ours.split, ours.experiment) == (len(of), "test", "x-1")
        assert ours.value == pytest.approx(np.mean([answers[i] == gold[i] for i in of]))
        assert rows[subject, "accuracy_of_yes"].value == pytest.approx(np.mean([g == "yes" for g in own]))
        if len(own) > 1:
            least, most = usual_naive(own)
            assert least <= rows[subject, "accuracy_of_the_usual_answer_of_others"].value <= most
    assert {what for _, what in rows} == {
        f"accuracy{x}"
        for x in ("", "_of_yes", "_of_the_usual_answer_of_others", "_of_the_question_alone_of_others")
    }


def test_a_record_does_not_vote_for_itself():
    gold = ["a", "b", "c", "d"]
    assert (
        score(gold, gold, ["open"] * 4, range(4))["open", "accuracy_of_the_usual_answer_of_others"].value == 0
    )
    assert score(["x"], ["x"], ["open"], [0])["open", "accuracy_of_the_usual_answer_of_others"].value == 0
    assert score(gold, ["Yes.", "yes", "YES", "no"], ["closed"] * 4, range(4))[
        "closed", "accuracy_of_the_usual_answer_of_others"
    ].value == pytest.approx(0.75)


def test_choices_have_letters():
    options = [{"A": "x", "B": "y"}, {"A": "x", "B": "z"}, {"A": "x", "B": "y"}, {"A": "u", "B": "v"}]
    gold = ["B. y", "B. z", "A. x", "B. v"]
    rows = score(["B", "A", "x", None], gold, ["choice"] * 4, range(4), options)
    assert rows["choice", "accuracy"].value == 0.5
    assert rows["choice", "accuracy_of_the_usual_answer_of_others"].value == 0.75


def test_the_usual_answer_is_that_of_the_training_split_where_it_has_the_subject():
    gold, families = ["yes", "no", "lung", "B"], ["closed", "closed", "open", "choice"]
    train = [
        Labelled(gold="No.", subjects=["closed"]),
        Labelled(gold="no", subjects=["closed", ""]),
        Labelled(gold="yes", subjects=["closed"]),
        Labelled(gold="A. x", options={"A": "x", "B": "y"}, subjects=["choice"]),
    ]
    rows = score(gold, gold, families, range(4), [None, None, None, {"A": "u", "B": "v"}], train)
    usual = "accuracy_of_the_usual_training_answer"
    assert {key: rows[key, usual].value for key, what in rows if what == usual} == {
        "all": 0.25,  # "no"
        "closed": 0.5,
        "choice": 0.0,  # the letter A
    }
    assert {key for key, what in rows if what == "accuracy_of_the_usual_answer_of_others"} == {"open"}


def test_what_the_question_alone_reaches():
    gold, questions = (
        ["yes", "no", "no", "lung"],
        ["Is it CT?", "is it ct", "Is there a mass?", "Which organ?"],
    )
    train = [
        Labelled(gold=answer, question=question, subjects=["x"])
        for answer, question in (
            *[("yes", "Is it CT?")] * 2,
            ("no", "Is it CT?"),
            *[("no", "Is there air?")] * 3,
            ("lung", "Which organ?"),
        )
    ]
    rows = score(gold, gold, ["x"] * 4, range(4), train=train, questions=questions)
    # "yes" to both about CT, "no" where the question is new, "lung" as in training.
    assert rows["x", "accuracy_of_the_question_alone"].value == 0.75
    assert rows["x", "accuracy_of_the_usual_training_answer"].value == 0.5
    assert ("x", "accuracy_of_the_question_alone_of_others") not in rows


@pytest.mark.parametrize("seed", range(6))
def test_without_training_records_others_with_the_same_question_say_it(seed):
    rng = np.random.default_rng(seed)
    n = 20
    gold, questions = (
        rng.choice(["yes", "no", "lung"], n).tolist(),
        rng.choice(["a?", "b?", "c?"], n).tolist(),
    )
    rows = score(gold, gold, ["x"] * n, range(n), questions=questions)
    least = most = 0.0
    for question in {*questions}:
        own = [g for g, q in zip(gold, questions, strict=True) if q == question]
        if len(own) == 1:
            least, most = least + 0, most + 1  # the usual answer, right or not
        else:
            low, high = usual_naive(own)
            least, most = least + low * len(own), most + high * len(own)
    value = rows["x", "accuracy_of_the_question_alone_of_others"].value * n
    assert least - 1e-9 <= value <= most + 1e-9
