"""What adapters is found to be worth: accuracy of steps and episodes in every mode, in and out of domain, retrieval, and the report."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Generator, Tensor

from medvl.adapters import experts
from medvl.adapters.experts import Experts
from medvl.adapters.retrieve import Retrieved
from medvl.base.tree import Tree
from medvl.evaluation import plots, report
from medvl.evaluation.accuracy import (
    Accuracy,
    accuracy,
    accuracy_by_category,
    episode_accuracy,
    paired_difference,
    to_results,
)
from medvl.evaluation.results import Result
from medvl.language.conversations import Conversation
from medvl.systems.adapters import record
from medvl.systems.adapters import score as score
from medvl.systems.adapters.record import Config, Model
from medvl.systems.adapters.score import Run, Step

_log = logging.getLogger("medvl")
DOMAINS = {"in": "in domain", "out": "out of domain"}
RULES = {
    "strict": "by the strict rule (the same words, side and negation)",
    "tfidf": "by a TF-IDF cosine above 0.6 (which takes opposites for equal)",
}


def assess(
    model: Model, params: Tree, held: Sequence[Conversation], folder: Path, experiment: str
) -> tuple[list[Result], Path]:
    """Answer every step in every run, going on where it stopped; writes answers, results, `summary.md` and the report into `folder`."""
    cfg = model.cfg
    of = record.gather(model, params)
    experts.check_adapters(of)
    steps = score.steps_of(held, cfg)
    if strange := sorted({s.task for s in steps} - {*of.names}):
        _log.warning(
            "%s: no adapter of this name in the registry; in and out of domain are the same there",
            ", ".join(strange),
        )
    queries = score.embed_steps(of, steps, cfg)
    found = {run: score.choose_for_steps(run, of, steps, queries, cfg) for run in score.runs_of(cfg)}
    stamp = score.stamp_answers(cfg, model.registry, steps)
    right, failed = dict[Run, list[bool]](), 0
    for run, chosen_ in found.items():
        name = f"{run.mode}-{run.domain}-{run.k}-{stamp}.jsonl"
        lines = score.answer_steps(of, steps, chosen_, run.mode, cfg, folder / "answers" / name)
        right[run] = [line["right"] for line in lines]
        failed += sum("error" in line for line in lines)
    rows = [
        *_recalls(of, steps, queries, cfg, experiment),
        *_rows(right, steps, cfg, experiment),
        *_picks(found, of, steps, cfg, experiment),
    ]
    return rows, _report(rows, found, of, steps, failed, cfg, folder, experiment)


# Numbers --------------------------------------------------------------------------------------------------------------------------------
def _rows(
    right: dict[Run, list[bool]], steps: Sequence[Step], cfg: Config, experiment: str
) -> Iterator[Result]:
    """Accuracy of steps and of episodes in every run, of each task and category; and pairs of runs on the same steps."""
    episodes, n = [s.episode for s in steps], cfg.evaluate.bootstrap
    kinds = {"task": [s.task for s in steps], "category": [s.category for s in steps]}
    for run, hits in right.items():
        name = run.name(cfg)
        for domain in _domains(run, cfg):
            extra = {"mode": name, "k": run.k, "domain": DOMAINS[domain]}
            yield _row("step_accuracy", name, accuracy(hits, episodes, n=n, gen=_gen(cfg)), extra, experiment)
            yield _row(
                "episode_accuracy",
                name,
                episode_accuracy(hits, episodes, n=n, gen=_gen(cfg)),
                extra,
                experiment,
            )
            for what, of in kinds.items():
                rows = [i for i, k in enumerate(of) if k]
                if not rows:
                    continue
                found = accuracy_by_category(
                    [hits[i] for i in rows],
                    [of[i] for i in rows],
                    [episodes[i] for i in rows],
                    n=n,
                    gen=_gen(cfg),
                )
                for kind, one in found.items():
                    yield _row(f"{what}_accuracy", f"{name}: {kind}", one, extra | {what: kind}, experiment)
    for domain in cfg.evaluate.domains:
        own = {
            run.mode: hits
            for run, hits in right.items()
            if run.k == cfg.retrieve.k and domain in _domains(run, cfg)
        }
        for a, b in (
            ("selection", "bare"),
            ("mixture", "bare"),
            ("fusion", "bare"),
            ("mixture", "selection"),
            ("mixture", "fusion"),
        ):
            if a in own and b in own:
                between = {f"{a} - {b}": paired_difference(own[a], own[b], episodes, n=n, gen=_gen(cfg))}
                yield from to_results(
                    between, split=DOMAINS[domain], metric="step_accuracy_difference", experiment=experiment
                )


def _recalls(
    of: Experts, steps: Sequence[Step], queries: Tensor, cfg: Config, experiment: str
) -> Iterator[Result]:
    """How often a step's own adapter is among the k nearest, by steps whose task has one."""
    rows = [i for i, s in enumerate(steps) if s.task in of.names]
    if not rows:
        return
    own = torch.tensor([of.names.index(steps[i].task) for i in rows])
    most = evolve(cfg.retrieve, k=len(of.names), threshold=-1.0, weighting="uniform")
    place = experts.choose_adapters("mixture", most, queries[rows], of.vectors).indices
    for k in cfg.evaluate.recall:
        if k <= len(of.names):
            hit = (place[:, :k] == own[:, None]).any(1)
            one = accuracy(hit, [steps[i].episode for i in rows], n=cfg.evaluate.bootstrap, gen=_gen(cfg))
            yield _row(f"recall_at_{k}", "own adapter", one, {"domain": DOMAINS["in"], "k": k}, experiment)


