"""Image files, decoded as a whole and upright, and images of any kind as RGB."""

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from medvl.base import files
from medvl.base.files import PathLike
from medvl.ct import scans
from medvl.language import dicom_image

Picture = Image.Image | np.ndarray | Tensor
# Pixels of a file that is opened: where Pillow starts to warn of decompression bombs. An A4 page at 600 dpi
# has 35 million.
LARGEST = 89_478_485
_FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # no EPS: it would start another program
# What Pillow's decoders raise on broken files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
)


def open_image(
    source: PathLike | bytes,
    *,
    page: int | None = None,
    window: tuple[float, float] | None = None,
    only_deep: bool = False,
    full_range: bool = False,
    most: int = LARGEST,
) -> Image.Image:
    """Read an image file upright (EXIF orientation applied), whole, as RGB with what is transparent white.

    Args:
        source: a path, or the content of a file. PNG, JPEG, JPEG 2000, TIFF, WebP, BMP, GIF or PPM, a DICOM
            image as `dicom_image.read_dicom` shows it, or a slice of a NIfTI file as `scans.read_slice` does;
            the content decides, not the name.
        page: of a file with several pages, frames or slices, counted from 0.
        window: (black, white): the greys shown as 0 and 255, linear between them. Files with greys of more
            than 8 bits need one.
        only_deep: the window is for files with greys of more than 8 bits, and others are opened without it (a
            folder that has both).
        full_range: without a window, show greys of more than 8 bits from their lowest to their highest; slices of
            NIfTI files need a window all the same.
        most: pixels of a file that is decoded.
    Raises:
        ValueError: no such file, none of these formats, broken, truncated or empty; more than `most`
            pixels (refused before they are decoded); several pages and no `page`; deep greys and no window,
            or a window for colours.
    """
    if isinstance(source, bytes):
        name = f"open_image: image of {len(source)} bytes"
    else:
        name = f"open_image: {source}"
    start = _read_start(source, name)
    # A preamble of 128 bytes, which may hold anything, and then these four (PS3.10, 7.1).
    if start[128:] == b"DICM":
        pixels = dicom_image.read_dicom(
            source, name, most=most, frame=page, window=window, only_deep=only_deep
        )
        return to_rgb(Image.fromarray(pixels), name)
    # No image begins as gzip does, or with the size of a NIfTI header in either byte order.
    sizes = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
    if start[:2] == b"\x1f\x8b" or sizes & {348, 540}:
        return _open_slice(source, name, page, window, only_deep)
    with _pillow_errors(name):
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        # The formats are named, so that the content of a file cannot choose any other of Pillow's decoders.
        image: Image.Image = Image.open(file, formats=_FORMATS)
    with image:
        _seek_page(image, page, name)
        # Image.open has read the header only: the size is refused before its pixels take memory.
        if image.width * image.height > most:
            raise ValueError(
                f"{name}: must have at most {most} pixels, got {image.width} x {image.height}; make it "
                "smaller"
            )
        with _pillow_errors(name):
            # Pillow decodes lazily, so that a truncated file fails here and not at its opening.
            image.load()
            image = ImageOps.exif_transpose(image)
    # Modes I, I;16 and F: greys of 16 or 32 bits, whole or floating.
    is_deep = image.mode[0] in "IF"
    if is_deep and window is None and full_range:
        greys = np.asarray(image)
        low = float(greys.min())
        window = (low, max(float(greys.max()), low + 1))  # of one grey only: black
    if is_deep or (window is not None and not only_deep):
        image = _apply_window(name, image, window)
    return to_rgb(image, name)


def _seek_page(image: Image.Image, page: int | None, name: str) -> None:
    """Go to a page of an image file; a file of one page needs none."""
    with _pillow_errors(name):
        pages = getattr(image, "n_frames", 1)
        if image.format == "MPO":  # a phone's MPO holds a preview behind its photograph
            pages = 1
    # Which of several pages is meant is not guessed.
    if (page is None and pages > 1) or not 0 <= (page or 0) < pages:
        raise ValueError(
            f"{name}: has {pages} pages or frames, got page={page}; give one from 0 to {pages - 1}"
        )
    with _pillow_errors(name):
        image.seek(page or 0)


def check_window(window: tuple[float, ...], where: str) -> tuple[float, float] | None:
    """The window of a record, () for none, as `open_image` takes it.

    Raises:
        ValueError: not two numbers, the first the smaller.
    """
    if not window:
        return None
    if len(window) != 2 or not -math.inf < window[0] < window[1] < math.inf:
        raise ValueError(
            f"{where} must be [black, white] with black < white, got {list(window)}; both must be finite"
        )
    return window[0], window[1]


def _read_start(source: PathLike | bytes, name: str) -> bytes:
    """The first 132 bytes of a file."""
    if isinstance(source, bytes):
        return source[:132]
    if (path := Path(source)).exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{name}: cannot be read, it must be a file")
    files.check_regular(source)
    with _pillow_errors(name), open(source, "rb") as f:
        return f.read(132)


