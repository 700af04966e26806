"""tune: conversations with pictures, from a record to trained weights, labels, memory and scored answers, at toy size."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from attrs import evolve
from PIL import Image

from medvl.base import config
from medvl.base.config import ConfigError
from medvl.base.tree import flatten, merge_trees, split_tree
from medvl.commands import experiments, questions
from medvl.hub import saving, skeletons
from medvl.language import chat, system, vision, vlm
from medvl.language.conversations import Conversation
from medvl.phantoms import pictures
from medvl.systems import run
from medvl.systems.tune import run as tune_run
from medvl.systems.tune.record import Config
from medvl.training import loop, states
from medvl.training import stages as tuning
from medvl.weights import lazy, lora
from tests import tiny
from tests.language.test_dicom_image import made
from tests.records import with_settings

VISION = tiny.CONFIGS["qwen2_5_vl"]
MODEL = {
    "model_type": "qwen2_5_vl",
    "text_config": VISION["text_config"] | {"max_position_embeddings": 512},
    "vision_config": VISION["vision_config"] | {"patch_size": 14, "window_size": 56},
}
SIZES = {"train": 12, "valid": 4, "test": 6, "size": 56}


def record(tmp_path, **change):
    raw = {
        "system": "tune",
        "model": {"config": MODEL, "dtype": "float32"},
        "data": {"source": "phantoms", "folder": str(tmp_path / "data"), "phantoms": SIZES},
        "chat": {"context": 96},
        "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "train": {
            "batch": 4,
            "chunk": 2,
            "log": 1,
            "save": 2,
            "validate": 0,
            "stages": [
                {"name": "whole", "steps": 3, "lr": 1e-3, "train": ["model/.*"]},
                {"name": "lora", "steps": 3, "lr": 1e-3, "train": ["lora/.*"]},
            ],
        },
        "evaluate": {"max_tokens": 4, "batch": 3, "bootstrap": 20},
    }
    return with_settings(raw, **change)


def built(tmp_path, **change):
    cfg = config.structure(record(tmp_path, **change), Config, "test")
    tune_run.prepare(cfg, lambda _: None)
    return cfg


def started(tmp_path, **change):
    cfg = built(tmp_path, **change)
    held = tune_run.read_split(cfg, "train")
    model, params = system.init_model(cfg, tmp_path / "run", [m["content"] for c in held for m in c.messages])
    return model, params, chat.encode_conversations(model.chat, held)


def gradient(model, everything):
    loss = system.loss_function(model)
    return tuning.make_gradient(
        model.cfg.train, lambda p, b: loss(everything(p), b), partial(chat.micro_batch, model.chat)
    )


# A run ----------------------------------------------------------------------------------------------------------------------------------
def test_a_run_from_pictures_to_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    (tmp_path / "toy.json").write_text(json.dumps(record(tmp_path)))
    rows = run.run(str(tmp_path / "toy.json"))
    said = capsys.readouterr().out
    assert "stage whole: 3 steps train" in said
    assert "% of" in said  # trainable share, before training
    (folder,) = (tmp_path / "runs").iterdir()
    answers = [json.loads(line) for line in (folder / "results/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert {r.what for r in rows} == {"accuracy", "accuracy_of_the_usual_answer", "token_loss"}
    assert "Research use only, not for diagnosis" in (folder / "results/report.html").read_text()
    losses = [
        json.loads(line)["loss"] for line in (folder / "0-whole/metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    before = [
        skeletons.weights_digest(states.read_state(folder / s / "last.pt").params)
        for s in ("0-whole", "1-lora")
    ]
    (folder / "1-lora/last.pt").unlink()
    again = run.run(str(tmp_path / "toy.json"), log=lambda _: None)
    assert [
        skeletons.weights_digest(states.read_state(folder / s / "last.pt").params)
        for s in ("0-whole", "1-lora")
    ] == before
    assert [(r.what, r.subject, r.value) for r in again] == [(r.what, r.subject, r.value) for r in rows]

    line = json.loads(next((tmp_path / "data").rglob("test.jsonl")).read_text().splitlines()[0])
    asked = line["messages"][0]["content"].removeprefix("<image>\n")
    image = str(next((tmp_path / "data").rglob("test.jsonl")).parent / line["images"][0])
    capsys.readouterr()
    questions.print_answer(asked, run=str(folder), images=[image], max_tokens=4)
    assert capsys.readouterr().out.startswith(
        answers[0]["answer"].strip() + "\n"
    )  # the answer that the evaluation kept
    for given, message in (
        ({"mode": "mixture"}, r"\(tune\) takes --image, not --mode"),
        ({"slide": "x.h5"}, r"\(tune\) takes --image, not --slide"),
        ({"images": [str(tmp_path / "no.png")]}, r"no\.png"),
    ):
        with pytest.raises(ValueError, match=message):
            questions.print_answer("q", run=str(folder), **given)
    (folder / "1-lora/best.pt").unlink(missing_ok=True)
    (folder / "1-lora/last.pt").unlink()
    with pytest.raises(ValueError, match=r"1-lora/last\.pt: no such checkpoint; train first"):
        questions.print_answer("q", run=str(folder), images=[image])


def test_a_run_leaves_what_transformers_and_peft_open(tmp_path):
    import peft
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    cfg = built(tmp_path)
    lines = list[str]()
    model, params = tune_run.fit(cfg, tmp_path / "run", lines.append)
    assert [line for line in lines if str(tmp_path / "run/model") in line]
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/model").eval()
    peer = peft.PeftModel.from_pretrained(base, str(tmp_path / "run/adapter"))
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = peer(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        got = model.chat.skeleton(
            system.model_weights(model, params), **vlm.model_inputs(model.chat.skeleton, {"ids": ids})
        ).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert max(float(f["b"].abs().max()) for f in params["lora"].values()) > 0
    for name in ("model", "adapter"):
        tok = AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        assert tok.chat_template == model.chat.tokenizer.chat_template
    config_ = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config_["base_model_name_or_path"] == str(tmp_path / "run/model")
    assert "eos_token_id" in json.loads((tmp_path / "run/model/generation_config.json").read_text())
    before = {
        p: p.stat().st_mtime_ns
        for p in (tmp_path / "run").rglob("*")
        if p.parent.name in ("model", "adapter")
    }
    tune_run.fit(cfg, tmp_path / "run", lines.append)
    assert before == {
        p: p.stat().st_mtime_ns
        for p in (tmp_path / "run").rglob("*")
        if p.parent.name in ("model", "adapter")
    }


def test_an_adapter_on_a_named_model_leaves_the_adapter_alone(tmp_path):
    talks, params = opened(tmp_path)
    chat.save_chat(talks, params, tmp_path / "base")
    raw = with_files(tmp_path, [{"query": "q", "response": "a"}])
    raw["model"] = {"name": str(tmp_path / "base"), "dtype": "float32"}
    raw["train"]["stages"] = raw["train"]["stages"][1:]
    for experts, name in ((0, "adapter_model.safetensors"), (2, "hlora.safetensors")):
        raw["lora"]["experts"] = experts
        home = tmp_path / f"run{experts}"
        tune_run.fit(config.structure(raw, Config, "test"), home, lambda _: None)
        assert (home / "adapter" / name).is_file()
        assert (home / "adapter/tokenizer.json").is_file()
        assert not (home / "model").exists()
    config_ = json.loads((tmp_path / "run0/adapter/adapter_config.json").read_text())
    assert config_["base_model_name_or_path"] == str(tmp_path / "base")


def test_labels_and_estimate_of_an_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    (tmp_path / "toy.json").write_text(json.dumps(record(tmp_path)))
    experiments.print_labels(str(tmp_path / "toy.json"), number=2)
    said = capsys.readouterr().out
    answer = json.loads((next((tmp_path / "data").iterdir()) / "train.jsonl").read_text().splitlines()[2])[
        "messages"
    ][1]["content"]
    assert f"« {answer.lower()}<|im_end|>»" in said
    assert "<|image_pad|> x 4" in said
    experiments.print_memory(str(tmp_path / "toy.json"))
    said = capsys.readouterr().out
    assert said.count("at the peak") == 2
    assert "frozen weights" in said
    experiments.print_memory(str(tmp_path / "toy.json"), processes=2)
    assert capsys.readouterr().out.count("each of 2 processes:") == 2
    with pytest.raises(ValueError, match="labels: sample must be below 12, got 12"):
        experiments.print_labels(str(tmp_path / "toy.json"), number=12)


# Pieces ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_whole(tmp_path, chunk):
    model, params, data = started(tmp_path, train__chunk=4)
    trained, frozen = split_tree(params, ("model/.*proj.*", "lora/.*"))
    batch = chat.make_batch(model.chat, data, [0, 1, 2, 3])

    def grad_of(m):
        return gradient(m, lambda p: merge_trees(frozen, p))(trained, batch)

    loss, aux, want = grad_of(model)
    assert int(aux.metrics["tokens"]) == int((batch["labels"] != -100).sum())
    for keep in (False, True):
        cfg = evolve(model.cfg, train=evolve(model.cfg.train, chunk=chunk, checkpoint=keep))
        got_loss, _, got = grad_of(evolve(model, cfg=cfg, train=cfg.train))
        assert float(got_loss) == pytest.approx(float(loss), abs=1e-6)
        for n, g in flatten(got).items():
            torch.testing.assert_close(g, flatten(want)[n], rtol=1e-3, atol=1e-6, msg=n)


def test_images_go_with_their_rows(tmp_path):
    model, _, data = started(tmp_path)
    rows = [2, 0, 1]
    plain = evolve(data.conversations[0], images=())
    data = evolve(data, conversations=(plain, *data.conversations[1:]))  # row 1 of the batch has no image
    batch = chat.make_batch(model.chat, data, rows)
    assert batch["images"].tolist() == [1, 0, 1]
    parts = [chat.micro_batch(model.chat, batch, slice(i, i + 1)) for i in range(3)]
    assert "pixel_values" not in parts[1]
    assert torch.equal(torch.cat([parts[0]["pixel_values"], parts[2]["pixel_values"]]), batch["pixel_values"])
    assert torch.equal(parts[2]["ids"][0], data.samples[1].ids)


def test_a_model_that_sees_tiles(tmp_path):
    config_ = tiny.CONFIGS["internvl"] | {
        "vision_config": tiny.CONFIGS["internvl"]["vision_config"]
        | {"image_size": [56, 56], "patch_size": [14, 14]}
    }
    model, params, data = started(
        tmp_path, model__config=config_, train__chunk=4, data__phantoms=SIZES | {"size": 112}
    )
    assert (
        sum(b - a for a, b in data.samples[0].visual) == 20
    )  # four tiles and a thumbnail, each of 4 x 4 patches joined two by two
    trained, frozen = split_tree(params, ("model/.*q_proj.*", "lora/.*"))
    batch = chat.make_batch(model.chat, data, [0, 1, 2, 3])
    _, _, want = gradient(model, lambda p: merge_trees(frozen, p))(trained, batch)
    cfg = evolve(model.cfg, train=evolve(model.cfg.train, chunk=1))
    _, _, got = gradient(evolve(model, cfg=cfg, train=cfg.train), lambda p: merge_trees(frozen, p))(
        trained, batch
    )
    for n, g in flatten(got).items():
        torch.testing.assert_close(g, flatten(want)[n], rtol=1e-3, atol=1e-6, msg=n)
    assert torch.equal(
        torch.cat([chat.micro_batch(model.chat, batch, slice(i, i + 1))["pixel_values"] for i in range(4)]),
        batch["pixel_values"],
    )
    prompts = chat.encode_conversations(model.chat, tune_run.read_split(model.cfg, "test"), prompt=True)
    said = system.answer_prompts(model, params, prompts, chat.sampling_of(model.chat, 4), size=3)
    assert len(said) == 6


def test_quantised_base_and_adapter(tmp_path):
    stage = [{"name": "lora", "steps": 1, "lr": 1e-3, "train": ["lora/.*"]}]
    model, params, data = started(tmp_path, model__quantize="nf4", train__stages=stage)
    trained, frozen = split_tree(params, ("lora/.*",))
    before = skeletons.weights_digest(
        {f"{n}/{i}": t for n, w in params["model"].items() for i, t in enumerate(lazy.leaves(w))}
    )
    _, _, grads = gradient(model, lambda p: merge_trees(frozen, p))(
        trained, chat.make_batch(model.chat, data, [0, 1])
    )
    assert max(float(g.abs().max()) for n, g in flatten(grads).items() if n.endswith("/b")) > 0
    assert (
        skeletons.weights_digest(
            {f"{n}/{i}": t for n, w in params["model"].items() for i, t in enumerate(lazy.leaves(w))}
        )
        == before
    )


def test_a_model_from_a_folder(tmp_path, shared_data):
    """The real loading path: a checkpoint in the published layout with the published tokenizer and preprocessor."""
    tok = shared_data / "tokenizers/qwen2.5"
    skeleton, params = skeletons.init_skeleton(
        MODEL
        | {
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        }
        | {"text_config": MODEL["text_config"] | {"vocab_size": 151672}},
        torch.Generator().manual_seed(0),
        head="language",
    )
    saving.save_skeleton(skeleton, params, tmp_path / "qwen")
    for f in tok.iterdir():
        (tmp_path / "qwen" / f.name).write_bytes(f.read_bytes())
    (tmp_path / "qwen/preprocessor_config.json").write_bytes(
        (shared_data / "configs/qwen2.5-vl_preprocessor_config.json").read_bytes()
    )
    stage = [{"name": "lora", "steps": 1, "lr": 1e-3, "train": ["lora/.*"]}]
    model, loaded, data = started(
        tmp_path, model={"name": str(tmp_path / "qwen")}, chat__max_pixels=3136, train__stages=stage
    )
    assert loaded["model"]["lm_head.weight"].dtype == torch.bfloat16
    said = tune_run.labels(model.cfg, tmp_path / "run", 0)
    answer = data.conversations[0].messages[1]["content"]
    assert f"«{answer}<|im_end|>»" in said
    assert "<|vision_start|><|image_pad|> x 4<|vision_end|>" in said


# Templates and ends of answers ----------------------------------------------------------------------------------------------------------
GENERATION = {"eos_token_id": [2, 77], "repetition_penalty": 1.05, "do_sample": True, "temperature": 0.1}
GEMMA = (  # turns as Gemma's, in the tokens that there are
    "{% for m in messages %}<|vision_start|>{{ m.role }}\n{{ m.content | trim }}<|vision_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|vision_start|>assistant\n{% endif %}"
)


def opened(folder, generation=None, **cfg):
    """A small model in a folder, and the tokenizer with ChatML that the run makes."""
    skeleton, params = skeletons.init_skeleton(
        tiny.CONFIGS["qwen3"] | {"vocab_size": 640}, torch.Generator().manual_seed(0), head="language"
    )
    saving.save_skeleton(skeleton, params, folder / "model")
    (folder / "model/generation_config.json").unlink()
    if generation:
        (folder / "model/generation_config.json").write_text(json.dumps(generation))
    tok = chat.tokenizer_of(chat.ModelConfig(config={"model_type": "qwen3"}), folder, ["one two three"])
    model = chat.ModelConfig(name=str(folder / "model"), dtype="float32")
    return chat.open_chat(model, chat.ChatConfig(**cfg), tok, torch.Generator())


def ends_of(talks):
    """The ids that end answers, but the tokenizer's own."""
    return {*chat.sampling_of(talks, 8).end} - {talks.tokenizer.eos_token_id}


