"""Shared by all tests: no network, real test data when it lies beside the checkout."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Of several processes beside each other each keeps to one core: threads that wait for a core that another process
    # has would spin, and all be slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real test files: $MEDVL_TEST_DATA, else ../shared/data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MEDVL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the real test files in {folder} (set MEDVL_TEST_DATA)")
    return folder


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)
