"""head: what it is worth on tasks it has not seen; whitened samples differ alike in all directions."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from attrs import evolve

from medvl.adapters import head
from medvl.adapters.head import train_retriever, whiten_tasks
from medvl.adapters.recall import task_recall
from medvl.adapters.retriever_config import RetrieverConfig
from tests.adapters.drawn_vectors import drawn

ROOT = Path(__file__).resolve().parents[2]
SHORT = RetrieverConfig(steps=60, lr=5e-3, batch=32, negatives=8)


def test_untrained_it_is_the_embedder():
    vectors, tasks = drawn(4, 4)
    assert torch.equal(train_retriever(evolve(SHORT, steps=0), vectors, tasks), torch.eye(24))
    assert torch.equal(train_retriever(evolve(SHORT, steps=0, dims=5), vectors, tasks), torch.eye(24)[:, :5])


@pytest.mark.parametrize(("dims", "gain"), [(0, 0.2), (12, 0.1)])
def test_trained_it_finds_tasks_it_has_not_seen(dims, gain):
    vectors, tasks = drawn()
    seen, unseen = slice(0, 144), slice(144, None)
    before = vectors.clone()
    head = train_retriever(evolve(SHORT, dims=dims), vectors[seen], tasks[seen])
    assert torch.equal(vectors, before)
    assert head.shape == (24, dims or 24)
    start = torch.eye(24, dims or 24)
    for part in (seen, unseen):
        was, now = (task_recall(vectors[part] @ h, tasks[part])[1] for h in (start, head))
        assert now > was + gain, (was, now)
    assert torch.equal(train_retriever(evolve(SHORT, dims=dims), vectors[seen], tasks[seen]), head)
    assert not torch.equal(
        train_retriever(evolve(SHORT, dims=dims, seed=1), vectors[seen], tasks[seen]), head
    )


def test_weight_decay_pulls_to_the_embedder():
    vectors, tasks = drawn(6, 6)
    moved = [
        float((train_retriever(evolve(SHORT, weight_decay=w), vectors, tasks) - torch.eye(24)).norm())
        for w in (0.0, 10.0, 100.0)
    ]
    assert moved[0] > 1.2 * moved[1] > 1.5 * moved[2] > 0


def test_wider_vectors_give_wider_heads():
    vectors, tasks = drawn(4, 4)
    low, mid, high = (
        train_retriever(evolve(SHORT, steps=5), vectors.to(t), tasks)
        for t in (torch.bfloat16, torch.float32, torch.float64)
    )
    assert (low.dtype, mid.dtype, high.dtype) == (torch.float32, torch.float32, torch.float64)
    torch.testing.assert_close(mid.double(), high, rtol=0, atol=1e-4)


def test_head_errors():
    vectors, tasks = drawn(4, 4)
    bad = vectors.clone()
    bad[3, 2] = math.nan
    bad[5] = math.inf
    with pytest.raises(
        ValueError, match=r"train_retriever: vectors must be finite and not zero, row 3 is not \(2 such\)"
    ):
        train_retriever(SHORT, bad, tasks)
    with pytest.raises(ValueError, match="finite and not zero, row 0"):
        train_retriever(SHORT, vectors * (torch.arange(16) > 0)[:, None], tasks)
    with pytest.raises(
        ValueError, match=r"floating point \[n, d\] and tasks \[n\], got float32 \[16, 24\] and 15"
    ):
        train_retriever(SHORT, vectors, tasks[:-1])
    with pytest.raises(ValueError, match=r"got int64 \[16, 24\]"):
        train_retriever(SHORT, vectors.long(), tasks)
    with pytest.raises(ValueError, match=r"dims must be within 0\.\.24"):
        train_retriever(evolve(SHORT, dims=25), vectors, tasks)
    with pytest.raises(ValueError, match="'lonely' has one"):
        train_retriever(SHORT, vectors, [*tasks[:-1], "lonely"])
    with pytest.raises(ValueError, match="at least two tasks to tell apart, got 1"):
        train_retriever(SHORT, vectors, ["x"] * 16)


def test_whitened_samples_differ_alike_in_all_directions():
    vectors, tasks = drawn(12, 40)
    z = vectors.double() @ whiten_tasks(vectors.double(), tasks, 1e-9)
    within = (z.unflatten(0, (12, 40)) - z.unflatten(0, (12, 40)).mean(1, keepdim=True)).flatten(0, 1)
    covariance = within.T @ within / len(within)
    torch.testing.assert_close(
        covariance,
        covariance.trace() / 24 * torch.eye(24, dtype=torch.float64),
        rtol=0,
        atol=1e-7 * covariance.max(),
    )
    torch.testing.assert_close(whiten_tasks(vectors, tasks, 1e7), torch.eye(24), rtol=0, atol=1e-5)
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    mixed = whiten_tasks(3 * vectors[order], [tasks[i] for i in order])
    torch.testing.assert_close(mixed, whiten_tasks(vectors, tasks), rtol=0, atol=1e-5)


def test_whitened_it_finds_tasks_it_has_not_seen():
    vectors, tasks = drawn()
    head = whiten_tasks(vectors[:144], tasks[:144])
    was, now = (task_recall(vectors[144:] @ h, tasks[144:])[1] for h in (torch.eye(24), head))
    assert now > was + 0.2, (was, now)


def test_whitening_errors():
    vectors, tasks = drawn(4, 4)
    with pytest.raises(ValueError, match="whiten_tasks: shrink must be finite and above 0, got 0"):
        whiten_tasks(vectors, tasks, 0.0)
    with pytest.raises(ValueError, match="whiten_tasks: samples of a task must differ"):
        whiten_tasks(torch.eye(4).repeat_interleave(4, 0), tasks)
    with pytest.raises(
        ValueError, match="whiten_tasks: every task must have two samples or more, 'x' has one"
    ):
        whiten_tasks(vectors, ["x", *tasks[1:]])
    with pytest.raises(ValueError, match="whiten_tasks: vectors must be finite and not zero, row 0"):
        whiten_tasks(vectors / (torch.arange(16) > 0)[:, None], tasks)


def test_the_head_of_each_kind(gen):
    x, tasks = torch.randn(12, 4, generator=gen), [i % 3 for i in range(12)]
    assert head.head_of(RetrieverConfig(kind="none"), x, tasks) is None
    assert head.head_of(RetrieverConfig(steps=0), x, tasks) is None
    assert torch.equal(
        head.head_of(RetrieverConfig(kind="whiten", shrink=0.3), x, tasks),
        head.whiten_tasks(x, tasks, 0.3),
    )
    cfg = RetrieverConfig(steps=2, batch=4, negatives=2)
    assert torch.equal(head.head_of(cfg, x, tasks), head.train_retriever(cfg, x, tasks))


def test_of_drawn_imaging_tasks_it_finds_those_it_has_not_seen(monkeypatch):
    """benches/train_retriever.py, shorter."""
    monkeypatch.syspath_prepend(ROOT / "benches")  # as for a script of that folder
    spec = importlib.util.spec_from_file_location("train_retriever", ROOT / "benches" / "train_retriever.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.compare(bench.TaskConfig(tasks=30, samples=20), RetrieverConfig(steps=500), 15, 12)
    for way in ("trained", "whitened"):
        mean, low, high = found["unseen"][1][f"{way} - untrained"]
        assert 0 < low < mean < high
        assert found["unseen"][1][way][0] - found["unseen"][1]["untrained"][0] == pytest.approx(mean)
