"""Uploaded files as pictures of pages. Only this file imports pypdfium2.

Everything that a header tells is checked before a pixel is decoded: kind, pages, pixels. What is refused is named
by its kind and page, never by its name or content, and what decoders warn of or log is dropped, since it may quote
the file. All functions are pure and belong into a process that may be killed: decoders are native code, take
seconds for a page, and PDFium is not safe between threads.
"""

import io
import resource
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import field, frozen
from PIL import Image

from medvl.base.dicom import no_warnings
from medvl.base.files import READ_ERRORS
from medvl.language import dicom_image
from medvl.language.images import open_image, to_rgb
from medvl.serve.interface import Refused
from medvl.serve.settings import Limits

NAMES = {"png": "PNG", "jpeg": "JPEG", "tiff": "TIFF", "webp": "WebP", "pdf": "PDF", "dicom": "DICOM"}
_PASSWORD = 4  # FPDF_ERR_PASSWORD
# Of the parts of a TIFF page: rows of pixels, tiles. A program that writes each row apart has fewer.
_MOST_PARTS = 2**16
_MOST_SCANS = 500  # of a JPEG: each passes over all pixels; a progressive one has about ten


@frozen(kw_only=True)
class Pages:
    """The pages of a file that will be opened."""

    kind: str  # of `NAMES`
    numbers: tuple[int, ...]  # counted from 0
    sizes: tuple[tuple[int, int], ...] = field(repr=False)  # width and height in pixels of each

    @property
    def pixels(self) -> int:
        return sum(width * height for width, height in self.sizes)


def sniff(content: bytes) -> str:
    """The kind of a file by its content: one of `NAMES`.

    Raises:
        Refused: 415, none of these.
    """
    # Before the others, as `open_image` does: these four bytes decide, whatever stands in the 128 before them.
    if content[128:132] == b"DICM":
        return "dicom"
    starts = {
        "png": (b"\x89PNG\r\n\x1a\n",),
        "jpeg": (b"\xff\xd8\xff",),
        "tiff": (b"II*\0", b"MM\0*"),
        "pdf": (b"%PDF-",),
    }
    for kind, signs in starts.items():
        if content.startswith(signs):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise Refused(
        415, f"a file must be {', '.join(NAMES.values())} by its content; this one is none of these"
    )


def count_pages(content: bytes, limits: Limits, chosen: Sequence[int] = ()) -> Pages:
    """The pages of a file that is within the limits; no pixel of it is decoded.

    Args:
        chosen: pages or frames to open, counted from 0; none = all. Frames of DICOM must be chosen where a file
            has several.
    Raises:
        Refused: 413, a file that is too long; 415, of no known kind; 400, a broken or encrypted one, too many
            pages or pixels, a strip, an animation; 422, pages chosen that it does not have.
    """
    if len(content) > limits.file_bytes:
        raise Refused(413, f"a file must have at most {limits.file_bytes:,} bytes, got {len(content):,}")
    kind = sniff(content)
    with _refusing(f"this {NAMES[kind]} file"):
        numbers, sizes = _HEADERS[kind](content, limits, tuple(chosen))
    for number, (width, height) in zip(numbers, sizes, strict=True):
        name = f"page {number + 1} of the {NAMES[kind]} file"
        if width < 1 or height < 1:
            raise Refused(400, f"{name} has no pixels")
        if width * height > limits.page_pixels:
            raise Refused(
                400, f"{name} must have at most {limits.page_pixels:,} pixels, got {width:,} x {height:,}"
            )
        if max(width, height) > limits.aspect * min(width, height):
            raise Refused(400, f"{name} must be at most {limits.aspect} times as long as wide")
    pages = Pages(kind=kind, numbers=numbers, sizes=sizes)
    _check_pixels(pages.pixels, limits)
    return pages


