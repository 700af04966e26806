"""What `invoke preprocess`, `split` and `embed` refuse to write, and tables that are cut by patient."""

import json
from pathlib import Path

import numpy as np
import pytest

from medvl.base import files
from medvl.commands import preprocess as preprocess_commands
from medvl.commands import scans as scans_commands
from medvl.commands import split as split_commands
from medvl.ct import reports


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
        split_commands.split_tables(labels, str(tmp_path), "valid=550,test=2489", 0, pattern="(P[0-9]+)_")
    assert Path(labels).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["valid_predicted_labels.csv"]  # nothing was begun


def test_split_refuses_two_tables_for_one_file_and_a_foreign_table(tmp_path):
    labels = _patients_table(tmp_path / "valid_labels.csv")
    tables = [str(tmp_path / "a_reports.csv"), str(tmp_path / "b_reports.csv")]
    for table in tables:
        Path(table).write_text("VolumeName,Findings_EN\nP000_CT0.nii.gz,Clear.\n")
    with pytest.raises(ValueError, match="two of these would be cut into"):
        split_commands.split_tables(labels, str(tmp_path / "out"), "a=1,b=1", 0, tables, pattern="(P[0-9]+)_")
    Path(tables[0]).write_text("VolumeName,Findings_EN\nother.nii.gz,Clear.\n")
    with pytest.raises(ValueError, match="none of its 1 rows is about a volume of"):
        split_commands.split_tables(
            labels, str(tmp_path / "out"), "a=1,b=1", 0, tables[:1], pattern="(P[0-9]+)_"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["pattern", "column", "metadata"])
def test_split_keeps_patients_whole_who_are_named_in_other_ways(tmp_path, caplog, capsys, rule):
    labels = _patients_table(tmp_path / "all_labels.csv", column=rule == "column")
    tables = [_patients_table(tmp_path / "all_metadata.csv", column=True)] if rule == "metadata" else []
    how = {"pattern": "(P[0-9]+)_"} if rule == "pattern" else {"patient": "PatientID"}
    split_commands.split_tables(labels, str(tmp_path / "out"), "a=0.3,b=0.7", 0, tables, **how)
    parts = [
        {r["VolumeName"].split("_")[0] for r in files.read_csv(tmp_path / f"out/{p}_labels.csv")}
        for p in "ab"
    ]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 60
    assert f"of {len(parts[0])} patients" in capsys.readouterr().out
    assert not caplog.records


def test_split_says_when_every_volume_counts_as_a_patient(tmp_path, caplog):
    split_commands.split_tables(
        _patients_table(tmp_path / "all_labels.csv"), str(tmp_path / "out"), "a=1,b=1", 0
    )
    assert "240 of 240 volumes are not named as in CT-RATE" in caplog.text
    assert "P000" not in caplog.text  # no name of a volume in a log


def test_an_output_that_is_an_input_is_refused(tmp_path):
    table = tmp_path / "train.rejected.csv"
    table.write_text("name,path,reason\na,a.nii.gz,none\n")
    before = table.read_bytes()
    with pytest.raises(ValueError, match="writes its rejected scans there"):
        preprocess_commands.fill_store(str(table), str(tmp_path / "train.h5"), "", (), "", 1, "")
    with pytest.raises(ValueError, match=r"sheet must end in .png"):
        preprocess_commands.fill_store(str(tmp_path), str(tmp_path / "train.h5"), "", (), "", 1, str(table))
    with pytest.raises(ValueError, match=r"out must end in .npy"):
        scans_commands.embed_scan("runs/x", "scan.nii.gz", "scan.nii.gz")
    assert table.read_bytes() == before


