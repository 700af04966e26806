"""Any system from a record: experiments by name, run folders, training, evaluation."""

import glob
import importlib
import importlib.util
import json
import logging
import os
import pkgutil
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from attrs import evolve
from tqdm import tqdm

import medvl.systems
from medvl.base import config, display, files, processes
from medvl.evaluation import results
from medvl.evaluation.results import Result
from medvl.systems.memory import check_memory, fullest_card
from medvl.systems.system import Log, System
from medvl.training.determinism import deterministic
from medvl.training.journal import check_tensorboard
from medvl.training.record import training_tables

_log = logging.getLogger("medvl")
EXPERIMENTS = Path("experiments")
RUNS = Path("runs")
TRAINED_BY = "trained_by.txt"  # in a folder models/EXPERIMENT: the run that trained it


def system_names() -> list[str]:
    """Names of the systems that medvl has: the folders beside this file."""
    return [module.name for module in pkgutil.iter_modules(medvl.systems.__path__) if module.ispkg]


def find_system(name: Any) -> System:
    """The system that a record names by `system = "NAME"`.

    NAME is a folder of `medvl/systems`, or any other Python package that can be imported and offers `SYSTEM`,
    such as "mylab.retina".

    Raises:
        ConfigError: there is none.
    """
    choices = f"{', '.join(system_names())}, or a package of your own that offers SYSTEM"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise config.ConfigError(f"system must be one of {choices}, found {name!r} @ $.system")
    # Ours first, so that a package "tune" that somebody has installed changes nothing.
    for module in (f"medvl.systems.{name}", name):
        # Looked up before it is imported: an ImportError inside a system is a fault of it, and must be seen.
        if _is_package(module):
            system = vars(importlib.import_module(module)).get("SYSTEM")
            if isinstance(system, System):
                return system
            what = "none" if system is None else f"a {type(system).__name__}"
            raise config.ConfigError(
                f"system must be one of {choices}; {module} must offer a medvl.systems.system.System as SYSTEM, "
                f"found {what} @ $.system"
            )
    raise config.ConfigError(f"system must be one of {choices}, found {name!r} @ $.system")


