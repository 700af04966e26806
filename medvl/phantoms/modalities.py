"""Drawn pictures of eight modalities with questions: general ones, and each modality's own in its own words. Free of patients."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from attrs import frozen
from PIL import Image

from medvl.base import config, files
from medvl.base.display import track
from medvl.phantoms import styles
from medvl.phantoms.styles import MARKS

MODALITIES = tuple(MARKS)
SPLITS = ("base_train", "base_valid", "train", "valid", "test")
FAMILIES = (
    "count",
    "side",
    "kind",
)  # of a modality's own questions; the general ones also ask to "describe" and for "terms"
SIDES = ("left", "right")  # as the viewer sees them
HEIGHTS = ("upper", "middle", "lower")
_APART = 0.185  # of a side, between the centres of two marks
_NUMBERS = ("One", "Two", "Three")


@frozen(kw_only=True)
class ModalityConfig:
    """How many pictures of each split. A general picture comes with one question, a case of a modality with three."""

    modalities: tuple[str, ...] = MODALITIES
    base: int = 4000  # general pictures, all modalities together
    base_valid: int = 100
    train: int = 120  # cases of each modality; multiples of 12 are balanced exactly
    valid: int = 8
    test: int = 20
    size: int = 112  # pixels of a side
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if unknown := [m for m in self.modalities if m not in MARKS]:
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
    """What was drawn: one to three marks of one kind, all in one half of the picture."""

    modality: str
    n: int
    side: str  # the viewer's
    heights: tuple[str, ...] = ()  # thirds of the zone that hold a mark, from the top
    kind: str  # a key of MARKS[modality]
    marks: tuple[tuple[float, float, float], ...]  # (x, y, radius) in pixels


def draw_modalities(cfg: ModalityConfig, folder: files.PathLike) -> dict[str, int]:
    """Write `folder/{split}/*.png` and `folder/{split}.jsonl` of all `SPLITS`, conversations with one picture and one question each.

    A line also has "task" (the modality), "category" (the specialty), "family" (of the question) and "episode_id" (the case). A table comes
    after its pictures; one that is there is left alone.
    Returns:
        number of conversations per split.
    """
    folder, k = Path(folder), len(cfg.modalities)
    each = {"train": cfg.train, "valid": cfg.valid, "test": cfg.test}
    counts = {"base_train": cfg.base, "base_valid": cfg.base_valid} | {
        s: n * k * len(FAMILIES) for s, n in each.items()
    }
    for split in SPLITS:
        table = folder / f"{split}.jsonl"
        if table.exists():
            continue
        lines = []
        number_of_pictures = each[split] * k if split in each else counts[split]
        for i in track(range(number_of_pictures), f"drawing pictures, {split}"):
            modality, number = cfg.modalities[i % k], i // k
            picture, case = draw_modality_case(cfg, split, modality, number)
            episode = f"{split}-{modality}-{number}"
            name = f"{split}/{modality}-{number}.png"
            with files.atomic(folder / name) as tmp:
                Image.fromarray(picture).save(tmp, format="PNG")
            for family, question, answer in question_answers(cfg, split, case, number):
                turns = [
                    {"role": "user", "content": f"<image>\n{question}"},
                    {"role": "assistant", "content": answer},
                ]
                line = {"id": f"{episode}-{family}", "images": [name], "messages": turns, "task": modality}
                line |= {"category": CATEGORIES[modality], "family": family, "episode_id": episode}
                lines.append(json.dumps(line) + "\n")
        files.write_text(table, "".join(lines))
    return counts


def draw_modality_case(
    cfg: ModalityConfig, split: str, modality: str, number: int
) -> tuple[np.ndarray, ModalityCase]:
    """(uint8 [y, x, 3], what is on it), a pure function of (cfg.seed, cfg.size, split, modality, number).

    Of 12 cases from a multiple of 12 on, each has another number of marks, side or kind.
    """
    block = _gen(cfg, 1, split, modality, number // 12).permutation(12)
    n, side, kind = np.unravel_index(block[number % 12], (3, 2, 2))
    gen = _gen(cfg, 0, split, modality, number)
    scene = styles.draw_scene(modality, cfg.size, gen)
    name, mark = list(MARKS[modality].items())[kind]
    half = np.zeros(cfg.size, bool)
    half[: cfg.size // 2] = True
    places, heights = _places(scene.zone & (half if side == 0 else ~half), int(n) + 1, gen)
    radii = gen.uniform(*((0.052, 0.068) if mark.sharp else (0.066, 0.08)), len(places))
    marks = np.column_stack([places, radii])
    picture = styles.add_marks(scene, mark, marks, gen)
    pixels = marks * cfg.size + np.array([0.5, 0.5, 0]) * (cfg.size - 1)
    where = tuple((float(x), float(y), float(r)) for x, y, r in pixels)
    return picture, ModalityCase(
        modality=modality, n=int(n) + 1, side=SIDES[side], heights=heights, kind=name, marks=where
    )


def question_answers(
    cfg: ModalityConfig, split: str, case: ModalityCase, number: int
) -> Iterator[tuple[str, str, str]]:
    """(family, question, answer): a general one of the base splits, else one of every family in the modality's own words."""
    gen = _gen(cfg, 2, split, case.modality, number)
    if split.startswith("base"):
        family = str(gen.choice(list(GENERAL), p=_SHARES))
        yield family, str(gen.choice(GENERAL[family])), general_answer(family, case)
        return
    for family in FAMILIES:
        asked = NEUTRAL[family] if gen.random() < 0.5 else SPEECH[case.modality].asks[family]
        yield family, str(gen.choice(asked)), own_answer(family, case)


