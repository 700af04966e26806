"""`invoke audit`: what the headers of scans say, before anything is preprocessed."""

import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from medvl.base import files
from medvl.ct import audit, ingest, metadata_table, names, reports
from medvl.evaluation import report, results


def audit_tree(
    source: str, folder: str, metadata: str, reports_csv: str, labels: str, no_chest: str, workers: int
) -> None:
    """Write `audit.csv`, a row for each scan, and `report.html`, which tells scans by their row in it; print
    how to preprocess them.
    """
    files.check_writable(folder, folder=True)
    listed = ingest.list_scans(source)
    rows_of_metadata: dict[str, dict[str, str]] = {}
    named: dict[str, Collection[str]] = {}
    if metadata:
        rows_of_metadata = metadata_table.read_metadata(metadata, [name for name, _ in listed])
        named["metadata"] = rows_of_metadata.keys()
    if reports_csv:
        texts = reports.read_reports(reports_csv, "both", "empty")
        named["report"] = {name for name, text in texts.items() if text}
    if labels:
        named["labels"] = set(reports.read_labels(labels)[0])
    if no_chest:
        named["no_chest"] = set(names.read_list(no_chest))
    rows = audit.audit_scans(listed, rows_of_metadata, named, workers)
    advice = [_advise(source, rows, metadata, no_chest)]
    for table, members in named.items():
        absent = {*members}.difference(row["name"] for row in rows)
        advice.append(f"{len(absent)} of {len(members)} volumes of {table} are not among the scans.")
    counts = {"scans": len(rows), "patients": len({row["patient"] for row in rows})}
    for column in ("refused", "faults"):
        counts[column] = sum(bool(row[column]) for row in rows)
    totals = [results.Result(what=what, value=count) for what, count in counts.items()]
    files.write_csv(Path(folder) / "audit.csv", rows, audit.COLUMNS)
    page = report.write_report(folder, "Audit of scans", totals, {}, advice, _audit_tables(rows))
    print(*(f"{what}: {count}" for what, count in counts.items()), page, *advice, sep="\n")


def _advise(source: str, rows: Sequence[dict[str, str]], metadata: str, no_chest: str) -> str:
    """The command that preprocesses the scans, or why none does."""
    try:
        audit.check_one_release(source, [Path(row["path"]) for row in rows])
    except ValueError as e:
        return str(e)
    command = ["invoke", "preprocess", "--source", source, "--out", "volumes.h5"]
    headers = Counter(row["header"] for row in rows)
    if headers["blank"] > headers["placed"]:
        metadata = metadata or "METADATA.csv"
        command += ["--set", "spacing_from=metadata", "--set", "hu=metadata"]
    if metadata:
        command += ["--metadata", metadata]
    if no_chest:
        command += ["--exclude", no_chest]
    return shlex.join(command)


def _audit_tables(rows: Sequence[dict[str, str]]) -> list[report.Captioned]:
    """How many scans have each value of a column, spacings rounded; the faults."""
    lines = []
    for column in ("release", "header", "dtype", "hu", "metadata", "report", "labels", "no_chest"):
        counts = Counter(row[column] or "unknown" for row in rows)
        lines += [(column, *item) for item in sorted(counts.items())]
    for axis in range(3):
        lengths = [row["spacing_mm"].split(" x ")[axis] for row in rows if row["spacing_mm"]]
        rounded = Counter(round(float(mm), 1) for mm in lengths)
        lines += [(f"spacing along {'xyz'[axis]}", f"{mm} mm", n) for mm, n in sorted(rounded.items())]
    faults = [(number, row["faults"]) for number, row in enumerate(rows, 2) if row["faults"]]
    columns = ("Column", "Value", "Scans")
    return [("Scans", columns, lines), ("Faults by row of audit.csv", ("Row", "Faults"), faults)]
