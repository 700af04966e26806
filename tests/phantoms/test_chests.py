import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from attrs import evolve
from scipy.ndimage import map_coordinates
from sklearn.metrics import roc_auc_score

from medvl.base import files
from medvl.ct import names
from medvl.phantoms import chests
from medvl.phantoms.canvas import Canvas, cover_ellipsoid, smooth_noise, splat
from medvl.phantoms.chest_case import (
    FINDINGS,
    ChestCase,
    Lesion,
    PhantomConfig,
    aorta_path,
    draw_chest_case,
    heart_shape,
)
from medvl.phantoms.chest_report import _TERMS, write_chest_report
from medvl.phantoms.chest_voxels import draw_view, render

CFG = PhantomConfig(patients=400, seed=3, valid=20, test=30)
TINY = PhantomConfig(patients=7, seed=5, valid=1, test=2, second_recon=0.5, columns=(32, 40), slices=(12, 14))


def _canvas(shape=(30, 40, 44), step=(7.0, 4.0, 4.5)) -> Canvas:
    z, y, x = (np.arange(n, dtype=np.float32) * s - (n - 1) * s / 2 for n, s in zip(shape, step, strict=True))
    zeros = np.zeros(shape, np.float32)
    return Canvas(
        hu=zeros,
        lung=zeros.copy(),
        z=z[:, None, None],
        y=y[None, :, None],
        x=x[None, None, :],
        step=step,
        rough=zeros,
    )


def _case(*findings: str, seed: int = 0) -> ChestCase:
    """The first case with these findings, without contrast medium, freed of its other findings."""
    gen = np.random.default_rng(seed)
    while True:
        case = draw_chest_case(CFG, gen)
        enlarged = "Cardiomegaly" in case.findings and "Cardiomegaly" not in findings
        if not enlarged and set(findings) <= case.findings.keys() and case.body.blood_hu < 60:
            return evolve(case, findings={name: case.findings[name] for name in findings})


def _ras(volume) -> tuple[np.ndarray, np.ndarray]:
    image = nib.as_closest_canonical(nib.Nifti1Image(volume.hu, volume.affine))
    return np.asarray(image.dataobj).astype(np.float32), image.affine


def _at(volume, points) -> np.ndarray:
    """HU of the voxels nearest to points [n, 3] in mm."""
    index = np.rint(
        np.c_[np.atleast_2d(points), np.ones(len(np.atleast_2d(points)))] @ np.linalg.inv(volume.affine).T
    )[:, :3].astype(int)
    return volume.hu[tuple(index.T)]


def _pair(case: ChestCase, **without) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(with, without the findings, voxel size in mm): the same view and the same noise."""
    bare = evolve(case, findings={}, **without)
    (a, affine), (b, _) = (_ras(render(CFG, c, np.random.default_rng(1))) for c in (case, bare))
    return a, b, np.abs(np.diag(affine)[:3])


@pytest.mark.parametrize(
    ("radii", "tilt"),
    [((3, 3, 3), (0, 0)), ((6, 5, 9), (0, 0)), ((12, 12, 12), (0, 0)), ((30, 24, 4), (0.2, -0.3))],
)
def test_cover_is_true_to_size(radii, tilt):
    """The shares add up to the ellipsoid's volume, and each is what 20 000 random points in its voxel say."""
    c, at = _canvas(), (3.1, -8.2, 5.3)
    box, share = cover_ellipsoid(c, at, radii, tilt)
    assert share.sum() * np.prod(c.step) == pytest.approx(4 / 3 * np.pi * np.prod(radii), rel=0.06)
    k = np.unravel_index(np.abs(share - 0.5).argmin(), share.shape)
    centre = [axis.ravel()[s][i] for axis, s, i in zip((c.x, c.y, c.z), box[::-1], k[::-1], strict=True)]
    d = centre + (np.random.default_rng(0).random((20000, 3)) - 0.5) * c.step[::-1] - at
    d[:, 2] -= tilt[0] * d[:, 0] + tilt[1] * d[:, 1]
    assert share[k] == pytest.approx(((d / radii) ** 2).sum(1).__lt__(1).mean(), abs=0.08)


def test_cover_of_a_large_ellipsoid_and_at_the_edge():
    c = _canvas()
    _, share = cover_ellipsoid(c, (0, 0, 0), (50, 40, 42))
    assert share.sum() * np.prod(c.step) == pytest.approx(4 / 3 * np.pi * 50 * 40 * 42, rel=0.03)
    assert cover_ellipsoid(c, (0, 0, 500), (5, 5, 5))[1].size == 0


