"""Protocols by name: which findings they score, from which tables, and CT-CLIP's own metrics."""

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score

from medvl.base import files
from medvl.ct import protocols, reports
from medvl.ct.reports import FINDINGS


def _table(path, columns, labels, name="VolumeName"):
    rows = []
    for i, row in enumerate(labels):
        rows.append({name: f"tst{i}"} | dict(zip(columns, map(str, row), strict=True)))
    files.write_csv(path, rows, [name, *columns])
    return path


@pytest.fixture
def labels():
    return np.random.default_rng(0).integers(0, 2, (30, 18))


def test_findings_of_the_protocols():
    assert tuple(protocols.PROTOCOLS["ctrate18"]) == tuple(protocols.PROTOCOLS["ctclip"]) == FINDINGS
    assert len(FINDINGS) == 18
    assert set(FINDINGS) - set(protocols.PROTOCOLS["ctrate16"]) == {"Medical material", "Lymphadenopathy"}
    radchest = protocols.PROTOCOLS["radchest16"]
    assert len(protocols.PROTOCOLS["ctrate16"]) == len(radchest) == 16
    assert set(radchest) - set(FINDINGS) == {"Calcification"}
    assert set(FINDINGS) - set(radchest) == {
        "Arterial wall calcification",
        "Coronary artery wall calcification",
        "Mosaic attenuation pattern",
    }
    # Every part has prompts.
    parts = {part for members in radchest.values() for part in members}
    assert parts == set(FINDINGS) - {"Mosaic attenuation pattern"}
    assert all(reports.prompts_for(part) for part in parts)


@pytest.mark.parametrize("protocol", ["ctrate18", "ctrate16", "ctclip"])
def test_labels_are_the_columns_in_the_order_of_the_protocol(protocol, labels, tmp_path):
    order = np.random.default_rng(1).permutation(18)
    path = _table(tmp_path / "l.csv", [FINDINGS[i] for i in order], labels[:, order])
    volumes, findings, values = protocols.read_labels(path, protocol)
    assert volumes[:2] == ("tst0", "tst1")
    assert findings == tuple(protocols.PROTOCOLS[protocol])
    np.testing.assert_array_equal(values, labels[:, [FINDINGS.index(f) for f in findings]])


def test_radchest16_of_ct_rate_is_the_larger_of_the_two_calcifications(labels, tmp_path):
    path = _table(tmp_path / "l.csv", FINDINGS, labels)
    _, findings, values = protocols.read_labels(path, "radchest16")
    for j, finding in enumerate(findings):
        if finding == "Calcification":
            want = [max(row[1], row[4]) for row in labels]
        else:
            want = labels[:, FINDINGS.index(finding)]
        np.testing.assert_array_equal(values[:, j], want, err_msg=finding)


def test_a_table_with_the_merged_finding_needs_no_parts(labels, tmp_path):
    findings = tuple(protocols.PROTOCOLS["radchest16"])
    path = _table(tmp_path / "l.csv", findings, labels[:, :16])
    np.testing.assert_array_equal(protocols.read_labels(path, "radchest16")[2], labels[:, :16])


# Abnormalities of RAD-ChestCT that are one finding, written down once more.
COUNTS_AS = {
    "nodule": "Lung nodule",
    "nodulegr1cm": "Lung nodule",
    "opacity": "Lung opacity",
    "fibrosis": "Pulmonary fibrotic sequela",
    "hernia": "Hiatal hernia",
    "bronchial_wall_thickening": "Peribronchial thickening",
    "septal_thickening": "Interlobular septal thickening",
    "calcification": "Calcification",
    "pacemaker_or_defib": "Medical material",
    "stent": "Medical material",
    "pleural_effusion": "Pleural effusion",
    "pericardial_effusion": "Pericardial effusion",
    "cardiomegaly": "Cardiomegaly",
    "lymphadenopathy": "Lymphadenopathy",
    "emphysema": "Emphysema",
    "atelectasis": "Atelectasis",
    "consolidation": "Consolidation",
    "bronchiectasis": "Bronchiectasis",
}
NOT_SCORED = ("mass", "pleural_thickening", "bronchiolectasis", "scattered_calc", "pericardial_thickening")


def test_the_label_table_of_radchest_is_merged_over_locations(tmp_path):
    columns = [f"{a}*{place}" for a in (*COUNTS_AS, *NOT_SCORED) for place in ("left_upper", "heart")]
    cells = np.random.default_rng(0).random((40, len(columns))) < 0.1
    path = _table(tmp_path / "l.csv", columns, cells.astype(int), "NoteAcc_DEID")
    volumes, findings, values = protocols.read_labels(path, "radchest16")
    assert volumes[0] == "tst0"
    want = np.zeros((40, 16), int)
    for row in range(40):
        for j, column in enumerate(columns):
            finding = COUNTS_AS.get(column.split("*")[0])
            if finding and cells[row, j]:
                want[row, findings.index(finding)] = 1
    np.testing.assert_array_equal(values, want)
    assert 0 < want.mean() < 1


