"""The engine over another server, against a small server that answers as it is told."""

import asyncio
import base64
import io
import json
import logging
import socket
import threading
import time
from contextlib import aclosing

import numpy as np
import pytest
from PIL import Image

from medvl.serve.interface import End, Piece, Refused, Request
from medvl.serve.remote import openai_messages, remote_engine
from tests import tiny

uvicorn = pytest.importorskip("uvicorn")
starlette = pytest.importorskip("starlette")

from starlette.applications import Starlette  # noqa: E402
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

SECRET = "Jane Q Planted"
PROMPT = ({"role": "system", "content": "Be short."}, {"role": "user", "content": f"Who is {SECRET}?"})


class Server:
    """Answers each request with the next of `answers`, functions of the request; the last one stays."""

    def __init__(self):
        self.answers, self.seen, self.stopped = [], [], threading.Event()
        routes = [
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        config = uvicorn.Config(Starlette(routes=routes), log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.models = {"data": [{"id": "lora", "parent": "qwen"}, {"id": "qwen", "parent": None}]}

    async def _answer(self, request):
        self.seen.append((time.monotonic(), request.headers, json.loads(await request.body())))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await answer(request) if asyncio.iscoroutinefunction(answer) else answer(request)

    async def _models(self, request):
        return JSONResponse(self.models)


@pytest.fixture(scope="module")
def running():
    server = Server()
    while not server.server.started:
        time.sleep(0.01)
    yield server
    server.server.should_exit = True
    server.thread.join()


@pytest.fixture
def server(running):
    running.answers, running.seen = [stream("Yes", ".")], []
    running.stopped.clear()
    running.models = {"data": [{"id": "lora", "parent": "qwen"}, {"id": "qwen", "parent": None}]}
    return running


def chunk(text=None, finish=None, usage=None, **more):
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish} | more
    return {"object": "chat.completion.chunk", "choices": [choice]} | ({"usage": usage} if usage else {})


USAGE = {
    "object": "chat.completion.chunk",
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2},
}


def events(*texts, finish="stop", **more):
    parts = [chunk(""), *map(chunk, texts), chunk(finish=finish, **more), USAGE]
    return [f"data: {json.dumps(part, ensure_ascii=False)}\n\n".encode() for part in parts] + [
        b"data: [DONE]\n\n"
    ]


def stream(*texts, **more):
    return raw(events(*texts, **more))


def raw(chunks, pause=0.0):
    async def send():
        for part in chunks:
            yield part
            await asyncio.sleep(pause)

    return lambda request: StreamingResponse(send(), media_type="text/event-stream")


def status(code, text="", **headers):
    return lambda request: Response(text, code, headers=headers)


def ask(server, *, client=None, take=None, **more):
    """(pieces, end) of a request, or the pieces before it is closed behind `take` of them."""
    options = {"backoff_s": 0.01} | (client or {})

    async def run():
        engine = remote_engine(options.pop("url", server.url), **options)
        pieces, end = [], None
        try:
            request = Request(**({"id": "r", "messages": PROMPT} | more))
            async with aclosing(engine.stream(request)) as items:
                async for item in items:
                    if isinstance(item, End):
                        end = item
                    else:
                        pieces.append(item.text)
                    if len(pieces) == take:
                        break
        finally:
            await engine.close()
        return pieces, end

    return asyncio.run(run())


def test_an_answer_comes_in_pieces_and_with_its_counts(server):
    pieces, end = ask(server, temperature=0.5, top_p=0.9, stop=("\n", "#"), seed=3, max_tokens=9)
    assert pieces == ["Yes", "."]
    assert (end.reason, end.prompt_tokens, end.answer_tokens, end.adapters) == ("end", 7, 2, ())
    assert 0 < end.first_token_s <= end.total_s
    ((_, headers, body),) = server.seen
    assert body == {
        "model": "qwen",  # the first that is no adapter
        "messages": [dict(message) for message in PROMPT],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["\n", "#"],
    }
    assert "authorization" not in headers


def test_reasons_of_the_end(server):
    for finish, more, reason in (
        ("length", {}, "length"),
        ("stop", {"stop_reason": "#"}, "stop"),
        ("stop", {"stop_reason": None}, "end"),
        ("stop", {"stop_reason": 151645}, "end"),  # the id of an end token
    ):
        server.answers = [stream("a", finish=finish, **more)]
        assert ask(server)[1].reason == reason


