import json

import pytest

from medvl.evaluation.answers import normalise, same_answer, same_by_tfidf, tfidf_cosine

RIGHT = [  # (said, gold)
    # the same but for what carries no meaning
    ("CT", "CT."),
    ("  ct\t", "CT"),
    ("ＣＴ １２", "CT 12"),
    ("The right frontal lobe", "right frontal lobe"),
    ("a catheter", "Catheter"),
    ("There is a 5 mm nodule in the lung.", "5mm nodule in lung"),
    ("**Pneumonia**", '"Pneumonia"'),
    ("Crohn’s disease", "crohn's disease"),
    ("X-Ray", "xray"),
    ("X-ray", "x ray"),
    ("T2‑weighted", "T2 weighted"),
    ("Non–small-cell carcinoma", "non small cell carcinoma"),
    ("Three", "3"),
    ("Two-chamber view", "2 chamber view"),
    ("twenty one", "twenty-one"),
    ("1,000 ml", "1000 ml"),
    ("6.5×6.2×8.8 cm", "6.5 x 6.2 x 8.8cm"),
    ("5 %", "5%"),
    ("5 cm³", "5 cm3"),
    ("heart & liver", "Heart and Liver"),
    ("Lung, and spinal cord", "Lung, Spinal Cord"),
    # lead-ins, on both sides
    ("It is pneumonia.", "pneumonia"),
    ("Answer: Pneumonia", "The image shows pneumonia."),
    ("The answer is: there is pneumonia", "Pneumonia"),
    ("The final answer is B.", "B"),
    ("It's the liver", "This is the liver"),
    # denials
    ("There is no pleural effusion.", "No pleural effusion"),
    ("There isn't a pleural effusion", "no pleural effusion"),
    ("No evidence of pleural effusion", "no pleural effusion"),
    ("Pleural effusion is absent.", "No pleural effusion"),
    ("pleural effusion not seen", "No pleural effusion is seen."),
    ("Negative for pleural effusion", "No pleural effusion"),
    ("A pleural effusion cannot be seen", "Without pleural effusion"),
    ("The pleural effusion can't be seen", "w/o pleural effusion"),
    ("There is not any effusion", "no effusion"),
    ("None", "none."),
    ("There are none", "None"),
    ("Pleural effusion is present", "pleural effusion"),
    # sides
    ("L lung", "left lung"),
    ("Lt. lung", "Left lung"),
    ("On the left side.", "Left"),
    ("R", "right"),
    ("left sided effusion", "left-sided effusion"),
    ("left and right pleural effusion", "Bilateral pleural effusion"),
    ("Right & left", "both sides"),
    ("in the right lung", "Right lung"),
    # closed
    ("Yes.", "yes"),
    ("YES!", "Yes"),
    ("yes, there is a fracture", "Yes"),
    ("Yes, there is a fracture on the left and on the right", "Yes"),
    ("Yes it is", "yes"),
    ("The answer is yes", "yes"),
    ("Yes - the heart is enlarged", "yes"),
    ("No.", "no"),
    ("No, there is no fracture.", "no"),
    ("No, there isn't", "No"),
    ("No. There is no evidence of a fracture", "no"),
    ("No, I don't see a fracture", "no"),
    ("No it is not", "no"),
]
WRONG = [
    # nothing said
    (None, "yes"),
    ("", "no"),
    (" \n. ", "no"),
    # opposites
    ("No pleural effusion", "Pleural effusion"),
    ("Pleural effusion", "No pleural effusion"),
    ("right lower lobe pneumonia", "left lower lobe pneumonia"),
    ("R lower lobe", "L lower lobe"),
    ("Pleural effusion is not absent", "No pleural effusion"),
    ("Pleural effusion cannot be excluded", "No pleural effusion"),
    ("Pleural effusion cannot be excluded", "Pleural effusion"),
    ("not without effusion", "no effusion"),
    ("No no effusion", "no effusion"),
    ("No. Pleural effusion.", "No pleural effusion"),
    ("No\npleural effusion", "No pleural effusion"),
    ("No, pleural effusion", "No pleural effusion"),
    ("No; pleural effusion", "No pleural effusion"),
    ("No (pleural effusion)", "No pleural effusion"),
    ("No effusion. Pneumonia.", "No effusion and pneumonia"),
    ("No effusion but pneumonia", "Effusion but no pneumonia"),
    ("effusion and mass not seen", "no effusion and mass"),
    ("effusion or mass is absent", "no effusion or mass"),
    ("No effusion is absent", "no no effusion"),
    ("not only effusion", "effusion"),
    ("Effusion?", "Effusion"),
    ("Effusion is possible", "Effusion is"),
    ("HER2-", "HER2"),
    ("HER2+", "HER2"),
    ("HER2 (-)", "HER2"),
    # sides
    ("left and right", "left"),
    ("bilateral effusion", "left effusion"),
    ("left effusion", "bilateral effusion"),
    ("Left or right", "left"),
    ("ventricle right, left atrium", "ventricle left, right atrium"),
    ("mass bilateral lung clear", "mass left, right lung clear"),
    ("L-spine", "left spine"),
    ("L spine", "left spine"),
    ("L 5", "left 5"),
    ("L5", "left 5"),
    ("4R lymph node", "4L lymph node"),
    ("Right lung, Left", "Left Lung, Right"),
    # closed
    ("no", "yes"),
    ("not", "yes"),
    ("yes", "no"),
    ("Yes and no", "yes"),
    ("yes/no", "yes"),
    ("yes-no", "yes"),
    ("Yes, there is no fracture", "yes"),
    ("Yes, but the fracture has been ruled out", "yes"),
    ("Yes, possibly", "yes"),
    ("Yes?", "yes"),
    ("Yes. No.", "yes"),
    ("There is no", "no"),
    ("No evidence of", "no"),
    ("Yes, a never-seen fracture", "yes"),
    ("Not yes", "yes"),
    ("yesterday", "yes"),
    ("There is a fracture", "yes"),
    ("No, there is a fracture", "no"),
    ("No, yes there is", "no"),
    ("No - fracture is seen", "no"),
    ("No, it is not absent", "no"),
    ("No abnormality", "no"),
    ("No doubt", "no"),
    ("No or yes", "no"),
    ("nothing", "no"),
    ("Yes", "Yes, on the left"),
    # numbers and units
    ("5 mm", "5 cm"),
    ("1.5 cm", "15 cm"),
    ("1.5", "1,5"),
    ("1234,567", "1234567"),
    ("-1", "1"),
    ("−1", "1"),
    ("T-score -2.5", "T-score 2.5"),
    ("T-2.5", "T 2.5"),
    (".5", "5"),
    ("1.0", "1"),
    ("3-5", "35"),
    ("3-5", "3 5"),
    ("1:2", "12"),
    ("<5 mm", "5 mm"),
    ("<5 mm", ">5 mm"),
    ("~5 mm", "5 mm"),
    ("50%", "50"),
    ("1½", "11/2"),
    ("5'", "5''"),
    ("3 x 4 cm", "4 x 3 cm"),
    ("21", "twenty-one nodules"),
    ("20 1", "twenty-one"),
    ("two", "3"),
    # articles that are none
    ("Hepatitis A", "Hepatitis"),
    ("Hepatitis A", "Hepatitis B"),
    ("A", "B"),
    ("A-lines", "lines"),
    ("A and B", "B"),
    # others
    ("nodules", "nodule"),
    ("lung", "left lung"),
    ("left lung nodule", "nodule left lung"),
    ("Pneumonia. It may be viral.", "Pneumonia"),
    ("CT or MRI", "CT"),
]


