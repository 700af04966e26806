"""A store of slides gives back what was packed and survives a killed packer; the check before a training lists all that is wrong."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import time

import h5py
import numpy as np
import pytest
import torch

from medvl.base import files
from medvl.slides import features as slides
from medvl.slides import store as slide_store
from medvl.slides.pack import Packed, pack
from medvl.slides.store import open_slides
from medvl.slides.tokens import open_slide
from tests.slides.test_features import features, grid, write_clam, write_csv, write_trident

D = 6


def files_of(folder):
    return sorted(p for p in folder.iterdir() if p.suffix != ".tmp")


def test_what_is_packed_is_read(folder, tmp_path, caplog):
    source, made = folder
    packed = pack(files_of(source), tmp_path / "s.h5", encoder="uni_v1", size=4)
    assert packed == Packed(written=4, skipped=0, patches=25, dropped=0, empty=1)
    store = pickle.loads(pickle.dumps(open_slides(tmp_path / "s.h5")))
    assert (store.names, store.dims, store.dtype, store.encoder) == (
        ("S0", "S1", "S2", "S3"),
        D,
        np.dtype("f2"),
        "uni_v1",
    )
    for name, (x, xy) in made.items():
        xy = None if name == "S3" else xy
        slide, parts, about = store.read(name), list(store.chunks(name, 4)), store.about(name)
        assert slide.features.dtype == np.float16
        assert slide.features.shape == x.shape
        np.testing.assert_array_equal(slide.features, x)
        np.testing.assert_array_equal(np.concatenate([x[:0], *(p[0] for p in parts)]), x)
        assert [len(p[0]) for p in parts] == [4] * (len(x) // 4) + [len(x) % 4] * (len(x) % 4 > 0)
        assert (about.rows, about.dims, about.has_coords) == (len(x), D, xy is not None)
        if xy is None:
            assert slide.coords is None
            assert parts[0][1] is None
        else:
            np.testing.assert_array_equal(slide.coords, xy)
            np.testing.assert_array_equal(np.concatenate([xy[:0], *(p[1] for p in parts)]), xy)
        held = x.tobytes() + (b"" if xy is None else xy.astype("<i8").tobytes())
        assert store.source(name) == (
            f"{name}.pt" if name == "S3" else f"{name}.h5",
            hashlib.sha256(held).hexdigest(),
        )
    known = {
        n: (store.read(n).patch_size, store.read(n).magnification, store.read(n).encoder) for n in store.names
    }
    assert known == {
        "S0": (512, 20, "uni_v1"),
        "S1": (512, 20, "uni_v1"),
        "S2": (512, None, "uni_v1"),
        "S3": (None, None, "uni_v1"),
    }
    assert "the patch size of 1 slides (S2) is not given in the files" in caplog.text
    with h5py.File(tmp_path / "s.h5") as f:  # plain h5py reads it
        row = f["rows"][2]
        np.testing.assert_array_equal(
            f["features"][row["start"] : row["start"] + row["count"]], made["S2"][0]
        )
        assert f["features"].shape == (25, D)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_keep_their_bits_in_float32_and_are_rounded_in_float16(tmp_path, dtype):
    x = features(40, 3) * 100
    write_clam(tmp_path / "a.h5", x, grid(40))
    pack([tmp_path / "a.h5"], tmp_path / "s.h5", dtype=dtype)
    np.testing.assert_array_equal(open_slides(tmp_path / "s.h5").read("a").features, x.astype(dtype))


def test_overflow_names_the_slide_and_the_others_are_packed(folder, tmp_path):
    source, _ = folder
    x = features(7, D)
    x[3, 2] = -70000
    np.save(source / "big.npy", x)
    with pytest.raises(
        ValueError,
        match=r"s.h5: 4 slides are packed now, 1 of 5 cannot be: big: holds 70000, float16 ends at 65504",
    ) as e:
        pack(files_of(source), tmp_path / "s.h5", encoder="uni_v1")
    assert "dtype='float32'" in str(e.value)
    assert open_slides(tmp_path / "s.h5").names == ("S0", "S1", "S2", "S3")
    with pytest.raises(ValueError, match=r"s.h5: 'big' is not written \(yet\)"):
        open_slides(tmp_path / "s.h5").read("big")
    x[3, 2] = 1
    np.save(source / "big.npy", x)  # mended: there is room for it
    before = os.stat(tmp_path / "s.h5").st_ino
    assert pack(files_of(source), tmp_path / "s.h5", encoder="uni_v1").written == 1
    assert os.stat(tmp_path / "s.h5").st_ino == before
    np.testing.assert_array_equal(open_slides(tmp_path / "s.h5").read("big").features, x.astype("f2"))


def test_slides_of_another_kind_are_refused(folder, tmp_path):
    source, _ = folder
    np.save(source / "wide.npy", features(3, D + 1))
    with pytest.raises(
        ValueError, match=r"the same dims, found 6 \(4, such as S0\), 7 \(1, such as wide\); give dims="
    ):
        pack(files_of(source), tmp_path / "s.h5", encoder="uni_v1")
    assert not (tmp_path / "s.h5").exists()
    write_trident(source / "virchow.h5", features(3, D), grid(3))
    with h5py.File(source / "virchow.h5", "r+") as f:
        f["features"].attrs["encoder"] = "virchow"
    with pytest.raises(
        ValueError, match=r"the same encoder, found uni_v1 \(2, such as S0\), virchow \(1, such as virchow\)"
    ):
        pack(files_of(source), tmp_path / "s.h5", dims=D)
    with pytest.raises(ValueError, match=r"4 slides are packed now, 2 of 6 cannot be") as e:
        pack(files_of(source), tmp_path / "s.h5", dims=D, encoder="uni_v1")
    assert "virchow is of the encoder 'virchow', the store's is 'uni_v1'" in str(e.value)
    assert "wide has 7 features per patch, the store 6" in str(e.value)
    np.save(source / "late.npy", features(3, D))  # says no encoder, and nobody says it for it
    with pytest.raises(
        ValueError,
        match=r"0 slides are packed now, 1 of 1 cannot be: late does not say its encoder, .* give encoder='uni_v1'",
    ):
        pack([source / "late.npy"], tmp_path / "s.h5")
    with pytest.raises(
        ValueError,
        match="was made with other settings: dims 7, it has 6; encoder 'x', it has 'uni_v1'; dtype 'float32'",
    ):
        pack([source / "late.npy"], tmp_path / "s.h5", dims=7, encoder="x", dtype="float32")
    pack([source / "S3.pt"], tmp_path / "unknown.h5")
    with pytest.raises(ValueError, match="S0 is of the encoder 'uni_v1', the store's is 'unknown'"):
        pack([source / "S0.h5"], tmp_path / "unknown.h5")


def test_arguments_that_make_no_store(folder, tmp_path):
    source, _ = folder
    with pytest.raises(ValueError, match="needs files, dtype float16 or float32 and size >= 1, got 0 files"):
        pack([], tmp_path / "s.h5")
    with pytest.raises(ValueError, match="'int8' and 4096"):
        pack(files_of(source), tmp_path / "s.h5", dtype="int8")
    with pytest.raises(ValueError, match=r"two files are called 'S3': .*S3.pt and .*S3.csv"):
        pack([source / "S3.pt", source / "S3.csv"], tmp_path / "s.h5")
    np.save(source / "e.npy", np.zeros(0, "f4"))
    with pytest.raises(ValueError, match="no file says how many features"):
        pack([source / "e.npy"], tmp_path / "s.h5")
    assert pack([source / "e.npy"], tmp_path / "s.h5", dims=D).empty == 1
    assert open_slides(tmp_path / "s.h5").read("e").features.shape == (0, D)


def test_bad_patches(folder, tmp_path, caplog):
    source, made = folder
    x = made["S3"][0].copy()
    x[[2, 5]] = np.nan
    np.save(source / "bad.npy", x)
    with pytest.raises(ValueError, match=r"1 of 1 cannot be: .*bad.npy: patch 2 \(from 0\) holds NaN"):
        pack([source / "bad.npy"], tmp_path / "s.h5")
    assert pack([source / "bad.npy"], tmp_path / "s.h5", drop=True) == Packed(
        written=1, skipped=0, patches=7, dropped=2, empty=0
    )
    assert "2 of 9 patches hold NaN" in caplog.text
    want = np.delete(x, [2, 5], 0)
    np.testing.assert_array_equal(open_slides(tmp_path / "s.h5").read("bad").features, want)
    pack([source / "S3.pt"], tmp_path / "s.h5")  # makes room: the dropped patches take none there
    store = open_slides(tmp_path / "s.h5")
    np.testing.assert_array_equal(store.read("bad").features, want)
    np.testing.assert_array_equal(store.read("S3").features, made["S3"][0])


def test_more_slides_later(folder, tmp_path):
    source, made = folder
    everything = files_of(source)
    assert pack(everything[2:], tmp_path / "s.h5", encoder="uni_v1").written == 2
    old = open_slides(tmp_path / "s.h5")
    was = {n: (old.read(n), old.source(n), old.about(n)) for n in old.names}
    assert pack(everything, tmp_path / "s.h5", encoder="uni_v1") == Packed(
        written=2, skipped=2, patches=11, dropped=0, empty=1
    )
    store = open_slides(tmp_path / "s.h5")
    assert sorted(store.names) == ["S0", "S1", "S2", "S3"]
    for name, (slide, source_name, about) in was.items():
        np.testing.assert_array_equal(store.read(name).features, slide.features)
        assert (store.source(name), store.about(name)) == (source_name, about)
    np.testing.assert_array_equal(store.read("S0").features, made["S0"][0])
    with pytest.raises(ValueError, match="was replaced since it was opened; open it again"):
        old.read("S2")
    same = (tmp_path / "s.h5").read_bytes()
    assert pack(everything, tmp_path / "s.h5", encoder="uni_v1").skipped == 4
    assert (tmp_path / "s.h5").read_bytes() == same


def test_a_slide_without_its_flag_is_absent(folder, tmp_path, monkeypatch):
    """A packer that ends between the row and the flag: the bytes are there, the slide is not."""
    source, made = folder
    calls, fsync = [], os.fsync

    def killed(fd):
        calls.append(fd)
        if len(calls) == 4:  # the empty file, S0, its flag, S1
            raise KeyboardInterrupt
        fsync(fd)

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        pack([source / "S0.h5", source / "S3.pt", source / "S2.h5"], tmp_path / "s.h5", encoder="uni_v1")
    monkeypatch.undo()
    with h5py.File(tmp_path / "s.h5") as f:
        assert f["rows"]["done"].tolist() == [1, 0, 0]
        np.testing.assert_array_equal(f["features"][11:20], made["S3"][0])
    assert open_slides(tmp_path / "s.h5").names == ("S0",)
    assert (
        pack(
            [source / "S0.h5", source / "S3.pt", source / "S2.h5"], tmp_path / "s.h5", encoder="uni_v1"
        ).written
        == 2
    )
    for name in ("S0", "S3", "S2"):
        np.testing.assert_array_equal(open_slides(tmp_path / "s.h5").read(name).features, made[name][0])


def test_a_killed_packer_loses_nothing_that_was_done(tmp_path):
    """Killed by the system at some moment, then run again: the store is byte for byte that of a run left in peace."""
    (tmp_path / "in").mkdir()
    for i in range(60):
        np.save(tmp_path / "in" / f"n{i:02}.npy", features(3000, 64, "f2", i))
    out = tmp_path / "killed.h5"
    run = multiprocessing.get_context("spawn").Process(
        target=pack, args=(sorted((tmp_path / "in").iterdir()), out)
    )
    run.start()
    until = time.monotonic() + 60
    while time.monotonic() < until and not (out.exists() and len(open_slides(out).names) > 3):
        time.sleep(0.001)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    done = open_slides(out).names
    assert 3 < len(done) < 60
    for name in done:
        np.testing.assert_array_equal(
            open_slides(out).read(name).features, np.load(tmp_path / "in" / f"{name}.npy")
        )
    packed = pack(sorted((tmp_path / "in").iterdir()), out)
    assert (packed.written, packed.skipped) == (60 - len(done), len(done))
    pack(sorted((tmp_path / "in").iterdir()), tmp_path / "whole.h5")
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_one_packer_at_a_time(folder, tmp_path):
    source, _ = folder
    with files.file_lock(tmp_path / "s.h5"), pytest.raises(ValueError, match="another run is writing to it"):
        pack(files_of(source), tmp_path / "s.h5")


def test_a_store_is_not_one_slide(folder, tmp_path):
    """Its slides would be laid over each other."""
    pack(files_of(folder[0]), tmp_path / "store.h5", encoder="uni_v1")
    said = r"store.h5: is a packed store of \d slides, not one slide"
    for read in (
        slides.read_slide,
        slides.about_slide,
        slides.count_bad,
        lambda path: next(slides.chunks(path)),
    ):
        with pytest.raises(ValueError, match=said):
            read(tmp_path / "store.h5")
    with pytest.raises(ValueError, match=said):
        pack([tmp_path / "store.h5"], tmp_path / "other.h5", dims=6)
    with pytest.raises(ValueError, match=said):
        open_slide(tmp_path / "store.h5")


def test_a_changed_file_is_packed_again(folder, tmp_path, caplog):
    source, made = folder
    out, everything = tmp_path / "s.h5", files_of(source)
    pack(everything, out, encoder="uni_v1")
    os.utime(source / "S2.h5", (1, 1))  # the same content
    same = out.read_bytes()
    assert pack(everything, out, encoder="uni_v1") == Packed(
        written=0, skipped=4, patches=0, dropped=0, empty=0
    )
    assert out.read_bytes() == same
    other = features(5, D, "f4", 99)
    write_clam(source / "S2.h5", other, made["S2"][1])  # as many patches, other numbers
    torch.save(torch.from_numpy(features(30, D, "f2", 98)), source / "S3.pt")  # more patches
    caplog.clear()
    assert pack(everything, out, encoder="uni_v1").written == 2
    assert "s.h5: the files of 2 slides have changed, they are packed again: S2, S3" in caplog.text
    store = open_slides(out)
    np.testing.assert_array_equal(store.read("S2").features, other.astype("f2"))
    assert store.about("S3").rows == 30
    np.testing.assert_array_equal(store.read("S0").features, made["S0"][0])
    assert pack(everything, out, encoder="uni_v1").skipped == 4


def test_a_store_of_before_has_no_keys_of_its_files(folder, tmp_path, monkeypatch):
    source, made = folder
    with monkeypatch.context() as before:
        before.setattr(slide_store, "_FIELDS", tuple(f for f in slide_store._FIELDS if f[0] != "key"))
        pack(files_of(source)[:3], tmp_path / "s.h5", encoder="uni_v1")
    assert pack(files_of(source)[:3], tmp_path / "s.h5", encoder="uni_v1").skipped == 3
    write_clam(source / "S2.h5", features(5, D, "f4", 99), made["S2"][1])
    assert pack(files_of(source), tmp_path / "s.h5", encoder="uni_v1").written == 2
    np.testing.assert_array_equal(
        open_slides(tmp_path / "s.h5").read("S2").features, features(5, D, "f4", 99).astype("f2")
    )


def test_a_run_that_packed_nothing_leaves_no_store(folder, tmp_path):
    """An empty store would refuse the next run for settings that nobody chose."""
    write_trident(tmp_path / "in" / "S0.h5", np.full((3, D), np.nan, "f4"), grid(3))
    with pytest.raises(ValueError, match="0 slides are packed now, 1 of 1 cannot be"):
        pack([tmp_path / "in" / "S0.h5"], tmp_path / "s.h5", encoder="uni_v1")
    assert not (tmp_path / "s.h5").exists()
    with pytest.raises(ValueError, match="of the encoder 'uni_v1', the store's is 'conch'"):
        pack([tmp_path / "in" / "S1.h5"], tmp_path / "s.h5", encoder="conch")
    assert not (tmp_path / "s.h5").exists()
    assert pack([tmp_path / "in" / "S3.pt"], tmp_path / "s.h5", encoder="conch").written == 1


def test_real_files(shared_data, tmp_path):
    folder = shared_data / "pathology" / "gigapath"
    pack(
        [folder / "prov_normal_000_1_trident_style.h5", folder / "prov_normal_000_1.npy"],
        tmp_path / "s.h5",
        dtype="float32",
    )
    store = open_slides(tmp_path / "s.h5")
    both = [store.read(n) for n in ("prov_normal_000_1", "prov_normal_000_1_trident_style")]
    np.testing.assert_array_equal(both[0].features[1:], both[1].features)
    np.testing.assert_array_equal(
        both[1].features, slides.read_slide(folder / "prov_normal_000_1_trident_style.h5").features
    )
    assert both[1].patch_size == 16


def test_a_csv_whose_features_must_be_told(tmp_path):
    write_csv(tmp_path / "a.csv", features(3, 514), header=False)
    assert pack([tmp_path / "a.csv"], tmp_path / "s.h5", dims=512).patches == 3
