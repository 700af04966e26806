"""`invoke vqgan convert` makes a folder of a published VQ model, or says what is wrong."""

import pytest
import torch
from torch import Generator

from medvl.commands.vqgan import convert
from medvl.components import vq
from medvl.hub.vqgan_files import open_vqgan
from tests.hub.test_vqgan_files import TINY, lightning, write_yaml


def test_a_published_model_becomes_a_folder(tmp_path, capsys):
    params = vq.init_vq(TINY, Generator().manual_seed(0))
    torch.save(lightning(params), tmp_path / "last.ckpt")
    paths = [str(write_yaml(tmp_path / "model.yaml")), str(tmp_path / "last.ckpt"), str(tmp_path / "out")]
    convert("convert", *paths)
    numbers = sum(tensor.numel() for tensor in params.values())
    assert capsys.readouterr().out == (
        f"{paths[2]}: gumbel, {len(params)} tensors of {numbers:,} numbers, 6 codes; an image of 16 px is "
        "8 x 8 of them\n"
    )
    assert open_vqgan(paths[2])[0] == TINY
    with pytest.raises(ValueError, match=r"out is there already"):
        convert("convert", *paths)
    with pytest.raises(ValueError, match="the action must be convert, got 'train'"):
        convert("train", *paths)
