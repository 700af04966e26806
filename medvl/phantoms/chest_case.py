"""Chest cases: the body and the findings of a person, before anything is drawn.

Patient coordinates are in mm: x to the patient's right, y to anterior, z to superior, 0 at the hilum.

What is drawn from the generator, and in which order, is part of what a seed means.

Sizes, places, densities and odds have no source: they were chosen so that a drawn volume resembles a chest
CT at voxels of several mm, and so that each finding is in 13 to 45 % of the cases.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import evolve, field, frozen
from numpy.typing import ArrayLike

from medvl.base import config

Gen = np.random.Generator
Array = np.ndarray

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
class Body:
    """The measures in which healthy bodies differ: lengths in mm, densities in HU.

    The section of the body, and of the chest within the ribs, is an oval with half axes across (x) and from
    front to back (y).
    """

    half_width: float
    half_depth: float
    fat: float  # thickness under the skin at the sides; 0.7 of it in front and behind
    chest_half_width: float  # of the inner chest
    chest_half_depth: float
    apex: float  # z of the top of the lungs
    dome_right: float  # z of the top of each dome of the diaphragm
    dome_left: float
    mediastinum: float  # half its width
    lung_hu: float
    blood_hu: float
    heart_ratio: float  # width of the heart by that of the inner chest
    heart_x: float  # centre of the heart, left of the middle
    heart_y: float
    heart_fat: float  # thickness on the heart
    aorta_radius: float
    bone_hu: float
    stomach_gas: float  # -1 to 1: the stomach has a bubble of gas where positive


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
        body = evolve(body, heart_ratio=gen.uniform(0.53, 0.64))
    sex = "FM"[gen.integers(2)]
    texture = int(gen.integers(2**32))
    findings = {name: _DRAW_LESIONS[name](body, gen) for name in present}
    return ChestCase(age=age, sex=sex, body=body, texture=texture, findings=findings)


def _draw_body(cfg: PhantomConfig, gen: Gen) -> Body:
    def draw(low: float, high: float) -> float:
        # cfg.variation narrows the range about its middle
        middle = (low + high) / 2
        return middle + cfg.variation * (gen.uniform(low, high) - middle)

    # Depths follow widths, so that slim people are slim in both directions.
    half_width = draw(148, 186)
    fat = draw(6, 30)
    enhanced = gen.random() < cfg.contrast
    blood_hu = gen.uniform(120, 240) if enhanced else gen.uniform(36, 52)
    return Body(
        half_width=half_width,
        half_depth=half_width * draw(0.64, 0.76),
        fat=fat,
        chest_half_width=half_width - fat - draw(14, 20),
        chest_half_depth=half_width * 0.70 - 0.7 * fat - draw(6, 14),
        apex=draw(112, 138),
        dome_right=draw(-74, -54),
        dome_left=draw(-88, -66),
        mediastinum=draw(17, 24),
        lung_hu=gen.normal(-862, 16 * cfg.variation),
        blood_hu=blood_hu,
        heart_ratio=draw(0.38, 0.485),
        heart_x=draw(-20, -8),
        heart_y=draw(12, 24),
        heart_fat=draw(2.5, 6.0),
        aorta_radius=draw(11.0, 15.5),
        bone_hu=draw(130, 260),
        stomach_gas=gen.uniform(-1, 1),
    )


def heart_shape(body: Body) -> tuple[Array, Array]:
    """Centre [3] and radii [3] of the heart in mm."""
    half_width = body.heart_ratio * body.chest_half_width
    radii = half_width * np.array([1.0, 0.80, 0.84])
    # It rests on the diaphragm, a little sunk into its lower dome.
    diaphragm = min(body.dome_right, body.dome_left)
    z = diaphragm + 0.72 * radii[2]
    centre = np.array([body.heart_x, body.heart_y, z])
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
    side = "right" if gen.random() < 0.5 else "left"
    z = gen.uniform(low, high)
    r = gen.uniform(*depth)
    angle = gen.uniform(0, 2 * np.pi)
    # The lung's section at this height is an ellipse between the mediastinum and the chest wall. The 12 mm
    # beside the mediastinum belong to the vessels of the hilum.
    width = float(taper(body, z))
    outer = body.chest_half_width * width
    inner = body.mediastinum + 12
    middle = (outer + inner) / 2
    half_width = (outer - inner) / 2
    half_depth = 0.82 * body.chest_half_depth * width
    x = middle + half_width * r * np.cos(angle)
    y = half_depth * r * np.sin(angle)
    if side == "left":
        x = -x
    return side, x, y, z


def taper(body: Body, z: ArrayLike) -> Array:
    """How much narrower than its base the inner chest is at height z in mm (1 = as wide)."""
    # 0 up to 20 mm below the hilum, 1 at the apex.
    height = np.asarray(z) + 20
    t = np.clip(height / (body.apex + 20), 0, 1)
    # The power 2 would be an ellipse; with 2.6 the chest is broader below the apex.
    squared = np.clip(1 - t**2.6, 1e-3, None)  # never 0: others divide by the root
    return np.sqrt(squared)


def diaphragm_height(body: Body, x: Array, y: Array) -> Array:
    """Height z of the diaphragm at places x, y, all in mm: a dome per side, deepest behind."""
    # float32, as x and y of a whole volume are: plain floats would double its memory.
    right = np.float32(body.dome_right)
    left = np.float32(body.dome_left)
    top = np.where(x > 0, right, left)
    # Outwards from the top of a dome (0) to the wall (about 1), and from the middle to the back (-1) or the
    # front (1). Falls are in mm; the recess behind the lungs is the deepest.
    dome_x = 0.52 * body.chest_half_width
    outwards = (np.abs(x) - dome_x) / (0.5 * body.chest_half_width)
    forwards = y / body.chest_half_depth
    fall_to_side = 34 * np.clip(outwards, 0, None) ** 2
    fall_to_both_ends = 26 * forwards**2
    fall_to_back = 30 * np.clip(-forwards, 0, None) ** 2
    return top - fall_to_side - fall_to_both_ends - fall_to_back


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
        depth = round(gen.uniform(14, 65), 1)
        hu = round(gen.uniform(-2, 18), 1)
        lesions.append(Lesion(side=side, zone="lower", size_mm=depth, hu=hu))
    return tuple(lesions)


def _draw_emphysema(body: Body, gen: Gen) -> Lesions:
    zone = ("upper", "")[gen.integers(2)]  # "": everywhere
    size_mm = round(gen.uniform(6, 16), 1)  # of one hole
    severity = round(gen.uniform(0.35, 1.0), 2)
    return (Lesion(zone=zone, size_mm=size_mm, severity=severity),)


def _draw_hernia(body: Body, gen: Gen) -> Lesions:
    """Stomach above the diaphragm, behind the heart."""
    size = gen.uniform(34, 70)
    diaphragm = min(body.dome_right, body.dome_left)
    x = gen.uniform(-16, 4)
    y = -0.32 * body.chest_half_depth
    z = diaphragm + gen.uniform(0.1, 0.5) * size
    severity = round(gen.uniform(-1, 1), 2)
    return (Lesion(size_mm=round(size, 1), at=(x, y, z), severity=severity),)


def _draw_pericardial_effusion(body: Body, gen: Gen) -> Lesions:
    depth = round(gen.uniform(8, 22), 1)
    hu = round(gen.uniform(0, 16), 1)
    return (Lesion(size_mm=depth, hu=hu),)


def _draw_large_heart(body: Body, gen: Gen) -> Lesions:
    """The size of the heart itself, which `draw_chest_case` made large."""
    _, radii = heart_shape(body)
    return (Lesion(size_mm=round(2 * radii[0], 1)),)


def _draw_coronary_calcium(body: Body, gen: Gen) -> Lesions:
    """Calcium along three arteries on the heart's surface."""
    centre, radii = heart_shape(body)
    # Start and end of each artery, in units of the heart's radii: in front, on the right, on the left.
    arteries = (
        ((-0.1, 0.7, 0.7), (-0.65, 0.75, -0.1)),
        ((0.5, 0.6, 0.6), (0.95, 0.1, -0.3)),
        ((-0.6, 0.2, 0.75), (-0.95, -0.3, 0.0)),
    )
    plaques = []
    for _ in range(2 + gen.poisson(2.0)):
        artery = arteries[gen.choice(3, p=(0.6, 0.2, 0.2))]
        start = np.array(artery[0])
        course = np.array(artery[1]) - start
        length_mm = gen.uniform(6, 25)
        middle = gen.random()  # along the artery, 0 to 1
        artery_mm = np.linalg.norm(course * radii)
        half = length_mm / artery_mm / 2
        ends = []
        for t in (middle - half, middle + half):
            place = start + np.clip(t, 0, 1) * course
            # Projected to 2.5 mm under the heart's surface.
            ends.append(centre + (radii - 2.5) * place / np.linalg.norm(place))
        plaques.append(_draw_plaque(ends[0], ends[1], gen))
    return tuple(plaques)


def _draw_aortic_calcium(body: Body, gen: Gen) -> Lesions:
    """Calcium in the wall of the thoracic aorta."""
    path = aorta_path(body)  # [point, 3]
    segments = np.diff(path, axis=0)
    lengths = np.linalg.norm(segments, axis=1)
    plaques = []
    for _ in range(2 + gen.poisson(3.0)):
        # A long segment has more plaques than a short one.
        i = gen.choice(len(lengths), p=lengths / lengths.sum())
        on_centre_line = path[i] + gen.random() * segments[i]
        # From the centre line to the wall, in any direction.
        angle = gen.uniform(0, 2 * np.pi)
        direction = np.array([np.cos(angle), np.sin(angle), 0.0])
        middle = on_centre_line + body.aorta_radius * direction
        half = segments[i] / lengths[i] * gen.uniform(4, 15)  # along the aorta
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
    back = -0.52 * body.chest_half_depth  # y of the descending part, before the spine
    points = [
        (4, 12, -25),
        (12, 16, 15),
        (8, 10, 42),
        (-8, -8, 54),
        (-18, back * 0.8, 42),
        (-22, back, 10),
        (-20, back, -170),
    ]
    return np.array(points, float)


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
