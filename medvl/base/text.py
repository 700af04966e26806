"""How values and lists are shortened in messages."""

import json
import re
from collections.abc import Sequence
from typing import Any


def few(items: Sequence[Any], k: int = 6) -> str:
    """The first `k` items as text, and how many more there are; "none" of an empty list."""
    text = ", ".join(map(str, items[:k]))
    if len(items) > k:
        text += f" and {len(items) - k} more"
    return text or "none"


def one_line(value: Any) -> str:
    """A text or number of a JSON file without runs of white space; "" where it is neither (null, NaN, a list), or no
    text that can be written."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        return ""
    text = " ".join(str(value).split())
    # A lone surrogate, which JSON can escape, is no UTF-8.
    return "" if re.search("[\ud800-\udfff]", text) else text


def short(value: Any) -> str:
    """A value as JSON text of at most 80 characters."""
    # Whatever a file held: values that JSON does not know are shown by their `str`.
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
