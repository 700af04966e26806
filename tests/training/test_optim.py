from unittest import mock

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from medvl.base.tree import count_values, flatten, map_leaves, split_tree
from medvl.hub import skeletons
from medvl.training import gradients, loop, optim, states
from medvl.training.muon import muon
from medvl.training.optim import Rate, adamw, clip_gradients, routed, warmup_cosine, with_master
from medvl.weights import rounding
from medvl.weights.four_bit import eight_bit_moments
from tests.gpu.pretend import GPU, pretended_gpu
from tests.tiny import TEXT

BF16 = torch.bfloat16


def _tree(gen):
    return {
        "vit": {"w": torch.randn(4, 3, generator=gen), "b": torch.randn(4, generator=gen)},
        "text": {"w": torch.randn(2, 2, generator=gen)},
    }


def test_bit_equal_to_torch(gen):
    params = _tree(gen)
    mine = {n: t.clone() for n, t in flatten(params).items()}
    peer = {n: torch.nn.Parameter(t.clone()) for n, t in flatten(params).items()}
    groups = [
        {"params": [peer["vit/w"]], "lr": 1e-3, "weight_decay": 0.05},
        {"params": [peer["vit/b"]], "lr": 1e-3, "weight_decay": 0.0},
        {"params": [peer["text/w"]], "lr": 1e-2, "weight_decay": 0.2},
    ]
    schedule = warmup_cosine(20, 5)
    torch_opt = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    torch_schedule = LambdaLR(torch_opt, schedule)
    rate = lambda n: (
        Rate(lr=1e-3, weight_decay=0.05) if n.startswith("vit") else Rate(lr=1e-2, weight_decay=0.2)
    )
    ours = adamw(rate, schedule)
    state = ours.init(mine)
    for step in range(20):
        grads = {n: torch.randn(t.shape, generator=gen) for n, t in mine.items()}
        for n, p in peer.items():
            p.grad = grads[n].clone()
        torch_opt.step()
        torch_schedule.step()
        mine, state = ours.update(grads, state, mine, step)
    for n, t in flatten(mine).items():
        assert torch.equal(t, peer[n].data), n


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_fused_kernel_of_a_gpu_walks_as_the_kernels_of_the_cpu(dtype, gen, monkeypatch):
    """One call for all tensors, in whatever dtype and order their gradients come."""
    params = flatten(_tree(gen)) | {"turned": torch.randn(5, 3, generator=gen).t()}
    rate = lambda n: Rate(lr=1e-2, weight_decay=0.1)

    def walk():
        p = {n: t.clone(memory_format=torch.preserve_format) for n, t in params.items()}
        ours = adamw(rate)
        state = ours.init(p)
        for step in range(10):
            grads = {n: t.t().contiguous().t().to(dtype) for n, t in _grads(params, step).items()}
            p, state = ours.update(grads, state, p, step)
        return p | state["square"]

    want = walk()
    monkeypatch.setattr(optim, "_FUSED", ("cpu",))
    with mock.patch.object(torch, "_fused_adamw_", wraps=torch._fused_adamw_) as fused:
        got = walk()
    assert fused.call_count == 10 * 3  # vectors, which are not decayed; matrices; what does not lie in order
    for n, t in want.items():
        torch.testing.assert_close(got[n], t, rtol=1e-6, atol=1e-6)


def test_a_pretended_gpu_takes_the_fused_kernel():
    params = {"w": torch.ones(4, 3, dtype=BF16), "v": torch.ones(4)}
    ours = with_master(adamw(lambda n: Rate(lr=1e-2, weight_decay=0.1)))
    want, _ = _walk(ours, params)
    grads = [_grads(params, step) for step in range(10)]
    with pretended_gpu() as gpu:
        p = {n: t.to(GPU) for n, t in params.items()}
        on_gpu = [{n: t.to(GPU) for n, t in g.items()} for g in grads]
        state = ours.init(p)
        gpu.waits.clear()
        for step, g in enumerate(on_gpu):
            p, state = ours.update(g, state, p, step)
        assert not gpu.waits
        assert gpu.count["op _fused_adamw_"] == 10 * 2
        got = {n: t.cpu() for n, t in p.items()}
    for n, t in want.items():
        torch.testing.assert_close(got[n], t, rtol=1e-6, atol=1e-6)


