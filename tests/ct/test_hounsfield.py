"""Scans come to HU whatever scale they were saved with, and what is no CT is refused."""

import nibabel as nib
import numpy as np
import pytest
from attrs import evolve
from scipy import ndimage

from medvl.ct.hounsfield import STORED, Scale, check_scale, choose_scale, compose_scales
from medvl.ct.preprocess import preprocess_scan
from medvl.ct.scans import ScanError
from tests.ct.test_preprocess import LPS, ROW, SMALL, _chest, _drawn, _write

RAW = Scale(rule="metadata", intercept=-1024.0)


def test_scales_compose_in_order():
    header, row = (
        Scale(rule="header", slope=2.0, intercept=10.0),
        Scale(rule="metadata", slope=3.0, intercept=-5.0),
    )
    both = compose_scales(header, row)
    values = np.array([-3.0, 0.0, 7.5])
    np.testing.assert_allclose(both.apply(values), row.apply(header.apply(values)))
    assert both.rule == "header+metadata"
    assert compose_scales(STORED, row) == row
    assert str(both) == "6 * stored + 25"


def test_values_decide_which_scale_is_chosen():
    hu = _chest()
    raw = hu + 1024
    assert choose_scale(hu) == STORED
    assert choose_scale(hu, row=RAW) == STORED
    assert choose_scale(raw, row=RAW) == RAW
    header = Scale(rule="header", intercept=-1024.0)
    assert choose_scale(raw, header) == header
    assert choose_scale(raw, header, RAW) == header
    identity = Scale(rule="header")  # a header that scales nothing says nothing
    assert choose_scale(raw, identity, RAW) == RAW
    half = Scale(rule="header", slope=0.5)
    assert choose_scale(2 * raw, half, RAW) == compose_scales(half, RAW)
    with pytest.raises(ValueError, match=r"stored values start at .* they are raw"):
        choose_scale(raw)
    with pytest.raises(ValueError, match=r"the metadata's scale .* was applied before, or is another scan's"):
        choose_scale(raw, row=Scale(rule="metadata", intercept=-8192.0))
    with pytest.raises(
        ValueError, match=r"the metadata's scale .* and 0% air or lung: perhaps it is not a CT"
    ):
        choose_scale(raw, row=Scale(rule="metadata", slope=0.01))


def test_a_chosen_scale_that_makes_less_tissue_is_refused():
    hu = _chest()
    assert check_scale(hu, Scale(rule="none")) == Scale(rule="none")
    assert check_scale(hu + 1024, RAW) == RAW
    with pytest.raises(ValueError, match=r"the metadata's scale .* was applied before"):
        check_scale(hu, RAW)


RULES = [  # hu, lowest stored HU + offset, header scale, row, rule
    ("auto", 0, None, None, "stored"),
    ("auto", 0, None, ROW, "stored"),
    ("auto", 0, (1, 0), ROW, "stored"),
    ("auto", 1024, (1, -1024), None, "header"),
    ("auto", 1024, (1, -1024), ROW, "header"),
    ("auto", 1024, None, ROW, "metadata"),
    ("auto", 8192, (1, 0), {**ROW, "RescaleIntercept": "-8192.0"}, "metadata"),
    ("header", 1024, (1, -1024), ROW, "header"),
    ("header", 0, (1, 0), None, "header"),
    ("metadata", 1024, None, ROW, "metadata"),
    ("none", 0, (1, -1024), ROW, "none"),
]


@pytest.mark.parametrize(("hu", "offset", "scale", "row", "rule"), RULES)
def test_every_way_to_hu_gives_the_same_volume(tmp_path, hu, offset, scale, row, rule):
    path = _drawn(tmp_path / "a.nii", (20, 20, 20), (4, 4, 4), low=-1000)
    expected = preprocess_scan(path, SMALL).voxels
    image = nib.load(path)
    header = {"slope": scale[0], "inter": scale[1]} if scale else {}
    _write(tmp_path / "b.nii", np.asanyarray(image.dataobj) + np.int16(offset), image.affine, **header)
    v = preprocess_scan(tmp_path / "b.nii", evolve(SMALL, hu=hu), row)
    assert v.hu_rule == rule
    np.testing.assert_array_equal(v.voxels, expected)
    assert v.intercept == -offset


