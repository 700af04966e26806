"""Schemas of fields: drawn pages keep to ours, and what keeps to it is read back."""

import json
import random

import pytest

from medvl.documents.fields import Fields, fields_to_json, read_answer
from medvl.documents.fields_schema import fields_schema, read_schema
from medvl.language.bounded_schema import bounded_schema
from medvl.phantoms.pages import PageConfig, draw_page
from tests.naive_schema import is_valid, read_document

SCHEMA = fields_schema()
WORDS = (
    "Ana",
    "Metformin",
    "glucose",
    "8.40",
    ">60",
    "120/80",
    "mg/dL",
    "mmHg",
    "BID",
    "F",
    "Übelkeit",
    "heart is normal",
)


def test_fields_of_drawn_pages_keep_to_it():
    keys = set()
    for number in range(300):
        style = ("letter", "grid")[number % 2]
        page = draw_page(PageConfig(style=style, dpi=72), "train", number, damage="clean")
        text = fields_to_json(page.fields)
        tree = json.loads(text)
        assert is_valid(SCHEMA, read_document(text))
        # In its order too, in which a grammar writes.
        assert [*tree] == [key for key in SCHEMA["properties"] if key in tree]
        keys |= tree.keys()
    assert keys == SCHEMA["properties"].keys()


def drawn_document(schema, rng):
    """A document of plain words that keeps to the schema."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    if schema["type"] == "string":
        return rng.choice(WORDS)
    if schema["type"] == "array":
        return [drawn_document(schema["items"], rng) for _ in range(rng.randint(1, 3))]
    names = [name for name in schema["properties"] if name == "name" or rng.random() < 0.6]
    return {name: drawn_document(schema["properties"][name], rng) for name in names}


def test_documents_that_keep_to_it_are_read_without_loss():
    for seed in range(300):
        document = drawn_document(SCHEMA, random.Random(seed))
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        assert is_valid(SCHEMA, read_document(text))
        assert fields_to_json(read_answer(text)) == text


@pytest.mark.parametrize(
    "document",
    [
        {"labs": []},
        {"kind": ""},
        {"read_as": "json"},
        {"medications": [{"prn": False}]},
        {"labs": [{"value": 8.4}]},
        {"procedures": ["x"] * 101},
        {"patient": {"name": "x" * 201}},
        {"patient": {"mother": "x"}},
    ],
)
def test_other_documents_do_not(document):
    assert not is_valid(SCHEMA, read_document(json.dumps(document)))


def test_it_is_bounded_as_it_is():
    """Beside the ways of writing types, `bounded_schema` adds nothing."""
    bounded = json.dumps(bounded_schema(SCHEMA) | {})
    bounded = json.loads(
        bounded.replace('["object"]', '"object"')
        .replace('["array"]', '"array"')
        .replace('["string"]', '"string"')
    )
    assert bounded == SCHEMA | {"$defs": {}}


def test_flags_are_as_a_page_prints_them():
    """A list of flags would make a model write another than the page has: "H" for an arrow, or for its own "h"."""
    assert is_valid(SCHEMA, {"labs": [{"flag": flag} for flag in ("H", "LL", "h", "↑", "*", "High")]})
    assert fields_to_json(Fields()) == "{}"


def test_a_schema_of_the_user_is_any_of_an_object():
    own = {"type": "object", "properties": {"ward": {"type": "string"}}}
    assert read_schema(json.dumps(own)) == own
    assert read_schema(json.dumps(SCHEMA).encode()) == SCHEMA
    refs = {"$ref": "#/$defs/Page", "$defs": {"Page": own, "Other": {}}}
    assert read_schema(json.dumps(refs)) == refs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON: JSONDecodeError"),
        (b'"\xff"', "it is not JSON: UnicodeDecodeError"),
        ("[" * 99999, "it is not JSON: RecursionError"),
        ("3", "must be an object"),
        ("{}", "fields need an object"),
        ('{"type": "array"}', "fields need an object"),
        ('{"type": ["object", "null"]}', "fields need an object"),
        ('{"type": "object", "not": {}}', "not is not supported"),
    ],
)
def test_others_are_refused(text, message):
    with pytest.raises(ValueError, match="^schema: .*" + message):
        read_schema(text)
