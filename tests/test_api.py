"""The public names, and what importing them costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import medvl


def _fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_loads_nothing_heavy():
    assert (
        _fresh(
            "import sys, medvl; print([m for m in ('torch', 'transformers', 'h5py', 'matplotlib') if m in sys.modules])"
        )
        == "[]"
    )
    heavy = "import sys; from medvl.systems import run; print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    assert _fresh(heavy) == "[]"


def test_importing_medvl_does_not_import_transformers():
    """It takes seconds, and a list of tasks must not: every import of it stands inside a function."""
    for path in Path(medvl.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", None) or ""]
            )
            assert not any(n.split(".")[0] == "transformers" for n in names), path


def test_every_public_name_is_there_and_stays_what_it_is():
    """A submodule of the same name would take a function's place once it is imported."""
    code = "import medvl; {n: getattr(medvl, n) for n in medvl.__all__}; import sys; from types import ModuleType; "
    code += "import medvl.systems.run; print([n for n in medvl.__all__ if isinstance(getattr(medvl, n), ModuleType)])"
    assert _fresh(code) == "[]"
    assert all(getattr(medvl, n).__doc__ for n in medvl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prepocess'"):
        medvl.prepocess  # noqa: B018


def test_invoke_lists_the_tasks_without_torch():
    code = (
        "import sys; import tasks; print([m for m in ('torch', 'transformers', 'medvl') if m in sys.modules])"
    )
    assert _fresh(code) == "[]"
