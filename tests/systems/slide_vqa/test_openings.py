"""In one run each file is opened once: questions, labels, features, the run's tokenizer."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import h5py
import pytest

from medvl.hub import tokens
from medvl.slides import opened
from medvl.systems import run
from medvl.systems.slide_vqa import SYSTEM, data
from tests.systems.slide_vqa.test_run import record

QUESTIONS = ("captions.json", "train.json", "valid.json", "test.csv", "labels.csv")
COUNTS: list[
    Counter
] = []  # the audit hook of a process cannot be taken away; it counts into the last of these


def count_open(event, args):
    if event == "open" and COUNTS and isinstance(args[0], str | os.PathLike) and "w" not in str(args[1]):
        COUNTS[-1][Path(args[0]).name] += 1


sys.addaudithook(count_open)


@pytest.fixture
def counts():
    COUNTS.append(Counter())
    yield COUNTS[-1]
    COUNTS.clear()


def test_a_run_opens_each_file_once(tmp_path, monkeypatch, counts):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    (tmp_path / "toy.json").write_text(json.dumps(record(tmp_path)))
    cfg, _ = run.resolve(str(tmp_path / "toy.json"))
    SYSTEM.prepare(cfg, lambda _: None)  # draws the slides
    for cache in (data._read_questions, data._read_table, opened._open, opened._read_key):
        cache.cache_clear()
    counts.clear()
    real, h5_files = h5py.File, Counter()

    def open_h5(name, mode="r", **settings):
        h5_files[Path(name).name] += mode == "r"
        return real(name, mode, **settings)

    tokenizers = []
    read_tokenizer = tokens.tokenizer
    monkeypatch.setattr(h5py, "File", open_h5)
    monkeypatch.setattr(tokens, "tokenizer", lambda name: tokenizers.append(name) or read_tokenizer(name))
    run.run(str(tmp_path / "toy.json"), log=lambda _: None)
    assert {name: counts[name] for name in QUESTIONS} == dict.fromkeys(QUESTIONS, 1)
    assert len(tokenizers) == 1
    features = {path.name for path in (tmp_path / "data").rglob("features/*.h5")}
    assert {name: h5_files[name] for name in features} == dict.fromkeys(features, 1)
    # Beside h5py: the first bytes, which tell the format, and the fingerprint, by which tokens are found again.
    assert {counts[name] for name in features} == {2}


def test_patches_are_kept_within_a_budget(tmp_path, monkeypatch):
    path = tmp_path / "S.h5"
    with h5py.File(path, "w") as f:
        f["features"] = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    monkeypatch.setattr(opened, "_kept_bytes", opened.KEPT_BYTES)
    read = [x.tolist() for x, _ in opened.file_chunks(path, 2)]
    opened._open.cache_clear()
    monkeypatch.setattr(opened, "_kept_bytes", 0)
    kept = [x.tolist() for x, _ in opened.file_chunks(path, 2)]
    assert read == kept == [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]]
    assert opened._kept_bytes > 0
    assert opened.about_file(path).rows == 3
    with pytest.raises(ValueError, match="features must be 3 numbers per patch, got 2"):
        list(opened.file_chunks(path, 2, dims=3))
