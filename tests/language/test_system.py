"""language.system with a vision of a new kind: 2 learned tokens for each coloured square."""

import json
from functools import partial
from unittest import mock

import pytest
import torch
from attrs import evolve, frozen

from medvl.base.tree import flatten, map_leaves
from medvl.language import chat, system
from medvl.language.chat import ChatConfig, ModelConfig
from medvl.language.templates import QWEN_VL
from medvl.language.vision import Vision, item_range
from medvl.training.record import Stage, TrainConfig
from medvl.weights import lora
from medvl.weights.lora import LoraConfig

COLOURS = ("red", "green", "blue")
WIDTH = 32
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WHOLE = Stage(name="whole", steps=100, lr=0.01, train=("model/.*", "squares/.*"))
ADAPTER = Stage(name="adapter", steps=2, lr=0.001, train=("lora/.*",))


@frozen(kw_only=True)
class Evaluate:
    batch: int = 2


@frozen(kw_only=True)
class Config:
    seed: int = 0
    model: ModelConfig = ModelConfig(config=QWEN3, dtype="float32")
    chat: ChatConfig = ChatConfig(context=64, template="chatml")
    lora: LoraConfig = LoraConfig(rank=2, pattern="all-linear")
    train: TrainConfig = TrainConfig(
        stages=(WHOLE, ADAPTER), batch=6, chunk=6, log=0, save=0, validate=0, keep="last", device="cpu"
    )
    evaluate: Evaluate = Evaluate()


@frozen(kw_only=True)
class Squares:
    """A conversation about coloured squares."""

    messages: tuple[dict[str, str], ...]
    items: tuple[str, ...]
    place: str = "this conversation"

    def until(self, stop):
        messages = self.messages[:stop]
        tags = sum(message["content"].count("<image>") for message in messages)
        return evolve(self, messages=messages, items=self.items[:tags])


def squares(*colours):
    """Which colour has the last square?"""
    question = "<image>" * len(colours) + "which colour is last?"
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": colours[-1]})
    return Squares(messages=turns, items=colours)


def squares_vision():
    def select_rows(batch, rows):
        first, stop = item_range(batch, rows)
        return {"colours": batch["colours"][first:stop]}

    return Vision(
        placeholder=QWEN_VL,
        count_tokens=lambda colour: 2,
        load_items=lambda colours: {
            "colours": torch.tensor([COLOURS.index(c) for c in colours], dtype=torch.int64)
        },
        select_rows=select_rows,
        embed=lambda params, batch: params["squares"]["tokens"][batch["colours"]].flatten(0, 1),
    )


def add_squares(opened, params, gen):
    device = next(iter(params["model"].values())).device
    tokens = (torch.randn(len(COLOURS), 2, WIDTH, generator=gen) * 0.5).to(device)
    return evolve(opened, vision=squares_vision()), params | {"squares": {"tokens": tokens}}


TRAIN = [squares(a, b) for a in COLOURS for b in COLOURS if a != b] + [squares(c) for c in COLOURS]
init = partial(system.init_model, Config(), texts=system.message_texts(TRAIN), extend=add_squares)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    model, params = init(folder=folder)
    data = chat.encode_conversations(model.chat, TRAIN)
    start = params["squares"]["tokens"].clone()
    before = system.validation_loss(model, data, params)
    params = system.fit_model(model, params, lambda stage: data, lambda stage: None, folder, lambda _: None)
    return folder, model, params, data, start, before


def ask(model, params, conversations, **settings):
    prompts = chat.encode_conversations(model.chat, conversations, prompt=True)
    sampling = chat.sampling_of(model.chat, 4)
    return system.answer_prompts(model, params, prompts, sampling, size=2, **settings)


