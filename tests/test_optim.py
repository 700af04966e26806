import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from medvl.optim import Rate, adamw, clip_by_norm, warmup_cosine
from medvl.tree import flatten


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
