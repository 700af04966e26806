"""Figures as PNG bytes: ROC curves, intervals, matrices, comparisons, training. No window, no state;
matplotlib is imported to draw one.
"""

import io
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medvl.base import files
from medvl.base.display import TIMING_KEYS
from medvl.evaluation import metrics
from medvl.evaluation.results import Result

_log = logging.getLogger("medvl")

# Colours of Okabe and Ito: the colour-blind can tell them apart, also in grey.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_SKY, _AMBER = "#56B4E9", "#E69F00"
_GREY, _INK = "#C8C8C8", "#222222"


def roc(scores: Any, labels: Any, findings: Sequence[str]) -> bytes:
    """One panel per finding: its ROC curve over those of the others in grey, with AUROC, positives and n.
    PNG.

    Args:
        scores, labels: [n, c]; a finding with one class only gets a panel that says so.
    """
    s, y = metrics.checked(scores, labels, findings)
    area = metrics.auroc(s, y)
    curves_of_findings = []
    for j in range(s.shape[1]):
        fpr, tpr, _ = metrics.roc_curve(s[:, j], y[:, j])
        curves_of_findings.append((fpr, tpr))
    # The best finding first; those without an AUROC at the end.
    order = np.argsort(-np.nan_to_num(area, nan=-1.0), kind="stable")
    columns = min(6, len(order))
    figure, axes = _grid(len(order), columns, width=2.15, height=2.5)
    for axis, j in zip(axes, order, strict=True):
        # From the back: all findings in grey, the diagonal of chance, this finding, its numbers.
        for curve in curves_of_findings:
            axis.plot(*curve, color=_GREY, lw=0.6, zorder=1)
        axis.plot([0, 1], [0, 1], color=_INK, lw=0.6, ls=":", zorder=2)
        if math.isnan(area[j]):
            label = "one class only"
        else:
            label = f"AUROC {area[j]:.3f}"
            axis.plot(*curves_of_findings[j], color=_BLUE, lw=2, zorder=3)
        axis.text(
            0.97,
            0.05,
            f"{label}\n{y[:, j].sum():,} of {len(y):,}",
            ha="right",
            va="bottom",
            fontsize=8.5,
            bbox=_BOX,
            zorder=4,
        )
        axis.set_title(_wrap(findings[j]), fontsize=9)
        limits, ticks = (-0.02, 1.02), [0, 0.5, 1]  # a little beyond 0 and 1: curves run along the edges
        axis.set(xlim=limits, ylim=limits, aspect="equal", xticks=ticks, yticks=ticks)
    figure.supxlabel("1 - specificity", fontsize=9)
    figure.supylabel("sensitivity", fontsize=9)
    return _png(figure)


def reliability(scores: Mapping[str, Any], labels: Any, findings: Sequence[str]) -> bytes:
    """One panel per finding: the share of positives over the mean score of ten bins, a curve for each kind of
    scores. PNG.

    Args:
        scores: {kind: [n, c]}, probabilities such as those before and after calibration.
    """
    from sklearn.calibration import calibration_curve  # here: a second to import

    y = metrics.checked(labels, labels, findings)[1]
    figure, axes = _grid(len(findings), min(6, len(findings)), width=2.15, height=2.5)
    for j, axis in enumerate(axes):
        axis.plot([0, 1], [0, 1], color=_INK, lw=0.6, ls=":")
        for (kind, values), style in zip(scores.items(), _LINES, strict=False):
            shares, means = calibration_curve(y[:, j], np.asarray(values)[:, j], n_bins=10)
            axis.plot(means, shares, **style, lw=1.2, ms=4, label=kind)
        axis.set_title(_wrap(findings[j]), fontsize=9)
        limits, ticks = (-0.02, 1.02), [0, 0.5, 1]
        axis.set(xlim=limits, ylim=limits, aspect="equal", xticks=ticks, yticks=ticks)
    axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("probability", fontsize=9)
    figure.supylabel("share with the finding", fontsize=9)
    return _png(figure)


