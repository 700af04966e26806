"""What `invoke preprocess`, `split` and `embed` refuse to write, and tables that are cut by patient."""

from pathlib import Path

import pytest

from medvl.base import files
from medvl.commands import ct as ct_commands


def _patients_table(path, column=False):
    """60 patients with four scans each, in names that are not CT-RATE's."""
    lines = ["VolumeName," + "PatientID," * column + "Nodule,Effusion"]
    for patient in range(60):
        for scan in range(4):
            lines.append(
                f"P{patient:03d}_CT{scan}.nii.gz,"
                + f"id{patient}," * column
                + f"{patient % 2},{(patient + scan) % 3 // 2}"
            )
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_split_replaces_no_file(tmp_path):
    labels = _patients_table(tmp_path / "valid_predicted_labels.csv")
    before = Path(labels).read_bytes()
    with pytest.raises(
        ValueError, match=r"valid_predicted_labels.csv exists and is not replaced; name another folder"
    ):
        ct_commands.split_tables(labels, str(tmp_path), "valid=550,test=2489", 0, pattern="(P[0-9]+)_")
    assert Path(labels).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["valid_predicted_labels.csv"]  # nothing was begun


def test_split_refuses_two_tables_for_one_file_and_a_foreign_table(tmp_path):
    labels = _patients_table(tmp_path / "valid_labels.csv")
    tables = [str(tmp_path / "a_reports.csv"), str(tmp_path / "b_reports.csv")]
    for table in tables:
        Path(table).write_text("VolumeName,Findings_EN\nP000_CT0.nii.gz,Clear.\n")
    with pytest.raises(ValueError, match="two of these would be cut into"):
        ct_commands.split_tables(labels, str(tmp_path / "out"), "a=1,b=1", 0, tables, pattern="(P[0-9]+)_")
    Path(tables[0]).write_text("VolumeName,Findings_EN\nother.nii.gz,Clear.\n")
    with pytest.raises(ValueError, match="none of its 1 rows is about a volume of"):
        ct_commands.split_tables(
            labels, str(tmp_path / "out"), "a=1,b=1", 0, tables[:1], pattern="(P[0-9]+)_"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["pattern", "column", "metadata"])
def test_split_keeps_patients_whole_who_are_named_in_other_ways(tmp_path, caplog, capsys, rule):
    labels = _patients_table(tmp_path / "all_labels.csv", column=rule == "column")
    tables = [_patients_table(tmp_path / "all_metadata.csv", column=True)] if rule == "metadata" else []
    how = {"pattern": "(P[0-9]+)_"} if rule == "pattern" else {"patient": "PatientID"}
    ct_commands.split_tables(labels, str(tmp_path / "out"), "a=0.3,b=0.7", 0, tables, **how)
    parts = [
        {r["VolumeName"].split("_")[0] for r in files.read_csv(tmp_path / f"out/{p}_labels.csv")}
        for p in "ab"
    ]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 60
    assert f"of {len(parts[0])} patients" in capsys.readouterr().out
    assert not caplog.records


def test_split_says_when_every_volume_counts_as_a_patient(tmp_path, caplog):
    ct_commands.split_tables(
        _patients_table(tmp_path / "all_labels.csv"), str(tmp_path / "out"), "a=1,b=1", 0
    )
    assert "240 of 240 volumes are not named as in CT-RATE" in caplog.text
    assert "P000" not in caplog.text  # no name of a volume in a log


def test_an_output_that_is_an_input_is_refused(tmp_path):
    table = tmp_path / "train.rejected.csv"
    table.write_text("name,path,reason\na,a.nii.gz,none\n")
    before = table.read_bytes()
    with pytest.raises(ValueError, match="writes its rejected scans there"):
        ct_commands.fill_store(str(table), str(tmp_path / "train.h5"), "", (), "", 1, "")
    with pytest.raises(ValueError, match=r"sheet must end in .png"):
        ct_commands.fill_store(str(tmp_path), str(tmp_path / "train.h5"), "", (), "", 1, str(table))
    with pytest.raises(ValueError, match=r"out must end in .npy"):
        ct_commands.embed_scan("runs/x", "scan.nii.gz", "scan.nii.gz")
    assert table.read_bytes() == before
