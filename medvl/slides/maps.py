"""Where an answer about a slide came from, to be looked at: drawn over the slide, listed, and as shapes for QuPath."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import asdict, frozen
from PIL import Image, ImageDraw, ImageFont

from medvl.base import files
from medvl.language import images
from medvl.slides.relevance import (
    TopPatch,
    as_coords,
    as_relevance,
    as_routing_weights,
    mass_share,
    percentiles,
    top_patches,
)

Reader = Callable[
    [int, int, int], images.Picture
]  # (x, y, side), all in level-0 pixels -> that square of the slide, of any resolution
# Least share of the highest relevance of each class of `to_geojson`. As in the picture: by rank, where one patch holds all the relevance,
# half of those that hold nothing would be an "upper half".
CLASSES = (
    ("Relevance under 1/1000 of the highest", 0.0),
    ("Relevance over 1/1000 of the highest", 1e-3),
    ("Relevance over 1/100 of the highest", 1e-2),
    ("Relevance over 1/10 of the highest", 0.1),
)
_ENDS = {
    "share": ("1/10,000 or less", "1/100", "highest relevance"),
    "percentile": ("least relevant", "percentile of patches", "most relevant"),
}
_PAPER, _LINE, _TISSUE, _INK = (250, 250, 248), (226, 226, 222), (200, 200, 200), (34, 34, 34)
# Of slots: Okabe and Ito's, then each the colour farthest from those before it (the least CIE Lab distance with normal, protan and deutan
# vision, Machado et al. 2009), from grey and from white; of 16 the nearest two are 17 apart, of 32 14.
_SLOTS = bytes.fromhex("""
0072B2 E69F00 009E73 CC79A7 56B4E9 D55E00 F0E442 0000FF 691E00 B4F096 4B2D4B 2D1EA5 5A78FF E10F4B 2D2D78 FF965A
87E1FF 3C4BF0 78D296 963C00 4B96F0 4B693C 964B78 4B2D2D D200B4 0000C3 C3F069 693C78 963CD2 D2693C B4F0C3 3CB4C3
""")


# Pictures -------------------------------------------------------------------------------------------------------------------------------
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
    """Heat map of a slide, averaged where patches overlap; the legend says what share of the relevance the top patches hold.

    "share" colours by relevance, over four powers of ten below the highest; what is lower, or below 0, has the darkest colour.
    "percentile" colours by the rank among the slide's patches, as most published maps do: it spans all colours however even the relevance
    is, and where a few patches hold nearly all, the rest is as bright as if it counted.

    Args:
        relevance: [n].
        coords: (x, y) of the patches' upper left corners [n, 2] in level-0 pixels. None draws the patches in the order of the file, as
            a grid, and says so.
        patch_size: side of a patch in level-0 pixels (256 at 20x of a 40x slide are 512).
        thumbnail: the whole slide, of any size; what no patch covers stays as it is. None: a light canvas with lines of coordinates.
        level0_size: (width, height) of the slide in level-0 pixels, needed with a thumbnail. None: the canvas is where patches are.
        size: longer side of the map in pixels; the legend comes below.
        mpp: micrometres per level-0 pixel, for a scale bar.
        alpha: opacity of the colours, 0.4 over a thumbnail and 0.9 on the canvas if None.
        mark: that many top patches are framed and numbered, as far as there is room; one frame may be around several small patches.
    Raises:
        ValueError: shapes; a patch that begins outside of the slide (coordinates of another level, or x and y exchanged); a thumbnail
            without level0_size or of another aspect; a thumbnail, level0_size or mpp without coords; sizes that are not above 0;
            another scale.
    """
    if scale not in _ENDS:
        raise ValueError(f'draw_map: scale must be "share" or "percentile", got {scale!r}')
    r = as_relevance("draw_map", relevance)
    canvas = _canvas("draw_map", len(r), coords, patch_size, thumbnail, level0_size, size, mpp)
    covered = _sums(canvas, np.ones(len(r)))
    mean = _sums(canvas, percentiles(r) if scale == "percentile" else np.maximum(r, 0)) / np.maximum(
        covered, 1
    )
    mean = np.round(
        mean if scale == "percentile" else _level(mean), 9
    )  # so that no colour hangs on the order of a sum
    alpha = _opacity("draw_map", alpha, canvas)
    picture = _blend(canvas, _colours()(mean, bytes=True)[..., :3], covered > 0, alpha)
    below = canvas.image[covered > 0].mean(0) if canvas.real else np.array(_TISSUE)
    _draw_marks(picture, canvas, np.argsort(-r, kind="stable")[:mark])
    _draw_scale(picture, canvas, mpp)
    most, best = math.ceil(len(r) / 100), np.argsort(-r, kind="stable")
    first, share = (100 * mass_share(r, np.isin(np.arange(len(r)), best[:n])) for n in (1, most))
    held = (
        "no patch has positive relevance"
        if math.isnan(share)
        else f"patch 1 holds {first:.1f} % of the relevance, the top 1 % ({most:,} of {len(r):,}) {share:.1f} %"
    )
    return _stacked(picture, _map_legend(picture.width, size, held + canvas.note, below, alpha, _ENDS[scale]))


def _level(relevance: np.ndarray) -> np.ndarray:
    """0 to 1: from a ten-thousandth of the highest, or less, to the highest."""
    highest = relevance.max(initial=0)
    return (
        1 + np.log10(np.maximum(relevance / highest, 1e-4)) / 4 if highest > 0 else np.zeros_like(relevance)
    )


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
    """Slot map: each patch has the colour of the slot where its weight is greatest; below, the share of each slot in all weights.

    Where patches overlap most of them decide, the first slot on a tie. Patches without weight are grey. A slot has the same colour
    in every slide. Arguments and errors as `draw_map`, with weights [n, k] >= 0; alpha 0.6 over a thumbnail if None.
    """
    w = as_routing_weights("draw_slots", weights)
    if 0 in w.shape:
        raise ValueError(f"draw_slots: needs at least one patch and one slot, got weights {list(w.shape)}")
    canvas = _canvas("draw_slots", len(w), coords, patch_size, thumbnail, level0_size, size, mpp)
    strongest = np.where(w.any(1), w.argmax(1), w.shape[1])  # k = none
    most, chosen = np.zeros(canvas.image.shape[:2]), np.full(canvas.image.shape[:2], w.shape[1])
    for slot in np.unique(strongest[strongest < w.shape[1]]):
        votes = _sums(canvas, (strongest == slot).astype(float))
        chosen[votes > most] = slot
        most = np.maximum(most, votes)
    colours = np.array([*_slot_colours(w.shape[1]), _TISSUE], np.uint8)
    covered = _sums(canvas, np.ones(len(w))) > 0
    picture = _blend(canvas, colours[chosen], covered, _opacity("draw_slots", alpha, canvas, over=0.6))
    _draw_scale(picture, canvas, mpp)
    total = w.sum()
    loads = w.sum(0) / total if total else w.sum(0)
    return _stacked(picture, _slot_legend(picture.width, size, loads, f"{len(w):,} patches{canvas.note}"))


def draw_top(
    patches: Sequence[TopPatch],
    patch_size: float,
    read_region: Reader | None,
    *,
    columns: int = 5,
    tile: int = 180,
) -> Image.Image | None:
    """The top patches cut from the slide, as a grid with rank, corner and relevance; None where there is no reader.

    Raises:
        ValueError: no patches, patches without coordinates, or columns, tile or patch_size not above 0.
    """
    if read_region is None:
        return None
    if not patches or any(p.x is None or p.y is None for p in patches) or min(columns, tile, patch_size) <= 0:
        raise ValueError(
            f"draw_top: needs patches with coordinates, columns, tile and patch_size > 0, got {len(patches)} patches, "
            f"{columns}, {tile}, {patch_size}"
        )
    font, gap = _font(tile // 14), tile // 12
    line = math.ceil(font.size * 1.3)
    step = tile + gap, tile + gap + 2 * line
    picture = Image.new(
        "RGB",
        (min(columns, len(patches)) * step[0] + gap, -(-len(patches) // columns) * step[1] + gap),
        "white",
    )
    draw = ImageDraw.Draw(picture)
    for i, p in enumerate(patches):
        x, y = gap + i % columns * step[0], gap + i // columns * step[1]
        cut = images.to_rgb(read_region(p.x, p.y, round(patch_size)), "draw_top: read_region")  # type: ignore[arg-type]
        picture.paste(cut.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + tile + line // 5), f"{p.rank}   {p.relevance:.3g}", _INK, font)
        draw.text((x, y + tile + line // 5 + line), f"({p.x:,}, {p.y:,})", _INK, font)
    return picture


@frozen(kw_only=True)
class _Canvas:
    """Where patches lie in a picture."""

    image: np.ndarray  # uint8 [y, x, 3], what is below the colours
    boxes: np.ndarray  # int [n, 4] (left, upper, right, lower), in pixels of the picture
    scale: float  # its pixels per level-0 pixel
    real: bool  # a thumbnail is below
    note: str  # what the legend has to add


def _canvas(
    where: str,
    n: int,
    coords: Any,
    patch_size: float,
    thumbnail: images.Picture | None,
    level0_size: Any,
    size: int,
    mpp: float | None,
) -> _Canvas:
    if not (0 < patch_size < math.inf and size >= 64 and (mpp is None or 0 < mpp < math.inf)):
        raise ValueError(
            f"{where}: patch_size and mpp must be > 0 and size >= 64, got {patch_size}, {mpp} and {size}"
        )
    if coords is None and not (thumbnail is None and level0_size is None and mpp is None):
        raise ValueError(
            f"{where}: without coords patches have no place: thumbnail, level0_size and mpp must be None too"
        )
    if thumbnail is not None and level0_size is None:
        raise ValueError(
            f"{where}: a thumbnail needs level0_size, the (width, height) of the slide in level-0 pixels, got None"
        )
    columns = math.ceil(math.sqrt(n))
    ordered = np.stack([np.arange(n) % columns, np.arange(n) // columns], 1) * float(patch_size)
    at = ordered if coords is None else as_coords(where, coords, n)
    if level0_size is None:
        margin = (
            0.0 if coords is None else max(float(patch_size), 0.07 * float(np.ptp(at, axis=0).max()))
        )  # room for numbers
        origin, extent = at.min(0) - margin, np.ptp(at, axis=0) + patch_size + 2 * margin
    else:
        origin, extent = np.zeros(2), np.asarray(level0_size, float)
        _check_inside(where, at, extent)
    scale = size / float(extent.max())
    width, height = (max(1, round(float(v) * scale)) for v in extent)
    if thumbnail is None:
        base = _paper(width, height, origin, scale, lines=coords is not None)
    else:
        base = _fitted(where, images.to_rgb(thumbnail, f"{where}: thumbnail"), (width, height), extent)
    first = np.rint((at - origin) * scale).astype(int)
    last = np.rint((at + patch_size - origin) * scale).astype(
        int
    )  # rounded like its neighbour's first, so that there is no seam
    first = np.minimum(first, [width - 1, height - 1])
    last = np.minimum(np.maximum(last, first + 1), [width, height])  # a patch has one pixel at least
    note = "" if coords is not None else "; no coordinates: patches in the order of the file"
    return _Canvas(
        image=base, boxes=np.hstack([first, last]), scale=scale, real=thumbnail is not None, note=note
    )


def _check_inside(where: str, at: np.ndarray, extent: np.ndarray) -> None:
    if extent.shape != (2,) or not (np.isfinite(extent).all() and (extent > 0).all()):
        raise ValueError(f"{where}: level0_size must be (width, height) > 0, got {extent.tolist()}")
    outside = ((at < 0) | (at >= extent)).any(1)
    if outside.any():
        found = f"{outside.sum():,} of {len(at):,}, the first {at[outside.argmax()].tolist()}"
        raise ValueError(
            f"{where}: patches must begin inside of the slide, {extent.tolist()} level-0 pixels, got {found} outside; "
            "are these coordinates of level 0, as (x, y), of this slide?"
        )


def _fitted(where: str, thumbnail: Image.Image, size: tuple[int, int], extent: np.ndarray) -> np.ndarray:
    aspect = extent[0] / extent[1] / (thumbnail.width / thumbnail.height)
    slack = 0.02 + 1 / min(thumbnail.size)  # thumbnails are whole pixels
    if abs(math.log(aspect)) > slack:
        raise ValueError(
            f"{where}: the thumbnail must show the whole slide, {extent[0]:g} x {extent[1]:g}, "
            f"got one of {thumbnail.width} x {thumbnail.height}: another aspect"
        )
    return np.asarray(thumbnail.resize(size, Image.Resampling.LANCZOS))


def _paper(width: int, height: int, origin: np.ndarray, scale: float, lines: bool) -> np.ndarray:
    paper = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(paper)
    step = _nice(max(width, height) / scale / 5)
    font = _font(max(width, height) // 80)
    for axis, length in enumerate((width, height) if lines else ()):
        first = math.ceil(max(float(origin[axis]), 0.0) / step) * step
        for value in np.arange(first, origin[axis] + length / scale, step):
            p = round((value - origin[axis]) * scale)
            draw.line([(p, 0), (p, height)] if axis == 0 else [(0, p), (width, p)], _LINE)
            place = (p + 3, 1) if axis == 0 else (3, p + 1)
            if p > 2 * font.size or axis == 0:  # where both would begin, x has the corner
                draw.text(place, f"{value:,.0f}", (140, 140, 136), font)
    return np.asarray(paper)


def _sums(canvas: _Canvas, values: np.ndarray) -> np.ndarray:
    """Sum of the values [n] of all patches that cover a pixel, [y, x]: four corners each, then sums along both axes."""
    height, width = (s + 1 for s in canvas.image.shape[:2])
    left, upper, right, lower = canvas.boxes.T
    places = np.concatenate(
        [upper * width + left, lower * width + right, upper * width + right, lower * width + left]
    )
    corners = np.bincount(places, np.concatenate([values, values, -values, -values]), height * width)
    return corners.reshape(height, width).cumsum(0).cumsum(1)[:-1, :-1]


def _blend(canvas: _Canvas, colours: np.ndarray, covered: np.ndarray, alpha: float) -> Image.Image:
    below = (
        canvas.image
        if canvas.real
        else np.where(covered[..., None], np.array(_TISSUE, np.uint8), canvas.image)
    )
    mixed = np.rint(below * (1 - alpha) + colours * alpha).astype(np.uint8)
    return Image.fromarray(np.where(covered[..., None], mixed, canvas.image))


def _opacity(where: str, alpha: float | None, canvas: _Canvas, over: float = 0.4) -> float:
    alpha = (over if canvas.real else 0.9) if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise ValueError(f"{where}: alpha must be in 0..1, got {alpha}")
    return alpha


def _draw_marks(picture: Image.Image, canvas: _Canvas, best: np.ndarray) -> None:
    draw, font = ImageDraw.Draw(picture), _font(max(picture.size) // 70)
    apart = lambda a, b: a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    framed, taken, numbers = (
        list[tuple[float, ...]](),
        list[tuple[float, ...]](),
        list[tuple[tuple[float, float], str]](),
    )
    for rank, (left, upper, right, lower) in enumerate(canvas.boxes[best].tolist(), 1):
        gap = 0 if right - left > 12 else 5  # around a small one, so that it and its neighbours are seen
        frame = (left - 1 - gap, upper - 1 - gap, right + gap, lower + gap)
        if gap and not all(apart(frame, f) for f in framed):
            continue  # a better one's frame is around this one, too
        if gap:
            draw.rectangle(frame, outline="white")
            draw.rectangle((frame[0] - 1, frame[1] - 1, frame[2] + 1, frame[3] + 1), outline="black")
        else:
            draw.rectangle((left, upper, right - 1, lower - 1), outline="white", width=3)
            draw.rectangle(frame, outline="black")
        framed.append(frame)
        at = (left + 5, upper + 4) if right - left > 2.5 * font.size else (frame[2] + 3, frame[1] - 3)
        place = draw.textbbox(at, str(rank), font, stroke_width=2)
        if all(apart(place, t) for t in taken):  # a number that would cover a better one's is left out
            taken.append(place)
            numbers.append((at, str(rank)))
    for at, number in numbers:  # over all frames
        draw.text(at, number, "black", font, stroke_width=2, stroke_fill="white")


def _draw_scale(picture: Image.Image, canvas: _Canvas, mpp: float | None) -> None:
    if mpp is None:
        return
    um = _nice(picture.width / canvas.scale * mpp / 5)
    font, length = _font(max(picture.size) // 64), round(um / mpp * canvas.scale)
    edge, draw = max(picture.size) // 64, ImageDraw.Draw(picture)
    text = f"{um / 1000:g} mm"  # Pillow's font has no µ
    wide, tall = max(length, math.ceil(draw.textlength(text, font))) + edge, math.ceil(font.size * 1.3) + edge
    x, y = picture.width - wide - edge // 2, picture.height - tall - edge // 2
    draw.rectangle((x, y, x + wide, y + tall), fill="white")
    draw.text((x + wide / 2, y + edge // 4), text, _INK, font, anchor="ma")
    bar = x + (wide - length) // 2
    draw.rectangle((bar, y + tall - edge // 2, bar + length, y + tall - edge // 4), fill=_INK)


def _map_legend(
    width: int, size: int, text: str, below: np.ndarray, alpha: float, ends: tuple[str, str, str]
) -> Image.Image:
    """The colours as they are seen: over the mean of what lies below the patches."""
    font = _font(size // 64)
    line, edge = math.ceil(font.size * 1.5), round(font.size)
    width = max(width, math.ceil(font.getlength(text)) + 2 * edge)
    legend = Image.new("RGB", (width, 3 * line + edge), "white")
    draw, bar = ImageDraw.Draw(legend), width - 2 * edge
    strip = 255 * _colours()(np.linspace(0, 1, bar))[None, :, :3] * alpha + below * (1 - alpha)
    legend.paste(
        Image.fromarray(np.repeat(np.rint(strip).astype(np.uint8), line * 2 // 3, 0)), (edge, edge // 2)
    )
    for share, anchor, said in zip((0.0, 0.5, 1.0), ("la", "ma", "ra"), ends, strict=True):
        draw.text(
            (edge + share * bar, edge // 2 + line * 2 // 3 + line // 6), said, _INK, font, anchor=anchor
        )
    draw.text((edge, edge // 2 + 2 * line), text, _INK, font)
    return legend


def _slot_legend(width: int, size: int, loads: np.ndarray, text: str) -> Image.Image:
    font = _font(size // 64)
    line, edge = math.ceil(font.size * 1.5), round(font.size)
    text = f"share of each slot in the weights, %; dotted: even; {text}"
    width, tall = max(width, math.ceil(font.getlength(text)) + 2 * edge), 5 * line
    legend = Image.new("RGB", (width, tall + 3 * line), "white")
    draw, step = ImageDraw.Draw(legend), (width - 2 * edge) / len(loads)
    top = float(loads.max()) or 1.0
    floor = edge + tall
    every, small = math.ceil(draw.textlength("00 ", font) / step), _font(size // 80)
    even = floor - round((tall - line) / top / len(loads))
    for dash in range(edge, width - edge, 8):
        draw.line([(dash, even), (dash + 3, even)], _INK)  # where all bars would end if the load were even
    for i, (load, colour) in enumerate(zip(loads.tolist(), _slot_colours(len(loads)), strict=True)):
        x, high = edge + i * step, round(load / top * (tall - line))
        draw.rectangle(
            (round(x), floor - high, max(round(x), round(x + 0.85 * step) - 1), floor), fill=colour
        )
        if i % every == 0:
            draw.text((x + 0.42 * step, floor + line // 8), str(i), _INK, font, anchor="ma")
        if step > draw.textlength("00.0 ", small):
            draw.text(
                (x + 0.42 * step, floor - high - 1),
                f"{100 * load:.1f}",
                _INK,
                small,
                anchor="md",
                stroke_width=2,
                stroke_fill="white",
            )
    draw.text((edge, floor + line + line // 4), text, _INK, font)
    return legend


def _stacked(picture: Image.Image, legend: Image.Image) -> Image.Image:
    whole = Image.new("RGB", (legend.width, picture.height + legend.height), "white")
    whole.paste(picture, ((legend.width - picture.width) // 2, 0))
    whole.paste(legend, (0, picture.height))
    return whole


def _colours() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"]


def _slot_colours(k: int) -> list[tuple[int, ...]]:
    """Of k slots; those of the 33rd and later repeat."""
    return [tuple(_SLOTS[j : j + 3]) for i in range(k) for j in [3 * i % len(_SLOTS)]]


def _font(height: int) -> Any:
    return ImageFont.load_default(max(10, height))


def _nice(most: float) -> float:
    """The greatest of 1, 2, 5, 10, 20... (and 0.5, 0.2...) that is not above a number."""
    tens = 10.0 ** math.floor(math.log10(most))
    return max(f * tens for f in (1, 2, 5) if f == 1 or f * tens <= most)


# Files ----------------------------------------------------------------------------------------------------------------------------------
def to_geojson(
    relevance: Any,
    coords: Any,
    patch_size: float,
    *,
    top: int | None = None,
    classes: Sequence[tuple[str, float]] = CLASSES,
    offset: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """Patches as a GeoJSON FeatureCollection that QuPath 0.4 and later read: detections with class, colour and measurements.

    Args:
        relevance, coords, patch_size: as `draw_map`; coordinates are needed.
        top: only so many of the most relevant patches, best first; None: all, in their order.
        classes: (name, least share of the highest relevance), rising from 0; colours as in `draw_map`. QuPath reads a colon as a subclass.
        offset: (x, y) that is taken from all coordinates. QuPath shows MRXS, SCN and VMS cropped to their scanned part, and counts from
            its corner: `openslide.bounds-x` and `openslide.bounds-y` of the slide.
    Returns:
        closed rings in level-0 pixels; measurements "Relevance", "Relevance percentile" (0 to 1) and "Relevance rank" (from 1).
    Raises:
        ValueError: shapes, no coords, top < 1, classes that do not rise from 0 to below 1, or an offset that puts a patch before 0.
    Source: qupath-core, QuPathTypeAdapters.java (how QuPath reads and writes objects).
    """
    r = as_relevance("to_geojson", relevance)
    if coords is None:
        raise ValueError("to_geojson: needs coords [n, 2] in level-0 pixels, got None")
    at, least = as_coords("to_geojson", coords, len(r)) - np.array(offset), [float(c[1]) for c in classes]
    if len(at) and any(offset) and (at < 0).any():
        first = (at + np.array(offset))[(at < 0).any(1)][0].tolist()
        raise ValueError(
            f"to_geojson: offset must be the slide's (bounds-x, bounds-y), got {tuple(offset)}; a patch at {first} would lie before 0"
        )
    if not 0 < patch_size < math.inf or (top is not None and top < 1):
        raise ValueError(
            f"to_geojson: patch_size must be > 0 and top >= 1 or None, got {patch_size} and {top}"
        )
    if not least or least[0] != 0 or any(b <= a for a, b in zip(least, [*least[1:], 1.0], strict=True)):
        raise ValueError(
            f"to_geojson: classes must be (name, least share of the highest), rising from 0 to below 1, got {list(classes)}"
        )
    order, share = np.argsort(-r, kind="stable"), percentiles(r)
    rank = np.empty(len(r), int)
    rank[order] = np.arange(1, len(r) + 1)
    chosen = np.arange(len(r)) if top is None else order[:top]
    highest = max(float(r.max(initial=0)), np.finfo(float).tiny)
    ends = _level(np.array([*least, 1.0]))  # of the colours in the picture
    middles = ((ends[:-1] + ends[1:]) / 2).tolist()
    kinds = [
        {"name": c[0], "color": list(map(int, _colours()(m, bytes=True)[:3]))}
        for c, m in zip(classes, middles, strict=True)
    ]
    of = np.maximum(np.searchsorted(least, r[chosen] / highest, side="right") - 1, 0)
    rings = at[chosen, None] + patch_size * np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    rings = rings.astype(int) if (rings == np.rint(rings)).all() else rings
    rows = zip(
        rings.tolist(),
        of.tolist(),
        r[chosen].tolist(),
        share[chosen].tolist(),
        rank[chosen].tolist(),
        strict=True,
    )
    return {
        "type": "FeatureCollection",
        "features": [_feature(ring, kinds[c], *numbers) for ring, c, *numbers in rows],
    }


def _feature(ring: list, kind: dict, relevance: float, percentile: float, rank: int) -> dict[str, Any]:
    numbers = {"Relevance": relevance, "Relevance percentile": percentile, "Relevance rank": rank}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "detection", "classification": kind, "measurements": numbers},
    }


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
    """Write map.png, slots.png, top.csv, with coords map.geojson (of all patches) and with a reader top.png into folder/name.

    All is made before anything is written, and each file is there whole or not at all; a map.geojson or top.png of before that this
    call would not write is removed.

    Args:
        name: of the slide, a plain file name.
        relevance, weights, coords, patch_size: as `draw_map` and `draw_slots`.
        top: patches in top.csv and top.png, and framed in map.png.
        offset: of map.geojson, as `to_geojson`.
        drawing: thumbnail, level0_size, size, mpp, alpha.
    Returns:
        folder/name.
    Raises:
        ValueError: a name that is no plain file name, weights of other patches than relevance, or what the parts refuse.
    """
    files.check_name(name, "write_map: the slide")
    if len(weights) != len(relevance):
        raise ValueError(
            f"write_map: weights must be [{len(relevance)}, k], a row per patch of relevance, got {len(weights)} rows"
        )
    best = top_patches(relevance, coords, top)
    pictures = {
        "map.png": draw_map(relevance, coords, patch_size, mark=top, **drawing),
        "slots.png": draw_slots(weights, coords, patch_size, **drawing),
        "top.png": draw_top(best, patch_size, read_region),
    }
    shapes = (
        None
        if coords is None
        else json.dumps(
            to_geojson(relevance, coords, patch_size, offset=offset), allow_nan=False, separators=(",", ":")
        )
    )
    into = Path(folder) / name
    for file, picture in pictures.items():
        _write_picture(into / file, picture)
    files.write_csv(into / "top.csv", map(asdict, best), TopPatch.__annotations__)
    if shapes is None:
        (into / "map.geojson").unlink(missing_ok=True)
    else:
        files.write_text(into / "map.geojson", shapes)
    return into


def _write_picture(path: Path, picture: Image.Image | None) -> None:
    if picture is None:
        path.unlink(missing_ok=True)
        return
    with files.atomic(path) as tmp:
        picture.save(tmp, format="PNG")
