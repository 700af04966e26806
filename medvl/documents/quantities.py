"""Numbers, units, flags and terms of medical pages, compared at the boundaries of words and numbers.

"5 mg" is not in "25 mg", 1.2 is not in 11.2, MI is not in "family". Spellings of one unit are equal (ug, mcg,
µg), but nothing is converted: "0.5 g" is not "500 mg". `medical_terms.toml` lists what means the same.
"""

import functools
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from attrs import evolve, frozen

TermMatch = Literal["", "same", "abbreviation"]


@functools.cache
def medical_terms() -> Mapping[str, Any]:
    """The lists of `medical_terms.toml`."""
    path = Path(__file__).with_name("medical_terms.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def find_key(text: str, names: tuple[str, ...], table: str = "keys") -> str:
    """The name, of `names`, that a key of JSON, a heading or a title of a column means; "" if none.

    Args:
        table: of medical_terms.toml, whose spellings come before those of "keys".
    """
    return _key_spellings(names, table).get(_plain_key(text), "")


@functools.cache
def _key_spellings(names: tuple[str, ...], table: str) -> Mapping[str, str]:
    terms = medical_terms()
    named = {} if table == "keys" else terms[table]
    spellings = {_plain_key(text): name for name, texts in named.items() for text in texts}
    for name in names:
        for key in (name, *terms["keys"].get(name, ())):
            spellings.setdefault(_plain_key(key), name)
    return spellings


def _plain_key(text: str) -> str:
    """Lower case without marks and what stands in brackets: "labResults" is "lab results", "Age (years)" is "age"."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).casefold()
    return " ".join(re.sub(r"\([^)]*\)|[^a-z0-9]+", " ", text).split())


# Quantities -------------------------------------------------------------------------------------------------
@frozen
class Quantity:
    """A number with its unit: one ("8.4 %"), a pair ("120/80 mmHg") or a range ("5-10 mg").

    A date or a time is one too: no number, its digits in `unit`.
    """

    sign: str  # "", "<", ">", "<=", ">=", "~"
    numbers: tuple[Decimal, ...]
    join: str  # "/" in a pair, "-" in a range, "date"
    unit: str  # as `normalise_unit` writes it, "" where none is known


def find_quantities(text: str) -> list[Quantity]:
    """All numbers of a text in their order, each with the unit behind it. Digits within names (B12, COVID-19)
    are none.
    """
    return [_quantity(match) for match in quantity_matches(_fold(text))]


def quantity_matches(text: str) -> Iterator[re.Match[str]]:
    """The quantities of a text of one spelling (`spell`) as matches with the groups date, sign, minus, first,
    join, second and unit.
    """
    return _quantity_pattern().finditer(text)


def parse_quantity(value: str, unit: str = "") -> Quantity | None:
    """A value as a quantity, None if it is not a number; `unit` is for a value that names none itself."""
    text = _fold(value).strip(" ()[]*").rstrip(". ")
    match = _quantity_pattern().match(text)
    if match is None:
        return None
    quantity = _quantity(match)
    rest = text[match.end() :].strip()
    if re.search(r"\d", rest):  # "5 of 10", "2 tablets for 3 days"
        return None
    if rest and not quantity.unit:  # a unit that the list does not know: "2 sachets"
        quantity = evolve(quantity, unit=normalise_unit(rest))
    if not quantity.unit:
        quantity = evolve(quantity, unit=normalise_unit(unit))
    return quantity


def same_number(a: Quantity, b: Quantity) -> bool:
    """Whether the numbers and the sign are equal, whatever the units: 8.40 is 8.4, ">60" is not "60"."""
    return (a.sign, a.numbers, a.join) == (b.sign, b.numbers, b.join) and (
        a.join != "date" or a.unit == b.unit
    )


def same_flag(gold: str, answer: str) -> TermMatch:
    """How an answer's flag is the gold one: "high" and "↑" are forms of H."""
    if normalise_flag(gold) != normalise_flag(answer):
        return ""
    return "same" if gold.casefold() == answer.casefold() else "abbreviation"


def same_value(gold: str, answer: str, gold_unit: str = "", answer_unit: str = "", name: str = "") -> bool:
    """Whether two values are equal as numbers and their units, where both have one, do not contradict.

    Args:
        name: of the test or drug, on which it depends whether mEq/L is mmol/L.
    """
    a = parse_quantity(gold, gold_unit)
    b = parse_quantity(answer, answer_unit)
    if a is None or b is None:  # "negative", "trace"
        return a is b and same_term(gold, answer, "flags") != ""
    return same_number(a, b) and (not a.unit or not b.unit or same_unit(a.unit, b.unit, name))


def holds_value(text: str, value: str, unit: str = "") -> bool:
    """Whether a text states a value: a whole number of it with the unit, if the value has one."""
    wanted = parse_quantity(value, unit)
    if wanted is None:
        return holds_term(text, value, "flags")
    for quantity in find_quantities(text):
        if same_number(quantity, wanted) and (not wanted.unit or quantity.unit == wanted.unit):
            return True
    return False


def numbers_in(text: str) -> list[Decimal | str]:
    """Every number of a text, those of pairs and ranges apart, dates and times as they are written; signs, units,
    the numbers of frequencies ("every 6 hours", "3 times daily") and those before the entries of a list left out.
    """
    numbers: list[Decimal | str] = []
    for quantity in find_quantities(_TIMES_DAILY.sub(" ", EVERY_HOURS.sub(" ", BULLET.sub("", text)))):
        numbers += quantity.numbers if quantity.join != "date" else (quantity.unit,)
    return numbers


@functools.lru_cache(4096)
def normalise_unit(unit: str) -> str:
    """One spelling of a unit: "µg" is "mcg", "K/uL" is "10^9/l", "beats per minute" is "/min"."""
    text = re.sub(r"\s?\bper\b\s?", "/", _fold(unit).strip(" .()[]"))
    text = re.sub(r"^x\s?10\^?(\d+)", r"10^\1", text)  # x109/L, where the raised 9 was read as a digit
    spelling, whole = _unit_spellings()
    parts = []
    for part in text.split("/"):
        # "5 ml" of "mg/5 ml"
        number, word = re.fullmatch(r"(\d+(?:\.\d+)?(?!\^))?\s*(.*?)[. ]*", part.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        parts.append((number or "") + spelling.get(word, word))
    joined = "/".join(parts)
    return whole.get(joined, joined)


def same_unit(a: str, b: str, name: str = "") -> bool:
    """Whether two units are the same; mEq/L is mmol/L for the ions of one charge that `name` may name."""
    a, b = normalise_unit(a), normalise_unit(b)
    if {a, b} == {"meq/l", "mmol/l"}:
        return _canonical(name, "labs") in medical_terms()["single_charge"]
    return a == b


_NUMBER = r"(?:\d+(?:[.,]\d+)*|\.\d+)"
_DATE = (
    r"\d{4}(?P<sep>[-/.])\d{1,2}(?P=sep)\d{1,2}|\d{1,2}(?P<mark>[-/.])\d{1,2}(?P=mark)(?:\d{4}|\d{2})"
    r"|\d{1,2}:\d{2}(?::\d{2})?"
)
# A number does not start within a word or number nor behind its hyphen (T4, COVID-19), and ends before no digit.
_START = r"(?<![\w^.])(?<!\d,)(?<!\w-)"
_END = r"(?![.,]?\d|\^)"
BULLET = re.compile(r"^\s*(?:[-–•*·#]+|\d{1,2}[.)])\s*(?=[^\d\s])", re.MULTILINE)  # readers lose the space
EVERY_HOURS = re.compile(
    r"\b(?:every|q)\.?\s?(\d+)(?:\s?(?:-|to)\s?(\d+))?\.?\s?(?:h|hrs?|hours?|hourly)\b", re.IGNORECASE
)
_TIMES_DAILY = re.compile(r"\b\d\s?(?:x|times) (?:daily|(?:a|per) (?:day|week))\b", re.IGNORECASE)


@functools.cache
def _quantity_pattern() -> re.Pattern[str]:
    words = [_fold(word) for row in medical_terms()["units"] for word in row]
    words.sort(key=len, reverse=True)
    part = f"(?:{'|'.join(map(re.escape, words))})"
    power = r"(?:10\^\d+|x\s?10\d{1,2}(?=/)|[km](?=/))"
    unit = rf"(?:{power}|{part})?(?:\s?(?:/|\bper\b)\s?(?:\d+(?:\.\d+)?\s?)?{part})*"
    return re.compile(
        rf"(?P<date>(?<![\w.,/-])(?:{_DATE})(?![\w/-]|\.\d))"
        rf"|(?:(?P<sign><=|>=|<|>|~)\s?)?(?:(?<![\w)%])(?P<minus>-))?{_START}(?P<first>{_NUMBER}){_END}"
        rf"(?:\s?(?P<join>/|-|\bto\b)\s?(?P<second>(?:(?<=\s)-)?{_NUMBER}){_END})?"
        rf"(?:[\s-]?(?P<unit>(?=\S){unit})(?![\w^]|\s?/\s?\w))?",
        re.IGNORECASE,
    )


def _quantity(match: re.Match[str]) -> Quantity:
    if match["date"]:
        return Quantity("", (), "date", match["date"])
    numbers = [_decimal(match["first"]) * (-1 if match["minus"] else 1)]
    if match["second"]:
        numbers.append(_decimal(match["second"]))
    join = {None: "", "/": "/"}.get(match["join"], "-")
    return Quantity(match["sign"] or "", tuple(numbers), join, normalise_unit(match["unit"] or ""))


def _decimal(text: str) -> Decimal:
    """A number with points and commas. One comma or point is the decimal mark ("8,4"), unless a comma stands
    before three digits as of thousands ("1,200"; not "0,125"); of both, the last one is.
    """
    mark = max(text.rfind(","), text.rfind("."))
    has_one_kind = "," not in text or "." not in text
    of_thousands = re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+", text) or text.count(",") + text.count(".") > 1
    if mark < 0 or (has_one_kind and of_thousands):
        mark = len(text)
    whole, decimals = re.sub("[.,]", "", text[:mark]), text[mark + 1 :]
    return Decimal(f"{whole}.{decimals}" if decimals else whole)


@functools.cache
def _unit_spellings() -> tuple[dict[str, str], dict[str, str]]:
    """The spelling of each part of a unit, and of whole units that are one size."""
    parts = {_fold(word): row[0] for row in medical_terms()["units"] for word in row}
    whole = {word: row[0] for row in medical_terms()["same_units"] for word in row}
    return parts, whole


# Terms ------------------------------------------------------------------------------------------------------
def same_term(gold: str, answer: str, kind: str) -> TermMatch:
    """How an answer's term is the gold one: "same" after case and marks, by an "abbreviation" (or another term
    of `medical_terms.toml`), or "" where it is not.

    Args:
        kind: the list that holds the abbreviations: "diagnoses", "frequencies", "labs", "flags" ...
    """
    if not plain_words(gold) or not plain_words(answer):
        return ""
    if plain_words(gold) == plain_words(answer):
        return "same"
    return "abbreviation" if _canonical(gold, kind) == _canonical(answer, kind) else ""


def holds_term(text: str, term: str, kind: str) -> bool:
    """Whether a text states a term, or what is written for it, at word boundaries and not denied ("no
    pneumonia", "denies chest pain", "family history of").

    Short abbreviations (MI, Mg) must have their capitals: "as" is not aortic stenosis, "mg" not magnesium.
    """
    if not plain_words(term):
        return False
    for clause in _CLAUSE_END.split(spell(text)):
        # By the names of groups, each of which is one word, and as it is written: "pneumonia" is also stated by
        # "community-acquired pneumonia". Not so for tests: "hemoglobin A1c" is no hemoglobin.
        searched = [(_canonical(clause, kind, in_prose=True), _canonical(term, kind))]
        if kind != "labs":
            searched.append((plain_words(clause, fold=False), plain_words(term)))
        for words, wanted in searched:
            for match in re.finditer(rf"(?<!\S){re.escape(wanted)}(?!\S)", words, re.IGNORECASE):
                if term.isupper() and not _has_case(match[0], kind):
                    continue
                if not _is_denied(words[: match.start()], words[match.end() :]):
                    return True
    return False


def find_terms(text: str, kind: str) -> list[str]:
    """The listed terms that a text states, as it writes them; denied ones left out."""
    _, pattern = _aliases(kind)
    terms = []
    for clause in _CLAUSE_END.split(spell(text)):
        words = plain_words(clause, fold=False)
        for match in pattern.finditer(words):
            if _has_case(match[0], kind) and not _is_denied(words[: match.start()], words[match.end() :]):
                terms.append(match[0])
    return list(dict.fromkeys(terms))


def is_listed(term: str, kind: str) -> bool:
    """Whether `medical_terms.toml` has a term among those of a kind."""
    return plain_words(term) in _aliases(kind)[0]


def is_denied(term: str) -> bool:
    """Whether an entry of a list denies what it names: "No pneumonia", "Pneumonia: ruled out"."""
    words = plain_words(term)
    return bool(_DENIED_BEFORE.match(words) or re.search(rf"(?<!\S){_DENIED_AFTER.pattern}$", words))


_DENIED_BEFORE = re.compile(
    r"(?:no|not|denies|denied|denying|without|never|nor|neither|negative for|free of|absence of|rules? out"
    r"|ruled out|excludes?|family history)(?!\S)"
)
# What sounds like a denial and is none.
_NO_DENIAL = re.compile(
    r"\b(?:no|not|without) (?:(?:significant|interval|acute|further|only) )*(?:change|increase|progression|only)\b"
)
_DENIED_AFTER = re.compile(
    r"(?:(?:is|are|was|were|has|have|been) )*"
    r"(?:absent|denied|excluded|negative|ruled out|not (?:seen|present|identified|noted|found|detected)|no$)(?!\S)"
)
_CLAUSE_END = re.compile(
    r"[;!?\n]+|\.(?!\d)|\b(?:but|however|although|though|except|yet)\b"
    r"|(?<!not)(?<!never)(?<!longer)[,\s]\s*(?=(?:has(?! been)|reports?|shows?|presents|positive|complains|admits|takes)\b)",
    re.IGNORECASE,
)


def is_denied_between(before: str, after: str) -> bool:
    """Whether what a page prints before and behind a term denies it, in the same clause."""
    clause, rest = _CLAUSE_END.split(before)[-1], _CLAUSE_END.split(after)[0]
    return _is_denied(plain_words(clause), plain_words(rest))


def _is_denied(before: str, after: str) -> bool:
    """Whether a term is denied by the words of its clause before or directly behind it."""
    before = _NO_DENIAL.sub(" ", before.casefold())
    if re.search(rf"(?<!\S){_DENIED_BEFORE.pattern}", before):
        return True
    return bool(_DENIED_AFTER.match(after.casefold().strip()))


def normalise_flag(flag: str) -> str:
    """H, L, HH, LL, N or A for the forms of `medical_terms.toml`; another flag in its own words."""
    flag = flag.strip(" ()[]")
    for row in medical_terms()["flags"]:
        if flag.casefold() in [word.casefold() for word in row]:
            return row[0]
    return plain_words(flag)


@functools.lru_cache(4096)  # a table, or an answer that loops, has the same few texts again and again
def spell(text: str) -> str:
    """A text in one spelling, case kept: one minus, one micro sign, x10⁹ as 10^9, b.i.d. as bid."""
    text = re.sub("[⁰¹²³⁴-⁹]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    # A fixed space, and a plain one before zeros, holds thousands together; in "2 500 mg tablets" it does not.
    text = re.sub("(?<=\\d)(?:[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))| (?=0\\d{2}(?!\\d)))", "", text)
    text = unicodedata.normalize("NFKC", text)
    text = re.sub("[\u2010-\u2013\u2212\ufe63\uff0d]", "-", text).replace("\u2044", "/")
    text = re.sub(r"\b(?:[A-Za-z]\.){2,}(?:[A-Za-z]\b)?", lambda m: m[0].replace(".", ""), text)
    for pattern, new in _SPELLINGS:
        text = re.sub(pattern, new, text, flags=re.IGNORECASE)
    return re.sub("[ \\t]+", " ", text)


_SPELLINGS = (
    (r"≤|=<|\b(?:less than or equal to|at most)\s(?=\d)", "<="),
    (r"≥|=>|\b(?:greater than or equal to|at least)\s(?=\d)", ">="),
    (r"\bless than\s(?=\d)", "<"),
    (r"\b(?:greater|more) than\s(?=\d)", ">"),
    (r"(?:(?<![\d.,])|(?=[x*×]))(?:[x*×]\s?)?10\s?(?:\^\(?|\*\*?)\s?(\d{1,2})\)?", r" 10^\1"),
    (r"(?<=[a-z])\^(?=\d)", ""),
)


def _fold(text: str) -> str:
    return spell(text).casefold()


def plain_words(text: str, *, fold: bool = True) -> str:
    """The words of a text, one space between them; marks are dropped but for "+", "%" and decimal points."""
    text = re.sub("['\u2018\u2019\u02bc]", "", _fold(text) if fold else spell(text))
    return " ".join(re.sub(r"(?:[^\w+%.]|\.(?!\d)|(?<!\d)\.)+", " ", text).split())


@functools.cache
def _aliases(kind: str) -> tuple[dict[str, str], re.Pattern[str]]:
    """The name of the group for each of its terms, and a pattern that finds the longest of them."""
    # A name is one word: "hemoglobin" is not in "hemoglobin_a1c".
    names = {
        plain_words(term): plain_words(row[0]).replace(" ", "_")
        for row in medical_terms()[kind]
        for term in row
    }
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    pattern = rf"(?<!\S)(?:{'|'.join(map(re.escape, longest_first))})(?!\S)"
    return names, re.compile(pattern, re.IGNORECASE)


def _canonical(text: str, kind: str, *, in_prose: bool = False) -> str:
    """The words of a text, each listed term of it by the name of its group."""
    names, pattern = _aliases(kind)
    twice = re.fullmatch(r"(.+?)\s*\((.+)\)\s*", text)
    if twice and _canonical(twice[1], kind) == _canonical(twice[2], kind):
        text = twice[1]  # "COPD (chronic obstructive pulmonary disease)" says one thing twice
    text = EVERY_HOURS.sub(lambda match: f"q{match[1]}{'to' + match[2] if match[2] else ''}h", spell(text))

    def name(match: re.Match[str]) -> str:
        return names[match[0].casefold()] if not in_prose or _has_case(match[0], kind) else match[0]

    words = pattern.sub(name, plain_words(text, fold=False))
    return words if in_prose else words.casefold()


def _has_case(word: str, kind: str) -> bool:
    """Whether a word of running text is an abbreviation and not a word such as "as", "Ms", "mg"."""
    return kind in ("frequencies", "routes") or len(word) > 3 or word.isupper() or word in _spellings(kind)


@functools.cache
def _spellings(kind: str) -> frozenset[str]:
    return frozenset(term for row in medical_terms()[kind] for term in row)
