"""Captions and multiple-choice questions about drawn slides, and the files of both. They show no patient."""

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

    family: str  # a key of FAMILIES
    question: str
    options: tuple[str, ...]  # 2 to 4
    letter: str  # of the right option


_AskedSlide = tuple[Truth, list[Question]]


def draw_slides(cfg: SlideConfig, folder: files.PathLike) -> dict[str, int]:
    """Write slides, captions and questions: TRIDENT's layout of features, and tables as SlideChat and
    SlideBench have them.

    - features/{name}.h5: "features" float16 [n, d], "coords" int64 [n, 2] with the attributes patch_size,
      patch_size_level0 and so on.
    - captions.json (of train slides, two each), train.json, valid.json (a question each, answered "C. Text"):
      lists of {"id", "image": ["./features/{name}.h5"], "conversations": [{"from", "value"}, ...]}.
    - test.csv: `COLUMNS`; "Tumor" is the code of the tumour's class; questions of fewer than four options
      leave the others empty.
    - labels.csv: slide, split, class, grade, lymphocytes, motif.
    - truth.jsonl: a line per slide: "split", the fields of `Truth`, "motif_rows", "questions" (id, family,
      narrow, facts) in the order of the tables.

    Tables come after the slides, truth.jsonl last: no slide is drawn if it is there. Any table that is there
    is left alone.

    Returns:
        number of "slides", "captions", and questions of "train", "valid", "test".
    """
    folder = Path(folder)
    # The rows of motifs are known only while slides are drawn; without them truth.jsonl cannot be written.
    truth_file = folder / "truth.jsonl"
    motif_rows = None
    if not truth_file.exists():
        motif_rows = write_slides(cfg, folder / "features")
    slides: dict[str, list[_AskedSlide]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for number in range(getattr(cfg, split)):
            slides[split].append((draw_truth(cfg, split, number), draw_questions(cfg, split, number)))
    captions: list[dict] = []
    for number, (truth, _) in enumerate(slides["train"]):
        for prompt, caption in draw_captions(cfg, "train", number):
            captions.append(_conversation(f"caption::{len(captions)}", truth, prompt, caption))
    texts = {
        "train.json": _json_list(_question_conversations("train", slides["train"])),
        "valid.json": _json_list(_question_conversations("valid", slides["valid"])),
        "captions.json": _json_list(captions),
    }
    for name, text in texts.items():
        if not (folder / name).exists():
            files.write_text(folder / name, text)
    if not (folder / "test.csv").exists():
        files.write_csv(folder / "test.csv", _bench_rows("test", slides["test"]), COLUMNS)
    if not (folder / "labels.csv").exists():
        labels = [_label_row(split, truth) for split in SPLITS for truth, _ in slides[split]]
        files.write_csv(folder / "labels.csv", labels, _LABELS)
    if motif_rows is not None:
        lines = []
        for split in SPLITS:
            for number, (truth, questions) in enumerate(slides[split]):
                lines.append(_truth_line(split, number, truth, questions, motif_rows[truth.name]))
        files.write_text(truth_file, "".join(lines))
    counts = {"slides": sum(map(len, slides.values())), "captions": len(captions)}
    return counts | {split: len(slides[split]) * len(FAMILIES) for split in SPLITS}


def draw_questions(cfg: SlideConfig, split: str, number: int) -> list[Question]:
    """One question of every family about a slide.

    In every family the letters of the right options are balanced over 60 slides.
    """
    truth = draw_truth(cfg, split, number)
    questions = []
    for k, (name, family) in enumerate(FAMILIES.items()):
        gen = slide_generator(cfg, 2, split, number, k)
        subject, right, wrong = _draw_options(name, truth, gen)
        # The right option's place is not drawn but counted through, so that no letter is right more often.
        place = balanced_index(cfg, 10 + k, split, number) % (len(wrong) + 1)
        options = [str(option) for option in gen.permutation(wrong)]
        options.insert(place, right)
        text = str(gen.choice(family.phrasings)).format(subject=subject)
        capitalized = tuple(_capitalize(option) for option in options)
        questions.append(Question(family=name, question=text, options=capitalized, letter="ABCD"[place]))
    return questions


def draw_captions(cfg: SlideConfig, split: str, number: int) -> list[tuple[str, str]]:
    """Two pairs (prompt, caption): five short sentences in any order, each in one of several phrasings."""
    truth = draw_truth(cfg, split, number)
    first, second = [tissue for tissue in OPTIONAL if tissue in truth.tissues]  # a slide has two of them
    words = {
        "tumour": truth.tumour_class,
        "grade": truth.grade,
        "dominant": truth.dominant,
        "one": first,
        "two": second,
        "motif": truth.motif,
    }
    kinds = [
        CAPTION_CLASS,
        CAPTION_TISSUES,
        CAPTION_NECROSIS[truth.grade - 1],
        CAPTION_LYMPHOCYTES[truth.lymphocytes],
        CAPTION_NO_MOTIF if truth.motif == NO_MOTIF else CAPTION_MOTIF,
    ]
    captions = []
    for i in range(_CAPTIONS):
        # A generator for each: more captions of a slide would leave these as they are.
        gen = slide_generator(cfg, 3, split, number, i)
        sentences = []
        for k in gen.permutation(len(kinds)):
            sentence = str(gen.choice(kinds[k])).format(**words)
            sentences.append(_capitalize(sentence))
        prompt = str(gen.choice(CAPTION_PROMPTS))
        captions.append((prompt, " ".join(sentences)))
    return captions


def question_prompt(question: str, options: tuple[str, ...]) -> str:
    """The prompt of a question, as SlideChat's test script writes it."""
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    return "\n".join(["<image>", question, *lines])


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]


