"""Requests as they are read: forms and JSON in memory, every fault told by its name and never by its value."""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from attrs import frozen
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from medvl.documents.fields_schema import read_schema
from medvl.language.bounded_schema import error_without_names
from medvl.serve.extract import Wish
from medvl.serve.interface import Refused
from medvl.serve.settings import Limits, ServeConfig

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it quotes bytes of broken forms
_FIELD_BYTES = 2**20  # of a part of a form that is no file


@frozen(kw_only=True)
class Form:
    """A body of multipart/form-data, in memory."""

    files: list[bytes]
    texts: dict[str, str]

    def flag(self, name: str, default: bool) -> bool:
        """Raises:
        Refused: another word.
        """
        text = self.texts.get(name, "").lower()
        if text not in ("", "true", "false", "1", "0"):
            raise Refused(422, f"{name} must be true or false")
        return text in ("true", "1") if text else default

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Raises:
        Refused: no number, or one out of bounds.
        """
        try:
            number = float(self.texts.get(name) or default)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise Refused(422, f"{name} must be a number from {low:g} to {high:g}")
        return number

    def max_tokens(self, most: int) -> int:
        """Of an answer; 0 where the form says nothing.

        Raises:
            Refused: no number, or one out of bounds.
        """
        return int(self.number("max_tokens", 1, 1, most)) if self.texts.get("max_tokens") else 0

    def numbers(self, name: str) -> tuple[float, ...]:
        """Finite numbers with commas between them; () where there are none.

        Raises:
            Refused: something else.
        """
        try:
            numbers = tuple(float(part) for part in self.texts.get(name, "").split(",") if part.strip())
        except ValueError:
            numbers = (math.nan,)
        if not all(map(math.isfinite, numbers)):
            raise Refused(422, f"{name} must be numbers with commas between them")
        return numbers


async def read_form(request: Request, limits: Limits, names: Sequence[str]) -> Form:
    """The files (in parts named "file") and texts of a form.

    Args:
        names: of texts that it may have.
    Raises:
        Refused: 415 another type of body; 400 a broken one; 413 too long; 422 a part that is not known.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise Refused(415, "a body must be multipart/form-data with the document in parts named 'file'")
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=limits.files + 1,
        max_fields=32,
        max_part_size=_FIELD_BYTES,
    )
    parser.spool_max_size = 2**62  # never a file on disk
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError) as e:  # UnicodeError: of a charset that it names
        status = 413 if "maximum size" in str(e) else 400
        raise Refused(status, "the form cannot be read: it is broken or has too many parts") from None
    files, texts = list[bytes](), dict[str, str]()
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("file", "files"):
                    raise Refused(422, "a file must be in a part named 'file'")
                files.append(await value.read())
            elif name in names:
                texts[name] = value
            else:
                raise Refused(422, f"a form may have the parts file, {', '.join(names)}; it has another")
    finally:
        await form.close()
    return Form(files=files, texts=texts)


# Parts of a form of any question about pages; of those that ask for fields there are evidence, strict and pictures, too.
WISHES = ("schema", "prompt", "adapter", "max_tokens", "pages", "window", "deadline_s")


def read_wish(form: Form, cfg: ServeConfig) -> Wish:
    """What a form asks for.

    Raises:
        Refused: a value that cannot be.
    """
    schema, window = None, None
    if text := form.texts.get("schema", "").strip():
        try:
            schema = read_schema(text)
        except ValueError as e:
            raise Refused(422, _without_names(e, text)) from None
    if greys := form.numbers("window"):
        if len(greys) != 2 or not greys[0] < greys[1]:
            raise Refused(422, "window must be black,white with black < white")
        window = greys[0], greys[1]
    pages = form.numbers("pages")
    if any(page < 0 or page != int(page) for page in pages):
        raise Refused(422, "pages must be whole numbers from 0")
    return Wish(
        prompt=form.texts.get("prompt", "").strip(),
        schema=schema,
        adapter=read_adapter(form.texts.get("adapter", "")),
        max_tokens=form.max_tokens(cfg.max_tokens),
        pages=tuple(map(int, pages)),
        window=window,
        evidence=form.flag("evidence", True),
        strict=form.flag("strict", False),
        pictures=form.flag("pictures", False),
        deadline_s=form.number("deadline_s", cfg.deadline_s, 0.1, cfg.deadline_s),
    )


def _without_names(error: ValueError, text: str) -> str:
    """The message of an error in a schema without what the schema names."""
    try:
        return error_without_names(error, json.loads(text))
    except (ValueError, RecursionError):
        return "schema: it is not JSON"


async def read_json(request: Request, kind: type[Body]) -> Body:
    """The body as a pydantic model.

    Raises:
        Refused: 415, 400 for what is no JSON, 422 for fields; the message names them and holds nothing of their values.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Refused(415, "a body must be application/json")
    body = b"".join([part async for part in request.stream()])
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        faults = e.errors(include_url=False, include_context=False, include_input=False)
        if any(fault["type"] == "json_invalid" for fault in faults):
            raise Refused(400, "the body is not JSON") from None
        raise Refused(422, "; ".join(map(_plain_fault, faults[:5]))) from None


def _plain_fault(fault: Mapping[str, Any]) -> str:
    parts = [str(part) for part in fault["loc"]]
    place = ".".join(part for part in parts if part.isdigit() or (part.isascii() and part.isidentifier()))
    message = {"missing": "is missing", "extra_forbidden": "is not known"}.get(fault["type"], fault["msg"])
    return f"{place or 'body'}: {message}"


def read_adapter(text: str) -> str | dict[str, float]:
    """A name, or a mixture as {"name": weight}.

    Raises:
        Refused: JSON that is no mixture.
    """
    if not text.startswith("{"):
        return text
    try:
        mixture = json.loads(text)
        return {str(name): float(weight) for name, weight in mixture.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise Refused(
            422, 'adapter must be a name or a mixture such as {"liver": 0.5, "lung": 0.5}'
        ) from None


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of work that ends where the client goes. The body must have been read."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client has gone")
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def form_schema(title: str, names: Sequence[str]) -> dict[str, Any]:
    """The form of a route for the API's description; it is read by `read_form`."""
    properties: dict[str, Any] = {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}}
    properties |= {name: {"type": "string"} for name in names}
    schema = {"title": title, "type": "object", "properties": properties, "required": ["file"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
