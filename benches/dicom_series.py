"""How fast a series of DICOM is read: MB/s of pixels and the ratio to reading the bytes of its files alone.

python benches/dicom_series.py [slices] [rounds]: a chest CT (a real one enlarged, if shared/data is there) is written as
uncompressed slices of 512 x 512 and as JPEG 2000. Readers take turns in one process with one thread; medians of CPU
seconds, those of child processes included, so that other work on the machine does not count. Peers:
highdicom, SimpleITK and dcm2niix (which also writes a NIfTI file). What each reads is compared with what was written.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_ct
import nibabel as nib
import numpy as np
import pydicom

from medvl.ct import scans

MEGABYTE = 1e6


def write(image: nib.Nifti1Image, folder: Path, slices: int, compressed: bool) -> np.ndarray:
    """A series of shuffled names; returns its voxels [x, y, z] in HU."""
    # The file's axes are already those of DICOM: left, posterior, superior.
    voxels = np.asanyarray(image.dataobj)[:, :, :slices]
    mm = nib.affines.voxel_sizes(image.affine)
    folder.mkdir()
    for i, name in enumerate(np.random.default_rng(0).permutation(slices)):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{i}"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.4", "1.2.5", "1.2.6"
        data.Modality, data.ImageType, data.InstanceNumber = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], i + 1
        data.SeriesNumber, data.PatientID, data.PatientName = 1, "1", "A"
        data.ImagePositionPatient = [-200, -200, round(i * float(mm[2]), 4)]
        data.ImageOrientationPatient, data.PixelSpacing = (
            [1, 0, 0, 0, 1, 0],
            [round(float(v), 4) for v in mm[1::-1]],
        )
        data.Rows, data.Columns = voxels.shape[1], voxels.shape[0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        stored = (voxels[:, :, i].T.clip(-1024, 3071) + 1024).astype(np.uint16)
        data.PixelData = stored.tobytes()
        if compressed:
            data.compress(pydicom.uid.JPEG2000Lossless, generate_instance_uid=False)
        data.save_as(folder / f"{name:04d}.dcm", enforce_file_format=True)
    return voxels.clip(-1024, 3071)


def _cpu_seconds() -> float:
    return time.process_time() + sum(os.times()[2:4])  # of this process, and of its children


def read_bytes(folder: Path) -> None:
    for path in folder.iterdir():
        path.read_bytes()


def by_highdicom(folder: Path) -> np.ndarray:
    import highdicom

    volume = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in folder.iterdir()])
    voxels = volume.array.transpose(2, 1, 0)
    return voxels if volume.affine[2, 0] > 0 else voxels[:, :, ::-1]


def by_simpleitk(folder: Path) -> np.ndarray:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return SimpleITK.GetArrayFromImage(reader.Execute()).transpose(2, 1, 0)


def by_dcm2niix(folder: Path) -> np.ndarray:
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(["dcm2niix", "-z", "n", "-f", "a", "-o", out, folder], check=True, capture_output=True)
        return np.asanyarray(nib.load(Path(out) / "a.nii").dataobj)[:, ::-1].copy()  # it turns y


def compare(folder: Path, voxels: np.ndarray, rounds: int) -> None:
    readers: dict[str, Callable] = {
        "medvl": lambda: scans.read_scan(folder).voxels,
        "highdicom": lambda: by_highdicom(folder),
        "SimpleITK": lambda: by_simpleitk(folder),
        "dcm2niix": lambda: by_dcm2niix(folder),
    }
    read_bytes(folder)
    seconds: dict[str, list[float]] = {"reading the bytes": [], **{name: [] for name in readers}}
    equal = {}
    for _ in range(rounds):
        for name, call in {"reading the bytes": lambda: read_bytes(folder), **readers}.items():
            start = _cpu_seconds()
            found = call()
            seconds[name].append(_cpu_seconds() - start)
            if found is not None:
                equal[name] = bool(np.array_equal(found, voxels))
    floor, size = statistics.median(seconds["reading the bytes"]), voxels.size * 2 / MEGABYTE
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{folder.name:13s} {name:18s} CPU median {median:6.3f} s  min {min(times):6.3f}  {size / median:7.1f} MB/s of "
            f"pixels  {median / floor:6.1f} x the bytes  every voxel equal: {equal.get(name, '-')}"
        )


def main(slices: int = 300, rounds: int = 5) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = nib.load(bench_ct.make(Path(folder) / "scan.nii.gz"))
        for name, count, turns in (("uncompressed", slices, rounds), ("jpeg2000", slices // 10, rounds)):
            series = Path(folder) / name
            compare(series, write(image, series, count, name != "uncompressed"), turns)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
