"""Places that are tried before work is done, folders that are read whole, and tables that are read right or refused."""

import csv
import errno
import os
import re
import resource
import tempfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from medvl.base import config, files, progress, store
from medvl.components.vq import init_vq
from medvl.hub.checkpoints import new_folder, read_pickle, save_finite
from medvl.hub.vqgan_files import write_vqgan
from medvl.language import images
from medvl.slides import features, questions
from medvl.slides.reference_files import read_compressor
from medvl.systems.unified.draw import write_picture
from medvl.training.states import State, read_state, save_state
from tests.systems.unified.pieces import VQ


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
        ("file/a/b.h5", False, "file is not a folder; give another place"),
        ("file/a", True, "file is not a folder; give another place"),
        ("nowhere/a", False, "nowhere is not a folder; give another place"),
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
        files.check_writable(place / name, folder=folder)
    assert str(e.value).isprintable()


def test_a_place_in_a_folder_that_is_read_only(place, monkeypatch):
    """Root may write everywhere, so that the refusal is made by hand."""

    def refuse(*args, dir, **kwargs):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        ValueError, match=r"a.h5: cannot be written \(Permission denied\); give another place"
    ):
        files.check_writable(place / "a.h5")


def test_a_file_that_is_read_only(place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)
    with pytest.raises(ValueError, match="file: exists and is not writable"):
        files.check_writable(place / "file")


def test_a_working_folder_that_was_removed(place, monkeypatch):
    monkeypatch.chdir(place / "folder")
    (place / "folder").rmdir()
    with pytest.raises(ValueError, match=r"a.h5: cannot be written \(No such file or directory\)"):
        files.check_writable("a.h5")


def test_a_good_place_is_left_as_it_was(place):
    before = sorted(place.rglob("*"))
    files.check_writable(place / "file")
    files.check_writable(place / "folder", folder=True)
    files.check_writable(place / "down" / "new" / "deep", folder=True)
    files.check_writable(place / "new" / "a.h5")
    files.check_writable(place / "nowhere")  # a link to nothing is replaced
    assert sorted(place.rglob("*")) == before
    assert (place / "file").read_text() == "kept"


TABLES = {  # a table: what the message says
    b"name;age\na;3\n": "separated by semicolons; save the table with commas",
    b"name\tage\na\t3\n": "separated by tabs",
    b"name|age\na|3\n": "separated by bars",
    b"name,age\rb,4\rc,5\r": "line 1: not a readable CSV .*do lines end in CR alone",
    b"name,age\nb,4\rc,5\n": "line 2: not a readable CSV .*do lines end in CR alone",
    b"name,age\na,\0\n": "line 2: has a NUL byte",
    b'name,text\na,b\nc,"d\ne,f\ng,h\n': "line 3: not a readable CSV .*is a quote not closed",
    b'name,text\na,"b\n'
    + b"c,d\n" * 3000
    + b'"\n': "line 2: this row would continue to line 3003; is a quote not closed",
    b"name,text\na,b\nc,"
    + b"d" * 2**23
    + b"e\n": "line 3: not a readable CSV .*field larger than field limit",
    b"name,text\na," + b"b" * 2**24 + b"\n": "line 2: has more than 16,777,216 characters; is this a table",
    b"": "found an empty file",
    b"name,age\n": "has a header and no rows",
    b"name,age\na,3\nb\n": "line 3: must have 2 cells like the header, found 1",
}


@pytest.mark.parametrize("table", TABLES, ids=list(TABLES.values()))
def test_a_table_that_could_be_read_wrongly_is_refused_with_its_line(tmp_path, table):
    (tmp_path / "a.csv").write_bytes(table)
    with pytest.raises(ValueError, match=f"a.csv.*{TABLES[table]}"):
        files.read_csv(tmp_path / "a.csv", ("name",))


def test_long_reports_of_many_lines_are_read(tmp_path):
    report = 'No nodule; "a, b" \u00e9\r\n\n' * 400 + "x" * 200_000
    for ending in ("\n", "\r\n"):
        with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as f:
            writer = csv.writer(f, lineterminator=ending)
            writer.writerows([["name", "text"], ["a", report], [], ["b", "|;"]])
        rows = files.read_csv(tmp_path / "a.csv", ("name", "text"))
        assert rows == [{"name": "a", "text": report}, {"name": "b", "text": "|;"}]
    assert csv.field_size_limit() == 131_072  # it is the whole process's


