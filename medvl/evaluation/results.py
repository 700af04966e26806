"""A number is a result: one record for evaluations and benches, the environment it was made in, and tables of both."""

import html
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, field, frozen

from medvl.base import files


@frozen(kw_only=True)
class Result:
    """One measured number. `low`/`high` bound the 95 % interval; nan where there is none."""

    what: str  # metric, e.g. "auroc"
    subject: str = ""  # finding, function, question type; "mean" for an average
    split: str = ""  # which data
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0  # samples the value rests on
    experiment: str = ""  # name-hash of the record
    commit: str = ""
    device: str = ""
    shape: str = ""
    latency_ms: float = math.nan
    peak_mib: float = math.nan
    extra: dict[str, Any] = field(factory=dict)


def write_results(path: files.PathLike, results: Iterable[Result]) -> None:
    """Write results as JSON lines, atomically; nan becomes null."""
    lines = [json.dumps({k: None if _isnan(v) else v for k, v in asdict(r).items()}) for r in results]
    files.write_text(path, "".join(line + "\n" for line in lines))


def read_results(path: files.PathLike) -> list[Result]:
    """Read what `write` wrote."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()
    ]
    return [Result(**{k: _fill(v) for k, v in row.items()}) for row in rows]


def environment() -> dict[str, Any]:
    """Python, torch, CUDA, GPU, packages and commit: what one needs to make a number again. Holds no names of people, hosts or paths."""
    import torch  # here: results.py is read by light tasks too

    wanted = (
        "torch",
        "transformers",
        "numpy",
        "h5py",
        "nibabel",
        "isal",
        "attrs",
        "cattrs",
        "tokenizers",
        "safetensors",
        "medvl",
    )
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "packages": {p: importlib.metadata.version(p) for p in wanted if _installed(p)},
        "commit": commit(),
    }


def device_name() -> str:
    """The name of what computes here."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()


def commit() -> str:
    """The commit of the source this runs from, `+` behind it when files differ from it; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    head, dirty = (
        _git(root, "rev-parse", "--short=12", "HEAD"),
        _git(root, "status", "--porcelain", "--untracked-files=no"),
    )
    return head + ("+" if head and dirty else "")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A GitHub Markdown table; numbers are right-aligned, floats get three decimals."""
    body = [[_cell(v) for v in row] for row in rows]
    numeric = [all(_is_number(r[i]) for r in body) and bool(body) for i in range(len(columns))]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("--:" if n else "---" for n in numeric) + "|"]
    return (
        "\n".join(lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in body])
        + "\n"
    )


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same table as HTML, escaped."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(v))}</td>" for v in row) + "</tr>\n" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"


def _cell(v: Any) -> str:
    if isinstance(v, float):
        return "–" if math.isnan(v) else f"{v:.3f}"
    return str(v)


def _is_number(text: str) -> bool:
    return text == "–" or text.replace(".", "", 1).replace("-", "", 1).isdigit()


def _fill(v: Any) -> Any:
    return math.nan if v is None else v


def _isnan(v: Any) -> bool:
    return isinstance(v, float) and math.isnan(v)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
