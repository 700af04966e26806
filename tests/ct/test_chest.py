"""What looks like a chest CT, whatever the grid, and what does not."""

from pathlib import Path

import numpy as np
import pytest

from medvl.ct import preprocess
from medvl.ct.chest import doubt_chest
from medvl.ct.preprocess import CtConfig
from medvl.phantoms import chests
from medvl.phantoms.chest_case import PhantomConfig

NIFTI = Path(__file__).resolve().parents[2] / "../shared/data/ct/nifti"
GRIDS = {
    "mm": CtConfig(),
    "coarse": CtConfig(size=(16, 56, 56), spacing_mm=(18.0, 5.0, 5.0)),
    "ctclip": CtConfig(preset="ctclip"),
    "reference": CtConfig(preset="reference", size=(80, 112, 112)),
}


def drawn_body(lung_mm=0.0, one_side=False):
    """A body of water with a table of air around it, and two lungs of this height."""
    z, y, x = np.mgrid[0:40, 0:80, 0:80] * 5.0 - np.array([100, 200, 200])[:, None, None, None]
    hu = np.where((x / 170) ** 2 + (y / 120) ** 2 < 1, 40, -1000)
    in_lung = ((np.abs(x) - 80) / 50) ** 2 + (y / 80) ** 2 < 1
    if one_side:
        in_lung &= x > 0
    hu[in_lung & (np.abs(z) < lung_mm / 2)] = -850
    return preprocess.Volume(
        name="x",
        voxels=hu.astype(np.int16),
        axes="SAR",
        spacing_mm=(5.0, 5.0, 5.0),
        source_spacing_mm=(5.0, 5.0, 5.0),
        source_shape=hu.shape,
        occupied=(0, 40),
        hu_rule="none",
        slope=1.0,
        intercept=0.0,
    )


def test_two_lungs_of_some_height_are_a_chest():
    assert doubt_chest(drawn_body(150)) == ""
    assert "0 ml of lung, over 0 and 0 mm of height on the two sides" in doubt_chest(drawn_body())
    assert "over 75 and 75 mm" in doubt_chest(drawn_body(80))
    assert "over 0 and 145 mm" in doubt_chest(drawn_body(150, one_side=True))


@pytest.mark.parametrize("grid", GRIDS)
def test_phantoms_are_chests(grid, tmp_path):
    chests.draw_chests(PhantomConfig(patients=3, seed=0, columns=(64, 64), slices=(28, 28)), tmp_path)
    for path in (tmp_path / "train").iterdir():
        assert doubt_chest(preprocess.preprocess_scan(path, GRIDS[grid])) == ""


@pytest.mark.skipif(not NIFTI.exists(), reason="needs shared/data")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("name", "is_chest"),
    [
        ("cip_chest64", True),
        ("totalseg_aorta_chest_1p5mm", True),  # crops: the lungs reach their sides
        ("totalseg_pulm_chest_1p5mm", True),
        ("totalseg_abdomen_3mm", False),
        ("totalseg_abdomen_3mm_sm", False),
        ("ibsi_STS_003", False),  # a limb
        ("ibsi_STS_042", False),
    ],
)
def test_real_scans(name, is_chest, grid):
    doubt = doubt_chest(preprocess.preprocess_scan(NIFTI / f"{name}.nii.gz", GRIDS[grid]))
    assert (doubt == "") == is_chest, doubt
