"""DICOM images (CT, CR, DX, MR, US) as pictures of 8 bits."""

import functools
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from medvl.base.dicom import BROKEN, MISSING, check_coded_shape, check_syntax

_log = logging.getLogger(__name__)
# What is read of a file. Names, dates and numbers of patients are passed over, so that no message can hold
# them.
_TAGS = [
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "PixelData",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "SharedFunctionalGroupsSequence",
]


def read_dicom(
    source: str | os.PathLike[str] | bytes,
    where: str,
    *,
    most: int,
    frame: int | None = None,
    window: tuple[float, float] | None = None,
    only_deep: bool = False,
) -> np.ndarray:
    """The image of a DICOM file as it is looked at, uint8 [y, x], or [y, x, 3] of colours.

    Greys are rescaled (RescaleSlope and RescaleIntercept, or the modality's table), shown through a window,
    and inverted where they are MONOCHROME1. The window is `window`, else the first of the file. Without
    either, greys of 8 bits are shown as they are, and deeper ones from their lowest to their highest, with a
    warning. A table of the file instead of a window (VOILUTSequence) is not applied.

    Args:
        where: what errors begin with.
        most: rows * columns of a file that is decoded.
        frame: of a file with several, counted from 0.
        window: (black, white) in rescaled greys, for CT in HU: linear between them.
        only_deep: the window is for greys of more than 8 bits, and not for others or colours.
    Raises:
        ValueError: pydicom is not installed; no pixels, several frames and none named, an enhanced object, more
            than `most` pixels, a transfer syntax or colours that are not read, a window for colours, a broken
            file.
    Source: DICOM PS3.3, C.7.6.3, C.11.1 and C.11.2, by pydicom.
    """
    try:
        from pydicom import pixels
        from pydicom.errors import InvalidDicomError
    except ImportError as e:
        raise ValueError(f"{where}: {MISSING}") from e
    try:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        # A bound on what is read at all, before anything is parsed: uncompressed colours of 16 bits take 6
        # bytes a pixel, the rest is room for the header.
        if size > 8 * most:
            raise ValueError(f"must be pictures of at most {most} pixels, got {size} bytes")
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = _checked(content, most, frame)
        values = pixels.pixel_array(image, index=frame or 0)
        if image.SamplesPerPixel > 1:
            return _colours(values, None if only_deep else window)
        # For CT these are HU from here on; a slope may be a fraction.
        greys = pixels.apply_rescale(values, image).astype(np.float64, copy=False)
        folder = "" if isinstance(source, bytes) else str(Path(source).parent)
        window = _grey_window(image, greys, window, only_deep, folder)
        # A window of the file goes through pydicom, for the curves of VOILUTFunction (LINEAR, LINEAR_EXACT,
        # SIGMOID).
        shown = _by_file(image, greys) if window is None else window_greys(greys, *window)
    except (InvalidDicomError, *BROKEN) as e:
        reason = " ".join(str(e).split())  # errors of several decoders come on several lines
        raise ValueError(f"{where}: this DICOM file cannot be read: {reason}") from e
    # MONOCHROME1 shows the lowest value white (PS3.3, C.7.6.3.1.2). Inverted last: windows are of the values.
    return 255 - shown if image.PhotometricInterpretation == "MONOCHROME1" else shown


def read_size(content: bytes, where: str) -> tuple[int, int, int]:
    """(frames, columns, rows) of a DICOM file, of which no pixel is decoded.

    Raises:
        ValueError: as `read_dicom`, as far as its header tells.
    """
    try:
        from pydicom.errors import InvalidDicomError
    except ImportError as e:
        raise ValueError(f"{where}: {MISSING}") from e
    try:
        image = _parse(content)
        return int(image.get("NumberOfFrames") or 1), int(image.Columns), int(image.Rows)
    except (InvalidDicomError, *BROKEN) as e:
        raise ValueError(f"{where}: this DICOM file cannot be read: {e}") from e


