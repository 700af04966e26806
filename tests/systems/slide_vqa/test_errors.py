"""Bad inputs of slide_vqa as its users have them: each is one error that says where, what and what to do, and leaves nothing half-made."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch

from medvl.base import config, files
from medvl.commands import experiments, questions
from medvl.components import compress
from medvl.components.project import ProjectConfig, init_project
from medvl.components.slots import CompressConfig
from medvl.language.encoding import IGNORE
from medvl.slides.reference_files import write_compressor
from medvl.systems import run
from medvl.systems.slide_vqa import run as slide_vqa_run
from medvl.systems.slide_vqa.ask import ask as ask_slide
from medvl.systems.slide_vqa.data import read_split
from medvl.systems.slide_vqa.record import Config
from medvl.systems.slide_vqa.tokens import compute_tokens
from medvl.systems.system import Question
from medvl.training import states
from tests.records import with_settings
from tests.systems.slide_vqa import pieces
from tests.systems.slide_vqa.test_run import MODEL

D = 8
SLIDES = {
    "A0": "train",
    "A1": "train",
    "A2": "train",
    "A3": "train",
    "B0": "valid",
    "B1": "valid",
    "C0": "test",
    "C1": "test",
}
STAGE = {"steps": 1, "lr": 1e-3}
CAPTIONS = STAGE | {"name": "captions", "data": "captions", "train": ["projector/.*"]}
QUESTIONS = STAGE | {"name": "questions", "data": "questions", "train": ["projector/.*", "lora/.*"]}
ANSWER = "A. Stroma"


def record(folder, **change):
    raw = {
        "system": "slide_vqa",
        "hidden": 8,
        "model": {"config": MODEL, "dtype": "float32"},
        "data": {"folder": str(folder)},
        "chat": {"context": 160, "template": "chatml"},
        "compress": {"slots": 2, "hidden": 8, "dim": D},
        "pretrain": {"labels": ["class", "motif"], "steps": 1, "batch": 2, "warmup": 0},
        "lora": {"rank": 2, "pattern": "all-linear"},
        "train": {
            "batch": 2,
            "chunk": 2,
            "validate": 0,
            "checkpoint": False,
            "stages": [CAPTIONS, QUESTIONS],
        },
        "evaluate": {"max_tokens": 2, "batch": 4, "bootstrap": 5},
    }
    return with_settings(raw, **change)


def talk(slide, answer, **change):
    turns = [
        {"from": "human", "value": "<image>\nWhich tissue is there?\nA. Stroma\nB. Fat"},
        {"from": "gpt", "value": answer},
    ]
    return {"image": [f"./features/{slide}.npy"], "conversations": turns} | change


def put(folder):
    """Four slides to train on, two to validate, two to test, with all that is asked about them."""
    (folder / "features").mkdir(parents=True)
    drawn = np.random.default_rng(0)
    for name in SLIDES:
        np.save(folder / "features" / f"{name}.npy", drawn.normal(size=(12, D)).astype("f4"))
    rows = [
        {"slide": n, "split": s, "class": "ab"[i % 2], "motif": "cd"[i // 2 % 2]}
        for i, (n, s) in enumerate(SLIDES.items())
    ]
    files.write_csv(folder / "labels.csv", rows, list(rows[0]))
    for name, split, answer in (
        ("captions", "train", "There is fat."),
        ("train", "train", ANSWER),
        ("valid", "valid", ANSWER),
    ):
        asked = [talk(slide, answer) for slide, of in SLIDES.items() if of == split for _ in range(2)]
        (folder / f"{name}.json").write_text(json.dumps(asked))
    about = {
        "Tumor": "X",
        "Broad Category": "M",
        "Narrow Category": "T",
        "Question": "Which?",
        "A": "Stroma",
        "B": "Fat",
        "Answer": "A",
    }
    asked = [{"ID": f"q{n}", "Slide": n} | about for n, s in SLIDES.items() if s == "test"]
    files.write_csv(folder / "test.csv", asked, list(asked[0]))


def start(place, **change):
    """`invoke train`."""
    (place / "toy.json").write_text(json.dumps(record(place / "data", **change)))
    return run.run(str(place / "toy.json"), log=lambda _: None)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def place(tmp_path):
    put(tmp_path / "data")
    return tmp_path


# What is done to good data --------------------------------------------------------------------------------------------------------------
def text(name, *pairs):
    """Replace in a text file."""

    def edit(data):
        held = (data / name).read_text()
        for a, b in pairs:
            assert a in held
            held = held.replace(a, b)
        (data / name).write_text(held)

    return edit


def gone(name):
    return lambda data: shutil.rmtree(data / name) if (data / name).is_dir() else (data / name).unlink()


def bytes_(name, content):
    return lambda data: (data / name).write_bytes(content)


def patches(name, array):
    return lambda data: np.save(data / "features" / name, array, allow_pickle=True)


def cut_off(name):
    return lambda data: (data / name).write_bytes((data / name).read_bytes()[:150])


def first(**change):
    """Change the first question to train on."""

    def edit(data):
        held = json.loads((data / "train.json").read_text())
        (data / "train.json").write_text(json.dumps([held[0] | change, *held[1:]]))

    return edit


def two_cuts(data):
    """The slide A0 as two slides of the form name.uuid."""
    (data / "features/A0.npy").rename(data / "features/A0.1111.npy")
    np.save(data / "features/A0.2222.npy", np.zeros((5, D), "f4"))


def compressed(dim=D, slots=2):
    sizes = CompressConfig(dim=dim, slots=slots, top_k=1, hidden=8)
    return lambda data: write_compressor(
        compress.init_compress(sizes, torch.Generator().manual_seed(0)), data / "x.pt"
    )


def projected(outputs=32):
    """A projector in the reference's format."""
    sizes = ProjectConfig(inputs=D, hidden=8, outputs=outputs)
    params = init_project(sizes, torch.Generator().manual_seed(0))
    state = {
        f"{module}.{kind}": tensor
        for module, name in (("proj.0", "up"), ("proj.2", "down"))
        for kind, tensor in params[name].items()
    }
    return lambda data: torch.save(state, data / "x.pt")


