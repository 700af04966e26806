"""Uploaded files of each kind, good and bad, as bytes that the tests make."""

import io
import struct
import zlib

import numpy as np
import pydicom
from PIL import Image

from tests.language.test_dicom_image import made as dicom

FORMATS = {"png": "PNG", "jpeg": "JPEG", "tiff": "TIFF", "webp": "WEBP", "pdf": "PDF"}


def picture(width=40, height=30, mode="RGB", seed=0):
    """Soft colours, which JPEG keeps about as they are."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(kind, *pages, **options):
    file = io.BytesIO()
    first, *rest = pages or (picture(),)
    if rest:
        options |= {"save_all": True, "append_images": rest}
    if kind == "webp":
        options |= {"lossless": True}
    first.save(file, FORMATS[kind], **options)
    return file.getvalue()


def empty_png(width, height):
    """The PNG of a claim: a header and no pixels, 68 bytes long."""
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"abc")),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


def tiff(sizes, *, endless=False, extra=()):
    """Directories of a TIFF without pixels, one for each (width, height).

    Args:
        endless: the last is followed by the first.
        extra: further (tag, type, count, value) of each.
    """
    content = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number, (width, height) in enumerate(sizes):
        entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
        entries += [(273, 4, 1, 0), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 0)]
        given = {entry[0] for entry in extra}
        entries = sorted([entry for entry in entries if entry[0] not in given] + list(extra))
        content += struct.pack("<H", len(entries))
        for tag, kind, count, value in entries:
            data = struct.pack("<H2x" if kind == 3 and count == 1 else "<I", value)
            content += struct.pack("<HHI", tag, kind, count) + data
        is_last = number == len(sizes) - 1
        content += struct.pack("<I", (8 if endless else 0) if is_last else len(content) + 4)
    return bytes(content)


def webp_canvas(width, height):
    """A WebP whose extended header claims a canvas that its picture does not fill."""
    still = saved("webp")
    header = b"\0" * 4 + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + header + still[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pdf(pages=1, width=612, height=792, *, text="", trailer="", objects=()):
    """A PDF of pages that say `text`; without a table of its objects, which PDFium makes itself."""
    kids = " ".join(f"{10 + i} 0 R" for i in range(pages))
    stream = f"BT /F1 24 Tf 72 100 Td ({text}) Tj ET"
    parts = [
        "%PDF-1.7\n1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj",
        f"2 0 obj <</Type /Pages /Count {pages} /Kids [{kids}]>> endobj",
        f"3 0 obj <</Length {len(stream)}>> stream\n{stream}\nendstream endobj",
        "4 0 obj <</Type /Font /Subtype /Type1 /BaseFont /Helvetica>> endobj",
    ]
    for i in range(pages):
        parts.append(
            f"{10 + i} 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] /Contents 3 0 R "
            "/Resources <</Font <</F1 4 0 R>>>> >> endobj"
        )
    parts += [*objects, f"trailer <</Root 1 0 R {trailer}>>", "%%EOF"]
    return "\n".join(parts).encode("latin-1")


def encrypted_pdf():
    key = "1234567890123456" * 2
    return pdf(
        trailer="/Encrypt 5 0 R /ID [(0123456789abcdef) (0123456789abcdef)]",
        objects=[f"5 0 obj <</Filter /Standard /V 1 /R 2 /O ({key}) /U ({key}) /P -4>> endobj"],
    )


def dicom_frames(count, side=8, syntax=pydicom.uid.ExplicitVRLittleEndian):
    values = np.arange(count * side * side, dtype=np.uint8).reshape(count, side, side)
    content = dicom(values[0], syntax)
    image = pydicom.dcmread(io.BytesIO(content))
    image.NumberOfFrames, image.PixelData = count, values.tobytes()
    file = io.BytesIO()
    image.save_as(file, enforce_file_format=True)
    return file.getvalue()


def small_files():
    """A valid file of each kind and of the forms that have decoders of their own."""
    page = picture()
    return {
        "png": saved("png"),
        "deep png": saved("png", Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))),
        "palette png": saved("png", page.convert("P")),
        "jpeg": saved("jpeg"),
        "progressive jpeg": saved("jpeg", progressive=True),
        "tiff": saved("tiff", page, picture(20, 50)),
        "lzw tiff": saved("tiff", compression="tiff_lzw"),
        "fax tiff": saved("tiff", page.convert("1"), compression="group4"),
        "jpeg tiff": saved("tiff", compression="jpeg"),
        "webp": saved("webp"),
        "pdf": saved("pdf", page, page),
        "text pdf": pdf(2, 72, 100, text="words"),
        "dicom": dicom(),
        "rle dicom": dicom(syntax=pydicom.uid.RLELossless),
        "j2k dicom": dicom(syntax=pydicom.uid.JPEG2000Lossless),
        "frames dicom": dicom_frames(3),
    }
