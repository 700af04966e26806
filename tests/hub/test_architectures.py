"""architectures: which classes of transformers a config means, and sizes that are refused before anything is made."""

import copy

import pytest
import torch

from medvl.hub import skeletons
from tests import tiny
from tests.hub.pieces import TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 96}, "a dinov2 config has no hiden_size; it has .*hidden_size"),
        ({"hidden_size": "96"}, "'hidden_size' expected int"),
        ({"model_type": "dinov9"}, "found 'dinov9'"),
    ],
)
def test_init_refuses_typos(gen, change, message):
    with pytest.raises(ValueError, match=message):
        skeletons.init_skeleton(TINY["dinov2"] | change, gen)


IMPOSSIBLE = [
    ("qwen2", "hidden_size", -1, r"hidden_size must be from 1 to \d+, got -1"),
    ("qwen2", "vocab_size", 0, r"vocab_size must be from 1 to \d+, got 0"),
    ("qwen2", "num_attention_heads", 0, r"num_attention_heads must be from 1 to \d+, got 0"),
    ("qwen2", "num_attention_heads", 64, "num_attention_heads must be at most hidden_size, got 64 and 32"),
    ("qwen2", "num_key_value_heads", 3, "num_key_value_heads must divide num_attention_heads, got 3 and 4"),
    (
        "qwen2",
        "intermediate_size",
        10**13,
        r"intermediate_size must be from \d to 4194304, got 10000000000000",
    ),
    ("qwen2", "num_hidden_layers", 10**9, r"num_hidden_layers must be from \d to 1024, got 1000000000"),
    ("qwen2", "hidden_size", 28, "heads must have an even number of values for rotary positions, got 7"),
    (
        "qwen2_5_vl",
        "text_config.rope_parameters.mrope_section",
        [2, 1],
        r"mrope_section must be three numbers whose sum is 4, .*\[2, 1\]",
    ),
    (
        "qwen2_5_vl",
        "text_config.rope_parameters.mrope_section",
        [2, 2, 2],
        "mrope_section must be three numbers whose sum is 4",
    ),
    (
        "qwen3_vl",
        "text_config.rope_parameters.mrope_section",
        None,
        "config.text_config: mrope_section must be three numbers",
    ),
    (
        "qwen3_vl",
        "vision_config.num_heads",
        3,
        "vision_config: num_heads must divide hidden_size, got 3 and 32",
    ),
    ("qwen3_vl", "vision_config.depth", 10**6, r"vision_config.depth must be from \d to 1024"),
    ("qwen3_vl", "vision_config.patch_size", -1, r"vision_config.patch_size must be from 1 to \d+, got -1"),
    ("qwen3_vl", "vision_config.out_hidden_size", 10**6, r"out_hidden_size must be from \d to 131072"),
    ("qwen2_vl", "vision_config.mlp_ratio", 10**6, r"mlp_ratio must be from \d to 256"),
    ("gpt2", "n_positions", 0, r"n_positions must be from 1 to \d+, got 0"),
    ("internvl", "vision_config.image_size", [0, 16], r"image_size must be from 1 to \d+, got 0"),
    ("internvl", "vision_config.patch_size", [], "config: no internvl can be built with these sizes"),
    ("dinov2", "patch_size", 0, r"patch_size must be from 1 to \d+, got 0"),
    ("dinov2", "patch_size", 64, "image_size 32 and patch_size 64 must make 1 to 262144 patches, got 0"),
    (
        "dinov2",
        "image_size",
        100_000,
        "image_size 100000 and patch_size 8 must make 1 to 262144 patches, got 156250000",
    ),
    ("dinov2", "num_attention_heads", -1, r"num_attention_heads must be from 1 to \d+, got -1"),
    (
        "dinov2",
        "hidden_size",
        float("nan"),
        r"hidden_size must be from 1 to \d+, got nan|config: not a dinov2",
    ),
    ("dinov2", "num_labels", 10**8, r"num_labels must be from \d to 1048576"),
    ("qwen2", "num_labels", 10**8, r"num_labels must be from \d to 1048576"),
    ("dinov2", "image_size", [8], "config: no dinov2 can be built with these sizes .IndexError"),
]


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"), IMPOSSIBLE, ids=[f"{k}-{n}-{v}"[:60] for k, n, v, _ in IMPOSSIBLE]
)
def test_impossible_sizes_are_refused_before_anything_is_made(kind, key, value, message, monkeypatch):
    config = copy.deepcopy(tiny.CONFIGS.get(kind) or TINY[kind])
    part = config
    for name in key.split(".")[:-1]:
        part = part[name]
    part[key.split(".")[-1]] = value
    head = "language" if kind in tiny.CONFIGS else ""
    for make in (
        skeletons.empty_skeleton,
        lambda c, head: skeletons.init_skeleton(c, torch.Generator(), head=head),
    ):
        with pytest.raises(ValueError, match=message):
            make(config, head=head)


def test_a_model_larger_than_memory_is_not_begun(monkeypatch):
    """A thousand layers would take minutes to build, and the first of them all the memory."""
    config = tiny.CONFIGS["qwen2"] | {
        "hidden_size": 2**16,
        "intermediate_size": 2**20,
        "num_hidden_layers": 1000,
    }
    monkeypatch.setattr(skeletons, "build_module", lambda *args: pytest.fail("was built"))
    with pytest.raises(
        ValueError,
        match=r"config: a qwen2 of these sizes has 274,877.9 GB of float32 weights or more, this machine",
    ):
        skeletons.init_skeleton(config, torch.Generator(), head="language")


def test_kernels_that_a_config_names_are_not_fetched():
    """A name such as owner/kernel would be downloaded and run; which kernel computes a layer is not part of the architecture."""
    nested = {"attn_implementation": {"": "owner/kernel", "text_config": "owner/kernel"}}
    for config in (
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "flash_attention_2"},
        nested,
    ):
        skeleton = skeletons.empty_skeleton(
            tiny.CONFIGS["qwen2"] | config | {"experts_implementation": "owner/kernel"}, head="language"
        )
        assert skeleton.module.config._attn_implementation == "sdpa"
    inner = tiny.CONFIGS["qwen2_vl"] | {
        "vision_config": tiny.CONFIGS["qwen2_vl"]["vision_config"] | {"attn_implementation": "owner/kernel"}
    }
    assert (
        skeletons.empty_skeleton(inner, head="language").module.config.vision_config._attn_implementation
        == "sdpa"
    )
    assert (
        skeletons.empty_skeleton(
            tiny.CONFIGS["qwen2"] | {"attn_implementation": "eager"}
        ).module.config._attn_implementation
        == "eager"
    )
