"""Colours of slide maps: of relevance (one scale for pictures and QuPath) and of slots."""

from typing import Any

import numpy as np

INK, TISSUE, PAPER, LINE = (34, 34, 34), (200, 200, 200), (250, 250, 248), (226, 226, 222)
_DECADES = 4  # powers of ten below the highest relevance that the colours span
# Of slots: the colours of Okabe and Ito, then each time the colour farthest from those before it (least CIE
# Lab distance with normal, protan and deutan vision, Machado et al. 2009), from grey and from white. The
# nearest two of 16 are 17 apart, of 32 they are 14 apart.
_SLOTS = bytes.fromhex("""
0072B2 E69F00 009E73 CC79A7 56B4E9 D55E00 F0E442 0000FF 691E00 B4F096 4B2D4B 2D1EA5 5A78FF E10F4B 2D2D78 FF965A
87E1FF 3C4BF0 78D296 963C00 4B96F0 4B693C 964B78 4B2D2D D200B4 0000C3 C3F069 693C78 963CD2 D2693C B4F0C3 3CB4C3
""")


def relevance_level(relevance: np.ndarray) -> np.ndarray:
    """Position on the colour scale: logarithmic, 0 at 1/10,000 of the highest or less, 1 at the highest."""
    highest = relevance.max(initial=0)
    if highest <= 0:
        return np.zeros_like(relevance)
    share = np.maximum(relevance / highest, 10.0**-_DECADES)
    return 1 + np.log10(share) / _DECADES


def relevance_colours(levels: Any) -> np.ndarray:
    """uint8 RGB [..., 3] of levels 0 to 1 [...] (viridis)."""
    import matplotlib

    return np.asarray(matplotlib.colormaps["viridis"](levels, bytes=True))[..., :3]


def slot_colours(k: int) -> np.ndarray:
    """uint8 RGB [k, 3] of k slots; from the 33rd on they repeat."""
    palette = np.frombuffer(_SLOTS, np.uint8).reshape(-1, 3)
    return palette[np.arange(k) % len(palette)]
