"""A folder of CT scans into one store: resumable, in many processes, with every refused scan and its reason in a table; contact sheets."""

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from attrs import frozen
from PIL import Image, ImageDraw, ImageFont

from medvl.base import files, store
from medvl.base.display import track
from medvl.base.files import PathLike
from medvl.base.store import Store
from medvl.base.workers import worker_pool
from medvl.ct import metadata_table, names, preprocess, scans
from medvl.ct.preprocess import CtConfig, Volume
from medvl.ct.scans import ScanError
from medvl.ct.volumes import check_sources, keeps_sources, read_volume, reserve_volumes, write_volume

log = logging.getLogger(__name__)

REJECTED = ("name", "path", "reason")


@frozen(kw_only=True)
class Summary:
    """Of one run: volumes written, volumes that were there before, and {name: reason} of those refused."""

    done: int
    skipped: int
    rejected: dict[str, str]


@frozen(kw_only=True)
class _Job:
    name: str
    path: Path
    metadata: dict[str, str] | None


def preprocess_folder(
    source: PathLike,
    out: PathLike,
    cfg: CtConfig = CtConfig(),
    metadata_csv: PathLike = "",
    workers: int = 1,
    progress: bool = True,
) -> Summary:
    """Preprocess every scan of `source` into the store `out`; run again to go on where a run was stopped or scans were added.

    Scans that cannot be used are listed in `rejected_csv(out)` (written at the end of a run) and tried again by the next run.

    Args:
        source: a folder, searched with all its subfolders for `.nii` and `.nii.gz`, one such file, or a CSV with a column `path` (or
            `VolumeName`), relative to the CSV.
        metadata_csv: table with a column `VolumeName`; a scan without a row in it is rejected.
        workers: 1 works in this process; more are fresh processes, so a script needs `if __name__ == "__main__":`. A scan whose
            worker dies (out of memory) is then rejected and the run goes on.
    Raises:
        ValueError: no scans, two scans of one name, an unusable CSV, a store made with other settings, scans that are other files than
            those that were written, or another run at work on it.
    """
    out = Path(out)
    _keep_inputs(out, source, metadata_csv)
    paths = find_scans(source)
    rows = (
        metadata_table.read_metadata(metadata_csv, paths, preprocess.metadata_columns(cfg))
        if metadata_csv
        else None
    )
    with files.file_lock(out):
        files.remove_unfinished_file(rejected_csv(out))
        done = reserve_volumes(out, paths, cfg)
        _open_once.cache_clear()  # it may be another file now
        stored = store.open_store(out)
        if keeps_sources(stored):
            check_sources(stored, paths)
        missing = (
            {}
            if rows is None
            else {n: f"{metadata_csv}: has no row for it" for n in paths if n not in rows and n not in done}
        )
        jobs = [
            _Job(name=n, path=p, metadata=rows[n] if rows else None)
            for n, p in paths.items()
            if n not in done and n not in missing
        ]
        rejected = missing | _work(
            jobs,
            functools.partial(_one, out=out, cfg=cfg),
            out,
            workers,
            progress,
            len(paths) - len(jobs),
        )
        files.write_csv(
            rejected_csv(out),
            [dict(zip(REJECTED, (n, paths[n], r), strict=True)) for n, r in sorted(rejected.items())],
            REJECTED,
        )
    return Summary(
        done=len(jobs) + len(missing) - len(rejected),
        skipped=len(paths) - len(jobs) - len(missing),
        rejected=rejected,
    )


def _keep_inputs(out: Path, *inputs: PathLike) -> None:
    """Refuse an output that is one of the inputs; an existing file that is no store is refused when it is opened."""
    for path in inputs:
        if path and rejected_csv(out).exists() and rejected_csv(out).resolve() == Path(path).resolve():
            raise ValueError(
                f"{path}: a run into {out} writes its rejected scans there; give the table another name to read it"
            )


def rejected_csv(out: PathLike) -> Path:
    """Where a run into `out` lists the scans it refused: `volumes.h5` -> `volumes.rejected.csv`."""
    return Path(out).with_suffix(".rejected.csv")


def find_scans(source: PathLike) -> dict[str, Path]:
    """{volume name: path} of a folder or CSV, sorted by name; raises ValueError for none and for two of one name."""
    source = Path(source)
    if source.is_dir():
        found = _scans_below(source)
    elif source.name.lower().endswith((".nii", ".nii.gz")):
        found = [source]
    else:
        rows = files.read_csv(source)
        column = next((c for c in ("path", "VolumeName") if c in rows[0]), None)
        if column is None:
            raise ValueError(
                f"{source}: must have a column 'path' or 'VolumeName', found {', '.join(map(repr, rows[0]))}"
            )
        found = [source.parent / row[column] for row in rows]
    paths: dict[str, Path] = {}
    for path in sorted(found):
        files.check_text_name(path)
        if (other := paths.setdefault(names.volume_name(path), path)) is not path:
            raise ValueError(
                f"{source}: two scans are called {names.volume_name(path)!r}: {other} and {path}; rename one"
            )
    return dict(sorted(paths.items()))


