"""Folders into stores: what is refused and how, what a killed run leaves, and what a contact sheet shows."""

import functools
import gzip
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from attrs import evolve
from PIL import Image

from medvl.base import files, store, workers
from medvl.base.cluster import open_cluster
from medvl.commands import preprocess as preprocess_commands
from medvl.ct import ingest
from medvl.ct import preprocess as ct
from medvl.ct.ingest import contact_sheet, find_scans, preprocess_folder, rejected_csv
from medvl.ct.preprocess import CtConfig, preprocess_scan
from medvl.ct.scans import read_scan
from medvl.ct.volumes import FIELDS

SMALL = CtConfig(size=(16, 20, 20), spacing_mm=(6.0, 5.0, 5.0))
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def _scan(path, seed=0, shape=(20, 22, 18), affine=AFFINE, low=-1000, high=1000, dtype=np.int16):
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
    nib.save(nib.Nifti1Image(voxels, affine, dtype=dtype), path)
    return path


def _edited(tmp, at, value, shape=(20, 22, 18)):
    """A good file with the bytes at `at` of its header replaced."""
    path = _scan(tmp / "a.nii", shape=shape)
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    return path


def _bytes(tmp, name, data):
    (tmp / name).write_bytes(data)
    return tmp / name


def _zipped(tmp, change):
    return _bytes(tmp, "b.nii.gz", change(bytearray(_scan(tmp / "a.nii.gz").read_bytes())))


def _text(tmp, name, text):
    return _bytes(tmp, name, text.encode())


def _image(tmp, voxels):
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp / "a.nii")
    return tmp / "a.nii"


def _flip(raw, at):
    raw[at] ^= 0xFF
    return bytes(raw)


def _f4(*values):
    return np.array(values, "<f4").tobytes()


def _i2(*values):
    return np.array(values, "<i2").tobytes()


def _qform_only(tmp, *pixdim):
    path = _edited(tmp, 252, _i2(1, 0))
    raw = bytearray(path.read_bytes())
    raw[80:92] = _f4(*pixdim)
    path.write_bytes(raw)
    return path


def _folder(tmp, *found):
    for name in found or ("a.nii",):
        _scan(tmp / "in" / name)
    return tmp / "in"


def _stored(tmp):
    preprocess_folder(_folder(tmp), tmp / "s.h5", SMALL, progress=False)
    return tmp / "s.h5"


def _cut(path, n):
    os.truncate(path, n)
    return path


def _h5(tmp, **attrs):
    with h5py.File(tmp / "x.h5", "w") as f:
        f.attrs.update(attrs)
    return tmp / "x.h5"


def _row(**changed):
    return {
        "spacing_mm": (1, 1, 1),
        "source_spacing_mm": (1, 1, 1),
        "source_shape": (1, 1, 1),
        "occupied": (0, 1),
        "hu_rule": "none",
    } | ({"slope": 1.0, "intercept": 0.0} | changed)


def _run(tmp, source, **kwargs):
    return preprocess_folder(source, tmp / "s.h5", kwargs.pop("cfg", SMALL), progress=False, **kwargs)


def _nifti2(tmp, shape, offset=544):
    header = nib.Nifti2Header()
    header.set_data_dtype(np.int16)
    header["dim"][:4] = 3, *shape
    header["pixdim"][1:4], header["qform_code"], header["vox_offset"] = 2, 1, offset
    return _bytes(tmp, "a.nii", header.binaryblock + bytes(4) + bytes(20 * 22 * 18 * 2))


def _pipe(tmp):
    os.mkfifo(tmp / "a.nii")
    return tmp / "a.nii"


def _dicom(tmp):
    (tmp / "dicom").mkdir()
    for name in ("IM0001", "b.dcm"):
        (tmp / "dicom" / name).write_bytes(bytes(128) + b"DICM" + bytes(500))
    return tmp / "dicom" / "IM0001"


META = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
RAW = {"low": 0, "high": 2000}

