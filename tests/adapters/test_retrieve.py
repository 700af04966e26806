import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics.pairwise import cosine_similarity

from medvl.adapters.retrieve import (
    RetrieveConfig,
    adapter_recall,
    adapter_vector,
    query_vector,
    retrieve_adapters,
    used_adapters,
)


def dense_weights(retrieved, p):
    """Weights [b, p] over a pool of p adapters, 0 where a row does not use one."""
    dense = retrieved.weights.new_zeros(len(retrieved.weights), p)
    return dense.scatter_add(1, retrieved.indices.clamp(min=0), retrieved.weights)


NAN = math.nan


def _some(gen, b=6, p=9, d=16):
    return torch.randn(b, d, generator=gen), 3 * torch.randn(p, d, generator=gen)


def _bad(x, row, value):
    x = x.clone()
    x[row] = value
    return x


# Vectors --------------------------------------------------------------------------------------------------------------------------------
def test_adapter_vector_is_the_mean_of_unit_samples(gen):
    x = torch.randn(5, 8, generator=gen) * torch.tensor([1.0, 10.0, 0.1, 1e6, 1e-6])[:, None]
    mean = sum(row.double() / math.sqrt(sum(float(v) ** 2 for v in row)) for row in x) / 5
    torch.testing.assert_close(adapter_vector(x), (mean / mean.norm()).float())
    torch.testing.assert_close(adapter_vector(x[[3, 1, 4, 0, 2]]), adapter_vector(x))
    assert adapter_vector(x.bfloat16()).dtype == torch.float32


def test_cosine_picks_another_adapter_than_inner_product_on_raw_means():
    """A tight adapter has a long mean, a diverse one a short mean: inner product prefers the tight one even where it points elsewhere."""
    tight = torch.tensor([[0.8, 0.6, 0.0]] * 2)
    diverse = torch.tensor([[0.6, 0.0, 0.8], [0.6, 0.0, -0.8]])
    query = torch.tensor([[1.0, 0.0, 0.0]])
    raw = query @ torch.stack([tight.mean(0), diverse.mean(0)]).T
    assert raw.argmax() == 0
    found = retrieve_adapters(
        RetrieveConfig(k=1), query, torch.stack([adapter_vector(tight), adapter_vector(diverse)])
    )
    assert found.indices.tolist() == [[1]]
    torch.testing.assert_close(found.similarity, torch.ones(1, 1))


def test_query_vector_mixes_unit_vectors(gen):
    text, image = 7 * torch.randn(4, 8, generator=gen), torch.randn(4, 8, generator=gen) / 5
    mix = 0.7 * F.normalize(text, dim=1) + 0.3 * F.normalize(image, dim=1)
    torch.testing.assert_close(query_vector(text, image), F.normalize(mix, dim=1))
    torch.testing.assert_close(query_vector(text, image, (7, 3)), F.normalize(mix, dim=1))
    torch.testing.assert_close(query_vector(text, None), F.normalize(text, dim=1))
    torch.testing.assert_close(query_vector(None, image), F.normalize(image, dim=1))


@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.0, 1.0)])
def test_a_row_without_an_image_takes_its_text_alone(gen, shares):
    text, image = torch.randn(4, 8, generator=gen), torch.randn(4, 8, generator=gen)
    has = torch.tensor([True, False, True, False])
    got = query_vector(text, _bad(image, ~has, NAN), shares, has_image=has)
    assert torch.equal(query_vector(text, image.bfloat16(), shares, has_image=has)[~has], got[~has])
    torch.testing.assert_close(got[has], query_vector(text, image, shares)[has])
    torch.testing.assert_close(got[~has], query_vector(text, None)[~has])


# Retrieval ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_retrieve_equals_naive_loop_and_sklearn(gen, dtype):
    q, v = (x.to(dtype) for x in _some(gen))
    found = retrieve_adapters(RetrieveConfig(k=4), q, v)
    table = cosine_similarity(q.double().numpy(), v.double().numpy())
    for i in range(len(q)):
        order = sorted(range(len(v)), key=lambda j: (-table[i, j], j))[:4]
        assert found.indices[i].tolist() == order
        assert found.similarity[i].tolist() == pytest.approx(table[i, order], abs=1e-6)
    assert found.indices.dtype == torch.int64
    assert found.weights.tolist() == [[0.25] * 4] * 6
    assert not found.abstained.any()


