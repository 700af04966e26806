"""DICOM files without what tells who they are about: a header by the actions of the basic profile, pixels as pages.

The table of the profile (PS3.15, table E.1-1) names what to remove. Here what is not known to be harmless is removed
as well: private attributes, all text, names, dates, times and ages, and sequences, but for those of
`dicom_profile.toml`.
"""

import functools
import hashlib
import io
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medvl.base.dicom import BROKEN, no_warnings
from medvl.documents.read_page import read_page
from medvl.documents.redact import Redacted, mask_of, redact_page
from medvl.documents.words import Word
from medvl.language.dicom_image import read_size
from medvl.language.images import open_image

_MOST_FRAMES = 64  # each is read twice or more, 3 s each time
# Kinds of values: names, dates and ages, text, bytes, sequences.
_PRIVATE = {"PN", "DA", "DT", "TM", "AS", "AE", "LO", "LT", "SH", "ST", "UC", "UN", "UR", "UT"}
_PRIVATE |= {"OB", "OD", "OF", "OL", "OV", "OW", "SQ"}
_METHOD = ["medvl redact: basic profile of PS3.15", "text, dates, private removed", "burned-in text by OCR"]


def redact_dicom(
    content: bytes,
    known: Sequence[tuple[str, str]] = (),
    *,
    read: Callable[[Image.Image], list[Word]] = read_page,
) -> tuple[bytes, list[Redacted]]:
    """A DICOM file with a header by the basic profile and what `redact_page` finds blacked out in each frame.

    Names and numbers of the header are sought in the frames. UIDs are hashed, so that files of a series stay together;
    who has an old one can tell its new one. BurnedInAnnotation says NO only where the last reading found nothing.

    Args:
        known: as in `redact_page`.
    Returns:
        the file, explicit VR little endian without compression, and its frames.
    Raises:
        ValueError: as `read_dicom`, without what the file says; more than 64 frames, big endian, pixels that are not
            of 8, 16 or 32 bits.
    """
    try:
        from pydicom import dcmread, pixels, uid
    except ImportError as e:
        raise ValueError("redact_dicom: needs pydicom; pip install 'medvl[dicom]'") from e
    with _reading():
        count, _, _ = read_size(content, "redact")
        original = dcmread(io.BytesIO(content))
        known = [*known, *_known_values(original)]
        if original.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian or original.BitsAllocated % 8:
            raise ValueError("only little endian and whole bytes are written")
    if count > _MOST_FRAMES:
        raise ValueError(
            f"redact_dicom: a file must have at most {_MOST_FRAMES} frames, got {count}; each is read several "
            "times, give those that are needed as files of their own"
        )
    frames, redacted = [], []
    for number in range(count):
        with _reading():
            image = open_image(content, page=number, full_range=True)
            values = np.array(pixels.pixel_array(original, index=number))
            black = _black_value(original, values)
        page = redact_page(image, known, read=read)
        values[mask_of(values.shape[:2], page.found)] = black
        frames.append(values)
        redacted.append(page)
    with _reading():
        new = clean_header(original)
        # YBR was made RGB as it was decoded.
        if new.SamplesPerPixel == 3:
            new.PhotometricInterpretation, new.PlanarConfiguration = "RGB", 0
        new.BitsAllocated = 8 * values.itemsize
        data = np.stack(frames).tobytes()
        new.add_new("PixelData", "OW", data + bytes(len(data) % 2))
        new.BurnedInAnnotation = "YES" if any(page.left for page in redacted) else "NO"
        file = io.BytesIO()
        new.save_as(file, enforce_file_format=True)
    return file.getvalue(), redacted


def _black_value(original: Any, values: np.ndarray) -> int:
    """The stored value that `open_image` shows black."""
    if values.ndim == 3:
        return 0
    low, high = float(values.min()), float(values.max())
    if "WindowCenter" in original:
        # Twice the window: its ends are nearly black and white only (PS3.3, C.11.2.1.2).
        center, width = (np.ravel(original[name].value)[0] for name in ("WindowCenter", "WindowWidth"))
        slope, intercept = original.get("RescaleSlope", 1), original.get("RescaleIntercept", 0)
        ends = [(float(center) + side * float(width) - float(intercept)) / float(slope) for side in (-1, 1)]
        low, high = ends if slope > 0 else ends[::-1]
    elif original.BitsStored <= 8:
        low, high = -128 * original.PixelRepresentation, 255
    is_highest = original.PhotometricInterpretation == "MONOCHROME1"
    if original.get("RescaleSlope", 1) < 0:
        is_highest = not is_highest
    limits = np.iinfo(values.dtype)
    unused = original.BitsAllocated - original.BitsStored
    return int(np.clip(high if is_highest else low, limits.min >> unused, limits.max >> unused))


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what pydicom raises into one error without its cause, which may quote what the file says."""
    try:
        with no_warnings():
            yield
    except BROKEN:
        raise ValueError(
            "redact_dicom: this file cannot be read: broken, or of a form that is not read (enhanced objects, big "
            "endian, no pixels of 8, 16 or 32 bits)"
        ) from None


def clean_header(original: Any) -> Any:
    """A new data set with what the profile leaves of one, and what says that it was applied."""
    from pydicom import dataset, uid

    new = _cleaned(original)
    new.PatientIdentityRemoved, new.DeidentificationMethod = "YES", _METHOD
    new.LongitudinalTemporalInformationModified = "REMOVED"
    new.file_meta = dataset.FileMetaDataset()
    new.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return new


@functools.cache
def _profile() -> dict[str, frozenset[str]]:
    """The lists of `dicom_profile.toml`."""
    text = Path(__file__).with_name("dicom_profile.toml").read_text(encoding="utf-8")
    return {action: frozenset(names) for action, names in tomllib.loads(text).items()}


def _cleaned(original: Any) -> Any:
    from pydicom import DataElement, Dataset

    profile = _profile()
    new = Dataset()
    for element in original:
        name, kind = element.keyword, element.VR
        # Groups 50xx and 60xx are curves and overlays; attributes without a keyword are private or unknown.
        if not name or element.tag.group >> 8 in (0x50, 0x60) or name in profile["remove"]:
            continue
        if name in profile["empty"]:
            new.add(DataElement(element.tag, kind, ""))
        elif kind == "UI":
            new.add(DataElement(element.tag, kind, _new_uids(name, element.value)))
        elif kind == "SQ" and name in profile["keep"]:
            new.add(DataElement(element.tag, kind, [_cleaned(item) for item in element.value]))
        elif name in profile["keep"] or kind not in _PRIVATE:
            new.add(element)
    return new


def _new_uids(name: str, value: Any) -> Any:
    """A UID, or several, by the hash of the old ones; those of classes stay."""
    if name.endswith("ClassUID") or name in _profile()["keep_uids"] or not value:
        return value
    if not isinstance(value, str):
        return [_new_uids(name, part) for part in value]
    # The root 2.25 is for numbers of 128 bits (PS3.5, B.2).
    return f"2.25.{int.from_bytes(hashlib.sha256(value.encode()).digest()[:16], 'big')}"


def _known_values(original: Any) -> Iterator[tuple[str, str]]:
    """(kind, text) of the names and numbers of a header, those of its sequences, too."""
    for element in original.iterall():
        if element.VR == "PN":
            yield "name", str(element.value)
        elif element.keyword in ("PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID"):
            yield "record", str(element.value)
