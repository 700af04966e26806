"""Maps of where an answer about a slide came from: pictures, a table and shapes for QuPath.

A map has one of two scales. "share" colours by relevance, over four powers of ten below the highest; lower
and negative values have the darkest colour. "percentile" colours by rank among the patches of the slide, as
most
published maps do: it always spans all colours, and where a few patches hold nearly all relevance, the others
look relevant too.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import asdict
from PIL import Image

from medvl.base import files
from medvl.language import images
from medvl.slides.geojson import to_geojson
from medvl.slides.map_canvas import Canvas, blend_colours, place_patches, sum_over_patches
from medvl.slides.map_colours import TISSUE, relevance_colours, relevance_level, slot_colours
from medvl.slides.map_drawing import (
    INK_RGB,
    Sheet,
    add_axes,
    draw_colour_bar,
    draw_marks,
    draw_shares,
    new_figure,
    render,
    show_pixels,
    text_width,
)
from medvl.slides.relevance import (
    TopPatch,
    as_relevance,
    as_routing_weights,
    mass_share,
    percentiles,
    top_patches,
)

# (x, y, side), all in level-0 pixels -> that square of the slide, of any resolution
Reader = Callable[[int, int, int], images.Picture]

# "1/10,000 or less" are the four decades of `map_colours.relevance_level`.
_SCALE_LABELS = {  # at the left, the middle and the right of the colour bar
    "share": ("1/10,000 or less", "1/100", "highest relevance"),
    "percentile": ("least relevant", "percentile of patches", "most relevant"),
}


# Pictures -----------------------------------------------------------------------------------------------
def draw_map(
    relevance: Any,
    coords: Any,
    patch_size: float,
    *,
    thumbnail: images.Picture | None = None,
    level0_size: tuple[int, int] | None = None,
    size: int = 1024,
    mpp: float | None = None,
    alpha: float | None = None,
    mark: int = 0,
    scale: Literal["share", "percentile"] = "share",
) -> Image.Image:
    """Heat map of a slide, averaged where patches overlap; the legend gives the share of the top patches.

    Args:
        relevance: [n].
        coords: (x, y) of the patches' upper left corners [n, 2] in level-0 pixels. None draws the patches
            as a grid in the order of the file, and says so.
        patch_size: side of a patch in level-0 pixels (256 at 20x of a 40x slide are 512).
        thumbnail: the whole slide, of any size; it stays visible where no patch is. None: a light canvas.
        level0_size: (width, height) in level-0 pixels, needed with a thumbnail. None: the patches' region.
        size: longer side of the map in pixels, without the legend below it.
        mpp: micrometres per level-0 pixel, for a scale bar.
        alpha: opacity of the colours; None: 0.4 over a thumbnail and 0.9 on the canvas.
        mark: number of top patches that are framed and numbered; one frame may surround several small ones.
        scale: see the module.
    Raises:
        ValueError: shapes; a patch that begins outside of the slide (coordinates of another level, or x and y
            exchanged); a thumbnail without level0_size or of another aspect; a thumbnail, level0_size or mpp
            without coords; sizes that are not above 0; another scale.
    """
    if scale not in _SCALE_LABELS:
        raise ValueError(f'draw_map: scale must be "share" or "percentile", got {scale!r}')
    r = as_relevance("draw_map", relevance)
    canvas = place_patches(
        "draw_map",
        len(r),
        coords,
        patch_size,
        thumbnail=thumbnail,
        level0_size=level0_size,
        size=size,
        mpp=mpp,
    )
    alpha = _opacity("draw_map", alpha, canvas, over_thumbnail=0.4)
    counts = sum_over_patches(canvas, np.ones(len(r)))
    colours = relevance_colours(_levels(canvas, r, counts, scale))
    overlay = blend_colours(canvas, colours, counts > 0, alpha)

    order = np.argsort(-r, kind="stable")
    text = _share_text(r, order) + _coords_note(canvas)
    font = max(10, size // 64)
    # Below the picture: the colour bar, its labels and the text.
    sheet = Sheet(canvas, legend_height=5.5 * font, min_width=text_width(text, font) + 2 * font)
    axes = sheet.draw_slide(canvas, overlay, mpp)
    draw_marks(axes, canvas, order[:mark])
    draw_colour_bar(sheet, font, _background(canvas, counts), alpha, _SCALE_LABELS[scale])
    sheet.write(font, sheet.legend_top + 3.5 * font, text, font)
    return sheet.render()


def draw_slots(
    weights: Any,
    coords: Any,
    patch_size: float,
    *,
    thumbnail: images.Picture | None = None,
    level0_size: tuple[int, int] | None = None,
    size: int = 1024,
    mpp: float | None = None,
    alpha: float | None = None,
) -> Image.Image:
    """Slot map: each patch has the colour of its strongest slot; below, the share of each slot in all
    weights.

    Where patches overlap, most of them decide, and the first slot on a tie. Patches without weight are
    grey. A slot has the same colour in every slide. Arguments and errors as `draw_map`, with weights [n, k]
    >= 0; alpha is 0.6 over a thumbnail if None.
    """
    w = as_routing_weights("draw_slots", weights)
    if 0 in w.shape:
        raise ValueError(f"draw_slots: needs at least one patch and one slot, got weights {list(w.shape)}")
    n, k = w.shape
    canvas = place_patches(
        "draw_slots",
        n,
        coords,
        patch_size,
        thumbnail=thumbnail,
        level0_size=level0_size,
        size=size,
        mpp=mpp,
    )
    alpha = _opacity("draw_slots", alpha, canvas, over_thumbnail=0.6)
    colours = np.array([*slot_colours(k), TISSUE], np.uint8)  # the last for patches without weight
    covered = sum_over_patches(canvas, np.ones(n)) > 0
    overlay = blend_colours(canvas, colours[_winning_slots(canvas, w)], covered, alpha)

    text = f"share of each slot in the weights, %; dotted: even; {n:,} patches" + _coords_note(canvas)
    font = max(10, size // 64)
    sheet = Sheet(canvas, legend_height=12 * font, min_width=text_width(text, font) + 2 * font)
    sheet.draw_slide(canvas, overlay, mpp)
    shares = w.sum(0)
    total = w.sum()
    if total:
        shares = shares / total
    draw_shares(sheet, font, shares)
    sheet.write(font, sheet.legend_top + 10 * font, text, font)
    return sheet.render()


def draw_top(
    patches: Sequence[TopPatch],
    patch_size: float,
    read_region: Reader | None,
    *,
    columns: int = 5,
    tile: int = 180,
) -> Image.Image | None:
    """The top patches cut from the slide, with rank, relevance and corner; None where there is no reader.

    Raises:
        ValueError: no patches, patches without coordinates, or columns, tile or patch_size not above 0.
    """
    if read_region is None:
        return None
    has_coords = all(patch.x is not None and patch.y is not None for patch in patches)
    if not patches or not has_coords or min(columns, tile, patch_size) <= 0:
        raise ValueError(
            "draw_top: needs patches with coordinates, columns, tile and patch_size > 0, "
            f"got {len(patches)} patches, {columns}, {tile}, {patch_size}"
        )
    font = max(10, tile // 14)
    gap = tile // 12
    step_x = tile + gap
    step_y = tile + gap + 3 * font  # two lines of text below each patch
    rows = math.ceil(len(patches) / columns)
    figure = new_figure(min(columns, len(patches)) * step_x + gap, rows * step_y + gap)
    for i, patch in enumerate(patches):
        left = gap + i % columns * step_x
        top = gap + i // columns * step_y
        assert patch.x is not None
        assert patch.y is not None
        region = images.to_rgb(read_region(patch.x, patch.y, round(patch_size)), "draw_top: read_region")
        axes = add_axes(figure, (left, top, left + tile, top + tile))
        # The reader may give any resolution of the square.
        resized = region.resize((tile, tile), Image.Resampling.LANCZOS)
        show_pixels(axes, np.asarray(resized))
        label = f"{patch.rank}   {patch.relevance:.3g}\n({patch.x:,}, {patch.y:,})"
        axes.text(0, tile + 2, label, fontsize=font, color=INK_RGB, va="top", linespacing=1.1)
    return render(figure)


def _levels(canvas: Canvas, relevance: np.ndarray, counts: np.ndarray, scale: str) -> np.ndarray:
    """Position on the colour scale, 0 to 1, of every pixel [y, x]; `counts` patches cover it."""
    values = percentiles(relevance) if scale == "percentile" else np.maximum(relevance, 0)
    levels = sum_over_patches(canvas, values) / np.maximum(counts, 1)
    # The mean of overlapping patches is taken of their relevance, not of positions on the logarithmic scale.
    if scale == "share":
        levels = relevance_level(levels)
    # Rounded, so that no colour depends on the order in which a sum was taken.
    return np.round(levels, 9)


def _background(canvas: Canvas, counts: np.ndarray) -> np.ndarray:
    """Mean colour [3] of what is below the patches."""
    if not canvas.has_thumbnail:
        return np.array(TISSUE)
    return canvas.image[counts > 0].mean(0)


def _coords_note(canvas: Canvas) -> str:
    # A grid looks like tissue: who sees the picture alone must be told that it is none.
    if canvas.has_coords:
        return ""
    return "; no coordinates: patches in the order of the file"


def _share_text(relevance: np.ndarray, order: np.ndarray) -> str:
    """What the most relevant patch and the top hundredth hold; `order` [n] are the patches, best first."""
    n = len(relevance)
    hundredth = math.ceil(n / 100)
    rank = np.argsort(order)  # the inverse of an order: the place of each patch in it
    first = 100 * mass_share(relevance, rank < 1)
    top = 100 * mass_share(relevance, rank < hundredth)
    if math.isnan(top):
        return "no patch has positive relevance"
    return f"patch 1 holds {first:.1f} % of the relevance, the top 1 % ({hundredth:,} of {n:,}) {top:.1f} %"


def _winning_slots(canvas: Canvas, weights: np.ndarray) -> np.ndarray:
    """For every pixel [y, x] the slot of most patches that cover it; k where none has weight."""
    k = weights.shape[1]
    slots = np.where(weights.any(1), weights.argmax(1), k)
    width, height = canvas.size
    winner = np.full((height, width), k)
    most = np.zeros((height, width))  # votes of the winner so far
    # From the first slot to the last, and a later one must have more votes: the first wins a tie.
    for slot in np.unique(slots[slots < k]):
        votes = sum_over_patches(canvas, (slots == slot).astype(float))
        winner[votes > most] = slot
        most = np.maximum(most, votes)
    return winner


def _opacity(caller: str, alpha: float | None, canvas: Canvas, over_thumbnail: float) -> float:
    if alpha is None:
        alpha = over_thumbnail if canvas.has_thumbnail else 0.9
    if not 0 <= alpha <= 1:
        raise ValueError(f"{caller}: alpha must be in 0..1, got {alpha}")
    return alpha


# Files --------------------------------------------------------------------------------------------------
def write_map(
    folder: files.PathLike,
    name: str,
    relevance: Any,
    weights: Any,
    coords: Any,
    patch_size: float,
    *,
    top: int = 15,
    read_region: Reader | None = None,
    offset: tuple[int, int] = (0, 0),
    **drawing: Any,
) -> Path:
    """Write the map of an answer into folder/name.

    Its files are map.png, slots.png and top.csv, with coords map.geojson (of all patches), and with a reader
    top.png.

    All content is made before the first file is written, and each file is written whole or not at all. A
    map.geojson or top.png of an earlier call that this one would not write is removed.

    Args:
        name: of the slide, a plain file name.
        relevance, weights, coords, patch_size: as `draw_map` and `draw_slots`.
        top: patches in top.csv and top.png, and framed in map.png.
        offset: of map.geojson, as `geojson.to_geojson`.
        drawing: thumbnail, level0_size, size, mpp, alpha.
    Returns:
        folder/name.
    Raises:
        ValueError: a name that is no plain file name, weights of other patches than relevance, or what the
            parts refuse.
    """
    files.check_name(name, "write_map: the slide")
    if len(weights) != len(relevance):
        raise ValueError(
            f"write_map: weights must be [{len(relevance)}, k], a row per patch of relevance, "
            f"got {len(weights)} rows"
        )
    best = top_patches(relevance, coords, top)
    pictures = {
        "map.png": draw_map(relevance, coords, patch_size, mark=top, **drawing),
        "slots.png": draw_slots(weights, coords, patch_size, **drawing),
        "top.png": draw_top(best, patch_size, read_region),
    }
    shapes = ""
    if coords is not None:
        features = to_geojson(relevance, coords, patch_size, offset=offset)
        shapes = json.dumps(features, allow_nan=False, separators=(",", ":"))

    target = Path(folder) / name
    for file, picture in pictures.items():
        _write_picture(target / file, picture)
    files.write_csv(target / "top.csv", map(asdict, best), TopPatch.__annotations__)
    if shapes:
        files.write_text(target / "map.geojson", shapes)
    else:
        (target / "map.geojson").unlink(missing_ok=True)
    return target


def _write_picture(path: Path, picture: Image.Image | None) -> None:
    if picture is None:
        path.unlink(missing_ok=True)
        return
    with files.atomic(path) as temporary:
        picture.save(temporary, format="PNG")
