"""What scanners and cameras do to a drawn page: skew, blur, bleed-through, stamps, JPEG, perspective, shadow.

Places are mapped by a homography, a matrix [3, 3] from pixels of the page to those of the picture. Everything that
decides a pixel is computed with whole numbers or single operations of float64, so that all processors agree on it.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from medvl.documents.text_page import load_font
from medvl.documents.words import Box
from medvl.phantoms.page_records import pick, words

DAMAGES = ("clean", "scan", "photo")
_LAMPS = ((255, 255, 255), (255, 246, 226), (240, 246, 255), (255, 236, 206))  # colours of light


def damage_page(
    image: Image.Image, values: Sequence[Box], damage: str, *, small: bool, gen: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """The picture of a damaged page, and the homography from the page to it.

    Args:
        image: the clean page, grey (mode L).
        values: boxes of values, one of which gets a stamp.
        damage: of `DAMAGES`.
        small: move nothing by more than 4 pixels or 1 % and keep the size, for pages whose glyphs stand in cells.
    """
    if damage == "clean":
        return image, np.eye(3)
    if damage == "scan":
        return _scan(image, values, small, gen)
    assert damage == "photo"
    return _photograph(image, small, gen)


def move_box(matrix: np.ndarray, box: Box) -> Box:
    """The bounds of a box after a homography, rounded to a tenth of a pixel."""
    left, top, right, bottom = box
    corners = np.array([(left, top, 1), (right, top, 1), (right, bottom, 1), (left, bottom, 1)])
    mapped = corners @ matrix.T
    points = mapped[:, :2] / mapped[:, 2:]
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    return round(float(x0), 1), round(float(y0), 1), round(float(x1), 1), round(float(y1), 1)


def _scan(
    image: Image.Image, values: Sequence[Box], small: bool, gen: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """A page that went through a scanner, which sees grey only."""
    scale = 1.0 if small else image.width / 850  # a letter page at 100 dpi is 850 pixels wide
    paper = int(np.asarray(image)[0, 0])
    image = _bleed(image, gen, scale)
    if values and gen.random() < 0.7:
        image = _stamp(image, pick(gen, values), gen)
    angle = gen.uniform(-0.4, 0.4) if small else gen.uniform(-1.5, 1.5)
    image, matrix = _warp(image, image.size, math.radians(angle), (0.0, 0.0), paper)
    image = image.filter(ImageFilter.GaussianBlur(float(gen.uniform(0.2, 0.7)) * scale))
    return _jpeg(_noise(image, 10, gen), int(gen.integers(35, 80))), matrix


def _photograph(image: Image.Image, small: bool, gen: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """A page on a desk, taken with a phone: seen at an angle, with a shadow."""
    size, tilt, angle = image.size, 0.006, gen.uniform(-0.2, 0.2)
    desk = int(np.asarray(image)[0, 0])  # a page of a grid fills the picture
    if not small:
        size = (round(1.2 * image.width), round(1.2 * image.height))
        tilt, angle, desk = 0.07, gen.uniform(-2.0, 2.0), int(gen.integers(30, 150))
    tilts = (gen.uniform(-tilt, tilt), gen.uniform(-tilt, tilt))
    image, matrix = _warp(image, size, math.radians(angle), tilts, desk)
    image = _shade(image, gen).filter(ImageFilter.GaussianBlur(float(gen.uniform(0.2, 0.6))))
    light = pick(gen, _LAMPS)
    grey = _noise(image, 8, gen)
    lit = Image.merge("RGB", [grey.point([v * channel // 255 for v in range(256)]) for channel in light])
    return _jpeg(lit, int(gen.integers(50, 90))), matrix


def _warp(
    image: Image.Image,
    size: tuple[int, int],
    angle: float,
    tilts: tuple[float, float],
    background: int,
) -> tuple[Image.Image, np.ndarray]:
    """Turn and tilt an image about its middle, which becomes that of a picture of `size`.

    Args:
        angle: radians.
        tilts: change of depth from one side of the picture to the other, across and down.
    """
    # From a pixel of the picture to one of the page: to the middle, turn and tilt, and back.
    to_middle = np.array([[1, 0, -size[0] / 2], [0, 1, -size[1] / 2], [0, 0, 1]])
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [tilts[0] / size[0], tilts[1] / size[1], 1]])
    back = np.array([[1, 0, image.width / 2], [0, 1, image.height / 2], [0, 0, 1]])
    inverse = back @ turn @ to_middle
    inverse /= inverse[2, 2]
    coefficients = tuple(float(c) for c in inverse.ravel()[:8])
    picture = image.transform(
        size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC, fillcolor=background
    )
    return picture, np.linalg.inv(inverse)


def _bleed(image: Image.Image, gen: np.random.Generator, scale: float) -> Image.Image:
    """The text of the other side shines through, mirrored and faint."""
    strength = float(gen.uniform(0.03, 0.12))
    other = ImageOps.flip(ImageOps.mirror(image)) if gen.random() < 0.5 else ImageOps.mirror(image)
    blurred = other.filter(ImageFilter.GaussianBlur(1.2 * scale))
    faint = blurred.point([round(255 - (255 - v) * strength) for v in range(256)])
    return ImageChops.multiply(image, faint)


def _stamp(image: Image.Image, box: Box, gen: np.random.Generator) -> Image.Image:
    """A stamp across a value, through which the value can be read."""
    height = box[3] - box[1]
    text = pick(gen, words()["labels"]["stamps"])
    font = load_font("DejaVuSans-Bold", round(1.1 * height, 2))
    pad = round(0.4 * height)
    size = (round(font.getlength(text)) + 2 * pad, round(1.3 * height) + 2 * pad)
    mask = Image.new("L", size)
    brush = ImageDraw.Draw(mask)
    opacity, ink = int(gen.integers(70, 120)), int(gen.integers(20, 110))
    brush.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=opacity, width=max(1, pad // 3))
    brush.text((size[0] / 2, size[1] / 2), text, fill=opacity, font=font, anchor="mm")
    mask = mask.rotate(float(gen.uniform(-25, 25)), Image.Resampling.BICUBIC, expand=True)
    left = round((box[0] + box[2] - mask.width) / 2)
    top = round((box[1] + box[3] - mask.height) / 2)
    stamped = image.copy()
    stamped.paste(ink, (left, top), mask)
    return stamped


def _shade(image: Image.Image, gen: np.random.Generator) -> Image.Image:
    """A soft shadow over one part of the picture."""
    angle, edge = gen.uniform(0, 2 * math.pi), gen.uniform(-0.3, 0.2)
    depth, softness = gen.uniform(0.15, 0.45), gen.uniform(0.1, 0.5)
    y = np.linspace(-0.5, 0.5, image.height)[:, None]
    x = np.linspace(-0.5, 0.5, image.width)
    distance = math.cos(angle) * x + math.sin(angle) * y - edge
    light = 1 - depth * np.clip(distance / softness, 0, 1)
    pixels = np.asarray(image) * light
    return Image.fromarray(pixels.astype(np.uint8))


def _noise(image: Image.Image, most: int, gen: np.random.Generator) -> Image.Image:
    """Grey noise of up to `most` levels."""
    level = int(gen.integers(2, most + 1))
    noise = gen.integers(-level, level + 1, (image.height, image.width), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)
