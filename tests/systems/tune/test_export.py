"""A trained run as a folder for other programs: opened by them it computes what the run does."""

import json
import math
import re

import pytest
import torch
from attrs import evolve

from medvl.language import chat, compare, system
from medvl.language.chat import ModelConfig
from medvl.systems import export, run
from medvl.systems.tune import SYSTEM
from medvl.systems.tune import run as tune_run
from medvl.weights import lora
from medvl.weights.int4 import Int4


@pytest.fixture(scope="module")
def opened(trained):
    """(model, params, test conversations, run folder) of a run whose adapter changes what is said."""
    cfg, folder = run.resolve(str(trained))
    model, params = tune_run.load(folder)
    data = chat.encode_conversations(model.chat, tune_run.read_split(cfg, "test"))
    return model, params, data, folder


def quiet(line):
    pass


def test_transformers_computes_the_run_from_its_merged_folder(opened, tmp_path):
    from transformers import AutoModelForImageTextToText

    model, params, data, folder = opened
    export.export_run(str(folder), tmp_path / "merged", "merged", log=quiet)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    weights = system.model_weights(model, params)
    for row in range(2):
        inputs = chat.model_inputs(model.chat, weights, chat.make_batch(model.chat, data, [row]), params)
        labels = inputs["labels"]
        ours = compare.answer_logits(model, params, data, row)
        ids = inputs["ids"]
        with torch.no_grad():
            logits = theirs(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
                mm_token_type_ids=(ids == theirs.config.image_token_id).int(),
            ).logits
        torch.testing.assert_close(ours, logits[:, :-1][labels[:, 1:] != -100], atol=1e-5, rtol=1e-4)


def test_peft_opens_the_adapter_on_the_model(opened, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model, params, _, folder = opened
    export.export_run(str(folder), tmp_path / "peft", "peft", log=quiet)
    base = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload()
    ours = lora.merge_adapter(params["model"], evolve(model.adapter, factors=params["lora"])).params
    theirs = merged.state_dict()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=1e-5)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]


def test_four_bits_lose_more_than_whole_weights_and_are_refused(opened, tmp_path):
    model, params, _, folder = opened
    adapter = evolve(model.adapter, factors=params["lora"])
    _, _, whole = export.merge(SYSTEM, model, params, adapter, folder)
    _, _, rounded = export.merge(SYSTEM, model, params, adapter, folder, quantize="nf4")
    assert whole.lost < 1e-3
    assert rounded.lost > 0.05
    with pytest.raises(
        ValueError, match=r"in four bits by nf4, the model loses .* more than the bound of 5.0%"
    ):
        export.export_run(str(folder), tmp_path / "nf4", "merged", quantize="nf4", log=quiet)
    assert not (tmp_path / "nf4").exists()
    assert not [*tmp_path.iterdir()]


def test_int4_is_measured_against_the_run_and_refused_where_it_loses_more(opened, tmp_path):
    model, params, _, folder = opened
    with pytest.raises(
        ValueError, match=r"in four bits by awq, the model loses .* more than the bound of 5.0%"
    ):
        export.export_run(str(folder), tmp_path / "int4", "int4", log=quiet)
    assert not [*tmp_path.iterdir()]
    target = export.export_run(str(folder), tmp_path / "int4", "int4", group=-1, bound=math.inf, log=quiet)
    about = json.loads((target / "export.json").read_text())
    assert about["quantize"] == "awq"
    # The folder holds what was compared.
    cfg = ModelConfig(name=str(target), dtype="float32")
    opened_chat, weights = chat.open_chat(
        cfg, model.cfg.chat, chat.tokenizer_of(cfg, folder), torch.Generator()
    )
    assert sum(isinstance(weight, Int4) for weight in weights.values()) > 4
    plain = evolve(model, adapter=None)
    questions = chat.encode_conversations(model.chat, SYSTEM.bench_questions(model.cfg))
    found = compare.compare(
        questions,
        form=(evolve(plain, chat=opened_chat), {"model": weights}),
        original=(model, params),
        without=(plain, params),
    )
    assert found.lost == pytest.approx(about["distance"]["lost"], rel=1e-3)


def test_a_model_that_int4_has_no_groups_for_becomes_nf4_and_says_so(opened, tmp_path, caplog):
    _, _, _, folder = opened
    target = export.export_run(str(folder), tmp_path / "int4", "int4", group=128, bound=math.inf, log=quiet)
    assert json.loads((target / "export.json").read_text())["quantize"] == "nf4"
    assert "quantize: not by awq, but by nf4: " in caplog.text
    assert "groups of 128" in caplog.text


def test_the_distance_is_that_of_the_logits(opened):
    model, params, data, _ = opened
    plain = evolve(model, adapter=None)
    # The original without its adapter has lost all that the adapter learned.
    found = compare.compare(data, form=(plain, params), original=(model, params), without=(plain, params))
    assert found.lost == 1.0
    assert found.n == sum(int((s.labels != -100).sum()) for s in data.samples)
    same = compare.compare(data, form=(model, params), original=(model, params), without=(plain, params))
    assert (same.largest, same.lost, same.same_token) == (0.0, 0.0, 1.0)


def test_the_card_says_where_the_model_comes_from(opened, tmp_path):
    _, _, _, folder = opened
    export.export_run(str(folder), tmp_path / "merged", "merged", log=quiet)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert not re.search(r"[^\n]\n## ", card)  # headings stand apart
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "Research use only, not for diagnosis",
        "shows no patient",
        "| accuracy |",
        "of what the adapter",
    ):
        assert part in card
    assert str(folder.parent) not in card


def test_what_cannot_be_exported_is_named(opened, tmp_path, monkeypatch):
    _, _, _, folder = opened

    def fails(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            export.export_run(*args, log=quiet, **options)

    fails("--as must be one of merged, int4, peft, got 'gguf'", str(folder), tmp_path / "a", "gguf")
    fails("--as int4 goes without", str(folder), tmp_path / "a", "int4", quantize="nf4")
    fails("--base must be one of seen, full, got 'old'", str(folder), tmp_path / "a", "merged", base="old")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    with monkeypatch.context() as patch:
        patch.setattr(export, "merge", None)  # before the work
        fails("is there already", str(folder), tmp_path / "there", "merged")
