"""adapters: drawn modalities, from a record to a base model, an adapter each, a registry and the table of modes, at toy size."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from attrs import evolve

from medvl.adapters import embedders, experts, registry
from medvl.adapters.retrieve import RetrieveConfig
from medvl.base import config
from medvl.base.config import ConfigError
from medvl.commands import experiments, questions, registries
from medvl.language.conversations import Conversation
from medvl.serve.models import open_served
from medvl.systems import run
from medvl.systems.adapters import data, score, tables
from medvl.systems.adapters import record as adapters
from medvl.systems.adapters import run as adapters_run
from medvl.systems.adapters.data import read_split
from medvl.systems.adapters.record import Config
from tests import tiny
from tests.openings import count_openings
from tests.records import with_settings
from tests.rooms import answer_served, ask

VISION = tiny.CONFIGS["qwen2_5_vl"]
MODEL = {
    "model_type": "qwen2_5_vl",
    "text_config": VISION["text_config"] | {"max_position_embeddings": 512},
    "vision_config": VISION["vision_config"] | {"patch_size": 14, "window_size": 56},
}
PICTURES = {
    "modalities": ["ct", "xray", "fundus"],
    "base": 12,
    "base_valid": 4,
    "train": 4,
    "valid": 1,
    "test": 2,
    "size": 56,
}
STAGE = {"batch": 4, "chunk": 4, "log": 1, "save": 2, "validate": 0, "checkpoint": False}


def record(tmp_path, **change):
    raw = {
        "system": "adapters",
        "model": {"config": MODEL, "dtype": "float32"},
        "data": {
            "source": "phantoms",
            "folder": str(tmp_path / "data"),
            "general": "{folder}/base_{split}.jsonl",
            "phantoms": {
                "modalities": ["ct", "xray", "fundus"],
                "base": 12,
                "base_valid": 4,
                "train": 4,
                "valid": 1,
                "test": 2,
                "size": 56,
            },
        },
        "chat": {"context": 96},
        "base": STAGE | {"stages": [{"name": "whole", "steps": 2, "lr": 1e-3, "train": ["model/.*"]}]},
        "lora": {"rank": 2, "pattern": "all-linear", "vision": True},
        "train": STAGE | {"stages": [{"name": "lora", "steps": 2, "lr": 0.1, "train": ["lora/.*"]}]},
        "pool": {"samples": 6},
        "retrieve": {"k": 2},
        "evaluate": {"max_tokens": 4, "batch": 4, "bootstrap": 20, "by_k": [1], "recall": [1, 3]},
    }
    return with_settings(raw, **change)


def build(raw):
    return config.structure(raw, Config, "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(place, run folder, results) of a whole run."""
    place = tmp_path_factory.mktemp("adapters")
    (place / "toy.json").write_text(json.dumps(record(place)))
    before, run.RUNS = run.RUNS, place / "runs"
    rows = run.run(str(place / "toy.json"), log=lambda _: None)
    run.RUNS = before
    (folder,) = (place / "runs").iterdir()
    return place, folder, rows


# A run ----------------------------------------------------------------------------------------------------------------------------------
def test_a_run_from_pictures_to_a_table(trained):
    _, folder, rows = trained
    assert sorted(p.name for p in (folder / "adapters").iterdir()) == ["ct", "fundus", "xray"]
    held = registry.read_registry(folder / "registry.toml")
    assert [(r.name, r.category, r.samples) for r in held.adapters] == [
        ("ct", "radiology", 6),
        ("fundus", "ophthalmology", 6),
        ("xray", "radiology", 6),
    ]
    found = {(r.subject, r.split): r for r in rows if r.what == "step_accuracy"}
    assert {s for s, _ in found} == {"bare", "selection", "mixture", "mixture of 1", "fusion", "oracle"}
    assert found["bare", "in domain"].value == found["bare", "out of domain"].value
    assert all(r.n == 18 for r in found.values())
    assert {r.n for r in rows if r.what == "episode_accuracy"} == {6}
    page = (folder / "results/summary.md").read_text()
    assert "Research use only, not for diagnosis" in page
    for said in (
        "Step accuracy",
        "Episode accuracy",
        "mixture - bare",
        "Retrieval of a step's own adapter",
        "Step accuracy of each task",
    ):
        assert said in page
    assert (folder / "results/report.html").stat().st_size > 20_000
    lines = [
        json.loads(x)
        for x in next((folder / "results/answers").glob("mixture-out-2-*")).read_text().splitlines()
    ]
    assert all(line["task"] not in line["adapters"] and len(line["adapters"]) == 2 for line in lines)
    lines = [
        json.loads(x) for x in next((folder / "results/answers").glob("oracle-*")).read_text().splitlines()
    ]
    assert all(line["adapters"] == {line["task"]: 1.0} for line in lines)


def test_reports_name_no_case_and_no_image(trained):
    """Episodes and files are called after patients; what they were is in the answers, which stay beside the data."""
    place, folder, _ = trained
    steps = score.steps_of(read_split(build(record(place)), "test"), build(record(place)))
    names = {s.episode.partition(": ")[2] for s in steps} | {
        p.stem for s in steps for p in s.conversation.images
    }
    assert len(names) >= 12
    pages = [p for p in (folder / "results").iterdir() if p.is_file()]
    assert {p.name for p in pages} >= {
        "summary.md",
        "report.html",
        "report.md",
        "results.csv",
        "results.jsonl",
    }
    for page in pages:
        words = {*re.findall(r"[\w.-]+", page.read_text())}
        assert not words & names, page


