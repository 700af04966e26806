"""Scans of RAD-ChestCT (Draelos et al. 2021, doi:10.1016/j.media.2020.101857; doi:10.5281/zenodo.6406114)."""

import math
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

SPACING_MM = 0.8  # to which all scans were resampled, along all axes
_MOST = 2**31  # bytes of a scan, far above any: a small file may inflate to any size


def read_npz(file: BinaryIO) -> np.ndarray:
    """Voxels int16 [z, y, x] in HU of a scan; indices grow to inferior, posterior and left.

    Raises:
        ValueError: no .npz, one without int16 [z, y, x] as "ct", or damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive, archive.open("ct.npy") as f:
            np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
            # Before anything is read: the header of a damaged file may ask for any memory.
            size = math.prod(shape) * 2
            if dtype != np.int16 or len(shape) != 3 or min(shape) < 2 or size > _MOST:
                raise ValueError(f"found {dtype} {list(shape)}")
            voxels = np.frombuffer(f.read(size + 1), np.int16)
            return voxels.reshape(shape, order="F" if fortran else "C")
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"must hold int16 [z, y, x] in HU under the name ct, as RAD-ChestCT: {e}") from e
