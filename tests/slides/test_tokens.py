"""slide_tokens: features from a folder or a store are the same arrays, tokens are those of the whole slide, made once and found again."""

import multiprocessing
import os
import shutil
import signal

import h5py
import numpy as np
import pytest
import torch
from attrs import evolve

from medvl.base.tree import map_leaves
from medvl.components import compress
from medvl.components.slots import CompressConfig
from medvl.slides import features as slides
from medvl.slides import pack
from medvl.slides import tokens as slide_tokens
from medvl.slides.names import slide_name
from medvl.slides.relevance import patch_relevance
from medvl.slides.tokens import open_features, patch_weights, whole
from tests.slides.test_features import features, grid, write_clam, write_csv, write_trident

D = 6
KINDS = {
    "moe": CompressConfig(dim=D, slots=4, hidden=8),
    "soft_moe": CompressConfig(kind="soft_moe", dim=D, slots=4, hidden=8),
    "attention": CompressConfig(kind="attention", dim=D, slots=4, hidden=8, heads=2),
    "perceiver": CompressConfig(kind="perceiver", dim=D, slots=4, hidden=8, heads=2, passes=2),
}
CFG = KINDS["moe"]
SPAWN = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang


def weights(cfg, seed=0):
    return compress.init_compress(cfg, torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path):
    """Slides in five formats, one without a patch; {name: (features in 16 bits, coordinates)}."""
    place = tmp_path / "in"
    (place / "more").mkdir(parents=True)
    made = {f"S{i}": (features(n, D, "f2", i), grid(n, 512)) for i, n in enumerate((23, 0, 5, 9, 7))}
    write_trident(place / "S0.h5", *made["S0"])
    write_trident(place / "S1.h5", *made["S1"])
    write_clam(place / "more" / "S2.AB-C.h5", made["S2"][0].astype("f4"), made["S2"][1])
    torch.save(torch.from_numpy(made["S3"][0]), place / "S3.pt")
    np.save(place / "S4.npy", made["S4"][0])
    return place, {n: (x, None if n in ("S3", "S4") else xy) for n, (x, xy) in made.items()}


@pytest.fixture
def store(folder, tmp_path):
    pack.pack(sorted(p for p in folder[0].rglob("*.*")), tmp_path / "s.h5", encoder="uni_v1")
    return tmp_path / "s.h5"


def counted(monkeypatch):
    """Every slide that is compressed, as the number of its patches."""
    seen, real = [], compress.compress_stream

    def counting(cfg, params, chunks):
        seen.append(sum(len(x) for x in chunks()))
        return real(cfg, params, chunks)

    monkeypatch.setattr(compress, "compress_stream", counting)
    return seen


def alike(a, b):
    assert list(a) == list(b)
    for n, t in a.items():
        torch.testing.assert_close(t, b[n], rtol=2e-3, atol=1e-4)  # 16 bits: a step more or less


