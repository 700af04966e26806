#!/usr/bin/env bash
# On the GPU machine: installs the wheels of carry.sh into .gpu/site, if there are some, and runs the check.
#   bash benches/gpu/run.sh [options of benches.gpu.check]      OUT=folder says where results go, gpu_check otherwise
cd "$(dirname "$0")/../.." || exit 1
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OUT="${OUT:-gpu_check}"
mkdir -p "$OUT"
if [ -d .gpu/wheels ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target .gpu/site .gpu/wheels/*.whl || exit 1
fi
export PYTHONPATH="$PWD/.gpu/site:$PWD:${PYTHONPATH:-}"
nvidia-smi --query-gpu=name,memory.total,memory.used,clocks.sm,power.limit --format=csv,noheader 2>/dev/null
python3 -m benches.gpu.check --out "$OUT" "$@" 2>"$OUT/stderr.txt" | tee "$OUT/log.txt"
status=${PIPESTATUS[0]}
tail -c 1500 "$OUT/stderr.txt" >&2
exit "$status"
