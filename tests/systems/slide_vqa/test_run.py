"""slide_vqa: drawn slides, from a record to a frozen compressor, two stages, a benchmark and a map, at toy size."""

import json
import re
import shutil
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from attrs import evolve

from medvl.base import config
from medvl.base.config import ConfigError
from medvl.base.tree import flatten, map_leaves, merge_trees, split_tree
from medvl.components import compress
from medvl.hub import skeletons
from medvl.language import chat
from medvl.serve import rooms
from medvl.serve.interface import Refused
from medvl.slides import pack
from medvl.slides.question_formats import SlideConversation
from medvl.slides.relevance import top_patches
from medvl.slides.tokens import open_features, slide_tokens
from medvl.systems import run
from medvl.systems.slide_vqa import look, pretrain
from medvl.systems.slide_vqa import model as slide_vqa
from medvl.systems.slide_vqa import run as slide_vqa_run
from medvl.systems.slide_vqa.assess import answer_conversations, assess, shuffle_slides
from medvl.systems.slide_vqa.data import read_split, slides_of
from medvl.systems.slide_vqa.record import Config, data_path
from medvl.systems.slide_vqa.tokens import compute_tokens, read_mean_token
from medvl.training import states
from medvl.training.stages import make_gradient
from tests.records import with_settings
from tests.rooms import open_room
from tests.systems.slide_vqa import pieces

MODEL = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SLIDES = {"train": 6, "valid": 2, "test": 3, "dim": 32, "patches": [100, 120], "large": 0}
STAGE = {"steps": 2, "lr": 1e-3}


def record(tmp_path, **change):
    raw = {
        "system": "slide_vqa",
        "hidden": 16,
        "model": {"config": MODEL, "dtype": "float32"},
        "data": {"source": "phantoms", "folder": str(tmp_path / "data"), "phantoms": SLIDES},
        "chat": {"context": 256, "template": "chatml"},
        "compress": {"slots": 4, "hidden": 16},
        "pretrain": {
            "labels": ["class", "motif"],
            "steps": 2,
            "batch": 3,
            "log": 1,
            "save": 1,
            "validate": 0,
            "warmup": 0,
        },
        "lora": {"rank": 2, "pattern": "all-linear"},
        "train": {
            "batch": 4,
            "chunk": 2,
            "log": 1,
            "save": 1,
            "validate": 0,
            "stages": [
                STAGE | {"name": "captions", "data": "captions", "train": ["projector/.*"]},
                STAGE | {"name": "questions", "data": "questions", "train": ["projector/.*", "lora/.*"]},
            ],
        },
        "evaluate": {"max_tokens": 4, "batch": 5, "bootstrap": 20},
    }
    return with_settings(raw, **change)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("slides")
    (place / "toy.json").write_text(json.dumps(record(place)))
    before, run.RUNS = run.RUNS, place / "runs"
    rows = run.run(str(place / "toy.json"), log=lambda _: None)
    run.RUNS = before
    (folder,) = (place / "runs").iterdir()
    return place, folder, rows


# A run ----------------------------------------------------------------------------------------------------------------------------------
def test_a_run_from_slides_to_a_benchmark(trained):
    _, folder, rows = trained
    kept = json.loads((folder / "results/benchmark_results.json").read_text())
    assert len(kept["predictions"]) == 39
    assert re.fullmatch("[0-9a-f]{64}", kept["source"]["sha256"])
    assert {r.what for r in rows} >= {"accuracy", "balanced_accuracy"}
    assert "Research use only, not for diagnosis" in (folder / "results/report.html").read_text()
    assert (folder / "moe_compressor.pt").exists()