# Features -------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("error")
def test_a_folder_and_a_store_give_the_same(folder, store):
    place, made = folder
    names = ["./x/S3.csv", "S0", "S2", "gone-1", "S1.svs", "S4", "gone-2", "S0"]
    of, packed = open_features(place, names), open_features(store, names)
    for found in (of, packed):
        assert found.names == ("./x/S3.csv", "S0", "S2", "S1.svs", "S4")
        assert found.missing == ("gone-1", "gone-2")
        assert found.dims == D
        assert [found.patch_size(n) for n in found.names] == [None, 512, 512, 512, None]
        for n in found.names:
            x, xy = made[slide_name(n)]
            parts = list(found.chunks(n, 4))
            assert [len(p) for p, _ in parts] == [4] * (len(x) // 4) + [len(x) % 4] * (len(x) % 4 > 0)
            np.testing.assert_array_equal(np.concatenate([x[:0], *(p for p, _ in parts)]), x)
            assert all(torch.from_numpy(p).isfinite().all() for p, _ in parts)
            if xy is None:
                assert all(c is None for _, c in parts)
            else:
                np.testing.assert_array_equal(np.concatenate([xy[:0], *(c for _, c in parts)]), xy)
            np.testing.assert_array_equal(whole(found, n), x)
            np.testing.assert_array_equal(whole(found, n, 5), x[slides.sample_rows(len(x), 5)])
        assert whole(found, "S1.svs").shape == (0, D)
    assert open_features(place, []).names == open_features(store, []).names == ()


def test_the_size_of_a_patch_is_that_of_read_slide(folder, caplog):
    place, _ = folder
    of = open_features(place, ["S0", "S1", "S2", "S3"])
    assert of.patch_size("S0") == of.patch_size("S1") == 512
    assert not caplog.text
    assert of.patch_size("S2") == slides.read_slide(place / "more" / "S2.AB-C.h5").patch_size == 512
    assert len({r.getMessage() for r in caplog.records}) == 1  # both say it
    assert of.patch_size("S3") is None


def test_columns_behind_the_features(tmp_path):
    x = features(9, 64)
    write_csv(tmp_path / "A.csv", np.hstack([x, grid(9)]), header=False)
    of = open_features(tmp_path, ["A"], dims=64)
    assert of.dims == 64
    np.testing.assert_allclose(whole(of, "A"), x, atol=6e-5)


def test_which_slide_is_not_guessed(folder, store):
    place, _ = folder
    with pytest.raises(ValueError, match="no such folder"):
        open_features(place / "nothing", ["S0"])
    with pytest.raises(ValueError, match="not a whole store"):
        open_features(place / "S3.pt", ["S0"])
    shutil.copy(place / "S0.h5", place / "more" / "S0.h5")
    with pytest.raises(
        ValueError,
        match=r"open_features: S0 must have one file, there are .*S0.h5, .*more/S0.h5; .*remove all but one",
    ):
        open_features(place, ["S3", "S0"])
    assert open_features(place, ["S3"]).names == ("S3",)  # not asked for
    shutil.copy(place / "S0.h5", place / "S2.XY-Z.h5")
    with pytest.raises(
        ValueError,
        match=r"open_features: S2 must be one slide, 2 match: S2.AB-C, S2.XY-Z; give the full name",
    ):
        open_features(place, ["S2"])
    assert open_features(place, ["S2.AB-C"]).patch_size("S2.AB-C") == 512
    pack.pack([place / "S2.XY-Z.h5"], store, encoder="uni_v1")
    with pytest.raises(ValueError, match=r"S2 must be one slide, 2 match: S2.AB-C, S2.XY-Z"):
        open_features(store, ["S2"])


def test_a_case_is_one_bag_of_all_its_slides(tmp_path, caplog):
    """WSI-VQA asks about cases; the patches of all their slides are merged, exactly as those of one slide are."""
    case, parts = "TCGA-A2-A0YH", [features(n, D, "f2", n) for n in (9, 5)]
    for i, x in enumerate(parts, 1):
        write_trident(tmp_path / f"{case}-01Z-00-DX{i}.4A-UUID{i}.h5", x, grid(len(x), 512))
    pack.pack(sorted(tmp_path.iterdir()), tmp_path / "packed" / "s.h5")
    np.save(tmp_path / "one.npy", np.concatenate(parts))
    want = slide_tokens.slide_tokens(
        CFG, weights(CFG), open_features(tmp_path, ["one"]), tmp_path / "tokens", chunk=4
    )["one"]
    for where in (tmp_path, tmp_path / "packed" / "s.h5"):
        caplog.clear()
        of = open_features(where, [case])
        assert (
            f"{where}: 1 cases have several slides, which are taken as one bag each, such as {case}"
            in caplog.text
        )
        np.testing.assert_array_equal(whole(of, case), np.concatenate(parts))
        assert of.patch_size(case) is None  # coordinates are of each slide alone
        assert all(xy is None for _, xy in of.chunks(case, 4))
        got = slide_tokens.slide_tokens(CFG, weights(CFG), of, tmp_path / "tokens", chunk=4)[case]
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4)
        caplog.clear()
        assert open_features(where, [f"{case}-01Z-00-DX1"]).patch_size(f"{case}-01Z-00-DX1") == 512
        assert not caplog.text


def test_two_encoders_of_one_width_do_not_mix(tmp_path):
    for name, encoder in (("A", "uni_v1"), ("B", "phikon_v2"), ("C", "None")):
        write_trident(tmp_path / f"{name}.h5", features(5), grid(5))
        with h5py.File(tmp_path / f"{name}.h5", "r+") as f:
            f["features"].attrs["encoder"] = encoder
    with pytest.raises(
        ValueError, match=r"all slides must be of one encoder, A is of 'uni_v1', B is of 'phikon_v2'"
    ):
        open_features(tmp_path, ["A", "B", "C"])
    assert open_features(tmp_path, ["A", "C"]).encoder == "uni_v1"
    assert open_features(tmp_path, ["C"]).encoder == ""


