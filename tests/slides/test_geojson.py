"""Shapes of patches are what QuPath reads, in the classes of the picture."""

import json

import numpy as np
import pytest

from medvl.slides.geojson import to_geojson
from tests.slides.test_maps import _slide


def test_geojson_is_what_qupath_reads():
    coords = np.stack([np.arange(200) * 64, np.full(200, 32)], 1)
    r = 10 ** np.random.default_rng(0).uniform(-5, 1, size=200)
    r[:9] *= -1
    shapes = json.loads(json.dumps(to_geojson(r, coords, 64), allow_nan=False))
    assert set(shapes) == {"type", "features"}
    assert shapes["type"] == "FeatureCollection"
    assert len(shapes["features"]) == 200
    for j, f in enumerate(shapes["features"]):
        assert (f["type"], f["geometry"]["type"], f["properties"]["objectType"]) == (
            "Feature",
            "Polygon",
            "detection",
        )
        x = 64 * j
        assert f["geometry"]["coordinates"] == [[[x, 32], [x + 64, 32], [x + 64, 96], [x, 96], [x, 32]]]
        rank = 1 + (r > r[j]).sum()
        measured = {"Relevance": r[j], "Relevance percentile": 1 - (rank - 1) / 200, "Relevance rank": rank}
        assert f["properties"]["measurements"] == pytest.approx(measured)
        kind = f["properties"]["classification"]
        share = r[j] / r.max()
        assert kind["name"] == f"Relevance {_class(share)} of the highest"
        assert all(isinstance(c, int) and 0 <= c <= 255 for c in kind["color"])
        assert len(kind["color"]) == 3
    assert len({tuple(f["properties"]["classification"]["color"]) for f in shapes["features"]}) == 4


def _class(share):
    return next((f"over 1/{n}" for n in (10, 100, 1000) if share >= 1 / n), "under 1/1000")


@pytest.mark.parametrize("holders", [0, 1])
def test_patches_that_hold_nothing_are_in_no_upper_class(holders):
    """By rank, half of those without any relevance would be an upper half."""
    r = np.zeros(50)
    r[7 : 7 + holders] = 2.0
    shapes = to_geojson(r, np.stack([np.arange(50) * 64] * 2, 1), 64)["features"]
    kinds = [f["properties"]["classification"]["name"] for f in shapes]
    assert kinds.count("Relevance under 1/1000 of the highest") == 50 - holders
    assert holders == 0 or kinds[7] == "Relevance over 1/10 of the highest"


def test_geojson_where_qupath_crops_the_slide():
    coords, r = _slide()
    moved = to_geojson(r, coords + np.array([12288, 2048]), 10, offset=(12288, 2048))
    assert moved == to_geojson(r, coords, 10)
    with pytest.raises(
        ValueError,
        match=r"offset must be the slide's \(bounds-x, bounds-y\), got \(12288, 2048\); a patch at \[",
    ):
        to_geojson(r, coords, 10, offset=(12288, 2048))


def test_geojson_of_the_top_patches():
    coords, r = _slide()
    top = to_geojson(r, coords, 10.5, top=4, classes=[("hot", 0.0)])["features"]
    assert [f["properties"]["measurements"]["Relevance rank"] for f in top] == [1, 2, 3, 4]
    assert top[0]["geometry"]["coordinates"][0][2] == [
        coords[r.argmax()][0] + 10.5,
        coords[r.argmax()][1] + 10.5,
    ]
    assert {f["properties"]["classification"]["name"] for f in top} == {"hot"}
    with pytest.raises(ValueError, match="needs coords"):
        to_geojson(r, None, 10)
    with pytest.raises(ValueError, match="top >= 1 or None, got 10 and 0"):
        to_geojson(r, coords, 10, top=0)
    for classes in ([], [("a", 0.1)], [("a", 0.0), ("b", 0.0)], [("a", 0.0), ("b", 1.0)]):
        with pytest.raises(ValueError, match="rising from 0 to below 1"):
            to_geojson(r, coords, 10, classes=classes)
