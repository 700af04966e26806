"""Paint the findings of a chest case on a canvas that shows the healthy anatomy.

A painter draws from its generator as often for every view, so that what is painted after it stays the same.
Places and sizes are those of the lesion, in mm; how ragged, thick or dense its edges are was chosen by eye.
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
    offsets_from,
    smooth_noise,
    soft_edge,
)
from medvl.phantoms.chest_case import Body, Gen, Lesion, diaphragm_height, taper


def _paint_calcium(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """A rod from end to end of the plaque, as a row of balls that together have its volume."""
    start = np.array(lesion.at)
    end = np.array(lesion.to)
    radius = lesion.thick_mm / 2
    num_balls = int(np.ceil(lesion.size_mm / radius)) + 1
    rod_mm3 = np.pi * radius**2 * (lesion.size_mm + 4 / 3 * radius)  # a cylinder and two half balls
    ball_mm3 = 4 / 3 * np.pi * radius**3
    # The balls overlap, so each adds the part of the contrast that its share of the volume is worth.
    contrast = lesion.hu - 60  # over soft tissue
    contrast_of_ball = np.float32(rod_mm3 / num_balls / ball_mm3 * contrast)
    radii = np.full(3, radius)
    for t in np.linspace(0, 1, num_balls):
        centre = start + t * (end - start)
        box, share = cover_ellipsoid(c, centre, radii)
        c.hu[box] += share * contrast_of_ball


def _paint_emphysema(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Holes of air of the lesion's size, in the upper lungs, or everywhere where it has no zone."""
    noise = smooth_noise((c.z, c.y, c.x), lesion.size_mm * 1.6, gen)
    # A hole is where the noise is high; a severe emphysema has a lower threshold, so more and larger ones.
    threshold = np.float32(0.85 - 0.55 * lesion.severity)
    holes = np.clip((noise - threshold) * 4, 0, 1)
    # From this height upwards, fading in over 70 mm; -140 is below the lungs.
    lowest = -30 if lesion.zone else -140
    in_zone = soft_edge(c.z - lowest, 70)
    is_tissue = c.hu < -650  # vessels stay
    share = holes * c.lung * in_zone * is_tissue
    blend(c.hu, share * np.float32(0.9), np.float32(-985))


def _paint_nodule(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """A ball."""
    radii = np.full(3, lesion.size_mm / 2)
    box, share = cover_ellipsoid(c, lesion.at, radii)
    blend(c.hu[box], share, np.float32(lesion.hu))


def _ragged_region(c: Canvas, lesion: Lesion, ragged: float) -> tuple[Box, Array]:
    """A box of voxels and the share of each that lies in a region of aerated lung with an irregular edge.

    Args:
        ragged: how far the edge wanders from a ball where `c.rough` is 1, as a share of its radius.
    """
    radius = lesion.size_mm / 2
    centre = np.array(lesion.at)
    reach = 1.4 * radius  # the edge is cut where it wanders further
    box = bounding_box(c, centre - reach, centre + reach)
    dx, dy, dz = offsets_from(c, box, lesion.at)
    distance_mm = np.sqrt(dx**2 + dy**2 + dz**2)
    inside_mm = radius - distance_mm + np.float32(ragged * radius) * c.rough[box]
    # It does not reach over into the other lung.
    _, _, x = box
    same_side = c.x[:, :, x] > 0 if lesion.at[0] > 0 else c.x[:, :, x] < 0
    share = soft_edge(inside_mm, 8) * c.lung[box] * same_side
    return box, share


def _paint_opacity(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Ground glass: lung that is denser, through which vessels show."""
    box, share = _ragged_region(c, lesion, 0.45)
    # It only adds density: what is denser, such as vessels, stays.
    rise = np.maximum(np.float32(lesion.hu) - c.hu[box], 0)
    c.hu[box] += share * rise


def _paint_consolidation(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Lung filled with fluid, which looks like soft tissue, with air left in some bronchi."""
    box, share = _ragged_region(c, lesion, 0.35)
    # A generator of its own: how many numbers are drawn here depends on the view, what follows must not.
    voxels = np.random.default_rng(gen.integers(2**32))
    is_bronchogram = voxels.random(share.shape, dtype=np.float32) < 0.08
    value = np.float32(lesion.hu) - 350 * is_bronchogram  # a bronchus fills a part of its voxel
    rise = np.maximum(value - c.hu[box], 0)
    c.hu[box] += share * rise
    c.lung[box] *= 1 - share


def _paint_atelectasis(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """A band 5-9 mm thick, just above the diaphragm and along it."""
    x, y, _ = lesion.at
    # The height of the diaphragm in the column of voxels nearest to the lesion.
    row = np.abs(c.y.ravel() - y).argmin()
    column = np.abs(c.x.ravel() - x).argmin()
    heights = diaphragm_height(b, c.x[0], c.y[0])  # [y, x]
    diaphragm = float(heights[row, column])
    centre = (x, y, diaphragm + gen.uniform(10, 26))
    # A flat ellipsoid: its length is that of the lesion, its third radius half the thickness.
    half_length = lesion.size_mm / 2
    half_breadth = half_length * gen.uniform(0.6, 1.0)
    half_thickness = gen.uniform(2.6, 4.6)
    tilt = tuple(gen.uniform(-0.3, 0.3, 2))
    box, share = cover_ellipsoid(c, centre, (half_length, half_breadth, half_thickness), tilt)
    blend(c.hu[box], share * c.lung[box], np.float32(lesion.hu))


def _paint_effusion(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Fluid that lies behind and below, with a rim of lung that it compresses."""
    same_side = c.x > 0 if lesion.side == "right" else c.x < 0
    back = -0.95 * b.chest_half_depth * taper(b, c.z)  # y of the wall behind the lungs, [z, 1, 1]
    bottom = min(b.dome_right, b.dome_left) - 40  # z
    # The patient lies on the back, so the fluid lies behind; its surface is 0.3 mm lower for each mm upwards.
    from_back = c.y - back
    thinning = np.float32(0.30) * (c.z - bottom)
    under_surface = lesion.size_mm - from_back - thinning
    rim_mm = gen.uniform(3, 10)
    fluid = soft_edge(under_surface, c.step[1]) * same_side * c.lung
    fluid_and_rim = soft_edge(under_surface + rim_mm, c.step[1]) * same_side * c.lung
    blend(c.hu, fluid_and_rim, np.float32(35))  # compressed lung, without air
    blend(c.hu, fluid, np.float32(lesion.hu))
    c.lung[:] *= 1 - fluid_and_rim


def _paint_hernia(c: Canvas, b: Body, lesion: Lesion, gen: Gen) -> None:
    """Stomach behind the heart: a wall, and gas over fluid or food."""
    radius = lesion.size_mm / 2
    fill_ellipsoid(c, lesion.at, (radius, 0.85 * radius, radius), 42)  # wall and food, as muscle
    if lesion.severity > -0.2:
        # Gas and fat are lighter than food: they collect in front, as the patient lies on the back.
        x, y, z = lesion.at
        in_front = (x, y + 0.2 * radius, z)
        content_radii = (0.62 * radius, 0.5 * radius, 0.62 * radius)
        content_hu = -900 if lesion.severity > 0.35 else -60  # gas, or fat
        fill_ellipsoid(c, in_front, content_radii, content_hu)


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
