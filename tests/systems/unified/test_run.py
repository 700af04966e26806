"""A run of unified from a record: drawn heads, a VQ model, three stages, answers and pictures, all of them tiny."""

import copy
import io
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image

from medvl.base import config
from medvl.base.files import file_lock
from medvl.base.tree import flatten
from medvl.components.vq import VqConfig, init_vq
from medvl.hub import vqgan_files
from medvl.language import encoding
from medvl.serve import rooms
from medvl.serve.interface import Refused
from medvl.systems.unified import SYSTEM, ask, data, draw, probe, run, score
from medvl.systems.unified.record import Config
from tests.records import with_settings
from tests.rooms import open_room
from tests.systems.unified.pieces import CLIP, PHI3
from tests.together import run_together

LORA = {"rank": 4, "alpha": 8.0, "experts": 2, "pattern": "all-linear"}
OWN = ["draw/projector/.*", "draw/lora/.*"]
RAW = {
    "system": "unified",
    "data": {"source": "phantoms", "folder": "", "phantoms": {"train": 8, "valid": 2, "test": 2, "size": 32}},
    "model": {
        "dtype": "float32",
        # The rest comes from the tokenizer, which is trained on the texts.
        "config": {k: v for k, v in PHI3.items() if k not in ("vocab_size", "bos_token_id", "eos_token_id")},
    },
    "chat": {"context": 256, "template": "chatml"},
    "tower": {"name": "", "config": CLIP},
    "vq": {
        "model": {
            **{
                "n_embed": 32,
                "embed_dim": 32,
                "z_channels": 32,
                "resolution": 32,
                "ch": 32,
                "ch_mult": [1, 1, 1],
            },
            **{"num_res_blocks": 1, "attn_resolutions": []},
        },
        "train": {
            "stages": [{"name": "vq", "steps": 2, "lr": 1e-3}],
            "batch": 4,
            "chunk": 4,
            "device": "cpu",
            "valid": 2,
        },
    },
    "understand": {"level": -2, "lora": LORA},
    "draw": {"level": 1, "lora": LORA},
    "train": {
        "batch": 4,
        "chunk": 2,
        "checkpoint": False,
        "device": "cpu",
        "validate": 2,
        "valid": 4,
        "log": 1,
        "stages": [
            {"name": "see", "data": "understand", "steps": 2, "lr": 1e-2, "train": ["understand/.*"]},
            {"name": "codes", "data": "draw", "steps": 2, "lr": 1e-2, "train": [*OWN, "rows/.*"]},
            {
                "name": "plug",
                "data": "mixed",
                "steps": 2,
                "lr": 1e-2,
                "train": ["rows/.*", "model/(model.embed_tokens|lm_head).weight"],
            },
            {"name": "draw", "data": "draw", "steps": 2, "lr": 1e-2, "train": OWN},
        ],
    },
    "evaluate": {"max_tokens": 4, "batch": 4, "drawings": 8, "bootstrap": 20},
}


