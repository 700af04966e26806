"""The command line: what is shown in the documentation parses, help is help, and what is missing is said in one line."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import attrs
import pytest
from invoke import Collection, Program, Task
from invoke.exceptions import ParseError
from invoke.parser import Parser

import tasks
from medvl.adapters.embed_config import EmbedConfig
from medvl.base import config
from medvl.base.config import ConfigError
from medvl.commands import preprocess as preprocess_commands
from medvl.commands import scans as scans_commands
from medvl.ct.preprocess import CtConfig
from medvl.systems import run
from medvl.systems.adapters.ask import AskConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"^(?: {4}|\| `|.*`torchrun .* -m )(?:torchrun .* -m )?(invoke [a-z]+ --?[a-z].*?|invoke [a-z]+ [a-z]+ --?[a-z].*?)(?:`|  +|$)",
    re.MULTILINE,
)


def commands():
    """Every whole `invoke` command of the documentation: lines of a block, or first cells of a table."""
    shown = []
    for page in PAGES:
        # A line that ends in a backslash goes on in the next.
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        shown += [(page.name, found[1]) for found in COMMAND.finditer(text)]
    return shown


def parse(argv):
    contexts = Collection.from_module(tasks).to_contexts()
    return Parser(initial=Program().initial_context, contexts=contexts).parse_argv(argv)


def test_every_command_of_the_documentation_parses():
    shown = commands()
    assert len(shown) > 25
    assert {page for page, _ in shown} >= {
        "README.md",
        "adapters.md",
        "ct_clip.md",
        "slide_vqa.md",
        "tune.md",
    }
    for page, command in shown:
        _, *argv = shlex.split(command.partition(" # ")[0])
        try:
            assert parse(argv)[1].name == argv[0]
        except ParseError as e:
            raise AssertionError(f"{page}: {command}: {e}") from e


SETTINGS = {name: run.find_system(name).record for name in run.system_names()}
OWN = {
    "adapters.md": "adapters",
    "ct_clip.md": "ct_clip",
    "slide_vqa.md": "slide_vqa",
    "tune.md": "tune",
}  # whose runs a page is about
OTHERS = {
    "preprocess": CtConfig,
    "classify": CtConfig,
    "embed": CtConfig,
    "adapters": EmbedConfig,
    "ask": AskConfig,
}


ENDINGS = (
    "safetensors",
    "safetensors.index.json",
    "rejected.csv",
    "csv",
    "h5",
    "toml",
    "json",
    "jsonl",
    "pt",
)  # of files


def module_of(name):
    """The files of a module of this name: docs speak of `evaluate.prompts` the setting and of `encode.embedding_width` the function."""
    return [*(ROOT / "medvl").rglob(f"{name}.py")]


def has(record, key):
    """Whether a record has a setting of this name: `train.stages.0.lr`."""
    if get_origin(record) in (Union, UnionType):
        return any(has(each, key) for each in get_args(record))
    if get_origin(record) is tuple:
        return not key or (
            key.partition(".")[0].isdigit() and has(get_args(record)[0], key.partition(".")[2])
        )
    if get_origin(record) is dict or not key:
        return True
    name, _, rest = key.partition(".")
    kinds = {f.name: f.type for f in attrs.fields(attrs.resolve_types(record))} if attrs.has(record) else {}
    return name in kinds and has(kinds[name], rest)


def records_of(page, argv):
    """The records that a command's settings must be in: one, or those of every system."""
    if argv[0] in OTHERS:
        return [OTHERS[argv[0]]]
    exp = argv[argv.index("--exp") + 1]
    if exp.startswith("runs/"):
        return [SETTINGS[OWN[page]]] if page in OWN else [*SETTINGS.values()]
    return [type(run.resolve(str(ROOT / "experiments" / f"{exp}.toml"))[0])]


def test_every_setting_in_a_command_of_the_documentation_is_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = 0
    for page, command in commands():
        _, *argv = shlex.split(command.partition(" # ")[0])
        settings = [value for flag, value in pairwise(argv) if flag == "--set"]
        if "--exp" in argv and (exp := argv[argv.index("--exp") + 1]) in run.experiment_names():
            run.resolve(exp, settings)  # their values are good, too
        for key in (setting.partition("=")[0] for setting in settings):
            wrong = [record.__module__ for record in records_of(page, argv) if not has(record, key)]
            assert not wrong, f"{page}: {command}: {key} is no setting of {', '.join(wrong)}"
            seen += 1
    assert seen > 8


