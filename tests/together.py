"""Several processes that train together, over gloo on this machine: each runs a function of a test module.

They are forked from processes that have imported torch and transformers already, which takes longer than most of what
they do.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).resolve().parents[1]


@frozen(kw_only=True)
class Started:
    """A process of `start_together`."""

    server: subprocess.Popen
    pid: int
    errors: Path  # what it writes to stdout and stderr


def start_together(module, function, folder, world, *, cwd=None):
    """Start `world` processes that meet and call `module.function(folder)`."""
    # A file of its own for each group: a file in which others have met cannot be met in again.
    meeting = folder / f"meeting-{len([*folder.glob('meeting-*')])}"
    meeting.touch()
    started = []
    for rank in range(world):
        errors = folder / f"{meeting.name}-errors-{rank}.txt"
        job = {
            "module": module,
            "function": function,
            "folder": str(folder),
            "meeting": str(meeting),
            "rank": rank,
            "world": world,
            "cwd": str(cwd or Path.cwd()),
            "errors": str(errors),
        }
        # By parity, so that neighbours hash strings differently, as processes of their own do: an order of a set on
        # which they would have to agree is found out.
        server = _server(rank % 2)
        started.append(Started(server=server, pid=_ask(server, job), errors=errors))
    return started


def wait_for(process):
    """The exit status of one of them."""
    return _ask(process.server, {"wait": process.pid})


def wait_together(started):
    """Wait for them; what they wrote."""
    statuses = [wait_for(process) for process in started]
    errors = [process.errors.read_text() for process in started]
    assert statuses == [0] * len(started), (statuses, errors)
    return errors


def run_together(module, function, folder, world, *, cwd=None):
    """Run `module.function(folder)` in `world` processes that train together, to its end."""
    return wait_together(start_together(module, function, folder, world, cwd=cwd))


@functools.cache
def _server(number):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(number + 1)}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.together"],
        env=env,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    # It ends when its input does.
    atexit.register(server.communicate)
    return server


def _ask(server, question):
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


# In a process that is forked from ---------------------------------------------------------------------------
def _serve():
    import_module("transformers.modeling_utils")
    running = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            running.remove(question["wait"])
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        # Here, so that the next process finds it imported.
        module = import_module(question["module"])
        pid = os.fork()
        if not pid:
            os._exit(_work(module, question))
        running.add(pid)
        print(pid, flush=True)
    # Of tests that failed before they waited.
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _work(module, job):
    """The exit status of a forked process that does a job."""
    from medvl.base import processes

    errors = os.open(job["errors"], os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    try:
        os.chdir(job["cwd"])
        processes.join_processes(
            init_method=f"file://{job['meeting']}", rank=job["rank"], world_size=job["world"]
        )
        vars(module)[job["function"]](Path(job["folder"]))
        # As an interpreter does that ends: the group is left.
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve()