def test_answers_end_as_the_checkpoint_and_the_template_say(tmp_path):
    talks, _ = opened(tmp_path / "a", GENERATION)
    token = talks.tokenizer.convert_tokens_to_ids
    assert ends_of(talks) == {2, 77, token("<|im_end|>")}
    assert chat.sampling_of(talks, 8).repetition_penalty == 1.05
    talks, _ = opened(tmp_path / "b", {"eos_token_id": 77}, template=GEMMA, repetition_penalty=1.2)
    assert ends_of(talks) == {77, token("<|vision_end|>")}  # Gemma's <end_of_turn>
    assert chat.sampling_of(talks, 8).repetition_penalty == 1.2
    talks, _ = opened(tmp_path / "c")
    assert ends_of(talks) == {2, token("<|im_end|>")}  # 2: of config.json
    assert chat.sampling_of(talks, 8).repetition_penalty == 1


def test_a_saved_chat_keeps_generation_and_template(tmp_path):
    from transformers import AutoTokenizer

    options = {"greeting": "Hi"}
    template = "{{ greeting }}" + GEMMA
    talks, params = opened(tmp_path, GENERATION, template=template, options=options)
    chat.save_chat(talks, params, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text()) == GENERATION
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = tiny.turns("q", "a")
    want = talks.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert saved.apply_chat_template(messages, tokenize=False) == want
    assert talks.tokenizer.chat_template != template  # untouched
    again = chat.ModelConfig(name=str(tmp_path / "saved"), dtype="float32")
    back, _ = chat.open_chat(again, chat.ChatConfig(), chat.tokenizer_of(again, tmp_path), torch.Generator())
    held = [Conversation(messages=tuple(messages))]
    assert torch.equal(
        chat.encode_conversations(back, held).samples[0].ids,
        chat.encode_conversations(talks, held).samples[0].ids,
    )
    assert ends_of(back) == ends_of(talks)


