"""Run folders: one run at a time writes there, an evaluation never reads what is being trained, and what is broken in them is said."""

import contextlib
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
import torch
from attrs import evolve

from medvl.base import files
from medvl.systems import run
from medvl.training import states
from tests.systems.tune.test_run import record

ROOT = Path(__file__).resolve().parents[2]


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
from medvl.base import files
with files.file_lock(sys.argv[1]):
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
    with (
        files.file_lock(folder, shared=True),
        files.file_lock(folder / "results-other"),
    ):  # another evaluation, with other questions
        assert run.evaluate(exp, log=lambda _: None)
        with pytest.raises(ValueError, match="another run is writing to it"):
            run.run(exp, log=lambda _: None)
    with (
        files.file_lock(folder, shared=True),
        files.file_lock(folder / "results"),
        pytest.raises(ValueError, match="results: another run"),
    ):
        run.evaluate(exp, log=lambda _: None)
    assert not [p for p in folder.parent.rglob(".*")]


def test_the_last_of_several_removes_the_lock(tmp_path):
    lock = tmp_path / ".x.lock"
    with files.file_lock(tmp_path / "x", shared=True):
        with files.file_lock(tmp_path / "x", shared=True):
            pass
        assert lock.exists()
        with pytest.raises(ValueError, match="another run"), files.file_lock(tmp_path / "x"):
            pass
    assert not lock.exists()
    with files.file_lock(tmp_path / "x"):
        assert lock.read_text() == f"process {os.getpid()} on {platform.node()}"
        for shared in (False, True):
            with (
                pytest.raises(ValueError, match="another run"),
                files.file_lock(tmp_path / "x", shared=shared),
            ):
                pass


@pytest.mark.parametrize("shared", [False, True])
def test_where_a_file_system_has_no_locks_a_warning_says_so(shared, tmp_path, monkeypatch, caplog):
    def without(handle, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with caplog.at_level(logging.WARNING, "medvl"), files.file_lock(tmp_path / "x", shared=shared):
        pass
    assert "this file system has no locks (No locks available)" in caplog.text


# What is broken, missing or changed ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def changed(path):
    """Whatever is done to a file of the trained run is undone."""
    before = path.read_bytes()
    yield path
    path.write_bytes(before)


def evaluated_both_ways(trained, match):
    exp, folder = trained
    for name in (exp, str(folder)):
        with pytest.raises(ValueError, match=match):
            run.evaluate(name, log=lambda _: None)


def test_a_lost_best_state_is_not_replaced_by_the_last(trained):
    with changed(trained[1] / "1-lora/best.pt") as path:
        path.unlink()
        evaluated_both_ways(trained, r"1-lora/best\.pt: is missing, so the state that was to be kept is lost")


def test_a_run_that_is_not_trained_to_its_end_is_not_evaluated(trained):
    with changed(trained[1] / "1-lora/last.pt") as path:
        states.save_state(path, evolve(states.read_state(path), step=2))
        evaluated_both_ways(
            trained, r"1-lora: is at step 2 of 3; the command that trains it continues from there"
        )


def test_without_the_last_state_a_warning_says_what_is_not_known(trained, caplog):
    with changed(trained[1] / "1-lora/last.pt") as path:
        path.unlink()
        assert run.evaluate(trained[0], log=lambda _: None)
    assert "is missing, so it is unknown whether the run was trained to its end" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(trained):
    with changed(trained[1] / "1-lora/best.pt") as path:
        state = states.read_state(path)
        name = next(iter(state.params["lora"]))
        other = state.params | {
            "lora": state.params["lora"] | {name: {"a": torch.zeros(3, 32), "b": torch.zeros(32, 3)}}
        }
        states.save_state(path, evolve(state, params=other))
        evaluated_both_ways(
            trained,
            r"best\.pt: 2 parameters differ from the model, e\.g\. lora/.*: \(3, 32\) in the file, \(2, 32\) in the",
        )


def test_a_record_that_was_changed_is_found_out(trained, caplog):
    _, folder = trained
    with changed(folder / "config.json") as path:
        raw = json.loads(path.read_text())
        raw["lora"]["alpha"] = 99.0
        path.write_text(json.dumps(raw))
        evaluated_both_ways(
            trained, r"config\.json: was changed after the run was trained with it: \$\.lora\.alpha: .*99\.0"
        )
        raw["lora"]["alpha"] = 16.0
        raw["evaluate"]["max_tokens"] = 3
        path.write_text(json.dumps(raw))
        assert run.evaluate(str(folder), log=lambda _: None)
        assert "was changed after the run was trained with it: $.evaluate.max_tokens: 4 / 3" in caplog.text


@pytest.mark.parametrize(
    "garbage", [b"\xff\xfe\x00garbage\n", b"{}\n", b"[1]\n", b'{"step": "x"}\n', b"null\n"]
)
def test_garbage_in_the_metrics_stops_nothing_and_is_kept(garbage, trained, caplog):
    exp, folder = trained
    with changed(folder / "1-lora/metrics.jsonl") as path:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + garbage + b"".join(lines[1:]))
        assert run.evaluate(exp, log=lambda _: None)
        assert "1-lora/metrics.jsonl, line 2: " in caplog.text
        caplog.clear()
        assert run.run(exp, log=lambda _: None)
        assert "1-lora/metrics.jsonl: 1 lines, the first line 2, hold no step and are left out" in caplog.text
        copy = path.with_name("metrics.broken.jsonl")
        assert garbage in copy.read_bytes()
        assert path.read_bytes() == b"".join(lines)
        copy.unlink()
