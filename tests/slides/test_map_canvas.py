"""Patches become pixels without gaps, and sums over them are those of one patch after another."""

import numpy as np
import pytest

from medvl.slides.map_canvas import blend_colours, place_patches, sum_over_patches


def test_sums_are_those_of_one_patch_after_another():
    rng = np.random.default_rng(0)
    coords = rng.integers(0, 900, (30, 2))
    values = rng.normal(size=30)
    canvas = place_patches("f", 30, coords, 100, level0_size=(1000, 1000), size=200)
    expected = np.zeros((200, 200))
    for (left, upper, right, lower), value in zip(canvas.boxes, values, strict=True):
        expected[upper:lower, left:right] += value
    np.testing.assert_allclose(sum_over_patches(canvas, values), expected, atol=1e-12)


def test_many_small_patches_leave_no_seam():
    side = 700
    coords = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 256
    canvas = place_patches("f", len(coords), coords, 256, level0_size=(side * 256, side * 256), size=512)
    covered = sum_over_patches(canvas, np.ones(len(coords)))
    assert covered.shape == (512, 512)
    assert covered.min() >= 1  # less than a pixel each, and every pixel has one
    for corner in ([210, 210], [255.9 * side, 3]):  # between two pixels' middles, at the edge
        one = place_patches("f", 1, [corner], 256, level0_size=(side * 256, side * 256), size=512)
        assert sum_over_patches(one, np.ones(1)).sum() == 1


def test_colours_are_opaque_where_patches_are():
    canvas = place_patches("f", 1, [[0, 0]], 500, level0_size=(1000, 1000), size=100)
    covered = sum_over_patches(canvas, np.ones(1)) > 0
    overlay = blend_colours(canvas, np.full((100, 100, 3), 100), covered, 0.5)
    assert overlay.dtype == np.uint8
    np.testing.assert_array_equal(overlay[..., 3] == 255, covered)
    np.testing.assert_array_equal(overlay[0, 0, :3], [150, 150, 150])  # half of the grey of tissue


def test_a_grid_without_coordinates_has_no_margin():
    canvas = place_patches("f", 9, None, 256, size=90)
    assert canvas.size == (90, 90)
    assert sum_over_patches(canvas, np.ones(9)).min() == 1
    with pytest.raises(ValueError, match="f: without coords patches have no place"):
        place_patches("f", 9, None, 256, size=90, mpp=0.5)
