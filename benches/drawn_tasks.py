"""Drawn imaging tasks, as adapters are trained for: a look of the pictures and a way of asking, under much that says nothing of the task.

What tells tasks apart is drawn per task from short lists, so most of it is shared with some other tasks. What differs from sample to sample
(brightness, noise, position, remarks about the patient, other organs) is drawn alike for all tasks. Free of cost and of patients.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import frozen

Array = np.ndarray
PALETTES = {  # background, tissue (red, green, blue)
    "grey": ((12, 12, 14), (120, 120, 122)),
    "bright": ((60, 60, 60), (175, 175, 170)),
    "pink": ((225, 205, 220), (185, 110, 160)),
    "orange": ((15, 8, 5), (190, 95, 45)),
    "skin": ((205, 165, 140), (180, 125, 100)),
}
CYCLES = (4.0, 7.0, 11.0, 16.0)  # of the texture, per side of the picture
ANGLES = (0.0, 45.0, 90.0, 135.0)  # of the texture, degrees
LESIONS = ("disc", "ring", "bar", "star", "cluster")
ORGANS = {
    "lung": ("lung", "pulmonary field", "chest"),
    "liver": ("liver", "hepatic lobe", "right upper abdomen"),
    "kidney": ("kidney", "renal cortex", "flank"),
    "retina": ("retina", "fundus", "posterior pole"),
    "skin": ("skin", "cutaneous surface", "epidermis"),
    "breast": ("breast", "mammary tissue", "axillary tail"),
    "colon": ("colon", "colonic wall", "bowel"),
    "brain": ("brain", "cerebral hemisphere", "white matter"),
    "bone": ("bone", "cortex of the shaft", "joint"),
    "thyroid": ("thyroid", "thyroid lobe", "neck"),
}
FINDINGS = {
    "mass": ("mass", "tumour", "space-occupying lesion"),
    "bleeding": ("bleeding", "haemorrhage", "blood"),
    "calcification": ("calcification", "calcified spot", "calcium"),
    "inflammation": ("inflammation", "inflammatory change", "infiltrate"),
    "cyst": ("cyst", "cystic space", "fluid pocket"),
    "scar": ("scar", "fibrosis", "fibrotic band"),
    "polyp": ("polyp", "outgrowth", "protrusion"),
    "necrosis": ("necrosis", "necrotic zone", "dead tissue"),
}
QUESTIONS = {
    "presence": ("Is there any {finding} in the {organ}?", "Does the {organ} show {finding}?"),
    "count": ("How many foci of {finding} does the {organ} show?", "Count each {finding} in the {organ}."),
    "side": (
        "On which side of the {organ} is the {finding}?",
        "Is the {finding} of the {organ} left or right?",
    ),
    "size": (
        "How large is the {finding} in the {organ}?",
        "Measure the {finding} of the {organ} in millimetres.",
    ),
    "grade": ("Which grade has the {finding} of the {organ}?", "Grade the {finding} in this {organ}."),
    "outline": (
        "Describe the margin of the {finding} in the {organ}.",
        "Is the {finding} in the {organ} well defined?",
    ),
}
FILLERS = (
    "The patient is a {age}-year-old {sex}.",
    "{sex}, {age} years.",
    "Referred by the {place}.",
    "Seen at the {place} on day {age}.",
    "Thank you for your help.",
    "Please answer briefly.",
    "Kindly reply before noon.",
    "History of {finding} of the {organ}.",
    "The {organ} was unremarkable last year.",
    "No known {finding}.",
    "Mother had {finding} of the {organ}.",
    "Image number {age} of the series.",
    "Motion during acquisition.",
    "Acquired with the portable unit.",
    "Contrast was not given.",
    "Exposure was repeated.",
    "Compare with the former picture if there is one.",
    "Complains of pain since {age} days.",
    "Takes aspirin daily.",
    "Non-smoker.",
)
SEXES, PLACES = (
    ("woman", "man", "female", "male"),
    ("emergency room", "outpatient clinic", "ward", "family doctor", "screening unit"),
)


@frozen(kw_only=True)
class TaskConfig:
    """How many tasks, how many samples of each, and how large the pictures are."""

    tasks: int = 60
    samples: int = 40
    size: int = 64  # pixels of a side
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if min(self.tasks, self.samples) < 1 or self.size < 32 or self.seed < 0:
            raise ValueError(
                f"TaskConfig: needs tasks and samples >= 1, size >= 32 and seed >= 0, got {self}"
            )


@frozen(kw_only=True)
class Task:
    """What all samples of a task share."""

    number: int
    name: str
    palette: str
    cycles: float
    angle: float
    lesion: str
    dark: bool  # the lesion is darker than its surroundings
    organ: str
    finding: str
    question: str


def draw_tasks(cfg: TaskConfig) -> list[tuple[str, str, Array]]:
    """(task, text, picture uint8 [y, x, 3]) of every sample, those of a task side by side; a pure function of cfg.

    Sample i of task t is the same however many tasks and samples there are.
    """
    return [(task.name, *draw_sample(cfg, task, i)) for task in task_list(cfg) for i in range(cfg.samples)]


def task_list(cfg: TaskConfig) -> list[Task]:
    """The tasks; no two are alike in everything."""
    gen = np.random.default_rng([cfg.seed, 0])
    seen: set[tuple[int, ...]] = set()
    found: list[Task] = []
    lists: dict[str, tuple[Any, ...]] = {
        "palette": tuple(PALETTES),
        "cycles": CYCLES,
        "angle": ANGLES,
        "lesion": LESIONS,
        "dark": (False, True),
        "organ": tuple(ORGANS),
        "finding": tuple(FINDINGS),
        "question": tuple(QUESTIONS),
    }
    if cfg.tasks > (most := int(np.prod([len(v) for v in lists.values()])) // 2):
        raise ValueError(f"task_list: there are {most} different tasks at most, got tasks={cfg.tasks}")
    while len(found) < cfg.tasks:
        drawn = tuple(int(gen.integers(len(v))) for v in lists.values())
        if drawn in seen:
            continue
        seen.add(drawn)
        look: dict[str, Any] = {n: v[i] for (n, v), i in zip(lists.items(), drawn, strict=True)}
        found.append(Task(number=len(found), name=f"task-{len(found):03d}", **look))
    return found


def draw_sample(cfg: TaskConfig, task: Task, number: int) -> tuple[str, Array]:
    """(text, picture uint8 [y, x, 3]) of one sample; a pure function of (cfg.seed, cfg.size, task, number)."""
    gen = np.random.default_rng([cfg.seed, 1, task.number, number])
    return _text(task, gen), _picture(task, cfg.size, gen)


# Text -----------------------------------------------------------------------------------------------------------------------------------
def _text(task: Task, gen: np.random.Generator) -> str:
    """The question among two to five remarks; one in four times each of its two words is a vague one."""
    organ = "region shown" if gen.random() < 0.25 else _one(ORGANS[task.organ], gen)
    finding = "abnormality" if gen.random() < 0.25 else _one(FINDINGS[task.finding], gen)
    chosen = gen.permutation(len(FILLERS))[: int(gen.integers(2, 6))]
    said = [_filled(FILLERS[i], _any(ORGANS, gen), _any(FINDINGS, gen), gen) for i in chosen]
    said.insert(
        int(gen.integers(len(said) + 1)), _filled(_one(QUESTIONS[task.question], gen), organ, finding, gen)
    )
    return " ".join(said)


def _filled(sentence: str, organ: str, finding: str, gen: np.random.Generator) -> str:
    age, sex, place = int(gen.integers(18, 90)), _one(SEXES, gen), _one(PLACES, gen)
    text = sentence.format(organ=organ, finding=finding, age=age, sex=sex, place=place)
    return text[0].upper() + text[1:]


def _one(of: tuple[str, ...], gen: np.random.Generator) -> str:
    return of[int(gen.integers(len(of)))]


def _any(of: Mapping[str, tuple[str, ...]], gen: np.random.Generator) -> str:
    return _one(of[_one(tuple(of), gen)], gen)


# Picture --------------------------------------------------------------------------------------------------------------------------------
def _picture(task: Task, size: int, gen: np.random.Generator) -> Array:
    """A textured body with one lesion, under another light, colour cast, shift and noise each time."""
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    ground, tissue = (np.array(c, float) for c in PALETTES[task.palette])
    cy, cx = gen.uniform(-0.08, 0.08, 2)
    a, b = gen.uniform(0.34, 0.48, 2)
    body = _soft(1 - np.hypot((x - cx) / a, (y - cy) / b), 0.05)
    grain = 1 + 0.22 * _texture(task, x, y, gen)
    image = ground + body[..., None] * (tissue * grain[..., None] - ground)
    radius, turn = gen.uniform(0.07, 0.12), gen.uniform(0, 2 * np.pi)
    at = gen.uniform(0, 0.6) * np.array([a, b]), gen.uniform(0, 2 * np.pi)
    share = _lesion(
        task.lesion, x - cx - at[0][0] * np.cos(at[1]), y - cy - at[0][1] * np.sin(at[1]), radius, turn
    )
    image *= 1 + share[..., None] * ((-0.55 if task.dark else 0.6) * gen.uniform(0.7, 1.1))
    slope, way = gen.uniform(0, 0.5), gen.uniform(0, 2 * np.pi)
    image *= (
        (1 + slope * (x * np.cos(way) + y * np.sin(way)))[..., None]
        * gen.uniform(0.6, 1.3)
        * gen.uniform(0.85, 1.15, 3)
    )
    image = 255 * (np.clip(image, 0, 255) / 255) ** gen.uniform(0.75, 1.3)
    return np.clip(image + gen.normal(0, gen.uniform(2, 25), image.shape), 0, 255).astype(np.uint8)


def _texture(task: Task, x: Array, y: Array, gen: np.random.Generator) -> Array:
    """Three waves near the task's scale and angle, of any phase; about -1..1."""
    total = np.zeros_like(x)
    for _ in range(3):
        angle, cycles = np.deg2rad(task.angle + gen.normal(0, 8)), task.cycles * gen.uniform(0.85, 1.15)
        total += np.sin(2 * np.pi * (cycles * (x * np.cos(angle) + y * np.sin(angle)) + gen.uniform()))
    return total / 2


def _lesion(kind: str, x: Array, y: Array, radius: float, turn: float) -> Array:
    """Share of each pixel that is lesion, [y, x]."""
    r, angle = np.hypot(x, y) / radius, np.arctan2(y, x) + turn
    if kind == "disc":
        return _soft(1 - r, 0.2)
    if kind == "ring":
        return _soft(0.3 - np.abs(r - 0.9), 0.2)
    if kind == "bar":
        return _soft(np.minimum(1.6 - r * np.abs(np.cos(angle)), 0.4 - r * np.abs(np.sin(angle))), 0.2)
    if kind == "star":
        return _soft(0.9 + 0.5 * np.cos(6 * angle) - r, 0.2)
    assert kind == "cluster"
    spots = [(1.1 * np.cos(turn + k * 1.26), 1.1 * np.sin(turn + k * 1.26)) for k in range(5)]
    return np.max([_soft(0.35 - np.hypot(x / radius - u, y / radius - v), 0.2) for u, v in spots], axis=0)


def _soft(inside: Array, width: float) -> Array:
    return np.clip(inside / width + 0.5, 0, 1)
