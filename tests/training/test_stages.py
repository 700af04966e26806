"""tuning: what one of several processes that share the weights will hold."""

import re

import pytest
import torch
import torch.nn.functional as F

from medvl.training import estimate, gradients, states
from medvl.training.record import Stage, TrainConfig
from medvl.training.stages import estimate_rows, estimate_step, fit_stage, make_gradient
from medvl.weights import rounding

D = 256
MATRIX = D * D * 4


def recorded(**change):
    stage = Stage(name="all", steps=2, lr=1e-3, train=change.pop("train", ("model/.*", "lora/.*")))
    return TrainConfig(
        **{"stages": (stage,), "batch": 4, "chunk": 1, "shard": True, "rounding": "nearest"} | change
    )


def foretold(cfg, processes):
    """Two layers, a bias and an adapter of one matrix, in float32; 8 numbers a row."""
    meta = lambda *shape: torch.empty(shape, device="meta")
    params = {"model": {"a": meta(D, D), "b": meta(D, D), "bias": meta(D)}, "lora": {"x": meta(D, D)}}

    def loss_sum(p, batch):
        h = F.linear(batch["ids"], p["model"]["a"], p["model"]["bias"])
        return (
            F.linear(F.linear(h, p["model"]["b"]), p["lora"]["x"]).sum(),
            torch.tensor(len(batch["ids"])),
            gradients.Aux(),
        )

    batch = {"ids": meta(estimate_rows(cfg, processes), D)}
    cut = lambda b, span: {"ids": b["ids"][span]}
    return estimate_step(cfg, cfg.stages[0], params, loss_sum, cut, batch, processes=processes)


def test_a_process_holds_its_rows_of_the_model_and_the_whole_adapter():
    one, two, four = (foretold(recorded(), n).memory for n in (1, 2, 4))
    for n, got in ((1, one), (2, two), (4, four)):
        held = 2 * MATRIX // n + D * 4 + MATRIX
        assert got["trained weights"] == held
        assert got["optimiser"] == 2 * held
    whole = foretold(recorded(shard=False), 2).memory
    assert {k: v for k, v in whole.items() if k in ("trained weights", "optimiser")} == {
        k: one[k] for k in ("trained weights", "optimiser")
    }


def test_what_is_frozen_lies_in_parts_too_and_is_whole_while_it_is_used():
    one, four = (foretold(recorded(train=("lora/.*",), batch=8), n).memory for n in (1, 4))
    assert one["frozen weights"] == 2 * MATRIX + D * 4
    assert four["frozen weights"] == 2 * MATRIX // 4 + D * 4
    more = four["activations and gradients"] - one["activations and gradients"]
    assert more <= MATRIX  # never both at once


def test_the_share_of_a_batch_decides_whether_gradients_are_added_up():
    assert [estimate_rows(recorded(batch=32, chunk=4), n) for n in (1, 2, 4, 5, 8, 32)] == [8, 8, 8, 7, 4, 1]
    for wrong in (0, 33):
        said = f"processes must lie in 1..train.batch, got {wrong} and a batch of 32"
        with pytest.raises(ValueError, match=re.escape(said)):
            estimate_rows(recorded(batch=32), wrong)


def test_work_and_rows_of_a_step_are_those_of_all_micro_batches():
    one, many = (foretold(recorded(batch=n, shard=False), 1) for n in (1, 12))
    matrices = 3 * 2 * D * D
    # No gradient by the first input.
    assert one.work.flops == 3 * matrices - 2 * D * D
    assert many.work.flops == 12 * one.work.flops
    assert (many.samples, many.tokens) == (12, 12 * D)
    assert foretold(recorded(batch=12, shard=False), 4).work.flops == 3 * one.work.flops


def test_a_gradient_goes_as_soon_as_its_successor_is_there(monkeypatch):
    """At most the sum, in float32, and the 16-bit gradients of the piece that is added to it; of all means beside all sums
    only those of a bunch, which is one matrix here."""
    monkeypatch.setattr(rounding, "PIECE", D * D)
    params = {"model": {n: torch.empty(D, D, dtype=torch.bfloat16, device="meta") for n in "abcd"}}
    weights = 4 * D * D * 2

    def loss_sum(p, batch):
        h = batch["ids"]
        for w in p["model"].values():
            h = F.linear(h, w)
        return h.sum(), torch.tensor(len(h)), gradients.Aux()

    grad = make_gradient(
        recorded(shard=False, rounding="master"), loss_sum, lambda b, span: {"ids": b["ids"][span]}
    )
    batch = {"ids": torch.empty(3, D, dtype=torch.bfloat16, device="meta")}
    got = estimate.peak_of(lambda: grad(params, batch), {"weights": params})["activations and gradients"]
    assert got == pytest.approx(3 * weights, rel=0.05)