def test_every_setting_that_the_documentation_speaks_of_is_one():
    """In code within a line: `chat.max_pixels`, `--set train.batch=8`; a name of the package is one too."""
    records = [*SETTINGS.values(), *OTHERS.values()]
    first = {field.name for record in SETTINGS.values() for field in attrs.fields(record)}
    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        keys = re.findall(r"`(?:--set )?'?([a-z_]+(?:\.[a-z_0-9]+)+)(?: ?=[^`]*)?`", text) + re.findall(
            r"--set '?([a-z_.0-9]+)=", text
        )
        for key in keys:
            name, _, ending = key.partition(".")
            if name in first and ending not in ENDINGS and not module_of(name):
                assert any(has(record, key) for record in records), f"{page.name}: {key} is no setting"
                seen += 1
    assert seen > 30


def test_a_setting_that_is_none_is_noticed():
    assert has(SETTINGS["ct_clip"], "train.stages.0.speeds.0.lr")
    assert has(SETTINGS["adapters"], "base.stages.0.speeds")
    assert has(SETTINGS["tune"], "model.config.text_config.hidden_size")
    assert has(SETTINGS["tune"], "lora.alpha_pattern")
    assert not has(SETTINGS["tune"], "data.test")
    assert not has(SETTINGS["tune"], "train.stages.lr")
    assert not has(SETTINGS["slide_vqa"], "seed.lr")


