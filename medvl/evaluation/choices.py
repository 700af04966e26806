"""Multiple-choice questions: options and their letters, read from a text and written into one, and the
likeliest option.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

Options = Mapping[str, str] | Sequence[str]  # letter -> text, or texts from A on

# (pattern, what replaces it): answer tags, LaTeX boxes, Markdown, kinds of apostrophe.
MARKUP = (
    (r"(?i)</?answer>", " "),
    (r"\\boxed\s*\{([^{}]*)\}", r"\1"),
    (r"[*`$\"\u201c\u201d]|(?<![^\W_])_+|_+(?![^\W_])", ""),
    ("[\u2018\u2019]", "'"),
)
TOKEN = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+|[-+<>=%/\u00b1\u2264\u2265]")
# Dashes of lists, words and clauses; what is left are minus signs.
_DASH = re.compile(r"^\s*-\s|(?<=[^\W\d_])-(?=[^\W\d_])|(?<=\s)(?<!\d\s)-(?=\s)|(?<=\s)-(?=\s\D)")


def letter_options(options: Options) -> dict[str, str]:
    """Options by letter, in their order; those of a sequence get letters from A on.

    Raises:
        ValueError: no options, more than 26, a letter that is none of A to Z, or a text that is no string.
    """
    if isinstance(options, Mapping):
        table = dict(options)
    else:
        # Behind Z come other signs; the check of the letters below refuses them.
        table = {chr(ord("A") + i): text for i, text in enumerate(options)}
    letters = all(isinstance(k, str) and re.fullmatch("[A-Z]", k) for k in table)
    # A string is a sequence too, of its characters.
    if not table or isinstance(options, str) or not letters:
        raise ValueError(
            f"letter_options: needs 1 to 26 options with letters from A to Z, got {options!r:.80}"
        )
    if not all(isinstance(text, str) for text in table.values()):
        raise ValueError(f"letter_options: every option must be text, got {options!r:.80}")
    return table


def format_question(question: str, options: Options) -> str:
    """A question with its options below, "A. text" each on a line of its own, as SlideChat asks."""
    lines = [f"{letter}. {text}" for letter, text in letter_options(options).items()]
    return "\n".join([question, *lines])


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """Question and options of a text that holds both, such as "Which? A) x B) y" or "Which?\\nA. x\\nB. y".

    Letters must rise and have one kind of mark (. ) or :), A and another one or three others. The text of a
    letter that is left out belongs to the option before it, so the options then have a gap.

    Returns:
        (question, {letter: option}), texts stripped; (text, {}) where it holds no options.
    """
    for mark in ").:":  # the rarest in prose first
        # Behind a letter and its mark stands a space or a word, but not a single letter with a point: "U.S.".
        pattern = rf"(?:(?<=[\s?.,;:])|^)\(?([A-Z]){re.escape(mark)}(?=\s|$|[^\W_](?!\.))"
        matches = _rising_letters(list(re.finditer(pattern, text)))
        # Two marks without an "A" may as well be initials.
        needed = 2 if matches and matches[0][1] == "A" else 3
        if len(matches) >= needed:
            break
    else:
        return text, {}
    # Each option ends where the next mark begins.
    ends = [match.start() for match in matches[1:]] + [len(text)]
    options = {}
    for match, end in zip(matches, ends, strict=True):
        options[match[1]] = text[match.end() : end].strip()
    return text[: matches[0].start()].strip(), options


def letters_by_likelihood(scores: Iterable[Iterable[float]], options: Sequence[Options]) -> list[str]:
    """The letter of each row's likeliest option; of equals the first.

    Args:
        scores: [b, o], as of `likelihood.score_options`: rows with fewer options are longer than these.
    Raises:
        ValueError: as `letter_options`; another number of rows, fewer scores than options, or a score of an
            option that is nan.
    """
    rows = []
    for row in scores:
        rows.append([float(score) for score in row])
    if len(rows) != len(options):
        raise ValueError(
            f"letters_by_likelihood: needs the options of every row, got {len(rows)} rows and "
            f"{len(options)} sets of options"
        )
    letters = []
    tables = map(letter_options, options)
    for i, (row, table) in enumerate(zip(rows, tables, strict=True)):
        # nan would win or lose by its place, as comparisons with it are false.
        if len(row) < len(table) or any(math.isnan(score) for score in row[: len(table)]):
            raise ValueError(
                f"letters_by_likelihood: row {i} needs a number for each of {len(table)} options, got {row}"
            )
        # `max` returns the first of equals. The row may be longer: what is behind the options is padding.
        best, _ = max(zip(table, row, strict=False), key=lambda pair: pair[1])
        letters.append(best)
    return letters


def comparable_text(text: str) -> str:
    """An option's text without case, punctuation, markup, kind of dash and leading article; signs and
    numbers stay.
    """
    return " ".join(option_words(text))


def option_words(text: str) -> tuple[str, ...]:
    """The words of a text, as `comparable_text` has them."""
    return without_article(TOKEN.findall(plain_text(text)))


def plain_text(text: str) -> str:
    """Lower case, one kind of dash, no apostrophes, "n't" as "not"."""
    text = unicodedata.normalize("NFKC", text).casefold()
    # In this order: "can't" holds an "n't", and what apostrophes are left are none of a negation.
    rules = (
        *MARKUP,
        ("[\u2010-\u2015\u2212]", "-"),
        (r"\bcan't\b", "cannot"),
        (r"n't\b", " not"),
        ("'", ""),
    )
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return _DASH.sub(" ", text)


def without_article(words: Sequence[str]) -> tuple[str, ...]:
    """The words without an article that comes first; an article alone stays."""
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        return tuple(words[1:])
    return tuple(words)


def _rising_letters(matches: list[re.Match[str]]) -> list[re.Match[str]]:
    """The longest run of marks whose letters rise, each letter that is left out counting against it; of
    equal ones the latest.
    """
    # The best run that ends in each mark.
    runs: list[list[re.Match[str]]] = []
    for match in matches:
        # The mark alone, or behind each earlier run that it can continue.
        candidates = [[match]]
        for run in runs:
            if run[-1][1] < match[1]:
                candidates.append([*run, match])
        runs.append(max(candidates, key=_run_rank))
    return max(runs, key=_run_rank, default=[])


def _run_rank(run: list[re.Match[str]]) -> tuple[int, int, int]:
    """(length less the letters that are left out, length, where it starts)."""
    # A run without gaps has span + 1 letters; each letter that is left out takes one off the length.
    span = ord(run[-1][1]) - ord(run[0][1])
    return 2 * len(run) - span, len(run), run[0].start()
