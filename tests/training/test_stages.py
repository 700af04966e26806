"""tuning: what one of several processes that share the weights will hold."""

import re

import pytest
import torch
import torch.nn.functional as F

from medvl.training import estimate, gradients
from medvl.training.record import Stage, TrainConfig
from medvl.training.stages import estimate_memory, estimate_rows, make_gradient

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
    return estimate_memory(cfg, cfg.stages[0], params, loss_sum, cut, batch, processes=processes)


def test_a_process_holds_its_rows_of_the_model_and_the_whole_adapter():
    one, two, four = (foretold(recorded(), n) for n in (1, 2, 4))
    for n, got in ((1, one), (2, two), (4, four)):
        held = 2 * MATRIX // n + D * 4 + MATRIX
        assert got["trained weights"] == held
        assert got["optimiser"] == 2 * held
    whole = foretold(recorded(shard=False), 2)
    assert {k: v for k, v in whole.items() if k in ("trained weights", "optimiser")} == {
        k: one[k] for k in ("trained weights", "optimiser")
    }


def test_what_is_frozen_lies_in_parts_too_and_is_whole_while_it_is_used():
    one, four = (foretold(recorded(train=("lora/.*",), batch=8), n) for n in (1, 4))
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


def test_a_gradient_goes_as_soon_as_its_successor_is_there():
    """At most the sum, in float32, and the 16-bit gradients of the piece that is added to it; never all sums beside all means."""
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
