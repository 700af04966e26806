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
from PIL import Image

from medvl import metrics, plots, report
from medvl.results import Result


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
        for shown, true in zip(front.get_data(), metrics.roc_curve(scores[:, j], labels[:, j])[:2], strict=True):
            np.testing.assert_array_equal(shown, true)
        assert axis.texts[0].get_text() == f"AUROC {metrics.auroc(scores, labels)[j]:.3f}\n{labels[:, j].sum()} of 60"


def test_roc_says_where_there_is_no_curve(drawn):
    scores, labels = _scores()
    labels[:, 2] = 0
    figure = plots.roc(scores, labels, "ABC")
    assert "one class only\n0 of 60" in _texts(figure)
    with pytest.raises(ValueError, match="column 'A', row 0"):
        plots.roc(scores * math.nan, labels, "ABC")


def _row(what="auroc", subject="A", value=0.8, **other):
    return Result(what=what, subject=subject, value=value, low=value - 0.1, high=value + 0.05, n=100, split="test", **other)


def test_intervals_are_the_rows(drawn):
    rows = [_row(), _row(subject="mean", value=0.7), _row(subject="B", value=math.nan), _row(subject="C", value=0.9), _row("f1", "A", 0.1)]
    (axis,) = plots.intervals(rows).axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["C", "A", "B", "mean"]
    assert axis.lines[2].get_xdata() == pytest.approx([0.7, 0.85])
    assert [t.get_text() for t in axis.texts][1:3] == ["0.800 [0.700, 0.850]  n = 100", "no value: one class only"]
    with pytest.raises(ValueError, match="each subject once"):
        plots.intervals([*rows, _row()])
    with pytest.raises(ValueError, match="needs rows of 'auprc'"):
        plots.intervals(rows, "auprc")


def _jsonl(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_are_the_log(drawn, tmp_path):
    lines = [{"step": i, "loss": 1 / i, "lr": 0.1, "stage": "a", "done": True} for i in (1, 2, 3)]
    path = _jsonl(tmp_path / "metrics.jsonl", *lines, {"step": 2, "loss": 9.0}, {"step": 3, "val_loss": 0.5, "val_auroc": 0.7})
    figure = plots.curves(path)
    shown = {line.get_label(): [list(map(float, d)) for d in line.get_data()] for a in figure.axes for line in a.lines}
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
    rows = [_row("auroc", "A|B", 0.8, extra=extra), _row("auroc", "<i>C</i>", math.nan, extra={"positives": 0, "threshold": None})]
    rows += [_row("auroc", "mean", 0.8, extra={"findings": 1}), _row("f1", "A|B", 0.5), _row("recall_at_5", "", 0.333)]
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
    rows = [Result(what="bootstrap", subject="18 findings", value=1.0, latency_ms=512.25, peak_mib=30.5, shape="n=3039")]
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
