"""Draw a chest case as CT voxels.

Every object has its true size in mm: one that is smaller than a voxel fills only a share of it. Dims: z y x
voxel axes, n points. Arrays are [z, y, x] in RAS+ until they are stored. The order of the random draws is
part of the data: changing it changes every volume, so each draw stands on a line of its own.

Shapes and ranges that `Body` does not have are set here. Like those of `chest_case` they have no source: they
were chosen by eye, so that slices resemble those of a chest CT.
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
    hu = np.clip(hu, -1024, 3071).astype(np.int16)  # the 12 bits of a scanner
    return _reorient(hu, view)


def draw_view(cfg: PhantomConfig, gen: Gen) -> View:
    """The first draws of `gen` in `render`: a volume's metadata needs them without the volume."""
    fewest_columns, most_columns = cfg.columns
    fewest_slices, most_slices = cfg.slices
    n = int(gen.integers(fewest_columns, most_columns + 1))
    nz = int(gen.integers(fewest_slices, most_slices + 1))
    fov_mm = gen.uniform(330, 420)  # in the plane
    low = gen.uniform(-172, -156)  # z of the first and the last slice: from the liver to above the lungs
    high = gen.uniform(134, 150)
    # Rounded to what the metadata prints, so that tables and voxels agree.
    thickness = round((high - low) / nz, 3)
    pixel = round(fov_mm / n, 4)
    # The patient does not lie quite in the middle.
    y = -fov_mm / 2 + gen.uniform(-12, 6)
    x = -fov_mm / 2 + gen.uniform(-9, 9)
    axes = _ORIENTATIONS[gen.choice(len(_ORIENTATIONS), p=_ORIENTATION_SHARES)]
    kernel = _KERNELS[gen.integers(len(_KERNELS))]
    noise = float(gen.uniform(8, 26))
    return View(
        shape=(nz, n, n),
        step=(thickness, pixel, pixel),
        origin=(low, y, x),
        axes=axes,
        kernel=kernel,
        noise=noise,
    )


_ORIENTATIONS = ("LPS", "RAS", "LAS", "RPS", "PSR", "LPI")
_ORIENTATION_SHARES = (0.4, 0.2, 0.1, 0.1, 0.1, 0.1)
_KERNELS = ("soft", "standard", "sharp")


def _blank_canvas(view: View, gen: Gen) -> Canvas:
    places = []  # of the voxels' centres in mm, [z], [y], [x]
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
    # What is the same at every height is painted once, on one slice [y, x].
    flat = np.full((c.hu.shape[1], c.hu.shape[2]), -1000, np.float32)
    _paint_table(c, flat, b, gen)
    if case.sex == "F":
        _paint_breasts(c, flat, b, gen)
    # From outside in: skin and fat, muscle, the fat within the chest.
    skin_mm = oval_distance(c, (0, 0), b.half_width, b.half_depth, 2.3)
    blend(flat, soft_edge(skin_mm, pixel), -100)
    muscle_half_width = b.half_width - b.fat
    muscle_half_depth = b.half_depth - 0.7 * b.fat
    muscle_mm = oval_distance(c, (0, 0), muscle_half_width, muscle_half_depth, 2.3)
    muscle_hu = gen.uniform(42, 60)
    blend(flat, soft_edge(muscle_mm, pixel), muscle_hu)
    chest_mm = oval_distance(c, (0, 0), b.chest_half_width, b.chest_half_depth, 2.2)
    chest = soft_edge(chest_mm, pixel)
    blend(flat, chest, -75)
    c.hu[:] = flat
    _paint_abdomen(c, b, chest, gen)


def _paint_table(c: Canvas, flat: Array, b: Body, gen: Gen) -> None:
    """A curved sheet of 8 mm behind the back, 410 mm wide."""
    top = -b.half_depth - gen.uniform(6, 14)
    radius = gen.uniform(600, 1200)
    table_y = top + (c.x[0] / radius) * c.x[0]
    inside_mm = 4 - np.abs(c.y[0] - table_y)
    share = soft_edge(inside_mm, c.step[1]) * (np.abs(c.x[0]) < 205)
    blend(flat, share, gen.uniform(-300, 100))


def _paint_breasts(c: Canvas, flat: Array, b: Body, gen: Gen) -> None:
    """Two ovals of fat on the chest, most of each within the body's own oval."""
    for sign in (-1, 1):
        centre = (sign * 0.45 * b.half_width, 0.86 * b.half_depth)
        half_width = gen.uniform(40, 60)
        half_depth = gen.uniform(20, 45)
        inside_mm = oval_distance(c, centre, half_width, half_depth)
        blend(flat, soft_edge(inside_mm, c.step[1]), -90)


