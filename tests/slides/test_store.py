"""A store of slides: what it holds is read, what it does not hold is said, and files that are no store are refused."""

import h5py
import numpy as np
import pytest

from medvl.slides.pack import pack
from medvl.slides.store import content_digest, make_room, open_slides, put_slide
from tests.slides.test_features import features, grid
from tests.slides.test_pack import D, files_of

SETTINGS = {"dims": D, "encoder": "uni_v1", "dtype": "float16"}
FACTS = {"has_coords": True, "patch_size": -1, "mpp": np.nan, "magnification": 20.0, "source": b"a.h5"}


def test_slides_are_put_into_the_room_that_was_made_for_them(tmp_path):
    path, x, xy = tmp_path / "s.h5", features(7, D, "f2"), grid(7, 512)
    make_room(path, None, {"a": 9, "none": 0}, SETTINGS)
    store = open_slides(path)
    assert (store.names, store.room("a"), store.room("none"), store.room("x")) == ((), 9, 0, -1)
    with pytest.raises(ValueError, match="'a' has room for 9 patches and got more; did its file change"):
        put_slide(store, "a", [(x, xy), (x, xy)], FACTS)
    assert open_slides(path).names == ()
    assert put_slide(store, "a", [(x[:4], xy[:4]), (x[4:], xy[4:])], FACTS) == 7
    assert put_slide(store, "none", [], FACTS) == 0
    store = open_slides(path)
    assert store.names == ("a", "none")
    slide = store.read("a")
    np.testing.assert_array_equal(slide.features, x)
    np.testing.assert_array_equal(slide.coords, xy)
    assert (slide.patch_size, slide.mpp, slide.magnification) == (512, None, 20.0)
    assert store.source("a") == ("a.h5", content_digest([(x, xy)]))
    assert store.about("none").rows == len(store.read("none").features) == 0


def test_more_room_is_a_copy_in_which_patches_left_out_take_none(tmp_path):
    path, x, xy = tmp_path / "s.h5", features(7, D, "f2"), grid(7, 512)
    make_room(path, None, {"a": 9, "b": 7}, SETTINGS)
    for name in "ab":
        put_slide(open_slides(path), name, [(x, xy)], FACTS | {"has_coords": name == "a"})
    old = open_slides(path)
    make_room(path, old, {"b": 5, "c": 3}, SETTINGS)
    new = open_slides(path)
    assert new.names == ("a",)
    assert [new.room(name) for name in "abc"] == [7, 5, 3]
    np.testing.assert_array_equal(new.read("a").features, x)
    assert new.source("a")[1] == content_digest(new.chunks("a")) == content_digest([(x, xy)])
    with pytest.raises(ValueError, match="was replaced since it was opened; open it again"):
        old.read("a")


def test_a_store_of_other_files_or_of_rows_beyond_it(folder, tmp_path):
    out = tmp_path / "s.h5"

    def says(what, change):
        out.unlink(missing_ok=True)
        pack(files_of(folder[0]), out, encoder="uni_v1")
        with h5py.File(out, "r+") as f:
            change(f)
        with pytest.raises(ValueError, match=rf"s.h5: {what}"):
            open_slides(out)

    def beyond(f):
        rows = f["rows"][()]
        rows["count"][0] = rows["room"][0] = 10**12
        f["rows"][...] = rows

    def external(f):
        del f["features"]
        f.create_dataset("features", (25, D), "f2", external=[(str(tmp_path / "secret"), 0, 25 * D * 2)])

    def in_pieces(f):
        held = f["coords"][()]
        del f["coords"]
        f.create_dataset("coords", data=held, chunks=(5, 2))

    says("names patches beyond the 25 that it holds", beyond)
    says("'features' must be stored in this file", external)
    says("must be a store that medvl wrote; its arrays are not contiguous", in_pieces)


def test_stores_that_are_none(folder, tmp_path):
    source, _ = folder
    with pytest.raises(ValueError, match="no such file"):
        open_slides(tmp_path / "none.h5")
    with pytest.raises(ValueError, match=r"is an HDF5 file, but not a store of medvl .*'medvl-slides'"):
        open_slides(source / "S0.h5")
    pack(files_of(source), tmp_path / "s.h5", encoder="uni_v1")
    store = open_slides(tmp_path / "s.h5")
    with pytest.raises(ValueError, match="has no 'x'; it has 4 slides, such as S0, S1, S2"):
        store.read("x")
    with pytest.raises(ValueError, match="size must be at least 1 patch, got 0"):
        store.chunks("S0", 0)
    data = (tmp_path / "s.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[:-300])
    with pytest.raises(ValueError, match=r"cut.h5: is not a whole store \(.*truncated"):
        open_slides(tmp_path / "cut.h5")
