"""Processes that train together: they meet, and leave without a word."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from medvl.base import processes
from medvl.systems import run
from tests.together import run_together

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
with processes.single_process():  # the other process does not ask
    assert processes.share_batches(3) == [(0, True), (1, True), (2, True)]
    assert processes.sum_over_processes(torch.tensor([2.0])) == 2
here = torch.tensor([1.0 + processes.rank()], dtype=torch.float64)
assert processes.sum_over_processes(here) == 3
assert here == 1 + processes.rank()  # is left as it was
assert processes.share_batches(3) == ([(0, True), (2, True)], [(1, True), (2, False)])[processes.rank()]
assert processes.share_batches(0) == []
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


PREPARATION = 5.0  # seconds


def prepare_long(folder):
    """Process 0 prepares while the others wait; each writes how long that took and what its CPU did meanwhile."""
    begin, cpu = time.monotonic(), time.process_time()
    run._by_first_process(lambda: time.sleep(PREPARATION))
    waited, worked = time.monotonic() - begin, time.process_time() - cpu
    numbers = processes.gather_rows(torch.tensor([float(processes.rank())])).tolist()
    (folder / f"{processes.rank()}.txt").write_text(f"{waited} {worked} {len(numbers)}")


def test_processes_sleep_while_the_first_prepares(tmp_path):
    world = 4
    run_together(__name__, "prepare_long", tmp_path, world)
    for rank in range(world):
        waited, worked, met = map(float, (tmp_path / f"{rank}.txt").read_text().split())
        assert waited >= PREPARATION - 1
        assert worked < PREPARATION / 5
        assert met == world


def test_with_gpus_the_long_waits_are_gloos(monkeypatch):
    """NCCL would keep the GPU busy while it waits, and abort after ten minutes."""
    settings, reduced = {}, []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda **given: settings.update(given))
    monkeypatch.setattr(processes.atexit, "register", lambda leave: None)
    processes.join_processes()
    assert settings == {"backend": "cpu:gloo,cuda:nccl", "timeout": timedelta(days=1)}
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda t: reduced.append(t.device.type))
    monkeypatch.setattr(dist, "barrier", lambda: pytest.fail("a kernel of NCCL"))
    processes.wait_for_all()
    assert reduced == ["cpu"]


@pytest.mark.parametrize(
    ("local", "gpus", "device"),
    [("3", 8, "cuda:3"), ("3", 1, "cuda:0"), (None, 8, "cuda:5"), (None, 2, "cuda:1")],
)
def test_a_process_has_the_gpu_of_its_number_on_its_machine(monkeypatch, local, gpus, device):
    """Process 5 of all, the fourth of its machine where torchrun says so; or the only GPU that it sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(processes, "rank", lambda: 5)
    monkeypatch.setenv("LOCAL_RANK", local or "")
    if local is None:
        monkeypatch.delenv("LOCAL_RANK")
    assert processes.choose_device() == torch.device(device)
    assert processes.choose_device("cpu") == torch.device("cpu")
