"""saving: folders that transformers opens, whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file

from medvl.hub import loading, saving, skeletons
from medvl.weights import lazy as weights
from tests import tiny
from tests.hub.pieces import TINY


@pytest.mark.parametrize("kind", TINY)
def test_save_writes_the_checkpoint_that_was_loaded(folders, kind, tmp_path):
    skeleton, params = loading.load_skeleton(folders[kind])
    saving.save_skeleton(skeleton, params, tmp_path / "out")
    before, after = (
        load_file(folders[kind] / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    before = {k: t for k, t in before.items() if "pooler" not in k}  # the plain encoder has none
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [
        type(skeleton.module).__name__
    ]


def test_a_shared_weight_stays_shared(tmp_path, gen):
    config = {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 16,
        "num_heads": 2,
        "num_layers": 1,
        "d_ff": 32,
        "vocab_size": 50,
    }
    skeleton, params = skeletons.init_skeleton(config, gen)
    saving.save_skeleton(skeleton, params, tmp_path / "t5")
    skeleton, loaded = loading.load_skeleton(tmp_path / "t5")
    assert loaded.keys() == params.keys()
    assert not any("embed_tokens" in n for n in loaded)
    ids = {"input_ids": torch.tensor([[3, 4]]), "decoder_input_ids": torch.tensor([[5]])}
    zero = loaded | {"shared.weight": torch.zeros_like(loaded["shared.weight"])}
    assert skeleton(loaded, **ids).encoder_last_hidden_state.abs().max() > 0
    assert skeleton(zero, **ids).encoder_last_hidden_state.abs().max() == 0


def test_adapted_weights_are_not_saved_unmerged(tmp_path):
    skeleton, params = tiny.model("qwen3")
    name = "model.layers.0.mlp.up_proj.weight"
    lazy = weights.low_rank(params[name], torch.ones(2, 32), torch.ones(48, 2))
    with pytest.raises(ValueError, match=f"save: adapters are on {name}; merge them"):
        saving.save_skeleton(skeleton, params | {name: lazy}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_save_leaves_a_whole_folder_or_none(folders, tmp_path, monkeypatch):
    skeleton, params = loading.load_skeleton(folders["dinov2"])
    saving.save_skeleton(skeleton, params, tmp_path / "a")
    with pytest.raises(ValueError, match="is there already"):
        saving.save_skeleton(skeleton, params, tmp_path / "a")
    with pytest.raises(ValueError, match="save: params must be"):
        saving.save_skeleton(skeleton, {}, tmp_path / "b")

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        saving.save_skeleton(skeleton, params, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
