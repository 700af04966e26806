"""AWQ: the search against AutoAWQ's formula in naive loops, what folding must keep, and what is refused."""

import copy
import json
import warnings
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from PIL import Image

from medvl.hub import loading
from medvl.language import awq, chat, vlm
from medvl.language.awq import AwqConfig
from medvl.language.conversations import Conversation
from medvl.weights import four_bit, int4, lazy
from medvl.weights.int4 import Int4Config
from tests import tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
GROUPS = AwqConfig(rounding=Int4Config(group=32))
KINDS = {
    "llama": {"model_type": "llama", **tiny.TEXT, **SIZES, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", **tiny.TEXT, **SIZES, "num_key_value_heads": 4},  # biases of q, k, v
    "qwen3": {**tiny.CONFIGS["qwen3"], **SIZES, "head_dim": 16},  # GQA
    "phi3": {**tiny.CONFIGS["phi3"], **SIZES, "num_key_value_heads": 4},
    "phi3 gqa": {**tiny.CONFIGS["phi3"], **SIZES},
    "qwen2_5_vl": tiny.CONFIGS["qwen2_5_vl"],
    "qwen3_vl": tiny.CONFIGS["qwen3_vl"],
}


def config(kind):
    raw = json.loads(json.dumps(KINDS[kind]))
    if "text_config" in raw:
        rope = raw["text_config"]["rope_parameters"] | {"mrope_section": [4, 2, 2]}
        raw["text_config"] |= SIZES | {"head_dim": 16, "rope_parameters": rope}
        raw["vision_config"]["out_hidden_size"] = 64
    return raw


@cache
def tokenizer(folder):
    texts = ["Is there an effusion? No. Yes, on the left. A mass of 12 mm. user assistant"]
    return chat.tokenizer_of(chat.ModelConfig(config={"model_type": "llama"}), folder, texts)


@pytest.fixture
def opened(tmp_path_factory, gen):
    """(chat, params, calibration data) of a kind of model, activations with a few large channels."""
    folder = tmp_path_factory.getbasetemp() / "tokenizer of awq"
    folder.mkdir(exist_ok=True)

    def open_kind(kind, dtype="float32"):
        model = chat.ModelConfig(config=config(kind), dtype=dtype)
        talk, params = chat.open_chat(model, chat.ChatConfig(context=256), tokenizer(folder), gen)
        for name, w in params.items():
            noise = torch.randn(w.shape, generator=gen) * 0.15
            if "norm" in name and w.dim() == 1:
                # As trained models have it: a few channels are many times larger than the others.
                noise = 1 + noise + 8 * (torch.rand(w.shape, generator=gen) > 0.95)
            params[name] = noise.to(w.dtype)
        return talk, params, chat.encode_conversations(talk, conversations("vl" in kind))

    return open_kind


def conversations(images):
    made = []
    for i, answer in enumerate(("No.", "Yes, on the left.", "A mass of 12 mm.", "No.")):
        items = (Image.new("RGB", (16 + 8 * i, 24), (60 * i, 90, 200)),) if images and i % 2 == 0 else ()
        question = "<image>\nIs there an effusion?" if items else "Is there a mass?"
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        made.append(Conversation(messages=turns, images=items))
    return made


def logits(talk, params, data):
    """Of all conversations, each alone."""
    rows = []
    with torch.no_grad():
        for i in range(len(data.samples)):
            inputs = chat.model_inputs(talk, params, chat.make_batch(talk, data, [i]))
            inputs.pop("labels")
            rows.append(talk.skeleton(params, **vlm.model_inputs(talk.skeleton, inputs)).logits[0])
    return torch.cat(rows).float()


# What it must keep ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_folding_keeps_the_logits_and_reaches_the_groups(opened, kind):
    talk, params, data = opened(kind)
    scales = awq.find_scales(talk, params, data, evolve(GROUPS, ratios=4))
    fold = awq.fold_scales(scales)
    folded = {name: fold(name, w) for name, w in params.items()}
    want = logits(talk, params, data)
    assert float((logits(talk, folded, data) - want).abs().max()) < 1e-5 * float(want.abs().max())
    changed = {name for name in params if not torch.equal(folded[name], params[name])}
    assert not any("visual" in name or "head" in name or "embed" in name for name in changed)
    assert len(changed) >= 8
    # Queries, keys and values; outputs only without GQA; gates; down.
    layer = [scale.layers for scale in scales.groups if ".layers.0." in scale.layers[0]]
    ends = [tuple(name.split(".")[-2] for name in names) for names in layer]
    want_ends = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)]
    if "phi3" in kind:
        want_ends = [("qkv_proj",), ("gate_up_proj",), ("down_proj",)]
    if kind in ("llama", "qwen2", "phi3"):
        want_ends.insert(1, ("o_proj",))
    assert ends == want_ends
    for scale in scales.groups:
        assert scale.error <= scale.rounding_error
        assert float(scale.factors.max() * scale.factors.min()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "phi3"])
