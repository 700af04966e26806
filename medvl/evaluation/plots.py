"""Figures as PNG bytes: ROC curves, intervals, matrices, comparisons, training. No window, no state; matplotlib is imported to draw one."""

import io
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medvl.base import files
from medvl.base.display import TIMING_KEYS
from medvl.evaluation import metrics
from medvl.evaluation.results import Result

_log = logging.getLogger("medvl")

_BLUE, _ORANGE, _GREEN, _PURPLE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
)  # Okabe and Ito: told apart by the colour-blind and in grey
_SKY, _AMBER = "#56B4E9", "#E69F00"
_GREY, _INK = "#C8C8C8", "#222222"


def roc(scores: Any, labels: Any, findings: Sequence[str]) -> bytes:
    """One panel per finding: its ROC curve over those of the others in grey, with AUROC, positives and n. PNG.

    Args:
        scores, labels: [n, c]; a finding with one class only gets a panel that says so.
    """
    s, y = metrics.checked(scores, labels, findings)
    area = metrics.auroc(s, y)
    lines = [metrics.roc_curve(s[:, j], y[:, j])[:2] for j in range(s.shape[1])]
    order = np.argsort(-np.nan_to_num(area, nan=-1.0), kind="stable")
    columns = min(6, len(order))
    figure, axes = _grid(len(order), columns, width=2.15, height=2.5)
    for axis, j in zip(axes, order, strict=True):
        for other in lines:
            axis.plot(*other, color=_GREY, lw=0.6, zorder=1)
        axis.plot([0, 1], [0, 1], color=_INK, lw=0.6, ls=":", zorder=2)
        known = not math.isnan(area[j])
        if known:
            axis.plot(*lines[j], color=_BLUE, lw=2, zorder=3)
        said = f"AUROC {area[j]:.3f}" if known else "one class only"
        axis.text(
            0.97,
            0.05,
            f"{said}\n{y[:, j].sum():,} of {len(y):,}",
            ha="right",
            va="bottom",
            fontsize=8.5,
            bbox=_BOX,
            zorder=4,
        )
        axis.set_title(_wrapped(findings[j]), fontsize=9)
        axis.set(
            xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1]
        )
    figure.supxlabel("1 - specificity", fontsize=9)
    figure.supylabel("sensitivity", fontsize=9)
    return _png(figure)


def intervals(rows: Sequence[Result], what: str = "auroc") -> bytes:
    """A dot and its 95 % interval for each subject of metric `what`, best on top, the mean below. PNG.

    Raises:
        ValueError: no row of that metric, or a subject twice (rows of several splits or experiments).
    """
    chosen = [r for r in rows if r.what == what]
    if not chosen or len({r.subject for r in chosen}) < len(chosen):
        found = sorted({(r.what, r.split, r.experiment) for r in rows})
        raise ValueError(
            f"intervals: needs rows of {what!r} with each subject once, got {len(chosen)} rows of {found}"
        )
    chosen.sort(key=lambda r: (r.subject == "mean", math.isnan(r.value), -r.value))
    figure, (axis,) = _grid(1, 1, width=7.2, height=1.0 + 0.27 * len(chosen))
    bounds = [v for r in chosen for v in (r.value, r.low, r.high) if not math.isnan(v)]
    left, right = (min(bounds), max(bounds)) if bounds else (0.0, 1.0)
    margin = 0.08 * max(right - left, 0.05)
    for i, r in enumerate(chosen):
        color = _ORANGE if r.subject == "mean" else _BLUE
        axis.plot([r.low, r.high], [i, i], color=color, lw=2, solid_capstyle="round")
        axis.plot([r.value], [i], "D" if r.subject == "mean" else "o", color=color, ms=6)
        axis.text(1.01, i, _said(r), transform=axis.get_yaxis_transform(), va="center", fontsize=8.5)
    if what == "auroc" and left - margin < 0.5:
        axis.axvline(0.5, color=_INK, lw=0.8, ls=":")
    axis.set(
        xlim=(left - margin, right + margin),
        ylim=(len(chosen) - 0.5, -0.5),
        xlabel=f"{_TITLES.get(what, what)}, 95 % interval by patient",
    )
    axis.set_yticks(range(len(chosen)), [r.subject or what for r in chosen])
    axis.grid(axis="x", color=_GREY, lw=0.5)
    return _png(figure)


