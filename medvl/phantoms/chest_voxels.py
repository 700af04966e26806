"""Draw a chest case as CT voxels. Every object is true to its size in mm: what is smaller than a voxel fills only its part of it.

Dims: z y x voxel axes, n points. Arrays are [z, y, x] in RAS+ until they are stored.
"""

from collections.abc import Callable
from itertools import pairwise

import nibabel as nib
import numpy as np
from attrs import frozen

from medvl.phantoms.canvas import (
    Array,
    Canvas,
    blend,
    columns,
    cover,
    fill_ellipsoid,
    oval,
    smooth_noise,
    soft,
    splat,
    touched,
    tube,
)
from medvl.phantoms.chest_case import (
    Body,
    ChestCase,
    Gen,
    Lesion,
    PhantomConfig,
    aorta_path,
    heart_shape,
    taper,
)


@frozen(kw_only=True)
class DrawnVolume:
    """A drawn volume. `hu` int16 [x, y, z] in the stored orientation; `affine` [4, 4] takes its indices to RAS+ mm."""

    hu: Array
    affine: Array
    kernel: str


@frozen(kw_only=True)
class View:
    """How a scan is looked at; drawn without a look at the case."""

    shape: tuple[int, int, int]  # z y x
    step: tuple[float, float, float]  # mm, z y x
    origin: tuple[float, float, float]  # centre of the first voxel in mm, z y x
    axes: str  # stored orientation, e.g. "LPS"
    kernel: str  # "soft", "standard" or "sharp"
    noise: float  # HU


def render(cfg: PhantomConfig, case: ChestCase, gen: Gen) -> DrawnVolume:
    """Draw the case as one scanner would see it: view and noise come from `gen`, the patient from the case alone."""
    view, own = draw_view(cfg, gen), np.random.default_rng(case.texture)
    c = _blank(view, own)
    _paint_body(c, case, own)
    _paint_lungs(c, case.body, own)
    _paint_skeleton(c, case.body, own)
    _paint_mediastinum(c, case, own)
    for name, painter in _PAINTERS.items():
        for lesion in case.findings.get(name, ()):
            painter(c, case.body, lesion, own)
    hu = np.clip(np.rint(_expose(c.hu, view, gen)), -1024, 3071).astype(np.int16)
    return _store(hu, view)


def draw_view(cfg: PhantomConfig, gen: Gen) -> View:
    n, nz = (
        int(gen.integers(cfg.columns[0], cfg.columns[1] + 1)),
        int(gen.integers(cfg.slices[0], cfg.slices[1] + 1)),
    )
    fov, low, high = gen.uniform(330, 420), gen.uniform(-172, -156), gen.uniform(134, 150)
    step = (round((high - low) / nz, 3), round(fov / n, 4), round(fov / n, 4))
    origin = (low, -fov / 2 + gen.uniform(-12, 6), -fov / 2 + gen.uniform(-9, 9))
    return View(
        shape=(nz, n, n),
        step=step,
        origin=origin,
        axes=("LPS", "RAS", "LAS", "RPS", "PSR", "LPI")[gen.choice(6, p=(0.4, 0.2, 0.1, 0.1, 0.1, 0.1))],
        kernel=("soft", "standard", "sharp")[gen.integers(3)],
        noise=float(gen.uniform(8, 26)),
    )


def _blank(view: View, gen: Gen) -> Canvas:
    z, y, x = (
        np.arange(n, dtype=np.float32) * s + o
        for o, s, n in zip(view.origin, view.step, view.shape, strict=True)
    )
    hu, lung, rough = (
        np.zeros(view.shape, np.float32),
        np.zeros(view.shape, np.float32),
        1.8 * smooth_noise((z, y, x), 16, gen),
    )
    return Canvas(
        hu=hu,
        lung=lung,
        z=z[:, None, None],
        y=y[None, :, None],
        x=x[None, None, :],
        step=view.step,
        rough=rough,
    )


