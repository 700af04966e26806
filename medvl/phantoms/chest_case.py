"""Chest cases: the body and the findings of a person, before anything is drawn.

Patient coordinates are in mm: x to the patient's right, y to anterior, z to superior, 0 at the hilum.

What is drawn from the generator, and in which order, is part of what a seed means.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import field, frozen
from numpy.typing import ArrayLike

from medvl.base import config

Gen = np.random.Generator
Array = np.ndarray
# Lengths in mm, densities in HU, `heart` as a share of the chest's inner width; keys as in `_draw_body`.
Body = dict[str, float]

FINDINGS = (  # CT-RATE's names, in its order
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pleural effusion",
    "Consolidation",
)


def _check_share(_: Any, attribute: Any, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"PhantomConfig: {attribute.name} must lie in 0..1, got {value}")


@frozen(kw_only=True)
class PhantomConfig:
    """How many patients, and how much they differ. `valid` and `test` of the `patients` are held out."""

    patients: int
    seed: int
    valid: int = 0
    test: int = 0
    second_recon: float = field(default=0.2, validator=_check_share)  # share of scans reconstructed twice
    contrast: float = field(default=0.35, validator=_check_share)  # share of scans with enhanced blood
    # How much bodies differ: 1 as people do, 0 not at all.
    variation: float = field(default=1.0, validator=_check_share)
    columns: tuple[int, int] = (64, 96)  # in-plane voxels, drawn evenly from this range
    slices: tuple[int, int] = (28, 40)  # of a volume, likewise

    def __attrs_post_init__(self):
        if min(self.valid, self.test) < 0 or self.patients < 1 or self.valid + self.test > self.patients:
            raise ValueError(
                f"PhantomConfig: valid + test must be within the {self.patients} patients, "
                f"got {self.valid} and {self.test}"
            )
        config.check_bounds(
            self,
            "PhantomConfig",
            patients=config.COUNT,
            seed=config.SEED,
            columns=(32, 2048),
            slices=(8, 4096),
        )
        for name, (low, high) in (("columns", self.columns), ("slices", self.slices)):
            if low > high:
                raise ValueError(f"PhantomConfig: {name} must rise, got [{low}, {high}]")


@frozen(kw_only=True)
class Lesion:
    """One lesion; `size_mm` is the largest diameter, or the depth of a fluid layer.

    What a finding does not need keeps its default: fluid, emphysema and a large heart have no place of their
    own.
    """

    side: str = ""  # "right", "left" or ""
    zone: str = ""  # "upper", "middle", "lower" or ""
    size_mm: float = 0.0
    at: tuple[float, float, float] = (0.0, 0.0, 0.0)  # x, y, z in patient coordinates
    to: tuple[float, float, float] = (0.0, 0.0, 0.0)  # calcification: a plaque runs from `at` to here
    thick_mm: float = 0.0  # calcification: diameter of the plaque across
    hu: float = 0.0  # density
    # Emphysema: 0..1. Hernia: what fills the stomach, gas above 0.35, fat above -0.2, else only tissue.
    severity: float = 0.0


Lesions = tuple[Lesion, ...]


@frozen(kw_only=True)
class ChestCase:
    """A person to be scanned: the body in mm and HU, and the lesions of each present finding."""

    age: int
    sex: str  # "M" or "F"
    body: Body
    findings: dict[str, Lesions]
    texture: int  # seed of individual anatomy that no report mentions: vessels, ribs, folds

    @property
    def labels(self) -> dict[str, int]:
        """0 or 1 for each name in FINDINGS."""
        return {name: int(name in self.findings) for name in FINDINGS}


def draw_chest_case(cfg: PhantomConfig, gen: Gen) -> ChestCase:
    """A person and their findings.

    Age, smoking, heart failure and infection make findings go together; none of them decides one.
    """
    age = int(np.clip(gen.normal(60, 15), 20, 92))
    smoke, failure, infect = gen.standard_normal(3)  # smoking, heart failure, infection: how much of each
    body = _draw_body(cfg, gen)
    old = (age - 60) / 15  # unit normal as well, but for the clip
    # The first number is that of an average person, the others what each trait adds.
    log_odds = {
        "Arterial wall calcification": -1.0 + 1.1 * old,
        "Cardiomegaly": -1.6 + 1.0 * failure + 0.4 * old,
        "Pericardial effusion": -1.7 + 0.8 * failure,
        "Coronary artery wall calcification": -1.2 + 1.0 * old + 0.4 * smoke,
        "Hiatal hernia": -1.6 + 0.6 * old,
        "Emphysema": -1.4 + 1.1 * smoke,
        "Atelectasis": -1.2 + 0.6 * failure,
        "Lung nodule": -0.6 + 0.5 * smoke,
        "Lung opacity": -0.9 + 0.9 * infect,
        "Pleural effusion": -1.4 + 0.9 * failure + 0.4 * infect,
        "Consolidation": -1.4 + 0.9 * infect,
    }
    present = []
    for name in FINDINGS:
        probability = 1 / (1 + np.exp(-log_odds[name]))
        if gen.random() < probability:
            present.append(name)
    # Before the lesions are drawn: those of the heart lie on its surface. A heart is called large above half
    # of the chest's width; `_draw_body` stays below.
    if "Cardiomegaly" in present:
        body["heart"] = gen.uniform(0.53, 0.64)
    sex = "FM"[gen.integers(2)]
    texture = int(gen.integers(2**32))
    findings = {name: _DRAW_LESIONS[name](body, gen) for name in present}
    return ChestCase(age=age, sex=sex, body=body, texture=texture, findings=findings)


def _draw_body(cfg: PhantomConfig, gen: Gen) -> Body:
    def draw(low: float, high: float) -> float:
        # cfg.variation narrows the range about its middle
        middle = (low + high) / 2
        return middle + cfg.variation * (gen.uniform(low, high) - middle)

    a = draw(148, 186)
    fat = draw(6, 30)
    blood = gen.uniform(120, 240) if gen.random() < cfg.contrast else gen.uniform(36, 52)
    return {
        "a": a,  # half width and depth of the body
        "b": a * draw(0.64, 0.76),
        "fat": fat,  # under the skin, at the sides; 0.7 of it in front and behind
        "ta": a - fat - draw(14, 20),  # half width and depth of the inner chest
        "tb": a * 0.70 - 0.7 * fat - draw(6, 14),
        "apex": draw(112, 138),  # z of the lungs' top and of the two domes of the diaphragm
        "dome_right": draw(-74, -54),
        "dome_left": draw(-88, -66),
        "gap": draw(17, 24),  # half width of the mediastinum
        "lung": gen.normal(-862, 16 * cfg.variation),  # HU
        "blood": blood,  # HU
        "heart": draw(0.38, 0.485),
        "heart_x": draw(-20, -8),  # centre, left of the middle
        "heart_y": draw(12, 24),
        "rim": draw(2.5, 6.0),  # fat on the heart
        "aorta": draw(11.0, 15.5),  # radius
        "bone": draw(130, 260),  # HU
        "stomach": gen.uniform(-1, 1),  # gas where positive
    }


def heart_shape(body: Body) -> tuple[Array, Array]:
    """Centre [3] and radii [3] of the heart in mm."""
    radius = body["heart"] * body["ta"]  # a share of the whole width is the same share of the half
    radii = radius * np.array([1.0, 0.80, 0.84])
    diaphragm = min(body["dome_right"], body["dome_left"])
    centre = np.array([body["heart_x"], body["heart_y"], diaphragm + 0.72 * radii[2]])
    return centre, radii


def _zone(z: float) -> str:
    """The third of the lung at height z, as a report names it."""
    if z > 35:
        return "upper"
    return "middle" if z > -25 else "lower"


def _draw_place(
    body: Body, gen: Gen, low: float, high: float, depth: tuple[float, float] = (0.0, 0.8)
) -> tuple[str, float, float, float]:
    """A side, and x, y, z in mm in that lung.

    Args:
        low, high: limits of z.
        depth: limits of the distance from the axis of the lung (0) to its wall (1).
    """
    sign = 1 if gen.random() < 0.5 else -1
    z = gen.uniform(low, high)
    r = gen.uniform(*depth)
    angle = gen.uniform(0, 2 * np.pi)
    # The lung's section at this height is an ellipse between the mediastinum and the chest wall.
    width = float(taper(body, z))
    outer = body["ta"] * width
    inner = body["gap"] + 12
    middle = (outer + inner) / 2
    half = (outer - inner) / 2
    x = middle + half * r * np.cos(angle)
    y = 0.82 * body["tb"] * width * r * np.sin(angle)
    side = "right" if sign > 0 else "left"
    return side, sign * x, y, z


def taper(body: Body, z: ArrayLike) -> Array:
    """How much narrower than its base the inner chest is at height z in mm (1 = as wide)."""
    # 0 up to 20 mm below the hilum, 1 at the apex.
    t = np.clip((np.asarray(z) + 20) / (body["apex"] + 20), 0, 1)
    return np.sqrt(np.clip(1 - t**2.6, 1e-3, None))  # never 0: others divide by it


def diaphragm_height(body: Body, x: Array, y: Array) -> Array:
    """Height z of the diaphragm at places x, y, all in mm: a dome per side, deepest behind."""
    centre = 0.52 * body["ta"]  # |x| of the top of a dome; it falls outwards from there
    # float32, as x and y of a whole volume are: plain floats would double its memory.
    top = np.where(x > 0, np.float32(body["dome_right"]), np.float32(body["dome_left"]))
    side = (np.abs(x) - centre) / (0.5 * body["ta"])
    back = y / body["tb"]
    to_side = 34 * np.clip(side, 0, None) ** 2
    to_both_ends = 26 * back**2
    to_back = 30 * np.clip(-back, 0, None) ** 2
    return top - to_side - to_both_ends - to_back


def _draw_spots(
    body: Body, gen: Gen, count: int, size: Callable[[], float], hu: Callable[[], float], **place: Any
) -> Lesions:
    """`count` lesions anywhere in the lungs, diameter and density drawn anew for each by `size` and `hu`;
    `place` goes to `_draw_place`.
    """
    lesions = []
    for _ in range(count):
        side, x, y, z = _draw_place(body, gen, **place)
        size_mm = round(size(), 1)
        lesion = Lesion(side=side, zone=_zone(z), size_mm=size_mm, at=(x, y, z), hu=round(hu(), 1))
        lesions.append(lesion)
    return tuple(lesions)


def _draw_nodules(body: Body, gen: Gen) -> Lesions:
    def size() -> float:
        return float(np.clip(np.exp(gen.normal(2.7, 0.35)), 8, 30))  # 15 mm in the median

    def hu() -> float:
        return gen.uniform(0, 80)

    count = 1 + gen.poisson(0.9)
    return _draw_spots(body, gen, count, size, hu, low=-40, high=85, depth=(0.2, 0.8))


def _draw_opacities(body: Body, gen: Gen) -> Lesions:
    def size() -> float:
        return gen.uniform(30, 85)

    def hu() -> float:
        return gen.uniform(-680, -540)

    count = 1 + gen.poisson(1.2)
    return _draw_spots(body, gen, count, size, hu, low=-60, high=80)


def _draw_consolidations(body: Body, gen: Gen) -> Lesions:
    def size() -> float:
        return gen.uniform(30, 75)

    def hu() -> float:
        return gen.uniform(0, 50)

    count = 1 + (gen.random() < 0.35)  # 1 or 2
    return _draw_spots(body, gen, count, size, hu, low=-60, high=60, depth=(0.4, 0.9))


def _draw_atelectases(body: Body, gen: Gen) -> Lesions:
    def size() -> float:
        return gen.uniform(45, 85)

    def hu() -> float:
        return gen.uniform(10, 50)

    count = 1 + (gen.random() < 0.4)  # 1 or 2
    return _draw_spots(body, gen, count, size, hu, low=-50, high=-15, depth=(0.1, 0.6))


def _draw_effusions(body: Body, gen: Gen) -> Lesions:
    sides = (("right",), ("left",), ("right", "left"))[gen.choice(3, p=(0.35, 0.3, 0.35))]
    lesions = []
    for side in sides:
        size_mm = round(gen.uniform(14, 65), 1)
        lesions.append(Lesion(side=side, zone="lower", size_mm=size_mm, hu=round(gen.uniform(-2, 18), 1)))
    return tuple(lesions)


def _draw_emphysema(body: Body, gen: Gen) -> Lesions:
    zone = ("upper", "")[gen.integers(2)]  # "": everywhere
    size_mm = round(gen.uniform(6, 16), 1)  # of one hole
    severity = round(gen.uniform(0.35, 1.0), 2)
    return (Lesion(zone=zone, size_mm=size_mm, severity=severity),)


def _draw_hernia(body: Body, gen: Gen) -> Lesions:
    """Stomach above the diaphragm, behind the heart."""
    size = gen.uniform(34, 70)
    diaphragm = min(body["dome_right"], body["dome_left"])
    x = gen.uniform(-16, 4)
    z = diaphragm + gen.uniform(0.1, 0.5) * size
    severity = round(gen.uniform(-1, 1), 2)
    return (Lesion(size_mm=round(size, 1), at=(x, -0.32 * body["tb"], z), severity=severity),)


def _draw_pericardial_effusion(body: Body, gen: Gen) -> Lesions:
    return (Lesion(size_mm=round(gen.uniform(8, 22), 1), hu=round(gen.uniform(0, 16), 1)),)


def _draw_large_heart(body: Body, gen: Gen) -> Lesions:
    """The size of the heart itself, which `draw_chest_case` made large."""
    _, radii = heart_shape(body)
    return (Lesion(size_mm=round(2 * radii[0], 1)),)


def _draw_coronary_calcium(body: Body, gen: Gen) -> Lesions:
    """Calcium along three arteries on the heart's surface."""
    centre, radii = heart_shape(body)
    # Start and end of each artery, in units of the heart's radii.
    paths = (
        ((-0.1, 0.7, 0.7), (-0.65, 0.75, -0.1)),
        ((0.5, 0.6, 0.6), (0.95, 0.1, -0.3)),
        ((-0.6, 0.2, 0.75), (-0.95, -0.3, 0.0)),
    )
    plaques = []
    for _ in range(2 + gen.poisson(2.0)):
        path = paths[gen.choice(3, p=(0.6, 0.2, 0.2))]
        start, end = np.array(path[0]), np.array(path[1])
        length = gen.uniform(6, 25)
        middle = gen.random()  # along the artery, 0 to 1
        artery = np.linalg.norm((end - start) * radii)  # mm
        half = length / artery / 2
        ends = []
        for t in (middle - half, middle + half):
            place = start + np.clip(t, 0, 1) * (end - start)
            # Projected to 2.5 mm under the heart's surface.
            ends.append(centre + (radii - 2.5) * place / np.linalg.norm(place))
        plaques.append(_draw_plaque(ends[0], ends[1], gen))
    return tuple(plaques)