def test_splat_keeps_volume_and_centre():
    c, gen = _canvas(), np.random.default_rng(0)
    points, volume = gen.uniform(-50, 50, (200, 3)), gen.uniform(1, 30, 200)
    share = splat(c, points, volume) * np.prod(c.step)
    assert share.sum() == pytest.approx(volume.sum(), rel=1e-5)
    for axis, k in ((c.x, 0), (c.y, 1), (c.z, 2)):
        assert (share * axis).sum() / share.sum() == pytest.approx(
            (points[:, k] * volume).sum() / volume.sum(), abs=1e-3
        )


def test_smooth_noise_is_linear_interpolation_fixed_in_the_patient():
    gen, places = (
        np.random.default_rng(0),
        tuple(np.random.default_rng(k).uniform(-150, 150, 7).astype(np.float32) for k in range(3)),
    )
    found = smooth_noise(places, 20, np.random.default_rng(4))
    grid = np.random.default_rng(4).standard_normal(
        [int(n / 20) + 2 for n in (380, 480, 480)], dtype=np.float32
    )
    at = np.stack(
        np.meshgrid(*((p + o) / 20 for p, o in zip(places, (190, 240, 240), strict=True)), indexing="ij")
    )
    np.testing.assert_allclose(found, map_coordinates(grid, at, order=1), atol=1e-4)
    some = tuple(np.sort(gen.choice(7, 3, replace=False)) for _ in range(3))
    part = smooth_noise(tuple(p[i] for p, i in zip(places, some, strict=True)), 20, np.random.default_rng(4))
    np.testing.assert_allclose(part, found[np.ix_(*some)], atol=1e-5)


def test_a_volume_is_a_function_of_config_and_name():
    a, b, other = (chests.draw_volume(CFG, n) for n in ("train_1_a_1", "train_1_a_1", "train_2_a_1"))
    assert np.array_equal(a.hu, b.hu)
    assert np.array_equal(a.affine, b.affine)
    assert a.hu.shape != other.hu.shape or not np.array_equal(a.hu, other.hu)
    assert chests.draw_volume_case(CFG, "train_1_a_1") != chests.draw_volume_case(
        evolve(CFG, seed=4), "train_1_a_1"
    )


def test_reconstructions_show_one_patient_with_another_view():
    assert chests.draw_volume_case(CFG, "train_8_a_1") == chests.draw_volume_case(CFG, "train_8_a_2")
    assert chests.draw_volume_report(CFG, "train_8_a_1") == chests.draw_volume_report(CFG, "train_8_a_2")
    one, two, other = (chests.draw_volume(CFG, n) for n in ("train_8_a_1", "train_8_a_2", "train_9_a_1"))
    assert one.affine.tolist() != two.affine.tolist()
    points = np.random.default_rng(0).uniform((-90, -70, -120), (90, 70, 100), (6000, 3))
    a, b, c = (_at(v, points).astype(float) for v in (one, two, other))
    assert np.corrcoef(a, b)[0, 1] > 0.9
    assert np.corrcoef(a, b)[0, 1] > np.corrcoef(a, c)[0, 1] + 0.1


def test_tissues_have_their_hounsfield_units():
    for seed in range(4):
        case = _case(seed=seed)
        v, b = render(CFG, case, np.random.default_rng(seed)), case.body

        near = np.random.default_rng(0).uniform(-15, 15, (900, 3))
        liver = _at(v, near + np.array([0.6 * b.chest_half_width, 0, b.dome_right - 45]))
        assert np.mean(_at(v, near + heart_shape(b)[0])) == pytest.approx(b.blood_hu - 4, abs=6)
        assert 40 < np.mean(liver) < 75
        assert 5 < np.std(liver) < 30  # noise
        lung = _at(
            v,
            np.random.default_rng(0).uniform(
                (-0.8 * b.chest_half_width, -30, 0), (-0.45 * b.chest_half_width, 30, 60), (2000, 3)
            ),
        )
        assert -920 < np.median(lung) < -780
        assert np.mean(_ras(v)[0][:8, -8:]) == pytest.approx(
            -1000, abs=8
        )  # air in front of the right shoulder


