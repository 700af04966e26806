"""Folders of drawn chest CTs in CT-RATE's layout, with labels and reports, of which the truth is known."""

import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from attrs import asdict
from isal import igzip

from medvl.base import config, files
from medvl.base.display import track
from medvl.base.workers import worker_pool
from medvl.ct import names
from medvl.phantoms.chest_case import FINDINGS, ChestCase, Gen, PhantomConfig, draw_chest_case
from medvl.phantoms.chest_report import write_chest_report
from medvl.phantoms.chest_voxels import DrawnVolume, View, draw_view, render

REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
METADATA_COLUMNS = (
    "VolumeName",
    "Manufacturer",
    "PatientSex",
    "PatientAge",
    "ConvolutionKernel",
    "Rows",
    "Columns",
    "NumberofSlices",
    "XYSpacing",
    "ZSpacing",
    "RescaleIntercept",
    "RescaleSlope",
)
SPLITS = ("train", "valid", "test")


def draw_chests(cfg: PhantomConfig, folder: files.PathLike, workers: int = 1) -> dict[str, int]:
    """Write `folder/{split}/{name}.nii.gz` and `{split}_{reports,labels,metadata}.csv` in CT-RATE's columns.

    Each volume is a pure function of (cfg, name): a run that was killed goes on where it stopped, and the
    files are the same bits. `phantoms.json` comes last, and marks a complete folder.

    Args:
        workers: 1 works in this process; more are fresh processes, so a script needs `if __name__ ==
            "__main__":`.
    Returns:
        number of volumes per split.
    Raises:
        ValueError: the folder holds phantoms of another PhantomConfig, or workers cannot start.
    """
    folder = Path(folder)
    names_of = {split: list(volume_names(cfg, split)) for split in SPLITS}
    counts = {split: len(volumes) for split, volumes in names_of.items()}
    complete = folder / "phantoms.json"
    # Before anything is written or skipped: files of another config must not be mixed with these.
    _check_config(cfg, folder)
    if complete.exists():
        return counts
    write = partial(_write_volume, cfg, folder)
    volumes: list[str] = []
    for split in SPLITS:
        volumes += names_of[split]
    if workers > 1:
        with worker_pool(workers) as processes:
            written = processes.map(write, volumes, chunksize=16)
            rows = list(track(written, "drawing chests", len(volumes)))
    else:
        rows = [write(volume) for volume in track(volumes, "drawing chests")]
    metadata = dict(zip(volumes, rows, strict=True))
    for split, split_volumes in names_of.items():
        if split_volumes:
            _write_tables(cfg, folder, split, [metadata[volume] for volume in split_volumes])
    # Last: its presence says that the folder is complete.
    record = {"config": asdict(cfg), "volumes": counts}
    files.write_text(complete, json.dumps(record, indent=1) + "\n")
    return counts


def volume_names(cfg: PhantomConfig, split: str) -> Iterator[str]:
    """The names of a split, as in CT-RATE: split_patient_scan_recon ("train_12_a_1")."""
    patients = {"train": cfg.patients - cfg.valid - cfg.test, "valid": cfg.valid, "test": cfg.test}
    for patient in range(1, patients[split] + 1):
        scan = f"{split}_{patient}_a"
        yield f"{scan}_1"
        if _generator(cfg.seed, f"{scan} recons").random() < cfg.second_recon:
            yield f"{scan}_2"


def draw_volume_case(cfg: PhantomConfig, volume: str) -> ChestCase:
    """The case of a volume; the reconstructions of one scan have the same."""
    return draw_chest_case(cfg, _generator(cfg.seed, names.scan_of(volume)))


def draw_volume_report(cfg: PhantomConfig, volume: str) -> dict[str, str]:
    """The report of a volume, by CT-RATE's column names without VolumeName."""
    scan = names.scan_of(volume)
    return write_chest_report(draw_volume_case(cfg, volume), _generator(cfg.seed, f"{scan} report"))


def draw_volume(cfg: PhantomConfig, volume: str) -> DrawnVolume:
    """The voxels of a volume."""
    return render(cfg, draw_volume_case(cfg, volume), _generator(cfg.seed, volume))


