"""Which slices of a scan speak for a finding: by occlusion, from embeddings of its slices that are computed
once.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medvl.base.tree import Tree
from medvl.systems.ct_clip.model import Model
from medvl.systems.ct_clip.score import finding_logits, place_batch


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
        batch: of one scan, from `slice_features.encode_batch`.
        average: [s, d], what the slices of other scans are on average at these heights.
    """
    features = batch["slices"]
    if average is not None:
        average = average.to(features)
    reference = features if average is None else average[None]
    placed = [place_batch(ct_clip, params, {**batch, "slices": reference})]
    # Each row is a scan in which one slice is not as in the reference.
    for rows in torch.eye(features.shape[1], dtype=torch.bool).split(ct_clip.cfg.evaluate.batch):
        chosen = rows.to(features.device)[..., None]
        scans = {
            "slices": features.expand(len(rows), -1, -1)
            if average is None
            else torch.where(chosen, features, average),
            "mask": ~rows if average is None else batch["mask"].expand(len(rows), -1),
            "position_mm": batch["position_mm"].expand(len(rows), -1),
        }
        placed.append(place_batch(ct_clip, params, scans))
    # Not from probabilities: of a finding that is sure they are 1, whatever slice is left out.
    logits = finding_logits(ct_clip, params, torch.cat(placed), findings)
    gains = logits[1:] - logits[0]
    return -gains if average is None else gains
