"""From a CT scan file to a volume on a fixed grid, in Hounsfield units: `preprocess_scan`.

Output axes are [z, y, x] (preset `ctclip`: [z, x, y], as its network reads them); `Volume.axes` says where each index grows to ("SAR":
superior, anterior, right). Here are the presets and the orientation; `hounsfield` finds the way to HU, `grids` has the arithmetic.
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
from medvl.base.files import PathLike
from medvl.ct import grids, hounsfield, metadata_table, scans
from medvl.ct.hounsfield import Scale
from medvl.ct.scans import ScanError

T = TypeVar("T")
log = logging.getLogger(__name__)

HU = (-1000.0, 1000.0)  # every preset clips to this
_MAX_VOXELS = 1024**3
_MM = (0.01, 1000.0)  # of an output voxel
_SIZES = {
    "mm": (160, 224, 224),
    "reference": (160, 224, 224),
    "ctclip": (240, 480, 480),
    "merlin": (160, 224, 224),
}
_SPACINGS = {"mm": (3.0, 1.75, 1.75), "reference": (), "ctclip": (1.5, 0.75, 0.75), "merlin": (3.0, 1.5, 1.5)}
_SAMPLED = 32  # voxels along each axis of a slice that are looked at to tell what the values are


@frozen(kw_only=True)
class CtConfig:
    """How a scan becomes a volume.

    preset: `mm` a physical grid centred on the scan; `reference` one scale for all axes in voxel counts (peterhan91/clip_3d_ct);
        `ctclip` (ibrahimethemhamamci/CT-CLIP, data_inference_nii.py); `merlin` (StanfordMIMI/Merlin, MONAI transforms;
        oblique scans lie on their first voxel here, in MONAI sometimes on their centre).
    size, spacing_mm: of the output's axes; () is the preset's own; only `mm` takes another spacing. `mm` covers 480 x 392 x 392 mm: a chest
        CT's field of view is 350-400 mm (CT-RATE: median 0.68 mm x 512), and 480 mm hold a chest from neck to below the adrenals.
    antialias: when shrinking, average what an output voxel covers (triangle filter) instead of reading two samples. auto: on for `mm`,
        off for the other presets, whose authors did not. Measured on a real chest: two reconstructions of one scan (0.75 mm noisy, 5 mm
        smooth) differ by 25 HU on average with it and by 47 HU without; see docs/ct_preprocess.md.
    dtype: uint8 (2000 HU in 255 steps; `to_hu` is the inverse) or int16 (HU, rounded).
    hu: where the scale to HU comes from; auto decides per scan and says so in `Volume.hu_rule`, see `hounsfield.choose_scale`.
    spacing_from: metadata takes XYSpacing and ZSpacing of the metadata row, for scans whose header has lost them (CT-RATE v1).
    flip: `reference` only: y grows to posterior (its slide_b2u=False) instead of anterior (True, the default of its first release).
    """

    preset: Literal["mm", "reference", "ctclip", "merlin"] = "mm"
    size: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    antialias: Literal["auto", "on", "off"] = "auto"
    dtype: Literal["uint8", "int16"] = "uint8"
    hu: Literal["auto", "header", "metadata", "none"] = "auto"
    spacing_from: Literal["header", "metadata"] = "header"
    flip: bool = False

    def __attrs_post_init__(self) -> None:
        for f in fields(CtConfig):
            value, allowed = getattr(self, f.name), get_args(f.type)
            if get_origin(f.type) is Literal and value not in allowed:
                raise ValueError(f"CtConfig: {f.name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.size and (len(self.size) != 3 or min(self.size) < 1):
            raise ValueError(f"CtConfig: size must be () or three positive numbers, got {self.size}")
        if math.prod(self.size) > _MAX_VOXELS:
            raise ValueError(
                f"CtConfig: size must be at most {_MAX_VOXELS:,} voxels, got {self.size}, {math.prod(self.size):,}"
            )
        if self.spacing_mm and (
            len(self.spacing_mm) != 3 or not all(0 < s < np.inf for s in self.spacing_mm)
        ):
            raise ValueError(
                f"CtConfig: spacing_mm must be () or three positive numbers of mm, got {self.spacing_mm}"
            )
        if self.spacing_mm and not all(_MM[0] <= s <= _MM[1] for s in self.spacing_mm):
            raise ValueError(
                f"CtConfig: spacing_mm must be between {_MM[0]:g} and {_MM[1]:g} mm, got {self.spacing_mm}"
            )
        if self.preset != "mm" and (self.spacing_mm or self.antialias == "on"):
            what = "spacing_mm" if self.spacing_mm else "antialias"
            raise ValueError(
                f"CtConfig: {what} belongs to preset 'mm'; preset {self.preset!r} has its own arithmetic. Leave it out"
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
    occupied: tuple[int, int]  # slices first:stop hold scan, the rest is padding
    hu_rule: str  # what `slope` and `intercept` come from
    slope: float
    intercept: float


def preprocess_scan(
    path: PathLike, cfg: CtConfig = CtConfig(), metadata: Mapping[str, str] | None = None
) -> Volume:
    """Read a NIfTI scan and bring it to HU, to `axes_of(cfg)` and to the grid of `cfg`.

    Args:
        metadata: the scan's row of a metadata table: RescaleSlope and RescaleIntercept for `hu`, XYSpacing and ZSpacing for
            `spacing_from`, ImageOrientationPatient where the header does not say where its axes grow to, Modality if it is there.
    Returns:
        the volume; where the scan does not reach it is -1000 HU. The 48 axis orders of one scan give the same bits.
    Raises:
        ScanError: unreadable scan (`scans.read_scan`), a header that contradicts itself, axes that nothing names, no clear way to HU
            (`hounsfield.choose_scale`), no usable spacing, or a volume that came out as one value.
    """
    volume, scale = _read_volume(path, cfg, metadata)
    if (volume.hu_rule, volume.slope, volume.intercept) != (scale.rule, scale.slope, scale.intercept):
        # the first slices looked like something else than the whole: read it again, the scale is known now
        volume, _ = _read_volume(path, cfg, metadata, scale)
    return volume


def to_hu(voxels: Any) -> Any:
    """HU float32 of stored uint8 or int16 voxels, array or tensor, any shape. uint8 0 is -1000 HU, 255 is 1000 HU.

    uint8 was rounded, except by preset `reference`, which truncates: there HU come out up to 7.8 too low.
    """
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
    return "SLP" if cfg.preset == "ctclip" else "SPR" if cfg.flip else "SAR"


def metadata_columns(cfg: CtConfig) -> tuple[str, ...]:
    """The columns that a metadata table must have for these settings, beside `VolumeName`."""
    scale = metadata_table.RESCALE if cfg.hu in ("auto", "metadata") else ()
    return scale + (metadata_table.SPACING if cfg.spacing_from == "metadata" else ())


def settings_of(cfg: CtConfig) -> dict[str, Any]:
    """Plain data that says how volumes are made: the record with what its () stand for. Stores and checkpoints keep and compare it."""
    own = {
        "size": list(size_of(cfg)),
        "spacing_mm": list(cfg.spacing_mm or _SPACINGS[cfg.preset]),
        "antialias": _antialias(cfg),
    }
    return config.unstructure(cfg) | own | {"axes": axes_of(cfg), "hu_range": list(HU)}


def _antialias(cfg: CtConfig) -> str:
    return cfg.antialias if cfg.antialias != "auto" else "on" if cfg.preset == "mm" else "off"


def _three(values: Iterable[T]) -> tuple[T, T, T]:
    z, y, x = values
    return z, y, x


def _along(header: scans.Header, slices: Iterator[np.ndarray], perm: list[int]) -> Iterator[np.ndarray]:
    """Slices [perm[1], perm[2]] along file axis perm[0]. Scans are stored along z as a rule; only others have to be read whole."""
    if perm[0] != 2:
        return iter(scans.stack_slices(header, slices).transpose(perm))
    return (s.transpose(perm[1:]) for s in slices)


def _finite(header: scans.Header, slices: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for i, s in enumerate(slices):
        if s.dtype.kind == "f" and not np.isfinite(s.min() + s.max()):
            raise ScanError(
                f"{header.name}: slice {i} has {int((~np.isfinite(s)).sum())} voxels that are not finite numbers"
            )
        yield s


def _read_volume(
    path: PathLike, cfg: CtConfig, row: Mapping[str, str] | None, known: Scale | None = None
) -> tuple[Volume, Scale]:
    """The volume, by the scale that is known or that its first slices show; and the scale that all of it shows."""
    with scans.open_scan(path) as (header, stored):
        _refuse_doubt(header, row)
        perm, flips = _order(_axes_in_patient(header, row), "SAR" if cfg.flip else axes_of(cfg))
        source_spacing = _spacing(cfg, header, row)
        shape, spacing = _three(header.shape[p] for p in perm), _three(source_spacing[p] for p in perm)
        try:
            grid = _grid(cfg, shape, spacing)
        except ValueError as e:
            raise ScanError(f"{path}: {e}") from e
        sample: list[np.ndarray] = []
        slices = _sampled(_finite(header, _along(header, stored, perm)), sample)
        scale = known
        if scale is None:
            scale, slices = _first_scale(cfg, header, slices, sample, row)
        out = np.full(size_of(cfg), 0 if cfg.dtype == "uint8" else HU[0], cfg.dtype)
        box = out[tuple(slice(a.first, a.stop) for a in grid)]
        turned = [a.flipped(n) if flip else a for a, n, flip in zip(grid, shape, flips, strict=True)]
        clip = cfg.preset != "merlin"
        slope, intercept = scale.slope, scale.intercept
        grids.resample(
            turned,
            slices,
            lambda plane: _to_hu_(plane, slope, intercept, clip),
            lambda hu: _encode_(hu, cfg),
            box,
        )
    final = known or _scale(cfg, header, sample, row)
    if box.min() == box.max() and final == scale:
        at = to_hu(box[:1, :1, :1]).item()
        raise ScanError(
            f"{path}: every voxel became {at:g} HU with scale {scale} ({scale.rule}); "
            "no tissue is left. Check whether the scale was applied before; hu='none' takes stored values as HU"
        )
    volume = Volume(
        name=header.name,
        voxels=np.ascontiguousarray(out[:, ::-1]) if cfg.flip else out,
        axes=axes_of(cfg),
        spacing_mm=_three(a.spacing_mm for a in grid),
        source_spacing_mm=spacing,
        source_shape=shape,
        occupied=(grid[0].first, grid[0].stop),
        hu_rule=scale.rule,
        slope=slope,
        intercept=intercept,
    )
    return volume, final


def _sampled(slices: Iterator[np.ndarray], sample: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The slices as they pass, with some voxels of each added to `sample`."""
    for plane in slices:
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
    """The scale as soon as some slices show it, and all slices; mostly the first is enough, so that no scan has to be in memory."""
    seen: list[np.ndarray] = []
    if cfg.hu != "auto":
        return _scale(cfg, header, sample, row), slices
    for plane in slices:
        seen.append(plane)
        if len(seen) & (len(seen) - 1):  # after 1, 2, 4, 8, ... slices
            continue
        try:
            return _scale(cfg, header, sample, row), itertools.chain(seen, slices)
        except ScanError:
            continue  # not yet, or never: then all slices say why
    return _scale(cfg, header, sample, row), iter(seen)


