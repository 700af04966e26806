"""Uploads become pictures of pages, or are refused before anything large is decoded."""

import io
import pickle
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageOps

from medvl.serve.interface import Refused
from medvl.serve.uploads import Limits, count_pages, open_pages, open_uploads, sniff
from tests.language.test_dicom_image import made
from tests.serve import files

LIMITS = Limits()


def status(call, *args, **kwargs):
    with pytest.raises(Refused) as refused:
        call(*args, **kwargs)
    return refused.value.status, str(refused.value)


# What is opened ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", files.small_files())
def test_every_kind_is_opened(name):
    content = files.small_files()[name]
    chosen = (0, 2) if name == "frames dicom" else ()
    kind = sniff(content)
    assert kind == name.split()[-1]
    pages = count_pages(content, LIMITS, chosen)
    images = open_pages(content, LIMITS, chosen)
    assert pages.kind == kind
    assert [image.mode for image in images] == ["RGB"] * len(pages.numbers)
    for image, size in zip(images, pages.sizes, strict=True):
        # A part of a pixel of a PDF page is a pixel of its picture.
        assert np.abs(np.subtract(image.size, size)).max() <= (1 if kind == "pdf" else 0)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_pixels_stay(kind):
    pages = [files.picture(40, 30), files.picture(20, 50, seed=1)][: 2 if kind == "tiff" else 1]
    opened = open_pages(files.saved(kind, *pages), LIMITS)
    for image, page in zip(opened, pages, strict=True):
        np.testing.assert_array_equal(np.array(image), np.array(page))


def test_photographs_stand_upright():
    page = files.picture()
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter
    (image,) = open_pages(files.saved("jpeg", page, exif=tags), LIMITS)
    tagged = Image.open(io.BytesIO(files.saved("jpeg", page, exif=tags)))
    assert image.size == (30, 40)
    np.testing.assert_array_equal(np.array(image), np.array(ImageOps.exif_transpose(tagged)))


def test_deep_greys_are_shown_in_full():
    greys = np.arange(1200, dtype=np.uint16).reshape(30, 40) * 3 + 5000
    (image,) = open_pages(files.saved("png", Image.fromarray(greys)), LIMITS)
    expected = np.round((greys - 5000) / 3597 * 255)
    np.testing.assert_array_equal(np.array(image)[..., 0], expected)
    (image,) = open_pages(files.saved("png", Image.fromarray(greys)), LIMITS, window=(5000, 6000))
    np.testing.assert_array_equal(np.array(image)[..., 1], np.round((greys - 5000.0).clip(0, 1000) * 0.255))


def test_frames_and_pages_are_chosen():
    content = files.dicom_frames(3)
    opened = open_pages(content, LIMITS, (2, 0))
    values = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    np.testing.assert_array_equal(np.array(opened[0])[..., 0], values[2])
    np.testing.assert_array_equal(np.array(opened[1])[..., 0], values[0])
    assert count_pages(files.pdf(500), LIMITS, (7, 499)).numbers == (7, 499)
    two = files.saved("tiff", files.picture(), files.picture(20, 50))
    assert open_pages(two, LIMITS, (1,))[0].size == (20, 50)
    for chosen in ((3,), (-1,), (0, 0)):
        assert status(open_pages, content, LIMITS, chosen)[0] == 422


def test_pages_of_pdf_show_text_and_filled_forms():
    white = np.array(open_pages(files.pdf(1, 200, 200), LIMITS)[0])
    assert white.shape == (417, 417, 3)  # 200 points at 150 dpi
    assert white.min() == 255
    assert np.array(open_pages(files.pdf(1, 200, 200, text="hello"), LIMITS)[0]).min() < 50
    look = "BT /F1 20 Tf 5 5 Td (filled) Tj ET"
    form = [
        "5 0 obj <</Type /Annot /Subtype /Widget /FT /Tx /T (a) /V (filled) /Rect [20 20 180 60] /P 10 0 R "
        "/F 4 /DA (/F1 20 Tf 0 g) /AP <</N 6 0 R>> >> endobj",
        f"6 0 obj <</Type /XObject /Subtype /Form /BBox [0 0 160 40] /Resources <</Font <</F1 4 0 R>>>> "
        f"/Length {len(look)}>> stream\n{look}\nendstream endobj",
    ]
    content = files.pdf(1, 200, 200, objects=form)
    content = content.replace(b"/Type /Catalog", b"/Type /Catalog /AcroForm <</Fields [5 0 R] >> ")
    content = content.replace(b"/Contents 3", b"/Annots [5 0 R] /Contents 3")
    assert np.array(open_pages(content, LIMITS)[0]).min() < 50


