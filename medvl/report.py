"""One report of a set of results: Markdown with its figures, the same as one HTML file without links, and a CSV of every number."""

import base64
import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from medvl import files, results
from medvl.results import Result

NOTICE = "Research use only, not for diagnosis."

_COLUMNS = ("auprc", "f1", "f1_weighted", "accuracy", "balanced_accuracy", "precision", "recall")
_TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "f1": "F1", "balanced_accuracy": "Balanced accuracy", "f1_weighted": "Weighted F1"}
_FACTS = ("experiment", "split", "commit", "device")
_DEFINITIONS = (
    "Intervals are 95 % percentile bootstrap intervals that resample patients. F1, precision and recall are of the positive class; "
    "weighted F1 is the mean over both classes by their share. A dash is a number that does not exist: one class only, or nothing called "
    "positive. The mean is over the findings that have a value. Thresholds were given to the evaluation, not found on these results."
)


def write_report(
    folder: files.PathLike, title: str, rows: Sequence[Result], figures: Mapping[str, bytes] | None = None, notes: Sequence[str] = ()
) -> Path:
    """Write `report.html` (self-contained), `report.md`, `results.csv` and `figures/*.png` into `folder`; returns the path of the HTML.

    Args:
        rows: results of one or more splits and experiments; each gets its own tables: one line per finding where there is an AUROC per
            finding, one line per metric otherwise.
        figures: caption -> PNG bytes, as `plots` makes them.
        notes: paragraphs below the tables, plain text.
    Raises:
        ValueError: no rows, two rows of one metric and subject in one table, a figure that is no PNG, or two captions with one file name.
    """
    if not rows:
        raise ValueError("write_report: needs at least one result")
    named = _named(figures or {})
    tables = [(facts, columns, body) for facts, part in _parts(rows) for columns, body in _tables(part)]
    folder = Path(folder)
    for name, (_, png) in named.items():
        with files.atomic(folder / "figures" / name) as tmp:
            tmp.write_bytes(png)
    write_results(folder / "results.csv", rows)
    files.write_text(folder / "report.md", _markdown(title, tables, named, notes))
    files.write_text(folder / "report.html", _html(title, tables, named, notes))
    return folder / "report.html"


def write_results(path: files.PathLike, rows: Sequence[Result]) -> None:
    """Every field of every result as CSV; what is nan is left empty, `extra` is JSON."""
    columns = [a.name for a in attrs.fields(Result)]
    files.write_csv(path, [{k: _plain(v) for k, v in attrs.asdict(r).items()} for r in rows], columns)


Table = tuple[tuple[str, ...], list[list[Any]]]


def _parts(rows: Sequence[Result]) -> list[tuple[dict[str, str], list[Result]]]:
    """Rows that share experiment, split, commit and device, with these facts."""
    parts: dict[tuple[str, ...], list[Result]] = {}
    for r in rows:
        parts.setdefault(tuple(getattr(r, f) for f in _FACTS), []).append(r)
    return [({f.capitalize(): v for f, v in zip(_FACTS, key, strict=True) if v}, part) for key, part in parts.items()]


def _tables(rows: list[Result]) -> list[Table]:
    by_key = {(r.what, r.subject): r for r in rows}
    if len(by_key) < len(rows):
        count = Counter((r.what, r.subject) for r in rows)
        twice = [f"{what} of {subject or 'all'}" for (what, subject), k in count.items() if k > 1]
        raise ValueError(
            f"write_report: each metric must be there once per finding, split and experiment, found twice: {', '.join(twice[:4])}"
        )
    findings = [r.subject for r in rows if r.what == "auroc"]
    shown = {(w, f) for w in ("auroc", *_COLUMNS) for f in findings}
    rest = [r for r in rows if (r.what, r.subject) not in shown]
    tables = [_finding_table(by_key, findings)] if findings else []
    return tables + ([_metric_table(rest)] if rest else [])


def _finding_table(by_key: dict[tuple[str, str], Result], findings: list[str]) -> Table:
    columns = [w for w in _COLUMNS if any((w, f) in by_key for f in findings)]
    decided = any(by_key["auroc", f].extra.get("threshold") is not None for f in findings)
    head = ("Finding", "n", "Positives", "AUROC", "95 % interval", *(_title(w) for w in columns), *(("Threshold",) if decided else ()))
    body = []
    for f in findings:
        r = by_key["auroc", f]
        values = [by_key[w, f].value if (w, f) in by_key else math.nan for w in columns]
        threshold = [_number(r.extra.get("threshold"))] if decided else []
        name = f"{f} of {r.extra['findings']} findings" if "findings" in r.extra else f or "all"
        body.append([name, r.n, r.extra.get("positives", math.nan), r.value, _interval(r), *values, *threshold])
    return head, body