def intervals(rows: Sequence[Result], metric: str = "auroc") -> bytes:
    """A dot and its 95 % interval for each subject of a metric, best on top, the mean below. PNG.

    Raises:
        ValueError: no row of that metric, or a subject twice (rows of several splits or experiments).
    """
    chosen = [r for r in rows if r.what == metric]
    if not chosen or len({r.subject for r in chosen}) < len(chosen):
        present = sorted({(r.what, r.split, r.experiment) for r in rows})
        raise ValueError(
            f"intervals: needs rows of {metric!r} with each subject once, got {len(chosen)} rows of {present}"
        )
    # The mean last, before it what has no value: nan would make the order of the others depend on its place.
    chosen.sort(key=lambda r: (r.subject == "mean", math.isnan(r.value), -r.value))
    figure, (axis,) = _grid(1, 1, width=7.2, height=1.0 + 0.27 * len(chosen))
    # The axis shows what there is, not 0 to 1: intervals of a good model lie in a small part of that.
    values: list[float] = []
    for r in chosen:
        values += (r.value, r.low, r.high)
    values = [value for value in values if not math.isnan(value)]
    left, right = 0.0, 1.0
    if values:
        left, right = min(values), max(values)
    margin = 0.08 * max(right - left, 0.05)
    for i, r in enumerate(chosen):
        color, marker = _BLUE, "o"
        if r.subject == "mean":
            color, marker = _ORANGE, "D"
        axis.plot([r.low, r.high], [i, i], color=color, lw=2, solid_capstyle="round")
        axis.plot([r.value], [i], marker, color=color, ms=6)
        _write_beside(axis, i, _interval_label(r))
    # The level of chance, where it is near what the axis shows.
    if metric == "auroc" and left - margin < 0.5:
        axis.axvline(0.5, color=_INK, lw=0.8, ls=":")
    axis.set(
        xlim=(left - margin, right + margin),
        ylim=(len(chosen) - 0.5, -0.5),  # from the top down
        xlabel=f"{_TITLES.get(metric, metric)}, 95 % interval by patient",
    )
    axis.set_yticks(range(len(chosen)), [r.subject or metric for r in chosen])
    axis.grid(axis="x", color=_GREY, lw=0.5)
    return _png(figure)


def curves(path: files.PathLike) -> bytes:
    """Every number of a `metrics.jsonl` over `step`, one panel per metric; `val_x` (or `val/x`) shares the
    panel of `x`. PNG.

    Each line of the file is an object with "step" and some numbers. Where a step occurs twice (a resumed
    run) the later line counts.

    Raises:
        ValueError: no such file, a line that is no such object, or no numbers.
    """
    panels = _group_panels(_read_log(Path(path)))
    if not panels:
        raise ValueError(f"{path}: has no line with numbers beside its step")
    columns = min(3, len(panels))
    if len(panels) in (2, 4):  # four panels as a square
        columns = 2
    figure, axes = _grid(len(panels), columns, width=3.6, height=2.5)
    for axis, (name, series) in zip(axes, panels.items(), strict=True):
        for i, (key, points) in enumerate(series.items()):
            marker = "o" if len(points) < 40 else ""  # few points are shown one by one
            # A resumed run writes steps again, so the file is not always in their order.
            steps = sorted(points)
            values = [points[step] for step in steps]
            style = _STYLES[i % len(_STYLES)]
            axis.plot(steps, values, **style, lw=1.5, marker=marker, ms=3, label=key)
        # A panel with one curve needs no legend: its title is the full key, such as "val_loss".
        axis.set_title(name if len(series) > 1 else next(iter(series)), fontsize=10)
        axis.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        axis.grid(color=_GREY, lw=0.5)
        if len(series) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=9)
    return _png(figure)


