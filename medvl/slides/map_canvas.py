"""The picture of a slide as an array of pixels: where its patches are, and sums of what covers each pixel."""

import math
from typing import Any

import numpy as np
from attrs import frozen
from PIL import Image

from medvl.language import images
from medvl.slides.map_colours import PAPER, TISSUE
from medvl.slides.relevance import as_coords

_MARGIN = 0.07  # of the longer side, around patches on a canvas: room for the coordinates


@frozen(kw_only=True, eq=False)
class Canvas:
    """Where the n patches of a slide are in a picture."""

    image: np.ndarray  # uint8 [y, x, 3], what is below the colours
    boxes: np.ndarray  # int [n, 4] (left, upper, right, lower), in pixels of the picture
    origin: np.ndarray  # (x, y) of the upper left corner in level-0 pixels
    scale: float  # pixels of the picture per level-0 pixel
    has_thumbnail: bool
    has_coords: bool

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        height, width = self.image.shape[:2]
        return width, height


def place_patches(
    caller: str,
    n: int,
    coords: Any,
    patch_size: float,
    *,
    thumbnail: images.Picture | None = None,
    level0_size: Any = None,
    size: int,
    mpp: float | None = None,
) -> Canvas:
    """Lay out n patches in a picture of `size` pixels; arguments and errors as `maps.draw_map`."""
    _check_arguments(caller, coords, patch_size, thumbnail, level0_size, size, mpp)
    # Upper left corners of the patches in level-0 pixels [n, 2].
    if coords is None:  # a square grid in the order of the file
        columns = math.ceil(math.sqrt(n))
        order = np.arange(n)
        xy = np.stack([order % columns, order // columns], 1) * float(patch_size)
        margin = 0.0
    else:
        xy = as_coords(caller, coords, n)
        longer_side = float(np.ptp(xy, axis=0).max())
        margin = max(float(patch_size), _MARGIN * longer_side)
    # The region that is shown, in level-0 pixels: the complete slide, or the patches with a margin.
    if level0_size is None:
        origin = xy.min(0) - margin
        extent = np.ptp(xy, axis=0) + patch_size + 2 * margin
    else:
        origin = np.zeros(2)
        extent = np.asarray(level0_size, float)
        _check_inside(caller, xy, extent)

    scale = size / float(extent.max())
    # A long and narrow region has a pixel at least.
    width = max(1, round(float(extent[0]) * scale))
    height = max(1, round(float(extent[1]) * scale))
    if thumbnail is None:
        image = np.full((height, width, 3), PAPER, np.uint8)
    else:
        image = _fit_thumbnail(caller, thumbnail, (width, height), extent)
    # Both corners are rounded alike: where patches touch, there is neither a gap nor an overlap.
    first = np.rint((xy - origin) * scale).astype(int)
    last = np.rint((xy + patch_size - origin) * scale).astype(int)
    first = np.minimum(first, [width - 1, height - 1])
    last = np.minimum(np.maximum(last, first + 1), [width, height])  # at least one pixel per patch
    return Canvas(
        image=image,
        boxes=np.hstack([first, last]),
        origin=origin,
        scale=scale,
        has_thumbnail=thumbnail is not None,
        has_coords=coords is not None,
    )


def sum_over_patches(canvas: Canvas, values: np.ndarray) -> np.ndarray:
    """For every pixel [y, x] the sum of the values [n] of the patches that cover it.

    Each value is added and subtracted at the corners of its patch, and summed up along both axes: the time
    does not depend on the size of the patches.
    """
    width, height = canvas.size
    row = width + 1  # one more than pixels, as right and lower edges lie behind the last pixel
    left, upper, right, lower = canvas.boxes.T
    # Added at the upper left and the lower right corner, subtracted at the two others.
    corners = np.concatenate(
        [upper * row + left, lower * row + right, upper * row + right, lower * row + left]
    )
    steps = np.concatenate([values, values, -values, -values])
    sums = np.bincount(corners, steps, (height + 1) * row)
    sums = sums.reshape(height + 1, row)
    return sums.cumsum(0).cumsum(1)[:-1, :-1]


def blend_colours(canvas: Canvas, colours: np.ndarray, covered: np.ndarray, alpha: float) -> np.ndarray:
    """uint8 RGBA [y, x, 4]: colours [y, x, 3] over the slide, transparent where no patch is (`covered`)."""
    # The canvas is nearly white, and colours mixed with it would be pale: they are mixed with a grey.
    below = canvas.image if canvas.has_thumbnail else np.array(TISSUE, np.uint8)
    mixed = np.rint(below * (1 - alpha) + colours * alpha).astype(np.uint8)
    opacity = np.where(covered, 255, 0).astype(np.uint8)
    return np.dstack([mixed, opacity])


def _check_arguments(
    caller: str,
    coords: Any,
    patch_size: float,
    thumbnail: Any,
    level0_size: Any,
    size: int,
    mpp: float | None,
) -> None:
    is_mpp = mpp is None or 0 < mpp < math.inf
    if not (0 < patch_size < math.inf and size >= 64 and is_mpp):
        raise ValueError(
            f"{caller}: patch_size and mpp must be > 0 and size >= 64, got {patch_size}, {mpp} and {size}"
        )
    if coords is None and not (thumbnail is None and level0_size is None and mpp is None):
        raise ValueError(
            f"{caller}: without coords patches have no place: thumbnail, level0_size and mpp must be None too"
        )
    if thumbnail is not None and level0_size is None:
        raise ValueError(
            f"{caller}: a thumbnail needs level0_size, the (width, height) of the slide in level-0 pixels, "
            "got None"
        )


def _check_inside(caller: str, xy: np.ndarray, extent: np.ndarray) -> None:
    if extent.shape != (2,) or not (np.isfinite(extent).all() and (extent > 0).all()):
        raise ValueError(f"{caller}: level0_size must be (width, height) > 0, got {extent.tolist()}")
    # Where a patch ends is not checked: at the right and lower edge tiles may reach beyond the slide.
    outside = ((xy < 0) | (xy >= extent)).any(1)
    if outside.any():
        first = xy[outside.argmax()].tolist()
        raise ValueError(
            f"{caller}: patches must begin inside of the slide, {extent.tolist()} level-0 pixels, "
            f"got {outside.sum():,} of {len(xy):,}, the first {first} outside; "
            "are these coordinates of level 0, as (x, y), of this slide?"
        )


def _fit_thumbnail(
    caller: str, thumbnail: images.Picture, size: tuple[int, int], extent: np.ndarray
) -> np.ndarray:
    picture = images.to_rgb(thumbnail, f"{caller}: thumbnail")
    slide_aspect = extent[0] / extent[1]
    picture_aspect = picture.width / picture.height
    tolerance = 0.02 + 1 / min(picture.size)  # the sides of a thumbnail are rounded to whole pixels
    # By logarithm: twice as wide and half as wide are equally far off.
    if abs(math.log(slide_aspect / picture_aspect)) > tolerance:
        raise ValueError(
            f"{caller}: the thumbnail must show the whole slide, {extent[0]:g} x {extent[1]:g}, "
            f"got one of {picture.width} x {picture.height}: another aspect"
        )
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
