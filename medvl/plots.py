"""Figures as PNG bytes: ROC curves, intervals, training curves. No window, no global state; matplotlib is imported when one is drawn."""

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvl import files, metrics
from medvl.results import Result

_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito: told apart by the colour-blind and in grey
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
        axis.text(0.97, 0.05, f"{said}\n{y[:, j].sum():,} of {len(y):,}", ha="right", va="bottom", fontsize=8.5, bbox=_BOX, zorder=4)
        axis.set_title(_wrapped(findings[j]), fontsize=9)
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
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
        raise ValueError(f"intervals: needs rows of {what!r} with each subject once, got {len(chosen)} rows of {found}")
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
        xlim=(left - margin, right + margin), ylim=(len(chosen) - 0.5, -0.5), xlabel=f"{_TITLES.get(what, what)}, 95 % interval by patient"
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
    figure, axes = _grid(len(panels), 2 if len(panels) in (2, 4) else min(3, len(panels)), width=3.6, height=2.5)
    for axis, (name, series) in zip(axes, panels.items(), strict=True):
        for i, (key, points) in enumerate(series.items()):
            few = "o" if len(points) < 40 else ""
            axis.plot(*zip(*sorted(points.items()), strict=True), **_STYLES[i % len(_STYLES)], lw=1.5, marker=few, ms=3, label=key)
        axis.set_title(name if len(series) > 1 else next(iter(series)), fontsize=10)
        axis.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        axis.grid(color=_GREY, lw=0.5)
        if len(series) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=9)
    return _png(figure)


_TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "f1": "F1", "balanced_accuracy": "balanced accuracy", "f1_weighted": "weighted F1"}
_BOX = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
_STYLES = [{"color": c, "ls": s} for c, s in zip((_BLUE, _ORANGE, _GREEN, _PURPLE, _INK), ("-", "--", "-.", ":", "-"), strict=True)]
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
    return f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" + (f"  {positives:,} of {r.n:,}" if positives is not None else f"  n = {r.n:,}")


def _wrapped(name: str, width: int = 22) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, width)) or name


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from e
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: must be a JSON object with a step ({e})") from e
        if not isinstance(lines[-1], dict) or not isinstance(lines[-1].get("step"), int):
            raise ValueError(f"{path}, line {number}: must be a JSON object with a whole-number step, found {line[:80]!r}")
    return lines


def _panels(lines: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """{panel: {key: {step: value}}}; what is no number (a name, a flag) is no curve."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                panels.setdefault(_PARTS.sub("", key, count=1), {}).setdefault(key, {})[line["step"]] = value
    return panels
