"""Letters of answers: every plain way to give one is understood, and nothing that is said otherwise becomes a wrong one."""

import json

import pytest
import torch

from medvl.evaluation.choice_answers import extract_letter
from medvl.evaluation.choices import (
    comparable_text,
    format_question,
    letter_options,
    letters_by_likelihood,
    split_options,
)

SETS = (  # options that are easily taken for each other, or hold letters, numbers and signs
    ("Adenocarcinoma", "Squamous cell carcinoma", "Small cell carcinoma", "Non-small cell carcinoma"),
    ("Luminal A", "Luminal B", "HER2(+)", "Triple negative"),
    ("0", "1+", "2+", "3+"),
    ("Positive", "Negative"),
    ("1", "2", "3"),
    ("grade 1", "grade 1-2", "grade 2", "grade 3"),
    ("Stage I", "Stage II", "Stage III", "Stage IV"),
    ("T1a N0 M0", "T1a N0", "T2 N0 M0", "T2 N1 M1"),
    (
        "Invasive ductal carcinoma",
        "Ductal carcinoma in situ",
        "Invasive carcinoma",
        "Microinvasive carcinoma",
    ),
    ("Well differentiated", "Moderately differentiated", "Poorly differentiated", "Undifferentiated"),
    ("A benign tumor", "A malignant tumor", "Both", "None of the above"),
    ("Less than 5 cm", "5 cm", "More than 5 cm", ">10 cm"),
    ("C. difficile colitis", "Ulcerative colitis", "Ischemic colitis", "Colitis"),
    ("Type A thymoma", "Type AB thymoma", "Type B1 thymoma", "Thymic carcinoma"),
    ("Present", "Not present", "Present only in the margin"),
    ("Yes", "No", "None", "NA"),
    ("Hepatitis B", "Hepatitis C", "Vitamin D deficiency", "I-cell disease"),
    ("Keratinizing, with necrosis", "Keratinizing", "Non-keratinizing, with necrosis", "Necrosis"),
)
LETTERED = (  # plain answers with a letter: all must be understood
    *(
        "{l}",
        " {l} ",
        "{l}.",
        "({l})",
        "[{l}]",
        "**{l}**",
        "**{l}.**",
        "{l})",
        "{l}:",
        "{l}\n",
        "'{l}'",
        '"{l}"',
        "\\boxed{{{l}}}",
        "`{l}`",
    ),
    *(
        "{l}. {t}",
        "{l}. {t}.",
        "{l}.{t} ",
        "{l}: {t}",
        "{l}) {t}",
        "({l}) {t}",
        "**{l}. {t}**",
        "**{l}** {t}",
        "{l} {t}",
        "{l} - {t}",
    ),
    *(
        "{l}. {t}. ",
        "{l}\n\n{t}",
        "{l}: a",
        "{l}. The findings speak for it.",
        "({l}) because of the nuclei",
        "Option {l}",
        "Answer {l}.",
    ),
    *(
        "Answer: {l}",
        "Answer: {l}. {t}",
        "**Answer:** {l}",
        "**Answer: ({l})**",
        "answer is {l}",
        "The answer is ({l}).",
        "Answer: {l}) {t}",
    ),
    *(
        "The correct answer is {l}.",
        "The correct answer is option {l}: {t}.",
        "Final answer: {l}",
        "The answer is {l} because of it",
    ),
    *(
        "The slide shows much. The answer is {l}.",
        "Option {l}: {t}",
        "I choose {l}.",
        "{l} is the correct answer.",
    ),
)
NAMED = (
    "{t}",
    "{t}.",
    " {t} ",
    "Answer: {t}",
    "The answer is {t}.",
    "**{t}**",
    "Answer: **{t}**",
    "- {t}",
)  # all must be understood
LOOSE = (  # the option or nothing
    *(
        "This is a case of {t}.",
        "A case of {t}",
        "The diagnosis is {t}",
        "{u}",
        "It is most likely {t}.",
        "a {t}",
        "A {t}",
        "An {t}",
    ),
    *(
        "{t}, as the nuclei show",
        "The slide shows {t} in a biopsy.",
        "I see {t}",
        "I think it is {t}.",
        "{t} is seen.",
        "{t} {t}",
    ),
    *(
        "A typical pattern. {t}.",
        "Diagnosis: {t}",
        "Given A and the rest, {t}",
        "Well, {t}!",
        "{m}. {t}",
        "{m}) {t}",
        "{m}",
        "({m}) {t}",
    ),
    *(
        "b. {t}",
        "The {t} of group A",
        "ANSWER: {t}",
        "A. {t} B. {t}",
        "It seems {t}",
        "{t}: type A",
        "D: {t}",
        "I. {t}",
        "II. {t}",
    ),
)
NOTHING = (  # another or several are named, or it is denied: never a letter, or the one that is meant in a set of two
    *(
        "not {l}",
        "Not {l}.",
        "It is not {l}.",
        "The answer is not {l}.",
        "{l} is wrong.",
        "{l}) is incorrect",
        "Option {l} is wrong.",
    ),
    *(
        "{l} or {o}",
        "{l} and {o}",
        "{l}, {o}",
        "{l}/{o}",
        "{l}. {t} {o}. {s}",
        "Either {l} or {o}.",
        "{l}. {o}.",
        "The answer is {l} or {o}.",
    ),
    *(
        "The answer is {l}. No, the answer is {o}.",
        "If the answer is {l}, it grows.",
        "Is the answer {l}?",
        "Neither {l} nor {o} is correct.",
    ),
    *(
        "{l}. {s}",
        "{o}: {t}",
        "({o}) {t}",
        "Answer: {l}. {s}",
        "It is not {l}. {t}",
        "I would not choose {l}.",
        "{l} versus {o}",
    ),
    *(
        "{t} or {s}",
        "Either {t} or {s}.",
        "The differential is {t} versus {s}.",
        "It is between {t} and {s}",
        "{t}? {s}?",
    ),
    *(
        "{t}?",
        "{l}: unlikely",
        "I doubt the answer is {l}.",
        "{t} was considered.",
        "Past history: {t}",
        "{l}. {o}",
    ),
    *(
        "I would rule out {t}.",
        "{t} has been excluded.",
        "No evidence of {t}",
        "{t} is unlikely.",
        "All but {l}",
        "{l} is not it. {l}?",
    ),
    *(
        "{t}\n{s}",
        "- {t}\n- {s}",
        "a) {t} b) {s}",
        "{l}) {t}\n{o}) {s}",
        "the answer can't be {l}.",
        "The wrong answer is {l}",
        "{l} > {o}",
    ),
    *(
        "It is neither {t} nor {s}.",
        "There is no sign of {t} or {s}.",
        "Answer: {l}, {o}",
        "The answer is {l}, which is wrong.",
    ),
)
BLANK = (  # no option at all
    *(
        "",
        "   ",
        ".",
        "A case of lymphoma.",
        "A lymphoma",
        "a",
        "b.",
        "A tumour of the D cells.",
        "I cannot tell.",
        "ANSWER:",
        "Answer: a mass",
    ),
    *(
        "A small biopsy shows B-cell lymphoma.",
        "D.C.I.S.",
        "C.O.P.D. is seen",
        "Both A and B are right",
        "All of A, B, C and D",
        "A B C D",
    ),
    *(
        "Vitamin C and group A",
        "A/B",
        "B12",
        "The answer is A case of lymphoma.",
        "Answer: B-cell lymphoma",
        "iii.",
        "II",
        "B?",
        "A-",
    ),
    *(
        "C:G>A mutation",
        "B.1 was found",
        "b",
        "d)",
        "The answer is unclear: it may be B",
        "Grade A",
        "I",
        "A nd",
        "As it is",
        "Dr. B. Smith",
    ),
)


