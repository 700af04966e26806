"""Draw a chest case as CT voxels.

Every object has its true size in mm: one that is smaller than a voxel fills only a share of it. Dims: z y x
voxel axes, n points. Arrays are [z, y, x] in RAS+ until they are stored. The order of the random draws is
part of the data: changing it changes every volume.
"""

from itertools import pairwise

import numpy as np
from attrs import frozen
from nibabel import orientations

from medvl.phantoms.canvas import (
    Array,
    Canvas,
    blend,
    fill_ellipsoid,
    fill_rod,
    oval_distance,
    paint_columns,
    smooth_noise,
    soft_edge,
    splat,
)
from medvl.phantoms.chest_case import (
    Body,
    ChestCase,
    Gen,
    PhantomConfig,
    aorta_path,
    diaphragm_height,
    heart_shape,
    taper,
)
from medvl.phantoms.chest_findings import PAINTERS


@frozen(kw_only=True)
class DrawnVolume:
    """A drawn volume in the orientation of its file."""

    hu: Array  # int16 [x, y, z]
    affine: Array  # [4, 4], voxel index -> mm in RAS+
    kernel: str


@frozen(kw_only=True)
class View:
    """How a scan is acquired and stored; independent of the case."""

    shape: tuple[int, int, int]  # z y x
    step: tuple[float, float, float]  # mm, z y x
    origin: tuple[float, float, float]  # centre of the first voxel in mm, z y x
    axes: str  # stored orientation, e.g. "LPS"
    kernel: str  # "soft", "standard" or "sharp"
    noise: float  # HU


def render(cfg: PhantomConfig, case: ChestCase, gen: Gen) -> DrawnVolume:
    """Draw the case as one scanner would see it: `gen` gives view and noise, the case alone its anatomy."""
    view = draw_view(cfg, gen)
    anatomy = np.random.default_rng(case.texture)
    c = _blank_canvas(view, anatomy)
    # From outside in: what is painted later displaces what was there.
    _paint_body(c, case, anatomy)
    _paint_lungs(c, case.body, anatomy)
    _paint_skeleton(c, case.body, anatomy)
    _paint_mediastinum(c, case, anatomy)
    for name, painter in PAINTERS.items():
        for lesion in case.findings.get(name, ()):
            painter(c, case.body, lesion, anatomy)
    hu = np.rint(_add_noise(c.hu, view, gen))
    hu = np.clip(hu, -1024, 3071).astype(np.int16)
    return _reorient(hu, view)


def draw_view(cfg: PhantomConfig, gen: Gen) -> View:
    """The first draws of `gen` in `render`: a volume's metadata needs them without the volume."""
    n = int(gen.integers(cfg.columns[0], cfg.columns[1] + 1))
    nz = int(gen.integers(cfg.slices[0], cfg.slices[1] + 1))
    fov = gen.uniform(330, 420)  # mm, in the plane
    low = gen.uniform(-172, -156)  # mm, of the first and the last slice
    high = gen.uniform(134, 150)
    # Rounded to what the metadata prints, so that tables and voxels agree.
    thickness = round((high - low) / nz, 3)
    pixel = round(fov / n, 4)
    step = (thickness, pixel, pixel)
    # The patient does not lie quite in the middle.
    y = -fov / 2 + gen.uniform(-12, 6)
    x = -fov / 2 + gen.uniform(-9, 9)
    axes = ("LPS", "RAS", "LAS", "RPS", "PSR", "LPI")[gen.choice(6, p=(0.4, 0.2, 0.1, 0.1, 0.1, 0.1))]
    kernel = ("soft", "standard", "sharp")[gen.integers(3)]
    noise = float(gen.uniform(8, 26))
    return View(shape=(nz, n, n), step=step, origin=(low, y, x), axes=axes, kernel=kernel, noise=noise)


def _blank_canvas(view: View, gen: Gen) -> Canvas:
    places = []
    for first, step, n in zip(view.origin, view.step, view.shape, strict=True):
        places.append(np.arange(n, dtype=np.float32) * step + first)
    z, y, x = places
    return Canvas(
        hu=np.zeros(view.shape, np.float32),
        lung=np.zeros(view.shape, np.float32),
        z=z[:, None, None],
        y=y[None, :, None],
        x=x[None, None, :],
        step=view.step,
        rough=1.8 * smooth_noise((z, y, x), 16, gen),
    )