def _scale(
    cfg: CtConfig, header: scans.Header, sample: list[np.ndarray], row: Mapping[str, str] | None
) -> Scale:
    """The scale of `cfg.hu`; a sample without slices is not looked at."""
    own = Scale(rule="header", slope=header.slope, intercept=header.intercept) if header.scaled else None
    if cfg.hu == "header":
        if own is None:
            raise ScanError(
                f"{header.name}: hu='header' needs scl_slope in the header, it has none; use hu='none', 'metadata' or 'auto'"
            )
        return own
    given, fault = _rescale(row)
    if cfg.hu == "metadata" and given is None:
        raise ScanError(
            f"{header.name}: hu='metadata' needs a metadata row with {' and '.join(metadata_table.RESCALE)}; {fault}"
        )
    chosen = given if cfg.hu == "metadata" and given is not None else Scale(rule="none")
    if not sample:
        return chosen
    values = np.concatenate(sample)
    try:
        return (
            hounsfield.choose_scale(values, own, given)
            if cfg.hu == "auto"
            else hounsfield.check_scale(values, chosen, own)
        )
    except ValueError as e:
        raise ScanError(f"{header.name}: {e}{fault and f'; {fault}'}") from e


def _rescale(row: Mapping[str, str] | None) -> tuple[Scale | None, str]:
    """The scale of the metadata row, or why there is none."""
    if row is None:
        return None, ""
    try:
        slope, intercept = metadata_table.rescale(row)
    except ValueError as e:
        return None, str(e)
    return Scale(rule="metadata", slope=slope, intercept=intercept), ""


