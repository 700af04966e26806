"""What is drawn and written: curves are the metrics' own, reports hold every number, escaped and whole."""

import base64
import csv
import io
import json
import math
import re

import numpy as np
import pytest
from attrs import evolve
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from medvl.evaluation import metrics, plots, report
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


PNG = plots.intervals([_row()])


def _written(tmp_path, rows, **keys):
    path = report.write_report(tmp_path / "r", "Findings <script> & co", rows, **keys)
    return path.read_text(), (path.parent / "report.md").read_text(), path.parent


def _results():
    extra = {"positives": 40, "threshold": 0.25}
    rows = [
        _row("auroc", "A|B", 0.8, extra=extra),
        _row("auroc", "<i>C</i>", math.nan, extra={"positives": 0, "threshold": None}),
    ]
    rows += [
        _row("auroc", "mean", 0.8, extra={"findings": 1}),
        _row("f1", "A|B", 0.5),
        _row("recall_at_5", "", 0.333),
    ]
    return [evolve(r, experiment="ct-1a2b3c4d", commit="abc123", device="CPU <x>") for r in rows]


def test_report_holds_every_number_once_and_escaped(tmp_path):
    page, text, folder = _written(tmp_path, _results(), figures={"ROC <curves>": PNG}, notes=["a < b & *c*"])
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)][1:]
    assert cells[:3] == [
        ["A|B", "100", "40", "0.800", "0.700–0.850", "0.500", "0.250"],
        ["&lt;i&gt;C&lt;/i&gt;", "100", "0", "–", "–", "–", "–"],
        ["mean of 1 findings", "100", "–", "0.800", "0.700–0.850", "–", "–"],
    ]
    assert cells[4] == ["Recall at 5", "", "100", "0.333", "0.233–0.383"]
    assert "| A\\|B | 100 | 40 | 0.800 | 0.700–0.850 | 0.500 | 0.250 |" in text
    for facts in ("ct-1a2b3c4d", "abc123", "test", report.NOTICE):
        assert facts in page
        assert facts.replace("_", "\\_") in text
    for raw in ("<script>", "<i>", "<x>", "<curves>", "a < b"):
        assert raw not in page
        assert raw not in text
    assert "Findings &lt;script&gt; &amp; co" in text
    assert r"\*c\*" in text
    assert "http" not in page
    embedded = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", page)[1])
    assert embedded == PNG == (folder / "figures" / "roc-curves.png").read_bytes()
    assert "(figures/roc-curves.png)" in text


def test_results_table_is_the_results(tmp_path):
    rows = _results()
    *_, folder = _written(tmp_path, rows)
    with open(folder / "results.csv", newline="") as f:
        read = list(csv.DictReader(f))
    assert [(r["what"], r["subject"], r["value"]) for r in read] == [
        (r.what, r.subject, "" if math.isnan(r.value) else str(r.value)) for r in rows
    ]
    assert json.loads(read[0]["extra"]) == rows[0].extra
    assert read[0]["latency_ms"] == ""


def test_each_split_has_its_own_table(tmp_path):
    rows = _results()
    page, text, _ = _written(tmp_path, rows + [evolve(r, split="val") for r in rows])
    assert page.count("<table>") == 4
    assert text.count("- Split:") == 2


def test_benches_are_reported_with_their_cost(tmp_path):
    rows = [
        Result(
            what="bootstrap",
            subject="18 findings",
            value=1.0,
            latency_ms=512.25,
            peak_mib=30.5,
            shape="n=3039",
        )
    ]
    page, text, _ = _written(tmp_path, rows)
    assert "<td>n=3039</td><td>512.250</td><td>30.500</td>" in page
    assert "bootstrap intervals" not in text  # definitions only where there are findings


def test_report_refuses_what_it_cannot_show(tmp_path):
    rows = _results()
    with pytest.raises(ValueError, match="at least one result"):
        _written(tmp_path, [])
    with pytest.raises(ValueError, match=r"found twice: auroc of A\|B"):
        _written(tmp_path, [*rows, rows[0]])
    with pytest.raises(ValueError, match="must be PNG bytes"):
        _written(tmp_path, rows, figures={"a": b"GIF89a"})
    with pytest.raises(ValueError, match="different file names"):
        _written(tmp_path, rows, figures={"A b": PNG, "a-b": PNG})
    assert not (tmp_path / "r").exists()


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


