import csv
import json
import time
from collections import Counter

import h5py
import numpy as np
import pytest
from attrs import asdict, evolve

from medvl import files
from medvl.data import phantom_slides as ps
from medvl.data.slides import find_features, read_slide

CFG = ps.SlideConfig(train=60, valid=2, test=3, dim=32, patches=(100, 400), large=1, largest=20_000)
SMALL = evolve(CFG, large=0)
CHANCE = {len(o): 1 / len(o) for o in ("AB", "ABC", "ABCD")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides")
    n = len(ps.FAMILIES)
    assert ps.draw_slides(CFG, path) == {"slides": 65, "captions": 120, "train": 60 * n, "valid": 2 * n, "test": 3 * n}
    return path


def _lines(folder):
    return [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]


def _asked(cfg, split, n):
    truths = [ps.draw_truth(cfg, split, i) for i in range(n)]
    return [(t, q) for i, t in enumerate(truths) for q in ps.questions(cfg, split, i)]


def _naive_answer(t, family, question, options):
    """The rules once more, written out: the option that is right for a slide's truth."""
    tissues = {name for name, count in t.tissues.items() if count}
    share = t.tissues["necrosis"] / t.patches
    if family in ("tissue", "motif_there"):
        seen = tissues if family == "tissue" else {t.motif}
        return "Yes" if any(s in question for s in seen) else "No"
    if family == "present":
        return next(o for o in options if o.lower() in tissues)
    many = t.tissues["lymphocytes"] / t.patches > 0.07
    return {
        "dominant": max(t.tissues, key=t.tissues.get).capitalize(),
        "necrosis": "Under 5 percent" if share < 0.05 else "5 to 15 percent" if share < 0.15 else "Over 15 percent",
        "lymphocytes": "Dense" if many else "Sparse",
        "motif": t.motif.capitalize(),
        "class": t.tumour_class.capitalize(),
        "differential": t.tumour_class.capitalize(),
        "grade": f"Grade {1 + (share > 0.05) + (share > 0.15)}",
        "treatment": {"a": "Surgical resection", "s": "Radiotherapy", "m": "Checkpoint inhibitor"}.get(t.tumour_class[0])
        if t.tumour_class != "small cell carcinoma"
        else "Platinum chemotherapy",
        "immune": "Inflamed" if many else "Immune desert",
        "outlook": "Favourable" if share < 0.05 else "Intermediate" if share < 0.15 else "Poor",
    }[family]


def test_answers_are_what_was_drawn():
    for truth, q in _asked(SMALL, "train", 60) + _asked(ps.SlideConfig(), "test", 8):
        right = q.options["ABCD".index(q.letter)]
        assert right == _naive_answer(truth, q.family, q.question, q.options), (truth, q)
        assert 2 <= len({*q.options}) == len(q.options) <= 4
        if q.family == "present":  # only one is right
            assert sum(o.lower() in truth.tissues for o in q.options) == 1
        assert {*ps.FAMILIES[q.family].facts} <= asdict(truth).keys()


def test_features_are_prototypes_and_stain():
    """Without its stain a slide's patches lie around the prototype of the tissue, the class and the motif that the truth says."""
    cfg = evolve(SMALL, patches=(3000, 3000))
    p = ps.prototypes(cfg)
    np.testing.assert_allclose(
        np.linalg.norm(np.concatenate([p.tissues, p.classes, p.motifs]), axis=1), [4] * 8 + [3] * 4 + [6] * 4, rtol=1e-5
    )
    axes = np.concatenate([p.tissues, p.classes, p.motifs])
    np.testing.assert_allclose(axes @ axes.T, np.diag((axes**2).sum(1)), atol=1e-4)
    for number in range(5):
        s = ps.draw_slide(cfg, "train", number)
        assert s.features.dtype == np.float16
        assert s.features.shape == (3000, 32)
        expected = p.tissues[s.tissue]
        tumour = s.tissue == ps.TISSUES.index("tumour")
        expected[tumour] += p.classes[list(ps.CLASSES).index(s.truth.tumour_class)]
        if s.truth.motif != "none":
            expected[s.motif_rows] += p.motifs[list(ps.MOTIFS).index(s.truth.motif)]
        left = s.features.astype(np.float32) - expected
        for k in range(len(ps.TISSUES)):  # the shift is the slide's, the same in every tissue
            if (s.tissue == k).sum() > 200:
                assert np.abs(left[s.tissue == k].mean(0) - left.mean(0)).max() < 0.2
        left -= left.mean(0)
        assert 0.45 < np.median(left.std(0)) < 0.75
        assert np.abs(left[s.motif_rows]).max(initial=0) < 4
    shifts = [ps.draw_slide(cfg, "train", i).features.astype(np.float32).mean(0) @ p.stain[0] for i in range(10)]
    assert np.std(shifts) > 0.5


def test_tissues_are_counted_and_lie_together():
    for number in range(6):
        s = ps.draw_slide(evolve(SMALL, patches=(2000, 2000)), "train", number)
        found = Counter(ps.TISSUES[k] for k in s.tissue)
        assert found == s.truth.tissues
        assert sum(found.values()) == s.truth.patches == len(s.features)
        assert len(found.keys() & {*ps.OPTIONAL}) == 2
        gaps = found[s.truth.dominant] - max(n for t, n in found.items() if t != s.truth.dominant)
        assert gaps > 0.05 * s.truth.patches
        at = {tuple(c): k for c, k in zip(s.coords // s.patch_size, s.tissue, strict=True)}
        pairs = [(k, at[x + 1, y]) for (x, y), k in at.items() if (x + 1, y) in at]
        assert len(pairs) > 0.85 * len(at), "patches lie together"
        assert np.mean([a == b for a, b in pairs]) > 0.75, "and so do those of a tissue"


def test_motif_lies_in_its_tissue():
    seen = Counter()
    for number in range(20):
        s = ps.draw_slide(evolve(SMALL, patches=(9000, 9000)), "train", number)
        seen[s.truth.motif] += 1
        assert len(s.motif_rows) == s.truth.motif_patches == len({*s.motif_rows})
        assert (s.truth.motif_patches == 0) == (s.truth.motif == "none")
        if s.truth.motif != "none":
            assert 1 <= s.truth.motif_patches <= 5
            assert {ps.TISSUES[k] for k in s.tissue[s.motif_rows]} == {ps.MOTIFS[s.truth.motif]}
            at = s.coords[s.motif_rows] // s.patch_size
            assert np.abs(at - at[0]).max() < 20, "a cluster"
    assert len(seen) == 5


def test_coords_are_a_grid_row_by_row():
    sizes = set()
    for number in range(8):
        s = ps.draw_slide(SMALL, "valid", number)
        assert s.coords.dtype == np.int64
        assert s.coords.min() >= 0
        assert len({tuple(c) for c in s.coords}) == len(s.coords)
        assert ((s.coords - s.coords[0]) % s.patch_size == 0).all()
        assert (np.lexsort((s.coords[:, 0], s.coords[:, 1])) == np.arange(len(s.coords))).all()
        sizes.add(s.patch_size)
    assert sizes == {256, 512}


def test_labels_and_letters_are_balanced():
    truths = [ps.draw_truth(SMALL, "train", i) for i in range(60)]
    assert Counter(t.tumour_class for t in truths) == dict.fromkeys(ps.CLASSES, 15)
    assert Counter(t.grade for t in truths) == {1: 20, 2: 20, 3: 20}
    assert Counter(t.lymphocytes for t in truths) == {"low": 30, "high": 30}
    assert Counter(t.motif for t in truths) == dict.fromkeys([*ps.MOTIFS, "none"], 12)
    assert Counter(x for t in truths for x in ps.OPTIONAL if x in t.tissues) == dict.fromkeys(ps.OPTIONAL, 30)
    letters = Counter((q.family, len(q.options), q.letter) for _, q in _asked(SMALL, "train", 60))
    assert {n for _, n, _ in letters} == {2, 3, 4}
    assert letters == {(f, n, letter): 60 // n for f, n, _ in letters for letter in "ABCD"[:n]}


def test_labels_tell_nothing_of_each_other():
    truths = [ps.draw_truth(SMALL, "train", i) for i in range(600)]
    kinds = [[getattr(t, k) for t in truths] for k in ("tumour_class", "grade", "lymphocytes", "motif")]
    for i, a in enumerate(kinds):
        for b in kinds[:i]:
            table = np.array([[sum(x == u and y == v for x, y in zip(a, b, strict=True)) for v in sorted({*b})] for u in sorted({*a})])
            expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
            assert ((table - expected) ** 2 / expected).sum() < 3 * table.size


def test_questions_without_slides_are_guesses():
    """What is right most often of an option's text, learnt on 300 slides, answers others no better than chance."""
    right, shown = Counter(), Counter()
    for _, q in _asked(SMALL, "train", 300):
        right[q.family, q.options["ABCD".index(q.letter)]] += 1
        shown.update((q.family, o) for o in q.options)
    hits, chance = [], []
    for _, q in _asked(SMALL, "valid", 120):
        best = max(q.options, key=lambda o: right[q.family, o] / max(1, shown[q.family, o]))
        hits.append("ABCD"[q.options.index(best)] == q.letter)
        chance.append(CHANCE[len(q.options)])
    assert abs(np.mean(hits) - np.mean(chance)) < 0.04
    yes = [q.options["ABCD".index(q.letter)] for _, q in _asked(SMALL, "train", 300) if q.family in ("tissue", "motif_there")]
    assert 0.44 < np.mean([a == "Yes" for a in yes]) < 0.56


def test_the_mean_shows_the_class_and_not_the_motif():
    from sklearn.linear_model import LogisticRegression

    cfg = evolve(SMALL, patches=(1000, 1500))
    axes = ps.prototypes(cfg).motifs / 6
    means, peaks, truths = [], [], []
    for i in range(180):
        s = ps.draw_slide(cfg, "train", i)
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


def test_captions_say_what_was_drawn():
    for i in range(60):
        t = ps.draw_truth(SMALL, "train", i)
        two = ps.captions(SMALL, "train", i)
        assert len(two) == 2
        for asked, text in two:
            low = text.lower()
            assert asked.startswith("<image>\n")
            assert [c for c in ps.CLASSES if c in low] == [t.tumour_class]
            assert f"grade {t.grade}" in low
            assert {m for m in ps.MOTIFS if m in low} == {t.motif} - {"none"}
            assert {x for x in ps.OPTIONAL if x in low} == t.tissues.keys() & {*ps.OPTIONAL}
            assert t.dominant in low
            assert ("dense" in low or "many" in low) == (t.lymphocytes == "high")
            words = (("under 5", "hardly any"), ("5 to 15", "some necrosis"), ("over 15", "much necrosis"))
            assert [k + 1 for k, said in enumerate(words) if any(w in low for w in said)] == [t.grade]
    assert len({text for i in range(60) for _, text in ps.captions(SMALL, "train", i)}) == 120


def test_files_hold_the_slides(folder):
    s = ps.draw_slide(CFG, "train", 5)
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
    s = ps.draw_slide(CFG, "test", 1)
    read = read_slide(find_features(folder / "features", [s.name])[s.name])
    np.testing.assert_array_equal(read.features, s.features)
    np.testing.assert_array_equal(read.coords, s.coords)
    assert (read.name, read.patch_size, read.magnification, read.encoder) == (s.name, s.patch_size, 20, "phantom")


def test_tables_have_their_shapes(folder):
    with open(folder / "test.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    asked = _asked(CFG, "test", 3)
    assert tuple(rows[0]) == ps.COLUMNS
    for row, (truth, q) in zip(rows, asked, strict=True):
        assert [row[k] for k in "ABCD"] == [*q.options, "", ""][:4]
        assert (row["Slide"], row["Question"], row["Answer"]) == (truth.name, q.question, q.letter)
        assert row["Narrow Category"] == ps.FAMILIES[q.family].narrow
        assert row["Tumor"] == ps.CLASSES[truth.tumour_class][0]
    assert {r["Broad Category"] for r in rows} == {"Microscopy", "Diagnosis", "Clinical"}
    assert Counter(r["Narrow Category"] for r in rows)["Rare Motifs"] == 6
    for name in ("train", "valid", "captions"):
        items = json.loads((folder / f"{name}.json").read_text())
        assert len({item["id"] for item in items}) == len(items)
        for item in items:
            assert (folder / item["image"][0]).is_file()
            human, gpt = item["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert human["value"].count("<image>") == 1
            if name != "captions":
                assert gpt["value"] in human["value"].split("\n")[2:]
    labels = files.read_csv(folder / "labels.csv", ["slide", "split", "class", "grade", "lymphocytes", "motif"])
    lines = _lines(folder)
    assert len(labels) == len(lines) == 65
    for row, line in zip(labels, lines, strict=True):
        assert (row["slide"], row["split"], row["class"], row["motif"]) == tuple(
            line[k] for k in ("name", "split", "tumour_class", "motif")
        )
    assert [q["id"] for line in lines if line["split"] == "test" for q in line["questions"]] == [r["ID"] for r in rows]
    assert lines[3]["motif_rows"] == ps.draw_slide(CFG, "train", 3).motif_rows.tolist()


def test_prompt_is_the_benchmark_script_s():
    assert ps.prompt("Which?", ("Fat", "Mucus")) == "<image>\nWhich?\nA. Fat\nB. Mucus"


def test_same_files_twice_and_tables_are_left_alone(folder, tmp_path):
    cfg = evolve(CFG, train=2, valid=1, test=1)
    counts = ps.draw_slides(cfg, tmp_path)
    one = "features/TCGA-TR-0001-01Z-00-DX1.h5"
    assert (tmp_path / one).read_bytes() == (folder / one).read_bytes(), "a slide does not depend on how many others there are"
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    assert before.keys() == {"train.json", "valid.json", "captions.json", "test.csv", "labels.csv", "truth.jsonl"}
    for name in before:
        (tmp_path / name).write_text("mine")
    (tmp_path / one).unlink()
    assert ps.draw_slides(cfg, tmp_path) == counts
    assert {(tmp_path / name).read_text() for name in before} == {"mine"}
    assert not (tmp_path / one).exists(), "nothing is drawn where the last table is there"
    for name in before:
        (tmp_path / name).unlink()
    ps.draw_slides(cfg, tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_a_slide_is_pure_in_seed_split_and_number():
    def features(cfg=SMALL, split="train", number=0):
        return ps.draw_slide(cfg, split, number).features.tobytes()

    assert features() == features(evolve(SMALL, train=9, test=7))
    others = [features(evolve(SMALL, seed=1)), features(number=1), features(split="valid"), features(split="test")]
    assert len({features(), *others}) == 5
    names = {ps.draw_truth(SMALL, s, i).name for s in ps.SPLITS for i in range(40)}
    assert len(names) == 120


def test_sizes():
    cfg = ps.SlideConfig(dim=32, patches=(300, 4000))
    n = [ps.draw_truth(cfg, "train", i).patches for i in range(400)]
    assert 300 <= min(n) < 330
    assert 3600 < max(n) <= 4000
    assert 950 < np.median(n) < 1250  # log-uniform: 1095
    assert [ps.draw_truth(cfg, "test", i).patches for i in range(4)] == [200_000, 92_832, 43_089, 20_000]
    assert ps.draw_truth(cfg, "test", 4).patches <= 4000
    small = ps.draw_slide(evolve(cfg, patches=(100, 100)), "train", 0)
    assert len(small.features) == 100
    start = time.perf_counter()
    assert np.isfinite(ps.draw_slide(cfg, "test", 0).features).all()
    assert time.perf_counter() - start < 5, "200,000 patches take a fraction of a second"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid": 0}, r"slides in every split and large of 0 to test, got .*valid=0"),
        ({"large": 121}, r"slides in every split and large of 0 to test, got .*large=121"),
        ({"large": -1}, r"slides in every split and large of 0 to test, got .*large=-1"),
        ({"patches": (99, 200)}, r"patches must be 100 <= low <= high, largest >= 20000, got .*\(99, 200\)"),
        ({"patches": (300, 200)}, r"patches must be 100 <= low <= high, largest >= 20000, got .*\(300, 200\)"),
        ({"largest": 10_000}, r"patches must be 100 <= low <= high, largest >= 20000, got .*largest=10000"),
        ({"dim": 31}, "dim >= 32 and seed >= 0, got dim=31, seed=0"),
        ({"seed": -1}, "dim >= 32 and seed >= 0, got dim=64, seed=-1"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ps.SlideConfig(**change)


@pytest.mark.parametrize(("split", "number"), [("dev", 0), ("train", -1)])
def test_errors_of_a_slide(split, number):
    with pytest.raises(ValueError, match=f"split must be of train, valid, test and number >= 0, got '{split}', {number}"):
        ps.draw_slide(CFG, split, number)
