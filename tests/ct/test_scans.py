"""Scans read here must hold the voxels, the affine and the scale that nibabel reads."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest

from medvl.ct.scans import ScanError, open_scan, read_scan

AFFINE = np.array([[-0.7, 0.1, 0, 20], [0, -0.6, 0.2, 30], [0, 0.3, 2.5, -400], [0, 0, 0, 1.0]])
DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def _drawn(dtype, shape=(7, 6, 5)):
    drawn = np.random.default_rng(0).uniform(-100, 100, shape)
    return (np.abs(drawn) if dtype[0] == "u" else drawn).astype(dtype)


def _same_as_nibabel(path):
    scan, image = read_scan(path), nib.load(path)
    theirs = np.asanyarray(image.dataobj.get_unscaled())
    assert scan.voxels.shape == theirs.shape[:3]
    np.testing.assert_array_equal(scan.voxels, theirs.reshape(scan.voxels.shape))
    np.testing.assert_array_equal(scan.header.affine, image.affine)
    np.testing.assert_allclose(scan.header.spacing_mm, nib.affines.voxel_sizes(image.affine), rtol=1e-15)
    assert (scan.header.slope, scan.header.intercept) == (image.dataobj.slope, image.dataobj.inter)
    assert scan.voxels.dtype == theirs.dtype.newbyteorder("=")
    assert scan.voxels.dtype.isnative
    assert scan.voxels.flags.f_contiguous
    with open_scan(path) as (header, _):
        assert header.affine.tolist() == scan.header.affine.tolist()
    return scan


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scalar_type_equals_nibabel(tmp_path, dtype, kind, suffix):
    path = tmp_path / f"a.b{suffix}"
    nib.save(kind(_drawn(dtype), AFFINE, dtype=dtype), path)
    assert _same_as_nibabel(path).name == "a.b"


@pytest.mark.parametrize("header", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("dtype", ["i2", "f4", "u1"])
def test_big_endian_equals_nibabel(tmp_path, dtype, header):
    kind = nib.Nifti1Image if header is nib.Nifti1Header else nib.Nifti2Image
    big = header(endianness=">")
    big.set_data_dtype(np.dtype(dtype).newbyteorder(">"))
    nib.save(kind(_drawn(dtype), AFFINE, big), tmp_path / "a.nii.gz")
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[:2] == b"\0\0"
    _same_as_nibabel(tmp_path / "a.nii.gz")


def test_real_scans_equal_nibabel(shared_data):
    for path in sorted((shared_data / "ct/nifti").glob("*.nii.gz")):
        _same_as_nibabel(path)


@pytest.mark.parametrize(("qcode", "scode"), [(1, 0), (0, 2), (1, 2), (0, 0)])
def test_affine_follows_nibabels_rule(tmp_path, qcode, scode):
    image = nib.Nifti1Image(_drawn("i2"), AFFINE)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    image.set_qform(nib.affines.from_matvec(rotation @ np.diag([0.7, 0.8, 2.0]), [1, 2, 3]), qcode)
    image.set_sform(AFFINE, scode)
    nib.save(image, tmp_path / "a.nii")
    assert _same_as_nibabel(tmp_path / "a.nii").header.placed == bool(qcode or scode)


@pytest.mark.parametrize(
    ("slope", "inter", "scaled"),
    [(2.0, -1024.0, True), (1.0, 0.0, True), (0.0, 5.0, False), (np.nan, np.nan, False)],
)
def test_scale_of_the_header(tmp_path, slope, inter, scaled):
    image = nib.Nifti1Image(_drawn("i2"), AFFINE)
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([slope, inter], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    assert _same_as_nibabel(tmp_path / "a.nii").header.scaled is scaled


def test_trailing_axes_of_one_and_extensions(tmp_path):
    image = nib.Nifti1Image(_drawn("i2", (7, 6, 5, 1, 1)), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))
    nib.save(image, tmp_path / "a.nii.gz")
    assert _same_as_nibabel(tmp_path / "a.nii.gz").voxels.shape == (7, 6, 5)


def test_gzip_of_several_members_and_zero_padding(tmp_path):
    nib.save(nib.Nifti1Image(_drawn("i2", (64, 64, 40)), AFFINE), tmp_path / "a.nii")
    raw = (tmp_path / "a.nii").read_bytes()
    cuts = [0, 100, 353, 90000, 90001, len(raw)]
    members = b"".join(gzip.compress(raw[a:b]) for a, b in itertools.pairwise(cuts))
    (tmp_path / "b.nii.gz").write_bytes(members + b"\0" * 1000)
    np.testing.assert_array_equal(
        read_scan(tmp_path / "b.nii.gz").voxels, read_scan(tmp_path / "a.nii").voxels
    )


def test_header_needs_only_the_first_kilobytes(tmp_path):
    rng = np.random.default_rng(0)
    nib.save(
        nib.Nifti1Image(rng.integers(-1000, 1000, (128, 128, 40), np.int16), AFFINE), tmp_path / "a.nii.gz"
    )
    whole = tmp_path / "a.nii.gz"
    damaged = tmp_path / "b.nii.gz"
    raw = bytearray(whole.read_bytes())
    raw[-200000:] = bytes(200000)
    damaged.write_bytes(raw)
    with open_scan(whole) as (expected, _), open_scan(damaged) as (header, _):
        assert header.affine.tolist() == expected.affine.tolist()
    with pytest.raises(ScanError, match=r"damaged|truncated"):
        read_scan(damaged)