# Files ------------------------------------------------------------------------------------------------------
def _json_list(items: Iterable[dict]) -> str:
    """A JSON list with one item a line."""
    return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n"


def _conversation(name: str, truth: Truth, prompt: str, answer: str) -> dict:
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": [f"./features/{truth.name}.h5"], "conversations": turns}


def _question_ids(split: str, number: int) -> list[str]:
    """The ids of a slide's questions, counted through the split."""
    first = number * len(FAMILIES)
    return [f"{split}::{first + k}" for k in range(len(FAMILIES))]


def _question_conversations(split: str, slides: list[_AskedSlide]) -> Iterator[dict]:
    for number, (truth, questions) in enumerate(slides):
        for name, question in zip(_question_ids(split, number), questions, strict=True):
            prompt = question_prompt(question.question, question.options)
            right = question.options["ABCD".index(question.letter)]
            yield _conversation(name, truth, prompt, f"{question.letter}. {right}")


def _bench_rows(split: str, slides: list[_AskedSlide]) -> Iterator[dict]:
    """Rows of SlideBench's table."""
    for number, (truth, questions) in enumerate(slides):
        code, _ = CLASSES[truth.tumour_class]
        for name, question in zip(_question_ids(split, number), questions, strict=True):
            family = FAMILIES[question.family]
            a, b, c, d = [*question.options, "", ""][:4]  # of two to four options; the others stay empty
            yield {
                "ID": name,
                "Slide": truth.name,
                "Tumor": code,
                "Broad Category": family.broad,
                "Narrow Category": family.narrow,
                "Question": question.question,
                "A": a,
                "B": b,
                "C": c,
                "D": d,
                "Answer": question.letter,
            }


def _label_row(split: str, truth: Truth) -> dict:
    return {
        "slide": truth.name,
        "split": split,
        "class": truth.tumour_class,
        "grade": truth.grade,
        "lymphocytes": truth.lymphocytes,
        "motif": truth.motif,
    }


