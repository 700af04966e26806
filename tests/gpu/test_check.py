"""benches/gpu/check.py: phases in processes of their own, what is kept of one that fails, and two toy phases."""

import json
import time

import pytest
import torch

from benches.gpu import check, data, machine
from benches.gpu.measure import Place, Results, attempt, timed

TINY = Place(torch.device("cpu"), tiny=True)


def numbers_of(phase, tmp_path):
    results = Results(tmp_path / "phase.json")
    phase(TINY, results)
    return results


def test_the_phases_are_those_of_the_readme():
    readme = (check.Path(check.__file__).parent / "README.md").read_text()
    listed = [name for name in check.PHASES if f"| `{name}` |" in readme]
    assert listed == list(check.PHASES)


def test_toy_phases_run_and_are_on_disk(tmp_path):
    for phase in (data.compressor, data.data_path):
        results = numbers_of(phase, tmp_path)
        assert not [value for value in results.values() if isinstance(value, dict) and "error" in value]
        assert json.loads((tmp_path / "phase.json").read_text()) == results


def test_the_ceilings_are_of_this_machine(tmp_path):
    results = numbers_of(machine.ceilings, tmp_path)
    assert results["versions"]["torch"] == torch.__version__
    assert results["tflops float32"] > 0


def fails(place, results):
    results["before"] = 1
    raise ValueError("a reason")


def dies(place, results):
    results["before"] = 2
    check.os._exit(7)


def hangs(place, results):
    results["before"] = 3
    time.sleep(60)


def works(place, results):
    attempt(results, "peer", lambda: 1 / 0)
    results["cases"], results["failed"], results["one"], results["two"] = 2, ["two"], 1.0, 2.0


def test_a_phase_that_fails_says_why_and_stops_no_other(tmp_path, monkeypatch, capsys):
    phases = {f.__name__: check.Phase(f, 60) for f in (fails, dies, hangs, works)}
    monkeypatch.setattr(check, "PHASES", phases)
    monkeypatch.setattr(check, "_LEAST_SECONDS", 0.0)
    results = check.run_phases(TINY, ["fails", "dies", "works"], tmp_path, 100)
    assert results["fails"]["error"] == "ValueError: a reason"
    assert "exit code 7" in results["dies"]["error"]
    assert [results[name]["before"] for name in ("fails", "dies")] == [1, 2]
    assert "ZeroDivisionError" in results["works"]["peer"]["error"]
    assert json.loads((tmp_path / "check.json").read_text()) == results
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["works"] == {
        "cases": 2,
        "failed": ["two"],
        "two": 2.0,
        "seconds": results["works"]["seconds"],
    }
    # Limits hold where there is a GPU.
    real = Place(torch.device("cpu"), tiny=False)
    assert "limit of 1 s" in check.run_phase(real, "hangs", tmp_path, 1.0)["error"]
    assert check.run_phases(real, ["works"], tmp_path, -1.0)["works"]["error"] == "no time was left"


def test_without_a_gpu_only_the_rehearsal_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here; --tiny"):
        check.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        check.main(["--only", "nosuch", "--tiny"])


def test_a_measured_call_is_warmed_up_and_repeated():
    calls = []
    numbers = timed(TINY, lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 5
    assert set(numbers) == {"s", "host_share"}
