"""What is estimated of a ct_clip step: FLOPs by hand, chunks that were not traced, memory of what is frozen."""

import re

import pytest
import torch
from attrs import evolve

from medvl.base import config, transfer
from medvl.base.tree import count_values, flatten, split_tree
from medvl.commands import experiments
from medvl.ct import pairs
from medvl.systems import run as systems
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip import run
from medvl.systems.ct_clip.record import Config
from medvl.training import estimate, trace

D, LAYERS, CONTEXT, SLICES, SIDE, PATCH = 64, 3, 16, 24, 56, 14
RECORD = {
    "system": "ct_clip",
    "ct": {"size": [SLICES, SIDE, SIDE], "spacing_mm": [5.0, 5.0, 5.0]},
    "vit": {
        "config": {
            "model_type": "dinov2",
            "hidden_size": D,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        }
    },
    "fuse": {"dim": D, "depth": 1, "heads": 4, "pool": "mean"},
    "contrast": {"dim": 32},
    "words": {"tower": {"vocabulary": 300, "context": CONTEXT, "dim": D, "depth": 1, "heads": 4}},
    "train": {"batch": 10, "chunk": 2, "stages": [{"name": "contrast", "steps": 2, "lr": 1e-3}]},
}


def record(**train):
    return config.structure(RECORD | {"train": RECORD["train"] | train}, Config, source="test")


def step_of(cfg, *args, **kwargs):
    (step,) = run.memory(cfg, None, *args, **kwargs).values()
    return step


def block_flops(rows, tokens):
    """(products, attention) of `rows` sequences through one block."""
    return rows * tokens * 2 * 12 * D * D, rows * 4 * tokens * tokens * D


