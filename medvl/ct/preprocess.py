"""From a CT scan file to a volume on a fixed grid, in Hounsfield units: `preprocess_scan`.

Output axes are [z, y, x] (preset `ctclip`: [z, x, y], as its network reads them). `Volume.axes` says where
each index grows to ("SAR": superior, anterior, right). This module has the presets and the orientation;
`hounsfield` finds the scale to HU, and `grids` resamples.
"""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import numpy as np
import torch
from attrs import fields, frozen
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from torch import Tensor

from medvl.base import config
from medvl.ct import grids, hounsfield, metadata_table, scans
from medvl.ct.dicom import Source
from medvl.ct.hounsfield import Scale
from medvl.ct.scans import ScanError

T = TypeVar("T")
log = logging.getLogger(__name__)

HU = (-1000.0, 1000.0)  # every preset clips to this
_MAX_VOXELS = 1024**3
_MM = (0.01, 1000.0)  # of an output voxel
# Of the output's axes, and their voxels in mm; `reference` scales by voxel counts, so it has no spacing.
_SIZES = {
    "mm": (160, 224, 224),
    "reference": (160, 224, 224),
    "ctclip": (240, 480, 480),
    "merlin": (160, 224, 224),
}
_SPACINGS = {"mm": (3.0, 1.75, 1.75), "reference": (), "ctclip": (1.5, 0.75, 0.75), "merlin": (3.0, 1.5, 1.5)}
_SAMPLED = 32  # voxels along each axis of a slice that decide about the scale