def test_adapters_and_schemas_go_along(server):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    server.answers = [stream('{"a":', "1}")]
    pieces, end = ask(server, adapter="lora", schema=schema, client={"url": server.url + "/v1/"})
    assert "".join(pieces) == '{"a":1}'
    assert end.adapters == (("lora", 1.0),)
    body = server.seen[-1][2]
    assert body["model"] == "lora"
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema"] == schema
    ask(server, adapter="base", client={"model": "other"})
    assert server.seen[-1][2]["model"] == "other"


@pytest.mark.parametrize("answer", ["Surely: it is 1.", "[1]", '{"a":'])
def test_a_server_that_takes_no_notice_of_the_schema_is_found_out(server, answer):
    server.answers = [stream(answer)]
    with refused(502, "did not keep to the JSON schema"):
        ask(server, schema={"type": "object"})
    server.answers = [stream(answer, finish="length")]  # cut, which the end says
    assert ask(server, schema={"type": "object"})[1].reason == "length"


def test_images_stand_where_their_tags_do():
    pictures = [tiny.drawn((9, 7), seed=seed) for seed in range(3)]
    messages = [
        {"role": "system", "content": "No."},
        {"role": "user", "content": "<image>\nand <image>which?"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Or <image>"},
    ]
    system, first, answer, last = openai_messages(messages, pictures)
    assert (system, answer) == (messages[0], messages[2])
    assert [part.get("text", "PICTURE") for part in first["content"]] == [
        "PICTURE",
        "\nand ",
        "PICTURE",
        "which?",
    ]
    assert [part.get("text", "PICTURE") for part in last["content"]] == ["Or ", "PICTURE"]
    urls = [part["image_url"]["url"] for part in first["content"] + last["content"] if "image_url" in part]
    for url, picture in zip(urls, pictures, strict=True):
        head, _, data = url.partition(",")
        assert head == "data:image/png;base64"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(picture))
    with refused(400, "one <image> for each image, got 3 for 2"):
        openai_messages(messages, pictures[:2])


LONG = "Über 90 µmol/L – ja\u2028nein 🙂 \\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("line_break", [b"\n", b"\r\n", b"\r"])
def test_streams_are_read_however_they_are_cut(server, size, line_break):
    """In the middle of characters and of line breaks; with comments, other fields, and data on several lines."""
    first, *rest = events(*LONG)
    whole = (
        b": hello\n\nevent: x\nid: 1\nretry: 3\n"
        + first.replace(b', "', b',\ndata: "')
        + b":\n\n"
        + b"".join(rest)
    )
    whole = whole.replace(b"data: {", b"data:{", 3).replace(b"\n", line_break)
    server.answers = [raw([whole[i : i + size] for i in range(0, len(whole), size)])]
    pieces, end = ask(server)
    assert pieces == [*LONG]
    assert end.reason == "end"


def test_a_stream_may_end_without_its_mark_and_without_counts(server, caplog):
    """`transformers serve` writes no [DONE]; others no usage."""
    whole = events("a")
    server.answers = [raw([*whole[:-1], whole[-1].rstrip()])]
    assert ask(server)[1].answer_tokens == 2
    server.answers = [raw([*whole[:-2], whole[-2].rstrip()])]
    assert ask(server)[1].answer_tokens == 2
    assert not caplog.records
    server.answers = [raw([*whole[:-2], whole[-1]])]
    assert ask(server)[1].answer_tokens == 0
    assert [record.message for record in caplog.records if record.name.startswith("medvl")] == [
        "remote: the server does not count tokens (stream_options.include_usage)"
    ]


class refused:
    """The error of this status and these words, which says nothing of the request."""

    def __init__(self, status, words, retry_after=0):
        self.want = status, words, retry_after

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        status, words, retry_after = self.want
        assert kind is Refused, f"got {error!r}"
        assert words in str(error)
        assert (error.status, error.retry_after) == (status, retry_after)
        assert SECRET not in str(error)
        assert error.__suppress_context__ or error.__context__ is None
        return True


