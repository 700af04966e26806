"""A document becomes fields: its pages are opened, asked about and read at the same time, and then compared."""

import asyncio
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from attrs import define, evolve, field, frozen

from medvl.documents.evidence import Contradiction, Evidence
from medvl.documents.fields import Fields
from medvl.documents.fields_schema import fields_schema
from medvl.serve.backend import Backend
from medvl.serve.interface import End, Piece, Refused, Request
from medvl.serve.worker import within

# What models are trained to answer with JSON (`phantoms/medical_words.toml`, "prompts").
_DEEPEST = 64  # levels of JSON that are told
PROMPT = "Extract all fields as JSON."


@frozen(kw_only=True)
class Wish:
    """What a client wants of a document."""

    prompt: str = field(default="", repr=False)  # "" = `PROMPT`
    schema: Mapping[str, Any] | None = field(
        default=None, repr=False
    )  # of the client's own; None = our fields
    adapter: str | Mapping[str, float] = ""
    max_tokens: int = 0  # 0 = as the model is used to
    pages: tuple[int, ...] = ()  # of a file, from 0; () = all
    window: tuple[float, float] | None = None  # (black, white) of greys of more than 8 bits
    evidence: bool = True
    strict: bool = False  # leave out what no page shows
    pictures: bool = False  # of the pages, as they were opened
    deadline_s: float = 120.0


@define
class Page:
    """One page with what the model said of it."""

    file: int  # from 0
    number: int  # in its file, from 0
    width: int
    height: int
    answer: str = field(default="", repr=False)
    end: End | None = None
    tree: Any = field(default=None, repr=False)  # of an own schema: the answer as JSON
    picture: bytes = field(default=b"", repr=False)  # a PNG, where it was wanted


@frozen(kw_only=True)
class Extraction:
    """The fields of a document with their evidence."""

    pages: tuple[Page, ...]
    fields: Fields | None  # None with an own schema
    evidence: Evidence | None  # None where it was not wanted, or with an own schema
    page_evidence: tuple[Evidence, ...] = ()  # with an own schema, of each page
    warnings: tuple[Contradiction, ...] = ()  # about whole pages
    seconds: dict[str, float] = field(factory=dict)


async def open_files(
    backend: Backend, call: str, contents: Sequence[bytes], wish: Wish
) -> tuple[list[Page], list[Any]]:
    """The pages of files, and their pictures.

    Raises:
        Refused: as `uploads.open_uploads`.
    """
    async with within(wish.deadline_s):
        opened = await backend.open_files(call, contents, chosen=wish.pages, window=wish.window)
    pages, images = [], []
    for file, of_file in enumerate(opened):
        for place, image in enumerate(of_file):
            number = wish.pages[place] if wish.pages else place
            pages.append(Page(file=file, number=number, width=image.width, height=image.height))
            images.append(image)
    return pages, images


async def answer(backend: Backend, request: Request) -> tuple[str, End]:
    """The whole answer to a request, and how it ended."""
    text, end = "", None
    stream: Any = backend.language_engine().stream(request)
    async with aclosing(stream) as events:
        async for event in events:
            if isinstance(event, Piece):
                text += event.text
            else:
                end = event
    assert end is not None
    return _without_halves(text), end


async def extract(backend: Backend, call: str, contents: Sequence[bytes], wish: Wish) -> Extraction:
    """The fields of a document, which the files of a request are together.

    Args:
        call: id of the request.
    Raises:
        Refused: a file or a wish that cannot be; what engine and readers refuse.
    """
    begun = time.monotonic()
    seconds = dict[str, float]()
    async with within(wish.deadline_s):
        pages, images = await open_files(backend, call, contents, wish)
        seconds["open"] = time.monotonic() - begun
        reading = None
        async with asyncio.TaskGroup() as tasks:  # where one fails, the others are cancelled
            tasks.create_task(_timed(seconds, "answer", _answer_pages(backend, call, pages, images, wish)))
            if wish.evidence and backend.readers:
                reading = tasks.create_task(_timed(seconds, "read", backend.read_pages(call, images)))
            if wish.pictures:
                tasks.create_task(_timed(seconds, "draw", _draw_pages(backend, call, pages, images)))
        words = None if reading is None else reading.result()
        extraction = await _timed(seconds, "check", _check(backend, call, pages, words, wish))
    seconds["total"] = time.monotonic() - begun
    return evolve(extraction, seconds=seconds)


