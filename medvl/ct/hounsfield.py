"""Which scale takes the stored values of a scan to Hounsfield units (HU), judged by the values themselves.

Nothing in a file says that it is a CT, and scales are lost, applied twice or left over from another scan. What a CT cannot do without is
air (around the patient, in lungs or bowel) and soft tissue. All shares are of sampled voxels, so that a few strays decide nothing.
"""

import numpy as np
from attrs import frozen

TISSUE = (-1100.0, 300.0)  # air, lung, fat, water and soft tissue
_SOFT = (-200.0, 300.0)
_AIR = -200.0  # a CT has values below: air is -1000, lung -850
_FEW = 0.005  # a share below is strays
PADDING = -1500.0  # values below are padding outside the scanner's field of view, not tissue or air
_BONE = 700.0  # of real chests 1 % lies above; raw soft tissue does (1064 with intercept -1024)
_MOST_BONE = 0.25  # of a head's voxels without air; raw, more of any patient lies above _BONE


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

    Values that are HU as the header's scale gives them are taken so; raw ones take the metadata's scale on top. Where both would do,
    the metadata's is taken if it halves what is no tissue.

    Args:
        stored: [n] sampled voxels.
        header: the header's scale, where it has one.
        row: the scale of the scan's metadata row, where there is one.
    Returns:
        rule "stored", "header", "metadata" or "header+metadata".
    Raises:
        ValueError: no scale makes a CT of them; the message goes on after the scan's name.
    """
    stored = stored.astype(np.float64).ravel()
    own = STORED if header is None or (header.slope, header.intercept) == (1.0, 0.0) else header
    if own is not STORED:
        _refuse_applied_before(stored, own)
    values = own.apply(stored)
    values = _where_any(values, values >= PADDING)
    background = _background(values)
    padded = _is_padding(values, background)
    if padded:
        patient = _where_any(values, values > _AIR)
    elif _borders_on(values, background):
        patient = values  # the background is the air around the patient, with the partial volumes of the skin
    else:
        patient = _where_any(values, ~background)
    is_hu = _has_air(values) and not padded
    if row is None:
        if is_hu:
            return own
        if not padded:
            _refuse_neither(patient, own)
        raise ValueError(f"{_needs_row(own, patient)}; give it, or set {_as_it_is(own)} if they are HU")
    scaled = row.apply(patient)
    with_row, without = _share(scaled, TISSUE), _share(patient, TISSUE)
    row_fits = _has_air(row.apply(values)) and _has_soft_tissue(scaled)
    row_is_better = row_fits and _is_better(with_row, without)
    if is_hu:
        return compose_scales(own, row) if row_is_better else own
    if not padded:
        _refuse_neither(patient, own)
    if with_row < without:
        raise ValueError(_applied_before("the metadata's", row, with_row, without))
    if not row_fits:
        raise ValueError(
            f"the metadata's scale {row} makes {_share(scaled, _SOFT):.0%} of its voxels soft tissue ({_SOFT[0]:g} to {_SOFT[1]:g} HU) and "
            f"{float((scaled <= _AIR).mean()):.0%} air or lung: perhaps it is not a CT, or the row is another scan's; "
            "set hu='metadata' if the row is right"
        )
    return compose_scales(own, row)


def compose_scales(first: Scale, then: Scale) -> Scale:
    """Both scales, one after the other."""
    rule = then.rule if first is STORED else f"{first.rule}+{then.rule}"
    return Scale(
        rule=rule, slope=then.slope * first.slope, intercept=then.slope * first.intercept + then.intercept
    )


def check_scale(stored: np.ndarray, chosen: Scale, header: Scale | None = None) -> Scale:
    """The scale that a user chose, held against the values.

    Args:
        stored: [n] sampled voxels.
        chosen: rule "none" or "metadata".
        header: the header's scale, where it has one; such that floats were saved as integers with is part of what the values are.
    Returns:
        the scale; of the metadata on top of the header's where that halves what is no tissue.
    Raises:
        ValueError: without it, or with the header's, more of the voxels are tissue.
    """
    values = stored.astype(np.float64).ravel()
    values = _where_any(values, values >= PADDING)
    with_it, without = _share(chosen.apply(values), TISSUE), _share(values, TISSUE)
    scaled = header is not None and (header.slope, header.intercept) != (1.0, 0.0)
    both = compose_scales(header, chosen) if header is not None and scaled else chosen
    with_both = _share(both.apply(values), TISSUE)
    header_counts = _is_better(with_both, with_it)
    if header_counts and chosen.rule == "none":
        raise ValueError(
            f"hu='none' leaves out the header's scale {both}: with it {with_both:.0%} of the voxels lie between {TISSUE[0]:g} and "
            f"{TISSUE[1]:g} HU, without it {with_it:.0%}; set hu='header'"
        )
    if without > (with_both if header_counts else with_it):
        raise ValueError(_applied_before("the metadata's", chosen, with_it, without))
    return both if header_counts else chosen


def _applied_before(whose: str, scale: Scale, with_it: float, without: float) -> str:
    return (
        f"{whose} scale {scale} was applied before, or is another scan's: with it {with_it:.0%} of the voxels lie between "
        f"{TISSUE[0]:g} and {TISSUE[1]:g} HU, without it {without:.0%}; set hu='none' if stored values are HU"
    )


def _refuse_applied_before(stored: np.ndarray, header: Scale) -> None:
    """Refuse stored values that are HU already, and a header that scales them again."""
    values = header.apply(stored)
    inside = (np.maximum(stored, values) >= PADDING) & ~_background(stored)
    is_hu = _has_air(stored) and _has_soft_tissue(_where_any(stored, inside))
    stored, values = _where_any(stored, inside), _where_any(values, inside)
    with_it, without = _share(values, TISSUE), _share(stored, TISSUE)
    if is_hu and (without > with_it or not _has_soft_tissue(values)):
        message = _applied_before("the header's", header, with_it, without)
        raise ValueError(f"{message}, hu='header' if the header is right")


def _is_better(share: float, other: float) -> bool:
    """Whether a share of tissue is clearly better: what is no tissue is halved."""
    return 1 - share < (1 - other) / 2


def _background(values: np.ndarray) -> np.ndarray:
    """Which values are a constant background: one value makes up much of all that is as low as air."""
    air = values[values <= _AIR]
    if not len(air):
        return np.zeros(len(values), bool)
    kinds, counts = np.unique(air, return_counts=True)
    most = counts.argmax()
    return (values == kinds[most]) & bool(counts[most] > 0.3 * len(air))


def _is_padding(values: np.ndarray, background: np.ndarray) -> bool:
    """Whether a constant background is padding of raw values, and not air that was cut off at one value.

    Raw soft tissue is denser than the bone of values in HU, and fills much more of the patient than the bone of a head does. Beside a head,
    padding is told by its sharp edge.
    """
    patient = values[values > _AIR]
    if not background.any() or float((values > _BONE).mean()) <= 10 * _FEW:
        return False
    return float((patient > _BONE).mean()) > _MOST_BONE or not _borders_on(values, background)


def _borders_on(values: np.ndarray, background: np.ndarray) -> bool:
    """Whether values lead from a constant background to those of tissue, as partial volumes, fat and noise do."""
    if not background.any():
        return False
    rest = values[~background]
    return _share(rest, (float(values[background][0]), -50.0)) >= 2 * _FEW


def _has_air(values: np.ndarray) -> bool:
    return float((values <= _AIR).mean()) >= _FEW


def _has_soft_tissue(values: np.ndarray) -> bool:
    return _share(values, _SOFT) >= 10 * _FEW


def _refuse_neither(values: np.ndarray, own: Scale) -> None:
    if np.quantile(values, _FEW) < -20:
        raise ValueError(
            f"cannot tell whether {_values(own)} are HU: the lowest is {values.min():g} (HU reach -200, raw values start at 0); "
            f"is it a CT? If so set {_as_it_is(own)} (they are HU) or hu='metadata'"
        )


def _needs_row(own: Scale, values: np.ndarray) -> str:
    lowest = values[values >= np.quantile(values, _FEW) - 20].min()  # without strays
    return (
        f"needs a metadata row with RescaleSlope and RescaleIntercept: {_values(own)} start at {lowest:g}, they are raw, or this is "
        "perhaps not a CT (is it a CT, and not MR, PET or a mask?)"
    )


def _values(own: Scale) -> str:
    return "stored values" if own is STORED else f"values under the header's scale ({own})"


def _as_it_is(own: Scale) -> str:
    return "hu='none'" if own is STORED else "hu='header'"


def _share(values: np.ndarray, between: tuple[float, float]) -> float:
    return float(((values >= between[0]) & (values <= between[1])).mean())


def _where_any(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return values[chosen] if chosen.any() else values
