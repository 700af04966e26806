"""document: medical pages become fields; a vision-language model that is adapted as in tune and scored by fields.

`record` is the record of an experiment, `score` the fields of answers. Data, training and variants are those of tune.
"""

from functools import partial
from pathlib import Path

from medvl.systems.document.record import Config
from medvl.systems.document.score import assess
from medvl.systems.system import Question, System
from medvl.systems.tune import run
from medvl.systems.tune.variants import bench_questions, find_variant


def ask(folder: Path, question: Question) -> str:
    """The answer of a trained run to a question about a page."""
    return run.ask(folder, question.text, question.images, question.max_tokens, Config).strip()


SYSTEM = System(
    record=Config,
    prepare=run.prepare,
    fit=run.fit,
    load=partial(run.load, record=Config),
    assess=assess,
    labels=run.labels,
    memory=run.memory,
    ask=ask,
    variant=find_variant,
    bench_questions=bench_questions,
    takes=("--image",),
)
