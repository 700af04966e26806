"""Composing adapters: a mixture from a pool for the first and the 500th batch, peft's growth beside it, and SVD through small cores."""

from itertools import count
from time import perf_counter

import pytest
import torch

from medvl.weights.compose import compose_adapters, fusion_error, stack_adapters
from medvl.weights.lora import Adapter

LAYERS, D, K, RANK = 168, 64, 14, 8  # the layers of a 24-block language model, narrow


def _adapters(k, layers, d, r):
    gen = torch.Generator().manual_seed(0)
    draw = lambda: {
        f"l{i}": {"a": torch.randn(r, d, generator=gen), "b": torch.randn(d, r, generator=gen)}
        for i in range(layers)
    }
    names = [f"l{i}" for i in range(layers)]
    return [
        Adapter(
            factors=draw(),
            scale=dict.fromkeys(names, 0.5),
            kinds=dict.fromkeys(names, "linear"),
            name=f"a{j}",
        )
        for j in range(k)
    ]


@pytest.mark.parametrize("sample", [1, 500])
def bench_mixture(measure, sample):
    """14 adapters, weights of a batch of 4: gates, and nothing that grows from batch to batch."""
    pool, weights = (
        stack_adapters(_adapters(K, LAYERS, D, RANK)),
        torch.rand(500, 4, K, generator=torch.Generator().manual_seed(1)),
    )
    kept = [compose_adapters(pool, w) for w in weights[: sample - 1]]
    mixed = measure(
        compose_adapters, pool, weights[sample - 1], rounds=50, layers=LAYERS, k=K, r=RANK, b=4, sample=sample
    )
    assert len(kept) == sample - 1
    assert mixed.gate["l0"].shape == (4, K * RANK)


def bench_stack(measure):
    measure(stack_adapters, _adapters(K, LAYERS, D, RANK), layers=LAYERS, k=K, r=RANK, d=D)


def bench_fusion_linear(measure):
    """What `bench_peft_linear` does, from a pool."""
    pool = stack_adapters(_adapters(K, LAYERS, D, RANK))
    measure(
        lambda: compose_adapters(pool, [1 / K] * K, mode="fusion", rule="linear"),
        rounds=10,
        layers=LAYERS,
        k=K,
        r=RANK,
        d=D,
    )


def bench_peft_linear(measure, benchmark):
    """peft's add_weighted_adapter('linear') under a new name for each sample; extra_info has the ms of the first and of the last one."""
    peft = pytest.importorskip("peft")
    model, spent, names = torch.nn.Sequential(), [], count()
    for i in range(LAYERS):
        model.add_module(f"l{i}", torch.nn.Linear(D, D))
    cfg = peft.LoraConfig(r=RANK, target_modules=[f"l{i}" for i in range(LAYERS)], init_lora_weights=False)
    model = peft.get_peft_model(model, cfg, adapter_name="a0")
    for j in range(1, K):
        model.add_adapter(f"a{j}", cfg)

    def add():
        start = perf_counter()
        model.add_weighted_adapter([f"a{j}" for j in range(K)], [1 / K] * K, f"sample{next(names)}", "linear")
        spent.append(1e3 * (perf_counter() - start))

    measure(add, rounds=15, layers=LAYERS, k=K, r=RANK, d=D)
    benchmark.extra_info |= {
        "first_ms": round(spent[0], 1),
        "last_ms": round(spent[-1], 1),
        "samples": len(spent),
    }


@pytest.mark.parametrize("how", ["cores", "dense"])
def bench_svd(measure, how):
    """The best rank 16 of the sum of three adapters of rank 16, 1536 x 1536."""
    adapters = _adapters(3, 1, 1536, 16)
    pool, fused = stack_adapters(adapters), {"cores": _cores, "dense": _dense}[how]
    a, b = measure(fused, pool, rounds=10 if how == "cores" else 1, d=1536, k=3, r=16)
    assert a.shape == (16, 1536)
    assert b.shape == (1536, 16)


def bench_svd_ratio(benchmark):
    """Through cores at least 50 times as fast as through the full matrix, and the same; extra_info has the ratio."""
    pool = stack_adapters(_adapters(3, 1, 1536, 16))
    (a, b), (c, d) = _cores(pool), _dense(pool)
    torch.testing.assert_close(b @ a, d @ c, rtol=0, atol=1e-3)  # of values up to 20
    benchmark.pedantic(_cores, (pool,), rounds=10, warmup_rounds=1)
    best = {f: min(_seconds(f, pool) for _ in range(n)) for f, n in ((_cores, 10), (_dense, 2))}
    ratio = best[_dense] / best[_cores]
    benchmark.extra_info |= {
        "ratio": round(ratio),
        "dense_ms": round(1e3 * best[_dense], 1),
        "cores_ms": round(1e3 * best[_cores], 2),
    }
    assert ratio >= 50


def bench_fusion_error(measure):
    pool, weights = stack_adapters(_adapters(3, 4, 1536, 16)), [0.5, 0.3, 0.2]
    fused = compose_adapters(pool, weights, mode="fusion", rule="svd")
    error = measure(fusion_error, pool, weights, fused, rounds=10, layers=4, d=1536, k=3, r=16)
    assert 0.1 < error["l0"] < 0.9


def _cores(pool):
    f = compose_adapters(pool, [0.5, 0.3, 0.2], mode="fusion", rule="svd").factors["l0"]
    return f["a"], f["b"]


def _dense(pool):
    f, c = pool.factors["l0"], torch.tensor([0.25, 0.15, 0.1]).repeat_interleave(16)
    u, s, v = torch.linalg.svd((f["b"] * c) @ f["a"], full_matrices=False)
    return v[:16], u[:, :16] * s[:16]


def _seconds(f, *args):
    start = perf_counter()
    f(*args)
    return perf_counter() - start