def test_a_run_is_evaluated_with_other_questions(trained, tmp_path, monkeypatch):
    place, folder, _ = trained
    monkeypatch.setattr(run, "RUNS", place / "runs")
    before = (folder / "results/benchmark_results.json").read_bytes()
    table = data_path(slide_vqa_run.load(folder)[0].cfg, "test").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(table[:6]) + "\n")
    settings = (f"data.test={tmp_path / 'few.csv'}", "evaluate.by=likelihood")
    rows = run.evaluate(str(folder / "config.json"), settings, log=lambda _: None)
    (out,) = folder.glob("results-*")
    kept = json.loads((out / "benchmark_results.json").read_text())
    assert len(kept["predictions"]) == 5
    assert all(p["chosen"] for p in kept["predictions"])  # the likeliest letter is always one
    assert {r.experiment for r in rows} == {f"toy-{out.name.removeprefix('results-')}"}
    assert (folder / "results/benchmark_results.json").read_bytes() == before
    assert [r.value for r in run.evaluate(str(folder / "config.json"), log=lambda _: None)] == [
        r.value for r in trained[2]
    ]
    shutil.rmtree(out)
    with pytest.raises(ValueError, match=r"only data and evaluate may differ .* found \$.hidden: 16 / 8"):
        run.evaluate(str(folder / "config.json"), ("hidden=8",), log=lambda _: None)
    with pytest.raises(ValueError, match=r"no such run; .* by `--exp runs/NAME --set"):
        run.evaluate(str(place / "toy.json"), ("evaluate.by=likelihood",), log=lambda _: None)


def test_the_same_bits_after_a_stop(trained, monkeypatch):
    place, folder, _ = trained
    monkeypatch.setattr(run, "RUNS", place / "runs")
    names = ("compressor", "0-captions", "1-questions")
    before = [skeletons.weights_digest(states.read_state(folder / n / "last.pt").params) for n in names]
    for n in names[1:]:
        for p in (folder / n).glob("*.pt"):
            p.unlink()
    run.run(str(place / "toy.json"), log=lambda _: None)
    assert [
        skeletons.weights_digest(states.read_state(folder / n / "last.pt").params) for n in names
    ] == before


def test_the_compressor_stays_as_it_was_and_tokens_are_kept(trained):
    _, folder, _ = trained
    model, params = slide_vqa_run.load(folder)
    assert not any(n.startswith("compressor") for n in flatten(params))
    held = read_split(model.cfg, "test")
    of = open_features(data_path(model.cfg, "features"), slides_of(held))
    (home,) = (folder / "tokens").iterdir()
    count = len([*home.iterdir()])
    got = slide_tokens(model.compress, model.compressor, of, folder / "tokens")
    assert len([*home.iterdir()]) == count
    assert next(home.iterdir()).stat().st_size < 4 * 32 * 2 + 200
    other = slide_tokens(model.compress, flatten_changed(model.compressor), of, folder / "tokens")
    assert len([*(folder / "tokens").iterdir()]) == 2
    assert not torch.equal(next(iter(got.values())), next(iter(other.values())))


def flatten_changed(params):
    return {k: flatten_changed(v) if isinstance(v, dict) else v * 1.5 for k, v in params.items()}


def test_look_says_where_it_came_from(trained, tmp_path):
    place, folder, _ = trained
    slide = next((place / "data").rglob("*.h5"))
    found = look.look_at_slide(folder, slide, "Which tissue is there?", tmp_path / "maps", max_tokens=4)
    n = len(found["coords"])
    assert found["relevance"].shape == (n,)
    assert found["slots"].shape == (4,)
    assert (found["relevance"] >= 0).all()
    positive = np.clip(found["slots"], 0, None)
    assert found["relevance"].sum() == pytest.approx(positive.sum(), rel=1e-4)
    assert sorted(p.name for p in next((tmp_path / "maps").iterdir()).iterdir())[0] == "map.geojson"


def test_a_slide_is_asked_by_its_name_or_out_of_a_store(trained, tmp_path):
    place, folder, _ = trained
    files = sorted((place / "data").rglob("*.h5"))[:3]
    pack.pack(files, tmp_path / "store.h5", dtype="float32")
    ask = lambda slide: look.look_at_slide(
        folder, slide, "Which tissue is there?", tmp_path / "maps", max_tokens=4
    )
    by_path = ask(files[0])
    for slide in (files[0].stem, f"{tmp_path / 'store.h5'}::{files[0].stem}"):
        found = ask(slide)
        assert found["answer"] == by_path["answer"]
        np.testing.assert_array_equal(found["relevance"], by_path["relevance"])
        assert found["map"] == by_path["map"]
    with pytest.raises(
        ValueError,
        match=r"store.h5: is a packed store of 3 slides, not one slide; `invoke ask --slide .*store.h5::NAME`",
    ):
        ask(tmp_path / "store.h5")
    with pytest.raises(
        ValueError,
        match=rf"store.h5::{files[0].stem}x: no such file, and no slide of that name in .*\(near: .*{files[0].stem}",
    ):
        ask(f"{tmp_path / 'store.h5'}::{files[0].stem}x")
    with pytest.raises(
        ValueError,
        match=r"NOBODY: no such file, and no slide of that name in .*features \(none of \d+ is near",
    ):
        ask("NOBODY")
    with pytest.raises(
        ValueError,
        match=r"there.h5::A: no such file; and .*there.h5, where a slide of that name could lie, is not there",
    ):
        ask(f"{tmp_path / 'there.h5'}::A")