def test_what_is_no_file_is_refused_and_not_waited_for(place):
    with pytest.raises(ValueError, match=r"pipe: must be a file, found a pipe"):
        files.read_csv(place / "pipe")
    with pytest.raises(ValueError, match=r"/dev/zero: must be a file, found a device"):
        files.read_csv("/dev/zero")
    for read in (
        config.read_settings,
        store.open_store,
        images.open_image,
        questions.read_slide_conversations,
        features.read_slide,
    ):
        for ending in (".json", ".h5", ".png"):
            os.mkfifo(place / f"{read.__name__}{ending}")
            with pytest.raises(ValueError, match=r"must be a file, found a pipe|no such file|must be a"):
                read(place / f"{read.__name__}{ending}")
    with pytest.raises(ValueError, match=r"gone.csv: no such file"):
        files.read_csv(place / "gone.csv")


def test_files_below_are_all_or_an_error(place, monkeypatch):
    (place / "folder/deep/er").mkdir(parents=True)
    (place / "folder/deep/er/a.nii").write_text("")
    assert [str(p.relative_to(place)) for p in files.files_below(place / "folder")] == [
        "folder/deep/er/a.nii"
    ]
    assert [str(p.relative_to(place)) for p in files.files_below(place / "down")] == ["down/deep/er/a.nii"]
    (place / "folder/again").symlink_to(place / "folder/deep")  # one folder twice, but not in a circle
    assert len(files.files_below(place / "folder")) == 2
    (place / "folder/deep/er/up").symlink_to(place / "folder")
    with pytest.raises(ValueError, match=r"er/up: is a link to a folder that contains it"):
        files.files_below(place / "folder")
    (place / "folder/deep/er/up").unlink()
    listed = os.scandir

    def denied(path):
        if str(path).endswith("/er"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(
        ValueError, match=r"/er: cannot be read \(Permission denied\); its contents would be left out"
    ):
        files.files_below(place / "folder")


class Code:
    """What torch.load must not make."""

    def __reduce__(self):
        return print, ("this was run",)


@pytest.mark.parametrize(
    "read", [read_state, read_pickle, read_compressor, features.read_slide], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("broken", ["code", "text", "empty", "cut"])
def test_nobody_is_advised_to_read_a_file_as_code(read, broken, tmp_path, capsys):
    path = tmp_path / "a.pt"
    torch.save({"a": Code()} if broken == "code" else {"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes({"code": whole, "text": b"xx\n", "empty": b"", "cut": whole[:-500]}[broken])
    with pytest.raises(ValueError, match=r"a\.pt") as e:
        read(path)
    assert "`weights_only` set to" not in str(e.value)
    assert "trusted source" not in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert capsys.readouterr().out == ""


@contextmanager
def no_room():
    """No file may be longer than 1,000 bytes: a write fails in the middle, as on a full disk.

    Not a fixture: pytest itself writes between the parts of a test, maybe to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
MATRIX = torch.zeros(1000)


def write_pickled(path):
    with files.atomic(path) as tmp:
        save_finite({"a": MATRIX}, tmp, "matrix", pickled=True)


def write_lines(path):
    progress.run_batches(path, [[0], [1]], lambda rows: [{"text": "a" * 700}])


@pytest.mark.parametrize(
    "write",
    [
        *(lambda path: files.write_text(path, "a" * 2000), lambda path: files.write_array(path, NOISE)),
        *(lambda path: write_picture(Image.fromarray(NOISE), path), write_pickled),
        lambda path: save_state(path, State(params={"a": MATRIX}, opt={})),
        lambda path: write_vqgan(VQ, init_vq(VQ, Generator()), path),
    ],
    ids=["text", "array", "picture", "pickled", "state", "safetensors"],
)
def test_a_file_that_finds_no_room_is_named_and_not_there(tmp_path, write):
    path = tmp_path / "file"
    with no_room(), pytest.raises(OSError, match=r"cannot be written .*; make room and call again") as e:
        write(path)
    assert e.value.filename == str(path)
    assert not [*tmp_path.iterdir()]


def test_batches_that_find_no_room_go_on(tmp_path):
    path = tmp_path / "file"
    with no_room(), pytest.raises(OSError, match="cannot be written") as e:
        write_lines(path)
    assert e.value.filename == str(path)
    write_lines(path)
    assert len(path.read_text().splitlines()) == 2


def test_one_process_writes_a_folder_and_what_a_killed_one_left_is_removed(place):
    left = place / ".new.abc.tmp"
    left.mkdir()
    (left / "half").write_text("")
    with new_folder(place / "new") as tmp:
        assert not left.exists()
        (tmp / "file").write_text("")
        with pytest.raises(ValueError, match="another run is writing to it"), new_folder(place / "new"):
            pass
    assert [path.name for path in (place / "new").iterdir()] == ["file"]
    assert not [*place.glob(".*")]


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_place_that_is_only_read_needs_no_lock(tmp_path, monkeypatch, error):
    """A run on a read-only mount is served; who would write there is told."""

    def refuse(*arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files.os, "open", refuse)
    with files.file_lock(tmp_path / "run", shared=True):
        pass
    with pytest.raises(OSError, match=os.strerror(error)), files.file_lock(tmp_path / "run"):
        pass
