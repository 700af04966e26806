"""quant: bitsandbytes and transformers are the peers, to the byte."""

import json
import sys

import bitsandbytes as bnb
import bitsandbytes.functional as peer
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from medvl.hub import loading, saving, skeletons
from medvl.weights import four_bit, lazy, lora
from medvl.weights.four_bit import QuantConfig
from tests import tiny

CODE = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0]
CODE += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]


def matrix(shape=(48, 96), dtype=torch.float32, seed=0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    w.view(-1)[: min(64, w.numel() // 2)] = 0  # a block of zeros
    return w.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 96), (33, 7), (1, 1), (130, 64)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_equals_bitsandbytes_to_the_byte(dtype, shape, kind, double):
    w = matrix(shape, dtype)
    ours = four_bit.quantize_matrix(w, QuantConfig(kind=kind, double=double))
    packed, state = peer.quantize_4bit(w, quant_type=kind, compress_statistics=double, blocksize=64)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(lazy.dense(ours), peer.dequantize_4bit(packed, state))
    stored = four_bit.pack_weight(ours)
    assert {k: v.tolist() for k, v in state.as_dict(packed=True).items()} == {
        k[1:]: v.tolist() for k, v in stored.items() if k
    }
    again = four_bit.unpack_weight(stored)
    assert torch.equal(lazy.dense(again), lazy.dense(ours))
    assert repr(again) == repr(ours)


def test_values_are_the_nearest_of_the_code():
    """The naive formula: each block of 64 divided by its largest magnitude, each value the nearest of 16."""
    w = matrix((6, 64))
    got = lazy.dense(four_bit.quantize_matrix(w, QuantConfig(double=False)))
    code = torch.tensor(CODE)
    scale = w.view(-1, 64).abs().amax(1, keepdim=True)
    near = (w.view(-1, 64) / scale.clamp(min=1e-30)).unsqueeze(-1).sub(code).abs().argmin(-1)
    torch.testing.assert_close(got, (code[near] * scale).view_as(w), rtol=0, atol=1e-7)


def test_bytes_with_scales():
    """4.127 bits a weight where scales are quantised too, 4.5 where not."""
    w = matrix((1024, 1024))
    double = four_bit.quantize_matrix(w)
    assert 8 * lazy.nbytes({"w": double}) / w.numel() == pytest.approx(4.127, abs=0.01)
    single = four_bit.quantize_matrix(w, QuantConfig(double=False))
    assert 8 * lazy.nbytes({"w": single}) / w.numel() == 4.5


def test_without_bitsandbytes_every_use_says_what_to_install(monkeypatch):
    q = four_bit.quantize_matrix(matrix())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    uses = (
        lambda: four_bit.quantize_matrix(matrix()),
        lambda: F.linear(torch.randn(2, q.shape[1]), q),
        lambda: lazy.dense(q),
        lambda: four_bit.pack_weight(q),
        four_bit.eight_bit_moments,
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"need bitsandbytes; pip install 'medvl\[quant\]'"):
            use()


def test_products_and_gradients_equal_linear4bit():
    """bitsandbytes' own layer, in training mode: its evaluation mode repacks the weight in place."""
    w, bias = matrix((64, 96)), torch.randn(64)
    layer = bnb.nn.Linear4bit(96, 64, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(
        w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    layer.bias = torch.nn.Parameter(bias.clone())
    layer = layer.to("cpu").train()
    x = torch.randn(2, 5, 96)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    b = bias.clone().requires_grad_()
    out, want = F.linear(ours, four_bit.quantize_matrix(w), b), layer(theirs)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    grads = torch.autograd.grad(out.square().sum(), (ours, b))
    for g, h in zip(grads, torch.autograd.grad(want.square().sum(), (theirs, layer.bias)), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-6)


def test_the_backward_pass_keeps_no_written_out_weight():
    q, kept = four_bit.quantize_matrix(matrix((256, 256))), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        F.linear(torch.randn(1, 256, requires_grad=True), q)
    assert sum(kept) <= 4 * 256


def test_a_model_is_quantised_where_it_should_be():
    for kind in ("qwen3", "qwen2_5_vl", "internvl", "phi3"):
        skeleton, params = tiny.model(kind)
        q = four_bit.quantize(params)
        hit = {n for n, w in q.items() if isinstance(w, four_bit.FourBit)}
        layers = {
            n
            for n in params
            if ".layers." in n and n.endswith("_proj.weight") and "visual" not in n and "vision" not in n
        }
        assert hit == layers, kind
        assert all(q[n] is params[n] for n in params.keys() - hit)
        x = tiny.batch(kind)
        written = {n: lazy.dense(w) for n, w in q.items()}
        with torch.no_grad():
            torch.testing.assert_close(
                skeleton(q, **x).logits, skeleton(written, **x).logits, rtol=0, atol=1e-6
            )
    everything = four_bit.quantize(params, QuantConfig(skip=()))
    assert all(isinstance(w, four_bit.FourBit) == (w.dim() == 2) for w in everything.values())


def test_quantising_while_loading_is_quantising_afterwards(tmp_path):
    skeleton, params = tiny.model("qwen2_5_vl")
    saving.save_skeleton(skeleton, params, tmp_path / "m")
    _, loaded = loading.load_skeleton(tmp_path / "m", head="language", transform=four_bit.quantizer())
    want = four_bit.quantize(params)
    assert {n: repr(w) for n, w in loaded.items() if isinstance(w, lazy.Lazy)} == {
        n: repr(w) for n, w in want.items() if isinstance(w, lazy.Lazy)
    }
    assert all(torch.equal(lazy.dense(loaded[n]), lazy.dense(want[n])) for n in want)


# Files of transformers ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["qwen3", "qwen2_5_vl"])
def test_reads_and_writes_the_4_bit_files_of_transformers(tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    auto = AutoModelForCausalLM if kind == "qwen3" else AutoModelForImageTextToText
    skeleton, params = tiny.model(kind)
    saving.save_skeleton(skeleton, params, tmp_path / "whole")
    skip = ["lm_head", *(["model.visual"] if kind != "qwen3" else [])]
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skip,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = auto.from_pretrained(tmp_path / "whole", quantization_config=how, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    x = tiny.batch(kind)
    theirs.train()  # the evaluation mode of bitsandbytes repacks weights in place
    for m in theirs.modules():
        if not isinstance(m, bnb.nn.Linear4bit):
            m.training = False
    with torch.no_grad():
        want = theirs(**x).logits
        skeleton, loaded = loading.load_skeleton(tmp_path / "theirs", head="language")
        assert sum(isinstance(w, four_bit.FourBit) for w in loaded.values()) == 14
        torch.testing.assert_close(skeleton(loaded, **x).logits, want, rtol=0, atol=1e-5)
    saving.save_skeleton(skeleton, loaded, tmp_path / "ours")
    files = [
        {k: t for f in sorted((tmp_path / d).glob("*.safetensors")) for k, t in load_file(f).items()}
        for d in ("theirs", "ours")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0] if "quant_state" not in k)
    assert all(
        four_bit.read_quant_header({".quant_state.": f[k]})
        == four_bit.read_quant_header({".quant_state.": files[0][k]})
        for f in files
        for k in f
        if "quant_state" in k
    )
    again = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    of = [
        [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)] for model in (theirs, again)
    ]
    assert of[0] == of[1]
    for m in again.modules():
        m.training = isinstance(m, bnb.nn.Linear4bit)
    with torch.no_grad():
        torch.testing.assert_close(again(**x).logits, want, rtol=0, atol=1e-5)


# Bad input ------------------------------------------------------------------------------------------------------------------------------
def stored(**change):
    held = four_bit.pack_weight(four_bit.quantize_matrix(matrix()))
    state = next(k for k in held if "quant_state" in k)
    about = json.loads(bytes(held[state].tolist()).decode()) | change
    return held | {state: torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)}


BAD = [
    (lambda: QuantConfig(blocksize=48), "blocksize must be a power of two from 32 to 4096, got 48"),
    (lambda: QuantConfig(kind="int4"), "kind must be 'nf4' or 'fp4', got 'int4'"),
    (lambda: QuantConfig(skip=("(",)), r"skip holds '\(', which is no regular expression"),
    (
        lambda: four_bit.quantize_matrix(torch.ones(4)),
        r"needs a matrix of 16- or 32-bit floats, got \[4\] float32",
    ),
    (lambda: four_bit.quantize_matrix(torch.ones(4, 4).double()), r"got \[4, 4\] float64"),
    (lambda: four_bit.quantize_matrix(torch.full((4, 4), torch.inf)), "values that are not finite"),
    (lambda: four_bit.quantize({"a.weight": torch.ones(4)}), "none of 1 weights is a matrix"),
    (
        lambda: four_bit.quantize({"a.weight": four_bit.quantize_matrix(matrix(), QuantConfig(kind="fp4"))}),
        "a.weight must be a plain tensor, got FourBit",
    ),
    (
        lambda: four_bit.unpack_weight({k: t for k, t in stored().items() if "quant_state" not in k}),
        "it is missing",
    ),
    (lambda: four_bit.unpack_weight({k: t for k, t in stored().items() if k != ".absmax"}), "lacks .absmax"),
    (
        lambda: four_bit.unpack_weight({k: t for k, t in stored().items() if k != ".nested_absmax"}),
        "lacks .nested_absmax",
    ),
    (
        lambda: four_bit.unpack_weight(stored(shape=[48, 95])),
        r"\[48, 95\] needs 2280 bytes and 72 scales, got \(2304, 72\)",
    ),
    (lambda: four_bit.unpack_weight(stored(quant_type="int3")), "quant_type is 'int3'"),
    (lambda: four_bit.unpack_weight(stored(nested_blocksize=128)), "blocks of 256, got 128"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_weights_and_files(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_broken_4_bit_file_says_where(tmp_path):
    skeleton, params = tiny.model("qwen3")
    saving.save_skeleton(skeleton, four_bit.quantize(params), tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    state.pop("model.layers.0.mlp.up_proj.weight.absmax")
    save_file(state, tmp_path / "m/model.safetensors")
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp.up_proj.weight: quant: a 4-bit weight lacks .absmax"
    ):
        loading.load_skeleton(tmp_path / "m", head="language")


# Experts of mixture models --------------------------------------------------------------------------------------------------------------
MIXTURE = tiny.TEXT | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
}


def mixture(kind, **change):
    """A skeleton with one layer of experts, and random weights."""
    skeleton = skeletons.empty_skeleton(
        {"model_type": kind} | MIXTURE | MIXTURES[kind] | change, head="language"
    )
    gen = torch.Generator().manual_seed(0)
    shapes = {n: p.shape for n, p in skeleton.module.named_parameters()}
    return skeleton, {n: torch.randn(s, generator=gen) * 0.15 + ("norm" in n) for n, s in shapes.items()}


def gradient(skeleton, params, name, ids):
    leaf = params[name].clone().requires_grad_()
    (grad,) = torch.autograd.grad(skeleton(params | {name: leaf}, ids).logits.square().sum(), leaf)
    return grad


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_quantised_and_answer_as_their_values(kind, how):
    skeleton, params = mixture(kind, experts_implementation=how)
    four = four_bit.quantize(params)
    stacks = [n for n in four if lazy.EXPERTS.search(n) and not n.endswith("_bias")]
    assert len(stacks) == 2
    assert all(isinstance(four[n], four_bit.FourBit) and four[n].dim() == 3 for n in stacks)
    assert sum(w.numel() for w in four.values() if isinstance(w, four_bit.FourBit)) > 0.6 * sum(
        w.numel() for w in params.values()
    )
    plain = {n: lazy.dense(w) for n, w in four.items()}
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(skeleton(four, ids).logits, skeleton(plain, ids).logits, rtol=0, atol=1e-6)
    norm = "model.layers.0.post_attention_layernorm.weight"
    want = gradient(skeleton, plain, norm, ids)
    assert want.abs().max() > 0
    torch.testing.assert_close(gradient(skeleton, four, norm, ids), want, rtol=1e-5, atol=1e-5)


def test_quantised_experts_of_a_file_and_what_is_said_of_the_rest(tmp_path):
    skeleton, params = mixture("qwen3_moe")
    saving.save_skeleton(skeleton, params, tmp_path / "whole")
    again, four = loading.load_skeleton(tmp_path / "whole", head="language", transform=four_bit.quantizer())
    want = four_bit.quantize(params)
    assert skeletons.weights_digest(four) == skeletons.weights_digest(want)
    with pytest.raises(ValueError, match="experts in 4 bits, which no file format can hold"):
        saving.save_skeleton(again, four, tmp_path / "four")
    assert not (tmp_path / "four").exists()
    shaped = four_bit.quantize({n: t.to("meta") for n, t in params.items()})
    assert lazy.nbytes(shaped) == lazy.nbytes(want)
    with pytest.warns(UserWarning, match=r"quantize: conv \[4, 4, 3\] stays in full precision"):
        four_bit.quantize({"conv": torch.ones(4, 4, 3), "w": torch.ones(64, 64)})


def test_all_linear_says_that_it_leaves_experts_alone(gen):
    skeleton, _ = mixture("qwen3_moe")
    with pytest.warns(
        UserWarning,
        match="all-linear does not adapt experts: model.layers.0.mlp.experts.gate_up_proj and 1 more hold 49,152",
    ):
        adapter = lora.init_lora(lora.LoraConfig(pattern="all-linear"), skeleton, gen)
    assert not [m for m in adapter.factors if "experts" in m]
