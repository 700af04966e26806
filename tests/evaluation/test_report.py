"""What is written: reports hold every number, escaped and whole."""

import base64
import csv
import json
import math
import re

import pytest
from attrs import evolve

from medvl.evaluation import plots, report
from medvl.evaluation.results import Result


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


# Pivots and summaries -------------------------------------------------------------------------------------------------------------------
def _modes(n):
    """Accuracy of two modes on two tasks, one cell missing; n(mode, task) samples."""
    values = {("bare", "A"): 0.5, ("bare", "B"): 0.6, ("oracle", "B"): 0.8}
    rows = [
        (_row("accuracy", task, v, extra={"mode": mode}), n(mode, task)) for (mode, task), v in values.items()
    ]
    return [evolve(r, n=k) for r, k in rows] + [_row("recall_at_1", "A", extra={})]


def test_pivot_is_the_rows():
    columns, body = report.pivot(_modes(lambda *_: 1200), down="mode", across="subject", metric="accuracy")
    assert columns == ("Mode", "n", "A", "B")
    assert body[0] == ["bare", 1200, "0.500 [0.400, 0.550]", "0.600 [0.500, 0.650]"]
    assert body[1][:2] == ["oracle", 1200]
    assert math.isnan(body[1][2])
    assert body[1][3] == "0.800 [0.700, 0.850]"
    turned = report.pivot(
        _modes(lambda *_: 1200), down=lambda r: f"task {r.subject}", across="mode", metric="accuracy"
    )
    assert turned[0] == ("", "n", "bare", "oracle")
    assert [line[0] for line in turned[1]] == ["task A", "task B"]
    assert [line[3] for line in turned[1]][1] == body[1][3]


def test_pivot_says_n_where_it_is_the_same():
    said = lambda n: report.pivot(_modes(n), down="mode", across="subject", metric="accuracy", corner="How")
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
        report.pivot(rows, down="mode", across="subject", metric="f1")
    with pytest.raises(
        ValueError, match=r"each row must have 'mode', .* but recall_at_1 of A in test has extra \[\]"
    ):
        report.pivot(rows, down="mode", across="subject")
    with pytest.raises(
        ValueError, match=r"found two for \('bare', 'test'\): accuracy of A in test and accuracy of B in test"
    ):
        report.pivot(rows, down="mode", across="split", metric="accuracy")


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
        *report.pivot(_modes(lambda *_: 100), down="mode", across="subject", metric="accuracy"),
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
