"""Answers about pages are scored by their fields, over all pages and for each damage."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import evolve
from torch import Generator

from medvl.base import files
from medvl.base.text import short
from medvl.base.tree import Tree
from medvl.documents.fields import Fields, fields_to_json, leaves, read_answer
from medvl.documents.prose import SECTIONS, section_of
from medvl.documents.read_page import read_page_once
from medvl.documents.rules import extract_by_rules
from medvl.documents.score import PageScore, compare_runs, score_page, score_results
from medvl.documents.words import Word
from medvl.evaluation import plots, report
from medvl.evaluation.results import Result
from medvl.language import system
from medvl.language.conversations import Conversation, Reader
from medvl.language.system import LanguageModel
from medvl.language.vision import open_item
from medvl.phantoms.page_damage import DAMAGES
from medvl.systems.tune import run as tune_run

_log = logging.getLogger("medvl")
_CONSTANT = "constant answer"  # the most frequent training answer to a kind of page
_RULES = "OCR and rules"  # what `documents.rules` makes of the words that `documents.read_page` reads


def assess(
    model: LanguageModel, params: Tree, folder: Path, experiment: str, data: Reader | None = None
) -> tuple[list[Result], Path]:
    """Answer every test conversation and score the fields; writes `answers.jsonl` and the report into `folder`.

    Args:
        data: from `prepare`; None = the files are read here.
    """
    cfg = model.cfg
    read = data or tune_run.split_reader(cfg)
    conversations = read("test")
    lines = tune_run.answer_conversations(model, params, conversations, folder)
    answers = [line["answer"] for line in lines]
    scores = score_answers(conversations, answers)
    written = [_line(line, score) for line, score in zip(lines, scores, strict=True)]
    files.write_text(
        folder / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written)
    )
    system.remove_unfinished_answers(folder)
    rows = to_results(cfg, conversations, scores, experiment)
    # Where one file stands for all splits, the most frequent answers would be those that are scored.
    if tune_run.split_path(cfg, "train") != tune_run.split_path(cfg, "test"):
        constant = constant_answers(read("train"), conversations)
        rows += _baseline(cfg, conversations, constant, _CONSTANT, experiment)
    else:
        _log.warning("%s: has no training split, so no constant answer is scored", cfg.data.conversations)
    by_rules = conversations[: cfg.evaluate.rules]
    if by_rules:
        words = tune_run.data_folder(cfg) / "page_words"
        answers = [answer_by_rules(conversation, words, cfg.chat.window) for conversation in by_rules]
        rows += _baseline(cfg, by_rules, answers, _RULES, experiment)
    notes = (
        "A field is right if it is equal by words, numbers and units, never because one text is within another. "
        "Hallucinated values are numbers in an answer that its page does not show. A constant answer is the most frequent "
        "one of the training pages of the same kind.",
    )
    figures = plots.training_curves(system.last_metrics(cfg.train, folder.parent))
    page = report.write_report(folder, f"{experiment}: fields of pages", rows, figures, notes)
    return rows, page


def _baseline(
    cfg: Any, conversations: Sequence[Conversation], answers: Sequence[str], name: str, experiment: str
) -> list[Result]:
    """F1 and hallucinated values, over all pages and by damage, of what is compared with the model."""
    rows = to_results(cfg, conversations, score_answers(conversations, answers), experiment)
    return [
        evolve(row, subject=f"{row.subject}, {name}".removeprefix(", "))
        for row in rows
        if row.what == "hallucinated_value_rate" or (row.what == "f1" and row.subject in ("all", *DAMAGES))
    ]


def answer_by_rules(conversation: Conversation, folder: Path, window: tuple[float, ...] = ()) -> str:
    """The fields that OCR and rules find on the pages of a conversation, as JSON; its words are kept in `folder`."""
    words = list[Word]()
    for item in conversation.images:
        words += read_page_once(open_item(item, window=window), folder)
    return fields_to_json(extract_by_rules(words))


def score_answers(conversations: Sequence[Conversation], answers: Sequence[str]) -> list[PageScore]:
    """The score of each answer against the fields of its page."""
    scores = []
    for conversation, answer in zip(conversations, answers, strict=True):
        document = str(conversation.extra.get("document", conversation.id or conversation.place))
        text = str(conversation.extra.get("text", ""))
        scores.append(score_page(document, gold_fields(conversation), answer, text))
    return scores


def compare_answers(cfg: Any, folder: Path, other: Path) -> list[Result]:
    """F1 of the answers of a folder of results minus that of another's, by bootstrap of documents."""
    conversations = tune_run.read_split(cfg, "test")
    scores = []
    for place in (folder, other):
        answers = [line["answer"] for line in tune_run.read_answers(place)]
        scores.append(score_answers(conversations, answers))
    return compare_runs(
        *scores, split="test", n=cfg.evaluate.bootstrap, gen=Generator().manual_seed(cfg.seed)
    )