def _is_package(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError as e:
        # A parent that is not there, or is no package. What a parent itself fails to import must be seen.
        if e.name is None or not module.startswith(e.name):
            raise
        return False
    except ValueError:  # a module without a spec, such as __main__
        return False
    return spec is not None and spec.submodule_search_locations is not None


# Experiments ------------------------------------------------------------------------------------------------
def experiment_names() -> dict[str, str]:
    """{experiment: its line of description} of the folder `experiments`; why one cannot be read instead."""
    names = {}
    for path in sorted(EXPERIMENTS.glob("*.toml")):
        try:
            # The raw settings: a list of names needs no import of the systems.
            names[path.stem] = str(config.read_settings(path).get("about", ""))
        except config.ConfigError as e:
            names[path.stem] = f"(not an experiment: {e})"
    return names


def resolve(exp: str, overrides: Sequence[str] = ()) -> tuple[Any, Path]:
    """(record, run folder) of an experiment: a name in `experiments/`, the path of a `.toml` or `.json`, or a
    run's folder.

    Raises:
        ConfigError: no such experiment (lists those there are), unknown system, or a record that is not
            valid.
    """
    path = record_of(exp)
    raw = config.read_settings(path)
    # The digest that names the run, also where it was made by a version with fewer settings.
    digest_in_file = config.record_digest(raw)
    # The overrides may name another system, whose environment variables then count. They are applied once
    # more at the end, since --set wins over the environment.
    system = _system_of_record(config.override(raw, tuple(overrides), source=str(path)), path)
    # The record of a run holds the settings it was trained with; the environment of today must not change it.
    if path.suffix == ".toml":
        raw = _with_environment(raw, system, path)
    raw = config.override(raw, tuple(overrides), source=str(path))
    cfg: Any = config.structure(raw, system.record, source=str(path))
    digest = config.record_digest(cfg)
    name = path.stem
    if path.name == "config.json":
        name, _, digest_in_name = path.parent.name.rpartition("-")
        unchanged = digest_in_name == digest_in_file and not overrides
        # The run itself, wherever it lies now: folders may be moved, and copied to other machines.
        if digest_in_name == digest or unchanged:
            return cfg, path.parent
    folder = RUNS / f"{name or path.parent.name}-{digest}"
    return cfg, folder if folder.exists() else _run_of_older_version(cfg, folder)


def _run_of_older_version(cfg: Any, folder: Path) -> Path:
    """The folder of a run of this very record that was begun by a version with fewer settings, which gave it another
    digest; `folder` itself where there is none."""
    name = folder.name.rpartition("-")[0]
    for path in sorted(RUNS.glob(f"{glob.escape(name)}-*/config.json")):
        try:
            raw = config.read_settings(path)
            unchanged = path.parent.name == f"{name}-{config.record_digest(raw)}"
            if unchanged and config.structure(raw, type(cfg), source=str(path)) == cfg:
                return path.parent
        except config.ConfigError:
            continue  # of another system, or with settings that are no more
    return folder


def _system_of_record(raw: dict[str, Any], path: Path) -> System:
    # The message of `find_system` says which setting is wrong; here is known in which file.
    try:
        return find_system(raw.get("system"))
    except config.ConfigError as e:
        raise config.ConfigError(f"{path}: {e}") from e


def _with_environment(raw: dict[str, Any], system: System, path: Path) -> dict[str, Any]:
    """The record with the settings that environment variables give; a warning says which."""
    settings = {}
    for variable, key in system.environment.items():
        value = os.environ.get(variable)
        # An empty variable is how a shell script switches one off.
        if value:
            settings[variable] = f"{key}={value}"
    if not settings:
        return raw
    pairs = ", ".join(f"{variable} -> {setting}" for variable, setting in settings.items())
    _log.warning("%s: from the environment: %s", path, pairs)
    return config.override(raw, tuple(settings.values()), source="the environment")


def record_of(exp: str) -> Path:
    """The file of an experiment's record.

    Raises:
        ConfigError: no such experiment or run.
    """
    path = Path(exp) if exp.endswith((".toml", ".json")) else EXPERIMENTS / f"{exp}.toml"
    # An experiment wins over a folder of the same name.
    if not path.exists() and Path(exp).is_dir():
        return config.run_folder(exp) / "config.json"
    if not path.exists():
        names = ", ".join(experiment_names())
        if not names:
            names = f"none in {EXPERIMENTS.absolute()} (run this in the project folder)"
        raise config.ConfigError(f"{path}: no such experiment or run; there are {names}")
    return path


# Training ---------------------------------------------------------------------------------------------------
def run(exp: str, overrides: Sequence[str] = (), log: Log = tqdm.write) -> list[Result]:
    """Train (or go on with) an experiment, then evaluate it; the same call after a stop goes on where that
    was.
    """
    # A slip in the record ends here, before processes wait for each other.
    cfg, folder = resolve(exp, overrides)
    # Before the processes meet, which starts CUDA.
    with _determinism(cfg):
        return _train_and_assess(cfg, folder, log)


def _determinism(cfg: Any) -> AbstractContextManager[None]:
    """Where a table of the record says so, the whole run is deterministic, its evaluation too."""
    wanted = any(table.deterministic for table in training_tables(cfg))
    # Training itself is strict. An evaluation that samples answers has no such kernel for its cumulative sums,
    # and must not fail after days of training.
    return deterministic(wanted, strict=False)


def _train_and_assess(cfg: Any, folder: Path, log: Log) -> list[Result]:
    processes.join_processes()
    number_of_processes = processes.world_size()
    first = processes.rank() == 0
    # All processes train the same: one line of each is enough.
    if not first:
        log = _discard_line
    start = time.monotonic()
    system = find_system(cfg.system)
    _check_places(system, cfg, folder)
    if any(table.tensorboard for table in training_tables(cfg)):
        check_tensorboard()
    # A second run would remove the checkpoint that the first is writing.
    with files.file_lock(folder) if first else nullcontext():
        if first:
            files.remove_unfinished(folder)
            log = _kept_log(log, folder)
        log(f"{folder}")
        data = _by_first_process(lambda: system.prepare(cfg, log))
        card = fullest_card(cfg)
        _by_first_process(lambda: check_memory(system, cfg, card, number_of_processes, data))
        # Only now: data that are missing leave no folder that looks like a run.
        _describe(folder, cfg)
        log(f"data in place after {_minutes_since(start)}")
        model, params = system.fit(cfg, folder, log, **_data_argument(data))
        log(f"trained after {_minutes_since(start)}")
        rows: list[Result] = []
        # Evaluation is not shared: the other processes end here, and the first must not wait for them.
        if first:
            with processes.single_process():
                rows = _assess(system, model, params, folder / "results", folder.name, log, data)
        log(f"done after {_minutes_since(start)}")
    return rows


def _discard_line(line: str) -> None:
    pass


def _check_places(system: System, cfg: Any, folder: Path) -> None:
    """Raise where a run will write and cannot: its folder, the data it draws, its cache."""
    files.check_writable(folder / "results", folder=True)
    for name in ("config.json", "environment.json"):
        files.check_writable(folder / name)
    for place in system.folders(cfg):
        files.check_writable(place, folder=True)
    check_base(cfg, folder)


def check_base(cfg: Any, folder: Path) -> None:
    """Raise where the model that another experiment trains is not there: the hub has none of its name."""
    if base := base_experiment(cfg):
        raise ValueError(
            f"model.name: {cfg.model.name} must be a model and is not there; `invoke pipeline --exp "
            f"{folder.name.rpartition('-')[0]}` trains the experiment {base} and puts its model there"
        )


def base_experiment(cfg: Any) -> str:
    """The experiment that trains the model of a record, where model.name is models/EXPERIMENT and not there; else "".

    Warns of a model that the experiment trained before its record was changed.
    """
    path = Path(getattr(getattr(cfg, "model", None), "name", ""))
    if path.parent != Path("models") or not (EXPERIMENTS / f"{path.name}.toml").is_file():
        return ""
    if not path.exists():
        return path.name
    if (path / TRAINED_BY).is_file():
        used, present = (path / TRAINED_BY).read_text(encoding="utf-8").strip(), resolve(path.name)[1].name
        if used != present:
            _log.warning(
                "%s: is of the run %s, but the experiment %s is now %s; remove the folder to train it anew",
                path,
                used,
                path.name,
                present,
            )
    return ""


def _describe(folder: Path, cfg: Any) -> None:
    """Write what made the run: its record, and the versions of everything it ran with."""
    if processes.rank() != 0:
        return
    record = config.unstructure(cfg)
    # With the record, so that a config.json that was changed later is found out.
    environment = results.environment() | {"record": record}
    path = folder / "config.json"
    # The file of an older version, with other settings, is left: the run is named by it.
    if not path.exists() or folder.name.endswith(config.record_digest(cfg)):
        files.write_text(path, json.dumps(record, indent=1) + "\n")
    files.write_text(folder / "environment.json", json.dumps(environment, indent=1) + "\n")


def _by_first_process(make: Callable[[], Any]) -> Any:
    """Process 0 makes what all need; the others wait and find it made: they hold no lock that it holds, and
    draw nothing again. Returns what `make` does, None in the others.
    """
    made = None
    if processes.rank() == 0:
        with processes.single_process():
            made = make()
    processes.wait_for_all()
    return made


def _data_argument(data: Any) -> dict[str, Any]:
    """The argument of `fit` and `assess` with what `prepare` returned; none where that was nothing."""
    if data is None:
        return {}
    return {"data": data}


def _minutes_since(start: float) -> str:
    seconds = round(time.monotonic() - start)
    return f"{seconds // 60} min {seconds % 60:02d} s"


def _kept_log(log: Log, folder: Path) -> display.Log:
    """The log whose lines the run folder keeps, too."""
    folder.mkdir(parents=True, exist_ok=True)
    return display.Log(log, folder / "log.txt")


# Evaluation -------------------------------------------------------------------------------------------------
def evaluate(
    exp: str, overrides: Sequence[str] = (), log: Log = tqdm.write, variant: str = ""
) -> list[Result]:
    """Evaluate a trained experiment again.

    Where `exp` is a run's folder (or the `config.json` in it), that run is evaluated, and settings of data
    and evaluate may differ from
    those it was trained with: other questions, another way to answer. Its results go into a folder of their
    own beside the others.

    Args:
        variant: of a language model, see `system.VARIANTS`: scored instead of the run, into `RUN/results-VARIANT`.
            "lora" is the run itself.
    Raises:
        ValueError: no such run or variant; a setting that is not the one the run was trained with.
    """
    cfg, folder = resolve(exp, overrides)
    system = find_system(cfg.system)
    if variant not in ("", "lora"):
        return _evaluate_variant(system, cfg, folder, variant, log)
    path = record_of(exp)
    if path.name == "config.json":
        return _evaluate_run(system, path, cfg, log)
    data = None
    if not (folder / "config.json").exists():
        # A record that trains nothing needs no run before.
        if system.trains(cfg):
            raise ValueError(
                f"{folder}: no such run; `invoke train --exp {exp}` makes it (the same --set must be given); "
                "an existing run is evaluated with other data.* or evaluate.* by `--exp runs/NAME --set ...`"
            )
        _check_places(system, cfg, folder)
        data = system.prepare(cfg, log)
        _describe(folder, cfg)
    # The folder is named by the digest of `cfg`, so its record is this one, unless somebody has edited it.
    record = config.load_record(folder / "config.json", type(cfg))
    changed = config.differences(config.unstructure(record), config.unstructure(cfg))
    if changed:
        raise ValueError(
            f"{folder / 'config.json'}: was changed after the run was trained with it: {changed[0]}; undo "
            "that"
        )
    with _determinism(cfg), _evaluating(folder, folder / "results"):
        log = _kept_log(log, folder)
        model, params = system.load(folder)
        return _assess(system, model, params, folder / "results", folder.name, log, data)


def _evaluate_run(system: System, path: Path, cfg: Any, log: Log) -> list[Result]:
    folder = path.parent
    trained_with: Any = config.load_record(path, system.record)
    changed = config.differences(config.unstructure(trained_with), config.unstructure(cfg))
    # Anything else would describe a model that was never trained.
    wrong = [difference for difference in changed if not difference.startswith(("$.data.", "$.evaluate."))]
    if wrong:
        raise ValueError(
            f"{path}: only data and evaluate may differ from what the run was trained with, found {wrong[0]}"
        )
    # An old run keeps its name, although its record has other settings, and so another digest, today.
    name, results_folder = folder.name, folder / "results"
    if changed:
        digest = config.record_digest(cfg)
        name = f"{folder.name.rpartition('-')[0]}-{digest}"
        results_folder = folder / f"results-{digest}"
    with _determinism(cfg), _evaluating(folder, results_folder):
        log = _kept_log(log, folder)
        model, params = system.load(folder)
        # Loaded with the record it was trained with; data and evaluate are those of this call.
        return _assess(system, evolve(model, cfg=cfg), params, results_folder, name, log)


def _evaluate_variant(system: System, cfg: Any, folder: Path, variant: str, log: Log) -> list[Result]:
    """Score a variant of the model; most need no trained run, so the data is put in place here."""
    if system.variant is None:
        raise ValueError(f"evaluate: a {cfg.system} experiment has no variants")
    check_base(cfg, folder)
    found = system.variant(cfg, folder, variant)
    results_folder = folder / f"results-{variant}"
    with _determinism(cfg), _evaluating(folder, results_folder):
        data = system.prepare(cfg, log)
        model, params = found.open()
        return _assess(system, model, params, results_folder, f"{folder.name}-{variant}", log, data)


@contextmanager
def _evaluating(folder: Path, results_folder: Path) -> Iterator[None]:
    """A run is evaluated by any number of processes, each with results of its own, and not while it is being
    trained.
    """
    with files.file_lock(folder, shared=True), files.file_lock(results_folder):
        yield


def _assess(
    system: System, model: Any, params: Any, results_folder: Path, name: str, log: Log, data: Any = None
) -> list[Result]:
    """Score the test split, write rows and report into the folder, and log the report's tables.

    Args:
        data: what `prepare` returned, if it was called before.
    """
    files.check_writable(results_folder, folder=True)
    rows, page = system.assess(model, params, results_folder, name, **_data_argument(data))
    results.write_results(results_folder / "results.jsonl", rows)
    # The Markdown twin of the page, up to its explanations: the tables fit a terminal.
    tables = page.with_suffix(".md").read_text().split("\n\nIntervals are")[0]
    log(tables)
    log(f"report: {page}")
    return rows
