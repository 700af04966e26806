"""`invoke preprocess`, `split`, `embed` and `classify`: scans into a store, tables cut by patient, one scan
looked at.
"""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medvl.base import config, files, store
from medvl.ct import ingest, names, preprocess, reports
from medvl.evaluation import report, results
from medvl.systems import ct_clip, run
from medvl.systems.ct_clip.look import look_at_scan

_log = logging.getLogger("medvl")
_ON_SHEET = 36  # volumes of a contact sheet


def fill_store(
    source: str, out: str, exp: str, overrides: Sequence[str], metadata: str, workers: int, sheet: str
) -> int:
    """Preprocess scans into a store and print what was done; returns the exit status: 0, or 3 when scans were
    rejected.
    """
    # A table or the store can then never be what is replaced.
    if sheet and not sheet.lower().endswith(".png"):
        raise ValueError(f"preprocess: sheet must end in .png, got {sheet!r}")
    rejected_csv = ingest.rejected_csv(out)
    for path in (out, str(rejected_csv), sheet):
        if path:
            files.check_writable(path)
    _log.setLevel(logging.INFO)
    settings = config.override(_ct_settings(exp), tuple(overrides), "preprocess")
    cfg = config.structure(settings, preprocess.CtConfig, "preprocess")
    done = ingest.preprocess_folder(source, out, cfg, metadata, workers)
    print(f"{out}: {done.done} volumes written, {done.skipped} were there, {len(done.rejected)} rejected")
    if done.rejected:
        print(f"rejected scans and reasons: {rejected_csv}")
    if sheet:
        _write_sheet(out, sheet)
    return 3 if done.rejected else 0


def _ct_settings(exp: str) -> dict[str, Any]:
    """The CT settings of an experiment; {} without one."""
    if not exp:
        return {}
    cfg, _ = run.resolve(exp)
    if not isinstance(cfg, ct_clip.SYSTEM.record):
        raise ValueError(
            f"preprocess: {exp} is a {cfg.system} experiment; only ct_clip experiments have settings of CT"
        )
    return config.unstructure(cfg.ct)  # type: ignore[attr-defined]


def _write_sheet(store_path: str, sheet: str) -> None:
    volumes = store.open_store(store_path)
    chosen = volumes.names[:_ON_SHEET]
    if chosen:
        ingest.contact_sheet(volumes, sheet, chosen)
        print(f"contact sheet of {len(chosen)} volumes: {sheet}")


# One scan ---------------------------------------------------------------------------------------------------
def embed_scan(folder: str, scan: str, out: str, metadata: str = "", settings: Sequence[str] = ()) -> None:
    """Write one scan's embedding, float32 [d], L2-normalised, to a .npy."""
    # A scan can then never be what is replaced.
    if not out.endswith(".npy"):
        raise ValueError(f"embed: out must end in .npy, got {out!r}")
    files.check_writable(out)
    embedding = look_at_scan(_ct_run(folder, "embed"), scan, (), metadata, settings)["embedding"]
    files.write_array(out, embedding.numpy())
    print(f"{out}: {len(embedding)} numbers")


def print_findings(
    folder: str, scan: str, findings: Sequence[str], metadata: str = "", settings: Sequence[str] = ()
) -> None:
    """Print a table of zero-shot probabilities of one scan."""
    scan_result = look_at_scan(_ct_run(folder, "classify"), scan, findings, metadata, settings)
    volume, thresholds = scan_result["volume"], scan_result["threshold"]
    spacing_mm = tuple(round(mm, 2) for mm in volume.source_spacing_mm)
    print(
        f"{volume.name}: HU by {volume.hu_rule}, {volume.source_shape} voxels of {spacing_mm} mm, slices "
        f"{volume.occupied}"
    )
    rows = []
    for finding, probability in scan_result["probability"].items():
        threshold = thresholds.get(finding)
        if threshold is None:
            rows.append((finding, probability, math.nan, ""))
        else:
            rows.append((finding, probability, threshold, "yes" if probability >= threshold else "no"))
    table = results.markdown_table(("Finding", "Probability", "Threshold", "Called"), rows)
    print(table + report.NOTICE)


