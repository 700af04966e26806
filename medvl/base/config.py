"""Experiment records: strict TOML or JSON in, frozen attrs records out. The only file that imports cattrs."""

import copy
import hashlib
import json
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs

_log = logging.getLogger("medvl")
T = TypeVar("T")
_LARGEST = 1e30  # float32 ends at 3e38, and numbers of a record are multiplied
Hook = Callable[[Any, Any], Any]
DEPTH = 32  # how deep settings may be nested; a model's config has about four levels
# Bounds of common settings, for `check_bounds`. The upper ones are far above what anybody needs: they catch a slip of the keyboard at once.
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
        overrides: `"key.path=value"` strings, value in TOML syntax (a bare word counts as a string); `stages.1.lr=3e-5` walks lists.
    Raises:
        ConfigError: unreadable file, bad syntax, unknown key, wrong type or refused value; names the file and `$.path`.
    """
    return structure(override(read_settings(path), overrides, where=str(path)), record, where=str(path))


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The raw dict of a `.toml` or `.json` file."""
    raw = read_plain(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold a table of settings, found {type(raw).__name__}")
    return raw


def read_plain(path: str | os.PathLike) -> Any:
    """What a `.toml` or `.json` file holds: a dict, or of JSON also a list or another value."""
    path = Path(path)
    if path.exists() and not (
        path.is_file() or path.is_dir()
    ):  # a pipe is waited for, a device read, without end
        raise ConfigError(f"{path}: must be a file, found a pipe or device")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as text ({e})") from e
    try:
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {e}") from e
    _check_plain(raw, str(path))
    return raw


def run_folder(given: str | os.PathLike) -> Path:
    """The folder of a run, given as such or as the `config.json` in it.

    Raises:
        ConfigError: there is no run.
    """
    folder = Path(given).parent if Path(given).name == "config.json" else Path(given)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{given}: must be the folder of a run, there is no config.json; `invoke train` makes one and prints its name"
        )
    return folder


def load_run(folder: str | os.PathLike, record: type[T]) -> T:
    """The record that a run was trained with.

    Raises:
        ConfigError: no run; or its `config.json` was changed since, in more than data and evaluate (which a warning says).
    """
    path = run_folder(folder) / "config.json"
    kept = path.with_name("environment.json")
    now = load_record(path, record)
    before = (
        read_settings(kept).get("record") if kept.exists() else None
    )  # runs of older versions did not keep it
    if before is None:
        return now
    before = structure(before, record, where=f"{kept}, record")
    if changed := differences(unstructure(before), unstructure(now)):
        wrong = [d for d in changed if not d.startswith(("$.data.", "$.evaluate."))]
        if wrong:
            raise ConfigError(
                f"{path}: was changed after the run was trained with it, {wrong[0]}; put that back. Other data.* and evaluate.* are "
                "given by --set, anything else is another run"
            )
        _log.warning("%s: was changed after the run was trained with it: %s", path, "; ".join(changed[:3]))
    return now


def system_of(folder: str | os.PathLike) -> str:
    """The system of a run, as its record says it."""
    return str(read_settings(Path(folder) / "config.json").get("system"))


