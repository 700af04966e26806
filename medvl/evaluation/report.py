"""One report of a set of results: Markdown with its figures, the same as one HTML file without links, and a
CSV of every number.
"""

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

# Columns of the table of findings behind the AUROC, in this order.
_COLUMNS = ("auprc", "f1", "f1_weighted", "accuracy", "balanced_accuracy", "precision", "recall")
_TITLES = {
    "auroc": "AUROC",
    "ssim_gaussian": "SSIM, Gaussian window",
    "ssim_uniform": "SSIM, uniform window",
    "psnr": "PSNR, dB",
    "mse": "MSE",
    "auprc": "AUPRC",
    "ece_zero_shot": "Calibration error, zero-shot",
    "ece_calibrated": "Calibration error, calibrated",
    "brier_zero_shot": "Brier score, zero-shot",
    "brier_calibrated": "Brier score, calibrated",
    "f1": "F1",
    "balanced_accuracy": "Balanced accuracy",
    "f1_weighted": "Weighted F1",
}
_ALL = "All results"
# What the rows of one table share; it stands once above the table, not in every line.
_FACTS = ("experiment", "split", "commit", "device")
_DEFINITIONS = (
    "Intervals are 95 % percentile bootstrap intervals that resample patients. F1, precision and recall are "
    "of the positive class; weighted F1 is the mean over both classes by their share. A dash is a number "
    "that does not exist: one class only, or nothing called positive. The mean is over the findings that "
    "have a value. Thresholds were given to the evaluation, not found on these results."
)

Columns = Sequence[str]
Lines = Sequence[Sequence[Any]]  # as long as the columns
Table = tuple[Columns, Lines]
Captioned = tuple[str, Columns, Lines]  # the caption first
Section = tuple[dict[str, str], Columns, Lines]  # the facts first
Key = str | Callable[[Result], Any]  # what makes a line or a column of `pivot`


def write_report(
    folder: files.PathLike,
    title: str,
    rows: Sequence[Result],
    figures: Mapping[str, bytes] | None = None,
    notes: Sequence[str] = (),
    tables: Sequence[Captioned] = (),
    summary: bool = False,
) -> Path:
    """Write `report.html` (self-contained), `report.md`, `results.csv` and `figures/*.png` into `folder`;
    returns the path of the HTML.

    Args:
        rows: results (none where there are `tables`) of one or more splits and experiments; each gets its own tables: one line per finding
            where there is an AUROC per finding, one line per metric otherwise.
        figures: caption -> PNG bytes, as `plots` makes them.
        notes: paragraphs below the tables, plain text.
        tables: (caption, columns, lines), as `(caption, *pivot(...))`, shown in this order before those of
            the rows.
        summary: also write `summary.md`, the short page: title, notice, `tables` and notes.
    Raises:
        ValueError: no rows, two rows of one metric and subject in one table, a figure that is no PNG, two
            captions with one file name, a table without caption or with a line of another length than its
            columns, or a summary without tables.
    """
    if not rows and not tables:
        raise ValueError("write_report: needs at least one result")
    _check_tables(tables, summary)
    named_figures = _name_figures(figures or {})
    # All tables are made before the first file is written: a row that is twice there leaves no half report.
    sections: list[Section] = []
    for facts, section_rows in _group_by_facts(rows):
        for columns, lines in _result_tables(section_rows):
            sections.append((facts, columns, lines))

    folder = Path(folder)
    # The figures come first: no page ever names one that is not there.
    for name, (_, png) in named_figures.items():
        with files.atomic(folder / "figures" / name) as tmp:
            tmp.write_bytes(png)
    if rows:
        write_results_csv(folder / "results.csv", rows)
    files.write_text(folder / "report.md", _markdown(title, tables, sections, named_figures, notes))
    files.write_text(folder / "report.html", _html(title, tables, sections, named_figures, notes))
    if summary:
        files.write_text(folder / "summary.md", _markdown(title, tables, [], {}, notes))
    return folder / "report.html"


def write_results_csv(path: files.PathLike, rows: Sequence[Result]) -> None:
    """Every field of every result as CSV; nan is an empty cell, `extra` is JSON."""
    columns = [a.name for a in attrs.fields(Result)]
    lines = []
    for r in rows:
        fields = attrs.asdict(r)
        lines.append({name: _csv_cell(value) for name, value in fields.items()})
    files.write_csv(path, lines, columns)


