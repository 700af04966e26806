"""A VQ model is trained with the project's own loop, and codes of pictures are computed once."""

import errno
import json
import os
import re
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from torch import Generator

from medvl.base import config, files, processes
from medvl.base.tree import flatten
from medvl.components import vq
from medvl.components.vq import VqConfig
from medvl.hub.vqgan_files import open_vqgan, write_vqgan
from medvl.systems.unified.codes import VqTraining, fit_vq, target_codes, vq_pixels
from medvl.training import states
from tests.together import run_together, start_together, wait_for

TINY = {
    "n_embed": 16,
    "embed_dim": 8,
    "z_channels": 8,
    "resolution": 16,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
}


def training(kind="vq", **train):
    stage = {"name": "vq", "steps": 6, "lr": 1e-3}
    settings = {"stages": [stage], "batch": 4, "chunk": 2, "log": 1, "save": 2, "validate": 3} | train
    return config.structure({"model": TINY | {"kind": kind}, "train": settings}, VqTraining)


@pytest.fixture
def pictures(tmp_path):
    """Six pictures of two greys, an edge somewhere; the last two have the same content."""
    gen = np.random.default_rng(0)
    paths = []
    for i in range(6):
        pixels = np.zeros((20, 24, 3), np.uint8)
        pixels[:, gen.integers(4, 20) :] = gen.integers(60, 255)
        path = tmp_path / f"{i}.png"
        Image.fromarray(pixels).save(path)
        paths.append(path)
    paths[5].write_bytes(paths[4].read_bytes())
    return paths


def test_pixels_are_those_of_the_reference():
    pixels = torch.arange(5 * 3 * 3, dtype=torch.uint8).reshape(5, 3, 3)
    made = vq_pixels(pixels, 16)
    resized = np.asarray(Image.fromarray(pixels.numpy()).resize((16, 16), Image.Resampling.LANCZOS))
    expected = torch.from_numpy(resized.copy()).permute(2, 0, 1).float() / 255 * 2 - 1
    assert torch.equal(made, expected)
    assert vq_pixels(pixels).shape == (3, 256, 256)


# Training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["vq", "gumbel"])
def test_training_goes_on_to_the_same_bits(pictures, tmp_path, kind):
    images = {"train": pictures[:5], "valid": pictures[4:]}
    cfg = training(kind)
    record, params = fit_vq(cfg, images, tmp_path / "whole", log=lambda line: None)
    assert record == cfg.model
    calls = 0

    def killed(path):
        nonlocal calls
        calls += 1
        if calls > 14:
            raise KeyboardInterrupt
        return Image.open(path)

    with pytest.raises(KeyboardInterrupt):
        fit_vq(cfg, images, tmp_path / "killed", open_picture=killed, log=lambda line: None)
    assert (tmp_path / "killed" / "0-vq" / "last.pt").exists()
    _, again = fit_vq(cfg, images, tmp_path / "killed", log=lambda line: None)
    assert all(torch.equal(again[name], params[name]) for name in params)
    # It is trained: it is read, and no image is looked at.
    _, read = fit_vq(cfg, {"train": []}, tmp_path / "whole", log=lambda line: None)
    assert all(torch.equal(read[name], params[name]) for name in params)


