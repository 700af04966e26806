"""A store gives back by name what was put in, holds only whole arrays, and is plain HDF5."""

import json
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from medvl.base import store

FIELDS = (("rule", "S8"), ("spacing_mm", "f8", 3), ("count", "i4"))
NAMES = ["valid_2_a_1", "valid_1_a_1", "patient é", "d"]


def _row(i=0):
    return {"rule": "header", "spacing_mm": (3.0, 1.75, 0.1 + i), "count": i}


def _array(i, shape=(3, 4, 5), dtype="u1"):
    return np.random.default_rng(i).integers(0, 200, shape).astype(dtype)


@pytest.fixture
def path(tmp_path):
    store.create(tmp_path / "s.h5", NAMES, (3, 4, 5), "u1", {"size": [3, 4, 5], "kind": "ct"}, FIELDS)
    return tmp_path / "s.h5"


@pytest.mark.parametrize("dtype", ["u1", "i2", "f2", "f4"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (7,), (160, 384)])
def test_what_is_put_is_read_by_name_and_by_plain_h5py(tmp_path, shape, dtype):
    path = tmp_path / "s.h5"
    store.create(path, NAMES, shape, dtype, {"a": (1, 2.5)}, FIELDS)
    for i in (2, 0):
        store.put(store.open_store(path), NAMES[i], _array(i, shape, dtype), _row(i))
    s = store.open_store(path)
    assert s.names == (NAMES[0], NAMES[2])
    assert s.settings == {"a": [1, 2.5]}
    assert (s.shape, s.dtype) == (shape, np.dtype(dtype))
    with h5py.File(path) as f:
        assert f["arrays"].shape == (4, *shape)
        for i in (0, 2):
            np.testing.assert_array_equal(s.read(NAMES[i]), _array(i, shape, dtype))
            np.testing.assert_array_equal(f["arrays"][i], _array(i, shape, dtype))
            assert s.row(NAMES[i]) == _row(i)
            assert f["rows"][i]["name"].decode() == NAMES[i]
        assert f["rows"]["done"].tolist() == [1, 0, 1, 0]
        assert json.loads(f.attrs["settings"]) == s.settings


def test_part_of_an_array(path):
    store.put(store.open_store(path), "d", _array(3), _row())
    s = store.open_store(path)
    for first, stop in ((0, 3), (1, 2), (2, None), (0, 99), (2, 1)):
        np.testing.assert_array_equal(s.read("d", first, stop), _array(3)[first:stop])


def test_room_costs_no_disk(tmp_path):
    store.create(tmp_path / "s.h5", [str(i) for i in range(5000)], (160, 224, 224), "u1", {}, FIELDS)
    stat = os.stat(tmp_path / "s.h5")
    assert stat.st_size > 5000 * 160 * 224 * 224
    assert stat.st_blocks * 512 < 10_000_000


def test_growth_keeps_what_is_there(path):
    store.put(store.open_store(path), NAMES[1], _array(1), _row(1))
    before = store.open_store(path)
    store.grow(path, ["a much longer name than the others", NAMES[0]])
    after = store.open_store(path)
    assert after.names == (NAMES[1],)
    np.testing.assert_array_equal(after.read(NAMES[1]), _array(1))
    assert after.row(NAMES[1]) == _row(1)
    store.put(store.open_store(path), "a much longer name than the others", _array(5), _row(5))
    np.testing.assert_array_equal(
        store.open_store(path).read("a much longer name than the others"), _array(5)
    )
    with pytest.raises(ValueError, match="was replaced since it was opened"):
        before.read(NAMES[1])
    same = path.read_bytes()
    store.grow(path, NAMES)
    assert path.read_bytes() == same


def test_an_array_without_its_flag_is_absent(path, monkeypatch):
    """A writer that ends before the last byte leaves nothing behind that can be read; the array can be put again."""

    def killed(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put(store.open_store(path), "d", _array(1), _row())
    monkeypatch.undo()
    with h5py.File(path) as f:
        np.testing.assert_array_equal(f["arrays"][3], _array(1))  # the bytes are there
    assert store.open_store(path).names == ()
    with pytest.raises(ValueError, match="not written"):
        store.open_store(path).read("d")
    store.put(store.open_store(path), "d", _array(2), _row())
    np.testing.assert_array_equal(store.open_store(path).read("d"), _array(2))


def test_a_put_reads_its_own_row_alone(path, monkeypatch):
    """What it costs does not depend on the number of rows; yet it sees what others wrote since the store was opened."""
    early, other = store.open_store(path), store.open_store(path)

    def opened(*args, **kwargs):
        raise AssertionError("the table of rows was read")

    monkeypatch.setattr(h5py, "File", opened)
    store.put(other, "d", _array(1), _row())
    store.put(early, NAMES[0], _array(2), _row())
    with pytest.raises(ValueError, match="'d' is written already"):
        store.put(early, "d", _array(3), _row())
    monkeypatch.undo()
    assert store.open_store(path).names == (NAMES[0], "d")
    np.testing.assert_array_equal(store.open_store(path).read("d"), _array(1))
    store.grow(path, ["e"])
    with pytest.raises(ValueError, match="was replaced since it was opened"):
        store.put(early, NAMES[1], _array(2), _row())


def _put_every_other(path, first):
    for i in range(first, 40, 2):
        store.put(store.open_store(path), f"n{i}", _array(i, (50, 60)), _row(i))


def _read_in_child(s, queue):
    queue.put((s.read("n3"), s.row("n3")))


def test_two_processes_write_while_others_read(tmp_path):
    path = tmp_path / "s.h5"
    store.create(path, [f"n{i}" for i in range(40)], (50, 60), "u1", {}, FIELDS)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_put_every_other, args=(path, k)) for k in (0, 1)]
    for w in writers:
        w.start()
    while any(w.is_alive() for w in writers):
        s = store.open_store(path)
        for name in s.names[-3:]:
            np.testing.assert_array_equal(s.read(name), _array(int(name[1:]), (50, 60)))
    for w in writers:
        w.join()
        assert w.exitcode == 0
    s = store.open_store(path)
    assert len(s.names) == 40
    with ThreadPoolExecutor(4) as pool:
        for i, array in enumerate(pool.map(s.read, [f"n{i}" for i in range(40)])):
            np.testing.assert_array_equal(array, _array(i, (50, 60)))
    queue = fork.Queue()
    child = fork.Process(target=_read_in_child, args=(s, queue))
    child.start()
    array, row = queue.get()
    child.join()
    np.testing.assert_array_equal(array, _array(3, (50, 60)))
    assert row == _row(3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(s)).read("n3"), array)