# One stage of a language system, on a matrix --------------------------------------------------------------
modes = set()  # whether torch was deterministic in the steps of the last `fitted`


def fitted(folder, steps=4, stop=None, drift=False, **settings):
    """(trained matrix, dtypes of the products in training and in validation, lines)."""
    stage = Stage(name="s", steps=steps, lr=0.1, train=("model/.*",))
    cfg = TrainConfig(**{"stages": (stage,), "batch": 2, "chunk": 2, "save": 1, "validate": 1} | settings)
    gen = torch.Generator().manual_seed(0)
    params = {"model": {"w": torch.randn(8, 8, generator=gen)}}
    start = params["model"]["w"].clone()
    dtypes, lines = {"train": set(), "valid": set()}, []
    modes.clear()

    def loss_sum(p, batch):
        product = batch["ids"] @ p["model"]["w"]
        dtypes["train"].add(product.dtype)
        modes.add(torch.are_deterministic_algorithms_enabled())
        return product.float().square().sum(), torch.tensor(len(product)), gradients.Aux()

    def validate(p):
        product = torch.ones(2, 8) @ p["model"]["w"]
        dtypes["valid"].add(product.dtype)
        if drift:  # the farther from the start, the worse: the first validation is the best
            return float((p["model"]["w"] - start).abs().sum())
        return float(product.float().square().mean())

    def batch_at(i):
        if i == stop:
            raise KeyboardInterrupt
        return {"ids": torch.randn(2, 8, generator=torch.Generator().manual_seed(i))}

    after = fit_stage(
        cfg,
        stage,
        params,
        loss_sum,
        batch_at,
        folder,
        cut=lambda b, span: {"ids": b["ids"][span]},
        validate=validate,
        log=lines.append,
    )
    return after["model"]["w"], dtypes, lines


def test_precision_is_that_of_training_and_validation_and_is_resumed(tmp_path):
    exact, dtypes, _ = fitted(tmp_path / "32")
    assert dtypes == {"train": {torch.float32}, "valid": {torch.float32}}
    mixed, dtypes, _ = fitted(tmp_path / "16", precision="bfloat16")
    assert dtypes == {"train": {torch.bfloat16}, "valid": {torch.bfloat16}}
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "cut", precision="bfloat16", stop=2)
    assert torch.equal(fitted(tmp_path / "cut", precision="bfloat16")[0], mixed)


def test_a_stage_ends_early_keeps_its_best_state_and_several_more(tmp_path):
    best, _, lines = fitted(tmp_path / "a", steps=40, patience=2, drift=True, keep_last=2)
    last = states.read_state(tmp_path / "a/last.pt")
    assert last.step == 3
    assert f"s: ends at step {last.step} of 40, 2 validations gave no better score" in lines
    assert torch.equal(best, states.read_state(tmp_path / "a/best.pt").params["model"]["w"])
    assert [p.name for p in sorted((tmp_path / "a").glob("step-*"))] == [
        f"step-{n:09d}.pt" for n in (last.step - 1, last.step)
    ]
    assert torch.equal(fitted(tmp_path / "a", steps=40, patience=2, drift=True, keep_last=2, stop=0)[0], best)


@pytest.mark.parametrize("settings", [{"beta2": 0.5}, {"eps": 1.0}])
def test_numbers_of_adamw_change_what_is_trained(tmp_path, settings):
    assert not torch.equal(fitted(tmp_path / "a")[0], fitted(tmp_path / "b", **settings)[0])


def test_a_stage_is_deterministic_where_the_record_says_so(tmp_path):
    """On a CPU the setting changes no bit."""
    plain = fitted(tmp_path / "plain")[0]
    assert modes == {False}
    assert torch.equal(fitted(tmp_path / "deterministic", deterministic=True)[0], plain)
    assert modes == {True}
    assert not torch.are_deterministic_algorithms_enabled()
