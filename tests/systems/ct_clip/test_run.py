"""The whole chain on a handful of drawn chests, and what users see when something is missing."""

import io
import json
import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from attrs import evolve
from invoke import Collection, Program
from PIL import Image

import tasks
from medvl.base import config, files, processes, store
from medvl.base.tree import flatten
from medvl.commands import preprocess as preprocess_commands
from medvl.commands import scans as scans_commands
from medvl.commands import split as split_commands
from medvl.components import encode
from medvl.ct import chest, ingest, pairs, preprocess, protocols
from medvl.ct.names import scan_of
from medvl.ct.reports import FINDINGS
from medvl.ct.volumes import FIELDS, SOURCE_FIELDS
from medvl.evaluation import metrics, plots, report, results
from medvl.evaluation.calibration import Calibration, calibrate
from medvl.hub import loading, tokens
from medvl.serve import rooms
from medvl.serve.interface import Refused
from medvl.systems import export, run
from medvl.systems.ct_clip import common_space, look, scan_page, score, slice_features
from medvl.systems.ct_clip import data as ct_data
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip import record as ct_record
from medvl.systems.ct_clip import run as ct_clip_run
from medvl.systems.ct_clip.slice_effects import average_slices, encode_batch, slice_effects
from medvl.systems.ct_clip.slice_features import cached_features
from medvl.training import gradients, states
from medvl.training.record import Speed, Stage
from medvl.training.stages import make_optimizer
from tests.rooms import open_room

ROOT = Path(__file__).resolve().parents[3]
SET = (
    "data.phantoms.patients=26",
    "data.phantoms.valid=8",
    "data.phantoms.test=8",
    "data.workers=1",
    "ct.size=[6, 32, 32]",
    "ct.spacing_mm=[50.0, 12.0, 12.0]",
    "vit.config={model_type='dinov2', hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16}",
    "vit.whiten=false",
    "encode={}",
    "fuse={dim=16, depth=1, heads=2}",
    "words.tower={vocabulary=300, context=64, dim=16, depth=1, heads=2}",
    "contrast={dim=8}",
    "data.draws=1",
    "train={batch=6, chunk=4, log=1, save=2, validate=2, stages=[{name='contrast', steps=4, lr=1e-3}]}",
    "evaluate={bootstrap=20, batch=3}",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with the experiments, in which one tiny run was trained."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = []
        rows = run.run("ctclip_phantom", SET, said.append)
        yield folder, rows, said


@pytest.fixture
def trained(place, monkeypatch):
    monkeypatch.chdir(place[0])
    return run.resolve("ctclip_phantom", SET)


def test_a_run_leaves_everything_that_made_it(place, trained):
    cfg, folder = trained
    kept = config.load_record(folder / "config.json", ct_record.Config)
    assert folder.name == f"ctclip_phantom-{config.record_digest(cfg)}"
    assert kept.train == cfg.train
    environment = json.loads((folder / "environment.json").read_text())
    assert {"python", "torch", "cuda", "gpu", "packages", "commit"} <= environment.keys()
    for name in (
        "report.md",
        "report.html",
        "results.csv",
        "results.jsonl",
        "scores_test.csv",
        "thresholds.json",
        "calibration.json",
        "average_slices.npy",
        "volumes.png",
    ):
        assert (folder / "results" / name).stat().st_size > 0
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        assert (folder / "0-contrast" / name).stat().st_size > 0
    rows = results.read_results(folder / "results/results.jsonl")
    assert {"auroc", "auprc", "f1", "accuracy", "balanced_accuracy", "precision", "recall_at_1"} <= {
        r.what for r in rows
    }
    assert {"ece_zero_shot", "ece_calibrated", "brier_zero_shot", "brier_calibrated"} <= {
        r.what for r in rows
    }
    assert {r.experiment for r in rows} == {folder.name}


def test_a_report_names_no_volume_unless_asked(place, trained, tmp_path):
    cfg, folder = trained
    volumes = ct_data.open_volumes(cfg, "test")
    names = [r["VolumeName"] for r in files.read_csv(folder / "results/scores_test.csv")]
    for page in ("report.md", "report.html"):
        text = (folder / "results" / page).read_text()
        assert not [n for n in names if n in text]
    rows = [f"row {i} of scores_test.csv" for i in range(1, 10)]
    sheets = {"rows": rows, "names": names[:9]}
    for what, labels in sheets.items():
        ingest.contact_sheet(volumes, tmp_path / f"{what}.png", names[:9], labels=labels)
    pictures = {what: (tmp_path / f"{what}.png").read_bytes() for what in sheets}
    assert pictures["rows"] != pictures["names"]
    assert (folder / "results/volumes.png").read_bytes() == pictures["rows"]
    model, params = ct_clip_run.load(folder)
    named = evolve(model, cfg=evolve(cfg, evaluate=evolve(cfg.evaluate, names=True)))
    score.assess(named, params, folder / "results-names", "x")
    assert (folder / "results-names/volumes.png").read_bytes() == pictures["names"]


def test_the_same_command_again_trains_nothing(place, trained):
    before = (trained[1] / "0-contrast/last.pt").read_bytes()
    said = []
    rows = run.run("ctclip_phantom", SET, said.append)
    assert before == (trained[1] / "0-contrast/last.pt").read_bytes()
    numbers = lambda results: [(r.what, r.subject, r.value) for r in results if not np.isnan(r.value)]
    assert numbers(rows) == numbers(place[1])
    assert not [line for line in said if "step 2" in line]


def test_one_scan_is_what_the_split_says(trained):
    folder = trained[1]
    scan = next(Path("data").glob("phantoms-*/test/*.nii.gz"))
    found = look.look_at_scan(folder, scan)
    table = (folder / "results/scores_test.csv").read_text().splitlines()
    row = next(line for line in table if line.startswith(scan.name.removesuffix(".nii.gz") + ","))
    np.testing.assert_allclose(
        list(found["probability"].values()), [float(v) for v in row.split(",")[1:]], rtol=1e-4
    )
    assert found["embedding"].shape == (8,)
    assert abs(found["embedding"].norm() - 1) < 1e-5
    other = look.look_at_scan(folder, scan, ["Pneumothorax", "Pneumothorax"])
    assert list(other["probability"]) == ["Pneumothorax"]
    assert other["threshold"] == {}


def test_an_exported_run_sees_what_the_run_sees(trained, tmp_path):
    folder = trained[1]
    with pytest.raises(ValueError, match="a run of ct_clip has one form; leave out --as, --base"):
        export.export_run(str(folder), tmp_path / "out", "peft", log=lambda line: None)
    assert not (tmp_path / "out").exists()
    export.export_run(str(folder), tmp_path / "out", "merged", log=lambda line: None)
    scan = next(Path("data").glob("phantoms-*/test/*.nii.gz"))
    found, again = (look.look_at_scan(where, scan) for where in (folder, tmp_path / "out"))
    assert torch.equal(found["embedding"], again["embedding"])
    assert found["probability"] == again["probability"]
    assert found["threshold"] == again["threshold"] != {}
    for finding, effect in found["slices"].items():
        np.testing.assert_array_equal(again["slices"][finding], effect)
    card = (tmp_path / "out/README.md").read_text()
    for part in ("trained from scratch (dinov2)", "shows no patient", "| auroc |", '"system": "ct_clip"'):
        assert part in card
    assert str(tmp_path) not in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_one_scan_is_read_by_its_metadata_row(trained, tmp_path, capsys):
    """A scan whose header is blank and whose values are raw, as CT-RATE's first release has them."""
    folder = trained[1]
    path = next(Path("data").glob("phantoms-*/test/*.nii.gz"))
    image = nib.as_closest_canonical(nib.load(path))
    voxels = np.asarray(image.dataobj)[::-1, ::-1].round().astype(np.int16)  # in L-P-S order
    x, y, z = image.header.get_zooms()
    whole, blank = tmp_path / "whole.nii", tmp_path / "blank.nii"
    affine = np.diag([-x, -y, z, 1.0])
    affine[2, 3] = 100
    nib.save(nib.Nifti1Image(voxels, affine), whole)
    nib.save(nib.Nifti1Image(voxels + np.int16(1024), None), blank)
    table = tmp_path / "m.csv"
    columns = "VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing,ImageOrientationPatient\n"
    table.write_text(columns + f'blank.nii.gz,1,-1024,"[{y}, {x}]",{z},"[1, 0, 0, 0, 1, 0]"\n')
    expected = look.look_at_scan(folder, whole)
    found = look.look_at_scan(folder, blank, (), table, ["spacing_from=metadata"])
    assert (found["volume"].hu_rule, found["volume"].intercept) == ("metadata", -1024.0)
    np.testing.assert_array_equal(found["volume"].voxels, expected["volume"].voxels)
    scans_commands.print_findings(
        str(folder), str(blank), ["Lung nodule"], str(table), ["spacing_from=metadata"]
    )
    assert "HU by metadata" in capsys.readouterr().out
    scans_commands.embed_scan(
        str(folder), str(blank), str(tmp_path / "e.npy"), str(table), ["spacing_from=metadata"]
    )
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected["embedding"].numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="the direction of its axes is unknown"):
        look.look_at_scan(folder, blank)
    with pytest.raises(
        ValueError,
        match="only hu, spacing_from and tilt may differ from what the run was trained with, got preset=merlin",
    ):
        look.look_at_scan(folder, blank, (), "", ["preset=merlin", "spacing_mm=[]"])
    with pytest.raises(
        ValueError, match=r"m.csv: has a row for none of the 1 scans; it names 'blank', they 'whole'"
    ):
        look.look_at_scan(folder, whole, (), table)


