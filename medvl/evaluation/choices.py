"""Multiple-choice questions: options and their letters, and which option an answer in words chooses, told by the answer alone."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

Options = Mapping[str, str] | Sequence[str]  # letter -> text, or texts from A on

_MARKUP = (
    (r"(?i)</?answer>", " "),
    (r"\\boxed\s*\{([^{}]*)\}", r"\1"),
    (r"[*`$\"\u201c\u201d]|(?<![^\W_])_+|_+(?![^\W_])", ""),
    ("[\u2018\u2019]", "'"),
)
_THOUGHT = re.compile(
    r"(?is)^.*</think>|<think>.*"
)  # what a reasoning model says before it answers; one that is cut off gave no answer
_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+|[-+<>=%/\u00b1\u2264\u2265]")
_DASH = re.compile(
    r"^\s*-\s|(?<=[^\W\d_])-(?=[^\W\d_])|(?<=\s)(?<!\d\s)-(?=\s)|(?<=\s)-(?=\s\D)"
)  # of lists, words, clauses: no sign
_ANSWER = re.compile(
    r"(?i)\banswer(?:\s+(?:is|would be|should be|must be)\b|\s*[:=]|\s+-\s)\s*:?\s*(?:(?:option|choice|letter)\b\s*:?\s*)?"
    r"|(?:^|(?<=\n))\s*(?:(?:final|correct|best|right)\s+)?(?:answer|option|choice|letter)(?:\s+-\s+|\s*:\s*|\s+)"
    r"|\b(?:choose|select|pick)\s+(?:(?:option|choice|answer|letter)\s+)?"
    r"|(?:^|(?<=[.!\n]))\s*it(?:'s|\s+is)\s+(?:(?:option|choice|letter)\s+)?"
)
_SMALL = re.compile(  # a small letter that cannot be a word: in brackets, or all that stands behind "answer:"
    r"^\s*[(\[{]\s*(?P<bracket>[a-z])\s*[)\]}]|(?i:\banswer\s*(?:is\b|[:=])\s*:?\s*)[(\[{]?(?P<alone>[a-z])[)\]}]?\s*[.,;:!]?\s*$"
)
_RIGHT = re.compile(
    r"(?<![\w'-])\(?(?P<letter>[A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)(?:\s+(?:answer|option|choice))?\s*(?:[.,;!]|$)"
)
_LEAD = re.compile(
    r"(?i)^\W*(?:the\s+)?(?:(?:final|correct|best|right|most likely)\s+)*(?:answer|option|choice)\s*(?:is\b|[:=])"
)
_WRONG = re.compile(
    r"(?i)\W*(?:which\s+|that\s+)?(?:wrong|incorrect|(?:is|was|are|were|would|can|could|may|might|should|seems?|looks?|appears?)\b[^.\n]*)"
)
_ASIDE = frozenset(
    {
        "less",
        "unlikely",
        "not",
        "incorrect",
        "wrong",
        "false",
        "excluded",
        "excludes",
        "distractor",
        "distractors",
        "cannot",
    }
)
_DOUBT = frozenset(
    {
        *(
            "not",
            "no",
            "non",
            "nor",
            "neither",
            "never",
            "none",
            "nothing",
            "without",
            "absent",
            "absence",
            "lack",
            "lacks",
        ),
        *(
            "lacking",
            "cannot",
            "exclude",
            "excludes",
            "excluded",
            "excluding",
            "except",
            "rule",
            "rules",
            "ruled",
            "unlikely",
        ),
        *(
            "less",
            "more",
            "than",
            "rather",
            "instead",
            "unlike",
            "versus",
            "vs",
            "or",
            "either",
            "whether",
            "if",
            "incorrect",
        ),
        *(
            "wrong",
            "false",
            "but",
            "however",
            "although",
            "unless",
            "may",
            "might",
            "could",
            "possibly",
            "perhaps",
            "maybe",
        ),
        *(
            "unsure",
            "unclear",
            "uncertain",
            "unable",
            "between",
            "differential",
            "deny",
            "denies",
            "denied",
            "negative",
        ),
        *(
            "until",
            "hardly",
            "under",
            "over",
            "above",
            "below",
            "least",
            "both",
            "doubt",
            "hard",
            "considered",
            "thought",
            "history",
        ),
    }
)
_BEFORE = frozenset(
    {
        *(
            "a",
            "an",
            "the",
            "is",
            "are",
            "was",
            "were",
            "be",
            "as",
            "of",
            "with",
            "by",
            "for",
            "this",
            "it",
            "shows",
            "show",
        ),
        *(
            "showing",
            "suggests",
            "suggest",
            "suggesting",
            "indicates",
            "indicate",
            "indicating",
            "demonstrates",
            "reveals",
        ),
        *(
            "represents",
            "has",
            "have",
            "case",
            "diagnosis",
            "likely",
            "probably",
            "type",
            "subtype",
            "grade",
            "stage",
        ),
        *("status", "score", "answer"),
    }
)
_AFTER = frozenset(
    {
        *(
            "is",
            "are",
            "was",
            "were",
            "in",
            "of",
            "with",
            "for",
            "as",
            "at",
            "on",
            "by",
            "this",
            "that",
            "which",
            "here",
        ),
        *("from", "based", "because", "since", "due", "given", "seen"),
    }
)
_JOINS = frozenset({"and", "or", "nor", "to", "is", "vs", "versus"})


def letter_options(options: Options) -> dict[str, str]:
    """Options by letter, in their order; a sequence is lettered from A on.

    Raises:
        ValueError: no options, more than 26, a letter that is none of A to Z, or a text that is no string.
    """
    table = (
        dict(options)
        if isinstance(options, Mapping)
        else {chr(ord("A") + i): text for i, text in enumerate(options)}
    )
    if (
        not table
        or isinstance(options, str)
        or not all(isinstance(k, str) and re.fullmatch("[A-Z]", k) for k in table)
    ):
        raise ValueError(
            f"letter_options: needs 1 to 26 options with letters from A to Z, got {options!r:.80}"
        )
    if not all(isinstance(text, str) for text in table.values()):
        raise ValueError(f"letter_options: every option must be text, got {options!r:.80}")
    return table


def format_question(question: str, options: Options) -> str:
    """A question with its options below, "A. text" each on a line of its own, as SlideChat asks."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in letter_options(options).items())])


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """Question and options of a text that holds both, such as "Which? A) x B) y" or "Which?\\nA. x\\nB. y".

    Letters must rise and have one kind of mark (. ) or :), A and another one or three others; a letter that is left out belongs to the
    text before it, so the options then have a gap.

    Returns:
        (question, {letter: option}), texts stripped; (text, {}) where it holds no options.
    """
    for mark in ").:":  # the rarest in prose first
        marks = re.finditer(rf"(?:(?<=[\s?.,;:])|^)\(?([A-Z]){re.escape(mark)}(?=\s|$|[^\W_](?!\.))", text)
        best = _rising(list(marks))
        if len(best) >= (2 if best and best[0][1] == "A" else 3):
            break
    else:
        return text, {}
    ends = [m.start() for m in best[1:]] + [len(text)]
    return text[: best[0].start()].strip(), {
        m[1]: text[m.end() : end].strip() for m, end in zip(best, ends, strict=True)
    }


