"""The same bits from every run on one kind of GPU, as far as torch's kernels allow."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS adds in the same order each time


@contextmanager
def deterministic(wanted: bool = True, *, strict: bool = True) -> Iterator[None]:
    """While the block lasts, torch takes kernels that give the same bits each time; they may be slower.

    The CPU gives the same bits without it. It must be entered before CUDA is started.

    Args:
        wanted: False does nothing.
        strict: an operation without such a kernel is an error; else torch warns of it.
    Raises:
        ValueError: CUDA was started before and was not prepared for it; as `strict` says.
    """
    if not wanted:
        yield
        return
    if torch.cuda.is_available():
        _prepare_cublas()
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    # It would choose the fastest convolution by measuring, which is not always the same one.
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as e:
        # Torch's message goes on with advice for programs, such as to turn the setting off for an operation.
        reason, found, _ = str(e).partition("does not have a deterministic implementation")
        if not found:
            raise
        raise ValueError(
            f"train.deterministic: {reason}{found} on this device; set train.deterministic = false, which "
            "gives results that differ in their last bits from run to run"
        ) from e
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark


def _prepare_cublas() -> None:
    """Set the variable that cuBLAS reads when it starts. It stays set, since what was started stays, too."""
    value = os.environ.get(_VARIABLE)
    if value is None and torch.cuda.is_initialized():
        raise ValueError(
            f"train.deterministic: CUDA was started before, without {_VARIABLE}, which is read then; set it "
            f"to {_WORKSPACES[0]} before Python starts"
        )
    if value not in (None, *_WORKSPACES):
        raise ValueError(
            f"train.deterministic: the variable {_VARIABLE} must be {' or '.join(_WORKSPACES)}, found {value!r}"
        )
    os.environ[_VARIABLE] = value or _WORKSPACES[0]