@pytest.mark.parametrize(("said", "gold"), RIGHT)
def test_right(said, gold):
    assert same_answer(said, gold), (normalise(said), normalise(gold))


@pytest.mark.parametrize(("said", "gold"), WRONG)
def test_wrong(said, gold):
    assert not same_answer(said, gold), normalise(gold)


def test_case_and_space_around_never_decide():
    for table, want in ((RIGHT, True), (WRONG, False)):
        for said, gold in table:
            if said:
                assert same_answer(f" \n{said.upper()}  ", gold.lower()) == want, said


def test_open_answers_compare_both_ways():
    for table, want in ((RIGHT, True), (WRONG, False)):
        for said, gold in table:
            if said and said.strip(" \n.") and not {normalise(said), normalise(gold)} & {"yes", "no"}:
                assert same_answer(gold, said) == want, said


def test_every_text_is_its_own_answer_and_no_other_polarity():
    for text in {t for pair in RIGHT + WRONG for t in pair if t and t.strip(" \n.")}:
        assert same_answer(text, text), text
        if normalise(text) not in ("yes", "no"):
            assert not same_answer(f"not {text}", text), text
            assert not same_answer(f"{text} left", text), text


def test_all_ways_to_state_and_deny_a_finding_of_a_side():
    """All come to one text for each meaning, and to another for another."""
    ways = {
        "yes": [
            "{} effusion",
            "There is a {} effusion.",
            "{} effusion is seen",
            "The image shows {} effusion",
            "Answer: {} effusion present!",
        ],
        "no": [
            *(
                "No {} effusion",
                "There is no {} effusion.",
                "There is not a {} effusion",
                "{} effusion is absent",
                "Negative for {} effusion",
            ),
            *(
                "{} effusion cannot be seen",
                "The {} effusion is not visible",
                "No {} effusion identified",
                "Without any {} effusion",
            ),
            *(
                "There isn't evidence of a {} effusion",
                "no signs of {} effusion",
            ),
        ],
    }
    names = {
        "left": ("left", "L", "Lt.", "left-sided"),
        "right": ("Right", "r", "rt", "right sided"),
        "bilateral": ("bilateral",),
    }
    said = [
        (way.format(name), (kind, side))
        for kind, held in ways.items()
        for way in held
        for side, given in names.items()
        for name in given
    ]
    of: dict = {}
    for text, meant in said:
        of.setdefault(meant, set()).add(normalise(text))
        for gold in (("yes", "left"), ("no", "left"), ("yes", "right"), ("no", "bilateral")):
            assert same_answer(text, f"{'No ' if gold[0] == 'no' else ''}{gold[1]} effusion") == (
                meant == gold
            ), (text, gold)
    assert sorted(len(v) for v in of.values()) == [1] * 6
    assert len(set.union(*of.values())) == 6