def test_options_end_and_allowed_tokens_reach_the_template(tmp_path):
    held = [
        Conversation(
            messages=tuple(tiny.turns("q", "<|vision_start|> left", "r", "b")), line=3, file="x.jsonl"
        )
    ]
    talks, _ = opened(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"^x.jsonl, line 3: encode: message 1 \(assistant\) must not hold special tokens"
    ):
        chat.encode_conversations(talks, held)
    talks, _ = opened(
        tmp_path / "b", allow=("<|vision_start|>",), options={"word": "Hello"}, template="{{ word }}" + GEMMA
    )
    (sample,) = chat.encode_conversations(talks, held).samples
    text = talks.tokenizer.decode(sample.ids)
    assert text.startswith("<|startoftext|> hello<|vision_start|>")
    assert (
        talks.tokenizer.decode(sample.ids[sample.labels != -100])
        == "<|vision_start|> left<|vision_end|> b<|vision_end|>"
    )
    (asked,) = chat.encode_conversations(talks, held, prompt=True).samples
    assert asked.ids.tolist() == sample.ids[: len(asked.ids)].tolist()


def test_a_template_with_the_date_of_today_is_not_trained_on(tmp_path):
    template = "{% if not day is defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}" + GEMMA
    held = [Conversation(messages=tuple(tiny.turns("q", "a")))]
    talks, _ = opened(tmp_path / "a", template=template)
    with pytest.raises(
        ValueError, match=r"the template writes today's date into every conversation.*pin it by chat.options"
    ):
        chat.encode_conversations(talks, held)
    assert (
        len(chat.encode_conversations(talks, held, prompt=True).samples) == 1
    )  # to be asked it need not be pinned
    talks, _ = opened(tmp_path / "b", template=template, options={"day": "5"})
    assert len(chat.encode_conversations(talks, held).samples) == 1