def pivot(
    rows: Sequence[Result],
    *,
    down: Key,
    across: Key,
    metric: str | None = None,
    corner: str | None = None,
) -> Table:
    """Results as a table of two keys, as modes down and tasks across: cells "0.812 [0.790, 0.830]", value
    and 95 % interval.

    n is written where it says enough: as a column where all cells of a line have the same, else in the heads
    where all of a column have, else in every cell; nowhere if no row has one. Lines and columns come in the
    order in which they are first met.

    Args:
        down, across: what makes a line and a column: a field of `Result`, a key of its `extra`, or a
            function of the row.
        metric: the metric to show; None takes all rows, as with across="what".
        corner: head of the first column; None is `down` if it is a name.
    Returns:
        (columns, lines). A cell without interval is the number itself, one without a row nan; `write_report`
        shows nan as a dash.
    Raises:
        ValueError: no row of that metric, a row without the key, or two rows of one cell.
    """
    cells = _pivot_cells(rows, down, across, metric)
    line_names = list(dict.fromkeys(line for line, _ in cells))
    column_names = list(dict.fromkeys(column for _, column in cells))
    # The different n of each line and of each column.
    n_of_line: dict[str, set[int]] = {}
    n_of_column: dict[str, set[int]] = {}
    for (line, column), r in cells.items():
        n_of_line.setdefault(line, set()).add(r.n)
        n_of_column.setdefault(column, set()).add(r.n)

    # n is written once where it can be: of a line, else of a column, else in every cell.
    any_n = any(r.n for r in cells.values())
    one_n_per_line = all(len(n) == 1 for n in n_of_line.values())
    one_n_per_column = all(len(n) == 1 for n in n_of_column.values())
    by_line = any_n and one_n_per_line
    by_column = any_n and one_n_per_column and not by_line
    by_cell = any_n and not by_line and not by_column
    if corner is None:
        corner = _title(down) if isinstance(down, str) else ""
    lines = []
    for name in line_names:
        body: list[Any] = [name]
        if by_line:
            body += n_of_line[name]
        for column in column_names:
            body.append(_pivot_cell(cells.get((name, column)), by_cell))
        lines.append(body)
    if by_line:
        return (corner, "n", *column_names), lines
    if by_column:
        heads = [f"{name} (n = {max(n_of_column[name]):,})" for name in column_names]
        return (corner, *heads), lines
    return (corner, *column_names), lines


def _pivot_cells(
    rows: Sequence[Result], down: Key, across: Key, metric: str | None
) -> dict[tuple[str, str], Result]:
    """{(line, column): row}."""
    chosen = [r for r in rows if metric in (None, r.what)]
    if not chosen:
        raise ValueError(
            f"pivot: needs rows of {metric or 'any metric'!r}, found {sorted({r.what for r in rows})}"
        )
    cells: dict[tuple[str, str], Result] = {}
    for r in chosen:
        # Two rows of one cell mean that another key tells them apart, such as the split: none is dropped.
        key = _key_value(r, down), _key_value(r, across)
        if key in cells:
            raise ValueError(
                f"pivot: each cell must be one row, found two for {key}: {_describe(cells[key])} and "
                f"{_describe(r)}"
            )
        cells[key] = r
    return cells


def _key_value(r: Result, key: Key) -> str:
    """What a key says of a row: by a function, a field, or `extra`, in this order."""
    if callable(key):
        return str(key(r))
    fields = attrs.asdict(r, recurse=False)
    if key in fields:
        return str(fields[key])
    if key not in r.extra:
        raise ValueError(
            f"pivot: each row must have {key!r}, a field or in extra, but {_describe(r)} has extra "
            f"{sorted(r.extra)}"
        )
    return str(r.extra[key])


def _describe(r: Result) -> str:
    """A row in words, for messages."""
    words = [r.what]
    if r.subject:
        words.append(f"of {r.subject}")
    if r.split:
        words.append(f"in {r.split}")
    words.append(r.experiment)
    return " ".join(word for word in words if word)


def _pivot_cell(r: Result | None, with_n: bool) -> Any:
    """A number where that is all there is to say (tables then align it), else a text."""
    if r is None or math.isnan(r.value):
        return math.nan
    if math.isnan(r.low) and not with_n:
        return r.value
    text = f"{r.value:.3f}"
    if not math.isnan(r.low):
        text += f" [{r.low:.3f}, {r.high:.3f}]"
    if with_n:
        text += f" (n = {r.n:,})"
    return text


def _check_tables(tables: Sequence[Captioned], summary: bool) -> None:
    if summary and not tables:
        raise ValueError("write_report: a summary needs tables, got none")
    for caption, columns, lines in tables:
        wrong_lengths = sorted({len(line) for line in lines} - {len(columns)})
        if not caption.strip() or wrong_lengths:
            problem = f"{caption!r} with {len(columns)} columns"
            if wrong_lengths:
                problem += f", lines of {wrong_lengths}"
            raise ValueError(
                f"write_report: a table must have a caption and lines as long as its columns, got {problem}"
            )


