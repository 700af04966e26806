"""How plain the code is, package by package: a table of figures that keep it readable, with what they should stay below.

python benches/measure_code.py [FOLDER ...]        (default: medvl and each of its packages)
"""

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Words that belong into a sentence: as the name of a variable they do not say what it holds.
VAGUE_NAMES = (
    *(
        "found",
        "held",
        "of",
        "how",
        "said",
        "there",
        "kept",
        "whole",
        "few",
        "like",
        "own",
        "each",
        "made",
        "done",
    ),
    *(
        "given",
        "about",
        "wanted",
        "known",
        "what",
        "where",
        "out",
        "rest",
        "parts",
        "one",
        "other",
        "told",
        "asked",
    ),
    *("shown", "seen", "taken", "turn"),
)
LINE_LENGTH = 110
LONG_FUNCTION = 60  # lines
AIMS = {
    "AST nodes per line": "8.5",
    "comprehensions per 100": "3.5",
    "inline ifs per 100": "2",
    "comments per 100": "7 or more",
    "long lines, %": "1",
    "vague names, %": "1",
    "long functions": "10 in all",
    "names in several modules": "",
}


def measure_folder(folder: Path) -> dict[str, float]:
    """The figures of all Python files below `folder`."""
    counts: Counter[str] = Counter()
    bound_names: Counter[str] = Counter()
    public_names: Counter[str] = Counter()
    function_lines: list[int] = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        counts.update(count_lines(text))
        counts.update(count_nodes(tree))
        bound_names.update(names_bound_in(tree))
        public_names.update(names_offered_by(tree))
        function_lines += [lines_of(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    code = max(1, counts["code"])
    vague = sum(bound_names[name] for name in VAGUE_NAMES)
    return {
        "lines": counts["lines"],
        "AST nodes per line": counts["nodes"] / code,
        "comprehensions per 100": 100 * counts["comprehensions"] / code,
        "inline ifs per 100": 100 * counts["inline ifs"] / code,
        "comments per 100": 100 * counts["comments"] / max(1, counts["lines"]),
        "long lines, %": 100 * counts["long lines"] / max(1, counts["lines"]),
        "vague names, %": 100 * vague / max(1, sum(bound_names.values())),
        "median function": statistics.median(function_lines or [0]),
        "long functions": sum(lines > LONG_FUNCTION for lines in function_lines),
        "names in several modules": sum(count > 1 for count in public_names.values()),
    }


def count_lines(text: str) -> Counter[str]:
    lines = text.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return Counter(
        {
            "lines": len(lines),
            "long lines": sum(len(line) > LINE_LENGTH for line in lines),
            "code": sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines),
            "comments": sum(token.type == tokenize.COMMENT for token in tokens),
        }
    )


def count_nodes(tree: ast.Module) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in ast.walk(tree):
        counts["nodes"] += 1
        counts["comprehensions"] += isinstance(
            node, ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp
        )
        counts["inline ifs"] += isinstance(node, ast.IfExp)
    return counts


def names_bound_in(tree: ast.Module) -> list[str]:
    """Names of all variables and parameters, as often as they are bound."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
    return names


def names_offered_by(tree: ast.Module) -> list[str]:
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node.name for node in definitions if not node.name.startswith("_")]


def lines_of(node: ast.FunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def print_table(folders: list[Path]) -> None:
    measured = {str(folder): measure_folder(folder) for folder in folders}
    figures = list(next(iter(measured.values())))
    print("| | " + " | ".join(figures) + " |")
    print("|---|" + "--:|" * len(figures))
    for name, values in measured.items():
        print(f"| {name} | " + " | ".join(f"{values[figure]:.4g}" for figure in figures) + " |")
    print("| aim | " + " | ".join(AIMS.get(figure, "") for figure in figures) + " |")


if __name__ == "__main__":
    packages = [path.parent for path in sorted((ROOT / "medvl").glob("*/__init__.py"))]
    print_table([Path(name) for name in sys.argv[1:]] or [ROOT / "medvl", *packages])