def test_files_of_a_request_together():
    one, two = files.saved("png"), files.saved("tiff", files.picture(), files.picture(20, 50))
    assert [len(pages) for pages in open_uploads([one, two], LIMITS)] == [1, 2]
    assert status(open_uploads, [one, two], Limits(pages=2))[0] == 400
    assert status(open_uploads, [one, two], Limits(pixels=3000))[0] == 400
    assert status(open_uploads, [one, two], Limits(files=1))[0] == 413
    assert status(open_uploads, [one, two], LIMITS, (0,))[0] == 422
    assert status(open_uploads, [], LIMITS)[0] == 422


# What is refused --------------------------------------------------------------------------------------------
BAD = {
    "claim.png": (files.empty_png(20_000, 20_000), 400, "pixels"),
    "claim below Pillow's own limit.png": (files.empty_png(8000, 8000), 400, "pixels"),
    "strip.png": (files.empty_png(2, 401), 400, "times as long"),
    "nothing.png": (files.empty_png(0, 10), 400, ""),
    "many.tif": (files.tiff([(10, 10)] * 10_000), 400, "pages"),
    "endless.tif": (files.tiff([(10, 10)], endless=True), 400, "pages"),
    "later page.tif": (files.tiff([(10, 10), (20_000, 20_000)]), 400, "page 2"),
    "together.tif": (files.tiff([(6000, 6000)] * 3), 400, "all pages"),
    "tiles.tif": (files.tiff([(10, 10)], extra=[(322, 4, 1, 60_000), (323, 4, 1, 60_000)]), 400, "tile"),
    "strips.tif": (files.tiff([(10, 10)], extra=[(273, 4, 5_000_000, 8)]), 400, "parts"),
    "two sizes.tif": (files.tiff([(10, 10)], extra=[(256, 4, 1, 90_000)] * 2), 400, "cannot be read"),
    "canvas.webp": (files.webp_canvas(16_000, 16_000), 400, "pixels"),
    "smaller canvas.webp": (files.webp_canvas(4000, 4000), 400, "cannot be read"),
    "animated.webp": (files.saved("webp", files.picture(), files.picture(seed=1)), 400, "animated"),
    "animated.png": (files.saved("png", files.picture(), files.picture(seed=1)), 400, "animated"),
    "scans.jpg": (files.saved("jpeg") + b"\xff\xda" * 1000, 400, "scans"),
    "long.pdf": (files.pdf(500), 400, "500"),
    "10 m.pdf": (files.pdf(1, 28_346, 28_346), 400, "pixels"),
    "encrypted.pdf": (files.encrypted_pdf(), 400, "encrypted"),
    "no pages.pdf": (b"%PDF-1.7\nnothing of a PDF", 400, "cannot be read"),
    "frames.dcm": (files.dicom_frames(300), 400, "300 frames"),
    "claim.dcm": (made(Rows=20_000, Columns=20_000), 400, "pixels"),
    "coded.dcm": (made(syntax=pydicom.uid.JPEG2000Lossless, Rows=41), 400, "page 1"),
    "zip.png": (b"PK\3\4" + bytes(200), 415, "PNG"),
    "page.html": (b"<!doctype html><html>", 415, ""),
    "gif": (b"GIF89a" + bytes(200), 415, ""),
    "bmp": (b"BM" + bytes(200), 415, ""),
    "big.tif": (b"II+\0" + bytes(200), 415, ""),
    "empty": (b"", 415, ""),
    "long": (files.saved("png") + bytes(LIMITS.file_bytes), 413, "bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name):
    content, expected, word = BAD[name]
    found, message = status(open_pages, content, LIMITS)
    assert found == expected
    assert word in message


def test_the_claim_is_as_short_as_it_is_said():
    assert len(files.empty_png(20_000, 20_000)) == 68


def test_cut_files_say_which_page():
    for bad in (files.saved("png")[:-300], files.saved("jpeg")[:-300], files.saved("webp")[:-300]):
        found, message = status(open_pages, bad, LIMITS)
        assert found == 400
        assert "cannot be read" in message
    _, message = status(open_pages, files.saved("png")[:-300], LIMITS)
    assert message.startswith("page 1 of the PNG file")
    two = files.saved("tiff", files.picture(), files.picture(200, 300))
    _, message = status(open_pages, two[:-1000], LIMITS)
    assert message.startswith("page 2 of the TIFF file")


def test_a_broken_page_of_a_pdf(monkeypatch):
    import pypdfium2

    def broken(page, **kwargs):
        raise pypdfium2.PdfiumError("about Doe, Jane")

    monkeypatch.setattr(pypdfium2.PdfPage, "render", broken)
    found, message = status(open_pages, files.pdf(3), LIMITS)
    assert (found, message[:27]) == (400, "page 1 of the PDF file cann")
    assert "Doe" not in message


def test_nothing_of_a_file_is_quoted(caplog):
    """A name is planted where pydicom warns of values and errors quote them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        colours = made(PhotometricInterpretation="DOE^JANE")
    number = made(NumberOfFrames="2").replace(b"IS\x02\x002 ", b"IS\x02\x00JD")
    for bad in (colours, number):
        caplog.clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with pytest.raises(Refused) as refused:
                open_pages(bad, LIMITS)
        assert not warned
        assert not caplog.text
        assert "DOE" not in str(refused.value)
        assert "JD" not in str(refused.value)
        assert refused.value.__suppress_context__


def test_records_cross_processes():
    pages = count_pages(files.saved("png"), LIMITS)
    assert pickle.loads(pickle.dumps((open_uploads, LIMITS, pages)))[1:] == (LIMITS, pages)
    with pytest.raises(ValueError, match=r"Limits\.dpi must be 1 or more"):
        Limits(dpi=0)


# In a process of its own ------------------------------------------------------------------------------------
MEMORY = """
import resource
from medvl.serve import uploads
from medvl.serve.interface import Refused
from tests.serve import files
from tests.serve.test_uploads import BAD

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

uploads.open_pages(files.pdf(1), uploads.Limits())  # loads PDFium
before = peak()
for name, (content, _, _) in BAD.items():
    try:
        uploads.open_pages(content, uploads.Limits())
    except Refused:
        print(f"{peak() - before:.0f} {name}")
"""
FUZZ = """
import random
from medvl.serve import uploads
from medvl.serve.interface import Refused
from tests.serve import files

random.seed(SEED)
limits = uploads.Limits(page_pixels=10**6, pixels=10**6)
opened = refused = 0
for name, content in files.small_files().items():
    for _ in range(TRIES):
        bad = bytearray(content)
        for _ in range(random.choice((1, 1, 2, 5, 20))):
            # Headers are near the beginning more often than by chance.
            at = random.randrange(random.choice((len(bad), min(len(bad), 400))))
            bad[at] = random.choice((0, 255, bad[at] ^ 1 << random.randrange(8)))
        if random.random() < 0.3:
            bad = bad[: random.randrange(len(bad))]
        try:
            images = uploads.open_pages(bytes(bad), limits, (0,))
            assert all(image.mode == "RGB" and image.tobytes() for image in images)
            opened += 1
        except Refused as e:
            assert e.status in (400, 413, 415, 422)
            refused += 1
print(opened, refused)
"""
BOMB = """
import sys
from medvl.serve import uploads
from tests.serve import files

uploads.limit_memory(600)
uploads.open_pages(files.pdf(1), uploads.Limits())
print("begun", flush=True)
uploads.open_pages(sys.stdin.buffer.read(), uploads.Limits())
print("opened")
"""


def run(code, content=b""):
    return subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=False)


def test_refusing_takes_no_memory():
    done = run(MEMORY)
    assert not done.returncode, done.stderr[-2000:]
    lines = [line.split(maxsplit=1) for line in done.stdout.decode().splitlines()]
    assert [name for _, name in lines] == [*BAD]
    assert max(int(mib) for mib, _ in lines) < 40, lines


def test_damaged_files_end_in_pictures_or_one_error():
    done = run(FUZZ.replace("SEED", "7").replace("TRIES", "25"))
    assert not done.returncode, (done.returncode, done.stderr[-2000:])
    opened, refused = map(int, done.stdout.split())
    assert opened + refused == 25 * len(files.small_files())
    assert min(opened, refused) > 30


def test_a_stream_that_unpacks_without_end_is_stopped():
    """A few KB that unpack to 400 MB within a PDF: the process ends, the machine does not."""
    stream = zlib.compress(zlib.compress(b" " * (4 * 10**8), 1), 9)
    content = files.pdf(1).replace(
        b"Length 31>> stream\n",
        b"Length %d /Filter [/FlateDecode /FlateDecode]>> stream\n" % len(stream) + stream,
    )
    done = run(BOMB, content)
    assert done.stdout.startswith(b"begun")
    assert b"opened" not in done.stdout
    assert done.returncode
