"""What is installed and what is missing, by extra."""

import json

import pytest

from medvl.commands import doctor

LINES = ("attrs>=24.2", "numpy>=99", 'nosuchpackage>=2; extra == "quant"', 'attrs; extra == "dicom"')


def test_packages_are_compared_with_what_is_wanted():
    own, old, missing, any_version = doctor.list_needs(LINES)
    assert (own.extra, own.fits) == ("medvl", True)
    assert (old.name, old.fits) == ("numpy", False)
    assert old.found
    assert (missing.extra, missing.found, missing.fits) == ("quant", "", False)
    assert (any_version.extra, any_version.fits) == ("dicom", True)


def test_what_is_missing_is_said_with_the_command_that_brings_it(capsys, monkeypatch, tmp_path):
    needs = doctor.list_needs(LINES)
    monkeypatch.setattr(doctor, "list_needs", lambda: needs)
    assert doctor.check_installation(str(tmp_path / "environment.json")) == 1
    said = capsys.readouterr().out
    assert "medvl lacks numpy>=99: pip install -e .\n" in said
    assert "quant lacks nosuchpackage>=2: pip install -e '.[quant]'" in said
    assert "dicom lacks" not in said
    assert json.loads((tmp_path / "environment.json").read_text())["torch"]


def test_a_folder_in_the_place_of_its_file_is_named_first(tmp_path, capsys):
    with pytest.raises(ValueError, match="must be a file to write, and is a folder"):
        doctor.check_installation(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_this_installation_has_what_medvl_needs():
    assert all(need.fits for need in doctor.list_needs() if need.extra == "medvl")


def test_a_torchvision_that_does_not_work_is_named(monkeypatch):
    versions = {"torchvision": "0.1", "torch": "9"}
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, ""))
    (fault,) = doctor._faults()  # there is no torchvision to import
    assert "torchvision 0.1 does not work with torch 9" in fault
