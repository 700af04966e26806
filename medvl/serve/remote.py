"""An engine that is another server: any that speaks OpenAI's API, such as vLLM."""

import asyncio
import base64
import io
import json
import logging
import math
import os
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import httpx
from attrs import define
from PIL import Image

from medvl.serve.interface import End, Piece, Reason, Refused, Request

T = TypeVar("T")
KEY_VARIABLE = "MEDVL_ENGINE_KEY"  # of the environment, with the server's API key
_LONGEST_EVENT = 2**20  # bytes of one event of a stream
_LONGEST_WAIT_S = 30.0  # before another try; where a server asks for more, the client is told so
_log = logging.getLogger(__name__)


@define
class RemoteEngine:
    """Answers of another server, made by `remote_engine`."""

    _client: httpx.AsyncClient
    _model: str  # "" = the first that the server lists
    _tries: int
    _backoff_s: float
    _most: int  # requests at a time
    _pending: int = 0
    _has_warned: bool = (
        False  # that tokens are not counted; once, as it is of the server and not of an answer
    )

    async def stream(self, request: Request) -> AsyncGenerator[Piece | End, None]:
        """As `Engine.stream`. Closing the iterator closes the connection, at which the server stops too."""
        if self._pending >= self._most:
            raise Refused(429, f"{self._most} requests are being answered or wait", 2)
        self._pending += 1
        try:
            async with aclosing(self._stream(request)) as events:
                async for event in events:
                    yield event
        finally:
            self._pending -= 1

    async def _stream(self, request: Request) -> AsyncGenerator[Piece | End, None]:
        start = time.monotonic()
        deadline = start + (request.deadline_s or math.inf)
        model = await self._model_of(request, deadline)
        # In a thread: to compress large pages takes long.
        body = await asyncio.to_thread(_request_body, request, model)
        response = await self._send("POST", "/v1/chat/completions", deadline, body)
        text, first_s = "", 0.0
        finish, usage = dict[str, Any](), dict[str, Any]()
        try:
            async with aclosing(_events(response, deadline)) as events:
                async for event in events:
                    usage = _part(event, "usage", dict) or usage
                    for choice in _part(event, "choices", list):
                        finish = choice if _part(choice, "finish_reason", str) else finish
                        if piece := _part(_part(choice, "delta", dict), "content", str):
                            first_s = first_s or time.monotonic() - start
                            # Half a UTF-16 pair, which JSON lets through, cannot be passed on.
                            piece = piece.encode("utf-8", "replace").decode()
                            text += piece
                            yield Piece(text=piece)
        finally:
            await response.aclose()
        reason = _reason(finish)
        if request.schema is not None and reason != "length":
            _check_json(text, request.schema)
        if not usage and not self._has_warned:
            self._has_warned = True
            _log.warning("remote: the server does not count tokens (stream_options.include_usage)")
        is_named = request.adapter not in ("", "base")
        yield End(
            reason=reason,
            prompt_tokens=_part(usage, "prompt_tokens", int),
            answer_tokens=_part(usage, "completion_tokens", int),
            model=model,
            adapters=((model, 1.0),) if is_named else (),
            first_token_s=first_s,
            total_s=time.monotonic() - start,
        )

    async def models(self) -> list[str]:
        """Names of the server's models and adapters, the models first."""
        return await self._list_models(time.monotonic() + _LONGEST_WAIT_S)

    async def close(self) -> None:
        await self._client.aclose()

    async def _list_models(self, deadline: float) -> list[str]:
        response = await self._send("GET", "/v1/models", deadline)
        try:
            async with asyncio.timeout(_seconds_to(deadline)):
                models = json.loads(await response.aread())["data"]
            # vLLM lists an adapter with the name of its model.
            return [model["id"] for model in sorted(models, key=lambda model: bool(model.get("parent")))]
        except (ValueError, LookupError, TypeError, AttributeError, httpx.HTTPError, TimeoutError):
            raise Refused(502, "the model server does not list its models as OpenAI's API does") from None
        finally:
            await response.aclose()

    async def _model_of(self, request: Request, deadline: float) -> str:
        if not isinstance(request.adapter, str):
            raise Refused(400, "a remote server takes one adapter by name, and no mixture")
        if request.adapter == "auto":
            raise Refused(400, "a remote server does not choose adapters; name one")
        if request.adapter not in ("", "base"):
            return request.adapter
        if not self._model:
            self._model = (
                await self._list_models(min(deadline, time.monotonic() + _LONGEST_WAIT_S)) or [""]
            )[0]
        return self._model

    async def _send(self, method: str, path: str, deadline: float, body: bytes = b"") -> httpx.Response:
        """The response to a request, unread. A server that is busy or not there is asked again."""
        headers = {"Content-Type": "application/json"} if body else {}
        for attempt in range(self._tries):
            wait = self._backoff_s * 2**attempt
            try:
                async with asyncio.timeout(_seconds_to(deadline)):
                    request = self._client.build_request(method, path, content=body, headers=headers)
                    response = await self._client.send(request, stream=True)
                    if response.status_code == 200:
                        return response
                    refused = await _read_refusal(response)
                can_repeat = refused.status in (429, 503)
                wait = refused.retry_after or wait
            except (httpx.ReadTimeout, httpx.WriteTimeout, TimeoutError):
                raise Refused(504, "the model server did not answer in time") from None
            except httpx.TransportError as e:
                refused = Refused(502, f"the model server cannot be reached ({type(e).__name__})")
                can_repeat = True
            last = attempt + 1 == self._tries
            if not can_repeat or last or wait > min(_LONGEST_WAIT_S, deadline - time.monotonic()):
                refused.retry_after = math.ceil(wait) if can_repeat else 0
                raise refused
            await asyncio.sleep(wait)
        raise AssertionError