def test_a_token_is_worth_what_the_answer_loses_without_it(trained):
    _, folder, _ = trained
    model, params = slide_vqa_run.load(folder)
    talk = read_split(model.cfg, "questions")[0]
    tokens = compute_tokens(model, folder, [talk])
    mean, said = read_mean_token(folder, model), "B. Stroma"
    found = look.relevance_of_slots(model, params, talk, said, tokens, mean)
    data = pieces.encode(
        model, [evolve(talk, messages=(talk.messages[0], {"role": "assistant", "content": said}))]
    )
    ((start, stop),) = data.samples[0].trained

    def lost(tokens):
        batch = pieces.make_batch(model, data, tokens, [0])
        batch["labels"][0, stop - 1 :] = -100  # its end token
        assert (batch["labels"] >= 0).sum() == stop - start - 1
        return float(pieces.loss_of(model)(params, batch)[0])

    whole = tokens[talk.slides[0]]
    for k in range(4):
        without = whole.clone()
        without[k] = mean[k]
        assert found[k] == pytest.approx(lost({talk.slides[0]: without}) - lost(tokens), abs=1e-5)
    assert np.abs(found).max() > 1e-4
    train_slides = slides_of(read_split(model.cfg, "questions"))
    every = compute_tokens(model, folder, read_split(model.cfg, "questions"))
    torch.testing.assert_close(mean, torch.stack([every[s] for s in train_slides]).mean(0))


# Pieces ---------------------------------------------------------------------------------------------------------------------------------
def started(trained, **change):
    place, folder, _ = trained
    cfg = config.structure(record(place, **change), Config, "test")
    model, params = pieces.open_model(cfg, folder, pretrain.read_fitted(cfg, folder))
    held = read_split(cfg, "questions")
    return model, params, pieces.encode(model, held), compute_tokens(model, folder, held)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_micro_batches_with_and_without_slides_give_the_gradient_of_the_whole(trained, chunk):
    model, params, data, tokens = started(trained, train__chunk=4)
    bare = pieces.encode(model, [slide_vqa.without_slides(data.conversations[1])])
    mixed = evolve(
        data,
        conversations=(data.conversations[0], *bare.conversations, *data.conversations[2:]),
        samples=(data.samples[0], *bare.samples, *data.samples[2:]),
    )
    batch = pieces.make_batch(model, mixed, tokens, [0, 1, 2, 3])
    assert batch["images"].tolist() == [1, 0, 1, 1]
    trained_, frozen = split_tree(params, ("projector/.*", "lora/.*"))

    def grad(m):
        loss = pieces.loss_of(m)
        return make_gradient(m.cfg.train, lambda p, b: loss(merge_trees(frozen, p), b), pieces.cut(m))(
            trained_, batch
        )

    want_loss, _, want = grad(model)
    got_loss, _, got = grad(evolve(model, cfg=evolve(model.cfg, train=evolve(model.cfg.train, chunk=chunk))))
    assert float(got_loss) == pytest.approx(float(want_loss), abs=1e-6)
    for n, g in flatten(got).items():
        torch.testing.assert_close(g, flatten(want)[n], rtol=1e-3, atol=1e-6, msg=n)
    assert float(flatten(got)["projector/up/weight"].abs().max()) > 0


def test_a_blind_model_sees_nothing(trained):
    model, params, data, tokens = started(trained, data__blind=True)
    assert tokens == {}
    assert all(not t.slides and "<image>" not in t.messages[0]["content"] for t in data.conversations)
    batch = pieces.make_batch(model, data, tokens, [0, 1])
    assert batch["tokens"].shape == (0, 4, 32)
    assert float(pieces.loss_of(model)(params, batch)[0]) > 0


def test_a_conversation_that_cannot_be_encoded_is_named(trained):
    model, _, data, _ = started(trained)
    talk = data.conversations[1]
    first = talk.messages[0]
    bad = evolve(talk, messages=({**first, "content": first["content"] + "<|im_end|>"}, *talk.messages[1:]))
    for prompt in (False, True):
        with pytest.raises(
            ValueError, match=rf", row {talk.row}: encode: message 0 \(user\) must not hold special tokens"
        ):
            pieces.encode(model, [data.conversations[0], bad], prompt=prompt)