def test_adapters_learnt_something_and_are_as_peft_reads_them(trained):
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    of = experts.load_experts(model.chat, params["model"], folder / "registry.toml")
    experts.check_adapters(of)
    pool = of.pool([0, 1, 2])
    assert all(float(f["b"].abs().max()) > 0 for f in pool.factors.values())
    about = json.loads((folder / "adapters/ct/adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["base_model_name_or_path"]) == ("LORA", 2, "model")


def test_the_saved_model_is_the_trained_one(trained):
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    again = experts.open_experts(folder / "registry.toml", dtype="float32")
    assert all(torch.equal(t, again.params[n]) for n, t in params["model"].items())
    assert again.chat.vision.preprocessor == model.chat.vision.preprocessor
    picture = next((folder.parent.parent / "data").rglob("test/*.png"))
    for mode in ("bare", "selection", "mixture", "fusion"):
        said = experts.ask_experts(again, "How many lesions are there?", [picture], mode=mode, max_tokens=3)
        assert len(said.adapters) == {"bare": 0, "selection": 1}.get(mode, 3)
    said = experts.ask_experts(
        again, "How many lesions are there?", [picture], mode="oracle", own="ct", max_tokens=3
    )
    assert [(n, w) for n, _, w in said.adapters] == [("ct", 1.0)]


def test_the_same_again_and_from_kept_answers(trained, monkeypatch):
    place, folder, rows = trained
    monkeypatch.setattr(run, "RUNS", place / "runs")
    kept = {p.name: p.read_bytes() for p in (folder / "results/answers").iterdir()}
    calls = []
    monkeypatch.setattr(experts, "answer_prompts", lambda *a, **k: calls.append(a))
    again = run.evaluate(
        str(place / "toy.json"), log=lambda _: None
    )  # from the lines that are there: no model is asked
    assert not calls
    assert [(r.what, r.subject, r.split, r.value, r.low) for r in again if r.low == r.low] == [
        (r.what, r.subject, r.split, r.value, r.low) for r in rows if r.low == r.low
    ]
    assert {p.name: p.read_bytes() for p in (folder / "results/answers").iterdir()} == kept


def test_answers_go_on_where_they_stopped(trained, tmp_path):
    """Cut anywhere, also inside a line: the file ends with the same bytes."""
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    cfg, of = model.cfg, experts.load_experts(model.chat, params["model"], model.registry)
    steps = score.steps_of(read_split(cfg, "test"), cfg)
    found = score.choose_for_steps(
        score.Run(mode="mixture", domain="in", k=2), of, steps, score.embed_steps(of, steps, cfg), cfg
    )
    whole = next((folder / "results/answers").glob("mixture-in-2-*")).read_bytes()
    gen = torch.Generator().manual_seed(0)
    for i in range(6):
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(whole[: int(torch.randint(len(whole), (), generator=gen))])
        score.answer_steps(of, steps, found, "mixture", cfg, path)
        assert path.read_bytes() == whole


def test_an_evaluation_killed_at_random_moments(trained, tmp_path):
    """The table is the same to the last digit (MEDVL_KILLS=10 for more than two)."""
    place, folder, _ = trained
    want = (folder / "results/summary.md").read_text()
    kept = {p.name: p.read_bytes() for p in (folder / "results/answers").iterdir()}
    for p in (folder / "results/answers").iterdir():
        p.unlink()
    code = (
        f"from pathlib import Path; from medvl.systems import run; run.RUNS = Path({str(folder.parent)!r})\n"
    )
    code += f"run.evaluate({str(place / 'toy.json')!r}, log=lambda _: None)"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    gen = torch.Generator().manual_seed(1)
    for _ in range(int(os.environ.get("MEDVL_KILLS", "2"))):
        had = sum(p.stat().st_size for p in (folder / "results/answers").iterdir())
        work = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=Path(__file__).parents[3])
        while (
            work.poll() is None
            and sum(p.stat().st_size for p in (folder / "results/answers").iterdir()) == had
        ):
            time.sleep(0.02)  # until it has begun to write
        time.sleep(float(torch.rand((), generator=gen)) * 0.5)
        work.send_signal(signal.SIGKILL)
        work.wait()
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=Path(__file__).parents[3])
    assert {p.name: p.read_bytes() for p in (folder / "results/answers").iterdir()} == kept
    assert (folder / "results/summary.md").read_text() == want


class Killed(BaseException):
    """Stands for SIGKILL: nothing behind it runs, and nothing catches it."""


