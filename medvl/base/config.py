"""Experiment records: strict TOML or JSON in, frozen attrs records out. The only file that imports cattrs."""

import copy
import hashlib
import json
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs

_log = logging.getLogger("medvl")
T = TypeVar("T")
_LARGEST = 1e30  # of floats: float32 ends at 3e38, and numbers of a record are multiplied
Hook = Callable[[Any, Any], Any]  # of cattrs: (plain value, type of the field) -> value of that type
DEPTH = 32  # how deep settings may be nested; a model's config has about four levels
# Bounds (lowest, highest) of common settings, for `in_bounds` and `check_bounds`. The upper ones are far
# above what anybody needs: they catch a slip of the keyboard at once.
COUNT = (1, 2**31 - 1)  # samples, steps, tokens
COUNT_OR_NONE = (0, 2**31 - 1)
WIDTH = (1, 2**17)  # of vectors and tables, and pixels of a side
WIDTH_OR_NONE = (0, 2**17)
DEPTHS = (1, 1024)  # layers of a network, heads of one
RATE = (0, 10)  # learning rates, weight decay
SEED = (0, 2**32 - 1)  # what every generator takes
SHARE = (0, 1)
DRAWS = (1, 10**6)  # of a bootstrap
PROCESSES = (1, 1024)


class ConfigError(ValueError):
    """A record that cannot be used; the message names the file and the path inside it."""