def test_volumes_do_not_depend_on_their_neighbours(trained):
    model, params = ct_clip_run.load(trained[1])
    of = ct_data.open_volumes(model.cfg, "test")
    whole = common_space.place_volumes(model, params, of, of.names)
    single = torch.cat([common_space.place_volumes(model, params, of, [n]) for n in of.names])
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=1e-5)


def test_cached_features_are_the_slices_and_follow_the_weights(trained, tmp_path):
    model, params = ct_clip_run.load(trained[1])
    of = ct_data.open_volumes(model.cfg, "valid")
    cache = cached_features(model, params, of, tmp_path)
    name = of.names[0]
    want = pairs.read_slices(of, [name])
    z = encode.encode_slices(model.cfg.encode, params["vit"], want["slices"], want["mask"], vit=model.vit)
    torch.testing.assert_close(
        pairs.read_slices(cache, [name])["slices"].float(), z.detach(), atol=2e-3, rtol=2e-3
    )
    before = cache.path.stat().st_mtime_ns
    assert cached_features(model, params, of, tmp_path).path.stat().st_mtime_ns == before
    other = params | {"vit": {k: t + 0.1 for k, t in params["vit"].items()}}
    assert cached_features(model, other, of, tmp_path).path != cache.path


def test_features_of_a_scan_that_was_replaced_are_not_used(trained, tmp_path):
    model, params = ct_clip_run.load(trained[1])
    true = ct_data.open_volumes(model.cfg, "valid")
    volumes = {n: (true.read(n), true.row(n)) for n in true.names[:2]}
    name = true.names[0]

    def write(path, change):
        store.create(
            path,
            list(volumes),
            true.shape,
            true.dtype,
            true.settings,
            [*FIELDS, *SOURCE_FIELDS],
        )
        for n, (voxels, row) in volumes.items():
            store.put(store.open_store(path), n, voxels ^ np.uint8(change and n == name), row)
        return store.open_store(path)

    path = tmp_path / "volumes.h5"
    cached_features(model, params, write(path, 0), tmp_path)
    path.unlink()
    same = write(path, 0)  # made again from the same scans
    cached_features(model, params, same, tmp_path)
    path.unlink()
    with pytest.raises(
        ValueError,
        match=f"1 volumes of .*volumes.h5 have changed since their features were computed, e.g. {name}",
    ):
        cached_features(model, params, write(path, 1), tmp_path)


def test_another_run_waits_for_the_cache(trained, tmp_path, caplog):
    """What two runs over one cache meet: the one that comes second waits, and computes nothing again."""
    model, params = ct_clip_run.load(trained[1])
    volumes = ct_data.open_volumes(model.cfg, "valid")
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(cached_features, model, params, volumes, tmp_path) for _ in range(3)]
        made = [run.result() for run in runs]
    assert {m.names for m in made} == {volumes.names}
    assert len(list(tmp_path.iterdir())) == 1  # the store; no lock is left


def test_a_frozen_encoder_trains_from_the_cache(trained, monkeypatch):
    stages = (
        "{name='words', steps=2, lr=1e-3, train=['(fuse|text|project|contrast)/.*']}",
        "{name='all', steps=2, lr=1e-3, speeds=[{match='vit/.*', lr=1e-5, weight_decay=0.0}]}",
    )
    stage = f"train.stages=[{', '.join(stages)}]"
    cfg, folder = run.resolve("ctclip_phantom", (*SET, stage))
    asked, read = [], store.Store.read
    monkeypatch.setattr(store.Store, "read", lambda self, *a: asked.append(self.path.name) or read(self, *a))
    _, params = ct_clip_run.fit(cfg, folder, log=lambda line: None)
    first = ct_clip.init_model(cfg, folder)[1]
    state = states.read_state(folder / "0-words/last.pt")
    assert not [n for n in flatten(state.params) if n.startswith("vit/")]
    assert any(not torch.equal(params["vit"][n], t) for n, t in first["vit"].items())
    assert any(n.startswith("features-") for n in asked)


def test_the_shuffled_control_keeps_scans_together(trained):
    plain = trained[0]
    cfg = evolve(plain, data=evolve(plain.data, shuffle=True))
    of = ct_data.open_volumes(cfg, "train")
    shuffled, true = ct_data.pair_reports(cfg, "train", of), ct_data.pair_reports(plain, "train", of)
    told = lambda data: [t["findings"] for t in data.texts]
    assert sorted(set(told(shuffled))) == sorted(set(told(true)))
    assert (
        sum(a != b for a, b in zip(told(shuffled), told(true), strict=True)) > len(true.texts) // 2
    )  # some reports are alike
    marked = evolve(true, texts=tuple({"findings": scan} for scan in true.scans))
    for seed in range(20):
        given = told(ct_data.shuffle_reports(marked, seed))
        assert all(report != scan for report, scan in zip(given, true.scans, strict=True))
    assert len(set(zip(shuffled.scans, told(shuffled), strict=True))) == len(set(shuffled.scans))


def _with_tables(cfg, folder, change):
    """The record with its label tables copied to `folder` and changed: change(split, rows) -> rows."""
    for split in ct_record.SPLITS:
        rows = change(split, files.read_csv(ct_data.data_path(cfg, "labels", split)))
        files.write_csv(folder / f"{split}_labels.csv", rows, list(rows[0]))
    return evolve(cfg, data=evolve(cfg.data, labels=str(folder / "{split}_labels.csv")))


