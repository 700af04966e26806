"""What tells who a page is about is found by rules, blacked out, and counted again; the header of DICOM is cleaned."""

import io
import tomllib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from medvl.documents import redact_dicom as dicom_module
from medvl.documents.redact import Finding, black_out, find_private, redact_page
from medvl.documents.redact_dicom import redact_dicom
from medvl.documents.words import Word, join_boxes, lines_of
from medvl.language.images import open_image
from medvl.phantoms.pages import PageConfig, draw_page
from tests.language.test_dicom_image import made

LETTER = """
Northside Clinic
Patient: Alma Ashdown    MRN: SYN-123456    Date: 14 Feb 2019
DOB: 03/14/1950    Age: 92    Sex: F
Seen by Dr. Greystone, mother of Tom. Ms Ashdwn is a 93-year-old and 71 kg.
BP 120/80 mmHg    Range 3.5-10.50    4.0 - 11.0    Platelets 250
Phone: (555) 123-4567    12 Oak Street    Springfield IL 62704
Name    Dose    Route
Aspirin    325 mg    PO
Signed by: John Q. Public, MD    j.doe@site.org
see SYN-l23456 of 2O19-03-14
"""


def words_of(text, top=0):
    """Words of lines 30 pixels apart, letters 10 wide; four spaces part cells."""
    words = []
    for number, line in enumerate(text.strip("\n").split("\n")):
        x, y = 10, top + 10 + 30 * number
        for cell in line.split("    "):
            for word in cell.split():
                words.append(Word(word, (x, y, x + 10 * len(word), y + 12)))
                x += 10 * len(word) + 8
            x += 40
    return words


def drawn(words):
    """A white page with a grey bar for each word."""
    _, _, right, bottom = join_boxes(word.box for word in words)
    pixels = np.full((int(bottom) + 20, int(right) + 20, 3), 255, np.uint8)
    for word in words:
        left, top, right, bottom = map(int, word.box)
        pixels[top:bottom, left:right] = 90
    return Image.fromarray(pixels)


def reader(words):
    """Reads the words of which more than half is not black."""

    def read(image):
        dark = (np.asarray(image.convert("L")) < 30).astype(float)
        visible = []
        for word in words:
            left, top, right, bottom = map(int, word.box)
            if dark[top:bottom, left:right].mean() < 0.5:
                visible.append(word)
        return visible

    return read


def found_in(text, known=()):
    return {(finding.kind, finding.text) for finding in find_private(words_of(text), known)}


def test_rules_find_what_a_letter_says_of_a_person():
    assert found_in(LETTER) == {
        *{
            ("name", "Alma Ashdown"),
            ("name", "Dr. Greystone,"),
            ("name", "Ms Ashdwn"),
            ("name", "John Q. Public, MD"),
        },
        *{("date", "14 Feb 2019"), ("date", "03/14/1950"), ("date", "2O19-03-14")},
        *{("record", "SYN-123456"), ("record", "SYN-l23456"), ("age", "Age: 92"), ("age", "93-year-old")},
        *{("phone", "(555) 123-4567"), ("mail", "j.doe@site.org")},
        *{("address", "12 Oak Street"), ("address", "IL 62704")},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Patient:\nUlrich Oakhurst", {("name", "Ulrich Oakhurst")}),
        (
            "Patient:    I D : 9 8 8 3 1 7\nUlrich Oakhurst",
            {("name", "Ulrich Oakhurst"), ("record", "9 8 8 3 1 7")},
        ),
        ("Name: Vandermere,\nAlma", {("name", "Vandermere,"), ("name", "Alma")}),
        ("Age(years):94", {("age", "Age(years):94")}),
        ("Age: 89", set()),
        ("Date: pending", set()),
        ("Name: 12", set()),
        ("on May 3, 2021 and 3rd of May", {("date", "May 3, 2021")}),
        ("may 30 mg daily", set()),
        ("Account no: 77-A", {("record", "77-A")}),
        ("Admitted: 3/4", {("date", "3/4")}),
        ("in clinic again on 3\nMarch 2021 by us", {("date", "3 March 2021")}),
        ("seen on 3\nMarch 2021 was a cold month for all", set()),
        ("his wife Vera left", {("name", "wife Vera")}),
        ("Oakhurst, Ulrich MRN 1234567.", {("name", "Oakhurst, Ulrich"), ("record", "1234567.")}),
        ("SSN 123-45-6789", {("record", "123-45-6789")}),
    ],
)
def test_labels_and_forms(text, expected):
    assert found_in(text) == expected


