"""Nested dicts of tensors ("trees"): flatten, select by regex, split and merge. Names join keys with "/"."""

import re
from collections.abc import Callable, Iterable
from typing import Any

Tree = dict[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": t}}` -> `{"a/b": t}`; empty dicts vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def map_leaves(f: Callable[[Any], Any], tree: Tree) -> Tree:
    """The same tree with `f` applied to every leaf."""
    mapped: Tree = {}
    for key, value in tree.items():
        mapped[key] = map_leaves(f, value) if isinstance(value, dict) else f(value)
    return mapped


def match_names(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that any regex matches in full, in the order of `names`.

    Raises:
        ValueError: a pattern is no regex or matches nothing (both say what names exist).
    """
    names = list(names)  # an iterator would be used up by the first pattern
    matched: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as e:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {e}") from e
        # A pattern without a hit is a slip of the keyboard: nothing would be trained, and nobody would
        # notice.
        if not hits:
            examples = ", ".join(_spread(names))
            raise ValueError(
                f"pattern {pattern!r} matches no parameter; the {len(names)} names look like {examples}"
            )
        matched |= hits
    return [name for name in names if name in matched]


def _spread(names: list[str], k: int = 4) -> list[str]:
    """At most `k` of the names, evenly spread over all."""
    step = max(1, len(names) // k)
    return names[::step][:k]


def split_tree(tree: Tree, patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """(leaves whose name matches a pattern, all others); `merge_trees` puts them together again.

    Raises:
        ValueError: as `match_names`.
    """
    flat = flatten(tree)
    # All patterns at once: a leaf that two of them match is selected once.
    hits = set(match_names(flat, patterns))
    selected = {name: leaf for name, leaf in flat.items() if name in hits}
    others = {name: leaf for name, leaf in flat.items() if name not in hits}
    return unflatten(selected), unflatten(others)


def merge_trees(*trees: Tree) -> Tree:
    """One tree with the leaves of all; a later tree wins where names meet."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)


def count_values(tree: Tree) -> int:
    """Number of values in all tensors."""
    return sum(leaf.numel() for leaf in flatten(tree).values())
