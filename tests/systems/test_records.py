"""What a record shows wrong is refused when it is read: numbers, plans that cannot run, names of folders."""

import json
from pathlib import Path

import attrs
import pytest

from medvl.base import config
from medvl.base.config import ConfigError
from medvl.systems import run
from medvl.training import loop
from tests.systems.adapters import test_run as test_adapters

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = {
    "ct_clip": "ctclip_phantom",
    "tune": "tune_phantom",
    "adapters": "adapters_phantom",
    "slide_vqa": "slide_vqa_phantom",
    "unified": "unified_phantom",
}
ADAPTER = {"name": "lora", "steps": 2, "lr": 0.1}
SPEED = {"lr": 0.1, "weight_decay": 0.0}
NEGATIVE = {"bias", "threshold", "mean", "level"}  # numbers of a record that may be below zero


def plain(system):
    """The whole record of an experiment as plain data, defaults included."""
    raw = config.read_settings(ROOT / "experiments" / f"{EXPERIMENTS[system]}.toml")
    return config.unstructure(config.structure(raw, run.find_system(system).record))


def numbers(value, path=()):
    """(path, number) of every number of a record; the free dicts of models are their own business."""
    if path[-2:] in (("model", "config"), ("vit", "config"), ("tower", "config")):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from numbers(item, (*path, str(i)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def refused(system, raw, path, value, match):
    text = json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
    with pytest.raises(ConfigError, match=match):
        config.structure(config.override(raw, (f"{'.'.join(path)}={text}",)), run.find_system(system).record)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300, -1e300])
@pytest.mark.parametrize("system", EXPERIMENTS)
def test_every_number_of_a_record_is_finite(system, value):
    raw = plain(system)
    floats = [path for path, number in numbers(raw) if isinstance(number, float)]
    assert len(floats) >= 6
    for path in floats:
        refused(
            system,
            raw,
            path,
            value,
            rf"must be a finite number of at most 1e\+30, got {value}".replace("e+300", r"e\+300"),
        )


def test_numbers_in_free_settings_of_a_model_are_finite_too():
    raw = plain("tune")
    refused(
        "tune",
        raw,
        ("model", "config", "text_config", "rms_norm_eps"),
        float("nan"),
        r"rms_norm_eps: must be a finite number .* got nan",
    )


@pytest.mark.parametrize("system", EXPERIMENTS)
def test_no_number_of_a_record_may_be_negative_but_those_that_may(system):
    raw = plain(system)
    for path, number in numbers(raw):
        if not NEGATIVE & {*path}:
            refused(system, raw, path, -2.5 if isinstance(number, float) else -2, r"\$|-2")


def test_nan_does_not_pass_a_record_that_is_made_in_python():
    @attrs.frozen
    class Record:
        lr: float

        def __attrs_post_init__(self):
            config.check_bounds(self, "record", lr=(0, 1e30))

    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=rf"record.lr must be .* got {wrong:g}"):
            Record(wrong)
    assert Record(0.0).lr == 0


