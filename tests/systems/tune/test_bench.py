"""What variants of a model cost: the file of a bench and its rows, at toy size."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from medvl.base.tree import flatten
from medvl.evaluation import results
from medvl.language import chat, measure, system
from medvl.language.measure import Timing
from medvl.systems import bench, run
from medvl.systems.tune import SYSTEM
from medvl.systems.tune import run as tune_run
from medvl.weights import lazy
from tests.systems.tune.test_run import record


def test_a_bench_says_what_each_variant_costs(trained):
    reports = {}
    for variant in ("base", "nf4", "lora"):
        path = bench.bench(str(trained), (), variant, new_tokens=5, batch=3, log=lambda _: None)
        assert path.name == f"{variant}.json"
        reports[variant] = json.loads(path.read_text())
        rows = {row.what: row for row in results.read_results(path.with_suffix(".jsonl"))}
        report = reports[variant]
        assert rows["latency_s"].value == report["latency"]["p50"]
        assert rows["latency_s"].n == rows["tokens_per_s"].n == report["data"]["n"] == 5
        assert rows["disk_bytes"].value == sum(sum(sizes.values()) for sizes in report["disk_bytes"].values())
        assert "tokens_per_s_of_batch_3" in rows
    base, nf4, adapted = reports["base"], reports["nf4"], reports["lora"]
    # All are asked the same, and answer with as many tokens.
    assert base["data"]["hash"] == nf4["data"]["hash"] == adapted["data"]["hash"]
    for report in reports.values():
        assert [sample["tokens_out"] for sample in report["samples"]] == [5] * 5
        assert report["batch"]["tokens_out"] == 15
        assert report["load"]["cold_s"] > 0
        assert report["load"]["warm_s"] > 0
        assert all(0 < s["first_token_s"] < s["latency_s"] for s in report["samples"])
        # Five answers say nothing of the slowest tenth.
        assert {*report["latency"]} == {"n", "mean", "min", "p50", "max"}
    assert base["model"]["adapter"] is None
    assert adapted["model"]["adapter"]["numbers"] > 0
    assert "FourBit" in nf4["model"]["weights"]
    assert "FourBit" not in base["model"]["weights"]
    assert {*adapted["disk_bytes"]} == {"model", "adapter"}
    assert nf4["memory"]["estimated"]["weights"] < base["memory"]["estimated"]["weights"]
    assert sum(base["memory"]["estimated"].values()) < sum(base["memory"]["estimated_of_batch"].values())


@pytest.mark.parametrize("variant", ["base", "nf4", "lora"])
def test_the_estimate_is_what_answers_take(trained, variant):
    cfg, folder = run.resolve(str(trained))
    model, params = SYSTEM.variant(cfg, folder, variant).open()
    prompts = chat.encode_conversations(model.chat, tune_run.read_split(cfg, "test")[:3], prompt=True)
    found = system.estimate_answers(model, params, prompts, [0, 1, 2], 6)
    assert found["weights"] == lazy.nbytes(params["model"])
    assert found.get("adapter", 0) == lazy.nbytes(flatten(params.get("lora", {})))
    weights = system.model_weights(model, params)
    batch = chat.make_batch(model.chat, prompts, [0, 1, 2], side="left")
    sampling = measure.Sampling(max_tokens=6, min_tokens=6)
    with torch.profiler.profile(profile_memory=True) as trace:
        chat.generate_answers(model.chat, weights, batch, sampling)
    # The batch, and what torch allocated and freed beside it; the toy is small, so that odds and ends count.
    held = most = sum(tensor.nbytes for tensor in batch.values())
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0.8 < found["activations_and_cache"] / most < 1.25


def test_the_adapter_is_in_the_answers_that_are_timed(trained):
    cfg, folder = run.resolve(str(trained))
    model, params = tune_run.load(folder)
    prompts = chat.encode_conversations(model.chat, tune_run.read_split(cfg, "test")[:1], prompt=True)
    timing = measure.time_answers(model, params, prompts, [0], 6)
    sampling = chat.sampling_of(model.chat, 6)
    end = SimpleNamespace(**{name: getattr(sampling, name) for name in ("end", "repetition_penalty")})
    (expected,) = chat.generate_answers(
        model.chat,
        system.model_weights(model, params),
        chat.make_batch(model.chat, prompts, [0], side="left"),
        measure.Sampling(max_tokens=6, min_tokens=6, end=end.end, repetition_penalty=end.repetition_penalty),
    ).texts
    assert timing.answers == (expected,)


def test_what_cannot_be_measured_is_named(trained, tmp_path):
    def fails(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            bench.bench(*args, log=lambda _: None, **options)

    fails("--variant must be one of base, nf4, int4, lora, merged, got 'int8'", str(trained), (), "int8")
    fails("int4: there is no such folder; `invoke quantize` makes it", str(trained), (), "int4")
    fails("merged: there is no such folder; `invoke export --as merged` makes it", str(trained), (), "merged")
    untrained = tmp_path / "untrained.json"
    untrained.write_text(json.dumps(record(tmp_path, seed=1)))
    fails("has no name and is not trained yet", str(untrained))
    fails("there is no adapter", str(untrained), (), "lora")


def test_percentiles_need_as_many_values_as_they_speak_of():
    assert measure.summary([1.0, 2.0, 4.0]) == {"n": 3, "mean": 7 / 3, "min": 1.0, "p50": 2.0, "max": 4.0}
    assert "p90" in measure.summary([0.0] * 10)
    assert "p99" not in measure.summary([0.0] * 99)
    assert measure.summary([*range(101)])["p99"] == 99


def test_seconds_per_token_are_those_between_tokens_of_a_row():
    timing = Timing(
        rows=(0, 1), prompt_tokens=9, new_tokens=10, first_token_s=1.0, latency_s=3.0, answers=("", "")
    )
    assert timing.seconds_per_token == 0.5
    one = Timing(rows=(0,), prompt_tokens=9, new_tokens=1, first_token_s=1.0, latency_s=1.0, answers=("",))
    assert math.isnan(one.seconds_per_token)


def test_memory_of_what_is_held_shows():
    device = torch.device("cpu")
    measure.free_memory()
    before = measure.memory_now(device)["resident"]
    held = torch.ones(2**24)  # 64 MiB
    assert measure.memory_now(device)["resident"] - before > 0.9 * held.nbytes
    assert measure.memory_peak(device)["resident"] >= before + 0.9 * held.nbytes