def open_pages(
    content: bytes,
    limits: Limits,
    chosen: Sequence[int] = (),
    *,
    window: tuple[float, float] | None = None,
) -> list[Image.Image]:
    """The pages of a file as RGB pictures, upright.

    Args:
        chosen: as in `count_pages`.
        window: (black, white) of greys of more than 8 bits; None = the window of the file, else from the lowest
            to the highest.
    Raises:
        Refused: as `count_pages`, and 400 for a page that cannot be read.
    """
    pages = count_pages(content, limits, chosen)
    if pages.kind == "pdf":
        return list(_pages_of_pdf(content, pages, limits))
    images = list[Image.Image]()
    for number in pages.numbers:
        # A picture of one page needs no number: its preview, behind a photograph of a phone, is not counted.
        page = number if pages.kind in ("tiff", "dicom") else None
        with _refusing(f"page {number + 1} of the {NAMES[pages.kind]} file"):
            images.append(
                open_image(
                    content,
                    page=page,
                    window=window,
                    only_deep=True,
                    full_range=True,
                    most=limits.page_pixels,
                )
            )
    return images


def open_uploads(
    contents: Sequence[bytes],
    limits: Limits,
    chosen: Sequence[int] = (),
    *,
    window: tuple[float, float] | None = None,
) -> list[list[Image.Image]]:
    """The pages of each file of a request. All are within the limits together before one of them is opened.

    Args:
        chosen: pages of a request of one file, as in `count_pages`.
    Raises:
        Refused: as `open_pages`, and 413 for too many files, 422 for chosen pages of several.
    """
    if not contents:
        raise Refused(422, "a request must have a file")
    if len(contents) > limits.files:
        raise Refused(413, f"a request must have at most {limits.files} files, got {len(contents)}")
    if chosen and len(contents) > 1:
        raise Refused(422, f"pages are chosen of one file, got {len(contents)} files")
    counted = [count_pages(content, limits, chosen) for content in contents]
    _check_count(sum(len(pages.numbers) for pages in counted), limits, "files")
    _check_pixels(sum(pages.pixels for pages in counted), limits)
    return [open_pages(content, limits, chosen, window=window) for content in contents]


def limit_memory(mib: int) -> None:
    """Bound what this process may allocate from now on; for a worker that only opens uploads.

    A stream within a PDF says nowhere what it unpacks to: 2 KB can be 2 GB. With a limit a decoder that wants
    more raises a MemoryError (413), or ends its process, which the caller then answers by 400.

    Args:
        mib: 2,048 is enough for all that `Limits()` lets through.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (mib * 2**20, mib * 2**20))


def _check_count(count: int, limits: Limits, name: str, advice: str = "") -> None:
    if count > limits.pages:
        raise Refused(400, f"{name} must have at most {limits.pages} pages, got {count:,}{advice}")


def _check_pixels(pixels: int, limits: Limits) -> None:
    if pixels > limits.pixels:
        raise Refused(400, f"all pages must have at most {limits.pixels:,} pixels, got {pixels:,}")


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn what decoders raise into a `Refused` that begins with `name` and quotes nothing."""
    try:
        with no_warnings():
            yield
    except Refused:
        raise
    except MemoryError:
        raise Refused(413, f"{name} takes too much memory") from None
    # Without its cause, which may quote what the file says.
    except (ValueError, *READ_ERRORS):
        raise Refused(400, f"{name} cannot be read: broken, or of a form that is not read") from None


# Headers: numbers and sizes of the pages that were chosen -----------------------------------------------------
_Header = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]


