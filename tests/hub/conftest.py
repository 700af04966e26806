"""Checkpoints that the tests of hub share."""

import pytest

from tests.hub.pieces import TINY, model_of


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{kind: folder that transformers wrote}."""
    where = tmp_path_factory.mktemp("models")
    for kind in TINY:
        model_of(kind).save_pretrained(where / kind)
    return {kind: where / kind for kind in TINY}