def test_one_width(folder, store):
    place, _ = folder
    for where in (place, store):
        assert open_features(where, ["S0", "S3"], dims=D).dims == D
        with pytest.raises(
            ValueError, match=r"all slides must have features of one width \(8 wanted\), S\d has 6"
        ):
            open_features(where, ["S0", "S3"], dims=8)
    with pytest.raises(ValueError, match=r"one width \(8 wanted\), S0 has 6"):
        open_features(store, ["gone"], dims=8)  # also where no slide is asked for
    np.save(place / "S5.npy", features(4, 8))
    with pytest.raises(ValueError, match="all slides must have features of one width, S0 has 6, S5 has 8"):
        open_features(place, ["S0", "S5", "S3"])
    np.save(place / "S6.npy", np.zeros(0, "f4"))  # without patches, and without a width
    assert open_features(place, ["S6", "S0"]).dims == D
    assert open_features(place, ["S6"]).dims == 0
    assert whole(open_features(place, ["S6", "S0"]), "S6").shape == (0, D)


# Tokens ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_slide(folder, store, tmp_path, kind):
    place, made = folder
    cfg, params = KINDS[kind], weights(KINDS[kind])
    for i, where in enumerate((place, store)):
        got = slide_tokens.slide_tokens(
            cfg, params, open_features(where, ["S1", "S0", "S2"]), tmp_path / f"kept-{i}", chunk=4
        )
        assert list(got) == ["S1", "S0", "S2"]
        for n, t in got.items():
            assert t.dtype == torch.float32
            assert t.shape == (4, D)
            want = compress.compress(cfg, params, torch.from_numpy(made[n][0])[None]).tokens[0]
            torch.testing.assert_close(t, want, rtol=2**-10, atol=1e-6)
            assert torch.equal(t, t.half().float())
        assert not torch.allclose(got["S0"], got["S2"], atol=0.01)


def test_tokens_are_made_once(folder, tmp_path, monkeypatch):
    seen, params, names = counted(monkeypatch), weights(CFG), ["S0", "S1", "S2", "S3", "S0.h5"]
    of = open_features(folder[0], names)
    first = slide_tokens.slide_tokens(CFG, params, of, tmp_path / "kept", names=["S2"])
    assert list(first) == ["S2"]
    assert seen == [5]
    got = slide_tokens.slide_tokens(CFG, params, of, tmp_path / "kept", chunk=3)
    assert seen == [5, 23, 0, 9]
    assert torch.equal(got["S0"], got["S0.h5"])
    again = slide_tokens.slide_tokens(
        CFG, params, open_features(folder[0], names[::-1]), tmp_path / "kept", chunk=99
    )
    assert list(again) == names[::-1]
    assert all(torch.equal(got[n], again[n]) for n in names)
    shuffled = {n: params[n] for n in reversed(params)}  # the order of the weights is nothing
    slide_tokens.slide_tokens(CFG, shuffled, of, tmp_path / "kept")
    assert len(seen) == 4
    assert len([*(tmp_path / "kept").rglob("*.npy")]) == 4
    alike(got, slide_tokens.slide_tokens(CFG, params, of, tmp_path / "other", chunk=99))
    assert len(seen) == 8


def test_a_moved_store_finds_its_tokens_another_does_not(folder, store, tmp_path, monkeypatch):
    seen, params = counted(monkeypatch), weights(CFG)
    got = slide_tokens.slide_tokens(CFG, params, open_features(store, ["S0", "S3"]), tmp_path / "kept")
    store.rename(tmp_path / "moved.h5")
    alike(
        got,
        slide_tokens.slide_tokens(
            CFG, params, open_features(tmp_path / "moved.h5", ["S0", "S3"]), tmp_path / "kept"
        ),
    )
    assert len(seen) == 2
    np.save(folder[0] / "S3.npy", -folder[1]["S3"][0])
    pack.pack([folder[0] / "S0.h5", folder[0] / "S3.npy"], tmp_path / "other.h5", encoder="uni_v1")
    new = slide_tokens.slide_tokens(
        CFG, params, open_features(tmp_path / "other.h5", ["S0", "S3"]), tmp_path / "kept"
    )
    assert seen == [23, 9, 9]
    assert torch.equal(new["S0"], got["S0"])
    assert not torch.allclose(new["S3"], got["S3"], atol=0.01)


def _rewritten(path, how):
    """The file of other features: of more patches, or of the same size at the same time."""
    was, x = os.stat(path), features(24 if how == "size" else 23, D, "f2", seed=77)
    path.unlink()
    write_trident(path, x, grid(len(x), 512))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    if how == "content":
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    return x


