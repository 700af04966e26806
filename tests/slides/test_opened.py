"""Files of patch features and stores that a process has opened."""

import h5py
import numpy as np
import pytest

from medvl.slides import opened, pack


def test_patches_are_kept_within_a_budget(tmp_path, monkeypatch):
    path = tmp_path / "S.h5"
    with h5py.File(path, "w") as f:
        f["features"] = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    monkeypatch.setattr(opened, "_kept_bytes", opened.KEPT_BYTES)
    read = [x.tolist() for x, _ in opened.file_chunks(path, 2)]
    opened._open.cache_clear()
    monkeypatch.setattr(opened, "_kept_bytes", 0)
    kept = [x.tolist() for x, _ in opened.file_chunks(path, 2)]
    assert read == kept == [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]]
    assert opened._kept_bytes > 0
    assert opened.about_file(path).rows == 3
    with pytest.raises(ValueError, match="features must be 3 numbers per patch, got 2"):
        list(opened.file_chunks(path, 2, dims=3))


def test_a_store_is_opened_again_where_it_has_changed(tmp_path):
    paths = [tmp_path / "A.npy", tmp_path / "B.npy"]
    for path in paths:
        np.save(path, np.ones((3, 2), np.float32))
    store = tmp_path / "store.h5"
    pack.pack(paths[:1], store)
    first = opened.open_store(store)
    assert opened.open_store(store) is first
    pack.pack(paths, store)
    assert (first.names, opened.open_store(store).names) == (("A",), ("A", "B"))
    store.unlink()
    with pytest.raises(ValueError, match="no such file"):
        opened.open_store(store)