STEPS = (  # every call after which something is on disk that was not there before
    *((embedders, "save_embedder"), (registry.files, "write_array"), (registry, "write_registry")),
    *((adapters_run, "write_adapter"), (adapters_run.chat, "save_chat")),
)


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize(("module", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_run_killed_between_two_writes_goes_on(trained, tmp_path, monkeypatch, module, name, when):
    """Before or behind any write of a run: the same command ends with the registry, the adapters and the model of one that was not."""
    _, folder, _ = trained
    shutil.copytree(folder, tmp_path / folder.name)
    work = tmp_path / folder.name
    shutil.rmtree(work / "results")
    for left in (
        "registry.toml",
        "vectors",
        "adapters/xray",
        "adapters/fundus",
        "model",
        *(p.name for p in work.glob("embedder*")),
    ):
        shutil.rmtree(work / left) if (work / left).is_dir() else (work / left).unlink()
    cfg = config.load_record(work / "config.json", Config)
    real = getattr(module, name)

    def killing(*args, **kwargs):
        if when == "behind":
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(module, name, killing)
        with pytest.raises(Killed):
            adapters_run.fit(cfg, work, lambda _: None)
    adapters_run.fit(cfg, work, lambda _: None)
    assert contents(work, "registry.toml", "vectors", "embedder*", "adapters", "model") == contents(
        folder, "registry.toml", "vectors", "embedder*", "adapters", "model"
    )


def contents(folder, *patterns):
    """{relative name: bytes} of files, and of those in folders."""
    found = [p for pattern in patterns for p in folder.glob(pattern)]
    files = [f for p in found for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_tasks_that_would_be_other_places_are_refused_before_anything_is_trained(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"query": "q", "response": "a", "task": "../../x"}\n')
    raw = record(tmp_path, data__source="files", data__folder=str(tmp_path), data__general="")
    with pytest.raises(ValueError, match=r"train: the task '../../x': the name is used as a file name"):
        data.prepare(build(raw), lambda _: None)


# Steps ----------------------------------------------------------------------------------------------------------------------------------
def talk(*turns, **extra):
    roles = ("user", "assistant")
    return Conversation(
        messages=tuple({"role": roles[i % 2], "content": t} for i, t in enumerate(turns)),
        extra={"task": "ct"} | extra,
    )


def test_every_turn_is_a_step(tmp_path):
    cfg = build(record(tmp_path))
    a, b = Path("a.png"), Path("b.png")
    held = evolve(talk("<image>\nq1", "a1", "q2", "a2", "<image>\nq3", "a3", episode_id="7"), images=(a, b))
    steps = score.steps_of([held, evolve(talk("q", "a"), line=4)], cfg)
    assert [s.gold for s in steps] == ["a1", "a2", "a3", "a"]
    assert [s.turn for s in steps] == [0, 1, 2, 0]
    assert [s.episode for s in steps] == ["ct: 7"] * 3 + ["ct: line 4"]
    assert [s.conversation.images for s in steps] == [(a,), (a,), (a, b), ()]
    assert [s.query for s in steps[:3]] == [("<image>\nq1", (a,)), ("q2", (a,)), ("<image>\nq3", (b,))]


def test_its_own_answers_as_history(trained, monkeypatch, tmp_path):
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    cfg = evolve(model.cfg, evaluate=evolve(model.cfg.evaluate, history="own", per="episode", batch=2))
    of = experts.load_experts(model.chat, params["model"], model.registry)
    steps = score.steps_of(
        [talk("q1", "a1", "q2", "a2", episode_id="1"), talk("r1", "b1", "r2", "b2", episode_id="2")], cfg
    )
    asked = []

    def answers(of, data, rows, found, mode, max_tokens):
        asked.extend([m["content"] for m in data.conversations[i].messages[:-1]] for i in rows)
        return [f"said {len(asked) - len(rows) + n}" for n, _ in enumerate(rows)]

    monkeypatch.setattr(experts, "answer_prompts", answers)
    found = experts.choose_adapters("selection", cfg.retrieve, torch.ones(4, of.vectors.shape[1]), of.vectors)
    lines = score.answer_steps(of, steps, found, "selection", cfg, tmp_path / "x.jsonl")
    assert asked == [["q1"], ["r1"], ["q1", "said 0", "q2"], ["r1", "said 1", "r2"]]
    assert [line["answer"] for line in lines] == ["said 0", "said 2", "said 1", "said 3"]


def test_a_question_without_a_known_word_is_the_bare_models(trained, caplog):
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    of = experts.load_experts(model.chat, params["model"], model.registry)
    steps = score.steps_of(
        [talk("How many lesions are there?", "a", id="1"), talk("qqq zzz", "a", id="2")], model.cfg
    )
    queries = score.embed_steps(of, steps, model.cfg)
    assert "1 of 2 questions have no word that the embedder knows" in caplog.text
    found = score.choose_for_steps(score.Run(mode="mixture", domain="in", k=2), of, steps, queries, model.cfg)
    assert found.abstained.tolist() == [False, True]
    assert found.weights.sum(1).tolist() == [1.0, 0.0]
    queries = score.embed_steps(
        of, steps[1:], model.cfg
    )  # the same where it is the only one, and where it is asked alone
    for mode in ("selection", "mixture", "fusion"):
        found = score.choose_for_steps(
            score.Run(mode=mode, domain="out", k=2), of, steps[1:], queries, model.cfg
        )
        assert found.abstained.tolist() == [True]
        said, bare = (experts.ask_experts(of, "qqq zzz", mode=m, max_tokens=3) for m in (mode, "bare"))
        assert said == bare
        assert said.adapters == ()


@pytest.mark.parametrize("k", [0, 2])
def test_a_report_where_rows_have_no_adapter(trained, tmp_path, monkeypatch, k):
    """A question with no known word beside others, or k = 0: all rows are counted, none is lost."""
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    cfg = evolve(
        model.cfg,
        retrieve=evolve(model.cfg.retrieve, k=k),
        evaluate=evolve(model.cfg.evaluate, modes=("selection", "mixture"), by_k=()),
    )
    monkeypatch.setattr(experts, "answer_prompts", lambda of, data, rows, *rest: ["a" for _ in rows])
    held = [talk("How many lesions are there?", "a", id="1"), talk("qqq zzz", "b", id="2")]
    rows, page = tables.assess(evolve(model, cfg=cfg), params, held, tmp_path, "x")
    assert {(r.subject, r.split): (r.n, r.value) for r in rows if r.what == "step_accuracy"} == {
        (mode, domain): (2, 0.5)
        for mode in ("selection", "mixture")
        for domain in ("in domain", "out of domain")
    }
    (recall,) = (r for r in rows if r.what == "recall_at_3")
    assert (recall.n, recall.value) == (2, 0.5)  # the one without a word missed it
    assert {r.value for r in rows if r.what == "abstained"} == ({0.5} if k else {1.0})
    assert page.exists()


def test_one_step_that_fails_is_one_that_is_wrong(trained, tmp_path, caplog):
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    of = experts.load_experts(model.chat, params["model"], model.registry)
    steps = score.steps_of(
        [talk("q", "a", id="1"), talk("word " * 600, "a", id="2"), talk("q", "a", id="3")], model.cfg
    )
    found = experts.choose_adapters(
        "bare", model.cfg.retrieve, torch.ones(3, of.vectors.shape[1]), of.vectors
    )
    lines = score.answer_steps(of, steps, found, "bare", model.cfg, tmp_path / "x.jsonl")
    assert [("error" in line) for line in lines] == [False, True, False]
    assert "positions" in lines[1]["error"]
    assert not lines[1]["right"]
    assert "counts as wrong" in caplog.text
    with pytest.raises(ValueError, match="none of 1 questions could be answered"):
        score.answer_steps(
            of, steps[1:2], score._select_rows(found, [1]), "bare", model.cfg, tmp_path / "y.jsonl"
        )


def test_what_was_answered_is_kept_when_a_later_batch_fails(trained, tmp_path, monkeypatch):
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    cfg = evolve(model.cfg, evaluate=evolve(model.cfg.evaluate, batch=2))
    of = experts.load_experts(model.chat, params["model"], model.registry)
    steps = score.steps_of([talk(f"q{i}", "a", id=str(i)) for i in range(6)], cfg)
    found = experts.choose_adapters("bare", cfg.retrieve, torch.ones(6, of.vectors.shape[1]), of.vectors)
    asked = []

    def answers(of, data, rows, *rest):
        asked.append([c.messages[0]["content"] for c in data.conversations])
        if len(asked) == 3:
            raise RuntimeError("CUDA error")
        return ["a", "\ud800 b"]  # text that is no UTF-8 must not stop the others

    monkeypatch.setattr(experts, "answer_prompts", answers)
    with pytest.raises(RuntimeError, match="CUDA error"):
        score.answer_steps(of, steps, found, "bare", cfg, tmp_path / "x.jsonl")
    lines = score.answer_steps(of, steps, found, "bare", cfg, tmp_path / "x.jsonl")
    assert asked == [["q0", "q1"], ["q2", "q3"], ["q4", "q5"], ["q4", "q5"]]
    assert [line["answer"] for line in lines] == ["a", "\ud800 b"] * 3
    assert [line["right"] for line in lines] == [True, False] * 3
    asked.clear()
    assert score.answer_steps(of, steps, found, "bare", cfg, tmp_path / "x.jsonl") == lines
    assert not asked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe garbage\n", "line 1: not a line of results"),
        (b"[" * 9999 + b"\n", "line 1: not a line of results"),
        (b'{"row": 3}\n', "line 1: results of other rows"),
        (b'{"row": 0}\n', "row 0: not a line of answers; remove the file"),
    ],
)
def test_a_file_of_answers_that_is_none_is_named(trained, tmp_path, content, message):
    _, folder, _ = trained
    model, params = adapters_run.load(folder)
    of = experts.load_experts(model.chat, params["model"], model.registry)
    steps = score.steps_of([talk("q", "a")], model.cfg)
    found = experts.choose_adapters(
        "bare", model.cfg.retrieve, torch.ones(1, of.vectors.shape[1]), of.vectors
    )
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        score.answer_steps(of, steps, found, "bare", model.cfg, path)
    assert path.read_bytes() == content


def test_answers_are_named_by_the_content_they_were_made_from(trained, tmp_path):
    """An image, a vector or an adapter that is replaced under its name, by one of the same size, is asked again."""
    _, folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    model, _ = adapters_run.load(tmp_path / "run")
    picture = tmp_path / "a.bmp"
    tiny.drawn((8, 8)).save(picture)
    steps = score.steps_of([evolve(talk("<image>\nq", "a"), images=(picture,))], model.cfg)
    made = [score.stamp_answers(model.cfg, model.registry, steps)]
    vector = next((tmp_path / "run/vectors").glob("ct-*.npy"))
    for path in (picture, vector, tmp_path / "run/adapters/xray/adapter_model.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        made.append(score.stamp_answers(model.cfg, model.registry, steps))
    assert len({*made}) == len(made) == 4


# Tasks ----------------------------------------------------------------------------------------------------------------------------------
def test_a_registry_built_from_a_folder(trained, tmp_path, capsys):
    place, folder, _ = trained
    held = [json.loads(x) for x in next((place / "data").rglob("train.jsonl")).read_text().splitlines()]
    root = next((place / "data").rglob("train.jsonl")).parent
    for task in ("ct", "xray", "fundus"):
        own = [x | {"images": [str(root / i) for i in x["images"]]} for x in held if x["task"] == task]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in own))
    new = str(tmp_path / "new.toml")
    registries.manage_registry(
        "build",
        new,
        path=str(folder / "adapters/{task}"),
        samples=str(tmp_path / "{task}.jsonl"),
        overrides=("dims=8",),
    )
    said = capsys.readouterr().out
    assert "| xray | radiology | 2 |" in said  # the category from the samples
    assert "| fundus | ophthalmology | 2 |" in said
    about = {"name": "ct again", "description": "the same"}
    registries.manage_registry(
        "add", new, path=str(folder / "adapters/ct"), samples=str(tmp_path / "ct.jsonl"), **about
    )
    registries.manage_registry("show", new, name="ct again")
    said = capsys.readouterr().out
    assert "category: radiology" in said
    assert re.search(r"\| ct \| 0\.9|\| ct \| 1\.0", said)
    picture = next((place / "data").rglob("test/*.png"))
    given = {"images": [str(picture)], "mode": "mixture", "k": 2, "base": str(folder / "model")}
    questions.print_answer(
        "Where is the lesion?", adapters=new, **given, max_tokens=3, overrides=('dtype="float32"',)
    )
    said = capsys.readouterr().out
    assert "Similarity" in said
    assert "Research use only, not for diagnosis" in said


