"""Bounds of JSON schemas: every part has one, no document is added, and what cannot be kept to is refused."""

import json
import subprocess
import sys

import pytest

from medvl.language.bounded_schema import MAX_BYTES, MAX_DEPTH, MAX_NAMES, bounded_schema, error_without_names
from tests.naive_schema import is_valid, read_document


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_given_bounds_stay_and_missing_ones_are_set():
    given = {
        "title": "Page",
        "type": "object",
        "properties": {
            "a": {"type": "string", "maxLength": 7, "pattern": "x"},
            "b": {"type": ["string", "null"], "minLength": 5000},
            "c": {"type": "array", "items": {"type": "integer", "minimum": 3}, "x-order": 1},
            "d": {"type": "number", "exclusiveMaximum": 1, "multipleOf": 0.5},
            "e": {"$ref": "#/definitions/e"},
            "f": {"type": "array", "minItems": 900},
            "g": {"type": "object", "additionalProperties": {"type": "null"}},
        },
        "required": ["a"],
        "definitions": {"e": {"enum": ["H", None]}},
    }
    text = json.dumps(given)
    bounded = bounded_schema(given)
    assert json.dumps(given) == text  # the caller's is as it was
    assert bounded == {
        "type": ["object"],
        "properties": {
            "a": {"type": ["string"], "maxLength": 7, "pattern": "x"},
            "b": {"type": ["string", "null"], "minLength": 5000, "maxLength": 5000},
            "c": {
                "type": ["array"],
                "items": {"type": ["integer"], "minimum": 3, "maximum": 2**53 - 1},
                "maxItems": 200,
            },
            "d": {"type": ["number"], "exclusiveMaximum": 1, "multipleOf": 0.5, "minimum": -(10**12)},
            "e": {"$ref": "#/$defs/0"},
            "f": {"type": ["array"], "minItems": 900, "maxItems": 900, "items": {"$ref": "#/$defs/any"}},
            "g": {
                "type": ["object"],
                "patternProperties": {"^.{1,64}$": {"type": ["null"]}},
                "maxProperties": 100,
                "additionalProperties": False,
            },
        },
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"0": {"enum": ["H", None]}, "any": bounded["$defs"]["any"]},
    }


@pytest.mark.parametrize(
    ("schema", "document", "bounded_too"),
    [
        ({"properties": {"a": {}}}, '{"a":1}', True),
        ({"properties": {"a": {}}}, '{"b":1}', False),  # valid, but others would have no end
        ({}, '{"a":[{"b":[1.5,"x",null]}]}', True),
        ({"type": "object"}, '{"a":{"b":true}}', True),
        ({"type": "string"}, json.dumps("x" * 4000), True),
        ({"type": "string"}, json.dumps("x" * 4001), False),
        ({"type": "number"}, "0.1234567", False),
        ({"type": "number"}, "-0.123456", True),
        ({"type": "number", "minimum": 1e15}, "1000000000000000", True),
    ],
)
def test_documents_of_the_bounded_schema_are_fewer(schema, document, bounded_too):
    value = read_document(document)
    bounded = bounded_schema(schema)
    # Names of maps are bounded by a pattern, which the naive check leaves aside.
    bounded = json.loads(
        json.dumps(bounded).replace(
            '"additionalProperties": false', '"": 0', 99 * ("properties" not in schema)
        )
    )
    assert is_valid(schema, value)
    assert is_valid(bounded, value) == bounded_too


