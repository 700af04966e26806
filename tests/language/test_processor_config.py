"""processor_config: settings are found in either file, and what is not understood is an error."""

import pytest

from medvl.language import intern_vl, processor_config, qwen_vl

SETTINGS = {"resample": 3, "size": {"height": 4, "width": 4}}


def test_settings_lie_in_either_file_and_null_is_absent():
    raw = SETTINGS | {"crop_size": None}
    assert processor_config.read_settings("here", raw) == SETTINGS
    assert (
        processor_config.read_settings("here", {"image_processor": raw, "processor_class": "X"}) == SETTINGS
    )
    with pytest.raises(ValueError, match="here: must be a record of keys and values, got list"):
        processor_config.read_settings("here", {"image_processor": [1]})


def test_other_steps_and_keys_are_refused():
    processor_config.check_steps("here", "Qwen-VL", SETTINGS)
    with pytest.raises(ValueError, match="here: the image steps of Qwen-VL are fixed, got resample=2, not 3"):
        processor_config.check_steps("here", "Qwen-VL", {"resample": 2})
    processor_config.check_known_keys(
        "here", SETTINGS | {"device": "cpu"}, {"size"}, processor_config.IGNORED_KEYS
    )
    with pytest.raises(ValueError, match="here: unknown keys device, more; known are size"):
        processor_config.check_known_keys("here", SETTINGS | {"more": 1, "device": 0}, {"size"}, set())
    with pytest.raises(ValueError, match="here: must have image_mean, got only resample, size"):
        processor_config.check_none_missing("here", SETTINGS, ["image_mean"])
    with pytest.raises(ValueError, match="got only an empty record"):
        processor_config.check_none_missing("here", {}, ["size"])
    with pytest.raises(ValueError, match=r"here: image_std must be a list of 3 numbers, got 0\.5"):
        processor_config.parse_numbers("here", "image_std", 0.5)


def test_both_families_write_the_fixed_steps():
    steps = processor_config.FIXED_STEPS
    for raw in (
        qwen_vl.dump_image_config(qwen_vl.ImageConfig()),
        intern_vl.dump_tile_config(intern_vl.TileConfig()),
    ):
        assert steps.items() <= raw.items()