def test_padding_outside_the_field_of_view_does_not_pass_for_hu(tmp_path):
    """Raw values from 0 up with -2000 in the corners are raw, not HU."""
    voxels = np.random.default_rng(0).integers(0, 2000, (20, 20, 20)).astype(np.int16)
    voxels[0] = -2000
    path = _write(tmp_path / "a.nii", voxels, np.diag([-4, -4, 4, 1.0]))
    assert preprocess_scan(path, SMALL, ROW).hu_rule == "metadata"
    with pytest.raises(ScanError, match="they are raw"):
        preprocess_scan(path, SMALL)
    assert (
        preprocess_scan(
            _write(tmp_path / "b.nii", voxels - np.int16(1024), np.diag([-4, -4, 4, 1.0])), SMALL, ROW
        ).hu_rule
        == "stored"
    )


def test_raw_values_padded_with_zeros_keep_their_scale(tmp_path):
    """Intercept -8192 (some Siemens): air is stored as 7192, the corners outside the field of view as 0."""
    path = _drawn(tmp_path / "a.nii", (30, 30, 20), (4, 4, 4), low=-1000, high=400)
    image = nib.load(path)
    raw = np.asanyarray(image.dataobj) + np.int16(8192)
    raw[:6] = 0
    v = preprocess_scan(
        _write(tmp_path / "b.nii", raw, image.affine), SMALL, ROW | {"RescaleIntercept": "-8192"}
    )
    hu = np.where(raw == 0, -1000, np.asanyarray(image.dataobj)).astype(np.int16)
    np.testing.assert_array_equal(
        v.voxels, preprocess_scan(_write(tmp_path / "c.nii", hu, image.affine), SMALL).voxels
    )


def _as_int16(path, voxels, affine):
    """Floats saved as nibabel saves them in int16: with a slope and an intercept that hold their range."""
    image = nib.Nifti1Image(voxels.astype(np.float32), affine)
    image.set_data_dtype(np.int16)
    nib.save(image, path)
    return path


def _mr(shape=(44, 44, 24)):
    """Bright in the body, noise around 0 outside, where filters leave some negative values."""
    return np.where(_chest(shape) > -300, 450.0, 5.0) + np.random.default_rng(1).normal(0, 12, shape)


NOT_CT = {  # what is saved, from a chest in HU and an MR
    "an MR": lambda hu, mr: mr,
    "an MR without negative values": lambda hu, mr: mr.clip(0),
    "an MR of mean 0 and variance 1": lambda hu, mr: (mr - mr.mean()) / mr.std(),
    "a PET in SUV": lambda hu, mr: mr.clip(0) / 100,
    "labels": lambda hu, mr: (hu > -200) * 3 + (hu > 100),
    "a CT without air and lungs": lambda hu, mr: hu.clip(0, 563),
    "HU in thousandths": lambda hu, mr: hu / 1000,
}


@pytest.mark.parametrize("row", [None, ROW, ROW | {"RescaleIntercept": "-10"}])
@pytest.mark.parametrize("kind", NOT_CT)
def test_what_is_perhaps_not_a_ct_is_refused_whatever_its_header_scales(tmp_path, kind, row):
    voxels = NOT_CT[kind](_chest(), _mr())
    scaled = _as_int16(tmp_path / "scaled.nii", voxels, LPS)
    plain = tmp_path / "plain.nii"
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), LPS), plain)
    assert nib.load(scaled).dataobj.slope != 1
    for path in (scaled, plain):
        with pytest.raises(ScanError, match=r"not a CT|is it a CT|was applied before"):
            preprocess_scan(path, SMALL, row)