def load_record(path: str | os.PathLike, record: type[T], overrides: tuple[str, ...] = ()) -> T:
    """Structure a `.toml` or `.json` file into the attrs class `record`.

    Args:
        record: the class, not an instance of it.
        overrides: `"key.path=value"` strings, the value in TOML syntax (a bare word counts as a string);
            `stages.1.lr=3e-5` walks lists.
    Raises:
        ConfigError: unreadable file, bad syntax, unknown key, wrong type or refused value; names the file and
            `$.path`.
    """
    raw = override(read_settings(path), overrides, source=str(path))
    return structure(raw, record, source=str(path))


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The raw dict of a `.toml` or `.json` file."""
    raw = read_plain(path)
    # A TOML file always is one; JSON may hold anything.
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold a table of settings, found {type(raw).__name__}")
    return raw


def read_plain(path: str | os.PathLike) -> Any:
    """What a `.toml` or `.json` file holds: a dict, or of JSON also a list or another value."""
    path = Path(path)
    # A pipe would be waited for and a device read without end.
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path}: must be a file, found a pipe or device")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as text ({e})") from e
    syntax = "TOML"
    parse: Callable[[str], Any] = tomllib.loads
    if path.suffix == ".json":
        syntax, parse = "JSON", json.loads
    # Thousands of nested brackets are a RecursionError of either parser.
    try:
        raw = parse(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not valid {syntax}: {e}") from e
    _check_plain(raw, str(path))
    return raw


def run_folder(path: str | os.PathLike) -> Path:
    """The folder of a run, named as such or by the `config.json` in it.

    Raises:
        ConfigError: there is no run.
    """
    folder = Path(path)
    if folder.name == "config.json":
        folder = folder.parent
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{path}: must be the folder of a run, there is no config.json; "
            "`invoke train` makes one and prints its name"
        )
    return folder


def load_run(folder: str | os.PathLike, record: type[T]) -> T:
    """The record that a run was trained with.

    Raises:
        ConfigError: no run; or its `config.json` was changed since, and not only below `data` and
            `evaluate`: changes of these two are allowed, with a warning.
    """
    path = run_folder(folder) / "config.json"
    environment = path.with_name("environment.json")
    current = load_record(path, record)
    # Runs of older versions did not store the record beside the environment.
    stored = None
    if environment.exists():
        stored = read_settings(environment).get("record")
    if stored is None:
        return current
    # Both through `structure`, so that a setting that came later has its default on both sides.
    trained = structure(stored, record, source=f"{environment}, record")
    changes = differences(unstructure(trained), unstructure(current))
    # How a run is evaluated, and on which data, may be edited in its folder; its model may not.
    refused = [change for change in changes if not change.startswith(("$.data.", "$.evaluate."))]
    if refused:
        raise ConfigError(
            f"{path}: was changed after the run was trained with it: {refused[0]}; undo that. Use --set for "
            "other data.* and evaluate.*; anything else is another run"
        )
    if changes:
        _log.warning("%s: was changed after the run was trained with it: %s", path, "; ".join(changes[:3]))
    return current


def system_of(folder: str | os.PathLike) -> str:
    """The name of the system that a run trained."""
    return str(read_settings(Path(folder) / "config.json").get("system"))


def override(raw: dict[str, Any], overrides: tuple[str, ...], source: str = "record") -> dict[str, Any]:
    """A copy of `raw` with each `"key.path=value"` set. New keys are allowed here; `structure` refuses
    unknown ones.

    Args:
        source: what messages call the settings, such as their file (likewise in the functions below).
    """
    # Tables inside are changed below, and those of the caller must not be.
    raw = copy.deepcopy(raw)
    for item in overrides:
        path, sep, text = item.partition("=")
        if not sep or not path.strip():
            raise ConfigError(f"{source}: --set needs key.path=value, got {item!r}")
        value = _parse_value(text, f"{source}: --set {path}")
        *parents, last = path.strip().split(".")
        # `_check_plain` refuses deeper files; this refuses what --set would build.
        if len(parents) >= DEPTH:
            raise ConfigError(f"{source}: --set {path[:60]}...: no setting lies {len(parents) + 1} keys deep")
        # Walk to the table or array that holds the last key; tables on the way that are not there are made.
        node: Any = raw
        for depth, key in enumerate(parents):
            node = _step(node, key, source, ".".join(parents[: depth + 1]))
        if isinstance(node, list):
            node[_index(node, last, source, path)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(
                f"{source}: --set {path}: {'.'.join(parents)} is a {type(node).__name__}, it has no keys"
            )
    return raw


def structure(raw: Any, record: type[T], source: str = "record") -> T:
    """Build `record` from plain data; unknown keys, wrong types and refused values are one ConfigError."""
    # cattrs knows nothing of defaults that depend on where a record stands, so they are filled in before.
    try:
        return _converter.structure(_with_defaults(raw, record), record)
    except cattrs.BaseValidationError as e:
        # All faults of the record at once, each with its place: "... @ $.stages[0].lr".
        faults = cattrs.transform_error(e, format_exception=_describe)
        raise ConfigError(f"{source}: " + "; ".join(faults)) from e
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{source}: {_describe(e, None)}") from e


def subrecord(default: Any) -> Any:
    """A field that is a record itself: a table that sets some of its keys gets the others from `default`.

    Without it they would get the defaults of the record's class. A key whose field has the metadata
    {"unless": KEY} is not taken from `default` where the table sets KEY.
    """
    return attrs.field(default=default, metadata={"subrecord": True})


def table(
    default: Any = attrs.NOTHING,
    *,
    defaults: Mapping[str, Any] | None = None,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    check: Callable[[Any, Any, Any], None] | None = None,
) -> Any:
    """A field that is a record itself, with defaults or an older spelling of its own.

    Args:
        default: the record where there is no table; left out, there must be one.
        defaults: the values of keys that a table leaves out. Where a key holds a list of tables, its dict
            completes each table of that list: with {"stages": {"lr": 1e-3}} every stage without lr gets it,
            and a table without stages still has none. With a list of one dict, {"stages": [{"lr": 1e-3}]},
            a table without stages gets that list, too.
        upgrade: a table in the older spelling -> the same in the present one.
        check: an attrs validator, called with (record, field, value).
    """
    metadata = {"defaults": defaults or {}, "upgrade": upgrade}
    return attrs.field(default=default, metadata=metadata, validator=check)


def _with_defaults(raw: Any, record: Any) -> Any:
    """The raw settings with each table upgraded and completed, at every depth, as its field says."""
    if not isinstance(raw, dict) or not attrs.has(record):
        return raw
    completed = dict(raw)
    for field in attrs.fields(record):
        settings = raw.get(field.name)
        # No table, or something that `structure` will refuse.
        if not isinstance(settings, dict):
            continue
        # First the spelling: what follows looks keys up by their present names.
        if field.metadata.get("upgrade"):
            settings = field.metadata["upgrade"](settings)
        if field.metadata.get("subrecord"):
            defaults = unstructure(field.default)
            # A key that contradicts one the table sets must not come from the default.
            for key_field in attrs.fields(type(field.default)):
                if key_field.metadata.get("unless") in settings:
                    del defaults[key_field.name]
            settings = defaults | settings
        settings = _fill_defaults(settings, field.metadata.get("defaults", {}))
        # Of a field "SomeRecord | None" each side is tried; what is no record changes nothing.
        for kind in get_args(field.type) or (field.type,):
            settings = _with_defaults(settings, kind)
        completed[field.name] = settings
    return completed


def _fill_defaults(settings: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A table completed by the `defaults` of its field, in the sense of `table`."""
    filled = dict(settings)
    for key, default in defaults.items():
        # For a list of tables, the defaults of each of its tables.
        item_defaults = default[0] if isinstance(default, list) else default
        items = settings.get(key)
        if isinstance(items, list) and isinstance(item_defaults, dict):
            filled[key] = [item_defaults | item if isinstance(item, dict) else item for item in items]
        # A dict stands for no value of the key: it says only what the tables of a list leave out.
        elif key not in settings and not isinstance(default, dict):
            filled[key] = default
    return filled