def extract_letter(said: str | None, options: Options) -> str:
    """The letter of the option that an answer chooses, "" where it chooses none, several, or it cannot be told.

    The right answer is not asked for, and no guess is made: what is returned was said. Case counts, so an article is no letter.
    - A letter with a mark at the start: "B", "B. text", "B: text", "B) text", "(B) text", "[B]", "**B**", and "B text" or "B - text"
      where the text is that of option B.
    - "the answer is B", "Answer: (B) text", "Option B.", "I choose B", "It's B", "B is correct", not behind a denial or "if".
    - A small letter where it can be no word: "(b)", "(b) text", "ANSWER: b".
    - A later sentence that says why another letter is not it ("Option A is less likely.") changes nothing. What stands between <think> and
      </think> is not the answer.
    - Without a letter, the full text of one option, alone or in a sentence that denies nothing and doubts nothing: "It is a case of
      {text}." An option within a longer one ("grade 1" in "grade 1-2") counts only where the longer one is not meant.
    None, "", is hence what names other letters too (unless they stand in the text of an option: "B. Luminal A"), a letter beside the text
    of another option, "b.", "not B", "A or B", and a paraphrase.

    Args:
        options: letter -> text, or texts from A on. An option without text is chosen by letter only.
    Raises:
        ValueError: as `letter_options`.
    """
    table = letter_options(options)
    text = unicodedata.normalize("NFKC", said or "")
    text = _THOUGHT.sub("", text).replace("\u3002", ". ")
    for pattern, new in _MARKUP:
        text = re.sub(pattern, new, text)
    small = _SMALL.search(text)
    if small:
        at = max(small.start("bracket"), small.start("alone"))
        text = text[:at] + text[at].upper() + text[at + 1 :]
    text, words = text.strip(), {letter: _words(option) for letter, option in table.items()}
    stated, named = set(_stated(text, words)), _named(text, words)
    if len(stated) > 1 or (stated and named and named not in stated):
        return ""
    letter = next(iter(stated), named)
    return letter if not letter or _letters(text, table, stated=bool(stated)) <= {letter} else ""


