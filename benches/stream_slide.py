"""A slide of a million patches to 16 tokens, from disk: `python benches/stream_slide.py [--patches 1000000] [--kind moe]`.

Writes random 1024-wide features in float16 (2 GB) into a temporary folder, then measures in a process of its own each: the stream in chunks
(peak memory and time), only reading the same bytes, and x W^T of the router alone on features that are in memory already. The file has been
read before all of them, so that they find it in the same cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor

from medvl.components.compress import CompressConfig, compress, compress_stream, init_compress

D = 1024
_MOST_MIB = 300  # of the stream, beyond its imports


def write(path: Path, patches: int) -> None:
    """A block of random features over and over, each time turned by one column and shifted."""
    block = np.random.default_rng(0).standard_normal((8192, D), dtype=np.float32)
    with open(path, "wb") as f:
        for i, start in enumerate(range(0, patches, len(block))):
            (np.roll(block, i, 1)[: patches - start] + 0.1 * np.sin(i)).astype(np.float16).tofile(f)


def read(path: Path, chunk: int) -> Iterator[Tensor]:
    """Chunks [c, d]; not mapped, whose pages would count as memory of the process."""
    buffer = np.empty((chunk, D), np.float16)
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(memoryview(buffer).cast("B")):
            yield torch.from_numpy(buffer[: n // (2 * D)])


def high_water() -> int:
    """Bytes that this process held at most."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def model(kind: str) -> tuple[CompressConfig, dict]:
    cfg = CompressConfig(kind=kind, dim=D, slots=16)
    return cfg, init_compress(cfg, torch.Generator().manual_seed(0))


def stream(path: Path, kind: str, chunk: int) -> dict:
    before = high_water()
    cfg, params = model(kind)
    start = time.perf_counter()
    out = compress_stream(cfg, params, lambda: read(path, chunk))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": (high_water() - before) / 2**20, "tokens": out.tokens.tolist()}


def bytes_only(path: Path, chunk: int) -> dict:
    start = time.perf_counter()
    total = sum(x.shape[0] for x in read(path, chunk))
    return {"seconds": time.perf_counter() - start, "patches": total}


def gate(path: Path, kind: str, chunk: int) -> dict:
    """The router's logits of all patches, which lie in memory as float32; then all of `compress` on these."""
    x = torch.empty(path.stat().st_size // (2 * D), D)
    for i, part in enumerate(read(path, chunk)):
        x[i * chunk : i * chunk + len(part)] = part
    cfg, params = model("moe")
    start = time.perf_counter()
    torch.nn.functional.linear(x, params["gate"]["weight"], params["gate"]["bias"])
    seconds = time.perf_counter() - start
    cfg, params = model(kind)
    with torch.no_grad():
        start = time.perf_counter()
        tokens = compress(cfg, params, x[None]).tokens[0]
    return {"seconds": seconds, "one_shot_seconds": time.perf_counter() - start, "tokens": tokens.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--patches", type=int, default=1_000_000)
    parser.add_argument("--kind", default="moe")
    parser.add_argument("--chunk", type=int, default=5000)  # not a multiple of the blocks of one shot
    parser.add_argument("--part", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        what, path = args.part[0], Path(args.part[1])
        of = {
            "stream": lambda: stream(path, args.kind, args.chunk),
            "bytes": lambda: bytes_only(path, args.chunk),
        }
        print(json.dumps(of.get(what, lambda: gate(path, args.kind, args.chunk))()))
        return
    size = 2 * D * args.patches
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < 2 * size:
        raise SystemExit(
            f"stream_slide: {tempfile.gettempdir()} must have {2 * size / 1e9:.1f} GB free, has {free / 1e9:.1f}; set TMPDIR"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "slide.f16")
        write(path, args.patches)
        same = ["--kind", args.kind, "--chunk", str(args.chunk), "--part"]
        run = lambda what: json.loads(
            subprocess.check_output([sys.executable, __file__, *same, what, str(path)], text=True)
        )
        run("bytes")
        r = {"bytes": run("bytes"), "stream": run("stream"), "gate": run("gate")}
    streamed, once = (torch.tensor(r[n].pop("tokens")) for n in ("stream", "gate"))
    seconds = {n: r[n]["seconds"] for n in r} | {"one_shot": r["gate"]["one_shot_seconds"]}
    print(
        f"{r['bytes']['patches']:,} patches, {size / 1e9:.2f} GB, kind {args.kind}, {torch.get_num_threads()} threads"
    )
    for n, s in seconds.items():
        print(f"{n:10} {s:7.2f} s   stream / this {seconds['stream'] / s:6.2f}")
    difference = float((streamed - once).abs().max())
    print(
        f"peak beyond imports {r['stream']['peak_mib']:.0f} MiB; largest difference to one shot {difference:.1e}"
    )
    print(
        json.dumps(
            {
                "kind": args.kind,
                "seconds": seconds,
                "peak_mib": r["stream"]["peak_mib"],
                "difference": difference,
            }
        )
    )
    if r["stream"]["peak_mib"] > _MOST_MIB or difference > 1e-5:
        raise SystemExit(f"stream_slide: the peak must be at most {_MOST_MIB} MiB and the difference 1e-5")


if __name__ == "__main__":
    main()
