"""ct_clip in two processes against one: the data made once, the frozen features shared out, the same texts drawn, the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvl.systems import run
from tests.systems.ct_clip.test_run import SET

ROOT = Path(__file__).resolve().parents[3]
STAGES = (
    "{name='words', steps=2, lr=1e-3, train=['(fuse|text|project|contrast)/.*']}",  # slice features come from the cache
    "{name='all', steps=1, lr=1e-3}",
)
DRAWN = ("data.draws=2", "data.sentences=1", "evaluate.bootstrap=2", f"train.stages=[{', '.join(STAGES)}]")
RUN = """
import sys
from medvl.base import processes
from medvl.systems import run
processes.join_processes(init_method="file://meeting", rank=int(sys.argv[1]), world_size=2)
run.run("ctclip_phantom", sys.argv[2:])
"""


def _place(folder):
    folder.mkdir()
    (folder / "experiments").symlink_to(ROOT / "experiments")
    return folder


def _train_in_two_processes(folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = RUN.replace("meeting", str(folder / "meeting"))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), *SET, *DRAWN],
            cwd=folder,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors


def _losses(folder):
    (trained,) = (folder / "runs").iterdir()
    lines = [
        line
        for stage in ("0-words", "1-all")
        for line in (trained / stage / "metrics.jsonl").read_text().splitlines()
    ]
    return [json.loads(line)["loss"] for line in lines]


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    one, two = _place(tmp_path / "one"), _place(tmp_path / "two")
    _train_in_two_processes(two)
    monkeypatch.chdir(one)
    run.run("ctclip_phantom", (*SET, *DRAWN), lambda line: None)
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-4)
    assert len(_losses(two)) == 3
    cache = sorted(path.name for path in (two / "cache").iterdir())
    assert cache == sorted(path.name for path in (two / "cache").glob("features-*"))  # no lock is left