def _refuse_doubt(header: scans.Header, row: Mapping[str, str] | None) -> None:
    modality = str((row or {}).get("Modality", "")).strip()
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
            raise ScanError(
                f"{header.name}: spacing_from='metadata' needs a metadata row with {' and '.join(metadata_table.SPACING)}"
            )
        try:
            spacing = metadata_table.spacing_mm(row)
        except ValueError as e:
            raise ScanError(f"{header.name}: {e}") from e
        if header.placed and not np.allclose(sorted(spacing), sorted(header.spacing_mm), rtol=0.01):
            log.warning(
                "%s: spacing is %s mm by its metadata, which are taken, and %s by its header",
                header.name,
                spacing,
                header.spacing_mm,
            )
        return spacing
    if not header.placed and cfg.preset != "reference" and header.spacing_mm == (1.0, 1.0, 1.0):
        raise ScanError(
            f"{header.name}: its header has no spacing; set spacing_from='metadata' and give the metadata row"
        )
    return header.spacing_mm


def _axes_in_patient(header: scans.Header, row: Mapping[str, str] | None) -> np.ndarray:
    """An affine [4, 4] whose columns say where the file's axes grow to: the header's, or where it names none the metadata's."""
    if header.placed:
        return header.affine
    try:
        found = metadata_table.directions(row or {})
    except ValueError as e:
        raise ScanError(f"{header.name}: {e}") from e
    if found is None:
        raise ScanError(
            f"{header.name}: nothing says where its axes grow to: its header has no qform and no sform (or an identity without a place), "
            f"and there is no metadata row with {metadata_table.ORIENTATION}; give one, or write the affine into the header. "
            "A guess could mirror the patient"
        )
    affine = np.eye(4)
    affine[:3, :3] = found
    return affine


