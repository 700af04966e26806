"""How often the task of a sample is found by embeddings.

In shapes n are samples, d is the width of an embedding.
"""

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl.adapters.retrieve import adapter_recall, adapter_vector
from medvl.adapters.sample_tasks import check_tasks, number_tasks


def task_recall(embeddings: Tensor, tasks: Sequence[Hashable], ks: Sequence[int] = (1,)) -> dict[int, float]:
    """{k: share of samples whose task is among the k whose adapter vectors are nearest}, each sample left
    out of its own task's vector.

    Args:
        embeddings: [n, d], of any length.
        tasks: the task of each sample.
    Raises:
        ValueError: fewer than two tasks, a task with one sample (names it), embeddings that
            `adapter_vector` refuses, k out of range.
    """
    names, numbers = number_tasks(tasks)
    if embeddings.dim() != 2 or len(embeddings) != len(numbers):
        raise ValueError(
            f"task_recall: embeddings must be [n, d] and tasks [n], got {list(embeddings.shape)} and "
            f"{len(numbers)}"
        )
    check_tasks("task_recall", names, numbers)
    return recall_of_samples(embeddings, numbers, torch.ones_like(numbers, dtype=torch.bool), ks)


def recall_of_samples(
    embeddings: Tensor, numbers: Tensor, selected: Tensor, ks: Sequence[int]
) -> dict[int, float]:
    """`task_recall` of some of the samples, among the tasks of all.

    Args:
        numbers: int64 [n], from `number_tasks`.
        selected: bool [n].
    """
    unit = F.normalize(embeddings.double(), dim=-1)
    vectors = []
    for task in range(int(numbers.max()) + 1):
        vectors.append(adapter_vector(embeddings[numbers == task]))
    tasks = torch.stack(vectors).double()
    similarity = unit @ tasks.T
    # Sums, since the cosine to a mean is that to the sum.
    sums = torch.zeros_like(tasks).index_add_(0, numbers.to(embeddings.device), unit)
    without_self = F.normalize(sums[numbers] - unit, dim=-1)
    similarity[torch.arange(len(numbers)), numbers] = (unit * without_self).sum(1)
    return adapter_recall(similarity[selected], numbers[selected], ks)
