"""The model of a run in four bits, opened again; what cannot be quantised falls back, and says why."""

import json
import shutil

import pytest
import torch

from medvl.evaluation import results
from medvl.language import awq
from medvl.systems import bench, quantize, run
from medvl.systems.tune import SYSTEM
from medvl.weights.int4 import Int4


def quiet(line):
    pass


@pytest.fixture
def folder(trained):
    _, folder = run.resolve(str(trained))
    yield folder
    shutil.rmtree(folder / "int4", ignore_errors=True)


def test_a_quantised_model_is_a_variant_of_the_run(trained, folder):
    target = quantize.quantize(str(trained), samples=4, log=quiet)  # its rows are shorter than 32
    info = json.loads((folder / "quantization_info.json").read_text())
    assert (info["method"], info["reason"], info["samples"]) == ("awq", "", 4)
    cfg, _ = run.resolve(str(trained))
    _, params = SYSTEM.variant(cfg, folder, "int4").open()
    assert sum(isinstance(weight, Int4) for weight in params["model"].values()) > 4
    assert info["bytes_after"] == (target / "model.safetensors").stat().st_size
    path = bench.bench(str(trained), (), "int4", new_tokens=2, batch=0, log=quiet)
    assert json.loads(path.read_text())["model"]["weights"]["Int4"] > 4
    assert results.read_results(path.with_suffix(".jsonl"))
    with pytest.raises(ValueError, match="is there already"):
        quantize.quantize(str(trained), log=quiet)


def test_a_model_that_awq_refuses_becomes_nf4_with_the_reason(trained, folder, monkeypatch, caplog):
    def refuse(*args, **options):
        raise torch.OutOfMemoryError("no room\nfor this")

    monkeypatch.setattr(awq, "quantize_awq", refuse)
    quantize.quantize(str(trained), samples=2, log=quiet)
    info = json.loads((folder / "quantization_info.json").read_text())
    assert (info["asked"], info["method"], info["reason"]) == ("awq", "nf4", "no room for this")
    assert "quantize: not by awq, but by nf4: no room for this" in caplog.text


def test_what_cannot_be_asked_for_is_named(trained):
    for match, options in (
        ("--method must be one of awq, round, nf4, got 'gptq'", {"method": "gptq"}),
        ("group must be 32, 64, 128 or -1", {"group": 7}),
        ("merged: there is no such folder", {"variant": "merged"}),
        ("--variant must be base or merged, got 'nf4'", {"variant": "nf4"}),
    ):
        with pytest.raises(ValueError, match=match):
            quantize.quantize(str(trained), log=quiet, **options)
