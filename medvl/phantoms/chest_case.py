"""Who is scanned and what they have: the bodies and findings of drawn chests, before anything is drawn.

Patient coordinates: x to the right, y to the front, z to the head, in mm, 0 at the hilum.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import field, frozen
from numpy.typing import ArrayLike

from medvl.base import config

Gen = np.random.Generator
Array = np.ndarray
Body = dict[str, float]  # lengths in mm, densities in HU, `heart` as a share of the chest's inner width

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


def _share(_: Any, attribute: Any, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"PhantomConfig: {attribute.name} must lie in 0..1, got {value}")


@frozen(kw_only=True)
class PhantomConfig:
    """`patients` in all; `valid` and `test` of them are held out, the rest is for training."""

    patients: int
    seed: int
    valid: int = 0
    test: int = 0
    second_recon: float = field(default=0.2, validator=_share)  # share of scans reconstructed twice
    contrast: float = field(default=0.35, validator=_share)  # share of scans with enhanced blood
    variation: float = field(
        default=1.0, validator=_share
    )  # how much bodies differ: 1 as people do, 0 all the same
    columns: tuple[int, int] = (64, 96)  # in-plane voxels, drawn evenly from this range
    slices: tuple[int, int] = (28, 40)

    def __attrs_post_init__(self):
        if min(self.valid, self.test) < 0 or self.patients < 1 or self.valid + self.test > self.patients:
            raise ValueError(
                f"PhantomConfig: valid + test must be within the {self.patients} patients, got {self.valid} and {self.test}"
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
    """One drawn finding. `at` in mm in patient coordinates; `size_mm` is the largest diameter, or the depth of a fluid layer."""

    side: str = ""  # "right", "left" or ""
    zone: str = ""  # "upper", "middle", "lower" or ""
    size_mm: float = 0.0
    at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    to: tuple[float, float, float] = (0.0, 0.0, 0.0)  # calcification: a plaque runs from `at` to here
    thick_mm: float = 0.0  # calcification
    hu: float = 0.0
    severity: float = 0.0  # emphysema: 0..1; hernia: gas where above 0.35, fat or food where above -0.2


Lesions = tuple[Lesion, ...]


@frozen(kw_only=True)
class ChestCase:
    """What a scan shows, before it is drawn: the body in mm and HU, and the lesions of each present finding."""

    age: int
    sex: str  # "M" or "F"
    body: Body
    findings: dict[str, Lesions]
    texture: int  # seed of what is peculiar to the patient and in no report: vessels, ribs, folds

    @property
    def labels(self) -> dict[str, int]:
        """0 or 1 for each name in FINDINGS."""
        return {name: int(name in self.findings) for name in FINDINGS}


def draw_chest_case(cfg: PhantomConfig, gen: Gen) -> ChestCase:
    """A person and their findings. Age, smoking, heart failure and infection make findings go together, none of them decides one."""
    age, (smoke, failure, infect) = int(np.clip(gen.normal(60, 15), 20, 92)), gen.standard_normal(3)
    body = _draw_body(cfg, gen)
    old = (age - 60) / 15
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
    present = [name for name in FINDINGS if gen.random() < 1 / (1 + np.exp(-log_odds[name]))]
    if "Cardiomegaly" in present:
        body["heart"] = gen.uniform(0.53, 0.64)
    sex, texture = "FM"[gen.integers(2)], int(gen.integers(2**32))
    return ChestCase(
        age=age,
        sex=sex,
        body=body,
        texture=texture,
        findings={name: _LESIONS[name](body, gen) for name in present},
    )


def _draw_body(cfg: PhantomConfig, gen: Gen) -> Body:
    def draw(low: float, high: float) -> float:
        middle = (low + high) / 2
        return middle + cfg.variation * (gen.uniform(low, high) - middle)

    a = draw(148, 186)
    fat = draw(6, 30)
    blood = gen.uniform(120, 240) if gen.random() < cfg.contrast else gen.uniform(36, 52)
    return {
        "a": a,  # half width of the body
        "b": a * draw(0.64, 0.76),
        "fat": fat,
        "ta": a - fat - draw(14, 20),  # half width and depth of the inner chest
        "tb": a * 0.70 - 0.7 * fat - draw(6, 14),
        "apex": draw(112, 138),
        "dome_right": draw(-74, -54),
        "dome_left": draw(-88, -66),
        "gap": draw(17, 24),  # half width of the mediastinum
        "lung": gen.normal(-862, 16 * cfg.variation),
        "blood": blood,
        "heart": draw(0.38, 0.485),
        "heart_x": draw(-20, -8),
        "heart_y": draw(12, 24),
        "rim": draw(2.5, 6.0),  # fat on the heart
        "aorta": draw(11.0, 15.5),
        "bone": draw(130, 260),
        "stomach": gen.uniform(-1, 1),  # gas where positive
    }


def heart_shape(body: Body) -> tuple[Array, Array]:
    """Centre [3] and radii [3] of the heart in mm."""
    radius = body["heart"] * body["ta"]
    radii = radius * np.array([1.0, 0.80, 0.84])
    return np.array(
        [body["heart_x"], body["heart_y"], min(body["dome_right"], body["dome_left"]) + 0.72 * radii[2]]
    ), radii


def _zone(z: float) -> str:
    return "upper" if z > 35 else "middle" if z > -25 else "lower"


def _in_lung(
    body: Body, gen: Gen, low: float, high: float, depth: tuple[float, float] = (0.0, 0.8)
) -> tuple[str, float, float, float]:
    """A side and a place in that lung, z within low..high, at this depth (0 axis of the lung, 1 its wall)."""
    sign = 1 if gen.random() < 0.5 else -1
    z = gen.uniform(low, high)
    width, r, turn = float(taper(body, z)), gen.uniform(*depth), gen.uniform(0, 2 * np.pi)
    outer, inner = body["ta"] * width, body["gap"] + 12
    x = (outer + inner) / 2 + (outer - inner) / 2 * r * np.cos(turn)
    return ("right" if sign > 0 else "left"), sign * x, 0.82 * body["tb"] * width * r * np.sin(turn), z


def taper(body: Body, z: ArrayLike) -> Array:
    """How much narrower than its base the inner chest is at height z in mm (1 = as wide)."""
    t = np.clip((np.asarray(z) + 20) / (body["apex"] + 20), 0, 1)
    return np.sqrt(np.clip(1 - t**2.6, 1e-3, None))


def _spots(
    body: Body, gen: Gen, count: int, size: Callable[[], float], hu: Callable[[], float], **where: Any
) -> Lesions:
    found = []
    for _ in range(count):
        side, x, y, z = _in_lung(body, gen, **where)
        found.append(
            Lesion(side=side, zone=_zone(z), size_mm=round(size(), 1), at=(x, y, z), hu=round(hu(), 1))
        )
    return tuple(found)


def _nodules(body: Body, gen: Gen) -> Lesions:
    def size() -> float:
        return float(np.clip(np.exp(gen.normal(2.7, 0.35)), 8, 30))

    count = 1 + gen.poisson(0.9)
    return _spots(body, gen, count, size, lambda: gen.uniform(0, 80), low=-40, high=85, depth=(0.2, 0.8))


def _opacities(body: Body, gen: Gen) -> Lesions:
    return _spots(
        body,
        gen,
        1 + gen.poisson(1.2),
        lambda: gen.uniform(30, 85),
        lambda: gen.uniform(-680, -540),
        low=-60,
        high=80,
    )


def _consolidations(body: Body, gen: Gen) -> Lesions:
    count = 1 + (gen.random() < 0.35)
    return _spots(
        body,
        gen,
        count,
        lambda: gen.uniform(30, 75),
        lambda: gen.uniform(0, 50),
        low=-60,
        high=60,
        depth=(0.4, 0.9),
    )


def _plates(body: Body, gen: Gen) -> Lesions:
    count = 1 + (gen.random() < 0.4)
    return _spots(
        body,
        gen,
        count,
        lambda: gen.uniform(45, 85),
        lambda: gen.uniform(10, 50),
        low=-50,
        high=-15,
        depth=(0.1, 0.6),
    )


def _effusions(body: Body, gen: Gen) -> Lesions:
    sides = (("right",), ("left",), ("right", "left"))[gen.choice(3, p=(0.35, 0.3, 0.35))]
    return tuple(
        Lesion(side=s, zone="lower", size_mm=round(gen.uniform(14, 65), 1), hu=round(gen.uniform(-2, 18), 1))
        for s in sides
    )


def _emphysema(body: Body, gen: Gen) -> Lesions:
    return (
        Lesion(
            zone=("upper", "")[gen.integers(2)],
            size_mm=round(gen.uniform(6, 16), 1),
            severity=round(gen.uniform(0.35, 1.0), 2),
        ),
    )


def _hernia(body: Body, gen: Gen) -> Lesions:
    size, low = gen.uniform(34, 70), min(body["dome_right"], body["dome_left"])
    at = (gen.uniform(-16, 4), -0.32 * body["tb"], low + gen.uniform(0.1, 0.5) * size)
    return (Lesion(size_mm=round(size, 1), at=at, severity=round(gen.uniform(-1, 1), 2)),)


def _pericardial(body: Body, gen: Gen) -> Lesions:
    return (Lesion(size_mm=round(gen.uniform(8, 22), 1), hu=round(gen.uniform(0, 16), 1)),)


def _large_heart(body: Body, gen: Gen) -> Lesions:
    return (Lesion(size_mm=round(2 * heart_shape(body)[1][0], 1)),)


def _coronary(body: Body, gen: Gen) -> Lesions:
    """Calcium along three arteries on the heart's surface."""
    centre, radii = heart_shape(body)
    paths = (
        ((-0.1, 0.7, 0.7), (-0.65, 0.75, -0.1)),
        ((0.5, 0.6, 0.6), (0.95, 0.1, -0.3)),
        ((-0.6, 0.2, 0.75), (-0.95, -0.3, 0.0)),
    )
    found = []
    for _ in range(2 + gen.poisson(2.0)):
        start, end = map(np.array, paths[gen.choice(3, p=(0.6, 0.2, 0.2))])
        length, first = gen.uniform(6, 25), gen.random()
        share = length / np.linalg.norm((end - start) * radii)
        ends = [start + np.clip(t, 0, 1) * (end - start) for t in (first - share / 2, first + share / 2)]
        found.append(_plaque([centre + (radii - 2.5) * e / np.linalg.norm(e) for e in ends], gen))
    return tuple(found)


