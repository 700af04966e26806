"""Scans of RAD-ChestCT: the same volume as a NIfTI of the same voxels, and what is refused."""

import zipfile

import nibabel as nib
import numpy as np
import pytest

from medvl.base.store import open_store
from medvl.ct import ingest, scans
from medvl.ct.preprocess import CtConfig, preprocess_scan

CFG = CtConfig(size=(20, 24, 24), spacing_mm=(3.0, 2.0, 2.0))


@pytest.fixture
def voxels():
    """A body of water in air with a lung of air and one bright voxel off the centre: no two axes are alike."""
    _, y, x = np.mgrid[:50, :40, :60]
    hu = np.full((50, 40, 60), -1000, np.int16)
    hu[((y - 20) / 16) ** 2 + ((x - 30) / 26) ** 2 < 1] = 40
    hu[10:45, 12:28, 8:24] = -850
    hu[6:9, 10:13, 40:44] = 900
    return hu


def _save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_scan_is_read_in_hu_with_its_axes(order, voxels, tmp_path):
    path = _save(tmp_path / "tst00001.npz", ct=np.asarray(voxels, order=order))
    scan = scans.read_scan(path)
    assert (scan.name, scan.header.shape, scan.header.spacing_mm) == (
        "tst00001",
        (60, 40, 50),
        (0.8, 0.8, 0.8),
    )
    assert nib.aff2axcodes(scan.header.affine) == ("L", "P", "I")
    np.testing.assert_array_equal(scan.voxels, voxels.T)
    # The same patient as NIfTI in RAS, which is turned in all three axes.
    turned = np.ascontiguousarray(voxels.T[::-1, ::-1, ::-1])
    affine = np.diag([0.8, 0.8, 0.8, 1.0])
    affine[:3, 3] = -20
    nib.save(nib.Nifti1Image(turned, affine), tmp_path / "same.nii")
    ours, same = preprocess_scan(path, CFG), preprocess_scan(tmp_path / "same.nii", CFG)
    np.testing.assert_array_equal(ours.voxels, same.voxels)
    assert (ours.occupied, ours.hu_rule) == (same.occupied, same.hu_rule)
    assert ours.voxels.max() > 150  # the bright voxels are there; water is 133


def test_a_folder_of_scans_becomes_a_store(voxels, tmp_path):
    for name in ("trn1", "tst2"):
        _save(tmp_path / f"{name}.npz", ct=voxels)
    _save(tmp_path / "val3.npz", ct=voxels.astype(np.float32))
    summary = ingest.preprocess_folder(tmp_path, tmp_path / "s.h5", CFG, progress=False)
    assert open_store(tmp_path / "s.h5").names == ("trn1", "tst2")
    assert list(summary.rejected) == ["val3"]
    assert "found float32 [50, 40, 60]" in summary.rejected["val3"]


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int64", ">i2", "object"])
def test_another_dtype_is_one_sentence(dtype, voxels, tmp_path):
    path = _save(tmp_path / "a.npz", ct=voxels.astype(dtype))
    with pytest.raises(scans.ScanError) as e:
        scans.read_scan(path)
    assert str(e.value) == (
        f"{path}: must hold int16 [z, y, x] in HU under the name ct, as RAD-ChestCT: "
        f"found {np.dtype(dtype)} [50, 40, 60]"
    )


def test_what_is_no_scan_is_refused(voxels, tmp_path):
    whole = _save(tmp_path / "whole.npz", ct=voxels)
    content = whole.read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(content[: len(content) // 2])
    flipped = tmp_path / "flipped.npz"
    flipped.write_bytes(content[:400] + bytes([content[400] ^ 0xFF]) + content[401:])
    empty = tmp_path / "empty.npz"
    empty.write_bytes(b"")
    short = tmp_path / "short.npz"
    with zipfile.ZipFile(whole) as a, zipfile.ZipFile(short, "w") as b:
        b.writestr("ct.npy", a.read("ct.npy")[:-2])
    long = tmp_path / "long.npz"
    with zipfile.ZipFile(whole) as a, zipfile.ZipFile(long, "w") as b:
        b.writestr("ct.npy", a.read("ct.npy") + b"0")
    other = _save(tmp_path / "other.npz", image=voxels)
    flat = _save(tmp_path / "flat.npz", ct=voxels[0])
    for path in (cut, flipped, empty, short, long, other, flat):
        with pytest.raises(scans.ScanError, match=f"{path.name}: must hold int16"):
            scans.read_scan(path)
    with pytest.raises(scans.ScanError, match="cannot be read"):
        scans.read_scan(tmp_path / "none.npz")


def test_a_header_that_asks_for_more_memory_than_any_scan_is_refused_before_it_is_read(voxels, tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("ct.npy", "w") as f:
        np.lib.format.write_array_header_1_0(
            f, {"descr": "<i2", "fortran_order": False, "shape": (1 << 14, 1 << 14, 1 << 14)}
        )
    with pytest.raises(scans.ScanError, match="found int16"):
        scans.read_scan(path)
