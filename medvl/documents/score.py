"""How well answers read pages: precision, recall and F1 of their fields, numbers that no page shows, what was left
out, and whether the text is one; as result rows with intervals by document.

A field is right if it is equal by the rules of `quantities`, never because one text is within another. The
substring accuracies that others publish stand beside, under names that say so.
"""

import functools
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from attrs import asdict, evolve, fields_dict, frozen

from medvl.documents.fields import Diagnosis, Fields, leaves, read_answer
from medvl.documents.quantities import (
    TermMatch,
    holds_term,
    medical_terms,
    normalise_flag,
    numbers_in,
    plain_words,
    same_flag,
    same_term,
    same_unit,
    same_value,
)
from medvl.evaluation import accuracy, metrics
from medvl.evaluation.results import Result

KINDS = ("patient", "diagnoses", "medications", "labs", "vitals", "procedures")
_NGRAM = 12  # words; in JSON of a page no 12 words come twice, as a name or a value is among them


@frozen(kw_only=True)
class Counts:
    """Fields of one kind. A wrong value is both false and missed."""

    right: int = 0
    false: int = 0  # stated, and not what the page says
    missed: int = 0  # on the page, and not stated so
    omitted: int = 0  # of the missed: nothing was stated
    abbreviations: int = 0  # of the right: by an abbreviation or another listed term


@frozen(kw_only=True)
class Coherence:
    """Whether an answer is a text: `value` is 1 for one, 0 for none or for what only repeats itself."""

    empty: bool
    repeated: float  # share of runs of words that came before
    unknown: float  # share of words that no vocabulary has

    @property
    def value(self) -> float:
        return 0.0 if self.empty else (1 - self.repeated) * (1 - self.unknown)


@frozen(kw_only=True)
class PageScore:
    """The score of one answer."""

    document: str  # pages of one document are drawn together by the bootstrap
    counts: dict[str, Counts]  # by kind
    numbers: int  # in the answer
    hallucinated: tuple[str, ...]  # of these, the ones that the page does not show
    substring_terms: tuple[int, int]  # found in the answer by the reference's rule, of how many
    substring_values: tuple[int, int]
    # Words of the running text: in both, in the answer's, in the page's; all 0 where the page has none.
    text_words: tuple[int, int, int]
    coherence: Coherence
    read_as: str  # as `Fields.read_as`


def score_page(
    document: str, gold: Fields, answer: str, page_text: str = "", vocabulary: Collection[str] = ()
) -> PageScore:
    """Compare an answer, JSON or prose, with what its page says.

    Args:
        page_text: all that is printed on the page; without it, only the gold fields may be the source of a
            number.
        vocabulary: words, in lower case, that an answer may use beside those of the page, of the medical lists
            and the common English ones.
    """
    stated = read_answer(answer)
    if stated.read_as == "prose":
        stated = _with_named_diagnoses(stated, gold)
    values = leaves(gold)
    page = "\n".join([page_text, *values.values()])
    # Prose is its own text; of JSON, `text` has what no field took, so that nothing escapes.
    texts = [stated.text] if stated.read_as == "prose" else list(leaves(stated).values())
    numbers = numbers_in("\n".join(texts))
    shown = set(numbers_in(page))
    terms, amounts = _expected_terms(gold)
    # A JSON answer has number and unit apart; as lines, its fields give the substring rule its best chance.
    plain = "\n".join([answer, *_as_lines(stated)])
    return PageScore(
        document=document,
        counts=count_fields(gold, stated),
        numbers=len(numbers),
        hallucinated=tuple(str(number) for number in numbers if number not in shown),
        substring_terms=(sum(holds_substring(plain, term) for term in terms), len(terms)),
        substring_values=(sum(holds_substring(plain, amount) for amount in amounts), len(amounts)),
        text_words=_count_words(gold.text, stated.text),
        coherence=measure_coherence(answer, f"{page}\n{gold.kind}", vocabulary),
        read_as=stated.read_as,
    )


def count_fields(gold: Fields, answer: Fields) -> dict[str, Counts]:
    """Right, false and missed fields by kind.

    Entries of a list are paired by their names, whatever their order; of entries with one name those whose values
    agree best. An entry without a partner counts with all its fields. A value is right if its number is and its
    unit does not contradict; the unit is a field of its own.
    """
    counts = {}
    for kind in KINDS:
        total = Counter[str]()
        for ours, theirs in _pair(kind, _rows(gold, kind), _rows(answer, kind)):
            total.update(_compare(kind, ours, theirs))
        abbreviations = total["abbreviation"]
        counts[kind] = Counts(
            right=total["same"] + abbreviations,
            false=total["wrong"] + total["extra"],
            missed=total["wrong"] + total["omitted"],
            omitted=total["omitted"],
            abbreviations=abbreviations,
        )
    return counts


