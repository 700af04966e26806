"""What is drawn: curves are the metrics' own, labels do not overlap, and what is no figure is refused."""

import io
import json
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn.calibration import calibration_curve

from medvl.evaluation import metrics, plots
from medvl.evaluation.results import Result


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of PNGs."""
    monkeypatch.setattr(plots, "_png", lambda figure: figure)


def _scores(n=60, c=3):
    rng = np.random.default_rng(0)
    labels = (rng.random((n, c)) < 0.4).astype(int)
    return rng.normal(size=(n, c)) + labels * [0, 1, 2], labels


def _texts(figure):
    return " | ".join(t.get_text() for a in figure.axes for t in [a.title, *a.texts])


def test_roc_panels_are_the_curves(drawn):
    scores, labels = _scores()
    figure = plots.roc(scores, labels, ["Worst", "Middling", "Best <b>"])
    assert [a.get_title() for a in figure.axes] == ["Best <b>", "Middling", "Worst"]  # best first
    for axis, j in zip(figure.axes, (2, 1, 0), strict=True):
        front = max(axis.lines, key=lambda line: line.get_zorder())
        for shown, true in zip(
            front.get_data(), metrics.roc_curve(scores[:, j], labels[:, j])[:2], strict=True
        ):
            np.testing.assert_array_equal(shown, true)
        assert (
            axis.texts[0].get_text()
            == f"AUROC {metrics.auroc(scores, labels)[j]:.3f}\n{labels[:, j].sum()} of 60"
        )


def test_roc_says_where_there_is_no_curve(drawn):
    scores, labels = _scores()
    labels[:, 2] = 0
    figure = plots.roc(scores, labels, "ABC")
    assert "one class only\n0 of 60" in _texts(figure)
    with pytest.raises(ValueError, match="column 'A', row 0"):
        plots.roc(scores * math.nan, labels, "ABC")


def test_reliability_is_scikit_learn_s_curve_of_each_finding(drawn):
    scores, labels = _scores()
    before, after = 1 / (1 + np.exp(-scores)), np.full(scores.shape, 0.4)
    labels[:, 2] = 0
    figure = plots.reliability({"before": before, "after": after}, labels, "ABC")
    assert [a.get_title() for a in figure.axes] == ["A", "B", "C"]
    for j, axis in enumerate(figure.axes):
        shares, means = calibration_curve(labels[:, j], before[:, j], n_bins=10)
        np.testing.assert_array_equal(axis.lines[1].get_data(), (means, shares))
        assert [float(x[0]) for x in axis.lines[2].get_data()] == pytest.approx([0.4, labels[:, j].mean()])


def _row(what="auroc", subject="A", value=0.8, **other):
    return Result(
        what=what,
        subject=subject,
        value=value,
        low=value - 0.1,
        high=value + 0.05,
        n=100,
        split="test",
        **other,
    )


def test_intervals_are_the_rows(drawn):
    rows = [
        _row(),
        _row(subject="mean", value=0.7),
        _row(subject="B", value=math.nan),
        _row(subject="C", value=0.9),
        _row("f1", "A", 0.1),
    ]
    (axis,) = plots.intervals(rows).axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["C", "A", "B", "mean"]
    assert axis.lines[2].get_xdata() == pytest.approx([0.7, 0.85])
    assert [t.get_text() for t in axis.texts][1:3] == [
        "0.800 [0.700, 0.850]  n = 100",
        "no value: one class only",
    ]
    with pytest.raises(ValueError, match="each subject once"):
        plots.intervals([*rows, _row()])
    with pytest.raises(ValueError, match="needs rows of 'auprc'"):
        plots.intervals(rows, "auprc")


def _jsonl(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_are_the_log(drawn, tmp_path):
    lines = [{"step": i, "loss": 1 / i, "lr": 0.1, "stage": "a", "done": True} for i in (1, 2, 3)]
    path = _jsonl(
        tmp_path / "metrics.jsonl",
        *lines,
        {"step": 2, "loss": 9.0},
        {"step": 3, "val_loss": 0.5, "val_auroc": 0.7},
    )
    figure = plots.curves(path)
    shown = {
        line.get_label(): [list(map(float, d)) for d in line.get_data()]
        for a in figure.axes
        for line in a.lines
    }
    assert shown == {
        "loss": [[1, 2, 3], [1, 9, 1 / 3]],  # the later line of step 2
        "val_loss": [[3], [0.5]],
        "lr": [[1, 2, 3], [0.1] * 3],
        "val_auroc": [[3], [0.7]],
    }
    assert [a.get_title() for a in figure.axes] == ["loss", "lr", "val_auroc"]


def test_curves_refuse_what_is_no_log(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        plots.curves(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="line 2: must be a JSON object with a whole-number step, found"):
        plots.curves(_jsonl(tmp_path / "a.jsonl", {"step": 1, "loss": 1}, {"loss": 2}))
    (tmp_path / "b.jsonl").write_text('{"step": 1}\n{"step')
    with pytest.raises(ValueError, match="line 2"):
        plots.curves(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="no line with numbers"):
        plots.curves(_jsonl(tmp_path / "c.jsonl", {"step": 1}))


def test_figures_are_png_and_the_same_each_time():
    scores, labels = _scores(c=1)
    first, second = (plots.roc(scores, labels[:, :1], ["A"]) for scores in (scores[:, :1],) * 2)
    assert first == second
    image = Image.open(io.BytesIO(first))
    assert image.format == "PNG"
    assert len(image.convert("L").getcolors()) > 20


# Matrices, lines, comparisons -----------------------------------------------------------------------------------------------------------
LONG = [f"adapter_{i:02d}_{'abcdefghij'[: i % 10 + 1]}" for i in range(14)]


def _contrast(a, b):
    """Of two colours, WCAG 2.1."""
    light = []
    for color in (a, b):
        c = np.array(to_rgb(color))
        light.append(
            np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722] + 0.05
        )
    return max(light) / min(light)


def _rendered(figure):
    """The renderer of a figure that was drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def _matrix(figure):
    """Axis, mesh, cell texts by (row, column), and the renderer."""
    axis, renderer = figure.axes[0], _rendered(figure)
    return (
        axis,
        axis.collections[0],
        {(int(t.get_position()[1]), int(t.get_position()[0])): t for t in axis.texts},
        renderer,
    )


