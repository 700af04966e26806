"""memory: what cannot fit a GPU is refused before training, what may not fit is warned of; a CPU is not asked."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attrs import evolve, frozen

from medvl.base import processes
from medvl.systems import run
from medvl.systems.memory import Card, check_memory, fullest_card
from medvl.systems.system import System
from medvl.systems.tune import run as tune
from medvl.training.record import Stage, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
SMALL = ("data.phantoms.train=8", "data.phantoms.valid=2", "data.phantoms.test=2")
# One process that trains 4 billion numbers in bfloat16 with masters.
PARTS = {
    "optimiser": 48 * GB,
    "activations and gradients": 26 * GB,
    "trained weights": 8 * GB,
}


@frozen(kw_only=True)
class Record:
    train: TrainConfig | None = TrainConfig(stages=(Stage(name="whole", steps=1, lr=1.0),))


def estimated(parts=PARTS, **change):
    """A system of which one estimate is known; `asked` gets the number of processes and the data it is asked for."""
    asked = []

    def memory(cfg, folder, processes, **data):
        asked.append((processes, data))
        return {"whole": SimpleNamespace(memory=parts)}

    nothing = lambda *args: None
    system = System(record=Record, prepare=nothing, fit=nothing, load=nothing, assess=nothing, memory=memory)
    return evolve(system, **change), asked


@pytest.fixture
def card(monkeypatch):
    """A GPU with so many bytes free."""

    def put_in(free):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GB))

    return put_in


def test_what_cannot_fit_is_refused_with_what_to_change(card):
    system, asked = estimated()
    card(60 * GB)
    message = (
        r"stage whole: weights, gradients and optimiser need 64\.0 GB on each GPU, and cuda:0 has 60\.0 of "
        r"80\.0 GB free; train fewer .*lora.*moments = '8bit'.*train\.shard = true.*invoke estimate"
    )
    with pytest.raises(ValueError, match=message):
        check_memory(system, Record(), fullest_card(Record()), 4)
    assert asked == [(4, {})]


@pytest.mark.parametrize(("free", "warned"), [(89, True), (91, False)])
def test_a_step_that_may_not_fit_is_warned_of(card, caplog, free, warned):
    """82 GB at the peak, and a tenth more."""
    card(free * GB)
    check_memory(estimated()[0], Record(), fullest_card(Record()))
    assert ("a step may need 82.0 GB" in caplog.text) == warned


@pytest.mark.parametrize(
    ("record", "change"),
    [
        (Record(train=None), {}),
        (Record(train=evolve(Record().train, device="cpu")), {}),
        (Record(), {"memory": None}),
        (Record(), {"trains": lambda cfg: False}),
    ],
)
def test_nothing_is_estimated_without_need(card, record, change):
    card(1)
    system, asked = estimated(**change)
    check_memory(system, record, fullest_card(record))
    assert asked == []


def test_a_cpu_is_not_asked():
    system, asked = estimated()
    check_memory(system, Record(), fullest_card(Record()))
    assert asked == []


def test_of_several_processes_the_fullest_card_decides(card, monkeypatch):
    card(90 * GB)
    sizes = torch.tensor([[0, 0], [60 * GB, 80 * GB], [0, 0]])  # of process 2 there is no GPU
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    monkeypatch.setattr(processes, "sum_over_processes", lambda own: own + sizes)
    fullest = fullest_card(Record())
    assert str(fullest) == "the GPU of process 1 has 60.0 of 80.0 GB free"
    with pytest.raises(ValueError, match=r"64\.0 GB on each GPU, and the GPU of process 1 has 60\.0 of"):
        check_memory(estimated()[0], Record(), fullest, 3)


def test_what_was_prepared_is_not_read_again(tmp_path, monkeypatch):
    """The estimate of tune gets the conversations that training gets."""
    monkeypatch.chdir(tmp_path)
    cfg, _ = run.resolve(str(ROOT / "experiments/tune_phantom.toml"), SMALL)
    prepared = tune.prepare(cfg, logging.debug)
    prepared("train")
    monkeypatch.setattr(tune, "read_split", None)
    for name in ("train", "valid", "test"):
        tune.split_path(cfg, name).write_text("no JSON")
    (step,) = tune.memory(cfg, tmp_path, 1, prepared).values()
    assert step.tokens
    system, asked = estimated()
    check_memory(system, cfg, Card(name="x", free=90 * GB, total=90 * GB), 2, prepared)
    assert asked == [(2, {"data": prepared})]


def test_a_run_is_refused_before_it_trains(card, tmp_path, monkeypatch):
    """Of tune, whose data is there by then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    card(10**6)
    with pytest.raises(ValueError, match=r"stage \w+: weights, gradients and optimiser need"):
        run.run("tune_phantom", SMALL, logging.debug)
    assert [*tmp_path.glob("data/**/train.jsonl")]
    assert [path.name for path in tmp_path.glob("runs/*/*")] == ["log.txt"]
