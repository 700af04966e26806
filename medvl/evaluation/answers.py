"""When a short medical answer is right: a strict rule that sees negation and side, and the text similarity
of older benchmarks.

The rules of `normalise` are those that change a verdict on written answers of VQA-RAD and SLAKE, or on
answers as language models write them (punctuation, articles, lead-ins, units, sides, denials).
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

_Rule = tuple[str, str | Callable[[re.Match[str]], str]]  # (pattern, what replaces it)

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_SEEN = (
    r"(?:present|seen|visible|visuali[sz]ed|identified|noted|observed|detected|evident|demonstrated|found)"
)

# "a" and "an" only where they must be articles: not in hepatitis A, A-lines, A and B.
_ARTICLE = (
    r"(?:^|(?<=[.,])|(?<=\b(?:is|of|in|no|at|on|or|to|by))|(?<=\b(?:are|was|has|not|and|for|yes))"
    r"|(?<=\b(?:were|with|have|from|show))|(?<=\b(?:shows|there))|(?<=\bwithout))"
    r"\s*\ban?(?= (?!(?:and|or|is|are|vs|versus|only|with)\b|\w+(?<![sui])s\b)(?:[a-z]{2}|\d\S* [a-z]))"
)


def _digits(match: re.Match[str]) -> str:
    return str(_NUMBERS.index(match[1]))


# Rules are applied in their order, each to the whole text. First the marks; "." comes to stand for any end of
# a sentence.
_MARKS: tuple[_Rule, ...] = (
    (r"[;!\u3002\u2014\u2015]|[\n\r\v\f\x85\u2028\u2029]+", " . "),
    (r"[\u2010-\u2013\u2212\ufe63\uff0d]", "-"),
    (r"[\u2018\u2019\u2032\u02bc`\u00b4]", "'"),
    (r"[\u201c\u201d\u00ab\u00bb]", '"'),
    (r'^"(.*)"$', r"\1"),
    # emphasis and quotes; an inch behind a number stays
    (r'_|\*\*|\*(?!\d)|(?<!\d)"', " "),
    ("\u00d7", " x "),
    (r"(?<=\d) - (?=\d)", "-"),
    (r"\b(l|r|lt|rt)\.", r"\1 "),
    (r":(?!\d)|(?<!\d):", " . "),
    (r"\.(?!\d)", " . "),
    # thousands
    (r"(?<=\d)(?<!\d{4})(?<!\b0),(?=\d{3}(?!\d))", ""),
    (r",(?!\d)|(?<!\d),", " , "),
    (r"(?<=\d)x(?=\d)", " x "),
    # a unit behind its number
    (r"(?<![\w.])(-?\d[\d.,:/-]*)(?=[a-zA-Z\u03bc\u00b0%])", r"\1 "),
    (r"([?()\[\]{}<>=+~\u2264\u2265\u00b1%])", r" \1 "),
)
_WORDS: tuple[_Rule, ...] = (
    (r"\b(it|that|there|this|he|she|what)'s\b", r"\1 is"),
    (r"\bcan(?:'t| ?not)\b", "cannot"),
    (r"\b(is|are|was|were|do|does|did|has|have|had|could|would|should)n'?t\b", r"\1 not"),
    (r"(?<=\w)'(?=\w)", ""),
    (r"(?<![^\s])'|(?<![\d'])'(?!\S)", " "),
    ("&", " and "),
    (r"\bw/o\b", "without"),
    (rf"\b({'|'.join(_NUMBERS)})\b", _digits),
    # sides; not in L4, 5 L, L spine, which are no sides
    (r"(?<![\w/-])(?<!\d )(?:l|lt)(?![\w-])(?! (?:[\d=<>-]|spine))", "left"),
    (r"(?<![\w/-])(?<!\d )(?:r|rt)(?![\w-])(?! (?:[\d=<>-]|spine))", "right"),
    (r"\b(left|right)[ -](?:sided\b|(?:hand )?side(?=$| ?[.,]))", r"\1"),
    (r"\b(?:on )?both sides\b|\bbilaterally\b", "bilateral"),
    (r"\bthe\b", " "),
    (_ARTICLE, " "),
)
# Hyphens within words, but not the minus of a number.
_HYPHENS: tuple[_Rule, ...] = ((r"(?<=[a-z])-(?=[a-z]|\d+(?![\d.]))|(?<=\d)-(?=[a-z])", " "),)
_DENIALS: tuple[_Rule, ...] = (
    (r"\bnone\b", "no"),
    (r"\b(?:not|without)(?= \w)", "no"),
    (r"\b(?:negative for|no any)(?= \w)", "no"),
    (r"\bno (?:evidence|signs?|indication) (?:of|for)(?= \w)", "no"),
)

# Lead-ins, of which several may follow each other. "There is no" alone stays: it was cut off.
_LEAD_IN = re.compile(
    r"(?:final |correct )?answer(?: is)?(?: that)?(?: \.)*(?= \S)"
    r"|(?:(?:image|picture|scan|figure)s? (?:shows?|demonstrates?|depicts?|reveals?)|it is|this is|there (?:is|are))"
    r"(?: that)?(?: \.)*(?= (?!no$)\S)"
    r"|(?:on|in)(?= (?:left|right|bilateral)\b)"
)
_DENIED = re.compile(rf"(?P<finding>.+?)(?: (?:is|are|was|were))?(?: no {_SEEN}| absent| cannot be {_SEEN})")
_STATED = re.compile(rf"(?P<finding>.+?)(?<! no)(?<!^no)(?: (?:is|are|was|were|can be))? {_SEEN}")


def word_set(text: str) -> frozenset[str]:
    """The words of a text, which are separated by spaces."""
    return frozenset(text.split())


_CLAUSE_END = re.compile(r" [.,-] | (?:and|but|however|though|although|yet|except|while|whereas) ")
_NEGATIVE = word_set(
    "no not none nope never neither nothing nowhere without absent absence negative cannot lack lacks "
    "lacking excluded excludes false wrong incorrect deny denies denied"
)
_DOUBTFUL = word_set(
    "maybe perhaps possible possibly probable probably unclear uncertain unsure indeterminate "
    "equivocal might may could likely unlikely unable hardly scarcely barely questionable unless if "
    "ruled rules rule fails failed ?"
)


def same_answer(answer: str | None, gold: str) -> bool:
    """Whether an answer says what the written one says. In doubt it does not: words are compared in their
    order, no medicine is known.

    Right is:
    - the same text after `normalise`, which says what carries no meaning; a hyphen between letters may also
      be missing;
    - to a gold "yes" also what starts with "yes", to a gold "no" what starts with "no" and then a comma, the
      end of a sentence, or it, there, this, they, I, we, if every clause of the rest agrees: "Yes, there is
      a fracture", "No, there is no fracture". A clause with doubt ("possibly") or two denials ("not absent")
      agrees with neither.
    Wrong are hence, among others, synonyms, plurals, another order of words, added explanations of open
    answers; "No fracture" to "no" ("Is the bone normal?"); "No, the lungs are clear" to "no" (it states
    something beside denying); "Yes" to "Yes, on the left".

    Args:
        answer: None or a text without words is wrong.
    Raises:
        ValueError: gold has no words.
    """
    if not has_words(gold):
        raise ValueError(f"same_answer: gold must hold a word, got {gold!r}; leave such questions out")
    gold_forms = _forms(gold)
    if gold_forms & _forms(answer or ""):
        return True
    # What remains is a "yes" or "no" that is explained. A wrong explanation makes it wrong: "Yes, there is no
    # fracture" answers neither.
    plain = normalise(answer or "")
    for word in gold_forms & {"yes", "no"}:
        explanation = _text_after(plain, word)
        if explanation is not None and _polarities(explanation) <= {word}:
            return True
    return False


def has_words(text: str) -> bool:
    """Whether an answer can be compared with this text: something is left of it by `normalise`."""
    return "" not in _forms(text)


def normalise(text: str) -> str:
    """A text without what carries no meaning: lower case, words and marks separated by one space.

    - Unicode NFKC, white space, quotes, final punctuation. Within the text "." stands for any end of a
      sentence (; : ! and a new line too): "No. Effusion." is not "No effusion". A comma is "and" if the text
      denies nothing. Brackets, "?" and signs stay.
    - Articles ("a" only where it must be one: not in "hepatitis A", "A-lines"), "&", the hyphen within
      words, w/o, n't.
    - Number words zero to twelve are digits; numbers stay ("1.0" is not "1") but for thousands ("1,000");
      "5mm" is "5 mm".
    - Lead-ins such as "There is", "It is", "The answer is", "Answer:", "The image shows", and "on the"
      before a side.
    - Sides: L, lt, left-sided, left side -> "left"; both sides, bilaterally, and at the start "left and
      right" -> "bilateral".
    - Denials: not, without, none, negative for, no evidence of -> "no"; "X is absent", "X is not seen", "X
      cannot be seen" -> "no X" where X is one thing; "X is seen" -> "X".
    """
    return _normalise(text, join_hyphens=False)


# The rule of older benchmarks -------------------------------------------------------------------------------
def same_by_tfidf(answer: str | None, gold: str, threshold: float = 0.6) -> bool:
    """Whether `tfidf_cosine` exceeds the threshold. Only for comparison with published numbers: it ACCEPTS
    OPPOSITES.

    "No pleural effusion" for "Pleural effusion" has .709 and "left lower lobe pneumonia" for "right lower
    lobe pneumonia" .603, both right at 0.6, while "Scroll down" for "Scroll up" has .336.
    Source: the step rule of FedMABench, Wang et al. 2025, arXiv:2503.05143.
    """
    return tfidf_cosine(answer, gold) > threshold


def tfidf_cosine(answer: str | None, gold: str) -> float:
    """Cosine of the TF-IDF vectors of two texts, the vectoriser (scikit-learn's, as it is by default) fitted
    on this pair alone.

    0 where a text has no token: words of one letter are none, so "A" for "A" has 0.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # here: a second to import

    vectoriser, pair = TfidfVectorizer(), [gold, answer or ""]
    tokens = vectoriser.build_analyzer()
    # Without a token in either text the vectoriser would raise: its vocabulary is empty.
    if not all(tokens(t) for t in pair):
        return 0.0
    vectors = vectoriser.fit_transform(pair).toarray()  # rows of norm 1
    return float(vectors[0] @ vectors[1])


def _forms(text: str) -> set[str]:
    """The normalised text, with hyphenated words apart and joined: x-ray is x ray and xray."""
    return {_normalise(text, join_hyphens=False), _normalise(text, join_hyphens=True)}


def _normalise(text: str, *, join_hyphens: bool) -> str:
    # The order matters: rules for words rely on marks that stand apart, lead-ins on words that are already
    # plain, denials on lead-ins that are gone.
    text = unicodedata.normalize("NFKC", text).strip().casefold()
    text = _replace(text, _MARKS)
    if join_hyphens:
        # A side, an article and a denial are words of their own: L-sided, no-effusion.
        text = re.sub(r"\b(?!(?:no|not|an?|l|r|lt|rt|left|right)-)([a-z]+)-(?=[a-z]+\b)", r"\1", text)
    text = _replace(text, _WORDS)
    text = _without_final_marks(_replace(text, _HYPHENS))
    # "Answer: the image shows ...": lead-ins follow each other, so again until none is left.
    lead_in = _LEAD_IN.match(text)
    while lead_in is not None:
        text = _without_final_marks(text[lead_in.end() :])
        lead_in = _LEAD_IN.match(text)
    text = _replace(text, _DENIALS)
    text = re.sub(r"^(?:left and right|right and left)\b", "bilateral", text)
    return _normalise_finding(text)


def _replace(text: str, rules: Sequence[_Rule]) -> str:
    for pattern, new in rules:
        text = " ".join(re.sub(pattern, new, text).split())
    return text


def _without_final_marks(text: str) -> str:
    """Without punctuation at the ends."""
    return " ".join(re.sub(r"^(?:[.,](?: |$))+|(?: [.,])+$", "", text).split())


def _normalise_finding(text: str) -> str:
    """Ways to state or deny one finding become one, and so do lists that deny nothing."""
    denied = _DENIED.fullmatch(text)
    if denied:
        # "effusion and mass not seen" may deny either of them.
        words = set(denied["finding"].split())
        if not _CLAUSE_END.search(f" {text} ") and not words & (_NEGATIVE | {"or", "with", "nor"}):
            return f"no {denied['finding']}"
    stated = _STATED.fullmatch(text)
    if stated:
        text = stated["finding"]
    # "No effusion, mass" leaves open whether the mass is denied, so there the comma stays.
    if _NEGATIVE.isdisjoint(text.split()):
        text = re.sub(r" ,(?: and)?(?= )", " and", text)
    return text


def _polarities(text: str) -> set[str]:
    """What the clauses of a normalised text do: "yes" (state), "no" (deny), or both where that is in
    doubt.
    """
    polarities: set[str] = set()
    for clause in _CLAUSE_END.split(text):
        clause = clause.strip(" .,")
        if not clause:
            continue
        words = re.split("[ /]", clause)  # "and/or", "no/mild"
        denials = sum(word in _NEGATIVE for word in words)
        doubtful = not _DOUBTFUL.isdisjoint(words)
        if doubtful or denials > 1 or (denials and "yes" in words):
            polarities |= {"yes", "no"}
        else:
            polarities.add("no" if denials else "yes")
    return polarities


def _text_after(text: str, word: str) -> str | None:
    """What follows a "yes" or "no" that the text starts with; None if it does not. "No" before a thing
    denies that thing only.
    """
    pattern = "yes(?= |$)" if word == "yes" else r"no(?= [.,-] | (?:it|there|this|they|i|we)\b|$)"
    lead = re.match(pattern, text)
    return text[lead.end() :].strip(" .,-") if lead else None
