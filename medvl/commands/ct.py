"""`invoke audit`, `preprocess`, `split`, `embed` and `classify`: scans checked and brought into a store, tables
cut by patient, one scan looked at.
"""

import json
import logging
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvl.base import config, files, store
from medvl.base.display import track
from medvl.ct import audit, ingest, metadata_table, names, preprocess, reports
from medvl.evaluation import report, results
from medvl.hub import checkpoints
from medvl.systems import ct_clip, run
from medvl.systems.ct_clip import scan_page
from medvl.systems.ct_clip.look import look_at_scan
from medvl.systems.ct_clip.run import load
from medvl.systems.ct_clip.slice_features import compute_features

_log = logging.getLogger("medvl")
_ON_SHEET = 36  # volumes of a contact sheet


def fill_store(
    source: str,
    store_path: str,
    exp: str,
    overrides: Sequence[str],
    metadata: str,
    workers: int,
    sheet: str,
    exclude: str = "",
    cluster: str = "",
) -> int:
    """Preprocess scans into a store and print what was done; returns the exit status: 0, or 3 when scans were
    rejected.
    """
    # A table or the store can then never be what is replaced.
    if sheet and not sheet.lower().endswith(".png"):
        raise ValueError(f"preprocess: sheet must end in .png, got {sheet!r}")
    rejected_csv = ingest.rejected_csv(store_path)
    # Preprocessing takes hours: what cannot be written must be known before it.
    files.check_writable(store_path if cluster else store.main_file(store_path), folder=bool(cluster))
    for path in (str(rejected_csv), sheet):
        if path:
            files.check_writable(path)
    if cluster and workers > 1:
        raise ValueError("preprocess: give --cluster or --workers; local:N is a cluster of N processes")
    # A line for each scan, which a library call does not print.
    _log.setLevel(logging.INFO)
    settings = config.override(_ct_settings(exp), tuple(overrides), "preprocess")
    cfg = config.structure(settings, preprocess.CtConfig, "preprocess")
    summary = ingest.preprocess_folder(
        source, store_path, cfg, metadata, workers, exclude_txt=exclude, cluster=cluster
    )
    num_rejected = len(summary.rejected)
    print(
        f"{store_path}: {summary.done} volumes written, {summary.skipped} were there, {num_rejected} rejected"
    )
    if num_rejected:
        print(f"rejected scans and reasons: {rejected_csv}")
    # Of the store as it is now, so that it shows volumes of earlier runs, too.
    if sheet:
        _write_sheet(store_path, sheet)
    # Not 1 or 2, which a crash and a wrong option end with: a script can go on with what was written.
    return 3 if num_rejected else 0


def _ct_settings(exp: str) -> dict[str, Any]:
    """The CT settings of an experiment; {} without one."""
    if not exp:
        return {}
    return config.unstructure(_ct_record(exp, (), "preprocess").ct)


def _ct_record(exp: str, overrides: Sequence[str], task: str) -> Any:
    cfg, _ = run.resolve(exp, overrides)
    # Other systems have no `ct` table at all.
    if not isinstance(cfg, ct_clip.SYSTEM.record):
        raise ValueError(
            f"{task}: {exp} is a {cfg.system} experiment; only ct_clip experiments have settings of CT"
        )
    return cfg


def print_features(exp: str, overrides: Sequence[str], cluster: str) -> None:
    """Compute the slice features of a frozen encoder ahead of training, and print where they are."""
    for features in compute_features(_ct_record(exp, overrides, "features"), cluster):
        print(f"{features.path}: slice features of {len(features.names)} volumes")


def _write_sheet(store_path: str, sheet: str) -> None:
    volumes = store.open_store(store_path)
    chosen = volumes.names[:_ON_SHEET]
    # Where every scan was rejected there is nothing to show; the exit status says so.
    if chosen:
        ingest.contact_sheet(volumes, sheet, chosen)
        print(f"contact sheet of {len(chosen)} volumes: {sheet}")


# Before preprocessing ---------------------------------------------------------------------------------------
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