def _paint_body(c: Canvas, case: ChestCase, gen: Gen) -> None:
    """Air, table, skin and fat, muscle, chest, and what lies under the diaphragm."""
    b, pixel = case.body, c.step[1]
    flat = np.full((c.hu.shape[1], c.hu.shape[2]), -1000, np.float32)
    table = -b["b"] - gen.uniform(6, 14) + (c.x[0] / gen.uniform(600, 1200)) * c.x[0]
    blend(flat, soft(4 - np.abs(c.y[0] - table), pixel) * (np.abs(c.x[0]) < 205), gen.uniform(-300, 100))
    if case.sex == "F":
        for sign in (-1, 1):
            blend(
                flat,
                soft(
                    oval(c, (sign * 0.45 * b["a"], 0.86 * b["b"]), gen.uniform(40, 60), gen.uniform(20, 45)),
                    pixel,
                ),
                -90,
            )
    blend(flat, soft(oval(c, (0, 0), b["a"], b["b"], 2.3), pixel), -100)
    blend(
        flat,
        soft(oval(c, (0, 0), b["a"] - b["fat"], b["b"] - 0.7 * b["fat"], 2.3), pixel),
        gen.uniform(42, 60),
    )
    chest = soft(oval(c, (0, 0), b["ta"], b["tb"], 2.2), pixel)
    blend(flat, chest, -75)
    c.hu[:] = flat
    right = c.x[0] > gen.uniform(-45, -15)
    organ = np.where(right, np.float32(gen.uniform(48, 68)), np.float32(gen.uniform(20, 52)))
    blend(c.hu, soft(_dome(c, b) - 3 - c.z, c.step[0]) * chest, organ)
    if b["stomach"] > 0:
        at = (-0.5 * b["ta"], 0.3 * b["tb"], b["dome_left"] - gen.uniform(28, 45))
        fill_ellipsoid(c, at, (gen.uniform(18, 34), gen.uniform(14, 28), gen.uniform(12, 24)), -940)


def _dome(c: Canvas, b: Body) -> Array:
    """Height [y, x] of the diaphragm in mm: a dome per side, deepest behind."""
    centre = 0.52 * b["ta"]
    top = np.where(c.x[0] > 0, np.float32(b["dome_right"]), np.float32(b["dome_left"]))
    side, back = (np.abs(c.x[0]) - centre) / (0.5 * b["ta"]), c.y[0] / b["tb"]
    return top - 34 * np.clip(side, 0, None) ** 2 - 26 * back**2 - 30 * np.clip(-back, 0, None) ** 2


def _paint_lungs(c: Canvas, b: Body, gen: Gen) -> None:
    """Two lungs, denser behind, with vessels."""
    narrow = (1 / taper(b, c.z)).astype(np.float32)
    q = (np.abs(c.x / (b["ta"] - 3)) ** 2.2) * narrow**2.2 + (
        np.abs(c.y / (b["tb"] - 3)) ** 2.2
    ) * narrow**2.2
    inside = (1 - q) * np.float32(0.45 * b["tb"])
    gap = b["gap"] + 14 * np.clip((c.z - 40) / 80, 0, 1) + gen.uniform(0, 8) * (c.y < 0)
    np.minimum(inside, np.abs(c.x + gen.uniform(-4, 4)) - gap, out=inside)
    np.minimum(inside, c.z - _dome(c, b), out=inside)
    np.minimum(inside, b["apex"] - c.z, out=inside)
    c.lung[:] = soft(inside, c.step[1])
    tissue = (
        np.float32(b["lung"])
        - np.float32(gen.uniform(10, 45)) * (c.y / b["tb"])
        + np.float32(gen.uniform(6, 16)) * c.rough
    )
    blend(c.hu, c.lung, tissue)
    blend(c.hu, np.minimum(_vessels(c, b, gen), 1) * c.lung, np.float32(b["blood"]))


def _vessels(c: Canvas, b: Body, gen: Gen) -> Array:
    """The share of each voxel [z, y, x] that vessels take: a tree from each hilum; thin ones take their true part."""
    points, volumes = zip(_tree(b, -1, gen), _tree(b, 1, gen), strict=True)
    return splat(c, np.concatenate(points), np.concatenate(volumes))


