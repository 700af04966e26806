"""determinism: on for a block and off again, prepared before CUDA starts, and an operation without a kernel is named."""

import os

import pytest
import torch

from medvl.training.determinism import deterministic

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


@pytest.fixture
def with_gpu(monkeypatch):
    """A GPU that has not been started yet, in an environment without the variable."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back after the test
    monkeypatch.delenv(VARIABLE)


def test_it_lasts_as_long_as_the_block():
    torch.backends.cudnn.benchmark = True
    try:
        with deterministic(strict=False):
            assert settings() == (True, True, False)
            with deterministic():
                assert settings() == (True, False, False)
            assert settings() == (True, True, False)
            with pytest.raises(KeyError), deterministic():
                raise KeyError
            assert settings() == (True, True, False)
        assert settings() == (False, False, True)
        with deterministic(False):
            assert settings() == (False, False, True)
    finally:
        torch.backends.cudnn.benchmark = False


def test_cublas_is_prepared_before_cuda_starts(with_gpu, monkeypatch):
    with deterministic(False):
        assert VARIABLE not in os.environ
    with deterministic():
        assert os.environ[VARIABLE] == ":4096:8"
    # CUDA has been started with it: a second run of this process is as good as the first.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with deterministic():
        pass
    monkeypatch.setenv(VARIABLE, ":16:8")
    with deterministic():
        assert os.environ[VARIABLE] == ":16:8"


def test_cuda_that_was_started_without_it_is_refused(with_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with (
        pytest.raises(
            ValueError, match=f"CUDA was started before, without {VARIABLE}.* set it to :4096:8 before Python"
        ),
        deterministic(),
    ):
        pass
    monkeypatch.setenv(VARIABLE, ":0:0")
    with pytest.raises(ValueError, match="must be :4096:8 or :16:8, found ':0:0'"), deterministic():
        pass
    assert settings() == (False, False, False)


def test_an_operation_without_such_a_kernel_is_named():
    """Torch's own message of an operation that the CPU has none for."""
    volumes = torch.ones(1, 1, 4, 4, 4)
    pooled, places = torch.nn.functional.max_pool3d(volumes, 2, return_indices=True)
    message = "max_unpooling3d.* does not have a deterministic implementation.*train.deterministic = false"
    with pytest.raises(ValueError, match=message), deterministic():
        torch.nn.functional.max_unpool3d(pooled, places, 2)
    with pytest.raises(RuntimeError, match="out of memory"), deterministic():
        raise RuntimeError("out of memory")
    with pytest.warns(UserWarning, match="max_unpooling3d"), deterministic(strict=False):
        torch.nn.functional.max_unpool3d(pooled, places, 2)