def test_routed_is_each_optimiser_alone(gen):
    params, grads = _tree(gen), _tree(gen)
    rate, clone = lambda n: Rate(lr=0.01, weight_decay=0.1), lambda t: map_leaves(torch.clone, t)
    both = routed(lambda n: "muon" if n == "vit/w" else "adamw", {"adamw": adamw(rate), "muon": muon(rate)})
    state = both.init(params)
    assert {n for n in flatten(state) if n.startswith("muon")} == {"muon/mean/vit/w"}
    assert {n for n in flatten(state) if "mean" in n} == {
        "adamw/mean/vit/b",
        "adamw/mean/text/w",
        "muon/mean/vit/w",
    }
    got = flatten(both.update(grads, state, clone(params), 0)[0])
    for alone, patterns in ((muon(rate), ["vit/w"]), (adamw(rate), ["vit/b", "text/w"])):
        part, of_part = split_tree(params, patterns)[0], split_tree(grads, patterns)[0]
        for name, t in flatten(alone.update(of_part, alone.init(part), clone(part), 0)[0]).items():
            assert torch.equal(got[name], t), name


def test_warmup_cosine_counts_optimiser_steps():
    f = warmup_cosine(100, 10)
    assert [f(0), f(9), f(10)] == [0.1, 1.0, 1.0]
    assert f(99) == pytest.approx(0.0, abs=1e-12)
    assert all(f(i) > f(i + 1) for i in range(10, 99))
    assert warmup_cosine(100, 0, floor=0.2)(99) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="within the 5 steps"):
        warmup_cosine(5, 6)


def test_clipped_gradients_are_torch_s(gen):
    grads = _tree(gen)
    peer = [torch.nn.Parameter(torch.zeros_like(t)) for t in flatten(grads).values()]
    for p, g in zip(peer, flatten(grads).values(), strict=True):
        p.grad = g.clone()
    want = torch.nn.utils.clip_grad_norm_(peer, 0.5)
    clipped = flatten(grads)
    total = clip_gradients(clipped, 0.5)
    torch.testing.assert_close(total, want)
    for p, g in zip(peer, clipped.values(), strict=True):
        torch.testing.assert_close(g, p.grad)
    left = flatten(grads)
    clip_gradients(left, 0.0)
    assert all(left[n] is g for n, g in flatten(grads).items())


def test_clipping_bfloat16_takes_a_float32_norm(gen):
    grads = {"a": torch.randn(300, 7, generator=gen).bfloat16(), "b": torch.randn(50, generator=gen)}
    clipped = dict(grads)
    total = clip_gradients(clipped, 0.5)
    want = torch.cat([t.float().flatten() for t in grads.values()]).norm()
    torch.testing.assert_close(total, want)
    assert {n: t.dtype for n, t in clipped.items()} == {"a": BF16, "b": torch.float32}
    torch.testing.assert_close(clipped["a"].float(), grads["a"].float() * 0.5 / want, rtol=0.01, atol=0)


# 16-bit weights -------------------------------------------------------------------------------------------------------------------------
def _grads(params, step):
    gen = torch.Generator().manual_seed(step)
    return {n: torch.randn(t.shape, generator=gen).to(t.dtype) for n, t in params.items()}


def _walk(optimizer, params, steps=range(10), state=None):
    params = {n: t.clone(memory_format=torch.preserve_format) for n, t in params.items()}
    state = optimizer.init(params) if state is None else state
    for step in steps:
        params, state = optimizer.update(_grads(params, step), state, params, step)
    return params, state


