"""The cache of a frozen encoder: several volumes at once on a GPU that is not there, in the precision of training."""

import numpy as np
import pytest
import torch

from medvl.base import store
from medvl.ct import pairs
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip import slice_features
from medvl.systems.ct_clip.slice_features import cached_features
from tests.gpu import cases
from tests.gpu.pretend import GPU, pretended_gpu

RANGES = [(0, 3), (1, 5), (2, 4), (0, 6), (3, 5), (1, 2)]  # of the slices that are scan, one for each volume


@pytest.fixture
def volumes(tmp_path):
    path = tmp_path / "volumes.h5"
    names = [f"v{i}" for i in range(len(RANGES))]
    store.create(
        path, names, (6, 56, 56), "uint8", {"of": "a test"}, [("spacing_mm", "f8", 3), ("occupied", "i4", 2)]
    )
    rng = np.random.default_rng(0)
    for name, occupied in zip(names, RANGES, strict=True):
        voxels = rng.integers(0, 256, (6, 56, 56), dtype=np.uint8)
        row = {"spacing_mm": (3.0, 1.0, 1.0), "occupied": occupied}
        store.put(store.open_store(path), name, voxels, row)
    return store.open_store(path)


def features_on(device, volumes, folder, **settings):
    model, params = cases.ct_clip_model(**settings)
    return cached_features(model, {"vit": cases.move(device, params["vit"])}, volumes, folder)


def test_features_are_those_of_each_volume_alone(volumes, tmp_path):
    features = features_on("cpu", volumes, tmp_path)
    model, params = cases.ct_clip_model()
    for name, (first, stop) in zip(volumes.names, RANGES, strict=True):
        batch = pairs.read_slices(volumes, [name])
        with torch.no_grad():
            z = ct_clip.encode_volumes(model, params["vit"], batch["slices"], batch["mask"])
        expected = np.zeros(features.shape, np.float16)
        expected[first:stop] = z[0].numpy()
        assert np.array_equal(features.read(name), expected)
        assert features.row(name)["volume"] == volumes.content(name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_encodes_several_volumes_at_once(volumes, tmp_path, precision):
    settings = {"train__precision": precision}
    expected = features_on("cpu", volumes, tmp_path / "cpu", **settings)
    with pretended_gpu():
        features = features_on(GPU, volumes, tmp_path / "gpu", **settings)
    # A file of bfloat16 features is not taken for one of float32.
    assert (features.path.name == expected.path.name) == (precision == "float32")
    assert features.settings["encode"]["dtype"] == precision
    assert expected.settings["encode"]["dtype"] == "float32"
    tolerance = 2e-3 if precision == "float32" else 0.05
    for name in volumes.names:
        here, there = expected.read(name).astype(np.float32), features.read(name).astype(np.float32)
        assert np.linalg.norm(there - here) < tolerance * np.linalg.norm(here)
        assert np.array_equal(there == 0, here == 0)


def test_an_error_of_the_writer_ends_the_run_and_the_next_goes_on(volumes, tmp_path, monkeypatch):
    real_put = store.put

    def full(features, name, *rest):
        if name == "v3":
            raise ValueError("no space left")
        real_put(features, name, *rest)

    monkeypatch.setattr(slice_features.store, "put", full)
    with pytest.raises(ValueError, match="no space left"):
        features_on("cpu", volumes, tmp_path)
    monkeypatch.setattr(slice_features.store, "put", real_put)
    assert features_on("cpu", volumes, tmp_path).names == volumes.names