def curves(path: files.PathLike) -> bytes:
    """Every number of a `metrics.jsonl` over `step`, one panel per metric; `val_x` (or `val/x`) shares the panel of `x`. PNG.

    Each line of the file is an object with "step" and some numbers. Where a step occurs twice (a resumed run) the later line counts.

    Raises:
        ValueError: no such file, a line that is no such object, or no numbers.
    """
    panels = _panels(_lines(Path(path)))
    if not panels:
        raise ValueError(f"{path}: has no line with numbers beside its step")
    figure, axes = _grid(
        len(panels), 2 if len(panels) in (2, 4) else min(3, len(panels)), width=3.6, height=2.5
    )
    for axis, (name, series) in zip(axes, panels.items(), strict=True):
        for i, (key, points) in enumerate(series.items()):
            few = "o" if len(points) < 40 else ""
            axis.plot(
                *zip(*sorted(points.items()), strict=True),
                **_STYLES[i % len(_STYLES)],
                lw=1.5,
                marker=few,
                ms=3,
                label=key,
            )
        axis.set_title(name if len(series) > 1 else next(iter(series)), fontsize=10)
        axis.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        axis.grid(color=_GREY, lw=0.5)
        if len(series) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=9)
    return _png(figure)


def training_curves(path: files.PathLike) -> dict[str, bytes]:
    """{"Training": `curves`} for a report; nothing, and a warning, where it cannot be read: a report is worth more than a figure."""
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
        rows, columns: n and m names; of a name of more than two lines the rest is cut, of many small cells not every name is shown.
        x, y: what the columns and the rows are.
        label: what the values are, beside the colour bar.
        low, high: values of the lightest and the darkest colour, the least and the greatest value if None; what lies beyond gets theirs.
        digits: decimals of the numbers.
    Raises:
        ValueError: values are not [len(rows), len(columns)], are none or infinite, or low is not below high.
    """
    v = np.asarray(values, float)
    if v.shape != (len(rows), len(columns)) or not v.size or np.isinf(v).any():
        raise ValueError(
            f"matrix: values must be [{len(rows)}, {len(columns)}] (rows, columns), at least one, finite or nan, got {list(v.shape)}, "
            f"{int(np.isinf(v).sum())} infinite"
        )
    low, high, beyond = _colours(v, low, high)
    said = (
        [[f"{c:z.{digits}f}" if c == c else "–" for c in row] for row in v.tolist()]
        if max(v.shape) <= 20
        else []
    )
    wide, tall = (
        (max(0.5, 0.085 * max(len(c) for row in said for c in row)), 0.4)
        if said
        else (max(0.16, 6 / max(v.shape)),) * 2
    )
    wide, tall = min(wide, 20 / v.shape[1]), min(tall, 20 / v.shape[0])  # inches
    names = [[_wrapped(n, 24, 2) if said else n[:48] for n in some] for some in (rows, columns)]
    left, below = (0.075 * max(len(line) for n in some for line in n.split("\n")) for some in names)
    wide = max(wide, (2.2 - left) / v.shape[1])
    angle = 0 if below < wide else 45 if said else 90
    inner = max(v.shape[0] * tall, 1.2)
    width, height = left + v.shape[1] * wide + 1.4, inner + 0.7 + below * math.sin(math.radians(angle))
    figure, (axis,) = _grid(1, 1, width=width, height=height)
    mesh = axis.pcolormesh(
        np.ma.masked_invalid(v),
        cmap="Blues",
        vmin=low,
        vmax=high,
        edgecolors="white",
        linewidth=0.8 if said else 0.2,
    )
    axis.patch.set(
        facecolor=_GREY, hatch="" if said else "////", edgecolor="white"
    )  # seen through cells without a value
    for i, row in enumerate(said):
        for j, text in enumerate(row):
            color = _readable(mesh.cmap(mesh.norm(v[i, j]))) if v[i, j] == v[i, j] else "black"
            axis.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8.5, color=color)
    every = [max(1, math.ceil(0.13 / size)) for size in (tall, wide)]
    turned = (
        {
            "rotation": angle,
            "ha": "right",
            "va": "center" if angle == 90 else "top",
            "rotation_mode": "anchor",
        }
        if angle
        else {}
    )
    axis.set_yticks(np.arange(0.5, v.shape[0])[:: every[0]], names[0][:: every[0]], parse_math=False)
    axis.set_xticks(
        np.arange(0.5, v.shape[1])[:: every[1]], names[1][:: every[1]], parse_math=False, **turned
    )
    axis.set(xlabel=x, ylabel=y, ylim=(v.shape[0], 0))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(
        mesh, ax=axis, label=label, aspect=inner / 0.22, pad=0.02, extend=beyond, extendfrac=0.15 / inner
    )
    bar.ax.tick_params(labelsize=8)
    return _png(figure)


def lines(
    series: Mapping[str, Mapping[float, tuple[float, float, float]]],
    x: str,
    y: str,
    *,
    references: Mapping[str, float] | None = None,
) -> bytes:
    """A value over a number, as recall over k: one line with 95 % intervals per series. PNG.

    The axis is logarithmic where the greatest x is 20 times the least or more. Series stand a little aside of each other, so that their
    intervals can be told apart.

    Args:
        series: name -> {x: (value, low, high)}; nan bounds draw no interval, a nan value leaves a gap.
        x, y: what the axes are.
        references: name -> value of a dotted line across.
    Raises:
        ValueError: no point, a point that is not three numbers with low <= high, or a number that is infinite.
    """
    points = {
        n: {float(k): _point(f"lines: {n!r} at {k}", p) for k, p in sorted(of.items())}
        for n, of in series.items()
    }
    xs = sorted({k for of in points.values() for k in of})
    if not xs or not all(map(math.isfinite, [*xs, *(references or {}).values()])):
        raise ValueError(
            f"lines: needs at least one point, and finite x and references, got x {xs[:8]}, references {references or {}}"
        )
    scale = math.log10 if xs[0] > 0 and xs[-1] >= 20 * xs[0] else float
    start, end = scale(xs[0]), scale(xs[-1])
    span = (end - start) or 1.0
    near = min((scale(b) - scale(a) for a, b in pairwise(xs)), default=span)
    aside = min(0.012 * span, 0.5 * near / len(points))
    columns = max(1, min(4, int(7.2 / (0.75 + 0.08 * max(map(len, points))))))
    figure, (axis,) = _grid(1, 1, width=7.2, height=3.9 + 0.2 * -(-len(points) // columns))
    handles = []
    for i, of in enumerate(points.values()):
        at = [scale(k) + (i - (len(points) - 1) / 2) * aside for k in of]
        style = _LINES[i % len(_LINES)] | {"ls": ("-", "--", "-.", ":")[i // len(_LINES) % 4]}
        handles += axis.plot(at, [p[0] for p in of.values()], **style, lw=1.6, ms=5, zorder=3)
        axis.vlines(
            at,
            [p[1] for p in of.values()],
            [p[2] for p in of.values()],
            color=style["color"],
            lw=1.4,
            alpha=0.6,
            zorder=2,
        )
    left, right = _limits(
        [*(v for of in points.values() for p in of.values() for v in p), *(references or {}).values()]
    )
    axis.set(xlim=(start - 0.05 * span, end + 0.05 * span), ylim=(left, right), xlabel=x, ylabel=y)
    axis.set_xticks(*zip(*((scale(k), f"{k:g}") for k in _apart(xs, scale, 0.035 * span)), strict=True))
    for (name, value), place in zip(*_spread(references or {}, 0.055 * (right - left), right), strict=True):
        axis.axhline(value, color=_INK, lw=1, ls=":", zorder=1)
        axis.text(
            1.01,
            place,
            f"{name}  {value:.3f}",
            transform=axis.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            parse_math=False,
        )
    axis.grid(axis="y", color=_GREY, lw=0.5)
    _legend(figure, handles, list(points), columns)
    return _png(figure)


def compare(rows: Sequence[tuple[str, str, float, float, float]], x: str) -> bytes:
    """Dots with 95 % intervals, those of a group under each other, in one colour per name, with their numbers. PNG.

    Args:
        rows: (group, name, value, low, high), as (mode, "in domain", 0.8, 0.7, 0.9); groups and names come in the order they are first
            met. nan bounds draw no interval, a nan value no dot.
        x: what the values are.
    Raises:
        ValueError: no rows, a group with one name twice, or a row whose value, low and high are not three finite numbers, low <= high.
    """
    points = {(g, n): _point(f"compare: {n!r} of {g!r}", tuple(p)) for g, n, *p in rows}
    if not rows or len(points) < len(rows):
        twice = [pair for i, pair in enumerate(r[:2] for r in rows) if pair in [r[:2] for r in rows[:i]]]
        raise ValueError(
            f"compare: needs rows, each group with each name once, got {len(rows)} rows, twice {twice[:4]}"
        )
    groups, names = (list(dict.fromkeys(pair[i] for pair in points)) for i in (0, 1))
    step = len(names) + 0.8
    columns = max(1, min(4, int(7.2 / (0.5 + 0.08 * max(map(len, names))))))
    figure, (axis,) = _grid(
        1, 1, width=8.2, height=0.9 + 0.2 * step * len(groups) + 0.2 * -(-len(names) // columns)
    )
    handles: dict[str, Any] = {}
    for (g, n), (value, low, high) in points.items():
        j, place = names.index(n), groups.index(g) * step + names.index(n)
        style = _LINES[j % len(_LINES)]
        axis.plot([low, high], [place, place], color=style["color"], lw=2, solid_capstyle="round")
        (handles[n],) = axis.plot([value], [place], **style, ls="", ms=6)
        said = _span(value, low, high) if value == value else "no value"
        axis.text(1.01, place, said, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    for i in range(1, len(groups)):
        axis.axhline(i * step - 0.9, color=_GREY, lw=0.6)
    axis.set(
        xlim=_limits([v for p in points.values() for v in p]), ylim=(len(groups) * step - 0.9, -0.9), xlabel=x
    )
    middles = [i * step + (len(names) - 1) / 2 for i in range(len(groups))]
    axis.set_yticks(middles, [_wrapped(g, 30, 2) for g in groups], parse_math=False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=_GREY, lw=0.5)
    _legend(figure, list(handles.values()), list(handles), columns)
    return _png(figure)


_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "f1_weighted": "weighted F1",
}
_BOX = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
_STYLES = [
    {"color": c, "ls": s}
    for c, s in zip((_BLUE, _ORANGE, _GREEN, _PURPLE, _INK), ("-", "--", "-.", ":", "-"), strict=True)
]
_LINES = [
    {"color": c, "marker": m}
    for c, m in zip((_BLUE, _ORANGE, _GREEN, _PURPLE, _AMBER, _SKY, _INK), "osD^vPX", strict=True)
]
_PARTS = re.compile(r"(train|val|valid|test)[_/]")


def _grid(n: int, columns: int, width: float, height: float) -> tuple[Any, list]:
    from matplotlib.figure import Figure

    rows = -(-n // columns)
    figure = Figure(figsize=(columns * width, rows * height), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[n:]:
        axis.remove()
    for axis in axes[:n]:
        axis.tick_params(labelsize=8, color=_GREY)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:n]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def _said(r: Result) -> str:
    if math.isnan(r.value):
        return "no value: one class only"
    positives = r.extra.get("positives")
    return _span(r.value, r.low, r.high) + (
        f"  {positives:,} of {r.n:,}" if positives is not None else f"  n = {r.n:,}"
    )


def _span(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low == low else "")


def _wrapped(name: str, width: int = 22, most: int | None = None) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, width, max_lines=most, placeholder="…")) or name


def _point(where: str, point: tuple[float, ...]) -> tuple[float, ...]:
    if len(point) != 3 or any(map(math.isinf, point)) or point[1] > point[2]:
        raise ValueError(f"{where}: must be (value, low, high), finite or nan, low <= high, got {point}")
    return point


def _colours(v: np.ndarray, low: float | None, high: float | None) -> tuple[float, float, str]:
    """Least and greatest value of the colours, and on which side of them there are values (more than rounding beyond)."""
    known = v[~np.isnan(v)] if not np.isnan(v).all() else np.array([0.0, 1.0])
    least, greatest = float(known.min()), float(known.max())
    aside = 0.0 if least < greatest else 0.5
    low, high = least - aside if low is None else low, greatest + aside if high is None else high
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"matrix: low must be below high, got {low:g} and {high:g}; the values lie in {least:g}..{greatest:g}"
        )
    slack = 1e-5 * (high - low)
    sides = least < low - slack, greatest > high + slack
    return (
        low,
        high,
        {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}[sides],
    )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis that shows these values."""
    known = [v for v in values if v == v] or [0.0, 1.0]
    margin = 0.08 * (max(known) - min(known)) or 0.1 * abs(known[0]) or 0.5
    return min(known) - margin, max(known) + margin


