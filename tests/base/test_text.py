"""Values in messages."""

import pytest

from medvl.base.text import few, short


@pytest.mark.parametrize(
    ("items", "k", "text"),
    [([], 6, "none"), ([1], 6, "1"), ([1, 2], 2, "1, 2"), (list("abcd"), 2, "a, b and 2 more")],
)
def test_few(items, k, text):
    assert few(items, k) == text


def test_short_is_json_of_at_most_80_characters():
    assert short({"a": "ü", "b": None}) == '{"a": "ü", "b": null}'
    assert short("x" * 78) == '"' + "x" * 78 + '"'
    assert short("x" * 79) == '"' + "x" * 76 + "..."
    assert short({1}) == '"{1}"'  # what JSON does not have is shown as Python shows it
