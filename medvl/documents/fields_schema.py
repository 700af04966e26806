"""JSON schemas of what is taken from a page: that of `Fields`, and a user's own."""

import json
from typing import Any, get_args

import attrs

from medvl.documents.fields import Fields
from medvl.language.bounded_schema import bounded_schema

MAX_VALUE = 200  # characters of a printed value
MAX_TEXT = 4_000  # of free text
MAX_ROWS = 100  # of a list


def fields_schema() -> dict[str, Any]:
    """The JSON schema of `fields_to_json`: its keys in its order; what is empty is left out, so nothing is required.

    Values are any texts, flags too: a list of flags would make a model that is to copy "h" or an arrow write another flag.
    """
    return _object_schema(Fields)


def read_schema(text: str | bytes) -> dict[str, Any]:
    """A user's own JSON schema of what is to be taken from a page.

    Raises:
        ValueError: not JSON, not the schema of an object, or as `bounded_schema`.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"schema: it is not JSON: {type(e).__name__}") from None
    bounded = bounded_schema(schema)
    part = bounded
    while "$ref" in part:
        part = bounded["$defs"][part["$ref"].rpartition("/")[2]]
    if part.get("type") not in ("object", ["object"]):
        raise ValueError('schema: $: fields need an object, as {"type": "object", "properties": {...}}')
    return schema


def _object_schema(record: Any) -> dict[str, Any]:
    properties = {
        attribute.name: _property_schema(record, attribute)
        for attribute in attrs.fields(record)
        if attribute.name != "read_as"  # how an answer was read; not of the page
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _property_schema(record: Any, attribute: Any) -> dict[str, Any]:
    if attribute.type is bool:
        return {"const": True}
    if attrs.has(attribute.type):
        return _object_schema(attribute.type)
    if attribute.type is str:
        longest = MAX_TEXT if (record, attribute.name) == (Fields, "text") else MAX_VALUE
        return {"type": "string", "minLength": 1, "maxLength": longest}
    item, _ = get_args(attribute.type)  # tuple[item, ...]
    items = (
        _object_schema(item)
        if attrs.has(item)
        else {"type": "string", "minLength": 1, "maxLength": MAX_VALUE}
    )
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_ROWS}