FILE = {"pretrain": {"file": "DATA/x.pt"}}
PROJECTOR = {"projector": "DATA/x.pt"}
LONG = "A. Stroma" + " word" * 300
TURNS = talk("A0", ANSWER)["conversations"]

RECORDS = [
    ({"pretrain__steps": 0}, "stage compressor.steps must be 1 or more, got 0"),
    ({"pretrain__batch": 0}, "train.batch must be 1 or more, got 0"),
    ({"pretrain__labels": ["class", "class"]}, "pretrain.labels: must be columns, each once"),
    ({"pretrain__labels": ["split"]}, "neither slide nor split, got split"),
    ({"pretrain__labels": "class"}, "expected an array, got 'class' @ $.pretrain.labels"),
    (
        {"pretrain": {"file": "x.pt"}, "compress__kind": "perceiver"},
        "pretrain.file is always of kind moe, got compress.kind 'perceiver'",
    ),
    (
        {"compress__kind": "perceiver", "compress__heads": 3},
        "dim must be a multiple of heads, got dim=8, heads=3",
    ),
    ({"compress__passes": 2}, "only a perceiver can have several passes"),
    ({"hidden": 0}, "experiment.hidden must be 1 or more, got 0"),
    ({"train__batch": 0}, "train.batch must be 1 or more, got 0"),
    ({"train__chunk": 0}, "train.chunk must be 1 or more, got 0"),
    ({"train__save": -1}, "train.save must be 0 or more, got -1"),
    (
        {"train__shard": True, "train__moments": "8bit"},
        "train.moments = '8bit' needs whole weights: train.shard = false",
    ),
    ({"train__stages__1__data": "labels"}, 'stage questions: data must be "captions" or "questions"'),
    ({"train__chunk": 3}, "train.chunk must divide train.batch, got 3 and 2"),
    ({"train__stages__1__train": []}, "stage questions: train must name parameters"),
    ({"train__stages__0__warmup": 2}, "stage captions: warmup must lie within its 1 steps, got 2"),
    ({"pretrain__warmup": 2}, "stage compressor: warmup must lie within its 1 steps, got 2"),
    ({"data__dims": -5}, "data.dims must"),
    ({"train__stages__1__steps": 0}, "stage questions.steps must be 1 or more, got 0"),
    ({"train__stages": [QUESTIONS, CAPTIONS]}, 'put a stage with data = "captions" before'),
    ({"evaluate__batch": 0}, "evaluate.batch must be 1 or more, got 0"),
    ({"data__feature": "x"}, "unknown key 'feature'; DataConfig has source, folder"),
    ({"model": {}}, "model must have either a name (hub or folder) or a config"),
]

