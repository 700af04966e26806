"""Any system from a record: experiments by name, run folders, training, evaluation."""

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from attrs import evolve
from tqdm import tqdm

from medvl.base import config, display, files, processes, store
from medvl.ct import ingest, reports
from medvl.ct import names as volume_names
from medvl.ct import preprocess as ct
from medvl.evaluation import report, results
from medvl.evaluation.results import Result
from medvl.systems.adapters import record as adapters
from medvl.systems.adapters import run as adapters_run
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip import run as ct_clip_run
from medvl.systems.slide_vqa import model as slide_vqa
from medvl.systems.slide_vqa import run as slide_vqa_run
from medvl.systems.tune import record as tune
from medvl.systems.tune import run as tune_run

SYSTEMS: dict[str, tuple[type, ModuleType]] = {
    "ct_clip": (ct_clip.Config, ct_clip_run),
    "tune": (tune.Config, tune_run),
    "adapters": (adapters.Config, adapters_run),
    "slide_vqa": (slide_vqa.Config, slide_vqa_run),
}
# Variables that other tools read for the same settings; they become part of the record.
ENVIRONMENT = {"adapters": {"MAX_PIXELS": "chat.max_pixels", "MAX_NUM": "chat.max_images"}}
_log = logging.getLogger("medvl")
EXPERIMENTS = Path("experiments")
RUNS = Path("runs")


def names() -> dict[str, str]:
    """{experiment: its line of description} of the folder `experiments`; of one that cannot be read, why not."""
    found = {}
    for path in sorted(EXPERIMENTS.glob("*.toml")):
        try:
            found[path.stem] = str(config.read_settings(path).get("about", ""))
        except config.ConfigError as e:
            found[path.stem] = f"(not an experiment: {e})"
    return found


def experiments() -> None:
    """Print the experiments with a line each.

    Raises:
        ConfigError: there is none; the working folder is another one than the project's.
    """
    if not (found := names()):
        raise config.ConfigError(
            f"{EXPERIMENTS.absolute()}: holds no experiments (*.toml); run this in the project folder"
        )
    for name, about in found.items():
        print(f"{name:24} {about}")


def resolve(exp: str, overrides: Sequence[str] = ()) -> tuple[Any, Path]:
    """(record, run folder) of an experiment: a name in `experiments/`, the path of a `.toml` or `.json`, or a run's folder.

    Raises:
        ConfigError: no such experiment (lists those there are), unknown system, or a record that is not valid.
    """
    path = record_of(exp)
    raw = config.read_settings(path)
    written = config.record_digest(
        raw
    )  # that of a run's name, also where it was made by a version with fewer settings
    given = {
        v: f"{key}={os.environ[v]}"
        for v, key in ENVIRONMENT.get(str(raw.get("system")), {}).items()
        if os.environ.get(v)
    }
    if given and path.suffix == ".toml":
        _log.warning(
            "%s: from the environment: %s", path, ", ".join(f"{v} -> {said}" for v, said in given.items())
        )
        raw = config.override(raw, tuple(given.values()), where="the environment")
    raw = config.override(raw, tuple(overrides), where=str(path))
    if not isinstance(raw.get("system"), str) or raw["system"] not in SYSTEMS:
        raise config.ConfigError(
            f"{path}: system must be one of {', '.join(SYSTEMS)}, found {raw.get('system')!r} @ $.system"
        )
    cfg: Any = config.structure(raw, SYSTEMS[raw["system"]][0], where=str(path))
    name, digest = path.stem, config.record_digest(cfg)
    if path.name == "config.json":
        name, _, its_own = path.parent.name.rpartition("-")
        if its_own == digest or (its_own == written and not overrides):
            return cfg, path.parent  # the run itself, wherever it lies now
    return cfg, RUNS / f"{name or path.parent.name}-{digest}"


def record_of(exp: str) -> Path:
    """The file of an experiment's record.

    Raises:
        ConfigError: no such experiment or run.
    """
    path = Path(exp) if exp.endswith((".toml", ".json")) else EXPERIMENTS / f"{exp}.toml"
    if not path.exists() and Path(exp).is_dir():
        return config.run_folder(exp) / "config.json"
    if not path.exists():
        there = ", ".join(names()) or f"none in {EXPERIMENTS.absolute()} (run this in the project folder)"
        raise config.ConfigError(f"{path}: no such experiment or run; there are {there}")
    return path


