"""Report and label tables, prompts, and patient-wise splits against the greedy split in use elsewhere."""

import logging

import numpy as np
import pytest

from medvl.ct import names, reports

PREVALENCE = (
    np.array(
        [
            10.3,
            28.5,
            10.7,
            7.4,
            25.2,
            13.7,
            26.0,
            19.7,
            23.5,
            44.8,
            39.0,
            27.3,
            12.4,
            8.3,
            11.7,
            19.1,
            10.9,
            8.2,
        ]
    )
    / 100
)


def _write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def _reports(tmp_path):
    head = "VolumeName,ClinicalInformation_EN,Findings_EN,Impressions_EN\n"
    rows = 'valid_1_a_1.nii.gz,x,"Clear lungs, no nodule.",Normal.\nvalid_1_a_2.nii.gz,x,Emphysema.,Not given.\nvalid_2_a_1.nii.gz,x,NaN,\n'
    return _write(tmp_path / "reports.csv", head + rows)


def test_reports_are_the_named_columns(tmp_path, caplog):
    path = _reports(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert reports.read_reports(path, "impression", "drop") == {"valid_1_a_1": "Normal."}
        assert "2 of 3 reports have no impression text" in caplog.text
        assert "valid_" not in caplog.text  # no name of a volume in a log
    assert reports.read_reports(path, "findings", "empty") == {
        "valid_1_a_1": "Clear lungs, no nodule.",
        "valid_1_a_2": "Emphysema.",
        "valid_2_a_1": "",
    }
    both = reports.read_reports(path, "both", "drop")
    assert both == {"valid_1_a_1": "Clear lungs, no nodule. Normal.", "valid_1_a_2": "Emphysema."}


@pytest.mark.parametrize("text", ["None", "N/A", "n/a.", "NA", "null", "-", "Not available."])
def test_what_says_that_there_is_no_text_is_no_text(tmp_path, text):
    path = _write(
        tmp_path / "r.csv",
        f"VolumeName,Findings_EN,Impressions_EN\na,{text},Normal.\nb,None of note.,{text}\n",
    )
    assert reports.read_reports(path, "both") == {"a": "Normal.", "b": "None of note."}


def test_nothing_missing_is_nothing_logged(tmp_path, caplog):
    path = _write(tmp_path / "r.csv", "VolumeName,Impressions_EN\na.nii.gz,Normal.\n")
    assert reports.read_reports(path) == {"a": "Normal."}
    assert not caplog.records


def test_reports_refuse_missing_texts(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 3 have none, the first is row 3"):
        reports.read_reports(_reports(tmp_path))
    path = _write(tmp_path / "none.csv", "VolumeName,Impressions_EN\na,not given\nb,NOT GIVEN.\nc, nan \n")
    with pytest.raises(ValueError, match="none of the 3 rows"):
        reports.read_reports(path, "impression", "drop")


def test_reports_refuse_a_volume_twice_and_unknown_columns(tmp_path):
    path = _write(tmp_path / "twice.csv", "VolumeName,Impressions_EN\na.nii.gz,x\nb,y\na,z\n")
    with pytest.raises(ValueError, match="rows 2 and 4 name the same"):
        reports.read_reports(path)
    with pytest.raises(ValueError, match="Findings_EN"):
        reports.read_reports(path, "findings")
    with pytest.raises(ValueError, match="got 'all'"):
        reports.read_reports(path, "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="VolumeName is empty in row 3"):
        reports.read_reports(_write(tmp_path / "blank.csv", "VolumeName,Impressions_EN\na,x\n ,y\n"))


def test_labels_are_the_table(tmp_path):
    path = _write(
        tmp_path / "labels.csv",
        "VolumeName,Emphysema,Lung nodule\nvalid_1_a_1.nii.gz,0,1\nvalid_2_a_1.nii.gz,1.0,0.0\n",
    )
    volumes, findings, labels = reports.read_labels(path)
    assert (volumes, findings) == (("valid_1_a_1", "valid_2_a_1"), ("Emphysema", "Lung nodule"))
    assert labels.dtype == np.int8
    assert labels.tolist() == [[0, 1], [1, 0]]
    assert reports.read_labels(path, ["Lung nodule", "Emphysema"])[2].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("value", ["", "-1", "2", "0.5", "yes", "nan"])
def test_labels_are_strict(tmp_path, value):
    path = _write(tmp_path / "labels.csv", f"VolumeName,Emphysema,Lung nodule\na,0,1\nb,1,{value}\n")
    with pytest.raises(ValueError, match=f"found '{value}' in column 'Lung nodule', row 3"):
        reports.read_labels(path)


def test_labels_refuse_bad_tables(tmp_path):
    with pytest.raises(ValueError, match="rows 2 and 3"):
        reports.read_labels(_write(tmp_path / "a.csv", "VolumeName,A\nv,0\nv.nii.gz,0\n"))
    with pytest.raises(ValueError, match="only VolumeName"):
        reports.read_labels(_write(tmp_path / "b.csv", "VolumeName\nv\n"))
    with pytest.raises(ValueError, match="'B'"):
        reports.read_labels(tmp_path / "a.csv", ["B"])
    with pytest.raises(ValueError, match="each once"):
        reports.read_labels(tmp_path / "a.csv", ["A", "A"])


def test_prompts_are_the_published_ones():
    assert reports.prompts_for("Lung nodule", "reference") == (("Lung nodule",), ("no Lung nodule",))
    assert reports.prompts_for("Lung nodule", "ctclip") == (
        ("Lung nodule is present.",),
        ("Lung nodule is not present.",),
    )
    assert len(reports.FINDINGS) == len(set(reports.FINDINGS)) == 18


def test_the_ensemble_denies_each_statement_once():
    positive, negative = reports.prompts_for("Emphysema")
    assert len(set(positive)) == len(set(negative)) == len(positive) == len(negative) == 7
    assert "There is no emphysema." in negative
    assert all((" no " in f" {n.lower()} ") != (" not " in n) for n in negative)
    assert not any(" no " in f" {p.lower()} " or " not " in p for p in positive)
    assert "There is COPD." in reports.prompts_for("COPD")[0]


def test_prompts_refuse_unknown_sets():
    with pytest.raises(ValueError, match="reference, ctclip, ensemble"):
        reports.prompts_for("Emphysema", "mean7")
    with pytest.raises(ValueError, match="needs a finding"):
        reports.prompts_for(" ")


def _cohort(seed, patients=1304):
    """Volumes and labels like CT-RATE's: the ill have more findings at once, more scans and so more volumes."""
    rng = np.random.default_rng(seed)
    volumes, labels = [], []
    for p in range(patients):
        ill = rng.normal()
        for scan in range(1 + rng.binomial(4, 0.05 * (1 + max(ill, 0)))):
            y = rng.random(18) < 1 / (1 + np.exp(-np.log(PREVALENCE / (1 - PREVALENCE)) - 0.9 * ill))
            for recon in range(rng.choice([1, 2, 2, 2, 2, 2, 3])):
                volumes.append(f"valid_{p + 1}_{'abcde'[scan]}_{recon + 1}")
                labels.append(y)
    return volumes, np.array(labels, np.int8)


def _fewest_volumes_first(volumes, target):
    """The greedy split in use elsewhere: patients with the fewest volumes first, until the target is full."""
    owned: dict[str, list[int]] = {}
    for i, volume in enumerate(volumes):
        owned.setdefault(names.patient_of(volume), []).append(i)
    val: list[int] = []
    for rows in sorted(owned.values(), key=len):
        val += rows if len(val) + len(rows) <= target else []
    return np.array(val)


@pytest.mark.parametrize("seed", [0, 1])
def test_split_keeps_prevalence_where_the_greedy_one_bends_it(seed):
    volumes, labels = _cohort(seed)
    ours = reports.split_patients(volumes, labels, {"val": 550, "test": len(volumes) - 550}, seed)["val"]
    greedy = _fewest_volumes_first(volumes, 550)

    def off(rows):
        return np.abs(labels[rows].mean(0) / labels.mean(0) - 1).max()

    def volumes_per_patient(rows):
        return len(rows) / len({names.patient_of(volumes[i]) for i in rows})

    assert abs(len(ours) - 550) <= 10
    assert off(ours) < 0.03 < 0.15 < off(greedy)
    assert volumes_per_patient(ours) == pytest.approx(len(volumes) / 1304, rel=0.02)
    assert volumes_per_patient(greedy) < 0.7 * len(volumes) / 1304


def test_patients_never_straddle_and_nothing_is_lost():
    volumes, labels = _cohort(2, patients=300)
    split = reports.split_patients(volumes, labels, {"train": 0.8, "val": 0.1, "test": 0.1}, seed=0)
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(len(volumes)))
    patients = [{names.patient_of(volumes[i]) for i in rows} for rows in split.values()]
    assert sum(map(len, patients)) == 300
    assert len(split["train"]) == pytest.approx(0.8 * len(volumes), rel=0.02)


def test_a_rare_finding_reaches_every_split():
    volumes, labels = [f"v_{i}_a_1" for i in range(100)], np.zeros((100, 1))
    labels[:5] = 1
    split = reports.split_patients(volumes, labels, {"train": 3, "val": 1, "test": 1}, seed=0)
    assert [int(labels[rows].sum()) for rows in split.values()] == [3, 1, 1]


def test_split_depends_on_the_seed_alone():
    volumes, labels = _cohort(3, patients=100)
    a, b, c = (
        reports.split_patients(volumes, labels, {"x": 1, "y": 1}, seed)["x"].tolist() for seed in (0, 0, 1)
    )
    assert a == b != c
    assert (
        reports.split_patients([f"{v}.nii.gz" for v in volumes], labels, {"x": 1, "y": 1}, 0)["x"].tolist()
        == a
    )


def test_split_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match="2 patients are too few"):
        reports.split_patients(
            ["v_1_a_1", "v_1_a_2", "v_2_a_1"], np.zeros((3, 2)), {"x": 1, "y": 1, "z": 1}, 0
        )
    with pytest.raises(ValueError, match="size above 0"):
        reports.split_patients(["a", "b"], np.zeros((2, 1)), {"x": 1, "y": 0}, 0)
    with pytest.raises(ValueError, match=r"got \(2,\) for 2 volumes"):
        reports.split_patients(["a", "b"], np.zeros(2), {"x": 1, "y": 1}, 0)
