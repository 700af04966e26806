"""slide_classify: a naive loop is the peer."""

import math
import re

import pytest
import torch

from medvl.base.tree import flatten, map_leaves
from medvl.slides.heads import classes_of, init_heads, label_logits, label_loss

CLASSES = {"class": 4, "motif": 2, "grade": 3}
D = 5


@pytest.fixture
def heads(gen):
    """Weights and biases all random, float64: init's biases are 0."""
    made = init_heads(D, CLASSES, gen, hidden=7)
    return map_leaves(lambda t: torch.randn(t.shape, generator=gen, dtype=torch.float64), made)


def _naive(p, tokens):
    """Logits of one slide [k, d], token by token and number by number."""
    dot = lambda layer, i, x: (
        sum(float(w) * v for w, v in zip(layer["weight"][i], x, strict=True)) + float(layer["bias"][i])
    )
    scores = []
    for t in tokens.tolist():
        gated = [math.tanh(dot(p["tanh"], i, t)) / (1 + math.exp(-dot(p["sigmoid"], i, t))) for i in range(7)]
        scores.append(dot(p["score"], 0, gated))
    shares = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
    mean = [sum(a * t[j] for a, t in zip(shares, tokens.tolist(), strict=True)) for j in range(D)]
    return [dot(p["out"], c, mean) for c in range(len(p["out"]["bias"]))]


def test_logits_are_those_of_a_loop(heads, gen):
    tokens = torch.randn(3, 6, D, generator=gen, dtype=torch.float64)
    found = label_logits(heads, tokens)
    assert list(found) == list(CLASSES)
    for name, n in CLASSES.items():
        assert found[name].shape == (3, n)
        naive = torch.tensor([_naive(heads[name], t) for t in tokens], dtype=torch.float64)
        torch.testing.assert_close(found[name], naive, rtol=1e-12, atol=1e-12)
    for i in range(3):  # a slide alone, its tokens in another order
        alone = label_logits(heads, tokens[i : i + 1, torch.randperm(6, generator=gen)])
        for name, x in alone.items():
            torch.testing.assert_close(x[0], found[name][i], rtol=1e-12, atol=1e-12)


def test_heads_at_the_start(gen):
    made = init_heads(D, CLASSES, gen, hidden=200)
    assert {n: tuple(t.shape) for n, t in flatten(made["grade"]).items()} == {
        "tanh/weight": (200, D),
        "tanh/bias": (200,),
        "sigmoid/weight": (200, D),
        "sigmoid/bias": (200,),
        "score/weight": (1, 200),
        "score/bias": (1,),
        "out/weight": (3, D),
        "out/bias": (3,),
    }
    assert {t.dtype for t in flatten(made).values()} == {torch.float32}
    assert float(made["class"]["tanh"]["weight"].std()) == pytest.approx(D**-0.5, rel=0.05)
    assert float(made["class"]["score"]["weight"].std()) == pytest.approx(200**-0.5, rel=0.15)
    again = init_heads(D, CLASSES, torch.Generator().manual_seed(0), hidden=200)
    assert all(torch.equal(t, flatten(again)[n]) for n, t in flatten(made).items())


def test_loss_is_the_mean_of_labels_over_the_slides_that_have_them(gen):
    logits = {
        n: torch.randn(4, c, generator=gen, dtype=torch.float64, requires_grad=True)
        for n, c in CLASSES.items()
    }
    labels = {
        "class": torch.tensor([0, 3, 1, 2]),
        "motif": torch.tensor([-1, 1, -1, -1]),
        "grade": torch.tensor([-1, -1, -1, -1]),
    }
    loss, right = label_loss(logits, labels | {"mask": torch.ones(7)})
    total = 0.0
    for name, y in labels.items():
        known = [i for i in range(4) if y[i] >= 0]
        each = [
            math.log(sum(map(math.exp, logits[name][i].tolist()))) - float(logits[name][i, y[i]].detach())
            for i in known
        ]
        total += sum(each) / max(1, len(known)) / 3
        hits = [
            int(max(range(CLASSES[name]), key=logits[name][i].tolist().__getitem__) == int(y[i]))
            for i in known
        ]
        assert float(right[name]) == pytest.approx(sum(hits) / max(1, len(known)))
    assert float(loss.detach()) == pytest.approx(total, rel=1e-12)
    loss.backward()
    assert not logits["grade"].grad.any()
    assert logits["motif"].grad.any(1).tolist() == [False, True, False, False]
    assert logits["class"].grad.any(1).all()