def letters_by_likelihood(scores: Iterable[Iterable[float]], options: Sequence[Options]) -> list[str]:
    """The letter of each row's likeliest option; of equals the first.

    Args:
        scores: [b, o], as of `generation.score_options`: rows with fewer options are longer than these.
    Raises:
        ValueError: as `letter_options`; another number of rows, fewer scores than options, or a score of an option that is nan.
    """
    rows, out = [[float(v) for v in row] for row in scores], []
    if len(rows) != len(options):
        raise ValueError(
            f"letters_by_likelihood: needs the options of every row, got {len(rows)} rows and {len(options)} sets of options"
        )
    for i, (row, table) in enumerate(zip(rows, map(letter_options, options), strict=True)):
        if len(row) < len(table) or any(v != v for v in row[: len(table)]):
            raise ValueError(
                f"letters_by_likelihood: row {i} needs a number for each of {len(table)} options, got {row}"
            )
        out.append(max(zip(table, row, strict=False), key=lambda pair: pair[1])[0])
    return out


def comparable_text(text: str) -> str:
    """An option's text without case, punctuation, markup, kind of dash and leading article; signs and numbers stay."""
    return " ".join(_words(text))


def _rising(marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """The longest run of marks whose letters rise, each letter that is left out counting against it; of equal ones the latest."""
    runs: list[list[re.Match[str]]] = []
    rank = lambda run: (
        2 * len(run) - ord(run[-1][1]) + ord(run[0][1]),
        len(run),
        run[0].start(),
    )  # gaps are the span less the marks
    for m in marks:
        runs.append(max(([*run, m] for run in [[], *runs] if not run or run[-1][1] < m[1]), key=rank))
    return max(runs, key=rank, default=[])


# Letters that are said ------------------------------------------------------------------------------------------------------------------
def _stated(text: str, words: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Letters that the answer gives as its answer."""
    if (found := _marked(text, words)) is not None:
        yield found
    for m in _ANSWER.finditer(text):
        if (
            not _doubted(text, m.start())
            and (found := _marked(text[m.end() :], words, prose=True)) is not None
        ):
            yield found
    for m in _RIGHT.finditer(text):
        if m["letter"] in words and not _doubted(text, m.start()):
            yield m["letter"]


def _marked(text: str, words: Mapping[str, tuple[str, ...]], *, prose: bool = False) -> str | None:
    """The letter at the start of a text, if a mark, its end, or its option's text shows that it is meant as one."""
    m = re.match(r"([(\[{']?)\s*([A-Z])(?!\w)(.*)", text, re.DOTALL)
    if m is None or m[2] not in words:
        return None
    opened, letter, rest = m.groups()
    said, own = _words(rest), words[letter]
    others = [w for k, w in words.items() if k != letter]
    if said and said == own and own not in others and "?" not in rest:
        return letter
    closed = bool(opened) and re.match(r"\s*[.:]?[)\]}']", rest)
    ends = r"[\s.,;:!)\]}']*$|[ \t]*\n|\.(?=\s)|\.(?![\d.]|\w\.)|\s?:(?=\s)|\)" + (
        r"|[,;!](?=\s)|\s+(?:because|since)\b" if prose else ""
    )
    if not closed and not re.match(ends, rest):
        return None
    wrong = _WRONG.match(rest)
    if (wrong and not _DOUBT.isdisjoint(_words(wrong[0]))) or (
        said and said != own and _DOUBT.issuperset(said)
    ):  # "B: no"
        return None
    named = (letter.lower(), *said[:1])  # "C. difficile" in the text of an option
    part = lambda w: (
        (said == w and said != own) or (not _slight(said) and _inside(said, w) and not _inside(said, own))
    )
    return (
        None
        if said and (any(map(part, others)) or any(_inside(named, w) for w in words.values()))
        else letter
    )


def _doubted(text: str, at: int) -> bool:
    """Whether the sentence before a place denies or doubts."""
    return not _DOUBT.isdisjoint(_words(re.split(r"[.!?;\n]", text[:at])[-1]))


def _without_asides(text: str) -> str:
    """A text without those sentences behind the first that say why something is not the answer."""
    first, *more = re.split(r"(?<=[.!;\n])(?=\s)", text)
    return "".join([first, *(sentence for sentence in more if _ASIDE.isdisjoint(_words(sentence)))])


def _letters(text: str, table: Mapping[str, str], *, stated: bool) -> set[str]:
    """Option letters that stand alone in a text, beside the texts of options; where one is stated, beside what is said of others."""
    for option in sorted(table.values(), key=len, reverse=True):
        if len(option.strip()) > 1:
            text = re.sub(
                r"(?<!\w)" + r"\s+".join(map(re.escape, option.split())) + r"(?!\w)",
                "x",
                text,
                flags=re.IGNORECASE,
            )
    text = _without_asides(text) if stated else text
    found = set()
    for m in re.finditer(r"(?<![\w'-])([A-Z])(?![\w']|-\w)(?:\s+([a-z0-9(]\w*))?", text):
        if m[1] in table and not (m[1] in "AI" and m[2] and m[2] not in _JOINS):  # an article, a pronoun
            found.add(m[1])
    return found


# Texts that are said --------------------------------------------------------------------------------------------------------------------
def _named(text: str, words: Mapping[str, tuple[str, ...]]) -> str:
    """The one option whose full text the answer gives, or ""."""
    plain = _plain(_LEAD.sub("", text))
    tokens = list(_TOKEN.finditer(plain))
    said = tuple(t[0] for t in tokens)
    same = [letter for letter, w in words.items() if w and w == _bare(said)]
    if same or "?" in text:
        return same[0] if len(same) == 1 and "?" not in text else ""
    spans = [
        (i, i + len(w), letter)
        for letter, w in words.items()
        if w
        for i in range(len(said))
        if said[i : i + len(w)] == w
    ]
    whole = [
        s
        for s in spans
        if not any(o[0] <= s[0] and s[1] <= o[1] and o[1] - o[0] > s[1] - s[0] for o in spans)
    ]
    if len({letter for *_, letter in whole}) != 1:
        return ""
    inside = {i for a, b, _ in whole for i in range(a, b)}
    outside = [w for i, w in enumerate(said) if i not in inside]
    fits = all(
        _bounded(plain, tokens, a, b) and (not _slight(said[a:b]) or _last(said, a, b)) for a, b, _ in whole
    )
    return whole[0][2] if fits and _DOUBT.isdisjoint(outside) else ""


def _bounded(plain: str, tokens: Sequence[re.Match[str]], a: int, b: int) -> bool:
    """Whether tokens a to b are a phrase of their own: no word beside them makes them another thing ("micro-invasive", "... in situ")."""
    left = a == 0 or tokens[a - 1][0] in _BEFORE
    if a and not left:
        left = bool(re.search(r"[.,;:!\n]", plain[tokens[a - 1].end() : tokens[a].start()])) and not _slight(
            [tokens[a - 1][0]]
        )
    if b == len(tokens):
        return left
    after, gap = tokens[b][0], plain[tokens[b - 1].end() : tokens[b].start()]
    if after == "in" and [t[0] for t in tokens[b + 1 : b + 2]] == ["situ"]:
        return False
    return left and (
        after in _AFTER
        or (bool(re.search(r"[.,;:!\n]", gap)) and after not in _JOINS and not _slight([after]))
    )


def _last(said: Sequence[str], a: int, b: int) -> bool:
    """Whether a slight option ends the answer, and nothing else in it is as slight (an article is not)."""
    return b == len(said) and not any(_slight([w]) for w in said[:a] if w != "a")


def _slight(words: Iterable[str]) -> bool:
    """Words that mean little alone: numbers, signs, single letters, Roman numerals, yes and no."""
    return all(re.fullmatch(r"[\d.,]+|\W|\w|[ivx]+[abc]?|yes|no|none|na|true|false", w) for w in words)


def _plain(text: str) -> str:
    """Lower case, one kind of dash, no apostrophes, "n't" as "not"."""
    text = unicodedata.normalize("NFKC", text).casefold()
    for pattern, new in (
        *_MARKUP,
        ("[\u2010-\u2015\u2212]", "-"),
        (r"\bcan't\b", "cannot"),
        (r"n't\b", " not"),
        ("'", ""),
    ):
        text = re.sub(pattern, new, text)
    return _DASH.sub(" ", text)


def _words(text: str) -> tuple[str, ...]:
    return _bare(_TOKEN.findall(_plain(text)))


def _bare(words: Sequence[str]) -> tuple[str, ...]:
    """Without the article that comes first."""
    return tuple(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def _inside(part: Sequence[str], words: Sequence[str]) -> bool:
    return any(tuple(words[i : i + len(part)]) == tuple(part) for i in range(len(words) - len(part) + 1))
