"""Folders of drawn chest CTs in CT-RATE's layout, with labels and reports: free of cost and of patients, and their truth is known."""

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
    """Write `folder/{split}/{name}.nii.gz` and `{split}_{reports,labels,metadata}.csv` in CT-RATE's columns; `phantoms.json` comes last.

    Each volume is a pure function of (cfg, name): a run that was killed goes on where it stopped, and the files are the same bits.
    Args:
        workers: 1 works in this process; more are fresh processes, so a script needs `if __name__ == "__main__":`.
    Returns:
        number of volumes per split.
    Raises:
        ValueError: the folder holds phantoms of another PhantomConfig, or workers cannot start.
    """
    folder = Path(folder)
    plan = {split: list(volume_names(cfg, split)) for split in SPLITS}
    done = {split: len(volumes) for split, volumes in plan.items()}
    if _begun(cfg, folder).exists():
        return done
    work = partial(_write_volume, cfg, folder)
    volumes = [v for each in plan.values() for v in each]
    if workers > 1:
        with worker_pool(workers) as processes:
            rows = list(track(processes.map(work, volumes, chunksize=16), "drawing chests", len(volumes)))
    else:
        rows = [work(v) for v in track(volumes, "drawing chests")]
    metadata = dict(zip(volumes, rows, strict=True))
    for split, each in plan.items():
        if each:
            _write_tables(cfg, folder, split, [metadata[v] for v in each])
    files.write_text(
        folder / "phantoms.json", json.dumps({"config": asdict(cfg), "volumes": done}, indent=1) + "\n"
    )
    return done


def volume_names(cfg: PhantomConfig, split: str) -> Iterator[str]:
    """The names of a split, as in CT-RATE: split_patient_scan_recon ("train_12_a_1")."""
    count = {"train": cfg.patients - cfg.valid - cfg.test, "valid": cfg.valid, "test": cfg.test}[split]
    for patient in range(1, count + 1):
        scan = f"{split}_{patient}_a"
        yield f"{scan}_1"
        if _gen(cfg.seed, f"{scan} recons").random() < cfg.second_recon:
            yield f"{scan}_2"


def draw_volume_case(cfg: PhantomConfig, volume: str) -> ChestCase:
    """The case a volume shows; the reconstructions of one scan show the same."""
    return draw_chest_case(cfg, _gen(cfg.seed, names.scan_of(volume)))


def draw_volume_report(cfg: PhantomConfig, volume: str) -> dict[str, str]:
    """The report of a volume, by CT-RATE's column names without VolumeName."""
    scan = names.scan_of(volume)
    return write_chest_report(draw_chest_case(cfg, _gen(cfg.seed, scan)), _gen(cfg.seed, f"{scan} report"))


def draw_volume(cfg: PhantomConfig, volume: str) -> DrawnVolume:
    """The voxels of a volume."""
    return render(cfg, draw_volume_case(cfg, volume), _gen(cfg.seed, volume))


def _gen(seed: int, name: str) -> Gen:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _begun(cfg: PhantomConfig, folder: Path) -> Path:
    """The path of the last file; the config is written first, so that two configs never mix in one folder."""
    mine, start = json.loads(json.dumps(asdict(cfg))), folder / "phantoms.config.json"
    if start.exists():
        other = config.differences(config.read_settings(start), mine)
        if other:
            raise ValueError(
                f"{folder}: holds phantoms of another PhantomConfig ({'; '.join(other)}); choose another folder or delete it"
            )
    else:
        files.write_text(start, json.dumps(mine, indent=1) + "\n")
    return folder / "phantoms.json"


def _write_volume(cfg: PhantomConfig, folder: Path, name: str) -> dict[str, str]:
    """Write one volume unless it is there; returns its metadata row."""
    path, case = folder / names.patient_of(name).split("_")[0] / f"{name}.nii.gz", draw_volume_case(cfg, name)
    if not path.exists():
        with files.atomic(path) as tmp:
            tmp.write_bytes(
                igzip.compress(
                    _nifti(draw_volume(cfg, name), _gen(cfg.seed, f"{name} file")), compresslevel=1, mtime=0
                )
            )
    return _metadata(name, case, draw_view(cfg, _gen(cfg.seed, name)))


def _nifti(volume: DrawnVolume, gen: Gen) -> bytes:
    """A NIfTI-1 file: half of them hold HU, half raw values with the intercept in the header."""
    header = nib.Nifti1Header()
    header.set_data_shape(volume.hu.shape)
    header.set_data_dtype(np.int16)
    header.set_qform(volume.affine, 1)
    header.set_sform(volume.affine, 1)
    header.set_xyzt_units("mm")
    intercept = -1024 if gen.random() < 0.5 else 0
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = (
        1,
        intercept,
        352,
        b"n+1",
    )
    return header.binaryblock + bytes(4) + (volume.hu - np.int16(intercept)).tobytes(order="F")


def _write_tables(cfg: PhantomConfig, folder: Path, split: str, metadata: list[dict[str, str]]) -> None:
    volumes = [row["VolumeName"] for row in metadata]
    stem = [v.removesuffix(".nii.gz") for v in volumes]
    reports = [{"VolumeName": v} | draw_volume_report(cfg, s) for v, s in zip(volumes, stem, strict=True)]
    files.write_csv(folder / f"{split}_reports.csv", reports, REPORT_COLUMNS)
    labels = [{"VolumeName": v} | draw_volume_case(cfg, s).labels for v, s in zip(volumes, stem, strict=True)]
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
