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
    split: str,
    experiment: str = "",
    n: int = 1000,
    gen: torch.Generator,
) -> list[Result]:
    """Share of right answers (`is_right`) with its 95 % interval, over "all" and over each subject.

    Args:
        subjects: what each record counts under beside "all", such as ("closed", "organ"); "" is none.
        groups: the image or case of each record, drawn as a whole.
    Returns:
        of each subject rows "accuracy", "accuracy_of_yes" (always "yes") and "accuracy_of_the_usual_answer" (the
        most frequent answer of the subject's other records). All records count, answered or not.
    """
    rows_of: dict[str, list[int]] = {"all": [*range(len(gold))]}
    for i, names in enumerate(subjects):
        for name in filter(None, names):
            rows_of.setdefault(name, []).append(i)
    seed, results = int(torch.randint(2**62, (), generator=gen)), list[Result]()
    for subject, rows in rows_of.items():
        said: dict[str, Sequence[str | None]] = {
            "accuracy": [answers[i] for i in rows],
            "accuracy_of_yes": ["yes"] * len(rows),
            "accuracy_of_the_usual_answer": _usual_answers([(gold[i], options[i]) for i in rows]),
        }
        for metric, texts in said.items():
            right = [is_right(text, gold[i], options[i]) for text, i in zip(texts, rows, strict=True)]
            own_gen = torch.Generator().manual_seed(seed)
            record = accuracy(right, [groups[i] for i in rows], n=n, gen=own_gen)
            results += to_results({subject: record}, split=split, metric=metric, experiment=experiment)
    return results


def _usual_answers(records: Sequence[tuple[str, Options]]) -> list[str]:
    """For each (gold, options) the most frequent answer of the others; of choices the letter."""
    keys = [(options and extract_letter(gold, options)) or normalise(gold) for gold, options in records]
    (first, count), (second, next_count) = [*Counter(keys).most_common(2), ("", 1)][:2]
    # A record's own answer may lose its first place without the record.
    return [second if key == first and count - 1 < next_count else first for key in keys]
