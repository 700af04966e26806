"""docs/ct_clip.md followed from its first to its last command, on drawn chests in the folders of CT-RATE."""

import glob
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from invoke import Collection, Program

import tasks
from medvl.base import files
from medvl.ct import names, protocols, reports
from medvl.hub import saving, skeletons, tokens
from medvl.phantoms import chests
from medvl.phantoms.chest_case import PhantomConfig
from tests.commands.test_impressions import Server

pytest.importorskip("httpx")
ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/ct_clip.md"
# A small experiment under the name of the page's, so that its commands are run as they are written.
EXPERIMENT = """
system = "ct_clip"
[data]
folder = "data/ct_rate"
stores = {test = "{folder}/valid.h5"}
labels = "{folder}/{split}_predicted_labels.csv"
[ct]
size = [6, 32, 32]
spacing_mm = [50.0, 12.0, 12.0]
[vit]
name = "facebook/dinov2-with-registers-base"
[fuse]
dim = 16
depth = 1
heads = 2
[words]
tokenizer = "openai/clip-vit-base-patch32"
[words.tower]
vocabulary = 400
context = 64
dim = 16
depth = 1
heads = 2
[contrast]
dim = 8
[train]
batch = 4
chunk = 4
[[train.stages]]
name = "contrast"
steps = 2
lr = 1e-3
[evaluate]
bootstrap = 20
"""
# What depends on the machine.
SMALLER = {"--workers 16": "--workers 2", "--nproc-per-node 8": "--nproc-per-node 2"}


def commands(page):
    """The commands of a page: its indented lines, joined where one ends in a backslash."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    return re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)


def draw_ct_rate(folder):
    """Drawn chests in the folders and tables of CT-RATE's second release, with all of its 18 findings."""
    cfg = PhantomConfig(patients=20, valid=12, seed=0, columns=(32, 32), slices=(8, 9))
    drawn = folder.parent / "drawn"
    chests.draw_chests(cfg, drawn)
    dataset = folder / "dataset"
    for split, other in (("train", "train"), ("valid", "validation")):
        for path in (drawn / split).iterdir():
            patient, scan = re.match(r"(\w+_\d+)_([a-z])", path.name).groups()
            place = dataset / f"{split}_fixed" / patient / f"{patient}_{scan}" / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        rows = files.read_csv(drawn / f"{split}_labels.csv")
        for row in rows:
            # What phantoms do not have; reconstructions of a scan have the same.
            scan = names.scan_of(row["VolumeName"].removesuffix(".nii.gz"))
            for j, finding in enumerate(reports.FINDINGS):
                row.setdefault(finding, str((len(scan) + int(scan.split("_")[1]) + j) % 2))
        files.write_csv(
            dataset / f"multi_abnormality_labels/{split}_predicted_labels.csv",
            rows,
            ("VolumeName", *reports.FINDINGS),
        )
        for source, target in (("metadata", "metadata"), ("reports", "radiology_text_reports")):
            (dataset / target).mkdir(exist_ok=True)
            shutil.copy(drawn / f"{split}_{source}.csv", dataset / target / f"{other}_{source}.csv")
        listed = dataset / f"metadata/no_chest_{split}.txt"
        listed.write_text(f"{split}_4_a_1.nii.gz\n")
    return drawn


def draw_radchest(folder):
    """Drawn chests as RAD-ChestCT publishes its own: arrays that grow to inferior, posterior and left."""
    cfg = PhantomConfig(patients=5, seed=1, columns=(32, 32), slices=(8, 9))
    abnormalities = [group.split("|")[0] for group in protocols._ABNORMALITIES.split()]
    columns = [f"{name}*{place}" for name in abnormalities for place in ("left_lung", "heart")]
    rows = []
    (folder / "npz").mkdir(parents=True)
    for i, volume in enumerate(chests.volume_names(cfg, "train")):
        drawn = chests.draw_volume(cfg, volume)
        hu = drawn.hu.transpose(2, 1, 0)[::-1, ::-1, ::-1]
        # Its voxels are of 0.8 mm, with which the chest would be smaller than one voxel of the experiment.
        hu = hu.repeat(16, 0).repeat(6, 1).repeat(6, 2)
        np.savez_compressed(folder / f"npz/tst{i:05d}.npz", ct=hu.clip(-1000, 1000).astype(np.int16))
        rows.append({"NoteAcc_DEID": f"tst{i:05d}"} | {c: str((i + j) % 2) for j, c in enumerate(columns)})
    files.write_csv(folder / "imgtest_Abnormality_and_Location_Labels.csv", rows, ["NoteAcc_DEID", *columns])


def write_models(cache):
    """An encoder and a tokenizer under the names that the page uses, in a hub cache."""

    def snapshot(name):
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        return folder / "snapshots" / "abc"

    gen = torch.Generator().manual_seed(0)
    vit = {
        **{"model_type": "dinov2_with_registers", "hidden_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
    }
    saving.save_skeleton(*skeletons.init_skeleton(vit, gen), snapshot("facebook/dinov2-with-registers-base"))
    tokenizer = tokens.train_bpe(["The heart is normal. There is no effusion."], 300)
    tokenizer.save_pretrained(snapshot("openai/clip-vit-base-patch32"))


@pytest.fixture
def place(tmp_path):
    """A working folder with what the page takes for granted: the project, CT-RATE, a hospital's own files."""
    work = tmp_path / "work"
    (work / "experiments").mkdir(parents=True)
    (work / "experiments/ctclip_vitb.toml").write_text(EXPERIMENT)
    frozen = EXPERIMENT.replace("lr = 1e-3", 'lr = 1e-3\ntrain = ["(fuse|text|project|contrast)/.*"]')
    (work / "experiments/ctclip_vitb_frozen.toml").write_text(frozen)
    drawn = draw_ct_rate(work / "CT-RATE")
    shutil.copy(drawn / "valid" / "valid_1_a_1.nii.gz", work / "new.nii.gz")
    rows = files.read_csv(drawn / "valid_reports.csv")
    for row in rows:
        row |= {"VolumeName": row["VolumeName"].replace("valid", "hospital"), "Impressions_EN": ""}
    files.write_csv(work / "hospital/reports.csv", rows, list(rows[0]))
    draw_radchest(work / "RAD-ChestCT")
    write_models(tmp_path / "hub")
    return work


def test_the_page_is_followed_to_its_end(place, tmp_path, monkeypatch):
    """In this process, since importing torch for each command would take longer than all else."""
    server = Server()
    smaller = SMALLER | {"http://127.0.0.1:8000": server.url}
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    app = Program(namespace=Collection.from_module(tasks))
    shown = commands(PAGE)
    assert len(shown) > 10
    for command in shown:
        for written, run in smaller.items():
            command = command.replace(written, run)
        if not command.startswith("invoke "):
            subprocess.run(["bash", "-c", command], check=True)
            continue
        # As a shell does: what is run later finds the folders that were made before.
        words = []
        for word in shlex.split(command):
            words += glob.glob(word) if "*" in word else [word]
        status = None
        try:
            app.run(words, exit=False)
        except SystemExit as e:
            status = e.code
        assert not status, command
    server.close()
