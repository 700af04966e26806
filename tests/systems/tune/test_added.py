"""Factors in the dtype of a 4-bit model, with float32 masters in the optimiser: `train.added = "model"`."""

import contextlib
from functools import partial

import torch
import torch.nn.functional as F
from attrs import evolve

from medvl.base.tree import count_values, flatten
from medvl.hub.peft_files import read_adapter, write_adapter
from medvl.language import chat, system
from medvl.training import loop, stages, states
from tests.gpu import cases

TOY = {
    "model__config": cases.QWEN3,
    "model__quantize": "nf4",
    "model__dtype": "bfloat16",
    "lora__rank": 8,
    "train__batch": 4,
    "train__chunk": 2,
}


def toy(added, **settings):
    """(model, params) of an adapter as it starts: B is zero."""
    model, params = cases.tune_model(**TOY, train__added=added, **settings)
    for factors in params["lora"].values():
        factors["b"].zero_()
    return model, params


def batch_at(i):
    """Four conversations of text, other ones in each of eight steps."""
    ids = torch.randint(3, 490, (4, 24), generator=cases.generator(i % 8))
    labels = ids.clone()
    labels[:, :4] = -100
    seen = torch.ones_like(ids).bool()
    return {
        "ids": ids,
        "labels": labels,
        "mask": seen,
        "visual": ~seen,
        "images": torch.zeros(4, dtype=torch.int64),
    }


def walk(added, steps):
    """(how far the factors move, in one vector; the losses)."""
    model, params = toy(added, train__stages__0__steps=steps)
    trained, grad = cases.trained_gradient("cpu", model, params)
    start = {name: t.float().clone() for name, t in flatten(trained).items()}
    optimizer = stages.make_optimizer(model.train, model.train.stages[0], trained)
    state = states.State(params=trained, opt=optimizer.init(trained))
    step = loop.make_step(grad, optimizer, clip=1.0, seed=0)
    losses = []
    for i in range(steps):
        state, metrics = step(state, batch_at(i))
        losses.append(float(metrics["loss"]))
    end = flatten(state.opt.get("master", state.params))
    return torch.cat([(end[name] - t).flatten() for name, t in start.items()]), losses


def test_factors_with_masters_follow_the_float32_ones():
    wide, wide_losses = walk("float32", 30)
    narrow, narrow_losses = walk("model", 30)
    assert F.cosine_similarity(wide, narrow, 0) > 0.999
    assert abs(float(narrow.norm() / wide.norm()) - 1) < 0.01
    torch.testing.assert_close(
        torch.tensor(narrow_losses), torch.tensor(wide_losses), rtol=0, atol=1e-3
    )  # of 6.2


def fit(folder, steps, stop=None):
    model, params = toy("model", train__stages__0__steps=steps, train__save=1, lora__dropout=0.1)

    def until_stop(i):
        if i == stop:
            raise KeyboardInterrupt
        return batch_at(i)

    stage = model.train.stages[0]
    loss, cut = system.loss_function(model), partial(chat.micro_batch, model.chat)
    after = stages.fit_stage(
        model.train, stage, params, loss, until_stop, folder, cut=cut, log=lambda _: None
    )
    return model, after


def test_a_stopped_run_goes_on_to_the_same_bits_and_its_adapter_is_read_back(tmp_path):
    model, want = fit(tmp_path / "whole", 4)
    with contextlib.suppress(KeyboardInterrupt):
        fit(tmp_path / "stopped", 4, stop=2)
    _, got = fit(tmp_path / "stopped", 4)
    factors, again = flatten(want["lora"]), flatten(got["lora"])
    assert all(torch.equal(factors[name], again[name]) for name in factors)
    saved = states.read_state(tmp_path / "stopped" / "last.pt")
    assert {t.dtype for t in flatten(saved.params).values()} == {torch.bfloat16}
    assert {t.dtype for t in flatten(saved.opt).values()} == {torch.float32}
    # The file holds what was validated, 16-bit numbers; whoever reads it widens them without loss.
    write_adapter(evolve(model.adapter, factors=want["lora"]), tmp_path / "adapter", base="toy")
    read = read_adapter(tmp_path / "adapter", model.chat.skeleton)
    for name, t in flatten(read.factors).items():
        assert t.dtype == torch.float32
        assert torch.equal(t, factors[name].float()), name


def test_an_estimate_counts_two_bytes_of_a_factor_and_its_master():
    def parts(added):
        model, params = toy(added)
        params = cases.move_model("meta", params)
        stage = model.train.stages[0]
        loss, cut = system.loss_function(model), partial(chat.micro_batch, model.chat)
        step = stages.estimate_step(model.train, stage, params, loss, cut, batch_at(0))
        return step.memory, count_values(params["lora"])

    (wide, n), (narrow, _) = parts("float32"), parts("model")
    assert (wide["trained weights"], wide["optimiser"]) == (4 * n, 8 * n)
    assert (narrow["trained weights"], narrow["optimiser"]) == (2 * n, 12 * n)


def test_only_what_is_beside_the_model_takes_its_dtype():
    model, params = toy("model")
    assert {t.dtype for t in flatten(params["lora"]).values()} == {torch.bfloat16}
    # One copy: those of the adapter are the leaves that start.
    module = next(iter(model.adapter.factors))
    assert model.adapter.factors[module]["a"].dtype == torch.bfloat16
    _, params = toy("float32")
    assert {t.dtype for t in flatten(params["lora"]).values()} == {torch.float32}
