"""Retrieval between volumes and reports: recall of scans, and two scores of label sets that are both published as
"MAP@k" and cannot be compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from medvl.ct import names
from medvl.evaluation.metrics import group_recall_at
from medvl.evaluation.results import Result

_KS = (1, 5, 10, 50, 100)


def ctclip_jaccard_at(similarity: np.ndarray, labels: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """CT-CLIP's "MAP@k": mean Jaccard index of the labels of a volume and of the k most similar ones.

    As there, a volume is among those it finds, and volumes without a finding are not. The code of CT-CLIP never
    empties its list between one k and the next, so that its value is a mean over all k so far; this one is not.

    Args:
        similarity: [n, n]; of equals the first comes first.
        labels: [n, c] of 0 and 1.
    Source: volume_to_volume.py of CT-CLIP, arXiv:2403.17834.
    """
    sets = labels.astype(int)
    gallery = sets.any(1)
    both = sets @ sets[gallery].T
    either = sets.sum(1)[:, None] + sets[gallery].sum(1) - both  # above 0: all of the gallery have a finding
    jaccard = _rank(similarity[:, gallery], both / either)
    return {k: float(jaccard[:, :k].mean()) for k in ks}


def spectre_exact_at(similarity: np.ndarray, labels: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """SPECTRE's MAP@k: mean average precision of finding the volumes with exactly the labels of another.

    A volume does not find itself, and asks only where another has its labels. Arguments as above.

    Source: retrieval_ct_rate.py of SPECTRE, arXiv:2511.17209.
    """
    others = ~np.eye(len(labels), dtype=bool)
    right = (labels[:, None] == labels).all(2) & others
    asks = right.any(1)
    right = _rank(np.where(others, similarity, -np.inf), right)[asks]
    precision = right.cumsum(1) / np.arange(1, len(labels) + 1)
    sums = (precision * right).cumsum(1)
    return {k: float((sums[:, k - 1] / right.sum(1).clip(max=k)).mean()) for k in ks}


def _rank(similarity: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each row of `values` in the order of falling similarity."""
    return np.take_along_axis(values, np.argsort(-similarity, 1, kind="stable"), 1)


def evaluate_retrieval(
    embeddings: Tensor,
    volumes: Sequence[str],
    labels: np.ndarray,
    text_of_scan: Mapping[str, str],
    texts: Tensor,
    **common: Any,
) -> list[Result]:
    """Rows of all kinds of retrieval; their subjects say what the gallery is.

    Args:
        embeddings: [n, d] of the volumes, L2-normalised.
        labels: [n, c].
        text_of_scan: reports of scans among the volumes; may be empty.
        texts: [r, d] of these reports.
        common: fields of all rows.
    """
    rows: list[Result] = []

    def add(what: str, n: int, subject: str, values: Mapping[int, float]) -> None:
        for k, value in values.items():
            rows.append(Result(what=f"{what}{k}", subject=subject, value=value, n=n, **common))

    def ks(gallery: int) -> list[int]:
        # Recall at more than there is would always be 1.
        return [k for k in _KS if k <= gallery]

    scans = [names.scan_of(volume) for volume in volumes]
    n = len(scans)
    if text_of_scan:
        recall = group_recall_at(texts @ embeddings.T, list(text_of_scan), scans, ks(n))
        add("recall_at_", len(text_of_scan), f"report to one of {n} volumes", recall)
        # Reports of the same words are one, which nothing can tell apart.
        row_of_text = {text: row for row, text in enumerate(text_of_scan.values())}
        asked = [i for i, scan in enumerate(scans) if scan in text_of_scan]
        similarity = embeddings[asked] @ texts[list(row_of_text.values())].T
        own = [text_of_scan[scans[i]] for i in asked]
        recall = group_recall_at(similarity, own, list(row_of_text), ks(len(row_of_text)))
        add("recall_at_", len(asked), f"volume to one of {len(row_of_text)} different reports", recall)
    similarity = embeddings @ embeddings.T
    asked = [i for i, scan in enumerate(scans) if scans.count(scan) > 1]
    if asked:
        # A volume is of its own scan: below all others it is never the first that is right.
        others = similarity.clone().fill_diagonal_(-2)[asked]
        recall = group_recall_at(others, [scans[i] for i in asked], scans, ks(n - 1))
        subject = f"volume to another of its scan among {n - 1} volumes, itself excluded"
        add("recall_at_", len(asked), subject, recall)
    size = int(labels.any(1).sum())
    jaccard = ctclip_jaccard_at(similarity.numpy(), labels, ks(size))
    add("ctclip_jaccard@", n, f"volume to {size} volumes with a finding, itself included", jaccard)
    # Reconstructions share their labels, which would be too easy.
    first = [scans.index(scan) for scan in dict.fromkeys(scans)]
    sizes = np.unique(labels[first], axis=0, return_counts=True)[1]
    asking = int(sizes[sizes > 1].sum())
    if asking:
        exact = spectre_exact_at(similarity[first][:, first].numpy(), labels[first], ks(len(first) - 1))
        subject = f"volume to {len(first) - 1} others, one of each scan, itself excluded"
        add("spectre_exact@", asking, subject, exact)
    return rows
