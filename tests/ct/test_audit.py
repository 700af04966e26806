"""Audits of drawn trees in the two layouts of CT-RATE: planted faults are found, and nothing else."""

import gzip
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medvl.base import files
from medvl.commands import audit as audit_commands
from medvl.ct import audit, ingest, reports
from medvl.ct.preprocess import CtConfig

SHAPE = (40, 36, 9)
AFFINE = np.diag([-0.7, -0.7, 1.5, 1.0])
COLUMNS = [
    "VolumeName",
    "RescaleSlope",
    "RescaleIntercept",
    "XYSpacing",
    "ZSpacing",
    "ImageOrientationPatient",
]


def _hu(seed):
    """A body with two lungs in air, HU [x, y, z]."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    hu = np.where(x**2 + y**2 < 0.8, 40.0, -1000.0)
    hu[(abs(abs(x) - 0.4) < 0.2) & (abs(y) < 0.5)] = -850
    return hu + np.random.default_rng(seed).normal(0, 25, SHAPE)


def _write(path, values, affine=AFFINE, dtype=np.int16):
    """A scan as CT-RATE v2 has them; without an affine its header is blank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.round(values).astype(dtype), affine, dtype=dtype)
    nib.save(image, path)


def _write_v1(path, seed, intercept=-1024):
    values = np.clip(_hu(seed) - intercept, 0, None)
    # A header without any affine, or with the identity that programs write.
    affine = np.eye(4) if seed % 3 else None
    _write(path, values, affine, np.float32 if seed % 2 else np.int16)


def _path(root, name):
    """train_1_a_2 -> ROOT/train_1/train_1_a/train_1_a_2.nii.gz"""
    patient, scan = name.rsplit("_", 2)[0], name.rsplit("_", 1)[0]
    return root / patient / scan / f"{name}.nii.gz"


def _draw_tree(folder, release, count):
    """A tree of volumes with its tables; returns {name: path}."""
    split = {"v1": "train", "v2": "train_fixed"}[release]
    paths, rows = {}, []
    for i in range(count):
        name = f"train_{i // 4 + 1}_{'ab'[i // 2 % 2]}_{i % 2 + 1}"
        paths[name] = _path(folder / "dataset" / split, name)
        intercept = (-1024, -8192)[i % 3 == 0]
        if release == "v1":
            _write_v1(paths[name], i, intercept)
        else:
            _write(paths[name], _hu(i))
        rows.append((f"{name}.nii.gz", 1, intercept, "[0.7, 0.7]", 1.5, "[1, 0, 0, 0, 1, 0]"))
    _tables(folder, rows)
    return paths


def _tables(folder, rows):
    files.write_csv(folder / "metadata.csv", [dict(zip(COLUMNS, r, strict=True)) for r in rows], COLUMNS)
    texts = [{"VolumeName": r[0], "Findings_EN": "Clear.", "Impressions_EN": ""} for r in rows]
    files.write_csv(folder / "reports.csv", texts, texts[0])
    labels = [{"VolumeName": r[0]} | dict.fromkeys(reports.FINDINGS, 0) for r in rows]
    files.write_csv(folder / "labels.csv", labels, labels[0])


def _edit_table(path, name, **changes):
    """Change the row of a volume, or drop it."""
    rows = files.read_csv(path)
    kept = [r | (changes if r["VolumeName"] == f"{name}.nii.gz" else {}) for r in rows]
    if not changes:
        kept = [r for r in rows if r["VolumeName"] != f"{name}.nii.gz"]
    files.write_csv(path, kept, rows[0])


def _edit_header(path, at, value):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[at : at + len(value)] = value
    path.write_bytes(gzip.compress(bytes(raw), 1))


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])


def _shear(path):
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.3
    _write(path, _hu(900), sheared)


def _float32(*values):
    return np.array(values, "<f4").tobytes()


def _no_row(folder, table):
    return lambda path: _edit_table(folder / table, path.name.removesuffix(".nii.gz"))


