"""Pictures of where an answer about a slide came from, drawn with matplotlib over the pixels of `map_canvas`, and their files."""

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
from medvl.slides.map_colours import INK, LINE, TISSUE, relevance_colours, relevance_level, slot_colours
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

_SCALE_LABELS = {  # at the left, the middle and the right of the colour bar
    "share": ("1/10,000 or less", "1/100", "highest relevance"),
    "percentile": ("least relevant", "percentile of patches", "most relevant"),
}
_NO_COORDS = "; no coordinates: patches in the order of the file"
_DPI = 72  # so that a point, the unit of fonts and lines, is a pixel
_SMALL = (
    12  # pixels: smaller patches are framed at a distance, so that they and their neighbours stay visible
)
_GREY = "#8C8C88"

Box = tuple[float, float, float, float]  # left, upper, right, lower in pixels


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
    """Heat map of a slide, averaged where patches overlap; the legend gives the share of the top patches in the relevance.

    "share" colours by relevance, over four powers of ten below the highest; lower and negative values have the
    darkest colour. "percentile" colours by rank among the patches of the slide, as most published maps do: it
    always spans all colours, and where a few patches hold nearly all relevance, the others look relevant too.

    Args:
        relevance: [n].
        coords: (x, y) of the patches' upper left corners [n, 2] in level-0 pixels. None draws the patches as a
            grid in the order of the file, and says so.
        patch_size: side of a patch in level-0 pixels (256 at 20x of a 40x slide are 512).
        thumbnail: the whole slide, of any size; it stays visible where no patch is. None: a light canvas with
            lines of coordinates.
        level0_size: (width, height) of the slide in level-0 pixels, needed with a thumbnail. None: the picture
            shows the region of the patches.
        size: longer side of the map in pixels, without the legend below it.
        mpp: micrometres per level-0 pixel, for a scale bar.
        alpha: opacity of the colours; None: 0.4 over a thumbnail and 0.9 on the canvas.
        mark: number of top patches that are framed and numbered where there is room; one frame may surround
            several small patches.
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
    values = percentiles(r) if scale == "percentile" else np.maximum(r, 0)
    levels = sum_over_patches(canvas, values) / np.maximum(counts, 1)
    if scale == "share":
        levels = relevance_level(levels)
    # Rounded, so that no colour depends on the order in which a sum was taken.
    overlay = blend_colours(canvas, relevance_colours(np.round(levels, 9)), counts > 0, alpha)

    order = np.argsort(-r, kind="stable")
    text = _share_text(r, order) + ("" if canvas.has_coords else _NO_COORDS)
    font = max(10, size // 64)
    sheet = _Sheet(canvas, legend_height=5.5 * font, min_width=_text_width(text, font) + 2 * font)
    axes = sheet.draw_slide(canvas, overlay, mpp)
    _draw_marks(axes, canvas, order[:mark])
    below = canvas.image[counts > 0].mean(0) if canvas.has_thumbnail else np.array(TISSUE)
    _draw_colour_bar(sheet, font, below, alpha, _SCALE_LABELS[scale])
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
    """Slot map: each patch has the colour of the slot with its greatest weight; below, the share of each slot in all weights.

    Where patches overlap, most of them decide, and the first slot on a tie. Patches without weight are grey. A
    slot has the same colour in every slide. Arguments and errors as `draw_map`, with weights [n, k] >= 0; alpha
    is 0.6 over a thumbnail if None.
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
    colours = np.array([*slot_colours(k), TISSUE], np.uint8)
    covered = sum_over_patches(canvas, np.ones(n)) > 0
    overlay = blend_colours(canvas, colours[_winning_slots(canvas, w)], covered, alpha)

    text = f"share of each slot in the weights, %; dotted: even; {n:,} patches"
    text += "" if canvas.has_coords else _NO_COORDS
    font = max(10, size // 64)
    sheet = _Sheet(canvas, legend_height=12 * font, min_width=_text_width(text, font) + 2 * font)
    sheet.draw_slide(canvas, overlay, mpp)
    total = w.sum()
    shares = w.sum(0) / total if total else w.sum(0)
    _draw_shares(sheet, font, shares)
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
    """The top patches cut from the slide, as a grid with rank, relevance and corner; None where there is no reader.

    Raises:
        ValueError: no patches, patches without coordinates, or columns, tile or patch_size not above 0.
    """
    if read_region is None:
        return None
    if not patches or any(p.x is None or p.y is None for p in patches) or min(columns, tile, patch_size) <= 0:
        raise ValueError(
            "draw_top: needs patches with coordinates, columns, tile and patch_size > 0, "
            f"got {len(patches)} patches, {columns}, {tile}, {patch_size}"
        )
    font, gap = max(10, tile // 14), tile // 12
    step_x, step_y = tile + gap, tile + gap + 3 * font
    rows = math.ceil(len(patches) / columns)
    figure = _new_figure(min(columns, len(patches)) * step_x + gap, rows * step_y + gap)
    for i, patch in enumerate(patches):
        left, top = gap + i % columns * step_x, gap + i // columns * step_y
        assert patch.x is not None
        assert patch.y is not None
        region = images.to_rgb(read_region(patch.x, patch.y, round(patch_size)), "draw_top: read_region")
        axes = _add_axes(figure, (left, top, left + tile, top + tile))
        _show(axes, np.asarray(region.resize((tile, tile), Image.Resampling.LANCZOS)))
        label = f"{patch.rank}   {patch.relevance:.3g}\n({patch.x:,}, {patch.y:,})"
        axes.text(0, tile + 2, label, fontsize=font, color=_rgb(INK), va="top", linespacing=1.1)
    return _render(figure)


def _share_text(relevance: np.ndarray, order: np.ndarray) -> str:
    """What the most relevant patch and the top hundredth hold; `order` [n] are the patches, best first."""
    n = len(relevance)
    hundredth = math.ceil(n / 100)
    rank = np.argsort(order)
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
    winner, most = np.full((height, width), k), np.zeros((height, width))
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


# Parts of a picture -------------------------------------------------------------------------------------
class _Sheet:
    """A figure with the picture of a slide, and room for a legend below it."""

    def __init__(self, canvas: Canvas, legend_height: float, min_width: float) -> None:
        width, height = canvas.size
        self.width = max(width, math.ceil(min_width))  # a narrow slide may have a wider legend
        self.legend_top = height
        left = (self.width - width) // 2
        self.slide: Box = (left, 0, left + width, height)
        self.figure = _new_figure(self.width, height + math.ceil(legend_height))

    def draw_slide(self, canvas: Canvas, overlay: np.ndarray, mpp: float | None) -> Any:
        """Draw the slide or the lines of coordinates, the colours over them, and a scale bar. Returns the axes."""
        axes = _add_axes(self.figure, self.slide)
        _show(axes, canvas.image, zorder=0)
        if canvas.has_coords and not canvas.has_thumbnail:
            _draw_coordinates(axes, canvas)
        _show(axes, overlay, zorder=2)
        if mpp is not None:
            _draw_scale_bar(axes, canvas, mpp)
        return axes

    def write(self, x: float, y: float, text: str, font: float, align: str = "left") -> None:
        """Write text with its upper edge at y, in pixels of the sheet."""
        height = self.figure.bbox.height
        self.figure.text(
            x / self.width, 1 - y / height, text, fontsize=font, color=_rgb(INK), ha=align, va="top"
        )

    def render(self) -> Image.Image:
        return _render(self.figure)


def _draw_coordinates(axes: Any, canvas: Canvas) -> None:
    """Lines at round level-0 coordinates with numbers at the upper and left edge, below the patches."""
    width, height = canvas.size
    font = max(10, max(width, height) // 80)
    step = _round_down(max(width, height) / canvas.scale / 5)
    style: dict[str, Any] = {
        "fontsize": font,
        "color": _GREY,
        "va": "top",
        "textcoords": "offset points",
        "zorder": 1,
    }
    for axis, length in enumerate((width, height)):
        origin = float(canvas.origin[axis])
        first = math.ceil(max(origin, 0.0) / step) * step
        for value in np.arange(first, origin + length / canvas.scale, step):
            pixel = (value - origin) * canvas.scale
            if axis == 0:
                axes.axvline(pixel, color=_rgb(LINE), linewidth=1, zorder=1)
                axes.annotate(f"{value:,.0f}", (pixel, 0), (3, -3), **style)
                continue
            axes.axhline(pixel, color=_rgb(LINE), linewidth=1, zorder=1)
            if pixel > 2 * font:  # the corner belongs to the first number of x
                axes.annotate(f"{value:,.0f}", (0, pixel), (3, -3), **style)


def _draw_marks(axes: Any, canvas: Canvas, best: np.ndarray) -> None:
    """Frame and number the patches `best`, best first."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    font = max(10, max(canvas.size) // 70)
    frames, numbers = list[Box](), list[Box]()
    for rank, (left, upper, right, lower) in enumerate(canvas.boxes[best].tolist(), 1):
        gap = 0 if right - left > _SMALL else 3
        frame = (left - gap, upper - gap, right + gap, lower + gap)
        if gap and _overlaps(frame, frames):
            continue  # a better patch's frame surrounds this one, too
        frames.append(frame)
        width, height = frame[2] - frame[0], frame[3] - frame[1]
        outline = withStroke(linewidth=4, foreground="black")
        rectangle = Rectangle(
            frame[:2], width, height, fill=False, edgecolor="white", linewidth=2, path_effects=[outline]
        )
        axes.add_patch(rectangle).set_zorder(3)
        # The number stands inside of a large patch and beside a small one.
        x, y = (left + 5, upper + 4) if right - left > 2.5 * font else (frame[2] + 3, frame[1] - 3)
        place = (x, y, x + 0.7 * font * len(str(rank)), y + font)
        if _overlaps(place, numbers):
            continue  # it would cover the number of a better patch
        numbers.append(place)
        halo = withStroke(linewidth=3, foreground="white")
        axes.text(x, y, str(rank), fontsize=font, va="top", clip_on=True, path_effects=[halo], zorder=4)


def _overlaps(box: Box, others: Sequence[Box]) -> bool:
    left, upper, right, lower = box
    return any(left < r and l < right and upper < b and t < lower for l, t, r, b in others)


def _draw_scale_bar(axes: Any, canvas: Canvas, mpp: float) -> None:
    from matplotlib.patches import Rectangle

    width, height = canvas.size
    um = _round_down(width / canvas.scale * mpp / 5)
    length = round(um / mpp * canvas.scale)
    text = f"{um / 1000:g} mm"
    edge = max(canvas.size) // 64
    font = max(10, edge)
    box_width = max(length, math.ceil(_text_width(text, font))) + edge
    box_height = math.ceil(1.3 * font) + edge
    left, top = width - box_width - edge // 2, height - box_height - edge // 2
    bar = left + (box_width - length) // 2
    style: dict[str, Any] = {"linewidth": 0, "zorder": 3, "antialiased": False}
    axes.add_patch(Rectangle((left, top), box_width, box_height, facecolor="white", **style))
    axes.add_patch(
        Rectangle((bar, top + box_height - edge // 2), length, edge // 4, facecolor=_rgb(INK), **style)
    )
    axes.text(
        left + box_width / 2,
        top + edge // 4,
        text,
        fontsize=font,
        color=_rgb(INK),
        ha="center",
        va="top",
        zorder=4,
    )


def _draw_colour_bar(
    sheet: _Sheet, font: int, below: np.ndarray, alpha: float, labels: tuple[str, str, str]
) -> None:
    """The colours as they look in the map: over the mean colour [3] of what is below the patches."""
    left, right, top = font, sheet.width - font, sheet.legend_top + font // 2
    levels = np.linspace(0, 1, right - left)
    colours = np.rint(relevance_colours(levels) * alpha + below * (1 - alpha)).astype(np.uint8)
    axes = _add_axes(sheet.figure, (left, top, right, top + font))
    _show(axes, np.repeat(colours[None], font, 0))
    ends = ((left, "left"), ((left + right) / 2, "center"), (right, "right"))
    for (x, align), label in zip(ends, labels, strict=True):
        sheet.write(x, top + 1.3 * font, label, font, align)


def _draw_shares(sheet: _Sheet, font: int, shares: np.ndarray) -> None:
    """Bars of the share of each slot [k], with a dotted line where all bars would end if all were equal."""
    k = len(shares)
    left, right, top = font, sheet.width - font, sheet.legend_top + font
    axes = _add_axes(sheet.figure, (left, top, right, top + 7 * font))
    axes.set_axis_on()
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    bars = axes.bar(range(k), 100 * shares, width=0.85, align="edge", color=slot_colours(k) / 255)
    axes.axhline(100 / k, color=_rgb(INK), linewidth=1, linestyle=":")
    axes.set_xlim(0, k)
    axes.set_ylim(0, 125 * (float(shares.max()) or 1.0))  # room for the numbers on the bars
    axes.set_yticks([])
    step = (right - left) / k  # pixels per slot
    every = math.ceil(_text_width("00 ", font) / step)
    slots = range(0, k, every)
    axes.set_xticks([slot + 0.42 for slot in slots], [str(slot) for slot in slots])
    axes.tick_params(length=0, labelsize=font, labelcolor=_rgb(INK))
    small = 0.8 * font
    if step > _text_width("00.0 ", small):
        axes.bar_label(bars, fmt="%.1f", fontsize=small, color=_rgb(INK), padding=1)


def _new_figure(width: int, height: int) -> Any:
    from matplotlib.figure import Figure

    return Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")


def _add_axes(figure: Any, box: Box) -> Any:
    """Axes without frame or ticks at a box in pixels, counted from the upper left corner."""
    width, height = figure.bbox.size
    left, upper, right, lower = box
    axes = figure.add_axes(
        (left / width, 1 - lower / height, (right - left) / width, (lower - upper) / height)
    )
    axes.set_axis_off()
    return axes


def _show(axes: Any, pixels: np.ndarray, zorder: int = 0) -> None:
    """Show an array [y, x, 3 or 4] pixel by pixel; the axes, which have its size, count in its pixels."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto", interpolation="nearest", zorder=zorder)


def _render(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    agg = FigureCanvasAgg(figure)
    agg.draw()
    return Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3].copy())


def _text_width(text: str, font: float) -> float:
    """Width of a line of text in pixels."""
    from matplotlib.textpath import TextPath

    return float(np.ptp(TextPath((0, 0), text, size=font).vertices[:, 0]))


def _rgb(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(value / 255 for value in colour)


def _round_down(value: float) -> float:
    """The greatest of ..., 0.5, 1, 2, 5, 10, 20, ... that is not above a value."""
    tens = 10.0 ** math.floor(math.log10(value))
    for factor in (5, 2):
        if factor * tens <= value:
            return factor * tens
    return tens


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
    """Write map.png, slots.png, top.csv, with coords map.geojson (of all patches), with a reader top.png into folder/name.

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
        ValueError: a name that is no plain file name, weights of other patches than relevance, or what the parts
            refuse.
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