def test_validation_labels_of_one_class_are_refused_before_anything_is_trained(trained, tmp_path):
    plain = trained[0]
    one = lambda split, rows: (
        [{k: v if k == "VolumeName" else "0" for k, v in r.items()} for r in rows]
        if split == "valid"
        else rows
    )
    with pytest.raises(
        ValueError,
        match=r"valid_labels.csv: of \d+ volumes, none or all have .*Cardiomegaly.*chooses checkpoint",
    ):
        ct_data.prepare_data(_with_tables(plain, tmp_path, one), lambda line: None)


def test_findings_of_one_class_and_other_findings_are_said_at_the_start(trained, tmp_path, caplog):
    plain = trained[0]
    finding = list(files.read_csv(ct_data.data_path(plain, "labels", "valid"))[0])[1]
    for split in ("valid", "test"):
        (tmp_path / split).mkdir()
    with caplog.at_level(logging.WARNING):
        one = lambda split, rows: [r | {finding: "1"} for r in rows] if split == "valid" else rows
        ct_data.check_labels(_with_tables(plain, tmp_path / "valid", one))
    assert f"none or all have {finding}" in caplog.text
    less = lambda split, rows: (
        [{k: v for k, v in r.items() if k != finding} for r in rows] if split == "test" else rows
    )
    with pytest.raises(ValueError, match=f"must have the findings of .*they differ in {finding}"):
        ct_data.check_labels(_with_tables(plain, tmp_path / "test", less))


