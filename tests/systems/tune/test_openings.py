"""In one run each file of conversations is opened once."""

import json

from medvl.systems import run
from tests.openings import count_openings
from tests.systems.tune.test_run import record

CONVERSATIONS = ("train.jsonl", "valid.jsonl", "test.jsonl")


def test_a_run_opens_each_file_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    (tmp_path / "toy.json").write_text(json.dumps(record(tmp_path)))
    with count_openings() as counts:
        run.run(str(tmp_path / "toy.json"), log=lambda _: None)
    assert {name: counts[name] for name in CONVERSATIONS} == dict.fromkeys(CONVERSATIONS, 1)