REASONING = (  # as Qwen3's without reasoning: only the last answer has the mark that its prompt ends with
    "{% for m in messages %}<|vision_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}no thought\n{% endif %}"
    "{{ m.content }}<|vision_end|>\n{% endfor %}{% if add_generation_prompt %}<|vision_start|>assistant\nno thought\n{% endif %}"
)


def test_several_turns_of_a_reasoning_template_are_a_sample_each(tmp_path):
    talks, _ = opened(tmp_path, template=REASONING)
    messages = tuple(tiny.turns("q", "a", "r", "b", "s", "c"))
    held = [Conversation(messages=messages[:2]), Conversation(messages=messages)]
    data = chat.encode_conversations(talks, held)
    assert [len(c.messages) for c in data.conversations] == [2, 2, 4, 6]
    decode = talks.tokenizer.decode
    assert [decode(s.ids[s.labels != -100]) for s in data.samples] == [f" {a}<|vision_end|>" for a in "aabc"]
    for conversation, sample in zip(data.conversations, data.samples, strict=True):
        (asked,) = chat.encode_conversations(talks, [conversation], prompt=True).samples
        assert asked.ids.tolist() == sample.ids[: len(asked.ids)].tolist()
        assert "no thought" in decode(asked.ids)
    assert len(chat.encode_conversations(talks, held, prompt=True).samples) == 2
    tag = replace_first(messages, "q", "<image>q")
    parts = chat._split_by_answer(
        Conversation(messages=replace_first(tag, "s", "<image>s"), images=(Path("a"), Path("b")))
    )
    assert [[p.name for p in c.images] for c in parts] == [["a"], ["a"], ["a", "b"]]