def remote_engine(
    url: str,
    *,
    model: str = "",
    key: str = "",
    most: int = 64,
    tries: int = 4,
    backoff_s: float = 0.5,
    silence_s: float = 300.0,
) -> RemoteEngine:
    """An engine over the API of another server. It follows no redirects, and no proxy of the environment.

    A server that cannot be reached, or answers 429 or 503, is asked again, after its Retry-After or a wait that
    doubles; never once it has begun to answer. A schema goes along as response_format; since some servers ignore
    that, an answer that is not JSON of the schema's type is refused.

    Args:
        url: such as http://vllm:8000, with or without /v1.
        model: where a request names no adapter; "" = the first that the server lists.
        key: API key; "" = that in the environment variable MEDVL_ENGINE_KEY, if there is one.
        most: requests at a time; others are refused (429).
        silence_s: seconds without a byte after which a request is given up.
    Raises:
        ValueError: not a URL of http or https, or one with a user name or a query; no try.
    """
    parts = httpx.URL(url)
    # httpx logs URLs: nothing secret may stand in them.
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query or tries < 1:
        raise ValueError(
            "remote_engine: url must be as http://host:8000, without user and query (a key goes into "
            f"{KEY_VARIABLE}), and tries >= 1"
        )
    key = key or os.environ.get(KEY_VARIABLE, "")
    client = httpx.AsyncClient(
        base_url=re.sub(r"/+(v1/*)?$", "", url),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(silence_s, connect=min(silence_s, 10)),
        # How many requests run at once is for the caller to say.
        limits=httpx.Limits(max_connections=None),
        follow_redirects=False,
        trust_env=False,
    )
    return RemoteEngine(client, model, tries, backoff_s, most)


def openai_messages(
    messages: Sequence[Mapping[str, str]], images: Sequence[Image.Image]
) -> list[dict[str, Any]]:
    """Messages as OpenAI's API has them: each <image> is a part with the next image, PNG in a data: URL.

    Raises:
        Refused: 400, tags and images are not equally many.
    """
    tags = sum(message["content"].count("<image>") for message in messages)
    if tags != len(images):
        raise Refused(400, f"there must be one <image> for each image, got {tags} for {len(images)}")
    rest = iter(images)
    written = list[dict[str, Any]]()
    for message in messages:
        content: Any = message["content"]
        if "<image>" in content:
            parts = list[dict[str, Any]]()
            for text in re.split("(<image>)", content):
                if text == "<image>":
                    parts.append({"type": "image_url", "image_url": {"url": _data_url(next(rest))}})
                elif text:
                    parts.append({"type": "text", "text": text})
            content = parts
        written.append({"role": message["role"], "content": content})
    return written


