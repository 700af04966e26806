"""Which scale takes the stored values of a scan to Hounsfield units (HU), judged by the values themselves.

Nothing in a NIfTI file says that it is a CT, and scales are lost, applied twice or left over from another
scan. What every CT has is air (around the patient, in the lungs or the bowel) and soft tissue. All decisions
compare shares of sampled voxels, so a few stray values change nothing.
"""

import numpy as np
from attrs import frozen

TISSUE = (-1100.0, 300.0)  # air, lung, fat, water and soft tissue
PADDING = -1500.0  # values below are padding outside the scanner's field of view, not tissue or air
_SOFT = (-200.0, 300.0)
_AIR = -200.0  # a CT has values below: air is -1000, lung -850
_FEW = 0.005  # a smaller share of the voxels is strays
_BONE = 700.0  # of real chests 1 % lies above; raw soft tissue does (1064 with intercept -1024)
_MOST_BONE = 0.25  # share of a head's voxels without air that lie above _BONE; raw, more of any patient does


@frozen(kw_only=True)
class Scale:
    """HU = slope * stored + intercept; `rule` says where the two come from."""

    rule: str
    slope: float = 1.0
    intercept: float = 0.0

    def apply(self, values: np.ndarray) -> np.ndarray:
        return values * self.slope + self.intercept

    def __str__(self) -> str:
        return f"{self.slope:g} * stored + {self.intercept:g}"


STORED = Scale(rule="stored")


def choose_scale(stored: np.ndarray, header: Scale | None = None, row: Scale | None = None) -> Scale:
    """The scale under which stored values are HU.

    Values that are HU under the header's scale are taken so; raw ones take the metadata's scale on top. Where
    both would do, the metadata's is taken if it halves the share of voxels that are no tissue.

    Args:
        stored: [n] sampled voxels.
        header: the header's scale, where it has one.
        row: the scale of the scan's metadata row, where there is one.
    Returns:
        rule "stored", "header", "metadata" or "header+metadata".
    Raises:
        ValueError: under no scale are they a CT; the message goes on after the scan's name.
    """
    # float64, so that the decision does not depend on the stored type.
    stored = stored.astype(np.float64).ravel()
    base = STORED
    if header is not None and not _is_identity(header):
        base = header
        _refuse_applied_before(stored, header)
    values = base.apply(stored)
    values = _select(values, values >= PADDING)
    background = _is_background(values)
    padded = _is_padding(values, background)
    patient = _patient_values(values, background, padded)
    # Padding is as low as air, so it must not count as the air that only HU have.
    is_hu = _has_air(values) and not padded
    # Without a row the values must be HU by themselves.
    if row is None:
        if is_hu:
            return base
        if not padded:
            _refuse_neither(patient, base)
        raise ValueError(
            f"{_needs_row(base, patient)}; give it, or set {_setting_to_keep(base)} if they are HU"
        )
    # With a row: compare how much of the patient is tissue with it and without it.
    scaled = row.apply(patient)
    with_row, without = _share(scaled, TISSUE), _share(patient, TISSUE)
    row_fits = _has_air(row.apply(values)) and _has_soft_tissue(scaled)
    if is_hu:
        if row_fits and _is_better(with_row, without):
            return compose_scales(base, row)
        return base
    if not padded:
        _refuse_neither(patient, base)
    # From here on the values are raw, and only the row's scale can be right.
    if with_row < without:
        raise ValueError(_applied_before("the metadata's", row, with_row, without))
    if not row_fits:
        raise ValueError(
            f"the metadata's scale {row} makes {_share(scaled, _SOFT):.0%} of its voxels soft tissue "
            f"({_SOFT[0]:g} to {_SOFT[1]:g} HU) and {float((scaled <= _AIR).mean()):.0%} air or lung: "
            "perhaps it is not a CT, or the row is another scan's; set hu='metadata' if the row is right"
        )
    return compose_scales(base, row)


def _patient_values(values: np.ndarray, background: np.ndarray, padded: bool) -> np.ndarray:
    """The values of the patient, and of the air around it where that was measured."""
    if padded:
        # Background and stray lower values are all padding; raw tissue lies above them.
        return _select(values, values > _AIR)
    if _borders_on(values, background):
        return values  # the background is the air around the patient, with the partial volumes of the skin
    return _select(values, ~background)


def compose_scales(first: Scale, then: Scale) -> Scale:
    """The scale that applies `first`, then `then`."""
    rule = then.rule if first is STORED else f"{first.rule}+{then.rule}"
    intercept = then.slope * first.intercept + then.intercept
    return Scale(rule=rule, slope=then.slope * first.slope, intercept=intercept)