def test_a_cell_of_radchest_that_is_no_label_is_refused(tmp_path):
    columns = [f"{a}*lung" for a in COUNTS_AS]
    cells = np.zeros((3, len(columns)), int).astype(str)
    cells[1, 2] = "yes"
    path = _table(tmp_path / "l.csv", columns, cells, "NoteAcc_DEID")
    with pytest.raises(ValueError, match=r"must be 0 or 1, found 'yes' in column 'Lung opacity', row 3"):
        protocols.read_labels(path, "radchest16")


@pytest.mark.parametrize(
    ("protocol", "left_out", "needs"),
    [
        ("ctrate18", "Mosaic attenuation pattern", "Mosaic attenuation pattern"),
        ("ctclip", "Lymphadenopathy", "Lymphadenopathy"),
        ("radchest16", "Coronary artery wall calcification", "Coronary artery wall calcification"),
    ],
)
def test_17_columns_for_18_findings_is_one_sentence(protocol, left_out, needs, labels, tmp_path):
    columns = [f for f in FINDINGS if f != left_out]
    path = _table(tmp_path / "l.csv", columns, labels[:, :17])
    with pytest.raises(ValueError, match="needs the columns") as e:
        protocols.read_labels(path, protocol)
    assert f"protocol {protocol} of " in str(e.value)
    assert f"needs the columns {needs}; found 18: VolumeName, Medical material" in str(e.value)
    # A protocol that does not score it takes the table.
    if left_out in ("Mosaic attenuation pattern", "Lymphadenopathy"):
        protocols.read_labels(path, "radchest16" if protocol == "ctrate18" else "ctrate16")


def test_a_table_without_names_is_refused(labels, tmp_path):
    path = _table(tmp_path / "l.csv", FINDINGS, labels, "volume")
    with pytest.raises(ValueError, match="needs the columns VolumeName; found 19: volume"):
        protocols.read_labels(path, "ctrate18")


def _published_rule(prob, label):
    """CT-CLIP's rule, written down naively: (threshold, F1, accuracy, precision)."""
    best, chosen = 10000, 0
    for threshold in np.linspace(0, 1, 100):
        (tn, fp), (fn, tp) = confusion_matrix(label, prob > threshold, labels=[0, 1])
        distance = math.sqrt((1 - tp / (tp + fn)) ** 2 + (fp / (fp + tn)) ** 2)
        if distance <= best:
            best, chosen = distance, threshold
    called = prob > chosen
    return (
        chosen,
        f1_score(label, called, average="weighted"),
        accuracy_score(label, called),
        precision_score(label, called, zero_division=np.nan),
    )


@pytest.mark.parametrize("kind", ["random", "tied", "on the grid", "compressed"])
def test_ctclip_is_its_published_rule(kind):
    rng = np.random.default_rng(5)
    labels = (rng.random((200, 18)) < 0.3).astype(int)
    scores = np.clip(rng.normal(0.45 + 0.1 * labels, 0.2), 0, 1)
    if kind == "tied":
        scores = scores.round(1)
    elif kind == "on the grid":
        scores = np.linspace(0, 1, 100)[(scores * 99).astype(int)]
    elif kind == "compressed":
        scores = 0.5 + scores / 200
    names = [f"test_{i // 2}_a_{i % 2}" for i in range(200)]
    rows = protocols.evaluate_ctclip(
        scores, labels, names, FINDINGS, experiment="x", split="test", n_bootstrap=4
    )
    value = {(r.what, r.subject): r.value for r in rows}
    assert {r.what for r in rows} == {"ctclip_f1_weighted", "ctclip_accuracy", "ctclip_precision"}
    naive = [_published_rule(scores[:, j], labels[:, j]) for j in range(18)]
    np.testing.assert_array_equal(protocols.ctclip_thresholds(scores, labels), [row[0] for row in naive])
    for place, metric in enumerate(("f1_weighted", "accuracy", "precision"), 1):
        ours = [value[f"ctclip_{metric}", f] for f in FINDINGS]
        np.testing.assert_allclose(ours, [row[place] for row in naive], rtol=0, atol=1e-12, err_msg=metric)
        mean = np.nanmean(ours) if not np.isnan(ours).all() else np.nan
        np.testing.assert_allclose(value[f"ctclip_{metric}", "mean"], mean, rtol=1e-12)


def test_ctclip_has_no_threshold_for_a_finding_of_one_class():
    thresholds = protocols.ctclip_thresholds([[0.2, 0.2], [0.7, 0.7]], [[0, 0], [1, 0]])
    assert 0.2 <= thresholds[0] < 0.7
    assert math.isnan(thresholds[1])