@pytest.mark.parametrize("row", [None, ROW])
def test_floats_saved_as_int16_are_the_values_they_stand_for(tmp_path, row):
    """HU are taken as they are. Raw values take the metadata's scale on top of the header's, and are refused without."""
    hu = _chest()
    nib.save(nib.Nifti1Image(hu, LPS), tmp_path / "hu.nii")
    expected = preprocess_scan(tmp_path / "hu.nii", SMALL, row)
    v = preprocess_scan(_as_int16(tmp_path / "a.nii", hu, LPS), SMALL, row)
    assert v.hu_rule == "header"
    assert np.abs(v.voxels - expected.voxels).max() <= 1
    raw = _as_int16(tmp_path / "b.nii", hu + 1024.0, LPS)
    if row is None:
        with pytest.raises(ScanError, match=r"values under the header's scale .* start at .* they are raw"):
            preprocess_scan(raw, SMALL)
        return
    v = preprocess_scan(raw, SMALL, row)
    assert v.hu_rule == "header+metadata"
    assert np.abs(v.voxels - expected.voxels).max() <= 1


def test_a_scale_that_is_chosen_is_held_against_the_values(tmp_path):
    """Floats saved as integers stay what they stand for with hu='metadata'; hu='none' does not read the integers as HU."""
    nib.save(nib.Nifti1Image(_chest(), LPS), tmp_path / "hu.nii")
    expected = preprocess_scan(tmp_path / "hu.nii", SMALL)
    raw = _as_int16(tmp_path / "raw.nii", _chest() + 1024.0, LPS)
    v = preprocess_scan(raw, evolve(SMALL, hu="metadata"), ROW)
    assert v.hu_rule == "header+metadata"
    assert np.abs(v.voxels - expected.voxels).max() <= 1
    hu = _as_int16(tmp_path / "a.nii", _chest(), LPS)
    with pytest.raises(
        ScanError, match=r"hu='none' leaves out the header's scale .*: with it 9\d% .*set hu='header'"
    ):
        preprocess_scan(hu, evolve(SMALL, hu="none"))
    with pytest.raises(ScanError, match=r"hu='metadata' needs a metadata row"):
        preprocess_scan(hu, evolve(SMALL, hu="metadata"))
    header = _write(tmp_path / "b.nii", _chest() + np.int16(1024), LPS, slope=1, inter=-1024)
    assert preprocess_scan(header, evolve(SMALL, hu="metadata"), ROW).hu_rule == "metadata"


@pytest.mark.parametrize("intercept", [-1024, -8192])
def test_a_header_that_scales_hu_again_is_refused(tmp_path, intercept):
    hu = _chest()
    body = np.where(hu < -300, np.int16(-1000), hu)  # air and lungs made one value
    for voxels in (hu, body):
        path = _write(tmp_path / "a.nii", voxels, LPS, slope=1, inter=intercept)
        for row in (None, ROW):
            with pytest.raises(ScanError, match=r"the header's scale 1 \* stored \+ -\d+ was applied before"):
                preprocess_scan(path, SMALL, row)
        assert preprocess_scan(path, evolve(SMALL, hu="none")).hu_rule == "none"


