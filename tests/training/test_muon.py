"""Muon: torch's own, and the polynomial on singular values."""

import pytest
import torch

from medvl.training.muon import muon, orthogonalize
from medvl.training.optim import Rate


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonal_is_the_polynomial_on_singular_values(shape, gen):
    m = torch.randn(shape, generator=gen, dtype=torch.float64)
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(m), u @ s.diag() @ v)
    found = torch.linalg.svdvals(orthogonalize(torch.randn(64, 96, generator=gen)))
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
    b, _ = ours.update(
        {"k": grad.flatten(1)}, ours.init({"k": kernel.flatten(1)}), {"k": kernel.flatten(1).clone()}, 0
    )
    assert torch.equal(a["k"].flatten(1), b["k"])
    with pytest.raises(ValueError, match=r"1 parameters are not, e\.g\. bias"):
        ours.init({"bias": torch.zeros(3)})