def _paint_body(c: Canvas, case: ChestCase, gen: Gen) -> None:
    """Air, table, skin and fat, muscle, chest, and the organs under the diaphragm."""
    b = case.body
    pixel = c.step[1]
    # What is the same at every height is painted once, on one slice.
    flat = np.full((c.hu.shape[1], c.hu.shape[2]), -1000, np.float32)
    # The table is a curved sheet of 8 mm behind the back.
    top = -b["b"] - gen.uniform(6, 14)
    table = top + (c.x[0] / gen.uniform(600, 1200)) * c.x[0]
    share = soft_edge(4 - np.abs(c.y[0] - table), pixel) * (np.abs(c.x[0]) < 205)
    blend(flat, share, gen.uniform(-300, 100))
    if case.sex == "F":
        for sign in (-1, 1):
            centre = (sign * 0.45 * b["a"], 0.86 * b["b"])
            breast = oval_distance(c, centre, gen.uniform(40, 60), gen.uniform(20, 45))
            blend(flat, soft_edge(breast, pixel), -90)
    skin = oval_distance(c, (0, 0), b["a"], b["b"], 2.3)
    blend(flat, soft_edge(skin, pixel), -100)
    muscle = oval_distance(c, (0, 0), b["a"] - b["fat"], b["b"] - 0.7 * b["fat"], 2.3)
    blend(flat, soft_edge(muscle, pixel), gen.uniform(42, 60))
    chest = soft_edge(oval_distance(c, (0, 0), b["ta"], b["tb"], 2.2), pixel)
    blend(flat, chest, -75)
    c.hu[:] = flat
    # Liver on the right and spleen on the left, under the diaphragm.
    right = c.x[0] > gen.uniform(-45, -15)
    liver = np.float32(gen.uniform(48, 68))
    spleen = np.float32(gen.uniform(20, 52))
    below = diaphragm_height(b, c.x[0], c.y[0]) - 3 - c.z  # the diaphragm itself is 3 mm thick
    share = soft_edge(below, c.step[0]) * chest
    blend(c.hu, share, np.where(right, liver, spleen))
    if b["stomach"] > 0:
        at = (-0.5 * b["ta"], 0.3 * b["tb"], b["dome_left"] - gen.uniform(28, 45))
        radii = (gen.uniform(18, 34), gen.uniform(14, 28), gen.uniform(12, 24))
        fill_ellipsoid(c, at, radii, -940)


def _paint_lungs(c: Canvas, b: Body, gen: Gen) -> None:
    """Two lungs, denser behind, with vessels."""
    # Distance in mm to the nearest border, positive inside: chest wall, mediastinum, diaphragm, apex.
    narrow = (1 / taper(b, c.z)).astype(np.float32) ** 2.2  # the chest narrows towards the apex
    across = np.abs(c.x / (b["ta"] - 3)) ** 2.2
    along = np.abs(c.y / (b["tb"] - 3)) ** 2.2
    q = across * narrow + along * narrow  # 1 on the chest wall
    inside = (1 - q) * np.float32(0.45 * b["tb"])
    # The mediastinum is wider at the top, and a little at the back.
    widening = 14 * np.clip((c.z - 40) / 80, 0, 1)
    gap = b["gap"] + widening + gen.uniform(0, 8) * (c.y < 0)
    np.minimum(inside, np.abs(c.x + gen.uniform(-4, 4)) - gap, out=inside)
    np.minimum(inside, c.z - diaphragm_height(b, c.x[0], c.y[0]), out=inside)
    np.minimum(inside, b["apex"] - c.z, out=inside)
    c.lung[:] = soft_edge(inside, c.step[1])
    gradient = np.float32(gen.uniform(10, 45)) * (c.y / b["tb"])
    texture = np.float32(gen.uniform(6, 16)) * c.rough
    tissue = np.float32(b["lung"]) - gradient + texture
    blend(c.hu, c.lung, tissue)
    vessels = np.minimum(_vessel_shares(c, b, gen), 1)
    blend(c.hu, vessels * c.lung, np.float32(b["blood"]))


def _vessel_shares(c: Canvas, b: Body, gen: Gen) -> Array:
    """The share of each voxel [z, y, x] that vessels fill: a tree from each hilum, with thin ends."""
    left_points, left_volumes = _draw_vessels(b, -1, gen)
    right_points, right_volumes = _draw_vessels(b, 1, gen)
    points = np.concatenate([left_points, right_points])
    return splat(c, points, np.concatenate([left_volumes, right_volumes]))


