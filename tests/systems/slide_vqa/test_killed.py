"""slide_vqa killed in each of its parts and started again: the same weights, tokens, numbers and answers, and nothing half-written."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medvl.hub import skeletons
from medvl.systems import run
from medvl.training import states
from tests import tiny
from tests.systems.slide_vqa.test_run import record

ROOT = Path(__file__).resolve().parents[3]
FRESH = multiprocessing.get_context(
    "forkserver"
)  # a process that has imported all and done nothing; each of ours is forked from it
FRESH.set_forkserver_preload(["medvl.systems.run", "transformers.models.qwen3.modeling_qwen3"])
STEPS = {"compressor": 8, "0-captions": 12, "1-questions": 10}
SLIDES = 14  # with tokens: of validation one is talked about


def _record(place):
    raw = record(
        place,
        data__phantoms={"train": 11, "valid": 2, "test": 2, "dim": 32, "patches": [6000, 7000], "large": 0},
        pretrain__steps=STEPS["compressor"],
        pretrain__most=64,
        train__valid=8,
    )
    for stage, steps in zip(raw["train"]["stages"], [*STEPS.values()][1:], strict=True):
        stage["steps"] = steps
    return raw


def _train(place, runs):
    """What `invoke train` does, writing into place/runs."""
    torch.set_num_threads(1)
    run.RUNS = place / runs
    run.run(str(place / "toy.json"), log=lambda _: None)


def _start(place, runs):
    """Train in a process of its own."""
    work = FRESH.Process(target=_train, args=(place, runs))
    work.start()
    return work


def _trains(name):
    """Whether a folder holds a state that is not the last of its part."""

    def inside(folder):
        return (folder / name / "last.pt").exists() and states.read_state(
            folder / name / "last.pt"
        ).step < STEPS[name]

    return inside


def _computes_tokens(folder):
    return 0 < len([*folder.glob("tokens/*/*.npy")]) < SLIDES


PARTS = [_trains("compressor"), _computes_tokens, _trains("0-captions"), _trains("1-questions")]


def _kill(place, inside, gen):
    """Start, kill with SIGKILL soon after it is inside; whether it was inside still when it died."""
    work, (folder,) = _start(place, "cut"), (place / "whole").iterdir()
    folder = place / "cut" / folder.name
    while work.is_alive() and not inside(folder):
        time.sleep(0.002)
    time.sleep(float(torch.rand((), generator=gen)) * 0.03)
    work.kill()  # SIGKILL
    work.join()
    return work.exitcode == -signal.SIGKILL and inside(folder)


def _contents(folder):
    """All that a run makes and that must not differ: {file: bytes, or the digest of a state}."""
    kept = [*folder.rglob("*.npy"), *(folder / "tokenizer").iterdir()]
    kept += [p for p in (folder / "results").iterdir() if p.suffix in (".json", ".jsonl", ".csv", ".md")]
    found = {str(p.relative_to(folder)): p.read_bytes() for p in kept}
    found |= {str(p.relative_to(folder)): tiny.without_clock(p) for p in folder.rglob("metrics.jsonl")}
    for path in folder.glob("*/*.pt"):  # an archive's own name differs
        state = states.read_state(path)
        of = {
            "params": state.params,
            "opt": state.opt,
            "at": {"step": torch.tensor(state.step), "best": torch.tensor(state.best)},
        }
        found[str(path.relative_to(folder))] = skeletons.weights_digest(of).encode()
    held = torch.load(folder / "moe_compressor.pt", weights_only=True)
    return found | {"moe_compressor.pt": skeletons.weights_digest(held).encode()}


def _names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data and a run that nothing disturbed, in place/whole."""
    place = tmp_path_factory.mktemp("killed")
    (place / "toy.json").write_text(json.dumps(_record(place)))
    work = _start(place, "whole")
    work.join()
    assert work.exitcode == 0
    return place


def test_killed_in_every_part_ends_in_the_same_bits(place):
    """MEDVL_KILLS sets how many more times the run is killed, at any moment."""
    gen = torch.Generator().manual_seed(time.time_ns() % 2**31)
    (whole,) = (place / "whole").iterdir()
    cut = place / "cut" / whole.name
    for _ in range(5):
        if all(_kill(place, inside, gen) for inside in PARTS):
            break
        shutil.rmtree(place / "cut")  # on a busy machine a part may end before the signal comes
    else:
        pytest.fail("no part could be killed while it was at work")
    assert not (cut / "results").exists()
    for _ in range(int(os.environ.get("MEDVL_KILLS", "0"))):
        if torch.rand((), generator=gen) < 0.25:
            shutil.rmtree(place / "cut", ignore_errors=True)
        end = time.monotonic() + 1 + 5 * float(torch.rand((), generator=gen))
        _kill(place, lambda _, end=end: time.monotonic() > end, gen)
    for left in (
        "compressor/.best.pt.k1ll3d.tmp",
        "tokens/.a.npy.k1ll3d.tmp",
        ".tokenizer.k1ll3d.tmp/tokenizer.json",
    ):
        (cut / left).parent.mkdir(parents=True, exist_ok=True)
        (cut / left).write_bytes(b"half")
    code = f"from pathlib import Path; from tests.systems.slide_vqa.test_killed import _train; _train(Path({str(place)!r}), 'cut')"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    want, got = _contents(whole), _contents(cut)
    assert {
        "1-questions/best.pt",
        "0-captions/last.pt",
        "compressor/best.pt",
        "results/benchmark_results.json",
    } <= want.keys()
    assert sum(n.startswith("tokens/") for n in want) == SLIDES
    assert [n for n in {*want, *got} if want.get(n) != got.get(n)] == []
    assert _names(cut) == _names(whole)  # nothing more, nothing hidden
    assert not [n for n in _names(place) if Path(n).name.startswith(".")]