def window_greys(greys: np.ndarray, black: float, white: float) -> np.ndarray:
    """Greys as 0 at `black` to 255 at `white`, linear between them, uint8."""
    shown = np.empty(greys.shape, np.uint8)
    # A few rows at a time: doubles of a whole page would take eight bytes a pixel, four times.
    for start in range(0, len(greys), 256):
        # float64 holds every integer of 32 bits, float32 does not.
        rows = greys[start : start + 256].astype(np.float64)
        shown[start : start + 256] = (((rows - black) / (white - black)).clip(0, 1) * 255).round()
    return shown


def _parse(content: bytes) -> Any:
    """The data set of a file whose transfer syntax is one that is read, and which holds pixels."""
    from pydicom import dcmread

    check_syntax(io.BytesIO(content))
    # The same bytes from their beginning again, now that the transfer syntax is one that may be read.
    image = dcmread(io.BytesIO(content), specific_tags=_TAGS)
    if "PixelData" not in image:
        raise ValueError("it holds no pixels (PixelData); give one that is an image")
    # Enhanced objects keep rescaling and window per frame in functional groups, where nothing here looks.
    if "SharedFunctionalGroupsSequence" in image:
        raise ValueError("an enhanced object is not read; write the frame that is meant to a file of its own")
    return image


def _checked(content: bytes, most: int, frame: int | None) -> Any:
    """The data set of a file, the pixels of whose frame may be decoded."""
    image = _parse(content)
    frames = image.get("NumberOfFrames") or 1
    # Which of several frames is meant is not guessed.
    if (frame is None and frames > 1) or not 0 <= (frame or 0) < frames:
        raise ValueError(f"has {frames} frames, got page={frame}; give one from 0 to {frames - 1}")
    colours = image.PhotometricInterpretation
    if colours not in ("MONOCHROME1", "MONOCHROME2", "RGB") and "YBR" not in colours:
        raise ValueError(f"colours of DICOM must be greys, RGB or YBR, got {colours}; write it as a PNG")
    check_coded_shape(image, frame or 0, (image.Rows, image.Columns, image.SamplesPerPixel))
    if image.Rows * image.Columns > most:
        raise ValueError(
            f"must have at most {most} pixels, got {image.Columns} x {image.Rows}; make it smaller"
        )
    return image


def _colours(values: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    if window is not None:
        raise ValueError("a window is for greys, got colours; leave it out")
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[-1] != 3:
        raise ValueError(f"colours must be three of 8 bits, got {values.dtype} {list(values.shape)}")
    return values


def _grey_window(
    image: Any, greys: np.ndarray, window: tuple[float, float] | None, only_deep: bool, folder: str
) -> tuple[float, float] | None:
    """(black, white) of rescaled greys [y, x], None for the window of the file."""
    if greys.ndim != 2 or not np.isfinite(greys).all():
        raise ValueError(f"greys must be finite [y, x], got {list(greys.shape)}")
    low, high = float(greys.min()), float(greys.max())
    # Greys of 8 bits may be rescaled to values outside 0..255, to HU for example.
    deep = image.BitsStored > 8 or low < 0 or high > 255
    if window is not None and (deep or not only_deep):
        return window
    if None not in (image.get("WindowCenter"), image.get("WindowWidth")):
        return None
    if not deep:
        return 0, 255
    _warn_of_windows(folder)
    # An image of one grey would be divided by 0.
    return low, max(high, low + 1)


def _by_file(image: Any, greys: np.ndarray) -> np.ndarray:
    """Greys through the first window of the file, from 0 to 255."""
    from pydicom import Dataset, pixels

    view = Dataset()  # pydicom's range is that of the bits which it names, so 8 unsigned ones
    view.PhotometricInterpretation, view.BitsStored, view.PixelRepresentation = "MONOCHROME2", 8, 0
    for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
        if name in image:
            view[name] = image[name]
    return pixels.apply_windowing(greys, view).clip(0, 255).round().astype(np.uint8)


@functools.lru_cache(maxsize=1024)  # once for a folder, however many and however often its images are opened
def _warn_of_windows(folder: str) -> None:
    _log.warning(
        "%s: DICOM images that name no window are shown from their lowest grey to their highest; give one "
        "(chat.window, embed.window)",
        folder or "images in memory",
    )
