"""Peak memory and time of loading a checkpoint to 4 bits: `python benches/load_nf4.py [folder]`.

Writes a random bf16 checkpoint in the shape of Qwen3-1.7B (2.0 billion parameters, one file) unless `folder` holds one, then loads it in
a process of its own.
"""

import json
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from medvl.hub import loading, skeletons
from medvl.weights import four_bit, lazy

SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


def bits_per_weight(params: dict) -> float:
    """Bits that a quantised weight takes on average, scales included."""
    quantised = {name: w for name, w in params.items() if isinstance(w, four_bit.FourBit)}
    return 8 * lazy.nbytes(quantised) / max(1, sum(w.numel() for w in quantised.values()))


def write(folder: Path, config: dict = SHAPE) -> None:
    """One safetensors file, written a tensor at a time."""
    module = skeletons.empty_skeleton(config, head="language").module
    header, at = {}, 0
    for n, p in module.named_parameters():
        header[n] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [at, at + 2 * p.numel()]}
        at += 2 * p.numel()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    gen = torch.Generator().manual_seed(0)
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for p in module.parameters():
            t = torch.empty(p.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=gen)
            f.write(t.view(torch.uint8).numpy().data)


def high_water() -> int:
    """Bytes that this process held at most; `getrusage` would count what its parent held when it started it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def load(folder: Path) -> dict:
    before = high_water()
    start = time.perf_counter()
    _, params = loading.load_skeleton(
        folder, head="language", dtype=torch.bfloat16, transform=four_bit.quantizer()
    )
    seconds = time.perf_counter() - start
    return {
        "parameters": sum(w.numel() for w in params.values()),
        "bits_per_quantised_weight": round(bits_per_weight(params), 3),
        "size_gb": lazy.nbytes(params) / 1e9,
        "file_gb": (folder / "model.safetensors").stat().st_size / 1e9,
        "peak_gb": high_water() / 1e9,
        "after_imports_gb": before / 1e9,
        "seconds": seconds,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load(Path(sys.argv[2]))))
        sys.exit()
    import subprocess

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(sys.argv[1] if sys.argv[1:] else tmp)
        if not (folder / "model.safetensors").exists():
            write(folder)
        done = subprocess.run(
            [sys.executable, __file__, "--load", str(folder)], check=True, capture_output=True, text=True
        )
    r = json.loads(done.stdout.strip().splitlines()[-1])
    bits = r["bits_per_quantised_weight"]
    print(
        f"{r['parameters'] / 1e9:.2f} billion parameters, file {r['file_gb']:.2f} GB, {bits} bits per quantised weight"
    )
    print(
        f"in memory {r['size_gb']:.2f} GB, peak {r['peak_gb']:.2f} GB (imports {r['after_imports_gb']:.2f}), {r['seconds']:.0f} s"
    )
    print(json.dumps(r))
