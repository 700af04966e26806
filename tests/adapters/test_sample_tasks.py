"""sample_tasks: tasks are numbered by their first sample, and too few samples are an error."""

import pytest
import torch

from medvl.adapters.sample_tasks import check_tasks, number_tasks


def test_tasks_are_numbered_in_order_of_appearance():
    names, numbers = number_tasks(["lung", "eye", "lung", "skin"])
    assert names == ["lung", "eye", "skin"]
    assert numbers.tolist() == [0, 1, 0, 2]
    names, numbers = number_tasks(torch.tensor([7, 5, 7]))
    assert (names, numbers.tolist()) == ([7, 5], [0, 1, 0])


def test_every_task_has_two_samples_and_there_are_two_tasks():
    names, numbers = number_tasks(["lung", "eye", "lung", "eye"])
    check_tasks("here", names, numbers)
    with pytest.raises(ValueError, match="here: needs at least two tasks to tell apart, got 1"):
        check_tasks("here", names, numbers, torch.tensor([0, 2]))
    with pytest.raises(
        ValueError, match=r"here: every task must have two samples or more, 'skin' has one \(1 such\)"
    ):
        check_tasks("here", *number_tasks(["lung", "lung", "skin"]))
