"""Gates of a pipeline: what must hold for each of its files, as pure functions from a file's content to faults.

A gate reads its own file. Those of the report also compare it with the files that its figures come from, as far as
these pass their own gates: a damaged file turns one gate red, its own.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from attrs import frozen

from medvl.base.text import short
from medvl.systems import pipeline_report
from medvl.systems.bench import SCHEMA
from medvl.systems.system import VARIANTS

_ANEW = "the same command without --check makes it anew"
Demand = tuple[bool, str, Any]  # whether it holds, what must hold, what was found


@frozen
class Gate:
    """What must hold for a file."""

    phase: str  # that makes the file
    file: str
    # (what the file holds, {file: what it holds} of those whose gates are green)
    demands: Callable[[Any, Mapping[str, Any]], Sequence[Demand]]
    keys: str = ""  # of its JSON object
    remedy: str = ""  # where the file is whole and a demand does not hold


def check_folder(folder: Path) -> dict[str, list[str]]:
    """{file: what must hold, was found and is to be done, for each fault} of every gate; one without faults is green."""
    green: dict[str, Any] = {}
    faults: dict[str, list[str]] = {}
    for gate in GATES:
        remedy = gate.remedy or _ANEW
        try:
            content = _read(folder / gate.file)
            for key in gate.keys.split():
                content[key]
            demands = gate.demands(content, green)
        except FileNotFoundError:
            demands, remedy = [(False, "must be there", "no such file")], _ANEW
        # JSON may hold any shape: a number where a list must be.
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            demands, remedy = [(False, "must be whole, with all its keys", f"{type(e).__name__}: {e}")], _ANEW
        faults[gate.file] = [
            f"{what}, found {short(found)}; {remedy}" for ok, what, found in demands if not ok
        ]
        if not faults[gate.file]:
            green[gate.file] = content
    return faults


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text, parse_constant=_refuse_constant) if path.suffix == ".json" else text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} in place of a finite number")


# What must hold ---------------------------------------------------------------------------------------------
def _environment(content: Any, _: Any) -> list[Demand]:
    return [(content["cores"] > 0, "cores must be above 0", content["cores"])]


def _download(content: Any, _: Any) -> list[Demand]:
    total = sum(content["files"].values())
    return [(content["bytes"] == total > 0, "bytes must be the sum of all files", content["bytes"])]


def _bench(*variants: str) -> Callable[[Any, Any], list[Demand]]:
    def demands(content: Any, _: Any) -> list[Demand]:
        name, version, n = content["variant"], content["schema_version"], content["data"]["n"]
        answers = content["samples"]
        tokens = [answer["tokens_out"] for answer in answers]
        sizes = [size for files in content["disk_bytes"].values() for size in files.values()]
        costs = [*content["load"].values(), *content["memory"]["peak"].values(), *sizes]
        found: list[Demand] = [
            (version == SCHEMA, f"schema_version must be {SCHEMA}", version),
            (name in variants, f"variant must be {' or '.join(variants)}", name),
            (n == len(answers) > 0, "data.n must be the number of samples", n),
            ({*tokens} == {content["new_tokens"]}, "all answers must have new_tokens tokens", tokens),
            (min(costs) > 0, "load, memory.peak and disk_bytes must be above 0", costs),
        ]
        for key in ("latency", "first_token"):
            own = [answer[f"{key}_s"] for answer in answers]
            values = {"n": len(own), "mean": fmean(own), "min": min(own), "p50": median(own), "max": max(own)}
            same = all(math.isclose(content[key][name], value) for name, value in values.items())
            found.append((same and min(own) > 0, f"{key} must be that of samples", content[key]))
        return found

    return demands


def _quantization(content: Any, _: Any) -> list[Demand]:
    before, after, variant = (content[key] for key in ("bytes_before", "bytes_after", "variant"))
    explained = content["method"] == content["asked"] or content["reason"]
    return [
        (0 < after < before, f"bytes_after must be below bytes_before = {before}", after),
        (math.isclose(content["share"] * before, after), "share must be that of the bytes", content["share"]),
        (variant == "base", "the variant must be base; remove RUN/int4", variant),
        (bool(explained), "reason must say why the method is not the one asked for", content["method"]),
    ]


def _sources(content: Any, _: Any) -> list[Demand]:
    rows = [source["rows"] for source in content.values() if source["path"]]
    return [(bool(rows) and min(rows) > 0, "a source must have a path, and each of these rows", rows)]


def _splits(content: Any, _: Any) -> list[Demand]:
    found = []
    for split in ("train", "valid", "test"):
        n, parts = content["splits"][split], [source[split] for source in content["sources"].values()]
        found.append((n == sum(parts) > 0, f"splits.{split} must be the sum of its sources {parts}", n))
    return found


def _training(content: Any, _: Any) -> list[Demand]:
    own, base, percent = (content["trainable"][key] for key in ("numbers", "base", "percent"))
    share = 100 * own / (own + base)
    found = [(math.isclose(percent, share) and 0 < share <= 100, f"percent must be {share:.4g}", percent)]
    for stage in content["stages"]:
        first, final = stage["first_loss"], stage["final_loss"]
        what = f"the loss of stage {stage['name']} must end below {first}, where it began"
        found.append((final < first and stage["steps"] > 0, what, final))
    return found


def _evaluation(content: Any, _: Any) -> list[Demand]:
    metric, variants, pairs = content["metric"], content["variants"], content["lora_minus"]
    named = {*variants, *content["left_out"]} == {*VARIANTS} and {*pairs} == {*variants} - {"lora"}
    named = named and "base" in pairs
    found: list[Demand] = [(named, "each variant must have scores or a reason", list(variants))]
    value = {}
    for name, rows in variants.items():
        row = next(row for row in rows if (row["what"], row["subject"]) == (metric, "all"))
        value[name] = row["value"]
        whole = row["n"] > 0 and _interval(row)
        found.append((whole, f"{metric} of {name} must have n and an interval", row))
    for name, row in pairs.items():
        same = math.isclose(row["value"], value["lora"] - value[name], abs_tol=1e-9) and _interval(row)
        found.append((same, f"lora_minus.{name} must be their difference with its interval", row))
    worse = pairs["base"]["high"] < 0
    return [*found, (not worse, "lora must not be worse than base by the whole interval", pairs["base"])]


def _interval(row: Mapping[str, Any]) -> bool:
    return row["low"] <= row["high"] and math.isfinite(row["value"])


def _report(content: Any, green: Mapping[str, Any]) -> list[Demand]:
    found = []
    for part, (file, _) in pipeline_report.PARTS.items():
        same = file not in green or content[part] == pipeline_report.take_figures(part, green[file])
        found.append((same, f"{part} must have the figures of {file}", content[part]))
    same = content["findings"] == pipeline_report.findings(content)
    return [*found, (same, "findings must follow from the figures", content["findings"])]


def _text(text: str, green: Mapping[str, Any]) -> list[Demand]:
    numbers = pipeline_report.numbers_in(text)
    unknown = sorted(numbers - pipeline_report.numbers_in(green.get("FINAL_REPORT.json", [*numbers])))
    end = pipeline_report.NOTICE
    return [
        (text.rstrip().endswith(end), f"must end with {end!r}", text[-60:]),
        (not unknown, "every number must occur in FINAL_REPORT.json", unknown),
    ]


def _draft(text: str, green: Mapping[str, Any]) -> list[Demand]:
    post = text.partition(pipeline_report.POST)[2].strip()
    return [
        *_text(text, green),
        (len(text.split()) < 200, "must have fewer than 200 words", len(text.split())),
        (0 < len(post) < 280, "must have a post of fewer than 280 characters", len(post)),
    ]


_COSTS = "schema_version run_id variant git env model data load memory samples latency first_token per_token"
_LONGER = "train longer, log more often (train.log) or take another lr; each is another run"
GATES = (
    Gate("doctor", "environment.json", _environment, "python platform cores torch gpu packages commit"),
    Gate("model", "download.json", _download, "name files bytes seconds"),
    Gate("bench_base", "baseline_fp16.json", _bench("base"), _COSTS),
    Gate("quantize", "quantization_info.json", _quantization, "asked method reason seconds share"),
    Gate("bench_int4", "quantized_int4.json", _bench("int4", "nf4"), _COSTS),
    Gate("data", "download_summary.json", _sources),
    Gate("data", "data_summary.json", _splits, "splits sources non_commercial licences"),
    Gate("train", "training_metrics.json", _training, "seconds stages trainable", _LONGER),
    Gate("evaluate", "evaluation_finetuned.json", _evaluation, "metric variants left_out", _LONGER),
    Gate("bench_lora", "finetuned_standard_bench.json", _bench("lora"), _COSTS),
    Gate("report", "FINAL_REPORT.json", _report, "schema_version run_id notice"),
    Gate("report", "BENCHMARK_REPORT.md", _text),
    Gate("report", "CONTENT_DRAFT.md", _draft),
)
