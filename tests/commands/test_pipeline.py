"""invoke pipeline at toy size: all phases, gates over damaged files, going on after a stop."""

import errno
import json
import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest

from medvl.base import files
from medvl.commands import pipeline
from medvl.systems import bench, export, gates, pipeline_report, run
from medvl.systems.gates import GATES
from medvl.systems.tune import SYSTEM
from tests.conftest import ROOT
from tests.systems.document.test_document import record

JSONS = [gate.file for gate in GATES if gate.file.endswith(".json")]


def toml(value):
    """A plain value in TOML's inline syntax."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def write_experiment(place, name, raw):
    path = place / "experiments" / f"{name}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in raw.items()))


def write_experiments(place):
    """toy_base trains a model from scratch, toy adapts it."""
    raw = record(place)
    whole, adapted = raw["train"]["stages"]
    adapted |= {"steps": 12, "lr": 3e-3}
    write_experiment(place, "toy_base", raw | {"train": raw["train"] | {"stages": [whole]}})
    raw["train"]["stages"] = [adapted]
    write_experiment(place, "toy", raw | {"model": {"name": "models/toy_base", "dtype": "float32"}})


def go_on(log=lambda line: None):
    return pipeline.run_pipeline("toy", log=log, make=pipeline.run_phase)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a pipeline's files, its working folder)."""
    place = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(bench, "bench", partial(bench.bench, new_tokens=3, batch=2))
        write_experiments(place)
        yield place / go_on(), place


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the files, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "pipeline")


def red(folder):
    return [file for file, faults in gates.check_folder(folder).items() if faults]


def test_all_phases_run_and_their_gates_are_green(finished, capsys):
    folder, place = finished
    assert pipeline.check_pipeline("toy") == 0
    assert "0 of 13 gates are red" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {gate.file for gate in GATES} | {"BUILD_LOG.md"}
    assert (place / "models" / "toy_base" / "model.safetensors").is_file()
    assert (folder / "BUILD_LOG.md").read_text().count("\n## ") == len(pipeline.PHASES)


def test_a_second_call_runs_nothing_and_says_so(finished):
    left = finished[0].parent / "bench" / ".base.json.x.tmp"  # by a process that was killed
    left.touch()
    lines = []
    go_on(lines.append)
    assert not left.exists()
    assert lines[:-1] == [f"{phase}: its gates are green, nothing to do" for phase in pipeline.PHASES]


def test_a_model_that_was_removed_is_made_anew(finished):
    model = finished[1] / "models" / "toy_base"
    away = model.rename(model.with_name("away"))
    with pytest.raises(ValueError, match="phase model is red: models/toy_base: must be there, trained by"):
        pipeline.run_pipeline("toy", log=lambda line: None, make=lambda *phase: None)
    away.rename(model)


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: ""], ids=["cut", "empty"]
)
@pytest.mark.parametrize("file", [gate.file for gate in GATES])
def test_a_damaged_file_makes_its_own_gate_red(file, damage, copied):
    (copied / file).write_text(damage((copied / file).read_text()))
    assert red(copied) == [file]


@pytest.mark.parametrize("value", [[], {}, 7, "7", None, {"samples": 3, "stages": 7}])
@pytest.mark.parametrize("file", JSONS)
def test_any_other_json_makes_its_own_gate_red(file, value, copied):
    (copied / file).write_text(json.dumps(value))
    assert red(copied) == [file]


CHANGES = [
    ("environment.json", "cores", 0),
    ("download.json", "bytes", 1),
    ("baseline_fp16.json", "latency.p50", 1e6),
    ("baseline_fp16.json", "samples.0.tokens_out", 1),
    ("baseline_fp16.json", "variant", "nf4"),
    ("baseline_fp16.json", "load.cold_s", float("nan")),
    ("quantization_info.json", "bytes_after", 10**12),
    ("quantization_info.json", "share", 0.001),
    ("quantization_info.json", "method", "nf4"),  # without a reason
    ("quantized_int4.json", "first_token.mean", 0.0),
    ("download_summary.json", "pages.rows", 0),
    ("data_summary.json", "splits.test", 1000),
    ("training_metrics.json", "stages.0.final_loss", 1e6),
    ("training_metrics.json", "stages.0.final_loss", float("nan")),
    ("training_metrics.json", "trainable.percent", 120.0),
    ("evaluation_finetuned.json", "lora_minus.base.value", 0.987),
    ("evaluation_finetuned.json", "lora_minus.base.high", -0.5),
    ("evaluation_finetuned.json", "lora_minus.nf4.low", None),
    ("evaluation_finetuned.json", "left_out", {"int8": "no"}),
    ("finetuned_standard_bench.json", "data.n", 0),
    ("FINAL_REPORT.json", "tuned.latency_s", 1e-9),
    ("FINAL_REPORT.json", "evaluation.variants.lora.0.value", 0.999),
    ("FINAL_REPORT.json", "findings", ["lora is better"]),
]


