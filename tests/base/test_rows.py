"""Rows of both kinds of store are whole or absent, whoever is killed or writes at once."""

import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from medvl.base import rows, store
from medvl.slides import store as slide_store

NAMES = [f"n{i:02}" for i in range(40)]
FORK = multiprocessing.get_context("fork")


def _numbers(name):
    """The features of a slide, of another length for each."""
    i = int(name[1:])
    return np.random.default_rng(i).standard_normal((100 + 7 * i, 8)).astype("f2")


class Arrays:
    @staticmethod
    def create(path):
        store.create(path, NAMES, (100, 8), "f2", {"a": 1}, [("count", "i4")])

    open = staticmethod(store.open_store)

    @staticmethod
    def put(opened, name):
        store.put(opened, name, _numbers(name)[:100], {"count": int(name[1:])})

    @staticmethod
    def check(opened, name):
        np.testing.assert_array_equal(opened.read(name), _numbers(name)[:100])
        assert opened.row(name) == {"count": int(name[1:])}


class Slides:
    @staticmethod
    def create(path):
        settings = {"dims": 8, "encoder": "", "dtype": "float16"}
        slide_store.make_room(path, None, {n: len(_numbers(n)) for n in NAMES}, settings)

    open = staticmethod(slide_store.open_slides)

    @staticmethod
    def put(opened, name):
        x = _numbers(name)
        facts = {"has_coords": True, "patch_size": 256, "source": name.encode()}
        slide_store.put_slide(
            opened, name, [(x[i : i + 30], _places(x[i : i + 30])) for i in range(0, len(x), 30)], facts
        )

    @staticmethod
    def check(opened, name):
        slide, x = opened.read(name), _numbers(name)
        np.testing.assert_array_equal(slide.features, x)
        np.testing.assert_array_equal(
            slide.coords, np.concatenate([_places(x[i : i + 30]) for i in range(0, len(x), 30)])
        )
        assert opened.source(name)[0] == name


def _places(x):
    return np.stack([np.arange(len(x)), np.arange(len(x))], 1) * 256


@pytest.fixture(params=[Arrays, Slides], ids=["arrays", "slides"])
def kind(request):
    return request.param


def _write(kind, path, names):
    opened = kind.open(path)
    for name in names:
        kind.put(opened, name)


@pytest.fixture
def whole(kind, tmp_path):
    """The bytes of a store that one process wrote undisturbed."""
    kind.create(tmp_path / "whole.h5")
    _write(kind, tmp_path / "whole.h5", NAMES)
    return (tmp_path / "whole.h5").read_bytes()


def test_a_writer_that_is_killed_leaves_no_row_that_only_looks_whole(kind, whole, tmp_path):
    """Killed at random moments, then written to the end. MEDVL_KILLS sets how often (default 3)."""
    path, gen = tmp_path / "s.h5", np.random.default_rng(int(os.environ.get("MEDVL_KILL_SEED", "0")))
    kind.create(path)
    for _ in range(int(os.environ.get("MEDVL_KILLS", "3"))):
        done = kind.open(path).names
        missing = [n for n in NAMES if n not in done]
        goal = len(done) + int(gen.integers(0, 10))
        writer = FORK.Process(target=_write, args=(kind, path, missing))
        writer.start()
        while writer.is_alive() and len(kind.open(path).names) < goal:
            time.sleep(0.001)
        time.sleep(gen.uniform(0, 0.003))
        writer.kill()  # SIGKILL; nothing where it has ended
        writer.join()
        opened = kind.open(path)
        assert set(done) <= set(opened.names)
        for name in opened.names:
            kind.check(opened, name)
    done = kind.open(path).names
    _write(kind, path, [n for n in NAMES if n not in done])
    assert path.read_bytes() == whole


def test_two_writers_at_once(kind, whole, tmp_path):
    path = tmp_path / "s.h5"
    kind.create(path)
    early = kind.open(path)
    writers = [FORK.Process(target=_write, args=(kind, path, NAMES[k::2])) for k in (0, 1)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        opened = kind.open(path)
        for name in opened.names[-3:]:
            kind.check(opened, name)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert path.read_bytes() == whole
    for name in NAMES:
        kind.check(early, name)  # what was written since it was opened is seen
    with pytest.raises(ValueError, match="'n03' is written already"):
        kind.put(early, "n03")
    assert path.read_bytes() == whole


def _check_all(kind, opened):
    for name in NAMES:
        kind.check(opened, name)


def test_an_open_file_is_shared_by_threads_forks_and_copies(kind, whole, tmp_path):
    opened = kind.open(tmp_path / "whole.h5")
    kind.check(opened, NAMES[0])  # the file is open from here on
    children = [FORK.Process(target=_check_all, args=(kind, opened)) for _ in range(2)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: kind.check(opened, name), NAMES * 3))
    for child in children:
        child.join()
        assert child.exitcode == 0
    _check_all(kind, pickle.loads(pickle.dumps(opened)))


def _descriptors(path):
    links = [os.path.join("/proc/self/fd", n) for n in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and os.path.realpath(link) == str(path.resolve()) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_file_is_opened_once_and_closed_with_its_store(kind, whole, tmp_path):
    path = tmp_path / "whole.h5"
    opened = kind.open(path)
    assert _descriptors(path) == 0
    for _ in range(2):
        _check_all(kind, opened)
        assert _descriptors(path) == 1
    del opened
    assert _descriptors(path) == 0


def test_a_file_that_was_replaced_or_removed_is_not_read(kind, whole, tmp_path):
    path = tmp_path / "whole.h5"
    opened = kind.open(path)
    kind.check(opened, "n00")
    os.replace(path, tmp_path / "away.h5")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="was replaced since it was opened; open it again"):
        opened.read("n00")
    with pytest.raises(ValueError, match="was replaced since it was opened; open it again"):
        kind.put(opened, "n00")
    kind.check(kind.open(path), "n00")
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        opened.read("n00")
    with pytest.raises(ValueError, match=r"cannot be written \(No such file"):
        kind.put(opened, "n00")
    os.replace(tmp_path / "away.h5", path)  # the first one again
    kind.check(opened, "n00")


def test_a_file_of_another_kind_or_version(kind, whole, tmp_path):
    other = rows.Kind(format="medvl-other", version=1, noun="things")
    with pytest.raises(ValueError, match=r"not a store of medvl \(it lacks .*medvl-other"):
        rows.open_rows(tmp_path / "whole.h5", other, [])
    later = rows.Kind(format=kind.open(tmp_path / "whole.h5")._rows.kind.format, version=2, noun="things")
    with pytest.raises(ValueError, match="is a store of version 1, this medvl reads version 2"):
        rows.open_rows(tmp_path / "whole.h5", later, [])
