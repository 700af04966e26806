"""Volumes or cached slice features joined with their reports, and the batches they make."""

import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from medvl.base.store import Store
from medvl.ct import names

_log = logging.getLogger(__name__)


@frozen(kw_only=True, eq=False)
class Pairs:
    """Volumes that have a report, in the order of their names."""

    store: Store  # of the volumes, or of features of their slices
    names: tuple[str, ...]  # of volumes
    # For each volume the parts of its report that have text: {"findings": ..., "impression": ...}
    texts: tuple[dict[str, str], ...]

    @property
    def scans(self) -> list[str]:
        """The scan of every volume; reconstructions of one scan share it."""
        # `names` is the module, `self.names` the field.
        return [names.scan_of(n) for n in self.names]


def join_pairs(store: Store, texts_of_part: Mapping[str, Mapping[str, str]]) -> Pairs:
    """Join the volumes of a store with their reports by name. A warning counts those without a partner.

    Args:
        texts_of_part: {part of the report: {volume name: text}}; a volume needs at least one part.
    Raises:
        ValueError: no name is on both sides.
    """
    # From texts by part to parts by volume.
    reports: dict[str, dict[str, str]] = {}
    for part, texts in texts_of_part.items():
        for name, text in texts.items():
            reports.setdefault(name, {})[part] = text
    # Sorted, so that a batch does not depend on the order of store or table.
    both = tuple(sorted(n for n in store.names if n in reports))
    if not both:
        volume = next(iter(store.names), "nothing")
        report = next(iter(reports), "nothing")
        raise ValueError(
            f"{store.path}: none of its {len(store.names)} volumes has one of the {len(reports)} reports "
            f"(e.g. {volume} / {report})"
        )
    if len(both) < max(len(store.names), len(reports)):
        _log.warning(
            "%s: %d pairs; %d volumes have no report, %d reports have no volume",
            store.path.name,
            len(both),
            len(store.names) - len(both),
            len(reports) - len(both),
        )
    return Pairs(store=store, names=both, texts=tuple(reports[n] for n in both))


def read_slices(store: Store, volumes: Sequence[str]) -> dict[str, Tensor]:
    """A batch of volumes, cut to the range of slices that any of them occupies.

    Returns:
        "slices" [b, s, ...] as stored, "mask" bool [b, s] (scan, not padding), "position_mm" float32 [b, s],
        height along the body axis, 0 at the first slice of the stored volume (padding or not).
    """
    # A row of the store has, among others, "occupied": its slices first:stop are scan, the others padding.
    rows = [store.row(name) for name in volumes]
    # Padding at both ends is left out where no volume of the batch needs it.
    first = min(row["occupied"][0] for row in rows)
    stop = max(row["occupied"][1] for row in rows)
    index = np.arange(first, stop)
    # A volume that is shorter than the range brings its own padding, which the mask excludes.
    slices = np.empty((len(rows), stop - first, *store.shape[1:]), store.dtype)
    masks, positions = [], []
    for i, (name, row) in enumerate(zip(volumes, rows, strict=True)):
        own_first, own_stop = row["occupied"]
        slices[i] = store.read(name, first, stop)
        masks.append((own_first <= index) & (index < own_stop))
        positions.append(index * row["spacing_mm"][0])
    return {
        "slices": torch.from_numpy(slices),
        "mask": torch.from_numpy(np.stack(masks)),
        "position_mm": torch.from_numpy(np.stack(positions).astype(np.float32)),
    }


def draw_text(
    text_of_part: Mapping[str, str], shares: Mapping[str, float], most: int, gen: torch.Generator
) -> str:
    """The text of a report for one training step: one part, drawn by `shares`, then `some_sentences` of it.

    Args:
        text_of_part: {part: text} of the parts that have text.
        shares: {part: how often it is drawn, relative to the others}, for every part of `text_of_part`.
            Where all of them are 0 the first part is taken.
        most: number of sentences at most; 0 takes the whole part.
    """
    present = list(text_of_part)
    weights = torch.tensor([shares[part] for part in present])
    part = present[0]
    # A single part, or parts whose shares are all 0, take no random number: the first is the one.
    if len(present) > 1 and weights.sum() > 0:
        part = present[int(torch.multinomial(weights, 1, generator=gen))]
    return some_sentences(text_of_part[part], most, gen)


def some_sentences(text: str, most: int, gen: torch.Generator) -> str:
    """One to `most` random sentences of a report in random order; the text itself where `most` is 0 or it is
    one sentence.

    A report is a set of statements, so a part of them is still true. Leaving some out shows which words
    belong to which finding, and keeps the text tower from learning whole reports by heart.
    """
    # Nothing is drawn from `gen` here, nor for a single sentence below.
    if not most:
        return text
    # A sentence ends in "." or ";" before a space: "2.5 mm" stays whole.
    sentences = [s for s in re.split(r"(?<=[.;])\s+", text.strip()) if s]
    if len(sentences) < 2:
        return text
    # First how many, then which: the order of these two draws is part of what a seed means.
    count = int(torch.randint(1, min(most, len(sentences)) + 1, (), generator=gen))
    order = torch.randperm(len(sentences), generator=gen)
    return " ".join(sentences[i] for i in order[:count].tolist())
