"""Requests that are answered together say what they say alone."""

import random

import pytest
import torch
from attrs import evolve
from PIL import Image

from medvl.language import chat, generate
from medvl.serve.engine import BatchEngine, EngineConfig
from medvl.serve.interface import End, Piece, Refused, Request
from medvl.serve.models import find_revision
from tests.serve import served_toy


@pytest.fixture(scope="module")
def served():
    return served_toy.open_toy()


def answer(served, requests, rows, cells=0, interrupted=lambda: False):
    """{id: (text, how it ended)} and the engine."""
    events = {}
    engine = BatchEngine(
        served,
        EngineConfig(rows=rows, cells=cells, context=400),
        lambda call, event: events.setdefault(call, []).append(event),
    )
    for request in requests:
        engine.submit(engine.prepare(request))
    while not engine.is_idle:
        engine.work(interrupted)
    return {call: (text_of(of), of[-1]) for call, of in events.items()}, engine


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Piece))


def plain(request, served):
    """The text of a request by `generate`, with the weights of its mixture alone."""
    from medvl.language.conversations import Conversation
    from medvl.serve.models import find_mixture

    conversation = Conversation(messages=request.messages, images=request.images)
    prompts = chat.encode_conversations(served.chat, [conversation], prompt=True)
    weights = served.weights([find_mixture(served, request.adapter, conversation)])
    cfg = chat.sampling_of(served.chat, request.max_tokens)
    cfg = evolve(cfg, temperature=request.temperature, stop=request.stop)
    batch = chat.make_batch(served.chat, prompts, [0], side="left")
    inputs = chat.model_inputs(served.chat, weights, batch)
    inputs.pop("labels")
    gen = [torch.Generator().manual_seed(_first_seed(request.seed))]
    return generate.generate(cfg, served.chat.skeleton, weights, inputs, tok=served.chat.tokenizer, gen=gen)


def _first_seed(seed):
    # As `draw_uniform` makes a generator for each row from that of the batch.
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_texts_are_those_of_generate(served, rows):
    requests = served_toy.requests(21, random.Random(rows))
    answers, _ = answer(served, requests, rows)
    assert {*answers} == {request.id for request in requests}
    for request in requests:
        expected = plain(request, served)
        text, end = answers[request.id]
        assert text == expected.texts[0]
        assert (end.reason, end.answer_tokens) == (expected.reasons[0], len(expected.ids[0]))
    assert len({text for text, _ in answers.values()}) > 15


def test_adapters_and_mixtures_answer_differently(served):
    asked = [
        Request(id=str(i), messages=({"role": "user", "content": "glucose"},), adapter=kind, max_tokens=20)
        for i, kind in enumerate(served_toy.KINDS)
    ]
    answers, _ = answer(served, asked, 8)
    texts = [answers[str(i)][0] for i in range(len(asked))]
    assert texts[0] == texts[-1]  # "" and "base" are both the bare model
    assert len({*texts}) == len(texts) - 1
    assert answers["4"][1].adapters == (("liver", 0.5), ("lung", 0.5))


def test_a_request_that_is_cancelled_says_nothing_more_and_disturbs_none(served):
    requests = served_toy.requests(9, random.Random(4), max_tokens=(30, 30))
    expected, _ = answer(served, requests, 8)
    events = {}
    engine = BatchEngine(
        served,
        EngineConfig(rows=4, context=400),
        lambda call, event: events.setdefault(call, []).append(event),
    )
    for request in requests:
        engine.submit(engine.prepare(request))
    steps = 0
    while not engine.is_idle:
        engine.work(lambda: True)  # one step
        steps += 1
        if steps == 6:
            engine.cancel("0")  # in flight
            engine.cancel("8")  # waits
            told = len(events["0"])
    assert len(events["0"]) == told
    assert "8" not in events
    for call in "1234567":
        assert text_of(events[call]) == expected[call][0]


