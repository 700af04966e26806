"""The command line: what is shown in the documentation parses, help is help, and what is missing is said in one line."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import Collection, Program
from invoke.exceptions import ParseError
from invoke.parser import Parser

import tasks
from medvl.config import ConfigError
from medvl.systems import run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?: {4}|\| `)(invoke [a-z]+ --?[a-z].*?|invoke [a-z]+ [a-z]+ --?[a-z].*?)(?:`|  +|$)", re.MULTILINE)


def commands():
    """Every whole `invoke` command of the documentation: lines of a block, or first cells of a table."""
    return [(page.name, found[1]) for page in PAGES for found in COMMAND.finditer(page.read_text(encoding="utf-8"))]


def parse(argv):
    contexts = Collection.from_module(tasks).to_contexts()
    return Parser(initial=Program().initial_context, contexts=contexts).parse_argv(argv)


def test_every_command_of_the_documentation_parses():
    shown = commands()
    assert len(shown) > 25
    assert {page for page, _ in shown} >= {"README.md", "adapters.md", "ct_clip.md", "slide_vqa.md", "tune.md"}
    for page, command in shown:
        _, *argv = shlex.split(command.partition(" # ")[0])
        try:
            assert parse(argv)[1].name == argv[0]
        except ParseError as e:
            raise AssertionError(f"{page}: {command}: {e}") from e


def invoke(*argv, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "invoke", "-r", str(ROOT), *argv], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("task", ["train", "slides", "split"])  # one positional argument, an action, none
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_task_is_never_an_argument(task, flag):
    done = invoke(task, flag)
    assert done.returncode == 0, done.stderr
    assert "Docstring:" in done.stdout
    assert f" {task} [--options]" in done.stdout


def test_what_is_missing_or_unknown_is_one_line(tmp_path):
    for argv, message in (
        (("slides", "check"), "error: --features must be given"),
        (("split", "--labels", "x.csv"), "error: --out must be given"),
        (("evaluate", "--epx"), "error: evaluate has no option --epx"),
        (("experiments",), f"error: {tmp_path}/experiments: holds no experiments (*.toml); run this in the project folder"),
    ):
        done = invoke(*argv, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr


# Runs -----------------------------------------------------------------------------------------------------------------------------------
def test_ct_settings_are_taken_of_ct_experiments_alone():
    with pytest.raises(
        ValueError, match=r"preprocess: .*tune_phantom.* is a tune experiment; only ct_clip experiments have settings of CT"
    ):
        run.preprocess("scans", "out.h5", str(ROOT / "experiments/tune_phantom.toml"), (), "", 1, "")


def test_one_broken_experiment_does_not_hide_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "EXPERIMENTS", tmp_path)
    (tmp_path / "a.toml").write_text("about = 'good'\n")
    (tmp_path / "b.toml").write_text("about = \n")
    found = run.names()
    assert found["a"] == "good"
    assert "not valid TOML" in found["b"]


def test_a_run_folder_is_an_experiment_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    cfg, folder = run.resolve(str(ROOT / "experiments/tune_phantom.toml"))
    moved = tmp_path / "elsewhere" / folder.name
    moved.mkdir(parents=True)
    run._describe(moved, cfg)
    for given in (str(moved), str(moved) + "/", str(moved / "config.json")):
        again, place = run.resolve(given)
        assert again == cfg
        assert place == moved
    changed, place = run.resolve(str(moved), ("seed=7",))  # another run of the same experiment
    assert changed.seed == 7
    assert place.parent == tmp_path / "runs"
    assert place.name.rpartition("-")[0] == "tune_phantom"
    with pytest.raises(ConfigError, match=r"must be the folder of a run, there is no config.json"):
        run.resolve(str(tmp_path))
    for look in (lambda: run.classify(str(moved), "x.nii.gz", ()), lambda: run.embed(str(moved / "config.json"), "x.nii.gz", "e.npy")):
        with pytest.raises(ValueError, match="is a tune run; only ct_clip runs look at scans"):
            look()