def training_curves(path: files.PathLike) -> dict[str, bytes]:
    """{"Training": `curves`} for a report; nothing, and a warning, where it cannot be read: a report is
    worth more than a figure.
    """
    try:
        return {"Training": curves(path)}
    except ValueError as e:
        _log.warning("%s; the report has no curves of the training", e)
        return {}


def matrix(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x: str = "",
    y: str = "",
    label: str = "",
    low: float | None = None,
    high: float | None = None,
    digits: int = 2,
) -> bytes:
    """A heat map, light for low and dark for high, with the numbers in its cells up to 20 x 20. PNG.

    Args:
        values: [n, m]; nan cells are grey and hatched.
        rows, columns: n and m names; long ones are cut, of many small cells not every name is shown.
        x, y: what the columns and the rows are.
        label: what the values are, beside the colour bar.
        low, high: values of the lightest and the darkest colour, the least and the greatest value if None;
            what lies beyond gets theirs.
        digits: decimals of the numbers.
    Raises:
        ValueError: values are not [len(rows), len(columns)], are none or infinite, or low is not below high.
    """
    v = np.asarray(values, float)
    if v.shape != (len(rows), len(columns)) or not v.size or np.isinf(v).any():
        raise ValueError(
            f"matrix: values must be [{len(rows)}, {len(columns)}] (rows, columns), at least one, "
            "finite or nan, "
            f"got {list(v.shape)}, {int(np.isinf(v).sum())} infinite"
        )
    low, high, beyond = _color_limits(v, low, high)
    # More cells than 20 x 20 are too small for numbers, and get single lines of names too.
    numbers = _cell_numbers(v, digits) if max(v.shape) <= 20 else []
    row_names = _short_names(rows, bool(numbers))
    column_names = _short_names(columns, bool(numbers))

    # Sizes in inches: the figure grows with its cells and names, so that no label covers another.
    left = _longest_line(row_names)
    below = _longest_line(column_names)
    cell_width, cell_height = _cell_size(v.shape, numbers)
    # Names and cells together at least 2.2 inches wide, so that the label of the axis has room.
    cell_width = max(cell_width, (2.2 - left) / v.shape[1])
    # Names of columns that are wider than their cells are turned.
    angle = 0
    if below >= cell_width:
        angle = 45 if numbers else 90
    inner_height = max(v.shape[0] * cell_height, 1.2)
    width = left + v.shape[1] * cell_width + 1.4
    height = inner_height + 0.7 + below * math.sin(math.radians(angle))

    figure, (axis,) = _grid(1, 1, width=width, height=height)
    mesh = _draw_cells(axis, v, low, high, numbers)
    _name_axes(axis, row_names, column_names, (cell_height, cell_width), angle)
    axis.set(xlabel=x, ylabel=y, ylim=(v.shape[0], 0))  # the first row on top, as in a table
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _draw_color_bar(figure, axis, mesh, label, beyond, inner_height)
    return _png(figure)


def picture_grid(lines: Sequence[tuple[str, Sequence[np.ndarray | None]]], columns: Sequence[str]) -> bytes:
    """Pictures side by side, each line with its name on the left. PNG.

    Args:
        lines: (name, a picture uint8 [y, x] or [y, x, 3] for each column; None leaves its place empty); all are
            shown at one size.
        columns: names above the first line.
    """
    figure, axes = _grid(len(lines) * len(columns), len(columns), width=1.5, height=1.15)
    places = iter(axes)
    for number, (name, pictures) in enumerate(lines):
        for column, picture in zip(columns, pictures, strict=True):
            axis = next(places)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if picture is not None:
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            if number == 0:
                axis.set_title(column, fontsize=9)
            if column == columns[0]:
                text = _wrap(name, 24, max_lines=4)
                axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
    return _png(figure)


