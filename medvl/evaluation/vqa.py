"""The accuracy of answers about images by one rule, beside what is right without looking at any image."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from medvl.evaluation.accuracy import accuracy, to_results
from medvl.evaluation.answers import normalise, same_answer
from medvl.evaluation.choice_answers import extract_letter
from medvl.evaluation.choices import comparable_text
from medvl.evaluation.results import Result

Options = Mapping[str, str] | None  # letter -> text of a question with choices
Labelled = tuple[str, Options, Sequence[str]]  # gold, options and subjects of a record


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
    gold: Sequence[str],
    options: Sequence[Options],
    subjects: Sequence[Iterable[str]],
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
        subjects: what each record counts under beside "all", such as ("closed", "organ"); "" is none.
        groups: the image or case of each record, drawn as a whole.
        train: the training split, which says what the usual answer to a subject is.
    Returns:
        of each subject rows "accuracy", "accuracy_of_yes" (always "yes") and
        "accuracy_of_the_usual_training_answer" (always the most frequent one of the subject in `train`) or, where
        `train` has none, "accuracy_of_the_usual_answer_of_others" (the most frequent one of the subject's other
        records). All records count, answered or not.
    """
    rows_of = _rows_by_subject(subjects)
    train_rows = _rows_by_subject([names for _, _, names in train])
    seed, results = int(torch.randint(2**62, (), generator=gen)), list[Result]()
    for subject, rows in rows_of.items():
        said: dict[str, Sequence[str | None]] = {
            "accuracy": [answers[i] for i in rows],
            "accuracy_of_yes": ["yes"] * len(rows),
        }
        if seen := [_comparable(*train[i][:2]) for i in train_rows.get(subject, ())]:
            usual = Counter(seen).most_common(1)[0][0]
            said["accuracy_of_the_usual_training_answer"] = [usual] * len(rows)
        else:
            others = _usual_answers_of_others([_comparable(gold[i], options[i]) for i in rows])
            said["accuracy_of_the_usual_answer_of_others"] = others
        for metric, texts in said.items():
            right = [is_right(text, gold[i], options[i]) for text, i in zip(texts, rows, strict=True)]
            own_gen = torch.Generator().manual_seed(seed)
            record = accuracy(right, [groups[i] for i in rows], n=n, gen=own_gen)
            results += to_results({subject: record}, split=split, metric=metric, experiment=experiment)
    return results


def _rows_by_subject(subjects: Sequence[Iterable[str]]) -> dict[str, list[int]]:
    """{"all" or a subject: its rows}."""
    rows_of: dict[str, list[int]] = {"all": [*range(len(subjects))]}
    for i, names in enumerate(subjects):
        for name in filter(None, names):
            rows_of.setdefault(name, []).append(i)
    return rows_of


def _comparable(gold: str, options: Options) -> str:
    """An answer in the form in which answers are counted; of choices the letter."""
    return (options and extract_letter(gold, options)) or normalise(gold)


def _usual_answers_of_others(answers: Sequence[str]) -> list[str]:
    """For each answer the most frequent one of the others."""
    (first, count), (second, next_count) = [*Counter(answers).most_common(2), ("", 1)][:2]
    # A record's own answer may lose its first place without the record.
    return [second if answer == first and count - 1 < next_count else first for answer in answers]
