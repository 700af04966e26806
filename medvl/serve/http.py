"""What every request goes through: size, key, id, errors, one line of log. Pure ASGI, so that nothing is read ahead.

Logs and errors hold no text, no name and no file name of a request: routes, sizes and numbers only.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from attrs import define, field

from medvl.serve.interface import Refused, place_of
from medvl.serve.responses import Failed, Failure

_log = logging.getLogger("medvl.serve.requests")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
# An id that a client gives must be a UUID: it is logged, and a name or a number of a patient must not be.
_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OPEN = ("/health", "/ready")  # routes that need no key
_MESSAGES = {404: "there is no such address", 405: "this address takes another method"}
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


@define
class Seen:
    """One request, as its line in the log tells it."""

    id: str
    route: str = ""
    status: int = 0
    bytes: int = 0
    begun: float = field(factory=time.monotonic)
    numbers: dict[str, float] = field(factory=dict)  # pages, pixels, tokens, and what else a route counts

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    def count(self, **numbers: float) -> None:
        for name, number in numbers.items():
            self.numbers[name] = self.numbers.get(name, 0) + number


seen_request: ContextVar[Seen] = ContextVar("seen_request")


def seen() -> Seen:
    """The request that is being answered."""
    return seen_request.get()


def read_keys(path: str) -> tuple[bytes, ...]:
    """The SHA-256 of accepted keys, from lines such as sha256:HEX; lines with # are comments.

    Raises:
        ValueError: no such file, a line of another form, no key.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"keys: {path} cannot be read ({type(e).__name__})") from e
    digests = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"sha256:([0-9a-fA-F]{64})", text)
        if match is None:
            raise ValueError(
                f"keys: line {number} of {path} must be sha256:HEX, as `printf %s KEY | sha256sum` prints it"
            )
        digests.append(bytes.fromhex(match[1]))
    if not digests:
        raise ValueError(f"keys: {path} holds no key")
    return tuple(digests)


def is_accepted(authorization: str, digests: tuple[bytes, ...]) -> bool:
    """Whether a header "Bearer KEY" has one of the keys; in a time that does not depend on which."""
    kind, _, key = authorization.partition(" ")
    digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
    # All are compared, so that the time tells nothing.
    matches = [hmac.compare_digest(digest, accepted) for accepted in digests]
    return kind.lower() == "bearer" and any(matches)


@define
class Guard:
    """The outermost layer of the service."""

    app: Any
    digests: tuple[bytes, ...]  # of keys; () = none is asked for
    body_bytes: Callable[[str], int]  # path -> bytes that a body may have
    all_bytes: int  # that all requests under way may have together: they are in memory
    body_s: float  # seconds in which a small body must have come
    is_closing: Callable[[], bool]
    done: Callable[[Seen], None]  # called with every request that is over
    _held_bytes: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "").lower()
        request = Seen(id=given if _ID.fullmatch(given) else uuid.uuid4().hex)
        seen_request.set(request)
        most = self.body_bytes(scope["path"])
        is_read = has_begun = False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal is_read
            # A second more for each MiB that has come: scans are large, and lines slow.
            left_s = None if is_read else self.body_s + request.bytes / 2**20 - request.elapsed
            try:
                async with asyncio.timeout(left_s):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "the body comes too slowly") from None
            if message["type"] == "http.disconnect" and not is_read:
                raise Refused(499, "the client has gone")
            self._count(request, len(message.get("body", b"")), most)
            is_read = not message.get("more_body", False)
            return message

        async def told(message: MutableMapping[str, Any]) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                request.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request.id.encode()),
                    (b"cache-control", b"no-store"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check(scope, headers, most)
            await self.app(scope, counted, told)
        except (Exception, asyncio.CancelledError) as e:
            refused = refusal_of(e)
            if has_begun:
                request.status = refused.status  # the answer was cut
            else:
                # Where it is refused because of the body, the rest of that is not read.
                hang_up = not is_read and refused.status in (408, 413, 429)
                await send_refusal(told, refused, request.id, hang_up)
        finally:
            self._held_bytes -= request.bytes
            request.route = getattr(scope.get("route"), "path", "") or "unknown"
            self.done(request)
            log_request(request)

    def _count(self, request: Seen, size: int, most: int) -> None:
        request.bytes += size
        self._held_bytes += size
        if request.bytes > most:
            raise Refused(413, f"a body must have at most {most:,} bytes")
        if self._held_bytes > self.all_bytes:
            raise Refused(429, "other requests take all memory for bodies now; send it again", 5)

    def _check(self, scope: Scope, headers: dict[str, str], most: int) -> None:
        if self.is_closing() and scope["path"] not in OPEN:
            raise Refused(503, "the service is stopping", 10)
        is_open = scope["path"] in OPEN or scope["method"] == "OPTIONS"
        if self.digests and not is_open and not is_accepted(headers.get("authorization", ""), self.digests):
            raise Refused(401, "a key is needed: Authorization: Bearer KEY")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > most:
            raise Refused(413, f"a body must have at most {most:,} bytes")


def refusal_of(error: BaseException) -> Refused:
    """What a client is told of an exception. One that nobody foresaw is logged by its place, never by its message."""
    while isinstance(error, BaseExceptionGroup):
        refused, _ = error.split(Refused)
        error = (refused or error).exceptions[0]
    if isinstance(error, Refused):
        return error
    if isinstance(
        error, asyncio.CancelledError
    ):  # the server does so to what is not done in time when it stops
        return Refused(503, "the service is stopping, and this was not done in time", 10)
    status = getattr(error, "status_code", 0)  # of Starlette: 404, 405
    if status:
        return Refused(status, _MESSAGES.get(status, "refused"))
    _log.error("%s", place_of(error))
    return Refused(500, "the service failed; its log says where")


def failure(refused: Refused, request_id: str) -> Failed:
    """The body of a refusal."""
    kind = _KINDS.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return Failed(error=Failure(message=str(refused), type=kind, code=refused.status), id=request_id)


async def send_refusal(send: Send, refused: Refused, request_id: str, hang_up: bool) -> None:
    """A whole response, behind which the connection may be closed."""
    body = failure(refused, request_id).model_dump_json().encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.retry_after:
        headers.append((b"retry-after", str(refused.retry_after).encode()))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if hang_up:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def log_request(request: Seen) -> None:
    """One line of JSON."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": request.id,
        "route": request.route,
        "status": request.status,
        "bytes": request.bytes,
        "seconds": round(request.elapsed, 4),
        **{name: round(number, 4) for name, number in request.numbers.items()},
    }
    print(json.dumps(line), file=sys.stderr, flush=True)
