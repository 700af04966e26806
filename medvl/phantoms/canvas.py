"""Paint shapes on a voxel grid by the share of each voxel that they fill.

Coordinates are in mm, points (x, y, z), arrays [z, y, x]. Everything is float32, which is also part of the
drawn data.
"""

import numpy as np
from attrs import frozen
from numpy.typing import ArrayLike

Array = np.ndarray
Box = tuple[slice, slice, slice]


@frozen(kw_only=True)
class Canvas:
    """A volume to paint on. `hu` and `lung` [z, y, x] are written in place; the others stay."""

    hu: Array
    lung: Array  # the share of a voxel that is aerated lung
    z: Array  # [z, 1, 1] mm
    y: Array  # [1, y, 1]
    x: Array  # [1, 1, x]
    step: tuple[float, float, float]  # mm between voxels, z y x
    rough: Array  # smooth noise [z, y, x] that makes edges irregular


def smooth_noise(places: tuple[Array, Array, Array], cell: float, gen: np.random.Generator) -> Array:
    """Smooth noise [z, y, x]: unit normal at points `cell` mm apart in the patient, linear in between.

    The noise lies in the patient, so two views of one patient show the same.

    Args:
        places: z, y and x of the voxels in mm.
    """
    # A box of 380 x 480 x 480 mm around the hilum, whatever the view: so the draws do not depend on it.
    size = (380, 480, 480)
    points = [int(length / cell) + 2 for length in size]
    noise = gen.standard_normal(points, dtype=np.float32)
    for axis in (2, 1, 0):  # the slowest axis last, where it is cheapest
        origin = size[axis] // 2
        from_edge = places[axis].ravel() + origin  # mm
        # In units of cells; places outside of the box take the value at its edge.
        index = from_edge / np.float32(cell)
        last = noise.shape[axis] - 1.001  # a little less, so that there is a point above it too
        index = np.clip(index, 0, last)
        lower = index.astype(int)
        shape = [1, 1, 1]
        shape[axis] = -1  # along its own axis only
        fraction = (index - lower).reshape(shape)
        low = np.take(noise, lower, axis)
        # low + fraction * (high - low), in place
        noise = np.take(noise, lower + 1, axis)
        noise -= low
        noise *= fraction
        noise += low
    return noise


def soft_edge(distance: Array, width: float) -> Array:
    """The share of a voxel that lies inside an edge at this distance in mm (positive inside)."""
    return np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)


def blend(hu: Array, share: Array, value: ArrayLike) -> None:
    """Replace a share of each voxel by a value, in place."""
    hu += share * (value - hu)


def oval_distance(c: Canvas, at: tuple[float, float], a: float, b: float, power: float = 2.0) -> Array:
    """Distance [y, x] in mm to the edge of a (super)ellipse around `at` (x, y), positive inside.

    It is exact near the edge only, where it is used.

    Args:
        a, b: half axes in mm, along x and along y.
        power: 2 for an ellipse; more makes it fuller at the corners.
    """
    across = np.abs((c.x[0] - at[0]) / a) ** power
    along = np.abs((c.y[0] - at[1]) / b) ** power
    q = across + along  # 1 on the edge, where it rises by power / a (or power / b) a mm
    return (1 - q) * np.float32(min(a, b) / power)


def splat(c: Canvas, points: Array, volume: Array) -> Array:
    """Spread volumes [n] in mm3 at points [n, 3] (x y z) over the eight voxels around each.

    Returns:
        the share of each voxel, [z, y, x].
    """
    nz, ny, nx = c.hu.shape
    first = np.array([c.x.flat[0], c.y.flat[0], c.z.flat[0]])
    step = np.array(c.step[::-1])
    index = (points - first) / step  # [n, 3], x y z, in voxels
    last = np.array([nx, ny, nz]) - 1
    inside = ((index >= 0) & (index < last)).all(1)
    index = index[inside]
    share = volume[inside] / step.prod()  # of a voxel's volume
    lower = index.astype(int)
    x, y, z = lower.T
    corner = (z * ny + y) * nx + x  # flat index of the lowest of the eight
    fraction_x, fraction_y, fraction_z = (index - lower).T
    shares = np.empty((8, len(index)))
    targets = np.empty((8, len(index)), np.int64)
    for k, (dz, dy, dx) in enumerate(np.ndindex(2, 2, 2)):
        # 1 - fraction for the lower neighbour (d = 0), fraction for the upper one (d = 1).
        weight_x = np.abs(1 - dx - fraction_x)
        weight_y = np.abs(1 - dy - fraction_y)
        weight_z = np.abs(1 - dz - fraction_z)
        shares[k] = share * weight_x * weight_y * weight_z
        offset = (dz * ny + dy) * nx + dx
        targets[k] = corner + offset
    # bincount adds up what falls on the same voxel; indexing with += would keep only the last.
    total = np.bincount(targets.ravel(), shares.ravel(), minlength=nz * ny * nx)
    return total.astype(np.float32).reshape(nz, ny, nx)


def bounding_box(c: Canvas, low: Array, high: Array) -> Box:
    """Index slices (z y x) of the voxels that touch the box from `low` to `high` (x y z, mm)."""
    first = (c.z.flat[0], c.y.flat[0], c.x.flat[0])
    axes = zip(low[::-1], high[::-1], first, c.step, c.hu.shape, strict=True)
    slices = []
    for low_mm, high_mm, first_mm, step, n in axes:
        # A voxel reaches half a step to either side of its centre; rounded outwards, to be safe.
        start = int((low_mm - first_mm) / step - 0.5)
        stop = int((high_mm - first_mm) / step + 1.5) + 1
        # A box outside of the volume gives an empty slice.
        slices.append(slice(max(0, start), max(0, min(n, stop))))
    z, y, x = slices
    return z, y, x


