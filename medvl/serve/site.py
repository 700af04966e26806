"""What all routes share: the backend and its counters, and how answers of the model are told and counted."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from attrs import frozen
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from medvl.serve import extract, interface, responses
from medvl.serve.backend import Backend
from medvl.serve.forms import until_gone
from medvl.serve.http import failure, seen
from medvl.serve.interface import End, Piece, Refused
from medvl.serve.metrics import Metrics
from medvl.serve.settings import ServeConfig


@frozen(kw_only=True, eq=False)
class Site:
    """What the routes share."""

    backend: Backend
    metrics: Metrics

    @property
    def cfg(self) -> ServeConfig:
        return self.backend.cfg


def count_end(site: Site, end: End) -> None:
    seen().count(prompt_tokens=end.prompt_tokens, answer_tokens=end.answer_tokens)
    site.metrics.add_answer(end)


def seconds_of(seconds: Mapping[str, float], ends: Sequence[End]) -> dict[str, float]:
    waits = {
        "queued": max(end.queued_s for end in ends),
        "first_token": max(end.first_token_s for end in ends),
    }
    return {name: round(s, 4) for name, s in {**seconds, **waits}.items()}


def usage_of(ends: Sequence[End]) -> responses.Usage:
    prompt, answer = sum(end.prompt_tokens for end in ends), sum(end.answer_tokens for end in ends)
    return responses.Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


def finish_reason(end: End) -> str:
    """As OpenAI calls it."""
    return "length" if end.reason == "length" else "stop"


async def streamed(
    request: Request,
    site: Site,
    asked: interface.Request,
    of_piece: Callable[[str], Any],
    of_end: Callable[[End], Sequence[Any]],
) -> StreamingResponse:
    """Pieces as server-sent events. What is refused before the first piece is refused by its status."""
    stream: Any = site.backend.language_engine().stream(asked)
    first = await until_gone(request, anext(stream))
    about = seen()

    async def events() -> AsyncIterator[bytes]:
        async with aclosing(stream):
            try:
                yield _event(of_piece(first.text)) if isinstance(first, Piece) else b""
                last = first if isinstance(first, End) else None
                async for event in stream:
                    if isinstance(event, Piece):
                        yield _event(of_piece(event.text))
                    else:
                        last = event
                assert last is not None
                site.metrics.add_answer(last)
                about.count(prompt_tokens=last.prompt_tokens, answer_tokens=last.answer_tokens)
                for item in of_end(last):
                    yield _event(item)
            except Refused as e:
                about.count(cut=1)
                yield _event(failure(e, about.id))
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _event(content: Any) -> bytes:
    if isinstance(content, BaseModel):
        text = content.model_dump_json()
    else:
        text = json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def answer_head(end: End) -> dict[str, Any]:
    """What every answer of a language model says of itself."""
    adapters = [responses.AdapterWeight(name=name, weight=weight) for name, weight in end.adapters]
    return {"id": seen().id, "model": end.model, "revision": end.revision, "adapters": adapters}


async def answer_whole(request: Request, site: Site, asked: interface.Request) -> tuple[str, End]:
    """The whole text of an answer, and how it ended; it is not finished for a client that goes."""
    text, end = await until_gone(request, extract.answer(site.backend, asked))
    count_end(site, end)
    return text, end


def text_answer(text: str, end: End) -> responses.Analysed:
    """A text that the model has answered."""
    return responses.Analysed(
        **answer_head(end),
        text=text,
        finish_reason=finish_reason(end),
        usage=usage_of([end]),
        seconds=seconds_of({"total": seen().elapsed}, [end]),
    )


def png_address(png: bytes) -> str:
    """A picture as a data: address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
