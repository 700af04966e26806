"""Captions and multiple-choice questions about drawn slides, and the files of both. Free of patients."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
import numpy as np
from attrs import frozen

from medvl.base import files
from medvl.phantoms.slides import (
    CLASSES,
    MOTIFS,
    NO_MOTIF,
    OPTIONAL,
    SPLITS,
    SlideConfig,
    Truth,
    balanced_index,
    draw_truth,
    slide_generator,
    write_slides,
)

COLUMNS = (
    "ID",
    "Slide",
    "Tumor",
    "Broad Category",
    "Narrow Category",
    "Question",
    "A",
    "B",
    "C",
    "D",
    "Answer",
)
_LABELS = ("slide", "split", "class", "grade", "lymphocytes", "motif")
_CAPTIONS = 2  # of each slide


@frozen(kw_only=True)
class Question:
    """One multiple-choice question of a slide."""

    family: str  # of FAMILIES, which say its categories and the facts that it takes
    question: str
    options: tuple[str, ...]  # 2 to 4
    letter: str  # of the right one


def draw_slides(cfg: SlideConfig, folder: files.PathLike) -> dict[str, int]:
    """Write slides, captions and questions: features in TRIDENT's layout, tables in the shapes of SlideChat
    and SlideBench.

    - features/{name}.h5: "features" float16 [n, d], "coords" int64 [n, 2] with the attributes patch_size,
        patch_size_level0 and so on.
    - captions.json (of train slides, two each), train.json, valid.json (a question each, answered "C. Text"):
      lists of {"id", "image": ["./features/{name}.h5"], "conversations": [{"from", "value"}, ...]}.
    - test.csv: `COLUMNS`; "Tumor" is the code of the tumour's class, empty options are of questions with
        fewer than four.
    - labels.csv: slide, split, class, grade, lymphocytes, motif.
    - truth.jsonl: a line per slide: "split", the fields of `Truth`, "motif_rows", "questions" (id, family,
      narrow, facts) in the order of the tables.

    Tables come after the slides, truth.jsonl last: no slide is drawn if it is there. Any table that is there
    is left alone.
    Returns:
        number of "slides", "captions", and questions of "train", "valid", "test".
    """
    folder, asked = Path(folder), dict[str, list[tuple[Truth, list[Question]]]]()
    motif_rows = None if (folder / "truth.jsonl").exists() else write_slides(cfg, folder / "features")
    for split in SPLITS:
        asked[split] = [
            (draw_truth(cfg, split, i), draw_questions(cfg, split, i)) for i in range(getattr(cfg, split))
        ]
    told = [
        (truth, *said)
        for i, (truth, _) in enumerate(asked["train"])
        for said in draw_captions(cfg, "train", i)
    ]
    texts = {f"{split}.json": _json(_conversations(split, asked[split])) for split in ("train", "valid")}
    texts["captions.json"] = _json(_turns(f"caption::{i}", *what) for i, what in enumerate(told))
    for name, text in texts.items():
        if not (folder / name).exists():
            files.write_text(folder / name, text)
    if not (folder / "test.csv").exists():
        files.write_csv(folder / "test.csv", _bench("test", asked["test"]), COLUMNS)
    if not (folder / "labels.csv").exists():
        files.write_csv(
            folder / "labels.csv", [_label(s, truth) for s in SPLITS for truth, _ in asked[s]], _LABELS
        )
    if motif_rows is not None:
        lines = [
            _truth_line(s, i, *what, motif_rows[what[0].name])
            for s in SPLITS
            for i, what in enumerate(asked[s])
        ]
        files.write_text(folder / "truth.jsonl", "".join(lines))
    return {"slides": sum(map(len, asked.values())), "captions": len(told)} | {
        s: len(asked[s]) * len(FAMILIES) for s in SPLITS
    }


def draw_questions(cfg: SlideConfig, split: str, number: int) -> list[Question]:
    """One question of every family about a slide; the letters of right answers are balanced over 60 slides in every family."""
    truth, found = draw_truth(cfg, split, number), []
    for k, (name, family) in enumerate(FAMILIES.items()):
        gen = slide_generator(cfg, 2, split, number, k)
        subject, right, wrong = _choices(name, truth, gen)
        place = balanced_index(cfg, 10 + k, split, number) % (len(wrong) + 1)
        options = [str(w) for w in gen.permutation(wrong)]
        options.insert(place, right)
        question = str(gen.choice(family.asks)).format(subject=subject)
        shown = tuple(_sentence(o) for o in options)
        found.append(Question(family=name, question=question, options=shown, letter="ABCD"[place]))
    return found


def draw_captions(cfg: SlideConfig, split: str, number: int) -> list[tuple[str, str]]:
    """(what is asked, caption) twice: five short sentences in any order, each in one of several phrasings."""
    t, found = draw_truth(cfg, split, number), []
    others = [x for x in OPTIONAL if x in t.tissues]
    words = {
        "tumour": t.tumour_class,
        "grade": t.grade,
        "dominant": t.dominant,
        "one": others[0],
        "two": others[1],
        "motif": t.motif,
    }
    for i in range(_CAPTIONS):
        gen = slide_generator(cfg, 3, split, number, i)
        kinds = [
            CAPTION_CLASS,
            CAPTION_TISSUES,
            CAPTION_NECROSIS[t.grade - 1],
            CAPTION_LYMPHOCYTES[t.lymphocytes],
        ]
        kinds.append(CAPTION_NO_MOTIF if t.motif == NO_MOTIF else CAPTION_MOTIF)
        said = [str(gen.choice(kinds[k])).format(**words) for k in gen.permutation(len(kinds))]
        found.append((str(gen.choice(CAPTION_ASKS)), " ".join(map(_sentence, said))))
    return found


def question_prompt(question: str, options: tuple[str, ...]) -> str:
    """What is asked of a model, as SlideChat's test script writes it."""
    return "\n".join(
        ["<image>", question, *(f"{letter}. {o}" for letter, o in zip("ABCD", options, strict=False))]
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# Files ------------------------------------------------------------------------------------------------------
def _json(items: Iterable[dict]) -> str:
    return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n"


def _turns(name: str, truth: Truth, asked: str, answer: str) -> dict:
    talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": [f"./features/{truth.name}.h5"], "conversations": talk}


def _ids(split: str, i: int) -> list[str]:
    return [f"{split}::{i * len(FAMILIES) + k}" for k in range(len(FAMILIES))]


def _conversations(split: str, asked: list[tuple[Truth, list[Question]]]) -> Iterator[dict]:
    for i, (truth, every) in enumerate(asked):
        for name, q in zip(_ids(split, i), every, strict=True):
            yield _turns(
                name,
                truth,
                question_prompt(q.question, q.options),
                f"{q.letter}. {q.options['ABCD'.index(q.letter)]}",
            )


def _bench(split: str, asked: list[tuple[Truth, list[Question]]]) -> Iterator[dict]:
    for i, (truth, every) in enumerate(asked):
        for name, q in zip(_ids(split, i), every, strict=True):
            options = [*q.options, "", ""][:4]
            f, code = FAMILIES[q.family], CLASSES[truth.tumour_class][0]
            about = (name, truth.name, code, f.broad, f.narrow, q.question, *options, q.letter)
            yield dict(zip(COLUMNS, about, strict=True))


def _label(split: str, t: Truth) -> dict:
    return dict(zip(_LABELS, (t.name, split, t.tumour_class, t.grade, t.lymphocytes, t.motif), strict=True))


def _truth_line(split: str, i: int, truth: Truth, asked: list[Question], motif_rows: list[int]) -> str:
    kinds = [(q.family, FAMILIES[q.family]) for q in asked]
    about = [
        {"id": n, "family": k, "narrow": f.narrow, "facts": f.facts}
        for n, (k, f) in zip(_ids(split, i), kinds, strict=True)
    ]
    return (
        json.dumps({"split": split, **attrs.asdict(truth), "motif_rows": motif_rows, "questions": about})
        + "\n"
    )


# What is asked and said -------------------------------------------------------------------------------------
@frozen(kw_only=True)
class Family:
    """Questions about one thing; {subject} is what `_choices` says."""

    broad: str
    narrow: str
    facts: tuple[str, ...]  # fields of Truth that it takes to answer
    asks: tuple[str, ...]


def _family(place: str, fact: str, *asks: str) -> Family:
    broad, narrow = place.split("/")
    return Family(broad=broad, narrow=narrow, facts=(fact,), asks=asks)


def _choices(family: str, t: Truth, gen: np.random.Generator) -> tuple[str, str, list[str]]:
    """(subject, right option, wrong ones)."""
    there, absent = ([x for x in OPTIONAL if (x in t.tissues) == here] for here in (True, False))
    grade, classes, motifs = t.grade - 1, list(CLASSES), [*MOTIFS, NO_MOTIF]
    one_of = lambda right, every: ("", right, [x for x in every if x != right])
    if family == "present":
        return "", str(gen.choice(there)), absent
    if family in ("tissue", "motif_there"):  # as often yes as no: four of five slides have a motif
        if family == "tissue":
            yes = gen.random() < 0.5
            subject = gen.choice(there if yes else absent)
        else:
            yes = t.motif != NO_MOTIF and gen.random() < 5 / 8
            subject = t.motif if yes else gen.choice([m for m in MOTIFS if m != t.motif])
        return str(subject), *(("yes", ["no"]) if yes else ("no", ["yes"]))
    if family == "motif":
        wrong = gen.permutation([m for m in motifs if m != t.motif])[:3]
        return "", t.motif, [str(w) for w in wrong]
    if family == "differential":
        return "", t.tumour_class, [str(gen.choice([c for c in classes if c != t.tumour_class]))]
    return {
        "dominant": one_of(t.dominant, [x for x in t.tissues if x not in ("necrosis", "lymphocytes")]),
        "necrosis": one_of(NECROSIS_WORDS[grade], NECROSIS_WORDS),
        "lymphocytes": one_of(LYMPHOCYTE_WORDS[t.lymphocytes], LYMPHOCYTE_WORDS.values()),
        "class": one_of(t.tumour_class, classes),
        "grade": one_of(f"grade {t.grade}", [f"grade {i}" for i in (1, 2, 3)]),
        "treatment": one_of(CLASSES[t.tumour_class][1], [name for _, name in CLASSES.values()]),
        "immune": one_of(IMMUNE_WORDS[t.lymphocytes], IMMUNE_WORDS.values()),
        "outlook": one_of(OUTLOOK_WORDS[grade], OUTLOOK_WORDS),
    }[family]


NECROSIS_WORDS = ("under 5 percent", "5 to 15 percent", "over 15 percent")
LYMPHOCYTE_WORDS = {"low": "sparse", "high": "dense"}
IMMUNE_WORDS = {"low": "immune desert", "high": "inflamed"}
OUTLOOK_WORDS = ("favourable", "intermediate", "poor")
_ARCHITECTURE, _RARE = "Microscopy/Tissue Architecture and Arrangement", "Microscopy/Rare Motifs"
_HOW_DENSE = (
    "How dense is the lymphocytic infiltrate?",
    "How are lymphocytes distributed?",
    "Describe the lymphocytes.",
)
_HOW_MUCH = (
    "How much of the tissue is necrotic?",
    "What is the share of necrosis?",
    "How large is the necrotic area?",
)
_WHICH_MOST = (
    "Which tissue takes the largest area?",
    "What is the dominant tissue of the slide?",
    "Which tissue is most abundant?",
)
_WHICH_HERE = (
    "Which of these tissues is present?",
    "Which of these tissues can be seen?",
    "Which tissue does the slide contain?",
)
_WHICH_RARE = (
    "Which rare finding is on the slide?",
    "Which of these small findings is there?",
    "Name the rare finding.",
)
_WHICH_TYPE = (
    "What is the most likely diagnosis?",
    "Which type of tumour is this?",
    "How is the tumour classified?",
)
_WHICH_OF_TWO = (
    "Which of these two diagnoses fits better?",
    "Which diagnosis do the features support?",
    "Which of the two is it?",
)
_WHICH_HELPS = (
    "Which treatment fits this tumour?",
    "What should be offered first?",
    "Which therapy does the diagnosis call for?",
)
_WHICH_IMMUNE = (
    "Which immune phenotype is it?",
    "How is the immune status?",
    "Which immune type does the slide suggest?",
)
_WHICH_GRADE = ("What is the grade of the tumour?", "Which grade is it?", "How is the tumour graded?")
_WHICH_COURSE = (
    "What is the outlook?",
    "Which prognosis does the grade suggest?",
    "How is the expected course?",
)
FAMILIES = {
    "dominant": _family(_ARCHITECTURE, "dominant", *_WHICH_MOST),
    "present": _family(_ARCHITECTURE, "tissues", *_WHICH_HERE),
    "tissue": _family(
        _ARCHITECTURE,
        "tissues",
        "Is {subject} present?",
        "Does the slide contain {subject}?",
        "Can {subject} be seen?",
    ),
    "necrosis": _family("Microscopy/Histopathological Changes", "grade", *_HOW_MUCH),
    "lymphocytes": _family("Microscopy/Cytomorphological Characteristics", "lymphocytes", *_HOW_DENSE),
    "motif": _family(_RARE, "motif", *_WHICH_RARE),
    "motif_there": _family(
        _RARE,
        "motif",
        "Is there any {subject}?",
        "Does the slide show {subject}?",
        "Is {subject} found anywhere?",
    ),
    "class": _family("Diagnosis/Disease Classification", "tumour_class", *_WHICH_TYPE),
    "differential": _family("Diagnosis/Differential Diagnosis", "tumour_class", *_WHICH_OF_TWO),
    "grade": _family("Diagnosis/Grading", "grade", *_WHICH_GRADE),
    "treatment": _family("Clinical/Treatment Guidance", "tumour_class", *_WHICH_HELPS),
    "immune": _family("Clinical/Biomarker Analysis", "lymphocytes", *_WHICH_IMMUNE),
    "outlook": _family("Clinical/Prognostic Assessment", "grade", *_WHICH_COURSE),
}
CAPTION_ASKS = (
    "<image>\nDescribe the slide.",
    "<image>\nWhat does the slide show?",
    "<image>\nWrite a short report of the slide.",
)
CAPTION_CLASS = (
    "this is a {tumour} of grade {grade}.",
    "grade {grade} {tumour}.",
    "the tumour is a {tumour}, grade {grade}.",
)
CAPTION_TISSUES = (
    "{dominant} dominates, with {one} and {two} present.",
    "the largest area is {dominant}; {one} and {two} are seen.",
    "the most abundant tissue is {dominant}. There is {one} and {two}.",
)
CAPTION_NECROSIS = (
    ("necrosis is under 5 percent.", "there is hardly any necrosis."),
    ("necrosis takes 5 to 15 percent.", "there is some necrosis."),
    ("necrosis takes over 15 percent.", "there is much necrosis."),
)
CAPTION_LYMPHOCYTES = {
    "low": ("lymphocytes are sparse.", "few lymphocytes, an immune desert."),
    "high": ("lymphocytes are dense.", "many lymphocytes, an inflamed tumour."),
}
CAPTION_MOTIF = ("a rare finding is {motif}.", "there is {motif}.", "{motif} is found.")
CAPTION_NO_MOTIF = ("no rare finding.", "there is no rare finding.", "rare findings are not seen.")
