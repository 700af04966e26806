"""What adapters is found to be worth: accuracy in every mode and domain, retrieval, and the report."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
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
from medvl.systems.adapters import record, score
from medvl.systems.adapters.record import Config, Model
from medvl.systems.adapters.score import Run, Step

_log = logging.getLogger("medvl")
DOMAINS = {"in": "in domain", "out": "out of domain"}
RULES = {
    "strict": "by the strict rule (the same words, side and negation)",
    "tfidf": "by a TF-IDF cosine above 0.6 (which takes opposites for equal)",
}
# Modes that are compared on the same steps, where both were run.
PAIRS = (
    ("selection", "bare"),
    ("mixture", "bare"),
    ("fusion", "bare"),
    ("mixture", "selection"),
    ("mixture", "fusion"),
)


@frozen(kw_only=True, eq=False)
class Evaluation:
    """The test steps, which adapters each run chose for them, and what was right."""

    cfg: Config
    experiment: str
    pool: Experts = field(repr=False)
    steps: Sequence[Step] = field(repr=False)
    queries: Tensor = field(repr=False)  # [n, d], embeddings of the steps
    chosen: dict[Run, Retrieved] = field(repr=False)
    right: dict[Run, list[bool]] = field(repr=False)  # of each step
    num_failed: int  # answers that ended in an error; they count as wrong

    @property
    def episodes(self) -> list[str]:
        """The episode of each step: steps of one are resampled together."""
        return [step.episode for step in self.steps]


def assess(
    model: Model, params: Tree, conversations: Sequence[Conversation], folder: Path, experiment: str
) -> tuple[list[Result], Path]:
    """Answer every step in every run, going on where it stopped.

    Writes answers, results, `summary.md` and the report into `folder`.
    """
    cfg = model.cfg
    pool = record.gather(model, params)
    # Adapters are read when they are first needed: one that does not fit the model should not stop the
    # evaluation in its middle.
    experts.check_adapters(pool)
    steps = score.steps_of(conversations, cfg)
    unknown = sorted({step.task for step in steps} - set(pool.names))
    if unknown:
        _log.warning(
            "%s: no adapter of this name in the registry; in and out of domain are the same there",
            ", ".join(unknown),
        )
    queries = score.embed_steps(pool, steps, cfg)
    # For all runs before the first answer: what is wrong with a mode is found at once.
    chosen = {run: score.choose_for_steps(run, pool, steps, queries, cfg) for run in score.runs_of(cfg)}
    stamp = score.stamp_answers(cfg, model.registry, steps)
    right: dict[Run, list[bool]] = {}
    num_failed = 0
    for run, retrieved in chosen.items():
        path = folder / "answers" / f"{run.mode}-{run.domain}-{run.k}-{stamp}.jsonl"
        lines = score.answer_steps(pool, steps, retrieved, run.mode, cfg, path)
        right[run] = [line["right"] for line in lines]
        num_failed += sum("error" in line for line in lines)
    evaluation = Evaluation(
        cfg=cfg,
        experiment=experiment,
        pool=pool,
        steps=steps,
        queries=queries,
        chosen=chosen,
        right=right,
        num_failed=num_failed,
    )
    rows = [*_recalls(evaluation), *_accuracies(evaluation), *_differences(evaluation), *_choices(evaluation)]
    return rows, _write_report(evaluation, rows, folder)


# Numbers ----------------------------------------------------------------------------------------------------
def _recalls(evaluation: Evaluation) -> list[Result]:
    """How often a step's own adapter is among the k nearest, by steps whose task has one."""
    pool, cfg = evaluation.pool, evaluation.cfg
    rows = [i for i, step in enumerate(evaluation.steps) if step.task in pool.names]
    if not rows:
        return []
    own_adapter = torch.tensor([pool.names.index(evaluation.steps[i].task) for i in rows])
    # All adapters in the order of their similarity, whatever the run's threshold.
    ranking = evolve(cfg.retrieve, k=len(pool.names), threshold=-1.0, weighting="uniform")
    # "mixture" takes k as it is, "selection" would cut the ranking to its first. [steps, adapters].
    ranked = experts.choose_adapters("mixture", ranking, evaluation.queries[rows], pool.vectors).indices
    episodes = [evaluation.steps[i].episode for i in rows]
    results = []
    for k in cfg.evaluate.recall:
        # Fewer adapters have no k nearest.
        if k > len(pool.names):
            continue
        hits = (ranked[:, :k] == own_adapter[:, None]).any(1)
        recall = accuracy(hits, episodes, n=cfg.evaluate.bootstrap, gen=_generator(cfg))
        extra = {"domain": DOMAINS["in"], "k": k}
        results.append(_result(evaluation, f"recall_at_{k}", "own adapter", recall, extra))
    return results


