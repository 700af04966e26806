"""Volumes must equal a naive implementation of each preset, whatever the axis order of the file."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attrs import evolve

from medvl.ct import preprocess as ct
from medvl.ct.preprocess import CtConfig, preprocess_scan, to_hu
from medvl.ct.scans import ScanError

PRESETS = ("mm", "reference", "ctclip", "merlin")
SMALL = CtConfig(size=(20, 24, 26), spacing_mm=(5.0, 4.0, 3.0), dtype="int16")


def _write(path, voxels, affine, **header):
    image = nib.Nifti1Image(voxels, affine)
    nib.save(image, path)
    if header:
        raw = bytearray(path.read_bytes())
        raw[112:120] = np.array([header["slope"], header["inter"]], "<f4").tobytes()
        path.write_bytes(raw)
    return path


def _drawn(path, shape, spacing, seed=0, low=-1300, high=1500, dtype=np.int16):
    """A smooth drawing with noise, sharp edges and saturated regions, in LPS order as scanners write it."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 1, *(n // 8 + 2 for n in shape)), generator=g)
    v = (
        F.interpolate(coarse, size=shape, mode="trilinear")[0, 0] * (high - low) * 1.6
        + low * 1.6
        + torch.randn(shape, generator=g) * 25
    )
    v[: shape[0] // 3, : shape[1] // 2] = high
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = 120, 130, -400
    return _write(path, v.clamp(low, high).round().numpy().astype(dtype), affine)


def _canonical(path):
    """HU [z, y, x] float32, superior, anterior, right, clipped; and its spacing."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.clip(image.get_fdata(), -1000, 1000).transpose(2, 1, 0).astype(
        np.float32
    ), image.header.get_zooms()[::-1]


def _interpolated(v, new, size):
    """Trilinear to `new`, then centre crop or pad with -1000 to `size`."""
    v = F.interpolate(
        torch.from_numpy(np.ascontiguousarray(v))[None, None], size=new, mode="trilinear", align_corners=False
    )[0, 0].numpy()
    v = v[
        tuple(
            slice(max(0, (n - k) // 2), max(0, (n - k) // 2) + k) for n, k in zip(v.shape, size, strict=True)
        )
    ]
    before = [(k - n) // 2 for n, k in zip(v.shape, size, strict=True)]
    return np.pad(
        v, [(b, k - n - b) for b, n, k in zip(before, v.shape, size, strict=True)], constant_values=-1000
    )


def _naive_reference(path, size=(160, 224, 224)):
    v, _ = _canonical(path)
    scale = min(k / n for k, n in zip(size, v.shape, strict=True))
    v = _interpolated(v, [round(n * scale) for n in v.shape], size)
    return ((v / 1000 + 1) / 2 * 255).clip(0, 255).astype(np.uint8)


def _naive_ctclip(path, size):
    """CT-CLIP data_inference_nii.py: [z, x, y], x growing to the left and y to posterior as in CT-RATE's files; clip before resize."""
    v, spacing = _canonical(path)
    v, spacing = v[:, ::-1, ::-1].transpose(0, 2, 1), (spacing[0], spacing[2], spacing[1])
    return _interpolated(
        v,
        [
            int(n * (round(float(s), 6) / t))
            for n, s, t in zip(v.shape, spacing, (1.5, 0.75, 0.75), strict=True)
        ],
        size,
    )


def _sampled(v, at):
    """Linear samples of v [z, y, x] at source indices `at` (three 1-d arrays), float64, edges repeated."""
    unit = [torch.from_numpy(2 * np.asarray(a) / (n - 1) - 1) for a, n in zip(at, v.shape, strict=True)]
    grid = torch.stack(torch.meshgrid(*unit, indexing="ij")[::-1], -1)[None]
    sampled = F.grid_sample(
        torch.from_numpy(v.astype(np.float64))[None, None], grid, "bilinear", "border", align_corners=True
    )
    return sampled[0, 0].numpy()


def _close(ours, theirs, share=1e-4):
    """At most one grey level, on at most `share` of the voxels."""
    off = np.abs(ours.astype(int) - theirs.astype(int))
    assert ours.shape == theirs.shape
    assert off.max() <= 1
    assert (off > 0).mean() <= share


DRAWN = [
    ((50, 40, 30), (2, 2, 3)),
    ((240, 250, 20), (0.7, 0.7, 5)),
    ((64, 64, 200), (3, 3, 1)),
    ((300, 230, 60), (1, 1, 2)),
    ((224, 224, 160), (1, 1, 1)),
]


@pytest.mark.parametrize(("shape", "spacing"), DRAWN)
def test_reference_equals_naive_on_drawn_scans(tmp_path, shape, spacing):
    path = _drawn(tmp_path / "a.nii", shape, spacing)
    cfg, size = CtConfig(preset="reference", size=(80, 112, 112)), (80, 112, 112)
    _close(preprocess_scan(path, cfg).voxels, _naive_reference(path, size))
    np.testing.assert_array_equal(
        preprocess_scan(path, evolve(cfg, flip=True)).voxels, preprocess_scan(path, cfg).voxels[:, ::-1]
    )


def test_reference_equals_naive_on_real_scans(shared_data):
    for path in sorted((shared_data / "ct/nifti").glob("*.nii.gz")):
        if "_mask" not in path.name and "_seg" not in path.name and "negative" not in path.name:
            _close(preprocess_scan(path, CtConfig(preset="reference")).voxels, _naive_reference(path))


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((50, 60, 30), (0.9, 0.8, 3)), ((90, 100, 70), (0.7, 0.7, 2)), ((40, 40, 90), (2.0, 2, 1))],
)
def test_ctclip_equals_naive(tmp_path, shape, spacing):
    path, size = _drawn(tmp_path / "a.nii", shape, spacing), (72, 90, 80)
    v = preprocess_scan(path, CtConfig(preset="ctclip", size=size, dtype="int16"))
    assert v.axes == "SLP"
    assert np.abs(v.voxels - _naive_ctclip(path, size)).max() <= 0.51


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((50, 60, 30), (2, 2, 2.5)), ((90, 100, 70), (0.7, 0.8, 5)), ((30, 150, 260), (2.0, 1.5, 1))],
)
def test_merlin_equals_a_naive_formula(tmp_path, shape, spacing):
    """MONAI Spacing keeps the first voxel of RAS order in place and clips after; benches/bench_ct.py compares with MONAI itself."""
    path, size = _drawn(tmp_path / "a.nii", shape, spacing), (40, 60, 70)
    v, t = nib.as_closest_canonical(nib.load(path)).get_fdata().transpose(2, 1, 0), (3.0, 1.5, 1.5)
    new = [round((n - 1) * s / k + 1) for n, s, k in zip(v.shape, spacing[::-1], t, strict=True)]
    naive = _sampled(
        v,
        [
            np.minimum(np.arange(m) * k / s, n - 1)
            for m, n, s, k in zip(new, v.shape, spacing[::-1], t, strict=True)
        ],
    )
    pads = [(max(k - n, 0) // 2, max(k - n, 0) - max(k - n, 0) // 2) for n, k in zip(new, size, strict=True)]
    naive = np.pad(naive.clip(-1000, 1000), pads, constant_values=-1000)
    naive = naive[
        tuple(slice(n // 2 - k // 2, n // 2 - k // 2 + k) for n, k in zip(naive.shape, size, strict=True))
    ]
    assert (
        np.abs(
            preprocess_scan(path, CtConfig(preset="merlin", size=size, dtype="int16")).voxels - naive
        ).max()
        <= 0.51
    )


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((50, 60, 30), (2, 2, 2.5)), ((90, 100, 70), (0.7, 0.8, 5)), ((30, 150, 200), (2.0, 1.5, 1))],
)
def test_mm_without_antialias_equals_a_naive_formula(tmp_path, shape, spacing):
    path, cfg = _drawn(tmp_path / "a.nii", shape, spacing), evolve(SMALL, antialias="off")
    v, _ = _canonical(path)
    at = [
        ((np.arange(k) - (k - 1) / 2) * t) / s + (n - 1) / 2
        for k, t, s, n in zip(cfg.size, cfg.spacing_mm, spacing[::-1], v.shape, strict=True)
    ]
    naive = _sampled(v, [a.clip(0, n - 1) for a, n in zip(at, v.shape, strict=True)])
    inside = [(a >= -0.5) & (a <= n - 0.5) for a, n in zip(at, v.shape, strict=True)]
    naive = np.where(inside[0][:, None, None] & inside[1][:, None] & inside[2], naive, -1000)
    ours = preprocess_scan(path, cfg)
    assert np.abs(ours.voxels - naive).max() <= 0.51
    assert ours.occupied == (int(inside[0].argmax()), int(inside[0].argmax() + inside[0].sum()))
    assert (ours.spacing_mm, ours.source_shape) == (cfg.spacing_mm, shape[::-1])
    np.testing.assert_allclose(ours.source_spacing_mm, spacing[::-1], rtol=1e-6)


def test_mm_antialias_equals_torch(tmp_path):
    """Where the grid covers the scan exactly it is F.interpolate(antialias=True), in the plane and along z."""
    path = _drawn(tmp_path / "a.nii", (90, 100, 60), (0.8, 0.7, 2.0))
    v, _ = _canonical(path)
    plane = CtConfig(size=(60, 40, 25), spacing_mm=(2.0, 0.7 * 100 / 40, 0.8 * 90 / 25), dtype="int16")
    theirs = F.interpolate(torch.from_numpy(v)[None], size=(40, 25), mode="bilinear", antialias=True)[0]
    assert np.abs(preprocess_scan(path, plane).voxels - theirs.numpy()).max() <= 0.51
    along = CtConfig(size=(17, 100, 90), spacing_mm=(2.0 * 60 / 17, 0.7, 0.8), dtype="int16")
    theirs = F.interpolate(
        torch.from_numpy(v.transpose(1, 0, 2).copy())[None], size=(17, 90), mode="bilinear", antialias=True
    )[0]
    assert np.abs(preprocess_scan(path, along).voxels - theirs.numpy().transpose(1, 0, 2)).max() <= 0.51


@pytest.mark.parametrize("preset", PRESETS)
def test_all_48_axis_orders_give_the_same_bits(tmp_path, preset):
    path = _drawn(tmp_path / "a.nii", (22, 19, 17), (3.1, 2.7, 4.3))
    image = nib.load(path)
    voxels, affine = np.asanyarray(image.dataobj), image.affine
    cfg = CtConfig(preset=preset, size=(21, 20, 18), spacing_mm=(5.0, 4.0, 3.0) if preset == "mm" else ())
    expected = preprocess_scan(path, cfg)
    for perm, signs in itertools.product(
        itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)
    ):
        ornt = np.array([perm, signs]).T
        moved = nib.orientations.apply_orientation(voxels, ornt)
        order = affine @ nib.orientations.inv_ornt_aff(ornt, voxels.shape)
        v = preprocess_scan(_write(tmp_path / "b.nii", np.asfortranarray(moved), order), cfg)
        np.testing.assert_array_equal(v.voxels, expected.voxels)
        assert (v.axes, v.spacing_mm, v.source_shape, v.occupied) == (
            expected.axes,
            expected.spacing_mm,
            expected.source_shape,
            expected.occupied,
        )


def test_two_reconstructions_of_a_scan_come_out_alike(tmp_path, shared_data):
    """A thin noisy and a thick smooth one; counting voxels instead of mm (`reference`) fails the same bound."""
    image = nib.load(shared_data / "ct/nifti/totalseg_aorta_chest_1p5mm.nii.gz")
    v = torch.from_numpy(np.asanyarray(image.dataobj).astype(np.float32))[None, None]
    thin = F.interpolate(v, size=(240, 252, 328), mode="trilinear")
    thin = thin + torch.randn(thin.shape, generator=torch.Generator().manual_seed(0)) * 25
    paths = []
    for name, recon in (("thin", thin), ("thick", F.adaptive_avg_pool3d(v, (120, 126, 49)))):
        voxels = recon[0, 0].round().numpy().astype(np.int16)
        affine = image.affine @ np.diag([*(np.array(image.shape) / voxels.shape), 1])
        paths.append(_write(tmp_path / f"{name}.nii", voxels, affine))

    def alike(cfg):
        a, b = (preprocess_scan(p, cfg).voxels.astype(np.float32) for p in paths)
        scan = (a > -1000) | (b > -1000)
        return np.corrcoef(a[scan], b[scan])[0, 1], np.abs(a - b)[scan].mean()

    correlation, difference = alike(CtConfig(dtype="int16"))
    assert correlation > 0.99
    assert difference < 30
    plain = alike(CtConfig(dtype="int16", antialias="off"))
    assert plain[1] > 1.2 * difference
    reference = alike(CtConfig(preset="reference", dtype="int16"))
    assert reference[0] < 0.9
    assert reference[1] > 100


def test_uint8_is_the_rounded_int16_and_to_hu_its_inverse(tmp_path):
    path = _drawn(tmp_path / "a.nii", (40, 40, 30), (3, 3, 3))
    for preset in PRESETS:
        cfg = CtConfig(preset=preset, size=(30, 50, 60))
        hu = to_hu(preprocess_scan(path, evolve(cfg, dtype="int16")).voxels)
        grey = preprocess_scan(path, cfg).voxels
        error = to_hu(grey) - hu
        assert error.dtype == np.float32
        low, high = (
            (-2000 / 255 - 0.6, 0.6) if preset == "reference" else (-1000 / 255 - 0.6, 1000 / 255 + 0.6)
        )
        assert low <= error.min() <= error.max() <= high
    np.testing.assert_allclose(to_hu(np.array([0, 51, 255], np.uint8)), [-1000, -600, 1000], atol=1e-3)
    torch.testing.assert_close(
        to_hu(torch.tensor([[0, 255]], dtype=torch.uint8)), torch.tensor([[-1000.0, 1000.0]])
    )
    with pytest.raises(ValueError, match=r"uint8 or int16, got torch.float32"):
        to_hu(torch.zeros(2))


ROW = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "XYSpacing": "[2.0, 3.0]", "ZSpacing": "4.0"}