def _open_slice(
    source: PathLike | bytes, name: str, page: int | None, window: tuple[float, float] | None, only_deep: bool
) -> Image.Image:
    """A slice of a NIfTI file through a window."""
    if isinstance(source, bytes):
        raise ValueError(f"{name}: a NIfTI file must be given as a path")
    header, greys = scans.read_slice(source, page)
    is_plain = header.dtype == np.uint8 and (header.slope, header.intercept) == (1, 0)
    if is_plain and (window is None or only_deep):
        return to_rgb(Image.fromarray(np.ascontiguousarray(greys)), name)
    return to_rgb(_shown(name, greys * header.slope + header.intercept, window), name)


def to_rgb(image: Picture, where: str) -> Image.Image:
    """An image of any mode, or uint8 [y, x, 3], as RGB with what is transparent white.

    Args:
        where: what errors begin with.
    Raises:
        ValueError: greys of more than 8 bits, arrays of another type or shape, a broken image.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise ValueError(
                f"{where}: an array must be uint8 [y, x, 3] and not empty, got {image.dtype} "
                f"{list(image.shape)}"
            )
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"{where}: image must be a PIL image, an array or a tensor, got {type(image).__name__}; "
            "open_image reads files"
        )
    with _pillow_errors(f"{where}: the image"):
        image.load()
    # Pillow's convert would clip such greys at 255 and not scale them: most of a radiograph would be white.
    if image.mode[0] in "IF":
        raise ValueError(
            f"{where}: greys of more than 8 bits (mode {image.mode}) need a window: open_image(path, "
            "window=(black, white)), or scale them"
        )
    with _pillow_errors(f"{where}: the image (mode {image.mode})"):
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")
        # La has its alpha multiplied in, and Pillow converts it to LA only. Then onto white: converting RGBA
        # to RGB drops the alpha and shows whatever colours lie hidden under it.
        image = image.convert({"La": "LA"}.get(image.mode, image.mode)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_statistics(where: str, name: str, values: tuple[float, ...]) -> None:
    """Check the "mean" or "std" of the channels, by which pixels are normalised.

    Raises:
        ValueError: not 3 finite numbers, or a standard deviation that is not above 0.
    """
    is_std = name == "std"
    are_numbers = len(values) == 3 and all(isinstance(x, int | float) and math.isfinite(x) for x in values)
    if not are_numbers or (is_std and min(values) <= 0):
        raise ValueError(f"{where}: {name} must be 3 finite numbers{' > 0' * is_std}, got {values!r}")


def cap_pixels(image: Image.Image, most: int) -> Image.Image:
    """An RGB image with at most `most` pixels: bicubic, its aspect ratio kept to the pixel, never enlarged,
    never without a pixel.

    Args:
        most: largest width * height; 0 = no limit. An image within it is returned itself.
    Raises:
        ValueError: most < 0.
    Source: MAX_PIXELS of ms-swift, which a model's own resizing to whole patches follows.
    """
    if most < 0:
        raise ValueError(f"cap_pixels: most must be at least 1 pixel, or 0 for no limit, got {most}")
    width, height = image.size
    if not most or width * height <= most:
        return image
    # Of a long strip one side stays at 1 pixel and the other gives way.
    # isqrt keeps to whole numbers: a float root could round up, to more pixels than `most`.
    new_width = min(max(1, math.isqrt(most * width // height)), most)
    new_height = min(max(1, math.isqrt(most * height // width)), most // new_width)
    return image.resize((new_width, new_height), Image.Resampling.BICUBIC)


def _apply_window(name: str, image: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    # The numbers of a palette (mode P) are indices of colours, not greys.
    if len(image.getbands()) > 1 or image.mode == "P":
        raise ValueError(f"{name}: a window is for greys, got mode {image.mode}; leave it out")
    return _shown(name, np.asarray(image), window)


def _shown(name: str, grey: np.ndarray, window: tuple[float, float] | None) -> Image.Image:
    if window is None or not window[0] < window[1] or not np.isfinite(grey).all():
        raise ValueError(
            f"{name}: greys of more than 8 bits must be finite and need window=(black, white) with black < "
            f"white, got values from {grey.min():g} to {grey.max():g} and window={window}"
        )
    return Image.fromarray(dicom_image.window_greys(grey, *window))


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Turn what Pillow raises into a ValueError that begins with `name`."""
    try:
        yield
    # From the special to the general: this one and UnidentifiedImageError are OSErrors too.
    except FileNotFoundError as e:
        raise ValueError(f"{name}: no such file") from e
    # Image.open itself refuses what has twice the pixels of its own limit.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"{name}: must have at most {LARGEST} pixels ({e}); make it smaller") from e
    except UnidentifiedImageError as e:
        raise ValueError(
            f"{name}: must be an image ({', '.join(_FORMATS)}), found none of these; empty or broken at "
            "its start?"
        ) from e
    except _DECODER_ERRORS as e:
        raise ValueError(f"{name}: cannot be read, broken or truncated ({e})") from e