def test_matrix_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match=r"values must be \[1, 2\] .*got \[2, 1\]"):
        plots.matrix([[1], [2]], "a", "bc")
    with pytest.raises(ValueError, match="1 infinite"):
        plots.matrix([[1, math.inf]], "a", "bc")
    with pytest.raises(ValueError, match=r"values must be \[0, 0\]"):
        plots.matrix(np.zeros((0, 0)), "", "")
    with pytest.raises(ValueError, match=r"low must be below high, got 2 and 1; the values lie in 0..1"):
        plots.matrix([[0, 1]], "a", "bc", low=2)


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


# Pivots and summaries -------------------------------------------------------------------------------------------------------------------
def _modes(n):
    """Accuracy of two modes on two tasks, one cell missing; n(mode, task) samples."""
    values = {("bare", "A"): 0.5, ("bare", "B"): 0.6, ("oracle", "B"): 0.8}
    rows = [
        (_row("accuracy", task, v, extra={"mode": mode}), n(mode, task)) for (mode, task), v in values.items()
    ]
    return [evolve(r, n=k) for r, k in rows] + [_row("recall_at_1", "A", extra={})]


def test_pivot_is_the_rows():
    columns, body = report.pivot(_modes(lambda *_: 1200), down="mode", across="subject", what="accuracy")
    assert columns == ("Mode", "n", "A", "B")
    assert body[0] == ["bare", 1200, "0.500 [0.400, 0.550]", "0.600 [0.500, 0.650]"]
    assert body[1][:2] == ["oracle", 1200]
    assert math.isnan(body[1][2])
    assert body[1][3] == "0.800 [0.700, 0.850]"
    turned = report.pivot(
        _modes(lambda *_: 1200), down=lambda r: f"task {r.subject}", across="mode", what="accuracy"
    )
    assert turned[0] == ("", "n", "bare", "oracle")
    assert [line[0] for line in turned[1]] == ["task A", "task B"]
    assert [line[3] for line in turned[1]][1] == body[1][3]


def test_pivot_says_n_where_it_is_the_same():
    said = lambda n: report.pivot(_modes(n), down="mode", across="subject", what="accuracy", corner="How")
    assert said(lambda mode, _: {"bare": 7, "oracle": 8}[mode])[1][1][:2] == ["oracle", 8]
    columns, body = said(lambda _, task: {"A": 7, "B": 1800}[task])
    assert columns == ("How", "A (n = 7)", "B (n = 1,800)")
    assert body[0] == ["bare", "0.500 [0.400, 0.550]", "0.600 [0.500, 0.650]"]
    columns, body = said(lambda mode, task: len(mode + task) if task == "A" else len(mode))
    assert columns == ("How", "A", "B")
    assert body[0][1:] == ["0.500 [0.400, 0.550] (n = 5)", "0.600 [0.500, 0.650] (n = 4)"]
    assert math.isnan(body[1][1])
    assert said(lambda *_: 0)[0] == ("How", "A", "B")


def test_pivot_of_numbers_without_interval():
    rows = [
        Result(what=w, subject=s, value=v)
        for w, s, v in (("f1", "a", 0.25), ("f1", "b", math.nan), ("loss", "a", 2.0))
    ]
    columns, body = report.pivot(rows, down="subject", across="what")
    assert columns == ("Subject", "f1", "loss")
    assert body[0] == ["a", 0.25, 2.0]
    assert all(map(math.isnan, body[1][1:]))


def test_pivot_refuses_what_is_no_table():
    rows = _modes(lambda *_: 5)
    with pytest.raises(ValueError, match=r"needs rows of 'f1', found \['accuracy', 'recall_at_1'\]"):
        report.pivot(rows, down="mode", across="subject", what="f1")
    with pytest.raises(
        ValueError, match=r"each row must have 'mode', .* but recall_at_1 of A in test has extra \[\]"
    ):
        report.pivot(rows, down="mode", across="subject")
    with pytest.raises(
        ValueError, match=r"found two for \('bare', 'test'\): accuracy of A in test and accuracy of B in test"
    ):
        report.pivot(rows, down="mode", across="split", what="accuracy")