UNTRAINABLE = [  # refused before anything is trained
    (
        {"train__stages__1__train": ["adapter/.*"]},
        r"stage questions: pattern 'adapter/\.\*' matches no parameter; the \d+ names look like",
    ),
    (
        {"train__stages__1__steps": 0, "train__stages__1__epochs": 1, "train__stages__1__warmup": 99},
        r"stage questions: warmup must lie within its \d+ steps, got 99",
    ),
    (
        {"train__stages__1__train": ["(lora"]},
        r"stage questions: pattern '\(lora' is not a regular expression",
    ),
    (
        {"train__stages__0__train": ["compressor/.*"]},
        r"stage captions: pattern 'compressor/\.\*' matches no parameter",
    ),
    (
        {"model__quantize": "nf4", "train__stages__1__train": [".*"]},
        r"stage questions: .* has 4 bits and cannot be trained",
    ),
    ({"lora__pattern": "nothing"}, r"lora: nothing names no layer; there are down_proj"),
    ({"chat__template": "qwen9"}, r"captions.json: .*needs a chat template, got 'qwen9'; give one of chatml"),
    ({"chat__context": 8}, r"captions.json: .* 8 of 8 conversations do not fit the context of 8 tokens"),
    ({"model": {"name": "DATA/no-model"}}, r"there is no file or folder .*no-model"),
    (
        {"model__config": {"model_type": "qwen99"}},
        r"model_type must be a language model that transformers has .*found 'qwen99'",
    ),
    (
        {"train__batch": 10},
        r"captions.json: stage captions needs 10 conversations for a batch, found 8 .*lower train.batch",
    ),
    ({"data__dims": 16}, r"features: all slides must have features of one width \(16 wanted\)"),
    ({"data__test": "{folder}/gone.csv"}, r"1 files are missing: .*gone.csv; data\.\* says where they are"),
    ({"data__features": "{folder}/feats"}, r"feats: no such folder"),
    ({"pretrain__labels": ["grade"]}, r"labels.csv: must have the column 'grade', found 'slide', 'split'"),
    (
        {"pretrain__batch": 5},
        r"labels.csv: pretrain.train.batch is 5, found 4 slides of the split train; lower it",
    ),
    (FILE, r"x.pt: no such file"),
    (PROJECTOR, r"read_projector: .*x.pt: no such file"),
]

