"""What a drawn head shows, told by a small network: with it pictures drawn from reports are judged."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medvl.base.tree import Tree
from medvl.components.layers import init_linear, linear
from medvl.phantoms import anatomy
from medvl.training import gradients, loop, optim, order, states

FACTS = ("look", "side", "kind")
_SHOWN = tuple(product(anatomy.LOOKS, anatomy.SIDES, anatomy.KINDS))  # all that a picture can show


def fit_probe(*, heads: int = 800, steps: int = 600, seed: int = 0) -> Tree:
    """Weights of `probe`, trained on heads of a seed that no run draws with; 10 s on a core."""
    cfg, gen = anatomy.AnatomyConfig(seed=2**31 + seed), torch.Generator().manual_seed(seed)
    pixels, labels = [], []
    for number in range(heads):
        case = anatomy.draw_case(cfg, "train", number)
        for look, picture in anatomy.draw_pair(cfg, "train", number).items():
            pixels.append(_pixels(picture) + 0.05 * torch.randn((), generator=gen))  # in any light
            labels.append(_SHOWN.index((look, case["side"], case["kind"])))
    x, y = torch.stack(pixels), torch.tensor(labels)

    def loss(params: Tree, rows: list[int]) -> tuple[Tensor, gradients.Aux]:
        return F.cross_entropy(_logits(params, x[rows]), y[rows]), gradients.Aux()

    first, second = torch.randn(16, 1, 5, 5, generator=gen), torch.randn(32, 16, 3, 3, generator=gen)
    head = init_linear(32 * 8 * 8, len(_SHOWN), gen)
    params = {"first": first * 0.2, "second": second * 0.1, "head": head}
    optimizer = optim.adamw(lambda name: optim.Rate(lr=1e-3))
    step = loop.make_step(gradients.value_and_grad(loss), optimizer)
    rows_of = order.batch_indices([str(row) for row in range(len(y))], min(32, len(y)), seed)
    state = states.State(params=params, opt=optimizer.init(params))
    for i in range(steps):
        state, _ = step(state, rows_of(i))
    return state.params


def probe(params: Tree, pictures: Sequence[np.ndarray]) -> list[dict[str, str]]:
    """{"look", "side", "kind"} of each picture, uint8 [y, x, 3] of any size; args: from `fit_probe`."""
    best = _logits(params, torch.stack([_pixels(picture) for picture in pictures])).argmax(1)
    return [dict(zip(FACTS, _SHOWN[i], strict=True)) for i in best.tolist()]


def _pixels(picture: np.ndarray) -> Tensor:
    """Grey values [1, 32, 32] around 0."""
    return F.adaptive_avg_pool2d(torch.tensor(picture.mean(2)[None], dtype=torch.float32), 32) / 128 - 1


def _logits(params: Tree, x: Tensor) -> Tensor:
    x = F.relu(F.conv2d(x, params["first"], stride=2, padding=2))
    x = F.relu(F.conv2d(x, params["second"], stride=2, padding=1))
    return linear(params["head"], x.flatten(1))
