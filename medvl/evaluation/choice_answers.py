"""Which option an answer in words chooses, told by the answer alone."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from medvl.evaluation.answers import word_set
from medvl.evaluation.choices import (
    MARKUP,
    TOKEN,
    Options,
    letter_options,
    option_words,
    plain_text,
    without_article,
)

# What a reasoning model writes before its answer. One that was cut off while thinking gave no answer.
_THINKING = re.compile(r"(?is)^.*</think>|<think>.*")

# "the answer is", "Answer:", "Option", "I choose", "It's": what follows is the answer.
_ANSWER = re.compile(
    r"(?i)\banswer(?:\s+(?:is|would be|should be|must be)\b|\s*[:=]|\s+-\s)\s*:?\s*(?:(?:option|choice|letter)\b\s*:?\s*)?"
    r"|(?:^|(?<=\n))\s*(?:(?:final|correct|best|right)\s+)?(?:answer|option|choice|letter)(?:\s+-\s+|\s*:\s*|\s+)"
    r"|\b(?:choose|select|pick)\s+(?:(?:option|choice|answer|letter)\s+)?"
    r"|(?:^|(?<=[.!\n]))\s*it(?:'s|\s+is)\s+(?:(?:option|choice|letter)\s+)?"
)
# The same at the start, before the text of an option.
_LEAD_IN = re.compile(
    r"(?i)^\W*(?:the\s+)?(?:(?:final|correct|best|right|most likely)\s+)*(?:answer|option|choice)\s*(?:is\b|[:=])"
)
# A small letter that cannot be a word: in brackets, or alone behind "answer:".
_SMALL_LETTER = re.compile(
    r"^\s*[(\[{]\s*(?P<bracket>[a-z])\s*[)\]}]"
    r"|(?i:\banswer\s*(?:is\b|[:=])\s*:?\s*)[(\[{]?(?P<alone>[a-z])[)\]}]?\s*[.,;:!]?\s*$"
)
# "B is correct"
_IS_RIGHT = re.compile(
    r"(?<![\w'-])\(?(?P<letter>[A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)(?:\s+(?:answer|option|choice))?"
    r"\s*(?:[.,;!]|$)"
)
# A clause behind a letter that may deny it: "B is unlikely", "B, which cannot be seen"
_CLAUSE_BEHIND = re.compile(
    r"(?i)\W*(?:which\s+|that\s+)?(?:wrong|incorrect"
    r"|(?:is|was|are|were|would|can|could|may|might|should|seems?|looks?|appears?)\b[^.\n]*)"
)
# What may follow a letter that is meant as one: the end, a new line, ". ", ") ", " : ".
_END_OF_LETTER = r"[\s.,;:!)\]}']*$|[ \t]*\n|\.(?=\s)|\.(?![\d.]|\w\.)|\s?:(?=\s)|\)"
_END_IN_SENTENCE = r"|[,;!](?=\s)|\s+(?:because|since)\b"

# Words of a sentence that says why an option is not the answer.
_REJECTING_WORDS = word_set(
    "less unlikely not incorrect wrong false excluded excludes distractor distractors cannot"
)
# Words that deny or doubt what they stand beside.
_DOUBTING_WORDS = word_set(
    "not no non nor neither never none nothing without absent absence lack lacks lacking cannot exclude "
    "excludes excluded excluding except rule rules ruled unlikely less more than rather instead unlike "
    "versus vs or either whether if incorrect wrong false but however although unless may might could "
    "possibly perhaps maybe unsure unclear uncertain unable between differential deny denies denied negative "
    "until hardly under over above below least both doubt hard considered thought history"
)
# Words that may stand before the text of an option in a sentence that names it.
_WORDS_BEFORE = word_set(
    "a an the is are was were be as of with by for this it shows show showing suggests suggest "
    "suggesting indicates indicate indicating demonstrates reveals represents has have case diagnosis "
    "likely probably type subtype grade stage status score answer"
)
# Words that may follow it.
_WORDS_AFTER = word_set(
    "is are was were in of with for as at on by this that which here from based because since due given seen"
)
_JOINING_WORDS = frozenset({"and", "or", "nor", "to", "is", "vs", "versus"})


def extract_letter(answer: str | None, options: Options) -> str:
    """The letter of the option that an answer chooses, "" where it chooses none, several, or it cannot be
    told.

    The right answer is not an argument, and nothing is guessed: the returned letter was said. Case counts,
    so an article is no letter.
    - A letter with a mark at the start: "B", "B. text", "B: text", "B) text", "(B) text", "[B]", "**B**",
      and "B text" or "B - text" where the text is that of option B.
    - "the answer is B", "Answer: (B) text", "Option B.", "I choose B", "It's B", "B is correct", not behind
      a denial or "if".
    - A small letter where it can be no word: "(b)", "(b) text", "ANSWER: b".
    - A later sentence that says why another letter is not it ("Option A is less likely.") changes nothing.
      The text between <think> and </think> is not the answer.
    - Without a letter, the full text of one option, alone or in a sentence that denies nothing and doubts
      nothing: "It is a case of {text}." An option within a longer one ("grade 1" in "grade 1-2") counts only
      where the longer one is not meant.
    "" is returned for other letters beside (unless they stand in the text of an option: "B. Luminal A"), a
    letter beside the text of another option, "b.", "not B", "A or B", and a paraphrase.

    Args:
        options: letter -> text, or texts from A on. An option without text is chosen by letter only.
    Raises:
        ValueError: as `letter_options`.
    """
    table = letter_options(options)
    words = {letter: option_words(text) for letter, text in table.items()}
    text = _clean(answer or "")
    # An answer may give a letter, the text of an option, or both; both must then agree.
    stated = set(_stated_letters(text, words))
    named = _named_option(text, words)
    if len(stated) > 1 or (stated and named and named not in stated):
        return ""
    letter = next(iter(stated), named)
    # Any other letter that stands alone leaves the choice in doubt.
    if letter and not _other_letters(text, table, stated=bool(stated)) <= {letter}:
        return ""
    return letter


def _clean(answer: str) -> str:
    """An answer without the model's thoughts and markup; a small letter that is meant as one is a capital."""
    text = unicodedata.normalize("NFKC", answer)  # full-width letters and brackets of Chinese models
    text = _THINKING.sub("", text).replace("\u3002", ". ")
    for pattern, new in MARKUP:
        text = re.sub(pattern, new, text)
    small = _SMALL_LETTER.search(text)
    if small:
        i = max(small.start("bracket"), small.start("alone"))  # the group that did not match is at -1
        text = text[:i] + text[i].upper() + text[i + 1 :]
    return text.strip()