def lines(
    series: Mapping[str, Mapping[float, tuple[float, float, float]]],
    x: str,
    y: str,
    *,
    references: Mapping[str, float] | None = None,
) -> bytes:
    """A value over a number, as recall over k: one line with 95 % intervals per series. PNG.

    The axis is logarithmic where the greatest x is 20 times the least or more. Series stand a little aside
    of each other, so that their intervals can be told apart.

    Args:
        series: name -> {x: (value, low, high)}; nan bounds draw no interval, a nan value leaves a gap.
        x, y: what the axes are.
        references: name -> value of a dotted line across.
    Raises:
        ValueError: no point, a point that is not three numbers with low <= high, or a number that is
            infinite.
    """
    points = _line_points(series)
    references = references or {}
    # The points of one series may lie at other x than those of another.
    xs = sorted(set().union(*points.values()))
    if not xs or not all(map(math.isfinite, [*xs, *references.values()])):
        raise ValueError(
            f"lines: needs at least one point, and finite x and references, got x {xs[:8]}, "
            f"references {references}"
        )

    # Values are drawn at their logarithm on a plain axis and the ticks labelled by hand: the offset between
    # series is then the same everywhere.
    logarithmic = xs[0] > 0 and xs[-1] >= 20 * xs[0]
    scale = math.log10 if logarithmic else float
    places = [scale(k) for k in xs]
    start, end = places[0], places[-1]
    span = (end - start) or 1.0  # one x only
    steps = [b - a for a, b in pairwise(places)]
    nearest = min(steps, default=span)
    # Between two series; all of them together take at most half of the way to the next x.
    offset = min(0.012 * span, 0.5 * nearest / len(points))
    columns = _legend_columns(points, width=7.2, handle=0.75)
    legend_rows = math.ceil(len(points) / columns)
    figure, (axis,) = _grid(1, 1, width=7.2, height=3.9 + 0.2 * legend_rows)
    handles = _draw_series(axis, list(points.values()), scale, offset)
    plotted = list(references.values())
    for by_x in points.values():
        for point in by_x.values():
            plotted += point
    bottom, top = _axis_limits(plotted)
    margin = 0.05 * span
    axis.set(xlim=(start - margin, end + margin), ylim=(bottom, top), xlabel=x, ylabel=y)
    labelled = _spaced(xs, scale, 0.035 * span)
    axis.set_xticks([scale(k) for k in labelled], [f"{k:g}" for k in labelled])
    _draw_references(axis, references, 0.055 * (top - bottom), top)
    axis.grid(axis="y", color=_GREY, lw=0.5)
    _legend(figure, handles, list(points), columns)
    return _png(figure)


def _line_points(
    series: Mapping[str, Mapping[float, tuple[float, float, float]]],
) -> dict[str, dict[float, tuple[float, ...]]]:
    """{name: {x: (value, low, high)}} with rising x."""
    points: dict[str, dict[float, tuple[float, ...]]] = {}
    for name, values_by_x in series.items():
        points[name] = {}
        for k, estimate in sorted(values_by_x.items()):
            points[name][float(k)] = _check_point(f"lines: {name!r} at {k}", estimate)
    return points


