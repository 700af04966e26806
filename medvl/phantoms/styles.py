"""Eight styles of drawn pictures, and two kinds of marks in each.

Lengths are shares of a side; x runs to the right, y downwards, both -0.5 to 0.5. Shapes, greys and colours
have no source: they were chosen by eye, so that one sees which modality a picture stands for.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from attrs import frozen

Array = np.ndarray


@frozen(kw_only=True)
class Scene:
    """A picture before its marks and its noise; grey [y, x, 1] or colour [y, x, 3], 0 to 255."""

    image: Array
    zone: Array  # bool [y, x]: where the centre of a mark may lie
    speckle: Array | float = 1.0  # multiplies the picture with its marks
    grain: float = 5.0  # standard deviation of the noise that is added last


@frozen(kw_only=True)
class Mark:
    """One kind of mark in one kind of picture."""

    bright: bool  # brighter than its surroundings
    sharp: bool
    colour: tuple[float, ...]
    rim: tuple[float, ...] = ()  # of a thin edge, none when empty


MARKS = {
    "ct": {
        "nodule": Mark(bright=True, sharp=True, colour=(225,)),
        "ground-glass opacity": Mark(bright=True, sharp=False, colour=(150,)),
    },
    "xray": {
        "nodule": Mark(bright=True, sharp=True, colour=(205,)),
        "infiltrate": Mark(bright=True, sharp=False, colour=(195,)),
    },
    "mri": {
        "tumour": Mark(bright=True, sharp=True, colour=(235,)),
        "oedema": Mark(bright=False, sharp=False, colour=(22,)),
    },
    "ultrasound": {
        "cyst": Mark(bright=False, sharp=True, colour=(6,), rim=(150,)),
        "solid mass": Mark(bright=True, sharp=False, colour=(215,)),
    },
    "histology": {
        "mitosis": Mark(bright=False, sharp=True, colour=(45, 18, 78)),
        "vacuole": Mark(bright=True, sharp=True, colour=(250, 243, 248), rim=(170, 95, 160)),
    },
    "fundus": {
        "haemorrhage": Mark(bright=False, sharp=False, colour=(75, 8, 8)),
        "exudate": Mark(bright=True, sharp=True, colour=(255, 238, 150)),
    },
    "dermoscopy": {
        "globule": Mark(bright=False, sharp=True, colour=(38, 24, 24)),
        "ulcer": Mark(bright=True, sharp=False, colour=(255, 178, 165)),
    },
    "endoscopy": {
        "polyp": Mark(bright=True, sharp=True, colour=(250, 150, 150), rim=(120, 30, 30)),
        "ulcer": Mark(bright=True, sharp=False, colour=(252, 238, 190)),
    },
}


def draw_scene(modality: str, size: int, gen: np.random.Generator) -> Scene:
    """An empty picture of this modality."""
    scene = _STYLES[modality](size, gen)
    # The light differs from picture to picture, and the colour cast of each channel.
    brightness = gen.uniform(0.9, 1.1)
    cast = gen.uniform(0.96, 1.04, scene.image.shape[2])
    gain = np.asarray(brightness * cast, np.float32)
    _, x = grid(size)
    return Scene(
        image=scene.image * gain,
        zone=scene.zone & (np.abs(x) > 0.11),  # no mark reaches over the middle
        speckle=scene.speckle,
        grain=scene.grain * gen.uniform(0.7, 1.4),
    )


def add_marks(scene: Scene, mark: Mark, places: Array, gen: np.random.Generator) -> Array:
    """A picture uint8 [y, x, 3] with marks at places [n, 3] (x, y, radius)."""
    n = len(scene.image)
    y, x = grid(n)
    image = scene.image
    bend = 1 + 0.07 * noise(n, 10, gen)  # outlines are uneven
    for mark_x, mark_y, radius in places.astype(np.float32):
        stretch = np.float32(gen.uniform(0.88, 1.14))  # an ellipse of the same area as the circle
        across = (x - mark_x) * stretch
        along = (y - mark_y) / stretch
        distance = np.hypot(across, along) * bend
        edge = 1.5 / n  # soft over one and a half pixels
        if mark.rim:  # a larger mark in the colour of the rim, under the mark itself
            rim = _inside(radius + 0.012 - distance, edge)
            image = _mix(image, rim, mark.rim)
        if mark.sharp:
            share = _inside(radius - distance, edge)
        else:  # fades out, flatter in the middle than a Gaussian
            relative = distance / radius
            share = 0.92 * np.exp(-(relative**3))
        image = _mix(image, share, mark.colour)
    grain = np.float32(scene.grain) * gen.standard_normal(image.shape, dtype=np.float32)
    image = image * scene.speckle + grain
    picture = np.clip(image, 0, 255).astype(np.uint8)
    return np.broadcast_to(picture, (n, n, 3))  # grey ones get three equal channels


@lru_cache
def grid(size: int) -> tuple[Array, Array]:
    """(y [y, 1], x [1, x]) of the pixels' centres, -0.5 to 0.5."""
    centres = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    return centres[:, None], centres[None]


