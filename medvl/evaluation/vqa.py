"""The accuracy of answers about images by one rule, beside what is right without looking at any image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen

from medvl.evaluation.accuracy import accuracy, to_results
from medvl.evaluation.answers import normalise, same_answer
from medvl.evaluation.choice_answers import extract_letter
from medvl.evaluation.choices import comparable_text
from medvl.evaluation.results import Result

Options = Mapping[str, str] | None  # letter -> text of a question with choices


@frozen(kw_only=True)
class Labelled:
    """A question about an image, with its right answer."""

    gold: str
    question: str = ""
    options: Options = None
    subjects: Sequence[str] = ()  # that it counts under beside "all", such as ("closed", "organ"); "" is none


def is_right(answer: str | None, gold: str, options: Options = None) -> bool:
    """Whether an answer says what gold says (`answers.same_answer`). Where gold chooses one of the options
    (`choice_answers.extract_letter`), the answer must choose it too, or another with the same text.

    Raises:
        ValueError: gold has no words.
    """
    meant = extract_letter(gold, options) if options else ""
    if not options or not meant:
        return same_answer(answer, gold)
    chosen = extract_letter(answer, options)
    return bool(chosen) and comparable_text(options[chosen]) == comparable_text(options[meant])


def score_answers(
    answers: Sequence[str | None],
    records: Sequence[Labelled],
    groups: Sequence[Any],
    *,
    train: Sequence[Labelled] = (),
    split: str,
    experiment: str = "",
    n: int = 1000,
    gen: torch.Generator,
) -> list[Result]:
    """Share of right answers (`is_right`) with its 95 % interval, over "all" and over each subject.

    Args:
        groups: the image or case of each record, drawn as a whole.
        train: the training split, which says what usual answers are.
    Returns:
        of each subject rows "accuracy", "accuracy_of_yes" (always "yes"), and what can be reached without an image:
        "accuracy_of_the_usual_training_answer" (always the most frequent one of the subject in `train`) and
        "accuracy_of_the_question_alone" (the most frequent one to the same question, or else the usual one). Where
        `train` has nothing of the subject, they go by the subject's other records and end in "_of_others". All
        records count, answered or not.
    """
    rows_of = _rows_by_subject(records)
    train_rows = _rows_by_subject(train)
    seed, results = int(torch.randint(2**62, (), generator=gen)), list[Result]()
    for subject, rows in rows_of.items():
        chosen = [records[i] for i in rows]
        seen = [train[i] for i in train_rows.get(subject, ())]
        said: dict[str, Sequence[str | None]] = {
            "accuracy": [answers[i] for i in rows],
            "accuracy_of_yes": ["yes"] * len(rows),
        }
        if seen:
            usual = Counter(map(_comparable, seen)).most_common(1)[0][0]
            said["accuracy_of_the_usual_training_answer"] = [usual] * len(rows)
            said["accuracy_of_the_question_alone"] = _usual_by_question(chosen, seen, usual)
        else:
            of_others = _usual_answers_of_others([_comparable(record) for record in chosen])
            said["accuracy_of_the_usual_answer_of_others"] = of_others
            said["accuracy_of_the_question_alone_of_others"] = _usual_by_question_of_others(chosen, of_others)
        for metric, texts in said.items():
            pairs = zip(texts, chosen, strict=True)
            right = [is_right(text, record.gold, record.options) for text, record in pairs]
            own_gen = torch.Generator().manual_seed(seed)
            result = accuracy(right, [groups[i] for i in rows], n=n, gen=own_gen)
            results += to_results({subject: result}, split=split, metric=metric, experiment=experiment)
    return results


def _rows_by_subject(records: Sequence[Labelled]) -> dict[str, list[int]]:
    """{"all" or a subject: its rows}."""
    rows_of: dict[str, list[int]] = {"all": [*range(len(records))]}
    for i, record in enumerate(records):
        for name in filter(None, record.subjects):
            rows_of.setdefault(name, []).append(i)
    return rows_of


def _comparable(record: Labelled) -> str:
    """The right answer in the form in which answers are counted; of choices the letter."""
    letter = extract_letter(record.gold, record.options) if record.options else ""
    return letter or normalise(record.gold)


def _usual_answers_of_others(answers: Sequence[str]) -> list[str]:
    """For each answer the most frequent one of the others."""
    (first, count), (second, next_count) = [*Counter(answers).most_common(2), ("", 1)][:2]
    # A record's own answer may lose its first place without the record.
    return [second if answer == first and count - 1 < next_count else first for answer in answers]


def _usual_by_question(records: Sequence[Labelled], train: Sequence[Labelled], usual: str) -> list[str]:
    """For each record the most frequent answer to its question in `train`, or the usual one."""
    answers_to = dict[str, list[str]]()
    for record in train:
        answers_to.setdefault(comparable_text(record.question), []).append(_comparable(record))
    return [
        Counter(answers_to.get(comparable_text(record.question), [usual])).most_common(1)[0][0]
        for record in records
    ]


def _usual_by_question_of_others(records: Sequence[Labelled], usual: Sequence[str]) -> list[str]:
    """For each record the most frequent answer of others to its question, or the usual one of others."""
    rows_of = dict[str, list[int]]()
    for row, record in enumerate(records):
        rows_of.setdefault(comparable_text(record.question), []).append(row)
    found = [*usual]
    for rows in rows_of.values():
        if len(rows) > 1:
            of_question = _usual_answers_of_others([_comparable(records[row]) for row in rows])
            for row, answer in zip(rows, of_question, strict=True):
                found[row] = answer
    return found
