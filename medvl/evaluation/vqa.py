"""The accuracy of answers about images by one rule, beside what is right without looking at any image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from medvl.evaluation.accuracy import accuracy, to_results
from medvl.evaluation.answers import normalise, same_answer
from medvl.evaluation.choice_answers import extract_letter
from medvl.evaluation.choices import comparable_text
from medvl.evaluation.results import Result

Options = Mapping[str, str] | None  # letter -> text of a question with choices


def is_right(answer: str | None, gold: str, options: Options = None) -> bool:
    """Whether an answer is right: by `answers.same_answer`, or with options by whether it chooses the one that
    gold chooses (`choice_answers.extract_letter`), or another with the same text.

    Raises:
        ValueError: gold has no words, or chooses none of the options.
    """
    if not options:
        return same_answer(answer, gold)
    chosen, meant = extract_letter(answer, options), extract_letter(gold, options)
    if not meant:
        raise ValueError(f"is_right: gold must choose one of {options}, got {gold!r}")
    return bool(chosen) and comparable_text(options[chosen]) == comparable_text(options[meant])


def score_answers(
    answers: Sequence[str | None],
    gold: Sequence[str],
    options: Sequence[Options],
    families: Sequence[str],
    groups: Sequence[Any],
    *,
    split: str,
    experiment: str = "",
    n: int = 1000,
    gen: torch.Generator,
) -> list[Result]:
    """Share of right answers (`is_right`) with its 95 % interval, for "all" and each family ("closed", "open").

    Args:
        groups: the image or case of each answer, drawn as a whole.
    Returns:
        of each of them rows "accuracy", "accuracy_of_yes" (always "yes") and "accuracy_of_the_usual_answer" (the
        most frequent one of the other records); all records count, answered or not.
    """
    usual = _usual_answers(gold, options, families)
    said = {
        "accuracy": answers,
        "accuracy_of_yes": ["yes"] * len(gold),
        "accuracy_of_the_usual_answer": usual,
    }
    seed, rows = int(torch.randint(2**62, (), generator=gen)), list[Result]()
    for metric, texts in said.items():
        right = [is_right(*row) for row in zip(texts, gold, options, strict=True)]
        for subject in ("all", *sorted(set(families))):
            of = [i for i, family in enumerate(families) if subject in ("all", family)]
            own_gen = torch.Generator().manual_seed(seed)
            record = accuracy([right[i] for i in of], [groups[i] for i in of], n=n, gen=own_gen)
            rows += to_results({subject: record}, split=split, metric=metric, experiment=experiment)
    return rows


def _usual_answers(gold: Sequence[str], options: Sequence[Options], families: Sequence[str]) -> list[str]:
    """For each record the most frequent answer of the other ones of its family; of choices the letter."""
    keys = [extract_letter(text, o) if o else normalise(text) for text, o in zip(gold, options, strict=True)]
    counts = {family: Counter[str]() for family in families}
    for family, key in zip(families, keys, strict=True):
        counts[family][key] += 1
    # Two of each family are enough: a record's own answer may lose its first place without the record.
    most = {family: [*counter.most_common(2), ("", 0)] for family, counter in counts.items()}
    usual = []
    for family, key in zip(families, keys, strict=True):
        (first, count), (second, next_count) = most[family][:2]
        usual.append(second if key == first and count - 1 < max(next_count, 1) else first)
    return usual
