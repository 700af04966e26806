"""The report of a pipeline: figures of its files in one JSON, and two texts that have no other number."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from medvl.evaluation import results
from medvl.evaluation.report import NOTICE

POST = "\n## Post\n"  # the heading of the short text
_FEW = 5  # documents; their intervals decide nothing
# A number that is not a part of a word, such as that of "int4" or "p50".
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)(?!\.\d)")
Figures = Mapping[str, Any]


# From files to figures --------------------------------------------------------------------------------------
def build_report(files: Figures, run_id: str) -> dict[str, Any]:
    """FINAL_REPORT.json, from {file: what it holds} of all phases."""
    report = {part: take_figures(part, files[file]) for part, (file, _) in PARTS.items()}
    about = {"schema_version": 1, "run_id": run_id, "notice": NOTICE, "interval_percent": 95}
    return {**about, **report, "findings": findings(report)}


def take_figures(part: str, content: Figures) -> Any:
    """What a part of the report takes of its file. Floats have four digits, so that a text can say exactly the same."""
    _, take = PARTS[part]
    return _rounded(take(content))


def findings(report: Figures) -> list[str]:
    """What follows from the intervals of the report, a sentence each."""
    metric = report["evaluation"]["metric"]
    sentences = []
    for name, row in report["evaluation"]["lora_minus"].items():
        verdict = "no difference is shown"
        if row["n"] <= _FEW or row["low"] is None:
            verdict = "too few to decide"
        elif row["low"] > 0 or row["high"] < 0:
            verdict = "lora is better" if row["low"] > 0 else "lora is worse"
        sentences.append(f"{metric} of lora minus {name}: {_interval(row)}, n = {row['n']}: {verdict}")
    left_out = report["evaluation"]["left_out"].items()
    return sentences + [f"{name} is left out: {reason}" for name, reason in left_out]


def _costs(content: Figures) -> dict[str, Any]:
    """What a variant costs, of its bench; seconds are medians."""
    answers = content["samples"]
    return {
        "variant": content["variant"],
        "n": len(answers),
        "new_tokens": content["new_tokens"],
        "disk_bytes": sum(sum(sizes.values()) for sizes in content["disk_bytes"].values()),
        **{f"peak_{kind}_bytes": size for kind, size in content["memory"]["peak"].items()},
        **{f"load_{key}": seconds for key, seconds in content["load"].items()},
        **{f"{key}_s": content[key]["p50"] for key in ("first_token", "per_token", "latency")},
        "tokens_per_s": sum(a["tokens_out"] for a in answers) / sum(a["latency_s"] for a in answers),
    }


def _scores(content: Figures) -> dict[str, Any]:
    """Of each variant the metric that they are compared by, and hallucinated values where they are counted."""
    shown = ((content["metric"], "all"), ("hallucinated_value_rate", ""))
    variants = {}
    for name, rows in content["variants"].items():
        variants[name] = [row for row in rows if (row["what"], row["subject"]) in shown]
    return {**content, "variants": variants}


# {part of the report: (the file that it comes from, what is taken of it)}
PARTS: dict[str, tuple[str, Callable[[Figures], Any]]] = {
    "environment": ("environment.json", dict),
    "model": ("download.json", dict),
    "base": ("baseline_fp16.json", _costs),
    "quantized": ("quantized_int4.json", _costs),
    "tuned": ("finetuned_standard_bench.json", _costs),
    "quantization": ("quantization_info.json", dict),
    "data": ("data_summary.json", dict),
    "training": ("training_metrics.json", dict),
    "evaluation": ("evaluation_finetuned.json", _scores),
}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# From figures to texts --------------------------------------------------------------------------------------
def benchmark_report(report: Figures) -> str:
    """BENCHMARK_REPORT.md: the three stages side by side, the scores of all variants, findings."""
    stages = [report[part] for part in ("base", "quantized", "tuned")]
    names = [stage["variant"] for stage in stages]
    costs = [(key, *(_text(stage[key]) for stage in stages)) for key in stages[0] if key != "variant"]
    scores = []
    for name, rows in report["evaluation"]["variants"].items():
        scores += [(name, row["what"], _text(row["n"]), _interval(row)) for row in rows]
    return "\n\n".join(
        [
            f"# {report['run_id']}",
            "## Costs\n\nSeconds are medians of n answers of one length; they have no interval.",
            results.markdown_table(("", *names), costs).rstrip(),
            f"## Scores\n\nWith {report['interval_percent']} % intervals by bootstrap.",
            results.markdown_table(("Variant", "Metric", "n", "Value"), scores).rstrip(),
            "## Findings",
            *report["findings"],
            NOTICE + "\n",
        ]
    )


def content_draft(report: Figures) -> str:
    """CONTENT_DRAFT.md: a text of fewer than 200 words with a post of fewer than 280 characters."""
    variants, quantization = report["evaluation"]["variants"], report["quantization"]
    base, tuned = variants["base"][0], variants["lora"][0]
    name = report["run_id"].rpartition("-")[0][:60]
    score = f"{tuned['what']} {_interval(base)} before and {_interval(tuned)} after tuning, n = {tuned['n']}"
    share = f"{_text(quantization['share'])} of their bytes by {quantization['method']}"
    return (
        f"# {name}\n\nThe weights take {share}. The adapter is "
        f"{_text(report['training']['trainable']['percent'])} % of all numbers, trained on "
        f"{report['data']['splits']['train']} conversations. On the test split: {score}. "
        f"{report['findings'][0]}. An answer took {_text(report['base']['latency_s'])} seconds before and "
        f"{_text(report['tuned']['latency_s'])} with the adapter.\n{POST}\n{name}: {score}. The weights take {share}. {NOTICE}\n"
    )


def numbers_in(value: Any) -> set[float]:
    """All numbers of a text or of what a JSON file holds, without signs."""
    if isinstance(value, str):
        return {float(number) for number in _NUMBER.findall(value)}
    if isinstance(value, Mapping | list):
        items = value.values() if isinstance(value, Mapping) else value
        return set().union(*map(numbers_in, items))
    return set() if value is None else {abs(float(value))}


def _interval(row: Figures) -> str:
    return f"{_text(row['value'])} [{_text(row['low'])}, {_text(row['high'])}]"


def _text(value: float | None) -> str:
    """A number without an exponent."""
    return "–" if value is None else f"{value:.12f}".rstrip("0").rstrip(".")
