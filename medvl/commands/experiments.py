"""`invoke experiments`, `labels` and `estimate`: what can be said of an experiment before it is trained."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medvl.base import config
from medvl.evaluation import results
from medvl.systems import run
from medvl.training import trace
from medvl.training.estimate import Step


def print_experiments() -> None:
    """Print the experiments with a line each.

    Raises:
        ConfigError: there is none; the working folder is another one than the project's.
    """
    names = run.experiment_names()
    if not names:
        raise config.ConfigError(
            f"{run.EXPERIMENTS.absolute()}: holds no experiments (*.toml); run this in the project folder"
        )
    for name, description in names.items():
        print(f"{name:24} {description}")


def print_labels(exp: str, overrides: Sequence[str] = (), number: int = 0) -> None:
    """Print one training sample as the model gets it, the trained tokens between marks."""
    cfg, folder = run.resolve(exp, overrides)
    system = run.find_system(cfg.system)
    if system.labels is None:
        raise ValueError(_has_no("labels", exp, cfg.system))
    run.check_base(cfg, folder)
    # Phantoms are drawn and their texts written if nobody has trained this experiment yet. What it logs
    # would stand between the command and its answer.
    system.prepare(cfg, _silent)
    print(system.labels(cfg, folder, number))


def print_memory(exp: str, overrides: Sequence[str] = (), processes: int = 1, gpu: str = "h100") -> None:
    """Print the memory that each stage of a run will need on one of so many processes, by part, and the seconds
    that a step will take on a GPU of a kind.

    Raises:
        ValueError: no such GPU in `trace.GPUS`; an experiment of a system that has no estimate.
    """
    if gpu not in trace.GPUS:
        raise ValueError(f"estimate: --gpu must be one of {', '.join(trace.GPUS)}, got {gpu!r}")
    cfg, folder = run.resolve(exp, overrides)
    system = run.find_system(cfg.system)
    if system.memory is None:
        raise ValueError(_has_no("estimate", exp, cfg.system))
    run.check_base(cfg, folder)
    per_process = f"each of {processes} processes" if processes > 1 else "one process"
    # Weights are not allocated for this: a laptop can tell what a run on GPUs will need.
    for stage, step in system.memory(cfg, folder, processes).items():
        largest_first = sorted(step.memory.items(), key=lambda item: -item[1])
        rows = [(part, f"{nbytes / 1e9:.3f}") for part, nbytes in largest_first]
        rows.append(("at the peak", f"{sum(step.memory.values()) / 1e9:.3f}"))
        print(f"stage {stage}, {per_process}:")
        print(results.markdown_table(("Part", "GB"), rows))
        print(_seconds_lines(step, gpu))


def check_gpu(out: str, only: str, budget: int) -> int:
    """Run `benches/gpu/check.py` of the project folder in a process of its own; returns its exit status.

    Without a GPU it is the rehearsal at toy sizes on the CPU, and says so.

    Raises:
        ConfigError: the working folder is not the project's.
    """
    import torch

    if not Path("benches/gpu/check.py").is_file():
        raise config.ConfigError(
            f"{Path('benches/gpu').absolute()}: holds no check.py; run this in the project folder"
        )
    command = [sys.executable, "-m", "benches.gpu.check", "--out", out, "--budget", str(budget)]
    if only:
        command += ["--only", only]
    if not torch.cuda.is_available():
        print(
            "no GPU here: a rehearsal at toy sizes on the CPU; its numbers say nothing of a GPU", flush=True
        )
        command.append("--tiny")
    return subprocess.run(command).returncode


def _seconds_lines(step: Step, gpu: str) -> str:
    rates = step.rates(trace.GPUS[gpu])
    throughput = f"{_short(rates['samples_per_second'])} samples/s"
    if "tokens_per_second" in rates:
        throughput += f", {_short(rates['tokens_per_second'])} tokens/s"
    return (
        f"a step on one {gpu}: {_short(rates['seconds'])} s (estimated, not measured), {throughput}\n"
        f"{_short(step.work.flops / 1e12)} TFLOP, {step.work.kernels:,.0f} kernels; assumed: {trace.ASSUMPTIONS}\n"
    )


def _short(number: float) -> str:
    """Three digits, or whole with its thousands apart."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _has_no(task: str, exp: str, system: str) -> str:
    return f"{task}: {exp} is a {system} experiment; only systems that train a language model have {task}"


def _silent(line: str) -> None:
    pass