def _strays(raw):
    raw = raw.copy()
    raw.reshape(-1)[:: raw.size // 8] = -500
    return raw


def _padded(raw):
    """A round field of view in a square: the corners are padding."""
    raw, n = raw.copy(), raw.shape[0]
    at = np.arange(n) - (n - 1) / 2
    raw[at[:, None] ** 2 + at**2 > (n / 2) ** 2] = -1024
    return raw


def _blank_ends(raw):
    raw = raw.copy()
    raw[..., :3], raw[..., -3:] = -1024, -1024
    return raw


@pytest.mark.parametrize("change", [_strays, _padded, _blank_ends, lambda raw: _strays(_padded(raw))])
def test_few_voxels_and_padding_do_not_decide(tmp_path, change):
    """Raw values with eight strays of -500, with -1024 outside the field of view, or slices of it first and last, are raw."""
    hu = _chest()
    raw = change(hu + np.int16(1024))
    path = _write(tmp_path / "raw.nii", raw, LPS)
    with pytest.raises(ScanError, match="they are raw"):
        preprocess_scan(path, SMALL)
    v = preprocess_scan(path, SMALL, ROW)
    assert (v.hu_rule, v.intercept) == ("metadata", -1024.0)
    nib.save(nib.Nifti1Image((raw - np.int16(1024)).clip(-1024), LPS), tmp_path / "hu.nii")
    expected = preprocess_scan(tmp_path / "hu.nii", SMALL, ROW)
    assert expected.hu_rule == "stored"
    assert np.abs(v.voxels - expected.voxels).max() <= 1
    np.testing.assert_array_equal(preprocess_scan(tmp_path / "hu.nii", SMALL).voxels, expected.voxels)


def test_real_scans_in_hu_are_taken_so_with_any_row(shared_data):
    """CT-RATE's fixed files are HU and their rows still list the raw scale."""
    for path in sorted((shared_data / "ct/nifti").glob("*.nii.gz")):
        if "_mask" in path.name or "_seg" in path.name or "negative" in path.name:
            continue
        for intercept in ("-1024", "-8192", "0"):
            assert preprocess_scan(path, SMALL, ROW | {"RescaleIntercept": intercept}).hu_rule == "stored"


def _head(fov_mm, skull_mm):
    """A head [x, y, z] in HU: brain, a skull of two layers of cortical bone, scalp with fat, an air-filled sinus; blurred, with noise."""
    z, y, x = np.mgrid[-1:1:24j, -1:1:96j, -1:1:96j] * np.array([1, fov_mm / 2, fov_mm / 2]).reshape(
        3, 1, 1, 1
    )
    depth_mm = 80 * (1 - np.sqrt((x / 75) ** 2 + (y / 92) ** 2 + (z / 2.2) ** 2))
    skull = depth_mm - 5
    hu = np.select([depth_mm < 0, skull < 0, skull < skull_mm], [-1000, -60, 1300], 33).astype(float)
    hu[(skull > skull_mm / 4) & (skull < skull_mm * 3 / 4)] = 700
    hu[(np.abs(x) < 12) & (np.abs(y - 60) < 15) & (z < 0)] = -1000
    hu = ndimage.gaussian_filter(hu, (0.3, 0.6, 0.6)) + np.random.default_rng(0).normal(0, 8, hu.shape)
    return hu.transpose(2, 1, 0)


AIR = {  # how the air around a patient comes out
    "with noise": lambda hu: hu,
    "cut off": lambda hu: hu.clip(-1000),
    "cut off at -1024": lambda hu: np.where(hu < -900, -1024, hu),
    "masked": lambda hu: np.where(hu < -300, -1000, hu),
}


@pytest.mark.parametrize("air", AIR)
@pytest.mark.parametrize(("fov_mm", "skull_mm"), [(250, 5), (250, 8), (200, 7), (150, 10)])
def test_a_head_in_hu_is_taken_so_with_any_row(tmp_path, fov_mm, skull_mm, air):
    """Much bone and air of one value: no padding of raw values, whose soft tissue is as dense as bone."""
    hu = AIR[air](_head(fov_mm, skull_mm)).round().astype(np.int16)
    affine = np.diag([-fov_mm / 96, -fov_mm / 96, 6.0, 1.0])
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "hu.nii")
    nib.save(nib.Nifti1Image(hu + np.int16(1024), affine), tmp_path / "raw.nii")
    for row in (None, ROW, ROW | {"RescaleIntercept": "-1000"}, ROW | {"RescaleIntercept": "-8192"}):
        assert preprocess_scan(tmp_path / "hu.nii", SMALL, row).hu_rule == "stored"
    assert preprocess_scan(tmp_path / "raw.nii", SMALL, ROW).hu_rule == "metadata"


@pytest.mark.parametrize("blur", [0, 1])
def test_a_raw_head_with_padding_is_raw(tmp_path, blur):
    raw = _head(250, 8) + 1024
    x, y = np.mgrid[-1:1:96j, -1:1:96j]
    raw[x**2 + y**2 > 1] = -1024
    raw = ndimage.gaussian_filter(raw, (blur, blur, 0)).round().astype(np.int16)
    nib.save(nib.Nifti1Image(raw, np.diag([-2.6, -2.6, 6.0, 1.0])), tmp_path / "raw.nii")
    assert preprocess_scan(tmp_path / "raw.nii", SMALL, ROW).hu_rule == "metadata"
    with pytest.raises(ScanError, match="they are raw"):
        preprocess_scan(tmp_path / "raw.nii", SMALL)