def test_a_registry_built_of_checkpoints_and_one_file_of_samples(trained, tmp_path, capsys, caplog):
    """As ms-swift lays out its folders: the last checkpoint by number, said in the log; the base as it is called here."""
    place, folder, _ = trained
    for task, checkpoints in {
        "ct": ("v0-2024/checkpoint-9", "v0-2024/checkpoint-10"),
        "xray": ("v1-2024/checkpoint-1",),
    }.items():
        for name in checkpoints:
            shutil.copytree(folder / "adapters" / task, tmp_path / "output" / task / name)
    (tmp_path / "output/fundus/v0-2024/checkpoint-1").mkdir(parents=True)  # not trained yet
    pattern, samples = (
        str(tmp_path / "output/{task}/v*-2024/checkpoint-*"),
        str(next((place / "data").rglob("train.jsonl"))),
    )
    given = {"path": pattern, "samples": samples, "base": str(folder / "model"), "overrides": ("dims=8",)}
    registries.manage_registry("build", str(tmp_path / "a/new.json"), **given)
    said = capsys.readouterr().out
    assert "| ct | radiology | 2 |" in said
    assert "fundus" not in said
    assert f"base model {folder}/model" in said
    assert "left out, there is no adapter_config.json: fundus" in caplog.text
    assert "ct: 2 folders match, the last one is used: " in caplog.text
    held = registry.read_registry(tmp_path / "a/new.json")
    assert [r.path for r in held.adapters] == [
        "../output/ct/v0-2024/checkpoint-10",
        "../output/xray/v1-2024/checkpoint-1",
    ]
    of = experts.open_experts(tmp_path / "a/new.json", dtype="float32")
    assert of.names == ("ct", "xray")


