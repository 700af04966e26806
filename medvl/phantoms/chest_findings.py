"""Paint the findings of a chest case on a canvas that shows the healthy anatomy.

A painter draws from its generator as often for every view, so that what is painted after it stays the same.
"""

from collections.abc import Callable

import numpy as np

from medvl.phantoms.canvas import (
    Array,
    Box,
    Canvas,
    blend,
    bounding_box,
    cover_ellipsoid,
    fill_ellipsoid,
    smooth_noise,
    soft_edge,
)
from medvl.phantoms.chest_case import Body, Gen, Lesion, diaphragm_height, taper


def _paint_calcium(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """A rod from end to end of the plaque, as a row of balls that together have its volume."""
    start, end = np.array(lesion.at), np.array(lesion.to)
    radius = lesion.thick_mm / 2
    count = int(np.ceil(lesion.size_mm / radius)) + 1
    volume = np.pi * radius**2 * (lesion.size_mm + 4 / 3 * radius)
    # The balls overlap, so each adds the part of the contrast that its share of the volume is worth.
    ball = 4 / 3 * np.pi * radius**3
    part = np.float32(volume / count / ball * (lesion.hu - 60))  # over 60 HU, soft tissue
    for t in np.linspace(0, 1, count):
        box, share = cover_ellipsoid(c, start + t * (end - start), np.full(3, radius))
        c.hu[box] += share * part


def _paint_emphysema(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Holes of air of the lesion's size, in the upper lungs, or everywhere where it has no zone."""
    noise = smooth_noise((c.z, c.y, c.x), lesion.size_mm * 1.6, gen)
    lowest = -30 if lesion.zone else -140
    upper = soft_edge(c.z - lowest, 70)
    threshold = np.float32(0.85 - 0.55 * lesion.severity)
    is_tissue = c.hu < -650  # vessels stay
    holes = np.clip((noise - threshold) * 4, 0, 1)
    share = holes * c.lung * upper * is_tissue
    blend(c.hu, share * np.float32(0.9), np.float32(-985))


def _paint_nodule(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    box, share = cover_ellipsoid(c, lesion.at, np.full(3, lesion.size_mm / 2))
    blend(c.hu[box], share, np.float32(lesion.hu))


def _ragged_region(c: Canvas, lesion: Lesion, ragged: float) -> tuple[Box, Array]:
    """A box of voxels and the share of each that lies in a region of aerated lung with an irregular edge."""
    radius = lesion.size_mm / 2
    at = np.array(lesion.at)
    z, y, x = box = bounding_box(c, at - 1.4 * radius, at + 1.4 * radius)
    dx = c.x[:, :, x] - lesion.at[0]
    dy = c.y[:, y] - lesion.at[1]
    dz = c.z[z] - lesion.at[2]
    distance = np.sqrt(dx**2 + dy**2 + dz**2)
    edge = radius - distance + np.float32(ragged * radius) * c.rough[box]
    # It does not reach over into the other lung.
    same_side = c.x[:, :, x] > 0 if lesion.at[0] > 0 else c.x[:, :, x] < 0
    return box, soft_edge(edge, 8) * c.lung[box] * same_side


def _paint_opacity(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    box, share = _ragged_region(c, lesion, 0.45)
    # It only adds density: what is denser, such as vessels, stays.
    rise = np.maximum(np.float32(lesion.hu) - c.hu[box], 0)
    c.hu[box] += share * rise


def _paint_consolidation(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    box, share = _ragged_region(c, lesion, 0.35)
    # A generator of its own: how many numbers are drawn here depends on the view, what follows must not.
    voxels = np.random.default_rng(gen.integers(2**32))
    is_bronchogram = voxels.random(share.shape, dtype=np.float32) < 0.08
    value = np.float32(lesion.hu) - 350 * is_bronchogram  # air in bronchi
    c.hu[box] += share * np.maximum(value - c.hu[box], 0)
    c.lung[box] *= 1 - share


def _paint_atelectasis(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """A band 4-8 mm thick, just above the diaphragm and along it."""
    half = lesion.size_mm / 2
    x, y, _ = lesion.at
    # The height of the diaphragm in the column of voxels nearest to the lesion.
    row = np.abs(c.y.ravel() - y).argmin()
    column = np.abs(c.x.ravel() - x).argmin()
    diaphragm = float(diaphragm_height(b, c.x[0], c.y[0])[row, column])
    at = (x, y, diaphragm + gen.uniform(10, 26))
    radii = (half, half * gen.uniform(0.6, 1.0), gen.uniform(2.6, 4.6))
    box, share = cover_ellipsoid(c, at, radii, tilt=tuple(gen.uniform(-0.3, 0.3, 2)))
    blend(c.hu[box], share * c.lung[box], np.float32(lesion.hu))


def _paint_effusion(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Fluid that lies behind and below, with a rim of lung that it compresses."""
    side = c.x > 0 if lesion.side == "right" else c.x < 0
    back = -0.95 * b["tb"] * taper(b, c.z)
    bottom = min(b["dome_right"], b["dome_left"]) - 40
    # The patient lies on the back, so it lies behind; it is thinner further up.
    depth = lesion.size_mm - (c.y - back) - np.float32(0.30) * (c.z - bottom)
    fluid = soft_edge(depth, c.step[1]) * side * c.lung
    rim = soft_edge(depth + gen.uniform(3, 10), c.step[1]) * side * c.lung
    blend(c.hu, rim, np.float32(35))
    blend(c.hu, fluid, np.float32(lesion.hu))
    c.lung[:] *= 1 - rim


def _paint_hernia(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Stomach behind the heart: a wall, and gas over fluid or food."""
    r = lesion.size_mm / 2
    fill_ellipsoid(c, lesion.at, (r, 0.85 * r, r), 42)
    if lesion.severity > -0.2:
        x, y, z = lesion.at
        content = -900 if lesion.severity > 0.35 else -60  # gas, or fat
        fill_ellipsoid(c, (x, y + 0.2 * r, z), (0.62 * r, 0.5 * r, 0.62 * r), content)


# In the order of painting; an effusion of the pericardium and a large heart are painted with the heart.
PAINTERS: dict[str, Callable[[Canvas, Body, Lesion, Gen], None]] = {
    "Emphysema": _paint_emphysema,
    "Lung opacity": _paint_opacity,
    "Lung nodule": _paint_nodule,
    "Atelectasis": _paint_atelectasis,
    "Hiatal hernia": _paint_hernia,
    "Consolidation": _paint_consolidation,
    "Pleural effusion": _paint_effusion,
    "Arterial wall calcification": _paint_calcium,
    "Coronary artery wall calcification": _paint_calcium,
}
