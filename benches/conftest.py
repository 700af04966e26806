"""What every bench shares: `measure`, a committed baseline that any machine finds, and failure when a bench needs more memory than there.

    pytest benches/                          time and memory
    pytest benches/ --benchmark-compare      against benches/baseline/{cpu,cuda}; exit code 1 where the peak memory grew, or the
                                             time beside a peer
    pytest benches/ --save-baseline          make that baseline again, from all benches
    pytest benches/bench_NAME.py --add-to-baseline    put the rows of some benches into it, and keep the others

Seconds belong to a machine, so they are compared for reading, and fail only where --benchmark-compare-fail says so. Seconds
divided by those of another program at the same task, measured in turns, belong to the code, as memory does.
"""

import gc
import json
import math
import os
import statistics
import time
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
SLOWER = 1.15  # what the time beside a peer may grow
TURNS = (12, 60)  # of a bench and its peer: at least and, where they are short, at most
THREADS = 2  # while memory is measured: kernels allocate scratch for each thread

_then: pytest.StashKey[dict[str, dict]] = pytest.StashKey()
_notes: pytest.StashKey[list[str]] = pytest.StashKey()


@pytest.fixture
def measure(benchmark, request):
    """measure(fn, *args, rounds=20, peer=None, **shape): calls fn(*args), returns what it returned.

    Latency comes from pytest-benchmark; extra_info gets device, shape and `peak_mib`, see `peak_memory`. Under --benchmark-compare the
    bench fails if that peak is above the baseline's by more than 10 % and 0.5 MiB, or if the baseline was measured with another shape.
    With a `peer`, a call of another program that does the same, extra_info gets `time_of_peer`, see `time_beside`; the bench fails if
    it is above the baseline's by more than 15 % three times in a row.
    """

    def run(
        fn: Callable, *args: Any, rounds: int = 20, peer: Callable[[], Any] | None = None, **shape: Any
    ) -> Any:
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
        if peer is not None:
            limit = slowest(request.config, benchmark.fullname)
            for _ in range(3):  # noise seldom comes three times
                now["time_of_peer"] = round(time_beside(lambda: fn(*args), peer), 3)
                if now["time_of_peer"] <= limit:
                    break
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


def time_beside(ours: Callable[[], Any], peer: Callable[[], Any]) -> float:
    """The seconds of a call divided by those of another, on one thread: the median of turns of ours, peer, peer, ours.

    On Linux the time in which other programs have the processor does not count, while that of sleeping and of waiting for files does.
    """
    threads = torch.get_num_threads()
    if KIND == "cpu":
        torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    ratios, total = list[float](), 0.0
    try:
        ours(), peer()  # warm
        while len(ratios) < TURNS[0] or (len(ratios) < TURNS[1] and total < 1):
            own, others = _seconds(ours), _seconds(peer)
            others += _seconds(peer)  # so that what grows or shrinks over a turn meets both alike
            own += _seconds(ours)
            ratios.append(own / others)
            total += own + others
    finally:
        gc.enable()
        torch.set_num_threads(threads)
    return statistics.median(ratios)


def _seconds(call: Callable[[], Any]) -> float:
    # The clock is read outside of what is taken off: a wait between the two readings must not make a call shorter.
    start = time.perf_counter()
    waited = _waited()
    call()
    if KIND == "cuda":
        torch.cuda.synchronize()
    waited = _waited() - waited
    return time.perf_counter() - start - waited


def _waited() -> float:
    """Seconds that this thread was ready to run while the processor ran others; 0 where the system does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def slowest(config: pytest.Config, name: str) -> float:
    """What the time beside a peer may be by the baseline; infinite where nothing is compared."""
    return config.stash[_then].get(name, {}).get("time_of_peer", math.inf) * SLOWER


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
    wrong = []
    limit = then["peak_mib"] * GROWTH + SLACK_MIB
    if now["peak_mib"] > limit:
        wrong.append(
            f"peak memory {now['peak_mib']:.2f} MiB must be at most {limit:.2f}; the baseline has {then['peak_mib']:.2f}"
        )
    if now.get("time_of_peer", 0) > slowest(config, name):
        wrong.append(
            f"time {now['time_of_peer']:.3f} of its peer's must be at most {slowest(config, name):.3f}; the baseline has "
            f"{then['time_of_peer']:.3f}"
        )
    if wrong:
        return f"{name}: " + "; ".join(wrong)
    note = f"{name}: {now['peak_mib']:.2f} MiB, baseline {then['peak_mib']:.2f}"
    if "time_of_peer" in now and "time_of_peer" in then:
        note += f"; time {now['time_of_peer']:.3f} of its peer's, baseline {then['time_of_peer']:.3f}"
    config.stash[_notes].append(note)
    return ""


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
    parser.addoption(
        "--add-to-baseline",
        action="store_true",
        help="put the rows of this run into the baseline, beside those of benches that do not run",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads these options
def pytest_configure(config):
    config.stash[_then], config.stash[_notes] = {}, []
    if config.option.benchmark_storage == "file://./.benchmarks":
        config.option.benchmark_storage = f"file://{FOLDER}"
    if config.option.save_baseline or config.option.add_to_baseline:
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
    if config.option.add_to_baseline and BASELINE.exists() and BASELINE.stat().st_size:
        _keep_other_rows(output_json, json.loads(BASELINE.read_text()))
    if config.option.save_baseline and BASELINE.exists():
        before = {b["fullname"] for b in json.loads(BASELINE.read_text())["benchmarks"]}
        gone = before - {b["fullname"] for b in output_json["benchmarks"]}
        config.stash[_notes] += [f"{name}: did not run, no longer in the baseline" for name in sorted(gone)]


def _keep_other_rows(output_json, before):
    """The file of before with the new rows in it, each of which says where it was measured."""
    for bench in output_json["benchmarks"]:
        bench["extra_info"]["environment"] = output_json["machine_info"]
    new = {bench["fullname"] for bench in output_json["benchmarks"]}
    kept = [bench for bench in before["benchmarks"] if bench["fullname"] not in new]
    output_json |= before | {"benchmarks": kept + output_json["benchmarks"]}


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
