"""Several processes that train together, over gloo on this machine: each runs a function of a test module."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import sys
from importlib import import_module
from pathlib import Path
from medvl.base import processes
module, function, folder, meeting, rank, world = sys.argv[1:]
processes.join_processes(init_method=f"file://{meeting}", rank=int(rank), world_size=int(world))
vars(import_module(module))[function](Path(folder))
"""


def start_together(module, function, folder, world, *, cwd=None):
    """Start `world` processes that meet and call `module.function(folder)`."""
    # A file of its own for each group: a file in which others have met cannot be met in again.
    meeting = folder / f"meeting-{len([*folder.glob('meeting-*')])}"
    meeting.touch()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [module, function, str(folder), str(meeting)]
    started = []
    for rank in range(world):
        command = [sys.executable, "-c", CODE, *arguments, str(rank), str(world)]
        started.append(subprocess.Popen(command, env=env, cwd=cwd, stderr=subprocess.PIPE, text=True))
    return started


def wait_together(started):
    """Wait for them; what they wrote to stderr."""
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), errors
    return errors


def run_together(module, function, folder, world, *, cwd=None):
    """Run `module.function(folder)` in `world` processes that train together, to its end."""
    return wait_together(start_together(module, function, folder, world, cwd=cwd))