def noise(size: int, cells: int, gen: np.random.Generator) -> Array:
    """Smooth noise [y, x], about unit normal at points a share 1 / cells apart."""
    weights = _noise_weights(size, cells)
    points = gen.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    return weights @ points @ weights.T


@lru_cache
def _noise_weights(size: int, cells: int) -> Array:
    """[size, cells + 1]: how much each point counts at each pixel. They are eased, so that no grid shows."""
    index = (np.arange(size) + 0.5) / size * cells
    distance = np.abs(index[:, None] - np.arange(cells + 1))  # in cells
    weights = np.clip(1 - distance, 0, 1)  # only the two nearest points count
    eased = weights * weights * (3 - 2 * weights)  # smoothstep: level at both ends
    return eased.astype(np.float32)


def _inside(distance: Array, width: float = 0.015) -> Array:
    """The share inside an edge at this distance (positive inside), soft over `width`."""
    return np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)


def _oval(x: Array, y: Array, a: float, b: float, width: float = 0.02) -> Array:
    """The share [y, x] inside an ellipse around 0 with half axes a and b."""
    radius = np.hypot(x / np.float32(a), y / np.float32(b))  # 1 on the edge
    return _inside((1 - radius) * min(a, b), width)


def _mix(image: Array, share: Array, value: Array | float | tuple[float, ...]) -> Array:
    """A colour image [y, x, c] with a share [y, x] of each pixel replaced."""
    return image + share[..., None] * (np.asarray(value, np.float32) - image)


def _mix_grey(image: Array | float, share: Array, value: Array | float) -> Array:
    """A grey image [y, x] with a share [y, x] of each pixel replaced."""
    return image + share * (value - image)


def _shifted_grid(n: int, gen: np.random.Generator, dx: float, dy: float) -> tuple[Array, Array]:
    """x and y of the pixels' centres, shifted at random by up to dx and dy."""
    y, x = grid(n)
    x = x - np.float32(gen.uniform(-dx, dx))
    y = y - np.float32(gen.uniform(-dy, dy))
    return x, y


# Each of the eight returns its scene, painted from back to front. Random numbers are drawn in the order of
# the lines: an order that changes makes other pictures. A zone keeps a mark's radius away from all organs but
# the one that the marks are in.
def _ct(n: int, gen: np.random.Generator) -> Scene:
    """An axial slice of the chest in the lung window."""
    x, y = _shifted_grid(n, gen, 0.02, 0.025)
    image = _draw_chest_wall(x, y, gen)
    # Lungs, with vessels where a fine noise is high.
    lung_width = gen.uniform(0.155, 0.17)
    lung_height = gen.uniform(0.25, 0.28)
    tissue = 32 + 10 * noise(n, 8, gen)
    fine = noise(n, 30, gen)
    tissue = tissue + 45 * _inside(fine - 1.5, 0.8)
    zone = np.zeros((n, n), bool)
    for side in (-1, 1):
        lung_x = x - side * np.float32(0.215)
        lung_y = y + 0.01 + 0.25 * (np.abs(x) - 0.2)  # slanted along the chest wall
        lung = _oval(lung_x, lung_y, lung_width, lung_height)
        image = _mix_grey(image, lung, tissue)
        within_lung = _oval(lung_x, lung_y, lung_width - 0.05, lung_height - 0.055)
        zone |= within_lung > 0.5
    # Heart, aorta, vertebra and spinal canal.
    heart_x = x - np.float32(gen.uniform(0.03, 0.05))
    heart_y = y + np.float32(gen.uniform(0.08, 0.12))
    heart = _oval(heart_x, heart_y, 0.12, 0.11)
    image = _mix_grey(image, heart, 150)
    aorta = _oval(x - 0.05, y - 0.11, 0.035, 0.035)
    image = _mix_grey(image, aorta, 160)
    vertebra = _oval(x, y - 0.2, 0.065, 0.06)
    image = _mix_grey(image, vertebra, 225)
    canal = _oval(x, y - 0.275, 0.022, 0.022)
    image = _mix_grey(image, canal, 120)
    from_table = np.abs(y - 0.44 - 0.3 * x * x)
    table = _inside(0.012 - from_table, 0.012) * (np.abs(x) < 0.4)
    image = _mix_grey(image, table, 90)
    near_heart = _oval(heart_x, heart_y, 0.18, 0.17)
    near_spine = _oval(x, y - 0.2, 0.14, 0.14)
    beside_middle = np.abs(x) > 0.15
    zone = zone & ~(near_heart + near_spine >= 0.5) & beside_middle
    return Scene(image=image[..., None], zone=zone, grain=7)


