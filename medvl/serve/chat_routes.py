"""/v1: what of OpenAI's API its clients use unchanged: models, and conversations with pictures, streams and schemas."""

import base64
import binascii
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from medvl.serve import extract, interface
from medvl.serve.extract import Wish
from medvl.serve.forms import read_json, until_gone
from medvl.serve.http import seen
from medvl.serve.interface import End, Refused
from medvl.serve.responses import DISCLAIMER, ChatBody, ImagePart, Text
from medvl.serve.site import Site, answer_whole, finish_reason, streamed, usage_of


def add_routes(app: FastAPI, site: Site) -> None:
    """Add them to a service."""

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "medvl"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What `model` may be."""
        names = await site.backend.language_engine().models()
        return {"object": "list", "data": [described(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in await site.backend.language_engine().models():
            raise Refused(404, "there is no model of this name; GET /v1/models lists them")
        return described(name)

    body_schema = {
        "application/json": {
            "schema": ChatBody.model_json_schema(ref_template="#/components/schemas/{model}")
        }
    }

    @app.post(
        "/v1/chat/completions", openapi_extra={"requestBody": {"required": True, "content": body_schema}}
    )
    async def chat_completions(request: Request) -> Any:
        """A conversation, with images as data: addresses, as OpenAI's clients send it."""
        body = await read_json(request, ChatBody)
        asked = await until_gone(request, _chat_request(site, body))
        created = int(time.time())
        head = {"id": f"chatcmpl-{asked.id}", "created": created, "model": body.model or site.backend.model}
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await _chat_stream(request, site, asked, head, with_usage)
        text, end = await answer_whole(request, site, asked)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(end), "logprobs": None}
        about = {"object": "chat.completion", "choices": [choice], "usage": usage_of([end]).model_dump()}
        ours = {"revision": end.revision, "adapters": dict(end.adapters), "disclaimer": DISCLAIMER}
        return {**head, "model": body.model or end.model, **about, **ours}


async def _chat_stream(
    request: Request, site: Site, asked: interface.Request, head: Mapping[str, Any], with_usage: bool
) -> StreamingResponse:
    chunk = {**head, "object": "chat.completion.chunk"}

    def delta(content: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": content, "finish_reason": reason, "logprobs": None}
        return {**chunk, "choices": [choice]}

    first = True

    def of_piece(text: str) -> dict[str, Any]:
        nonlocal first
        role = {"role": "assistant"} if first else {}
        first = False
        return delta({**role, "content": text})

    def of_end(end: End) -> list[Any]:
        last = [delta({}, finish_reason(end))]
        if with_usage:
            last.append({**chunk, "choices": [], "usage": usage_of([end]).model_dump()})
        return last

    return await streamed(request, site, asked, of_piece, of_end)


async def _chat_request(site: Site, body: ChatBody) -> interface.Request:
    """Raises:
    Refused: what is not supported, or cannot be.
    """
    cfg = site.cfg
    if names := body.unsupported():
        raise Refused(400, f"{', '.join(names)}: not supported")
    most = body.max_completion_tokens or body.max_tokens or 0
    if most > cfg.max_tokens:
        raise Refused(422, f"max_tokens must be at most {cfg.max_tokens}")
    adapter: Any = body.adapter or ""
    if not adapter and body.model not in ("", site.backend.model):
        adapter = body.model
    messages, contents = [], list[bytes]()
    for message in body.messages:
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": _chat_text(message.content, contents)})
    images: list[Any] = []
    if contents:
        _, images = await extract.open_files(
            site.backend, seen().id, contents, Wish(deadline_s=cfg.deadline_s)
        )
        if len(images) != len(contents):
            raise Refused(
                400, "image_url: a picture must have one page; send the pages of a document one by one"
            )
        seen().count(pages=len(images), pixels=sum(image.width * image.height for image in images))
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return interface.Request(
        id=seen().id,
        messages=tuple(messages),
        images=tuple(images),
        adapter=adapter,
        schema=_chat_schema(body),
        max_tokens=most,
        temperature=body.temperature or 0.0,
        # At temperature 0 these choose nothing, and clients send them all the same.
        top_k=body.top_k or 0 if body.temperature else 0,
        top_p=body.top_p or 1.0 if body.temperature else 1.0,
        stop=stop,
        seed=body.seed or 0,
        deadline_s=cfg.deadline_s,
    )


def _chat_text(content: str | list[Text | ImagePart], contents: list[bytes]) -> str:
    """The text of a message with a tag for each image, whose bytes are added to `contents`."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, Text):
            parts.append(part.text)
        else:
            contents.append(_data_bytes(part.image_url.url))
            parts.append("<image>")
    return "\n".join(parts)


def _data_bytes(url: str) -> bytes:
    """The bytes of a data: address.

    Raises:
        Refused: any other address, which would let a client ask the service to fetch something.
    """
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise Refused(400, "image_url: must be data:image/...;base64,...; nothing is fetched from elsewhere")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, "image_url: is not base64") from None


def _chat_schema(body: ChatBody) -> Mapping[str, Any] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or not wanted.json_schema.schema_:
        raise Refused(422, "response_format: json_schema needs a schema")
    return wanted.json_schema.schema_
