"""In one run each file of conversations is opened once, those of the base model too."""

import json

import pytest

from medvl.systems import run
from tests.openings import count_openings
from tests.systems.adapters.test_run import record

SPLITS = ("train.jsonl", "valid.jsonl", "test.jsonl")
GENERAL = ("base_train.jsonl", "base_valid.jsonl")


# Without conversations of its own the base model is trained on those of all tasks.
@pytest.mark.parametrize(
    ("general", "names"), [("{folder}/base_{split}.jsonl", (*SPLITS, *GENERAL)), ("", SPLITS)]
)
def test_a_run_opens_each_file_once(tmp_path, monkeypatch, general, names):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    raw = record(tmp_path, data__general=general)
    (tmp_path / "toy.json").write_text(json.dumps(raw))
    with count_openings() as counts:
        run.run(str(tmp_path / "toy.json"), log=lambda _: None)
    opened = {path.name: counts[path.name] for path in (tmp_path / "data").rglob("*.jsonl")}
    assert {name: count for name, count in opened.items() if count} == dict.fromkeys(names, 1)