def _name_figures(figures: Mapping[str, bytes]) -> dict[str, tuple[str, bytes]]:
    """{file name: (caption, PNG)}."""
    named = {}
    for caption, png in figures.items():
        # Letters, digits and hyphens make a name that every file system and link takes.
        stem = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60]
        named[f"{stem}.png"] = (caption, png)
    # ".png": a caption without letters and digits.
    if len(named) < len(figures) or ".png" in named:
        raise ValueError(
            f"write_report: captions must give different file names, got {', '.join(map(repr, figures))}"
        )
    for caption, png in figures.items():
        if not png.startswith(b"\x89PNG"):
            raise ValueError(f"write_report: figure {caption!r} must be PNG bytes, starts with {png[:8]!r}")
    return named


# Tables of results ---------------------------------------------------------------------------------------------------
def _group_by_facts(rows: Sequence[Result]) -> list[tuple[dict[str, str], list[Result]]]:
    """Rows that share experiment, split, commit and device, with these facts."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in rows:
        values = tuple(getattr(r, name) for name in _FACTS)
        groups.setdefault(values, []).append(r)
    sections = []
    for values, section_rows in groups.items():
        facts = {}
        for name, value in zip(_FACTS, values, strict=True):
            if value:
                facts[name.capitalize()] = value
        sections.append((facts, section_rows))
    return sections


def _result_tables(rows: list[Result]) -> list[Table]:
    """The table of findings with an AUROC, and that of all other metrics."""
    row_of = {(r.what, r.subject): r for r in rows}
    # A metric that is there twice would be shown once, by the later row.
    if len(row_of) < len(rows):
        counts = Counter((r.what, r.subject) for r in rows)
        twice = []
        for (metric, subject), count in counts.items():
            if count > 1:
                twice.append(f"{metric} of {subject or 'all'}")
        raise ValueError(
            "write_report: each metric must be there once per finding, split and experiment, "
            f"found twice: {', '.join(twice[:4])}"
        )
    # A subject with an AUROC is a finding, and its other metrics become columns of its line.
    findings = [r.subject for r in rows if r.what == "auroc"]  # in the order of the rows
    others = []
    for r in rows:
        in_finding_table = r.subject in findings and r.what in ("auroc", *_COLUMNS)
        if not in_finding_table:
            others.append(r)
    tables = []
    if findings:
        tables.append(_finding_table(row_of, findings))
    if others:
        tables.append(_metric_table(others))
    return tables


def _finding_table(row_of: dict[tuple[str, str], Result], findings: list[str]) -> Table:
    """One line per finding.

    Args:
        row_of: {(metric, finding): row}.
    """
    # Only columns in which some finding has a number.
    metrics = []
    for metric in _COLUMNS:
        if any((metric, finding) in row_of for finding in findings):
            metrics.append(metric)
    aurocs = [row_of["auroc", finding] for finding in findings]
    with_threshold = any(r.extra.get("threshold") is not None for r in aurocs)
    columns = ["Finding", "n", "Positives", "AUROC", "95 % interval", *map(_title, metrics)]
    if with_threshold:
        columns.append("Threshold")
    lines = []
    for finding, r in zip(findings, aurocs, strict=True):
        name = finding or "all"  # a result without a subject is about all samples
        if "findings" in r.extra:  # a mean says of how many
            name = f"{finding} of {r.extra['findings']} findings"
        line = [name, r.n, r.extra.get("positives", math.nan), r.value, _interval(r)]
        for metric in metrics:
            result = row_of.get((metric, finding))
            line.append(math.nan if result is None else result.value)
        if with_threshold:
            threshold = r.extra.get("threshold")
            line.append(math.nan if threshold is None else threshold)
        lines.append(line)
    return tuple(columns), lines


def _metric_table(rows: list[Result]) -> Table:
    """One line per metric and subject; the columns of benches only where a row has such numbers."""
    timed = not all(math.isnan(r.latency_ms) and math.isnan(r.peak_mib) for r in rows)
    columns = ["Metric", "Subject", "n", "Value", "95 % interval"]
    if timed:
        columns += ["Shape", "Latency, ms", "Peak, MiB"]
    lines = []
    for r in rows:
        line = [_title(r.what), r.subject, r.n, r.value, _interval(r)]
        if timed:
            line += [r.shape, r.latency_ms, r.peak_mib]
        lines.append(line)
    return tuple(columns), lines


# Pages ---------------------------------------------------------------------------------------------------------------
def _markdown(
    title: str,
    tables: Sequence[Captioned],
    sections: Sequence[Section],
    figures: dict[str, tuple[str, bytes]],
    notes: Sequence[str],
) -> str:
    """The page as blocks with an empty line between each two: title, notice, tables, notes, figures."""
    blocks = [f"# {_escape_line(title)}", f"**{NOTICE}**"]
    for caption, columns, lines in tables:
        blocks += [f"## {_escape_line(caption)}", _markdown_table(columns, lines)]
    if tables and sections:
        blocks.append(f"## {_ALL}")
    last_facts = None
    for facts, columns, lines in sections:
        if facts is not last_facts:  # both tables of a part have the same dict
            items = [f"- {name}: {_escape_line(value)}" for name, value in facts.items()]
            blocks.append("\n".join(items))
            last_facts = facts
        blocks.append(_markdown_table(columns, lines))
    blocks += _definitions(sections)
    blocks += [_escape_line(note) for note in notes]
    for name, (caption, _) in figures.items():
        text = _escape_line(caption)
        blocks.append(f"![{text}](figures/{name})\n\n{text}")
    # Rows without facts gave an empty block.
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_table(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table whose heads and cells stay text, whatever a finding or a task is called."""
    cells = []
    for line in lines:
        # Numbers stay numbers: `markdown_table` rounds and aligns them.
        cells.append([_escape_cell(value) if isinstance(value, str) else value for value in line])
    # `markdown_table` escapes "|" in cells only.
    heads = [_escape_cell(column).replace("|", "\\|") for column in columns]
    return results.markdown_table(heads, cells).rstrip()


