"""What an engine is asked, and what it gives: pieces of text and how the answer ended.

Two engines fill it: `worker` runs a model of medvl in a process of its own, and `remote` asks any server that speaks
OpenAI's API. Nothing here loads torch.
"""

import traceback
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal, Protocol

from attrs import field, frozen
from PIL import Image

Reason = Literal["end", "stop", "length"]  # an end token, a stop string, or max_tokens


class Refused(ValueError):
    """A request that is not answered. The message is for the client and holds nothing of what it sent.

    Attributes:
        status: of HTTP: 400 a wrong request, 413 too large, 415 another kind of file, 422 fields that cannot be, 429 too
            many at once, 502 the model's process or server ended, 503 not ready, 504 too late.
        retry_after: seconds, where another try may succeed; 0 = it will not.
    """

    def __init__(self, status: int, message: str, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    def __reduce__(self) -> Any:
        # It crosses processes.
        return type(self), (self.status, str(self), self.retry_after)


def place_of(error: BaseException) -> str:
    """What an error is and where it was raised, for a log: its message may hold a text of the request."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return type(error).__name__ + place


@frozen(kw_only=True)
class Request:
    """One conversation that is to be answered."""

    id: str
    # {"role", "content"} of every turn; each <image> in a content stands for one of the images, in order.
    messages: tuple[Mapping[str, str], ...] = field(repr=False)
    images: tuple[Image.Image, ...] = field(default=(), repr=False)  # RGB
    # A name, {name: weight} of a mixture, "" = the model as it is served, "auto" = as a registry chooses, "base" = none.
    adapter: str | Mapping[str, float] = ""
    schema: Mapping[str, Any] | None = field(default=None, repr=False)  # JSON schema that the answer keeps to
    max_tokens: int = 0  # 0 = as the model is used to, as far as they fit
    temperature: float = 0.0  # 0 = the likeliest token
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = field(default=(), repr=False)
    seed: int = 0
    deadline_s: float = 0.0  # seconds from its arrival to its last token; 0 = none


@frozen(kw_only=True)
class Piece:
    """Text that is certain."""

    text: str = field(repr=False)


@frozen(kw_only=True)
class End:
    """How an answer ended, and what it took."""

    reason: Reason
    prompt_tokens: int
    answer_tokens: int
    model: str = ""  # what answered, by name
    revision: str = ""  # of its weights, where it is known
    adapters: tuple[tuple[str, float], ...] = ()  # (name, weight) of those that answered
    queued_s: float = 0.0  # until the prompt was begun
    first_token_s: float = 0.0  # from then to the first token
    total_s: float = 0.0


class Engine(Protocol):
    """Answers requests, any number at once."""

    def stream(self, request: Request) -> AsyncIterator[Piece | End]:
        """The pieces of an answer, an `End` last. Closing the iterator frees what the request holds.

        Raises:
            Refused: the request cannot be answered.
        """

    async def models(self) -> list[str]:
        """Names that `adapter` takes."""

    async def close(self) -> None:
        """Let it go."""