def run(exp: str, overrides: Sequence[str] = (), log: Callable[[str], None] = tqdm.write) -> list[Result]:
    """Train (or go on with) an experiment, then evaluate it; the same call after a stop goes on where that was."""
    cfg, folder = resolve(exp, overrides)
    processes.join_processes()
    log = log if processes.rank() == 0 else (lambda _: None)
    start = time.monotonic()
    _check_places(cfg, folder)
    _, system = SYSTEMS[cfg.system]
    # A second run would remove the checkpoint that the first is writing.
    with files.file_lock(folder) if processes.rank() == 0 else nullcontext():
        if processes.rank() == 0:
            files.remove_unfinished(folder)
            log = _kept(log, folder)
        log(f"{folder}")
        _first(lambda: system.prepare(cfg, log))
        _describe(folder, cfg)
        log(f"data in place after {_minutes(start)}")
        model, params, means = system.fit(cfg, folder, log)
        log(f"trained after {_minutes(start)}")
        rows: list[Result] = []
        if processes.rank() == 0:
            with processes.single_process():
                rows = _assess(system, model, params, means, folder / "results", folder.name, log)
        log(f"done after {_minutes(start)}")
    return rows


def evaluate(
    exp: str, overrides: Sequence[str] = (), log: Callable[[str], None] = tqdm.write
) -> list[Result]:
    """Evaluate a trained experiment again.

    Where `exp` is a run's folder (or the `config.json` in it), that run is evaluated, and settings of data and evaluate may differ from
    those it was trained with: other questions, another way to answer. Its results go into a folder of their own beside the others.
    """
    cfg, folder = resolve(exp, overrides)
    _, system = SYSTEMS[cfg.system]
    if (path := record_of(exp)).name == "config.json":
        return _evaluate_run(path, cfg, log)
    if not (folder / "config.json").exists():
        if getattr(cfg, "trained", True):
            raise ValueError(
                f"{folder}: no such run; `invoke train --exp {exp}` makes it (the same --set must be given); a run that is there "
                "is evaluated with other data.* or evaluate.* by `--exp runs/NAME --set ...`"
            )
        _check_places(cfg, folder)
        system.prepare(cfg, log)
        _describe(folder, cfg)
    record = config.load_record(folder / "config.json", type(cfg))
    if changed := config.differences(config.unstructure(record), config.unstructure(cfg)):
        raise ValueError(
            f"{folder / 'config.json'}: was changed after the run was trained with it, {changed[0]}; put that back"
        )
    with _evaluating(folder, folder / "results"):
        log = _kept(log, folder)
        model, params, means = system.load(folder)
        return _assess(system, model, params, means, folder / "results", folder.name, log)


def _evaluate_run(path: Path, cfg: Any, log: Callable[[str], None]) -> list[Result]:
    record, system = SYSTEMS[cfg.system]
    changed = config.differences(
        config.unstructure(config.load_record(path, record)), config.unstructure(cfg)
    )
    if wrong := [d for d in changed if not d.startswith(("$.data.", "$.evaluate."))]:
        raise ValueError(
            f"{path}: only data and evaluate may differ from what the run was trained with, found {wrong[0]}"
        )
    name = f"{path.parent.name.rpartition('-')[0]}-{config.record_digest(cfg)}"
    out = path.parent / (f"results-{config.record_digest(cfg)}" if changed else "results")
    with _evaluating(path.parent, out):
        log = _kept(log, path.parent)
        model, params, means = system.load(path.parent)
        return _assess(system, evolve(model, cfg=cfg), params, means, out, name, log)


def _kept(log: Callable[[str], None], folder: Path) -> display.Log:
    """The log whose lines the run folder keeps, too."""
    folder.mkdir(parents=True, exist_ok=True)
    return display.Log(log, folder / "log.txt")


@contextmanager
def _evaluating(folder: Path, out: Path) -> Iterator[None]:
    """A run is evaluated by any number of processes, each with results of its own, and not while it is being trained."""
    with files.file_lock(folder, shared=True), files.file_lock(out):
        yield


def _assess(
    system: ModuleType, model: Any, params: Any, means: Any, out: Path, name: str, log: Callable[[str], None]
) -> list[Result]:
    files.check_writable(out, folder=True)
    rows, page = system.assess(model, params, means, out, name)
    results.write_results(out / "results.jsonl", rows)
    log(page.with_suffix(".md").read_text().split("\n\nIntervals are")[0])
    log(f"report: {page}")
    return rows


def _check_places(cfg: Any, folder: Path) -> None:
    """Raise where a run will write and cannot: its folder, the data it draws, its cache."""
    files.check_writable(folder / "results", folder=True)
    for name in ("config.json", "environment.json"):
        files.check_writable(folder / name)
    if cfg.data.source != "files":
        files.check_writable(cfg.data.folder, folder=True)
    if hasattr(cfg.data, "cache"):
        files.check_writable(cfg.data.cache, folder=True)