def test_what_is_known_is_sought_everywhere():
    text = "the lungs of Vandermeer are clear\nAlma smiles; almanac; record A-55231; MS 4"
    assert not found_in(text)
    known = [("name", "Vandermere^Alma^^Ms"), ("record", "A55231")]
    expected = {("name", "Vandermeer"), ("name", "Alma"), ("record", "A-55231;")}
    assert found_in(text, known) == expected
    # A whole word and not a part of one: names of four letters are in many words.
    assert not found_in("pan cake", [("name", "Pa")])


def test_pixels_are_black_and_other_words_stay():
    words = words_of(LETTER)
    page = drawn(words)
    result = redact_page(page, read=reader(words))
    assert (result.readings, result.left) == (2, ())
    pixels = np.asarray(result.image)
    for word in (word for finding in result.found for word in finding.words):
        left, top, right, bottom = map(int, word.box)
        assert not pixels[top - 2 : bottom + 2, left - 2 : right + 2].any()
    kept = {word.text for word in reader(words)(result.image)}
    assert not {"Alma", "Ashdwn", "SYN-123456", "2019", "92", "03/14/1950", "123-4567", "Oak", "62704"} & kept
    assert {"Northside", "Patient:", "MRN:", "Aspirin", "325", "120/80", "3.5-10.50", "F"} <= kept
    assert np.asarray(page).max() == 255  # the image that was given is not changed
    assert "Ashdown" not in repr(result)


def one_more(words):
    """Reads one line more each time."""
    lines = lines_of(words)
    shown = []

    def read(image):
        shown.append(lines[len(shown)])
        return [word for line in shown for word in line]

    return read


def test_what_a_second_reading_finds_is_blacked_out_and_counted():
    words = words_of("Patient: Alma Ashdown\nseen: Alma\nby Ashdown\nof Ashdown")
    result = redact_page(drawn(words), read=one_more(words))
    assert [finding.text for finding in result.found] == ["Alma Ashdown", "Alma"]
    assert [finding.text for finding in result.left] == ["Ashdown"]
    assert result.readings == 3
    with pytest.raises(ValueError, match="readings must be at least 2"):
        redact_page(drawn(words), readings=1)


def test_a_picture_has_pixels_and_nothing_else():
    page = drawn(words_of("Aspirin"))
    page.info["comment"] = b"Alma"
    page.getexif()[0x010E] = "Alma"
    file = io.BytesIO()
    redact_page(page, read=lambda image: []).image.save(file, "PNG")
    assert b"Alma" not in file.getvalue()
    np.testing.assert_array_equal(np.array(Image.open(file)), np.array(page))


def test_boxes_at_the_edge():
    image = Image.new("RGB", (20, 10), "white")
    words = (Word("a", (-5, -5, 4, 4)), Word("b", (18, 8, 40, 40)))
    black = np.asarray(black_out(image, [Finding("name", words)]))
    assert not black[:6, :6].any()
    assert not black[7:, 17:].any()
    assert black[8, 8].all()


def test_a_photograph_of_a_drawn_page():
    pytest.importorskip("rapidocr")
    page = draw_page(PageConfig(), "test", 3, damage="photo")
    result = redact_page(page.image)
    assert not result.left
    black = (np.asarray(result.image) == 0).all(-1)
    for name in ("name", "record", "date"):
        left, top, right, bottom = map(int, page.boxes[f"patient/{name}"])
        assert black[top + 4 : bottom - 4, left:right].mean() > 0.95


# DICOM ------------------------------------------------------------------------------------------------------
NAMES = words_of("Northgate\nof Northgate\nDr. Northgate")
WORDS = words_of("Patient: Alma Ashdown\nheart of normal size\nNorthgate")


