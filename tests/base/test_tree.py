"""Nested dicts of tensors: what `flatten` takes apart the others put together again."""

import pytest
import torch

from medvl.base.tree import count_values, flatten, map_leaves, match_names, merge_trees, split_tree, unflatten

TREE = {"blocks": {"0": {"w": 1, "b": 2}, "1": {"w": 3, "b": 4}}, "norm": 5}


def test_flatten_joins_keys():
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": 3}) == {"a/b/c": 1, "a/d": 2, "e": 3}
    assert list(flatten(TREE)) == ["blocks/0/w", "blocks/0/b", "blocks/1/w", "blocks/1/b", "norm"]
    assert flatten({"a": {}, "b": {"c": {}}}) == {}


def test_unflatten_is_the_inverse():
    assert unflatten(flatten(TREE)) == TREE
    assert unflatten({}) == {}


def test_map_leaves_is_a_map_of_the_flat_tree_and_changes_nothing():
    doubled = map_leaves(lambda x: 2 * x, TREE)
    assert flatten(doubled) == {name: 2 * x for name, x in flatten(TREE).items()}
    assert TREE["blocks"]["0"]["w"] == 1
    assert map_leaves(str, {"a": {}}) == {"a": {}}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([".*"], ["blocks/0/w", "blocks/0/b", "blocks/1/w", "blocks/1/b", "norm"]),
        (["norm", "blocks/1/.*"], ["blocks/1/w", "blocks/1/b", "norm"]),  # in the order of the names
        (["blocks/./b", ".*/b"], ["blocks/0/b", "blocks/1/b"]),  # each once
        ([], []),
    ],
)
def test_match_names(patterns, names):
    assert match_names(flatten(TREE), patterns) == names


def test_patterns_match_in_full():
    with pytest.raises(ValueError, match="pattern 'blocks' matches no parameter; the 5 names look like"):
        match_names(flatten(TREE), ["norm", "blocks"])


def test_a_pattern_without_a_match_is_told_some_names():
    names = [f"layer/{i}" for i in range(100)]
    with pytest.raises(ValueError, match=r"the 100 names look like layer/0, layer/25, layer/50, layer/75$"):
        match_names(names, ["head"])


def test_a_pattern_must_be_a_regex():
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression: "):
        match_names(["a"], ["("])


def test_split_tree_and_merge_trees_are_inverse():
    selected, others = split_tree(TREE, ["blocks/0/.*", "norm"])
    assert selected == {"blocks": {"0": {"w": 1, "b": 2}}, "norm": 5}
    assert others == {"blocks": {"1": {"w": 3, "b": 4}}}
    assert merge_trees(selected, others) == TREE
    assert split_tree(TREE, []) == ({}, TREE)


def test_a_later_tree_wins():
    assert merge_trees({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert merge_trees() == {}


def test_count_values():
    assert count_values({"a": torch.zeros(2, 3), "b": {"c": torch.zeros(()), "d": torch.zeros(0, 5)}}) == 7