def _generator(seed: int, name: str) -> Gen:
    """A generator for one use, by its name: what one volume draws does not depend on any other."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _check_config(cfg: PhantomConfig, folder: Path) -> None:
    """Refuse a folder of another config. The config is written first, so that two never mix in one folder."""
    config_file = folder / "phantoms.config.json"
    record = json.loads(json.dumps(asdict(cfg)))  # tuples become lists, as in the file
    if not config_file.exists():
        files.write_text(config_file, json.dumps(record, indent=1) + "\n")
        return
    differences = config.differences(config.read_settings(config_file), record)
    if differences:
        raise ValueError(
            f"{folder}: holds phantoms of another PhantomConfig ({'; '.join(differences)}); choose another "
            "folder or delete it"
        )


def _write_volume(cfg: PhantomConfig, folder: Path, name: str) -> dict[str, str]:
    """Write one volume unless it is there; returns its metadata row."""
    split = names.patient_of(name).split("_")[0]
    path = folder / split / f"{name}.nii.gz"
    if not path.exists():
        nifti = _encode_nifti(draw_volume(cfg, name), _generator(cfg.seed, f"{name} file"))
        with files.atomic(path) as tmp:
            # mtime=0: the same volume is the same file.
            tmp.write_bytes(igzip.compress(nifti, compresslevel=1, mtime=0))
    # A fresh generator gives the view of the volume again, also of one that was there already.
    view = draw_view(cfg, _generator(cfg.seed, name))
    return _metadata(name, draw_volume_case(cfg, name), view)


def _encode_nifti(volume: DrawnVolume, gen: Gen) -> bytes:
    """A NIfTI-1 file. Half of them hold HU, half raw values with the intercept in the header."""
    intercept = -1024 if gen.random() < 0.5 else 0
    header = nib.Nifti1Header()
    header.set_data_shape(volume.hu.shape)
    header.set_data_dtype(np.int16)
    header.set_qform(volume.affine, 1)
    header.set_sform(volume.affine, 1)
    header.set_xyzt_units("mm")
    header["scl_slope"] = 1
    header["scl_inter"] = intercept
    header["vox_offset"] = 352  # bytes of the header (348) and of the empty extension after it (4)
    header["magic"] = b"n+1"
    stored = volume.hu - np.int16(intercept)
    return header.binaryblock + bytes(4) + stored.tobytes(order="F")


def _write_tables(cfg: PhantomConfig, folder: Path, split: str, metadata: list[dict[str, str]]) -> None:
    reports, labels = [], []
    # The report and the labels of a volume are drawn again: they are pure functions of its name.
    for row in metadata:
        file_name = row["VolumeName"]
        volume = file_name.removesuffix(".nii.gz")
        report = draw_volume_report(cfg, volume)
        case = draw_volume_case(cfg, volume)
        reports.append({"VolumeName": file_name} | report)
        labels.append({"VolumeName": file_name} | case.labels)
    files.write_csv(folder / f"{split}_reports.csv", reports, REPORT_COLUMNS)
    files.write_csv(folder / f"{split}_labels.csv", labels, ("VolumeName", *FINDINGS))
    files.write_csv(folder / f"{split}_metadata.csv", metadata, METADATA_COLUMNS)


def _metadata(name: str, case: ChestCase, view: View) -> dict[str, str]:
    """A row of CT-RATE's metadata; the rescale values are those of the raw images, as there."""
    nz, ny, nx = view.shape
    return {
        "VolumeName": f"{name}.nii.gz",
        "Manufacturer": "Phantom",
        "PatientSex": case.sex,
        "PatientAge": f"{case.age:03d}Y",
        "ConvolutionKernel": view.kernel,
        "Rows": str(ny),
        "Columns": str(nx),
        "NumberofSlices": str(nz),
        "XYSpacing": f"[{view.step[2]}, {view.step[1]}]",
        "ZSpacing": str(view.step[0]),
        "RescaleIntercept": "-1024",
        "RescaleSlope": "1",
    }
