"""`invoke doctor`: what this machine has for medvl, and what each extra lacks."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable

from attrs import frozen
from packaging.requirements import Requirement

from medvl.base import files
from medvl.evaluation import results

_OWN = "medvl"  # the name of the extra that is always needed


@frozen(kw_only=True)
class Need:
    """A package that medvl or one of its extras needs."""

    extra: str  # "medvl" = always
    name: str
    wanted: str  # versions, "" = any
    found: str  # "" = it is not installed
    fits: bool


def check_installation(out: str = "") -> int:
    """Print versions, processor, memory and GPUs, and for each extra what is missing; returns 1 where something is
    missing that medvl always needs, else 0.

    Args:
        out: also write what `results.environment` says to this JSON file.
    """
    if out:
        files.check_writable(out)
    about = results.environment()
    rows = [(name, _text(value)) for name, value in about.items() if name != "packages"]
    rows += [
        ("memory", _memory()),
        ("free disk here", f"{shutil.disk_usage('.').free / 1e9:.1f} GB"),
        *_gpus(),
    ]
    print(results.markdown_table(("", "found"), rows))
    needs = list_needs()
    print(results.markdown_table(("for", "package", "versions", "found"), _need_rows(needs)))
    for fault in (*_missing_by_extra(needs), *_faults()):
        print(fault)
    if out:
        files.write_text(out, json.dumps(about, indent=1) + "\n")
    return int(any(not need.fits for need in needs if need.extra == _OWN))


def list_needs(requirements: Iterable[str] | None = None) -> list[Need]:
    """What medvl needs by its own metadata, each package once for every extra that needs it.

    Args:
        requirements: other lines than those of the installed medvl.
    """
    if requirements is None:
        requirements = importlib.metadata.requires("medvl") or ()
    needs = []
    for requirement in map(Requirement, requirements):
        extra = _extra_of(requirement)
        if extra in ("dev", "test", "peers") or requirement.name == "medvl":
            continue  # for work on medvl itself
        found = _version(requirement.name)
        fits = bool(found) and requirement.specifier.contains(found, prereleases=True)
        needs.append(
            Need(
                extra=extra, name=requirement.name, wanted=str(requirement.specifier), found=found, fits=fits
            )
        )
    return needs


def _extra_of(requirement: Requirement) -> str:
    """The extra that a requirement is for: the one that makes its marker true."""
    if requirement.marker is None:
        return _OWN
    for extra in importlib.metadata.metadata("medvl").get_all("Provides-Extra") or ():
        if requirement.marker.evaluate({"extra": extra}):
            return extra
    return _OWN


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _need_rows(needs: Iterable[Need]) -> list[tuple[str, str, str, str]]:
    rows = []
    for need in needs:
        found = need.found or "missing"
        rows.append((need.extra, need.name, need.wanted or "any", found if need.fits else f"{found} (!)"))
    return rows


def _missing_by_extra(needs: Iterable[Need]) -> list[str]:
    """A line for medvl and for each extra that lacks something, with the command that brings it."""
    lacking: dict[str, list[str]] = {}
    for need in needs:
        if not need.fits:
            lacking.setdefault(need.extra, []).append(need.name + need.wanted)
    lines = []
    for extra, names in lacking.items():
        target = "." if extra == _OWN else f"'.[{extra}]'"
        lines.append(f"{extra} lacks {', '.join(names)}: pip install -e {target}")
    return lines


def _faults() -> list[str]:
    """Packages that break others by being there: a torchvision for another torch than this one."""
    if not _version("torchvision"):
        return []
    # In a process of its own, as a failed import leaves torch half changed.
    code = "import torchvision; torchvision.ops.nms"
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0:
        return []
    return [
        f"torchvision {_version('torchvision')} does not work with torch {_version('torch')}, and transformers then cannot "
        "open image processors: pip uninstall torchvision (medvl needs none)"
    ]


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 1e9:.1f} GB"


def _gpus() -> list[tuple[str, str]]:
    import torch

    rows = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        rows.append((f"memory of GPU {i}", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    return rows


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)
