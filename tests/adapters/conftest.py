"""Shared by the tests of embedders."""

import pytest

from tests.adapters import tiny_encoders


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{kind: (folder, transformers' module)}."""
    return tiny_encoders.write_all(tmp_path_factory.mktemp("models"))
