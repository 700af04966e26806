"""Parts of the picture of a slide, drawn with matplotlib: the sheet, coordinates, frames, scale bar and legends."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from medvl.slides.map_canvas import Canvas
from medvl.slides.map_colours import INK, LINE, relevance_colours, slot_colours

INK_RGB = tuple(value / 255 for value in INK)
_LINE_RGB = tuple(value / 255 for value in LINE)
_GREY = "#8C8C88"
_DPI = 72  # so that a point, the unit of fonts and lines, is a pixel
# Smaller patches, in pixels, are framed at a distance, so that they and their neighbours stay visible.
_SMALL = 12

Box = tuple[float, float, float, float]  # left, upper, right, lower in pixels


class Sheet:
    """A figure with the picture of a slide, and room for a legend below it."""

    def __init__(self, canvas: Canvas, legend_height: float, min_width: float) -> None:
        width, height = canvas.size
        self.width = max(width, math.ceil(min_width))  # a narrow slide may have a wider legend
        self.legend_top = height
        left = (self.width - width) // 2
        self.slide: Box = (left, 0, left + width, height)
        self.figure = new_figure(self.width, height + math.ceil(legend_height))

    def draw_slide(self, canvas: Canvas, overlay: np.ndarray, mpp: float | None) -> Any:
        """Draw the slide or lines of coordinates, the colours over them, and a scale bar; returns the axes."""
        axes = add_axes(self.figure, self.slide)
        show_pixels(axes, canvas.image, zorder=0)
        if canvas.has_coords and not canvas.has_thumbnail:
            _draw_coordinates(axes, canvas)
        show_pixels(axes, overlay, zorder=2)
        if mpp is not None:
            _draw_scale_bar(axes, canvas, mpp)
        return axes

    def write(self, x: float, y: float, text: str, font: float, align: str = "left") -> None:
        """Write text with its upper edge at y, in pixels of the sheet."""
        height = self.figure.bbox.height
        self.figure.text(
            x / self.width, 1 - y / height, text, fontsize=font, color=INK_RGB, ha=align, va="top"
        )

    def render(self) -> Image.Image:
        return render(self.figure)


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
                axes.axvline(pixel, color=_LINE_RGB, linewidth=1, zorder=1)
                axes.annotate(f"{value:,.0f}", (pixel, 0), (3, -3), **style)
                continue
            axes.axhline(pixel, color=_LINE_RGB, linewidth=1, zorder=1)
            if pixel > 2 * font:  # the corner belongs to the first number of x
                axes.annotate(f"{value:,.0f}", (0, pixel), (3, -3), **style)


def draw_marks(axes: Any, canvas: Canvas, best: np.ndarray) -> None:
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
    box_width = max(length, math.ceil(text_width(text, font))) + edge
    box_height = math.ceil(1.3 * font) + edge
    left, top = width - box_width - edge // 2, height - box_height - edge // 2
    bar = left + (box_width - length) // 2
    style: dict[str, Any] = {"linewidth": 0, "zorder": 3, "antialiased": False}
    axes.add_patch(Rectangle((left, top), box_width, box_height, facecolor="white", **style))
    axes.add_patch(
        Rectangle((bar, top + box_height - edge // 2), length, edge // 4, facecolor=INK_RGB, **style)
    )
    axes.text(
        left + box_width / 2,
        top + edge // 4,
        text,
        fontsize=font,
        color=INK_RGB,
        ha="center",
        va="top",
        zorder=4,
    )


def draw_colour_bar(
    sheet: Sheet, font: int, below: np.ndarray, alpha: float, labels: tuple[str, str, str]
) -> None:
    """The colours as they look in the map: over the mean colour [3] of what is below the patches."""
    left, right, top = font, sheet.width - font, sheet.legend_top + font // 2
    levels = np.linspace(0, 1, right - left)
    colours = np.rint(relevance_colours(levels) * alpha + below * (1 - alpha)).astype(np.uint8)
    axes = add_axes(sheet.figure, (left, top, right, top + font))
    show_pixels(axes, np.repeat(colours[None], font, 0))
    ends = ((left, "left"), ((left + right) / 2, "center"), (right, "right"))
    for (x, align), label in zip(ends, labels, strict=True):
        sheet.write(x, top + 1.3 * font, label, font, align)


def draw_shares(sheet: Sheet, font: int, shares: np.ndarray) -> None:
    """Bars of the share of each slot [k], with a dotted line where all bars would end if all were equal."""
    k = len(shares)
    left, right, top = font, sheet.width - font, sheet.legend_top + font
    axes = add_axes(sheet.figure, (left, top, right, top + 7 * font))
    axes.set_axis_on()
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    bars = axes.bar(range(k), 100 * shares, width=0.85, align="edge", color=slot_colours(k) / 255)
    axes.axhline(100 / k, color=INK_RGB, linewidth=1, linestyle=":")
    axes.set_xlim(0, k)
    axes.set_ylim(0, 125 * (float(shares.max()) or 1.0))  # room for the numbers on the bars
    axes.set_yticks([])
    step = (right - left) / k  # pixels per slot
    every = math.ceil(text_width("00 ", font) / step)
    slots = range(0, k, every)
    axes.set_xticks([slot + 0.42 for slot in slots], [str(slot) for slot in slots])
    axes.tick_params(length=0, labelsize=font, labelcolor=INK_RGB)
    small = 0.8 * font
    if step > text_width("00.0 ", small):
        axes.bar_label(bars, fmt="%.1f", fontsize=small, color=INK_RGB, padding=1)


def new_figure(width: int, height: int) -> Any:
    from matplotlib.figure import Figure

    return Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")


def add_axes(figure: Any, box: Box) -> Any:
    """Axes without frame or ticks at a box in pixels, counted from the upper left corner."""
    width, height = figure.bbox.size
    left, upper, right, lower = box
    axes = figure.add_axes(
        (left / width, 1 - lower / height, (right - left) / width, (lower - upper) / height)
    )
    axes.set_axis_off()
    return axes


def show_pixels(axes: Any, pixels: np.ndarray, zorder: int = 0) -> None:
    """Show an array [y, x, 3 or 4] pixel by pixel; the axes, which have its size, count in its pixels."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto", interpolation="nearest", zorder=zorder)


def render(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    agg = FigureCanvasAgg(figure)
    agg.draw()
    return Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3].copy())


def text_width(text: str, font: float) -> float:
    """Width of a line of text in pixels."""
    from matplotlib.textpath import TextPath

    return float(np.ptp(TextPath((0, 0), text, size=font).vertices[:, 0]))


def _round_down(value: float) -> float:
    """The greatest of ..., 0.5, 1, 2, 5, 10, 20, ... that is not above a value."""
    tens = 10.0 ** math.floor(math.log10(value))
    for factor in (5, 2):
        if factor * tens <= value:
            return factor * tens
    return tens