def test_a_ratio_of_0_is_rounding(opened, kind):
    talk, params, data = opened(kind)
    four, scales = awq.quantize_awq(talk, params, data, evolve(GROUPS, ratios=1))
    want = int4.quantize(params, GROUPS.rounding)
    assert all(torch.equal(lazy.dense(four[n]), lazy.dense(want[n])) for n in params)
    assert {n: repr(w) for n, w in four.items()} == {n: repr(w) for n, w in want.items()}
    assert all((scale.factors == 1).all() for scale in scales.groups)


@pytest.mark.parametrize("clip", [False, True])
def test_logits_are_closer_than_by_rounding(opened, clip):
    talk, params, data = opened("qwen2_5_vl")
    four, scales = awq.quantize_awq(talk, params, data, evolve(GROUPS, clip=clip))
    want = logits(talk, params, data)

    def error(weights):
        return float((logits(talk, weights, data) - want).square().mean())

    assert error(four) < 0.8 * error(int4.quantize(params, GROUPS.rounding))
    assert bool(scales.clips) == clip
    assert not any("q_proj" in name or "k_proj" in name for name in scales.clips)
    assert {n for n, w in four.items() if isinstance(w, int4.Int4)} == {
        n for n, w in four_bit.quantize(params).items() if isinstance(w, four_bit.FourBit)
    }


def test_16_bits_and_weights_as_they_are_read(opened, tmp_path):
    """`awq_quantizer` as the transform of a checkpoint gives what quantising the loaded model gives."""
    talk, params, data = opened("qwen3", "bfloat16")
    four, scales = awq.quantize_awq(talk, params, data, GROUPS)
    chat.save_chat(talk, params, tmp_path / "m")
    _, read = loading.load_skeleton(
        tmp_path / "m", head="language", dtype=torch.bfloat16, transform=awq.awq_quantizer(scales, GROUPS)
    )
    assert all(torch.equal(lazy.dense(read[n]), lazy.dense(four[n])) for n in params)
    chat.save_chat(talk, four, tmp_path / "four")
    again, params = chat.open_chat(
        chat.ModelConfig(name=str(tmp_path / "four")), talk.cfg, talk.tokenizer, torch.Generator()
    )
    torch.testing.assert_close(logits(again, params, data), logits(talk, four, data))


# The formula ----------------------------------------------------------------------------------------------------------------------------
def naive_scales(weights, x, output, group, ratios):
    """AutoAWQ's `_search_best_scale` in one place; ratio 0 is no factor. `output(weights)` is of the inspected module."""
    w = torch.cat(weights)
    parts = w.view(-1, group).abs()
    w_mean = (parts / (parts.amax(1, keepdim=True) + 1e-6)).view(w.shape).mean(0)
    x_mean = x.abs().mean(0)
    want, best = output(weights), (float("inf"), None, None)
    for step in range(ratios):
        ratio = step / ratios
        s = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        s = torch.ones_like(s) if step == 0 else s
        rounded = [lazy.dense(int4.quantize_matrix(t * s, Int4Config(group=group))) / s for t in weights]
        error = float((output(rounded) - want).square().mean())
        if error < best[0]:
            best = (error, ratio, s)
    return best