def _draw_chest_wall(x: Array, y: Array, gen: np.random.Generator) -> Array:
    """A grey slice [y, x] of fat, muscle and ribs, as if it had no lungs."""
    n = x.shape[1]
    half_width = gen.uniform(0.455, 0.485)
    half_height = gen.uniform(0.37, 0.42)
    image = _oval(x, y, half_width, half_height) * np.float32(85)  # fat
    muscle_grey = 128 + 7 * noise(n, 12, gen)
    muscle = _oval(x, y, half_width - 0.035, half_height - 0.03)
    image = _mix_grey(image, muscle, muscle_grey)
    # Ribs, cut across: 14 pieces of a ring in the wall.
    across = x / half_width
    along = y / half_height
    angle = np.arctan2(along, across)
    phase = np.cos(angle * 14 + gen.uniform(0, 6))
    from_ring = np.abs(np.hypot(across, along) - 0.88) * half_height
    ring = _inside(0.022 - from_ring, 0.02)
    ribs = ring * _inside(phase - 0.35, 0.4)
    return _mix_grey(image, ribs, 215)


def _xray(n: int, gen: np.random.Generator) -> Scene:
    """A chest radiograph from the front: what absorbs more is brighter."""
    x, y = _shifted_grid(n, gen, 0.02, 0.02)
    shoulders = 0.5 * np.clip(-0.28 - y, 0, 1)
    outside = np.abs(x) - 0.46 - shoulders  # of the body; the shoulders are wider
    soft_tissue = 150 + 25 * y + 6 * noise(n, 5, gen)
    image = soft_tissue - 110 * _inside(outside, 0.1)
    # Lungs, cut off by the diaphragm.
    lung_width = gen.uniform(0.165, 0.185)
    lung_height = gen.uniform(0.36, 0.4)
    zone = np.zeros((n, n), bool)
    lungs = np.zeros((n, n), np.float32)
    for side in (-1, 1):
        lung_x = x - side * np.float32(0.215) - side * 0.12 * y  # apart below, together above
        lung_y = y - 0.01
        lung = _oval(lung_x, lung_y, lung_width, lung_height, 0.04)
        lungs = np.maximum(lungs, lung)
        within_lung = _oval(lung_x, lung_y, lung_width - 0.055, lung_height - 0.08)
        zone |= within_lung > 0.5
    diaphragm = 0.27 + gen.uniform(-0.02, 0.02) + 1.6 * (np.abs(x) - 0.2) ** 2  # y of two domes
    lungs = lungs * _inside(diaphragm - y, 0.03)
    hila = 30 * np.exp(-((x / 0.16) ** 2))  # vessels make the lungs denser towards the middle
    aerated = 62 + 8 * noise(n, 9, gen) + hila
    image = _mix_grey(image, lungs, aerated)
    image = _add_ribs_and_spine(image, lungs, x, y, gen)
    # On the right of the picture: the patient faces the viewer.
    heart_x = x - np.float32(gen.uniform(0.05, 0.075))
    heart_y = y - np.float32(gen.uniform(0.15, 0.19))
    heart = _oval(heart_x, heart_y, 0.15, 0.14, 0.05)
    image = _mix_grey(image, heart, 188)
    off_heart = _oval(heart_x, heart_y, 0.215, 0.205) < 0.5
    above_diaphragm = y < diaphragm - 0.07
    zone = zone & off_heart & above_diaphragm
    return Scene(image=image[..., None], zone=zone, grain=5)


