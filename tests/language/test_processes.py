"""The validation loss of several processes is that of one, however its batches are divided, and of weights in parts too."""

import json

import pytest

from medvl.base import processes
from medvl.language import chat, system
from medvl.weights import shards
from tests.language import test_system as squares
from tests.together import run_together

CONVERSATIONS = 5  # three batches of 2, 2 and 1: neither two nor four processes have equally many


def losses(folder):
    """What each process does: the loss of whole weights, of weights in parts, and the batches computed here."""
    model, params = squares.init(folder=folder / f"run-{processes.world_size()}")
    data = chat.encode_conversations(model.chat, squares.TRAIN[:CONVERSATIONS])
    batches, real = [], chat.make_batch

    def make_batch(opened, encoded, rows, **settings):
        batches.append([*rows])
        return real(opened, encoded, rows, **settings)

    chat.make_batch = make_batch
    found = {"whole": system.validation_loss(model, data, params), "batches": [*batches]}
    mesh = shards.process_mesh()
    parts = params | {"model": shards.shard_params(params["model"], mesh, least=64)}
    assert (mesh is None) or shards.any_sharded(parts)
    found["parts"] = system.validation_loss(model, data, parts)
    with processes.single_process():  # as process 0 evaluates while the others are gone
        found["alone"] = system.validation_loss(model, data, params)
    (folder / f"{processes.world_size()}-{processes.rank()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    for world in (1, 2, 4):
        run_together(__name__, "losses", folder, world)
    return lambda world: [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4])
def test_the_loss_is_that_of_one_process(found, world):
    (want,) = found(1)
    assert want["whole"] == want["parts"] == want["alone"]
    for got in found(world):
        assert got["whole"] == pytest.approx(want["whole"], rel=1e-14)
        assert got["parts"] == pytest.approx(want["whole"], rel=1e-14)
        assert got["alone"] == want["whole"]
    assert len({got["whole"] for got in found(world)}) == 1


@pytest.mark.parametrize(
    ("world", "shares"),
    [
        (1, [[[0, 1], [2, 3], [4]]]),
        (2, [[[0, 1], [4]], [[2, 3], [4]]]),
        (4, [[[0, 1]], [[2, 3]], [[4]], [[4]]]),
    ],
)
def test_each_process_computes_its_share(found, world, shares):
    """As many batches in each: one that has none left computes the last batch, which counts nothing there."""
    assert [got["batches"] for got in found(world)] == shares