def cases(templates):
    for options in SETS:
        table = letter_options(options)
        for letter, text in table.items():
            other = next(k for k in [*list(table)[list(table).index(letter) + 1 :], *table] if k != letter)
            marks = {
                "l": letter,
                "t": text,
                "o": other,
                "s": table[other],
                "u": text.upper(),
                "m": letter.lower(),
            }
            for template in templates:
                yield options, letter, template.format(**marks)


@pytest.mark.parametrize("templates", [LETTERED, NAMED], ids=["letter", "text"])
def test_every_plain_answer_is_understood(templates):
    found = [
        (said, options, letter, extract_letter(said, options)) for options, letter, said in cases(templates)
    ]
    assert len(found) > 400
    assert not [f for f in found if f[2] != f[3]]


def test_no_answer_becomes_a_wrong_letter():
    found = [(said, options, letter, extract_letter(said, options)) for options, letter, said in cases(LOOSE)]
    assert len(found) > 2000
    assert not [f for f in found if f[3] not in ("", f[2])]
    assert sum(f[3] == f[2] for f in found) / len(found) > 0.5


def test_what_names_another_or_several_is_no_answer():
    found = [(said, options, extract_letter(said, options)) for options, _, said in cases(NOTHING)]
    assert len(found) > 3000
    assert not [f for f in found if f[2]]


