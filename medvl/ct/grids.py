"""Linear resampling of a volume that comes slice by slice: one table of taps and weights per axis (`Axis`), one resampler for all.

Every grid here is separable and linear, so an axis is all there is to choose: `centred` (millimetres), `stretched` (voxel counts) or
`anchored` (millimetres from the first voxel). Lengths are in mm; n counts source voxels along the axis, size those of the output.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from torch import Tensor

_LOCK = threading.Lock()
_before: list[int] = []  # of each call at work, torch's thread count before the first


@frozen(kw_only=True, eq=False)
class Axis:
    """One axis: output voxel `first + i` is the sum over t of weights[i, t] * source[taps[i, t]]; others lie outside the source."""

    first: int
    taps: np.ndarray  # [i, t] int64, 0 .. n - 1
    weights: np.ndarray  # [i, t] float32
    spacing_mm: float  # of the output

    @property
    def stop(self) -> int:
        return self.first + len(self.taps)

    def flipped(self, n: int) -> "Axis":
        """The same output from a source of n voxels that is stored in reverse."""
        return evolve(self, taps=n - 1 - self.taps)


def centred(n: int, spacing_mm: float, size: int, target_mm: float, antialias: bool) -> Axis:
    """Output voxels of `target_mm`, both volumes centred; those whose centre lies in the source (its voxels are boxes).

    Args:
        antialias: when shrinking, weigh all that an output voxel covers by a triangle instead of reading two samples.
    Raises:
        ValueError: no output voxel's centre lies in the source; the message goes on after the volume's name.
    Source: the triangle is that of torch's antialias=True (aten UpSampleKernel): support = the step, weights normalised over what exists.
    """
    at = (np.arange(size) - (size - 1) / 2) * (target_mm / spacing_mm) + (n - 1) / 2
    inside = np.flatnonzero((at > -0.5 - 1e-6) & (at < n - 0.5 + 1e-6))
    if not len(inside):
        raise ValueError(
            f"is smaller than one output voxel: {n} voxels of {spacing_mm:g} mm against {target_mm:g} mm"
        )
    at, first = at[inside], int(inside[0])
    if not antialias or target_mm <= spacing_mm:
        return _linear(first, at, n, target_mm)
    step = target_mm / spacing_mm
    taps = np.floor(at + 1 - step).astype(np.int64)[:, None] + np.arange(int(np.ceil(2 * step)) + 1)
    weights = np.maximum(1 - np.abs(taps - at[:, None]) / step, 0) * ((taps >= 0) & (taps < n))
    weights /= weights.sum(1, keepdims=True)
    return Axis(
        first=first, taps=taps.clip(0, n - 1), weights=weights.astype(np.float32), spacing_mm=target_mm
    )


def stretched(n: int, spacing_mm: float, size: int, new: int) -> Axis:
    """The whole source as `new` >= 1 voxels, then the centre of them cropped or padded to `size`.

    Source: F.interpolate(size=new, align_corners=False), in its float32 arithmetic.
    """
    crop, pad = max(new - size, 0) // 2, max(size - new, 0) // 2
    scale = np.float32(n) / np.float32(new)
    at = scale * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    return _linear(pad, at[crop : crop + min(new, size)], n, spacing_mm * n / new)


def anchored(n: int, spacing_mm: float, size: int, target_mm: float) -> Axis:
    """Output voxels of `target_mm`, the first on the source's first, edges repeated; then padded and cropped about the centre to `size`.

    Source: MONAI Spacing (padding_mode="border"), SpatialPad and CenterSpatialCrop, for axes along the patient's; oblique ones are
    centred there when rounding errors exceed 1e-8 (compute_shape_offset).
    """
    new = int(np.round((n - 1) * spacing_mm / target_mm + 1))
    pad, padded = max(size - new, 0) // 2, max(new, size)
    crop = padded // 2 - size // 2
    at = np.arange(new) * (target_mm / spacing_mm)
    return _linear(pad, at[crop : crop + size], n, target_mm)


def _linear(first: int, at: np.ndarray, n: int, spacing_mm: float) -> Axis:
    """Linear samples at source indices `at` [i], edges repeated."""
    at = at.clip(0, n - 1)
    low = at.astype(np.int64)
    high = (at - low).astype(np.float32)
    taps, weights = np.stack([low, np.minimum(low + 1, n - 1)], 1), np.stack([1 - high, high], 1)
    return Axis(first=first, taps=taps, weights=weights, spacing_mm=spacing_mm)


def resample(
    axes: Sequence[Axis],
    slices: Iterable[np.ndarray],
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
    out: np.ndarray,
) -> None:
    """Fill `out` from source slices as they come; kept are only those that a coming output slice needs.

    Torch works on one thread meanwhile, which is faster here (see `_one_thread`); several calls may run at once.

    Args:
        axes: of z, y and x.
        slices: [y, x] of any real type, along z in order; they are copied, not changed.
        before, after: of values, on a float32 source slice [y, x] and on an output slice [x, y]; both may work in place.
        out: [z, y, x], as many as the axes' taps, of the dtype that `after` returns.
    Raises:
        ValueError: out has another shape, or the slices end before the last one that is needed.
    """
    size = tuple(len(a.taps) for a in axes)
    if out.shape != size:
        raise ValueError(f"resample: out must be {size} like the axes' taps, got {out.shape}")
    with _one_thread():
        _fill(axes, slices, before, after, out)


def _fill(
    axes: Sequence[Axis],
    slices: Iterable[np.ndarray],
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
    out: np.ndarray,
) -> None:
    """Along y once per source slice that is needed, then z, then x."""
    az, ay, ax = axes
    rows = zip(az.taps.tolist(), az.weights.tolist(), strict=True)
    wanted = [{i: w for i, w in zip(*row, strict=True) if w} for row in rows]
    uses = Counter(i for sources in wanted for i in sources)
    due = defaultdict(list)  # source slice -> the output slices it completes
    for k, sources in enumerate(wanted):
        due[max(sources)].append(k)
    planes: dict[int, Tensor] = {}
    for i, stored in enumerate(slices):
        if i in uses:
            planes[i] = _along(ay, before(torch.from_numpy(stored.astype(np.float32, order="C"))))
        for k in due.pop(i, ()):
            plane = torch.zeros(len(ay.taps), stored.shape[1])
            for j, w in wanted[k].items():
                plane.add_(planes[j], alpha=w)
                uses[j] -= 1
            out[k] = after(_along(ax, plane.t().contiguous())).numpy().T
        planes = {j: p for j, p in planes.items() if uses[j]}
    if due:
        raise ValueError(f"resample: the slices must go on to {max(due)}, counted from 0; they end early")


def _along(axis: Axis, rows: Tensor) -> Tensor:
    """Each row of the result is a weighted sum of rows of the input: an embedding bag."""
    return F.embedding_bag(
        torch.from_numpy(axis.taps), rows, per_sample_weights=torch.from_numpy(axis.weights), mode="sum"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of operations of 0.1 ms gain nothing from threads, and on busy cores wait for them: measured 30 to 90 times slower."""
    with _LOCK:
        _before.append(
            _before[0] if _before else torch.get_num_threads()
        )  # the count is the process's: the last call out restores it
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            count = _before.pop()
            if not _before:
                torch.set_num_threads(count)
