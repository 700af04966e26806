"""contrast: the naive formula is the peer; then what training is worth, of whole encoders too."""

import math

import pytest
import torch
from attrs import evolve

from medvl.adapters.contrast import draw_pairs, fit_encoder, task_contrast
from medvl.adapters.head import train_retriever
from medvl.adapters.recall import task_recall
from medvl.adapters.retriever_config import RetrieverConfig
from medvl.components.text import pool_tokens
from medvl.hub import skeletons
from medvl.weights import lora
from tests.adapters.drawn_vectors import drawn

SHORT = RetrieverConfig(steps=60, lr=5e-3, batch=32, negatives=8)


def triple(gen, b=4, p=3, d=6):
    return (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((b, d), (b, d), (b, p, d)))


def naive_contrast(anchor, positive, negatives, g):
    cos = lambda u, v: (
        sum(x * y for x, y in zip(u, v, strict=True))
        / math.sqrt(sum(x * x for x in u) * sum(y * y for y in v))
    )
    total = 0.0
    for a, plus, minus in zip(anchor.tolist(), positive.tolist(), negatives.tolist(), strict=True):
        top = math.exp(cos(a, plus) / g)
        total -= math.log(top / (top + sum(math.exp(cos(a, n) / g) for n in minus)))
    return total / len(anchor)


@pytest.mark.parametrize("g", [0.05, 0.3, 2.0])
def test_contrast_is_the_formula(gen, g):
    parts = list(triple(gen))
    assert abs(float(task_contrast(*parts, g)) - naive_contrast(*parts, g)) < 1e-12


def test_contrast_has_its_gradient(gen):
    parts = [t.requires_grad_() for t in triple(gen)]
    assert torch.autograd.gradcheck(lambda *t: task_contrast(*t, 0.2), parts)


def test_contrast_knows_only_directions_and_no_order_of_negatives(gen):
    a, plus, minus = triple(gen)
    want = task_contrast(a, plus, minus, 0.1)
    torch.testing.assert_close(task_contrast(3 * a, 0.1 * plus, 7 * minus.flip(1), 0.1), want)
    assert task_contrast(a, plus, minus, 1e-4).isfinite()
    assert task_contrast(a, a, -a[:, None], 0.1) < 1e-8 < 19 < task_contrast(a, -a, a[:, None], 0.1)


def test_contrast_errors(gen):
    a, plus, minus = triple(gen)
    for bad in (
        (a, plus[:2], minus),
        (a, plus, minus[:, :0]),
        (a, plus, minus[:, 0]),
        (a[:0], plus[:0], minus[:0]),
        (a[0], plus[0], minus),
    ):
        with pytest.raises(
            ValueError, match=r"task_contrast: anchor and positive must be \[b, d\] and negatives \[b, p, d\]"
        ):
            task_contrast(*bad, 0.1)
    for g in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            task_contrast(a, plus, minus, g)


TASKS = list("abcab") + list("cccbcacbacc")  # 4 of a, 4 of b, 8 of c, mixed up


def test_pairs_are_of_one_task_and_negatives_of_others():
    seen = {"anchor": [], "positive": [], "negative": []}
    for step in range(60):
        pairs = draw_pairs(TASKS, step, 0, 20, 3)
        assert (pairs.anchors.shape, pairs.positives.shape, pairs.negatives.shape) == ((20,), (20,), (20, 3))
        for a, plus, minus in zip(
            pairs.anchors.tolist(), pairs.positives.tolist(), pairs.negatives.tolist(), strict=True
        ):
            assert a != plus
            assert TASKS[a] == TASKS[plus]
            assert all(TASKS[n] != TASKS[a] for n in minus)
            seen["anchor"].append(a)
            seen["positive"].append((a, plus))
            seen["negative"] += [(a, n) for n in minus]
    counts = [sum(TASKS[a] == t for a in seen["anchor"]) for t in "abc"]
    assert all(330 < c < 470 for c in counts), "tasks count alike, whatever their size"
    everything = [(i, j) for i in range(len(TASKS)) for j in range(len(TASKS)) if i != j]
    assert set(seen["positive"]) == {(i, j) for i, j in everything if TASKS[i] == TASKS[j]}
    assert set(seen["negative"]) == {(i, j) for i, j in everything if TASKS[i] != TASKS[j]}


