"""Places: where something will be written is tried before the work is done, and nothing is left there."""

import os
import re
import tempfile

import pytest

from medvl import files


@pytest.fixture
def place(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "away")
    (tmp_path / "down").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("folder", False, "must be a file to write, and is a folder"),
        ("down", False, "must be a file to write, and is a folder"),
        ("file", True, "must be a folder to write, and is a file"),
        ("file/a/b.h5", False, "file is no folder; give another place"),
        ("file/a", True, "file is no folder; give another place"),
        ("nowhere/a", False, "nowhere is no folder; give another place"),
        ("pipe", False, "must be a file to write, and is a device"),
        ("/dev/null", False, "must be a file to write, and is a device"),
        ("/proc/medvl/a", False, "cannot be written ("),
        ("a\udcff.h5", False, "must be a name that can be written as text (UTF-8)"),
        ("a" * 300, False, "cannot be written (File name too long)"),
        ("a" * 240, True, "the name is too long"),
        ("", False, "must be a file to write, and is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(place, name, folder, said):
    with pytest.raises(ValueError, match=re.escape(said)) as e:
        files.check_place(place / name, folder=folder)
    assert str(e.value).isprintable()


def test_a_place_in_a_folder_that_is_read_only(place, monkeypatch):
    """Root may write everywhere, so that the refusal is made by hand."""

    def refuse(*args, dir, **kwargs):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"a.h5: cannot be written \(Permission denied\); give another place"):
        files.check_place(place / "a.h5")


def test_a_file_that_is_read_only(place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)
    with pytest.raises(ValueError, match="file: is there and may not be written to"):
        files.check_place(place / "file")


def test_a_working_folder_that_was_removed(place, monkeypatch):
    monkeypatch.chdir(place / "folder")
    (place / "folder").rmdir()
    with pytest.raises(ValueError, match=r"a.h5: cannot be written \(No such file or directory\)"):
        files.check_place("a.h5")


def test_a_good_place_is_left_as_it_was(place):
    before = sorted(place.rglob("*"))
    files.check_place(place / "file")
    files.check_place(place / "folder", folder=True)
    files.check_place(place / "down" / "new" / "deep", folder=True)
    files.check_place(place / "new" / "a.h5")
    files.check_place(place / "nowhere")  # a link to nothing is replaced
    assert sorted(place.rglob("*")) == before
    assert (place / "file").read_text() == "kept"
