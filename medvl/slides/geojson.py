"""The relevance of patches as shapes for QuPath (GeoJSON)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from medvl.slides.map_colours import relevance_colours, relevance_level
from medvl.slides.relevance import as_coords, as_relevance, percentiles

# (name, least share of the highest relevance) of each class. Shares, as in the picture: by rank, where one
# patch holds all the relevance, half of those that hold nothing would be an "upper half".
CLASSES = (
    ("Relevance under 1/1000 of the highest", 0.0),
    ("Relevance over 1/1000 of the highest", 1e-3),
    ("Relevance over 1/100 of the highest", 1e-2),
    ("Relevance over 1/10 of the highest", 0.1),
)
_CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])  # of a closed ring


def to_geojson(
    relevance: Any,
    coords: Any,
    patch_size: float,
    *,
    top: int | None = None,
    classes: Sequence[tuple[str, float]] = CLASSES,
    offset: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """Patches as a GeoJSON FeatureCollection for QuPath 0.4 and later.

    Each patch is a detection with class, colour and measurements.

    Args:
        relevance: [n].
        coords: (x, y) of the patches' upper left corners [n, 2] in level-0 pixels.
        patch_size: side of a patch in level-0 pixels.
        top: only this number of the most relevant patches, best first; None: all, in their order.
        classes: (name, least share of the highest relevance), rising from 0; colours as in `maps.draw_map`.
            QuPath reads a colon in a name as a subclass.
        offset: (x, y) that is subtracted from all coordinates. QuPath shows MRXS, SCN and VMS cropped to the
            scanned part and counts from its corner: `openslide.bounds-x` and `openslide.bounds-y` of the
            slide.
    Returns:
        closed rings in level-0 pixels; measurements "Relevance", "Relevance percentile" (0 to 1) and
        "Relevance rank" (from 1).
    Raises:
        ValueError: shapes, no coords, top < 1, classes that do not rise from 0 to below 1, or an offset
            that puts a patch before 0.
    Source: qupath-core, QuPathTypeAdapters.java (how QuPath reads and writes objects).
    """
    r = as_relevance("to_geojson", relevance)
    if coords is None:
        raise ValueError("to_geojson: needs coords [n, 2] in level-0 pixels, got None")
    xy = as_coords("to_geojson", coords, len(r))
    bounds = [float(share) for _, share in classes]
    _check_arguments(xy, patch_size, top, classes, bounds, offset)

    order = np.argsort(-r, kind="stable")  # best first, equal ones in the order of their rows
    rank = np.empty(len(r), int)
    rank[order] = np.arange(1, len(r) + 1)
    rows = np.arange(len(r)) if top is None else order[:top]
    class_of_row = _classes_of_patches(r, bounds)[rows]
    corners = xy[rows] - np.array(offset)
    rings = corners[:, None] + patch_size * _CORNERS  # [rows, 5, 2]
    if (rings == np.rint(rings)).all():  # then no corner is written as 512.0
        rings = rings.astype(int)

    classifications = _classifications(classes, bounds)
    percentile = percentiles(r)
    features = []
    for row, ring, number in zip(rows.tolist(), rings.tolist(), class_of_row.tolist(), strict=True):
        measurements = {
            "Relevance": float(r[row]),
            "Relevance percentile": float(percentile[row]),
            "Relevance rank": int(rank[row]),
        }
        features.append(_feature(ring, classifications[number], measurements))
    return {"type": "FeatureCollection", "features": features}


def _check_arguments(
    xy: np.ndarray,
    patch_size: float,
    top: int | None,
    classes: Sequence[tuple[str, float]],
    bounds: Sequence[float],
    offset: tuple[int, int],
) -> None:
    # A patch before 0 shows that the offset is another slide's; QuPath would draw it beside the picture.
    before = (xy < np.array(offset)).any(1)
    if any(offset) and before.any():
        raise ValueError(
            f"to_geojson: offset must be the slide's (bounds-x, bounds-y), got {tuple(offset)}; "
            f"a patch at {xy[before][0].tolist()} would lie before 0"
        )
    if not 0 < patch_size < math.inf or (top is not None and top < 1):
        raise ValueError(
            f"to_geojson: patch_size must be > 0 and top >= 1 or None, got {patch_size} and {top}"
        )
    steps = np.diff([*bounds, 1.0])
    if not bounds or bounds[0] != 0 or (steps <= 0).any():
        raise ValueError(
            "to_geojson: classes must be (name, least share of the highest), rising from 0 to below 1, "
            f"got {list(classes)}"
        )


def _classes_of_patches(relevance: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """The class [n] of each patch."""
    # At least the smallest number: where no patch is positive the shares are 0 or negative, not NaN.
    highest = max(float(relevance.max(initial=0)), np.finfo(float).tiny)
    classes = np.searchsorted(bounds, relevance / highest, side="right") - 1
    return np.maximum(classes, 0)  # negative relevance is in the lowest class


def _classifications(classes: Sequence[tuple[str, float]], bounds: Sequence[float]) -> list[dict[str, Any]]:
    """Name and colour of each class: the colour in the middle of its part of the picture's scale."""
    ends = relevance_level(np.array([*bounds, 1.0]))
    middles = (ends[:-1] + ends[1:]) / 2
    colours = relevance_colours(middles).tolist()
    classifications = []
    for (name, _), colour in zip(classes, colours, strict=True):
        classifications.append({"name": name, "color": colour})
    return classifications


def _feature(ring: list[Any], classification: dict[str, Any], measurements: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "objectType": "detection",
            "classification": classification,
            "measurements": measurements,
        },
    }
