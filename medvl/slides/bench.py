"""Scores of answers about slides: of choices by category, with intervals and baselines, and of free text."""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict, field, frozen

from medvl.base import files
from medvl.evaluation import accuracy, answers, choice_answers, choices, metrics
from medvl.evaluation.results import Result
from medvl.slides import names

OVERALL = "overall"
_COLUMNS = (  # of benchmark_categories.csv, after "n"
    "accuracy",
    "low",
    "high",
    "balanced_accuracy",
    "best_letter",
    "majority",
    "random",
    "invalid",
    "missing",
    "without_gold",
)
# Longest reference answer, in words, that is compared exactly: beyond it two texts that mean the same are
# rarely equal, and only BLEU and ROUGE-L compare them.
_SHORT = 5

Levels = dict[str, dict[str, list[int]]]  # {level: {subject: indices of its rows}}


@frozen(kw_only=True)
class ChoiceAnswer:
    """The answer to a multiple-choice question, with the reference answer."""

    slide: str  # a slide, or a patient; rows of one patient are resampled together
    options: Mapping[str, str]  # letter -> text
    gold: str  # letter; "" where the file names none clearly, then no choice is right
    chosen: str = ""  # letter; "" where the answer chooses none
    broad: str = ""  # categories
    narrow: str = ""
    missing: bool = False  # the slide had no features, so that the question was not asked
    said: str = ""
    id: str = ""
    extra: dict[str, Any] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        letters = [letter for letter in (self.gold, self.chosen) if letter]
        if not self.options or any(letter not in self.options for letter in letters):
            got = f"gold {self.gold!r}, chosen {self.chosen!r}, options {', '.join(self.options) or 'none'}"
            raise ValueError(
                'ChoiceAnswer: gold and chosen must be letters of the options, or "" for none, '
                f"got {got} ({self.id})"
            )
        if self.missing and self.chosen:
            raise ValueError(
                f"ChoiceAnswer: what is missing was not asked, got chosen {self.chosen!r} ({self.id})"
            )


@frozen(kw_only=True)
class OpenAnswer:
    """The answer to an open question, with the reference answer."""

    slide: str  # as of a ChoiceAnswer
    question: str
    gold: str
    said: str = ""  # "" where the slide had no features
    missing: bool = False
    id: str = ""
    broad: str = ""
    narrow: str = ""

    @property
    def kind(self) -> str:
        """Of the reference answer: "yes or no", "short" (up to five words), or "" for longer ones."""
        words = answers.normalise(self.gold).split()
        if not answers.has_words(self.gold) or len(words) > _SHORT:
            return ""
        if words in (["yes"], ["no"]):
            return "yes or no"
        return "short"

    @property
    def right(self) -> bool | None:
        """Whether it equals the reference answer (`answers.same_answer`); None where the kind is ""."""
        if not self.kind:
            return None
        return answers.same_answer(self.said, self.gold)


def extract_choice(
    answer: str | None,
    options: choices.Options,
    gold: str,
    *,
    slide: str,
    missing: bool = False,
    **fields: Any,
) -> ChoiceAnswer:
    """The choice in the text of an answer, by `choice_answers.extract_letter`.

    Args:
        gold: a letter; anything else counts as no reference answer.
        fields: broad, narrow, id, extra.
    """
    lettered = choices.letter_options(options)
    # A question that was not asked has no choice, even if a text is given: it counts as missing.
    chosen = ""
    if not missing:
        chosen = choice_answers.extract_letter(answer, lettered)
    return ChoiceAnswer(
        slide=slide,
        options=lettered,
        gold=gold if gold in lettered else "",
        chosen=chosen,
        missing=missing,
        said=answer or "",
        **fields,
    )