def _picks(
    found: dict[Run, Retrieved], of: Experts, steps: Sequence[Step], cfg: Config, experiment: str
) -> Iterator[Result]:
    """How often no adapter was near enough, and how often the nearest is of another category."""
    for run, picked in found.items():
        if run.mode != "mixture" or run.k != cfg.retrieve.k:
            continue
        episodes, best = [s.episode for s in steps], _nearest(picked).tolist()
        extra = {"domain": DOMAINS[run.domain], "k": run.k}
        n = cfg.evaluate.bootstrap
        yield _row(
            "abstained",
            "no adapter near enough",
            accuracy(picked.abstained, episodes, n=n, gen=_gen(cfg)),
            extra,
            experiment,
        )
        if any(of.categories):
            other = [i >= 0 and of.categories[i] != s.category for i, s in zip(best, steps, strict=True)]
            yield _row(
                "other_category",
                "nearest adapter",
                accuracy(other, episodes, n=n, gen=_gen(cfg)),
                extra,
                experiment,
            )


def _nearest(picked: Retrieved) -> Tensor:
    """The nearest adapter of each row, int64 [b]; -1 where it has none, as all have with k = 0."""
    return picked.indices[:, 0] if picked.indices.shape[1] else torch.full((len(picked.indices),), -1)


def _row(what: str, subject: str, one: Accuracy, extra: dict[str, Any], experiment: str) -> Result:
    like = {
        "split": extra["domain"],
        "n": one.n,
        "experiment": experiment,
        "extra": extra | {"groups": one.groups},
    }
    return Result(what=what, subject=subject, value=one.value, low=one.low, high=one.high, **like)


def _domains(run: Run, cfg: Config) -> Sequence[str]:
    """Modes that know no domain stand in both."""
    return cfg.evaluate.domains if run.mode in ("bare", "oracle") else (run.domain,)


def _gen(cfg: Config) -> Generator:
    return Generator().manual_seed(cfg.seed)


