"""VQ models in files: what taming publishes is read without running any of it, and written whole."""

import errno
import os
import pickle
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Generator

from medvl.components import vq
from medvl.components.vq import VqConfig
from medvl.hub import checkpoints
from medvl.hub.vqgan_files import open_vqgan, read_vqgan, write_vqgan

LAYERS = {
    "double_z": False,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}
TINY = VqConfig(
    n_embed=6,
    embed_dim=4,
    z_channels=4,
    resolution=16,
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(8,),
)


def write_yaml(path, target="taming.models.vqgan.GumbelVQ", layers=None, **params):
    params = {
        "embed_dim": 4,
        "n_embed": 6,
        "monitor": "val/rec_loss",
        "ddconfig": LAYERS | (layers or {}),
    } | params
    params["lossconfig"] = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    params["temperature_scheduler_config"] = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler"}
    model = {"base_learning_rate": 4.5e-6, "target": target, "params": params}
    path.write_text(yaml.safe_dump({"model": model}))
    return path


class ModelCheckpoint:
    """Stands for a class of Lightning: where the checkpoint is read, it may not exist."""


def lightning(params, **more):
    """A checkpoint as Lightning writes it: classes as keys, numbers of other libraries, training-only weights."""
    state = {"loss.discriminator.main.0.weight": torch.full((4, 3), float("nan"))} | params
    scores = {"best_model_score": np.float64(0.1), "scores": np.zeros(3), "counts": defaultdict(int)}
    callback = {ModelCheckpoint: scores, "namespace": Namespace(lr=1e-4), "path": Path("x")}
    return {"epoch": 3, "state_dict": state, "callbacks": callback, "hyper": ModelCheckpoint()} | more


@pytest.fixture
def published(tmp_path):
    params = vq.init_vq(TINY, Generator().manual_seed(0))
    torch.save(lightning(params), tmp_path / "last.ckpt")
    return write_yaml(tmp_path / "model.yaml"), tmp_path / "last.ckpt", params


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_published_model_is_read_and_converted(published, tmp_path):
    config, ckpt, params = published
    cfg, read = read_vqgan(config, ckpt)
    assert cfg == TINY
    assert same(read, params)
    write_vqgan(cfg, read, tmp_path / "vq")
    assert sorted(p.name for p in (tmp_path / "vq").iterdir()) == ["model.safetensors", "vq.json"]
    cfg, read = open_vqgan(tmp_path / "vq")
    assert cfg == TINY
    assert same(read, params)
    # The weights alone, as other tools write them.
    assert same(read_vqgan(config, tmp_path / "vq" / "model.safetensors")[1], params)
    half = {name: tensor.half() for name, tensor in params.items()}
    torch.save({"state_dict": half}, ckpt)
    assert all(tensor.dtype == torch.float32 for tensor in read_vqgan(config, ckpt)[1].values())


def test_the_plain_kind_and_a_remapped_codebook(tmp_path):
    cfg = VqConfig(
        kind="vq", n_embed=6, embed_dim=5, used=3, z_channels=4, resolution=16, ch=32, ch_mult=(1, 2),
        num_res_blocks=1, attn_resolutions=(8,),
    )  # fmt: skip
    params = vq.init_vq(cfg, Generator().manual_seed(0)) | {"quantize.used": torch.tensor([5, 0, 2])}
    torch.save(lightning(params), tmp_path / "last.ckpt")
    target = "taming.models.vqgan.VQModel"
    config = write_yaml(
        tmp_path / "model.yaml",
        target,
        embed_dim=5,
        remap="used.npy",
        sane_index_shape=True,
        colorize_nlabels=None,
    )
    found, read = read_vqgan(config, tmp_path / "last.ckpt")
    assert found == cfg
    assert same(read, params)
    write_vqgan(cfg, params, tmp_path / "vq")
    assert same(open_vqgan(tmp_path / "vq")[1], params)
    torch.save(lightning(params | {"quantize.used": torch.tensor([6, 0, 2])}), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"quantize.used must lie in 0\.\.5"):
        read_vqgan(config, tmp_path / "last.ckpt")
    torch.save(lightning(vq.init_vq(TINY, Generator())), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"missing .*quantize.used"):
        read_vqgan(config, tmp_path / "last.ckpt")


# Nothing in a checkpoint is run --------------------------------------------------------------------------------
class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, pickle.loads])
def test_code_in_a_checkpoint_is_not_run(published, tmp_path, function):
    config, ckpt, params = published
    ran = tmp_path / "ran"
    argument = {
        os.system: f"mkdir {ran}",
        os.mkdir: str(ran),
        eval: f"__import__('os').mkdir({str(ran)!r})",
        pickle.loads: pickle.dumps(Evil(os.mkdir, str(ran))),
    }[function]
    torch.save(lightning(params, callbacks=Evil(function, argument)), ckpt)
    # Read with an empty object in its place, or refused: both are right.
    try:
        assert same(read_vqgan(config, ckpt)[1], params)
    except ValueError as e:
        assert "write its weights alone" in str(e)  # noqa: PT017
    assert not ran.exists()
    torch.load(ckpt, weights_only=False)  # it would have run
    assert ran.exists()
    ran.rmdir()
    # As a weight it is no tensor.
    torch.save({"state_dict": params | {"quant_conv.bias": Evil(function, argument)}}, ckpt)
    with pytest.raises(ValueError, match=r"write its weights alone|must hold one flat dict of tensors"):
        read_vqgan(config, ckpt)
    assert not ran.exists()


