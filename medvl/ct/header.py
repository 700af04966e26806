"""What is known of a scan before its voxels: the records that every reader of scans fills."""

import numpy as np
from attrs import frozen


class ScanError(ValueError):
    """A file that cannot be used as a scan; the message names the file, what must hold and what was found."""


@frozen(kw_only=True)
class Header:
    """The header of a scan.

    scaled: scl_slope is usable (finite and not 0).
    placed: a qform or sform is set, and is not the identity that programs write for a scan of unknown
        position.
    doubt: one sentence on how the header contradicts itself about lengths or axes; "" where it is consistent.
    """

    name: str
    shape: tuple[int, int, int]  # x y z
    dtype: np.dtype  # as stored, native byte order
    affine: np.ndarray  # [4, 4] float64, voxel index -> mm in RAS+ (right, anterior, superior)
    spacing_mm: tuple[float, float, float]  # x y z, the lengths of the affine's columns
    slope: float = 1.0
    intercept: float = 0.0
    scaled: bool = False
    placed: bool
    doubt: str = ""


@frozen(kw_only=True, eq=False)
class Scan:
    """A scan in memory. `voxels` [x, y, z] are Fortran-ordered, in the stored dtype, not scaled."""

    header: Header
    voxels: np.ndarray

    @property
    def name(self) -> str:
        return self.header.name