@pytest.mark.parametrize(
    ("finding", "least", "most", "low", "high"),
    [
        ("Pericardial effusion", 5e-4, 0.04, -100, 60),
        ("Hiatal hernia", 3e-4, 0.01, -920, 70),
        ("Emphysema", 1e-3, 0.1, -1000, -900),
        ("Atelectasis", 1e-4, 0.01, -780, 60),
        ("Lung nodule", 5e-6, 2e-3, -800, 80),
        ("Lung opacity", 5e-4, 0.05, -800, -500),
        ("Pleural effusion", 1e-3, 0.1, -60, 50),
        ("Consolidation", 5e-4, 0.03, -700, 60),
        ("Arterial wall calcification", 3e-6, 1e-3, -400, 800),
        ("Coronary artery wall calcification", 3e-6, 1e-3, -400, 800),
    ],
)
def test_a_finding_changes_voxels_as_it_should(finding, least, most, low, high):
    """Against the same patient without it: its sign, the share of the volume it touches, the median HU there."""
    with_it, without, _ = _pair(_case(finding, seed=2))
    change = with_it - without
    there = np.abs(change) > (15 if finding == "Pericardial effusion" else 40)
    assert least < there.mean() < most
    assert low < np.median(with_it[there]) < high
    if finding == "Emphysema":
        assert change.max() <= 0
    elif finding not in ("Hiatal hernia", "Pericardial effusion"):  # these displace denser tissue too
        assert change.min() >= -1
    if "calcification" in finding:
        assert change.max() > 50


def test_cardiomegaly_widens_the_heart():
    small, large = _case(seed=3), _case("Cardiomegaly", seed=3)
    assert (
        2 * heart_shape(small.body)[1][0]
        < 0.5 * 2 * small.body.chest_half_width
        < 0.5 * 2 * large.body.chest_half_width / 0.5
    )
    assert heart_shape(large.body)[1][0] > 0.52 * large.body.chest_half_width
    with_it, without, _ = _pair(large, body=evolve(large.body, heart_ratio=0.43))
    assert np.clip(with_it - without, 0, None)[with_it > -50].sum() > 1e5  # lung became heart


@pytest.mark.parametrize("size", [6.0, 12.0, 25.0])
def test_a_nodule_weighs_what_its_diameter_says(size):
    case, lesion = _case(), Lesion(side="right", zone="middle", size_mm=size, at=(62.0, 5.0, 10.0), hu=40.0)
    body = evolve(case.body, mediastinum=18.0, chest_half_width=130.0, chest_half_depth=95.0)
    case = evolve(case, findings={"Lung nodule": (lesion,)}, body=body)
    with_it, without, step = _pair(case)
    lung = np.median(without[(with_it - without) > 20])
    volume = (with_it - without).sum() * step.prod() / (lesion.hu - lung)
    assert volume == pytest.approx(np.pi / 6 * size**3, rel=0.25)


@pytest.mark.parametrize("to", [(-8.0, -50.0, 40.0), (6.0, -42.0, 22.0)])
def test_a_plaque_weighs_what_its_length_and_thickness_say(to):
    at = (-8.0, -50.0, 20.0)
    length = float(np.linalg.norm(np.subtract(to, at)))
    case, lesion = _case(), Lesion(size_mm=length, at=at, to=to, thick_mm=5.0, hu=860.0)
    with_it, without, step = _pair(evolve(case, findings={"Arterial wall calcification": (lesion,)}))
    change = with_it - without
    volume = change.sum() * step.prod() / (lesion.hu - 60)
    assert volume == pytest.approx(np.pi * 2.5**2 * (length + 4 / 3 * 2.5), rel=0.1)
    far = np.linalg.norm(
        np.argwhere(change > 40) * step - np.argwhere(change == change.max())[0] * step, axis=1
    )
    assert far.max() > 0.5 * length  # it is a rod, not a ball


def test_plaques_lie_along_their_vessel():
    """Ends of aortic plaques are as far from the aorta's centre line as its wall, those of coronary plaques on the heart's surface."""
    for seed in range(5):
        case = _case("Arterial wall calcification", "Coronary artery wall calcification", seed=seed)
        path, b = aorta_path(case.body), case.body
        line = np.concatenate([np.linspace(p, q, 60) for p, q in pairwise(path)])
        for plaque in case.findings["Arterial wall calcification"]:
            middle = (np.array(plaque.at) + plaque.to) / 2
            assert np.linalg.norm(line - middle, axis=1).min() < b.aorta_radius + 1
            assert plaque.size_mm == pytest.approx(np.linalg.norm(np.subtract(plaque.to, plaque.at)), abs=0.1)
        centre, radii = heart_shape(b)
        for plaque in case.findings["Coronary artery wall calcification"]:
            for end in (plaque.at, plaque.to):
                assert np.linalg.norm((np.array(end) - centre) / (radii - 2.5)) == pytest.approx(1, abs=0.01)


