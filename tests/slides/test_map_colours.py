"""Colours of relevance span four powers of ten, those of slots are told apart."""

import numpy as np

from medvl.slides.map_colours import relevance_colours, relevance_level, slot_colours


def test_levels_span_four_powers_of_ten():
    levels = relevance_level(np.array([1.0, 0.01, 1e-4, 1e-9, 0.0]) * 7)
    np.testing.assert_allclose(levels, [1, 0.5, 0, 0, 0], atol=1e-12)
    np.testing.assert_array_equal(relevance_level(np.zeros(3)), 0)
    assert relevance_colours(levels).shape == (5, 3)
    assert relevance_colours(levels).dtype == np.uint8


def test_slot_colours_are_apart():
    colours = [tuple(colour) for colour in slot_colours(40).tolist()]
    assert len(set(colours[:32])) == 32
    assert colours[0] == (0, 0x72, 0xB2)
    assert colours[32:] == colours[:8]
    gaps = np.linalg.norm(np.array(colours[:32])[:, None] - np.array(colours[:32]), axis=-1)
    assert gaps[~np.eye(32, dtype=bool)].min() > 25