def record(folder, **settings):
    return config.structure(with_settings(RAW, data__folder=str(folder / "data"), **settings), Config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unified_run")
    cfg = record(folder)
    data.prepare(cfg, lambda _: None)
    files = folder / "run"
    files.mkdir()
    (files / "config.json").write_text(json.dumps(config.unstructure(cfg)))
    lines = []
    model, params = run.fit(cfg, files, lines.append)
    return files, cfg, model, params, lines


def test_stages_train_what_they_name_and_a_run_is_read_as_it_was(trained):
    files, cfg, _, params, lines = trained
    loaded, again = SYSTEM.load(files)
    for name, weight in flatten(params).items():
        assert torch.equal(flatten(again)[name], weight), name
    start = run.init_model(cfg, files, loaded.vq)[1]
    changed = {
        name for name, weight in flatten(params).items() if not torch.equal(flatten(start)[name], weight)
    }
    assert {re.sub(r"/(lora|projector)/.*", r"/\1", name) for name in changed} == {
        *(
            "understand/lora",
            "understand/projector",
            "draw/lora",
            "draw/projector",
            "rows/embed",
            "rows/head",
        ),
        *("model/model.embed_tokens.weight", "model/lm_head.weight"),
    }
    assert any("none is written" in line for line in lines)


def test_a_run_that_is_stopped_ends_with_the_same_weights(trained, tmp_path):
    _, cfg, _, params, _ = trained

    def stop_at_the_mixed_stage(line):
        if line.startswith("stage plug: 2 steps train"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.fit(cfg, tmp_path, stop_at_the_mixed_stage)
    _, again = run.fit(cfg, tmp_path, lambda _: None)
    for name, weight in flatten(params).items():
        assert torch.equal(flatten(again)[name], weight), name


def test_a_run_whose_vq_model_is_not_trained_yet_is_left_alone(trained, tmp_path):
    """Whoever asks it would train that model, beside the process that trains the run."""
    shutil.copy(trained[0] / "config.json", tmp_path)
    with pytest.raises(ValueError, match="codes/vq: the run has no VQ model yet; train it first"):
        run.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_one_adapter_for_both_tasks(trained):
    files, _, loaded, _, _ = trained
    stage = {"name": "both", "data": "mixed", "steps": 2, "lr": 1e-2, "train": ["lora/.*", "rows/.*"]}
    cfg = record(files, shared=LORA, train__stages=[stage])
    model, params = run.init_model(cfg, files, loaded.vq)
    assert "lora" not in params["draw"] | params["understand"]
    for task in ("understand", "draw"):
        assert model.tasks.select(params, task)["lora"] is params["lora"] is model.task(task).adapter.factors
    own = [{**stage, "train": ["draw/lora/.*", "rows/.*"]}]
    with pytest.raises(ValueError, match="stage both"):
        run.fit(record(files.parent, shared=LORA, train__stages=own), files, lambda _: None)


def test_pictures_from_text_alone_have_a_temperature_of_their_own(trained, tmp_path, monkeypatch):
    _, cfg, model, params, _ = trained
    drawings = data.read_targets(cfg, cfg.data.sources[1], "test")[:8]
    used = {}
    real = draw.draw_codes

    def draw_codes(*args, temperature, **settings):
        used.update(dict.fromkeys(args[3], temperature))
        return real(*args, temperature=temperature, **settings)

    monkeypatch.setattr(draw, "draw_codes", draw_codes)
    questions = [drawing.question for drawing in drawings]
    both = draw.draw_pictures(model, params, questions, tmp_path / "a", batch=3, text_temperature=1.0)
    assert used == {i: 0.0 if question.images else 1.0 for i, question in enumerate(questions)}
    likeliest = draw.draw_pictures(model, params, questions, tmp_path / "b", batch=3)
    # Each stands at the place of its question, whatever was drawn with it.
    for question, picture, other in zip(questions, both, likeliest, strict=True):
        assert bool(question.images) == (picture == other).all()


def sharded(folder):
    """A record whose matrices are large enough to be cut, to draw the codes of `folder`/vq."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    see, codes = copy.deepcopy(RAW["train"]["stages"][:2])
    settings = {
        "model__config": RAW["model"]["config"] | sizes,
        "tower__config": CLIP | sizes,
        "train__shard": True,
        "train__stages": [
            see | {"train": ["understand/.*", "tower/.*"]},
            codes | {"train": [*OWN, "rows/.*", "model/.*"]},
        ],
    }
    raw = with_settings(RAW, data__folder=str(folder / "data"), codes=str(folder / "vq"), **settings)
    del raw["vq"]
    return config.structure(raw, Config)


def fit_shards(folder):
    """Train it in parts, on all processes."""
    torch.set_num_threads(1)
    run.fit(sharded(folder), folder / "two", lambda _: None)


def test_shards_on_two_processes_train_as_one_process_does(tmp_path):
    model = config.structure(RAW["vq"]["model"], VqConfig)
    vqgan_files.write_vqgan(model, init_vq(model, torch.Generator().manual_seed(0)), tmp_path / "vq")
    data.prepare(sharded(tmp_path), lambda _: None)
    run_together(__name__, "fit_shards", tmp_path, 2)
    run.fit(sharded(tmp_path), tmp_path / "one", lambda _: None)
    for stage in ("0-see", "1-codes"):
        losses = []
        for name in ("one", "two"):
            lines = (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)[key] for line in lines for key in ("loss", "grad_norm")])
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_tokenizer_is_tried_out_once_for_many_prompts(trained, monkeypatch):
    # It goes through all special tokens: with thousands of image codes that takes longer than a prompt.
    _, cfg, model, _, _ = trained
    questions = [drawing.question for drawing in data.read_targets(cfg, cfg.data.sources[1], "test")[:8]]
    real, calls = encoding.tokenizer_traits, []
    monkeypatch.setattr(encoding, "tokenizer_traits", lambda *args: calls.append(args) or real(*args))
    samples = draw.encode_drawings(model, questions).samples
    assert len(samples) == 8
    assert len(calls) <= 2  # once more to see how answers end
    for question, sample in zip(questions, samples, strict=True):
        assert torch.equal(draw.encode_drawings(model, [question]).samples[0].ids, sample.ids)


def test_answers_and_pictures_are_scored_beside_their_controls(trained, monkeypatch):
    files, _, model, params, _ = trained
    folder = files / "results"
    folder.mkdir()
    real, calls = draw.draw_codes, []

    def draw_codes(*args, **settings):
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(draw, "draw_codes", draw_codes)
    monkeypatch.setattr(score, "fit_probe", partial(probe.fit_probe, heads=8, steps=2))
    with pytest.raises(KeyboardInterrupt):
        SYSTEM.assess(model, params, folder, "tiny")
    (folder / "pictures").mkdir()
    (folder / "pictures" / ".1.png.k1ll3d.tmp").write_bytes(b"half")
    rows, page = SYSTEM.assess(model, params, folder, "tiny")
    assert calls[1] == calls[2]  # where it was stopped
    assert sorted(row for call in [calls[0], *calls[2:]] for row in call) == [
        *range(8)
    ]  # none is drawn twice
    subjects = {row.subject for row in rows if row.what == "ssim_gaussian"}
    assert {
        "all: drawn",
        "reconstruction: copied input",
        "all: mean target",
        "report: vq reconstruction",
    } <= subjects
    assert "report: copied input" not in subjects
    metrics = {row.what for row in rows}
    assert {"accuracy", "accuracy_of_the_usual_training_answer", "all_as_reported"} <= metrics
    assert "accuracy_of_the_question_alone" in metrics
    assert "accuracy_of_the_usual_answer_of_others" not in metrics
    assert "Pictures of the test split" in page.read_text()
    assert len([*(folder / "pictures").glob("*.png")]) == 8
    assert not [*folder.glob("*unfinished*")]
    assert not [*folder.rglob(".*")]


def test_two_processes_do_not_draw_into_one_folder(trained, tmp_path):
    _, cfg, model, params, _ = trained
    (source,) = data.find_sources(cfg, "draw", "test")
    questions = [drawing.question for drawing in data.read_targets(cfg, source, "test")[:1]]
    with file_lock(tmp_path / "pictures"), pytest.raises(ValueError, match="another run is writing to it"):
        draw.draw_pictures(model, params, questions, tmp_path)


def test_without_a_training_split_controls_are_left_out_or_have_another_name(trained, tmp_path, monkeypatch):
    _, cfg, model, params, _ = trained
    sources = tuple(evolve(source, splits=("test",)) for source in cfg.data.sources)
    settings = evolve(cfg, data=evolve(cfg.data, sources=sources), evaluate=evolve(cfg.evaluate, drawings=4))
    tested = evolve(model, cfg=settings)
    folder = tmp_path / "results"
    folder.mkdir()
    rows, _, notes = score.score_drawings(tested, params, folder, "tiny")
    subjects = {row.subject.split(": ")[1] for row in rows}
    assert subjects - {"shuffled reports"} == {"drawn", "copied input", "vq reconstruction"}
    assert any("There is no mean target" in note for note in notes)
    metrics = {row.what for row in score.score_questions(tested, params, folder, "tiny")}
    assert metrics == {
        "accuracy",
        "accuracy_of_yes",
        "accuracy_of_the_usual_answer_of_others",
        "accuracy_of_the_question_alone_of_others",
    }


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "test.jsonl",
            {"query": "<image>What?", "response": "A cyst.", "image": "none.png"},
            "'none.png' does not exist",
        ),
        ("test_draw.jsonl", {"text": "A head.", "target": "none.png"}, "a file that is there"),
        *(
            (
                f"{split}_draw.jsonl",
                {"text": "A head.", "target": "test.jsonl"},
                f"{split}_draw.jsonl, line 1: .*must be an image",
            )
            for split in ("valid", "test")
        ),
    ],
)
def test_faults_of_the_test_split_are_found_before_stages_are_trained(trained, tmp_path, name, line, message):
    _, cfg, *_ = trained
    shutil.copytree(data.data_folder(cfg), tmp_path / "data")
    (tmp_path / "data" / name).write_text(json.dumps(line) + "\n")
    cfg = evolve(cfg, data=evolve(cfg.data, source="files", folder=str(tmp_path / "data")))
    with pytest.raises(ValueError, match=message):
        run.fit(cfg, tmp_path / "run", lambda _: None)
    assert not (tmp_path / "run" / "0-see").exists()


def test_pictures_that_are_too_small_to_be_scored_are_refused_before_training(trained, tmp_path):
    files, *_ = trained
    cfg = record(files.parent, vq__model__resolution=8)
    with pytest.raises(
        ValueError, match=r"data source drawings, test .* must have 11 pixels a side or more, got \(8, 8"
    ):
        run.fit(cfg, tmp_path, lambda _: None)
    assert not [*tmp_path.iterdir()]


def test_a_stage_must_train_what_its_data_is_computed_with(trained, tmp_path):
    files, *_ = trained
    stage = {"name": "a", "data": "understand", "steps": 2, "lr": 1e-2, "train": ["draw/projector/.*"]}
    cfg = record(files.parent, train__stages=[stage])
    with pytest.raises(
        ValueError, match=r"stage a: must train something .*'understand'.* only draw/projector"
    ):
        run.fit(cfg, tmp_path, lambda _: None)
    assert not (tmp_path / "codes").exists()  # no VQ model was trained for it


def test_samples_and_memory_are_shown_before_a_run(trained, tmp_path):
    files, cfg, *_ = trained
    assert "<start_index><idx_0><idx_0>" in run.labels(cfg, files)
    seen = evolve(cfg, train=evolve(cfg.train, stages=cfg.train.stages[:1]))
    assert "<|image_pad|> x 4" in run.labels(seen, files, 1)
    steps = run.memory(cfg, files)
    assert [*steps] == ["see", "codes", "plug", "draw"]
    assert all(sum(step.memory.values()) > 0 for step in steps.values())


def test_shares_of_a_mixed_stage_are_drawn_by_the_seed(trained):
    _, cfg, model, _, _ = trained
    source = cfg.data.sources[0]
    encoded = run._encode_source(cfg, model, source, "train", None)
    third = run.take_share(encoded, 0.25, 0)
    assert len(third.samples) == len(third.conversations) == round(0.25 * len(encoded.samples))
    sources = tuple(evolve(source, share=0.001) for source in cfg.data.sources)
    few = evolve(cfg, data=evolve(cfg.data, sources=sources))
    stage, data = cfg.train.stages[2], {(source.name, "train"): encoded for source in sources}
    with pytest.raises(ValueError, match="stage plug: the shares leave no sample to understand; raise share"):
        run._stage_data(few, data, stage, "train")
    large = evolve(cfg.train.stages[0], batch=400)
    count = len(encoded.samples)
    with pytest.raises(
        ValueError, match=f"stage see: a batch of 400 needs as many samples, found {count}; lower"
    ):
        run._stage_data(cfg, data, large, "train")
    assert (
        run.take_share(encoded, 0.25, 0).samples == third.samples != run.take_share(encoded, 0.25, 1).samples
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train__stages__1__train": OWN},
            "stage codes: must train the rows of the image codes .* ln 8192 = 9.01",
        ),
        ({"train__stages__0__data": "questions"}, 'stage see: data must be "understand", "draw" or "mixed"'),
        ({"shared": LORA, "draw__start": "folder"}, "shared: plugins bring adapters of their own"),
        ({"train__shard": True}, 'stage plug: data = "mixed" needs whole weights .* train.shard = false'),
        (
            {"train__stages__1__name": "see"},
            r"train.stages must have names of their own, got \['see', 'see', 'plug', 'draw'\]",
        ),
        (
            {"data__sources": [{"name": "a", "task": "draw"}, {"name": "a", "task": "understand"}]},
            r"data.sources must have names of their own, got \['a', 'a'\]",
        ),
        (
            {
                "data__sources": [
                    {"name": "a", "task": "draw", "stages": ["see", "sea"]},
                    {"name": "b", "task": "understand"},
                ]
            },
            "data source a: stages must be names of train.stages, found sea",
        ),
        ({"codes": "folder"}, "to draw needs either codes .* or vq .*; got codes 'folder' and a table vq"),
        ({"tower__name": "clip"}, "tower must have either a name"),
        (
            {"data__sources": [{"name": "a", "task": "understand"}]},
            "stage codes: data.sources must have one of task 'draw'",
        ),
        (
            {"data__sources": [{"name": "a", "task": "draw"}]},
            "stage see: data.sources must have one of task 'understand'",
        ),
    ],
)
def test_records_that_cannot_be_trained_are_refused(tmp_path, settings, message):
    with pytest.raises(config.ConfigError, match=message):
        record(tmp_path, **settings)


def test_a_run_is_served(trained):
    """Answers and pictures, as PNG, are those of the run."""
    files, _, model, params, _ = trained
    room = open_room(rooms.open_unified, files)
    image = Image.new("RGB", (12, 12), (90, 9, 9))
    answer = room("ask", question="Which organ?", image=image, max_tokens=5)
    assert answer == ask.ask_image(model, params, image, "Which organ?", max_tokens=5)
    png = room("draw", text="Draw.", image=image, temperature=0.0, seed=0)
    expected = draw.draw_image(model, params, image, "Draw.")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(expected))
    with pytest.raises(Refused, match="must have text"):
        room("ask", question=" ", image=image, max_tokens=5)