def _tree(b: Body, sign: int, gen: Gen) -> tuple[Array, Array]:
    """Points [n, 3] (x y z, mm) in the vessels of one lung and the volume [n] in mm3 that each stands for."""
    first, second, t = 10, 40, np.linspace(0, 1, 22)[None, :, None]
    root = np.array([sign * (b["gap"] + 8), 0.0, -2.0])

    def bend(start, end, bulge):
        return (1 - t) * start + t * end + t * (1 - t) * gen.normal(0, bulge, (len(end), 1, 3))

    major = bend(root + gen.normal(0, 5, (first, 1, 3)), _ends(b, sign, first, gen), 18)
    take = gen.integers(first, size=second)
    fork = major[take, gen.integers(4, 18, size=second)][:, None]
    ends = fork + (_ends(b, sign, second, gen) - fork) * gen.uniform(0.4, 0.9, (second, 1, 1))
    minor = bend(fork, ends, 10)
    width = np.linspace(1, 0.25, 22)
    radius = np.concatenate(
        [gen.uniform(2.6, 4.2, (first, 1)) * width, gen.uniform(1.0, 2.0, (second, 1)) * width]
    ).ravel()
    line = np.concatenate([major, minor])
    length = np.linalg.norm(np.diff(line, axis=1, append=line[:, -1:]), axis=2).ravel()
    spread = line.reshape(1, -1, 3) + gen.uniform(-0.8, 0.8, (2, len(radius), 3)) * radius[None, :, None]
    return spread.reshape(-1, 3), np.tile(np.pi * radius**2 * length / 2, 2)


def _ends(b: Body, sign: int, n: int, gen: Gen) -> Array:
    """Points [n, 1, 3] near the wall of one lung."""
    z, turn = gen.uniform(-95, 0.86 * b["apex"], n), gen.uniform(-1.9, 1.9, n)
    width = taper(b, z) * gen.uniform(0.75, 0.95, n)
    x, y = (
        np.maximum(b["ta"] * width * np.cos(turn * 0.75), b["gap"] + 8),
        b["tb"] * width * np.sin(turn * 0.8),
    )
    return np.stack([sign * x, y, z], 1)[:, None]


def _paint_skeleton(c: Canvas, b: Body, gen: Gen) -> None:
    """Ribs, vertebrae with discs and canal, sternum: painted column by column, where they are."""
    shell = soft(4.5 - np.abs(oval(c, (0, 0), b["ta"] + 5, b["tb"] + 5, 2.2)), c.step[1])
    iy, ix = np.nonzero(shell > 0.05)
    slope, gap = gen.uniform(0.35, 0.6), gen.uniform(23, 27)
    phase = np.cos(2 * np.pi * (c.z[:, 0] - slope * c.y[0, iy, 0] + gen.uniform(0, gap)) / gap)
    rib = np.clip(phase * 2.2, 0, 1) * shell[iy, ix] * (1 - c.lung[:, iy, ix])
    c.hu[:, iy, ix] += rib * (gen.uniform(260, 420) - c.hu[:, iy, ix])
    at = gen.uniform(-5, 5), -b["tb"] + gen.uniform(12, 20)
    radius, disc = (
        gen.uniform(15, 20),
        np.cos(2 * np.pi * (c.z[:, 0] + gen.uniform(0, 24)) / gen.uniform(22, 26)),
    )
    body = oval(c, at, radius, radius * 0.8)
    columns(c, soft(body, c.step[1]), np.where(disc > 0.85, 70, b["bone"] + 160))
    columns(c, soft(body - 3, c.step[1]), np.where(disc > 0.85, 70, b["bone"]))
    behind = (at[0], at[1] - radius * 0.8 - 9)
    columns(c, soft(oval(c, behind, 16, 12), c.step[1]), np.full_like(disc, 320))
    columns(c, soft(oval(c, behind, 9, 8), c.step[1]), np.full_like(disc, 25))
    front = (0.0, b["tb"] + 5)
    columns(
        c,
        soft(oval(c, front, gen.uniform(14, 22), 6), c.step[1]),
        np.where(c.z[:, 0] > -70, gen.uniform(180, 300), 40),
    )


