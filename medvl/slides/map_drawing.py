"""Parts of the picture of a slide, drawn with matplotlib: the sheet, coordinates, frames, scale bar and
legends.
"""

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
        # The slide stands in the middle of a wider sheet.
        left = (self.width - width) // 2
        self.slide: Box = (left, 0, left + width, height)
        full_height = height + math.ceil(legend_height)
        self.figure = new_figure(self.width, full_height)

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
        # matplotlib counts in shares of the figure, y from the bottom.
        share_x = x / self.width
        share_y = 1 - y / self.figure.bbox.height
        self.figure.text(share_x, share_y, text, fontsize=font, color=INK_RGB, ha=align, va="top")

    def render(self) -> Image.Image:
        return render(self.figure)


def _draw_coordinates(axes: Any, canvas: Canvas) -> None:
    """Lines at round level-0 coordinates with numbers at the upper and left edge, below the patches."""
    longer_side = max(canvas.size)
    font = max(10, longer_side // 80)
    # About five lines along the longer side; `scale` turns level-0 pixels into pixels of the picture.
    step = _round_down(longer_side / canvas.scale / 5)
    line_style: dict[str, Any] = {"color": _LINE_RGB, "linewidth": 1, "zorder": 1}
    number_style: dict[str, Any] = {
        "xytext": (3, -3),
        "textcoords": "offset points",
        "fontsize": font,
        "color": _GREY,
        "va": "top",
        "zorder": 1,
    }
    for value, x in _round_coordinates(canvas, 0, step):
        axes.axvline(x, **line_style)
        axes.annotate(f"{value:,.0f}", (x, 0), **number_style)
    for value, y in _round_coordinates(canvas, 1, step):
        axes.axhline(y, **line_style)
        if y > 2 * font:  # the corner belongs to the first number of x
            axes.annotate(f"{value:,.0f}", (0, y), **number_style)


def _round_coordinates(canvas: Canvas, axis: int, step: float) -> list[tuple[float, float]]:
    """(level-0 coordinate, its pixel in the picture) of every multiple of `step`, along x (0) or y (1)."""
    origin = float(canvas.origin[axis])
    # The picture may begin before the slide, by its margin; there are no coordinates below 0.
    first = math.ceil(max(origin, 0.0) / step) * step
    end = origin + canvas.size[axis] / canvas.scale
    places = []
    for value in np.arange(first, end, step).tolist():
        pixel = (value - origin) * canvas.scale
        places.append((value, pixel))
    return places


def draw_marks(axes: Any, canvas: Canvas, best: np.ndarray) -> None:
    """Frame and number the patches `best`, best first."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    font = max(10, max(canvas.size) // 70)
    # White on a black outline is seen on any colour of the map and of the slide.
    outline = withStroke(linewidth=4, foreground="black")
    frame_style: dict[str, Any] = {
        "fill": False,
        "edgecolor": "white",
        "linewidth": 2,
        "path_effects": [outline],
    }
    halo = withStroke(linewidth=3, foreground="white")
    number_style: dict[str, Any] = {
        "fontsize": font,
        "va": "top",
        "clip_on": True,
        "path_effects": [halo],
        "zorder": 4,
    }
    frames = list[Box]()
    numbers = list[Box]()
    for rank, patch in enumerate(canvas.boxes[best].tolist(), 1):
        left, upper, right, lower = patch
        is_small = right - left <= _SMALL
        gap = 3 if is_small else 0
        frame = (left - gap, upper - gap, right + gap, lower + gap)
        if is_small and _overlaps(frame, frames):
            continue  # a better patch's frame surrounds this one, too
        frames.append(frame)
        width = right - left + 2 * gap
        height = lower - upper + 2 * gap
        rectangle = Rectangle(frame[:2], width, height, **frame_style)
        axes.add_patch(rectangle).set_zorder(3)
        text = str(rank)
        place = _place_number(text, font, patch, frame)
        if _overlaps(place, numbers):
            continue  # it would cover the number of a better patch
        numbers.append(place)
        axes.text(place[0], place[1], text, **number_style)


def _place_number(text: str, font: float, patch: Box, frame: Box) -> Box:
    """Where a number is written: inside of a large patch and beside a small one."""
    left, upper, right, _ = patch
    if right - left > 2.5 * font:
        x = left + 5
        y = upper + 4
    else:
        x = frame[2] + 3
        y = frame[1] - 3
    length = 0.7 * font * len(text)  # a digit is about 0.7 of the font's size wide
    return x, y, x + length, y + font


def _overlaps(box: Box, others: Sequence[Box]) -> bool:
    left, upper, right, lower = box
    for other_left, other_upper, other_right, other_lower in others:
        in_x = left < other_right and other_left < right
        in_y = upper < other_lower and other_upper < lower
        if in_x and in_y:
            return True
    return False


def _draw_scale_bar(axes: Any, canvas: Canvas, mpp: float) -> None:
    from matplotlib.patches import Rectangle

    width, height = canvas.size
    width_um = width / canvas.scale * mpp
    um = _round_down(width_um / 5)  # micrometres, at most a fifth of the width
    length = round(um / mpp * canvas.scale)  # in pixels of the picture
    text = f"{um / 1000:g} mm"
    edge = max(canvas.size) // 64
    font = max(10, edge)

    # A white box in the lower right corner holds the text and below it the bar.
    box_width = max(length, math.ceil(text_width(text, font))) + edge
    box_height = math.ceil(1.3 * font) + edge
    left = width - box_width - edge // 2
    top = height - box_height - edge // 2
    bar_left = left + (box_width - length) // 2
    bar_top = top + box_height - edge // 2
    # Not antialiased, so that the bar has exactly its length.
    style: dict[str, Any] = {"linewidth": 0, "zorder": 3, "antialiased": False}
    box = Rectangle((left, top), box_width, box_height, facecolor="white", **style)
    bar = Rectangle((bar_left, bar_top), length, edge // 4, facecolor=INK_RGB, **style)
    axes.add_patch(box)
    axes.add_patch(bar)
    middle = left + box_width / 2
    axes.text(
        middle,
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
    left = font
    right = sheet.width - font
    top = sheet.legend_top + font // 2
    levels = np.linspace(0, 1, right - left)  # one per pixel of the bar
    # Mixed as `blend_colours` mixes the map: a pure colour of the scale is nowhere in it.
    mixed = relevance_colours(levels) * alpha + below * (1 - alpha)
    colours = np.rint(mixed).astype(np.uint8)  # [width, 3]
    pixels = np.repeat(colours[None], font, 0)  # [font, width, 3]
    axes = add_axes(sheet.figure, (left, top, right, top + font))
    show_pixels(axes, pixels)
    label_top = top + 1.3 * font
    low, middle, high = labels
    sheet.write(left, label_top, low, font, "left")
    sheet.write((left + right) / 2, label_top, middle, font, "center")
    sheet.write(right, label_top, high, font, "right")


def draw_shares(sheet: Sheet, font: int, shares: np.ndarray) -> None:
    """Bars of the share of each slot [k], with a dotted line where all bars would end if all were equal."""
    k = len(shares)
    left = font
    right = sheet.width - font
    top = sheet.legend_top + font
    axes = add_axes(sheet.figure, (left, top, right, top + 7 * font))
    axes.set_axis_on()  # for the numbers of the slots; there is no frame
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)

    percent = 100 * shares
    colours = slot_colours(k) / 255
    bars = axes.bar(range(k), percent, width=0.85, align="edge", color=colours)
    axes.axhline(100 / k, color=INK_RGB, linewidth=1, linestyle=":")
    axes.set_xlim(0, k)
    highest = float(shares.max()) or 1.0  # all 0: the axis needs a length all the same
    axes.set_ylim(0, 125 * highest)  # in %, with a quarter more for the numbers on the bars
    axes.set_yticks([])

    step = (right - left) / k  # pixels per slot
    every = math.ceil(text_width("00 ", font) / step)  # slots from one number to the next
    slots = np.arange(0, k, every)
    middles = slots + 0.42  # of bars of width 0.85
    axes.set_xticks(middles, slots.astype(str))
    axes.tick_params(length=0, labelsize=font, labelcolor=INK_RGB)
    small = 0.8 * font
    if step > text_width("00.0 ", small):
        axes.bar_label(bars, fmt="%.1f", fontsize=small, color=INK_RGB, padding=1)


def new_figure(width: int, height: int) -> Any:
    from matplotlib.figure import Figure

    inches = (width / _DPI, height / _DPI)
    return Figure(inches, dpi=_DPI, facecolor="white")


def add_axes(figure: Any, box: Box) -> Any:
    """Axes without frame or ticks at a box in pixels, counted from the upper left corner."""
    width, height = figure.bbox.size
    left, upper, right, lower = box
    # matplotlib counts in shares of the figure, y from the bottom.
    x = left / width
    y = 1 - lower / height
    share_x = (right - left) / width
    share_y = (lower - upper) / height
    axes = figure.add_axes((x, y, share_x, share_y))
    axes.set_axis_off()
    return axes


def show_pixels(axes: Any, pixels: np.ndarray, zorder: int = 0) -> None:
    """Show an array [y, x, 3 or 4] pixel by pixel; the axes, which have its size, count in its pixels."""
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)  # y downwards, as in the array
    axes.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest", zorder=zorder)


def render(figure: Any) -> Image.Image:
    """The picture of a figure, RGB."""
    # The canvas directly, without pyplot: no window, and no state that is shared with the user's own plots.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    agg = FigureCanvasAgg(figure)
    agg.draw()
    pixels = np.asarray(agg.buffer_rgba())
    return Image.fromarray(pixels[..., :3].copy())  # a copy: the buffer is the canvas's


def text_width(text: str, font: float) -> float:
    """Width of a line of text in pixels."""
    from matplotlib.textpath import TextPath

    outline = TextPath((0, 0), text, size=font).vertices  # [points, 2]
    return float(np.ptp(outline[:, 0]))


def _round_down(value: float) -> float:
    """The greatest of ..., 0.5, 1, 2, 5, 10, 20, ... that is not above a value."""
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (5, 2):
        if factor * power <= value:
            return factor * power
    return power
