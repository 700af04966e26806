"""What a system is to the commands: one frozen record on the face of its folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from medvl.base.tree import Tree
from medvl.evaluation.results import Result
from medvl.language.chat import Dialogue
from medvl.language.system import LanguageModel
from medvl.training.estimate import Step

Log = Callable[[str], None]
# What a model of a language system can be measured as: as it came, its adapter beside it, or written out.
VARIANTS = ("base", "nf4", "int4", "lora", "merged")


@frozen(kw_only=True)
class Question:
    """One question to a trained run, as `invoke ask` takes it."""

    text: str
    images: tuple[str, ...] = ()  # image files
    slide: str = ""  # a file of patch features, STORE.h5::NAME, or the name of a slide of the run
    mode: str = "mixture"  # how adapters are combined
    k: int = -1  # adapters at most; -1 = as the run says
    adapter: str = ""  # of mode "oracle"
    out: str = "maps"  # folder for the map of a slide's answer
    offset: str = ""  # "x,y" taken from the map's shapes
    max_tokens: int = 256
    overrides: tuple[str, ...] = ()  # "key=value" of how adapters are chosen
    page: int | None = None  # of an image file with several pages, frames or slices
    window: tuple[float, float] | None = None  # (black, white) of greys of more than 8 bits
    on_token: Callable[[str], None] | None = None  # gets the answer piece by piece, where the system streams


@frozen(kw_only=True)
class Variant:
    """One of VARIANTS of a language model."""

    open: Callable[[], tuple[LanguageModel, Tree]]  # reads it anew at each call
    folders: tuple[Path, ...]  # the files that it is read from


def drawn_data(cfg: Any) -> tuple[Path, ...]:
    """The folder that data is drawn into, where it is not files that are there."""
    if cfg.data.source == "files":
        return ()
    return (Path(cfg.data.folder),)


def _always(cfg: Any) -> bool:
    return True


@frozen(kw_only=True, eq=False)
class System:
    """One kind of experiment. `medvl/systems/NAME/__init__.py` offers it as `SYSTEM`.

    `cfg` below is a `record`; `model` is whatever the system calls everything that is not a weight, a record
    with the field `cfg`; `params` is the tree of all weights. The same command after a stop goes on where it
    was: `prepare` and `fit` find what is done.

    What `prepare` has read of the data it may return, so that nothing is read twice in a run. If it is not
    None, the `memory`, the `fit` and the `assess` that follow in this process get it as the argument `data`.
    Elsewhere they are called without `data`, and read for themselves.
    """

    record: type  # the attrs record that the experiment's TOML becomes
    # (cfg, log): puts the data in place, or says what is missing; only the first process calls it
    prepare: Callable[[Any, Log], Any]
    # (cfg, run folder, log) -> (model, params): trains all stages; every process calls it
    fit: Callable[..., tuple[Any, Tree]]
    load: Callable[[Path], tuple[Any, Tree]]  # run folder -> (model, params), as `fit` returned them
    # (model, params, folder of the results, name of the run) -> rows and the report's page: scores the test
    # split
    assess: Callable[..., tuple[list[Result], Path]]
    # (cfg, run folder, number) -> text: a training sample with the trained tokens marked
    labels: Callable[[Any, Path, int], str] | None = None
    # (cfg, run folder, number of processes) -> {stage: a step}: the memory and the time that training needs
    memory: Callable[..., dict[str, Step]] | None = None
    # (run folder, question) -> the answer as it is printed
    ask: Callable[[Path, Question], str] | None = None
    # (cfg, run folder, one of VARIANTS) -> that variant of the model, for `invoke bench`
    variant: Callable[[Any, Path, str], Variant] | None = None
    # cfg -> the questions that every variant is timed on
    bench_questions: Callable[[Any], Sequence[Dialogue]] | None = None
    # cfg -> training conversations, by which `invoke quantize` finds factors of weights
    calibration: Callable[[Any], Sequence[Dialogue]] | None = None
    # (cfg, a folder of results, that of another variant) -> rows "METRIC_difference": the first minus the other
    compare: Callable[[Any, Path, Path], list[Result]] | None = None
    # (model, params, run folder, an empty folder) -> {architecture: its checkpoint, "" = from scratch}: writes the run
    # for other programs, where it is no adapter of a language model
    export: Callable[[Any, Tree, Path, Path], dict[str, str]] | None = None
    takes: tuple[str, ...] = ()  # options of `invoke ask` that make sense for `ask`
    # cfg -> whether it trains anything; if not, it is evaluated at once
    trains: Callable[[Any], bool] = _always
    # cfg -> where it writes besides the run folder; checked before anything starts
    folders: Callable[[Any], Sequence[Path]] = drawn_data
    # {variable: setting}: environment variables that other programs read for the same settings
    environment: Mapping[str, str] = field(factory=dict)
