"""The precision of the slice encoder, and what of a batch is copied to a GPU."""

import pytest
import torch
from attrs import evolve

from medvl.base.tree import flatten
from medvl.components.encode import EncodeConfig
from medvl.systems.ct_clip import model as ct_clip
from tests.gpu import cases
from tests.gpu.pretend import GPU, pretended_gpu

HALF = {"train__precision": "bfloat16"}


def test_a_gpu_encodes_in_the_precision_of_training():
    full, half = (cases.ct_clip_model(**settings)[0].cfg for settings in ({}, HALF))
    for cfg, device in ((full, "cpu"), (full, "cuda"), (half, "cpu")):
        assert ct_clip.encoder_settings(cfg, torch.device(device)) is cfg.encode
    assert ct_clip.encoder_settings(half, torch.device("cuda")) == EncodeConfig(dtype="bfloat16")
    exact = evolve(half, encode=EncodeConfig(dtype="float64"))
    assert ct_clip.encoder_settings(exact, torch.device("cuda")) is exact.encode


def test_bfloat16_throughout_is_as_near_to_float32_as_autocast(monkeypatch):
    def gradient(**settings):
        _, params, grad = cases.ct_clip_gradient("cpu", **settings)
        loss, _, grads = grad(params, cases.ct_batch())
        return loss, torch.cat([leaf.flatten() for leaf in flatten(grads).values()])

    loss, exact = gradient()
    _, mixed = gradient(**HALF)
    monkeypatch.setattr(ct_clip, "encoder_settings", lambda cfg, device: evolve(cfg.encode, dtype="bfloat16"))
    half_loss, half = gradient(**HALF)
    assert abs(half_loss - loss) < 0.03 * loss
    assert not torch.equal(half, mixed)
    assert torch.cosine_similarity(half, exact, dim=0) > 0.998
    assert (half - exact).norm() < 1.3 * (mixed - exact).norm()


@pytest.mark.parametrize("fits", [True, False])
def test_voxels_are_copied_once_for_both_passes_where_they_fit(fits):
    batch = cases.ct_batch()
    copied = batch["slices"].nbytes
    with pretended_gpu() as gpu:
        gpu.free_bytes = 4 * copied + (4 if fits else 0)
        _, params, grad = cases.ct_clip_gradient(GPU)
        gpu.bytes.clear()
        gpu.waits.clear()
        grad(params, batch)
        assert not gpu.waits
        assert (copied if fits else 2 * copied) <= gpu.bytes["to"] < (1.2 if fits else 2.2) * copied


def test_a_batch_stays_as_it_is_on_the_cpu():
    batch = cases.ct_batch()
    moved = ct_clip.move_batch(batch, torch.device("cpu"))
    assert moved.keys() == batch.keys()
    assert all(moved[name] is batch[name] for name in batch)
