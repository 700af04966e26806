"""The precision of the slice encoder, and what of a batch is copied to a GPU."""

import json

import pytest
import torch
from attrs import evolve
from safetensors.torch import save_file

from medvl.base.tree import flatten
from medvl.components.encode import EncodeConfig
from medvl.components.text import TextConfig
from medvl.hub import clip, tokens
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip.record import VitConfig, WordsConfig
from tests.gpu import cases
from tests.gpu.pretend import GPU, pretended_gpu
from tests.hub.test_clip import original, resnet

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


def test_both_towers_from_a_clip_of_openai(tmp_path):
    """What the record names is what is computed; a ResNet and a file without a tokenizer are refused."""
    path = tmp_path / "ViT-X.safetensors"
    save_file(original(), path)
    (tmp_path / clip.SETTINGS).write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    tokens.train_bpe(["a nodule", "no nodule"], 259, tmp_path / "tokenizer")
    cfg = cases.ct_clip_model()[0].cfg
    words = WordsConfig(encoder=str(path), pool="last", tower=TextConfig(context=12))
    cfg = evolve(cfg, vit=VitConfig(name=str(path)), words=words, fuse=evolve(cfg.fuse, inputs=128))
    with pytest.raises(ValueError, match=r"words.tokenizer must name a tokenizer, such as CLIP's: .*ViT-X"):
        ct_clip.init_model(cfg, tmp_path)
    cfg = evolve(cfg, words=evolve(words, tokenizer=str(tmp_path / "tokenizer")))
    model, params = ct_clip.init_model(cfg, tmp_path)
    assert torch.equal(params["vit"]["post_layernorm.weight"], original()["visual.ln_post.weight"])
    assert model.text_encoder.config["num_hidden_layers"] == 2
    assert params["project"]["text"]["weight"].shape[1] == 64
    save_file(resnet(), path)
    with pytest.raises(ValueError, match="vision tower must be a transformer"):
        ct_clip.init_model(cfg, tmp_path)
