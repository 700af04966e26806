"""`invoke preprocess` and `features`: scans brought into a store, and what a frozen encoder makes of them."""

import logging
from collections.abc import Sequence
from typing import Any

from medvl.base import config, files, store
from medvl.ct import ingest, preprocess
from medvl.systems import ct_clip, run
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
    of_experiment = config.unstructure(_ct_record(exp, (), "preprocess").ct) if exp else {}
    settings = config.override(of_experiment, tuple(overrides), "preprocess")
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


def _write_sheet(store_path: str, sheet: str) -> None:
    volumes = store.open_store(store_path)
    chosen = volumes.names[:_ON_SHEET]
    # Where every scan was rejected there is nothing to show; the exit status says so.
    if chosen:
        ingest.contact_sheet(volumes, sheet, chosen)
        print(f"contact sheet of {len(chosen)} volumes: {sheet}")


def print_features(exp: str, overrides: Sequence[str], cluster: str) -> None:
    """Compute the slice features of a frozen encoder ahead of training, and print where they are."""
    for features in compute_features(_ct_record(exp, overrides, "features"), cluster):
        print(f"{features.path}: slice features of {len(features.names)} volumes")


def _ct_record(exp: str, overrides: Sequence[str], task: str) -> Any:
    cfg, _ = run.resolve(exp, overrides)
    # Other systems have no `ct` table at all.
    if not isinstance(cfg, ct_clip.SYSTEM.record):
        raise ValueError(
            f"{task}: {exp} is a {cfg.system} experiment; only ct_clip experiments have settings of CT"
        )
    return cfg
