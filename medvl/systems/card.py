"""The model card of an exported run: what it is, where it comes from, what it was trained on, how good it is."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvl.base import config
from medvl.evaluation import report, results
from medvl.hub.checkpoints import find_file, find_optional_file


def model_card(cfg: Any, bases: Mapping[str, str], folder: Path, about: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter of the hub.

    Args:
        cfg: the record of the run.
        bases: {architecture: the checkpoint it started from, "" = from scratch}.
        folder: of the run.
        about: how the run was exported.
    """
    front = ["---", "library_name: " + ("peft" if about["kind"] == "peft" else "transformers")]
    # A folder of this machine means nothing elsewhere.
    on_hub = [name for name in bases.values() if name and not Path(name).exists()]
    if on_hub:
        front.append(f"base_model: [{', '.join(on_hub)}]")
    origins = []
    for architecture, name in bases.items():
        is_model = name and not Path(name).is_file()
        origins += [
            f"- {name or f'trained from scratch ({architecture})'}",
            f"- revision: {(is_model and _revision(name)) or 'not known'}",
            f"- licence: {(is_model and _licence(name)) or 'not stated in its files; see its page'}",
        ]
    front += ["tags: [medical, research]", "---"]
    lines = [
        *front,
        f"# {folder.name}",
        f"**{report.NOTICE}** It was not validated for care of patients. It may leave out findings and values, "
        "or make them up.",
        "## Base model",
        *origins,
        "## Data",
        *_data_facts(cfg),
        "## Export",
        *[f"- {key}: {value}" for key, value in about.items() if not isinstance(value, Mapping)],
    ]
    if "distance" in about:
        distance = about["distance"]
        lines.append(
            f"- against the run, over {distance['n']} answer tokens: {distance['lost']:.2%} of what the adapter learned "
            f"is lost, largest difference of two logits {distance['largest']:.3g}, same likeliest token in "
            f"{distance['same_token']:.2%}"
        )
    lines += ["## Figures", *_figures(folder), "## Record", "```json"]
    lines += [json.dumps(config.unstructure(cfg), indent=1), "```"]
    return "\n".join(front) + "\n\n" + _joined(lines[len(front) :])


def _joined(lines: list[str]) -> str:
    """Lines of Markdown: lists, tables and code stay together."""
    text = ""
    for line in lines:
        text += line + ("\n" if line.startswith(("- ", "|", "```json")) else "\n\n")
    text = re.sub(r"(?<!\n)\n(?=## )", "\n\n", text)  # a heading behind a list
    return text.replace("\n\n```\n", "\n```\n").rstrip() + "\n"


def _revision(name: str) -> str:
    """The commit of a model in the hub's cache, which names the folder of its files."""
    commit = find_file(name, ("config.json",)).parent.name
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else ""


def _licence(name: str) -> str:
    """What the front matter of a model's card says."""
    path = find_optional_file(name, "README.md")
    if path is None:
        return ""
    found = re.search(r"^license:\s*(\S+)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found.group(1) if found else ""


def _data_facts(cfg: Any) -> list[str]:
    """Licences of the data, where `invoke data` has written them down."""
    source = getattr(cfg.data, "source", "files")
    if source not in ("files", "public"):
        return [f"- drawn by medvl ({source}); shows no patient"]
    path = Path(cfg.data.folder) / "data_summary.json"
    if not path.is_file():
        return [f"- data of the user's own ({Path(cfg.data.folder).name}); their licence is not recorded"]
    summary = json.loads(path.read_text())
    lines = [f"- {name}: {facts['licence']}" for name, facts in summary["sources"].items()]
    if summary["non_commercial"]:
        lines.append("- **non-commercial use only**, as some of the data is")
    return lines


def _figures(folder: Path) -> list[str]:
    path = folder / "results" / "results.jsonl"
    if not path.is_file():
        return ["not evaluated"]
    rows = [row for row in results.read_results(path) if row.subject in ("all", "mean", "")]
    cells = [(row.what, row.split, row.n, row.value, row.low, row.high) for row in rows]
    return [results.markdown_table(("Metric", "Split", "n", "Value", "Low", "High"), cells)]
