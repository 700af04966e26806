"""One report of a set of results: Markdown with its figures, the same as one HTML file without links, and a CSV of every number."""

import base64
import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from medvl.base import files
from medvl.evaluation import results
from medvl.evaluation.results import Result

NOTICE = "Research use only, not for diagnosis."

_COLUMNS = ("auprc", "f1", "f1_weighted", "accuracy", "balanced_accuracy", "precision", "recall")
_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "balanced_accuracy": "Balanced accuracy",
    "f1_weighted": "Weighted F1",
}
_ALL = "All results"
_FACTS = ("experiment", "split", "commit", "device")
_DEFINITIONS = (
    "Intervals are 95 % percentile bootstrap intervals that resample patients. F1, precision and recall are of the positive class; "
    "weighted F1 is the mean over both classes by their share. A dash is a number that does not exist: one class only, or nothing called "
    "positive. The mean is over the findings that have a value. Thresholds were given to the evaluation, not found on these results."
)


Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


def write_report(
    folder: files.PathLike,
    title: str,
    rows: Sequence[Result],
    figures: Mapping[str, bytes] | None = None,
    notes: Sequence[str] = (),
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = (),
    summary: bool = False,
) -> Path:
    """Write `report.html` (self-contained), `report.md`, `results.csv` and `figures/*.png` into `folder`; returns the path of the HTML.

    Args:
        rows: results of one or more splits and experiments; each gets its own tables: one line per finding where there is an AUROC per
            finding, one line per metric otherwise.
        figures: caption -> PNG bytes, as `plots` makes them.
        notes: paragraphs below the tables, plain text.
        tables: (caption, columns, lines), as `(caption, *pivot(...))`, shown in this order before those of the rows.
        summary: also write `summary.md`, the short page: title, notice, `tables` and notes.
    Raises:
        ValueError: no rows, two rows of one metric and subject in one table, a figure that is no PNG, two captions with one file name, a
            table without caption or with a line of another length than its columns, or a summary without tables.
    """
    if not rows:
        raise ValueError("write_report: needs at least one result")
    _check_tables(tables, summary)
    named = _named(figures or {})
    generic = [(facts, columns, body) for facts, part in _parts(rows) for columns, body in _tables(part)]
    folder = Path(folder)
    for name, (_, png) in named.items():
        with files.atomic(folder / "figures" / name) as tmp:
            tmp.write_bytes(png)
    write_results_csv(folder / "results.csv", rows)
    files.write_text(folder / "report.md", _markdown(title, tables, generic, named, notes))
    files.write_text(folder / "report.html", _html(title, tables, generic, named, notes))
    if summary:
        files.write_text(folder / "summary.md", _markdown(title, tables, [], {}, notes))
    return folder / "report.html"


def write_results_csv(path: files.PathLike, rows: Sequence[Result]) -> None:
    """Every field of every result as CSV; what is nan is left empty, `extra` is JSON."""
    columns = [a.name for a in attrs.fields(Result)]
    files.write_csv(path, [{k: _plain(v) for k, v in attrs.asdict(r).items()} for r in rows], columns)


def pivot(
    rows: Sequence[Result],
    *,
    down: str | Callable[[Result], Any],
    across: str | Callable[[Result], Any],
    what: str | None = None,
    corner: str | None = None,
) -> Table:
    """Results as a table of two keys, as modes down and tasks across: cells "0.812 [0.790, 0.830]", value and 95 % interval.

    n is written where it says enough: as a column where all cells of a line have the same, else in the heads where all of a column have,
    else in every cell; nowhere if no row has one. Lines and columns come in the order in which they are first met.

    Args:
        down, across: what makes a line and a column: a field of `Result`, a key of its `extra`, or a function of the row.
        what: the metric to show; None takes all rows, as with across="what".
        corner: head of the first column; None is `down` if it is a name.
    Returns:
        (columns, lines). A cell without interval is the number itself, one without a row nan; `write_report` shows nan as a dash.
    Raises:
        ValueError: no row of that metric, a row without the key, or two rows of one cell.
    """
    chosen = [r for r in rows if what in (None, r.what)]
    if not chosen:
        raise ValueError(
            f"pivot: needs rows of {what or 'any metric'!r}, found {sorted({r.what for r in rows})}"
        )
    cells: dict[tuple[str, str], Result] = {}
    for r in chosen:
        key = _key(r, down), _key(r, across)
        if key in cells:
            raise ValueError(
                f"pivot: each cell must be one row, found two for {key}: {_called(cells[key])} and {_called(r)}"
            )
        cells[key] = r
    lines, heads = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    by_line, by_head = (
        [{r.n for key, r in cells.items() if key[i] == name} for name in some]
        for i, some in ((0, lines), (1, heads))
    )
    first = corner if corner is not None else _title(down) if isinstance(down, str) else ""
    fill = lambda each=False: [
        [line, *(_said(cells.get((line, head)), each) for head in heads)] for line in lines
    ]
    if not any(r.n for r in chosen):
        return (first, *heads), fill()
    if all(len(n) == 1 for n in by_line):
        return (first, "n", *heads), [
            [line[0], *n, *line[1:]] for line, n in zip(fill(), by_line, strict=True)
        ]
    if all(len(n) == 1 for n in by_head):
        return (first, *(f"{head} (n = {max(n):,})" for head, n in zip(heads, by_head, strict=True))), fill()
    return (first, *heads), fill(each=True)


def _key(r: Result, key: str | Callable[[Result], Any]) -> str:
    if callable(key):
        return str(key(r))
    known = attrs.asdict(r, recurse=False)
    if key not in known and key not in r.extra:
        raise ValueError(
            f"pivot: each row must have {key!r}, a field or in extra, but {_called(r)} has extra {sorted(r.extra)}"
        )
    return str(known[key] if key in known else r.extra[key])


