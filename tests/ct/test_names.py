"""Which patient a volume belongs to: by CT-RATE's names, by a pattern, by a column."""

import logging

import pytest

from medvl.ct import names


def test_patients_by_ct_rate_names(caplog):
    assert names.patients_of(["valid_1_a_1.nii.gz", "valid_1_b_1", "train_12_a_2"]) == [
        "valid_1",
        "valid_1",
        "train_12",
    ]
    assert not caplog.records


def test_other_names_count_as_patients_of_their_own_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert names.patients_of(["valid_1_a_1", "P001_CT0", "P001_CT1"]) == [
            "valid_1",
            "P001_CT0",
            "P001_CT1",
        ]
    assert "2 of 3 volumes are not named as in CT-RATE" in caplog.text


@pytest.mark.parametrize("pattern", ["(P[0-9]+)_CT", "P[0-9]+", "^(?P<patient>[^_]+)_"])
def test_patients_by_a_pattern(pattern, caplog):
    assert names.patients_of(["P001_CT0.nii.gz", "P001_CT1.nii.gz", "P002_CT0.nii.gz"], pattern) == [
        "P001",
        "P001",
        "P002",
    ]
    assert not caplog.records


def test_patients_by_a_column():
    assert names.patients_of(["a.nii.gz", "b"], column={"b": " 7 ", "a": "7", "c": "8"}) == ["7", "7"]


def test_rules_that_leave_a_volume_without_a_patient_are_refused():
    with pytest.raises(ValueError, match="must find the patient in every name, it finds none in 'scan9'"):
        names.patients_of(["P001_CT0", "scan9"], "(P[0-9]+)_")
    with pytest.raises(ValueError, match="is not a regular expression"):
        names.patients_of(["P001_CT0"], "(P")
    with pytest.raises(ValueError, match=r"1 of 2 have none, e\.g\. b"):
        names.patients_of(["a", "b"], column={"a": "1", "b": " "})
    with pytest.raises(ValueError, match="not both"):
        names.patients_of(["a"], "a", {"a": "1"})


def test_a_list_of_volumes_is_read_and_a_bad_one_is_refused(tmp_path):
    path = tmp_path / "no_chest.txt"
    path.write_text("/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz\r\n\nvalid_2_a_1\nvalid_2_a_1.nii.gz")
    assert names.read_list(path) == ("valid_1_a_1", "valid_2_a_1")
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="must name volumes, one a line, and is empty"):
        names.read_list(path)
    path.write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(ValueError, match="not a readable list of volumes"):
        names.read_list(path)
    with pytest.raises(ValueError, match=r"not a readable list of volumes.*No such file"):
        names.read_list(tmp_path / "x.txt")
