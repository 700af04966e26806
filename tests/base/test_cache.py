"""A cache computes what is missing, once, and keeps it whole."""

import numpy as np
import pytest

from medvl.base import processes
from medvl.base.cache import CacheFolder, compute_missing


@pytest.fixture
def cache(tmp_path):
    return CacheFolder(folder=tmp_path / "of-these-weights", shape=(2, 3), remedy="remove it")


def test_only_what_is_missing_is_computed(cache):
    computed = []

    def compute(name):
        computed.append(name)
        cache.write(name[0], np.full((2, 3), len(computed), "f2"))

    has = lambda name: cache.has(name[0])  # the key is the content: "a" and "a again" have the same
    compute_missing(["a", "b", "a again"], has, compute, "computing")
    assert computed == ["a", "b"]
    compute_missing(["c", "b", "a"], has, compute, "computing")
    assert computed == ["a", "b", "c"]
    np.testing.assert_array_equal(cache.read("b"), np.full((2, 3), 2))
    assert cache.read("b").dtype == np.float16
    assert sorted(p.suffix for p in cache.folder.iterdir()) == [".npy"] * 3


def test_a_run_that_was_stopped_goes_on(cache):
    def compute(name):
        if name == "b" and not cache.has("stop"):
            cache.write("stop", np.zeros((2, 3)))
            raise KeyboardInterrupt
        cache.write(name, np.zeros((2, 3)))

    with pytest.raises(KeyboardInterrupt):
        compute_missing(["a", "b", "c"], cache.has, compute, "computing")
    assert cache.has("a")
    assert not cache.has("b")
    compute_missing(["a", "b", "c"], cache.has, compute, "computing")
    assert all(cache.has(name) for name in "abc")


def test_processes_share_by_place_and_wait(monkeypatch):
    names, computed = ["a", "b", "c", "d", "e"], []
    waited = []
    monkeypatch.setattr(processes, "wait_for_all", lambda: waited.append(len(computed)))
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        # What the first process computes meanwhile does not move the shares.
        compute_missing(names, computed.__contains__, computed.append, "computing", together=True)
    assert computed == ["a", "c", "e", "b", "d"]
    assert waited == [3, 5]
    compute_missing(["x", "y"], computed.__contains__, computed.append, "computing")
    assert computed[-2:] == ["x", "y"]
    assert len(waited) == 2


def test_broken_files_are_named_with_what_to_do(cache):
    cache.write("a", np.zeros((2, 3)))
    path = cache.path("a")
    for content in (b"", path.read_bytes()[:-1], b"other"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{path.name}: must hold an array \[2, 3\] and is broken .*; remove it"
        ):
            cache.read("a")
    cache.write("a", np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"must hold an array \[2, 3\], found \[3, 3\]; remove it"):
        cache.read("a")
