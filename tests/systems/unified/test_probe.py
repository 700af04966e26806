"""The probe names what drawn heads show, also after they went through few codes or lost their detail."""

import numpy as np
import pytest
from PIL import Image

from medvl.phantoms import anatomy
from medvl.systems.unified.probe import fit_probe, probe

CFG = anatomy.AnatomyConfig(test=96)


@pytest.fixture(scope="module")
def params():
    return fit_probe(heads=320, steps=240)


@pytest.fixture(scope="module")
def test_heads():
    shown, pictures = [], []
    for number in range(CFG.test):
        case = anatomy.draw_case(CFG, "test", number)
        for look, picture in anatomy.draw_pair(CFG, "test", number).items():
            shown.append({"look": look, "side": case["side"], "kind": case["kind"]})
            pictures.append(picture)
    return shown, pictures


def blurred(picture):
    small = Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))


def enlarged(picture):
    return np.asarray(Image.fromarray(picture).resize((256, 256)))


@pytest.mark.parametrize("change", [np.asarray, blurred, enlarged])
def test_it_names_what_is_drawn(params, test_heads, change):
    shown, pictures = test_heads
    told = probe(params, [change(picture) for picture in pictures])
    for fact in ("look", "side", "kind"):
        right = np.mean([a[fact] == b[fact] for a, b in zip(told, shown, strict=True)])
        assert right >= 0.95, fact


def test_a_picture_without_a_head_gets_an_answer_and_an_untrained_probe_is_at_chance(test_heads):
    shown, pictures = test_heads
    untrained = fit_probe(heads=8, steps=0)
    told = probe(untrained, pictures)
    assert np.mean([a == b for a, b in zip(told, shown, strict=True)]) < 0.4
    (nothing,) = probe(untrained, [np.zeros((9, 11, 3), np.uint8)])
    assert nothing.keys() == {"look", "side", "kind"}


def test_it_is_pure_in_its_seed():
    first, again, other = (fit_probe(heads=8, steps=2, seed=seed) for seed in (0, 0, 1))
    assert first["second"].equal(again["second"])
    assert not first["second"].equal(other["second"])
