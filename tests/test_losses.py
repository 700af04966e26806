import pytest
import torch
import torch.nn.functional as F

from medvl.losses import clip_loss, siglip_loss


def _pair(gen, b=5, d=8):
    return (F.normalize(torch.randn(b, d, generator=gen, dtype=torch.float64), dim=-1) for _ in range(2))


def test_clip_loss_is_the_formula(gen):
    a, b = _pair(gen)
    logits = 7.0 * a @ b.T
    naive = sum(-(logits[i, i] - logits[i].exp().sum().log()) - (logits[i, i] - logits[:, i].exp().sum().log()) for i in range(5)) / 10
    torch.testing.assert_close(clip_loss(a, b, 7.0), naive)


def test_clip_loss_of_large_scales_is_finite(gen):
    a, b = _pair(gen)
    assert clip_loss(a, b, 1e4).isfinite()


def test_siglip_loss_is_the_formula(gen):
    a, b = _pair(gen)
    naive = 0.0
    for i in range(5):
        for j in range(5):
            naive = naive - torch.log(torch.sigmoid((1 if i == j else -1) * (10.0 * a[i] @ b[j] - 10.0)))
    torch.testing.assert_close(siglip_loss(a, b, 10.0, -10.0), naive / 5)


@pytest.mark.parametrize("loss", [lambda a, b: clip_loss(a, b, 1.0), lambda a, b: siglip_loss(a, b, 1.0, 0.0)])
def test_errors(loss, gen):
    a, b = _pair(gen)
    with pytest.raises(ValueError, match="at least 2 rows"):
        loss(a[:1], b[:1])
    with pytest.raises(ValueError, match=r"must both be \[b, d\]"):
        loss(a, b[:3])
