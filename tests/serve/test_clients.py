"""Clients of others: OpenAI's, unchanged, and a service in front of another one."""

import asyncio
import base64
import io
import json

import pytest
from PIL import Image

from medvl.serve import backend as backends
from medvl.serve.interface import Refused, Request
from medvl.serve.remote import remote_engine
from medvl.serve.settings import ServeConfig
from tests.serve import toy_service

openai = pytest.importorskip("openai")

SCHEMA = {
    "type": "object",
    "properties": {
        "drug": {"type": "string", "maxLength": 6},
        "dose": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["drug", "dose"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def service():
    with toy_service.running(max_tokens=300) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=f"{service.address}/v1", api_key="none", max_retries=0)


def picture():
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_openai_models(client):
    assert [model.id for model in client.models.list()] == ["toy", "liver", "lung", "skin"]
    assert client.models.retrieve("lung").id == "lung"
    with pytest.raises(openai.NotFoundError, match="no model of this name"):
        client.models.retrieve("kidney")


def test_openai_nulls_are_as_nothing(client):
    """Clients on top of OpenAI's send null for what they leave open."""
    asked = {"model": "toy", "messages": [{"role": "user", "content": "glucose"}], "max_tokens": 12}
    names = (
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "response_format",
        "n",
        "logprobs",
        "tools",
        "max_completion_tokens",
    )
    nulls = client.chat.completions.create(**asked, **dict.fromkeys(names))
    assert (
        nulls.choices[0].message.content == client.chat.completions.create(**asked).choices[0].message.content
    )


def test_openai_chat_and_stream(client):
    asked = {"model": "toy", "messages": [{"role": "user", "content": "glucose"}], "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    assert whole.usage.completion_tokens == 20
    assert whole.choices[0].finish_reason == "length"
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    other = client.chat.completions.create(**asked | {"model": "liver"})
    assert other.choices[0].message.content != text


def test_openai_image_and_schema(client):
    content = [{"type": "text", "text": "glucose"}, {"type": "image_url", "image_url": {"url": picture()}}]
    shown = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": content}], max_tokens=10
    )
    blind = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "glucose"}], max_tokens=10
    )
    assert shown.usage.prompt_tokens > blind.usage.prompt_tokens
    formed = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "glucose"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "dose", "schema": SCHEMA, "strict": True},
        },
        max_completion_tokens=60,
    )
    assert json.loads(formed.choices[0].message.content).keys() == {"drug", "dose"}


def test_openai_errors(client):
    with pytest.raises(openai.BadRequestError, match="there are liver, lung, skin"):
        client.chat.completions.create(model="kidney", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.UnprocessableEntityError, match="max_tokens must be at most 300"):
        client.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "x"}], max_tokens=500
        )


# A service in front of another ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def front(service):
    """A service whose engine is the first one, over HTTP."""
    with toy_service.running(engine=service.address, max_tokens=300) as running:
        yield running


def test_a_service_in_front_of_another_answers_the_same(service, front):
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (9, 90, 200)).save(file, "PNG")
    for route, data in (
        ("/analyze", {"prompt": "glucose", "max_tokens": "30"}),
        ("/analyze", {"prompt": "glucose", "max_tokens": "30", "adapter": "lung"}),
        ("/extract", {"max_tokens": "60"}),
        ("/extract", {"max_tokens": "60", "schema": json.dumps(SCHEMA)}),
    ):
        answers = []
        for one in (service, front):
            with toy_service.client(one) as client:
                answer = client.post(route, files={"file": file.getvalue()}, data=data)
            assert answer.status_code == 200, answer.text
            content = answer.json()
            assert content["model"] == data.get("adapter", "toy") if one is front else "toy"
            answers.append(
                [content.get("text"), content.get("fields"), content.get("pages"), content["usage"]]
            )
        assert answers[0] == answers[1]


def test_a_mixture_is_refused_in_front(front):
    with toy_service.client(front) as client:
        answer = client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}], "adapter": {"liver": 0.5, "lung": 0.5}},
        )
    assert answer.status_code == 400


def test_what_is_served_is_looked_at_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="give something to serve"):
        backends.make_backend(ServeConfig())
    with pytest.raises(ValueError, match="must be the folder of a run"):
        backends.make_backend(ServeConfig(runs=(str(tmp_path),)))
    for name, system in (
        ("a", "tune"),
        ("b", "document"),
        ("c", "ct_clip"),
        ("d", "ct_clip"),
        ("e", "mylab"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"system": system}))
    runs = {name: str(tmp_path / name) for name in "abcde"}
    with pytest.raises(ValueError, match="a second language model"):
        backends.make_backend(ServeConfig(runs=(runs["a"], runs["b"])))
    with pytest.raises(ValueError, match="a second run of ct_clip"):
        backends.make_backend(ServeConfig(runs=(runs["c"], runs["d"])))
    with pytest.raises(ValueError, match="mylab, which is not served"):
        backends.make_backend(ServeConfig(runs=(runs["e"],)))
    with pytest.raises(ValueError, match="either a model here"):
        ServeConfig(engine="http://x", model="y")
    made = backends.make_backend(ServeConfig(runs=(runs["b"], runs["c"]), readers=2))
    assert [worker.name for worker in made.workers] == [
        "model",
        "opener",
        "checker",
        "reader 0",
        "reader 1",
        "ct",
    ]


def test_an_engine_that_is_gone_is_told():
    async def ask():
        engine = remote_engine("http://127.0.0.1:9", model="x", tries=1)
        request = Request(id="1", messages=({"role": "user", "content": "x"},), max_tokens=5)
        try:
            return [event async for event in engine.stream(request)]
        finally:
            await engine.close()

    with pytest.raises(Refused) as refused:
        asyncio.run(ask())
    assert refused.value.status in (502, 503)


def test_an_engine_that_is_gone_makes_the_service_not_ready():
    with (
        toy_service.running(engine="http://127.0.0.1:9", engine_model="x") as front,
        toy_service.client(front) as client,
    ):
        answer = client.get("/ready")
        assert answer.status_code == 503
        assert "engine" in answer.json()["error"]["message"]


def test_an_engine_elsewhere_takes_so_many_requests(service):
    """What is above `most` is refused, and what has ended makes room."""

    async def ask():
        engine = remote_engine(service.address, model="toy", most=2)
        request = Request(id="1", messages=({"role": "user", "content": "x"},), max_tokens=3)
        streams = [engine.stream(request) for _ in range(3)]
        try:
            begun = [await anext(streams[0]), await anext(streams[1])]
            with pytest.raises(Refused) as refused:
                await anext(streams[2])
            for stream in streams:
                await stream.aclose()
            begun.append(await anext(engine.stream(request)))
            return refused.value.status, len(begun)
        finally:
            await engine.close()

    assert asyncio.run(ask()) == (429, 3)
