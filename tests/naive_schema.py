"""JSON Schema as its specification states it, keyword by keyword, for what `bounded_schema` takes."""

import json
import re
from decimal import Decimal


def read_document(text):
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def is_valid(schema, value, root=None):
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    return all(
        _KEYWORDS[key](wanted, value, schema, root) for key, wanted in schema.items() if key in _KEYWORDS
    )


def _same(a, b):
    """Equal as JSON: true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, str | dict | list) or isinstance(b, str | dict | list):
        return a == b
    return Decimal(str(a)) == Decimal(str(b))


def _has_type(name, value):
    is_number = isinstance(value, Decimal)
    return {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "string": isinstance(value, str),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "number": is_number,
        "integer": is_number and value == value.to_integral_value(),
    }[name]


def _named(pointer, root):
    part = root
    for name in pointer.removeprefix("#/").split("/"):
        part = part[name.replace("~1", "/").replace("~0", "~")]
    return part


def _of(kind, check):
    """A keyword that says nothing of values of other kinds."""
    return lambda wanted, value, schema, root: (
        not isinstance(value, kind) or check(wanted, value, schema, root)
    )


def _items(wanted, value, schema, root):
    first = len(schema.get("prefixItems", []))
    return all(is_valid(wanted, item, root) for item in value[first:])


def _others(wanted, value, schema, root):
    others = value.keys() - schema.get("properties", {}).keys()
    return all(is_valid(wanted, value[name], root) for name in others)


def _exact(number):
    return Decimal(str(number))


_KEYWORDS = {
    "type": lambda w, v, s, r: any(_has_type(name, v) for name in ([w] if isinstance(w, str) else w)),
    "$ref": lambda w, v, s, r: is_valid(_named(w, r), v, r),
    "anyOf": lambda w, v, s, r: any(is_valid(part, v, r) for part in w),
    "oneOf": lambda w, v, s, r: sum(is_valid(part, v, r) for part in w) == 1,
    "allOf": lambda w, v, s, r: all(is_valid(part, v, r) for part in w),
    "enum": lambda w, v, s, r: any(_same(part, v) for part in w),
    "const": lambda w, v, s, r: _same(w, v),
    "minLength": _of(str, lambda w, v, s, r: len(v) >= w),
    "maxLength": _of(str, lambda w, v, s, r: len(v) <= w),
    "pattern": _of(str, lambda w, v, s, r: re.search(w, v) is not None),
    "minimum": _of(Decimal, lambda w, v, s, r: v >= _exact(w)),
    "maximum": _of(Decimal, lambda w, v, s, r: v <= _exact(w)),
    "exclusiveMinimum": _of(Decimal, lambda w, v, s, r: v > _exact(w)),
    "exclusiveMaximum": _of(Decimal, lambda w, v, s, r: v < _exact(w)),
    "multipleOf": _of(Decimal, lambda w, v, s, r: v % _exact(w) == 0),
    "minItems": _of(list, lambda w, v, s, r: len(v) >= w),
    "maxItems": _of(list, lambda w, v, s, r: len(v) <= w),
    "prefixItems": _of(list, lambda w, v, s, r: all(is_valid(p, i, r) for p, i in zip(w, v, strict=False))),
    "items": _of(list, _items),
    "properties": _of(dict, lambda w, v, s, r: all(is_valid(w[n], v[n], r) for n in w.keys() & v.keys())),
    "required": _of(dict, lambda w, v, s, r: {*w} <= v.keys()),
    "additionalProperties": _of(dict, _others),
    "minProperties": _of(dict, lambda w, v, s, r: len(v) >= w),
    "maxProperties": _of(dict, lambda w, v, s, r: len(v) <= w),
}