# One scan ---------------------------------------------------------------------------------------------------
def embed_scan(
    folder: str, scan: str, embedding_file: str, metadata: str = "", settings: Sequence[str] = ()
) -> int:
    """Write the embedding of one scan, float32 [d], L2-normalised, to a .npy; those of a folder or a CSV of scans
    as [n, d], with their names in a CSV beside it.

    Returns:
        the exit status: 0, or 3 when scans were rejected, which are told and left out.
    """
    # A scan can then never be what is replaced.
    if not embedding_file.endswith(".npy"):
        raise ValueError(f"embed: out must end in .npy, got {embedding_file!r}")
    files.check_writable(embedding_file)
    run_folder = _ct_run(folder, "embed")
    if not Path(scan).is_dir() and not scan.lower().endswith(".csv"):
        embedding = look_at_scan(run_folder, scan, (), metadata, settings, slices=False)["embedding"]
        files.write_array(embedding_file, embedding.numpy())
        print(f"{embedding_file}: {len(embedding)} numbers")
        return 0
    names_csv = Path(embedding_file).with_suffix(".csv")
    if names_csv.resolve() in (Path(scan).resolve(), Path(metadata).resolve()):
        raise ValueError(f"embed: the names are written to {names_csv}, which is read here; rename one")
    files.check_writable(names_csv)
    paths = ingest.find_scans(scan)
    opened = load(run_folder)
    embeddings, num_rejected = {}, 0
    for name, path in track(paths.items(), "embedding scans", len(paths)):
        try:
            found = look_at_scan(run_folder, path, (), metadata, settings, opened=opened, slices=False)
            embeddings[name] = found["embedding"].numpy()
        except ValueError as e:
            num_rejected += 1
            _log.warning("%s: rejected: %s", name, e)
    if not embeddings:
        raise ValueError(f"embed: {scan}: all of its {num_rejected} scans were rejected")
    files.write_csv(names_csv, [{"VolumeName": name} for name in embeddings], ["VolumeName"])
    files.write_array(embedding_file, np.stack([*embeddings.values()]))
    print(f"{embedding_file}, {names_csv}: {len(embeddings)} scans, {num_rejected} rejected")
    return 3 if num_rejected else 0


def print_findings(
    folder: str,
    scan: str,
    findings: Sequence[str],
    metadata: str = "",
    settings: Sequence[str] = (),
    page: str = "",
) -> None:
    """Print a table of the findings of one scan; `page` is a folder to make, with the slices that speak for them."""
    if page:
        checkpoints.check_new_folder(page)
    found = look_at_scan(_ct_run(folder, "classify"), scan, findings, metadata, settings, slices=bool(page))
    volume = found["volume"]
    spacing_mm = tuple(round(mm, 2) for mm in volume.source_spacing_mm)
    # How the scan was read comes first: with a wrong scale or spacing the table means nothing.
    print(
        f"{volume.name}: HU by {volume.hu_rule}, {volume.source_shape} voxels of {spacing_mm} mm, slices "
        f"{volume.occupied}"
    )
    lines = scan_page.table(found)
    # Without a page no slices were looked at.
    columns = len(scan_page.COLUMNS) - (not page)
    print(
        results.markdown_table(scan_page.COLUMNS[:columns], [line[:columns] for line in lines])
        + report.NOTICE
    )
    if page:
        print(scan_page.write_page(found, page))


def _ct_run(folder_or_config: str, task: str) -> Path:
    folder = config.run_folder(folder_or_config)
    system = config.system_of(folder)
    if system != "ct_clip":
        raise ValueError(f"{task}: {folder} is a {system} run; only ct_clip runs look at scans")
    return folder


