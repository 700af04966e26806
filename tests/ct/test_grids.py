"""An axis is a matrix and `resample` the product with three of them; each kind of axis equals its formula in torch or numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medvl.ct import grids
from medvl.ct.grids import anchored, centred, resample, stretched


def _matrix(axis, n):
    """[i, n] float64: what the taps and weights say."""
    m = np.zeros((len(axis.taps), n))
    np.add.at(m, (np.arange(len(m))[:, None], axis.taps), axis.weights)
    return m


def _line(n):
    return torch.rand((1, 1, n), generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize(("n", "new"), [(40, 17), (40, 40), (23, 61), (5, 1)])
def test_stretched_is_interpolate_and_then_the_centre(n, new):
    line = _line(n)
    theirs = F.interpolate(line, size=new, mode="linear", align_corners=False)[0, 0].numpy()
    whole = stretched(n, 2.0, new, new)
    np.testing.assert_allclose(_matrix(whole, n) @ line[0, 0].numpy(), theirs, atol=1e-5)
    assert (whole.first, whole.stop, whole.spacing_mm) == (0, new, 2.0 * n / new)
    padded = stretched(n, 2.0, new + 7, new)
    assert (padded.first, padded.stop) == (3, 3 + new)
    np.testing.assert_array_equal(padded.taps, whole.taps)
    if new > 4:
        cropped = stretched(n, 2.0, new - 3, new)
        assert (cropped.first, cropped.stop) == (0, new - 3)
        np.testing.assert_array_equal(cropped.taps, whole.taps[1 : new - 2])


@pytest.mark.parametrize(("n", "size"), [(60, 17), (60, 60), (40, 33)])
def test_centred_with_antialias_is_interpolate_with_it(n, size):
    line = _line(n)
    theirs = F.interpolate(line[None], size=(1, size), mode="bilinear", antialias=True)[0, 0, 0].numpy()
    axis = centred(n, 0.7, size, 0.7 * n / size, antialias=True)
    assert (axis.first, axis.stop) == (0, size)
    np.testing.assert_allclose(_matrix(axis, n) @ line[0, 0].numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "spacing", "size", "target"), [(30, 2.0, 50, 1.5), (30, 1.0, 7, 2.5), (9, 5.0, 40, 1.0)]
)
def test_centred_reads_where_both_centres_meet(n, spacing, size, target):
    """The place in mm, interpolated, is the place of the output voxel; edge voxels reach half a voxel further and are held."""
    axis = centred(n, spacing, size, target, antialias=False)
    mm = (np.arange(size) - (size - 1) / 2) * target
    inside = np.abs(mm) <= n * spacing / 2
    assert (axis.first, axis.stop) == (int(inside.argmax()), int(inside.argmax() + inside.sum()))
    source_mm = (np.arange(n) - (n - 1) / 2) * spacing
    np.testing.assert_allclose(
        _matrix(axis, n) @ source_mm, mm[inside].clip(source_mm[0], source_mm[-1]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("n", "spacing", "size", "target"), [(30, 2.0, 50, 1.5), (61, 1.0, 10, 1.5), (12, 3.0, 13, 2.9)]
)
def test_anchored_starts_at_the_first_voxel(n, spacing, size, target):
    axis = anchored(n, spacing, size, target)
    new = round((n - 1) * spacing / target + 1)
    crop = max(new, size) // 2 - size // 2
    mm = (np.arange(new) * target)[crop : crop + size]
    assert (axis.first, axis.stop) == (max(size - new, 0) // 2, max(size - new, 0) // 2 + len(mm))
    np.testing.assert_allclose(
        _matrix(axis, n) @ (np.arange(n) * spacing), mm.clip(0, (n - 1) * spacing), atol=1e-4
    )


def _axes():
    return [centred(20, 1.0, 8, 2.7, antialias=True), stretched(14, 1.0, 9, 17), anchored(16, 2.0, 30, 1.5)]


def test_resample_is_the_product_with_three_matrices():
    v = np.random.default_rng(0).integers(-1000, 1000, (20, 14, 16)).astype(np.int16)
    given, axes = v.copy(), _axes()
    out = np.full([len(a.taps) for a in axes], np.nan, np.float32)
    resample(axes, iter(given), lambda plane: plane.mul_(0.5).add_(3), lambda plane: plane.neg_(), out)
    m = [_matrix(a, n) for a, n in zip(axes, v.shape, strict=True)]
    np.testing.assert_allclose(out, -np.einsum("zyx,Zz,Yy,Xx->ZYX", v * 0.5 + 3, *m), atol=1e-3)
    np.testing.assert_array_equal(given, v)
    again = np.empty_like(out)
    turned = [a.flipped(n) for a, n in zip(axes, v.shape, strict=True)]
    resample(
        turned, v[::-1, ::-1, ::-1], lambda plane: plane.mul_(0.5).add_(3), lambda plane: plane.neg_(), again
    )
    np.testing.assert_array_equal(again, out)


def test_resample_asks_for_no_plane_that_no_output_needs():
    axes = [centred(30, 1.0, 3, 1.0, antialias=False), *_axes()[1:]]
    v, seen = np.zeros((30, 14, 16), np.float32), []
    resample(
        axes,
        v,
        lambda plane: seen.append(1) or plane,
        lambda plane: plane,
        np.empty([len(a.taps) for a in axes], np.float32),
    )
    assert len(seen) == 4  # the centre of an even number of voxels lies between two


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(
        ValueError, match=r"is smaller than one output voxel: 2 voxels of 0.1 mm against 3 mm"
    ):
        centred(2, 0.1, 8, 3.0, antialias=True)
    axes, v = _axes(), np.zeros((20, 14, 16), np.float32)
    out = np.empty([len(a.taps) for a in axes], np.float32)
    with pytest.raises(
        ValueError, match=r"resample: target must be \(.*\) like the axes' taps, got \(1, 2, 3\)"
    ):
        resample(axes, v, torch.abs, torch.abs, np.empty((1, 2, 3), np.float32))
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"must continue up to 19, counted from 0; they end early"):
        resample(axes, v[:19], torch.abs, torch.abs, out)
    assert torch.get_num_threads() == before
    assert not grids._counts
