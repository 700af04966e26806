"""CPU time of the same calls in two checkouts of medvl, taken in turns in one run.

    python benches/compare_revisions.py OLD NEW CALLS.py [--turns 9] [--starts 3] [--only NAME ...]

OLD and NEW are folders with a checkout each. CALLS.py defines `CALLS`, {name: a function without arguments that prepares and returns
the call to time}; it is imported in one process per checkout and may use whatever both checkouts have. Each turn times every call
once in each process, on one thread, by the time of the process alone: other programs on the machine count for little. Where a process
happens to lie in memory can cost as much as a change, so both are started several times. Printed is the median of the starts' ratios,
new / old, and the range of these. What a call of equal code shows (OLD twice) is the noise.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

Times = tuple[list[float], list[float]]


def serve(calls_file: str) -> None:
    """A worker: answers every name on stdin with the seconds of one call, on stdout."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the calls print is no answer
    spec = importlib.util.spec_from_file_location("calls", calls_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(*module.CALLS, sep="\t", file=answers, flush=True)
    ready = {}
    for line in sys.stdin:
        name = line.rstrip("\n")
        if name not in ready:
            ready[name] = module.CALLS[name]()
            ready[name]()  # the first call fills caches
        start = time.process_time()
        ready[name]()
        print(time.process_time() - start, file=answers, flush=True)


def start(folder: str, calls_file: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(Path(calls_file).resolve())]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def seconds(worker: subprocess.Popen, name: str) -> float:
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit(f"{worker.args[-1]}: the call {name!r} failed in {worker.args}; see above")
    return float(answer)


def take_turns(old: subprocess.Popen, new: subprocess.Popen, name: str, turns: int) -> Times:
    """Seconds of each turn in the old checkout, and in the new one."""
    times: dict[subprocess.Popen, list[float]] = {old: [], new: []}
    for worker in times:
        seconds(worker, name)
    for turn in range(turns):
        for worker in (old, new) if turn % 2 else (new, old):
            times[worker].append(seconds(worker, name))
    return times[old], times[new]


def describe(name: str, starts: Sequence[Times]) -> str:
    """A printed line about one call."""
    medians = [(statistics.median(old), statistics.median(new)) for old, new in starts]
    ratios = sorted(new / old for old, new in medians)
    before, after = (statistics.median(times) for times in zip(*medians, strict=True))
    return (
        f"{name:40s} {before * 1e3:9.2f} -> {after * 1e3:9.2f} ms  "
        f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("calls")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3)
    given = parser.parse_args()
    measured: dict[str, list[Times]] = {}
    for _ in range(given.starts):
        workers = [start(folder, given.calls) for folder in (given.old, given.new)]
        listed = [worker.stdout.readline().rstrip("\n").split("\t") for worker in workers]
        common = [name for name in listed[0] if name in listed[1]]
        for name in given.only or common:
            measured.setdefault(name, []).append(take_turns(*workers, name, given.turns))
            print(describe(name, measured[name]), flush=True)
        for worker in workers:
            worker.stdin.close()
            worker.wait()
    print("\nall starts")
    for name, starts in measured.items():
        print(describe(name, starts))


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else main()
