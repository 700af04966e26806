"""document: medical pages become fields; a vision-language model that is adapted as in tune and scored by fields.

`record` is the record of an experiment, `score` the fields of answers. Training and variants are those of tune.
"""

from functools import partial
from pathlib import Path
from typing import Any

from medvl.documents.sources import build_data
from medvl.language.conversations import Reader
from medvl.systems.document.record import Config
from medvl.systems.document.score import assess
from medvl.systems.system import Log, Question, System
from medvl.systems.tune import run
from medvl.systems.tune.variants import bench_questions, calibration, find_variant


def prepare(cfg: Any, log: Log) -> Reader:
    """Put the data in place: pages are drawn, public data sets fetched; what is there already is kept.

    Raises:
        ValueError: as `sources.build_data` and `tune.run.prepare`.
    """
    if cfg.data.source == "public":
        build_data(cfg.data.fetched, log)
    return run.prepare(cfg, log)


def ask(folder: Path, question: Question) -> str:
    """The answer of a trained run to a question about a page."""
    return run.ask(folder, question.text, question.images, question.max_tokens, Config).strip()


SYSTEM = System(
    record=Config,
    prepare=prepare,
    fit=run.fit,
    load=partial(run.load, record=Config),
    assess=assess,
    labels=run.labels,
    memory=run.memory,
    ask=ask,
    variant=find_variant,
    bench_questions=bench_questions,
    calibration=calibration,
    takes=("--image",),
)
