"""extended: the peer is the whole table that nobody wants to hold, [kept rows of the base; new rows]."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve

from medvl.base.tree import flatten
from medvl.components import losses
from medvl.hub import skeletons
from medvl.language import generate, vlm
from medvl.language.sampling import Sampling
from medvl.training import estimate, gradients, loop, optim, states, trace
from medvl.weights import four_bit, lazy
from medvl.weights.extended import Extended, extend_table, extend_tables, mean_rows
from medvl.weights.lora import LoraConfig, apply_lora, init_lora
from tests import tiny

V, KEEP, N, D = 70, 64, 6, 64  # rows of the base, kept ones, new ones, width


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bases():
    w = drawn(0, V, D)
    a, b = drawn(1, 4, D), drawn(2, V, 4)
    return {
        "plain": w,
        "four-bit": four_bit.quantize_matrix(w),
        "low-rank": lazy.low_rank(w, a, b),
        "low-rank over four-bit": lazy.low_rank(four_bit.quantize_matrix(w), a, b),
    }


@pytest.mark.parametrize("kind", bases())
def test_it_is_the_whole_table(kind):
    base, rows, x = bases()[kind], drawn(3, N, D), drawn(4, 2, 3, D)
    bias = drawn(5, KEEP + N)
    whole = torch.cat([lazy.dense(base)[:KEEP], rows])
    table = extend_table(base, rows, KEEP)
    assert table.shape == whole.shape
    torch.testing.assert_close(F.linear(x, table), F.linear(x, whole))
    torch.testing.assert_close(F.linear(x, table, bias), F.linear(x, whole, bias))
    assert torch.equal(lazy.dense(table), whole)
    if kind.startswith("low-rank"):  # an adapter of the head is not seen by the embedding
        whole = torch.cat([lazy.dense(base.base)[:KEEP], rows])
    ids = torch.tensor([[0, KEEP - 1, KEEP, KEEP + N - 1]])
    assert torch.equal(F.embedding(ids, table), whole[ids])
    assert torch.equal(F.embedding(ids, table, 3), whole[ids])  # Phi-3's table has a padding token


def test_nothing_of_the_base_is_copied_and_only_rows_are_counted():
    base, rows = drawn(0, V, D), drawn(3, N, D)
    table = extend_table(base, rows, KEEP)
    assert table.base is base
    assert lazy.nbytes({"base": base, "table": table}) == base.nbytes + rows.nbytes
    mean = mean_rows(base, KEEP, N)
    assert lazy.nbytes({"rows": mean}) == D * 4  # one row, seen N times
    # A product with the kept rows takes a view of them.
    operations = trace.count_work(lambda: F.linear(drawn(4, 2, D).to("meta"), table.to("meta"))).operations
    assert {name for name in operations} <= {"mm", "cat", "linear"}, operations


def test_gradients_reach_the_rows_and_the_input():
    base = drawn(0, V, D, dtype=torch.float64)
    rows, x = (drawn(i, n, D, dtype=torch.float64).requires_grad_() for i, n in ((3, N), (4, 5)))
    ids = torch.tensor([0, KEEP, KEEP + 2, KEEP, 9])

    def ours(rows, x):
        table = extend_table(base, rows, KEEP)
        return F.linear(x + F.embedding(ids, table), table)

    whole = torch.cat([base[:KEEP], rows])
    got = torch.autograd.grad(ours(rows, x).square().sum(), (rows, x))
    want = torch.autograd.grad(F.linear(x + whole[ids], whole).square().sum(), (rows, x))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(ours, (rows, x))


def test_dtypes_moves_and_copies():
    """Rows may be float32 beside a bfloat16 base: results have the base's dtype."""
    table = extend_table(drawn(0, V, D).bfloat16(), drawn(3, N, D), KEEP)
    x = drawn(4, 2, D).bfloat16()
    assert table.dtype == F.linear(x, table).dtype == F.embedding(torch.tensor([KEEP]), table).dtype
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x.float(), extend_table(drawn(0, V, D), drawn(3, N, D), KEEP))
    assert y.dtype == torch.bfloat16
    half = table.to(torch.float16)
    assert (half.dtype, half.base.dtype, half.rows.dtype, half.keep) == (*[torch.float16] * 3, KEEP)
    twin = copy.deepcopy(table)
    assert isinstance(twin, Extended)
    assert twin.rows is not table.rows
    assert repr(table) == "Extended([70, 64], 6 rows behind 64 of bfloat16)"
    gated = lazy.low_rank(drawn(0, V, D), drawn(1, 4, D), drawn(2, V, 4), gate=drawn(6, 2, 4))
    each = lazy.per_row({"w": extend_table(gated, drawn(3, N, D), KEEP)}, torch.tensor([1, 1, 0]), 2)["w"]
    assert torch.equal(each.base.gate, gated.gate[[1, 1, 0]])


