"""A number is a result: one record for evaluations and benches, the environment it was made in, and tables
of both.
"""

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
    lines = []
    for r in results:
        fields = asdict(r)
        for name, value in fields.items():
            if _is_nan(value):  # json would write NaN, which is not JSON
                fields[name] = None
        lines.append(json.dumps(fields) + "\n")
    files.write_text(path, "".join(lines))


def read_results(path: files.PathLike) -> list[Result]:
    """Read what `write_results` wrote."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        fields: dict[str, Any] = json.loads(line)
        for name, value in fields.items():
            if value is None:  # no field of a result is None
                fields[name] = math.nan
        rows.append(Result(**fields))
    return rows


def environment() -> dict[str, Any]:
    """Python, torch, CUDA, GPU, packages and commit: what is needed to reproduce a number. No names of
    people, hosts or paths.
    """
    import torch  # here: light tasks import this module too

    packages = (
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
    gpus = []
    if cuda:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "gpu": gpus,
        "packages": {p: importlib.metadata.version(p) for p in packages if _is_installed(p)},
        "commit": commit(),
    }


def device_name() -> str:
    """The name of the GPU, or of the CPU where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()


def commit() -> str:
    """The commit of the source this runs from, `+` behind it when files differ from it; "" outside a
    checkout.
    """
    root = Path(__file__).resolve().parents[2]
    # Asked first: from an installed package git would go up and may find another repository.
    if not (root / ".git").exists():
        return ""
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    # Files that git does not track are left out: runs and notes do not change the source.
    dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if head and dirty else "")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A GitHub Markdown table; numbers are right-aligned, floats get three decimals."""
    body = []
    for row in rows:
        body.append([_format_cell(value) for value in row])
    # A column is aligned as numbers if all of it are numbers or dashes.
    rules = []
    for i in range(len(columns)):
        numeric = bool(body) and all(_is_number(cells[i]) for cells in body)
        rules.append("--:" if numeric else "---")
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(rules) + "|"]
    for cells in body:
        # "|" would end the cell.
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(escaped) + " |")
    return "\n".join(lines) + "\n"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same table as HTML, escaped."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(_format_cell(v))}</td>" for v in row)
        body += f"<tr>{cells}</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"


def _format_cell(v: Any) -> str:
    if _is_nan(v):
        return "–"
    return f"{v:.3f}" if isinstance(v, float) else str(v)


def _is_number(text: str) -> bool:
    # One point and one minus; what is left are digits.
    return text == "–" or text.replace(".", "", 1).replace("-", "", 1).isdigit()


def _is_nan(v: Any) -> bool:
    return isinstance(v, float) and math.isnan(v)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *args: str) -> str:
    try:
        process = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or a disk that does not answer
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""
