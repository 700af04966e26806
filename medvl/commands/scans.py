"""`invoke embed` and `classify`: scans looked at by a trained run of ct_clip."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medvl.base import config, files
from medvl.base.display import track
from medvl.ct import ingest
from medvl.evaluation import report, results
from medvl.hub import checkpoints
from medvl.systems.ct_clip import scan_page
from medvl.systems.ct_clip.look import embed_volume, look_at_scan, read_volume
from medvl.systems.ct_clip.run import load

_log = logging.getLogger("medvl")


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
    if Path(scan).is_dir() or scan.lower().endswith(".csv"):
        return _embed_scans(run_folder, scan, embedding_file, metadata, settings)
    # A file that cannot be read costs no loading of weights.
    volume, _ = read_volume(run_folder, scan, metadata, settings)
    embedding = embed_volume(load(run_folder), volume)
    files.write_array(embedding_file, embedding.numpy())
    print(f"{embedding_file}: {len(embedding)} numbers")
    return 0


def _embed_scans(
    run_folder: Path, source: str, embedding_file: str, metadata: str, settings: Sequence[str]
) -> int:
    names_csv = Path(embedding_file).with_suffix(".csv")
    if names_csv.resolve() in (Path(source).resolve(), Path(metadata).resolve()):
        raise ValueError(f"embed: the names are written to {names_csv}, which is read here; rename one")
    files.check_writable(names_csv)
    # Names of an earlier run may be replaced, but no other table.
    if names_csv.exists() and [*files.read_csv(names_csv)[0]] != ["VolumeName"]:
        raise ValueError(
            f"embed: the names would replace {names_csv}, which is another table; name another --out"
        )
    paths = ingest.find_scans(source)
    opened = load(run_folder)
    embeddings, num_rejected = {}, 0
    for name, path in track(paths.items(), "embedding scans", len(paths)):
        try:
            volume, _ = read_volume(run_folder, path, metadata, settings)
        except ValueError as e:
            num_rejected += 1
            _log.warning("%s: rejected: %s", name, e)
        else:
            embeddings[name] = embed_volume(opened, volume).numpy()
    if not embeddings:
        raise ValueError(f"embed: {source}: all of its {num_rejected} scans were rejected")
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
    columns, lines = [*scan_page.COLUMNS], scan_page.table(found)
    # Without a page no slices were looked at, of which the last column tells.
    if not page:
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    print(results.markdown_table(columns, lines) + report.NOTICE)
    if page:
        print(scan_page.write_page(found, page))


def _ct_run(folder_or_config: str, task: str) -> Path:
    folder = config.run_folder(folder_or_config)
    system = config.system_of(folder)
    if system != "ct_clip":
        raise ValueError(f"{task}: {folder} is a {system} run; only ct_clip runs look at scans")
    return folder