def _truth_line(
    split: str, number: int, truth: Truth, questions: list[Question], motif_rows: list[int]
) -> str:
    records = []
    for name, question in zip(_question_ids(split, number), questions, strict=True):
        family = FAMILIES[question.family]
        record = {
            "id": name,
            "family": question.family,
            "narrow": family.narrow,
            "facts": family.facts,
        }
        records.append(record)
    line = {"split": split, **attrs.asdict(truth), "motif_rows": motif_rows, "questions": records}
    return json.dumps(line) + "\n"


# Questions and captions -------------------------------------------------------------------------------------
@frozen(kw_only=True)
class Family:
    """A family of questions about one fact."""

    broad: str  # SlideBench's categories
    narrow: str
    facts: tuple[str, ...]  # fields of Truth that it takes to answer
    phrasings: tuple[str, ...]  # {subject} is what `_draw_options` returns


def _family(categories: str, fact: str, *phrasings: str) -> Family:
    """A family; `categories` is "broad/narrow"."""
    broad, narrow = categories.split("/")
    return Family(broad=broad, narrow=narrow, facts=(fact,), phrasings=phrasings)


def _draw_options(family: str, truth: Truth, gen: np.random.Generator) -> tuple[str, str, list[str]]:
    """(subject, right option, wrong options) of a question."""
    if family in ("tissue", "motif_there"):
        subject, yes = _draw_subject(family, truth, gen)
        return (subject, "yes", ["no"]) if yes else (subject, "no", ["yes"])
    if family == "present":
        present = [tissue for tissue in OPTIONAL if tissue in truth.tissues]
        absent = [tissue for tissue in OPTIONAL if tissue not in truth.tissues]
        return "", str(gen.choice(present)), absent
    if family == "motif":
        others = [motif for motif in (*MOTIFS, NO_MOTIF) if motif != truth.motif]
        wrong = gen.permutation(others)[:3]
        return "", truth.motif, [str(motif) for motif in wrong]
    if family == "differential":
        others = [name for name in CLASSES if name != truth.tumour_class]
        return "", truth.tumour_class, [str(gen.choice(others))]
    right, options = _fixed_options(family, truth)
    return "", right, [option for option in options if option != right]


def _fixed_options(family: str, truth: Truth) -> tuple[str, list[str]]:
    """The right option and all options of a family in which nothing is drawn."""
    if family == "dominant":
        main = [tissue for tissue in truth.tissues if tissue not in ("necrosis", "lymphocytes")]
        return truth.dominant, main
    if family == "class":
        return truth.tumour_class, list(CLASSES)
    if family == "treatment":
        treatments = [treatment for _, treatment in CLASSES.values()]
        _, right = CLASSES[truth.tumour_class]
        return right, treatments
    if family == "lymphocytes":
        return LYMPHOCYTE_WORDS[truth.lymphocytes], list(LYMPHOCYTE_WORDS.values())
    if family == "immune":
        return IMMUNE_WORDS[truth.lymphocytes], list(IMMUNE_WORDS.values())
    # What is left is about the grade.
    options = {
        "grade": ("grade 1", "grade 2", "grade 3"),
        "necrosis": NECROSIS_WORDS,
        "outlook": OUTLOOK_WORDS,
    }[family]
    return options[truth.grade - 1], list(options)


def _draw_subject(family: str, truth: Truth, gen: np.random.Generator) -> tuple[str, bool]:
    """The subject of a yes-or-no question, and whether the answer is yes (in half of all slides)."""
    if family == "tissue":
        yes = gen.random() < 0.5
        candidates = [tissue for tissue in OPTIONAL if (tissue in truth.tissues) == yes]
        return str(gen.choice(candidates)), yes
    # Four of five slides have a motif: asked for in 5 of 8 of them, the answer is yes in half of all.
    if truth.motif != NO_MOTIF and gen.random() < 5 / 8:
        return truth.motif, True
    absent = [motif for motif in MOTIFS if motif != truth.motif]
    return str(gen.choice(absent)), False