BAD_FILES = [
    (gone("labels.csv"), {}, r"labels.csv: no such file"),
    (
        text("labels.csv", (",b,", ",a,")),
        {},
        r"labels.csv, split train: .* 'class' must have two classes or more, found \['a'\]",
    ),
    (
        text("labels.csv", ("valid", "val")),
        {},
        r'labels.csv: must have slides of the splits "train" and "valid", found none of \'valid\'',
    ),
    (
        text("labels.csv", ("valid,a,c", "valid,x,y"), ("valid,b,c", "valid,,")),
        {},
        r"split valid must have labels that train",
    ),
    (
        text("labels.csv", ("B0,valid", "A0,valid")),
        {},
        r"labels.csv: every slide must be there once, in one split; .* the first is A0",
    ),
    (text("labels.csv", ("A3,", "A9,")), {}, r"labels.csv: 1 slides have no features, the first is A9"),
    (
        gone("features/B0.npy"),
        {},
        r"valid.json: 1 slides have no features below .*, the first is '.*B0.npy' \(none of 7 is near\); `invoke slides check`",
    ),
    (text("test.csv", (",C0,", ",Z0,"), (",C1,", ",Z1,")), {}, r"test.csv: 2 slides have no features below"),
    (
        patches("A1.npy", np.zeros((5, 9), "f4")),
        {},
        r"all slides must have features of one width, .*A0.npy has 8, .*A1.npy has 9",
    ),
    (two_cuts, {}, r"A0.npy must be one slide, 2 match: A0.1111, A0.2222; give the full name"),
    (
        lambda data: torch.save(torch.zeros(5, D), data / "features/A0.pt"),
        {},
        r"must have one file, there are .*remove all but one",
    ),
    (bytes_("features/A0.npy", b""), {}, r"A0.npy: is empty; patch features are HDF5"),
    (cut_off("features/A0.npy"), {}, r"A0.npy: is not a whole .npy file"),
    (
        patches("A0.npy", np.zeros(D, "f4")),
        {},
        r"A0.npy: holds one vector of 8 numbers, the embedding of a whole slide",
    ),
    (
        patches("A0.npy", np.array({"feature": 1})),
        {},
        r"A0.npy: holds Python objects, .*if you trust the file, write its array once",
    ),
    (
        patches("A0.npy", np.zeros((5, D), "i4")),
        {},
        r"A0.npy: features must be floating point numbers, got int32",
    ),
    (cut_off("train.json"), {}, r"train.json: neither JSON nor a CSV"),
    (bytes_("train.json", b""), {}, r"train.json: is empty; was it fetched whole\?"),
    (bytes_("train.json", b"[]"), {}, r"train.json: none of the formats that are read"),
    (
        text("train.json", ('"conversations"', '"turns"')),
        {},
        r"train.json: none of the formats that are read .*slidebench, wsi_vqa",
    ),
    (text("test.csv", ("Question", "Asked")), {}, r"test.csv: none of the formats that are read"),
    (first(conversations=TURNS[:1]), {}, r"train.json, row 1: needs a turn of the assistant, got user"),
    (
        first(conversations=[TURNS[1], TURNS[0]]),
        {},
        r"train.json, row 1: roles must be user and assistant in turn",
    ),
    (
        first(conversations=[TURNS[0], {"from": "gpt", "value": 3}]),
        {},
        r"row 1: message 1 must be .*, got .*3",
    ),
    (first(image=7), {}, r'train.json, row 1: "image" must be a name or a list of names, got 7'),
    (first(image=[""]), {}, r"train.json: 1 slides have no features .*, the first is ''"),
    (
        text("train.json", ('"image": [', '"images": [')),
        {},
        r'train.json, row 1: must not have "images": slides are read from "image"',
    ),
    (
        text("train.json", ('"image": [', '"slides": [')),
        {},
        r"train.json: none of 8 records names a slide; data.blind = true",
    ),
    (
        text("train.json", ("Which tissue", "Which <|im_end|> tissue")),
        {},
        r"train.json: .*must not hold special tokens .*rewrite them",
    ),
    (
        text("test.csv", ("Which?", "Which <|im_end|>?")),
        {},
        r"test.csv: .*must not hold special tokens .*rewrite them",
    ),
    (
        text("train.json", (ANSWER, " ")),
        {},
        r"train.json: answers must have text to be trained on, each of 8 records has an empty one",
    ),
    (
        text("train.json", (f'"{ANSWER}"', f'"{LONG}"')),
        {},
        r"train.json: .*8 of 8 conversations do not fit the context of 160 tokens",
    ),
    (
        text("valid.json", (f'"{ANSWER}"', f'"{LONG}"')),
        {},
        r"valid.json: .*4 of 4 conversations do not fit the context",
    ),
    (
        text("test.csv", (",C1,", ",C0,")),
        {"evaluate__shuffled": True},
        r"evaluate.shuffled: needs questions about two slides or more",
    ),
    (bytes_("x.pt", b"hello"), FILE, r"x.pt is not a file of plain tensors, or broken"),
    (
        lambda data: torch.save({"a": torch.zeros(2)}, data / "x.pt"),
        FILE,
        r"read_compressor: .*x.pt: missing gate.weight, .*; found a",
    ),
    (
        lambda data: (compressed()(data), cut_off("x.pt")(data)),
        FILE,
        r"x.pt is not a file of plain tensors, or broken",
    ),
    (
        compressed(dim=16),
        FILE,
        r"x.pt: takes patches of 16 numbers, those of .*A0.npy have 8; another encoder\?",
    ),
    (compressed(slots=1), FILE, r"read_compressor: .*x.pt: .*top_k lie in 1\.\.slots"),
    (projected(), FILE, r"read_compressor: .*x.pt: missing gate.weight, .*; found proj.0.weight"),
    (projected(64), PROJECTOR, r"x.pt: maps 8 to 64; tokens have 8, the model 32"),
    (compressed(), PROJECTOR, r"x.pt must hold proj.0 and proj.2: missing proj.0.weight"),
]

