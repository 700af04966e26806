"""weights: every kind against the formula it stands for, in every way a model may use it."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medvl.hub import skeletons
from medvl.training import trace
from medvl.weights import four_bit
from medvl.weights import lazy as weights
from medvl.weights.extended import extend_table
from tests import tiny


def parts(out=12, into=10, r=4, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=gen, dtype=dtype) for s in ((out, into), (r, into), (out, r))]


X = torch.randn(3, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


# The formula ----------------------------------------------------------------------------------------------------------------------------
def test_low_rank_is_the_sum():
    w, a, b = parts()
    lazy = weights.low_rank(w, a, b, scale=0.5, gate=torch.tensor([1.0, -2, 0, 3]).double())
    dense = w + 0.5 * (b * torch.tensor([1.0, -2, 0, 3])) @ a
    bias = torch.randn(12).double()
    torch.testing.assert_close(F.linear(X, lazy, bias), F.linear(X, dense, bias), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.dense(lazy), dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        nn.functional.linear(X[0, 0], lazy), dense @ X[0, 0], rtol=0, atol=1e-12
    )  # one row, no batch


def test_a_gate_per_sample_belongs_to_its_rows():
    w, a, b = parts()
    gate = torch.randn(3, 4).double()
    each = [w + (b * g) @ a for g in gate]
    want = torch.stack([F.linear(x, d) for x, d in zip(X, each, strict=True)])
    lazy = weights.low_rank(w, a, b, gate=gate)
    torch.testing.assert_close(F.linear(X, lazy), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        F.linear(X[:, -1], lazy), want[:, -1], rtol=0, atol=1e-12
    )  # the last token only


def test_rows_of_a_tower_find_their_sample():
    """Sample 0 has one visual token, sample 1 none, sample 2 two; a tower may see tokens, four patches for each, or tiles of several."""
    w, a, b = parts()
    gate, of = torch.randn(3, 4).double(), torch.tensor([0, 2, 2])
    lazy = weights.low_rank(w, a, b, gate=gate, rows=of)
    for repeat in (1, 4):
        x, who = torch.randn(3 * repeat, 10).double(), of.repeat_interleave(repeat)
        want = torch.stack([F.linear(r, w + (b * gate[i]) @ a) for r, i in zip(x, who, strict=True)])
        torch.testing.assert_close(F.linear(x, lazy), want, rtol=0, atol=1e-12)
    lazy = weights.low_rank(w, a, b, gate=gate, rows=of.repeat_interleave(4))  # each tile becomes four tokens
    tiles = torch.randn(3, 7, 10).double()
    want = torch.stack([F.linear(t, w + (b * gate[i]) @ a) for t, i in zip(tiles, of, strict=True)])
    torch.testing.assert_close(F.linear(tiles, lazy), want, rtol=0, atol=1e-12)


def test_a_router_mixes_experts_by_token():
    w, a, b = parts()
    router = torch.randn(2, 10).double()
    share = (X @ router.T).softmax(-1)
    want = X @ w.T + sum(
        3.0 * share[..., i : i + 1] * (X @ a[2 * i : 2 * i + 2].T @ b[:, 2 * i : 2 * i + 2].T) for i in (0, 1)
    )
    torch.testing.assert_close(
        F.linear(X, weights.low_rank(w, a, b, scale=3, router=router)), want, rtol=0, atol=1e-12
    )


def test_conv1d_and_embedding():
    w, a, b = parts()
    x, bias = X.flatten(0, 1), torch.randn(12).double()
    lazy = weights.low_rank(w.T.contiguous(), a, b, kind="conv1d")
    want = F.linear(x, w + b @ a, bias)
    torch.testing.assert_close(torch.addmm(bias, x, lazy), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.dense(lazy), (w + b @ a).T, rtol=0, atol=1e-12)
    table, a, b = torch.randn(20, 6).double(), torch.randn(4, 20).double(), torch.randn(6, 4).double()
    ids, gate = torch.randint(20, (3, 5)), torch.randn(3, 4).double()
    lazy = weights.low_rank(table, a, b, kind="embedding")
    torch.testing.assert_close(F.embedding(ids, lazy), (table + (b @ a).T)[ids], rtol=0, atol=1e-12)
    each = torch.stack([(table + ((b * g) @ a).T)[i] for g, i in zip(gate, ids, strict=True)])
    torch.testing.assert_close(
        F.embedding(ids, weights.low_rank(table, a, b, gate=gate, kind="embedding")), each, rtol=0, atol=1e-12
    )
    h = torch.randn(2, 6).double()
    assert torch.equal(
        F.linear(h, lazy), F.linear(h, table)
    )  # a tied head does not see the embedding's correction
    head = weights.low_rank(lazy, torch.randn(2, 6).double(), torch.randn(20, 2).double())
    assert torch.equal(F.embedding(ids, head), F.embedding(ids, lazy))  # nor the embedding the head's


def test_kinds_nest():
    w, a, b = parts(dtype=torch.float32)
    x = X.float()
    q = four_bit.quantize_matrix(w)
    twice = weights.low_rank(weights.low_rank(q, a, b), 2 * a, b, scale=0.5)
    want = F.linear(x, weights.dense(q) + 2 * b @ a)
    torch.testing.assert_close(F.linear(x, twice), want, rtol=0, atol=1e-5)
    assert repr(twice) == (
        "LowRank([12, 10], linear, rank 4 over LowRank([12, 10], linear, rank 4 over FourBit([12, 10], nf4 for float32)))"
    )
    hidden = weights.passed(weights.low_rank(w, a, b, kind="linear"))
    assert F.linear(x, hidden) is x


def test_precision_is_the_wider_of_base_and_adapter():
    """A float32 adapter on bfloat16 weights: added in float32 and rounded once."""
    w, a, b = parts(dtype=torch.float32)
    x = X.bfloat16()
    want = (F.linear(x, w.bfloat16()) + F.linear(F.linear(x.float(), a), b)).bfloat16()
    out = F.linear(x, weights.low_rank(w.bfloat16(), a, b))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(X.float(), weights.low_rank(w, a, b)).dtype == torch.bfloat16
        torch.testing.assert_close(
            F.linear(X.float(), weights.low_rank(four_bit.quantize_matrix(w), a, b)).float(),
            want.float(),
            rtol=0.1,
            atol=0.5,
        )


def test_an_adapter_in_training_is_the_sum_and_its_gradient():
    """In float64 by its formula, with an input that is dropped and without."""
    w, a, b = parts()
    bias = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    leaves = [t.clone().requires_grad_() for t in (X, a, b)]

    def ours(x, a, b, dropped=None):
        return weights._Corrected.apply(x, x if dropped is None else dropped, a, b, w, bias, 0.7)

    torch.testing.assert_close(
        ours(X, a, b), F.linear(X, w, bias) + 0.7 * F.linear(F.linear(X, a), b), rtol=0, atol=1e-12
    )
    assert torch.autograd.gradcheck(ours, leaves)
    dropped = F.dropout(X, 0.5).requires_grad_()
    assert torch.autograd.gradcheck(ours, [*leaves, dropped])
    # A frozen adapter keeps its narrow output alone.
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(leaves[0], a, b)
    assert all(t.shape != X.shape for t in kept)
    dense = w + 0.7 * b @ a
    (got,) = torch.autograd.grad(y.sum(), leaves[0])
    torch.testing.assert_close(got, dense.sum(0).expand(X.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("four_bits", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_16_bit_adapter_in_training(four_bits, dropout, monkeypatch):
    """Its values are those of the same weight without gradients, to the bit; its gradient is the float32 one, rounded."""
    w, a, b = parts(64, 128, 8, torch.float32)
    w, a, b = w.bfloat16(), (a * 0.1).bfloat16(), (b * 0.1).bfloat16()
    base = four_bit.quantize_matrix(w) if four_bits else w
    gen = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(2, 9, n, generator=gen).bfloat16() for n in (128, 64))

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, a, b)]
        torch.manual_seed(3)
        lazy = weights.low_rank(weights.dense(base).to(dtype), *leaves[1:], scale=2.0, dropout=dropout)
        if dtype == torch.bfloat16:
            lazy = weights.low_rank(base, *leaves[1:], scale=2.0, dropout=dropout)
        y = F.linear(leaves[0], lazy)
        return y.detach(), torch.autograd.grad(y, leaves, grad.to(dtype)), lazy

    calls = []
    apply = weights._Corrected.apply
    monkeypatch.setattr(weights._Corrected, "apply", lambda *args: calls.append(1) or apply(*args))
    y, grads, lazy = run(torch.bfloat16)
    assert len(calls) == 1
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(y, F.linear(x, lazy))
    wide_y, wide, _ = run(torch.float32)
    assert len(calls) == 1  # float32 sums keep their order
    torch.testing.assert_close(y.float(), wide_y, rtol=0.02, atol=0.05)
    for g, want in zip(grads, wide, strict=True):
        assert g.dtype == torch.bfloat16
        assert float((g.float() - want).norm() / want.norm()) < 0.01


def test_kernels_of_a_layer_of_qlora():
    """Forward: two for the scales, one for the values, three products. Backward: the same three, five products."""

    def count(dtype):
        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        base = four_bit.quantize_matrix(empty(64, 128).detach())
        leaves = empty(2, 9, 128), empty(8, 128, dtype=dtype), empty(64, 8, dtype=dtype)

        def step():
            y = F.linear(leaves[0], weights.low_rank(base, *leaves[1:], scale=2.0))
            torch.autograd.grad(y, leaves, y.detach())

        return trace.count_work(step).kernels

    assert count(torch.bfloat16) <= 14
    assert count(torch.float32) <= 23  # and float32 products


def test_dropout_is_of_the_input_of_a():
    w, a, b = parts()
    lazy = weights.low_rank(w, a, b, dropout=0.5)
    torch.manual_seed(3)
    out = F.linear(X, lazy)
    torch.manual_seed(3)
    want = F.linear(X, w) + F.linear(F.linear(F.dropout(X, 0.5), a), b)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def test_dropout_of_experts_is_behind_a_and_before_the_gates():
    """HealthGPT's Linear.forward: the router sees the input as it is, the gate multiplies dropout(A x * scaling)."""
    n, rank = 2, 4
    w, a, b, router = (torch.randn(s) for s in ((5, 6), (rank, 6), (5, rank), (n, 6)))
    x = torch.randn(3, 7, 6)
    lazy = weights.low_rank(w, a, b, router=router, scale=2.0, dropout=0.5)
    torch.manual_seed(3)
    got = F.linear(x, lazy)
    torch.manual_seed(3)
    gates = F.linear(x, router).softmax(-1).repeat_interleave(rank // n, -1)
    want = F.linear(x, w) + F.linear(gates * F.dropout(F.linear(x, a) * 2.0, 0.5), b)
    torch.testing.assert_close(got, want)


# What it is as a value ------------------------------------------------------------------------------------------------------------------
def test_moving_copying_counting():
    w, a, b = parts(dtype=torch.float32)
    lazy = weights.low_rank(
        four_bit.quantize_matrix(w), a, b, rows=torch.tensor([0, 1]), gate=torch.ones(2, 4)
    )
    half = lazy.to(torch.bfloat16)
    assert [half.dtype, half.base.dtype, half.a.dtype, half.rows.dtype] == [torch.bfloat16] * 3 + [
        torch.int64
    ]
    assert half.base.packed.dtype == torch.uint8
    assert half.base.nested.dtype == torch.float32  # scales keep theirs
    assert lazy.to("meta").a.is_meta
    assert lazy.to("cpu") is lazy
    twin = copy.deepcopy(lazy)
    assert twin.a is not lazy.a
    assert torch.equal(twin.a, lazy.a)
    assert lazy.shape == (12, 10)
    assert not lazy.requires_grad
    assert lazy.base.nbytes == 60 + 2 + 4 + 4 + 1024
    codes = four_bit.quantize_matrix(w.bfloat16())
    assert copy.deepcopy(codes).dtype == codes.clone().dtype == torch.bfloat16  # not that of the scales
    moved = weights.move_params({"x": lazy, "w": w}, dtype=torch.bfloat16)
    assert [moved["x"].dtype, moved["w"].dtype, moved["x"].base.absmax.dtype] == [torch.bfloat16] * 2 + [
        torch.uint8
    ]
    held = weights.nbytes({"x": lazy})
    assert (
        held == 60 + 2 + 4 + 4 + 256 * 4 + 4 * (40 + 48 + 8) + 16
    )  # codes, scales, offset, nested, its code, A, B, gate, rows
    assert weights.nbytes({"x": w, "tied": w, "view": w[:3]}) == w.nbytes


def test_parts_on_several_processes_are_gathered_once():
    """A head is used chunk by chunk, and processes have different numbers of chunks: none may gather in one."""
    w, a, b = parts(dtype=torch.float32)
    calls = []
    mesh = SimpleNamespace(ndim=1, size=lambda: 2)
    shard = SimpleNamespace(
        shape=w.shape,
        dtype=w.dtype,
        device=w.device,
        device_mesh=mesh,
        full_tensor=lambda grad_placements: calls.append(1) or w,
    )
    codes = four_bit.quantize_matrix(w)
    assert weights.gathered(w) is w
    assert torch.equal(weights.dense(weights.gathered(codes)), weights.dense(codes))
    x, rows = X.float(), torch.randn(3, 10)
    for lazy, want in (
        (weights.sharded(shard), F.linear(x, w)),
        (weights.low_rank(weights.sharded(shard), a, b), F.linear(x, w + b @ a)),
        (extend_table(weights.sharded(shard), rows, 9), F.linear(x, torch.cat([w[:9], rows]))),
    ):
        calls.clear()
        head = weights.gathered(lazy)
        for _ in range(3):
            torch.testing.assert_close(F.linear(x, head), want)
        assert calls == [1]


def test_what_a_lazy_weight_cannot_do_is_said():
    w, a, b = parts()
    lazy = weights.low_rank(w, a, b)
    for call in (
        lambda: lazy + 1,
        lambda: lazy @ X[0].T,
        lambda: torch.stack([lazy, lazy]),
        lambda: lazy.sum(),
        lambda: F.conv1d(X, lazy),
    ):
        with pytest.raises(
            NotImplementedError,
            match=r"LowRank\(\[12, 10\], linear, rank 4 over float64\), which supports only linear",
        ):
            call()
    with pytest.raises(TypeError, match="has no gradient of its own; its parts may have"):
        lazy.requires_grad_()
    with pytest.raises(TypeError, match="is not saved as it is"):
        torch.save({"w": lazy}, "/dev/null")
    for gate, router, what in ((torch.ones(2, 4), None, "sample"), (None, torch.ones(2, 10), "token")):
        with pytest.raises(ValueError, match=f"has no plain tensor: its correction depends on the {what}"):
            weights.dense(weights.low_rank(w, a, b, gate=gate, router=router))


BAD = [
    (
        lambda w, a, b: weights.low_rank(w, a[:, :9], b),
        r"must fit the weight, got \[4, 9\] and \[12, 4\] for \[12, 10\]",
    ),
    (lambda w, a, b: weights.low_rank(w, a, b[:, :3]), r"must fit the weight, got \[4, 10\] and \[12, 3\]"),
    (lambda w, a, b: weights.low_rank(w.T, a, b), r"for \[10, 12\] of kind linear"),
    (
        lambda w, a, b: weights.low_rank(w, a, b, gate=torch.ones(3)),
        r"the gate must be \[4\] or \[b, 4\], got \[3\]",
    ),
    (
        lambda w, a, b: weights.low_rank(w, a, b, router=torch.ones(3, 10)),
        r"the router must be \[n, 10\] with n dividing rank 4",
    ),
    (
        lambda w, a, b: F.linear(X, weights.low_rank(w, a, b, gate=torch.ones(2, 4))),
        "weights for 2 samples meet 3 rows; give weights for every",
    ),
    (
        lambda w, a, b: F.linear(X.flatten(0, 1), weights.low_rank(w, a, b, gate=torch.ones(3, 4))),
        "3 samples meet 15 rows; this layer flattens its batch, so it cannot have weights per sample",
    ),
    (
        lambda w, a, b: F.linear(
            X[:, 0], weights.low_rank(w, a, b, gate=torch.ones(2, 4), rows=torch.tensor([0, 1]))
        ),
        "3 rows do not belong to 2 visual tokens",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_factors_and_gates(call, message):
    with pytest.raises(ValueError, match=message):
        call(*parts())


# In a model -----------------------------------------------------------------------------------------------------------------------------
def adapted(params, r=4, gate=None, seed=3, grad=False):
    """A low-rank correction on every projection of a language model, over whatever its weights are."""
    gen = torch.Generator().manual_seed(seed)
    done, leaves = dict(params), {}
    for n, w in params.items():
        if n.endswith("_proj.weight"):
            a, b = (
                torch.randn(r, w.shape[1], generator=gen) * 0.1,
                torch.randn(w.shape[0], r, generator=gen) * 0.1,
            )
            leaves |= {f"{n}/a": a.requires_grad_(grad), f"{n}/b": b.requires_grad_(grad)}
            done[n] = weights.low_rank(w, a, b, gate=gate)
    return done, leaves


@pytest.mark.parametrize("kind", ["qwen3", "phi3"])
def test_gradients_are_those_of_dense_weights_with_and_without_checkpointing(kind):
    skeleton, params = tiny.model(kind)
    x = tiny.batch(kind)
    lazy, leaves = adapted(four_bit.quantize(params), grad=True)

    def gradient(skel, p):
        logits = skel(p, **x, use_cache=False).logits
        return torch.autograd.grad(logits.square().mean(), list(leaves.values()))

    base = {
        f"{n}/{i}": t for n, w in lazy.items() for i, t in enumerate(weights.leaves(w)) if not t.requires_grad
    }
    before = skeletons.weights_digest(base)
    plain, again = gradient(skeleton, lazy), gradient(skeletons.checkpointed(skeleton), lazy)
    written = {
        n: weights.dense(w.base) + w.b @ w.a if isinstance(w, weights.LowRank) else w for n, w in lazy.items()
    }
    dense = gradient(skeleton, written)
    for g, c, d in zip(plain, again, dense, strict=True):
        assert torch.equal(g, c)
        torch.testing.assert_close(g, d, rtol=1e-4, atol=1e-7)
    assert max(float(g.abs().max()) for g in plain) > 1e-3
    assert skeletons.weights_digest(base) == before


def test_checkpointing_outlives_the_call():
    """The gradient is taken after the skeleton has been called with other weights; recomputation must not see them."""
    skeleton, params = tiny.model("qwen3")
    x = tiny.batch("qwen3")
    leaf = {n: t.clone().requires_grad_() for n, t in params.items()}
    want = torch.autograd.grad(
        skeleton(leaf, **x, use_cache=False).logits.square().mean(), list(leaf.values())
    )
    skel = skeletons.checkpointed(skeleton)
    loss = skel(leaf, **x, use_cache=False).logits.square().mean()
    skel({n: t * 2 for n, t in params.items()}, **x, use_cache=False)
    for g, w in zip(torch.autograd.grad(loss, list(leaf.values())), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-8)


def test_checkpointing_saves_activations():
    skeleton, params = tiny.model("qwen3")
    leaf = {n: t.clone().requires_grad_() for n, t in params.items()}
    x = {"input_ids": torch.randint(3, 140, (4, 64))}

    def kept(skel):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            skel(leaf, **x, use_cache=False)
        return sum(sizes)

    assert kept(skeletons.checkpointed(skeleton)) < 0.5 * kept(skeleton)


def test_compiles_in_one_graph():
    skeleton, params = tiny.model("qwen3")
    lazy, _ = adapted(four_bit.quantize(params), gate=torch.rand(2, 4))
    x = tiny.batch("qwen3")["input_ids"]
    with torch.no_grad():
        run = torch.compile(
            lambda p, ids: skeleton(p, input_ids=ids, use_cache=False).logits,
            fullgraph=True,
            backend="aot_eager",
        )
        torch.testing.assert_close(
            run(lazy, x), skeleton(lazy, input_ids=x, use_cache=False).logits, rtol=0, atol=1e-5
        )


def test_threads_with_different_mixtures_are_exact():
    skeleton, params = tiny.model("qwen2")
    x = tiny.batch("qwen2")
    variants = [
        adapted(four_bit.quantize(params), gate=torch.rand(2, 4, generator=torch.Generator().manual_seed(i)))[
            0
        ]
        for i in (1, 2)
    ]
    wrong: list[float] = []
    with torch.no_grad():
        want = [skeleton(v, **x).logits for v in variants]

    def work(i):
        with torch.no_grad():
            wrong.extend(float((skeleton(variants[i], **x).logits - want[i]).abs().max()) for _ in range(6))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == [0.0] * 12
    assert (want[0] - want[1]).abs().max() > 0.05
