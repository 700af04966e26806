"""lora: peft is the peer; every layer kind, pattern and scale."""

import copy

import peft
import pytest
import torch
from attrs import evolve
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from medvl.hub import loading, saving, skeletons
from medvl.weights import four_bit, lazy, lora
from medvl.weights.lora import LoraConfig
from tests import tiny


def theirs(kind, skeleton, params, **config):
    """A peft model with random factors on our weights, and the same factors as an Adapter."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.peer(skeleton, params), peft.LoraConfig(**config)).eval()
    factors, scale, kinds = {}, {}, {}
    for name, m in model.named_modules():
        if not hasattr(m, "lora_A"):
            continue
        path, embed = name.removeprefix("base_model.model."), len(m.lora_embedding_A) > 0
        pair = (m.lora_embedding_A, m.lora_embedding_B) if embed else (m.lora_A, m.lora_B)
        a, b = (p["default"] if embed else p["default"].weight for p in pair)
        with torch.no_grad():
            a.copy_(torch.randn_like(a) * 0.2)
            b.copy_(torch.randn_like(b) * 0.2)
        factors[path] = {"a": a.detach().clone(), "b": b.detach().clone()}
        scale[path] = m.scaling["default"]
        kinds[path] = "embedding" if embed else "conv1d" if m.fan_in_fan_out else "linear"
    return model, lora.Adapter(factors=factors, scale=scale, kinds=kinds)


CASES = {
    "list": ("qwen3", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ("qwen2", {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.*q_proj": 6},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "embedding": ("qwen2", {"r": 4, "target_modules": ["embed_tokens", "o_proj", "lm_head"]}),
    "tied embedding": ("qwen3", {"r": 4, "target_modules": ["embed_tokens", "o_proj"]}),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True}),
    "fused": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "tower": ("qwen2_5_vl", {"r": 4, "target_modules": "all-linear"}),
    "projector": ("internvl", {"r": 4, "target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_equals_peft(case):
    kind, config = CASES[case]
    skeleton, params = tiny.model(kind)
    model, adapter = theirs(kind, skeleton, params, **config)
    x = tiny.batch(kind, side="right")
    with torch.no_grad():
        want, bare = model(**x).logits, skeleton(params, **x).logits
        got = skeleton(lora.apply_lora(params, adapter), **x).logits
    assert (want - bare).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c != "tower"])
@pytest.mark.filterwarnings("ignore")
def test_targets_scales_and_shapes_are_those_of_peft(case):
    kind, config = CASES[case]
    skeleton, params = tiny.model(kind)
    _, want = theirs(kind, skeleton, params, **config)
    goal = config["target_modules"]
    how = {"pattern": goal} if isinstance(goal, str) else {"targets": tuple(goal)}
    cfg = LoraConfig(
        rank=config["r"],
        alpha=config.get("lora_alpha", 8),
        rslora=config.get("use_rslora", False),
        rank_pattern=config.get("rank_pattern", {}),
        alpha_pattern=config.get("alpha_pattern", {}),
        vision=True,
        **how,
    )
    ours = lora.init_lora(cfg, skeleton, torch.Generator().manual_seed(0))
    assert ours.kinds == want.kinds
    assert ours.scale == pytest.approx(want.scale)
    assert {m: {k: t.shape for k, t in f.items()} for m, f in ours.factors.items()} == {
        m: {k: t.shape for k, t in f.items()} for m, f in want.factors.items()
    }


def test_a_new_adapter_changes_nothing_and_is_drawn_as_in_peft(gen):
    skeleton, params = tiny.model("qwen3")
    x = tiny.batch("qwen3")
    for experts in (2, 0):
        cfg = LoraConfig(
            rank=4, targets=("q_proj", "down_proj", *(() if experts else ("embed_tokens",))), experts=experts
        )
        adapter = lora.init_lora(cfg, skeleton, gen)
        with torch.no_grad():
            assert torch.equal(
                skeleton(lora.apply_lora(params, adapter), **x).logits, skeleton(params, **x).logits
            )
        a = adapter.factors["model.layers.0.mlp.down_proj"]["a"]
        assert a.abs().max() <= 48**-0.5
        assert a.std() == pytest.approx((48 * 3) ** -0.5, rel=0.15)
    same = [lora.init_lora(cfg, skeleton, torch.Generator().manual_seed(s)).factors for s in (1, 1, 2)]
    one = "model.layers.1.self_attn.q_proj"
    assert torch.equal(same[0][one]["a"], same[1][one]["a"])
    assert not torch.equal(same[0][one]["a"], same[2][one]["a"])


def test_a_list_never_reaches_the_vision_tower_unasked(gen):
    skeleton, _ = tiny.model("qwen2_5_vl")
    names = ("gate_proj", "up_proj", "down_proj")
    assert all(".language_model." in m for m in lora.target_layers(LoraConfig(targets=names), skeleton))
    both = lora.target_layers(LoraConfig(targets=names, vision=True), skeleton)
    assert sum("visual" in m for m in both) == 6
    linear = lora.target_layers(LoraConfig(pattern="all-linear"), skeleton)
    assert not any("visual" in m or "lm_head" in m for m in linear)
    regex = lora.target_layers(LoraConfig(pattern=r".*visual.*qkv"), skeleton)
    assert len(regex) == 2
    left = lora.target_layers(
        LoraConfig(targets=("up_proj", "q_proj"), exclude=("layers.0.mlp.up_proj",)), skeleton
    )
    assert len(left) == 3


def test_counting():
    skeleton, params = tiny.model("qwen3")
    adapter = lora.init_lora(LoraConfig(rank=2, targets=("q_proj",)), skeleton, torch.Generator())
    own, base, share = lora.count_adapter(adapter, four_bit.quantize(params))
    assert own == 2 * 2 * (32 + 32)
    assert base == sum(t.numel() for t in params.values())
    assert share == pytest.approx(100 * own / (own + base))


# H-LoRA ---------------------------------------------------------------------------------------------------------------------------------
def test_h_lora_is_the_gated_sum_of_its_experts(gen):
    skeleton, params = tiny.model("phi3")
    x = tiny.batch("phi3")
    adapter = lora.init_lora(LoraConfig(rank=8, alpha=16, experts=4, pattern="all-linear"), skeleton, gen)
    for f in adapter.factors.values():
        f["b"].normal_(generator=gen)
        f["router"].normal_(generator=gen)
    assert set(adapter.scale.values()) == {16 / 8 * 4}
    name = "model.layers.0.mlp.down_proj"
    f, w = adapter.factors[name], params[f"{name}.weight"]
    h = torch.randn(2, 3, 48, generator=gen)
    share = (h @ f["router"].T).softmax(-1)
    want = h @ w.T
    for i in range(4):  # alpha / r_i with r_i = rank / 4 is the scale of each expert
        want = want + share[..., i : i + 1] * (16 / 2) * (
            h @ f["a"][2 * i : 2 * i + 2].T @ f["b"][:, 2 * i : 2 * i + 2].T
        )
    torch.testing.assert_close(
        torch.nn.functional.linear(h, lora.apply_lora(params, adapter)[f"{name}.weight"]),
        want,
        rtol=1e-6,
        atol=1e-5,
    )
    for f in adapter.factors.values():
        f["router"].zero_()
    plain = evolve(
        adapter,
        factors={m: {k: t for k, t in f.items() if k != "router"} for m, f in adapter.factors.items()},
    )
    plain = evolve(plain, scale={m: 16 / 8 for m in plain.scale})
    with torch.no_grad():
        routed, even = (skeleton(lora.apply_lora(params, a), **x).logits for a in (adapter, plain))
        assert torch.equal(routed, even)
        assert (even - skeleton(params, **x).logits).abs().max() > 0.1


# QLoRA ----------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
def test_qlora_gradients_are_those_of_peft_over_linear4bit():
    import bitsandbytes as bnb

    skeleton, params = tiny.model("qwen3")
    base = four_bit.quantize(params)
    module = tiny.peer(skeleton, params)
    for n, w in base.items():
        if isinstance(w, four_bit.FourBit):
            old = module.get_submodule(n.removesuffix(".weight"))
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(
                params[n].clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            module.set_submodule(n.removesuffix(".weight"), new.to("cpu"))
    model = get_peft_model(
        module, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"])
    ).train()
    factors = {}
    for name, m in model.named_modules():
        if hasattr(m, "lora_A"):
            pair = {"a": m.lora_A["default"].weight, "b": m.lora_B["default"].weight}
            torch.nn.init.normal_(pair["b"], std=0.1)
            factors[name.removeprefix("base_model.model.")] = pair
    leaves = {m: {k: t.detach().clone().requires_grad_() for k, t in f.items()} for m, f in factors.items()}
    kinds, scale = dict.fromkeys(factors, "linear"), dict.fromkeys(factors, 2.0)
    x = tiny.batch("qwen3")
    before = {n: copy.deepcopy(list(lazy.leaves(w))) for n, w in base.items()}
    ours = skeleton(
        lora.apply_lora(base, lora.Adapter(factors=leaves, kinds=kinds, scale=scale)), **x, use_cache=False
    ).logits
    want = model(**x, use_cache=False).logits
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)
    flat = [(leaves[m][k], factors[m][k]) for m in leaves for k in "ab"]
    got = torch.autograd.grad(ours.square().mean(), [t for t, _ in flat])
    for g, w in zip(got, torch.autograd.grad(want.square().mean(), [t for _, t in flat]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-7)
    assert max(float(g.abs().max()) for g in got) > 1e-3
    for n, w in base.items():
        assert all(torch.equal(t, old) for t, old in zip(lazy.leaves(w), before[n], strict=True)), n


# Merging --------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["patterns", "embedding", "conv1d", "tower"])
@pytest.mark.filterwarnings("ignore")
def test_merged_weights_answer_like_adapted_ones(case):
    kind, config = CASES[case]
    skeleton, params = tiny.model(kind)
    _, adapter = theirs(kind, skeleton, params, **config)
    x = tiny.batch(kind, side="right")
    if case == "conv1d":  # GPT-2's head is its embedding, and the adapter is not on the head
        with pytest.raises(ValueError, match=r"transformer.wte may be tied to the head"):
            lora.merge_adapter(params, adapter)
        both = lora.merge_adapter(params, adapter, also_head=True).params["transformer.wte.weight"]
        f = adapter.factors["transformer.wte"]
        torch.testing.assert_close(
            both, params["transformer.wte.weight"] + 2 * (f["b"] @ f["a"]).T, rtol=0, atol=1e-5
        )
        adapter = evolve(
            adapter,
            factors={m: f for m, f in adapter.factors.items() if "wte" not in m},
            kinds=dict.fromkeys(adapter.kinds, "conv1d"),
        )
    done = lora.merge_adapter(params, adapter)
    assert not any(isinstance(w, lazy.Lazy) for w in done.params.values())
    with torch.no_grad():
        want = skeleton(lora.apply_lora(params, adapter), **x).logits
        # W + BA is rounded once to float32, here and there the products are: CPUs differ by 1.2e-5 in the logits.
        torch.testing.assert_close(skeleton(done.params, **x).logits, want, rtol=0, atol=2e-5)
    name = next(iter(adapter.factors))
    f = adapter.factors[name]
    size = (f["b"] @ f["a"]).norm() * adapter.scale[name] / params[f"{name}.weight"].norm()
    assert done.change[name] == pytest.approx(float(size), rel=1e-4)
    assert max(done.lost.values()) < 1e-6


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_an_adapter_on_a_tied_head_is_merged_where_the_head_is_untied(kind, gen, tmp_path):
    """Merged into the shared weight it would change the token table too."""
    skeleton, params = tiny.model(kind)
    adapter = lora.init_lora(LoraConfig(rank=4, targets=("lm_head",)), skeleton, gen)
    adapter.factors["lm_head"]["b"].normal_(std=0.2, generator=gen)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        want = skeleton(lora.apply_lora(params, adapter), ids).logits
        bare = skeleton(params, ids).logits
    assert (want - bare).abs().max() > 0.1
    with pytest.raises(
        ValueError, match=r"merge_adapter: lm_head has the weight .* of another layer, .*skeletons.untie"
    ):
        lora.merge_adapter(params, adapter)
    own, weights_ = skeletons.untie(skeleton, params)
    with torch.no_grad():
        torch.testing.assert_close(own(weights_, ids).logits, bare, rtol=0, atol=0)
    merged = lora.merge_adapter(weights_, adapter).params
    with torch.no_grad():
        torch.testing.assert_close(own(merged, ids).logits, want, rtol=0, atol=1e-5)
    saving.save_skeleton(own, merged, tmp_path / "saved")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, want, rtol=0, atol=1e-5)
    again, read = loading.load_skeleton(tmp_path / "saved", head="language")
    assert skeletons.weights_digest(read) == skeletons.weights_digest(merged)
    with pytest.raises(ValueError, match=r"untie: no two layers of .* share a weight"):
        skeletons.untie(again, read)


def test_merging_onto_rounded_weights_says_what_is_lost(gen):
    skeleton, params = tiny.model("qwen3")
    base = four_bit.quantize({n: t.bfloat16() for n, t in params.items()})
    adapter = lora.init_lora(LoraConfig(rank=4, pattern="all-linear"), skeleton, gen)
    for f in adapter.factors.values():
        f["b"].normal_(std=0.003, generator=gen)
    done = lora.merge_adapter(base, adapter)
    name = "model.layers.0.mlp.up_proj"
    w, f = lazy.dense(base[f"{name}.weight"]).float(), adapter.factors[name]
    exact = w + adapter.scale[name] * f["b"] @ f["a"]
    assert torch.equal(done.params[f"{name}.weight"], exact.bfloat16())
    assert done.lost[name] == pytest.approx(
        float((exact.bfloat16().float() - exact).norm() / (exact - w).norm()), rel=1e-4
    )
    assert 0.01 < done.lost[name] < 1
    assert lora.merge_adapter(base, adapter, dtype=torch.float32).lost[name] < 1e-6


# Errors ---------------------------------------------------------------------------------------------------------------------------------
def fresh(**change):
    skeleton, _ = tiny.model("qwen2_5_vl")
    return lora.init_lora(
        LoraConfig(**{"rank": 4, "targets": ("q_proj",)} | change), skeleton, torch.Generator()
    )


def applied(adapter, kind="qwen2_5_vl", **kwargs):
    return lora.apply_lora(tiny.model(kind)[1], adapter, **kwargs)


ONE = "model.language_model.layers.0.self_attn.q_proj"
BAD = [
    (lambda: LoraConfig(rank=0, targets=("q_proj",)), "ranks must be positive"),
    (lambda: LoraConfig(rank=4, dropout=1.0, targets=("q_proj",)), r"dropout in \[0, 1\)"),
    (
        lambda: LoraConfig(rank=6, experts=4, targets=("q_proj",)),
        r"4 experts must divide the rank, got \[6\]",
    ),
    (lambda: LoraConfig(), "give either targets .* or pattern"),
    (lambda: LoraConfig(targets=("q_proj",), pattern=".*"), "give either targets .* or pattern"),
    (lambda: LoraConfig(pattern="("), r"'\(' is not a regular expression"),
    (lambda: fresh(targets=("query",)), r"target 'query': no layer ends in it; there are .*q_proj"),
    (
        lambda: fresh(targets=("qkv",)),
        r"target 'qkv': only layers of the vision tower \(model.visual.blocks.0.attn.qkv...\) .* vision=True",
    ),
    (lambda: fresh(targets=(), pattern=".*query"), "names no layer"),
    (
        lambda: fresh(targets=("embed_tokens",), experts=2),
        "is an embedding, which has no hidden state to route by",
    ),
    (lambda: fresh(exclude=("q_proj",)), "names no layer"),
    (
        lambda: applied(fresh(), "qwen2"),
        f"the model has no weight {ONE}.weight; its weights look like model.embed_tokens",
    ),
    (
        lambda: applied(evolve(fresh(), factors={ONE: {"a": torch.ones(4, 31), "b": torch.ones(32, 4)}})),
        f"{ONE} of Adapter.*must fit the weight, .* was the adapter made for another model",
    ),
    (
        lambda: applied(
            evolve(a := fresh(targets=("qkv",), vision=True), gate={m: torch.ones(2, 4) for m in a.factors})
        ),
        "model.visual.blocks.0.attn.qkv sees images and its weights differ by sample; give rows=",
    ),
    (
        lambda: applied(evolve(fresh(), full={"model.language_model.norm.weight": torch.ones(3)})),
        r"replaces model.language_model.norm.weight \[3\], the model has \[32\] there",
    ),
    (
        lambda: lora.merge_adapter(
            tiny.model("qwen2_5_vl")[1], evolve(a := fresh(), gate={m: torch.ones(2, 4) for m in a.factors})
        ),
        "its correction depends on the sample",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_configs_and_adapters(call, message):
    with pytest.raises(ValueError, match=message):
        call()