def test_a_run_without_a_best_state_keeps_its_last(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(ct_clip_run, "mean_auroc", lambda *args: float("nan"))
    with pytest.raises(
        ValueError, match=r"no validation has given a number.*the last one is .*last.pt.*train.keep"
    ):
        ct_clip_run.fit(trained[0], tmp_path / "run", lambda line: None)
    assert states.read_state(tmp_path / "run/0-contrast/last.pt").step == 4


def _clip_folder(folder, texts):
    """A CLIP of two tiny towers with a tokenizer, as it is published: one config.json, one file of weights."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = sizes | {"vocab_size": 300, "max_position_embeddings": 64, "eos_token_id": 2}
    model = CLIPModel(
        CLIPConfig(text_config=words, vision_config=sizes | {"image_size": 32, "patch_size": 16})
    )
    tokens.train_bpe(texts, 300, folder)
    model.save_pretrained(folder)
    return model.eval()


def test_a_folder_of_clip_gives_its_towers(trained, tmp_path):
    cfg = trained[0]
    clip = _clip_folder(tmp_path / "clip", ["There is a nodule.", "No nodule."])
    words = evolve(cfg.words, encoder=str(tmp_path / "clip"), pool="last")
    both = evolve(cfg, vit=ct_record.VitConfig(name=str(tmp_path / "clip")), words=words)
    model, params = ct_clip.init_model(both, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        rows = ct_clip.embed_texts(
            model, params, {"ids": ids[:, None], "words": torch.ones(1, 1, 3, dtype=torch.bool)}
        )
        torch.testing.assert_close(rows[0], clip.text_model(ids).last_hidden_state[:, -1])
        batch = pairs.read_slices(
            ct_data.open_volumes(cfg, "test"), ct_data.open_volumes(cfg, "test").names[:2]
        )
        assert ct_clip.embed_volumes(model, params, batch).shape == (2, 16)
    with pytest.raises(
        ValueError, match=r"words.pool = 'first' takes a token of .* that does not see the text behind it"
    ):
        ct_clip.init_model(evolve(both, words=evolve(words, pool="first")), tmp_path)
    with pytest.raises(
        ValueError, match=r"words.tower.context must be at most the 64 positions of .*, got 128"
    ):
        ct_clip.init_model(
            evolve(both, words=evolve(words, tower=evolve(words.tower, context=128))), tmp_path
        )


def test_a_batch_that_processes_cannot_share_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    with pytest.raises(
        ValueError, match=r"train.batch must be a multiple of the number of processes, got 6 for 4"
    ):
        ct_clip_run.fit(trained[0], tmp_path)


def test_a_patient_in_two_splits_is_refused(trained):
    plain = trained[0]
    with pytest.raises(ValueError, match="1 patients are both in train and in valid"):
        ct_data.check_labels(evolve(plain, data=evolve(plain.data, patient_pattern="_a_")))
    with pytest.raises(ValueError, match="must have the column 'PatientID'"):
        ct_data.check_labels(evolve(plain, data=evolve(plain.data, patient_column="PatientID")))


def test_intervals_resample_patients_whatever_they_are_called(trained, tmp_path):
    plain = trained[0]
    number = iter(range(1000))
    named = lambda split, rows: [r | {"PatientID": f"{split}{next(number) % 2}"} for r in rows]
    cfg = _with_tables(plain, tmp_path, named)
    cfg = evolve(cfg, data=evolve(cfg.data, patient_column="PatientID"))
    ct_data.check_labels(cfg)
    model, params = ct_clip_run.load(trained[1])
    rows, _ = score.assess(evolve(model, cfg=cfg), params, trained[1] / "results-patients", "x")
    assert {r.extra["patients"] for r in rows if r.what == "auroc"} == {2}
    assert "PatientID" not in {r.subject for r in rows}


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_gradients_reach_every_part(loss, trained):
    cfg, folder = trained
    cfg = evolve(cfg, contrast=evolve(cfg.contrast, loss=loss))
    model, params = ct_clip.init_model(cfg, folder)
    data = ct_data.pair_reports(cfg, "train", ct_data.open_volumes(cfg, "train"))
    rows = ct_data.training_batches(model, data, 6, 0)(0)
    embed = lambda p, b: {
        "image": ct_clip.embed_volumes(model, p, b),
        "text": ct_clip.embed_texts(model, p, b),
    }
    _, _, grads = gradients.cached_value_and_grad(
        embed, lambda p, r: ct_clip.contrastive_loss(cfg.contrast, p, r), chunk=6
    )(params, rows)
    still = {n for n, g in flatten(grads).items() if not g.abs().max() > 0}
    assert still - {"contrast/bias"} == {"vit/embeddings.mask_token"}


def test_several_texts_of_a_scan_are_several_contrasts(trained):
    cfg, folder = trained
    cfg = evolve(
        cfg, data=evolve(cfg.data, draws=3, sentences=1), contrast=evolve(cfg.contrast, normalise="none")
    )
    model, params = ct_clip.init_model(cfg, folder)
    data = ct_data.pair_reports(cfg, "train", ct_data.open_volumes(cfg, "train"))
    batch = ct_data.training_batches(model, data, 5, 0)(0)
    assert batch["ids"].shape[:2] == (5, 3)
    image, words = ct_clip.embed_volumes(model, params, batch), ct_clip.embed_texts(model, params, batch)
    one = [
        ct_clip.embed_texts(model, params, {k: batch[k][:, j : j + 1] for k in ("ids", "words")})
        for j in range(3)
    ]
    torch.testing.assert_close(words, torch.cat(one, 1))
    loss = lambda t: ct_clip.contrastive_loss(cfg.contrast, params, {"image": image, "text": t})[0]
    torch.testing.assert_close(loss(words), torch.stack([loss(t) for t in one]).mean())
    assert not torch.equal(loss(one[0]), loss(one[1]))


@pytest.mark.parametrize(
    ("normalise", "mean", "spread"), [("none", 3.0, 2.0), ("centre", 0.0, 2.0), ("standardise", 0.0, 1.0)]
)
def test_rows_are_normalised_over_the_batch(normalise, mean, spread, gen):
    cfg, rows = ct_record.ContrastConfig(normalise=normalise), 3 + 2 * torch.randn(4000, 2, 8, generator=gen)
    seen = []
    params = {"project": {"image": {"weight": torch.eye(8)}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ct_clip.F, "normalize", lambda t, dim: seen.append(t) or t)
        ct_clip.place(params, "image", rows, ct_clip.batch_statistics(cfg, rows))
    torch.testing.assert_close(seen[0].flatten(0, 1).mean(0), torch.full((8,), mean), atol=0.1, rtol=0)
    torch.testing.assert_close(seen[0].flatten(0, 1).std(0), torch.full((8,), spread), atol=0.1, rtol=0)


def test_a_speed_of_muon_takes_the_matrices_that_match(trained):
    cfg, folder = trained
    _, params = ct_clip.init_model(cfg, folder)
    fast = Speed(match="fuse/blocks/.*", lr=0.03, weight_decay=0.1, optimizer="muon")
    opt = make_optimizer(cfg.train, Stage(name="a", steps=4, lr=1e-3, speeds=(fast,)), params, keyed=True)
    state = flatten(opt.init(params))
    moved = {n for n, t in flatten(params).items() if n.startswith("fuse/blocks/") and t.dim() > 1}
    assert moved == {n.removeprefix("muon/mean/") for n in state if n.startswith("muon/")}
    assert {n.removeprefix("adamw/mean/") for n in state if n.startswith("adamw/mean/")} == flatten(
        params
    ).keys() - moved


def test_whitening_starts_the_run_and_is_kept_by_it(trained, tmp_path):
    cfg, _ = trained
    cfg = evolve(
        cfg,
        vit=evolve(cfg.vit, whiten=True),
        train=evolve(cfg.train, stages=(evolve(cfg.train.stages[0], steps=1, lr=1e-9),)),
    )
    (tmp_path / "config.json").write_text(json.dumps(config.unstructure(cfg)))
    _, params = ct_clip_run.fit(cfg, tmp_path, log=lambda line: None)
    name = "embeddings.patch_embeddings.projection.weight"
    assert not torch.allclose(
        params["vit"][name], ct_clip.init_model(cfg, tmp_path)[1]["vit"][name], atol=0.01
    )
    _, again = ct_clip_run.load(tmp_path)
    assert torch.equal(again["vit"][name], params["vit"][name])
    frozen = evolve(cfg, train=evolve(cfg.train, stages=(evolve(cfg.train.stages[0], train=("fuse/.*",)),)))
    with pytest.raises(ValueError, match=r"vit\.whiten: a stage must train vit/embeddings\.patch"):
        ct_clip_run.fit(frozen, tmp_path, log=lambda line: None)


def test_scale_is_bounded_after_a_step():
    cfg = ct_record.ContrastConfig(scale_max=20.0)
    assert ct_clip.bound_scale(cfg, {"contrast": {"log_scale": torch.tensor(9.0)}})["contrast"][
        "log_scale"
    ].exp().item() == pytest.approx(20.0)
    assert ct_clip.bound_scale(cfg, {"fuse": {}}) == {"fuse": {}}


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "experiments").glob("*.toml"))])
def test_every_experiment_is_a_valid_record(name, place, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg, folder = run.resolve(name)
    assert folder.name.startswith(name)
    assert cfg.about
    assert config.structure(config.unstructure(cfg), type(cfg)) == cfg


BROKEN = {
    "unknown key": (
        "train.bath=3",
        r"ctclip_phantom.toml: unknown key 'bath'; TrainConfig has .*batch.* @ \$.train",
    ),
    "wrong type": ("train.batch=7.5", r"expected int, got 7.5 @ \$.train.batch"),
    "text for a number": ("train.stages.0.lr=fast", r"expected float, got 'fast' @ \$.train.stages\[0\].lr"),
    "unknown choice": (
        "contrast.loss=triplet",
        r"must be one of 'clip', 'siglip', got 'triplet' @ \$.contrast.loss",
    ),
    "unknown system": (
        "system=ct_clap",
        r"system must be one of adapters, ct_clip, document, slide_vqa, tune, unified, or a package .* found 'ct_clap'",
    ),
    "heads do not divide": ("fuse.heads=5", r"dim must be a multiple of 2 x heads"),
    "preset with spacing": ("ct.preset=reference", r"spacing_mm belongs to preset 'mm'"),
    "index out of range": ("train.stages.3.lr=1", r"must be an index below 1, got '3'"),
    "no equals sign": ("train.batch", r"--set needs key.path=value"),
    "unknown pattern": (
        "train.stages.0.train=['loar/.*']",
        r"pattern 'loar/\.\*' matches no parameter; the \d+ names look like",
    ),
    "fuse of another width": (
        "fuse.dim=32",
        r"fuse.dim must be the width of the slice encoder, 16, found 32",
    ),
    "unknown vit setting": ("vit.config.hiden_size=8", r"has no hiden_size"),
    "batch above the scans": ("train.batch=1000", r"a batch of 1000 needs as many different samples"),
    "patch does not divide": ("vit.config.patch_size=5", r"multiples of the patch size 5"),
    "no text at all": ("data.draws=0", r"data.draws must be 1 or more, got 0"),
    "two rules for patients": (
        "data={patient_column='a', patient_pattern='b'}",
        r"patient_column or patient_pattern, not both",
    ),
    "a pattern for patients": ("data.patient_pattern='(P'", r"data.patient_pattern"),
    "a store of no split": (
        "data.stores.tests='x.h5'",
        r"data.stores is for train, valid, test, found tests",
    ),
    "whitening of trained weights": (
        "vit={name='facebook/dinov2-base', whiten=true}",
        r"whiten is for encoders built from scratch",
    ),
    "both name and config": ("vit.name=facebook/dinov2-base", r"either a name .* or a config"),
    "unknown finding": ("evaluate.findings=['Pneumothorax']", r"must have the column 'Pneumothorax'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_is_one_clear_error(case, trained):
    setting, said = BROKEN[case]
    with pytest.raises(ValueError, match=said):
        run.run("ctclip_phantom", (*SET, setting), lambda line: None)


def test_a_run_is_seen_while_it_trains_and_ends_when_it_learns_no_more(trained, tmp_path):
    """By validation AUROC, which hardly rises twenty times in a row where the rate is nothing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = []
    stages = "train.stages=[{name='contrast', steps=40, lr=1e-30}]"
    settings = (*SET, stages, "train.patience=1", "train.tensorboard=true")
    run.run("ctclip_phantom", settings, said.append)
    (end,) = re.findall(r"ends at step (\d+) of 40, 1 validations gave no better score", "\n".join(said))
    shown = [line for line in said if line.startswith("contrast:")]
    assert re.search(
        r"left.* s/step, samples_per_second [\d.e+]+, lr .*loss .* GB, .*valid_score 0\.", shown[1]
    )
    (_, folder) = run.resolve("ctclip_phantom", settings)
    lines = [json.loads(line) for line in (folder / "0-contrast/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, int(end) + 1)]
    scores = {line["step"]: line["valid_score"] for line in lines if "valid_score" in line}
    assert [*scores] == [*range(2, int(end) + 1, 2)]
    assert [*scores.values()][-1] <= [*scores.values()][-2]
    assert all(
        line["samples_per_second"] > 0 and "mfu" not in line for line in lines
    )  # a CPU has no known peak
    events = EventAccumulator(str(folder / "0-contrast")).Reload()
    assert [event.step for event in events.Scalars("valid_score")] == [*scores]
    panels = plots._group_panels(lines)
    assert panels["score"] == {"valid_score": scores}
    assert panels.keys() == {"loss", "grad_norm", "scale", "lr", "score"}


def test_missing_things_are_named_with_what_to_do(trained, tmp_path):
    with pytest.raises(
        ValueError, match=r"no such experiment or run; there are .*ctclip_phantom, ctclip_vitb"
    ):
        run.resolve("ctclip_vitx")
    with pytest.raises(ValueError, match=r"9 files are missing: data/ct_rate/train.h5, .*`invoke preprocess"):
        run.run("ctclip_vitb", (), lambda line: None)
    with pytest.raises(ValueError, match=r"no such run; `invoke train --exp ctclip_vitb`"):
        run.evaluate("ctclip_vitb")
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.json").write_text((trained[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no tokenizer yet; train it first"):
        ct_clip_run.load(other)


def test_weights_that_are_nowhere_stop_the_run_at_once(trained):
    with pytest.raises(ValueError, match=r"facebook/dinov2-with-registers-base.*hf download"):
        loading.load_skeleton("facebook/dinov2-with-registers-base")


def test_a_store_of_other_settings_is_refused(trained):
    cfg = trained[0]
    made = str(ct_data.data_path(cfg, "store", "train"))
    other = evolve(cfg, ct=evolve(cfg.ct, antialias="off"), data=evolve(cfg.data, store=made))
    with pytest.raises(ValueError, match=r"made with other settings \(wanted / found\).*antialias"):
        ct_data.open_volumes(other, "train")


def test_labels_without_volumes_are_counted(trained, caplog, tmp_path):
    model, params = ct_clip_run.load(trained[1])
    cfg = model.cfg
    table = ct_data.data_path(cfg, "labels", "test").read_text()
    first = table.splitlines()[1]
    (tmp_path / "test_labels.csv").write_text(
        table + "test_999_a_1.nii.gz" + first[first.index(",") :] + "\n"
    )
    model = evolve(model, cfg=evolve(cfg, data=evolve(cfg.data, labels=str(tmp_path / "{split}_labels.csv"))))
    with caplog.at_level(logging.WARNING):
        score.score_split(model, params, "test")
    assert "1 labels have no volume, 0 volumes no label" in caplog.text


# Protocols, levels, lists, test sets of others ------------------------------------------------------------------------
def _with_all_findings(cfg, folder):
    """`--set` for label tables in which also the findings that are not drawn have columns."""
    other = lambda split, i, f: str((i + len(split) + len(f)) % 3 // 2)
    change = lambda split, rows: [
        r | {f: other(split, i, f) for f in FINDINGS if f not in r} for i, r in enumerate(rows)
    ]
    _with_tables(cfg, folder, change)
    return f"data.labels={folder}/{{split}}_labels.csv"


def _results(folder):
    return {(r.what, r.subject): r for r in results.read_results(folder / "results.jsonl")}


def _scores(path):
    rows = files.read_csv(path)
    return {f: np.array([float(r[f]) for r in rows]) for f in rows[0] if f != "VolumeName"}


def _new_folder(folder, before):
    (made,) = {*folder.glob("results-*")} - before
    return made


def test_a_test_set_of_others_by_the_protocol_of_radchest(trained, tmp_path, capsys):
    """The command of the documentation, with scans as .npz and the label table of RAD-ChestCT, without reports."""
    cfg, folder = trained
    labels = _with_all_findings(cfg, tmp_path)
    scans = sorted(Path("data").glob("phantoms-*/test/*.nii.gz"))
    other = tmp_path / "radchest"
    (other / "npz").mkdir(parents=True)
    columns = [f"{a}*lung" for group in protocols._ABNORMALITIES.split() for a in group.split("|")]
    rows = []
    for i, path in enumerate(scans):
        # To inferior, posterior, left, at the spacing that these files are said to have.
        voxels = np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)[::-1, ::-1, ::-1].transpose(
            2, 1, 0
        )
        hu = voxels.round().clip(-1000, 1000).astype(np.int16)
        np.savez(other / f"npz/tst{i}.npz", ct=hu.repeat(4, 0).repeat(4, 1).repeat(4, 2))
        rows.append({"NoteAcc_DEID": f"tst{i}"} | {c: (i + j) % 3 // 2 for j, c in enumerate(columns)})
    files.write_csv(other / "test_labels.csv", rows, list(rows[0]))
    app = Program(namespace=Collection.from_module(tasks))
    asked = [
        "invoke",
        "preprocess",
        "--source",
        f"{other}/npz",
        "--out",
        f"{other}/test.h5",
        "--exp",
        str(folder),
    ]
    with pytest.raises(SystemExit) as e:
        app.run(asked, exit=False)
    assert e.value.code == 0
    before = {*folder.glob("results-*")}
    command = ["invoke", "evaluate", "--exp", f"{folder}/config.json", "--protocol", "radchest16"]
    app.run([*command, "--set", f"data.test={other}", "--set", labels], exit=False)
    assert "report to one of" not in capsys.readouterr().out
    made = _new_folder(folder, before)
    rows = _results(made)
    assert {r.n for (what, _), r in rows.items() if what == "auroc"} == {len(scans)}
    ours = _scores(made / "scores_test.csv")
    assert list(ours) == list(protocols.PROTOCOLS["radchest16"])
    # The same scans as a protocol that does not merge sees them.
    before = {*folder.glob("results-*")}
    run.evaluate(str(folder), ("evaluate.protocol=ctrate18", labels), lambda line: None)
    plain = _new_folder(folder, before)
    for split in ("valid", "test"):
        parts, merged = _scores(plain / f"scores_{split}.csv"), _scores(made / f"scores_{split}.csv")
        both = np.maximum(parts[FINDINGS[1]], parts[FINDINGS[4]])
        if split == "valid":
            np.testing.assert_allclose(merged["Calcification"], both, rtol=1e-6)
            np.testing.assert_allclose(merged["Lung nodule"], parts["Lung nodule"], rtol=1e-6)
    # Thresholds come from validation labels that were merged the same way.
    valid = files.read_csv(tmp_path / "valid_labels.csv")
    either = [int(r[FINDINGS[1]]) | int(r[FINDINGS[4]]) for r in valid]
    scores = _scores(made / "scores_valid.csv")["Calcification"]
    (want,) = metrics.best_thresholds(scores[:, None], np.array(either)[:, None])
    assert json.loads((made / "thresholds.json").read_text())["Calcification"] == pytest.approx(want)
    assert "Protocol: radchest16" in (made / "report.md").read_text()


def test_ctclip_s_own_metrics_are_named_as_such(trained, tmp_path):
    cfg, folder = trained
    before = {*folder.glob("results-*")}
    settings = ("evaluate.protocol=ctclip", _with_all_findings(cfg, tmp_path))
    run.evaluate(str(folder), settings, lambda line: None)
    made = _new_folder(folder, before)
    rows, scores = _results(made), _scores(made / "scores_test.csv")
    tests = files.read_csv(tmp_path / "test_labels.csv")
    labels = np.array([[int(r[f]) for f in FINDINGS] for r in tests])
    thresholds = protocols.ctclip_thresholds(np.stack([*scores.values()], 1), labels)
    for finding, threshold, truth in zip(FINDINGS, thresholds, labels.T, strict=True):
        called = scores[finding] > threshold
        if 0 < truth.sum() < len(truth):
            assert rows["ctclip_accuracy", finding].value == pytest.approx((called == truth).mean())
    # Ours stand beside them, with thresholds of the validation split.
    assert {"accuracy", "f1_weighted", "auroc"} <= {what for what, _ in rows}
    assert "chosen on the evaluated set" in (made / "report.md").read_text()
    plain = (folder / "results/report.md").read_text()
    assert "ctclip" not in plain.lower().replace("ctclip\\_phantom", "").replace("ctclip jaccard", "")


def test_a_list_of_volumes_is_left_out(trained, tmp_path):
    _, folder = trained
    left_out = [r["VolumeName"] for r in files.read_csv(folder / "results/scores_test.csv")][:3]
    (tmp_path / "no_chest.txt").write_text("\n".join(f"{name}.nii.gz" for name in (*left_out, "train_9_a_1")))
    before = {*folder.glob("results-*")}
    run.evaluate(str(folder), (f"evaluate.exclude={tmp_path}/no_chest.txt",), lambda line: None)
    made = _new_folder(folder, before)
    names = {r["VolumeName"] for r in files.read_csv(made / "scores_test.csv")}
    all_names = {r["VolumeName"] for r in files.read_csv(folder / "results/scores_test.csv")}
    assert names == all_names - {*left_out}
    assert _results(made)["auroc", "mean"].n == len(names)
    assert f"{len(names)} volumes, without those of {tmp_path}" in (made / "report.md").read_text().replace(
        "\\", ""
    )


def test_a_scan_has_one_score_the_mean_of_its_reconstructions():
    gen = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    names = ("valid_1_a_1", "valid_2_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_3", "valid_1_a_4")
    labels = rng.integers(0, 2, (3, 2))[[0, 1, 0, 2, 1, 0]]
    embeddings = torch.nn.functional.normalize(torch.randn(6, 4, generator=gen), dim=1)
    volumes = score.SplitScores(
        names=names, findings=("a", "b"), labels=labels, scores=rng.random((6, 2)), embeddings=embeddings
    )
    scans = score._mean_over_scans(volumes)
    assert scans.names == ("valid_1_a_1", "valid_2_a_1", "valid_1_b_1")
    for row, members in enumerate(([0, 2, 5], [1, 4], [3])):
        np.testing.assert_allclose(scans.scores[row], volumes.scores[members].mean(0))
        np.testing.assert_array_equal(scans.labels[row], labels[members[0]])
        mean = embeddings[members].mean(0)
        torch.testing.assert_close(scans.embeddings[row], mean / mean.norm())
    other = labels.copy()
    other[5, 0] ^= 1
    with pytest.raises(ValueError, match="must have the same labels, 1 of 6 volumes have others"):
        score._mean_over_scans(evolve(volumes, labels=other))


def test_evaluation_by_scan_counts_scans(trained):
    _, folder = trained
    before = {*folder.glob("results-*")}
    run.evaluate(str(folder), ("evaluate.level=scan",), lambda line: None)
    rows = _results(_new_folder(folder, before))
    volumes = [r["VolumeName"] for r in files.read_csv(folder / "results/scores_test.csv")]
    scans = {scan_of(name) for name in volumes}
    assert rows["auroc", "mean"].n == len(scans)
    assert ("recall_at_1", f"report to one of {len(scans)} volumes") in rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluate.protocol=ctrate18"], r"valid_labels.csv: the protocol ctrate18 of 18 findings needs the columns Medical"),
        (["evaluate.protocol=ctrate"], r"evaluate.protocol"),
        (["evaluate.protocol=ctclip", "evaluate.findings=['Cardiomegaly']"], "give findings or a protocol"),
        (["data.test=nowhere"], r"nowhere/test_labels.csv"),
        (["evaluate.exclude=nowhere.txt"], r"nowhere.txt: not a readable list of volumes"),
    ],
)  # fmt: skip
def test_what_a_protocol_lacks_is_one_error_and_leaves_nothing(settings, message, trained):
    _, folder = trained
    before = {*folder.rglob("*")}
    with pytest.raises(ValueError, match=message) as e:
        run.evaluate(str(folder), settings, lambda line: None)
    assert "\n" not in str(e.value)
    assert {path for path in folder.rglob("*") if path.suffix != ".lock"} - before <= {folder / "log.txt"}


def test_a_test_set_with_its_findings_in_another_order_is_refused(trained, tmp_path):
    """Thresholds of one finding would be applied to another."""
    cfg, folder = trained
    test = tmp_path / "test"
    test.mkdir()
    shutil.copy(ct_data.data_path(cfg, "store", "test"), test / "test.h5")
    rows = files.read_csv(ct_data.data_path(cfg, "labels", "test"))
    files.write_csv(test / "test_labels.csv", rows, ["VolumeName", *reversed([*rows[0]][1:])])
    with pytest.raises(ValueError, match=r"must have the findings of .* they differ in their order"):
        run.evaluate(str(folder), (f"data.test={test}",), lambda line: None)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_another_test_set_with_patients_of_the_run_is_refused(split, trained, tmp_path):
    cfg, folder = trained
    test = tmp_path / "test"
    test.mkdir()
    shutil.copy(ct_data.data_path(cfg, "store", split), test / "test.h5")
    shutil.copy(ct_data.data_path(cfg, "labels", split), test / "test_labels.csv")
    with pytest.raises(ValueError, match=rf"patients are both in {split} and in test"):
        run.evaluate(str(folder), (f"data.test={test}",), lambda line: None)


def test_a_list_that_leaves_no_volume_is_refused(trained, tmp_path):
    cfg, folder = trained
    names = [r["VolumeName"] for r in files.read_csv(ct_data.data_path(cfg, "labels", "valid"))]
    (tmp_path / "all.txt").write_text("\n".join(names))
    with pytest.raises(ValueError, match=r"all.txt leaves no volume of the valid split"):
        run.evaluate(str(folder), (f"evaluate.exclude={tmp_path}/all.txt",), lambda line: None)


def test_split_cuts_all_tables_alike(place, trained, tmp_path, capsys):
    source = next(Path("data").glob("phantoms-*"))
    split_commands.split_tables(
        str(source / "train_labels.csv"), str(tmp_path), "a=0.5,b=0.5", 0, [str(source / "train_reports.csv")]
    )
    read = lambda part: [r["VolumeName"] for r in files.read_csv(tmp_path / f"{part}.csv")]
    names = {part: read(part) for part in ("a_labels", "a_reports", "b_labels")}
    assert names["a_labels"] == names["a_reports"]
    assert not {n.split("_")[1] for n in names["a_labels"]} & {n.split("_")[1] for n in names["b_labels"]}
    for sizes in ("half", "a=1,a=1", "../a=1,b=1"):
        with pytest.raises(ValueError, match="sizes must"):
            split_commands.split_tables(str(source / "train_labels.csv"), str(tmp_path / "sizes"), sizes, 0)


def test_a_run_is_served(trained):
    """A scan that is sent has the findings of its file, and leaves none."""
    folder = trained[1]
    scan = next(Path("data").glob("phantoms-*/test/*.nii.gz"))
    ask = open_room(rooms.open_ct, folder)
    found = ask("classify", content=scan.read_bytes(), findings=[], settings=[], with_slices=True)
    alone = look.look_at_scan(folder, scan)
    assert found["probability"] == alone["calibrated"]
    assert found["threshold"] == alone["calibrated_threshold"]
    first, stop = alone["volume"].occupied
    assert len(found["slices"]) == stop - first
    picture = np.asarray(Image.open(io.BytesIO(found["slices"][0])))
    slices = alone["volume"].voxels[first:stop].astype(np.float32)
    expected = (slices[0] - slices.min()) / max(1.0, float(slices.max() - slices.min())) * 255
    np.testing.assert_allclose(picture, expected, atol=0.51)
    named = ask(
        "classify", content=scan.read_bytes(), findings=["Pneumothorax"], settings=[], with_slices=False
    )
    assert list(named["probability"]) == ["Pneumothorax"]
    for content, settings in (
        (b"Jane Doe", []),
        (scan.read_bytes()[:5000], []),
        (scan.read_bytes(), ["preset=merlin"]),
    ):
        with pytest.raises(Refused, match="the scan cannot be read") as refused:
            ask("classify", content=content, findings=[], settings=settings, with_slices=False)
        assert "/proc" not in str(refused.value)
        assert "Jane" not in str(refused.value)


FROZEN = (*SET, "train.stages.0.train=['(fuse|text|project|contrast)/.*']")


def test_features_of_a_cluster_are_those_that_training_finds(trained, tmp_path, monkeypatch, capsys):
    sharded = (*FROZEN, f"data.cache='{tmp_path / 'sharded'}'")
    preprocess_commands.print_features("ctclip_phantom", sharded, "local:2")
    assert (
        len(capsys.readouterr().out.splitlines()[-2:]) == len(list((tmp_path / "sharded").glob("*.h5"))) == 2
    )
    alone, _ = run.resolve("ctclip_phantom", (*FROZEN, f"data.cache='{tmp_path / 'alone'}'"))
    for whole in slice_features.compute_features(alone):
        assert whole.path.is_file()
        shards = store.open_store(tmp_path / "sharded" / whole.path.name, expect=whole.settings)
        assert shards.path.is_dir()
        assert shards.names == whole.names
        for name in whole.names:
            assert np.array_equal(shards.read(name), whole.read(name))
            assert (shards.row(name), shards.content(name)) == (whole.row(name), whole.content(name))
    # The training reads the shards, and computes nothing.
    monkeypatch.setattr(slice_features.store, "put", None)
    assert run.run("ctclip_phantom", sharded, lambda line: None)


def test_features_ahead_of_a_training_that_changes_the_encoder_are_refused(trained):
    for settings, reason in (
        (SET, "vit/.* changes it"),
        ((*FROZEN, "vit.whiten=true"), r"vit\.whiten changes it"),
    ):
        with pytest.raises(
            ValueError, match=f"stage contrast must leave the slice encoder as it is, and {reason}"
        ):
            preprocess_commands.print_features("ctclip_phantom", settings, "")
    with pytest.raises(ValueError, match="is a tune experiment; only ct_clip"):
        preprocess_commands.print_features("tune_phantom", (), "")


def test_a_run_on_a_store_of_other_settings_is_refused(trained, tmp_path):
    cfg, folder = trained
    path = tmp_path / "other.h5"
    scans = ct_data.data_folder(cfg) / "test"
    ingest.preprocess_folder(
        scans,
        path,
        evolve(cfg.ct, antialias="off"),
        ct_data.data_path(cfg, "metadata", "test"),
        progress=False,
    )
    store_of_others = f"data.store='{path}'"
    with pytest.raises(ValueError, match=r"made with other settings \(wanted / found\).*antialias"):
        run.evaluate(str(folder), (store_of_others,))
    with pytest.raises(ValueError, match=r"made with other settings \(wanted / found\).*antialias"):
        preprocess_commands.print_features("ctclip_phantom", (*FROZEN, store_of_others), "")


# One scan, looked at -----------------------------------------------------------------------------------------
def _scan(split="test"):
    return sorted(Path("data").glob(f"phantoms-*/{split}/*.nii.gz"))[0]


def test_each_slice_is_occluded_as_a_loop_would(trained):
    model, params = ct_clip_run.load(trained[1])
    of = ct_data.open_volumes(model.cfg, "valid")
    findings = ["Emphysema", "Pneumothorax"]
    batch = pairs.read_slices(of, of.names[:1])
    encoded = encode_batch(model, params, batch)
    average = average_slices(model, params, of, of.names)[slice(*of.row(of.names[0])["occupied"])]

    def logit(slices, kept):
        one = {"slices": slices[kept][None], "position_mm": batch["position_mm"][:, kept]}
        one["mask"] = torch.ones(1, one["slices"].shape[1], dtype=torch.bool)
        placed = common_space.place_batch(model, params, one)
        return torch.logit(common_space.finding_probabilities(model, params, placed, findings)[0])

    voxels, features = batch["slices"][0], encoded["slices"][0]
    everything = list(range(len(voxels)))
    left_out = slice_effects(model, params, encoded, findings)
    alone = slice_effects(model, params, encoded, findings, average)
    for i in everything:
        # From the voxels: nothing of the embeddings kept in between is lost.
        want = logit(voxels, everything) - logit(voxels, [k for k in everything if k != i])
        torch.testing.assert_close(left_out[i], want, atol=1e-4, rtol=1e-4)
        inserted = average.clone()
        inserted[i] = features[i]
        want = logit(inserted, everything) - logit(average, everything)
        torch.testing.assert_close(alone[i], want, atol=1e-4, rtol=1e-4)
    assert alone.abs().max() > 1e-4
    # A finding that is sure: its probability is 1, with this slice or without it.
    sure = {**params, "contrast": {**params["contrast"], "log_scale": torch.tensor(30.0)}}
    probabilities = common_space.finding_probabilities(
        model, sure, common_space.place_batch(model, sure, encoded), findings
    )
    assert ((probabilities == 0) | (probabilities == 1)).all()
    ratio = params["contrast"]["log_scale"].exp().double() / sure["contrast"]["log_scale"].exp().double()
    torch.testing.assert_close(slice_effects(model, sure, encoded, findings, average) * ratio, alone)


def test_average_slices_are_those_at_the_same_height(trained):
    model, params = ct_clip_run.load(trained[1])
    of = ct_data.open_volumes(model.cfg, "valid")
    total, count = 0, 0
    for name in of.names:
        first, stop = of.row(name)["occupied"]
        everywhere = np.zeros((of.shape[0], 16), np.float32)
        everywhere[first:stop] = encode_batch(model, params, pairs.read_slices(of, [name]))["slices"][0]
        total, count = total + everywhere, count + (everywhere != 0).any(1, keepdims=True)
    found = average_slices(model, params, of, of.names).numpy()
    reached = count[:, 0] > 0
    np.testing.assert_allclose(found[reached], (total / np.maximum(count, 1))[reached], atol=1e-5)
    if not reached.all():
        np.testing.assert_allclose(found[~reached][0], total.sum(0) / count.sum(), atol=1e-5)


def test_a_scan_is_looked_at_with_one_pass_of_the_encoder(trained, monkeypatch):
    folder, calls = trained[1], []
    once = ct_clip.encode_volumes
    monkeypatch.setattr(ct_clip, "encode_volumes", lambda *a: calls.append(1) or once(*a))
    found = look.look_at_scan(folder, _scan())
    assert len(calls) == 1
    assert found["doubt"] == ""
    fitted = config.load_record(folder / "results/calibration.json", Calibration)
    findings = list(found["probability"])
    want = calibrate(fitted, [list(found["probability"].values())], findings)[0]
    assert list(found["calibrated"].values()) == want.tolist()
    # Calibration moves probability and threshold alike.
    for finding, threshold in found["threshold"].items():
        called = found["probability"][finding] >= threshold
        assert called == (found["calibrated"][finding] >= found["calibrated_threshold"][finding])
    first, stop = found["volume"].occupied
    assert found["slice_mm"].tolist() == [50.0 * i for i in range(stop - first)]
    assert {len(effect) for effect in found["slices"].values()} == {stop - first}
    assert list(found["slices"]) == findings
    named = look.look_at_scan(folder, _scan(), ["Pneumothorax"])
    assert named["calibrated"] == named["probability"]
    # Twice is once; a finding whose denial would be cut off is refused.
    assert look.look_at_scan(folder, _scan(), ["Pneumothorax"] * 2)["probability"] == named["probability"]
    with pytest.raises(ValueError, match=r"must have 64 tokens at most, .*'a very long finding"):
        look.look_at_scan(folder, _scan(), ["a very long finding " * 30])


def test_a_run_that_was_evaluated_before_there_was_calibration(trained, tmp_path, caplog):
    folder = tmp_path / "old"
    shutil.copytree(trained[1], folder)
    (folder / "results/calibration.json").unlink()
    (folder / "results/average_slices.npy").unlink()
    found, new = look.look_at_scan(folder, _scan()), look.look_at_scan(trained[1], _scan())
    assert found["probability"] == found["calibrated"] == new["probability"]
    assert found["threshold"] == found["calibrated_threshold"] == new["threshold"]
    assert "average_slices.npy: is not there, so slices are only left out one by one" in caplog.text
    np.save(folder / "results/average_slices.npy", np.zeros((6, 3)))
    with pytest.raises(
        ValueError, match=r"must hold an array \[6, 16\], found \[6, 3\]; evaluate the run again"
    ):
        look.look_at_scan(folder, _scan())


def test_a_page_of_one_scan(trained, tmp_path, monkeypatch, capsys):
    folder, scan, page = trained[1], _scan(), tmp_path / "page"
    grids = []
    picture_grid = plots.picture_grid
    monkeypatch.setattr(plots, "picture_grid", lambda *a: grids.append(a) or picture_grid(*a))
    scans_commands.print_findings(str(folder), str(scan), [], page=str(page))
    assert report.NOTICE in capsys.readouterr().out
    found = look.look_at_scan(folder, scan)
    rows = files.read_csv(page / "findings.csv")
    assert {r["Finding"]: float(r["Probability"]) for r in rows} == found["calibrated"]
    for row in rows:
        finding = row["Finding"]
        called = ""  # of one class only in this tiny validation split
        if finding in found["threshold"]:
            called = "yes" if found["probability"][finding] >= found["threshold"][finding] else "no"
        assert row["Called"] == called
    profile = files.read_csv(page / "slices.csv")
    assert [float(r["mm"]) for r in profile] == found["slice_mm"].tolist()
    for finding, effect in found["slices"].items():
        np.testing.assert_allclose([float(r[finding]) for r in profile], effect, rtol=1e-6)
        strongest = next(r for r in rows if r["Finding"] == finding)["Strongest slice, mm"]
        assert float(strongest) == found["slice_mm"][effect.argmax()]
    html = (page / "report.html").read_text()
    assert report.NOTICE in html
    assert all(finding in html for finding in found["calibrated"])
    assert found["volume"].name not in html
    assert len(list((page / "figures").iterdir())) == 2
    # What is drawn first is the strongest slice, with the patient's right on the left and the front on top.
    ((lines, _),) = grids
    name, pictures = lines[0]
    strongest = found["slices"][name.rpartition(":")[0]].argmax() + found["volume"].occupied[0]
    assert found["volume"].axes == "SAR"
    hu = preprocess.to_hu(found["volume"].voxels[strongest])[::-1, ::-1]
    np.testing.assert_array_equal(pictures[0], np.interp(hu, (-1000, 600), (0, 255)).astype(np.uint8))
    before = sorted(page.rglob("*"))
    with pytest.raises(ValueError, match="is there already; give a new folder"):
        scans_commands.print_findings(str(folder), str(scan), [], page=str(page))
    assert sorted(page.rglob("*")) == before
    monkeypatch.setattr(files, "write_csv", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scans_commands.print_findings(str(folder), str(scan), [], page=str(tmp_path / "other"))
    assert not [path for path in tmp_path.iterdir() if "other" in path.name and path.is_dir()]


def test_findings_in_own_words_are_drawn_beside_called_ones(tmp_path, trained, monkeypatch):
    found = look.look_at_scan(trained[1], _scan(), ["Lung opacity", "Pneumothorax", "Emphysema"])
    # Calibrated, all of these round to 1: the decision is that of the scores.
    found["probability"] |= {"Lung opacity": 0.7, "Emphysema": 0.5}
    found["threshold"] = dict.fromkeys(("Lung opacity", "Emphysema"), 0.6)
    found["calibrated"] |= dict.fromkeys(found["threshold"], 1.0)
    found["calibrated_threshold"] = dict.fromkeys(found["threshold"], 1.0)
    assert [line[3] for line in scan_page.table(found)] == ["yes", "", "no"]
    grids = []
    picture_grid = plots.picture_grid
    monkeypatch.setattr(plots, "picture_grid", lambda *a: grids.append(a) or picture_grid(*a))
    scan_page.write_page(found, tmp_path / "page")
    assert [name.rpartition(":")[0] for name, _ in grids[0][0]] == ["Lung opacity", "Pneumothorax"]
    assert "right on the left" in (tmp_path / "page/report.html").read_text()


def test_what_is_no_chest_is_said(trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        chest, "doubt_chest", lambda volume: "this does not look like a chest CT: <it is a head>"
    )
    scans_commands.print_findings(str(trained[1]), str(_scan()), [], page=str(tmp_path / "page"))
    assert "this does not look like a chest CT: <it is a head>" in caplog.text
    assert (
        "this does not look like a chest CT: &lt;it is a head&gt;"
        in (tmp_path / "page/report.html").read_text()
    )


def test_many_scans_are_embedded_into_one_array(trained, tmp_path, caplog):
    folder, out = str(trained[1]), tmp_path / "e.npy"
    scans = sorted(Path("data").glob("phantoms-*/test/*.nii.gz"))[:2]
    source = tmp_path / "scans"
    source.mkdir()
    for scan in scans:
        shutil.copy(scan, source)
    assert scans_commands.embed_scan(folder, str(source), str(out)) == 0
    embeddings = np.load(out)
    names = [scan.name.removesuffix(".nii.gz") for scan in scans]
    assert [r["VolumeName"] for r in files.read_csv(tmp_path / "e.csv")] == names
    for scan, row in zip(scans, embeddings, strict=True):
        np.testing.assert_allclose(look.look_at_scan(trained[1], scan)["embedding"], row, rtol=1e-6)
    (source / "broken.nii.gz").write_bytes(b"no scan")
    table = tmp_path / "list.csv"
    table.write_text("path\n" + "".join(f"scans/{p.name}\n" for p in sorted(source.iterdir())))
    out.unlink()
    assert scans_commands.embed_scan(folder, str(table), str(out)) == 3
    np.testing.assert_array_equal(np.load(out), embeddings)
    assert "broken: rejected: " in caplog.text
    before = table.read_text()
    with pytest.raises(ValueError, match=r"the names are written to .*list.csv, which is read here"):
        scans_commands.embed_scan(folder, str(table), str(tmp_path / "list.npy"))
    assert table.read_text() == before
    (tmp_path / "notes.csv").write_text("patient,note\n1,2\n")
    with pytest.raises(ValueError, match=r"the names would replace .*notes.csv, which is another table"):
        scans_commands.embed_scan(folder, str(table), str(tmp_path / "notes.npy"))
    assert (tmp_path / "notes.csv").read_text() == "patient,note\n1,2\n"
    table.write_text("path\nscans/broken.nii.gz\n")
    with pytest.raises(ValueError, match="all of its 1 scans were rejected"):
        scans_commands.embed_scan(folder, str(table), str(tmp_path / "none.npy"))
    assert not (tmp_path / "none.npy").exists()
    assert not (tmp_path / "none.csv").exists()