def _add_ribs_and_spine(image: Array, lungs: Array, x: Array, y: Array, gen: np.random.Generator) -> Array:
    """A radiograph [y, x] with ribs over the lungs, clavicles and spine."""
    # Ribs are waves along a bent and slanted y.
    slant = y + 1.3 * (np.abs(x) - 0.13) ** 2 - 0.3 * np.abs(x)
    ribs_per_side = gen.uniform(10, 12)
    phase = gen.uniform(0, 6)
    waves = np.sin(slant * 2 * np.pi * ribs_per_side + phase)
    image = image + 24 * _inside(waves - 0.35, 0.7) * lungs
    from_clavicle = np.abs(y + 0.36 + 0.18 * np.abs(x))
    clavicles = _inside(0.022 - from_clavicle, 0.02) * _inside(0.36 - np.abs(x), 0.05)
    image = _mix_grey(image, clavicles, image + 30)
    spine = _inside(0.055 - np.abs(x), 0.04) * 0.8
    vertebrae = 178 + 14 * np.sin(y * 2 * np.pi * 14)
    return _mix_grey(image, spine, vertebrae)


def _mri(n: int, gen: np.random.Generator) -> Scene:
    """An axial slice of the head."""
    return draw_head(n, gen, _MRI_GREYS)


_MRI_GREYS = {"scalp": 185, "skull": 18, "cortex": 92, "sulci": 44, "white": 136, "fissure": 45, "fluid": 25}


def draw_head(n: int, gen: np.random.Generator, greys: Mapping[str, Any]) -> Scene:
    """An axial slice of the head: rings from scalp to white matter, then the ventricles.

    Args:
        greys: of each tissue, a number or float32 [look, 1, 1]: one anatomy in several looks, [look, y, x].
    """
    x, y = _shifted_grid(n, gen, 0.02, 0.02)
    tilt = np.float32(gen.uniform(-0.08, 0.08))
    x = x + tilt * y
    half_width = gen.uniform(0.37, 0.41)
    half_height = gen.uniform(0.43, 0.47)
    image = _mix_grey(0.0, _oval(x, y, half_width, half_height), greys["scalp"])
    skull = _oval(x, y, half_width - 0.03, half_height - 0.03)
    image = _mix_grey(image, skull, greys["skull"])
    # Sulci between the gyri, along the lines where a noise is 0.
    sulci = _inside(0.12 - np.abs(noise(n, 16, gen)), 0.2)
    cortex = _mix_grey(greys["cortex"], sulci, greys["sulci"])
    brain = _oval(x, y, half_width - 0.055, half_height - 0.055)
    image = _mix_grey(image, brain, cortex)
    # White matter: noise moves its border, but nothing far inside or outside of it.
    inner = _oval(x, y, half_width - 0.115, half_height - 0.115, 0.05)
    on_border = (inner > 0) * (inner < 1)
    unevenness = 0.35 * noise(n, 14, gen) * on_border
    white_matter = np.clip(inner + unevenness, 0, 1)
    image = _mix_grey(image, white_matter, greys["white"] + 6 * noise(n, 8, gen))
    along_brain = _oval(x, y, half_width - 0.06, half_height - 0.06)
    fissure = _inside(0.006 - np.abs(x), 0.012) * along_brain
    image = _mix_grey(image, fissure, greys["fissure"])
    size = gen.uniform(0.8, 1.25)
    for side in (-1, 1):
        ventricle_x = x - side * (0.035 + 1.2 * (y + 0.01) ** 2)  # both bend outwards at their ends
        ventricle = _oval(ventricle_x, y + 0.01, 0.026 * size, 0.12 * size)
        image = _mix_grey(image, ventricle, greys["fluid"])
    within_brain = _oval(x, y, half_width - 0.13, half_height - 0.13) > 0.5
    beside_ventricles = np.abs(x) > 0.14
    return Scene(image=image[..., None], zone=within_brain & beside_ventricles, grain=6)


