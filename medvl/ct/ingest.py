"""Preprocess a folder of CT scans into one store, and show what came out as a contact sheet.

A run resumes where the last one stopped, works in several processes, and lists every refused scan with its
reason in a table.
"""

import functools
import hashlib
import logging
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from PIL import Image, ImageDraw, ImageFont

from medvl.base import files, store
from medvl.base.cluster import map_on_cluster, open_cluster
from medvl.base.display import track
from medvl.base.files import PathLike
from medvl.base.store import Store
from medvl.base.workers import worker_pool
from medvl.ct import audit, dicom, metadata_table, names, preprocess, scans
from medvl.ct.header import ScanError
from medvl.ct.preprocess import CtConfig, Volume
from medvl.ct.volumes import check_sources, keeps_sources, read_volume, reserve_volumes, write_volume

log = logging.getLogger(__name__)

REJECTED = ("name", "path", "reason")  # columns of the table of rejected scans
_WORKER_DIED = "its worker process died, most likely out of memory; preprocess it on a machine with more"


@frozen(kw_only=True)
class Summary:
    """What one run did."""

    done: int  # volumes written
    skipped: int  # volumes that were there before
    rejected: dict[str, str]  # {name: reason}


@frozen(kw_only=True)
class _Job:
    name: str
    path: Path
    metadata: dict[str, str] | None


def preprocess_folder(
    source: PathLike,
    store_path: PathLike,
    cfg: CtConfig = CtConfig(),
    metadata_csv: PathLike = "",
    workers: int = 1,
    progress: bool = True,
    exclude_txt: PathLike = "",
    cluster: str = "",
) -> Summary:
    """Preprocess every scan of `source` into the store `store_path`.

    Run it again to resume a run that was stopped, or when scans were added. Scans that cannot be used are
    listed in `rejected_csv(store_path)` at the end of a run, and the next run tries them again.

    Args:
        source: a folder, searched with all its subfolders for `scans.SUFFIXES` and series of DICOM (see
            `find_scans`), one such file, or a CSV with a column `path` (or `VolumeName`), relative to the CSV.
        metadata_csv: table with a column `VolumeName`; a scan without a row in it is rejected.
        workers: 1 works in this process. More are fresh processes, so a script needs `if __name__ ==
            "__main__":`; a scan whose worker dies (out of memory) is then rejected and the run goes on.
        exclude_txt: a list of volumes to leave out, see `names.read_list`.
        cluster: instead of `workers`, where Dask is, see `open_cluster`; every machine must see the scans and
            the store at the same path. The store is then a folder, in which each worker writes its shard.
    Raises:
        ValueError: no scans, two scans of one name, both releases of CT-RATE, an unusable CSV, a store made
            with other settings, scans that are other files than those that were written, another run at work
            on it, or no such cluster.
    """
    store_path = Path(store_path)
    if cluster:  # whose workers stand in other folders
        source, store_path = Path(source).absolute(), store_path.absolute()
    _refuse_overwrite(store_path, source, metadata_csv, exclude_txt)
    listed = list_scans(source)
    audit.check_one_release(source, [path for _, path in listed])
    paths = _by_name(source, listed)
    if exclude_txt:
        paths = _leave_out(paths, exclude_txt)
    rows = None
    if metadata_csv:
        rows = metadata_table.read_metadata(metadata_csv, paths, preprocess.metadata_columns(cfg))
    # All that can be refused without the store has been refused: a wrong call leaves no empty store behind.
    opened = open_cluster(cluster) if cluster else nullcontext()
    with opened as client, files.file_lock(store_path):
        files.remove_unfinished_file(rejected_csv(store_path))
        stored_names = reserve_volumes(store_path, paths, cfg, sharded=bool(cluster))
        # Making room writes a new file in the place of the old one.
        _open_once.cache_clear()
        stored = store.open_store(store_path)
        if keeps_sources(stored):
            check_sources(stored, paths)
        pending = [name for name in paths if name not in stored_names]
        # Scans that are in the store already are not read again.
        rejected, jobs = {}, []
        for name in pending:
            if rows is not None and name not in rows:
                rejected[name] = f"{metadata_csv}: has no row for it"
            else:
                metadata = rows[name] if rows is not None else None
                jobs.append(_Job(name=name, path=paths[name], metadata=metadata))
        # Sent to worker processes with each job, so it must be picklable: no closure. Those of a cluster outlive
        # the run: by its digits they know that they need a new shard, with room for its names.
        run_id = uuid.uuid4().hex if cluster else ""
        run = functools.partial(_run_job, store_path=store_path, cfg=cfg, run_id=run_id)
        rejected |= _run_jobs(jobs, run, store_path, workers, progress, len(paths) - len(jobs), client)
        # Written also when none was rejected, in the place of the table of the run before.
        rejected_rows = []
        for name, reason in sorted(rejected.items()):
            rejected_rows.append({"name": name, "path": paths[name], "reason": reason})
        files.write_csv(rejected_csv(store_path), rejected_rows, REJECTED)
    return Summary(
        done=len(pending) - len(rejected),
        skipped=len(paths) - len(pending),
        rejected=rejected,
    )


