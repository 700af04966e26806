"""CT preprocessing of one 512 x 512 x 300 int16 .nii.gz on one thread, beside a plain nibabel + torch pipeline and MONAI.

    pytest benches/bench_ct.py           each alone
    python benches/bench_ct.py           all in turns: CPU seconds, ratios, and the resident memory of a process that does one scan

The scan is a real chest (64 x 64 x 79) enlarged, with noise of sigma 25 HU inside the body; without the test data, a drawn one.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from isal import isal_zlib

from medvl.ct import scans
from medvl.ct.preprocess import CtConfig, preprocess_scan

SHAPE = (512, 512, 300)
CONFIGS = {
    "mm": CtConfig(),
    "mm, antialias off": CtConfig(antialias="off"),
    "reference": CtConfig(preset="reference"),
    "ctclip": CtConfig(preset="ctclip"),
    "merlin": CtConfig(preset="merlin"),
}


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make(tmp_path_factory.mktemp("ct") / "scan.nii.gz")
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGS)
def bench_preprocess(measure, scan, name):
    measure(preprocess_scan, scan, CONFIGS[name], rounds=5, voxels=SHAPE, preset=name)


def bench_inflate_alone(measure, scan):
    measure(inflate, scan, rounds=5, voxels=SHAPE)


def bench_read_scan(measure, scan):
    measure(scans.read_scan, scan, rounds=5, voxels=SHAPE)


def bench_naive(benchmark, scan):
    benchmark.pedantic(naive, (scan,), rounds=2)


def bench_monai(benchmark, scan):
    transforms = monai_merlin()
    benchmark.pedantic(transforms, (str(scan),), rounds=2)


def bench_merlin_equals_monai(benchmark, scan):
    ours = benchmark.pedantic(preprocess_scan, (scan, CtConfig(preset="merlin", dtype="int16")), rounds=1)
    theirs = monai_merlin()(str(scan))[0].numpy().transpose(2, 1, 0) * 2000 - 1000
    assert np.abs(ours.voxels - theirs).max() < 0.51


def inflate(path: Path) -> bytes:
    return isal_zlib.decompress(path.read_bytes(), wbits=31)


def naive(path: Path) -> np.ndarray:
    """What the reference does: nibabel, closest canonical, clip, float32, trilinear, pad, uint8."""
    image = nib.as_closest_canonical(nib.load(path))
    v = np.clip(image.get_fdata(), -1000, 1000).transpose(2, 1, 0).astype(np.float32)
    size = (160, 224, 224)
    scale = min(k / n for k, n in zip(size, v.shape, strict=True))
    new = [round(n * scale) for n in v.shape]
    v = F.interpolate(
        torch.from_numpy(np.ascontiguousarray(v))[None, None], size=new, mode="trilinear", align_corners=False
    )[0, 0].numpy()
    before = [(k - n) // 2 for k, n in zip(size, new, strict=True)]
    v = np.pad(v, [(b, k - n - b) for b, n, k in zip(before, new, size, strict=True)], constant_values=-1000)
    return ((v / 1000 + 1) / 2 * 255).clip(0, 255).astype(np.uint8)


def monai_merlin():
    """Merlin's transforms; the peer of preset `merlin`."""
    t = pytest.importorskip("monai.transforms")
    return t.Compose(
        [
            t.LoadImage(image_only=True),
            t.EnsureChannelFirst(),
            t.Orientation("RAS"),
            t.Spacing((1.5, 1.5, 3), mode="bilinear"),
            t.ScaleIntensityRange(-1000, 1000, 0, 1, clip=True),
            t.SpatialPad((224, 224, 160)),
            t.CenterSpatialCrop((224, 224, 160)),
        ]
    )


def monai_reference():
    """The reference's steps in MONAI: orientation, clip, one scale for all axes, pad."""
    t = pytest.importorskip("monai.transforms")
    scale = min(k / n for k, n in zip((224, 224, 160), SHAPE, strict=True))
    return t.Compose(
        [
            t.LoadImage(image_only=True),
            t.EnsureChannelFirst(),
            t.Orientation("RAS"),
            t.ScaleIntensityRange(-1000, 1000, 0, 1, clip=True),
            t.Resize([round(n * scale) for n in SHAPE], mode="trilinear"),
            t.SpatialPad((224, 224, 160)),
        ]
    )


def make(path: Path) -> Path:
    folder = Path(os.environ.get("MEDVL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    real = folder / "ct/nifti/cip_chest64.nii.gz"
    if real.exists():
        image = nib.load(real)
        v, affine = np.asanyarray(image.dataobj).astype(np.float32), image.affine
    else:
        g = np.mgrid[-1:1:64j, -1:1:64j, -1:1:79j]
        v, affine = (
            np.where((g[0] / 0.8) ** 2 + (g[1] / 0.6) ** 2 < 1, 40, -1000).astype(np.float32),
            np.diag([-4.2, -4.2, 4.0, 1]),
        )
    affine = affine @ np.diag([*(np.array(v.shape) / SHAPE), 1])
    v = F.interpolate(torch.from_numpy(v)[None, None], size=SHAPE, mode="trilinear")[0, 0].numpy()
    body = v > -900
    v[body] += np.random.default_rng(0).normal(0, 25, int(body.sum())).astype(np.float32)
    nib.save(nib.Nifti1Image(v.round().astype(np.int16), affine), path)
    return path


def _resident(path: Path, code: str) -> float:
    """MiB above import that a fresh process needs at its peak."""
    program = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[2]); import bench_ct as b; from pathlib import Path; "
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024; before = peak(); "
        f"p = Path(sys.argv[1]); {code}; print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, Path(__file__).parent],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def main(rounds: int = 4) -> None:
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder) / "scan.nii.gz")
        calls = {"inflate": lambda: inflate(path), "read_scan": lambda: scans.read_scan(path)}
        calls |= {name: (lambda cfg=cfg: preprocess_scan(path, cfg)) for name, cfg in CONFIGS.items()}
        calls |= {"naive reference": lambda: naive(path)}
        try:
            theirs = {"MONAI reference": monai_reference(), "MONAI merlin": monai_merlin()}
            calls |= {name: (lambda t=t: t(str(path))) for name, t in theirs.items()}
        except pytest.skip.Exception:
            print("MONAI is not installed: not compared")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.process_time()
                call()
                times[name].append(time.process_time() - start)
        floor, slow = statistics.median(times["inflate"]), statistics.median(times["naive reference"])
        for name, t in times.items():
            m = statistics.median(t)
            print(
                f"{name:20s} CPU median {m:7.3f} s  min {min(t):7.3f}  {m / floor:6.2f} x inflate  {slow / m:6.2f} x faster than naive"
            )
        raw = np.prod(SHAPE) * 2 / 2**20
        for name, code in {
            "mm": "b.preprocess_scan(p)",
            "reference": "b.preprocess_scan(p, b.CONFIGS['reference'])",
            "naive": "b.naive(p)",
        }.items():
            mib = _resident(path, code)
            print(
                f"resident {name:12s} {mib:7.0f} MiB above import = {mib / raw:.2f} x the raw scan of {raw:.0f} MiB"
            )


if __name__ == "__main__":
    main()