def test_slides_of_other_questions(trained):
    _, folder, _ = trained
    model, _ = slide_vqa_run.load(folder)
    held = read_split(model.cfg, "test")
    names = slides_of(held)
    other = shuffle_slides(held, 0, names)
    assert all(a.slides != b.slides for a, b in zip(held, other, strict=True))
    assert {s for t in held for s in t.slides} == {s for t in other for s in t.slides}


def test_a_control_shows_no_slide_without_features(trained):
    """What is then not answered would count as wrong, and the control would look worse than it is."""
    _, folder, _ = trained
    model, _ = slide_vqa_run.load(folder)
    held = read_split(model.cfg, "test")
    gone, *there = slides_of(held)
    other = shuffle_slides(held, 0, there)
    for asked, shown in zip(held, other, strict=True):
        assert (gone in shown.slides) == (gone in asked.slides)
        assert gone in asked.slides or asked.slides != shown.slides


def test_patients_that_were_trained_on_are_said(trained, tmp_path, caplog):
    cfg = slide_vqa_run.load(trained[1])[0].cfg
    slides = slides_of(read_split(cfg, "test"))
    seen = slides_of(read_split(cfg, "questions"))[0]
    table = data_path(cfg, "test").read_text().replace(slides[0], seen)
    (tmp_path / "test.csv").write_text(table)
    slide_vqa_run.prepare(cfg, lambda line: None)
    assert "prove nothing" not in caplog.text
    slide_vqa_run.prepare(
        evolve(cfg, data=evolve(cfg.data, test=str(tmp_path / "test.csv"))), lambda line: None
    )
    assert f"1 of {len(slides)} patients in test are in questions, too" in caplog.text


def test_a_question_without_features_counts_as_wrong(trained, tmp_path):
    _, folder, _ = trained
    model, params = slide_vqa_run.load(folder)
    table = data_path(model.cfg, "test").read_text().splitlines()
    names = {t.slides[0] for t in read_split(model.cfg, "test")}
    gone = sorted(names)[0]
    (tmp_path / "test.csv").write_text(
        "\n".join(line.replace(gone, "TCGA-ZZ-9999-01Z-00-DX1") for line in table) + "\n"
    )
    cfg = evolve(model.cfg, data=evolve(model.cfg.data, test=str(tmp_path / "test.csv")))
    rows, _ = assess(evolve(model, cfg=cfg), params, folder / "other", "x")
    kept = json.loads((folder / "other/benchmark_results.json").read_text())["predictions"]
    lost = [p for p in kept if p["missing"]]
    assert len(kept) == 39  # the denominator stays
    assert len(lost) == 13
    assert not any(p["right"] or p["chosen"] for p in lost)
    assert next(r.value for r in rows if r.what == "missing" and r.n == 39) == 13


def test_features_of_another_encoder_are_refused(trained, tmp_path):
    """They have the width that the run was trained on, so nothing else would notice."""
    place, folder, _ = trained
    model, _ = slide_vqa_run.load(folder)
    (features,) = {p.parent for p in (place / "data").rglob("*.h5")}
    trained_on = json.loads((folder / "encoder.json").read_text())
    shutil.copytree(features, tmp_path / "other")
    for path in (tmp_path / "other").glob("*.h5"):
        with h5py.File(path, "r+") as f:
            f["features"].attrs["encoder"] = "phikon"
    said = rf"was trained on features of the encoder '{trained_on['encoder']}', those of .* are of 'phikon'; take features of the same"
    moved = evolve(
        model, cfg=evolve(model.cfg, data=evolve(model.cfg.data, features=str(tmp_path / "other")))
    )
    with pytest.raises(ValueError, match=said):
        compute_tokens(moved, folder, read_split(model.cfg, "test"))
    with pytest.raises(ValueError, match=said):
        look.look_at_slide(folder, next((tmp_path / "other").glob("*.h5")), "Which tissue is there?")