# Choices ------------------------------------------------------------------------------------------------
def score_choices(
    rows: Sequence[ChoiceAnswer],
    *,
    split: str = "",
    experiment: str = "",
    n: int = 1000,
    gen: torch.Generator,
) -> list[Result]:
    """Scores of choices: overall, by broad category ("Diagnosis") and by narrow one ("Diagnosis / Grading").

    All rows count; an answer without a choice or without features is wrong. For each subject:
    - "accuracy" with its 95 % interval, which resamples whole patients (slides, where names are not TCGA's);
      "overall" is the mean over questions (micro).
    - "balanced_accuracy": mean recall over the reference answers: by text where all rows have the same
      options (a task), else by letter. Rows without a reference answer are left out.
    - Baselines: "best_letter", the most frequent letter given to every question; "majority", the most
      frequent text where all rows have the same options, overall where this is so in every category;
      "random", the mean of 1 / number of options.
    - "invalid", "missing" and "without_gold": numbers of rows. A missing row is not also invalid.
    And "macro_accuracy" of the subjects "broad" and "narrow": the mean over categories, with its interval.

    Args:
        n: bootstrap replicates of the intervals.
    Returns:
        the same results for any order of the rows.
    Raises:
        ValueError: no rows, n below 1.
    """
    if not rows:
        raise ValueError("score_choices: needs at least one answer")
    common: dict[str, Any] = {"split": split, "experiment": experiment}
    correct = np.array([_is_correct(row) for row in rows])
    # Several slides of a patient are not independent: intervals draw patients.
    patients = [names.case_of(row.slide) for row in rows]
    categories = [row.narrow or row.broad for row in rows]
    # Every interval starts from this seed: it then depends on its own rows only, not on the other subjects.
    seed = int(torch.randint(2**62, (), generator=gen))
    results = []
    for level, subjects in _levels(rows).items():
        for subject, indices in subjects.items():
            groups = [patients[i] for i in indices]
            micro = accuracy.accuracy(correct[indices], groups, n=n, gen=_seeded(seed))
            results += accuracy.to_results({subject: micro}, **common)
            members = [rows[i] for i in indices]
            member_categories = [categories[i] for i in indices]
            for metric, value, extra in _point_estimates(members, correct[indices], member_categories):
                result = Result(
                    what=metric, subject=subject, value=value, n=len(indices), extra=extra, **common
                )
                results.append(result)
        if level != OVERALL:  # it has one subject: a mean over it would be its accuracy again
            macro = _macro_accuracy(correct, subjects, patients, n, _seeded(seed))
            results += accuracy.to_results({level: macro}, metric="macro_accuracy", **common)
    return results


def _is_correct(row: ChoiceAnswer) -> bool:
    return bool(row.gold) and row.chosen == row.gold


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _levels(rows: Sequence[ChoiceAnswer]) -> Levels:
    """The rows of every subject; rows without a category of a level are in none of it."""
    overall = {OVERALL: list(range(len(rows)))}
    broad = dict[str, list[int]]()
    narrow = dict[str, list[int]]()
    for i, row in enumerate(rows):
        if row.broad:
            broad.setdefault(row.broad, []).append(i)
        if row.narrow:
            # One narrow name may be in several broad categories: the subject names both.
            subject = row.narrow
            if row.broad:
                subject = f"{row.broad} / {row.narrow}"
            narrow.setdefault(subject, []).append(i)
    levels = {OVERALL: overall}
    if broad:
        levels["broad"] = dict(sorted(broad.items()))
    if narrow:
        levels["narrow"] = dict(sorted(narrow.items()))
    return levels


def _point_estimates(
    rows: Sequence[ChoiceAnswer], correct: np.ndarray, categories: Sequence[str]
) -> list[tuple[str, float, dict[str, Any]]]:
    """[(metric, value, extra)] of the metrics without an interval."""
    total = len(rows)
    # Of a task, all questions have the same options in whatever order: the text is the class. Where the
    # options differ there are about as many texts as questions, and only the letters recur.
    if _same_options(rows):
        by, classes = "text", [_gold_text(row) for row in rows]
    else:
        by, classes = "letter", [row.gold for row in rows]
    recalls = _recalls(classes, correct)
    balanced = math.nan
    if recalls:
        balanced = float(np.mean(recalls))

    # Sorted, so that the order of the rows does not decide between equally frequent letters.
    letters = Counter(sorted(row.gold for row in rows if row.gold))
    best_letter, best_count = "", 0
    if letters:
        best_letter, best_count = letters.most_common(1)[0]

    chances = sorted(1 / len(row.options) for row in rows)  # sorted: sums of floats depend on the order
    invalid = sum(not row.chosen and not row.missing for row in rows)
    missing = sum(row.missing for row in rows)
    without_gold = sum(not row.gold for row in rows)
    return [
        ("balanced_accuracy", balanced, {"by": by, "classes": len(recalls)}),
        ("best_letter", best_count / total, {"letter": best_letter}),
        ("majority", _majority(rows, categories), {}),
        ("random", sum(chances) / total, {}),
        ("invalid", invalid, {}),
        ("missing", missing, {}),
        ("without_gold", without_gold, {}),
    ]