# Tables cut by patient --------------------------------------------------------------------------------------
def split_tables(
    labels: str,
    folder: str,
    sizes: str,
    seed: int,
    tables: Sequence[str] = (),
    patient: str = "",
    pattern: str = "",
    target: int = 0,
) -> None:
    """Cut a label table and others (reports, metadata) into parts by patient: `valid_reports.csv` ->
    `folder/{part}_reports.csv`.

    Everything is read and checked before anything is written, and no file that exists is replaced.

    Args:
        sizes: "part=size,...", volumes or shares.
        patient: a column of one of the tables that says whose volume it is.
        pattern: a regular expression that finds the patient in a volume's name, see `names.patients_of`.
        target: above 0, the rule of the reference with this target and not `sizes` and `seed`; its names of
            files, too, and a summary and copies of the tables beside them.
    Raises:
        ValueError: unusable tables or sizes, two tables that would be cut into one file, an output that
            exists.
    """
    files.check_writable(folder, folder=True)
    all_tables = (labels, *tables)
    volumes, finding_names, findings = reports.read_labels(labels, patient=patient)
    column = None
    if patient:
        column = reports.read_patients(all_tables, patient)
    patients = names.patients_of(volumes, pattern, column)
    if target:
        indices_of_part = reports.split_like_reference(patients, target)
    else:
        indices_of_part = reports.split_patients(volumes, findings, _parse_sizes(sizes), seed, patients)
    rows_of_table = {path: files.read_csv(path, ("VolumeName",)) for path in all_tables}
    outputs = _outputs_of_split(list(indices_of_part), all_tables, Path(folder), like_reference=target > 0)
    for path, rows in rows_of_table.items():
        _check_volumes(path, rows, {*volumes}, labels)

    # All checks have passed: from here on only a full disk can stop it half-way.
    for part, indices in indices_of_part.items():
        # Tables need not list the volumes in the order of the labels, nor list all of them.
        chosen = {volumes[i] for i in indices}
        for path, rows in rows_of_table.items():
            rows_of_part = [row for row in rows if _volume_of(row) in chosen]
            files.write_csv(outputs[part, path], rows_of_part, list(rows[0]))
        num_patients = len({patients[i] for i in indices})
        print(
            f"{part}: {len(indices)} volumes of {num_patients} patients, mean prevalence "
            f"{findings[indices].mean():.3f} (all: {findings.mean():.3f})"
        )
    prevalence = [findings[indices].mean(0) for indices in indices_of_part.values()]
    gap = np.ptp(prevalence, axis=0)
    print(f"largest difference in prevalence: {finding_names[gap.argmax()]}, {gap.max():.3f}")
    # What the reference writes beside the parts.
    if target:
        for path in all_tables:
            with files.atomic(outputs["original", path]) as tmp:
                shutil.copyfile(path, tmp)
        chosen = {patients[i] for i in indices_of_part["valid"]}
        numbers = [patient.rpartition("_")[2] for patient in chosen]
        are_numbers = all(number.isdecimal() for number in numbers)
        summary = {
            "total_original_volumes": len(volumes),
            "validation_volumes": len(indices_of_part["valid"]),
            "test_volumes": len(indices_of_part["test"]),
            "validation_patients": len(chosen),
            "test_patients": len({*patients} - chosen),
            "target_validation_size": target,
            "validation_patient_ids": sorted(map(int, numbers)) if are_numbers else sorted(chosen),
        }
        files.write_text(outputs["summary", ""], json.dumps(summary, indent=2) + "\n")


def _check_volumes(path: str, rows: Sequence[dict[str, str]], volumes: set[str], labels: str) -> None:
    """Raise where a table is about none of the labelled volumes, and warn of its rows about others."""
    listed = {_volume_of(row) for row in rows}
    unknown = len(listed - volumes)
    # No name in common is another data set, or names of another form; a few unknown ones are normal.
    if unknown == len(rows):
        raise ValueError(f"split: {path}: none of its {len(rows)} rows is about a volume of {labels}")
    if unknown:
        _log.warning(
            "%s: %d of %d rows are about volumes without labels and are in no part", path, unknown, len(rows)
        )


def _volume_of(row: dict[str, str]) -> str:
    return names.volume_name(row["VolumeName"].strip())


def _parse_sizes(text: str) -> dict[str, float]:
    """{part: size} from "part=size,part=size"."""
    items = text.split(",")
    sizes = {}
    for item in items:
        try:
            # Without exactly one "=" the unpacking is a ValueError, too.
            name, size = item.split("=")
            sizes[name.strip()] = float(size)
        except ValueError as e:
            raise ValueError(f"split: sizes must be name=number,name=number, got {text!r}") from e
    # A name becomes that of a file: with a slash it would leave the folder.
    valid = [name for name in sizes if re.fullmatch(r"\w[\w.-]*", name)]
    if len(valid) < len(items):
        raise ValueError(f"split: sizes must name each part once, in letters and digits, got {text!r}")
    return sizes


def _outputs_of_split(
    part_names: Sequence[str], tables: Sequence[str], folder: Path, like_reference: bool
) -> dict[tuple[str, str], Path]:
    """{(part, table): the file to write}; refuses what would overwrite a file, or be written twice.

    Like the reference: the part "valid" of reports and metadata is called "validation", a summary and a copy
    of each table are kept.
    """
    outputs: dict[tuple[str, str], Path] = {}
    for part in part_names:
        for number, table in enumerate(tables):
            # "valid_reports.csv" is called by the split it came from: that is replaced by the part's name.
            name = Path(table).name
            prefix = part
            # The first table is that of the labels.
            if like_reference and part == "valid" and number:
                prefix = "validation"
            path = folder / f"{prefix}_{name.partition('_')[2] or name}"
            if path in outputs.values():
                raise ValueError(
                    f"split: {' and '.join(tables)}: two of these would be cut into {path}; rename one of "
                    "them"
                )
            outputs[part, table] = path
    if like_reference:
        outputs["summary", ""] = folder / "split_summary.json"
        for table in tables:
            outputs["original", table] = folder / f"original_{Path(table).name}"
    for path in outputs.values():
        if path.exists():
            raise ValueError(
                f"split: {path} exists and is not replaced; name another folder with --out, or move it away"
            )
    return outputs