def _leave_out(paths: dict[str, Path], exclude_txt: PathLike) -> dict[str, Path]:
    excluded = set(names.read_list(exclude_txt))
    kept = {name: path for name, path in paths.items() if name not in excluded}
    if not kept:
        raise ValueError(f"{exclude_txt}: leaves out all {len(paths)} scans")
    # None is a part of the data without any of them, or the wrong list.
    level = logging.INFO if len(kept) < len(paths) else logging.WARNING
    log.log(level, "%s: leaves out %d of %d scans", exclude_txt, len(paths) - len(kept), len(paths))
    return kept


def _refuse_overwrite(store_path: Path, *inputs: PathLike) -> None:
    """Refuse an input that the run would overwrite: its own table of rejected scans.

    The store needs no check: an existing file that is no store is refused when it is opened.
    """
    table = rejected_csv(store_path)
    for path in inputs:
        if path and table.exists() and table.resolve() == Path(path).resolve():
            raise ValueError(
                f"{path}: a run into {store_path} writes its rejected scans there; give the table "
                "another name to read it"
            )


def rejected_csv(store_path: PathLike) -> Path:
    """Where a run into `store_path` lists the scans it refused: `volumes.h5` -> `volumes.rejected.csv`."""
    return Path(store_path).with_suffix(".rejected.csv")


def find_scans(source: PathLike) -> dict[str, Path]:
    """{volume name: path} of a folder, a CSV or one scan, sorted by name.

    A series of DICOM is called as the folder or ZIP that it lies in, with the folders above it where two have
    one name, and with a digest of its UID where it is one of several in there. Its path ends in its UID.

    Raises:
        ValueError: no scans, or two of one name.
    """
    return _by_name(source, list_scans(source))


def list_scans(source: PathLike) -> list[tuple[str, Path]]:
    """(volume name, path) of the scans in a folder, a CSV or one scan, sorted by path; names may be shared."""
    source = Path(source)
    place, series = dicom.split(source)
    if series:
        found = [(names.volume_name(place), source)]
    elif source.is_dir() or dicom.is_series(source):
        found = _scans_below(source)
    elif source.name.lower().endswith(scans.SUFFIXES):
        found = [(names.volume_name(source), source)]
    else:
        rows = files.read_csv(source)
        # Paths are relative to the table, so that a folder can be moved with it.
        column = next((c for c in ("path", "VolumeName") if c in rows[0]), None)
        if column is None:
            raise ValueError(
                f"{source}: must have a column 'path' or 'VolumeName', found {', '.join(map(repr, rows[0]))}"
            )
        found = [(names.volume_name(row[column]), source.parent / row[column]) for row in rows]
    return sorted(found, key=lambda scan: scan[1])