def _half(gen):
    return {
        "w": torch.randn(40, 33, generator=gen).bfloat16(),
        "b": torch.randn(40, generator=gen).bfloat16(),
    }


@pytest.mark.parametrize("piece", [2**24, 256])
def test_16_bit_parameters_step_in_float32_and_are_rounded_once(piece, gen, monkeypatch):
    monkeypatch.setattr(rounding, "PIECE", piece)
    params = _half(gen) | {"turned": torch.randn(33, 40, generator=gen).bfloat16().t()}
    got, state = _walk(adamw(lambda n: Rate(lr=1e-2, weight_decay=0.1)), params)
    peer = {n: torch.nn.Parameter(t.float()) for n, t in params.items()}
    groups = [
        {"params": [peer["w"], peer["turned"]], "weight_decay": 0.1},
        {"params": [peer["b"]], "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    for step in range(10):
        for n, g in _grads(params, step).items():
            peer[n].grad = g.float()
        other.step()
        for p in peer.values():
            p.data = p.data.bfloat16().float()
    for n, p in peer.items():
        assert torch.equal(got[n].float(), p.data), n
        assert torch.equal(state["square"][n], other.state[p]["exp_avg_sq"]), n
    assert not got["turned"].is_contiguous()


def test_moments_of_16_bit_parameters_do_not_stand_still():
    """A square of 1 that should fall towards 0.25 by 0.1 % a step: in bfloat16 it cannot move."""
    ours = adamw(lambda n: Rate(lr=1e-3), beta2=0.999)
    state = ours.init(params := {"w": torch.zeros(4, dtype=BF16)})
    narrow = torch.ones(4, dtype=BF16)
    state["square"]["w"].fill_(1.0)
    for step in range(500):
        params, state = ours.update({"w": torch.full((4,), 0.5, dtype=BF16)}, state, params, step)
        narrow.mul_(0.999).add_(0.25, alpha=0.001)
    assert state["square"]["w"].max() == pytest.approx(0.25 + 0.75 * 0.999**500, rel=1e-4)
    assert narrow.min() == 1.0


@pytest.mark.parametrize(
    "kind",
    [adamw, lambda rate: routed(lambda n: "m" if n == "w" else "a", {"m": muon(rate), "a": adamw(rate)})],
)
def test_a_master_walks_as_float32_does(kind, gen):
    params, rate = (
        _half(gen) | {"wide": torch.randn(5, generator=gen)},
        lambda n: Rate(lr=1e-4, weight_decay=0.1),
    )
    got, state = _walk(with_master(kind(rate)), params)
    plain, moments = kind(rate), {n: t.float() for n, t in params.items()}
    inner = plain.init(moments)
    for step in range(10):
        moments, inner = plain.update(
            {n: g.float() for n, g in _grads(params, step).items()}, inner, moments, step
        )
    assert state["master"].keys() == {"w", "b"}
    for n, t in moments.items():
        assert torch.equal(got[n], t.to(params[n].dtype)), n
        assert n == "wide" or torch.equal(state["master"][n], t), n


def test_stochastic_rounding_is_a_function_of_seed_step_and_name(gen):
    params = _half(gen)
    make = lambda seed: adamw(lambda n: Rate(lr=1e-4), rounding="stochastic", seed=seed)
    whole, _ = _walk(make(0), params)
    part, state = _walk(make(0), params, range(4))
    again, _ = _walk(make(0), part, range(4, 10), state)
    other, _ = _walk(make(1), params)
    assert all(torch.equal(whole[n], again[n]) for n in params)
    assert (whole["w"] != other["w"]).float().mean() > 0.05
    twins = {"w": params["w"], "v": params["w"].clone()}
    state, same = make(0).init(twins), {"w": torch.ones(40, 33), "v": torch.ones(40, 33)}
    moved, _ = make(0).update(same, state, {n: t.clone() for n, t in twins.items()}, 0)
    later, _ = make(0).update(same, make(0).init(twins), {n: t.clone() for n, t in twins.items()}, 1)
    assert not torch.equal(moved["w"], moved["v"])
    assert not torch.equal(moved["w"], later["w"])


QWEN = {
    "model_type": "qwen3",
    **TEXT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def test_a_language_model_in_bfloat16_moves_as_in_float32_at_a_small_rate(gen):
    """Twenty steps at 1e-5. Rounded to the nearest, most weights never move; a master or stochastic rounding takes the whole way."""
    skeleton, params = skeletons.init_skeleton(QWEN, gen, head="language")
    start = {n: t.bfloat16().float() for n, t in params.items()}
    ids = torch.randint(3, 160, (2, 8, 24), generator=gen)

    def loss(p, batch):
        return skeleton(p, input_ids=batch, labels=batch, use_cache=False).loss.float(), gradients.Aux()

    def change(optimizer, dtype):
        p = {n: t.to(dtype, copy=True) for n, t in start.items()}
        step, state = (
            loop.make_step(gradients.value_and_grad(loss), optimizer),
            states.State(params=p, opt=optimizer.init(p)),
        )
        for i in range(20):
            state, _ = step(state, ids[i % 2])
        of = lambda tree: torch.cat(
            [(tree[n].float() - t).flatten() for n, t in start.items() if t.dim() > 1]
        )
        return of(state.params), of(state.opt["master"]) if "master" in state.opt else None

    rate = lambda n: Rate(lr=1e-5)
    want, _ = change(adamw(rate), torch.float32)
    far = lambda d: float((d - want).norm() / want.norm())
    along = lambda d: float(d @ want / want.norm() ** 2)  # 1 = as far in the right direction as float32
    moved = lambda d: float((d != 0).float().mean())
    naive, _ = change(adamw(rate), BF16)
    rounded, master = change(with_master(adamw(rate)), BF16)
    drawn, _ = change(adamw(rate, rounding="stochastic"), BF16)
    found = {
        k: [round(f(d), 3) for f in (moved, along, far)]
        for k, d in (("naive", naive), ("rounded", rounded), ("drawn", drawn))
    }
    assert found["naive"] == pytest.approx([0.16, 0.17, 0.94], abs=0.05), found
    assert found["rounded"] == pytest.approx([0.85, 1.03, 0.25], abs=0.05), found
    assert found["drawn"] == pytest.approx([0.75, 1.0, 0.74], abs=0.05), (
        found
    )  # far off weight by weight, but not on the whole
    assert far(master) < 0.03


# 8-bit moments --------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("piece", [2**24, 1024])
def test_8_bit_moments_are_bitsandbytes(dtype, piece, gen, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(rounding, "PIECE", piece)
    params = {
        "w": torch.randn(65, 99, generator=gen).to(dtype),
        "small": torch.randn(30, 40, generator=gen).to(dtype),
    }
    peer = {n: torch.nn.Parameter(t.clone()) for n, t in params.items()}
    other = bnb.optim.AdamW8bit(list(peer.values()), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for step in range(10):
        for n, g in _grads(params, step).items():
            g[:20] = 0  # rows that no token names: blocks of zeros
            peer[n].grad = g
        other.step()
    ours = adamw(lambda n: Rate(lr=1e-3, weight_decay=0.1), packing=eight_bit_moments())
    state, got = ours.init(params), {n: t.clone() for n, t in params.items()}
    for step in range(10):
        grads = _grads(params, step)
        for g in grads.values():
            g[:20] = 0
        got, state = ours.update(grads, state, got, step)
    for n, p in peer.items():
        torch.testing.assert_close(got[n], p.data, rtol=0, atol=1e-6 if dtype == torch.float32 else 2**-8)
        assert (got[n] - params[n]).abs().max() > 5e-3
    held = other.state[peer["w"]]
    assert (state["mean"]["w"]["codes"] == held["state1"]).float().mean() > 0.999
    assert (state["square"]["w"]["codes"] == held["state2"]).float().mean() > 0.999
    torch.testing.assert_close(state["mean"]["w"]["scale"], held["absmax1"])
    assert state["mean"]["small"].dtype == torch.float32


def test_float64_parameters_keep_their_precision_over_8_bit_moments(gen):
    params = {"w": torch.randn(64, 64, generator=gen)}
    got, want = (
        _walk(adamw(lambda n: Rate(lr=1e-3), packing=eight_bit_moments()), {"w": params["w"].to(d)})[0]["w"]
        for d in (torch.double, None)
    )
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want, rtol=0, atol=1e-6)
    assert (got.float().double() != got).float().mean() > 0.9


@pytest.mark.parametrize("piece", [256, 1024, 2048])
def test_large_float32_trees_are_walked_in_pieces_to_the_same_bits(piece, gen, monkeypatch):
    params = {str(i): torch.randn(i + 1, 100, generator=gen) for i in range(12)}
    want, _ = _walk(adamw(lambda n: Rate(lr=1e-2, weight_decay=0.1)), params)
    monkeypatch.setattr(rounding, "PIECE", piece)
    got, _ = _walk(adamw(lambda n: Rate(lr=1e-2, weight_decay=0.1)), params)
    assert all(torch.equal(got[n], want[n]) for n in params)


@pytest.mark.parametrize("kind", ["8 bit", "8 bit, stochastic", "8 bit, master"])
def test_every_state_is_saved_and_resumed_to_the_same_bits(kind, gen, tmp_path):
    rate = lambda n: Rate(lr=1e-4, weight_decay=0.1)
    rounding = "stochastic" if "stochastic" in kind else "nearest"
    ours = adamw(rate, rounding=rounding, packing=eight_bit_moments())
    ours = with_master(ours) if "master" in kind else ours
    params = {"w": torch.randn(65, 99, generator=gen).bfloat16(), "b": torch.randn(65, generator=gen)}
    whole, end = _walk(ours, params)
    part, state = _walk(ours, params, range(5))
    states.save_state(tmp_path / "last.pt", states.State(params=part, opt=state, step=5))
    back = states.resume_state(tmp_path, states.State(params=params, opt=ours.init(params)))
    again, last = _walk(ours, back.params, range(5, 10), back.opt)
    for n, t in flatten({"p": whole, "s": end}).items():
        assert torch.equal(t, flatten({"p": again, "s": last})[n]), n


def test_bytes_of_a_state_per_parameter(gen):
    rate = lambda n: Rate(lr=1e-4)
    params = {"w": torch.zeros(512, 512, dtype=BF16), "b": torch.zeros(512, dtype=BF16)}
    each = {}
    for name, o in {
        "adamw": adamw(rate),
        "stochastic": adamw(rate, rounding="stochastic"),
        "master": with_master(adamw(rate)),
        "packed": adamw(rate, packing=eight_bit_moments()),
        "muon": routed(lambda n: "m" if n == "w" else "a", {"m": muon(rate), "a": adamw(rate)}),
    }.items():
        held = sum(t.nbytes for t in flatten(o.init(params)).values())
        each[name] = held / count_values(params)
    assert each == pytest.approx(
        {"adamw": 8, "stochastic": 8, "master": 12, "packed": 2.04, "muon": 4}, abs=0.01
    )


def test_low_precision_errors_say_what_to_do():
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        adamw(lambda n: Rate(lr=1), rounding="up")
    with pytest.raises(
        ValueError, match=r"stochastic rounding is for bfloat16, 1 parameters are float16, e\.g\. w"
    ):
        adamw(lambda n: Rate(lr=1), rounding="stochastic").init({"w": torch.zeros(2, dtype=torch.float16)})
