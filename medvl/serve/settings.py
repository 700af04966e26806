"""The settings of a service: a record, as `invoke serve --set KEY=VALUE` changes it."""

from attrs import field, frozen

from medvl.base import config

# Whose runs are a language model that answers conversations.
LANGUAGE_SYSTEMS = ("tune", "document", "adapters")


@frozen(kw_only=True)
class Limits:
    """What a request may send."""

    file_bytes: int = 20 * 2**20
    files: int = 8
    pages: int = 32  # of all files
    page_pixels: int = 50_000_000  # an A4 page at 600 dpi has 35 million
    pixels: int = 100_000_000  # of all pages; each takes four bytes
    aspect: int = 200  # times as long as wide, as models take it
    dpi: int = 150  # at which pages of PDF are drawn

    def __attrs_post_init__(self) -> None:
        names = ("file_bytes", "files", "pages", "page_pixels", "pixels", "aspect", "dpi")
        config.check_bounds(self, "Limits", **dict.fromkeys(names, (1, 2**31)))


@frozen(kw_only=True)
class ServeConfig:
    """What a service answers with, and how much it takes."""

    # Runs and models ----
    runs: tuple[str, ...] = ()  # run folders: one of a language system at most, one of each other system
    model: str = ""  # in place of such a run: folder or hub name of a model
    registry: str = ""  # adapters for the model, .toml or .json
    engine: str = ""  # in place of all three: address of a server of OpenAI's API, such as http://vllm:8000
    engine_model: str = ""  # how that server calls its model; "" = the first that it lists
    results: tuple[str, ...] = ()  # folders with result files beside those of the runs, for /benchmark

    # Address and access ----
    host: str = "127.0.0.1"
    port: int = 8000
    keys: str = ""  # file of accepted keys, one a line, as sha256:HEX; "" = no key is asked for
    origins: tuple[str, ...] = ()  # web pages that may call from a browser (CORS)

    # Amounts ----
    rows: int = 16  # answers computed at a time
    cells: int = 0  # tokens of the cache, 0 = what fits the memory
    context: int = 0  # tokens of a prompt with its answer, 0 = 16,384 or less
    max_tokens: int = 4096  # of an answer, that a request may ask for
    queue: int = 64  # requests that are answered or wait, for each process
    deadline_s: float = 120.0  # of a request, and what a request may ask for at most
    body_bytes: int = 64 * 2**20  # of a request
    scan_bytes: int = 512 * 2**20  # of a CT scan that is sent
    all_bytes: int = 2**30  # of all requests under way together, which are in memory several times over
    readers: int = 1  # processes that read the words of pages for evidence (OCR); 0 = values are not checked
    threads: int = 0  # of the model's process on a CPU, 0 = as torch chooses
    grace_s: float = 30.0  # for requests under way when the service is stopped
    limits: Limits = field(factory=Limits)

    def __attrs_post_init__(self) -> None:
        config.check_bounds(
            self,
            "serve",
            port=(0, 65535),
            rows=(1, 1024),
            cells=(0, 2**40),
            context=(0, 2**24),
            max_tokens=(1, 2**24),
            queue=(1, 2**16),
            deadline_s=(0.1, 86400),
            body_bytes=(1, 2**40),
            scan_bytes=(1, 2**40),
            all_bytes=(max(self.body_bytes, self.scan_bytes), 2**40),
            readers=(0, 64),
            threads=(0, 1024),
            grace_s=(0, 86400),
        )
        if self.engine and (self.model or self.registry):
            raise ValueError("serve: give either a model here (run, model, registry) or an engine elsewhere")