BAD_PATCHES = [  # which only reading all patches shows
    (patches("A0.npy", np.full((5, D), np.nan, "f4")), r"A0.npy: patch 0 \(from 0\) holds NaN or infinity"),
    (
        patches("C0.npy", np.full((5, D), np.nan, "f4")),
        r"slide C0: .*C0.npy: patch 0 \(from 0\) holds NaN or infinity",
    ),
    (
        patches("C0.npy", np.full((5, D), 1e30, "f4")),
        r"slide C0: its tokens are beyond 16 bits; are the features normalised",
    ),
]


def of(row):
    return re.sub(r"[^A-Za-z0-9]+", "-", row[-1])[:40]


def named(change, place):
    return {k: json.loads(json.dumps(v).replace("DATA", str(place / "data"))) for k, v in change.items()}


def check_whole(runs):
    """Nothing hidden or cut off, and no results."""
    left = [p for p in runs.rglob("*") if p.is_file()] if runs.exists() else []
    assert not [p for p in left if p.name.startswith(".") or "results" in p.parts]
    for p in left:
        if p.name in ("best.pt", "last.pt"):
            states.read_state(p)
    return left


@pytest.mark.parametrize(("change", "message"), RECORDS, ids=map(of, RECORDS))
def test_bad_records(place, runs, change, message):
    with pytest.raises(config.ConfigError, match=re.escape(message)) as e:
        start(place, **change)
    assert "toy.json: " in str(e.value)
    assert str(e.value).count("\n") == 0
    assert not runs.exists()


@pytest.mark.parametrize(("change", "message"), UNTRAINABLE, ids=map(of, UNTRAINABLE))
def test_what_cannot_be_trained_is_refused_before_training(place, runs, change, message):
    with pytest.raises(ValueError, match=message):
        start(place, **named(change, place))
    assert {p.name for p in check_whole(runs) if "tokenizer" not in p.parts} <= {
        "config.json",
        "environment.json",
        "log.txt",
    }


@pytest.mark.parametrize(("edit", "change", "message"), BAD_FILES, ids=map(of, BAD_FILES))
def test_bad_files_are_refused_before_training(place, runs, edit, change, message):
    edit(place / "data")
    with pytest.raises(ValueError, match=message):
        start(place, **named(change, place))
    assert {p.name for p in check_whole(runs) if "tokenizer" not in p.parts} <= {
        "config.json",
        "environment.json",
        "log.txt",
    }