def test_a_run_is_asked_as_its_registry_is(trained, capsys):
    """By the run's own k, threshold and rule; or by others, which are given."""
    place, folder, _ = trained
    picture = str(next((place / "data").rglob("test/*.png")))
    of = experts.open_experts(folder / "registry.toml", dtype="float32")
    for given, mode, k in (
        ({}, "mixture", 2),
        ({"mode": "selection"}, "selection", 1),
        ({"k": 1}, "mixture", 1),
        ({"k": 0}, "bare", 0),
    ):
        questions.print_answer(
            "How many lesions are there?", run=str(folder), images=[picture], max_tokens=3, **given
        )
        said = capsys.readouterr().out
        want = experts.ask_experts(
            of, "How many lesions are there?", [picture], mode=mode, cfg=RetrieveConfig(k=k), max_tokens=3
        )
        assert said.startswith(want.text.strip() + "\n")
        assert len(re.findall(r"^\| (ct|xray|fundus) \|", said, re.MULTILINE)) == k
        assert all(f"| {name} |" in said for name, *_ in want.adapters)
        assert "Research use only, not for diagnosis" in said
    questions.print_answer(
        "How many lesions are there?",
        run=str(folder),
        images=[picture],
        max_tokens=3,
        overrides=("retrieve.threshold=1.0",),
    )
    assert "no adapter: the bare model answered" in capsys.readouterr().out