@pytest.mark.parametrize(("file", "key", "value"), CHANGES)
def test_a_changed_number_makes_its_own_gate_red(file, key, value, copied):
    content = json.loads((copied / file).read_text())
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    assert node[last] != value
    node[last] = value
    (copied / file).write_text(json.dumps(content))
    assert red(copied) == [file]


def test_a_fault_says_what_to_do(copied):
    path = copied / "training_metrics.json"
    content = json.loads(path.read_text())
    content["stages"][0]["final_loss"] = 1e6
    path.write_text(json.dumps(content))
    (fault,) = gates.check_folder(copied)[path.name]
    assert fault.startswith("the loss of stage lora must end below ")
    assert "where it began, found 1000000.0; train longer" in fault
    path.write_text("{")
    (fault,) = gates.check_folder(copied)[path.name]
    assert fault.startswith("must be whole")
    assert fault.endswith("; the same command without --check makes it anew")


def test_what_a_gate_cannot_know_is_found_by_the_report(copied):
    path = copied / "training_metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1234.0}))
    assert red(copied) == ["FINAL_REPORT.json"]


def test_texts_have_no_number_that_the_report_has_not(copied):
    for file in ("BENCHMARK_REPORT.md", "CONTENT_DRAFT.md"):
        text = (copied / file).read_text()
        (copied / file).write_text("It is 77.25 times better. " + text)
        (fault,) = gates.check_folder(copied)[file]
        assert fault.startswith("every number must occur in FINAL_REPORT.json, found [77.25]; ")
        (copied / file).write_text(text)
    draft = copied / "CONTENT_DRAFT.md"
    draft.write_text(draft.read_text().replace("# ", "word " * 200))
    assert "must have fewer than 200 words" in gates.check_folder(copied)["CONTENT_DRAFT.md"][0]
    assert red(copied) == ["CONTENT_DRAFT.md"]


def test_numbers_of_a_text_are_those_that_stand_alone():
    text = "Qwen2.5-VL-7B by int4: f1 -0.25 [0.1, 1.5e-3], n = 12. 95 %; p50."
    assert pipeline_report.numbers_in(text) == {0.25, 0.1, 0.0015, 12, 95}
    assert pipeline_report.numbers_in({"a": [1, -2.5, None, "x 3", True]}) == {1, 2.5, 3}


@pytest.mark.parametrize(
    ("low", "high", "n", "verdict"),
    [
        (0.1, 0.2, 60, "lora is better"),
        (-0.2, -0.1, 60, "lora is worse"),
        (-0.1, 0.2, 60, "no difference is shown"),
        (0.1, 0.2, 5, "too few to decide"),
        (None, None, 60, "too few to decide"),
    ],
)
def test_findings_follow_from_intervals(low, high, n, verdict):
    row = {"value": 0.15, "low": low, "high": high, "n": n}
    evaluation = {"metric": "f1", "lora_minus": {"base": row}, "left_out": {}}
    (finding,) = pipeline_report.findings({"evaluation": evaluation})
    assert finding.endswith(f"n = {n}: {verdict}")


def test_a_damaged_file_is_made_anew_and_the_numbers_stay(finished):
    folder, _ = finished
    evaluation = (folder / "evaluation_finetuned.json").read_text()
    for file in (
        "download.json",
        "quantization_info.json",
        "training_metrics.json",
        "evaluation_finetuned.json",
    ):
        (folder / file).write_text("{")
    lines = []
    go_on(lines.append)
    begun = [line.removesuffix(": begins") for line in lines if line.endswith("begins")]
    assert begun == ["model", "quantize", "train", "evaluate", "report"]  # seconds in the report are others
    assert (folder / "evaluation_finetuned.json").read_text() == evaluation
    assert not red(folder)


def test_what_cannot_be_made_is_left_out_with_the_reason(finished, tmp_path, monkeypatch):
    folder, place = finished
    again = shutil.copytree(place, tmp_path / "again") / folder.relative_to(place)
    monkeypatch.chdir(tmp_path / "again")
    info = json.loads((again / "quantization_info.json").read_text()) | {"method": "nf4", "reason": "no room"}
    (again.parent / "quantization_info.json").write_text(json.dumps(info))
    shutil.rmtree(again.parent / "merged")
    for file in ("quantization_info.json", "quantized_int4.json", "evaluation_finetuned.json"):
        (again / file).unlink()
    reasons = ["export: merged onto the base, the model loses 90 %", "another run is writing to it"]

    def refuse(*args, **options):
        raise ValueError(reasons[-1])

    monkeypatch.setattr(export, "export_run", refuse)
    with pytest.raises(ValueError, match="another run"):  # says nothing about the adapter
        go_on()
    reasons.pop()
    go_on()
    assert not red(again)
    assert json.loads((again / "quantized_int4.json").read_text())["variant"] == "nf4"
    evaluation = json.loads((again / "evaluation_finetuned.json").read_text())
    assert evaluation["left_out"] == {"int4": "quantised by nf4 instead: no room", "merged": reasons[0]}
    assert {*evaluation["lora_minus"]} == {"base", "nf4"}
    report = (again / "BENCHMARK_REPORT.md").read_text()
    assert "merged is left out: export: merged onto the base, the model loses 90 %" in report
    assert "| base | nf4 | lora |" in report