@pytest.mark.parametrize(("edit", "message"), BAD_PATCHES, ids=map(of, BAD_PATCHES))
def test_bad_patches_are_refused_before_the_stages(place, runs, edit, message):
    edit(place / "data")
    with pytest.raises(ValueError, match=message):
        start(place)
    assert not [p for p in check_whole(runs) if p.parent.name.endswith(("captions", "questions"))]


def test_slides_that_are_trained_on_and_scored_are_counted_however_they_are_written(place, caplog):
    """Paths in one file, names in the other."""
    text("test.csv", (",C0,", ",A0,"))(place / "data")
    slide_vqa_run.prepare(config.structure(record(place / "data"), Config, "test"), lambda _: None)
    for trained in ("captions", "questions", "labels"):
        assert f"1 of 2 patients in test are in {trained}, too" in caplog.text


def test_a_gpu_that_is_not_there(place):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(
        ValueError, match=r"device 'cuda' was requested, but torch finds no GPU; set train.device"
    ):
        start(place, train__device="cuda")


def test_the_good_record_trains_and_one_process_holds_all_shards(place, runs, caplog):
    rows = start(place, train__shard=True)
    assert any(r.what == "accuracy" and r.n == 2 for r in rows)
    assert "train.shard: with one process nothing is sharded; start several with torchrun" in caplog.text
    assert not [p for p in runs.rglob(".*")]


# A run that is asked --------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("errors")
    put(place / "data")
    before, run.RUNS = run.RUNS, place / "runs"
    start(place)
    run.RUNS = before
    (folder,) = (place / "runs").iterdir()
    return place, folder


def saved(name, array):
    def make(path):
        np.save(path / name, np.asarray(array))
        return path / name

    return make


def written(name, content):
    return lambda path: (path / name).write_bytes(content) and path / name


ASKED = [
    (
        saved("a.npy", np.zeros((5, 9), "f4")),
        "q",
        2,
        r"a.npy: all slides must have features of one width \(8 wanted\), .* has 9",
    ),
    (saved("a.npy", np.zeros((0, D), "f4")), "q", 2, r"a.npy: must hold patches, the slide has none"),
    (
        saved("a.npy", np.full((5, D), np.inf, "f4")),
        "q",
        2,
        r"a.npy: patch 0 \(from 0\) holds NaN or infinity",
    ),
    (
        lambda path: (path / "a.h5").touch() or path / "a.h5",
        "q",
        2,
        r"a.h5: is empty; patch features are HDF5",
    ),
    (written("a.svs", b"II*\0" * 20), "q", 2, r"a.svs: starts with .*; patch features are HDF5"),
    (lambda path: path, "q", 2, r"no such file"),
    (None, " ", 2, r"ask: the question must have text"),
    (None, "<image> q", 2, r"every tag '<image>' needs its image, got 2 tags and 1 images"),
    (
        None,
        "q <|im_start|>",
        2,
        r"must not hold special tokens of the tokenizer, found <\|im_start\|>; rewrite them",
    ),
    (None, "q", 0, r"max_tokens.* must be 1 or more, got 0"),
]


@pytest.mark.parametrize(("slide", "question", "most", "message"), ASKED, ids=map(of, ASKED))
def test_bad_questions_to_a_run(trained, tmp_path, slide, question, most, message):
    place, folder = trained
    slide = slide(tmp_path) if slide else place / "data/features/A0.npy"
    with pytest.raises(ValueError, match=message):
        ask_slide(
            folder, Question(text=question, slide=str(slide), out=str(tmp_path / "maps"), max_tokens=most)
        )
    assert not (tmp_path / "maps").exists()
    check_kept(folder)


def test_an_offset_that_is_none(trained, tmp_path):
    place, folder = trained
    with pytest.raises(
        ValueError, match=r"ask: --offset must be x,y in level-0 pixels, such as 12288,2048, got '5'"
    ):
        questions.print_answer(
            "q",
            slide=str(place / "data/features/A0.npy"),
            run=str(folder),
            out=str(tmp_path / "maps"),
            offset="5",
        )
    assert not (tmp_path / "maps").exists()


def check_kept(folder):
    assert not [p for p in folder.rglob(".*")]