def _recalls(classes: Sequence[str], correct: np.ndarray) -> list[np.floating]:
    """Share of right answers of each class, sorted by class; "" is none."""
    names_of_rows = np.array(classes)
    recalls = []
    for name in sorted({*classes} - {""}):
        recalls.append(correct[names_of_rows == name].mean())
    return recalls


def _majority(rows: Sequence[ChoiceAnswer], categories: Sequence[str]) -> float:
    """Accuracy of giving the most frequent text of each category; NaN if the options of a category differ."""
    by_category: dict[str, list[ChoiceAnswer]] = {}
    for row, category in zip(rows, categories, strict=True):
        by_category.setdefault(category, []).append(row)
    hits = 0
    for members in by_category.values():
        if not _same_options(members):
            return math.nan
        texts = [_gold_text(row) for row in members]
        counts = Counter(text for text in texts if text)
        hits += max(counts.values(), default=0)
    return hits / len(rows)


def _same_options(rows: Sequence[ChoiceAnswer]) -> bool:
    """Whether all rows have the same options, in any order."""
    option_sets = set()
    for row in rows:
        texts = map(choices.comparable_text, row.options.values())
        option_sets.add(frozenset(texts))
    return len(option_sets) == 1


def _gold_text(row: ChoiceAnswer) -> str:
    if not row.gold:
        return ""
    return choices.comparable_text(row.options[row.gold])


def _macro_accuracy(
    correct: np.ndarray,
    subjects: Mapping[str, Sequence[int]],
    patients: Sequence[str],
    n: int,
    gen: torch.Generator,
) -> accuracy.Accuracy:
    """Mean accuracy over c categories, with its interval.

    Patients are resampled and not rows: a patient brings its rows of all categories, and rows of one patient
    are not independent.
    """
    codes, count = metrics.group_codes(patients)
    c = len(subjects)
    table = np.zeros((count, 2 * c))  # per patient: right answers of each category, then questions of each
    for column, indices in enumerate(subjects.values()):
        np.add.at(table[:, column], codes[indices], correct[indices])
        np.add.at(table[:, c + column], codes[indices], 1)
    # The bootstrap draws patients by their position. Sorted by content, the draws are the same for any order
    # of the rows.
    table = table[np.lexsort(table.T)]
    table = table[table.any(1)]  # leaves out patients without a category of this level

    def means(counts: np.ndarray, _: np.ndarray, weights: np.ndarray | None) -> dict[str, np.ndarray]:
        """Accuracy of each category: [c], or [replicates, c] by weights [patients, replicates]."""
        if weights is None:
            totals = np.ones((1, len(counts))) @ counts
            hits, sizes = np.split(totals, 2, axis=1)
            return {"": metrics.ratio(hits, sizes)[0]}
        totals = weights.T @ counts
        hits, sizes = np.split(totals, 2, axis=1)
        return {"": metrics.ratio(hits, sizes)}

    questions = int(table[:, c:].sum())
    if len(table) < 2:  # one patient cannot be resampled: there is no interval
        value = float(means(table, table, None)[""].mean())
        return accuracy.Accuracy(value=value, low=math.nan, high=math.nan, n=questions, groups=len(table))
    # The counts of a patient are all that `means` needs; the second table of `bootstrap` stays empty.
    unused = np.zeros_like(table)
    interval = metrics.bootstrap(means, table, unused, range(len(table)), n=n, gen=gen)[""]
    return accuracy.Accuracy(
        value=interval.mean, low=interval.mean_low, high=interval.mean_high, n=questions, groups=len(table)
    )


