"""`invoke redact` writes a PNG, a folder of pages or a DICOM file, and says what was found without quoting it."""

import functools

import numpy as np
import pydicom
import pytest
from PIL import Image

from medvl.commands import redact as module
from medvl.commands.redact import redact
from medvl.documents.redact import redact_page
from medvl.documents.redact_dicom import redact_dicom
from tests.documents.test_redact import NAMES, WORDS, drawn, file_of, one_more, reader, words_of
from tests.language.test_dicom_image import made
from tests.serve import files


@pytest.fixture
def read_as(monkeypatch):
    """Pages are read by a function of the tests in place of OCR."""

    def use(make):
        monkeypatch.setattr(module, "check_reader", lambda: None)
        monkeypatch.setattr(
            module, "redact_page", lambda image, known: redact_page(image, known, read=make())
        )
        monkeypatch.setattr(module, "redact_dicom", functools.partial(redact_dicom, read=make()))

    return use


def test_a_page(tmp_path, capsys, read_as):
    read_as(lambda: reader(WORDS))
    tags = Image.Exif()
    tags[0x010E] = "Ashdown"
    drawn(WORDS).save(tmp_path / "Ashdown.jpg", exif=tags, quality=95)
    out = tmp_path / "out.png"
    assert redact(str(tmp_path / "Ashdown.jpg"), str(out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("page 1: blacked out: name 1; left after 2 readings: 0\n")
    assert "Research use only" in printed
    assert "Ashdown" not in printed
    assert b"Ashdown" not in out.read_bytes()
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == np.asarray(drawn(WORDS)).shape
    assert not pixels[10:22, 98:216].any()
    assert pixels[40:52, 10:50].min() > 60


def test_names_that_are_known(tmp_path, capsys, read_as):
    """What stands in a file is sought on pages and frames, although nothing on them says that it is a name."""
    read_as(lambda: reader(words_of("heart of normal size\nNorthgat 47112233")))
    page = drawn(words_of("heart of normal size\nNorthgat 47112233"))
    page.save(tmp_path / "page.png")
    (tmp_path / "scan.dcm").write_bytes(made(np.asarray(page)[..., 0], PatientName=""))
    known = tmp_path / "known.txt"
    known.write_text("Doe, Northgate\n\n4711-2233\n")
    for source in ("page.png", "scan.dcm"):
        assert redact(str(tmp_path / source), str(tmp_path / "out"), str(known)) == 0
        assert "blacked out: name 1, record 1; left after 2 readings: 0" in capsys.readouterr().out
    known.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="one name or number a line"):
        redact(str(tmp_path / "page.png"), str(tmp_path / "out"), str(known))


def test_pages_of_a_pdf_become_a_folder(tmp_path, capsys, read_as):
    read_as(lambda: reader(WORDS))
    source = tmp_path / "scan.pdf"
    source.write_bytes(files.pdf(2, 200, 200))
    assert redact(str(source), str(tmp_path / "pages")) == 0
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == ["0001.png", "0002.png"]
    assert "page 2: blacked out: name 1; left after 2 readings: 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is there already"):
        redact(str(source), str(tmp_path / "pages"))


def test_a_dicom_file_and_a_status_that_says_that_something_is_left(tmp_path, capsys, read_as):
    read_as(lambda: one_more(NAMES))
    source, out = tmp_path / "scan", tmp_path / "out.dcm"
    source.write_bytes(file_of(np.asarray(drawn(NAMES))[..., 0]))
    assert redact(str(source), str(out)) == 3
    assert "name 2; left after 3 readings: 1" in capsys.readouterr().out
    assert pydicom.dcmread(out).BurnedInAnnotation == "YES"
    assert b"Northgate" not in out.read_bytes()


def test_what_is_refused_leaves_nothing(tmp_path, read_as):
    read_as(lambda: reader(WORDS))
    source = tmp_path / "bad.png"
    for content, message in ((b"PK\3\4", "must be PNG"), (b"\0" * 128 + b"DICM", "cannot be read")):
        source.write_bytes(content)
        with pytest.raises(ValueError, match=message) as refused:
            redact(str(source), str(tmp_path / "out"))
        assert str(source) in str(refused.value)
    with pytest.raises(ValueError, match="no such file"):
        redact(str(tmp_path / "none.png"), str(tmp_path / "out"))
    drawn(WORDS).save(source)
    with pytest.raises(ValueError, match="must be a file to write"):
        redact(str(source), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.png"]


def test_the_source_is_not_written_over(tmp_path):
    """The only original would be lost."""
    source = tmp_path / "page.png"
    Image.new("RGB", (20, 20)).save(source)
    before = source.read_bytes()
    (tmp_path / "link.png").symlink_to(source)
    for out in (source, tmp_path / "link.png"):
        with pytest.raises(ValueError, match="is the source itself"):
            redact(str(source), str(out))
    assert source.read_bytes() == before
