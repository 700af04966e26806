"""`invoke pipeline`: a language model from its name to a report, in phases whose files must pass gates.

Each phase runs in a process of its own and writes its files into `RUN/pipeline`. One whose gates are green is not run
again, so the same command after a stop goes on where that was.
"""

import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from attrs import frozen
from tqdm import tqdm

from medvl.base import files, workers
from medvl.commands import doctor
from medvl.evaluation import results
from medvl.hub import checkpoints
from medvl.language import measure
from medvl.systems import bench, export, gates, pipeline_report, quantize, run
from medvl.systems.gates import GATES
from medvl.systems.system import VARIANTS, Log, System
from medvl.weights import lora

LOG = tqdm.write  # a line beside progress bars


@frozen(kw_only=True)
class Work:
    """What a phase works on."""

    exp: str
    overrides: tuple[str, ...]
    cfg: Any
    run: Path  # the run folder
    system: System

    @property
    def folder(self) -> Path:
        """Where the files of the pipeline are."""
        return self.run / "pipeline"

    def read(self, file: str) -> Any:
        """What a file of an earlier phase holds; its gate is green."""
        return json.loads((self.folder / file).read_text(encoding="utf-8"))

    def write(self, file: str, content: Any) -> None:
        """Write a file of the pipeline: a text, or anything as JSON."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        files.write_text(self.folder / file, text)


def open_work(exp: str, overrides: Sequence[str] = ()) -> Work:
    """The work of an experiment.

    Raises:
        ValueError: no such experiment, one of a system without variants, or one that has no model before training.
    """
    cfg, folder = run.resolve(exp, overrides)
    system = run.find_system(cfg.system)
    if system.variant is None or system.compare is None:
        raise ValueError(f"pipeline: {exp} is a {cfg.system} experiment, which has no variants to compare")
    if not cfg.model.name or not any(pattern.startswith("lora/") for pattern in cfg.train.patterns):
        raise ValueError(
            f"pipeline: {exp} must have a model.name and a stage that trains lora/..., found {cfg.model.name!r} and "
            f"{', '.join(cfg.train.patterns)}; train a model from scratch as an experiment NAME and adapt models/NAME"
        )
    return Work(exp=exp, overrides=tuple(overrides), cfg=cfg, run=folder, system=system)


def run_phase(phase: str, exp: str, overrides: Sequence[str] = ()) -> None:
    """Make the files of one phase; those before it are there."""
    PHASES[phase](open_work(exp, overrides))


def run_in_process(phase: str, exp: str, overrides: Sequence[str] = ()) -> None:
    """`run_phase` in a fresh process, whose peak of memory is its own.

    Raises:
        ValueError: the process was killed.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), workers.end_with_parent) as pool:
            pool.submit(run_phase, phase, exp, overrides).result()
    except BrokenProcessPool as e:
        raise ValueError(f"pipeline: the process of phase {phase} was killed; was memory short?") from e


def run_pipeline(
    exp: str, overrides: Sequence[str] = (), log: Log = LOG, make: Callable[..., None] = run_in_process
) -> Path:
    """Run the phases whose gates are not green; returns the folder of their files.

    Args:
        make: (phase, exp, overrides) makes the files of a phase.
    Raises:
        ValueError: as `open_work` and the phases; a gate that is red after its phase has run.
    """
    work = open_work(exp, overrides)
    files.check_writable(work.folder, folder=True)
    with files.file_lock(work.folder):
        with files.file_lock(work.run):  # refused while the run is being trained or evaluated
            files.remove_unfinished(work.run)
        for phase in PHASES:
            log(f"{phase}: {'begins' if _red_gates(work, phase) else 'its gates are green, nothing to do'}")
            if not _red_gates(work, phase):
                continue
            start = time.monotonic()
            try:
                make(phase, exp, overrides)
                if red := _red_gates(work, phase):
                    raise ValueError(f"pipeline: a gate of phase {phase} is red: {red[0]}")
            except (ValueError, OSError, FloatingPointError) as e:
                with suppress(OSError):  # a full disk has no room for this either
                    _log_phase(work, phase, start, f"refused: {e}")
                raise
            _log_phase(work, phase, start, "its gates are green")
    log(f"written: {work.folder}")
    return work.folder


