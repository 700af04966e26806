"""Seconds per 1,000 headers of `invoke audit`: `python benches/audit.py [--scans 1000] [--slices 16]`.

Draws 20 files of 512 x 512 int16 slices with noise of 25 HU as in CT-RATE (deflate makes them half as large), each
linked under many names, and audits them with one worker and with two. The files are in the page cache: a slow
disk adds its own time for the first 1 to 2 MB of each scan. Reading the whole file is measured beside it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from medvl.ct import audit, scans

FILES = 20


def draw(folder: Path, count: int, slices: int) -> list[Path]:
    """`count` names of `FILES` different scans of v2's layout."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[-1:1:512j, -1:1:512j]
    body = np.where(x**2 + y**2 < 0.8, 40, -1000)
    paths = []
    for i in range(count):
        path = folder / "train_fixed" / f"train_{i}" / f"train_{i}_a" / f"train_{i}_a_1.nii.gz"
        path.parent.mkdir(parents=True)
        if i < FILES:
            hu = body[..., None] + rng.normal(0, 25, (512, 512, slices))
            affine = np.diag([-0.7, -0.7, 1.5, 1.0])
            nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), path)
        else:
            os.link(paths[i % FILES], path)
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scans", type=int, default=1000)
    parser.add_argument("--slices", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = draw(Path(folder), args.scans, args.slices)
        medians = {f"workers={workers}": measure(paths, workers) for workers in (1, 2)}
        start = time.perf_counter()
        for path in paths[:FILES]:
            scans.read_scan(path)
        medians["whole files"] = (time.perf_counter() - start) / FILES * 1000
        size = paths[0].stat().st_size
    rounded = {name: round(value, 2) for name, value in medians.items()}
    print(json.dumps({"scans": args.scans, "file_mb": round(size / 1e6, 1), "seconds_per_1000": rounded}))


def measure(paths: list[Path], workers: int) -> float:
    """Seconds per 1,000 scans without the start of the workers, which a single scan shows; median of 3."""
    seconds = []
    for _ in range(3):
        times = []
        for part in (paths[:1], paths):
            start = time.perf_counter()
            audit.audit_scans([(path.name, path) for path in part], {}, {}, workers)
            times.append(time.perf_counter() - start)
        seconds.append((times[1] - times[0]) / (len(paths) - 1) * 1000)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