def test_a_slide_without_labels_changes_nothing(heads, gen):
    tokens = torch.randn(3, 6, D, generator=gen, dtype=torch.float64)
    labels = {n: torch.tensor([0, 1, 1]) for n in CLASSES}
    loss, right = label_loss(label_logits(heads, tokens), labels)
    far = torch.cat([tokens, torch.full((1, 6, D), 50.0, dtype=torch.float64)])
    more, again = label_loss(
        label_logits(heads, far), {n: torch.cat([y, torch.tensor([-1])]) for n, y in labels.items()}
    )
    torch.testing.assert_close(more, loss, rtol=1e-12, atol=0)
    assert {n: float(r) for n, r in again.items()} == {n: float(r) for n, r in right.items()}


def test_heads_learn_what_one_token_says(gen):
    """The label stands in one token of eight, at any place."""
    x = torch.randn(64, 8, D, generator=gen)
    y = torch.arange(64) % 2
    x[torch.arange(64), torch.randint(8, (64,), generator=gen), 0] = torch.where(y == 1, 6.0, -6.0)
    params = map_leaves(lambda t: t.requires_grad_(), init_heads(D, {"seen": 2}, gen, hidden=16))
    optimizer = torch.optim.Adam(flatten(params).values(), lr=0.02)
    for _ in range(60):
        loss, right = label_loss(label_logits(params, x), {"seen": y})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(right["seen"]) == 1.0
    assert loss.item() < 0.05


def test_classes_of_a_table():
    rows = [{"a": "x", "b": "2"}, {"a": "", "b": "10"}, {"a": "w", "b": "2"}]
    assert classes_of(rows, ["b", "a"]) == {"b": ["10", "2"], "a": ["w", "x"]}
    with pytest.raises(ValueError, match=r"column 'a' must have two classes or more, found \['x'\]"):
        classes_of(rows[:2], ["b", "a"])
    with pytest.raises(ValueError, match=r"column 'a' must have two classes or more, found \[\]"):
        classes_of([], ["a"])


def test_errors(heads, gen):
    with pytest.raises(
        ValueError, match=re.escape("init_heads: needs labels of two classes or more, got {}")
    ):
        init_heads(D, {}, gen)
    with pytest.raises(ValueError, match=re.escape("two classes or more, got {'a': 2, 'b': 1}")):
        init_heads(D, {"a": 2, "b": 1}, gen)
    for shape in ((6, D), (2, 6, D + 1)):
        with pytest.raises(
            ValueError,
            match=rf"label_logits: tokens must be \[b, k, 5\], got \[{', '.join(map(str, shape))}\]",
        ):
            label_logits(heads, torch.zeros(shape, dtype=torch.float64))
    logits = {"a": torch.zeros(3, 2)}
    with pytest.raises(
        ValueError, match=r"label_loss: label 'a' must be \[3\], a class for each slide, got \[2\]"
    ):
        label_loss(logits, {"a": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"label 'a' must be \[3\], a class for each slide, got only b"):
        label_loss(logits, {"b": torch.zeros(3, dtype=torch.int64)})


def test_heads_that_read_every_token_in_its_place(gen):
    params = init_heads(6, {"class": 3, "grade": 2}, gen, slots=4)
    tokens = torch.randn(5, 4, 6, generator=gen)
    got = label_logits(params, tokens)
    for name, n in (("class", 3), ("grade", 2)):
        w, b = params[name]["out"]["weight"], params[name]["out"]["bias"]
        assert w.shape == (n, 24)
        torch.testing.assert_close(got[name], tokens.reshape(5, 24) @ w.T + b)
    with pytest.raises(ValueError, match=r"tokens must be \[b, k, d\] with k d = 24, got \[5, 3, 6\]"):
        label_logits(params, tokens[:, :3])
