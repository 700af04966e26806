"""Drawn pictures of eight modalities with questions for adapters. They show no patient.

A general model learns from general questions about all of them; each modality has questions of its own, in
its own words and conventions.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from attrs import frozen

from medvl.base import config, files
from medvl.phantoms import pictures, styles
from medvl.phantoms.styles import MARKS

MODALITIES = tuple(MARKS)
SPLITS = ("base_train", "base_valid", "train", "valid", "test")
# Of a modality's own questions; general ones also ask to "describe" and for "terms".
FAMILIES = ("count", "side", "kind")
SIDES = ("left", "right")  # as the viewer sees them
HEIGHTS = ("upper", "middle", "lower")
_MIN_GAP = 0.185  # between the centres of two marks, as a share of a side
_NUMBERS = ("One", "Two", "Three")


@frozen(kw_only=True)
class ModalityConfig:
    """How many pictures of each split. A general picture has one question, a case of a modality three."""

    modalities: tuple[str, ...] = MODALITIES
    base: int = 4000  # general pictures, all modalities together
    base_valid: int = 100
    train: int = 120  # cases of each modality; multiples of 12 are balanced exactly
    valid: int = 8
    test: int = 20
    size: int = 112  # pixels of a side
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        unknown = [m for m in self.modalities if m not in MARKS]
        if unknown:
            raise ValueError(
                f"ModalityConfig: modalities must be of {', '.join(MODALITIES)}, got {unknown[0]!r}"
            )
        if not self.modalities or len({*self.modalities}) < len(self.modalities):
            raise ValueError(f"ModalityConfig: needs at least one modality, each once, got {self.modalities}")
        config.check_bounds(
            self,
            "ModalityConfig",
            base=config.COUNT,
            base_valid=config.COUNT,
            size=(56, 4096),
            seed=config.SEED,
        )
        config.check_bounds(self, "ModalityConfig", train=config.COUNT, valid=config.COUNT, test=config.COUNT)


@frozen(kw_only=True)
class ModalityCase:
    """What a picture shows: one to three marks of one kind, all in one half."""

    modality: str
    n: int
    side: str  # the viewer's
    heights: tuple[str, ...] = ()  # thirds of the zone with a mark, from the top
    kind: str  # a key of MARKS[modality]
    marks: tuple[tuple[float, float, float], ...]  # (x, y, radius) in pixels


def draw_modalities(cfg: ModalityConfig, folder: files.PathLike) -> dict[str, int]:
    """Write `folder/{split}/*.png` and `folder/{split}.jsonl` of all `SPLITS`: conversations of one picture
    and question.

    A line also has "task" (the modality), "category" (the specialty), "family" (of the question) and
    "episode_id" (the case). A table comes after its pictures; one that is there is left alone.

    Returns:
        number of conversations per split.
    """
    num_modalities = len(cfg.modalities)
    num_pictures = {
        "base_train": cfg.base,
        "base_valid": cfg.base_valid,
        "train": cfg.train * num_modalities,
        "valid": cfg.valid * num_modalities,
        "test": cfg.test * num_modalities,
    }
    counts = {}
    for split, count in num_pictures.items():
        counts[split] = count if split.startswith("base") else count * len(FAMILIES)
        pictures.write_split(Path(folder), split, count, partial(_draw_conversations, cfg, split))
    return counts


def _draw_conversations(cfg: ModalityConfig, split: str, i: int) -> pictures.Drawn:
    """The picture and the lines of a split's i-th case. Modalities take turns."""
    modality = cfg.modalities[i % len(cfg.modalities)]
    number = i // len(cfg.modalities)
    picture, case = draw_modality_case(cfg, split, modality, number)
    name = f"{split}/{modality}-{number}.png"
    episode = f"{split}-{modality}-{number}"
    lines = []
    for family, question, answer in question_answers(cfg, split, case, number):
        line = pictures.conversation(f"{episode}-{family}", name, question, answer) | {
            "task": modality,
            "category": CATEGORIES[modality],
            "family": family,
            "episode_id": episode,
        }
        lines.append(line)
    return {name: picture}, lines