def _apart(xs: list[float], scale: Any, gap: float) -> list[float]:
    """Those of sorted numbers that are far enough from each other for labels; first and last are among them."""
    kept = xs[:1]
    for k in xs[1:-1]:
        if scale(k) - scale(kept[-1]) >= gap and scale(xs[-1]) - scale(k) >= gap:
            kept.append(k)
    return kept + xs[1:][-1:]


def _spread(
    named: Mapping[str, float], gap: float, top: float
) -> tuple[list[tuple[str, float]], list[float]]:
    """The named values in rising order, and where to write their names, at least a gap apart and below the top."""
    order = sorted(named.items(), key=lambda item: item[1])
    places = [value for _, value in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], top - gap * (len(places) - 1 - i))
    return order, places


def _readable(fill: Any) -> str:
    """Black or white, whichever stands out more: a contrast of 4.5 or more on any colour (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in fill[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def _legend(figure: Any, handles: list, names: list[str], columns: int) -> None:
    shown = figure.legend(
        handles, names, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False
    )
    for text in shown.get_texts():
        text.set_parse_math(False)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from e
    lines = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}, line {number}: must be a JSON object with a step ({e})") from e
        if not isinstance(lines[-1], dict) or not isinstance(lines[-1].get("step"), int):
            raise ValueError(
                f"{path}, line {number}: must be a JSON object with a whole-number step, found {line[:80]!r}"
            )
    return lines


def _panels(lines: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """{panel: {key: {step: value}}}; what is no number (a name, a flag) is no curve."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if (
                key not in ("step", *TIMING_KEYS)
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                panels.setdefault(_PARTS.sub("", key, count=1), {}).setdefault(key, {})[line["step"]] = value
    return panels
