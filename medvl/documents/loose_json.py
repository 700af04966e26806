"""The JSON within a model's answer, also in a fence, behind other words, with slips, or cut off."""

import json
import re
from typing import Any

_MAX_DEPTH = 50  # a model that loops opens brackets for ever
_START = re.compile(r"[{\[]\s*(?:[\[{\"'}\]]|\w+\s*:)")
_TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'(?=\s*[,:}\]]))|(?P<mark>[{}\[\]:,])"""
    r"""|(?P<cut>".*)|(?P<bare>[^\s{}\[\]:,"][^{}\[\]:,"\n]*)""",
    re.DOTALL,
)
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def find_json(text: str) -> tuple[Any, str, str] | None:
    """(tree, the text around it, how it was read) of the first JSON in a text, None if there is none.

    Numbers stay as they are printed. Of a key that comes twice both values are kept, in a list. It was read as
    "json", "fenced json", or "repaired json": then quotes and commas may be missing, and a value at the place
    where the text is cut is left out; there a key that comes twice has a space behind it.
    """
    start = _START.search(text)
    if start is None:
        return None
    before = text[: start.start()]
    decoder = json.JSONDecoder(
        parse_float=str, parse_int=str, parse_constant=str, object_pairs_hook=_join_repeated
    )
    try:
        tree, end = decoder.raw_decode(text, start.start())
        read_as = "fenced json" if "```" in before else "json"
    except (ValueError, RecursionError):
        tree, end = _parse_with_slips(text, start.start())
        read_as = "repaired json"
    around = re.sub(r"\s*```(?:json)?\s*", "\n", f"{before} {text[end:]}")
    return tree, around.strip(), read_as


def _join_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            values = tree[key] if isinstance(tree[key], list) else [tree[key]]
            value = values + (value if isinstance(value, list) else [value])
        tree[key] = value
    return tree


def _parse_with_slips(text: str, start: int) -> tuple[Any, int]:
    """(tree, where it ends). No recursion: each container is put into its parent when it opens, so that
    nothing needs to be closed.
    """
    root: list[Any] = []
    containers: list[Any] = [root]
    key = None  # that waits for its value
    for match in _TOKEN.finditer(text, start):
        mark = match["mark"] or ""
        if match["cut"] or (match["bare"] and match.end() == len(text)) or len(containers) > _MAX_DEPTH:
            break
        if mark in ("}", "]"):
            containers.pop()
            if len(containers) == 1:
                return root[0], match.end()
        if mark in ("}", "]", ",", ":"):
            key = None if mark != ":" else key
            continue
        value = {"{": {}, "[": []}[mark] if mark else _scalar(match)
        parent = containers[-1]
        if isinstance(parent, list):
            parent.append(value)
        elif key is None and not mark:
            key = str(value)
            continue
        else:
            key = key or ""
            while key in parent:  # spaces in keys mean nothing
                key += " "
            parent[key] = value
        key = None
        if mark:
            containers.append(value)
    return (root[0] if root else {}), len(text)


def _scalar(match: re.Match[str]) -> Any:
    """A string without its quotes, or a bare word."""
    if match["bare"]:
        word = match["bare"].strip()
        return _WORDS.get(word.casefold(), word)
    inner = match["string"][1:-1].replace("\\'", "'")
    try:
        return str(json.loads(f'"{inner}"', strict=False))
    except ValueError:  # a bad escape, or a double quote within single ones
        return inner
