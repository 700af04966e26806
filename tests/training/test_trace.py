"""trace: FLOPs and kernels that are counted without a GPU, against hand counts and torch's own counter."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from medvl.training import gradients, trace

META = torch.device("meta")


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=META)


def test_flops_bytes_and_kernels_of_a_product_and_a_sum():
    a, b = empty(3, 5), empty(5, 7)
    work = trace.count_work(lambda: (a @ b).t() + 1)
    assert work.flops == 2 * 3 * 5 * 7
    # The transposed is a view.
    assert work.operations == {"mm": 1, "add": 1}
    assert work.bytes == 4 * (15 + 35 + 21 + 21 + 21)
    assert work.flops_of_dtype == {"float32": 210}


def test_views_launch_no_kernel():
    a, b = empty(2, 3, 5), empty(2, 5, 7)
    # torch takes the product apart into a batch of products and a view whose schema calls it a new tensor.
    assert trace.count_work(lambda: (a.unsqueeze(1) @ b.unsqueeze(1)).flatten()).operations == {"bmm": 1}


def block(x, w):
    q, k, v = F.linear(x, w["in"]).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    return x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), w["out"])


def test_the_flops_of_a_gradient_are_those_counted_by_hand():
    w = {"in": empty(96, 32).requires_grad_(), "out": empty(32, 32).requires_grad_()}
    x = empty(2, 10, 32)
    weights = 96 * 32 + 32 * 32
    attention = 2 * (2 * 4 * 10 * 10) * (8 + 8)
    forward = 2 * 20 * weights + attention
    # The gradient by the weights of both, that by the input of the second only: x needs none.
    backward = 2 * 20 * weights + 2 * 20 * 32 * 32 + attention * 5 // 2

    def gradient():
        torch.autograd.grad(block(x, w).sum(), list(w.values()))

    assert trace.count_work(gradient).flops == forward + backward

    def checkpointed():
        torch.autograd.grad(checkpoint(block, x, w, use_reentrant=False).sum(), list(w.values()))

    # torch ends the second forward pass as soon as all that was saved is there: without the last product.
    again = trace.count_work(checkpointed).flops - forward - backward
    assert again in (forward, forward - 2 * 20 * 32 * 32)


def test_products_and_convolutions_have_the_flops_of_torchs_counter():
    def compute(device):
        x = torch.zeros(2, 3, 28, 28, device=device)
        kernel = torch.zeros(16, 3, 14, 14, device=device)
        w = torch.zeros(16, 16, device=device, requires_grad=True)
        patches = F.conv2d(x, kernel, stride=14).flatten(2).mT
        torch.autograd.grad(torch.einsum("btd,de->bte", patches @ w, w).sum(), w)

    with FlopCounterMode(display=False) as torchs:
        compute("cpu")
    assert trace.count_work(lambda: compute("meta")).flops == torchs.get_total_flops()


def test_autocast_casts_inputs_of_products_and_each_weight_once():
    params = {"w": empty(32, 32)}
    x = empty(4, 32)

    def loss(p, _):
        return F.linear(F.linear(x, p["w"]), p["w"]).float().sum(), gradients.Aux()

    work = trace.count_work(lambda: gradients.value_and_grad(loss, precision="bfloat16")(params, None))
    assert set(work.flops_of_dtype) == {"bfloat16"}
    # x and w; the gradient of w back to float32, `.float()` and its gradient.
    assert work.operations["_to_copy"] == 5
    plain = trace.count_work(lambda: gradients.value_and_grad(loss)(params, None))
    assert set(plain.flops_of_dtype) == {"float32"}
    assert plain.flops == work.flops


def test_seconds_are_of_products_of_memory_or_of_launches():
    gpu = trace.Gpu(bfloat16=1e12, tf32=1e11, float32=1e10, bandwidth=1e9)
    big = trace.Work({trace.Kernel("mm", "bfloat16", 6 * 10**11, 8): 2})
    assert big.seconds(gpu) == pytest.approx(2.0)
    moved = trace.Work({trace.Kernel("add", "float32", 0, 8 * 10**8): 3})
    assert moved.seconds(gpu) == pytest.approx(3.0)
    small = trace.Work({trace.Kernel("add", "float32", 0, 8): 10**6})
    assert small.seconds(gpu) == pytest.approx(4.0)
    assert (big + moved).seconds(gpu) == pytest.approx(5.0)
    assert ((big + moved) * 2 - big).seconds(gpu) == pytest.approx(8.0)


def test_a_gathered_table_costs_what_is_read_of_it():
    table, ids = empty(10**6, 8), torch.zeros(5, dtype=torch.int64, device=META)
    assert trace.count_work(lambda: F.embedding(ids, table)).bytes == 2 * 5 * 8 * 4


def test_peak_seconds_are_flops_over_the_rate_of_their_dtype():
    a, b = empty(3, 5), empty(5, 7)
    work = trace.count_work(lambda: (a @ b, a.bfloat16() @ b.bfloat16())) * 1e9
    gpu = trace.GPUS["h100"]
    assert work.peak_seconds(gpu) == pytest.approx(210e9 / 67e12 + 210e9 / 989.5e12)
    assert work.seconds(gpu) > work.peak_seconds(gpu)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_no_peak_is_made_up(name, key):
    assert trace.find_gpu(name) is (trace.GPUS[key] if key else None)