def _ct_rate_tables(folder, seed=0):
    """Tables with the patients of CT-RATE's validation set: 1,304, of whom 112 have one volume, the others two
    to four; those with more scans are more ill.
    """
    rng = np.random.default_rng(seed)
    counts = np.repeat([1, 2, 3, 4], [112, 920, 1, 271])
    rng.shuffle(counts)
    severity = rng.gamma(2.0, 0.5, len(counts)) * np.where(counts > 2, 1.5, np.where(counts == 1, 0.7, 1.0))
    prevalence = np.linspace(0.07, 0.45, len(reports.FINDINGS))
    rows = []
    for number, (count, ill) in enumerate(zip(counts, severity, strict=True), 1):
        for scan in range(-(-int(count) // 2)):
            findings = (rng.random(len(prevalence)) < prevalence * ill).astype(int)
            for recon in range(min(2, int(count) - 2 * scan)):
                rows.append((f"valid_{number}_{'abc'[scan]}_{recon + 1}.nii.gz", *findings))
    folder.mkdir()
    labels = folder / "valid_predicted_labels.csv"
    columns = ["VolumeName", *reports.FINDINGS]
    files.write_csv(labels, [dict(zip(columns, row, strict=True)) for row in rows], columns)
    for table, column in (("metadata", "ZSpacing"), ("reports", "Findings_EN")):
        path = folder / f"validation_{table}.csv"
        files.write_csv(path, [{"VolumeName": row[0], column: "1"} for row in rows], ["VolumeName", column])
    return str(labels), [str(folder / f"validation_{table}.csv") for table in ("metadata", "reports")]


def _worst_gap(*tables):
    prevalence = [reports.read_labels(table)[2].mean(0) for table in tables]
    return np.ptp(prevalence, axis=0).max()


def test_the_reference_rule_gives_the_reference_counts_and_a_worse_gap_than_balanced(tmp_path, capsys):
    labels, tables = _ct_rate_tables(tmp_path / "in")
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    split_commands.split_tables(labels, str(tmp_path / "reference"), "", 0, tables, target=500)
    printed = capsys.readouterr().out
    assert "valid: 550 volumes of 331 patients" in printed
    assert "test: 2489 volumes of 973 patients" in printed
    out = tmp_path / "reference"
    assert {path.name for path in out.iterdir()} == {
        *("validation_metadata.csv", "validation_reports.csv", "valid_predicted_labels.csv"),
        *("test_metadata.csv", "test_reports.csv", "test_predicted_labels.csv"),
        *("original_validation_metadata.csv", "original_validation_reports.csv"),
        *("original_valid_predicted_labels.csv", "split_summary.json"),
    }
    # All patients of one volume, and of those of two the first 219 of the table.
    volumes, _, _ = reports.read_labels(labels)
    of_patient = {}
    for volume in volumes:
        of_patient.setdefault(int(volume.split("_")[1]), []).append(volume)
    ones = [p for p, v in of_patient.items() if len(v) == 1]
    twos = [p for p, v in of_patient.items() if len(v) == 2]
    summary = json.loads((out / "split_summary.json").read_text())
    assert len(ones) == 112
    assert summary["validation_patient_ids"] == sorted(ones + twos[:219])
    assert (summary["total_original_volumes"], summary["test_patients"]) == (3039, 973)
    # The originals as they were, and each part a cut of them.
    for name, content in before.items():
        assert (tmp_path / "in" / name).read_bytes() == content
        assert (out / f"original_{name}").read_bytes() == content
    assert len(files.read_csv(out / "validation_reports.csv")) == 550

    split_commands.split_tables(labels, str(tmp_path / "balanced"), "valid=550,test=2489", 0, tables)
    gaps = {}
    for rule in ("reference", "balanced"):
        parts = [tmp_path / rule / f"{part}_predicted_labels.csv" for part in ("valid", "test")]
        gaps[rule] = _worst_gap(*parts)
    assert gaps["balanced"] < gaps["reference"] / 2, gaps
    assert f"{gaps['balanced']:.3f}" in capsys.readouterr().out


def test_the_reference_rule_overwrites_nothing_and_needs_two_parts(tmp_path):
    labels, tables = _ct_rate_tables(tmp_path / "in")
    with pytest.raises(ValueError, match=r"valid_predicted_labels.csv exists and is not replaced"):
        split_commands.split_tables(labels, str(tmp_path / "in"), "", 0, tables, target=500)
    assert len([*(tmp_path / "in").iterdir()]) == 3
    with pytest.raises(ValueError, match="both parts must have some"):
        split_commands.split_tables(labels, str(tmp_path / "out"), "", 0, tables, target=3039)
    assert not (tmp_path / "out").exists()


def test_the_reference_rule_takes_a_patient_of_very_many_volumes_while_validation_is_small():
    patients = ["a"] + ["b"] * 300 + ["c"] * 400
    rows = reports.split_like_reference(patients, 200)  # 1, then 301 > 250 with 1 < 100, then 301 is enough
    assert (len(rows["valid"]), len(rows["test"])) == (301, 400)