# Open questions -----------------------------------------------------------------------------------------
def score_open_answers(
    rows: Sequence[OpenAnswer], *, split: str = "", experiment: str = "", n: int = 1000, gen: torch.Generator
) -> list[Result]:
    """Scores of open answers.

    "bleu_1" to "bleu_4" and "rouge_l" over all rows. For the subjects "yes or no" and "short answers" also
    "accuracy" with its 95 % interval, which resamples whole patients, and "majority": the accuracy of giving
    the most frequent reference answer to every question.

    Raises:
        ValueError: no rows.
    """
    common: dict[str, Any] = {"split": split, "experiment": experiment}
    texts = [row.said for row in rows]
    references = [row.gold for row in rows]
    results = score_texts(texts, references, **common)
    seed = int(torch.randint(2**62, (), generator=gen))  # as in `score_choices`
    for kind, subject in (("yes or no", "yes or no"), ("short", "short answers")):
        members = [row for row in rows if row.kind == kind]
        if not members:
            continue
        correct = [bool(row.right) for row in members]
        patients = [names.case_of(row.slide) for row in members]
        micro = accuracy.accuracy(correct, patients, n=n, gen=_seeded(seed))
        results += accuracy.to_results({subject: micro}, **common)
        # Normalised, as "Yes." and "yes" are one answer here as they are in `same_answer`.
        golds = Counter(answers.normalise(row.gold) for row in members)
        _, most_frequent = golds.most_common(1)[0]
        majority = most_frequent / len(members)
        results.append(Result(what="majority", subject=subject, value=majority, n=len(members), **common))
    return results


# Files --------------------------------------------------------------------------------------------------
def write_benchmark(
    folder: files.PathLike,
    rows: Sequence[ChoiceAnswer],
    results: Sequence[Result],
    *,
    source: Mapping[str, Any],
    facts: Mapping[str, Any],
    written: Sequence[OpenAnswer] = (),
) -> dict[str, Any]:
    """Write `benchmark_results.json` and `benchmark_categories.csv`; returns the content of the first.

    {"source", ...facts, "metrics": {subject: {metric: value}}, "results": all fields of each result,
    "predictions": one per row, and "open_predictions" where there are open questions}. A number that is not
    finite is null, in the CSV an empty cell.

    Args:
        results: of `score_choices`, with others if wanted.
        source: the file of questions; needs its "sha256", as benchmarks of one name differ.
        facts: more to record, such as the experiment and the commit.
        written: answers to open questions.
    Raises:
        ValueError: source without "sha256", or facts with a name of the other parts.
    """
    reserved = {"source", "metrics", "results", "predictions", "open_predictions"}
    if not source.get("sha256") or reserved & facts.keys():
        raise ValueError(
            f'write_benchmark: source must have "sha256", and facts none of {sorted(reserved)}, '
            f"got {sorted(source)}, {sorted(facts)}"
        )
    values: dict[str, dict[str, float]] = {}
    for result in results:
        metrics_of_subject = values.setdefault(result.subject, {})
        metrics_of_subject[result.what] = result.value
    content = {
        "source": dict(source),
        **facts,
        "metrics": values,
        "results": [asdict(result) for result in results],
        "predictions": [{"right": _is_correct(row), **asdict(row)} for row in rows],
    }
    # Only where there are open questions: a benchmark of choices alone has no such key.
    if written:
        predictions = [{"right": row.right, "kind": row.kind, **asdict(row)} for row in written]
        content["open_predictions"] = predictions
    content = _json_ready(content)
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    files.write_text(Path(folder) / "benchmark_results.json", text)

    lines = _category_lines(_levels(rows), results, values)
    columns = ("level", "category", "n", *_COLUMNS)
    files.write_csv(Path(folder) / "benchmark_categories.csv", lines, columns)
    return content


