"""SSIM, PSNR and MSE against scikit-image; means, intervals and controls against naive formulas."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import metrics as peer

from medvl.evaluation import pictures
from medvl.evaluation.results import read_results, write_results

GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def pair(seed, shape):
    """A smooth picture and a noisier one of it."""
    gen = np.random.default_rng(seed)
    a = np.cumsum(gen.normal(0, 9, shape), 0) + gen.integers(60, 190)
    b = a + gen.normal(0, gen.uniform(1, 60), shape)
    return np.clip(a, 0, 255).astype(np.uint8), np.clip(b, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(11, 11), (40, 31), (33, 64, 3), (256, 256, 3)])
def test_scores_are_scikit_images(seed, shape):
    a, b = pair(seed, shape)
    about = {"data_range": 255, "channel_axis": 2 if len(shape) == 3 else None}
    for window, options in (("gaussian", GAUSSIAN), ("uniform", {})):
        ours = pictures.ssim(a, b, window=window)
        assert ours == pytest.approx(peer.structural_similarity(a, b, **about, **options), abs=1e-9)
        assert ours == pytest.approx(pictures.ssim(b, a, window=window), abs=1e-12)
    assert pictures.mse(a, b) == pytest.approx(peer.mean_squared_error(a, b), abs=1e-9)
    assert pictures.psnr(a, b) == pytest.approx(peer.peak_signal_noise_ratio(a, b), abs=1e-9)


def test_differences_do_not_wrap():
    """255 levels apart is as far as it goes; in uint8 arithmetic it would be one level."""
    black, white = np.zeros((12, 12), np.uint8), np.full((12, 12), 255, np.uint8)
    assert pictures.mse(black, white) == 255**2
    assert pictures.psnr(black, white) == 0
    assert pictures.mse(black + np.uint8(1), black) == pictures.mse(black, black + np.uint8(1)) == 1


def test_equal_pictures():
    a, _ = pair(0, (20, 20, 3))
    assert pictures.ssim(a, a) == pictures.ssim(a, a, window="uniform") == 1
    assert (pictures.mse(a, a), pictures.psnr(a, a)) == (0, float("inf"))


def score(found, targets, groups=None, **options):
    rows = pictures.score_pictures(
        found,
        targets,
        groups or range(len(targets)),
        split="test",
        gen=torch.Generator().manual_seed(0),
        n=200,
        **options,
    )
    return {(r.subject, r.what): r for r in rows}


def test_rows_are_means_with_intervals(tmp_path):
    targets, found = zip(*(pair(seed, (24, 24)) for seed in range(12)), strict=True)
    rows = score({"ours": found, "worse": [255 - t for t in targets]}, targets, experiment="x-1")
    for what, f in (
        ("mse", pictures.mse),
        ("psnr", pictures.psnr),
        ("ssim_gaussian", pictures.ssim),
        ("ssim_uniform", lambda a, b: pictures.ssim(a, b, window="uniform")),
    ):
        row = rows["ours", what]
        assert row.value == pytest.approx(np.mean([f(a, b) for a, b in zip(found, targets, strict=True)]))
        assert row.low < row.value < row.high
        assert (row.n, row.split, row.experiment, row.extra["groups"]) == (12, "test", "x-1", 12)
    assert rows["worse", "ssim_gaussian"].high < rows["ours", "ssim_gaussian"].low
    again = score({"ours": found}, targets, experiment="x-1")  # a subject's row does not depend on the others
    for key, row in again.items():
        assert str(row) == str(rows[key])
    write_results(tmp_path / "r.jsonl", again.values())
    assert str(read_results(tmp_path / "r.jsonl")) == str([*again.values()])


def test_cases_are_drawn_as_a_whole():
    targets, found = zip(*(pair(seed // 4, (16, 16)) for seed in range(16)), strict=True)
    whole = score({"ours": found}, targets, groups=["abcd"[i // 4] for i in range(16)])["ours", "mse"]
    each = score({"ours": found}, targets)["ours", "mse"]
    assert (whole.value, whole.n, whole.extra["groups"]) == (each.value, 16, 4)
    assert whole.high - whole.low > each.high - each.low
    alone = score({"ours": found}, targets, groups=["a"] * 16)["ours", "mse"]
    assert np.isnan([alone.low, alone.high]).all()


def test_a_picture_equal_to_its_target_has_no_psnr():
    targets, found = zip(*(pair(seed, (16, 16)) for seed in range(4)), strict=True)
    rows = score({"copied": targets, "mixed": [targets[0], *found[1:]]}, targets)
    copied = rows["copied", "psnr"]
    assert np.isnan([copied.value, copied.low]).all()
    assert (copied.n, copied.extra["equal"], rows["copied", "ssim_uniform"].value) == (0, 4, 1)
    mixed = rows["mixed", "psnr"]
    assert (mixed.n, mixed.extra["equal"]) == (3, 1)
    assert mixed.value == pytest.approx(
        np.mean([pictures.psnr(a, b) for a, b in zip(found[1:], targets[1:], strict=True)])
    )


def test_controls():
    targets = [np.full((16, 16, 3), grey, np.uint8) for grey in (10, 20)]
    train = [np.full((16, 16, 3), grey, np.uint8) for grey in (0, 200, 201)]
    small = [pair(seed, (4, 4, 3))[0] for seed in range(2)]
    mean = pictures.mean_picture(train)
    assert (mean == 134).all()  # 133.67, rounded
    assert mean.dtype == np.uint8
    rows = pictures.controls(small, targets, [mean, mean], vq=targets)
    assert [*rows] == ["copied input", "mean target", "vq reconstruction"]
    assert all(len(kind) == 2 for kind in rows.values())
    upscaled = Image.fromarray(small[1]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(rows["copied input"][1], np.asarray(upscaled))
    assert rows["mean target"][1] is mean
    assert [*pictures.controls([], targets, [mean, mean], [])] == ["mean target"]
    assert [*pictures.controls([], targets, [], targets)] == ["vq reconstruction"]
    assert np.array_equal(pictures.controls(targets, targets, [], [])["copied input"][0], targets[0])


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (np.zeros((9, 9)), np.zeros((9, 9)), r"two uint8 .* got float64 \[9, 9\] and float64"),
        (np.zeros((9, 9), np.uint8), np.zeros((9, 8), np.uint8), r"of one shape, got uint8 \[9, 9\] and"),
        (np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 4), np.uint8), r"\[y, x, 3\] of one shape"),
        (np.zeros((10, 90), np.uint8), np.zeros((10, 90), np.uint8), "must have 11 pixels a side or more"),
    ],
)
def test_errors(a, b, text):
    with pytest.raises(ValueError, match=text):
        pictures.ssim(a, b)


def test_errors_of_tables():
    a = np.zeros((12, 12), np.uint8)
    with pytest.raises(ValueError, match="window must be gaussian or uniform, got 'box'"):
        pictures.ssim(a, a, window="box")
    for found, targets in (({"ours": [a]}, [a, a]), ({"ours": []}, [])):
        with pytest.raises(ValueError, match=r"each of \d targets needs a group and pictures"):
            score(found, targets)
