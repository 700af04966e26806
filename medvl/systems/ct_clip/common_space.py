"""Volumes and texts in their common space, where findings are read off by comparison with words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medvl.base import processes, store
from medvl.base.display import track
from medvl.base.tree import Tree
from medvl.ct import pairs, protocols, reports, zero_shot
from medvl.hub import tokens
from medvl.systems.ct_clip import model
from medvl.systems.ct_clip.model import Model
from medvl.training import gradients
from medvl.training.order import prefetch

_TEXTS = 64  # texts that are embedded at a time


def place_volumes(ct_clip: Model, params: Tree, volumes: store.Store, volume_names: Sequence[str]) -> Tensor:
    """Volumes in the common space of volumes and texts, [n, d] float32 on the CPU; each is encoded once.

    Processes that train together must all call it: each encodes its share, and all get the rows of all.
    """
    size = ct_clip.cfg.evaluate.batch
    starts = range(0, len(volume_names), size)
    share = list(processes.share_batches(len(starts)))
    spans = [slice(starts[number], starts[number] + size) for number, _ in share]

    def read(i: int) -> dict[str, Tensor]:
        return pairs.read_slices(volumes, volume_names[spans[i]])

    device = params["project"]["image"]["weight"].device
    rows = torch.zeros(len(volume_names), ct_clip.cfg.contrast.dim)
    batches = prefetch(read, 0, len(spans), device)
    for i, batch in track(batches, "embedding volumes, batch", total=len(spans)):
        placed = place_batch(ct_clip, params, batch)
        _, counts = share[i]
        if counts:
            rows[spans[i]] = placed
    # A row is zero in all processes but one, so that the sum is that row.
    return processes.sum_over_processes(rows)


def place_batch(ct_clip: Model, params: Tree, batch: dict[str, Tensor]) -> Tensor:
    """A batch of slices (see `model.embed_volumes`) in the common space, [b, d] float32 on the CPU."""
    with torch.no_grad(), gradients.autocast(params, ct_clip.cfg.train.precision):
        rows = model.embed_volumes(ct_clip, params, batch)
    statistics = params["running"].get("image", {})
    return model.place(params, "image", rows, statistics).detach().cpu()


def place_texts(ct_clip: Model, params: Tree, texts: Sequence[str]) -> Tensor:
    """Texts in the common space, [n, d] float32 on the CPU."""
    statistics = params["running"].get("text", {})
    rows = []
    for start in range(0, len(texts), _TEXTS):
        ids, mask = tokens.tokenize(
            ct_clip.tokenizer, texts[start : start + _TEXTS], ct_clip.cfg.words.tower.context
        )
        # The model takes k texts of each volume; here k is 1.
        batch = {"ids": ids[:, None], "words": mask[:, None]}
        with torch.no_grad(), gradients.autocast(params, ct_clip.cfg.train.precision):
            embedded = model.embed_texts(ct_clip, params, batch)[:, 0]
        rows.append(model.place(params, "text", embedded, statistics).detach().cpu())
    return torch.cat(rows)


def finding_probabilities(
    ct_clip: Model, params: Tree, embeddings: Tensor, findings: Sequence[str]
) -> Tensor:
    """Zero-shot probability [n, c] of each finding for volumes in the common space [n, d]."""
    return torch.sigmoid(finding_logits(ct_clip, params, embeddings, findings))


def finding_logits(ct_clip: Model, params: Tree, embeddings: Tensor, findings: Sequence[str]) -> Tensor:
    """Zero-shot logit [n, c] of each finding for volumes in the common space [n, d], float64.

    That of a finding which the protocol merges from others is the highest of theirs.
    """
    merged = protocols.PROTOCOLS[ct_clip.cfg.evaluate.protocol]
    parts = {finding: merged.get(finding, (finding,)) for finding in findings}
    asked = list(dict.fromkeys(sum(parts.values(), ())))
    present: list[str] = []
    absent: list[str] = []
    for finding in asked:
        sentences, negations = reports.prompts_for(finding, ct_clip.cfg.evaluate.prompts)
        present += sentences
        absent += negations
    # All prompts of all findings are embedded as one list [c * k], and become [c, k, d].
    prompts_of_finding = (len(asked), -1)
    positive = place_texts(ct_clip, params, present).unflatten(0, prompts_of_finding)
    negative = place_texts(ct_clip, params, absent).unflatten(0, prompts_of_finding)
    scale = params["contrast"]["log_scale"].exp().cpu()
    logits = zero_shot.zero_shot_logits(embeddings, positive, negative, scale)
    return torch.from_numpy(protocols.merge_parts(parts, asked, logits.numpy()))