def _ultrasound(n: int, gen: np.random.Generator) -> Scene:
    """A fan with speckle."""
    y, x = grid(n)
    # The probe is above the picture: distance and angle from it are the fan's own coordinates.
    x = x - np.float32(gen.uniform(-0.02, 0.02))
    y = y + np.float32(gen.uniform(0.56, 0.6))
    depth = np.hypot(x, y)
    angle = np.abs(np.arctan2(x, y))
    half_angle = gen.uniform(0.62, 0.7)  # of the fan
    within_angle = _inside((half_angle - angle) * depth)
    fan = within_angle * _inside(depth - 0.13) * _inside(1.04 - depth)
    # Layers of tissue lie across the beam.
    num_layers = gen.uniform(4, 7)
    bend = 1.2 * noise(n, 4, gen)
    phase = gen.uniform(0, 6)
    layers = np.sin(depth * 2 * np.pi * num_layers + bend + phase)
    attenuation = 1.15 - 0.45 * depth  # echoes get weaker with depth
    tissue = (78 + 14 * layers + 16 * noise(n, 6, gen)) * attenuation
    from_skin = (depth - 0.16) / 0.03
    skin = 70 * np.exp(-(from_skin**2))
    image = tissue + skin
    # Speckle multiplies the picture: echoes of many scatterers that add up or cancel.
    coarse = 0.26 * noise(n, 50, gen)
    fine = 0.16 * gen.standard_normal((n, n), dtype=np.float32)
    speckle = np.exp(coarse + fine) * fan
    in_fan = (angle < half_angle - 0.15) & (depth > 0.42) & (depth < 0.94)
    zone = in_fan & (np.abs(x) < 0.4)
    return Scene(image=image[..., None], zone=zone, speckle=speckle[..., None], grain=2)


def _histology(n: int, gen: np.random.Generator) -> Scene:
    """A section in haematoxylin and eosin: stroma with fibres, and nuclei."""
    y, x = grid(n)
    # Where the stain is thicker, green changes most.
    by_channel = np.array([0.5, 1.4, 0.8], np.float32)
    stain = 9 * noise(n, 9, gen)[..., None] * by_channel
    tissue = np.array([228, 168, 200], np.float32) + stain
    slope = np.float32(gen.uniform(-1, 1))
    bend = 3 * noise(n, 5, gen)
    fibres = np.sin((x * slope + y) * 60 + bend)
    stroma = _inside(noise(n, 4, gen) - 0.4, 0.6)  # islands of it
    share = 0.5 * stroma * (0.7 + 0.3 * fibres)
    image = _mix(tissue, share, (236, 140, 172))
    nuclei = _draw_nuclei(n, gen)
    chromatin = np.array([128, 78, 160], np.float32) + 12 * noise(n, 40, gen)[..., None]
    image = _mix(image, 0.85 * nuclei, chromatin)
    zone = (np.abs(x) < 0.41) & (np.abs(y) < 0.41)
    return Scene(image=image, zone=zone, grain=4)


def _draw_nuclei(n: int, gen: np.random.Generator) -> Array:
    """The share [y, x] of nuclei: one in each square of a grid of 9 to 11, off its centre."""
    y, x = grid(n)
    cells = int(gen.uniform(9, 12))
    # One row and one column more at each side: half of their nuclei reach into the picture.
    jitter = gen.uniform(-0.4, 0.4, (2, cells + 2, cells + 2)).astype(np.float32)
    radius = gen.uniform(0.12, 0.3, (cells + 2, cells + 2)).astype(np.float32)
    cell_y = (y + 0.5) * cells + 0.5
    cell_x = (x + 0.5) * cells + 0.5
    row = cell_y.astype(int)
    column = cell_x.astype(int)
    inside = np.full((n, n), -1, np.float32)
    # A pixel is near four centres only, as no nucleus reaches over the middle of the next square.
    for dy, dx in np.ndindex(2, 2):
        j = row + dy
        i = column + dx
        offset_y = cell_y - j - jitter[0, j, i]
        offset_x = cell_x - i - jitter[1, j, i]
        distance = np.sqrt(offset_y**2 + 1.3 * offset_x**2)  # a little taller than wide
        inside = np.maximum(inside, radius[j, i] - distance)
    return _inside(inside / cells, 0.014)