def _accuracies(evaluation: Evaluation) -> list[Result]:
    """Accuracy of steps and of episodes in every run, and of the steps of each task and category."""
    cfg, episodes = evaluation.cfg, evaluation.episodes
    bootstrap = cfg.evaluate.bootstrap
    results = []
    for run, hits in evaluation.right.items():
        name = run.name(cfg)
        for domain in _domains(run, cfg):
            extra = {"mode": name, "k": run.k, "domain": DOMAINS[domain]}
            of_steps = accuracy(hits, episodes, n=bootstrap, gen=_generator(cfg))
            results.append(_result(evaluation, "step_accuracy", name, of_steps, extra))
            of_episodes = episode_accuracy(hits, episodes, n=bootstrap, gen=_generator(cfg))
            results.append(_result(evaluation, "episode_accuracy", name, of_episodes, extra))
            results += _accuracies_by(evaluation, "task", hits, name, extra)
            results += _accuracies_by(evaluation, "category", hits, name, extra)
    return results


def _accuracies_by(
    evaluation: Evaluation, kind: str, hits: Sequence[bool], name: str, extra: dict[str, Any]
) -> list[Result]:
    """Accuracy of the steps of each task, or of each category; steps without one are left out."""
    groups = [step.task if kind == "task" else step.category for step in evaluation.steps]
    rows = [i for i, group in enumerate(groups) if group]
    if not rows:
        return []
    episodes = evaluation.episodes
    accuracies = accuracy_by_category(
        [hits[i] for i in rows],
        [groups[i] for i in rows],
        [episodes[i] for i in rows],
        n=evaluation.cfg.evaluate.bootstrap,
        gen=_generator(evaluation.cfg),
    )
    return [
        _result(evaluation, f"{kind}_accuracy", f"{name}: {group}", value, extra | {kind: group})
        for group, value in accuracies.items()
    ]


def _differences(evaluation: Evaluation) -> list[Result]:
    """Differences of step accuracy between pairs of modes on the same steps."""
    cfg = evaluation.cfg
    results: list[Result] = []
    for domain in cfg.evaluate.domains:
        hits_of_mode = {
            run.mode: hits
            for run, hits in evaluation.right.items()
            # Mixtures of other k would take the place of this one under the same mode.
            if run.k == cfg.retrieve.k and domain in _domains(run, cfg)
        }
        for first, second in PAIRS:
            if first not in hits_of_mode or second not in hits_of_mode:
                continue
            difference = paired_difference(
                hits_of_mode[first],
                hits_of_mode[second],
                evaluation.episodes,
                n=cfg.evaluate.bootstrap,
                gen=_generator(cfg),
            )
            results += to_results(
                {f"{first} - {second}": difference},
                split=DOMAINS[domain],
                metric="step_accuracy_difference",
                experiment=evaluation.experiment,
            )
    return results


def _choices(evaluation: Evaluation) -> list[Result]:
    """How often no adapter was near enough, and how often the nearest is of another category."""
    cfg, episodes, categories = evaluation.cfg, evaluation.episodes, evaluation.pool.categories
    bootstrap = cfg.evaluate.bootstrap
    results = []
    for run, retrieved in evaluation.chosen.items():
        # The mixture has all k adapters, the other modes fewer.
        if run.mode != "mixture" or run.k != cfg.retrieve.k:
            continue
        extra = {"domain": DOMAINS[run.domain], "k": run.k}
        abstained = accuracy(retrieved.abstained, episodes, n=bootstrap, gen=_generator(cfg))
        results.append(_result(evaluation, "abstained", "no adapter near enough", abstained, extra))
        if any(categories):
            nearest = _nearest(retrieved).tolist()
            is_other = [
                i >= 0 and categories[i] != step.category
                for i, step in zip(nearest, evaluation.steps, strict=True)
            ]
            share = accuracy(is_other, episodes, n=bootstrap, gen=_generator(cfg))
            results.append(_result(evaluation, "other_category", "nearest adapter", share, extra))
    return results


def _result(
    evaluation: Evaluation, quantity: str, subject: str, value: Accuracy, extra: dict[str, Any]
) -> Result:
    return Result(
        what=quantity,
        subject=subject,
        value=value.value,
        low=value.low,
        high=value.high,
        split=extra["domain"],
        n=value.n,
        experiment=evaluation.experiment,
        extra=extra | {"groups": value.groups},
    )


def _nearest(retrieved: Retrieved) -> Tensor:
    """The nearest adapter of each row, int64 [b]; -1 where it has none, as all have with k = 0."""
    if retrieved.indices.shape[1] == 0:
        return torch.full((len(retrieved.indices),), -1)
    return retrieved.indices[:, 0]


def _domains(run: Run, cfg: Config) -> Sequence[str]:
    """The domains that a run's numbers stand for; modes that know no domain stand in both."""
    if run.mode in ("bare", "oracle"):
        return cfg.evaluate.domains
    return (run.domain,)


def _generator(cfg: Config) -> Generator:
    """A new one for each number, so that one does not depend on which others were made before."""
    return Generator().manual_seed(cfg.seed)


