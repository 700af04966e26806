"""checkpoints: where files are looked for, what is read of them, what is refused, and folders that are there whole or not at all."""

import json
import logging
import re
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from medvl.hub import checkpoints
from medvl.hub.checkpoints import (
    Entry,
    entries_of,
    find_file,
    find_optional_file,
    new_folder,
    open_weights,
    read_finite,
    read_json,
    read_pickle,
    save_finite,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that holds config.json of someone/tiny, and knows that the hub has no generation_config.json of it."""
    folder = tmp_path / "cache" / "models--someone--tiny"
    snapshot = folder / "snapshots" / "abc"
    for place in (folder / "refs", snapshot, folder / ".no_exist" / "abc"):
        place.mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    (folder / ".no_exist" / "abc" / "generation_config.json").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return snapshot


def test_the_first_choice_in_a_folder_is_found(tmp_path):
    for name in ("b.json", "c.json"):
        (tmp_path / name).write_text("{}")
    assert find_file(str(tmp_path), ("a.json", "b.json", "c.json")) == tmp_path / "b.json"
    with pytest.raises(ValueError, match=r"must hold a.json or d.json, found b.json, c.json"):
        find_file(str(tmp_path), ("a.json", "d.json"))


def test_the_cache_of_the_hub_is_read(cache):
    assert find_file("someone/tiny", ("model.safetensors", "config.json")) == cache / "config.json"
    with pytest.raises(ValueError, match=r"lacks model\.safetensors; HF_HUB_OFFLINE is set") as e:
        find_file("someone/tiny", ("model.safetensors",))
    assert "hf download someone/tiny --local-dir DIR" in str(e.value)


@pytest.mark.parametrize("name", ["./x", "../x", "a/b/c", "a--b", "x.git", "", "a b"])
def test_names_that_the_hub_cannot_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # "" is the working folder, which is there and empty
    with pytest.raises(ValueError, match=r"there is no file or folder|must hold config.json, found none"):
        find_file(name, ("config.json",))


def test_an_optional_file(cache, tmp_path, caplog):
    assert find_optional_file(str(cache), "config.json") == cache / "config.json"
    assert find_optional_file(str(cache), "generation_config.json") is None
    assert find_optional_file("someone/tiny", "config.json") == cache / "config.json"
    assert find_optional_file("someone/tiny", "generation_config.json") is None
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert find_optional_file("someone/tiny", "other.json") is None
    assert "it may have a other.json that is not in the cache" in caplog.text


def test_an_optional_file_that_the_hub_does_not_have(cache, monkeypatch, caplog):
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def missing(name, file):
        raise RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    monkeypatch.setattr(checkpoints, "_unreachable", lambda url: "")
    assert find_optional_file("someone/tiny", "other.json") is None
    assert not caplog.records
    with pytest.raises(ValueError, match="the hub has none either"):
        find_file("someone/tiny", ("other.json",))


def test_json_objects_only(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_json(path) == {"a": 1}
    for text, message in (
        ("[1]", "must hold a JSON object, found list"),
        ("{", "is not JSON"),
        ("[" * 99999, "is not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    with pytest.raises(ValueError, match="is not JSON"):
        read_json(tmp_path / "nothing.json")


def _state():
    gen = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=gen),
        "b": torch.randn(5, generator=gen).bfloat16(),
        "c": torch.arange(6).view(2, 3),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }


def _equal(entries, state):
    assert entries.keys() == state.keys()
    for key, entry in entries.items():
        assert (entry.shape, entry.dtype) == (tuple(state[key].shape), state[key].dtype), key
        assert torch.equal(entry.read(), state[key]), key


def test_weights_of_every_kind_of_file(tmp_path):
    state = _state()
    save_file(state, tmp_path / "model.safetensors")
    _equal(open_weights(tmp_path / "model.safetensors", str(tmp_path)), state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    _equal(open_weights(tmp_path / "pytorch_model.bin", str(tmp_path)), state)
    shards = {"1.safetensors": ["a", "b"], "2.safetensors": ["c", "empty", "scalar"]}
    for file, names in shards.items():
        save_file({n: state[n] for n in names}, tmp_path / file)
    index = {"weight_map": {n: file for file, names in shards.items() for n in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _equal(open_weights(tmp_path / "model.safetensors.index.json", str(tmp_path)), state)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"2.safetensors is missing, but its index names it"):
        open_weights(tmp_path / "model.safetensors.index.json", str(tmp_path))


def test_what_is_read_is_a_tensor_of_its_own():
    state = {"a": torch.ones(2)}
    entry = entries_of(state)["a"]
    entry.read().zero_()
    assert entry.read().sum() == 2 == state["a"].sum()


@pytest.mark.parametrize("weights", [{}, [], None, {"a": "../x.safetensors"}, {"a": 1}, {"a": "x.bin"}])
def test_an_index_that_leads_elsewhere(tmp_path, weights):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ValueError, match="weight_map must"):
        open_weights(path, str(tmp_path))


def test_a_file_that_is_cut_off(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(_state(), path)
    data = path.read_bytes()
    entries = open_weights(path, str(tmp_path))
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match="is broken or cut off"):
        open_weights(path, str(tmp_path))
    with pytest.raises(ValueError, match="was cut off while it was read"):  # after it was opened
        [entry.read() for entry in entries.values()]
    (tmp_path / "x.safetensors").write_bytes(data[:5])
    with pytest.raises(ValueError, match="is broken or cut off"):
        open_weights(tmp_path / "x.safetensors", str(tmp_path))


def test_nothing_in_a_pickle_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = tmp_path / "x.bin"
    for content, message in (
        ({"a": Evil()}, "is not a file of plain tensors"),
        ([torch.ones(1)], "must hold one flat dict of tensors"),
        ({"a": {"b": torch.ones(1)}}, "must hold one flat dict of tensors"),
        ({1: torch.ones(1)}, "must hold one flat dict of tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read_pickle(path)
    assert not (tmp_path / "ran").exists()


def test_finite_numbers(tmp_path):
    entry = lambda t: Entry(shape=tuple(t.shape), dtype=t.dtype, read=lambda: t)
    read = lambda t, dtype=torch.float32: read_finite(entry(t), "k", tmp_path / "f", dtype, "cpu")
    assert read(torch.tensor([1.5], dtype=torch.float64)).dtype == torch.float32
    assert read(torch.zeros(0)).numel() == 0
    for bad in (torch.tensor([1, float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(ValueError, match="k must be finite in float32"):
            read(bad)
    with pytest.raises(ValueError, match="k must be finite in float16"):  # 1e6 overflows
        read(torch.tensor([1e6]), torch.float16)
    with pytest.raises(ValueError, match="must hold floating point numbers"):
        read(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"here: b must be finite"):
        save_finite({"a": torch.ones(1), "b": torch.tensor([float("nan")])}, tmp_path / "x", "here")
    base = torch.arange(8.0)
    state = {"row": base[:4], "column": base.view(2, 4).T}  # they share memory and are not contiguous
    for pickled in (False, True):
        path = tmp_path / ("x.bin" if pickled else "x.safetensors")
        save_finite(state, path, "here", pickled)
        _equal(open_weights(path, str(tmp_path)), state)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    def stop_half_way():
        with new_folder(tmp_path / "a" / "b") as tmp:
            (tmp / "x").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert [*(tmp_path / "a").iterdir()] == []
    with new_folder(tmp_path / "a" / "b") as tmp:
        (tmp / "x").write_text("all")
        (tmp / "x").chmod(0o600)  # as safetensors writes it
        assert not (tmp_path / "a" / "b").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a" / "b" / "x").stat().st_mode & 0o777 == 0o644
    for taken in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "x"):
        with (
            pytest.raises(
                ValueError, match=rf"{re.escape(str(taken))}( is there already|: must be a folder)"
            ),
            new_folder(taken),
        ):
            pass


NOT_OF_THEIR_OWN = {
    "repeated": (
        lambda: {"w": torch.zeros(1).expand(2**20, 2**20)},
        r"w must be \[1048576, 1048576\] numbers of their own, the file holds 4",
    ),
    "without numbers": (
        lambda: {"w": torch.zeros(3, device="meta")},
        r"w must be \[3\] numbers of their own",
    ),
    "sparse": (lambda: {"w": torch.ones(3).to_sparse()}, r"w must be \[3\] numbers of their own"),
    "numbered": (lambda: {1: torch.zeros(3)}, "must hold one flat dict of tensors"),
}


@pytest.mark.parametrize("kind", NOT_OF_THEIR_OWN)
def test_tensors_hold_as_many_numbers_as_they_have(tmp_path, kind):
    make, message = NOT_OF_THEIR_OWN[kind]
    torch.save(make(), tmp_path / "w.bin")
    with pytest.raises(ValueError, match=message):
        checkpoints.open_weights(tmp_path / "w.bin", "w")


def test_a_compressed_pickle_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "w.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(
        ValueError, match=r"must be uncompressed, as torch.save writes it; \d+ members are compressed"
    ):
        checkpoints.read_pickle(tmp_path / "w.bin")


def test_two_weights_of_one_tensor_are_read(tmp_path):
    w = torch.arange(6.0).view(2, 3)
    torch.save({"a": w, "b": w, "c": w.T, "d": w[1]}, tmp_path / "w.bin")
    found = checkpoints.open_weights(tmp_path / "w.bin", "w")
    assert {k: e.read().tolist() for k, e in found.items()} == {
        "a": w.tolist(),
        "b": w.tolist(),
        "c": w.T.tolist(),
        "d": w[1].tolist(),
    }


def test_an_empty_pickle_is_told(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a file of plain tensors, or broken"):
        checkpoints.read_pickle(tmp_path / "w.pt")