LPS = np.array([[-3.0, 0, 0, 60], [0, -3.0, 0, 50], [0, 0, 5.0, -400], [0, 0, 0, 1]])


def _chest(shape=(44, 44, 24)):
    """HU of a drawn chest: air, skin fat, soft tissue, two lungs, a spine, and noise of 15 HU."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -995.0)
    hu[(x / 0.9) ** 2 + (y / 0.7) ** 2 < 1] = -100
    hu[(x / 0.8) ** 2 + (y / 0.6) ** 2 < 1] = 40
    hu[((abs(x) - 0.4) / 0.25) ** 2 + (y / 0.4) ** 2 < 1] = -850
    hu[x**2 + (y - 0.45) ** 2 < 0.01] = 500
    return (hu + np.random.default_rng(0).normal(0, 15, shape)).round().astype(np.int16)


def test_a_row_of_another_modality_is_refused(tmp_path):
    path = _write(tmp_path / "a.nii", _chest(), LPS)
    with pytest.raises(ScanError, match=r"Modality 'PT'"):
        preprocess_scan(path, SMALL, ROW | {"Modality": "PT"})
    np.testing.assert_array_equal(
        preprocess_scan(path, SMALL, ROW | {"Modality": "CT"}).voxels, preprocess_scan(path, SMALL).voxels
    )


def test_another_spacing_in_the_metadata_is_taken_with_a_word(tmp_path, caplog):
    nib.save(nib.Nifti1Image(_chest(), LPS), tmp_path / "a.nii")
    row = ROW | {"XYSpacing": "[3.0, 3.0]", "ZSpacing": "2.5"}
    v = preprocess_scan(tmp_path / "a.nii", evolve(SMALL, spacing_from="metadata"), row)
    assert v.source_spacing_mm == (2.5, 3.0, 3.0)
    assert (
        "spacing is (3.0, 3.0, 2.5) mm by its metadata, which is used, and (3.0, 3.0, 5.0) by its header"
        in caplog.text
    )
    caplog.clear()
    preprocess_scan(tmp_path / "a.nii", evolve(SMALL, spacing_from="metadata"), row | {"ZSpacing": "5.01"})
    assert not caplog.text


def test_float_and_wide_scans_equal_int16(tmp_path):
    path = _drawn(tmp_path / "a.nii", (24, 22, 20), (4, 4, 4))
    image = nib.load(path)
    for dtype in ("f4", "f8", "i4", "i8"):
        nib.save(
            nib.Nifti1Image(np.asanyarray(image.dataobj).astype(dtype), image.affine, dtype=dtype),
            tmp_path / "b.nii.gz",
        )
        np.testing.assert_array_equal(
            preprocess_scan(tmp_path / "b.nii.gz", SMALL).voxels, preprocess_scan(path, SMALL).voxels
        )


BLANK = {  # headers that say nothing of where the axes grow to
    "no codes": lambda voxels: nib.Nifti1Image(voxels, None),
    "an identity, as from nibabel": lambda voxels: nib.Nifti1Image(voxels, np.eye(4)),
    "an identity, as from ITK": lambda voxels: nib.Nifti1Image(voxels, np.diag([-1.0, -1.0, 1.0, 1.0])),
}
OF_CT_RATE = ROW | {"ImageOrientationPatient": "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", BLANK)
def test_axes_and_spacing_of_a_blank_header_come_from_metadata(tmp_path, kind, preset):
    """CT-RATE v1: x grows to the left and y to posterior, as every row says; the row's spacing is (between rows, between columns)."""
    good = _drawn(tmp_path / "a.nii", (24, 22, 20), (3, 2, 4))
    nib.save(BLANK[kind](np.asanyarray(nib.load(good).dataobj)), tmp_path / "b.nii")
    cfg = CtConfig(preset=preset, size=(20, 24, 26), dtype="int16")
    v = preprocess_scan(tmp_path / "b.nii", evolve(cfg, spacing_from="metadata"), OF_CT_RATE)
    assert v.source_spacing_mm == ((4.0, 3.0, 2.0) if preset == "ctclip" else (4.0, 2.0, 3.0))
    np.testing.assert_array_equal(v.voxels, preprocess_scan(good, cfg).voxels)
    for row in (None, ROW):
        with pytest.raises(
            ScanError, match=r"the direction of its axes is unknown: .*ImageOrientationPatient"
        ):
            preprocess_scan(
                tmp_path / "b.nii", evolve(cfg, spacing_from="metadata" if row else "header"), row
            )
    if preset != "reference":
        with pytest.raises(ScanError, match=r"has no spacing; set spacing_from='metadata'"):
            preprocess_scan(tmp_path / "b.nii", cfg, OF_CT_RATE)