# The report -----------------------------------------------------------------------------------------------------------------------------
def _report(
    rows: list[Result],
    found: dict[Run, Retrieved],
    of: Experts,
    steps: Sequence[Step],
    failed: int,
    cfg: Config,
    folder: Path,
    experiment: str,
) -> Path:
    domain: Callable[[Result], str] = lambda r: r.extra["domain"]
    mode: Callable[[Result], str] = lambda r: r.extra["mode"]
    tables = [
        (
            f"{what} accuracy",
            *report.pivot(rows, down=mode, across=domain, metric=f"{what.lower()}_accuracy", corner="Mode"),
        )
        for what in ("Step", "Episode")
    ]
    pairs = [r for r in rows if r.what == "step_accuracy_difference"]
    if pairs:
        body = [
            (r.subject, r.split, r.value, f"{r.low:.3f} to {r.high:.3f}", f"{r.extra['p']:.2g}")
            for r in pairs
        ]
        tables.append(("Pairs, by episode", ("Step accuracy", "", "Difference", "95 % interval", "p"), body))
    seen = [r for r in rows if r.what.startswith("recall_at_")]
    if seen:
        tables.append(
            ("Retrieval of a step's own adapter", *report.pivot(seen, down="subject", across="what"))
        )
    for name in cfg.evaluate.domains:
        part = [
            r
            for r in rows
            if r.what == "task_accuracy" and r.split == DOMAINS[name] and r.extra["k"] == cfg.retrieve.k
        ]
        tables.append(
            (
                f"Step accuracy of each task, {DOMAINS[name]}",
                *report.pivot(part, down="task", across=mode, corner="Task"),
            )
        )
    figures = {
        "Similarity between adapters": plots.matrix(
            (of.vectors @ of.vectors.T).tolist(), of.names, of.names, low=-1, high=1
        )
    }
    shares = _shares(found, of, steps, cfg)
    if shares:
        tasks = sorted({s.task for s in steps})
        figures["How often each adapter is the nearest, by task"] = plots.matrix(
            shares, tasks, of.names, x="nearest adapter", y="task"
        )
    main = [r for r in rows if r.what == "step_accuracy" and r.extra["k"] == cfg.retrieve.k]
    figures["Step accuracy of each mode"] = plots.compare(
        [(r.split, r.subject, r.value, r.low, r.high) for r in main], "step accuracy"
    )
    by_k = _by_k(rows, cfg)
    if cfg.evaluate.by_k and by_k:
        figures["Step accuracy of mixtures by k"] = plots.lines(
            by_k, "adapters in a mixture", "step accuracy"
        )
    notes = [
        f"Answers are right {RULES[cfg.evaluate.rule]}; greedy decoding. An episode is right if all its steps are. Out of domain the "
        "adapter of a step's own task may not be chosen; the bare model and the oracle (the own adapter) are the same in both. In brackets "
        "95 % intervals that resample episodes; p is of an exact sign-flip test by episode.",
        f"k = {cfg.retrieve.k}, {cfg.retrieve.weighting} weights, fusion by {cfg.fusion.rule}. {failed} answers failed and count as wrong.",
    ]
    shown = [r for r in rows if r.what in ("abstained", "other_category")]
    page = report.write_report(
        folder, f"{experiment}: adapters", shown, figures, notes, tables=tables, summary=True
    )
    report.write_results_csv(folder / "results.csv", rows)
    return page


def _shares(
    found: dict[Run, Retrieved], of: Experts, steps: Sequence[Step], cfg: Config
) -> list[list[float]]:
    """Share of a task's steps whose nearest adapter is each of the pool's, in domain."""
    best = next(
        (
            _nearest(f)
            for run, f in found.items()
            if run.mode in ("selection", "mixture", "fusion") and run.domain == "in"
        ),
        None,
    )
    if best is None:
        return []
    tasks = [s.task for s in steps]
    rows = {t: [i for i, of_ in enumerate(tasks) if of_ == t] for t in sorted({*tasks})}
    return [[float((best[r] == j).float().mean()) for j in range(len(of.names))] for r in rows.values()]


def _by_k(rows: Sequence[Result], cfg: Config) -> dict[str, dict[float, tuple[float, float, float]]]:
    lines: dict[str, dict[float, tuple[float, float, float]]] = {}
    for r in rows:
        if r.what == "step_accuracy" and r.subject.startswith("mixture"):
            lines.setdefault(r.split, {})[r.extra["k"]] = (r.value, r.low, r.high)
    return lines