def _faults_of_v1(folder, paths):
    """{fault: (what is done to a volume, its sentence)}"""
    return {
        "no metadata": (_no_row(folder, "metadata.csv"), "the metadata table has no row for it"),
        "no slice spacing": (
            lambda p: _edit_table(folder / "metadata.csv", p.name[:-7], ZSpacing="nan"),
            "must have a number in 'ZSpacing'",
        ),
        "NaN affine": (
            lambda p: _edit_header(p, 254, np.int16(1).tobytes() + bytes(24) + _float32(*[np.nan] * 12)),
            "must have a finite affine",
        ),
        "cut": (_cut, "perhaps truncated|is truncated"),
        "empty": (lambda p: p.write_bytes(b""), "is empty"),
        "text": (lambda p: p.write_text("404: not found " * 40), "is not NIfTI"),
        "a mask": (lambda p: _write(p, _hu(902) > -200, None, np.uint8), "needs|not a CT|soft tissue"),
        "one slice": (
            lambda p: nib.save(nib.Nifti1Image(np.zeros((40, 36, 1), np.int16), None), p),
            "at least 2 voxels",
        ),
        "a copy": (lambda p: shutil.copy(paths["train_1_a_1"], p), "its first slice is that of row"),
        "a header of v2": (
            lambda p: _write(p, np.clip(_hu(903) + 1024, 0, None)),
            "its header is placed, most are blank",
        ),
    }


def _faults_of_v2(folder, paths):
    return {
        "no report": (_no_row(folder, "reports.csv"), "it has no report"),
        "no labels": (_no_row(folder, "labels.csv"), "it has no labels"),
        "a header of v1": (lambda p: _write_v1(p, 904), "its header is blank, most are placed"),
        "a tilted gantry": (_shear, "its affine is sheared"),
        "metres": (lambda p: _edit_header(p, 123, b"\1"), "are its unit .* right"),
        "a contradiction": (lambda p: _edit_header(p, 80, _float32(3.0)), "its header contradicts itself"),
        "colours": (lambda p: _edit_header(p, 70, np.array([128, 24], "<i2").tobytes()), "found colours"),
        "DICOM": (lambda p: p.write_bytes(bytes(128) + b"DICM" + bytes(900)), "is a damaged DICOM file"),
        "not a number": (
            lambda p: _write(p, np.full(SHAPE, np.nan), dtype=np.float32),
            "not finite numbers",
        ),
        "a name that is there twice": (
            lambda p: _write(p.parents[3] / "again" / "train_1_a_1.nii.gz", _hu(905)),
            "its name is that of row",
        ),
    }


@pytest.mark.parametrize("release", ["v1", "v2"])
def test_planted_faults_are_found_and_no_others(tmp_path, capsys, release):
    paths = _draw_tree(tmp_path, release, 150)
    faults = (_faults_of_v1 if release == "v1" else _faults_of_v2)(tmp_path, paths)
    assert len(faults) == 10
    expected = {}
    for i, (plant, sentence) in enumerate(faults.values()):
        path = [*paths.values()][7 + 9 * i]
        plant(path)
        expected[path.name.removesuffix(".nii.gz")] = sentence
    if release == "v2":
        expected["train_1_a_1"] = expected.pop([*expected][-1])  # this fault was planted beside its volume
    (tmp_path / "no_chest.txt").write_text(f"{[*paths][140]}.nii.gz\n")

    tables = [str(tmp_path / f"{name}.csv") for name in ("metadata", "reports", "labels")]
    source, no_chest = str(tmp_path / "dataset"), str(tmp_path / "no_chest.txt")
    audit_commands.audit_tree(source, str(tmp_path / "out"), *tables, no_chest, 2)
    rows = files.read_csv(tmp_path / "out" / "audit.csv")
    assert tuple(rows[0]) == audit.COLUMNS
    found = {row["name"]: row["faults"] for row in rows if row["faults"]}
    for name in set(found) & set(expected):
        assert re.search(expected[name], found[name]), (name, found[name])
    assert found.keys() == expected.keys()
    assert {row["release"] for row in rows if row["header"]} == {release}
    assert [row["name"] for row in rows if row["no_chest"] == "yes"] == [[*paths][140]]
    good = next(row for row in rows if not row["faults"])
    assert (good["shape"], good["spacing_mm"], good["patient"]) == (
        "40 x 36 x 9",
        "0.7 x 0.7 x 1.5",
        "train_1",
    )
    assert good["hu"] == {"v1": "metadata", "v2": "stored"}[release]
    # The page names no file; the command is the one that reads this release.
    page = (tmp_path / "out" / "report.html").read_text()
    assert "train_1_a_1" not in page.replace(source, "")
    printed = capsys.readouterr().out
    print(f"{len(rows)} scans, {len(expected)} faults planted, {len(found)} found")  # shown by pytest -rP
    for name, faults in found.items():
        print(f"  {name}: {faults}")
    assert ("--set spacing_from=metadata --set hu=metadata" in printed) == (release == "v1")


