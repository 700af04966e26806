"""What frozen weights make of inputs, computed once and kept on disk for later runs and other processes.

A cache is any place that shows an entry whole or not at all and is found by weights and settings: a
`store.Store` where the inputs are known beforehand, a `CacheFolder` where they come one by one.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from attrs import frozen

from medvl.base import files, processes
from medvl.base.display import track


def compute_missing(
    names: Sequence[str],
    is_cached: Callable[[str], bool],
    compute: Callable[[str], None],
    title: str,
    *,
    together: bool = False,
) -> None:
    """Compute what a cache lacks, with a progress bar. A run that was stopped goes on where it was.

    Args:
        compute: computes the entry of a name and writes it.
        together: all processes call this at once. Each computes its share, and waits until all have.
    """
    for name in track(missing_names(names, is_cached, together=together), title):
        if not is_cached(name):  # an entry of the same content may have come since
            compute(name)
    if together:
        processes.wait_for_all()


def missing_names(
    names: Sequence[str], is_cached: Callable[[str], bool], *, together: bool = False
) -> list[str]:
    """What a cache lacks; of several processes (`together`) the share that this one is to compute."""
    if together:
        # By place in the list, not among those that are missing: processes see each other's entries as they
        # come.
        names = names[processes.rank() :: processes.world_size()]
    return [name for name in names if not is_cached(name)]


@frozen(kw_only=True)
class CacheFolder:
    """A folder with one .npy for each input, called by a digest of its key. Many processes may write at once.

    Attributes:
        folder: is of certain weights and settings; others must never find it.
        shape: of every array.
        remedy: ends the message about a file that is broken.
    """

    folder: Path
    shape: tuple[int, ...]
    remedy: str

    def path(self, key: str) -> Path:
        """Where the array of a key is. The key says what the content of the input is."""
        # A digest, since a key may be longer than a file name and hold any character.
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.npy"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def write(self, key: str, array: np.ndarray) -> None:
        """Write an array, atomically."""
        files.write_array(self.path(key), array)

    def read(self, key: str) -> np.ndarray:
        """The array of a key; a fresh copy.

        Raises:
            ValueError: the file is broken or its array has another shape; ends with the remedy.
        """
        return files.read_array(self.path(key), self.shape, self.remedy)
