"""Which slices of a scan speak for a finding: by occlusion, from embeddings of its slices that are computed
once.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medvl.base import transfer
from medvl.base.display import track
from medvl.base.store import Store
from medvl.base.tree import Tree
from medvl.components import encode
from medvl.ct import pairs
from medvl.systems.ct_clip import model
from medvl.systems.ct_clip.common_space import finding_logits, place_batch
from medvl.systems.ct_clip.model import Model
from medvl.training import gradients

AVERAGE = "average_slices.npy"  # in the results of a run


def encode_batch(ct_clip: Model, params: Tree, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of `embed_volumes` with embeddings [b, s, d] in the place of its voxels."""
    slices = transfer.to_device(batch["slices"], params["fuse"]["norm"]["weight"].device)
    with torch.no_grad(), gradients.autocast(params, ct_clip.cfg.train.precision):
        features = model.encode_volumes(ct_clip, params["vit"], slices, batch["mask"])
    return {**batch, "slices": features}


def average_slices(ct_clip: Model, params: Tree, volumes: Store, names: Sequence[str]) -> Tensor:
    """The mean embedding [z, d] of the slices at each height of the grid; of all slices where no volume has one."""
    total = torch.zeros(volumes.shape[0], encode.embedding_width(ct_clip.cfg.encode, ct_clip.vit))
    count = torch.zeros(volumes.shape[0], 1)
    for name in track(names, "averaging slices of volume"):
        batch = encode_batch(ct_clip, params, pairs.read_slices(volumes, [name]))
        first, stop = volumes.row(name)["occupied"]
        total[first:stop] += batch["slices"][0].float().cpu()
        count[first:stop] += 1
    return torch.where(count > 0, total / count.clamp(min=1), total.sum(0) / count.sum())


def slice_effects(
    ct_clip: Model,
    params: Tree,
    batch: Mapping[str, Tensor],
    findings: Sequence[str],
    average: Tensor | None = None,
) -> Tensor:
    """How much each slice of a scan speaks for each finding, [s, c], as a change of the zero-shot logit.

    With `average` all other slices are occluded: what a scan of average slices gains by having this one of the
    scan. Without it the slice itself is left out, and what the scan loses is told: that also has what a scan
    misses that is shorter than those of the training, mostly at its ends.

    Args:
        batch: of one scan, from `encode_batch`.
        average: [s, d], what the slices of other scans are on average at these heights.
    """
    features = batch["slices"]
    if average is not None:
        average = average.to(features)
    reference = features if average is None else average[None]
    placed = [place_batch(ct_clip, params, {**batch, "slices": reference})]
    # Each row is a scan in which one slice is not as in the reference.
    for rows in torch.eye(features.shape[1], dtype=torch.bool).split(ct_clip.cfg.evaluate.batch):
        if average is None:
            slices, mask = features.expand(len(rows), -1, -1), ~rows
        else:
            chosen = rows.to(features.device)[..., None]
            slices = torch.where(chosen, features, average)
            mask = batch["mask"].expand(len(rows), -1)
        position_mm = batch["position_mm"].expand(len(rows), -1)
        scans = {"slices": slices, "mask": mask, "position_mm": position_mm}
        placed.append(place_batch(ct_clip, params, scans))
    # Not from probabilities: of a finding that is sure they are 1, whatever slice is left out.
    logits = finding_logits(ct_clip, params, torch.cat(placed), findings)
    gains = logits[1:] - logits[0]
    return -gains if average is None else gains