@pytest.fixture
def one_thread():
    """As processes of `tests.together` compute: sums over several threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fit_with_others(folder):
    """Train in a folder that holds pictures, on all processes; what every one of them returns."""
    pictures = sorted(folder.glob("*.png"))
    _, params = fit_vq(
        training(), {"train": pictures, "valid": pictures[:3]}, folder / "two", log=lambda _: None
    )
    torch.save(params, folder / f"returned-{processes.rank()}.pt")


def test_two_processes_train_the_same_model_as_one(pictures, tmp_path, one_thread):
    run_together(__name__, "fit_with_others", tmp_path, 2)
    images = {"train": pictures, "valid": pictures[:3]}
    _, expected = fit_vq(training(), images, tmp_path / "one", log=lambda _: None)
    _, written = open_vqgan(tmp_path / "two" / "vq")
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-4, atol=1e-6)
    for rank in (0, 1):
        returned = torch.load(tmp_path / f"returned-{rank}.pt", weights_only=True)
        assert all(torch.equal(returned[name], written[name]) for name in written)
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "0-vq/metrics.jsonl").open()]
        for run in ("one", "two")
    )
    assert [line["val_loss"] for line in two if "val_loss" in line] == pytest.approx(
        [line["val_loss"] for line in one if "val_loss" in line], rel=1e-5
    )


def fit_and_be_killed(folder):
    """Train in a folder that holds pictures. SIGKILL comes before a file gets its name, each time a later one."""
    replace, names = os.replace, []
    kills = folder / "kills.txt"
    earlier = len(kills.read_text()) if kills.exists() else 0

    def killed(tmp, path):
        names.append(path)
        if len(names) == 2 + earlier:
            with kills.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        replace(tmp, path)

    pictures = sorted(folder.glob("*.png"))
    with mock.patch.object(os, "replace", killed):
        fit_vq(training(), {"train": pictures, "valid": pictures[:3]}, folder / "killed", log=lambda _: None)


def test_killed_while_it_writes_it_goes_on_to_the_same_bits(pictures, tmp_path, one_thread):
    images = {"train": pictures, "valid": pictures[:3]}
    _, expected = fit_vq(training(), images, tmp_path / "whole", log=lambda _: None)
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        (started,) = start_together(__name__, "fit_and_be_killed", tmp_path, 1)
        status = wait_for(started)
    assert status == 0, started.errors.read_text()
    assert len((tmp_path / "kills.txt").read_text()) >= 4  # last.pt, best.pt twice, the folder of the model
    _, params = open_vqgan(tmp_path / "killed" / "vq")
    assert all(torch.equal(params[name], expected[name]) for name in expected)
    states_of = [states.read_state(tmp_path / run / "0-vq" / "last.pt") for run in ("whole", "killed")]
    first, second = (flatten({"opt": state.opt, "params": state.params}) for state in states_of)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reconstruction_is_learned_and_can_be_trained_further(pictures, tmp_path):
    cfg = training(stages=[{"name": "vq", "steps": 40, "lr": 2e-3}], validate=40, save=40)

    def error(record, params):
        pixels = torch.stack([vq_pixels(Image.open(path), 16) for path in pictures])
        decoded = vq.decode_codes(record, params, vq.encode_codes(record, params, pixels))
        return float((decoded - pixels).abs().mean())

    start = vq.init_vq(cfg.model, Generator().manual_seed(0))
    images = {"train": pictures}
    _, params = fit_vq(cfg, images, tmp_path / "a", log=lambda line: None)
    assert error(cfg.model, params) < 0.5 * error(cfg.model, start)
    # Further from its folder: the decoder alone, of another record's stage.
    stage = {"name": "decoder", "steps": 3, "lr": 1e-4, "train": ["decoder.*"]}
    further = evolve(training(stages=[stage]), start=str(tmp_path / "a" / "vq"))
    record, more = fit_vq(further, images, tmp_path / "b", log=lambda line: None)
    assert record == cfg.model
    changed = {name.partition(".")[0] for name in params if not torch.equal(params[name], more[name])}
    assert changed == {"decoder"}


def test_a_remapped_codebook_stays_remapped(pictures, tmp_path):
    cfg = evolve(training().model, used=3)
    params = vq.init_vq(cfg, Generator().manual_seed(0)) | {"quantize.used": torch.tensor([5, 0, 2])}
    write_vqgan(cfg, params, tmp_path / "start")
    further = evolve(training(), start=str(tmp_path / "start"))
    record, more = fit_vq(further, {"train": pictures}, tmp_path / "run", log=lambda line: None)
    assert record == cfg
    assert more["quantize.used"].tolist() == [5, 0, 2]
    assert open_vqgan(tmp_path / "run" / "vq")[1].keys() == params.keys()


def test_records_and_images_that_do_not_fit_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"a batch of 4 needs .* found 3"):
        fit_vq(training(), {"train": pictures[:3]}, tmp_path / "run", log=lambda line: None)
    with pytest.raises(ValueError, match=r"vq.temperature must be \[first, last\], got \[0.9\]"):
        VqTraining(temperature=(0.9,), train=training().train)
    with pytest.raises(ValueError, match=r"vq.train.tokens = 64: that is for language models"):
        training(tokens=64)
    stage = {"name": "vq", "steps": 1, "lr": 1e-3, "train": ["nothing.*"]}
    with pytest.raises(ValueError, match=r"'nothing.*' matches no parameter"):
        fit_vq(training(stages=[stage]), {"train": pictures}, tmp_path / "run", log=lambda line: None)


# Codes -------------------------------------------------------------------------------------------------------
@pytest.fixture
def model():
    cfg = VqConfig(**TINY | {"ch_mult": (1, 1), "attn_resolutions": ()})
    return cfg, vq.init_vq(cfg, Generator().manual_seed(0))


def test_codes_are_computed_once_for_each_content(pictures, model, tmp_path):
    opened = []

    def open_picture(path):
        opened.append(path)
        return Image.open(path)

    cfg, params = model
    codes = target_codes(cfg, params, pictures, tmp_path / "cache", open_picture=open_picture)
    assert len(opened) == 5
    for path in pictures:
        pixels = vq_pixels(Image.open(path), 16)[None]
        assert torch.equal(codes[str(path)], vq.encode_codes(cfg, params, pixels)[0])
        assert codes[str(path)].dtype == torch.int64
    again = target_codes(cfg, params, pictures[::-1], tmp_path / "cache", open_picture=open_picture)
    assert len(opened) == 5
    assert all(torch.equal(again[name], codes[name]) for name in codes)
    # Other weights, another way to open, another content: none finds what is there.
    other = params | {"quant_conv.bias": params["quant_conv.bias"] + 1}
    target_codes(cfg, other, pictures[:1], tmp_path / "cache", open_picture=open_picture)
    target_codes(
        cfg, params, pictures[:1], tmp_path / "cache", open_picture=open_picture, opened="window 0,1"
    )
    assert len(opened) == 5 + 1 + 1
    pictures[0].write_bytes(pictures[1].read_bytes())
    changed = target_codes(cfg, params, pictures[:1], tmp_path / "cache", open_picture=open_picture)
    assert torch.equal(changed[str(pictures[0])], codes[str(pictures[1])])


def test_a_full_disk_leaves_whole_entries_and_the_next_run_goes_on(pictures, model, tmp_path, monkeypatch):
    save, written = np.save, []

    def full(file, array, **kwargs):
        if len(written) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(array)
        save(file, array, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files.np, "save", full)
        with pytest.raises(OSError, match="No space left"):
            target_codes(*model, pictures, tmp_path / "cache")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.suffix for path in left] == [".npy", ".npy"]
    opened = []
    target_codes(
        *model,
        pictures,
        tmp_path / "cache",
        open_picture=lambda path: opened.append(path) or Image.open(path),
    )
    assert len(opened) == 3


def test_broken_entries_and_pictures_are_named(pictures, model, tmp_path):
    target_codes(*model, pictures[:1], tmp_path / "cache")
    (entry,) = (tmp_path / "cache").rglob("*.npy")
    entry.write_bytes(entry.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"{entry.name}: must hold an array \[8, 8\] and is broken .*; remove it"
    ):
        target_codes(*model, pictures[:1], tmp_path / "cache")
    pictures[1].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=re.escape(str(pictures[1]))):
        target_codes(*model, pictures[:2], tmp_path / "cache2")