def test_the_old_format_cannot_hold_foreign_classes(published):
    config, ckpt, params = published
    torch.save({"state_dict": params}, ckpt, _use_new_zipfile_serialization=False)
    assert same(read_vqgan(config, ckpt)[1], params)
    allowed = torch.serialization.get_safe_globals()
    torch.save(lightning(params), ckpt, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"torch.save\(\{\"state_dict\": checkpoint\[\"state_dict\"\]\}, FILE\)"
    ):
        read_vqgan(config, ckpt)
    # What was allowed for one file is so no more.
    assert {*torch.serialization.get_safe_globals()} == {*allowed}


# What does not fit ---------------------------------------------------------------------------------------------
def test_keys_that_do_not_fit_are_listed(published):
    config, ckpt, params = published
    wrong = dict(params)
    del wrong["quant_conv.bias"], wrong["encoder.conv_in.weight"]
    wrong |= {"quantize.codebook": torch.zeros(2), "decoder.conv_out.bias": torch.zeros(1)}
    torch.save(lightning(wrong), ckpt)
    with pytest.raises(ValueError, match="is not the model that") as e:
        read_vqgan(config, ckpt)
    assert str(e.value) == (
        f"read_vqgan: {ckpt} is not the model that {config} describes: missing encoder.conv_in.weight, "
        "quant_conv.bias; unexpected quantize.codebook; of another shape decoder.conv_out.bias [1] instead of [3]"
    )


def test_broken_checkpoints_are_refused(published, tmp_path):
    config, ckpt, params = published
    content = ckpt.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 30):
        ckpt.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"last.ckpt"):
            read_vqgan(config, ckpt)
    torch.save(lightning(params | {"quant_conv.bias": torch.full((4,), float("nan"))}), ckpt)
    with pytest.raises(ValueError, match=r"quant_conv.bias must be finite"):
        read_vqgan(config, ckpt)
    torch.save([1], ckpt)
    with pytest.raises(ValueError, match="must hold one flat dict of tensors under 'state_dict'"):
        read_vqgan(config, ckpt)
    torch.save({"weights": params}, ckpt)
    with pytest.raises(ValueError, match="must hold one flat dict of tensors under 'state_dict'"):
        read_vqgan(config, ckpt)
    with pytest.raises(ValueError, match=r"none.ckpt: no such file"):
        read_vqgan(config, tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "ldm.models.autoencoder.AutoencoderKL"}, "other autoencoders have other layers"),
        ({"layers": {"double_z": True}}, "double_z must be False, found true"),
        ({"layers": {"resamp_with_conv": False}}, "resamp_with_conv must be True, found false"),
        ({"ddconfig": {"z_channels": 4}}, "must say ch, ch_mult, resolution"),
        ({"ddconfig": None}, "must say z_channels, ch, ch_mult, resolution"),
        ({"layers": {"ch": 33}}, "ch must be a multiple of 32"),
        ({"layers": {"ch": "many"}}, "expected int"),
        ({"layers": {"attn_type": "linear"}}, "attn_type"),
        ({"embed_dim": 3}, "embed_dim of kind gumbel must be z_channels"),
    ],
)
def test_the_yaml_of_another_model_is_refused(published, settings, message):
    config, ckpt, _ = published
    write_yaml(config, **settings)
    with pytest.raises(ValueError, match=message) as e:
        read_vqgan(config, ckpt)
    assert str(config) in str(e.value)


@pytest.mark.parametrize(
    "text", ["", "[1]", "a: [", "model: 3", "!!python/object/apply:os.system ['true']", "\x00"]
)
def test_what_is_no_model_yaml_is_refused(published, text):
    config, ckpt, _ = published
    config.write_text(text)
    with pytest.raises(ValueError, match=r"model.target must be|not readable YAML"):
        read_vqgan(config, ckpt)


def test_a_folder_is_written_whole_or_not_at_all(published, tmp_path, monkeypatch):
    params = published[2]
    with pytest.raises(ValueError, match=r"params must be those of the record, not so quant_conv.bias"):
        write_vqgan(TINY, {n: t for n, t in params.items() if n != "quant_conv.bias"}, tmp_path / "vq")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_vqgan(TINY, params, tmp_path / "vq")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "model.yaml"]
    with pytest.raises(
        ValueError, match=r"must hold vq.json and model.safetensors; `invoke vqgan convert` makes"
    ):
        open_vqgan(tmp_path / "vq")


def test_real_yamls(tmp_path, shared_data):
    configs = shared_data / "configs"
    for name in ("healthgpt_vqgan_model.yaml", *(f"taming/{p.name}" for p in (configs / "taming").iterdir())):
        save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"is not the model that .* describes: missing .* unexpected x$"):
            read_vqgan(configs / name, tmp_path / "w.safetensors")