def _draw_vessels(b: Body, sign: int, gen: Gen) -> tuple[Array, Array]:
    """Points [n, 3] (x y z, mm) in the vessels of one lung, and the volume [n] in mm3 of each point."""
    num_major, num_minor, num_steps = 10, 40, 22
    t = np.linspace(0, 1, num_steps)[None, :, None]

    def bend(start, end, bulge):
        """Curved lines [line, step, 3] from start to end."""
        straight = (1 - t) * start + t * end
        return straight + t * (1 - t) * gen.normal(0, bulge, (len(end), 1, 3))

    # Major vessels run from the hilum to the wall, minor ones fork from them.
    root = np.array([sign * (b["gap"] + 8), 0.0, -2.0])
    starts = root + gen.normal(0, 5, (num_major, 1, 3))
    major = bend(starts, _draw_vessel_ends(b, sign, num_major, gen), 18)
    parent = gen.integers(num_major, size=num_minor)
    step = gen.integers(4, 18, size=num_minor)  # of 22: neither at the hilum nor at the end
    forks = major[parent, step][:, None]  # [line, 1, 3]
    ends = _draw_vessel_ends(b, sign, num_minor, gen)
    ends = forks + (ends - forks) * gen.uniform(0.4, 0.9, (num_minor, 1, 1))
    minor = bend(forks, ends, 10)
    thinning = np.linspace(1, 0.25, num_steps)
    major_radius = gen.uniform(2.6, 4.2, (num_major, 1)) * thinning
    minor_radius = gen.uniform(1.0, 2.0, (num_minor, 1)) * thinning
    radius = np.concatenate([major_radius, minor_radius]).ravel()
    line = np.concatenate([major, minor])
    # From each point to the next; the last of a line is followed by itself and has length 0.
    steps = np.diff(line, axis=1, append=line[:, -1:])
    length = np.linalg.norm(steps, axis=2).ravel()
    # Two points per step, scattered within the vessel, share the volume of the step.
    offsets = gen.uniform(-0.8, 0.8, (2, len(radius), 3)) * radius[None, :, None]
    points = line.reshape(1, -1, 3) + offsets
    volume = np.pi * radius**2 * length / 2
    return points.reshape(-1, 3), np.tile(volume, 2)


def _draw_vessel_ends(b: Body, sign: int, n: int, gen: Gen) -> Array:
    """Points [n, 1, 3] near the wall of one lung."""
    z = gen.uniform(-95, 0.86 * b["apex"], n)
    angle = gen.uniform(-1.9, 1.9, n)
    width = taper(b, z) * gen.uniform(0.75, 0.95, n)  # short of the wall
    # Never within the mediastinum.
    x = np.maximum(b["ta"] * width * np.cos(angle * 0.75), b["gap"] + 8)
    y = b["tb"] * width * np.sin(angle * 0.8)
    return np.stack([sign * x, y, z], 1)[:, None]


def _paint_skeleton(c: Canvas, b: Body, gen: Gen) -> None:
    """Ribs, vertebrae with discs and canal, and sternum, painted in the voxel columns that they touch."""
    pixel = c.step[1]
    z = c.z[:, 0]  # [z, 1]
    # Ribs are slanted stripes of a shell of 9 mm around the chest, one every `gap` mm.
    wall = oval_distance(c, (0, 0), b["ta"] + 5, b["tb"] + 5, 2.2)
    shell = soft_edge(4.5 - np.abs(wall), pixel)
    iy, ix = np.nonzero(shell > 0.05)
    slope = gen.uniform(0.35, 0.6)  # mm of height per mm of depth
    gap = gen.uniform(23, 27)
    height = z - slope * c.y[0, iy, 0] + gen.uniform(0, gap)  # [z, column]
    phase = np.cos(2 * np.pi * height / gap)
    rib = np.clip(phase * 2.2, 0, 1) * shell[iy, ix] * (1 - c.lung[:, iy, ix])
    c.hu[:, iy, ix] += rib * (gen.uniform(260, 420) - c.hu[:, iy, ix])
    # Vertebral bodies: a dense shell around spongy bone, with discs in between.
    at = (gen.uniform(-5, 5), -b["tb"] + gen.uniform(12, 20))
    radius = gen.uniform(15, 20)
    phase = np.cos(2 * np.pi * (z + gen.uniform(0, 24)) / gen.uniform(22, 26))
    is_disc = phase > 0.85
    body = oval_distance(c, at, radius, radius * 0.8)
    paint_columns(c, soft_edge(body, pixel), np.where(is_disc, 70, b["bone"] + 160))
    paint_columns(c, soft_edge(body - 3, pixel), np.where(is_disc, 70, b["bone"]))
    # Vertebral arch, and the canal within it.
    behind = (at[0], at[1] - radius * 0.8 - 9)
    arch = oval_distance(c, behind, 16, 12)
    canal = oval_distance(c, behind, 9, 8)
    paint_columns(c, soft_edge(arch, pixel), np.full_like(phase, 320))
    paint_columns(c, soft_edge(canal, pixel), np.full_like(phase, 25))
    sternum = oval_distance(c, (0.0, b["tb"] + 5), gen.uniform(14, 22), 6)
    bone = np.where(z > -70, gen.uniform(180, 300), 40)  # below its end there is muscle
    paint_columns(c, soft_edge(sternum, pixel), bone)