def _order(affine: np.ndarray, axes: str) -> tuple[list[int], list[bool]]:
    """Which file axis each output axis is, and whether it runs backwards (nibabel's closest orientation)."""
    moves = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(axes)))
    perm = [int(p) for p in np.argsort(moves[:, 0])]
    return perm, [bool(moves[p, 1] < 0) for p in perm]


def _grid(cfg: CtConfig, shape: tuple[int, ...], spacing: tuple[float, ...]) -> list[grids.Axis]:
    size, target = size_of(cfg), cfg.spacing_mm or _SPACINGS[cfg.preset]
    if cfg.preset == "mm":
        return [
            grids.centred(*a, _antialias(cfg) == "on") for a in zip(shape, spacing, size, target, strict=True)
        ]
    if cfg.preset == "merlin":
        return [grids.anchored(*a) for a in zip(shape, spacing, size, target, strict=True)]
    if cfg.preset == "reference":
        scale = min(k / n for k, n in zip(size, shape, strict=True))
        new = [round(n * scale) for n in shape]
    else:
        # rounded: 0.7 mm as float32 is 0.69999999, and the floor would lose a voxel against CT-CLIP's own 0.7 from the metadata
        new = [int(n * (round(s, 6) / t)) for n, s, t in zip(shape, spacing, target, strict=True)]
    if min(new) < 1:
        raise ValueError(
            f"is too flat for preset {cfg.preset!r}: {shape} voxels of {spacing} mm become {tuple(new)}"
        )
    return [grids.stretched(*a) for a in zip(shape, spacing, size, new, strict=True)]


def _to_hu_(plane: Tensor, slope: float, intercept: float, clip: bool) -> Tensor:
    if (slope, intercept) != (1.0, 0.0):
        plane.mul_(slope).add_(intercept)
    return plane.clamp_(*HU) if clip else plane


def _encode_(hu: Tensor, cfg: CtConfig) -> Tensor:
    hu = hu.clamp_(*HU)
    if cfg.dtype == "int16":
        return hu.round_().to(torch.int16)
    if cfg.preset == "reference":  # in the reference's order of operations, truncated
        return hu.div_(1000).add_(1).div_(2).mul_(255).to(torch.uint8)
    return hu.sub_(HU[0]).mul_(255 / (HU[1] - HU[0])).round_().to(torch.uint8)
