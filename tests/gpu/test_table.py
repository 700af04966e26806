"""benches/gpu/table.py: which experiments it has, and what a row says."""

from benches.gpu import table
from medvl.training import trace
from medvl.training.estimate import Step


def test_the_page_has_a_row_for_every_experiment_of_a_gpu():
    names = table.experiment_names()
    assert {"ctclip_vitb", "tune_qwen25vl_7b_qlora", "slide_vqa_qwen3_4b", "adapters_internvl3_2b"} <= set(
        names
    )
    page = table.PAGE.read_text(encoding="utf-8")
    rows = page.split(table.MARKS[0])[1].split(table.MARKS[1])[0]
    assert [name for name in names if f"| `{name}` |" not in rows] == []
    assert "Estimated, not measured" in rows


def test_a_row_is_of_the_seconds_of_a_step():
    kernel = trace.Kernel("mm", "bfloat16", int(trace.GPUS["h100"].bfloat16 * 0.6), 0)
    work = trace.Work({kernel: 2.0})
    cfg, _ = table.resolve("ctclip_vitb")
    step = Step(memory={"a": 3 * 10**9, "b": 10**9}, work=work, samples=13)
    row = table.row_of(cfg, "x", "s", step, table.CT_RATE[0], "h100")
    # 13 volumes of 160 slices in 2 s are 10 of 104 slices in a second.
    assert row[:5] == ("`x`", "s", "4.0", "2", "10 volumes")
    assert row[-3:] == ("0.67", "0.084", "0.01")
    cfg, _ = table.resolve("tune_qwen3_4b_full")
    step = Step(memory={"a": 10**9}, work=work, samples=4, tokens=4096.0)
    row = table.row_of(cfg, "x", "s", step, table.MILLION, "h100")
    assert row[4] == "2,048 tokens"
    assert row[-3] == "139"