def _paint_mediastinum(c: Canvas, case: ChestCase, gen: Gen) -> None:
    """Great vessels, airway, oesophagus, and the heart in its fat and, with an effusion, its fluid."""
    b = case.body
    blood = b["blood"]
    wall = gen.uniform(32, 48)  # of the oesophagus
    for p, q in pairwise(aorta_path(b)):
        fill_rod(c, p, q, b["aorta"], blood)
    fill_rod(c, (14, -4, 8), (16, 0, 110), gen.uniform(7, 10), blood)  # superior vena cava
    fill_rod(c, (-8, 14, 8), (-24, -4, 10), gen.uniform(11, 14), blood)  # pulmonary trunk
    for sign in (-1, 1):  # left and right pulmonary artery, to the hilum
        hilum = (sign * (b["gap"] + 12), -2, -2)
        fill_rod(c, (-6, 4, 4), hilum, gen.uniform(7, 10), blood)
    top = (-4, -0.45 * b["tb"], 120)
    bottom = (-6, -0.38 * b["tb"], b["dome_left"] - 20)
    fill_rod(c, top, bottom, gen.uniform(5, 8), wall)  # oesophagus
    # Trachea and main bronchi.
    carina = np.array([gen.uniform(-3, 3), -6, gen.uniform(16, 28)])
    fill_rod(c, (2, -2, 160), carina, gen.uniform(7, 9.5), -990)
    for sign in (-1, 1):
        bronchus_end = (sign * (b["gap"] + 14), -6, carina[2] - 26)
        fill_rod(c, carina, bronchus_end, gen.uniform(5, 7), -985)
    # The heart from outside in: the fluid of an effusion, fat, blood.
    centre, radii = heart_shape(b)
    effusion = case.findings.get("Pericardial effusion", ())
    if effusion:
        # There is one lesion of this kind.
        depth = sum(lesion.size_mm for lesion in effusion)
        fluid = sum(lesion.hu for lesion in effusion)
        fill_ellipsoid(c, centre, radii + (b["rim"] + depth), fluid)
        # Fat shows between fluid and heart; without fluid it is not painted.
        fill_ellipsoid(c, centre, radii + b["rim"], -85)
    fill_ellipsoid(c, centre, radii, blood - 4)


def _add_noise(hu: Array, view: View, gen: Gen) -> Array:
    """Noise, then the kernel, a three-tap filter in the plane: so the noise has the kernel's grain."""
    side = {"soft": 0.16, "standard": 0.08, "sharp": 0.0}[view.kernel]
    noise = gen.standard_normal(hu.shape, dtype=np.float32)
    noise *= np.float32(view.noise)
    hu = np.add(hu, noise, out=noise)
    if not side:
        return hu
    # side * left + (1 - 2 side) * middle + side * right, written as differences; the borders stay.
    for rows in (hu, hu.swapaxes(1, 2)):  # along y, along x; in place
        slope = np.diff(rows, axis=1)
        slope *= np.float32(side)
        rows[:, 1:-1] += slope[:, 1:]
        rows[:, 1:-1] -= slope[:, :-1]
    return hu


def _reorient(hu: Array, view: View) -> DrawnVolume:
    """From [z, y, x] in RAS+ to the stored axes."""
    affine = np.diag([*view.step[::-1], 1.0])
    affine[:3, 3] = view.origin[::-1]
    source = orientations.axcodes2ornt("RAS")
    target = orientations.axcodes2ornt(view.axes)
    reorientation = orientations.ornt_transform(source, target)
    ras = hu.transpose(2, 1, 0)  # files have [x, y, z]
    stored = orientations.apply_orientation(ras, reorientation)
    affine = affine @ orientations.inv_ornt_aff(reorientation, ras.shape)
    return DrawnVolume(hu=stored, affine=affine, kernel=view.kernel)