def check_pipeline(exp: str, overrides: Sequence[str] = ()) -> int:
    """Print every gate of a pipeline and run nothing; returns 1 where one is red, else 0."""
    work = open_work(exp, overrides)
    faults = gates.check_folder(work.folder)
    for gate in GATES:
        print(f"{'red  ' if faults[gate.file] else 'green'} {gate.phase}: {gate.file}")
        for fault in faults[gate.file]:
            print(f"      {fault}")
    print(f"{sum(map(bool, faults.values()))} of {len(GATES)} gates are red: {work.folder}")
    return int(any(faults.values()))


def _red_gates(work: Work, phase: str) -> list[str]:
    """The faults in the files of a phase, each with its file."""
    if phase == "model" and (base := run.base_experiment(work.cfg)):
        return [f"{work.cfg.model.name}: must be there, trained by the experiment {base}"]
    faults = gates.check_folder(work.folder)
    own = [gate for gate in GATES if gate.phase == phase]
    return [f"{work.folder / gate.file}: {fault}" for gate in own for fault in faults[gate.file]]


def _log_phase(work: Work, phase: str, start: float, outcome: str) -> None:
    path = work.folder / "BUILD_LOG.md"
    before = path.read_text(encoding="utf-8") if path.exists() else "# Build log\n"
    heading = f"\n## {datetime.now():%Y-%m-%d %H:%M:%S} {phase}\n\n"
    work.write(path.name, f"{before}{heading}{time.monotonic() - start:.1f} s, {outcome}\n")


# Phases -----------------------------------------------------------------------------------------------------
def _doctor(work: Work) -> None:
    if doctor.check_installation(str(work.folder / "environment.json")):
        raise ValueError("pipeline: medvl lacks what it needs, see the table above; install that")


def _model(work: Work) -> None:
    """Bring the model here: from the hub, or trained by the experiment of its name."""
    name, start = work.cfg.model.name, time.monotonic()
    if base := run.base_experiment(work.cfg):
        _, folder = run.resolve(base)
        _train_once(base, (), folder)
        with checkpoints.new_folder(name) as tmp:
            shutil.copytree(folder / "model", tmp, dirs_exist_ok=True)
            files.write_text(tmp / run.TRAINED_BY, folder.name + "\n")
    assert work.system.variant is not None
    # Opened once, so that all its files are here, and whole.
    work.system.variant(work.cfg, work.run, "base").open()
    sizes = measure.file_sizes(checkpoints.find_file(name, ("config.json",)).parent)
    content = {"name": name, "files": sizes, "bytes": sum(sizes.values())}
    work.write("download.json", content | {"seconds": time.monotonic() - start})


def _train_once(exp: str, overrides: Sequence[str], folder: Path) -> None:
    if not (folder / "results" / "results.jsonl").exists():  # the last file of a training
        run.run(exp, overrides, LOG)


def _bench(variant: str, file: str) -> Callable[[Work], None]:
    def phase(work: Work) -> None:
        fell_back = variant == "int4" and work.read("quantization_info.json")["method"] == "nf4"
        path = bench.bench(work.exp, work.overrides, "nf4" if fell_back else variant, log=LOG)
        work.write(file, path.read_text(encoding="utf-8"))

    return phase


def _quantize(work: Work) -> None:
    info, target = work.run / "quantization_info.json", work.run / "int4"
    # The folder is written before the file about it: where that is missing, both are made anew.
    if not (info.exists() and target.exists()):
        info.unlink(missing_ok=True)
        if target.exists():
            shutil.rmtree(target)
        quantize.quantize(work.exp, work.overrides, log=LOG)
    work.write(info.name, info.read_text(encoding="utf-8"))


def _data(work: Work) -> None:
    data = work.cfg.data
    read = work.system.prepare(work.cfg, LOG)
    if data.source == "public":
        for name in ("download_summary.json", "data_summary.json"):
            work.write(name, (Path(data.folder) / name).read_text(encoding="utf-8"))
        return
    splits = {split: len(read(split)) for split in ("train", "valid", "test")}
    drawn = data.source != "files"
    licence = "drawn by medvl, shows no patient" if drawn else "not recorded"
    work.write("download_summary.json", {data.source: {"path": data.folder, "rows": sum(splits.values())}})
    summary = {"licences": [licence], "non_commercial": False if drawn else None}
    work.write("data_summary.json", {"splits": splits, "sources": {data.source: splits}, **summary})