def test_gold_without_words():
    for gold in ("", " ", ".", "..."):
        with pytest.raises(ValueError, match="same_answer: gold must hold a word"):
            same_answer("yes", gold)


@pytest.mark.parametrize(
    ("file", "number", "merged"),
    [
        ("slake_test.json", 133, ["no: No, None", "transverse plane: Transverse  Plane, Transverse Plane"]),
        (
            "vqa_rad/vqa_rad_share.json",
            355,
            [
                "bilateral: Bilateral, both sides",
                "brain: Brain, the brain",
                "left: Left, Left side",
                "mr flair: MR FLAIR, MR-FLAIR",
                "no sure: Not sure, Not sure.",
                "pancreas: Pancreas, The pancreas",
                "right frontal lobe: R frontal lobe, Right frontal lobe, The right frontal lobe",
                "right: Right, Right side",
                "t2 weighted: T2 weighted, T2-weighted",
            ],
        ),
    ],
)
def test_answers_of_real_sets(shared_data, file, number, merged):
    """Which written answers count as one, beside those that differ in case or space around only."""
    rows = json.loads((shared_data / "medvqa" / file).read_text())
    gold = sorted({str(r["answer"]) for r in rows if r.get("q_lang", "en") == "en"})
    assert len(gold) == number
    of = {}
    for g in gold:
        assert same_answer(f"The answer is {g}.", g)
        of.setdefault(normalise(g), {}).setdefault(g.casefold().strip(), g)
    assert sorted(f"{k}: {', '.join(v.values())}" for k, v in of.items() if len(v) > 1) == merged


def test_normalise():
    assert normalise("The image shows that there isn't a left-sided 5mm nodule!") == "no left 5 mm nodule"
    assert normalise("One, two & three.") == "1 and 2 and 3"
    assert normalise("No mass. Effusion: small") == "no mass . effusion . small"
    assert normalise(" . ") == ""
    assert normalise("5 mg/L, grade A") == "5 mg/l and grade a"


@pytest.mark.parametrize(
    ("said", "gold", "want"),
    [
        ('Click on button with the text "Filters (1)"', 'Click on button with the text "Brands"', 0.752),
        ("No pleural effusion", "Pleural effusion", 0.709),
        ("left lower lobe pneumonia", "right lower lobe pneumonia", 0.603),
        ("Scroll down", "Scroll up", 0.336),
        ("Scroll down", "scroll DOWN!", 1.0),
        ("", "", 0.0),
        (None, "lung", 0.0),
        ("lung", "?", 0.0),
        ("A", "A", 0.0),
        ("lung", "heart", 0.0),
    ],
)
def test_tfidf(said, gold, want):
    for a, b in ((said, gold), (gold, said or "")):
        assert tfidf_cosine(a, b) == pytest.approx(want, abs=5e-4)
        assert same_by_tfidf(a, b) == (want > 0.6)
    assert same_by_tfidf(said, gold, threshold=0.7) == (want > 0.7)


def test_tfidf_is_the_formula():
    """Counts times ln(3 / (1 + texts with the word)) + 1, by hand."""
    from math import log, sqrt

    one, two = 1.0, log(3 / 2) + 1  # weight of a word of both texts, of one text
    want = (2 * one) * one / sqrt((2 * one) ** 2 + two**2) / sqrt(one**2 + two**2)
    assert tfidf_cosine("lung lung left", "lung heart") == pytest.approx(want, abs=1e-12)
