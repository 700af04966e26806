"""`invoke bench`: what a variant of a language model costs in seconds, memory and bytes, as results and as one file."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvl.base import files
from medvl.evaluation import results
from medvl.evaluation.results import Result
from medvl.language import chat, measure, system
from medvl.language.chat import Dialogue, Encoded
from medvl.language.measure import Timing
from medvl.language.system import LanguageModel, Params
from medvl.systems import run
from medvl.systems.system import Log, Variant
from medvl.weights import lora

SCHEMA = 1  # of the file of a bench
_WARM_UP = 2  # answers that are computed before the first one counts


def bench(
    exp: str,
    overrides: Sequence[str] = (),
    variant: str = "base",
    *,
    new_tokens: int = 64,
    batch: int = 8,
    log: Log = print,
) -> Path:
    """Measure a variant of an experiment's model; writes `RUN/bench/VARIANT.json` and `.jsonl` (results) and returns
    the path of the first.

    Prompts are answered one at a time and then as batches. Images are opened and preprocessed in the time of their
    answer. Each variant is measured in a process of its own, so that the peak is its own.

    Args:
        new_tokens: of every answer, exactly.
        batch: prompts that are answered together; 0 = none are.
    Raises:
        ValueError: no such experiment or variant, a system without variants, an image that cannot be read.
    """
    cfg, folder = run.resolve(exp, overrides)
    own = run.find_system(cfg.system)
    if own.variant is None or own.bench_questions is None:
        raise ValueError(f"bench: {exp} is a {cfg.system} experiment, which has no variants to measure")
    run.check_base(cfg, folder)
    questions = own.bench_questions(cfg)
    if not questions:
        raise ValueError(f"bench: {exp} has no question to measure with")
    found = own.variant(cfg, folder, variant)
    path = folder / "bench" / f"{variant}.json"
    files.check_writable(path)
    report = measure_variant(cfg, found, questions, new_tokens=new_tokens, batch=batch)
    report = {"schema_version": SCHEMA, "run_id": folder.name, "variant": variant, **report}
    files.write_text(path, json.dumps(report, indent=1) + "\n")
    rows = to_results(report)
    results.write_results(path.with_suffix(".jsonl"), rows)
    log(results.markdown_table(("Metric", "n", "Value"), [(row.what, row.n, row.value) for row in rows]))
    log(f"written: {path}")
    return path


def measure_variant(
    cfg: Any, variant: Variant, questions: Sequence[Dialogue], *, new_tokens: int, batch: int
) -> dict[str, Any]:
    """All measurements of one variant, as the file of a bench has them, in seconds and bytes."""
    device = system.device_of(cfg.train)
    dropped = all([measure.forget_files(folder) for folder in variant.folders])
    before = measure.memory_now(device)
    (model, params), cold = measure.timed(variant.open)
    loaded = measure.memory_now(device)
    del model, params
    measure.free_memory()
    unloaded = measure.memory_now(device)  # with the libraries that loading imports
    (model, params), warm = measure.timed(variant.open)

    prompts = chat.encode_conversations(model.chat, questions, prompt=True)
    rows = range(len(prompts.samples))
    warm_up = [
        measure.time_answers(model, params, prompts, [row], new_tokens) for row in [*rows, *rows][:_WARM_UP]
    ]
    own_peak = measure.start_peak(device)
    timings = [measure.time_answers(model, params, prompts, [row], new_tokens) for row in rows]
    peak = measure.memory_peak(device)
    together = None
    # The same prompts again until the batch is full.
    full = [row % len(rows) for row in range(batch)]
    if batch:
        together = measure.time_answers(model, params, prompts, full, new_tokens)
    memory = {
        "pre": before,
        "post": loaded,
        "unloaded": unloaded,
        "peak": peak,
        "peak_of_batch": measure.memory_peak(device),
    }
    longest = max(rows, key=lambda row: len(prompts.samples[row].ids))
    for name, asked in (("estimated", [longest]), ("estimated_of_batch", full)):
        if asked:
            memory[name] = system.estimate_answers(model, params, prompts, asked, new_tokens)

    notes = [
        "research use only, not for diagnosis",
        "an answer's time holds opening and preprocessing its images",
    ]
    if not dropped:
        notes.append(
            "load.cold_s: the system does not drop files from memory, so they may not be read from disk"
        )
    if not own_peak:
        notes.append("memory.peak.resident: since the process began, as this system cannot set it back")
    return {
        "git": results.commit(),
        "env": results.environment() | {"device": results.device_name()},
        "model": _describe(cfg, model, params),
        "data": {"hash": digest_prompts(prompts), "n": len(rows)},
        "load": {"cold_s": cold, "warm_s": warm},
        "memory": memory,
        "warm_up": [timing.latency_s for timing in warm_up],
        "new_tokens": new_tokens,
        "samples": [_sample(timing, questions) for timing in timings],
        "latency": measure.summary([timing.latency_s for timing in timings]),
        "first_token": measure.summary([timing.first_token_s for timing in timings]),
        "per_token": measure.summary([timing.seconds_per_token for timing in timings]),
        "batch": None if together is None else _sample(together, questions),
        "disk_bytes": {folder.name: measure.file_sizes(folder) for folder in variant.folders},
        "notes": notes,
    }


def _describe(cfg: Any, model: LanguageModel, params: Params) -> dict[str, Any]:
    """What was measured: the model by name, the precision of its weights, how attention is computed."""
    skeleton: Any = model.chat.skeleton
    kinds = Counter(type(weight).__name__ for weight in params["model"].values())
    adapter = None
    if model.adapter is not None:
        numbers, _, share = lora.count_adapter(model.adapter, params["model"])
        adapter = {"numbers": numbers, "percent": share}
    return {
        "id": cfg.model.name or skeleton.name,
        "architecture": skeleton.name,
        "dtype": str(model.chat.dtype).removeprefix("torch."),
        "weights": dict(kinds),
        "adapter": adapter,
        "attention": getattr(skeleton.module.config, "_attn_implementation", None),
    }


def digest_prompts(prompts: Encoded) -> str:
    """Eight hex digits of the prompts' tokens and of the content of what they show."""
    content = hashlib.sha256()
    for conversation, sample in zip(prompts.conversations, prompts.samples, strict=True):
        shown = [files.file_digest(item) for item in conversation.items]
        content.update(json.dumps([sample.ids.tolist(), shown]).encode())
    return content.hexdigest()[:8]