def file_of(values, **tags):
    item = pydicom.Dataset()
    item.CodeMeaning, item.PatientID, item.OperatorsName = "front", "4711", "Nora^Nurse"
    tags |= {
        "PatientName": "Northgate^Doe",
        "PatientBirthDate": "19500314",
        "PatientAge": "094Y",
        "PatientWeight": "71",
        "StudyDescription": "of Northgate",
        "Manufacturer": "Maker",
        "ViewCodeSequence": [item],
        "RequestAttributesSequence": [item],
        "StudyInstanceUID": "1.2.3.77",
        "SeriesInstanceUID": "1.2.3.78",
        "FrameOfReferenceUID": "1.2.3.77",
        "WindowCenter": "127.5",
        "WindowWidth": "255",
    }
    content = pydicom.dcmread(io.BytesIO(made(values, **tags)))
    content.private_block(0x0011, "Northgate", create=True).add_new(1, "LO", "Northgate")
    content.add_new(0x60000022, "LO", "Northgate")
    content.preamble = b"Northgate" + bytes(119)
    file = io.BytesIO()
    content.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize("form", ["MONOCHROME1", "MONOCHROME2", "RGB"])
def test_a_dicom_file_keeps_its_picture_and_loses_its_patient(form):
    picture = np.asarray(drawn(WORDS))
    values = picture if form == "RGB" else picture[..., 0].astype(np.uint16)
    if form == "MONOCHROME1":
        values = 255 - values
    tags = {} if form == "RGB" else {"PhotometricInterpretation": form}
    content = file_of(values, **tags)
    written, (page,) = redact_dicom(content, read=reader(WORDS))
    # The pixels: those of the page that was redacted. The name of the header was sought, too.
    assert {finding.text for finding in page.found} == {"Alma Ashdown", "Northgate"}
    np.testing.assert_array_equal(np.array(open_image(written, full_range=True)), np.array(page.image))
    # The header.
    new, old = (pydicom.dcmread(io.BytesIO(file)) for file in (written, content))
    for planted in (b"Northgate", b"4711", b"Nora", b"1950", b"094Y", b"1.2.3.7"):
        assert planted in content
        assert planted not in written
    assert (new.PatientName, new.PatientBirthDate, new.PatientID) == ("", "", "")
    assert "PatientWeight" not in new
    assert (new.Manufacturer, new.ViewCodeSequence[0].CodeMeaning) == ("Maker", "front")
    assert new.StudyInstanceUID == new.FrameOfReferenceUID != new.SeriesInstanceUID
    assert new.file_meta.MediaStorageSOPInstanceUID == new.SOPInstanceUID != old.SOPInstanceUID
    assert new.SOPClassUID == old.SOPClassUID
    assert (new.PatientIdentityRemoved, new.BurnedInAnnotation) == ("YES", "NO")
    assert new.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    # Nothing is left to chance: the same file again.
    assert redact_dicom(content, read=reader(WORDS))[0] == written


def test_every_frame_is_redacted_and_what_is_left_is_said():
    values = np.asarray(drawn(WORDS))[..., 0]
    content = pydicom.dcmread(io.BytesIO(file_of(values)))
    content.NumberOfFrames, content.PixelData = 2, 2 * values.tobytes() + bytes(2 * values.size % 2)
    file = io.BytesIO()
    content.save_as(file, enforce_file_format=True)
    written, pages = redact_dicom(file.getvalue(), read=reader(WORDS))
    for number, page in enumerate(pages):
        shown = open_image(written, page=number, full_range=True)
        np.testing.assert_array_equal(np.array(shown), np.array(page.image))
        assert len(page.found) == 2
    one = file_of(np.asarray(drawn(NAMES))[..., 0])
    written, _ = redact_dicom(one, read=one_more(NAMES))
    assert pydicom.dcmread(io.BytesIO(written)).BurnedInAnnotation == "YES"


def test_dicom_files_that_are_not_redacted(monkeypatch, caplog):
    content = file_of(np.asarray(drawn(WORDS))[..., 0])
    for bad in (content[:-50], content.replace(b"MONOCHROME2 ", b"NORTHGATE   "), b"DICM"):
        with pytest.raises(ValueError, match="redact_dicom: this file cannot be read") as refused:
            redact_dicom(bad, read=reader(WORDS))
        assert "NORTHGATE" not in f"{refused.value} {caplog.text}"
    monkeypatch.setattr(dicom_module, "_MOST_FRAMES", 0)
    with pytest.raises(ValueError, match="at most 0 frames, got 1"):
        redact_dicom(content, read=reader(WORDS))


def test_the_profile_names_attributes_that_there_are():
    text = Path(dicom_module.__file__).with_name("dicom_profile.toml").read_text()
    names = [name for names in tomllib.loads(text).values() for name in names]
    assert len(names) == len(set(names))
    assert all(pydicom.datadict.tag_for_keyword(name) for name in names)