@pytest.mark.parametrize("options", SETS, ids=lambda o: o[0])
def test_what_names_no_option_is_no_answer(options):
    assert not [said for said in (*BLANK, None) if extract_letter(said, options)]


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B. Squamous cell carcinoma. Option A is less likely.", "B"),
        ("The answer is B. Note that A is a common distractor.", "B"),
        ("B. A is not seen. C is unlikely.", "B"),
        ("(d)", "D"),
        ("(b) Squamous cell carcinoma", "B"),
        ("ANSWER: b", "B"),
        ("Answer: (b).", "B"),
        ("It's B", "B"),
        ("It\u2019s option B.", "B"),
        ("It is B.", "B"),
        ("<think></think>B. Squamous cell carcinoma", "B"),
        ("<think>A or C? The answer is A.</think>\n\nB", "B"),
        ("A or C? Not A.</think>\n\nB", "B"),
        ("<think>A?</think><answer>B</answer>", "B"),
        ("<answer>\nB. Squamous cell carcinoma\n</answer>", "B"),
        ("Choice: B", "B"),
        ("Correct option: B", "B"),
        ("Final Answer - B", "B"),
        ("Best choice - B. Squamous cell carcinoma", "B"),
        ("B\u3002", "B"),
        ("B\u3002Squamous cell carcinoma", "B"),
        # These stay without a letter.
        ("B. Or A.", ""),
        ("B. A is also likely.", ""),
        ("It's B or C", ""),
        ("Correct option: not B", ""),
        ("Choice: a mass", ""),
        ("<answer>B</answer><answer>C</answer>", ""),
        ("It's not B", ""),
        ("It is B cell rich", ""),
        ("<think>The answer is B.", ""),
        ("Answer: a mass", ""),
        ("(b) Small cell carcinoma", ""),
        ("(e)", ""),
        ("(a benign one)", ""),
    ],
)
def test_letters_as_models_write_them(said, letter):
    assert extract_letter(said, SETS[0]) == letter


def test_wide_letters_are_letters_and_articles_are_none():
    assert extract_letter("Ｂ．", SETS[0]) == "B"
    assert extract_letter("A case of small cell carcinoma.", SETS[0]) == "C"
    assert extract_letter("A benign tumor", ["Malignant", "Benign tumor"]) == "B"
    assert extract_letter("A benign tumor", ["Benign tumor", "A benign tumor"]) == ""
    assert extract_letter("A dense infiltrate of lymphocytes.", ["Necrosis", "Fibrosis"]) == ""


def test_the_same_answer_to_all_is_right_only_where_it_is_meant():
    """No answer helps by its wording: a constant is right for one letter only."""
    for said in (*BLANK, "The answer is in the slide.", "This is a case of carcinoma of the organ."):
        assert {extract_letter(said, dict(zip("ABCD", ("w", "x", "y", "z"), strict=True)))} == {""}, said


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("It is ductal carcinoma in situ.", ["Ductal carcinoma", "Fibroadenoma"]),
        ("It is moderately to poorly differentiated", ["Well differentiated", "Poorly differentiated"]),
        ("It is a micro-invasive carcinoma.", ["Invasive carcinoma", "Adenoma"]),
        ("It is a pseudo-lymphoma", ["Lymphoma", "Adenoma"]),
        ("This is stage III A.", ["Stage III", "Stage II"]),
        ("It is grade 1, 2", ["Grade 1", "Grade 3"]),
        ("The size is 5 cm or so", ["5 cm", "7 cm"]),
        ("It measures 2 of them", ["2", "3"]),
        ("ER 1+, and 3+ cells", ["1+", "2+"]),
        ("Diagnosis: Adenocarcinoma. The answer is B.", ["Adenocarcinoma", "Adenoma"]),
        ("It is C. difficile colitis", ["Colitis", "Gastritis"]),
        ("C. difficile infection", ["Clostridioides difficile infection", "Candidiasis", "Ischemia"]),
    ],
)
def test_part_of_another_thing_is_not_that_option(said, options):
    assert extract_letter(said, options) == ""


def test_gaps_and_options_without_text():
    table = {"A": "x ray", "B": "", "D": "none"}
    assert [extract_letter(s, table) for s in ("C", "D. none", "B", "B. something", "x-ray", "")] == [
        "",
        "D",
        "B",
        "B",
        "A",
        "",
    ]