def _paint_mediastinum(c: Canvas, case: ChestCase, gen: Gen) -> None:
    """Great vessels, airway, oesophagus, and the heart in its fat and, with an effusion, its fluid."""
    b = case.body
    blood, wall = b["blood"], gen.uniform(32, 48)
    for p, q in pairwise(aorta_path(b)):
        tube(c, p, q, b["aorta"], blood)
    tube(c, (14, -4, 8), (16, 0, 110), gen.uniform(7, 10), blood)  # superior vena cava
    tube(c, (-8, 14, 8), (-24, -4, 10), gen.uniform(11, 14), blood)  # pulmonary trunk
    for sign in (-1, 1):
        tube(c, (-6, 4, 4), (sign * (b["gap"] + 12), -2, -2), gen.uniform(7, 10), blood)
    centre, radii = heart_shape(b)
    tube(
        c, (-4, -0.45 * b["tb"], 120), (-6, -0.38 * b["tb"], b["dome_left"] - 20), gen.uniform(5, 8), wall
    )  # oesophagus
    carina = np.array([gen.uniform(-3, 3), -6, gen.uniform(16, 28)])
    tube(c, (2, -2, 160), carina, gen.uniform(7, 9.5), -990)
    for sign in (-1, 1):
        tube(c, carina, (sign * (b["gap"] + 14), -6, carina[2] - 26), gen.uniform(5, 7), -985)
    fluid = sum(x.size_mm for x in case.findings.get("Pericardial effusion", ()))
    value = sum(x.hu for x in case.findings.get("Pericardial effusion", ()))
    for grow, hu in ((b["rim"] + fluid, value), (b["rim"], -85), (0.0, blood - 4)):
        if grow != b["rim"] + fluid or fluid:
            fill_ellipsoid(c, centre, radii + grow, hu)


def _expose(hu: Array, view: View, gen: Gen) -> Array:
    """Kernel and noise: a three-tap filter in the plane, smoothing or sharpening; the noise has the kernel's grain."""
    side = {"soft": 0.16, "standard": 0.08, "sharp": 0.0}[view.kernel]
    grain = gen.standard_normal(hu.shape, dtype=np.float32)
    grain *= np.float32(view.noise)
    hu = np.add(hu, grain, out=grain)
    for rows in (hu, hu.swapaxes(1, 2)) if side else ():
        slope = np.diff(rows, axis=1)
        slope *= np.float32(side)
        rows[:, 1:-1] += slope[:, 1:]
        rows[:, 1:-1] -= slope[:, :-1]
    return hu


def _store(hu: Array, view: View) -> DrawnVolume:
    """From [z, y, x] in RAS+ to the stored axes."""
    affine = np.diag([*view.step[::-1], 1.0])
    affine[:3, 3] = view.origin[::-1]
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(view.axes)
    )
    ras = hu.transpose(2, 1, 0)
    stored = nib.orientations.apply_orientation(ras, turn)
    return DrawnVolume(
        hu=stored, affine=affine @ nib.orientations.inv_ornt_aff(turn, ras.shape), kernel=view.kernel
    )