def _scans_below(folder: Path) -> list[Path]:
    every = files.files_below(folder)
    found = [path for path in every if path.name.lower().endswith((".nii", ".nii.gz"))]
    others = [
        path
        for path in every
        if path.suffix.lower() in (".dcm", ".ima") or (not found and scans.is_dicom(path))
    ]
    if not found:
        dicom = f", but {len(others)} files of DICOM; {scans.FROM_DICOM}" if others else ""
        raise ValueError(f"{folder}: holds no .nii or .nii.gz file{dicom}")
    if others:
        log.warning("%s: %d files of DICOM are left out; %s", folder, len(others), scans.FROM_DICOM)
    return found


def _one(job: _Job, out: Path, cfg: CtConfig) -> tuple[str, str]:
    """Preprocess and store one scan; ("", what was done) or (why not, "")."""
    try:
        volume = preprocess.preprocess_scan(job.path, cfg, job.metadata)
    except ScanError as e:
        return str(e), ""
    except MemoryError:
        return "not enough memory", ""
    write_volume(_open_once(out), job.name, volume, job.path)
    return (
        "",
        f"HU = {volume.slope:g} * stored + {volume.intercept:g} ({volume.hu_rule}), slices {volume.occupied}",
    )


@functools.lru_cache(maxsize=1)
def _open_once(out: Path) -> Store:
    """The store; a worker reads its table of rows once and not for each scan."""
    return store.open_store(out)


def _work(
    jobs: list[_Job], one: Callable, out: Path, workers: int, progress: bool, before: int
) -> dict[str, str]:
    """Do the jobs; {name: reason} of those refused."""
    rejected = {}
    results = map(lambda j: (j, one(j)), jobs) if workers <= 1 else _parallel(jobs, one, out, workers)
    for job, (reason, said) in track(results, "scans", before + len(jobs), before, progress):
        if reason:
            rejected[job.name] = reason
            log.warning("%s: rejected: %s", job.name, reason.replace(str(job.path), job.path.name))
        else:
            log.info("%s: %s", job.name, said)
    return rejected


def _parallel(
    jobs: list[_Job], one: Callable, out: Path, workers: int
) -> Iterator[tuple[_Job, tuple[str, str]]]:
    """Jobs in processes. When one dies the pool is lost with all it held: those are done again, one at a time, to find the culprit."""
    queue, suspects = deque(jobs), deque[_Job]()
    while queue or suspects:
        alone = bool(suspects)
        held: dict[Future, _Job] = {}
        with worker_pool(1 if alone else workers) as processes:
            try:
                while held or (suspects if alone else queue):
                    while (suspects if alone else queue) and len(held) < (1 if alone else 2 * workers):
                        job = (suspects if alone else queue)[0]
                        held[processes.submit(one, job)] = job
                        (suspects if alone else queue).popleft()
                    for future in wait(held, return_when=FIRST_COMPLETED).done:
                        yield held[future], future.result()
                        del held[future]
            except BrokenProcessPool:
                stored = store.open_store(out).names
                for job in held.values():
                    if job.name in stored:
                        yield job, ("", "stored before its worker died")
                    elif alone:
                        yield (
                            job,
                            (
                                "its worker process died, most likely out of memory; preprocess it where there is more",
                                "",
                            ),
                        )
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

    Radiological display: head up, the patient's right on the image's left, the spine at the bottom (axial) or right (sagittal).

    Args:
        only: names to show of a store; all when empty. A volume takes 0.3 MB of memory.
        labels: what to write below each instead of its name, which may say who the patient is.
    """
    shown: Iterable[Volume]
    if isinstance(volumes, Store):
        shown = (read_volume(volumes, name) for name in only or volumes.names)
    else:
        shown = volumes
    cards = []
    for i, v in enumerate(shown):
        label = labels[i] if labels else v.name
        cards.append(_card(v, label, window_hu))
    if not cards:
        raise ValueError(f"{path}: a contact sheet needs at least one volume")
    columns = max(1, round((len(cards) / 3) ** 0.5))
    width, height = cards[0].size
    sheet = Image.new("L", (columns * width, -(-len(cards) // columns) * height))
    for i, card in enumerate(cards):
        sheet.paste(card, (i % columns * width, i // columns * height))
    with files.atomic(path) as tmp:
        sheet.save(tmp, format="PNG")


def _card(
    v: Volume, label: str, window_hu: tuple[float, float], tile: int = 200, margin: int = 18
) -> Image.Image:
    order = [next(i for i, letter in enumerate(v.axes) if letter in pair) for pair in ("SI", "AP", "RL")]
    ipl = v.voxels.transpose(order)[tuple(slice(None, None, 1 if v.axes[i] in "IPL" else -1) for i in order)]
    mm = np.array(ipl.shape) * [v.spacing_mm[i] for i in order]
    middle = sum(v.occupied) // 2
    z, y, x = middle if v.axes[0] == "I" else len(ipl) - 1 - middle, ipl.shape[1] // 2, ipl.shape[2] // 2
    card = Image.new("L", (3 * tile, tile + margin))
    for i, (plane, rows, columns) in enumerate(((ipl[z], 1, 2), (ipl[:, y], 0, 2), (ipl[:, :, x], 0, 1))):
        low, high = window_hu
        grey = ((preprocess.to_hu(plane) - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
        size = [max(1, round(mm[a] / mm.max() * (tile - 4))) for a in (columns, rows)]
        image = Image.fromarray(grey).resize((size[0], size[1]), Image.Resampling.BILINEAR)
        card.paste(image, (i * tile + (tile - size[0]) // 2, (tile - size[1]) // 2))
    ImageDraw.Draw(card).text((4, tile), label, fill=255, font=ImageFont.load_default(12))
    return card
