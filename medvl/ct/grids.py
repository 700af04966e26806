"""Linear resampling of a volume that comes slice by slice: a table of taps and weights per axis (`Axis`), and
one resampler.

Every grid here is separable and linear, so it is a choice per axis: `centred` (millimetres), `stretched`
(voxel counts) or `anchored` (millimetres from the first voxel). Lengths are in mm; n counts source voxels
along the axis, `size` those of the output.
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
_counts: list[int] = []  # one entry per running call: torch's thread count before the first of them


@frozen(kw_only=True, eq=False)
class Axis:
    """One axis of a resampling.

    Output voxel `first + i` is the sum over t of weights[i, t] * source[taps[i, t]]; other output voxels lie
    outside the source.
    """

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
    """Output voxels of `target_mm`, with source and output centred on each other.

    Kept are output voxels whose centre lies in the source, where source voxels are boxes.

    Args:
        antialias: when shrinking, weigh all that an output voxel covers by a triangle instead of reading two
            samples.
    Raises:
        ValueError: no output voxel's centre lies in the source; the message goes on after the volume's name.
    Source: the triangle is that of torch's antialias=True (aten UpSampleKernel): its support is the step, and
        weights are normalised over the source voxels that exist.
    """
    step = target_mm / spacing_mm  # source voxels per output voxel
    # Source index of each output voxel's centre; both volumes have their centre in the same place.
    centres = (np.arange(size) - (size - 1) / 2) * step + (n - 1) / 2
    # With a tolerance: whether a voxel exactly on the edge counts must not depend on rounding.
    inside = np.flatnonzero((centres > -0.5 - 1e-6) & (centres < n - 0.5 + 1e-6))
    if not len(inside):
        raise ValueError(
            f"is smaller than one output voxel: {n} voxels of {spacing_mm:g} mm against {target_mm:g} mm"
        )
    first = int(inside[0])
    centres = centres[inside]
    # When enlarging there is nothing to average: two neighbours are all that an output voxel lies between.
    if not antialias or target_mm <= spacing_mm:
        return _sample_linear(first, centres, n, target_mm)
    # All source voxels within one step of the centre; there are at most ceil(2 * step) + 1 of them.
    lowest = np.floor(centres + 1 - step).astype(np.int64)
    taps = lowest[:, None] + np.arange(int(np.ceil(2 * step)) + 1)
    exists = (taps >= 0) & (taps < n)
    weights = np.maximum(1 - np.abs(taps - centres[:, None]) / step, 0) * exists
    # At the edge a part of the triangle lies outside of the source.
    weights /= weights.sum(1, keepdims=True)
    weights = weights.astype(np.float32)
    return Axis(first=first, taps=taps.clip(0, n - 1), weights=weights, spacing_mm=target_mm)


def stretched(n: int, spacing_mm: float, size: int, new: int) -> Axis:
    """The whole source resized to `new` >= 1 voxels, then cropped or padded about its centre to `size`.

    Source: F.interpolate(size=new, align_corners=False), in its float32 arithmetic.
    """
    # Of crop and pad at most one is above 0.
    crop = max(new - size, 0) // 2
    pad = max(size - new, 0) // 2
    scale = np.float32(n) / np.float32(new)
    centres = scale * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    centres = centres[crop : crop + min(new, size)]
    return _sample_linear(pad, centres, n, spacing_mm * n / new)


def anchored(n: int, spacing_mm: float, size: int, target_mm: float) -> Axis:
    """Output voxels of `target_mm`, the first on the source's first, edges repeated; then padded and cropped
    to `size`.

    Source: MONAI Spacing (padding_mode="border"), SpatialPad and CenterSpatialCrop, for axes along the
        patient's. MONAI centres oblique ones when rounding errors exceed 1e-8 (compute_shape_offset).
    """
    # The distance of the outermost centres in output voxels, and one: both ends are samples.
    new = int(np.round((n - 1) * spacing_mm / target_mm + 1))
    pad = max(size - new, 0) // 2
    crop = max(new, size) // 2 - size // 2
    centres = np.arange(new) * (target_mm / spacing_mm)
    return _sample_linear(pad, centres[crop : crop + size], n, target_mm)


def _sample_linear(first: int, centres: np.ndarray, n: int, spacing_mm: float) -> Axis:
    """Linear samples at source indices `centres` [i], edges repeated."""
    centres = centres.clip(0, n - 1)
    # Truncation is a floor here: indices are not negative after the clip.
    low = centres.astype(np.int64)
    fraction = (centres - low).astype(np.float32)
    taps = np.stack([low, np.minimum(low + 1, n - 1)], 1)
    weights = np.stack([1 - fraction, fraction], 1)
    return Axis(first=first, taps=taps, weights=weights, spacing_mm=spacing_mm)


def resample(
    axes: Sequence[Axis],
    slices: Iterable[np.ndarray],
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
    target: np.ndarray,
) -> None:
    """Fill `target` from source slices as they come. Only slices that a later output slice needs are kept in
    memory.

    Torch works on one thread meanwhile, which is faster here (see `_one_thread`). Several calls may run at
    once.

    Args:
        axes: of z, y and x.
        slices: [y, x] of any real type, along z in order; they are copied, not changed.
        before: applied to each float32 source slice [y, x]; may work in place.
        after: applied to each output slice [x, y]; may work in place.
        target: [z, y, x], as many as the axes' taps, of the dtype that `after` returns.
    Raises:
        ValueError: `target` has another shape, or the slices end before the last one that is needed.
    """
    size = tuple(len(a.taps) for a in axes)
    if target.shape != size:
        raise ValueError(f"resample: target must be {size} like the axes' taps, got {target.shape}")
    with _one_thread():
        _fill(axes, slices, before, after, target)


def _fill(
    axes: Sequence[Axis],
    slices: Iterable[np.ndarray],
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
    target: np.ndarray,
) -> None:
    """Resample along y once per source slice that is needed, then along z, then along x."""
    axis_z, axis_y, axis_x = axes
    # For each output slice k: {source slice: weight}.
    sources = [_nonzero_taps(*row) for row in zip(axis_z.taps, axis_z.weights, strict=True)]
    # How many output slices still need a source slice: it is dropped when none does.
    uses = Counter(i for weights in sources for i in weights)
    completed_by = defaultdict(list)  # source slice -> output slices of which it is the last source
    for k, weights in enumerate(sources):
        completed_by[max(weights)].append(k)
    planes: dict[int, Tensor] = {}
    for i, stored in enumerate(slices):
        # Slices of no weight are passed over without a resampling in the plane.
        if i in uses:
            plane = before(torch.from_numpy(stored.astype(np.float32, order="C")))
            planes[i] = _resample_rows(axis_y, plane)
        for k in completed_by.pop(i, ()):
            # Along z: a weighted sum of planes, which are at hand when the last of them has come.
            plane = torch.zeros(len(axis_y.taps), stored.shape[1])
            for j, weight in sources[k].items():
                plane.add_(planes[j], alpha=weight)
                uses[j] -= 1
            # [y, x] -> [x, y] and back: `_resample_rows` works along the first axis.
            plane = after(_resample_rows(axis_x, plane.t().contiguous()))
            target[k] = plane.numpy().T
        planes = {j: plane for j, plane in planes.items() if uses[j]}
    if completed_by:
        raise ValueError(
            f"resample: the slices must continue up to {max(completed_by)}, counted from 0; they end early"
        )


def _nonzero_taps(taps: np.ndarray, weights: np.ndarray) -> dict[int, float]:
    """{source slice: weight} of one output slice."""
    return {i: weight for i, weight in zip(taps.tolist(), weights.tolist(), strict=True) if weight}


def _resample_rows(axis: Axis, rows: Tensor) -> Tensor:
    """Each row of the result is a weighted sum of rows of the input, which is an embedding bag."""
    return F.embedding_bag(
        torch.from_numpy(axis.taps), rows, per_sample_weights=torch.from_numpy(axis.weights), mode="sum"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread.

    Thousands of operations of 0.1 ms gain nothing from threads, and on busy cores wait for them: measured 30
    to 90 times slower. The thread count is the process's, so the last of several running calls restores it.
    """
    with _LOCK:
        count = _counts[0] if _counts else torch.get_num_threads()
        _counts.append(count)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            count = _counts.pop()
            if not _counts:
                torch.set_num_threads(count)