def test_pairs_are_pure_in_seed_and_step():
    draw = lambda step, seed: torch.cat([t.flatten() for t in vars_of(draw_pairs(TASKS, step, seed, 8, 2))])
    vars_of = lambda p: (p.anchors, p.positives, p.negatives)
    state = torch.random.get_rng_state()
    assert torch.equal(draw(3, 1), draw(3, 1))
    assert not torch.equal(draw(3, 1), draw(4, 1))
    assert not torch.equal(draw(3, 1), draw(3, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    numbers = torch.tensor(["abc".index(t) for t in TASKS])
    assert torch.equal(draw_pairs(numbers, 0, 0, 8, 2).negatives, draw_pairs(TASKS, 0, 0, 8, 2).negatives)


def test_pairs_errors():
    with pytest.raises(ValueError, match="draw_pairs: needs at least two tasks to tell apart, got 1"):
        draw_pairs(["x"] * 4, 0, 0, 2, 2)
    with pytest.raises(ValueError, match="draw_pairs: needs at least two tasks to tell apart, got 0"):
        draw_pairs([], 0, 0, 2, 2)
    with pytest.raises(ValueError, match=r"two samples or more, 'moles' has one \(1 such\)"):
        draw_pairs(["x", "x", "moles", "y", "y"], 0, 0, 2, 2)
    with pytest.raises(ValueError, match="batch and p must be at least 1, got 0 and 2"):
        draw_pairs(TASKS, 0, 0, 0, 2)


def test_tasks_held_out_choose_and_are_not_trained_on():
    vectors, tasks = drawn()
    trained, held = set(), ["t3", "t7", "t8", "t9", "t20"]

    def encode(params, rows):
        if torch.is_grad_enabled():
            trained.update(tasks[i] for i in rows.tolist())
        return vectors[rows] @ params["w"]

    start = {"w": torch.eye(24)}
    end = fit_encoder(SHORT, encode, start, tasks, held)
    assert trained == set(tasks) - set(held)
    assert torch.equal(start["w"], torch.eye(24))
    few = torch.tensor([t in held for t in tasks])
    was, now = (task_recall(vectors @ p["w"], tasks) for p in (start, end))
    assert now[1] > was[1]
    assert 0 < few.sum() < len(tasks)


def test_the_earliest_best_is_kept():
    """What tells the held-out tasks apart is noise to the others: training can only harm them, so the start is kept."""
    gen = torch.Generator().manual_seed(0)
    vectors, tasks = 0.1 * torch.randn(48, 8, generator=gen), [f"t{i // 8}" for i in range(48)]
    for i in range(48):
        vectors[i, i // 8 if i < 16 else 4 + i // 8 % 2] += 1.0
        vectors[i, 2] += 3 * torch.randn((), generator=gen) if i >= 16 else 0.0
    held, cfg = ["t0", "t1"], evolve(SHORT, every=10)
    assert not torch.equal(train_retriever(cfg, vectors, tasks), torch.eye(8))
    assert torch.equal(train_retriever(cfg, vectors, tasks, held), torch.eye(8))


def test_held_out_errors():
    vectors, tasks = drawn(4, 4)
    with pytest.raises(
        ValueError, match=r"every task held out must be among tasks, 'nobody' is not \(1 such\)"
    ):
        train_retriever(SHORT, vectors, tasks, ["t1", "nobody"])
    with pytest.raises(ValueError, match="fit_encoder: needs at least two tasks to tell apart, got 1"):
        train_retriever(SHORT, vectors, tasks, ["t0", "t1", "t2"])
    with pytest.raises(ValueError, match="'x' has one"):
        train_retriever(SHORT, vectors, ["x", *tasks[1:]], ["x"])


BERT = {
    "model_type": "bert",
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def sentences():
    """(skeleton, params, ids [n, t], mask, tasks): of nine tokens one is of the task, the others of any."""
    gen = torch.Generator().manual_seed(0)
    skeleton, params = skeletons.init_skeleton(BERT, gen)
    tasks = [f"t{i // 8}" for i in range(48)]
    ids = torch.randint(30, 99, (48, 9), generator=gen)
    ids.scatter_(1, torch.randint(0, 8, (48, 1), generator=gen), torch.arange(48)[:, None] // 8 + 5)
    mask = torch.arange(9) < torch.randint(8, 10, (48, 1), generator=gen)
    return skeleton, params, ids, mask, tasks


def embedded(sentences, params, rows):
    skeleton, _, ids, mask, _ = sentences
    hidden = skeleton(params, input_ids=ids[rows], attention_mask=mask[rows].long()).last_hidden_state
    return pool_tokens("mean", hidden, mask[rows])


CFG = RetrieverConfig(steps=25, lr=2e-3, batch=16, negatives=4)


def test_a_text_encoder_learns_its_tasks(sentences):
    _, params, _, _, tasks = sentences
    before = {n: t.clone() for n, t in params.items()}
    end = fit_encoder(CFG, lambda p, rows: embedded(sentences, p, rows), params, tasks)
    assert end.keys() == params.keys()
    assert all(torch.equal(params[n], t) for n, t in before.items())
    rows = torch.arange(48)
    was, now = (task_recall(embedded(sentences, p, rows), tasks)[1] for p in (params, end))
    assert now > was + 0.2, (was, now)


def test_an_adapter_of_a_text_encoder_learns_its_tasks(sentences, gen):
    skeleton, params, _, _, tasks = sentences
    adapter = lora.init_lora(lora.LoraConfig(rank=4, pattern="all-linear"), skeleton, gen)
    applied = lambda p: lora.apply_lora(params, evolve(adapter, factors=p))
    end = fit_encoder(
        evolve(CFG, lr=2e-2), lambda p, rows: embedded(sentences, applied(p), rows), adapter.factors, tasks
    )
    assert all((f["b"] == 0).all() for f in adapter.factors.values())
    rows = torch.arange(48)
    was, now = (task_recall(embedded(sentences, p, rows).detach(), tasks)[1] for p in (params, applied(end)))
    assert now > was + 0.2, (was, now)


def test_few_samples_at_a_time_give_the_same(sentences):
    _, params, _, _, tasks = sentences
    wide = {n: t.double() for n, t in params.items()}
    most = []

    def encode(p, rows):
        most.append(len(rows))
        return embedded(sentences, p, rows)

    whole, parts = (fit_encoder(evolve(CFG, steps=3, chunk=c), encode, wide, tasks) for c in (0, 7))
    assert max(most) > 30
    assert min(most[3:]) > 0
    assert max(most[3:]) == 7
    for n in wide:
        torch.testing.assert_close(parts[n], whole[n], rtol=0, atol=1e-7)
    assert any((whole[n] - wide[n]).abs().max() > 1e-3 for n in wide)


def test_encoder_errors(sentences):
    _, params, _, _, tasks = sentences
    with pytest.raises(
        ValueError, match=r"encode must give \[b, e\], here \[\d+, e\], got \[\d+, 9, 32\]; pool the tokens"
    ):
        fit_encoder(
            CFG,
            lambda p, rows: sentences[0](p, input_ids=sentences[2][rows]).last_hidden_state,
            params,
            tasks,
        )
    with pytest.raises(
        FloatingPointError, match=r"fit_encoder: the loss is nan at step 1; lower lr, now 0\.002"
    ):
        fit_encoder(CFG, lambda p, rows: p["w"][rows] * math.nan, {"w": torch.ones(48, 3)}, tasks)
