"""What training the retriever is worth: `python benches/train_retriever.py [seed ...]`, one seed a drawing of tasks.

60 drawn tasks; the retriever is trained on 20 samples each of 24 of them; the adapter vectors of all come from 20 samples of each, and 20
other samples of each ask for theirs among all 60. Recall of the tasks that training has not seen and of those it has, untrained and
trained, with 95 % intervals over tasks. Source of the protocol: Zhao et al. 2024 (LoraRetriever), arXiv:2402.09997, table 2.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from drawn_tasks import TaskConfig, draw_tasks
from torch import Tensor

from medvl.adapters.embed import embed_queries
from medvl.adapters.embed_config import EmbedConfig
from medvl.adapters.embedders import fit_local
from medvl.adapters.head import train_retriever, whiten_tasks
from medvl.adapters.retrieve import adapter_recall, adapter_vector
from medvl.adapters.retriever_config import RetrieverConfig

KS = (1, 3, 5)


def hits(samples: Tensor, queries: Tensor) -> dict[int, Tensor]:
    """{k: share of each task's queries whose task is among the k nearest adapter vectors, [t]}, of [t, m, e] and [t, q, e]."""
    vectors = torch.stack([adapter_vector(s) for s in samples])
    similarity = F.normalize(queries, dim=-1) @ vectors.T
    found = [adapter_recall(of, torch.full((len(of),), t), KS) for t, of in enumerate(similarity)]
    return {k: torch.tensor([f[k] for f in found], dtype=torch.float64) for k in KS}


def interval(values: Tensor, rounds: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high): 95 % bootstrap interval over tasks."""
    gen = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (rounds, len(values)), generator=gen)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return float(values.mean()), low, high


def compare(
    tasks: TaskConfig, cfg: RetrieverConfig, seen: int, few: int
) -> dict[str, dict[int, dict[str, tuple[float, float, float]]]]:
    """{tasks unseen or seen: {k: {way, or way - untrained: (mean, low, high)}}}; the differences are paired by task.

    `few` samples of each task are its adapter's, the others ask; the retriever learns from those of the first `seen` tasks. "whitened" has
    a closed form: what training must be worth more than to be worth its time.
    """
    drawn = draw_tasks(tasks)
    kept = [[s for i, s in enumerate(drawn) if (i % tasks.samples < few) == own] for own in (True, False)]
    texts, pictures = ([[s[1] for s in some] for some in kept], [[[s[2]] for s in some] for some in kept])
    embedder = fit_local(EmbedConfig(), texts[0], pictures[0])  # never sees what asks
    samples, queries = (
        embed_queries(embedder, t, p).unflatten(0, (tasks.tasks, -1))
        for t, p in zip(texts, pictures, strict=True)
    )
    known, names = samples[:seen].flatten(0, 1), [s[0] for s in kept[0][: seen * few]]
    heads = {"trained": train_retriever(cfg, known, names), "whitened": whiten_tasks(known, names)}
    ways = {"untrained": hits(samples, queries)} | {
        way: hits(samples @ head, queries @ head) for way, head in heads.items()
    }
    found: dict = {}
    for which, span in (("unseen", slice(seen, None)), ("seen", slice(0, seen))):
        found[which] = {}
        for k in KS:
            shares = {way: of[k][span] for way, of in ways.items()}
            gains = {f"{way} - untrained": shares[way] - shares["untrained"] for way in heads}
            found[which][k] = {way: interval(v) for way, v in (shares | gains).items()}
    return found


def report(found: dict) -> None:
    for which, rows in found.items():
        for k, ways in rows.items():
            said = "  ".join(
                f"{name} {m:.3f} ({low:.3f} to {high:.3f})" for name, (m, low, high) in ways.items()
            )
            print(f"{which:7s} recall@{k}  {said}")


if __name__ == "__main__":
    for seed in [int(a) for a in sys.argv[1:]] or [0]:
        start = time.perf_counter()
        found = compare(TaskConfig(seed=seed), RetrieverConfig(), 24, 20)
        print(f"seed {seed}, {time.perf_counter() - start:.0f} s")
        report(found)
        print(
            json.dumps(
                {
                    w: {k: {n: [round(x, 4) for x in v] for n, v in d.items()} for k, d in r.items()}
                    for w, r in found.items()
                }
            )
        )
