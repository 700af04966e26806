"""A volume that is written into a store is read back; a scan that became another file is noticed."""

import os

import numpy as np
import pytest

from medvl.base import store
from medvl.ct.preprocess import CtConfig, Volume, settings_of
from medvl.ct.volumes import (
    FIELDS,
    check_sources,
    keeps_sources,
    read_volume,
    reserve_volumes,
    write_volume,
)

CFG = CtConfig(size=(4, 6, 6), spacing_mm=(6.0, 5.0, 5.0))


def _volume(seed=0):
    return Volume(
        name="a",
        voxels=np.random.default_rng(seed).integers(0, 255, CFG.size).astype("u1"),
        axes=settings_of(CFG)["axes"],
        spacing_mm=(6.0, 5.0, 5.0),
        source_spacing_mm=(1.0, 0.5, 0.5),
        source_shape=(30, 64, 64),
        occupied=(1, 4),
        hu_rule="header",
        slope=1.0,
        intercept=-1024.0,
    )


@pytest.fixture
def scans(tmp_path):
    paths = {name: tmp_path / f"{name}.nii" for name in "ab"}
    for name, path in paths.items():
        path.write_text(name)
    return paths


def test_a_volume_comes_back_as_it_was_written(tmp_path, scans):
    path = tmp_path / "s.h5"
    assert reserve_volumes(path, scans, CFG) == set()
    write_volume(store.open_store(path), "a", _volume(), scans["a"])
    assert reserve_volumes(path, [*scans, "c"], CFG) == {"a"}
    volume, want = read_volume(store.open_store(path), "a"), _volume()
    np.testing.assert_array_equal(volume.voxels, want.voxels)
    for key in ("name", "axes", *(name for name, *_ in FIELDS)):
        assert getattr(volume, key) == getattr(want, key)
    with pytest.raises(ValueError, match=r"other settings \(wanted / found\): \$.size"):
        reserve_volumes(path, scans, CtConfig(size=(4, 6, 7), spacing_mm=(6.0, 5.0, 5.0)))


def test_a_scan_that_became_another_file_is_noticed(tmp_path, scans):
    path = tmp_path / "s.h5"
    reserve_volumes(path, scans, CFG)
    write_volume(store.open_store(path), "a", _volume(), scans["a"])
    volumes = store.open_store(path)
    assert keeps_sources(volumes)
    os.utime(scans["a"], (1, 1))  # a copy of the same file
    scans["b"].write_text("its volume is not stored yet")
    check_sources(volumes, scans)
    scans["a"].write_text("x")
    with pytest.raises(ValueError, match=r"1 scans are not the files .*, e\.g\. a; give the new files"):
        check_sources(volumes, scans)
    scans["a"].unlink()
    check_sources(volumes, scans)


def test_a_store_of_an_earlier_version_knows_no_sources(tmp_path, scans):
    path = tmp_path / "s.h5"
    store.create(path, ["a"], CFG.size, CFG.dtype, settings_of(CFG), FIELDS)
    assert not keeps_sources(store.open_store(path))
    write_volume(store.open_store(path), "a", _volume(), scans["a"])
    np.testing.assert_array_equal(read_volume(store.open_store(path), "a").voxels, _volume().voxels)
