"""Shapes on a voxel grid, by the share of each voxel they fill. Coordinates in mm, points as (x, y, z), arrays as [z, y, x]."""

import numpy as np
from attrs import frozen
from numpy.typing import ArrayLike

Array = np.ndarray
Box = tuple[slice, slice, slice]


@frozen(kw_only=True)
class Canvas:
    """The volume being painted: `hu` and `lung` (the share of a voxel that is aerated) [z, y, x] are written in place."""

    hu: Array
    lung: Array
    z: Array  # [z, 1, 1] mm
    y: Array  # [1, y, 1]
    x: Array  # [1, 1, x]
    step: tuple[float, float, float]
    rough: Array  # smooth noise [z, y, x] that makes edges irregular


def smooth_noise(places: tuple[Array, Array, Array], cell: float, gen: np.random.Generator) -> Array:
    """Noise [z, y, x] at places (z, y, x) in mm, fixed in the patient: unit normal at points `cell` mm apart, linear between them."""
    a = gen.standard_normal([int(n / cell) + 2 for n in (380, 480, 480)], dtype=np.float32)
    for axis in (2, 1, 0):  # the slowest axis last, where it is cheapest
        at = np.clip(
            (places[axis].ravel() + (190, 240, 240)[axis]) / np.float32(cell), 0, a.shape[axis] - 1.001
        )
        i = at.astype(int)
        part = (at - i).reshape([-1 if k == axis else 1 for k in range(3)])
        low = np.take(a, i, axis)
        a = np.take(a, i + 1, axis)
        a -= low
        a *= part
        a += low
    return a


def soft(distance: Array, width: float) -> Array:
    """The share of a voxel that is inside, from the distance in mm to the edge (positive inside)."""
    return np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)


def blend(hu: Array, share: Array, value: ArrayLike) -> None:
    """Replace this share of each voxel, in place."""
    hu += share * (value - hu)


def oval(c: Canvas, at: tuple[float, float], a: float, b: float, power: float = 2.0) -> Array:
    """Distance [y, x] in mm to the edge of an upright (super)ellipse around (x, y), positive inside; exact only near the edge."""
    q = np.abs((c.x[0] - at[0]) / a) ** power + np.abs((c.y[0] - at[1]) / b) ** power
    return (1 - q) * np.float32(min(a, b) / power)


def splat(c: Canvas, points: Array, volume: Array) -> Array:
    """Spread volumes [n] in mm3 at points [n, 3] (x y z) over the eight voxels around each; returns shares of a voxel [z, y, x]."""
    nz, ny, nx = c.hu.shape
    low, step = np.array([c.x.flat[0], c.y.flat[0], c.z.flat[0]]), np.array(c.step[::-1])
    at = (points - low) / step
    ok = ((at >= 0) & (at < np.array([nx, ny, nz]) - 1)).all(1)
    at, share = at[ok], volume[ok] / step.prod()
    i = at.astype(int)
    f = at - i
    part, base = np.empty((2, 2, 2, len(at))), (i[:, 2] * ny + i[:, 1]) * nx + i[:, 0]
    for dz, dy, dx in np.ndindex(2, 2, 2):
        part[dz, dy, dx] = (
            share * np.abs(1 - dx - f[:, 0]) * np.abs(1 - dy - f[:, 1]) * np.abs(1 - dz - f[:, 2])
        )
    where = base + np.array([(dz * ny + dy) * nx + dx for dz, dy, dx in np.ndindex(2, 2, 2)])[:, None]
    return (
        np.bincount(where.ravel(), part.ravel(), minlength=nz * ny * nx)
        .astype(np.float32)
        .reshape(nz, ny, nx)
    )


