"""JSON schemas whose documents end: checked, and bounded where they set no bounds.

A weak model that may go on for ever does: in a string, a list, the digits of a number, the names of a map. So every
part gets a bound. Documents of the bounded schema are documents of the given one as well. Nothing here loads torch.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from attrs import define, field

# What a schema of a client may cost.
MAX_BYTES = 65_536
MAX_DEPTH = 32
MAX_NAMES = 400  # of one object's properties: any of them may come next, and the grammar follows at most 500
# What a document may have where its schema says nothing.
MAX_STRING = 4_000  # characters
MAX_NAME = 64  # characters of a name in a map
MAX_ITEMS = 200
MAX_PROPERTIES = 100  # entries of a map
MAX_INTEGER = 2**53 - 1  # what a float64 holds exactly
MAX_NUMBER = 10**12
MAX_DECIMALS = 6
MAX_NESTING = 3  # of lists and maps in a value of any kind

# They restrict no document.
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment"),
}
# Each stands alone, but for `type`: what several of them have in common has no bound that is easily found.
_CHOICES = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_KEYWORDS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
}
_COUNTS = [
    name for names in _KEYWORDS.values() for name in names if name[3:] in ("Length", "Items", "Properties")
]
_TYPES = (*_KEYWORDS, "integer", "boolean", "null")
_KNOWN = {"type", *_CHOICES, *(name for names in _KEYWORDS.values() for name in names)}


def error_without_names(error: ValueError, schema: Any) -> str:
    """The message of `bounded_schema` or a grammar with "..." for what the schema names itself: that may be a patient."""
    message = str(error)
    todo, names = [schema], set[str]()
    while todo:
        part = todo.pop()
        if isinstance(part, Mapping):
            names |= {str(key) for key in part}
            todo += part.values()
        elif isinstance(part, list):
            todo += part
        elif isinstance(part, str):
            names.add(part)
    for name in sorted(
        names - _KNOWN - _ANNOTATIONS - {*_TYPES, "$defs", "definitions", ""}, key=len, reverse=True
    ):
        message = message.replace(name, "...")
    return message


def bounded_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose documents are documents of this one, and are bounded.

    Strings get a maxLength, lists a maxItems, numbers ends and six decimals (no exponent), where they have none. An
    object with `properties` has no others; one without is a map of short names. A value of any kind nests three
    deep. Annotations ("title", "x-...") are left out.

    Args:
        schema: JSON schema. $ref names a schema in $defs or definitions.
    Raises:
        ValueError: it is too large, no schema, refers to itself, or uses what cannot be kept to: a keyword that is
            not known here, or several of $ref, anyOf, oneOf, allOf, enum and const in one place; says where.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"schema: it is not JSON: {type(e).__name__}") from None
    if not isinstance(schema, Mapping) or len(text) > MAX_BYTES:
        raise ValueError(
            f"schema: it must be an object of at most {MAX_BYTES} bytes, got {type(schema).__name__} of {len(text)}"
        )
    root = json.loads(text)
    definitions = _Definitions()
    for group in ("$defs", "definitions"):
        for name, part in _mapping(root.pop(group, {}), f"$.{group}").items():
            pointer = name.replace("~", "~0").replace("/", "~1")
            definitions.given[f"#/{group}/{pointer}"] = part
    bounded = _bounded(root, "$", 0, definitions)
    return bounded | {"$defs": definitions.bounded}


@define
class _Definitions:
    given: dict[str, Any] = field(factory=dict)
    bounded: dict[str, Any] = field(factory=dict)  # by the same names, without what stands before the last /
    open: list[str] = field(factory=list)  # those that are being bounded, to find circles by


def _bounded(node: Any, path: str, depth: int, definitions: _Definitions) -> Any:
    if depth > MAX_DEPTH:
        _refuse(path, f"schemas stand at most {MAX_DEPTH} deep")
    if node is False:
        return False
    node = _mapping({} if node is True else node, path)
    node = {key: value for key, value in node.items() if key not in _ANNOTATIONS and not key.startswith("x-")}
    if unknown := sorted(node.keys() - _KNOWN):
        _refuse(path, f"{unknown[0]} is not supported")
    types = _types(node, path)
    choices = [key for key in _CHOICES if key in node]
    if not choices:
        return _bounded_types(node, types, path, depth, definitions)
    if others := sorted(node.keys() - {choices[0], "type"}):
        _refuse(path, f"{choices[0]} and {others[0]} stand in one schema; write it with one of them")
    key = choices[0]
    value = node[key]
    if key == "$ref":
        node["$ref"] = _bounded_definition(value, path, depth, definitions)
    elif key != "const":
        # At least one; of allOf no more, since closed objects have nothing in common.
        if not isinstance(value, list) or not value or (key == "allOf" and len(value) > 1):
            _refuse(path, f"{key} must be a list{' of one schema' * (key == 'allOf')} that is not empty")
        if key != "enum":
            parts = enumerate(value)
            node[key] = [_bounded(part, f"{path}.{key}[{i}]", depth + 1, definitions) for i, part in parts]
    return node


def _bounded_definition(name: Any, path: str, depth: int, definitions: _Definitions) -> str:
    name = unquote(name) if isinstance(name, str) else ""
    if name not in definitions.given:
        _refuse(path, "$ref must name a schema in $defs")
    if name in definitions.open:
        _refuse(path, "$ref leads back to the schema that it stands in: its documents would have no end")
    # A number for a name: what a client wrote may need escapes, or stand in both groups.
    number = str([*definitions.given].index(name))
    if number not in definitions.bounded:
        definitions.open.append(name)
        definitions.bounded[number] = _bounded(definitions.given[name], name, depth + 1, definitions)
        definitions.open.pop()
    return f"#/$defs/{number}"


def _types(node: dict[str, Any], path: str) -> list[str]:
    """The types that a schema names, or those that its keywords are of."""
    types = node.get("type", [])
    if isinstance(types, str):
        types = [types]
    if (
        not isinstance(types, list)
        or any(name not in _TYPES for name in types)
        or ("type" in node and not types)
    ):
        _refuse(path, f"type must be of {', '.join(_TYPES)}")
    return types or [name for name, keywords in _KEYWORDS.items() if node.keys() & {*keywords}]


def _bounded_types(
    node: dict[str, Any], types: list[str], path: str, depth: int, definitions: _Definitions
) -> dict[str, Any]:
    if not types:
        # Written once, however often it is meant.
        definitions.bounded.setdefault("any", _anything(MAX_NESTING))
        return {"$ref": "#/$defs/any"}
    for key in node.keys() & {*_COUNTS}:
        if type(node[key]) is not int or not 0 <= node[key] < 2**31:
            _refuse(path, f"{key} must be a whole number from 0")
    bounded: dict[str, Any] = {"type": types}
    if "string" in types:
        bounded |= _taken(node, "string")
        bounded.setdefault("maxLength", max(MAX_STRING, node.get("minLength", 0)))
    if "number" in types or "integer" in types:
        bounded |= _bounded_number(_taken(node, "number"), "number" in types, path)
    if "array" in types:
        bounded |= _taken(node, "array")
        bounded.setdefault("maxItems", max(MAX_ITEMS, node.get("minItems", 0)))
        bounded["items"] = _bounded(node.get("items", True), f"{path}.items", depth + 1, definitions)
        if "prefixItems" in node:
            if not isinstance(node["prefixItems"], list):
                _refuse(path, "prefixItems must be a list")
            parts = enumerate(node["prefixItems"])
            bounded["prefixItems"] = [
                _bounded(part, f"{path}.prefixItems[{i}]", depth + 1, definitions) for i, part in parts
            ]
    if "object" in types:
        bounded |= _bounded_object(_taken(node, "object"), path, depth, definitions)
    return bounded


def _taken(node: dict[str, Any], type_: str) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key in _KEYWORDS[type_]}


def _bounded_number(node: dict[str, Any], decimals: bool, path: str) -> dict[str, Any]:
    if any(type(value) not in (int, float) for value in node.values()):
        _refuse(path, f"{', '.join(node)} must be numbers")
    limit = MAX_NUMBER if decimals else MAX_INTEGER
    lows = [node[key] for key in ("minimum", "exclusiveMinimum") if key in node]
    highs = [node[key] for key in ("maximum", "exclusiveMaximum") if key in node]
    if not lows:
        node["minimum"] = min([-limit, *highs])
    if not highs:
        node["maximum"] = max([limit, *lows])
    if decimals:
        node.setdefault("multipleOf", 10**-MAX_DECIMALS)
    if "multipleOf" in node:
        # The grammar has a state for every remainder: 100000007 takes minutes.
        sign, digits, exponent = Decimal(str(node["multipleOf"])).normalize().as_tuple()
        if sign or digits == (0,) or len(digits) > 3 or not -9 <= int(exponent) <= 9:
            _refuse(path, "multipleOf must have at most three digits, beside zeros, and nine decimals")
    return node


def _bounded_object(node: dict[str, Any], path: str, depth: int, definitions: _Definitions) -> dict[str, Any]:
    properties = _mapping(node.get("properties", {}), f"{path}.properties")
    if len(properties) > MAX_NAMES:
        _refuse(path, f"an object has at most {MAX_NAMES} properties, got {len(properties)}")
    required = node.get("required", [])
    if not isinstance(required, list) or any(name not in properties for name in required):
        _refuse(path, "required must be names in properties")
    others = node.pop("additionalProperties", not properties)
    if properties:
        if others not in (False, True):
            _refuse(
                path,
                "give additionalProperties: false beside properties; a map stands under a name of its own",
            )
        node["properties"] = {
            name: _bounded(part, f"{path}.{name}", depth + 1, definitions)
            for name, part in properties.items()
        }
    elif others is not False:
        # Names of a map may be written twice (readers take the last), so that of two there may be one.
        if node.get("minProperties", 0) > 1:
            _refuse(path, "minProperties of a map is at most 1")
        values = _bounded(others, f"{path}.additionalProperties", depth + 1, definitions)
        node = _map_of(values) | node
    return node | {"additionalProperties": False}


def _map_of(values: Any) -> dict[str, Any]:
    names = f"^.{{1,{MAX_NAME}}}$"
    return {
        "patternProperties": {names: values},
        "maxProperties": MAX_PROPERTIES,
        "additionalProperties": False,
    }


def _anything(nesting: int) -> dict[str, Any]:
    """A value of any kind."""
    scalar: dict[str, Any] = {"type": ["string", "number", "boolean", "null"], "maxLength": MAX_STRING}
    scalar |= _bounded_number({}, True, "$")
    if not nesting:
        return scalar
    inner = _anything(nesting - 1)
    array = {"type": "array", "items": inner, "maxItems": MAX_ITEMS}
    return {"anyOf": [scalar, array, {"type": "object"} | _map_of(inner)]}


def _mapping(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(path, f"must be an object, got {type(value).__name__}")
    return value


def _refuse(path: str, problem: str) -> NoReturn:
    raise ValueError(f"schema: {path[:200]}: {problem}")
