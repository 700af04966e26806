"""Records and settings: every number has bounds, every pattern its keys, and what is no setting is refused in one sentence."""

import json
from pathlib import Path

import pytest
from attrs import field, frozen

from medvl.base import config
from medvl.base.config import ConfigError
from medvl.systems import run
from medvl.systems.adapters.ask import AskConfig
from medvl.systems.ct_clip import data as ct_data

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {  # an experiment of each system, with all its optional tables
    "ct_clip": ("ctclip_phantom", ['train.stages.0.speeds=[{match="fuse/.*", lr=1e-3, weight_decay=0.1}]']),
    "tune": ("tune_phantom", []),
    "adapters": ("adapters_phantom", ["evaluate.by_k=[1, 2]"]),
    "slide_vqa": ("slide_vqa_phantom", []),
}
FREE = ("$.vit.config", "$.model.config")  # of Hugging Face: not records of ours


def example(system):
    """Plain data of a whole record of a system."""
    name, overrides = EXAMPLES[system]
    cfg, _ = run.resolve(str(ROOT / "experiments" / f"{name}.toml"), overrides)
    return config.unstructure(cfg)


def numbers(value, path="$"):
    """[(path, number)] of all numbers of plain data; what is free is left out."""
    if path in FREE:
        return []
    if isinstance(value, dict):
        return [n for key, item in value.items() for n in numbers(item, f"{path}.{key}")]
    if isinstance(value, list):
        return [n for i, item in enumerate(value) for n in numbers(item, f"{path}.{i}")]
    return [(path, value)] if type(value) in (int, float) else []


def refused(raw, record, path, value):
    try:
        config.structure(config.override(raw, (f"{path.removeprefix('$.')}={value}",)), record)
    except ConfigError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("system", [*EXAMPLES, "ask"])
def test_every_number_of_every_record_has_bounds(system):
    raw = config.unstructure(AskConfig()) if system == "ask" else example(system)
    record = AskConfig if system == "ask" else run.find_system(system).record
    held = numbers(raw)
    assert len(held) > (8 if system == "ask" else 20)
    unbounded = {path: [] for path, _ in held}
    for path, number in held:
        for wrong in (-(10**15), 10**15) if type(number) is int else (-1e300, 1e300):
            message = refused(raw, record, path, wrong)
            if path.rpartition(".")[2].rstrip("0123456789") not in message:
                unbounded[path].append(wrong)
    assert not {path: wrong for path, wrong in unbounded.items() if wrong}


@pytest.mark.parametrize(
    ("system", "setting", "said"),
    [
        ("ct_clip", "data.sentences=-1", "data.sentences must be 0 or more, got -1"),
        ("ct_clip", "data.impressions=2", "data.impressions must be 1 or less, got 2"),
        ("ct_clip", "data.draws=0", "data.draws"),
        ("ct_clip", "data.workers=100000", "data.workers"),
        ("ct_clip", "encode.resize=1", "multiples of the patch size"),
        ("ct_clip", "train.stages.0.lr=1e3", "lr must be 10 or less, got 1000"),
        ("ct_clip", "train.stages.0.speeds.0.lr=-1", "lr must be 0 or more, got -1"),
        ("ct_clip", "contrast.scale_max=1", "contrast.scale must not be above contrast.scale_max"),
        ("ct_clip", "seed=-1", "seed must be 0 or more, got -1"),
        ("ct_clip", "data.phantoms.slices=[40, 30]", "slices must rise, got [40, 30]"),
        ("tune", "chat.context=-1", "chat.context"),
        ("tune", "lora.dropout=2", "dropout in [0, 1)"),
        ("tune", "lora.rank_pattern={'.*q_proj' = 10000000}", "rank_pattern"),
        ("tune", "train.stages.0.muon=-1", "stage"),
        ("adapters", "fusion.density=2", "FusionConfig.density must be 1 or less"),
        ("adapters", "pool.samples=0", "pool.samples"),
        ("adapters", "pool.hold.host_gb=-1", "HoldConfig.host_gb"),
        ("adapters", "evaluate.recall=[1, 0]", "evaluate.recall must be 1 or more"),
        ("adapters", "evaluate.domains=[]", "evaluate needs modes and domains"),
        ("slide_vqa", "data.dims=-5", "data.dims must be 0 or more, got -5"),
        ("slide_vqa", "pretrain.aux=-1", "pretrain.aux"),
    ],
)
def test_a_number_out_of_bounds_is_refused_with_its_name(system, setting, said):
    raw = example(system)
    with pytest.raises(ConfigError) as e:
        config.structure(config.override(raw, (setting,)), run.find_system(system).record, source="x.toml")
    assert said in str(e.value)
    assert str(e.value).startswith("x.toml: ")


@pytest.mark.parametrize(
    ("system", "setting"),
    [
        ("ct_clip", 'data.store="{x}.h5"'),
        ("ct_clip", 'data.reports="{0}"'),
        ("ct_clip", 'data.labels="{}"'),
        ("ct_clip", 'data.metadata="{folder!r}"'),
        ("ct_clip", 'data.cache="{folder}/cache"'),
        ("ct_clip", 'data.folder="{split}"'),
        ("tune", 'data.conversations="{task}.jsonl"'),
        ("tune", 'data.root="{folder}"'),
        ("adapters", 'data.conversations="{tasks}/{split}.jsonl"'),
        ("adapters", 'data.general="{task}"'),
        ("slide_vqa", 'data.features="{split}"'),
        ("slide_vqa", 'data.test="{x}"'),
    ],
)
def test_braces_that_nobody_fills_are_refused(system, setting):
    key, _, pattern = setting.partition("=")
    with pytest.raises(ConfigError) as e:
        config.structure(config.override(example(system), (setting,)), run.find_system(system).record)
    assert f"{key} may hold" in str(e.value)
    assert pattern.strip('"') in str(e.value)


