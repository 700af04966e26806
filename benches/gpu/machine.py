"""Phases: what the machine can do, whether every case gives the CPU's numbers, and whether it repeats its bits."""

import os
import sys
import time
import traceback

import torch
import torch.nn.functional as F

from benches.gpu.measure import Place, Results, digits, failure, seconds, tf32
from medvl.hub import skeletons
from tests.gpu import cases


def ceilings(place: Place, results: Results) -> None:
    """Matrix rates, memory, launches and copies: what all that follows is measured against."""
    import transformers

    results["versions"] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    results["cpus"] = os.cpu_count()
    results["gpu"] = torch.cuda.get_device_name() if place.on_gpu else "none"
    try:
        import bitsandbytes

        results["bitsandbytes"] = bitsandbytes.__version__
    except Exception as error:  # the phases that need it say so themselves
        results["bitsandbytes"] = failure(error)
    n = place.size(8192, 256)
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=place.device, dtype=dtype) for _ in range(2))
        results[f"tflops {str(dtype)[6:]}"] = _rate(place, a, b)
    with tf32(place):
        results["tflops tf32"] = _rate(place, a, b)
    source = torch.empty(place.size(2**30, 2**20), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    copy = seconds(place, lambda: target.copy_(source))
    results["copy TB/s"] = digits(2 * source.numel() / copy / 1e12)
    small = torch.ones(8, device=place.device)

    def thousand_kernels():
        for _ in range(1000):
            small.add_(1)

    results["us per small kernel"] = digits(seconds(place, thousand_kernels) * 1e3)
    host = torch.empty(place.size(2**28, 2**20), dtype=torch.uint8)
    results["from host GB/s"] = digits(
        host.numel() / seconds(place, lambda: host.to(place.device, copy=True)) / 1e9
    )
    if place.on_gpu:
        pinned = host.pin_memory()
        copy = seconds(place, lambda: pinned.to(place.device, non_blocking=True))
        results["from pinned host GB/s"] = digits(host.numel() / copy / 1e9)
        results["free GB"] = digits(torch.cuda.mem_get_info()[0] / 1e9)


def _rate(place: Place, a: torch.Tensor, b: torch.Tensor) -> float:
    return digits(2 * len(a) ** 3 / seconds(place, lambda: a @ b) / 1e12)


def correct(place: Place, results: Results) -> None:
    """Every case of tests/gpu/cases.py on the CPU and on the device, each with its tolerance."""
    torch.set_num_threads(4)  # toy sizes gain nothing from more
    failed = []
    for name, case in cases.CASES.items():
        start = time.perf_counter()
        try:
            errors = cases.difference(case.compute("cpu"), case.compute(place.device))
            worst = max(errors, key=lambda number: _nan_last(errors[number]))
            passed = errors[worst] <= case.tolerance
            results[name] = {
                "error": digits(errors[worst], 3),
                "worst": worst,
                "tolerance": case.tolerance,
                "seconds": digits(time.perf_counter() - start, 3),
            }
        except Exception as error:
            passed = False
            results[name] = failure(error) | {"at": traceback.format_exc(limit=-3)[-600:]}
            if "CUDA error" in str(error):
                raise
        if not passed:
            failed.append(name)
    results["cases"] = len(cases.CASES)
    results["failed"] = failed


def _nan_last(error: float) -> float:
    return error if error == error else float("inf")


def same_bits(place: Place, results: Results) -> None:
    """Whether three runs give the same bits, with and without torch's deterministic algorithms."""
    torch.set_num_threads(4)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS asks for it
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        label = "deterministic, " if deterministic else ""
        try:
            for name, compute in _repeated(place).items():
                try:
                    digests = {skeletons.weights_digest(compute()) for _ in range(3)}
                    results[f"{label}{name}"] = len(digests) == 1
                except Exception as error:  # an operation without a deterministic kernel
                    results[f"{label}{name}"] = failure(error)
        finally:
            torch.use_deterministic_algorithms(False)


def _repeated(place: Place):
    """{name: computation}, some at sizes at which attention and embeddings add by atomics."""
    repeated = {}
    for name in ("ct_clip gradient by chunks", "tune whole qwen3, text", "tune H-LoRA"):
        repeated[name] = lambda compute=cases.CASES[name].compute: compute(place.device)
    rows, tokens = place.size((2, 2048), (1, 64))
    q = torch.randn(rows, 8, tokens, 64, device=place.device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(q)
    keep = torch.ones(rows, 1, 1, tokens, dtype=torch.bool, device=place.device)
    keep[..., tokens // 2 :] = False

    def attention_gradient(**options):
        out = F.scaled_dot_product_attention(q, q, q, **options)
        return {"q": torch.autograd.grad(out, q, grad)[0]}

    repeated[f"attention, causal, {tokens} tokens"] = lambda: attention_gradient(is_causal=True)
    repeated[f"attention, masked, {tokens} tokens"] = lambda: attention_gradient(attn_mask=keep)
    width = place.size(768, 32)
    positions = torch.randn(1, width, 37, 37, device=place.device, requires_grad=True)
    weight = torch.randn(1, width, 16, 16, device=place.device)

    def interpolated_gradient():
        smaller = F.interpolate(positions, (16, 16), mode="bicubic", antialias=True)
        return {"positions": torch.autograd.grad(smaller, positions, weight)[0]}

    repeated["positions of DINOv2 at 224 pixels"] = interpolated_gradient
    return repeated
