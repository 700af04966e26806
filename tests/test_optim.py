import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from medvl.optim import Rate, adamw, clip_by_norm, muon, orthogonal, routed, warmup_cosine
from medvl.tree import flatten, map_leaves, split


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
    rate = lambda n: Rate(lr=1e-3, weight_decay=0.05) if n.startswith("vit") else Rate(lr=1e-2, weight_decay=0.2)
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


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonal_is_the_polynomial_on_singular_values(shape, gen):
    m = torch.randn(shape, generator=gen, dtype=torch.float64)
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonal(m), u @ s.diag() @ v)
    found = torch.linalg.svdvals(orthogonal(torch.randn(64, 96, generator=gen)))
    assert 0.6 < found.min() < found.max() < 1.3


def test_muon_is_torch_s(gen):
    """torch turns its steps in bfloat16, which is worth about three digits."""
    params = {"tall": torch.randn(24, 8, generator=gen), "wide": torch.randn(8, 24, generator=gen)}
    peer = {n: torch.nn.Parameter(t.clone()) for n, t in params.items()}
    start = {n: t.clone() for n, t in params.items()}
    other = torch.optim.Muon(list(peer.values()), lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    ours = muon(lambda n: Rate(lr=0.02, weight_decay=0.1))
    state = ours.init(params)
    for step in range(10):
        grads = {n: torch.randn(t.shape, generator=gen) for n, t in params.items()}
        for n, p in peer.items():
            p.grad = grads[n].clone()
        other.step()
        params, state = ours.update(grads, state, params, step)
    for n, t in params.items():
        moved, wanted = t - start[n], peer[n].data - start[n]
        assert (moved - wanted).norm() < 0.03 * wanted.norm(), n


def test_a_convolution_moves_as_its_matrix_and_vectors_are_refused(gen):
    kernel, grad = torch.randn(8, 3, 2, 2, generator=gen), torch.randn(8, 3, 2, 2, generator=gen)
    ours = muon(lambda n: Rate(lr=0.1))
    a, _ = ours.update({"k": grad}, ours.init({"k": kernel}), {"k": kernel.clone()}, 0)
    b, _ = ours.update({"k": grad.flatten(1)}, ours.init({"k": kernel.flatten(1)}), {"k": kernel.flatten(1).clone()}, 0)
    assert torch.equal(a["k"].flatten(1), b["k"])
    with pytest.raises(ValueError, match=r"1 parameters are none, e\.g\. bias"):
        ours.init({"bias": torch.zeros(3)})


def test_routed_is_each_optimiser_alone(gen):
    params, grads = _tree(gen), _tree(gen)
    rate, clone = lambda n: Rate(lr=0.01, weight_decay=0.1), lambda t: map_leaves(torch.clone, t)
    both = routed(lambda n: "muon" if n == "vit/w" else "adamw", {"adamw": adamw(rate), "muon": muon(rate)})
    state = both.init(params)
    assert {n for n in flatten(state) if n.startswith("muon")} == {"muon/mean/vit/w"}
    assert {n for n in flatten(state) if "mean" in n} == {"adamw/mean/vit/b", "adamw/mean/text/w", "muon/mean/vit/w"}
    got = flatten(both.update(grads, state, clone(params), 0)[0])
    for alone, patterns in ((muon(rate), ["vit/w"]), (adamw(rate), ["vit/b", "text/w"])):
        part, of_part = split(params, patterns)[0], split(grads, patterns)[0]
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


def test_clip_by_norm_is_torch(gen):
    grads = _tree(gen)
    peer = [torch.nn.Parameter(torch.zeros_like(t)) for t in flatten(grads).values()]
    for p, g in zip(peer, flatten(grads).values(), strict=True):
        p.grad = g.clone()
    want = torch.nn.utils.clip_grad_norm_(peer, 0.5)
    clipped, total = clip_by_norm(grads, 0.5)
    torch.testing.assert_close(total, want)
    for p, g in zip(peer, flatten(clipped).values(), strict=True):
        torch.testing.assert_close(g, p.grad)
    assert clip_by_norm(grads, 0.0)[0] is grads
