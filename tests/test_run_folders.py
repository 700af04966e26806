"""Run folders: one run at a time writes there, an evaluation never reads what is being trained, and what is broken in them is said."""

import errno
import fcntl
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_tune import record

from medvl import files
from medvl.systems import run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(experiment, folder) of a tiny trained run; tests that change it put it back."""
    place = tmp_path_factory.mktemp("runs")
    before, run.RUNS = run.RUNS, place / "runs"
    (place / "toy.json").write_text(json.dumps(record(place)))
    run.run(str(place / "toy.json"), log=lambda _: None)
    (folder,) = run.RUNS.iterdir()
    yield str(place / "toy.json"), folder
    run.RUNS = before


HOLD = """
import sys, time
from medvl import files
with files.alone(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def _holder(folder):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    held = subprocess.Popen([sys.executable, "-c", HOLD, folder], env=env, stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "held\n"
    return held


def test_a_second_run_in_one_folder_is_refused_and_a_dead_one_blocks_nobody(trained):
    exp, folder = trained
    half = folder / "1-lora/.last.pt.other.tmp"
    half.write_bytes(b"what the first run is writing")
    held = _holder(folder)
    said = rf"{folder.name}: another run is writing to it \(process {held.pid} on {platform.node()}\); wait until it ends"
    for call in (run.run, run.evaluate):
        with pytest.raises(ValueError, match=said):
            call(exp, log=lambda _: None)
    with pytest.raises(ValueError, match=said):
        run.evaluate(str(folder / "config.json"), log=lambda _: None)
    assert half.exists()
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert folder.with_name(f".{folder.name}.lock").exists()
    run.run(exp, log=lambda _: None)
    assert not half.exists()
    assert not list(folder.parent.glob(".*"))


def test_evaluations_run_side_by_side_where_their_results_do(trained):
    exp, folder = trained
    with files.alone(folder, shared=True), files.alone(folder / "results-other"):  # another evaluation, with other questions
        assert run.evaluate(exp, log=lambda _: None)
        with pytest.raises(ValueError, match="another run is writing to it"):
            run.run(exp, log=lambda _: None)
    with files.alone(folder, shared=True), files.alone(folder / "results"), pytest.raises(ValueError, match="results: another run"):
        run.evaluate(exp, log=lambda _: None)
    assert not [p for p in folder.parent.rglob(".*")]


def test_the_last_of_several_removes_the_lock(tmp_path):
    lock = tmp_path / ".x.lock"
    with files.alone(tmp_path / "x", shared=True):
        with files.alone(tmp_path / "x", shared=True):
            pass
        assert lock.exists()
        with pytest.raises(ValueError, match="another run"), files.alone(tmp_path / "x"):
            pass
    assert not lock.exists()
    with files.alone(tmp_path / "x"):
        assert lock.read_text() == f"process {os.getpid()} on {platform.node()}"
        for shared in (False, True):
            with pytest.raises(ValueError, match="another run"), files.alone(tmp_path / "x", shared=shared):
                pass


@pytest.mark.parametrize("shared", [False, True])
def test_where_a_file_system_has_no_locks_a_warning_says_so(shared, tmp_path, monkeypatch, caplog):
    def without(handle, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with caplog.at_level(logging.WARNING, "medvl"), files.alone(tmp_path / "x", shared=shared):
        pass
    assert "this file system has no locks (No locks available)" in caplog.text
