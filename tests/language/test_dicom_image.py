"""DICOM images as pictures, against the formulas of PS3.3 on files that the tests write."""

import io
import random
import sys

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless, RLELossless

from medvl.language import dicom_image
from medvl.language.images import open_image

GREYS = np.random.default_rng(0).integers(-1200, 2000, (40, 50)).astype(np.int16)


def made(values=GREYS, syntax=pydicom.uid.ExplicitVRLittleEndian, bits=None, **tags):
    """The bytes of a file with these pixels."""
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    image.SOPClassUID, image.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    image.PatientName, image.PatientID = "Doe^Jane", "4711"
    image.Rows, image.Columns = values.shape[:2]
    image.SamplesPerPixel = values.shape[2] if values.ndim == 3 else 1
    image.PhotometricInterpretation = "RGB" if values.ndim == 3 else "MONOCHROME2"
    if values.ndim == 3:
        image.PlanarConfiguration = 0
    image.BitsAllocated = image.BitsStored = bits or 8 * values.dtype.itemsize
    image.HighBit = image.BitsStored - 1
    image.PixelRepresentation = int(values.dtype.kind == "i")
    image.PixelData = values.tobytes() + bytes(values.nbytes % 2)
    if syntax.is_compressed:
        image.compress(syntax, generate_instance_uid=False)
    for name, value in tags.items():
        if value is None:
            delattr(image, name)
        else:
            setattr(image, name, value)
    file = io.BytesIO()
    image.save_as(file, enforce_file_format=True)
    return file.getvalue()


def shown(content, **kwargs):
    picture = np.array(open_image(content, **kwargs))
    assert picture.shape[-1] == 3
    assert (picture == picture[..., :1]).all()
    return picture[..., 0].astype(int)


def by_window(values, black, white):
    return np.round(((values - black) / (white - black)).clip(0, 1) * 255)


@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_window_in_rescaled_greys(syntax, photometric):
    content = made(
        syntax=syntax, PhotometricInterpretation=photometric, RescaleSlope="1.5", RescaleIntercept="-100"
    )
    want = by_window(GREYS * 1.5 - 100, -160, 240)
    got = shown(content, window=(-160, 240))
    assert np.abs(got - (want if photometric == "MONOCHROME2" else 255 - want)).max() == 0


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_first_window_of_the_file(function, caplog):
    tags = {
        "RescaleSlope": 2,
        "RescaleIntercept": -1024,
        "WindowCenter": [40, 300],
        "WindowWidth": [400, 1500],
    }
    got = shown(made(**tags, **({"VOILUTFunction": function} if function else {})))
    greys = GREYS * 2.0 - 1024
    if function == "SIGMOID":
        want = np.round(255 / (1 + np.exp(-4 * (greys - 40) / 400)))
    elif function == "LINEAR_EXACT":
        want = np.round((((greys - 40) / 400 + 0.5) * 255).clip(0, 255))
    else:  # PS3.3, C.11.2.1.2.1
        want = np.round((((greys - 39.5) / 399 + 0.5) * 255).clip(0, 255))
    assert np.abs(got - want).max() == 0
    assert not caplog.records
    given = shown(made(**tags), window=(-1000, 1000), only_deep=True)
    assert np.abs(given - by_window(greys, -1000, 1000)).max() == 0


def test_greys_without_a_window(tmp_path, caplog):
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_bytes(made())
        got = shown(tmp_path / name)
        assert np.abs(got - by_window(GREYS.astype(float), GREYS.min(), GREYS.max())).max() == 0
    assert len(caplog.records) == 1  # of a folder, not of each of its images
    assert (
        "name no window are shown from their lowest grey to their highest; give one (chat.window, embed.window)"
        in caplog.text
    )
    assert (shown(made(np.full((4, 6), 700, np.uint16))) == 0).all()


def test_greys_of_8_bits_are_shown_as_they_are(caplog):
    greys = np.random.default_rng(1).integers(20, 200, (5, 6)).astype(np.uint8)
    for content in (made(greys), made(greys, RescaleSlope=1, RescaleIntercept=0)):
        assert np.array_equal(shown(content), greys)
        assert np.array_equal(shown(content, window=(0, 4000), only_deep=True), greys)
        assert np.array_equal(shown(content, window=(0, 100)), by_window(greys, 0, 100))
    assert np.array_equal(shown(made(greys, WindowCenter=50, WindowWidth=101)), by_window(greys, -0.5, 99.5))
    assert not caplog.records


def test_colours_stay():
    colours = np.random.default_rng(2).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    for syntax in (pydicom.uid.ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless):
        assert np.array_equal(
            np.array(open_image(made(colours, syntax), window=(0, 9), only_deep=True)), colours
        )
    with pytest.raises(ValueError, match="a window is for greys, got colours"):
        open_image(made(colours), window=(0, 9))
    blue = made(np.full((4, 6, 3), (29, 255, 107), np.uint8), PhotometricInterpretation="YBR_FULL")
    assert np.abs(np.array(open_image(blue)).astype(int) - (0, 0, 254)).max() <= 1