def _sample(timing: Timing, questions: Sequence[Dialogue]) -> dict[str, Any]:
    """One answer, or a batch of them, as the file has it."""
    return {
        "id": [str(getattr(questions[row], "id", row)) for row in timing.rows],
        "tokens_in": timing.prompt_tokens,
        "tokens_out": timing.new_tokens,
        "first_token_s": timing.first_token_s,
        "latency_s": timing.latency_s,
        "tokens_per_s": timing.new_tokens / timing.latency_s,
        "response": list(timing.answers),
    }


def to_results(report: Mapping[str, Any]) -> list[Result]:
    """The numbers of a bench as results: medians of seconds with the number of answers, memory and files in bytes."""
    about: dict[str, Any] = {
        "subject": report["variant"],
        "experiment": report["run_id"],
        "commit": report["git"],
        "device": report["env"]["device"],
    }
    values: dict[str, tuple[float, int]] = {
        "load_cold_s": (report["load"]["cold_s"], 1),
        "load_warm_s": (report["load"]["warm_s"], 1),
        "disk_bytes": (sum(sum(sizes.values()) for sizes in report["disk_bytes"].values()), 1),
    }
    for name in ("first_token", "per_token", "latency"):
        values[f"{name}_s"] = (report[name]["p50"], report[name]["n"])
    answers = report["samples"]
    seconds = sum(answer["latency_s"] for answer in answers)
    values["tokens_per_s"] = (sum(answer["tokens_out"] for answer in answers) / seconds, len(answers))
    if report["batch"] is not None:
        rows = len(report["batch"]["id"])
        values[f"tokens_per_s_of_batch_{rows}"] = (report["batch"]["tokens_per_s"], rows)
    for moment, bytes_of in report["memory"].items():
        for kind, size in bytes_of.items():
            values[f"memory_{moment}_{kind}_bytes"] = (size, 1)
    return [Result(what=name, value=value, n=n, **about) for name, (value, n) in values.items()]
