"""A system of somebody else's: one folder and one TOML beside the project, and every command knows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvl.base import config
from medvl.evaluation import results
from medvl.systems import run

ROOT = Path(__file__).resolve().parents[2]
FACE = '''
"""A line through drawn points."""

from pathlib import Path
from typing import Literal

import torch
from attrs import frozen

from medvl.evaluation import report
from medvl.evaluation.results import Result
from medvl.systems.system import System
from medvl.training import gradients, loop, states
from medvl.training.optim import Rate, adamw


@frozen(kw_only=True)
class DataConfig:
    source: Literal["files"] = "files"
    points: int = 32


@frozen(kw_only=True)
class Config:
    system: Literal["line"]
    about: str = ""
    steps: int = 20
    data: DataConfig = DataConfig()


@frozen(kw_only=True)
class Model:
    cfg: Config


def batch_at(cfg, i):
    x = torch.rand(cfg.data.points, generator=torch.Generator().manual_seed(i))
    return {"x": x, "y": 3 * x}


def fit(cfg, folder, log):
    def loss(params, batch):
        return (params["slope"] * batch["x"] - batch["y"]).square().mean(), gradients.Aux()

    optimizer = adamw(lambda name: Rate(lr=0.1))
    params = {"slope": torch.ones(())}
    step = loop.make_step(gradients.value_and_grad(loss), optimizer)
    state = states.State(params=params, opt=optimizer.init(params))
    folder = folder / "0-line"
    state = loop.train_steps(step, state, lambda i: batch_at(cfg, i), steps=cfg.steps, folder=folder, title="line", log=log)
    return Model(cfg=cfg), state.params


def load(folder):
    cfg = Config(system="line")
    return Model(cfg=cfg), states.read_trained(folder / "0-line", "last", "cpu", model={"slope": torch.ones(())}).params


def assess(model, params, folder, experiment):
    rows = [Result(what="slope", subject="line", value=float(params["slope"]), split="test", n=1, experiment=experiment)]
    return rows, report.write_report(folder, f"{experiment}: a line", rows, {}, [])


SYSTEM = System(record=Config, prepare=lambda cfg, log: None, fit=fit, load=load, assess=assess)
'''


@pytest.fixture
def project(tmp_path):
    (tmp_path / "line").mkdir()
    (tmp_path / "line/__init__.py").write_text(FACE)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/toy.toml").write_text('system = "line"\nabout = "a line"\n')
    return tmp_path


def invoke(project, *argv):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{project}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "invoke", "--search-root", str(ROOT), *argv]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)


def test_a_system_is_one_folder_and_one_toml(project):
    made = invoke(project, "train", "--exp", "toy")
    assert made.returncode == 0, made.stderr
    (folder,) = (project / "runs").iterdir()
    (row,) = results.read_results(folder / "results/results.jsonl")
    assert row.what == "slope"
    assert row.value > 2
    again = invoke(project, "evaluate", "--exp", "toy")
    assert again.returncode == 0, again.stderr
    assert "a line" in invoke(project, "experiments").stdout
    for task, message in (
        ("labels", "toy is a line experiment; only systems that train"),
        ("estimate", "toy is a line experiment"),
    ):
        refused = invoke(project, task, "--exp", "toy")
        assert refused.returncode == 2
        assert message in refused.stderr
    asked = invoke(project, "ask", "--question", "q", "--run", str(folder))
    assert asked.returncode == 2
    assert "is a line run, which does not answer questions" in asked.stderr


@pytest.mark.parametrize("name", ["nosuch", "json", "os.path", "../line", "", 5, None, "tests"])
def test_what_offers_no_system_is_none(name):
    """`json` is a package without SYSTEM: that is said."""
    with pytest.raises(
        config.ConfigError,
        match=r"system must be one of adapters, ct_clip, document, slide_vqa, tune, unified, or a package .*found .* @ \$\.system",
    ):
        run.find_system(name)


def test_a_package_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {
        "without": "",
        "wrong": "SYSTEM = {}",
        "lab": "import nosuchmodule2",
        "lab/x": "",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    with pytest.raises(config.ConfigError, match=r"without must offer a .*System as SYSTEM, found none"):
        run.find_system("without")
    with pytest.raises(config.ConfigError, match=r"wrong must offer a .*System as SYSTEM, found a dict"):
        run.find_system("wrong")
    with pytest.raises(ModuleNotFoundError, match="nosuchmodule2"):  # a fault of the package, not of its name
        run.find_system("lab.x")