ECHO = json.dumps({"error": {"message": f"bad: {SECRET}"}})
STATUSES = [
    (400, ECHO, 400, "refused the request, or failed"),
    (422, ECHO, 400, "refused the request, or failed"),
    (400, '{"error": {"code": "context_length_exceeded"}}', 400, "longer than the model's context"),
    (400, "This model's maximum context length is 20", 400, "longer than the model's context"),
    (400, "Unexpected: {'response_format'}", 400, "does not take this JSON schema (response_format)"),
    (422, "Unexpected: {'stream_options'}", 400, "does not know stream_options"),
    (422, "Unexpected: {'top_k'}", 400, "does not know top_k"),
    (401, ECHO, 502, "does not take our key; set MEDVL_ENGINE_KEY"),
    (403, ECHO, 502, "does not take our key; set MEDVL_ENGINE_KEY"),
    (404, ECHO, 400, "no model or adapter of this name"),
    (413, ECHO, 413, "too large"),
    (504, ECHO, 504, "did not answer in time"),
    (500, ECHO, 502, "answered with status 500"),
    (204, "", 502, "answered with status 204"),
]


@pytest.mark.parametrize(("code", "text", "status_", "words"), STATUSES)
def test_refusals_are_told_without_what_they_quote(server, code, text, status_, words, caplog):
    caplog.set_level(logging.DEBUG)
    server.answers = [status(code, text)]
    with refused(status_, words):
        ask(server, client={"key": "sk-secret"})
    assert len(server.seen) == 1  # not asked again
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert SECRET not in logged
    assert "sk-secret" not in logged


def test_redirects_are_not_followed(server):
    server.answers = [lambda request: RedirectResponse("http://192.0.2.1/")]
    with refused(502, "answered with status 307"):
        ask(server)


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_server_is_asked_again(server, code):
    server.answers = [status(code), status(code), stream("a")]
    assert ask(server, client={"backoff_s": 0.1})[0] == ["a"]
    times = [seen[0] for seen in server.seen]
    assert len(times) == 3
    assert times[1] - times[0] >= 0.1
    assert times[2] - times[1] >= 0.2  # doubled
    server.seen.clear()
    server.answers = [status(code)]
    with refused(code, "too many requests or is not ready", 1):
        ask(server, client={"tries": 3})
    assert len(server.seen) == 3


def test_the_server_says_when_to_ask_again(server):
    server.answers = [status(429, **{"Retry-After": "1"}), stream("a")]
    assert ask(server)[0] == ["a"]
    assert server.seen[1][0] - server.seen[0][0] >= 1
    # What is too long, or longer than the request may take, is the client's to wait for.
    for header, more in (("600", {}), ("2", {"deadline_s": 1.5})):
        server.seen.clear()
        server.answers = [status(503, **{"Retry-After": header})]
        with refused(503, "not ready", int(header)):
            ask(server, **more)
        assert len(server.seen) == 1
    server.answers = [status(429, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), stream("a")]
    assert ask(server)[0] == ["a"]  # dates are not read


def test_a_server_that_is_not_there_is_asked_again(server):
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
    free.close()
    with refused(502, "cannot be reached (ConnectError)", 1):
        ask(server, client={"url": url, "tries": 2, "model": "m"})


def test_nothing_is_asked_again_once_an_answer_has_begun(server):
    async def cut(request):
        async def send():
            yield events("a")[1]
            raise OSError

        return StreamingResponse(send(), media_type="text/event-stream")

    broken = {
        "cut": cut,
        "without end": raw(events("a")[:2]),
        "no JSON": raw([b"data: {oops\n\n"]),
        "no object": raw([b"data: 3\n\n"]),
        "nothing": raw([]),
        "no choice": raw([b'data: {"choices": [null]}\n\n']),
        "no choices": raw([b'data: {"choices": "x"}\n\n']),
        "no text": raw([b'data: {"choices": [{"delta": {"content": 3}}]}\n\n']),
        "no usage": raw([b'data: {"choices": [], "usage": "x"}\n\n']),
        "other reason": stream("a", finish="content_filter"),
    }
    logging.getLogger("uvicorn.error").disabled = True
    try:
        for name, answer in broken.items():
            server.seen.clear()
            server.answers = [answer]
            with refused(502, "ended its answer before it was complete"):
                ask(server)
            assert len(server.seen) == 1, name
    finally:
        logging.getLogger("uvicorn.error").disabled = False