def _metric_table(rows: list[Result]) -> Table:
    timed = any(not math.isnan(r.latency_ms) or not math.isnan(r.peak_mib) for r in rows)
    head = ("Metric", "Subject", "n", "Value", "95 % interval", *(("Shape", "Latency, ms", "Peak, MiB") if timed else ()))
    tail = [[r.shape, r.latency_ms, r.peak_mib] if timed else [] for r in rows]
    return head, [[_title(r.what), r.subject, r.n, r.value, _interval(r), *t] for r, t in zip(rows, tail, strict=True)]


def _markdown(title: str, tables: Sequence[tuple], figures: dict[str, tuple[str, bytes]], notes: Sequence[str]) -> str:
    lines = [f"# {_line(title)}", f"**{NOTICE}**"]
    said = None
    for facts, columns, body in tables:
        if facts is not said:
            lines.append("\n".join(f"- {k}: {_line(v)}" for k, v in facts.items()))
            said = facts
        cells = [[html.escape(v, quote=False) if isinstance(v, str) else v for v in row] for row in body]
        lines.append(results.markdown_table(columns, cells).rstrip())
    lines += [*_definitions(tables), *map(_line, notes)]
    lines += [f"![{_line(caption)}](figures/{name})\n\n{_line(caption)}" for name, (caption, _) in figures.items()]
    return "\n\n".join(line for line in lines if line) + "\n"


def _html(title: str, tables: Sequence[tuple], figures: dict[str, tuple[str, bytes]], notes: Sequence[str]) -> str:
    parts, said = [], None
    for facts, columns, body in tables:
        if facts is not said:
            pairs = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
            parts.append(f"<dl>{pairs}</dl>" if pairs else "")
            said = facts
        kind = columns[0].lower()  # finding or metric
        parts.append(f'<div class="wide {kind}">{results.html_table(columns, body)}</div>')
    parts += [f"<p>{html.escape(n)}</p>" for n in (*_definitions(tables), *notes)]
    for caption, png in figures.values():
        text, data = html.escape(caption), base64.b64encode(png).decode()
        parts.append(
            f'<figure><div class="wide"><img alt="{text}" src="data:image/png;base64,{data}"></div><figcaption>{text}</figcaption></figure>'
        )
    return _PAGE.format(title=html.escape(title), notice=html.escape(NOTICE), style=_STYLE, body="\n".join(parts))


def _definitions(tables: Sequence[tuple]) -> list[str]:
    return [_DEFINITIONS] if any(columns[0] == "Finding" for _, columns, _ in tables) else []


def _named(figures: Mapping[str, bytes]) -> dict[str, tuple[str, bytes]]:
    named = {re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] + ".png": (caption, png) for caption, png in figures.items()}
    if len(named) < len(figures) or ".png" in named:
        raise ValueError(f"write_report: captions must give different file names, got {', '.join(map(repr, figures))}")
    for caption, png in figures.items():
        if not png.startswith(b"\x89PNG"):
            raise ValueError(f"write_report: figure {caption!r} must be PNG bytes, starts with {png[:8]!r}")
    return named


def _title(what: str) -> str:
    return _TITLES.get(what, what.replace("_", " ").capitalize())


def _interval(r: Result) -> str:
    return "–" if math.isnan(r.low) else f"{r.low:.3f}–{r.high:.3f}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _line(text: str) -> str:
    """Text that stays one paragraph of Markdown and holds no HTML."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return "" if isinstance(value, float) and math.isnan(value) else value


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d8d8d8; --soft: #f4f5f7; --warn: #8a3b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --line: #3a3d42; --soft: #202327; --warn: #ffb37a; } }
body { margin: 0 auto; max-width: 74rem; padding: 1.25rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.notice { color: var(--warn); font-weight: 600; margin: 0 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1.25rem 0 .75rem; font-size: .9rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; font-weight: 600; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td:first-child { white-space: normal; min-width: 7rem; }
tbody tr:nth-child(even) td { background: var(--soft); }
.finding tbody tr:last-child td { font-weight: 600; }
.metric th:nth-child(2), .metric td:nth-child(2) { text-align: left; }
figure { margin: 1.5rem 0; } figcaption { font-size: .875rem; opacity: .8; margin-top: .35rem; }
img { display: block; width: 100%; min-width: 34rem; max-width: 64rem; background: #fff; border-radius: 4px; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
<p class="notice">{notice}</p>
{body}
</body></html>
"""