def _fundus(n: int, gen: np.random.Generator) -> Scene:
    """Always a right eye: its disc, and with it the nose, is on the right of the picture."""
    x, y = _shifted_grid(n, gen, 0.012, 0.012)
    r = np.hypot(x, y)
    from_macula = np.hypot(x + 0.06, y)
    macula = np.exp(-((from_macula / 0.07) ** 2))  # dark
    shade = 1.08 - 1.3 * r * r + 0.05 * noise(n, 6, gen) - 0.3 * macula
    green = 104 + gen.uniform(-10, 12)
    blue = 44 + gen.uniform(-8, 10)
    retina = np.array([214, green, blue], np.float32)
    image = shade[..., None] * retina
    disc_x = gen.uniform(0.27, 0.31)
    disc_y = gen.uniform(-0.03, 0.03)
    image = _add_retinal_vessels(image, x, y, (disc_x, disc_y), gen)
    # The disc with its brighter cup, over the vessels' roots.
    from_disc_x = x - np.float32(disc_x)
    from_disc_y = y - np.float32(disc_y)
    disc = _oval(from_disc_x, from_disc_y, 0.07, 0.08, 0.025)
    image = _mix(image, disc, (244, 190, 118))
    cup = 0.8 * _oval(from_disc_x, from_disc_y, 0.03, 0.035, 0.02)
    image = _mix(image, cup, (255, 226, 170))
    image = image * _inside(0.475 - r)[..., None]  # a round picture
    from_disc = np.hypot(x - disc_x, y - disc_y)
    zone = (r < 0.4) & (from_disc > 0.165)
    return Scene(image=image, zone=zone, grain=4)


def _add_retinal_vessels(
    image: Array, x: Array, y: Array, disc: tuple[float, float], gen: np.random.Generator
) -> Array:
    """The retina [y, x, 3] with six vessels that leave the disc at (x, y) and bend up or down."""
    disc_x, disc_y = disc
    along = np.abs(x - np.float32(disc_x)) + 1e-3  # not 0: the slope divides by its root
    bends = (0.66, -0.66, 0.42, -0.42, 0.9, -0.9)
    widths = (0.011, 0.011, 0.007, 0.007, 0.006, 0.006)
    for bend, width in zip(bends, widths, strict=True):
        curve = bend * gen.uniform(0.85, 1.15)
        frequency = gen.uniform(20, 35)
        phase = gen.uniform(0, 6)
        wave = np.sin(along * frequency + phase)
        path = curve * np.sqrt(along) + 0.025 * wave * np.minimum(along * 8, 1)
        # From the vertical distance to that across the vessel, by the slope of its path.
        slope = 0.5 * curve / np.sqrt(along)
        distance = np.abs(y - disc_y - path) / np.sqrt(1 + slope * slope)
        half_width = width * (1.1 - along)  # thinner away from the disc
        vessel = _inside(half_width - distance, 0.01)
        image = _mix(image, 0.75 * vessel, (128, 28, 18))
    return image


def _dermoscopy(n: int, gen: np.random.Generator) -> Scene:
    """A naevus on skin, with hairs."""
    y, x = grid(n)
    texture = 9 * noise(n, 7, gen)
    texture = texture + 5 * noise(n, 30, gen)
    image = np.array([222, 176, 150], np.float32) + texture[..., None]  # skin
    naevus_x, naevus_y = _shifted_grid(n, gen, 0.02, 0.02)
    half_width = gen.uniform(0.39, 0.44)
    half_height = gen.uniform(0.36, 0.42)
    across = naevus_x / np.float32(half_width)
    along = naevus_y / np.float32(half_height)
    inside = (1 - np.hypot(across, along)) + 0.08 * noise(n, 7, gen)  # with an uneven border
    network = np.abs(noise(n, 22, gen))
    texture = 14 * noise(n, 6, gen) + 14 * (network - 0.8)
    pigment = np.array([142, 92, 64], np.float32) + texture[..., None]
    image = _mix(image, 0.95 * _inside(inside, 0.16), pigment)
    for _ in range(int(gen.integers(3, 8))):
        hair = _draw_hair(x, y, gen)
        image = _mix(image, hair, (64, 44, 38))
    r = np.hypot(x, y)
    light = 1.04 - 0.9 * np.clip(r - 0.35, 0, 1)  # falls off in the corners
    image = image * light[..., None]
    zone = _oval(naevus_x, naevus_y, half_width - 0.08, half_height - 0.08) > 0.5
    return Scene(image=image, zone=zone, grain=4)


