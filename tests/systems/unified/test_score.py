"""Scores of drawn heads: what a probe tells of pictures against their reports, and against those of others."""

import numpy as np
import pytest
from attrs import evolve

from medvl.language.conversations import Conversation
from medvl.systems.unified import score
from medvl.systems.unified.probe import FACTS
from tests.systems.unified.test_run import record

HEADS = [
    ("ct", "left", "cyst"),
    ("mr", "left", "cyst"),
    ("mr", "right", "haemorrhage"),
    ("ct", "right", "cyst"),
]


def picture_of(number):
    """A picture that the probe below takes for that of a head."""
    return np.full((11, 11, 3), number, np.uint8)


def drawn(number, case, shown):
    facts = dict(zip(FACTS, HEADS[number], strict=True))
    question = Conversation(messages=({"role": "user", "content": "CT"},), extra={"task": "report", **facts})
    return score.Drawn(
        question=question,
        case=case,
        picture=picture_of(shown),
        target=picture_of(number),
        reconstruction=picture_of(number),
        image=None,
    )


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    def probe(weights, pictures):
        return [dict(zip(FACTS, HEADS[picture[0, 0, 0]], strict=True)) for picture in pictures]

    monkeypatch.setattr(score, "fit_probe", dict)
    monkeypatch.setattr(score, "probe", probe)
    return record(tmp_path)


def values(rows):
    return {(row.subject, row.what): row.value for row in rows}


def test_pictures_are_told_against_their_reports_and_those_of_other_cases(cfg):
    heads = [drawn(0, "a", 0), drawn(1, "a", 0), drawn(2, "b", 2), drawn(2, "b", 3)]
    rows = score.score_reports(cfg, heads, "x")
    found = values(rows)
    ours = {what: found["report: drawn", f"{what}_as_reported"] for what in (*FACTS, "all")}
    assert ours == {"look": 0.5, "side": 1.0, "kind": 0.75, "all": 0.5}
    assert {found["report: vq reconstruction", f"{what}_as_reported"] for what in (*FACTS, "all")} == {1.0}
    # The other case has the other side: none of its reports is right.
    assert found["report: shuffled reports", "side_as_reported"] == 0
    assert found["report: shuffled reports", "all_as_reported"] == 0
    assert {(row.n, row.extra["groups"]) for row in rows} == {(4, 2)}


def test_one_case_has_no_reports_of_others(cfg):
    rows = score.score_reports(cfg, [drawn(0, "a", 0), drawn(1, "a", 1)], "x")
    assert {row.subject for row in rows} == {"report: drawn", "report: vq reconstruction"}


def test_reports_of_others_are_drawn_by_the_seed():
    cases = [str(number // 2) for number in range(40)]
    reports = [{"number": str(number)} for number in range(40)]
    shuffled = score._reports_of_others(reports, cases, 0)
    for number, report in enumerate(shuffled):
        assert int(report["number"]) // 2 != number // 2
    assert (
        shuffled == score._reports_of_others(reports, cases, 0) != score._reports_of_others(reports, cases, 1)
    )


def test_a_copy_is_a_control_only_where_every_picture_has_an_input(cfg):
    heads = [drawn(0, "a", 0), evolve(drawn(1, "b", 1), image=picture_of(3))]
    subjects = {row.subject for row in score.score_likeness(cfg, heads, [], "x")}
    assert subjects == {
        f"{task}: {name}" for task in ("all", "report") for name in ("drawn", "vq reconstruction")
    }
