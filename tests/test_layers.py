"""The import rule: a package imports only from packages before it, and inside a package there is no circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = (
    *("base", "weights", "components", "evaluation", "hub", "training"),
    *("ct", "language", "documents", "phantoms", "slides", "adapters", "systems", "serve", "commands"),
)
HTTP = ("api", "forms", "http", "responses", "site", "page_routes", "chat_routes", "room_routes")
DOORS = {  # a heavy package, and the only files that import it
    "transformers": ("hub",),
    "bitsandbytes": ("weights/four_bit.py",),
    **dict.fromkeys(("dask", "distributed"), ("base/cluster.py",)),
    "cattrs": ("base/config.py",),
    "pydicom": ("base/dicom.py", "ct/dicom.py", "language/dicom_image.py", "documents/redact_dicom.py"),
    "datasets": ("documents/source_rows.py",),
    "pyarrow": ("documents/source_rows.py",),
    "invoke": ("../tasks.py",),
    "pypdfium2": ("serve/uploads.py",),
    "rapidocr": ("documents/read_page.py",),
    "prometheus_client": ("serve/metrics.py",),
    "uvicorn": ("commands/serve.py",),
    **dict.fromkeys(("fastapi", "pydantic"), tuple(f"serve/{name}.py" for name in HTTP)),
    "starlette": tuple(f"serve/{name}.py" for name in (*HTTP, "ui")),
    "gradio": ("serve/ui.py", "serve/ui_tabs.py"),
    "llguidance": ("language/json_schema.py",),
    "httpx": (
        "serve/remote.py",
        "serve/ui_client.py",
    ),
}
ROOT = Path(__file__).resolve().parents[1]


def imported(file):
    """Names of all modules that a file imports; `from a import b` may import the module a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(root):
    """What breaks the rule in `root`/medvl, a sentence each."""
    modules = {
        ".".join(file.relative_to(root).with_suffix("").parts): file
        for file in (root / "medvl").rglob("*.py")
    }
    graph = {name: imported(file) & {*modules} for name, file in modules.items()}
    wrong = []
    for name, targets in graph.items():
        for target in targets if name.count(".") > 1 else ():
            package, other = name.split(".")[1], target.split(".")[1]
            if PACKAGES.index(other) > PACKAGES.index(package):
                wrong.append(f"{name} imports {target}, which comes later")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        wrong.append(f"a circle: {' imports '.join(reversed(e.args[1]))}")
    return wrong


def test_every_package_imports_only_packages_before_it():
    assert not wrong_imports(ROOT)


def test_packages_on_the_list_are_those_that_there_are():
    assert {p.name for p in (ROOT / "medvl").iterdir() if (p / "__init__.py").exists()} == {*PACKAGES}
    assert [p.name for p in (ROOT / "medvl").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize(
    "face", sorted((ROOT / "medvl").glob("*/**/__init__.py")), ids=lambda face: face.parent.name
)
def test_every_package_says_what_it_offers(face):
    """Its docstring names each of its modules, so that a newcomer finds them and none is left behind."""
    text = ast.get_docstring(ast.parse(face.read_text())) or ""
    modules = {file.stem for file in face.parent.glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize(
    ("file", "line", "finding"),
    [
        (
            "base/tree.py",
            "from medvl.hub import tokens",
            "medvl.base.tree imports medvl.hub.tokens, which comes later",
        ),
        ("ct/names.py", "from medvl.ct import ingest", "a circle"),
    ],
)
def test_an_import_that_runs_back_is_found(tmp_path, file, line, finding):
    for module in ("base/tree.py", "hub/tokens.py", "ct/names.py", "ct/ingest.py"):
        path = tmp_path / "medvl" / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from medvl.ct import names\n" if module == "ct/ingest.py" else "")
    assert not wrong_imports(tmp_path)
    (tmp_path / "medvl" / file).write_text(line + "\n")
    (wrong,) = wrong_imports(tmp_path)
    assert wrong.startswith(finding)


def test_heavy_packages_have_their_doors():
    for file in [*(ROOT / "medvl").rglob("*.py"), ROOT / "tasks.py"]:
        for heavy in {name.split(".")[0] for name in imported(file)} & DOORS.keys():
            allowed = [(ROOT / "medvl" / door).resolve() for door in DOORS[heavy]]
            assert any(file.is_relative_to(door) for door in allowed), (
                f"{file} imports {heavy}; only {DOORS[heavy]} may"
            )
