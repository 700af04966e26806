"""ct_clip in several processes against one: the data made once, frozen features and validation shared out, the same texts drawn, the same losses."""

import json
from pathlib import Path

import pytest
import torch

from medvl.systems import run
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