def compare(rows: Sequence[tuple[str, str, float, float, float]], x: str) -> bytes:
    """Dots with 95 % intervals, those of a group under each other, in one colour per name, with their
    numbers. PNG.

    Args:
        rows: (group, name, value, low, high), as (mode, "in domain", 0.8, 0.7, 0.9); groups and names come
            in the order they are first met. nan bounds draw no interval, a nan value no dot.
        x: what the values are.
    Raises:
        ValueError: no rows, a group with one name twice, or a row whose value, low and high are not three
            finite numbers, low <= high.
    """
    points = _compared_points(rows)
    # Without repetitions, in the order in which they are met.
    groups = list(dict.fromkeys(group for group, _ in points))
    names = list(dict.fromkeys(name for _, name in points))
    step = len(names) + 0.8  # lines of a group and the space behind it
    bottom = len(groups) * step - 0.9
    columns = _legend_columns(names, width=7.2, handle=0.5)
    legend_rows = math.ceil(len(names) / columns)
    height = 0.9 + 0.2 * step * len(groups) + 0.2 * legend_rows
    figure, (axis,) = _grid(1, 1, width=8.2, height=height)
    handles: dict[str, Any] = {}
    for (group, name), (value, low, high) in points.items():
        # By name, not by position: a group may lack some of the names.
        i = names.index(name)
        place = groups.index(group) * step + i
        style = _LINES[i % len(_LINES)]
        axis.plot([low, high], [place, place], color=style["color"], lw=2, solid_capstyle="round")
        (handles[name],) = axis.plot([value], [place], **style, ls="", ms=6)
        label = "no value" if math.isnan(value) else _format_interval(value, low, high)
        _write_beside(axis, place, label, fontsize=8)
    # Thin rules in the spaces between groups.
    for i in range(1, len(groups)):
        axis.axhline(i * step - 0.9, color=_GREY, lw=0.6)
    plotted: list[float] = []
    for estimate in points.values():
        plotted += estimate
    axis.set(xlim=_axis_limits(plotted), ylim=(bottom, -0.9), xlabel=x)
    # The name of a group stands beside the middle of its lines.
    half_group = (len(names) - 1) / 2
    middles = [i * step + half_group for i in range(len(groups))]
    labels = [_wrap(group, 30, 2) for group in groups]
    # Names come from data: a "$" in one must not start a formula.
    axis.set_yticks(middles, labels, parse_math=False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=_GREY, lw=0.5)
    _legend(figure, list(handles.values()), list(handles), columns)
    return _png(figure)


def _compared_points(
    rows: Sequence[tuple[str, str, float, float, float]],
) -> dict[tuple[str, str], tuple[float, ...]]:
    """{(group, name): (value, low, high)}"""
    points: dict[tuple[str, str], tuple[float, ...]] = {}
    for group, name, *point in rows:
        points[group, name] = _check_point(f"compare: {name!r} of {group!r}", tuple(point))
    # A pair that occurs twice has overwritten the first of them.
    if not rows or len(points) < len(rows):
        pairs = [row[:2] for row in rows]
        twice = [pair for i, pair in enumerate(pairs) if pair in pairs[:i]]
        raise ValueError(
            f"compare: needs rows, each group with each name once, got {len(rows)} rows, twice {twice[:4]}"
        )
    return points


_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "f1_weighted": "weighted F1",
}
# Behind text that stands on curves.
_BOX = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
_COLORS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _AMBER, _SKY, _INK)
# Of curves of training: colour and line differ, so that prints in black and white can be read too.
_STYLES = [
    {"color": _BLUE, "ls": "-"},
    {"color": _ORANGE, "ls": "--"},
    {"color": _GREEN, "ls": "-."},
    {"color": _PURPLE, "ls": ":"},
    {"color": _INK, "ls": "-"},
]
# Of series with intervals: each colour has a marker of its own.
_LINES = [{"color": color, "marker": marker} for color, marker in zip(_COLORS, "osD^vPX", strict=True)]
# "train_loss", "val_loss" and "val/loss" belong into one panel.
_SPLIT_PREFIX = re.compile(r"(train|val|valid|test)[_/]")


def _grid(n: int, columns: int, width: float, height: float) -> tuple[Any, list]:
    """A figure of n panels and their axes; width and height of one panel in inches."""
    # Figure itself, not pyplot, which keeps every figure and may open a window. Imported here: it takes long.
    from matplotlib.figure import Figure

    rows = math.ceil(n / columns)
    figure = Figure(figsize=(columns * width, rows * height), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[n:]:  # places that the last row leaves empty
        axis.remove()
    for axis in axes[:n]:
        axis.tick_params(labelsize=8, color=_GREY)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:n]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without the name and version of the software the bytes depend on the drawing alone.
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def _write_beside(axis: Any, place: float, text: str, fontsize: float = 8.5) -> None:
    """Write a text right of the frame, at this place of the y axis."""
    axis.text(
        1.01,
        place,
        text,
        transform=axis.get_yaxis_transform(),  # x is a share of the axis, y in data
        va="center",
        fontsize=fontsize,
        parse_math=False,  # a "$" in a name must not start a formula
    )