def _by_name(source: PathLike, listed: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for name, path in listed:
        # Such a name could not be written into the store or the table of rejected scans.
        files.check_text_name(path)
        if name in paths:
            raise ValueError(f"{source}: two scans are called {name!r}: {paths[name]} and {path}; rename one")
        paths[name] = path
    return dict(sorted(paths.items()))


def _scans_below(folder: Path) -> list[tuple[str, Path]]:
    """(volume name, path) of the scans of a folder, or of one file of DICOM or ZIP."""
    found = []
    slices_of: dict[Path, list[Path]] = {}  # the files of each folder, and each ZIP
    for path in files.files_below(folder) if folder.is_dir() else [folder]:
        is_zip = path.suffix.lower() == ".zip" and not path.name.startswith("._")  # of macOS
        if path.name.lower().endswith(scans.SUFFIXES):
            found.append((names.volume_name(path), path))
        # By content, as series often have names without an ending. Office documents are ZIPs, too.
        elif is_zip or (dicom.is_series(path) and not dicom.is_zip(path)):
            slices_of.setdefault(path if is_zip else path.parent, []).append(path)
    found += _name_series(folder, slices_of)
    if not found:
        raise ValueError(f"{folder}: holds no {', '.join(scans.SUFFIXES)} file and no series of DICOM")
    return found


def _name_series(folder: Path, slices_of: Mapping[Path, list[Path]]) -> list[tuple[str, Path]]:
    """(volume name, path) of each series in these folders and ZIPs below `folder`, see `find_scans`."""
    found = []
    places_of_uid: dict[str, list[Path]] = {}
    num_places = Counter(names.volume_name(place) for place in slices_of)
    for place, paths in track(slices_of.items(), "looking for series"):
        name = names.volume_name(place)
        if num_places[name] > 1 and place != folder:
            name = "_".join([*place.parent.relative_to(folder).parts, name])
        name = name or place.resolve().name  # of "."
        try:
            uids = [*dicom.list_series(place if place.is_file() else paths)]
        except ScanError:
            # A path without a UID is that of the place. Its own job says what is wrong, so that the others go on.
            uids = [""]
        # A folder may hold nothing but reports; of a ZIP it is told. A series whose UID is no number, as some programs
        # that remove names write it, is found as the only one of its place.
        is_odd = any(dicom.split(place / uid)[1] != uid for uid in uids)
        if is_odd or (not uids and place.is_file()):
            uids = [""]
        for uid in uids:
            digest = hashlib.sha256(uid.encode()).hexdigest()[:8]
            found.append((f"{name}_{digest}" if len(uids) > 1 else name, place / uid))
            places_of_uid.setdefault(uid, []).append(place)
    # Places of images without a UID, or that could not be listed, have nothing in common.
    for uid in ("", dicom.NO_UID):
        places_of_uid.pop(uid, None)
    shared = [places for places in places_of_uid.values() if len(places) > 1]
    if shared:
        log.warning(
            "%s: %d series lie in several folders or ZIPs, e.g. %s and %s, and each of these becomes a scan: bring "
            "the parts of a series together, and remove copies",
            *(folder, len(shared), *shared[0][:2]),
        )
    return found


def _run_job(job: _Job, store_path: Path, cfg: CtConfig, run_id: str = "") -> tuple[str, str]:
    """Preprocess and store one scan; returns ("", a summary) or (why it is rejected, "")."""
    try:
        volume = preprocess.preprocess_scan(job.path, cfg, job.metadata)
    except ScanError as e:
        return str(e), ""
    # A scan that is too large for this machine is rejected, and the run goes on.
    except MemoryError:
        return "not enough memory", ""
    write_volume(_open_once(store_path, run_id), job.name, volume, job.path)
    scale = f"HU = {volume.slope:g} * stored + {volume.intercept:g} ({volume.hu_rule})"
    return "", f"{scale}, slices {volume.occupied}"


@functools.lru_cache(maxsize=1)
def _open_once(store_path: Path, run_id: str) -> Store:
    """The store, opened once per process: a worker reads its table of rows once and not for each scan. On a
    cluster a shard of this process, for one run.
    """
    return store.open_shard(store_path) if run_id else store.open_store(store_path)


def _run_jobs(
    jobs: list[_Job],
    run: Callable,
    store_path: Path,
    workers: int,
    progress: bool,
    skipped: int,
    client: Any = None,
) -> dict[str, str]:
    """Run the jobs and log each; returns {name: reason} of the rejected ones."""
    # Lazily, so that each scan is logged when it is done.
    results: Iterator[tuple[_Job, tuple[str, str]]] = ((job, run(job)) for job in jobs)
    if client is not None:
        results = map_on_cluster(client, run, jobs, lost=(_WORKER_DIED, ""))
    elif workers > 1:
        results = _run_parallel(jobs, run, store_path, workers)
    rejected = {}
    for job, (reason, summary) in track(results, "scans", skipped + len(jobs), skipped, progress):
        if reason:
            rejected[job.name] = reason
            # The reason begins with the path of the scan, which the log need not repeat in full.
            folder = dicom.split(job.path)[0].parent
            log.warning("%s: rejected: %s", job.name, reason.replace(f"{folder}/", ""))
        else:
            log.info("%s: %s", job.name, summary)
    return rejected


def _run_parallel(
    jobs: list[_Job], run: Callable, store_path: Path, workers: int
) -> Iterator[tuple[_Job, tuple[str, str]]]:
    """Run jobs in worker processes.

    When one process dies, the pool is lost with all jobs in it, and nothing tells which of them killed it.
    These suspects are run again, each alone in a pool of one, to find out.
    """
    queue, suspects = deque(jobs), deque[_Job]()
    # One pool for each turn of this loop; a turn ends when its jobs are done or its pool breaks.
    while queue or suspects:
        alone = bool(suspects)
        source = suspects if alone else queue
        size = 1 if alone else workers
        in_flight = 1 if alone else 2 * workers  # two a worker, so that none waits for its next job
        running: dict[Future, _Job] = {}
        with worker_pool(size) as processes:
            try:
                while running or source:
                    while source and len(running) < in_flight:
                        # It leaves the queue only once it is submitted: a broken pool refuses it.
                        running[processes.submit(run, source[0])] = source[0]
                        source.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running[future], future.result()
                        del running[future]
            except BrokenProcessPool:
                # A worker may have died after it stored its scan.
                stored = store.open_store(store_path).names
                for job in running.values():
                    if job.name in stored:
                        yield job, ("", "stored before its worker died")
                    elif alone:
                        yield job, (_WORKER_DIED, "")
                    else:
                        suspects.append(job)


def contact_sheet(
    volumes: Store | Iterable[Volume],
    path: PathLike,
    only: Sequence[str] = (),
    window_hu: tuple[float, float] = (-1000, 600),
    *,
    labels: Sequence[str] = (),
) -> None:
    """Write a PNG of the middle axial, coronal and sagittal slice of each volume, true to scale, names below.

    Radiological display: head up, the patient's right on the image's left, the spine at the bottom (axial) or
    on the right (sagittal).

    Args:
        only: names to show of a store; all when empty. A volume takes 0.3 MB of memory.
        labels: text below each volume instead of its name, which may say who the patient is.
    """
    if isinstance(volumes, Store):
        stored = volumes
        volumes = (read_volume(stored, name) for name in only or stored.names)
    cards = []
    for i, volume in enumerate(volumes):
        label = labels[i] if labels else volume.name
        cards.append(_draw_card(volume, label, window_hu))
    if not cards:
        raise ValueError(f"{path}: a contact sheet needs at least one volume")
    # A card is three tiles wide and one high: this makes the sheet about square.
    columns = max(1, round((len(cards) / 3) ** 0.5))
    width, height = cards[0].size
    rows = -(-len(cards) // columns)
    sheet = Image.new("L", (columns * width, rows * height))
    for i, card in enumerate(cards):
        sheet.paste(card, (i % columns * width, i // columns * height))
    with files.atomic(path) as tmp:
        sheet.save(tmp, format="PNG")


def as_displayed(volume: Volume) -> tuple[np.ndarray, list[float]]:
    """Voxels along axes that grow to inferior, posterior and left, as an image is read from its upper left corner,
    and their spacing in mm.
    """
    order, flips = [], []
    for pair in ("SI", "AP", "RL"):
        axis = next(i for i, letter in enumerate(volume.axes) if letter in pair)
        order.append(axis)
        flips.append(slice(None, None, 1 if volume.axes[axis] in "IPL" else -1))
    return volume.voxels.transpose(order)[tuple(flips)], [volume.spacing_mm[i] for i in order]


def _draw_card(
    volume: Volume, label: str, window_hu: tuple[float, float], tile: int = 200, margin: int = 18
) -> Image.Image:
    """The three slices of one volume side by side, with its label below."""
    voxels, spacing_mm = as_displayed(volume)
    mm = np.array(voxels.shape) * spacing_mm
    # The middle of the scan, not of the padded volume; counted from the other end where the axis was flipped.
    z = sum(volume.occupied) // 2
    if volume.axes[0] != "I":
        z = len(voxels) - 1 - z
    y, x = voxels.shape[1] // 2, voxels.shape[2] // 2
    # Axial, coronal, sagittal, each with its axes down and across.
    slices = (
        (voxels[z], 1, 2),
        (voxels[:, y], 0, 2),
        (voxels[:, :, x], 0, 1),
    )
    low, high = window_hu
    card = Image.new("L", (3 * tile, tile + margin))
    for i, (plane, down, across) in enumerate(slices):
        grey = (preprocess.to_hu(plane) - low) / (high - low) * 255
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        # One scale in mm for all three, so that they can be compared; 4 pixels stay free between the tiles.
        width, height = (max(1, round(mm[axis] / mm.max() * (tile - 4))) for axis in (across, down))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        card.paste(image, (i * tile + (tile - width) // 2, (tile - height) // 2))
    ImageDraw.Draw(card).text((4, tile), label, fill=255, font=ImageFont.load_default(12))
    return card