def test_the_search_is_that_of_autoawq(opened):
    """A Llama's MLP, computed by hand from the activations that a hook on the model itself sees."""
    talk, params, data = opened("llama")
    scales = awq.find_scales(talk, params, data, GROUPS)
    inputs = {}

    def hook(name):
        return lambda module, args: inputs.setdefault(name, []).append(args[0][0])

    module = tiny.peer(talk.skeleton, params)
    for name in ("gate_proj", "down_proj", "o_proj"):
        part = module.get_submodule(f"model.layers.1.{'self_attn' if name == 'o_proj' else 'mlp'}.{name}")
        part.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for sample in data.samples:
            module(sample.ids[None])
    x = {name: torch.cat(rows) for name, rows in inputs.items()}
    w = {n: params[f"model.layers.1.mlp.{n}.weight"] for n in ("gate_proj", "up_proj", "down_proj")}
    w["o_proj"] = params["model.layers.1.self_attn.o_proj.weight"]

    def mlp(weights):
        return F.linear(
            F.silu(F.linear(x["gate_proj"], weights[0])) * F.linear(x["gate_proj"], weights[1]),
            w["down_proj"],
        )

    wanted = {
        "gate_proj": ([w["gate_proj"], w["up_proj"]], mlp),
        "down_proj": ([w["down_proj"]], lambda weights: F.linear(x["down_proj"], weights[0])),
        "o_proj": ([w["o_proj"]], lambda weights: F.linear(x["o_proj"], weights[0])),
    }
    found = {scale.layers[0].split(".")[-2]: scale for scale in scales.groups if ".1." in scale.layers[0]}
    for name, (weights, output) in wanted.items():
        error, ratio, factors = naive_scales(weights, x[name], output, 32, 20)
        assert found[name].error == pytest.approx(error, rel=1e-3)
        assert found[name].ratio == ratio
        torch.testing.assert_close(found[name].factors, factors, rtol=1e-4, atol=1e-6)
    assert any(scale.ratio > 0 for scale in scales.groups)


def test_the_search_for_ranges_is_that_of_autoawq():
    """`_compute_best_clip`: of ten bounds for each group of each row, that with the least change of its products."""
    gen = torch.Generator().manual_seed(0)
    w, x = torch.randn(12, 64, generator=gen), torch.randn(20, 64, generator=gen)
    shrunk = 0
    got = awq._find_clip(w, x, Int4Config(group=32))
    for row in range(12):
        for g in range(2):
            part, inputs = w[row, 32 * g : 32 * g + 32], x[:, 32 * g : 32 * g + 32]
            errors = []
            for step in range(10):
                bound = float(part.abs().max()) * (1 - step / 20)
                clipped = part.clamp(-bound, bound)[None]
                change = inputs @ (lazy.dense(int4.quantize_matrix(clipped, Int4Config(group=32)))[0] - part)
                errors.append(float(change.square().mean()))
            least = errors.index(min(errors))
            assert float(got[row, g]) == pytest.approx(float(part.abs().max()) * (1 - least / 20), rel=1e-6)
            shrunk += least > 0
    assert shrunk > 2


# Bad input ------------------------------------------------------------------------------------------------------------------------------
def test_what_is_refused(opened):
    talk, params, data = opened("qwen2_5_vl")
    texts = chat.encode_conversations(talk, conversations(False))
    with pytest.raises(ValueError, match=r"must show images, .* none of 4 does"):
        awq.find_scales(talk, params, texts)
    embedded = evolve(talk, vision=evolve(talk.vision, embed=lambda params, inputs: params["project"]))
    with pytest.raises(ValueError, match="visual tokens from a part that is not in its params"):
        awq.find_scales(embedded, params, data)
    with pytest.raises(ValueError, match="there must be calibration conversations, found none"):
        awq.find_scales(talk, params, evolve(data, samples=(), conversations=()))
    with pytest.raises(ValueError, match=r"q_proj.weight must be a plain tensor in full precision, got Int4"):
        awq.find_scales(talk, int4.quantize(params, GROUPS.rounding), data)
    with pytest.raises(ValueError, match=r"groups of 128 must divide a row, .* has rows of 64"):
        awq.find_scales(talk, params, data)
    with pytest.raises(ValueError, match="ratios must be at least 1, got 0"):
        AwqConfig(ratios=0)


def test_norms_that_do_not_take_factors_are_found(opened, monkeypatch):
    """As of Gemma, which multiplies by 1 + weight."""
    talk, params, data = opened("llama")
    module = copy.deepcopy(talk.skeleton.module)
    norm = type(module.model.layers[0].input_layernorm)
    forward = norm.forward

    def gemma(self, x):
        return forward(self, x) + x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    monkeypatch.setattr(norm, "forward", gemma)
    with pytest.raises(ValueError, match=r"its norms are of another kind. Take int4.quantize"):
        awq.find_scales(talk, params, data, GROUPS)


def test_a_chat_is_left_as_it_was(opened):
    talk, params, data = opened("qwen3_vl")
    before = logits(talk, params, data)
    awq.find_scales(talk, params, data, evolve(GROUPS, ratios=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(talk, params, data), before)
    assert not any(part._forward_pre_hooks for part in talk.skeleton.module.modules())