def test_flops_of_a_step_are_those_counted_by_hand():
    tokens = 1 + (SIDE // PATCH) ** 2
    stacks = [(SLICES, tokens, LAYERS), (1, SLICES, 1), (1, CONTEXT, 1)]  # slices, fusion, text
    patches = 2 * SLICES * (SIDE // PATCH) ** 2 * 3 * PATCH**2 * D
    products, attention = 0, 0
    for rows, length, depth in stacks:
        of_products, of_attention = block_flops(rows, length)
        products += depth * of_products
        attention += depth * of_attention
    # Embedded twice; the gradient takes two products for one, and attention computes its scores again. Pixels need no
    # gradient.
    expected = 10 * (patches * 3 + products * 4 + attention * 4.5)
    assert step_of(record()).work.flops == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("batch", "processes"), [(10, 1), (4, 1), (2, 1), (3, 1), (10, 5), (8, 2)])
def test_chunks_that_are_not_traced_cost_what_those_do_that_are(batch, processes):
    cfg = record(batch=batch)
    step = step_of(cfg, processes)
    model, params = ct_clip.empty_model(cfg)
    share = batch // processes
    whole = run._empty_batch(cfg, share, SLICES, encodes=True)
    # Embeddings of one process are not computed twice where they are one chunk.
    if processes > 1 and share <= 2:
        model = evolve(model, cfg=record(batch=batch, chunk=1))
    counter = trace.WorkCounter()
    estimate.peak_of(lambda: ct_clip.contrastive_gradient(model, {})(params, whole), {}, counter)
    assert step.work.flops == pytest.approx(counter.work().flops, rel=0.003)
    assert step.samples == share


def test_slices_and_precision_are_taken_into_account():
    half = step_of(record(), 1, SLICES // 2)
    assert half.work.flops == pytest.approx(step_of(record()).work.flops / 2, rel=0.05)
    low = step_of(record(precision="bfloat16"))
    assert low.work.flops_of_dtype["bfloat16"] > 0.95 * low.work.flops
    assert sum(low.memory.values()) < sum(step_of(record()).memory.values())


def test_a_process_holds_its_part_of_an_encoder_that_is_cut():
    """A cut matrix, its gradient and both moments are on one of four processes; layers are computed once more."""
    whole, part = step_of(record(batch=16), 4), step_of(record(batch=16, shard=True), 4)
    _, params = ct_clip.empty_model(record())
    cut = sum(t.numel() for name, t in params["vit"].items() if t.dim() == 2 and t.numel() >= 2**14)
    assert cut
    for kind, values in (("trained weights", cut), ("optimiser", 2 * cut)):
        assert whole.memory[kind] - part.memory[kind] == pytest.approx(4 * values * 3 / 4, rel=0.01)
    assert sum(part.memory.values()) < sum(whole.memory.values())
    assert 1.1 < part.work.flops / whole.work.flops < 1.26


def test_the_peak_of_a_gpu_gives_seconds_and_no_other_does(monkeypatch):
    class Volumes:
        row = {"a": {"occupied": (2, 8)}, "b": {"occupied": (0, 12)}}.get

    volumes = pairs.Pairs(store=Volumes(), names=("a", "b"), texts=({}, {}))
    rates = lambda name, device="cuda": (
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name),
        run._rates(record(), None, volumes, torch.device(device)),
    )[1]
    work = step_of(record(), 1, 9).work
    assert rates("NVIDIA H100 80GB HBM3") == {"contrast": {"mfu": work.peak_seconds(trace.GPUS["h100"])}}
    assert rates("NVIDIA H100 PCIe") == rates("NVIDIA H100 80GB HBM3", "cpu") == {}


def test_a_frozen_encoder_is_not_computed():
    stage = {"name": "contrast", "steps": 2, "lr": 1e-3, "train": ["(fuse|text|project|contrast)/.*"]}
    cfg = record(stages=[stage])
    frozen = step_of(cfg)
    assert frozen.work.flops < step_of(record()).work.flops / 20
    _, params = ct_clip.empty_model(cfg)
    trained, rest = split_tree(params, stage["train"])
    assert frozen.memory["trained weights"] == 4 * count_values(trained)
    assert frozen.memory["frozen weights"] == 4 * count_values(rest)
    # Two moments of each.
    assert frozen.memory["optimiser"] >= 8 * count_values(trained)


def test_the_model_without_storage_has_the_parameters_of_the_real_one(tmp_path):
    cfg = record()
    _, real = ct_clip.init_model(cfg, tmp_path, ["a report of a chest"])
    _, empty = ct_clip.empty_model(cfg)
    assert {n: t.shape for n, t in flatten(real).items()} == {n: t.shape for n, t in flatten(empty).items()}
    assert all(t.device == torch.device("meta") for t in flatten(empty).values())


def test_the_batch_must_be_shared_evenly():
    with pytest.raises(ValueError, match="multiple of the number of processes, got 10 for 3"):
        run.memory(record(), None, 3)


def test_seconds_are_printed_beside_memory(capsys):
    exp = str(systems.EXPERIMENTS / "ctclip_phantom.toml")
    experiments.print_memory(exp)
    h100 = capsys.readouterr().out
    assert "| at the peak |" in h100
    experiments.print_memory(exp, ["train.batch=8192", "ct.dtype='int16'"], gpu="a100")
    a100 = capsys.readouterr().out
    assert re.search(r"a step on one h100: [\d.]+ s \(estimated, not measured\), [\d,]+ samples/s", h100)
    assert "a step on one a100" in a100
    assert "assumed: 60% of the peak in matrix products" in a100
    with pytest.raises(ValueError, match="--gpu must be one of h100, h200, a100, rtx4090, got 'tpu'"):
        experiments.print_memory(exp, gpu="tpu")


def test_slices_are_computed_again_only_where_a_gpu_has_no_room(monkeypatch):
    """Four passes of work, else five: forward twice and a gradient of two."""
    cfg = record()
    again = evolve(cfg, encode=evolve(cfg.encode, checkpoint=True))
    once = step_of(cfg, 1, 6).work.flops
    assert step_of(again, 1, 6).work.flops == once
    # Slices find no room beside weights, moments and this.
    monkeypatch.setattr(transfer, "_CARD_OF_ESTIMATES", 2**22)
    assert 1.15 < step_of(again, 1, 6).work.flops / once < 1.25