def test_answers_as_they_are_in_a_record(tmp_path):
    template = (
        "{% for m in messages %}<|vision_start|>{{ m.content.split(';')[-1] }}{% endfor %}<|vision_end|>"
    )
    template += "{% if add_generation_prompt %}<|vision_start|>think{% endif %}"
    held = [Conversation(messages=tuple(tiny.turns("q", "one; a", "r", "two; b")))]
    talks, _ = opened(tmp_path, template=template, answers="raw")
    data = chat.encode_conversations(talks, held)
    decode = talks.tokenizer.decode
    assert [decode(s.ids[s.labels != -100]) for s in data.samples] == [
        " one; a<|vision_end|>",
        " two; b<|vision_end|>",
    ]
    (asked,) = chat.encode_conversations(talks, held, prompt=True).samples
    assert asked.ids.tolist() == data.samples[1].ids[: len(asked.ids)].tolist()


def replace_first(messages, old, new):
    return tuple(m | {"content": new if m["content"] == old else m["content"]} for m in messages)


# Files ----------------------------------------------------------------------------------------------------------------------------------
def with_files(tmp_path, test, train=()):
    """An experiment on files; `test` are the lines of its test split."""
    folder = tmp_path / "files"
    folder.mkdir(exist_ok=True)
    good = {"query": "one two", "response": "three"}
    for name, lines in {"train": [good] * 4 + [*train], "valid": [good] * 4, "test": test}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return record(tmp_path, data={"folder": str(folder)}, model={"config": MODEL, "dtype": "float32"})