# What stops a pipeline ------------------------------------------------------------------------------------------------
@pytest.fixture
def at_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_experiments(tmp_path)
    return tmp_path


def test_a_red_gate_stops_the_pipeline_and_is_written_down(at_work):
    def make(phase, exp, overrides):
        pipeline.open_work(exp, overrides).write("environment.json", {"python": "3"})

    message = (
        r"a gate of phase doctor is red: .*/pipeline/environment\.json: must be whole, with all its keys, found \"KeyError: 'platform'\"; "
        "the same command without --check makes it anew"
    )
    with pytest.raises(ValueError, match=message):
        pipeline.run_pipeline("toy", log=lambda line: None, make=make)
    folder = pipeline.open_work("toy").folder
    assert "s, refused: pipeline: a gate of phase doctor is red" in (folder / "BUILD_LOG.md").read_text()
    assert not (folder / "download.json").exists()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(at_work):
    def make(phase, exp, overrides):
        folder = pipeline.open_work(exp, overrides).folder
        with files.atomic(folder / "environment.json") as tmp:
            tmp.write_text("{")
            raise OSError(errno.ENOSPC, "no room")

    with pytest.raises(OSError, match=r"make room and call again.*environment\.json"):
        pipeline.run_pipeline("toy", log=lambda line: None, make=make)
    folder = pipeline.open_work("toy").folder
    assert [path.name for path in folder.iterdir()] == ["BUILD_LOG.md"]


def kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_phase_whose_process_is_killed_is_named(at_work, monkeypatch):
    monkeypatch.setattr(pipeline, "run_phase", kill_itself)
    with pytest.raises(ValueError, match="the process of phase doctor was killed"):
        pipeline.run_pipeline("toy", log=lambda line: None)


def test_experiments_without_a_pipeline_are_refused(at_work, capsys):
    with pytest.raises(
        ValueError, match=r"must have a model\.name and a stage that trains lora/\.\.\., found ''"
    ):
        pipeline.run_pipeline("toy_base")
    ct = str(ROOT / "experiments" / "ctclip_phantom.toml")
    with pytest.raises(ValueError, match="is a ct_clip experiment, which has no variants"):
        pipeline.check_pipeline(ct)
    assert pipeline.check_pipeline("toy") == 1
    assert "13 of 13 gates are red" in capsys.readouterr().out
    assert not (at_work / "runs").exists()


def test_a_training_says_which_command_makes_its_model(at_work, caplog):
    with pytest.raises(
        ValueError,
        match=r"models/toy_base must be a model .*; `invoke pipeline --exp toy` trains the experiment toy_base",
    ):
        run.run("toy", log=lambda line: None)
    cfg, _ = run.resolve("toy")
    assert run.base_experiment(cfg) == "toy_base"
    (at_work / "models" / "toy_base").mkdir(parents=True)
    assert run.base_experiment(cfg) == ""
    _, base = run.resolve("toy_base")
    (at_work / "models" / "toy_base" / run.TRAINED_BY).write_text(base.name + "\n")
    assert run.base_experiment(cfg) == ""
    assert not caplog.records
    (at_work / "models" / "toy_base" / run.TRAINED_BY).write_text("toy_base-00000000\n")
    assert run.base_experiment(cfg) == ""
    assert f"is of the run toy_base-00000000, but the experiment toy_base is now {base.name}" in caplog.text
    cfg, _ = run.resolve("toy", ("model.name=models/other",))
    assert run.base_experiment(cfg) == ""


def test_answers_of_tune_are_compared_in_pairs(tmp_path):
    for name, right in (("ours", [True, True, True, False]), ("theirs", [True, False, False, False])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"answer": "a\u2028b", "right": value}, ensure_ascii=False) for value in right]
        (tmp_path / name / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cfg = SimpleNamespace(seed=0, evaluate=SimpleNamespace(bootstrap=50))
    (row,) = SYSTEM.compare(cfg, tmp_path / "ours", tmp_path / "theirs")
    assert (row.what, row.subject, row.value, row.n) == ("accuracy_difference", "all", 0.5, 4)
    assert row.low <= 0.5 <= row.high