def test_captions_and_open_questions_leave_every_prediction(trained, tmp_path):
    _, folder, _ = trained
    model, params = slide_vqa_run.load(folder)
    slides = slides_of(read_split(model.cfg, "test"))
    asked = [
        {"slide_id": s, "question": "Is there fat?", "answer": a}
        for s, a in zip(slides, ("yes", "no", "Yes"), strict=True)
    ]
    asked.append({"slide_id": "TCGA-ZZ-9999-01Z-00-DX1", "question": "Is there fat?", "answer": "no"})
    asked.append(
        {"slide_id": slides[0], "question": "Report.", "answer": "There is much fat in all of this tissue."}
    )
    (tmp_path / "test.json").write_text(json.dumps(asked))
    cfg = evolve(
        model.cfg,
        data=evolve(model.cfg.data, test=str(tmp_path / "test.json")),
        evaluate=evolve(model.cfg.evaluate, shuffled=True),
    )
    rows, _ = assess(evolve(model, cfg=cfg), params, folder / "open", "x")
    kept = json.loads((folder / "open/benchmark_results.json").read_text())
    assert [(p["slide"], p["gold"], p["missing"]) for p in kept["open_predictions"]] == [
        (r["slide_id"], r["answer"], r["slide_id"] not in slides) for r in asked
    ]
    assert all(p["said"] for p in kept["open_predictions"] if not p["missing"])
    assert {(r.what, r.n) for r in rows if r.subject == "yes or no"} == {
        ("accuracy", 4),
        ("majority", 4),
        ("accuracy_shuffled", 4),
    }
    assert kept["by"] == "text"


def test_closed_questions_by_likelihood_beside_open_ones_by_text(trained):
    """One open question in a batch must not turn the closed ones beside it into text."""
    _, folder, _ = trained
    model, params = slide_vqa_run.load(folder)
    closed = read_split(model.cfg, "test")[:4]
    open_ = evolve(read_split(model.cfg, "captions")[0], choices={})
    tokens = compute_tokens(model, folder, [*closed, open_])

    def answers(by, talks):
        cfg = evolve(model.cfg, evaluate=evolve(model.cfg.evaluate, by=by))
        return answer_conversations(evolve(model, cfg=cfg), params, talks, tokens)

    letters = answers("likelihood", closed)
    assert all(letter in talk.choices for letter, talk in zip(letters, closed, strict=True))
    (text,) = answers("text", [open_])
    assert answers("likelihood", [closed[0], open_, *closed[1:]]) == [letters[0], text, *letters[1:]]
    assert answers("text", [*closed, open_]) == [*answers("text", closed), text]


def test_answers_of_earlier_batches_are_kept_where_a_later_one_fails(trained, tmp_path, monkeypatch):
    _, folder, _ = trained
    model, params = slide_vqa_run.load(folder)
    talks = read_split(model.cfg, "test")[:5]
    model = evolve(model, cfg=evolve(model.cfg, evaluate=evolve(model.cfg.evaluate, batch=2)))
    tokens = compute_tokens(model, folder, talks)
    whole = answer_conversations(model, params, talks, tokens)
    real, calls = chat.generate_answers, []

    def answer(*args, fail_at=0, **settings):
        calls.append(args)
        if len(calls) == fail_at:
            raise FloatingPointError("logits are not finite")
        return real(*args, **settings)

    def interrupted():
        calls.clear()
        monkeypatch.setattr(chat, "generate_answers", partial(answer, fail_at=3))
        with pytest.raises(FloatingPointError):
            answer_conversations(model, params, talks, tokens, tmp_path)
        calls.clear()
        monkeypatch.setattr(chat, "generate_answers", answer)

    interrupted()
    (path,) = tmp_path.glob("answers-*.unfinished.jsonl")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["row"], line["answer"]) for line in kept] == [(i, whole[i]) for i in range(4)]
    assert answer_conversations(model, params, talks, tokens, tmp_path) == whole
    assert len(calls) == 1  # the last batch alone
    assert len(path.read_text().splitlines()) == 5
    # Another weight, slide or setting does not take them.
    other = params | {"projector": map_leaves(lambda t: t * 1.5, params["projector"])}
    shown = {slide: t + 1 for slide, t in tokens.items()}
    longer = evolve(model, cfg=evolve(model.cfg, evaluate=evolve(model.cfg.evaluate, max_tokens=2)))
    for changed in (
        (model, other, talks, tokens),
        (model, params, talks, shown),
        (longer, params, talks, tokens),
    ):
        calls.clear()
        answer_conversations(*changed, tmp_path)
        assert len(calls) == 3
    assert not list(folder.rglob("*unfinished*"))  # of an evaluation that went well