def _paint_abdomen(c: Canvas, b: Body, chest: Array, gen: Gen) -> None:
    """Liver on the right and spleen on the left, under the diaphragm, and the gas of the stomach.

    Args:
        chest: the share of each voxel of a slice [y, x] within the inner chest.
    """
    is_right = c.x[0] > gen.uniform(-45, -15)  # the liver reaches over the middle
    liver_hu = np.float32(gen.uniform(48, 68))
    spleen_hu = np.float32(gen.uniform(20, 52))
    below_mm = diaphragm_height(b, c.x[0], c.y[0]) - 3 - c.z  # the diaphragm itself is 3 mm thick
    share = soft_edge(below_mm, c.step[0]) * chest
    blend(c.hu, share, np.where(is_right, liver_hu, spleen_hu))
    if b.stomach_gas > 0:
        x = -0.5 * b.chest_half_width
        y = 0.3 * b.chest_half_depth  # in front, as the patient lies on the back
        z = b.dome_left - gen.uniform(28, 45)
        radii = (gen.uniform(18, 34), gen.uniform(14, 28), gen.uniform(12, 24))
        fill_ellipsoid(c, (x, y, z), radii, -940)


def _paint_lungs(c: Canvas, b: Body, gen: Gen) -> None:
    """Two lungs, denser behind, with vessels."""
    inside_mm = _distance_in_lungs(c, b, gen)
    c.lung[:] = soft_edge(inside_mm, c.step[1])
    # The patient lies on the back: blood and weight make the lungs denser there.
    gradient_hu = np.float32(gen.uniform(10, 45))
    texture_hu = np.float32(gen.uniform(6, 16))
    gradient = gradient_hu * (c.y / b.chest_half_depth)
    texture = texture_hu * c.rough
    tissue = np.float32(b.lung_hu) - gradient + texture
    blend(c.hu, c.lung, tissue)
    vessels = np.minimum(_vessel_shares(c, b, gen), 1)
    blend(c.hu, vessels * c.lung, np.float32(b.blood_hu))


def _distance_in_lungs(c: Canvas, b: Body, gen: Gen) -> Array:
    """Distance [z, y, x] in mm to the nearest border of a lung, positive inside."""
    # The chest wall, an oval that narrows towards the apex: q is 1 on it, and 3 mm of pleura stay outside.
    power = 2.2
    narrowing = (1 / taper(b, c.z)).astype(np.float32) ** power
    across = np.abs(c.x / (b.chest_half_width - 3)) ** power
    along = np.abs(c.y / (b.chest_half_depth - 3)) ** power
    q = across * narrowing + along * narrowing
    inside_mm = (1 - q) * np.float32(0.45 * b.chest_half_depth)
    # The mediastinum is wider at the top, and a little at the back.
    widening = 14 * np.clip((c.z - 40) / 80, 0, 1)
    widening_behind = gen.uniform(0, 8)
    half_width = b.mediastinum + widening + widening_behind * (c.y < 0)
    shift = gen.uniform(-4, 4)
    from_mediastinum = np.abs(c.x + shift) - half_width
    # In place: each of these arrays is as large as the volume.
    np.minimum(inside_mm, from_mediastinum, out=inside_mm)
    above_diaphragm = c.z - diaphragm_height(b, c.x[0], c.y[0])
    np.minimum(inside_mm, above_diaphragm, out=inside_mm)
    np.minimum(inside_mm, b.apex - c.z, out=inside_mm)
    return inside_mm


def _vessel_shares(c: Canvas, b: Body, gen: Gen) -> Array:
    """The share of each voxel [z, y, x] that vessels fill: a tree from each hilum, with thin ends."""
    left_points, left_volumes = _draw_vessels(b, -1, gen)
    right_points, right_volumes = _draw_vessels(b, 1, gen)
    points = np.concatenate([left_points, right_points])
    volumes = np.concatenate([left_volumes, right_volumes])
    return splat(c, points, volumes)