def test_lengths_batch_and_autocast_do_not_matter(gen):
    q, v = _some(gen)
    found = retrieve_adapters(RetrieveConfig(k=3, weighting="softmax"), q, v)
    one = [
        retrieve_adapters(RetrieveConfig(k=3, weighting="softmax"), q[i : i + 1] * 10.0**i, v * 1e3)
        for i in range(6)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        low = retrieve_adapters(RetrieveConfig(k=3, weighting="softmax"), q, v)
    for field in ("indices", "similarity", "weights"):
        torch.testing.assert_close(torch.cat([getattr(o, field) for o in one]), getattr(found, field))
        assert torch.equal(getattr(low, field), getattr(found, field))


def test_equal_vectors_come_in_the_order_of_their_index(gen):
    """Also where the matrix product rounds equal columns differently, which for these shapes it does on common CPUs."""
    for p, d, b in ((7, 33, 1), (7, 33, 5), (13, 100, 3), (50, 1024, 1)):
        v = torch.randn(1, d, generator=gen).expand(p, d).contiguous()
        q = torch.randn(b, d, generator=gen)
        for order in (torch.arange(b), torch.arange(b).flip(0), torch.randperm(b, generator=gen)):
            found = retrieve_adapters(RetrieveConfig(k=4), q[order], v)
            assert found.indices.tolist() == [[0, 1, 2, 3]] * b
            assert (found.similarity == found.similarity[:, :1]).all()


def test_ties_among_other_vectors(gen):
    base = torch.randn(5, 40, generator=gen)
    copies = torch.randint(5, (31,), generator=gen)
    q, barred = torch.randn(8, 40, generator=gen), torch.rand(8, 31, generator=gen) < 0.3
    for rows in (torch.arange(8), torch.randperm(8, generator=gen), torch.tensor([5])):
        found = retrieve_adapters(RetrieveConfig(k=9), q[rows], base[copies], exclude=barred[rows])
        for i, row in enumerate(rows):
            rank = (
                torch.nn.functional.cosine_similarity(q[row : row + 1].double(), base.double())
                .argsort(descending=True)
                .argsort()
            )
            order = sorted((j for j in range(31) if not barred[row, j]), key=lambda j: (rank[copies[j]], j))
            assert found.indices[i].tolist() == order[:9]


def test_exclusion_by_pool_and_by_row(gen):
    q, v = _some(gen)
    free = retrieve_adapters(RetrieveConfig(k=9), q, v).indices
    pool = torch.zeros(9, dtype=torch.bool)
    pool[free[0, 0]] = True
    for barred in (pool, F.one_hot(free[:, 0], 9).bool()):
        found = retrieve_adapters(RetrieveConfig(k=2), q, v, exclude=barred).indices
        rows = barred.expand(6, 9)
        assert found.tolist() == [[j for j in free[i].tolist() if not rows[i, j]][:2] for i in range(6)]


def test_fewer_than_k(gen):
    q, v = _some(gen, b=3, p=4)
    barred = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]]).bool()
    for weighting in ("uniform", "softmax"):
        found = retrieve_adapters(RetrieveConfig(k=6, weighting=weighting), q, v, exclude=barred)
        assert (found.indices >= 0).sum(1).tolist() == [4, 1, 0]
        assert found.indices[1].tolist() == [2, -1, -1, -1, -1, -1]
        assert torch.equal(found.similarity.isnan(), found.indices < 0)
        assert torch.equal(found.weights == 0, found.indices < 0)
        torch.testing.assert_close(found.weights.sum(1), torch.tensor([1.0, 1.0, 0.0]))
        assert found.abstained.tolist() == [False, False, True]
    assert (
        retrieve_adapters(RetrieveConfig(k=2), q, v, exclude=torch.ones(4, dtype=torch.bool)).indices.tolist()
        == [[-1, -1]] * 3
    )