def test_a_schema_that_is_meant_often_is_written_once():
    """6^15 ways lead to the last one, and 5,000 values are of any kind."""
    definitions = {
        f"d{i}": {"type": "object", "properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "abcdef"}}
        for i in range(15)
    }
    definitions["d15"] = {}
    schema = {"$ref": "#/$defs/d0", "$defs": definitions}
    assert len(json.dumps(bounded_schema(schema))) < 20_000
    many = {"type": "array", "prefixItems": [{}] * 5000}
    assert len(json.dumps(bounded_schema(many))) < 40 * 5000


REFUSED = {
    "list": ([], "must be an object of at most"),
    "true": (True, "must be an object of at most"),
    "set": ({"enum": {1}}, "it is not JSON: TypeError"),
    "nan": ({"const": float("nan")}, "it is not JSON: ValueError"),
    "bytes": ({"title": "x" * MAX_BYTES}, f"at most {MAX_BYTES} bytes, got dict of {MAX_BYTES + 13}"),
    "depth": (nested(MAX_DEPTH + 1), f"schemas stand at most {MAX_DEPTH} deep"),
    "part": ({"items": 3}, r"\$.items: must be an object, got int"),
    "properties": ({"properties": []}, r"\$.properties: must be an object, got list"),
    "type": ({"type": "strin"}, r"\$: type must be of string, number"),
    "types": ({"type": []}, "type must be of"),
    "not": ({"properties": {"a": {"not": {}}}}, r"\$.a: not is not supported"),
    "nullable": ({"type": "string", "nullable": True}, "nullable is not supported"),
    "unique": ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported"),
    "names": ({"patternProperties": {}}, "patternProperties is not supported"),
    "two": ({"anyOf": [{}], "enum": [1]}, "anyOf and enum stand in one schema"),
    "beside": (
        {"$ref": "#/$defs/a", "properties": {}, "$defs": {"a": {}}},
        r"\$ref and properties stand in one",
    ),
    "allOf": ({"allOf": [{}, {}]}, "allOf must be a list of one schema"),
    "anyOf": ({"anyOf": []}, "anyOf must be a list that is not empty"),
    "remote": ({"$ref": "http://example.org/x"}, r"\$ref must name a schema in \$defs"),
    "inside": ({"properties": {"a": {"$ref": "#/properties/a"}}}, r"\$ref must name a schema in \$defs"),
    "circle": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"$ref": "#/$defs/a"}}},
        "its documents would have no end",
    ),
    "length": ({"type": "string", "maxLength": -1}, "maxLength must be a whole number"),
    "float": ({"type": "string", "maxLength": 1.5}, "maxLength must be a whole number"),
    "draft4": (
        {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        "minimum, exclusiveMinimum must be numbers",
    ),
    "states": ({"type": "integer", "multipleOf": 100000007}, "multipleOf must have at most three digits"),
    "tiny": ({"type": "number", "multipleOf": 1e-300}, "multipleOf must have at most three digits"),
    "zero": ({"type": "number", "multipleOf": 0}, "multipleOf must have at most three digits"),
    "below": ({"type": "number", "multipleOf": -2}, "multipleOf must have at most three digits"),
    "required": ({"properties": {"a": {}}, "required": ["b"]}, "required must be names in properties"),
    "required of a map": ({"type": "object", "required": ["b"]}, "required must be names in properties"),
    "both": ({"properties": {"a": {}}, "additionalProperties": {}}, "a map stands under a name of its own"),
    "repeated": ({"type": "object", "minProperties": 2}, "minProperties of a map is at most 1"),
    "many": ({"properties": {str(i): {} for i in range(MAX_NAMES + 1)}}, f"at most {MAX_NAMES} properties"),
}


@pytest.mark.parametrize(("schema", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_to_is_refused(schema, message):
    with pytest.raises(ValueError, match="^schema: .*" + message):
        bounded_schema(schema)


def test_a_schema_as_deep_as_python_goes_is_refused():
    with pytest.raises(ValueError, match=r"it is not JSON: RecursionError|schemas stand at most"):
        bounded_schema(nested(5000))


def test_it_loads_no_torch():
    code = "import sys; import medvl.language.bounded_schema; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_errors_can_be_told_without_what_a_schema_names():
    """A name in a schema may be a patient's: its place stays, and the words of JSON schema."""
    schema = {"type": "object", "properties": {"Jane Doe": {"anyOf": [{"type": "Jane"}, {"Jane Doe Jr": 1}]}}}
    with pytest.raises(ValueError, match="Jane") as error:
        bounded_schema(schema)
    message = error_without_names(error.value, schema)
    assert "Jane" not in message
    assert message.startswith("schema: $....")
    assert "type must be" in message
