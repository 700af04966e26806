"""What every bench shares: `measure`, a committed baseline that any machine finds, and failure when a bench needs more memory than there.

    pytest benches/                          time and memory
    pytest benches/ --benchmark-compare      against benches/baseline/{cpu,cuda}; exit code 1 where the peak memory grew
    pytest benches/ --save-baseline          make that baseline (again)

Latency is compared for reading, and fails only where --benchmark-compare-fail says so: it belongs to a machine, memory to the code.
"""

import gc
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # threads that spin for each other make a loaded machine's figures worthless

import pytest
import torch
from pytest_benchmark.session import PerformanceRegression
from torch.profiler import ProfilerActivity, profile

from medvl.evaluation import results

KIND = "cuda" if torch.cuda.is_available() else "cpu"
FOLDER = (
    Path(__file__).parent / "baseline" / KIND
)  # a file here, not in a folder named after a machine, is found by every machine
BASELINE = FOLDER / "0001_baseline.json"
GROWTH, SLACK_MIB = 1.10, 0.5  # what a peak may grow: 10 % and half a MiB
THREADS = 2  # while memory is measured: kernels allocate scratch for each thread

_then: pytest.StashKey[dict[str, dict]] = pytest.StashKey()
_notes: pytest.StashKey[list[str]] = pytest.StashKey()


@pytest.fixture
def measure(benchmark, request):
    """measure(fn, *args, rounds=20, **shape): calls fn(*args), returns what it returned.

    Latency comes from pytest-benchmark; extra_info gets device, shape and `peak_mib`, see `peak_memory`. Under --benchmark-compare the
    bench fails if that peak is above the baseline's by more than 10 % and 0.5 MiB, or if the baseline was measured with another shape.
    """

    def run(fn: Callable, *args: Any, rounds: int = 20, **shape: Any) -> Any:
        if not benchmark.enabled:
            return benchmark.pedantic(fn, args, rounds=1)
        wait = torch.cuda.synchronize if KIND == "cuda" else lambda: None
        out, peak = peak_memory(lambda: fn(*args))
        benchmark.pedantic(
            lambda: (fn(*args), wait()), rounds=rounds, warmup_rounds=1
        )  # without the wait we would time the launch
        now = {
            "device": results.device_name(),
            "threads": torch.get_num_threads(),
            "peak_mib": round(peak, 3),
            "shape": json.loads(json.dumps(shape)),
        }  # as the baseline reads it
        benchmark.extra_info |= now
        if wrong := regression(request.config, benchmark.fullname, now):
            pytest.fail(wrong, pytrace=False)
        return out

    return run


def peak_memory(call: Callable[[], Any]) -> tuple[Any, float]:
    """(result, MiB) where MiB is the most that one warm call holds at once above what was there before; its result counts, its inputs not.

    On CUDA what the allocator of torch handed out. On CPU the high water of torch's allocator (from its profiler) plus that of Python's and
    numpy's (from tracemalloc): the same to the byte each time, unlike resident memory, which depends on what the heap kept. Not seen are
    allocations inside C libraries that use neither, and torch operations in other Python threads.
    """
    call()
    gc.collect()
    if KIND == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call()
        torch.cuda.synchronize()
        return out, (torch.cuda.max_memory_allocated() - before) / 2**20
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            tracemalloc.start()
            out = call()
            python = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    finally:
        tracemalloc.stop()
        torch.set_num_threads(threads)
    return out, (python + _high_water(trace)) / 2**20


def regression(config: pytest.Config, name: str, now: dict) -> str:
    """What is worse than in the baseline, or ""."""
    if not config.option.benchmark_compare or not config.stash[_then]:
        return ""
    then = config.stash[_then].get(name, {})
    if "peak_mib" not in then:
        config.stash[_notes].append(f"{name}: not in the baseline, its memory is not compared")
        return ""
    if then["shape"] != now["shape"]:
        return f"{name}: measured with shape {now['shape']}, in the baseline with {then['shape']}; make it again with --save-baseline"
    limit = then["peak_mib"] * GROWTH + SLACK_MIB
    if now["peak_mib"] <= limit:
        config.stash[_notes].append(f"{name}: {now['peak_mib']:.2f} MiB, baseline {then['peak_mib']:.2f}")
        return ""
    return f"{name}: peak memory {now['peak_mib']:.2f} MiB must be at most {limit:.2f}; the baseline has {then['peak_mib']:.2f}"


def _high_water(trace: profile) -> int:
    with TemporaryDirectory() as folder:
        trace.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    held = most = 0
    for event in sorted(
        (e for e in events if e.get("name") == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"])
    ):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def pytest_addoption(parser):
    parser.addoption(
        "--save-baseline",
        action="store_true",
        help=f"write {BASELINE.relative_to(BASELINE.parents[3])} from this run",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads these options
def pytest_configure(config):
    config.stash[_then], config.stash[_notes] = {}, []
    if config.option.benchmark_storage == "file://./.benchmarks":
        config.option.benchmark_storage = f"file://{FOLDER}"
    if config.option.save_baseline:
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = BASELINE


def pytest_sessionstart(session):
    options = session.config.option
    if session.config.stash[_then]:
        return
    missing = f"no baseline for {KIND} in {FOLDER}; make one with --save-baseline"
    if options.benchmark_compare_fail:  # asked to fail on what cannot be known
        raise pytest.UsageError(
            f"--benchmark-compare-fail goes with --benchmark-compare and a baseline: {missing}"
        )
    if options.benchmark_compare:
        session.config.stash[_notes].append(f"nothing is compared: {missing}")


def pytest_benchmark_compare_machine_info(config, compared_benchmark):
    config.stash[_then] |= {b["fullname"]: b["extra_info"] for b in compared_benchmark["benchmarks"]}


def pytest_benchmark_generate_machine_info(config):
    return {
        k: v for k, v in results.environment().items() if k != "commit"
    }  # no host name, unlike the default


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info["project"] = "medvl"  # the default is the name of the folder


def pytest_benchmark_update_json(config, output_json):
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)  # every single time: the quartiles say enough
    if config.option.save_baseline and BASELINE.exists():
        before = {b["fullname"] for b in json.loads(BASELINE.read_text())["benchmarks"]}
        gone = before - {b["fullname"] for b in output_json["benchmarks"]}
        config.stash[_notes] += [f"{name}: did not run, no longer in the baseline" for name in sorted(gone)]


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter, config):
    try:
        yield
    except PerformanceRegression:  # it has listed which; raised on, it would end pytest in a traceback
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.stash[_notes]:
        terminalreporter.section("peak memory")
        for note in config.stash[_notes]:
            terminalreporter.write_line(note)