BAD_RUNS = [
    (
        lambda copy: shutil.rmtree(copy),
        r"must be the folder of a run, there is no config.json; `invoke train` makes one",
    ),
    (lambda copy: (copy / "config.json").write_text("{"), r"config.json: not valid JSON"),
    (
        lambda copy: (copy / "config.json").write_text('{"system": "tune"}'),
        r"config.json: must be one of 'slide_vqa', got 'tune'",
    ),
    (
        lambda copy: shutil.rmtree(copy / "1-questions"),
        r"1-questions/last.pt: no such checkpoint; train first",
    ),
    (lambda copy: shutil.rmtree(copy / "compressor"), r"compressor/best.pt: no such checkpoint; train first"),
    (
        lambda copy: shutil.rmtree(copy / "tokenizer"),
        r"tokenizer: the run has no tokenizer yet; train it first",
    ),
    (cut_off("1-questions/best.pt"), r"1-questions/best.pt: not a whole checkpoint"),
]


@pytest.mark.parametrize(("edit", "message"), BAD_RUNS, ids=map(of, BAD_RUNS))
def test_runs_that_cannot_be_asked(trained, tmp_path, edit, message):
    place, folder = trained
    edit(shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(ValueError, match=message):
        ask_slide(
            tmp_path / "copy",
            Question(
                text="q", slide=str(place / "data/features/A0.npy"), out=str(tmp_path / "maps"), max_tokens=2
            ),
        )
    assert not (tmp_path / "maps").exists()


NOT_ASKED = [
    ({"slide": "x.h5"}, r"ask: needs either --adapters REGISTRY .* or --run RUN"),
    ({"run": "{run}"}, r"is a slide_vqa run and needs --slide: a file of patch features, STORE.h5::NAME"),
    (
        {"run": "{run}", "slide": "A0", "images": ["x.png"]},
        r"\(slide_vqa\) takes --slide and --offset, not --image",
    ),
    ({"run": "{run}", "slide": "A0", "max_tokens": 0}, r"--max-tokens must be 1 or more, got 0"),
]


@pytest.mark.parametrize(("given", "message"), NOT_ASKED)
def test_what_a_slide_cannot_be_asked_with(trained, given, message):
    given = {key: str(trained[1]) if value == "{run}" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=message):
        questions.print_answer("Which grade?", **given)


def test_a_run_answers_about_a_slide_of_its_features(trained, tmp_path, capsys):
    _, folder = trained
    questions.print_answer(
        "What is seen?", run=str(folder / "config.json"), slide="A0", out=str(tmp_path), max_tokens=2
    )
    assert f"map: {tmp_path}/A0" in capsys.readouterr().out


BAD_EVALUATIONS = [
    (
        lambda place: None,
        ("seed=5",),
        r"no such run; `invoke train --exp .*` makes it \(the same --set must be given\)",
    ),
    (
        lambda place: shutil.rmtree(next((place / "runs").iterdir()) / "1-questions"),
        (),
        r"1-questions/last.pt: no such checkpoint",
    ),
    (lambda place: gone("test.csv")(place / "data"), (), r"test.csv: no such file"),
    (lambda place: gone("features")(place / "data"), (), r"features: no such folder"),
    (
        lambda place: text("test.csv", (",C0,", ",Z0,"), (",C1,", ",Z1,"))(place / "data"),
        (),
        r"none of 2 questions is about a slide",
    ),
]


@pytest.mark.parametrize(("edit", "settings", "message"), BAD_EVALUATIONS, ids=map(of, BAD_EVALUATIONS))
def test_evaluations_of_what_is_not_there(place, runs, trained, edit, settings, message):
    (place / "toy.json").write_text(json.dumps(record(place / "data")))
    _, folder = run.resolve(str(place / "toy.json"))
    shutil.copytree(trained[1], folder)
    files.write_text(folder / "config.json", json.dumps(record(place / "data")))
    shutil.rmtree(folder / "results")
    edit(place)
    with pytest.raises(ValueError, match=message):
        run.evaluate(str(place / "toy.json"), settings, log=lambda _: None)
    check_whole(runs)


def test_labels_count_the_tokens_of_the_compressors_file(place, capsys):
    """Its slots are those of the file, whatever the record says."""
    compressed(slots=5)(place / "data")
    counts = []
    for change in ({}, {"pretrain": {"file": str(place / "data/x.pt")}}):
        (place / "toy.json").write_text(json.dumps(record(place / "data", **change, compress__top_k=1)))
        experiments.print_labels(str(place / "toy.json"), (), 0)
        counts.append(int(re.search(r"<\|image_pad\|> x (\d+)", capsys.readouterr().out)[1]))
        cfg = config.load_record(place / "toy.json", Config)
        assert slide_vqa_run.memory(cfg, place / "runs" / "x")
    assert counts == [2, 5]


def test_a_sample_that_is_not_there(place):
    (place / "toy.json").write_text(json.dumps(record(place / "data")))
    with pytest.raises(ValueError, match=r"labels: sample must be below 8, got 8"):
        experiments.print_labels(str(place / "toy.json"), (), 8)


# Nothing to learn -----------------------------------------------------------------------------------------------------------------------
def test_a_conversation_without_a_trained_token_is_left_out_and_told(place, trained, caplog):
    """An answer without text, an empty one in the middle, one behind the context: none comes into a batch, so no loss is NaN."""
    long = talk("A3", LONG)
    middle = [
        TURNS[0],
        {"from": "gpt", "value": " "},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "Fat."},
    ]
    held = [talk("A0", ""), talk("A1", "", conversations=middle)]
    (place / "data/train.json").write_text(json.dumps([*held, talk("A2", ANSWER), long, talk("A3", ANSWER)]))
    cfg = config.structure(record(place / "data"), Config, "test")
    with caplog.at_level(logging.WARNING):
        read = read_split(cfg, "questions")
    assert [t.row for t in read] == [3, 4, 5]
    assert (
        "train.json: 2 conversations have an answer without text and are left out, such as row 1, 2"
        in caplog.text
    )
    _, folder = trained
    model, params = slide_vqa_run.load(folder)
    data = pieces.encode(model, read)
    assert data.refused == 1
    assert "1 of 3 conversations do not fit the context of 160 tokens" in caplog.text
    assert all(int((s.labels != IGNORE).sum()) > 1 for s in data.samples)
    tokens = compute_tokens(model, folder, read)
    for i in range(len(data.samples)):
        loss, count, _ = pieces.loss_of(model)(params, pieces.make_batch(model, data, tokens, [i]))
        assert bool(loss.isfinite())
        assert int(count) > 1
    assert len(read_split(cfg, "test")) == 2


def test_a_run_with_such_conversations_ends_with_finite_losses(place, runs):
    held = json.loads((place / "data/train.json").read_text())
    (place / "data/train.json").write_text(json.dumps([talk("A0", ""), talk("A1", LONG), *held[2:]]))
    (place / "data/valid.json").write_text(json.dumps([talk("B0", ""), talk("B1", ANSWER)]))
    start(place)
    (folder,) = runs.iterdir()
    lines = [json.loads(line) for line in (folder / "1-questions/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(v) for line in lines for k, v in line.items() if k != "time")
    assert all(line["tokens"] > 0 for line in lines)


def test_a_control_that_cannot_be_is_refused_before_anything_is_answered(place, runs, trained):
    folder = runs / trained[1].name
    shutil.copytree(trained[1], folder)
    shutil.rmtree(folder / "results")
    text("test.csv", (",C1,", ",C0,"))(place / "data")
    settings = (f"data.folder={place / 'data'}", "evaluate.shuffled=true")
    with pytest.raises(
        ValueError, match=r"questions about two slides or more .*; set evaluate.shuffled=false"
    ):
        run.evaluate(str(folder), settings, log=lambda _: None)
    check_whole(runs)
