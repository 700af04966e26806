"""Where an answer came from, to be looked at: pictures show the patches where they are, files are whole."""

import csv
import json
import math

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from medvl.language import images
from medvl.slides.map_colours import INK, TISSUE, relevance_colours, slot_colours
from medvl.slides.maps import draw_map, draw_slots, draw_top, write_map
from medvl.slides.relevance import percentiles, top_patches
from tests.slides.test_relevance import routing


# Pictures -------------------------------------------------------------------------------------------------------------------------------
def _slide(n=40, seed=1):
    """Patches of 100 at random places, some over each other, in a slide of 1000 x 500."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 980, n), rng.integers(0, 480, n)], 1), rng.normal(size=n)


def _cover(coords, patch, scale, shape):
    """For each pixel the patches over it, one patch after another."""
    over = np.zeros((*shape, len(coords)), bool)
    for j, (x, y) in enumerate(coords):
        left, upper, right, lower = (round(v * scale) for v in (x, y, x + patch, y + patch))
        over[upper:lower, left:right, j] = True
    return over


def _naive(over, count, r, scale):
    """Levels of all pixels."""
    if scale == "percentile":
        return (over * percentiles(r)).sum(-1) / np.maximum(count, 1)
    mean = (over * np.where(r > 0, r, 0)).sum(-1) / np.maximum(count, 1)
    return np.array(
        [[max(0.0, 1 + math.log10(v / mean.max()) / 4) if v > 0 else 0.0 for v in row] for row in mean]
    )


@pytest.mark.parametrize("scale", ["share", "percentile"])
def test_map_is_the_naive_one_over_the_thumbnail(scale):
    coords, r = _slide()
    r[:20] *= 10.0 ** -np.arange(20)  # over more than the four powers of ten
    rng = np.random.default_rng(2)
    thumbnail = rng.integers(0, 255, (250, 500, 3)).astype(np.uint8)
    drawn = np.asarray(
        draw_map(r, coords, 100, thumbnail=thumbnail, level0_size=(1000, 500), size=500, scale=scale)
    )[:250]
    over = _cover(coords, 100, 0.5, (250, 500))
    count = over.sum(-1)
    assert count.max() > 2
    assert (count == 0).any()
    mean = np.round(_naive(over, count, r, scale), 9)
    wanted = np.where(count[..., None] > 0, 0.6 * thumbnail + 0.4 * relevance_colours(mean), thumbnail)
    assert np.abs(drawn - wanted).max() < 0.8  # rounded twice
    np.testing.assert_array_equal(drawn[count == 0], thumbnail[count == 0])  # untouched
    shuffled = np.random.default_rng(3).permutation(len(r))
    again = draw_map(
        r[shuffled],
        coords[shuffled],
        100,
        thumbnail=Image.fromarray(thumbnail),
        level0_size=(1000, 500),
        size=500,
        scale=scale,
    )
    np.testing.assert_array_equal(np.asarray(again)[:250], drawn)


def test_slots_are_those_of_most_patches():
    coords, _ = _slide()
    w, _ = routing(n=40)
    w[7] = 0
    drawn = np.asarray(draw_slots(w, coords, 100, level0_size=(1000, 500), size=500, alpha=1))[:250]
    over = _cover(coords, 100, 0.5, (250, 500))
    votes = np.stack([over[..., (w.argmax(1) == k) & w.any(1)].sum(-1) for k in range(6)], -1)
    best = np.where(votes.any(-1), votes.argmax(-1), 6)
    colours = np.array([*slot_colours(6), TISSUE])
    covered = over.any(-1)
    np.testing.assert_array_equal(drawn[covered], colours[best][covered])
    assert (best[covered] == 6).any()  # a patch without weight is grey


def _texts(monkeypatch):
    """A list that grows by every text that is drawn."""
    drawn, draw = [], Text.draw
    monkeypatch.setattr(
        Text, "draw", lambda self, renderer: (drawn.append(self.get_text()), draw(self, renderer))
    )
    return drawn


def test_what_is_written_on_the_pictures(monkeypatch):
    said = _texts(monkeypatch)
    coords, _ = _slide(n=3)
    draw_map([1.0, 2.0, 7.0], [[0, 0], [200, 0], [800, 300]], 100, level0_size=(1000, 500), mpp=0.5, mark=2)
    assert {
        "1",
        "2",
        "0.1 mm",
        "1/10,000 or less",
        "patch 1 holds 70.0 % of the relevance, the top 1 % (1 of 3) 70.0 %",
    } <= set(said)
    assert "3" not in said
    said.clear()
    draw_map([-1.0, 0.0], None, 100)
    assert said[-1] == "no patch has positive relevance; no coordinates: patches in the order of the file"
    said.clear()
    draw_slots([[1.0, 0.0], [1.0, 2.0]], coords[:2], 100)
    assert {"0", "1", "50.0"} <= set(said)
    assert said[-1].endswith("2 patches")


def test_the_scale_bar_is_as_long_as_it_says(monkeypatch):
    said = _texts(monkeypatch)
    for mpp, mm in ((0.5, 0.2), (0.25, 0.1)):
        plain, barred = (
            np.asarray(draw_map([1.0], [[0, 0]], 10, level0_size=(2000, 1000), size=1000, mpp=m))
            for m in (None, mpp)
        )
        dark = ((barred[:500] == INK) & (plain[:500] != INK)).all(-1)
        assert abs(dark.sum(1).max() - 1000 * mm / mpp / 2) <= 1  # two level-0 pixels per pixel
        assert f"{mm} mm" in said


def test_sizes():
    coords, r = _slide()
    for size in (64, 300, 1024):
        assert max(draw_map(r, coords, 100, level0_size=(1000, 500), size=size).size) >= size
    assert draw_map(r, coords, 100, level0_size=(1000, 500), size=1000).width == 1000
    narrow = draw_map(r[:2], [[0, 0], [0, 90_000]], 100, size=500)
    assert narrow.height > 500
    assert draw_map([1.0], [[5, 5]], 1).width >= 1024
    assert draw_slots(np.eye(40)[:3], None, 256).width == 1024


def test_pictures_refuse_what_is_not_this_slide():
    coords, r = _slide()
    thumbnail, whole = np.zeros((50, 100, 3), np.uint8), (1000, 500)
    for keys, found in (
        ({"thumbnail": thumbnail}, r"a thumbnail needs level0_size"),
        (
            {"thumbnail": thumbnail, "level0_size": (500, 1000)},
            r"must begin inside of the slide, \[500.0, 1000.0\] level-0 pixels, got \d+ of 40",
        ),
        (
            {"thumbnail": thumbnail.swapaxes(0, 1), "level0_size": whole},
            r"show the whole slide, 1000 x 500, got one of 50 x 100",
        ),
        ({"level0_size": (1000, 0)}, r"level0_size must be \(width, height\) > 0"),
        ({"mpp": 0.0}, r"patch_size and mpp must be > 0 and size >= 64, got 100, 0.0 and 1024"),
        ({"alpha": 1.5}, r"alpha must be in 0..1, got 1.5"),
        ({"scale": "log"}, 'scale must be "share" or "percentile", got \'log\''),
    ):
        with pytest.raises(ValueError, match=f"draw_map: .*{found}"):
            draw_map(r, coords, 100, **keys)
    with pytest.raises(ValueError, match="draw_map: without coords patches have no place"):
        draw_map(r, None, 100, level0_size=whole)
    with pytest.raises(ValueError, match="draw_slots: needs at least one patch and one slot"):
        draw_slots(np.zeros((0, 3)), None, 100)
    with pytest.raises(ValueError, match=r"draw_slots: coords must be \[2, 2\]"):
        draw_slots(np.ones((2, 3)), coords, 100)


def test_the_grid_of_top_patches_is_cut_from_the_slide():
    slide = np.random.default_rng(0).integers(0, 255, (500, 1000, 3)).astype(np.uint8)
    asked = []

    def read(x, y, side):
        asked.append((x, y, side))
        return slide[y : y + side, x : x + side]

    best = top_patches(np.arange(7.0), np.arange(14).reshape(7, 2) * 20, 7)
    picture = np.asarray(draw_top(best, 36, read, columns=5, tile=36))
    assert asked == [(p.x, p.y, 36) for p in best]
    gap = 3
    np.testing.assert_array_equal(picture[gap : gap + 36, gap : gap + 36], slide[260:296, 240:276])
    assert draw_top(best, 36, None) is None
    with pytest.raises(ValueError, match="needs patches with coordinates"):
        draw_top(top_patches([1.0], None), 36, read)


# Files ----------------------------------------------------------------------------------------------------------------------------------
def test_a_map_in_files(tmp_path):
    coords, r = _slide()
    w, _ = routing(n=40)
    read = lambda x, y, side: Image.new("RGB", (side, side), "red")
    into = write_map(
        tmp_path, "TCGA-1.DX1", r, w, coords, 100, top=5, read_region=read, level0_size=(1000, 500), size=200
    )
    assert into == tmp_path / "TCGA-1.DX1"
    assert sorted(f.name for f in into.iterdir()) == [
        "map.geojson",
        "map.png",
        "slots.png",
        "top.csv",
        "top.png",
    ]
    for name, wanted in (
        ("map", draw_map(r, coords, 100, level0_size=(1000, 500), size=200, mark=5)),
        ("slots", draw_slots(w, coords, 100, level0_size=(1000, 500), size=200)),
    ):
        np.testing.assert_array_equal(np.asarray(Image.open(into / f"{name}.png")), np.asarray(wanted))
    assert len(json.loads((into / "map.geojson").read_text())["features"]) == 40
    rows = list(csv.DictReader((into / "top.csv").open()))
    assert [int(row["row"]) for row in rows] == np.argsort(-r)[:5].tolist()
    assert [(int(row["x"]), int(row["y"])) for row in rows] == [tuple(coords[j]) for j in np.argsort(-r)[:5]]
    write_map(tmp_path, "TCGA-1.DX1", r, w, None, 100, size=200)  # what is no longer so is gone
    assert sorted(f.name for f in into.iterdir()) == ["map.png", "slots.png", "top.csv"]
    assert next(csv.DictReader((into / "top.csv").open()))["x"] == ""


def test_a_map_that_fails_writes_nothing(tmp_path):
    coords, r = _slide()
    w, _ = routing(n=40)
    for name in ("", "..", "a/b", "a\\b"):
        with pytest.raises(ValueError, match="the name is used as a file name"):
            write_map(tmp_path, name, r, w, coords, 100)
    with pytest.raises(
        ValueError, match=r"weights must be \[40, k\], a row per patch of relevance, got 39 rows"
    ):
        write_map(tmp_path, "a", r, w[1:], coords, 100)
    with pytest.raises(ValueError, match="draw_slots: weights"):
        write_map(tmp_path, "a", r, -w, coords, 100)
    assert not list(tmp_path.iterdir())


def test_over_a_real_slide(shared_data, tmp_path):
    slide = images.open_image(shared_data / "pathology" / "cmu-1-small-region.svs", page=0)
    assert slide.size == (2220, 2967)
    coords = np.stack(np.meshgrid(np.arange(0, 2220, 240), np.arange(0, 2967, 240)), -1).reshape(-1, 2)
    grey = [np.asarray(slide.crop((x, y, x + 240, y + 240)).convert("L")).mean() for x, y in coords.tolist()]
    coords = coords[np.array(grey) < 225]
    r = -np.linalg.norm(coords - [1200, 1400], axis=1) + 1000
    read = lambda x, y, side: slide.crop((x, y, x + side, y + side))
    keys = {
        "thumbnail": slide.resize((555, 742)),
        "level0_size": slide.size,
        "mpp": 0.499,
        "size": 400,
        "read_region": read,
    }
    into = write_map(tmp_path, "cmu-1", r, np.random.default_rng(0).random((len(r), 16)), coords, 240, **keys)
    drawn = Image.open(into / "map.png")
    left = (drawn.width - 299) // 2
    untouched = np.asarray(slide.resize((555, 742)).resize((299, 400), Image.Resampling.LANCZOS))
    changed = (np.asarray(drawn)[:400, left : left + 299] != untouched).any(-1)
    assert not changed[:30, :100].any()  # no patch there
    assert changed[170:210, 140:180].mean() > 0.95  # the most relevant ones
