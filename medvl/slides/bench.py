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
_SHORT = 5  # words of a reference answer that are still compared exactly

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
        return "yes or no" if words in (["yes"], ["no"]) else "short"

    @property
    def right(self) -> bool | None:
        """Whether it equals the reference answer (`answers.same_answer`); None where the kind is ""."""
        return answers.same_answer(self.said, self.gold) if self.kind else None


def extract_choice(
    said: str | None, options: choices.Options, gold: str, *, slide: str, missing: bool = False, **rest: Any
) -> ChoiceAnswer:
    """The choice in the text of an answer, by `choice_answers.extract_letter`.

    Args:
        gold: a letter; anything else counts as no reference answer.
        rest: broad, narrow, id, extra.
    """
    lettered = choices.letter_options(options)
    return ChoiceAnswer(
        slide=slide,
        options=lettered,
        gold=gold if gold in lettered else "",
        chosen="" if missing else choice_answers.extract_letter(said, lettered),
        missing=missing,
        said=said or "",
        **rest,
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
            estimates = _point_estimates(
                [rows[i] for i in indices], correct[indices], [categories[i] for i in indices]
            )
            for metric, value, extra in estimates:
                result = Result(
                    what=metric, subject=subject, value=value, n=len(indices), extra=extra, **common
                )
                results.append(result)
        if level != OVERALL:
            macro = _macro_accuracy(correct, subjects, patients, n, _seeded(seed))
            results += accuracy.to_results({level: macro}, what="macro_accuracy", **common)
    return results


def _is_correct(row: ChoiceAnswer) -> bool:
    return bool(row.gold) and row.chosen == row.gold


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _levels(rows: Sequence[ChoiceAnswer]) -> Levels:
    """The rows of every subject; rows without a category of a level are in none of it."""
    overall = {OVERALL: list(range(len(rows)))}
    broad, narrow = dict[str, list[int]](), dict[str, list[int]]()
    for i, row in enumerate(rows):
        if row.broad:
            broad.setdefault(row.broad, []).append(i)
        if row.narrow:
            subject = f"{row.broad} / {row.narrow}" if row.broad else row.narrow
            narrow.setdefault(subject, []).append(i)
    levels = {OVERALL: overall, "broad": broad, "narrow": narrow}
    return {level: dict(sorted(subjects.items())) for level, subjects in levels.items() if subjects}


def _point_estimates(
    rows: Sequence[ChoiceAnswer], correct: np.ndarray, categories: Sequence[str]
) -> list[tuple[str, float, dict[str, Any]]]:
    """[(metric, value, extra)] of the metrics without an interval."""
    total = len(rows)
    by_text = _same_options(rows)
    gold = np.array([_gold_text(row) if by_text else row.gold for row in rows])
    recalls = [correct[gold == answer].mean() for answer in sorted({*gold.tolist()} - {""})]
    balanced = float(np.mean(recalls)) if recalls else math.nan
    # Sorted, so that the order of the rows does not decide between equally frequent letters.
    letters = Counter(sorted(row.gold for row in rows if row.gold))
    best_letter, best_count = letters.most_common(1)[0] if letters else ("", 0)
    random = sum(sorted(1 / len(row.options) for row in rows)) / total  # sorted: sums of floats depend on it
    return [
        ("balanced_accuracy", balanced, {"by": "text" if by_text else "letter", "classes": len(recalls)}),
        ("best_letter", best_count / total, {"letter": best_letter}),
        ("majority", _majority(rows, categories), {}),
        ("random", random, {}),
        ("invalid", sum(not row.chosen and not row.missing for row in rows), {}),
        ("missing", sum(row.missing for row in rows), {}),
        ("without_gold", sum(not row.gold for row in rows), {}),
    ]


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
    options = {frozenset(map(choices.comparable_text, row.options.values())) for row in rows}
    return len(options) == 1


def _gold_text(row: ChoiceAnswer) -> str:
    return choices.comparable_text(row.options[row.gold]) if row.gold else ""


def _macro_accuracy(
    correct: np.ndarray,
    subjects: Mapping[str, Sequence[int]],
    patients: Sequence[str],
    n: int,
    gen: torch.Generator,
) -> accuracy.Accuracy:
    """Mean accuracy over c categories. A resampled patient brings its rows of all categories."""
    codes, count = metrics.group_codes(patients)
    c = len(subjects)
    table = np.zeros((count, 2 * c))  # per patient: right answers of each category, then questions of each
    for column, indices in enumerate(subjects.values()):
        np.add.at(table[:, column], codes[indices], correct[indices])
        np.add.at(table[:, c + column], codes[indices], 1)
    table = table[np.lexsort(table.T)]  # the same for any order of the rows
    table = table[table.any(1)]  # patients without a category of this level

    def means(counts: np.ndarray, _: np.ndarray, weights: np.ndarray | None) -> dict[str, np.ndarray]:
        if weights is None:
            hits, sizes = np.split(np.ones((1, len(counts))) @ counts, 2, axis=1)
            return {"": metrics.ratio(hits, sizes)[0]}
        hits, sizes = np.split(weights.T @ counts, 2, axis=1)
        return {"": metrics.ratio(hits, sizes)}

    questions = int(table[:, c:].sum())
    if len(table) < 2:
        value = float(means(table, table, None)[""].mean())
        return accuracy.Accuracy(value=value, low=math.nan, high=math.nan, n=questions, groups=len(table))
    interval = metrics.bootstrap(means, table, np.zeros_like(table), range(len(table)), n=n, gen=gen)[""]
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
    results = score_texts([row.said for row in rows], [row.gold for row in rows], **common)
    seed = int(torch.randint(2**62, (), generator=gen))  # as in `score_choices`
    for kind, subject in (("yes or no", "yes or no"), ("short", "short answers")):
        members = [row for row in rows if row.kind == kind]
        if not members:
            continue
        correct = [bool(row.right) for row in members]
        patients = [names.case_of(row.slide) for row in members]
        micro = accuracy.accuracy(correct, patients, n=n, gen=_seeded(seed))
        results += accuracy.to_results({subject: micro}, **common)
        golds = Counter(answers.normalise(row.gold) for row in members)
        majority = golds.most_common(1)[0][1] / len(members)
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
        values.setdefault(result.subject, {})[result.what] = result.value
    content = {
        "source": dict(source),
        **facts,
        "metrics": values,
        "results": [asdict(result) for result in results],
        "predictions": [{"right": _is_correct(row), **asdict(row)} for row in rows],
    }
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
    bounds = {r.subject: {"low": r.low, "high": r.high, "n": r.n} for r in results if r.what == "accuracy"}
    lines = []
    for level, subjects in levels.items():
        for subject in subjects:
            if subject not in bounds:
                continue
            line: dict[str, Any] = {"level": level, "category": subject}
            numbers = {**values[subject], **bounds[subject]}
            for column in ("n", *_COLUMNS):
                number = numbers.get(column, math.nan)
                line[column] = "" if math.isnan(number) else number
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


# Free text ------------------------------------------------------------------------------------------------------------------------------
def bleu(said: Sequence[str], gold: Sequence[str], most: int = 4) -> tuple[float, ...]:
    """BLEU-1 to BLEU-`most` of a corpus, one reference each: counts of all texts are added up before the division, no smoothing.

    Words are runs of letters and digits in lower case. BLEU-k is the geometric mean of the precisions of 1 to k words, a run of words
    counting at most as often as it is in the reference, times exp(1 - gold words / said words) where less is said.

    Raises:
        ValueError: no texts, or another number of them.
    Source: Papineni et al. 2002, doi:10.3115/1073083.1073135.
    """
    pairs = _pairs("bleu", said, gold)
    hits, totals = [0] * most, [0] * most
    for s, g in pairs:
        for k in range(most):
            mine, theirs = (Counter(tuple(t[i : i + k + 1]) for i in range(len(t) - k)) for t in (s, g))
            hits[k], totals[k] = hits[k] + (mine & theirs).total(), totals[k] + mine.total()
    length, wanted = (sum(len(p[i]) for p in pairs) for i in (0, 1))
    short = min(0.0, 1 - wanted / length) if length else -math.inf
    logs = [math.log(h / t) if h else -math.inf for h, t in zip(hits, totals, strict=True)]
    return tuple(math.exp(short + sum(logs[: k + 1]) / (k + 1)) for k in range(most))


def rouge_l(said: Sequence[str], gold: Sequence[str], beta: float = 1.0) -> tuple[float, ...]:
    """ROUGE-L of each text: the F-measure of the words of the longest common subsequence, (1 + b^2) P R / (R + b^2 P); words as `bleu`.

    Args:
        beta: 1 as the rouge-score package has it; caption benchmarks take 1.2.
    Raises:
        ValueError: as `bleu`.
    Source: Lin 2004, ROUGE, https://aclanthology.org/W04-1013.
    """
    out = []
    for s, g in _pairs("rouge_l", said, gold):
        common = _common(s, g)
        p, r = (common / max(len(t), 1) for t in (s, g))
        out.append((1 + beta**2) * p * r / (r + beta**2 * p) if common else 0.0)
    return tuple(out)


def score_texts(
    said: Sequence[str], gold: Sequence[str], *, subject: str = "", split: str = "", experiment: str = ""
) -> list[Result]:
    """Rows "bleu_1" to "bleu_4" and "rouge_l" (the mean). They count words, not truth: "no" may be one word of twenty."""
    values = {f"bleu_{k}": v for k, v in enumerate(bleu(said, gold), 1)} | {
        "rouge_l": math.fsum(rouge_l(said, gold)) / len(said)
    }
    return [
        Result(what=what, subject=subject, split=split, value=v, n=len(said), experiment=experiment)
        for what, v in values.items()
    ]


def _pairs(what: str, said: Sequence[str], gold: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    if not said or len(said) != len(gold) or isinstance(said, str):
        raise ValueError(
            f"{what}: needs a written text for each that is said, and at least one, got {len(said)} said and {len(gold)}"
        )
    words = lambda text: re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    return [(words(s), words(g)) for s, g in zip(said, gold, strict=True)]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table being the bits of one number (Crochemore et al. 2001)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hit = row & places.get(word, 0)
        row = (row + hit) | (row - hit)
    return len(a) - (row & full).bit_count()
