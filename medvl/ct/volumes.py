"""Preprocessed volumes in a store: what a row says of its volume, and whether its scan is still the same."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from medvl.base import files, store
from medvl.base.display import track
from medvl.base.store import Store
from medvl.ct import dicom, preprocess
from medvl.ct.preprocess import CtConfig, Volume

FIELDS = (  # of a row, beside its name: what `Volume` knows
    ("spacing_mm", "f8", 3),
    ("source_spacing_mm", "f8", 3),
    ("source_shape", "i4", 3),
    ("occupied", "i4", 2),
    ("hu_rule", "S16"),
    ("slope", "f8"),
    ("intercept", "f8"),
)
SOURCE_FIELDS = (  # the file that the volume was made from, so that another file of that name is noticed
    ("source_bytes", "i8"),
    ("source_mtime_ns", "i8"),
    ("source_digest", "S64"),
)


def reserve_volumes(path: Path, names: Iterable[str], cfg: CtConfig, sharded: bool = False) -> set[str]:
    """Make a store with room for these volumes, or make room in the one that is there.

    Args:
        sharded: it is a folder of shards, for workers on several machines.
    Returns:
        the names of the volumes that are already in it.
    Raises:
        ValueError: the store was made with other settings, or is one file where it must be a folder.
    """
    names = list(names)
    settings = preprocess.settings_of(cfg)
    file = store.begin_shards(path) if sharded else store.main_file(path)
    if not file.exists():
        shape = preprocess.size_of(cfg)
        store.create(file, names, shape, cfg.dtype, settings, (*FIELDS, *SOURCE_FIELDS))
    stored = set(store.open_store(path, expect=settings).names)
    store.grow(path, names)
    return stored


def keeps_sources(volumes: Store) -> bool:
    """Whether rows say which file a volume was made from; stores of earlier versions do not."""
    return "source_digest" in volumes.fields


def check_sources(volumes: Store, scans: Mapping[str, Path]) -> None:
    """Refuse scans that are other files than those that the stored volumes were made from.

    A scan that was removed since is not missed, and neither is one whose volume is not stored yet.

    Args:
        volumes: a store that `keeps_sources`.
        scans: {volume name: path of its scan}.
    Raises:
        ValueError: scans were replaced (counted, with the first of them).
    """
    stored = set(volumes.names)
    replaced = []
    for name, path in track(scans.items(), "comparing scans"):
        if name in stored and dicom.split(path)[0].exists() and not _is_source(volumes, name, path):
            replaced.append(name)
    if replaced:
        raise ValueError(
            f"{volumes.path}: {len(replaced)} scans are not the files that were written into it, e.g. "
            f"{replaced[0]}; give the new files other names, or remove the store to make it again"
        )


def _is_source(volumes: Store, name: str, path: Path) -> bool:
    row = volumes.row(name)
    if (row["source_bytes"], row["source_mtime_ns"]) == _size_and_time(path):
        return True
    # A copy of the same file has another time, and a folder may have got another series: only the content tells.
    return row["source_digest"] == _digest(path)


def _size_and_time(source: Path) -> tuple[int, int]:
    """Bytes of all files among which a scan is, and the latest time of a change to one, in ns."""
    stats = [path.stat() for path in dicom.source_files(source)]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _digest(source: Path) -> str:
    # Of the series alone: others may have come to its folder since.
    digests = [files.file_digest(path) for path in dicom.series_files(source)]
    # Sorted: files of a series may be renamed.
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def write_volume(volumes: Store, name: str, volume: Volume, source: Path) -> None:
    """Write a volume and its row into the room that `reserve_volumes` made for this name."""
    row = {field: getattr(volume, field) for field, *_ in FIELDS}
    if keeps_sources(volumes):
        row["source_bytes"], row["source_mtime_ns"] = _size_and_time(source)
        row["source_digest"] = _digest(source)
    store.put(volumes, name, volume.voxels, row)


def read_volume(volumes: Store, name: str) -> Volume:
    """A volume as `preprocess_scan` made it."""
    row = volumes.row(name)
    known = {field: row[field] for field, *_ in FIELDS}
    return Volume(name=name, voxels=volumes.read(name), axes=volumes.settings["axes"], **known)
