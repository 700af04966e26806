"""Files of patch features that this process has opened: what they say, and their patches while these fit in
memory. Of a packed store the table of its slides is kept, and the file stays open.

Checking, pretraining, compressing and evaluating need the same files. Each is opened once as long as its
patches are kept, and else again whenever they are read. A file that was written anew is another file.
"""

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from medvl.slides import features
from medvl.slides.features import About, Block
from medvl.slides.store import Slides, open_slides

KEPT_BYTES = 2 * 2**30  # of patches that a process keeps, those of the files that are opened first
_kept_bytes = 0
_lock = threading.Lock()
# Size, time of change of the content and of the entry. The last shows a file of the same size that was put in
# the place of another with its time, as archives do when they are unpacked.
_Version = tuple[int, int, int]


@frozen(kw_only=True, eq=False)
class _Opened:
    header: About
    patches: Block | None  # all of them; None where they are not kept


def about_file(path: Path, dims: int = 0) -> About:
    """As `features.about_slide`."""
    return _open(path, _version_of(path), _columns(path, dims)).header


def file_chunks(path: Path, size: int = 4096, *, dims: int = 0) -> Iterator[Block]:
    """As `features.chunks`."""
    patches = _open(path, _version_of(path), _columns(path, dims)).patches
    if patches is None or (dims and patches[0].shape[1] != dims):
        yield from features.chunks(path, size, dims=dims)  # which says what is wrong with the width
        return
    x, coords = patches
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        yield x[rows], None if coords is None else coords[rows]


def remembered_file_key(path: Path) -> str:
    """As `features.read_file_key`, read once as long as the file is the same."""
    return _read_key(path, _version_of(path))


def open_store(path: Path) -> Slides:
    """As `store.open_slides`."""
    return _open_store(path, _version_of(path))


def _columns(path: Path, dims: int) -> int:
    """The width where the file cannot say it: in a table without a header columns behind it may be others."""
    return dims if path.suffix.lower() == ".csv" else 0


def _version_of(path: Path) -> _Version:
    try:
        stat = path.stat()
    except OSError:
        return -1, -1, -1  # whoever opens it says why
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(maxsize=2**16)
def _open(path: Path, version: _Version, dims: int) -> _Opened:
    header, patches = features.open_patches(path, dims=dims, keep=_reserve)
    return _Opened(header=header, patches=patches)


@functools.lru_cache(maxsize=2**16)
def _read_key(path: Path, version: _Version) -> str:
    return features.read_file_key(path)


# One: a store that was replaced would keep its disk space as long as it is held open here.
@functools.lru_cache(maxsize=1)
def _open_store(path: Path, version: _Version) -> Slides:
    return open_slides(path)


def _reserve(size: int) -> bool:
    """Whether so many bytes can be kept; they are counted then."""
    global _kept_bytes
    with _lock:
        if _kept_bytes + size > KEPT_BYTES:
            return False
        _kept_bytes += size
        return True