def override(raw: dict[str, Any], overrides: tuple[str, ...], where: str = "record") -> dict[str, Any]:
    """A copy of `raw` with each `"key.path=value"` set. New keys are allowed here; `structure` refuses unknown ones."""
    raw = copy.deepcopy(raw)
    for item in overrides:
        path, sep, text = item.partition("=")
        if not sep or not path.strip():
            raise ConfigError(f"{where}: --set needs key.path=value, got {item!r}")
        value = _value(text, f"{where}: --set {path}")
        *parents, last = path.strip().split(".")
        if len(parents) >= DEPTH:
            raise ConfigError(f"{where}: --set {path[:60]}...: no setting lies {len(parents) + 1} keys deep")
        node: Any = raw
        for depth, key in enumerate(parents):
            node = _step(node, key, where, ".".join(parents[: depth + 1]))
        if isinstance(node, list):
            node[_index(node, last, where, path)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(
                f"{where}: --set {path}: {'.'.join(parents)} is a {type(node).__name__}, it has no keys"
            )
    return raw


def structure(raw: Any, record: type[T], where: str = "record") -> T:
    """Build `record` from plain data; unknown keys, wrong types and refused values are one ConfigError."""
    try:
        return _converter.structure(_with_kept(raw, record), record)
    except cattrs.BaseValidationError as e:
        raise ConfigError(f"{where}: " + "; ".join(cattrs.transform_error(e, format_exception=_say))) from e
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{where}: {_say(e, None)}") from e


def subrecord(default: Any) -> Any:
    """A field of a record that is a record itself: a table that sets some of its keys keeps what `default` says of the others.

    Without it they would have the defaults of the record's class. A key whose field has the metadata {"unless": KEY} is not kept where KEY
    is set.
    """
    return attrs.field(default=default, metadata={"kept": True})


def _with_kept(raw: Any, record: type) -> Any:
    if not isinstance(raw, dict) or not attrs.has(record):
        return raw
    out = dict(raw)
    for table in attrs.fields(record):
        given = raw.get(table.name)
        if table.metadata.get("kept") and isinstance(given, dict):
            default = unstructure(table.default)
            unless = {f.name: f.metadata.get("unless") for f in attrs.fields(type(table.default))}
            out[table.name] = {
                key: value for key, value in default.items() if unless[key] not in given
            } | given
    return out


def unstructure(record: Any) -> Any:
    """Plain dicts, lists and scalars of an attrs record (JSON-ready)."""
    return json.loads(json.dumps(_converter.unstructure(record)))


def check_bounds(record: Any, where: str, **bounds: tuple[float, float]) -> None:
    """Raise where a number of a record, or one of an array of them, lies outside its bounds: `check_bounds(cfg, "train", batch=COUNT)`."""
    for name, (low, high) in bounds.items():
        held = getattr(record, name)
        for value in held if isinstance(held, tuple) else (held,):
            if not low <= value <= high:  # which holds for NaN, too
                bound = f"{_number(high)} or less" if value > high else f"{_number(low)} or more"
                raise ValueError(f"{where}.{name} must be {bound}, got {_number(value)}")


def fill_pattern(pattern: str, where: str, **values: Any) -> str:
    """A name from a pattern: `fill_pattern("{folder}/{split}.h5", "data.store", folder="data", split="test")` is "data/test.h5".

    What is filled in may itself hold braces. A key whose value is None stays as it is, for somebody else to fill.

    Raises:
        ValueError: the pattern holds braces around something else.
    """

    def value_of(match: re.Match[str]) -> str:
        key = match[0][1:-1]
        if key not in values:
            known = ", ".join(f"{{{k}}}" for k in values) or "nothing in braces"
            raise ValueError(f"{where} may hold {known}, found {match[0]} in {pattern!r}")
        return match[0] if values[key] is None else str(values[key])

    return re.sub(r"\{[^{}]*\}", value_of, pattern)


def check_patterns(record: Any, where: str, **keys: tuple[str, ...]) -> None:
    """Raise where a name or pattern of a record holds other braces than these: `check_patterns(cfg, "data", store=("folder", "split"))`.

    A plain path has none: `root=()`.
    """
    for name, known in keys.items():
        fill_pattern(getattr(record, name), f"{where}.{name}", **dict.fromkeys(known))


def check_regexes(patterns: Iterable[str], where: str) -> None:
    """Raise where one is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"{where}: pattern {pattern!r} is not a regular expression: {e}") from e


def record_digest(record: Any) -> str:
    """Eight hex digits that identify a record (or plain data) by its content."""
    plain = unstructure(record) if attrs.has(type(record)) else record
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]


def differences(a: Any, b: Any, path: str = "$") -> list[str]:
    """`["$.shape: [64, 64] / [32, 32]"]` for every leaf in which two plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for k in sorted({*a, *b})
            for d in differences(a.get(k, "(absent)"), b.get(k, "(absent)"), f"{path}.{k}")
        ]
    return [] if a == b else [f"{path}: {a} / {b}"]


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(text: str, where: str) -> Any:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, thousands of brackets
        raise ConfigError(f"{where}: {e}") from e
    _check_plain(value, where)
    return value