def test_matrix_holds_the_values(drawn):
    values = np.linspace(-1, 1, 14 * 9).reshape(9, 14)
    values[2, 3] = math.nan
    figure = plots.matrix(
        values, [f"task {i}" for i in range(9)], LONG, x="adapter", y="task", label="share", low=-1, high=1
    )
    axis, mesh, texts, _ = _matrix(figure)
    assert {at: t.get_text() for at, t in texts.items()} == {
        (i, j): "–" if (i, j) == (2, 3) else f"{v + 0.0:.2f}".replace("-0.00", "0.00")
        for (i, j), v in np.ndenumerate(values)
    }
    colors = mesh.get_facecolors().reshape(9, 14, 4)
    for at, text in texts.items():
        assert _contrast(text.get_color(), to_rgb(plots._GREY) if at == (2, 3) else colors[at][:3]) >= 4.5
    assert colors[2, 3][3] == 0  # the grey behind is seen
    assert to_rgb(axis.patch.get_facecolor()) == to_rgb(plots._GREY)
    assert (
        colors[0, 0] @ [1, 1, 1, 0] > colors[4, 5] @ [1, 1, 1, 0] > colors[8, 13] @ [1, 1, 1, 0]
    )  # light to dark
    assert [t.get_text() for t in axis.get_xticklabels()] == LONG
    assert [t.get_text() for t in axis.get_yticklabels()] == [f"task {i}" for i in range(9)]
    assert axis.get_ylim() == (9, 0)  # the first row is on top
    assert (axis.get_xlabel(), axis.get_ylabel(), figure.axes[1].get_ylabel()) == ("adapter", "task", "share")


def test_matrix_limits(drawn):
    _, mesh, *_ = _matrix(plots.matrix([[0.2, 0.6]], "a", "bc"))
    assert mesh.get_clim() == (0.2, 0.6)
    for values, low, high, wanted in (
        ([[1, 1]], None, None, (0.5, 1.5)),
        ([[math.nan] * 2], None, None, (0, 1)),
        ([[5, -5]], 0, 1, (0, 1)),
    ):
        assert _matrix(plots.matrix(values, "a", "bc", low=low, high=high))[1].get_clim() == wanted
    assert (
        _matrix(plots.matrix([[-0.001, 1234.5]], "a", "bc", digits=1))[2][0, 0].get_text() == "0.0"
    )  # not -0.0
    extend = [
        plots.matrix([[a, b]], "a", "bc", low=0, high=1).axes[0].collections[0].colorbar.extend
        for a, b in ((0, 1 + 1e-9), (-1, 0.5))
    ]
    assert extend == ["neither", "min"]