def _train(work: Work) -> None:
    _train_once(work.exp, work.overrides, work.run)
    model, params = work.system.load(work.run)
    numbers, base, percent = lora.count_adapter(model.adapter, params["model"])
    conversations = work.read("data_summary.json")["splits"]["train"]
    stages = []
    for i, stage in enumerate(work.cfg.train.stages):
        losses = _losses(work.run / f"{i}-{stage.name}" / "metrics.jsonl")
        epochs = losses["steps"] * (stage.batch or work.cfg.train.batch) / conversations
        stages.append({"name": stage.name, "epochs": epochs, **losses})
    trainable = {"numbers": numbers, "base": base, "percent": percent}
    seconds = sum(stage["seconds"] for stage in stages)
    work.write("training_metrics.json", {"seconds": seconds, "stages": stages, "trainable": trainable})


def _losses(path: Path) -> dict[str, Any]:
    """Losses and seconds of a stage. The first and the final loss are means of up to five logged ones, as that of one
    batch says little."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    few = max(1, min(5, len(losses) // 2))
    steps = [0, *(line["step"] for line in lines)]
    seconds = [line["seconds_per_step"] * (line["step"] - steps[i]) for i, line in enumerate(lines)]
    return {
        "steps": steps[-1],
        "seconds": sum(seconds),
        "first_loss": sum(losses[:few]) / few,
        "final_loss": sum(losses[-few:]) / few,
        "best_loss": min(losses),
        "validation": [line["valid_loss"] for line in lines if "valid_loss" in line],
    }


def _evaluate(work: Work) -> None:
    """Score each variant on the test split, and compare the tuned one with the others."""
    assert work.system.compare is not None
    info, left_out = work.read("quantization_info.json"), {}
    if info["method"] == "nf4":
        left_out["int4"] = f"quantised by nf4 instead: {info['reason']}"
    if not (work.run / "merged").exists():
        try:
            export.export_run(str(work.run), work.run / "merged", "merged", log=LOG)
        except ValueError as e:
            # Of what is refused, only that this adapter cannot be merged is a result.
            if not str(e).startswith(("export: merged onto", "merge_adapter")):
                raise
            left_out["merged"] = str(e)
    variants, pairs, metric = {}, {}, ""
    for variant in sorted({*VARIANTS} - {*left_out}, key=["lora", *VARIANTS].index):
        folder = work.run / ("results" if variant == "lora" else f"results-{variant}")
        if not (folder / "results.jsonl").exists():
            run.evaluate(work.exp, work.overrides, LOG, variant=variant)
            measure.free_memory()
        variants[variant] = [_plain(row) for row in results.read_results(folder / "results.jsonl")]
        if variant != "lora":
            rows = work.system.compare(work.cfg, work.run / "results", folder)
            row = next(row for row in rows if row.subject == "all")
            metric = row.what.removesuffix("_difference")
            pairs[variant] = _plain(row) | {"p": row.extra["p"]}
    content = {"metric": metric, "variants": variants, "left_out": left_out, "lora_minus": pairs}
    work.write("evaluation_finetuned.json", content)


def _plain(row: results.Result) -> dict[str, Any]:
    """A result as JSON has it; nan becomes null."""
    fields = {key: getattr(row, key) for key in ("what", "subject", "split", "value", "low", "high", "n")}
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in fields.items()}


def _report(work: Work) -> None:
    contents = {file: work.read(file) for file, _ in pipeline_report.PARTS.values()}
    report = pipeline_report.build_report(contents, work.run.name)
    work.write("FINAL_REPORT.json", report)
    work.write("BENCHMARK_REPORT.md", pipeline_report.benchmark_report(report))
    work.write("CONTENT_DRAFT.md", pipeline_report.content_draft(report))


PHASES: dict[str, Callable[[Work], None]] = {
    "doctor": _doctor,
    "model": _model,
    "bench_base": _bench("base", "baseline_fp16.json"),
    "quantize": _quantize,
    "bench_int4": _bench("int4", "quantized_int4.json"),
    "data": _data,
    "train": _train,
    "evaluate": _evaluate,
    "bench_lora": _bench("lora", "finetuned_standard_bench.json"),
    "report": _report,
}