def unstructure(record: Any) -> Any:
    """Plain dicts, lists and scalars of an attrs record (JSON-ready)."""
    # Through JSON, so that tuples are lists, as they will be when the record is read from its file.
    return json.loads(json.dumps(_converter.unstructure(record)))


def in_bounds(low: float, high: float) -> Callable[[Any, Any, Any], None]:
    """A validator of a field: `dim: int = field(default=768, validator=in_bounds(*WIDTH))`.

    The message calls the setting by the record's class, `FuseConfig.dim`. Of an array every number must lie
    within the bounds.
    """

    def validate(record: Any, attribute: Any, value: Any) -> None:
        _check_bounds(value, f"{type(record).__name__}.{attribute.name}", low, high)

    return validate


def check_bounds(record: Any, section: str, **bounds: tuple[float, float]) -> None:
    """Raise where a number of a record, or one of an array of them, is out of bounds: `check_bounds(cfg,
    "train", batch=COUNT)`.
    """
    for name, (low, high) in bounds.items():
        _check_bounds(getattr(record, name), f"{section}.{name}", low, high)


def _check_bounds(value: Any, name: str, low: float, high: float) -> None:
    # A record holds its arrays as tuples.
    numbers = value
    if not isinstance(value, tuple):
        numbers = (value,)
    for number in numbers:
        # NaN fails this comparison, too.
        if low <= number <= high:
            continue
        bound = f"{_format_number(high)} or less" if number > high else f"{_format_number(low)} or more"
        raise ValueError(f"{name} must be {bound}, got {_format_number(number)}")


def fill_pattern(pattern: str, setting: str, **values: Any) -> str:
    """A name from a pattern: `fill_pattern("{folder}/{split}.h5", "data.store", folder="data", split="test")`
    is "data/test.h5".

    The values may hold braces themselves. A key whose value is None stays as it is, to be filled later.

    Raises:
        ValueError: the pattern holds braces around something else.
    """

    def value_of(match: re.Match[str]) -> str:
        key = match[0][1:-1]
        if key not in values:
            allowed = ", ".join(f"{{{name}}}" for name in values) or "nothing in braces"
            raise ValueError(f"{setting} may hold {allowed}, found {match[0]} in {pattern!r}")
        if values[key] is None:
            return match[0]
        return str(values[key])

    # Not str.format, which would read "{0.name}" and "{x:>9}", too, and stop at a single brace.
    return re.sub(r"\{[^{}]*\}", value_of, pattern)


def check_patterns(record: Any, section: str, **keys: tuple[str, ...]) -> None:
    """Raise where a pattern of a record holds other braces than these: `check_patterns(cfg, "data",
    store=("folder", "split"))`.

    A plain path has none: `root=()`.
    """
    for name, allowed in keys.items():
        fill_pattern(getattr(record, name), f"{section}.{name}", **dict.fromkeys(allowed))


def check_regexes(patterns: Iterable[str], setting: str) -> None:
    """Raise where one is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"{setting}: pattern {pattern!r} is not a regular expression: {e}") from e


def record_digest(record: Any) -> str:
    """Eight hex digits that identify a record (or plain data) by its content."""
    plain = record
    if attrs.has(type(record)):
        plain = unstructure(record)
    # Sorted keys and no spaces: equal content has equal text. Runs and caches are named by this digest, so it
    # may never change.
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def differences(a: Any, b: Any, path: str = "$") -> list[str]:
    """`["$.shape: [64, 64] / [32, 32]"]` for every leaf in which two plain values differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [f"{path}: {a} / {b}"]
    changes: list[str] = []
    for key in sorted({*a, *b}):
        changes += differences(a.get(key, "(absent)"), b.get(key, "(absent)"), f"{path}.{key}")
    return changes


def _format_number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parse_value(text: str, source: str) -> Any:
    """The value of `--set key=value`: TOML, or text where it is none."""
    # A shell takes quotes away: `--set preset="mm"` arrives as preset=mm, which is no TOML.
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, thousands of brackets
        raise ConfigError(f"{source}: {e}") from e
    _check_plain(value, source)
    return value