# How a slide with a grade or a count of lymphocytes is described; `NECROSIS` and `LYMPHOCYTES` have the
# shares.
NECROSIS_WORDS = ("under 5 percent", "5 to 15 percent", "over 15 percent")
LYMPHOCYTE_WORDS = {"low": "sparse", "high": "dense"}
IMMUNE_WORDS = {"low": "immune desert", "high": "inflamed"}
OUTLOOK_WORDS = ("favourable", "intermediate", "poor")
_ARCHITECTURE, _RARE = "Microscopy/Tissue Architecture and Arrangement", "Microscopy/Rare Motifs"
_ASK_LYMPHOCYTES = (
    "How dense is the lymphocytic infiltrate?",
    "How are lymphocytes distributed?",
    "Describe the lymphocytes.",
)
_ASK_NECROSIS = (
    "How much of the tissue is necrotic?",
    "What is the share of necrosis?",
    "How large is the necrotic area?",
)
_ASK_DOMINANT = (
    "Which tissue takes the largest area?",
    "What is the dominant tissue of the slide?",
    "Which tissue is most abundant?",
)
_ASK_PRESENT = (
    "Which of these tissues is present?",
    "Which of these tissues can be seen?",
    "Which tissue does the slide contain?",
)
_ASK_MOTIF = (
    "Which rare finding is on the slide?",
    "Which of these small findings is there?",
    "Name the rare finding.",
)
_ASK_CLASS = (
    "What is the most likely diagnosis?",
    "Which type of tumour is this?",
    "How is the tumour classified?",
)
_ASK_DIFFERENTIAL = (
    "Which of these two diagnoses fits better?",
    "Which diagnosis do the features support?",
    "Which of the two is it?",
)
_ASK_TREATMENT = (
    "Which treatment fits this tumour?",
    "What should be offered first?",
    "Which therapy does the diagnosis call for?",
)
_ASK_IMMUNE = (
    "Which immune phenotype is it?",
    "How is the immune status?",
    "Which immune type does the slide suggest?",
)
_ASK_GRADE = ("What is the grade of the tumour?", "Which grade is it?", "How is the tumour graded?")
_ASK_OUTLOOK = (
    "What is the outlook?",
    "Which prognosis does the grade suggest?",
    "How is the expected course?",
)
FAMILIES = {
    "dominant": _family(_ARCHITECTURE, "dominant", *_ASK_DOMINANT),
    "present": _family(_ARCHITECTURE, "tissues", *_ASK_PRESENT),
    "tissue": _family(
        _ARCHITECTURE,
        "tissues",
        "Is {subject} present?",
        "Does the slide contain {subject}?",
        "Can {subject} be seen?",
    ),
    "necrosis": _family("Microscopy/Histopathological Changes", "grade", *_ASK_NECROSIS),
    "lymphocytes": _family("Microscopy/Cytomorphological Characteristics", "lymphocytes", *_ASK_LYMPHOCYTES),
    "motif": _family(_RARE, "motif", *_ASK_MOTIF),
    "motif_there": _family(
        _RARE,
        "motif",
        "Is there any {subject}?",
        "Does the slide show {subject}?",
        "Is {subject} found anywhere?",
    ),
    "class": _family("Diagnosis/Disease Classification", "tumour_class", *_ASK_CLASS),
    "differential": _family("Diagnosis/Differential Diagnosis", "tumour_class", *_ASK_DIFFERENTIAL),
    "grade": _family("Diagnosis/Grading", "grade", *_ASK_GRADE),
    "treatment": _family("Clinical/Treatment Guidance", "tumour_class", *_ASK_TREATMENT),
    "immune": _family("Clinical/Biomarker Analysis", "lymphocytes", *_ASK_IMMUNE),
    "outlook": _family("Clinical/Prognostic Assessment", "grade", *_ASK_OUTLOOK),
}
CAPTION_PROMPTS = (
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