def test_abstention_is_of_the_row():
    v = torch.eye(3)
    q = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.5, 0.5], [-1.0, 0.0, 0.0]])
    found = retrieve_adapters(RetrieveConfig(k=2, threshold=0.7), q, v)
    assert found.abstained.tolist() == [False, True, True]
    assert found.indices.tolist() == [
        [0, 1],
        [-1, -1],
        [-1, -1],
    ]  # 0.6 stays: the best one decides for the row
    assert found.weights.tolist() == [[0.5, 0.5], [0, 0], [0, 0]]


def test_without_a_threshold_even_the_opposite_is_taken(gen):
    for _ in range(50):  # rounding puts some of these cosines below -1
        q = torch.randn(20, 7, generator=gen)
        assert not retrieve_adapters(
            RetrieveConfig(k=1), q, -q, exclude=~torch.eye(20, dtype=torch.bool)
        ).abstained.any()


@pytest.mark.parametrize("t", [0.2, 0.02, 1e-30])
def test_softmax_is_the_formula(gen, t):
    q, v = _some(gen)
    found = retrieve_adapters(
        RetrieveConfig(k=3, weighting="softmax", temperature=t), q, v, exclude=torch.arange(9) < 7
    )
    s = found.similarity[:, :2].double()
    naive = torch.stack(
        [
            torch.tensor(
                [1 / (1 + math.exp(min(700, (b - a) / t))), 1 / (1 + math.exp(min(700, (a - b) / t)))]
            )
            for a, b in s
        ]
    )
    torch.testing.assert_close(found.weights[:, :2], naive.float())
    assert not found.weights[:, 2].any()


def test_softmax_of_similarities_as_they_are_in_practice():
    """Similar adapters lie close: 0.2 is nearly uniform, 0.02 is not."""
    angles = torch.tensor([0.90, 0.84, 0.81]).acos()
    v = torch.stack([angles.cos(), angles.sin()], 1)
    for t in (0.2, 0.02):
        raw = [math.exp(s / t) for s in (0.90, 0.84, 0.81)]
        found = retrieve_adapters(
            RetrieveConfig(k=3, weighting="softmax", temperature=t), torch.tensor([[1.0, 0.0]]), v
        )
        assert found.weights[0].tolist() == pytest.approx([r / sum(raw) for r in raw], abs=1e-5)


def test_weights_by_similarity_pass_over_what_is_not_similar():
    v = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    q = torch.tensor([[0.6, 0.8, -0.1], [-1.0, -0.5, 0.0]])
    found = retrieve_adapters(RetrieveConfig(k=3, weighting="similarity"), q, v)
    assert found.indices.tolist() == [[1, 0, -1], [-1, -1, -1]]
    assert found.weights[0].tolist() == pytest.approx([8 / 14, 6 / 14, 0])
    assert found.weights[1].tolist() == [0, 0, 0]
    assert found.abstained.tolist() == [False, True]


def test_no_adapter_is_the_bare_model(gen):
    found = retrieve_adapters(RetrieveConfig(k=0), *_some(gen))
    assert found.indices.shape == found.similarity.shape == found.weights.shape == (6, 0)
    assert found.abstained.all()
    assert dense_weights(found, 9).tolist() == [[0.0] * 9] * 6
    ids, weights = used_adapters(found)
    assert ids.tolist() == []
    assert weights.shape == (6, 0)


def test_ten_thousand_adapters(gen):
    v, q = torch.randn(10_000, 1024, generator=gen), torch.randn(64, 1024, generator=gen)
    v[5000] = v[7000] = q[3] * 2
    found = retrieve_adapters(RetrieveConfig(k=3), q, v)
    assert found.indices[3, :2].tolist() == [5000, 7000]
    table = torch.from_numpy(cosine_similarity(q.numpy(), v.numpy()))
    torch.testing.assert_close(found.similarity, table.topk(3).values)
    torch.testing.assert_close(table.gather(1, found.indices), found.similarity)