def _interval_label(r: Result) -> str:
    if math.isnan(r.value):
        return "no value: one class only"
    label = _format_interval(r.value, r.low, r.high)
    positives = r.extra.get("positives")
    if positives is None:
        return f"{label}  n = {r.n:,}"
    return f"{label}  {positives:,} of {r.n:,}"


def _format_interval(value: float, low: float, high: float) -> str:
    if math.isnan(low):
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _wrap(name: str, width: int = 22, max_lines: int | None = None) -> str:
    import textwrap

    wrapped = textwrap.wrap(name, width, max_lines=max_lines, placeholder="…")
    return "\n".join(wrapped) or name  # nothing is left of a name of spaces


def _check_point(context: str, point: tuple[float, ...]) -> tuple[float, ...]:
    # Comparisons with nan are false, so bounds of nan pass.
    if len(point) != 3 or any(map(math.isinf, point)) or point[1] > point[2]:
        raise ValueError(f"{context}: must be (value, low, high), finite or nan, low <= high, got {point}")
    return point


# Parts of a matrix ------------------------------------------------------------------------------------------
def _color_limits(v: np.ndarray, low: float | None, high: float | None) -> tuple[float, float, str]:
    """Least and greatest value of the colours, and the `extend` of the colour bar: on which side values lie
    beyond them.
    """
    defined = v[~np.isnan(v)]
    if not len(defined):  # the cells are all grey, but the colour bar needs a range
        defined = np.array([0.0, 1.0])
    least, greatest = float(defined.min()), float(defined.max())
    margin = 0.0 if least < greatest else 0.5  # all values alike: they get the middle colour
    if low is None:
        low = least - margin
    if high is None:
        high = greatest + margin
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"matrix: low must be below high, got {low:g} and {high:g}; the values lie in "
            f"{least:g}..{greatest:g}"
        )
    # A limit that was rounded for the eye does not make its own value one beyond.
    rounding = 1e-5 * (high - low)
    below = least < low - rounding
    above = greatest > high + rounding
    if below and above:
        return low, high, "both"
    if below:
        return low, high, "min"
    return low, high, "max" if above else "neither"


def _cell_numbers(v: np.ndarray, digits: int) -> list[list[str]]:
    """The numbers in the cells; "z" writes -0.00 as 0.00."""
    numbers = []
    for row in v.tolist():
        texts = []
        for value in row:
            texts.append("–" if math.isnan(value) else f"{value:z.{digits}f}")
        numbers.append(texts)
    return numbers


def _short_names(names: Sequence[str], wrapped: bool) -> list[str]:
    """Names of at most two lines, or of one where cells are small."""
    return [_wrap(name, 24, 2) if wrapped else name[:48] for name in names]


def _longest_line(names: Sequence[str]) -> float:
    """The width in inches of the longest line of some names."""
    lines = "\n".join(names).split("\n")
    # 0.075 inches is the mean width of a character in this font and size.
    return 0.075 * max(len(line) for line in lines)


def _cell_size(shape: tuple[int, ...], numbers: list[list[str]]) -> tuple[float, float]:
    """(width, height) of a cell in inches: room for its number, and at most 20 inches for all."""
    if numbers:
        longest = max(len(number) for row in numbers for number in row)
        width, height = max(0.5, 0.085 * longest), 0.4
    else:
        width = height = max(0.16, 6 / max(shape))
    return min(width, 20 / shape[1]), min(height, 20 / shape[0])


