"""ct_clip in several processes against one: the data made once, frozen features and validation shared out, the same texts drawn, the same losses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from medvl.base.tree import flatten
from medvl.systems import run
from medvl.systems.ct_clip import run as ct_clip_run
from medvl.training import states
from tests.systems.ct_clip import together
from tests.systems.ct_clip.test_run import SET
from tests.together import run_together, start_together, wait_together

ROOT = Path(__file__).resolve().parents[3]
STAGES = (
    "{name='words', steps=2, lr=1e-3, train=['(fuse|text|project|contrast)/.*']}",  # slice features come from the cache
    "{name='all', steps=1, lr=1e-3}",
)
DRAWN = ("data.draws=2", "data.sentences=1", "evaluate.bootstrap=2", f"train.stages=[{', '.join(STAGES)}]")


def _place(folder):
    folder.mkdir()
    (folder / "experiments").symlink_to(ROOT / "experiments")
    return folder


def train(folder):
    """What each of several processes does in a folder."""
    run.run("ctclip_phantom", (*SET, *DRAWN))


def _losses(folder):
    (trained,) = (folder / "runs").iterdir()
    lines = [
        line
        for stage in ("0-words", "1-all")
        for line in (trained / stage / "metrics.jsonl").read_text().splitlines()
    ]
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder in which one process has trained."""
    folder = _place(tmp_path_factory.mktemp("alone") / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run.run("ctclip_phantom", (*SET, *DRAWN), lambda line: None)
    return folder


def test_two_processes_train_as_one(one, tmp_path):
    two = _place(tmp_path / "two")
    run_together(__name__, "train", two, 2, cwd=two)
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-4)
    assert len(_losses(two)) == 3
    cache = sorted(path.name for path in (two / "cache").iterdir())
    assert cache == sorted(path.name for path in (two / "cache").glob("features-*"))  # no lock is left


@pytest.mark.parametrize(("world", "volumes"), [(2, [4, 4]), (4, [3, 3, 1, 1])])
def test_processes_share_the_volumes_of_a_validation(one, world, volumes):
    """The rows are those of one process, to the bit; a process without a batch of its own computes the last one."""
    placed = {}
    for number in (1, world):
        if not (one / f"placed-{number}-0.pt").exists():
            run_together(together.__name__, "place_and_score", one, number, cwd=one)
        files = [one / f"placed-{number}-{rank}.pt" for rank in range(number)]
        placed[number] = [torch.load(file, weights_only=True) for file in files]
    (alone,) = placed[1]
    assert alone["volumes"] == 7
    assert [found["volumes"] for found in placed[world]] == volumes
    for found in placed[world]:
        assert torch.equal(found["rows"], alone["rows"])
        assert found["score"] == alone["score"]


@pytest.mark.parametrize("worlds", [(2,), (4,), (4, 2)])
def test_processes_fill_a_cache_together(one, tmp_path, worlds):
    """From nothing; in the last case beside another run over the same cache, which waits and computes nothing again."""
    for name in ("runs", "experiments", "data"):
        (tmp_path / name).symlink_to(one / name)
    started = []
    for world in worlds:
        started += start_together(together.__name__, "fill_cache", tmp_path, world, cwd=tmp_path)
    wait_together(started)
    features = [json.loads(file.read_text()) for file in tmp_path.glob("features-*.json")]
    assert len(features) == sum(worlds)
    assert all(found == features[0] for found in features)
    encoded = [file.read_text().split() for file in tmp_path.glob("encoded-*.txt")]
    # Each volume once, and every process of the run that came first had its share.
    assert sorted(name for names in encoded for name in names) == sorted(features[0])
    assert len(encoded) in worlds
    assert max(map(len, encoded)) - min(map(len, encoded)) <= 1
    assert [file.suffix for file in (tmp_path / "filled").iterdir()] == [".h5"]  # no lock is left


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_global_and_local_loss_are_those_of_one_process(one, world, loss):
    """Loss and norm of the gradient at each step of gradient descent, in every process."""

    def read(number, rank):
        curves = json.loads((one / f"curves-{number}-{rank}.json").read_text())
        return {name: torch.tensor(curve, dtype=torch.float64) for name, curve in curves.items()}

    for number in (1, world):
        if not (one / f"curves-{number}-0.json").exists():
            run_together(together.__name__, "train_by_descent", one, number, cwd=one)
    alone = read(1, 0)[f"{loss} global"]
    assert alone[0, 0] - alone[-1, 0] > 0.1  # it learns
    assert torch.equal(alone, read(1, 0)[f"{loss} local"])
    for rank in range(world):
        found = read(world, rank)
        torch.testing.assert_close(found[f"{loss} global"], alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[f"{loss} local"], alone, rtol=1e-6, atol=1e-6)
        # The same check sees a gradient that is too large by the number of processes: first in its norm, then in the loss.
        wrong = found[f"{loss} wrong"]
        assert wrong[0].tolist() == pytest.approx([float(alone[0, 0]), world * float(alone[0, 1])])
        assert (wrong - alone)[1:, 0].abs().min() > 1e-3