BROKEN = {  # what is wrong: (what the user does with it, what the message says)
    # scans
    "no such file": (lambda t: read_scan(t / "a.nii"), "cannot be read .No such file"),
    "a folder": (lambda t: read_scan(t), "holds no slices in DICOM"),
    "a pipe": (lambda t: read_scan(_pipe(t)), "must be a file, found a pipe"),
    "a DICOM file": (lambda t: read_scan(_dicom(t)), "is a damaged DICOM file: its header ends early"),
    "an empty file": (lambda t: read_scan(_bytes(t, "a.nii", b"")), "is empty"),
    "a text file": (
        lambda t: read_scan(_text(t, "a.nii", "x" * 1000)),
        "is not NIfTI .must begin with a header of 348 or 540 bytes",
    ),
    "gzipped text": (lambda t: read_scan(_bytes(t, "a.nii.gz", gzip.compress(b"x" * 1000))), "is not NIfTI"),
    "a header only": (
        lambda t: read_scan(_cut(_scan(t / "a.nii"), 348)),
        "truncated: its header asks for 16192 bytes, the file has 348",
    ),
    "truncated voxels": (
        lambda t: read_scan(_cut(_scan(t / "a.nii"), 9000)),
        "truncated: its header asks for 16192 bytes, .* 9000",
    ),
    "truncated gzip": (
        lambda t: read_scan(_zipped(t, lambda r: r[:-2000])),
        "truncated: the gzip stream ends early",
    ),
    "gzip of truncated voxels": (
        lambda t: read_scan(_bytes(t, "b.nii.gz", gzip.compress(_scan(t / "a.nii").read_bytes()[:9000]))),
        "truncated: holds 9 of the 18 slices",
    ),
    "a gzip checksum that is wrong": (
        lambda t: read_scan(_zipped(t, lambda r: _flip(r, -8))),
        "damaged: .*checksum",
    ),
    "a flipped byte": (lambda t: read_scan(_zipped(t, lambda r: _flip(r, 5000))), "damaged|truncated"),
    "bytes after the gzip": (
        lambda t: read_scan(_zipped(t, lambda r: bytes(r) + b"junk")),
        "damaged: other bytes follow the gzip stream",
    ),
    "an impossible size": (
        lambda t: read_scan(_edited(t, 42, _i2(30000, 30000, 30000))),
        "header asks for 54000000000352 bytes",
    ),
    "a size that wraps 64 bits": (
        lambda t: read_scan(_nifti2(t, (2**32, 2**31, 2))),
        "header asks for 36893488147419103776 bytes, the file has",
    ),
    "a size that wraps 64 bits, zipped": (
        lambda t: read_scan(_bytes(t, "b.nii.gz", gzip.compress(_nifti2(t, (2**62, 2, 2)).read_bytes()))),
        "header asks for 36893488147419103776 bytes inflated",
    ),
    "voxels beyond 64 bits": (
        lambda t: read_scan(_nifti2(t, (20, 22, 18), offset=2**62)),
        "truncated: its header asks for 46116860184",
    ),
    "voxels before the file": (
        lambda t: read_scan(_nifti2(t, (20, 22, 18), offset=-(2**40))),
        "must start after the header of 540 bytes",
    ),
    "much after the voxels": (
        lambda t: read_scan(
            _bytes(t, "b.nii.gz", gzip.compress(_scan(t / "a.nii").read_bytes() + bytes(2**21)))
        ),
        "other data follow its voxels",
    ),
    "negative size": (
        lambda t: read_scan(_edited(t, 42, _i2(-5))),
        r"at least 2 voxels along each axis, found \[-5, 22, 18\]",
    ),
    "a rank of 9": (lambda t: read_scan(_edited(t, 40, _i2(9))), r"must be one volume .* found dim \[9, 20"),
    "a header/image pair": (lambda t: read_scan(_edited(t, 344, b"ni1\0")), "NIfTI in one file"),
    "an unknown data type": (lambda t: read_scan(_edited(t, 70, _i2(9999))), "unknown data type 9999"),
    "voxels inside the header": (
        lambda t: read_scan(_edited(t, 108, _f4(4))),
        "must start after the header of 348 bytes, found vox_offset 4",
    ),
    "an infinite intercept": (
        lambda t: read_scan(_edited(t, 112, _f4(2, np.inf))),
        "scl_slope 2.0 with scl_inter inf",
    ),
    "four dimensions": (
        lambda t: read_scan(_image(t, np.zeros((5, 5, 5, 3), np.int16))),
        r"one volume .* found \[5, 5, 5, 3\]",
    ),
    "two dimensions": (
        lambda t: read_scan(_image(t, np.zeros((5, 5), np.int16))),
        r"one volume .* found \[5, 5\]",
    ),
    "one slice": (
        lambda t: read_scan(_image(t, np.zeros((5, 5, 1), np.int16))),
        r"at least 2 voxels .* found \[5, 5, 1\]",
    ),
    "complex voxels": (
        lambda t: read_scan(_image(t, np.zeros((5, 5, 5), np.complex64))),
        "one real number .* found complex64",
    ),
    "colours": (
        lambda t: read_scan(_image(t, np.zeros((5, 5, 5), [(c, "u1") for c in "RGB"]))),
        "one real number .* found colours",
    ),
    "a singular affine": (
        lambda t: read_scan(_edited(t, 280, _f4(2, 2, 0, 0, 0, 0, 0, 0))),
        "affine that can be inverted",
    ),
    "an affine of nan": (lambda t: read_scan(_edited(t, 280, _f4(np.nan))), "finite affine"),
    "zero spacing": (
        lambda t: read_scan(_qform_only(t, 2, 0, 2)),
        r"positive voxel spacing in mm, found \[2.0, 0.0, 2.0\]",
    ),
    "spacing of nan": (lambda t: read_scan(_qform_only(t, 2, 2, np.nan)), "positive voxel spacing"),
    "voxels of nan": (
        lambda t: preprocess_scan(_image(t, np.full((5, 5, 5), np.nan, "f4")), SMALL),
        "slice 0 has 25 voxels that are not finite",
    ),
    # the way to HU
    "raw values, no metadata": (
        lambda t: preprocess_scan(_scan(t / "a.nii", **RAW), SMALL),
        "stored values start at 0, they are raw",
    ),
    "neither raw nor HU": (
        lambda t: preprocess_scan(_scan(t / "a.nii", low=-50), SMALL, META),
        "the lowest is -50.*is it a CT",
    ),
    "metadata without a slope": (
        lambda t: preprocess_scan(_scan(t / "a.nii", **RAW), SMALL, {"RescaleIntercept": "0"}),
        "number in 'RescaleSlope'",
    ),
    "metadata that is no number": (
        lambda t: preprocess_scan(_scan(t / "a.nii", **RAW), SMALL, META | {"RescaleSlope": "one"}),
        "number in 'RescaleSlope', found 'one'",
    ),
    "metadata on HU": (
        lambda t: preprocess_scan(_scan(t / "a.nii"), evolve(SMALL, hu="metadata"), META),
        "was applied before, or is another scan's: with it 5.% .* without it 6.%",
    ),
    "-8192 on raw values of another scanner": (
        lambda t: preprocess_scan(_scan(t / "a.nii", **RAW), SMALL, META | {"RescaleIntercept": "-8192"}),
        "with it 0% of the voxels lie between -1100 and 300 HU",
    ),
    "everything saturated": (
        lambda t: preprocess_scan(_scan(t / "a.nii", low=5000, high=9000), evolve(SMALL, hu="none")),
        "every voxel became 1000 HU",
    ),
    "hu='header' without one": (
        lambda t: preprocess_scan(_edited(t, 112, _f4(np.nan, np.nan)), evolve(SMALL, hu="header")),
        "needs scl_slope",
    ),
    "no spacing at all": (
        lambda t: preprocess_scan(
            _scan(t / "a.nii", affine=None), SMALL, {"ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]"}
        ),
        "set spacing_from='metadata'",
    ),
    "no axes at all": (
        lambda t: preprocess_scan(_scan(t / "a.nii", affine=None), SMALL),
        "the direction of its axes is unknown",
    ),
    "no spacing in the metadata": (
        lambda t: preprocess_scan(_scan(t / "a.nii"), evolve(SMALL, spacing_from="metadata"), META),
        "number in 'XYSpacing'",
    ),
    "smaller than a voxel": (
        lambda t: preprocess_scan(
            _scan(t / "a.nii", affine=np.diag([-0.1, -0.1, 0.1, 1])),
            evolve(SMALL, spacing_mm=(9.0, 9.0, 9.0)),
        ),
        "smaller than one output voxel",
    ),
    "too flat": (
        lambda t: preprocess_scan(
            _scan(t / "a.nii", shape=(300, 300, 2)), CtConfig(preset="reference", size=(9, 9, 9))
        ),
        "too flat",
    ),
    # settings
    "an unknown preset": (
        lambda t: CtConfig(preset="raw"),
        "preset must be one of mm, reference, ctclip, merlin, got 'raw'",
    ),
    "antialias where it is not": (
        lambda t: CtConfig(preset="reference", antialias="on"),
        "antialias belongs to preset 'mm'",
    ),
    "spacing where it is not": (
        lambda t: CtConfig(preset="merlin", spacing_mm=(1.0, 1.0, 1.0)),
        "spacing_mm belongs to preset 'mm'",
    ),
    "flip where it is not": (lambda t: CtConfig(flip=True), "flip belongs to preset 'reference'"),
    "two numbers of size": (lambda t: CtConfig(size=(2, 3)), "size must be .. or three positive numbers"),
    "a size without end": (
        lambda t: CtConfig(size=(100_000,) * 3),
        "at most 1,073,741,824 voxels, got .* 1,000,000,000,000,000",
    ),
    "spacing of kilometres": (
        lambda t: CtConfig(spacing_mm=(1e9, 1.0, 1.0)),
        "spacing_mm must be between 0.01 and 1000 mm",
    ),
    "negative spacing": (
        lambda t: CtConfig(spacing_mm=(1.0, -1.0, 1.0)),
        "spacing_mm must be .. or three positive numbers",
    ),
    # folders and tables
    "a folder without scans": (
        lambda t: _run(t, t),
        "holds no .nii, .nii.gz, .npz file and no series of DICOM",
    ),
    "no such folder": (lambda t: _run(t, t / "nowhere"), "nowhere: no such file"),
    "two scans of one name": (
        lambda t: _run(t, _folder(t, "x/a.nii", "y/a.nii.gz")),
        "two scans are called 'a': .*x/a.nii and .*y/a.nii.gz",
    ),
    "a table with semicolons": (
        lambda t: _run(t, _text(t, "a.csv", "path;age\na.nii;3\n")),
        "its cells are separated by semicolons; save the table with commas",
    ),
    "metadata without a scale": (
        lambda t: _run(
            t, _folder(t), metadata_csv=_text(t, "m.csv", "VolumeName,RescaleSlope\na.nii.gz,1\n")
        ),
        "must have the column 'RescaleIntercept' to say how its scans are read, found 'VolumeName', 'RescaleSlope'",
    ),
    "metadata without spacing": (
        lambda t: _run(
            t,
            _folder(t),
            cfg=evolve(SMALL, hu="none", spacing_from="metadata"),
            metadata_csv=_text(t, "m.csv", "VolumeName,ZSpacing\na.nii.gz,1\n"),
        ),
        "must have the column 'XYSpacing'",
    ),
    "a CSV without paths": (
        lambda t: _run(t, _text(t, "a.csv", "file,age\na.nii,3\n")),
        "column 'path' or 'VolumeName', found 'file', 'age'",
    ),
    "a CSV that is no text": (
        lambda t: _run(t, _bytes(t, "a.csv", b"\xff\xfe\0")),
        "not a readable UTF-8 CSV",
    ),
    "metadata of other scans": (
        lambda t: _run(
            t, _folder(t), metadata_csv=_text(t, "m.csv", "VolumeName,RescaleSlope\nb.nii.gz,1\n")
        ),
        "has a row for none of the 1 scans; it names 'b', they 'a'",
    ),
    "two metadata rows": (
        lambda t: _run(t, _folder(t), metadata_csv=_text(t, "m.csv", "VolumeName\na.nii\na.nii.gz\n")),
        "two rows for 'a'",
    ),
    "metadata without names": (
        lambda t: _run(t, _folder(t), metadata_csv=_text(t, "m.csv", "name\na\n")),
        "must have the column 'VolumeName'",
    ),
    # stores
    "another file as store": (lambda t: store.open_store(_text(t, "s.h5", "hello")), "not a whole store"),
    "no store": (lambda t: store.open_store(t / "s.h5"), "no such file"),
    "a truncated store": (
        lambda t: store.open_store(_cut(_stored(t), 3000)),
        "not a whole store .*truncated",
    ),
    "other HDF5": (lambda t: store.open_store(_h5(t)), "but not a store"),
    "a later version": (
        lambda t: store.open_store(_h5(t, format="medvl-store", version=9)),
        "version 9, this medvl reads version 1",
    ),
    "other settings": (
        lambda t: preprocess_folder(_folder(t), _stored(t), evolve(SMALL, dtype="int16"), progress=False),
        r"other settings .wanted / found.: \$.dtype: int16 / uint8",
    ),
    "a name that is not there": (
        lambda t: store.open_store(_stored(t)).read("b"),
        "has no 'b'; it has 1 arrays, such as a",
    ),
    "no names": (lambda t: store.create(t / "s.h5", [], (2,), "u1", {}, ()), "a store needs names"),
    "a store that exists": (lambda t: store.create(_stored(t), ["a"], (2,), "u1", {}, ()), "exists already"),
    "a field of the store's own": (
        lambda t: store.create(t / "s.h5", ["a"], (2,), "u1", {}, [("done", "u1")]),
        "name, content, done are",
    ),
    "an array put twice": (
        lambda t: store.put(store.open_store(_stored(t)), "a", np.zeros(SMALL.size, "u1"), _row()),
        "written already",
    ),
    "an array without room": (
        lambda t: store.put(store.open_store(_stored(t)), "z", np.zeros(SMALL.size, "u1"), _row()),
        "has no room for 'z'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_refused_with_a_reason(tmp_path, case):
    act, message = BROKEN[case]
    with pytest.raises(ValueError, match=message) as e:
        act(tmp_path)
    print(f"{case}: {str(e.value).replace(str(tmp_path), '')}")  # pytest -s -k broken lists them
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hu_rule": "x" * 17}, "may have 16 bytes, got 17"), ({"more": 1}, "must have .*, got .*more")],
)
def test_rows_are_not_cut_and_not_guessed(tmp_path, change, message):
    store.create(tmp_path / "s.h5", ["a"], (2,), "u1", {}, FIELDS)
    with pytest.raises(ValueError, match=message):
        store.put(store.open_store(tmp_path / "s.h5"), "a", np.zeros(2, "u1"), _row(**change))
    with pytest.raises(ValueError, match=r"must be \(2,\) uint8, got \(2,\) int16"):
        store.put(store.open_store(tmp_path / "s.h5"), "a", np.zeros(2, "i2"), _row())


def test_folder_equals_single_scans_and_lists_the_refused(tmp_path, caplog):
    for i in range(4):
        _scan(tmp_path / "in" / f"deep/{i}" / f"valid_{i}_a_1.nii.gz", i)
    bad = _scan(tmp_path / "in/raw.nii.gz", low=0)
    out = tmp_path / "out" / "volumes.h5"
    with caplog.at_level(logging.INFO, "medvl"):
        summary = preprocess_folder(tmp_path / "in", out, SMALL, progress=False)
    assert (summary.done, summary.skipped, list(summary.rejected)) == (4, 0, ["raw"])
    s = store.open_store(out, expect=ct.settings_of(SMALL))
    assert s.names == tuple(f"valid_{i}_a_1" for i in range(4))
    for name, path in find_scans(tmp_path / "in").items():
        if name != "raw":
            v = preprocess_scan(path, SMALL)
            np.testing.assert_array_equal(s.read(name), v.voxels)
            row = s.row(name)
            assert {f[0]: row[f[0]] for f in FIELDS} == {f[0]: getattr(v, f[0]) for f in FIELDS}
    (row,) = files.read_csv(rejected_csv(out))
    assert (row["name"], row["path"]) == ("raw", str(bad))
    assert "they are raw" in row["reason"]
    assert "valid_2_a_1: HU = 1 * stored + 0 (stored), slices (3, 13)" in caplog.messages
    assert not any(str(tmp_path) in m for m in caplog.messages)

    bad.unlink()
    _scan(tmp_path / "in/added.nii.gz", 9)
    again = preprocess_folder(tmp_path / "in", out, SMALL, progress=False)
    assert (again.done, again.skipped, again.rejected) == (1, 4, {})
    assert rejected_csv(out).read_text() == "name,path,reason\n"
    assert store.open_store(out).names == (*s.names, "added")


def test_a_scan_that_was_replaced_under_its_name_is_noticed(tmp_path):
    paths = [_scan(tmp_path / f"in/{i}.nii.gz", i) for i in range(2)]
    out = tmp_path / "s.h5"
    preprocess_folder(tmp_path / "in", out, SMALL, progress=False)
    os.utime(paths[0], (1, 1))  # the same file, unpacked again
    assert preprocess_folder(tmp_path / "in", out, SMALL, progress=False).skipped == 2
    before = out.read_bytes()
    _scan(paths[0], 7)
    with pytest.raises(
        ValueError,
        match=r"1 scans are not the files that were written into it, e\.g\. 0; give the new files",
    ):
        preprocess_folder(tmp_path / "in", out, SMALL, progress=False)
    assert out.read_bytes() == before


def test_a_store_of_an_older_medvl_is_gone_on_with(tmp_path):
    _scan(tmp_path / "in/0.nii.gz", 0)
    out = tmp_path / "s.h5"
    store.create(out, ["0"], SMALL.size, "u1", ct.settings_of(SMALL), FIELDS)
    assert preprocess_folder(tmp_path / "in", out, SMALL, progress=False).done == 1


def test_metadata_rows_and_csv_sources(tmp_path):
    for i in range(3):
        _scan(tmp_path / "in" / f"{i}.nii.gz", i, low=0, high=2000)
    (tmp_path / "m.csv").write_text(
        "VolumeName,RescaleSlope,RescaleIntercept\n0.nii.gz,1,-1024\n2.nii.gz,1.0,-1000\n"
    )
    (tmp_path / "list.csv").write_text(
        "VolumeName,path\nx,in/0.nii.gz\ny,in/1.nii.gz\nz,in/2.nii.gz\nw,in/3.nii.gz\n"
    )
    summary = preprocess_folder(
        tmp_path / "list.csv", tmp_path / "s.h5", SMALL, tmp_path / "m.csv", progress=False
    )
    assert (summary.done, sorted(summary.rejected)) == (2, ["1", "3"])
    assert "m.csv: has no row for it" in summary.rejected["1"]
    s = store.open_store(tmp_path / "s.h5")
    assert [(s.row(n)["hu_rule"], s.row(n)["intercept"]) for n in ("0", "2")] == [
        ("metadata", -1024.0),
        ("metadata", -1000.0),
    ]


def test_a_pipe_among_scans_costs_one_scan_and_so_does_dicom_beside_it(tmp_path):
    source = _folder(tmp_path, "b.nii")
    os.mkfifo(source / "a.nii")
    (source / "c.dcm").write_bytes(bytes(128) + b"DICM")
    summary = _run(tmp_path, source)
    assert (summary.done, list(summary.rejected)) == (1, ["a", "in"])
    assert "found a pipe" in summary.rejected["a"]
    assert "a.nii: cannot be read (damaged, or no plain file" in summary.rejected["in"]


def test_what_a_killed_run_left_beside_the_store_is_removed(tmp_path):
    source = _folder(tmp_path)
    left = [tmp_path / ".s.h5.abc.tmp", tmp_path / ".s.rejected.csv.abc.tmp", tmp_path / ".s.h5.lock"]
    for path in left:
        path.write_text("")
    other = tmp_path / ".s2.h5.abc.tmp"
    other.write_text("")
    _run(tmp_path, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".s2.h5.abc.tmp", "in", "s.h5", "s.rejected.csv"]


def test_one_scan_is_a_source_and_what_is_done_may_be_removed(tmp_path):
    path = _folder(tmp_path) / "a.nii"
    assert _run(tmp_path, path).done == 1
    table = _text(tmp_path, "a.csv", "path\nin/a.nii\n")
    path.unlink()
    assert _run(tmp_path, table).skipped == 1


def test_one_run_at_a_time(tmp_path):
    source = _folder(tmp_path)
    with files.file_lock(tmp_path / "s.h5"), pytest.raises(ValueError, match="another run is writing"):
        _run(tmp_path, source)
    assert _run(tmp_path, source).done == 1


def test_a_real_folder(tmp_path, shared_data):
    """Every CT of the shared files becomes a volume; the MR and the two masks do not."""
    summary = preprocess_folder(
        shared_data / "ct/nifti", tmp_path / "s.h5", evolve(SMALL, size=(40, 56, 56)), progress=False
    )
    assert summary.done == 9
    assert sorted(summary.rejected) == [
        "totalseg_abdomen_3mm_sm_seg",
        "totalseg_aorta_chest_1p5mm_aorta_mask",
        "totalseg_mr_abdomen_negative",
    ]
    assert "is it a CT" in summary.rejected["totalseg_mr_abdomen_negative"]


_MANY = """
import sys
from medvl.ct.preprocess import CtConfig
from medvl.ct.ingest import preprocess_folder
if __name__ == "__main__":
    cfg = CtConfig(size=(16, 20, 20), spacing_mm=(6.0, 5.0, 5.0))
    preprocess_folder(sys.argv[1], sys.argv[2], cfg, workers=int(sys.argv[3]), progress=False)
"""


def test_kill_9_at_any_moment_loses_nothing(tmp_path):
    """Killed runs, then one to the end: the store's bytes are those of an undisturbed run. MEDVL_KILLS sets how often (default 3)."""
    count, kills = 120, int(os.environ.get("MEDVL_KILLS", "3"))
    for i in range(count):
        _scan(tmp_path / "in" / f"n{i:03}.nii.gz", i)
    assert preprocess_folder(tmp_path / "in", tmp_path / "whole.h5", SMALL, progress=False).done == count
    out, whole = tmp_path / "s.h5", store.open_store(tmp_path / "whole.h5")
    gen = np.random.default_rng(int(os.environ.get("MEDVL_KILL_SEED", "0")))
    for i in range(kills):
        before = len(store.open_store(out).names) if out.exists() else 0
        goal = before + gen.integers(0, max(2, count // kills))
        run = _started_alone(tmp_path, out) if i else _started_with_workers(tmp_path, out)
        while _alive(run) and not (out.exists() and len(store.open_store(out).names) >= goal):
            time.sleep(0.002)
        time.sleep(gen.uniform(0, 0.01))
        run.kill()  # of the run with workers the parent only: they must end by themselves
        run.join() if i else _ended(run)
        for name in store.open_store(out).names if out.exists() else ():
            np.testing.assert_array_equal(store.open_store(out).read(name), whole.read(name))
    summary = preprocess_folder(tmp_path / "in", out, SMALL, progress=False)
    assert summary.done + summary.skipped == count
    assert summary.skipped > 0
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not list(tmp_path.glob(".s.h5.*.tmp"))


def _started_with_workers(tmp_path, out):
    (tmp_path / "run.py").write_text(_MANY)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path / "in", out, "2"], start_new_session=True, env=env
    )


def _started_alone(tmp_path, out):
    run = workers.worker_context().Process(
        target=preprocess_folder, args=(tmp_path / "in", out, SMALL), kwargs={"progress": False}
    )
    run.start()
    return run


def _alive(run):
    return run.poll() is None if isinstance(run, subprocess.Popen) else run.is_alive()


def _ended(run):
    """Workers end when their parent is gone: wait until nothing of the group is left."""
    run.wait()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    raise AssertionError("workers outlived their parent")


def test_a_cluster_that_loses_a_worker_makes_the_same_volumes(tmp_path, monkeypatch):
    """40 scans on a local cluster of 2, a worker killed in the middle; then runs that find what is there."""
    for i in range(40):
        _scan(tmp_path / "in" / f"n{i:02}.nii.gz", i)
    _scan(tmp_path / "in/raw.nii.gz", low=0)
    whole, shards = tmp_path / "whole.h5", tmp_path / "shards.h5"
    want = preprocess_folder(tmp_path / "in", whole, SMALL, progress=False)
    killed = []

    def kill_one(_, name, summary):
        if name == "n10":
            killed.append(client.run(os.getpid).popitem()[1])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(ingest.log, "info", kill_one)  # called with each scan that is done
    with open_cluster("local:2") as client:
        address = client.scheduler.address
        got = preprocess_folder(tmp_path / "in", shards, SMALL, progress=False, cluster=address)
        assert killed
        assert got == want
        assert files.read_csv(rejected_csv(shards)) == files.read_csv(rejected_csv(whole))
        a, b = store.open_store(whole), store.open_store(shards, expect=ct.settings_of(SMALL))
        assert len(list(shards.iterdir())) >= 3  # the index, and a shard of each worker
        assert a.names == b.names
        for name in a.names:
            np.testing.assert_array_equal(a.read(name), b.read(name))
            assert (a.row(name), a.content(name)) == (b.row(name), b.content(name))

        _scan(tmp_path / "in/added.nii.gz", 99)
        again = preprocess_folder(tmp_path / "in", shards, SMALL, progress=False, cluster=address)
    assert (again.done, again.skipped, list(again.rejected)) == (1, 40, ["raw"])
    _scan(tmp_path / "in/more.nii.gz", 100)
    assert preprocess_folder(tmp_path / "in", shards, SMALL, progress=False).done == 1  # without a cluster
    assert store.open_store(shards).names == (*a.names, "added", "more")


def test_what_a_cluster_cannot_do_leaves_nothing_behind(tmp_path):
    _folder(tmp_path)
    with pytest.raises(ValueError, match=r"no scheduler with workers answers at tcp://127\.0\.0\.1:1"):
        preprocess_folder(tmp_path / "in", tmp_path / "s.h5", SMALL, cluster="tcp://127.0.0.1:1")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(ValueError, match="give --cluster or --workers"):
        preprocess_commands.fill_store(
            str(tmp_path / "in"), str(tmp_path / "s.h5"), "", (), "", 2, "", cluster="local:2"
        )


def _dies(job, out):
    if job.name == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return ingest._run_job(job, store_path=out, cfg=SMALL)


def test_a_worker_that_dies_costs_one_scan(tmp_path):
    names = ["a", "b", "bad", "c", "d", "e"]
    jobs = [
        ingest._Job(name=n, path=_scan(tmp_path / f"{n}.nii", i), metadata=None) for i, n in enumerate(names)
    ]
    out = tmp_path / "s.h5"
    store.create(out, names, SMALL.size, "u1", ct.settings_of(SMALL), FIELDS)
    one = functools.partial(_dies, out=out)
    results = {job.name: reason for job, (reason, _) in ingest._run_parallel(jobs, one, out, workers=2)}
    assert sorted(results) == sorted(names)
    assert {n for n, reason in results.items() if reason} == {"bad"}
    assert "its worker process died" in results["bad"]
    assert store.open_store(out).names == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    "cfg",
    [
        SMALL,
        CtConfig(preset="ctclip", size=(40, 60, 60)),
        CtConfig(preset="reference", size=(16, 20, 20), flip=True),
    ],
)
def test_contact_sheet_shows_head_up_and_the_patients_right_on_the_left(tmp_path, cfg):
    """A drawn patient: bright block low in the body, at the back, on the right."""
    voxels = np.full((30, 30, 30), -1000, np.int16)
    voxels[2:-2, 2:-2, 2:-2] = 0
    voxels[2:-2, 2:-2, 2:10] = 300  # the feet are denser
    voxels[17:23, 4:10, 4:10] = 1000  # RAS index: right, posterior, inferior
    nib.save(nib.Nifti1Image(voxels, np.diag([3.0, 3.0, 3.0, 1])), tmp_path / "drawn.nii.gz")
    v = preprocess_scan(tmp_path / "drawn.nii.gz", cfg)
    block = np.argwhere(v.voxels > v.voxels.max() * 0.9).mean(0)
    middle = evolve(v, occupied=(int(block[0]), int(block[0]) + 1))
    axial, coronal = (np.asarray(t, float) for t in _tiles(middle, tmp_path))
    y, x = np.argwhere(axial > 0.9 * axial.max()).mean(0)
    assert x < 90  # the patient's right is on the left
    assert y > 110  # the back is at the bottom
    image = coronal[coronal.any(1)][:, coronal.any(0)]
    assert (
        image[-len(image) // 4 :].mean() > image[: len(image) // 4].mean()
    )  # the feet, drawn denser, are at the bottom
    store_path = tmp_path / "s.h5"
    preprocess_folder(tmp_path, store_path, cfg, progress=False)
    contact_sheet(store.open_store(store_path), tmp_path / "store.png")
    contact_sheet([v], tmp_path / "volume.png")
    assert (tmp_path / "store.png").read_bytes() == (tmp_path / "volume.png").read_bytes()
    with pytest.raises(ValueError, match="at least one volume"):
        contact_sheet([], tmp_path / "none.png")


def _tiles(v, tmp_path):
    contact_sheet([v], tmp_path / "a.png", window_hu=(-1000, 1000))
    image = Image.open(tmp_path / "a.png")
    return [image.crop((i * 200, 0, (i + 1) * 200, 200)) for i in range(2)]


def test_a_list_leaves_scans_out(tmp_path, caplog):
    source = _folder(tmp_path, "a.nii", "b.nii", "c.nii")
    names_txt = _text(tmp_path, "no_chest.txt", "x/b.nii\n")
    with caplog.at_level(logging.INFO):
        assert _run(tmp_path, source, exclude_txt=names_txt).done == 2
    assert store.open_store(tmp_path / "s.h5").names == ("a", "c")
    assert "leaves out 1 of 3 scans" in caplog.text
    with pytest.raises(ValueError, match=r"no_chest.txt: leaves out all 1 scans"):
        _run(tmp_path, source / "b.nii", exclude_txt=names_txt)