def test_what_is_refused_is_what_preprocess_refuses(tmp_path):
    paths = _draw_tree(tmp_path, "v1", 40)
    faults = _faults_of_v1(tmp_path, paths)
    for path, (plant, _) in zip([*paths.values()][3:], faults.values(), strict=False):
        plant(path)
    metadata_csv = tmp_path / "metadata.csv"
    cfg = CtConfig(size=(8, 8, 8), spacing_from="metadata")
    summary = ingest.preprocess_folder(tmp_path / "dataset", tmp_path / "s.h5", cfg, metadata_csv, 2)
    metadata = {r["VolumeName"][:-7]: r for r in files.read_csv(metadata_csv)}
    rows = audit.audit_scans(ingest.list_scans(tmp_path / "dataset"), metadata, {"metadata": metadata})
    refused = {row["name"]: row["refused"] for row in rows if row["refused"]}
    # A cut file is refused when its end is reached; the audit calls it "perhaps truncated".
    cut = [row["name"] for row in rows if "perhaps truncated" in row["faults"]]
    assert {*refused, *cut} == {*summary.rejected}
    for name, reason in refused.items():
        if "no row" not in reason:
            assert summary.rejected[name].endswith(reason)


def test_preprocess_refuses_a_tree_of_both_releases_before_work(tmp_path):
    v1, v2 = _draw_tree(tmp_path / "a", "v1", 3), _draw_tree(tmp_path / "a", "v2", 2)
    by_folder = r"found 3 volumes of v1 .*train/train_1/.* and 2 of v2 .*train_fixed/.*store of its own"
    with pytest.raises(ValueError, match=by_folder):
        ingest.preprocess_folder(tmp_path / "a", tmp_path / "s.h5")
    # The same scans in one folder, by their headers.
    (tmp_path / "b").mkdir()
    for path in v2.values():
        shutil.copy(path, tmp_path / "b")
    shutil.copy(v1["train_1_b_1"], tmp_path / "b")
    with pytest.raises(ValueError, match=r"found 1 volumes of v1 .*b/train_1_b_1.* and 2 of v2"):
        ingest.preprocess_folder(tmp_path / "b", tmp_path / "s.h5")
    assert not [*tmp_path.glob("s.*")]
    # A few strays are left to the checks of each scan, and scans that are not CT-RATE's may differ.
    audit.check_one_release("", [v1["train_1_b_1"], *[tmp_path / "b" / "train_1_a_1.nii.gz"] * 30])
    for path in [*(tmp_path / "b").iterdir()]:
        path.rename(tmp_path / "b" / path.name.replace("_", "-"))
    audit.check_one_release("", [*(tmp_path / "b").iterdir()])


def test_unusable_tables_end_in_one_sentence(tmp_path):
    _draw_tree(tmp_path, "v2", 3)
    source, out, metadata = str(tmp_path / "dataset"), str(tmp_path / "out"), tmp_path / "metadata.csv"
    # Metadata of other volumes.
    metadata.write_text(metadata.read_text().replace("train_", "valid_"))
    with pytest.raises(ValueError, match=r"has a row for none of the 3 scans; it names 'valid_1_a_1'"):
        audit_commands.audit_tree(source, out, str(metadata), "", "", "", 1)
    assert not Path(out).exists()
    # 17 columns for the 18 findings of a protocol.
    labels = files.read_csv(tmp_path / "labels.csv")
    for row in labels:
        del row["Emphysema"]
    files.write_csv(tmp_path / "17.csv", labels, labels[0])
    with pytest.raises(ValueError, match="must have the column 'Emphysema', found 'VolumeName', 'Medical"):
        reports.read_labels(tmp_path / "17.csv", reports.FINDINGS)


def test_series_of_dicom_are_audited_too(tmp_path):
    series = Path(__file__).parents[2] / "../shared/data/ct/dicom/cip_ct64_series"
    if not series.exists():
        pytest.skip("no shared data")
    for i, path in enumerate(sorted(series.iterdir())):
        if i < 12:
            (tmp_path / "dicom" / "a").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "dicom" / "a" / path.name)
        if i == 0 or i == 12:
            (tmp_path / "dicom" / "b").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "dicom" / "b" / path.name)
    _write(tmp_path / "dicom" / "flat.nii.gz", _hu(0)[:, :, :2], np.diag([-0.7, -0.7, 0.7, 1.0]))
    a, b, flat = audit.audit_scans(ingest.list_scans(tmp_path / "dicom"), {}, {})
    assert (a["name"], a["shape"], a["header"], a["hu"], a["faults"]) == (
        "a",
        "64 x 64 x 12",
        "placed",
        "stored",
        "",
    )
    assert b["name"] == "b"
    assert str(tmp_path) not in b["refused"] + b["faults"]
    assert flat["refused"].startswith("is smaller than one output voxel")