@frozen(kw_only=True)
class CtConfig:
    """How a scan becomes a volume.

    preset: `mm` is a physical grid centred on the scan; `reference` has one scale for all axes in voxel
        counts (peterhan91/clip_3d_ct); `ctclip` is that of ibrahimethemhamamci/CT-CLIP
        (data_inference_nii.py); `merlin` that of StanfordMIMI/Merlin (MONAI transforms; oblique scans lie on
        their first voxel here, in MONAI sometimes on their centre).
    size, spacing_mm: of the output's axes; () is the preset's own; only `mm` takes another spacing. `mm`
        covers 480 x 392 x 392 mm: a chest CT's field of view is 350-400 mm (CT-RATE: median 0.68 mm x 512),
        and 480 mm hold a chest from neck to below the adrenals.
    antialias: when shrinking, average what an output voxel covers (triangle filter) instead of reading two
        samples. auto: on for `mm`, off for the other presets, whose authors did not. Measured on a real
        chest: two reconstructions of one scan (0.75 mm noisy, 5 mm smooth) differ by 25 HU on average with it
        and by 47 HU without; see docs/ct_preprocess.md.
    dtype: uint8 (2000 HU in 255 steps; `to_hu` is the inverse) or int16 (HU, rounded).
    hu: where the scale to HU comes from; auto decides per scan and records it in `Volume.hu_rule`, see
        `hounsfield.choose_scale`.
    spacing_from: metadata takes XYSpacing and ZSpacing of the metadata row, for scans whose header has lost
        them (CT-RATE v1).
    tilt: shear resamples scans of a tilted gantry (`scans.straighten`), which are refused else.
    flip: `reference` only: y grows to posterior (its slide_b2u=False) instead of anterior (True, the default
        of its first release).
    """

    preset: Literal["mm", "reference", "ctclip", "merlin"] = "mm"
    size: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    antialias: Literal["auto", "on", "off"] = "auto"
    dtype: Literal["uint8", "int16"] = "uint8"
    hu: Literal["auto", "header", "metadata", "none"] = "auto"
    spacing_from: Literal["header", "metadata"] = "header"
    tilt: Literal["refuse", "shear"] = "refuse"
    flip: bool = False

    def __attrs_post_init__(self) -> None:
        # attrs does not check the values of a Literal.
        for f in fields(CtConfig):
            value, allowed = getattr(self, f.name), get_args(f.type)
            if get_origin(f.type) is Literal and value not in allowed:
                raise ValueError(f"CtConfig: {f.name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.size and (len(self.size) != 3 or min(self.size) < 1):
            raise ValueError(f"CtConfig: size must be () or three positive numbers, got {self.size}")
        if math.prod(self.size) > _MAX_VOXELS:
            raise ValueError(
                f"CtConfig: size must be at most {_MAX_VOXELS:,} voxels, got {self.size}, "
                f"{math.prod(self.size):,}"
            )
        # Two messages: no lengths at all, and lengths that are no voxel's (a wrong unit, most likely).
        finite = all(0 < s < np.inf for s in self.spacing_mm)
        if self.spacing_mm and (len(self.spacing_mm) != 3 or not finite):
            raise ValueError(
                f"CtConfig: spacing_mm must be () or three positive numbers of mm, got {self.spacing_mm}"
            )
        if not all(_MM[0] <= s <= _MM[1] for s in self.spacing_mm):
            raise ValueError(
                f"CtConfig: spacing_mm must be between {_MM[0]:g} and {_MM[1]:g} mm, got {self.spacing_mm}"
            )
        if self.preset != "mm" and (self.spacing_mm or self.antialias == "on"):
            setting = "spacing_mm" if self.spacing_mm else "antialias"
            raise ValueError(
                f"CtConfig: {setting} belongs to preset 'mm'; preset {self.preset!r} has its own arithmetic. "
                "Leave it out"
            )
        if self.flip and self.preset != "reference":
            raise ValueError(f"CtConfig: flip belongs to preset 'reference', got preset {self.preset!r}")


@frozen(kw_only=True, eq=False)
class Volume:
    """A preprocessed scan. Tuples of three are in the order of `axes`."""

    name: str
    voxels: np.ndarray  # [z, y, x] uint8 or int16; preset ctclip [z, x, y]
    axes: str  # where each index grows to: "SAR", "SPR" (flip) or "SLP" (ctclip)
    spacing_mm: tuple[float, float, float]
    source_spacing_mm: tuple[float, float, float]
    source_shape: tuple[int, int, int]
    occupied: tuple[int, int]  # slices first:stop hold scan, the others are padding
    hu_rule: str  # where `slope` and `intercept` come from
    slope: float
    intercept: float


def preprocess_scan(
    path: Source, cfg: CtConfig = CtConfig(), metadata: Mapping[str, str] | None = None
) -> Volume:
    """Read a scan (NIfTI, or a series of DICOM) and bring it to HU, to `axes_of(cfg)` and to the grid of `cfg`.

    Args:
        metadata: the scan's row of a metadata table: RescaleSlope and RescaleIntercept for `hu`, XYSpacing
            and ZSpacing for `spacing_from`, ImageOrientationPatient where the header does not give the
            orientation, and Modality, which is checked if it is there.
    Returns:
        the volume; where the scan does not reach it is -1000 HU. The 48 axis orders of one scan give the same
        bits.
    Raises:
        ScanError: unreadable scan (`scans.read_scan`), a header that contradicts itself, unknown orientation,
            no clear scale to HU (`hounsfield.choose_scale`), no usable spacing, or a volume that came out as
            one value.
    """
    volume, scale = _read_volume(path, cfg, metadata)
    if (volume.hu_rule, volume.slope, volume.intercept) != (scale.rule, scale.slope, scale.intercept):
        # The first slices suggested another scale than all of them do: read again, the scale is known now.
        volume, _ = _read_volume(path, cfg, metadata, scale)
    return volume


def examine_scan(
    header: scans.Header, slices: Iterator[np.ndarray], metadata: Mapping[str, str] | None
) -> tuple[tuple[float, ...], Scale]:
    """The spacing of a scan, by the metadata where its header is blank, and its scale under hu="auto" by its
    first slices; ScanError for what `preprocess_scan` refuses.
    """
    cfg = CtConfig(spacing_from="header" if header.placed else "metadata")
    perm, _, _, spacing, _ = _plan(cfg, header, metadata)
    sample: list[np.ndarray] = []
    slices = _sample_slices(_check_finite(header, slices), sample)
    scale, _ = _first_scale(cfg, header, slices, sample, metadata)
    return tuple(spacing[perm.index(axis)] for axis in range(3)), scale


def to_hu(voxels: Any) -> Any:
    """HU, float32, of stored uint8 or int16 voxels: array or tensor, any shape. uint8 0 is -1000 HU, 255 is
    1000 HU.

    uint8 was rounded, except by preset `reference`, which truncates: its HU come out up to 7.8 too low.
    """
    # One arithmetic for arrays and tensors, so that both give the same bits.
    if isinstance(voxels, np.ndarray):
        return to_hu(torch.from_numpy(np.ascontiguousarray(voxels))).numpy()
    if voxels.dtype == torch.uint8:
        return voxels.float() * ((HU[1] - HU[0]) / 255) + HU[0]
    if voxels.dtype == torch.int16:
        return voxels.float()
    raise ValueError(f"to_hu: voxels must be uint8 or int16, got {voxels.dtype}")


def size_of(cfg: CtConfig) -> tuple[int, int, int]:
    """The shape of what `preprocess_scan` returns."""
    return _three(cfg.size or _SIZES[cfg.preset])


def axes_of(cfg: CtConfig) -> str:
    """Where the output's indices grow to: letters of R L A P S I."""
    if cfg.preset == "ctclip":
        return "SLP"
    return "SPR" if cfg.flip else "SAR"


def metadata_columns(cfg: CtConfig) -> tuple[str, ...]:
    """The columns that a metadata table must have for these settings, beside `VolumeName`."""
    columns: tuple[str, ...] = ()
    # "auto" needs them for scans whose stored values turn out to be raw.
    if cfg.hu in ("auto", "metadata"):
        columns += metadata_table.RESCALE
    if cfg.spacing_from == "metadata":
        columns += metadata_table.SPACING
    return columns


def settings_of(cfg: CtConfig) -> dict[str, Any]:
    """The settings as plain data, defaults of the preset filled in, as stores and checkpoints keep it."""
    settings = config.unstructure(cfg)
    if cfg.tilt == "refuse":
        del settings["tilt"]  # stores of earlier versions do not have it
    return settings | {
        "size": list(size_of(cfg)),
        "spacing_mm": list(cfg.spacing_mm or _SPACINGS[cfg.preset]),
        "antialias": _antialias(cfg),
        "axes": axes_of(cfg),
        "hu_range": list(HU),
    }


def _antialias(cfg: CtConfig) -> str:
    if cfg.antialias != "auto":
        return cfg.antialias
    return "on" if cfg.preset == "mm" else "off"


def _read_volume(
    path: Source, cfg: CtConfig, row: Mapping[str, str] | None, fixed_scale: Scale | None = None
) -> tuple[Volume, Scale]:
    """Read the volume once, with `fixed_scale` or else the scale of its first slices.

    Returns:
        the volume, and the scale that all slices show.
    """
    with scans.open_scan(path) as (header, stored):
        if cfg.tilt == "shear":
            header, stored = scans.straighten(header, stored)
        # All that the header and the row can decide comes before any voxel is read.
        perm, flips, shape, spacing, grid = _plan(cfg, header, row)
        # A chain of generators: each slice is checked and sampled on its way to the resampling.
        sample: list[np.ndarray] = []
        slices = _iter_along(header, stored, perm)
        slices = _check_finite(header, slices)
        slices = _sample_slices(slices, sample)
        scale = fixed_scale
        if scale is None:
            scale, slices = _first_scale(cfg, header, slices, sample, row)
        # The scan fills a box of the output; the padding around it is -1000 HU.
        padding = 0 if cfg.dtype == "uint8" else HU[0]
        voxels = np.full(size_of(cfg), padding, cfg.dtype)
        box = voxels[tuple(slice(axis.first, axis.stop) for axis in grid)]
        _resample_into(box, cfg, scale, grid, shape, flips, slices)
    final = fixed_scale or _find_scale(cfg, header, sample, row)
    # One value everywhere is no scan. Where the scales differ, the second reading decides.
    if box.min() == box.max() and final == scale:
        value = to_hu(box[:1, :1, :1]).item()
        raise ScanError(
            f"{path}: every voxel became {value:g} HU with scale {scale} ({scale.rule}); no tissue is left. "
            "Check whether the scale was applied before; hu='none' takes stored values as HU"
        )
    if cfg.flip:
        voxels = np.ascontiguousarray(voxels[:, ::-1])
    volume = Volume(
        name=header.name,
        voxels=voxels,
        axes=axes_of(cfg),
        spacing_mm=_three(axis.spacing_mm for axis in grid),
        source_spacing_mm=spacing,
        source_shape=shape,
        occupied=(grid[0].first, grid[0].stop),
        hu_rule=scale.rule,
        slope=scale.slope,
        intercept=scale.intercept,
    )
    return volume, final


def _plan(
    cfg: CtConfig, header: scans.Header, row: Mapping[str, str] | None
) -> tuple[list[int], list[bool], tuple[int, int, int], tuple[float, float, float], list[grids.Axis]]:
    """Of each output axis: the file axis that it is, whether that runs backwards, its voxels, mm and grid."""
    _refuse_header(header, row)
    # The file is flipped afterwards for `flip`: the reference resamples before it flips.
    target_axes = "SAR" if cfg.flip else axes_of(cfg)
    perm, flips = _order_axes(_orientation(header, row), target_axes)
    file_spacing = _spacing(cfg, header, row)
    shape = _three(header.shape[p] for p in perm)
    spacing = _three(file_spacing[p] for p in perm)
    try:
        return perm, flips, shape, spacing, _make_grid(cfg, shape, spacing)
    except ValueError as e:
        raise ScanError(f"{header.name}: {e}") from e


def _resample_into(
    box: np.ndarray,
    cfg: CtConfig,
    scale: Scale,
    grid: list[grids.Axis],
    shape: tuple[int, int, int],
    flips: list[bool],
    slices: Iterator[np.ndarray],
) -> None:
    """Resample source slices to HU on the grid. Axes that run backwards in the file are read in reverse."""
    # Slices come in the order of the file and cannot be reversed on the way; the taps can.
    axes = []
    for axis, n, flip in zip(grid, shape, flips, strict=True):
        axes.append(axis.flipped(n) if flip else axis)
    clip = cfg.preset != "merlin"  # MONAI's transforms clip after the interpolation only

    def before(plane: Tensor) -> Tensor:
        return _to_hu_(plane, scale.slope, scale.intercept, clip)

    def after(hu: Tensor) -> Tensor:
        return _encode_(hu, cfg)

    grids.resample(axes, slices, before, after, box)


def _three(values: Iterable[T]) -> tuple[T, T, T]:
    z, y, x = values
    return z, y, x


def _iter_along(header: scans.Header, slices: Iterator[np.ndarray], perm: list[int]) -> Iterator[np.ndarray]:
    """Slices [perm[1], perm[2]] along file axis perm[0]. Scans that are not stored along z are read whole."""
    if perm[0] != 2:
        return iter(scans.stack_slices(header, slices).transpose(perm))
    return (plane.transpose(perm[1:]) for plane in slices)


def _check_finite(header: scans.Header, slices: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for i, plane in enumerate(slices):
        # An infinity or NaN anywhere shows in the sum of the extremes, without a mask of the plane.
        if plane.dtype.kind == "f" and not np.isfinite(plane.min() + plane.max()):
            count = int((~np.isfinite(plane)).sum())
            raise ScanError(f"{header.name}: slice {i} has {count} voxels that are not finite numbers")
        yield plane


def _sample_slices(slices: Iterator[np.ndarray], sample: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The slices as they pass, with some voxels of each added to `sample`."""
    for plane in slices:
        # A regular grid of voxels: reproducible, and dense enough for shares of 0.5 %.
        rows, columns = (max(1, n // _SAMPLED) for n in plane.shape)
        sample.append(plane[::rows, ::columns].ravel())
        yield plane


def _first_scale(
    cfg: CtConfig,
    header: scans.Header,
    slices: Iterator[np.ndarray],
    sample: list[np.ndarray],
    row: Mapping[str, str] | None,
) -> tuple[Scale, Iterator[np.ndarray]]:
    """The scale as soon as some slices show it, and all slices.

    The first slice is mostly enough, so that a scan is seldom whole in memory.
    """
    if cfg.hu != "auto":
        return _find_scale(cfg, header, sample, row), slices
    passed: list[np.ndarray] = []
    for plane in slices:
        passed.append(plane)
        # Tried after 1, 2, 4, 8 ... slices: the sample grows, and each try looks at all of it.
        is_power_of_two = len(passed) & (len(passed) - 1) == 0
        if not is_power_of_two:
            continue
        try:
            return _find_scale(cfg, header, sample, row), itertools.chain(passed, slices)
        except ScanError:
            continue  # more slices may show it; if not, the error of all slices is raised below
    return _find_scale(cfg, header, sample, row), iter(passed)


def _find_scale(
    cfg: CtConfig, header: scans.Header, sample: list[np.ndarray], row: Mapping[str, str] | None
) -> Scale:
    """The scale of `cfg.hu`, checked against the sample unless that is empty."""
    header_scale = None
    if header.scaled:
        header_scale = Scale(rule="header", slope=header.slope, intercept=header.intercept)
    if cfg.hu == "header":
        if header_scale is None:
            raise ScanError(
                f"{header.name}: hu='header' needs scl_slope in the header, it has none; use hu='none', "
                "'metadata' or 'auto'"
            )
        # Not checked against the voxels: this setting is the way past a check that is wrong.
        return header_scale
    row_scale, problem = _row_scale(row)
    chosen = Scale(rule="none")
    if cfg.hu == "metadata":
        if row_scale is None:
            raise ScanError(
                f"{header.name}: hu='metadata' needs a metadata row with "
                f"{' and '.join(metadata_table.RESCALE)}; {problem}"
            )
        chosen = row_scale
    # The scale was chosen by the user and no slice was read yet: it is checked at the end.
    if not sample:
        return chosen
    values = np.concatenate(sample)
    try:
        if cfg.hu == "auto":
            return hounsfield.choose_scale(values, header_scale, row_scale)
        return hounsfield.check_scale(values, chosen, header_scale)
    except ValueError as e:
        reason = f"; {problem}" if problem else ""
        raise ScanError(f"{header.name}: {e}{reason}") from e


def _row_scale(row: Mapping[str, str] | None) -> tuple[Scale | None, str]:
    """The scale of the metadata row, or why there is none."""
    if row is None:
        return None, ""
    try:
        slope, intercept = metadata_table.rescale(row)
    except ValueError as e:
        return None, str(e)
    return Scale(rule="metadata", slope=slope, intercept=intercept), ""


def _refuse_header(header: scans.Header, row: Mapping[str, str] | None) -> None:
    """Refuse what is no CT, and a header that contradicts itself."""
    # Tables of DICOM attributes may list scans of other modalities.
    modality = ""
    if row is not None:
        modality = str(row.get("Modality", "")).strip()
    if modality not in ("", "CT"):
        raise ScanError(
            f"{header.name}: its metadata row says Modality {modality!r}; only CT has Hounsfield units"
        )
    if header.doubt:
        raise ScanError(f"{header.name}: {header.doubt}")


def _spacing(cfg: CtConfig, header: scans.Header, row: Mapping[str, str] | None) -> tuple[float, ...]:
    """Spacing in mm along the axes of the file."""
    if cfg.spacing_from == "metadata":
        if row is None:
            columns = " and ".join(metadata_table.SPACING)
            raise ScanError(f"{header.name}: spacing_from='metadata' needs a metadata row with {columns}")
        try:
            spacing = metadata_table.spacing_mm(row)
        except ValueError as e:
            raise ScanError(f"{header.name}: {e}") from e
        # Sorted, since the file may hold the axes in another order than the row.
        if header.placed and not np.allclose(sorted(spacing), sorted(header.spacing_mm), rtol=0.01):
            log.warning(
                "%s: spacing is %s mm by its metadata, which is used, and %s by its header",
                header.name,
                spacing,
                header.spacing_mm,
            )
        return spacing
    # A header without a place and with voxels of 1 mm is one that lost its spacing.
    if not header.placed and cfg.preset != "reference" and header.spacing_mm == (1.0, 1.0, 1.0):
        raise ScanError(
            f"{header.name}: its header has no spacing; set spacing_from='metadata' and give the metadata row"
        )
    return header.spacing_mm


def _orientation(header: scans.Header, row: Mapping[str, str] | None) -> np.ndarray:
    """An affine [4, 4] with the directions of the file's axes: the header's, or else the metadata's."""
    if header.placed:
        return header.affine
    try:
        directions = metadata_table.directions(row or {})
    except ValueError as e:
        raise ScanError(f"{header.name}: {e}") from e
    if directions is None:
        raise ScanError(
            f"{header.name}: the direction of its axes is unknown: its header has no qform and no sform (or "
            "an identity without an origin), and there is no metadata row with "
            f"{metadata_table.ORIENTATION}; give one, or write the affine into the header. A guess could "
            "mirror the patient"
        )
    # Directions alone: the order of axes needs neither the spacing nor the origin.
    affine = np.eye(4)
    affine[:3, :3] = directions
    return affine


def _order_axes(affine: np.ndarray, axes: str) -> tuple[list[int], list[bool]]:
    """Which file axis each output axis is, and whether it runs backwards (nibabel's closest orientation)."""
    # Rows are file axes: the output axis that each becomes, and its direction.
    moves = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(axes)))
    perm = [int(p) for p in np.argsort(moves[:, 0])]
    return perm, [bool(moves[p, 1] < 0) for p in perm]


def _make_grid(cfg: CtConfig, shape: tuple[int, ...], spacing: tuple[float, ...]) -> list[grids.Axis]:
    """The output's axes over a source of this shape and spacing in mm; ValueError where nothing is left."""
    size = size_of(cfg)
    target = cfg.spacing_mm or _SPACINGS[cfg.preset]
    if cfg.preset == "mm":
        antialias = _antialias(cfg) == "on"
        along = zip(shape, spacing, size, target, strict=True)
        return [grids.centred(n, mm, k, target_mm, antialias) for n, mm, k, target_mm in along]
    if cfg.preset == "merlin":
        along = zip(shape, spacing, size, target, strict=True)
        return [grids.anchored(n, mm, k, target_mm) for n, mm, k, target_mm in along]
    if cfg.preset == "reference":
        # one scale for all axes: the largest with which the whole scan fits
        scale = min(k / n for k, n in zip(size, shape, strict=True))
        new = [round(n * scale) for n in shape]
    else:
        # Rounded: 0.7 mm as float32 is 0.69999999, and the floor would lose a voxel against CT-CLIP's own 0.7
        # from the metadata.
        new = [int(n * (round(s, 6) / t)) for n, s, t in zip(shape, spacing, target, strict=True)]
    # A few thin slices may shrink to nothing.
    if min(new) < 1:
        raise ValueError(
            f"is too flat for preset {cfg.preset!r}: {shape} voxels of {spacing} mm become {tuple(new)}"
        )
    return [grids.stretched(n, mm, k, m) for n, mm, k, m in zip(shape, spacing, size, new, strict=True)]


def _to_hu_(plane: Tensor, slope: float, intercept: float, clip: bool) -> Tensor:
    """Stored values to HU, in place."""
    if (slope, intercept) != (1.0, 0.0):
        # In place: the plane is a copy that nothing else reads.
        plane.mul_(slope).add_(intercept)
    return plane.clamp_(*HU) if clip else plane


def _encode_(hu: Tensor, cfg: CtConfig) -> Tensor:
    """HU to the output's dtype; works in place."""
    hu = hu.clamp_(*HU)
    if cfg.dtype == "int16":
        return hu.round_().to(torch.int16)
    if cfg.preset == "reference":
        # the reference's order of operations, and its truncation: another order rounds differently
        return hu.div_(1000).add_(1).div_(2).mul_(255).to(torch.uint8)
    return hu.sub_(HU[0]).mul_(255 / (HU[1] - HU[0])).round_().to(torch.uint8)
