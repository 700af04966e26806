"""Unit vectors of drawn tasks."""

import torch
import torch.nn.functional as F


def drawn(tasks=24, samples=12, d=24, seed=0):
    """(unit vectors, tasks): what tells tasks apart lies in some directions, what differs within all of them, strongly, in six others."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99)))[0]
    own = torch.cat([torch.zeros(tasks, 6), torch.randn(tasks, d - 6, generator=gen)], 1).repeat_interleave(
        samples, 0
    )
    noise = torch.randn(tasks * samples, d, generator=gen) * torch.tensor([6.0] * 6 + [0.7] * (d - 6))
    return F.normalize((own + noise) @ mix, dim=1), [f"t{i // samples}" for i in range(tasks * samples)]