def _paint_calcium(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """A rod from end to end of the plaque, as a row of balls that together have its volume."""
    start, end, ball = np.array(lesion.at), np.array(lesion.to), lesion.thick_mm / 2
    count = int(np.ceil(lesion.size_mm / ball)) + 1
    volume = np.pi * ball**2 * (lesion.size_mm + 4 / 3 * ball)
    part = np.float32(volume / count / (4 / 3 * np.pi * ball**3) * (lesion.hu - 60))
    for t in np.linspace(0, 1, count):
        box, share = cover(c, start + t * (end - start), np.full(3, ball))
        c.hu[box] += share * part


def _paint_emphysema(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Holes of air as large as the lesion says, most in the upper lungs unless they are everywhere."""
    holes = smooth_noise((c.z, c.y, c.x), lesion.size_mm * 1.6, gen)
    high = soft(c.z + (30 if lesion.zone else 140), 70)
    cut = np.float32(0.85 - 0.55 * lesion.severity)
    share = np.clip((holes - cut) * 4, 0, 1) * c.lung * high * (c.hu < -650)  # vessels stay
    blend(c.hu, share * np.float32(0.9), np.float32(-985))


def _paint_nodule(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    box, share = cover(c, lesion.at, np.full(3, lesion.size_mm / 2))
    blend(c.hu[box], share, np.float32(lesion.hu))


def _blob(c: Canvas, lesion: Lesion, ragged: float) -> tuple[tuple[slice, slice, slice], Array]:
    """A region of aerated lung with an irregular edge."""
    r, at = lesion.size_mm / 2, lesion.at
    z, y, x = box = touched(c, np.array(at) - 1.4 * r, np.array(at) + 1.4 * r)
    distance = np.sqrt((c.x[:, :, x] - at[0]) ** 2 + (c.y[:, y] - at[1]) ** 2 + (c.z[z] - at[2]) ** 2)
    side = c.x[:, :, x] > 0 if at[0] > 0 else c.x[:, :, x] < 0
    return box, soft(r - distance + np.float32(ragged * r) * c.rough[box], 8) * c.lung[box] * side


def _paint_opacity(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    box, share = _blob(c, lesion, 0.45)
    c.hu[box] += share * np.maximum(np.float32(lesion.hu) - c.hu[box], 0)


def _paint_consolidation(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    box, share = _blob(c, lesion, 0.35)
    air = (
        np.random.default_rng(gen.integers(2**32)).random(share.shape, dtype=np.float32) < 0.08
    )  # air bronchograms
    c.hu[box] += share * np.maximum(np.float32(lesion.hu) - 350 * air - c.hu[box], 0)
    c.lung[box] *= 1 - share


def _paint_plate(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """A band 4-8 mm thick, just above the diaphragm and along it."""
    half = lesion.size_mm / 2
    x, y, _ = lesion.at
    j, i = np.abs(c.y.ravel() - y).argmin(), np.abs(c.x.ravel() - x).argmin()
    at = (x, y, float(_dome(c, b)[j, i]) + gen.uniform(10, 26))
    radii = (half, half * gen.uniform(0.6, 1.0), gen.uniform(2.6, 4.6))
    box, share = cover(c, at, radii, tilt=tuple(gen.uniform(-0.3, 0.3, 2)))
    blend(c.hu[box], share * c.lung[box], np.float32(lesion.hu))


def _paint_effusion(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Fluid that lies behind and below, and the lung it presses flat."""
    side = c.x > 0 if lesion.side == "right" else c.x < 0
    low = -0.95 * b["tb"] * taper(b, c.z)
    depth = (
        lesion.size_mm - (c.y - low) - np.float32(0.30) * (c.z - (min(b["dome_right"], b["dome_left"]) - 40))
    )
    share = soft(depth, c.step[1]) * side * c.lung
    rim = soft(depth + gen.uniform(3, 10), c.step[1]) * side * c.lung
    blend(c.hu, rim, np.float32(35))
    blend(c.hu, share, np.float32(lesion.hu))
    c.lung[:] *= 1 - rim


def _paint_hernia(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Stomach behind the heart: a wall, and gas over fluid or food."""
    r = lesion.size_mm / 2
    fill_ellipsoid(c, lesion.at, (r, 0.85 * r, r), 42)
    if lesion.severity > -0.2:
        x, y, z = lesion.at
        fill_ellipsoid(
            c, (x, y + 0.2 * r, z), (0.62 * r, 0.5 * r, 0.62 * r), -900 if lesion.severity > 0.35 else -60
        )


_PAINTERS: dict[
    str, Callable[[Canvas, Body, Lesion, Gen], None]
] = {  # in this order; the heart's are painted with the heart
    "Emphysema": _paint_emphysema,
    "Lung opacity": _paint_opacity,
    "Lung nodule": _paint_nodule,
    "Atelectasis": _paint_plate,
    "Hiatal hernia": _paint_hernia,
    "Consolidation": _paint_consolidation,
    "Pleural effusion": _paint_effusion,
    "Arterial wall calcification": _paint_calcium,
    "Coronary artery wall calcification": _paint_calcium,
}