def _count_words(gold: str, answer: str) -> tuple[int, int, int]:
    """(words in both, of the answer, of the page), each word as often as it comes; their order does not count."""
    if not gold:
        return 0, 0, 0
    ours, theirs = (Counter(plain_words(text).split()) for text in (gold, answer))
    return (ours & theirs).total(), theirs.total(), ours.total()


def holds_substring(text: str, term: str) -> bool:
    """The reference's rule: a term is found wherever its letters are. MI is in "family", "5 mg" in "25 mg"."""
    return term.casefold() in text.casefold()


def measure_coherence(answer: str, page: str, vocabulary: Collection[str] = ()) -> Coherence:
    """How far an answer is a text of known words that does not repeat itself; args as `score_page`."""
    words = re.findall(r"\w+", answer.casefold())
    length = min(_NGRAM, max(1, len(words) // 2))  # a short answer is compared by shorter runs
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    letters = [word for word in _letters(answer) if len(word) > 1]
    known = _common_words() | set(_letters(page))
    unknown = sum(word not in known and word not in vocabulary for word in letters)
    return Coherence(
        empty=not words,
        repeated=1 - len(set(runs)) / len(runs) if words else 0.0,
        unknown=unknown / len(letters) if letters else 0.0,
    )


# Results ----------------------------------------------------------------------------------------------------
def score_results(
    scores: Sequence[PageScore], *, split: str, experiment: str = "", n: int = 1000, gen: torch.Generator
) -> list[Result]:
    """Result rows of a run, with 95 % intervals by bootstrap of whole documents (none with one document).

    Rows: precision, recall and f1 of each kind and of "all"; hallucinated_value_rate (of the numbers stated),
    omission_rate (of the fields on the page), abbreviation_share (of the right fields), text_word_f1 (of the
    words of running text), coherence with its parts, and the reference_substring accuracies. The row's n is the
    number of documents that the value rests on; without any it is nan. A handful of documents decides nothing:
    look at the interval.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("score_results: must have the score of one page or more, got none")
    names, table = _rate_table(scores)
    documents = [score.document for score in scores]
    value, low, high = _intervals(_rates, table, documents, n, gen)
    read_as = dict(Counter(score.read_as for score in scores))
    rows = []
    for i, (what, subject) in enumerate(names):
        counted = table[:, len(names) + i] > 0
        rows.append(
            Result(
                what=what,
                subject=subject,
                split=split,
                value=float(value[i]),
                low=float(low[i]),
                high=float(high[i]),
                n=len({document for document, there in zip(documents, counted, strict=True) if there}),
                experiment=experiment,
                extra={"pages": len(scores), "read_as": read_as},
            )
        )
    return rows


def compare_runs(
    ours: Sequence[PageScore],
    theirs: Sequence[PageScore],
    *,
    split: str,
    experiment: str = "",
    n: int = 1000,
    gen: torch.Generator,
) -> list[Result]:
    """F1 of a run minus that of another on the same pages, of each kind and of "all": the interval by bootstrap
    of whole documents, `extra["p"]` by exchanging the two runs in random documents.

    With five documents p stays above 0.05: of 32 exchanges at least 2 are as far apart.

    Raises:
        ValueError: no scores; the runs have other documents, or the same in another order.
    Source: approximate randomisation, Yeh 2000, arXiv:cs/0008005.
    """
    documents = [score.document for score in ours]
    others = [score.document for score in theirs]
    if not ours or documents != others:
        raise ValueError(
            "compare_runs: both runs must have scored the same pages in the same order, got documents "
            f"{documents[:3]} ({len(ours)} pages) and {others[:3]} ({len(theirs)})"
        )
    names, table = _rate_table(ours)
    _, other_table = _rate_table(theirs)
    f1 = [i for i, (what, _) in enumerate(names) if what == "f1"]
    columns = f1 + [len(names) + i for i in f1]
    a, b = table[:, columns], other_table[:, columns]  # numerators, then denominators

    def difference(totals: metrics.Array) -> metrics.Array:
        first, second = np.hsplit(totals, 2)
        return _rates(first) - _rates(second)

    value, low, high = _intervals(difference, np.hstack([a, b]), documents, n, gen)
    codes, k = metrics.group_codes(documents)
    swap = torch.randint(2, (k, n), generator=gen).numpy()[codes]  # [pages, n]
    exchanged = np.hstack([(1 - swap).T @ a + swap.T @ b, swap.T @ a + (1 - swap).T @ b])
    # Equal but for rounding is as far apart, and so is an exchange that leaves a run nothing to score.
    nearer = np.abs(difference(exchanged)) < np.abs(value) - 1e-12
    p = np.where(np.isnan(value), np.nan, (1 + n - nearer.sum(0)) / (1 + n))
    records = {}
    for i, name in enumerate(names[j][1] for j in f1):
        numbers = {"difference": value[i], "low": low[i], "high": high[i], "p": p[i]}
        floats = {key: float(number) for key, number in numbers.items()}
        # As in `score_results`, documents without such a field in page or answer do not count.
        counted = a[:, len(f1) + i] + b[:, len(f1) + i] > 0
        n_counted = len({document for document, there in zip(documents, counted, strict=True) if there})
        records[name] = accuracy.Difference(**floats, n=n_counted, groups=n_counted)
    return accuracy.to_results(records, split=split, metric="f1_difference", experiment=experiment)


def _rate_table(scores: Sequence[PageScore]) -> tuple[list[tuple[str, str]], metrics.Array]:
    """(metric, subject) of r rates, and of each page the r numerators and then the r denominators, [pages, 2 r].

    All rates are sums over pages divided by sums over pages, so that a page counts by its fields.
    """
    tables = [_page_rates(score) for score in scores]
    names = list(tables[0])
    rows = []
    for rates in tables:
        rows.append([rates[name][0] for name in names] + [rates[name][1] for name in names])
    return names, np.array(rows, dtype=np.float64)


def _page_rates(score: PageScore) -> dict[tuple[str, str], tuple[float, float]]:
    """(numerator, denominator) of every rate by (metric, subject)."""
    rates: dict[tuple[str, str], tuple[float, float]] = {}
    by_name = {name: [getattr(c, name) for c in score.counts.values()] for name in fields_dict(Counts)}
    total = Counts(**{name: sum(numbers) for name, numbers in by_name.items()})
    for kind, c in (score.counts | {"all": total}).items():
        rates["precision", kind] = c.right, c.right + c.false
        rates["recall", kind] = c.right, c.right + c.missed
        rates["f1", kind] = 2 * c.right, 2 * c.right + c.false + c.missed
    rates["hallucinated_value_rate", ""] = len(score.hallucinated), score.numbers
    rates["omission_rate", ""] = total.omitted, total.right + total.missed
    rates["abbreviation_share", ""] = total.abbreviations, total.right
    common, stated, printed = score.text_words
    rates["text_word_f1", ""] = 2 * common, stated + printed
    coherence = score.coherence
    for part in ("value", "empty", "repeated", "unknown"):
        rates["coherence", "" if part == "value" else part] = float(getattr(coherence, part)), 1
    terms, values = score.substring_terms, score.substring_values
    rates["reference_substring_term_accuracy", ""] = terms
    rates["reference_substring_value_accuracy", ""] = values
    rates["reference_substring_combined_accuracy", ""] = terms[0] + values[0], terms[1] + values[1]
    return rates


def _rates(totals: metrics.Array) -> metrics.Array:
    """[k, 2 r] -> [k, r]: numerators by denominators, nan by 0."""
    numerators, denominators = np.hsplit(totals, 2)
    return metrics.ratio(numerators, denominators)


def _intervals(
    statistic: Any, table: metrics.Array, documents: Sequence[str], n: int, gen: torch.Generator
) -> tuple[metrics.Array, metrics.Array, metrics.Array]:
    """(value, low, high) of a function of column sums [k, c] -> [k, r], drawing whole documents."""

    def of_sums(rows: metrics.Array, _: Any, weights: Any) -> dict[str, metrics.Array]:
        if weights is None:
            return {"": statistic(rows.sum(0, keepdims=True))[0]}
        return {"": statistic(weights.T @ rows)}

    if len(set(documents)) < 2:
        value = of_sums(table, None, None)[""]
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    interval = metrics.bootstrap(of_sums, table, np.zeros_like(table), documents, n=n, gen=gen)[""]
    return interval.value, interval.low, interval.high


# Fields -----------------------------------------------------------------------------------------------------
def _with_named_diagnoses(stated: Fields, gold: Fields) -> Fields:
    """Prose with the diagnoses of the page that it states and that no list has: "no fever, but pneumonia"."""
    names = [diagnosis.name for diagnosis in stated.diagnoses]
    named = list(stated.diagnoses)
    for diagnosis in gold.diagnoses:
        is_there = any(same_term(diagnosis.name, name, "diagnoses") for name in names)
        if not is_there and holds_term(stated.text, diagnosis.name, "diagnoses"):
            named.append(Diagnosis(diagnosis.name))
    return evolve(stated, diagnoses=named)


_Row = dict[str, str]


def _rows(fields: Fields, kind: str) -> list[_Row]:
    """The entries of a kind as dicts of text; the patient is one."""
    if kind == "patient":
        return [asdict(fields.patient)]
    if kind == "procedures":
        return [{"name": name} for name in fields.procedures]
    rows = [asdict(record) for record in getattr(fields, kind)]
    return [{name: "PRN" if value is True else value or "" for name, value in row.items()} for row in rows]


def _pair(kind: str, gold: list[_Row], stated: list[_Row]) -> list[tuple[_Row, _Row]]:
    """Pairs of entries with equal names; an entry without a partner is paired with {}."""
    from scipy.optimize import linear_sum_assignment  # here: half a second to import

    weights = np.zeros((len(gold), len(stated)))
    for i, ours in enumerate(gold):
        for j, theirs in enumerate(stated):
            if kind == "patient" or _match(kind, "name", ours, theirs):
                outcomes = _compare(kind, ours, theirs)
                weights[i, j] = 1 + (outcomes.count("same") + outcomes.count("abbreviation")) / 100
    best = linear_sum_assignment(weights, maximize=True)
    partners = {int(i): int(j) for i, j in zip(*best, strict=True) if weights[i, j]}
    pairs = [(ours, stated[partners[i]] if i in partners else {}) for i, ours in enumerate(gold)]
    left = set(range(len(stated))) - set(partners.values())
    return pairs + [({}, stated[j]) for j in sorted(left)]


def _compare(kind: str, ours: _Row, theirs: _Row) -> list[str]:
    """What became of each field of two entries: "same", "abbreviation", "wrong", "omitted" or "extra"."""
    outcomes: list[str] = []
    for name in ours or theirs:
        gold, stated = ours.get(name, ""), theirs.get(name, "")
        if gold and stated:
            outcomes.append(_match(kind, name, ours, theirs) or "wrong")
        elif gold:
            outcomes.append("omitted")
        elif stated and not (name == "flag" and normalise_flag(stated) == "N"):  # no flag is printed for N
            outcomes.append("extra")
    return outcomes


def _match(kind: str, name: str, ours: _Row, theirs: _Row) -> TermMatch:
    """How a stated field is that of the page."""
    gold, stated = ours[name], theirs[name]
    unit, stated_unit = ours.get("unit", ""), theirs.get("unit", "")
    lists = {"name": kind, "route": "routes", "frequency": "frequencies", "sex": "sexes"}
    if name in ("dose", "value", "low", "high", "age"):
        is_same = same_value(gold, stated, unit, stated_unit, ours["name"])
    elif name == "unit":
        is_same = same_unit(gold, stated, ours["name"])
    elif name == "flag":
        return same_flag(gold, stated)
    elif name in lists and (kind, name) != ("patient", "name"):
        return same_term(gold, stated, lists[name])
    else:  # "Doe, Jane" is Jane Doe
        is_same = sorted(plain_words(gold).split()) == sorted(plain_words(stated).split())
    return "same" if is_same else ""


def _expected_terms(gold: Fields) -> tuple[list[str], list[str]]:
    """(terms, values with their units) that the reference would look for."""
    terms, values = [], []
    for kind in KINDS[1:]:
        for row in _rows(gold, kind):
            terms += [row[name] for name in ("name", "route", "frequency", "prn", "flag") if row.get(name)]
            values += [f"{row[name]} {row['unit']}".strip() for name in ("dose", "value") if row.get(name)]
    return terms, values


def _as_lines(fields: Fields) -> list[str]:
    """Each entry as one line: "Metformin 500 mg PO BID"."""
    return [" ".join(filter(None, row.values())) for kind in KINDS[1:] for row in _rows(fields, kind)]


# Words ------------------------------------------------------------------------------------------------------
@functools.cache
def _common_words() -> frozenset[str]:
    """The words of the medical lists and the keys of JSON, and the most common English ones."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # here: a second to import

    terms = medical_terms()
    lists = [row for name, rows in terms.items() if name not in ("keys", "single_charge") for row in rows]
    words = " ".join(
        " ".join(row) for row in (*lists, terms["keys"], *terms["keys"].values(), KINDS, ["true"])
    )
    return frozenset(_letters(words)) | ENGLISH_STOP_WORDS


def _letters(text: str) -> list[str]:
    """The runs of letters of a text, in lower case."""
    return re.findall(r"[^\W\d_]+", text.casefold())