def test_a_new_kind_of_vision_is_trained_and_answers(trained):
    _, model, params, data, start, before = trained
    assert sum(stop - start for start, stop in data.samples[0].visual) == 4
    assert not torch.equal(params["squares"]["tokens"], start)
    assert system.validation_loss(model, data, params) < before / 10
    answers = ask(model, params, [squares(c) for c in COLOURS])
    assert [answer.strip() for answer in answers] == [*COLOURS]
    # By likelihood: the letters of options; a prompt without options beside them is answered by text.
    options = [{"A": "red", "B": "blue"}, {}, {"A": "red", "B": "blue"}]
    letters = ask(model, params, [squares(c) for c in COLOURS], options=options)
    assert letters[1].strip() == "green"
    assert {letters[0], letters[2]} <= {"A", "B"}


def test_micro_batches_take_their_items(trained):
    _, model, params, data, _, _ = trained
    batch = chat.make_batch(model.chat, data, [0, 6, 1])
    assert batch["images"].tolist() == [2, 1, 2]
    parts = [chat.micro_batch(model.chat, batch, slice(i, i + 1)) for i in range(3)]
    assert [part["colours"].tolist() for part in parts] == [[0, 1], [0], [0, 2]]
    losses = [system.loss_function(model)(params, part)[0] for part in parts]
    whole, count, _ = system.loss_function(model)(params, batch)
    torch.testing.assert_close(sum(losses), whole)
    assert int(count) == int((batch["labels"] != -100).sum())


def test_the_adapter_stands_on_the_model(trained):
    _, model, params, _, _, _ = trained
    assert model.adapter is not None
    bare = system.model_weights(evolve(model, adapter=None), params)
    adapted = system.model_weights(model, params)
    changed = {name for name in bare if adapted[name] is not bare[name]}
    assert {name.rpartition(".")[0] for name in changed} == {*model.adapter.factors}
    assert lora.count_adapter(model.adapter, params["model"])[0] > 0


def test_an_estimate_tokenises_the_longest_conversations(trained, monkeypatch):
    folder, *_ = trained
    model, params = init(folder=folder, device=torch.device("meta"))
    want = system.estimate_steps(model, params, TRAIN)
    # As many as the rows that are estimated.
    monkeypatch.setattr(system, "_TOKENISED", model.train.batch)
    encode = mock.Mock(side_effect=chat.encode_conversations)
    monkeypatch.setattr(chat, "encode_conversations", encode)
    few = system.estimate_steps(model, params, TRAIN[::-1])
    assert len(encode.call_args.args[1]) == model.train.batch < len(TRAIN)
    assert few["whole"].memory == want["whole"].memory


def test_labels_and_memory_before_a_run(trained):
    folder, *_ = trained
    make = partial(init, folder=folder)
    assert "<|image_pad|> x 2" in system.show_labels(make, TRAIN, 6)
    with pytest.raises(ValueError, match="labels: sample must be below 9, got 9"):
        system.show_labels(make, TRAIN, 9)
    model, params = make(device=torch.device("meta"))
    longest = system.estimate_steps(model, params, TRAIN)
    shown = system.estimate_steps(model, params, [], item="red")
    assert {*longest} == {*shown} == {"whole", "adapter"}
    memory = [sum(steps["whole"].memory.values()) for steps in (longest, shown)]
    assert 0 < memory[0] < memory[1]  # the whole context is longer
    assert 0 < longest["whole"].work.flops < shown["whole"].work.flops


def test_answers_go_by_all_that_decides_them(trained):
    _, model, params, _, _, _ = trained
    prompts = chat.encode_conversations(model.chat, [squares("red"), squares("blue")], prompt=True)
    sampling = chat.sampling_of(model.chat, 4)

    def stamp(params=params, prompts=prompts, sampling=sampling, items=str, settings=(2,)):
        return system.stamp_answers(model, params, prompts, sampling, items, settings)

    other = params | {"squares": {"tokens": params["squares"]["tokens"] + 1}}
    one = chat.encode_conversations(model.chat, [squares("red"), squares("green")], prompt=True)
    stamps = [
        stamp(),
        stamp(params=other),
        stamp(prompts=one),
        stamp(sampling=evolve(sampling, max_tokens=5)),
        stamp(items=lambda item: "another content"),
        stamp(settings=(3,)),
    ]
    assert len({*stamps}) == 6
    assert stamp() == stamps[0]


