"""Image files: transformers is the peer; broken ones are one kind of error."""

import gzip
import itertools
import math
import random
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medvl.language.images import LARGEST, cap_pixels, open_image, to_rgb
from tests.tiny import drawn, saved


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_files_are_turned_upright_as_transformers_does(format, tmp_path):
    from transformers.image_utils import load_image

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.img"  # the content decides
        path.write_bytes(
            saved(drawn((40, 23)), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
        )
        got = open_image(path)
        assert got.mode == "RGB"
        assert got.size == ((40, 23) if orientation < 5 else (23, 40))
        assert np.array_equal(np.array(got), np.array(load_image(str(path))))
        assert np.array_equal(np.array(got), np.array(open_image(path.read_bytes())))


def test_deep_greys_are_shown_through_a_window(tmp_path):
    grey = np.arange(0, 4096, 7, dtype=np.uint16)[:580].reshape(20, 29)
    for name in ("a.png", "a.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        got = np.array(open_image(tmp_path / name, window=(500, 3000)))
        want = [[round(min(1, max(0, (int(v) - 500) / 2500)) * 255) for v in row] for row in grey]
        assert np.array_equal(got, np.repeat(np.array(want)[..., None], 3, -1))
        with pytest.raises(
            ValueError,
            match=r"more than 8 bits .* need window=\(black, white\) .* values from 0 to 4053 and window=None",
        ):
            open_image(tmp_path / name)
        with pytest.raises(ValueError, match=r"with black < white, got .* window=\(5, 5\)"):
            open_image(tmp_path / name, window=(5, 5))
    Image.fromarray(np.full((3, 3), np.nan, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="must be finite"):
        open_image(tmp_path / "f.tif", window=(0, 1))
    with pytest.raises(ValueError, match="a window is for greys, got mode RGB"):
        open_image(saved(drawn((9, 9)), "PNG"), window=(0, 1))


def test_pages(tmp_path):
    pages = [drawn((30, 20), seed=i) for i in range(3)]
    content = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    for i, page in enumerate(pages):
        assert np.array_equal(np.array(open_image(content, page=i)), np.array(page))
    for page in (None, 3, -1):
        with pytest.raises(ValueError, match=f"has 3 pages or frames, got page={page}; give one from 0 to 2"):
            open_image(content, page=page)
    photo = saved(pages[0], "MPO", save_all=True, append_images=pages[1:])
    assert open_image(photo).size == (30, 20)


def header_only(width, height) -> bytes:
    """A PNG that says it is large and holds nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 0)
        + b"IDAT"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "must be an image .BMP, GIF, JPEG.*found none of these; empty or broken at its start"),
        (b"Patient has no known allergies. " * 9, "must be an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "must be an image"),
        (saved(drawn((60, 60)), "PNG")[:2000], "cannot be read, broken or truncated"),
        (saved(drawn((60, 60)), "JPEG")[:900], "cannot be read, broken or truncated"),
        (header_only(20, 20), "cannot be read, broken or truncated"),
        (header_only(0, 20), "cannot be read, broken or truncated|must be an image"),
        (
            header_only(10_000, 8_948),
            f"must have at most {LARGEST} pixels, got 10000 x 8948; make it smaller",
        ),
        (
            header_only(60_000, 60_000),
            f"must have at most {LARGEST} pixels .*decompression bomb.*; make it smaller",
        ),
    ],
    ids=[
        "missing",
        "empty",
        "text",
        "postscript",
        "png-cut",
        "jpeg-cut",
        "png-nothing",
        "png-zero",
        "large",
        "bomb",
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_are_none(content, message, tmp_path):
    path = tmp_path / "page.png"
    if content is not None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"open_image: image of {len(content)} bytes: .*({message})"):
            open_image(content)
    with pytest.raises(ValueError, match=rf"open_image: .*page.png: .*({message})"):
        open_image(path)
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_files_give_an_image_or_one_kind_of_error():
    rng = random.Random(0)
    formats = [
        saved(drawn((40, 30)), f) for f in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000")
    ]
    opened, errors = 0, []
    for i in range(800):
        content = bytearray(formats[i % len(formats)])
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content) if i % 2 else 120)] = rng.randrange(256)
        try:
            opened += open_image(bytes(content[: rng.randint(50, 2 * len(content))])).mode == "RGB"
        except ValueError as e:
            errors.append(str(e))
    assert 50 < opened < 750
    assert all(e.startswith("open_image: image of") for e in errors)


def test_what_is_a_picture_already():
    image = drawn((9, 5))
    assert to_rgb(image, "here") is image
    assert np.array_equal(np.array(to_rgb(np.array(image), "here")), np.array(image))
    with pytest.raises(
        ValueError, match=r"^here: an array must be uint8 \[y, x, 3\] and not empty, got uint8 \[5, 9\]"
    ):
        to_rgb(np.array(image)[..., 0], "here")


def test_pixels_are_capped_as_the_plain_formula_says():
    for size, most in (
        ((400, 300), 30_000),
        ((300, 400), 100_000),
        ((640, 481), 100_000),
        ((333, 97), 5_000),
        ((90, 60), 5_399),
    ):
        image = drawn(size)
        got = cap_pixels(image, most)
        scale = math.sqrt(most / (size[0] * size[1]))
        want = image.resize(
            (math.floor(size[0] * scale + 1e-9), math.floor(size[1] * scale + 1e-9)), Image.Resampling.BICUBIC
        )
        assert got.size == want.size
        assert np.array_equal(np.array(got), np.array(want))
        assert got.width * got.height <= most
    assert cap_pixels(drawn((400, 300)), 30_000).size == (200, 150)


def test_small_enough_images_stay_themselves():
    image = drawn((40, 30))
    for most in (0, 1200, 1201, 10**9):
        assert cap_pixels(image, most) is image
    assert cap_pixels(image, 1199).size == (39, 29)
    assert image.size == (40, 30)
    with pytest.raises(
        ValueError, match=r"cap_pixels: most must be at least 1 pixel, or 0 for no limit, got -1"
    ):
        cap_pixels(image, -1)


def test_no_strip_is_too_thin():
    rng = random.Random(0)
    for _ in range(400):
        size = (rng.choice((1, 2, 3, rng.randint(1, 2000))), rng.choice((1, 2, 5, rng.randint(1, 2000))))
        most = rng.randint(1, 400)
        got = cap_pixels(Image.new("RGB", size), most)
        assert 1 <= got.width * got.height <= most
        assert got.width <= size[0]
        assert got.height <= size[1]
    assert cap_pixels(Image.new("RGB", (1000, 1)), 10).size == (10, 1)
    assert cap_pixels(Image.new("RGB", (1, 1000)), 10).size == (1, 10)
    assert cap_pixels(Image.new("RGB", (7, 9)), 1).size == (1, 1)


def test_what_is_no_image_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="cannot be read, it must be a file"):
            open_image(path)


def test_a_window_for_deep_greys_alone(tmp_path):
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep.png")
    drawn((9, 9)).save(tmp_path / "colours.png")
    assert open_image(tmp_path / "deep.png", window=(0, 2000), only_deep=True).getpixel((0, 0)) == (
        128,
        128,
        128,
    )
    got = open_image(tmp_path / "colours.png", window=(0, 2000), only_deep=True)
    assert np.array_equal(np.array(got), np.array(open_image(tmp_path / "colours.png")))


# Slices of NIfTI files -----------------------------------------------------------------------------------------
def test_slices_are_shown_as_radiologists_see_them(tmp_path):
    """Right of the patient on the left and anterior above; all 48 orders and directions of axes in a file."""
    ras = np.random.default_rng(0).permutation(60).reshape(3, 4, 5).astype(np.int16)
    image = nib.Nifti1Image(ras, np.array([[2.0, 0, 0, 3], [0, 2, 0, 5], [0, 0, 2, 7], [0, 0, 0, 1]]))
    shown = {
        0: lambda i: ras[i, ::-1, ::-1],  # sagittal: anterior on the left, superior above
        1: lambda i: ras[::-1, i, ::-1],  # coronal
        2: lambda i: ras[::-1, ::-1, i],  # axial
    }
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            # nibabel: where each axis of `ras` goes in the file, and in which direction.
            stored = image.as_reoriented(np.array([*zip(order, flips, strict=True)]))
            path = tmp_path / "a.nii"
            nib.save(stored, path)
            axis = order.index(2)
            for page in range(ras.shape[axis]):
                index = page if flips[axis] == 1 else ras.shape[axis] - 1 - page
                got = np.array(open_image(path, page=page, window=(0, 255)))[..., 0]
                assert np.array_equal(got, shown[axis](index).T), (order, flips, page)


def nifti(path, values, affine=None):
    image = nib.Nifti1Image(values, np.diag([-2.0, -2, 2, 1]) if affine is None else affine)
    nib.save(image, path)
    return path


def test_greys_of_slices(tmp_path):
    bytes_ = np.random.default_rng(0).integers(0, 256, (4, 5, 6)).astype(np.uint8)
    path = nifti(tmp_path / "b.nii.gz", bytes_)
    assert np.array_equal(np.array(open_image(path, page=2))[..., 0], bytes_[..., 2].T)
    assert np.array_equal(
        np.array(open_image(path, page=2, window=(0, 9), only_deep=True))[..., 0], bytes_[..., 2].T
    )
    assert np.array(open_image(path, page=2, window=(0, 9)))[..., 0].max() == 255
    path = nifti(tmp_path / "s.nii", bytes_.astype(np.int16))
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<ff", 2, -100)  # scl_slope and scl_inter
    path.write_bytes(content)
    want = np.round(((bytes_[..., 1].T * 2.0 - 100 + 50) / 300).clip(0, 1) * 255)
    assert np.array_equal(np.array(open_image(path, page=1, window=(-50, 250)))[..., 0], want)


def test_slices_that_cannot_be_shown(tmp_path):
    deep = np.random.default_rng(0).integers(-900, 900, (4, 5, 6)).astype(np.int16)
    path = nifti(tmp_path / "scan.nii.gz", deep)
    for page in (None, 6, -1):
        with pytest.raises(
            ValueError, match=f"scan.nii.gz: has 6 slices, got page={page}; give one from 0 to 5"
        ):
            open_image(path, page=page, window=(0, 1))
    with pytest.raises(
        ValueError, match=r"scan.nii.gz: greys of more than 8 bits .* need window=\(black, white\)"
    ):
        open_image(path, page=0)
    with pytest.raises(ValueError, match="a NIfTI file must be given as a path"):
        open_image(path.read_bytes(), page=0)
    (tmp_path / "short.nii.gz").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"short.nii.gz: is (truncated|damaged)"):
        open_image(tmp_path / "short.nii.gz", page=0, window=(0, 1))
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"no scan" * 99))
    with pytest.raises(ValueError, match=r"text.gz: is not NIfTI"):
        open_image(tmp_path / "text.gz", page=0)
    unplaced = nifti(tmp_path / "u.nii", deep, np.eye(4))
    with pytest.raises(
        ValueError, match=r"does not say where left and right are .* a guess could mirror the patient"
    ):
        open_image(unplaced, page=0, window=(0, 1))
    holes = nifti(tmp_path / "n.nii", np.full((4, 4, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="must be finite"):
        open_image(holes, page=0, window=(0, 1))


def test_an_animation_is_not_guessed():
    frames = [drawn((9, 7), seed=i) for i in range(3)]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 3 pages or frames, got page=None; give one from 0 to 2"):
        open_image(content)


def test_a_real_scan_and_its_dicom_series(shared_data):
    """The same voxels in both kinds of file make the same pictures."""
    import pydicom

    folder = shared_data / "ct"
    series = sorted(
        (folder / "dicom" / "cip_ct64_series").glob("*.dcm"),
        key=lambda path: float(pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient[2]),
    )
    for page in range(0, 79, 13):
        got = open_image(folder / "nifti" / "cip_chest64.nii.gz", page=page, window=(-160, 240))
        want = open_image(series[page], window=(-160, 240))
        assert np.array_equal(np.array(got), np.array(want))


def test_the_full_range_needs_no_window(tmp_path):
    for greys, shown in (([100, 2100, 4100], [0, 128, 255]), ([7, 7, 7], [0, 0, 0])):
        Image.fromarray(np.array([greys], np.uint16)).save(tmp_path / "deep.png")
        pixels = np.asarray(open_image(tmp_path / "deep.png", full_range=True))
        assert pixels[0, :, 0].tolist() == shown
    Image.new("L", (1, 1), 7).save(tmp_path / "flat.png")
    assert open_image(tmp_path / "flat.png", full_range=True).getpixel((0, 0)) == (7, 7, 7)