def _draw_vessels(b: Body, sign: int, gen: Gen) -> tuple[Array, Array]:
    """Points [n, 3] (x y z, mm) in the vessels of one lung, and the volume [n] in mm3 of each point."""
    num_major, num_minor, num_steps = 10, 40, 22
    t = np.linspace(0, 1, num_steps)[None, :, None]  # along a vessel

    def bend(starts: Array, ends: Array, bulge: float) -> Array:
        """Curved lines [line, step, 3] from starts to ends [line, 1, 3]."""
        straight = (1 - t) * starts + t * ends
        # The parabola t (1 - t) leaves both ends where they are.
        return straight + t * (1 - t) * gen.normal(0, bulge, (len(ends), 1, 3))

    # Major vessels run from the hilum to the wall.
    root = np.array([sign * (b.mediastinum + 8), 0.0, -2.0])
    starts = root + gen.normal(0, 5, (num_major, 1, 3))
    ends = _draw_vessel_ends(b, sign, num_major, gen)
    major = bend(starts, ends, 18)
    # Minor ones fork from them and end on the way to the wall.
    parent = gen.integers(num_major, size=num_minor)
    step = gen.integers(4, 18, size=num_minor)  # of 22: neither at the hilum nor at the end
    forks = major[parent, step][:, None]  # [line, 1, 3]
    wall = _draw_vessel_ends(b, sign, num_minor, gen)
    ends = forks + (wall - forks) * gen.uniform(0.4, 0.9, (num_minor, 1, 1))
    minor = bend(forks, ends, 10)
    lines = np.concatenate([major, minor])  # [line, step, 3]

    thinning = np.linspace(1, 0.25, num_steps)
    major_radius = gen.uniform(2.6, 4.2, (num_major, 1)) * thinning
    minor_radius = gen.uniform(1.0, 2.0, (num_minor, 1)) * thinning
    radius = np.concatenate([major_radius, minor_radius]).ravel()
    # From each point to the next; the last of a line is followed by itself and has length 0.
    steps = np.diff(lines, axis=1, append=lines[:, -1:])
    length = np.linalg.norm(steps, axis=2).ravel()
    # Two points per step, scattered within the vessel, share the volume of the step.
    offsets = gen.uniform(-0.8, 0.8, (2, len(radius), 3)) * radius[None, :, None]
    points = lines.reshape(1, -1, 3) + offsets
    volume = np.pi * radius**2 * length / 2
    return points.reshape(-1, 3), np.tile(volume, 2)


def _draw_vessel_ends(b: Body, sign: int, n: int, gen: Gen) -> Array:
    """Points [n, 1, 3] near the wall of one lung."""
    z = gen.uniform(-95, 0.86 * b.apex, n)
    angle = gen.uniform(-1.9, 1.9, n)
    width = taper(b, z) * gen.uniform(0.75, 0.95, n)  # short of the wall
    lateral = b.chest_half_width * width * np.cos(angle * 0.75)
    lateral = np.maximum(lateral, b.mediastinum + 8)  # never within the mediastinum
    y = b.chest_half_depth * width * np.sin(angle * 0.8)
    points = np.stack([sign * lateral, y, z], 1)
    return points[:, None]


def _paint_skeleton(c: Canvas, b: Body, gen: Gen) -> None:
    """Ribs, spine and sternum, painted in the voxel columns that they touch."""
    _paint_ribs(c, b, gen)
    _paint_spine(c, b, gen)
    half_width = gen.uniform(14, 22)
    sternum_mm = oval_distance(c, (0.0, b.chest_half_depth + 5), half_width, 6)
    bone_hu = gen.uniform(180, 300)
    value = np.where(c.z[:, 0] > -70, bone_hu, 40)  # below its end there is muscle
    paint_columns(c, soft_edge(sternum_mm, c.step[1]), value)


def _paint_ribs(c: Canvas, b: Body, gen: Gen) -> None:
    """Slanted stripes of a shell of 9 mm around the chest."""
    half_width = b.chest_half_width + 5
    half_depth = b.chest_half_depth + 5
    from_wall = oval_distance(c, (0, 0), half_width, half_depth, 2.2)
    shell = soft_edge(4.5 - np.abs(from_wall), c.step[1])  # [y, x]
    iy, ix = np.nonzero(shell > 0.05)
    slope = gen.uniform(0.35, 0.6)  # mm of height per mm of depth
    spacing = gen.uniform(23, 27)  # mm from rib to rib
    first = gen.uniform(0, spacing)
    height = c.z[:, 0] - slope * c.y[0, iy, 0] + first  # [z, column]
    phase = np.cos(2 * np.pi * height / spacing)  # 1 in the middle of a rib
    stripes = np.clip(phase * 2.2, 0, 1)
    share = stripes * shell[iy, ix] * (1 - c.lung[:, iy, ix])
    bone_hu = gen.uniform(260, 420)
    c.hu[:, iy, ix] += share * (bone_hu - c.hu[:, iy, ix])