def _draw_aortic_calcium(body: Body, gen: Gen) -> Lesions:
    """Calcium in the wall of the thoracic aorta."""
    path = aorta_path(body)
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)  # of the segments
    plaques = []
    for _ in range(2 + gen.poisson(3.0)):
        i = gen.choice(len(lengths), p=lengths / lengths.sum())
        segment = path[i + 1] - path[i]
        middle = path[i] + gen.random() * segment
        # From the centre line to the wall, in any direction.
        angle = gen.uniform(0, 2 * np.pi)
        middle = middle + body["aorta"] * np.array([np.cos(angle), np.sin(angle), 0.0])
        half = segment / lengths[i] * gen.uniform(4, 15)
        plaques.append(_draw_plaque(middle - half, middle + half, gen))
    return tuple(plaques)


def _draw_plaque(start: Array, end: Array, gen: Gen) -> Lesion:
    length = float(np.linalg.norm(end - start))
    return Lesion(
        size_mm=round(length, 1),
        at=tuple(start.tolist()),
        to=tuple(end.tolist()),
        thick_mm=round(gen.uniform(3, 6), 1),
        hu=round(gen.uniform(450, 1200), 0),
    )


def aorta_path(body: Body) -> Array:
    """Centre line of the aorta, points [n, 3] in mm: root, ascending, arch, descending."""
    back = -0.52 * body["tb"]  # y of the descending part, before the spine
    arch = [(12, 16, 15), (8, 10, 42), (-8, -8, 54), (-18, back * 0.8, 42)]
    return np.array([(4, 12, -25), *arch, (-22, back, 10), (-20, back, -170)], float)


# How the lesions of each finding are drawn, for `draw_chest_case`.
_DRAW_LESIONS: dict[str, Callable[[Body, Gen], Lesions]] = {
    "Arterial wall calcification": _draw_aortic_calcium,
    "Cardiomegaly": _draw_large_heart,
    "Pericardial effusion": _draw_pericardial_effusion,
    "Coronary artery wall calcification": _draw_coronary_calcium,
    "Hiatal hernia": _draw_hernia,
    "Emphysema": _draw_emphysema,
    "Atelectasis": _draw_atelectases,
    "Lung nodule": _draw_nodules,
    "Lung opacity": _draw_opacities,
    "Pleural effusion": _draw_effusions,
    "Consolidation": _draw_consolidations,
}