def test_answers_that_are_kept_are_not_computed_again(trained, tmp_path, monkeypatch):
    _, model, params, _, _, _ = trained
    conversations = [squares(c) for c in COLOURS]
    whole = ask(model, params, conversations, path=tmp_path / "whole.jsonl")
    real, calls = chat.generate_answers, []

    def answer(*args, **settings):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(chat, "generate_answers", answer)
    with pytest.raises(KeyboardInterrupt):
        ask(model, params, conversations, path=tmp_path / "kept.jsonl")
    assert ask(model, params, conversations, path=tmp_path / "kept.jsonl") == whole
    assert len(calls) == 3  # two, and the batch that was interrupted again
    assert (tmp_path / "kept.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# Two tasks ----------------------------------------------------------------------------------------------------
def two_tasks(folder, **settings):
    """Colours of squares, and the same seen through other tokens and an adapter on the same model."""
    model, params = init(folder=folder)
    params = {
        "model": params["model"],
        "first": {name: params[name] for name in ("squares", "lora")},
        "second": {
            "squares": {"tokens": -params["squares"]["tokens"]},
            "lora": map_leaves(torch.clone, params["lora"]),
        },
    }
    model = evolve(model, train=evolve(model.train, **settings))
    tasks = system.Tasks(
        models={"first": model, "second": model},
        select=lambda params, task: {"model": params["model"], **params[task]},
    )
    return tasks, params, chat.encode_conversations(model.chat, TRAIN)


@pytest.mark.parametrize("settings", [{}, {"tokens": 60}])
def test_a_batch_of_two_tasks_is_the_mean_over_all_their_tokens(tmp_path, settings):
    mixed = Stage(name="mixed", steps=1, lr=0.01, train=("model/.*", ".*/squares/.*"))
    tasks, params, data = two_tasks(tmp_path, stages=(mixed,), chunk=2, **settings)
    parts = {"first": data, "second": data}
    batch = system._task_batches(tasks, parts, tasks.models["first"].train, 0)(0)
    assert sum(len(piece["ids"]) for piece in batch) == 6
    assert {int(piece["task"]) for piece in batch} == {0, 1}
    sums, tokens = 0.0, 0
    for piece in batch:
        task = ("first", "second")[int(piece["task"])]
        total, count, _ = system.loss_function(tasks.models[task])(tasks.select(params, task), piece)
        sums, tokens = sums + float(total), tokens + int(count)
    system.fit_tasks(tasks, params, lambda stage: parts, lambda stage: {}, tmp_path, lambda _: None)
    log = tmp_path / "0-mixed" / "metrics.jsonl"
    assert float(json.loads(log.read_text().splitlines()[0])["loss"]) == pytest.approx(
        sums / tokens, rel=1e-5
    )


def test_a_task_trains_its_own_part_as_a_model_alone_does(tmp_path):
    stage = Stage(name="one", steps=3, lr=0.01, train=("second/.*",))
    tasks, params, data = two_tasks(tmp_path, stages=(stage,))
    start = map_leaves(torch.clone, params)  # the loop trains in place
    trained = system.fit_tasks(
        tasks,
        params,
        lambda stage: {"second": data},
        lambda stage: {"second": data},
        tmp_path,
        lambda _: None,
    )
    for name, before in flatten(start).items():
        assert torch.equal(flatten(trained)[name], before) is not name.startswith("second/")
    alone = evolve(stage, train=("squares/.*", "lora/.*"))
    model = tasks.models["second"]
    model = evolve(model, train=evolve(model.train, stages=(alone,)))
    expected = system.fit_model(
        model,
        tasks.select(start, "second"),
        lambda stage: data,
        lambda stage: None,
        tmp_path / "b",
        lambda _: None,
    )
    for name, weight in flatten(trained["second"]).items():
        assert torch.equal(weight, flatten(expected)[name])


def test_nothing_is_trained_in_float16(tmp_path):
    cfg = Config(model=evolve(Config().model, dtype="float16"))
    with pytest.raises(ValueError, match=r"'float16' is for answers alone.*train in bfloat16"):
        system.init_model(cfg, tmp_path, ["a text"])
