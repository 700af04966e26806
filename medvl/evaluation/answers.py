"""When a short medical answer is right: a strict rule that sees negation and side, and the text similarity of older benchmarks."""

import re
import unicodedata

SKIPPED_STEP = "Click at a button"
"""The written answer of steps that FedMABench's scoring leaves out."""

_NUMBERS = [
    *(
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
    ),
    *("fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
_SEEN = (
    r"(?:present|seen|visible|visuali[sz]ed|identified|noted|observed|detected|evident|demonstrated|found)"
)
_ARTICLE = (  # where "a" is one: not in hepatitis A, A-lines, A and B
    r"(?:^|(?<=[.,])|(?<=\b(?:is|of|in|no|at|on|or|to|by))|(?<=\b(?:are|was|has|not|and|for|yes))|(?<=\b(?:were|with|have|from|show))"
    r"|(?<=\b(?:shows|there))|(?<=\bwithout))\s*\ban?(?= (?!(?:and|or|is|are|vs|versus|only|with)\b|\w+(?<![sui])s\b)"
    r"(?:[a-z]{2}|\d\S* [a-z]))"
)
_CHARACTERS = (  # rules are applied in their order
    (r"[;!\u3002\u2014\u2015]|[\n\r\v\f\x85\u2028\u2029]+", " . "),  # "." is any end of a sentence
    (r"[\u00ad\u200b-\u200f\u2060\ufeff]", ""),
    (r"[\u2010-\u2013\u2212\ufe63\uff0d]", "-"),
    (r"[\u2018\u2019\u2032\u02bc`\u00b4]", "'"),
    (r"[\u201c\u201d\u00ab\u00bb]", '"'),
    (r'^"(.*)"$', r"\1"),
    (r'_|\*\*|\*(?!\d)|(?<!\d)"', " "),
    ("\u00d7", " x "),
    (r"(?<=\d)\s*/\s*(?=\d)", "/"),
    (r"(?<=\d) - (?=\d)", "-"),
    (r"\b(l|r|lt|rt)\.", r"\1 "),
    (r":(?!\d)|(?<!\d):", " . "),
    (r"\.(?!\d)", " . "),
    (r"(?<=\d)(?<!\d{4})(?<!\b0),(?=\d{3}(?!\d))", ""),
    (r",(?!\d)|(?<!\d),", " , "),
    (r"(?<=\d)x(?=\d)", " x "),
    (r"(?<![\w.])(-?\d[\d.,:/-]*)(?=[a-zA-Z\u03bc\u00b0%])", r"\1 "),
    (r"([?()\[\]{}<>=+~\u2264\u2265\u00b1%])", r" \1 "),
)
_WORDS = (
    (r"\b(it|that|there|this|he|she|what)'s\b", r"\1 is"),
    (r"\bcan(?:'t| ?not)\b", "cannot"),
    (r"\bwon't\b", "will not"),
    (r"\bain't\b", "is not"),
    (r"\b(is|are|was|were|do|does|did|has|have|had|could|would|should)n'?t\b", r"\1 not"),
    (r"(?<=\w)'(?=\w)", ""),
    (r"(?<![^\s])'|(?<![\d'])'(?!\S)", " "),
    ("&", " and "),
    (r"\bw/o\b", "without"),
    (
        rf"\b(?<!-)(?<!ty )({'|'.join(_NUMBERS)})\b(?![ -](?:{'|'.join(_NUMBERS[1:10])})\b)",
        lambda m: str(_NUMBERS.index(m[1])),
    ),
    (r"(?<![\d/-])(?<!\d )\b(l|lt|r|rt)[ -]?sided\b", r"\1"),
    (r"(?<![\w/-])(?<!\d )(?:l|lt)(?![\w-])(?! (?:[\d=<>-]|spine|waves?\b))", "left"),
    (r"(?<![\w/-])(?<!\d )(?:r|rt)(?![\w-])(?! (?:[\d=<>-]|spine|waves?\b))", "right"),
    (r"\b(left|right)[ -](?:sided\b|(?:hand )?side(?=$| ?[.,]))", r"\1"),
    (r"\b(?:on )?both sides\b|\bb/l\b|\bbilaterally\b", "bilateral"),
    (r"\bthe\b", " "),
    (_ARTICLE, " "),
)
_HYPHENS = ((r"(?<=[a-z])-(?=[a-z]|\d+(?![\d.]))|(?<=\d)-(?=[a-z])", " "),)
_DENIALS = (
    (r"\bnone\b", "no"),
    (r"\b(?:not|without)(?= \w)", "no"),
    (r"\b(?:negative for|free of|no any|^(?:patient )?denies)(?= \w)", "no"),
    (r"\bno (?:evidence|signs?|indication) (?:of|for)(?= \w)", "no"),
)
_LEAD = re.compile(
    r"(?:final |correct )?answer(?: is)?(?: that)?(?: \.)*(?= \S)"
    r"|(?:(?:image|picture|scan|figure)s? (?:shows?|demonstrates?|depicts?|reveals?)|it is|this is|there (?:is|are))"
    r"(?: that)?(?: \.)*(?= (?!no$)\S)"  # "There is no" was cut off
    r"|(?:on|in)(?= (?:left|right|bilateral)\b)"
)
_DENIED = re.compile(rf"(?P<what>.+?)(?: (?:is|are|was|were))?(?: no {_SEEN}| absent| cannot be {_SEEN})")
_STATED = re.compile(rf"(?P<what>.+?)(?<! no)(?<!^no)(?: (?:is|are|was|were|can be))? {_SEEN}")

_CLAUSE = re.compile(r" [.,-] | (?:and|but|however|though|although|yet|except|while|whereas) ")
_NEGATIVE = {
    *(
        "no",
        "not",
        "none",
        "nope",
        "never",
        "neither",
        "nothing",
        "nowhere",
        "without",
        "absent",
        "absence",
        "negative",
        "cannot",
        "lack",
    ),
    *("lacks", "lacking", "excluded", "excludes", "false", "wrong", "incorrect", "deny", "denies", "denied"),
}
_DOUBTFUL = {
    *(
        "maybe",
        "perhaps",
        "possible",
        "possibly",
        "probable",
        "probably",
        "unclear",
        "uncertain",
        "unsure",
        "indeterminate",
        "equivocal",
    ),
    *(
        "might",
        "may",
        "could",
        "likely",
        "unlikely",
        "unable",
        "hardly",
        "scarcely",
        "barely",
        "questionable",
        "unless",
        "if",
        "ruled",
    ),
    *("rules", "rule", "fails", "failed", "?"),
}


def same_answer(said: str | None, gold: str) -> bool:
    """Whether an answer says what the written one says. In doubt it does not: words are compared in their order, no medicine is known.

    Right is:
    - the same text after `normalise`, which says what carries no meaning; a hyphen between letters may also be missing;
    - to a gold "yes" also what starts with "yes", to a gold "no" what starts with "no" and then a comma, the end of a sentence, or it,
      there, this, they, I, we, if the rest holds nothing else by `polarity`: "Yes, there is a fracture", "No, there is no fracture".
    Wrong are hence, among others, synonyms, plurals, another order of words, added explanations of open answers; "No fracture" to "no"
    ("Is the bone normal?"); "No, the lungs are clear" to "no" (it states something beside denying); "Yes" to "Yes, on the left".

    Args:
        said: None or a text without words is wrong.
    Raises:
        ValueError: gold has no words.
    """
    wanted = _forms(gold)
    if not has_words(gold):
        raise ValueError(f"same_answer: gold must hold a word, got {gold!r}; leave such questions out")
    if wanted & _forms(said or ""):
        return True
    plain = normalise(said or "")
    return any(
        (rest := _after(plain, word)) is not None and _polarities(rest) <= {word}
        for word in wanted & {"yes", "no"}
    )


def has_words(text: str) -> bool:
    """Whether an answer can be compared with this text: something is left of it by `normalise`."""
    return "" not in _forms(text)


def normalise(text: str) -> str:
    """A text without what carries no meaning: lower case, words and marks separated by one space.

    - Unicode NFKC, white space, quotes, final punctuation. Within the text "." stands for any end of a sentence (; : ! and a new line
      too): "No. Effusion." is not "No effusion". A comma is "and" if the text denies nothing. Brackets, "?" and signs stay.
    - Articles ("a" only where it must be one: not in "hepatitis A", "A-lines"), "&", the hyphen within words, w/o, n't.
    - Number words zero to twenty are digits; numbers stay as written ("1.0" is not "1") but for thousands ("1,000"); "5mm" is "5 mm".
      M and G after a number keep their case: MV is not mV.
    - Lead-ins such as "There is", "It is", "The answer is", "Answer:", "The image shows", and "on the" before a side.
    - Sides: L, lt, left-sided, left side -> "left"; both sides, bilaterally, and at the start "left and right" -> "bilateral".
    - Denials: not, without, none, negative for, free of, denies, no evidence of -> "no"; "X is absent", "X is not seen", "X cannot be
      seen" -> "no X" where X is one thing; "X is seen" -> "X".
    """
    return _normalise(text, "-")


def polarity(text: str) -> str:
    """What the clauses of a text do: "yes" (state), "no" (deny), "both", or "" without words.

    A clause with two denials ("not absent"), with a denial and "yes", or with doubt ("possibly") counts as both.
    """
    found = _polarities(normalise(text))
    return "both" if len(found) > 1 else next(iter(found), "")


def sides(text: str) -> frozenset[str]:
    """The sides that a text names: of "left" and "right"; bilateral is both. "right" that means correct counts too."""
    named = set(normalise(text).split())
    return frozenset(s for s in ("left", "right") if named & {s, "bilateral"})


# The rule of older benchmarks -----------------------------------------------------------------------------------------------------------
def same_by_tfidf(said: str | None, gold: str, threshold: float = 0.6) -> bool:
    """Whether `tfidf_cosine` exceeds the threshold. Only for comparison with published numbers: it ACCEPTS OPPOSITES.

    "No pleural effusion" for "Pleural effusion" has .709 and "left lower lobe pneumonia" for "right lower lobe pneumonia" .603, both
    right at 0.6, while "Scroll down" for "Scroll up" has .336.
    Source: the step rule of FedMABench, Wang et al. 2025, arXiv:2503.05143.
    """
    return tfidf_cosine(said, gold) > threshold


def tfidf_cosine(said: str | None, gold: str) -> float:
    """Cosine of the TF-IDF vectors of two texts, the vectoriser (scikit-learn's, as it is by default) fitted on this pair alone.

    0 where a text has no token: words of one letter are none, so "A" for "A" has 0.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # here: a second to import

    vectoriser, pair = TfidfVectorizer(), [gold, said or ""]
    tokens = vectoriser.build_analyzer()
    if not all(tokens(t) for t in pair):
        return 0.0
    vectors = vectoriser.fit_transform(pair).toarray()  # rows of norm 1
    return float(vectors[0] @ vectors[1])


def _forms(text: str) -> set[str]:
    return {_normalise(text, "-"), _normalise(text, "")}


def _normalise(text: str, hyphen: str) -> str:
    """`hyphen` "" joins hyphenated words: x-ray is xray."""
    t = re.sub(
        "[\u00b2\u00b3\u00b9\u2070-\u2089]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text
    )  # 10² is not 102
    t = unicodedata.normalize("NFKC", re.sub(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", t)).replace(
        "\u2044", "/"
    )  # 1½ is not 11/2
    t = re.sub(r"(?<=[^\W\d])\^(?=\d)", "", t)  # cm³ is cm3
    cased = re.split(r"(?<=\d)(\s?[MG])(?=(?:Hz|eV|V|Bq|Gy|Sv|W|Pa)?\b)", t.strip())
    t = "".join(p if i % 2 else p.casefold() for i, p in enumerate(cased))
    t = _replaced(t, _CHARACTERS)
    if not hyphen:
        t = re.sub(r"\b(?!(?:no|not|an?|l|r|lt|rt|left|right)-)([a-z]+)-(?=[a-z]+\b)", r"\1", t)
    t = _bare(_replaced(_replaced(t, _WORDS), _HYPHENS))
    while (lead := _LEAD.match(t)) is not None:
        t = _bare(t[lead.end() :])
    t = _replaced(t, _DENIALS)
    t = re.sub(r"^(?:left and right|right and left)\b", "bilateral", t)
    return _one_thing(t)


def _replaced(t: str, rules: tuple) -> str:
    for pattern, new in rules:
        t = " ".join(re.sub(pattern, new, t).split())
    return t


def _bare(t: str) -> str:
    """Without punctuation at the ends, and with one mark where several end a sentence."""
    t = re.sub(r"(?: ?\.)(?: [.,])+(?= |$)|, \.(?= |$)", " .", t)
    return " ".join(re.sub(r"^(?:[.,] )+|(?: [.,])+$|^[.,]+$", "", t).split())


def _one_thing(t: str) -> str:
    """Forms of stating and denying one thing, and of lists that deny nothing, brought to one."""
    denied = _DENIED.fullmatch(t)
    if (
        denied
        and not _CLAUSE.search(f" {t} ")
        and not {*denied["what"].split()} & (_NEGATIVE | {"or", "with", "nor"})
    ):
        return f"no {denied['what']}"
    if (stated := _STATED.fullmatch(t)) is not None:
        t = stated["what"]
    return t if {*t.split()} & _NEGATIVE else re.sub(r" ,(?: and)?(?= )", " and", t)


def _polarities(t: str) -> set[str]:
    """Of a normalised text."""
    found: set[str] = set()
    for clause in filter(None, (c.strip(" .,") for c in _CLAUSE.split(t))):
        words = re.split("[ /]", clause)
        denials, doubt = sum(w in _NEGATIVE for w in words), not _DOUBTFUL.isdisjoint(words)
        found |= (
            {"yes", "no"}
            if doubt or denials > 1 or (denials and "yes" in words)
            else {"no" if denials else "yes"}
        )
    return found


def _after(t: str, word: str) -> str | None:
    """What follows a "yes" or "no" that the text starts with; None if it does not. "No" before a thing denies that thing only."""
    lead = re.match("yes(?= |$)" if word == "yes" else r"no(?= [.,-] | (?:it|there|this|they|i|we)\b|$)", t)
    return t[lead.end() :].strip(" .,-") if lead else None