def _draw_hair(x: Array, y: Array, gen: np.random.Generator) -> Array:
    """The share [y, x] of one hair: a parabola in any direction that starts and ends somewhere on its way."""
    angle = gen.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    place = gen.uniform(-0.45, 0.45)
    curvature = gen.uniform(-0.8, 0.8)
    from_hair = np.abs(across - place - curvature * along * along)
    hair = _inside(0.005 - from_hair, 0.008)
    half_length = gen.uniform(0.2, 0.5)
    middle = gen.uniform(-0.3, 0.3)
    from_middle = np.abs(along - middle)
    return 0.8 * hair * _inside(half_length - from_middle, 0.02)


def _endoscopy(n: int, gen: np.random.Generator) -> Scene:
    """The lumen of the bowel with its folds, and reflections of the light."""
    y, x = grid(n)
    lumen_x, lumen_y = _shifted_grid(n, gen, 0.05, 0.06)
    from_lumen = np.hypot(lumen_x, lumen_y)
    r = from_lumen * (1 + 0.08 * noise(n, 4, gen)) + 1e-3  # uneven, and not 0: it has a logarithm
    angle = np.arctan2(lumen_y, lumen_x)
    # Rings in the logarithm of the radius look equally far apart in depth; each is bent at three places.
    rings_per_unit = gen.uniform(1.6, 2.2)
    first = gen.uniform(0, 1)
    rings = rings_per_unit * np.log(r) + first
    bend = 0.5 * np.cos(3 * angle + gen.uniform(0, 6))
    folds = np.sin(2 * np.pi * rings + bend)
    # Dark in the depth of the lumen, where no folds are seen either.
    fall_off = np.clip(0.22 + 2.6 * r, 0, 0.92)
    visible_folds = 0.12 * folds * _inside(r - 0.12, 0.1)
    light = fall_off * (1 + visible_folds)
    light = light + 0.04 * noise(n, 12, gen)
    green = 98 + gen.uniform(-10, 12)
    blue = 88 + gen.uniform(-10, 12)
    mucosa = np.array([212, green, blue], np.float32)
    image = np.clip(light, 0, 1.2)[..., None] * mucosa
    # Vessels along the lines where a noise is 0.
    vessels = 0.3 * _inside(0.06 - np.abs(noise(n, 9, gen)), 0.05)
    vessel_colour = image * np.array([0.8, 0.5, 0.5], np.float32)
    image = _mix(image, vessels, vessel_colour)
    reflections = _draw_reflections(n, gen)
    image = _mix(image, 0.9 * reflections, (255, 246, 240))
    # The picture is a square with cut corners.
    square = _inside(0.485 - np.maximum(np.abs(x), np.abs(y)))
    corners = _inside(0.64 - np.abs(x) - np.abs(y))
    image = image * (square * corners)[..., None]
    beside_lumen = from_lumen > 0.15
    in_picture = (np.hypot(x, y) < 0.38) & (np.abs(x) + np.abs(y) < 0.54)
    return Scene(image=image, zone=beside_lumen & in_picture, grain=4)


def _draw_reflections(n: int, gen: np.random.Generator) -> Array:
    """The share [y, x] of four to eight wet spots that reflect the light."""
    y, x = grid(n)
    count = int(gen.integers(4, 9))
    lowest = (-0.4, -0.4, 0.008)  # x, y, size
    highest = (0.4, 0.4, 0.02)
    spots = gen.uniform(lowest, highest, (count, 3)).astype(np.float32)
    reflections = np.zeros((n, n), np.float32)
    for spot_x, spot_y, size in spots:
        spot = _oval(x - spot_x, y - spot_y, 1.6 * size, 0.8 * size)
        reflections = np.maximum(reflections, spot)
    return reflections


_STYLES: dict[str, Callable[[int, np.random.Generator], Scene]] = {
    "ct": _ct,
    "xray": _xray,
    "mri": _mri,
    "ultrasound": _ultrasound,
    "histology": _histology,
    "fundus": _fundus,
    "dermoscopy": _dermoscopy,
    "endoscopy": _endoscopy,
}
