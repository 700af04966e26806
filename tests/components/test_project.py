import pytest
import torch
from torch import nn

from medvl.base import tree
from medvl.components.project import ProjectConfig, init_project, project


def test_it_is_two_layers_and_a_gelu(gen):
    cfg = ProjectConfig(inputs=6, hidden=9, outputs=4)
    p = tree.map_leaves(lambda t: torch.randn(t.shape, generator=gen), init_project(cfg, gen))
    peer = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4))
    names = {"0": "up", "2": "down"}
    peer.load_state_dict(
        {f"{i}.{kind}": p[name][kind] for i, name in names.items() for kind in ("weight", "bias")}
    )
    z = torch.randn(2, 5, 6, generator=gen)
    torch.testing.assert_close(project(cfg, p, z), peer(z))
    torch.testing.assert_close(project(cfg, p, z[0, 0]), peer(z)[0, 0])


def test_number_of_parameters(gen):
    assert tree.count_values(init_project(ProjectConfig(), gen)) == 7_344_640


def test_errors(gen):
    cfg = ProjectConfig(inputs=6, hidden=9, outputs=4)
    with pytest.raises(ValueError, match=r"tokens must be \[\.\.\., 6\], got \[2, 5\]; set project.inputs"):
        project(cfg, init_project(cfg, gen), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="widths must be positive, got 6, 0, 4"):
        ProjectConfig(inputs=6, hidden=0, outputs=4)