def _category_lines(
    levels: Levels, results: Sequence[Result], values: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """One line per subject with an accuracy; numbers that are not there or NaN are empty cells."""
    # `values` has one number of each metric; the interval and the number of questions are the accuracy's.
    bounds = {}
    for result in results:
        if result.what == "accuracy":
            bounds[result.subject] = {"low": result.low, "high": result.high, "n": result.n}
    lines = []
    for level, subjects in levels.items():
        for subject in subjects:
            if subject not in bounds:
                continue
            line: dict[str, Any] = {"level": level, "category": subject}
            numbers = {**values[subject], **bounds[subject]}
            for column in ("n", *_COLUMNS):
                number = numbers.get(column, math.nan)
                if math.isnan(number):
                    line[column] = ""
                else:
                    line[column] = number
            lines.append(line)
    return lines


def _json_ready(value: Any) -> Any:
    """A copy in which numbers that are not finite, which JSON does not know, are None."""
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# Free text ----------------------------------------------------------------------------------------------
def bleu(texts: Sequence[str], references: Sequence[str], longest: int = 4) -> tuple[float, ...]:
    """BLEU-1 to BLEU-`longest` of a corpus with one reference each, without smoothing.

    Words are runs of letters and digits in lower case. BLEU-k is the geometric mean of the precisions of runs
    of 1 to k words, a run counting at most as often as it is in the reference, times the brevity penalty
    exp(1 - words of the references / words of the texts) where the texts are shorter. Counts of all texts are
    added up before the division.

    Raises:
        ValueError: no texts, or another number of references.
    Source: Papineni et al. 2002, doi:10.3115/1073083.1073135.
    """
    pairs = _word_pairs("bleu", texts, references)
    hits, totals = [0] * longest, [0] * longest  # of runs of 1, 2, ... words
    text_length = reference_length = 0
    for words, reference in pairs:
        text_length += len(words)
        reference_length += len(reference)
        for k in range(longest):
            runs = _count_runs(words, k + 1)
            shared = runs & _count_runs(reference, k + 1)
            hits[k] += shared.total()
            totals[k] += runs.total()
    # The geometric mean is taken of logarithms. No words, or a precision of 0, is -inf: BLEU is then 0.
    penalty = -math.inf
    if text_length:
        penalty = min(0.0, 1 - reference_length / text_length)
    logs = []
    for hit, total in zip(hits, totals, strict=True):
        logs.append(math.log(hit / total) if hit else -math.inf)
    return tuple(math.exp(penalty + sum(logs[:k]) / k) for k in range(1, longest + 1))


def rouge_l(texts: Sequence[str], references: Sequence[str], beta: float = 1.0) -> tuple[float, ...]:
    """ROUGE-L of each text: the F-measure of the words of the longest common subsequence.

    (1 + b^2) P R / (R + b^2 P), with P the share of the text's words and R that of the reference's. Words are
    those of `bleu`.

    Args:
        beta: 1 as the rouge-score package has it; caption benchmarks take 1.2.
    Raises:
        ValueError: as `bleu`.
    Source: Lin 2004, ROUGE, https://aclanthology.org/W04-1013.
    """
    scores = []
    for words, reference in _word_pairs("rouge_l", texts, references):
        common = _common_length(words, reference)
        if not common:  # P and R are both 0, and F would be 0 / 0
            scores.append(0.0)
            continue
        precision = common / len(words)
        recall = common / len(reference)
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    return tuple(scores)


def score_texts(
    texts: Sequence[str],
    references: Sequence[str],
    *,
    subject: str = "",
    split: str = "",
    experiment: str = "",
) -> list[Result]:
    """Results "bleu_1" to "bleu_4" and "rouge_l" (the mean over texts).

    They count words, not truth: "no" may be one word of twenty.
    """
    values = {}
    for k, score in enumerate(bleu(texts, references), 1):
        values[f"bleu_{k}"] = score
    values["rouge_l"] = math.fsum(rouge_l(texts, references)) / len(texts)
    results = []
    for metric, value in values.items():
        result = Result(
            what=metric, subject=subject, split=split, value=value, n=len(texts), experiment=experiment
        )
        results.append(result)
    return results


def _word_pairs(
    caller: str, texts: Sequence[str], references: Sequence[str]
) -> list[tuple[list[str], list[str]]]:
    """(words of a text, words of its reference) of each text."""
    # A text in place of a list would be scored letter by letter.
    if not texts or len(texts) != len(references) or isinstance(texts, str):
        raise ValueError(
            f"{caller}: needs a written text for each that is said, and at least one, "
            f"got {len(texts)} said and {len(references)}"
        )
    pairs = []
    for text, reference in zip(texts, references, strict=True):
        pairs.append((_words(text), _words(reference)))
    return pairs


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def _count_runs(words: Sequence[str], k: int) -> Counter[tuple[str, ...]]:
    """How often each run of k words is in a text."""
    return Counter(tuple(words[i : i + k]) for i in range(len(words) - k + 1))


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    A row of the usual table is the bits of one number, so that reports of hundreds of words cost little.
    Source: Crochemore et al. 2001.
    """
    places: dict[str, int] = {}  # word -> the bits of its positions in a
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hit = row & places.get(word, 0)
        row = (row + hit) | (row - hit)
    # Each bit that became 0 is a word of the subsequence. The sums carry beyond the bits of a: cut them off.
    return len(a) - (row & full).bit_count()