def _data_url(image: Image.Image) -> str:
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def _request_body(request: Request, model: str) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "messages": openai_messages(request.messages, request.images),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": request.temperature,
        "seed": request.seed,
    }
    if request.max_tokens:
        body["max_tokens"] = request.max_tokens
    if request.top_p < 1:
        body["top_p"] = request.top_p
    if request.top_k:
        body["top_k"] = request.top_k  # not of OpenAI; vLLM and SGLang know it
    if request.stop:
        body["stop"] = request.stop
    if request.schema is not None:
        schema = {"name": "answer", "schema": request.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps(body).encode()


def _seconds_to(deadline: float) -> float | None:
    return None if math.isinf(deadline) else deadline - time.monotonic()


async def _events(response: httpx.Response, deadline: float) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream, parsed; the last one needs no blank line behind it.

    Source: WHATWG HTML, 9.2.6 "Interpreting an event stream".
    """
    rest, data = b"", list[bytes]()
    chunks = response.aiter_bytes()
    is_open = True
    while is_open:
        try:
            # Only around the wait: the time that the caller takes for an event is its own.
            async with asyncio.timeout(_seconds_to(deadline)):
                rest += await anext(chunks)
        except StopAsyncIteration:
            is_open = False
            rest += b"\n\n"
        except (httpx.TimeoutException, TimeoutError):
            raise Refused(504, "the model server did not end its answer in time") from None
        except httpx.HTTPError:
            raise Refused(502, _BROKEN) from None
        # A carriage return at the end may be half of a line break.
        *lines, rest = re.split(rb"\r\n|\n|\r(?!\Z)", rest)
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:])
            elif not line and data:
                event, data = b"\n".join(data).strip(), []
                if event == b"[DONE]":
                    return
                yield _parse_event(event)
        if len(rest) + sum(map(len, data)) > _LONGEST_EVENT:
            raise Refused(502, "the model server sends what is no answer")


_BROKEN = "the model server ended its answer before it was complete"


def _parse_event(text: bytes) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise Refused(502, _BROKEN)
    if event.get("error"):
        raise _explain_error(text.decode(errors="replace"), 502)
    return event


def _part(event: Any, name: str, kind: type[T]) -> T:
    """A part of an event, empty where there is none.

    Raises:
        Refused: it is of another kind.
    """
    value = event.get(name) if isinstance(event, dict) else ()
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise Refused(502, _BROKEN)
    return value


def _reason(finish: Mapping[str, Any]) -> Reason:
    """How an answer ended, of the last choice of a stream."""
    reason = finish.get("finish_reason")
    if reason == "length":
        return "length"
    if reason == "stop":
        # vLLM says the string that stopped it; others do not tell it from an end token.
        return "stop" if isinstance(finish.get("stop_reason"), str) else "end"
    raise Refused(502, _BROKEN)


def _check_json(text: str, schema: Mapping[str, Any]) -> None:
    """Raise where an answer shows that the server took no notice of the schema."""
    try:
        document = json.loads(text)
        is_kept = schema.get("type") != "object" or isinstance(document, dict)
    except (ValueError, RecursionError):
        is_kept = False
    if not is_kept:
        raise Refused(
            502, "the model server did not keep to the JSON schema; use one that knows response_format"
        )


async def _read_refusal(response: httpx.Response) -> Refused:
    """What a response that is no answer means to the client."""
    status = response.status_code
    try:
        text = (await anext(response.aiter_bytes(), b""))[:10_000].decode(errors="replace")
    finally:
        await response.aclose()
    if status in (400, 422):
        return _explain_error(text, 400)
    if status in (429, 503):
        wait = response.headers.get("retry-after", "")
        seconds = min(int(wait), 3600) if re.fullmatch("[0-9]{1,9}", wait) else 0
        return Refused(status, "the model server has too many requests or is not ready", seconds)
    status, message = _STATUSES.get(status, (502, f"the model server answered with status {status}"))
    return Refused(status, message)


_STATUSES = {
    401: (502, f"the model server does not take our key; set {KEY_VARIABLE}"),
    403: (502, f"the model server does not take our key; set {KEY_VARIABLE}"),
    404: (400, "the model server has no model or adapter of this name"),
    408: (504, "the model server did not answer in time"),
    413: (413, "the model server finds the request too large"),
    504: (504, "the model server did not answer in time"),
}
# Words in the errors of servers, and what they mean. Nothing of an error is passed on: it may quote the request.
_ERRORS = {
    "context.?length|max_model_len": "the prompt and max_tokens are longer than the model's context",
    "response_format|json_schema|structured|guided|grammar": (
        "the model server does not take this JSON schema (response_format); make it simpler, or use a server with "
        "structured outputs"
    ),
    "stream_options": "the model server does not know stream_options; use a newer one",
    "top_k": "the model server does not know top_k; leave it out",
}


def _explain_error(text: str, status: int) -> Refused:
    for words, meaning in _ERRORS.items():
        if re.search(words, text, re.IGNORECASE):
            return Refused(400, meaning)
    return Refused(status, "the model server refused the request, or failed at it")