def test_fluid_lies_in_the_costophrenic_angle_of_its_side():
    case = _case()
    lesion = Lesion(side="left", zone="lower", size_mm=40.0, hu=8.0)
    with_it, without, _ = _pair(evolve(case, findings={"Pleural effusion": (lesion,)}))
    x, y, z = np.nonzero(with_it - without > 300)
    n = with_it.shape
    assert (x < n[0] / 2).mean() > 0.99  # x runs to the right
    assert np.median(y) < 0.45 * n[1]
    assert np.median(z) < 0.5 * n[2]


@pytest.fixture(scope="module")
def cases() -> list[ChestCase]:
    return [chests.draw_volume_case(CFG, f"train_{i}_a_1") for i in range(1000)]


def test_prevalence_and_correlation_are_like_life(cases):
    labels = np.array([list(c.labels.values()) for c in cases])
    assert (labels.mean(0) > 0.13).all()
    assert (labels.mean(0) < 0.45).all()
    rho = np.corrcoef(labels.T)[~np.eye(len(FINDINGS), dtype=bool)]
    pair = np.corrcoef(labels.T)[
        FINDINGS.index("Arterial wall calcification"), FINDINGS.index("Coronary artery wall calcification")
    ]
    assert 0.1 < pair < 0.6
    assert rho.max() < 0.6
    assert 0.02 < (labels.sum(1) == 0).mean() < 0.25


def test_the_view_says_nothing_of_the_findings(cases):
    views = [draw_view(CFG, chests._generator(CFG.seed, f"train_{i}_a_1")) for i in range(len(cases))]
    labels = np.array([list(c.labels.values()) for c in cases])
    table = np.array(
        [
            [*v.shape[:2], *v.step[:2], v.noise, v.kernel == "sharp", v.axes == "LPS", *v.origin]
            for v in views
        ],
        float,
    )
    areas = np.array([[roc_auc_score(y, x) for x in table.T] for y in labels.T])
    assert np.abs(areas - 0.5).max() < 0.08  # 3.5 standard errors of a rare finding's area at n = 1000
    assert np.abs(areas - 0.5).mean() < 0.025


def test_reports_say_what_the_labels_say(cases):
    told = 0
    for i, case in enumerate(cases[:200]):
        report = write_chest_report(case, np.random.default_rng(i))
        for name in FINDINGS:
            terms = [t for t in _TERMS[name]]
            sentences = [s for s in report["Findings_EN"].lower().split(". ") if any(t in s for t in terms)]
            impressed = any(t in report["Impressions_EN"].lower() for t in terms)
            denied = [any(w in s for w in ("no ", "not ", "without ")) for s in sentences]
            assert impressed == (name in case.findings), (name, report)
            if name in case.findings:
                assert sentences, (name, report)
                assert not any(denied), (name, report)
            else:
                told += len(sentences)
                assert all(denied), (name, report)
        assert "{" not in str(list(report.values()))
        assert not case.findings or "abnormality" not in report["Impressions_EN"]
    assert 0.4 < told / (200 * len(FINDINGS) - sum(len(c.findings) for c in cases[:200])) < 0.6


def test_reports_give_side_and_size():
    lesion = Lesion(side="left", zone="upper", size_mm=17.2, at=(-60, 0, 60), hu=30)
    case = evolve(_case(), findings={"Lung nodule": (lesion,)})
    text = " ".join(write_chest_report(case, np.random.default_rng(i))["Findings_EN"] for i in range(40))
    assert "17 mm" in text
    assert "left" in text
    assert "right" not in text
    assert len({write_chest_report(case, np.random.default_rng(i))["Findings_EN"] for i in range(40)}) > 30