def _draw_cells(axis: Any, v: np.ndarray, low: float, high: float, numbers: list[list[str]]) -> Any:
    """Draw the coloured cells and, where there are any, the numbers in them; returns the mesh."""
    mesh = axis.pcolormesh(
        np.ma.masked_invalid(v),
        cmap="Blues",
        vmin=low,
        vmax=high,
        edgecolors="white",
        linewidth=0.8 if numbers else 0.2,
    )
    # The background shows where a cell has no value. Cells with numbers have a dash there and need no hatch.
    axis.patch.set(facecolor=_GREY, hatch="" if numbers else "////", edgecolor="white")
    _write_numbers(axis, mesh, v, numbers)
    return mesh


def _draw_color_bar(figure: Any, axis: Any, mesh: Any, label: str, beyond: str, height: float) -> None:
    """Draw the colour bar beside the cells, with an arrow on each side on which values lie beyond it.

    Args:
        beyond: "min", "max", "both" or "neither".
        height: of all cells, in inches.
    """
    # The bar is 0.22 inches wide and an arrow 0.15 long, whatever the height: matplotlib wants shares of it.
    bar = figure.colorbar(
        mesh,
        ax=axis,
        label=label,
        aspect=height / 0.22,
        pad=0.02,
        extend=beyond,
        extendfrac=0.15 / height,
    )
    bar.ax.tick_params(labelsize=8)


def _write_numbers(axis: Any, mesh: Any, v: np.ndarray, numbers: list[list[str]]) -> None:
    for i, row in enumerate(numbers):
        for j, text in enumerate(row):
            color = "black"
            if not math.isnan(v[i, j]):
                color = _readable(mesh.cmap(mesh.norm(v[i, j])))
            axis.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8.5, color=color)


def _name_axes(axis: Any, rows: list[str], columns: list[str], cell: tuple[float, float], angle: int) -> None:
    """Write every name of rows and columns, or every k-th where cells are smaller than a line of text.

    Args:
        cell: (height, width) in inches.
        angle: of the names of columns, in degrees.
    """
    # A line of text is 0.13 inches high, and the names of narrow columns stand upright.
    cell_height, cell_width = cell
    row_step = max(1, math.ceil(0.13 / cell_height))
    column_step = max(1, math.ceil(0.13 / cell_width))
    rotation: dict[str, Any] = {}
    if angle:
        # The end of a name, not its middle, stands below its column.
        vertical = "center" if angle == 90 else "top"
        rotation = {"rotation": angle, "ha": "right", "va": vertical, "rotation_mode": "anchor"}
    row_places = np.arange(0.5, len(rows))[::row_step]
    column_places = np.arange(0.5, len(columns))[::column_step]
    axis.set_yticks(row_places, rows[::row_step], parse_math=False)
    axis.set_xticks(column_places, columns[::column_step], parse_math=False, **rotation)


