"""What the page in the browser asks of the service: forms go out, answers or one plain message come back."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from attrs import field, frozen

_CONNECT_S = 5.0
_ANSWER_S = 600.0  # the service has a deadline of its own, which is shorter


class Unanswered(Exception):
    """Why there is no answer, for the user."""


@frozen(kw_only=True)
class Service:
    """`invoke serve` at an address. Each request has a connection of its own, so that users share nothing."""

    address: str
    key: str = field(default="", repr=False)

    def get(self, route: str) -> Any:
        """The JSON of a route.

        Raises:
            Unanswered: no answer.
        """
        with self._client() as client:
            return _checked(client.get(route)).json()

    def post(self, route: str, files: Sequence[bytes] = (), **texts: Any) -> Any:
        """The JSON that answers a form; texts that are empty are left out.

        Raises:
            Unanswered: no answer.
        """
        with self._client() as client:
            return _checked(client.post(route, files=_parts(files, texts))).json()

    def stream(self, route: str, files: Sequence[bytes] = (), **texts: Any) -> Iterator[Any]:
        """The events that answer a form.

        Raises:
            Unanswered: no answer, or one that ends before its end.
        """
        yield from self._events(route, files=_parts(files, {**texts, "stream": "true"}))

    def chat(self, body: Mapping[str, Any]) -> Iterator[str]:
        """The pieces of an answer of /v1/chat/completions.

        Raises:
            Unanswered: as `stream`.
        """
        for event in self._events("/v1/chat/completions", json={**body, "stream": True}):
            for choice in event.get("choices", ()):
                yield choice.get("delta", {}).get("content") or ""

    def _events(self, route: str, **content: Any) -> Iterator[Any]:
        with self._client() as client, client.stream("POST", route, **content) as response:
            if response.is_error:
                response.read()
            for line in _checked(response).iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise Unanswered(event["error"]["message"])
                    yield event
        raise Unanswered("the service stopped in the middle of its answer; ask again")

    @contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
        # trust_env: a proxy of the environment would be given the pages.
        client = httpx.Client(base_url=self.address, headers=headers, timeout=timeout, trust_env=False)
        with client:
            try:
                yield client
            except httpx.HTTPError:
                raise Unanswered("the service does not answer; see that `invoke serve` is running") from None
            except ValueError:
                raise Unanswered("what answers at the address is no service of medvl") from None


def data_address(content: bytes) -> str:
    """A file as a data: address; the service finds out what it is."""
    return "data:application/octet-stream;base64," + base64.b64encode(content).decode()


def _parts(files: Sequence[bytes], texts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Parts of a form. Files have no names: those may name patients."""
    parts: list[tuple[str, Any]] = [("file", ("file", content)) for content in files]
    for name, value in texts.items():
        text = str(value).lower() if isinstance(value, bool) else str(value or "").strip()
        if text:
            parts.append((name, (None, text)))
    return parts


def _checked(response: httpx.Response) -> httpx.Response:
    if not response.is_error:
        return response
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = "no reason was given"
    if response.status_code == 404:
        message = f"not served here: {message}"
    if response.status_code == 401:
        message = "the service asks for a key: start the page with MEDVL_KEY or --key-env"
    raise Unanswered(f"{message} (status {response.status_code})")