def offsets_from(
    c: Canvas, box: Box, centre: Array | tuple[float, float, float]
) -> tuple[Array, Array, Array]:
    """(dx [1, 1, x], dy [1, y, 1], dz [z, 1, 1]) in mm from `centre` (x y z) to the voxels of a box."""
    z, y, x = box
    centre_x, centre_y, centre_z = centre
    return c.x[:, :, x] - centre_x, c.y[:, y] - centre_y, c.z[z] - centre_z


def fill_rod(c: Canvas, start: ArrayLike, end: ArrayLike, radius: float, hu: float) -> None:
    """Paint a straight rod with round ends; it displaces what was there."""
    start = np.asarray(start, np.float32)
    end = np.asarray(end, np.float32)
    low = np.minimum(start, end)
    high = np.maximum(start, end)
    box = bounding_box(c, low - radius - 2, high + radius + 2)  # 2 mm more for the soft edge
    dx, dy, dz = offsets_from(c, box, start)
    # The nearest point of the axis, 0 at the start and 1 at the end; clipped, so that the ends are round.
    axis = end - start
    projection = dx * axis[0] + dy * axis[1] + dz * axis[2]
    t = np.clip(projection / (axis @ axis), 0, 1)
    away_x = dx - t * axis[0]
    away_y = dy - t * axis[1]
    away_z = dz - t * axis[2]
    distance_mm = np.sqrt(away_x**2 + away_y**2 + away_z**2)
    share = soft_edge(radius - distance_mm, c.step[1])
    blend(c.hu[box], share, np.float32(hu))
    c.lung[box] *= 1 - share


def fill_ellipsoid(c: Canvas, at: ArrayLike, radii: ArrayLike, hu: float) -> None:
    """Paint an ellipsoid; it displaces what was there."""
    box, share = cover_ellipsoid(c, at, radii)
    blend(c.hu[box], share, np.float32(hu))
    c.lung[box] *= 1 - share


def cover_ellipsoid(
    c: Canvas, at: ArrayLike, radii: ArrayLike, tilt: tuple[float, float] = (0.0, 0.0)
) -> tuple[Box, Array]:
    """The voxels that an ellipsoid touches and the share of each that it fills, from 3 x 3 x 4 points per
    voxel.

    Args:
        tilt: rise in mm per mm along x and along y.
    """
    at = np.asarray(at, np.float32)
    radii = np.asarray(radii, np.float32)
    rise_mm = abs(tilt[0]) * radii[0] + abs(tilt[1]) * radii[1]
    reach = radii + np.array([0, 0, rise_mm], np.float32)
    box = bounding_box(c, at - reach, at + reach)
    if radii.min() > 22:  # large against a voxel: the distance to the edge is accurate enough
        dx, dy, dz = offsets_from(c, box, at)
        q = _squared_radius(dx, dy, dz, radii)
        inside_mm = (1 - q) * (radii.min() / 2)
        return box, soft_edge(inside_mm, c.step[1])
    return box, _count_inside(c, box, at, radii, tilt)


def _count_inside(c: Canvas, box: Box, at: Array, radii: Array, tilt: tuple[float, float]) -> Array:
    """The share of sample points of each voxel that lie in an ellipsoid: 4 along z, where voxels are longest,
    3 along y and x.
    """
    z, y, x = box
    dz = _subsample(c.z.ravel()[z], c.step[0], 4) - at[2]
    dy = _subsample(c.y.ravel()[y], c.step[1], 3) - at[1]
    dx = _subsample(c.x.ravel()[x], c.step[2], 3) - at[0]
    dz = dz[:, None, None]
    dy = dy[:, None]
    above_tilt = dz - tilt[0] * dx - tilt[1] * dy
    is_inside = _squared_radius(dx, dy, above_tilt, radii) < 1  # [points along z, y, x]
    nz, ny, nx = is_inside.shape
    by_voxel = is_inside.reshape(nz // 4, 4, ny // 3, 3, nx // 3, 3)
    count = by_voxel.sum((1, 3, 5), dtype=np.float32)
    return count / np.float32(4 * 3 * 3)


def _squared_radius(dx: Array, dy: Array, dz: Array, radii: Array) -> Array:
    """The squared distance [z, y, x] from the centre of an ellipsoid in units of its radii: 1 on the edge."""
    return (dx / radii[0]) ** 2 + (dy / radii[1]) ** 2 + (dz / radii[2]) ** 2


def _subsample(centres: Array, step: float, n: int) -> Array:
    """n points in each voxel, evenly spaced."""
    offsets = (np.arange(n, dtype=np.float32) + 0.5) / n - 0.5
    return (centres[:, None] + np.float32(step) * offsets).ravel()


def paint_columns(c: Canvas, share: Array, value: Array) -> None:
    """Paint a value [z, 1] with a share [y, x] at all heights, only in columns with a visible share."""
    # Bones touch few of the columns: painting these alone is much faster than a blend of the volume.
    iy, ix = np.nonzero(share > 0.02)
    share = share[iy, ix]  # [column]
    before = c.hu[:, iy, ix]  # [z, column]
    c.hu[:, iy, ix] += share * (value - before)
    c.lung[:, iy, ix] *= 1 - share