# The report -------------------------------------------------------------------------------------------------
def _write_report(evaluation: Evaluation, rows: list[Result], folder: Path) -> Path:
    cfg = evaluation.cfg
    notes = [
        f"Answers are right {RULES[cfg.evaluate.rule]}; greedy decoding. An episode is right if all its "
        "steps are. Out of domain the adapter of a step's own task may not be chosen; the bare model and the "
        "oracle (the own adapter) are the same in both. In brackets 95 % intervals that resample episodes; p "
        "is of an exact sign-flip test by episode.",
        f"k = {cfg.retrieve.k}, {cfg.retrieve.weighting} weights, fusion by {cfg.fusion.rule}. "
        f"{evaluation.num_failed} answers failed and count as wrong.",
    ]
    page = report.write_report(
        folder,
        f"{evaluation.experiment}: adapters",
        # These are in none of the tables below; results.csv has every row.
        [row for row in rows if row.what in ("abstained", "other_category")],
        _figures(evaluation, rows),
        notes,
        tables=_tables(cfg, rows),
        summary=True,
    )
    report.write_results_csv(folder / "results.csv", rows)
    return page


def _domain_of(row: Result) -> str:
    return row.extra["domain"]


def _mode_of(row: Result) -> str:
    return row.extra["mode"]


def _tables(cfg: Config, rows: Sequence[Result]) -> list[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]:
    """(title, header, rows) of each table of the report."""
    tables = []
    for unit in ("Step", "Episode"):
        header, body = report.pivot(
            rows, down=_mode_of, across=_domain_of, metric=f"{unit.lower()}_accuracy", corner="Mode"
        )
        tables.append((f"{unit} accuracy", header, body))

    differences = []
    for row in rows:
        if row.what == "step_accuracy_difference":
            interval = f"{row.low:.3f} to {row.high:.3f}"
            differences.append((row.subject, row.split, row.value, interval, f"{row.extra['p']:.2g}"))
    if differences:
        header = ("Step accuracy", "", "Difference", "95 % interval", "p")
        tables.append(("Pairs, by episode", header, differences))

    recalls = [row for row in rows if row.what.startswith("recall_at_")]
    if recalls:
        header, body = report.pivot(recalls, down="subject", across="what")
        tables.append(("Retrieval of a step's own adapter", header, body))

    for domain in cfg.evaluate.domains:
        of_tasks = [
            row
            for row in rows
            if row.what == "task_accuracy"
            and row.split == DOMAINS[domain]
            and row.extra["k"] == cfg.retrieve.k
        ]
        header, body = report.pivot(of_tasks, down="task", across=_mode_of, corner="Task")
        tables.append((f"Step accuracy of each task, {DOMAINS[domain]}", header, body))
    return tables


def _figures(evaluation: Evaluation, rows: Sequence[Result]) -> dict[str, Any]:
    """{title: picture} of the report."""
    cfg, pool = evaluation.cfg, evaluation.pool
    # Vectors of a registry have length 1, so that products are cosines.
    cosines = (pool.vectors @ pool.vectors.T).tolist()
    figures = {"Similarity between adapters": plots.matrix(cosines, pool.names, pool.names, low=-1, high=1)}
    tasks = sorted({step.task for step in evaluation.steps})
    shares = _nearest_shares(evaluation, tasks)
    if shares:
        figures["How often each adapter is the nearest, by task"] = plots.matrix(
            shares, tasks, pool.names, x="nearest adapter", y="task"
        )
    bars = []
    for row in rows:
        if row.what == "step_accuracy" and row.extra["k"] == cfg.retrieve.k:
            bars.append((row.split, row.subject, row.value, row.low, row.high))
    figures["Step accuracy of each mode"] = plots.compare(bars, "step accuracy")
    by_k = _accuracy_by_k(rows)
    if cfg.evaluate.by_k and by_k:
        figures["Step accuracy of mixtures by k"] = plots.lines(
            by_k, "adapters in a mixture", "step accuracy"
        )
    return figures


def _nearest_shares(evaluation: Evaluation, tasks: Sequence[str]) -> list[list[float]]:
    """Share of a task's steps whose nearest adapter is each of the pool's, in domain: [task][adapter]."""
    in_domain = [
        retrieved
        for run, retrieved in evaluation.chosen.items()
        if run.mode in ("selection", "mixture", "fusion") and run.domain == "in"
    ]
    if not in_domain:
        return []
    # All these modes have the same nearest adapter, so that any of them will do.
    nearest = _nearest(in_domain[0])
    shares = []
    for task in tasks:
        rows = [i for i, step in enumerate(evaluation.steps) if step.task == task]
        of_task = nearest[rows]
        shares.append([float((of_task == i).float().mean()) for i in range(len(evaluation.pool.names))])
    return shares


def _accuracy_by_k(rows: Sequence[Result]) -> dict[str, dict[float, tuple[float, float, float]]]:
    """{domain: {k: (step accuracy, low, high)}} of mixtures."""
    lines: dict[str, dict[float, tuple[float, float, float]]] = {}
    for row in rows:
        if row.what == "step_accuracy" and row.subject.startswith("mixture"):
            lines.setdefault(row.split, {})[row.extra["k"]] = (row.value, row.low, row.high)
    return lines
