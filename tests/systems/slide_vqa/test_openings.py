"""In one run each file is opened once: questions, labels, features or a packed store, the run's tokenizer."""

import json
from collections import Counter
from pathlib import Path

import h5py
import pytest

from medvl.hub import tokens
from medvl.slides import opened, pack
from medvl.systems import run
from medvl.systems.slide_vqa import SYSTEM, data
from tests.openings import count_openings
from tests.systems.slide_vqa.test_run import record

QUESTIONS = ("captions.json", "train.json", "valid.json", "test.csv", "labels.csv")


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The files of features of a run's slides, drawn but not opened by this process."""
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    (tmp_path / "toy.json").write_text(json.dumps(record(tmp_path)))
    cfg, _ = run.resolve(str(tmp_path / "toy.json"))
    SYSTEM.prepare(cfg, lambda _: None)
    for cache in (data._read_questions, data._read_table, opened._open, opened._read_key):
        cache.cache_clear()
    return sorted((tmp_path / "data").rglob("features/*.h5"))


@pytest.fixture
def h5_files(monkeypatch):
    """{name of a file: how often h5py opens it for reading}."""
    real, counts = h5py.File, Counter()

    def open_h5(name, mode="r", **settings):
        counts[Path(name).name] += mode == "r"
        return real(name, mode, **settings)

    monkeypatch.setattr(h5py, "File", open_h5)
    return counts


def test_a_run_opens_each_file_once(drawn, tmp_path, monkeypatch, h5_files):
    tokenizers = []
    read_tokenizer = tokens.tokenizer
    monkeypatch.setattr(tokens, "tokenizer", lambda name: tokenizers.append(name) or read_tokenizer(name))
    with count_openings() as counts:
        run.run(str(tmp_path / "toy.json"), log=lambda _: None)
    assert {name: counts[name] for name in QUESTIONS} == dict.fromkeys(QUESTIONS, 1)
    assert len(tokenizers) == 1
    features = {path.name for path in drawn}
    assert {name: h5_files[name] for name in features} == dict.fromkeys(features, 1)
    # Beside h5py: the first bytes, which tell the format, and the fingerprint, by which tokens are found again.
    assert {counts[name] for name in features} == {2}


def test_a_run_opens_a_packed_store_once(drawn, tmp_path, h5_files):
    pack.pack(drawn, tmp_path / "store.h5", dtype="float32")
    raw = record(tmp_path, data__features=str(tmp_path / "store.h5"))
    (tmp_path / "toy.json").write_text(json.dumps(raw))
    h5_files.clear()
    with count_openings() as counts:
        run.run(str(tmp_path / "toy.json"), log=lambda _: None)
    assert {name: counts[name] for name in QUESTIONS} == dict.fromkeys(QUESTIONS, 1)
    # h5py reads the table of slides; patches are read through a descriptor that stays open.
    assert h5_files["store.h5"] == 1
    assert counts["store.h5"] == 1
    # What was packed is not looked at again.
    assert {h5_files[path.name] + counts[path.name] for path in drawn} == {0}