def test_new_rows_start_as_the_mean_of_the_kept_ones():
    """HealthGPT: after the resizing, the last rows are set to the mean of all before them; padding is overwritten."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = drawn(0, V, D).to(dtype)
        resized = torch.cat([base[:KEEP], drawn(7, N, D).to(dtype)])
        resized[-N:] = resized[:-N].mean(dim=0, keepdim=True)
        ours = extend_table(base, mean_rows(base, KEEP, N), KEEP)
        assert torch.equal(lazy.dense(ours), resized)
        assert mean_rows(base, KEEP, N).dtype == dtype


# In a model ---------------------------------------------------------------------------------------------------------------------------
def small_phi3(codes=N):
    """(skeleton of a small Phi-3 with image codes, its params without them, names of table and head, kept rows)."""
    skeleton, params = tiny.model("phi3")
    names = skeletons.table_names(skeleton)
    assert names == {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    keep = len(params[names["embed"]]) - 4
    return skeletons.with_vocabulary(skeleton, keep + codes), params, names, keep


def test_a_model_with_codes_is_the_model_of_the_whole_tables():
    skeleton, params, names, keep = small_phi3()
    rows = {part: drawn(i, N, 32) * 0.2 for i, part in enumerate(names)}
    ours = extend_tables(params, names, rows, keep)
    whole = params | {name: lazy.dense(ours[name]) for name in names.values()}
    ids = torch.tensor([[3, keep, keep + 5, 7, keep + 1], [4, 5, 6, keep - 1, keep + 2]])
    with torch.no_grad():
        torch.testing.assert_close(skeleton(ours, ids).logits, skeleton(whole, ids).logits)
    labels = ids.clone()
    sums = [vlm.answer_loss(skeleton, p, {"ids": ids, "labels": labels})[0] for p in (ours, whole)]
    torch.testing.assert_close(*sums)
    codes = torch.zeros(keep + N, dtype=torch.bool)
    codes[keep:] = True
    made = [
        generate.generate(Sampling(max_tokens=7), skeleton, p, {"ids": ids}, allowed=lambda *_: codes).ids
        for p in (ours, whole)
    ]
    assert made[0] == made[1]
    assert min(map(min, made[0])) >= keep


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_in_a_model(checkpointed):
    """Of rows and adapter, over a four-bit base, equal to those of whole tables."""
    skeleton, params, names, keep = small_phi3()
    params = four_bit.quantize(params)
    adapter = init_lora(
        LoraConfig(pattern="all-linear", rank=4, experts=2), skeleton, torch.Generator().manual_seed(1)
    )
    run = skeletons.checkpointed(skeleton) if checkpointed else skeleton
    ids = torch.tensor([[3, keep, keep + 5, 7, keep + 1]])
    trained = {"rows": {part: drawn(i, N, 32) * 0.2 for i, part in enumerate(names)}}
    trained["lora"] = {m: {k: t + 0.01 for k, t in f.items()} for m, f in adapter.factors.items()}

    def loss(p, _, dense=False):
        weights = extend_tables(params, names, p["rows"], keep)
        if dense:
            weights |= {name: lazy.dense(weights[name]) for name in names.values()}
        weights = apply_lora(weights, evolve(adapter, factors=p["lora"]))
        return vlm.answer_loss(run, weights, {"ids": ids, "labels": ids})[0], gradients.Aux()

    take = {dense: gradients.value_and_grad(lambda p, b, d=dense: loss(p, b, d)) for dense in (False, True)}
    (got, _, grads), (want, _, peers) = (take[dense](trained, None) for dense in (False, True))
    torch.testing.assert_close(got, want)
    assert flatten(grads).keys() == flatten(trained).keys()
    for name, grad in flatten(grads).items():
        torch.testing.assert_close(grad, flatten(peers)[name])
        assert grad.abs().max() > 0, name


def test_an_estimate_runs_without_storage():
    skeleton, params, names, keep = small_phi3()
    params = {name: t.to("meta") for name, t in params.items()}
    rows = {part: torch.empty(N, 32, device="meta", requires_grad=True) for part in names}
    weights = extend_tables(params, names, rows, keep)
    ids = torch.tensor([[3, 4, keep, 9, keep + 1]])
    visual = torch.empty(1, 32, device="meta")

    def step():
        embedded = vlm.splice(ids, visual, weights[names["embed"]], 9)
        batch = {"inputs_embeds": embedded, "mask": torch.ones_like(ids), "labels": ids}
        loss, _ = vlm.answer_loss(skeleton, weights, batch)
        grads = torch.autograd.grad(loss, list(rows.values()))
        assert all(grad.is_meta and grad.shape == (N, 32) for grad in grads)

    peak = estimate.peak_of(step, {"model": params, "rows": rows})
    assert peak["rows"] == 2 * N * 32 * 4
    assert peak["model"] == lazy.nbytes(params)
    assert mean_rows(params[names["embed"]], keep, N).is_meta


def test_identical_frozen_rows_of_the_head_floor_the_loss():
    """Whatever the hidden state is, 8,195 tokens with one logit have at most a probability of 1 / 8,195 each."""
    base = drawn(0, V, D)
    head = extend_table(base, mean_rows(base, KEEP, 8195), KEEP)
    hidden = drawn(1, 1, 1001, D) * torch.logspace(-2, 2, 1001)[:, None]
    labels = torch.randint(KEEP, KEEP + 8192, (1, 1001), generator=torch.Generator().manual_seed(2))
    loss, n = losses.token_cross_entropy(hidden, head, labels, reduction="none")
    assert int(n) == 1000
    assert loss[0, 1:].min() >= 9.011


def test_trained_rows_pass_that_floor_and_the_base_stays():
    skeleton, params, names, keep = small_phi3(codes=8195)
    before = {name: t.clone() for name, t in params.items()}
    rows = {part: mean_rows(params[name], keep, 8195).clone() for part, name in names.items()}
    # Pictures of a few of the codes, as all are: what can be learnt at all.
    ids = keep + 1 + torch.randint(0, 8192, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = keep

    def loss(rows, batch):
        weights = extend_tables(params, names, rows, keep)
        return *vlm.answer_loss(skeleton, weights, batch), gradients.Aux()

    optimizer = optim.adamw(lambda name: optim.Rate(lr=3e-3))
    step = loop.make_step(gradients.token_value_and_grad(loss, chunk=2), optimizer, clip=1.0, seed=0)
    state = states.State(params=rows, opt=optimizer.init(rows))
    batch = {"ids": ids, "mask": torch.ones_like(ids), "labels": ids}
    seen = []
    for _ in range(200):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    assert seen[0] > 9
    assert seen[-1] < 8.9
    assert all(torch.equal(t, before[name]) for name, t in params.items())


# What is refused ----------------------------------------------------------------------------------------------------------------------
BAD = [
    (lambda w: extend_table(w, drawn(1, N, D + 1), KEEP), r"got \[6, 65\] for \[70, 64\] and keep 64"),
    (lambda w: extend_table(w, drawn(1, N, D), V + 1), "and keep 71"),
    (lambda w: extend_table(w, drawn(1, N, D), 0), "and keep 0"),
    (
        lambda w: extend_tables({"t": w}, {"embed": "t", "head": "t"}, {"embed": w, "head": w}, KEEP),
        "t must be the token table alone, but is the head, too; give the head a weight of its own",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(drawn(0, V, D))


def test_a_tied_model_is_untied_first():
    skeleton, params = tiny.model("qwen3")
    names = skeletons.table_names(skeleton)
    assert names["embed"] == names["head"]
    skeleton, params = skeletons.untie(skeleton, params)
    names = skeletons.table_names(skeleton)
    rows = {part: mean_rows(params[name], 150, N) for part, name in names.items()}
    ours = extend_tables(params, names, rows, 150)
    logits = skeletons.with_vocabulary(skeleton, 156)(ours, torch.tensor([[3, 155]])).logits
    assert logits.shape == (1, 2, 156)
    torch.testing.assert_close(logits[..., 150:], logits[..., 150:151].expand(-1, -1, 6))
