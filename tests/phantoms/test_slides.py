import time
from collections import Counter

import h5py
import numpy as np
import pytest
from attrs import evolve

from medvl.phantoms import slides
from medvl.slides.features import read_slide
from medvl.slides.names import feature_files

CFG = slides.SlideConfig(train=60, valid=2, test=3, dim=32, patches=(100, 400), large=1, largest=20_000)
SMALL = evolve(CFG, large=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides")
    found = slides.write_slides(CFG, path / "features")
    assert list(found) == [
        slides.draw_truth(CFG, s, i).name for s in slides.SPLITS for i in range(getattr(CFG, s))
    ]
    return path


def test_features_are_prototypes_and_stain():
    """Without its stain a slide's patches lie around the prototype of the tissue, the class and the motif that the truth says."""
    cfg = evolve(SMALL, patches=(3000, 3000))
    p = slides.draw_prototypes(cfg)
    np.testing.assert_allclose(
        np.linalg.norm(np.concatenate([p.tissues, p.classes, p.motifs]), axis=1),
        [4] * 8 + [3] * 4 + [6] * 4,
        rtol=1e-5,
    )
    axes = np.concatenate([p.tissues, p.classes, p.motifs])
    np.testing.assert_allclose(axes @ axes.T, np.diag((axes**2).sum(1)), atol=1e-4)
    for number in range(5):
        s = slides.draw_slide(cfg, "train", number)
        assert s.features.dtype == np.float16
        assert s.features.shape == (3000, 32)
        expected = p.tissues[s.tissue]
        tumour = s.tissue == slides.TISSUES.index("tumour")
        expected[tumour] += p.classes[list(slides.CLASSES).index(s.truth.tumour_class)]
        if s.truth.motif != "none":
            expected[s.motif_rows] += p.motifs[list(slides.MOTIFS).index(s.truth.motif)]
        left = s.features.astype(np.float32) - expected
        for k in range(len(slides.TISSUES)):  # the shift is the slide's, the same in every tissue
            if (s.tissue == k).sum() > 200:
                assert np.abs(left[s.tissue == k].mean(0) - left.mean(0)).max() < 0.2
        left -= left.mean(0)
        assert 0.45 < np.median(left.std(0)) < 0.75
        assert np.abs(left[s.motif_rows]).max(initial=0) < 4
    shifts = [
        slides.draw_slide(cfg, "train", i).features.astype(np.float32).mean(0) @ p.stain[0] for i in range(10)
    ]
    assert np.std(shifts) > 0.5


def test_tissues_are_counted_and_lie_together():
    for number in range(6):
        s = slides.draw_slide(evolve(SMALL, patches=(2000, 2000)), "train", number)
        found = Counter(slides.TISSUES[k] for k in s.tissue)
        assert found == s.truth.tissues
        assert sum(found.values()) == s.truth.patches == len(s.features)
        assert len(found.keys() & {*slides.OPTIONAL}) == 2
        gaps = found[s.truth.dominant] - max(n for t, n in found.items() if t != s.truth.dominant)
        assert gaps > 0.05 * s.truth.patches
        at = {tuple(c): k for c, k in zip(s.coords // s.patch_size, s.tissue, strict=True)}
        pairs = [(k, at[x + 1, y]) for (x, y), k in at.items() if (x + 1, y) in at]
        assert len(pairs) > 0.85 * len(at), "patches lie together"
        assert np.mean([a == b for a, b in pairs]) > 0.75, "and so do those of a tissue"


def test_motif_lies_in_its_tissue():
    seen = Counter()
    for number in range(20):
        s = slides.draw_slide(evolve(SMALL, patches=(9000, 9000)), "train", number)
        seen[s.truth.motif] += 1
        assert len(s.motif_rows) == s.truth.motif_patches == len({*s.motif_rows})
        assert (s.truth.motif_patches == 0) == (s.truth.motif == "none")
        if s.truth.motif != "none":
            assert 1 <= s.truth.motif_patches <= 5
            assert {slides.TISSUES[k] for k in s.tissue[s.motif_rows]} == {slides.MOTIFS[s.truth.motif]}
            at = s.coords[s.motif_rows] // s.patch_size
            assert np.abs(at - at[0]).max() < 20, "a cluster"
    assert len(seen) == 5


def test_coords_are_a_grid_row_by_row():
    sizes = set()
    for number in range(8):
        s = slides.draw_slide(SMALL, "valid", number)
        assert s.coords.dtype == np.int64
        assert s.coords.min() >= 0
        assert len({tuple(c) for c in s.coords}) == len(s.coords)
        assert ((s.coords - s.coords[0]) % s.patch_size == 0).all()
        assert (np.lexsort((s.coords[:, 0], s.coords[:, 1])) == np.arange(len(s.coords))).all()
        sizes.add(s.patch_size)
    assert sizes == {256, 512}


def test_labels_are_balanced():
    truths = [slides.draw_truth(SMALL, "train", i) for i in range(60)]
    assert Counter(t.tumour_class for t in truths) == dict.fromkeys(slides.CLASSES, 15)
    assert Counter(t.grade for t in truths) == {1: 20, 2: 20, 3: 20}
    assert Counter(t.lymphocytes for t in truths) == {"low": 30, "high": 30}
    assert Counter(t.motif for t in truths) == dict.fromkeys([*slides.MOTIFS, "none"], 12)
    assert Counter(x for t in truths for x in slides.OPTIONAL if x in t.tissues) == dict.fromkeys(
        slides.OPTIONAL, 30
    )


def test_labels_tell_nothing_of_each_other():
    truths = [slides.draw_truth(SMALL, "train", i) for i in range(600)]
    kinds = [[getattr(t, k) for t in truths] for k in ("tumour_class", "grade", "lymphocytes", "motif")]
    for i, a in enumerate(kinds):
        for b in kinds[:i]:
            table = np.array(
                [
                    [sum(x == u and y == v for x, y in zip(a, b, strict=True)) for v in sorted({*b})]
                    for u in sorted({*a})
                ]
            )
            expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
            assert ((table - expected) ** 2 / expected).sum() < 3 * table.size


def test_the_mean_shows_the_class_and_not_the_motif():
    from sklearn.linear_model import LogisticRegression

    cfg = evolve(SMALL, patches=(1000, 1500))
    axes = slides.draw_prototypes(cfg).motifs / 6
    means, peaks, truths = [], [], []
    for i in range(180):
        s = slides.draw_slide(cfg, "train", i)
        x = s.features.astype(np.float32)
        means.append(x.mean(0))
        peaks.append(((x - means[-1]) @ axes.T).max(0))
        truths.append(s.truth)

    def accuracy(x, label):
        y = [getattr(t, label) for t in truths]
        x = np.array(x) / np.std(x, 0)
        return LogisticRegression(max_iter=2000).fit(x[:120], y[:120]).score(x[120:], y[120:])

    assert accuracy(means, "tumour_class") > 0.9
    assert accuracy(means, "motif") < 0.35  # chance is 0.2
    assert accuracy(peaks, "motif") > 0.95


def test_files_hold_the_slides(folder):
    s = slides.draw_slide(CFG, "train", 5)
    with h5py.File(folder / "features" / f"{s.name}.h5") as f:
        np.testing.assert_array_equal(f["features"][:], s.features)
        np.testing.assert_array_equal(f["coords"][:], s.coords)
        about = dict(f["coords"].attrs)
        assert f["features"].dtype == np.float16
    assert about["patch_size_level0"] == s.patch_size
    assert about["level0_magnification"] / about["target_magnification"] == s.patch_size / about["patch_size"]
    assert (about["level0_width"], about["level0_height"]) == tuple(s.coords.max(0) + s.patch_size)
    assert len(list((folder / "features").iterdir())) == 65
    assert s.name == "TCGA-TR-0005-01Z-00-DX1"


def test_files_are_read(folder):
    s = slides.draw_slide(CFG, "test", 1)
    read = read_slide(feature_files(folder / "features")[s.name][0])
    np.testing.assert_array_equal(read.features, s.features)
    np.testing.assert_array_equal(read.coords, s.coords)
    assert (read.name, read.patch_size, read.magnification, read.encoder) == (
        s.name,
        s.patch_size,
        20,
        "phantom",
    )


def test_a_slide_is_pure_in_seed_split_and_number():
    def features(cfg=SMALL, split="train", number=0):
        return slides.draw_slide(cfg, split, number).features.tobytes()

    assert features() == features(evolve(SMALL, train=9, test=7))
    others = [
        features(evolve(SMALL, seed=1)),
        features(number=1),
        features(split="valid"),
        features(split="test"),
    ]
    assert len({features(), *others}) == 5
    names = {slides.draw_truth(SMALL, s, i).name for s in slides.SPLITS for i in range(40)}
    assert len(names) == 120


def test_sizes():
    cfg = slides.SlideConfig(dim=32, patches=(300, 4000))
    n = [slides.draw_truth(cfg, "train", i).patches for i in range(400)]
    assert 300 <= min(n) < 330
    assert 3600 < max(n) <= 4000
    assert 950 < np.median(n) < 1250  # log-uniform: 1095
    assert [slides.draw_truth(cfg, "test", i).patches for i in range(4)] == [200_000, 92_832, 43_089, 20_000]
    assert slides.draw_truth(cfg, "test", 4).patches <= 4000
    small = slides.draw_slide(evolve(cfg, patches=(100, 100)), "train", 0)
    assert len(small.features) == 100
    start = time.perf_counter()
    assert np.isfinite(slides.draw_slide(cfg, "test", 0).features).all()
    assert time.perf_counter() - start < 5, "200,000 patches take a fraction of a second"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid": 0}, r"valid must be 1 or more, got 0"),
        ({"large": 121}, r"large must be 0 to test, got .*large=121"),
        ({"large": -1}, r"large must be 0 to test, got .*large=-1"),
        ({"patches": (99, 200)}, "patches must be 100 or more, got 99"),
        ({"patches": (300, 200)}, r"patches must rise, got \[300, 200\]"),
        ({"largest": 10_000}, "largest must be 20000 or more, got 10000"),
        ({"dim": 31}, "dim must be 32 or more, got 31"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        slides.SlideConfig(**change)


@pytest.mark.parametrize(("split", "number"), [("dev", 0), ("train", -1)])
def test_errors_of_a_slide(split, number):
    with pytest.raises(
        ValueError, match=f"split must be of train, valid, test and number >= 0, got '{split}', {number}"
    ):
        slides.draw_slide(CFG, split, number)
