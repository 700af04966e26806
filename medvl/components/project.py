"""From visual tokens to the width of a language model."""

import torch.nn.functional as F
from attrs import frozen
from torch import Generator, Tensor

from medvl.base.tree import Tree
from medvl.components import layers


@frozen(kw_only=True)
class ProjectConfig:
    """Two linear layers and a GELU between them."""

    inputs: int = 1024  # width of the tokens
    hidden: int = 2048
    outputs: int = 2560  # width of the language model

    def __attrs_post_init__(self) -> None:
        if min(self.inputs, self.hidden, self.outputs) < 1:
            raise ValueError(
                f"ProjectConfig: widths must be positive, got {self.inputs}, {self.hidden}, {self.outputs}"
            )


def init_project(cfg: ProjectConfig, gen: Generator) -> Tree:
    """Parameters of `project`, float32 on CPU: {"up", "down"}."""
    # width_in ** -0.5 keeps the scale of what comes in; "up" is drawn first.
    up = layers.init_linear(cfg.inputs, cfg.hidden, gen, std=cfg.inputs**-0.5)
    down = layers.init_linear(cfg.hidden, cfg.outputs, gen, std=cfg.hidden**-0.5)
    return {"up": up, "down": down}


def project(cfg: ProjectConfig, params: Tree, tokens: Tensor) -> Tensor:
    """`down gelu(up z)`, [..., inputs] -> [..., outputs], each token by itself, in the dtype of the weights.

    Raises:
        ValueError: the tokens have another width.
    Source: the projector of LLaVA 1.5, Liu et al. 2023, arXiv:2310.03744.
    """
    if tokens.shape[-1:] != (cfg.inputs,):
        raise ValueError(
            f"project: tokens must be [..., {cfg.inputs}], got {list(tokens.shape)}; "
            "set project.inputs to their width"
        )
    tokens = tokens.to(params["up"]["weight"].dtype)
    hidden = F.gelu(layers.linear(params["up"], tokens))
    return layers.linear(params["down"], hidden)
