"""Training that starts from a plugin: the run begins as the plugin answers, and ends as another plugin."""

import json

import pytest
import torch
from attrs import evolve

from medvl.base import config
from medvl.hub import plugin_files
from medvl.systems.unified import ask, data, draw, run
from medvl.systems.unified.model import init_model, open_unified
from medvl.systems.unified.record import Config
from tests.records import with_settings
from tests.systems.unified.pieces import make_files, make_plugin
from tests.systems.unified.test_run import RAW
from tests.tiny import drawn

SOURCES = {
    "understand": {"name": "questions", "task": "understand", "path": "{folder}/{split}.jsonl"},
    # Pictures of 8 px are too small to be scored.
    "draw": {
        "name": "drawings",
        "task": "draw",
        "path": "{folder}/{split}_draw.jsonl",
        "splits": ["train", "valid"],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("start"))


def plugin_of(folder, task, tables=False):
    plugin = make_plugin(folder, task)
    if not tables:
        return plugin
    gen = torch.Generator().manual_seed(3)
    width = len(plugin.projector["down"]["bias"])
    whole = {part: torch.randn(plugin.config.vocabulary, width, generator=gen) for part in ("embed", "head")}
    return evolve(plugin, rows=None, tables=whole)


def record(folder, task, start, **settings):
    """One step of one stage from a plugin in a folder."""
    stage = {"name": "more", "data": task, "steps": 1, "lr": 1e-2, "train": [f"{task}/.*"]}
    raw = RAW | {
        "model": {"name": str(folder / "base"), "dtype": "float32"},
        "tower": {"name": str(folder / "tower")},
        "train": RAW["train"] | {"stages": [stage]},
        "codes": str(folder / "vq") if task == "draw" else "",
    }
    del raw["vq"]
    lora = {"rank": 8, "alpha": 16.0, "experts": 4, "pattern": "all-linear"}
    own = {"level": {"understand": -2, "draw": 1}[task], "start": str(start), "lora": lora}
    settings = {
        f"{task}": own,
        "data__folder": str(folder / "data"),
        "data__sources": [SOURCES[task]],
    } | settings
    return config.structure(with_settings(raw, **settings), Config)


def reply(model, params, task):
    """The answer to a question, or the codes of a picture."""
    if task == "understand":
        return ask.ask_image(model, params, drawn((40, 30)), "Which organ is shown?", max_tokens=12)
    question = ask.make_question(model.task("draw").chat, drawn((40, 30)), "Reconstruct the image.")
    return draw.draw_codes(model, params, draw.encode_drawings(model, [question]), [0]).tolist()


def opened(folder, task, plugin):
    settings = {"vq": folder / "vq", "tower": folder / "tower", "dtype": "float32", "device": "cpu"}
    return open_unified(folder / "base", {task: plugin}, **settings)


@pytest.mark.parametrize("task", ["understand", "draw"])
@pytest.mark.parametrize("tables", [False, True], ids=["rows", "tables"])
def test_a_run_starts_as_its_plugin_and_ends_as_another(folder, tmp_path, task, tables):
    plugin = plugin_of(folder, task, tables)
    plugin_files.write_plugin(plugin, tmp_path / "start")
    cfg = record(folder, task, tmp_path / "start")
    vq = run.open_vq(cfg, tmp_path)
    first = reply(*init_model(cfg, tmp_path, vq), task)
    assert first == reply(*opened(folder, task, plugin), task)
    data.prepare(cfg, lambda _: None)
    (tmp_path / "config.json").write_text(json.dumps(config.unstructure(cfg)))
    model, params = run.fit(cfg, tmp_path, lambda _: None)
    last = reply(model, params, task)
    assert reply(*opened(folder, task, tmp_path / "plugins" / task), task) == last
    assert reply(*run.load(tmp_path), task) == last
    written = plugin_files.read_plugin(tmp_path / "plugins" / task)
    for name in plugin.adapter.factors:
        assert not torch.equal(written.adapter.factors[name]["a"], plugin.adapter.factors[name]["a"])
    assert run.memory(cfg, tmp_path)["more"].memory


@pytest.mark.parametrize("train", [[".*"], ["tower/.*", "understand/.*"]])
def test_no_plugin_is_written_for_a_tower_or_base_that_is_nowhere_else(folder, tmp_path, train):
    plugin_files.write_plugin(plugin_of(folder, "understand"), tmp_path / "start")
    cfg = record(folder, "understand", tmp_path / "start", train__stages__0__train=train)
    data.prepare(cfg, lambda _: None)
    lines = []
    run.fit(cfg, tmp_path, lines.append)
    assert any("none is written" in line for line in lines)
    assert not (tmp_path / "plugins").exists()


def test_plugins_that_a_record_cannot_start_from_are_refused(folder, tmp_path):
    plugin_files.write_plugin(make_plugin(folder, "draw"), tmp_path / "draw")
    plugin_files.write_plugin(make_plugin(folder, "understand"), tmp_path / "understand")
    cases = [
        ("draw", "understand", {}, r"differs \(plugin / record\): .*level: -2 / 1, .*task"),
        ("draw", "draw", {"draw__lora__rank": 4}, r"draw.start: .*rank: 8 / 4"),
        ("draw", "draw", {"chat__template": "phi3"}, "trained with the template 'chatml', found 'phi3'"),
        ("draw", "nothing", {}, "there is no file or folder"),
    ]
    for task, name, settings, message in cases:
        cfg = record(folder, task, tmp_path / name, **settings)
        with pytest.raises(ValueError, match=message):
            init_model(cfg, tmp_path, run.open_vq(cfg, tmp_path))
    with pytest.raises(config.ConfigError, match="leave rslora, rank_pattern and alpha_pattern out"):
        record(folder, "draw", "", draw__lora__rslora=True)