def _describe(folder: Path, cfg: Any) -> None:
    if processes.rank() == 0:
        record = config.unstructure(cfg)
        environment = results.environment() | {
            "record": record
        }  # so that a config.json that was changed is found out
        path = folder / "config.json"
        if not path.exists() or folder.name.endswith(
            config.record_digest(cfg)
        ):  # that of an older version is left, the run is named by it
            files.write_text(path, json.dumps(record, indent=1) + "\n")
        files.write_text(folder / "environment.json", json.dumps(environment, indent=1) + "\n")


def _first(make: Callable[[], None]) -> None:
    """Process 0 makes what all need; the others wait and find it made: they hold no lock that it holds, and draw nothing again."""
    if processes.rank() == 0:
        with processes.single_process():
            make()
    processes.wait_for_all()


def _minutes(start: float) -> str:
    seconds = round(time.monotonic() - start)
    return f"{seconds // 60} min {seconds % 60:02d} s"


# What tasks call besides ------------------------------------------------------------------------------------------------------------------


def labels(exp: str, overrides: Sequence[str] = (), number: int = 0) -> None:
    """Print one training sample as the model gets it, the trained tokens between marks."""
    cfg, folder, system = _language(exp, overrides, "labels")
    system.prepare(cfg, lambda _: None)
    print(system.labels(cfg, folder, number))


def estimate(exp: str, overrides: Sequence[str] = (), processes: int = 1) -> None:
    """Print the memory that each stage of a run will need on one of so many processes, by part."""
    cfg, folder, system = _language(exp, overrides, "estimate")
    for stage, parts in system.memory(cfg, folder, processes).items():
        rows = [(part, f"{n / 1e9:.3f}") for part, n in sorted(parts.items(), key=lambda p: -p[1])]
        print(f"stage {stage}, {f'each of {processes} processes' if processes > 1 else 'one process'}:")
        print(
            results.markdown_table(
                ("Part", "GB"), [*rows, ("at the peak", f"{sum(parts.values()) / 1e9:.3f}")]
            )
        )


def _language(exp: str, overrides: Sequence[str], task: str) -> tuple[Any, Path, ModuleType]:
    cfg, folder = resolve(exp, overrides)
    system = SYSTEMS[cfg.system][1]
    if not hasattr(system, task if task == "labels" else "memory"):
        raise ValueError(
            f"{task}: {exp} is a {cfg.system} experiment; only systems that train a language model have {task}"
        )
    return cfg, folder, system


def preprocess(
    source: str, out: str, exp: str, overrides: Sequence[str], metadata: str, workers: int, sheet: str
) -> int:
    """Fill a store; returns the exit status: 0, or 3 when scans were rejected."""
    if sheet and not sheet.lower().endswith(
        ".png"
    ):  # a table or the store can then never be what is replaced
        raise ValueError(f"preprocess: sheet must end in .png, got {sheet!r}")
    for path in filter(None, (out, str(ingest.rejected_csv(out)), sheet)):
        files.check_writable(path)
    _log.setLevel(logging.INFO)
    base: dict[str, Any] = {}
    if exp:
        chosen = resolve(exp)[0]
        if not hasattr(chosen, "ct"):
            raise ValueError(
                f"preprocess: {exp} is a {chosen.system} experiment; only ct_clip experiments have settings of CT"
            )
        base = config.unstructure(chosen.ct)
    cfg = config.structure(config.override(base, tuple(overrides), "preprocess"), ct.CtConfig, "preprocess")
    done = ingest.preprocess_folder(source, out, cfg, metadata, workers)
    print(f"{out}: {done.done} volumes written, {done.skipped} were there, {len(done.rejected)} rejected")
    if done.rejected:
        print(f"rejected scans and reasons: {ingest.rejected_csv(out)}")
    if sheet and (of := store.open_store(out)).names:
        ingest.contact_sheet(of, sheet, of.names[:36])
        print(f"contact sheet of {min(36, len(of.names))} volumes: {sheet}")
    return 3 if done.rejected else 0


def embed(folder: str, scan: str, out: str, metadata: str = "", settings: Sequence[str] = ()) -> None:
    """Write one scan's embedding, float32 [d], L2-normalised, to a .npy."""
    if not out.endswith(".npy"):  # a scan can then never be what is replaced
        raise ValueError(f"embed: out must end in .npy, got {out!r}")
    files.check_writable(out)
    found = ct_clip_run.look(_ct_run(folder, "embed"), scan, (), metadata, settings)
    files.write_array(out, found["embedding"].numpy())
    print(f"{out}: {len(found['embedding'])} numbers")


