"""document: medical pages become fields; a vision-language model that is adapted as in tune and scored by fields.

`record` is the record of an experiment, `score` the fields of answers. Training and variants are those of tune.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medvl.documents.page_words import add_page_words
from medvl.documents.read_page import check_reader
from medvl.documents.sources import build_data
from medvl.language.conversations import Conversation, Reader, read_conversations
from medvl.phantoms.pages import draw_fixed_pages
from medvl.systems.document.record import Config
from medvl.systems.document.score import assess, check_pages, compare_answers
from medvl.systems.system import Log, Question, System
from medvl.systems.tune import run
from medvl.systems.tune.variants import calibration, find_variant


def prepare(cfg: Any, log: Log) -> Reader:
    """Put the data in place: pages are drawn, public data sets fetched; what is there already is kept.

    Raises:
        ValueError: as `sources.build_data`, `tune.run.prepare` and `score.check_pages`; pages that are to be read by
            OCR cannot be.
    """
    if cfg.evaluate.rules:
        check_reader()  # needed after training only, but then it would be too late to say so
    if cfg.data.source == "public":
        build_data(cfg.data.fetched, log)
    read = run.prepare(cfg, log)
    check_pages(read("train"), read("test"))
    return read


def bench_questions(cfg: Any) -> Sequence[Conversation]:
    """The five standard pages, of the style that the record draws; pages of letters where it draws none."""
    style = cfg.data.pages.style if cfg.data.source == "pages" else "letter"
    folder = Path(cfg.data.folder) / f"fixed-{style}"
    draw_fixed_pages(folder, style)
    conversations = read_conversations(folder / "standard.jsonl")
    if cfg.chat.ocr:
        return add_page_words(conversations, folder / "page_words", cfg.chat.window)
    return conversations


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
    compare=compare_answers,
    takes=("--image",),
)
