"""Nested dicts of tensors ("trees"): flatten, select by regex, split and merge. Names join keys with "/"."""

import re
from collections.abc import Callable, Iterable
from typing import Any

Tree = dict[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": t}}` -> `{"a/b": t}`; empty dicts vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
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
    return {k: map_leaves(f, v) if isinstance(v, dict) else f(v) for k, v in tree.items()}


def match_names(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that any regex matches in full, in the order of `names`.

    Raises:
        ValueError: a pattern is no regex or matches nothing (both say what names exist).
    """
    names, found = list(names), set()
    for pattern in patterns:
        try:
            hits = {n for n in names if re.fullmatch(pattern, n)}
        except re.error as e:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {e}") from e
        if not hits:
            shown = ", ".join(_spread(names))
            raise ValueError(
                f"pattern {pattern!r} matches no parameter; the {len(names)} names look like {shown}"
            )
        found |= hits
    return [n for n in names if n in found]


def split_tree(tree: Tree, patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """(leaves whose name matches a pattern, the rest); `merge_trees` puts them together again."""
    flat = flatten(tree)
    hits = set(match_names(flat, patterns))
    return unflatten({n: t for n, t in flat.items() if n in hits}), unflatten(
        {n: t for n, t in flat.items() if n not in hits}
    )


def merge_trees(*trees: Tree) -> Tree:
    """One tree with the leaves of all; a later tree wins where names meet."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)


def count_values(tree: Tree) -> int:
    """Number of values in all tensors."""
    return sum(t.numel() for t in flatten(tree).values())


def _spread(names: list[str], k: int = 4) -> list[str]:
    step = max(1, len(names) // k)
    return names[::step][:k]