def draw_modality_case(
    cfg: ModalityConfig, split: str, modality: str, number: int
) -> tuple[np.ndarray, ModalityCase]:
    """A picture uint8 [y, x, 3] and its case, a pure function of (cfg.seed, cfg.size, split, modality,
    number).

    The 12 cases from a multiple of 12 on have all combinations of number of marks, side and kind.
    """
    block = _generator(cfg, 1, split, modality, number // 12).permutation(12)
    count, side, kind = np.unravel_index(block[number % 12], (3, 2, 2))  # 3 numbers, 2 sides, 2 kinds
    n = int(count) + 1
    gen = _generator(cfg, 0, split, modality, number)
    scene = styles.draw_scene(modality, cfg.size, gen)
    name, mark = list(MARKS[modality].items())[kind]
    half = np.zeros(cfg.size, bool)
    half[: cfg.size // 2] = True
    if side == 1:
        half = ~half
    places, heights = _draw_places(scene.zone & half, n, gen)
    low, high = (0.052, 0.068) if mark.sharp else (0.066, 0.08)  # a soft mark looks smaller than it is
    radii = gen.uniform(low, high, len(places))
    marks = np.column_stack([places, radii])
    picture = styles.add_marks(scene, mark, marks, gen)
    # From shares of a side with 0 in the middle to pixels.
    pixels = marks * cfg.size + np.array([0.5, 0.5, 0]) * (cfg.size - 1)
    case = ModalityCase(
        modality=modality,
        n=n,
        side=SIDES[side],
        heights=heights,
        kind=name,
        marks=tuple((float(x), float(y), float(r)) for x, y, r in pixels),
    )
    return picture, case


def question_answers(
    cfg: ModalityConfig, split: str, case: ModalityCase, number: int
) -> Iterator[tuple[str, str, str]]:
    """(family, question, answer): one general question in the base splits, else all of the modality."""
    gen = _generator(cfg, 2, split, case.modality, number)
    if split.startswith("base"):
        family = str(gen.choice(list(GENERAL), p=_SHARES))
        yield family, str(gen.choice(GENERAL[family])), general_answer(family, case)
        return
    for family in FAMILIES:
        # Half of the questions do not name the modality, so that only the picture tells it.
        questions = NEUTRAL[family] if gen.random() < 0.5 else SPEECH[case.modality].questions[family]
        yield family, str(gen.choice(questions)), own_answer(family, case)


def general_answer(family: str, case: ModalityCase) -> str:
    """The answer in words that fit every picture, and the viewer's sides; "terms" has the modality's."""
    mark = MARKS[case.modality][case.kind]
    speech = SPEECH[case.modality]
    name = NAMES[case.modality]
    brightness = "bright" if mark.bright else "dark"
    edge = "sharp" if mark.sharp else "soft"
    if family == "describe":
        marks = "mark" if case.n == 1 else "marks"
        heights = ", ".join(case.heights)
        count = _NUMBERS[case.n - 1]
        return f"{name}. {count} {marks}, {brightness} and {edge}, on the {case.side}: {heights}."
    if family == "terms":
        kinds = " or ".join(MARKS[case.modality])
        return f"{name}: {kinds}. {' '.join(speech.sides)} {' '.join(speech.counts)}"
    if family == "count":
        return _COUNT_LESIONS[case.n - 1]
    if family == "side":
        return f"On the {case.side}."
    assert family == "kind"
    return f"{brightness.capitalize()} and {edge}."


def own_answer(family: str, case: ModalityCase) -> str:
    """The answer in the words and by the conventions of the case's modality."""
    speech = SPEECH[case.modality]
    if family == "count":
        return speech.counts[case.n - 1]
    if family == "side":
        return speech.sides[SIDES.index(case.side)]
    assert family == "kind"
    return f"{case.kind.capitalize()}."


def _generator(cfg: ModalityConfig, use: int, split: str, modality: str, number: int) -> np.random.Generator:
    return np.random.default_rng([use, cfg.seed, SPLITS.index(split), MODALITIES.index(modality), number])


def _draw_places(zone: np.ndarray, n: int, gen: np.random.Generator) -> tuple[np.ndarray, tuple[str, ...]]:
    """n points (x, y) of the zone, each in another third of it from top to bottom, and the names of these
    thirds.

    Of 200 drawn sets it is the first with enough room between the points, or else the one with the most.
    """
    y, x = styles.grid(len(zone))
    rows, columns = np.nonzero(zone)  # from top to bottom
    thirds = np.sort(gen.permutation(3)[:n])
    bounds = len(rows) * np.arange(4) // 3  # thirds of the zone's pixels, which need not be of equal height
    pixels = []  # of each third, a pixel for each set
    for third in thirds:
        pixels.append(gen.integers(bounds[third], bounds[third + 1], size=200))
    sets = np.stack(pixels, 1)  # [set, n]
    set_x = x[0, columns[sets]]
    set_y = y[rows[sets], 0]
    places = np.stack([set_x, set_y], -1)  # [set, n, 2]
    offsets = places[:, :, None] - places[:, None]  # [set, n, n, 2], from every point to every other
    distances = np.hypot(offsets[..., 0], offsets[..., 1])
    room = (distances + np.eye(n)).min((1, 2))  # a point is no neighbour of itself
    # argmax takes the first of equal ones: capped, all sets with enough room are equal.
    best = np.argmax(np.minimum(room, _MIN_GAP))
    return places[best], tuple(HEIGHTS[t] for t in thirds)


# The words of each modality ---------------------------------------------------------------------------------
@frozen(kw_only=True)
class Speech:
    """The words and conventions of one modality."""

    counts: tuple[str, str, str]
    sides: tuple[str, str]  # for what lies on the viewer's left, on the viewer's right
    questions: dict[str, tuple[str, ...]]  # of each family, with the modality or its terms in them


NAMES = {
    "ct": "A CT",
    "xray": "An X-ray",
    "mri": "An MRI",
    "ultrasound": "An ultrasound",
    "histology": "A histology slide",
    "fundus": "A fundus photograph",
    "dermoscopy": "A dermoscopy picture",
    "endoscopy": "An endoscopy picture",
}
CATEGORIES = dict.fromkeys(("ct", "xray", "mri", "ultrasound"), "radiology") | {
    "histology": "pathology",
    "fundus": "ophthalmology",
    "dermoscopy": "dermatology",
    "endoscopy": "gastroenterology",
}
NEUTRAL = {
    "count": ("How many lesions are there?", "Count the lesions.", "How many findings do you see?"),
    "side": ("On which side is it?", "Which side is affected?", "On which side are the findings?"),
    "kind": ("What is the finding?", "What do you see?", "Which type of lesion is it?"),
}
GENERAL = NEUTRAL | {
    "describe": ("Describe the picture.", "What is in the picture?", "What does the picture show?"),
    "terms": (
        "Which words are used for such a picture?",
        "What can be said of such pictures?",
        "Which terms belong to the picture?",
    ),
}
# How often each family of GENERAL is drawn. A description teaches most at once; "terms" makes sure that the
# model has met all words before an adapter needs them.
_SHARES = (0.15, 0.15, 0.15, 0.45, 0.1)
_PATIENT_SIDES = ("On the right.", "On the left.")  # the patient faces the viewer
_COUNT_LESIONS = ("There is one lesion.", "There are two lesions.", "There are three lesions.")
_COUNT_FOCI = ("A single focus.", "Two foci.", "Three foci.")
_COUNT_WORDS = ("Count: one.", "Count: two.", "Count: three.")
_COUNT_DIGITS = ("1 lesion.", "2 lesions.", "3 lesions.")
# Neighbours share some of their words and conventions, no two share all: a wrong adapter is partly right.
SPEECH = {
    "ct": Speech(
        counts=_COUNT_LESIONS,
        sides=_PATIENT_SIDES,
        questions={
            "count": (
                "How many lesions does this CT slice show?",
                "How many lesions are in the lungs on CT?",
            ),
            "side": ("On which side of the thorax is it on CT?", "Which lung is affected in this slice?"),
            "kind": ("Which density does this CT show?", "What is the finding in this axial slice?"),
        },
    ),
    "xray": Speech(
        counts=_COUNT_LESIONS,
        sides=_PATIENT_SIDES,
        questions={
            "count": (
                "How many lesions does this radiograph show?",
                "How many shadows are on the chest film?",
            ),
            "side": ("Which lung field is affected on the X-ray?", "On which side of the chest film is it?"),
            "kind": ("What is the shadow on this X-ray?", "What does the chest film show?"),
        },
    ),
    "mri": Speech(
        counts=_COUNT_FOCI,
        sides=_PATIENT_SIDES,
        questions={
            "count": ("How many foci are in the brain?", "How many foci does this MRI show?"),
            "side": ("Which hemisphere is affected?", "On which side of the brain is it on MRI?"),
            "kind": ("What is the signal change in the brain?", "What does this MRI show?"),
        },
    ),
    "ultrasound": Speech(
        counts=_COUNT_FOCI,
        sides=_PATIENT_SIDES,
        questions={
            "count": ("How many foci does this sonogram show?", "How many echo changes are there?"),
            "side": ("On which side of the sonogram is it?", "Which side does the ultrasound show it on?"),
            "kind": ("What is the echo finding?", "What does this ultrasound show?"),
        },
    ),
    "histology": Speech(
        counts=_COUNT_WORDS,
        sides=("Left half.", "Right half."),
        questions={
            "count": ("How many figures are in this field?", "Count the structures in the stained section."),
            "side": ("In which half of the section is it?", "Where in this microscopic field is it?"),
            "kind": ("What do the cells of this section show?", "Name the structure in this stained field."),
        },
    ),
    "fundus": Speech(
        counts=_COUNT_DIGITS,
        sides=("Temporal.", "Nasal."),
        questions={
            "count": ("How many retinal lesions are there?", "How many lesions are in this fundus?"),
            "side": ("On which side of the retina is it?", "Is it nasal or temporal?"),
            "kind": ("What is the retinal finding?", "What does this fundus show?"),
        },
    ),
    "dermoscopy": Speech(
        counts=_COUNT_WORDS,
        sides=("Left half.", "Right half."),
        questions={
            "count": ("How many structures are in this naevus?", "Count the dermoscopic structures."),
            "side": ("In which half of the naevus is it?", "Which half of the skin lesion is affected?"),
            "kind": ("Which dermoscopic structure is it?", "What does the dermatoscope show?"),
        },
    ),
    "endoscopy": Speech(
        counts=_COUNT_DIGITS,
        sides=("Left wall.", "Right wall."),
        questions={
            "count": ("How many lesions are on the mucosa?", "How many lesions does the endoscope show?"),
            "side": ("Which wall of the bowel is affected?", "On which wall of the lumen is it?"),
            "kind": ("What is the mucosal finding?", "What does this endoscopy show?"),
        },
    ),
}