def _check_plain(value: Any, source: str, path: str = "$", depth: int = 0) -> None:
    """Raise where settings hold what none can be: dates, numbers not finite or beyond 64 bits, text for no
    file, too many levels.
    """
    if depth > DEPTH:
        raise ConfigError(f"{source}: settings are nested more than {DEPTH} deep @ {path[:60]}...")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, source, path, depth + 1)
            _check_plain(item, source, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(item, source, f"{path}[{i}]", depth + 1)
    elif isinstance(value, str):
        # NUL, and halves of surrogate pairs, which JSON can spell and UTF-8 cannot.
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ConfigError(
                f"{source}: text holds characters that cannot be written to a file, {value!a} @ {path!a}"
            )
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{source}: whole numbers have at most 64 bits @ {path}")
    elif isinstance(value, float) and not abs(value) <= _LARGEST:  # NaN would pass every check of a range
        raise ConfigError(f"{source}: must be a finite number of at most {_LARGEST:g}, got {value} @ {path}")
    elif not isinstance(value, int | float | None):
        raise ConfigError(
            f"{source}: a setting cannot be a {type(value).__name__}, got {value}; write text in quotes @ "
            f"{path}"
        )


def _step(node: Any, key: str, source: str, path: str) -> Any:
    """What lies one key below a table or array; a table that lacks the key gets an empty one there."""
    if isinstance(node, list):
        return node[_index(node, key, source, path)]
    if isinstance(node, dict):
        return node.setdefault(key, {})
    raise ConfigError(f"{source}: --set {path}: {type(node).__name__} has no keys")


def _index(node: list, key: str, source: str, path: str) -> int:
    """The key of an override as an index of an array."""
    # The length first: int() refuses thousands of digits, with a message that names no setting.
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(node):
        raise ConfigError(f"{source}: --set {path}: must be an index below {len(node)}, got {key!r}")
    return int(key)


def _describe(e: BaseException, kind: type | None) -> str:
    """What is wrong, in the words of a ConfigError; called by cattrs for each fault (with a type that is not
    needed here).
    """
    if isinstance(e, cattrs.ForbiddenExtraKeysError):
        keys: list[str] = []  # that the record has, for the reader of the message
        if attrs.has(e.cl):
            keys = [field.name for field in attrs.fields(e.cl)]
        unknown = ", ".join(sorted(map(repr, e.extra_fields)))
        return f"unknown key {unknown}; {e.cl.__name__} has {', '.join(keys)}"
    if isinstance(e, KeyError):
        return f"required key {e} is missing"
    return str(e) or type(e).__name__


# cattrs alone would convert: "7" to 7, 7.9 to 7, "abc" to ("a", "b", "c"). These hooks take a value as it is
# or refuse it. Their second argument, the type, is known where a hook is made.
def _exact_hook(kind: type) -> Hook:
    def hook(value: Any, _: Any) -> Any:
        # `lr = 1` is a float that nobody would write as 1.0. `type` and not isinstance: True is an int.
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, got {value!r}")
        return value

    return hook


def _literal_hook(kind: Any) -> Hook:
    choices = get_args(kind)

    def hook(value: Any, _: Any) -> Any:
        # The types must be equal as well: True == 1.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value

    return hook


def _tuple_hook(kind: Any) -> Hook:
    kinds = get_args(kind)

    def hook(value: Any, _: Any) -> tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"expected an array, got {value!r}")
        # tuple[int, ...] is of any length.
        item_kinds = kinds[:1] * len(value) if kinds[1:] == (Ellipsis,) else kinds
        if len(item_kinds) != len(value):
            raise ValueError(f"expected an array of {len(item_kinds)}, got {value!r}")
        # All items are tried, so that one message names all that are wrong.
        items, errors = [], []
        for i, (item, item_kind) in enumerate(zip(value, item_kinds, strict=True)):
            try:
                items.append(_converter.structure(item, item_kind))
            except (ValueError, TypeError, KeyError, cattrs.BaseValidationError) as e:
                # The note tells `transform_error` the place: $.stages[0].steps.
                e.add_note(cattrs.IterableValidationNote(f"Structuring {kind} @ index {i}", i, item_kind))
                errors.append(e)
        if errors:
            raise cattrs.IterableValidationError(f"While structuring {kind}", errors, kind)
        return tuple(items)

    return hook


# What `structure` and `unstructure` use. One of our own: hooks in cattrs' global converter would change other
# libraries that use it.
_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (int, float, bool, str):
    _converter.register_structure_hook(_kind, _exact_hook(_kind))
_converter.register_structure_hook_factory(lambda k: get_origin(k) is tuple, _tuple_hook)
_converter.register_structure_hook_factory(lambda k: get_origin(k) is Literal, _literal_hook)