# Weights --------------------------------------------------------------------------------------------------------------------------------
def test_dense_weights_and_the_subset_agree(gen):
    q, v = _some(gen, b=3)
    barred = torch.zeros(3, 9, dtype=torch.bool)
    barred[1], barred[2, :7] = True, True
    found = retrieve_adapters(RetrieveConfig(k=3, weighting="softmax"), q, v, exclude=barred)
    naive = [[0.0] * 9 for _ in range(3)]
    for i in range(3):
        for j, w in zip(found.indices[i].tolist(), found.weights[i].tolist(), strict=True):
            if j >= 0:
                naive[i][j] = w
    dense = dense_weights(found, 9)
    assert dense.tolist() == naive
    ids, few = used_adapters(found)
    assert ids.tolist() == sorted({*found.indices.flatten().tolist()} - {-1})
    assert torch.equal(dense[:, ids], few)
    assert few.sum() == dense.sum()


# Recall ---------------------------------------------------------------------------------------------------------------------------------
def test_recall_at(gen):
    q, v = _some(gen, b=40)
    v[4], truth = v[2], torch.randint(9, (40,), generator=gen)
    found, table = (
        retrieve_adapters(RetrieveConfig(k=9), q, v),
        torch.from_numpy(cosine_similarity(q.numpy(), v.numpy())),
    )
    table[:, 4] = table[:, 2]
    naive = {
        k: sum(int(truth[i]) in sorted(range(9), key=lambda j: (-table[i, j], j))[:k] for i in range(40)) / 40
        for k in (1, 3, 9)
    }
    assert adapter_recall(found, truth, (1, 3, 9)) == pytest.approx(naive)
    assert adapter_recall(table, truth, (1, 3, 9)) == pytest.approx(naive)
    assert 0 < naive[1] < naive[3] < naive[9] == 1
    assert adapter_recall(retrieve_adapters(RetrieveConfig(k=3, threshold=1.0), q, v), truth, [3]) == {3: 0.0}