def test_options_with_one_text_are_told_by_letter_only():
    table = ["Grade 1", "grade 1.", "Grade 2"]
    assert [extract_letter(s, table) for s in ("Grade 1", "It is grade 1.", "B. Grade 1", "Grade 2")] == [
        "",
        "",
        "B",
        "C",
    ]


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Which? A) x B) y C) z", "Which?", {"A": "x", "B": "y", "C": "z"}),
        ("Which? A. x. B. y", "Which?", {"A": "x.", "B": "y"}),
        ("Which?\nA. x\nB. y z\n", "Which?", {"A": "x", "B": "y z"}),
        ("Which?A: x B: y", "Which?", {"A": "x", "B": "y"}),
        ("Which? A. x B. y C.In it D. w", "Which?", {"A": "x", "B": "y", "C": "In it", "D": "w"}),
        ("Which? A. x B. y z D. w", "Which?", {"A": "x", "B": "y z", "D": "w"}),
        ("Which? x B. y C. z D. w", "Which? x", {"B": "y", "C": "z", "D": "w"}),
        ("Which? A. B. y", "Which?", {"A": "", "B": "y"}),
        ("Which? (A) x (B) y", "Which?", {"A": "x", "B": "y"}),
        (
            "Hepatitis A. or vitamin? A) Hepatitis B. C. B) D.C.I.S.",
            "Hepatitis A. or vitamin?",
            {"A": "Hepatitis B. C.", "B": "D.C.I.S."},
        ),
        ("Is hepatitis B. seen beside vitamin D. now?", "Is hepatitis B. seen beside vitamin D. now?", {}),
        ("A tumor of 5 cm. What is it?", "A tumor of 5 cm. What is it?", {}),
        ("", "", {}),
    ],
)
def test_split_options(text, question, options):
    assert split_options(text) == (question, options)


def test_what_is_asked_can_be_split_again():
    for options in SETS:
        if not any("." in o for o in options):
            assert split_options(format_question("Which one?", options)) == (
                "Which one?",
                letter_options(options),
            )
    assert format_question("Q?", ["x", "y"]) == "Q?\nA. x\nB. y"


def test_every_real_question_is_split_and_its_answer_found(shared_data):
    wrong, count = [], 0
    for path in sorted((shared_data / "pathology" / "wsi_bench").glob("*choice*.json")):
        for record in json.loads(path.read_text()):
            asked, gold = (turn["value"] for turn in record["conversations"])
            _, options = split_options(asked)
            assert [*options] == ["A", "B", "C", "D"]
            assert gold in options
            for said in (
                "Answer: {t}",
                "This is a case of {t}.",
                "{t}",
                "A {t}",
                "{l}) {t}",
                "{l}",
                "The answer is ({l})",
            ):
                found = extract_letter(said.format(t=options[gold], l=gold), options)
                wrong += [(said, options, gold, found)] if found != gold else []
                count += 1
    assert count == 606 * 7
    assert not wrong


def test_likelihoods_choose_the_letter():
    scores = torch.tensor([[-3.0, -1.0, -2.0], [-1.0, -5.0, -torch.inf], [-1.0, -1.0, -4.0]])
    options = [["x", "y", "z"], {"B": "x", "D": "y"}, ["x", "y", "z"]]
    assert letters_by_likelihood(scores, options) == ["B", "B", "A"]
    with pytest.raises(ValueError, match="2 rows and 3 sets"):
        letters_by_likelihood(scores[:2], options)
    with pytest.raises(ValueError, match="row 1 needs a number for each of 3 options"):
        letters_by_likelihood([[0, 1, 2], [0, float("nan"), 1]], [["x", "y", "z"]] * 2)


def test_comparable():
    same = [
        ("grade 3.", "Grade 3"),
        ("A tumor", "tumor"),
        ("non\u2011small cell", "Non-small  cell"),
        ("Crohn\u2019s", "crohns"),
    ]
    other = [
        ("1+", "1"),
        (">5 cm", "<5 cm"),
        ("grade 1-2", "grade 1 2"),
        ("ER-", "ER+"),
        ("2.5", "2 5"),
        ("is", "isn't"),
    ]
    assert all(comparable_text(a) == comparable_text(b) for a, b in same)
    assert not any(comparable_text(a) == comparable_text(b) for a, b in other)


@pytest.mark.parametrize("options", [[], {}, ["x"] * 27, {"a": "x"}, {"AB": "x"}, "ABCD", [1, 2]])
def test_options_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match="letter_options: "):
        extract_letter("A", options)