# Letters that are stated ------------------------------------------------------------------------------------
def _stated_letters(text: str, words: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Letters that the answer gives as its answer."""
    # In three places: at the start, behind "the answer is", and before "is correct".
    letter = _letter_at_start(text, words)
    if letter is not None:
        yield letter
    for match in _ANSWER.finditer(text):
        if not _is_doubted(text, match.start()):
            letter = _letter_at_start(text[match.end() :], words, in_sentence=True)
            if letter is not None:
                yield letter
    for match in _IS_RIGHT.finditer(text):
        if match["letter"] in words and not _is_doubted(text, match.start()):
            yield match["letter"]


def _letter_at_start(
    text: str, words: Mapping[str, tuple[str, ...]], *, in_sentence: bool = False
) -> str | None:
    """The letter at the start of a text, if a mark, its end, or its option's text shows that it is meant as
    one.

    Args:
        in_sentence: the text is the rest of a sentence ("the answer is ..."), so a comma or "because" ends
            the letter too.
    """
    match = re.match(r"([(\[{']?)\s*([A-Z])(?!\w)(.*)", text, re.DOTALL)
    if match is None or match[2] not in words:
        return None
    bracket, letter, text_behind = match.groups()
    words_behind = option_words(text_behind)
    option = words[letter]
    others = [option_b for letter_b, option_b in words.items() if letter_b != letter]
    # "B text": the text of this option, and of no other, makes any mark needless.
    has_own_text = bool(words_behind) and words_behind == option and words_behind not in others
    if has_own_text and "?" not in text_behind:
        return letter
    # Otherwise a bracket, a mark or the end must show that the letter is no word: "A nodule" is none.
    in_brackets = bool(bracket) and re.match(r"\s*[.:]?[)\]}']", text_behind)
    ends = _END_OF_LETTER + (_END_IN_SENTENCE if in_sentence else "")
    if not in_brackets and not re.match(ends, text_behind):
        return None
    if _is_denied_behind(text_behind, words_behind, option):
        return None
    if not words_behind:
        return letter
    # What follows must not contradict the letter, nor make it a part of a name.
    if _names_other(words_behind, option, others) or _is_name_part(letter, words_behind, words):
        return None
    return letter


def _is_denied_behind(text_behind: str, words_behind: tuple[str, ...], option: tuple[str, ...]) -> bool:
    """Whether the text behind a letter takes it back: "B is not likely", "B: no"."""
    clause = _CLAUSE_BEHIND.match(text_behind)
    if clause and not _DOUBTING_WORDS.isdisjoint(option_words(clause[0])):
        return True
    return bool(words_behind) and words_behind != option and _DOUBTING_WORDS.issuperset(words_behind)


def _names_other(
    words_behind: tuple[str, ...], option: tuple[str, ...], others: Sequence[tuple[str, ...]]
) -> bool:
    """Whether the words behind a letter are the text of another option, or a part of it that is not in this
    one.
    """
    for other_option in others:
        if words_behind == other_option and words_behind != option:
            return True
        # "B. adenocarcinoma" where A is "lung adenocarcinoma" and B "squamous carcinoma".
        in_other_only = _contains(other_option, words_behind) and not _contains(option, words_behind)
        if in_other_only and not _is_slight(words_behind):
            return True
    return False


def _is_name_part(letter: str, words_behind: tuple[str, ...], words: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the letter begins a name in the text of an option, as in "C. difficile"."""
    name = (letter.lower(), *words_behind[:1])
    return any(_contains(option, name) for option in words.values())


def _is_doubted(text: str, position: int) -> bool:
    """Whether the sentence before a position denies or doubts."""
    # Only the sentence that leads to the position: "It is not clear-cut. The answer is B" is no denial.
    sentence = re.split(r"[.!?;\n]", text[:position])[-1]
    return not _DOUBTING_WORDS.isdisjoint(option_words(sentence))


def _other_letters(text: str, table: Mapping[str, str], *, stated: bool) -> set[str]:
    """Option letters that stand alone in a text, outside of the texts of options.

    Args:
        stated: a letter is given as the answer: then later sentences may say why others are not it.
    """
    # The longest first: an option may be part of another. Texts of one letter stay: taking them out would
    # hide that very letter.
    for option in sorted(table.values(), key=len, reverse=True):
        if len(option.strip()) > 1:
            phrase = r"\s+".join(map(re.escape, option.split()))
            text = re.sub(rf"(?<!\w){phrase}(?!\w)", "x", text, flags=re.IGNORECASE)
    if stated:
        text = _without_rejections(text)
    letters = set()
    for match in re.finditer(r"(?<![\w'-])([A-Z])(?![\w']|-\w)(?:\s+([a-z0-9(]\w*))?", text):
        letter, following = match.groups()
        # "A nodule" and "I think" hold an article and a pronoun.
        is_word = letter in "AI" and following and following not in _JOINING_WORDS
        if letter in table and not is_word:
            letters.add(letter)
    return letters


def _without_rejections(text: str) -> str:
    """A text without those sentences behind the first that say why something is not the answer."""
    first, *more = re.split(r"(?<=[.!;\n])(?=\s)", text)
    remaining = [first]
    for sentence in more:
        if _REJECTING_WORDS.isdisjoint(option_words(sentence)):
            remaining.append(sentence)
    return "".join(remaining)


# Texts of options that are named ----------------------------------------------------------------------------
def _named_option(text: str, words: Mapping[str, tuple[str, ...]]) -> str:
    """The one option whose full text the answer gives, or ""."""
    plain = plain_text(_LEAD_IN.sub("", text))
    tokens = list(TOKEN.finditer(plain))
    answer_words = tuple(token[0] for token in tokens)
    if "?" in text:  # a question back
        return ""
    # The plainest case: the answer is the text of one option and nothing else. Two options may have one text.
    whole_answer = without_article(answer_words)
    same = [letter for letter, option in words.items() if option and option == whole_answer]
    if same:
        return same[0] if len(same) == 1 else ""
    # Otherwise a sentence that holds the text of exactly one option.
    spans = _longest_spans(answer_words, words)
    letters = {letter for *_, letter in spans}
    if len(letters) != 1:
        return ""
    inside: set[int] = set()
    for start, end, _ in spans:
        if not _is_phrase(plain, tokens, start, end):
            return ""
        # A slight option must end the answer: "the grade is 2" names it, "2 nodules" does not.
        if _is_slight(answer_words[start:end]) and not _ends_answer(answer_words, start, end):
            return ""
        inside.update(range(start, end))
    # Words of denial within the option's own text ("no tumour") are its meaning, others deny it.
    outside = [word for i, word in enumerate(answer_words) if i not in inside]
    if not _DOUBTING_WORDS.isdisjoint(outside):
        return ""
    return letters.pop()


def _longest_spans(
    answer_words: tuple[str, ...], words: Mapping[str, tuple[str, ...]]
) -> list[tuple[int, int, str]]:
    """(start, end, letter) where the text of an option stands, without those inside the span of a longer
    option.
    """
    spans = []
    for letter, option in words.items():
        for start in range(len(answer_words)):
            end = start + len(option)
            if option and answer_words[start:end] == option:
                spans.append((start, end, letter))
    longest = []
    for start, end, letter in spans:
        # "grade 1" within "grade 1-2" is not what was meant.
        covered = False
        for start_b, end_b, _ in spans:
            if start_b <= start and end <= end_b and end_b - start_b > end - start:
                covered = True
        if not covered:
            longest.append((start, end, letter))
    return longest


def _is_phrase(plain: str, tokens: Sequence[re.Match[str]], start: int, end: int) -> bool:
    """Whether the tokens are a phrase of their own: no word beside makes another thing of them
    ("micro-invasive", "... in situ").
    """
    # On the left: the start of the answer, a word that leads in, or a mark behind a word of substance.
    left = start == 0 or tokens[start - 1][0] in _WORDS_BEFORE
    if start and not left:
        before = tokens[start - 1]
        gap = plain[before.end() : tokens[start].start()]
        left = bool(re.search(r"[.,;:!\n]", gap)) and not _is_slight([before[0]])
    if end == len(tokens):
        return left
    # On the right: the same, except that "in situ" makes another disease of a carcinoma.
    after = tokens[end][0]
    gap = plain[tokens[end - 1].end() : tokens[end].start()]
    if after == "in" and [token[0] for token in tokens[end + 1 : end + 2]] == ["situ"]:
        return False
    if after in _WORDS_AFTER:
        return left
    mark = bool(re.search(r"[.,;:!\n]", gap))
    return left and mark and after not in _JOINING_WORDS and not _is_slight([after])


def _ends_answer(answer_words: Sequence[str], start: int, end: int) -> bool:
    """Whether a slight option ends the answer, and nothing else in it is as slight (an article is not)."""
    slight = [word for word in answer_words[:start] if word != "a" and _is_slight([word])]
    return end == len(answer_words) and not slight


def _is_slight(words: Iterable[str]) -> bool:
    """Words that mean little alone: numbers, signs, single letters, Roman numerals, yes and no."""
    slight = r"[\d.,]+|\W|\w|[ivx]+[abc]?|yes|no|none|na|true|false"
    return all(re.fullmatch(slight, word) for word in words)


def _contains(words: Sequence[str], part: Sequence[str]) -> bool:
    """Whether `part` stands in `words` without a gap."""
    starts = range(len(words) - len(part) + 1)
    return any(tuple(words[i : i + len(part)]) == tuple(part) for i in starts)