def _overlaps(texts, renderer):
    """Pairs of upright texts, or of texts turned alike, that cover one another."""
    angle = texts[0].get_rotation()
    if angle in (0, 90):
        boxes = [t.get_window_extent(renderer) for t in texts]
        hit = lambda i, j: boxes[i].overlaps(boxes[j])
    else:  # baselines must be as far from each other as the letters are high
        at = [
            t.get_transform().transform(t.get_position())
            @ [math.sin(math.radians(angle)), -math.cos(math.radians(angle))]
            for t in texts
        ]
        high = [t.get_fontsize() / 72 * t.figure.dpi * 1.2 * (t.get_text().count("\n") + 1) for t in texts]
        hit = lambda i, j: abs(at[i] - at[j]) < max(high[i], high[j])
    return [
        (texts[i].get_text(), texts[j].get_text()) for i in range(len(texts)) for j in range(i) if hit(i, j)
    ]


@pytest.mark.parametrize(("n", "m"), [(14, 14), (20, 20), (3, 21), (25, 60), (200, 5), (1, 1)])
def test_labels_of_a_matrix_do_not_overlap(drawn, n, m):
    values = np.random.default_rng(0).normal(size=(n, m))
    figure = plots.matrix(
        values,
        [f"a_name_of_some_length {i}" for i in range(n)],
        [f"another_name_{i} of two lines" for i in range(m)],
    )
    axis, _, texts, renderer = _matrix(figure)
    assert len(texts) == (n * m if n <= 20 and m <= 20 else 0)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels(), list(texts.values())):
        assert not labels or not _overlaps(labels, renderer)
    inside = axis.get_tightbbox(renderer).extents
    assert min(inside) > -1
    assert max(figure.get_size_inches()) < 26


def test_names_are_no_formulas():
    assert plots.matrix([[1.0]], ["$a$"], ["$\\frac$"])
    assert plots.lines({"_$\\a$": {1: (1, 1, 1)}}, "k", "recall", references={"$\\b$": 0.5})
    assert plots.compare([("$\\a$", "$\\b$", 0.5, 0.4, 0.6)], "accuracy")
    assert plots.picture_grid([("$\\frac$", [np.zeros((2, 2), np.uint8)])], ["drawn"])


def test_matrix_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match=r"values must be \[1, 2\] .*got \[2, 1\]"):
        plots.matrix([[1], [2]], "a", "bc")
    with pytest.raises(ValueError, match="1 infinite"):
        plots.matrix([[1, math.inf]], "a", "bc")
    with pytest.raises(ValueError, match=r"values must be \[0, 0\]"):
        plots.matrix(np.zeros((0, 0)), "", "")
    with pytest.raises(ValueError, match=r"low must be below high, got 2 and 1; the values lie in 0..1"):
        plots.matrix([[0, 1]], "a", "bc", low=2)


def test_a_grid_shows_pictures_beside_their_names(drawn):
    grey, colour = np.full((4, 6), 7, np.uint8), np.zeros((5, 5, 3), np.uint8)
    figure = plots.picture_grid([("first $a", [grey, None]), ("second", [colour, grey])], ["input", "drawn"])
    shown = [[image.get_array() for image in axis.images] for axis in figure.axes]
    assert [len(images) for images in shown] == [1, 0, 1, 1]
    np.testing.assert_array_equal(shown[0][0], grey)
    np.testing.assert_array_equal(shown[2][0], colour)
    assert [axis.get_title() for axis in figure.axes] == ["input", "drawn", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes] == ["first $a", "", "second", ""]


def test_lines_are_the_points(drawn):
    series = {
        "mixture": {8: (0.7, 0.6, 0.75), 1: (0.5, 0.45, 0.6), 2: (math.nan,) * 3},
        "fusion": {1: (0.4, math.nan, math.nan)},
    }
    figure = plots.lines(series, "k", "accuracy", references={"oracle": 0.9, "bare": 0.899})
    (axis,) = figure.axes
    mixture, fusion = axis.lines[:2]
    np.testing.assert_allclose(mixture.get_xdata(), [1, 2, 8], atol=0.1)
    np.testing.assert_array_equal(mixture.get_ydata(), [0.5, math.nan, 0.7])
    np.testing.assert_array_equal(
        [s[:, 1] for s in axis.collections[0].get_segments() if len(s)], [[0.45, 0.6], [0.6, 0.75]]
    )
    assert fusion.get_xdata()[0] > mixture.get_xdata()[0]  # beside, not upon each other
    assert [line.get_ydata()[0] for line in axis.lines[2:]] == [0.899, 0.9]
    renderer = _rendered(figure)
    assert [t.get_text() for t in axis.texts] == ["bare  0.899", "oracle  0.900"]
    assert not _overlaps(axis.texts, renderer)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["mixture", "fusion"]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "2", "8"]
    assert axis.get_ylim()[1] > 0.9 > 0.4 > axis.get_ylim()[0]


