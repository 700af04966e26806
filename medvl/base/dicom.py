"""What every reader of DICOM files needs: which of them can be decoded, what breaks them, and silence about
what they hold.
"""

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

_DEFLATED = "1.2.840.10008.1.2.1.99"  # would be unpacked whole before anything is known of its size
MISSING = "is a DICOM file, which needs pydicom; pip install 'medvl[dicom]'"
# What pydicom and its decoders raise on broken files.
BROKEN = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def check_syntax(file: BinaryIO, *, force: bool = False) -> None:
    """Raise where pydicom and its decoders cannot read the transfer syntax of a file, which is read from its
    start.

    Args:
        force: a file without preamble is read, too, and one that names no syntax is uncompressed.
    Raises:
        ValueError: the syntax, and what to install.
    """
    from pydicom import filereader, pixels

    # Only the file meta information, group 0002, is read here: dcmread would unpack a deflated data set at
    # once.
    filereader.read_preamble(file, force)
    syntax = filereader.read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2).get(
        "TransferSyntaxUID", ""
    )
    if force and not syntax:
        return
    try:
        known = syntax != _DEFLATED and pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        known = False
    if not known:
        name = getattr(syntax, "name", syntax) or "none"
        raise ValueError(
            f"its transfer syntax ({name}) is not read; pip install 'medvl[dicom]', or write it uncompressed"
        )


@contextmanager
def no_warnings() -> Iterator[None]:
    """Drop warnings and log lines while the block lasts, of all threads: pydicom quotes the value that it does not
    like, and Pillow logs the tags of TIFF for debugging.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def check_coded_shape(image: Any, frame: int, shape: tuple[int, int, int]) -> None:
    """Raise where the coded picture of a frame has other rows, columns and samples than `shape`, those of the
    header: a decoder takes room by what the picture says.
    """
    from pydicom import encaps

    syntax = image.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or "RLE" in syntax.name:
        return
    count = int(image.get("NumberOfFrames") or 1)
    coded = _coded_shape(encaps.get_frame(image.PixelData, frame, number_of_frames=count))
    if coded != shape:
        raise ValueError(
            f"rows, columns and samples must be {coded} as those of its coded picture, got {shape}"
        )


def _coded_shape(frame: bytes) -> tuple[int, int, int]:
    """(rows, columns, samples) by the header of JPEG, JPEG-LS or JPEG 2000.

    Source: ITU-T T.81, B.2.2; T.87, C.2.2; T.800, A.5.1.
    """
    if frame.startswith(b"\xff\x4f\xff\x51"):
        # Behind the markers SOC and SIZ (2 bytes each), Lsiz and Rsiz: the far corner and the offset of the
        # image; 16 bytes on sizes of tiles are passed over.
        right, bottom, left, top, samples = struct.unpack_from(">4I16xH", frame, 8)
        return bottom - top, right - left, samples
    if not frame.startswith(b"\xff\xd8"):
        raise ValueError("its coded picture begins with none of the markers of JPEG, JPEG-LS and JPEG 2000")
    at = 2
    while True:
        marker, length, _, rows, columns, samples = struct.unpack_from(">HHBHHB", frame, at)
        # Start of frame: SOF55 of JPEG-LS, or one of JPEG's. C4 (DHT), C8 (reserved) and CC (DAC) lie among
        # those and are no frames.
        if marker == 0xFFF7 or (0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC)):
            return rows, columns, samples
        # The length of a segment counts its own two bytes and not those of the marker.
        at += 2 + length
