"""Retrieval between volumes and reports: recall of scans, and two scores of label sets that are both published as
"MAP@k" and cannot be compared.
"""

from collections import Counter
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
    scans = [names.scan_of(volume) for volume in volumes]
    similarity = embeddings @ embeddings.T
    kinds = []
    if text_of_scan:
        kinds += _recall_of_reports(embeddings, scans, text_of_scan, texts)
    kinds += _recall_of_scans(similarity, scans)
    kinds += _agreement_of_labels(similarity.numpy(), scans, labels)
    rows = []
    for what, subject, n, value_at in kinds:
        for k, value in value_at.items():
            rows.append(Result(what=f"{what}{k}", subject=subject, value=value, n=n, **common))
    return rows


_Kind = tuple[str, str, int, Mapping[int, float]]  # what, subject, number of queries, {k: value}


def _recall_of_reports(
    embeddings: Tensor, scans: Sequence[str], text_of_scan: Mapping[str, str], texts: Tensor
) -> list[_Kind]:
    """Recall of any volume of a report's scan, and of a volume's report."""
    n = len(scans)
    to_volumes = group_recall_at(texts @ embeddings.T, list(text_of_scan), scans, _ks(n))
    # Reports of the same words are one, which nothing can tell apart.
    row_of_text = {text: row for row, text in enumerate(text_of_scan.values())}
    asked = [i for i, scan in enumerate(scans) if scan in text_of_scan]
    similarity = embeddings[asked] @ texts[list(row_of_text.values())].T
    own = [text_of_scan[scans[i]] for i in asked]
    to_reports = group_recall_at(similarity, own, list(row_of_text), _ks(len(row_of_text)))
    return [
        ("recall_at_", f"report to one of {n} volumes", len(text_of_scan), to_volumes),
        ("recall_at_", f"volume to one of {len(row_of_text)} different reports", len(asked), to_reports),
    ]


def _recall_of_scans(similarity: Tensor, scans: Sequence[str]) -> list[_Kind]:
    """Recall of another volume of a volume's scan; nothing where no scan has two."""
    num_volumes = Counter(scans)
    asked = [i for i, scan in enumerate(scans) if num_volumes[scan] > 1]
    if not asked:
        return []
    others = len(scans) - 1
    # A volume is of its own scan: below all others it is never the first that is right.
    without_itself = similarity.clone().fill_diagonal_(-2)[asked]
    recall = group_recall_at(without_itself, [scans[i] for i in asked], scans, _ks(others))
    subject = f"volume to another of its scan among {others} volumes, itself excluded"
    return [("recall_at_", subject, len(asked), recall)]


def _agreement_of_labels(similarity: np.ndarray, scans: Sequence[str], labels: np.ndarray) -> list[_Kind]:
    """The two scores that are published as MAP@k."""
    size = int(labels.any(1).sum())
    jaccard = ctclip_jaccard_at(similarity, labels, _ks(size))
    subject = f"volume to {size} volumes with a finding, itself included"
    kinds: list[_Kind] = [("ctclip_jaccard@", subject, len(scans), jaccard)]
    # Reconstructions share their labels, which would be too easy.
    first = [scans.index(scan) for scan in dict.fromkeys(scans)]
    sizes = np.unique(labels[first], axis=0, return_counts=True)[1]
    asking = int(sizes[sizes > 1].sum())
    if asking:
        others = len(first) - 1
        exact = spectre_exact_at(similarity[first][:, first], labels[first], _ks(others))
        subject = f"volume to {others} others, one of each scan, itself excluded"
        kinds.append(("spectre_exact@", subject, asking, exact))
    return kinds


def _ks(gallery: int) -> list[int]:
    # Recall at more than there is would always be 1.
    return [k for k in _KS if k <= gallery]