@pytest.mark.parametrize("world", [2, 4])
def test_encoders_in_parts_are_trained_as_whole_ones(one, world):
    """A slice encoder and a named text encoder; some processes have fewer slices, and so fewer calls, than others."""
    if not (one / "bert").exists():
        config = {
            "vocab_size": 300,
            "hidden_size": 128,
            "intermediate_size": 256,
            "max_position_embeddings": 64,
        }
        torch.manual_seed(0)
        bert = BertModel(BertConfig(num_hidden_layers=2, num_attention_heads=2, **config))
        bert.save_pretrained(one / "bert")
    for number in (1, world):
        if not (one / f"shards-{number}-0.pt").exists():
            run_together(together.__name__, "train_shards", one, number, cwd=one)
    alone = torch.load(one / "shards-1-0.pt")
    found = [torch.load(one / f"shards-{world}-{rank}.pt") for rank in range(world)]
    whole, gathered = flatten(alone["params"]), flatten(found[0]["params"])
    assert whole.keys() == gathered.keys()
    for name, leaf in whole.items():
        torch.testing.assert_close(gathered[name], leaf, rtol=0, atol=1e-9)
    assert not alone["cut"]
    assert {name.split("/")[0] for name in found[0]["cut"]} == {"vit", "text"}
    assert sum(part["held"] for part in found) == sum(whole[name].numel() for name in found[0]["cut"])
    for part in found:
        torch.testing.assert_close(part["curve"], alone["curve"], rtol=1e-6, atol=1e-6)
        assert part["held"] == found[0]["held"]


def test_a_run_in_parts_saves_the_whole(one, tmp_path):
    """Through the loop: validation, the checkpoint, the stage after it, and the run read back by one process."""
    vit = "{model_type='dinov2', hidden_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16}"
    stages = "[{name='words', steps=2, lr=1e-3}, {name='all', steps=2, lr=1e-3}]"
    wide = (*SET, f"vit.config={vit}", "fuse.inputs=128", f"train.stages={stages}")
    losses = []
    for name, settings in (
        ("whole", wide),
        ("parts", (*wide, "train.shard=true", "contrast.gather='local'")),
    ):
        folder = _place(tmp_path / name)
        (folder / "data").symlink_to(one / "data")
        (folder / "settings.json").write_text(json.dumps(settings))
        run_together(__name__, "train_wide", folder, 2, cwd=folder)
        losses.append(_losses(folder))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 4
    (trained,) = (tmp_path / "parts/runs").iterdir()
    kept = states.read_state(trained / "1-all/last.pt")
    _, params = ct_clip_run.load(trained)
    params.pop("running")
    shapes = lambda tree: {name: leaf.shape for name, leaf in flatten(tree).items()}
    assert shapes(kept.params) == shapes(params)
    assert flatten(params)["vit/encoder.layer.0.mlp.fc1.weight"].shape == (512, 128)


def train_wide(folder):
    """What each of two processes does in a folder whose settings lie there."""
    run.run("ctclip_phantom", tuple(json.loads((folder / "settings.json").read_text())))