def test_lines_over_wide_ranges_are_logarithmic(drawn):
    ks = [1, 2, 3, 5, 10, 20, 50, 51, 100]
    figure = plots.lines({n: {k: (k / 100,) * 3 for k in ks} for n in LONG}, "k", "recall@k")
    (axis,) = figure.axes
    renderer = _rendered(figure)
    at = dict(zip([t.get_text() for t in axis.get_xticklabels()], axis.get_xticks(), strict=True))
    assert at["10"] - at["1"] == pytest.approx(at["100"] - at["10"])
    assert "51" not in at  # no room beside 50
    assert not _overlaps(axis.get_xticklabels(), renderer)
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 14
    texts = figure.legends[0].get_texts()
    assert not _overlaps(texts, renderer)
    assert all(
        0 <= v <= w
        for t in texts
        for v, w in zip(t.get_window_extent(renderer).extents, 2 * list(figure.bbox.size), strict=True)
    )
    (only,) = plots.lines({"a": {k: (1, 1, 1) for k in (0, 100)}}, "k", "recall").axes[0].lines
    assert list(only.get_xdata()) == [0, 100]  # nothing to take a logarithm of, and alone in the middle


def test_lines_refuse_what_is_no_point():
    with pytest.raises(ValueError, match="needs at least one point"):
        plots.lines({"a": {}}, "k", "recall")
    with pytest.raises(ValueError, match="finite x and references"):
        plots.lines({"a": {1: (1, 1, 1)}}, "k", "recall", references={"b": math.nan})
    for point in ((1, 2), (1, 2, 1), (1, 0, math.inf)):
        with pytest.raises(ValueError, match=r"'a' at 5: must be \(value, low, high\)"):
            plots.lines({"a": {5: point}}, "k", "recall")


def test_compare_is_the_rows(drawn):
    rows = [(m, d, 0.5 + 0.1 * i, 0.4, 0.8) for i, m in enumerate(("bare", "mixture")) for d in ("in", "out")]
    figure = plots.compare(
        [*rows, ("oracle", "in", math.nan, math.nan, math.nan), ("x", "out", 0.3, math.nan, math.nan)],
        "accuracy",
    )
    (axis,) = figure.axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["bare", "mixture", "oracle", "x"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["in", "out"]
    assert [t.get_text() for t in axis.texts] == [
        f"{v} [0.400, 0.800]" for v in ("0.500", "0.500", "0.600", "0.600")
    ] + [
        "no value",
        "0.300",
    ]
    dots, spans = axis.lines[1:8:2], axis.lines[0:8:2]
    assert [d.get_xdata()[0] for d in dots] == [r[2] for r in rows]
    assert [list(s.get_xdata()) for s in spans] == [[0.4, 0.8]] * 4
    assert (
        [d.get_ydata()[0] for d in dots]
        == [s.get_ydata()[0] for s in spans]
        == [t.get_position()[1] for t in axis.texts[:4]]
    )
    assert dots[0].get_color() == dots[2].get_color() != dots[1].get_color() == dots[3].get_color()


def test_labels_of_a_comparison_do_not_overlap(drawn):
    rows = [
        (f"{n} with a name of two lines", d, 0.5, 0.4, 0.6)
        for n in LONG
        for d in ("in domain", "out of domain")
    ]
    figure = plots.compare(rows, "accuracy")
    (axis,) = figure.axes
    renderer = _rendered(figure)
    for texts in (axis.get_yticklabels(), axis.texts):
        assert not _overlaps(texts, renderer)


def test_compare_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="needs rows"):
        plots.compare([], "accuracy")
    with pytest.raises(ValueError, match=r"got 2 rows, twice \[\('a', 'b'\)\]"):
        plots.compare([("a", "b", 1, 1, 1)] * 2, "accuracy")
    with pytest.raises(ValueError, match=r"'b' of 'a': must be \(value, low, high\)"):
        plots.compare([("a", "b", 1, 1, 0)], "accuracy")
