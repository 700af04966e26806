"""Worker processes: fresh, of one thread, deaf to Ctrl-C, and gone when their parent is."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medvl.base import workers

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_modules_to_preload_exist():
    """The server that workers fork from ignores modules that it cannot import."""
    for module in workers._PRELOAD:
        assert importlib.util.find_spec(module), module


def test_a_pool_works_in_other_processes():
    with workers.worker_pool(2) as pool:
        assert list(pool.map(abs, [-3, 2, -1])) == [3, 2, 1]
        ids = {future.result() for future in [pool.submit(os.getpid) for _ in range(8)]}
        assert os.getpid() not in ids
        assert 1 <= len(ids) <= 2
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
    for worker in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_an_error_of_the_work_is_the_callers():
    with workers.worker_pool(1) as pool, pytest.raises(ValueError, match="invalid literal"):
        pool.submit(int, "x").result()


SCRIPT = """
import os, sys, time
from medvl.base.workers import worker_pool
if __name__ == "__main__":
    with worker_pool(2) as pool:
        for _ in range(2):
            pool.submit(time.sleep, 0.2)
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    run = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    worker = int(run.stdout.readline())
    os.kill(worker, 0)  # it is there
    run.kill()
    run.wait()
    for _ in range(3000):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a worker outlived its parent")


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert run.returncode == 1
    assert (
        "ValueError: worker processes cannot start: a script that uses workers must be a file" in run.stderr
    )
