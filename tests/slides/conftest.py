import pytest
import torch

from tests.slides.test_features import features, grid, write_clam, write_trident

WIDTH = 6


@pytest.fixture
def folder(tmp_path):
    """Four slides in four formats; their names, features in float16 and coordinates."""
    (tmp_path / "in").mkdir()
    made = {f"S{i}": (features(n, WIDTH, "f2", i), grid(n, 512)) for i, n in enumerate((11, 0, 5, 9))}
    write_trident(tmp_path / "in" / "S0.h5", *made["S0"])
    write_trident(tmp_path / "in" / "S1.h5", *made["S1"])
    write_clam(tmp_path / "in" / "S2.h5", made["S2"][0].astype("f4"), made["S2"][1])
    torch.save(torch.from_numpy(made["S3"][0]), tmp_path / "in" / "S3.pt")
    return tmp_path / "in", made