def test_the_cache_stays_within_its_cells_and_the_first_come_are_served_first(served):
    requests = served_toy.requests(12, random.Random(5), max_tokens=(30, 30))
    begun = []
    engine = BatchEngine(served, EngineConfig(rows=8, cells=420, context=400), lambda call, event: None)
    for request in requests:
        engine.submit(engine.prepare(request))
    while not engine.is_idle:
        engine.work(lambda: True)
        memory = engine._cache.cache.layers[0].key_room
        assert memory.shape[0] * memory.shape[2] <= 420
        begun += [row.prepared.request.id for row in engine._rows if row.prepared.request.id not in begun]
    assert begun == [request.id for request in requests]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"adapter": "kidney"}, 400, "adapter: there are liver, lung, skin, got another name"),
        ({"adapter": {"liver": float("nan")}}, 400, "finite"),
        ({"adapter": "auto"}, 400, "needs a registry"),
        ({"max_tokens": 1000}, 400, "must be at most 400 together"),
        ({"max_tokens": -1}, 400, "max_tokens >= 1"),
        ({"temperature": -1.0}, 400, "temperature >= 0"),
        ({"images": ()}, 400, "<image>"),
        ({"messages": ()}, 400, "roles must be user"),
        ({"messages": ({"role": "Jane", "content": "x"},)}, 400, "a role must be system"),
        (
            {"messages": ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})},
            400,
            "ending with user",
        ),
        ({"images": (Image.new("RGB", (4000, 2)),)}, 400, "aspect|ratio|200"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_before_they_wait(served, changes, status, message):
    engine = BatchEngine(served, EngineConfig(rows=2, context=400), lambda call, event: None)
    good = Request(
        id="1",
        messages=({"role": "user", "content": "<image>\nJane Doe"},),
        images=(Image.new("RGB", (16, 16)),),
        max_tokens=5,
    )
    engine.prepare(good)
    with pytest.raises(Refused, match=message) as refused:
        engine.prepare(evolve(good, **changes))
    assert refused.value.status == status
    assert "Jane" not in str(refused.value)


def no_token(step, ids):
    return torch.zeros(1, 3, dtype=torch.bool)


def too_costly(step, ids):
    raise ValueError("Jane Doe")


@pytest.mark.parametrize(("mask", "status"), [(no_token, 500), (too_costly, 400)])
def test_a_row_that_fails_ends_alone(served, mask, status):
    """One request in four fails: the others are answered as before."""
    requests = served_toy.requests(4, random.Random(6), max_tokens=(20, 20))
    expected, _ = answer(served, requests, 4)
    events = {}
    engine = BatchEngine(
        served,
        EngineConfig(rows=4, context=400),
        lambda call, event: events.setdefault(call, []).append(event),
    )
    for request in requests:
        engine.submit(engine.prepare(request))
    while not engine.is_idle:
        engine.work(lambda: True)
        if len(engine._rows) == 4:
            engine._rows[1].prepared = evolve(engine._rows[1].prepared, allowed=mask)
    failed = [call for call, of in events.items() if isinstance(of[-1], Refused)]
    assert failed == ["1"]
    assert events["1"][-1].status == status
    for call in "023":
        assert text_of(events[call]) == expected[call][0]
        assert isinstance(events[call][-1], End)


def test_a_revision_is_of_the_weights_that_answer(served):
    same = served_toy.open_toy()
    assert find_revision(served) == find_revision(same)
    name = next(iter(same.params["model"]))
    for place in (0, 7):
        changed = {key: w.clone() for key, w in same.params["model"].items()}
        changed[name].view(-1)[place] += 1  # all values of a small tensor are looked at
        assert find_revision(
            evolve(same, weights=lambda mixtures, changed=changed: changed)
        ) != find_revision(same)
    adapted = evolve(same, default=(("lung", 1.0),))
    assert find_revision(adapted) != find_revision(same)