async def _timed(seconds: dict[str, float], name: str, work: Any) -> Any:
    start = time.monotonic()
    result = await work
    seconds[name] = time.monotonic() - start
    return result


async def _answer_pages(
    backend: Backend, call: str, pages: Sequence[Page], images: Sequence[Any], wish: Wish
) -> None:
    """Ask about each page; as many at a time as are answered at a time: one document must not take the whole queue."""
    room = asyncio.Semaphore(min(backend.cfg.rows, backend.cfg.queue))

    async def ask(page: Page, image: Any, number: int) -> None:
        request = Request(
            id=f"{call}/{number}",
            messages=({"role": "user", "content": f"<image>\n{wish.prompt or PROMPT}"},),
            images=(image,),
            adapter=wish.adapter,
            schema=fields_schema() if wish.schema is None else wish.schema,
            max_tokens=wish.max_tokens,
            deadline_s=wish.deadline_s,
        )
        async with room:
            page.answer, page.end = await answer(backend, request)

    async with asyncio.TaskGroup() as tasks:
        for number, (page, image) in enumerate(zip(pages, images, strict=True)):
            tasks.create_task(ask(page, image, number))


async def _draw_pages(backend: Backend, call: str, pages: Sequence[Page], images: Sequence[Any]) -> None:
    for number, (page, image) in enumerate(zip(pages, images, strict=True)):
        page.picture = await backend.opener.call(f"{call}/picture {number}", "picture", image=image)


async def _check(
    backend: Backend, call: str, pages: Sequence[Page], words: list[Any] | None, wish: Wish
) -> Extraction:
    if wish.schema is None:
        arguments = {"answers": [page.answer for page in pages], "strict": wish.strict}
        checked = await _call_checker(backend, call, "check", pages=words, **arguments)
        warnings: tuple[Contradiction, ...] = ()
        if checked is None and words is not None:  # the fields without their evidence
            checked, warnings = (
                await _call_checker(backend, call, "check", pages=None, **arguments),
                (_UNCHECKED,),
            )
        if checked is None:
            raise Refused(400, "the model's answer cannot be read in time")
        return Extraction(
            pages=tuple(pages),
            fields=checked.fields,
            evidence=checked.evidence,
            warnings=(*checked.warnings, *warnings),
        )
    faults = []
    for number, page in enumerate(pages):
        page.tree = _parse(page)
        if page.tree is None and page.end is not None and page.end.reason != "length":
            message = f"the answer for page {number} is no JSON that can be told"
            faults.append(Contradiction(path="", kind="empty", message=message))
    evidence = []
    if words is not None:
        trees = [page.tree for page in pages]
        evidence = await _call_checker(backend, call, "check_json", trees=trees, pages=words)
        if evidence is None:
            evidence, faults = [], [*faults, _UNCHECKED]
    return Extraction(
        pages=tuple(pages),
        fields=None,
        evidence=None,
        page_evidence=tuple(evidence),
        warnings=tuple(faults),
    )


# Of an answer that took too long to compare; its values are "unchecked".
_UNCHECKED = Contradiction(
    path="", kind="unchecked", message="the answer could not be compared with the pages in time"
)


async def _call_checker(backend: Backend, call: str, function: str, **arguments: Any) -> Any:
    """What the checker says; None where that takes too long, which ends its process.

    Calls that waited there are made once more.
    """
    for _ in range(2):
        try:
            return await backend.checker.call(f"{call}/check", function, **arguments)
        except Refused as e:
            if e.status != 502 and not (e.status == 503 and backend.checker.restarts):
                raise
        await backend.checker.wait_ready()
    return None


def _parse(page: Page) -> Any:
    """The JSON of an answer; None where it is none (cut by max_tokens, NaN) or stands too deep to be told."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        tree = json.loads(page.answer, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    level = [tree]
    for _ in range(_DEEPEST):
        level = [part for value in level for part in _parts(value)]
    return None if level else tree


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


# Halves of UTF-16 pairs without the other half: JSON lets their escapes through, and no answer can be written with them.
_HALVES = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def _without_halves(text: str) -> str:
    return _HALVES.sub(r"\\ufffd", text.encode("utf-8", "replace").decode())