def test_what_evaluation_cannot_use_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    Image.new("RGB", (2010, 10)).save(tmp_path / "strip.png")
    for test, message in (
        (
            {"query": "q", "response": " . "},
            r"files/test.jsonl, line 2: the last answer must hold a word to be compared with",
        ),
        (
            {"query": "<|im_end|>", "response": "a"},
            r"files/test.jsonl, line 2: encode: message 0 \(user\) must not hold special tokens",
        ),
        (
            {"query": "<image>", "response": "a", "image": str(tmp_path / "strip.png")},
            r"files/test.jsonl, line 2: .*strip.png: smart_resize: the longer side must be at most 200 times the shorter",
        ),
    ):
        raw = with_files(tmp_path, [{"query": "q", "response": "a"}, test])
        (tmp_path / "toy.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=message):
            run.run(str(tmp_path / "toy.json"), log=lambda _: None)
        assert not [*(tmp_path / "runs").rglob("*.pt")]


def test_a_record_that_trains_on_what_it_scores_says_so(tmp_path, caplog):
    raw = with_files(tmp_path, [{"query": "q", "response": "a"}])
    tune_run.prepare(config.structure(raw, Config, "test"))
    assert not caplog.records
    raw["data"]["conversations"] = "{folder}/test.jsonl"
    tune_run.prepare(config.structure(raw, Config, "test"))
    assert "{folder}/test.jsonl: is one file for all splits, so the test data are trained on" in caplog.text


def test_answers_that_find_no_room_are_refused_before_training(tmp_path):
    raw = with_files(tmp_path, [{"query": "one two", "response": "three"}])
    raw["evaluate"]["max_tokens"] = 600
    with pytest.raises(ValueError, match=r"max_tokens 600 are more than the 512 positions of qwen2_5_vl"):
        tune_run.fit(config.structure(raw, Config, "test"), tmp_path / "run", lambda _: None)
    assert not [*(tmp_path / "run").rglob("*.pt")]


def test_what_was_answered_is_kept_when_a_later_batch_fails(tmp_path, monkeypatch):
    raw = with_files(
        tmp_path, [{"query": f"q {i}", "response": "a"} | ({"category": "x"} if i else {}) for i in range(5)]
    )
    cfg = config.structure(raw, Config, "test")
    model, params = tune_run.fit(cfg, tmp_path / "run", lambda _: None)
    real, calls = chat.generate_answers, []

    def answer(*args, fail_at=0, **settings):
        calls.append(args)
        if len(calls) == fail_at:
            raise FloatingPointError("logits are not finite")
        return real(*args, **settings)

    def interrupted(home):
        calls.clear()
        monkeypatch.setattr(chat, "generate_answers", partial(answer, fail_at=2))
        with pytest.raises(FloatingPointError):
            tune_run.assess(model, params, home, "x")
        calls.clear()
        monkeypatch.setattr(chat, "generate_answers", answer)
        (unfinished,) = home.glob("answers-*.unfinished.jsonl")
        return unfinished

    tune_run.assess(model, params, tmp_path / "whole", "x")
    home = tmp_path / "run/results"
    unfinished = interrupted(home)
    kept = [json.loads(line) for line in unfinished.read_text().splitlines()]
    assert [line["row"] for line in kept] == [0, 1, 2]
    rows, _ = tune_run.assess(model, params, home, "x")
    assert len(calls) == 1  # the second batch alone
    assert (home / "answers.jsonl").read_bytes() == (tmp_path / "whole/answers.jsonl").read_bytes()
    lines = [json.loads(line) for line in (home / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert lines[0].keys() == {"id", "category", "answer", "gold", "right"}
    assert not [*home.glob("*.unfinished.jsonl")]
    # Another weight or setting does not take them.
    interrupted(home)
    other = params | {"model": {name: t * 1.5 for name, t in params["model"].items()}}
    tune_run.assess(model, other, home, "x")
    assert len(calls) == 2
    interrupted(home)
    cfg = evolve(model.cfg, evaluate=evolve(model.cfg.evaluate, max_tokens=2))
    tune_run.assess(evolve(model, cfg=cfg), params, home, "x")
    assert len(calls) == 2
    assert {r.subject for r in rows if r.what == "accuracy"} == {
        "all",
        "x",
        "without a category",
    }  # one without does not hide the others


def test_deep_greys_are_shown_through_the_window(tmp_path):
    import numpy as np

    for name, pixels in (
        ("deep.png", np.full((56, 56), 1000, np.uint16)),
        ("plain.png", np.full((56, 56), 7, np.uint8)),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "ct.dcm").write_bytes(
        made(np.full((56, 56), 2024, np.uint16), RescaleSlope=1, RescaleIntercept=-1024)
    )
    names = ("deep.png", "plain.png", "ct.dcm")
    lines = [{"query": "<image>", "response": "a", "image": str(tmp_path / name)} for name in names]
    raw = with_files(tmp_path, [{"query": "q", "response": "a"}], train=lines)
    with pytest.raises(
        ValueError, match=r"train.jsonl, line 5: open_image: .*deep.png: greys of more than 8 bits"
    ):
        tune_run.fit(config.structure(raw, Config, "test"), tmp_path / "run", lambda _: None)
    raw["chat"]["window"] = [500, 1500]
    cfg = config.structure(raw, Config, "test")
    held = tune_run.read_split(cfg, "train")
    model, _ = system.init_model(cfg, tmp_path / "run", ["one"])
    seen = [vision.open_item(c.images[0], window=model.chat.cfg.window).getpixel((0, 0))[0] for c in held[4:]]
    assert seen == [128, 7, 128]  # eight bits need no window


# Errors ---------------------------------------------------------------------------------------------------------------------------------
BAD = [
    ({"model": {}}, "model must have either a name .* or a config"),
    (
        {
            "model__quantize": "nf4",
            "train__stages": [{"name": "a", "steps": 1, "lr": 1.0, "train": ["model/.*"]}],
        },
        "freezes the model",
    ),
    ({"model__quantize": "int4"}, "must be one of 'none', 'nf4', 'fp4', got 'int4'"),
    ({"train__chunk": 3}, "train.chunk must divide train.batch, got 3 and 4"),
    ({"train__stages": []}, "at least one stage"),
    ({"lora__experts": 3}, "3 experts must divide the rank"),
    ({"lora__targets": []}, "give either targets"),
    ({"data__phantoms__size": 10}, "size must be 56 or more, got 10"),
    ({"train__lr": 3}, "unknown key 'lr'"),
    ({"chat__window": [3]}, r"chat.window must be \[black, white\] with black < white, got \[3.0\]"),
    ({"chat__window": [3, 3]}, r"chat.window must be \[black, white\]"),
    (
        {"chat__options": {"tokenize": True}},
        "chat.options must be variables of a template, 'tokenize' is none",
    ),
    ({"chat__options": {"a b": 1}}, "chat.options must be variables of a template, 'a b' is none"),
    ({"chat__repetition_penalty": -1.0}, "chat.repetition_penalty must be 0 or more"),
    (
        {
            "model__dtype": "bfloat16",
            "train__stages": [{"name": "a", "steps": 1, "lr": 1.0, "muon": 0.02, "train": ["model/.*"]}],
        },
        "a stage's muon needs whole float32 weights",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_bad_records(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        config.structure(record(tmp_path, **change), Config, "test")


IMPOSSIBLE = [
    ({"text_config__hidden_size": -1}, r"^config.text_config.hidden_size must be from 1 to 131072, got -1"),
    (
        {"text_config__num_hidden_layers": 10**6},
        r"^config.text_config.num_hidden_layers must be from 1 to 1024, got 1000000",
    ),
    ({"text_config__num_attention_heads": 0}, "num_attention_heads must be from 1"),
    ({"vision_config__patch_size": 0}, "vision_config.patch_size must be from 1"),
    (
        {
            "text_config__hidden_size": 2**13,
            "text_config__num_attention_heads": 2**10,
            "text_config__intermediate_size": 2**19,
            "text_config__num_hidden_layers": 100,
        },
        "of float32 weights",
    ),
    (
        {"text_config__num_attention_heads": 3},
        "num_key_value_heads must divide num_attention_heads, got 2 and 3",
    ),
    (
        {"text_config__num_key_value_heads": 3},
        r"^config.text_config: num_key_value_heads must divide num_attention_heads, got 3 and 4",
    ),
    (
        {"vision_config__num_heads": 3},
        r"^config.vision_config: num_heads must divide hidden_size, got 3 and 32",
    ),
    ({"vision_config__out_hidden_size": 7}, r"^model.config: sizes of this qwen2_5_vl do not fit each other"),
    (
        {"text_config__rope_parameters": tiny.ROPE | {"mrope_section": [9, 9, 9]}},
        "mrope_section must be three numbers whose sum is 4",
    ),
    (
        {"text_config__rope_parameters": tiny.ROPE | {"rope_type": "none"}},
        "can be built with these sizes .*none",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), IMPOSSIBLE, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(IMPOSSIBLE)]
)
def test_models_that_cannot_be_built_are_refused_at_once(tmp_path, change, message):
    cfg = config.structure(
        record(tmp_path, **{f"model__config__{key}": value for key, value in change.items()}), Config, "test"
    )
    with pytest.raises(ValueError, match=message):
        system.init_model(cfg, tmp_path / "run", ["one two three"])


def test_one_key_of_lora_keeps_the_others(tmp_path):
    raw = record(tmp_path)
    del raw["lora"]
    for change, want in (
        ({"experts": 4}, {"pattern": "all-linear", "experts": 4, "targets": ()}),
        ({"targets": ["q_proj"]}, {"pattern": "", "targets": ("q_proj",)}),
        ({"pattern": ".*q_proj", "rank": 4}, {"pattern": ".*q_proj", "rank": 4}),
    ):
        cfg = config.structure(
            config.override(raw, [f"lora.{k}={json.dumps(v)}" for k, v in change.items()]), Config, "test"
        )
        assert {k: getattr(cfg.lora, k) for k in want} == want
        assert (
            config.structure(config.unstructure(cfg), Config, "test") == cfg
        )  # as a run's config.json says it
    with pytest.raises(ConfigError, match="give either targets"):
        config.structure(
            config.override(raw, ('lora.targets=["q_proj"]', 'lora.pattern=".*"')), Config, "test"
        )


def test_what_a_stage_cannot_train(tmp_path):
    stage = lambda pattern: [{"name": "x", "steps": 1, "lr": 1.0, "train": [pattern]}]
    with pytest.raises(ValueError, match=r"stage x: pattern 'model/visual' matches no parameter"):
        started(tmp_path, train__stages=stage("model/visual"))
    with pytest.raises(ValueError, match=r"stage x: model/.*q_proj.weight has 4 bits and cannot be trained"):
        started(tmp_path, model__quantize="nf4", train__stages=[*stage("lora/.*"), *stage("model/.*")])
    with pytest.raises(ValueError, match="no layer ends in it"):
        started(tmp_path, lora__targets=["query"])


def test_data_that_is_not_there_or_does_not_fit(tmp_path):
    cfg = config.structure(record(tmp_path, data={"folder": str(tmp_path / "none")}), Config, "test")
    with pytest.raises(
        ValueError, match=r"3 files are missing: .*train.jsonl, .*JSON lines of conversations"
    ):
        tune_run.prepare(cfg)
    blind = {"config": tiny.CONFIGS["qwen3"], "dtype": "float32"}
    with pytest.raises(
        ValueError,
        match=r"train.jsonl, line 1: has images, as 12 conversations do, and qwen3 has no vision encoder",
    ):
        started(tmp_path, model=blind)
    with pytest.raises(ValueError, match="12 of 12 conversations do not fit the context of 10 tokens"):
        started(tmp_path, chat__context=10)
    with pytest.raises(
        ValueError, match="ct_clip experiment; only systems that train a language model have labels"
    ):
        experiments.print_labels(str(Path(__file__).parents[3] / "experiments/ctclip_phantom.toml"))


# Drawn pictures -------------------------------------------------------------------------------------------------------------------------
def test_pictures_show_what_is_said(tmp_path):
    cfg = pictures.PictureConfig(train=40, valid=1, test=1)
    for i in range(40):
        picture, question, answer, kind = pictures.draw_picture(cfg, "train", i)
        bright = torch.from_numpy(picture[..., 0].copy()).float() > 125
        assert picture.shape == (112, 112, 3)
        if kind == "side":
            left = bright[:, :56].sum() > bright[:, 56:].sum()
            assert answer == (
                "On the right." if left else "On the left."
            )  # the patient's right is on the left of the picture
        elif kind == "zone":
            assert answer == (
                "In the upper zone." if bright[:56].sum() > bright[56:].sum() else "In the lower zone."
            )
        else:
            quarters = sum(int(bright[y : y + 56, x : x + 56].sum() > 20) for y in (0, 56) for x in (0, 56))
            assert ("no", "one", "two", "three")[quarters] in answer
        assert question.endswith("?")
    pictures.draw_pictures(cfg, tmp_path / "a")
    pictures.draw_pictures(cfg, tmp_path / "b")
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(names) == 45
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert Image.open(tmp_path / "a/train/0.png").size == (112, 112)


def test_muon_moves_the_matrices_inside_layers(tmp_path):
    stage = {"name": "a", "steps": 2, "lr": 1e-9, "muon": 0.05, "train": ["model/.*"]}
    model, params, data = started(tmp_path, train__stages=[stage])
    before = {n: t.clone() for n, t in params["model"].items()}
    optimizer = tuning.make_optimizer(model.cfg.train, model.cfg.train.stages[0], params)
    step = loop.make_step(gradient(model, lambda p: p), optimizer)
    state, _ = step(
        states.State(params=params, opt=optimizer.init(params)), chat.make_batch(model.chat, data, [0, 1])
    )
    moved = {n for n, t in state.params["model"].items() if (t - before[n]).abs().max() > 1e-4}
    inner = {n for n, t in before.items() if t.dim() > 1 and "embed_tokens" not in n and "lm_head" not in n}
    assert moved == inner


def test_counts_are_told_before_training(tmp_path):
    model, params, _ = started(tmp_path)
    own, base, share = lora.count_adapter(model.adapter, params["model"])
    assert own == sum(t.numel() for t in flatten(params["lora"]).values())
    assert share == pytest.approx(100 * own / (own + base))


# What makes an adapter -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["(model|lora)/.*", "(?:lora|model)/.*", "[ml]o.*", ".+"])
def test_any_pattern_that_matches_an_adapter_makes_and_trains_it(pattern, tmp_path):
    stages = [{"name": "both", "steps": 2, "lr": 1e-2, "train": [pattern]}]
    cfg = built(tmp_path, train__stages=stages)
    model, params = tune_run.fit(cfg, tmp_path / "run", lambda _: None)
    assert model.adapter is not None
    assert len(params["lora"]) == 2 * MODEL["text_config"]["num_hidden_layers"]
    assert all(f["b"].abs().max() > 0 for f in params["lora"].values())  # it starts at zero
    (tmp_path / "run/config.json").write_text(json.dumps(config.unstructure(cfg)))
    again = tune_run.load(tmp_path / "run")[1]
    assert skeletons.weights_digest(again) == skeletons.weights_digest(params)


@pytest.mark.parametrize("pattern", ["model/.*", "model/(?!lora).*", "(model|tower)/.*"])
def test_a_pattern_that_matches_none_of_its_names_makes_no_adapter(pattern, tmp_path):
    model, params, _ = started(
        tmp_path, train__stages=[{"name": "whole", "steps": 2, "lr": 1e-2, "train": [pattern]}]
    )
    assert model.adapter is None
    assert [*params] == ["model"]


def test_an_adapter_that_is_wanted_and_cannot_be_made_is_an_error(tmp_path):
    stages = [{"name": "both", "steps": 2, "lr": 1e-2, "train": ["(model|lora)/.*"]}]
    with pytest.raises(ValueError, match="lora: target 'nothing': no layer ends in it"):
        started(tmp_path, train__stages=stages, lora__targets=["nothing"])


# Epochs ---------------------------------------------------------------------------------------------------------------------------------
def test_epochs_are_as_many_steps_as_the_data_makes_them(tmp_path):
    stage = {"name": "whole", "lr": 1e-3, "train": ["model/.*"]}
    lines = []
    cfg = built(tmp_path, train__stages=[stage | {"epochs": 1.5}, stage | {"name": "long", "steps": 9}])
    tune_run.fit(cfg, tmp_path / "run", lines.append)
    assert (
        "stage whole: 4 steps of 4 conversations are 1.33 epochs of 12" in lines
    )  # 1.5 x 12 / 4 = 4.5, to the even number
    assert "stage long: 9 steps of 4 conversations are 3 epochs of 12" in lines
    assert [states.read_state(tmp_path / "run" / s / "last.pt").step for s in ("0-whole", "1-long")] == [4, 9]
    (tmp_path / "run/config.json").write_text(json.dumps(config.unstructure(cfg)))
    tune_run.load(tmp_path / "run")
    assert {*tune_run.memory(cfg, tmp_path / "run")} == {"whole", "long"}


def test_epochs_and_steps_that_cannot_be_are_refused_before_training(tmp_path):
    stage = {"name": "whole", "lr": 1e-3, "train": ["model/.*"]}
    for wrong, said in (
        ({"epochs": 2, "steps": 3}, "stage whole: needs either steps or epochs, got 3 and 2"),
        ({}, "stage whole.steps must be 1 or more, got 0"),
        ({"epochs": -1.0, "steps": 2}, "stage whole.epochs must be 0 or more, got -1"),
    ):
        with pytest.raises(ConfigError, match=said):
            built(tmp_path, train__stages=[stage | wrong])
    cfg = built(
        tmp_path, train__stages=[stage | {"steps": 3}, stage | {"name": "late", "epochs": 1, "warmup": 4}]
    )
    with pytest.raises(ValueError, match="stage late: warmup must lie within its 3 steps, got 4"):
        tune_run.fit(cfg, tmp_path / "run", lambda _: None)
    assert not list((tmp_path / "run").glob("*/last.pt"))


def test_an_answer_to_choices_is_right_by_what_it_chooses():
    messages = ({"role": "user", "content": "Which?"}, {"role": "assistant", "content": "B. Heart"})
    asked = Conversation(messages=messages, extra={"options": {"A": "Lung", "B": "Heart"}})
    assert [tune_run._line(asked, answer)["right"] for answer in ("B", "heart", "A", "")] == [
        True,
        True,
        False,
        False,
    ]
    assert not tune_run._line(evolve(asked, extra={}), "B")["right"]


def test_texts_among_images_are_refused_where_the_vision_encoder_lies_in_parts(tmp_path, monkeypatch):
    """On two processes training stood still at the first batch that has an image on one of them only."""
    model, params, data = started(tmp_path)
    answer = {"role": "assistant", "content": "No."}
    text = Conversation(messages=({"role": "user", "content": "Is it red?"}, answer), id="alone")
    texts = chat.encode_conversations(model.chat, [text])
    both = evolve(
        data, conversations=data.conversations + texts.conversations, samples=data.samples + texts.samples
    )
    monkeypatch.setattr(system.shards, "any_sharded", lambda _: True)
    for train, valid in ((both, None), (data, both)):
        with pytest.raises(
            ValueError, match=r"train.shard, .* found 1 of 13 without, first conversation alone"
        ):
            system.fit_model(
                model, params, lambda _, part=train: part, lambda _, part=valid: part, tmp_path / "fit"
            )
    assert not (tmp_path / "fit").exists()