def _ct_run(given: str, task: str) -> Path:
    folder = config.run_folder(given)
    if (system := config.system_of(folder)) != "ct_clip":
        raise ValueError(f"{task}: {folder} is a {system} run; only ct_clip runs look at scans")
    return folder


def classify(
    folder: str, scan: str, findings: Sequence[str], metadata: str = "", settings: Sequence[str] = ()
) -> None:
    """Print a table of zero-shot probabilities of one scan."""
    found = ct_clip_run.look(_ct_run(folder, "classify"), scan, findings, metadata, settings)
    v, cuts = found["volume"], found["threshold"]
    print(
        f"{v.name}: HU by {v.hu_rule}, {v.source_shape} voxels of {tuple(round(s, 2) for s in v.source_spacing_mm)} mm, slices {v.occupied}"
    )
    rows = [
        (f, p, cuts.get(f, math.nan), "" if f not in cuts else "yes" if p >= cuts[f] else "no")
        for f, p in found["probability"].items()
    ]
    print(results.markdown_table(("Finding", "Probability", "Threshold", "Called"), rows) + report.NOTICE)


def split(
    labels: str,
    out: str,
    sizes: str,
    seed: int,
    tables: Sequence[str] = (),
    patient: str = "",
    pattern: str = "",
) -> None:
    """Cut a label table and others (reports, metadata) into parts by patient: `valid_reports.csv` -> `out/{part}_reports.csv`.

    Everything is read and checked before anything is written, and no file that exists is replaced.

    Args:
        patient: a column of one of the tables that says whose volume it is.
        pattern: a regular expression that finds the patient in a volume's name, see `names.patients_of`.
    Raises:
        ValueError: unusable tables or sizes, two tables that would be cut into one file, an output that exists.
    """
    files.check_writable(out, folder=True)
    volumes, _, findings = reports.read_labels(labels, patient=patient)
    column = reports.read_patients((labels, *tables), patient) if patient else None
    patients = volume_names.patients_of(volumes, pattern, column)
    parts = reports.split_patients(volumes, findings, _sizes(sizes), seed, patients)
    rows = {path: files.read_csv(path, ("VolumeName",)) for path in (labels, *tables)}
    outputs = _outputs_of_split(list(parts), (labels, *tables), Path(out))
    for path, table in rows.items():
        unknown = len({_volume_of(row) for row in table} - {*volumes})
        if unknown == len(table):
            raise ValueError(f"split: {path}: none of its {len(table)} rows is about a volume of {labels}")
        if unknown:
            _log.warning(
                "%s: %d of %d rows are about volumes without labels and are in no part",
                path,
                unknown,
                len(table),
            )

    for part, indices in parts.items():
        chosen = {volumes[i] for i in indices}
        for path, table in rows.items():
            kept = [row for row in table if _volume_of(row) in chosen]
            files.write_csv(outputs[part, path], kept, list(table[0]))
        people = len({patients[i] for i in indices})
        prevalence = findings[indices].mean()
        print(
            f"{part}: {len(indices)} volumes of {people} patients, mean prevalence {prevalence:.3f} (all: {findings.mean():.3f})"
        )


def _volume_of(row: dict[str, str]) -> str:
    return volume_names.volume_name(row["VolumeName"].strip())


def _sizes(text: str) -> dict[str, float]:
    try:
        named = [part.split("=") for part in text.split(",")]
        sizes = {name.strip(): float(size) for name, size in named}
    except ValueError as e:
        raise ValueError(f"split: sizes must be name=number,name=number, got {text!r}") from e
    if len(sizes) < len(named) or not all(re.fullmatch(r"\w[\w.-]*", name) for name in sizes):
        raise ValueError(f"split: sizes must name each part once, in letters and digits, got {text!r}")
    return sizes


def _outputs_of_split(parts: Sequence[str], tables: Sequence[str], out: Path) -> dict[tuple[str, str], Path]:
    """{(part, table): the file to write}; refuses what would overwrite a file, or be written twice."""
    outputs: dict[tuple[str, str], Path] = {}
    for part in parts:
        for table in tables:
            name = Path(table).name
            path = out / f"{part}_{name.partition('_')[2] or name}"
            if path in outputs.values():
                raise ValueError(
                    f"split: {' and '.join(tables)}: two of these would be cut into {path}; rename one of them"
                )
            if path.exists():
                raise ValueError(
                    f"split: {path} exists and is not replaced; name another folder with --out, or move it away"
                )
            outputs[part, table] = path
    return outputs
