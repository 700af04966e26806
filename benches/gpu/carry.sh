#!/usr/bin/env bash
# On a machine with a package index: fetches what a bare GPU machine lacks into .gpu/ (some 20 MB, ignored by git).
#   bash benches/gpu/carry.sh [PYTHON [CUDA]]     Python of the GPU machine, such as 3.12; CUDA of its torch, such as 130
# Then carry the repository with .gpu/ to the GPU machine, and run there: bash benches/gpu/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-3.12} cuda=${2:-130}
rm -rf .gpu && mkdir -p .gpu/wheels

fetch() {
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .gpu/wheels "$1"
}
# Dependencies of medvl that an image with torch and transformers may not have, and peers to measure against.
for package in 'attrs>=24' 'cattrs>=25.1' 'einops>=0.8' 'h5py>=3.11' 'invoke>=2.2' 'isal>=1.7' 'nibabel>=5.3' \
  'pillow>=11' 'tqdm>=4.66' 'peft>=0.17' 'accelerate>=1.0' 'psutil>=6'; do
  fetch "$package"
done
fetch 'bitsandbytes>=0.50'
# Its wheel holds a library for each version of CUDA, 125 MB in all; one of them and the CPU's are enough.
CUDA=$cuda python3 - <<'P'
import os, pathlib, zipfile
(whole,) = pathlib.Path(".gpu/wheels").glob("bitsandbytes-*.whl")
kept = ("_cpu.so", f"_cuda{os.environ['CUDA']}.so")
with zipfile.ZipFile(whole) as wheel:
    for name in wheel.namelist():
        if not name.endswith(".so") or name.endswith(kept):
            wheel.extract(name, ".gpu/site")
whole.unlink()
P
du -sh .gpu
