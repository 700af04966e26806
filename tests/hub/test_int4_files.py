"""int4 files: both layouts from a naive packer are read as their formulas; ours are read by transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from medvl.hub import int4_files, loading, saving, skeletons
from medvl.language import chat
from medvl.weights import four_bit, int4, lazy, lora
from medvl.weights.int4 import Int4Config
from tests import tiny

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
AWQ |= {"modules_to_not_convert": ["visual"]}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head", "re:visual.*"],
}
LAYER = "model.layers.0.mlp.up_proj"


def wide_model(kind):
    """A tiny model whose rows groups of 32, 64 and 128 divide."""
    config = json.loads(json.dumps(tiny.CONFIGS[kind]))
    text = config.get("text_config", config)
    text |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    text |= {"head_dim": 32} if "head_dim" in text else {}
    if "rope_parameters" in text:
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [8, 4, 4]}
    if "vision_config" in config:
        config["vision_config"]["out_hidden_size"] = 128
    gen = torch.Generator().manual_seed(0)
    skeleton, params = skeletons.init_skeleton(config, gen, head="language")
    return skeleton, {
        n: torch.randn(t.shape, generator=gen) * 0.08 + ("norm" in n and t.dim() == 1)
        for n, t in params.items()
    }


def naive_pack(codes, axis, order=range(8)):
    """int32 of eight codes along an axis, field i of a word holding the code `order[i]`."""
    codes = codes.long().movedim(axis, -1)
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int64)
    for place, column in enumerate(order):
        words |= codes[..., column::8] << 4 * place
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.int().movedim(-1, axis).contiguous()


def layout(kind, out, width, group, symmetric, seed):
    """(tensors of a file, the weight that they stand for)."""
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (out, width), generator=gen)
    zero = torch.randint(16, (out, width // group), generator=gen)
    zero = torch.full_like(zero, 8) if symmetric else zero
    scale = torch.rand(out, width // group, generator=gen).half() * 0.02 + 0.001
    values = (codes - zero.repeat_interleave(group, 1)) * scale.float().repeat_interleave(group, 1)
    if kind == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            ".qweight": naive_pack(codes.t(), 1, order),
            ".qzeros": naive_pack(zero.t(), 1, order),
            ".scales": scale.t().contiguous(),
        }
    else:
        tensors = {
            ".weight_packed": naive_pack(codes, 1),
            ".weight_scale": scale,
            ".weight_shape": torch.tensor([out, width]),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = naive_pack(zero, 0)
    return tensors, values


def write(folder, kind="awq", group=32, symmetric=False, arch="qwen3", change=None, **settings):
    """A checkpoint in one of the layouts; returns {name: value} of its 4-bit weights.

    `change(state)` damages the tensors, `settings` the quantization_config.
    """
    skeleton, params = wide_model(arch)
    saving.save_skeleton(skeleton, params, folder)
    state = load_file(folder / "model.safetensors")
    values = {}
    names = [n for n in state if n.endswith("_proj.weight") and "visual" not in n]
    for i, name in enumerate(names):
        out, width = state.pop(name).shape
        size = width if group == -1 else group
        tensors, values[name] = layout(kind, out, width, size, symmetric, i)
        state |= {name.removesuffix(".weight") + suffix: t for suffix, t in tensors.items()}
    if change is not None:
        change(state)
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if kind == "awq":
        quantization = AWQ | {"group_size": group} | settings
    else:
        weights = WEIGHTS | {"symmetric": symmetric, "group_size": group}
        if group == -1:
            weights |= {"strategy": "channel", "group_size": None}
        weights |= settings.pop("weights", {})
        group_0 = COMPRESSED["config_groups"]["group_0"] | {"weights": weights} | settings.pop("group_0", {})
        quantization = COMPRESSED | {"config_groups": {"group_0": group_0}} | settings
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return values


# Reading --------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["qwen3", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("kind", "group", "symmetric"),
    [
        ("awq", 32, False),
        ("awq", 128, False),
        ("compressed", 64, False),
        ("compressed", 128, True),
        ("compressed", -1, False),
        ("compressed", -1, True),
    ],
)
def test_both_layouts_are_read_as_their_formulas(tmp_path, arch, kind, group, symmetric):
    values = write(tmp_path, kind, group, symmetric, arch)
    skeleton, params = loading.load_skeleton(tmp_path, head="language")
    four = {n: w for n, w in params.items() if isinstance(w, int4.Int4)}
    assert len(four) == len(values) == 7
    published = {n.replace("model.language_model.", "model."): w for n, w in four.items()}
    assert published.keys() == values.keys()
    for name, w in published.items():
        assert torch.equal(lazy.dense(w), values[name])
        assert w.dtype == torch.float32
        assert w.scale.dtype == torch.float16
    written = {n: lazy.dense(w) for n, w in params.items()}
    x = tiny.batch(arch)
    with torch.no_grad():
        torch.testing.assert_close(
            skeleton(params, **x).logits, skeleton(written, **x).logits, rtol=0, atol=1e-4
        )


def test_a_chat_opens_a_folder_by_its_config(tmp_path, gen):
    """`ModelConfig` needs nothing but the name; an estimate counts the same bytes without reading a weight."""
    values = write(tmp_path)
    model = chat.ModelConfig(name=str(tmp_path), dtype="bfloat16")

    class Tokens:
        eos_token_id, pad_token_id = 2, 0

        def convert_tokens_to_ids(self, token):
            return 150

    talk, params = chat.open_chat(model, chat.ChatConfig(), Tokens(), gen)
    assert sum(isinstance(w, int4.Int4) for w in params.values()) == len(values)
    _, on_meta = chat.open_chat(model, chat.ChatConfig(), Tokens(), gen, device=torch.device("meta"))
    assert {n: repr(w) for n, w in on_meta.items() if isinstance(w, lazy.Lazy)} == {
        n: repr(w) for n, w in params.items() if isinstance(w, lazy.Lazy)
    }
    # A file has scales of 16 bits, as the weights of the estimate.
    assert lazy.nbytes(on_meta) == lazy.nbytes(params)
    adapter = lora.init_lora(lora.LoraConfig(rank=2, pattern="all-linear"), talk.skeleton, gen)
    assert lora.apply_lora(params, adapter).keys() == params.keys()
    with pytest.raises(ValueError, match="must be a plain tensor, got Int4"):
        loading.load_skeleton(tmp_path, head="language", transform=four_bit.quantizer())
    with pytest.raises(ValueError, match="has 4 bits and cannot be trained"):
        check_trained(params)


def test_an_estimate_leaves_the_vision_tower_in_full_precision(tmp_path):
    for kind in ("awq", "compressed"):
        values = write(tmp_path / kind, kind, arch="qwen2_5_vl")
        skeleton, params = loading.load_skeleton(tmp_path / kind, head="language", dtype=torch.float16)
        convert = int4_files.int4_on_meta(
            json.loads((tmp_path / kind / "config.json").read_text()), skeleton.module
        )
        shapes = {n: torch.empty(w.shape, dtype=torch.float16, device="meta") for n, w in params.items()}
        on_meta = {n: convert(n, t) for n, t in shapes.items()}
        assert sum(isinstance(w, int4.Int4) for w in on_meta.values()) == len(values)
        assert lazy.nbytes(on_meta) == lazy.nbytes(params)


def check_trained(params):
    from medvl.training import stages
    from medvl.training.record import Stage

    stage = Stage(name="all", steps=1, lr=1e-3, train=("model/.*",))
    stages.check_trainable(stage, {"model": params})


# Writing --------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arch", "group", "symmetric", "dtype"),
    [
        ("qwen3", 32, False, torch.float32),
        ("qwen3", 64, True, torch.bfloat16),
        ("phi3", 128, False, torch.float32),
        ("qwen2_5_vl", 128, False, torch.float32),
        ("qwen2_5_vl", -1, True, torch.float32),
    ],
)
def test_ours_is_read_by_transformers(tmp_path, arch, group, symmetric, dtype):
    """With dequantize=True always; symmetric also as it is, where compressed-tensors writes the values out itself."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig

    skeleton, params = wide_model(arch)
    params = {n: t.to(dtype) for n, t in params.items()}
    four = int4.quantize(params, Int4Config(group=group, symmetric=symmetric))
    saving.save_skeleton(skeleton, four, tmp_path / "ours")
    again, read = loading.load_skeleton(tmp_path / "ours", head="language", dtype=dtype)
    assert all(torch.equal(lazy.dense(read[n]), lazy.dense(four[n])) for n in four)
    assert lazy.nbytes(read) == lazy.nbytes(four)
    x = tiny.batch(arch)
    if "pixel_values" in x:
        x["pixel_values"] = x["pixel_values"].to(dtype)
    auto = AutoModelForImageTextToText if "vl" in arch else AutoModelForCausalLM
    written = {n: lazy.dense(w) for n, w in four.items()}
    with torch.no_grad():
        want = skeleton(written, **x).logits
        torch.testing.assert_close(again(read, **x).logits, want, rtol=1e-4, atol=1e-4)
        for config in [CompressedTensorsConfig(dequantize=True), *([None] if symmetric else [])]:
            options = {} if config is None else {"quantization_config": config}
            theirs = auto.from_pretrained(tmp_path / "ours", dtype=dtype, **options).eval()
            torch.testing.assert_close(theirs(**x).logits, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_names_and_shapes_are_those_of_the_loader_of_vllm(tmp_path, group):
    """vLLM 0.33, compressed_tensors_wNa16.py, create_weights: what each layer registers, of [out, in]."""
    skeleton, params = wide_model("qwen3")
    saving.save_skeleton(skeleton, int4.quantize(params, Int4Config(group=group)), tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    out, width = params[f"{LAYER}.weight"].shape
    groups = 1 if group == -1 else width // group
    got = {n.removeprefix(LAYER): (list(t.shape), t.dtype) for n, t in state.items() if n.startswith(LAYER)}
    assert got == {
        ".weight_packed": ([out, width // 8], torch.int32),
        ".weight_scale": ([out, groups], torch.float32),
        ".weight_zero_point": ([out // 8, groups], torch.int32),
        ".weight_shape": ([2], torch.int64),
    }
    assert state[f"{LAYER}.weight_shape"].tolist() == [out, width]
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    (group_0,) = config["config_groups"].values()
    assert (group_0["targets"], group_0["weights"]["num_bits"]) == (["Linear"], 4)
    assert group_0["weights"]["group_size"] == (None if group == -1 else group)


def test_what_a_file_cannot_hold(tmp_path):
    skeleton, params = wide_model("qwen3")
    four = int4.quantize(params, Int4Config(group=32))
    other = int4.quantize_matrix(params[f"{LAYER}.weight"], Int4Config(group=64))
    with pytest.raises(ValueError, match=r"of one kind, these have groups of \[32, 64\] values"):
        saving.save_skeleton(skeleton, four | {f"{LAYER}.weight": other}, tmp_path / "m")
    nf4 = four_bit.quantize_matrix(params[f"{LAYER}.weight"])
    with pytest.raises(ValueError, match="of two 4-bit kinds, FourBit and Int4"):
        saving.save_skeleton(skeleton, four | {f"{LAYER}.weight": nf4}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Bad files ------------------------------------------------------------------------------------------------------------------------------
def without(suffix):
    return lambda state: state.pop(LAYER + suffix)


def replaced(suffix, function):
    return lambda state: state.update({LAYER + suffix: function(state[LAYER + suffix])})


BAD = [
    ({"group_size": 64}, r"down_proj: the config says group_size 64, but scales \[8, 128\] has groups of 32"),
    ({"group_size": 48}, "down_proj: groups of 48 must divide a row, the file has rows of 256"),
    ({"bits": 8}, "quantization_config: bits must be 4 to be read here, found 8"),
    ({"version": "gemv"}, "version must be 'gemm' to be read here, found 'gemv'"),
    ({"zero_point": False}, "zero_point must be True to be read here, found False"),
    ({"quant_method": "gptq"}, "found 'gptq'; quantise the full-precision model anew"),
    ({"quant_method": "fp8"}, "found 'fp8'; take the full-precision model"),
    ({"change": without(".scales")}, "up_proj: a 4-bit weight needs scales, which the file lacks"),
    ({"change": without(".qzeros")}, "up_proj: a 4-bit weight needs qzeros"),
    (
        {"change": lambda state: state.update({f"{LAYER}.g_idx": torch.arange(128)})},
        r"found g_idx; columns in the order of activations \(act-order\) are not read",
    ),
    (
        {"change": replaced(".qweight", lambda t: t.long())},
        r"qweight must be int32 \[128, 32\], found int64 \[128, 32\]",
    ),
    ({"change": replaced(".scales", lambda t: t.int())}, "scales must hold floats, found int32"),
    (
        {"change": replaced(".qzeros", lambda t: t[:, 1:].contiguous())},
        r"qzeros must be int32 \[4, 32\], found int32 \[4, 31\]",
    ),
    (
        {
            "change": lambda state: [
                state.pop(n) for n in [*state] if n.endswith(("qweight", "qzeros", "scales"))
            ]
        },
        "says awq, but no tensor is called .qweight",
    ),
    (
        {"kind": "compressed", "weights": {"group_size": 64}},
        r"the config says group_size 64, but weight_scale \[128, 8\] has groups of 32",
    ),
    ({"kind": "compressed", "weights": {"num_bits": 8}}, "num_bits must be 4 to be read here, found 8"),
    (
        {"kind": "compressed", "weights": {"type": "float"}},
        "type must be 'int' to be read here, found 'float'",
    ),
    (
        {"kind": "compressed", "weights": {"actorder": "group"}},
        r"in the order of activations \(actorder\) are not read",
    ),
    (
        {"kind": "compressed", "weights": {"strategy": "tensor"}},
        "must be 'group' or 'channel', found 'tensor'",
    ),
    ({"kind": "compressed", "ignore": ["re:("]}, "config_groups and ignore cannot be read"),
    ({"kind": "compressed", "config_groups": [1]}, "config_groups and ignore cannot be read"),
    ({"group_size": "32"}, "group_size must be a number of values or -1, found '32'"),
    (
        {"change": replaced(".qweight", lambda t: t[0].contiguous())},
        r"qweight must be \[in, out / 8\], found \[32\]",
    ),
    (
        {"kind": "compressed", "weights": {"symmetric": True}},
        "found weight_zero_point; the config says that it",
    ),
    ({"kind": "compressed", "format": "nvfp4-pack-quantized"}, "format must be 'pack-quantized'"),
    (
        {"kind": "compressed", "group_0": {"input_activations": {"num_bits": 8}}},
        "input_activations must be None",
    ),
    ({"kind": "compressed", "group_0": {"targets": ["re:.*q_proj"]}}, "no config group has the layer"),
    ({"kind": "compressed", "config_groups": {}}, "config_groups must say how layers are quantised"),
    ({"kind": "compressed", "change": without(".weight_shape")}, "needs weight_shape, which the file lacks"),
    (
        {"kind": "compressed", "change": replaced(".weight_shape", lambda t: t + 8)},
        r"groups of 32 must divide a row, the file has rows of 136",
    ),
    (
        {"kind": "compressed", "change": replaced(".weight_packed", lambda t: t[1:].contiguous())},
        r"weight_packed must be int32 \[256, 16\], found int32 \[255, 16\]",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_files(tmp_path, change, message):
    write(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        loading.load_skeleton(tmp_path, head="language")
