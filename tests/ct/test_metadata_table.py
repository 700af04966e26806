"""Rows of a metadata table give scale, spacing and orientation, or say what is wrong with them."""

import nibabel as nib
import numpy as np
import pytest
from attrs import evolve

from medvl.ct import metadata_table
from medvl.ct.preprocess import preprocess_scan
from medvl.ct.scans import ScanError
from tests.ct.test_preprocess import ROW, SMALL, _drawn


def _table(path, *rows, header="VolumeName,RescaleSlope,RescaleIntercept"):
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def test_rows_are_found_by_volume_name(tmp_path):
    path = _table(tmp_path / "m.csv", "a.nii.gz,1,-1024", "b.nii,2,0")
    rows = metadata_table.read_metadata(path, ["b", "c"], metadata_table.RESCALE)
    assert {name: metadata_table.rescale(row) for name, row in rows.items()} == {"a": (1, -1024), "b": (2, 0)}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (["a.nii.gz,1,0", "a.nii,1,0"], (), "has two rows for 'a'"),
        (["x,1,0"], (), "has a row for none of the 2 scans; it names 'x', they 'a'"),
        (
            ["a,1,0"],
            ("ZSpacing",),
            "must have the column 'ZSpacing' to say how its scans are read, found .*'$",
        ),
    ],
)
def test_unusable_tables_are_refused(tmp_path, rows, columns, message):
    path = _table(tmp_path / "m.csv", *rows)
    with pytest.raises(ValueError, match=message):
        metadata_table.read_metadata(path, ["a", "b"], columns)


def test_a_table_without_a_scale_says_what_to_set(tmp_path):
    path = _table(tmp_path / "m.csv", "a", header="VolumeName")
    with pytest.raises(ValueError, match="where stored values are HU, set hu='none'"):
        metadata_table.read_metadata(path, ["a"], metadata_table.RESCALE)


def test_spacing_is_given_between_rows_first():
    """DICOM's PixelSpacing is (y, x); one number stands for both."""
    row = {"XYSpacing": "[0.7, 0.8]", "ZSpacing": "1.5"}
    assert metadata_table.spacing_mm(row) == (0.8, 0.7, 1.5)
    assert metadata_table.spacing_mm(row | {"XYSpacing": "0.6"}) == (0.6, 0.6, 1.5)
    for z, message in (
        ("0", "must be positive"),
        ("nan", "must have a number in 'ZSpacing'"),
        ("", "ZSpacing"),
    ):
        with pytest.raises(ValueError, match=message):
            metadata_table.spacing_mm(row | {"ZSpacing": z})
    with pytest.raises(ValueError, match="no such column"):
        metadata_table.spacing_mm({"XYSpacing": "1"})


def test_directions_are_in_ras():
    """The usual row: x grows to the left, y to posterior, slices to superior."""
    np.testing.assert_array_equal(
        metadata_table.directions({"ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]"}),
        np.diag([-1.0, -1.0, 1.0]),
    )
    assert metadata_table.directions({}) is None


@pytest.mark.parametrize(
    "printed", ["[1, 0, 0, 0, 1, 0]", "['1', '0', '0', '0', '1', '0']", "(1.0,0,0,0,1.0,0)", r"1\0\0\0\1\0"]
)
def test_an_orientation_is_read_however_it_was_printed(tmp_path, printed):
    good = _drawn(tmp_path / "a.nii", (24, 22, 20), (3, 3, 4))
    nib.save(nib.Nifti1Image(np.asanyarray(nib.load(good).dataobj), None), tmp_path / "b.nii")
    row = ROW | {"ImageOrientationPatient": printed, "XYSpacing": "['3.0', '3.0']", "ZSpacing": "4"}
    v = preprocess_scan(tmp_path / "b.nii", evolve(SMALL, spacing_from="metadata"), row)
    np.testing.assert_array_equal(v.voxels, preprocess_scan(good, SMALL).voxels)


@pytest.mark.parametrize("intercept", ["-1024,5", "[-1024, 0]"])
def test_a_row_of_several_intercepts_is_no_scale(tmp_path, intercept):
    """The first part of "-1024,5", or "0,97", would be a wrong scale without a word."""
    raw = _drawn(tmp_path / "a.nii", (24, 22, 20), (3, 3, 4), low=0, high=2500)
    with pytest.raises(ScanError, match="must have one number in 'RescaleIntercept', with a point"):
        preprocess_scan(raw, SMALL, ROW | {"RescaleIntercept": intercept})
    preprocess_scan(raw, evolve(SMALL, hu="metadata"), ROW | {"RescaleIntercept": "['-1024.0']"})


def test_a_patient_on_the_belly_is_turned_and_what_could_be_mirrored_is_refused(tmp_path):
    """[-1, 0, 0, 0, -1, 0]: x grows to the right and y to anterior. Where the normal is not superior, the order of slices is unknown."""
    good = _drawn(tmp_path / "a.nii", (24, 22, 20), (3, 2, 4))
    nib.save(nib.Nifti1Image(np.asanyarray(nib.load(good).dataobj)[::-1, ::-1], None), tmp_path / "b.nii")
    cfg = evolve(SMALL, spacing_from="metadata")
    turned = preprocess_scan(tmp_path / "b.nii", cfg, ROW | {"ImageOrientationPatient": r"-1\0\0\0\-1\0"})
    np.testing.assert_array_equal(turned.voxels, preprocess_scan(good, SMALL).voxels)
    refused = {
        "[-1, 0, 0, 0, 1, 0]": "could come out mirrored or sheared",
        "[1, 0, 0, 0, 0.95, -0.312]": "could come out mirrored or sheared",  # a tilted gantry
        "[1, 0, 0, 0, 1]": "must have six numbers in 'ImageOrientationPatient'",
        "[1, 0, 0, 1, 0, 0]": "two unit vectors at right angles",
        "[nan, 0, 0, 0, 1, 0]": "two unit vectors at right angles",
    }
    for cosines, message in refused.items():
        with pytest.raises(ScanError, match=message):
            preprocess_scan(tmp_path / "b.nii", cfg, ROW | {"ImageOrientationPatient": cosines})