def check_pages(train: Sequence[Conversation], test: Sequence[Conversation]) -> None:
    """Raise before training what scoring would raise; warn of documents that are trained and tested.

    Raises:
        ValueError: as `gold_fields`.
    """
    for conversation in test:
        gold_fields(conversation)
    trained, tested = (
        {str(c.extra["document"]) for c in part if "document" in c.extra} for part in (train, test)
    )
    if both := sorted(trained & tested):
        _log.warning(
            "%d of %d documents of the test split are in the training split, too, such as %s: their scores say "
            "nothing of unseen pages",
            len(both),
            len(tested),
            both[0],
        )


def gold_fields(conversation: Conversation) -> Fields:
    """What a page says: its "fields", or those of the written answer.

    Raises:
        ValueError: there are none, or "fields" holds what is none.
    """
    given = conversation.extra.get("fields")
    if given is not None:
        unread = _unread_part(given)
        if unread is not None:
            raise ValueError(
                f'{conversation.place}: "fields" must be an object of {", ".join(SECTIONS)} as fields_to_json writes '
                f"it, found {short(unread)}"
            )
    written = conversation.messages[-1]["content"] if given is None else json.dumps(given)
    fields = read_answer(written)
    if not leaves(fields):
        raise ValueError(
            f'{conversation.place}: the page must have fields to be scored by, in "fields" or in its last answer, '
            f"got {written[:60]!r}"
        )
    return fields


def _unread_part(given: Any) -> Any:
    """What of given "fields" no field takes; None where all is read. It would become running text, and the page be
    scored by that."""
    if not isinstance(given, dict):
        return given
    sections = {key: value for key, value in given.items() if section_of(key) != "text"}
    return read_answer(json.dumps(sections)).text or None


def constant_answers(train: Sequence[Conversation], test: Sequence[Conversation]) -> list[str]:
    """For each page the most frequent training answer to pages of its kind ("category"), or to all."""
    by_kind: dict[str, Counter[str]] = {}
    for conversation in train:
        answer = conversation.messages[-1]["content"]
        for kind in ("", str(conversation.extra.get("category", ""))):
            by_kind.setdefault(kind, Counter())[answer] += 1
    kinds = [str(conversation.extra.get("category", "")) for conversation in test]
    return [by_kind.get(kind, by_kind[""]).most_common(1)[0][0] for kind in kinds]


def to_results(
    cfg: Any, conversations: Sequence[Conversation], scores: Sequence[PageScore], experiment: str
) -> list[Result]:
    """Rows over all pages, and F1 and hallucinated values of each damage."""
    gen, n = Generator().manual_seed(cfg.seed), cfg.evaluate.bootstrap
    rows = score_results(scores, split="test", experiment=experiment, n=n, gen=gen)
    damages = [str(conversation.extra.get("damage", "")) for conversation in conversations]
    for damage in sorted(set(damages) - {""}):
        chosen = [score for score, own in zip(scores, damages, strict=True) if own == damage]
        of_damage = score_results(chosen, split="test", experiment=experiment, n=n, gen=gen)
        for row in of_damage:
            if (row.what, row.subject) in (("f1", "all"), ("hallucinated_value_rate", "")):
                rows.append(evolve(row, subject=damage))
    return rows


def _line(line: dict[str, Any], score: PageScore) -> dict[str, Any]:
    """A line of answers.jsonl: what was right, and which numbers no page shows."""
    counts = {
        kind: [c.right, c.false, c.missed]
        for kind, c in score.counts.items()
        if c.right or c.false or c.missed
    }
    del line["right"]
    return line | {
        "read_as": score.read_as,
        "right_false_missed": counts,
        "hallucinated": list(score.hallucinated),
    }
