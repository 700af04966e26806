"""A trained run in the service answers as it does alone, with its adapter and without, in one batch."""

import pytest

from medvl.language import chat, system
from medvl.serve.models import open_served
from medvl.systems import export, run
from medvl.systems.tune import run as tune_run
from tests.rooms import answer_served, ask


@pytest.fixture(scope="module")
def folder(trained):
    (folder,) = run.RUNS.iterdir()
    return folder


def questions(trained):
    cfg, _ = run.resolve(str(trained))
    for conversation in tune_run.read_split(cfg, "test")[:4]:
        text = conversation.messages[0]["content"].replace("<image>\n", "")
        yield text, list(map(str, conversation.images))


def test_a_run_is_served(trained, folder):
    served = open_served(str(folder))
    asked = list(questions(trained))
    requests = [ask(f"{i}", text, images, max_tokens=8) for i, (text, images) in enumerate(asked)]
    requests += [
        ask(f"base {i}", *question, adapter="base", max_tokens=8) for i, question in enumerate(asked)
    ]
    answers = answer_served(served, requests)
    model, params = tune_run.load(folder)
    for i, (text, images) in enumerate(asked):
        alone = tune_run.ask(folder, text, images, 8)
        assert answers[str(i)] == (alone, ((folder.name, 1.0),))
        prompts = chat.encode_conversations(
            model.chat, [chat.make_question(model.chat, text, images)], prompt=True
        )
        bare = chat.generate_answers(
            model.chat,
            params["model"],
            chat.make_batch(model.chat, prompts, [0], side="left"),
            chat.sampling_of(model.chat, 8),
        )
        assert answers[f"base {i}"] == (bare.texts[0], ())
    assert system.model_weights(model, params).keys() == served.weights([()]).keys()


def test_an_exported_model_is_served(trained, folder, tmp_path):
    export.export_run(str(folder), str(tmp_path / "merged"), "merged")
    served = open_served(str(tmp_path / "merged"))
    assert served.adapters == ()
    asked = list(questions(trained))
    requests = [ask(f"{i}", text, images, max_tokens=8) for i, (text, images) in enumerate(asked)]
    answers = answer_served(served, requests)
    merged = sum(answers[str(i)][0] == tune_run.ask(folder, *question, 8) for i, question in enumerate(asked))
    assert merged >= len(asked) - 1  # adding factors to weights rounds otherwise


def test_what_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"system": "ct_clip"}')
    with pytest.raises(ValueError, match="a run of ct_clip is no language model"):
        open_served(str(tmp_path))