def touched(c: Canvas, low: Array, high: Array) -> Box:
    """Index slices (z y x) of the voxels that touch low..high (x y z, mm)."""
    first = (c.z.flat[0], c.y.flat[0], c.x.flat[0])
    ends = zip(low[::-1], high[::-1], first, c.step, c.hu.shape, strict=True)
    z, y, x = (
        slice(max(0, int((a - o) / s - 0.5)), max(0, min(n, int((e - o) / s + 1.5) + 1)))
        for a, e, o, s, n in ends
    )
    return z, y, x


def tube(c: Canvas, start: ArrayLike, end: ArrayLike, radius: float, hu: float) -> None:
    """A straight rod with round ends that displaces what was there."""
    p, q = np.asarray(start, np.float32), np.asarray(end, np.float32)
    z, y, x = box = touched(c, np.minimum(p, q) - radius - 2, np.maximum(p, q) + radius + 2)
    dx, dy, dz = c.x[:, :, x] - p[0], c.y[:, y] - p[1], c.z[z] - p[2]
    along = q - p
    t = np.clip((dx * along[0] + dy * along[1] + dz * along[2]) / (along @ along), 0, 1)
    distance = np.sqrt((dx - t * along[0]) ** 2 + (dy - t * along[1]) ** 2 + (dz - t * along[2]) ** 2)
    share = soft(radius - distance, c.step[1])
    blend(c.hu[box], share, np.float32(hu))
    c.lung[box] *= 1 - share


def fill_ellipsoid(c: Canvas, at: ArrayLike, radii: ArrayLike, hu: float) -> None:
    """An ellipsoid that displaces what was there."""
    box, share = cover(c, at, radii)
    blend(c.hu[box], share, np.float32(hu))
    c.lung[box] *= 1 - share


def cover(
    c: Canvas, at: ArrayLike, radii: ArrayLike, tilt: tuple[float, float] = (0.0, 0.0)
) -> tuple[Box, Array]:
    """The voxels an ellipsoid touches and the share of each it fills, from 3 x 3 x 4 points per voxel; `tilt`: rise per mm along x, y."""
    at, radii = np.asarray(at, np.float32), np.asarray(radii, np.float32)
    reach = radii + np.array([0, 0, abs(tilt[0]) * radii[0] + abs(tilt[1]) * radii[1]], np.float32)
    z, y, x = box = touched(c, at - reach, at + reach)
    if radii.min() > 22:  # large against a voxel: the distance to the edge says enough
        q = (
            ((c.x[:, :, x] - at[0]) / radii[0]) ** 2
            + ((c.y[:, y] - at[1]) / radii[1]) ** 2
            + ((c.z[z] - at[2]) / radii[2]) ** 2
        )
        return box, soft((1 - q) * (radii.min() / 2), c.step[1])
    fine = [
        _finer(a.ravel()[s], step, n) - o
        for a, s, step, n, o in zip((c.z, c.y, c.x), box, c.step, (4, 3, 3), at[::-1], strict=True)
    ]
    dz, dy, dx = fine[0][:, None, None], fine[1][:, None], fine[2]
    q = (dx / radii[0]) ** 2 + (dy / radii[1]) ** 2 + ((dz - tilt[0] * dx - tilt[1] * dy) / radii[2]) ** 2
    nz, ny, nx = (len(f) // n for f, n in zip(fine, (4, 3, 3), strict=True))
    return box, (q < 1).reshape(nz, 4, ny, 3, nx, 3).sum((1, 3, 5), dtype=np.float32) / np.float32(36)


def _finer(centres: Array, step: float, n: int) -> Array:
    inner = (np.arange(n, dtype=np.float32) + 0.5) / n - 0.5
    return (centres[:, None] + np.float32(step) * inner).ravel()


def columns(c: Canvas, share: Array, value: Array) -> None:
    """Paint value [z, 1] with share [y, x] where there is any."""
    iy, ix = np.nonzero(share > 0.02)
    c.hu[:, iy, ix] += share[iy, ix] * (value - c.hu[:, iy, ix])
    c.lung[:, iy, ix] *= 1 - share[iy, ix]