def _choose(count: int, limits: Limits, chosen: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The pages to open of a file of `count` pages."""
    if len(set(chosen)) < len(chosen) or not all(0 <= number < count for number in chosen):
        raise Refused(422, f"chosen pages must be of the {count:,} of the file, counted from 0, each once")
    _check_count(len(chosen) or count, limits, name, "; choose some of them")
    return chosen or tuple(range(count))


def _picture_header(content: bytes, limits: Limits, chosen: tuple[int, ...]) -> _Header:
    """Of PNG, JPEG or WebP, by Pillow, which reads the header only."""
    kind = NAMES[sniff(content)]
    if kind == "JPEG" and content.count(b"\xff\xda") > _MOST_SCANS:
        raise Refused(400, f"a JPEG file must have at most {_MOST_SCANS} scans")
    try:
        with Image.open(io.BytesIO(content), formats=[kind.upper()]) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise Refused(400, f"an animated {kind} file is not read; send its pictures")
            return _choose(1, limits, chosen, f"a {kind} file"), (image.size,)
    # Pillow refuses to open what has more than twice the pixels of its own limit.
    except Image.DecompressionBombError:
        raise Refused(400, f"a page must have at most {limits.page_pixels:,} pixels") from None


def _dicom_header(content: bytes, limits: Limits, chosen: tuple[int, ...]) -> _Header:
    count, width, height = dicom_image.read_size(content, "upload")
    if count > 1 and not chosen:
        raise Refused(400, f"this DICOM file has {count:,} frames; choose which are meant")
    numbers = _choose(count, limits, chosen, "a DICOM file")
    return numbers, ((width, height),) * len(numbers)


def _tiff_header(content: bytes, limits: Limits, chosen: tuple[int, ...]) -> _Header:
    """Walks the directories of a TIFF without reading what they point to. No more of them are visited than pages
    are allowed: Pillow would walk through a million.

    Source: TIFF 6.0, section 2.
    """
    order = "<" if content[:2] == b"II" else ">"
    sizes = list[tuple[int, int]]()
    (offset,) = struct.unpack_from(f"{order}I", content, 4)
    while offset:
        if len(sizes) == limits.pages:
            raise Refused(400, f"a TIFF file must have at most {limits.pages} pages, and this one has more")
        tags = _tiff_directory(content, order, offset)
        # Tiles at the edge reach beyond the page, and a tile is decoded whole.
        tile = tags.get(322, 0) * tags.get(323, 0)
        if tile > limits.page_pixels:
            raise Refused(400, f"a tile of a TIFF file must have at most {limits.page_pixels:,} pixels")
        sizes.append((tags.get(256, 0), tags.get(257, 0)))
        (offset,) = struct.unpack_from(f"{order}I", content, tags["next"])
    numbers = _choose(len(sizes), limits, chosen, "a TIFF file")
    return numbers, tuple(sizes[number] for number in numbers)


def _tiff_directory(content: bytes, order: str, offset: int) -> dict[Any, int]:
    """Width (256), height (257), width and height of a tile (322, 323), and where the offset of the next is."""
    (count,) = struct.unpack_from(f"{order}H", content, offset)
    tags = dict[Any, int]()
    for start in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", content, start)
        # Bytes and text (1, 2, 7) stay as they are; anything else becomes a Python object a number.
        if length > _MOST_PARTS and kind not in (1, 2, 7):
            raise Refused(400, f"a TIFF page must have at most {_MOST_PARTS:,} parts, got {length:,}")
        if tag in (256, 257, 322, 323):
            if tag in tags or length != 1 or kind not in (3, 4):
                raise ValueError("a size must be one whole number")
            (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), content, start + 8)
    tags["next"] = offset + 2 + 12 * count
    return tags


# PDF --------------------------------------------------------------------------------------------------------
@contextmanager
def _pdf(content: bytes) -> Iterator[Any]:
    """An open PDF, with the values of its forms."""
    try:
        import pypdfium2
    except ImportError:
        raise Refused(415, "PDF is not read here: it needs pypdfium2; pip install 'medvl[serve]'") from None
    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as e:
        if e.err_code == _PASSWORD:
            raise Refused(400, "this PDF file is encrypted; send it without a password") from None
        raise
    try:
        # What is filled in is drawn only by this; the library has no JavaScript in it.
        document.init_forms()
        yield document
    finally:
        document.close()


def _pdf_header(content: bytes, limits: Limits, chosen: tuple[int, ...]) -> _Header:
    with _pdf(content) as document:
        numbers = _choose(len(document), limits, chosen, "a PDF file")
        sizes = list[tuple[int, int]]()
        for number in numbers:
            width, height = document.get_page_size(number)  # in points of 1/72 inch
            sizes.append((round(width * limits.dpi / 72), round(height * limits.dpi / 72)))
    return numbers, tuple(sizes)


def _pages_of_pdf(content: bytes, pages: Pages, limits: Limits) -> Iterator[Image.Image]:
    with _refusing("this PDF file"), _pdf(content) as document:
        for number in pages.numbers:
            with _refusing(f"page {number + 1} of the PDF file"):
                page = document[number]
                bitmap = page.render(scale=limits.dpi / 72)
                image = to_rgb(bitmap.to_pil(), "upload")
                bitmap.close()
                page.close()
            yield image


_HEADERS = {
    "png": _picture_header,
    "jpeg": _picture_header,
    "webp": _picture_header,
    "tiff": _tiff_header,
    "pdf": _pdf_header,
    "dicom": _dicom_header,
}