def _check_plain(value: Any, where: str, path: str = "$", depth: int = 0) -> None:
    """Raise where settings hold what no setting can be: dates, numbers not finite or beyond 64 bits, text for no file, too many levels."""
    if depth > DEPTH:
        raise ConfigError(f"{where}: settings are nested more than {DEPTH} deep @ {path[:60]}...")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, where, path, depth + 1)
            _check_plain(item, where, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(item, where, f"{path}[{i}]", depth + 1)
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ConfigError(f"{where}: text holds characters that no file can hold, {value!a} @ {path!a}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where}: whole numbers have at most 64 bits @ {path}")
    elif isinstance(value, float) and not abs(value) <= _LARGEST:  # NaN would pass every check of a range
        raise ConfigError(f"{where}: must be a finite number of at most {_LARGEST:g}, got {value} @ {path}")
    elif not isinstance(value, int | float | None):
        raise ConfigError(
            f"{where}: no setting is a {type(value).__name__}, got {value}; write text in quotes @ {path}"
        )


def _step(node: Any, key: str, where: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, where, path)]
    if isinstance(node, dict):
        return node.setdefault(key, {})
    raise ConfigError(f"{where}: --set {path}: {type(node).__name__} has no keys")


def _index(node: list, key: str, where: str, path: str) -> int:
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(node):
        raise ConfigError(f"{where}: --set {path}: must be an index below {len(node)}, got {key!r}")
    return int(key)


def _say(e: BaseException, kind: type | None) -> str:
    if isinstance(e, cattrs.ForbiddenExtraKeysError):
        known = [a.name for a in attrs.fields(e.cl)] if attrs.has(e.cl) else []
        return f"unknown key {', '.join(sorted(map(repr, e.extra_fields)))}; {e.cl.__name__} has {', '.join(known)}"
    if isinstance(e, KeyError):
        return f"required key {e} is missing"
    return str(e) or type(e).__name__


def _exact(kind: type) -> Hook:
    def hook(value: Any, _: Any) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, got {value!r}")
        return value

    return hook


def _one_of(kind: Any) -> Hook:
    choices = get_args(kind)

    def hook(value: Any, _: Any) -> Any:
        if not any(type(value) is type(c) and value == c for c in choices):
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value

    return hook


def _array(kind: Any) -> Hook:
    """Tuples from arrays only: cattrs alone would turn the string "abc" into ("a", "b", "c")."""
    kinds = get_args(kind)

    def hook(value: Any, _: Any) -> tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"expected an array, got {value!r}")
        each = kinds[:1] * len(value) if kinds[1:] == (Ellipsis,) else kinds
        if len(each) != len(value):
            raise ValueError(f"expected an array of {len(each)}, got {value!r}")
        out, errors = [], []
        for i, (item, k) in enumerate(zip(value, each, strict=True)):
            try:
                out.append(_converter.structure(item, k))
            except (ValueError, TypeError, KeyError, cattrs.BaseValidationError) as e:
                e.add_note(cattrs.IterableValidationNote(f"Structuring {kind} @ index {i}", i, k))
                errors.append(e)
        if errors:
            raise cattrs.IterableValidationError(f"While structuring {kind}", errors, kind)
        return tuple(out)

    return hook


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (int, float, bool, str):
    _converter.register_structure_hook(_kind, _exact(_kind))
_converter.register_structure_hook_factory(lambda k: get_origin(k) is tuple, _array)
_converter.register_structure_hook_factory(lambda k: get_origin(k) is Literal, _one_of)
