"""registry: round trips, the reference's records, and what is refused."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from medvl.adapters import registry
from medvl.adapters.registry import AdapterRecord, Registry
from medvl.base.config import ConfigError


@pytest.fixture
def place(tmp_path):
    """A folder with two adapters and vectors, and the path of a registry in it."""
    for name, base in (("ct", "Qwen/Qwen2-VL-7B-Instruct"), ("xray", "Qwen/Qwen2-VL-7B-Instruct")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return tmp_path / "registry.toml"


def filled(place):
    registry.add_adapter(
        place,
        AdapterRecord(
            name="ct", path="ct", vector="ct.npy", samples=20, embedder="tfidf", description='chest "CT" é\n2'
        ),
        [3.0, 4.0],
    )
    return registry.add_adapter(
        place,
        AdapterRecord(name="xray", path="xray", vector="xray.npy", samples=20, embedder="tfidf"),
        torch.tensor([0.0, 2.0]),
    )


@pytest.mark.parametrize("name", ["registry.toml", "registry.json"])
def test_what_is_added_is_read_back(place, name):
    made = filled(place.with_name(name))
    assert registry.read_registry(place.with_name(name)) == made
    torch.testing.assert_close(
        registry.read_vectors(place.with_name(name), made), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    )
    registry.check_registry(place.with_name(name), made)


def test_the_records_of_the_reference(place):
    np.save(
        place.with_name("m.npy"), np.array([[0.3, 0.4]])
    )  # a raw mean of unit vectors, of length 0.5, kept as one row
    records = [{"lora_name": "ct", "lora_path": "ct", "embedding_path": "m.npy", "description": "CT"}]
    place.with_suffix(".json").write_text(json.dumps(records))
    made = registry.read_registry(place.with_suffix(".json"))
    assert made.adapters == (AdapterRecord(name="ct", path="ct", vector="m.npy", description="CT"),)
    torch.testing.assert_close(
        registry.read_vectors(place.with_suffix(".json"), made), torch.tensor([[0.6, 0.8]])
    )


def test_a_refused_adapter_changes_nothing(place):
    filled(place)
    before = {p.name: p.read_bytes() for p in place.parent.iterdir() if p.is_file()}
    for record, vector, message in (
        (AdapterRecord(name="ct", path="ct", vector="new.npy"), [1.0, 0.0], "'ct' is there 2 times"),
        (
            AdapterRecord(name="us", path="us", vector="new.npy"),
            [1.0, 0.0],
            "us holds no adapter_config.json",
        ),
        (
            AdapterRecord(name="us", path="ct", vector="new.npy"),
            [1.0, 0.0, 0.0],
            "a vector of 3 numbers, the others 2",
        ),
        (
            AdapterRecord(name="us", path="ct", vector="new.npy"),
            [0.0, 0.0],
            "one finite vector .* that is not zero",
        ),
        (AdapterRecord(name=" ", path="ct", vector="new.npy"), [1.0, 0.0], "the name is used as a file name"),
        (AdapterRecord(name="../../x", path="ct", vector=""), [1.0, 0.0], "the name is used as a file name"),
        (
            AdapterRecord(name="us", path="ct", vector="../new.npy"),
            [1.0, 0.0],
            "must lie in the registry's root",
        ),
        (
            AdapterRecord(name="us", path="ct", vector="/tmp/new.npy"),
            [1.0, 0.0],
            "must lie in the registry's root",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            registry.add_adapter(place, record, vector)
    assert {p.name: p.read_bytes() for p in place.parent.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".ct", "a/b", "/etc/x", "a\\b", "a\0b", "a\nb", "x" * 201, "\udc80"]
)
def test_names_that_would_be_other_places_are_refused(place, name):
    with pytest.raises(ValueError, match="the name is used as a file name"):
        registry.add_adapter(place, AdapterRecord(name=name, path="ct", vector=""), [1.0, 0.0])
    assert sorted(p.name for p in place.parent.iterdir()) == ["ct", "xray"]


def test_registries_in_one_folder_leave_each_others_vectors_alone(place):
    one, other = place, place.with_name("other.toml")
    registry.add_adapter(one, AdapterRecord(name="ct", path="ct", vector=""), [3.0, 4.0])
    registry.add_adapter(other, AdapterRecord(name="ct", path="ct", vector=""), [0.0, 1.0])
    for path, wanted in ((one, [[0.6, 0.8]]), (other, [[0.0, 1.0]])):
        torch.testing.assert_close(
            registry.read_vectors(path, registry.read_registry(path)), torch.tensor(wanted)
        )


def test_those_who_add_at_the_same_time_lose_nothing(place):
    names = [f"a{i}" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda name: registry.add_adapter(
                    place, AdapterRecord(name=name, path="ct", vector=""), [1.0, float(name[1:])]
                ),
                names,
            )
        )
    assert sorted(r.name for r in registry.read_registry(place).adapters) == sorted(names)
    assert not [*place.parent.glob(".*")]


def test_a_vector_that_claims_to_be_huge_is_refused_before_anything_is_allocated(place):
    filled(place)
    header = np.lib.format.magic(1, 0) + (118).to_bytes(2, "little")
    about = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }"
    place.with_name("ct.npy").write_bytes(header + about.ljust(117) + b"\n" + bytes(16))
    with pytest.raises(ValueError, match=r"ct: .*ct\.npy: not a whole .npy of numbers"):
        registry.read_vectors(place, registry.read_registry(place))


def broken_vector(value):
    return lambda place: np.save(place.with_name("ct.npy"), value)


def rebased(base):
    return lambda place: (
        place.with_name("ct")
        .joinpath("adapter_config.json")
        .write_text(json.dumps({"base_model_name_or_path": base}))
    )


BAD = [
    (lambda p: p.with_name("ct.npy").unlink(), "ct.npy: no such file"),
    (lambda p: p.with_name("ct.npy").write_bytes(b"nonsense"), "ct.npy: not a whole .npy of numbers"),
    (broken_vector(np.array([1.0, np.nan])), r"one finite vector \[d\] that is not zero"),
    (broken_vector(np.zeros(2)), r"one finite vector \[d\] that is not zero"),
    (broken_vector(np.ones((2, 2))), r"got float64 \[2, 2\]"),
    (broken_vector(np.ones(3)), "xray has 2 numbers, ct 3; were they made by one embedder"),
    (
        lambda p: p.with_name("ct").joinpath("adapter_config.json").unlink(),
        "ct: .*adapter_config.json: cannot be read as text",
    ),
    (
        rebased("other"),
        "adapters of different models: ct of other, xray of Qwen/Qwen2-VL-7B-Instruct; give base",
    ),
    (
        lambda p: p.with_name("ct").joinpath("adapter_config.json").write_text("[]"),
        "ct: .*adapter_config.json: must hold a table",
    ),
    (
        lambda p: p.with_name("ct").joinpath("adapter_config.json").write_text("[" * 9999),
        "ct: .*adapter_config.json: not valid JSON",
    ),
    (
        lambda p: p.write_text(p.read_text().replace('embedder = "tfidf"', 'embedder = "jina"', 1)),
        "different embedders .* got jina, tfidf",
    ),
    (lambda p: p.write_text(""), "the registry has no adapter"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_what_does_not_fit_is_named(place, damage, message):
    filled(place)
    damage(place)
    with pytest.raises(ValueError, match=message):
        registry.check_registry(place, registry.read_registry(place))


@pytest.mark.parametrize(
    "name",
    [
        *("Qwen/Qwen2-VL-7B-Instruct/", "/models/Qwen2-VL-7B-Instruct", "..\\models\\qwen2-vl-7b-instruct"),
        *("unsloth/Qwen2-VL-7B-Instruct-bnb-4bit", "unsloth/Qwen2-VL-7B-Instruct-unsloth-bnb-4bit"),
    ],
)
def test_one_model_under_two_names(place, caplog, name):
    filled(place)
    rebased(name)(place)
    registry.check_registry(place, registry.read_registry(place))
    registry.check_registry(place, registry.read_registry(place), "some/where/Qwen2-VL-7B-Instruct")
    assert not caplog.records


def test_another_model_by_name_is_a_warning_where_the_model_is_given(place, caplog):
    """Names and shapes of layers are checked when an adapter is read; a name alone decides nothing."""
    filled(place)
    rebased("other")(place)
    registry.check_registry(place, registry.read_registry(place), "/models/Qwen2-VL-7B-Instruct")
    assert (
        "used as adapters of /models/Qwen2-VL-7B-Instruct, but trained on a model of another name: ct on other"
        in caplog.text
    )
    caplog.clear()
    place.write_text('base = "Qwen/Qwen2-VL-7B-Instruct"\n' + place.read_text())
    registry.check_registry(place, registry.read_registry(place))
    assert "ct on other" in caplog.text


def test_paths_may_start_elsewhere(place, tmp_path, monkeypatch, caplog):
    """LoraRetriever's lists lie in config/ and start at the project."""
    np.save(place.with_name("m.npy"), np.array([0.3, 0.4]))
    listed = tmp_path / "config" / "list.json"
    listed.parent.mkdir()
    listed.write_text(json.dumps([{"lora_name": "ct", "lora_path": "ct", "embedding_path": "m.npy"}]))
    with pytest.raises(
        ValueError,
        match=r"ct: .*config/m\.npy: no such file; relative paths start at .*config; give another root",
    ):
        registry.check_registry(listed, registry.read_registry(listed))
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, "."):
        made = registry.read_registry(listed, root)
        registry.check_registry(listed, made)
    made = registry.add_adapter(
        listed, AdapterRecord(name="us", path="xray", vector=""), [0.0, 1.0], "."
    )  # keeps it
    assert "was a list of LoraRetriever, and is now written as a registry of medvl" in caplog.text
    again = registry.read_registry(listed)
    assert (again, again.root) == (made, "..")
    torch.testing.assert_close(registry.read_vectors(listed, again), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert [p.parent for p in tmp_path.rglob("us-*.npy")] == [tmp_path / "vectors"]


@pytest.mark.parametrize("ending", [".toml", ".json"])
def test_any_text_is_read_back(place, ending):
    path = place.with_suffix(ending)
    text = 'a "b" \\ c\td\n\x7f\x01 \u00e9 \U0001f600'
    registry.add_adapter(
        path, AdapterRecord(name="\U0001f600", path="ct", vector="", description=text), [3.0, 4.0]
    )
    (found,) = registry.read_registry(path).adapters
    assert (found.name, found.description) == ("\U0001f600", text)


def test_files_that_are_no_registry(place):
    for text, message in (
        ("adapters = 3", r"expected an array, got 3 @ \$.adapters"),
        ("adapter = []", "unknown key 'adapter'"),
        ("x", "not valid TOML"),
    ):
        place.write_text(text)
        with pytest.raises(ConfigError, match=message):
            registry.read_registry(place)
    with pytest.raises(ConfigError, match="cannot be read as text"):
        registry.read_registry(place.with_name("none.json"))
    place.with_suffix(".json").write_text('[{"lora_name": "a", "lora_path": "b"}]')
    with pytest.raises(ConfigError, match="required key 'vector' is missing"):
        registry.read_registry(place.with_suffix(".json"))
    assert Registry() == Registry(adapters=())