PLANS = {
    "warm-up of a stage": (
        "tune",
        "train.stages.0.warmup=100000",
        r"stage \w+: warmup must lie within its \d+ steps, got 100000",
    ),
    "warm-up of ct_clip": (
        "ct_clip",
        "train.stages.0.warmup=100000",
        r"stage \w+: warmup must lie within its \d+ steps, got 100000",
    ),
    "warm-up of a compressor": (
        "slide_vqa",
        "pretrain.train.stages.0.warmup=100000",
        r"stage compressor: warmup must lie within its \d+ steps, got 100000",
    ),
    "warm-up of questions": (
        "slide_vqa",
        "train.stages.1.warmup=100000",
        r"stage questions: warmup must lie within its \d+ steps",
    ),
    "warm-up of a base": (
        "adapters",
        "base.stages.0.warmup=100000",
        r"stage \w+: warmup must lie within its \d+ steps",
    ),
    "warm-up of adapters": (
        "adapters",
        "train.stages.0.warmup=100000",
        r"stage \w+: warmup must lie within its \d+ steps",
    ),
    "a speed that climbs": (
        "ct_clip",
        "train.stages.0.speeds.0.lr=-1.0",
        r"speeds .*\.lr must be 0 or more, got -1",
    ),
    "a speed's regex": (
        "ct_clip",
        'train.stages.0.speeds.0.match="("',
        r"speeds: pattern '\(' is not a regular expression",
    ),
    "a stage's regex": (
        "ct_clip",
        'train.stages.0.train=["("]',
        r"stage \w+: pattern '\(' is not a regular expression",
    ),
    "a rate of nothing": ("adapters", "train.stages.0.lr=0.0", r"stage \w+: lr must be above 0, got 0"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_cannot_run_is_refused_with_whose_it_is(plan):
    system, change, match = PLANS[plan]
    with pytest.raises(ConfigError, match=match):
        config.structure(config.override(plain(system), (change,)), run.find_system(system).record)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "", ".x", "a\\b", "x" * 300, "a\nb"])
@pytest.mark.parametrize(
    ("system", "stages"),
    [("tune", "train"), ("ct_clip", "train"), ("slide_vqa", "train"), ("adapters", "base")],
)
def test_a_stage_is_named_as_a_folder_can_be(system, stages, name):
    raw = plain(system)
    raw[stages]["stages"][0]["name"] = name
    with pytest.raises(ConfigError, match=r"stage .*: the name is used as a file name"):
        config.structure(raw, run.find_system(system).record)


# What only the data or the model shows is refused before the first step of the first stage ----------------------------------------------
LATE_ADAPTERS = {
    "a pattern of no adapter": (
        {"train__stages": [ADAPTER | {"train": ["lora/nowhere.*"]}]},
        r"stage lora: pattern .* matches no parameter",
    ),
    "a target that is not there": (
        {"lora": {"rank": 2, "targets": ["nothing"]}},
        "lora: target 'nothing': no layer ends in it",
    ),
    "a batch above a task": (
        {"train__batch": 16},
        r"task \w+: needs 16 conversations of the split train for a batch, found 12",
    ),
    "a retriever of single samples": (
        {"retriever": {"kind": "contrast"}, "pool": {"samples": 1}},
        r"retriever is trained on two samples",
    ),
    "an embedder that is not there": ({"embed": {"kind": "text", "name": "./nowhere"}}, "nowhere"),
}


@pytest.mark.parametrize("case", LATE_ADAPTERS)
def test_adapters_that_cannot_be_made_are_refused_before_their_base_is_trained(case, tmp_path, monkeypatch):
    change, match = LATE_ADAPTERS[case]
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    (tmp_path / "toy.json").write_text(json.dumps(test_adapters.record(tmp_path, **change)))
    with pytest.raises(ValueError, match=match):
        run.run(str(tmp_path / "toy.json"), log=lambda _: None)
    assert not list(tmp_path.glob("runs/*/base/*"))


def test_a_second_stage_of_ct_clip_is_looked_at_before_the_first_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_steps", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    raw = plain("ct_clip")
    raw["data"] |= {"folder": str(tmp_path / "data"), "cache": str(tmp_path / "cache"), "workers": 1}
    raw["data"]["phantoms"] |= {"patients": 30, "valid": 10, "test": 10}
    raw["train"]["batch"] = 4
    first = raw["train"]["stages"][0]
    for late, match in (
        ({"train": ["vitt/.*"]}, "pattern 'vitt/"),
        ({"speeds": [SPEED | {"match": "nowhere/.*"}]}, "pattern 'nowhere/"),
    ):
        raw["train"]["stages"] = [first, first | {"name": "late"} | late]
        (tmp_path / "toy.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=f"stage late: {match}"):
            run.run(str(tmp_path / "toy.json"), log=lambda _: None)
