"""recall: the naive loop over samples is the peer."""

import pytest
import torch
import torch.nn.functional as F

from medvl.adapters.recall import task_recall

TASKS = list("abcab") + list("cccbcacbacc")  # 4 of a, 4 of b, 8 of c, mixed up


def test_recall_leaves_a_sample_out_of_its_own_vector(gen):
    z, tasks = torch.randn(len(TASKS), 5, generator=gen), TASKS
    unit = F.normalize(z.double(), dim=1)
    hits = {1: 0, 2: 0, 3: 0}
    for i in range(len(z)):
        at = {
            t: F.normalize(unit[[j for j in range(len(z)) if tasks[j] == t and j != i]].mean(0), dim=0)
            for t in "abc"
        }
        order = sorted("abc", key=lambda t: -float(unit[i] @ at[t]))
        hits = {k: n + (tasks[i] in order[:k]) for k, n in hits.items()}
    got = task_recall(z, tasks, (1, 2, 3))
    assert got == pytest.approx({k: n / len(z) for k, n in hits.items()})
    assert 0 < got[1] < got[2] < got[3] == 1
    with pytest.raises(ValueError, match=r"embeddings must be \[n, d\] and tasks \[n\], got \[16, 5\] and 3"):
        task_recall(z, list("abc"))
    with pytest.raises(ValueError, match="'c' has one"):
        task_recall(z[:5], tasks[:5])