def test_draw_writes_the_layout_of_ct_rate(tmp_path):
    counts = chests.draw_chests(TINY, tmp_path, workers=1)
    assert counts == {s: len(list(chests.volume_names(TINY, s))) for s in chests.SPLITS}
    assert {names.patient_of(n) for n in chests.volume_names(TINY, "test")} == {"test_1", "test_2"}
    intercepts = set()
    for split in chests.SPLITS:
        volumes = list(chests.volume_names(TINY, split))
        tables = {
            "reports": files.read_csv(tmp_path / f"{split}_reports.csv", chests.REPORT_COLUMNS),
            "labels": files.read_csv(tmp_path / f"{split}_labels.csv", FINDINGS),
            "metadata": files.read_csv(tmp_path / f"{split}_metadata.csv", chests.METADATA_COLUMNS),
        }
        for rows in tables.values():
            assert [r["VolumeName"] for r in rows] == [f"{v}.nii.gz" for v in volumes]
        for i, v in enumerate(volumes):
            image, drawn = nib.load(tmp_path / split / f"{v}.nii.gz"), chests.draw_volume(TINY, v)
            assert np.array_equal(np.asarray(image.dataobj), drawn.hu)
            np.testing.assert_allclose(image.affine, drawn.affine, atol=1e-4)
            intercepts.add(float(image.dataobj.inter))
            ras, affine = _ras(drawn)
            row = tables["metadata"][i]
            assert (int(row["Columns"]), int(row["Rows"]), int(row["NumberofSlices"])) == ras.shape
            assert json.loads(row["XYSpacing"]) == pytest.approx([affine[0, 0], affine[1, 1]], abs=1e-4)
            assert float(row["ZSpacing"]) == pytest.approx(affine[2, 2], abs=1e-4)
            assert {k: int(tables["labels"][i][k]) for k in FINDINGS} == chests.draw_volume_case(
                TINY, v
            ).labels
            assert tables["reports"][i] == {"VolumeName": f"{v}.nii.gz"} | chests.draw_volume_report(TINY, v)
    assert intercepts == {0.0, -1024.0}


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    chests.draw_chests(TINY, tmp_path / "one", workers=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()}
    for name in ("phantoms.json", "train_labels.csv", "train/train_2_a_1.nii.gz"):
        (tmp_path / "one" / name).unlink()
    kept = (tmp_path / "one/train/train_1_a_1.nii.gz").stat().st_mtime_ns
    chests.draw_chests(TINY, tmp_path / "one", workers=1)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()} == before
    assert (tmp_path / "one/train/train_1_a_1.nii.gz").stat().st_mtime_ns == kept
    assert not [n for n in before if n.endswith(".tmp")]


_DRAW = """
import sys
from medvl.phantoms.chests import PhantomConfig, draw_chests
if __name__ == "__main__":
    draw_chests(PhantomConfig(patients=5000, seed=0, columns=(32, 32), slices=(8, 8)), sys.argv[1], workers=2)
"""


def test_workers_end_when_the_drawing_is_killed(tmp_path):
    (tmp_path / "run.py").write_text(_DRAW)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path / "out"], start_new_session=True, env=env
    )
    while len(list(tmp_path.glob("out/train/*.nii.gz"))) < 4:
        assert run.poll() is None
        time.sleep(0.02)
    run.kill()
    run.wait()
    try:
        for _ in range(3000):  # until nothing of its group is left
            os.killpg(run.pid, 0)
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGKILL)
        raise AssertionError("workers outlived their parent")
    except ProcessLookupError:
        pass


def test_a_script_that_cannot_have_workers_is_told_so(tmp_path):
    (tmp_path / "run.py").write_text(_DRAW.replace('if __name__ == "__main__":', "if True:"))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "run.py", "out"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        'ValueError: worker processes cannot start: a script that uses workers must be a file and run its code under `if __name__ == "__main__":`'
        in done.stderr
    )
    assert not list(tmp_path.glob("out/train/*"))


def test_two_configs_never_share_a_folder(tmp_path):
    small = PhantomConfig(patients=1, seed=0, columns=(32, 32), slices=(8, 8))
    chests.draw_chests(small, tmp_path, workers=1)
    with pytest.raises(ValueError, match=r"another PhantomConfig \(\$.seed: 0 / 1\)"):
        chests.draw_chests(evolve(small, seed=1), tmp_path, workers=1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"valid": 5, "test": 6}, "valid \\+ test must be within the 10 patients, got 5 and 6"),
        ({"test": -1}, "got 0 and -1"),
        ({"second_recon": 1.5}, "second_recon must lie in 0..1, got 1.5"),
        ({"columns": (96, 64)}, "columns must rise, got"),
        ({"slices": (4, 9)}, "slices must be 8 or more, got 4"),
    ],
)
def test_config_refuses(wrong, says):
    with pytest.raises(ValueError, match=says):
        PhantomConfig(patients=10, seed=0, **wrong)


def test_variation_says_how_much_bodies_differ():
    def spread(variation: float) -> float:
        cfg = chests.PhantomConfig(patients=40, seed=3, variation=variation)
        return float(
            np.std(
                [chests.draw_volume_case(cfg, v).body.half_width for v in chests.volume_names(cfg, "train")]
            )
        )

    assert spread(0.0) == 0
    assert 0.2 * spread(1.0) < spread(0.3) < 0.4 * spread(1.0)
