"""Correctness and speed of medvl on one GPU within 450 seconds; with --tiny, a rehearsal on the CPU.

    python -m benches.gpu.check [--out FOLDER] [--only phase,phase] [--budget 450] [--tiny]

Each phase runs in a process of its own with a time limit, so that a crash or a phase that takes too long costs only
what it had not measured yet. FOLDER/check.json is written anew after every phase; the last line printed is one JSON
document. README.md says how to run it on a bare machine.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported. Asking whether there is a GPU must not start CUDA, since processes are forked after it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from attrs import frozen

from benches.gpu import ct, data, inference, machine, training
from benches.gpu.measure import Place, Results, failure
from benches.gpu.models import PUBLISHED, QWEN25_7B
from medvl.hub.architectures import find_architecture

_LEAST_SECONDS = 8  # less than that is not worth a start
_NOT_SHOWN = ("profile", "profile of 8 tokens", "at")  # of a phase, in the last line


@frozen
class Phase:
    run: Callable[[Place, Results], None]
    limit: float  # seconds on an H100, at most


# In the order in which they are worth having, if time ends.
PHASES = {
    "ceilings": Phase(machine.ceilings, 40),
    "correct": Phase(machine.correct, 120),
    "qlora_7b": Phase(training.qlora_7b, 90),
    "decode_7b": Phase(inference.decode_7b, 60),
    "ct_step": Phase(ct.ct_step, 75),
    "train_4b": Phase(training.train_4b, 60),
    "encoder": Phase(ct.encoder, 45),
    "mixture": Phase(inference.mixture, 45),
    "vision_encoder": Phase(inference.vision_encoder, 40),
    "same_bits": Phase(machine.same_bits, 40),
    "compressor": Phase(data.compressor, 30),
    "data_path": Phase(data.data_path, 30),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the phases; returns their results by name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="gpu_check", help="folder for check.json")
    parser.add_argument("--only", default="", help=f"of {', '.join(PHASES)}")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for all phases")
    parser.add_argument(
        "--tiny", action="store_true", help="rehearse at toy sizes on the CPU, without limits"
    )
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(PHASES)
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        parser.error(f"--only: no phase {', '.join(unknown)}; there are {', '.join(PHASES)}")
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("check: no GPU here; --tiny rehearses on the CPU")
    place = Place(torch.device("cpu" if options.tiny else "cuda"), options.tiny)
    # Imported once, before the processes are forked.
    for config in (*PUBLISHED.values(), QWEN25_7B):
        find_architecture(config, "" if config["model_type"].startswith("dino") else "language")
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    return run_phases(place, names, folder, options.budget)


def run_phases(place: Place, names: Sequence[str], folder: Path, budget: float) -> dict[str, Any]:
    """{phase: its results}, each with its seconds; printed as they come, and as one JSON line at the end."""
    end = time.monotonic() + budget
    results: dict[str, Any] = {}
    for name in names:
        limit = PHASES[name].limit
        if not place.tiny:
            limit = min(limit, end - time.monotonic())
        if place.tiny or limit >= _LEAST_SECONDS:
            results[name] = run_phase(place, name, folder, None if place.tiny else limit)
        else:
            results[name] = {"error": "no time was left", "seconds": 0.0}
        (folder / "check.json").write_text(json.dumps(results, indent=1))
        outcome = results[name].get("error", "")
        print(f"{name}: {results[name]['seconds']} s {outcome}"[:300].rstrip(), flush=True)
    print(json.dumps({name: _shown(numbers) for name, numbers in results.items()}))
    return results


def _shown(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the last line says of a phase: of cases only those that failed, and no profiles."""
    if "failed" in numbers:
        names = ["cases", "failed", "seconds", "error", *numbers["failed"]]
        return {name: numbers[name] for name in names if name in numbers}
    return {name: value for name, value in numbers.items() if name not in _NOT_SHOWN}


def run_phase(place: Place, name: str, folder: Path, limit: float | None) -> dict[str, Any]:
    """A phase in a process of its own: what it measured, and why it ended early if it did."""
    path = folder / f"{name}.part.json"
    path.unlink(missing_ok=True)
    # A fork has everything imported, but no process may be forked once CUDA has started.
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    process = multiprocessing.get_context(method).Process(target=_inside, args=(place, name, path))
    start = time.monotonic()
    process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    results: dict[str, Any] = {}
    if path.exists():
        results = json.loads(path.read_text())
        path.unlink()
    if late:
        results["error"] = f"stopped at its limit of {limit:.0f} s"
    elif process.exitcode:
        results["error"] = f"the process ended with exit code {process.exitcode}"
    results["seconds"] = round(time.monotonic() - start, 1)
    return results


def _inside(place: Place, name: str, path: Path) -> None:
    warnings.simplefilter("ignore")
    results = Results(path)
    try:
        # A CPU that is shared is slower with a thread for each core.
        if place.on_gpu:
            torch.set_num_threads(os.cpu_count() or 1)
        PHASES[name].run(place, results)
    except BaseException as error:
        results["at"] = traceback.format_exc(limit=-6)[-1500:]
        results["error"] = failure(error)["error"]


if __name__ == "__main__":
    main()
