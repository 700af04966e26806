"""The tokens of the slides of a run, kept in its folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from medvl.base import files, processes
from medvl.slides.question_formats import SlideConversation
from medvl.slides.tokens import slide_tokens
from medvl.systems.slide_vqa import data
from medvl.systems.slide_vqa.model import Model

_MEAN = "mean_token.npy"


def compute_tokens(
    model: Model, folder: Path, conversations: Sequence[SlideConversation], *, together: bool = False
) -> dict[str, Tensor]:
    """The tokens [k, d] of all slides of conversations that have features; those in `folder` are read.

    Args:
        together: all processes call this at once, so that each computes its share and finds the others'.
    """
    if model.cfg.data.blind:
        return {}
    # The width that the compressor takes: features of another one are an error, not a wrong token.
    features = data.open_slides(model.cfg, data.slides_of(conversations), dims=model.compress.dim)
    data.check_encoder(folder, features)
    compute = partial(slide_tokens, model.compress, model.compressor, features, folder / "tokens")
    if together and processes.world_size() > 1:
        # Every process fills the cache with its share. After the wait the call below finds all of them there.
        share = features.names[processes.rank() :: processes.world_size()]
        if share:
            compute(names=share)
        processes.wait_for_all()
    return compute()


def write_mean_token(folder: Path, tokens: Sequence[Tensor]) -> None:
    """Keep the mean over slides of a run: the map of an answer compares with it."""
    files.write_array(folder / _MEAN, torch.stack([*tokens]).mean(0).numpy())


def read_mean_token(folder: Path, model: Model) -> Tensor:
    """The mean tokens [k, d] of the slides that a run was trained on.

    Raises:
        ValueError: the run was trained without slides.
    """
    path = folder / _MEAN
    if not path.exists():
        raise ValueError(
            f"{folder}: must have seen slides (data.blind = false), found no {_MEAN}; train it again"
        )
    # A file of another compressor is refused by its shape.
    shape = (model.compress.slots, model.compress.dim)
    return torch.from_numpy(files.read_array(path, shape, "train the run again"))