def _called(r: Result) -> str:
    return " ".join(
        filter(None, (r.what, r.subject and f"of {r.subject}", r.split and f"in {r.split}", r.experiment))
    )


def _said(r: Result | None, with_n: bool) -> Any:
    if r is None or math.isnan(r.value):
        return math.nan
    interval = "" if math.isnan(r.low) else f" [{r.low:.3f}, {r.high:.3f}]"
    return (
        f"{r.value:.3f}{interval}" + (f" (n = {r.n:,})" if with_n else "") if interval or with_n else r.value
    )


def _check_tables(tables: Sequence[tuple], summary: bool) -> None:
    if summary and not tables:
        raise ValueError("write_report: a summary needs tables, got none")
    for caption, columns, body in tables:
        lengths = sorted({len(line) for line in body} - {len(columns)})
        if not caption.strip() or lengths:
            raise ValueError(
                f"write_report: a table must have a caption and lines as long as its columns, got {caption!r} with {len(columns)} columns"
                + (f", lines of {lengths}" if lengths else "")
            )


def _parts(rows: Sequence[Result]) -> list[tuple[dict[str, str], list[Result]]]:
    """Rows that share experiment, split, commit and device, with these facts."""
    parts: dict[tuple[str, ...], list[Result]] = {}
    for r in rows:
        parts.setdefault(tuple(getattr(r, f) for f in _FACTS), []).append(r)
    return [
        ({f.capitalize(): v for f, v in zip(_FACTS, key, strict=True) if v}, part)
        for key, part in parts.items()
    ]


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
    head = (
        "Finding",
        "n",
        "Positives",
        "AUROC",
        "95 % interval",
        *(_title(w) for w in columns),
        *(("Threshold",) if decided else ()),
    )
    body = []
    for f in findings:
        r = by_key["auroc", f]
        values = [by_key[w, f].value if (w, f) in by_key else math.nan for w in columns]
        threshold = [_number(r.extra.get("threshold"))] if decided else []
        name = f"{f} of {r.extra['findings']} findings" if "findings" in r.extra else f or "all"
        body.append(
            [name, r.n, r.extra.get("positives", math.nan), r.value, _interval(r), *values, *threshold]
        )
    return head, body


def _metric_table(rows: list[Result]) -> Table:
    timed = any(not math.isnan(r.latency_ms) or not math.isnan(r.peak_mib) for r in rows)
    head = (
        "Metric",
        "Subject",
        "n",
        "Value",
        "95 % interval",
        *(("Shape", "Latency, ms", "Peak, MiB") if timed else ()),
    )
    tail = [[r.shape, r.latency_ms, r.peak_mib] if timed else [] for r in rows]
    return head, [
        [_title(r.what), r.subject, r.n, r.value, _interval(r), *t] for r, t in zip(rows, tail, strict=True)
    ]


def _markdown(
    title: str,
    captioned: Sequence[tuple],
    tables: Sequence[tuple],
    figures: dict[str, tuple[str, bytes]],
    notes: Sequence[str],
) -> str:
    lines = [f"# {_line(title)}", f"**{NOTICE}**"]
    for caption, columns, body in captioned:
        lines += [f"## {_line(caption)}", _markdown_table(columns, body)]
    lines += [f"## {_ALL}"] if captioned and tables else []
    said = None
    for facts, columns, body in tables:
        if facts is not said:
            lines.append("\n".join(f"- {k}: {_line(v)}" for k, v in facts.items()))
            said = facts
        lines.append(_markdown_table(columns, body))
    lines += [*_definitions(tables), *map(_line, notes)]
    lines += [
        f"![{_line(caption)}](figures/{name})\n\n{_line(caption)}" for name, (caption, _) in figures.items()
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _markdown_table(columns: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A table whose heads and cells stay text, whatever a finding or a task is called."""
    cells = [[_in_cell(v) if isinstance(v, str) else v for v in row] for row in body]
    heads = [_in_cell(c).replace("|", "\\|") for c in columns]
    return results.markdown_table(heads, cells).rstrip()


def _html(
    title: str,
    captioned: Sequence[tuple],
    tables: Sequence[tuple],
    figures: dict[str, tuple[str, bytes]],
    notes: Sequence[str],
) -> str:
    parts, said = [], None
    for caption, columns, body in captioned:
        parts.append(
            f'<h2>{html.escape(caption)}</h2><div class="wide pivot">{results.html_table(columns, body)}</div>'
        )
    parts += [f"<h2>{_ALL}</h2>"] if captioned else []
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
    return _PAGE.format(
        title=html.escape(title), notice=html.escape(NOTICE), style=_STYLE, body="\n".join(parts)
    )


def _definitions(tables: Sequence[tuple]) -> list[str]:
    return [_DEFINITIONS] if any(columns[0] == "Finding" for _, columns, _ in tables) else []


def _named(figures: Mapping[str, bytes]) -> dict[str, tuple[str, bytes]]:
    named = {
        re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] + ".png": (caption, png)
        for caption, png in figures.items()
    }
    if len(named) < len(figures) or ".png" in named:
        raise ValueError(
            f"write_report: captions must give different file names, got {', '.join(map(repr, figures))}"
        )
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


def _in_cell(text: str) -> str:
    """Text that stays one cell and holds neither HTML nor a link; "|" is left to the table."""
    return re.sub(
        r"[\\`*]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])",
        r"\\\g<0>",
        html.escape(" ".join(text.split()), quote=False),
    )


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
h2 { font-size: 1.15rem; line-height: 1.3; margin: 1.75rem 0 .25rem; overflow-wrap: anywhere; }
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