def check_scale(stored: np.ndarray, chosen: Scale, header: Scale | None = None) -> Scale:
    """Check the scale that a user chose against the values.

    Args:
        stored: [n] sampled voxels.
        chosen: rule "none" or "metadata".
        header: the header's scale, where it has one. Programs that save floats as integers write one, and
            then the values mean nothing without it.
    Returns:
        the scale; that of the metadata on top of the header's where this halves the share that is no tissue.
    Raises:
        ValueError: without the scale, or with the header's, more of the voxels are tissue.
    """
    values = stored.astype(np.float64).ravel()
    # Without padding, which says nothing about the scale.
    values = _select(values, values >= PADDING)
    with_chosen, without = _share(chosen.apply(values), TISSUE), _share(values, TISSUE)
    # "none" leaves the header's scale out, "metadata" takes its place; the values may need it all the same.
    both = chosen
    if header is not None and not _is_identity(header):
        both = compose_scales(header, chosen)
    with_both = _share(both.apply(values), TISSUE)
    if not _is_better(with_both, with_chosen):
        if without > with_chosen:
            raise ValueError(_applied_before("the metadata's", chosen, with_chosen, without))
        return chosen
    if chosen.rule == "none":
        raise ValueError(
            f"hu='none' leaves out the header's scale {both}: with it {with_both:.0%} of the voxels lie "
            f"between {TISSUE[0]:g} and {TISSUE[1]:g} HU, without it {with_chosen:.0%}; set hu='header'"
        )
    if without > with_both:
        raise ValueError(_applied_before("the metadata's", chosen, with_chosen, without))
    return both


def _is_identity(scale: Scale) -> bool:
    return (scale.slope, scale.intercept) == (1.0, 0.0)


def _applied_before(whose: str, scale: Scale, with_it: float, without: float) -> str:
    return (
        f"{whose} scale {scale} was applied before, or is another scan's: with it {with_it:.0%} of the "
        f"voxels lie between {TISSUE[0]:g} and {TISSUE[1]:g} HU, without it {without:.0%}; set hu='none' if "
        "stored values are HU"
    )


def _refuse_applied_before(stored: np.ndarray, header: Scale) -> None:
    """Refuse stored values that are HU already, under a header that scales them again."""
    values = header.apply(stored)
    # Padding and background would count as tissue under one of the two scales.
    inside = (np.maximum(stored, values) >= PADDING) & ~_is_background(stored)
    is_hu = _has_air(stored) and _has_soft_tissue(_select(stored, inside))
    stored, values = _select(stored, inside), _select(values, inside)
    with_header, without = _share(values, TISSUE), _share(stored, TISSUE)
    if is_hu and (without > with_header or not _has_soft_tissue(values)):
        message = _applied_before("the header's", header, with_header, without)
        raise ValueError(f"{message}, hu='header' if the header is right")


def _is_better(share: float, baseline: float) -> bool:
    """Whether a share of tissue is clearly better than another: what is no tissue is halved."""
    return 1 - share < (1 - baseline) / 2


def _is_background(values: np.ndarray) -> np.ndarray:
    """Which values [n] are a constant background: one value that makes up much of what is as low as air."""
    air = values[values <= _AIR]
    if not len(air):
        return np.zeros(len(values), bool)
    distinct, counts = np.unique(air, return_counts=True)
    # Only the commonest value counts: air with noise spreads over many.
    most = counts.argmax()
    is_much = bool(counts[most] > 0.3 * len(air))
    return (values == distinct[most]) & is_much


def _is_padding(values: np.ndarray, background: np.ndarray) -> bool:
    """Whether a constant background is padding of raw values, and not air that was cut off at one value.

    Raw soft tissue is denser than bone is in HU, and fills much more of a patient than the bone of a head
    does. Where a head has as much bone, padding is recognised by its sharp edge.
    """
    patient = values[values > _AIR]
    # In HU a few percent of a scan are as dense as bone; in raw values all soft tissue is.
    if not background.any() or float((values > _BONE).mean()) <= 10 * _FEW:
        return False
    return float((patient > _BONE).mean()) > _MOST_BONE or not _borders_on(values, background)


def _borders_on(values: np.ndarray, background: np.ndarray) -> bool:
    """Whether a constant background passes into tissue through partial volumes, fat and noise."""
    if not background.any():
        return False
    # What lies between the background's value and soft tissue, which is above -50 HU.
    others = values[~background]
    return _share(others, (float(values[background][0]), -50.0)) >= 2 * _FEW


def _has_air(values: np.ndarray) -> bool:
    return float((values <= _AIR).mean()) >= _FEW


def _has_soft_tissue(values: np.ndarray) -> bool:
    return _share(values, _SOFT) >= 10 * _FEW


def _refuse_neither(values: np.ndarray, base: Scale) -> None:
    """Refuse values that are too high for HU and too low for raw ones."""
    if np.quantile(values, _FEW) < -20:
        raise ValueError(
            f"cannot tell whether {_describe(base)} are HU: the lowest is {values.min():g} (HU reach -200, "
            f"raw values start at 0); is it a CT? If so set {_setting_to_keep(base)} (they are HU) or "
            "hu='metadata'"
        )


def _needs_row(base: Scale, values: np.ndarray) -> str:
    lowest = values[values >= np.quantile(values, _FEW) - 20].min()  # without strays
    return (
        f"needs a metadata row with RescaleSlope and RescaleIntercept: {_describe(base)} start at "
        f"{lowest:g}, they are raw, or this is perhaps not a CT (is it a CT, and not MR, PET or a mask?)"
    )


def _describe(base: Scale) -> str:
    return "stored values" if base is STORED else f"values under the header's scale ({base})"


def _setting_to_keep(base: Scale) -> str:
    return "hu='none'" if base is STORED else "hu='header'"


def _share(values: np.ndarray, limits: tuple[float, float]) -> float:
    return float(((values >= limits[0]) & (values <= limits[1])).mean())


def _select(values: np.ndarray, selection: np.ndarray) -> np.ndarray:
    """The selected values, or all where none is selected."""
    return values[selection] if selection.any() else values