def general_answer(family: str, case: ModalityCase) -> str:
    """In words that fit every picture, sides as the viewer sees them; only "terms" tells the words of the picture's modality."""
    mark, speech, name = MARKS[case.modality][case.kind], SPEECH[case.modality], NAMES[case.modality]
    count, look = (
        _NUMBERS[case.n - 1],
        f"{'bright' if mark.bright else 'dark'} and {'sharp' if mark.sharp else 'soft'}",
    )
    return {
        "describe": f"{name}. {count} mark{'s' * (case.n > 1)}, {look}, on the {case.side}: {', '.join(case.heights)}.",
        "terms": f"{name}: {' or '.join(MARKS[case.modality])}. {' '.join(speech.sides)} {' '.join(speech.counts)}",
        "count": _THERE[case.n - 1],
        "side": f"On the {case.side}.",
        "kind": f"{look.capitalize()}.",
    }[family]


def own_answer(family: str, case: ModalityCase) -> str:
    """In the words and by the conventions of the case's modality."""
    speech = SPEECH[case.modality]
    return {
        "count": speech.counts[case.n - 1],
        "side": speech.sides[SIDES.index(case.side)],
        "kind": f"{case.kind.capitalize()}.",
    }[family]


def _gen(cfg: ModalityConfig, use: int, split: str, modality: str, number: int) -> np.random.Generator:
    return np.random.default_rng([use, cfg.seed, SPLITS.index(split), MODALITIES.index(modality), number])


def _places(zone: np.ndarray, n: int, gen: np.random.Generator) -> tuple[np.ndarray, tuple[str, ...]]:
    """n points (x, y) of the zone, each in a third of its own from top to bottom, and these thirds.

    Of 200 drawn sets the first with enough room between the points, else the one with the most.
    """
    y, x = styles.grid(len(zone))
    iy, ix = np.nonzero(zone)  # from top to bottom
    thirds = np.sort(gen.permutation(3)[:n])
    bounds = len(iy) * np.arange(4) // 3
    sets = np.stack([gen.integers(bounds[t], bounds[t + 1], size=200) for t in thirds], 1)
    at = np.stack([x[0, ix[sets]], y[iy[sets], 0]], -1)
    gaps = np.hypot(*(at[:, :, None] - at[:, None]).transpose(3, 0, 1, 2)) + np.eye(n)
    room = gaps.min((1, 2))
    return at[np.argmax(np.minimum(room, _APART))], tuple(HEIGHTS[t] for t in thirds)


