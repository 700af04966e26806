"""Processes that train together: they meet, and leave without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvl.base import processes

PAIR = """
import sys, torch
from medvl.base import processes; from medvl.weights import shards
from medvl.training.gradients import Aux, cached_value_and_grad
processes.join_processes(init_method="file://" + sys.argv[2] + "/store", rank=int(sys.argv[1]), world_size=2)
processes.join_processes(init_method="file://" + sys.argv[2] + "/store", rank=int(sys.argv[1]), world_size=2)  # is joined already
assert processes.gather_rows(torch.tensor([processes.rank()])).tolist() == [0, 1]
assert processes.world_size() == 2
if processes.rank() == 0:  # trains something for itself while the other waits, as the retriever of a registry
    with processes.single_process():
        assert (processes.world_size(), processes.rank()) == (1, 0)
        grad = cached_value_and_grad(lambda p, b: {"y": b["x"] * p["w"]}, lambda p, r: (r["y"].sum(), Aux()), chunk=1)
        assert grad({"w": torch.ones(())}, {"x": torch.arange(3.0)})[2]["w"] == 3
    assert processes.world_size() == 2
processes.wait_for_all()
cut = shards.shard_params({"w": torch.ones(256, 256)}, shards.process_mesh())
for _ in range(20):
    kept = cut["w"].full_tensor()
"""


@pytest.mark.parametrize("again", range(2))
def test_processes_leave_in_order(
    tmp_path, again
):  # one time in three a process aborts that leaves with gloo's threads at work
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(rank), str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [p.communicate()[1] for p in pair]
    assert [p.returncode for p in pair] == [0, 0], said


def test_one_process_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.join_processes()
    assert (processes.world_size(), processes.rank()) == (1, 0)