BAD = [
    ({"pretrain__labels": []}, "pretrain needs either a file"),
    ({"pretrain__file": "x.pt"}, "pretrain needs either a file"),
    (
        {"train__stages": [STAGE | {"name": "q", "data": "questions"}]},
        "questions would be trained with a projector that has seen no captions",
    ),
    (
        {"train__stages": [STAGE | {"name": "q", "data": "answers"}]},
        'stage q: data must be "captions" or "questions"',
    ),
    (
        {
            "model__quantize": "nf4",
            "train__stages": [STAGE | {"name": "c", "data": "captions", "train": ["model/.*"]}],
        },
        "freezes the model",
    ),
    ({"compress__top_k": 9}, "top_k lie in 1..slots"),
    ({"compress__kind": "qformer"}, "qformer"),
    ({"evaluate__by": "gold"}, "gold"),
    ({"data__phantoms": {"dim": 8}}, "dim must be 32 or more"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_bad_records(tmp_path, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.structure(record(tmp_path, **change), Config, "test")


def test_cold_questions_when_told(tmp_path):
    stages = [STAGE | {"name": "q", "data": "questions"}]
    assert config.structure(record(tmp_path, train__stages=stages, cold=True), Config, "test").cold


def test_what_is_refused(trained, tmp_path):
    _, folder, _ = trained
    with pytest.raises(ValueError, match=r"nothing\.h5"):
        look.look_at_slide(folder, folder / "nothing.h5", "q")
    model, _, data, tokens = started(trained)
    with pytest.raises(KeyError):
        pieces.make_batch(
            model,
            evolve(data, conversations=(SlideConversation(messages=(), slides=("other",)),)),
            tokens,
            [0],
        )
    raw = record(tmp_path, data__source="files", data__folder=str(tmp_path))
    with pytest.raises(ValueError, match="4 files are missing"):
        slide_vqa_run.prepare(config.structure(raw, Config, "test"))


def test_the_router_moves_at_its_own_rate(tmp_path):
    """Adam's first step is as long as the rate, whatever the gradient."""
    raw = record(
        tmp_path, pretrain__steps=1, pretrain__lr=1e-3, pretrain__router_lr=7e-3, pretrain__weight_decay=0.0
    )
    cfg = config.structure(raw, Config, "test")
    slide_vqa_run.prepare(cfg, lambda _: None)
    sizes, after = pretrain.fit_compressor(cfg, tmp_path / "run", lambda _: None)
    before = flatten(compress.init_compress(sizes, torch.Generator().manual_seed(cfg.seed)))
    moved = {n: float((t - before[n]).abs().max()) for n, t in flatten(after).items()}
    assert moved["gate/weight"] == pytest.approx(7e-3, rel=1e-3)
    assert moved["experts/up/weight"] == pytest.approx(1e-3, rel=1e-3)


def test_a_run_is_served(trained):
    """A slide that is sent is answered as its file is, and none of its tokens stay in the run."""
    place, folder, _ = trained
    slide = next((place / "data").rglob("*.h5"))
    alone = look.look_at_slide(folder, slide, "Which tissue is there?", max_tokens=4)
    before = sorted((folder / "tokens").rglob("*"))
    ask = open_room(rooms.open_slides, folder)
    question = {"question": "Which tissue is there?", "max_tokens": 4}
    found = ask("ask", content=slide.read_bytes(), slide="", **question)
    assert found["text"] == alone["answer"].strip()
    assert found["patches"] == top_patches(alone["relevance"], alone["coords"], 5)
    assert found["map"].startswith(b"\x89PNG")
    assert sorted((folder / "tokens").rglob("*")) == before
    assert ask("ask", content=b"", slide=slide.stem, **question)["text"] == found["text"]
    with pytest.raises(Refused, match="the slide cannot be read") as refused:
        ask("ask", content=b"Jane Doe", slide="", **question)
    assert "/proc" not in str(refused.value)
    # A client names slides of the run, and no file of this machine.
    for name in (
        "elsewhere",
        str(slide),
        f"{slide.parent}::{slide.stem}",
        f"../{slide.parent.name}/{slide.stem}",
    ):
        with pytest.raises(Refused, match="no slide of that name") as refused:
            ask("ask", content=b"", slide=name, **question)
        assert str(slide.parent) not in str(refused.value)
