"""`invoke conversations convert` and `invoke data`."""

import json

import pytest

from medvl.base.config import ConfigError
from medvl.commands import data
from tests.tiny import turns


def test_conversations_are_converted(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "b.json"
    source.write_text(json.dumps({"messages": turns("q", "a"), "id": 3}) + "\n")
    data.convert("convert", str(source), str(out), "llava")
    assert capsys.readouterr().out == f"{out}: 1 conversations\n"
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert json.loads(out.read_text()) == [{"id": 3, "conversations": said}]
    for action, shape in (("check", "trl"), ("convert", "alpaca")):
        with pytest.raises(
            ValueError, match=f"must be convert with --shape llava.* got '{action}' and '{shape}'"
        ):
            data.convert(action, str(source), str(out), shape)
    with pytest.raises(ValueError, match="no such file"):
        data.convert("convert", str(tmp_path / "no.jsonl"), str(out), "trl")


def test_data_sets_of_a_record(tmp_path, capsys):
    notes = tmp_path / "notes.jsonl"
    lines = [
        {"id": str(i), "text": f"Patient {i} was given Lasix 40 mg IV for oedema of both legs, {i}."}
        for i in range(9)
    ]
    lines.append({"id": "9", "text": "He went home."})
    notes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = tmp_path / "documents.toml"
    record.write_text(f'[data]\nsources = [{{name = "notes", kind = "notes", path = "{notes}"}}]\n')
    data.fetch(str(record), (f"data.folder={tmp_path / 'out'}",))
    said = capsys.readouterr().out
    assert "notes: 10 rows of" in said
    assert "notes: conversations left out: 1 of an answer shorter than 50 characters\n" in said
    assert said.endswith("not for commercial use: the licence of a source does not grant it\n")
    tables = [(tmp_path / f"out/{split}.jsonl").read_text() for split in ("train", "valid", "test")]
    assert sum(table.count("\n") for table in tables) == 9
    with pytest.raises(ConfigError, match=r"documents.toml, \[data\]: .*folders"):
        data.fetch(str(record), ("data.folders=x",))
    record.write_text("seed = 1\n")
    with pytest.raises(ConfigError, match=r"must have a table \[data\] with sources, found seed"):
        data.fetch(str(record))
    with pytest.raises(ConfigError, match="no such experiment or run"):
        data.fetch("no such experiment")