def _ct_run(folder_or_config: str, task: str) -> Path:
    folder = config.run_folder(folder_or_config)
    system = config.system_of(folder)
    if system != "ct_clip":
        raise ValueError(f"{task}: {folder} is a {system} run; only ct_clip runs look at scans")
    return folder


# Tables cut by patient --------------------------------------------------------------------------------------
def split_tables(
    labels: str,
    out: str,
    sizes: str,
    seed: int,
    tables: Sequence[str] = (),
    patient: str = "",
    pattern: str = "",
) -> None:
    """Cut a label table and others (reports, metadata) into parts by patient: `valid_reports.csv` ->
    `out/{part}_reports.csv`.

    Everything is read and checked before anything is written, and no file that exists is replaced.

    Args:
        sizes: "part=size,...", volumes or shares.
        patient: a column of one of the tables that says whose volume it is.
        pattern: a regular expression that finds the patient in a volume's name, see `names.patients_of`.
    Raises:
        ValueError: unusable tables or sizes, two tables that would be cut into one file, an output that
            exists.
    """
    files.check_writable(out, folder=True)
    volumes, _, findings = reports.read_labels(labels, patient=patient)
    column = reports.read_patients((labels, *tables), patient) if patient else None
    patients = names.patients_of(volumes, pattern, column)
    parts = reports.split_patients(volumes, findings, _parse_sizes(sizes), seed, patients)
    rows_of_table = {path: files.read_csv(path, ("VolumeName",)) for path in (labels, *tables)}
    outputs = _outputs_of_split(list(parts), (labels, *tables), Path(out))
    for path, rows in rows_of_table.items():
        _check_volumes(path, rows, {*volumes}, labels)

    for part, indices in parts.items():
        chosen = {volumes[i] for i in indices}
        for path, rows in rows_of_table.items():
            rows_of_part = [row for row in rows if _volume_of(row) in chosen]
            files.write_csv(outputs[part, path], rows_of_part, list(rows[0]))
        num_patients = len({patients[i] for i in indices})
        print(
            f"{part}: {len(indices)} volumes of {num_patients} patients, mean prevalence "
            f"{findings[indices].mean():.3f} "
            f"(all: {findings.mean():.3f})"
        )


def _check_volumes(path: str, rows: Sequence[dict[str, str]], volumes: set[str], labels: str) -> None:
    """Raise where a table is about none of the labelled volumes, and warn of its rows about others."""
    unknown = len({_volume_of(row) for row in rows} - volumes)
    if unknown == len(rows):
        raise ValueError(f"split: {path}: none of its {len(rows)} rows is about a volume of {labels}")
    if unknown:
        _log.warning(
            "%s: %d of %d rows are about volumes without labels and are in no part", path, unknown, len(rows)
        )


def _volume_of(row: dict[str, str]) -> str:
    return names.volume_name(row["VolumeName"].strip())


def _parse_sizes(text: str) -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        sizes = {name.strip(): float(size) for name, size in pairs}
    except ValueError as e:
        raise ValueError(f"split: sizes must be name=number,name=number, got {text!r}") from e
    if len(sizes) < len(pairs) or not all(re.fullmatch(r"\w[\w.-]*", name) for name in sizes):
        raise ValueError(f"split: sizes must name each part once, in letters and digits, got {text!r}")
    return sizes


def _outputs_of_split(parts: Sequence[str], tables: Sequence[str], out: Path) -> dict[tuple[str, str], Path]:
    """{(part, table): the file to write}; refuses what would overwrite a file, or be written twice."""
    outputs: dict[tuple[str, str], Path] = {}
    for part in parts:
        for table in tables:
            name = Path(table).name
            path = out / f"{part}_{name.partition('_')[2] or name}"
            if path in outputs.values():
                raise ValueError(
                    f"split: {' and '.join(tables)}: two of these would be cut into {path}; rename one of "
                    "them"
                )
            if path.exists():
                raise ValueError(
                    f"split: {path} exists and is not replaced; name another folder with --out, or move it "
                    "away"
                )
            outputs[part, table] = path
    return outputs