# Errors ---------------------------------------------------------------------------------------------------------------------------------
Q, V = torch.eye(4)[:3], torch.eye(4)
CFG = RetrieveConfig(k=2)
FOUND = retrieve_adapters(CFG, Q, V)
ERRORS = {
    "k": (lambda: RetrieveConfig(k=-1), r"k must be a whole number of 0 to 65,536, got -1"),
    "k is a bool": (lambda: RetrieveConfig(k=True), r"k must be a whole number of 0 to 65,536, got True"),
    "k is no whole number": (
        lambda: RetrieveConfig(k=1.5),
        r"k must be a whole number of 0 to 65,536, got 1.5",
    ),
    "weighting": (lambda: RetrieveConfig(weighting="best"), r"weighting must be .*, got 'best'"),
    "temperature": (
        lambda: RetrieveConfig(temperature=0.0),
        r"temperature must be finite and above 0, got 0.0",
    ),
    "temperature nan": (
        lambda: RetrieveConfig(temperature=NAN),
        r"temperature must be finite and above 0, got nan",
    ),
    "threshold": (
        lambda: RetrieveConfig(threshold=1.5),
        r"threshold is a cosine and must be within -1..1, got 1.5",
    ),
    "threshold nan": (lambda: RetrieveConfig(threshold=NAN), r"within -1..1, got nan"),
    "samples nan": (
        lambda: adapter_vector(_bad(V, 2, NAN)),
        r"every row of embeddings must be finite .* row 2 has length nan \(1 such\)",
    ),
    "samples zero": (lambda: adapter_vector(_bad(V, 1, 0)), r"adapter_vector: .* row 1 has length 0.0"),
    "samples inf": (lambda: adapter_vector(_bad(V, 0, math.inf)), r"row 0 has length inf"),
    "samples huge": (
        lambda: adapter_vector(_bad(V, 0, 1e30)),
        r"row 0 has length inf|row 0 has length 2e\+30",
    ),
    "samples shape": (
        lambda: adapter_vector(V[0]),
        r"embeddings must be floating point \[m, d\].*, got float32 \[4\]",
    ),
    "no samples": (lambda: adapter_vector(V[:0]), r"m and d above 0, got float32 \[0, 4\]"),
    "whole numbers": (
        lambda: adapter_vector(V.long()),
        r"must be floating point \[m, d\].*, got int64 \[4, 4\]",
    ),
    "samples cancel": (
        lambda: adapter_vector(torch.cat([V, -V])),
        r"adapter_vector: unit vectors must not cancel out.* row 0 has length",
    ),
    "nothing": (
        lambda: query_vector(None, None),
        r"query_vector: must have text, image or both, got neither",
    ),
    "query shapes": (
        lambda: query_vector(Q, V),
        r"text and image must both be \[b, d\], got .*\[3, 4\].* and .*\[4, 4\]",
    ),
    "query cancels": (lambda: query_vector(Q, -Q, (1, 1)), r"query_vector: unit vectors must not cancel out"),
    "shares": (
        lambda: query_vector(Q, Q, (0.5, -0.5)),
        r"shares must be two numbers >= 0, one above 0, got \(0.5, -0.5\)",
    ),
    "shares zero": (lambda: query_vector(Q, Q, (0, 0)), r"shares must be two numbers >= 0"),
    "text nan": (
        lambda: query_vector(_bad(Q, 1, NAN), Q),
        r"every row of text must be finite .* row 1 has length nan",
    ),
    "image nan": (
        lambda: query_vector(Q, _bad(Q, 2, NAN)),
        r"every row of image must be finite .* row 2 has length nan",
    ),
    "mask": (
        lambda: query_vector(Q, Q, has_image=torch.ones(3)),
        r"has_image must be bool \[3\], got torch.float32 \[3\]",
    ),
    "mask without image": (
        lambda: query_vector(Q, None, has_image=torch.ones(3).bool()),
        r"has_image must agree .* image False",
    ),
    "rows with nothing": (
        lambda: query_vector(None, Q, has_image=torch.zeros(3).bool()),
        r"has_image must agree .* text False",
    ),
    "query nan": (
        lambda: retrieve_adapters(CFG, _bad(Q, 1, NAN), V),
        r"retrieve: every row of queries must be finite .* row 1 has length nan",
    ),
    "vector zero": (
        lambda: retrieve_adapters(CFG, Q, _bad(V, 3, 0)),
        r"retrieve: every row of vectors must be .* row 3 has length 0.0",
    ),
    "widths": (
        lambda: retrieve_adapters(CFG, Q[:, :3], V),
        r"queries must be \[b, d\] and vectors \[p, d\], p >= 1, got .*\[3, 3\]",
    ),
    "no vectors": (lambda: retrieve_adapters(CFG, Q, V[:0]), r"p >= 1, got .*\[0, 4\]"),
    "one query": (lambda: retrieve_adapters(CFG, Q[0], V), r"queries must be \[b, d\]"),
    "devices": (lambda: retrieve_adapters(CFG, Q, V.to("meta")), r"on one device, got cpu and meta"),
    "exclude dtype": (
        lambda: retrieve_adapters(CFG, Q, V, exclude=torch.ones(4)),
        r"exclude must be bool \[4\] or \[3, 4\], got torch.float32 \[4\]",
    ),
    "exclude shape": (
        lambda: retrieve_adapters(CFG, Q, V, exclude=torch.ones(3).bool()),
        r"exclude must be bool \[4\] or \[3, 4\], got .* \[3\]",
    ),
    "truth below 0": (
        lambda: adapter_recall(FOUND, torch.tensor([0, -1, 2]), [1]),
        r"truth must be the index .*, got \[0, -1, 2\]",
    ),
    "truth above p": (
        lambda: adapter_recall(V, torch.tensor([0, 4, 2, 1]), [1]),
        r"0..3, got \[0, 4, 2, 1\]",
    ),
    "truth shape": (
        lambda: adapter_recall(FOUND, torch.tensor([0, 1]), [1]),
        r"truth int64 \[b\], got \[3, 2\] and int64 \[2\]",
    ),
    "recall k": (
        lambda: adapter_recall(FOUND, torch.tensor([0, 1, 2]), [1, 3]),
        r"every k must be within 1..2, got \[1, 3\]",
    ),
    "no recall k": (
        lambda: adapter_recall(FOUND, torch.tensor([0, 1, 2]), []),
        r"every k must be within 1..2, got \[\]",
    ),
    "recall nan": (
        lambda: adapter_recall(_bad(V, 2, NAN), torch.arange(4), [1]),
        r"similarities must be finite, row 2",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