EVIL = (
    "Modes & <b>tasks</b> *x*",
    ("Mode", "a|b <i>"),
    [["<script>", "[x](http://y) \n `c` a_b _d_"], ["z|w", 0.5]],
)


@pytest.mark.parametrize("what", ["auroc", "accuracy"])
def test_what_a_finding_is_called_stays_text_in_markdown(tmp_path, what):
    """Findings and tasks are the heads of a user's tables."""
    rows = [_row(what, "[x](http://y) `c` *d*\n| e |", 0.8, extra={"positives": 4})]
    report.write_report(tmp_path, "t", rows)
    text = (tmp_path / "report.md").read_text()
    (line,) = [line for line in text.splitlines() if "http" in line]
    assert r"[x\](http://y) \`c\` \*d\* \| e \|" in line


def test_report_shows_tables_first_and_escaped(tmp_path):
    plain = _written(tmp_path / "plain", _results(), notes=["Said."])
    table = (
        "In and out of domain",
        *report.pivot(_modes(lambda *_: 100), down="mode", across="subject", what="accuracy"),
    )
    page, text, folder = _written(
        tmp_path, _results(), figures={"ROC": PNG}, notes=["Said."], tables=[EVIL, table]
    )
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Modes &amp; &lt;b&gt;tasks&lt;/b&gt; *x*",
        "In and out of domain",
        "All results",
    ]
    assert re.findall(r"^## (.*)$", text, re.M) == [
        "Modes &amp; &lt;b&gt;tasks&lt;/b&gt; \\*x\\*",
        "In and out of domain",
        "All results",
    ]
    assert (
        "| bare | 100 | 0.500 [0.400, 0.550] | 0.600 [0.500, 0.650] |\n| oracle | 100 | – | 0.800 [0.700, 0.850] |"
        in text
    )
    assert "<tr><td>oracle</td><td>100</td><td>–</td><td>0.800 [0.700, 0.850]</td></tr>" in page
    assert "| &lt;script&gt; | [x\\](http://y) \\`c\\` a_b \\_d\\_ |\n| z\\|w | 0.500 |" in text
    assert "| Mode | a\\|b &lt;i&gt; |" in text
    assert "<th>a|b &lt;i&gt;</th>" in page
    for raw in ("<script>", "<b>", "<i>"):
        assert raw not in page
        assert raw not in text
    assert page.count('<div class="wide') == 5  # every table and figure scrolls
    generic = lambda whole: whole[whole.index("<dl>") : whole.rindex("</div>")]
    assert generic(plain[0]) in page  # what was there before is as it was
    assert plain[1][plain[1].index("- Experiment") :] in text
    assert "<h2>" not in plain[0]
    assert not (folder / "summary.md").exists()


def test_summary_is_the_short_page(tmp_path):
    short = [("Short", ("a", "b"), [["x", 1]])]
    *_, folder = _written(
        tmp_path, _results(), figures={"ROC": PNG}, notes=["Said <so>."], tables=short, summary=True
    )
    wanted = [f"**{report.NOTICE}**", "## Short", "| a | b |\n|---|--:|\n| x | 1 |", "Said &lt;so&gt;."]
    assert (folder / "summary.md").read_text().split("\n\n", 1)[1] == "\n\n".join(wanted) + "\n"
    assert (folder / "summary.md").read_text().startswith("# Findings &lt;script&gt; &amp; co\n")
    assert "recall" in (folder / "report.md").read_text().lower()


def test_report_refuses_tables_it_cannot_show(tmp_path):
    for tables, found in (
        ([("a", ("x", "y"), [[1, 2], [1]])], r"got 'a' with 2 columns, lines of \[1\]"),
        ([(" ", ("x",), [])], "must have a caption"),
        ([], "a summary needs tables"),
    ):
        with pytest.raises(ValueError, match=found):
            _written(tmp_path, _results(), tables=tables, summary=True)
    assert not (tmp_path / "r").exists()
