"""Scores of answers about slides: choices by category with intervals and baselines, free text by overlap of words, and their files."""

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
from medvl.evaluation import accuracy, answers, choices, metrics
from medvl.evaluation.results import Result
from medvl.slides import names

OVERALL = "overall"
_TABLE = (
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


@frozen(kw_only=True)
class ChoiceAnswer:
    """What was chosen in a multiple-choice question, beside the written answer."""

    slide: str  # whose rows belong together: a slide, or a patient
    options: Mapping[str, str]  # letter -> text
    gold: str  # letter, "" where the file says none clearly; then nothing is right
    chosen: str = ""  # letter, "" where the answer chooses none
    broad: str = ""  # categories
    narrow: str = ""
    missing: bool = False  # the slide's features were not there, so it was not asked
    said: str = ""
    id: str = ""
    extra: dict[str, Any] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if not self.options or any(
            letter and letter not in self.options for letter in (self.gold, self.chosen)
        ):
            got = f"gold {self.gold!r}, chosen {self.chosen!r}, options {', '.join(self.options) or 'none'}"
            raise ValueError(
                f'ChoiceAnswer: gold and chosen must be letters of the options, or "" for none, got {got} ({self.id})'
            )
        if self.missing and self.chosen:
            raise ValueError(
                f"ChoiceAnswer: what is missing was not asked, got chosen {self.chosen!r} ({self.id})"
            )


@frozen(kw_only=True)
class OpenAnswer:
    """An open question's answer beside the written one."""

    slide: str  # whose rows belong together
    question: str
    gold: str
    said: str = ""  # "" where the slide's features were not there
    missing: bool = False
    id: str = ""
    broad: str = ""
    narrow: str = ""

    @property
    def kind(self) -> str:
        """ "yes or no", "short" (up to five words), or "" for what is too long to be the same twice."""
        words = answers.normalise(self.gold).split()
        if not answers.has_words(self.gold) or len(words) > 5:
            return ""
        return "yes or no" if words in (["yes"], ["no"]) else "short"

    @property
    def right(self) -> bool | None:
        """Whether it says what the written answer says (`answers.same_answer`); None where the kind is ""."""
        return answers.same_answer(self.said, self.gold) if self.kind else None


def extract_choice(
    said: str | None, options: choices.Options, gold: str, *, slide: str, missing: bool = False, **rest: Any
) -> ChoiceAnswer:
    """The record of an answer in words: `choices.extract_letter` says what it chooses.

    Args:
        gold: the letter; anything that is no letter of the options counts as no written answer.
        rest: broad, narrow, id, extra.
    """
    table = choices.letter_options(options)
    chosen = "" if missing else choices.extract_letter(said, table)
    gold = gold if gold in table else ""
    return ChoiceAnswer(
        slide=slide, options=table, gold=gold, chosen=chosen, missing=missing, said=said or "", **rest
    )


def score_choices(
    rows: Sequence[ChoiceAnswer],
    *,
    split: str = "",
    experiment: str = "",
    n: int = 1000,
    gen: torch.Generator,
) -> list[Result]:
    """How good the choices are: overall, by broad category ("Diagnosis") and by narrow one ("Diagnosis / Grading").

    Every row counts, also where the answer chose nothing or the features were missing: these are wrong. For each subject:
    - "accuracy" with its 95 % interval, which draws whole patients (slides, where names are not TCGA's); "overall" is the mean over
      questions (micro).
    - "balanced_accuracy": the mean recall over the written answers, by text where all rows have the same options (a task), else by letter;
      rows without a written answer are not in it.
    - Baselines: "best_letter", the letter that is written most often given to every question; "majority", the text that is written most
      often where all rows have the same options, overall where every category has; "random", the mean of 1 / options.
    - "invalid", "missing" and "without_gold": numbers of rows. A missing row is not invalid too.
    And "macro_accuracy" of the subjects "broad" and "narrow": the mean over categories, its interval as well.

    Args:
        n: replicates of the intervals.
    Returns:
        the same whatever the order of the rows.
    Raises:
        ValueError: no rows, n below 1.
    """
    if not rows:
        raise ValueError("score_choices: needs at least one answer")
    common: dict[str, Any] = {"split": split, "experiment": experiment}
    right, patients = (
        np.array([bool(r.gold) and r.chosen == r.gold for r in rows]),
        [names.case_of(r.slide) for r in rows],
    )
    seed = int(torch.randint(2**62, (), generator=gen))
    draw = lambda: torch.Generator().manual_seed(seed)
    out = []
    for level, subjects in _levels(rows).items():
        for subject, where in subjects.items():
            part = [rows[i] for i in where]
            found = accuracy.accuracy(right[where], [patients[i] for i in where], n=n, gen=draw())
            out += accuracy.to_results({subject: found}, **common)
            plain = _plain(part, right[where], [rows[i].narrow or rows[i].broad for i in where])
            out += [
                Result(what=what, subject=subject, value=v, n=len(part), extra=extra, **common)
                for what, v, extra in plain
            ]
        if level != OVERALL:
            found = _macro(right, subjects, patients, n, draw())
            out += accuracy.to_results({level: found}, what="macro_accuracy", **common)
    return out


def score_open_answers(
    rows: Sequence[OpenAnswer], *, split: str = "", experiment: str = "", n: int = 1000, gen: torch.Generator
) -> list[Result]:
    """How good the answers of open questions are.

    "bleu_1" to "bleu_4" and "rouge_l" over all rows. Of the subjects "yes or no" and "short answers" also "accuracy" with its 95 %
    interval, which draws whole patients, and "majority": the accuracy of giving the commonest written answer to every question.

    Raises:
        ValueError: no rows.
    """
    out = score_texts([r.said for r in rows], [r.gold for r in rows], split=split, experiment=experiment)
    seed = int(torch.randint(2**62, (), generator=gen))
    for kind, subject in (("yes or no", "yes or no"), ("short", "short answers")):
        part = [r for r in rows if r.kind == kind]
        if not part:
            continue
        common = Counter(answers.normalise(r.gold) for r in part).most_common(1)[0][1]
        draw = torch.Generator().manual_seed(seed)
        found = accuracy.accuracy(
            [bool(r.right) for r in part], [names.case_of(r.slide) for r in part], n=n, gen=draw
        )
        out += accuracy.to_results({subject: found}, split=split, experiment=experiment)
        out.append(
            Result(
                what="majority",
                subject=subject,
                value=common / len(part),
                n=len(part),
                split=split,
                experiment=experiment,
            )
        )
    return out


def write_benchmark(
    folder: files.PathLike,
    rows: Sequence[ChoiceAnswer],
    results: Sequence[Result],
    *,
    source: Mapping[str, Any],
    facts: Mapping[str, Any],
    written: Sequence[OpenAnswer] = (),
) -> dict[str, Any]:
    """Write `benchmark_results.json` and `benchmark_categories.csv` into a folder; returns what the first holds.

    {"source", ...facts, "metrics": {subject: {metric: value}}, "results": all of each result, "predictions": one per row, and
    "open_predictions" where there are open questions}; a number that does not exist is null, in the CSV an empty cell.

    Args:
        results: of `score_choices`, and others if wanted.
        source: what was answered; "sha256" of its file must be there, as benchmarks of one name differ.
        facts: more to keep, such as the experiment and the commit.
        written: the answers of open questions.
    Raises:
        ValueError: source without "sha256", or facts that are named like the parts.
    """
    parts = {"source", "metrics", "results", "predictions", "open_predictions"}
    if not source.get("sha256") or parts & facts.keys():
        raise ValueError(
            f'write_benchmark: source must have "sha256", and facts none of {sorted(parts)}, got {sorted(source)}, {sorted(facts)}'
        )
    table: dict[str, dict[str, float]] = {}
    for r in results:
        table.setdefault(r.subject, {})[r.what] = r.value
    keep = lambda r: {"right": bool(r.gold) and r.chosen == r.gold, **asdict(r)}
    out = {
        "source": dict(source),
        **facts,
        "metrics": table,
        "results": [asdict(r) for r in results],
        "predictions": [*map(keep, rows)],
    }
    if written:
        out["open_predictions"] = [{"right": r.right, "kind": r.kind, **asdict(r)} for r in written]
    out = _json(out)
    files.write_text(
        Path(folder) / "benchmark_results.json",
        json.dumps(out, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
    )
    bounds = {r.subject: {"low": r.low, "high": r.high, "n": r.n} for r in results if r.what == "accuracy"}
    lines = []
    for level, subjects in _levels(rows).items():
        for subject in (s for s in subjects if s in bounds):
            values = table[subject] | bounds[subject]
            cells = {k: "" if math.isnan(v := values.get(k, math.nan)) else v for k in ("n", *_TABLE)}
            lines.append({"level": level, "category": subject, **cells})
    files.write_csv(Path(folder) / "benchmark_categories.csv", lines, ("level", "category", "n", *_TABLE))
    return out


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _levels(rows: Sequence[ChoiceAnswer]) -> dict[str, dict[str, list[int]]]:
    """{level: {subject: its rows}}; rows without a category of a level are in none of it."""
    out: dict[str, dict[str, list[int]]] = {
        OVERALL: {OVERALL: [*range(len(rows))]},
        "broad": {},
        "narrow": {},
    }
    for i, r in enumerate(rows):
        for level, name in (
            ("broad", r.broad),
            ("narrow", " / ".join(filter(None, (r.broad, r.narrow))) if r.narrow else ""),
        ):
            if name:
                out[level].setdefault(name, []).append(i)
    return {level: dict(sorted(subjects.items())) for level, subjects in out.items() if subjects}


def _plain(
    rows: Sequence[ChoiceAnswer], right: np.ndarray, categories: Sequence[str]
) -> list[tuple[str, float, dict[str, Any]]]:
    """(what, value, extra) of what has no interval."""
    task, total = _is_task(rows), len(rows)
    gold = [_text(r) if task else r.gold for r in rows]
    recalls = [right[[g == c for g in gold]].mean() for c in sorted({*gold} - {""})]
    letters = Counter(sorted(r.gold for r in rows if r.gold))
    best = letters.most_common(1)[0] if letters else ("", 0)
    kinds = [[r for r, c in zip(rows, categories, strict=True) if c == name] for name in {*categories}]
    tops = [max(Counter(filter(None, map(_text, k))).values(), default=0) for k in kinds if _is_task(k)]
    return [
        (
            "balanced_accuracy",
            float(np.mean(recalls)) if recalls else math.nan,
            {"by": "text" if task else "letter", "classes": len(recalls)},
        ),
        ("best_letter", best[1] / total, {"letter": best[0]}),
        ("majority", sum(tops) / total if len(tops) == len(kinds) else math.nan, {}),
        ("random", sum(sorted(1 / len(r.options) for r in rows)) / total, {}),
        ("invalid", sum(not r.chosen and not r.missing for r in rows), {}),
        ("missing", sum(r.missing for r in rows), {}),
        ("without_gold", sum(not r.gold for r in rows), {}),
    ]


def _is_task(rows: Sequence[ChoiceAnswer]) -> bool:
    """Whether all rows have the same options, in any order."""
    return len({frozenset(map(choices.comparable_text, r.options.values())) for r in rows}) == 1


def _text(row: ChoiceAnswer) -> str:
    return choices.comparable_text(row.options[row.gold]) if row.gold else ""


def _macro(
    right: np.ndarray,
    subjects: Mapping[str, Sequence[int]],
    patients: Sequence[str],
    n: int,
    gen: torch.Generator,
) -> accuracy.Accuracy:
    """The mean accuracy of categories; drawn patients bring their rows of all categories."""
    codes, k = metrics._codes(patients)
    table = np.zeros((k, 2 * len(subjects)))
    for c, where in enumerate(subjects.values()):
        np.add.at(table[:, c], codes[where], right[where])
        np.add.at(table[:, len(subjects) + c], codes[where], 1)
    table = table[np.lexsort(table.T)]
    table = table[table.any(1)]

    def means(counts: np.ndarray, _: np.ndarray, weights: np.ndarray | None) -> dict[str, np.ndarray]:
        hits, sizes = np.split(
            (np.ones((1, len(counts))) if weights is None else weights.T) @ counts, 2, axis=1
        )
        share = metrics._ratio(hits, sizes)
        return {"": share[0] if weights is None else share}

    rows = int(table[:, len(subjects) :].sum())
    if len(table) < 2:
        value = float(means(table, table, None)[""].mean())
        return accuracy.Accuracy(value=value, low=math.nan, high=math.nan, n=rows, groups=len(table))
    found = metrics.bootstrap(means, table, np.zeros_like(table), range(len(table)), n=n, gen=gen)[""]
    return accuracy.Accuracy(
        value=found.mean, low=found.mean_low, high=found.mean_high, n=rows, groups=len(table)
    )


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