NOT_ASKED = {
    "neither registry nor run": ({}, "needs either --adapters REGISTRY"),
    "both": ({"adapters": "r.toml", "run": "x"}, "needs either --adapters REGISTRY"),
    "no run": ({"run": "{tmp}"}, "must be the folder of a run, there is no config.json"),
    "a slide": (
        {"run": "{run}", "slide": "x.h5"},
        "takes --image and --mode and -k and --own and --set, not --slide",
    ),
    "another base": ({"run": "{run}", "base": "x"}, "not --base"),
    "a dtype of its own": (
        {"run": "{run}", "overrides": ("dtype='float32'",)},
        "unknown key 'dtype'; ChooseConfig has retrieve, fusion, hold",
    ),
    "no words": ({"run": "{run}", "text": " "}, "the question must have text"),
    "tags without images": ({"run": "{run}", "text": "<image> q"}, "<image>"),
    "an image that is not there": ({"run": "{run}", "images": ["{tmp}/no.png"]}, "no.png"),
    "an unknown mode": ({"run": "{run}", "mode": "blend"}, "mode must be one of bare, selection"),
    "a system that does not answer questions": (
        {"run": "{ct}"},
        "is a ct_clip run, which does not answer questions; `invoke classify`",
    ),
}


@pytest.mark.parametrize(("given", "message"), NOT_ASKED.values(), ids=NOT_ASKED.keys())
def test_what_a_run_cannot_be_asked(trained, tmp_path, given, message):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct/config.json").write_text('{"system": "ct_clip"}')
    fill = lambda v: (
        v.replace("{run}", str(trained[1])).replace("{ct}", f"{tmp_path}/ct").replace("{tmp}", str(tmp_path))
    )
    given = {key: fill(v) if isinstance(v, str) else [fill(x) for x in v] for key, v in given.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        questions.print_answer(**({"text": "q"} | given))


def test_a_run_that_is_not_trained_to_its_end_says_how_to_go_on(trained, tmp_path):
    _, folder, _ = trained
    work = tmp_path / folder.name
    shutil.copytree(folder, work, ignore=shutil.ignore_patterns("registry.toml"))
    with pytest.raises(
        ValueError,
        match=r"not trained to its end and has no registry yet; `invoke train --exp .*` continues it",
    ):
        questions.print_answer("q", run=str(work))


def test_one_key_of_lora_keeps_the_others(tmp_path):
    raw = record(tmp_path)
    raw["lora"] = {"rank": 4}
    cfg = config.structure(raw, Config, "test")
    assert (cfg.lora.rank, cfg.lora.pattern, cfg.lora.vision) == (4, "all-linear", True)


def test_the_environment_of_other_tools_becomes_part_of_the_record(tmp_path, monkeypatch):
    (tmp_path / "toy.toml").write_text(
        'system = "adapters"\n[model]\nname = "x"\n[pool]\nregistry = "r.toml"\n'
    )
    monkeypatch.setenv("MAX_PIXELS", "100000")
    monkeypatch.setenv("MAX_NUM", "12")
    cfg, _ = run.resolve(str(tmp_path / "toy.toml"))
    assert (cfg.chat.max_pixels, cfg.chat.max_images) == (100000, 12)
    cfg, _ = run.resolve(str(tmp_path / "toy.toml"), ("chat.max_pixels=5000",))
    assert cfg.chat.max_pixels == 5000


# What is refused ------------------------------------------------------------------------------------------------------------------------
ONE = {"name": "x", "steps": 1, "lr": 1.0}
BAD = {
    "neither adapters nor training": (
        {"train": None},
        "either pool.registry names existing adapters, or",
    ),
    "both": ({"pool__registry": "r.toml"}, "either pool.registry names existing adapters, or"),
    "an adapter in the base": (
        {"base__stages": [ONE | {"train": ["lora/.*"]}]},
        "base.stages train the model",
    ),
    "the model in the adapters": (
        {"train__stages": [ONE | {"train": ["model/.*"]}]},
        "train.stages train adapters",
    ),
    "own history by turn": ({"evaluate__history": "own"}, 'goes with evaluate.per = "episode"'),
    "an unknown mode": ({"evaluate__modes": ["bare", "blend"]}, "blend"),
    "an unknown domain": ({"evaluate__domains": ["inside"]}, "inside"),
    "recall at 0": ({"evaluate__recall": [0]}, "recall must be 1 or more, got 0"),
    "no modes": ({"evaluate__modes": []}, "needs modes"),
    "an unknown key": ({"evaluate__mode": "bare"}, "mode"),
    "an unknown rule": ({"fusion__rule": "blend"}, "blend"),
    "k as a word": ({"retrieve__k": "three"}, "k"),
    "a weighting": ({"retrieve__weighting": "best"}, "best"),
    "an embedder of its own": ({"embed__kind": "jina"}, "jina"),
    "a text embedder without a name": ({"embed__kind": "text"}, "need a name"),
    "a modality": ({"data__phantoms": {"modalities": ["pet"]}}, "pet"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_records(tmp_path, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(record(tmp_path, **change))


REFUSED = {
    "an action": (("bake", "r.toml"), "the action must be one of build, add, list, show, got 'bake'"),
    "a registry that is not there": (("list", "nowhere.toml"), "nowhere.toml"),
    "build without {task}": (("build", "new.toml", "adapters", "x.jsonl"), "needs path with {task} in it"),
    "build of nothing": (("build", "new.toml", "{tmp}/none/{task}", "{tmp}/{task}.jsonl"), "none"),
    "add without a name": (("add", "r.toml", "x", "y.jsonl"), "needs name, path"),
    "show of another": (("show", "{run}/registry.toml", "", "", "pet"), "no adapter 'pet'"),
    "add of a taken name": (
        ("add", "{run}/registry.toml", "{run}/adapters/ct", "", "ct", "{vector}"),
        "has an adapter 'ct' already",
    ),
    "add of no adapter": (
        ("add", "{run}/registry.toml", "{tmp}", "", "new", "{vector}"),
        "holds no adapter_config.json",
    ),
    "a name that leads elsewhere": (
        ("add", "{run}/registry.toml", "{run}/adapters/ct", "", "../../x", "{vector}"),
        "the name is used as a file name",
    ),
    "build over one that is there": (
        ("build", "{run}/registry.toml", "{tmp}/{task}", "{task}"),
        "exists; remove it, or add to it",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_tasks_refuse(trained, tmp_path, given, message):
    _, folder, _ = trained
    (vector,) = (folder / "vectors").glob("ct-*.npy")
    said = [
        g.replace("{run}", str(folder)).replace("{tmp}", str(tmp_path)).replace("{vector}", str(vector))
        for g in given
    ]
    before = (folder / "registry.toml").read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)):
        registries.manage_registry(
            *said[:2], **dict(zip(("path", "samples", "name", "vector"), said[2:], strict=False))
        )
    assert (folder / "registry.toml").read_bytes() == before


def test_data_and_questions_that_are_refused(trained, tmp_path):
    place, folder, _ = trained
    of = experts.open_experts(folder / "registry.toml", dtype="float32")
    for call, message in {
        (lambda: experts.ask_experts(of, "q", own="pet")): "no adapter 'pet'; there are ct, fundus, xray",
        (lambda: experts.ask_experts(of, "q", mode="oracle")): "mode oracle needs the name of an adapter",
        (lambda: experts.ask_experts(of, "q", [tmp_path / "no.png"])): "no.png",
        (lambda: experts.ask_experts(of, "q", mode="blend")): "mode must be one of bare, selection",
        (lambda: experts.ask_experts(evolve(of, embedder=None), "q")): "has vectors but no embedder",
        (lambda: experts.ask_experts(of, "How many lesions <|im_end|>?")): "special tokens",
        (lambda: experts.open_experts(folder / "registry.toml", base="nowhere/model")): "nowhere/model",
        (lambda: experts.open_experts(folder / "registry.toml", base=Path("nowhere/model"))): "nowhere/model",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    raw = record(
        place,
        data__source="files",
        data__folder=str(tmp_path),
        data__conversations="{folder}/{task}/{split}.jsonl",
    )
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        data.prepare(build(raw), lambda _: None)
    (tmp_path / "train.jsonl").write_text('{"query": "q", "response": "a"}\n')
    raw = record(
        place, data__source="files", data__folder=str(tmp_path), data__conversations="{folder}/{split}.jsonl"
    )
    with pytest.raises(ValueError, match=r"train.jsonl, line 1.*task"):
        data.prepare(build(raw), lambda _: None)


def test_an_adapter_of_another_model_is_named_before_anything_runs(trained, tmp_path):
    _, folder, _ = trained
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    from safetensors.torch import load_file, save_file

    file = other / "adapters/fundus/adapter_model.safetensors"
    state = {k: t[:, :-1].contiguous() if "lora_A" in k else t for k, t in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    model, params = adapters_run.load(other)
    with pytest.raises(ValueError, match=r"adapter 'fundus'"):
        tables.assess(model, params, read_split(model.cfg, "test"), tmp_path / "results", "x")
    assert not (tmp_path / "results").exists()


def test_labels_of_an_experiment(trained, monkeypatch, capsys):
    place, _, _ = trained
    monkeypatch.setattr(run, "RUNS", place / "runs")
    experiments.print_labels(str(place / "toy.json"), number=1)
    assert "«" in capsys.readouterr().out
    with pytest.raises(ValueError, match="sample must be below"):
        experiments.print_labels(str(place / "toy.json"), number=9999)


def test_a_registry_that_is_there_is_evaluated_at_once(trained, tmp_path, monkeypatch):
    place, folder, rows = trained
    raw = record(place)
    for key in ("train", "base", "lora"):
        raw.pop(key)
    raw |= {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "pool": {"registry": str(folder / "registry.toml")},
    }
    (tmp_path / "there.json").write_text(json.dumps(raw))
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    with count_openings() as counts:
        again = run.evaluate(str(tmp_path / "there.json"), log=lambda _: None)
    opened = {name: counts[name] for name in ("train.jsonl", "valid.jsonl", "test.jsonl")}
    assert opened == {"train.jsonl": 0, "valid.jsonl": 0, "test.jsonl": 1}
    want = {(r.subject, r.split): r.value for r in rows if r.what == "step_accuracy"}
    assert {(r.subject, r.split): r.value for r in again if r.what == "step_accuracy"} == want


def test_a_registry_that_cannot_be_evaluated_is_refused_before_the_model_is_loaded(
    trained, tmp_path, monkeypatch
):
    place, folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    raw = {k: v for k, v in record(place).items() if k not in ("train", "base", "lora")}
    raw |= {
        "model": {"name": "no/model", "dtype": "float32"},
        "pool": {"registry": str(tmp_path / "run/registry.toml")},
    }
    for module in (adapters, experts.chat):
        monkeypatch.setattr(module, "open_chat", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    (tmp_path / "there.json").write_text(json.dumps(raw))
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    (about,) = (tmp_path / "run").glob("embedder-*/embedder.json")
    whole = about.read_text()
    about.write_text(json.dumps(json.loads(whole) | {"cfg": {"kind": "text", "name": "no/encoder"}}))
    with pytest.raises(ValueError, match="no/encoder is not a folder here"):
        run.evaluate(str(tmp_path / "there.json"), log=lambda _: None)
    with pytest.raises(ValueError, match="no/encoder is not a folder here"):
        questions.print_answer("q", adapters=str(tmp_path / "run/registry.toml"))
    about.write_text(whole[:-9])
    with pytest.raises(ValueError, match=r"embedder\.json is not JSON"):
        questions.print_answer("q", adapters=str(tmp_path / "run/registry.toml"))
    about.write_text(whole)
    file = tmp_path / "run/registry.toml"
    file.write_text(re.sub("embedder = .*", "", file.read_text(), count=1))
    with pytest.raises(ValueError, match="has vectors but no embedder"):
        run.evaluate(str(tmp_path / "there.json"), log=lambda _: None)
    next((tmp_path / "run/vectors").glob("ct-*.npy")).unlink()
    with pytest.raises(ValueError, match=r"ct: .*npy: no such file"):
        run.evaluate(str(tmp_path / "there.json"), log=lambda _: None)


def test_questions_that_cannot_be_asked_are_refused_before_a_model_is_loaded(trained, tmp_path, monkeypatch):
    _, folder, _ = trained
    for module in (adapters, experts.chat):
        monkeypatch.setattr(module, "open_chat", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    for of in ({"run": str(folder)}, {"adapters": str(folder / "registry.toml")}):
        for given, message in (
            ({"text": " "}, "the question must have text"),
            ({"images": ["no.png"]}, "no.png: there is no such image"),
            ({"mode": "blend"}, "mode must be one of"),
            ({"mode": "oracle"}, "mode oracle needs the name of an adapter; there are ct, fundus, xray"),
            ({"own": "pet"}, "no adapter 'pet'"),
        ):
            with pytest.raises(ValueError, match=message):
                questions.print_answer(**({"text": "q"} | of | given))


def test_data_cut_from_another_file_is_not_taken(tmp_path, monkeypatch):
    """VQA-RAD that was replaced under its name."""
    raw = record(
        tmp_path, data__source="vqa_rad", data__vqa_rad=str(tmp_path / "published"), data__general=""
    )
    cfg, calls = build(raw), []

    def cut(source, images, folder, **how):
        calls.append(source)
        for split in ("train", "valid", "test"):
            (folder / f"{split}.jsonl").write_text('{"query": "q", "response": "a", "task": "head"}\n')
        return {"test": 1}

    monkeypatch.setattr(data.vqa_rad, "convert_vqa_rad", cut)
    (tmp_path / "published").mkdir()
    (tmp_path / "published/vqa_rad_share.json").write_text("[1]")
    for _ in range(2):
        data.prepare(cfg, lambda _: None)
    assert len(calls) == 1
    (tmp_path / "published/vqa_rad_share.json").write_text("[2]")
    with pytest.raises(
        ValueError, match=r"was cut from another .*vqa_rad_share.json than the present one; remove the folder"
    ):
        data.prepare(cfg, lambda _: None)
    shutil.rmtree(tmp_path / "published")  # what was cut is enough
    data.prepare(cfg, lambda _: None)


def test_memory_of_base_and_adapter_is_told(trained, monkeypatch, capsys):
    place, _, _ = trained
    monkeypatch.setattr(run, "RUNS", place / "runs")
    experiments.print_memory(str(place / "toy.json"))
    said = capsys.readouterr().out
    assert "stage base: whole" in said
    assert "stage adapter: lora" in said
    assert said.count("at the peak") == 2


def test_a_run_is_served(trained):
    """In one batch: what the registry chooses, named adapters and the bare model answer as they do alone."""
    place, folder, _ = trained
    picture = str(next((place / "data").rglob("test/*.png")))
    question = "How many lesions are there?"
    served = open_served(str(folder))
    modes = {"auto": "auto", "base": "base", "": "", "ct": "ct", "xray": "xray"}
    answers = answer_served(
        served, [ask(call, question, [picture], adapter=kind, max_tokens=3) for call, kind in modes.items()]
    )
    of = experts.open_experts(folder / "registry.toml", dtype="float32")
    k = served_k(folder)
    chosen = experts.ask_experts(of, question, [picture], cfg=RetrieveConfig(k=k), max_tokens=3)
    bare = experts.ask_experts(of, question, [picture], mode="bare", max_tokens=3)
    assert answers["auto"][0] == chosen.text
    assert answers["auto"][1] == tuple((name, weight) for name, _, weight in chosen.adapters)
    assert answers["base"] == answers[""] == (bare.text, ())
    for name in ("ct", "xray"):
        own = experts.ask_experts(of, question, [picture], mode="oracle", own=name, max_tokens=3)
        assert answers[name] == (own.text, ((name, 1.0),))
    assert served.adapters == ("ct", "fundus", "xray")


def served_k(folder):
    return json.loads((folder / "config.json").read_text())["retrieve"]["k"]