@pytest.mark.parametrize("how", ["size", "content"])
def test_changed_features_are_computed_anew(folder, tmp_path, monkeypatch, how):
    seen, params, of = counted(monkeypatch), weights(CFG), open_features(folder[0], ["S0", "S3"])
    old = slide_tokens.slide_tokens(CFG, params, of, tmp_path / "kept")
    x = _rewritten(folder[0] / "S0.h5", how)
    new = slide_tokens.slide_tokens(CFG, params, open_features(folder[0], ["S0", "S3"]), tmp_path / "kept")
    assert seen == [23, 9, len(x)]
    torch.testing.assert_close(
        new["S0"], compress.compress(CFG, params, torch.from_numpy(x)[None]).tokens[0], rtol=2**-10, atol=1e-6
    )
    assert torch.equal(new["S3"], old["S3"])


def test_one_changed_patch_of_many_is_computed_anew(tmp_path, monkeypatch):
    seen, params, x = counted(monkeypatch), weights(CFG), features(30_000, D)
    np.save(tmp_path / "A.npy", x)
    old = slide_tokens.slide_tokens(CFG, params, open_features(tmp_path, ["A"]), tmp_path / "kept")["A"]
    was = os.stat(tmp_path / "A.npy")
    x[7000] = 1000.0
    np.save(tmp_path / "A.npy", x)
    os.utime(tmp_path / "A.npy", ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    new = slide_tokens.slide_tokens(CFG, params, open_features(tmp_path, ["A"]), tmp_path / "kept")["A"]
    assert seen == [30_000, 30_000]
    assert not torch.allclose(new, old, atol=0.01)


def test_other_weights_are_computed_anew(folder, tmp_path, monkeypatch):
    seen, params, of = counted(monkeypatch), weights(CFG), open_features(folder[0], ["S0"])
    run = lambda cfg, p: slide_tokens.slide_tokens(cfg, p, of, tmp_path / "kept")["S0"]
    first = run(CFG, params)
    nudged = map_leaves(torch.clone, params)
    nudged["experts"]["norm"]["bias"][0, 0] += 1.0
    assert not torch.equal(run(CFG, nudged), first)
    assert not torch.equal(run(evolve(CFG, top_k=1), params), first)  # the same weights, used otherwise
    assert len(seen) == 3
    assert len([*(tmp_path / "kept").iterdir()]) == 3
    assert torch.equal(run(CFG, map_leaves(torch.clone, params)), first)
    assert len(seen) == 3


def _written(place, names, kept):
    slide_tokens.slide_tokens(CFG, weights(CFG), open_features(place, names), kept)


def _killed(place, names, kept):
    def half(f, x, **_):
        f.write(b"\x93NUMPY half of it")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    np.save = half
    _written(place, names, kept)


def test_a_killed_writer_leaves_no_half_file(folder, tmp_path):
    params, of = weights(CFG), open_features(folder[0], ["S0", "S3"])
    one = SPAWN.Process(target=_killed, args=(folder[0], ["S0", "S3"], tmp_path / "kept"))
    one.start()
    one.join(60)
    assert one.exitcode == -signal.SIGKILL
    assert list((tmp_path / "kept").rglob(".*.tmp"))  # it was writing
    assert not list((tmp_path / "kept").rglob("*.npy"))
    alike(
        slide_tokens.slide_tokens(CFG, params, of, tmp_path / "kept"),
        slide_tokens.slide_tokens(CFG, params, of, tmp_path / "other"),
    )


def test_processes_at_the_same_time(folder, tmp_path, monkeypatch):
    params, names = weights(CFG), ["S0", "S1", "S2", "S3", "S4"]
    both = [
        SPAWN.Process(target=_written, args=(folder[0], some, tmp_path / "kept"))
        for some in (names, names[::-1])
    ]
    for p in both:
        p.start()
    for p in both:
        p.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    seen, of = counted(monkeypatch), open_features(folder[0], names)
    got = slide_tokens.slide_tokens(CFG, params, of, tmp_path / "kept")
    assert not seen
    alike(got, slide_tokens.slide_tokens(CFG, params, of, tmp_path / "other"))
    assert not list((tmp_path / "kept").rglob(".*"))


def test_tokens_errors(folder, tmp_path):
    params, (place, _) = weights(CFG), folder
    of, kept = open_features(place, ["S0", "S3"]), tmp_path / "kept"
    with pytest.raises(ValueError, match="every slide must have features, 1 have none, the first is S4"):
        slide_tokens.slide_tokens(CFG, params, of, kept, names=["S0", "S4"])
    wide = evolve(CFG, dim=8)
    for call in (
        lambda: slide_tokens.slide_tokens(wide, weights(wide), of, kept),
        lambda: patch_weights(wide, weights(wide), of, "S0"),
    ):
        with pytest.raises(
            ValueError, match=r"slide S0: .*x must be floating point \[c, 8\], got torch.float16 \[23, 6\]"
        ):
            call()
    np.save(place / "S7.npy", np.where(np.arange(42).reshape(7, D) == 25, np.nan, features(7, D)))
    bad = open_features(place, ["S7"])
    for call in (
        lambda: slide_tokens.slide_tokens(CFG, params, bad, kept),
        lambda: patch_weights(CFG, params, bad, "S7"),
    ):
        with pytest.raises(ValueError, match=r"slide S7: .*patch 4 .*holds NaN or infinity"):
            call()
    np.save(place / "S8.npy", features(7, D) * 1e6)
    with pytest.raises(
        ValueError, match="slide S8: its tokens are beyond 16 bits; are the features normalised"
    ):
        slide_tokens.slide_tokens(CFG, params, open_features(place, ["S8"]), kept)
    assert not list(kept.rglob("*.npy"))
    slide_tokens.slide_tokens(CFG, params, of, kept, names=["S0"])
    (path,) = kept.rglob("*.npy")
    for content in (b"", path.read_bytes()[:-1], b"other"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must hold an array \[4, 6\] and is broken .*; remove it"):
            slide_tokens.slide_tokens(CFG, params, of, kept)
    np.save(path, np.zeros((4, 8), "f2"))
    with pytest.raises(ValueError, match=r"must hold an array \[4, 6\], found \[4, 8\]; remove it"):
        slide_tokens.slide_tokens(CFG, params, of, kept)


# Weights --------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_the_mass_and_attribution_is_exact(folder, store, kind):
    place, made = folder
    cfg, params, slots = KINDS[kind], weights(KINDS[kind], 3), np.array([2.0, -1.0, 0.5, 3.0])
    for where in (place, store):
        of = open_features(where, ["S0", "S3"])
        for n in of.names:
            x, xy = made[n]
            want = compress.compress(cfg, params, torch.from_numpy(x)[None], routing=True)
            w, at = patch_weights(cfg, params, of, n, chunk=4)
            assert w.shape == (len(x), 4)
            np.testing.assert_allclose(w, want.routing[0].numpy(), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(w.sum(0), want.mass[0].numpy(), rtol=1e-5, atol=1e-6)
            if xy is None:
                assert at is None
            else:
                np.testing.assert_array_equal(at, xy)
            relevance = patch_relevance(w, slots)
            shares = want.routing[0] / want.mass[0].where(want.mass[0] > 0, 1)
            np.testing.assert_allclose(relevance, shares.double().numpy() @ slots, rtol=1e-3, atol=1e-5)
            assert relevance.sum() == pytest.approx(slots[w.sum(0) > 0].sum(), rel=1e-9)


def test_a_score_of_the_means_is_shared_out_whole(folder):
    """A token that is the mean of its patches by their weights, and a score linear in tokens: what patches bring adds up to the score."""
    place, made = folder
    params, x = weights(CFG, 1), made["S0"][0].astype(float)
    params["experts"]["norm"] = map_leaves(
        torch.zeros_like, params["experts"]["norm"]
    )  # tokens are the means alone
    w, _ = patch_weights(CFG, params, open_features(place, ["S0"]), "S0", chunk=5)
    tokens = compress.compress(CFG, params, torch.from_numpy(x)[None]).tokens[0].numpy()
    np.testing.assert_allclose((w / w.sum(0)).T @ x, tokens, rtol=1e-4, atol=1e-5)
    slope = np.random.default_rng(0).standard_normal(tokens.shape)
    assert patch_relevance(w, (slope * tokens).sum(1)).sum() == pytest.approx(
        (slope * tokens).sum(), rel=1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_slide_without_patches(folder, store, tmp_path, kind):
    cfg, params = KINDS[kind], weights(KINDS[kind])
    for where in (folder[0], store):
        of = open_features(where, ["S1"])
        got = slide_tokens.slide_tokens(cfg, params, of, tmp_path / "kept")["S1"]
        assert got.isfinite().all()
        torch.testing.assert_close(
            got, compress.compress(cfg, params, torch.zeros(1, 0, D)).tokens[0], rtol=2**-10, atol=1e-6
        )
        w, at = patch_weights(cfg, params, of, "S1")
        assert w.shape == (0, 4)
        assert w.dtype == np.float32
        assert at is None
        assert patch_relevance(w, np.ones(4)).shape == (0,)
