"""A trained run at toy size, made once."""

import json

import pytest

from medvl.systems import run
from tests.systems.tune.test_run import record


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The path of the record of a run with a model and an adapter; `run.RUNS` is where it lies."""
    place = tmp_path_factory.mktemp("trained")
    path = place / "toy.json"
    path.write_text(json.dumps(record(place)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "RUNS", place / "runs")
        run.run(str(path), log=lambda _: None)
        yield path