def _paint_spine(c: Canvas, b: Body, gen: Gen) -> None:
    """Vertebral bodies with discs in between, their arch, and the canal within it."""
    pixel = c.step[1]
    z = c.z[:, 0]  # [z, 1]
    x = gen.uniform(-5, 5)
    y = -b.chest_half_depth + gen.uniform(12, 20)
    radius = gen.uniform(15, 20)
    first = gen.uniform(0, 24)
    spacing = gen.uniform(22, 26)  # mm from disc to disc
    phase = np.cos(2 * np.pi * (z + first) / spacing)
    is_disc = phase > 0.85
    # A dense shell of 3 mm around spongy bone.
    inside_mm = oval_distance(c, (x, y), radius, radius * 0.8)
    shell_hu = np.where(is_disc, 70, b.bone_hu + 160)
    spongy_hu = np.where(is_disc, 70, b.bone_hu)
    paint_columns(c, soft_edge(inside_mm, pixel), shell_hu)
    paint_columns(c, soft_edge(inside_mm - 3, pixel), spongy_hu)
    behind = (x, y - radius * 0.8 - 9)
    arch_mm = oval_distance(c, behind, 16, 12)
    canal_mm = oval_distance(c, behind, 9, 8)
    paint_columns(c, soft_edge(arch_mm, pixel), np.full_like(phase, 320))
    paint_columns(c, soft_edge(canal_mm, pixel), np.full_like(phase, 25))


def _paint_mediastinum(c: Canvas, case: ChestCase, gen: Gen) -> None:
    """Great vessels, oesophagus, airway and heart; what comes later lies over what was there."""
    b = case.body
    oesophagus_hu = gen.uniform(32, 48)
    _paint_great_vessels(c, b, gen)
    top = (-4, -0.45 * b.chest_half_depth, 120)
    bottom = (-6, -0.38 * b.chest_half_depth, b.dome_left - 20)
    fill_rod(c, top, bottom, gen.uniform(5, 8), oesophagus_hu)
    # Trachea and main bronchi.
    carina = np.array([gen.uniform(-3, 3), -6, gen.uniform(16, 28)])
    fill_rod(c, (2, -2, 160), carina, gen.uniform(7, 9.5), -990)
    for sign in (-1, 1):
        bronchus_end = (sign * (b.mediastinum + 14), -6, carina[2] - 26)
        fill_rod(c, carina, bronchus_end, gen.uniform(5, 7), -985)
    _paint_heart(c, case)


def _paint_great_vessels(c: Canvas, b: Body, gen: Gen) -> None:
    """Aorta, superior vena cava, pulmonary trunk and arteries."""
    blood_hu = b.blood_hu
    for start, end in pairwise(aorta_path(b)):
        fill_rod(c, start, end, b.aorta_radius, blood_hu)
    fill_rod(c, (14, -4, 8), (16, 0, 110), gen.uniform(7, 10), blood_hu)  # superior vena cava
    fill_rod(c, (-8, 14, 8), (-24, -4, 10), gen.uniform(11, 14), blood_hu)  # pulmonary trunk
    for sign in (-1, 1):  # left and right pulmonary artery, to the hilum
        hilum = (sign * (b.mediastinum + 12), -2, -2)
        fill_rod(c, (-6, 4, 4), hilum, gen.uniform(7, 10), blood_hu)


def _paint_heart(c: Canvas, case: ChestCase) -> None:
    """From outside in: the fluid of an effusion, fat, blood."""
    b = case.body
    centre, radii = heart_shape(b)
    effusion = case.findings.get("Pericardial effusion", ())
    if effusion:
        # There is one lesion of this kind.
        depth = sum(lesion.size_mm for lesion in effusion)
        fluid_hu = sum(lesion.hu for lesion in effusion)
        fill_ellipsoid(c, centre, radii + (b.heart_fat + depth), fluid_hu)
        # Fat shows between fluid and heart; without fluid it is not painted.
        fill_ellipsoid(c, centre, radii + b.heart_fat, -85)
    fill_ellipsoid(c, centre, radii, b.blood_hu - 4)


def _add_noise(hu: Array, view: View, gen: Gen) -> Array:
    """Noise, then the kernel, a three-tap filter in the plane: so the noise has the kernel's grain."""
    side = {"soft": 0.16, "standard": 0.08, "sharp": 0.0}[view.kernel]  # weight of each neighbour
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
