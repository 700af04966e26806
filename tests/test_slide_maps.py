"""Where an answer came from: shares are exact, pictures show the patches where they are, files are whole."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from medvl import slide_maps
from medvl.data import images
from medvl.slide_maps import TopPatch, draw_map, draw_slots, draw_top, patch_relevance, relevance_chunk, to_geojson, top_patches, write_map


def _weights(n=50, k=6, seed=0):
    """Top-2 routing weights; the last slot has no mass."""
    rng = np.random.default_rng(seed)
    w = rng.random((n, k))
    w[:, -1] = 0
    return np.where(w >= np.sort(w, 1)[:, -2:-1], w, 0), rng.normal(size=k)


# Slots ----------------------------------------------------------------------------------------------------------------------------------
def test_gradient_attribution_of_a_linear_score(gen):
    x, slope = (torch.randn(5, 3, generator=gen, dtype=torch.float64) for _ in range(2))
    weight = torch.nn.Parameter(slope.clone())
    found = slide_maps.gradient_attribution(lambda v: (v * weight).sum() + 7, x, signed=True)
    torch.testing.assert_close(found, (slope * x).sum(-1))
    assert (found < 0).any()
    torch.testing.assert_close(slide_maps.gradient_attribution(lambda v: (v * weight).sum(), x), found.abs())
    assert weight.grad is None
    assert not x.requires_grad
    with torch.no_grad():  # what calls it may well be under no_grad
        torch.testing.assert_close(slide_maps.gradient_attribution(lambda v: (v * slope).sum(), x, signed=True), found)
    half = slide_maps.gradient_attribution(lambda v: (v * slope.bfloat16()).sum(), x.bfloat16(), signed=True)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), found, atol=0.05, rtol=0.05)


def test_occlusion_is_what_each_token_does(gen):
    x, slope = (torch.randn(5, 3, generator=gen, dtype=torch.float64) for _ in range(2))
    linear = lambda v: (v * slope).flatten(1).sum(-1)
    zero = slide_maps.occlusion_attribution(linear, x, torch.zeros(3), chunk=2)
    torch.testing.assert_close(zero, slide_maps.gradient_attribution(lambda v: linear(v[None])[0], x, signed=True))
    each = torch.randn(5, 3, generator=gen, dtype=torch.float64)
    crooked = lambda v: torch.tanh(v @ slope.T).flatten(1).logsumexp(-1)
    naive = []
    for i in range(5):
        without = x.clone()
        without[i] = each[i]
        naive.append(crooked(x[None])[0] - crooked(without[None])[0])
    for chunk in (1, 3, 16):
        torch.testing.assert_close(slide_maps.occlusion_attribution(crooked, x, each, chunk=chunk), torch.stack(naive))


def test_attention_is_the_mean_over_layers_heads_and_rows(gen):
    layers = [torch.randn(4, 9, 9, generator=gen).softmax(-1) for _ in range(3)]
    rows, slots = [6, 8], [2, 3, 5]
    naive = [np.mean([float(a[h, i, j]) for a in layers for h in range(4) for i in rows]) for j in slots]
    np.testing.assert_allclose(slide_maps.attention_attribution(layers, rows, torch.tensor(slots)), naive, rtol=1e-6)


def test_attribution_refuses_what_it_cannot_read(gen):
    x = torch.randn(4, 3, generator=gen)
    with pytest.raises(ValueError, match=r"visual must be floats \[k, d\], got torch.int64 \[4\]"):
        slide_maps.gradient_attribution(torch.sum, torch.arange(4))
    with pytest.raises(ValueError, match=r"score must give one number, got \[4\]"):
        slide_maps.gradient_attribution(lambda v: v.sum(-1), x)
    for score in (lambda v: v.detach().sum(), lambda v: torch.ones(1, requires_grad=True).sum()):
        with pytest.raises(ValueError, match="must depend on the visual tokens"):
            slide_maps.gradient_attribution(score, x)
    with pytest.raises(ValueError, match=r"baseline must be \[3\] or \[4, 3\] and chunk >= 1, got \[4\] and 16"):
        slide_maps.occlusion_attribution(lambda v: v.sum((1, 2)), x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"one number per variant, \[1\], got \[1, 4\]"):
        slide_maps.occlusion_attribution(lambda v: v.sum(-1), x, torch.zeros(3))
    square = torch.ones(1, 5, 5)
    with pytest.raises(ValueError, match=r"needs layers of \[h, t, t\], got \[\[1, 5, 5\], \[5, 5\]\]"):
        slide_maps.attention_attribution([square, square[0]], [1], [0])
    with pytest.raises(ValueError, match=r"positions in 0..4, got \[5\] and \[0\]"):
        slide_maps.attention_attribution([square], [5], [0])


# Patches --------------------------------------------------------------------------------------------------------------------------------
def test_relevance_is_the_formula_and_shares_all_out():
    w, a = _weights()
    naive = [sum(a[k] * w[j, k] / w[:, k].sum() for k in range(5)) for j in range(50)]
    r = patch_relevance(w, a)
    np.testing.assert_allclose(r, naive, rtol=1e-12)
    assert r.sum() == pytest.approx(a[:5].sum(), abs=1e-12)  # the slot without mass gives nothing
    np.testing.assert_allclose(patch_relevance(torch.tensor(w), torch.tensor(a)), r)
    np.testing.assert_allclose(patch_relevance(w * [1, 9, 1e-3, 1, 1e-310, 1], a), r, rtol=1e-6, atol=1e-6)  # only shares count
    padded = patch_relevance(np.vstack([w, np.zeros((3, 6))]), a)
    np.testing.assert_array_equal(padded, [*r, 0, 0, 0])
    assert patch_relevance(np.zeros((0, 6)), a).shape == (0,)


def test_relevance_by_chunks_is_that_of_the_whole(monkeypatch):
    w, a = _weights(n=70000, k=4)
    whole, totals = patch_relevance(w, a[:4]), w.sum(0)
    pieces = [relevance_chunk(w[i : i + 30000], totals, a[:4]) for i in range(0, 70000, 30000)]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-9, atol=1e-18)
    assert whole.sum() == pytest.approx(a[:3].sum(), rel=1e-9)


def test_what_spoke_against_the_answer():
    w = np.array([[1.0, 1.0], [0.0, 1.0]])
    for sign, wanted in (("signed", [2.0, -1.0]), ("absolute", [4.0, 1.0]), ("positive", [3.0, 0.0])):
        np.testing.assert_array_equal(patch_relevance(w, [3.0, -2.0], sign=sign), wanted)


def test_relevance_refuses_what_is_none():
    w, a = _weights()
    with pytest.raises(ValueError, match=r"patch_relevance: weights must be \[n, k\], got \[6\]"):
        patch_relevance(w[0], a)
    with pytest.raises(ValueError, match=r"weights must be \[n, k\], finite and >= 0, got \[50, 6\] with 1 wrong"):
        patch_relevance(np.where(w == w.max(), -1, w), a)
    with pytest.raises(ValueError, match=r"must be finite \[6\], totals >= 0, got \[6\] and \[5\]"):
        patch_relevance(w, a[:5])
    with pytest.raises(ValueError, match=r"got \[6\] and \[6\], 0 and 1 of them wrong"):
        patch_relevance(w, [*a[:5], math.nan])  # also of a slot without mass
    with pytest.raises(ValueError, match="sign must be signed, absolute or positive, got 'abs'"):
        patch_relevance(w, a, sign="abs")


def test_percentiles_and_shares():
    np.testing.assert_array_equal(slide_maps.percentiles([3.0, 1.0, 3.0, 9.0]), [0.625, 0.25, 0.625, 1.0])
    assert slide_maps.mass_share([3.0, 1.0, -5.0, 0.0], np.array([True, False, True, True])) == 0.75
    assert math.isnan(slide_maps.mass_share([0.0, -1.0], np.array([True, True])))
    with pytest.raises(ValueError, match=r"chosen must be bool \[2\], got int64 \[2\]"):
        slide_maps.mass_share([0.0, 1.0], [0, 1])
    with pytest.raises(ValueError, match=r"relevance must be \[n\], finite, of at least one patch, got \[2\] with 1 wrong"):
        slide_maps.percentiles([0.0, math.inf])


def test_top_patches():
    coords = np.arange(10).reshape(5, 2) * 10
    found = top_patches([1.0, 5.0, 2.0, 5.0, 0.0], coords, 3)
    assert [(p.rank, p.row, p.x, p.y, p.relevance) for p in found] == [(1, 1, 20, 30, 5.0), (2, 3, 60, 70, 5.0), (3, 2, 40, 50, 2.0)]
    assert [p.percentile for p in found] == [0.9, 0.9, 0.6]
    assert top_patches([1.0, 2.0], None)[0] == TopPatch(rank=1, row=1, x=None, y=None, relevance=2.0, percentile=1.0)
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        top_patches([1.0], None, 0)
    with pytest.raises(ValueError, match=r"coords must be \[2, 2\]"):
        top_patches([1.0, 2.0], coords)


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


def test_map_is_the_naive_one_over_the_thumbnail():
    coords, r = _slide()
    rng = np.random.default_rng(2)
    thumbnail = rng.integers(0, 255, (250, 500, 3)).astype(np.uint8)
    drawn = np.asarray(draw_map(r, coords, 100, thumbnail=thumbnail, level0_size=(1000, 500), size=500))[:250]
    over = _cover(coords, 100, 0.5, (250, 500))
    count = over.sum(-1)
    assert count.max() > 2
    assert (count == 0).any()
    mean = np.round((over * slide_maps.percentiles(r)).sum(-1) / np.maximum(count, 1), 9)
    wanted = np.where(count[..., None] > 0, 0.6 * thumbnail + 0.4 * 255 * slide_maps._colours()(mean)[..., :3], thumbnail)
    assert np.abs(drawn - wanted).max() < 0.8  # rounded twice
    np.testing.assert_array_equal(drawn[count == 0], thumbnail[count == 0])  # untouched
    shuffled = np.random.default_rng(3).permutation(len(r))
    again = draw_map(r[shuffled], coords[shuffled], 100, thumbnail=Image.fromarray(thumbnail), level0_size=(1000, 500), size=500)
    np.testing.assert_array_equal(np.asarray(again)[:250], drawn)


def test_slots_are_those_of_most_patches():
    coords, _ = _slide()
    w, _ = _weights(n=40)
    w[7] = 0
    drawn = np.asarray(draw_slots(w, coords, 100, level0_size=(1000, 500), size=500, alpha=1))[:250]
    over = _cover(coords, 100, 0.5, (250, 500))
    votes = np.stack([over[..., (w.argmax(1) == k) & w.any(1)].sum(-1) for k in range(6)], -1)
    best = np.where(votes.any(-1), votes.argmax(-1), 6)
    colours = np.array([*slide_maps._slot_colours(6), slide_maps._TISSUE])
    covered = over.any(-1)
    np.testing.assert_array_equal(drawn[covered], colours[best][covered])
    assert (best[covered] == 6).any()  # a patch without weight is grey


def test_many_small_patches_leave_no_seam():
    side = 700
    coords = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 256
    canvas = slide_maps._canvas("f", len(coords), coords, 256, None, (side * 256, side * 256), 512, None)
    covered = slide_maps._sums(canvas, np.ones(len(coords)))
    assert covered.shape == (512, 512)
    assert covered.min() >= 1  # less than a pixel each, and every pixel has one
    for corner in ([210, 210], [255.9 * side, 3]):  # between two pixels' middles, at the edge
        one = slide_maps._canvas("f", 1, [corner], 256, None, (side * 256, side * 256), 512, None)
        assert slide_maps._sums(one, np.ones(1)).sum() == 1


def test_slot_colours_are_apart():
    colours = slide_maps._slot_colours(40)
    assert len(set(colours[:32])) == 32
    assert colours[0] == (0, 0x72, 0xB2)
    assert colours[32:] == colours[:8]
    gaps = np.linalg.norm(np.array(colours[:32])[:, None] - np.array(colours[:32]), axis=-1)
    assert gaps[~np.eye(32, dtype=bool)].min() > 25


def _texts(monkeypatch):
    said, draw = [], slide_maps.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        slide_maps.ImageDraw.ImageDraw, "text", lambda self, xy, text, *a, **k: (said.append(text), draw(self, xy, text, *a, **k))
    )
    return said


def test_what_is_written_on_the_pictures(monkeypatch):
    said = _texts(monkeypatch)
    coords, _ = _slide(n=3)
    draw_map([1.0, 2.0, 7.0], [[0, 0], [200, 0], [800, 300]], 100, level0_size=(1000, 500), mpp=0.5, mark=2)
    assert {"1", "2", "0.1 mm", "least relevant", "top 1 % (1 of 3 patches): 70.0 % of the relevance"} <= set(said)
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
        plain, barred = (np.asarray(draw_map([1.0], [[0, 0]], 10, level0_size=(2000, 1000), size=1000, mpp=m)) for m in (None, mpp))
        dark = ((barred[:500] == slide_maps._INK) & (plain[:500] != slide_maps._INK)).all(-1)
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
        ({"thumbnail": thumbnail.swapaxes(0, 1), "level0_size": whole}, r"show the whole slide, 1000 x 500, got one of 50 x 100"),
        ({"level0_size": (1000, 0)}, r"level0_size must be \(width, height\) > 0"),
        ({"mpp": 0.0}, r"patch_size and mpp must be > 0 and size >= 64, got 100, 0.0 and 1024"),
        ({"alpha": 1.5}, r"alpha must be in 0..1, got 1.5"),
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
def test_geojson_is_what_qupath_reads():
    coords = np.stack([np.arange(200) * 64, np.full(200, 32)], 1)
    r = np.random.default_rng(0).normal(size=200)
    shapes = json.loads(json.dumps(to_geojson(r, coords, 64), allow_nan=False))
    assert set(shapes) == {"type", "features"}
    assert shapes["type"] == "FeatureCollection"
    assert len(shapes["features"]) == 200
    for j, f in enumerate(shapes["features"]):
        assert (f["type"], f["geometry"]["type"], f["properties"]["objectType"]) == ("Feature", "Polygon", "detection")
        x = 64 * j
        assert f["geometry"]["coordinates"] == [[[x, 32], [x + 64, 32], [x + 64, 96], [x, 96], [x, 32]]]
        rank = 1 + (r > r[j]).sum()
        measured = {"Relevance": r[j], "Relevance percentile": 1 - (rank - 1) / 200, "Relevance rank": rank}
        assert f["properties"]["measurements"] == pytest.approx(measured)
        kind = f["properties"]["classification"]
        assert kind["name"] == ("Relevance top 1 %" if rank <= 3 else f"Relevance {'top 10 %' if rank <= 21 else _half(rank)}")
        assert all(isinstance(c, int) and 0 <= c <= 255 for c in kind["color"])
        assert len(kind["color"]) == 3
    assert len({tuple(f["properties"]["classification"]["color"]) for f in shapes["features"]}) == 4


def _half(rank):
    return "upper half" if rank <= 101 else "lower half"


def test_geojson_of_the_top_patches():
    coords, r = _slide()
    top = to_geojson(r, coords, 10.5, top=4, classes=[("hot", 0.0)])["features"]
    assert [f["properties"]["measurements"]["Relevance rank"] for f in top] == [1, 2, 3, 4]
    assert top[0]["geometry"]["coordinates"][0][2] == [coords[r.argmax()][0] + 10.5, coords[r.argmax()][1] + 10.5]
    assert {f["properties"]["classification"]["name"] for f in top} == {"hot"}
    with pytest.raises(ValueError, match="needs coords"):
        to_geojson(r, None, 10)
    with pytest.raises(ValueError, match="top >= 1 or None, got 10 and 0"):
        to_geojson(r, coords, 10, top=0)
    for classes in ([], [("a", 0.1)], [("a", 0.0), ("b", 0.0)], [("a", 0.0), ("b", 1.0)]):
        with pytest.raises(ValueError, match="rising from 0 to below 1"):
            to_geojson(r, coords, 10, classes=classes)


def test_a_map_in_files(tmp_path):
    coords, r = _slide()
    w, _ = _weights(n=40)
    read = lambda x, y, side: Image.new("RGB", (side, side), "red")
    into = write_map(tmp_path, "TCGA-1.DX1", r, w, coords, 100, top=5, read_region=read, level0_size=(1000, 500), size=200)
    assert into == tmp_path / "TCGA-1.DX1"
    assert sorted(f.name for f in into.iterdir()) == ["map.geojson", "map.png", "slots.png", "top.csv", "top.png"]
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
    w, _ = _weights(n=40)
    for name in ("", "..", "a/b", "a\\b"):
        with pytest.raises(ValueError, match="name must be a plain file name"):
            write_map(tmp_path, name, r, w, coords, 100)
    with pytest.raises(ValueError, match=r"weights must be \[40, k\], a row per patch of relevance, got 39 rows"):
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
    keys = {"thumbnail": slide.resize((555, 742)), "level0_size": slide.size, "mpp": 0.499, "size": 400, "read_region": read}
    into = write_map(tmp_path, "cmu-1", r, np.random.default_rng(0).random((len(r), 16)), coords, 240, **keys)
    drawn = Image.open(into / "map.png")
    left = (drawn.width - 299) // 2
    untouched = np.asarray(slide.resize((555, 742)).resize((299, 400), Image.Resampling.LANCZOS))
    changed = (np.asarray(drawn)[:400, left : left + 299] != untouched).any(-1)
    assert not changed[:30, :100].any()  # no patch there
    assert changed[170:210, 140:180].mean() > 0.95  # the most relevant ones
