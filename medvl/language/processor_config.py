"""What preprocessor_config.json files of Qwen-VL and InternVL have in common: keys, fixed steps, checks."""

from collections.abc import Mapping, Set
from typing import Any

# Steps that are always done to an image, or never.
FIXED_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    # PIL's number of bicubic.
    "resample": 3,
    "do_center_crop": False,
    "do_pad": False,
}
# Keys that change nothing here: names of classes, defaults of transformers, sizes of steps never done.
IGNORED_KEYS = {
    "feature_extractor_type",
    "default_to_square",
    "data_format",
    "input_data_format",
    "device",
    "return_tensors",
    "disable_grouping",
    "crop_size",
    "pad_size",
}


def read_settings(where: str, raw: Any) -> dict[str, Any]:
    """The settings in a preprocessor_config.json, or in the "image_processor" of a processor_config.json.

    Keys that are null are left out.

    Args:
        where: what errors begin with, here and below.
    Raises:
        ValueError: no record.
    """
    if isinstance(raw, Mapping):
        raw = raw.get("image_processor", raw)
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: must be a record of keys and values, got {type(raw).__name__}")
    return {key: value for key, value in raw.items() if value is not None}


def check_steps(where: str, family: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a step is other than in `FIXED_STEPS`; a file need not say it."""
    wrong = [key for key, value in FIXED_STEPS.items() if settings.get(key, value) != value]
    if wrong:
        differences = "; ".join(f"{key}={settings[key]!r}, not {FIXED_STEPS[key]!r}" for key in wrong)
        raise ValueError(f"{where}: the image steps of {family} are fixed, got {differences}")


def check_known_keys(where: str, settings: Mapping[str, Any], known: Set[str], ignored: Set[str]) -> None:
    """Raise ValueError for keys that are neither `known` nor `ignored`, nor those of `FIXED_STEPS`."""
    unknown = sorted(settings.keys() - known - FIXED_STEPS.keys() - ignored)
    if unknown:
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def check_none_missing(where: str, settings: Mapping[str, Any], missing: list[str]) -> None:
    """Raise ValueError if keys are missing."""
    if missing:
        present = ", ".join(sorted(settings)) or "an empty record"
        raise ValueError(f"{where}: must have {', '.join(missing)}, got only {present}")


def parse_numbers(where: str, key: str, value: Any) -> tuple[Any, ...]:
    """The numbers of a list, such as image_mean; the record that takes them checks their number and kind.

    Raises:
        ValueError: no list.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: {key} must be a list of 3 numbers, got {value!r}")
    return tuple(value)
