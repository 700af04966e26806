"""document: drawn pages, a small model, answers scored by their fields, at toy size."""

import json
import sys
from functools import partial

import numpy as np
import pytest
from attrs import evolve
from PIL import Image

from medvl.base import config
from medvl.commands import data
from medvl.commands.experiments import print_labels, print_memory
from medvl.documents import read_page
from medvl.documents.fields import fields_to_json
from medvl.evaluation import results
from medvl.language.conversations import Conversation
from medvl.phantoms.page_records import KINDS
from medvl.phantoms.pages import PageConfig, draw_fixed_pages, draw_page, standard_pages
from medvl.systems import bench, card, document, quantize, run
from medvl.systems.document import SYSTEM, ask, score
from medvl.systems.system import Question
from medvl.systems.tune import run as tune_run
from tests.systems.tune.test_run import MODEL
from tests.systems.tune.test_run import record as tune_record


def record(tmp_path):
    raw = tune_record(tmp_path)
    pages = {"style": "grid", "train": 12, "valid": 3, "test": 6}
    return raw | {
        "system": "document",
        "model": {"config": MODEL, "dtype": "float32"},
        "data": {"source": "pages", "folder": str(tmp_path / "data"), "pages": pages},
        "chat": {"context": 1000, "max_pixels": 56 * 56},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(rows, run folder) of a trained run."""
    place = tmp_path_factory.mktemp("document")
    path = place / "toy.json"
    path.write_text(json.dumps(record(place)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "RUNS", place / "runs")
        rows = run.run(str(path), log=lambda _: None)
        _, folder = run.resolve(str(path))
        yield rows, folder


def test_a_run_is_scored_by_the_fields_of_its_pages(trained):
    rows, folder = trained
    found = {(row.what, row.subject): row for row in rows}
    assert found["f1", "all"].n == 5  # one of six pages has running text alone
    assert found["f1", "all, constant answer"].value < 1
    assert ("f1", "clean") in found
    assert ("hallucinated_value_rate", "scan") in found
    assert len(results.read_results(folder / "results" / "results.jsonl")) == len(rows)
    lines = [json.loads(line) for line in (folder / "results" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert {*lines[0]} == {
        "id",
        "category",
        "answer",
        "gold",
        "read_as",
        "right_false_missed",
        "hallucinated",
    }


def test_a_trained_run_is_opened_and_asked(trained):
    _, folder = trained
    model, _ = SYSTEM.load(folder)
    page = tune_run.split_path(model.cfg, "test").parent / "test" / "0.png"
    assert isinstance(ask(folder, Question(text="Read the page.", images=(str(page),), max_tokens=3)), str)


def test_a_variant_is_scored_beside_the_run(trained):
    rows, folder = trained
    base = run.evaluate(str(folder), log=lambda _: None, variant="base")
    assert {row.experiment for row in base} == {f"{folder.name}-base"}
    assert [(row.what, row.subject, row.n) for row in base] == [
        (row.what, row.subject, row.n) for row in rows
    ]
    assert results.read_results(folder / "results-base" / "results.jsonl")
    assert results.read_results(folder / "results" / "results.jsonl")[0].experiment == folder.name
    with pytest.raises(
        ValueError, match="--variant must be one of base, nf4, int4, lora, merged, got 'best'"
    ):
        run.evaluate(str(folder), log=lambda _: None, variant="best")
    assert not (folder / "results-best").exists()


def test_pages_without_a_training_split_have_no_constant_answer(trained, tmp_path, caplog):
    _, folder = trained
    draw_fixed_pages(tmp_path, "grid")
    rows = run.evaluate(str(folder), (f"data.conversations={tmp_path / 'suite.jsonl'}",), log=lambda _: None)
    assert not [row for row in rows if "constant answer" in row.subject]
    assert "has no training split, so no constant answer is scored" in caplog.text


def test_a_system_without_variants_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path)
    with pytest.raises(ValueError, match="a ct_clip experiment has no variants"):
        run.evaluate("ctclip_phantom", variant="base")


def test_the_command_that_makes_a_missing_base_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "EXPERIMENTS", tmp_path)
    (tmp_path / "toy_base.toml").touch()
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(record(tmp_path) | {"model": {"name": "models/toy_base"}}))
    ask_nf4 = partial(run.evaluate, variant="nf4")
    for verb in (run.run, bench.bench, quantize.quantize, print_labels, print_memory, ask_nf4):
        with pytest.raises(ValueError, match="`invoke pipeline --exp toy` trains the experiment toy_base"):
            verb(str(path))


def test_pages_read_by_rules_are_scored_beside_the_model(tmp_path, monkeypatch):
    """The reader is a stub that knows what is printed, so that its rows are those of the rules alone."""
    raw = record(tmp_path)
    raw["data"]["pages"] = {"train": 6, "valid": 1, "test": 6}  # pages of letters
    raw["evaluate"] |= {"rules": 4, "max_tokens": 2}
    path = tmp_path / "letters.json"
    path.write_text(json.dumps(raw))
    printed = {}
    for number in range(4):
        page = draw_page(PageConfig(), "test", number)
        printed[page.image.tobytes()] = [*page.texts]
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(score, "read_page_once", lambda image, _: printed[np.asarray(image).tobytes()])
    monkeypatch.setattr(document, "check_reader", lambda: None)
    found = {(row.what, row.subject): row for row in run.run(str(path), log=lambda _: None)}
    assert found["f1", "all, OCR and rules"].n == 4
    assert found["f1", "all, OCR and rules"].value > 0.95
    assert found["f1", "all, constant answer"].value < 0.5
    assert found["hallucinated_value_rate", "OCR and rules"].value < 0.05


def test_a_missing_reader_is_found_before_anything_is_drawn(tmp_path, monkeypatch):
    raw = record(tmp_path)
    raw["evaluate"] |= {"rules": 1}
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(raw))
    cfg, _ = run.resolve(str(path))
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    read_page._reader.cache_clear()
    with pytest.raises(ValueError, match=r"needs rapidocr and onnxruntime; pip install 'medvl\[ocr\]'"):
        SYSTEM.prepare(cfg, lambda _: None)
    assert not (tmp_path / "data").exists()


def test_all_variants_are_timed_on_the_five_standard_pages(tmp_path):
    path = tmp_path / "toy.json"
    for source, style in (("pages", "grid"), ("files", "letter")):
        raw = record(tmp_path)
        raw["data"] |= {"source": source}
        path.write_text(json.dumps(raw))
        cfg, _ = run.resolve(str(path))
        asked = SYSTEM.bench_questions(cfg)
        assert [page.extra["kind"] for page in asked] == list(KINDS)
        drawn = standard_pages(style)
        for page, conversation in zip(drawn, asked, strict=True):
            assert np.array_equal(np.asarray(Image.open(conversation.images[0])), page.image)
            assert score.gold_fields(conversation) == evolve(page.fields, kind=page.kind)


def test_public_data_sets_are_fetched_by_the_run_and_by_invoke_data(tmp_path, capsys):
    notes = tmp_path / "notes.csv"
    rows = [f"{i},The patient of note {i} was seen for a check of the knee and went home." for i in range(40)]
    notes.write_text("id,transcription\n" + "\n".join(rows) + "\n")
    source = {"name": "own", "kind": "notes", "path": str(notes), "licence": "none", "non_commercial": True}
    raw = record(tmp_path)
    raw["data"] = {"source": "public", "folder": str(tmp_path / "data"), "public": {"sources": [source]}}
    path = tmp_path / "public.json"
    path.write_text(json.dumps(raw))
    cfg, _ = run.resolve(str(path))
    read = SYSTEM.prepare(cfg, lambda _: None)
    assert sum(len(read(split)) for split in tune_run.SPLITS) == 40
    assert card._data_facts(cfg) == ["- own: none", "- **non-commercial use only**, as some of the data is"]
    table = (tmp_path / "data" / "train.jsonl").stat().st_mtime_ns
    data.fetch(str(path))
    assert "not for commercial use" in capsys.readouterr().out
    assert (tmp_path / "data" / "train.jsonl").stat().st_mtime_ns == table  # found, not made again
    path.write_text(json.dumps(record(tmp_path)))
    with pytest.raises(config.ConfigError, match=r"fetches no data; .* with data.source = 'public'"):
        data.fetch(str(path))


def test_a_record_is_checked_before_a_model_is_loaded(tmp_path):
    raw = record(tmp_path)
    raw["model"]["dtype"] = "bfloat16"
    raw["train"]["stages"][0]["muon"] = 0.02
    path = tmp_path / "muon.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(config.ConfigError, match="muon needs whole float32 weights"):
        run.resolve(str(path))


def conversations(number):
    made = []
    for i in range(number):
        page = draw_page(PageConfig(), "test", i)
        written = fields_to_json(page.fields)
        messages = ({"role": "user", "content": "Read."}, {"role": "assistant", "content": written})
        extra = {"document": f"test-{i}", "category": page.kind, "damage": page.damage}
        made.append(Conversation(messages=messages, id=str(i), extra=extra))
    return made


def test_the_written_answers_are_right_and_those_of_other_pages_are_not():
    pages = conversations(10)
    written = [page.messages[-1]["content"] for page in pages]
    # Written in capitals or not: a tokenizer that is made here knows small letters only.
    for answers in (written, [answer.lower() for answer in written]):
        for counts in (scored.counts for scored in score.score_answers(pages, answers)):
            assert all(kind.false == kind.missed == 0 for kind in counts.values())
    others = score.score_answers(pages, written[5:] + written[:5])  # of the same kinds
    assert all(sum(kind.missed for kind in scored.counts.values()) > 0 for scored in others)


def test_constant_answers_are_the_most_frequent_of_a_kind():
    a, b, c = conversations(3)
    train = [a, b, b, c, c, c]
    assert score.constant_answers(train, [a, b]) == [a.messages[-1]["content"], b.messages[-1]["content"]]


def test_a_page_without_fields_is_named():
    page = Conversation(
        messages=({"role": "user", "content": "Read."}, {"role": "assistant", "content": "{}"}), id="7"
    )
    with pytest.raises(ValueError, match="conversation 7: the page must have fields to be scored by"):
        score.gold_fields(page)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ([1, 2], "[1, 2]"),
        ("COPD", '"COPD"'),
        ({"diagnoses": [{"name": "COPD"}], "bloods": 3}, '"bloods: 3"'),
        ({"medications": [{"name": "Lasix", "colour": "white"}]}, "white"),
    ],
)
def test_fields_that_are_none_are_named(fields, found):
    turns = ({"role": "user", "content": "Read."}, {"role": "assistant", "content": "COPD"})
    page = Conversation(messages=turns, id="7", extra={"fields": fields})
    with pytest.raises(ValueError, match='conversation 7: "fields" must be an object of kind, patient') as e:
        score.gold_fields(page)
    assert found in str(e.value)


def test_running_text_beside_fields_is_none_of_them():
    turns = ({"role": "user", "content": "Read."}, {"role": "assistant", "content": "COPD"})
    given = {"diagnoses": [{"name": "COPD"}], "text": "No fracture."}
    fields = score.gold_fields(Conversation(messages=turns, id="7", extra={"fields": given}))
    assert (fields.diagnoses[0].name, fields.text) == ("COPD", "No fracture.")


def test_pages_of_files_are_checked_before_training(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    for split in tune_run.SPLITS:
        lines = []
        for page in conversations(2):
            extra = dict(page.extra, document=f"{split if split == 'valid' else ''}{page.id}")
            lines.append(json.dumps({"messages": page.messages} | extra) + "\n")
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines))
    path = tmp_path / "own.json"
    path.write_text(json.dumps(record(tmp_path) | {"data": {"folder": str(tmp_path / "data")}}))
    cfg, _ = run.resolve(str(path))
    SYSTEM.prepare(cfg, lambda _: None)
    assert "2 of 2 documents of the test split are in the training split, too, such as 0" in caplog.text
    empty = {"messages": [*conversations(1)[0].messages[:1], {"role": "assistant", "content": "{}"}]}
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps(empty) + "\n")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: the page must have fields to be scored by"):
        SYSTEM.prepare(cfg, lambda _: None)
