"""results: rows go to a file and back, the environment names no person or place, tables show every number."""

import json
import math
import os
import platform
import re
import subprocess

import attrs
import pytest

from medvl.evaluation import results
from medvl.evaluation.results import Result, html_table, markdown_table, read_results, write_results

ROWS = [
    Result(what="auroc", value=0.5),
    Result(
        what="accuracy",
        subject="Höhe | <b>",
        split="test",
        value=math.nan,
        low=0.1,
        high=0.9,
        n=12,
        experiment="ct-0a1b2c3d",
        commit="abc+",
        device="cpu",
        shape="[2, 3]",
        latency_ms=1.5,
        peak_mib=2.0,
        extra={"p": 0.01, "names": ["a", "b"]},
    ),
]


def _plain(rows):
    """Rows in which nan equals nan."""
    return [{k: repr(v) for k, v in attrs.asdict(r).items()} for r in rows]


def test_rows_go_to_a_file_and_back(tmp_path):
    path = tmp_path / "results.jsonl"
    write_results(path, ROWS)
    assert _plain(read_results(path)) == _plain(ROWS)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    # JSON has no nan: other readers refuse it.
    parsed = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert parsed[0]["low"] is None
    assert parsed[1]["extra"] == {"p": 0.01, "names": ["a", "b"]}
    write_results(path, [])
    assert read_results(path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.jsonl"
    write_results(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_results(path, [Result(what="x", value=1.0, extra={"set": {1}})])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_environment():
    found = results.environment()
    assert {"python", "torch", "packages", "cores", "gpu", "commit"} <= found.keys()
    assert {"torch", "transformers", "numpy"} <= found["packages"].keys()
    text = json.dumps(found)
    assert os.path.expanduser("~") not in text
    assert platform.node() not in text.replace(found["platform"], "")
    assert results.device_name()


def test_commit_of_this_checkout(monkeypatch):
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", results.commit())
    # without git, or outside of a checkout
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError("no git")))
    assert results.commit() == ""


def test_markdown_table():
    text = markdown_table(["Name", "n", "Value"], [["a|b", 3, 0.12345], ["c", 4, math.nan]])
    assert text == "| Name | n | Value |\n|---|--:|--:|\n| a\\|b | 3 | 0.123 |\n| c | 4 | – |\n"
    assert markdown_table(["a"], []) == "| a |\n|---|\n"
    assert markdown_table(["a", "b"], [[-1.5, "1.2.3"]]).splitlines()[1] == "|--:|---|"


def test_html_table_is_escaped():
    text = html_table(["<a>", "b"], [["<script>", 0.5], ["&", math.nan]])
    assert "<script>" not in text
    for part in ("<th>&lt;a&gt;</th>", "<td>&lt;script&gt;</td><td>0.500</td>", "<td>&amp;</td><td>–</td>"):
        assert part in text
