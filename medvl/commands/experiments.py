"""`invoke experiments`, `labels` and `estimate`: what can be said of an experiment before it is trained."""

from collections.abc import Sequence

from medvl.base import config
from medvl.evaluation import results
from medvl.systems import run


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
    # Phantoms are drawn and their texts written if nobody has trained this experiment yet. What it logs
    # would stand between the command and its answer.
    system.prepare(cfg, _silent)
    print(system.labels(cfg, folder, number))


def print_memory(exp: str, overrides: Sequence[str] = (), processes: int = 1) -> None:
    """Print the memory that each stage of a run will need on one of so many processes, by part."""
    cfg, folder = run.resolve(exp, overrides)
    system = run.find_system(cfg.system)
    if system.memory is None:
        raise ValueError(_has_no("estimate", exp, cfg.system))
    per_process = f"each of {processes} processes" if processes > 1 else "one process"
    # Weights are not allocated for this: a laptop can tell what a run on GPUs will need.
    for stage, bytes_of_part in system.memory(cfg, folder, processes).items():
        largest_first = sorted(bytes_of_part.items(), key=lambda item: -item[1])
        rows = [(part, f"{nbytes / 1e9:.3f}") for part, nbytes in largest_first]
        rows.append(("at the peak", f"{sum(bytes_of_part.values()) / 1e9:.3f}"))
        print(f"stage {stage}, {per_process}:")
        print(results.markdown_table(("Part", "GB"), rows))


def _has_no(task: str, exp: str, system: str) -> str:
    return f"{task}: {exp} is a {system} experiment; only systems that train a language model have {task}"


def _silent(line: str) -> None:
    pass
