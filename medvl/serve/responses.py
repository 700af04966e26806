"""What the service answers with, and the bodies that it takes, as pydantic models: they are the API's schema."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DISCLAIMER = "Research use only, not for diagnosis. Every value must be compared with the page."


class Answer(BaseModel):
    """What every answer says."""

    id: str
    model: str  # what answered
    revision: str = ""  # of its weights; "" where it is another server's
    disclaimer: str = DISCLAIMER


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AdapterWeight(BaseModel):
    name: str
    weight: float


class FoundValue(BaseModel):
    """The evidence for a value."""

    path: str  # in `fields`, as labs/0/value
    text: str
    # verified, same, elsewhere, similar, missing; printed with an own schema, unchecked where pages were not read
    status: str
    verified: bool
    page: int | None = None  # of `pages`
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom in pixels of the page
    score: float = 0.0
    unshown: list[str] = []  # numbers of a running text that no page shows


class LeftOutValue(BaseModel):
    """A value that strict=true has left out; of an entry that went whole, `path` is the name of its list."""

    path: str  # its entry as in `fields`, and the name of the value: labs/0/unit
    status: str  # also verified: of what says something else without another (a unit without its number)
    page: int | None = None


class FoundWarning(BaseModel):
    path: str
    kind: str
    message: str


class PageAnswer(BaseModel):
    """A page and how its answer ended."""

    file: int
    page: int
    width: int
    height: int
    finish_reason: str
    answer: Any = None  # with a schema of the client's own: the JSON of this page
    # With pictures=true: the page as a PNG, as a data: address, at most 1,600 pixels on its longer side. Boxes stay in
    # pixels of the page, which is `width` by `height`.
    picture: str = ""


class Extracted(Answer):
    """The fields of a document."""

    adapters: list[AdapterWeight]
    fields: dict[str, Any] | None  # None with a schema of the client's own
    values: list[FoundValue]
    unverified: list[str]  # paths of values that a person must look at
    left_out: list[LeftOutValue] = []  # with strict=true
    warnings: list[FoundWarning]
    pages: list[PageAnswer]
    usage: Usage
    seconds: dict[str, float]


class Analysed(Answer):
    """The text that a model says of pages."""

    adapters: list[AdapterWeight]
    text: str
    finish_reason: str
    usage: Usage
    seconds: dict[str, float]


class Finding(BaseModel):
    name: str
    probability: float
    threshold: float | None = None  # of the validation split, where known


class Classified(Answer):
    findings: list[Finding]
    slices: list[str] = []  # PNGs of slices from bottom to top, as data: addresses
    seconds: dict[str, float]


class Patch(BaseModel):
    rank: int
    x: int
    y: int
    relevance: float
    percentile: float


class SlideAnswer(Answer):
    text: str
    patches: list[Patch]
    map: str = ""  # PNG as a data: address
    seconds: dict[str, float]


class TextAnswer(Answer):
    text: str
    seconds: dict[str, float]


class Drawn(Answer):
    picture: str  # PNG as a data: address
    seconds: dict[str, float]


class Health(BaseModel):
    status: Literal["ready", "loading", "failed", "stopping"]
    missing: list[str]  # processes that are not ready
    version: str
    model: str
    processes: dict[str, dict[str, Any]]


class Failure(BaseModel):
    """Why a request was not answered, as OpenAI's clients read it."""

    message: str
    type: str
    code: int


class Failed(BaseModel):
    error: Failure
    id: str
    disclaimer: str = DISCLAIMER


# Bodies -----------------------------------------------------------------------------------------------------
class Text(BaseModel):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    url: str
    detail: str = "auto"


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Text | ImagePart]
    name: str | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatBody(BaseModel):
    """The body of /v1/chat/completions: what of OpenAI's is answered, and two of ours (adapter, top_k).

    What would change the answer and is not supported is refused; what would not (user, metadata, store) is passed over.
    """

    model: str = ""
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    # null is as nothing: clients send it for what they leave open.
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    adapter: str | dict[str, float] | None = None
    # Refused below unless they say nothing.
    n: int | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    modalities: list[str] | None = None

    def unsupported(self) -> list[str]:
        """Names of settings that would change the answer."""
        asked = {
            "n": self.n not in (None, 1),
            "modalities": self.modalities not in (None, ["text"]),
        }
        names = ("logprobs", "tools", "functions", "presence_penalty", "frequency_penalty", "logit_bias")
        asked |= {name: bool(getattr(self, name)) for name in names}
        return [name for name, is_asked in asked.items() if is_asked]
