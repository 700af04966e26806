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

    store: Store
    names: tuple[str, ...]
    texts: tuple[
        dict[str, str], ...
    ]  # of each volume, the parts of its report that have text: {"findings": ..., "impression": ...}

    @property
    def scans(self) -> list[str]:
        """The scan of every volume: reconstructions of one scan share it."""
        return [names.scan_of(n) for n in self.names]


def join_pairs(store: Store, parts: Mapping[str, Mapping[str, str]]) -> Pairs:
    """Join by name. What is on one side only is counted in a warning.

    Args:
        parts: {part of the report: {volume name: text}}; a volume needs one of them.

    Raises:
        ValueError: no name is on both sides.
    """
    reports: dict[str, dict[str, str]] = {}
    for part, texts in parts.items():
        for name, text in texts.items():
            reports.setdefault(name, {})[part] = text
    both = tuple(sorted(n for n in store.names if n in reports))
    if not both:
        some = f"{store.names[0] if store.names else 'nothing'} / {next(iter(reports), 'nothing')}"
        raise ValueError(
            f"{store.path}: none of its {len(store.names)} volumes has one of the {len(reports)} reports (e.g. {some})"
        )
    if len(both) < max(len(store.names), len(reports)):
        alone = len(store.names) - len(both), len(reports) - len(both)
        _log.warning(
            "%s: %d pairs; %d volumes have no report, %d reports have no volume",
            store.path.name,
            len(both),
            *alone,
        )
    return Pairs(store=store, names=both, texts=tuple(reports[n] for n in both))


def read_slices(store: Store, wanted: Sequence[str]) -> dict[str, Tensor]:
    """Arrays of some volumes, cut to the slices that any of them has.

    Returns:
        "slices" [b, s, ...] as stored, "mask" bool [b, s] (scan, not padding), "position_mm" float32 [b, s], height along the body axis.
    """
    rows = [store.row(n) for n in wanted]
    first, stop = min(r["occupied"][0] for r in rows), max(r["occupied"][1] for r in rows)
    index = np.arange(first, stop)
    return {
        "slices": torch.from_numpy(np.stack([store.read(n, first, stop) for n in wanted])),
        "mask": torch.from_numpy(
            np.stack([(r["occupied"][0] <= index) & (index < r["occupied"][1]) for r in rows])
        ),
        "position_mm": torch.from_numpy(
            np.stack([index * r["spacing_mm"][0] for r in rows]).astype(np.float32)
        ),
    }


def draw_text(parts: Mapping[str, str], shares: Mapping[str, float], most: int, gen: torch.Generator) -> str:
    """What a training step shows of a report: one part, drawn by `shares` from those that have text, then `some_sentences` of it."""
    have = list(parts)
    weights = torch.tensor([shares[p] for p in have])
    part = (
        have[int(torch.multinomial(weights, 1, generator=gen))]
        if len(have) > 1 and weights.sum() > 0
        else have[0]
    )
    return some_sentences(parts[part], most, gen)


def some_sentences(text: str, most: int, gen: torch.Generator) -> str:
    """One to `most` sentences of a report, drawn at random, in random order; the text itself where `most` is 0.

    A report is a set of statements: leaving some out keeps it true, says which words belong to which finding, and stops the text tower
    from knowing reports by heart.
    """
    sentences = [s for s in re.split(r"(?<=[.;])\s+", text.strip()) if s] if most else []
    if len(sentences) < 2:
        return text
    k = int(torch.randint(1, min(most, len(sentences)) + 1, (), generator=gen))
    return " ".join(sentences[i] for i in torch.randperm(len(sentences), generator=gen)[:k].tolist())