def test_patterns_are_filled_once():
    """What is filled in may hold braces itself; lone braces stay."""
    assert config.fill_pattern("{a}/{b}{a}", "x", a="{b}", b=1) == "{b}/1{b}"
    assert config.fill_pattern("a}b{", "x", a=1) == "a}b{"
    assert config.fill_pattern("{a}/{b}", "x", a=None, b="c") == "{a}/c"
    raw = config.override(
        example("ct_clip"),
        ('data.source="files"', 'data.folder="d"', 'data.store="{folder}/{ct}/{split}.h5"'),
    )
    cfg = config.structure(raw, run.find_system("ct_clip").record)
    digest = ct_data.data_path(cfg, "store", "test").parent.name
    assert ct_data.data_path(cfg, "store", "test") == Path("d", digest, "test.h5")
    assert len(digest) == 8


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.toml",
            "day = 2024-01-01",
            "a setting cannot be a date, got 2024-01-01; write text in quotes @ $.day",
        ),
        (
            "a.toml",
            "t = {at = [12:00:00]}",
            "a setting cannot be a time, got 12:00:00; write text in quotes @ $.t.at[0]",
        ),
        ("a.toml", "x = " + "[" * 5000 + "]" * 5000, "not valid TOML"),
        ("a.toml", "x = " + "[" * 60 + "]" * 60, "more than 32 deep"),
        ("a.toml", ".".join("a" * 3000) + " = 1", "more than 32 deep"),
        ("a.json", "[" * 200_000 + "]" * 200_000, "not valid JSON"),
        ("a.json", '{"a": "\\ud800"}', "cannot be written to a file"),
        ("a.toml", 'a = "b\\u0000"', "cannot be written to a file"),
        ("a.toml", "seed = " + "9" * 30, "at most 64 bits @ $.seed"),
        ("a.toml", "seed = " + "9" * 5000, "not valid TOML"),
        ("a.json", "[1]", "must hold a table of settings, found list"),
    ],
)
def test_what_is_no_setting_is_refused_when_read(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        config.read_settings(path)
    assert said in str(e.value)
    assert str(e.value).startswith(f"{path}: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "item",
    [
        "a=2024-01-01",
        "a=" + "[" * 5000 + "]" * 5000,
        "a=" + "9" * 5000,
        "a=\udcff",
        ".".join("a" * 3000) + "=1",
        "=1",
        "a",
    ],
)
def test_what_is_no_setting_is_refused_as_an_override(item):
    with pytest.raises(ConfigError) as e:
        config.override({}, (item,), source="x")
    assert str(e.value).startswith("x: --set")
    assert str(e.value).isprintable()


@pytest.mark.parametrize("place", ["-1", "2", "²", "x", "9" * 5000, ""])
def test_a_place_in_a_list_is_one_that_is_there(place):
    with pytest.raises(ConfigError, match="must be an index below 2"):
        config.override({"a": [1, 2]}, (f"a.{place}=3",))
    with pytest.raises(ConfigError, match="must be an index below 2"):
        config.override({"a": [{}, {}]}, (f"a.{place}.b=3",))


def test_a_byte_order_mark_is_no_syntax_error(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert config.read_settings(path) == {"a": 1}
    path.with_suffix(".json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert config.read_settings(path.with_suffix(".json")) == {"a": 1}


@pytest.mark.parametrize("system", ["['tune']", "{}", "1", "'tunes'"])
def test_a_system_that_is_none(tmp_path, system):
    path = tmp_path / "a.toml"
    path.write_text(f"system = {system}\n")
    with pytest.raises(
        ConfigError,
        match=r"system must be one of adapters, ct_clip, document, slide_vqa, tune, unified, or a package .* found",
    ):
        run.resolve(str(path))


def test_overrides_change_a_copy():
    raw = {"a": {"b": [1, {"c": 2}]}}
    before = json.dumps(raw)
    assert config.override(raw, ("a.b.1.c=3", "a.d=x y", "e=1.5")) == {
        "a": {"b": [1, {"c": 3}], "d": "x y"},
        "e": 1.5,
    }
    assert json.dumps(raw) == before


@frozen(kw_only=True)
class Bounded:
    width: int = field(default=4, validator=config.in_bounds(1, 8))
    mean: tuple[float, ...] = field(default=(0.5, 0.5), validator=config.in_bounds(-1, 1))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"width": 0}, r"Bounded.width must be 1 or more, got 0 @ \$"),
        ({"width": 9}, "Bounded.width must be 8 or less, got 9"),
        ({"mean": [0.0, 1.5]}, "Bounded.mean must be 1 or less, got 1.5"),
    ],
)
def test_a_field_in_bounds_says_what_check_bounds_says(raw, message):
    with pytest.raises(config.ConfigError, match=message):
        config.structure(raw, Bounded)
    with pytest.raises(ValueError, match=r"Bounded.mean must be -1 or more, got nan"):
        Bounded(mean=(float("nan"),))
    assert config.structure({"width": 8}, Bounded) == Bounded(width=8)