def _html(
    title: str,
    tables: Sequence[Captioned],
    sections: Sequence[Section],
    figures: dict[str, tuple[str, bytes]],
    notes: Sequence[str],
) -> str:
    """The same page as one file: figures are inside as base64, no link leads out."""
    blocks = []
    for caption, columns, lines in tables:
        table = results.html_table(columns, lines)
        blocks.append(f'<h2>{html.escape(caption)}</h2><div class="wide pivot">{table}</div>')
    if tables and sections:
        blocks.append(f"<h2>{_ALL}</h2>")
    last_facts = None
    for facts, columns, lines in sections:
        if facts is not last_facts:  # as in `_markdown`: once for both tables
            blocks.append(_html_facts(facts))
            last_facts = facts
        kind = columns[0].lower()  # the style of findings or of metrics
        blocks.append(f'<div class="wide {kind}">{results.html_table(columns, lines)}</div>')
    for note in (*_definitions(sections), *notes):
        blocks.append(f"<p>{html.escape(note)}</p>")
    for caption, png in figures.values():
        text = html.escape(caption)
        data = base64.b64encode(png).decode()
        image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        blocks.append(f'<figure><div class="wide">{image}</div><figcaption>{text}</figcaption></figure>')
    return _PAGE.format(
        title=html.escape(title), notice=html.escape(NOTICE), style=_STYLE, body="\n".join(blocks)
    )


def _html_facts(facts: Mapping[str, str]) -> str:
    pairs = [f"<dt>{html.escape(name)}</dt><dd>{html.escape(v)}</dd>" for name, v in facts.items()]
    if not pairs:
        return ""
    return f"<dl>{''.join(pairs)}</dl>"


def _definitions(sections: Sequence[Section]) -> list[str]:
    """What the columns of findings are, where there are any."""
    for _, columns, _ in sections:
        if columns[0] == "Finding":
            return [_DEFINITIONS]
    return []


def _title(name: str) -> str:
    """A metric or a key as the head of a column: "recall_at_5" is "Recall at 5"."""
    return _TITLES.get(name, name.replace("_", " ").capitalize())


def _interval(r: Result) -> str:
    if math.isnan(r.low):
        return "–"
    return f"{r.low:.3f}–{r.high:.3f}"


def _escape_line(text: str) -> str:
    """Text that stays one paragraph of Markdown and holds no HTML."""
    # HTML first: its entities hold none of the marks that are escaped here.
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)


def _escape_cell(text: str) -> str:
    """Text that stays one cell and holds neither HTML nor a link; "|" is left to the table."""
    plain = html.escape(" ".join(text.split()), quote=False)
    # "_" within a word ("f1_weighted") and "[0.7, 0.9]" mean nothing to Markdown and stay as they are.
    return re.sub(r"[\\`*]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])", r"\\\g<0>", plain)


def _csv_cell(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)  # sorted, so that reports can be compared line by line
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
