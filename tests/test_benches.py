"""The benches' own instrument: peaks are what was allocated, and a bench that needs more memory than the baseline fails."""

import importlib.util
import json
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def instrument():
    spec = importlib.util.spec_from_file_location("benches_conftest", ROOT / "benches" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torch():
    a = torch.empty(4 * MIB // 4)
    b = a + 1
    del a
    return b * 2  # two of 4 MiB at once, three in all


def _numpy():
    a = np.ones(4 * MIB // 8)
    b = a + 1
    del a
    return b * 2


def _gradient():
    x = torch.ones(MIB // 4, requires_grad=True)
    return torch.autograd.grad((x.exp().exp()).sum(), x)[0]  # x, both saved values, one gradient or two


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the host")
@pytest.mark.parametrize(
    ("call", "low", "high"), [(_torch, 8, 8.01), (_numpy, 8, 8.05), (_gradient, 4, 6.01)]
)
def test_peak_is_what_was_held_at_once(instrument, call, low, high):
    torch.manual_seed(0)
    peaks = [instrument.peak_memory(call)[1] for _ in range(2)]
    assert low <= peaks[0] <= high
    assert peaks[0] == pytest.approx(peaks[1], abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the host")
def test_peak_leaves_out_what_was_there_before(instrument):
    before = torch.ones(8 * MIB // 4)
    threads = torch.get_num_threads()
    out, peak = instrument.peak_memory(lambda: before.sum())
    assert (float(out), torch.get_num_threads()) == (8 * MIB // 4, threads)
    assert peak < 0.1


BENCH = """
import os
import torch

def bench_one(measure):
    n = int(os.environ["MIB"]) * 2**18
    assert measure(lambda: torch.zeros(n), rounds=2, shape_of=int(os.environ.get("SHAPE", 1))).numel() == n
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs benches/ of a checkout that has only BENCH: (exit code, what was printed)."""
    (tmp_path / "benches").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n")
    shutil.copy(ROOT / "benches" / "conftest.py", tmp_path / "benches")
    (tmp_path / "benches" / "bench_one.py").write_text(BENCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # its presence would turn benches off

    def run(*args, mib, shape=1):
        monkeypatch.setenv("MIB", str(mib))
        monkeypatch.setenv("SHAPE", str(shape))
        code = pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "benches", *args])
        return code, "".join(capsys.readouterr())

    yield run
    for name in [
        n for n, m in sys.modules.items() if str(getattr(m, "__file__", None)).startswith(str(tmp_path))
    ]:
        del sys.modules[name]  # the next test has a conftest of its own under the same name


@pytest.mark.filterwarnings("ignore:Can't compare")
def test_more_memory_than_the_baseline_fails(run, tmp_path):
    assert run("--save-baseline", mib=20)[0] == 0
    (saved,) = (tmp_path / "benches" / "baseline").rglob("*.json")
    assert platform.node() not in saved.read_text()
    code, text = run("--benchmark-compare", mib=22)  # within 10 % and half a MiB
    assert code == 0, text
    assert "22.00 MiB, baseline 20.00" in text
    code, text = run("--benchmark-compare", mib=23)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "peak memory 23.00 MiB must be at most 22.50; the baseline has 20.00" in text
    code, text = run("--benchmark-compare", mib=20, shape=2)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "make it again with --save-baseline" in text


@pytest.mark.filterwarnings("ignore:Can't compare")
def test_without_a_baseline_everything_runs_and_the_end_says_so(run):
    code, text = run("--benchmark-compare", mib=20)
    assert code == 0, text
    assert "nothing is compared: no baseline for cpu in " in text
    assert "bench_one" in text
    for options in (("--benchmark-compare",), ()):
        code, text = run(*options, "--benchmark-compare-fail=median:50%", mib=20)
        assert code == pytest.ExitCode.USAGE_ERROR
        assert (
            "--benchmark-compare-fail goes with --benchmark-compare and a baseline: no baseline for cpu"
            in text
        )
        assert "Traceback" not in text


def test_a_bench_that_is_not_in_the_baseline_is_named(run, tmp_path):
    run("--save-baseline", mib=20)
    (tmp_path / "benches" / "bench_two.py").write_text(BENCH.replace("bench_one", "bench_two"))
    code, text = run("--benchmark-compare", mib=20)
    assert code == 0, text
    assert "20.00 MiB, baseline 20.00" in text
    assert "bench_two.py::bench_two: not in the baseline, its memory is not compared" in text


def test_a_slower_bench_fails_without_a_traceback(run, tmp_path):
    run("--save-baseline", mib=20)
    (saved,) = (tmp_path / "benches" / "baseline").rglob("*.json")
    held = json.loads(saved.read_text())
    held["benchmarks"][0]["stats"] |= {"median": 1e-9, "min": 1e-9}
    saved.write_text(json.dumps(held))
    code, text = run("--benchmark-compare", "--benchmark-compare-fail=median:50%", mib=20)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "Performance has regressed" in text
    assert "20.00 MiB, baseline 20.00" in text
    assert "Traceback" not in text
    assert "INTERNALERROR" not in text


BESIDE = """
import os
import time

def work(loops):
    for _ in range(loops * 1000):
        pass

def bench_beside(measure):
    slept = float(os.environ.get("SLEEP", 0))
    measure(lambda: (work(int(os.environ["LOOPS"])), time.sleep(slept)), rounds=1, peer=lambda: work(200))
"""


@pytest.mark.filterwarnings("ignore:Can't compare")
def test_more_time_beside_a_peer_than_the_baseline_fails(run, tmp_path, monkeypatch):
    (tmp_path / "benches" / "bench_one.py").write_text(BESIDE)
    monkeypatch.setenv("LOOPS", "200")
    assert run("--save-baseline", mib=0)[0] == 0
    (saved,) = (tmp_path / "benches" / "baseline").rglob("*.json")
    held = json.loads(saved.read_text())
    found = held["benchmarks"][0]["extra_info"]["time_of_peer"]
    assert 0.7 < found < 1.4
    held["benchmarks"][0]["extra_info"]["time_of_peer"] = 1.0  # not as this machine happened to be
    saved.write_text(json.dumps(held))
    code, text = run("--benchmark-compare", mib=0)
    assert code == 0, text
    assert "of its peer's, baseline 1.000" in text
    monkeypatch.setenv("LOOPS", "300")
    code, text = run("--benchmark-compare", mib=0)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "of its peer's must be at most 1.150; the baseline has 1.000" in text
    monkeypatch.setenv("LOOPS", "200")
    monkeypatch.setenv("SLEEP", "0.01")  # waiting counts, too
    assert run("--benchmark-compare", mib=0)[0] == pytest.ExitCode.TESTS_FAILED


def test_rows_are_added_to_the_baseline_and_the_others_kept(run, tmp_path):
    run("--save-baseline", mib=20)
    (saved,) = (tmp_path / "benches" / "baseline").rglob("*.json")
    before = json.loads(saved.read_text())
    (tmp_path / "benches" / "bench_two.py").write_text(BENCH.replace("bench_one", "bench_two"))
    code, text = run("--add-to-baseline", "-k", "bench_two", mib=30)
    assert code == 0, text
    after = json.loads(saved.read_text())
    assert after["machine_info"] == before["machine_info"]
    assert after["benchmarks"][0] == before["benchmarks"][0]
    assert [row["extra_info"]["peak_mib"] for row in after["benchmarks"]] == [20.0, 30.0]
    assert after["benchmarks"][1]["extra_info"]["environment"]["torch"] == torch.__version__
