"""The adapters of a query out of ten thousand."""

import pytest
import torch

from medvl.adapters.retrieve import RetrieveConfig, retrieve_adapters

P, D, K = 10_000, 1024, 3


@pytest.mark.parametrize("b", [1, 64])
def bench_retrieve(measure, b):
    gen = torch.Generator().manual_seed(0)
    vectors, queries = torch.randn(P, D, generator=gen), torch.randn(b, D, generator=gen)
    found = measure(
        retrieve_adapters, RetrieveConfig(k=K, weighting="softmax"), queries, vectors, b=b, p=P, d=D, k=K
    )
    assert (found.indices >= 0).all()
