"""`invoke redact`: a page, a PDF or a DICOM file without what tells who it is about."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from medvl.base import files
from medvl.documents.read_page import check_reader
from medvl.documents.redact import KINDS, Redacted, redact_page
from medvl.documents.redact_dicom import redact_dicom
from medvl.hub.checkpoints import check_new_folder, new_folder
from medvl.language.images import LARGEST
from medvl.serve.uploads import Limits, count_pages, open_pages

# One page at a time is opened here, so only pages are bounded.
_LIMITS = Limits(file_bytes=2**30, pages=1000, page_pixels=LARGEST, pixels=2**31)
_NO_PROMISE = (
    "No promise that nothing is left: rules and OCR pass over handwriting, faces, signatures, bar codes, names without "
    "a label or title and rare words that tell who somebody is. Look at each page. Research use only."
)


def redact(source: str, out: str, known: str = "") -> int:
    """Write a file without what `documents.redact` finds, and print how much that was, page by page.

    A DICOM file becomes one of DICOM, a picture a PNG; a PDF, or a TIFF of several pages, becomes a folder of PNGs.

    Args:
        known: file of names and numbers that are sought as well, one a line.
    Returns:
        the exit status: 3 where the last reading still found something, else 0.
    Raises:
        ValueError: as `count_pages`, `redact_page` and `redact_dicom`; no such file; `out` cannot be written.
    """
    if not Path(source).is_file():
        raise ValueError(f"redact: {source}: no such file")
    if Path(out).exists() and Path(out).samefile(source):
        raise ValueError(f"redact: {out}: is the source itself, which would be lost; give another --out")
    check_reader()
    values = _read_known(known) if known else []
    content = Path(source).read_bytes()
    if content[128:132] == b"DICM":
        files.check_writable(out)
        with _named(source):
            data, redacted = redact_dicom(content, values)
        with files.atomic(out) as tmp:
            tmp.write_bytes(data)
        return _report(redacted)
    with _named(source):
        pages = count_pages(content, _LIMITS)
    images = (_open_page(source, content, number) for number in pages.numbers)
    if pages.kind == "pdf" or len(pages.numbers) > 1:
        check_new_folder(out)
        with new_folder(out) as folder:
            return _report(_written(images, values, folder))
    files.check_writable(out)
    page = redact_page(next(images), values)
    with files.atomic(out) as tmp:
        page.image.save(tmp, "PNG")
    return _report([page])


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Errors of the block name the file: what reads its content does not know its name."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"redact: {source}: {e}") from e


def _open_page(source: str, content: bytes, number: int) -> Image.Image:
    with _named(source):
        return open_pages(content, _LIMITS, (number,))[0]


def _read_known(path: str) -> list[tuple[str, str]]:
    """(kind, text) of each line of a file: what has a digit is a number."""
    files.check_regular(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: must be a text file, one name or number a line") from e
    return [("record" if any(map(str.isdigit, line)) else "name", line) for line in lines if line.strip()]


def _written(
    images: Iterable[Image.Image], known: Sequence[tuple[str, str]], folder: Path
) -> Iterable[Redacted]:
    for number, image in enumerate(images, 1):
        page = redact_page(image, known)
        page.image.save(folder / f"{number:04}.png", "PNG")
        yield page


def _report(pages: Iterable[Redacted]) -> int:
    """Print what was done with each page, without what it said."""
    left = 0
    for number, page in enumerate(pages, 1):
        counts = Counter(finding.kind for finding in page.found)
        kinds = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind]) or "nothing"
        print(f"page {number}: blacked out: {kinds}; left after {page.readings} readings: {len(page.left)}")
        left += len(page.left)
    print(_NO_PROMISE)
    return 3 if left else 0