def _arterial(body: Body, gen: Gen) -> Lesions:
    """Calcium in the wall of the thoracic aorta."""
    path, found = aorta_path(body), []
    for _ in range(2 + gen.poisson(3.0)):
        i = gen.choice(len(path) - 1, p=_lengths(path) / _lengths(path).sum())
        along = (path[i + 1] - path[i]) / _lengths(path)[i]
        middle, around = path[i] + gen.random() * (path[i + 1] - path[i]), gen.uniform(0, 2 * np.pi)
        middle = middle + body["aorta"] * np.array([np.cos(around), np.sin(around), 0.0])
        half = along * gen.uniform(4, 15)
        found.append(_plaque([middle - half, middle + half], gen))
    return tuple(found)


def _plaque(ends: list[Array], gen: Gen) -> Lesion:
    at, to = (tuple(e.tolist()) for e in ends)
    length = float(np.linalg.norm(ends[1] - ends[0]))
    return Lesion(
        size_mm=round(length, 1),
        at=at,
        to=to,
        thick_mm=round(gen.uniform(3, 6), 1),
        hu=round(gen.uniform(450, 1200), 0),
    )


def aorta_path(body: Body) -> Array:
    """Centre line [n, 3] in mm: root, ascending, arch, descending."""
    back = -0.52 * body["tb"]
    arch = [(12, 16, 15), (8, 10, 42), (-8, -8, 54), (-18, back * 0.8, 42)]
    return np.array([(4, 12, -25), *arch, (-22, back, 10), (-20, back, -170)], float)


def _lengths(path: Array) -> Array:
    return np.linalg.norm(np.diff(path, axis=0), axis=1)


_LESIONS: dict[str, Callable[[Body, Gen], Lesions]] = {
    "Arterial wall calcification": _arterial,
    "Cardiomegaly": _large_heart,
    "Pericardial effusion": _pericardial,
    "Coronary artery wall calcification": _coronary,
    "Hiatal hernia": _hernia,
    "Emphysema": _emphysema,
    "Atelectasis": _plates,
    "Lung nodule": _nodules,
    "Lung opacity": _opacities,
    "Pleural effusion": _effusions,
    "Consolidation": _consolidations,
}