# How each speaks ------------------------------------------------------------------------------------------------------------------------
@frozen(kw_only=True)
class Speech:
    """How one modality asks and answers."""

    counts: tuple[str, str, str]
    sides: tuple[str, str]  # of what lies on the viewer's left, on the viewer's right
    asks: dict[str, tuple[str, ...]]  # of each family, naming the modality or its terms


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
_SHARES = (
    0.15,
    0.15,
    0.15,
    0.45,
    0.1,
)  # a description teaches most at once; terms are there so that no word is new to the model
_PATIENT = ("On the right.", "On the left.")  # the patient faces the viewer
_THERE = ("There is one lesion.", "There are two lesions.", "There are three lesions.")
_FOCI = ("A single focus.", "Two foci.", "Three foci.")
_COUNTED = ("Count: one.", "Count: two.", "Count: three.")
_DIGITS = ("1 lesion.", "2 lesions.", "3 lesions.")
SPEECH = {  # neighbours share some of their words and conventions, none shares all
    "ct": Speech(
        counts=_THERE,
        sides=_PATIENT,
        asks={
            "count": (
                "How many lesions does this CT slice show?",
                "How many lesions are in the lungs on CT?",
            ),
            "side": ("On which side of the thorax is it on CT?", "Which lung is affected in this slice?"),
            "kind": ("Which density does this CT show?", "What is the finding in this axial slice?"),
        },
    ),
    "xray": Speech(
        counts=_THERE,
        sides=_PATIENT,
        asks={
            "count": (
                "How many lesions does this radiograph show?",
                "How many shadows are on the chest film?",
            ),
            "side": ("Which lung field is affected on the X-ray?", "On which side of the chest film is it?"),
            "kind": ("What is the shadow on this X-ray?", "What does the chest film show?"),
        },
    ),
    "mri": Speech(
        counts=_FOCI,
        sides=_PATIENT,
        asks={
            "count": ("How many foci are in the brain?", "How many foci does this MRI show?"),
            "side": ("Which hemisphere is affected?", "On which side of the brain is it on MRI?"),
            "kind": ("What is the signal change in the brain?", "What does this MRI show?"),
        },
    ),
    "ultrasound": Speech(
        counts=_FOCI,
        sides=_PATIENT,
        asks={
            "count": ("How many foci does this sonogram show?", "How many echo changes are there?"),
            "side": ("On which side of the sonogram is it?", "Which side does the ultrasound show it on?"),
            "kind": ("What is the echo finding?", "What does this ultrasound show?"),
        },
    ),
    "histology": Speech(
        counts=_COUNTED,
        sides=("Left half.", "Right half."),
        asks={
            "count": ("How many figures are in this field?", "Count the structures in the stained section."),
            "side": ("In which half of the section is it?", "Where in this microscopic field is it?"),
            "kind": ("What do the cells of this section show?", "Name the structure in this stained field."),
        },
    ),
    "fundus": Speech(
        counts=_DIGITS,
        sides=("Temporal.", "Nasal."),
        asks={
            "count": ("How many retinal lesions are there?", "How many lesions are in this fundus?"),
            "side": ("On which side of the retina is it?", "Is it nasal or temporal?"),
            "kind": ("What is the retinal finding?", "What does this fundus show?"),
        },
    ),
    "dermoscopy": Speech(
        counts=_COUNTED,
        sides=("Left half.", "Right half."),
        asks={
            "count": ("How many structures are in this naevus?", "Count the dermoscopic structures."),
            "side": ("In which half of the naevus is it?", "Which half of the skin lesion is affected?"),
            "kind": ("Which dermoscopic structure is it?", "What does the dermatoscope show?"),
        },
    ),
    "endoscopy": Speech(
        counts=_DIGITS,
        sides=("Left wall.", "Right wall."),
        asks={
            "count": ("How many lesions are on the mucosa?", "How many lesions does the endoscope show?"),
            "side": ("Which wall of the bowel is affected?", "On which wall of the lumen is it?"),
            "kind": ("What is the mucosal finding?", "What does this endoscopy show?"),
        },
    ),
}
