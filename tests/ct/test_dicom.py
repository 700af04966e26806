"""Series of DICOM slices equal the volume that they were written from, and what is wrong with one is told."""

import functools
import logging
import shutil
import stat
import struct
import zipfile

import nibabel as nib
import numpy as np
import pytest
from attrs import evolve

from medvl.base import files, store
from medvl.ct import dicom, preprocess, scans
from medvl.ct.ingest import find_scans, preprocess_folder, rejected_csv
from medvl.ct.preprocess import CtConfig, preprocess_scan
from medvl.ct.scans import ScanError, open_scan, read_scan

pydicom = pytest.importorskip("pydicom")

CT = "1.2.840.10008.5.1.4.1.1.2"
SMALL = CtConfig(size=(16, 20, 20), spacing_mm=(6.0, 5.0, 5.0))
SECRET = "Doe^Jane"
MM = (2.0, 1.5, 3.0)  # x y z


def drawn(seed=0, shape=(20, 22, 12)):
    """Voxels [x, y, z] in HU, each slice another."""
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def header(**changed):
    """What is common to all slices."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    values = {
        "SOPClassUID": CT,
        "SOPInstanceUID": pydicom.uid.generate_uid(),
        "PatientName": SECRET,
        "PatientID": "4711",
        "PatientBirthDate": "19700101",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SeriesInstanceUID": "1.2.3",
        "FrameOfReferenceUID": "1.2.7",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [MM[1], MM[0]],
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        **{"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0},
    }
    for keyword, value in (values | changed).items():
        if value is not None:
            setattr(data, keyword, value)
    return data


def write(data, plane, path):
    """One file of stored values [y, x], or frames [z, y, x]."""
    data.Rows, data.Columns = plane.shape[-2:]
    data.PixelData = plane.tobytes()
    data.file_meta.MediaStorageSOPClassUID = data.get("SOPClassUID", CT)
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def series(folder, voxels=None, step=(0, 0, MM[2]), origin=(-30.0, 40.0, -100.0), **changed):
    """A folder of slices whose names and instance numbers say nothing of their order."""
    voxels = drawn() if voxels is None else voxels
    order = np.random.default_rng(1).permutation(voxels.shape[2])
    for i, name in enumerate(order):
        position = [origin[axis] + i * step[axis] for axis in range(3)]
        data = header(**{"ImagePositionPatient": position, "InstanceNumber": int(name) * 7 % 5} | changed)
        slope, intercept = data.get("RescaleSlope", 1), data.get("RescaleIntercept", 0)
        stored = ((voxels[:, :, i].T - float(intercept)) / float(slope)).round()
        write(
            data, stored.astype(np.int16 if data.PixelRepresentation else np.uint16), folder / f"IM{name:04d}"
        )
    return folder


def edit(path, **changed):
    """Change or remove (None) attributes of a file."""
    data = pydicom.dcmread(path)
    for keyword, value in changed.items():
        if value is None:
            data.pop(keyword, None)
        else:
            setattr(data, keyword, value)
    data.save_as(path)
    return path


def by_height(folder):
    return sorted(folder.iterdir(), key=lambda p: float(pydicom.dcmread(p).ImagePositionPatient[2]))


def zipped(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


# What is read -----------------------------------------------------------------------------------------------
def test_a_shuffled_series_equals_its_volume_and_affine(tmp_path):
    voxels = drawn()
    scan = read_scan(series(tmp_path / "in", voxels))
    np.testing.assert_array_equal(scan.voxels, voxels)
    expected = np.diag([-MM[0], -MM[1], MM[2], 1])
    expected[:3, 3] = 30, -40, -100  # DICOM's axes grow to the left and to posterior
    np.testing.assert_allclose(scan.header.affine, expected, atol=1e-9)
    assert (scan.name, scan.header.shape, scan.voxels.dtype) == ("in", voxels.shape, np.int16)
    assert scan.voxels.flags.f_contiguous
    assert not scan.header.doubt
    for hu in ("auto", "header", "none"):
        volume = preprocess_scan(tmp_path / "in", evolve(SMALL, hu=hu))
        assert (volume.slope, volume.intercept) == (1, 0)


def test_the_real_series_equals_its_nifti_file(tmp_path, shared_data):
    """Its positions are rounded to six digits in DICOM and were not in NIfTI."""
    for i, path in enumerate(sorted((shared_data / "ct/dicom/cip_ct64_series").iterdir())):
        shutil.copy(path, tmp_path / f"{i * 31 % 79:03d}.bin")
    scan, image = read_scan(tmp_path), nib.load(shared_data / "ct/nifti/cip_chest64.nii.gz")
    np.testing.assert_array_equal(scan.voxels, np.asanyarray(image.dataobj))
    np.testing.assert_allclose(scan.header.affine, image.affine, atol=5e-4, rtol=0)


def test_jpeg_2000_equals_its_own_decompressed_copy(tmp_path, shared_data):
    source = shared_data / "ct/dicom/totalseg_jpeg2000_20"
    for path in source.iterdir():
        data = pydicom.dcmread(path)
        data.decompress(generate_instance_uid=False)
        data.save_as(tmp_path / path.name)
    a, b = read_scan(source), read_scan(tmp_path)
    np.testing.assert_array_equal(a.voxels, b.voxels)
    np.testing.assert_array_equal(a.header.affine, b.header.affine)
    assert a.voxels.std() > 100


def test_slices_without_modality_are_ct_by_their_class(shared_data):
    scan = read_scan([shared_data / f"ct/dicom/lungmask_{i}.dcm" for i in (1, 0)])
    assert scan.header.shape == (512, 512, 2)


def test_highdicom_reads_the_same(tmp_path):
    highdicom = pytest.importorskip("highdicom")
    scan = read_scan(series(tmp_path / "in"))
    files_of = [pydicom.dcmread(p) for p in (tmp_path / "in").iterdir()]
    theirs = highdicom.get_volume_from_series(files_of).to_patient_orientation("FPL")
    np.testing.assert_array_equal(theirs.array[::-1].transpose(2, 1, 0), scan.voxels)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (-1, -1)])
def test_any_orientation_becomes_the_same_volume(tmp_path, axes, signs):
    """Axial, coronal and sagittal slices, flipped: the same voxels at the same places of the patient."""
    voxels, mm = drawn(shape=(20, 22, 16)), np.array(MM)
    nib.save(nib.Nifti1Image(voxels, np.diag([-MM[0], -MM[1], MM[2], 1])), tmp_path / "a.nii")
    moved, origin = voxels.transpose(axes), np.zeros(3)
    unit = np.zeros((3, 3))
    for i, axis in enumerate(axes):
        unit[i, axis] = 1
    for i, sign in enumerate(signs):
        if sign < 0:
            moved, unit[i] = np.flip(moved, i), -unit[i]
            origin[axes[i]] = (voxels.shape[axes[i]] - 1) * mm[axes[i]]
    folder = series(
        tmp_path / "in",
        moved,
        step=unit[2] * mm[axes[2]],
        origin=origin,
        ImageOrientationPatient=[*unit[0], *unit[1]],
        PixelSpacing=[mm[axes[1]], mm[axes[0]]],
    )
    expected = preprocess_scan(tmp_path / "a.nii", SMALL)
    found = preprocess_scan(folder, SMALL)
    np.testing.assert_array_equal(found.voxels, expected.voxels)
    assert found.hu_rule == "stored"


SCALES = {
    "signed": dict(RescaleIntercept=0, PixelRepresentation=1, BitsStored=16, HighBit=15),
    "signed 12 bits": dict(RescaleIntercept=0, PixelRepresentation=1),
    "unsigned": {},
    "16 bits unsigned": dict(RescaleIntercept=-32768, BitsStored=16, HighBit=15),
    "slope 2": dict(RescaleSlope=2, RescaleIntercept=-1000, BitsStored=12),
}


@pytest.mark.parametrize("kind", SCALES)
def test_stored_values_become_hu(tmp_path, kind):
    voxels = drawn() // 2 * 2  # a slope of 2 has no odd ones
    scan = read_scan(series(tmp_path / "in", voxels, **SCALES[kind]))
    np.testing.assert_array_equal(scan.voxels, voxels)
    assert scan.voxels.dtype == np.int16
    assert (scan.header.slope, scan.header.intercept, scan.header.scaled) == (1, 0, True)


def test_values_that_int16_may_not_hold_become_int32_and_fractions_float32(tmp_path):
    wide = read_scan(series(tmp_path / "a", BitsStored=16, HighBit=15))
    assert wide.voxels.dtype == np.int32
    np.testing.assert_array_equal(wide.voxels, drawn())
    scan = read_scan(series(tmp_path / "b", RescaleSlope=0.5, RescaleIntercept=-1000.5))
    assert scan.voxels.dtype == np.float32
    np.testing.assert_allclose(scan.voxels, drawn(), atol=0.25)


def test_each_slice_has_its_own_scale(tmp_path):
    folder = series(tmp_path / "in")
    path = by_height(folder)[3]
    edit(path, RescaleSlope=2, RescaleIntercept=-1000)
    expected = drawn()
    expected[:, :, 3] = (expected[:, :, 3] + 1024) * 2 - 1000
    np.testing.assert_array_equal(read_scan(folder).voxels, expected)


@pytest.mark.parametrize(
    ("padding", "limit", "stored"),
    [(-2000, None, [-2000]), (-2000, -1990, [-2000, -1995]), (63536, None, [-2000])],
)
def test_padding_becomes_air(tmp_path, padding, limit, stored):
    voxels = drawn()
    voxels[:3, :2] = np.resize(stored, (3, 2, 12))
    changed = dict(PixelPaddingValue=-2000 if limit else None, PixelPaddingRangeLimit=limit)
    signed = dict(PixelRepresentation=1, BitsStored=16, HighBit=15, RescaleIntercept=0)
    folder = series(tmp_path / "in", voxels, **signed, **changed)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        # Some programs write it without its sign.
        data.add_new("PixelPaddingValue", "US" if padding > 0 else "SS", padding)
        data.save_as(path)
    found = read_scan(folder).voxels
    assert (found[:3, :2] == dicom.AIR).all()
    np.testing.assert_array_equal(found[3:], voxels[3:])


def test_without_a_scale_values_are_judged_as_those_of_a_nifti_file(tmp_path):
    folder = series(tmp_path / "in")
    for path in folder.iterdir():
        edit(path, RescaleSlope=None, RescaleIntercept=None)
    assert not read_scan(folder).header.scaled
    with pytest.raises(ScanError, match="they are raw"):
        preprocess_scan(folder, SMALL)
    row = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    assert preprocess_scan(folder, SMALL, row).hu_rule == "metadata"


def enhanced(path, voxels, positions=True, **changed):
    """One file of several frames, written from the last to the first, as enhanced CT."""
    item = lambda **values: pydicom.Sequence([_dataset(values)])
    data = header(SOPClassUID=f"{CT}.1", NumberOfFrames=voxels.shape[2], **changed)
    del data.ImageOrientationPatient, data.PixelSpacing, data.RescaleSlope, data.RescaleIntercept
    if positions:
        data.SharedFunctionalGroupsSequence = item(
            PixelMeasuresSequence=item(PixelSpacing=[MM[1], MM[0]]),
            PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
            PixelValueTransformationSequence=item(RescaleSlope=1, RescaleIntercept=-1024),
        )
        data.PerFrameFunctionalGroupsSequence = pydicom.Sequence(
            [
                _dataset({"PlanePositionSequence": item(ImagePositionPatient=[-30, 40, -100 + i * MM[2]])})
                for i in reversed(range(voxels.shape[2]))
            ]
        )
    return write(data, (voxels.transpose(2, 1, 0)[::-1] + 1024).astype(np.uint16), path)


def _dataset(values):
    data = pydicom.Dataset()
    for keyword, value in values.items():
        setattr(data, keyword, value)
    return data


def test_frames_of_enhanced_ct_equal_single_slices(tmp_path):
    single = read_scan(series(tmp_path / "in"))
    several = read_scan(enhanced(tmp_path / "scan.dcm", drawn()))
    np.testing.assert_array_equal(several.voxels, single.voxels)
    np.testing.assert_array_equal(several.header.affine, single.header.affine)
    assert several.name == "scan"


def test_rle_frames_and_big_endian_are_decoded(tmp_path):
    folder = series(tmp_path / "in")
    data = pydicom.dcmread(enhanced(tmp_path / "a.dcm", drawn()))
    data.compress(pydicom.uid.RLELossless)
    data.save_as(tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_scan(tmp_path / "a.dcm").voxels, drawn())
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
        pydicom.dcmwrite(path, data, implicit_vr=False, little_endian=False, overwrite=True)
    np.testing.assert_array_equal(read_scan(folder).voxels, drawn())


def test_zip_list_and_files_without_preamble_equal_the_folder(tmp_path):
    folder = series(tmp_path / "deep" / "in")
    directory = _dataset({"file_meta": header().file_meta, "FileSetID": "CD"})
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.8"
    directory.save_as(folder / "DICOMDIR", enforce_file_format=True)
    report = header(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR")
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    report.file_meta.MediaStorageSOPInstanceUID = "1.2.9"
    report.save_as(folder / "report", enforce_file_format=True)
    (folder / "Thumbs.db").write_bytes(bytes(200))
    (folder / "._IM0001.dcm").write_bytes(b"\0\5\x16\7" + bytes(200))
    expected = read_scan(folder)
    archive = read_scan(zipped(folder, tmp_path / "scan.zip"))
    listed = read_scan([p for p in sorted(folder.iterdir()) if p.name.startswith("IM")])
    for scan in (archive, listed, read_scan(tmp_path / "deep")):
        np.testing.assert_array_equal(scan.voxels, expected.voxels)
        np.testing.assert_array_equal(scan.header.affine, expected.header.affine)
    assert (archive.name, listed.name) == ("scan", "in")
    for path in folder.glob("IM*"):
        data = pydicom.dcmread(path)
        del data.file_meta
        bare = pydicom.dataset.Dataset(data)
        pydicom.dcmwrite(path, bare, implicit_vr=True, little_endian=True, overwrite=True)
        assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_scan(folder).voxels, expected.voxels)


def test_slices_are_decoded_as_they_are_taken(tmp_path):
    folder = series(tmp_path / "in")
    last = by_height(folder)[-1]
    with open_scan(folder) as (_, slices):
        next(slices)
        last.write_bytes(last.read_bytes()[:-1])
        with pytest.raises(ScanError, match="its pixels cannot be read"):
            list(slices)


def test_localisers_reformats_and_copies_are_set_aside_and_told(tmp_path, caplog):
    folder = series(tmp_path / "in")
    some = by_height(folder)
    shutil.copy(some[4], folder / "copy")
    scout = edit(shutil.copy(some[5], folder / "scout"), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    edit(scout, ImageOrientationPatient=[1, 0, 0, 0, 0, -1], SeriesInstanceUID="1.2.9")
    edit(shutil.copy(some[6], folder / "mip"), ImageType=["DERIVED", "SECONDARY", "MIP"])
    with caplog.at_level(logging.WARNING, "medvl"):
        np.testing.assert_array_equal(read_scan(folder).voxels, drawn())
    assert "1 localisers, 1 images of another ImageType" in caplog.text
    assert "1 copies of slices" in caplog.text


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_blank_slice_at_the_end_is_told(tmp_path, caplog, size):
    path = by_height(series(tmp_path / "in"))[-1]
    path.write_bytes(bytes(size))
    assert read_scan(tmp_path / "in").header.shape[2] == drawn().shape[2] - 1
    assert caplog.messages == [
        f"{path}: is empty or blank, as are 0 more; if they are slices, copy them again"
    ]


def test_one_of_several_series_is_chosen(tmp_path):
    series(tmp_path / "in/a")
    series(tmp_path / "in/b", drawn(1), SeriesInstanceUID="1.2.4")
    with pytest.raises(
        ScanError, match=r"holds 2 series; choose one .*1.2.3 \(12 images\), 1.2.4 \(12 images\)"
    ):
        read_scan(tmp_path / "in")
    np.testing.assert_array_equal(read_scan(tmp_path / "in", series="1.2.4").voxels, drawn(1))
    np.testing.assert_array_equal(read_scan(tmp_path / "in" / "1.2.4").voxels, drawn(1))
    with pytest.raises(ScanError, match=r"holds no slices 1.2.5 in DICOM"):
        read_scan(tmp_path / "in", series="1.2.5")


# A tilted gantry --------------------------------------------------------------------------------------------
def test_a_tilted_gantry_is_sheared_as_the_formula_says(tmp_path):
    """Slice k lies k * 0.8 mm further to posterior: naive linear interpolation, voxel by voxel."""
    voxels = drawn(shape=(8, 10, 12))
    folder = series(tmp_path / "in", voxels, step=(0, 0.8, 3.0))
    with open_scan(folder) as (header, slices):
        straight, moved = scans.straighten(header, slices)
        found = scans.stack_slices(straight, moved)
    by, extra = 0.8 / MM[1], int(np.ceil(11 * 0.8 / MM[1]))
    expected = np.empty((8, 10 + extra, 12))
    for k in range(12):
        low = voxels[:, :, k].min()
        for y in range(10 + extra):
            at = y - k * by
            below = int(np.floor(at))
            a, b = (voxels[:, i, k] if 0 <= i < 10 else np.full(8, low) for i in (below, below + 1))
            expected[:, y, k] = a * (below + 1 - at) + b * (at - below)
    assert np.abs(found - expected).max() <= 0.5 + 1e-6  # rounded to whole HU
    assert straight.spacing_mm == pytest.approx((2.0, 1.5, 3.0))
    # The first slice lies where it lay, and the last where it lay.
    point = np.array([0, 0, 11, 1.0])
    shifted = np.array([0, 11 * by, 11, 1.0])
    np.testing.assert_allclose(straight.affine @ shifted, header.affine @ point, atol=1e-9)


def test_tilt_the_other_way_and_none(tmp_path):
    """Each slice lies one voxel further to the right and to anterior: slices are moved, and nothing is lost."""
    voxels = drawn(shape=(8, 10, 5))
    with open_scan(series(tmp_path / "a", voxels, step=(-MM[0], -MM[1], 3.0))) as (header, slices):
        straight, moved = scans.straighten(header, slices)
        found = scans.stack_slices(straight, moved)
    expected = np.empty((12, 14, 5), np.int16)
    for k in range(5):
        expected[:, :, k] = voxels[:, :, k].min()
        expected[4 - k : 12 - k, 4 - k : 14 - k, k] = voxels[:, :, k]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(straight.affine @ [4, 4, 0, 1], header.affine @ [0, 0, 0, 1], atol=1e-9)
    with open_scan(series(tmp_path / "b")) as (header, slices):
        assert scans.straighten(header, slices)[0] is header


def test_shear_is_a_setting_that_stores_of_before_need_not_know(tmp_path):
    folder = series(tmp_path / "in", step=(0, 0.8, 3.0))
    volume = preprocess_scan(folder, evolve(SMALL, tilt="shear"))
    assert volume.source_shape == (12, 28, 20)
    assert "tilt" not in preprocess.settings_of(SMALL)
    assert preprocess.settings_of(evolve(SMALL, tilt="shear"))["tilt"] == "shear"


# What is refused --------------------------------------------------------------------------------------------
def _one(folder, at=5, **changed):
    edit(by_height(folder)[at], **changed)
    return folder


def _meta():
    meta = header().file_meta
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture
    return meta


def _all(folder, **changed):
    for path in folder.iterdir():
        edit(path, **changed)
    return folder


def _moved(folder, at, by):
    path = by_height(folder)[at]
    x, y, z = pydicom.dcmread(path).ImagePositionPatient
    return _one(folder, at, ImagePositionPatient=[x, y, round(float(z) + by, 3)])


def _tilted(folder):
    """The gantry tilted by 15 degrees: each slice further to posterior."""
    paths = by_height(folder)
    first = float(pydicom.dcmread(paths[0]).ImagePositionPatient[2])
    for path in paths:
        x, y, z = map(float, pydicom.dcmread(path).ImagePositionPatient)
        edit(path, ImagePositionPatient=[x, round(y + np.tan(np.radians(15)) * (z - first), 4), z])
    return folder


def _removed(folder, *at):
    paths = by_height(folder)
    for i in at:
        paths[i].unlink()
    return folder


def _doubled(folder, same=False):
    path = by_height(folder)[5]
    shutil.copy(path, folder / "again")
    if not same:
        pixels = np.frombuffer(pydicom.dcmread(path).PixelData, np.uint16)
        edit(folder / "again", PixelData=(pixels + 1).tobytes())
    return folder


def _resized(folder):
    path = by_height(folder)[5]
    pixels = pydicom.dcmread(path).pixel_array[:-2]
    edit(path, Rows=pixels.shape[0], PixelData=pixels.tobytes())
    return folder


def _syntax(folder, uid):
    path = by_height(folder)[5]
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = uid
    data.PixelData = pydicom.encaps.encapsulate([data.PixelData])
    pydicom.dcmwrite(path, data, implicit_vr=False, little_endian=True, overwrite=True)
    return folder


def _deflated(folder):
    path = by_height(folder)[5]
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(path)
    return folder


TURNED = [1, 0, 0, 0, 0.996, 0.087]
BROKEN = {  # what is done to a good series, and what is said of it
    "a slice is missing": (
        lambda f: _removed(f, 5),
        r"1 slice is missing between \S+ and \S+ mm along the normal",
    ),
    "three slices are missing": (
        lambda f: _removed(f, 3, 6, 7),
        r"3 slices are missing between .*, .* mm along",
    ),
    "a slice twice, with other pixels": (
        _doubled,
        "one slice at each place, has two with other pixels at .* mm",
    ),
    "uneven distances": (lambda f: _moved(f, 5, 0.9), "must lie evenly, found distances of .* to .* mm"),
    "a tilted gantry": (_tilted, "gantry tilted by 15.0 degrees.*tilt='shear'"),
    "another orientation": (
        lambda f: _one(f, ImageOrientationPatient=TURNED),
        "must have one orientation, 1 of .* differ",
    ),
    "another size": (_resized, "must have one size, 1 of .* differ"),
    "another spacing": (lambda f: _one(f, PixelSpacing=[1, 1]), "must have one PixelSpacing, 1 of .* differ"),
    "no Modality and no class": (
        lambda f: _all(f, Modality=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.7", file_meta=_meta()),
        "must have Modality 'CT', found 'none'",
    ),
    "a PET": (
        lambda f: _all(f, Modality="PT"),
        "must have Modality 'CT', found 'PT'; only CT has Hounsfield",
    ),
    "an MR": (lambda f: _all(f, Modality="MR"), "must have Modality 'CT', found 'MR'"),
    "two series": (
        lambda f: _one(f, SeriesInstanceUID="1.2.9"),
        r"holds 2 series; choose .*1.2.9 \(1 images\)",
    ),
    "two patients": (lambda f: _one(f, PatientID="4712"), "must hold one patient, holds images of 2"),
    "no position": (
        lambda f: _one(f, ImagePositionPatient=None),
        "must have PixelSpacing, .*ImagePositionPatient",
    ),
    "no pixels": (lambda f: _one(f, PixelData=None), "has no pixels"),
    "a syntax without decoder": (
        lambda f: _syntax(f, "1.2.840.10008.1.2.4.102"),
        r"its transfer syntax \(MPEG-4 .*\) is not read; pip install 'medvl\[dicom\]'",
    ),
    "a deflated file": (_deflated, r"its transfer syntax \(Deflated .*\) is not read"),
    "localisers only": (
        lambda f: _all(f, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        r"holds only \d+ localisers in DICOM",
    ),
    "one slice": (lambda f: _removed(f, *range(len(list(f.iterdir())) - 1)), "at least two slices, found 1"),
    "a slice without scale": (
        lambda f: _one(f, RescaleSlope=None),
        "all slices or none must have RescaleSlope and RescaleIntercept, .* of .* have them",
    ),
    "a scale of 0": (lambda f: _one(f, RescaleSlope=0), "must have a scale to HU, found .*0.0"),
    "electron density": (
        lambda f: _all(f, RescaleType="ED"),
        "must have a scale to HU, found RescaleType 'ED'",
    ),
    "values in other bits": (
        lambda f: _all(f, BitsStored=12, HighBit=15),
        "must store its values in the lowest bits, found HighBit 15 with BitsStored 12",
    ),
    "no finite spacing": (
        lambda f: _all(f, PixelSpacing=[float("nan"), 1.0]),
        "must have finite numbers, and two unit vectors at right angles",
    ),
    "an orientation of other lengths": (
        lambda f: _all(f, ImageOrientationPatient=[2, 0, 0, 0, 2, 0]),
        "two unit vectors at right angles in ImageOrientationPatient, found",
    ),
    "an orientation without right angles": (
        lambda f: _all(f, ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]),
        "two unit vectors at right angles in ImageOrientationPatient, found",
    ),
    "beside the line": (
        lambda f: _one(
            f, ImagePositionPatient=[9, 9, float(pydicom.dcmread(by_height(f)[5]).ImagePositionPatient[2])]
        ),
        "must lie on one line, the one at .* mm lies",
    ),
}


def _real(folder, data):
    folder.mkdir()
    for i, path in enumerate(sorted((data / "ct/dicom/cip_ct64_series").iterdir())):
        edit(shutil.copy(path, folder / f"{i * 31 % 79:03d}"), PatientName=SECRET)
    return folder


@pytest.mark.parametrize("kind", ["drawn", "real"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_series_is_refused_with_its_reason(tmp_path, request, case, kind, caplog):
    folder = tmp_path / "in"
    if kind == "real":
        _real(folder, request.getfixturevalue("shared_data"))
    else:
        series(folder)
    preprocess_scan(folder, SMALL)
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(ScanError, match=message) as e:
        preprocess_scan(folder, SMALL)
    text = str(e.value)
    print(f"| {case} | {text.replace(str(tmp_path), '')} |")  # pytest -s -k "broken and real" lists them
    assert len(text.splitlines()) == 1
    for secret in (SECRET, "Jane", "4711", "4712", "19700101", "123456", "2006"):
        assert secret not in text.replace(str(tmp_path), "") + caplog.text


def test_a_copy_of_a_slice_is_no_error(tmp_path):
    np.testing.assert_array_equal(read_scan(_doubled(series(tmp_path / "in"), same=True)).voxels, drawn())


def test_other_frames_and_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match="has 12 frames and positions of 0, which only enhanced CT"):
        read_scan(enhanced(tmp_path / "a.dcm", drawn(), positions=False))
    with pytest.raises(ScanError, match="at least two slices, found 1"):
        read_scan(next(series(tmp_path / "in").iterdir()))
    with pytest.raises(ScanError, match="holds no slices in DICOM"):
        read_scan(tmp_path / "empty")
    with pytest.raises(ScanError, match="holds no slices in DICOM"):
        read_scan([])
    (tmp_path / "in/damaged.dcm").write_bytes(bytes(100))
    with pytest.raises(ScanError, match=r"damaged.dcm: is not DICOM, or damaged"):
        read_scan(tmp_path / "in")
    whole = next((tmp_path / "in").iterdir()).read_bytes()
    for size in (140, 300, 600, 900, len(whole) - 960):
        (tmp_path / "in/damaged.dcm").write_bytes(whole[:size])
        with pytest.raises(ScanError, match=r"damaged.dcm"):
            read_scan(tmp_path / "in")


def test_a_header_that_cannot_be_read_is_not_quoted(tmp_path, caplog):
    folder = series(tmp_path / "in")
    path = next(folder.iterdir())
    content = path.read_bytes()
    at = content.index(b"-1024")
    path.write_bytes(content[:at] + b"Jane?" + content[at + 5 :])
    with pytest.raises(ScanError, match=r"cannot be read .damaged") as e:
        read_scan(folder)
    assert "Jane" not in str(e.value) + caplog.text
    assert e.value.__cause__ is None


@pytest.mark.parametrize(
    "values", [{"PatientID": SECRET * 9}, {"Modality": "CT" * 99}, {"SOPClassUID": "Doe"}]
)
def test_odd_values_are_not_quoted(tmp_path, recwarn, capfd, values):
    """pydicom warns of them, with the value."""
    folder = series(tmp_path / "in")
    for path in folder.iterdir():
        edit(path, **values)
    recwarn.clear()
    message = ""
    try:
        read_scan(folder)
    except ScanError as e:
        message = str(e)
    assert not recwarn.list
    assert SECRET not in "".join([message, *capfd.readouterr()])


def test_a_header_without_what_a_decoder_needs_is_refused(tmp_path):
    path = next(series(tmp_path / "in").iterdir())
    edit(path, BitsStored=None)
    with pytest.raises(ScanError, match=f"{path.name}: cannot be read .damaged"):
        read_scan(tmp_path / "in")


def test_a_coded_picture_of_another_size_is_refused_before_it_is_decoded(tmp_path, shared_data):
    for path in (shared_data / "ct/dicom/totalseg_jpeg2000_20").iterdir():
        content = bytearray(path.read_bytes())
        at = content.index(b"\xff\x4f\xff\x51") + 8
        content[at : at + 8] = struct.pack(">2I", 60000, 60000)
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(
        ScanError, match=r"must be \(60000, 60000, 1\) as those of its coded picture, got \(512"
    ):
        read_scan(tmp_path)


# ZIP --------------------------------------------------------------------------------------------------------
def _member(name, mode=0, size=None):
    def make(path):
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"x" * 20)
        if size:
            # The size that the archive's directory declares.
            content = bytearray(path.read_bytes())
            at = content.index(b"PK\1\2") + 24
            content[at : at + 4] = struct.pack("<I", size)
            path.write_bytes(content)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_member("../out"), "holds a path that leads out of it"),
        (_member("/etc/passwd"), "holds a path that leads out of it"),
        (_member("a\\..\\..\\out"), "holds a path that leads out of it"),
        (_member("C:\\out"), "holds a path that leads out of it"),
        (_member("link", stat.S_IFLNK | 0o777), "found a link or an encrypted file"),
        (_member("a", size=2**32 - 2), "damaged|holds"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(200)), "no slices in DICOM|damaged ZIP"),
    ],
)
def test_an_archive_that_is_not_safe_is_refused(tmp_path, make, message):
    make(tmp_path / "scan.zip")
    with pytest.raises(ScanError, match=message):
        read_scan(tmp_path / "scan.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["scan.zip"]


def test_an_archive_that_cannot_be_read_whole_is_refused(tmp_path):
    whole = zipped(series(tmp_path / "in"), tmp_path / "whole.zip").read_bytes()
    path = tmp_path / "scan.zip"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ScanError, match=r"is a damaged ZIP"):
        read_scan(path)
    content = bytearray(whole)
    at = content.index(b"PK\1\2") + 10
    content[at : at + 2] = struct.pack("<H", 9)
    path.write_bytes(content)
    with pytest.raises(ScanError, match=r"compressed in a way that is not read \(Deflate64\?\)"):
        read_scan(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("slice", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("slice", b"")
    with pytest.raises(ScanError, match=r"must name each file once"):
        read_scan(path)


def test_an_archive_of_50_gb_is_refused_by_what_it_declares(tmp_path, monkeypatch):
    path = zipped(series(tmp_path / "in"), tmp_path / "scan.zip")
    real = zipfile.ZipFile.infolist

    def infolist(self):
        members = real(self)
        members[0].file_size = 50 * 2**30
        return members

    monkeypatch.setattr(zipfile.ZipFile, "infolist", infolist)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nothing of it is inflated
    with pytest.raises(ScanError, match=r"must hold at most 16 GiB, holds 50.0 GiB"):
        read_scan(path)


def test_a_damaged_member_is_refused(tmp_path):
    path = zipped(series(tmp_path / "in"), tmp_path / "scan.zip")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ScanError, match=r"scan.zip: in/IM"):
        read_scan(path)


# Trees ------------------------------------------------------------------------------------------------------
def test_a_tree_of_series_becomes_a_store(tmp_path, caplog):
    tree = tmp_path / "tree"
    nib.save(nib.Nifti1Image(drawn(), np.diag([-2.0, -1.5, 3, 1])), (tree.mkdir(), tree / "plain.nii.gz")[1])
    series(tree / "P1/scan", drawn(1))
    series(tree / "P2/scan", drawn(2), SeriesInstanceUID="1.2.4")
    series(tree / "P3", drawn(3), SeriesInstanceUID="1.2.5")
    for path in series(
        tmp_path / "scout", drawn(4)[:, :, :2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    ).iterdir():
        shutil.copy(edit(path, SeriesInstanceUID="1.2.6"), tree / "P3" / f"s{path.name}")
    zipped(series(tmp_path / "P4", drawn(5)), tree / "P4.zip")
    (tree / "P5").mkdir()
    (tree / "P5" / "a.dcm").write_bytes(next((tree / "P1/scan").iterdir()).read_bytes()[:400])
    found = find_scans(tree)
    digests = {name for name in found if name.startswith("P3_")}
    assert {*found} - digests == {"plain", "P1_scan", "P2_scan", "P4", "P5"}
    assert len(digests) == 2
    run = functools.partial(preprocess_folder, tree, tmp_path / "s.h5", SMALL, progress=False)
    with caplog.at_level(logging.INFO, "medvl"):
        summary = run()
    assert summary.done == 5
    rejected = {row["name"]: row["reason"] for row in files.read_csv(rejected_csv(tmp_path / "s.h5"))}
    (scout,) = digests & {*rejected}
    assert "only 2 localisers" in rejected[scout]
    assert {*rejected} == {scout, "P5"}
    volumes = store.open_store(tmp_path / "s.h5")
    (whole,) = digests - {scout}
    for name, seed in {"P1_scan": 1, "P2_scan": 2, whole: 3, "P4": 5}.items():
        expected = preprocess_scan(series(tmp_path / f"again{seed}", drawn(seed)), SMALL)
        np.testing.assert_array_equal(volumes.read(name), expected.voxels)
    assert not any(str(tmp_path) in message for message in caplog.messages if "rejected" in message)
    assert SECRET not in caplog.text
    # A second run does nothing, a copy of the same files is the same, and a replaced slice is noticed.
    assert (run().done, run().skipped) == (0, 5)
    for path in (tree / "P1/scan").iterdir():
        path.touch()
    assert run().skipped == 5
    edit(next((tree / "P1/scan").iterdir()), RescaleIntercept=-1000)
    with pytest.raises(ValueError, match=r"1 scans are not the files .* P1_scan"):
        run()


def test_what_is_called_a_scan_is_rejected_and_not_passed_over(tmp_path):
    tree = tmp_path / "tree"
    path = zipped(series(tree / "good"), tree / "cut.zip")
    path.write_bytes(path.read_bytes()[:2000])
    (tree / "text.zip").write_text("text")
    with zipfile.ZipFile(tree / "nifti.zip", "w") as archive:
        archive.writestr("a.nii.gz", b"\x1f\x8b")
    (tree / "bad").mkdir()
    (tree / "bad/1.dcm").write_text("text")
    # What other programs leave beside scans is none.
    (tree / "._cut.zip").write_text("text")
    (tree / "bad/._1.dcm").write_text("text")
    (tree / "note.txt").write_text("text")
    with zipfile.ZipFile(tree / "letter.docx", "w") as archive:
        archive.writestr("a.xml", "text")
    summary = preprocess_folder(tree, tmp_path / "s.h5", SMALL, progress=False)
    assert summary.done == 1
    assert {*summary.rejected} == {"cut", "text", "nifti", "bad"}


def test_a_series_in_several_folders_is_told(tmp_path, caplog):
    series(tmp_path / "tree/whole", SeriesInstanceUID="1.2.4")
    parts = [tmp_path / "tree" / name for name in ("part1", "part2")]
    for part, path in zip(parts, by_height(series(tmp_path / "in"))[::6], strict=True):
        part.mkdir()
        shutil.copy(path, part)
    assert find_scans(tmp_path / "tree").keys() == {"whole", "part1", "part2"}
    (message,) = caplog.messages
    assert "1 series lie in several folders or ZIPs, e.g. " in message
    assert all(str(part) in message for part in parts)


def test_one_folder_and_one_zip_are_sources(tmp_path):
    folder = series(tmp_path / "in")
    assert find_scans(folder) == {"in": folder / "1.2.3"}
    path = zipped(folder, tmp_path / "a.zip")
    assert find_scans(path) == {"a": path / "1.2.3"}
    (tmp_path / "list.csv").write_text("path\nin\na.zip\n")
    assert preprocess_folder(tmp_path / "list.csv", tmp_path / "s.h5", SMALL, progress=False).done == 2


def test_what_is_damaged_in_a_tree_is_told_and_not_passed_over(tmp_path):
    tree = tmp_path / "tree"
    series(tree / "good")
    path = zipped(series(tmp_path / "in"), tree / "cut.zip")
    path.write_bytes(path.read_bytes()[:-300])  # its directory, which comes last
    (tree / "blank").mkdir()
    (tree / "blank" / "a.dcm").write_bytes(bytes(1000))
    (tree / "notes").mkdir()
    (tree / "notes" / "._a.dcm").write_bytes(bytes(1000))
    with pytest.raises(ScanError, match=r"cut.zip: is a damaged ZIP"):
        read_scan(path)
    with pytest.raises(ScanError, match=r"a.dcm: is not DICOM, or damaged"):
        read_scan(tree / "blank" / "a.dcm")
    assert find_scans(tree).keys() == {"good", "cut", "blank"}
    summary = preprocess_folder(tree, tmp_path / "s.h5", SMALL, progress=False)
    assert (summary.done, summary.rejected.keys()) == (1, {"cut", "blank"})


def test_a_series_that_comes_to_a_folder_leaves_the_others_as_they_are(tmp_path):
    folder = tmp_path / "tree" / "P1"
    folder.mkdir(parents=True)

    def add(number):
        added = series(tmp_path / f"in{number}", drawn(number), SeriesInstanceUID=f"1.2.{number}")
        for path in added.iterdir():
            shutil.copy(path, folder / f"{number}{path.name}")

    run = functools.partial(preprocess_folder, folder.parent, tmp_path / "s.h5", SMALL, progress=False)
    add(1)
    add(2)
    assert run().done == 2
    add(3)
    summary = run()
    assert (summary.done, summary.skipped, summary.rejected) == (1, 2, {})
    edit(next(folder.glob("2*")), RescaleIntercept=-1000)
    with pytest.raises(ValueError, match="1 scans are not the files"):
        run()


def test_a_path_that_ends_in_a_series_is_that_series_alone(tmp_path):
    folder = series(tmp_path / "P1")
    for path in series(tmp_path / "in", drawn(1), SeriesInstanceUID="1.2.4").iterdir():
        shutil.copy(path, folder / f"b{path.name}")
    archive = zipped(folder, tmp_path / "P2.zip")
    assert find_scans(folder / "1.2.4") == {"P1": folder / "1.2.4"}
    assert find_scans(archive / "1.2.4") == {"P2": archive / "1.2.4"}
    assert preprocess_folder(folder / "1.2.4", tmp_path / "s.h5", SMALL, progress=False).done == 1
    np.testing.assert_array_equal(read_scan(folder / "1.2.4").voxels, drawn(1))
    # A folder that is not there is none.
    with pytest.raises(ValueError, match="2021"):
        find_scans(folder / "2021")


def test_a_series_whose_uid_is_no_number_is_the_only_one_of_its_folder(tmp_path, caplog):
    tree = tmp_path / "tree"
    series(tree / "P1", SeriesInstanceUID="5f3a-anon")
    series(tree / "P2", SeriesInstanceUID="5f3b-anon")
    edit(by_height(tree / "P2")[0], SeriesInstanceUID="5f3c-anon")
    summary = preprocess_folder(tree, tmp_path / "s.h5", SMALL, progress=False)
    assert summary.done == 1
    assert "holds 2 series" in summary.rejected["P2"]
    assert "several folders" not in caplog.text