# Parts of a plot of lines -----------------------------------------------------------------------------------
def _draw_series(
    axis: Any, series: Sequence[Mapping[float, tuple[float, ...]]], scale: Any, offset: float
) -> list[Any]:
    """Draw each series {x: (value, low, high)} with its intervals; returns the lines for a legend.

    Args:
        scale: x -> place on the axis.
        offset: between the places of two series at one x.
    """
    handles: list[Any] = []
    for i, by_x in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * offset  # the series stand around their common x
        places = [scale(k) + shift for k in by_x]
        # A series without points is drawn too: so its name is in the legend.
        points = np.array(list(by_x.values())).reshape(-1, 3)
        values, lows, highs = points.T
        # Seven colours and markers; after them the next kind of line.
        kind = ("-", "--", "-.", ":")[i // len(_LINES) % 4]
        style = _LINES[i % len(_LINES)] | {"ls": kind}
        handles += axis.plot(places, values, **style, lw=1.6, ms=5, zorder=3)
        axis.vlines(places, lows, highs, color=style["color"], lw=1.4, alpha=0.6, zorder=2)
    return handles


# Axes and legends -------------------------------------------------------------------------------------------
def _draw_references(axis: Any, references: Mapping[str, float], gap: float, top: float) -> None:
    """Dotted lines across, with their names beside the axis."""
    named, places = _spread(references, gap, top)
    for (name, value), place in zip(named, places, strict=True):
        axis.axhline(value, color=_INK, lw=1, ls=":", zorder=1)
        _write_beside(axis, place, f"{name}  {value:.3f}")


def _axis_limits(values: Sequence[float]) -> tuple[float, float]:
    """The limits of an axis that shows these values; nan is left out."""
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        numbers = [0.0, 1.0]
    least, greatest = min(numbers), max(numbers)
    # Values that are all the same, or all 0, still need an axis of some length.
    margin = 0.08 * (greatest - least) or 0.1 * abs(numbers[0]) or 0.5
    return least - margin, greatest + margin


def _spaced(xs: list[float], scale: Any, gap: float) -> list[float]:
    """Those of sorted numbers that are far enough from each other for labels; first and last are among
    them.
    """
    spaced = xs[:1]
    for k in xs[1:-1]:
        from_last_label = scale(k) - scale(spaced[-1])
        to_end = scale(xs[-1]) - scale(k)
        if from_last_label >= gap and to_end >= gap:
            spaced.append(k)
    if len(xs) > 1:
        spaced.append(xs[-1])
    return spaced


def _spread(
    named: Mapping[str, float], gap: float, top: float
) -> tuple[list[tuple[str, float]], list[float]]:
    """The named values in rising order, and where to write their names, at least a gap apart and below the
    top.
    """
    order = sorted(named.items(), key=lambda item: item[1])
    places = [value for _, value in order]
    # First upwards, each name above the one before; then back, for those that this pushed over the top.
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(len(places) - 1, -1, -1):
        names_above = len(places) - 1 - i
        places[i] = min(places[i], top - gap * names_above)
    return order, places


def _readable(fill: Any) -> str:
    """Black or white, whichever stands out more: a contrast of 4.5 or more on any colour (WCAG 2.1, relative
    luminance).
    """
    linear = []
    for channel in fill[:3]:  # sRGB; the fourth is opacity
        if channel <= 0.04045:
            linear.append(channel / 12.92)
        else:
            linear.append(((channel + 0.055) / 1.055) ** 2.4)
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Contrast is (lighter + 0.05) / (darker + 0.05). Black has luminance 0 and white 1, so black wins where
    # (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05).
    if (luminance + 0.05) ** 2 > 1.05 * 0.05:
        return "black"
    return "white"


def _legend_columns(names: Iterable[str], width: float, handle: float) -> int:
    """How many names stand side by side below a figure of this width, 1 to 4.

    Args:
        width, handle: of the legend, and of one entry without its name, in inches.
    """
    longest = max(map(len, names))
    return max(1, min(4, int(width / (handle + 0.08 * longest))))


def _legend(figure: Any, handles: list, names: list[str], columns: int) -> None:
    legend = figure.legend(
        handles, names, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False
    )
    for text in legend.get_texts():  # figure.legend has no `parse_math`
        text.set_parse_math(False)


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from e
    lines = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError) as e:  # deeply nested brackets overflow the parser
            raise ValueError(f"{path}, line {number}: must be a JSON object with a step ({e})") from e
        if not isinstance(lines[-1], dict) or not isinstance(lines[-1].get("step"), int):
            raise ValueError(
                f"{path}, line {number}: must be a JSON object with a whole-number step, found {line[:80]!r}"
            )
    return lines


def _group_panels(lines: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """{panel: {key: {step: value}}}; a value that is no number (a name, a flag) is no curve."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key in ("step", *TIMING_KEYS):
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            # A later line with the same step overwrites the earlier one: that is the resumed run.
            panel = _SPLIT_PREFIX.sub("", key, count=1)
            panels.setdefault(panel, {}).setdefault(key, {})[line["step"]] = value
    return panels