def _with_forms(path, sform=None, qform=None, pixdim=None, units=None, codes=(2, 1)):
    """A chest whose header holds these affines, each where it is given."""
    image = nib.Nifti1Image(_chest(), LPS if sform is None else sform)
    image.set_qform(qform, codes[1] if qform is not None else 0)
    image.set_sform(sform, codes[0] if sform is not None else 0)
    if pixdim is not None:
        image.header["pixdim"][1:4] = pixdim
    if units is not None:
        image.header["xyzt_units"] = units
    nib.save(image, path)
    return path


def _times(affine, *factors):
    return affine @ np.diag([*factors, 1.0])


def _sheared(degrees):
    affine = LPS.copy()
    affine[1, 2] = 5 * np.tan(np.radians(degrees))
    return affine


REVERSED = _times(LPS, 1, 1, -1)
TURNED = nib.affines.from_matvec(np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])) @ LPS
DOUBTFUL = {  # headers that say two things, and what the one sentence gives of both
    "a tilted gantry": (
        dict(sform=_sheared(18.5)),
        r"sheared: the axes y and z are at 108.5 degrees and must be at 90",
    ),
    "z too long in the sform": (
        dict(sform=_times(LPS, 1, 1, 1.33), qform=LPS),
        r"sform 3 x 3 x 6.65 mm along L-P-S, qform 3 x 3 x 5 mm along L-P-S",
    ),
    "z reversed in the sform": (
        dict(sform=REVERSED, qform=LPS),
        r"along L-P-I, qform 3 x 3 x 5 mm along L-P-S",
    ),
    "another spacing in pixdim": (
        dict(sform=LPS, pixdim=(3, 3, 3.75)),
        r"sform 3 x 3 x 5 mm, pixdim 3 x 3 x 3.75 mm",
    ),
    "micrometres that are mm": (
        dict(sform=LPS, units=3),
        r"voxels of 0.003 x 0.003 x 0.005 mm, .*xyzt_units",
    ),
    "metres that are mm": (dict(qform=LPS, units=1), r"voxels of 3000 x 3000 x 5000 mm"),
    "mm that are micrometres": (
        dict(sform=_times(LPS, 1000, 1000, 1000)),
        r"voxels of 3000 x 3000 x 5000 mm",
    ),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", DOUBTFUL)
def test_a_header_that_contradicts_itself_is_refused_with_both_sides(tmp_path, kind, preset):
    forms, message = DOUBTFUL[kind]
    with pytest.raises(ScanError, match=message):
        preprocess_scan(_with_forms(tmp_path / "a.nii", **forms), CtConfig(preset=preset), OF_CT_RATE)


SAME = {  # headers that say the same, in their way
    "both forms": dict(sform=LPS, qform=LPS),
    "the qform alone": dict(qform=LPS),
    "forms that differ by half a percent": dict(sform=LPS, qform=_times(LPS, 1.005, 1.005, 1.005)),
    "pixdim that was never set": dict(sform=LPS, pixdim=(1, 1, 1)),
    "micrometres": dict(sform=np.diag([1000, 1000, 1000, 1.0]) @ LPS, units=3),
    "metres": dict(qform=np.diag([0.001, 0.001, 0.001, 1.0]) @ LPS, units=1),
    "a shear of half a degree": dict(sform=_sheared(0.5)),
    "oblique": dict(sform=TURNED, qform=TURNED),
}


@pytest.mark.parametrize("kind", SAME)
def test_headers_that_agree_within_one_percent_and_all_units_give_the_same_volume(tmp_path, kind):
    expected = preprocess_scan(_with_forms(tmp_path / "a.nii", sform=LPS), SMALL)
    v = preprocess_scan(_with_forms(tmp_path / "b.nii", **SAME[kind]), SMALL)
    assert np.abs(v.voxels - expected.voxels).mean() < 0.1
    np.testing.assert_allclose(v.source_spacing_mm, expected.source_spacing_mm, rtol=0.006)


def test_forms_at_45_degrees_agree_though_their_closest_axes_differ_by_rounding(tmp_path):
    affine = LPS.copy()
    turn = np.sqrt(0.5) * np.array([[1, -1], [1, 1]])
    affine[1:3, :3] = turn @ affine[1:3, :3]
    v = preprocess_scan(_with_forms(tmp_path / "a.nii", sform=affine, qform=affine), SMALL)
    expected = preprocess_scan(_with_forms(tmp_path / "b.nii", sform=affine), SMALL)
    np.testing.assert_array_equal(v.voxels, expected.voxels)


@pytest.mark.parametrize("preset", PRESETS)
def test_oblique_scans_are_taken_to_their_closest_axes(tmp_path, preset):
    """Not rotated, and put in place by their first voxel (`merlin`) or centre as any other."""
    straight = preprocess_scan(_with_forms(tmp_path / "a.nii", sform=LPS), CtConfig(preset=preset))
    oblique = preprocess_scan(_with_forms(tmp_path / "b.nii", sform=TURNED), CtConfig(preset=preset))
    _close(oblique.voxels, straight.voxels)  # the lengths of turned axes are rounded


def test_antialias_keeps_small_bright_structures(tmp_path):
    voxels = np.full((96, 96, 60), -800, np.int16)
    at = np.random.default_rng(0).integers(8, 50, (60, 3))
    voxels[tuple(at.T)] = 1000
    path = _write(tmp_path / "a.nii", voxels, np.diag([-0.7, -0.7, 1.0, 1.0]))
    cfg = CtConfig(size=(32, 44, 44), spacing_mm=(3.0, 1.75, 1.75), dtype="int16")
    seen = {
        aa: (preprocess_scan(path, evolve(cfg, antialias=aa)).voxels > -780).sum() for aa in ("on", "off")
    }
    assert seen["on"] > 2 * seen["off"]


def test_calls_at_once_give_the_same_and_leave_the_thread_count(tmp_path):
    paths = [_drawn(tmp_path / f"{i}.nii.gz", (40, 40, 30), (3, 3, 3), i) for i in range(4)]
    expected = [preprocess_scan(p, SMALL).voxels for p in paths]
    before = torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        for k, v in enumerate(pool.map(lambda p: preprocess_scan(p, SMALL), paths * 5)):
            np.testing.assert_array_equal(v.voxels, expected[k % 4])
    assert torch.get_num_threads() == before


def test_settings_say_what_the_empty_values_stand_for():
    settings = ct.settings_of(CtConfig())
    assert settings["size"] == [160, 224, 224]
    assert settings["spacing_mm"] == [3.0, 1.75, 1.75]
    assert (settings["antialias"], settings["axes"]) == ("on", "SAR")
    assert settings == ct.settings_of(CtConfig(antialias="on", size=(160, 224, 224)))