def test_a_row_knows_the_content_of_its_array(tmp_path):
    arrays = {n: np.random.default_rng(i).integers(0, 9, (3, 4)).astype("u1") for i, n in enumerate("abc")}
    paths = [tmp_path / "1.h5", tmp_path / "2.h5"]
    for path in paths:
        store.create(path, ["a", "b"], (3, 4), "u1", {}, [("count", "i4")])
        store.put(store.open_store(path), "a", arrays["a"], {"count": 1})
    store.put(store.open_store(paths[0]), "b", arrays["b"], {"count": 1})
    store.put(store.open_store(paths[1]), "b", arrays["c"], {"count": 1})
    first, second = (store.open_store(p) for p in paths)
    assert first.content("a") == second.content("a") == store._digest(first.read("a"))
    assert first.content("b") != second.content("b")
    assert first.fields == ("count",)
    content = first.content("b")
    store.grow(paths[0], ["c"])
    assert store.open_store(paths[0]).content("b") == content


def test_a_store_made_before_rows_held_contents_is_read_and_written(tmp_path):
    old = np.dtype([("name", "S1"), ("count", "<i4"), ("done", "u1")])
    array = np.arange(12, dtype="u1").reshape(3, 4)
    table = np.zeros(1, old)
    table["name"] = b"a"
    store._write_empty(tmp_path / "s.h5", table, (3, 4), np.dtype("u1"), {})
    store.put(store.open_store(tmp_path / "s.h5"), "a", array, {"count": 5})
    opened = store.open_store(tmp_path / "s.h5")
    assert opened.row("a") == {"count": 5}
    assert opened.content("a") == store._digest(array)


@pytest.fixture
def folder(tmp_path):
    """A store of shards: its index has room for `NAMES`, two processes have written two of them each, one both."""
    folder = tmp_path / "shards.h5"
    store.create(
        store.begin_shards(folder), NAMES, (3, 4, 5), "u1", {"size": [3, 4, 5], "kind": "ct"}, FIELDS
    )
    for written in ((2, 0), (3, 0)):
        shard = store.open_shard(folder)
        for i in written:
            store.put(shard, NAMES[i], _array(i), _row(i))
    return folder


def test_a_store_of_shards_is_read_like_the_whole(folder, path):
    for i in (0, 2, 3):
        store.put(store.open_store(path), NAMES[i], _array(i), _row(i))
    whole, shards = store.open_store(path), pickle.loads(pickle.dumps(store.open_store(folder)))
    assert shards.path == folder
    for what in ("names", "shape", "dtype", "fields", "settings"):
        assert getattr(shards, what) == getattr(whole, what)
    for name in whole.names:
        np.testing.assert_array_equal(shards.read(name, 1), whole.read(name, 1))
        assert (shards.row(name), shards.content(name)) == (whole.row(name), whole.content(name))
    with pytest.raises(ValueError, match=f"{NAMES[1]}' is not written"):
        shards.read(NAMES[1])
    with pytest.raises(ValueError, match="has no 'x'; it has 3 arrays"):
        shards.row("x")


def test_a_store_of_shards_grows_and_takes_arrays_of_this_process_too(folder):
    store.grow(folder, ["new"])
    store.put(store.open_store(folder), NAMES[1], _array(1), _row(1))
    store.put(store.open_shard(folder), "new", _array(9), _row(9))
    grown = store.open_store(folder)
    assert grown.names == (*NAMES, "new")
    for name, i in zip(grown.names, (0, 1, 2, 3, 9), strict=True):
        np.testing.assert_array_equal(grown.read(name), _array(i))


def test_what_is_no_store_of_shards_is_refused(folder, path):
    for other in (path, path.parent):  # one file, and a folder of other things
        with pytest.raises(ValueError, match=r"is not a folder of shards.*; go on without a cluster"):
            store.begin_shards(other)
    store.create(folder / "other.h5", NAMES, (3, 4, 5), "u1", {"size": [3, 4, 5], "kind": "pet"}, FIELDS)
    with pytest.raises(ValueError, match=r"other\.h5: was made with other settings .*kind"):
        store.open_store(folder)
    with pytest.raises(ValueError, match="is not a whole store"):
        store.open_store(folder.parent)