@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_one_frame_of_several(syntax):
    frames = np.random.default_rng(3).integers(-1200, 2000, (3, 40, 50)).astype(np.int16)
    image = pydicom.dcmread(io.BytesIO(made(frames.reshape(120, 50), RescaleSlope=2, RescaleIntercept=-9)))
    image.Rows, image.NumberOfFrames = 40, 3
    if syntax.is_compressed:
        image.compress(syntax, generate_instance_uid=False)
    file = io.BytesIO()
    image.save_as(file, enforce_file_format=True)
    for page in range(3):
        got = shown(file.getvalue(), page=page, window=(-160, 240))
        assert np.array_equal(got, by_window(frames[page] * 2.0 - 9, -160, 240))
    for page in (None, 3, -1):
        with pytest.raises(ValueError, match=f"has 3 frames, got page={page}; give one from 0 to 2"):
            open_image(file.getvalue(), page=page)


def enhanced():
    return [pydicom.Dataset()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: made(PixelData=None), r"it holds no pixels \(PixelData\)"),
        (
            lambda: made(np.zeros((4, 6), np.uint8), Rows=2, NumberOfFrames=2),
            "has 2 frames, got page=None; give one from 0 to 1",
        ),
        (
            lambda: made(SharedFunctionalGroupsSequence=enhanced()),
            "an enhanced object is not read",
        ),
        (
            lambda: made(PhotometricInterpretation="PALETTE COLOR"),
            "must be greys, RGB or YBR, got PALETTE COLOR",
        ),
        (lambda: made(Rows=60000, Columns=60000), "at most 89478485 pixels, got 60000 x 60000"),
        (
            lambda: made(syntax=JPEG2000Lossless, Rows=39),
            r"must be \(40, 50, 1\) as those of its coded picture, got \(39, 50, 1\)",
        ),
        (lambda: made(np.zeros((4, 6, 3), np.uint16)), "colours must be three of 8 bits, got uint16"),
        (lambda: made(WindowCenter=40, WindowWidth=0), "Window Width"),
        (lambda: made(Rows=None), "Rows"),
        (lambda: made()[:-9], ""),
        (lambda: bytes(128) + b"DICM" + bytes(200), ""),
    ],
)
def test_what_is_not_read_is_one_sentence(content, message):
    with pytest.raises(
        ValueError, match=f"open_image: image of .* bytes: this DICOM file cannot be read: .*{message}"
    ) as e:
        open_image(content())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "uid", ["1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.100", "1.2.3.4"]
)  # deflated, MPEG2, one's own
def test_transfer_syntaxes_that_are_not_read(uid):
    uid = uid.encode() + bytes(len(uid) % 2)
    content = made().replace(b"UI\x14\x001.2.840.10008.1.2.1\0", b"UI" + len(uid).to_bytes(2, "little") + uid)
    with pytest.raises(
        ValueError, match=r"its transfer syntax \(.*\) is not read; pip install 'medvl\[dicom\]'"
    ):
        open_image(content)


def test_pages_and_a_missing_pydicom(tmp_path, monkeypatch):
    assert open_image(made(), page=0).size == (50, 40)
    with pytest.raises(ValueError, match="has 1 frames, got page=1; give one from 0 to 0"):
        open_image(made(), page=1)
    (tmp_path / "a.dcm").write_bytes(made())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(
        ValueError, match=r"a.dcm: is a DICOM file, which needs pydicom; pip install 'medvl\[dicom\]'"
    ):
        open_image(tmp_path / "a.dcm")


def test_broken_files_end_in_one_error_and_name_no_patient(caplog, recwarn):
    draw = random.Random(0)
    whole = [
        made(RescaleSlope=1, RescaleIntercept=0, WindowCenter=40, WindowWidth=400),
        made(syntax=JPEG2000Lossless),
        made(syntax=RLELossless),
    ]
    opened, errors = 0, []
    for i in range(300):
        content = bytearray(whole[i % 3])
        for _ in range(draw.randint(1, 6)):
            content[draw.randrange(132, len(content))] = draw.randrange(256)
        try:
            opened += open_image(bytes(content[: draw.randint(200, 2 * len(content))])).mode == "RGB"
        except ValueError as e:
            errors.append(str(e))
    assert opened > 20
    assert len(errors) > 50
    for text in (*errors, caplog.text, *(str(w.message) for w in recwarn)):
        assert "Doe" not in text
        assert "4711" not in text


def test_real_files(shared_data):
    """A chest picture in JPEG, a slice of CT in JPEG 2000 and one that is uncompressed."""
    assert open_image(shared_data / "medvqa" / "cxr_dicom_mono2.dcm").size == (1024, 1024)
    folder = shared_data / "ct" / "dicom"
    paths = [*sorted((folder / "totalseg_jpeg2000_20").glob("*.dcm"))[:2], folder / "lungmask_0.dcm"]
    for path in paths:
        image = pydicom.dcmread(path)
        greys = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        assert (
            np.abs(shown(path, window=(-160, 240), only_deep=True) - by_window(greys, -160, 240)).max() == 0
        )
    first = pydicom.dcmread(paths[0])
    greys = first.pixel_array - 1024.0
    assert np.abs(shown(paths[0]) - np.round((((greys - 39.5) / 299 + 0.5) * 255).clip(0, 255))).max() == 0


def test_a_file_that_is_too_large_is_not_read_into_memory():
    with pytest.raises(ValueError, match="must be pictures of at most 10 pixels, got 81 bytes"):
        dicom_image.read_dicom(bytes(81), "here", most=10)