def test_errors_within_a_stream(server):
    first = events("a")[1]
    for error, code, words in (
        ({"message": f"out of memory: {SECRET}", "code": 500}, 502, "refused the request, or failed at it"),
        (f"failed at {SECRET}", 502, "refused the request, or failed at it"),
        ({"message": "grammar is not supported"}, 400, "does not take this JSON schema"),
    ):
        server.answers = [raw([first, f"data: {json.dumps({'error': error})}\n\n".encode()])]
        with refused(code, words):
            ask(server)
    server.answers = [raw([b"data: " + b"x" * 2**19] * 5)]
    with refused(502, "sends what is no answer"):
        ask(server)


def endless(server):
    async def answer(request):
        async def send():
            try:
                while True:
                    yield events("a")[1]
                    await asyncio.sleep(0.02)
            finally:
                server.stopped.set()

        return StreamingResponse(send(), media_type="text/event-stream")

    return answer


def test_closing_the_iterator_stops_the_server(server):
    server.answers = [endless(server)]
    assert ask(server, take=3) == (["a"] * 3, None)
    assert server.stopped.wait(10)


def test_cancelling_stops_the_server(server):
    server.answers = [endless(server)]

    async def run():
        engine = remote_engine(server.url)

        async def read():
            async for _ in engine.stream(Request(id="r", messages=PROMPT)):
                begun.set()

        begun = asyncio.Event()
        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.stopped.wait, 10)
        await engine.close()

    asyncio.run(run())


def test_deadlines(server):
    server.answers = [endless(server)]
    with refused(504, "did not end its answer in time"):
        ask(server, deadline_s=0.3)
    assert server.stopped.wait(10)

    async def silent(request):
        await asyncio.sleep(1)
        return Response()

    server.answers = [silent]
    with refused(504, "did not answer in time"):
        ask(server, deadline_s=0.2)
    with refused(504, "did not answer in time"):
        ask(server, client={"silence_s": 0.2, "model": "m"})
    assert len(server.seen) == 3

    server.answers = [raw(events("a")[:2], pause=1)]
    with refused(504, "did not end its answer in time"):
        ask(server, client={"silence_s": 0.2, "model": "m"})


def test_time_that_the_caller_takes_is_its_own(server):
    """A deadline that passes between two pieces does not cancel the caller's work."""

    async def run():
        engine = remote_engine(server.url)
        with refused(504, "in time"):
            async with aclosing(engine.stream(Request(id="r", messages=PROMPT, deadline_s=0.3))) as items:
                await anext(items)
                await asyncio.sleep(0.5)
                await anext(items)
                await anext(items)
        await engine.close()

    server.answers = [raw(events("a", "b"), pause=0.2)]
    asyncio.run(run())


def test_mixtures_and_choices_are_not_for_a_remote_server(server):
    for adapter, words in (
        ({"lora": 1.0}, "one adapter by name, and no mixture"),
        ("auto", "does not choose"),
    ):
        with refused(400, words):
            ask(server, adapter=adapter)
    assert not server.seen


def test_the_key_goes_along_and_the_environments_proxy_is_not_used(server, monkeypatch):
    monkeypatch.setenv("MEDVL_ENGINE_KEY", "from-environment")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(server)[0] == ["Yes", "."]
    ask(server, client={"key": "given"})
    keys = [headers["authorization"] for _, headers, _ in server.seen]
    assert keys == ["Bearer from-environment", "Bearer given"]
    assert "given" not in repr(remote_engine(server.url, key="given"))


def test_models_of_the_server(server):
    async def run():
        engine = remote_engine(server.url)
        assert await engine.models() == ["qwen", "lora"]
        for wrong in ({}, {"data": [{}]}, [], {"data": 3}):
            server.models = wrong
            with refused(502, "does not list its models"):
                await engine.models()
        await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "url", ["vllm:8000", "ftp://x", "http://", "http://user:pass@host", "http://host?key=1"]
)
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(ValueError, match="url must be as http://host:8000") as error:
        remote_engine(url)
    assert "pass" not in str(error.value)


def test_many_at_once_keep_apart(server):
    async def own(request):
        content = server.seen[-1][2]["messages"][0]["content"]
        return raw(events(*content), pause=0.01)(request)

    server.answers = [own]

    async def run():
        engine = remote_engine(server.url, model="m")

        async def text(number):
            request = Request(id=str(number), messages=({"role": "user", "content": f"number {number}"},))
            return "".join([item.text async for item in engine.stream(request) if isinstance(item, Piece)])

        answers = await asyncio.gather(*map(text, range(40)))
        assert answers == [f"number {number}" for number in range(40)]
        await engine.close()

    asyncio.run(run())