@pytest.fixture
def invoked(capsys, monkeypatch):
    """(arguments) -> (exit status, what was printed, what was complained of), as from a shell."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["invoke", *argv])
        with pytest.raises(SystemExit) as end:
            Program(namespace=Collection.from_module(tasks)).run(sys.argv)
        shown = capsys.readouterr()
        return end.value.code or 0, shown.out, shown.err

    return call


@pytest.mark.parametrize("task", ["train", "slides", "split"])  # one positional argument, an action, none
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_task_is_never_an_argument(task, flag, invoked):
    code, out, err = invoked(task, flag)
    assert (code, err) == (0, "")
    assert "Docstring:" in out
    assert f" {task} [--options]" in out


def test_every_option_says_what_it_is_for():
    # A namespace of its own: invoke takes the helps out of a task when it first asks for them.
    for name, task in runpy.run_path(tasks.__file__).items():
        if isinstance(task, Task):
            assert not [argument.name for argument in task.get_arguments() if not argument.help], name


def test_what_is_missing_or_unknown_is_one_line(tmp_path, invoked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv, message in (
        (("slides", "check"), "error: --features must be given"),
        (("split", "--labels", "x.csv"), "error: --out must be given"),
        (("evaluate", "--epx"), "error: evaluate has no option --epx"),
        (
            ("experiments",),
            f"error: {tmp_path}/experiments: holds no experiments (*.toml); run this in the project folder",
        ),
    ):
        code, _, err = invoked(*argv)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err


# Runs -----------------------------------------------------------------------------------------------------------------------------------
def test_ct_settings_are_taken_of_ct_experiments_alone():
    with pytest.raises(
        ValueError,
        match=r"preprocess: .*tune_phantom.* is a tune experiment; only ct_clip experiments have settings of CT",
    ):
        preprocess_commands.fill_store(
            "scans", "out.h5", str(ROOT / "experiments/tune_phantom.toml"), (), "", 1, ""
        )


def test_one_broken_experiment_does_not_hide_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "EXPERIMENTS", tmp_path)
    (tmp_path / "a.toml").write_text("about = 'good'\n")
    (tmp_path / "b.toml").write_text("about = \n")
    found = run.experiment_names()
    assert found["a"] == "good"
    assert "not valid TOML" in found["b"]


def test_a_run_of_a_version_with_fewer_settings_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    cfg, _ = run.resolve(str(ROOT / "experiments/tune_phantom.toml"))
    raw = config.unstructure(cfg)
    del raw["chat"]["window"]
    old = tmp_path / "runs" / f"tune_phantom-{config.record_digest(raw)}"
    old.mkdir(parents=True)
    (old / "config.json").write_text(json.dumps(raw, indent=1))
    assert run.resolve(str(old)) == (cfg, old)
    run._describe(old, cfg)  # as going on does
    assert run.resolve(str(old)) == (cfg, old)
    assert run.resolve(str(old), ("seed=7",))[1] != old
    experiment = str(ROOT / "experiments/tune_phantom.toml")
    assert run.resolve(experiment) == (cfg, old)  # the command that began it
    assert run.resolve(experiment, ("seed=7",))[1] != old
    (old / "config.json").write_text(json.dumps(raw | {"seed": 3}))  # edited: another run
    assert run.resolve(str(old))[1] != old
    assert run.resolve(experiment)[1] != old
    (old / "config.json").write_text("[]")  # no record of a run is an obstacle
    assert run.resolve(experiment)[1] != old


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
    for look in (
        lambda: scans_commands.print_findings(str(moved), "x.nii.gz", ()),
        lambda: scans_commands.embed_scan(str(moved / "config.json"), "x.nii.gz", "e.npy"),
    ):
        with pytest.raises(ValueError, match="is a tune run; only ct_clip runs look at scans"):
            look()


# What a user can cause ends in one sentence ---------------------------------------------------------------------------------------------
@pytest.fixture
def at_work(tmp_path, monkeypatch):
    """A working folder with a file, folders where files should be, tables, features and an experiment of each fault."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / os.fsdecode(b"S\xff.csv")).write_text("1,2\n3,4\n")
    for folder in (
        "folder",
        "folder.h5",
        "folder.png",
        "folder.npy",
        "folder.toml",
        "scans",
        "features",
        "odd",
    ):
        (tmp_path / folder).mkdir()
    (tmp_path / "scans" / "P1_a_1.nii.gz").write_bytes(b"no scan")
    (tmp_path / "odd" / os.fsdecode(b"P\xff_a_1.nii.gz")).write_bytes(b"no scan")
    (tmp_path / "labels.csv").write_text(
        "VolumeName,Cyst\n" + "".join(f"train_{i}_a_1.nii.gz,{i % 2}\n" for i in range(8))
    )
    (tmp_path / "features" / "S1.csv").write_text("a,b\n1,x\n")
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "config.json").write_text('{"system": "slide_vqa"}')
    (tmp_path / "good.toml").write_text("")
    toml = {
        "date": "day = 2024-01-01",
        "deep": "x = " + "[" * 5000 + "]" * 5000,
        "list": "system = ['tune']",
        "table": "system = {}",
        "bytes": "system = 'tune'",
    }
    for name, text in toml.items():
        (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    for variable in ("MAX_PIXELS", "MAX_NUM"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


PREPROCESS = "preprocess --source scans --out new.h5"
SPLIT = "split --labels labels.csv --out parts --sizes valid=2,test=2"
TUNE, CT = "--exp tune_phantom", "--exp ctclip_phantom"
HOSTILE = [
    (f"{PREPROCESS} --workers x", "--workers must be a whole number from 1 to 1024, got 'x'"),
    (f"{PREPROCESS} --workers 0", "--workers must be a whole number"),
    (f"{PREPROCESS} --workers=-1", "--workers must be a whole number"),
    (f"{PREPROCESS} --workers 1000000", "--workers must be a whole number"),
    (f"{PREPROCESS} --set size=[1]", "size must be () or three positive numbers"),
    (f"{PREPROCESS} --set preset=x", "must be one of 'mm'"),
    (f"{PREPROCESS} --set nokey=1", "unknown key 'nokey'"),
    (f"{PREPROCESS} --set dtype=2024-01-01", "a setting cannot be a date"),
    (f"{PREPROCESS} --exp nosuch", "no such experiment"),
    (f"{PREPROCESS} --metadata gone.csv", "gone.csv: no such file"),
    (f"{PREPROCESS} --sheet folder.png", "folder.png: must be a file to write, and is a folder"),
    (f"{PREPROCESS} --sheet file/look.png", "file is not a folder"),
    (f"{PREPROCESS} --sheet look.jpg", "sheet must end in .png"),
    ("preprocess --source gone --out new.h5", "gone"),
    ("preprocess --source odd --out new.h5", "UTF-8"),
    ("preprocess --source scans --out folder", "folder: must be a file to write, and is a folder"),
    ("preprocess --source scans --out folder.h5", "folder.h5: must be a file to write, and is a folder"),
    ("preprocess --source scans --out file/new.h5", "file is not a folder"),
    ("preprocess --source scans --out /proc/new.h5", "/proc/new.h5: cannot be written"),
    ("preprocess --source scans --out /dev/null", "is a device"),
    ("preprocess --source scans --out new\udcff.h5", "written as text"),
    ("preprocess --source scans --out file", "file"),
    (f"{SPLIT} --seed x", "--seed must be a whole number from 0"),
    (f"{SPLIT} --seed=-1", "--seed must be a whole number from 0"),
    (f"{SPLIT} --table gone.csv", "gone.csv: no such file"),
    (f"{SPLIT} --pattern (", "pattern"),
    (f"{SPLIT} --patient nosuch", "nosuch"),
    ("split --labels labels.csv --out file", "file: must be a folder to write, and is a file"),
    ("split --labels labels.csv --out file/parts", "file is not a folder"),
    ("split --labels labels.csv --out /proc/parts", "cannot be written"),
    ("split --labels labels.csv --out parts --sizes x", "sizes must be name=number"),
    ("split --labels folder --out parts", "folder"),
    (f"labels {TUNE} --sample x", "--sample must be a whole number"),
    (f"labels {TUNE} --sample=-1", "--sample must be a whole number"),
    (f"labels {CT}", "only systems that train a language model"),
    (f"estimate {TUNE} --processes x", "--processes must be a whole number from 1"),
    (f"estimate {TUNE} --processes 0", "--processes must be a whole number from 1"),
    (f"estimate {CT} --gpu tpu", "--gpu must be one of h100"),
    ("ask --question q --adapters gone.toml -k x", "--k must be a whole number"),
    ("ask --question q --adapters gone.toml --max-tokens x", "--max-tokens must be a whole number"),
    ("ask --question q --adapters gone.toml --max-tokens 0", "--max-tokens must be a whole number"),
    ("ask --question q --adapters gone.toml", "gone.toml"),
    ("ask --question q --adapters folder.toml", "folder.toml"),
    ("ask --question q --adapters good.toml --set x=1", "unknown key 'x'"),
    ("ask --question q --adapters good.toml --set hold.host_gb=-1", "host_gb must be 0 or more"),
    ("ask --question q --slide features/S1.csv --run gone", "gone"),
    (
        "ask --question q --slide features/S1.csv --run asked --out file",
        "file: must be a folder to write, and is a file",
    ),
    ("ask --question q --slide features/S1.csv --run asked --out /proc/maps", "cannot be written"),
    ("slides look --features features", "must be check or pack"),
    ("slides check --features gone", "gone"),
    ("slides check --features features --dims x", "--dims must be a whole number"),
    ("slides check --features features --dims -5", "--dims must be a whole number from 0"),
    ("slides check --features features --data gone.json", "gone.json"),
    ("slides pack --features features", "needs out"),
    ("slides pack --features strange --out new.h5", "UTF-8"),
    ("slides pack --features features --out folder.h5", "must be a file to write, and is a folder"),
    ("slides pack --features features --out file/new.h5", "file is not a folder"),
    ("slides pack --features features --out new.h5 --dims x", "--dims must be a whole number"),
    ("adapters look", "must be one of build, add, list, show"),
    ("adapters list --registry gone.toml", "gone.toml"),
    ("adapters list --registry folder.toml", "folder.toml"),
    ("adapters show --registry good.toml --name x", "good.toml"),
    (
        "adapters build --registry folder.toml --path {task} --samples {task}",
        "must be a file to write, and is a folder",
    ),
    ("adapters build --registry file/r.toml --path {task} --samples {task}", "file is not a folder"),
    ("adapters build --registry new.toml --path x --samples y", "needs path with {task} in it"),
    ("adapters add --registry new.toml", "adapters add"),
    ("adapters add --registry new.toml --name a --path folder --vector gone.npy", "gone.npy"),
    ("embed --run gone --scan scans/P1_a_1.nii.gz --out e.npy", "gone"),
    (
        "embed --run gone --scan scans/P1_a_1.nii.gz --out folder.npy",
        "must be a file to write, and is a folder",
    ),
    ("embed --run gone --scan scans/P1_a_1.nii.gz --out e.txt", "must end in .npy"),
    ("embed --run gone --scan scans/P1_a_1.nii.gz --out file/e.npy", "file is not a folder"),
    ("classify --run gone --scan scans/P1_a_1.nii.gz", "gone"),
    ("classify --run folder --scan gone.nii.gz", "folder"),
    ("train --exp nosuch", "no such experiment"),
    ("train --exp date.toml", "a setting cannot be a date"),
    ("train --exp deep.toml", "not valid TOML"),
    ("train --exp list.toml", "system must be one of"),
    ("train --exp table.toml", "system must be one of"),
    ("train --exp bytes.toml", "cannot be read as text"),
    ("train --exp folder.toml", "folder.toml"),
    (f"train {CT} --set data.store={{x}}.h5", "data.store may hold {folder}, {split}, {ct}, found {x}"),
    (f"train {CT} --set data.store={{0}}", "found {0}"),
    (f"train {CT} --set data.impressions=2", "data.impressions must be 1 or less"),
    (f"train {CT} --set seed", "--set needs key.path=value"),
    (f"train {CT} --set train.stages.7.lr=1", "must be an index below 1"),
    (f"train {CT} --set data.folder=file", "file: must be a folder to write, and is a file"),
    (f"train {CT} --set data.folder=file/a", "file is not a folder"),
    (f"train {CT} --set data.cache=file", "file: must be a folder to write, and is a file"),
    (f"train {TUNE} --set data.folder=/proc/data", "cannot be written"),
    (
        "train --exp ctclip_vitb --set data.store=folder --set data.reports=pipe",
        "9 files are missing: folder, pipe",
    ),
    ("train --exp tune_qwen25vl_7b_qlora --set data.conversations=folder", "3 files are missing: folder"),
    ("train --exp slide_vqa_qwen3_4b --set data.test=folder", "files are missing"),
    (f"evaluate {TUNE}", "no such run"),
    ("evaluate --exp gone/config.json", "gone"),
]


@pytest.mark.parametrize(
    ("command", "message"), HOSTILE, ids=[f"{i}-{command[:40]!a}" for i, (command, _) in enumerate(HOSTILE)]
)
def test_what_a_user_can_cause_ends_in_one_sentence(command, message, at_work, invoked):
    before = {p: p.read_bytes() for p in at_work.rglob("*") if p.is_file()}
    code, out, err = invoked(*command.split(" "))
    assert code == 2, (out, err)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert message in err
    after = {
        p: p.read_bytes()
        for p in at_work.rglob("*")
        if p.is_file() and not p.name.endswith((".lock", "log.txt"))
    }
    assert after == before


@pytest.mark.parametrize("blocked", ["runs", "runs/NAME", "runs/NAME/config.json/x", "runs/NAME/results"])
def test_a_run_that_has_no_place_is_refused_before_anything_is_drawn(blocked, at_work):
    _, folder = run.resolve("tune_phantom")
    path = at_work / blocked.replace("runs/NAME", str(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    with pytest.raises(
        ValueError, match=r"not a folder; give another place|must be a f\w+ to write, and is a"
    ):
        run.run("tune_phantom", (), lambda line: None)
    assert not (at_work / "data").exists()


@pytest.mark.parametrize("lines", [1, 100_000])  # written at the end, and before
def test_a_reader_that_leaves_ends_a_command_quietly(lines):
    code = f"import tasks; tasks._call(lambda: [print('line') for _ in range({lines})])"
    reading, writing = os.pipe()
    os.close(reading)
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert command.communicate()[1] == b""
    assert command.returncode == 128 + signal.SIGPIPE


def test_another_broken_pipe_is_an_error(capsys):
    def break_one():
        reading, writing = os.pipe()
        os.close(reading)
        os.write(writing, b"x")

    with pytest.raises(SystemExit) as e:
        tasks._call(break_one)
    assert e.value.code == 2
    assert "Broken pipe" in capsys.readouterr().err
