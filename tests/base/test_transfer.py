"""Batches in pinned memory, and copies that nobody waits for; on a GPU that is not there."""

import torch

from medvl.base import transfer
from medvl.training.order import prefetch
from tests.gpu.pretend import GPU, pretended_gpu

CPU = torch.device("cpu")


def test_every_tensor_of_a_batch_is_pinned_once():
    tensor = torch.arange(6.0)
    with pretended_gpu():
        batch = transfer.pin({"a": tensor, "b": [tensor, "text"], "c": (3, tensor), "d": None})
        pinned = [batch["a"], batch["b"][0], batch["c"][1]]
        assert all(part.is_pinned() and torch.equal(part, tensor) for part in pinned)
        assert (batch["b"][1], batch["c"][0], batch["d"]) == ("text", 3, None)
        assert transfer.pin(batch["a"]) is batch["a"]
        assert not tensor.is_pinned()


def test_a_copy_from_pinned_memory_is_not_waited_for():
    tensor = torch.arange(6.0)
    with pretended_gpu() as gpu:
        moved = transfer.to_device(tensor, GPU)
        assert moved.device == GPU
        assert not gpu.waits
        transfer.pin(tensor)[2:].to(GPU, non_blocking=True)
        assert not gpu.waits
        tensor.to(GPU, non_blocking=True)
        transfer.pin(tensor).to(GPU)
        moved.cpu()
        assert gpu.count["wait"] == 3
        assert transfer.free_bytes(GPU) == gpu.free_bytes
    assert transfer.to_device(tensor, CPU) is tensor
    assert transfer.free_bytes(CPU) is None


def test_batches_for_a_gpu_are_pinned_where_they_are_made():
    with pretended_gpu():
        assert [batch.is_pinned() for _, batch in prefetch(torch.ones, 1, 4, GPU)] == [True] * 3
        assert [batch.is_pinned() for _, batch in prefetch(torch.ones, 1, 4, CPU)] == [False] * 3
